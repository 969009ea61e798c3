"""A prepared folder (trainer/prepare) of coloured slabs, written without rendering anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SIZE = 64


def write_prepared_folder(folder: Path, splits: Sequence[str]) -> Path:
    """One object of one row for each of the splits."""
    (folder / "shards").mkdir(parents=True)
    count = len(splits)
    albedo = np.zeros((count, 4, SIZE, SIZE, 4), dtype=np.uint8)
    for number in range(count):
        albedo[number, :, 8 + number : 56, 12:50] = (200 - 20 * number, 30 + 20 * number, 40, 255)
    normal = np.full((count, 4, SIZE, SIZE, 3), 128, dtype=np.uint8)
    sdf = np.full((count, 8, 8, 8), 127, dtype=np.int8)
    sdf[:, 2:6, 2:6, 2:6] = -127
    save_file({"albedo": albedo, "normal": normal, "sdf": sdf}, str(folder / "shards" / "shard_00000.safetensors"))
    records = [
        {
            "key": f"object_{number}", "status": "ok", "split": split, "shard": "shard_00000", "rows": [number],
            "yaws_deg": [0.0], "name": "red_box", "category": "toy", "licence": "CC0-1.0", "attribution": "nobody",
            "file_sha256": f"{number:064x}",
        }
        for number, split in enumerate(splits)
    ]  # fmt: skip
    options = {"resolution": 8, "view_size": SIZE, "sdf_band": 4}
    (folder / "index.json").write_text(json.dumps({"format": 1, "options": options, "records": records}))
    return folder
