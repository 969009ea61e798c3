"""Task: the autoencoder of a small Flux model, pictures on a key colour <-> latents at an eighth of the size.

The network is diffusers' AutoencoderKLFlux2 with few channels. It learns from crops around objects; the statistics that
its latents are normalised with (`bn`) are measured over whole sheets when it is exported, as Flux's pipelines use them.
The loss is the mean absolute error of colours and of their differences between neighbours: no discriminator, no
perceptual network, so edges are as sharp as the latent allows and textures somewhat soft.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data import JoinedData, draw_recolouring, relight, symmetric_sample
from trainer.prepare.sheets import PLAIN, canonical_shade, grid, on_background, recoloured
from trainer.task import Task


@dataclass(frozen=True)
class FluxVaeConfig:
    """data: prepared folders, the first one's validation objects are held out. channels: fine to coarse, each a
    multiple of 32 so that ComfyUI's group norms fit. crop: side of a training crop in pixels; 0 is the whole view."""

    data: tuple[str, ...]
    channels: tuple[int, ...] = (32, 32, 64, 96)
    layers_per_block: int = 1
    latent_channels: int = 32
    background: tuple[float, float, float] = (1.0, 0.0, 1.0)
    crop: int = 64
    kl_weight: float = 1e-6
    edge_weight: float = 1.0
    validation_objects: int = 32
    statistics_sheets: int = 256


def small_vae(config: FluxVaeConfig) -> Any:
    """An AutoencoderKLFlux2 of the config's size with random weights."""
    from diffusers import AutoencoderKLFlux2

    stages = len(config.channels)
    return AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=32,
        sample_size=256,
        use_quant_conv=True,
        use_post_quant_conv=True,
    )


def patchified(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4 C, H / 2, W / 2): each 2 x 2 block becomes channels, in Flux.2's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def measure_statistics(vae: Any, sheets: list[Tensor]) -> None:
    """Sets ``vae.bn`` to mean and variance of the patchified latents of batches (B, 3, H, W) of pictures in 0-1."""
    latents = torch.cat([patchified(vae.encode(batch * 2 - 1).latent_dist.mode()).float() for batch in sheets])
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


class FluxVaeTask(Task):
    config: FluxVaeConfig

    def __init__(self, config: FluxVaeConfig) -> None:
        self.config = config

    def build_model(self) -> torch.nn.Module:
        return small_vae(self.config)

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = JoinedData(self.config.data, "train")
        self.held_out = JoinedData(self.config.data[:1], "validation")

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        sample = symmetric_sample(self.data[index], int(generator.integers(8)))
        if generator.random() < 0.5:
            sample = sample | {"albedo": recoloured(sample["albedo"], draw_recolouring(generator))}
        view = int(generator.integers(4))
        if generator.random() < 0.6:
            rgba = canonical_shade(sample["albedo"], sample["normal"])[view]
        else:
            rgba = relight(sample["albedo"], sample["normal"], generator, [view], PLAIN)[0]
        pixels = on_background(rgba, self.config.background)
        return {"pixels": self._crop(pixels, rgba[3], generator)}

    def _crop(self, pixels: Tensor, alpha: Tensor, generator: np.random.Generator) -> Tensor:
        """A square around a random pixel of the object."""
        size, crop = pixels.shape[-1], self.config.crop
        if not 0 < crop < size:
            return pixels
        places = (alpha >= alpha.max() / 2).nonzero()  # a blade seen from its edge covers half of no pixel
        row, column = places[int(generator.integers(len(places)))].tolist()
        top = int(np.clip(row - generator.integers(crop), 0, size - crop))
        left = int(np.clip(column - generator.integers(crop), 0, size - crop))
        return pixels[:, top : top + crop, left : left + crop].contiguous()

    def loss(self, model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        pixels = batch["pixels"].contiguous(memory_format=torch.channels_last) * 2 - 1
        posterior = model.encode(pixels).latent_dist
        # The noise is a function of the loop's seed for this step, as the loop promises.
        decoded = model.decode(posterior.mean + posterior.std * torch.randn_like(posterior.mean)).sample.float()
        colour = (decoded - pixels).abs().mean()
        edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        loss = colour + self.config.edge_weight * edges + self.config.kl_weight * kl
        return loss, {"colour": colour.detach(), "kl": kl.detach()}

    def validate(self, model: Any) -> dict[str, float]:
        """PSNR of held-out sheets in dB, and the mean absolute error (loss) of colours 0-1."""
        squares, errors = [], []
        for batch in self._sheets(self.held_out, self.config.validation_objects):
            decoded = self._decoded(model, batch)
            squares.append((decoded - batch).square().flatten(1).mean(1))
            errors.append((decoded - batch).abs().flatten(1).mean(1))
        psnr = -10 * torch.cat(squares).log10()
        return {"loss": float(torch.cat(errors).mean()), "psnr": float(psnr.mean())}

    def _decoded(self, model: Any, batch: Tensor) -> Tensor:
        latents = model.encode(batch * 2 - 1).latent_dist.mode()
        return (model.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    def _sheets(self, data: JoinedData, count: int, batch: int = 8) -> list[Tensor]:
        """Batches of whole sheets (B, 3, 2S, 2S) under the fixed light, spread over the data."""
        places = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
        items = (data[int(place)] for place in places)
        sheets = [grid(on_background(canonical_shade(s["albedo"], s["normal"]), self.config.background)) for s in items]
        return [part.to(self.device) for part in torch.stack(sheets).split(batch)]

    def pictures(self, model: Any) -> Image.Image | None:
        """Held-out sheets above their reconstructions."""
        batch = self._sheets(self.held_out, 6)[0]
        rows = [torch.cat(list(part), dim=-1) for part in (batch, self._decoded(model, batch))]
        pixels = (torch.cat(rows, dim=-2).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def export(self, model: Any, folder: Path, provenance: dict[str, Any]) -> None:
        """``vae/`` in diffusers' layout, bfloat16 but for the latents' statistics of the training sheets."""
        measure_statistics(model, self._sheets(self.data, self.config.statistics_sheets))
        model.to(torch.bfloat16).save_pretrained(folder / "vae")
