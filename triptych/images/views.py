"""Pictures of one object from known sides -> a prepared view set.

The rig is orthographic at elevation 0 (see `geometry.cameras`), which gives two exact facts to prepare by. The centre
of an object's bounding box projects to the centre of each silhouette's bounding box, so each view is centred by its
own box. And every view has the same height, so views of different sizes and croppings are brought to one
scale by their heights. Then the largest extent over the set fills FRAME_FILL of the frame.

For photographs, which are neither orthographic nor exactly level, both are good approximations; how well the widths of
opposite views agree is measured and reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from ..errors import TriptychError
from ..geometry.cameras import FRAME_FILL, VIEW_AZIMUTHS_DEG, VIEW_NAMES, Camera, rig_cameras
from .files import ImageSource, read_image, resize_premultiplied
from .foreground import FAINT_ALPHA, Foreground, alpha_box, extract_foreground

MAX_VIEWS = 4
WIDTH_DISAGREEMENT = 0.10
_SNAP_PX = 0.3  # a view that would move by less is left as it is, bit for bit

ViewKey = str | float | int


@dataclass(frozen=True, eq=False)
class ViewSet:
    """Prepared views of one object, in rising azimuth.

    images: (V, 4, S, S) float32 sRGB straight alpha 0-1; object centred, one scale; colours continue into transparent
        pixels, so that bilinear samples near the edge do not darken.
    azimuths_deg: one per view in [0, 360): front 0, left (the subject's) 90, back 180, right 270.
    warnings: sentences for the user.
    generated: azimuths of the views that a model drew.
    """

    images: torch.Tensor
    azimuths_deg: tuple[float, ...]
    warnings: tuple[str, ...] = ()
    generated: tuple[float, ...] = ()

    @classmethod
    def from_rig_renders(cls, rgba: torch.Tensor, azimuths_deg: Iterable[float]) -> ViewSet:
        """Views that were rendered by the rig, taken as they are: (V, 4, S, S) float 0-1, V azimuths in degrees.

        Raises TriptychError on a wrong shape, range or number of views, doubled azimuths, and empty views.
        """
        azimuths = tuple(azimuth_of(azimuth) for azimuth in azimuths_deg)
        if rgba.ndim != 4 or rgba.shape[1] != 4 or rgba.shape[2] != rgba.shape[3]:
            raise TriptychError(f"prepared views must be (V, 4, S, S), got shape {tuple(rgba.shape)}")
        if len(azimuths) != rgba.shape[0]:
            raise TriptychError(f"{rgba.shape[0]} views need as many azimuths, got {len(azimuths)}")
        _check_azimuths(azimuths)
        if not torch.isfinite(rgba).all() or rgba.min() < -1e-3 or rgba.max() > 1 + 1e-3:
            raise TriptychError("prepared views must hold finite values in 0-1")
        images = rgba.detach().to(torch.float32).clamp(0, 1)
        for image, azimuth in zip(images, azimuths, strict=True):
            if not (image[3] > 0.5).any():
                raise TriptychError(f"the {view_name(azimuth)} view is empty; render the object into the frame")
        order = sorted(range(len(azimuths)), key=lambda i: azimuths[i])
        return cls(images[order].contiguous(), tuple(azimuths[i] for i in order))

    @property
    def count(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> int:
        """Side of the frame in pixels."""
        return self.images.shape[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """front, left, back, right; other azimuths as numbers, such as "45"."""
        return tuple(view_name(azimuth) for azimuth in self.azimuths_deg)

    @property
    def cameras(self) -> list[Camera]:
        """The rig's camera of each view."""
        return rig_cameras(self.azimuths_deg)

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """The images by name, each (S, S, 4) float32."""
        return dict(zip(self.names, self.images.permute(0, 2, 3, 1).contiguous().numpy(), strict=True))

    @property
    def rgba(self) -> torch.Tensor:
        """(V, 4, S, S) float32, the images."""
        return self.images

    @property
    def masks(self) -> torch.Tensor:
        """(V, S, S) float32, the alphas."""
        return self.images[:, 3]

    @property
    def seen(self) -> ViewSet:
        """The views that were given: all but the generated ones, or all of a set where every view is generated."""
        given = tuple(azimuth for azimuth in self.azimuths_deg if azimuth not in self.generated)
        return self.subset(given) if given and self.generated else self

    def subset(self, names: Iterable[ViewKey]) -> ViewSet:
        """The views of these names or azimuths, unchanged: the scale stays that of the whole set.

        Raises TriptychError for a view that the set lacks, and for none at all.
        """
        wanted = [azimuth_of(name) for name in names]
        _check_azimuths(tuple(wanted))
        missing = [view_name(azimuth) for azimuth in wanted if azimuth not in self.azimuths_deg]
        if missing:
            raise TriptychError(f"the set has no {', '.join(missing)} view; it has {', '.join(self.names)}")
        rows = [i for i, azimuth in enumerate(self.azimuths_deg) if azimuth in wanted]
        kept = tuple(self.azimuths_deg[i] for i in rows)
        generated = tuple(azimuth for azimuth in self.generated if azimuth in kept)
        return replace(self, images=self.images[rows], azimuths_deg=kept, generated=generated)


def azimuth_of(key: ViewKey) -> float:
    """A view's name or its azimuth in degrees -> degrees in [0, 360). Raises TriptychError for an unknown name."""
    if isinstance(key, str):
        if key.strip().lower() not in VIEW_NAMES:
            raise TriptychError(f"unknown view {key!r}; views are {', '.join(VIEW_NAMES)}, or azimuths in degrees")
        return VIEW_AZIMUTHS_DEG[VIEW_NAMES.index(key.strip().lower())]
    if not np.isfinite(key):
        raise TriptychError(f"an azimuth must be a finite number of degrees, got {key}")
    return round(float(key) % 360.0, 6) % 360.0


def view_name(azimuth_deg: float) -> str:
    """0 -> front, 90 -> left, 180 -> back, 270 -> right, others as the number."""
    if azimuth_deg in VIEW_AZIMUTHS_DEG:
        return VIEW_NAMES[VIEW_AZIMUTHS_DEG.index(azimuth_deg)]
    return f"{azimuth_deg:g}"


def prepare_views(sources: Mapping[ViewKey, ImageSource], *, size: int = 256, foreground: str = "auto") -> ViewSet:
    """One to four pictures of an object -> a view set.

    sources: view name (front, left, back, right: the subject's sides) or azimuth in degrees -> a path, a PIL image, or
        an array (H, W, 3|4). Sizes and croppings may differ. size: side of the frame in pixels, 16-4096.
    foreground: "auto", "alpha", "plain" or "matting", see `extract_foreground`.
    A prepared set, prepared again, is unchanged. Raises TriptychError: no views, more than four, a doubled or unknown
    view, and whatever reading and cutting out raise.
    """
    if not 16 <= size <= 4096:
        raise TriptychError(f"the size of a view must be 16-4096 pixels, got {size}")
    azimuths = tuple(azimuth_of(key) for key in sources)
    _check_azimuths(azimuths)
    order = sorted(range(len(azimuths)), key=lambda i: azimuths[i])
    azimuths, pictures = tuple(azimuths[i] for i in order), [list(sources.values())[i] for i in order]
    cut: list[Foreground] = []
    notes: list[str] = []
    for azimuth, picture in zip(azimuths, pictures, strict=True):
        # Four times the frame leaves antialiasing nothing to gain from more, and a phone photo costs no gigabyte.
        read = read_image(picture, max_side=max(1024, 4 * size))
        label = f"the {view_name(azimuth)} view"
        found = extract_foreground(read.rgba, has_alpha=read.has_alpha, method=foreground, label=label)
        cut.append(found)
        notes += found.warnings
    frames, boxes = _fit_set([found.rgba for found in cut], [found.box for found in cut], size)
    notes += _compare_opposites(azimuths, boxes)
    images = np.stack([bleed(frame).transpose(2, 0, 1) for frame in frames])
    return ViewSet(torch.from_numpy(np.ascontiguousarray(images)), azimuths, tuple(notes))


def bleed(rgba: np.ndarray) -> np.ndarray:
    """Continues the object's colour into transparent pixels: each takes its nearest solid pixel's. (H, W, 4)."""
    alpha = rgba[..., 3]
    solid = alpha >= min(0.5, float(alpha.max()))
    rows, columns = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
    nearest = rgba[rows, columns, :3]
    # a colour that was divided by a tiny alpha is noise
    return np.concatenate(
        [np.where(alpha[..., None] <= FAINT_ALPHA, nearest, rgba[..., :3]), alpha[..., None]], axis=-1
    )


def _check_azimuths(azimuths: tuple[float, ...]) -> None:
    if not azimuths:
        raise TriptychError("there are no views; give at least the front view")
    if len(azimuths) > MAX_VIEWS:
        raise TriptychError(f"{len(azimuths)} views were given, at most {MAX_VIEWS} can be used; leave some out")
    doubled = [azimuth for azimuth in azimuths if azimuths.count(azimuth) > 1]
    if doubled:
        raise TriptychError(f"the {view_name(doubled[0])} view (azimuth {doubled[0]:g}) is given twice; give it once")


Box = tuple[float, float, float, float]


def _fit_set(cut: list[np.ndarray], boxes: list[Box], size: int) -> tuple[list[np.ndarray], list[Box]]:
    """Frames (size, size, 4) and the silhouettes' boxes in them, for cut-outs with boxes in their own pixels.

    Resampling moves the 0.5 level of a pointed tip. So boxes are measured again in the frame, mapped
    back, and the fit is repeated: what counts is the size the views have in the end.
    """
    for _ in range(3):
        scales = _scales(boxes, size)
        frames = [_place(image, box, scale, size) for image, box, scale in zip(cut, boxes, scales, strict=True)]
        measured = [alpha_box(frame[..., 3]) for frame in frames]
        if all(_is_fitted(box, scale, size) for box, scale in zip(measured, _scales(measured, size), strict=True)):
            break
        boxes = [
            _back_to_source(new, old, scale, size) for new, old, scale in zip(measured, boxes, scales, strict=True)
        ]
    return frames, measured


def _scales(boxes: list[Box], size: int) -> list[float]:
    """Frame pixels per source pixel, per view: equal heights, and the set's largest extent fills FRAME_FILL."""
    heights = [bottom - top for _, top, _, bottom in boxes]
    widths = [(right - left) / height for (left, _, right, _), height in zip(boxes, heights, strict=True)]
    return [FRAME_FILL * size / max(1.0, *widths) / height for height in heights]


def _is_fitted(box: Box, scale: float, size: int) -> bool:
    """Whether scaling about the box's centre and centring would move every side of the box by less than _SNAP_PX."""
    left, top, right, bottom = box
    moves = [abs((a + b) / 2 - size / 2) + abs(scale - 1) * (b - a) / 2 for a, b in ((left, right), (top, bottom))]
    return max(moves) < _SNAP_PX


def _place(image: np.ndarray, box: Box, scale: float, size: int) -> np.ndarray:
    """The square around the box's centre that becomes the frame, resampled to (size, size, 4)."""
    if image.shape[:2] == (size, size) and _is_fitted(box, scale, size):
        return image
    return place_view(image, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), scale, size)


