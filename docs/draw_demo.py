"""README's picture: the demo's input views above its turntable.

    python run.py demo -o out && python docs/draw_demo.py out

Reads ``<name>_views.png`` and ``<name>_turntable.png`` from the folder, writes docs/img/demo.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

WIDTH, GAP, PAPER = 1200, 12, (246, 246, 244)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    parts = [sorted(folder.glob(pattern))[0] for pattern in ("*_views.png", "*_turntable.png")]
    sheet = Image.open(parts[0]).convert("RGB")
    side = sheet.width // 2 if sheet.width == sheet.height else sheet.height
    corners = [(x, y) for y in range(0, sheet.height, side) for x in range(0, sheet.width, side)]
    tiles = [sheet.crop((x, y, x + side, y + side)) for x, y in corners]
    tile = (WIDTH - 5 * GAP) // 4
    turntable = Image.open(parts[1]).convert("RGB")
    height = turntable.height * WIDTH // turntable.width
    page = Image.new("RGB", (WIDTH, tile + 3 * GAP + height), PAPER)
    for i, picture in enumerate(tiles):
        page.paste(picture.resize((tile, tile), Image.Resampling.LANCZOS), (GAP + i * (tile + GAP), GAP))
    page.paste(turntable.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, tile + 2 * GAP))
    page.save(Path(__file__).parent / "img" / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
