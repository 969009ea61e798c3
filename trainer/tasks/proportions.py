"""Task: the network that tells an object's depth from one picture of it, see triptych/models/proportions.py.

Every prepared view is a picture, under a random light and as a photograph is framed; the width of the view beside it is
the answer. What has an empty view beside it is as thin as a pixel; empty views themselves are left out.

The views of an object have one scale, at which its largest side fills the frame. So a view of something deep is small,
and enlarged to a photograph's framing it is blurred: a network learns to read the blur, which explains 60 % of the
variance on prepared objects and 23 % on sharp pictures. Hence pictures are reduced to ``sizes`` pixels, at which most
are equally sharp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data import JoinedData, held_out_data, relight, symmetric_sample
from trainer.prepare.sheets import references
from trainer.task import Task
from triptych.errors import TriptychError
from triptych.images.foreground import alpha_box
from triptych.models.proportions import MOST, Proportions, laplace_loss, write_proportions


@dataclass(frozen=True)
class ProportionsConfig:
    """data: prepared folders, the first one's validation objects are held out. sizes: sides in pixels that pictures are
    reduced to, one of them each; the network's own is the last. width: channels of the first layer.
    lean: of the references, see `trainer.prepare.sheets.references`."""

    data: tuple[str, ...]
    sizes: tuple[int, ...] = (16, 20, 24)
    width: int = 32
    blocks: int = 3
    dropout: float = 0.3
    lean: float = 0.08
    validation_objects: int = 400


def log_depths(alpha: np.ndarray) -> np.ndarray:
    """(4, S, S) uint8 of the rig's views -> (4,): the logarithm of each view's depth by its largest visible extent.
    Depth is the width of the view beside it, one pixel where that is empty. NaN for views that are empty themselves."""
    sides = np.zeros((4, 2))
    for i, view in enumerate(alpha):
        if (view > 127).any():
            left, top, right, bottom = alpha_box(view.astype(np.float32) / 255)
            sides[i] = right - left, bottom - top
    depths = np.roll(sides[:, 0], -1).clip(1) / sides.max(axis=1).clip(1)
    return np.where(sides[:, 0] > 0, np.clip(np.log(depths), -MOST, MOST), np.nan).astype(np.float32)


def halved(albedo: np.ndarray, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views (4, S, S, 4) and (4, S, S, 3) uint8 at half their size: averaged where they are opaque."""
    both = torch.from_numpy(np.concatenate([albedo[..., :3], normal], axis=-1)).permute(0, 3, 1, 2).float()
    alpha = torch.from_numpy(np.ascontiguousarray(albedo[..., 3:])).permute(0, 3, 1, 2).float()
    coverage = F.avg_pool2d(alpha, 2)
    mean = F.avg_pool2d(both * alpha, 2) / coverage.clamp_min(1e-3)
    small = (torch.cat([mean[:, :3], coverage, mean[:, 3:]], dim=1) + 0.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return small[..., :4], small[..., 4:]


def reduced(pictures: Tensor, size: int, shown: int) -> Tensor:
    """(B, 4, S, S) straight alpha, as sharp as ``size`` pixels show it, in ``shown`` of them."""
    solid = torch.cat([pictures[:, :3] * pictures[:, 3:], pictures[:, 3:]], dim=1)
    small = F.interpolate(F.interpolate(solid, size=size, mode="area"), size=shown, mode="bilinear")
    return torch.cat([(small[:, :3] / small[:, 3:].clamp_min(1e-4)).clamp(0, 1), small[:, 3:]], dim=1)


class ProportionsTask(Task):
    config: ProportionsConfig

    def __init__(self, config: ProportionsConfig) -> None:
        self.config = config

    def build_model(self) -> torch.nn.Module:
        return Proportions(self.config.sizes[-1], self.config.width, self.config.blocks, self.config.dropout)

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = JoinedData(self.config.data, "train")
        self.held_out = held_out_data(self.config.data[:1])[0]

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        sample = symmetric_sample(self.data[index], int(generator.integers(8)))
        return self._pictures(sample, generator)

    def _pictures(self, sample: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, Tensor]:
        """Four pictures and their answers; another's copy instead of an empty view."""
        depths = log_depths(sample["albedo"][..., 3])
        known = np.flatnonzero(~np.isnan(depths))
        if not len(known):
            raise TriptychError("an object has no views: prepare the data again")
        chosen = [int(i) for i in np.resize(known, 4)]
        lit = relight(*halved(sample["albedo"], sample["normal"]), generator, chosen)
        framed = [references(view[None], generator, lean=self.config.lean) for view in lit]
        sizes = generator.choice(self.config.sizes, len(framed))
        small = [reduced(view, int(size), self.config.sizes[-1]) for view, size in zip(framed, sizes, strict=True)]
        return {"pictures": torch.cat(small), "depths": torch.from_numpy(depths[chosen])}

    def loss(self, model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        true = batch["depths"].flatten()
        answers = model(batch["pictures"].flatten(0, 1))
        return laplace_loss(answers, true), {"error": (answers[:, 0] - true).abs().mean().detach()}

    def validate(self, model: Any) -> dict[str, float]:
        """loss; error: mean absolute one of the logarithm; constant: that of the best constant; explained: the share of
        the variance that is."""
        count = min(self.config.validation_objects, len(self.held_out))
        places = np.linspace(0, len(self.held_out) - 1, count).astype(int)
        items = [self._pictures(self.held_out[int(i)], np.random.default_rng(i)) for i in places]
        true = torch.cat([item["depths"] for item in items])
        answers = torch.cat([model(item["pictures"].to(self.device)).cpu() for item in items])
        error = answers[:, 0] - true
        return {
            "loss": float(laplace_loss(answers, true)),
            "error": float(error.abs().mean()),
            "constant": float((true - true.median()).abs().mean()),
            "explained": float(1 - error.square().mean() / true.var(correction=0).clamp_min(1e-9)),
        }

    def export(self, model: Any, folder: Path, provenance: dict[str, Any]) -> None:
        """``proportions.safetensors`` and where it comes from."""
        from trainer.export import without_places
        from trainer.prepare.shards import write_json

        write_proportions(model, folder)
        write_json(folder / "proportions.json", without_places(provenance))
