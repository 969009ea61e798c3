"""Many clients on one ComfyUI server: jobs lost, results against direct calls, memory, cancelling, work done twice.

    python -m benchmarks.comfy_soak [--jobs 100] [--clients 20]

Starts a ComfyUI on the processor (COMFYUI_DIR and COMFYUI_PYTHON as for the tests) with this repository as its only
pack, and queues small jobs of views of the sample object over the API, each with its own seed. Exit code 1 when a
promise is broken: a job lost, a result that differs, memory grown by more than a tenth between a fifth of the jobs and
the last, a job that cannot be cancelled, a second run that does work, more than 1 s for the import of the pack.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe
from triptych.api import Result, Server, run_workflow
from triptych.api.run import prepared

ROOT = Path(__file__).resolve().parent.parent
SIZE, STEPS, FACES = 128, 2, 500
SAMPLED = 5  # jobs that are compared with direct calls
WORKING = ("Prepare views", "Reconstruct mesh", "Clean mesh", "Texture mesh")  # nodes to be cancelled in
GROWTH, IMPORT_S = 1.1, 1.0


@dataclass
class Row:
    what: str
    measured: str
    passed: bool


@dataclass
class Memory:
    """Resident bytes of the server after each finished job."""

    after: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def workflow() -> dict[str, Any]:
    graph = json.loads((ROOT / "workflows" / "api" / "views_to_obj.api.json").read_text())
    nodes = {content["class_type"].removeprefix("Triptych_"): content["inputs"] for content in graph.values()}
    nodes["PrepareViews"]["size"] = SIZE
    nodes["Reconstruct"] |= {"steps": STEPS, "ensemble": 1, "texture_size": 0, "target_faces": FACES}
    nodes["CleanMesh"]["target_faces"] = FACES
    nodes["TextureMesh"]["texture_size"] = 64
    return graph


def small_job() -> dict[str, Any]:
    """Views -> mesh -> OBJ, without the steps after the reconstruction."""
    graph = workflow()
    ids = {content["class_type"]: node for node, content in graph.items()}
    graph[ids["Triptych_ExportMesh"]]["inputs"]["mesh"] = [ids["Triptych_Reconstruct"], 0]
    for name in ("Triptych_CleanMesh", "Triptych_TextureMesh", "Triptych_Preview3D"):
        del graph[ids[name]]
    return graph


def soak(comfy: Any, files: dict[str, Path], out: Path, jobs: int, clients: int) -> tuple[list[Row], dict[int, Result]]:
    memory, graph = Memory(), small_job()

    def one(seed: int) -> tuple[int, Result | Exception]:
        server = Server(f"http://127.0.0.1:{comfy.port}")
        try:
            done = run_workflow(graph, [server], out / str(seed), inputs=files, values=[f"Reconstruct.seed={seed}"])
        except (ValueError, OSError) as error:
            return seed, error
        with memory.lock:
            memory.after.append(comfy.resident_bytes())
        return seed, done

    started = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        ended = dict(pool.map(one, range(jobs)))
    seconds = time.monotonic() - started
    results = {seed: result for seed, result in ended.items() if isinstance(result, Result) and result.files}
    for seed, error in ended.items():
        if not isinstance(error, Result):
            print(f"job {seed}: {error}", file=sys.stderr)
    # The server's own record must agree: one entry for each job and none queued twice.
    history = Server(f"http://127.0.0.1:{comfy.port}").get("/history")
    complete = len(results) == jobs == len({result.prompt_id for result in results.values()}) == len(history)
    rows = [
        Row(f"{jobs} jobs of {clients} clients", f"{jobs - len(results)} lost, {seconds / jobs:.2f} s a job", complete)
    ]
    if len(memory.after) < max(jobs // 5, 1):
        return rows, results
    first, last = memory.after[max(jobs // 5, 1) - 1], memory.after[-1]
    rows.append(
        Row(
            f"server's memory after {jobs // 5} and {len(memory.after)} jobs",
            f"{first / 2**20:.0f} and {last / 2**20:.0f} MiB (ratio {last / first:.3f})",
            last <= GROWTH * first,
        )
    )
    return rows, results


def compared(results: dict[int, Result], files: dict[str, Path]) -> Row:
    """Vertices of the jobs' OBJ files against the library called with the same pictures and seeds."""
    from triptych.bundles.bundle import load_bundle
    from triptych.geometry.files import read_mesh
    from triptych.images.views import prepare_views
    from triptych.pipelines.reconstruct import Settings, mesh_from_views

    views, bundle = prepare_views(dict(files.items()), size=SIZE), load_bundle()
    seeds = sorted(results)[:: max(len(results) // SAMPLED, 1)][:SAMPLED]
    worst, same = 0.0, True
    for seed in seeds:
        settings = Settings(seed=seed, steps=STEPS, ensemble=1, texture_size=0, target_faces=FACES)
        direct = mesh_from_views(views, bundle, settings).mesh
        made = read_mesh(next(path for path in results[seed].files if path.suffix == ".obj"))
        same &= np.array_equal(made.faces, direct.faces)
        if same:
            worst = max(worst, float(np.abs(made.vertices - direct.vertices).max()))
    text = f"faces {'equal' if same else 'DIFFER'}, vertices within {worst:.1e} ({len(seeds)} seeds)"
    return Row("results against direct calls", text, bool(seeds) and same and worst < 1e-5)


def cancelled(server: Server, files: dict[str, Path], out: Path) -> list[Row]:
    """Cancels a job while it waits behind another, and inside each node that works; seconds until the queue is free."""
    rows = []
    for number, node in enumerate(("waiting", *WORKING)):
        stopped_at: list[float] = []

        def stop(title: str, share: float | None, node: str = node, stopped_at: list[float] = stopped_at) -> None:
            if title.startswith(node):
                stopped_at.append(time.monotonic())
                raise KeyboardInterrupt

        values = [f"Reconstruct.seed={9000 + number}", f"PrepareViews.size={SIZE + 64 * number}"]
        before = None
        if node == "waiting":
            slow = prepared(workflow(), server, [*values, "Reconstruct.steps=500", "PrepareViews.size=64"])
            before = threading.Thread(
                target=_quietly, args=(slow, server, files, out / "slow", stop_when_alone(server))
            )
            before.start()
            while server.load() == 0:
                time.sleep(0.05)
        _quietly(workflow(), server, files, out / "cancelled", stop, values)
        while server.load() > (before is not None and before.is_alive()):
            time.sleep(0.02)
        seconds = time.monotonic() - stopped_at[0] if stopped_at else float("inf")
        rows.append(Row(f"cancel: {node}", f"{seconds:.2f} s" if stopped_at else "not reached", seconds < 5))
        if before is not None:
            before.join()
    return rows


def stop_when_alone(server: Server) -> Any:
    """Cancels the job in front once the one that waited behind it is gone."""
    seen = threading.Event()

    def stop(title: str, share: float | None) -> None:
        load = server.load()
        if load > 1:
            seen.set()
        elif seen.is_set():
            raise KeyboardInterrupt

    return stop


def _quietly(
    graph: dict[str, Any], server: Server, files: dict[str, Path], out: Path, progress: Any, values: Any = ()
) -> None:
    with suppress(KeyboardInterrupt):
        run_workflow(graph, [server], out, inputs=files, values=values, progress=progress)


def twice(server: Server, files: dict[str, Path], out: Path) -> Row:
    runs = [run_workflow(workflow(), [server], out, inputs=files) for _ in range(2)]
    done = len(workflow()) - len(runs[1].cached)
    text = f"{done} of {len(workflow())} nodes ran; {runs[0].seconds:.2f} s, then {runs[1].seconds:.2f} s"
    return Row("second run of an unchanged graph", text, done == 0 and runs[0].files == runs[1].files)


def imported(log: str) -> Row:
    found = re.search(r"([\d.]+) seconds(?: \(IMPORT FAILED\))?: \S*triptych\s", log)
    seconds = float(found[1]) if found and "FAILED" not in found[0] else float("inf")
    return Row("import of the pack, as ComfyUI measures it", f"{seconds:.1f} s", seconds <= IMPORT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=100)
    parser.add_argument("--clients", type=int, default=20)
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from comfy_server import ComfyServer, find_comfy

    from triptych.procedural import sample_views

    found = find_comfy()
    if isinstance(found, str):
        print(f"error: {found}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        files = {side: base / f"{side}.png" for side in ("front", "left", "back", "right")}
        for side, picture in sample_views(SIZE).items():
            picture.save(files[side])
        with ComfyServer(base / "comfy") as comfy:
            server = Server(f"http://127.0.0.1:{comfy.port}")
            rows = [imported(comfy.log)]
            more, results = soak(comfy, files, base / "out", args.jobs, args.clients)
            rows += more
            rows.append(twice(server, files, base / "twice"))
            rows += cancelled(server, files, base / "out")
        rows.append(compared(results, files))
    print(describe())
    width = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:<{width}}  {'ok    ' if row.passed else 'BROKEN'}  {row.measured}")
    return int(not all(row.passed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
