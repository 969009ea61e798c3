"""Reading the second stage's arrays (trainer/prepare/structured.py), and what training draws from them.

Everything random comes from the generator that a function is given, so a training sample is a function of (index,
seed). N voxels of the band, n of them active, L = 27 lattice vertices of one voxel's 2^3 fine cubes, V lattice vertices
of all active voxels, P surface points.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data import _open
from trainer.prepare.structured import FINE_BAND, FOLDER, OFFSET_LIMIT, lattice_mask
from triptych.errors import TriptychError
from triptych.geometry.flexicubes_tables import CORNERS
from triptych.geometry.voxels import turn_volume

SYMMETRIES = 8
_POINTS = ("points", "point_normals", "point_colors")


class StructuredData:
    """One split of a prepared folder's second-stage arrays; items are ``dict`` of one sample's arrays.

    features: name of cached image features to read as well (``features`` (N, C) float16), or None.
    Raises TriptychError where the folder has none for this split.
    """

    def __init__(self, folder: str | Path, split: str = "train", features: str | None = None) -> None:
        self.folder, self.features = Path(folder), features
        path = self.folder / "index.json"
        if not path.is_file():
            raise TriptychError(f"{path} is missing: run `python -m trainer prepare SOURCE --out {folder}` first")
        index = json.loads(path.read_text(encoding="utf-8"))
        self.options: dict[str, Any] = index["options"]
        self.resolution = int(self.options["resolution"])
        self.band = float(self.options["sdf_band"])
        owner = {(r["shard"], row): r for r in index["records"] if r["status"] == "ok" for row in r["rows"]}
        self.rows: list[tuple[str, int, dict[str, Any]]] = []
        for report in sorted((self.folder / FOLDER).glob("shard_*.json")):
            if features and not self._feature_path(report.stem).is_file():
                continue
            rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
            found = [(place, owner.get((report.stem, row))) for place, row in enumerate(rows)]
            self.rows += [(report.stem, place, r) for place, r in found if r is not None and r["split"] == split]
        self.records = list({record["key"]: record for _, _, record in self.rows}.values())
        if not self.rows:
            what = f"features {features!r}" if features else "second-stage arrays"
            raise TriptychError(f"{folder} has no {what} in the split {split!r}: run `python -m trainer structure`")

    def __len__(self) -> int:
        return len(self.rows)

    def _feature_path(self, shard: str) -> Path:
        return self.folder / FOLDER / f"{shard}.{self.features}.safetensors"

    def voxels(self, index: int) -> int:
        """How many voxels the sample's band has: what it may cost."""
        start, end = self._span(index, "voxel_ends")
        return end - start

    def _span(self, index: int, name: str) -> tuple[int, int]:
        shard, place, _ = self.rows[index]
        ends = _open(str(self.folder / FOLDER / f"{shard}.safetensors")).get_slice(name)
        return (int(ends[place - 1 : place][0]) if place else 0), int(ends[place : place + 1][0])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        shard, place, _ = self.rows[index]
        handle = _open(str(self.folder / FOLDER / f"{shard}.safetensors"))
        voxels, vertices = slice(*self._span(index, "voxel_ends")), slice(*self._span(index, "vertex_ends"))
        item = {key: handle.get_slice(key)[voxels] for key in ("coords", "sdf", "attributes")}
        item["fine_sdf"] = handle.get_slice("fine_sdf")[vertices]
        item |= {key: handle.get_slice(key)[place] for key in _POINTS}
        if self.features:
            item["features"] = _open(str(self._feature_path(shard))).get_slice("features")[voxels]
        return item

    def prepared_row(self, index: int) -> int:
        """The sample's row in the prepared shard."""
        shard, place, _ = self.rows[index]
        return int(_open(str(self.folder / FOLDER / f"{shard}.safetensors")).get_slice("rows")[place : place + 1][0])

    def views(self, index: int) -> dict[str, np.ndarray]:
        """The prepared pictures of the same sample: albedo and normal, see trainer/data.py."""
        shard, row = self.rows[index][0], self.prepared_row(index)
        handle = _open(str(self.folder / "shards" / f"{shard}.safetensors"))
        return {key: handle.get_slice(key)[row] for key in ("albedo", "normal")}


