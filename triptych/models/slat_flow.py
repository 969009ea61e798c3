"""The latent flow: a transformer predicts the velocity of structured latents on given voxels (TRELLIS, 2412.01506).

`forward` is `embed` (`enter` -> `down`) -> `run_blocks` -> `head` (`up` -> `leave`). With patch size 2 residual blocks
of sparse convolutions merge up to 2^3 voxels into one token and back, with skip connections across the torso. A
subclass may add to the voxels between `enter` and `down`, or to the tokens between `embed` and `run_blocks`.

Attention goes over all tokens of a sample; samples of a batch may have any number of voxels. Sampling: pass the noise
as a SparseTensor to `flow_euler_sample`; all steps then share the maps that depend on the voxels alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse.tensor import SparseTensor
from .blocks import (
    AbsolutePositionEmbedder,
    ModulatedTransformerCrossBlock,
    TimestepEmbedder,
    initialize_flow,
    runs_of,
)
from .sparse_blocks import SparseResBlock3d
from .torso import Torso, call, call_sparse


class SLatFlowModel(Torso):
    """Velocity of latents (N, in_channels) -> (N, out_channels).

    io_block_channels: widths from the voxels on, one for each halving of the grid (2^len = patch_size).
    num_io_res_blocks: residual blocks at each width, of which one resamples. share_mod, qk_rms_norm_cross: as in the
    structure flow; io blocks are modulated by the time embedding itself either way.
    """

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        cond_channels: int,
        out_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4,
        patch_size: int = 2,
        num_io_res_blocks: int = 2,
        io_block_channels: Sequence[int] | None = None,
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        use_skip_connection: bool = True,
        share_mod: bool = False,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
    ):
        super().__init__(use_checkpoint)
        if pe_mode != "ape":
            raise ValueError(f"pe_mode {pe_mode!r} is not supported: use 'ape'")
        widths = list(io_block_channels or [])
        if 2 ** len(widths) != patch_size:
            raise ValueError(f"patch_size {patch_size} does not fit io_block_channels {widths}: one width per halving")
        self.resolution = resolution
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.patch_size = patch_size
        self.share_mod = share_mod
        self.use_skip_connection = use_skip_connection

        self.t_embedder = TimestepEmbedder(model_channels)
        if share_mod:
            self.adaLN_modulation: nn.Module = nn.Sequential(nn.SiLU(), nn.Linear(model_channels, 6 * model_channels))
        self.pos_embedder = AbsolutePositionEmbedder(model_channels)
        outer = widths[0] if widths else model_channels
        self.input_layer = nn.Linear(in_channels, outer)
        self.input_blocks = nn.ModuleList()
        halvings = list(pairwise([*widths, model_channels]))
        for width, inner in halvings:
            self.input_blocks.extend(SparseResBlock3d(width, model_channels) for _ in range(num_io_res_blocks - 1))
            self.input_blocks.append(SparseResBlock3d(width, model_channels, out_channels=inner, downsample=True))
        self.blocks = nn.ModuleList(
            ModulatedTransformerCrossBlock(
                channels=model_channels,
                ctx_channels=cond_channels,
                num_heads=num_heads or model_channels // num_head_channels,
                mlp_ratio=mlp_ratio,
                qk_rms_norm=qk_rms_norm,
                qk_rms_norm_cross=qk_rms_norm_cross,
                share_mod=share_mod,
            )
            for _ in range(num_blocks)
        )
        self.out_blocks = nn.ModuleList()
        joined = 2 if use_skip_connection else 1
        for width, inner in reversed(halvings):
            self.out_blocks.append(SparseResBlock3d(inner * joined, model_channels, out_channels=width, upsample=True))
            self.out_blocks.extend(
                SparseResBlock3d(width * joined, model_channels, out_channels=width)
                for _ in range(num_io_res_blocks - 1)
            )
        self.out_layer = nn.Linear(outer, out_channels)
        initialize_flow(self)
        if use_fp16:
            self.convert_to(torch.float16)

    def torso_blocks(self) -> list[nn.Module]:
        """The transformer blocks come first: each keeps several times as much as a residual block."""
        return [*self.blocks, *self.input_blocks, *self.out_blocks]

    def forward(self, x: SparseTensor, t: Tensor, cond: Tensor) -> SparseTensor:
        """Velocity (N, out_channels) at x (N, in_channels), on the voxels of x.

        t (B,) is the flow time in [0, 1] multiplied by 1000; cond (B, tokens, cond_channels). Raises ValueError where
        channels or samples disagree.
        """
        if x.feats.shape[1:] != (self.in_channels,):
            raise ValueError(f"features are {tuple(x.feats.shape)}, expected (N, {self.in_channels})")
        if len(t) != x.batch_size or len(cond) != x.batch_size:
            raise ValueError(f"{len(t)} times and {len(cond)} conditions for {x.batch_size} samples: give one of each")
        t_emb = self.t_embedder(t)
        h, skips = self.embed(x, t_emb)
        h = self.run_blocks(h, t_emb, cond)
        return self.head(h, skips, t_emb).type(x.dtype)

    def embed(self, x: SparseTensor, t_emb: Tensor) -> tuple[SparseTensor, list[SparseTensor]]:
        """Voxels (N, in_channels) -> tokens (T, C) with positions, and what `head` needs of the way there."""
        return self.down(self.enter(x), t_emb)

    def run_blocks(
        self,
        h: SparseTensor,
        t_emb: Tensor,
        context: Tensor,
        context_lengths: Sequence[int] | None = None,
    ) -> SparseTensor:
        """The torso on tokens (T, C); t_emb (B, C).

        context: (B, M, Cc), or packed (1, sum(context_lengths), Cc) with one length per sample.
        """
        if context_lengths is None:
            context_lengths = [context.shape[1]] * context.shape[0]
        elif sum(context_lengths) != context.shape[0] * context.shape[1]:
            raise ValueError(f"context lengths add up to {sum(context_lengths)}, the context is {tuple(context.shape)}")
        runs, dtype, recomputed = runs_of(h.counts, context_lengths), self.torso_dtype(h.device), self.recomputed()
        mod = (self.adaLN_modulation(t_emb) if self.share_mod else t_emb).type(dtype)
        tokens, context = h.feats.type(dtype), context.flatten(0, 1).type(dtype)
        for block in cast("list[ModulatedTransformerCrossBlock]", self.blocks):
            tokens = call(block in recomputed, block.forward_runs, tokens, mod, context, runs)
        return h.replace(tokens)

    def head(self, h: SparseTensor, skips: Sequence[SparseTensor], t_emb: Tensor) -> SparseTensor:
        """Tokens (T, C) -> voxels (N, out_channels), float32."""
        return self.leave(self.up(h, skips, t_emb))

    # ---- between voxels and tokens

    def enter(self, x: SparseTensor) -> SparseTensor:
        """Voxels (N, in_channels) -> (N, io_block_channels[0]), or (N, C) without io blocks."""
        return x.replace(self.input_layer(x.feats.type(self.input_layer.weight.dtype)))

    def down(self, h: SparseTensor, t_emb: Tensor) -> tuple[SparseTensor, list[SparseTensor]]:
        """The voxels of `enter` -> tokens with positions, and the output of every input block."""
        dtype, recomputed = self.torso_dtype(h.device), self.recomputed()
        h, emb = h.type(dtype), t_emb.type(dtype)
        skips: list[SparseTensor] = []
        for block in self.input_blocks:
            h = call_sparse(block in recomputed, block, h, emb)
            skips.append(h)
        return h.replace(h.feats + self.pos_embedder(h.coords[:, 1:]).type(dtype)), skips

    def up(self, h: SparseTensor, skips: Sequence[SparseTensor], t_emb: Tensor) -> SparseTensor:
        """Tokens -> voxels (N, io_block_channels[0]); the skips of `down` are joined in reverse."""
        recomputed, emb = self.recomputed(), t_emb.type(h.dtype)
        for block, skip in zip(self.out_blocks, reversed(skips), strict=True):
            if self.use_skip_connection:
                h = SparseTensor.cat_feats([h, skip])
            h = call_sparse(block in recomputed, block, h, emb)
        return h

    def leave(self, h: SparseTensor) -> SparseTensor:
        """Voxels (N, io_block_channels[0]) -> (N, out_channels), float32."""
        feats = h.feats.type(self.out_layer.weight.dtype)
        return h.replace(self.out_layer(F.layer_norm(feats, feats.shape[-1:])))
