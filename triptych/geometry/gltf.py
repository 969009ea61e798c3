"""Reading glTF 2.0 (.glb, .gltf) into one ``Mesh``.

Our own reader and not trimesh's, for three reasons: every count is checked against the bytes that are there before
anything is allocated, primitives that share their vertices stay shared, and nothing is converted on the way (trimesh
quantises colours to 8 bits and reads linear vertex colours as display values). Follows the Khronos glTF 2.0
specification; KHR_texture_transform, KHR_mesh_quantization, KHR_materials_pbrSpecularGlossiness (diffuse part) and
EXT_texture_webp are understood. Node transforms and skins in the bind pose are applied.

Not covered: Draco and meshopt compression (refused with a sentence), morph targets, animation, point and line
primitives (left out with a MeshWarning), occlusion and emission maps, samplers, mirrored winding of skinned meshes.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np

from ..errors import TriptychError
from .colour import colors_to_srgb
from .limits import (
    MeshWarning,
    ReadLimits,
    check_counts,
    check_present,
    decode_texture,
    read_bytes,
    read_texture,
    resolve_inside,
)
from .mesh import Material, Mesh

_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_UNSUPPORTED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_SPEC_GLOSS = "KHR_materials_pbrSpecularGlossiness"


@dataclass
class _Part:
    """Vertices that one or more primitives share, in world space."""

    vertices: np.ndarray
    faces: list[np.ndarray]
    face_materials: list[np.ndarray]
    normals: np.ndarray | None
    colors: np.ndarray | None
    uv: np.ndarray | None


@dataclass
class _Document:
    path: Path
    limits: ReadLimits
    tree: dict[str, Any]
    binary: bytes | None
    buffers: dict[int, bytes] = field(default_factory=dict)
    accessors: dict[int, np.ndarray] = field(default_factory=dict)
    textures: dict[int, np.ndarray | None] = field(default_factory=dict)

    def item(self, table: str, index: Any) -> dict[str, Any]:
        rows = self.tree.get(table, [])
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(rows):
            raise TriptychError(f"{self.path} names {table}[{index}], but there are {len(rows)}: the file is damaged")
        return rows[index]

    def buffer(self, index: int) -> bytes:
        if index not in self.buffers:
            uri = self.item("buffers", index).get("uri")
            if uri is None:
                if index != 0 or self.binary is None:
                    raise TriptychError(f"{self.path} has no binary chunk for buffers[{index}]: the file is truncated")
                self.buffers[index] = self.binary
            elif uri.startswith("data:"):
                self.buffers[index] = _data_uri(self.path, uri)
            else:
                self.buffers[index] = read_bytes(resolve_inside(self.path, uri, percent_encoded=True), self.limits)
        return self.buffers[index]

    def view(self, index: int) -> tuple[memoryview, int | None]:
        """The bytes of a buffer view, and its stride."""
        entry = self.item("bufferViews", index)
        data = memoryview(self.buffer(entry["buffer"]))
        offset, length = int(entry.get("byteOffset", 0)), int(entry["byteLength"])
        if offset < 0 or length < 0 or offset + length > len(data):
            raise TriptychError(
                f"{self.path} bufferViews[{index}] covers bytes {offset:,} to {offset + length:,} of a buffer of "
                f"{len(data):,}: the file is truncated or damaged"
            )
        return data[offset : offset + length], entry.get("byteStride")

    def accessor(self, index: int) -> np.ndarray:
        """(count, width) in the stored type, or float32 when the accessor is normalised."""
        if index in self.accessors:
            return self.accessors[index]
        entry = self.item("accessors", index)
        dtype, width, count = np.dtype(_COMPONENTS[entry["componentType"]]), _WIDTHS[entry["type"]], int(entry["count"])
        # One index is a third of a face, so this is generous for vertices too.
        check_counts(self.path, self.limits, faces=-(-count // 3))
        if "bufferView" in entry:
            data, stride = self.view(entry["bufferView"])
            values = self._strided(data, stride, int(entry.get("byteOffset", 0)), dtype, width, count)
        else:
            check_counts(self.path, self.limits, vertices=count)
            values = np.zeros((count, width), dtype)
        if "sparse" in entry:
            values = self._sparse(values, entry["sparse"], dtype, width)
        if entry.get("normalized") and dtype.kind in "iu":
            values = np.maximum(values / np.float32(np.iinfo(dtype).max), -1).astype(np.float32)
        self.accessors[index] = values
        return values

    def _strided(
        self, data: memoryview, stride: Any, offset: int, dtype: np.dtype, width: int, count: int
    ) -> np.ndarray:
        row = dtype.itemsize * width
        step = int(stride) if stride else row
        if offset < 0 or step < row:
            raise TriptychError(
                f"{self.path} has an accessor with offset {offset} and stride {step}: the file is damaged"
            )
        needed = offset + step * (count - 1) + row if count else 0
        check_present(self.path, "accessor elements", count, needed, len(data))
        return (
            np.ndarray((count, width), dtype, data, offset, (step, dtype.itemsize))
            if count
            else np.zeros((0, width), dtype)
        )

    def _sparse(self, values: np.ndarray, entry: dict[str, Any], dtype: np.dtype, width: int) -> np.ndarray:
        count, where, what = int(entry["count"]), entry["indices"], entry["values"]
        data, _ = self.view(where["bufferView"])
        kind = np.dtype(_COMPONENTS[where["componentType"]])
        rows = self._strided(data, None, int(where.get("byteOffset", 0)), kind, 1, count)[:, 0]
        data, _ = self.view(what["bufferView"])
        values = values.copy()
        values[rows] = self._strided(data, None, int(what.get("byteOffset", 0)), dtype, width, count)
        return values

    def image(self, reference: dict[str, Any] | None) -> np.ndarray | None:
        """A texture reference -> (H, W, 3 or 4) uint8 or None."""
        if reference is None:
            return None
        texture = self.item("textures", reference["index"])
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        source = texture.get("source", webp.get("source"))
        if source is None:
            warnings.warn(
                f"{self.path} has a texture in a format this reader lacks: it is left out", MeshWarning, stacklevel=2
            )
            return None
        if source not in self.textures:
            self.textures[source] = self._decode(source)
        return self.textures[source]

    def _decode(self, source: int) -> np.ndarray | None:
        entry = self.item("images", source)
        what = f"images[{source}] of {self.path}"
        uri = entry.get("uri")
        if uri is None:
            return decode_texture(bytes(self.view(entry["bufferView"])[0]), what, self.limits)
        if uri.startswith("data:"):
            return decode_texture(_data_uri(self.path, uri), what, self.limits)
        return read_texture(self.path, uri, self.limits, percent_encoded=True)


def read_gltf(path: Path, data: bytes, limits: ReadLimits) -> Mesh:
    """The default scene of a .glb or .gltf file as one mesh; TriptychError for anything that cannot be trusted."""
    tree, binary = _split_glb(path, data) if data[:4] == b"glTF" else (data, None)
    parsed = json.loads(bytes(tree).decode("utf-8-sig"))
    if not isinstance(parsed, dict) or "asset" not in parsed:
        raise TriptychError(f"{path} is JSON but not glTF (no 'asset'): export it again as GLB")
    version = str(parsed["asset"].get("version", "?"))
    if not version.startswith("2"):
        raise TriptychError(f"{path} is glTF version {version[:20]}, and version 2 is read: convert it to glTF 2.0")
    needed = [name for name in parsed.get("extensionsRequired", []) if name in _UNSUPPORTED]
    if needed:
        raise TriptychError(
            f"{path} is compressed with {needed[0]}, which is not read here: export it without compression"
        )
    document = _Document(path, limits, parsed, binary)
    parts, materials = _read_scene(document)
    return _join(parts, materials)


def _split_glb(path: Path, data: bytes) -> tuple[bytes, bytes | None]:
    if len(data) < 20:
        raise TriptychError(f"{path} has {len(data)} bytes, less than a GLB header: the file is truncated")
    _, version, length = struct.unpack_from("<4sII", data)
    if version != 2:
        raise TriptychError(f"{path} is GLB version {version}, and version 2 is read: convert it to glTF 2.0")
    if length > len(data):
        raise TriptychError(
            f"{path} declares {length:,} bytes but has {len(data):,}: the file is truncated, download it again"
        )
    chunks: dict[bytes, bytes] = {}
    offset = 12
    while offset + 8 <= length:
        size, kind = struct.unpack_from("<I4s", data, offset)
        check_present(path, "bytes of a chunk", size, size, length - offset - 8)
        chunks.setdefault(kind, data[offset + 8 : offset + 8 + size])
        offset += 8 + size + (-size % 4)
    if b"JSON" not in chunks:
        raise TriptychError(f"{path} has no JSON chunk: the file is damaged, export it again")
    return chunks[b"JSON"], chunks.get(b"BIN\0")


def _data_uri(path: Path, uri: str) -> bytes:
    head, _, body = uri.partition(",")
    try:
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except binascii.Error as error:
        raise TriptychError(f"{path} has a data: URI that is not base64 ({error}): the file is damaged") from error


def _read_scene(document: _Document) -> tuple[list[_Part], list[Material]]:
    """Walk the scene graph; a mesh that several nodes show is placed once for each."""
    worlds = _world_matrices(document)
    materials: list[Material] = []
    slots: dict[int | None, int] = {}
    parts: list[_Part] = []
    vertices = faces = 0
    for index, world in worlds.items():
        node = document.item("nodes", index)
        if "mesh" not in node:
            continue
        for group in _primitive_groups(document, node["mesh"]):
            part = _read_group(document, group, slots, materials)
            if part is None:
                continue
            vertices, faces = vertices + len(part.vertices), faces + sum(map(len, part.faces))
            check_counts(document.path, document.limits, vertices, faces)
            joints = _joint_matrices(document, node.get("skin"), worlds)
            _place(document, part, group[0]["attributes"], world, joints)
            parts.append(part)
    return parts, materials


def _world_matrices(document: _Document) -> dict[int, np.ndarray]:
    """Node index -> (4, 4) float64 world matrix, in the order of a depth-first walk of the default scene."""
    tree = document.tree
    if tree.get("scenes"):
        roots = document.item("scenes", tree.get("scene", 0)).get("nodes", [])
    else:
        children = {child for node in tree.get("nodes", []) for child in node.get("children", [])}
        roots = [index for index in range(len(tree.get("nodes", []))) if index not in children]
    worlds: dict[int, np.ndarray] = {}
    stack = [(index, np.eye(4)) for index in reversed(roots)]
    while stack:
        index, parent = stack.pop()
        node = document.item("nodes", index)
        if index in worlds:
            raise TriptychError(
                f"{document.path} reaches nodes[{index}] twice: its scene graph is not a tree, export it again"
            )
        worlds[index] = parent @ _local_matrix(node)
        stack.extend((child, worlds[index]) for child in reversed(node.get("children", [])))
    return worlds


def _local_matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.array(node.get("scale", (1, 1, 1)), np.float64)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _primitive_groups(document: _Document, mesh_index: int) -> list[list[dict[str, Any]]]:
    """The triangle primitives of a mesh, grouped by the vertices that they share."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for primitive in document.item("meshes", mesh_index)["primitives"]:
        if primitive.get("mode", 4) not in (4, 5, 6):
            warnings.warn(f"{document.path} has points or lines: they are left out", MeshWarning, stacklevel=2)
        elif any(name in primitive.get("extensions", {}) for name in _UNSUPPORTED):
            raise TriptychError(
                f"{document.path} has compressed geometry, which is not read here: export it without compression"
            )
        else:
            uses_set = _uv_set(document, primitive.get("material"))
            groups.setdefault((*sorted(primitive["attributes"].items()), repr(uses_set)), []).append(primitive)
    return list(groups.values())


