"""Which rasteriser answers "what triangle is seen at this pixel".

``torch`` is the plain reference of ``rasterize.py`` and always there. ``nvdiffrast`` is used when it is installed and
the tensors are on CUDA; it is never needed (it is not on the registry, and its licence is non-commercial). A backend
only
returns triangle ids: barycentrics, depth and their gradients come from the same torch code for both.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from ..errors import TriptychError

BACKENDS = ("auto", "torch", "nvdiffrast")
NVDIFFRAST_MAX_SIZE = 2048  # the largest frame its CUDA rasteriser takes before v0.3.3; v0.3.2 takes any width
NVDIFFRAST_MAX_FACES = 1 << 24  # its ids come back as float32 integers


@functools.lru_cache(maxsize=1)
def nvdiffrast_installed() -> bool:
    return importlib.util.find_spec("nvdiffrast") is not None


def choose_backend(backend: str, device: torch.device, faces: int = 0, longest_side: int = 0) -> str:
    """ "torch" or "nvdiffrast". ``auto`` takes nvdiffrast only on CUDA, when installed, and for sizes that it supports.

    Raises TriptychError for an unknown name, and for nvdiffrast where it cannot run.
    """
    if backend not in BACKENDS:
        raise TriptychError(f"unknown rasteriser backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    fits = faces < NVDIFFRAST_MAX_FACES and longest_side <= NVDIFFRAST_MAX_SIZE
    possible = device.type == "cuda" and nvdiffrast_installed() and fits
    if backend == "nvdiffrast" and not possible:
        raise TriptychError(
            f"nvdiffrast cannot draw {faces} faces at {longest_side} pixels on {device}: it must be installed, on a "
            f"CUDA device, with a frame of at most {NVDIFFRAST_MAX_SIZE} pixels; use backend='torch'"
        )
    return "nvdiffrast" if possible and backend != "torch" else "torch"


@functools.lru_cache(maxsize=8)
def _context(device_index: int) -> Any:
    module = importlib.import_module("nvdiffrast.torch")
    return module.RasterizeCudaContext(device=torch.device("cuda", device_index))


@torch.no_grad()
def nvdiffrast_visible(clip_BV4: torch.Tensor, faces_F3: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, H, W) int64 ids of the nearest triangle, -1 for background, row 0 at the top.

    nvdiffrast puts NDC y = -1 in row 0, so y is negated on the way in; it clips z to [-w, w] and interpolates z
    linearly in homogeneous space, so our z (depth times w) is replaced by the usual projection of depth between a near
    and a far plane.
    """
    module = importlib.import_module("nvdiffrast.torch")
    x, y, z, w = clip_BV4.float().unbind(-1)
    depth = z / torch.where(w == 0, torch.full_like(w, 1e-20), w)
    seen = depth[(depth > 1e-4) & torch.isfinite(depth)]
    if seen.numel() == 0:
        return torch.full((clip_BV4.shape[0], height, width), -1, dtype=torch.int64, device=clip_BV4.device)
    near, far = seen.min() * 0.99, seen.max() * 1.01
    orthographic = (w == 1).all(dim=1, keepdim=True)
    linear = (2 * depth - (far + near)) / (far - near)
    projective = ((far + near) * w - 2 * far * near) / (far - near)
    position = torch.stack([x, -y, torch.where(orthographic, linear, projective), w], dim=-1)
    usable = torch.isfinite(position).all(dim=2).all(dim=0)[faces_F3].all(dim=1).nonzero().squeeze(1)
    if len(usable) == 0:
        return torch.full((clip_BV4.shape[0], height, width), -1, dtype=torch.int64, device=clip_BV4.device)
    context = _context(clip_BV4.device.index or 0)
    faces = faces_F3[usable].to(torch.int32).contiguous()
    raster, _ = module.rasterize(
        context, torch.nan_to_num(position).contiguous(), faces, resolution=[height, width], grad_db=False
    )
    drawn = raster[..., 3].round().to(torch.int64)  # 1-based, 0 for background
    return torch.where(drawn > 0, usable[(drawn - 1).clamp_min(0)], -1)
