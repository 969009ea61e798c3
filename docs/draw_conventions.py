"""Draws the pictures of conventions.md: ``python docs/draw_conventions.py`` rewrites docs/img/*.png.

The object, the cameras and every position come from the library itself, so that the pictures cannot disagree with it.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from triptych.geometry.cameras import FRAME_FILL, RIG_HALF_EXTENT, VIEW_AZIMUTHS_DEG, VIEW_NAMES, Camera
from triptych.procedural import sample_object
from triptych.render.views import render_views, shade

OUT = Path(__file__).resolve().parent / "img"
PAPER, INK, QUIET, LINE = (255, 255, 255), (35, 37, 41), (110, 115, 123), (205, 207, 211)
X_COLOUR, Y_COLOUR, Z_COLOUR, CAMERA_COLOUR = (214, 62, 58), (52, 148, 76), (44, 104, 205), (120, 84, 190)
SCALE = 2  # drawn twice as large, then reduced: smooth lines


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * SCALE)


def new_page(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    page = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    return page, ImageDraw.Draw(page)


def save(page: Image.Image, name: str) -> None:
    page = page.resize((page.width // SCALE, page.height // SCALE), Image.Resampling.LANCZOS)
    page.quantize(192, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


def text(draw: ImageDraw.ImageDraw, at, words: str, *, size: float = 14, fill=INK, anchor: str = "mm") -> None:
    place = (at[0] * SCALE, at[1] * SCALE)
    draw.multiline_text(place, words, font=font(size), fill=fill, anchor=anchor, align="center")


def square(draw: ImageDraw.ImageDraw, corner, size: float, outline) -> None:
    x, y = corner
    draw.rectangle([x * SCALE, y * SCALE, (x + size) * SCALE, (y + size) * SCALE], outline=outline, width=SCALE)


def disc(draw: ImageDraw.ImageDraw, centre, radius: float, *, fill=None, outline=None) -> None:
    x, y, r = centre[0] * SCALE, centre[1] * SCALE, radius * SCALE
    draw.ellipse([x - r, y - r, x + r, y + r], fill, outline, SCALE)


def line(draw: ImageDraw.ImageDraw, start, end, fill, width: float = 1.5) -> None:
    draw.line([start[0] * SCALE, start[1] * SCALE, end[0] * SCALE, end[1] * SCALE], fill, round(width * SCALE))


def arrow(draw: ImageDraw.ImageDraw, start, end, fill, width: float = 2.5, head: float = 11) -> None:
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    line(draw, start, (end[0] - head * 0.7 * math.cos(angle), end[1] - head * 0.7 * math.sin(angle)), fill, width)
    wings = [(end[0] - head * math.cos(angle + s), end[1] - head * math.sin(angle + s)) for s in (-0.4, 0.4)]
    draw.polygon([(x * SCALE, y * SCALE) for x, y in (end, *wings)], fill)


def picture(camera: Camera, size: int) -> Image.Image:
    """The sample object through one camera, on the paper's white; ``size`` before scaling."""
    rgba_B4HW = shade(render_views(sample_object(), [camera], size * SCALE), [camera], light_azimuth_deg=-20.0)
    rgb_B3HW = rgba_B4HW[:, :3] * rgba_B4HW[:, 3:] + (1 - rgba_B4HW[:, 3:])
    return Image.fromarray((rgb_B3HW[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def placed(camera: Camera, size: int, corner: tuple[float, float]):
    """World points -> places on the page, for a square picture whose top left corner is at ``corner``."""

    def place(*points):
        ndc, _ = camera.project(torch.from_numpy(np.array(points, dtype=np.float32)))
        return [(corner[0] + (x + 1) / 2 * size, corner[1] + (1 - y) / 2 * size) for x, y in ndc.tolist()]

    return place


def draw_frame() -> None:
    """The world frame around the object."""
    page, draw = new_page(620, 480)
    camera, corner = Camera(azimuth_deg=40, elevation_deg=24, half_extent=0.98), (70, -10)
    page.paste(picture(camera, 480), (corner[0] * SCALE, corner[1] * SCALE))
    place = placed(camera, 480, corner)
    cube = [(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]
    for i, a in enumerate(cube):
        for b in cube[i + 1 :]:
            if sum(p != q for p, q in zip(a, b, strict=True)) == 1:
                start, end = place(a, b)
                line(draw, start, end, LINE, 1)
    for axis, colour, words, distance in (
        ((1, 0, 0), X_COLOUR, "+X\nthe subject's left", 1.06),
        ((0, 1, 0), Y_COLOUR, "+Y  up", 0.86),
        ((0, 0, 1), Z_COLOUR, "+Z\nthe object\nfaces here", 1.12),
    ):
        start, end, label = place(*(np.array(axis) * length for length in (0.5, 0.8, distance)))
        arrow(draw, start, end, colour)
        text(draw, label, words, fill=colour)
    text(draw, (310, 464), "model space: centred, longest side 1, each coordinate in [-0.5, 0.5]", fill=QUIET, size=13)
    save(page, "frame.png")


def draw_rig() -> None:
    """The four cameras of the rig from above, and what each of them sees."""
    page, draw = new_page(760, 700)
    centre, reach, size = (380, 346), 130, 150
    corners = {"front": (305, 514), "left": (570, 259), "back": (305, 6), "right": (40, 259)}
    above = Camera(azimuth_deg=0, elevation_deg=89.9)
    page.paste(picture(above, 180), ((centre[0] - 90) * SCALE, (centre[1] - 90) * SCALE))
    disc(draw, centre, reach, outline=LINE)
    arrow(draw, (centre[0] + 62, centre[1] - 40), (centre[0] + 98, centre[1] - 40), X_COLOUR)
    text(draw, (centre[0] + 80, centre[1] - 54), "+X", fill=X_COLOUR)
    arrow(draw, (centre[0] - 30, centre[1] + 52), (centre[0] - 30, centre[1] + 88), Z_COLOUR)
    text(draw, (centre[0] - 50, centre[1] + 74), "+Z", fill=Z_COLOUR)
    for name, azimuth in zip(VIEW_NAMES, VIEW_AZIMUTHS_DEG, strict=True):
        camera = Camera(azimuth_deg=azimuth)
        x, _, z = (camera.position() / camera.radius).tolist()
        at = (centre[0] + reach * x, centre[1] + reach * z)
        disc(draw, at, 6, fill=CAMERA_COLOUR)
        arrow(draw, at, (at[0] - 30 * x, at[1] - 30 * z), CAMERA_COLOUR, 2)
        corner = corners[name]
        page.paste(picture(camera, size), (corner[0] * SCALE, corner[1] * SCALE))
        square(draw, corner, size, LINE)
        text(draw, (corner[0] + size / 2, corner[1] + size + 14), f"{name}, azimuth {azimuth:.0f}°", size=13)
    save(page, "rig.png")


def draw_scale() -> None:
    """The frame of a prepared view: the longest side fills 0.85 of it."""
    page, draw = new_page(520, 420)
    size, corner = 340, (70, 26)
    camera = Camera()
    page.paste(picture(camera, size), (corner[0] * SCALE, corner[1] * SCALE))
    square(draw, corner, size, INK)
    (top, bottom) = placed(camera, size, corner)((0, 0.5, 0), (0, -0.5, 0))
    side = corner[0] + size
    for y in (top[1], bottom[1]):
        line(draw, (corner[0] + size / 2, y), (side + 40, y), LINE, 1)
    arrow(draw, (side + 30, (top[1] + bottom[1]) / 2), (side + 30, top[1]), INK, 1.5, 9)
    arrow(draw, (side + 30, (top[1] + bottom[1]) / 2), (side + 30, bottom[1]), INK, 1.5, 9)
    text(draw, (side + 36, (top[1] + bottom[1]) / 2), f"{FRAME_FILL}\nof the\nframe\n\n1 unit", size=13, anchor="lm")
    text(draw, (corner[0] + size / 2, 392), f"the frame's side: {2 * RIG_HALF_EXTENT:.4f} = 1 / {FRAME_FILL} units")
    save(page, "scale.png")


def draw_sheets() -> None:
    """A view sheet and a triptych."""
    page, draw = new_page(820, 360)
    views = {name: Camera(azimuth_deg=azimuth) for name, azimuth in zip(VIEW_NAMES, VIEW_AZIMUTHS_DEG, strict=True)}
    sheet = {"front": (20, 20), "left": (170, 20), "back": (20, 170), "right": (170, 170)}
    row = {"front": (360, 90), "left": (510, 90), "back": (660, 90)}
    for places in (sheet, row):
        for name, (x, y) in places.items():
            page.paste(picture(views[name], 150), (x * SCALE, y * SCALE))
            square(draw, (x, y), 150, LINE)
            text(draw, (x + 8, y + 8), name, size=12, fill=QUIET, anchor="la")
    text(draw, (170, 340), "view sheet: 2 x 2, in reading order", size=14)
    text(draw, (585, 262), "triptych: one row", size=14)
    save(page, "sheets.png")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for draw_one in (draw_frame, draw_rig, draw_scale, draw_sheets):
        draw_one()
