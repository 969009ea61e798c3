"""Contact sheets: many pictures of a mesh on one page, to look at."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import TriptychError
from ..geometry.cameras import Camera, turntable_cameras
from ..geometry.mesh import Mesh
from .views import RENDER_MODES, picture, render_views

BACKGROUND = (0.955, 0.955, 0.95)  # sRGB, a light neutral page


def over_background(images_B4HW: Tensor, background: tuple[float, float, float] = BACKGROUND) -> Tensor:
    """RGBA (B, 4, H, W), straight alpha -> RGB (B, 3, H, W) over one colour (sRGB 0-1)."""
    color, alpha = images_B4HW[:, :3], images_B4HW[:, 3:]
    return color * alpha + (1 - alpha) * color.new_tensor(background)[None, :, None, None]


def contact_sheet(
    rows: Sequence[Tensor],
    path: Path | str | None = None,
    *,
    background: tuple[float, float, float] = BACKGROUND,
    gap: int = 4,
) -> Image.Image:
    """Rows of pictures as one RGB page.

    rows: each (N, 3 or 4, H, W) float 0-1 sRGB; rows may differ in length and size. gap: pixels between pictures.
    path: also save the page there as PNG, written beside its final name and then renamed.
    Raises TriptychError when there is nothing to show, or the file cannot be written.
    """
    if not rows or any(row.ndim != 4 or row.shape[1] not in (3, 4) or len(row) == 0 for row in rows):
        raise TriptychError(
            f"a contact sheet needs rows of (N, 3 or 4, H, W) pictures, got shapes {[tuple(row.shape) for row in rows]}"
        )
    shown = [over_background(row, background) if row.shape[1] == 4 else row for row in rows]
    width = max(len(row) * (row.shape[3] + gap) for row in shown) + gap
    height = sum(row.shape[2] + gap for row in shown) + gap
    page = torch.tensor(background).view(3, 1, 1).repeat(1, height, width)
    top = gap
    for row in shown:
        for i, cell in enumerate(row):
            left = gap + i * (row.shape[3] + gap)
            page[:, top : top + row.shape[2], left : left + row.shape[3]] = cell.detach().cpu()
        top += row.shape[2] + gap
    image = Image.fromarray((page.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
    if path is not None:
        save_png(image, path)
    return image


def turntable_sheet(
    mesh: Mesh,
    path: Path | str | None = None,
    count: int = 8,
    size: int = 256,
    *,
    rows: Sequence[str] = ("shaded", "clay"),
    elevation_deg: float = 15.0,
    device: torch.device | str = "cpu",
) -> Image.Image:
    """The mesh from ``count`` azimuths, the front first, one row per render mode, every picture lit alike.

    The mesh is shown in model space (centred, longest side 1). ``path``, and the errors, as in ``contact_sheet``.
    """
    unknown = [mode for mode in rows if mode not in RENDER_MODES]
    if unknown or not rows or count < 1:
        raise TriptychError(
            f"a turntable needs a count above 0 and rows of {', '.join(RENDER_MODES)}, got {count} and {list(rows)}"
        )
    mesh = mesh.normalized()
    cameras = _close_cameras(mesh, count, elevation_deg)
    rendered = render_views(mesh, cameras, size, device=device)
    return contact_sheet([picture(rendered, cameras, mode, follow_camera=True) for mode in rows], path)


def _close_cameras(mesh: Mesh, count: int, elevation_deg: float) -> list[Camera]:
    """Turntable cameras whose common frame just holds the mesh from every side."""
    cameras = [replace(camera, half_extent=1.0) for camera in turntable_cameras(count, elevation_deg)]
    vertices = torch.tensor(mesh.vertices[np.unique(mesh.faces)])
    reach = max(float(camera.project(vertices)[0].abs().max()) for camera in cameras)
    return [replace(camera, half_extent=1.06 * reach) for camera in cameras]


def save_png(image: Image.Image, path: Path | str) -> None:
    """Write a PNG beside its final name, then rename: an interruption or a full disk never leaves half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as stream:
            image.save(stream, format="PNG")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise TriptychError(
            f"cannot write {path} ({error.strerror or error}): choose a folder that exists, is writable and has space"
        ) from error
