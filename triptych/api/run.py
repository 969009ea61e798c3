"""A workflow, its files and settings -> the files that it makes, on the least loaded of some servers."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TriptychError
from .companions import companions
from .convert import convert
from .files import download, offered
from .graph import find_file_input, is_editor_form, with_values, without
from .job import Finished, JobLost, Progress, run_job
from .server import Graph, Server, Unreachable, called

FOLDER = "triptych"  # inside the server's input folder
TRIES = 3


@dataclass(frozen=True)
class Result:
    """files: what was downloaded. texts: lines that nodes show, by the node's title. cached: ids of nodes with nothing
    to do. seconds: from the upload to the last file."""

    server: str
    prompt_id: str
    files: tuple[Path, ...]
    texts: dict[str, list[str]]
    cached: frozenset[str]
    seconds: float


def run_workflow(
    workflow: dict[str, Any],
    servers: Sequence[Server],
    out: Path,
    *,
    inputs: Mapping[str, Path] | None = None,
    values: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    timeout_s: float | None = None,
    overwrite: bool = False,
    previews: bool = True,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Result:
    """Runs a workflow in either form and writes its files into ``out``.

    inputs: node -> a file for it; values: "node.input=value"; leave_out: nodes to remove. timeout_s: of the job, from
    when it is queued. previews: also what the server keeps for show only (temp). notice: hears sentences on the way.
    A job that its server loses is queued again, on whatever server is then the best, up to three times in all.
    Raises TriptychError.
    """
    files = {name: Path(path) for name, path in (inputs or {}).items()}
    for path in files.values():
        if not path.is_file():
            raise TriptychError(f"there is no file {path}: check the path")
    say = notice or (lambda sentence: None)
    started = time.monotonic()
    for left in reversed(range(TRIES)):
        server = least_loaded(servers, say)
        try:
            graph = prepared(workflow, server, values, leave_out)
            graph = with_files(graph, files, server)
            say(f"running on {server.url}")
            finished = run_job(server, graph, progress, timeout_s)
            break
        except (JobLost, Unreachable) as error:
            if not left:
                raise
            say(f"{error}; it is queued again")
    entries = [entry for entry in offered(finished.outputs) if previews or entry["type"] == "output"]
    written = download(server, entries, out, overwrite=overwrite) if entries else []
    texts = _texts(finished, graph)
    seconds = time.monotonic() - started
    return Result(server.url, finished.prompt_id, tuple(written), texts, finished.cached, seconds)


def least_loaded(servers: Sequence[Server], notice: Callable[[str], None] | None = None) -> Server:
    """The server with the fewest jobs that run or wait; the first of equals. Those that do not answer are passed over,
    with a notice; raises Unreachable when none does."""
    loads: dict[int, int] = {}
    failures = []
    for number, server in enumerate(servers):
        try:
            loads[number] = server.load()
        except TriptychError as error:
            failures.append(error)
    if not loads:
        raise Unreachable("; ".join(str(failure) for failure in failures) or "no server is given: name one")
    for failure in failures:
        if notice is not None:
            notice(str(failure))
    return servers[min(loads, key=lambda number: (loads[number], number))]


def prepared(
    workflow: dict[str, Any], server: Server, values: Sequence[str] = (), leave_out: Sequence[str] = ()
) -> Graph:
    """The graph to queue, without its files: converted where it must be, nodes left out, settings filled in."""
    known: dict[str, dict[str, Any] | None] = {}

    def object_info(class_type: str) -> dict[str, Any] | None:
        if class_type not in known:
            known[class_type] = server.object_info(class_type)
        return known[class_type]

    def inputs_of(class_type: str) -> set[str]:
        sections = ((object_info(class_type) or {}).get("input") or {}).values()
        return {name for section in sections for name in section}

    graph = convert(workflow, object_info) if is_editor_form(workflow) else workflow
    return with_values(without(graph, leave_out), values, inputs_of)


def with_files(graph: Graph, files: Mapping[str, Path], server: Server) -> Graph:
    """Uploads files and puts their names in the server's input folder into a copy of the graph."""
    targets: dict[tuple[str, str], tuple[str, Path]] = {}
    for name, path in files.items():
        target = find_file_input(graph, name)
        if target in targets:
            raise TriptychError(
                f"{called(graph, target[0])} is given two files, as {targets[target][0]!r} and {name!r}"
            )
        targets[target] = name, path
    filled = {node: {**content, "inputs": dict(content["inputs"])} for node, content in graph.items()}
    for (node, key), (_, path) in targets.items():
        filled[node]["inputs"][key] = upload(server, path)
    return filled


def upload(server: Server, path: Path) -> str:
    """A file and what belongs to it, to a folder named after the content: equal files find the server's cache, and
    other clients' files of the same name stay as they are. Returns the name as nodes take it."""
    home = path.parent.resolve()
    family = [path.resolve(), *companions(path)] if path.exists() else []
    if not family:
        raise TriptychError(f"there is no file {path}: check the path")
    # A link may lie elsewhere under another name; it travels under the one that was given.
    names = [path.name, *(one.relative_to(home).as_posix() for one in family[1:])]
    digest = hashlib.sha256()
    for name, one in zip(names, family, strict=True):
        content = one.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    folder = f"{FOLDER}/{digest.hexdigest()[:16]}"
    for name, one in zip(names[1:], family[1:], strict=True):
        place, _, last = name.rpartition("/")
        _put(server, one, last, f"{folder}/{place}".rstrip("/"))
    return _put(server, family[0], _plain(path.name), folder)


def _put(server: Server, path: Path, name: str, folder: str) -> str:
    """Uploads what is not there yet: the folder is named after the content, and a file that is written again is a
    changed one for nodes that look at its time."""
    if server.has_input(name, folder, path.stat().st_size):
        return f"{folder}/{name}"
    return server.upload(path, name, folder)


def _plain(name: str) -> str:
    """A name that survives a multipart header, the server's file system and annotations such as ``[output]``."""
    plain = re.sub(r'[\x00-\x1f\x7f"<>:|?*\\/\[\]]', "_", name).strip(". ")
    return plain or "file"


def _texts(finished: Finished, graph: Graph) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for node, shown in finished.outputs.items():
        lines = shown.get("text") if isinstance(shown, dict) else None
        told = [str(line) for line in ([lines] if isinstance(lines, str) else lines or ()) if str(line)]
        if told:
            title = ((graph.get(node) or {}).get("_meta") or {}).get("title")
            texts[title if title and title not in texts else node] = told
    return texts
