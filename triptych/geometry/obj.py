"""Reading Wavefront OBJ + MTL into one ``Mesh``.

Vertices keep their order and number: UV seams stay corner UVs (``uv_faces``), and vertex colours are the common
``v x y z r g b`` extension (sRGB). Polygons are triangulated; groups, objects, smoothing groups, lines and curves are
not kept. Normals are kept when each vertex has one; where a vertex has several (hard edges) they are dropped, and the
mesh computes its own.

MTL: ``Kd`` and ``map_Kd`` (read as sRGB, as most viewers show them), ``d``/``Tr``, ``map_Bump``/``bump``/``norm`` as a
tangent-space normal map, and the physically based extension ``Pr``, ``Pm``, ``map_Pr``, ``map_Pm``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import TriptychError
from .colour import srgb_to_linear
from .limits import MeshWarning, ReadLimits, check_counts, read_bytes, read_texture, resolve_inside
from .mesh import Material, Mesh
from .polygons import triangulate

_BUMP = ("map_bump", "bump", "norm", "map_norm", "map_kn")
# Options of texture statements and how many values follow them (MTL specification); -o, -s and -t take one to three.
_OPTIONS = {
    "-blendu": 1,
    "-blendv": 1,
    "-cc": 1,
    "-clamp": 1,
    "-texres": 1,
    "-bm": 1,
    "-boost": 1,
    "-imfchan": 1,
    "-type": 1,
    "-mm": 2,
}
_OPTIONS_UP_TO_3 = ("-o", "-s", "-t")


@dataclass
class _Records:
    """The statements of an OBJ file, still as text."""

    positions: list[bytes] = field(default_factory=list)
    uvs: list[bytes] = field(default_factory=list)
    normals: list[bytes] = field(default_factory=list)
    faces: list[bytes] = field(default_factory=list)
    material_changes: list[tuple[int, str]] = field(default_factory=list)  # (first face, material name)
    libraries: list[str] = field(default_factory=list)


def read_obj(path: Path, data: bytes, limits: ReadLimits) -> Mesh:
    """An OBJ file, its MTL libraries and textures as one mesh; TriptychError for anything that cannot be trusted."""
    if b"\0" in data[:4096]:
        raise TriptychError(f"{path} holds binary data, and an OBJ file is text: check its type")
    records = _collect(data)
    check_counts(path, limits, len(records.positions), len(records.faces))
    positions = _rows(path, "v", records.positions, (3, 4, 6, 7))
    uvs = _rows(path, "vt", records.uvs, (2, 3, 1))
    normals = _rows(path, "vn", records.normals, (3,))
    corners, source = _read_faces(path, records.faces, positions[:, :3], limits)
    _check_indices(path, corners, (len(positions), len(uvs), len(normals)))
    faces = corners[:, :, 0] - 1
    uv, uv_faces = _uv(uvs, corners[:, :, 1] - 1, faces, len(positions))
    materials, face_materials = _materials(path, records, source, limits)
    width = positions.shape[1]
    colors = None
    if width >= 6:
        shown = np.clip(positions[:, width - 3 :], 0, 1)
        colors = np.concatenate([shown, np.ones((len(shown), 1))], axis=1).astype(np.float32)
    with np.errstate(over="ignore"):
        vertices = positions[:, :3].astype(np.float32)
    return Mesh(
        vertices=vertices,
        faces=faces,
        normals=_vertex_normals(normals, corners[:, :, 2] - 1, faces, len(positions)),
        colors=colors,
        uv=uv,
        uv_faces=uv_faces,
        materials=materials,
        face_materials=face_materials,
    )


def _collect(data: bytes) -> _Records:
    records = _Records()
    positions, uvs, normals, faces = records.positions, records.uvs, records.normals, records.faces
    text = data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ").replace(b"\t", b" ")
    for line in text.splitlines():
        head = line[:2]
        if head not in (b"v ", b"vt", b"vn", b"f ") and line[:1] in b" umfv":  # the rest, and indented statements
            line = line.strip()
            head = line[:2]
        if head == b"v ":
            positions.append(line[2:])
        elif head == b"f ":
            face = line[2:]
            if b"-" in face:
                face = _absolute(face, (len(positions), len(uvs), len(normals)))
            faces.append(face)
        elif head == b"vt":
            uvs.append(line[3:])
        elif head == b"vn":
            normals.append(line[3:])
        elif line.startswith(b"usemtl "):
            records.material_changes.append((len(faces), _text(line[7:])))
        elif line.startswith(b"mtllib "):
            records.libraries.append(_text(line[7:]))
    return records


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace").strip()


def _absolute(face: bytes, counts: tuple[int, int, int]) -> bytes:
    """Relative indices (-1 is the latest) -> absolute ones; what is not a number is left for the parser to name."""
    corners = []
    for corner in face.split(b"#")[0].split():
        slots = corner.split(b"/")
        for i, slot in enumerate(slots[:3]):
            if slot.startswith(b"-") and slot[1:].isdigit():
                slots[i] = str(counts[i] + 1 + int(slot)).encode() if int(slot) else b"0"
        corners.append(b"/".join(slots))
    return b" ".join(corners)


def _rows(path: Path, what: str, lines: list[bytes], widths: tuple[int, ...]) -> np.ndarray:
    """(N, W) float64 of the statements ``what``; W is the first statement's width, and all must have it."""
    if not lines:
        return np.zeros((0, max(widths[0], 2)))
    if any(b"#" in line for line in lines):
        lines = [line.split(b"#")[0] for line in lines]
    tokens = [line.split() for line in lines]
    width = len(tokens[0])
    ragged = next((i for i, row in enumerate(tokens) if len(row) != width), None)
    if ragged is not None:
        # Files that colour only some vertices exist: the plain coordinates are what all have in common.
        width = widths[0]
        tokens = [row[:width] for row in tokens]
        ragged = next((i for i, row in enumerate(tokens) if len(row) != width), None)
    if ragged is not None or width not in widths:
        row = tokens[ragged or 0]
        raise TriptychError(
            f"{path}: '{what}' statement {(ragged or 0) + 1} has {len(row)} numbers, not {widths[0]}: "
            "the file is truncated or damaged"
        )
    try:
        return np.array([float(token) for row in tokens for token in row]).reshape(len(tokens), width)
    except ValueError as error:
        raise TriptychError(
            f"{path}: a '{what}' statement is not numeric ({error}): the file is damaged, export it again"
        ) from error


