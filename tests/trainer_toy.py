"""A task small enough for tests: fit sin(3 x) + 0.1 noise with a two-layer network."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from trainer.config import TrainConfig
from trainer.task import Task

PICTURE_SIDE = 32


@dataclass(frozen=True)
class ToyOptions:
    scale: float = 1.0
    shape: tuple[int, ...] = (1, 2)
    label: str | None = None


@dataclass(frozen=True)
class ToyConfig:
    width: int = 32
    objects: int = 50
    noise: float = 0.1
    dropout: float = 0.0
    seconds_per_step: float = 0.0
    bad_from: int = 1 << 30  # steps in [bad_from, bad_to) have a non-finite loss
    bad_to: int = 1 << 30
    options: ToyOptions = ToyOptions()


class ToyTask(Task):
    config: ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        self.config = config

    def build_model(self) -> torch.nn.Module:
        width = self.config.width
        return torch.nn.Sequential(
            torch.nn.Linear(1, width), torch.nn.Tanh(), torch.nn.Dropout(self.config.dropout), torch.nn.Linear(width, 1)
        )

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.positions = np.linspace(-1, 1, self.config.objects, dtype=np.float32)

    def size(self) -> int:
        return self.config.objects

    def sample(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        x = self.positions[index]
        y = np.sin(3 * x) + self.config.noise * np.random.default_rng(seed).standard_normal()
        return {"x": torch.tensor([x]), "y": torch.tensor([y], dtype=torch.float32), "index": torch.tensor(index)}

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        time.sleep(self.config.seconds_per_step)
        error = model(batch["x"]).float() - batch["y"]
        loss = error.square().mean()
        if self.config.bad_from <= step < self.config.bad_to:
            loss = loss * float("nan")
        return loss, {"mean_error": error.abs().mean()}

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        x = torch.from_numpy(self.positions).to(self.device)[:, None]
        return {"loss": float((model(x).float() - torch.sin(3 * x)).square().mean())}

    def pictures(self, model: torch.nn.Module) -> Image.Image:
        x = torch.linspace(-1, 1, PICTURE_SIDE, device=self.device)[:, None]
        level = ((model(x).float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu().numpy()
        return Image.fromarray(np.broadcast_to(level.T, (PICTURE_SIDE, PICTURE_SIDE)).copy())

    def export(self, model: torch.nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        save_file({key: value.cpu() for key, value in model.state_dict().items()}, folder / "toy.safetensors")
        (folder / "provenance.json").write_text(json.dumps(provenance))


def recipe() -> TrainConfig:
    return TrainConfig(
        name="toy",
        task="tests.trainer_toy:ToyTask",
        task_config=ToyConfig(),
        steps=60,
        batch_size=8,
        lr=1e-2,
        warmup_steps=5,
        checkpoint_every=7,
        keep_checkpoints=2,
        log_every=5,
        validate_every=20,
        tensorboard=False,
    )


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The operating system refuses files above ``size`` bytes inside the block, as a full disk would."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
