"""How good are the reconstructions? A bundle against the visual hull, on real scans that were never trained on.

    python -m benchmarks.quality [--bundle DIR] [--views 4,3,2,1] [--limit N] [--out DIR]

For each evaluation object of the data folder (TRIPTYCH_DATA, else ../shared/data): the four rig views are rendered at
512 px under the default studio light, straight alpha; the network and the visual hull (64^3, marching cubes) see the
same first N of front, left, back, right, at the rig's scale (a lone photograph does not tell its depth, so fewer views
are harder for a user than here). The meshes are not decimated. Chamfer distance is the mean of the two directed mean
distances between 30,000 surface points each, longest side 1; F-scores at .01, .02, .05; normal consistency. Prints a
table with the machine and the commit, and writes quality.json and a picture of every object with --out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import describe
from trainer.model_card import fill_quality
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.geometry.cameras import VIEW_NAMES, Camera, rig_cameras
from triptych.geometry.files import read_mesh
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.geometry.metrics import compare_meshes
from triptych.geometry.voxels import visual_hull
from triptych.images.views import ViewSet
from triptych.pipelines.reconstruct import DEFAULT_STEPS, Settings, structure_from_views, surface_from_field
from triptych.render.sheets import contact_sheet
from triptych.render.views import render_mesh, render_views, shade

ROOT = Path(__file__).resolve().parent.parent
THRESHOLDS = (0.01, 0.02, 0.05)


def data_folder() -> Path:
    return Path(os.environ.get("TRIPTYCH_DATA", ROOT.parent / "shared" / "data"))


def evaluation_objects(folder: Path, split: str = "eval") -> list[tuple[str, Path]]:
    with (folder / "index.csv").open(newline="", encoding="utf-8") as stream:
        return [(row["id"], folder / row["file"]) for row in csv.DictReader(stream) if row["split"] == split]


def rig_views(mesh: Mesh, size: int = 512) -> ViewSet:
    """The four views of a normalised mesh, as a photographer with a studio light would have them."""
    cameras = rig_cameras()
    return ViewSet.from_rig_renders(shade(render_views(mesh, cameras, size), cameras), [c.azimuth_deg for c in cameras])


def hull_mesh(views: ViewSet) -> Mesh:
    return isosurface(visual_hull(views.masks, views.cameras, 64), level=0.5)


def score(mesh: Mesh, truth: Mesh) -> dict[str, float]:
    found = compare_meshes(mesh, truth, samples=30_000, thresholds=THRESHOLDS)
    scores = {f"f{t:g}": found.f_scores[t] for t in THRESHOLDS}
    return {"chamfer": found.chamfer, **scores, "normals": found.normal_consistency}


def evaluate_object(path: Path, bundle: Bundle, counts: list[int], settings: Settings) -> dict:
    """Scores by method and number of views, with the meshes under "meshes"."""
    truth = read_mesh(path).normalized()
    every = rig_views(truth)
    result: dict = {"meshes": {"truth": truth}, "seconds": {}}
    for count in counts:
        views = every.subset(VIEW_NAMES[:count])
        result[f"hull_{count}"] = score(hull_mesh(views), truth)
        started = time.perf_counter()
        mesh = surface_from_field(structure_from_views(views, bundle, settings))
        result["seconds"][str(count)] = time.perf_counter() - started
        result[f"network_{count}"] = score(mesh, truth)
        result["meshes"][f"network_{count}"] = mesh
    return result


def table(results: list[dict], counts: list[int]) -> str:
    lines = ["| views | method | Chamfer | F@.01 | F@.02 | F@.05 | normals |", "|---|---|---|---|---|---|---|"]
    for count in counts:
        means = {}
        for method in ("hull", "network"):
            rows = [result[f"{method}_{count}"] for result in results]
            means[method] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            m = means[method]
            values = f"{m['chamfer']:.4f} | {m['f0.01']:.3f} | {m['f0.02']:.3f} | {m['f0.05']:.3f} | {m['normals']:.3f}"
            lines.append(f"| {count} | {method} | {values} |")
        ratios = [means["network"][key] / means["hull"][key] for key in means["hull"]]
        lines.append(f"| {count} | network / hull | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--views", default="4,3,2,1")
    parser.add_argument("--limit", type=int, default=None, help="every so many objects, to make about this number")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--raw", action="store_true", help="do not cut away what the silhouettes rule out")
    parser.add_argument("--card", type=Path, default=None, help="a model card whose quality section to fill")
    parser.add_argument("--ensemble", type=int, default=Settings.ensemble)
    parser.add_argument("--split", default="eval", help="of index.csv; tune on train, report on eval")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if args.card and (args.limit or args.raw or args.split != "eval"):
        parser.error("--card is for the whole protocol: no --limit, no --raw, no other --split")
    bundle = load_bundle(args.bundle)
    counts = [int(n) for n in args.views.split(",")]
    settings = replace(
        Settings(),
        steps=args.steps,
        guidance=args.guidance,
        keep_silhouettes=not args.raw,
        ensemble=args.ensemble,
    )
    objects = evaluation_objects(data_folder(), args.split)
    if args.limit:
        objects = objects[:: max(1, len(objects) // args.limit)][: args.limit]
    results = []
    for name, path in objects:
        result = evaluate_object(path, bundle, counts, settings)
        meshes = result.pop("meshes")
        results.append({"id": name} | result)
        if args.out:
            save_picture(args.out / f"{name}.png", meshes)
        line = " ".join(f"{key} {result[key]['chamfer']:.4f}" for key in result if key != "seconds")
        print(f"{name:60.60s} {line}", flush=True)
    steps = settings.steps or bundle.manifest.sampling.get("steps", DEFAULT_STEPS)
    what = "evaluation scans" if args.split == "eval" else f"objects of the split {args.split}"
    heading = f"{len(results)} {what}, {steps} steps, {settings.ensemble} poses; {describe()}"
    print(f"\n{heading}")
    print(table(results, counts))
    if args.card:
        fill_quality(args.card, f"{heading}\n\n{table(results, counts)}")
    if args.out:
        (args.out / "quality.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def save_picture(path: Path, meshes: dict[str, Mesh]) -> None:
    """Clay pictures of the truth and each reconstruction from two sides."""
    cameras = [Camera(30, 20, half_extent=0.75), Camera(210, 20, half_extent=0.75)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([torch.cat([render_mesh(mesh, cameras, 192, "clay") for mesh in meshes.values()])], path)


if __name__ == "__main__":
    main()