def capped(voxels: int, limit: int) -> int:
    """What a sample of so many voxels costs under a limit, 0 for none."""
    return min(voxels, limit) if limit else voxels


def decode_attributes(attributes: Tensor) -> Tensor:
    """(..., 10) uint8 -> float32: colour -1..1, outward normal, offset to the surface in voxels, coverage 0-1."""
    values = attributes.float() / 127.5 - 1
    return torch.cat([values[..., :6], values[..., 6:9] * OFFSET_LIMIT, (values[..., 9:] + 1) / 2], dim=-1)


# ---- the eight symmetries that keep up up: quarter turns about +Y, then a mirror in x


def symmetric_coords(coords: np.ndarray, number: int, resolution: int) -> np.ndarray:
    """Voxels (N, 3) under one of the symmetries; the same as ``turn_volume``, then a flip of x from number 4 on."""
    turned = coords
    for _ in range(number % 4):
        turned = np.stack([turned[:, 2], turned[:, 1], resolution - 1 - turned[:, 0]], axis=1)
    return _flipped(turned, resolution - 1) if number >= 4 else turned


def symmetric_vectors(vectors: np.ndarray, number: int, total: int = 0) -> np.ndarray:
    """Vectors (..., 3); ``total`` - v is the opposite of a component v (0, or 255 for bytes that stand for -1..1)."""
    turned = vectors
    for _ in range(number % 4):
        turned = np.stack([turned[..., 2], turned[..., 1], total - turned[..., 0]], axis=-1)
    return _flipped(turned, total) if number >= 4 else turned


def _flipped(values: np.ndarray, total: int) -> np.ndarray:
    return np.stack([total - values[..., 0], values[..., 1], values[..., 2]], axis=-1)


def symmetric_local(number: int, side: int) -> np.ndarray:
    """(side^3,) which vertex of a voxel, row-major, comes to each place."""
    cube = turn_volume(np.arange(side**3).reshape((side,) * 3), number % 4)
    return (cube[::-1] if number >= 4 else cube).reshape(-1)


def symmetric_attributes(attributes: np.ndarray, number: int) -> np.ndarray:
    """(N, 10) uint8 under one of the symmetries."""
    signed = attributes.astype(np.int16)
    parts = [symmetric_vectors(signed[:, first : first + 3], number, 255) for first in (3, 6)]
    return np.concatenate([signed[:, :3], *parts, signed[:, 9:]], axis=1).astype(np.uint8)


# ---- the active set


