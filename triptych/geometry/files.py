"""Mesh files: one door in, one door out.

``read_mesh`` reads OBJ (+ MTL and textures), PLY, STL, OFF, GLB and GLTF behind ``limits``: sizes and declared counts
are checked before anything is allocated, nothing outside the mesh's folder is opened, nothing is fetched, and whatever
is wrong ends in one ``TriptychError``. glTF, OBJ and PLY have readers of our own (see their modules); STL and OFF
are parsed by trimesh once their counts are proven. STL has no shared vertices, so exactly equal ones are merged.

``write_*`` build every file in memory, write them beside their final names, flush them to the disk, and rename them,
the mesh file last: a full disk or an unwritable folder leaves nothing half-written.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import struct
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import TriptychError
from .gltf import read_gltf
from .gltf_writer import encode_glb, encode_gltf
from .limits import MeshWarning, ReadLimits, check_counts, check_present, read_bytes
from .mesh import Mesh
from .obj import read_obj
from .obj_writer import encode_obj
from .ply import encode_ply, read_ply

__all__ = [
    "MESH_SUFFIXES", "MeshWarning", "ReadLimits", "free_stem", "read_mesh", "write_files", "write_glb", "write_gltf",
    "write_mesh", "write_obj", "write_off", "write_ply", "write_stl",
]  # fmt: skip

MESH_SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off")
_STL_FACE = np.dtype([("normal", "<f4", (3,)), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_OWN_FILE = re.compile(r"(\.[a-z0-9]+|_(.+_)?(albedo|normal|metallic_roughness)\.png)$")
# What parsers raise on damaged input; anything else is a bug of ours and must show.
_DAMAGED = (
    AssertionError, AttributeError, ArithmeticError, DeprecationWarning, IndexError, KeyError, NameError,
    RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


def read_mesh(path: str | Path, *, limits: ReadLimits = ReadLimits()) -> Mesh:  # noqa: B008 (frozen)
    """One mesh from a file: scene transforms applied, polygons triangulated, several geometries joined.

    path: suffix in MESH_SUFFIXES, any case. Coordinates and UVs are as in the file, in its frame.
    Materials keep factors and textures (``face_materials`` says which face has which); vertex colours are sRGB.
    Raises TriptychError: missing, empty, over-large, truncated or damaged file, no faces, NaN or infinite
    coordinates, indices out of range, references outside the folder. Warns MeshWarning for what is left out.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES and not path.is_dir():
        raise TriptychError(_unknown_suffix(path))
    data = read_bytes(path, limits)
    try:
        mesh = _parse(path, suffix, data, limits)
    except TriptychError:
        raise
    except _DAMAGED as error:
        reason = (
            f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        )
        reason = " ".join(reason.split())[:200]
        raise TriptychError(
            f"{path} cannot be read as {suffix[1:].upper()} ({reason}): the file is damaged, export it again"
        ) from error
    return _checked(path, mesh)


def _parse(path: Path, suffix: str, data: bytes, limits: ReadLimits) -> Mesh:
    if suffix in (".glb", ".gltf"):
        return read_gltf(path, data, limits)
    if suffix == ".obj":
        return read_obj(path, data, limits)
    if suffix == ".ply":
        return read_ply(path, data, limits)
    return _read_stl(path, data, limits) if suffix == ".stl" else _read_off(path, data, limits)


def _unknown_suffix(path: Path) -> str:
    return f"{path} has the suffix {path.suffix!r}, which is no mesh format here: use one of {', '.join(MESH_SUFFIXES)}"


def _checked(path: Path, mesh: Mesh) -> Mesh:
    """The promises of ``Mesh`` that every reader must keep, whatever the file said."""
    if not len(mesh.vertices) or not len(mesh.faces):
        raise TriptychError(
            f"{path} has {len(mesh.vertices)} vertices and no faces: export a surface, not points or curves"
        )
    finite = np.isfinite(mesh.vertices)
    if not finite.all():
        bad = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise TriptychError(
            f"{path} has {int((~finite.all(axis=1)).sum())} vertices that are NaN or infinite (first: {bad}): "
            "repair or export it again"
        )
    lowest, highest = int(mesh.faces.min()), int(mesh.faces.max())
    if lowest < 0 or highest >= len(mesh.vertices):
        bad = highest if highest >= len(mesh.vertices) else lowest
        raise TriptychError(
            f"{path} has a face that uses vertex {bad} of {len(mesh.vertices)}: the file is damaged, export it again"
        )
    changes: dict[str, np.ndarray | None] = {}
    for name in ("uv", "normals", "colors"):
        values = getattr(mesh, name)
        if values is not None and not np.isfinite(values).all():
            warnings.warn(f"{path} has {name} that are NaN or infinite: they are left out", MeshWarning, stacklevel=3)
            changes |= {name: None} | ({"uv_faces": None} if name == "uv" else {})
    return mesh.replace(**changes) if changes else mesh


