"""Task: the autoencoder of a small Flux model, pictures on a key colour <-> latents at an eighth of the size.

The network is diffusers' AutoencoderKLFlux2 with few channels. Its encoder is not trained: it is set up to compute the
principal components of the training sheets' patches (trainer/linear_codec.py), because a learned one of this size needs
hours before it carries colour. The decoder learns, from crops around objects. Its loss is the mean absolute error of
colours, of their differences between neighbours, and of hues over a few pixels: no discriminator, no perceptual
network, so edges are as sharp as the latent allows. The statistics that latents are normalised with (`bn`) are measured
over whole sheets, as Flux's pipelines use them; `scale` leaves the weakest components below unit variance there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data import JoinedData, PreparedData, draw_recolouring, held_out_data, relight, symmetric_sample
from trainer.linear_codec import principal_components, set_linear_encoder
from trainer.prepare.sheets import PLAIN, canonical_shade, grid, on_background, recoloured
from trainer.task import Task


@dataclass(frozen=True)
class FluxVaeConfig:
    """data: prepared folders, the first one's validation objects are held out. channels: fine to coarse, see
    trainer/linear_codec.py for the least. scale: of the components (of patches in -1..1). crop: side of a training crop
    in pixels, 0 is the whole view. component_sheets: how many sheets the components are computed of."""

    data: tuple[str, ...]
    channels: tuple[int, ...] = (32, 48, 96, 96)
    layers_per_block: int = 1
    latent_channels: int = 32
    scale: float = 0.06
    background: tuple[float, float, float] = (1.0, 0.0, 1.0)
    crop: int = 64
    edge_weight: float = 0.5
    hue_weight: float = 1.0
    validation_objects: int = 32
    component_sheets: int = 384
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
        norm_num_groups=1,
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


def component_pictures(data: JoinedData, config: FluxVaeConfig) -> Tensor:
    """Sheets (N, 3, 2S, 2S) in 0-1 spread over the data, every second one recoloured; the same on every call."""
    generator = np.random.default_rng(0)
    sheets = []
    for number, place in enumerate(np.linspace(0, len(data) - 1, min(config.component_sheets, len(data))).astype(int)):
        sample = data[int(place)]
        if number % 2:
            sample = sample | {"albedo": recoloured(sample["albedo"], draw_recolouring(generator))}
        sheets.append(grid(on_background(canonical_shade(sample["albedo"], sample["normal"]), config.background)))
    return torch.stack(sheets)


def coarse_hue(pixels: Tensor) -> Tensor:
    """Red, green and blue less their mean, averaged over 4 x 4 pixels: (B, 3, H, W) -> (B, 3, H / 4, W / 4)."""
    coarse = torch.nn.functional.avg_pool2d(pixels, 4)
    return coarse - coarse.mean(1, keepdim=True)


class FluxVaeTask(Task):
    config: FluxVaeConfig

    def __init__(self, config: FluxVaeConfig) -> None:
        self.config = config

    def build_model(self) -> torch.nn.Module:
        vae = small_vae(self.config)
        self._open()
        pixels = component_pictures(self.data, self.config) * 2 - 1
        directions, squares = principal_components(pixels, self.config.background, self.config.latent_channels)
        set_linear_encoder(vae, directions, self.config.background, self.config.scale)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
        with torch.no_grad():  # the decoder begins with components of one size
            equal = torch.diag(1 / (self.config.scale * squares.sqrt()))
            vae.post_quant_conv.weight.copy_(equal[:, :, None, None])
        return vae

    def setup(self, device: torch.device) -> None:
        self.device = device
        self._open()
        self.held_out = held_out_data(self.config.data[:1])[0]

    def _open(self) -> None:
        self.data = JoinedData(self.config.data, "train")

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
        with torch.no_grad():
            latents = model.encode(pixels).latent_dist.mode()
        decoded = model.decode(latents).sample.float()
        colour = (decoded - pixels).abs().mean()
        edges = sum((decoded.diff(dim=d) - pixels.diff(dim=d)).abs().mean() for d in (-1, -2))
        hue = (coarse_hue(decoded) - coarse_hue(pixels)).abs().mean()
        loss = colour + self.config.edge_weight * edges + self.config.hue_weight * hue
        return loss, {"colour": colour.detach(), "hue": hue.detach()}

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

    def _sheets(self, data: JoinedData | PreparedData, count: int, batch: int = 8) -> list[Tensor]:
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
        """``vae/`` in diffusers' layout, bfloat16, with the latents' statistics of the training sheets."""
        from trainer.export import without_places
        from trainer.prepare.shards import write_json

        measure_statistics(model, self._sheets(self.data, self.config.statistics_sheets))
        model.to(torch.bfloat16).save_pretrained(folder / "vae")
        write_json(folder / "flux_vae.json", without_places(provenance))
