"""Writing Wavefront OBJ + MTL + PNG, as bytes by file name.

Numbers carry nine digits, so that float32 coordinates come back exactly. A ``usemtl`` stands wherever the material
changes, so that faces keep their order. Vertex colours are the ``v x y z r g b`` extension, in sRGB; their alpha has
no place in OBJ. ``Kd`` is written in sRGB, as viewers show it.
"""

from __future__ import annotations

import re

import numpy as np

from .colour import linear_to_srgb
from .gltf_writer import encode_png
from .mesh import Material, Mesh

_CHUNK = 1 << 15  # rows formatted at a time, which bounds the memory


def encode_obj(mesh: Mesh, stem: str) -> dict[str, bytes]:
    """File names -> contents: pictures first, then ``<stem>.mtl``, and ``<stem>.obj`` last."""
    files: dict[str, bytes] = {}
    materials = mesh.materials
    labels = unique_labels([material.name for material in materials])
    if materials:
        names: dict[int, str] = {}
        blocks = [
            _material(m, label, stem, len(materials) > 1, files, names)
            for m, label in zip(materials, labels, strict=True)
        ]
        files[f"{stem}.mtl"] = "\n".join(blocks).encode()
    files[f"{stem}.obj"] = _geometry(mesh, stem, labels)
    return files


def unique_labels(names: list[str]) -> list[str]:
    """Material names as one word each that is safe in a file name, and distinct whatever the case."""
    labels: list[str] = []
    taken: set[str] = set()
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[:60] or "material"
        label, number = base, 1
        while label.lower() in taken:
            number += 1
            label = f"{base}_{number}"
        taken.add(label.lower())
        labels.append(label)
    return labels


def _material(m: Material, label: str, stem: str, several: bool, files: dict[str, bytes], names: dict[int, str]) -> str:
    prefix = f"{stem}_{label}" if several else stem

    def picture(array: np.ndarray, suffix: str) -> str:
        if id(array) not in names:  # one picture shown by several materials is one file
            names[id(array)] = f"{prefix}_{suffix}.png"
            files[names[id(array)]] = encode_png(array)
        return names[id(array)]

    red, green, blue = linear_to_srgb(np.array(m.base_color[:3]))
    lines = [
        f"newmtl {label}",
        f"Kd {red:.8f} {green:.8f} {blue:.8f}",
        "Ks 0 0 0",
        f"d {m.base_color[3]:.6g}",
        "illum 1",
    ]
    lines += [f"Pr {m.roughness:.6g}", f"Pm {m.metallic:.6g}"]
    if m.base_color_texture is not None:
        lines.append(f"map_Kd {picture(m.base_color_texture, 'albedo')}")
    if m.metallic_roughness_texture is not None:
        name = picture(m.metallic_roughness_texture, "metallic_roughness")
        lines += [f"map_Pr -imfchan g {name}", f"map_Pm -imfchan b {name}"]
    if m.normal_texture is not None:
        name = picture(m.normal_texture, "normal")
        lines += [f"map_Bump {name}", f"norm {name}"]
    return "\n".join(lines) + "\n"


def _geometry(mesh: Mesh, stem: str, labels: list[str]) -> bytes:
    parts = [f"# Triptych, +Y up, {len(mesh.vertices)} vertices, {len(mesh.faces)} faces\n"]
    if labels:
        parts.append(f"mtllib {stem}.mtl\n")
    parts.append(f"o {re.sub(chr(92) + 's+', '_', stem)}\n")
    rows = mesh.vertices.astype(np.float64)
    if mesh.colors is None:
        parts += _format("v %.9g %.9g %.9g\n", rows)
    else:
        parts += _format("v %.9g %.9g %.9g %.6f %.6f %.6f\n", np.concatenate([rows, mesh.colors[:, :3]], axis=1))
    if mesh.uv is not None:
        parts += _format("vt %.9g %.9g\n", mesh.uv.astype(np.float64))
    if mesh.normals is not None:
        parts += _format("vn %.6f %.6f %.6f\n", mesh.normals.astype(np.float64))
    parts += _faces(mesh, labels)
    return "".join(parts).encode()


def _faces(mesh: Mesh, labels: list[str]) -> list[str]:
    faces = mesh.faces + 1
    uv_faces = faces if mesh.uv_faces is None else mesh.uv_faces + 1
    if mesh.uv is not None and mesh.normals is not None:
        corner, columns = "%d/%d/%d", [faces, uv_faces, faces]
    elif mesh.uv is not None:
        corner, columns = "%d/%d", [faces, uv_faces]
    elif mesh.normals is not None:
        corner, columns = "%d//%d", [faces, faces]
    else:
        corner, columns = "%d", [faces]
    template = f"f {corner} {corner} {corner}\n"
    table = np.stack(columns, axis=2).reshape(len(faces), 3 * len(columns))
    if not labels:
        return _format(template, table)
    which = np.zeros(len(faces), np.int64) if mesh.face_materials is None else mesh.face_materials
    starts = np.flatnonzero(np.diff(which, prepend=-1))
    parts: list[str] = []
    for start, stop in zip(starts, [*starts[1:], len(which)], strict=True):
        parts.append(f"usemtl {labels[which[start]]}\n")
        parts += _format(template, table[start:stop])
    return parts


def _format(template: str, rows: np.ndarray) -> list[str]:
    """One line per row; formatting many rows in one operation is ten times as fast as one by one."""
    blocks = (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
    return [(template * len(block)) % tuple(block.ravel().tolist()) for block in blocks]
