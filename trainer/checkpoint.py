"""Checkpoints that are either complete or absent.

A checkpoint is the folder ``step_0001234``: safetensors, JSON, and a manifest with the sha256 of every other file. It
is written under a temporary name beside its place, every file and the folder are flushed to the disk, and one rename
makes it visible. Reading checks the manifest, so a damaged folder is recognised, reported and passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from triptych.errors import TriptychError

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{7,})$")
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk whose hashes agree."""

    path: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of ``name``.safetensors on the CPU."""
        return load_file(self.path / f"{name}.safetensors")

    def json(self, name: str) -> Any:
        return json.loads((self.path / f"{name}.json").read_text(encoding="utf-8"))


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:07d}"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, Any]
) -> Path:
    """Writes ``tensors[name]`` as name.safetensors and ``documents[name]`` as name.json, of which one is "state".

    Raises TriptychError when the disk refuses (full, read-only); nothing half-written stays behind then, and older
    checkpoints are untouched.
    """
    final = checkpoint_path(folder, step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
        temporary.mkdir()
        for name, group in tensors.items():
            on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
            save_file(on_cpu, temporary / f"{name}.safetensors")
        for name, document in documents.items():
            (temporary / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        files = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, "step": step, "sha256": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        _put_in_place(temporary, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise TriptychError(
            f"could not save the checkpoint of step {step} in {folder} ({error}): free some space, then resume the run"
        ) from error
    return final


def complete_checkpoints(folder: Path, report: Callable[[str], None] = print) -> Iterator[Checkpoint]:
    """The complete checkpoints of a folder, newest first; a damaged one is reported in one line and passed over."""
    for step in sorted(_steps(folder), reverse=True):
        path = checkpoint_path(folder, step)
        try:
            yield read_checkpoint(path)
        except TriptychError as error:
            report(f"passing over a damaged checkpoint: {error}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Checks the manifest and every hash; TriptychError names the first thing that is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, expected = manifest["format"], dict(manifest["sha256"])
        if version != FORMAT:
            raise TriptychError(f"{path}: checkpoint format {version!r} is not {FORMAT}: use the trainer that wrote it")
        for name, digest in expected.items():
            if _sha256(path / name) != digest:
                raise TriptychError(f"{path / name}: the content does not match the manifest's sha256")
        if "state.json" not in expected:
            raise TriptychError(f"{path}: the manifest lists no state.json")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Checkpoint(path, int(manifest["step"]), state)
    except OSError as error:
        raise TriptychError(f"{path}: {error.strerror or error} ({Path(error.filename or path).name})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, TriptychError):
            raise
        raise TriptychError(f"{path}: {MANIFEST} or state.json is not readable ({error})") from error


def find_checkpoint(folder: Path, which: str = "last", report: Callable[[str], None] = print) -> Checkpoint:
    """The newest complete checkpoint, the best validated one, or a step number; TriptychError when there is none."""
    if which.isdigit():
        return read_checkpoint(checkpoint_path(folder, int(which)))
    if which not in ("last", "best"):
        raise TriptychError(f"checkpoint {which!r}: expected last, best or a step number")
    newest = next(complete_checkpoints(folder, report), None)
    if newest is None:
        raise TriptychError(f"{folder}: there is no complete checkpoint: train the run first")
    best = newest.state.get("best_step") if which == "best" else None
    return newest if best in (None, newest.step) else read_checkpoint(checkpoint_path(folder, best))


def rotate(folder: Path, keep: int, protect: int | None) -> None:
    """Removes all but the ``keep`` newest checkpoints and the one of step ``protect``."""
    for step in sorted(_steps(folder))[:-keep]:
        if step != protect:
            path = checkpoint_path(folder, step)
            aside = folder / f"{_TEMPORARY}removed-{path.name}"
            os.replace(path, aside)  # so that a kill in the middle leaves no damaged checkpoint
            shutil.rmtree(aside)


def remove_unfinished(folder: Path) -> None:
    """Removes what an interrupted save or rotation left; only the run's one writer may call it."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights to start from: a .safetensors file, a checkpoint folder, or a run folder (its newest one); EMA first."""
    try:
        if path.is_file():
            return load_file(path)
        folder = path / "checkpoints"
        checkpoint = find_checkpoint(folder) if folder.is_dir() else read_checkpoint(path)
        return checkpoint.tensors("model") | checkpoint.tensors("ema")
    except (OSError, SafetensorError) as error:
        raise TriptychError(f"{path}: no weights could be read from it ({error})") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a small file in one step, flushed to the disk."""
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match.group(1)) for path in folder.iterdir() if (match := _NAME.match(path.name)) and path.is_dir()]


def _put_in_place(temporary: Path, final: Path) -> None:
    if final.exists():  # damaged, or left by a run that was resumed from an older checkpoint
        aside = final.with_name(f"{_TEMPORARY}replaced-{final.name}")
        os.replace(final, aside)
        os.replace(temporary, final)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, final)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    # Windows can neither open a folder nor sync a read-only handle; there the rename alone has to do.
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        with contextlib.suppress(OSError):
            os.close(handle)
