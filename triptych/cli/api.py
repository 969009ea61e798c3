"""``api``: a workflow on ComfyUI servers, its files here."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from ..errors import TriptychError
from .arguments import UsageError
from .report import to_json, warn

DEFAULT = "http://127.0.0.1:8188"  # where ComfyUI listens unless told otherwise
_WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"
SHOW_S = 5.0  # between lines about one node, where stderr is a file
PRINT_SHARE = 0.005  # of a node's work


def api(args: argparse.Namespace) -> int:
    """Prints a JSON summary; the files are in ``args.out``."""
    from ..api import Server, read_workflow, run_workflow

    servers = [Server(url) for url in dict.fromkeys(args.server or [DEFAULT])]
    workflow = read_workflow(workflow_file(args.workflow))
    if args.print_api:
        print(json.dumps(_graph(workflow, servers, args), indent=2))
        return 0
    if args.out is None:
        raise UsageError("no output folder was given: add --out DIR")
    if args.out.exists() and not args.out.is_dir():  # said before the job, not after it
        raise TriptychError(f"{args.out} is a file where a folder is needed: choose another output folder")
    line = _Line(args.quiet)
    try:
        result = run_workflow(
            workflow,
            servers,
            args.out,
            inputs=dict(_pairs(args.input)),
            values=args.set,
            leave_out=args.without,
            timeout_s=args.timeout,
            overwrite=args.overwrite,
            previews=not args.no_previews,
            progress=line.show,
            notice=line.say,
        )
    except KeyboardInterrupt:
        line.say("the job is cancelled")
        raise
    finally:
        line.close()
    if not result.files:
        warn("the job made no files: has the workflow an Export or Save node?")
    summary = {
        "server": result.server,
        "prompt_id": result.prompt_id,
        "files": [str(path) for path in result.files],
        "texts": result.texts,
        "seconds": round(result.seconds, 2),
    }
    print(to_json(summary))
    return 0


def workflow_file(named: Path) -> Path:
    """The file, or the one of that name among the repository's own. Raises TriptychError for another bare name."""
    own = {path.name.removesuffix(".api.json"): path for path in sorted(_WORKFLOWS.glob("*.api.json"))}
    if named.exists() or named.suffix or len(named.parts) != 1 or not own:
        return named
    if named.name not in own:
        raise TriptychError(f"there is no workflow {named}: choose {', '.join(own)}, or name a JSON file")
    return own[named.name]


def _graph(workflow: dict, servers: list, args: argparse.Namespace) -> dict:
    from ..api.run import least_loaded, prepared

    return prepared(workflow, least_loaded(servers, warn), args.set, args.without)


def _pairs(texts: list[str]) -> list[tuple[str, Path]]:
    pairs: list[tuple[str, Path]] = []
    for text in texts:
        name, equals, path = text.partition("=")
        if not (equals and name and path):
            raise UsageError(f"the input {text!r} cannot be read: write NAME=FILE")
        if any(name == known for known, _ in pairs):
            raise UsageError(f"the input {name!r} is given twice: give each once")
        pairs.append((name, Path(path)))
    return pairs


class _Line:
    """One line on stderr that says what goes on; where stderr is no terminal, a line for each node."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._node, self._share, self._shown_at, self._open = "", 0.0, 0.0, False

    def show(self, node: str, share: float | None) -> None:
        now = time.monotonic()
        new = node != self._node
        late = now - self._shown_at > SHOW_S
        step = share is not None and abs(share - self._share) >= PRINT_SHARE
        if self._quiet or not (new or (step and (self._terminal or late))):
            return
        self._node, self._share, self._shown_at = node, share or 0.0, now
        text = node if share is None else f"{node} {share:.0%}"
        if self._terminal:
            print(f"\r\x1b[2K{text[:100]}", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        if not self._quiet:
            self.close()
            print(sentence, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._open = False
