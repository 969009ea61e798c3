"""Prepared data, read sample by sample, and the augmentation that training adds.

All augmentation draws from the generator it is given, so that a training sample is a function of (index, seed).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open

from trainer.parallel import say
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera, rig_cameras
from triptych.geometry.voxels import turn_volume
from triptych.models.lifting import PosedViews

DRAWN = "drawn"  # the folder
LENT_OBJECTS = 2  # training objects that a data set without held-out ones is validated on


class PreparedData:
    """One split of a prepared folder. Items are ``dict(albedo, normal, sdf)`` of numpy arrays, see prepare/build.py.

    objects: at most so many. Raises TriptychError for what is no prepared folder, and, when ``needed``, for a split
    without objects.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", *, objects: int | None = None, needed: bool = True
    ) -> None:
        self.folder = Path(folder)
        path = self.folder / "index.json"
        if not path.is_file():
            raise TriptychError(f"{path} is missing: run `python -m trainer prepare SOURCE --out {folder}` first")
        index = json.loads(path.read_text(encoding="utf-8"))
        self.options: dict = index["options"]
        self.records = [r for r in index["records"] if r["status"] == "ok" and r["split"] == split][:objects]
        self.rows = [(r["shard"], row, r) for r in self.records for row in r["rows"]]
        if needed and not self.rows:
            raise TriptychError(f"{folder} has no objects in the split {split!r}: prepare more objects")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        shard, row, _ = self.rows[index]
        handle = _open(str(self.folder / "shards" / f"{shard}.safetensors"))
        return {key: handle.get_slice(key)[row] for key in ("albedo", "normal", "sdf")}

    def field(self, index: int) -> np.ndarray:
        """The solid alone: (R, R, R) int8."""
        shard, row, _ = self.rows[index]
        return _open(str(self.folder / "shards" / f"{shard}.safetensors")).get_slice("sdf")[row]


def held_out_data(folders: Sequence[str | Path]) -> list[PreparedData]:
    """The validation splits of those prepared folders that have one; in a small data set, where none has, a few of the
    training objects of the first, which are trained on all the same: that is said."""
    found = [part for folder in folders if len(part := PreparedData(folder, "validation", needed=False))]
    if found:
        return found
    lent = PreparedData(folders[0], "train", objects=LENT_OBJECTS)
    say(lent_sentence(folders, len(lent.records)))
    return [lent]


def lent_sentence(folders: Sequence[str | Path], count: int) -> str:
    return (
        f"{', '.join(map(str, folders))} has no validation objects for this: {count} of the training objects are "
        "validated on, which says nothing about others; prepare more objects to hold some out"
    )


class JoinedData:
    """One split of several prepared folders, one after the other; the first one's options hold for all."""

    def __init__(self, folders: Sequence[str | Path], split: str = "train") -> None:
        self.parts = [PreparedData(folder, split) for folder in folders]
        self.options = self.parts[0].options
        for part in self.parts[1:]:
            for key in ("resolution", "view_size", "sdf_band"):
                if part.options[key] != self.options[key]:
                    raise TriptychError(
                        f"{part.folder} was prepared with {key} {part.options[key]}, {self.parts[0].folder} with "
                        f"{self.options[key]}: prepare both alike"
                    )
        self.records = [record for part in self.parts for record in part.records]
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - int(self._ends[number]) + len(self.parts[number])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, own = self._locate(index)
        return self.parts[number][own]

    def place(self, index: int) -> tuple[int, str, int]:
        """Number of the folder, shard and row."""
        number, own = self._locate(index)
        return number, *self.parts[number].rows[own][:2]

    def field(self, index: int) -> np.ndarray:
        number, own = self._locate(index)
        return self.parts[number].field(own)


def drawn_sets(parts: Sequence[PreparedData]) -> dict[int, DrawnSets]:
    """By their number, the sets of those folders for which a views model drew any. TriptychError when none has."""
    found = {number: DrawnSets(part) for number, part in enumerate(parts) if _has_drawn(part)}
    return found or {0: DrawnSets(parts[0])}  # which says what to do


def _has_drawn(part: PreparedData) -> bool:
    return any((part.folder / DRAWN).glob("shard_*.safetensors"))


