"""sRGB and linear colour (IEC 61966-2-1), for numpy arrays of any shape; values are clipped to [0, 1]."""

from __future__ import annotations

import numpy as np


def srgb_to_linear(value: np.ndarray) -> np.ndarray:
    """Display values 0-1 -> linear light 0-1, float64."""
    value = np.clip(np.asarray(value, dtype=np.float64), 0.0, 1.0)
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: np.ndarray) -> np.ndarray:
    """Linear light 0-1 -> display values 0-1, float64."""
    value = np.clip(np.asarray(value, dtype=np.float64), 0.0, 1.0)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def colors_to_linear(colors: np.ndarray) -> np.ndarray:
    """(N, 4) sRGB with alpha -> (N, 4) float32 linear; alpha is unchanged."""
    return np.concatenate([srgb_to_linear(colors[:, :3]), colors[:, 3:]], axis=1).astype(np.float32)


def colors_to_srgb(colors: np.ndarray) -> np.ndarray:
    """(N, 3 or 4) linear -> (N, 4) float32 sRGB; a missing alpha is 1."""
    alpha = colors[:, 3:4] if colors.shape[1] == 4 else np.ones((len(colors), 1))
    return np.concatenate([linear_to_srgb(colors[:, :3]), np.clip(alpha, 0, 1)], axis=1).astype(np.float32)
