"""Meshes -> one ``viewer.html`` that opens anywhere, without a network.

The objects are put into the page as little-endian typed arrays in base64, textures as PNG data URIs. Where the web part
has been built (``python run.py web``) the page holds the same viewer module as the ComfyUI node and the studio page;
elsewhere it is ``template.html``, a smaller WebGL2 viewer that needs no build. Both show the base colour (texture,
vertex colour, factor), metallic and roughness factors. Not shown: normal maps, metallic-roughness textures and
transparency; the mesh files keep them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import TriptychError
from ..geometry.mesh import Material, Mesh

TEMPLATE = Path(__file__).with_name("template.html")
MODULE_PAGE = Path(__file__).with_name("module_page.html")
BUILT_MODULE = Path(__file__).resolve().parents[2] / "web" / "dist" / "viewer.mjs"
TITLE_MARK, SCENE_MARK, MODULE_MARK = "__TRIPTYCH_TITLE__", "__TRIPTYCH_SCENE__", "__TRIPTYCH_MODULE__"


def write_viewer(
    meshes: Mesh | Sequence[Mesh], path: str | Path, *, title: str = "Triptych", names: Sequence[str] = ()
) -> Path:
    """Writes one HTML file that shows ``meshes`` (with a list to choose from when there are several).

    meshes: in the world frame (+Y up, facing +Z), any unit. names: one per mesh; "Object 1", ... without.
    Returns the path. Raises TriptychError for a mesh without faces or with non-finite or out-of-range numbers, and
    when the file cannot be written; then an older file at ``path`` is untouched.
    """
    meshes = [meshes] if isinstance(meshes, Mesh) else list(meshes)
    if not meshes:
        raise TriptychError("a viewer needs at least one mesh, got none")
    if names and len(names) != len(meshes):
        raise TriptychError(f"a viewer needs one name per mesh, got {len(names)} names for {len(meshes)} meshes")
    labels = list(names) or ([title] if len(meshes) == 1 else [f"Object {i + 1}" for i in range(len(meshes))])
    scene = {"objects": [scene_object(mesh, label) for mesh, label in zip(meshes, labels, strict=True)]}
    return _write_whole(Path(path), render_page(scene, title))


def render_page(scene: dict[str, Any], title: str) -> str:
    """The page's text. The scene is JSON inside a script element, so "<" is written as an escape."""
    module = built_module()
    page = (TEMPLATE if module is None else MODULE_PAGE).read_text(encoding="utf-8")
    before, rest = (part.replace(TITLE_MARK, html.escape(title)) for part in page.split(SCENE_MARK))
    data = json.dumps(scene, separators=(",", ":")).replace("<", "\\u003c")
    return before + data + (rest if module is None else rest.replace(MODULE_MARK, module))


def built_module() -> str | None:
    """The built viewer module as text that may stand in a script element; None where it has not been built."""
    try:
        text = BUILT_MODULE.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    # In JavaScript both only occur in strings, where the backslash changes nothing.
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def scene_object(mesh: Mesh, name: str) -> dict[str, Any]:
    """What the page needs of one mesh; array fields are base64 of little-endian typed arrays.

    positions f32 (N, 3), normals i8 (N, 4) unit times 127, uv f32 (N, 2) with t downwards (the picture's first row is
    t = 0) or None, colors u8 (N, 4) sRGB or None, indices u32 (F, 3) grouped by material. A vertex that has several
    UVs is repeated, so N >= V.
    """
    _check(mesh)
    vertex_N, uv_N, faces = _split_corners(mesh)
    order, groups = _material_groups(mesh)
    low, high = mesh.bounds.astype(float)
    colors = None if mesh.colors is None else np.round(np.clip(mesh.colors[vertex_N], 0, 1) * 255).astype(np.uint8)
    return {
        "name": name,
        "vertices": len(mesh.vertices),
        "triangles": len(mesh.faces),
        "bounds": [low.tolist(), high.tolist()],
        "positions": _encode(mesh.vertices[vertex_N].astype("<f4")),
        "normals": _encode(_packed_normals(mesh.vertex_normals()[vertex_N])),
        "uv": None if uv_N is None else _encode((np.array([0, 1]) + uv_N * np.array([1, -1])).astype("<f4")),
        "colors": None if colors is None else _encode(colors),
        "indices": _encode(faces[order].astype("<u4")),
        "groups": groups,
        "materials": [_material(material) for material in mesh.materials or (Material(),)],
    }


