"""Small lit pictures for the report, from the albedo and normals that a shard holds."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

SIZE = 96
BACKDROP = (232, 235, 239)  # sRGB bytes; the report's tiles have the same colour
_EXPOSURE = 0.9  # white seen from the front is darker than the backdrop
_KEY = np.array([-0.45, 0.65, 0.62]) / np.linalg.norm([-0.45, 0.65, 0.62])  # from the viewer's upper left


def lit(albedo: np.ndarray, normal: np.ndarray, size: int = SIZE) -> np.ndarray:
    """One front view under a key light and a soft sky: (size, size, 3) uint8 sRGB on the backdrop.

    albedo: (S, S, 4) uint8 sRGB, straight alpha. normal: (S, S, 3) uint8, world, 0-255 for -1..1.
    """
    direction = normal.astype(np.float32) * (2 / 255) - 1
    direction /= np.maximum(np.linalg.norm(direction, axis=2, keepdims=True), 1e-6)
    shade = 0.62 * np.clip(direction @ _KEY.astype(np.float32), 0, None) + 0.26 + 0.16 * direction[..., 1]
    linear = (albedo[..., :3].astype(np.float32) / 255) ** 2.2 * np.clip(shade * _EXPOSURE, 0.05, None)[..., None]
    alpha = albedo[..., 3:].astype(np.float32) / 255
    backdrop = (np.array(BACKDROP, dtype=np.float32) / 255) ** 2.2
    mixed = linear * alpha + backdrop * (1 - alpha)
    picture = (mixed.clip(0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
    if len(picture) == size:
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))


def thumbnail_uri(albedo: np.ndarray, normal: np.ndarray) -> str:
    """``lit`` as a JPEG data URI of two or three kilobytes."""
    stream = io.BytesIO()
    Image.fromarray(lit(albedo, normal)).save(stream, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
