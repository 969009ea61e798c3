"""Cached training data of the published shape: latents and image tokens of each object, encoded once.

`python -m trainer latents` (trainer/prepare/latents.py) makes it. A folder with ``index.json`` (format, tokens,
channels, records, the latents' mean and deviation, how it was made) and one safetensors file an object in ``objects/``:

| array | shape | meaning |
|---|---|---|
| conditions | (V, M, C) float16 | an image encoder's tokens of V views (published: DINOv2, 1374 x 1024) |
| structure | (8, 16, 16, 16) float32 | latent of the structure encoder, mean of the posterior; absent without one |
| coords, latents | (N, 3) uint8, (N, 8) float32 | structured latent, not normalised; absent without a second stage |
| images | (P, 4, S, S) uint8 | the first P views themselves, straight RGBA; absent unless cameras are known |
| azimuths | (P,) float32 | degrees, of the rig's orthographic cameras |

Latents of published encoders are in the published frame (+Z up, front -Y), those of a bundle that was trained here in
ours. A view is read alone, so 24 of them cost no more than one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import write_text_atomically
from trainer.prepare.shards import _write
from triptych.errors import TriptychError

FORMAT = 1
INDEX = "index.json"
SURFACE = 0.87  # voxels: half a voxel's diagonal, so about the voxels that a surface touches
ENCODER_SIZE = 518  # pixels of a picture for the published image encoder
STATISTICS_OBJECTS = 4096  # of which the latents' mean and deviation are taken, evenly spread
_KINDS = {"conditions": torch.float16, "coords": torch.uint8, "images": torch.uint8}


@dataclass(frozen=True)
class Record:
    """One object. views: of its conditions. voxels: of its structured latent, 0 without one. posed: whether pictures
    and cameras are there. structure: whether a structure latent is."""

    key: str
    split: str
    views: int
    voxels: int = 0
    posed: bool = False
    structure: bool = True


class CachedData:
    """One split of a cached folder. needs: "structure", "latents" or "images" (with a structure); objects without it
    are left out. statistics: mean and deviation (C,) of the structured latents, None where the folder has none.

    Raises TriptychError where the folder is no such cache or has nothing of this kind.
    """

    def __init__(self, folder: str | Path, split: str, needs: str) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise TriptychError(f"{path} has format {index['format']}, {FORMAT} is known: cache the data again")
            records = [Record(**record) for record in index["records"]]
            self.tokens, self.channels = int(index["tokens"]), int(index["channels"])
            found = index.get("slat_normalization")
            self.statistics = (torch.tensor(found["mean"]), torch.tensor(found["std"])) if found else None
        except OSError as error:
            raise TriptychError(f"{path} is not readable ({error}): run `python -m trainer latents` first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TriptychError(f"{path} is damaged ({error}): cache the data again") from error
        has: dict[str, Callable[[Record], bool]] = {
            "structure": lambda record: record.structure,
            "latents": lambda record: record.voxels > 0,
            "images": lambda record: record.posed and record.structure,
        }
        self.records = [record for record in records if record.split == split and has[needs](record)]
        if not self.records:
            raise TriptychError(f"{folder} has no objects with {needs} in the split {split!r}: cache more of them")

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int, *names: str) -> dict[str, Tensor]:
        """Whole arrays of an object."""
        with self._open(index) as handle:
            return {name: handle.get_tensor(name) for name in names}

    def views(self, index: int, name: str, chosen: list[int]) -> Tensor:
        """Some views of ``conditions``, ``images`` or ``azimuths``: (len(chosen), ...)."""
        with self._open(index) as handle:
            part = handle.get_slice(name)
            return torch.cat([part[view : view + 1] for view in chosen])

    def _open(self, index: int) -> Any:
        path = self.folder / "objects" / f"{self.records[index].key}.safetensors"
        try:
            return safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise TriptychError(f"{path} is not a whole file ({error}): cache the data again") from error


def write_object(folder: Path, key: str, split: str, identity: str = "", **arrays: Tensor) -> Record:
    """Writes one object's arrays, as the table above has them, whole or not at all; its record.

    identity: of how they were made, see ``existing_record``. Raises TriptychError for a full disk.
    """
    path = _path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {n: t.detach().cpu().to(_KINDS.get(n, torch.float32)).contiguous() for n, t in arrays.items()}
    _write(path, lambda temporary: save_file(stored, temporary, metadata={"identity": identity}))
    return _record(key, split, {name: tuple(array.shape) for name, array in stored.items()})


def existing_record(folder: Path, key: str, split: str, identity: str) -> Record | None:
    """The record of an object that an earlier call wrote whole and in the same way, else None."""
    path = _path(folder, key)
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as handle:
            if (handle.metadata() or {}).get("identity") != identity:
                return None
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return _record(key, split, shapes)


def _path(folder: Path, key: str) -> Path:
    return folder / "objects" / f"{key}.safetensors"


def _record(key: str, split: str, shapes: dict[str, tuple[int, ...]]) -> Record:
    voxels = shapes["latents"][0] if "latents" in shapes else 0
    return Record(key, split, shapes["conditions"][0], voxels, "images" in shapes, "structure" in shapes)


def write_index(folder: Path, records: list[Record], **facts: Any) -> None:
    """Writes the index, last: until then the folder is no cache. facts: how it was made, kept beside.

    Raises TriptychError where the objects' tokens differ in shape.
    """
    shapes = {tuple(_shape(folder, record.key, "conditions")[1:]) for record in records}
    if len(shapes) != 1:
        raise TriptychError(f"the objects in {folder} have tokens of {len(shapes)} shapes: cache them in one way")
    tokens, channels = shapes.pop()
    index: dict[str, Any] = {"format": FORMAT, "tokens": tokens, "channels": channels}
    if (found := latent_statistics(folder, records)) is not None:
        index["slat_normalization"] = {"mean": found[0].tolist(), "std": found[1].tolist()}
    index |= facts | {"records": [asdict(r) for r in records]}
    write_text_atomically(folder / INDEX, json.dumps(index) + "\n")


def _shape(folder: Path, key: str, name: str) -> list[int]:
    with safe_open(str(_path(folder, key)), framework="pt") as handle:
        return list(handle.get_slice(name).get_shape())


def latent_statistics(folder: Path, records: list[Record]) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation (C,) over the voxels of the training objects, of all or STATISTICS_OBJECTS of them;
    None without structured latents."""
    keys = [record.key for record in records if record.split == "train" and record.voxels]
    keys = keys[:: max(1, len(keys) // STATISTICS_OBJECTS)]
    total, squares, voxels = torch.zeros(()), torch.zeros(()), 0
    for key in keys:
        with safe_open(str(_path(folder, key)), framework="pt") as handle:
            z = handle.get_tensor("latents").double()
        total, squares, voxels = total + z.sum(dim=0), squares + z.square().sum(dim=0), voxels + len(z)
    if not voxels:
        return None
    mean = total / voxels
    return mean.float(), (squares / voxels - mean**2).clamp_min(1e-12).sqrt().float()


# ---- the published frame


def published_coords(coords: np.ndarray, resolution: int) -> np.ndarray:
    """Voxels (N, 3) of our frame (+Y up, front +Z) in the published one (+Z up, front -Y)."""
    return np.stack([coords[:, 0], resolution - 1 - coords[:, 2], coords[:, 1]], axis=1)


def published_volume(volume: np.ndarray) -> np.ndarray:
    """A volume indexed [x, y, z] of our frame in the published one."""
    return volume.transpose(0, 2, 1)[:, ::-1]
