"""What a first stage makes of the prepared objects: the fields that the second stage will really be given.

A flow that is trained on true structures alone never meets the errors of the stage before it. So the first stage is run
over the structured samples, each with a few sets of views under random light, and its settled field (smoothed, at its
level, cut by the silhouettes: what the pipeline does) is kept, one safetensors file a shard in ``predicted/``:

| array | shape | meaning |
|---|---|---|
| rows | (S,) int32 | row of each sample in the prepared shard |
| field | (S, K, R, R, R) int8 | signed field, positive inside, 127 = 2 voxels |
| views | (S, K, 4) bool | which of the rig's views the field was made from |

The first set has all four views, the others one to four at random.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from trainer.data import relight
from trainer.structured import StructuredData
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera, rig_cameras
from triptych.models.lifting import PosedViews
from triptych.models.slat_lifting import FIELD_BAND
from triptych.pipelines.reconstruct import networks, settled_field

from .shards import _is_whole, _write, write_json

FOLDER = "predicted"
FORMAT = 2
_RIG = rig_cameras(VIEW_AZIMUTHS_DEG)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, metavar="DATA", help="a prepared folder with second-stage arrays")
    parser.add_argument("--bundle", default=None, help="the first stage (default: the embedded bundle)")
    parser.add_argument("--sets", type=int, default=2, help="sets of views of each sample (default: 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(args: argparse.Namespace) -> int:
    count = predict(args.data, load_bundle(args.bundle), sets=args.sets, device=args.device)
    print(f"{count} samples predicted in {args.data / FOLDER}")
    return 0


def predict(data: Path, bundle: Bundle, *, sets: int = 2, device: str = "cpu", batch: int = 8) -> int:
    """Writes the predicted fields of every structured sample; finished shards of the same bundle are kept.

    Returns the number of samples. Raises TriptychError where the folder has no second-stage arrays, for a bundle that
    is no first stage, and for a full disk.
    """
    if sets < 1:
        raise TriptychError(f"--sets must be at least 1, got {sets}")
    flow, _ = networks(bundle)
    identity = hashlib.sha256(json.dumps([c.sha256 for c in bundle.manifest.components.values()]).encode()).hexdigest()
    shards: dict[str, list[tuple[StructuredData, int]]] = {}
    for split in ("train", "validation", "test"):
        try:
            part = StructuredData(data, split)
        except TriptychError:
            if split == "train":
                raise
            continue
        for index, (shard, _, _) in enumerate(part.rows):
            shards.setdefault(shard, []).append((part, index))
    out = data / FOLDER
    out.mkdir(exist_ok=True)
    flow.to(device)
    with tqdm(total=sum(map(len, shards.values())), unit="object", desc="predict", smoothing=0.1) as bar:
        for shard, places in sorted(shards.items()):
            rows = [part.prepared_row(index) for part, index in places]
            wanted = {"format": FORMAT, "bundle": identity, "sets": sets, "rows": rows}
            if not _is_done(out, shard, wanted):
                _write_shard(out, shard, wanted, places, bundle, sets, device, batch)
            bar.update(len(places))
    return sum(map(len, shards.values()))


def _is_done(out: Path, shard: str, wanted: dict[str, Any]) -> bool:
    try:
        report = json.loads((out / f"{shard}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return report == wanted and _is_whole(out / f"{shard}.safetensors")


def _write_shard(
    out: Path,
    shard: str,
    wanted: dict[str, Any],
    places: list[tuple[StructuredData, int]],
    bundle: Bundle,
    sets: int,
    device: str,
    batch: int,
) -> None:
    jobs = [(place, k) for place in range(len(places)) for k in range(sets)]
    resolution = places[0][0].resolution
    field = np.empty((len(places), sets, *[resolution] * 3), dtype=np.int8)
    views = np.zeros((len(places), sets, 4), dtype=bool)
    for first in range(0, len(jobs), batch):
        part = jobs[first : first + batch]
        pictures, chosen = zip(*[_draw(*places[place], k) for place, k in part], strict=True)
        for (place, k), found, seen in zip(part, fields_of(bundle, pictures, chosen, device), chosen, strict=True):
            field[place, k] = np.rint(found.clip(-FIELD_BAND, FIELD_BAND) * (127 / FIELD_BAND)).astype(np.int8)
            views[place, k, seen] = True
    arrays: dict[str, np.ndarray] = {
        "rows": np.array(wanted["rows"], dtype=np.int32),
        "field": field,
        "views": views,
    }
    _write(out / f"{shard}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(out / f"{shard}.json", wanted)


def _draw(part: StructuredData, index: int, number: int) -> tuple[torch.Tensor, list[int]]:
    """Pictures (V, 4, S, S) of one sample under a light of its own, and the views that they are."""
    item, (shard, place, _) = part.views(index), part.rows[index]
    seed = int.from_bytes(hashlib.sha256(f"{shard} {place} {number}".encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    count = 4 if number == 0 else int(generator.integers(1, 5))
    seen = sorted(generator.permutation(4)[:count].tolist())
    return relight(item["albedo"], item["normal"], generator, seen), seen


def fields_of(
    bundle: Bundle, pictures: tuple[torch.Tensor, ...], seen: tuple[list[int], ...], device: str
) -> list[np.ndarray]:
    """The settled fields (R, R, R) of several objects at once, one step from noise, one pose each."""
    flow, decoder = networks(bundle)
    cameras = tuple(_RIG[i] for views in seen for i in views)
    posed = PosedViews(torch.cat(pictures).to(device), cameras, tuple(map(len, seen)))
    noise = torch.randn(len(seen), flow.in_channels, *[flow.resolution] * 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16):
        noise = noise.to(device)
        velocity = flow(noise, torch.full((len(seen),), 1000.0, device=device), flow.condition(posed))
        raw = decoder(flow.denormalize(noise - velocity))[:, 0].float().cpu().numpy()
    return [
        _settled(field, bundle, images[:, 3], [_RIG[i] for i in views])
        for field, images, views in zip(raw, pictures, seen, strict=True)
    ]


def _settled(field: np.ndarray, bundle: Bundle, masks: torch.Tensor, cameras: list[Camera]) -> np.ndarray:
    """Brought to keep the outlines, but for objects so thin that the prepared pictures' outlines share no voxel."""
    try:
        return settled_field(field, bundle, masks, cameras)
    except TriptychError:
        return settled_field(field, bundle, None, cameras)


class PredictedFields:
    """The fields of a structured folder, by shard and row of the prepared data."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / FOLDER
        self.places: dict[tuple[str, int], int] = {}
        self.sets = 0
        for report in sorted(self.folder.glob("shard_*.json")):
            record = json.loads(report.read_text(encoding="utf-8"))
            self.sets = record["sets"]
            self.places |= {(report.stem, row): place for place, row in enumerate(record["rows"])}
        if not self.places:
            raise TriptychError(f"{folder} has no predicted fields: run `python -m trainer predict {folder}` first")

    def has(self, shard: str, row: int) -> bool:
        return (shard, row) in self.places

    def get(self, shard: str, row: int, number: int) -> tuple[np.ndarray, list[int]]:
        """The field (R, R, R) int8 of set ``number``, and which views it was made from."""
        place = self.places[shard, row]
        with safe_open(str(self.folder / f"{shard}.safetensors"), framework="numpy") as handle:
            views = handle.get_slice("views")[place, number]
            return handle.get_slice("field")[place, number], np.flatnonzero(views).tolist()
