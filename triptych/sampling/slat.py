"""Structured latents at the two ends of the sampler: noise on the voxels of a structure, and their own scale.

The sampler itself is `flow_euler_sample`: noise made here is a SparseTensor, the latent flow takes and returns one, and
everything said there (guidance, several pictures, cancelling) holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import TriptychError
from ..sparse.tensor import SparseTensor

MAX_VOXELS = 100_000  # attention over all tokens of a sample grows with their square


def slat_noise(
    coords: Tensor,
    channels: int,
    resolution: int,
    *,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    max_voxels: int = MAX_VOXELS,
) -> SparseTensor:
    """Standard normal (N, channels) float32 on occupied voxels, coords (N, 4) int32 rows (sample, x, y, z).

    Drawn on the CPU and moved to the device of coords, so that a seed means the same everywhere. Raises TriptychError
    for coordinates off the grid or out of order, for a sample without voxels, and for more than max_voxels in one.
    """
    try:
        empty = SparseTensor(torch.empty(len(coords), 0, device=coords.device), coords, batch_size, resolution)
    except ValueError as error:
        raise TriptychError(f"the structure does not fit the latent flow's grid of {resolution}^3: {error}") from error
    counts = empty.counts
    if not counts or not min(counts):
        which = f"sample {counts.index(0)} of the structure" if counts else "the structure"
        raise TriptychError(f"{which} has no occupied voxel: check the pictures' masks, or try another seed")
    if max(counts) > max_voxels:
        raise TriptychError(
            f"the structure has {max(counts)} occupied voxels, more than {max_voxels}: it is probably noise, "
            "so try another seed or clearer pictures, or raise max_voxels"
        )
    noise = torch.randn(len(coords), channels, generator=generator)
    return empty.replace(noise.to(coords.device))


def denormalize_slat(x: SparseTensor, mean: Sequence[float], std: Sequence[float]) -> SparseTensor:
    """Sampled latents -> the decoders' scale, x * std + mean, one number for each channel."""
    return x.replace(x.feats * x.feats.new_tensor(std) + x.feats.new_tensor(mean))


def normalize_slat(x: SparseTensor, mean: Sequence[float], std: Sequence[float]) -> SparseTensor:
    """The inverse of `denormalize_slat`: encoded latents -> what the flow is trained on."""
    return x.replace((x.feats - x.feats.new_tensor(mean)) / x.feats.new_tensor(std))
