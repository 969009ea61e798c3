"""Structured latents from voxel features, with windowed attention on the occupied voxels (TRELLIS, arXiv 2412.01506).

`SparseTransformer` is the torso of the encoder and of every decoder: attention inside windows of 8^3 voxels, shifted by
half a window in every other block, on features that know their absolute position. Module tree, state-dict keys and
arithmetic are the published ones. Losses belong to the trainer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse.tensor import SparseTensor
from .blocks import AbsolutePositionEmbedder
from .sparse_blocks import SparseTransformerBlock
from .torso import Torso, call_sparse

_BLOCK_MODES = {"full": "full", "swin": "windowed"}


class SparseTransformer(Torso):
    """Voxel features (N, in_channels) -> (N, model_channels) on the same voxels."""

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4.0,
        attn_mode: str = "swin",
        window_size: int = 8,
        pe_mode: str = "ape",
        use_checkpoint: bool = False,
        qk_rms_norm: bool = False,
    ):
        super().__init__(use_checkpoint)
        if attn_mode not in _BLOCK_MODES:
            raise ValueError(f"attn_mode {attn_mode!r} is not supported: use one of {', '.join(_BLOCK_MODES)}")
        if pe_mode != "ape":
            raise ValueError(f"pe_mode {pe_mode!r} is not supported: use 'ape'")
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.pos_embedder = AbsolutePositionEmbedder(model_channels)
        self.input_layer = nn.Linear(in_channels, model_channels)
        self.blocks = nn.ModuleList(
            SparseTransformerBlock(
                channels=model_channels,
                num_heads=num_heads or model_channels // num_head_channels,
                mlp_ratio=mlp_ratio,
                attn_mode=_BLOCK_MODES[attn_mode],
                window_size=window_size,
                shift_window=window_size // 2 * (i % 2),
                qk_rms_norm=qk_rms_norm,
            )
            for i in range(num_blocks)
        )

    def torso_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def initialize_weights(self) -> None:
        """Xavier matrices and zero biases; the output layer, if there is one, starts at zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight) if name == "out_layer" else nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def transform(self, x: SparseTensor) -> SparseTensor:
        """x (N, in_channels) -> (N, model_channels) in the torso's dtype. Raises ValueError for other channels."""
        if x.feats.shape[1:] != (self.in_channels,):
            raise ValueError(f"features are {tuple(x.feats.shape)}, expected (N, {self.in_channels})")
        h = self.input_layer(x.feats.type(self.input_layer.weight.dtype)) + self.pos_embedder(x.coords[:, 1:])
        tokens, recomputed = x.replace(h.type(self.torso_dtype(x.device))), self.recomputed()
        for block in self.blocks:
            tokens = call_sparse(block in recomputed, block, tokens)
        return tokens


class SLatEncoder(SparseTransformer):
    """Voxel features (N, in_channels) -> structured latents (N, latent_channels) on the same voxels."""

    def __init__(
        self,
        resolution: int,
        in_channels: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4.0,
        attn_mode: str = "swin",
        window_size: int = 8,
        pe_mode: str = "ape",
        use_fp16: bool = False,
        use_checkpoint: bool = False,
        qk_rms_norm: bool = False,
    ):
        super().__init__(
            in_channels, model_channels, num_blocks, num_heads, num_head_channels, mlp_ratio, attn_mode, window_size,
            pe_mode, use_checkpoint, qk_rms_norm,
        )  # fmt: skip
        self.resolution = resolution
        self.latent_channels = latent_channels
        self.out_layer = nn.Linear(model_channels, 2 * latent_channels)
        self.initialize_weights()
        if use_fp16:
            self.convert_to(torch.float16)

    def forward(
        self,
        x: SparseTensor,
        sample_posterior: bool = False,
        return_raw: bool = False,
        *,
        generator: torch.Generator | None = None,
        eps: Tensor | None = None,
    ) -> SparseTensor | tuple[SparseTensor, Tensor, Tensor]:
        """The latents: the posterior's mean, or a sample of it; with `return_raw` (latents, mean, logvar), (N, C) each.

        `eps` (N, C) gives the standard normal draw of a sample; without it `generator` (or torch's own) draws it.
        """
        h = self.transform(x).feats.type(self.out_layer.weight.dtype)
        moments: Tensor = self.out_layer(F.layer_norm(h, h.shape[-1:]))
        mean, logvar = moments.chunk(2, dim=1)
        z = mean
        if sample_posterior:
            if eps is None:
                eps = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
            z = mean + torch.exp(0.5 * logvar) * eps
        latents = x.replace(z)
        return (latents, mean, logvar) if return_raw else latents
