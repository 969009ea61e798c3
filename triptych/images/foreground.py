"""The object of a picture, cut out of its background.

Three ways, one result. `alpha`: the picture's own. `plain`: a background of one colour, or of one soft gradient.
`matting`: a neural matting model through rembg, an optional extra. `auto` takes the first that applies.

How `plain` works. The background is a plane of colour fitted to the border ring in sRGB, with outliers trimmed. If it
does not explain the ring within PLAIN_TOLERANCE, the background is not plain. What is within a small tolerance of it
AND connected with the border is background; white inside a white cup stays. JPEG rings around edges: where the
background beside the object is noisy, the tolerance follows the contrast of the edge. An enclosed region goes too when
it is a look through the object, such as a mug's handle: it has the background's colour as exactly as the background
itself, its edge is a sharp step, and it is small against the outline. A highlight fades into its surroundings; the
inside of an outlined white object is most of the outline. A sharp, flat patch painted in exactly the background's
colour cannot be told from a hole: its removal is reported. Soft shadows under the object are taken away where they
are a darker background without an edge. Last, pixels near the cut are unmixed into foreground and background,
``C = a F + (1 - a) B`` with F from the nearest inner pixels.

Not covered: coloured light that the background throws on the object, glass, hair on anything but a matting model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..errors import TriptychError

METHODS = ("auto", "alpha", "plain", "matting")
PLAIN_TOLERANCE = 0.04  # distance in luma_chroma; JPEG noise on a flat colour stays below half of it
PLAIN_SHARE = 0.75  # of the border ring must agree; the object may cross the rest
SPECK_SHARE = 0.01
FAINT_ALPHA = 0.02  # at and below, a pixel is empty
MIN_SIDE_PX = 16
SMALL_SIDE_PX = 64
_EDGE_PX = 3  # how far from the cut mixed pixels are looked for
_DUST_PX = 8  # smaller specks are not worth a sentence
_SHADOW_DEPTHS = np.arange(0.02, 0.42, 0.02)  # of the background's luma
_EIGHT = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class Foreground:
    """rgba: (H, W, 4) float32 sRGB straight alpha 0-1, colours free of background. method: what was used.
    box: left, top, right, bottom of the alpha's 0.5 level, pixels with fractions. warnings: sentences for the user."""

    rgba: np.ndarray
    method: str
    box: tuple[float, float, float, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PlainBackground:
    """colour: (H, W, 3) float32 sRGB. noise: distance that 95 % of the agreeing ring stays below.
    share: of the border ring that agrees within PLAIN_TOLERANCE, 0-1."""

    colour: np.ndarray
    noise: float
    share: float


def extract_foreground(
    rgba: np.ndarray, *, has_alpha: bool | None = None, method: str = "auto", label: str = "the picture"
) -> Foreground:
    """Cuts the object out.

    rgba: (H, W, 4) float32 sRGB straight alpha 0-1, as `read_image` gives it.
    has_alpha: taken from the picture if None. method: "auto", "alpha", "plain" or "matting".
    label: how sentences call the picture.
    Raises TriptychError: fully transparent, nothing found, an object under 16 pixels, background not plain and no
    matting model, unknown method.
    """
    if method not in METHODS:
        raise TriptychError(f"unknown foreground method {method!r}; choose one of {', '.join(METHODS)}")
    alpha = rgba[..., 3]
    has_alpha = bool((alpha < 1).any()) if has_alpha is None else has_alpha
    if has_alpha and not (alpha > 0.5).any():
        raise TriptychError(f"{label} is fully transparent; give a picture that shows the object")
    notes: list[str] = []
    # A handful of transparent pixels (rounded corners of a screenshot) is not a cut-out.
    if method == "alpha" or (method == "auto" and has_alpha and (alpha < 0.5).mean() > 0.002):
        cut, used = rgba, "alpha"
        matte = mask_from_alpha(rgba)
    elif method == "matting":
        cut, used = mask_with_matting(rgba[..., :3], label), "matting"
        matte = cut[..., 3]
    else:
        background = fit_plain_background(rgba[..., :3])
        if background.share >= PLAIN_SHARE:
            cut, found = _cut_plain(rgba[..., :3], background)
            notes += [f"{label}: {note}" for note in found]
            used = "plain"
        elif method == "auto" and matting_available():
            cut, used = mask_with_matting(rgba[..., :3], label), "matting"
        else:
            raise TriptychError(_not_plain(label, background.share))
        matte = cut[..., 3]
    matte, found = _keep_large_parts(matte)
    notes += [f"{label}: {note}" for note in found]
    if not (matte > 0.5).any():
        raise TriptychError(f"no object was found in {label}; give a picture whose object differs from its background")
    box = alpha_box(matte)
    notes += _judge_box(box, matte, label)
    return Foreground(np.concatenate([cut[..., :3], matte[..., None]], -1).astype(np.float32), used, box, tuple(notes))


def mask_from_alpha(rgba: np.ndarray) -> np.ndarray:
    """The picture's own alpha, (H, W) float32 0-1. rgba: (H, W, 4)."""
    return rgba[..., 3].astype(np.float32)


def mask_from_plain_background(rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 sRGB on a plain background -> (H, W, 4): colour without background, and a soft alpha.

    Raises TriptychError when the border ring is not plain.
    """
    background = fit_plain_background(rgb)
    if background.share < PLAIN_SHARE:
        raise TriptychError(_not_plain("the picture", background.share))
    return _cut_plain(rgb, background)[0]


def alpha_box(alpha: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the region alpha > 0.5 in pixels, to a fraction of a pixel.

    An edge lies where the largest alpha per column (row), linear between pixel centres, crosses 0.5: on the pixel's
    outer border for a hard mask. alpha: (H, W), at least one pixel above 0.5.
    """
    left, right = _profile_edges(alpha.max(axis=0))
    top, bottom = _profile_edges(alpha.max(axis=1))
    return left, top, right, bottom


def _profile_edges(profile: np.ndarray) -> tuple[float, float]:
    padded = np.concatenate([[0.0], profile, [0.0]])
    inside = np.flatnonzero(padded > 0.5)
    first, last = int(inside[0]), int(inside[-1])
    # padded index i is the centre at i - 0.5
    low = first - 1 + (0.5 - padded[first - 1]) / (padded[first] - padded[first - 1])
    high = last + (padded[last] - 0.5) / (padded[last] - padded[last + 1])
    return float(low - 0.5), float(high - 0.5)


# --- plain backgrounds ---------------------------------------------------------------------------------------------


def luma_chroma(rgb: np.ndarray) -> np.ndarray:
    """sRGB (..., 3) 0-1 -> luma and half-weight chroma differences (..., 3), the space of `distance` here.

    Gamma-encoded luma is near enough to even lightness steps, and unlike CIE and OK Lab it does not blow up noise in
    black. Chroma counts half (of JPEG's Cb and Cr, BT.601), because compression blurs it.
    """
    luma = rgb @ np.array([0.299, 0.587, 0.114], dtype=rgb.dtype)
    blue, red = (rgb[..., 2] - luma) * 0.564, (rgb[..., 0] - luma) * 0.713
    return np.stack([luma, blue, red], axis=-1) * np.array([1, 0.7, 0.7], dtype=rgb.dtype)


def fit_plain_background(rgb: np.ndarray) -> PlainBackground:
    """Fits a plane of colour to the border ring, 2 % of the shorter side wide, trimming what disagrees.

    rgb: (H, W, 3) float32 sRGB 0-1.
    """
    height, width = rgb.shape[:2]
    ring_px = max(1, round(0.02 * min(height, width)))
    ring = np.ones((height, width), dtype=bool)
    ring[ring_px:-ring_px, ring_px:-ring_px] = False
    rows, columns = np.nonzero(ring)
    position = np.stack([np.ones(len(rows)), 2 * columns / width - 1, 2 * rows / height - 1], axis=1)
    samples = rgb[rows, columns].astype(np.float64)
    samples_yc = luma_chroma(samples)
    median_yc = np.median(samples_yc, axis=0)
    # the median picks a real colour of the ring, so that the space is never inverted
    start = samples[np.argmin(np.linalg.norm(samples_yc - median_yc, axis=1))]
    plane = np.stack([start, np.zeros(3), np.zeros(3)])
    distance = np.linalg.norm(samples_yc - luma_chroma(position @ plane), axis=1)
    for tolerance in (3 * PLAIN_TOLERANCE, 1.5 * PLAIN_TOLERANCE, PLAIN_TOLERANCE):
        agrees = distance < tolerance
        if agrees.mean() < 0.5:
            break
        plane = np.linalg.lstsq(position[agrees], samples[agrees], rcond=None)[0]
        distance = np.linalg.norm(samples_yc - luma_chroma(np.clip(position @ plane, 0, 1)), axis=1)
    agrees = distance < PLAIN_TOLERANCE
    noise = float(np.percentile(distance[agrees], 95)) if agrees.any() else PLAIN_TOLERANCE
    x, y = 2 * np.arange(width) / width - 1, 2 * np.arange(height) / height - 1
    colour = plane[0] + x[None, :, None] * plane[1] + y[:, None, None] * plane[2]
    return PlainBackground(np.clip(colour, 0, 1).astype(np.float32), noise, float(agrees.mean()))


def _cut_plain(rgb: np.ndarray, background: PlainBackground) -> tuple[np.ndarray, list[str]]:
    yc = luma_chroma(rgb)
    background_yc = luma_chroma(background.colour)
    distance = np.linalg.norm(yc - background_yc, axis=-1)
    outside = _flood(distance, background.noise)
    notes: list[str] = []
    outside, note = _without_shadow(outside, yc, background_yc, distance)
    notes += note
    holes, note = _enclosed_background(outside, distance, background.noise)
    notes += note
    if holes.any():
        outside = outside | _flood(distance, background.noise, holes)
    return _unmix(rgb, background.colour, distance, outside), notes


def _flood(distance: np.ndarray, noise: float, holes: np.ndarray | None = None) -> np.ndarray:
    """Background connected with the border, or with the holes already found, (H, W) bool."""
    base = float(np.clip(2.5 * noise, 0.016, 0.05))
    away = ndimage.distance_transform_edt(distance < base)
    beside = distance[(away > 2) & (away <= 8)]
    if beside.size == 0 or (beside > 0.003).mean() < 0.05:
        return _connected(distance < base, holes)
    # JPEG rings within its 8-pixel blocks, by a share of the edge's step; what then is left of it is faint and thin
    step = ndimage.maximum_filter(distance, 17)
    outside = _connected(distance < np.clip(0.13 * step, base, 0.11), holes)
    body = ndimage.binary_opening(np.pad(~outside, 2, mode="edge"), _EIGHT, iterations=2)[2:-2, 2:-2]
    outside = _connected(outside | (~body & (distance < np.minimum(0.25 * step, 0.15))), holes)
    return outside | _faint_specks(outside, distance)


def _connected(mask: np.ndarray, seeds: np.ndarray | None = None) -> np.ndarray:
    """The part of mask (H, W) bool that is connected with the picture's border or with a seed."""
    # A frame of background around the picture joins all border pixels into one region.
    labels, count = ndimage.label(np.pad(mask, 1, constant_values=True))
    chosen = np.zeros(count + 1, dtype=bool)
    chosen[labels[0, 0]] = True
    if seeds is not None:
        chosen[np.unique(labels[1:-1, 1:-1][seeds & mask])] = True
    return chosen[labels[1:-1, 1:-1]]


def _faint_specks(outside: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Islands without contrast: compression noise that the flood went around, (H, W) bool."""
    labels, count = ndimage.label(~outside, _EIGHT)
    index = np.arange(1, count + 1)
    areas = ndimage.sum_labels(~outside, labels, index)
    contrast = ndimage.maximum(distance, labels, index)
    step = ndimage.maximum(ndimage.maximum_filter(distance, 17), labels, index)
    limit = np.maximum(0.12, 0.25 * np.asarray(step))
    faint = (areas < SPECK_SHARE * areas.max(initial=0)) & (np.asarray(contrast) < limit)
    return np.concatenate([[False], faint])[labels]


def _without_shadow(
    outside: np.ndarray, yc: np.ndarray, background_yc: np.ndarray, distance: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Grows the background over soft shadows: the background's hue, darker, and nowhere an edge."""
    drop = background_yc[..., 0] - yc[..., 0]
    ratio = yc[..., :1] / np.maximum(background_yc[..., :1], 1e-3)
    hue_error = np.linalg.norm(yc[..., 1:] - ratio * background_yc[..., 1:], axis=-1)
    slope = ndimage.gaussian_gradient_magnitude(distance, 1.0)
    # At an object's edge, however faint, the slope is half of the contrast or more; in a penumbra a quarter or less.
    calm = ndimage.minimum_filter((slope < 0.03) & (slope < 0.35 * distance + 0.005), 3)
    shadow = calm & (hue_error < 0.02) & (drop > 0)
    inside_rows = np.flatnonzero((~outside).any(axis=1))
    if len(inside_rows) == 0:
        return outside, []
    shadow[: (inside_rows[0] + inside_rows[-1]) // 2] = False  # things stand on their shadow
    object_px = np.count_nonzero(~outside)
    grown = outside
    for depth in _SHADOW_DEPTHS * background_yc[..., 0].mean():
        wider = _connected(grown | (shadow & (drop < depth)))
        # A shadow deepens step by step. A leap means that the flood broke into a grey part of the object.
        if np.count_nonzero(wider & ~grown) > 0.08 * object_px:
            break
        grown = wider
    added = np.count_nonzero(grown & ~outside)
    if not 0.02 * object_px < added < 0.5 * object_px:
        return outside, []
    return grown | _faint_specks(grown, distance), ["a soft shadow was removed"]


def _enclosed_background(outside: np.ndarray, distance: np.ndarray, noise: float) -> tuple[np.ndarray, list[str]]:
    """Looks through the object, (H, W) bool; the rule is in the module's text."""
    none = np.zeros_like(outside)
    exact = max(0.012, 1.5 * noise)
    labels, count = ndimage.label((distance < exact) & ~outside)
    if count == 0:
        return none, []
    silhouette_px = np.count_nonzero(~outside)
    index = np.arange(1, count + 1)
    areas = ndimage.sum_labels(np.ones_like(labels), labels, index)
    large = [int(i) for i, area in zip(index, areas, strict=True) if area >= max(12, 0.001 * silhouette_px)]
    slices = ndimage.find_objects(labels)
    holes = [i for i in large if _has_sharp_edge(labels, i, slices[i - 1], distance)]
    share = sum(areas[i - 1] for i in holes) / max(silhouette_px, 1)
    if not holes:
        return none, []
    if share > 0.5:
        return none, [f"background-coloured insides ({share:.0%} of the outline) were kept as part of the object"]
    text = "1 opening that shows" if len(holes) == 1 else f"{len(holes)} openings that show"
    return np.isin(labels, holes), [f"{text} the background ({share:.1%} of the outline) cut out of the object"]


def _has_sharp_edge(labels: np.ndarray, index: int, where: tuple[slice, slice], distance: np.ndarray) -> bool:
    """Whether the colour jumps at the region's edge, as at a hole, rather than fades, as around a highlight."""
    margin = 8
    window = tuple(slice(max(0, s.start - margin), s.stop + margin) for s in where)
    region, colour = labels[window] == index, distance[window]
    depth = ndimage.distance_transform_edt(~region)
    near, far = colour[(depth > 2) & (depth <= 3.5)], colour[(depth > 5) & (depth <= 7.5)]
    if near.size == 0 or far.size == 0:
        return False
    return bool(np.median(near) > 0.04 and np.median(near) > 0.65 * min(np.median(far), 0.4))


def _unmix(rgb: np.ndarray, background: np.ndarray, distance: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Soft alpha and background-free colour near the cut. outside: (H, W) bool. Returns (H, W, 4)."""
    depth = ndimage.distance_transform_edt(np.pad(~outside, 1, constant_values=True))[1:-1, 1:-1]
    band = (depth > 0) & (depth <= _EDGE_PX + 0.5)
    # partly covered pixels fainter than the flood's tolerance lie one pixel outside
    band |= outside & ndimage.binary_dilation(~outside, _EIGHT)
    alpha = np.where(outside, 0.0, 1.0)
    rows, columns = np.nonzero(band)
    if len(rows) == 0:
        return np.concatenate([rgb, alpha[..., None]], axis=-1).astype(np.float32)
    colour, behind = rgb[rows, columns].astype(np.float64), background[rows, columns].astype(np.float64)
    foreground = _inner_colour(rgb, distance, depth, rows, columns)
    towards = foreground - behind
    length = np.maximum((towards**2).sum(-1), 1e-6)
    mixed = np.clip(((colour - behind) * towards).sum(-1) / length, 0, 1)
    # compression ringing is a few per cent of the step: below and above that, alpha is 0 and 1
    mixed = np.clip((mixed - 0.05) / 0.9, 0, 1)
    unmixed = np.clip((colour - (1 - mixed[:, None]) * behind) / np.maximum(mixed[:, None], 0.05), 0, 1)
    clean = mixed[:, None] * unmixed + (1 - mixed[:, None]) * foreground
    alpha[rows, columns] = mixed
    out = np.concatenate([rgb, alpha[..., None]], axis=-1).astype(np.float32)
    out[rows, columns, :3] = clean
    return out


def _inner_colour(
    rgb: np.ndarray, distance: np.ndarray, depth: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """The foreground colour behind each pixel near the cut, (n, 3).

    The nearest pixel that is deep enough to be unmixed. Where the object is thinner than that, or only its rim
    contrasts (a dark outline around white), the most contrasting pixel of the neighbourhood instead.
    """
    deep = depth > _EDGE_PX
    reach = 2
    best = distance[rows, columns].copy()
    best_at = np.stack([rows, columns])
    for dr in range(-reach, reach + 1):
        for dc in range(-reach, reach + 1):
            r = np.clip(rows + dr, 0, distance.shape[0] - 1)
            c = np.clip(columns + dc, 0, distance.shape[1] - 1)
            better = distance[r, c] > best
            best[better] = distance[r, c][better]
            best_at[:, better] = np.stack([r, c])[:, better]
    contrasting = rgb[best_at[0], best_at[1]].astype(np.float64)
    if not deep.any():
        return contrasting
    gap, nearest = ndimage.distance_transform_edt(~deep, return_indices=True)
    at = nearest[:, rows, columns]
    use_deep = (gap[rows, columns] <= _EDGE_PX + 2.5) & (distance[at[0], at[1]] >= 0.5 * best)
    return np.where(use_deep[:, None], rgb[at[0], at[1]].astype(np.float64), contrasting)


# --- matting ---------------------------------------------------------------------------------------------------------


def matting_available() -> bool:
    """Whether the matting extra is installed (its model may still have to be downloaded)."""
    from importlib.util import find_spec

    try:
        return find_spec("rembg") is not None
    except ValueError:  # a module without a spec was put in sys.modules
        return True


def mask_with_matting(rgb: np.ndarray, label: str = "the picture") -> np.ndarray:
    """(H, W, 3) float32 sRGB -> (H, W, 4) with the matting model's alpha and edges freed of background.

    Raises TriptychError when rembg is absent, or its model cannot be downloaded or run.
    """
    from PIL import Image

    try:
        import rembg
    except (ImportError, SystemExit) as error:  # rembg exits the process when it finds no onnxruntime
        raise TriptychError(
            f'{label} needs the matting extra, which is not installed: pip install "triptych[matting]", or give a '
            "picture with alpha or a plain background"
        ) from error
    picture = Image.fromarray(np.rint(rgb * 255).astype(np.uint8))
    try:
        mask = rembg.remove(picture, only_mask=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise TriptychError(
            f"the matting model could not be loaded or run ({error}); check the network and the free disk space, or "
            "give a picture with alpha or a plain background"
        ) from error
    alpha = np.asarray(mask.convert("L"), dtype=np.float32) / 255
    return np.concatenate([decontaminate(rgb, alpha), alpha[..., None]], axis=-1).astype(np.float32)


def decontaminate(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Foreground colour (H, W, 3) where alpha is partial, the background being whatever surrounds it."""
    solid, empty = alpha > 0.95, alpha <= FAINT_ALPHA
    soft = (alpha > 0) & ~solid
    if not solid.any() or not empty.any() or not soft.any():
        return rgb
    inner = ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True)
    outer = ndimage.distance_transform_edt(~empty, return_distances=False, return_indices=True)
    weight = alpha[soft][:, None]
    foreground = rgb[inner[0][soft], inner[1][soft]]
    behind = rgb[outer[0][soft], outer[1][soft]]
    unmixed = np.clip((rgb[soft] - (1 - weight) * behind) / np.maximum(weight, 0.05), 0, 1)
    out = rgb.copy()
    out[soft] = weight * unmixed + (1 - weight) * foreground
    return out


# --- judging the result ----------------------------------------------------------------------------------------------


def _keep_large_parts(alpha: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Drops parts smaller than SPECK_SHARE of the largest; says what was dropped and whether several remain."""
    labels, count = ndimage.label(alpha > FAINT_ALPHA, _EIGHT)
    if count == 0:
        return alpha, []
    areas = ndimage.sum_labels(alpha > 0.5, labels, np.arange(1, count + 1))
    keep = areas >= max(1.0, SPECK_SHARE * areas.max())
    specks, parts = int(((areas >= _DUST_PX) & ~keep).sum()), int(keep.sum())
    notes = []
    if specks:
        what = "1 speck" if specks == 1 else f"{specks} specks"
        notes.append(f"{what} under {SPECK_SHARE:.0%} of the object removed")
    if parts > 1:
        notes.append(f"{parts} separate objects found and all kept; crop the picture if only one is meant")
    return np.where(np.concatenate([[False], keep])[labels], alpha, 0).astype(np.float32), notes


def _judge_box(box: tuple[float, float, float, float], alpha: np.ndarray, label: str) -> list[str]:
    side = max(box[2] - box[0], box[3] - box[1])
    if side < MIN_SIDE_PX:
        raise TriptychError(
            f"the object in {label} is only {side:.0f} pixels large; give a picture where it has at least "
            f"{SMALL_SIDE_PX} pixels"
        )
    notes = []
    if side < SMALL_SIDE_PX:
        notes.append(f"{label}: the object is only {side:.0f} pixels large, so details will be missing")
    rims = {"left": alpha[:, 0], "top": alpha[0], "right": alpha[:, -1], "bottom": alpha[-1]}
    cut = [name for name, rim in rims.items() if (rim > 0.5).any()]
    if cut:
        notes.append(f"{label}: the object touches the {' and '.join(cut)} border and may be cut off there")
    return notes


def _not_plain(label: str, share: float) -> str:
    absent = "" if matting_available() else ' (pip install "triptych[matting]")'
    return (
        f"the background of {label} is not plain (only {share:.0%} of its border is one colour): it needs the matting "
        f"extra{absent}, or give a picture with alpha or a plain background"
    )