class DrawnSets:
    """The sets that a views model drew of a prepared folder's objects (prepare/drawn.py), by shard and row.

    Raises TriptychError where there are none, and for those of objects that have changed their place since.
    """

    def __init__(self, data: PreparedData) -> None:
        folder = data.folder
        self.folder = folder / DRAWN
        keys = {(shard, row): record["key"] for shard, row, record in data.rows}
        self.places: dict[tuple[str, int], list[int]] = {}
        for file in sorted(self.folder.glob("shard_*.safetensors")):
            for key, row, _ in json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["wanted"]:
                if keys.get((file.stem, row)) != key:
                    raise TriptychError(
                        f"{folder} was prepared again after its sets were drawn ({key} is no more in row {row} of "
                        f"{file.stem}): run `python -m trainer drawn {folder} --model ...` again"
                    )
            with safe_open(str(file), framework="numpy") as handle:
                for place, row in enumerate(handle.get_tensor("rows").tolist()):
                    self.places.setdefault((file.stem, row), []).append(place)
        if not self.places:
            raise TriptychError(f"{folder} has no drawn sets: run `python -m trainer drawn {folder} --model ...` first")

    def count(self, shard: str, row: int) -> int:
        return len(self.places.get((shard, row), ()))

    def get(self, shard: str, row: int, number: int, *, whole: bool) -> dict[str, Any]:
        """Set ``number`` of a row. whole: all four views as they were drawn, none given.

        views (4, P, P, 4) uint8, shown and given (4,) bool, scale float, symmetry int.
        """
        place, k = self.places[shard, row][number], int(whole)
        handle = _open(str(self.folder / f"{shard}.safetensors"))
        read = {key: handle.get_slice(key) for key in ("views", "shown", "given", "scale", "symmetry")}
        given = read["given"][place]
        return {
            "views": read["views"][place, k],
            "shown": read["shown"][place, k],
            "given": np.zeros_like(given) if whole else given,
            "scale": float(read["scale"][place, k]),
            "symmetry": int(read["symmetry"][place]),
        }


@lru_cache(maxsize=1024)
def _open(path: str):
    return safe_open(path, framework="numpy")


def quarter_turn(sample: dict[str, np.ndarray], turns: int) -> dict[str, np.ndarray]:
    """The object turned by ``turns`` x 90 degrees about +Y (front towards the subject's left).

    Views must be the four of the rig in order; normals are bytes, 0-255 for -1..1; the volume is indexed [x, y, z].
    """
    turns %= 4
    if turns == 0:
        return sample
    normal = np.roll(sample["normal"], turns, axis=0)
    for _ in range(turns):
        normal = np.stack([normal[..., 2], normal[..., 1], 255 - normal[..., 0]], axis=-1)
    turned = turn_volume(sample["sdf"], turns)
    return {"albedo": np.roll(sample["albedo"], turns, axis=0), "normal": normal, "sdf": turned}


