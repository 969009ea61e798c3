"""Colours for what no view sees: diffusion over the surface, and dilation beyond the charts of a texture.

Unseen parts are filled over the *surface*, not over the UV charts: two charts that touch in space can lie anywhere in
the texture. ``diffuse`` solves ``(C + s L) x = C d``, with ``d`` the observed vertex colours, ``C`` their confidence,
``L`` the graph Laplacian with weights 1 / edge length: where the confidence is high the colour is kept, where it
is zero the fill is harmonic. Long edges are split first (``split_long_edges``), so that a box of twelve triangles
has vertices to carry the colours. Parts that no view reaches take the colours nearest in space.

Not covered: texture synthesis. A large unseen area becomes smooth, without detail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import coo_matrix, diags
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree
from torch.nn import functional

SMOOTHNESS = 0.02  # s above, for edge weights of mean 1
NEAREST = 16  # observed vertices that colour a part which no view reaches
MAX_SPLIT_ROUNDS = 12
CONFIDENCE_FLOOR = 1e-4  # below, a vertex counts as unobserved

# Slots 0-2 are a face's corners, 3-5 the midpoints of its edges 01, 12, 20. Key: which edges are split, as bits.
_SPLIT_FACES = {
    0: [[0, 1, 2]],
    1: [[0, 3, 2], [3, 1, 2]],
    2: [[1, 4, 0], [4, 2, 0]],
    4: [[2, 5, 1], [5, 0, 1]],
    3: [[1, 4, 3], [0, 3, 4], [0, 4, 2]],
    6: [[2, 5, 4], [1, 4, 5], [1, 5, 0]],
    5: [[0, 3, 5], [2, 5, 3], [2, 3, 1]],
    7: [[0, 3, 5], [1, 4, 3], [2, 5, 4], [3, 4, 5]],
}


def split_long_edges(
    vertices: np.ndarray, faces: np.ndarray, corners: np.ndarray, *, max_edge: float, max_faces: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halve edges longer than ``max_edge`` until none is left or ``max_faces`` would be passed; no T-junctions arise.

    vertices (V, 3) float32, faces (F, 3) int64, corners (F, 3, K) attributes per face corner, split linearly.
    Returns the three for the refined mesh; the first V vertices are the given ones.
    """
    for _ in range(MAX_SPLIT_ROUNDS):
        ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
        _, first, edge = np.unique(ends[:, 0] * len(vertices) + ends[:, 1], return_index=True, return_inverse=True)
        ends, edge = ends[first], edge.reshape(-1, 3)
        long = np.linalg.norm(vertices[ends[:, 0]] - vertices[ends[:, 1]], axis=1) > max_edge
        if not long.any() or len(faces) + long[edge].sum() > max_faces:
            break
        midpoint = np.where(long, len(vertices) + np.cumsum(long) - 1, -1)
        middle = vertices[ends[long]].mean(axis=1, dtype=np.float64).astype(np.float32)
        vertices = np.concatenate([vertices, middle])
        faces, corners = _split_faces(faces, corners, midpoint[edge])
    return vertices, faces, corners


