"""Closed pieces of surface: lofts, sweeps, and what is made of them.

A part is almost always a loft: rings of equally many points, joined, with a fan at both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

Generator = np.random.Generator
Outline = Callable[[float], np.ndarray]  # a distance from the middle to the nearest side -> (S, 2) points x, z


@dataclass(frozen=True)
class Part:
    """A closed piece. vertices (V, 3) float64; faces (F, 3); uv (F, 3, 2) in 0-1 within its paint; paint (F,) ints."""

    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray
    paint: np.ndarray

    def painted(self, paint: int) -> Part:
        return replace(self, paint=np.full(len(self.faces), paint))

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> Part:
        return replace(self, vertices=self.vertices + np.array([x, y, z]))

    def scaled(self, x: float, y: float, z: float) -> Part:
        return replace(self, vertices=self.vertices * np.array([x, y, z]))

    def rotated(self, rotation: np.ndarray) -> Part:
        return replace(self, vertices=self.vertices @ rotation.T)


def loft(rings: np.ndarray, paint: np.ndarray | None = None, closed: bool = False) -> Part:
    """Rings (R, S, 3) joined in order, with a fan at both ends, or (closed) the last to the first.

    paint: (R - 1,) or (R,) for a closed one, of each band; a fan has the paint of its band.
    """
    count, sides = rings.shape[:2]
    bands = count if closed else count - 1
    band, here = (grid.ravel() for grid in np.meshgrid(np.arange(bands), np.arange(sides), indexing="ij"))
    low, high, there = band * sides, (band + 1) % count * sides, (here + 1) % sides
    faces = [np.stack([low + here, low + there, high + there], 1), np.stack([low + here, high + there, high + here], 1)]
    steps = np.linalg.norm(np.diff(rings, axis=0), axis=2).mean(axis=1)
    v = np.concatenate([[0], np.cumsum(steps)]) / max(steps.sum(), 1e-9)
    v = np.append(v, 1.0) if closed else v
    u0, u1, v0, v1 = here / sides, (here + 1) / sides, v[band], v[band + 1]
    uv = [_corners((u0, v0), (u1, v0), (u1, v1)), _corners((u0, v0), (u1, v1), (u0, v1))]
    paint = np.zeros(bands, int) if paint is None else paint
    paints = [paint[band], paint[band]]
    vertices = rings.reshape(-1, 3)
    if not closed:
        here = np.arange(sides)
        there, pole = (here + 1) % sides, np.full(sides, count * sides)
        top = (count - 1) * sides
        faces += [np.stack([pole, there, here], 1), np.stack([pole + 1, top + here, top + there], 1)]
        u0, u1, um = here / sides, (here + 1) / sides, (here + 0.5) / sides
        uv += [
            _corners((um, 0 * um), (u1, 0 * u1), (u0, 0 * u0)),
            _corners((um, 0 * um + 1), (u0, 0 * u0 + 1), (u1, 0 * u1 + 1)),
        ]
        paints += [np.full(sides, paint[0]), np.full(sides, paint[-1])]
        vertices = np.concatenate([vertices, rings[0].mean(axis=0)[None], rings[-1].mean(axis=0)[None]])
    part = Part(vertices, np.concatenate(faces), np.concatenate(uv), np.concatenate(paints))
    return part if volume(part) > 0 else replace(part, faces=part.faces[:, ::-1], uv=part.uv[:, ::-1])


def _corners(*pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.stack([np.stack(pair, axis=1) for pair in pairs], axis=1)


def volume(part: Part) -> float:
    a, b, c = ((part.vertices - part.vertices.mean(axis=0))[part.faces[:, corner]] for corner in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def raised(outline: Outline, profile: np.ndarray, step: float = 0.08, inner_from: int | None = None) -> Part:
    """An outline raised along a profile (P, 2) of (distance to the side, height); paint 1 from node inner_from on."""
    rows, paint = [], []
    for i, (a, b) in enumerate(zip(profile[:-1], profile[1:], strict=True)):
        pieces = max(1, int(np.ceil(np.linalg.norm(b - a) / step)))
        rows += [a + (b - a) * k / pieces for k in range(pieces)]
        paint += [int(inner_from is not None and i >= inner_from)] * pieces
    rows.append(profile[-1])
    rings = [np.insert(outline(float(r)), 1, height, axis=1) for r, height in rows]
    return loft(np.stack(rings), np.array(paint))


def circle(sides: int = 40) -> Outline:
    angles = np.arange(sides) * (2 * np.pi / sides)
    unit = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return lambda r: unit * max(r, 1e-4)


def polar(radii: np.ndarray) -> Outline:
    angles = np.arange(len(radii)) * (2 * np.pi / len(radii))
    shape = np.stack([np.sin(angles), np.cos(angles)], axis=1) * radii[:, None]
    return lambda r: shape * max(r, 1e-4)


def polygon(corners: int) -> Outline:
    turns = np.arange(corners + 1) * (2 * np.pi / corners)
    nodes = np.stack([np.sin(turns), np.cos(turns)], axis=1) / np.cos(np.pi / corners)
    steps = np.linspace(0, 1, max(2, 24 // corners), endpoint=False)[:, None]
    unit = np.concatenate([a + (b - a) * steps for a, b in zip(nodes[:-1], nodes[1:], strict=True)])
    return lambda r: unit * max(r, 1e-4)


def rectangle(a: float, b: float, corner: float = 0.0) -> Outline:
    """Half sides a (x) and b (z) at the distance min(a, b); smaller distances are insets of it."""
    width = min(a, b)

    def outline(r: float) -> np.ndarray:
        x, z = max(a - width + r, 1e-4), max(b - width + r, 1e-4)
        c = float(np.clip(corner - width + r, 1e-4, min(x, z) * 0.999))
        pieces = []
        for quarter, (sx, sz) in enumerate(((1, 1), (1, -1), (-1, -1), (-1, 1))):
            angles = (quarter + np.linspace(0, 1, 6)) * np.pi / 2
            arc = np.stack([sx * (x - c) + c * np.sin(angles), sz * (z - c) + c * np.cos(angles)], axis=1)
            pieces.append(arc)
        ring = np.concatenate(pieces)
        middles = [
            pieces[i][-1] + (pieces[(i + 1) % 4][0] - pieces[i][-1]) * t for i in range(4) for t in (0.25, 0.5, 0.75)
        ]
        return np.insert(ring, np.repeat([6, 12, 18, 24], 3), np.array(middles), axis=0)

    return outline


def bevelled(width: float, height: float, bevel: float) -> np.ndarray:
    """The profile of a straight body from y = 0 to height, its two edges rounded by bevel."""
    bevel = min(bevel, width * 0.98, height * 0.49)
    if bevel < 2e-3:
        return np.array([(width * 0.5, 0), (width, 0), (width, height), (width * 0.5, height)])
    turn = np.linspace(0, np.pi / 2, 5)
    low = np.stack([width - bevel + bevel * np.sin(turn), bevel - bevel * np.cos(turn)], axis=1)
    return np.concatenate([low, np.stack([low[::-1, 0], height - low[::-1, 1]], axis=1)])


def smoothed(points: np.ndarray, times: int = 2) -> np.ndarray:
    """Corner cutting; the ends stay."""
    for _ in range(times):
        near, far = points[:-1] * 0.75 + points[1:] * 0.25, points[:-1] * 0.25 + points[1:] * 0.75
        cut = np.stack([near, far], axis=1).reshape(-1, points.shape[1])
        points = np.concatenate([points[:1], cut[1:-1], points[-1:]])
    return points


def sweep(
    path: np.ndarray, radii: np.ndarray | float, section: np.ndarray | None = None, round_ends: bool = True
) -> Part:
    """A section (S, 2) of radius 1 carried along path (P, 3); radii: one, (P,) or (P, 2), of its two axes."""
    section = circle(16)(1.0) if section is None else section
    count = len(path)
    radii = np.broadcast_to(np.asarray(radii, float).reshape(-1, 1) if np.ndim(radii) < 2 else radii, (count, 2))
    tangents = np.gradient(path, axis=0)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    if round_ends:
        turn = np.linspace(0, np.pi / 2, 4)[:-1]
        ends = [(path[0], radii[0], tangents[0], -1.0), (path[-1], radii[-1], tangents[-1], 1.0)]
        caps = [[(p + s * t * r.min() * np.cos(a), r * max(np.sin(a), 0.05), t) for a in turn] for p, r, t, s in ends]
        rows = caps[0] + list(zip(path, radii, tangents, strict=True)) + caps[1][::-1]
        path, radii, tangents = (np.array(column) for column in zip(*rows, strict=True))
    side = np.cross(tangents[0], [0.0, 0.0, 1.0] if abs(tangents[0, 2]) < 0.9 else [1.0, 0.0, 0.0])
    rings = []
    for place, radius, tangent in zip(path, radii, tangents, strict=True):
        side = side - tangent * (side @ tangent)
        side = side / np.linalg.norm(side)
        flat = section * radius
        rings.append(place + flat[:, :1] * side + flat[:, 1:] * np.cross(tangent, side))
    return loft(np.stack(rings))


def line_path(*nodes: tuple[float, float, float], smooth: int = 0) -> np.ndarray:
    """Points along straight pieces, corners cut ``smooth`` times; at least eight."""
    points = smoothed(np.array(nodes, float), smooth)
    steps = max(2, int(np.ceil(8 / (len(points) - 1))) + 1)
    pieces = [a + (b - a) * np.linspace(0, 1, steps)[:-1, None] for a, b in zip(points[:-1], points[1:], strict=True)]
    return np.concatenate([*pieces, points[-1:]])


def arc_path(radius_x: float, radius_y: float, start_deg: float, end_deg: float, count: int = 18) -> np.ndarray:
    turn = np.radians(np.linspace(start_deg, end_deg, count))
    return np.stack([radius_x * np.cos(turn), radius_y * np.sin(turn), 0 * turn], axis=1)


def torus(radius: float, thickness: np.ndarray, section: np.ndarray, sides: int = 40) -> Part:
    angles = np.arange(sides) * (2 * np.pi / sides)
    out = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=1)
    flat = section * thickness
    rings = out[:, None] * (radius + flat[None, :, :1]) + flat[None, :, 1:] * np.array([0.0, 1.0, 0.0])
    return loft(rings, closed=True)


def ellipsoid(x: float, y: float, z: float, power: float = 1.0, across: float = 1.0, rings: int = 14) -> Part:
    """Half axes x, y, z about the origin; powers below 1 make it boxy, above 1 pointed."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, rings + 2)[1:-1]
    angles = np.arange(2 * rings) * (np.pi / rings)
    unit = np.stack([signed_power(np.sin(angles), across), signed_power(np.cos(angles), across)], axis=1)
    radius, height = signed_power(np.cos(latitude), power), signed_power(np.sin(latitude), power)
    grid = np.concatenate([unit[None] * radius[:, None, None], np.zeros((rings, 2 * rings, 1))], axis=2)[..., [0, 2, 1]]
    grid[..., 1] = height[:, None]
    part = loft(grid)
    ends = part.vertices.copy()
    ends[-2:, 1] = (-1, 1)
    return replace(part, vertices=ends * np.array([x, y, z]))


