"""Finding a Flux views model: the embedded one, a folder, or a Hugging Face repository; its files checked.

Of a repository only what the diffusers layout names is fetched, never the single files that publishers put beside it
for other programs. A revision is pinned to its commit, and what was fetched opens without a network (`bundles.hub`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundles.bundle import EMBEDDED
from ..bundles.hub import Cancel, HubFolder, Progress
from ..errors import TriptychError
from .card import CARD, MODEL_INDEX, ViewsCard, read_card, small_json, verify_files

EMBEDDED_FOLDER = Path(__file__).resolve().parents[2] / "weights" / EMBEDDED / "flux"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_MAX_INDEX_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelPlace:
    """folder: of the model, all of its files here and checked. card: its views.json, None of a plain diffusers folder.
    title: what to call it in messages."""

    folder: Path
    title: str
    card: ViewsCard | None


def find_model(
    source: str | Path,
    *,
    near: Path | None = None,
    models: Sequence[Path] = (),
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> ModelPlace:
    """The model that ``source`` names: "triptych-tiny", a folder, or ``owner/name`` with an optional ``@revision``.

    A folder holds views.json, or model_index.json, or a folder ``flux`` that does. near: where relative folders may
    also start. models: folders of models, in which a repository without a revision may lie as ``owner/name`` or as
    ``name``; only what is in neither is fetched. progress("fetch", share of the bytes) and cancel() are called while a
    repository is fetched, cancel also between files that are checked: Cancelled is raised when it returns True, and a
    later call goes on from there.
    Raises TriptychError when nothing is found, or what is found fails its card's hashes.
    """
    name = str(source)
    named = [Path(source).expanduser(), *([near / name] if near else [])]
    for place in (*named, *_local_copies(name, models)):
        for folder in (place, place / "flux"):
            if (folder / CARD).is_file() or (folder / MODEL_INDEX).is_file():
                return _checked(folder, str(folder), cancel)
        if place in named and place.is_dir():
            raise TriptychError(f"{place} is no Flux model: it has neither {CARD} nor {MODEL_INDEX}; choose another")
    if name == EMBEDDED:
        if not (EMBEDDED_FOLDER / CARD).is_file():
            raise TriptychError(
                f"the embedded Flux model is missing at {EMBEDDED_FOLDER}: get the whole repository again, or give "
                "the folder or repository of another model"
            )
        return _checked(EMBEDDED_FOLDER, EMBEDDED, cancel)
    if _REPOSITORY.fullmatch(name) and not name.startswith("."):
        return _fetched(name, progress, cancel)
    raise TriptychError(
        f"no Flux model {name!r} found: give {EMBEDDED}, a folder in diffusers layout, or a repository owner/name"
    )


def _local_copies(name: str, models: Sequence[Path]) -> list[Path]:
    """Where a repository may lie among folders of models; nobody knows which revision such a folder is."""
    if not _REPOSITORY.fullmatch(name) or name.startswith(".") or "@" in name:
        return []
    return [folder / place for folder in models for place in (name, name.split("/")[1])]


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises TriptychError when it is missing or damaged."""
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise TriptychError(f"{folder} is not in diffusers layout: it has no {MODEL_INDEX}; choose another folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object. Raises TriptychError when it is damaged, no object, or not small."""
    return small_json(path, _MAX_INDEX_BYTES, "an index")


def _checked(folder: Path, title: str, cancel: Cancel | None) -> ModelPlace:
    if not (folder / CARD).is_file():
        return ModelPlace(folder, title, None)
    card = read_card(folder)
    verify_files(folder, card, cancel)
    return ModelPlace(folder, title, card)


def _fetched(name: str, progress: Progress | None, cancel: Cancel | None) -> ModelPlace:
    repository, _, revision = name.partition("@")
    remote = HubFolder(repository, revision or None)
    names = remote.names()
    if CARD in names:
        folder = remote.fetch(CARD).parent
        wanted = sorted(read_card(folder).files)
    elif MODEL_INDEX in names:
        folder = remote.fetch(MODEL_INDEX).parent
        parts = {key for key, value in read_index(folder).items() if isinstance(value, list) and value[:1] != [None]}
        wanted = [file for file in names if _is_wanted(file, parts)]
    else:
        raise TriptychError(f"{remote.title} has neither {CARD} nor {MODEL_INDEX}: choose a repository of that layout")
    remote.fetch_all(wanted, progress, cancel)
    return _checked(folder, remote.title, cancel)


def _is_wanted(file: str, parts: set[str]) -> bool:
    """Whether a repository's file belongs to a part: configs, tokenizers, and weights of full precision."""
    part, _, name = file.partition("/")
    if part not in parts or "/" in name:
        return False
    if ".safetensors" in name:
        return _WEIGHTS.fullmatch(name) is not None
    return name.endswith((".json", ".txt", ".jinja", ".model"))
