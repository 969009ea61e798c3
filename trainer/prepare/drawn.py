"""What a views model makes of photographs of the prepared objects: the sets that a first stage will really be given.

A structure flow that has seen true views alone believes drawn ones, which are wrong where the photograph leaves the
object open. So a views model draws the other views of every training object, through the pipeline that users run, and
the finished sets are kept, one safetensors file a shard in ``drawn/``:

| array | shape | meaning |
|---|---|---|
| rows | (S,) int32 | row of each set in the prepared shard |
| symmetry | (S,) int8 | which of the eight symmetries the object was put in first, `trainer.data.symmetric_sample` |
| views | (S, 2, 4, P, P, 4) uint8 | RGBA: the given views with the drawn ones, and all four as they were drawn |
| shown | (S, 2, 4) bool | which views there are |
| given | (S, 4) bool | which of the first set were given |
| scale | (S, 2) float32 | of each set's frame: times as large as in the prepared views |
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from trainer.data import DRAWN, PreparedData, relight, symmetric_sample
from triptych.bundles.manifest import file_sha256
from triptych.errors import TriptychError
from triptych.flux.card import ViewsCard
from triptych.flux.hub import find_model
from triptych.flux.panels import cut_sheet, is_empty
from triptych.flux.prompts import fill_template
from triptych.geometry.cameras import VIEW_NAMES
from triptych.images.foreground import alpha_box
from triptych.images.views import ViewSet, prepare_views
from triptych.models.proportions import Proportions
from triptych.pipelines.drawn_views import put_together
from triptych.pipelines.views import given_references

from .run import _alone, _cores
from .shards import _is_whole, _write, remove_leftovers, write_json
from .sheet_cache import draw_given
from .structured import over_shards

if TYPE_CHECKING:
    from triptych.flux.backend import FluxViews

FORMAT = 1
LONE_PHOTO = 0.75  # share of the samples of which the front alone is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a prepared folder")
    parser.add_argument("--model", required=True, help="the views model: a folder in diffusers' layout, or a name")
    parser.add_argument("--sets", type=int, default=1, help="of each object (default: 1)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core, on a GPU none)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="",
        help="of the model (default: float32 on a CPU, where bfloat16 is faster if its cores know it)",
    )


def main(args: argparse.Namespace) -> int:
    # Every process loads the model: a device's memory holds one.
    cores = _cores() if args.device == "cpu" else 0
    drawn, skipped = draw_sets(
        args.data,
        args.model,
        sets=args.sets,
        workers=cores if args.workers is None else args.workers,
        device=args.device,
        dtype=args.dtype,
    )
    print(f"{drawn} sets in {args.data / DRAWN}, {skipped} skipped (the reasons stand in its shards' JSON)")
    return 0


def draw_sets(
    data: Path, model: str, *, sets: int = 1, workers: int = 0, device: str = "cpu", dtype: str = ""
) -> tuple[int, int]:
    """Draws ``sets`` of each training object; finished shards of the same model and objects are kept.

    dtype: see `load_flux_views`; empty for its own choice. Returns how many sets there are now, and how many were
    skipped because a view cannot be prepared or nothing was drawn.
    Raises TriptychError for a folder that is not prepared, a model that cannot be loaded or run, a full disk.
    """
    if sets < 1:
        raise TriptychError(f"--sets must be at least 1, got {sets}")
    folder = find_model(model).folder
    out = data / DRAWN
    out.mkdir(exist_ok=True)
    header = {"format": FORMAT, "model": _identity(folder)} | ({"dtype": dtype} if dtype else {})
    with _alone(out):
        remove_leftovers(out)
        jobs = _jobs(data, sets)
        todo = [job for job in jobs if not _is_done(out, job, header)]
        build = partial(_build_shard, data=data, model=str(folder), header=header, device=device)
        with tqdm(total=sum(len(places) for _, places in todo), unit="set", desc="drawn", smoothing=0.1) as bar:
            for made in over_shards(build, todo, workers):
                bar.update(made)
        skipped = sum(len(read_json(out / f"{name}.json")["skipped"]) for name, _ in jobs)
    return sum(len(places) for _, places in jobs) - skipped, skipped


Place = tuple[str, int, int]  # key of the object, row in its shard, number of the set
Job = tuple[str, list[Place]]  # a shard


def _jobs(data: Path, sets: int) -> list[Job]:
    """The sets of an object go through its rows, from one that differs between objects."""
    shards: dict[str, list[Place]] = {}
    for record in PreparedData(data, "train").records:
        rows, first = record["rows"], _number(record["key"])
        places = [(record["key"], rows[(first + k) % len(rows)], k) for k in range(sets)]
        shards.setdefault(record["shard"], []).extend(places)
    return sorted(shards.items())


def _number(*parts: object) -> int:
    """A number below 2^48 that depends on nothing else."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:6], "little")


def _identity(folder: Path) -> str:
    files = [*sorted(folder.rglob("*.safetensors")), *sorted(folder.glob("*.json"))]
    return hashlib.sha256(json.dumps([file_sha256(file) for file in files]).encode()).hexdigest()


def _report(header: dict[str, Any], places: list[Place], skipped: list[dict[str, Any]]) -> dict[str, Any]:
    return header | {"wanted": [list(place) for place in places], "skipped": skipped}


