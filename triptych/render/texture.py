"""Colours for a mesh from posed views: projected, tested for visibility, blended, filled, baked.

How one surface point gets its colour
- Each view offers what it shows at the point's projection, if the point faces the camera, lies on the nearest surface
  (a depth buffer, with a bias that grows with the slope), and falls on the object in the picture.
- Its quality is cos(angle to the camera), faded out at grazing angles and towards silhouettes and depth steps: there,
  pixels mix foreground and background, and the geometry's errors show. The pixel behind a depth step never counts.
  Colours of edge pixels are replaced by the nearest ones inside the silhouette, so the background cannot bleed in.
- Two bands are blended in linear light (Burt and Adelson 1983; Baumberg 2002): the blurred views softly, the detail
  sharply in favour of the best view. Differences in light disappear gradually and misaligned detail does not ghost.
- Points that no view shows well take a colour diffused over the surface (``inpaint``), in sRGB.

The views' shading stays in the colours: nothing here separates light from material. Everything runs on the CPU.

progress(fraction), everywhere, is called with the share that is done, 0-1; cancel() is asked after every view and
chunk of points, and while a mesh is unwrapped; when it returns True, ``sampling.flow_euler.Cancelled`` is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional

from ..errors import TriptychError
from ..geometry.cameras import Camera
from ..geometry.mesh import Material, Mesh, weld_index
from ..geometry.uv import check_texture_size, unwrap
from .course import Cancel, Course, Progress
from .inpaint import diffuse, dilate, split_long_edges
from .rasterize import rasterize
from .views import linear_to_srgb, srgb_to_linear

if TYPE_CHECKING:
    from ..images.views import ViewSet

Fill = Literal["diffuse", "mirror", "colors"]

SOLID_ALPHA = 0.9  # a pixel of the object; below, its colour mixes with the background and is not used
INSIDE_ALPHA = 0.4  # a surface point on such a pixel takes the nearest solid colour; below, the view does not show it
GRAZING_COS = (0.1, 0.35)  # a view counts nothing below the first cosine, and fully above the second
FEATHER_SHARE = 0.02  # width of the fade at silhouettes, as a share of the picture's side
BLUR_SHARE = 0.03  # standard deviation of the soft band, as a share of the picture's side
SOFT_POWER, SHARP_POWER = 2.0, 12.0
SURE_PRESENCE = 0.2  # from here on a seen colour stands without help from its neighbours
DEPTH_BIAS = 0.004  # world units; besides the slope's share
CREASE_COS = 0.85  # a corner whose smooth normal leans further from its face's keeps the latter: edges above 64 degrees
MAX_DEPTH_SIZE = 512
POINTS_PER_CHUNK = 1 << 17  # a fraction of a second on one core: nothing is asked or told inside a chunk
FILL_EDGE_SHARE = 1 / 48  # longest edge that carries diffused colours, as a share of the object's longest side
MAX_FILL_FACES = 60_000


@dataclass(frozen=True)
class BakeReport:
    """size: texels per side. covered_share: texels inside charts over all. seen_share: texels that some view shows
    over the covered ones. sure_share: those shown well enough to need no help from the fill."""

    size: int
    covered_share: float
    seen_share: float
    sure_share: float


@dataclass(frozen=True)
class _View:
    """A camera with what its picture offers: planes (1, 8, S, S) of linear RGB, blurred linear RGB, usability and
    feather; depth (1, 1, R, R) of the mesh, a large number where there is none."""

    camera: Camera
    planes: torch.Tensor
    depth: torch.Tensor


def colour_from_views(
    mesh: Mesh,
    viewset: ViewSet,
    *,
    texture_size: int = 1024,
    fill: Fill = "diffuse",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Mesh:
    """``mesh`` coloured by the views: a texture (after unwrapping where the mesh has no UV), or vertex colours with
    ``texture_size=0``. Raises TriptychError as ``bake_texture`` does."""
    if texture_size == 0:
        return vertex_colours_from_views(mesh, viewset, fill=fill, progress=progress, cancel=cancel)
    check_texture_size(texture_size)
    course = Course(progress, cancel)
    course.at(0.0)
    if mesh.uv is None:
        mesh = unwrap(mesh, texture_size=texture_size, cancel=cancel)
    return _baked(mesh, viewset, texture_size, fill, course.part(0.4, 1.0))[0]


def bake_texture(
    mesh: Mesh,
    viewset: ViewSet,
    size: int = 1024,
    *,
    fill: Fill = "diffuse",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> tuple[Mesh, BakeReport]:
    """``mesh`` with one material whose base colour texture (size, size, 3) uint8 sRGB shows the views.

    mesh: with a one-to-one UV layout in [0, 1]^2 (``geometry.uv.unwrap``), in the frame of the views' cameras.
    size: texels per side, 64-8192. fill: "diffuse" colours unseen parts from their neighbours on the surface; "mirror"
    first tries the views mirrored left to right, for objects that are symmetric about x = 0; "colors" takes the mesh's
    own vertex colours, moved by how much they differ from the views nearby, so that there is no seam.
    Vertex colours and face materials are dropped, for they would multiply the texture.
    Raises TriptychError: no UV, UV outside [0, 1], a size out of range, no view shows any of the mesh, no vertex
    colours to fill with.
    """
    return _baked(mesh, viewset, size, fill, Course(progress, cancel))


def _baked(mesh: Mesh, viewset: ViewSet, size: int, fill: Fill, course: Course) -> tuple[Mesh, BakeReport]:
    check_texture_size(size)
    corner_uv = _layout(mesh)
    positions, welded = weld_index(mesh.vertices)
    corners = np.concatenate([corner_uv, corner_normals(mesh), _own_colors(mesh, fill)[mesh.faces]], axis=2)
    vertices, faces, corners = _refined(positions, welded[mesh.faces], corners)
    course.at(0.05)
    texels, triangle, weights = _uv_texels(corners[..., :2], size)
    course.at(0.15)
    corner_points, normals = torch.from_numpy(vertices[faces]), torch.from_numpy(corners[..., 2:5])
    own = _mix(torch.from_numpy(corners[..., 5:]), triangle, weights)

    views, mirrored = _posed_views(mesh, viewset, fill, course.part(0.15, 0.3))
    colour, confidence = torch.empty(len(texels), 3), torch.empty(len(texels))
    for part in _chunks(len(texels)):
        course.at(0.3 + 0.4 * part.start / len(texels))
        point = _mix(corner_points, triangle[part], weights[part])
        normal = functional.normalize(_mix(normals, triangle[part], weights[part]), dim=1)
        colour[part], confidence[part] = _colour(point, normal, views, mirrored)
    _check_seen(confidence)
    course.at(0.7)

    index = torch.from_numpy(faces)[triangle]
    filled = torch.from_numpy(_spread(vertices, faces, index, weights, colour - own, confidence))
    for part in _chunks(len(texels)):
        course.at(0.85)
        share = confidence[part, None]
        unseen = own[part] + (filled[index[part]] * weights[part, :, None]).sum(dim=1)
        colour[part] = share * colour[part] + (1 - share) * unseen
    report = BakeReport(
        size=size,
        covered_share=len(texels) / size**2,
        seen_share=float((confidence > 0).float().mean()),
        sure_share=float((confidence > 0.99).float().mean()),
    )
    made = _with_texture(mesh, texels, colour, size, course.part(0.9, 1.0))
    course.at(1.0)
    return made, report


def vertex_colours_from_views(
    mesh: Mesh,
    viewset: ViewSet,
    *,
    fill: Fill = "diffuse",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Mesh:
    """``mesh`` with ``colors`` (V, 4) float32 sRGB from the views, by the same rules as ``bake_texture``.

    A vertex on a silhouette, as all those of a box, takes the colours seen inside its faces. Materials are dropped.
    Raises TriptychError when no view shows any of the mesh.
    """
    course = Course(progress, cancel)
    course.at(0.0)
    positions, welded = weld_index(mesh.vertices)
    faces = welded[mesh.faces]
    normals = corner_normals(mesh)
    inner = torch.tensor([[4, 1, 1], [1, 4, 1], [1, 1, 4]], dtype=torch.float32) / 6
    triangle = torch.arange(len(faces)).repeat_interleave(3)
    weights = inner.repeat(len(faces), 1)
    points = _mix(torch.from_numpy(positions[faces]), triangle, weights)
    directions = functional.normalize(_mix(torch.from_numpy(normals), triangle, weights), dim=1)
    smooth = _angle_weighted_normals(Mesh(positions, faces))
    views, mirrored = _posed_views(mesh, viewset, fill, course.part(0.1, 0.5))
    colour, confidence = _colour(points, directions, views, mirrored)
    own, sure = _colour(torch.from_numpy(positions), torch.from_numpy(smooth), views, mirrored)
    course.at(0.7)
    _check_seen(torch.cat([confidence, sure]))
    base = np.zeros_like(positions)
    base[welded] = _own_colors(mesh, fill)
    # Squared twice, a sample counts for its own corner and hardly for the other two.
    index = torch.from_numpy(faces)[triangle]
    if not bool((confidence > 0).any()):
        index, weights, colour, confidence = torch.arange(len(own))[:, None], torch.ones(len(own), 1), own, sure
    expected = torch.from_numpy(base)[index][:, : weights.shape[1]]
    expected = (expected * weights[..., None]).sum(dim=1)
    spread = base + _spread(positions, faces, index, weights**4, colour - expected, confidence)
    result = sure[:, None].numpy() * own.numpy() + (1 - sure[:, None].numpy()) * spread
    colors = np.concatenate([result.clip(0, 1), np.ones((len(result), 1))], axis=1).astype(np.float32)
    course.at(1.0)
    return mesh.replace(colors=colors[welded], materials=(), face_materials=None)


def _own_colors(mesh: Mesh, fill: Fill) -> np.ndarray:
    """(V, 3) float32 sRGB: what the fill adds to, the mesh's colours or nothing."""
    if fill != "colors":
        return np.zeros((len(mesh.vertices), 3), dtype=np.float32)
    if mesh.colors is None:
        raise TriptychError('the mesh has no vertex colours to fill unseen parts with: choose fill "diffuse"')
    return np.ascontiguousarray(mesh.colors[:, :3], dtype=np.float32)


