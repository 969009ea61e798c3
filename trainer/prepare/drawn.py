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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tqdm import tqdm

from trainer.data import DRAWN, PreparedData, relight, symmetric_sample
from triptych.bundles.manifest import file_sha256
from triptych.errors import TriptychError
from triptych.flux.panels import cut_sheet, is_empty
from triptych.geometry.cameras import VIEW_NAMES
from triptych.images.foreground import alpha_box
from triptych.images.views import ViewSet, prepare_views
from triptych.pipelines.views import given_references, put_together

from .run import _alone, _cores
from .shards import _is_whole, _write, remove_leftovers, write_json
from .sheet_cache import draw_given
from .structured import over_shards

FORMAT = 1
LONE_PHOTO = 0.75  # share of the samples of which the front alone is given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a prepared folder")
    parser.add_argument("--model", required=True, help="the views model: a folder in diffusers' layout, or a name")
    parser.add_argument("--sets", type=int, default=1, help="of each object (default: 1)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core; 0: in this one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda: --workers 0")


def main(args: argparse.Namespace) -> int:
    workers = _cores() if args.workers is None else args.workers
    count = draw_sets(args.data, args.model, sets=args.sets, workers=workers, device=args.device)
    print(f"{count} sets in {args.data / DRAWN}")
    return 0


def draw_sets(data: Path, model: str, *, sets: int = 1, workers: int = 0, device: str = "cpu") -> int:
    """Draws ``sets`` of each training object; finished shards of the same model are kept. Returns the number of sets.

    Raises TriptychError for a folder that is not prepared, a model that cannot be loaded, and a full disk.
    """
    if sets < 1:
        raise TriptychError(f"--sets must be at least 1, got {sets}")
    out = data / DRAWN
    out.mkdir(exist_ok=True)
    header = {"format": FORMAT, "model": _identity(model), "sets": sets}
    with _alone(out):
        remove_leftovers(out)
        jobs = _jobs(data, sets)
        todo = [job for job in jobs if not _is_done(out, job, header)]
        build = partial(_build_shard, data=data, model=model, header=header, device=device)
        with tqdm(total=sum(len(rows) for _, rows in todo), unit="set", desc="drawn", smoothing=0.1) as bar:
            for made in over_shards(build, todo, workers):
                bar.update(made)
    return sum(len(rows) for _, rows in jobs)


Job = tuple[str, list[tuple[int, int]]]  # a shard; row and number of each set


def _jobs(data: Path, sets: int) -> list[Job]:
    """The sets of an object go through its rows, from one that differs between objects."""
    shards: dict[str, list[tuple[int, int]]] = {}
    train = PreparedData(data, "train")
    for number, record in enumerate(train.records):
        rows = record["rows"]
        places = [(rows[(number + k) % len(rows)], k) for k in range(sets)]
        shards.setdefault(record["shard"], []).extend(places)
    return sorted(shards.items())


def _identity(model: str) -> str:
    """Of the files of a folder, or the name itself."""
    files = sorted(Path(model).rglob("*.safetensors")) if Path(model).is_dir() else []
    return hashlib.sha256(json.dumps([file_sha256(file) for file in files] or model).encode()).hexdigest()


def _is_done(out: Path, job: Job, header: dict[str, Any]) -> bool:
    name, rows = job
    try:
        report = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return report == header | {"rows": [list(place) for place in rows]} and _is_whole(out / f"{name}.safetensors")


_MODELS: dict[tuple[str, str], Any] = {}


def _model(name: str, device: str) -> Any:
    if (name, device) not in _MODELS:
        from triptych.flux.backend import load_flux_views

        _MODELS[name, device] = load_flux_views(name, device=device)
    return _MODELS[name, device]


def _build_shard(job: Job, data: Path, model: str, header: dict[str, Any], device: str) -> int:
    name, places = job
    loaded = _model(model, device)
    train = PreparedData(data, "train")
    index = {(shard, row): i for i, (shard, row, _) in enumerate(train.rows)}
    rows: list[int] = []
    made: list[DrawnSet] = []
    for row, number in places:
        digest = hashlib.sha256(f"{name} {row} {number}".encode()).digest()
        try:
            made.append(draw_set(train[index[name, row]], loaded, int.from_bytes(digest[:6], "little")))
        except TriptychError:  # too thin to be cut out of a small picture, or nothing was drawn
            continue
        rows.append(row)
    if made:
        arrays: dict[str, np.ndarray] = {
            "rows": np.array(rows, dtype=np.int32),
            "symmetry": np.array([one.symmetry for one in made], dtype=np.int8),
            **{key: np.stack([getattr(one, key) for one in made]) for key in ("views", "shown", "given", "scale")},
        }
        _write(data / DRAWN / f"{name}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(data / DRAWN / f"{name}.json", header | {"rows": [list(place) for place in places]})
    return len(places)


@dataclass(frozen=True)
class DrawnSet:
    """See the module's table; one sample of it."""

    symmetry: int
    views: np.ndarray
    shown: np.ndarray
    given: np.ndarray
    scale: np.ndarray


def draw_set(sample: dict[str, np.ndarray], model: Any, seed: int) -> DrawnSet:
    """The sets of one prepared sample under a random light, in a random symmetry; the views model is asked as the
    pipeline asks it, without rerolls. Raises TriptychError where a view cannot be prepared, or nothing was drawn."""
    generator = np.random.default_rng(seed)
    symmetry = int(generator.integers(8))
    sample = symmetric_sample(sample, symmetry)
    alpha = sample["albedo"][..., 3]
    size = alpha.shape[-1]
    seen = np.array([(view > 127).any() for view in alpha])
    given = [VIEW_NAMES[i] for i in draw_given(generator, LONE_PHOTO, seen)]
    lit = relight(sample["albedo"], sample["normal"], generator).permute(0, 2, 3, 1).numpy()
    pictures = dict(zip(VIEW_NAMES, lit, strict=True))
    photos = prepare_views({name: pictures[name] for name in given}, size=size, foreground="alpha")
    references, _ = given_references(photos, model.card)
    panels = cut_sheet(model.sheet("", references, seed=seed), model.card)
    missing = tuple(name for name in VIEW_NAMES if name not in given)
    sets = [put_together(photos, panels, missing, size)[0], put_together(None, panels, VIEW_NAMES, size)[0]]
    true = {name: _diagonal(pictures[name]) for name, there in zip(VIEW_NAMES, seen, strict=True) if there}
    known = given[0] if not is_empty(panels[given[0]]) else next(name for name in sets[1].names if name in true)
    scales = [_diagonal(_picture(one, name)) / true[name] for one, name in zip(sets, (given[0], known), strict=True)]
    views = np.zeros((2, 4, size, size, 4), dtype=np.uint8)
    shown = np.zeros((2, 4), dtype=bool)
    for k, one in enumerate(sets):
        for name in one.names:
            views[k, VIEW_NAMES.index(name)] = (_picture(one, name) * 255 + 0.5).astype(np.uint8)
            shown[k, VIEW_NAMES.index(name)] = True
    is_given = np.array([name in given for name in VIEW_NAMES])
    return DrawnSet(symmetry, views, shown, is_given, np.array(scales, dtype=np.float32))


def _picture(views: ViewSet, name: str) -> np.ndarray:
    return views.images[views.names.index(name)].permute(1, 2, 0).numpy()


def _diagonal(rgba: np.ndarray) -> float:
    """Of the box of an outline, in pixels."""
    left, top, right, bottom = alpha_box(rgba[..., 3].astype(np.float32))
    return float(np.hypot(right - left, bottom - top))