def _read_stl(path: Path, data: bytes, limits: ReadLimits) -> Mesh:
    from trimesh.exchange.stl import load_stl

    declared = int(np.frombuffer(data, "<u4", 1, 80)[0]) if len(data) >= 84 else 0
    is_binary = 84 + declared * _STL_FACE.itemsize == len(data)
    if not is_binary and data.lstrip()[:5].lower() != b"solid":
        check_counts(path, limits, faces=declared)
        check_present(path, "faces", declared, declared * _STL_FACE.itemsize, len(data) - 84)
    facets = declared if is_binary else len(re.findall(rb"endfacet", data, re.IGNORECASE))
    check_counts(path, limits, faces=facets)
    with warnings.catch_warnings():
        # numpy tells of text that is not a number, where trimesh reads up to it, by this warning only.
        warnings.simplefilter("error", DeprecationWarning)
        loaded = load_stl(io.BytesIO(data if is_binary else _plain_text(data)))
    if "vertices" not in loaded:  # trimesh's answer to several solids, or to none
        blocks = [block for block in loaded.get("geometry", {}).values() if len(block.get("vertices", ()))]
        soup = np.concatenate(
            [np.asarray(b["vertices"])[np.asarray(b["faces"])] for b in blocks] or [np.zeros((0, 3, 3))]
        )
    else:
        soup = np.asarray(loaded["vertices"])[np.asarray(loaded["faces"])]
    if len(soup) != facets:
        raise TriptychError(
            f"{path} has {facets:,} facets but {len(soup):,} triangles: the file is truncated or damaged"
        )
    return _merge_equal(soup.reshape(-1, 3).astype(np.float32))