def _color_reference(material: dict[str, Any]) -> dict[str, Any] | None:
    gloss = material.get("extensions", {}).get(_SPEC_GLOSS)
    if gloss is not None:
        return gloss.get("diffuseTexture")
    return material.get("pbrMetallicRoughness", {}).get("baseColorTexture")


def _uv_set(document: _Document, material_index: Any) -> tuple[int, dict[str, Any]]:
    """Which TEXCOORD set a material's pictures use, and its KHR_texture_transform."""
    if material_index is None:
        return 0, {}
    material = document.item("materials", material_index)
    reference = _color_reference(material) or material.get("normalTexture") or {}
    transform = reference.get("extensions", {}).get("KHR_texture_transform", {})
    return int(transform.get("texCoord", reference.get("texCoord", 0))), transform


def _read_group(
    document: _Document, group: list[dict[str, Any]], slots: dict[int | None, int], materials: list[Material]
) -> _Part | None:
    attributes = group[0]["attributes"]
    if "POSITION" not in attributes:
        return None
    vertices = document.accessor(attributes["POSITION"]).astype(np.float32)
    faces, face_materials = [], []
    for primitive in group:
        triangles = _triangles(document, primitive, len(vertices))
        key = primitive.get("material")
        if key not in slots:
            slots[key] = len(materials)
            materials.append(_read_material(document, key))
        faces.append(triangles)
        face_materials.append(np.full(len(triangles), slots[key], np.int64))
    uv_set, transform = _uv_set(document, group[0].get("material"))
    uv = _attribute(document, attributes, f"TEXCOORD_{uv_set}", len(vertices))
    colors = _attribute(document, attributes, "COLOR_0", len(vertices))
    return _Part(
        vertices=vertices,
        faces=faces,
        face_materials=face_materials,
        normals=_attribute(document, attributes, "NORMAL", len(vertices)),
        colors=None if colors is None else colors_to_srgb(colors),
        uv=None if uv is None else _flip_uv(uv, transform),
    )


