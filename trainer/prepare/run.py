"""The preparation itself: plan, build in worker processes, pack, index.

Resumable: whole shards are kept, an object that a shard records is not built again (unless its file changed), and new
objects go into new shards. Duplicates (equal geometry) keep the first by key.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from triptych.errors import TriptychError

from .build import SDF_BAND, BuildOptions, build_object
from .shards import FORMAT, read_records, split_of, write_json, write_shard
from .sources import Source, find_sources

OBJECTS_A_SHARD = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="folders of meshes")
    parser.add_argument("--out", required=True, type=Path, help="folder for the packed data")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    parser.add_argument("--yaws", type=int, default=2, help="turned copies of each object, the first unturned")
    parser.add_argument("--view-size", type=int, default=128, help="pixels per side of a view")
    parser.add_argument("--resolution", type=int, default=64, help="voxels per side")
    parser.add_argument("--limit", type=int, default=None, help="at most this many objects (a trial)")
    parser.add_argument("--index-split", nargs="+", default=["train"], help="splits to take where a source has index.csv")


def main(args: argparse.Namespace) -> int:
    options = BuildOptions(resolution=args.resolution, view_size=args.view_size, yaws=args.yaws)
    sources = find_sources(args.sources, tuple(args.index_split))[: args.limit]
    summary = prepare(sources, args.out, options, workers=args.workers)
    print(
        f"{summary['objects']} objects ({summary['samples']} samples) ready in {args.out}, {summary['dropped']} dropped, "
        f"{summary['flagged']} flagged; {summary['seconds']:.0f} s; see {args.out / 'report.html'}"
    )
    return 0


def prepare(sources: list[Source], out: Path, options: BuildOptions, workers: int | None = None) -> dict:
    """Builds what is missing, then writes ``index.json`` and ``report.html``. Returns the summary."""
    from .report import write_report

    started = time.perf_counter()
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    _check_same_options(out, options)
    done = {(r["key"], r["file_bytes"]) for r in read_records(shards)}
    todo = [s for s in sources if (s.key, s.path.stat().st_size if s.path.is_file() else None) not in done]
    number = 1 + max((int(p.stem.split("_")[1]) for p in shards.glob("shard_*.json")), default=-1)
    groups = [todo[i : i + OBJECTS_A_SHARD] for i in range(0, len(todo), OBJECTS_A_SHARD)]
    _build_all([(f"shard_{number + i:05d}", group) for i, group in enumerate(groups)], shards, options, workers, len(todo))
    index = write_index(out, options)
    summary = index["summary"] | {"seconds": time.perf_counter() - started, "built": len(todo)}
    write_report(out, index, summary)
    return summary


def _check_same_options(out: Path, options: BuildOptions) -> None:
    path = out / "options.json"
    wanted = asdict(options) | {"format": FORMAT, "sdf_band": SDF_BAND}
    if path.is_file():
        import json

        have = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in wanted if have.get(key) != wanted[key])
        if changed:
            raise TriptychError(
                f"{out} was prepared with other options ({', '.join(f'{k}={have.get(k)}' for k in changed)}): "
                "choose another --out, or the same options"
            )
    write_json(path, wanted)


def _build_all(jobs: list[tuple[str, list[Source]]], shards: Path, options: BuildOptions, workers, total: int) -> None:
    with tqdm(total=total, unit="object", desc="prepare", smoothing=0.1) as bar:
        if workers == 0:
            for name, group in jobs:
                bar.update(_build_shard(name, group, shards, options))
            return
        with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            running = {pool.submit(_build_shard, name, group, shards, options): name for name, group in jobs}
            try:
                for future in as_completed(running):
                    bar.update(future.result())
            except BrokenProcessPool as error:
                raise TriptychError(
                    "a worker process was killed, most likely for memory: run the same command again with fewer --workers; "
                    "finished shards are kept"
                ) from error


def _build_shard(name: str, group: list[Source], shards: Path, options: BuildOptions) -> int:
    records, rows = [], []
    for source in group:
        record, samples = build_object(source.path, options)
        record |= {
            "key": source.key,
            "name": source.name,
            "category": source.category,
            "licence": source.licence,
            "attribution": source.attribution,
            "rows": list(range(len(rows), len(rows) + len(samples))),
        }
        rows += samples
        records.append(record)
    write_shard(shards, name, records, rows)
    return len(group)


def write_index(out: Path, options: BuildOptions) -> dict:
    """index.json: every record, its split, duplicates dropped; the summary that statistics and the report show."""
    records, seen = [], {}
    latest = {record["key"]: record for record in read_records(out / "shards")}
    for record in (latest[key] for key in sorted(latest)):
        if record["status"] == "ok":
            content = record["geometry_hash"]
            if content in seen:
                record = record | {"status": "dropped", "reason": f"the same geometry as {seen[content]}"}
            else:
                seen[content] = record["key"]
                record = record | {"split": split_of(content)}
        records.append(record)
    ok = [r for r in records if r["status"] == "ok"]
    summary = {
        "objects": len(ok),
        "samples": sum(len(r["rows"]) for r in ok),
        "dropped": len(records) - len(ok),
        "flagged": sum(bool(r["flags"]) for r in ok),
        "splits": {name: sum(r["split"] == name for r in ok) for name in ("train", "validation", "test")},
    }
    index = {"format": FORMAT, "options": asdict(options) | {"sdf_band": SDF_BAND}, "summary": summary, "records": records}
    write_json(out / "index.json", index)
    return index
