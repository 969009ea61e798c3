"""A generated view sheet -> four cut-out views, and what is wrong with them.

The background's colour is known: the model was taught it. Where it is saturated (magenta), a pixel's share of
background is how far its key channels stand above the others, the difference matte of Vlahos; a blurred edge of a small
model is a mixture of object and key, so it gives a soft alpha by itself. The object may have a share of the key's hue
of its own (purple), so that counts only near the outline, and against what the nearest inside has, and background
begins half-way between the object's usual share and the key. White and other plain backgrounds go through
`images.foreground`, which has to look for edges.

Not covered: objects of the key's own colour, shadows, glass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..errors import TriptychError
from ..geometry.cameras import VIEW_NAMES
from ..images.foreground import FAINT_ALPHA, MIN_SIDE_PX, alpha_box, extract_foreground

if TYPE_CHECKING:
    from .card import ViewsCard

SPECK_SHARE = 0.03  # of the largest part; smaller ones are the model's noise
BODY_SHARE = 0.15  # of the largest part; two such parts far apart are two bodies
BODY_GAP = 0.06  # of the panel's side
HEIGHT_DISAGREEMENT = 0.15
_HEIGHT_NOISE = 0.04  # of the panel's side: what is flat may differ by this much
_MIXED_MOST = 0.5  # the most that is taken out of a colour
_OWN_QUANTILE, _OWN_MOST = 0.3, 0.6  # of an object's own share
_UNKEYED = 0.1
_HOLE_SHARE = 0.004  # of the silhouette; a look through the object is larger than that, and shows the pure key
_PURE = 0.8
_EDGE_SHARE = 0.025  # of the panel's side: how far a blurred edge reaches
_TOLERANCE = 0.08  # about what a plain background varies by, per channel
_EIGHT = np.ones((3, 3), dtype=bool)


def sheet_to_views(
    sheet: Tensor | np.ndarray, background: Sequence[float], *, soft: bool = False
) -> dict[str, np.ndarray]:
    """A 2 x 2 sheet -> front, left, back, right, each (S, S, 4) float32 sRGB straight alpha 0-1, free of background.

    sheet: (3, 2S, 2S) float 0-1 sRGB. background: the colour that the model paints around the object, sRGB 0-1. A panel
    without an object is transparent; one without background is opaque: `check_views` speaks of both. soft: of a small
    model, which is unsure of outlines and so mixes a key colour into whole parts: what exceeds the object's own share
    of it is taken out of them too. Raises TriptychError for another shape.
    """
    pixels = np.asarray(sheet.detach().float().cpu() if isinstance(sheet, Tensor) else sheet, dtype=np.float32)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.shape[1] != pixels.shape[2] or pixels.shape[1] % 2:
        raise TriptychError(f"a view sheet must be (3, 2S, 2S), got shape {tuple(pixels.shape)}")
    rgb = np.clip(np.nan_to_num(pixels), 0, 1).transpose(1, 2, 0)
    cells = [cell for half in np.split(rgb, 2, axis=0) for cell in np.split(half, 2, axis=1)]
    views = {name: cut_panel(cell, background) for name, cell in zip(VIEW_NAMES, cells, strict=True)}
    key = np.asarray(background, dtype=np.float32)
    if soft and _is_saturated(key):
        own = own_key_share(cells, key)
        for rgba in views.values():
            rgba[..., :3] = _unmixed(rgba[..., :3], key, own)
    return views


def with_mirror_images(views: Tensor) -> Tensor:
    """(V, ..., S) pictures -> (2 V, ..., S): each followed by itself with left and right exchanged."""
    return torch.stack([views, views.flip(-1)], dim=1).flatten(0, 1)


def cut_sheet(sheet: Tensor | np.ndarray, card: ViewsCard) -> dict[str, np.ndarray]:
    """`sheet_to_views` of what a model with this card has drawn; one that knows few words is a small, soft one."""
    return sheet_to_views(sheet, card.background, soft=card.vocabulary is not None)


def cut_panel(rgb: np.ndarray, background: Sequence[float]) -> np.ndarray:
    """One panel, (S, S, 3) float32 sRGB 0-1, without its background: (S, S, 4)."""
    key = np.asarray(background, dtype=np.float32)
    return _cut_key(rgb, key) if _is_saturated(key) else _cut_plain(rgb, key)


def check_views(views: Mapping[str, np.ndarray], names: Iterable[str] = VIEW_NAMES) -> list[str]:
    """What is wrong with these of the views (S, S, 4), one sentence each that names the panel; none is well."""
    panels = {name: views[name] for name in names}
    complaints = [note for name, rgba in panels.items() for note in check_panel(rgba, f"the {name} panel")]
    heights = {name: _box_height(rgba) / len(rgba) for name, rgba in panels.items() if not is_empty(rgba)}
    low, high = min(heights.values(), default=0.0), max(heights.values(), default=0.0)
    if high - low > max(HEIGHT_DISAGREEMENT * high, _HEIGHT_NOISE):
        listed = ", ".join(f"{name} {height:.0%}" for name, height in heights.items())
        odd = _odd_one(heights)
        complaints.append(
            f"the panels show views of different size: the object's height is {listed} of the panel, {odd} differs most"
        )
    return complaints


def grouped(complaints: Iterable[str]) -> list[str]:
    """Sentences of `check_views`, where those that say the same of several panels become one."""
    panels: dict[str, list[str]] = {}
    for complaint in complaints:
        found = re.match(r"the (\w+) panel(: .*| is empty)$", complaint)
        panels.setdefault(found[2] if found else complaint, []).extend([found[1]] if found else [])
    sentences = []
    for what, names in panels.items():
        listed = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)
        many = f"the {listed} panels{what.replace(' is empty', ' are empty')}"
        sentences.append(what if not names else many if len(names) > 1 else f"the {listed} panel{what}")
    return sentences


def check_panel(rgba: np.ndarray, label: str = "the panel") -> list[str]:
    """Whether a cut-out view (S, S, 4) is empty, cut off at the border, or not one object: sentences, none is well."""
    if is_empty(rgba):
        return [f"{label} is empty"]
    alpha, complaints = rgba[..., 3], []
    rims = {"left": alpha[:, 0], "top": alpha[0], "right": alpha[:, -1], "bottom": alpha[-1]}
    cut = [side for side, rim in rims.items() if (rim > 0.5).any()]
    if cut:
        where = "border all around" if len(cut) == 4 else f"{' and '.join(cut)} border"
        complaints.append(f"{label}: the object touches the {where}, so it is cut off")
    bodies = _far_apart_bodies(alpha)
    if bodies > 1:
        complaints.append(f"{label}: not one object but {bodies} that lie apart")
    return complaints


def is_empty(rgba: np.ndarray) -> bool:
    """Nothing, or too little to be prepared as a view."""
    if not (rgba[..., 3] > 0.5).any():
        return True
    left, top, right, bottom = alpha_box(rgba[..., 3])
    return max(right - left, bottom - top) < max(MIN_SIDE_PX, len(rgba) / 16)


def _box_height(rgba: np.ndarray) -> float:
    _, top, _, bottom = alpha_box(rgba[..., 3])
    return bottom - top


def _odd_one(heights: Mapping[str, float]) -> str:
    middle = float(np.median(list(heights.values())))
    return max(heights, key=lambda name: abs(heights[name] - middle))


def _far_apart_bodies(alpha: np.ndarray) -> int:
    """Parts of a good size with more than BODY_GAP between them."""
    solid = alpha > 0.5
    reach = BODY_GAP * len(alpha) / 2
    joined, count = ndimage.label(ndimage.distance_transform_edt(~solid) <= reach, _EIGHT)
    areas = ndimage.sum_labels(solid, joined, np.arange(1, count + 1))
    return int((areas >= BODY_SHARE * areas.max()).sum())


# --- a saturated key colour ----------------------------------------------------------------------------------------


def _is_saturated(key: np.ndarray) -> bool:
    """Whether some channels are near one and the others near zero, as in magenta or green."""
    return bool(((key >= 0.75) | (key <= 0.25)).all() and (key >= 0.75).any() and (key <= 0.25).any())


def key_share(rgb: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(..., 3) -> (...): how far the key's channels stand above the others; 1 for the key itself, below 0 for hues
    opposite to it."""
    high = key >= 0.75
    excess = rgb[..., high].min(axis=-1) - rgb[..., ~high].max(axis=-1)
    return np.minimum(excess / (key[high].min() - key[~high].max()), 1)


