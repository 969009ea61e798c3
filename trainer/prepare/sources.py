"""Which mesh files a folder holds, in the layouts of the field.

Any folder tree works: the folder that holds a file is its category. Known layouts say more:

| layout | tree | category | turned into our frame from |
|---|---|---|---|
| ShapeNet | ``<synset>/<model>/models/model_normalized.obj`` | the synset's name | up +Y, front -Z |
| ModelNet | ``<class>/{train,test}/*.off`` | the class | up +Z, front -Y |
| Objaverse | ``glbs/<shard>/<uid>.glb`` | none | glTF's frame, which is ours |
| index | ``index.csv``: id, split, file, perhaps name, category, licence, attribution | as it says | ours |

Of an OBJ, textures and MTL files are found by the reader; they are no objects of their own.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from triptych.errors import TriptychError
from triptych.geometry.files import MESH_SUFFIXES

AXES = ("+x", "-x", "+y", "-y", "+z", "-z")
OUR_FRAME = ("+y", "+z")


@dataclass(frozen=True)
class Source:
    """One object to prepare.

    key: stable name, unique in a preparation. path: its file. frame: the file's axes that are up and front.
    """

    key: str
    path: Path
    name: str
    category: str = ""
    licence: str = ""
    attribution: str = ""
    frame: tuple[str, str] = OUR_FRAME


def find_sources(
    roots: list[Path],
    index_splits: tuple[str, ...] = ("train",),
    up: str | None = None,
    front: str | None = None,
) -> list[Source]:
    """All objects below ``roots``, sorted by key.

    up, front: axes ("+y", "-z", ...) that replace what the layouts say. Raises TriptychError for a missing or
    unreadable folder, one without meshes, an index.csv that lacks columns, and two files with one key.
    """
    found: dict[str, Source] = {}
    for root in roots:
        if not root.is_dir():
            raise TriptychError(f"{root} is not a folder: name a folder that holds mesh files")
        index = root / "index.csv"
        sources = _from_index(root, index, index_splits) if index.is_file() else _from_tree(root)
        if not sources:
            raise TriptychError(f"{root} holds no mesh file of a known kind ({', '.join(sorted(MESH_SUFFIXES))})")
        for source in sources:
            source = replace(source, frame=_checked_frame(up or source.frame[0], front or source.frame[1]))
            other = found.setdefault(source.key, source)
            if other.path.resolve() != source.path.resolve():
                raise TriptychError(
                    f"{other.path} and {source.path} have the same key {source.key!r}: rename one of the folders, "
                    "or mend the ids of the index"
                )
    return [found[key] for key in sorted(found)]


def _checked_frame(up: str, front: str) -> tuple[str, str]:
    if up not in AXES or front not in AXES or up[1] == front[1]:
        raise TriptychError(f"up {up} and front {front} make no frame: choose two different axes of {', '.join(AXES)}")
    return up, front


def _from_index(root: Path, index: Path, splits: tuple[str, ...]) -> list[Source]:
    try:
        with index.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TriptychError(f"{index} cannot be read ({error}): save it as comma-separated UTF-8 text") from error
    missing = {"id", "split", "file"} - set(rows[0] if rows else ())
    if missing:
        raise TriptychError(f"{index} lacks the columns {sorted(missing)}: it needs id, split and file")
    taken = [row for row in rows if row["split"] in splits]
    if not taken:
        there = ", ".join(sorted({row["split"] or "" for row in rows}))
        raise TriptychError(f"{index} has no object in {' '.join(splits)} (its splits: {there}): see --index-split")
    return [
        Source(
            key=row["id"],
            path=_inside(root, row["file"] or "", index),
            name=row.get("name") or row["id"],
            category=row.get("category") or "",
            licence=row.get("licence") or row.get("license") or "",
            attribution=row.get("attribution") or "",
        )
        for row in taken
    ]


def _inside(root: Path, file: str, index: Path) -> Path:
    # An index is somebody else's text: it may name files of its own folder only, on any system.
    absolute = PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive or file.startswith("\\")
    if absolute or ".." in PureWindowsPath(file).parts:
        raise TriptychError(f"{index} names {file!r}, which lies outside its folder: name files below {root}")
    return root / file


def _from_tree(root: Path) -> list[Source]:
    place = root.resolve()  # "." has no name
    return [_source_of(place.name, path.relative_to(place), path) for path in sorted(_mesh_files(place))]


def _mesh_files(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise TriptychError(f"{error.filename} cannot be read ({error.strerror}): mend its permissions or leave it out")

    seen = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back to where it came from
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in files if Path(name).suffix.lower() in MESH_SUFFIXES)


def _source_of(root: str, relative: Path, path: Path) -> Source:
    parts = relative.parts
    source = Source(f"{root}/{relative.as_posix()}", path, relative.stem, parts[-2] if len(parts) > 1 else "")
    if relative.stem == "model_normalized" and len(parts) >= 3:
        synset = parts[-4] if len(parts) >= 4 else root
        return replace(source, name=parts[-3], category=SHAPENET_SYNSETS.get(synset, synset), frame=("+y", "-z"))
    if relative.suffix.lower() == ".off" and len(parts) >= 2 and parts[-2] in ("train", "test"):
        return replace(source, category=parts[-3] if len(parts) >= 3 else root, frame=("+z", "-y"))
    if "glbs" in (root, *parts[:-1]) and relative.suffix.lower() == ".glb":
        return replace(source, category="")
    return source


SHAPENET_SYNSETS = {
    "02691156": "airplane", "02747177": "trash bin", "02773838": "bag", "02801938": "basket", "02808440": "bathtub",
    "02818832": "bed", "02828884": "bench", "02843684": "birdhouse", "02871439": "bookshelf", "02876657": "bottle",
    "02880940": "bowl", "02924116": "bus", "02933112": "cabinet", "02942699": "camera", "02946921": "can",
    "02954340": "cap", "02958343": "car", "02992529": "mobile phone", "03001627": "chair", "03046257": "clock",
    "03085013": "keyboard", "03207941": "dishwasher", "03211117": "display", "03261776": "earphone",
    "03325088": "faucet", "03337140": "file cabinet", "03467517": "guitar", "03513137": "helmet", "03593526": "jar",
    "03624134": "knife", "03636649": "lamp", "03642806": "laptop", "03691459": "loudspeaker", "03710193": "mailbox",
    "03759954": "microphone", "03761084": "microwave", "03790512": "motorbike", "03797390": "mug", "03928116": "piano",
    "03938244": "pillow", "03948459": "pistol", "03991062": "flowerpot", "04004475": "printer",
    "04074963": "remote control", "04090263": "rifle", "04099429": "rocket", "04225987": "skateboard",
    "04256520": "sofa", "04330267": "stove", "04379243": "table", "04401088": "telephone", "04460130": "tower",
    "04468005": "train", "04530566": "watercraft", "04554684": "washing machine",
}  # fmt: skip
