"""Base colours of procedural objects: prints like those of packages, bands, patterns, plain colours."""

from __future__ import annotations

import numpy as np

Generator = np.random.Generator
_ATLAS = 256  # pixels a side


def atlas(rng: Generator, paints: int, grid: int) -> np.ndarray:
    """(S, S, 3) uint8; paint k is the tile in column k % grid, row k // grid from the bottom."""
    size = _ATLAS // grid if grid > 1 else _ATLAS * 3 // 4
    palette = _palette(rng)
    picture = np.zeros((grid * size, grid * size, 3), np.float64)
    for paint in range(paints):
        row, column = paint // grid, paint % grid
        picture[row * size : (row + 1) * size, column * size : (column + 1) * size] = _tile(rng, size, palette)
    return (picture[::-1].clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _palette(rng: Generator) -> np.ndarray:
    """(6, 3) sRGB: saturated toys, muted things, packages with white and black, or one hue's wood, fruit or metal."""
    form = rng.random()
    if form < 0.3:
        colours = _hsv(rng.random(6), rng.uniform(0.6, 1, 6), rng.uniform(0.5, 1, 6))
    elif form < 0.55:
        colours = _hsv(rng.random(6), rng.uniform(0.05, 0.45, 6), rng.uniform(0.25, 0.9, 6))
    elif form < 0.75:
        colours = _hsv(rng.random() + rng.normal(0, 0.04, 6), rng.uniform(0.2, 0.9, 6), rng.uniform(0.3, 0.95, 6))
    elif form < 0.9:
        colours = _hsv(rng.random(6), rng.uniform(0.5, 1, 6), rng.uniform(0.4, 1, 6))
        colours[:3] = np.array([rng.uniform(0.85, 1), rng.uniform(0.02, 0.2), rng.uniform(0.7, 0.95)])[:, None]
        colours = colours[rng.permutation(6)]
    else:
        colours = np.repeat(rng.uniform(0.08, 0.95, (6, 1)), 3, axis=1) + rng.normal(0, 0.015, (6, 3))
    return colours.clip(0.02, 1)


def _hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    turn = (hue[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    return value[:, None] * (1 - saturation[:, None] * np.minimum(turn, 4 - turn).clip(0, 1))


def _tile(rng: Generator, size: int, palette: np.ndarray) -> np.ndarray:
    """(size, size, 3) sRGB, row 0 at the bottom (v = 0)."""
    colours = palette[rng.permutation(6)]
    tile = np.tile(colours[0], (size, size, 1))
    form = rng.random()
    v, u = np.mgrid[:size, :size] / size
    if form < 0.3:
        pass
    elif form < 0.45:  # bands
        edges = np.sort(rng.random(int(rng.integers(1, 4))))
        tile = colours[np.searchsorted(edges, v)]
    elif form < 0.52:  # stripes, either way or slanting
        slope = rng.integers(0, 3, 2) + np.array([0, 1])
        tile = colours[(np.floor((u * slope[0] + v * slope[1]) * rng.integers(3, 10)) % 2).astype(int)]
    elif form < 0.76:
        for _ in range(int(rng.integers(1, 4))):
            _label(rng, tile, colours)
    elif form < 0.81:  # checks
        number = rng.integers(3, 12)
        tile = colours[((np.floor(u * number) + np.floor(v * number)) % 2).astype(int)]
    elif form < 0.88:  # spots
        for x, y, radius in zip(rng.random(14), rng.random(14), rng.uniform(0.02, 0.1, 14), strict=True):
            tile[(u - x) ** 2 + (v - y) ** 2 < radius**2] = colours[1 + int(x * 1.99)]
    else:  # marble, rust, cloth
        mix = _cloud(rng, size, int(rng.integers(4, 24)))[..., None].clip(-1, 1) / 2 + 0.5
        tile = colours[0] * mix + colours[1] * (1 - mix)
    tile = tile * (1 + rng.uniform(0, 0.12) * _cloud(rng, size, int(rng.integers(3, 9))))[..., None]
    return tile + rng.choice([0.0, 0.01, 0.025]) * rng.normal(size=(size, size, 1))


def _label(rng: Generator, tile: np.ndarray, colours: np.ndarray) -> None:
    """A printed field: a plain rectangle, perhaps a round mark, and lines like text."""
    size = len(tile)
    low = (rng.uniform(0, 0.6, 2) * size).astype(int)
    high = np.minimum(low + (rng.uniform(0.2, 0.9, 2) * size).astype(int), size)
    field = tile[low[0] : high[0], low[1] : high[1]]
    field[:] = colours[int(rng.integers(1, 4))]
    tall, wide = field.shape[:2]
    if rng.random() < 0.6:
        v, u = np.mgrid[:tall, :wide]
        radius = min(tall, wide) * rng.uniform(0.15, 0.45)
        field[(u - wide * rng.random()) ** 2 + (v - tall * rng.random()) ** 2 < radius**2] = colours[4]
    line = int(rng.integers(2, max(3, size // 12)))
    for top in range(int(tall * rng.uniform(0.05, 0.5)), int(tall * 0.9) - line, 2 * line):
        letters = np.repeat(rng.random(wide // max(1, line // 2) + 1) < 0.65, max(1, line // 2))[:wide]
        letters[: wide // 10] = False
        letters[int(wide * rng.uniform(0.6, 0.95)) :] = False
        field[top : top + line, letters] = colours[5]


def _cloud(rng: Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) smooth noise of unit deviation, bilinear between (cells + 1)^2 random values."""
    nodes = rng.normal(size=(cells + 1, cells + 1))
    place = np.linspace(0, cells, size, endpoint=False)
    index, part = place.astype(int), place % 1
    part = part * part * (3 - 2 * part)
    rows = nodes[index] * (1 - part)[:, None] + nodes[index + 1] * part[:, None]
    return rows[:, index] * (1 - part) + rows[:, index + 1] * part