def _is_done(out: Path, job: Job, header: dict[str, Any]) -> bool:
    name, places = job
    try:
        report = read_json(out / f"{name}.json")
        same = report == _report(header, places, report["skipped"])
    except (OSError, ValueError, KeyError):
        return False
    return same and (len(report["skipped"]) == len(places) or _is_whole(out / f"{name}.safetensors"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


_MODELS: dict[tuple[str, str, str], FluxViews] = {}


def _model(name: str, device: str, dtype: str) -> FluxViews:
    if (name, device, dtype) not in _MODELS:
        from triptych.flux.backend import load_flux_views

        _MODELS[name, device, dtype] = load_flux_views(name, device=device, dtype=dtype or None)
    return _MODELS[name, device, dtype]


@lru_cache(maxsize=1)
def _rows(data: Path, changed: int) -> tuple[PreparedData, dict[tuple[str, int], int]]:
    """The training samples, and the number of each by shard and row; read again when the index has changed."""
    train = PreparedData(data, "train")
    return train, {(shard, row): i for i, (shard, row, _) in enumerate(train.rows)}


def _build_shard(job: Job, data: Path, model: str, header: dict[str, Any], device: str) -> int:
    name, places = job
    loaded = _model(model, device, header.get("dtype", ""))
    train, index = _rows(data, (data / "index.json").stat().st_mtime_ns)
    rows: list[int] = []
    made: list[DrawnSet] = []
    skipped: list[dict[str, Any]] = []
    for key, row, number in places:
        seed = _number(key, row, number)
        try:
            asked = photographed(train[index[name, row]], loaded.card, seed)
        except TriptychError as error:  # too thin to be cut out of a small picture
            skipped.append({"key": key, "row": row, "reason": str(error)})
            continue
        sheet = loaded.sheet(asked.prompt, asked.references, seed=seed)  # what is wrong here is wrong for all
        try:
            made.append(finished(asked, cut_sheet(sheet, loaded.card), loaded.proportions))
            rows.append(row)
        except TriptychError as error:  # nothing was drawn
            skipped.append({"key": key, "row": row, "reason": str(error)})
    file = data / DRAWN / f"{name}.safetensors"
    file.unlink(missing_ok=True)
    if made:
        arrays: dict[str, np.ndarray] = {
            "rows": np.array(rows, dtype=np.int32),
            "symmetry": np.array([one.symmetry for one in made], dtype=np.int8),
            **{key: np.stack([getattr(one, key) for one in made]) for key in ("views", "shown", "given", "scale")},
        }
        _write(file, lambda temporary: save_file(arrays, str(temporary)))
    write_json(data / DRAWN / f"{name}.json", _report(header, places, skipped))
    return len(places)


@dataclass(frozen=True)
class DrawnSet:
    """See the module's table; one sample of it."""

    symmetry: int
    views: np.ndarray
    shown: np.ndarray
    given: np.ndarray
    scale: np.ndarray


@dataclass(frozen=True)
class Asked:
    """A prepared sample as a views model is asked for the rest of it.

    symmetry: see the module's table. pictures: the true views by name, (P, P, 4) float32, of one light. given: the
    names of those that are given, photos: these as a set, references: these as the model takes them.
    """

    symmetry: int
    pictures: dict[str, np.ndarray]
    given: list[str]
    photos: ViewSet
    references: list[torch.Tensor]
    prompt: str


def photographed(sample: dict[str, np.ndarray], card: ViewsCard, seed: int) -> Asked:
    """A prepared sample in a random symmetry, under a random light, as the pipeline prepares pictures without words.

    Raises TriptychError where a view cannot be prepared.
    """
    generator = np.random.default_rng(seed)
    symmetry = int(generator.integers(8))
    sample = symmetric_sample(sample, symmetry)
    alpha = sample["albedo"][..., 3]
    seen = np.array([(view > 127).any() for view in alpha])
    given = [VIEW_NAMES[i] for i in draw_given(generator, LONE_PHOTO, seen)]
    lit = relight(sample["albedo"], sample["normal"], generator).permute(0, 2, 3, 1).numpy()
    pictures = dict(zip(VIEW_NAMES, lit, strict=True))
    photos = prepare_views({name: pictures[name] for name in given}, size=alpha.shape[-1], foreground="alpha")
    references, _ = given_references(photos, card)
    return Asked(symmetry, pictures, given, photos, references, fill_template(card, "", given))


def finished(asked: Asked, panels: dict[str, np.ndarray], proportions: Proportions | None = None) -> DrawnSet:
    """The sets that the pipeline makes of a sheet's panels. Raises TriptychError where the given views, which tell the
    scale, were not drawn."""
    known, size = asked.given[0], asked.photos.size
    if is_empty(panels[known]):
        raise TriptychError(f"the model drew nothing in the {known} panel: the set has no known scale, leave it out")
    missing = tuple(name for name in VIEW_NAMES if name not in asked.given)
    sets = [
        put_together(asked.photos, panels, missing, size, proportions)[0],
        put_together(None, panels, VIEW_NAMES, size)[0],
    ]
    views = np.zeros((2, 4, size, size, 4), dtype=np.uint8)
    shown = np.zeros((2, 4), dtype=bool)
    for k, one in enumerate(sets):
        for name, picture in one.pictures.items():
            views[k, VIEW_NAMES.index(name)] = (picture * 255 + 0.5).astype(np.uint8)
            shown[k, VIEW_NAMES.index(name)] = True
    scale = np.array([_diagonal(one.pictures[known]) for one in sets]) / _diagonal(asked.pictures[known])
    is_given = np.array([name in asked.given for name in VIEW_NAMES])
    return DrawnSet(asked.symmetry, views, shown, is_given, scale.astype(np.float32))


def _diagonal(rgba: np.ndarray) -> float:
    """Of the box of an outline, in pixels."""
    left, top, right, bottom = alpha_box(rgba[..., 3].astype(np.float32))
    return float(np.hypot(right - left, bottom - top))
