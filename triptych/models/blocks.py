"""Transformer blocks of the flow models, on tokens packed from many samples.

Module tree, state-dict keys and arithmetic are those of TRELLIS (arXiv 2412.01506), so that published weights load with
strict=True and give the same numbers. Ours is the packing: inside a block the tokens of all samples lie in one
(tokens, channels) matrix, and only attention and modulation look at where one sample ends. `runs_of` cuts the matrix
into runs of neighbouring samples of equal length; each run is a free (samples, length, channels) view. A dense batch is
one run; a ragged batch is several, and costs least when the caller orders its samples by length.

Shape suffixes: B samples, L tokens of one sample, T tokens of all samples, C channels, H heads, D channels of one head.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Run(NamedTuple):
    """`samples` neighbouring samples with `length` tokens and `context_length` context tokens each."""

    samples: int
    length: int
    context_length: int


def runs_of(lengths: Sequence[int], context_lengths: Sequence[int]) -> list[Run]:
    """Group neighbouring samples of equal lengths."""
    if len(lengths) != len(context_lengths):
        raise ValueError(f"{len(lengths)} lengths but {len(context_lengths)} context lengths: give one per sample")
    if min(lengths, default=0) < 0 or min(context_lengths, default=1) < 1:
        raise ValueError(f"lengths {list(lengths)} must be >= 0, context lengths {list(context_lengths)} >= 1")
    runs: list[Run] = []
    for pair in zip(lengths, context_lengths, strict=True):
        if runs and (runs[-1].length, runs[-1].context_length) == pair:
            runs[-1] = runs[-1]._replace(samples=runs[-1].samples + 1)
        else:
            runs.append(Run(1, *pair))
    return runs


def split_samples(x_BC: Tensor, runs: list[Run]) -> Sequence[Tensor]:
    """(B, ...) -> one (samples, ...) view per run."""
    return x_BC.split([run.samples for run in runs])


def split_tokens(x_TC: Tensor, runs: list[Run]) -> list[Tensor]:
    """(T, ...) -> one (samples, length, ...) view per run. One split, so that its backward is one concatenation."""
    parts = x_TC.split([run.samples * run.length for run in runs])
    return [part.unflatten(0, (run.samples, run.length)) for part, run in zip(parts, runs, strict=True)]


def split_context(x_TC: Tensor, runs: list[Run]) -> list[Tensor]:
    """(context T, ...) -> one (samples, context_length, ...) view per run."""
    parts = x_TC.split([run.samples * run.context_length for run in runs])
    return [part.unflatten(0, (run.samples, run.context_length)) for part, run in zip(parts, runs, strict=True)]


def join_tokens(parts: list[Tensor]) -> Tensor:
    """The inverse of split_tokens."""
    return parts[0].flatten(0, 1) if len(parts) == 1 else torch.cat([part.flatten(0, 1) for part in parts])


# ---- embeddings


class TimestepEmbedder(nn.Module):
    """Scalar times -> (B, C): cos | sin features of 1000 t, then Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
        """(B,) times, already multiplied by 1000 -> (B, dim) float32 [cos | sin]; an odd dim ends with a zero."""
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t[:, None].float() * torch.exp(-math.log(max_period) * exponents)
        return F.pad(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1), (0, dim - 2 * half))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.timestep_embedding(t, self.frequency_embedding_size))


class AbsolutePositionEmbedder(nn.Module):
    """Coordinates -> sinusoids: per axis [sin | cos] of C // axes // 2 frequencies, axes concatenated, zeros to C."""

    def __init__(self, channels: int, in_channels: int = 3):
        super().__init__()
        self.channels = channels
        self.in_channels = in_channels

    def forward(self, coords: Tensor) -> Tensor:
        """(N, in_channels) coordinates, any dtype -> (N, channels) float32."""
        n, axes = coords.shape
        if axes != self.in_channels:
            raise ValueError(f"coordinates have {axes} axes, the embedder was made for {self.in_channels}")
        freq_dim = self.channels // axes // 2
        exponents = torch.arange(freq_dim, dtype=torch.float32, device=coords.device) / freq_dim
        angles = coords.float()[:, :, None] / (10000.0**exponents)
        table = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1).reshape(n, -1)
        return F.pad(table, (0, self.channels - table.shape[1]))


