"""A rasteriser in plain torch, for CPU and CUDA, without a loop over triangles.

Visibility is a scan conversion done for all triangles at once. Each triangle is cut into its pixel rows
(``repeat_interleave``), each row into its pixels, and the nearest triangle of a pixel is found with a minimum over keys
that
hold the bits of the depth above the triangle id: nearest first, then the smallest id, so the result never depends on
order. The work is proportional to what is covered, not to bounding boxes, and goes in chunks of bounded memory.

The ends of a row are the points where two edges cross the row's centre line. An edge is always evaluated from its upper
to
its lower vertex, so the two triangles that share it compute the same number, and both ends are inclusive: neighbouring
triangles leave no cracks. Faces that reach behind the camera are cut at ``NEAR``. There is no back-face culling.

Barycentrics and depth are computed afterwards for the visible triangles only, differentiably with respect to the clip
coordinates. Visibility itself has no gradient: ``antialias`` supplies it at silhouettes, after Laine et al., "Modular
Primitives for High-Performance Differentiable Rendering" (SIGGRAPH Asia 2020).

Not covered: transparency, lines and points, and gradients where surfaces pass through each other.

Shape suffixes: B images, V vertices, F faces, C channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import TriptychError
from .backends import choose_backend, nvdiffrast_visible

NEAR = 1e-4  # depth of the near plane, world units
ROWS_PER_CHUNK = 1 << 19
PIXELS_PER_CHUNK = 1 << 21
NOTHING = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Fragments:
    """What each pixel sees.

    triangle_id: (B, H, W) int64, -1 for background; row 0 is the top of the picture.
    barycentrics: (B, H, W, 3) float, perspective-correct weights of the face's corners, 0 for background.
    depth: (B, H, W) float, distance along the view axis in world units, inf for background.
    """

    triangle_id: torch.Tensor
    barycentrics: torch.Tensor
    depth: torch.Tensor

    @cached_property
    def covered(self) -> torch.Tensor:
        """(N,) int64 flat indices (into B * H * W) of the pixels that see a triangle, ascending."""
        return (self.triangle_id.reshape(-1) >= 0).nonzero().squeeze(1)

    @cached_property
    def covered_ids(self) -> torch.Tensor:
        """(N,) int64 triangle ids of the covered pixels."""
        return self.triangle_id.reshape(-1)[self.covered]


def rasterize(
    clip_BV4: torch.Tensor, faces_F3: torch.Tensor, height: int, width: int, *, backend: str = "auto"
) -> Fragments:
    """The nearest triangle at every pixel centre.

    clip_BV4: (B, V, 4) float32 from ``Camera.clip``: NDC times w, depth times w, w. When it requires a gradient,
        barycentrics and depth are differentiable with respect to it.
    faces_F3: (F, 3) int64. Faces with a vertex that is not finite are dropped.
    backend: "auto", "torch" or "nvdiffrast".
    Raises TriptychError for wrong shapes.
    """
    _check(clip_BV4, faces_F3, height, width)
    chosen = choose_backend(backend, clip_BV4.device, len(faces_F3), max(height, width))
    draw = nvdiffrast_visible if chosen == "nvdiffrast" else visible_triangles
    triangle_id = draw(clip_BV4.detach(), faces_F3, height, width)
    fragments = Fragments(triangle_id, clip_BV4.new_zeros(0), clip_BV4.new_zeros(0))
    barycentrics, depth = barycentrics_from(clip_BV4, faces_F3, fragments)
    drawn = Fragments(triangle_id, barycentrics, depth)
    drawn.__dict__.update(covered=fragments.covered, covered_ids=fragments.covered_ids)  # the cached properties
    return drawn


def _check(clip_BV4: torch.Tensor, faces_F3: torch.Tensor, height: int, width: int) -> None:
    if clip_BV4.ndim != 3 or clip_BV4.shape[-1] != 4 or not clip_BV4.is_floating_point():
        raise TriptychError(f"clip coordinates must be (B, V, 4) float, got {tuple(clip_BV4.shape)} {clip_BV4.dtype}")
    if faces_F3.ndim != 2 or faces_F3.shape[-1] != 3 or faces_F3.dtype != torch.int64:
        raise TriptychError(f"faces must be (F, 3) int64, got {tuple(faces_F3.shape)} {faces_F3.dtype}")
    if height < 1 or width < 1:
        raise TriptychError(f"a picture needs at least one pixel, got {height} x {width}")
    if len(faces_F3) and (int(faces_F3.min()) < 0 or int(faces_F3.max()) >= clip_BV4.shape[1]):
        raise TriptychError(
            f"faces refer to vertices {int(faces_F3.min())} to {int(faces_F3.max())}, but there are {clip_BV4.shape[1]}"
        )


@torch.no_grad()
def visible_triangles(clip_BV4: torch.Tensor, faces_F3: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H, W) int64 ids of the nearest triangle, -1 for background: the torch backend."""
    batch = clip_BV4.shape[0]
    keys = torch.full((batch * height * width,), NOTHING, dtype=torch.int64, device=clip_BV4.device)
    corners, owner = _corners_in_front(clip_BV4.float(), faces_F3)
    if len(owner):
        perspective = not bool((clip_BV4[..., 3] == 1).all())
        _draw(keys, corners, owner, len(faces_F3), height, width, perspective)
    ids = torch.where(keys == NOTHING, -1, keys & 0xFFFFFFFF)
    return ids.view(batch, height, width)