def own_key_share(pictures: Sequence[np.ndarray], key: np.ndarray) -> float:
    """How much of the key the object itself has, as seen in (H, W, 3) pictures of it on the key: 0 to _OWN_MOST. Purple
    has half of magenta's."""
    return _usual_share(np.concatenate([_deep_shares(key_share(rgb, key)) for rgb in pictures]))


def _deep_shares(share: np.ndarray) -> np.ndarray:
    """Of a picture's shares (H, W) those inside of the object, away from its blurred edge: (N,)."""
    return share[_depth_px(share < _boundary(_OWN_MOST)) > _edge_px(len(share))]


def _usual_share(shares: np.ndarray) -> float:
    """Of an object's pixels (N,), those left out that cannot be told from the key; 0 to _OWN_MOST."""
    own = shares[shares < _boundary(_OWN_MOST)]
    return float(np.clip(np.quantile(own, _OWN_QUANTILE), 0, _OWN_MOST)) if len(own) else 0.0


def lost_in_key(rgba: np.ndarray, background: Sequence[float]) -> float:
    """The share of an object, (..., 4) straight alpha, that has the key's own colour and would be taken for background;
    0 for backgrounds that are no key."""
    key = np.asarray(background, dtype=np.float32)
    solid = rgba[..., 3] > 0.9
    if not _is_saturated(key) or not solid.any():
        return 0.0
    shares = key_share(rgba[..., :3][solid], key)
    return float((shares > _boundary(_usual_share(shares))).mean())


