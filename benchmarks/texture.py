"""Unwrapping and texturing: seconds per stage on a mesh of 20,480 faces, and the ratios that design choices rest on.

    python -m benchmarks.texture [--size 1024] [--view-size 512] [--threads 2]

Prints, from one run on this machine: xatlas beside everything else, the texture beside vertex colours (the fast path),
and the error of each, inside the views' eroded masks and from cameras between the views.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import torch
import trimesh

from triptych.geometry.cameras import rig_cameras
from triptych.geometry.mesh import Mesh
from triptych.geometry.uv import unwrap_with_report
from triptych.render.inpaint import split_long_edges
from triptych.render.texture import bake_texture, vertex_colours_from_views
from triptych.render.views import render_views

BETWEEN = (45.0, 135.0, 225.0, 315.0)


def patterned_object() -> tuple[Mesh, Mesh]:
    """A bumpy solid of 20,480 faces, bare; and the same surface cut finer, with a pattern of a few face widths."""
    ball = trimesh.creation.icosphere(5)
    p = ball.vertices
    bump = 1 + 0.12 * np.sin(6 * p[:, [1]]) + 0.06 * np.sin(17 * p[:, [0]] + 3 * p[:, [2]])
    bare = Mesh((p * bump).astype(np.float32), ball.faces.astype(np.int64)).normalized()
    corners = bare.vertices[bare.faces]
    vertices, faces, _ = split_long_edges(bare.vertices, bare.faces, corners, max_edge=0.006, max_faces=200_000)
    waves = [0.5 + 0.4 * np.sin(f * vertices @ d) for f, d in zip((60, 90, 140), np.eye(3), strict=True)]
    colours = np.stack([*waves, np.ones(len(vertices))], axis=1).astype(np.float32)
    return bare, Mesh(vertices, faces, colors=colours)


def views_of(mesh: Mesh, size: int, azimuths_deg: tuple[float, ...] = (0.0, 90.0, 180.0, 270.0)) -> SimpleNamespace:
    cameras = rig_cameras(azimuths_deg)
    drawn = render_views(mesh, cameras, size)
    return SimpleNamespace(images=torch.cat([drawn.albedo, drawn.alpha], dim=1), cameras=cameras)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    inside = -torch.nn.functional.max_pool2d(-a[:, 3:], 5, 1, 2) > 0.99
    return -10 * torch.log10((a[:, :3] - b[:, :3]).square()[inside.expand(-1, 3, -1, -1)].mean()).item()


def timed(function, *args, repeat: int = 3, **kwargs):
    """The result and the shortest of ``repeat`` times in seconds."""
    best = float("inf")
    for _ in range(repeat):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        best = min(best, time.perf_counter() - start)
    return result, best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="texels per side")
    parser.add_argument("--view-size", type=int, default=512, help="pixels per side of a view")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    bare, source = patterned_object()
    views, between = views_of(source, args.view_size), views_of(source, args.view_size, BETWEEN)
    (mesh, layout), unwrap_s = timed(unwrap_with_report, bare, texture_size=args.size)
    (baked, report), bake_s = timed(bake_texture, mesh, views, args.size)
    coloured, vertex_s = timed(vertex_colours_from_views, bare, views)

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}, {commit}")
    print(f"{len(bare.faces)} faces, 4 views of {args.view_size}, texture {args.size}: {layout}")
    print(f"{report}")
    print(f"unwrap (xatlas)   {unwrap_s:6.2f} s")
    print(f"bake the texture  {bake_s:6.2f} s = {bake_s / unwrap_s:.2f} x the unwrap")
    print(f"vertex colours    {vertex_s:6.2f} s = {vertex_s / (unwrap_s + bake_s):.2f} x unwrap and bake")
    for name, result in (("texture", baked), ("vertex colours", coloured)):
        own = psnr(views.images, views_of(result, args.view_size).images)
        other = psnr(between.images, views_of(result, args.view_size, BETWEEN).images)
        print(f"{name:15s} PSNR {own:.1f} dB in the views, {other:.1f} dB between them")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
