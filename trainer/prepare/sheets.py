"""View sheets as a multi-view image model learns them, from prepared views.

A target is the rig's four views under one fixed light, front left / back right, on one exact background colour. The
light is part of the contract: it is soft, turns with the camera, and leaves a colour what it is within a third, so a
generated sheet carries the shape in its shading and can still be baked as a texture. A reference is what a user's
photograph becomes after cutting out: one view under any light, on the same background, filling its frame by itself;
so the sheet's scale is for the model to find.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from trainer.data import Recolouring, relight
from triptych.errors import TriptychError
from triptych.geometry.cameras import FRAME_FILL, VIEW_AZIMUTHS_DEG, Camera
from triptych.render.views import linear_to_srgb, srgb_to_linear

HEAD, SKY, AMBIENT = 0.40, 0.35, 0.30  # shares of the fixed light, in linear colour
_LINEAR = srgb_to_linear(torch.arange(256, dtype=torch.float32) / 255)
PLAIN = Recolouring(torch.eye(3), torch.zeros(3))
_BACK = torch.stack([Camera(azimuth).rotation()[2] for azimuth in VIEW_AZIMUTHS_DEG])


def canonical_shade(albedo: np.ndarray, normal: np.ndarray) -> torch.Tensor:
    """The rig's views under the fixed light.

    albedo (4, S, S, 4) uint8 sRGB with alpha, normal (4, S, S, 3) uint8 for -1..1 in the world frame. Returns
    (4, 4, S, S) float32 RGBA, sRGB 0-1, straight alpha, black where alpha is 0.
    """
    view, row, column = np.nonzero(albedo[..., 3])  # most of a sheet is background: only the object is computed
    world = torch.from_numpy(normal[view, row, column]).float() * (2 / 255) - 1
    head = (world * _BACK[torch.from_numpy(view)]).sum(1).clamp_min(0)
    shade = HEAD * head + SKY * (0.5 + 0.5 * world[:, 1]) + AMBIENT
    linear = _LINEAR[torch.from_numpy(albedo[view, row, column, :3]).long()] * shade[:, None]
    rgba = np.zeros(albedo.shape, dtype=np.float32)
    rgba[view, row, column, :3] = linear_to_srgb(linear.clamp(0, 1)).numpy()
    rgba[..., 3] = albedo[..., 3] / np.float32(255)
    return torch.from_numpy(rgba).permute(0, 3, 1, 2).contiguous()


def recoloured(albedo: np.ndarray, recolouring: Recolouring) -> np.ndarray:
    """Views (..., 4) uint8 with other colours; alpha stays."""
    seen = albedo[..., 3] > 0
    rgb = recolouring(torch.from_numpy(albedo[seen][:, :3]).float() / 255)
    out = albedo.copy()
    out[seen, :3] = (rgb * 255 + 0.5).to(torch.uint8).numpy()
    return out


def on_background(rgba: torch.Tensor, background: Sequence[float]) -> torch.Tensor:
    """(..., 4, H, W) straight alpha over an sRGB colour 0-1 -> (..., 3, H, W), mixed in sRGB."""
    colour = torch.tensor(background, dtype=rgba.dtype).view(3, 1, 1)
    alpha = rgba[..., 3:, :, :]
    return rgba[..., :3, :, :] * alpha + colour * (1 - alpha)


def grid(panels: torch.Tensor) -> torch.Tensor:
    """(..., 4, C, S, S) front, left, back, right -> (..., C, 2S, 2S): front left / back right in reading order."""
    top = torch.cat([panels[..., 0, :, :, :], panels[..., 1, :, :, :]], dim=-1)
    bottom = torch.cat([panels[..., 2, :, :, :], panels[..., 3, :, :, :]], dim=-1)
    return torch.cat([top, bottom], dim=-2)


def references(
    rgba: torch.Tensor, generator: np.random.Generator, *, jitter: float = 0.04, lean: float = 0.0
) -> torch.Tensor:
    """Given views as they arrive from photographs: brought to the frame by their own extent, not by the object's.

    rgba (V, 4, S, S) float, one scale; their common largest extent becomes FRAME_FILL of the frame, times 1 +- jitter,
    the centre moved by up to jitter / 2 of the frame. lean: strongest change of width from bottom to top, as a camera
    that looks down or up makes it. Returns (V, 4, S, S). Raises TriptychError when a view is empty.
    """
    boxes = [_box(view[3]) for view in rgba]
    size = rgba.shape[-1]
    extent = max(max(box[2] - box[0], box[3] - box[1]) for box in boxes)
    scale = FRAME_FILL * size / extent * generator.uniform(1 - jitter, 1 + jitter)
    tilt = generator.uniform(-lean, lean)
    moved = []
    for view, box in zip(rgba, boxes, strict=True):
        shift = generator.uniform(-jitter / 2, jitter / 2, 2)
        moved.append(_resampled(view, box, scale, shift, tilt))
    return torch.stack(moved)


def _box(alpha: torch.Tensor) -> tuple[float, float, float, float]:
    if not (alpha > 0).any():
        raise TriptychError("a view is empty; prepare the data again")
    seen = alpha >= min(0.5, float(alpha.max()))  # a blade seen from its edge covers half of no pixel
    rows, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1


def _resampled(
    view: torch.Tensor, box: tuple[float, float, float, float], scale: float, shift: np.ndarray, tilt: float
) -> torch.Tensor:
    """The view about its box's centre, enlarged; premultiplied while it is resampled."""
    size = view.shape[-1]
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(line, line, indexing="ij")
    centre_x, centre_y = (box[0] + box[2]) / size - 1, (box[1] + box[3]) / size - 1
    u, v = u - 2 * float(shift[0]), v - 2 * float(shift[1])
    x = u * (1 + tilt * v) / scale + centre_x
    y = v / scale + centre_y
    solid = torch.cat([view[:3] * view[3:], view[3:]])
    out = F.grid_sample(solid[None], torch.stack([x, y], -1)[None], align_corners=False, padding_mode="zeros")[0]
    alpha = out[3:].clamp(0, 1)
    return torch.cat([(out[:3] / alpha.clamp_min(1e-4)).clamp(0, 1), alpha])


def photo_views(
    sample: dict[str, np.ndarray],
    views: Sequence[int],
    generator: np.random.Generator,
    background: Sequence[float],
    *,
    jitter: float = 0.04,
    lean: float = 0.08,
) -> torch.Tensor:
    """Reference pictures of a prepared sample under a random light: (V, 3, S, S) float32 on the background."""
    lit = relight(sample["albedo"], sample["normal"], generator, views, PLAIN)
    return on_background(references(lit, generator, jitter=jitter, lean=lean), background)
