"""Pictures as the published TRELLIS image models were trained to see them: cut out, centred, on black.

The object's box is where alpha exceeds 0.8; a square around its centre, 1.2 times its longer side, becomes the picture.
Cropping and resampling are PIL's on 8 bits, with Lanczos on premultiplied colour, and values are rounded where the
published preparation rounds them, so a picture with alpha gives the same numbers. A picture without alpha is reduced to
1024 pixels first and cut out by our own `extract_foreground`, where the published one uses a matting network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TriptychError
from .files import ImageSource, read_image, to_pil
from .foreground import MIN_SIDE_PX, extract_foreground
from .views import MAX_VIEWS, ViewSet

IMAGE_SIZE = 518
MAX_SIDE_PX = 1024  # of a picture that still has to be cut out
SOLID_ALPHA = 0.8
MARGIN = 1.2


def published_pictures(
    sources: Sequence[ImageSource], *, size: int = IMAGE_SIZE, foreground: str = "auto"
) -> tuple[Tensor, tuple[str, ...]]:
    """One to four pictures of an object -> (V, 3, size, size) float32 sRGB 0-1 on black, and sentences for the user.

    sources: paths, PIL images or arrays, as `read_image` takes them. foreground: "auto" keeps the alpha of a picture
    that is cut out and cuts out others, "alpha" keeps it in any case; "plain" and "matting" as `extract_foreground`.
    Raises TriptychError for no or more than four pictures, and whatever reading and cutting out raise.
    """
    _check_count(len(sources))
    found: list[Tensor] = []
    notes: list[str] = []
    for number, source in enumerate(sources, start=1):
        label = "the picture" if len(sources) == 1 else f"picture {number}"
        cut, said = _cut_out(source, foreground, label)
        found.append(on_black(cut, size, label))
        notes += said
    return torch.stack(found), tuple(notes)


def published_pictures_of(views: ViewSet, size: int = IMAGE_SIZE) -> Tensor:
    """The same from a prepared view set, whose alpha is kept: (V, 3, size, size).

    Made for callers that have nothing else; from the sources themselves less detail is lost.
    """
    rgba = views.images.permute(0, 2, 3, 1).cpu().numpy()
    names = (f"the {name} view" for name in views.names)
    return torch.stack([on_black(to_pil(one), size, name) for one, name in zip(rgba, names, strict=True)])


def on_black(rgba: Image.Image, size: int = IMAGE_SIZE, label: str = "the picture") -> Tensor:
    """An RGBA picture -> (3, size, size) float32 multiples of 1/255: the object's square, on black.

    Raises TriptychError when no pixel is solid, or the object is under 16 pixels.
    """
    solid = np.asarray(rgba.getchannel("A")) > SOLID_ALPHA * 255
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    if not len(rows):
        raise TriptychError(f"{label} has no solid pixel (alpha above {SOLID_ALPHA}): give one that shows the object")
    left, right, top, bottom = int(columns[0]), int(columns[-1]), int(rows[0]), int(rows[-1])
    longest = max(right - left, bottom - top)
    if longest < MIN_SIDE_PX:
        raise TriptychError(f"the object in {label} is {longest + 1} pixels large: give a larger picture of it")
    half = int(longest * MARGIN) // 2
    centre_x, centre_y = (left + right) / 2, (top + bottom) / 2
    box = (centre_x - half, centre_y - half, centre_x + half, centre_y + half)
    square = rgba.crop(box).resize((size, size), Image.Resampling.LANCZOS)
    values = np.asarray(square, dtype=np.float32) / 255
    black = (values[..., :3] * values[..., 3:] * 255).astype(np.uint8)
    return torch.from_numpy(black.astype(np.float32) / 255).permute(2, 0, 1).contiguous()


def _cut_out(source: ImageSource, foreground: str, label: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The picture as 8-bit RGBA, its alpha that of the object."""
    read = read_image(source)
    # A handful of transparent pixels (rounded corners of a screenshot) is not a cut-out.
    if foreground == "alpha" or (foreground == "auto" and read.has_alpha and (read.rgba[..., 3] < 0.5).mean() > 0.002):
        return to_pil(read.rgba), ()
    picture = to_pil(read.rgba).convert("RGB")
    scale = min(1.0, MAX_SIDE_PX / max(picture.size))
    if scale < 1:
        picture = picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)
    rgba = read_image(picture).rgba
    cut = extract_foreground(rgba, has_alpha=False, method=foreground, label=label)
    return to_pil(cut.rgba), cut.warnings


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_VIEWS:
        raise TriptychError(f"{count} pictures were given: give one to {MAX_VIEWS}")
