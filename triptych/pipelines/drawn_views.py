"""Panels that a model drew and views that were given -> one view set.

A sheet has one scale. The panels of the given views, which the model draws too, say how it relates to the given
pictures; so each drawn panel is placed as it lies in the sheet, and not by its own box: what is flat, or drawn in part,
has a box that says little. On 128 objects that no model has seen, the drawn depth was wrong by .46 in the logarithm,
and by .53 when all heights were made equal.

A small model hardly knows how deep a thing is. Where it comes with a network that does (`models.proportions`), drawn
sides are brought to the width which that network expects.

In the rig all views show the object in the same rows. A drawn view that shows much less, or more, is left out: a
reconstruction would carve away what the given views show. Drawn colours and the outlines of opposite views are moved to
the given ones'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..errors import TriptychError
from ..flux.panels import check_panel, is_empty
from ..geometry.cameras import FRAME_FILL, VIEW_NAMES
from ..images.files import resize_premultiplied
from ..images.foreground import alpha_box
from ..images.views import ViewSet, azimuth_of, bleed, place_view, prepare_views
from ..models.proportions import Proportions

_GAINS = (0.8, 1.25)  # a blurred drawing has less contrast for that alone
_CONTRADICTS = 0.2  # of the rows of a given view
_ROW_NOISE = 0.025  # of a panel's side: an edge may lie so much higher or lower
_SNAP = 0.002
_STRETCH = (0.1, 6.0)  # of a panel at most

Pictures = Mapping[str, np.ndarray]


def put_together(
    given: ViewSet | None,
    panels: dict[str, np.ndarray],
    missing: tuple[str, ...],
    size: int,
    proportions: Proportions | None = None,
) -> tuple[ViewSet, list[str]]:
    """One set at one scale from the given views and the panels of the missing ones; sentences about what is left out.

    panels: all views of the sheet, (P, P, 4) float32. size: pixels of a finished view. proportions: tells the widths of
    drawn sides, see `expected_widths`; None leaves them as drawn. Raises TriptychError when every panel is empty and
    nothing was given.
    """
    known = {} if given is None else given.pictures
    panels = in_known_colours(panels, known)
    drawn = {name: panels[name] for name in missing if not is_empty(panels[name])}
    notes = _left_out([name for name in missing if name not in drawn], "stayed empty")
    told = sheet_frame(panels, known)
    if told is not None:
        odd = [name for name in drawn if _opposite(name) not in known and contradicts(name, panels, known)]
        drawn = {name: panel for name, panel in drawn.items() if name not in odd}
        drawn = in_expected_widths(drawn, known, told[0], proportions)
        notes += _left_out(odd, "lay at other heights than the given views")
    if not (known or drawn):
        raise TriptychError("the model drew nothing in any panel: try another seed, more steps or another prompt")
    if told is None:
        # The checks have spoken about the drawn panels, in words that fit them, and preparing the given ones of these.
        pictures = {**drawn, **known}
        view_set = replace(prepare_views(dict(pictures.items()), size=size, foreground="alpha"), warnings=())
    else:
        view_set = _in_one_frame(known, drawn, told, size)
    view_set = replace(view_set, generated=tuple(map(azimuth_of, drawn)))
    return _in_known_outlines(view_set), notes


def in_expected_widths(
    panels: Pictures, known: Pictures, unit: float, proportions: Proportions | None
) -> dict[str, np.ndarray]:
    """Panels, of which those beside the given views are drawn out to the widths that are expected; empty ones stay.
    unit: pixels of the given pictures to a panel's pixel, see `sheet_frame`."""
    widths = expected_widths(known, proportions)
    return {
        name: at_width(panel, widths[name] / unit) if name in widths and (panel[..., 3] > 0.5).any() else panel
        for name, panel in panels.items()
    }


def expected_widths(known: Pictures, proportions: Proportions | None) -> dict[str, float]:
    """How wide the views beside the given ones are, by name, in pixels of the given pictures (S, S, 4).

    Empty without a network, and where views of both axes are given: there the given ones tell.
    """
    beside = {name for name in VIEW_NAMES if name not in known and _opposite(name) not in known}
    if proportions is None or len(beside) != 2:
        return {}
    extents, framed = [], []
    for picture in known.values():
        left, top, right, bottom = alpha_box(picture[..., 3])
        extents.append(max(right - left, bottom - top))
        scale = FRAME_FILL * proportions.size / extents[-1]
        framed.append(place_view(picture, ((left + right) / 2, (top + bottom) / 2), scale, proportions.size))
    with torch.inference_mode():
        answers = proportions(torch.from_numpy(np.stack(framed)).permute(0, 3, 1, 2))[:, 0].numpy()
    width = float(np.exp(np.mean(answers + np.log(extents))))
    return dict.fromkeys(sorted(beside), width)


def at_width(panel: np.ndarray, width: float) -> np.ndarray:
    """A panel (P, P, 4) drawn out across, (P, Q, 4), so that its object is about so many pixels wide."""
    left, _, right, _ = alpha_box(panel[..., 3])
    share = float(np.clip(width / (right - left), *_STRETCH))
    return resize_premultiplied(panel, max(1, round(panel.shape[1] * share)), panel.shape[0])


def _left_out(names: list[str], why: str) -> list[str]:
    return [f"the {' and '.join(names)} panel {why}: the set goes on without it"] if names else []


