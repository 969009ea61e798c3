"""A linear encoder written into the layers of Flux.2's autoencoder: principal components of 8 x 8 pixel patches.

A small convolutional encoder needs tens of thousands of pictures before its latents hold colour at all. Principal
components hold nearly everything from the start, are exact to compute, and a flow can train on them while the
decoder is still learning. They are set up so that the published module computes them without a change: residual
branches are switched off, each strided convolution only gathers its 2 x 2 pixels, the third one projects, and what the
last norm and activation would bend is undone. SiLU is linear over a pair of opposite signs, silu(x) - silu(-x) = x; and
a pair of large constants fixes what the group norm divides by.

Pixels are taken as differences from the background colour, so an empty patch is exactly zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PATCH_PX = 8
_ANCHOR = 100.0  # the constant pair; ordinary values are of the order of 1


def patches_of(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 192, H / 8, W / 8), in the order in which three strided convolutions gather 2 x 2."""
    for _ in range(3):
        b, c, h, w = pixels.shape
        pixels = pixels.view(b, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
    return pixels


def principal_components(pixels: Tensor, background: Sequence[float], count: int) -> tuple[Tensor, Tensor]:
    """Directions (count, 192), rows orthonormal, and their mean squares (count,), of the patches that show an object.

    pixels: (B, 3, H, W) in -1..1 on the background (sRGB 0-1). Largest first; the sign of a row makes its sum positive.
    """
    shown = patches_of(pixels - _key(background).view(1, 3, 1, 1)).permute(0, 2, 3, 1).reshape(-1, 192)
    shown = shown[shown.abs().amax(1) > 0.02].double()
    values, vectors = torch.linalg.eigh(shown.T @ shown / len(shown))
    rows = vectors.T.flip(0)[:count]
    rows = rows * torch.where(rows.sum(1, keepdim=True) < 0, -1.0, 1.0)
    return rows.float(), values.flip(0)[:count].float()


@torch.no_grad()
def set_linear_encoder(vae: Any, directions: Tensor, background: Sequence[float], scale: float) -> None:
    """Makes ``vae.encode(pixels).latent_dist.mode()`` the ``scale``-fold components of patches.

    vae: an AutoencoderKLFlux2 of four stages of which the first two have at least 12 and 48 channels, the last two
    equally many, 2 x latents + 2 or more, with one group in its norms. directions: (latents, 192) of
    `principal_components`.
    """
    encoder, latents = vae.encoder, len(directions)
    width = encoder.conv_norm_out.num_channels
    channels = tuple(vae.config.block_out_channels)
    fits = len(channels) == 4 and channels[0] >= 12 and channels[1] >= 48 and channels[2] == width >= 2 * latents + 2
    if vae.config.norm_num_groups != 1 or not fits:
        raise ValueError(
            f"a linear encoder of {latents} latents needs one norm group and four stages of at least 12, 48 and twice "
            f"{2 * latents + 2} channels, got {channels}"
        )
    for name, parameter in encoder.named_parameters():
        # Branches end in conv2 or to_out; what lies before them may stay random.
        if any(part in name for part in ("conv2", "to_out", "conv_in", "downsamplers", "conv_shortcut", "conv_out")):
            parameter.zero_()
    for index in range(3):
        encoder.conv_in.weight[index, index, 1, 1] = 1.0
    encoder.conv_in.bias[:3] = -_key(background)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                weight = resnet.conv_shortcut.weight
                weight[:, :, 0, 0] = torch.eye(*weight.shape[:2])
    gather = torch.zeros(4, 2, 2)
    for place in range(4):
        gather[place, place // 2, place % 2] = 1.0
    for block, gathered in zip(encoder.down_blocks[:2], (3, 12), strict=True):
        weight = block.downsamplers[0].conv.weight
        for place in range(4):
            for channel in range(gathered):
                weight[place * gathered + channel, channel, :2, :2] = gather[place]
    project, bias = encoder.down_blocks[2].downsamplers[0].conv.weight, encoder.down_blocks[2].downsamplers[0].conv.bias
    kernel = torch.einsum("lpc,pyx->lcyx", directions.view(latents, 4, 48), gather)
    project[:latents, :48, :2, :2] = kernel
    project[latents : 2 * latents, :48, :2, :2] = -kernel
    bias[2 * latents], bias[2 * latents + 1] = _ANCHOR, -_ANCHOR
    divided_by = _ANCHOR * (2 / width) ** 0.5
    for index in range(latents):
        encoder.conv_out.weight[index, index, 1, 1] = divided_by * scale
        encoder.conv_out.weight[index, latents + index, 1, 1] = -divided_by * scale
    encoder.conv_out.bias[latents:] = -20.0  # log variance: nothing is drawn
    vae.quant_conv.weight.copy_(torch.eye(2 * latents)[:, :, None, None])
    vae.quant_conv.bias.zero_()


@torch.no_grad()
def linear_encoder(vae: Any, tolerance: float = 4e-3) -> Callable[[Tensor], Tensor] | None:
    """``vae.encode(pixels).latent_dist.mode()`` as one matrix, a hundred times faster, when that is what it is.

    The matrix is fitted to what the module makes of noise and has to foretell other noise within ``tolerance`` (what
    bfloat16 rounds away) of its mean square root; else None. The function takes (B, 3, H, W) in -1..1 and gives
    (B, latents, H / 8, W / 8), float32.
    """
    generator = torch.Generator().manual_seed(0)
    known, other = (torch.rand(1, 3, 256, 256, generator=generator) * 2 - 1 for _ in range(2))
    device = next(vae.parameters()).device

    def rows(latents: Tensor) -> Tensor:
        return latents.permute(0, 2, 3, 1).flatten(0, 2)

    def encoded(pixels: Tensor) -> Tensor:
        return rows(vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float().cpu())

    def with_one(pixels: Tensor) -> Tensor:
        patches = rows(patches_of(pixels))
        return torch.cat([patches, patches.new_ones(len(patches), 1)], dim=1)

    if vae.config.norm_num_groups != 1:  # no need to try a published one
        return None
    matrix = torch.linalg.lstsq(with_one(known).double(), encoded(known).double()).solution
    wanted = encoded(other).double()
    error = (with_one(other).double() @ matrix - wanted).square().mean().sqrt()
    if not error <= tolerance * wanted.square().mean().sqrt():
        return None
    weight, bias = matrix[:-1].T.float().contiguous(), matrix[-1].float()

    def encode(pixels: Tensor) -> Tensor:
        patches = patches_of(pixels.float())
        return torch.einsum("lp,bphw->blhw", weight, patches) + bias.view(1, -1, 1, 1)

    return encode


def _key(background: Sequence[float]) -> Tensor:
    return torch.tensor(background, dtype=torch.float32) * 2 - 1
