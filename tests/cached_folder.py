"""A cached folder (trainer/cached.py) of random latents that an image's tokens tell about, small enough for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.published_folder import COND_CHANNELS
from trainer.cached import Record, write_index, write_object

TOKENS = 6
IMAGE_SIZE = 32


def write_cached_folder(folder: Path, objects: int = 8, views: int = 4) -> Path:
    """Latents of the small published folder's sizes: a structure of 8 x 4^3, and voxels of a grid of 16."""
    records: list[Record] = []
    for number in range(objects):
        generator = torch.Generator().manual_seed(number)
        level = torch.randn(8, 1, 1, 1, generator=generator)
        tokens = level.flatten().repeat(3)[:COND_CHANNELS].expand(views, TOKENS, -1)
        tokens = tokens + 0.1 * torch.randn(views, TOKENS, COND_CHANNELS, generator=generator)
        count = 20 + 15 * number
        places = torch.randperm(16**3, generator=generator)[:count].sort().values
        images = torch.zeros(views, 4, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
        images[:, :, 4 + number : 28, 6:26] = 255
        arrays = {
            "conditions": tokens,
            "structure": level + 0.05 * torch.randn(8, 4, 4, 4, generator=generator),
            "coords": torch.stack([places // 256, places // 16 % 16, places % 16], dim=1),
            "latents": level.flatten() * 2 + 0.1 * torch.randn(count, 8, generator=generator) + 1,
            "images": images,
            "azimuths": torch.arange(views) * 90.0,
        }
        split = "validation" if number >= objects - 2 else "train"
        records.append(write_object(folder, f"object_{number}", split, **arrays))
    write_index(folder, records)
    return folder
