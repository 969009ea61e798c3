"""Building in worker processes that may hang, or be killed by the system, without taking the preparation along.

Each worker is a fresh process with a pipe. It says which object it begins, so when it dies (the system kills for
memory) or takes too long (this side kills it: that works on every system, and inside native code too), the object is
known. The rest of its shard is built again without that object.

Too long once: the object is dropped. Died once: it is tried again at the end, alone, in case the neighbours ate the
memory; died twice: it is dropped. Deaths are counted on disk, so a preparation that is started again cannot loop.

This module imports nothing heavy: a worker sets its thread count before torch is loaded.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from triptych.errors import TriptychError

from .shards import write_json, write_shard
from .sources import Source

Builder = Callable[[Source], tuple[dict, list[dict[str, Any]]]]
DEATHS_ALLOWED = 1
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass
class Job:
    """One shard to build. verdicts: records by key of objects that were already given up."""

    name: str
    sources: list[Source]
    verdicts: dict[str, dict] = field(default_factory=dict)


def described(source: Source, record: dict, first_row: int, rows: int) -> dict:
    """The record with what the source says of itself, and its rows in the shard."""
    return record | {
        "key": source.key,
        "name": source.name,
        "category": source.category,
        "licence": source.licence,
        "attribution": source.attribution,
        "frame": list(source.frame),
        "rows": list(range(first_row, first_row + rows)),
    }


def build_shard(job: Job, build: Builder, folder: Path, begin: Callable[[int], None]) -> None:
    """Builds and writes one shard; calls ``begin`` with each object's place, and with the count before it writes."""
    records: list[dict] = []
    rows: list[dict[str, Any]] = []
    for place, source in enumerate(job.sources):
        begin(place)
        record, samples = (job.verdicts[source.key], []) if source.key in job.verdicts else build(source)
        records.append(described(source, record, len(rows), len(samples)))
        rows += samples
    begin(len(job.sources))
    write_shard(folder, job.name, records, rows)


