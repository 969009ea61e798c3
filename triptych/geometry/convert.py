"""Conversions between meshes, voxels, points and depth maps.

Everything is in model space (the cube [-0.5, 0.5]^3, +Y up), voxels are indexed ``[x, y, z]``, and a depth map is
``(S, S)`` float32: the distance from the camera's plane along the view axis, ``inf`` where nothing is seen, row 0 the
top.

    mesh    -> points_from_mesh, voxels.surface_voxels, solid.solid_sdf, depth_from_mesh
    voxels  -> points_from_voxels, mesh_from_voxels
    points  -> voxels_from_points
    depth   -> points_from_depth, mesh_from_depth, voxels_from_depths, fuse_depths (then isosurface.isosurface)
    masks   -> voxels.visual_hull, voxels.hull_field (then isosurface.isosurface)
    field   -> isosurface.isosurface

Not covered: surfaces from points alone (Poisson and the like); give the points' depth maps, or voxels, instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from ..errors import TriptychError
from .cameras import Camera
from .isosurface import isosurface
from .mesh import Mesh
from .metrics import sample_surface
from .voxels import check_resolution, points_to_indices, silhouette_distance, voxel_centers

EMPTY, SURFACE, UNKNOWN = 0, 1, 2  # the states of voxels_from_depths
_MIN_COSINE = 0.2  # depth fusion ignores surfaces seen at less than about 12 degrees

# The four corners of each face of a unit voxel, counter-clockwise from outside, by direction of the face.
_CUBE_FACES = (
    ((1, 0, 0), ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1))),
    ((-1, 0, 0), ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0))),
    ((0, 1, 0), ((0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 1, 0))),
    ((0, -1, 0), ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1))),
    ((0, 0, 1), ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1))),
    ((0, 0, -1), ((0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0))),
)


# --- points and voxels ------------------------------------------------------------------------------------------------


def points_from_mesh(mesh: Mesh, count: int = 30_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` points spread evenly over the surface: points (count, 3) and unit normals (count, 3), float32."""
    return sample_surface(mesh, count, seed)


def points_from_voxels(voxels: np.ndarray) -> np.ndarray:
    """Centres of the occupied voxels: (R, R, R) bool -> (N, 3) float32 in model space, in index order."""
    voxels = _checked_voxels(voxels)
    return ((np.argwhere(voxels) + 0.5) / len(voxels) - 0.5).astype(np.float32)


def voxels_from_points(points: np.ndarray, resolution: int = 64, min_points: int = 1) -> np.ndarray:
    """Voxels that hold at least ``min_points`` of the points: (N, 3) -> (R, R, R) bool.

    Points outside of the model cube are left out (``min_points`` above 1 drops stray ones inside it).
    Raises TriptychError when points are not finite or none lies in the cube.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise TriptychError(f"points must be finite and (N, 3), got shape {points.shape}")
    indices = points_to_indices(points, check_resolution(resolution))
    indices = indices[((indices >= 0) & (indices < resolution)).all(axis=1)]
    if len(indices) == 0:
        raise TriptychError(f"none of the {len(points)} points lies in the cube [-0.5, 0.5]^3: normalise them first")
    flat = np.ravel_multi_index(tuple(indices.T), (resolution,) * 3)
    return (np.bincount(flat, minlength=resolution**3) >= min_points).reshape((resolution,) * 3)


def mesh_from_voxels(voxels: np.ndarray, *, smooth: bool = False) -> Mesh:
    """The boundary of the occupied voxels as a closed mesh in model space.

    voxels: (R, R, R) bool.
    smooth=False: the voxels' own square faces (two triangles each, vertices shared); the volume is exactly that of the
        voxels. Where two voxels meet only along an edge or at a corner, so does the mesh.
    smooth=True: a smooth surface that keeps its promise to the grid: the centre of every occupied voxel is inside, that
        of every other one outside.
    Raises TriptychError when no voxel is occupied.
    """
    voxels = _checked_voxels(voxels)
    if not voxels.any():
        raise TriptychError(f"none of the {len(voxels)}^3 voxels is occupied: there is no surface to make")
    return isosurface(_smooth_field(voxels)) if smooth else _blocks(voxels)


def _checked_voxels(voxels: np.ndarray) -> np.ndarray:
    voxels = np.asarray(voxels)
    if voxels.ndim != 3 or len(set(voxels.shape)) != 1 or voxels.dtype != bool:
        raise TriptychError(
            f"voxels must be (R, R, R) bool, got {voxels.shape} {voxels.dtype}: compare a field with its level first"
        )
    return voxels


def _blocks(voxels: np.ndarray) -> Mesh:
    padded, resolution = np.pad(voxels, 1), len(voxels)
    quads = []
    for direction, corners in _CUBE_FACES:
        neighbour = np.roll(padded, [-step for step in direction], axis=(0, 1, 2))[1:-1, 1:-1, 1:-1]
        quads.append(np.argwhere(voxels & ~neighbour)[:, None] + np.array(corners))
    corners_Q43 = np.concatenate(quads)
    flat = np.ravel_multi_index(tuple(corners_Q43.reshape(-1, 3).T), (resolution + 1,) * 3)
    unique, inverse = np.unique(flat, return_inverse=True)
    vertices = np.stack(np.unravel_index(unique, (resolution + 1,) * 3), axis=1) / resolution - 0.5
    quad = inverse.reshape(-1, 4)
    return Mesh(vertices.astype(np.float32), np.concatenate([quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]]).astype(np.int64))


def _smooth_field(voxels: np.ndarray) -> np.ndarray:
    """Blurred signed distance in voxels, held to the sign that the voxel has."""
    padded = np.pad(voxels, 4)  # so that the blur sees the empty space around the cube
    inside, outside = ndimage.distance_transform_edt(padded), ndimage.distance_transform_edt(~padded)
    # From the voxels' boundary, which lies half a voxel from the centres, and not further than the blur reaches.
    distance = np.clip(np.where(padded, inside - 0.5, 0.5 - outside), -2.5, 2.5)
    blurred = ndimage.gaussian_filter(distance, sigma=1.2)[4:-4, 4:-4, 4:-4]
    return np.where(voxels, np.maximum(blurred, 0.05), np.minimum(blurred, -0.05)).astype(np.float32)


# --- depth maps -------------------------------------------------------------------------------------------------------


def depth_from_mesh(mesh: Mesh, camera: Camera, size: int = 256) -> np.ndarray:
    """Depth of the nearest surface at each pixel's centre: (size, size) float32, inf where the mesh is not seen."""
    from ..render.rasterize import rasterize  # render stands above geometry; only this function reaches up

    clip = camera.clip(torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float32)))
    fragments = rasterize(clip[None], torch.from_numpy(np.ascontiguousarray(mesh.faces)), size, size)
    return fragments.depth[0].numpy()