def place_view(image: np.ndarray, centre: tuple[float, float], scale: float, size: int) -> np.ndarray:
    """A picture (H, W, 4) resampled to a frame (size, size, 4): ``centre``, its column and row in pixels, becomes the
    frame's middle, and each of its pixels ``scale`` of the frame's."""
    half = size / scale / 2
    centre_x, centre_y = centre
    left, top = int(np.floor(centre_x - half)), int(np.floor(centre_y - half))
    side = int(np.ceil(2 * half)) + 2
    window = np.zeros((side, side, 4), dtype=np.float32)
    rows = slice(max(0, top), min(image.shape[0], top + side))
    columns = slice(max(0, left), min(image.shape[1], left + side))
    window[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = image[rows, columns]
    x, y = centre_x - half - left, centre_y - half - top
    frame = resize_premultiplied(window, size, size, (x, y, x + 2 * half, y + 2 * half))
    frame[..., 3] *= frame[..., 3] > FAINT_ALPHA
    return frame


def _back_to_source(measured: Box, box: Box, scale: float, size: int) -> Box:
    centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    left, top, right, bottom = ((value - size / 2) / scale for value in measured)
    return centre_x + left, centre_y + top, centre_x + right, centre_y + bottom


def _compare_opposites(azimuths: tuple[float, ...], boxes: list[Box]) -> list[str]:
    """Opposite views of one object are equally wide."""
    width_px = {azimuth: right - left for azimuth, (left, _, right, _) in zip(azimuths, boxes, strict=True)}
    notes: list[str] = []
    for azimuth, width in width_px.items():
        other = width_px.get(azimuth + 180.0)
        if other is not None and abs(width - other) > WIDTH_DISAGREEMENT * max(width, other):
            notes.append(
                f"the {view_name(azimuth)} view is {width:.0f} pixels wide at the common height, the "
                f"{view_name(azimuth + 180.0)} view {other:.0f}: they should be equal; check that both show the whole "
                "object from opposite sides"
            )
    return notes