def _corners_in_front(clip_BV4: torch.Tensor, faces_F3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Homogeneous corners (T, 3, 4) as (x, y, depth, w) of everything before the near plane, and (T,) image * F +
    face."""
    batch, count, _ = clip_BV4.shape
    depth = clip_BV4[..., 2] / clip_BV4[..., 3]
    # A vertex at w = 0 lies in the camera's plane: its depth is 0, and z / w would not say so.
    depth = torch.where(clip_BV4[..., 3] == 0, 0.0, depth)
    points = torch.stack([clip_BV4[..., 0], clip_BV4[..., 1], depth, clip_BV4[..., 3]], dim=-1).view(-1, 4)
    offsets = torch.arange(batch, device=faces_F3.device)[:, None, None] * count
    index = (faces_F3[None] + offsets).view(-1, 3)
    inside, finite = points[:, 2] > NEAR, torch.isfinite(points).all(dim=1)
    owner = torch.arange(len(index), device=index.device)
    if bool(inside.all()) and bool(finite.all()):
        return points.index_select(0, index.view(-1)).view(-1, 3, 4), owner
    before = inside[index].sum(dim=1) * finite[index].all(dim=1)
    whole = (before == 3).nonzero().squeeze(1)
    pieces, owners = [points[index[whole]]], [owner[whole]]
    for inside_count in (1, 2):
        cut = (before == inside_count).nonzero().squeeze(1)
        if len(cut):
            part = _cut_at_near(points[index[cut]], inside_count)
            pieces.append(part)
            owners.append(owner[cut].repeat(len(part) // len(cut)))
    return torch.cat(pieces), torch.cat(owners)


def _cut_at_near(corners_T34: torch.Tensor, inside_count: int) -> torch.Tensor:
    """The part before the near plane of triangles with one or two corners before it: (T, 3, 4) or (2 T, 3, 4)."""
    inside = corners_T34[..., 2] > NEAR
    odd = (inside if inside_count == 1 else ~inside).long().argmax(dim=1)  # the corner alone on its side
    order = (odd[:, None] + torch.arange(3, device=odd.device)) % 3
    alone, second, third = corners_T34.gather(1, order[..., None].expand(-1, -1, 4)).unbind(1)

    def crossing(other: torch.Tensor) -> torch.Tensor:
        share = (NEAR - alone[:, 2:3]) / (other[:, 2:3] - alone[:, 2:3])
        return alone + share * (other - alone)

    on_second, on_third = crossing(second), crossing(third)
    if inside_count == 1:
        return torch.stack([alone, on_second, on_third], dim=1)
    first_half = torch.stack([on_second, second, third], dim=1)
    return torch.cat([first_half, torch.stack([on_second, third, on_third], dim=1)])


def _chunks(counts: torch.Tensor, limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``counts`` whose sums stay below about ``limit`` plus one entry."""
    total = int(counts.sum())
    if total <= limit:
        yield 0, len(counts)
        return
    marks = torch.arange(limit, total, limit, device=counts.device)
    cuts = torch.searchsorted(counts.cumsum(0), marks).unique().tolist()
    bounds = [0, *(c for c in cuts if 0 < c < len(counts)), len(counts)]
    yield from zip(bounds[:-1], bounds[1:], strict=True)


def _expand(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For counts (2, 0, 3): which entry each item belongs to (0, 0, 2, 2, 2), and its place there (0, 1, 0, 1, 2)."""
    ends = counts.cumsum(0)
    entry = torch.repeat_interleave(counts, output_size=int(ends[-1]) if len(ends) else 0)
    return entry, torch.arange(len(entry), device=counts.device) - (ends - counts)[entry]


def _draw(
    keys: torch.Tensor,
    corners_T34: torch.Tensor,
    owner: torch.Tensor,
    faces: int,
    height: int,
    width: int,
    perspective: bool,
) -> None:
    """Lower ``keys`` to the nearest triangle of each pixel. Corners are (x, y, depth, w) in homogeneous coordinates."""
    inverse_w = 1 / corners_T34[..., 3]
    x = (corners_T34[..., 0] * inverse_w + 1) * (0.5 * width) - 0.5  # a pixel's centre has whole coordinates
    y = (1 - corners_T34[..., 1] * inverse_w) * (0.5 * height) - 0.5
    first_row, last_row = y.amin(1).ceil().clamp(0, height), y.amax(1).floor().clamp(-1, height - 1)
    columns = x.amax(1).floor().clamp(-1, width - 1) - x.amin(1).ceil().clamp(0, width)
    area = (x[:, 1] - x[:, 0]) * (y[:, 2] - y[:, 0]) - (x[:, 2] - x[:, 0]) * (y[:, 1] - y[:, 0])
    kept = ((columns >= 0) & (last_row >= first_row) & (area != 0) & torch.isfinite(area)).nonzero().squeeze(1)
    # Depth over w and 1 / w are affine on the screen, depth is their ratio.
    values = torch.stack([y, x, corners_T34[..., 2] * inverse_w, inverse_w], dim=-1)[kept]
    owner, first_row = owner[kept], first_row[kept]
    rows = (last_row[kept] - first_row + 1).long()
    top, middle, bottom = _sorted_by_row(values)
    image, face = owner // faces, owner % faces
    for start, end in _chunks(rows, ROWS_PER_CHUNK):
        part = slice(start, end)
        triangle, place = _expand(rows[part])
        row = first_row[part][triangle] + place
        left, right = _row_ends(row, *(side[part].index_select(0, triangle) for side in (top, middle, bottom)))
        line = (image[part][triangle] * height + row.long()) * width
        _draw_rows(keys, left, right, line, face[part][triangle], width, perspective)


def _sorted_by_row(values_T34: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Corner values (T, 4) each of the top, middle and bottom corner; the row coordinate is value 0."""
    a, b, c = values_T34.unbind(1)

    def ordered(upper: torch.Tensor, lower: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        swap = upper[:, :1] > lower[:, :1]
        return torch.where(swap, lower, upper), torch.where(swap, upper, lower)

    a, b = ordered(a, b)
    b, c = ordered(b, c)
    a, b = ordered(a, b)
    return a, b, c


def _row_ends(
    row: torch.Tensor, top: torch.Tensor, middle: torch.Tensor, bottom: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (R, 3) as (x, depth / w, 1 / w) where the triangle's outline crosses the row: left end, right end."""

    def crossing(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        # Exact at both corners (share 0 and 1), which keeps fans of triangles free of cracks.
        share = ((row - upper[:, 0]) / (lower[:, 0] - upper[:, 0]).clamp_min(1e-30))[:, None]
        return upper[:, 1:] * (1 - share) + lower[:, 1:] * share

    below = (row >= middle[:, 0])[:, None]
    long_side = crossing(top, bottom)
    short_side = crossing(torch.where(below, middle, top), torch.where(below, bottom, middle))
    swap = short_side[:, :1] < long_side[:, :1]
    return torch.where(swap, short_side, long_side), torch.where(swap, long_side, short_side)


def _draw_rows(
    keys: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    line: torch.Tensor,
    face: torch.Tensor,
    width: int,
    perspective: bool,
) -> None:
    first = left[:, 0].ceil().clamp(0, width)
    counts = (right[:, 0].floor().clamp(-1, width - 1) - first + 1).clamp_min(0).long()
    span = right[:, 0] - left[:, 0]
    inverse_span = torch.where(span > 0, 1 / span, 0.0)[:, None]
    slope = (right[:, 1:] - left[:, 1:]) * inverse_span
    # (first - left) / span lies in [0, 1] before the slope multiplies it: steep slopes of slivers stay bounded.
    begin = left[:, 1:] + (right[:, 1:] - left[:, 1:]) * ((first - left[:, 0])[:, None] * inverse_span)
    line = line + first.long()
    for start, end in _chunks(counts, PIXELS_PER_CHUNK):
        part = slice(start, end)
        row, place = _expand(counts[part])
        step = place.float()
        depth = begin[part, 0][row] + slope[part, 0][row] * step
        if perspective:
            depth = depth / (begin[part, 1][row] + slope[part, 1][row] * step)
        # Positive floats order as their bits do.
        bits = depth.clamp_min(NEAR).view(torch.int32).long()
        key = (bits << 32) | face[part][row]
        keys.scatter_reduce_(0, line[part][row] + place, key, "amin", include_self=True)


def pixel_coordinates(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Clip (..., 4) -> (..., 2) column and row coordinates; the centre of pixel (row, column) is (column, row)."""
    w = torch.where(clip[..., 3] == 0, torch.full_like(clip[..., 3], 1e-20), clip[..., 3])
    x = (clip[..., 0] / w + 1) * (0.5 * width) - 0.5
    y = (1 - clip[..., 1] / w) * (0.5 * height) - 0.5
    return torch.stack([x, y], dim=-1)


def barycentrics_from(
    clip_BV4: torch.Tensor, faces_F3: torch.Tensor, fragments: Fragments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Barycentrics (B, H, W, 3) and depth (B, H, W) of ``fragments.triangle_id``, differentiable in ``clip_BV4``."""
    batch, height, width = fragments.triangle_id.shape
    count = len(faces_F3)
    pixel, face = fragments.covered, fragments.covered_ids
    barycentrics = clip_BV4.new_zeros(batch * height * width, 3)
    depth = clip_BV4.new_full((batch * height * width,), float("inf"))
    if len(pixel) == 0:
        return barycentrics.view(batch, height, width, 3), depth.view(batch, height, width)
    within = pixel % (height * width)
    column, row = (within % width).to(clip_BV4), (within // width).to(clip_BV4)
    table = _barycentric_table(clip_BV4, faces_F3, height, width).view(batch * count, 12)
    entry = table.index_select(0, (pixel // (height * width)) * count + face)
    dx, dy = column - entry[:, 0], row - entry[:, 1]
    second = entry[:, 2] * dx + entry[:, 3] * dy
    third = entry[:, 4] * dx + entry[:, 5] * dy
    screen = torch.stack([1 - second - third, second, third], dim=1)
    if (clip_BV4[..., 3] == 1).all():
        weights = screen.clamp(0, 1)
    else:
        weights = screen * entry[:, 6:9]
        weights = (weights / weights.sum(dim=1, keepdim=True)).clamp(0, 1)
    weights = weights / weights.sum(dim=1, keepdim=True)
    seen_depth = (weights * entry[:, 9:12]).sum(dim=1)
    barycentrics = barycentrics.index_copy(0, pixel, weights)
    return barycentrics.view(batch, height, width, 3), depth.index_copy(0, pixel, seen_depth).view(batch, height, width)


def _barycentric_table(clip_BV4: torch.Tensor, faces_F3: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, F, 12): first corner's pixel, gradients of the second and third screen weight, 1 / w and depth of the
    corners."""
    w = torch.where(clip_BV4[..., 3] == 0, torch.full_like(clip_BV4[..., 3], 1e-20), clip_BV4[..., 3])
    screen = pixel_coordinates(clip_BV4, height, width)
    a, b, c = (screen[:, faces_F3[:, i]] for i in range(3))
    ab, ac = b - a, c - a
    area = ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]
    inverse_area = 1 / torch.where(area == 0, torch.ones_like(area), area)
    second = torch.stack([ac[..., 1], -ac[..., 0]], dim=-1) * inverse_area[..., None]
    third = torch.stack([-ab[..., 1], ab[..., 0]], dim=-1) * inverse_area[..., None]
    return torch.cat([a, second, third, (1 / w)[:, faces_F3], (clip_BV4[..., 2] / w)[:, faces_F3]], dim=-1)


def interpolate(attributes: torch.Tensor, faces_F3: torch.Tensor, fragments: Fragments) -> torch.Tensor:
    """Attributes at every pixel, (B, H, W, C), 0 for background; differentiable in the attributes and the barycentrics.

    attributes: (V, C) per vertex, (B, V, C) per image and vertex, or (F, 3, C) per face corner when its middle size is
        3 and its first size is the number of faces (pass (B, V, C) expanded to break the tie of B = F and V = 3).
    """
    batch, height, width = fragments.triangle_id.shape
    count = len(faces_F3)
    pixel, index = fragments.covered, fragments.covered_ids
    if attributes.ndim == 2:
        corners = attributes[faces_F3]
    elif attributes.shape[:2] == (count, 3):
        corners = attributes
    elif attributes.ndim == 3 and attributes.shape[0] == batch:
        corners = attributes[:, faces_F3].reshape(batch * count, 3, -1)
        index = (pixel // (height * width)) * count + index
    else:
        raise TriptychError(
            f"attributes must be (V, C), ({batch}, V, C) or ({count}, 3, C), got {tuple(attributes.shape)}"
        )
    weights = fragments.barycentrics.reshape(-1, 3).index_select(0, pixel)
    values = torch.bmm(weights[:, None].to(corners), corners.index_select(0, index)).squeeze(1)
    image = values.new_zeros(batch * height * width, corners.shape[-1])
    return image.index_copy(0, pixel, values).view(batch, height, width, -1)


def antialias(
    image_BHWC: torch.Tensor, fragments: Fragments, clip_BV4: torch.Tensor, faces_F3: torch.Tensor
) -> torch.Tensor:
    """Blend pixels across silhouette edges: (B, H, W, C), differentiable in the image and in ``clip_BV4``.

    Where a silhouette edge crosses the line between the centres of two neighbouring pixels, the pixel in whose half it
    crosses takes the other's colour by its distance from the middle. So a covered area changes continuously, and at the
    right rate, as vertices move. Steep edges are judged along rows, flat edges along columns. Unlike in the paper,
    edges are found by scan conversion rather than from the visible triangle, since the triangles at the rim of a fine
    mesh are thinner than a pixel and often own no pixel at all; of several crossings between two pixels the outermost
    counts. An edge is a silhouette when all of its faces lie on one side of it in the picture. Surfaces that fall
    wholly between pixel centres have no gradient, and neither have corners beyond that of their two edges.
    """
    batch, height, width, channels = image_BHWC.shape
    if (batch, height, width) != fragments.triangle_id.shape:
        raise TriptychError(
            f"the image is {tuple(image_BHWC.shape)}, but the fragments are {tuple(fragments.triangle_id.shape)}"
        )
    pixels = image_BHWC.reshape(-1, channels)
    screen = pixel_coordinates(clip_BV4, height, width)
    image, start, end, inner_side = _silhouettes(screen.detach(), clip_BV4.detach(), faces_F3)
    targets, changes = [], []
    for axis in (0, 1):
        edge, line, inner, outer = _crossings(
            axis, image, start, end, inner_side, screen.detach(), clip_BV4.detach(), fragments
        )
        a, b = screen[image[edge], start[edge]], screen[image[edge], end[edge]]
        share = (line - a[:, 1 - axis]) / (b[:, 1 - axis] - a[:, 1 - axis])
        position = a[:, axis] + share * (b[:, axis] - a[:, axis])
        inner_place = (inner % width if axis == 0 else inner // width % height).to(position)
        excess = (position - inner_place) * (outer - inner).sign() - 0.5  # from the middle, outwards, in pixels
        grows = excess > 0
        targets.append(torch.where(grows, outer, inner))
        step = torch.where(grows[:, None], pixels[inner] - pixels[outer], pixels[outer] - pixels[inner])
        changes.append((excess.abs()[:, None] * step).to(pixels))
    return pixels.index_add(0, torch.cat(targets), torch.cat(changes)).view_as(image_BHWC)


@torch.no_grad()
def _silhouettes(
    screen: torch.Tensor, clip_BV4: torch.Tensor, faces_F3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Edges whose faces all lie on one side: image, start and end vertex (N,) int64, and that side's sign (N,) float.

    The sign is positive when the faces lie at (x, y) with a positive cross product (end - start) x ((x, y) - start), in
    pixel coordinates.
    """
    batch, count, _ = screen.shape
    start, end, third = (faces_F3.roll(-k, dims=1).reshape(-1) for k in range(3))
    low, high = torch.minimum(start, end), torch.maximum(start, end)
    keys, edge = torch.unique(low * count + high, return_inverse=True)
    along, offset = screen[:, high] - screen[:, low], screen[:, third] - screen[:, low]
    side = (along[..., 0] * offset[..., 1] - along[..., 1] * offset[..., 0]).sign()
    total, faces = side.new_zeros(2, batch, len(keys)).unbind(0)
    total.index_add_(1, edge, side)
    faces.index_add_(1, edge, side.abs())
    start, end = keys // count, keys % count
    depth = clip_BV4[..., 2] / clip_BV4[..., 3]
    drawn = (depth > NEAR) & torch.isfinite(screen).all(dim=-1)
    image, edge = ((total.abs() == faces) & (faces > 0) & drawn[:, start] & drawn[:, end]).nonzero().unbind(1)
    return image, start[edge], end[edge], total[image, edge].sign()


@torch.no_grad()
def _crossings(
    axis: int,
    image: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    inner_side: torch.Tensor,
    screen: torch.Tensor,
    clip_BV4: torch.Tensor,
    fragments: Fragments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where silhouettes part two visible neighbours in a row (axis 0) or a column (axis 1).

    Returns (N,) each: index of the edge, its row or column as float, flat index of the pixel inside and of the one
    outside.
    """
    _, height, width = fragments.triangle_id.shape
    lines, places = (height, width) if axis == 0 else (width, height)
    a, b = screen[image, start], screen[image, end]
    low = torch.minimum(a, b)[:, 1 - axis].ceil().clamp(0, lines)
    high = torch.maximum(a, b)[:, 1 - axis].floor().clamp(-1, lines - 1)
    run = (b - a).abs()
    steep = run[:, 1] >= run[:, 0] if axis == 0 else run[:, 0] > run[:, 1]
    edge, step = _expand((high - low + 1).clamp_min(0).long() * steep)
    line = low[edge] + step
    share = (line - a[edge, 1 - axis]) / (b - a)[edge, 1 - axis]
    position = a[edge, axis] + share * (b - a)[edge, axis]
    first = position.floor()
    inside_frame = (first >= 0) & (first < places - 1)
    # The faces lie towards smaller x (or y) where the cross product of the edge with that direction has their sign.
    before = inner_side * ((b - a)[:, 1] if axis == 0 else -(b - a)[:, 0]) > 0
    base = image[edge] * (height * width)
    stride, across = (1, width) if axis == 0 else (width, 1)
    pixel = torch.where(inside_frame, base + line.long() * across + first.clamp(0, places - 1).long() * stride, 0)
    other = torch.where(inside_frame, pixel + stride, 0)
    inner, outer = torch.where(before[edge], pixel, other), torch.where(before[edge], other, pixel)
    inverse_w = 1 / clip_BV4[..., 3]
    values = torch.stack([clip_BV4[..., 2] * inverse_w**2, inverse_w], dim=-1)
    at_edge = torch.lerp(values[image[edge], start[edge]], values[image[edge], end[edge]], share[:, None])
    depth, ids = fragments.depth.detach().reshape(-1), fragments.triangle_id.reshape(-1)
    seen = (depth[inner] < depth[outer]) & (at_edge[:, 0] / at_edge[:, 1] < depth[outer]) & (ids[inner] != ids[outer])
    candidate = (seen & inside_frame).nonzero().squeeze(1)
    distance = ((position - first)[candidate] - (~before[edge[candidate]]).float()).abs()
    key = (distance.float().view(torch.int32).long() << 32) | candidate
    pair = torch.minimum(inner, outer)[candidate]
    outermost = key.new_full((ids.numel(),), -1).scatter_reduce_(0, pair, key, "amax", include_self=True)
    chosen = outermost[outermost >= 0] & 0xFFFFFFFF
    return edge[chosen], line[chosen], inner[chosen], outer[chosen]
