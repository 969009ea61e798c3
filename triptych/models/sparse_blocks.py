"""Blocks of the structured-latent networks, on sparse tensors.

Module trees, state-dict keys and arithmetic are those of TRELLIS (arXiv 2412.01506), so that published weights load
with strict=True and give the same numbers. N rows (voxels), C channels, B samples.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse.attention import full_attention, windowed_attention
from ..sparse.conv import SparseConv3d
from ..sparse.norm import SparseGroupNorm32
from ..sparse.spatial import downsample, upsample
from ..sparse.tensor import SparseTensor
from .blocks import FeedForwardNet, LayerNorm32, ModulatedTransformerCrossBlock, MultiHeadRMSNorm, modulate, runs_of


class SparseSelfAttention(nn.Module):
    """Self-attention of (N, C) rows inside each sample ("full") or each window of each sample ("windowed")."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        attn_mode: str = "full",
        window_size: int | None = None,
        shift_window: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        qk_rms_norm: bool = False,
    ):
        super().__init__()
        if attn_mode not in ("full", "windowed"):
            raise ValueError(f"attn_mode is {attn_mode!r}: 'full' and 'windowed' exist")
        if attn_mode == "windowed" and window_size is None:
            raise ValueError("windowed attention needs a window_size")
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.heads = (num_heads, channels // num_heads)
        self.window_size = window_size if attn_mode == "windowed" else None
        self.shift_window = shift_window
        self.qk_rms_norm = qk_rms_norm
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        if qk_rms_norm:
            self.q_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
            self.k_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        qkv = self.to_qkv(x.feats).unflatten(-1, (3, *self.heads))
        if self.qk_rms_norm:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([self.q_rms_norm(q), self.k_rms_norm(k), v], dim=1)
        if self.window_size is None:
            h = full_attention(qkv, x)
        else:
            h = windowed_attention(qkv, x, self.window_size, self.shift_window)
        return x.replace(self.to_out(h.flatten(1)))


class SparseTransformerBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm (without affine parameters unless ln_affine) and added to x."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attn_mode: str = "full",
        window_size: int | None = None,
        shift_window: int | Sequence[int] = 0,
        qk_rms_norm: bool = False,
        qkv_bias: bool = True,
        ln_affine: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.norm1 = LayerNorm32(channels, elementwise_affine=ln_affine, eps=1e-6)
        self.norm2 = LayerNorm32(channels, elementwise_affine=ln_affine, eps=1e-6)
        self.attn = SparseSelfAttention(
            channels, num_heads, attn_mode, window_size, shift_window, qkv_bias=qkv_bias, qk_rms_norm=qk_rms_norm
        )
        self.mlp = FeedForwardNet(channels, mlp_ratio=mlp_ratio)

    def forward(self, x: SparseTensor) -> SparseTensor:
        _check_channels(x, self.channels, "the block")
        x = x + self.attn(x.replace(self.norm1(x.feats)))
        return x.replace(x.feats + self.mlp(self.norm2(x.feats)))


class ModulatedSparseTransformerCrossBlock(ModulatedTransformerCrossBlock):
    """The modulated block with full self-attention per sample; keys and arithmetic are those of the dense block."""

    def forward(self, x: SparseTensor, mod: Tensor, context: Tensor) -> SparseTensor:  # type: ignore[override]
        """x (N, C), mod (B, C) (or (B, 6C) with share_mod), context (B, M, Cc)."""
        if context.dim() != 3 or len(context) != x.batch_size or len(mod) != x.batch_size:
            shapes = f"context {tuple(context.shape)} and mod {tuple(mod.shape)}"
            raise ValueError(f"{shapes} must have one row for each of the {x.batch_size} samples")
        runs = runs_of(x.counts, [context.shape[1]] * x.batch_size)
        return x.replace(self.forward_runs(x.feats, mod, context.flatten(0, 1), runs))


class SparseResBlock3d(nn.Module):
    """Two 3x3x3 convolutions modulated by an embedding, with a skip; resampled by 2 first where asked.

    Upsampling returns to the voxels that the input was downsampled from.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        out_channels: int | None = None,
        downsample: bool = False,
        upsample: bool = False,
    ):
        super().__init__()
        if downsample and upsample:
            raise ValueError("a block cannot downsample and upsample at once")
        out_channels = out_channels or channels
        self.channels = channels
        self.downsample = downsample
        self.upsample = upsample
        self.norm1 = LayerNorm32(channels, elementwise_affine=True, eps=1e-6)
        self.norm2 = LayerNorm32(out_channels, elementwise_affine=False, eps=1e-6)
        self.conv1 = SparseConv3d(channels, out_channels, 3)
        self.conv2 = SparseConv3d(out_channels, out_channels, 3)
        _zero(self.conv2)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Linear(channels, out_channels)

    def forward(self, x: SparseTensor, emb: Tensor) -> SparseTensor:
        """x (N, channels), emb (B, emb_channels) -> (M, out_channels)."""
        _check_channels(x, self.channels, "the block")
        if len(emb) != x.batch_size:
            raise ValueError(f"emb {tuple(emb.shape)} must have one row for each of the {x.batch_size} samples")
        x = self._resample(x)
        scale, shift = self.emb_layers(emb).chunk(2, dim=1)
        h = self.conv1(x.replace(F.silu(self.norm1(x.feats))))
        runs = runs_of(x.counts, [1] * x.batch_size)
        modulated = modulate(self.norm2(h.feats), shift.type(h.dtype), scale.type(h.dtype), runs)
        h = self.conv2(h.replace(F.silu(modulated)))
        return h.replace(h.feats + self.skip_connection(x.feats))

    def _resample(self, x: SparseTensor) -> SparseTensor:
        if self.downsample:
            return downsample(x, 2)
        if self.upsample:
            if x.finer is None:
                raise ValueError(f"{x} does not come from downsampling: it cannot be upsampled")
            return upsample(x, x.finer.voxels)
        return x


class SparseSubdivideBlock3d(nn.Module):
    """Each voxel becomes 8: norm, SiLU, subdivision, then two 3x3x3 convolutions and a skip.

    `resolution` is the side of the input's grid. Both convolutions next to the subdivision are computed before
    it: the skip at an eighth, the first 3x3x3 at 8/27 of the arithmetic.
    """

    def __init__(self, channels: int, resolution: int, out_channels: int | None = None, num_groups: int = 32):
        super().__init__()
        out_channels = out_channels or channels
        self.channels = channels
        self.resolution = resolution
        self.act_layers = nn.Sequential(SparseGroupNorm32(num_groups, channels), SparseSiLU())
        first, last = SparseConv3d(channels, out_channels, 3), SparseConv3d(out_channels, out_channels, 3)
        self.out_layers = nn.Sequential(first, SparseGroupNorm32(num_groups, out_channels), SparseSiLU(), last)
        _zero(last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else SparseConv3d(channels, out_channels, 1)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """(N, channels) -> (8 N, out_channels) on voxels of half the side."""
        _check_channels(x, self.channels, "the block")
        skip = self.skip_connection(x).feats.repeat_interleave(8, dim=0)
        first, *rest = self.out_layers
        h = cast(SparseConv3d, first).forward_subdivided(self.act_layers(x))
        for layer in rest:
            h = layer(h)
        return h.replace(h.feats + skip)


class SparseSiLU(nn.Module):
    def forward(self, x: SparseTensor) -> SparseTensor:
        return x.replace(F.silu(x.feats))


def _zero(conv: SparseConv3d) -> None:
    """Start a residual branch at nothing."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)


def _check_channels(x: SparseTensor, channels: int, what: str) -> None:
    if x.feats.dim() != 2 or x.feats.shape[1] != channels:
        raise ValueError(f"{what} takes feats (N, {channels}), not {tuple(x.feats.shape)}")