def bake_vertex_colours(
    mesh: Mesh, size: int = 1024, *, progress: Progress | None = None, cancel: Cancel | None = None
) -> Mesh:
    """The vertex colours of ``mesh`` as a base colour texture (size, size, 3) uint8, mixed in linear light as drawn.

    Raises TriptychError: no colours, no UV, UV outside [0, 1], a size out of 64-8192.
    """
    check_texture_size(size)
    course = Course(progress, cancel)
    if mesh.colors is None:
        raise TriptychError("the mesh has no vertex colours to bake: colour it first, or bake from views")
    texels, triangle, weights = _uv_texels(_layout(mesh), size)
    course.at(0.3)
    corners = srgb_to_linear(
        torch.from_numpy(np.ascontiguousarray(mesh.colors[mesh.faces][..., :3], dtype=np.float32)).clamp(0, 1)
    )
    colour = torch.empty(len(texels), 3)
    for part in _chunks(len(texels)):
        course.at(0.3 + 0.6 * part.start / len(texels))
        colour[part] = linear_to_srgb(_mix(corners, triangle[part], weights[part]))
    made = _with_texture(mesh, texels, colour, size, course.part(0.9, 1.0))
    course.at(1.0)
    return made


def view_weights(points: torch.Tensor, normals: torch.Tensor, mesh: Mesh, viewset: ViewSet) -> torch.Tensor:
    """How well each view shows each point: (views, N) float32 in [0, 1], 0 where hidden, averted or off the object.

    points (N, 3) and unit normals (N, 3) float32 in the world, on the surface of ``mesh``, which hides.
    """
    views, _ = _posed_views(mesh, viewset, "diffuse", Course(None, None))
    return torch.stack([_offer(points, normals, view)[1] for view in views])


