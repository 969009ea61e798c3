"""Chooses how the surface is taken from a field bundle's field: smoothing and level, on validation objects.

    python -m benchmarks.tune_surface --bundle DIR --data PREPARED [--limit 24] [--steps 1]

Evaluation scans are not touched. For each held-out object of the prepared data its four stored views are lit, the
field is predicted once, every choice of smoothing (voxels) and level scored by Chamfer distance to the isosurface
of the object's own solid. Prints the table; the best goes into ``sampling`` of the export (trainer/tasks).
"""

from __future__ import annotations

import argparse
from itertools import product

import numpy as np
import torch
from scipy import ndimage

from benchmarks.machine import describe
from trainer.data import PreparedData, relight
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG
from triptych.geometry.isosurface import isosurface
from triptych.geometry.metrics import compare_meshes
from triptych.images.views import ViewSet
from triptych.pipelines.outlines import covered, outlines_of
from triptych.pipelines.reconstruct import Settings, structure_from_views, surface_from_field

SMOOTHINGS, LEVELS = (0.0, 0.5, 0.8, 1.2), (0.0, -0.4, -0.7, -1.0, -1.3, -1.6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--ensemble", type=int, default=Settings.ensemble)
    args = parser.parse_args()
    bundle = load_bundle(args.bundle)
    for key in ("smoothing_voxels", "level"):
        bundle.manifest.sampling.pop(key, None)
    held_out = PreparedData(args.data, "validation")
    every = max(1, len(held_out) // args.limit)
    settings = Settings(steps=args.steps, keep_silhouettes=False, ensemble=args.ensemble)
    scores: dict[tuple[float, float], list[float]] = {choice: [] for choice in product(SMOOTHINGS, LEVELS)}
    hulls = []
    for i in range(0, len(held_out), every):
        item = held_out[i]
        rgba = relight(item["albedo"], item["normal"], np.random.default_rng(i))[: args.views]
        views = ViewSet.from_rig_renders(rgba, VIEW_AZIMUTHS_DEG[: args.views])
        truth = isosurface(item["sdf"].astype(np.float32) / -127)
        field = structure_from_views(views, bundle, settings)
        outlines = outlines_of(views.masks, views.cameras, len(field))
        allowed = outlines.allowed
        hulls.append(compare_meshes(isosurface(allowed), truth, samples=10_000).chamfer)
        for smoothing, level in scores:
            smooth = np.minimum(covered(ndimage.gaussian_filter(field, smoothing) - level, outlines), allowed)
            try:
                mesh = surface_from_field(smooth.astype(np.float32))
                scores[smoothing, level].append(compare_meshes(mesh, truth, samples=10_000).chamfer)
            except TriptychError:  # nothing left
                scores[smoothing, level].append(0.5)
    print(f"{describe()}; {len(hulls)} validation objects, hull {np.mean(hulls):.4f}; torch {torch.__version__}")
    for (smoothing, level), values in sorted(scores.items(), key=lambda item: np.mean(item[1])):
        print(f"smoothing {smoothing:3.1f}  level {level:5.2f}  Chamfer {np.mean(values):.4f}")


if __name__ == "__main__":
    main()
