"""What torch.compile and 8-bit weights bring to the two flows, and what error they cost: one run, one table.

    python benchmarks/accelerate.py [--shape small|published] [--device cpu|cuda] [--flows structure_flow]
        [--no-compile] [--repeats 5] [--threads 1]

Each flow has random weights everywhere and runs on the same noise, time and tokens in float32 (the reference), in
bfloat16, in bfloat16 with compiled blocks, with 8-bit matrices (torchao), and with both. Error: root mean square of the
velocity's difference from float32, over that of the velocity itself. Time: the shortest of several evaluations, and
what share of plain bfloat16's it is. Weights: bytes of parameters and buffers.

small: 256 channels, 4 blocks, 512 tokens (structure) and 3,000 voxels (latents), which a CPU answers in a second. The
published shape needs CUDA: without it nothing is measured, and the output says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from benchmarks.published_shape import Shape, built  # noqa: E402
from benchmarks.sparse_ops import best_s, surface_voxels  # noqa: E402
from triptych.errors import TriptychError  # noqa: E402
from triptych.models.accelerate import compile_blocks, quantize_blocks  # noqa: E402
from triptych.pipelines.memory_plan import LARGE  # noqa: E402
from triptych.sparse.tensor import SparseTensor  # noqa: E402

FLOWS = ("structure_flow", "slat_flow")
VARIANTS: dict[str, tuple[torch.dtype, bool, bool]] = {  # dtype, 8-bit weights, compiled
    "float32": (torch.float32, False, False),
    "bfloat16": (torch.bfloat16, False, False),
    "bfloat16, compiled": (torch.bfloat16, False, True),
    "8-bit weights": (torch.bfloat16, True, False),
    "8-bit weights, compiled": (torch.bfloat16, True, True),
}
TIME = 700.0


def small_shape() -> Shape:
    """The published networks, narrower and shorter."""
    small: dict[str, tuple[str, dict[str, Any]]] = {name: (LARGE[name][0], dict(LARGE[name][1])) for name in FLOWS}
    for name in FLOWS:
        small[name][1].update(model_channels=256, cond_channels=256, num_blocks=4, num_heads=4)
    small["structure_flow"][1].update(resolution=8)
    small["slat_flow"][1].update(io_block_channels=[64])
    return Shape(small, voxels=3000, context=257, steps=1)


def inputs(shape: Shape, name: str, device: str) -> tuple[Any, Tensor, Tensor]:
    """Noise, time and image tokens of one sample, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    config = shape.networks[name][1]
    cond = torch.randn(1, shape.context, config["cond_channels"], generator=generator).to(device)
    time = torch.full((1,), TIME, device=device)
    if name == "slat_flow":
        voxels = surface_voxels(shape.voxels, device)
        noise = torch.randn(len(voxels), config["in_channels"], generator=generator).to(device)
        return voxels.replace(noise), time, cond
    noise = torch.randn(1, config["in_channels"], *[config["resolution"]] * 3, generator=generator)
    return noise.to(device), time, cond


def network(shape: Shape, name: str, variant: str, device: str) -> nn.Module:
    """The flow of one variant; every variant has the same random weights. Raises TriptychError as the two do."""
    dtype, quantized, compiled = VARIANTS[variant]
    torch.manual_seed(0)
    flow = built(shape, name, torch.float32, device)
    cast(Any, flow).convert_to(dtype)
    if quantized:
        quantize_blocks(flow)
    if compiled:
        compile_blocks(flow)
    return flow


def weight_bytes(flow: nn.Module) -> int:
    """Of parameters and buffers as they are held; an 8-bit matrix counts its integers and scales."""
    return sum(_bytes(tensor) for tensor in (*flow.parameters(), *flow.buffers()))


def _bytes(tensor: Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor made of others, such as torchao's
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def velocity(flow: nn.Module, given: tuple[Any, Tensor, Tensor]) -> Tensor:
    out = flow(*given)
    return (out.feats if isinstance(out, SparseTensor) else cast(Tensor, out)).float()


def measure(
    shape: Shape, name: str, device: str, repeats: int, compiled: bool, say: Callable[[str], None]
) -> dict[str, dict]:
    """Seconds, error and bytes of each variant of a flow; a variant that cannot run here is said and left out."""
    given, found = inputs(shape, name, device), dict[str, dict]()
    truth = torch.zeros(())
    for variant in VARIANTS:
        if VARIANTS[variant][2] and not compiled:
            continue
        try:
            with torch.no_grad():
                flow = network(shape, name, variant, device)
                result = velocity(flow, given)  # compiles here
                seconds = best_s(lambda flow=flow: velocity(flow, given), repeats, device)
        except (TriptychError, RuntimeError) as error:  # torch.compile without a compiler fails in its own ways
            reason = str(error).strip().splitlines()[0]
            say(f"{name}, {variant}: not measured ({reason[:160]})")
            continue
        truth = result if variant == "float32" else truth
        error_rms = float((result - truth).square().mean().sqrt() / truth.square().mean().sqrt())
        found[variant] = {"seconds": seconds, "error": error_rms, "bytes": weight_bytes(flow)}
        torch.compiler.reset()
    return found


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table; times beside plain bfloat16's of the same run."""
    lines = ["| flow | variant | weights, MB | error | evaluation, ms | time / bfloat16 |", "|---|---|---|---|---|---|"]
    for name, variants in results.items():
        for variant, row in variants.items():
            ratio = f"{row['seconds'] / variants['bfloat16']['seconds']:.2f}" if "bfloat16" in variants else "-"
            error = f"{row['error']:.1e}" if row["error"] else "0"
            numbers = f"{row['bytes'] / 1e6:.1f} | {error} | {row['seconds'] * 1e3:.1f} | {ratio}"
            lines.append(f"| {name} | {variant} | {numbers} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=("small", "published"), default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=FLOWS)
    parser.add_argument("--no-compile", action="store_true", help="leave out what compiles for minutes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print(f"{args.shape} shape, random weights, {args.device}; {describe()}")
    if args.device == "cuda" and not torch.cuda.is_available() or args.shape == "published" and args.device == "cpu":
        print("error, speed and memory of compiled and 8-bit flows: not measured (no CUDA device here)")
        return
    shape = Shape(LARGE, 20_000, 1374, 1) if args.shape == "published" else small_shape()
    if args.device == "cpu" and args.threads == 1:
        print("processor time of one thread")
    compiled = not args.no_compile
    print(table({name: measure(shape, name, args.device, args.repeats, compiled, print) for name in args.flows}))


if __name__ == "__main__":
    main()
