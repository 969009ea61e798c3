"""The preparation itself: plan, build in worker processes, pack, index, report.

Resumable: whole shards are kept, an object that a shard records is not built again (unless its file changed), and new
objects go into new shards. A preparation that was stopped and run again gives the same shards as one that was not.
Duplicates (equal geometry) keep the first by key. Objects that are no longer among the sources stay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path

from tqdm import tqdm

from trainer.runs import run_lock
from triptych.errors import TriptychError

from .build import SDF_BAND, BuildOptions, build_object, fingerprint
from .gates import INCIDENTS, Gates, add_gate_arguments, gates_from, judge
from .shards import FORMAT, read_records, remove_leftovers, split_of, write_json
from .sources import AXES, OUR_FRAME, Source, find_sources
from .workers import Builder, Crew, Deaths, Job, build_shard

OBJECTS_A_SHARD = 48
_SHAPING = ("format", "resolution", "view_size", "yaws", "sdf_band")  # of the options: what the arrays depend on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="folders of meshes")
    parser.add_argument("--out", required=True, type=Path, help="folder for the packed data")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core; 0: in this one)")
    parser.add_argument("--yaws", type=int, default=2, help="turned copies of each object, the first unturned")
    parser.add_argument("--view-size", type=int, default=128, help="pixels per side of a view")
    parser.add_argument("--resolution", type=int, default=64, help="voxels per side")
    parser.add_argument("--limit", type=int, default=None, help="at most this many objects (a trial)")
    parser.add_argument(
        "--index-split", nargs="+", default=["train"], help="splits to take where there is an index.csv"
    )
    parser.add_argument("--up", choices=AXES, help="the files' up axis (default: as the layout says, else +y)")
    parser.add_argument(
        "--front", choices=AXES, help="the axis their front faces (default: as the layout says, else +z)"
    )
    parser.add_argument("--retry", action="store_true", help="build again what took too long, crashed or made no solid")
    add_gate_arguments(parser)


def main(args: argparse.Namespace) -> int:
    options = BuildOptions(args.resolution, args.view_size, args.yaws, gates_from(args))
    sources = find_sources(args.sources, tuple(args.index_split), args.up, args.front)[: args.limit]
    summary = prepare(sources, args.out, options, workers=args.workers, retry=args.retry)
    print(
        f"{summary['objects']} objects ({summary['samples']} samples) ready in {args.out}, {summary['dropped']} "
        f"dropped, {summary['flagged']} flagged; {summary['seconds']:.0f} s; see {args.out / 'report.html'}"
    )
    return 0


def prepare(
    sources: list[Source], out: Path, options: BuildOptions, workers: int | None = None, *, retry: bool = False
) -> dict:
    """Builds what is missing, then writes ``index.json``, ``statistics.json``, ``ATTRIBUTION.md`` and the report.

    workers: processes, None for one a core, 0 for this process (then without the time limit). retry: build again what
    was given up. Returns the summary. Raises TriptychError: other options than before, a full disk, a second
    preparation in the same folder, workers that cannot start.
    """
    from .report import write_report

    if workers is not None and workers < 0:
        raise TriptychError(f"--workers must be 0 or more, got {workers}")
    started = time.perf_counter()
    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        _check_same_options(out, options)
        remove_leftovers(shards)
        jobs, next_name = plan(sources, read_records(shards), options.gates, retry=retry)
        built = sum(len(job.sources) for job in jobs)
        _warn_of_a_full_disk(out, options, built)
        build_all(jobs, shards, partial(build_object, options=options), workers, options.gates, next_name)
        index = write_index(out, options)
        summary = index["summary"] | {"seconds": time.perf_counter() - started, "built": built}
        write_report(out, index, summary)
    return summary


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = run_lock(out, enabled=True)
    try:
        lock.__enter__()
    except TriptychError as error:
        raise TriptychError(f"another preparation is writing to {out}: wait for it or stop it") from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _check_same_options(out: Path, options: BuildOptions) -> None:
    path = out / "options.json"
    wanted = asdict(options) | {"format": FORMAT, "sdf_band": SDF_BAND}
    if path.is_file():
        have = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in _SHAPING if have.get(key) != wanted[key]]
        if changed:
            raise TriptychError(
                f"{out} was prepared with other options ({', '.join(f'{k}={have.get(k)}' for k in changed)}): "
                "choose another --out, or the same options"
            )
    write_json(path, wanted)


def _warn_of_a_full_disk(out: Path, options: BuildOptions, objects: int) -> None:
    sample = 4 * options.view_size**2 * 7 + options.resolution**3
    needed, free = objects * options.yaws * sample, shutil.disk_usage(out).free
    if needed > free:
        tqdm.write(f"warning: this may need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free in {out}")


def plan(
    sources: list[Source], records: list[dict], gates: Gates, *, retry: bool = False
) -> tuple[list[Job], Callable[[], str]]:
    """The shards to build, and names for further ones.

    Numbers that no whole shard has are used first. So a stopped preparation, whose rest is cut into groups as before,
    gives every group its old number. But a record replaces those of lower shards: what is built again goes above them.
    """
    latest = {record["key"]: record for record in records}
    todo = [s for s in sources if s.key not in latest or must_build(s, latest[s.key], gates, retry)]
    replaced = [_number(latest[s.key]["shard"]) for s in todo if s.key in latest]
    taken = {_number(record["shard"]) for record in records}
    free = (number for number in count(max(replaced, default=-1) + 1) if number not in taken)
    groups = [todo[i : i + OBJECTS_A_SHARD] for i in range(0, len(todo), OBJECTS_A_SHARD)]
    return [Job(_name(next(free)), group) for group in groups], lambda: _name(next(free))


def _number(shard: str) -> int:
    return int(shard.split("_")[1])


def _name(number: int) -> str:
    return f"shard_{number:05d}"


def must_build(source: Source, record: dict, gates: Gates, retry: bool) -> bool:
    """Whether a recorded object is built again: its file or frame changed, or it was dropped and now may pass."""
    if tuple(record.get("frame", OUR_FRAME)) != source.frame or _file_changed(source.path, record):
        return True
    gate = record.get("gate")
    if gate in INCIDENTS:
        return retry or (gate == "time" and record.get("seconds", 0) < gates.max_seconds)
    return not record["rows"] and judge(record, gates).gate is None


def _file_changed(path: Path, record: dict) -> bool:
    try:
        status = path.stat()
    except OSError:
        return record["file_bytes"] is not None
    if status.st_size != record["file_bytes"]:
        return True
    # A copied or touched file has another time and the same content; records of format 1 may lack both.
    if record.get("file_mtime_ns") in (None, status.st_mtime_ns):
        return False
    return fingerprint(path)["file_sha256"] != record["file_sha256"]


def build_all(
    jobs: list[Job], shards: Path, build: Builder, workers: int | None, gates: Gates, next_name: Callable[[], str]
) -> None:
    """Builds and writes all jobs, with a progress bar. build: picklable unless workers is 0."""
    total = sum(len(job.sources) for job in jobs)
    with tqdm(total=total, unit="object", desc="prepare", smoothing=0.1) as bar:
        if workers == 0:
            for job in jobs:
                build_shard(job, build, shards, lambda place: bar.update(1 if place else 0))
            return
        crew = Crew(
            build,
            shards,
            workers or _cores(),
            max_seconds=gates.max_seconds,
            deaths=Deaths(shards.parent / "deaths.json"),
            fingerprint=fingerprint,
            advance=bar.update,
            say=tqdm.write,
        )
        crew.run(jobs, next_name)


def _cores() -> int:
    # In a container with fewer cores than the machine, only the affinity knows.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_index(out: Path, options: BuildOptions) -> dict:
    """index.json: every record, its split, duplicates dropped; the summary that statistics and the report show."""
    records: list[dict] = []
    seen: dict[str, str] = {}
    latest = {record["key"]: record for record in read_records(out / "shards")}
    for record in (latest[key] for key in sorted(latest)):
        record.pop("file_mtime_ns", None)  # of this machine only
        gate, reason, flags = judge(record, options.gates)
        content = record.get("geometry_hash", "")
        if gate is None and content in seen:
            gate, reason = "duplicate", f"the same geometry as {seen[content]}"
        record |= {"status": "dropped" if gate else "ok", "gate": gate, "reason": reason, "flags": flags}
        if gate is None:
            seen[content] = record["key"]
            record["split"] = split_of(content)
        records.append(record)
    index = {
        "format": FORMAT,
        "options": asdict(options) | {"sdf_band": SDF_BAND},
        "summary": _summary(records),
        "records": records,
    }
    write_json(out / "index.json", index)
    return index


def _summary(records: list[dict]) -> dict:
    ok = [r for r in records if r["status"] == "ok"]
    return {
        "objects": len(ok),
        "samples": sum(len(r["rows"]) for r in ok),
        "dropped": len(records) - len(ok),
        "dropped_by_gate": dict(Counter(r["gate"] for r in records if r["gate"]).most_common()),
        "flagged": sum(bool(r["flags"]) for r in ok),
        "splits": {name: sum(r["split"] == name for r in ok) for name in ("train", "validation", "test")},
    }
