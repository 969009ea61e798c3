"""Sparse convolution and attention beside a naive loop and the arithmetic limit, in one run.

    python benchmarks/sparse_ops.py [--quick] [--device cuda] [--dtype bfloat16] [--backward] [--threads 2]

The voxels are the ones nearest to a wavy closed surface on a 64^3 grid. The limit is what a large matrix product gets
in the same run and dtype: for the convolution all 27 products of a voxel (and, beside it, only those with an occupied
neighbour), for attention the two products of every query and key. The loops are what one writes first: one gather,
product and scattered addition per kernel offset; the softmax formula per sample or window. Neighbour tables and window
partitions are computed outside the times, once, as in a network; their own times are printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from triptych.sparse.attention import full_attention, window_partition, windowed_attention  # noqa: E402
from triptych.sparse.conv import neighbour_table, table_conv  # noqa: E402
from triptych.sparse.tensor import SparseTensor  # noqa: E402

SIDE = 64
WINDOW, SHIFT = 8, 4


def surface_voxels(count: int, device: str) -> SparseTensor:
    """The `count` voxels of the grid nearest to a closed wavy surface, without features."""
    index = torch.cartesian_prod(*[torch.arange(SIDE)] * 3)
    p = (index + 0.5) / SIDE * 2 - 1
    wave = 0.1 * torch.sin(7 * p[:, 0]) * torch.sin(6 * p[:, 1] + 1) * torch.sin(5 * p[:, 2] + 2)
    rows = (p.norm(dim=1) - 0.8 - wave).abs().topk(count, largest=False).indices.sort().values
    coords = torch.nn.functional.pad(index[rows], (1, 0)).int().to(device)
    return SparseTensor(torch.zeros(count, 0, device=device), coords, 1, SIDE)


def best_s(work: Callable[[], object], repeats: int, device: str) -> float:
    """The shortest of several times, seconds: what the work costs when nothing disturbs it. One more run warms up.

    With one thread on a CPU it is the processor's time, which other processes hardly change.
    """
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:])


def matmul_rate(dtype: torch.dtype, device: str, repeats: int) -> float:
    """Floating-point operations per second of a large matrix product."""
    side = 8192 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / best_s(lambda: a @ a, max(3, repeats), device)


def timed(function: Callable[[], Tensor], arguments: argparse.Namespace, leaves: list[Tensor]) -> float:
    """Seconds of the forward pass, or with --backward of both passes."""
    if not arguments.backward:
        with torch.no_grad():
            return best_s(function, arguments.repeats, arguments.device)
    for leaf in leaves:
        leaf.requires_grad_()

    def both() -> None:
        out = function()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return best_s(both, arguments.repeats, arguments.device)


# ---- the loops


def loop_conv(feats: Tensor, weight: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One gather, product and scattered addition per offset, over the occupied neighbours only."""
    out = torch.zeros(len(feats), len(weight), dtype=torch.float32, device=feats.device)
    for tap, (here, there) in enumerate(pairs):
        out = out.index_add(0, here, (feats[there] @ weight[:, tap].t()).float())
    return out.type(feats.dtype)


def occupied_pairs(table: Tensor) -> list[tuple[Tensor, Tensor]]:
    pairs = []
    for column in table.unbind(1):
        here = (column < len(table)).nonzero()[:, 0]
        pairs.append((here, column[here].long()))
    return pairs


def loop_attention(qkv: Tensor, groups: list[Tensor], block: int = 1024) -> Tensor:
    """The formula per group, some queries at a time so that the scores fit into memory."""
    outs = []
    for rows in groups:
        q, k, v = qkv[rows].transpose(0, 2).unbind(1)
        parts = [torch.softmax(part @ k.mT * k.shape[-1] ** -0.5, dim=-1) @ v for part in q.split(block, dim=1)]
        outs.append(torch.cat(parts, dim=1).transpose(0, 1))
    return torch.cat(outs)[torch.argsort(torch.cat(groups))]


# ---- the table


def report(name: str, tokens: int, ours_s: float, loop_s: float, limits_s: list[float], error: float) -> None:
    limits = "  ".join(f"{tokens / limit:>10,.0f} ({100 * limit / ours_s:3.0f} %)" for limit in limits_s)
    print(
        f"{name:<34} {tokens / ours_s:>11,.0f} {tokens / loop_s:>11,.0f} {loop_s / ours_s:>6.2f} x   {limits}"
        f"   {error:.0e}",
        flush=True,
    )


