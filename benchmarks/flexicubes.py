"""Time and memory of FlexiCubes on a decoder-sized shell, beside marching cubes on the dense grid, in one run.

    python benchmarks/flexicubes.py [--coarse 64] [--repeats 3] [--threads 2] [--training]

The shell is like what the mesh decoder returns for a bumpy body: every voxel of the coarse grid within a voxel of the
surface, each split into 4^3 cubes, with 101 channels: the signed distance at the corners and small random weights.
scikit-image's marching cubes gets the same field on the whole fine grid, without colours or weights. It finds one wall;
FlexiCubes finds two, as the published method does, for whatever lies behind the shell counts as outside. The sparse
extraction runs in a process of its own, whose peak memory is printed with and without the features themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe  # noqa: E402
from triptych.geometry.flexicubes import features_to_mesh  # noqa: E402
from triptych.geometry.flexicubes_tables import CORNERS  # noqa: E402

SPLIT = 4


def body(points: Tensor) -> Tensor:
    """(..., 3) positions to (...), negative inside; about the distance to a ball with bumps of several sizes."""
    x, y, z = points.unbind(-1)
    bumps = 0.05 * torch.sin(9 * x) * torch.sin(8 * y + 1) * torch.sin(7 * z + 2) + 0.01 * torch.sin(40 * x + 30 * y)
    return points.norm(dim=-1) - 0.38 - bumps


def grid_field(resolution: int) -> Tensor:
    """The body at the vertices of a whole grid, (R + 1, R + 1, R + 1)."""
    axis = torch.linspace(-0.5, 0.5, resolution + 1)
    planes = [body(torch.stack(torch.meshgrid(x[None], axis, axis, indexing="ij"), dim=-1)[0]) for x in axis]
    return torch.stack(planes)


def shell_features(coarse: int) -> tuple[Tensor, Tensor]:
    """The active cubes (N, 3) of the fine grid and their channels (N, 101)."""
    field, near = grid_field(coarse), 1 / coarse
    corners = [field[x : x + coarse, y : y + coarse, z : z + coarse] for x, y, z in CORNERS.tolist()]
    values = torch.stack(corners)
    voxels = ((values.amin(dim=0) < near) & (values.amax(dim=0) > -near)).nonzero().int()
    children = torch.cartesian_prod(*[torch.arange(SPLIT, dtype=torch.int32)] * 3)
    cubes = (voxels[:, None] * SPLIT + children).flatten(0, 1)
    fine = coarse * SPLIT
    feats = torch.empty(len(cubes), 101).normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    for number, corner in enumerate(CORNERS.int()):
        feats[:, number] = body((cubes + corner) / fine - 0.5) + 1 / fine  # the extraction takes 1 / fine away
    return cubes, feats


def shortest(work: Callable[[], Any], repeats: int) -> tuple[dict[str, float], Any]:
    """The shortest wall time and processor time (of all threads) of several runs, seconds; what the work returned."""
    wall_s, cpu_s = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        wall_s.append(time.perf_counter() - wall)
        cpu_s.append(time.process_time() - cpu)
    return {"wall_s": min(wall_s), "cpu_s": min(cpu_s)}, result


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def extract(coarse: int, repeats: int, training: bool) -> dict[str, float]:
    cubes, feats = shell_features(coarse)
    before_mib = peak_mib()
    with torch.no_grad():
        times, mesh = shortest(lambda: features_to_mesh(cubes, feats, SPLIT * coarse, training=training), repeats)
    return {
        "voxels": len(cubes) / SPLIT**3,
        "cubes": len(cubes),
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        **times,
        "before_mib": before_mib,
        "peak_mib": peak_mib(),
    }


def marching_cubes(coarse: int, repeats: int) -> dict[str, float]:
    from skimage import measure

    field = grid_field(SPLIT * coarse).numpy()
    times, (vertices, faces, *_) = shortest(lambda: measure.marching_cubes(field, level=0.0), repeats)
    return {"vertices": len(vertices), "faces": len(faces), **times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coarse", type=int, default=64, help="side of the voxel grid that is split four times")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--training", action="store_true", help="with middle vertices and the regulariser")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(extract(args.coarse, args.repeats, args.training)))
        return
    answer = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker"], check=True, stdout=subprocess.PIPE, text=True
    )
    ours = json.loads(answer.stdout)
    dense = marching_cubes(args.coarse, args.repeats)
    print(describe())
    fine = SPLIT * args.coarse
    print(
        f"FlexiCubes: {ours['voxels']:,.0f} voxels at {args.coarse}^3, {ours['cubes']:,} cubes at {fine}^3 -> "
        f"{ours['vertices']:,} vertices, {ours['faces']:,} faces in {ours['wall_s']:.2f} s, "
        f"{ours['cpu_s']:.2f} s of processor time"
    )
    print(
        f"peak memory of the process {ours['peak_mib']:,.0f} MiB, of which {ours['before_mib']:,.0f} MiB before the "
        f"extraction (the features are {ours['cubes'] * 101 * 4 / 2**20:,.0f} MiB)"
    )
    print(
        f"marching cubes, dense {fine}^3: {dense['vertices']:,} vertices, {dense['faces']:,} faces in "
        f"{dense['wall_s']:.2f} s, {dense['cpu_s']:.2f} s of processor time; FlexiCubes takes "
        f"{ours['wall_s'] / dense['wall_s']:.1f} times as long, {ours['cpu_s'] / dense['cpu_s']:.1f} times the "
        f"processor time"
    )
    if os.getloadavg()[0] > args.threads + 1:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): compare the processor times")


if __name__ == "__main__":
    main()
