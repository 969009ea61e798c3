"""Task: the structure VAE, a 64^3 solid <-> a 16^3 latent.

Published TRELLIS learns the occupancy of surface voxels with Dice; its first stage only has to place the second. Ours
is a surface by itself until then, so the target is the solid, softened by its signed distance, and most of the loss
lies in the voxels around the surface: the isosurface of the logits is then accurate below a voxel.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from trainer.data import PreparedData, soft_occupancy
from triptych.models.structure_vae import SparseStructureDecoder, SparseStructureEncoder


@dataclass(frozen=True)
class StructureVaeConfig:
    """data: a prepared folder. Channels: of the encoder, fine to coarse, and of the decoder, coarse to fine."""

    data: str
    latent_channels: int = 8
    encoder_channels: tuple[int, ...] = (8, 32, 64)
    decoder_channels: tuple[int, ...] = (56, 24, 8)
    num_res_blocks: int = 0
    num_res_blocks_middle: int = 1
    kl_weight: float = 1e-3
    far_weight: float = 0.1  # of a voxel beyond the band, against 1 inside it
    softness: float = 0.4  # voxels
    validation_objects: int = 48


class StructureVae(nn.Module):
    """Encoder and decoder, trained together."""

    def __init__(self, config: StructureVaeConfig) -> None:
        super().__init__()
        encoder, decoder = network_configs(config)
        self.encoder = SparseStructureEncoder(**encoder)
        self.decoder = SparseStructureDecoder(**decoder)


def network_configs(config: StructureVaeConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The constructor arguments of encoder and decoder, as a bundle keeps them."""
    shared = {
        "latent_channels": config.latent_channels,
        "num_res_blocks": config.num_res_blocks,
        "num_res_blocks_middle": config.num_res_blocks_middle,
    }
    return (
        {"in_channels": 1, "channels": list(config.encoder_channels)} | shared,
        {"out_channels": 1, "channels": list(config.decoder_channels)} | shared,
    )


def symmetric(volume: np.ndarray, number: int) -> np.ndarray:
    """One of the cube's 48 symmetries of a (R, R, R) volume."""
    axes = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)][number % 6]
    flips = tuple(axis for axis in range(3) if number // 6 >> axis & 1)
    return np.flip(volume.transpose(axes), flips)


def solid_iou(logits: Tensor, sdf: Tensor) -> Tensor:
    """(B,) intersection over union of two solids at voxel centres; logits (B, 1, R, R, R), sdf (B, R, R, R)."""
    predicted, true = logits[:, 0] > 0, sdf < 0
    both = (predicted & true).flatten(1).sum(1)
    return both / (predicted | true).flatten(1).sum(1).clamp_min(1)


class StructureVaeTask:
    config: StructureVaeConfig

    def __init__(self, config: StructureVaeConfig) -> None:
        self.config = config

    def build_model(self) -> nn.Module:
        model = StructureVae(self.config)
        for module in model.modules():
            if isinstance(module, nn.Conv3d) and module.weight.shape[-1] == 3 and module.weight.abs().sum() == 0:
                nn.init.normal_(module.weight, std=1e-3)
        return model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = PreparedData(self.config.data, "train")
        self.held_out = PreparedData(self.config.data, "validation")
        self.band = float(self.data.options["sdf_band"])

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        sdf = symmetric(self.data.field(index), int(generator.integers(48)))
        shape = (self.config.latent_channels, *[len(sdf) // 2 ** (len(self.config.encoder_channels) - 1)] * 3)
        eps = generator.standard_normal(shape, dtype=np.float32)
        return {"sdf": torch.from_numpy(np.ascontiguousarray(sdf)), "eps": torch.from_numpy(eps)}

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def loss(self, model: StructureVae, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        sdf, config = batch["sdf"], self.config
        target = soft_occupancy(sdf, self.band, config.softness)
        z, mean, logvar = model.encoder(target[:, None], True, True, eps=batch["eps"])
        logits = model.decoder(z)[:, 0].float()
        weight = torch.where(sdf.abs() < 127, 1.0, config.far_weight)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        bce = ((bce * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)).mean()
        kl = 0.5 * (mean.float().square() + logvar.float().exp() - logvar.float() - 1).mean()
        near = (torch.sigmoid(logits) - target).abs()[sdf.abs() < 127].mean()
        return bce + config.kl_weight * kl, {"bce": bce.detach(), "kl": kl.detach(), "near_error": near.detach()}

    def validate(self, model: StructureVae) -> dict[str, float]:
        losses, overlaps = [], []
        for fields in self._held_out().split(8):
            target = soft_occupancy(fields, self.band, self.config.softness)
            logits = model.decoder(model.encoder(target[:, None])).float()
            weight = torch.where(fields.abs() < 127, 1.0, self.config.far_weight)
            bce = F.binary_cross_entropy_with_logits(logits[:, 0], target, reduction="none")
            losses.append((bce * weight).flatten(1).sum(1) / weight.flatten(1).sum(1))
            overlaps.append(solid_iou(logits, fields))
        return {"loss": float(torch.cat(losses).mean()), "iou": float(torch.cat(overlaps).mean())}

    def _held_out(self) -> Tensor:
        count = min(self.config.validation_objects, len(self.held_out.records))
        step = len(self.held_out) // len(self.held_out.records)
        fields = [self.held_out.field(i * step) for i in range(count)]
        return torch.from_numpy(np.stack(fields)).to(self.device)

    def pictures(self, model: StructureVae) -> Image.Image | None:
        """Pairs of depth-shaded fields, true above reconstructed."""
        fields = self._held_out()[:8]
        logits = model.decoder(model.encoder(soft_occupancy(fields, self.band, self.config.softness)[:, None]))
        return field_sheet([(fields < 0).float().cpu().numpy(), (logits[:, 0] > 0).float().cpu().numpy()])

    def export(self, model: StructureVae, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components
        from trainer.model_card import write_model_card

        encoder, decoder = network_configs(self.config)
        write_components(
            folder,
            {"structure_encoder": (model.encoder, encoder), "structure_decoder": (model.decoder, decoder)},
            provenance,
        )
        write_model_card(folder, provenance, self.data.records)


def field_sheet(rows: list[np.ndarray]) -> Image.Image:
    """Each row: (N, R, R, R) occupancy seen from the front, lighter is nearer."""
    tiles = []
    for row in rows:
        size = row.shape[-1]
        filled = row > 0.5
        first = np.argmax(filled[..., ::-1], axis=-1)
        shade = np.where(filled.any(axis=-1), 255 - first * (180 // size + 2), 20).clip(0, 255).astype(np.uint8)
        tiles.append(np.concatenate([np.flipud(tile.T) for tile in shade], axis=1))
    return Image.fromarray(np.concatenate(tiles)).resize((tiles[0].shape[1] * 2, len(tiles) * tiles[0].shape[0] * 2), 0)
