"""Decoders of structured latents: a mesh field, Gaussians or a radiance field per voxel (TRELLIS, arXiv 2412.01506).

All share the torso of the encoder and end in one linear layer. The mesh decoder first subdivides its voxels, so that
each becomes the cubes in which FlexiCubes finds the surface. Module tree, state-dict keys and arithmetic are the
published ones. Turning features into a mesh is `geometry.flexicubes`'s work; rendering Gaussians or a radiance field is
not covered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse.tensor import SparseTensor
from .slat_encoder import SparseTransformer
from .sparse_blocks import SparseSubdivideBlock3d
from .torso import call_sparse

CUBE_CHANNELS = 53  # 8 sdf, 8 x 3 deformation, 21 FlexiCubes weights
COLOR_CHANNELS = 48  # 8 x 6: colour and normal of each corner


class SLatDecoderBase(SparseTransformer):
    """Latents (N, latent_channels) -> SparseTensor (N, out_channels) float32: torso, layer norm, one linear layer.

    A subclass gives out_channels, and may put layers of its own between the torso and the output.
    """

    def __init__(
        self,
        out_channels: int,
        resolution: int,
        model_channels: int,
        latent_channels: int,
        num_blocks: int,
        num_heads: int | None = None,
        num_head_channels: int = 64,
        mlp_ratio: float = 4.0,
        attn_mode: str = "swin",
        window_size: int = 8,
        pe_mode: str = "ape",
        use_checkpoint: bool = False,
        qk_rms_norm: bool = False,
        *,
        final_channels: int | None = None,
    ):
        super().__init__(
            latent_channels, model_channels, num_blocks, num_heads, num_head_channels, mlp_ratio, attn_mode,
            window_size, pe_mode, use_checkpoint, qk_rms_norm,
        )  # fmt: skip
        self.resolution = resolution
        self.out_channels = out_channels
        self.out_layer = nn.Linear(model_channels if final_channels is None else final_channels, out_channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Raw features (N, out_channels) float32 on the voxels of x."""
        feats = self.transform(x).feats.type(self.out_layer.weight.dtype)
        return x.replace(self.out_layer(F.layer_norm(feats, feats.shape[-1:])))


