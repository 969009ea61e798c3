"""How fast the torch rasteriser is beside ray casting with embree (through trimesh), at one resolution, in one run.

    python benchmarks/rasterize.py [--repeats 5] [--threads 2]

Both answer the same question (which triangle, at what depth, for every pixel); agreement is printed with the times. The
ray caster's acceleration structure is built outside its time. Embree itself uses one thread through trimesh.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import trimesh

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from triptych.geometry.cameras import Camera, rig_cameras  # noqa: E402
from triptych.geometry.mesh import Mesh  # noqa: E402
from triptych.render.rasterize import Fragments, rasterize  # noqa: E402
from triptych.render.views import render_views  # noqa: E402


def bumpy(faces: int) -> trimesh.Trimesh:
    """A star-shaped body with about this many faces: overlapping bumps, so that depth matters."""
    rows = max(8, round((faces / 7.9) ** 0.5))
    body = trimesh.creation.uv_sphere(radius=1.0, count=[rows, 2 * rows])
    x, y, z = body.vertices.T
    radius = 0.4 + 0.06 * np.sin(9 * x) * np.sin(8 * y + 1) * np.sin(7 * z + 2)
    return trimesh.Trimesh(body.vertices * radius[:, None], body.faces, process=False)


def best_s(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several times, seconds: what the work costs when nothing disturbs it."""
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def cast(body: trimesh.Trimesh, cameras: list[Camera], size: int) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    """A function that casts the rays of all pixels and returns triangle ids and depths, (B * size * size,) each."""
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    caster = RayMeshIntersector(body)
    rays = [[ray.reshape(-1, 3).double().numpy() for ray in camera.rays(size)] for camera in cameras]
    caster.intersects_first(*(ray[:1] for ray in rays[0]))  # builds the acceleration structure

    def work() -> tuple[np.ndarray, np.ndarray]:
        ids = np.full(len(cameras) * size * size, -1)
        depths = np.full(len(ids), np.inf)
        for i, (camera, (origins, directions)) in enumerate(zip(cameras, rays, strict=True)):
            hit, ray, place = caster.intersects_id(origins, directions, multiple_hits=False, return_locations=True)
            ids[i * size * size + ray] = hit
            depths[i * size * size + ray] = camera.project(torch.from_numpy(place).float())[1].numpy()
        return ids, depths

    return work


def compare(faces: int, size: int, cameras: list[Camera], repeats: int) -> None:
    body = bumpy(faces)
    vertices, triangles = torch.tensor(body.vertices).float(), torch.tensor(np.asarray(body.faces))

    def draw() -> Fragments:
        clip = torch.stack([camera.clip(vertices) for camera in cameras])
        return rasterize(clip, triangles, size, size, backend="torch")

    name = f"{len(body.faces):>7,} faces, {len(cameras)} view(s) of {size} x {size}"
    drawn_s = best_s(draw, repeats)
    try:
        casting = cast(body, cameras, size)
    except ImportError:
        print(f"{name}: rasterize {drawn_s * 1e3:7.1f} ms (embreex is not installed: no comparison)")
        return
    cast_s = best_s(casting, repeats)
    fragments, (ids, depths) = draw(), casting()
    both = (ids >= 0) & (fragments.triangle_id.view(-1).numpy() >= 0)
    close = np.abs(depths[both] - fragments.depth.view(-1).numpy()[both]) < 2e-4
    print(
        f"{name}: rasterize {drawn_s * 1e3:7.1f} ms, embree rays {cast_s * 1e3:7.1f} ms, "
        f"ratio {cast_s / drawn_s:5.2f} x, depth agrees on {100 * close.mean():.2f} %"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asked = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    print(f"commit {commit or 'unknown'}, {machine()}, {arguments.threads} threads, torch {torch.__version__}")
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): times are upper bounds")
    compare(50_000, 512, [Camera(azimuth_deg=30, elevation_deg=20)], arguments.repeats)
    compare(1_000, 256, rig_cameras(), arguments.repeats)
    compare(10_000, 512, rig_cameras(), arguments.repeats)
    for faces in (1_000, 10_000):
        body = bumpy(faces)
        mesh = Mesh(np.asarray(body.vertices, np.float32), np.asarray(body.faces, np.int64))
        seconds = best_s(partial(render_views, mesh, rig_cameras(), 256), arguments.repeats)
        print(f"{len(body.faces):>7,} faces, render_views of 4 views, 256 x 256, supersample 2: {seconds * 1e3:.1f} ms")


def machine() -> str:
    """The processor's name where the system tells it, and its core count."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


if __name__ == "__main__":
    main()
