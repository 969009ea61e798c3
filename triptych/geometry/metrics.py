"""How close two meshes are: Chamfer distance, F-scores, normal consistency, volume IoU.

All distances are between points sampled evenly on the two surfaces, in the meshes' own units: bring both to one frame
first (``Mesh.normalized``). Definitions follow Tatarchenko et al., "What Do Single-view 3D Reconstruction Networks
Learn?" (2019) for the F-score and Mescheder et al., "Occupancy Networks" (2019) for normal consistency and volume IoU;
Chamfer is the *mean of the two directed mean distances*, not squared and not summed.

Sampling sets a floor: two samples of one surface of area A are about 0.5 sqrt(A / samples) apart, which is 0.004 for an
area of 2 and 30,000 samples. No Chamfer distance can be lower, not even of a mesh to itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..errors import TriptychError
from .mesh import Mesh


@dataclass(frozen=True)
class MeshComparison:
    """``a`` against the reference ``b``.

    chamfer: mean of the two directed mean distances, in the meshes' units; 0 is best.
    f_scores, precision, recall: by threshold, 0-1. Precision: share of ``a`` within the threshold of ``b``;
        recall: share of ``b`` within the threshold of ``a``; F-score: their harmonic mean.
    normal_consistency: mean |cos| of the angle between nearest points' normals, both ways, 0-1; 1 is best.
    volume_iou: intersection over union of the solids, or None unless both are watertight.
    """

    chamfer: float
    f_scores: dict[float, float] = field(default_factory=dict)
    precision: dict[float, float] = field(default_factory=dict)
    recall: dict[float, float] = field(default_factory=dict)
    normal_consistency: float = 0.0
    volume_iou: float | None = None


def sample_surface(mesh: Mesh, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """``count`` points evenly on the surface: points and their faces' unit normals, each (count, 3) float32.

    Faces are drawn in proportion to their area, stratified so that every face gets its share within one point; the
    same mesh, count and seed give the same points. Raises TriptychError when the surface has no area.
    """
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_area = np.linalg.norm(cross, axis=1)
    total = float(double_area.sum())
    if not np.isfinite(total) or total <= 0:
        raise TriptychError(
            f"the mesh's {len(mesh.faces)} faces have an area of {total / 2:g}: there is no surface to sample"
        )
    random = np.random.default_rng(seed)
    # One draw in each of `count` equal slices of the cumulative area.
    draws = (np.arange(count) + random.random(count)) / count * total
    faces = np.minimum(np.searchsorted(np.cumsum(double_area), draws, side="right"), len(double_area) - 1)
    faces = np.where(double_area[faces] > 0, faces, int(double_area.argmax()))
    root, second = np.sqrt(random.random((count, 1))), random.random((count, 1))
    a, b, c = (corners[faces, i] for i in range(3))
    points = (1 - root) * a + root * (1 - second) * b + root * second * c
    normals = cross[faces] / double_area[faces, None]
    return points.astype(np.float32), normals.astype(np.float32)


def compare_meshes(
    a: Mesh,
    b: Mesh,
    *,
    samples: int = 30_000,
    thresholds: tuple[float, ...] = (0.01, 0.02, 0.05),
    seed: int = 0,
) -> MeshComparison:
    """Compare ``a`` with the reference ``b`` in their own units; both may be open.

    The two surfaces are sampled with different random numbers, so that a mesh compared with itself shows the sampling
    floor and not zero. Raises TriptychError when a surface has no area.
    """
    from scipy.spatial import cKDTree

    points_a, normals_a = sample_surface(a, samples, seed)
    points_b, normals_b = sample_surface(b, samples, seed + 1)
    to_b, nearest_b = cKDTree(points_b).query(points_a)
    to_a, nearest_a = cKDTree(points_a).query(points_b)
    agreement_a = np.abs((normals_a * normals_b[nearest_b]).sum(axis=1)).mean()
    agreement_b = np.abs((normals_b * normals_a[nearest_a]).sum(axis=1)).mean()
    precision = {t: float((to_b <= t).mean()) for t in thresholds}
    recall = {t: float((to_a <= t).mean()) for t in thresholds}
    return MeshComparison(
        chamfer=float((to_b.mean() + to_a.mean()) / 2),
        f_scores={t: _harmonic(precision[t], recall[t]) for t in thresholds},
        precision=precision,
        recall=recall,
        normal_consistency=float((agreement_a + agreement_b) / 2),
        volume_iou=volume_iou(a, b),
    )


def _harmonic(first: float, second: float) -> float:
    return 2 * first * second / (first + second) if first + second > 0 else 0.0


def is_watertight(mesh: Mesh) -> bool:
    """Whether every edge has exactly as many faces on one side as on the other, after welding equal positions.

    Degenerate faces are ignored. Such a surface bounds a volume; edges where four faces meet are allowed.
    """
    _, welded = np.unique(mesh.vertices + np.float32(0), axis=0, return_inverse=True)
    faces = welded.reshape(-1)[mesh.faces]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    if not len(faces):
        return False
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).astype(np.int64)
    key = edges.min(axis=1) * (int(faces.max()) + 1) + edges.max(axis=1)
    direction = np.where(edges[:, 0] < edges[:, 1], 1, -1)
    _, inverse = np.unique(key, return_inverse=True)
    return not np.bincount(inverse.reshape(-1), direction).any()


def volume_iou(a: Mesh, b: Mesh, resolution: int = 64) -> float | None:
    """Intersection over union of two solids on a grid over their common bounds; None unless both are watertight."""
    if not (is_watertight(a) and is_watertight(b)):
        return None
    bounds = np.stack([a.bounds, b.bounds]).astype(np.float64)
    low, high = bounds[:, 0].min(axis=0), bounds[:, 1].max(axis=0)
    side = float((high - low).max()) * 1.001
    origin = (low + high) / 2 - side / 2
    inside_a, inside_b = (solid_from(mesh, origin, side, resolution) for mesh in (a, b))
    union = int((inside_a | inside_b).sum())
    return float((inside_a & inside_b).sum() / union) if union else None


def solid_from(mesh: Mesh, origin: np.ndarray, side: float, resolution: int) -> np.ndarray:
    """(R, R, R) bool, index [x, y, z]: which cell centres of the cube at ``origin`` lie inside a watertight mesh.

    Winding number along rays parallel to z, one through each column of centres: every face that a ray crosses adds its
    orientation to all the centres above it, and a centre is inside where the sum is not zero. So overlapping bodies
    form a union. The rays are shifted by an irrational fraction of a millionth of a cell, so that they miss edges.
    """
    scaled = (mesh.vertices.astype(np.float64) - origin) / side * resolution - 0.5  # centres at integers
    scaled[:, 0] += np.sqrt(2) * 1e-6
    scaled[:, 1] += np.sqrt(3) * 1e-6
    winding = np.zeros((resolution, resolution, resolution + 1), np.int32)
    for corners, i, j in _columns(scaled[mesh.faces], resolution):
        height, sign = _crossings(corners, i, j)
        hit = sign != 0
        # The first centre above the crossing; a crossing above all of them falls into the spare last cell.
        start = np.clip(np.ceil(height[hit]), 0, resolution).astype(np.int64)
        np.add.at(winding, (i[hit], j[hit], start), sign[hit])
    return np.cumsum(winding, axis=2)[:, :, :resolution] != 0


def _columns(corners: np.ndarray, resolution: int, budget: int = 4_000_000):
    """Yield (faces, i, j) pairs of a face and a column in the face's xy bounding box, in blocks of bounded size."""
    low = np.clip(np.ceil(corners[:, :, :2].min(axis=1)), 0, resolution).astype(np.int64)
    high = np.clip(np.floor(corners[:, :, :2].max(axis=1)), -1, resolution - 1).astype(np.int64)
    span = np.maximum(high - low + 1, 0)
    counts = span[:, 0] * span[:, 1]
    keep = np.flatnonzero(counts)
    corners, low, span, counts = corners[keep], low[keep], span[keep], counts[keep]
    blocks = np.cumsum(counts) // budget
    for block in np.unique(blocks):
        rows = np.flatnonzero(blocks == block)
        owner = np.repeat(rows, counts[rows])
        first = np.cumsum(counts[rows]) - counts[rows]
        local = np.arange(len(owner)) - np.repeat(first, counts[rows])
        i = low[owner, 0] + local // span[owner, 1]
        j = low[owner, 1] + local % span[owner, 1]
        yield corners[owner], i, j


def _crossings(corners: np.ndarray, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the column (i, j) crosses each triangle: z, and -1, 0 (misses) or 1 (enters from below)."""
    point = np.stack([i, j], axis=1).astype(np.float64)
    relative = corners[:, :, :2] - point[:, None]
    a, b, c = relative[:, 0], relative[:, 1], relative[:, 2]
    weights = np.stack([_cross2(b, c), _cross2(c, a), _cross2(a, b)], axis=1)
    total = weights.sum(axis=1)
    inside = ((weights > 0).all(axis=1) | (weights < 0).all(axis=1)) & (total != 0)
    height = np.divide((weights * corners[:, :, 2]).sum(axis=1), total, out=np.zeros_like(total), where=inside)
    # A face whose outward normal points down (negative area seen from above) is where a ray upwards enters.
    return height, np.where(inside, -np.sign(total), 0).astype(np.int32)


def _cross2(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
