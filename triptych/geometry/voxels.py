"""Voxels of the model cube: which ones a mesh touches, and which ones silhouettes allow.

The cube [-0.5, 0.5]^3 is cut into R^3 voxels, index ``[x, y, z]``; voxel ``i`` spans ``[i / R - .5, (i + 1) / R - .5]``
per axis and its centre is ``(i + .5) / R - .5``.

**Surface voxels** are exact: a voxel is set when its closed box meets a triangle, by the separating axis test
(Akenine-Moller, Fast 3D triangle-box overlap testing, 2001). Nothing has to be watertight, and no triangle slips
between samples. Tie rule: boxes are closed, so what lies on the boundary between two voxels belongs to both, and what
lies on the cube's face to the outermost voxel. Parts outside of the cube are ignored.

**Visual hull**: a point is inside when every view sees it inside its silhouette. ``visual_hull`` gives the minimum of
the alphas (soft occupancy, differentiable with respect to the masks); ``hull_field`` the minimum of the silhouettes'
signed distances, whose isosurface at 0 is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import torch
from scipy import ndimage, spatial
from skimage import measure

from ..errors import TriptychError
from .cameras import Camera
from .mesh import Mesh

MAX_RESOLUTION = 1024
_PAIRS_PER_CHUNK = 400_000  # candidate (triangle, voxel) pairs tested at once: about 60 MB of temporaries
_POINTS_PER_CHUNK = 1 << 21


def check_resolution(resolution: int) -> int:
    """``resolution`` as an int; TriptychError unless it lies in 2..1024."""
    if not 2 <= int(resolution) <= MAX_RESOLUTION:
        raise TriptychError(f"the resolution must lie between 2 and {MAX_RESOLUTION} voxels a side, got {resolution}")
    return int(resolution)


def voxel_centers(resolution: int) -> np.ndarray:
    """(R, R, R, 3) float32 centres in model space, index [x, y, z]."""
    axis = ((np.arange(check_resolution(resolution)) + 0.5) / resolution - 0.5).astype(np.float32)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def points_to_indices(points: np.ndarray, resolution: int) -> np.ndarray:
    """Model-space points (N, 3) -> (N, 3) int64 voxel indices, unclipped: outside of [0, R) means outside of the cube.

    Tie rule: a point on the boundary between two voxels is the higher one's, one on the cube's upper face the last's.
    """
    scaled = (np.asarray(points, dtype=np.float64) + 0.5) * resolution
    return np.where(scaled == resolution, resolution - 1, np.floor(scaled)).astype(np.int64)


# --- surface voxels ---------------------------------------------------------------------------------------------------


def surface_voxels(mesh: Mesh, resolution: int = 64) -> np.ndarray:
    """Voxels whose closed box meets a triangle of ``mesh`` (model space): (R, R, R) bool, index [x, y, z].

    Works for any mesh, watertight or not; a degenerate triangle counts as the segment or point that it is.
    Raises TriptychError for vertices that are not finite.
    """
    resolution = check_resolution(resolution)
    occupied = np.zeros((resolution,) * 3, dtype=bool)
    corners_F33 = (mesh.vertices[mesh.faces].astype(np.float64) + 0.5) * resolution  # voxel units
    if not np.isfinite(corners_F33).all():
        raise TriptychError("the mesh has vertices that are not finite: clean it before making voxels")
    low, high = _closed_range(corners_F33.min(axis=1), corners_F33.max(axis=1))
    meets_cube = (low < resolution).all(axis=1) & (high >= 0).all(axis=1)
    single = meets_cube & (low == high).all(axis=1)  # the whole triangle lies in one voxel
    occupied[tuple(low[single].T)] = True
    rest = np.flatnonzero(meets_cube & ~single)
    corners_F33, low, high = corners_F33[rest], np.maximum(low[rest], 0), np.minimum(high[rest], resolution - 1)
    for triangles, voxels in _candidate_pairs(corners_F33, low, high):
        hit = voxels[_overlap(corners_F33[triangles], voxels + 0.5)]
        occupied[tuple(hit.T)] = True
    return occupied


def _closed_range(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last voxel whose closed interval meets [low, high], int64: a bound on a boundary touches both sides."""
    return np.ceil(low).astype(np.int64) - 1, np.floor(high).astype(np.int64)


