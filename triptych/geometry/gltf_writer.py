"""Writing glTF 2.0: one mesh, one primitive per material, everything in one file.

Vertices are shared by all primitives, so positions keep their number and order. Corner UVs split the vertices on
their seams, because glTF has one index per corner. Vertex colours become linear floats. Every material is
double-sided, since open surfaces are common and an invisible back confuses more than it saves. A round mesh without
normals gets smooth ones: a glTF viewer has to draw it in facets otherwise.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import numpy as np
from PIL import Image

from .colour import colors_to_linear
from .mesh import Material, Mesh, weld_index

_FLOAT, _UINT = 5126, 5125
_VERTEX_BUFFER, _INDEX_BUFFER = 34962, 34963
_ROUND = 0.88  # mean cosine of a face and its corners: a box has .6, a cylinder .86, generated meshes .89 and more


def split_seams(mesh: Mesh) -> Mesh:
    """The same surface with one UV per vertex: vertices on UV seams are repeated. Unchanged without corner UVs."""
    if mesh.uv is None or mesh.uv_faces is None:
        return mesh
    keys = mesh.faces.ravel() * np.int64(len(mesh.uv)) + mesh.uv_faces.ravel()
    pairs, inverse = np.unique(keys, return_inverse=True)
    vertex, uv = np.divmod(pairs, len(mesh.uv))
    return mesh.replace(
        vertices=mesh.vertices[vertex],
        faces=inverse.reshape(-1, 3).astype(np.int64),
        normals=None if mesh.normals is None else mesh.normals[vertex],
        colors=None if mesh.colors is None else mesh.colors[vertex],
        uv=mesh.uv[uv],
        uv_faces=None,
    )


def smooth_normals(mesh: Mesh) -> np.ndarray:
    """(V, 3) float32: the area-weighted mean over the faces that meet at a position, so that UV seams do not show.

    Always of length 1, as glTF asks: a vertex without a surface points up.
    """
    positions, welded = weld_index(mesh.vertices)
    normals = Mesh(positions, welded[mesh.faces]).vertex_normals()[welded]
    normals[~normals.any(axis=1)] = (0, 1, 0)
    return normals


def is_round(mesh: Mesh, normals: np.ndarray) -> bool:
    """Whether most of the surface turns by little at its vertices, which have these normals (V, 3). What has hard
    edges, as a box, is left to the facets that glTF asks for where a file says nothing."""
    corners = mesh.vertices[mesh.faces]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    along = np.einsum("fi,fki->fk", across, normals[mesh.faces]).mean(axis=1)
    return bool(along.sum() > _ROUND * np.linalg.norm(across, axis=1).sum())


def encode_png(picture: np.ndarray) -> bytes:
    """(H, W, 3 or 4) uint8 -> PNG."""
    stream = io.BytesIO()
    # Level 6 halves the size of level 1 for a third of a second at 2048 px; more gains nothing.
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


class _Builder:
    """Collects binary data and the tables that describe it."""

    def __init__(self) -> None:
        self.binary = bytearray()
        self.views: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.image_of: dict[int, int] = {}

    def view(self, data: bytes, target: int | None = None) -> int:
        self.binary.extend(b"\0" * (-len(self.binary) % 4))
        entry = {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)}
        self.views.append(entry | ({"target": target} if target else {}))
        self.binary.extend(data)
        return len(self.views) - 1

    def attribute(self, values: np.ndarray, bounds: bool = False) -> int:
        values = np.ascontiguousarray(values, dtype="<f4")
        entry: dict[str, Any] = {
            "bufferView": self.view(values.tobytes(), _VERTEX_BUFFER),
            "componentType": _FLOAT,
            "count": len(values),
            "type": f"VEC{values.shape[1]}",
        }
        if bounds and len(values):
            entry |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self.accessors.append(entry)
        return len(self.accessors) - 1

    def indices(self, faces: np.ndarray) -> int:
        data = np.ascontiguousarray(faces, dtype="<u4").tobytes()
        view = self.view(data, _INDEX_BUFFER)
        self.accessors.append({"bufferView": view, "componentType": _UINT, "count": faces.size, "type": "SCALAR"})
        return len(self.accessors) - 1

    def texture(self, picture: np.ndarray) -> dict[str, int]:
        """A texture reference; one array is stored once, however many materials show it."""
        if id(picture) not in self.image_of:
            self.image_of[id(picture)] = len(self.images)
            self.images.append({"bufferView": self.view(encode_png(picture)), "mimeType": "image/png"})
        return {"index": self.image_of[id(picture)]}


def _material(builder: _Builder, material: Material, colors: np.ndarray | None) -> dict[str, Any]:
    surface: dict[str, Any] = {
        "baseColorFactor": list(material.base_color),
        "metallicFactor": material.metallic,
        "roughnessFactor": material.roughness,
    }
    entry: dict[str, Any] = {"name": material.name, "pbrMetallicRoughness": surface, "doubleSided": True}
    picture = material.base_color_texture
    if picture is not None:
        surface["baseColorTexture"] = builder.texture(picture)
    if material.metallic_roughness_texture is not None:
        surface["metallicRoughnessTexture"] = builder.texture(material.metallic_roughness_texture)
    if material.normal_texture is not None:
        entry["normalTexture"] = builder.texture(material.normal_texture)
    seen_through = (
        material.base_color[3] < 1
        or (picture is not None and picture.shape[2] == 4 and bool((picture[..., 3] < 255).any()))
        or (colors is not None and bool((colors[:, 3] < 1).any()))
    )
    if seen_through:
        entry["alphaMode"] = "BLEND"
    return entry


def _build(mesh: Mesh, name: str) -> tuple[dict[str, Any], bytes]:
    mesh = split_seams(mesh)
    builder = _Builder()
    attributes = {"POSITION": builder.attribute(mesh.vertices, bounds=True)}
    normals = smooth_normals(mesh) if mesh.normals is None else mesh.normals
    if mesh.normals is not None or is_round(mesh, normals):
        attributes["NORMAL"] = builder.attribute(normals)
    if mesh.uv is not None:
        attributes["TEXCOORD_0"] = builder.attribute(np.stack([mesh.uv[:, 0], 1 - mesh.uv[:, 1]], axis=1))
    if mesh.colors is not None:
        attributes["COLOR_0"] = builder.attribute(colors_to_linear(mesh.colors))
    primitives: list[dict[str, Any]] = []
    for index in range(max(len(mesh.materials), 1)):
        faces = mesh.faces
        if mesh.face_materials is not None:
            faces = faces[mesh.face_materials == index]
        elif index > 0:
            break
        if not len(faces):
            continue
        primitive: dict[str, Any] = {"attributes": attributes, "indices": builder.indices(faces), "mode": 4}
        if mesh.materials:
            primitive["material"] = index
        primitives.append(primitive)
    tree: dict[str, Any] = {
        "asset": {"version": "2.0", "generator": "Triptych"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0, "name": name}],
        "meshes": [{"name": name, "primitives": primitives}],
    }
    if mesh.materials:
        tree["materials"] = [_material(builder, material, mesh.colors) for material in mesh.materials]
    if builder.images:
        tree |= {"images": builder.images, "textures": [{"source": i} for i in range(len(builder.images))]}
    tree |= {"accessors": builder.accessors, "bufferViews": builder.views}
    return tree, bytes(builder.binary)


def encode_glb(mesh: Mesh, name: str = "mesh") -> bytes:
    """A mesh as one binary glTF file."""
    tree, binary = _build(mesh, name)
    binary += b"\0" * (-len(binary) % 4)
    text = json.dumps(tree | {"buffers": [{"byteLength": len(binary)}]}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    length = 12 + 8 + len(text) + 8 + len(binary)
    head = struct.pack("<4sII", b"glTF", 2, length) + struct.pack("<I4s", len(text), b"JSON")
    return head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary


def encode_gltf(mesh: Mesh, name: str = "mesh") -> bytes:
    """A mesh as one JSON glTF file with its buffer embedded."""
    tree, binary = _build(mesh, name)
    uri = "data:application/octet-stream;base64," + base64.b64encode(binary).decode()
    return json.dumps(tree | {"buffers": [{"byteLength": len(binary), "uri": uri}]}).encode()
