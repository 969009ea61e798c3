"""Photographs of prepared objects: perspective renders around each view of the rig, as users' cameras make them.

A reference that is cut out of a rig view is orthographic and level, which no photograph is. Here every prepared sample
is rendered again from its source mesh, near each of its four views: a field of view of 15 to 50 degrees, the camera 15
degrees below to 30 above the level, up to 10 to either side. Colours and normals are kept, not light: `relight` draws
that anew for each training sample, and a recoloured sheet gets a recoloured photograph.

One file a prepared shard, ``photos/<shard>.safetensors`` in the prepared folder:

| array | shape | meaning |
|---|---|---|
| rows | (N,) int32 | row of each sample in the prepared shard |
| albedo | (N, 4, S, S, 4) uint8 | sRGB with straight alpha; front, left, back, right |
| normal | (N, 4, S, S, 3) uint8 | 0-255 for -1..1, in the world |
| cameras | (N, 4, 3) float32 | azimuth and elevation in degrees, field of view in degrees |

Cameras are a function of the object's key and the options, so a second run makes the same bytes. The object's bounding
sphere just fits into the frame; `photo_references` brings it to the frame by its own extent, as cutting out does.

Not covered: light that falls through or bounces, ground and shadows, and lenses.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from trainer.data import PreparedData, relight, symmetric_sample
from trainer.order import stream_seed
from triptych.errors import TriptychError
from triptych.geometry.cameras import FRAME_FILL, VIEW_AZIMUTHS_DEG, Camera
from triptych.geometry.mesh import Mesh
from triptych.render.views import render_views

from .build import _UNFORESEEN, _bytes
from .run import _alone, _cores
from .shards import _is_whole, _write, remove_leftovers, write_json
from .sheets import PLAIN, _box, _resampled, on_background
from .sources import OUR_FRAME, find_sources
from .structured import Item, ShardJob, mesh_of, over_shards, plan

FORMAT = 1
FOLDER = "photos"


@dataclass(frozen=True)
class PhotoOptions:
    """size: pixels of a photograph's side. fov_deg, elevation_deg: ranges. azimuth_deg: to either side of a view."""

    size: int = 128
    fov_deg: tuple[float, float] = (15.0, 50.0)
    elevation_deg: tuple[float, float] = (-15.0, 30.0)
    azimuth_deg: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 16 or not 0 < self.fov_deg[0] <= self.fov_deg[1] < 170:
            raise TriptychError(
                f"photographs need 16 pixels or more and a field of view in (0, 170) degrees, got {self.size} and "
                f"{self.fov_deg}"
            )


# ---- rendering


def photo_cameras(mesh: Mesh, options: PhotoOptions, generator: np.random.Generator) -> list[Camera]:
    """One perspective camera near each view of the rig, so far away that the mesh's bounding sphere fits."""
    reach = float(np.linalg.norm(mesh.vertices, axis=1).max())
    cameras = []
    for azimuth in VIEW_AZIMUTHS_DEG:
        fov = float(generator.uniform(*options.fov_deg))
        elevation = float(generator.uniform(*options.elevation_deg))
        aside = float(generator.uniform(-options.azimuth_deg, options.azimuth_deg))
        distance = reach / math.sin(math.radians(fov) / 2)
        cameras.append(Camera((azimuth + aside) % 360, elevation, distance, half_extent=None, fov_deg=fov))
    return cameras


def photograph(mesh: Mesh, options: PhotoOptions, seed: int) -> dict[str, np.ndarray]:
    """One sample's photographs: albedo (4, S, S, 4), normal (4, S, S, 3) uint8, cameras (4, 3) float32."""
    cameras = photo_cameras(mesh, options, np.random.default_rng(seed))
    with torch.inference_mode():
        views = render_views(mesh, cameras, options.size)
    if not (views.alpha.flatten(1) > 0).any(dim=1).all():
        raise TriptychError("one of its photographs is empty: the object has no width there")
    rgba = torch.cat([views.albedo, views.alpha], dim=1).permute(0, 2, 3, 1)
    facts = [[camera.azimuth_deg, camera.elevation_deg, camera.fov_deg] for camera in cameras]
    return {
        "albedo": _bytes(rgba),
        "normal": _bytes((views.normal.permute(0, 2, 3, 1) + 1) / 2),
        "cameras": np.array(facts, dtype=np.float32),
    }