def _candidate_pairs(
    corners_F33: np.ndarray, low: np.ndarray, high: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(triangle, voxel) pairs that may meet, in chunks: (N,) rows of ``corners_F33`` and (N, 3) voxel indices.

    Not the triangle's whole bounding box, which grows with the cube of its size: columns of voxels along the axis that
    the triangle faces most, and of each only the stretch that the triangle's plane crosses.
    """
    normal = np.cross(corners_F33[:, 1] - corners_F33[:, 0], corners_F33[:, 2] - corners_F33[:, 0])
    w = np.abs(normal).argmax(axis=1)
    axes = np.stack([(w + 1) % 3, (w + 2) % 3, w], axis=1)
    first, last = np.take_along_axis(low, axes, axis=1), np.take_along_axis(high, axes, axis=1)
    normal, corner = np.take_along_axis(normal, axes, axis=1), np.take_along_axis(corners_F33[:, 0], axes, axis=1)
    flat = normal[:, 2] == 0  # a degenerate triangle has no plane: take the whole column
    slope = -normal[:, :2] / np.where(flat, 1, normal[:, 2])[:, None]
    size = last - first + 1
    for row, within in _expand(size[:, 0] * size[:, 1]):
        column = first[row, :2] + np.stack([within // size[row, 1], within % size[row, 1]], axis=1)
        height = corner[row, 2] + ((column + 0.5 - corner[row, :2]) * slope[row]).sum(axis=1)
        reach = 0.5 * np.abs(slope[row]).sum(axis=1) + 1e-6  # wide of the rounding; the exact test follows
        bottom, top = _closed_range(height - reach, height + reach)
        bottom = np.where(flat[row], first[row, 2], np.maximum(bottom, first[row, 2]))
        top = np.where(flat[row], last[row, 2], np.minimum(top, last[row, 2]))
        for item, step in _expand(np.maximum(top - bottom + 1, 0)):
            voxels = np.empty((len(item), 3), dtype=np.int64)
            permuted = np.column_stack([column[item], bottom[item] + step])
            np.put_along_axis(voxels, axes[row[item]], permuted, axis=1)
            yield row[item], voxels


def _expand(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (i, k) with k in 0..counts[i]-1, in order and in chunks of bounded size: (N,) and (N,) int64."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _PAIRS_PER_CHUNK):
        pair = np.arange(start, min(start + _PAIRS_PER_CHUNK, total))
        row = np.searchsorted(ends, pair, side="right")
        yield row, pair - (ends[row] - counts[row])


def _overlap(corners_N33: np.ndarray, centers_N3: np.ndarray) -> np.ndarray:
    """Whether each triangle meets the closed unit cube around its centre: (N,) bool.

    The bounding boxes are known to meet, so of the thirteen separating axes the triangle's normal and the nine products
    of its edges with the cube's axes are left.
    """
    relative = corners_N33 - centers_N3[:, None]
    edges = np.roll(relative, -1, axis=1) - relative
    # Touching counts as meeting; the slack absorbs the rounding of products of numbers of this size.
    slack = 1e-12 * (1 + np.abs(relative).max(axis=(1, 2))) ** 2
    normal = np.cross(edges[:, 0], edges[:, 1])
    reach = 0.5 * np.abs(normal).sum(axis=1) + slack * (1 + np.abs(relative).max(axis=(1, 2)))
    keep = np.abs((normal * relative[:, 0]).sum(axis=1)) <= reach
    for edge in range(3):
        for axis in range(3):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            edge_u, edge_v = edges[:, edge, u], edges[:, edge, v]
            # Both ends of the edge have the same product, so the edge's start and the opposite corner span the range.
            start = relative[:, edge, v] * edge_u - relative[:, edge, u] * edge_v
            other = (edge + 2) % 3
            opposite = relative[:, other, v] * edge_u - relative[:, other, u] * edge_v
            radius = 0.5 * (np.abs(edge_u) + np.abs(edge_v)) + slack
            keep &= (np.minimum(start, opposite) <= radius) & (np.maximum(start, opposite) >= -radius)
    return keep


def fill_interior(surface: np.ndarray) -> np.ndarray:
    """Set every voxel that the outside cannot reach through faces of empty voxels: (R, R, R) bool -> (R, R, R) bool.

    The surface itself stays set. A surface with a hole of a voxel or more has no interior.
    """
    surface = np.asarray(surface, dtype=bool)
    if surface.ndim != 3:
        raise TriptychError(f"voxels must be (R, R, R), got {surface.shape}")
    return ndimage.binary_fill_holes(surface)  # default structure: the six face neighbours


# --- visual hull ------------------------------------------------------------------------------------------------------


def turn_volume(volume: np.ndarray, turns: int) -> np.ndarray:
    """A (R, R, R) volume indexed [x, y, z], turned by ``turns`` quarters about +Y, front towards the left; a view."""
    for _ in range(turns % 4):
        volume = volume.transpose(2, 1, 0)[:, :, ::-1]
    return volume


@overload
def visual_hull(masks: np.ndarray, cameras: Sequence[Camera], resolution: int = 64) -> np.ndarray: ...
@overload
def visual_hull(masks: torch.Tensor, cameras: Sequence[Camera], resolution: int = 64) -> torch.Tensor: ...
def visual_hull(
    masks: np.ndarray | torch.Tensor, cameras: Sequence[Camera], resolution: int = 64
) -> np.ndarray | torch.Tensor:
    """Soft occupancy (R, R, R) float32 0-1: the smallest alpha that any view sees at the voxel's centre.

    masks: (V, S, S) alpha 0-1, one per camera; array or tensor, and the result is of the same kind and device.
    cameras: orthographic or perspective. Outside of a view's frame, and behind a camera, the alpha is 0. Alpha is
        sampled bilinearly between pixel centres.
    """
    alphas = _checked_masks(masks, cameras)
    slabs = []
    for centers in _center_slabs(resolution, alphas.device):
        views = [_sample_alpha(alpha, *camera.project(centers)) for alpha, camera in zip(alphas, cameras, strict=True)]
        slabs.append(torch.stack(views).amin(dim=0))
    hull = torch.cat(slabs)
    return hull if isinstance(masks, torch.Tensor) else hull.numpy()


def hull_field(masks: np.ndarray | torch.Tensor, cameras: Sequence[Camera], resolution: int = 64) -> np.ndarray:
    """Signed field (R, R, R) float32 in voxel units, positive inside: the views' smallest signed distance.

    masks, cameras: as in ``visual_hull``. Each silhouette is the curve where the bilinear alpha crosses 0.5, so an
    antialiased mask gives sub-pixel edges; the distance to it is measured in the picture and scaled to voxels (for a
    perspective camera at the voxel's own depth). ``isosurface(hull_field(...))`` is the smooth visual hull.
    """
    return torch.cat([views.amin(dim=0) for views in _silhouette_slabs(masks, cameras, resolution)]).numpy()


def silhouette_fields(masks: np.ndarray | torch.Tensor, cameras: Sequence[Camera], resolution: int = 64) -> np.ndarray:
    """The signed distances of ``hull_field`` for each view alone: (V, R, R, R) float32, voxels, positive inside."""
    return torch.cat(list(_silhouette_slabs(masks, cameras, resolution)), dim=1).numpy()


def _silhouette_slabs(
    masks: np.ndarray | torch.Tensor, cameras: Sequence[Camera], resolution: int
) -> Iterator[torch.Tensor]:
    """(V, n, R, R) along x."""
    alphas = _checked_masks(masks, cameras).detach().cpu()
    distances = [torch.from_numpy(silhouette_distance(alpha.numpy())) for alpha in alphas]
    for centers in _center_slabs(resolution, alphas.device):
        views = zip(distances, cameras, strict=True)
        yield torch.stack([_sample_distance(distance, camera, centers) for distance, camera in views]) * resolution


def silhouette_distance(alpha: np.ndarray) -> np.ndarray:
    """Signed distance (S, S) float32 in pixels from each pixel's centre to the curve alpha = 0.5, positive inside.

    Outside of the picture counts as empty, so a silhouette that the frame cuts is closed along the frame's edge. A mask
    without any silhouette is one picture diagonal away from everything.
    """
    padded = np.pad(np.asarray(alpha, dtype=np.float64), 1)
    segments = [np.stack([curve[:-1], curve[1:]], axis=1) for curve in measure.find_contours(padded, 0.5)]
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    if not segments:
        return np.full((height, width), -math.hypot(height, width), dtype=np.float32)
    starts, ends = np.concatenate(segments).transpose(1, 0, 2)
    middles, halves = (starts + ends) / 2, (ends - starts) / 2
    # A crossing inside one picture cell is shorter than 1.5 pixels; its quarters are, so the nearest quarter's middle
    # names the nearest piece of the curve but for a hundredth of a pixel.
    shifts = np.array([-0.75, -0.25, 0.25, 0.75])[:, None, None]
    middles = (middles + shifts * halves).reshape(-1, 2)
    halves = np.broadcast_to(halves / 4, (4, *halves.shape)).reshape(-1, 2)
    pixels = np.indices((height, width)).reshape(2, -1).T + 1.0
    _, nearest = spatial.cKDTree(middles).query(pixels)
    offset, half = pixels - middles[nearest], halves[nearest]
    along = np.clip((offset * half).sum(axis=1) / np.maximum((half * half).sum(axis=1), 1e-12), -1, 1)
    distance = np.linalg.norm(offset - along[:, None] * half, axis=1).reshape(height, width)
    return np.where(padded[1:-1, 1:-1] > 0.5, distance, -distance).astype(np.float32)


def _checked_masks(masks: np.ndarray | torch.Tensor, cameras: Sequence[Camera]) -> torch.Tensor:
    alphas = masks if isinstance(masks, torch.Tensor) else torch.from_numpy(np.array(masks, dtype=np.float32))
    if alphas.ndim != 3 or len(alphas) != len(cameras) or alphas.numel() == 0:
        raise TriptychError(
            f"masks must be (V, S, S), one per camera: got {tuple(alphas.shape)} for {len(cameras)} cameras"
        )
    return alphas.float()


def _center_slabs(resolution: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The voxel centres in slabs along x, (n, R, R, 3) float32, so that a fine grid needs little memory."""
    axis = (torch.arange(check_resolution(resolution), device=device, dtype=torch.float32) + 0.5) / resolution - 0.5
    for xs in axis.split(max(1, _POINTS_PER_CHUNK // resolution**2)):
        yield torch.stack(torch.meshgrid(xs, axis, axis, indexing="ij"), dim=-1)


def _sample(image: torch.Tensor, ndc: torch.Tensor, padding_mode: str) -> torch.Tensor:
    grid = torch.stack([ndc[..., 0], -ndc[..., 1]], dim=-1).reshape(1, 1, -1, 2)
    sampled = torch.nn.functional.grid_sample(
        image[None, None], grid.to(image), mode="bilinear", padding_mode=padding_mode, align_corners=False
    )
    return sampled.reshape(ndc.shape[:-1])


def _sample_alpha(alpha: torch.Tensor, ndc: torch.Tensor, depth: torch.Tensor) -> torch.Tensor:
    # The border's pixels reach the frame's edge at full strength; beyond the frame nothing is seen.
    seen = (ndc.abs() <= 1).all(dim=-1) & (depth > 0)
    return torch.where(seen, _sample(alpha, ndc, "border"), alpha.new_zeros(()))


def _sample_distance(distance: torch.Tensor, camera: Camera, points: torch.Tensor) -> torch.Tensor:
    """The silhouette's signed distance at the points' projections, in world units."""
    ndc, depth = camera.project(points)
    inside = ndc.clamp(-1, 1)
    ndc_distance = _sample(distance, inside, "border") * (2 / distance.shape[-1]) - (ndc - inside).norm(dim=-1)
    if camera.half_extent is not None:
        return ndc_distance * camera.half_extent
    world = ndc_distance * depth * math.tan(math.radians(camera.fov_deg or 0.0) / 2)
    return torch.where(depth > 0, world, -world.abs() - 1)