def signed_power(value: np.ndarray, power: float) -> np.ndarray:
    return np.sign(value) * np.abs(value) ** power


def box(x: float, y: float, z: float, corner: float = 0.0, bevel: float = 0.0) -> Part:
    """Full sides, standing on y = 0; each pair of sides has its own quarter of the print."""
    return box_uv(raised(rectangle(x / 2, z / 2, corner), bevelled(min(x, z) / 2, y, bevel), 0.15))


def box_uv(part: Part) -> Part:
    corners = part.vertices[part.faces]
    low, size = part.vertices.min(axis=0), np.ptp(part.vertices, axis=0) + 1e-9
    axis = np.abs(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])).argmax(axis=1)
    place = (corners - low) / size
    across = np.array([[2, 1], [0, 2], [0, 1]])[axis]
    uv = np.take_along_axis(place, across[:, None, :].repeat(3, axis=1), axis=2)
    quarter = np.array([[0.0, 0.0], [0.0, 0.5], [0.5, 0.0]])[axis][:, None]
    return replace(part, uv=np.clip(uv, 0.02, 0.98) / 2 + quarter)


def bent(part: Part, rng: Generator, amount: float) -> Part:
    """Displaced along smooth random waves: dents, bulges, and the unevenness of a grown thing."""
    size = np.ptp(part.vertices, axis=0).max()
    place, move = part.vertices / size, np.zeros_like(part.vertices)
    for _ in range(4):
        wave = rng.normal(size=3) * rng.uniform(1.5, 5)
        move += np.sin(place @ wave + rng.uniform(0, 6.3))[:, None] * rng.normal(size=3)
    return replace(part, vertices=part.vertices + move * (amount * size / 4))


def rotation(axis: int, degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def mirrored(part: Part) -> Part:
    """Mirrored in z, faces still outward."""
    turned = part.scaled(1, 1, -1)
    return replace(turned, faces=turned.faces[:, ::-1], uv=turned.uv[:, ::-1])
