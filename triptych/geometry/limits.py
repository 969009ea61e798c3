"""What a mesh file may ask of this machine, and how the readers refuse.

A mesh file is somebody else's text: it may declare fifty million faces in ten bytes, name ``../../secrets.png`` as its
texture, or stop in the middle. Every reader asks here *before* it allocates or opens anything.

What may fail and how: a file that cannot be trusted as a mesh (sizes, counts, indices, escaping paths) raises
``TriptychError``; a texture that is merely missing or unreadable leaves a usable shape, so it is left out with a
``MeshWarning`` that names it.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from ..errors import TriptychError

_MIB = 1 << 20


class MeshWarning(UserWarning):
    """Something in a mesh file was left out; the message says what and why."""


@dataclass(frozen=True)
class ReadLimits:
    """Upper bounds for one file and everything it names.

    max_bytes: of the mesh file, and of each file that it names.
    max_vertices, max_faces: of the whole scene, after instancing and triangulation.
    max_texture_pixels: width x height of one texture, checked before it is decoded.
    """

    max_bytes: int = 1024 * _MIB
    max_vertices: int = 20_000_000
    max_faces: int = 20_000_000
    max_texture_pixels: int = 64_000_000


def read_bytes(path: Path, limits: ReadLimits) -> bytes:
    """The content of an existing, non-empty, regular file within ``limits.max_bytes``; TriptychError otherwise."""
    try:
        if not path.exists():
            raise TriptychError(f"{path} does not exist: check the spelling and the folder")
        if not path.is_file():
            raise TriptychError(f"{path} is not a file: give the path of one mesh file")
        size = path.stat().st_size
        if size == 0:
            raise TriptychError(f"{path} is empty (0 bytes): export or download it again")
        if size > limits.max_bytes:
            raise TriptychError(
                f"{path} has {size / _MIB:,.0f} MiB, over the limit of {limits.max_bytes / _MIB:,.0f} MiB: "
                "simplify it or raise ReadLimits.max_bytes"
            )
        return path.read_bytes()
    except OSError as error:
        raise TriptychError(f"{path} cannot be read ({error.strerror or error}): check its permissions") from error


def check_counts(path: Path, limits: ReadLimits, vertices: int = 0, faces: int = 0) -> None:
    """Refuse declared or accumulated counts that are negative or beyond the limits."""
    for what, count, limit in (("vertices", vertices, limits.max_vertices), ("faces", faces, limits.max_faces)):
        if count < 0:
            raise TriptychError(f"{path} declares {count} {what}: the file is damaged, export it again")
        if count > limit:
            raise TriptychError(
                f"{path} declares {count:,} {what}, over the limit of {limit:,}: "
                f"simplify it or raise ReadLimits.max_{what}"
            )


def check_present(path: Path, what: str, count: int, needed_bytes: int, available_bytes: int) -> None:
    """Refuse a declared count whose data cannot fit into the bytes that are there (truncated, or a lie)."""
    if needed_bytes > available_bytes:
        raise TriptychError(
            f"{path} declares {count:,} {what} ({needed_bytes:,} bytes) but only {available_bytes:,} bytes follow: "
            "the file is truncated or damaged, export or download it again"
        )


def resolve_inside(mesh_path: Path, reference: str, *, percent_encoded: bool = False) -> Path:
    """The file that a mesh names, if it lies in the mesh's own folder or below; TriptychError naming it otherwise.

    Refused: URL schemes, absolute paths of any platform, ``..`` that leaves the folder, and links that lead outside.
    ``percent_encoded`` is for glTF, whose references are URIs.
    """
    name = unquote(reference) if percent_encoded else reference
    portable = name.strip().replace("\\", "/")
    remedy = f"put the file beside {mesh_path.name} and name it by a relative path"
    if "\0" in portable or not portable:
        raise TriptychError(f"{mesh_path} names the file {reference[:200]!r}, which is no path: {remedy}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]+:", portable):
        raise TriptychError(
            f"{mesh_path} names {reference[:200]!r}, a URL, and nothing is fetched for a mesh: {remedy}"
        )
    if portable.startswith(("/", "~")) or re.match(r"[A-Za-z]:", portable):
        raise TriptychError(f"{mesh_path} names the absolute path {reference[:200]!r}: {remedy}")
    folder = mesh_path.parent.resolve()
    try:
        target = (folder / portable).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise TriptychError(
            f"{mesh_path} names {reference[:200]!r}, which cannot be resolved ({error}): {remedy}"
        ) from error
    if not target.is_relative_to(folder):
        raise TriptychError(f"{mesh_path} names {reference[:200]!r}, which leads outside its folder: {remedy}")
    return target


def decode_texture(data: bytes, what: str, limits: ReadLimits) -> np.ndarray | None:
    """An encoded picture -> (H, W, 3 or 4) uint8, row 0 on top; None with a MeshWarning when it is no picture.

    Raises TriptychError when it has more than ``limits.max_texture_pixels`` pixels; those are never decoded.
    """
    try:
        # Image.open would warn about (or refuse) large pictures by its own limit: ours is the one that counts.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                if picture.width * picture.height > limits.max_texture_pixels:
                    raise _too_many_pixels(what, f"{picture.width} x {picture.height}", limits)
                has_alpha = "A" in picture.getbands() or "transparency" in picture.info
                if picture.mode in ("I", "I;16", "I;16B", "F"):
                    scale = 255.0 if picture.mode == "F" else 1 / 257
                    grey = np.asarray(picture, dtype=np.float64) * scale
                    return np.repeat(np.clip(grey + 0.5, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
                return np.asarray(picture.convert("RGBA" if has_alpha else "RGB"))
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(what, "far more", limits) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
        if isinstance(error, TriptychError):
            raise
        warnings.warn(f"{what} cannot be decoded ({error}): the texture is left out", MeshWarning, stacklevel=2)
        return None


def _too_many_pixels(what: str, size: str, limits: ReadLimits) -> TriptychError:
    return TriptychError(
        f"{what} has {size} pixels, over the limit of {limits.max_texture_pixels:,} in all: "
        "scale it down or raise ReadLimits.max_texture_pixels"
    )


def read_texture(
    mesh_path: Path, reference: str, limits: ReadLimits, *, percent_encoded: bool = False
) -> np.ndarray | None:
    """The picture that a mesh names beside itself; None with a MeshWarning when it is missing or unreadable."""
    target = resolve_inside(mesh_path, reference, percent_encoded=percent_encoded)
    what = f"the texture {reference!r} of {mesh_path}"
    if not target.is_file():
        warnings.warn(f"{what} does not exist: it is left out", MeshWarning, stacklevel=2)
        return None
    try:
        size = target.stat().st_size
        if size > limits.max_bytes:
            raise TriptychError(f"{what} has {size:,} bytes, over the limit of {limits.max_bytes:,}: scale it down")
        return decode_texture(target.read_bytes(), what, limits)
    except OSError as error:
        warnings.warn(f"{what} cannot be read ({error.strerror}): it is left out", MeshWarning, stacklevel=2)
        return None
