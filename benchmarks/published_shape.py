"""The published shape on a GPU with random weights: seconds, memory and utilisation of every stage, and training steps.

    python benchmarks/published_shape.py [--voxels 20000] [--steps 25] [--precision float16] [--compile] [--int8]
        [--no-training] [--smoke]

Sampling: 25 + 25 steps with guidance 5 while t is 0.5 or more (times rescaled by 3), one picture, 1374 tokens of random
numbers; the voxels are those nearest to a wavy closed surface, because random weights find no structure. Utilisation is
the arithmetic of the flows' matrix products, attention and convolutions (every neighbour counted, occupied or not)
against the time and what a large matrix product of the same dtype reaches in the same run. Training: bfloat16 autocast,
forward and backward pass and fused AdamW, batch 1, 2, 4, 8 as far as memory goes; three times the forward arithmetic.

Without CUDA nothing is measured, and the output says so. --smoke runs the same code at a small size on any device,
which proves that it runs and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.sparse_ops import best_s, matmul_rate, surface_voxels  # noqa: E402
from triptych.bundles.components import build_component  # noqa: E402
from triptych.models.accelerate import compile_blocks, quantize_blocks  # noqa: E402
from triptych.models.structure_vae import occupied_coords  # noqa: E402
from triptych.pipelines.memory import Stages, memory_table  # noqa: E402
from triptych.pipelines.memory_plan import LARGE, Networks, flow_flops, plan_memory, plan_table  # noqa: E402
from triptych.pipelines.published import (  # noqa: E402
    PRECISIONS,
    PublishedSettings,
    Sampling,
    mesh_of_features,
    sample_slat,
    sample_structure,
)
from triptych.sampling.flow_euler import flow_times  # noqa: E402
from triptych.sparse.spatial import downsample  # noqa: E402
from triptych.sparse.tensor import SparseTensor  # noqa: E402

INTERVAL, RESCALE, GUIDANCE = (0.5, 1.0), 3.0, 5.0
NOT_MEASURED = (
    "seconds per stage: not measured (no CUDA device here)\n"
    "peak memory per stage: not measured (no CUDA device here); the estimate is above\n"
    "utilisation of the flows: not measured (no CUDA device here)\n"
    "training steps: not measured (no CUDA device here)"
)


@dataclass(frozen=True)
class Shape:
    """What is run: the networks, and how many occupied voxels, context tokens and steps."""

    networks: Networks
    voxels: int
    context: int
    steps: int


def smoke_shape() -> Shape:
    """The same networks in small; the voxels keep their grid of 64^3."""
    small: dict[str, tuple[str, dict[str, Any]]] = {name: (kind, dict(args)) for name, (kind, args) in LARGE.items()}
    for name in ("structure_flow", "slat_flow"):
        small[name][1].update(model_channels=48, cond_channels=24, num_blocks=1, num_heads=2)
    small["slat_flow"][1].update(io_block_channels=[16])
    small["structure_flow"][1].update(resolution=4)
    small["structure_decoder"][1].update(channels=[16, 8, 8], num_res_blocks=1, num_res_blocks_middle=1)
    small["slat_decoder_mesh"][1].update(model_channels=64, num_blocks=1, num_heads=2)
    return Shape(small, voxels=300, context=21, steps=2)


def built(shape: Shape, name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """A network with random weights everywhere, so that nothing is skipped or constant."""
    kind, config = shape.networks[name]
    with torch.device(device):
        network = build_component(kind, dict(config))
    cast(Any, network).convert_to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network.eval()


def evaluations(steps: int) -> int:
    """How often a flow runs: once a step, twice where guidance acts."""
    low, high = INTERVAL
    return steps + sum(low <= t <= high for t in flow_times(steps, RESCALE)[:-1])


def sample(shape: Shape, settings: PublishedSettings, device: str, peak_rate: float) -> None:
    """Runs the stages one after another and prints seconds, memory and utilisation."""
    dtype = PRECISIONS[str(settings.precision)]
    voxels = surface_voxels(shape.voxels, device)
    tokens = torch.randn(1, shape.context, shape.networks["structure_flow"][1]["cond_channels"], device=device)
    stages, seconds = Stages(device), {}
    coords = voxels.coords

    def run(name: str, component: str, work: Callable[[nn.Module], Any]) -> Any:
        with stages.run(name, lambda: prepared(component)) as network:
            work(network)  # compiles, tunes and warms up
            _wait(device)
            started = time.perf_counter()
            result = work(network)
            _wait(device)
            seconds[name] = time.perf_counter() - started
        return result

    def prepared(component: str) -> nn.Module:
        network = built(shape, component, dtype, device)
        if component.endswith("flow") and settings.int8:
            quantize_blocks(network)
        if component.endswith("flow") and settings.compiled:
            compile_blocks(network)
        return network

    def draw() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    with torch.no_grad():
        latent = run("structure flow", "structure_flow", lambda net: sample_structure(net, tokens, settings, draw()))
        run("structure decoder", "structure_decoder", lambda net: occupied_coords(net(latent)))
        slat = run("latent flow", "slat_flow", lambda net: sample_slat(net, coords, tokens, settings, draw()))
        features = run("mesh decoder", "slat_decoder_mesh", lambda net: net(slat))
        features = features.replace(_ball(features))
        with stages.run("mesh"):
            mesh_of_features(features)
            started = time.perf_counter()
            mesh = mesh_of_features(features)
            seconds["mesh"] = time.perf_counter() - started
    calls = evaluations(shape.steps)
    print(f"\n{shape.steps} + {shape.steps} steps, {calls} evaluations of each flow, {len(mesh.faces):,} triangles")
    print("\n".join(f"{name:<18} {value:8.3f} s" for name, value in seconds.items()))
    print(f"{'together':<18} {sum(seconds.values()):8.3f} s\n")
    print(memory_table(stages.memory))
    for name, flops in _forward_flops(shape, voxels).items():
        rate = calls * flops / seconds[{"structure_flow": "structure flow", "slat_flow": "latent flow"}[name]]
        print(f"{name}: {flops / 1e12:.3f} TFLOP an evaluation, {rate / 1e12:.2f} TFLOP/s, {rate / peak_rate:.1%} of a "
              f"matrix product's {peak_rate / 1e12:.1f}")  # fmt: skip


def train(shape: Shape, name: str, device: str, peak_rate: float, batches: tuple[int, ...]) -> None:
    """Seconds of a training step of one flow at each batch size that fits."""
    flow = built(shape, name, torch.float32, device).train()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=1e-4, fused=device == "cuda")
    config = shape.networks[name][1]
    voxels = surface_voxels(shape.voxels, device)
    flops = 3 * _forward_flops(shape, voxels)[name]
    for batch in batches:
        x = _noise(config, batch, voxels, device)
        cond = torch.randn(batch, shape.context, config["cond_channels"], device=device)

        def step(x=x, cond=cond, batch=batch) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16):
                out = flow(x, torch.full((batch,), 500.0, device=device), cond)
            feats = cast(Tensor, out.feats if isinstance(out, SparseTensor) else out)
            feats.float().square().mean().backward()
            optimizer.step()

        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = best_s(step, 3, device)
        except torch.cuda.OutOfMemoryError:
            print(f"training {name}, batch {batch}: does not fit into the memory of this device")
            return
        memory = (
            f"{torch.cuda.max_memory_allocated() / (1 << 30):.1f} GiB" if device == "cuda" else "memory not measured"
        )
        print(f"training {name}, batch {batch}: {taken:.3f} s, {batch * flops / taken / peak_rate:.1%} of a matrix "
              f"product's rate, {memory}", flush=True)  # fmt: skip


def _noise(config: Any, batch: int, voxels: SparseTensor, device: str) -> Any:
    if "io_block_channels" not in config:
        return torch.randn(batch, config["in_channels"], *[config["resolution"]] * 3, device=device)
    one = voxels.replace(torch.randn(len(voxels), config["in_channels"], device=device))
    return SparseTensor.cat_samples([one] * batch)


def _forward_flops(shape: Shape, voxels: SparseTensor) -> dict[str, int]:
    structure, slat = shape.networks["structure_flow"][1], shape.networks["slat_flow"][1]
    dense = (structure["resolution"] // structure["patch_size"]) ** 3
    tokens = len(downsample(voxels, slat["patch_size"]))
    return {
        "structure_flow": flow_flops(structure, dense, shape.context),
        "slat_flow": flow_flops(slat, tokens, shape.context, len(voxels)),
    }


def _ball(features: SparseTensor) -> Tensor:
    """Random weights describe no surface: the decoder's features with the distance of a ball instead of theirs."""
    side = cast(int, features.resolution)
    position = (features.coords[:, 1:].float() + 0.5) / side * 2 - 1
    feats = features.feats.float().clone()
    feats[:, :8] = position.norm(dim=1, keepdim=True) - 0.8
    return feats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--voxels", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="float16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a small size, on any device")
    args = parser.parse_args(argv)
    shape = smoke_shape() if args.smoke else Shape(LARGE, args.voxels, 1374, args.steps)
    print(f"published shape, random weights, {shape.voxels:,} voxels, {args.precision}; {describe()}")
    if args.smoke:
        print("a smoke run at a small size: its numbers say nothing about the published shape")
    else:
        print(f"estimate:\n{plan_table(plan_memory(dtype=PRECISIONS[args.precision], voxels=shape.voxels))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.smoke:
        print(NOT_MEASURED)
        return
    sampling = Sampling(shape.steps, GUIDANCE, INTERVAL, RESCALE)
    settings = PublishedSettings(structure=sampling, slat=sampling, precision=args.precision)
    settings = replace(settings, compiled=args.compile, int8=args.int8)
    repeats = 1 if args.smoke else 10
    sample(shape, settings, device, matmul_rate(PRECISIONS[args.precision], device, repeats))
    if not args.no_training:
        rate = matmul_rate(torch.bfloat16, device, repeats)
        for name in ("structure_flow", "slat_flow"):
            train(shape, name, device, rate, (1,) if args.smoke else (1, 2, 4, 8))


if __name__ == "__main__":
    main()
