"""``inspect``: what is in mesh files and in bundles."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TriptychError
from .report import heard_warnings, to_json

if TYPE_CHECKING:
    import numpy as np

    from ..geometry.mesh import Material, Mesh


def inspect(args: argparse.Namespace) -> int:
    """A JSON list with an entry per path; one that cannot be read has ``error``, and the exit code is 1."""
    entries = []
    for path in args.paths:
        try:
            entries.append(inspect_bundle(path) if path.is_dir() else inspect_mesh(path))
        except TriptychError as error:
            print(f"error: {error}", file=sys.stderr)
            entries.append({"file": str(path), "error": str(error)})
    print(to_json(entries))
    return int(any("error" in entry for entry in entries))


def inspect_mesh(path: Path) -> dict[str, Any]:
    from ..geometry.cleanup import face_components, weld
    from ..geometry.files import read_mesh
    from ..geometry.metrics import is_watertight

    with heard_warnings() as heard:
        mesh = read_mesh(path)
    low, high = mesh.bounds.astype(float)
    edge_faces = _faces_per_edge(weld(mesh))
    watertight = is_watertight(mesh)
    area, volume = _area_and_volume(mesh)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "bounds": [low.tolist(), high.tolist()],
        "size": (high - low).tolist(),
        "area": area,
        "watertight": watertight,
        "volume": volume if watertight else None,
        "components": int(face_components(mesh).max()) + 1,
        "open_edges": int((edge_faces == 1).sum()),
        "edges_of_more_than_two_faces": int((edge_faces > 2).sum()),
        "normals": mesh.normals is not None,
        "vertex_colours": mesh.colors is not None,
        "uv": None if mesh.uv is None else "per vertex" if mesh.uv_faces is None else "per corner",
        "materials": [_material(material) for material in mesh.materials],
        "warnings": heard,
    }


def inspect_bundle(folder: Path) -> dict[str, Any]:
    """Every file against the manifest, and every tensor against the network that its config builds."""
    from ..bundles.bundle import Bundle, load_bundle

    bundle = load_bundle(folder) if (folder / "pipeline.json").is_file() else Bundle(folder)
    manifest = bundle.manifest
    components = {}
    for name in bundle.components:
        component = bundle.component(name)
        bundle.network(name)
        bundle.release()  # one network in memory at a time
        components[name] = {
            "class": component.class_name,
            "file": component.file,
            "bytes": component.bytes,
            "sha256": component.sha256,
            "dtype": component.dtype,
            "tensors": len(component.tensors),
            "values": sum(math.prod(shape) for _, shape in component.tensors.values()),
        }
    return {
        "file": str(folder),
        "bundle": manifest.name,
        "licence": manifest.licence,
        "format": manifest.format,
        "verified": True,
        "components": components,
        "view_rig": manifest.view_rig,
        "sampling": manifest.sampling,
        "provenance": manifest.provenance,
    }


def _faces_per_edge(mesh: Mesh) -> np.ndarray:
    """How many faces each edge has; faces that use a vertex twice do not count."""
    import numpy as np

    a, b, c = mesh.faces.T
    faces = mesh.faces[(a != b) & (b != c) & (c != a)]
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    return np.unique(edges[:, 0] * len(mesh.vertices) + edges[:, 1], return_counts=True)[1]


def _area_and_volume(mesh: Mesh) -> tuple[float, float]:
    """Surface area, and the enclosed volume (negative when the faces look inwards)."""
    import numpy as np

    corners = mesh.vertices.astype(np.float64)[mesh.faces]
    corners -= corners.mean(axis=(0, 1))  # far from the origin the products would cancel
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(np.linalg.norm(cross, axis=1).sum() / 2), float((corners[:, 0] * cross).sum() / 6)


def _material(material: Material) -> dict[str, Any]:
    pictures = {
        "base_color": material.base_color_texture,
        "metallic_roughness": material.metallic_roughness_texture,
        "normal": material.normal_texture,
    }
    return {
        "name": material.name,
        "base_color": list(material.base_color),
        "metallic": material.metallic,
        "roughness": material.roughness,
        "textures": {key: [p.shape[1], p.shape[0]] for key, p in pictures.items() if p is not None},
    }