def smooth_noise(coords: np.ndarray, resolution: int, generator: np.random.Generator) -> np.ndarray:
    """(N,) smooth values in -1..1 that change over a quarter to a seventh of the grid."""
    side = int(generator.integers(5, 9))
    grid = generator.uniform(-1, 1, (side,) * 3).astype(np.float32)
    place = (coords.astype(np.float32) + 0.5) / resolution * (side - 1)
    low = np.minimum(place.astype(np.int64), side - 2)
    share = place - low
    total = np.zeros(len(coords), dtype=np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(np.array(corner, dtype=bool), share, 1 - share).prod(axis=1)
        total += weight * grid[tuple((low + np.array(corner)).T)]
    return total


def draw_active(
    coords: np.ndarray,
    distance: np.ndarray,
    resolution: int,
    generator: np.random.Generator,
    tau: tuple[float, float],
    perturbation: float,
    max_voxels: int = 0,
) -> np.ndarray:
    """Rows of the voxels that one training sample uses, ascending.

    They are where |distance (N,) + noise| < t, in voxels: t uniform in ``tau``; the noise is smooth, up to
    ``perturbation``, for half of the samples; so decoders meet sets like those of an imperfect first stage.
    max_voxels: keep those around a random one (the cube that holds this many); 0: all.
    """
    limit = generator.uniform(*tau)
    noise = smooth_noise(coords, resolution, generator) * perturbation if generator.random() < 0.5 else 0.0
    active = np.flatnonzero(np.abs(distance + noise) < limit)
    if not len(active):
        active = np.flatnonzero(np.abs(distance) <= max(limit, np.abs(distance).min()))
    if 0 < max_voxels < len(active):
        there = coords[active].astype(np.int64)
        reach = np.abs(there - there[generator.integers(len(active))]).max(axis=1)
        active = active[np.sort(np.argsort(reach, kind="stable")[:max_voxels])]
    return active


# ---- the lattice


def lattice_rows(
    coords: np.ndarray, active: np.ndarray, fine_sdf: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (n, 27) int64 of each active voxel's lattice vertices, row-major, and their fine_sdf (V,).

    coords (N, 3): the whole band, whose vertices fine_sdf (M,) lists.
    """
    side = 2 * resolution + 1
    number = np.empty(side**3, dtype=np.int32)
    number[lattice_mask(coords, resolution).reshape(-1)] = np.arange(len(fine_sdf), dtype=np.int32)
    step = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    scale = np.array([side * side, side, 1])
    rows = number[(2 * coords[active].astype(np.int64) @ scale)[:, None] + step @ scale]
    used = np.zeros(len(fine_sdf), dtype=bool)
    used[rows] = True
    compact = np.cumsum(used) - 1
    return compact[rows], fine_sdf[used]


def point_vertices(
    points: np.ndarray, coords: np.ndarray, rows: np.ndarray, resolution: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trilinear interpolation at surface points: which points (p,), vertex rows (p, 8), weights (p, 8) float32.

    points (P, 3) int16; coords (n, 3) of the active voxels and their vertex rows (n, 27). Points elsewhere drop out.
    """
    grid = np.full((resolution,) * 3, -1, dtype=np.int64)
    grid[tuple(coords.astype(np.int64).T)] = np.arange(len(coords))
    place = (points.astype(np.float32) / 65534 + 0.5) * (2 * resolution)
    cell = place.astype(np.int64).clip(0, 2 * resolution - 1)
    voxel = grid[tuple((cell // 2).T)]
    kept = np.flatnonzero(voxel >= 0)
    cell, share = cell[kept], (place - cell)[kept]
    corners = CORNERS.numpy()
    local = (cell % 2)[:, None] + corners
    vertex = rows[voxel[kept][:, None], local @ np.array([9, 3, 1])]
    weights = np.where(corners.astype(bool), share[:, None], 1 - share[:, None]).prod(axis=2)
    return kept, vertex, weights.astype(np.float32)


def refined_lattice(rows: np.ndarray, values: np.ndarray, coords: np.ndarray, resolution: int) -> tuple[Any, Any]:
    """The lattice at twice the resolution: rows (n, 125) and trilinearly interpolated values, of ``lattice_rows``."""
    local = torch.from_numpy(values[rows].astype(np.float32)).view(-1, 1, 3, 3, 3)
    fine = torch.nn.functional.interpolate(local, size=(5, 5, 5), mode="trilinear", align_corners=True)
    side = 4 * resolution + 1
    step = np.stack(np.meshgrid(*[np.arange(5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    scale = np.array([side * side, side, 1])
    ids = (4 * coords.astype(np.int64) @ scale)[:, None] + step @ scale
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return inverse.reshape(ids.shape), fine.reshape(-1).numpy()[first]


# ---- one training sample


def draw_sample(
    item: dict[str, np.ndarray],
    resolution: int,
    band: float,
    generator: np.random.Generator,
    *,
    tau: tuple[float, float],
    perturbation: float,
    max_voxels: int = 0,
    points: int = 2048,
    levels: int = 1,
    symmetry: int | None = None,
) -> dict[str, Tensor]:
    """One sample as CPU tensors.

    coords (n, 3) int32; attributes (n, 10) uint8 (and features (n, C) when cached); rows (n, L) int64 of the vertices
    of each voxel; target (V,) float32, distance over FINE_BAND fine voxels, -1..1; point_rows (p, 8), point_weights
    (p, 8), point_normals (p, 3) float32, point_colors (p, 3) float32 0-1; count () int64, the active voxels.
    levels: subdivisions of the decoder, 1 or 2. symmetry: which of the eight; None draws it.
    """
    number = int(generator.integers(SYMMETRIES)) if symmetry is None else symmetry
    distance = item["sdf"].astype(np.float32) * (band / 127)
    active = draw_active(item["coords"], distance, resolution, generator, tau, perturbation, max_voxels)
    coords = item["coords"][active].astype(np.int64)
    rows, values = lattice_rows(item["coords"], active, item["fine_sdf"], resolution)
    drawn = generator.permutation(len(item["points"]))[:points]
    kept, vertex, weights = point_vertices(item["points"][drawn], coords, rows, resolution)
    drawn = drawn[kept]
    if levels == 2:
        # Every second vertex of the finer lattice is one of the coarser: the points' cubes stay what they were.
        rows_2, values = refined_lattice(rows, values, coords, resolution)
        even = np.arange(125).reshape(5, 5, 5)[::2, ::2, ::2].reshape(-1)
        onto = np.empty(int(rows.max()) + 1, dtype=np.int64)
        onto[rows] = rows_2[:, even]
        rows, vertex = rows_2, onto[vertex]
    side = 2**levels + 1
    sample = {
        "coords": symmetric_coords(coords, number, resolution).astype(np.int32),
        "attributes": symmetric_attributes(item["attributes"][active], number),
        "rows": rows[:, symmetric_local(number, side)].astype(np.int64),
        "target": values.astype(np.float32) / 127,
        "point_rows": vertex,
        "point_weights": weights,
        "point_normals": symmetric_vectors(item["point_normals"][drawn].astype(np.float32) / 127, number),
        "point_colors": item["point_colors"][drawn].astype(np.float32) / 255,
    }
    if "features" in item:
        sample["features"] = item["features"][active]
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in sample.items()}
    return tensors | {"count": torch.tensor(len(active)), "symmetry": torch.tensor(number)}


def join_samples(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Samples joined row by row: coords (n, 4) with the sample first, vertex rows shifted, ``lengths`` (B,)."""
    batch = {key: torch.cat([s[key] for s in samples]) for key in samples[0] if samples[0][key].dim()}
    shift = np.cumsum([0, *(len(s["target"]) for s in samples)])
    for key in ("rows", "point_rows"):
        batch[key] = torch.cat([s[key] + int(first) for s, first in zip(samples, shift, strict=False)])
    lengths = torch.tensor([len(s["coords"]) for s in samples])
    number = torch.repeat_interleave(torch.arange(len(samples), dtype=torch.int32), lengths)
    batch["coords"] = torch.cat([number[:, None], batch["coords"]], dim=1)
    return batch | {"lengths": lengths, "symmetry": torch.stack([s["symmetry"] for s in samples])}


def corner_places(levels: int) -> Tensor:
    """(8^levels, 8) int64: which of a voxel's (2^levels + 1)^3 vertices each corner of each fine cube is.

    Cubes come as repeated subdivision orders them: the first halving is slowest, in each z is fastest.
    """
    half = torch.cartesian_prod(*[torch.arange(2)] * 3)
    cube = torch.zeros(1, 3, dtype=torch.int64)
    for _ in range(levels):
        cube = (2 * cube[:, None] + half).flatten(0, 1)
    side = 2**levels + 1
    return ((cube[:, None] + CORNERS) * torch.tensor([side * side, side, 1])).sum(dim=-1)


__all__ = ["FINE_BAND", "StructuredData", "corner_places", "decode_attributes", "draw_sample", "join_samples"]
