"""Submanifold sparse convolution: outputs exist on the occupied voxels only, and only occupied neighbours contribute.

The work is split in two. `neighbour_table` finds, once per set of voxels, the row of each of the 27 neighbours of every
row; it is kept in `SparseTensor.maps` and shared by all layers on these voxels. The convolution then gathers the
neighbours of a block of rows side by side, (rows, 27 C), and multiplies the block by the kernel in one matrix product,
so the memory is that of one block, and sums run in the precision of the matrix unit. The gradient of the features is
the same operation with the mirrored kernel; the gradient of the kernel is the product of the gathered block with the
gradient of its outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .spatial import subdivide
from .tensor import SparseTensor

TAPS = 27  # column 9 (dx + 1) + 3 (dy + 1) + (dz + 1) of the table; the mirrored offset is column 26 - column
CENTRE = 13


def neighbour_table(x: SparseTensor) -> Tensor:
    """(N, 27) int32: the row of the voxel at coordinates + offset (same sample), N where that voxel is empty.

    Offsets run over (-1, 0, 1)^3 with z fastest. Computed once per set of voxels (`maps["neighbours"]`); for voxels
    made by `subdivide` it follows from the table of the voxels they divide. Raises ValueError for repeated voxels.
    """
    return x.cached("neighbours", lambda: _subdivided_table(x) if "parent" in x.maps else _search_table(x.coords))


def _search_table(coords: Tensor) -> Tensor:
    """Five columns of voxels are searched in the sorted rows; z neighbours lie side by side, mirrored offsets follow.

    A key numbers voxels (sample, x, y, z) on a grid with a rim of one empty voxel, so that no neighbour wraps around.
    """
    n, device = len(coords), coords.device
    table = torch.full((n, TAPS), n, dtype=torch.int32, device=device)
    if n == 0:
        return table
    side = int(coords[:, 1:].max()) + 3
    b, x, y, z = coords.long().unbind(1)
    keys, rows = torch.sort(((b * side + x + 1) * side + y + 1) * side + z + 1)
    if bool((keys[1:] == keys[:-1]).any()):
        repeats = int((keys[1:] == keys[:-1]).sum())
        raise ValueError(f"{repeats} of {n} rows repeat a voxel: merge them before convolving")
    table[:, CENTRE] = torch.arange(n, dtype=torch.int32, device=device)
    padded = F.pad(keys, (0, 3), value=torch.iinfo(torch.int64).max)
    for column, step in ((13, 0), (16, side), (19, side * (side - 1)), (22, side * side), (25, side * (side + 1))):
        first = keys + step - (0 if column == CENTRE else 1)
        position = torch.searchsorted(keys, first)
        for dz in (0, 1) if column == CENTRE else (-1, 0, 1):
            found = padded[position] == keys + step + dz
            if not (column == CENTRE and dz == 0):
                here, there = rows[found], rows[position[found]]
                table[here, column + dz] = there.int()
                table[there, TAPS - 1 - column - dz] = here.int()
            position = position + found
    return table


def _subdivided_table(x: SparseTensor) -> Tensor:
    """The table of the 8 children of each voxel, from the table of the voxels: child + offset is some voxel's child."""
    parent = x.maps["parent"]
    column, child = (t.to(x.device) for t in _CHILD_STEPS)
    table = neighbour_table(parent)[:, column.flatten()].view(len(parent), 8, TAPS).mul_(8)
    empty = table == 8 * len(parent)
    return table.add_(child).masked_fill_(empty, 8 * len(parent)).flatten(0, 1)


def _child_steps() -> tuple[Tensor, Tensor]:
    """For each child and offset (8, 27): the column of the parent's neighbour, and which child of it is meant."""
    child = torch.cartesian_prod(*[torch.arange(2)] * 3)
    offset = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    moved = child[:, None] + offset[None]
    step, rest = moved.div(2, rounding_mode="floor") + 1, moved % 2
    return (step * torch.tensor([9, 3, 1])).sum(-1), (rest * torch.tensor([4, 2, 1])).sum(-1).int()


_CHILD_STEPS = _child_steps()


def _child_taps() -> tuple[Tensor, Tensor]:
    """For each child: the 8 columns of the parent's table that its 27 offsets reach (8, 8), and which offset reaches
    which of them (8, 8, 27), float32 zeros and ones."""
    columns = torch.stack([column.unique() for column in _CHILD_STEPS[0]])
    return columns, (columns[:, :, None] == _CHILD_STEPS[0][:, None, :]).float()


_CHILD_TAPS = _child_taps()


# ---- arithmetic


def table_conv(feats: Tensor, weight: Tensor, table: Tensor, columns: Tensor | None = None) -> Tensor:
    """out[i] = sum over k of weight[:, k] @ feats[table[i, columns[k]]]; absent neighbours count as zero.

    feats (N, in); weight (out, K, in) of the same dtype; table (N, 27) as `neighbour_table` returns it; columns (K,)
    int64, all 27 by default. Differentiable in feats and weight.
    """
    return _TableConv.apply(feats, weight, table, columns)


