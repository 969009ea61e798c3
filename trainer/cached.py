"""Cached training data of the published shape: latents and image tokens of each object, encoded once.

A folder with ``index.json`` (format, tokens, channels, records) and one safetensors file an object in ``objects/``:

| array | shape | meaning |
|---|---|---|
| conditions | (V, M, C) float16 | an image encoder's tokens of V views (published: DINOv2, 1374 x 1024) |
| structure | (8, 16, 16, 16) float32 | latent of the published structure encoder, mean of the posterior |
| coords, latents | (N, 3) uint8, (N, 8) float32 | structured latent, not normalised; absent without a second stage |
| images | (V, 4, S, S) uint8 | the views themselves, straight RGBA; absent unless cameras are known |
| azimuths | (V,) float32 | degrees, of the rig's orthographic cameras |

Latents are in the published frame (+Z up, front -Y). A view is read alone, so 24 of them cost no more than one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.checkpoint import write_text_atomically
from trainer.data import PreparedData, relight
from trainer.order import stream_seed
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG
from triptych.models.structure_vae import SparseStructureEncoder

FORMAT = 1
INDEX = "index.json"
SURFACE = 0.87  # voxels: half a voxel's diagonal, so about the voxels that a surface touches
ENCODER_SIZE = 518  # pixels of a picture for the published image encoder


@dataclass(frozen=True)
class Record:
    """One object. voxels: of its structured latent, 0 without one. posed: whether pictures and cameras are there."""

    key: str
    split: str
    views: int
    voxels: int = 0
    posed: bool = False


class CachedData:
    """One split of a cached folder. needs: "structure", "latents" or "images"; objects without it are left out.

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
        except OSError as error:
            raise TriptychError(f"{path} is not readable ({error}): cache latents and conditions first") from error
        except (ValueError, KeyError, TypeError) as error:
            raise TriptychError(f"{path} is damaged ({error}): cache the data again") from error
        has: dict[str, Callable[[Record], bool]] = {
            "structure": lambda record: True,
            "latents": lambda record: record.voxels > 0,
            "images": lambda record: record.posed,
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


def write_object(folder: Path, key: str, split: str, **arrays: Tensor) -> Record:
    """Writes one object's arrays, as the table above has them; its record."""
    path = folder / "objects" / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"conditions": torch.float16, "coords": torch.uint8, "images": torch.uint8}
    temporary = path.with_suffix(".writing")
    save_file({n: t.detach().cpu().to(kinds.get(n, torch.float32)).contiguous() for n, t in arrays.items()}, temporary)
    temporary.replace(path)
    voxels = len(arrays["latents"]) if "latents" in arrays else 0
    return Record(key, split, len(arrays["conditions"]), voxels, "images" in arrays)


def write_index(folder: Path, records: list[Record], tokens: int, channels: int) -> None:
    """Writes the index, last: until then the folder is no cache."""
    index = {"format": FORMAT, "tokens": tokens, "channels": channels, "records": [asdict(r) for r in records]}
    write_text_atomically(folder / INDEX, json.dumps(index) + "\n")


# ---- from a prepared folder


def published_volume(volume: np.ndarray) -> np.ndarray:
    """A volume indexed [x, y, z] of our frame (+Y up, front +Z) in the published one (+Z up, front -Y)."""
    return volume.transpose(0, 2, 1)[:, ::-1]


def cache_prepared(
    data: str | Path,
    out: Path,
    encoder: SparseStructureEncoder,
    tokens_of: Callable[[Tensor], Tensor],
    *,
    image_size: int = 256,
    encoder_size: int = ENCODER_SIZE,
    limit: int | None = None,
    device: torch.device | None = None,
) -> int:
    """Caches structure latents, pictures and tokens of a prepared folder; the number of objects.

    encoder: the published structure encoder. tokens_of: (V, 3, encoder_size, encoder_size) sRGB 0-1 on black ->
    (V, M, C), such as an ImageEncoder. Each object has its four views under one light, drawn from its number. Latents
    are of the voxels within SURFACE of the prepared surface. Structured latents are not made here.
    """
    device = device or torch.device("cpu")
    records: list[Record] = []
    shape = (0, 0)
    for split in ("train", "validation"):
        for number, key, item in _prepared(data, split, limit):
            band = float(item.pop("band"))
            near = np.abs(item["sdf"].astype(np.float32)) * (band / 127) < SURFACE
            solid = torch.from_numpy(published_volume(near).astype(np.float32))[None, None].to(device)
            pictures = relight(item["albedo"], item["normal"], np.random.default_rng(stream_seed(0, split, number)))
            black = (pictures[:, :3] * pictures[:, 3:]).to(device)
            with torch.no_grad():
                found = tokens_of(_resized(black, encoder_size)).float()
                latent = encoder(solid)[0]
            shape = (found.shape[1], found.shape[2])
            images = (_resized(pictures, image_size).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
            azimuths = torch.tensor(VIEW_AZIMUTHS_DEG)
            records.append(
                write_object(out, key, split, conditions=found, structure=latent, images=images, azimuths=azimuths)
            )
    write_index(out, records, *shape)
    return len(records)


def _prepared(data: str | Path, split: str, limit: int | None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    prepared = PreparedData(data, split)
    for number in range(min(len(prepared), limit or len(prepared))):
        shard, row, _ = prepared.rows[number]
        yield number, f"{shard}_{row}", prepared[number] | {"band": prepared.options["sdf_band"]}


def _resized(pictures: Tensor, size: int) -> Tensor:
    if pictures.shape[-1] == size:
        return pictures
    return F.interpolate(pictures, (size, size), mode="bilinear", antialias=True, align_corners=False)