def mirrored(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The object mirrored in x: left and right views change places, every picture is flipped."""
    order = [0, 3, 2, 1]
    normal = sample["normal"][order][:, :, ::-1]
    normal = np.concatenate([255 - normal[..., :1], normal[..., 1:]], axis=-1)
    return {"albedo": sample["albedo"][order][:, :, ::-1], "normal": normal, "sdf": sample["sdf"][::-1]}


def symmetric_sample(sample: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The object under one of the eight symmetries that keep up up: ``number`` % 4 turns, mirrored from 4 on."""
    turned = quarter_turn(sample, number % 4)
    return mirrored(turned) if number >= 4 else turned


def view_order(number: int) -> np.ndarray:
    """Which of the rig's views ``symmetric_sample`` puts first, second, third and fourth: (4,) int."""
    order = np.roll(np.arange(4), number % 4)
    return order[[0, 3, 2, 1]] if number >= 4 else order


def rescaled(sdf: np.ndarray, scale: float) -> np.ndarray:
    """A signed distance field (R, R, R) int8, negative inside, of the object made ``scale`` times as large about the
    centre of the cube. What grows out of the cube is cut off inside of it, so that the surface stays closed."""
    if abs(scale - 1) < 0.5 / len(sdf):
        return sdf
    line = ((torch.arange(len(sdf)) + 0.5) / len(sdf) * 2 - 1) / scale
    places = torch.stack(
        torch.meshgrid(line, line, line, indexing="ij")[::-1], dim=-1
    )  # sampled as x, y, z of an image
    inside = 127 - torch.from_numpy(np.ascontiguousarray(sdf)).float()  # 0 where nothing is
    found = 127 - F.grid_sample(inside[None, None], places[None], align_corners=False)[0, 0]
    found = torch.where(found.abs() < 127, found * scale, found)
    border = torch.full_like(found, 32.0)
    border[1:-1, 1:-1, 1:-1] = -127
    return torch.maximum(found, border).clamp(-127, 127).round().to(torch.int8).numpy()


def posed_views(batch: dict[str, Any], device: torch.device) -> PosedViews:
    """A batch's ``images`` (N, 4, S, S) uint8, seen from the rig's ``views`` (N,), ``counts`` (B,) a sample, and which
    of them were ``drawn`` (N,), where it says so."""
    return PosedViews(
        images=batch["images"].to(device).float() / 255,
        cameras=tuple(_RIG[i] for i in batch["views"].tolist()),
        counts=tuple(batch["counts"].tolist()),
        drawn=tuple(batch["drawn"].tolist()) if "drawn" in batch else (),
    )


def soft_occupancy(sdf: torch.Tensor, band: float, softness: float = 0.4) -> torch.Tensor:
    """Quantised signed distance (int8, +-127 = ``band`` voxels) -> occupancy 0-1, a sigmoid ``softness`` voxels wide.

    Beyond the band it is exactly 0 or 1. Its logit is linear in the distance near the surface, so a decoder trained
    on it has an isosurface with sub-voxel accuracy.
    """
    distance = sdf.float() * (band / 127)
    soft = torch.sigmoid(-distance / softness)
    return torch.where(sdf.abs() == 127, (sdf < 0).float(), soft)


_RIG = rig_cameras(VIEW_AZIMUTHS_DEG)
_ROTATIONS = torch.stack([Camera(azimuth).rotation() for azimuth in VIEW_AZIMUTHS_DEG])


def _to_linear(srgb: torch.Tensor) -> torch.Tensor:
    return srgb.clamp(0, 1) ** 2.2


def relight(
    albedo: np.ndarray,
    normal: np.ndarray,
    generator: np.random.Generator,
    views: Sequence[int] = (0, 1, 2, 3),
    recolouring: Recolouring | None = None,
    rotations: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shaded pictures of the rig's views under random light and colour.

    albedo (4, S, S, 4) uint8, normal (4, S, S, 3) uint8, world frame; views: which of them; recolouring: of the
    object, None draws one; rotations: (4, 3, 3) of their cameras (Camera.rotation), None for the rig's. Returns
    (V, 4, S, S) float32 RGBA, sRGB 0-1, straight alpha. One light serves all views; it turns with the camera or stands
    in the world, half and half. Light, ambient share, exposure and gloss vary; one in ten is unshaded.
    """
    rotations = (_ROTATIONS if rotations is None else rotations)[list(views)]
    albedo, normal = albedo[list(views)], normal[list(views)]
    colour = torch.from_numpy(np.ascontiguousarray(albedo)).permute(0, 3, 1, 2).float() / 255
    alpha, rgb = colour[:, 3:], colour[:, :3]
    world = torch.from_numpy(np.ascontiguousarray(normal)).permute(0, 3, 1, 2).float() * (2 / 255) - 1
    draw = generator.uniform
    linear = _to_linear((recolouring or draw_recolouring(generator))(rgb))
    if draw() < 0.9:
        key = torch.tensor([draw(-1, 1), draw(-0.2, 1.2), draw(0.2, 1.2)], dtype=torch.float32)
        key = torch.nn.functional.normalize(key, dim=0)
        turns = draw() < 0.5
        directions = torch.stack([r.T @ key if turns else _ROTATIONS[0].T @ key for r in rotations])
        back = rotations[:, 2]
        lambert = torch.einsum("vchw,vc->vhw", world, directions).clamp_min(0)
        head = torch.einsum("vchw,vc->vhw", world, back).clamp_min(0)
        sky = 0.5 + 0.5 * world[:, 1]
        parts = generator.dirichlet((1.5, 1.5, 1.0, 0.7)).tolist()
        shade = parts[0] * lambert + parts[1] * head + parts[2] * sky + parts[3]
        linear = linear * (shade * draw(0.8, 1.5))[:, None]
        if draw() < 0.3:
            half = torch.nn.functional.normalize(directions + back, dim=1)
            gloss = torch.einsum("vchw,vc->vhw", world, half).clamp_min(0) ** draw(8, 60)
            linear = linear + draw(0.05, 0.5) * gloss[:, None]
    rgb = linear.clamp(0, 1) ** (1 / 2.2)
    if draw() < 0.3:
        noise = torch.from_numpy(generator.standard_normal(rgb.shape, dtype=np.float32))
        rgb = rgb + draw(0.0, 0.03) * noise
    return torch.cat([rgb.clamp(0, 1), alpha], dim=1)


@dataclass(frozen=True)
class Recolouring:
    """An affine change of sRGB colours: matrix (3, 3), offset (3,) float32."""

    matrix: torch.Tensor
    offset: torch.Tensor

    def __call__(self, rgb: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """Colours with their channels in axis ``dim``, the same change for all, within 0-1."""
        moved = rgb.movedim(dim, -1) @ self.matrix.T + self.offset
        return moved.movedim(-1, dim).clamp(0, 1)


def draw_recolouring(generator: np.random.Generator) -> Recolouring:
    """Random channel order, tint, saturation and contrast; one in five makes nearly everything one colour."""
    draw = generator.uniform
    matrix = torch.eye(3)[generator.permutation(3).tolist()]
    saturation = draw(0.3, 1.2)
    matrix = saturation * matrix + (1 - saturation) / 3
    offset = torch.zeros(3)
    if draw() < 0.2:
        flat = torch.from_numpy(generator.uniform(0.15, 1, 3).astype(np.float32))
        contrast = draw(0.0, 0.3)
        matrix, offset = contrast * matrix, flat - 0.5 * contrast
    gain = draw(0.7, 1.2)
    return Recolouring(gain * matrix, gain * offset + draw(-0.1, 0.15))
