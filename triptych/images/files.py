"""Picture files in, PNG files out.

Every source a user can name (a path, a PIL image, an array) becomes one thing: (H, W, 4) float32, sRGB, straight
alpha, 0-1. The header is judged before a pixel is decoded, so that a small file that declares a huge picture costs
nothing. Not covered: animation (the first frame is read), HDR formats, vector formats, HEIC.
"""

from __future__ import annotations

import io
import os
import struct
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import TriptychError

MAX_PIXELS = 64e6
# What PIL's decoders raise for damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_HIGH_DEPTH_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")

ImageSource = Any  # str, os.PathLike, PIL image, or array-like (H, W[, 1|3|4])


class ReadImage(NamedTuple):
    """rgba: (H, W, 4) float32, sRGB, straight alpha, 0-1. has_alpha: some pixel of the source is not opaque."""

    rgba: np.ndarray
    has_alpha: bool


def read_image(source: ImageSource, *, max_pixels: float = MAX_PIXELS, max_side: int | None = None) -> ReadImage:
    """Reads a path, a PIL image, or an array.

    source: a path; a PIL image of any mode; or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of bool, uint8,
        uint16 or float in 0-1 (a CPU torch tensor is such an array).
    max_pixels: pictures with more pixels are refused, from the header.
    max_side: larger pictures are reduced to this many pixels on their longer side (antialiased, premultiplied).

    EXIF orientation is applied; an embedded ICC profile is converted to sRGB; 16-bit, palette, grey and CMYK pictures
    are converted. Raises TriptychError: missing, a folder, unreadable, empty, not an image, truncated, too large,
    wrong shape, type or range.
    """
    if isinstance(source, Image.Image):
        return _from_pil(source, "the picture", max_pixels, max_side)
    if isinstance(source, (str, os.PathLike)):
        return _read_file(Path(source), max_pixels, max_side)
    rgba = _from_array(source, max_pixels)
    if max_side is not None and max(rgba.shape[:2]) > max_side:
        rgba = resize_premultiplied(rgba, *_fit(rgba.shape[1], rgba.shape[0], max_side))
    return ReadImage(rgba, bool((rgba[..., 3] < 1).any()))


def write_png(image: ImageSource, path: str | os.PathLike[str]) -> Path:
    """Writes an 8-bit PNG so that ``path`` holds either the old file or the complete new one.

    image: a PIL image, or an array (H, W[, 1|3|4]) as `read_image` takes it; 3 channels stay RGB, 4 stay RGBA.
    Raises TriptychError when the folder is missing or cannot be written, or the disk is full. Returns the path.
    """
    path = Path(path)
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TriptychError(f"cannot write {path}: {reason}; choose a folder that exists and has free space") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def to_pil(image: ImageSource) -> Image.Image:
    """An array (H, W[, 1|3|4]), as `read_image` takes it, as an 8-bit PIL image: RGBA for four channels, else RGB."""
    array = np.asarray(image)
    rgba = np.rint(_from_array(array, np.inf) * 255).astype(np.uint8)
    return Image.fromarray(rgba if array.ndim == 3 and array.shape[2] == 4 else np.ascontiguousarray(rgba[..., :3]))