def _split_faces(faces: np.ndarray, corners: np.ndarray, midpoints_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slots = np.concatenate([faces, midpoints_F3], axis=1)
    values = np.concatenate([corners, (corners + corners[:, [1, 2, 0]]) / 2], axis=1)
    pattern = (midpoints_F3 >= 0) @ np.array([1, 2, 4])
    new_faces, new_corners = [], []
    for key, template in _SPLIT_FACES.items():
        chosen = np.flatnonzero(pattern == key)
        new_faces.append(slots[chosen][:, template].reshape(-1, 3))
        new_corners.append(values[chosen][:, template].reshape(-1, 3, corners.shape[2]))
    return np.concatenate(new_faces), np.concatenate(new_corners)


def diffuse(vertices: np.ndarray, faces: np.ndarray, observed: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Colours (V, C) float32 for all vertices of a welded mesh from the observed ones.

    vertices (V, 3), faces (F, 3), observed (V, C) colours (any value where unobserved), confidence (V,) in [0, 1].
    At least one vertex must be observed (ValueError); the result stays within the range of the observed colours.
    """
    known = confidence > CONFIDENCE_FLOOR
    if not known.any():
        raise ValueError("diffusion needs at least one observed vertex")
    laplacian, parts = _graph(vertices, faces)
    reached = np.bincount(parts, known, parts.max() + 1) > 0
    colours = np.zeros_like(observed, dtype=np.float64)
    inside = np.flatnonzero(reached[parts])
    data = np.where(known, confidence, 0.0)[inside]
    system = (diags(data) + SMOOTHNESS * laplacian[inside][:, inside]).tocsc()
    solver = splu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    colours[inside] = solver.solve(data[:, None] * np.where(known[:, None], observed, 0.0)[inside])
    outside = np.flatnonzero(~reached[parts])
    if len(outside):
        _, nearest = cKDTree(vertices[known]).query(vertices[outside], k=min(NEAREST, int(known.sum())))
        colours[outside] = observed[known][nearest.reshape(len(outside), -1)].mean(axis=1)
    return colours.clip(observed[known].min(axis=0), observed[known].max(axis=0)).astype(np.float32)


def _graph(vertices: np.ndarray, faces: np.ndarray):
    """The Laplacian (V, V) sparse with weights 1 / edge length of mean 1, and the part that each vertex belongs to."""
    count = len(vertices)
    ends = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
    ends = ends[ends[:, 0] != ends[:, 1]]
    ends = ends[np.unique(ends[:, 0] * count + ends[:, 1], return_index=True)[1]]
    length = np.linalg.norm(vertices[ends[:, 0]].astype(np.float64) - vertices[ends[:, 1]], axis=1)
    typical = length.mean() if len(length) else 1.0
    weight = typical / np.maximum(length, 0.05 * typical)  # slivers must not spoil the conditioning
    weight = weight / weight.mean() if len(weight) else weight
    rows, columns = np.concatenate([ends[:, 0], ends[:, 1]]), np.concatenate([ends[:, 1], ends[:, 0]])
    adjacency = coo_matrix((np.concatenate([weight, weight]), (rows, columns)), shape=(count, count)).tocsr()
    _, parts = connected_components(adjacency, directed=False)
    return (diags(np.asarray(adjacency.sum(axis=1)).ravel()) - adjacency).tocsr(), parts


def dilate(
    image: torch.Tensor, covered: torch.Tensor, *, ring: int = 6, step: Callable[[float], None] | None = None
) -> torch.Tensor:
    """Fill every texel outside the charts, so that bilinear sampling and mip-mapping show no seams.

    image (H, W, C) float, covered (H, W) bool. ``ring`` texels around the charts continue their edge colours; the rest
    is filled from coarser and coarser averages. An image without a covered texel comes back unchanged.
    step(share) is called before each texel of the ring, and may raise to stop.
    """
    if bool(covered.all()) or not bool(covered.any()):
        return image
    mask = covered[None, None].to(image.dtype)
    values = torch.where(covered[..., None], image, 0.0).permute(2, 0, 1)[None].contiguous()
    for done in range(ring):
        if step is not None:
            step(done / ring)
        grown, share = functional.avg_pool2d(values, 3, 1, 1), functional.avg_pool2d(mask, 3, 1, 1)
        new = (mask == 0) & (share > 0)
        values = torch.where(new, grown / share.clamp_min(1e-12), values)
        mask = torch.where(new, 1.0, mask)
    return _fill_from_coarser(values, mask)[0].permute(1, 2, 0).contiguous()


def _fill_from_coarser(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Texels with mask 0 take the (bilinear) value of the next coarser level, filled in the same way."""
    if bool((mask > 0).all()):
        return values
    height, width = values.shape[-2:]
    share = functional.avg_pool2d(mask, 2, ceil_mode=True)
    coarse = functional.avg_pool2d(values * mask, 2, ceil_mode=True) / share.clamp_min(1e-12)
    coarse = _fill_from_coarser(coarse, (share > 0).to(mask.dtype))
    finer = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return torch.where(mask > 0, values, finer)