def _merge_equal(corners: np.ndarray) -> Mesh:
    """(3 F, 3) float32 corners -> a mesh whose equal corners are one vertex, in order of first appearance."""
    corners = np.ascontiguousarray(corners + np.float32(0))  # -0 and 0 are the same place
    keys = corners.view(np.dtype((np.void, 12))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return Mesh(corners[first[order]], rank[inverse.ravel()].reshape(-1, 3).astype(np.int64))


def _plain_text(data: bytes) -> bytes:
    """UTF-8 whatever the file says: names may be in any encoding, and numbers are ASCII."""
    return data.decode("utf-8", errors="replace").encode()


def _read_off(path: Path, data: bytes, limits: ReadLimits) -> Mesh:
    from trimesh.exchange.off import load_off

    head = re.match(rb"\s*(?:#[^\n]*\n\s*)*(?:C?OFF)\s+(?:#[^\n]*\n\s*)*(-?\d+)\s+(-?\d+)", data)
    if head is None:
        raise TriptychError(f"{path} does not begin with OFF and its counts: the file is damaged or not an OFF")
    vertices, faces = int(head[1]), int(head[2])
    check_counts(path, limits, vertices, faces)
    # "0 0 0" and "3 0 1 2", each with its line end but the last.
    check_present(path, "vertices and faces", vertices + faces, vertices * 6 + faces * 8 - 1, len(data) - head.end())
    loaded = load_off(io.BytesIO(_plain_text(data)))
    with np.errstate(over="ignore"):
        mesh = Mesh(
            np.asarray(loaded["vertices"]).astype(np.float32), np.asarray(loaded["faces"], np.int64).reshape(-1, 3)
        )
    if len(mesh.faces) < faces:
        raise TriptychError(
            f"{path} declares {faces:,} faces but has {len(mesh.faces):,}: the file is truncated or damaged"
        )
    return mesh


def write_mesh(mesh: Mesh, path: str | Path) -> list[Path]:
    """Write in the format that the suffix names; the files written, the mesh file last."""
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise TriptychError(_unknown_suffix(path))
    return writer(mesh, path)


def write_obj(mesh: Mesh, path: str | Path) -> list[Path]:
    """``<stem>.obj``, ``<stem>.mtl``, ``<stem>_albedo.png``, ``<stem>_normal.png``, ``<stem>_metallic_roughness.png``.

    With several materials the pictures are ``<stem>_<material>_albedo.png`` and so on. Returns the files written.
    Raises TriptychError when the folder cannot be written; then none of them is there.
    """
    path = Path(path)
    return write_files(path.parent, encode_obj(mesh, path.stem))


def write_glb(mesh: Mesh, path: str | Path) -> list[Path]:
    """One binary glTF 2.0 file with textures, UV, normals, vertex colours (linear) and materials."""
    path = Path(path)
    return write_files(path.parent, {path.name: encode_glb(mesh, path.stem)})


def write_gltf(mesh: Mesh, path: str | Path) -> list[Path]:
    """One JSON glTF 2.0 file with everything embedded."""
    path = Path(path)
    return write_files(path.parent, {path.name: encode_gltf(mesh, path.stem)})


def write_ply(mesh: Mesh, path: str | Path) -> list[Path]:
    """Binary PLY with normals, vertex colours (8-bit), and UV when it is per vertex; no textures."""
    path = Path(path)
    return write_files(path.parent, {path.name: encode_ply(mesh)})


def write_stl(mesh: Mesh, path: str | Path) -> list[Path]:
    """Binary STL: triangles and face normals only."""
    path = Path(path)
    rows = np.zeros(len(mesh.faces), _STL_FACE)
    rows["normal"], rows["corners"] = mesh.face_normals(), mesh.vertices[mesh.faces]
    # "solid" would make other readers take it for text.
    return write_files(
        path.parent, {path.name: b"Triptych STL, +Y up".ljust(80) + struct.pack("<I", len(rows)) + rows.tobytes()}
    )


def write_off(mesh: Mesh, path: str | Path) -> list[Path]:
    """OFF: vertices and faces only."""
    path = Path(path)
    head = f"OFF\n{len(mesh.vertices)} {len(mesh.faces)} 0\n"
    vertices = ("%.9g %.9g %.9g\n" * len(mesh.vertices)) % tuple(mesh.vertices.astype(np.float64).ravel().tolist())
    faces = ("3 %d %d %d\n" * len(mesh.faces)) % tuple(mesh.faces.ravel().tolist())
    return write_files(path.parent, {path.name: (head + vertices + faces).encode()})


_WRITERS = {
    ".obj": write_obj, ".glb": write_glb, ".gltf": write_gltf, ".ply": write_ply, ".stl": write_stl, ".off": write_off,
}  # fmt: skip


def write_files(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write several files into one folder, all or none of them new.

    Each is written beside its final name and flushed to the disk before the first rename. On failure the temporary
    files and the new ones are removed, and TriptychError says where and why; a file that was already replaced
    keeps its new, complete content.
    """
    folder = Path(folder)
    pending: list[tuple[Path, Path]] = []
    created: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name[:100]}.{secrets.token_hex(6)}.part"
            pending.append((temporary, folder / name))
            with open(temporary, "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for temporary, target in pending:
            if not target.exists():
                created.append(target)
            os.replace(temporary, target)
    except BaseException as error:  # an interruption must clean up too
        for leftover in [*(temporary for temporary, _ in pending), *created]:
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise TriptychError(
                f"cannot write {', '.join(files)} into {folder} ({error.strerror or error}): "
                "choose another folder or free some space"
            ) from error
        raise
    return [target for _, target in pending]


def free_stem(folder: str | Path, stem: str) -> str:
    """``stem``, else ``<stem>_00002`` and so on: the first whose files (mesh, MTL, pictures) are all absent."""
    folder = Path(folder)
    names = [entry.name.lower() for entry in folder.iterdir()] if folder.is_dir() else []
    number, candidate = 1, stem
    while any(name.startswith(candidate.lower()) and _OWN_FILE.match(name[len(candidate) :]) for name in names):
        number += 1
        candidate = f"{stem}_{number:05d}"
    return candidate
