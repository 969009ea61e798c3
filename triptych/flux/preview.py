"""Rough pictures of a latent sheet without the decoder: one affine map from a latent to its patch's mean colour.

Where networks take turns on the GPU, decoding a picture after each sampling step would send the transformer away and
bring it back each time. The map is linear, small enough to lie anywhere, and shows where objects are and their colours
at an eighth of the resolution; fine detail, thin parts and texture are not in it. It is fitted by least squares to what
the autoencoder's own encoder makes of coloured blobs, so that it suits any autoencoder.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_PICTURES, _SIDE_PX = 6, 128
_RIDGE = 1e-3


def latent_colours(vae: Any) -> Tensor:
    """The map (C + 1, 3) float32 of an autoencoder of diffusers that has no hooks yet; latents of C
    channels, then an offset, to sRGB -1..1. The same autoencoder gives the same map."""
    pictures = _blobs()
    with torch.no_grad():
        latents = copy.deepcopy(vae).to("cpu", torch.float32).encode(pictures * 2 - 1).latent_dist.mode()
    wanted = F.avg_pool2d(pictures * 2 - 1, pictures.shape[-1] // latents.shape[-1])
    known_ND = _rows(torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1))
    gram_DD = known_ND.T @ known_ND
    ridge_DD = _RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD), dtype=gram_DD.dtype)
    return torch.linalg.solve(gram_DD + ridge_DD, known_ND.T @ _rows(wanted)).float()


def rough_picture(latents: Tensor, colours: Tensor, size: int) -> Tensor:
    """Latents (1, C, h, w) as an autoencoder decodes them -> (3, size, size) float32 sRGB 0-1 on the CPU."""
    small = latents.detach().float().cpu()[0].permute(1, 2, 0) @ colours[:-1] + colours[-1]
    picture = F.interpolate(small.permute(2, 0, 1)[None], (size, size), mode="bilinear", align_corners=False)[0]
    return ((picture + 1) / 2).clamp(0, 1)


def _blobs() -> Tensor:
    """(N, 3, S, S) sRGB 0-1: coloured noise, from a few large blobs to many small ones."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for cells in torch.linspace(2, _SIDE_PX // 8, _PICTURES).round().int().tolist():
        noise = torch.rand(1, 3, cells, cells, generator=generator)
        made.append(F.interpolate(noise, (_SIDE_PX, _SIDE_PX), mode="nearest"))
    return torch.cat(made)


def _rows(grid: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C) float64."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2).double()
