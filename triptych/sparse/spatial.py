"""Changing the resolution of sparse tensors: downsample, upsample (its way back), subdivide.

A tensor made by `downsample` remembers the finer voxels it came from, so `upsample` returns to exactly those rows. A
tensor made by `subdivide` remembers the voxels it divides, from which its neighbour table follows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .tensor import Finer, SparseTensor


def downsample(x: SparseTensor, factor: int, include_self: bool = True) -> SparseTensor:
    """Voxels of `factor` times the side: features (M, ...) = sum over the children / (children + 1).

    The extra one in the divisor is what TRELLIS-1 weights were trained with; include_self=False gives the true mean.
    Rows come out sorted by (sample, x, y, z). The coarse voxels and all maps on them are computed once per x's voxels.
    """
    if factor < 1:
        raise ValueError(f"factor is {factor}: downsample takes 1 or more")
    coords, rows, children, maps = x.cached(("downsample", factor), lambda: _coarse(x, factor))
    sums = x.feats.new_zeros(len(coords), *x.feats.shape[1:]).index_add(0, rows, x.feats)
    divisor = (children + 1 if include_self else children).type(x.dtype)
    resolution = None if x.resolution is None else -(-x.resolution // factor)
    finer = Finer(x.voxels(), rows, factor)
    feats = sums / divisor.view(-1, *[1] * (sums.dim() - 1))
    return SparseTensor(feats, coords, x.batch_size, resolution, check=False, maps=maps, finer=finer)


def _coarse(x: SparseTensor, factor: int) -> tuple[Tensor, Tensor, Tensor, dict[Any, Any]]:
    """Coarse coords (M, 4) sorted, the coarse row of each fine row, the children of each coarse row, empty maps."""
    coarse = torch.cat([x.coords[:, :1], x.coords[:, 1:].div(factor, rounding_mode="floor")], dim=1).long()
    side = int(coarse[:, 1:].max()) + 1 if len(coarse) else 1
    b, i, j, k = coarse.unbind(1)
    keys, rows, children = torch.unique(((b * side + i) * side + j) * side + k, return_inverse=True, return_counts=True)
    b, i, j, k = keys // side**3, keys // side**2 % side, keys // side % side, keys % side
    return torch.stack([b, i, j, k], dim=1).int(), rows, children, {}


def upsample(x: SparseTensor, fine: SparseTensor, factor: int | None = None) -> SparseTensor:
    """The features of x on the rows of `fine`, each from the coarse voxel it lies in.

    Without `factor`, x must come from `downsample` of these voxels. With it, any x whose voxels are exactly those of
    `downsample(fine, factor)`. Raises ValueError otherwise.
    """
    finer = x.finer
    if finer is not None and finer.voxels.same_voxels(fine):
        return fine.replace(x.feats[finer.rows])
    if factor is None:
        raise ValueError(f"{x} was not downsampled from {fine}: give upsample the factor between them")
    coords, rows, _, _ = fine.cached(("downsample", factor), lambda: _coarse(fine, factor))
    if not torch.equal(coords, x.coords):
        raise ValueError(f"{x} does not have the voxels of {fine} downsampled by {factor}, in sorted order")
    return fine.replace(x.feats[rows])


def subdivide(x: SparseTensor) -> SparseTensor:
    """Every voxel becomes its 8 halves: coordinates 2 c + (0 or 1), z fastest, features repeated (nearest)."""
    child = torch.cartesian_prod(*[torch.arange(2, dtype=torch.int32, device=x.device)] * 3)
    children = (2 * x.coords[:, None, 1:] + child).flatten(0, 1)
    coords = torch.cat([x.coords[:, :1].repeat_interleave(8, dim=0), children], dim=1)
    resolution = None if x.resolution is None else 2 * x.resolution
    maps = {"parent": x.voxels(), "counts": [8 * count for count in x.counts]}
    feats = x.feats.repeat_interleave(8, dim=0)
    return SparseTensor(feats, coords, x.batch_size, resolution, check=False, maps=maps)


class SparseDownsample(nn.Module):
    def __init__(self, factor: int, include_self: bool = True):
        super().__init__()
        self.factor = factor
        self.include_self = include_self

    def forward(self, x: SparseTensor) -> SparseTensor:
        return downsample(x, self.factor, self.include_self)


class SparseUpsample(nn.Module):
    """Back to the voxels that x was downsampled from, by the same factor."""

    def __init__(self, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: SparseTensor) -> SparseTensor:
        if x.finer is None or x.finer.factor != self.factor:
            came = "not from downsampling" if x.finer is None else f"from downsampling by {x.finer.factor}"
            raise ValueError(f"{x} comes {came}: it cannot be upsampled by {self.factor}")
        return upsample(x, x.finer.voxels)


class SparseSubdivide(nn.Module):
    def forward(self, x: SparseTensor) -> SparseTensor:
        return subdivide(x)
