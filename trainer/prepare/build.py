"""One mesh file -> what training needs of it: pictures with cameras, and a solid.

Runs in worker processes. A broken object never raises out of here: it comes back as a record that says why.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera, rig_cameras
from triptych.geometry.files import MeshWarning, read_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.solid import solid_sdf
from triptych.render.views import render_views

from .gates import Gates, judge, reading_gate
from .sources import OUR_FRAME, Source
from .thumbnails import thumbnail_uri

SDF_BAND = 2.0  # voxels; an int8 step is SDF_BAND / 127
# A face below this area (the object's longest side is 1) has none: it shows nothing and bounds nothing.
_NO_AREA = 1e-10
# What odd but readable geometry makes our own code or numpy raise. It is a bug of ours and the report shows where, but
# one object of ten thousand must not end a night's preparation.
_UNFORESEEN = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class BuildOptions:
    """resolution: voxels per side. view_size: pixels. yaws: how many turned copies, the first one unturned."""

    resolution: int = 64
    view_size: int = 128
    yaws: int = 2
    gates: Gates = field(default_factory=Gates)

    def __post_init__(self) -> None:
        for name in ("resolution", "view_size", "yaws"):
            if getattr(self, name) < 1:
                raise TriptychError(f"{name} must be 1 or more, got {getattr(self, name)}")


def geometry_hash(mesh: Mesh) -> str:
    """sha256 of the normalised triangles, rounded to 1/1000 and sorted: equal for re-exported copies."""
    corners = np.rint(mesh.vertices[mesh.faces] * 1000).astype(np.int16)
    centres = corners.astype(np.int32).sum(axis=1)
    rows = np.concatenate([centres, corners.min(axis=1), corners.max(axis=1)], axis=1)
    triangles = np.ascontiguousarray(rows).view([("", rows.dtype)] * 9)
    return hashlib.sha256(np.sort(triangles, axis=0).tobytes()).hexdigest()


def open_edge_share(mesh: Mesh) -> float:
    """Share of edges that belong to exactly one face, after merging equal positions."""
    _, place = np.unique(np.round(mesh.vertices, 5), axis=0, return_inverse=True)
    faces = place.reshape(-1)[mesh.faces]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    _, counts = np.unique(edges[:, 0] * np.int64(len(mesh.vertices)) + edges[:, 1], return_counts=True)
    return float((counts == 1).mean()) if len(counts) else 1.0


def framed(mesh: Mesh, frame: tuple[str, str]) -> Mesh:
    """The mesh turned so that the file's ``frame`` (up, front), such as ("+z", "-y"), becomes +Y up, +Z front."""
    if frame == OUR_FRAME:
        return mesh
    up, front = (np.eye(3, dtype=np.float32)["xyz".index(axis[1])] * (1 if axis[0] == "+" else -1) for axis in frame)
    return _rotated(mesh, np.stack([np.cross(up, front), up, front]))


def turned(mesh: Mesh, yaw_deg: float) -> Mesh:
    """The mesh turned by ``yaw_deg`` about +Y (front towards the subject's left), normalised again."""
    if yaw_deg == 0:
        return mesh
    angle = np.deg2rad(yaw_deg)
    rotation = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]], dtype=np.float32
    )
    return _rotated(mesh, rotation).normalized()


def _rotated(mesh: Mesh, rotation: np.ndarray) -> Mesh:
    normals = None if mesh.normals is None else mesh.normals @ rotation.T
    return mesh.replace(vertices=mesh.vertices @ rotation.T, normals=normals)


def build_object(source: Source, options: BuildOptions) -> tuple[dict, list[dict[str, np.ndarray]]]:
    """Reads, checks, renders and voxelises one file.

    Returns (record, samples). record: ``status`` (ok, dropped), ``gate``, ``reason``, ``flags``, ``geometry_hash``,
    measurements, and a ``thumbnail`` for what was readable but dropped.
    samples, one a yaw: ``albedo`` (V, S, S, 4) uint8 sRGB, straight alpha; ``normal`` (V, S, S, 3) uint8, world, 0-255
    for -1..1; ``sdf`` (R, R, R) int8, SDF_BAND voxels = 127.
    """
    record: dict = {"status": "dropped", "gate": None, "reason": None, "flags": []}
    record |= fingerprint(source.path)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MeshWarning)
            mesh = framed(read_mesh(source.path), source.frame).normalized()
        record["notes"] = sorted({_local(w.message, source) for w in caught if issubclass(w.category, MeshWarning)})
    except (TriptychError, OSError) as error:
        sentence = _local(error, source)
        return record | {"gate": reading_gate(sentence, record["file_bytes"]), "reason": sentence}, []
    except _UNFORESEEN as error:
        return record | {"gate": "error", "reason": _where(error)}, []
    try:
        return _build(mesh, record, options)
    except TriptychError as error:
        return record | _measure(mesh) | {"gate": "solid", "reason": _local(error, source)}, []
    except _UNFORESEEN as error:
        return record | {"gate": "error", "reason": _where(error)}, []


