#!/usr/bin/env python3
"""Two commands on a bare machine: ``python run.py demo`` and ``python run.py test``.

Standard library only. Makes ``.venv`` beside itself, installs the project into it, and runs the command there. A stamp
inside ``.venv`` says what was installed; it is written last, so an interrupted install is simply done again, and a
second run starts at once. An environment that exists is kept, with the torch it holds.
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
import time
from pathlib import Path

USAGE = """\
usage: python run.py demo [IMAGE ...] [--front F] [--left L] [--back B] [--right R] [-o DIR]
           pictures of one object -> textured OBJ, GLB, turntable and viewer.html in DIR (default: out);
           without pictures, views of a small sample object; of one picture, the other sides are generated
       python run.py test [pytest arguments]      lint, types and tests; with arguments, only pytest
       python run.py generate|views|convert|render|inspect|compare|parity|api ...   the same as python -m triptych ...
       python run.py trainer ...                  the same as python -m trainer ...
       python run.py web [--force]                builds the viewer, the ComfyUI widget and the studio page
       python run.py clean                        removes .venv

The first run makes .venv beside this file and installs into it; later runs start at once."""

OLDEST_PYTHON = (3, 10)
TORCH_TESTED = "torch==2.13.0"
TORCH_ANY = "torch>=2.4"
STAMP = "triptych-stamp.json"
LOG = "triptych-install.log"
LIBRARY_COMMANDS = ("demo", "generate", "views", "convert", "render", "inspect", "compare", "parity", "api")

# What to do about a failed installation, by what its log says.
REMEDIES = (
    (r"No space left on device|not enough space on the disk", "free some disk space (about 3 GB) and run it again"),
    (
        r"NewConnectionError|NameResolutionError|name resolution|ConnectTimeout|ReadTimeout|Read timed out|ProxyError"
        r"|Network is unreachable|Connection refused",
        "check the network connection (or set HTTPS_PROXY) and run it again: what was installed is kept",
    ),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "point PIP_CERT at your network's certificate file and run it again"),
    (r"Permission denied|Access is denied", "make this folder writable for you, or clone it where you may write"),
    (
        r"No matching distribution|Failed building wheel|Microsoft Visual C\+\+|command '.*(gcc|cc|clang)'",
        "use a Python for which the packages have wheels, for instance 3.11 or 3.12, after `python run.py clean`",
    ),
    (r"ModuleNotFoundError|ImportError", "run `python run.py clean`, then the same command again"),
)
OFFLINE = REMEDIES[1][0]


class SetupError(Exception):
    """One sentence for the user; no traceback."""


def venv_python(venv: Path, os_name: str = os.name) -> Path:
    """The interpreter of a virtual environment, on Windows (``nt``) and elsewhere."""
    return venv / "Scripts" / "python.exe" if os_name == "nt" else venv / "bin" / "python"


def child_environment(environ: dict[str, str]) -> dict[str, str]:
    """Without the variables that would make the environment see another Python's packages, or pip leave it."""
    clean = {key: value for key, value in environ.items() if key not in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET")}
    return {**clean, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}


def probe(python: Path) -> dict | None:
    """Version, pip and torch of an environment; None when its interpreter does not start."""
    # RECORD is the last file that pip writes: without it a package is half there.
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def whole(name):\n"
        "    return next((d.version for d in m.distributions(name=name) if d.read_text('RECORD') is not None), None)\n"
        "print(json.dumps({'version': list(sys.version_info[:3]), 'pip': whole('pip'), 'torch': whole('torch')}))"
    )
    environment = child_environment(dict(os.environ))
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=environment, timeout=120)
        return json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def fingerprint(root: Path, version: list[int]) -> str:
    """What an installation depends on: both requirement files, the Python version, and where the repository lies."""
    digest = hashlib.sha256(repr((list(version), str(root))).encode())
    for name in ("pyproject.toml", "requirements.txt"):
        # Line endings differ between checkouts on Windows and elsewhere.
        digest.update((root / name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def read_stamp(venv: Path) -> dict:
    """The stamp's fingerprint and extras; empty when there is none, or none that can be read."""
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        return stamp if isinstance(stamp, dict) and isinstance(stamp.get("extras"), list) else {}
    except (OSError, ValueError):
        return {}


def write_stamp(venv: Path, mark: str, extras: set[str]) -> None:
    """Written beside its name and moved: a stamp is whole or absent."""
    fresh = venv / (STAMP + ".new")
    fresh.write_text(json.dumps({"fingerprint": mark, "extras": sorted(extras)}), encoding="utf-8")
    os.replace(fresh, venv / STAMP)


def is_ready(stamp: dict, mark: str, needed: set[str]) -> bool:
    return stamp.get("fingerprint") == mark and needed <= set(stamp.get("extras", []))


def torch_is_usable(version: str | None) -> bool:
    """An installed torch of 2.4 or later is kept, whatever its build."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return found is not None and (int(found[1]), int(found[2])) >= (2, 4)


def remedy(log: str) -> str:
    return next((advice for pattern, advice in REMEDIES if re.search(pattern, log)), "read the log and run it again")


def short_progress(line: str) -> str | None:
    """What one line of pip's output means to somebody who waits, or None."""
    found = re.match(r"\s*(Collecting|Downloading|Building wheel for|Installing collected packages)[: ]+(\S+)", line)
    if found is None:
        return None
    if found[1].startswith("Installing"):
        return "putting the packages in place"
    name = found[2].rsplit("/", 1)[-1]
    size = re.search(r"\(([\d.]+ [kMG]B)\)", line)
    return f"{found[1].split()[0].lower()} {name}" + (f" ({size[1]})" if size else "")


class Setup:
    """Makes ``.venv`` under ``root`` and keeps it in step with the requirement files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = venv_python(self.venv)
        self.log = self.venv / LOG

    def ensure(self, extras: set[str]) -> Path:
        """The interpreter to run with, once everything in ``extras`` is installed."""
        state = probe(self.python)
        if state is not None:
            mark = fingerprint(self.root, state["version"])
            stamp = read_stamp(self.venv)
            if is_ready(stamp, mark, extras):
                return self.python
            extras = extras | set(stamp.get("extras", []))
        (self.venv / STAMP).unlink(missing_ok=True)
        state = state or self._make()
        if not state["pip"]:
            self._step("adding pip", ["-m", "ensurepip", "--upgrade"])
        if tuple(state["version"][:2]) < OLDEST_PYTHON:
            version = ".".join(map(str, state["version"]))
            raise SetupError(f".venv holds Python {version}, 3.10 or later is needed: run `python run.py clean` first")
        self._install(extras, torch=state["torch"])
        write_stamp(self.venv, fingerprint(self.root, state["version"]), extras)
        return self.python

    def _make(self) -> dict:
        """A fresh environment, in place of one that does not start."""
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(
                "this Python cannot make virtual environments: install its venv module "
                f"(Debian and Ubuntu: `sudo apt install python3-venv` or python{version}-venv) and run it again"
            )
        if self.venv.exists():
            refuse_foreign_folder(self.venv)
            say("The environment in .venv does not start: making it again.")
        say("Making .venv ...")
        # --clear empties a half-made environment, also one behind a link.
        done = subprocess.run(
            [sys.executable, "-m", "venv", "--clear", str(self.venv)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environment(dict(os.environ)),
        )
        state = probe(self.python) if done.returncode == 0 else None
        if state is None:
            raise SetupError(f"making {self.venv} failed; {remedy(done.stdout)}\n{tail(done.stdout)}")
        return state

    def _install(self, extras: set[str], torch: str | None) -> None:
        started = time.monotonic()
        self.log.unlink(missing_ok=True)
        if not torch_is_usable(torch):
            self._install_torch()
        target = f".[{','.join(sorted(extras))}]" if extras else "."
        self._step(f"installing Triptych ({target}) ...", ["-m", "pip", "install", "-e", target])
        self._step("checking ...", ["-c", "import numpy, torch, triptych"])
        say(f"Ready after {time.monotonic() - started:.0f} s.")

    def _install_torch(self) -> None:
        pip = ["-m", "pip", "install"]
        try:
            self._step(f"installing {TORCH_TESTED} (the largest part) ...", [*pip, TORCH_TESTED])
        except SetupError:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            if "No matching distribution" not in text or re.search(OFFLINE, text):
                raise
            say(f"{TORCH_TESTED} is not offered for this Python and platform: taking the newest {TORCH_ANY} instead.")
            self._step(f"installing {TORCH_ANY} ...", [*pip, TORCH_ANY])

    def _step(self, what: str, arguments: list[str]) -> None:
        """Runs the environment's Python; its output goes to the log, one short line to the terminal."""
        say(what[0].upper() + what[1:])
        begin = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "a", encoding="utf-8") as log, Progress() as progress:
            child = subprocess.Popen(
                [str(self.python), *arguments],
                cwd=self.root,
                env=child_environment(dict(os.environ)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
            )
            try:
                for line in child.stdout or ():
                    log.write(line)
                    progress.show(short_progress(line))
            except BaseException:
                child.kill()
                raise
            finally:
                child.wait()
        if child.returncode != 0:
            text = self.log.read_bytes()[begin:].decode("utf-8", "replace")
            raise SetupError(f"{what.rstrip(' .')} failed; {remedy(text)}.\nThe end of {self.log}:\n{tail(text)}")


class Progress:
    """One line that is written over in a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.width = 0

    def __enter__(self) -> Progress:
        return self

    def show(self, text: str | None) -> None:
        if self.live and text is not None:
            text = "  " + text[: max(20, shutil.get_terminal_size().columns - 4)]
            print("\r" + text.ljust(self.width), end="", flush=True)
            self.width = len(text)

    def __exit__(self, *_: object) -> None:
        if self.width:
            print("\r" + " " * self.width + "\r", end="", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def tail(text: str, lines: int = 12) -> str:
    return "\n".join("  " + line for line in text.strip().splitlines()[-lines:])


def refuse_foreign_folder(venv: Path) -> None:
    """Never empties a ``.venv`` that is something else: a half-made one has pyvenv.cfg, or no files at all."""
    if not (venv / "pyvenv.cfg").exists() and any(path.is_file() for path in venv.rglob("*")):
        raise SetupError(f"{venv} exists and is not a virtual environment: move it away and run it again")


def clean(root: Path) -> int:
    venv = root / ".venv"
    if venv.is_symlink():
        raise SetupError(f"{venv} is a link: remove it yourself")
    if venv.exists():
        refuse_foreign_folder(venv)
        shutil.rmtree(venv)
        say(f"Removed {venv}.")
    return 0


def run(command: list[str], cwd: Path | None = None) -> int:
    """The exit status of a command that owns the terminal."""
    child = subprocess.Popen(command, cwd=cwd, env=child_environment(dict(os.environ)))
    while True:
        try:
            status = child.wait()
            return status if status >= 0 else 128 - status
        except KeyboardInterrupt:
            # The terminal sent the interrupt to the child too: let it save and end by itself.
            continue


def run_tests(python: Path, root: Path, arguments: list[str]) -> int:
    """Lint and types (unless pytest arguments pick tests), then pytest, whose summary is the last line."""
    checks = [] if arguments else [["ruff", "check", "."], ["mypy", "triptych", "trainer"]]
    failed = [check[0] for check in checks if run([str(python), "-m", *check], cwd=root) != 0]
    if failed:
        say(f"Failed: {' and '.join(failed)} (see above). The tests follow.")
    status = run([str(python), "-m", "pytest", *arguments], cwd=root)
    return status or bool(failed)


def main(argv: list[str], root: Path | None = None) -> int:
    root = root or Path(__file__).resolve().parent
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command in ("", "-h", "--help", "help"):
        print(USAGE)
        return 0 if command else 2
    try:
        if command == "clean":
            return clean(root)
        if command == "test":
            return run_tests(Setup(root).ensure({"train", "test"}), root, rest)
        if command == "trainer":
            return run([str(Setup(root).ensure({"train"})), "-m", "trainer", *rest])
        if command == "web":
            return run([sys.executable, "-m", "triptych.webbuild", *rest], cwd=root)
        if command in LIBRARY_COMMANDS:
            # The user's folder stays the current one: picture names and -o are relative to it.
            return run([str(Setup(root).ensure(set())), "-m", "triptych", command, *rest])
        raise SetupError(f"there is no command {command!r}\n{USAGE}")
    except SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"run.py: {error}: {remedy(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:  # noqa: UP036  (this file is started by whatever Python there is)
        sys.exit(f"Triptych needs Python 3.10 or later; this is {sys.version.split()[0]}")
    sys.exit(main(sys.argv[1:]))
