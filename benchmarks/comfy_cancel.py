"""How fast ComfyUI's cancel button works at each stage: from POST /interrupt to the end of the run, and until the
machine is free again.

    python -m benchmarks.comfy_cancel [--trials 3]

Starts a ComfyUI on the processor (COMFYUI_DIR and COMFYUI_PYTHON as for the tests). Every stage is made long enough to
be met, and cancelled at several moments of it. `answered`: until ComfyUI reports the interruption. `worked`: processor
seconds of the server until then, which on a machine that is busy elsewhere says more. `free`: until another small job
has run, less what it takes undisturbed: what nothing can stop midway still has to end. The worst trial counts. Exit
code 1 when a stage was not met, or when neither `answered` nor `worked` is below a second.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

ROOT = Path(__file__).resolve().parent.parent
SIZE, LIMIT_S = 512, 1.0
DELAYS_S = (0.0, 0.15, 0.4, 0.8, 1.5)  # after the stage has begun


@dataclass(frozen=True)
class Case:
    """A stage: the node it belongs to, the share of the node's progress where it begins (None: as the node starts),
    and settings by node that make it long."""

    what: str
    node: str
    begins: float | None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    workflow: str = "views_to_obj"


SHORT = {"ensemble": 1, "steps": 1, "texture_size": 0}
CASES = (
    Case("views", "PrepareViews", None, {"PrepareViews": {"size": 1024}}),
    Case("structure", "Reconstruct", 0.0, {"Reconstruct": {"steps": 500}}),
    Case("structure, guided", "Reconstruct", 0.0, {"Reconstruct": {"steps": 500, "guidance": 2.0, "ensemble": 8}}),
    Case("latents", "Reconstruct", 0.45, {"Reconstruct": SHORT | {"second_steps": 500}}),
    Case("surface", "Reconstruct", 0.6, {"Reconstruct": SHORT | {"target_faces": 0}}),
    Case("unwrap", "Reconstruct", 0.75, {"Reconstruct": SHORT | {"texture_size": 2048, "target_faces": 100_000}}),
    Case("texture", "Reconstruct", 0.86, {"Reconstruct": SHORT | {"texture_size": 4096, "target_faces": 4000}}),
    Case("texture, 8192", "Reconstruct", 0.86, {"Reconstruct": SHORT | {"texture_size": 8192, "target_faces": 4000}}),
    Case("vertex colours", "Reconstruct", 0.76, {"Reconstruct": SHORT | {"target_faces": 0}}),
    Case("clean: voxels", "CleanMesh", None, {"CleanMesh": {"remesh": "voxels", "remesh_resolution": 256}}),
    Case("clean: isotropic", "CleanMesh", None, {"CleanMesh": {"remesh": "isotropic", "remesh_resolution": 200}}),
    Case("texture a mesh", "TextureMesh", 0.0, {"TextureMesh": {"texture_size": 4096, "fill": "mirror"}}),
    Case("render", "RenderViews", 0.0, {"RenderViews": {"count": 64, "size": 1024}}, "turntable"),
)


def graph_of(case: Case, names: dict[str, str], number: int) -> dict[str, Any]:
    """The case's workflow with its files, and something in it that was never run."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{case.workflow}.api.json").read_text())
    for content in graph.values():
        inputs, kind = content["inputs"], content["class_type"].removeprefix("Triptych_")
        if kind == "LoadImage":
            inputs["image"] = names[Path(inputs["image"]).stem]
        elif kind == "LoadMesh":
            inputs["file"] = names["mesh"]
        elif kind == "PrepareViews":
            inputs["size"] = SIZE
        elif kind == "CleanMesh":
            inputs["target_faces"] = 12_000
        inputs.update(case.settings.get(kind, {}))
        if kind == case.node:
            _vary(inputs, number)
    return graph


def _vary(inputs: dict[str, Any], number: int) -> None:
    for name, step in (("seed", 1), ("smooth", 1), ("padding", 1), ("elevation", 0.5)):
        if name in inputs:
            inputs[name] += step * number
            return
    inputs["size"] -= 8 * number