def _opposite(name: str) -> str:
    return VIEW_NAMES[(VIEW_NAMES.index(name) + 2) % 4]


def sheet_frame(panels: Pictures, known: Pictures) -> tuple[float, float] | None:
    """How the given pictures (S, S, 4), which have one scale, lie to the sheet: pixels of theirs to a panel's pixel, by
    the diagonals of their outlines' boxes, and the row of the panels (P, P, 4) in which the object's middle lies.

    None where nothing is given, and where no given view was drawn without fault.
    """
    both = [name for name in known if name in panels and not check_panel(panels[name])]
    if not both:
        return None
    true, made = (np.array([alpha_box(views[name][..., 3]) for name in both]) for views in (known, panels))
    diagonals = [np.linalg.norm(boxes[:, 2:] - boxes[:, :2]) for boxes in (true, made)]
    return float(diagonals[0] / diagonals[1]), float(made[:, 1::2].mean())


def contradicts(name: str, panels: Pictures, known: Pictures) -> bool:
    """Whether a panel shows the object in other rows than the given views' own panels do."""
    own = _rows(panels[name])
    reach = max(1, round(_ROW_NOISE * len(own)))
    others = np.any([_rows(panels[other]) for other in known if other in panels], axis=0)
    lacks, exceeds = others & ~_widened(own, reach), own & ~_widened(others, reach)
    return bool(max(lacks.sum(), exceeds.sum()) > _CONTRADICTS * others.sum())


def _rows(rgba: np.ndarray) -> np.ndarray:
    return np.asarray((rgba[..., 3] > 0.5).any(axis=1))


def _widened(rows: np.ndarray, reach: int) -> np.ndarray:
    return np.convolve(rows, np.ones(2 * reach + 1), mode="same") > 0


def _in_one_frame(known: Pictures, drawn: Pictures, told: tuple[float, float], size: int) -> ViewSet:
    """Given pictures and drawn panels at one scale, at which the largest extent fills FRAME_FILL of the frame."""
    unit, middle = told
    boxes = {name: alpha_box(panel[..., 3]) for name, panel in drawn.items()}
    extents = [
        unit * max(right - left, 2 * max(middle - top, bottom - middle)) for left, top, right, bottom in boxes.values()
    ]
    for picture in known.values():
        left, top, right, bottom = alpha_box(picture[..., 3])
        extents.append(max(right - left, bottom - top))
    scale = FRAME_FILL * size / max(extents)
    frames = {}
    for name, picture in known.items():
        stays = picture.shape[0] == size and abs(scale - 1) < _SNAP
        frames[name] = picture if stays else place_view(picture, (picture.shape[0] / 2,) * 2, scale, size)
    for name, panel in drawn.items():
        across = (boxes[name][0] + boxes[name][2]) / 2
        frames[name] = place_view(panel, (across, middle), scale * unit, size)
    names = [name for name in VIEW_NAMES if name in frames]
    images = np.stack([bleed(frames[name]).transpose(2, 0, 1) for name in names])
    return ViewSet(torch.from_numpy(np.ascontiguousarray(images)), tuple(map(azimuth_of, names)))


def in_known_colours(panels: dict[str, np.ndarray], known: Pictures) -> dict[str, np.ndarray]:
    """Panels with the colours of the given pictures: moved and stretched, channel by channel, as the given views' own
    panels have to be for their means and deviations to be the pictures'.

    A model draws the given views too, so it shows how it changes colours: a small one mixes its background into all of
    them. Panels and pictures are (S, S, 4) float32 sRGB 0-1 by name. Without a panel to compare they stay.
    """
    both = [name for name in known if name in panels and (panels[name][..., 3] > 0.5).any()]
    if not both:
        return panels
    made, true = (
        np.concatenate([views[name][views[name][..., 3] > 0.5][:, :3] for name in both]) for views in (panels, known)
    )
    gain = np.clip((true.std(axis=0) + 0.02) / (made.std(axis=0) + 0.02), *_GAINS)
    moved = {}
    for name, panel in panels.items():
        colours = (panel[..., :3] - made.mean(axis=0)) * gain + true.mean(axis=0)
        moved[name] = np.concatenate([colours.clip(0, 1), panel[..., 3:]], axis=-1).astype(np.float32)
    return moved


def _in_known_outlines(views: ViewSet) -> ViewSet:
    """Drawn views that lie opposite to given ones take the mirrored outline of these."""
    images = views.images.clone()
    for row, azimuth in enumerate(views.azimuths_deg):
        across = (azimuth + 180) % 360
        if azimuth in views.generated and across in views.azimuths_deg and across not in views.generated:
            drawn, other = (views.images[i].permute(1, 2, 0).numpy() for i in (row, views.azimuths_deg.index(across)))
            images[row] = torch.from_numpy(in_mirrored_outline(drawn, other)).permute(2, 0, 1)
    return replace(views, images=images)


def in_mirrored_outline(drawn: np.ndarray, opposite: np.ndarray) -> np.ndarray:
    """A drawn view with the outline that it must have: that of the opposite view, mirrored, as parallel rays leave it.

    Both (S, S, 4) float32 at one scale. Where the drawing shows nothing its nearest colour goes on; an empty one stays.
    """
    if not (drawn[..., 3] > 0.5).any():
        return drawn
    firm = drawn.copy()
    firm[..., 3] *= firm[..., 3] > 0.5
    filled = bleed(firm)
    filled[..., 3] = opposite[:, ::-1, 3]
    return filled