def _check(mesh: Mesh) -> None:
    if len(mesh.faces) == 0:
        raise TriptychError("the mesh has no faces: there is nothing to show")
    if not np.isfinite(mesh.vertices).all():
        raise TriptychError("the mesh has vertices that are not finite: clean it before it is shown")
    for what, faces, values in (("faces", mesh.faces, mesh.vertices), ("uv_faces", mesh.uv_faces, mesh.uv)):
        if faces is None or values is None:
            continue
        low, high = int(faces.min()), int(faces.max())
        if low < 0 or high >= len(values):
            raise TriptychError(f"{what} point to {low}..{high}, but there are {len(values)} entries: repair the mesh")


def _split_corners(mesh: Mesh) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Vertex index (N,), UV (N, 2) or None, and faces (F, 3) into them, one entry per used (vertex, UV) pair."""
    corners = mesh.faces.astype(np.int64)
    if mesh.uv is None:
        used, inverse = np.unique(corners, return_inverse=True)
        return used, None, inverse.reshape(-1, 3)
    uv_corners = corners if mesh.uv_faces is None else mesh.uv_faces.astype(np.int64)
    pairs, inverse = np.unique(corners * len(mesh.uv) + uv_corners, return_inverse=True)
    return pairs // len(mesh.uv), mesh.uv[pairs % len(mesh.uv)], inverse.reshape(-1, 3)


def _material_groups(mesh: Mesh) -> tuple[np.ndarray, list[dict[str, int]]]:
    """The faces' order by material, and per material in use its first index and its number of indices."""
    if mesh.face_materials is None:
        return np.arange(len(mesh.faces)), [{"material": 0, "start": 0, "count": 3 * len(mesh.faces)}]
    if mesh.face_materials.min() < 0 or mesh.face_materials.max() >= max(1, len(mesh.materials)):
        raise TriptychError(
            f"face_materials go up to {mesh.face_materials.max()}, but there are {len(mesh.materials)} materials"
        )
    order = np.argsort(mesh.face_materials, kind="stable")
    used, starts, counts = np.unique(mesh.face_materials[order], return_index=True, return_counts=True)
    return order, [
        {"material": int(material), "start": 3 * int(start), "count": 3 * int(count)}
        for material, start, count in zip(used, starts, counts, strict=True)
    ]


def _packed_normals(normals: np.ndarray) -> np.ndarray:
    """(N, 3) float -> (N, 4) int8; the fourth is padding to WebGL's four-byte stride."""
    packed = np.zeros((len(normals), 4), dtype=np.int8)
    packed[:, :3] = np.round(np.clip(np.nan_to_num(normals), -1, 1) * 127)
    return packed


def _material(material: Material) -> dict[str, Any]:
    texture = material.base_color_texture
    return {
        "color": [float(value) for value in material.base_color[:3]],
        "metallic": float(material.metallic),
        "roughness": float(material.roughness),
        "texture": None if texture is None else _data_uri(texture),
    }


def _data_uri(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[..., :3])).save(stream, "PNG", compress_level=6)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _encode(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _write_whole(path: Path, text: str) -> Path:
    """Written beside its name and moved: a page is whole or absent."""
    fresh = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8", newline="\n")
        os.replace(fresh, path)
    except OSError as error:
        if fresh.is_file():
            fresh.unlink()
        reason = error.strerror or error
        raise TriptychError(f"cannot write {path} ({reason}): choose another folder with -o") from error
    return path
