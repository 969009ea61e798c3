"""Which files a graph may read and write: those in ComfyUI's input, output and temp folders, and no others.

A graph can come from anyone who reaches the server, so a name in it is judged like a web request: nothing absolute,
no step upwards, no NUL, no overlong name, and no symbolic link that leads out of its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..triptych.errors import TriptychError

MESH_SUFFIXES = (
    ".obj",
    ".glb",
    ".gltf",
    ".ply",
    ".stl",
    ".off",
)  # as geometry.files, which is too heavy to import here
MAX_NAME = 1024  # characters of a whole path
MAX_PART = 200  # bytes of one of its parts: file systems take 255, and a counter and suffixes are added
LISTED_FILES, LISTED_DEPTH = 2000, 4


def checked_name(name: str) -> str:
    """A relative path, with "/" between its parts. Raises TriptychError for anything that leads elsewhere."""
    plain = name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    wrong = None
    if not parts:
        wrong = "is empty"
    elif any(ord(character) < 32 for character in name):
        wrong = "contains control characters"
    elif len(name) > MAX_NAME or max(len(part.encode("utf-8", "surrogatepass")) for part in parts) > MAX_PART:
        wrong = "is too long"
    elif plain.startswith("/") or (len(plain) > 1 and plain[1] == ":") or ".." in parts:
        wrong = "leads out of ComfyUI's folders"
    if wrong:
        shown = ascii(name if len(name) <= 80 else name[:77] + "...")
        raise TriptychError(f"the file name {shown} {wrong}: give a name inside ComfyUI's input or output folder")
    return "/".join(parts)


def inside(folder: str | Path, name: str) -> Path:
    """``folder``/``name``, which need not exist. Raises TriptychError when it leads out, also by links."""
    root = Path(os.path.realpath(folder))
    target = Path(os.path.realpath(root / checked_name(name)))
    if target != root and root not in target.parents:
        raise TriptychError(f"the file name {name!r} leads out of {root.name}: give a name inside of it")
    return target


def named_file(name: str) -> Path:
    """An existing file by the name that ComfyUI gives it: in input, or with " [output]" or " [temp]" behind it.

    Raises TriptychError when it is not there or leads out of these folders.
    """
    import folder_paths

    folders = {
        "input": folder_paths.get_input_directory(),
        "output": folder_paths.get_output_directory(),
        "temp": folder_paths.get_temp_directory(),
    }
    kind, plain = "input", name
    for candidate in folders:
        if name.endswith(f" [{candidate}]"):
            kind, plain = candidate, name[: -len(candidate) - 3]
    path = inside(folders[kind], plain)
    if not path.is_file():
        raise TriptychError(f"there is no file {plain!r} in ComfyUI's {kind} folder: upload it, or choose another")
    return path


def mesh_files(folder: str | Path) -> Iterator[str]:
    """Names, relative to the folder, of the mesh files in it and in its folders; links are not followed."""
    count = 0
    for parent, folders, names in os.walk(folder):
        relative = os.path.relpath(parent, folder)
        depth = 0 if relative == "." else relative.count(os.sep) + 1
        folders[:] = sorted(entry for entry in folders if not entry.startswith(".")) if depth < LISTED_DEPTH else []
        for name in sorted(names):
            if name.lower().endswith(MESH_SUFFIXES) and not name.startswith("."):
                yield name if depth == 0 else f"{relative.replace(os.sep, '/')}/{name}"
                count += 1
                if count >= LISTED_FILES:
                    return


def entry(path: Path, folder: str | Path, kind: str) -> dict[str, str]:
    """A file as ComfyUI's clients name it: {"filename", "subfolder", "type"}."""
    relative = Path(os.path.realpath(path)).relative_to(os.path.realpath(folder))
    parent = relative.parent.as_posix()
    return {"filename": relative.name, "subfolder": "" if parent == "." else parent, "type": kind}


def fingerprint(path: Path) -> tuple[int, int]:
    """Changes when the file does: its size and time of change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