# ---- norms


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis with float32 statistics; the result has the dtype of x.

    The CPU kernel itself takes low-precision x with float32 parameters and accumulates in float32, so it spares the two
    casts that other devices need.
    """
    if x.device.type == "cpu" or x.dtype == torch.float32:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).type(x.dtype)


class LayerNorm32(nn.LayerNorm):
    """Layer norm of (..., C) computed in float32, returned in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class ChannelLayerNorm32(LayerNorm32):
    """LayerNorm32 over axis 1 of (B, C, *spatial). Free of copies when the memory is channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MultiHeadRMSNorm(nn.Module):
    """x / |x| * gamma * sqrt(D) over the last axis of (..., H, D), with one gamma per head and channel."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # the reciprocal of a small norm overflows in float16
            return self.forward(x.float()).type(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return x * (self.scale / norm.clamp_min(1e-12)).type(x.dtype) * self.gamma.type(x.dtype)


# ---- attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention: q (B, L, H, D), k and v (B, M, H, D) -> (B, L, H, D). Scale 1/sqrt(D)."""
    scores = q.shape[1] * k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 0 < scores <= MAX_SCORES:
        return _CacheSizedAttention.apply(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


MAX_SCORES = 1 << 20  # scores held at once: 2 MiB in bfloat16, about what one core's cache keeps


class _CacheSizedAttention(torch.autograd.Function):
    """Attention in bfloat16 on CPUs, a few heads of one sample at a time.

    Whole matrix products on the bfloat16 units, with scores that never leave the cache, take a third to a half of the
    time of torch's fused CPU kernel (forward + backward, 512 tokens). The score buffers are allocated once per call: a
    fresh one for each group costs as much in page faults as the arithmetic. The price: scores are rounded to bfloat16
    before the softmax, a relative 2^-9. The backward pass computes the probabilities again instead of keeping them.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        out = q.new_empty(q.shape)
        group = _heads_at_once(q, k)
        buffers = [q.new_empty(group, q.shape[1], k.shape[1]) for _ in range(2)]
        with torch.autocast("cpu", enabled=False):
            for part in _head_groups(q, group):
                probabilities = _probabilities(part(q), part(k), *buffers)
                part(out).copy_(torch.bmm(probabilities, part(v)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
        scale = q.shape[-1] ** -0.5
        group = _heads_at_once(q, k)
        a, b, c = (q.new_empty(group, q.shape[1], k.shape[1]) for _ in range(3))
        for part in _head_groups(q, group):
            q_HLD, k_HMD, v_HMD, grad_HLD = (part(x).contiguous() for x in (q, k, v, grad))
            heads = len(q_HLD)
            probabilities = _probabilities(q_HLD, k_HMD, a, b)
            d_probabilities = torch.bmm(grad_HLD, v_HMD.mT, out=a[:heads])
            d_scores = torch._softmax_backward_data(d_probabilities, probabilities, -1, q.dtype, grad_input=c[:heads])
            part(dv).copy_(torch.bmm(probabilities.mT, grad_HLD))
            part(dq).copy_(torch.bmm(d_scores, k_HMD).mul_(scale))
            part(dk).copy_(torch.bmm(d_scores.mT, q_HLD).mul_(scale))
        return dq, dk, dv


def _heads_at_once(q: Tensor, k: Tensor) -> int:
    return min(q.shape[2], max(1, MAX_SCORES // (q.shape[1] * k.shape[1])))


def _head_groups(q: Tensor, group: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Functions that cut (at most `group` heads, tokens, D) views out of (B, tokens, H, D) tensors."""
    for sample in range(q.shape[0]):
        for head in range(0, q.shape[2], group):
            yield partial(_heads_of, sample=sample, heads=slice(head, head + group))


def _heads_of(x_BLHD: Tensor, sample: int, heads: slice) -> Tensor:
    return x_BLHD[sample, :, heads].transpose(0, 1)


def _probabilities(q_HLD: Tensor, k_HMD: Tensor, scores: Tensor, out: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) in the first heads of `out`; `scores` is scratch of the same size."""
    heads, scale = len(q_HLD), q_HLD.shape[-1] ** -0.5
    ignored = q_HLD.new_empty(1, 1, 1)
    scores = torch.baddbmm(ignored, q_HLD, k_HMD.mT, beta=0, alpha=scale, out=scores[:heads])
    return torch.softmax(scores, dim=-1, out=out[:heads])


class SelfAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int, qkv_bias: bool = True, qk_rms_norm: bool = False):
        super().__init__()
        self.heads = (num_heads, channels // num_heads)
        self.qk_rms_norm = qk_rms_norm
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        if qk_rms_norm:
            self.q_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
            self.k_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x_TC: Tensor, runs: list[Run]) -> Tensor:
        q, k, v = self.to_qkv(x_TC).unflatten(-1, (3, *self.heads)).unbind(-3)
        if self.qk_rms_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        segments = zip(split_tokens(q, runs), split_tokens(k, runs), split_tokens(v, runs), strict=True)
        return self.to_out(join_tokens([attention(*segment).flatten(2) for segment in segments]))


class CrossAttention(nn.Module):
    def __init__(
        self, channels: int, ctx_channels: int, num_heads: int, qkv_bias: bool = True, qk_rms_norm: bool = False
    ):
        super().__init__()
        self.heads = (num_heads, channels // num_heads)
        self.qk_rms_norm = qk_rms_norm
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_kv = nn.Linear(ctx_channels, 2 * channels, bias=qkv_bias)
        if qk_rms_norm:
            self.q_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
            self.k_rms_norm = MultiHeadRMSNorm(channels // num_heads, num_heads)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x_TC: Tensor, context_TC: Tensor, runs: list[Run]) -> Tensor:
        q = self.to_q(x_TC).unflatten(-1, self.heads)
        k, v = self.to_kv(context_TC).unflatten(-1, (2, *self.heads)).unbind(-3)
        if self.qk_rms_norm:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        segments = zip(split_tokens(q, runs), split_context(k, runs), split_context(v, runs), strict=True)
        return self.to_out(join_tokens([attention(*segment).flatten(2) for segment in segments]))


class FeedForwardNet(nn.Module):
    def __init__(self, channels: int, mlp_ratio: float = 4.0):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


# ---- the block


class ModulatedTransformerCrossBlock(nn.Module):
    """Self-attention, cross-attention, MLP; the first and last are shifted, scaled and gated by the time embedding.

    `share_mod` (as in TRELLIS.2): the model owns one modulation network and passes its (B, 6C) result; the block only
    adds its own constant `modulation`.
    """

    def __init__(
        self,
        channels: int,
        ctx_channels: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qk_rms_norm: bool = False,
        qk_rms_norm_cross: bool = False,
        qkv_bias: bool = True,
        share_mod: bool = False,
    ):
        super().__init__()
        self.share_mod = share_mod
        self.norm1 = LayerNorm32(channels, elementwise_affine=False, eps=1e-6)
        self.norm2 = LayerNorm32(channels, elementwise_affine=True, eps=1e-6)
        self.norm3 = LayerNorm32(channels, elementwise_affine=False, eps=1e-6)
        self.self_attn = SelfAttention(channels, num_heads, qkv_bias=qkv_bias, qk_rms_norm=qk_rms_norm)
        self.cross_attn = CrossAttention(
            channels, ctx_channels, num_heads, qkv_bias=qkv_bias, qk_rms_norm=qk_rms_norm_cross
        )
        self.mlp = FeedForwardNet(channels, mlp_ratio=mlp_ratio)
        if share_mod:
            self.modulation = nn.Parameter(torch.randn(6 * channels) / channels**0.5)
        else:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        context: Tensor,
        lengths: Sequence[int] | None = None,
        context_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """One block on a dense or a packed batch; returns the shape of x.

        Dense: x (B, L, C), context (B, M, Cc). Packed: x (1, sum(lengths), C), context (1, sum(context_lengths), Cc),
        one length per sample; a dense context (B, M, Cc) is accepted with `lengths` alone. `mod` is (B, C), or
        (B, 6C) with share_mod. Raises ValueError where shapes and lengths disagree.
        """
        runs = batch_runs(x, context, lengths=lengths, context_lengths=context_lengths)
        if mod.shape[0] != (batch := x.shape[0] if lengths is None else len(lengths)):
            raise ValueError(f"mod has {mod.shape[0]} rows for {batch} samples")
        return self.forward_runs(x.flatten(0, 1), mod, context.flatten(0, 1), runs).view_as(x)

    def forward_runs(self, x_TC: Tensor, mod: Tensor, context_TC: Tensor, runs: list[Run]) -> Tensor:
        mod = self.modulation.type(mod.dtype) + mod if self.share_mod else self.adaLN_modulation(mod)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod.chunk(6, dim=1)
        h = self.self_attn(modulate(self.norm1(x_TC), shift_msa, scale_msa, runs), runs)
        x_TC = add_gated(x_TC, h, gate_msa, runs)
        x_TC = x_TC + self.cross_attn(self.norm2(x_TC), context_TC, runs)
        h = self.mlp(modulate(self.norm3(x_TC), shift_mlp, scale_mlp, runs))
        return add_gated(x_TC, h, gate_mlp, runs)


def modulate(x_TC: Tensor, shift_BC: Tensor, scale_BC: Tensor, runs: list[Run]) -> Tensor:
    """x * (1 + scale) + shift, with the shift and scale of the token's sample."""
    parts = zip(split_samples(shift_BC, runs), split_tokens(x_TC, runs), split_samples(1 + scale_BC, runs), strict=True)
    return join_tokens([torch.addcmul(shift[:, None], x, gain[:, None]) for shift, x, gain in parts])


def add_gated(x_TC: Tensor, h_TC: Tensor, gate_BC: Tensor, runs: list[Run]) -> Tensor:
    """x + gate * h, with the gate of the token's sample."""
    parts = zip(split_tokens(x_TC, runs), split_tokens(h_TC, runs), split_samples(gate_BC, runs), strict=True)
    return join_tokens([torch.addcmul(x, h, gate[:, None]) for x, h, gate in parts])


def batch_runs(
    x: Tensor, context: Tensor | None, *, lengths: Sequence[int] | None, context_lengths: Sequence[int] | None
) -> list[Run]:
    """The runs of a dense (B, L, C) or packed (1, T, C) batch, after checking that shapes and lengths agree."""
    if context is None:
        raise ValueError("context is None: cross-attention needs at least one context token per sample")
    if context_lengths is None:
        context_lengths = [context.shape[1]] * context.shape[0]
    elif sum(context_lengths) != context.shape[0] * context.shape[1]:
        raise ValueError(f"context lengths add up to {sum(context_lengths)}, the context is {tuple(context.shape)}")
    if lengths is None:
        lengths = [x.shape[1]] * x.shape[0]
    elif x.shape[0] != 1 or sum(lengths) != x.shape[1]:
        raise ValueError(f"lengths add up to {sum(lengths)}: packed tokens are (1, sum, C), not {tuple(x.shape)}")
    return runs_of(lengths, context_lengths)


def initialize_flow(flow: nn.Module) -> None:
    """Xavier matrices, zero biases; modulation and output start at zero, so that every block starts as a no-op."""
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for name, parameter in flow.named_parameters():
        if name.startswith("t_embedder") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02)
        elif "adaLN_modulation" in name or name.startswith("out_layer"):
            nn.init.zeros_(parameter)


def set_torso_dtype(modules: nn.Module, dtype: torch.dtype) -> None:
    """Cast the Conv and Linear parameters under `modules`; norms and RMS gammas stay float32 (the published layout)."""
    for module in modules.modules():
        if isinstance(module, nn.Linear | nn.Conv3d):
            module.to(dtype)
