"""The structure flow: a transformer predicts the velocity of the 16^3 structure latent (TRELLIS, arXiv 2412.01506).

`forward` is `embed` -> `run_blocks` -> `head` -> `to_grid`. A subclass may add to the tokens between the first two
(per-token conditioning), or keep only some tokens of each sample and run them packed (`lengths`).
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .blocks import (
    AbsolutePositionEmbedder,
    ModulatedTransformerCrossBlock,
    TimestepEmbedder,
    batch_runs,
    initialize_flow,
    set_torso_dtype,
)


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, X, Y, Z) -> (B, C * p^3, X/p, Y/p, Z/p): a patch becomes channels, ordered (C, px, py, pz)."""
    p = patch_size
    batch, channels, *sizes = x.shape
    if any(n % p for n in sizes):
        raise ValueError(f"a grid of {tuple(sizes)} does not divide into patches of {p}")
    nx, ny, nz = (n // p for n in sizes)
    parts = x.reshape(batch, channels, nx, p, ny, p, nz, p).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return parts.reshape(batch, channels * p**3, nx, ny, nz)


def unpatchify(x: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, C * p^3, X, Y, Z) -> (B, C, pX, pY, pZ)."""
    p = patch_size
    batch, channels, nx, ny, nz = x.shape
    if channels % p**3:
        raise ValueError(f"{channels} channels do not divide into patches of {p}^3")
    parts = x.reshape(batch, channels // p**3, p, p, p, nx, ny, nz).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return parts.reshape(batch, channels // p**3, nx * p, ny * p, nz * p)


class SparseStructureFlowModel(nn.Module):
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
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        share_mod: bool = False,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
    ):
        super().__init__()
        if pe_mode != "ape":
            raise ValueError(f"pe_mode {pe_mode!r} is not supported: use 'ape'")
        if resolution % patch_size:
            raise ValueError(f"resolution {resolution} is not divisible by patch_size {patch_size}")
        self.resolution = resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.patch_size = patch_size
        self.use_checkpoint = use_checkpoint
        self.recompute_blocks: int | None = None  # this many of the first blocks; None: as use_checkpoint says
        self.share_mod = share_mod
        self.dtype = torch.float32

        self.t_embedder = TimestepEmbedder(model_channels)
        if share_mod:
            self.adaLN_modulation: nn.Module = nn.Sequential(nn.SiLU(), nn.Linear(model_channels, 6 * model_channels))
        axis = torch.arange(resolution // patch_size)
        coords = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(-1, 3)
        self.register_buffer("pos_emb", AbsolutePositionEmbedder(model_channels)(coords))
        self.pos_emb: Tensor
        self.input_layer = nn.Linear(in_channels * patch_size**3, model_channels)
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
        self.out_layer = nn.Linear(model_channels, out_channels * patch_size**3)
        initialize_flow(self)
        if use_fp16:
            self.convert_to(torch.float16)

    def convert_to(self, dtype: torch.dtype) -> None:
        """Linear layers of the blocks to `dtype`; norms, gammas, embedders, input and output layers stay float32."""
        self.dtype = dtype
        set_torso_dtype(self.blocks, dtype)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity (B, out_channels, R, R, R) at x (B, in_channels, R, R, R).

        t (B,) is the flow time in [0, 1] multiplied by 1000; cond (B, tokens, cond_channels).
        """
        expected = (self.in_channels, *[self.resolution] * 3)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x is {tuple(x.shape)}, expected (B, {', '.join(map(str, expected))})")
        h = self.embed(x)
        h = self.run_blocks(h, self.t_embedder(t), cond)
        return self.to_grid(self.head(h).type(x.dtype))

    def embed(self, x: Tensor) -> Tensor:
        """(B, in_channels, R, R, R) -> tokens (B, (R/p)^3, C) with positions; z is the fastest axis."""
        tokens = patchify(x, self.patch_size).flatten(2).transpose(1, 2)
        return self.input_layer(tokens) + self.pos_emb

    def run_blocks(
        self,
        h: Tensor,
        t_emb: Tensor,
        context: Tensor,
        lengths: Sequence[int] | None = None,
        context_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """The torso on a dense (B, L, C) or packed (1, sum(lengths), C) batch; t_emb (B, C). As the block's forward."""
        runs = batch_runs(h, context, lengths=lengths, context_lengths=context_lengths)
        dtype = self.torso_dtype(h.device)
        mod = (self.adaLN_modulation(t_emb) if self.share_mod else t_emb).type(dtype)
        tokens, context = h.flatten(0, 1).type(dtype), context.flatten(0, 1).type(dtype)
        every = len(self.blocks) if self.use_checkpoint else 0
        count = every if self.recompute_blocks is None else self.recompute_blocks
        recomputed = count if self.training and torch.is_grad_enabled() else 0
        for number, block in enumerate(cast("list[ModulatedTransformerCrossBlock]", self.blocks)):
            if number < recomputed:
                tokens = checkpoint(block.forward_runs, tokens, mod, context, runs, use_reentrant=False)
            else:
                tokens = block.forward_runs(tokens, mod, context, runs)
        return tokens.view(h.shape)

    def torso_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the residual stream: as published that of the torso's weights, under autocast autocast's own.

        A float32 stream would turn every norm, modulation and gate under autocast into float32 traffic and casts.
        """
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype

    def head(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., out_channels * p^3) per token."""
        return self.out_layer(F.layer_norm(h.float(), h.shape[-1:]))

    def to_grid(self, tokens: Tensor) -> Tensor:
        """(B, (R/p)^3, out_channels * p^3) -> (B, out_channels, R, R, R)."""
        side = self.resolution // self.patch_size
        return unpatchify(tokens.transpose(1, 2).unflatten(2, (side, side, side)), self.patch_size).contiguous()