def convolutions(arguments: argparse.Namespace, dtype: torch.dtype, rate: float, passes: int) -> None:
    x = surface_voxels(arguments.voxels, arguments.device)
    search_s = best_s(lambda: neighbour_table(SparseTensor(x.feats, x.coords, 1, SIDE, check=False)), 1, x.device.type)
    table = neighbour_table(x)
    pairs = occupied_pairs(table)
    occupied = sum(len(here) for here, _ in pairs) / len(x)
    print(f"{len(x):,} voxels at {SIDE}^3, {occupied:.1f} of 27 neighbours occupied, table in {search_s * 1e3:.1f} ms")
    for channels in arguments.channels:
        feats = torch.randn(len(x), channels, device=x.device).to(dtype)
        weight = (torch.randn(channels, 27, channels, device=x.device) / (27 * channels) ** 0.5).to(dtype)
        error = float((table_conv(feats, weight, table) - loop_conv(feats, weight, pairs)).abs().max())
        limits = [passes * 2 * len(x) * taps * channels**2 / rate for taps in (27, occupied)]
        ours_s = timed(lambda f=feats, w=weight: table_conv(f, w, table), arguments, [feats, weight])
        loop_s = timed(lambda f=feats, w=weight: loop_conv(f, w, pairs), arguments, [feats, weight])
        report(f"3x3x3 convolution, {channels} channels", len(x), ours_s, loop_s, limits, error)


def attentions(arguments: argparse.Namespace, dtype: torch.dtype, rate: float, passes: int) -> None:
    heads, width = arguments.heads, 64
    for tokens in arguments.tokens:
        x = surface_voxels(tokens, arguments.device)
        qkv = torch.randn(tokens, 3, heads, width, device=x.device).to(dtype)
        windows = window_partition(x, WINDOW, SHIFT)
        everything = [torch.arange(tokens, device=x.device)]
        kinds: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [
            (
                "windowed",
                lambda q=qkv, x=x: windowed_attention(q, x, WINDOW, SHIFT),
                list(windows.order.split(windows.lengths)),
            ),
            ("full", lambda q=qkv, x=x: full_attention(q, x), everything),
        ]
        for kind, ours, groups in kinds:
            scores = sum(len(rows) ** 2 for rows in groups)
            error = float((ours() - loop_attention(qkv, groups)).abs().max())
            ours_s = timed(ours, arguments, [qkv])
            loop_s = timed(lambda q=qkv, g=groups: loop_attention(q, g), arguments, [qkv])
            name = f"{kind} attention, {tokens:,} tokens"
            report(name, tokens, ours_s, loop_s, [passes * 4 * scores * heads * width / rate], error)
            qkv = qkv.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--channels", type=int, nargs="*", default=[192, 384, 768])
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, nargs="*", default=[5_000, 10_000, 20_000])
    parser.add_argument("--heads", type=int, default=12, help="of 64 channels each")
    parser.add_argument("--backward", action="store_true", help="time forward and backward passes together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="192 channels and 5,000 tokens, one repeat, 2 heads")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.channels, arguments.tokens, arguments.repeats, arguments.heads = [192], [5_000], 1, 2
    torch.set_num_threads(arguments.threads)
    dtype, passes = getattr(torch, arguments.dtype), 3 if arguments.backward else 1
    rate = matmul_rate(dtype, arguments.device, arguments.repeats)
    print(f"{describe()}\n{arguments.dtype}, {'forward and backward' if arguments.backward else 'forward'}", end=", ")
    print(f"matrix product {rate / 1e9:,.0f} GFLOP/s")
    if arguments.device == "cpu" and arguments.threads == 1:
        print("processor time of one thread")
    elif hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5:
        print(
            f"the machine is busy (load {os.getloadavg()[0]:.1f}): times are upper bounds, --threads 1 is not disturbed"
        )
    print(f"{'tokens/s':<34} {'ours':>11} {'loop':>11} {'ratio':>8}   limit (ours / limit): all, occupied   difference")
    convolutions(arguments, dtype, rate, passes)
    attentions(arguments, dtype, rate, passes)


if __name__ == "__main__":
    main()
