"""The structure VAE: a 64^3 occupancy grid <-> a 16^3 latent, with 3D convolutions (TRELLIS, arXiv 2412.01506).

Module tree, state-dict keys and arithmetic are the published ones. On CPUs the grids run in channels-last memory: there
the channel norm needs no copies and bfloat16 convolutions reach several times the speed of contiguous ones.

The two networks only map numbers: thresholding (`occupied_coords`) is separate, losses belong to the trainer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import ChannelLayerNorm32, set_torso_dtype


def pixel_shuffle_3d(x: Tensor, scale_factor: int) -> Tensor:
    """(B, C * s^3, X, Y, Z) -> (B, C, sX, sY, sZ); a channel's s^3 parts are ordered z fastest.

    Written through the channels-last view, so that channels-last input gives channels-last output with a single copy.
    """
    s = scale_factor
    batch, channels, *sizes = x.shape
    if channels % s**3:
        raise ValueError(f"{channels} channels are not divisible by {s}^3")
    width = channels // s**3
    parts = x.movedim(1, -1).reshape(batch, *sizes, width, s, s, s).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parts.reshape(batch, *(s * n for n in sizes), width).movedim(-1, 1)


def zero_module(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock3d(nn.Module):
    def __init__(self, channels: int, out_channels: int | None = None):
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = ChannelLayerNorm32(channels)
        self.norm2 = ChannelLayerNorm32(out_channels)
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1)
        self.conv2 = zero_module(nn.Conv3d(out_channels, out_channels, 3, padding=1))
        self.skip_connection = nn.Conv3d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.skip_connection(x)


class DownsampleBlock3d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpsampleBlock3d(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, 8 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle_3d(self.conv(x), 2)


class _ConvTorso(nn.Module):
    """What encoder and decoder share: the memory layout, and low precision in the torso only."""

    blocks: nn.ModuleList
    middle_block: nn.Sequential
    input_layer: nn.Conv3d

    def convert_to(self, dtype: torch.dtype) -> None:
        """Convolutions of the torso to `dtype`; input layer, output layer and norms stay float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)
        set_torso_dtype(self.middle_block, dtype)

    def _enter(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.contiguous(memory_format=torch.channels_last_3d)
        return self.input_layer(x)


class SparseStructureEncoder(_ConvTorso):
    """Occupancy (B, in_channels, R, R, R) -> latent (B, latent_channels, r, r, r), r = R / 2^(len(channels) - 1)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: Sequence[int],
        num_res_blocks_middle: int = 2,
        use_fp16: bool = False,
    ):
        super().__init__()
        self.latent_channels = latent_channels
        self.dtype = torch.float32
        self.input_layer = nn.Conv3d(in_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.blocks.extend(ResBlock3d(width) for _ in range(num_res_blocks))
            if level + 1 < len(channels):
                self.blocks.append(DownsampleBlock3d(width, channels[level + 1]))
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[-1]) for _ in range(num_res_blocks_middle)))
        self.out_layer = nn.Sequential(
            ChannelLayerNorm32(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], 2 * latent_channels, 3, padding=1)
        )
        if use_fp16:
            self.convert_to(torch.float16)

    def forward(
        self,
        x: Tensor,
        sample_posterior: bool = False,
        return_raw: bool = False,
        *,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The latent: the posterior's mean, or a sample of it; with `return_raw` (latent, mean, logvar).

        `eps` gives the standard normal draw of a sample; without it `generator` (or torch's own) draws it.
        """
        h = self._enter(x).type(self.dtype)
        for block in self.blocks:
            h = block(h)
        h = self.middle_block(h)
        mean, logvar = self.out_layer(h.type(x.dtype)).chunk(2, dim=1)
        z = mean
        if sample_posterior:
            if eps is None:
                eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            z = mean + torch.exp(0.5 * logvar) * eps
        return (z, mean, logvar) if return_raw else z


class SparseStructureDecoder(_ConvTorso):
    """Latent (B, latent_channels, r, r, r) -> logits (B, out_channels, R, R, R), R = r * 2^(len(channels) - 1)."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        num_res_blocks: int,
        channels: Sequence[int],
        num_res_blocks_middle: int = 2,
        use_fp16: bool = False,
    ):
        super().__init__()
        self.dtype = torch.float32
        self.input_layer = nn.Conv3d(latent_channels, channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(*(ResBlock3d(channels[0]) for _ in range(num_res_blocks_middle)))
        self.blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            self.blocks.extend(ResBlock3d(width) for _ in range(num_res_blocks))
            if level + 1 < len(channels):
                self.blocks.append(UpsampleBlock3d(width, channels[level + 1]))
        self.out_layer = nn.Sequential(
            ChannelLayerNorm32(channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], out_channels, 3, padding=1)
        )
        if use_fp16:
            self.convert_to(torch.float16)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle_block(self._enter(z).type(self.dtype))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h.type(z.dtype))


def occupied_coords(logits: Tensor) -> Tensor:
    """(B, 1, R, R, R) logits -> (N, 4) int32 rows (batch, x, y, z) of the voxels above zero, in row-major order."""
    return torch.argwhere(logits > 0)[:, [0, 2, 3, 4]].int()
