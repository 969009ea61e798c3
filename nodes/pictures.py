"""ComfyUI's IMAGE (B, H, W, C) and MASK (B, H, W), float 0-1, to and from the library's pictures. Inputs are copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..triptych.errors import TriptychError

if TYPE_CHECKING:
    from torch import Tensor

MASK_MODES = ("auto", "object", "background")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "grey": (0.5, 0.5, 0.5), "black": (0.0, 0.0, 0.0)}


def picture(image: Tensor, label: str) -> np.ndarray:
    """IMAGE of one picture -> (H, W, 1, 3 or 4) float32 0-1. Raises TriptychError for a batch of several."""
    if image.shape[0] != 1:
        raise TriptychError(
            f"{label} is a batch of {image.shape[0]} pictures: connect one, or join them to a view sheet first"
        )
    return np.clip(image[0].detach().float().cpu().numpy(), 0.0, 1.0)


def cut_out(image: Tensor, mask: Tensor | None, shows: str, label: str) -> np.ndarray:
    """One picture with its mask as alpha: (H, W, 4); without a mask as it is: (H, W, C).

    shows: what 1 means in the mask, "object" or "background" (as Load Image gives it), or "auto": the object is
    what touches less of the picture's border. A mask of one value says nothing and is left out, as Load Image gives
    it for pictures without transparency.
    """
    rgb = picture(image, label)
    alpha = None if mask is None else mask_plane(mask, rgb.shape[:2], label)
    if alpha is None or float(alpha.max() - alpha.min()) < 1e-3:
        return rgb
    if shows == "background" or (shows == "auto" and _border_mean(alpha) > 0.5):
        alpha = 1 - alpha
    # Load Image gives 1 - alpha: eight-bit alphas come back with rounding errors, which this undoes.
    levels = np.rint(alpha * 255)
    alpha = np.where(np.abs(alpha * 255 - levels) < 1e-3, levels / 255, alpha).astype(np.float32)
    return np.concatenate([_three(rgb), alpha[..., None]], axis=-1)


def mask_plane(mask: Tensor, size: tuple[int, int], label: str) -> np.ndarray | None:
    """MASK -> (H, W) float32 at ``size``; None for a uniform mask of another shape. Raises TriptychError otherwise."""
    plane = mask.detach().float().cpu().reshape(-1, *mask.shape[-2:])
    if plane.shape[0] != 1:
        raise TriptychError(f"the mask of {label} is a batch of {plane.shape[0]}: connect one mask")
    array = np.clip(plane[0].numpy(), 0.0, 1.0)
    if array.shape == tuple(size):
        return array
    if float(array.max() - array.min()) < 1e-3:
        return None
    height, width = size
    if abs(array.shape[0] * width - array.shape[1] * height) > max(*size, *array.shape):
        raise TriptychError(
            f"the mask of {label} is {array.shape[1]} x {array.shape[0]} pixels, the picture {width} x {height}: "
            "connect the mask that belongs to it"
        )
    from PIL import Image

    return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.BILINEAR)).copy()


def images(pictures: np.ndarray | Tensor) -> Tensor:
    """(B, H, W, C) array or (B, C, H, W) tensor -> IMAGE."""
    import torch

    if isinstance(pictures, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(pictures, dtype=np.float32))
    return pictures.detach().float().cpu().permute(0, 2, 3, 1).contiguous()


def over(rgba: Tensor, background: str) -> Tensor:
    """(B, 4, H, W) straight alpha over a colour of BACKGROUNDS -> IMAGE."""
    alpha = rgba[:, 3:]
    colour = rgba.new_tensor(BACKGROUNDS[background])[None, :, None, None]
    return images(rgba[:, :3] * alpha + (1 - alpha) * colour)


def _three(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., :3] if rgb.shape[-1] >= 3 else np.repeat(rgb[..., :1], 3, axis=-1)


def _border_mean(alpha: np.ndarray) -> float:
    return float(np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]]).mean())
