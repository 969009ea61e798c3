"""One mesh file -> what training needs of it: pictures with cameras, and a solid.

Runs in worker processes. A broken object never raises out of here: it comes back as a record that says why.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, rig_cameras
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.solid import solid_sdf
from triptych.render.views import render_views

SDF_BAND = 2.0  # voxels; an int8 step is SDF_BAND / 127


@dataclass(frozen=True)
class Gates:
    """What is dropped, and what is only flagged in the report."""

    max_faces: int = 2_000_000
    min_inside_voxels: int = 24
    min_thickness: float = 1e-3  # smallest side over longest side, below which an object is a flat sheet
    flag_open_edges: float = 0.25  # share of edges with one face


@dataclass(frozen=True)
class BuildOptions:
    """resolution: voxels per side. view_size: pixels. yaws: how many turned copies, the first one unturned."""

    resolution: int = 64
    view_size: int = 128
    yaws: int = 2
    gates: Gates = field(default_factory=Gates)


def geometry_hash(mesh: Mesh) -> str:
    """sha256 of the normalised triangles, rounded to 1/1000 and sorted: equal for re-exported copies."""
    corners = np.rint(mesh.vertices[mesh.faces] * 1000).astype(np.int16)
    centres = corners.astype(np.int32).sum(axis=1)
    rows = np.concatenate([centres, corners.min(axis=1), corners.max(axis=1)], axis=1)
    return hashlib.sha256(np.sort(np.ascontiguousarray(rows).view([("", rows.dtype)] * 9), axis=0).tobytes()).hexdigest()


def open_edge_share(mesh: Mesh) -> float:
    """Share of edges that belong to exactly one face, after merging equal positions."""
    _, place = np.unique(np.round(mesh.vertices, 5), axis=0, return_inverse=True)
    faces = place.reshape(-1)[mesh.faces]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    _, counts = np.unique(edges[:, 0] * np.int64(len(mesh.vertices)) + edges[:, 1], return_counts=True)
    return float((counts == 1).mean()) if len(counts) else 1.0


def turned(mesh: Mesh, yaw_deg: float) -> Mesh:
    """The mesh turned by ``yaw_deg`` about +Y (front towards the subject's left), normalised again."""
    if yaw_deg == 0:
        return mesh
    angle = np.deg2rad(yaw_deg)
    rotation = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]], dtype=np.float32
    )
    normals = None if mesh.normals is None else mesh.normals @ rotation.T
    return mesh.replace(vertices=mesh.vertices @ rotation.T, normals=normals).normalized()


def build_object(path: Path, options: BuildOptions) -> tuple[dict, list[dict[str, np.ndarray]]]:
    """Reads, checks, renders and voxelises one file.

    Returns (record, samples). record: ``status`` (ok, dropped), ``reason``, ``flags``, ``geometry_hash``, statistics.
    samples, one a yaw: ``albedo`` (V, S, S, 4) uint8 sRGB, straight alpha; ``normal`` (V, S, S, 3) uint8, world, 0-255
    for -1..1; ``sdf`` (R, R, R) int8, SDF_BAND voxels = 127.
    """
    record: dict = {"status": "dropped", "reason": None, "flags": [], "file_bytes": None}
    try:
        record["file_bytes"] = path.stat().st_size
        mesh = read_mesh(path).normalized()
        record |= _measure(mesh, options.gates)
        if record["reason"]:
            return record, []
        yaws = [0.0] + [
            float(int(record["geometry_hash"][8 * i : 8 * i + 8], 16) / 2**32 * 360) for i in range(options.yaws - 1)
        ]
        samples = [_sample(turned(mesh, yaw), options) for yaw in yaws]
    except (TriptychError, OSError) as error:
        return record | {"reason": str(error)}, []
    inside = int((samples[0]["sdf"] < 0).sum())
    record |= {"inside_voxels": inside, "yaws_deg": yaws, "sheet_only": bool((samples[0]["sdf"] > -100).all())}
    if inside < options.gates.min_inside_voxels:
        return record | {"reason": f"only {inside} voxels inside at {options.resolution}^3: too thin to learn from"}, []
    return record | {"status": "ok"}, samples


def _measure(mesh: Mesh, gates: Gates) -> dict:
    sides = np.diff(mesh.bounds, axis=0)[0]
    found: dict = {
        "faces": len(mesh.faces),
        "vertices": len(mesh.vertices),
        "sides": [round(float(side), 4) for side in sides],
        "geometry_hash": geometry_hash(mesh),
        "open_edges": round(open_edge_share(mesh), 4),
        "textured": any(m.base_color_texture is not None for m in mesh.materials),
        "flags": [],
        "reason": None,
    }
    degenerate = float((np.linalg.norm(mesh.face_normals(), axis=1) == 0).mean())
    if len(mesh.faces) > gates.max_faces:
        found["reason"] = f"{len(mesh.faces):,} faces, more than {gates.max_faces:,}"
    elif sides.min() < gates.min_thickness:
        found["reason"] = f"a flat sheet: smallest side {sides.min():.1e} of the longest"
    elif degenerate > 0.5:
        found["reason"] = f"{degenerate:.0%} of the faces have no area"
    if found["open_edges"] > gates.flag_open_edges:
        found["flags"].append(f"open: {found['open_edges']:.0%} of the edges belong to one face")
    if degenerate > 0.02:
        found["flags"].append(f"{degenerate:.0%} of the faces have no area")
    return found


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