def _read_faces(
    path: Path, lines: list[bytes], positions: np.ndarray, limits: ReadLimits
) -> tuple[np.ndarray, np.ndarray]:
    """Face statements -> (F, 3, 3) int64 one-based v, vt, vn per corner (0 where absent), and each one's statement."""
    by_shape: dict[tuple[int, int, bool], tuple[list[int], list[bytes]]] = {}
    for index, line in enumerate(lines):
        if b"#" in line:
            line = line.split(b"#")[0]
        shape = (len(line.split()), line.count(b"/"), b"//" in line)
        rows, texts = by_shape.setdefault(shape, ([], []))
        rows.append(index)
        texts.append(line)
    check_counts(path, limits, faces=sum(max(shape[0] - 2, 0) * len(rows) for shape, (rows, _) in by_shape.items()))
    blocks, sources = [np.zeros((0, 3, 3), np.int64)], [np.zeros(0, np.int64)]
    for (corners, slashes, empty), (rows, texts) in by_shape.items():
        if corners < 3:
            warnings.warn(
                f"{path} has {len(rows)} faces of {corners} corners: they are left out", MeshWarning, stacklevel=2
            )
            continue
        polygons = _face_indices(path, texts, corners, slashes, empty)
        safe = np.clip(polygons[:, :, 0] - 1, 0, max(len(positions) - 1, 0))
        if len(positions) == 0:
            raise TriptychError(f"{path} has faces but no vertices: the file is truncated or damaged")
        cut = triangulate(positions, safe)  # (P, N - 2, 3) corner numbers
        triangles = polygons[np.arange(len(polygons))[:, None, None], cut]
        blocks.append(triangles.reshape(-1, 3, 3))
        sources.append(np.repeat(rows, corners - 2))
    source = np.concatenate(sources)
    order = np.argsort(source, kind="stable")
    return np.concatenate(blocks)[order], source[order]