def subdivided_conv(feats: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """3x3x3 convolution of the subdivided voxels, computed on the voxels themselves: 8/27 of the arithmetic.

    feats (N, in) and table (N, 27) of the voxels, weight (out, 27, in) -> (8 N, out), rows as `subdivide` orders them.
    All children of a voxel have its features, so a child meets only 8 different rows: the weights of the offsets that
    reach the same one are added first, in float32.
    """
    columns, reach = (t.to(weight.device) for t in _CHILD_TAPS)
    at_least_float = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.einsum("oki,ctk->coti", weight.type(at_least_float), reach.type(at_least_float)).type(feats.dtype)
    outs = [table_conv(feats, tap, table, column) for tap, column in zip(taps, columns, strict=True)]
    return torch.stack(outs, dim=1).flatten(0, 1)


class _TableConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, weight: Tensor, table: Tensor, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(feats, weight, table, columns)
        return _gather_matmul(feats, weight.flatten(1).t(), table, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        feats, weight, table, columns = ctx.saved_tensors
        grad_feats = grad_weight = None
        if ctx.needs_input_grad[0]:
            mirrored = TAPS - 1 - (torch.arange(TAPS, device=table.device) if columns is None else columns)
            grad_feats = _gather_matmul(grad, weight.transpose(0, 1).flatten(0, 1), table, mirrored)
        if ctx.needs_input_grad[1]:
            grad_weight = _gathered_product(feats, grad, table, columns).view(weight.shape)
        return grad_feats, grad_weight, None, None


BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}  # of one gathered block: about the cache of a core; a slice of memory


def _blocks(feats: Tensor, table: Tensor, taps: int) -> list[slice]:
    row_bytes = taps * feats.shape[1] * feats.element_size()
    rows = max(128, BLOCK_BYTES.get(feats.device.type, 1 << 26) // max(1, row_bytes))
    return [slice(start, start + rows) for start in range(0, len(table), rows)]


def _gather(padded: Tensor, table: Tensor, columns: Tensor | None) -> Tensor:
    """(rows, taps * C): the neighbours of each row side by side."""
    index = table if columns is None else table[:, columns]
    return padded.index_select(0, index.flatten()).view(len(index), -1)


def _gather_matmul(feats: Tensor, kernel: Tensor, table: Tensor, columns: Tensor | None) -> Tensor:
    """(N, taps * C) gathered from feats (N, C), times kernel (taps * C, out)."""
    padded = F.pad(feats, (0, 0, 0, 1))
    out = feats.new_empty(len(table), kernel.shape[1])
    for rows in _blocks(feats, table, TAPS if columns is None else len(columns)):
        torch.mm(_gather(padded, table[rows], columns), kernel, out=out[rows])
    return out


def _gathered_product(feats: Tensor, grad: Tensor, table: Tensor, columns: Tensor | None) -> Tensor:
    """(out, taps * C) in the dtype of grad: the gradient of the kernel, summed over blocks in float32."""
    padded = F.pad(feats, (0, 0, 0, 1))
    taps = TAPS if columns is None else len(columns)
    total = torch.zeros(grad.shape[1], taps * feats.shape[1], device=grad.device, dtype=torch.float32)
    total = total.double() if grad.dtype == torch.float64 else total
    for rows in _blocks(feats, table, taps):
        total += grad[rows].t() @ _gather(padded, table[rows], columns)
    return total.type(grad.dtype)


# ---- module


class Kernel(nn.Module):
    """The parameters of a sparse convolution: weight (out, k, k, k, in) and bias (out), as published."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, *[kernel_size] * 3, in_channels))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        bound = (in_channels * kernel_size**3) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class SparseConv3d(nn.Module):
    """Submanifold convolution of (N, in) features -> (N, out) on the same voxels; kernel_size 3 or 1.

    Cross-correlation: kernel index 0, 1, 2 along x, y, z meets the neighbour at -1, 0, +1. With kernel_size 1 the
    stored weight (out, 1, 1, 1, in) is read as an (in, out) matrix without transposing, because the published
    checkpoints were trained that way (spconv 2.3). The arithmetic is in the autocast dtype, or else in the dtype of the
    features.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size is {kernel_size}: sparse convolutions have 3 or 1")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.conv = Kernel(in_channels, out_channels, kernel_size, bias)

    def forward(self, x: SparseTensor) -> SparseTensor:
        feats, dtype = self._feats(x)
        weight, bias = self.conv.weight.type(dtype), self._bias(dtype)
        if self.kernel_size == 1:
            return x.replace(F.linear(feats, weight.view(self.in_channels, self.out_channels).t(), bias))
        out = table_conv(feats, weight.flatten(1, 3), neighbour_table(x))
        return x.replace(out if bias is None else out + bias)

    def forward_subdivided(self, x: SparseTensor) -> SparseTensor:
        """self(subdivide(x)) at 8/27 of the arithmetic: (N, in) -> (8 N, out). Kernel size 3 only."""
        if self.kernel_size != 3:
            raise ValueError("a 1x1x1 convolution commutes with subdivision: apply it first")
        feats, dtype = self._feats(x)
        out, bias = subdivided_conv(feats, self.conv.weight.flatten(1, 3), neighbour_table(x)), self._bias(dtype)
        return subdivide(x.voxels()).replace(out if bias is None else out + bias)

    def _feats(self, x: SparseTensor) -> tuple[Tensor, torch.dtype]:
        """The features, and the dtype of the arithmetic, to which they are converted."""
        if x.feats.dim() != 2 or x.feats.shape[1] != self.in_channels:
            raise ValueError(f"the convolution takes feats (N, {self.in_channels}), not {tuple(x.feats.shape)}")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.feats.type(dtype), dtype

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.conv.bias is None else self.conv.bias.type(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
