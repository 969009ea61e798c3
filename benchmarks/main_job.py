"""The main job on the embedded bundle: seconds of work after imports, and the largest resident memory.

    python -m benchmarks.main_job [--bundle DIR] [--threads 2] [--repeat 3]

Four 512 px views of the procedural sample object -> OBJ + MTL + texture, in fresh processes. Named alternative: the
visual hull of the same views, textured by the same code, as a share of the whole job's time. Limits of the design:
15 s and 2 GiB on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S, LIMIT_GIB = 15.0, 2.0


def child(bundle_name: str | None, threads: int, folder: Path) -> dict:
    import torch

    from triptych.bundles.bundle import load_bundle
    from triptych.geometry.files import write_obj
    from triptych.geometry.isosurface import isosurface
    from triptych.geometry.voxels import visual_hull
    from triptych.images.views import prepare_views
    from triptych.pipelines.reconstruct import VIEW_SIZE, mesh_from_views
    from triptych.procedural import sample_views
    from triptych.render.texture import colour_from_views

    torch.set_num_threads(threads)
    pictures = sample_views(VIEW_SIZE)
    started = time.perf_counter()
    views = prepare_views(pictures, size=VIEW_SIZE)
    prepared = time.perf_counter() - started
    bundle = load_bundle(bundle_name)
    result = mesh_from_views(views, bundle)
    write_obj(result.mesh, folder / "sample.obj")
    seconds = time.perf_counter() - started
    peak = peak_gib()
    started = time.perf_counter()
    colour_from_views(isosurface(visual_hull(views.masks, views.cameras, 64), level=0.5), views)
    hull = time.perf_counter() - started
    stages = {"prepare": round(prepared, 2)} | {key: round(value, 2) for key, value in result.timings_s.items()}
    faces = len(result.mesh.faces)
    return {"seconds": seconds, "stages": stages, "peak_gib": peak, "hull_seconds": hull, "faces": faces}


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.bundle, args.threads, args.child)))
        return
    from benchmarks.machine import describe

    runs = []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "benchmarks.main_job", "--child", folder, "--threads", str(args.threads)]
            command += ["--bundle", args.bundle] if args.bundle else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    best = min(runs, key=lambda run: run["seconds"])
    print(describe())
    every = ", ".join(f"{run['seconds']:.1f}" for run in runs)
    print(f"work after imports: {every} s (limit {LIMIT_S:g} s)")
    print(f"stages of the fastest: {best['stages']}, {best['faces']} faces")
    print(f"peak resident memory: {max(run['peak_gib'] for run in runs):.2f} GiB (limit {LIMIT_GIB:g} GiB)")
    print(f"ratio to the visual hull textured alike: {best['seconds'] / best['hull_seconds']:.2f}")


if __name__ == "__main__":
    main()
