"""View sheets: several views in one picture, and back.

A grid is 2 x 2 in reading order, front left / back right. A row is a triptych (front, left, back) or all four. Left and
right are the subject's sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import TriptychError
from ..geometry.cameras import VIEW_NAMES
from .files import ImageSource, read_image
from .views import ViewSet

LAYOUTS = ("grid", "row")


def join_sheet(
    views: ViewSet | Mapping[str, ImageSource] | Sequence[ImageSource],
    layout: str = "grid",
    background: Sequence[float] | None = None,
) -> np.ndarray:
    """Views of one size -> one sheet, (H, W, 4) float32, or (H, W, 3) on a background.

    views: a view set or a mapping with the views front, left, back, right (a row may lack the right one), or pictures
        in that order. layout: "grid" or "row". background: sRGB colour 0-1 to lay the views on; None keeps the alpha.
    Raises TriptychError for missing or further views, and for different sizes.
    """
    pictures = _in_order(views, layout)
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        sizes = ", ".join(f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures)
        raise TriptychError(f"the views of a sheet must have one size, got {sizes}; prepare them as a set first")
    if layout == "row":
        sheet = np.concatenate(pictures, axis=1)
    else:
        sheet = np.concatenate([np.concatenate(pictures[:2], axis=1), np.concatenate(pictures[2:], axis=1)], axis=0)
    return sheet if background is None else flatten(sheet, background)


def split_sheet(sheet: ImageSource, layout: str = "auto") -> dict[str, np.ndarray]:
    """A sheet -> its views by name, each (h, w, 4) float32; the exact inverse of `join_sheet`.

    layout: "grid", "row", or "auto": three or four times as wide as high is a row, all else a grid.
    Raises TriptychError when the sheet does not divide evenly, or is no row.
    """
    rgba = read_image(sheet).rgba
    height, width = rgba.shape[:2]
    if layout == "auto":
        layout = "row" if round(width / height) in (3, 4) and width % height == 0 else "grid"
    _check_layout(layout)
    if layout == "row":
        count = round(width / height)
        if count not in (3, 4) or width % count:
            raise TriptychError(
                f"a row sheet shows 3 or 4 views of equal width, got {width} x {height} pixels; crop it to a "
                "multiple of its height"
            )
        return dict(zip(VIEW_NAMES, np.split(rgba, count, axis=1), strict=False))
    if width % 2 or height % 2:
        raise TriptychError(f"a grid sheet must have even sides, got {width} x {height} pixels; crop it to even sides")
    cells = [cell for half in np.split(rgba, 2, axis=0) for cell in np.split(half, 2, axis=1)]
    return dict(zip(VIEW_NAMES, cells, strict=True))


def flatten(rgba: np.ndarray, background: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Straight alpha (..., 4) over an sRGB colour 0-1 -> (..., 3) float32, mixed in sRGB as picture editors do."""
    colour = np.asarray(background, dtype=np.float32)
    if colour.shape != (3,) or not ((colour >= 0) & (colour <= 1)).all():
        raise TriptychError(f"a background colour is three numbers in 0-1, got {background}")
    alpha = rgba[..., 3:]
    return (rgba[..., :3] * alpha + colour * (1 - alpha)).astype(np.float32)


def sheet_of(views: ViewSet) -> np.ndarray:
    """A view set in a grid, (2S, 2S, 4) float32; a view that it lacks is transparent."""
    nothing = np.zeros((views.size, views.size, 4), dtype=np.float32)
    found = views.pictures
    return join_sheet({name: found.get(name, nothing) for name in VIEW_NAMES}).astype(np.float32)


def _in_order(views: ViewSet | Mapping[str, ImageSource] | Sequence[ImageSource], layout: str) -> list[np.ndarray]:
    _check_layout(layout)
    if isinstance(views, ViewSet):
        named: dict[str, ImageSource] = dict(views.pictures.items())
    elif isinstance(views, Mapping):
        named = dict(views)
    else:
        named = {VIEW_NAMES[i] if i < 4 else str(i): view for i, view in enumerate(views)}
    needed = VIEW_NAMES if layout == "grid" or "right" in named else VIEW_NAMES[:3]
    if set(named) != set(needed):
        raise TriptychError(
            f"a {layout} sheet shows the views {', '.join(needed)}, got {', '.join(map(str, named)) or 'none'}"
        )
    return [read_image(named[name]).rgba for name in needed]


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise TriptychError(f"unknown sheet layout {layout!r}; choose {' or '.join(LAYOUTS)}")
