"""A quick picture of a volume while it takes shape: a small point renderer, a few milliseconds on one core."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 256  # pixels
AZIMUTH_DEG, ELEVATION_DEG = 35.0, 20.0
HALF_EXTENT = 0.8  # model units: the turned unit cube fits
_BACKGROUND = np.array([46, 48, 52], np.float32)
_CLAY = np.array([222, 214, 202], np.float32)


def voxel_picture(field: np.ndarray, *, size: int = SIZE) -> Image:
    """The surface voxels of a field (R, R, R) float, positive inside, index [x, y, z], as an RGB picture.

    Seen from the front's left side and above, lit from the camera's upper left. An empty field gives the background.
    """
    from PIL import Image

    pixels = np.tile(_BACKGROUND, (size * size, 1))
    points, normals = _surface(np.asarray(field, np.float32))
    if len(points):
        right, up, back = _axes()
        x, y, near = points @ right, points @ up, points @ back
        light = 0.35 + 0.65 * np.clip(normals @ (0.5 * back + 0.7 * up - 0.5 * right), 0, 1)
        order = np.argsort(near)  # far to near: what is drawn last stays
        side = max(1, math.ceil(1.5 * size / (2 * HALF_EXTENT * len(field))))
        column = ((x / HALF_EXTENT + 1) / 2 * size).astype(np.int64)[order]
        row = ((1 - y / HALF_EXTENT) / 2 * size).astype(np.int64)[order]
        offset = np.arange(side) - side // 2
        rows = np.clip(row[:, None, None] + offset[None, :, None], 0, size - 1)
        columns = np.clip(column[:, None, None] + offset[None, None, :], 0, size - 1)
        shade = (light[order, None] * _CLAY)[:, None, None]
        pixels[(rows * size + columns).ravel()] = np.broadcast_to(shade, (len(order), side, side, 3)).reshape(-1, 3)
    return Image.fromarray(pixels.reshape(size, size, 3).clip(0, 255).astype(np.uint8))


def _surface(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (N, 3) in model space and outward unit normals (N, 3) of inside voxels with an outside neighbour."""
    inside = np.pad(field > 0, 1)
    buried = inside.copy()
    for axis in range(3):
        buried &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    index = np.argwhere((inside & ~buried)[1:-1, 1:-1, 1:-1])
    padded = np.pad(np.tanh(field), 1, mode="edge")
    x, y, z = index.T + 1
    slope = np.stack(
        [
            padded[x - 1, y, z] - padded[x + 1, y, z],
            padded[x, y - 1, z] - padded[x, y + 1, z],
            padded[x, y, z - 1] - padded[x, y, z + 1],
        ],
        axis=1,
    )
    normals = slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-6)
    return ((index + 0.5) / len(field) - 0.5).astype(np.float32), normals


def _axes() -> np.ndarray:
    """(3, 3): right, up and backward of the camera, as in ``geometry.cameras``."""
    azimuth, elevation = math.radians(AZIMUTH_DEG), math.radians(ELEVATION_DEG)
    sin_a, cos_a, sin_e, cos_e = math.sin(azimuth), math.cos(azimuth), math.sin(elevation), math.cos(elevation)
    return np.array(
        [[cos_a, 0, -sin_a], [-sin_a * sin_e, cos_e, -cos_a * sin_e], [sin_a * cos_e, sin_e, cos_a * cos_e]],
        np.float32,
    )