def _build(mesh: Mesh, record: dict, options: BuildOptions) -> tuple[dict, list[dict[str, np.ndarray]]]:
    record = record | _measure(mesh)
    gate, reason, flags = judge(record, options.gates)
    if gate:
        return record | {"gate": gate, "reason": reason, "flags": flags, "thumbnail": _thumbnail(mesh)}, []
    digest = record["geometry_hash"]
    yaws = [0.0] + [float(int(digest[8 * i : 8 * i + 8], 16) / 2**32 * 360) for i in range(options.yaws - 1)]
    samples = [_sample(turned(mesh, yaw), options) for yaw in yaws]
    first = samples[0]["sdf"]
    record |= {"inside_voxels": int((first < 0).sum()), "yaws_deg": yaws, "sheet_only": bool((first > -100).all())}
    gate, reason, flags = judge(record, options.gates)
    if gate:
        return record | {"gate": gate, "reason": reason, "flags": flags, "thumbnail": _thumbnail(mesh)}, []
    return record | {"status": "ok", "flags": flags}, samples


def fingerprint(path: Path) -> dict:
    """``file_bytes``, ``file_mtime_ns`` and ``file_sha256`` of a file; None where it cannot be read."""
    try:
        status = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    except OSError:
        return {"file_bytes": None, "file_mtime_ns": None, "file_sha256": None}
    return {"file_bytes": status.st_size, "file_mtime_ns": status.st_mtime_ns, "file_sha256": digest}


def _local(said: object, source: Source) -> str:
    """A message without this machine's folders: the index travels with the data."""
    text = str(said).replace(str(source.path), source.path.name)
    return text.replace(f"{source.path.parent}{source.path.anchor[-1:] or '/'}", "")


def _where(error: BaseException) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    spot = f" at {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place is not None else ""
    return f"{type(error).__name__}{spot}: {' '.join(str(error).split())[:300]}"


def _measure(mesh: Mesh) -> dict:
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    areas = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    return {
        "faces": len(mesh.faces),
        "vertices": len(mesh.vertices),
        "sides": [round(float(side), 4) for side in np.diff(mesh.bounds, axis=0)[0]],
        "geometry_hash": geometry_hash(mesh),
        "open_edges": round(open_edge_share(mesh), 4),
        "degenerate": round(float((areas < _NO_AREA).mean()), 4),
        "textured": any(m.base_color_texture is not None for m in mesh.materials),
    }


def _thumbnail(mesh: Mesh) -> str:
    """Seen from the side and above, since what is dropped may have no front to show."""
    with torch.inference_mode():
        views = render_views(mesh, [Camera(azimuth_deg=30.0, elevation_deg=25.0)], 96, supersample=1)
    rgba = torch.cat([views.albedo, views.alpha], dim=1)[0].permute(1, 2, 0)
    return thumbnail_uri(_bytes(rgba), _bytes((views.normal[0].permute(1, 2, 0) + 1) / 2))


def _sample(mesh: Mesh, options: BuildOptions) -> dict[str, np.ndarray]:
    cameras = rig_cameras(VIEW_AZIMUTHS_DEG)
    with torch.inference_mode():
        views = render_views(mesh, cameras, options.view_size)
    rgba = torch.cat([views.albedo, views.alpha], dim=1).permute(0, 2, 3, 1)
    normal = (views.normal.permute(0, 2, 3, 1) + 1) / 2
    sdf = solid_sdf(mesh, options.resolution, SDF_BAND)
    return {
        "albedo": _bytes(rgba),
        "normal": _bytes(normal),
        "sdf": np.rint(sdf * (127 / SDF_BAND)).astype(np.int8),
    }


def _bytes(image: torch.Tensor) -> np.ndarray:
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8).contiguous().numpy()