def _boundary(own: float) -> float:
    """The share from which a pixel is background: half-way from the object's own to the key."""
    return (1 + own) / 2


def _edge_px(side: int) -> float:
    return max(2.0, _EDGE_SHARE * side)


def _depth_px(region: np.ndarray) -> np.ndarray:
    """How far the pixels of a region (H, W) lie inside of it; it goes on beyond the picture's border."""
    return np.asarray(ndimage.distance_transform_edt(np.pad(region, 1, constant_values=True)))[1:-1, 1:-1]


def _cut_key(rgb: np.ndarray, key: np.ndarray) -> np.ndarray:
    share = key_share(rgb, key)
    outside = _background_region(share, _boundary(_usual_share(_deep_shares(share))))
    if outside.all():
        return np.zeros((*rgb.shape[:2], 4), dtype=np.float32)
    edge_px, depth = _edge_px(len(rgb)), _depth_px(~outside)
    # What is deep inside shows the object's own colour; of thin parts, what is hardly keyed and least of all around.
    least = (share < _UNKEYED) & (share <= ndimage.minimum_filter(share, 5) + 0.02)
    rows, columns = _nearest(~outside & ((depth > edge_px) | least), share)
    own_share, colour = np.minimum(share[rows, columns], _OWN_MOST), rgb[rows, columns]

    near = depth <= edge_px
    beyond = ndimage.distance_transform_edt(outside)
    mixed = np.where(near, np.clip((1 - share) / (1 - own_share), 0, 1), 1.0)
    rgb_clean = _despill(rgb, key, mixed, own_share, colour)
    # a decoder's noise leaves a few per cent of either in pure key and pure object
    alpha = np.clip((mixed - 0.06) / 0.88, 0, 1) * (beyond <= edge_px)
    out = np.concatenate([np.where(near[..., None], rgb_clean, rgb), alpha[..., None]], axis=-1)
    return out.astype(np.float32)


