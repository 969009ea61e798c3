"""PLY, ASCII and binary, both byte orders: reading and writing.

Vertex properties understood: x y z, nx ny nz, red green blue alpha (any type: integers are scaled by their range),
and UV under the names in the wild (s t, u v, texture_u texture_v). Faces: a list ``vertex_indices`` or
``vertex_index``; per-corner ``texcoord`` lists become corner UVs. Textures are not part of PLY: a MeshWarning says so
when a file names one. Polygons of mixed sizes are read row by row.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import TriptychError
from .limits import MeshWarning, ReadLimits, check_counts, check_present
from .mesh import Mesh
from .polygons import triangulate

_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4",
    "float64": "f8",
}  # fmt: skip
_UV_NAMES = (("s", "t"), ("u", "v"), ("texture_u", "texture_v"))


@dataclass
class _Property:
    name: str
    kind: str  # numpy type without byte order
    count_kind: str = ""  # set for lists


@dataclass
class _Element:
    name: str
    count: int
    properties: list[_Property]


def read_ply(path: Path, data: bytes, limits: ReadLimits) -> Mesh:
    """A PLY file as one mesh; TriptychError for anything that cannot be trusted."""
    encoding, elements, body = _header(path, data)
    for element in elements:
        bound = {"vertex": "vertices", "face": "faces"}.get(element.name)
        if bound:
            check_counts(path, limits, **{bound: element.count})
        smallest = sum(np.dtype(p.count_kind or p.kind).itemsize for p in element.properties)
        if encoding == "ascii":  # a digit and a separator at least
            smallest = 2 * len(element.properties)
        # Without the last separator of the file.
        check_present(path, f"{element.name} rows", element.count, element.count * smallest - 1, len(data) - body)
    reader = _read_ascii if encoding == "ascii" else _read_binary
    tables: dict[str, dict[str, np.ndarray]] = {}
    for element, columns in zip(
        elements, reader(path, data, body, elements, ">" if "big" in encoding else "<"), strict=True
    ):
        tables[element.name] = columns
    return _mesh(path, tables, limits)


def _header(path: Path, data: bytes) -> tuple[str, list[_Element], int]:
    """Encoding, elements, and the offset of the first byte after the header."""
    end = data.find(b"end_header", 0, 1 << 16)
    newline = data.find(b"\n", end)
    if not data.startswith(b"ply") or end < 0 or newline < 0:
        raise TriptychError(f"{path} has no complete PLY header: the file is truncated or not a PLY")
    encoding, elements = "", []
    for line in data[:end].decode("utf-8", errors="replace").splitlines()[1:]:
        words = line.split()
        if not words:
            continue
        try:
            if words[0] == "format":
                encoding = words[1]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2]), []))
            elif words[0] == "property" and words[1] == "list":
                elements[-1].properties.append(_Property(words[4], _TYPES[words[3]], _TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1].properties.append(_Property(words[2], _TYPES[words[1]]))
            elif words[0] == "comment" and len(words) > 2 and words[1].lower() == "texturefile":
                warnings.warn(
                    f"{path} names the texture {' '.join(words[2:])!r}: PLY is read without it",
                    MeshWarning,
                    stacklevel=2,
                )
        except (IndexError, KeyError, ValueError) as error:
            raise TriptychError(
                f"{path} has the PLY header line {line[:80]!r}, which cannot be read: the file is damaged"
            ) from error
    if encoding not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise TriptychError(f"{path} has the PLY format {encoding[:40]!r}, not ascii or binary: the file is damaged")
    negative = [element for element in elements if element.count < 0]
    if negative:
        raise TriptychError(f"{path} declares {negative[0].count} {negative[0].name} rows: the file is damaged")
    return encoding, elements, newline + 1


def _read_binary(
    path: Path, data: bytes, offset: int, elements: list[_Element], order: str
) -> list[dict[str, np.ndarray]]:
    tables = []
    for element in elements:
        lists = [p for p in element.properties if p.count_kind]
        if not lists:
            dtype = np.dtype([(p.name, order + p.kind) for p in element.properties])
            rows = _block(path, data, offset, dtype, element)
            tables.append({p.name: rows[p.name] for p in element.properties})
            offset += rows.nbytes
            continue
        uniform = _uniform_rows(path, data, offset, element, order)
        if uniform is not None:
            columns, offset = uniform
        else:
            columns, offset = _ragged_rows(path, data, offset, element, order)
        tables.append(columns)
    return tables


def _block(path: Path, data: bytes, offset: int, dtype: np.dtype, element: _Element) -> np.ndarray:
    check_present(path, f"{element.name} rows", element.count, element.count * dtype.itemsize, len(data) - offset)
    return np.frombuffer(data, dtype, element.count, offset)


def _uniform_rows(
    path: Path, data: bytes, offset: int, element: _Element, order: str
) -> tuple[dict[str, np.ndarray], int] | None:
    """All rows at once, when every row's lists are as long as the first row's; None otherwise."""
    fields, lengths, position = [], {}, offset
    for p in element.properties:
        kind = np.dtype(order + p.kind)
        if not p.count_kind:
            fields.append((p.name, kind))
            position += kind.itemsize
            continue
        count_kind = np.dtype(order + p.count_kind)
        if position + count_kind.itemsize > len(data):
            return None
        length = int(np.frombuffer(data, count_kind, 1, position)[0])
        if length < 0 or length * kind.itemsize > len(data) or element.count == 0:
            return None
        lengths[p.name] = length
        fields.extend([(f"{p.name} length", count_kind), (p.name, kind, (length,))])  # type: ignore[list-item]
        position += count_kind.itemsize + length * kind.itemsize
    dtype = np.dtype(fields)
    if element.count * dtype.itemsize > len(data) - offset:
        return None
    rows = np.frombuffer(data, dtype, element.count, offset)
    if any((rows[f"{name} length"] != length).any() for name, length in lengths.items()):
        return None
    return {p.name: rows[p.name] for p in element.properties}, offset + rows.nbytes


def _ragged_rows(
    path: Path, data: bytes, offset: int, element: _Element, order: str
) -> tuple[dict[str, np.ndarray], int]:
    columns: dict[str, list] = {p.name: [] for p in element.properties}
    plan = [
        (columns[p.name], np.dtype(order + p.kind), np.dtype(order + p.count_kind) if p.count_kind else None)
        for p in element.properties
    ]
    for row in range(element.count):
        for column, kind, count_kind in plan:
            length = 1
            if count_kind is not None:
                check_present(path, f"{element.name} rows", element.count, count_kind.itemsize, len(data) - offset)
                length = int(np.frombuffer(data, count_kind, 1, offset)[0])
                offset += count_kind.itemsize
            if length < 0 or offset + length * kind.itemsize > len(data):
                raise TriptychError(
                    f"{path} ends inside {element.name} row {row + 1:,} of {element.count:,}: "
                    "the file is truncated or damaged"
                )
            values = np.frombuffer(data, kind, length, offset)
            column.append(values if count_kind is not None else values[0])
            offset += length * kind.itemsize
    return {p.name: _column(columns[p.name], bool(p.count_kind)) for p in element.properties}, offset


def _column(values: list, is_list: bool) -> np.ndarray:
    if not is_list:
        return np.array(values)
    result = np.empty(len(values), object)
    result[:] = values
    return result


def _read_ascii(
    path: Path, data: bytes, offset: int, elements: list[_Element], order: str
) -> list[dict[str, np.ndarray]]:
    lines = [line for line in data[offset:].splitlines() if line.strip()]
    tables, start = [], 0
    for element in elements:
        rows = lines[start : start + element.count]
        if len(rows) < element.count:
            raise TriptychError(
                f"{path} declares {element.count:,} {element.name} rows but has {len(rows):,}: the file is truncated"
            )
        start += element.count
        columns: dict[str, list] = {p.name: [] for p in element.properties}
        for number, row in enumerate(rows):
            words, position = row.split(), 0
            for p in element.properties:
                length = 1
                if p.count_kind and position < len(words):
                    length = int(words[position])
                    position += 1
                if length < 0 or position + length > len(words):
                    raise TriptychError(
                        f"{path} ends inside {element.name} row {number + 1:,}: the file is truncated or damaged"
                    )
                values = words[position : position + length]
                columns[p.name].append([float(v) for v in values] if p.count_kind else float(values[0]))
                position += length
        tables.append({p.name: _ascii_column(p, columns[p.name]) for p in element.properties})
    return tables


def _ascii_column(prop: _Property, values: list) -> np.ndarray:
    if not prop.count_kind:
        column = np.array(values, np.float64)
        return column if prop.kind[0] == "f" else column.astype(prop.kind)
    kind = np.float64 if prop.kind[0] == "f" else np.int64
    if values and len({len(row) for row in values}) == 1:
        return np.array(values, np.float64).astype(kind)
    return _column([np.array(row, np.float64).astype(kind) for row in values], True)


def _mesh(path: Path, tables: dict[str, dict[str, np.ndarray]], limits: ReadLimits) -> Mesh:
    table = tables.get("vertex", {})
    if not all(name in table for name in "xyz"):
        raise TriptychError(f"{path} has no vertex coordinates x, y, z: it is not a mesh")
    with np.errstate(over="ignore"):
        vertices = np.stack([table[name] for name in "xyz"], axis=1).astype(np.float32)
    face_table = tables.get("face", {})
    lists = next((face_table[name] for name in ("vertex_indices", "vertex_index") if name in face_table), None)
    if lists is None:
        lists = np.zeros((0, 3), np.int64)
    faces, corner_uv = _cut(path, vertices, lists, face_table.get("texcoord"), limits)
    uv = next(
        (np.stack([table[a], table[b]], axis=1).astype(np.float32) for a, b in _UV_NAMES if a in table and b in table),
        None,
    )
    uv_faces = None
    if corner_uv is not None and uv is None:
        uv, inverse = np.unique(corner_uv.reshape(-1, 2), axis=0, return_inverse=True)
        uv_faces = inverse.reshape(-1, 3).astype(np.int64)
    normals = None
    if all(name in table for name in ("nx", "ny", "nz")):
        normals = np.stack([table[name] for name in ("nx", "ny", "nz")], axis=1).astype(np.float32)
    return Mesh(vertices, faces, normals=normals, colors=_colors(table), uv=uv, uv_faces=uv_faces)


def _cut(
    path: Path, vertices: np.ndarray, lists: np.ndarray, texcoords: np.ndarray | None, limits: ReadLimits
) -> tuple[np.ndarray, np.ndarray | None]:
    """Polygon lists -> (F, 3) triangles in file order, and (F, 3, 2) corner UV when every polygon has them."""
    if lists.dtype != object:
        groups = [(np.arange(len(lists)), lists.astype(np.int64))]
    else:
        sizes = np.array([len(row) for row in lists])
        groups = [
            (rows, np.stack(list(lists[rows])).astype(np.int64))
            for size in np.unique(sizes)
            if len(rows := np.flatnonzero(sizes == size))
        ]
    check_counts(path, limits, faces=sum(max(polygons.shape[1] - 2, 0) * len(polygons) for _, polygons in groups))
    faces, uvs, order = [np.zeros((0, 3), np.int64)], [], [np.zeros(0, np.int64)]
    for rows, polygons in groups:
        count = polygons.shape[1]
        if not len(polygons):
            continue
        if count < 3:
            warnings.warn(
                f"{path} has {len(rows)} faces of {count} corners: they are left out", MeshWarning, stacklevel=2
            )
            continue
        if polygons.min() < 0 or polygons.max() >= len(vertices):
            bad = int(polygons.max() if polygons.max() >= len(vertices) else polygons.min())
            raise TriptychError(
                f"{path} has a face that uses vertex {bad} of {len(vertices)}: the file is damaged, export it again"
            )
        corners = triangulate(vertices, polygons)
        index = np.arange(len(polygons))[:, None, None]
        faces.append(polygons[index, corners].reshape(-1, 3))
        order.append(np.repeat(rows, count - 2))
        if texcoords is not None and all(len(texcoords[row]) == 2 * count for row in rows):
            pairs = np.stack([texcoords[row] for row in rows]).reshape(len(rows), count, 2)
            uvs.append(pairs[index, corners].reshape(-1, 3, 2).astype(np.float32))
    ranks = np.argsort(np.concatenate(order), kind="stable")
    corner_uv = np.concatenate(uvs)[ranks] if uvs and sum(map(len, uvs)) == len(ranks) else None
    return np.concatenate(faces)[ranks], corner_uv


def _colors(table: dict[str, np.ndarray]) -> np.ndarray | None:
    if not all(name in table for name in ("red", "green", "blue")):
        return None
    channels = []
    for name in ("red", "green", "blue", "alpha"):
        values = table.get(name)
        if values is None:
            channels.append(np.ones(len(table["red"])))
        else:
            channels.append(values / float(np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else values)
    return np.clip(np.stack(channels, axis=1), 0, 1).astype(np.float32)


def encode_ply(mesh: Mesh) -> bytes:
    """Binary little-endian PLY: positions, normals, UV if there is one per vertex, 8-bit sRGB vertex colours, faces."""
    columns: list[tuple[str, str, np.ndarray]] = [("float", "f4", mesh.vertices[:, i]) for i in range(3)]
    names = ["x", "y", "z"]
    if mesh.normals is not None:
        columns += [("float", "f4", mesh.normals[:, i]) for i in range(3)]
        names += ["nx", "ny", "nz"]
    if mesh.uv is not None and mesh.uv_faces is None:
        columns += [("float", "f4", mesh.uv[:, i]) for i in range(2)]
        names += ["s", "t"]
    if mesh.colors is not None:
        bytes_ = np.clip(mesh.colors * 255 + 0.5, 0, 255).astype(np.uint8)
        columns += [("uchar", "u1", bytes_[:, i]) for i in range(4)]
        names += ["red", "green", "blue", "alpha"]
    rows = np.empty(
        len(mesh.vertices), np.dtype([(name, "<" + kind) for name, (_, kind, _) in zip(names, columns, strict=True)])
    )
    for name, (_, _, values) in zip(names, columns, strict=True):
        rows[name] = values
    faces = np.empty(len(mesh.faces), np.dtype([("count", "u1"), ("indices", "<i4", (3,))]))
    faces["count"], faces["indices"] = 3, mesh.faces
    header = ["ply", "format binary_little_endian 1.0", "comment Triptych, +Y up", f"element vertex {len(rows)}"]
    header += [f"property {kind} {name}" for name, (kind, _, _) in zip(names, columns, strict=True)]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header", ""]
    return "\n".join(header).encode() + rows.tobytes() + faces.tobytes()
