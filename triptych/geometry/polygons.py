"""Polygons to triangles, vectorised over polygons of one size.

Quads are cut along the diagonal whose two triangles agree in direction; larger polygons become a fan when they are
convex, and are ear-clipped one by one when they are not (rare). Triangles keep the polygon's winding and corners, so
the result indexes *corner numbers*, and position, UV and normal indices are all cut the same way.
"""

from __future__ import annotations

import numpy as np


def triangulate(vertices: np.ndarray, polygons: np.ndarray) -> np.ndarray:
    """(V, 3) float, (P, N) int polygons of N corners -> (P, N - 2, 3) int64 corner numbers in [0, N).

    A corner of the polygon is ``polygons[p, result[p, t, c]]``.
    """
    count, corners = polygons.shape
    fan = np.stack([np.zeros(corners - 2, int), np.arange(1, corners - 1), np.arange(2, corners)], axis=1)
    result = np.repeat(fan[None], count, axis=0)
    if corners == 3 or count == 0:
        return result
    points = vertices[polygons].astype(np.float64)
    fan_bad = ~_agree(points, fan)
    if corners == 4:
        other = np.array([[0, 1, 3], [1, 2, 3]])
        swap = fan_bad & _agree(points, other)
        result[swap] = other
        return result
    for index in np.flatnonzero(fan_bad):
        result[index] = _clip_ears(points[index])
    return result


def _agree(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(P, N, 3), (T, 3) -> (P,) bool: no triangle faces against the polygon's area vector (Newell)."""
    a, b, c = (points[:, triangles[:, i]] for i in range(3))
    normals = np.cross(b - a, c - a)
    area = np.cross(points - points[:, :1], np.roll(points, -1, axis=1) - points[:, :1]).sum(axis=1)
    return ((normals * area[:, None]).sum(axis=2) >= 0).all(axis=1)


def _clip_ears(points: np.ndarray) -> np.ndarray:
    """(N, 3) one polygon -> (N - 2, 3) corner numbers, ear by ear in the plane of its area vector."""
    area = np.cross(points - points[0], np.roll(points, -1, axis=0) - points[0]).sum(axis=0)
    drop = int(np.abs(area).argmax())
    keep = [(1, 2), (2, 0), (0, 1)][drop]
    flat = points[:, keep] * (1.0 if area[drop] > 0 else -1.0, 1.0)

    def turn(a: int, b: int, c: int) -> float:
        (ax, ay), (bx, by), (cx, cy) = flat[a], flat[b], flat[c]
        return float((bx - ax) * (cy - ay) - (by - ay) * (cx - ax))

    ring, triangles = list(range(len(points))), []
    while len(ring) > 3:
        for i in range(len(ring)):
            a, b, c = ring[i - 1], ring[i], ring[(i + 1) % len(ring)]
            others = [p for p in ring if p not in (a, b, c)]
            if turn(a, b, c) > 0 and not any(
                turn(a, b, p) >= 0 and turn(b, c, p) >= 0 and turn(c, a, p) >= 0 for p in others
            ):
                break
        else:
            i = 0  # self-intersecting or flat: any cut is as good
            a, b, c = ring[-1], ring[0], ring[1]
        triangles.append((a, b, c))
        del ring[i]
    triangles.append((ring[0], ring[1], ring[2]))
    return np.array(triangles)