def _background_region(share: np.ndarray, keyed: float) -> np.ndarray:
    """(H, W) bool: the key around the object, and through it where a hole is large and pure; specks belong to it.
    keyed: the share from which a pixel is background."""
    labels, count = ndimage.label(np.pad(share > keyed, 1, constant_values=True))
    outside = (labels == labels[0, 0])[1:-1, 1:-1]
    labels = labels[1:-1, 1:-1]
    index = np.arange(1, count + 1)
    areas = ndimage.sum_labels(share > keyed, labels, index)
    purest = ndimage.maximum(share, labels, index)
    wide = areas >= max(4.0, _HOLE_SHARE * np.count_nonzero(~outside))
    holes = wide & (np.asarray(purest) >= _PURE)
    outside = outside | np.concatenate([[False], holes])[labels]
    parts, count = ndimage.label(~outside, _EIGHT)
    if count:
        areas = ndimage.sum_labels(~outside, parts, np.arange(1, count + 1))
        specks = areas < SPECK_SHARE * areas.max()
        outside = outside | np.concatenate([[False], specks])[parts]
    return outside


def _nearest(mask: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the nearest pixel in the mask, (H, W) each; of the least keyed one when the mask is empty."""
    if not mask.any():
        mask = share == share.min()
    rows, columns = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return rows, columns


def _unmixed(rgb: np.ndarray, key: np.ndarray, own: float) -> np.ndarray:
    """Colours (..., 3) less the key that is mixed into them, up to half: what exceeds the object's own share."""
    mixed = np.clip((key_share(rgb, key) - own) / (1 - own), 0, _MIXED_MOST)[..., None]
    return np.clip((rgb - mixed * key) / (1 - mixed), 0, 1)


def _despill(
    rgb: np.ndarray, key: np.ndarray, alpha: np.ndarray, own_share: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    """The object's own colour where the key shines through: unmixed, and no more of the key's hue than the inside."""
    weight = alpha[..., None]
    unmixed = np.clip((rgb - (1 - weight) * key) / np.maximum(weight, 0.05), 0, 1)
    clean = weight * unmixed + (1 - weight) * inside
    high = key >= 0.75
    spill = np.maximum(key_share(clean, key) - own_share, 0) * (key[high].min() - key[~high].max())
    clean[..., high] -= np.where(alpha < 1, spill, 0)[..., None]
    return np.clip(clean, 0, 1)


# --- white and other plain backgrounds -----------------------------------------------------------------------------


def _cut_plain(rgb: np.ndarray, background: np.ndarray) -> np.ndarray:
    rgba = np.concatenate([rgb, np.ones_like(rgb[..., :1])], axis=-1)
    differs = np.abs(rgb - background).max(axis=-1) > _TOLERANCE
    if not differs.any():
        return np.zeros_like(rgba)
    try:
        found = extract_foreground(rgba, has_alpha=False, method="plain").rgba
    except TriptychError:  # nothing large enough, or a border that is not background: the checks will say so
        alpha = _without_outer_background(differs).astype(np.float32)
        return np.concatenate([rgb, alpha[..., None]], axis=-1)
    return np.concatenate([found[..., :3], np.where(found[..., 3:] > FAINT_ALPHA, found[..., 3:], 0)], axis=-1)


def _without_outer_background(differs: np.ndarray) -> np.ndarray:
    """Everything but the plain region that is connected with the border, (H, W) bool."""
    labels, _ = ndimage.label(~differs)
    rim = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    return ~np.isin(labels, rim[rim > 0])
