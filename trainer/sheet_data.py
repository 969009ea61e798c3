"""Cached view sheets (prepare/sheet_cache.py), read sample by sample; and cached prompts.

What a big text encoder makes of a prompt is several megabytes (512 tokens of 7680 bfloat16 numbers for FLUX.2
klein-4B: 7.9 MB), so prompts are kept once each, in files of PROMPTS_PER_FILE beside ``text.json``:

| array | shape | meaning |
|---|---|---|
| words | (N, L, D) bfloat16 | embeddings of N prompts, padding included: transformers read it too |
| pooled | (N, E) bfloat16 | of CLIP, for FLUX.1 alone |

A further run adds what is missing; a run that was stopped loses the file under way.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from trainer.data import LENT_OBJECTS, lent_sentence
from trainer.parallel import say
from trainer.prepare.shards import _write, remove_leftovers, write_json
from trainer.prepare.sheet_cache import INDEX, _vae_hash
from triptych.errors import TriptychError

TEXT_INDEX = "text.json"
TEXT_FORMAT = 1
PROMPTS_PER_FILE = 64
EMBEDDED_AT_A_TIME = 8  # on a CPU


@dataclass(frozen=True)
class CachedSheet:
    """target (C, H, W) and references (V, C, P, P) float32, normalised latents; said: what the JSON holds of it."""

    target: torch.Tensor
    references: torch.Tensor
    said: dict[str, Any]


class SheetData:
    """One split of several caches, one after the other; ``keep`` leaves out samples of which it says no. Raises
    TriptychError for what is no finished cache, and, when ``needed``, where no sheet is left."""

    def __init__(
        self,
        folders: Sequence[str | Path],
        split: str = "train",
        keep: Callable[[dict[str, Any]], bool] | None = None,
        *,
        needed: bool = True,
    ) -> None:
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
                    rows = [row for row, said in enumerate(samples) if keep is None or keep(said)]
                    self.said += [samples[row] for row in rows]
                    self._places += [(str(Path(folder) / f"{shard}.safetensors"), row) for row in rows]
        if needed and not self._places:
            raise TriptychError(
                f"{', '.join(map(str, folders))} hold no sheets of the split {split!r}: cache some more"
            )

    def sha256(self) -> str:
        """Of the caches' indices: another one where the sheets are of other objects, options or autoencoders."""
        return hashlib.sha256(json.dumps(self.indices, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> CachedSheet:
        path, row = self._places[index]
        handle, ends = _open(path)
        begin = int(ends[row - 1]) if row else 0
        target = handle.get_slice("target")[row].float()
        references = handle.get_slice("references")[begin : int(ends[row])].float()
        return CachedSheet(target, references, self.said[index])

    def first_objects(self, count: int) -> None:
        """Leaves one sheet each of the first ``count`` objects, one that shows the front alone where there is any."""
        order = sorted(range(len(self)), key=lambda place: self.said[place]["given"] != ["front"])
        of_object: dict[str, int] = {}
        for place in order:
            of_object.setdefault(self.said[place]["key"], place)
        kept = list(of_object.values())[:count]
        self.said, self._places = [self.said[i] for i in kept], [self._places[i] for i in kept]


def held_out_sheets(
    folders: Sequence[str | Path],
    keep: Callable[[dict[str, Any]], bool] | None = None,
    report: Callable[[str], None] = say,
) -> SheetData:
    """The validation sheets of caches; where there are none, as of a small data set, a few of the training sheets,
    which are trained on all the same: that is reported."""
    found = SheetData(folders, "validation", keep, needed=False)
    if not len(found):
        found = SheetData(folders, "train", keep)
        found.first_objects(LENT_OBJECTS)
        report(lent_sentence(folders, len(found)))
    return found


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
    return {name: value.get(name) for name in ("panel", "background", "mirrored")} if key == "options" else value


@lru_cache(maxsize=512)
def _open(path: str) -> tuple[Any, torch.Tensor]:
    handle = safe_open(path, framework="pt")
    return handle, handle.get_tensor("ends")


def same_autoencoder(data: SheetData, model: Path) -> None:
    """Raises TriptychError when the sheets were encoded by another autoencoder than the one in ``model``/vae."""
    if data.indices[0]["vae"] != _vae_hash(model):
        raise TriptychError(
            f"the sheets were encoded by another autoencoder than that of {model}: run `python -m trainer sheets` with "
            "--model of the base"
        )


class TextCache:
    """Cached prompts by their text. Raises TriptychError for another architecture or length, and for a prompt that is
    not there."""

    def __init__(self, folder: Path, architecture: str, tokens: int) -> None:
        self.folder = folder
        index = _text_index(folder)
        if index is None:
            raise TriptychError(f"{folder / TEXT_INDEX} is missing: run `python -m trainer sheets ... --text` first")
        _check_text(folder, index, architecture, tokens)
        self.places: dict[str, list[Any]] = index["prompts"]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, prompt: str) -> dict[str, torch.Tensor]:
        """words (L, D), and pooled (E,) of FLUX.1, bfloat16."""
        if prompt not in self.places:
            raise TriptychError(
                f"{self.folder} lacks the prompt {prompt[:80]!r}: run `python -m trainer sheets ... --text` again, "
                "with the template of this run"
            )
        name, row = self.places[prompt]
        try:
            handle = _open_text(str(self.folder / name))
            return {key: handle.get_slice(key)[row] for key in handle.keys()}  # noqa: SIM118  (safe_open is no dict)
        except (OSError, SafetensorError) as error:
            raise TriptychError(f"{self.folder / name} is not a whole file ({error}): cache the text again") from error


def cache_text(
    folder: Path,
    prompts: Sequence[str],
    embed: Callable[[list[str]], dict[str, torch.Tensor]],
    *,
    architecture: str,
    tokens: int,
    at_a_time: int = EMBEDDED_AT_A_TIME,
) -> int:
    """Writes the embeddings of the prompts that ``folder`` lacks; their number.

    embed: prompts -> words (B, L, D) and perhaps pooled (B, E), called with at_a_time of them or fewer. Raises
    TriptychError for a cache of another architecture or length, and when the disk has too little room for all that is
    missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    fresh: dict[str, Any] = {"format": TEXT_FORMAT, "architecture": architecture, "tokens": tokens, "prompts": {}}
    index = _text_index(folder) or fresh
    _check_text(folder, index, architecture, tokens)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in index["prompts"]]
    number = len({file for file, _ in index["prompts"].values()})
    with tqdm(total=len(missing), unit="prompt", desc="text") as bar:
        for start in range(0, len(missing), PROMPTS_PER_FILE):
            part = missing[start : start + PROMPTS_PER_FILE]
            arrays = _embedded(part, embed, at_a_time)
            size = sum(array.nbytes for array in arrays.values()) / len(part)
            _check_room(folder, size * (len(missing) - start))
            name = f"text_{number:04d}.safetensors"
            _write(folder / name, lambda temporary, arrays=arrays: save_file(arrays, str(temporary)))  # type: ignore[misc]
            index["prompts"] |= {prompt: [name, row] for row, prompt in enumerate(part)}
            write_json(folder / TEXT_INDEX, index)
            number += 1
            bar.update(len(part))
    return len(missing)


def _embedded(
    prompts: list[str], embed: Callable[[list[str]], dict[str, torch.Tensor]], step: int
) -> dict[str, torch.Tensor]:
    made = [embed(prompts[start : start + step]) for start in range(0, len(prompts), step)]
    return {key: torch.cat([one[key].to("cpu", torch.bfloat16) for one in made]).contiguous() for key in made[0]}


def _check_room(folder: Path, needed: float) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TriptychError(
            f"the prompts' embeddings take {needed / 1e9:.1f} GB more, {folder} has {free / 1e9:.1f} GB free: choose "
            "another place, or fewer text tokens"
        )


def _text_index(folder: Path) -> dict[str, Any] | None:
    path = folder / TEXT_INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = {key: index[key] for key in ("format", "architecture", "tokens", "prompts")}
    except (ValueError, KeyError, TypeError) as error:
        raise TriptychError(f"{path} is damaged ({error}): remove the folder and cache the text again") from error
    if found["format"] != TEXT_FORMAT:
        raise TriptychError(f"{path} has format {found['format']}, {TEXT_FORMAT} is known: cache the text again")
    return found


def _check_text(folder: Path, index: dict[str, Any], architecture: str, tokens: int) -> None:
    have = index["architecture"]
    both = {"flux1-kontext", "flux1-dev"}  # one pair of text encoders
    if have != architecture and {have, architecture} != both:
        raise TriptychError(f"{folder} holds text for {have}, {architecture} is needed: cache it in another folder")
    if index["tokens"] != tokens:
        raise TriptychError(
            f"{folder} holds text of {index['tokens']} tokens, {tokens} are needed: cache it in another folder"
        )


@lru_cache(maxsize=512)
def _open_text(path: str) -> Any:
    return safe_open(path, framework="pt")