def photograph_folder(
    data: Path,
    sources: Sequence[Path],
    options: PhotoOptions,
    *,
    workers: int = 0,
    index_split: Sequence[str] = ("train",),
) -> dict[str, int]:
    """Writes the photographs of every sample of a prepared folder; finished shards are kept.

    sources: the folders it was prepared from. Returns the numbers of samples, of skipped ones (each with its reason in
    the shard's JSON: also one whose file has changed since) and of objects without a source. Raises TriptychError: not
    a prepared folder, none of its objects among the sources, photographs of other options, a full disk.
    """
    jobs, absent = plan(data, find_sources(list(sources), tuple(index_split)), all_yaws=True)
    out = data / FOLDER
    out.mkdir(exist_ok=True)
    header = {"format": FORMAT, "options": json.loads(json.dumps(asdict(options)))}
    with _alone(out):
        remove_leftovers(out)
        _check_same(out / "options.json", header)
        todo = [job for job in jobs if not _is_done(out, job)]
        build = partial(_build_shard, out=out, options=options)
        with tqdm(total=sum(len(job.items) for job in todo), unit="sample", desc="photos", smoothing=0.1) as bar:
            for count in over_shards(build, todo, workers):
                bar.update(count)
    reports = [json.loads((out / f"{job.name}.json").read_text(encoding="utf-8")) for job in jobs]
    made = sum(len(report["rows"]) for report in reports)
    return {"samples": made, "skipped": sum(len(report["skipped"]) for report in reports), "absent": absent}


def _check_same(path: Path, header: dict[str, Any]) -> None:
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != header:
        raise TriptychError(f"{path.parent} holds photographs of other options: remove it, or use the same options")
    write_json(path, header)


def _wanted(job: ShardJob) -> list[list[Any]]:
    """What a shard is of; the axes of a file are said where they are not ours."""
    turns = (() if item.source.frame == OUR_FRAME else item.source.frame for item in job.items)
    return [[i.source.key, i.row, i.file_sha256, *turn] for i, turn in zip(job.items, turns, strict=True)]


