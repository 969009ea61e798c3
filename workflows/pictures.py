"""Draws NAME.jpg beside each workflow, which the editor's template dialog shows:

    python workflows/pictures.py

On the left what goes in, on the right what comes out. All is drawn from the sample object, and from what the embedded
bundle reconstructs of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from triptych.bundles.bundle import load_bundle  # noqa: E402
from triptych.geometry.cameras import turntable_cameras  # noqa: E402
from triptych.geometry.mesh import Mesh  # noqa: E402
from triptych.images.views import prepare_views  # noqa: E402
from triptych.pipelines.reconstruct import Settings, mesh_from_views  # noqa: E402
from triptych.procedural import sample_object, sample_views  # noqa: E402
from triptych.render.views import render_mesh  # noqa: E402

WIDTH, HEIGHT = 480, 320
GROUND, CARD, INK = (236, 234, 230), (250, 249, 247), (60, 62, 66)
SIDES = ("front", "left", "back", "right")
SENTENCE = "a round robot with\na red hat"


def drawn(mesh: Mesh, size: int, mode: str = "shaded", turn: int = 1) -> Image.Image:
    """The mesh from its front's side, ``turn`` twelfths around it, RGBA."""
    camera = turntable_cameras(12)[turn]
    pixels = render_mesh(mesh, [camera], size, mode, follow_camera=True)[0].permute(1, 2, 0)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy(), "RGBA")


def card(pictures: list[Image.Image], side: int) -> Image.Image:
    """Up to four pictures in a light square of ``side`` pixels."""
    square = Image.new("RGBA", (side, side), (*CARD, 255))
    count = 1 if len(pictures) == 1 else 2
    for i, picture in enumerate(pictures):
        small = picture.convert("RGBA").resize((side // count, side // count), Image.Resampling.LANCZOS)
        square.alpha_composite(small, ((i % count) * (side // count), (i // count) * (side // count)))
    return square


def said(sentence: str, side: int) -> Image.Image:
    square = Image.new("RGBA", (side, side), (*CARD, 255))
    font = ImageFont.load_default(17)
    ImageDraw.Draw(square).multiline_text((side / 2, side / 2), sentence, INK, font, "mm", align="center", spacing=8)
    return square


def joined(given: Image.Image, made: Image.Image) -> Image.Image:
    sheet = Image.new("RGBA", (WIDTH, HEIGHT), (*GROUND, 255))
    sheet.alpha_composite(given, (20, (HEIGHT - given.height) // 2))
    sheet.alpha_composite(made, (WIDTH - made.width - 4, (HEIGHT - made.height) // 2))
    left, middle = given.width + 30, HEIGHT // 2
    ImageDraw.Draw(sheet).polygon([(left, middle - 9), (left + 12, middle), (left, middle + 9)], INK)
    return sheet.convert("RGB")


def main() -> None:
    bundle, views, whole = load_bundle(), sample_views(512), sample_object()
    four = mesh_from_views(prepare_views(views), bundle, Settings()).mesh
    one = mesh_from_views(prepare_views({"front": views["front"]}), bundle, Settings()).mesh
    sides = [views[side] for side in SIDES]
    around = Image.new("RGBA", (288, 288))
    for i in range(9):
        around.alpha_composite(drawn(four, 96, turn=i), (96 * (i % 3), 96 * (i // 3)))
    pictures = {
        "views_to_obj": (card(sides, 170), drawn(four, 280)),
        "image_to_obj": (card(sides[:1], 170), drawn(one, 280)),
        "photo_to_obj": (card(sides[:1], 170), drawn(four, 280)),
        "photo_to_obj_klein": (card(sides[:1], 170), drawn(four, 280)),
        "text_to_obj": (said(SENTENCE, 170), drawn(whole, 280)),
        "clean_and_texture": (card([drawn(whole, 340, "clay")], 170), drawn(whole, 280)),
        "turntable": (card([drawn(four, 340)], 150), around),
    }
    for name, (given, made) in pictures.items():
        joined(given, made).save(HERE / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
