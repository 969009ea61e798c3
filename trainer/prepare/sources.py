"""Which mesh files a folder holds, in the layouts of the field.

Any folder tree works. Known layouts add a category and, where they have one, the official split's name as a remark:
ShapeNet (``<synset>/<model>/models/model_normalized.obj``), ModelNet (``<class>/{train,test}/*.off``), Objaverse
(``glbs/<shard>/<uid>.glb``), and a folder with an ``index.csv`` whose columns are id, split, file, name, category.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from triptych.errors import TriptychError
from triptych.geometry.files import MESH_SUFFIXES


@dataclass(frozen=True)
class Source:
    """One object to prepare. key: stable name, unique in a preparation; path: its file."""

    key: str
    path: Path
    name: str
    category: str = ""
    licence: str = ""
    attribution: str = ""


def find_sources(roots: list[Path], index_splits: tuple[str, ...] = ("train",)) -> list[Source]:
    """All objects below ``roots``, sorted by key. Raises TriptychError for a missing folder or one without meshes."""
    found: dict[str, Source] = {}
    for root in roots:
        if not root.is_dir():
            raise TriptychError(f"{root} is not a folder: name a folder that holds mesh files")
        index = root / "index.csv"
        sources = _from_index(root, index, index_splits) if index.is_file() else _from_tree(root)
        if not sources:
            raise TriptychError(f"{root} holds no mesh file of a known kind ({', '.join(sorted(MESH_SUFFIXES))})")
        found |= {source.key: source for source in sources}
    return [found[key] for key in sorted(found)]


def _from_index(root: Path, index: Path, splits: tuple[str, ...]) -> list[Source]:
    with index.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    missing = {"id", "split", "file"} - set(rows[0] if rows else ())
    if missing:
        raise TriptychError(f"{index} lacks the columns {sorted(missing)}: it needs id, split and file")
    return [
        Source(
            key=row["id"],
            path=root / row["file"],
            name=row.get("name", row["id"]),
            category=row.get("category", ""),
            licence=row.get("licence", ""),
            attribution=row.get("attribution", ""),
        )
        for row in rows
        if row["split"] in splits
    ]


def _from_tree(root: Path) -> list[Source]:
    sources = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in MESH_SUFFIXES and p.is_file()):
        relative = path.relative_to(root)
        sources.append(Source(f"{root.name}/{relative.as_posix()}", path, *_name_and_category(relative)))
    return sources


def _name_and_category(relative: Path) -> tuple[str, str]:
    parts = relative.parts
    if relative.stem == "model_normalized" and len(parts) >= 4:  # ShapeNet
        return parts[-3], parts[-4]
    if relative.suffix.lower() == ".off" and len(parts) >= 3 and parts[-2] in ("train", "test"):  # ModelNet
        return relative.stem, parts[-3]
    if "glbs" in parts:  # Objaverse
        return relative.stem, ""
    return relative.stem, parts[-2] if len(parts) > 1 else ""