def corner_normals(mesh: Mesh) -> np.ndarray:
    """(F, 3, 3) float32: the smooth normal at each face corner, the face's own at creases. Stored normals are not
    used: visibility is a matter of the geometry. Vertices that only differ in UV count as one."""
    positions, welded = weld_index(mesh.vertices)
    geometry = Mesh(positions, welded[mesh.faces])
    own = geometry.face_normals().astype(np.float32)[:, None]
    smooth = _angle_weighted_normals(geometry)[geometry.faces]
    return np.where((own * smooth).sum(axis=2, keepdims=True) > CREASE_COS, smooth, own).astype(np.float32)


def _angle_weighted_normals(mesh: Mesh) -> np.ndarray:
    """(V, 3) float32: a square that is cut into two triangles counts as one at its corners."""
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    to_next, to_last = corners[:, [1, 2, 0]] - corners, corners[:, [2, 0, 1]] - corners
    area = np.linalg.norm(np.cross(to_next, to_last), axis=2)
    angle = np.arctan2(area, (to_next * to_last).sum(axis=2))
    weighted = (mesh.face_normals()[:, None] * angle[..., None]).reshape(-1, 3)
    index = mesh.faces.ravel()
    total = np.stack([np.bincount(index, weighted[:, k], len(mesh.vertices)) for k in range(3)], axis=1)
    return (total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _layout(mesh: Mesh) -> np.ndarray:
    corner_uv = mesh.corner_uv()
    if corner_uv is None or len(corner_uv) == 0:
        raise TriptychError("the mesh has no UV layout to bake into: unwrap it first")
    low, high = float(corner_uv.min()), float(corner_uv.max())
    if not (low >= -1e-4 and high <= 1 + 1e-4):
        raise TriptychError(f"the mesh's UV run from {low:.3g} to {high:.3g}: unwrap it into [0, 1] before baking")
    return corner_uv.astype(np.float32)


def _refined(vertices: np.ndarray, faces: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edge = float(np.ptp(vertices[faces.ravel()], axis=0).max()) * FILL_EDGE_SHARE
    return split_long_edges(vertices, faces, corners, max_edge=edge, max_faces=MAX_FILL_FACES)


def _uv_texels(corner_uv: np.ndarray, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The texels inside charts: flat index (N,), triangle (N,) int64, barycentrics (N, 3)."""
    uv = torch.from_numpy(np.ascontiguousarray(corner_uv, dtype=np.float32)).reshape(1, -1, 2)
    clip = torch.cat([uv * 2 - 1, torch.ones_like(uv)], dim=2)  # an upright sheet at depth 1
    drawn = rasterize(clip, torch.arange(uv.shape[1]).reshape(-1, 3), size, size)
    triangle = drawn.triangle_id.reshape(-1)
    texels = torch.nonzero(triangle >= 0).squeeze(1)
    if len(texels) == 0:
        raise TriptychError(f"no texel of a {size} x {size} texture lies inside the UV layout: choose a larger texture")
    return texels, triangle[texels], drawn.barycentrics.reshape(-1, 3)[texels]


def _mix(corners_F3C: torch.Tensor, triangle: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (corners_F3C[triangle] * weights[..., None]).sum(dim=1)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + POINTS_PER_CHUNK, count)) for start in range(0, count, POINTS_PER_CHUNK))


def _check_seen(confidence: torch.Tensor) -> None:
    if not bool((confidence > 0).any()):
        raise TriptychError(
            "none of the views shows any of the mesh: check that the pictures are not empty and share the mesh's frame"
        )


def _spread(
    vertices: np.ndarray,
    faces: np.ndarray,
    index: torch.Tensor,
    weights: torch.Tensor,
    colour: torch.Tensor,
    confidence: torch.Tensor,
) -> np.ndarray:
    """Vertex colours (V, 3) from samples: each gives its colour to vertices ``index`` (N, K) by ``weights`` (N, K)."""
    count = len(vertices)
    flat = index.reshape(-1).numpy()
    total = np.bincount(flat, weights.reshape(-1).numpy(), count)
    trust = (weights * confidence[:, None]).reshape(-1)
    trusted = np.bincount(flat, trust.numpy(), count)
    sums = [
        np.bincount(flat, (trust * colour[:, k : k + 1].expand(-1, index.shape[1]).reshape(-1)).numpy(), count)
        for k in range(3)
    ]
    observed = np.stack(sums, axis=1) / np.maximum(trusted, 1e-12)[:, None]
    return diffuse(vertices, faces, observed, trusted / np.maximum(total, 1e-12))


def _with_texture(mesh: Mesh, texels: torch.Tensor, colour: torch.Tensor, size: int, course: Course) -> Mesh:
    covered = torch.zeros(size * size, dtype=torch.bool)
    covered[texels] = True
    image = torch.zeros(size * size, 3)
    image[texels] = colour.clamp(0, 1)
    image = dilate(image.view(size, size, 3), covered.view(size, size), step=course.at)
    texture = (image.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    name = mesh.materials[0].name if mesh.materials else Material().name
    material = Material(name=name, base_color_texture=texture)
    return mesh.replace(colors=None, materials=(material,), face_materials=None)


def _posed_views(mesh: Mesh, viewset: ViewSet, fill: Fill, course: Course) -> tuple[list[_View], list[_View]]:
    """The views, and for fill="mirror" those seen in a mirror at x = 0 whose direction no view has."""
    if fill not in ("diffuse", "mirror", "colors"):
        raise TriptychError(f'the fill is "{fill}": choose "diffuse", "mirror" or "colors"')
    images, cameras = viewset.images.detach().float().cpu(), list(viewset.cameras)
    count = len(cameras)
    if fill == "mirror":
        for image, camera in zip(images[:count], cameras[:count], strict=True):
            twin = replace(camera, azimuth_deg=-camera.azimuth_deg % 360.0)
            if not any(_same_direction(twin, other) for other in cameras):
                images, cameras = torch.cat([images, image.flip(-1)[None]]), [*cameras, twin]
    course.at(0.0)
    depths = _depths(mesh, cameras, min(images.shape[-1], MAX_DEPTH_SIZE))
    views: list[_View] = []
    for image, camera, depth in zip(images, cameras, depths, strict=True):
        course.at(0.3 + 0.7 * len(views) / len(cameras))
        views.append(_posed_view(image, camera, depth))
    return views[:count], views[count:]


def _same_direction(a: Camera, b: Camera) -> bool:
    return float(a.rotation()[2] @ b.rotation()[2]) > 0.999


def _depths(mesh: Mesh, cameras: list[Camera], size: int) -> torch.Tensor:
    """(views, size, size) depth of the mesh, inf for background."""
    vertices = torch.from_numpy(np.ascontiguousarray(mesh.vertices, dtype=np.float32))
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces, dtype=np.int64))
    return rasterize(torch.stack([camera.clip(vertices) for camera in cameras]), faces, size, size).depth


def _posed_view(image: torch.Tensor, camera: Camera, depth: torch.Tensor) -> _View:
    size = image.shape[-1]
    solid = image[3].numpy() > SOLID_ALPHA
    behind, before = _depth_steps(depth.numpy(), camera, size)
    linear = srgb_to_linear(image[:3]).numpy()
    linear, core = _without_fringe(linear, solid)
    sigma = BLUR_SHARE * size
    share = ndimage.gaussian_filter(core.astype(np.float32), sigma, truncate=3)
    blurred = np.stack([ndimage.gaussian_filter(plane * core, sigma, truncate=3) for plane in linear])
    blurred = np.where(share > 1e-3, blurred / np.maximum(share, 1e-3), linear)
    feather = _feather(~solid | behind | before, FEATHER_SHARE * size)
    # A pixel wider than the object: points exactly on the silhouette must not fall to the fill.
    square = np.ones((3, 3), bool)
    usable = ndimage.binary_dilation(image[3].numpy() > INSIDE_ALPHA, square) & ~ndimage.binary_dilation(behind, square)
    planes = np.concatenate([linear, blurred, usable[None], feather[None]]).astype(np.float32)
    finite = torch.where(torch.isfinite(depth), depth, 1e6)
    return _View(camera, torch.from_numpy(planes)[None], finite[None, None])


def _depth_steps(depth: np.ndarray, camera: Camera, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (size, size) bool just behind and just before a jump in depth. A slope is no jump: what counts is the
    difference between the step up and the step down."""
    known = np.isfinite(depth)
    own = np.where(known, depth, 0.0)
    step_down = own - ndimage.minimum_filter(np.where(known, depth, 1e9), 3)
    step_up = ndimage.maximum_filter(np.where(known, depth, -1e9), 3) - own
    excess = np.where(known, step_down - step_up, 0.0)
    tolerance = 0.005 + 3 * _pixel(camera, float(np.median(depth[known])) if known.any() else 1.0, len(depth))
    steps = np.stack([excess > tolerance, excess < -tolerance])
    if size != len(depth):
        steps = ndimage.zoom(steps, (1, size / len(depth), size / len(depth)), order=0, grid_mode=True, mode="nearest")
    return steps[0], steps[1]


def _pixel(camera: Camera, depth: float | torch.Tensor, size: int):
    """Side of a pixel in world units at a depth."""
    if camera.fov_deg is None:
        return 2 * (camera.half_extent or 0.0) / size
    return 2 * depth * float(np.tan(np.radians(camera.fov_deg) / 2)) / size


def _without_fringe(linear: np.ndarray, solid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture with the outermost pixels of the object, and all beyond, replaced by the nearest colour further in;
    and the mask of what was kept. Parts too thin to have an inside are kept as they are."""
    square = np.ones((3, 3), bool)
    core = ndimage.binary_erosion(solid, square)
    core |= solid & ~ndimage.binary_dilation(core, square, iterations=2)
    if not core.any():
        return linear, core
    row, column = ndimage.distance_transform_edt(~core, return_distances=False, return_indices=True)
    return linear[:, row, column], core


def _feather(edges: np.ndarray, width: float) -> np.ndarray:
    """0.01 at edges to 1 at ``width`` pixels from them, or at the middle of parts that are thinner."""
    if not edges.any():
        return np.ones(edges.shape, np.float32)
    distance = np.minimum(np.maximum(ndimage.distance_transform_edt(~edges) - 0.5, 0.0), width)
    local = ndimage.maximum_filter(distance, 2 * int(np.ceil(width)) + 1)
    return np.maximum(distance / np.maximum(local, 1.0), 0.01).astype(np.float32)


def _colour(
    points: torch.Tensor, normals: torch.Tensor, views: list[_View], mirrored: list[_View]
) -> tuple[torch.Tensor, torch.Tensor]:
    """sRGB (N, 3) and confidence (N,) in [0, 1] of surface points; mirrored views fill what the views do not show."""
    colour, confidence = _blend([_offer(points, normals, view) for view in views])
    if mirrored:
        other, extra = _blend([_offer(points, normals, view) for view in mirrored])
        extra = (1 - confidence) * extra
        total = confidence + extra
        colour = (confidence[:, None] * colour + extra[:, None] * other) / total[:, None].clamp_min(1e-8)
        confidence = total
    return colour, confidence


def _offer(points: torch.Tensor, normals: torch.Tensor, view: _View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a view offers for points (N, 3): linear RGB sharp and blurred (N, 6), quality and presence (N,) in [0, 1].

    Presence is the quality without the fade at silhouettes, which says which view to prefer, not that a fill is better.
    """
    camera = view.camera
    ndc, depth = camera.project(points)
    if camera.is_orthographic:
        cosine = normals @ camera.rotation()[2]
    else:
        cosine = (normals * functional.normalize(camera.position() - points, dim=1)).sum(dim=1)
    grid = (ndc * torch.tensor([1.0, -1.0]))[None, None]
    sampled = functional.grid_sample(view.planes, grid, align_corners=False, padding_mode="zeros")[0, :, 0].T
    nearest = functional.grid_sample(view.depth, grid, "nearest", "border", align_corners=False)[0, 0, 0]
    low, high = GRAZING_COS
    tangent = torch.sqrt(1 - cosine.clamp(low, 1) ** 2) / cosine.clamp(low, 1)
    bias = DEPTH_BIAS + _pixel(camera, depth, view.depth.shape[-1]) * (0.5 + tangent)
    shown = (depth > 0) & (depth <= nearest + bias) & (sampled[:, 6] > 0.5)
    presence = torch.where(shown, cosine.clamp(0, 1) * _smoothstep((cosine - low) / (high - low)), 0.0)
    return sampled[:, :6], presence * sampled[:, 7], presence


def _smoothstep(x: torch.Tensor) -> torch.Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _blend(offers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two bands, see the module's essay: sRGB (N, 3) and confidence (N,)."""
    quality = torch.stack([offer[1] for offer in offers])
    best = quality.amax(dim=0)
    relative = quality / best.clamp_min(1e-8)
    soft, sharp = relative**SOFT_POWER, relative**SHARP_POWER
    soft, sharp = (w / w.sum(dim=0).clamp_min(1e-8) for w in (soft, sharp))
    colour = torch.zeros(quality.shape[1], 3)
    for (bands, _, _), w_soft, w_sharp in zip(offers, soft, sharp, strict=True):
        colour += w_soft[:, None] * bands[:, 3:] + w_sharp[:, None] * (bands[:, :3] - bands[:, 3:])
    presence = torch.stack([offer[2] for offer in offers]).amax(dim=0)
    return linear_to_srgb(colour.clamp(0, 1)), _smoothstep(presence / SURE_PRESENCE)
