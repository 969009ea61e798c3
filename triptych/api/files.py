"""What a server offers for download -> files in a folder.

Names come from the server and are not believed: one that is not a plain relative name, or that a link in the folder
would lead elsewhere, is refused, and nothing of the job is written.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import TriptychError
from .server import Server

_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\/]')
MAX_NAME, MAX_DEPTH = 200, 16

Entry = dict[str, str]


def offered(outputs: Mapping[str, Any]) -> list[Entry]:
    """Every file in the outputs of a job's history, once: {"filename", "subfolder", "type"}."""
    found: dict[tuple[str, str, str], None] = {}
    for node in outputs.values():
        for values in node.values() if isinstance(node, dict) else ():
            for value in values if isinstance(values, list) else ():
                if isinstance(value, dict) and isinstance(value.get("filename"), str):
                    place = str(value.get("subfolder") or "").replace("\\", "/")
                    found[str(value.get("type") or "output"), place, value["filename"]] = None
    return [{"filename": name, "subfolder": place, "type": kind} for kind, place, name in found]


def relative_path(entry: Entry) -> Path:
    """Where a file lies inside the folder: its subfolder and name; what is not in the server's output folder comes
    under the name of its own (temp, input). Raises TriptychError for names that could lead anywhere else."""
    folders = [part for part in entry["subfolder"].split("/") if part]
    if entry["type"] != "output":
        folders = [entry["type"], *folders]
    parts = [*folders, entry["filename"]]
    if entry["subfolder"].startswith("/") or len(parts) > MAX_DEPTH or not all(_plain(part) for part in parts):
        shown = "/".join((entry["subfolder"], entry["filename"]))[:120]
        raise TriptychError(f"the server offers a file named {shown!r}, which is no plain name: nothing was written")
    return Path(*parts)


def download(server: Server, entries: list[Entry], folder: Path, *, overwrite: bool = False) -> list[Path]:
    """Fetches files into ``folder``: all of them or none, each whole or not at all.

    Where other files of the same names exist, a folder ``run_00002`` (and so on) inside it takes the job's files, so
    that an OBJ stays beside its own MTL and pictures; ``overwrite`` replaces them instead. Returns the paths.
    """
    names = [relative_path(entry) for entry in entries]
    if len({str(name).lower() for name in names}) < len(names):
        raise TriptychError("the server offers two files of one name: nothing was written")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _inside(folder, folder / name)
    staging = Path(tempfile.mkdtemp(prefix=".triptych-", suffix=".part", dir=folder))
    try:
        for number, entry in enumerate(entries):
            with open(staging / str(number), "wb") as stream:
                server.fetch(entry, stream)
        staged = [staging / str(number) for number in range(len(entries))]
        home = folder if overwrite else _free_home(folder, names, staged)
        targets = [home / name for name in names]
        for source, target in zip(staged, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            _inside(folder, target)
            os.replace(source, target)
        return targets
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _free_home(folder: Path, names: list[Path], staged: list[Path]) -> Path:
    """The folder itself, else its first run_... where no other file has any of the names."""
    for home in _homes(folder):
        if all(_free(home / name, source) for name, source in zip(names, staged, strict=True)):
            return home
    raise AssertionError("there is always a next number")


def _homes(folder: Path) -> Iterator[Path]:
    yield folder
    number = 2
    while True:
        yield folder / f"run_{number:05d}"
        number += 1


def _free(target: Path, source: Path) -> bool:
    """Nothing there, or this very file from an earlier run."""
    if not target.exists() and not target.is_symlink():
        return True
    return target.is_file() and not target.is_symlink() and filecmp.cmp(target, source, shallow=False)


def _inside(folder: Path, target: Path) -> None:
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise TriptychError(f"{target} leads out of {folder} through a link: choose another output folder")


def _plain(part: str) -> bool:
    return bool(
        part
        and len(part.encode(errors="surrogatepass")) <= MAX_NAME
        and not _FORBIDDEN.search(part)
        and not part.startswith(".")
        and not part.endswith((".", " "))
        and not _RESERVED.fullmatch(part)
    )