def _attribute(document: _Document, attributes: dict[str, int], name: str, count: int) -> np.ndarray | None:
    if name not in attributes:
        return None
    values = document.accessor(attributes[name])
    if len(values) != count:
        raise TriptychError(
            f"{document.path} has {len(values)} {name} for {count} vertices: the file is damaged, export it again"
        )
    return values


def _flip_uv(uv: np.ndarray, transform: dict[str, Any]) -> np.ndarray:
    """glTF's v runs down the picture; ours runs up."""
    uv = uv[:, :2].astype(np.float32)
    if transform:
        angle = float(transform.get("rotation", 0.0))
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        uv = (uv * np.array(transform.get("scale", (1, 1)))) @ turn.T + np.array(transform.get("offset", (0, 0)))
    return np.stack([uv[:, 0], 1 - uv[:, 1]], axis=1).astype(np.float32)


def _triangles(document: _Document, primitive: dict[str, Any], vertex_count: int) -> np.ndarray:
    """(F, 3) int64; strips and fans are unrolled, and indices checked."""
    if "indices" in primitive:
        indices = document.accessor(primitive["indices"])[:, 0].astype(np.int64)
    else:
        indices = np.arange(vertex_count)
    if len(indices) and (indices.max() >= vertex_count or indices.min() < 0):
        raise TriptychError(
            f"{document.path} has a face that uses vertex {int(indices.max())} of {vertex_count}: "
            "the file is damaged, export it again"
        )
    mode = primitive.get("mode", 4)
    if mode == 4:
        return indices[: len(indices) // 3 * 3].reshape(-1, 3)
    if len(indices) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 6:
        return np.stack([np.full(len(indices) - 2, indices[0]), indices[1:-1], indices[2:]], axis=1)
    strip = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
    strip[1::2] = strip[1::2, [1, 0, 2]]
    return strip[(strip[:, 0] != strip[:, 1]) & (strip[:, 1] != strip[:, 2]) & (strip[:, 0] != strip[:, 2])]


def _joint_matrices(document: _Document, skin_index: int | None, worlds: dict[int, np.ndarray]) -> np.ndarray | None:
    """(J, 4, 4) matrices that take a skinned mesh to its bind pose in the world, or None."""
    if skin_index is None:
        return None
    skin = document.item("skins", skin_index)
    if any(joint not in worlds for joint in skin["joints"]):
        return None  # a skeleton outside the scene: the stored positions are the best there is
    joints = np.stack([worlds[joint] for joint in skin["joints"]])
    if "inverseBindMatrices" in skin:
        inverse = document.accessor(skin["inverseBindMatrices"])[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
        joints = joints @ inverse.astype(np.float64)
    return joints


def _place(
    document: _Document, part: _Part, attributes: dict[str, int], world: np.ndarray, joints: np.ndarray | None
) -> None:
    """Move a part into the world: by its skin when it has one (its node then has no say), else by its node."""
    skinned = joints is not None and "JOINTS_0" in attributes and "WEIGHTS_0" in attributes
    if not skinned and np.array_equal(world, np.eye(4)):
        return
    if skinned and joints is not None:
        which = document.accessor(attributes["JOINTS_0"]).astype(np.int64)
        weights = document.accessor(attributes["WEIGHTS_0"]).astype(np.float64)
        if (
            which.max(initial=0) >= len(joints)
            or len(which) != len(part.vertices)
            or len(weights) != len(part.vertices)
        ):
            raise TriptychError(
                f"{document.path} has skin weights that do not fit its skeleton: export it without the skin"
            )
        total = weights.sum(axis=1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        linear = np.einsum("vj,vjab->vab", weights, joints[which])
        part.vertices = (np.einsum("vab,vb->va", linear[:, :3, :3], part.vertices) + linear[:, :3, 3]).astype(
            np.float32
        )
        if part.normals is not None:
            part.normals = _unit(np.einsum("vab,vb->va", linear[:, :3, :3], part.normals))
        return
    part.vertices = (part.vertices.astype(np.float64) @ world[:3, :3].T + world[:3, 3]).astype(np.float32)
    determinant = np.linalg.det(world[:3, :3])
    if determinant < 0:  # a mirror turns faces inside out
        part.faces = [faces[:, ::-1] for faces in part.faces]
    if part.normals is not None:
        # The cofactor matrix is the inverse transpose times the determinant, and exists for flattened parts too.
        a, b, c = world[:3, :3].T
        cofactor = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=1)
        part.normals = _unit(part.normals @ cofactor.T * np.sign(determinant or 1))


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors, np.float64), where=length > 0).astype(np.float32)


