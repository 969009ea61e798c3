"""A small object of our own: a toy rocket robot, made of spheres, tubes and boxes.

It is the picture-less demo's subject and the tests' asymmetric object. Seen from the front (the camera on +Z): a red
nose and a face with two eyes; the subject's left arm (+X) is orange and holds a yellow ball, its right arm (-X) is a
purple fin; a blue tank and a winding key sit on its back. No view is another's mirror image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .geometry.cameras import VIEW_NAMES, rig_cameras
from .geometry.mesh import Mesh

if TYPE_CHECKING:
    from PIL.Image import Image

# sRGB 0-1.
CREAM, RED, ORANGE, YELLOW = (0.94, 0.89, 0.78), (0.83, 0.16, 0.15), (0.93, 0.48, 0.13), (0.98, 0.81, 0.18)
PURPLE, BLUE, TEAL, STEEL, INK = (
    (0.48, 0.23, 0.60),
    (0.13, 0.36, 0.72),
    (0.10, 0.58, 0.56),
    (0.55, 0.58, 0.62),
    (0.11, 0.12, 0.15),
)

Colour = tuple[float, float, float]
Point = tuple[float, float, float]


def sample_object() -> Mesh:
    """The rocket robot, in model space (centred, longest side 1, facing +Z), with one sRGB colour per vertex.

    About six thousand faces in closed parts that overlap; the same arrays on every call.
    """
    hull = _rounded([(0.15, -0.42), (0.22, -0.39), (0.26, -0.18), (0.265, 0.05), (0.23, 0.20), (0.19, 0.30)])
    cone = _rounded([(0.20, 0.29), (0.19, 0.34), (0.15, 0.43), (0.08, 0.52), (0.02, 0.55)])
    parts = [
        _lathe([(0.0, -0.42), *hull, (0.0, 0.30)], CREAM),
        _lathe([(0.00, -0.10), (0.272, -0.10), (0.272, -0.03), (0.00, -0.03)], TEAL),
        _lathe([(0.0, 0.29), *cone, (0.0, 0.55)], RED),
        _ellipsoid((0.0, 0.57, 0.0), (0.035, 0.035, 0.035), YELLOW, rings=8),
        # The face: a dark visor with two eyes of unlike size, and a button off the middle.
        _ellipsoid((0.0, 0.14, 0.19), (0.15, 0.085, 0.08), INK),
        _ellipsoid((0.065, 0.15, 0.25), (0.040, 0.040, 0.030), YELLOW, rings=10),
        _ellipsoid((-0.065, 0.15, 0.25), (0.028, 0.028, 0.026), CREAM, rings=10),
        _ellipsoid((0.09, -0.20, 0.24), (0.035, 0.035, 0.025), RED, rings=8),
        _box((-0.06, -0.24, 0.245), (0.12, 0.07, 0.04), STEEL),
        # The subject's left: an arm that reaches up and forward, with a ball in its hand.
        _tube((0.22, 0.05, 0.02), (0.40, 0.00, 0.06), 0.045, ORANGE),
        _tube((0.40, 0.00, 0.06), (0.45, 0.17, 0.14), 0.040, ORANGE),
        _ellipsoid((0.40, 0.00, 0.06), (0.055, 0.055, 0.055), STEEL, rings=10),
        _ellipsoid((0.46, 0.24, 0.16), (0.095, 0.095, 0.095), YELLOW),
        # The subject's right: a swept fin.
        _prism([(-0.22, 0.06), (-0.46, -0.16), (-0.46, -0.34), (-0.22, -0.20)], -0.035, 0.035, PURPLE),
        # The back: an air tank and a winding key.
        _tube((-0.06, -0.26, -0.27), (-0.06, 0.10, -0.27), 0.085, BLUE),
        _ellipsoid((-0.06, 0.10, -0.27), (0.085, 0.060, 0.085), STEEL, rings=10),
        _tube((0.12, 0.02, -0.22), (0.12, 0.02, -0.36), 0.022, STEEL, sides=14),
        _box((0.12, 0.02, -0.37), (0.040, 0.17, 0.04), ORANGE),
        # Feet, the left one a step ahead.
        _box((0.11, -0.46, 0.06), (0.13, 0.10, 0.26), TEAL),
        _box((-0.11, -0.46, 0.00), (0.13, 0.10, 0.26), TEAL),
    ]
    return _merge(parts).normalized()


def sample_views(size: int = 512) -> dict[str, Image]:
    """The sample object from the four rig cameras, shaded, on white: PIL RGB pictures by view name."""
    # The renderer is heavier than the shapes: loaded when pictures are wanted.
    import torch
    from PIL import Image

    from .render.views import render_views, shade

    cameras = rig_cameras()
    rgba_B4HW = shade(render_views(sample_object(), cameras, size), cameras)
    rgb_B3HW = rgba_B4HW[:, :3] * rgba_B4HW[:, 3:] + (1 - rgba_B4HW[:, 3:])
    pixels = (rgb_B3HW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return {name: Image.fromarray(picture) for name, picture in zip(VIEW_NAMES, pixels, strict=True)}


def _merge(parts: list[Mesh]) -> Mesh:
    """One mesh of all parts; every part has colours."""
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)]),
        colors=np.concatenate([part.colors for part in parts if part.colors is not None]),
    )


def _part(vertices: np.ndarray, faces: np.ndarray, colour: Colour) -> Mesh:
    colors = np.tile(np.array([*colour, 1.0], dtype=np.float32), (len(vertices), 1))
    return Mesh(vertices=vertices.astype(np.float32), faces=faces.astype(np.int64), colors=colors)


def _rounded(profile: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Chaikin's corner cutting, twice; the ends stay."""
    points = np.array(profile)
    for _ in range(2):
        near, far = points[:-1] * 0.75 + points[1:] * 0.25, points[:-1] * 0.25 + points[1:] * 0.75
        points = np.concatenate([points[:1], np.stack([near, far], axis=1).reshape(-1, 2)[1:-1], points[-1:]])
    return [(float(radius), float(height)) for radius, height in points]