@dataclass
class Measured:
    answered: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.answered) and max(map(min, self.answered, self.worked)) < LIMIT_S

    def __str__(self) -> str:
        worst = [max(values, default=float("nan")) for values in (self.answered, self.worked, self.free)]
        numbers = "  ".join(f"{value:7.2f} s" for value in worst)
        return f"{'ok    ' if self.passed else 'BROKEN'}  {numbers}  {len(self.answered)}"


class Trial:
    """One server, and small jobs to see when it is free."""

    def __init__(self, comfy: Any, mesh: bytes) -> None:
        self.comfy, self.client, self.mesh, self.small = comfy, comfy.client(), mesh, 0
        self.alone_s = min(self.small_job() for _ in range(3))

    def small_job(self) -> float:
        """Seconds of a job that no other can have cached: a mesh file is read and shown."""
        self.small += 1
        name = self.client.upload(f"small_{self.small}.glb", self.mesh)
        graph = {
            "1": {"class_type": "Triptych_LoadMesh", "inputs": {"file": name, "normalize": False}},
            "2": {"class_type": "Triptych_Preview3D", "inputs": {"mesh": ["1", 0]}},
        }
        started = time.monotonic()
        self.client.run(graph)
        return time.monotonic() - started

    def cancel(self, graph: dict[str, Any], case: Case, delay_s: float, into: Measured) -> None:
        node = next(number for number, content in graph.items() if content["class_type"] == f"Triptych_{case.node}")
        listener = self.client.listen()
        try:
            job = self.client.queue(graph)
            ends = {"execution_success", "execution_error", "execution_interrupted"}

            def begun(name: str, data: Any) -> bool:
                if not isinstance(data, dict) or (name in ends and data["prompt_id"] == job):
                    return name in ends
                if case.begins is None:
                    return name == "executing" and data["node"] == node
                is_node = name == "progress" and data["node"] == node
                return is_node and data["value"] / data["max"] >= case.begins

            if listener.until(begun)[-1][0] in ends:
                return
            time.sleep(delay_s)
            asked, busy = time.monotonic(), self.comfy.cpu_s()
            self.client.post("/interrupt", {})
            last = listener.until(lambda name, data: name in ends and data["prompt_id"] == job)[-1][0]
            if last == "execution_interrupted":
                into.answered.append(time.monotonic() - asked)
                into.worked.append(self.comfy.cpu_s() - busy)
                into.free.append(max(self.small_job() - self.alone_s, 0.0))
        finally:
            listener.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=3, help=f"moments of each stage, 1-{len(DELAYS_S)}")
    parser.add_argument("--only", help="stages whose name contains this")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from comfy_server import ComfyServer, find_comfy

    from triptych.geometry.files import write_mesh
    from triptych.procedural import sample_object, sample_views

    found = find_comfy()
    if isinstance(found, str):
        print(f"error: {found}", file=sys.stderr)
        return 1
    print(describe())
    print(f"{'stage':<18}  {'':6}  {'answered':>9}  {'worked':>9}  {'free':>9}  trials", flush=True)
    passed = []
    with tempfile.TemporaryDirectory() as name, ComfyServer(Path(name) / "comfy") as comfy:
        base = Path(name)
        write_mesh(sample_object(), base / "mesh.glb")
        mesh = (base / "mesh.glb").read_bytes()
        names = {"mesh": comfy.client().upload("mesh.glb", mesh)}
        for side, picture in sample_views(SIZE).items():
            picture.save(base / f"{side}.png")
            names[side] = comfy.client().upload(f"{side}.png", (base / f"{side}.png").read_bytes())
        trial = Trial(comfy, mesh)
        number = 0
        for case in CASES:
            if args.only and args.only not in case.what:
                continue
            measured = Measured()
            for delay_s in DELAYS_S[: args.trials]:
                number += 1
                trial.cancel(graph_of(case, names, number), case, delay_s, measured)
            passed.append(measured.passed)
            print(f"{case.what:<18}  {measured}", flush=True)
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
