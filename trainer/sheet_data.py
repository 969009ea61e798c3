"""Cached view sheets (prepare/sheet_cache.py), read sample by sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trainer.prepare.sheet_cache import INDEX
from triptych.errors import TriptychError


@dataclass(frozen=True)
class CachedSheet:
    """target (C, H, W) and references (V, C, P, P) float32, normalised latents; said: what the JSON holds of it."""

    target: torch.Tensor
    references: torch.Tensor
    said: dict[str, Any]


class SheetData:
    """One split of several caches, one after the other. Raises TriptychError for what is no finished cache."""

    def __init__(self, folders: Sequence[str | Path], split: str = "train") -> None:
        self.indices = [_index(Path(folder)) for folder in folders]
        for key in ("vae", "options"):
            for folder, index in zip(folders, self.indices, strict=True):
                if _common(index, key) != _common(self.indices[0], key):
                    raise TriptychError(
                        f"{folder} was made with another {key} than {folders[0]}: make both with one model and panel"
                    )
        self.options: dict[str, Any] = self.indices[0]["options"]
        self.said: list[dict[str, Any]] = []
        self._places: list[tuple[str, int]] = []
        for folder, index in zip(folders, self.indices, strict=True):
            for shard in index["shards"]:
                if shard.startswith(f"{split}_"):
                    samples = json.loads((Path(folder) / f"{shard}.json").read_text(encoding="utf-8"))
                    self.said += samples
                    self._places += [(str(Path(folder) / f"{shard}.safetensors"), row) for row in range(len(samples))]
        if not self._places:
            raise TriptychError(
                f"{', '.join(map(str, folders))} hold no sheets of the split {split!r}: cache some more"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> CachedSheet:
        path, row = self._places[index]
        handle, ends = _open(path)
        begin = int(ends[row - 1]) if row else 0
        target = handle.get_slice("target")[row].float()
        references = handle.get_slice("references")[begin : int(ends[row])].float()
        return CachedSheet(target, references, self.said[index])


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise TriptychError(
            f"{path} is missing: run `python -m trainer sheets DATA --model FOLDER --out {folder}` first"
        )
    index = json.loads(path.read_text(encoding="utf-8"))
    if "shards" not in index:
        raise TriptychError(f"{folder} is not finished: run the same `python -m trainer sheets` command again")
    return index


def _common(index: dict[str, Any], key: str) -> Any:
    value = index[key]
    return {name: value[name] for name in ("panel", "background")} if key == "options" else value


@lru_cache(maxsize=512)
def _open(path: str) -> tuple[Any, torch.Tensor]:
    handle = safe_open(path, framework="pt")
    return handle, handle.get_tensor("ends")
