"""Cached image features of the second stage: what the published latent encoder reads instead of attributes.

Each object is rendered from many sides, an image encoder turns every picture into patch features, and each voxel of the
band gets their mean at its projections (triptych/models/voxel_features.py). They are kept as float16 in one ragged file
a shard, ``structured/<shard>.<name>.safetensors``: ``features`` (N, C), row by row as the shard's ``coords``.

Published: 150 views of 518 pixels from a sphere of radius 2, field of view 40 degrees, DINOv2 ViT-L/14 with registers
without its final norm.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from tqdm import tqdm

from trainer.names import import_named
from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera
from triptych.geometry.mesh import Mesh
from triptych.models.voxel_features import mean_patch_features
from triptych.render.views import render_mesh

from .shards import _is_whole, _write
from .structured import FOLDER, ShardJob, mesh_of

Extractor = Callable[[Tensor], Tensor]
EXTRACTORS: dict[str, str] = {}  # name -> "module:function"; the function takes a device and returns an Extractor


@dataclass(frozen=True)
class FeatureOptions:
    """name: of the files. views: pictures of an object. size: pixels. prefix_tokens: class and register tokens that
    precede the patches. batch: pictures at a time."""

    name: str
    views: int = 150
    size: int = 518
    prefix_tokens: int = 5
    batch: int = 8
    radius: float = 2.0
    fov_deg: float = 40.0


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The image encoder ``name``, or ``module:function``: pictures (B, 3, S, S) 0-1 -> tokens (B, T, C).

    Raises TriptychError when there is none of that name.
    """
    factory: Callable[[torch.device], Extractor] = import_named(name, EXTRACTORS, "image encoder")
    return factory(torch.device(device))


def sphere_cameras(options: FeatureOptions) -> list[Camera]:
    """Cameras spread over the sphere (Hammersley), poles left out."""
    cameras = []
    for number in range(options.views):
        bits = int(f"{number:032b}"[::-1], 2) / 2**32  # the digits mirrored at the point
        elevation = math.degrees(math.asin(2 * (number + 0.5) / options.views - 1))
        cameras.append(
            Camera(
                360 * bits, max(-89.0, min(89.0, elevation)), options.radius, half_extent=None, fov_deg=options.fov_deg
            )
        )
    return cameras


def camera_matrices(cameras: list[Camera]) -> tuple[Tensor, Tensor]:
    """Camera-to-world (V, 4, 4), camera looking along its -Z with +Y up, and fields of view (V,) in radians."""
    matrices = torch.eye(4).repeat(len(cameras), 1, 1)
    for matrix, camera in zip(matrices, cameras, strict=True):
        matrix[:3, :3] = camera.rotation().T
        matrix[:3, 3] = camera.position()
    return matrices, torch.tensor([math.radians(camera.fov_deg or 0.0) for camera in cameras])


@torch.inference_mode()
def voxel_features(
    mesh: Mesh, coords: np.ndarray, resolution: int, extract: Extractor, options: FeatureOptions
) -> np.ndarray:
    """(N, C) float16 features of the voxels coords (N, 3) of a mesh in model space."""
    cameras = sphere_cameras(options)

    def tokens() -> Iterator[Tensor]:
        for start in range(0, len(cameras), options.batch):
            rgba = render_mesh(mesh, cameras[start : start + options.batch], options.size, follow_camera=True)
            yield from extract(rgba[:, :3] * rgba[:, 3:]).float().cpu()

    places = torch.from_numpy(coords.astype(np.int64))
    mean = mean_patch_features(places, tokens(), *camera_matrices(cameras), resolution, options.prefix_tokens)
    return mean.half().numpy()


def cache_features(data: Path, jobs: list[ShardJob], extract: Extractor, options: FeatureOptions) -> int:
    """Writes the features of every structured sample, shard by shard; whole files are kept. Returns new samples."""
    resolution = int(json.loads((data / "options.json").read_text(encoding="utf-8"))["resolution"])
    made = 0
    for job in tqdm(jobs, unit="shard", desc=options.name):
        arrays = data / FOLDER / f"{job.name}.safetensors"
        path = data / FOLDER / f"{job.name}.{options.name}.safetensors"
        if not arrays.is_file() or _is_done(path, arrays, options):
            continue
        with safe_open(str(arrays), framework="numpy") as shard:
            rows, ends, coords = (shard.get_tensor(key) for key in ("rows", "voxel_ends", "coords"))
        items = {item.row: item for item in job.items}
        if absent := sorted(set(rows.tolist()) - items.keys()):
            raise TriptychError(f"{job.name} has rows {absent} that this call does not name: use the same --all-yaws")
        parts = np.split(coords, ends[:-1])
        features = [
            voxel_features(mesh_of(items[row]), part, resolution, extract, options)
            for row, part in zip(rows.tolist(), parts, strict=True)
        ]
        # safetensors writes an array's bytes as they lie in memory, whatever their order.
        stored = {"features": np.ascontiguousarray(np.concatenate(features))}
        _write(path, partial(save_file, stored, metadata=_metadata(options)))
        made += len(rows)
    return made


def _metadata(options: FeatureOptions) -> dict[str, str]:
    return {"views": str(options.views), "size": str(options.size), "name": options.name}


def _is_done(path: Path, arrays: Path, options: FeatureOptions) -> bool:
    if not path.is_file() or not _is_whole(path):
        return False
    with safe_open(str(path), framework="numpy") as have, safe_open(str(arrays), framework="numpy") as shard:
        rows: Any = have.get_slice("features").get_shape()[0]
        return have.metadata() == _metadata(options) and rows == shard.get_slice("coords").get_shape()[0]
