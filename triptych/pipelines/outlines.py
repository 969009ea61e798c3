"""What the given outlines say of a solid: nothing of it lies outside of them, and something lies behind every point
inside.

The first is a cut (`Outlines.allowed`). The second needs a guess, because an outline does not tell the depth: where a
ray of a view meets nothing, the place that the network holds likeliest is filled, as deep as the outline is wide there,
so that a limb which the average of several poses has lost comes back round (`covered`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage

from ..errors import TriptychError
from ..geometry.cameras import Camera
from ..geometry.voxels import silhouette_fields

_DEEPEST = 2.0  # voxels: half of the depth that is filled at most; wider ones are for the network to know
_DEEPEST_GUESS = 1.0  # the same where no second direction bounds the depth: a sign is as wide as a box, and thin
_CORE = 1.0  # voxels inside of the outline that nothing is behind: what is missing along a rim alone is no limb
_LEAST = 0.3  # voxels inside of the outline: closer to its edge a ray may miss what the pixel shows
_INFORMED = -0.4  # voxels from a surface: below, fields of the network are flat and know no best place


@dataclass(frozen=True)
class Outlines:
    """distances: (V, R, R, R) float32, voxels, signed distance of every voxel's centre to each view's outline, positive
    inside. axes: of each view, the axis of the volume that it looks along; None for one that looks along none."""

    distances: np.ndarray
    axes: tuple[int | None, ...]

    @cached_property
    def allowed(self) -> np.ndarray:
        """What all outlines leave: (R, R, R) float32, voxels, positive inside."""
        return self.distances.min(axis=0)


def outlines_of(masks: torch.Tensor, cameras: Sequence[Camera], resolution: int) -> Outlines:
    """masks (V, S, S): the views' alpha. Raises TriptychError when no point lies inside all outlines."""
    found = Outlines(silhouette_fields(masks, cameras, resolution), tuple(_axis(camera) for camera in cameras))
    if not (found.allowed > 0).any():
        raise TriptychError(
            "the outlines contradict each other, no point lies inside all of them: check which view is which side"
        )
    return found


def _axis(camera: Camera) -> int | None:
    turns, rest = divmod(camera.azimuth_deg, 90.0)
    if rest or camera.elevation_deg or not camera.is_orthographic:
        return None
    return 0 if int(turns) % 2 else 2


def covered(field: np.ndarray, outlines: Outlines) -> np.ndarray:
    """The field (R, R, R), voxels, positive inside, with something behind every point of every outline.

    A ray that meets nothing is filled around the place where the field is highest among those that the other outlines
    allow, the middle one of its neighbours' places; where the field is flat, at the depth of the nearest ray that knows
    one. Slivers along an outline's rim, and views that do not look along an axis of the volume, ask for nothing.
    """
    allowed = outlines.allowed
    deepest = _DEEPEST if {0, 2} <= set(outlines.axes) else _DEEPEST_GUESS
    for distance, axis in zip(outlines.distances, outlines.axes, strict=True):
        if axis is not None:
            field = _covered(field, distance.take(0, axis=axis), allowed, axis, deepest)
    return field


def _covered(field: np.ndarray, inside: np.ndarray, allowed: np.ndarray, axis: int, deepest: float) -> np.ndarray:
    """For one view: inside (R, R) is its outline's distance."""
    wanted = np.minimum(np.minimum(inside, allowed.max(axis=axis)), deepest)
    possible = allowed >= np.expand_dims(wanted, axis) - 1e-3
    candidates = np.where(possible, field, -np.inf)
    best, place = candidates.max(axis=axis), candidates.argmax(axis=axis)
    met = np.minimum(field, allowed).max(axis=axis)
    missing = _with_a_core((wanted > _LEAST) & (met <= 0), inside > _CORE)
    knows = (inside > 0) & (best > _INFORMED)
    if not missing.any() or not knows.any():
        return field
    nearest = ndimage.distance_transform_edt(~knows, return_distances=False, return_indices=True)
    place = _middle(place[tuple(nearest)], inside > 0)
    depths = np.arange(field.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
    sheet = np.expand_dims(wanted, axis) - np.abs(depths - np.expand_dims(place, axis))
    return np.where(np.expand_dims(missing, axis), np.maximum(field, sheet), field).astype(np.float32)


def _with_a_core(region: np.ndarray, core: np.ndarray) -> np.ndarray:
    """The connected parts of a region that hold a pixel of the core."""
    parts, _ = ndimage.label(region, np.ones((3, 3), dtype=bool))
    return region & np.isin(parts, np.unique(parts[core & region]))


def _middle(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The median of each pixel's 3 x 3 neighbours of those in ``among``; pixels elsewhere stay."""
    padded = np.pad(np.where(among, values, np.nan).astype(np.float64), 1, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).reshape(*values.shape, 9)
    result = values.astype(np.float64)
    result[among] = np.nanmedian(windows[among], axis=-1)
    return result