class SLatMeshDecoder(SLatDecoderBase):
    """Latents at R^3 -> FlexiCubes features (8^num_upsample N, 101) at (2^num_upsample R)^3; 53 without colour.

    Channels: sdf of the 8 corners, their deformation, 21 weights of the cube, then colour and normal of each corner.
    upsample_channels: width after each subdivision, published: model_channels / 4, / 8.
    """

    def __init__(
        self,
        resolution: int,
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
        representation_config: dict[str, Any] | None = None,
        num_upsample: int = 2,
        upsample_channels: Sequence[int] | None = None,
    ):
        use_color = bool((representation_config or {}).get("use_color", False))
        if upsample_channels is None:
            upsample_channels = [model_channels // 2 ** (i + 2) for i in range(num_upsample)]
        if len(upsample_channels) != num_upsample:
            raise ValueError(f"upsample_channels {list(upsample_channels)}: give one width for each of {num_upsample}")
        widths = [model_channels, *upsample_channels]
        super().__init__(
            CUBE_CHANNELS + COLOR_CHANNELS * use_color, resolution, model_channels, latent_channels, num_blocks,
            num_heads, num_head_channels, mlp_ratio, attn_mode, window_size, pe_mode, use_checkpoint, qk_rms_norm,
            final_channels=widths[-1],
        )  # fmt: skip
        self.use_color = use_color
        self.num_upsample = num_upsample
        self.upsample = nn.ModuleList(
            SparseSubdivideBlock3d(
                channels=width, resolution=resolution * 2**i, out_channels=inner, num_groups=gcd(32, width, inner)
            )
            for i, (width, inner) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.initialize_weights()
        if use_fp16:
            self.convert_to(torch.float16)

    def torso_blocks(self) -> list[nn.Module]:
        """The last subdivision comes first: it holds the most rows for each voxel."""
        return [*reversed(self.upsample), *self.blocks]

    def forward(self, x: SparseTensor) -> SparseTensor:
        """FlexiCubes features, float32; the 8 children of a voxel are neighbouring rows, z fastest."""
        h, recomputed = self.transform(x), self.recomputed()
        for block in self.upsample:
            h = call_sparse(block in recomputed, block, h)
        return h.replace(self.out_layer(h.feats.type(self.out_layer.weight.dtype)))


@dataclass(frozen=True)
class GaussianParameters:
    """Stored (before activation) parameters of one sample's G Gaussians, num_gaussians for each voxel in voxel order.

    xyz (G, 3): positions in the unit cube [0, 1]^3, z up; subtract 0.5 for world coordinates. features_dc (G, 1, 3):
    spherical harmonics of degree 0. scaling (G, 3), rotation (G, 4) quaternion w x y z, opacity (G, 1).
    """

    xyz: Tensor
    features_dc: Tensor
    scaling: Tensor
    rotation: Tensor
    opacity: Tensor


class SLatGaussianDecoder(SLatDecoderBase):
    """Latents -> raw Gaussian features; `gaussians` turns them into the stored parameters of each sample.

    representation_config: num_gaussians per voxel, voxel_size (reach of an offset, in half voxels), perturb_offset (a
    fixed spread of the offsets), lr (a gain for each field: _xyz, _features_dc, _scaling, _rotation, _opacity).
    """

    def __init__(
        self,
        resolution: int,
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
        representation_config: dict[str, Any] | None = None,
    ):
        config = representation_config or {}
        if missing := {"num_gaussians", "voxel_size", "lr"} - config.keys():
            raise ValueError(f"representation_config lacks {', '.join(sorted(missing))}")
        count = config["num_gaussians"]
        self.layout = {
            "_xyz": (count, 3),
            "_features_dc": (count, 1, 3),
            "_scaling": (count, 3),
            "_rotation": (count, 4),
            "_opacity": (count, 1),
        }
        super().__init__(
            sum(map(prod, self.layout.values())), resolution, model_channels, latent_channels, num_blocks, num_heads,
            num_head_channels, mlp_ratio, attn_mode, window_size, pe_mode, use_checkpoint, qk_rms_norm,
        )  # fmt: skip
        self.representation_config = config
        perturbation = offset_perturbation(count, config["voxel_size"]) if config.get("perturb_offset") else None
        self.register_buffer("offset_perturbation", perturbation)
        self.offset_perturbation: Tensor | None
        self.initialize_weights()
        if use_fp16:
            self.convert_to(torch.float16)

    def gaussians(self, x: SparseTensor) -> list[GaussianParameters]:
        """The Gaussians of each sample from the raw features (N, out_channels) that `forward` gave."""
        fields = x.feats.split([prod(shape) for shape in self.layout.values()], dim=1)
        lr = self.representation_config["lr"]
        named = {
            name: field.unflatten(1, shape) * lr[name]
            for (name, shape), field in zip(self.layout.items(), fields, strict=True)
        }
        offset = named["_xyz"] if self.offset_perturbation is None else named["_xyz"] + self.offset_perturbation
        reach = 0.5 * self.representation_config["voxel_size"] / self.resolution
        centre = (x.coords[:, 1:].to(offset.dtype) + 0.5) / self.resolution
        named["_xyz"] = centre[:, None] + torch.tanh(offset) * reach
        return [
            GaussianParameters(**{name[1:]: field[rows].flatten(0, 1) for name, field in named.items()})
            for rows in x.layout
        ]


class SLatRadianceFieldDecoder(SLatDecoderBase):
    """Latents -> raw features of a radiance field: rank x 3 x dim axis vectors, rank densities, rank x 3 colours."""

    def __init__(
        self,
        resolution: int,
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
        representation_config: dict[str, Any] | None = None,
    ):
        config = representation_config or {}
        if missing := {"rank", "dim"} - config.keys():
            raise ValueError(f"representation_config lacks {', '.join(sorted(missing))}")
        super().__init__(
            config["rank"] * (3 * config["dim"] + 1 + 3), resolution, model_channels, latent_channels, num_blocks,
            num_heads, num_head_channels, mlp_ratio, attn_mode, window_size, pe_mode, use_checkpoint, qk_rms_norm,
        )  # fmt: skip
        self.initialize_weights()
        if use_fp16:
            self.convert_to(torch.float16)


def offset_perturbation(count: int, voxel_size: float) -> Tensor:
    """(count, 3) float32: what spreads the offsets of a voxel's Gaussians at first, a Hammersley set before tanh."""
    points = [[i / count, _radical_inverse(i, 2), _radical_inverse(i, 3)] for i in range(count)]
    return torch.atanh((torch.tensor(points) * 2 - 1) / voxel_size)


def _radical_inverse(number: int, base: int) -> float:
    """The digits of `number` mirrored at the point."""
    value, digit = 0.0, 1 / base
    while number:
        number, remainder = divmod(number, base)
        value += remainder * digit
        digit /= base
    return value
