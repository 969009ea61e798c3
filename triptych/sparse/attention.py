"""Attention inside ragged groups of rows: the samples of a batch, or the windows of each sample.

Groups differ in length. They are sorted into buckets of similar length and padded inside a bucket, so that the number
of kernels does not grow with the number of groups, and padding adds a bounded share to the scores. In
a bucket of equal lengths nothing is masked; long groups share a bucket only then. Buckets depend on coordinates alone
and are kept in `SparseTensor.maps`.

Shapes: N rows, H heads, D channels of a head; a bucket has G groups padded to L rows.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..models.blocks import MAX_SCORES, attention
from .tensor import SparseTensor

# Padded scores allowed in a bucket: a share of the real ones, and in any case as many as cost less than more kernels.
WASTE = {"cpu": 0.2, "cuda": 0.33}
FREE_WASTE = {"cpu": 1 << 14, "cuda": 1 << 20}
LONG = 1024  # rows from which a group is only put beside equal ones: a kernel without mask is worth its launch


class Bucket(NamedTuple):
    """`groups` of similar length, padded to `length` rows; `mask` (G, length) bool where they differ, else None."""

    groups: list[int]
    length: int
    mask: Tensor | None


class Ragged(NamedTuple):
    """All groups of a tensor, bucket after bucket in one padded list of S = sum of G * length rows.

    `rows` (S,): the row of x at each place of the list (padding repeats a row). `places` (N,): where a row of x lies.
    """

    buckets: list[Bucket]
    rows: Tensor
    places: Tensor


class Windows(NamedTuple):
    """`order` (N,) sorts rows of x by window, `lengths` are the rows of each window, `inverse` (N,) undoes it."""

    order: Tensor
    lengths: list[int]
    inverse: Tensor


# ---- groups


def window_partition(x: SparseTensor, window_size: int | Sequence[int], shift: int | Sequence[int] = 0) -> Windows:
    """Rows of one sample with equal (coords + shift) // window_size, per axis, share a window; nothing wraps around.

    Computed once per voxels, size and shift. Rows of a window keep their order.
    """
    size, shift = _per_axis(window_size, "window_size"), _per_axis(shift, "shift")
    if min(size) < 1 or min(shift) < 0:
        raise ValueError(f"window_size {size} must be at least 1 and shift {shift} not negative")
    return x.cached(("windows", size, shift), lambda: _window_partition(x, size, shift))


def _window_partition(x: SparseTensor, size: tuple[int, ...], shift: tuple[int, ...]) -> Windows:
    offset, divisor = (x.coords.new_tensor(values) for values in (shift, size))
    windows = (x.coords[:, 1:] + offset).div(divisor, rounding_mode="floor").long()
    side = int(windows.max()) + 1 if len(x) else 1
    i, j, k = windows.unbind(1)
    keys, order = torch.sort(((x.coords[:, 0].long() * side + i) * side + j) * side + k, stable=True)
    lengths = torch.unique_consecutive(keys, return_counts=True)[1].tolist()
    return Windows(order, lengths, _inverse(order))


def _per_axis(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    values = (value,) * 3 if isinstance(value, int) else tuple(value)
    if len(values) != 3:
        raise ValueError(f"{name} is {value}: give one number, or one for each of x, y, z")
    return values


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def bucket_groups(lengths: Sequence[int], order: Tensor | None, device: torch.device) -> Ragged:
    """Buckets of consecutive groups of rows; `order` (N,) maps their rows to rows of x (None: they are)."""
    start_of = torch.tensor([0, *lengths]).cumsum(0).to(device)
    length_of = torch.tensor(lengths, dtype=torch.int64, device=device)
    places = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    buckets, parts, offset = [], [places[:0]], 0
    for groups in _similar_lengths(lengths, device.type):
        length, members = lengths[groups[0]], torch.tensor(groups, device=device)
        step = torch.arange(length, device=device)
        mask = step < length_of[members, None]
        rows = start_of[members, None] + torch.where(mask, step, 0)
        rows = rows if order is None else order[rows]
        places[rows[mask]] = mask.flatten().nonzero()[:, 0] + offset
        buckets.append(Bucket(groups, length, None if lengths[groups[-1]] == length else mask))
        parts.append(rows.flatten())
        offset += mask.numel()
    return Ragged(buckets, torch.cat(parts), places)


def _similar_lengths(lengths: Sequence[int], device: str) -> list[list[int]]:
    """Indices of groups, longest first, cut where padding to the longest of a bucket would waste too much."""
    share, free = WASTE.get(device, WASTE["cuda"]), FREE_WASTE.get(device, FREE_WASTE["cuda"])
    buckets: list[list[int]] = []
    real = wasted = longest = 0
    for group in sorted((g for g in range(len(lengths)) if lengths[g]), key=lambda g: -lengths[g]):
        scores = lengths[group] ** 2
        waste = longest**2 - scores
        if not buckets or (waste and longest >= LONG) or wasted + waste > max(free, share * (real + scores)):
            buckets.append([])
            real, wasted, longest, waste = 0, 0, lengths[group], 0
        buckets[-1].append(group)
        real, wasted = real + scores, wasted + waste
    return buckets


# ---- attention


def windowed_attention(
    qkv: Tensor, x: SparseTensor, window_size: int | Sequence[int], shift: int | Sequence[int] = 0
) -> Tensor:
    """Self-attention inside each window of each sample: qkv (N, 3, H, D) -> (N, H, D). Scale 1/sqrt(D)."""
    _check_rows("qkv", qkv, x, (3,), 4)
    size, shift = _per_axis(window_size, "window_size"), _per_axis(shift, "shift")

    def buckets() -> Ragged:
        windows = window_partition(x, size, shift)
        return bucket_groups(windows.lengths, windows.order, x.device)

    return _ragged_attention(qkv, x.cached(("window buckets", size, shift), buckets))


def full_attention(qkv: Tensor, x: SparseTensor) -> Tensor:
    """Self-attention inside each sample: qkv (N, 3, H, D) -> (N, H, D). Scale 1/sqrt(D)."""
    _check_rows("qkv", qkv, x, (3,), 4)
    if x.batch_size == 1 and len(x):
        return _self_attention(qkv[None], None)[0]
    return _ragged_attention(qkv, _sample_buckets(x))


def cross_attention(q: Tensor, kv: Tensor, x: SparseTensor) -> Tensor:
    """Each row attends to the context of its sample: q (N, H, D), kv (B, M, 2, H, D) -> (N, H, D)."""
    _check_rows("q", q, x, (), 3)
    if kv.dim() != 5 or kv.shape[0] != x.batch_size or kv.shape[2] != 2 or kv.shape[3:] != q.shape[1:]:
        wanted = f"({x.batch_size}, tokens, 2, {q.shape[1]}, {q.shape[2]})"
        raise ValueError(f"kv is {tuple(kv.shape)}, it must be {wanted}: samples of x, heads and channels of q")
    ragged = _sample_buckets(x)
    outs = []
    for bucket, part in zip(ragged.buckets, _padded(q, ragged), strict=True):
        k, v = (kv if bucket.groups == list(range(len(kv))) else kv[bucket.groups]).unbind(2)
        outs.append(_attention(part, k, v, None))
    return _unpadded(outs, ragged) if outs else q


def _sample_buckets(x: SparseTensor) -> Ragged:
    return x.cached("sample buckets", lambda: bucket_groups(x.counts, None, x.device))


def _check_rows(name: str, tensor: Tensor, x: SparseTensor, middle: tuple[int, ...], dims: int) -> None:
    if tensor.dim() != dims or len(tensor) != len(x) or tensor.shape[1 : 1 + len(middle)] != middle:
        wanted = ", ".join(str(size) for size in (len(x), *middle, "heads", "channels"))
        raise ValueError(f"{name} is {tuple(tensor.shape)}, it must be ({wanted}) for {x}")


def _ragged_attention(qkv: Tensor, ragged: Ragged) -> Tensor:
    if not ragged.buckets:
        return qkv[:, 0]
    if qkv.device.type == "cpu" and all(bucket.length**2 <= MAX_SCORES for bucket in ragged.buckets):
        return _GroupedAttention.apply(qkv, ragged)
    parts = zip(_padded(qkv, ragged), ragged.buckets, strict=True)
    outs = [_self_attention(part, bucket.mask) for part, bucket in parts]
    return _unpadded(outs, ragged)


def _self_attention(qkv: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = qkv.unbind(2)
    return _attention(q, k, v, mask)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (G, L, H, D), k and v (G, M, H, D), mask (G, M) of the keys that count -> (G, L, H, D)."""
    on_cores = q.device.type == "cpu" and q.dtype == torch.bfloat16
    scores = q.shape[1] * k.shape[1]
    if mask is None:
        if on_cores and scores > MAX_SCORES and not torch.is_grad_enabled():
            queries = q.split(max(64, MAX_SCORES // k.shape[1]), dim=1)
            return torch.cat([attention(part, k, v) for part in queries], dim=1)
        return attention(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)


class _GroupedAttention(torch.autograd.Function):
    """Self-attention of short groups on CPUs, as many groups at a time as keep their scores in the cache.

    Rows are gathered, attended to and put back part by part, in buffers that the next part uses again: written out
    whole, the padded queries, keys and values of 20,000 rows and 12 heads cost as much in page faults and memory
    traffic as the arithmetic does. Scores are kept in the dtype of qkv; in bfloat16 that rounds them by a relative
    2^-9. The backward pass computes the probabilities again instead of keeping them.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, ragged: Ragged) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.ragged = ragged
        out = qkv.new_empty(len(qkv), *qkv.shape[2:])
        with torch.autocast("cpu", enabled=False):
            for part, buffers in _parts(ragged, qkv, 2):
                q, k, v = _heads_first(qkv, part)
                _put_back(out, torch.bmm(_probabilities(q, k, part.mask, *buffers), v), part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        d_qkv, scale = torch.empty_like(qkv, memory_format=torch.contiguous_format), qkv.shape[-1] ** -0.5
        dq, dk, dv = d_qkv.unbind(1)
        with torch.autocast("cpu", enabled=False):
            for part, (a, b, c) in _parts(ctx.ragged, qkv, 3):
                q, k, v = _heads_first(qkv, part)
                (g,) = _heads_first(grad[:, None], part)
                if part.mask is not None:  # what padding put out was not used
                    g *= _by_head(part.mask, len(g)).to(g)[..., None]
                probabilities = _probabilities(q, k, part.mask, a, b)
                d_probabilities = torch.bmm(g, v.mT, out=a[: len(q)])
                d_scores = torch._softmax_backward_data(
                    d_probabilities, probabilities, -1, q.dtype, grad_input=c[: len(q)]
                )
                _put_back(dv, torch.bmm(probabilities.mT, g), part)
                _put_back(dq, torch.bmm(d_scores, k).mul_(scale), part)
                _put_back(dk, torch.bmm(d_scores.mT, q).mul_(scale), part)
        return d_qkv, None


class _Part(NamedTuple):
    """Groups of one bucket: `rows` (P * L,) of x, and (P, L) bool which of them are no padding, None for all."""

    rows: Tensor
    length: int
    mask: Tensor | None


def _parts(ragged: Ragged, qkv: Tensor, count: int) -> Iterator[tuple[_Part, list[Tensor]]]:
    """Parts whose scores fit into the cache, each with `count` score buffers (P * heads, L, L) to write into.

    The buffers are one memory for all parts: fresh memory costs as much as the arithmetic.
    """
    heads, start = qkv.shape[2], 0
    most = max((_at_once(b, heads) * heads * b.length**2 for b in ragged.buckets), default=0)
    memory = [qkv.new_empty(most) for _ in range(count)]
    for bucket in ragged.buckets:
        length, step = bucket.length, _at_once(bucket, heads)
        shape = (step * heads, length, length)
        buffers = [buffer[: math.prod(shape)].view(shape) for buffer in memory]
        for first in range(0, len(bucket.groups), step):
            groups = min(step, len(bucket.groups) - first)
            rows = ragged.rows[start + first * length : start + (first + groups) * length]
            yield _Part(rows, length, None if bucket.mask is None else bucket.mask[first : first + groups]), buffers
        start += len(bucket.groups) * length


def _at_once(bucket: Bucket, heads: int) -> int:
    return min(len(bucket.groups), max(1, MAX_SCORES // (heads * bucket.length**2)))


def _heads_first(x: Tensor, part: _Part) -> Tensor:
    """Rows of x (N, K, H, D) -> (K, P * H, L, D)."""
    gathered = x.index_select(0, part.rows).unflatten(0, (-1, part.length))
    return gathered.permute(2, 0, 3, 1, 4).flatten(1, 2)


def _put_back(out: Tensor, x: Tensor, part: _Part) -> None:
    """x (P * H, L, D) -> its rows of out (N, H, D); padding goes nowhere."""
    rows, heads = part.rows, out.shape[1]
    flat = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)
    if part.mask is not None:
        real = part.mask.flatten()
        rows, flat = rows[real], flat[real]
    out.index_copy_(0, rows, flat)


def _by_head(mask: Tensor, count: int) -> Tensor:
    """(P, L) for each of the heads of a part: (count, L)."""
    return mask.repeat_interleave(count // len(mask), dim=0)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, scores: Tensor, out: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) over the keys that count, in the first rows of `out`; `scores` is scratch."""
    bias, beta = q.new_empty(1, 1, 1), 0
    if mask is not None:
        low = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        bias, beta = _by_head(low, len(q))[:, None], 1
    scores = torch.baddbmm(bias, q, k.mT, beta=beta, alpha=q.shape[-1] ** -0.5, out=scores[: len(q)])
    return torch.softmax(scores, dim=-1, out=out[: len(q)])


# ---- padding


def _padded(x: Tensor, ragged: Ragged) -> list[Tensor]:
    """Rows of x (N, ...) as one (G, L, ...) view per bucket."""
    flat = _Pad.apply(x, ragged.rows, ragged.places)
    parts = flat.split([len(bucket.groups) * bucket.length for bucket in ragged.buckets])
    return [part.unflatten(0, (-1, bucket.length)) for part, bucket in zip(parts, ragged.buckets, strict=True)]


def _unpadded(outs: list[Tensor], ragged: Ragged) -> Tensor:
    """(G, L, ...) of every bucket -> rows in the order of x."""
    return _Unpad.apply(torch.cat([out.flatten(0, 1) for out in outs]), ragged.places)


class _Pad(torch.autograd.Function):
    """x[rows]. Going back, padding has no gradient (it is masked, or its output unused), so one gather is enough."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """flat[places]; a place is read once, so its gradient is written, not added."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.places = len(flat)
        return flat.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.places, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None
