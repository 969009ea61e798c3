"""The fixed protocol of the evaluation of view models, and the pixels it compares with.

``views_protocol.json`` names the objects, pictures, seeds and definitions, and holds a hash of every object's pixels as
they were rendered when the protocol was made. A run renders them again and says whether they are the same: only then
are two models' numbers comparable. Changing anything in it means a new version.
"""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.prepare import sheets
from trainer.views_metrics import METRICS_VERSION, silhouette
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, VIEW_NAMES, rig_cameras
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Mesh
from triptych.render.views import render_views, shade

PROTOCOL_FILE = Path(__file__).with_name("views_protocol.json")


@dataclass(frozen=True)
class Protocol:
    """views_protocol.json.

    panel_px: side of the compared panels. supersample: samples per pixel and side. photo_px: side of the photograph.
    photo_light: arguments of ``triptych.render.views.shade``. seeds: of the sheets; every object is generated once with
    each. text: the prompt beside the photograph. steps, guidance: None is the model's own. meshes: see
    ``views_meshes``. prompts: see ``views_text``. metrics: one sentence each, for the reader. pixels: object id ->
    hash of its photograph and true views, in the order of evaluation.
    """

    version: int
    metrics_version: int
    split: str
    panel_px: int
    supersample: int
    photo_px: int
    photo_light: dict[str, float]
    truth_light: dict[str, float]
    text: str
    seeds: tuple[int, ...]
    steps: int | None
    guidance: float | None
    metrics: dict[str, str]
    meshes: dict[str, Any]
    prompts: dict[str, Any]
    pixels: dict[str, str]

    def object_ids(self, count: int | None = None) -> list[str]:
        """All objects, or about ``count`` of them, evenly spread."""
        every = list(self.pixels)
        return every if count is None else every[:: max(1, len(every) // max(1, count))][:count]


def load_protocol(path: Path | str = PROTOCOL_FILE) -> Protocol:
    """Raises TriptychError for a file that is missing, no protocol, or of other definitions than this code's."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TriptychError(f"the protocol {path} cannot be read ({error}): name a protocol file") from error
    known = {item.name for item in fields(Protocol)}
    if not isinstance(values, dict) or set(values) != known:
        odd = sorted(set(values) ^ known) if isinstance(values, dict) else type(values).__name__
        raise TriptychError(f"the protocol {path} lacks keys or has unknown ones ({odd}): take the repository's own")
    if values["metrics_version"] != METRICS_VERSION:
        raise TriptychError(
            f"the protocol {path} is for version {values['metrics_version']} of the metrics, this code has "
            f"{METRICS_VERSION}: check out the commit that the protocol belongs to"
        )
    light = {"head": sheets.HEAD, "sky": sheets.SKY, "ambient": sheets.AMBIENT}
    if values["truth_light"] != light:
        raise TriptychError(
            f"the protocol {path} lights the true views with {values['truth_light']}, this code with {light}: check "
            "out the commit that the protocol belongs to"
        )
    return Protocol(**{**values, "seeds": tuple(values["seeds"])})


@dataclass(frozen=True, eq=False)
class TrueObject:
    """One evaluation object. mesh: model space. photo: (P, P, 4) float32, the front in the rig's scale under the
    photograph's light. truth: (4, S, S, 4) float32, front, left, back, right under the fixed light; both are straight
    alpha, sRGB, whole 255ths. pixels: their hash."""

    id: str
    mesh: Mesh
    photo: np.ndarray
    truth: np.ndarray
    pixels: str


def true_object(protocol: Protocol, data: Path, name: str) -> TrueObject:
    """Reads and renders one object of ``data`` (a folder with index.csv). Raises TriptychError when it is not there."""
    mesh = read_mesh(object_file(data, name)).normalized()
    truth = true_views(mesh, protocol.panel_px, protocol.supersample)
    photo = photograph(mesh, protocol)
    digest = hashlib.sha256(b"".join(_bytes(picture).tobytes() for picture in (truth, photo))).hexdigest()
    return TrueObject(name, mesh, photo, truth, digest[:16])


def object_file(data: Path, name: str) -> Path:
    index = Path(data) / "index.csv"
    try:
        with index.open(newline="", encoding="utf-8") as stream:
            files = {row["id"]: row["file"] for row in csv.DictReader(stream)}
    except OSError as error:
        raise TriptychError(f"{index} cannot be read: name the folder of the object data with --data") from error
    if name not in files:
        raise TriptychError(f"the object {name} of the protocol is not in {index}: get the data that it was made for")
    return Path(data) / files[name]


def true_views(mesh: Mesh, size: int, supersample: int = 2) -> np.ndarray:
    """The rig's four views of a normalised mesh under the fixed light: (4, S, S, 4) float32 in whole 255ths.

    Rendered as ``prepare`` renders what models are trained on: base colour and normals in bytes first, then the light.
    """
    albedo, normal = _rendered(mesh, size, supersample)
    return _whole(sheets.canonical_shade(albedo, normal).permute(0, 2, 3, 1).numpy())


def unlit_views(mesh: Mesh, size: int, supersample: int = 2) -> np.ndarray:
    """The same without light: base colours, (4, S, S, 4) float32 in whole 255ths."""
    return _whole(_rendered(mesh, size, supersample)[0].astype(np.float32) / 255)


def _rendered(mesh: Mesh, size: int, supersample: int) -> tuple[np.ndarray, np.ndarray]:
    """Base colour with alpha (4, S, S, 4) and world normals (4, S, S, 3), uint8."""
    with torch.inference_mode():
        views = render_views(mesh, rig_cameras(VIEW_AZIMUTHS_DEG), size, supersample=supersample)
    albedo = torch.cat([views.albedo, views.alpha], dim=1).permute(0, 2, 3, 1)
    return _bytes(albedo.numpy()), _bytes(((views.normal.permute(0, 2, 3, 1) + 1) / 2).numpy())


def photograph(mesh: Mesh, protocol: Protocol) -> np.ndarray:
    """The front view under the photograph's light, in the rig's scale, cut out: (P, P, 4) float32 in whole 255ths."""
    cameras = rig_cameras(VIEW_AZIMUTHS_DEG[:1])
    with torch.inference_mode():
        views = render_views(mesh, cameras, protocol.photo_px, supersample=protocol.supersample)
        lit = shade(views, cameras, **protocol.photo_light)  # type: ignore[arg-type]
    return _whole(lit[0].permute(1, 2, 0).numpy())


def lone(photo: np.ndarray) -> np.ndarray:
    """The photograph (P, P, 4) as a user has it: cropped to a square around the object, a tenth of which is margin."""
    solid = silhouette(photo)
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    half = 0.55 * max(rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    middle = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    top, left = (max(0, int(np.floor(centre - half))) for centre in middle)
    bottom, right = (min(photo.shape[0], int(np.ceil(centre + half))) for centre in middle)
    return photo[top:bottom, left:right]


def named(views: np.ndarray) -> dict[str, np.ndarray]:
    """(4, S, S, 4) -> by name."""
    return dict(zip(VIEW_NAMES, views, strict=True))


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((image.clip(0, 1) * 255 + 0.5).astype(np.uint8))


def _whole(image: np.ndarray) -> np.ndarray:
    """Rounded to bytes and back; colourless where it is transparent, so that the hash sees what is seen."""
    whole = _bytes(image)
    whole[whole[..., 3] == 0] = 0
    return whole.astype(np.float32) / 255
