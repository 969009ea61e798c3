"""Sparse voxel tensors: features on the occupied voxels of a batch of grids.

Rows of one sample are contiguous and samples come in order, so a sample is a slice (`layout`); rows inside a sample may
have any order. What depends only on the coordinates (neighbour tables of convolutions, maps of down- and upsampling,
window partitions) is computed once and kept in `maps`, which every tensor made by `replace` shares.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Finer(NamedTuple):
    """Where a downsampled tensor came from: the finer voxels, and the coarse row of each of their rows (N,) int64."""

    voxels: "SparseTensor"
    rows: Tensor
    factor: int


class SparseTensor:
    """feats (N, ...) with coords (N, 4) int32 rows (sample, x, y, z); treat it as immutable.

    `batch_size` counts samples, also empty ones; by default the last sample named plus one. `resolution` is the side of
    the grid, an exclusive bound of x, y, z, or None when unknown. Raises ValueError where rows, ranges or order are
    wrong; `check=False` skips the checks that must read the coordinates (they wait for the device). `finer` is set by
    downsampling. It is no part of `maps`, or the maps of the two resolutions would keep each other in memory.
    """

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        batch_size: int | None = None,
        resolution: int | None = None,
        *,
        check: bool = True,
        maps: dict[Any, Any] | None = None,
        finer: Finer | None = None,
    ):
        if coords.dim() != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
            raise ValueError(f"coords must be (N, 4) int32 rows (sample, x, y, z), not {_describe(coords)}")
        if feats.dim() < 1 or feats.shape[0] != coords.shape[0]:
            raise ValueError(f"feats {tuple(feats.shape)} must have one row for each of the {coords.shape[0]} coords")
        if feats.device != coords.device:
            raise ValueError(f"feats are on {feats.device}, coords on {coords.device}: move one")
        if batch_size is None:
            batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 0
        self.feats = feats
        self.coords = coords
        self.batch_size = batch_size
        self.resolution = resolution
        self.maps: dict[Any, Any] = {} if maps is None else maps
        self.finer = finer
        if check:
            _check_coords(coords, batch_size, resolution)

    # ---- what it holds

    @property
    def shape(self) -> torch.Size:
        """(samples, *feature sizes), the shape that batch-wise code expects; rows are `len(tensor)`."""
        return torch.Size([self.batch_size, *self.feats.shape[1:]])

    @property
    def device(self) -> torch.device:
        return self.feats.device

    @property
    def dtype(self) -> torch.dtype:
        return self.feats.dtype

    def __len__(self) -> int:
        return self.feats.shape[0]

    def __repr__(self) -> str:
        return f"SparseTensor(feats={_describe(self.feats)}, samples={self.batch_size}, resolution={self.resolution})"

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each sample."""
        return self.cached("counts", lambda: torch.bincount(self.coords[:, 0], minlength=self.batch_size).tolist())

    @cached_property
    def layout(self) -> list[slice]:
        """The rows of each sample as a slice."""
        ends = [0]
        for count in self.counts:
            ends.append(ends[-1] + count)
        return [slice(start, end) for start, end in zip(ends, ends[1:], strict=False)]

    def sample(self, index: int) -> "SparseTensor":
        """One sample as a tensor of its own (sample number 0), views of the features."""
        rows = self.layout[index]
        coords = self.coords[rows].clone()
        coords[:, 0] = 0
        return SparseTensor(self.feats[rows], coords, 1, self.resolution, check=False)

    def cached(self, key: Any, compute: Callable[[], Value]) -> Value:
        """`maps[key]`, computed on first use. The key names all that the value depends on besides the coordinates."""
        if key not in self.maps:
            self.maps[key] = compute()
        return self.maps[key]

    # ---- same voxels, other features

    def replace(self, feats: Tensor) -> "SparseTensor":
        """Other features (N, ...) on the same voxels; the cached maps are shared."""
        return SparseTensor(
            feats, self.coords, self.batch_size, self.resolution, check=False, maps=self.maps, finer=self.finer
        )

    def voxels(self) -> "SparseTensor":
        """The same voxels and maps without features, (N, 0): what maps may keep without keeping features alive."""
        return self.replace(self.feats.new_empty(len(self), 0))

    def same_voxels(self, other: "SparseTensor") -> bool:
        """Whether rows of both belong together; instant when one was made from the other."""
        if self.coords is other.coords or self.maps is other.maps:
            return True
        return self.coords.shape == other.coords.shape and bool(torch.equal(self.coords, other.coords))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SparseTensor":
        """Move, or change the dtype of the features. The maps stay behind when the device changes."""
        feats = self.feats.to(device=device, dtype=dtype)
        if feats.device == self.device:
            return self if feats is self.feats else self.replace(feats)
        return SparseTensor(feats, self.coords.to(feats.device), self.batch_size, self.resolution, check=False)

    def type(self, dtype: torch.dtype) -> "SparseTensor":
        return self.to(dtype=dtype)

    def _combine(self, other: Any, operate: Callable[[Any, Any], Tensor]) -> "SparseTensor":
        if isinstance(other, SparseTensor):
            if not self.same_voxels(other):
                raise ValueError(f"{self} and {other} have different voxels: rows cannot be combined")
            other = other.feats
        elif isinstance(other, Tensor) and other.dim() and other.shape[0] != 1:
            raise ValueError(f"combine with numbers, rows of one or sparse tensors, not a tensor {tuple(other.shape)}")
        return self.replace(operate(self.feats, other))

    def __add__(self, other: Any) -> "SparseTensor":
        return self._combine(other, torch.add)

    def __sub__(self, other: Any) -> "SparseTensor":
        return self._combine(other, torch.sub)

    def __mul__(self, other: Any) -> "SparseTensor":
        return self._combine(other, torch.mul)

    __radd__ = __add__
    __rmul__ = __mul__

    # ---- dense grids

    def to_dense(self, resolution: int | None = None, fill: float = 0.0) -> Tensor:
        """(B, C, R, R, R) with `fill` on empty voxels; feats must be (N, C)."""
        side = self.resolution if resolution is None else resolution
        if side is None:
            raise ValueError("the grid's side is unknown: give to_dense a resolution")
        if self.feats.dim() != 2:
            raise ValueError(f"to_dense needs feats (N, C), not {tuple(self.feats.shape)}")
        if resolution is not None and resolution != self.resolution:
            _check_coords(self.coords, self.batch_size, resolution)
        dense = self.feats.new_full((self.batch_size, side, side, side, self.feats.shape[1]), fill)
        b, x, y, z = self.coords.long().unbind(1)
        return dense.index_put((b, x, y, z), self.feats).movedim(-1, 1)

    @classmethod
    def from_dense(cls, dense: Tensor, occupied: Tensor | None = None) -> "SparseTensor":
        """The occupied voxels of (B, C, R, R, R), in row-major order.

        `occupied` is (B, R, R, R) bool; without it a voxel is occupied where any channel is not zero.
        """
        if dense.dim() != 5 or len(set(dense.shape[2:])) != 1:
            raise ValueError(f"a dense grid is (B, C, R, R, R), not {tuple(dense.shape)}")
        mask = dense.ne(0).any(dim=1) if occupied is None else occupied
        if mask.shape != (dense.shape[0], *dense.shape[2:]) or mask.dtype != torch.bool:
            raise ValueError(f"occupied is {_describe(mask)}, it must be (B, R, R, R) bool for {tuple(dense.shape)}")
        rows = torch.argwhere(mask)
        feats = dense.movedim(1, -1)[rows.unbind(1)]
        return cls(feats, rows.int(), dense.shape[0], dense.shape[2], check=False)

    # ---- joining

    @classmethod
    def cat_feats(cls, tensors: Sequence["SparseTensor"]) -> "SparseTensor":
        """Channels of tensors on the same voxels side by side (dim 1)."""
        first = tensors[0]
        for other in tensors[1:]:
            if not first.same_voxels(other):
                raise ValueError(f"{first} and {other} have different voxels: channels cannot be joined")
        return first.replace(torch.cat([tensor.feats for tensor in tensors], dim=1))

    @classmethod
    def cat_samples(cls, tensors: Sequence["SparseTensor"]) -> "SparseTensor":
        """Samples of several tensors one after the other, renumbered."""
        if not tensors:
            raise ValueError("no tensors to join")
        resolutions = {tensor.resolution for tensor in tensors}
        if len(resolutions) > 1:
            raise ValueError(f"tensors of resolutions {sorted(resolutions, key=str)} cannot share a batch")
        coords, start = [], 0
        for tensor in tensors:
            shifted = tensor.coords.clone()
            shifted[:, 0] += start
            coords.append(shifted)
            start += tensor.batch_size
        feats = torch.cat([tensor.feats for tensor in tensors])
        return cls(feats, torch.cat(coords), start, tensors[0].resolution, check=False)

    def check_unique(self) -> None:
        """Raise ValueError if a voxel of a sample appears twice (sorts the rows, so it is not part of construction)."""
        unique = torch.unique(self.coords, dim=0).shape[0]
        if unique != len(self):
            raise ValueError(f"{len(self) - unique} of {len(self)} rows repeat a voxel: merge them first")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_coords(coords: Tensor, batch_size: int, resolution: int | None) -> None:
    if not len(coords):
        return
    samples = coords[:, 0]
    if bool((samples[1:] < samples[:-1]).any()):
        row = int(torch.argmax((samples[1:] < samples[:-1]).int())) + 1
        raise ValueError(
            f"rows of a sample must be contiguous and samples in order: row {row} is of sample {int(samples[row])} "
            f"after sample {int(samples[row - 1])}; sort the rows by sample"
        )
    if int(samples[0]) < 0 or int(samples[-1]) >= batch_size:
        raise ValueError(f"sample numbers span {int(samples[0])}..{int(samples[-1])}, outside 0..{batch_size - 1}")
    low, high = int(coords[:, 1:].min()), int(coords[:, 1:].max())
    if low < 0 or (resolution is not None and high >= resolution):
        bound = "" if resolution is None else f"..{resolution - 1}"
        raise ValueError(f"voxel coordinates span {low}..{high}, outside 0{bound}")