def unproject(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """World position of each pixel's surface point: (S, S) -> (S, S, 3) float32, NaN where nothing is seen."""
    depth = _checked_depth(depth)
    size = len(depth)
    centers = (np.arange(size) + 0.5) * (2 / size) - 1
    known = np.where(np.isfinite(depth), depth, np.nan)
    half = 0.5 * size * _pixel_width(known, camera, size)
    x, y = centers[None, :] * half + 0 * known, -centers[:, None] * half + 0 * known
    local = np.stack([x, y, camera.radius - known], axis=-1)
    return (local @ camera.rotation().numpy().astype(np.float64)).astype(np.float32)


def points_from_depth(depth: np.ndarray, camera: Camera) -> np.ndarray:
    """World points of the pixels that see something: (S, S) -> (N, 3) float32, row by row."""
    points = unproject(depth, camera)
    return points[np.isfinite(points[..., 0])]


def mesh_from_depth(depth: np.ndarray, camera: Camera, *, max_slope: float = 8.0) -> Mesh:
    """One view's surface: pixels as vertices, cut where the depth jumps. An open mesh that faces the camera.

    depth: (S, S) float32, inf where nothing is seen.
    max_slope: a triangle is dropped when its depth range exceeds this many times the pixel's width there; 8 keeps
        surfaces that are seen under more than about seven degrees.
    Raises TriptychError when no triangle is left.
    """
    depth = _checked_depth(depth)
    size = len(depth)
    ids = np.arange(size * size).reshape(size, size)
    a, b, c, d = (ids[y, x].ravel() for y, x in _QUAD)  # top left, top right, bottom left, bottom right
    flat = depth.ravel()
    with np.errstate(invalid="ignore"):
        # The diagonal with the smaller step follows creases, and one beside an empty corner is never chosen.
        falling = ~(np.abs(flat[a] - flat[d]) > np.abs(flat[b] - flat[c])) & np.isfinite(flat[a] + flat[d])
    first = np.where(falling[:, None], np.stack([a, c, d], 1), np.stack([a, c, b], 1))
    second = np.where(falling[:, None], np.stack([a, d, b], 1), np.stack([b, c, d], 1))
    faces = np.concatenate([first, second])
    corner = flat[faces]
    pixel = _pixel_width(corner.min(axis=1), camera, size)
    with np.errstate(invalid="ignore"):
        faces = faces[np.isfinite(corner).all(axis=1) & (np.ptp(corner, axis=1) <= max_slope * pixel)]
    if len(faces) == 0:
        raise TriptychError("the depth map shows no surface of two by two pixels: its background must be inf")
    used, inverse = np.unique(faces, return_inverse=True)
    return Mesh(unproject(depth, camera).reshape(-1, 3)[used], inverse.reshape(-1, 3).astype(np.int64))


def voxels_from_depths(
    depths: np.ndarray, cameras: Sequence[Camera], resolution: int = 64, *, tolerance: float | None = None
) -> np.ndarray:
    """Space carving: what several depth maps say about each voxel's centre, (R, R, R) uint8.

    depths: (V, S, S), one per camera. tolerance: world units, default half of a voxel's diagonal.
    EMPTY (0): some view looks past it, by more than the tolerance, at a surface behind or at the background, in all
        four pixels around it, so that a centre inside the object is not carved for lying between a pixel and an edge.
    SURFACE (1): not empty, and within the tolerance of a surface that some view sees.
    UNKNOWN (2): behind the surfaces or outside of the frame of every view. ``result != EMPTY`` is the carved solid.
    """
    depths = _checked_depths(depths, cameras)
    tolerance = math.sqrt(3) / 2 / check_resolution(resolution) if tolerance is None else tolerance
    centers = voxel_centers(resolution).reshape(-1, 3)
    empty = np.zeros(len(centers), dtype=bool)
    surface = np.zeros(len(centers), dtype=bool)
    for depth, camera in zip(depths, cameras, strict=True):
        row, column, own_depth, seen = _pixels_of(centers, camera, len(depth))
        nearest, foremost = depth[row, column], _foremost(depth, centers, camera)
        empty |= seen & (foremost - own_depth > tolerance)
        surface |= seen & (np.abs(nearest - own_depth) <= tolerance)
    state = np.where(empty, EMPTY, np.where(surface, SURFACE, UNKNOWN)).astype(np.uint8)
    return state.reshape((resolution,) * 3)


def fuse_depths(
    depths: np.ndarray, cameras: Sequence[Camera], resolution: int = 64, *, truncation: float = 3.0
) -> np.ndarray:
    """Depth maps fused into one truncated signed distance field: (R, R, R) float32 in voxel units, positive inside.

    depths: (V, S, S), one per camera. truncation: voxels; surfaces thinner than this are still kept apart by the views
    that see both sides. ``isosurface(fuse_depths(...))`` is the mesh.

    Near a surface a view contributes the distance to the tangent plane at the pixel it hits (so neither slope nor pixel
    size biases it), weighted by how frontally it sees the plane. A view that sees past a voxel makes it empty: by its
    distance from the silhouette in front of the background, fully in front of a surface. What no view has seen is
    solid, so that the result is closed. After Curless and Levoy, A volumetric method for building complex models from
    range images, 1996.
    """
    depths = _checked_depths(depths, cameras)
    centers = voxel_centers(check_resolution(resolution)).reshape(-1, 3)
    total = np.zeros(len(centers), dtype=np.float32)
    weight = np.zeros(len(centers), dtype=np.float32)
    ceiling = np.full(len(centers), truncation, dtype=np.float32)
    slack = np.zeros(len(centers), dtype=np.float32)
    for depth, camera in zip(depths, cameras, strict=True):
        distance, share, limit, pixel = _view_distance(depth, camera, centers, resolution, truncation)
        total += distance * share
        weight += share
        slack = np.where(limit < ceiling, pixel, slack)
        ceiling = np.minimum(ceiling, limit)
    # A silhouette is known to a pixel only; where planes are known they decide within that pixel.
    mean = np.divide(total, weight, out=np.full_like(total, truncation), where=weight > 0)
    ceiling = np.where(weight > 0, ceiling + slack, ceiling)
    return np.minimum(mean, ceiling).astype(np.float32).reshape((resolution,) * 3)


_QUAD = (
    (slice(None, -1), slice(None, -1)),
    (slice(None, -1), slice(1, None)),
    (slice(1, None), slice(None, -1)),
    (slice(1, None), slice(1, None)),
)


def _checked_depth(depth: np.ndarray) -> np.ndarray:
    array = np.asarray(depth, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 2:
        raise TriptychError(f"a depth map must be (S, S) with S at least 2, got {array.shape}")
    if np.isnan(array).any() or (array <= 0).any():
        raise TriptychError("a depth map holds positive distances, and inf for the background; got NaN, zero or less")
    return array


def _checked_depths(depths: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
    if len(depths) != len(cameras) or len(depths) == 0:
        raise TriptychError(f"give one depth map per camera: got {len(depths)} maps for {len(cameras)} cameras")
    return np.stack([_checked_depth(depth) for depth in depths])


def _pixel_width(depth: np.ndarray, camera: Camera, size: int) -> np.ndarray | float:
    if camera.half_extent is not None:
        return 2 * camera.half_extent / size
    return 2 * depth * math.tan(math.radians(camera.fov_deg or 0.0) / 2) / size


def _pixels_of(points: np.ndarray, camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Row, column (clipped to the picture), depth of points (N, 3), and whether they are in the frame: (N,) each."""
    ndc, depth = (tensor.numpy() for tensor in camera.project(torch.from_numpy(points)))
    column = np.floor((ndc[:, 0] + 1) / 2 * size)
    row = np.floor((1 - ndc[:, 1]) / 2 * size)
    seen = (column >= 0) & (column < size) & (row >= 0) & (row < size) & (depth > 0)
    return np.clip(row, 0, size - 1).astype(np.int64), np.clip(column, 0, size - 1).astype(np.int64), depth, seen


def _foremost(depth: np.ndarray, points: np.ndarray, camera: Camera) -> np.ndarray:
    """The smallest depth of the four pixels whose centres surround each point's projection: (N,)."""
    ndc = camera.project(torch.from_numpy(points))[0].numpy()
    size = len(depth)
    column = np.clip(np.floor((ndc[:, 0] + 1) / 2 * size - 0.5), -1, size - 1).astype(np.int64) + 1
    row = np.clip(np.floor((1 - ndc[:, 1]) / 2 * size - 0.5), -1, size - 1).astype(np.int64) + 1
    padded = np.pad(depth, 1, mode="edge")
    blocks = np.minimum(padded[1:], padded[:-1])
    return np.minimum(blocks[:, 1:], blocks[:, :-1])[row, column]


def _view_distance(
    depth: np.ndarray, camera: Camera, centers: np.ndarray, resolution: int, truncation: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What one view says, in voxels: distance to the tangent plane, its weight, an upper limit, the pixel's width."""
    points, normals = _oriented_points(depth, camera)
    row, column, own_depth, seen = _pixels_of(centers, camera, len(depth))
    hit_depth = np.where(seen, depth[row, column], np.nan)
    hit = np.isfinite(hit_depth)
    plane = ((points[row, column] - centers) * normals[row, column]).sum(axis=1) * resolution
    towards = camera.position().numpy() - (0 if camera.is_orthographic else centers)
    towards = towards / np.linalg.norm(towards, axis=-1, keepdims=True)
    cosine = (normals[row, column] * towards).sum(axis=1)
    gap = np.where(hit, hit_depth - own_depth, 0) * resolution
    # A plane seen nearly edge-on, or hit far in front of or behind the voxel, is no measurement at this voxel ...
    within_reach = np.abs(gap) <= truncation / _MIN_COSINE
    usable = hit & (cosine > _MIN_COSINE) & (np.abs(plane) <= truncation) & within_reach
    # ... but a voxel in front of what the view hits is known to be empty.
    in_front = np.where(within_reach, np.clip(plane, -truncation, truncation), -truncation)
    limit = np.where(hit & (gap > 0) & ~usable, in_front, truncation)
    pixel = np.broadcast_to(_pixel_width(own_depth, camera, len(depth)) * resolution, gap.shape)
    silhouette = silhouette_distance(np.isfinite(depth).astype(np.float32))[row, column]
    limit = np.where(seen & np.isinf(hit_depth), np.maximum(silhouette * pixel, -truncation), limit)
    return np.where(usable, plane, 0), np.where(usable, cosine**2, 0), limit, pixel


def _oriented_points(depth: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Surface points (S, S, 3) and unit normals towards the camera; zero where nothing is seen.

    Per axis the neighbour that is nearer in depth gives the tangent, so that normals do not lean over an edge.
    """
    points = unproject(depth, camera).astype(np.float64)
    tangents = [_tangent(points, depth, axis) for axis in (0, 1)]
    normals = np.cross(tangents[0], tangents[1])  # rows run down and columns right, so down x right faces the viewer
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)
    return np.nan_to_num(points), np.nan_to_num(normals)


def _tangent(points: np.ndarray, depth: np.ndarray, axis: int) -> np.ndarray:
    step = np.diff(points, axis=axis)
    with np.errstate(invalid="ignore"):
        jump = np.abs(np.diff(depth, axis=axis))
    jump = np.where(np.isfinite(jump), jump, np.inf)
    edge = [(0, 0), (0, 0)]
    after, before = list(edge), list(edge)
    after[axis], before[axis] = (0, 1), (1, 0)
    jump_after, jump_before = np.pad(jump, after, constant_values=np.inf), np.pad(jump, before, constant_values=np.inf)
    step_after, step_before = np.pad(step, [*after, (0, 0)]), np.pad(step, [*before, (0, 0)])
    both = (np.maximum(jump_after, jump_before) < 2 * np.minimum(jump_after, jump_before))[..., None]
    one = np.where((jump_after <= jump_before)[..., None], step_after, step_before)
    return np.nan_to_num(np.where(both, (step_after + step_before) / 2, one))
