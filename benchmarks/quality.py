"""How good are the reconstructions? A bundle against the visual hull, on real scans that were never trained on.

    python -m benchmarks.quality [--bundle DIR] [--views 4,3,2,1] [--colours] [--limit N] [--out DIR]

For each evaluation object of the data folder (TRIPTYCH_DATA, else ../shared/data): the four rig views are rendered at
512 px under the default studio light, straight alpha; the network and the visual hull (64^3, marching cubes) see the
same first N of front, left, back, right, at the rig's scale (a lone photograph does not tell its depth, so fewer views
are harder for a user than here). A bundle with a second stage is measured with it ("both stages") and without it
("stage one"). The meshes are not decimated. Chamfer distance is the mean of the two directed mean distances between
30,000 surface points each, longest side 1; F-scores at .01, .02, .05; normal consistency. With
--colours every mesh is also coloured from its views (vertex colours) and rendered from eight azimuths between the rig's
at elevation 20; PSNR and SSIM over the union of both silhouettes tell it from the true object under the same light.
Prints a table with the machine and the commit, and writes quality.json and a picture of every object with --out.
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
from triptych.geometry.voxels import hull_field, visual_hull
from triptych.images.views import ViewSet
from triptych.pipelines.reconstruct import (
    DEFAULT_STEPS,
    Settings,
    fill_of,
    latents_of,
    structure_from_views,
    surface_from_field,
    surface_from_latents,
)
from triptych.pipelines.structured import has_second_stage
from triptych.render.sheets import contact_sheet
from triptych.render.texture import colour_from_views
from triptych.render.views import render_mesh, render_views, shade

ROOT = Path(__file__).resolve().parent.parent
THRESHOLDS = (0.01, 0.02, 0.05)
NOVEL = [Camera(22.5 + 45 * i, 20, half_extent=0.75) for i in range(8)]
NOVEL_SIZE = 192


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


def colour_score(mesh: Mesh, views: ViewSet, truth: torch.Tensor) -> dict[str, float]:
    """PSNR and SSIM over the union mask of NOVEL's pictures; truth (8, 4, S, S): the lit object, straight alpha."""
    from skimage.metrics import structural_similarity

    coloured = colour_from_views(mesh, views, texture_size=0, fill=fill_of(mesh, views))
    drawn = render_views(coloured, NOVEL, NOVEL_SIZE)
    psnr, ssim = [], []
    for rgb, alpha, true in zip(drawn.albedo, drawn.alpha, truth, strict=True):
        pair = [(rgb * alpha + 1 - alpha).numpy(), (true[:3] * true[3:] + 1 - true[3:]).numpy()]
        union = ((alpha[0] > 0.5) | (true[3] > 0.5)).numpy()
        error = np.square(pair[0] - pair[1])[:, union].mean()
        psnr.append(-10 * np.log10(max(error, 1e-6)))
        _, local = structural_similarity(pair[0], pair[1], channel_axis=0, data_range=1.0, full=True)
        ssim.append(local[:, union].mean())
    return {"psnr": float(np.mean(psnr)), "ssim": float(np.mean(ssim))}


def evaluate_object(path: Path, bundle: Bundle, counts: list[int], settings: Settings, colours: bool = False) -> dict:
    """Scores by method and number of views, with the meshes under "meshes"."""
    truth = read_mesh(path).normalized()
    every = rig_views(truth)
    lit = shade(render_views(truth, NOVEL, NOVEL_SIZE), NOVEL) if colours else None
    result: dict = {"meshes": {"truth": truth}, "seconds": {}}
    for count in counts:
        views = every.subset(VIEW_NAMES[:count])
        found = {"hull": hull_mesh(views)}
        started = time.perf_counter()
        field = structure_from_views(views, bundle, settings)
        found["stage one" if has_second_stage(bundle) else "network"] = surface_from_field(field)
        if has_second_stage(bundle):
            latents = latents_of(views, field, bundle, settings)
            hull = hull_field(views.images[:, 3], views.cameras, len(field))
            found["both stages"] = surface_from_latents(latents, field, bundle, hull=hull)
        result["seconds"][str(count)] = time.perf_counter() - started
        for method, mesh in found.items():
            scores = score(mesh, truth)
            if lit is not None:
                scores |= colour_score(mesh, views, lit)
            result[f"{method}_{count}"] = scores
            if method != "hull":
                result["meshes"][f"{method}_{count}"] = mesh
    return result


_COLUMNS = {
    "chamfer": ("Chamfer", ".4f"),
    "f0.01": ("F@.01", ".3f"),
    "f0.02": ("F@.02", ".3f"),
    "f0.05": ("F@.05", ".3f"),
    "normals": ("normals", ".3f"),
    "psnr": ("PSNR", ".2f"),
    "ssim": ("SSIM", ".3f"),
}


def table(results: list[dict], counts: list[int]) -> str:
    """Means over the objects, by number of views and method, and each method over the hull."""
    methods = [key.rpartition("_")[0] for key in results[0] if key.endswith(f"_{counts[0]}")]
    columns = {key: _COLUMNS[key] for key in _COLUMNS if key in results[0][f"hull_{counts[0]}"]}
    names = [name for name, _ in columns.values()]
    lines = ["| views | method | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for count in counts:
        means: dict[str, dict[str, float]] = {}
        for method in methods:
            rows = [result[f"{method}_{count}"] for result in results]
            means[method] = {key: float(np.mean([row[key] for row in rows])) for key in columns}
            values = " | ".join(format(means[method][key], columns[key][1]) for key in columns)
            lines.append(f"| {count} | {method} | {values} |")
        for method in methods[1:]:
            ratios = " | ".join(f"{means[method][key] / means['hull'][key]:.2f}" for key in columns)
            lines.append(f"| {count} | {method} / hull | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", default=None)
    parser.add_argument("--views", default="4,3,2,1")
    parser.add_argument("--limit", type=int, default=None, help="every so many objects, to make about this number")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--raw", action="store_true", help="do not cut away what the silhouettes rule out")
    parser.add_argument("--colours", action="store_true", help="also colour the meshes, and compare eight novel views")
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
        result = evaluate_object(path, bundle, counts, settings, args.colours)
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