def _face_indices(path: Path, texts: list[bytes], corners: int, slashes: int, empty: bool) -> np.ndarray:
    """Faces of one shape -> (P, N, 3) int64 one-based v, vt, vn indices, 0 where absent."""
    joined = b" ".join(texts)
    try:
        if slashes == 0:
            columns, width = [0], 1
        elif slashes == corners:
            columns, width = [0, 1], 2
        elif slashes == 2 * corners:
            columns, width = ([0, 2], 2) if empty else ([0, 1, 2], 3)
        else:
            raise ValueError(f"{texts[0][:80]!r} mixes corners with and without UV or normal")
        values = [int(token) for token in joined.replace(b"/", b" ").split()]
        indices = np.array(values, np.int64).reshape(len(texts), corners, width)
    except (ValueError, OverflowError) as error:
        raise TriptychError(
            f"{path}: a face statement cannot be read ({error}): the file is damaged, export it again"
        ) from error
    result = np.zeros((len(texts), corners, 3), np.int64)
    result[:, :, columns] = indices
    return result


def _check_indices(path: Path, corners: np.ndarray, counts: tuple[int, int, int]) -> None:
    if not len(corners):
        return
    for slot, (what, count) in enumerate(zip(("vertex", "texture coordinate", "normal"), counts, strict=True)):
        lowest, highest = int(corners[:, :, slot].min()), int(corners[:, :, slot].max())
        if highest > count or lowest < (1 if slot == 0 else 0):
            bad = highest if highest > count else lowest
            raise TriptychError(
                f"{path} has a face that uses {what} {bad} of {count}: the file is damaged, export it again"
            )


