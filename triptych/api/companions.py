"""The files that a mesh file refers to: an OBJ's MTL and its pictures, a glTF's buffers and pictures.

A mesh may come from anywhere and can name any path, and what is found here is sent to a server: so only existing
files of the expected kinds inside the mesh's own folder count. The rest is left out, as a reader would leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tga", ".tif", ".tiff")
_MAPS = ("map_", "bump", "disp", "decal", "norm", "refl")
MAX_TEXT = 64 << 20  # bytes of an MTL or glTF; larger ones are taken as they are, without companions


def companions(path: Path) -> list[Path]:
    """Files besides ``path`` itself, each once, all inside its folder."""
    suffix = path.suffix.lower()
    if suffix == ".obj":
        materials = _inside(path, _named(path, ("mtllib",)), (".mtl",))
        pictures = [picture for mtl in materials for picture in _inside(path, _named(mtl, _MAPS), PICTURES)]
        return list(dict.fromkeys([*materials, *pictures]))
    if suffix == ".gltf":
        return _inside(path, _uris(path), (*PICTURES, ".bin"))
    return []


def _named(path: Path, keywords: tuple[str, ...]) -> list[str]:
    """What follows these keywords at the beginning of lines; of options and a name only the name."""
    names = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.strip().split(None, 1)
            if len(words) == 2 and words[0].lower().startswith(keywords):
                rest = words[1].strip()
                names += [rest, rest.split()[-1]]  # a name may have blanks, and options may stand before it
    return names


def _uris(path: Path) -> list[str]:
    if path.stat().st_size > MAX_TEXT:
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [entry for key in ("buffers", "images") for entry in content.get(key, ())]
        return [unquote(entry["uri"]) for entry in entries if "uri" in entry and not entry["uri"].startswith("data:")]
    except (ValueError, AttributeError, TypeError):
        return []


def _inside(mesh: Path, names: Iterable[str], suffixes: tuple[str, ...]) -> list[Path]:
    home = mesh.parent.resolve()
    found = []
    for name in names:
        if "\0" in name or len(name) > 1000:
            continue
        place = (home / name.replace("\\", "/")).resolve()
        if place.suffix.lower() in suffixes and place.is_relative_to(home) and place.is_file():
            found.append(place)
    return list(dict.fromkeys(found))