def resize_premultiplied(
    rgba: np.ndarray, width: int, height: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Resamples (H, W, 4) float32 straight alpha to (height, width, 4), antialiased, without fringes.

    box: the part of the source to show (left, top, right, bottom) in pixels, fractions allowed, inside the source.
    Filtering happens on premultiplied colour. The kernel for reduction is never negative, so nothing rings.
    """
    box = box or (0.0, 0.0, float(rgba.shape[1]), float(rgba.shape[0]))
    reduces = (box[2] - box[0]) > width or (box[3] - box[1]) > height
    kernel = Image.Resampling.HAMMING if reduces else Image.Resampling.BICUBIC
    premultiplied = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    planes = [
        Image.fromarray(np.ascontiguousarray(premultiplied[..., c])).resize((width, height), kernel, box=box)
        for c in range(4)
    ]
    out = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    alpha = np.clip(out[..., 3:], 0, 1)
    colour = np.where(alpha > 1e-4, out[..., :3] / np.maximum(alpha, 1e-4), 0)
    return np.concatenate([np.clip(colour, 0, 1), alpha], axis=-1).astype(np.float32)


def _read_file(path: Path, max_pixels: float, max_side: int | None) -> ReadImage:
    try:
        if path.is_dir():
            raise TriptychError(f"{path} is a folder, not a picture; name one picture file")
        if not path.is_file():
            raise TriptychError(f"there is no picture file {path}; check the path")
        if path.stat().st_size == 0:
            raise TriptychError(f"{path} is empty (0 bytes); export or download the picture again")
        with warnings.catch_warnings():
            # PIL warns above 89 megapixels; our own limit is judged right below, from the header.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(path)
    except TriptychError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(str(path), 2 * (Image.MAX_IMAGE_PIXELS or 0), max_pixels, "more than ") from error
    except Image.UnidentifiedImageError as error:
        raise TriptychError(f"{path} is not a picture that can be read; give a PNG, JPEG or WebP file") from error
    except PermissionError as error:
        raise TriptychError(f"{path} may not be read: {error.strerror}; change its permissions") from error
    except _DECODE_ERRORS as error:
        raise TriptychError(f"{path} is not a picture that can be read ({error}); give a PNG, JPEG or WebP") from error
    with picture:
        return _from_pil(picture, str(path), max_pixels, max_side)


def _from_pil(picture: Image.Image, label: str, max_pixels: float, max_side: int | None) -> ReadImage:
    width, height = picture.size
    if width * height > max_pixels:
        raise _too_large(label, width * height, max_pixels)
    if width * height == 0:
        raise TriptychError(f"{label} has no pixels ({width} x {height}); give a picture")
    try:
        if max_side is not None and picture.format == "JPEG":
            picture.draft(picture.mode, (2 * max_side, 2 * max_side))  # a phone photo need not be decoded whole
        picture.load()
        picture = _to_srgb(ImageOps.exif_transpose(picture), label)
    except _DECODE_ERRORS as error:
        raise TriptychError(f"{label} is damaged or truncated ({error}); export or download it again") from error
    if max_side is not None and max(picture.size) > max_side:
        size = _fit(*picture.size, max_side)
        # PIL's RGBa is premultiplied RGBA.
        picture = picture.convert("RGBa").resize(size, Image.Resampling.HAMMING).convert("RGBA")
    rgba = np.asarray(picture, dtype=np.float32) / np.float32(255)
    return ReadImage(rgba, bool((rgba[..., 3] < 1).any()))


def _to_srgb(picture: Image.Image, label: str) -> Image.Image:
    """Any PIL mode -> RGBA, 8 bits, sRGB."""
    if picture.mode in _HIGH_DEPTH_MODES or picture.mode == "F":
        return _high_depth_to_rgba(picture, label)
    alpha = None
    if picture.mode in _ALPHA_MODES or "transparency" in picture.info:
        alpha = picture.convert("RGBA").getchannel("A")
    profile = picture.info.get("icc_profile")
    colour = picture if picture.mode in ("RGB", "CMYK", "L", "LAB") else picture.convert("RGBA").convert("RGB")
    converted = _apply_profile(colour, profile, label) if profile or colour.mode == "LAB" else None
    rgba = (converted or colour.convert("RGB")).convert("RGBA")
    if alpha is not None:
        rgba.putalpha(alpha)
    return rgba


def _apply_profile(colour: Image.Image, profile: bytes | None, label: str) -> Image.Image | None:
    """The picture in sRGB, or None where its profile is sRGB already or unusable (warned)."""
    srgb = ImageCms.createProfile("sRGB")
    try:
        if profile:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" in ImageCms.getProfileDescription(source):
                return None
        else:
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return ImageCms.profileToProfile(colour, source, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        text = f"the colour profile of {label} cannot be used ({error}); its colours are taken as sRGB"
        warnings.warn(text, stacklevel=2)
        return None


def _high_depth_to_rgba(picture: Image.Image, label: str) -> Image.Image:
    values = np.asarray(picture, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535:
        raise TriptychError(f"{label} has values outside 0-65535 (mode {picture.mode}); save it as an 8 or 16-bit PNG")
    top = 65535.0 if picture.mode in _HIGH_DEPTH_MODES else (1.0 if values.max() <= 1 else 255.0)
    grey = np.rint(np.clip(values / top, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGBA")


def _from_array(source: ImageSource, max_pixels: float) -> np.ndarray:
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise TriptychError(f"a picture array must be (H, W), (H, W, 3) or (H, W, 4), got shape {np.shape(source)}")
    if array.shape[0] * array.shape[1] > max_pixels:
        raise _too_large("the picture", array.shape[0] * array.shape[1], max_pixels)
    if array.dtype == bool:
        values = array.astype(np.float32)
    elif array.dtype in (np.uint8, np.uint16):
        values = array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max)
    elif np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
            raise TriptychError("a float picture must hold finite values in 0-1; divide 0-255 values by 255")
        values = np.clip(array.astype(np.float32), 0, 1)
    else:
        raise TriptychError(f"a picture array must be uint8, uint16, bool or float in 0-1, got {array.dtype}")
    if values.shape[2] == 1:
        values = np.repeat(values, 3, axis=2)
    if values.shape[2] == 3:
        values = np.concatenate([values, np.ones_like(values[..., :1])], axis=2)
    return values


def _fit(width: int, height: int, max_side: int) -> tuple[int, int]:
    scale = max_side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _too_large(label: str, pixels: float, max_pixels: float, prefix: str = "") -> TriptychError:
    return TriptychError(
        f"{label} has {prefix}{pixels / 1e6:.0f} megapixels, over the limit of {max_pixels / 1e6:.0f}; "
        "reduce the picture"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