def _read_material(document: _Document, index: int | None) -> Material:
    if index is None:
        return Material()
    entry = document.item("materials", index)
    surface = entry.get("pbrMetallicRoughness", {})
    gloss = entry.get("extensions", {}).get(_SPEC_GLOSS)
    factor = gloss.get("diffuseFactor") if gloss is not None else surface.get("baseColorFactor")
    color = np.array([1.0, 1.0, 1.0, 1.0] if factor is None else factor, np.float64).clip(0, 1)
    texture = document.image(_color_reference(entry))
    if entry.get("alphaMode", "OPAQUE") == "OPAQUE":  # then alpha means nothing, and often holds garbage
        color[3] = 1.0
        texture = None if texture is None else texture[..., :3]
    roughness = (
        1 - float(gloss.get("glossinessFactor", 1)) if gloss is not None else float(surface.get("roughnessFactor", 1))
    )
    return Material(
        name=str(entry.get("name") or f"material_{index}"),
        base_color=(float(color[0]), float(color[1]), float(color[2]), float(color[3])),
        base_color_texture=texture,
        metallic=0.0 if gloss is not None else float(np.clip(surface.get("metallicFactor", 1), 0, 1)),
        roughness=float(np.clip(roughness, 0, 1)),
        metallic_roughness_texture=_rgb(document.image(surface.get("metallicRoughnessTexture"))),
        normal_texture=_rgb(document.image(entry.get("normalTexture"))),
    )


def _rgb(picture: np.ndarray | None) -> np.ndarray | None:
    return None if picture is None else picture[..., :3]


def _join(parts: list[_Part], materials: list[Material]) -> Mesh:
    """All parts as one mesh: missing colours are white, missing UVs zero; normals are kept when every part has them."""
    if not parts:
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    faces = np.concatenate([block + start for part, start in zip(parts, starts, strict=False) for block in part.faces])
    which = np.concatenate([block for part in parts for block in part.face_materials])
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.ascontiguousarray(faces, np.int64),
        normals=_stack([part.normals for part in parts], None, 3, parts),
        colors=_stack([part.colors for part in parts], 1.0, 4, parts),
        uv=_stack([part.uv for part in parts], 0.0, 2, parts),
        materials=tuple(materials),
        face_materials=which if len(materials) > 1 else None,
    )


def _stack(arrays: list[np.ndarray | None], fill: float | None, width: int, parts: list[_Part]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    if not present or (fill is None and len(present) < len(arrays)):
        return None
    filled = [
        np.full((len(part.vertices), width), fill if fill is not None else 0.0) if array is None else array
        for array, part in zip(arrays, parts, strict=True)
    ]
    return np.concatenate(filled).astype(np.float32)