def _lathe(profile: list[tuple[float, float]], colour: Colour, sides: int = 40) -> Mesh:
    """A profile of (radius, height) from bottom to top, turned about the y axis; its ends have radius 0 and close it.

    A corner of the profile of more than 40 degrees has its ring twice, so that vertex normals keep the edge crisp.
    """
    points = np.array(profile, dtype=np.float64)
    steps = np.diff(points, axis=0)
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    is_sharp = (steps[:-1] * steps[1:]).sum(axis=1) < np.cos(np.radians(40))
    order = np.repeat(np.arange(1, len(points) - 1), np.where(is_sharp, 2, 1))
    angles = np.arange(sides) * (2 * np.pi / sides)
    ring = np.stack([np.sin(angles), np.zeros(sides), np.cos(angles)], axis=1)
    inner = points[order, :1, None] * ring + np.array([0, 1, 0]) * points[order, 1:, None]
    vertices = np.concatenate([[[0, points[0, 1], 0]], inner.reshape(-1, 3), [[0, points[-1, 1], 0]]])
    return _part(vertices, _ring_faces(order, sides), colour)


def _ring_faces(order: np.ndarray, sides: int) -> np.ndarray:
    """Outward faces of a pole, rings of ``sides`` vertices from bottom to top, and a pole.

    order: (R,) the profile point of each ring; two rings of the same point are not joined.
    """
    here, there = np.arange(sides), (np.arange(sides) + 1) % sides
    top = 1 + len(order) * sides
    bands = [np.stack([np.zeros(sides, int), 1 + there, 1 + here], axis=1)]
    for ring in np.flatnonzero(np.diff(order)):
        low, high = 1 + ring * sides, 1 + (ring + 1) * sides
        bands.append(np.stack([low + here, low + there, high + there], axis=1))
        bands.append(np.stack([low + here, high + there, high + here], axis=1))
    bands.append(np.stack([np.full(sides, top), top - sides + here, top - sides + there], axis=1))
    return np.concatenate(bands)


def _ellipsoid(centre: Point, radii: Point, colour: Colour, rings: int = 14) -> Mesh:
    latitudes = np.linspace(-np.pi / 2, np.pi / 2, rings + 1)
    ball = _lathe([(float(np.cos(a)), float(np.sin(a))) for a in latitudes], colour, sides=2 * rings)
    return ball.replace(vertices=(ball.vertices * np.array(radii) + np.array(centre)).astype(np.float32))


def _tube(start: Point, end: Point, radius: float, colour: Colour, sides: int = 24) -> Mesh:
    """A closed cylinder between two points."""
    axis = np.array(end) - np.array(start)
    length = float(np.linalg.norm(axis))
    upright = _lathe([(0, 0), (radius, 0), (radius, length), (0, length)], colour, sides)
    y = axis / length
    x = np.cross(y, [0.0, 0.0, 1.0] if abs(y[2]) < 0.9 else [1.0, 0.0, 0.0])
    x /= np.linalg.norm(x)
    frame = np.stack([x, y, np.cross(x, y)])
    return upright.replace(vertices=(upright.vertices @ frame + np.array(start)).astype(np.float32))


def _box(centre: Point, size: Point, colour: Colour) -> Mesh:
    x, y, z = (extent / 2 for extent in size)
    box = _prism([(-x, -y), (x, -y), (x, y), (-x, y)], -z, z, colour)
    return box.replace(vertices=(box.vertices + np.array(centre)).astype(np.float32))


def _prism(outline: list[tuple[float, float]], back: float, front: float, colour: Colour) -> Mesh:
    """A convex outline (x, y), counter-clockwise seen from +z, drawn out along z; every side has its own vertices."""
    count = len(outline)
    flat = np.array(outline, dtype=np.float64)
    rear, face = (np.column_stack([flat, np.full(count, z)]) for z in (back, front))
    fan = np.array([[0, i, i + 1] for i in range(1, count - 1)])
    vertices, faces = [face, rear], [fan, fan[:, ::-1] + count]
    for i in range(count):
        j = (i + 1) % count
        vertices.append(np.stack([rear[i], rear[j], face[j], face[i]]))
        faces.append(np.array([[0, 1, 2], [0, 2, 3]]) + 2 * count + 4 * i)
    return _part(np.concatenate(vertices), np.concatenate(faces), colour)