class Deaths:
    """How often each object's worker died, kept in a file so that it outlives this process too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.counts: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.counts = {}

    def add(self, key: str) -> int:
        self.counts[key] = self.counts.get(key, 0) + 1
        write_json(self.path, self.counts)
        return self.counts[key]

    def forget(self, key: str) -> None:
        if self.counts.pop(key, None) is not None:
            write_json(self.path, self.counts)


def given_up(gate: str, reason: str, file: dict | None = None) -> dict:
    unknown = {"file_bytes": None, "file_mtime_ns": None, "file_sha256": None}
    return {"status": "dropped", "gate": gate, "reason": reason, "flags": []} | unknown | (file or {})


class _Worker:
    def __init__(self, build: Builder, folder: Path) -> None:
        # spawn on every system: a forked copy of a process that has used torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker_main, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self._send((build, folder))
        self.job: Job | None = None
        self.place: int | None = None
        self.begun = time.monotonic()

    def give(self, job: Job) -> None:
        self.job, self.place = job, None
        self._send(job)

    def _send(self, message: object) -> None:
        with suppress(ConnectionError):  # it is dead already; reading from the pipe will say so
            self.connection.send(message)

    @property
    def source(self) -> Source | None:
        """What it is building now; None while it starts and while it writes."""
        inside = self.job is not None and self.place is not None and self.place < len(self.job.sources)
        return self.job.sources[self.place] if inside else None  # type: ignore[union-attr, index]

    def kill(self) -> int | None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


def worker_main(connection: Connection) -> None:
    # Ctrl-C reaches the whole group; the parent decides. When the parent is gone, the pipe says so and we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= dict.fromkeys(_THREAD_VARIABLES, "1")
    try:
        build, folder = connection.recv()
        while True:
            job = connection.recv()
            try:
                build_shard(job, build, folder, lambda place: connection.send(("begin", place)))
            except TriptychError as error:  # the shard cannot be written
                connection.send(("failed", str(error)))
                return
            connection.send(("done", None))
    except (EOFError, ConnectionError):
        return


class Crew:
    """Runs jobs over ``count`` workers. advance(n) is told of objects built (negative: built again)."""

    def __init__(
        self,
        build: Builder,
        folder: Path,
        count: int,
        *,
        max_seconds: float,
        deaths: Deaths,
        fingerprint: Callable[[Path], dict],
        advance: Callable[[int], object],
        say: Callable[[str], object],
    ) -> None:
        self.build, self.folder, self.count = build, folder, count
        self.max_seconds, self.deaths, self.fingerprint = max_seconds, deaths, fingerprint
        self.advance, self.say = advance, say
        self.workers: list[_Worker] = []
        self.suspects: list[Source] = []

    def run(self, jobs: list[Job], next_name: Callable[[], str]) -> None:
        """Builds all jobs, then the suspects alone. next_name: names of further shards."""
        try:
            ready = [self._without_suspects(job) for job in jobs]
            self._work([job for job in ready if job.sources], self.count)
            for worker in self.workers:
                worker.kill()
            self.workers = []
            while self.suspects:
                source = self.suspects.pop(0)
                self._work([self._trial(source, next_name())], 1)
                self.deaths.forget(source.key)
        finally:
            for worker in self.workers:
                worker.kill()

    def _trial(self, source: Source, name: str) -> Job:
        deaths = self.deaths.counts.get(source.key, 0)
        if deaths <= DEATHS_ALLOWED:
            return Job(name, [source])
        return Job(name, [source], {source.key: self._died(source, deaths)})

    def _died(self, source: Source, deaths: int) -> dict:
        reason = f"its worker was killed {deaths} times, most likely for memory: decimate it or use a bigger machine"
        return given_up("killed", reason, self.fingerprint(source.path))

    def _without_suspects(self, job: Job) -> Job:
        self.suspects += [s for s in job.sources if s.key in self.deaths.counts]
        return Job(job.name, [s for s in job.sources if s.key not in self.deaths.counts], job.verdicts)

    def _work(self, jobs: list[Job], count: int) -> None:
        waiting = jobs[::-1]
        while waiting or any(worker.job for worker in self.workers):
            for worker in self.workers:
                if waiting and worker.job is None:
                    worker.give(waiting.pop())
            while waiting and len(self.workers) < count:
                self.workers.append(_Worker(self.build, self.folder))
                self.workers[-1].give(waiting.pop())
            by_pipe = {worker.connection: worker for worker in self.workers if worker.job}
            heard = wait(list(by_pipe), timeout=1.0)
            for pipe in heard:
                waiting += self._listen(by_pipe[pipe])  # type: ignore[index]
            for worker in [w for pipe, w in by_pipe.items() if pipe not in heard]:
                if worker.source is not None and time.monotonic() - worker.begun > self.max_seconds:
                    waiting += self._too_long(worker)

    def _listen(self, worker: _Worker) -> list[Job]:
        """Takes one message; returns the jobs to do over when the worker turns out to be dead."""
        try:
            kind, value = worker.connection.recv()
        except (EOFError, ConnectionError):
            return self._dead(worker)
        if kind == "begin":
            worker.place, worker.begun = value, time.monotonic()
            self.advance(1 if value else 0)
        elif kind == "done":
            worker.job = worker.place = None
        else:
            raise TriptychError(value)
        return []

    def _dead(self, worker: _Worker) -> list[Job]:
        source, job = worker.source, worker.job
        code = self._dismiss(worker)
        assert job is not None
        if source is None:
            raise TriptychError(
                f"a worker process ended by itself while starting or writing (exit code {code}), most likely for "
                "memory: run the same command again with fewer --workers; finished shards are kept"
            )
        deaths = self.deaths.add(source.key)
        self.say(f"the worker that built {source.key} was killed (exit code {code})")
        if deaths > DEATHS_ALLOWED:
            return [Job(job.name, job.sources, job.verdicts | {source.key: self._died(source, deaths)})]
        self.suspects.append(source)
        rest = [s for s in job.sources if s is not source]
        return [Job(job.name, rest, job.verdicts)] if rest else []

    def _too_long(self, worker: _Worker) -> list[Job]:
        source, job = worker.source, worker.job
        assert source is not None and job is not None
        self._dismiss(worker)
        self.say(f"{source.key} took longer than {self.max_seconds:g} s and is dropped")
        reason = f"took longer than {self.max_seconds:g} s: decimate it or raise --max-seconds"
        record = given_up("time", reason, self.fingerprint(source.path)) | {"seconds": self.max_seconds}
        return [Job(job.name, job.sources, job.verdicts | {source.key: record})]

    def _dismiss(self, worker: _Worker) -> int | None:
        self.advance(-(worker.place or 0))
        self.workers.remove(worker)
        return worker.kill()