def _is_done(out: Path, job: ShardJob) -> bool:
    try:
        report = json.loads((out / f"{job.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return report["wanted"] == _wanted(job) and (not report["rows"] or _is_whole(out / f"{job.name}.safetensors"))


def _build_shard(job: ShardJob, out: Path, options: PhotoOptions) -> int:
    samples: list[dict[str, np.ndarray]] = []
    rows: list[int] = []
    skipped: list[dict[str, Any]] = []
    for item in job.items:
        try:
            samples.append(photograph(mesh_of(item), options, _seed(item, options)))
            rows.append(item.row)
        except (TriptychError, OSError, *_UNFORESEEN) as error:
            skipped.append({"key": item.source.key, "row": item.row, "reason": f"{type(error).__name__}: {error}"})
    if samples:
        arrays = {key: np.ascontiguousarray(np.stack([s[key] for s in samples])) for key in samples[0]}
        arrays["rows"] = np.array(rows, dtype=np.int32)
        _write(out / f"{job.name}.safetensors", lambda temporary: save_file(arrays, str(temporary)))
    write_json(out / f"{job.name}.json", {"wanted": _wanted(job), "rows": rows, "skipped": skipped})
    return len(job.items)


def _seed(item: Item, options: PhotoOptions) -> int:
    return stream_seed(options.seed, f"photo/{item.source.key}", item.row)


# ---- reading


class Photos:
    """The photographs of a prepared folder, by shard and row. Raises TriptychError when it has none."""

    def __init__(self, data: str | Path) -> None:
        self.folder = Path(data) / FOLDER
        if not (self.folder / "options.json").is_file():
            raise TriptychError(f"{data} has no photographs: run `python -m trainer sheets` with --photos SOURCE")

    def get(self, shard: str, row: int) -> dict[str, np.ndarray] | None:
        """albedo, normal and cameras of a sample; None for one that could not be photographed."""
        path = self.folder / f"{shard}.safetensors"
        places = _places(str(path)) if path.is_file() else {}
        if row not in places:
            return None
        with safe_open(str(path), framework="numpy") as handle:
            return {key: handle.get_slice(key)[places[row]] for key in ("albedo", "normal", "cameras")}


@lru_cache(maxsize=256)
def _places(path: str) -> dict[int, int]:
    with safe_open(path, framework="numpy") as handle:
        return {int(row): place for place, row in enumerate(handle.get_tensor("rows"))}


def symmetric_photos(photos: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The photographs of the object under one of the eight symmetries, numbered as `symmetric_sample` does."""
    moved = symmetric_sample({**photos, "sdf": np.zeros((1, 1, 1), dtype=np.int8)}, number)
    cameras = np.roll(photos["cameras"], number % 4, axis=0).copy()
    cameras[:, 0] += 90 * (number % 4)
    if number >= 4:
        cameras = cameras[[0, 3, 2, 1]]
        cameras[:, 0] *= -1
    cameras[:, 0] %= 360
    return {"albedo": moved["albedo"], "normal": moved["normal"], "cameras": cameras}


def camera_rotations(cameras: np.ndarray) -> torch.Tensor:
    """(4, 3, 3) rows right, up, backward of cameras (4, 3)."""
    return torch.stack([Camera(float(azimuth), float(elevation)).rotation() for azimuth, elevation, _ in cameras])


# ---- references


def photo_references(
    photos: dict[str, np.ndarray],
    views: Sequence[int],
    generator: np.random.Generator,
    background: Sequence[float],
    *,
    jitter: float = 0.04,
) -> torch.Tensor:
    """Reference pictures of photographs under a random light: (V, 3, S, S) float32 sRGB 0-1.

    They are brought to one height and to the frame, as `prepare_views` does with given views, on the background. Raises
    TriptychError when a view is empty.
    """
    rotations = camera_rotations(photos["cameras"])
    lit = relight(photos["albedo"], photos["normal"], generator, views, PLAIN, rotations)
    return on_background(framed_by_height(lit, generator, jitter), background)


def framed_by_height(rgba: torch.Tensor, generator: np.random.Generator, jitter: float) -> torch.Tensor:
    """Views (V, 4, S, S) scaled to one height, their largest extent FRAME_FILL of the frame times 1 +- jitter, centred
    but for jitter / 2. Raises TriptychError when one is empty."""
    boxes = [_box(view[3]) for view in rgba]
    heights = [bottom - top for _, top, _, bottom in boxes]
    widths = [(right - left) / height for (left, _, right, _), height in zip(boxes, heights, strict=True)]
    common = FRAME_FILL * rgba.shape[-1] / max(1.0, *widths) * generator.uniform(1 - jitter, 1 + jitter)
    moved = []
    for view, box, height in zip(rgba, boxes, heights, strict=True):
        shift = generator.uniform(-jitter / 2, jitter / 2, 2)
        moved.append(_resampled(view, box, common / height, shift, 0.0))
    return torch.stack(moved)


# ---- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--photos", nargs="+", type=Path, metavar="SOURCE", help="also photograph: the folders DATA was prepared from"
    )
    parser.add_argument("--photo-share", type=float, default=0.5, help="of the sheets whose references are photographs")


def photograph_all(data: Sequence[Path], sources: Sequence[Path], workers: int | None = None) -> Iterator[str]:
    """Photographs every folder at the size of its prepared views; one sentence each."""
    for folder in data:
        size = int(PreparedData(folder, "train").options["view_size"])
        made = photograph_folder(
            folder, sources, PhotoOptions(size=size), workers=_cores() if workers is None else workers
        )
        yield (
            f"{made['samples']} photographed samples in {folder / FOLDER}, {made['skipped']} skipped, {made['absent']} "
            "objects not among the sources"
        )