def _uv(
    uvs: np.ndarray, uv_faces: np.ndarray, faces: np.ndarray, vertex_count: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    if not len(uvs) or not len(faces) or uv_faces.max() < 0:
        return None, None
    uv = np.zeros((len(uvs), 2), np.float32)
    uv[:, : min(2, uvs.shape[1])] = uvs[:, :2]
    if uv_faces.min() < 0:  # faces without UV look at one extra coordinate
        uv_faces = np.where(uv_faces < 0, len(uv), uv_faces)
        uv = np.concatenate([uv, np.zeros((1, 2), np.float32)])
    if len(uv) == vertex_count and np.array_equal(uv_faces, faces):
        return uv, None
    return uv, uv_faces


def _vertex_normals(normals: np.ndarray, corner: np.ndarray, faces: np.ndarray, vertex_count: int) -> np.ndarray | None:
    if not len(normals) or not len(faces) or corner.min() < 0:
        return None
    result = np.zeros((vertex_count, 3))
    result[faces.ravel()] = normals[corner.ravel()]
    if not np.allclose(result[faces.ravel()], normals[corner.ravel()], atol=1e-4):
        return None  # hard edges
    length = np.linalg.norm(result, axis=1, keepdims=True)
    return np.divide(result, length, out=np.zeros_like(result), where=length > 0).astype(np.float32)


def _materials(
    path: Path, records: _Records, source: np.ndarray, limits: ReadLimits
) -> tuple[tuple[Material, ...], np.ndarray | None]:
    """Materials in order of first use, and (F,) indices into them (None when there is one)."""
    if not records.material_changes or not len(source):
        return (), None
    library: dict[str, Material] = {}
    for name in records.libraries:
        library.update(_read_library(path, name, limits))
    starts = np.array([start for start, _ in records.material_changes])
    run = np.searchsorted(starts, source, side="right") - 1  # -1: faces before the first usemtl
    slots: dict[str | None, int] = {}
    slot_of_run = np.array([slots.setdefault(name, len(slots)) for _, name in records.material_changes])
    which = np.where(run < 0, len(slots), slot_of_run[np.maximum(run, 0)])
    used, which = np.unique(which, return_inverse=True)
    names = [*slots, None]
    found = tuple(library.get(name) or Material(name=name) if (name := names[slot]) else Material() for slot in used)
    missing = sorted({name for slot in used if (name := names[slot]) and name not in library})
    if missing and library:
        warnings.warn(
            f"{path} uses the materials {missing[:5]} that its MTL lacks: they are plain", MeshWarning, stacklevel=2
        )
    return found, which.astype(np.int64) if len(found) > 1 else None


def _read_library(path: Path, name: str, limits: ReadLimits) -> dict[str, Material]:
    target = resolve_inside(path, name)
    if not target.is_file():
        warnings.warn(
            f"{path} names the material file {name!r}, which does not exist: materials are left out",
            MeshWarning,
            stacklevel=2,
        )
        return {}
    blocks: dict[str, dict[str, list[str]]] = {}
    block: dict[str, list[str]] = {}
    for line in read_bytes(target, limits).decode("utf-8", errors="replace").splitlines():
        words = line.split("#")[0].split() if line.lstrip().startswith("#") else line.split()
        if len(words) < 2:
            continue
        if words[0] == "newmtl":
            block = blocks.setdefault(line.strip()[6:].strip(), {})
        else:
            block[words[0].lower()] = words[1:]
    pictures: dict[str, np.ndarray | None] = {}
    return {key: _read_material(target, key, entries, pictures, limits) for key, entries in blocks.items()}


def _read_material(
    path: Path, name: str, entries: dict[str, list[str]], pictures: dict[str, np.ndarray | None], limits: ReadLimits
) -> Material:
    def number(key: str, default: float) -> float:
        return float(np.clip(_float(path, entries[key][0]), 0, 1)) if key in entries else default

    def picture(key: str) -> np.ndarray | None:
        if key not in entries:
            return None
        reference, _ = _texture_reference(entries[key])
        if reference not in pictures:
            pictures[reference] = read_texture(path, reference, limits)
        return pictures[reference]

    diffuse = [_float(path, value) for value in entries.get("kd", ["1", "1", "1"])[:3]]
    color = srgb_to_linear(np.array((diffuse * 3)[:3]))
    alpha = number("d", 1 - number("tr", 0.0))
    bump = next((key for key in _BUMP if key in entries), "")
    normal = picture(bump)
    packed = _metallic_roughness(picture("map_pr"), picture("map_pm"), entries)
    material = Material(
        name=name,
        base_color=(float(color[0]), float(color[1]), float(color[2]), alpha),
        base_color_texture=picture("map_kd"),
        metallic=number("pm", 1.0 if "map_pm" in entries else 0.0),
        roughness=number("pr", 1.0),
        metallic_roughness_texture=packed,
    )
    return replace(material, normal_texture=None if normal is None else normal[..., :3])


def _float(path: Path, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise TriptychError(f"{path} has {text[:40]!r} where a number belongs: the file is damaged") from error


def _texture_reference(words: list[str]) -> tuple[str, dict[str, str]]:
    """The values of a texture statement -> file name (spaces allowed) and the options before it."""
    options: dict[str, str] = {}
    position = 0
    while position < len(words) - 1 and (words[position] in _OPTIONS or words[position] in _OPTIONS_UP_TO_3):
        option = words[position]
        position += 1
        options[option] = words[position]
        if option in _OPTIONS:
            position += _OPTIONS[option]
            continue
        taken = 0
        while taken < 3 and position < len(words) - 1 and _is_number(words[position]):
            position, taken = position + 1, taken + 1
    return " ".join(words[position:]), options


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _metallic_roughness(
    roughness: np.ndarray | None, metallic: np.ndarray | None, entries: dict[str, list[str]]
) -> np.ndarray | None:
    """Grey maps (or channels of one) -> glTF's picture: G roughness, B metallic; a map of another size is left out."""
    if roughness is None and metallic is None:
        return None
    if (
        roughness is metallic
        and roughness is not None
        and _channel(entries["map_pr"]) == 1
        and _channel(entries["map_pm"]) == 2
    ):
        return roughness[..., :3]
    shape = (roughness if roughness is not None else metallic).shape[:2]  # type: ignore[union-attr]
    packed = np.full((*shape, 3), 255, np.uint8)
    for picture, key, slot in ((roughness, "map_pr", 1), (metallic, "map_pm", 2)):
        if picture is None:
            continue
        if picture.shape[:2] != shape:
            warnings.warn(f"{key} has another size than map_Pr: it is left out", MeshWarning, stacklevel=2)
            continue
        packed[..., slot] = picture[..., _channel(entries[key])]
    return packed


def _channel(words: list[str]) -> int:
    return {"r": 0, "g": 1, "b": 2}.get(_texture_reference(words)[1].get("-imfchan", ""), 0)
