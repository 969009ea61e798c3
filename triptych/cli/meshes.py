"""``convert``, ``render`` and ``compare``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ..errors import TriptychError
from .arguments import FORMATS
from .output import Export
from .report import heard_warnings, to_json, warn

if TYPE_CHECKING:
    from ..geometry.cameras import Camera
    from ..geometry.mesh import Mesh


def convert(args: argparse.Namespace) -> int:
    suffix = args.target.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise TriptychError(f"{args.target} has no suffix of a mesh format: use one of {', '.join(FORMATS)}")
    from ..geometry.files import read_mesh, write_mesh

    with heard_warnings() as heard, Export(args.target.parent, overwrite=args.overwrite) as export:
        source = read_mesh(args.source)
        mesh = _processed(source, args)
        for sentence in _losses(source, mesh, suffix):
            heard.append(sentence)
            warn(sentence)
        write_mesh(mesh, export.place(args.target.name))
        files = export.commit()
    print(to_json({
        "files": [str(path) for path in files],
        "source": {"file": str(args.source), "vertices": len(source.vertices), "faces": len(source.faces)},
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "warnings": heard,
    }))  # fmt: skip
    return 0


def _processed(mesh: Mesh, args: argparse.Namespace) -> Mesh:
    """The cleaning steps, in the order of the help text."""
    from ..geometry import cleanup

    if args.clean or args.fill_holes or args.smooth:
        mesh = cleanup.weld(mesh)  # else every UV seam is a border
    if args.clean:
        mesh = cleanup.keep_components(cleanup.remove_degenerate(mesh), min_share=0.01)
        if not len(mesh.faces):
            raise TriptychError(f"{args.source} has only degenerate faces: nothing is left after --clean")
    if args.fill_holes:
        mesh = cleanup.fill_holes(mesh)
    if args.smooth:
        mesh = cleanup.smooth(mesh, iterations=args.smooth)
    if args.faces:
        mesh = cleanup.decimate(mesh, args.faces)
    return mesh.normalized() if args.normalize else mesh


def _losses(source: Mesh, mesh: Mesh, suffix: str) -> list[str]:
    """What the result does not carry any more."""
    lost = []
    if source.uv is not None and mesh.uv is None:
        lost.append("--faces drops UV and materials: the result has no texture")
    textured = any(material.base_color_texture is not None for material in mesh.materials)
    if textured and suffix in ("ply", "stl", "off"):
        lost.append(f"{suffix.upper()} holds no textures: they are left out")
    if mesh.colors is not None and suffix in ("stl", "off"):
        lost.append(f"{suffix.upper()} holds no vertex colours: they are left out")
    return lost


def render(args: argparse.Namespace) -> int:
    if args.out.suffix.lower() != ".png":
        raise TriptychError(f"-o {args.out} must end in .png: pictures are written as PNG")
    if not -90 < args.elevation < 90:
        raise TriptychError(f"--elevation must lie between -90 and 90 degrees, got {args.elevation:g}")
    count = args.turntable or 8
    azimuths = args.azimuths or [360 * i / count for i in range(count)]
    from ..geometry.files import read_mesh
    from ..render.sheets import contact_sheet
    from ..render.views import render_mesh

    with heard_warnings(), Export(args.out.parent, overwrite=args.overwrite) as export:
        if args.out.exists() and not args.overwrite:  # known before the work
            raise TriptychError(f"{args.out} exists already: choose another name, or add --overwrite")
        mesh = read_mesh(args.source).normalized()
        cameras = _cameras(mesh, azimuths, args.elevation)
        pictures = render_mesh(mesh, cameras, args.size, args.mode, follow_camera=True)
        rows = list(pictures.split(8))
        contact_sheet(rows, export.place(args.out.name))
        files = export.commit()
    print(to_json({"files": [str(path) for path in files], "azimuths_deg": azimuths, "mode": args.mode}))
    return 0


def _cameras(mesh: Mesh, azimuths_deg: Sequence[float], elevation_deg: float) -> list[Camera]:
    """Orthographic cameras of one frame that just holds the mesh from all of them."""
    import numpy as np
    import torch

    from ..geometry.cameras import Camera

    cameras = [Camera(azimuth, elevation_deg, half_extent=1.0) for azimuth in azimuths_deg]
    vertices = torch.tensor(mesh.vertices[np.unique(mesh.faces)])
    reach = max(float(camera.project(vertices)[0].abs().max()) for camera in cameras)
    return [replace(camera, half_extent=1.06 * reach) for camera in cameras]


def compare(args: argparse.Namespace) -> int:
    from ..geometry.files import read_mesh
    from ..geometry.metrics import compare_meshes

    with heard_warnings() as heard:
        meshes = [read_mesh(path) for path in (args.a, args.b)]
        if args.align == "normalize":
            meshes = [mesh.normalized() for mesh in meshes]
        found = compare_meshes(*meshes, samples=args.samples, thresholds=args.thresholds, seed=args.seed)
    print(to_json({
        "a": str(args.a),
        "b": str(args.b),
        "align": args.align,
        "samples": args.samples,
        **asdict(found),
        "warnings": heard,
    }))  # fmt: skip
    return 0
