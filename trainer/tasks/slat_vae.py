"""Task: the structured-latent VAE, voxel attributes <-> a mesh.

Published TRELLIS trains encoder and Gaussian decoder on renders, then a mesh decoder on the frozen latents. Here both
encoder and mesh decoder learn together, and mostly from the prepared distances and surface points, which is exact and
far cheaper on CPUs than rendering. Rendered losses can be added by weight and schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.losses import LossWeights, WeightConfig, kl_loss
from trainer.structured import FINE_BAND, StructuredData, capped, decode_attributes, draw_sample, join_samples
from trainer.tasks.mesh_supervision import (
    NEAR,
    RENDERED,
    at_points,
    direct_losses,
    drawn_views,
    lattice_of,
    outer_mesh,
    rendered_losses,
    true_mesh,
    two_sided_distance,
)
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.flexicubes import features_to_mesh
from triptych.models.slat_decoder import SLatMeshDecoder
from triptych.models.slat_encoder import SLatEncoder
from triptych.render.sheets import contact_sheet
from triptych.render.views import picture, render_views
from triptych.sparse.tensor import SparseTensor

ATTRIBUTES = 10
DIRECT_WEIGHTS = {
    "sdf": 1.0,
    "surface": 0.5,
    "point_color": 2.0,
    "point_normal": 0.5,
    "consistency": 0.1,
    "kl": 1e-6,
}


@dataclass(frozen=True)
class MeshTaskConfig:
    """What both tasks of the mesh decoder share. data: a prepared folder with second-stage arrays.

    features: cached image features instead of attributes. tau: range of the active set's half width, in voxels;
    perturbation: smooth noise on it, in voxels; max_voxels: of one sample, 0 for all. points: of each sample.
    upsample_channels: width after each subdivision of the decoder, one (128^3 cubes) or two (256^3).
    rendered_views: pictures of each sample, when a rendered loss has a weight.
    """

    data: str
    features: str | None = None
    latent_channels: int = 8
    decoder_channels: int = 128
    decoder_blocks: int = 3
    decoder_heads: int = 4
    upsample_channels: tuple[int, ...] = (64,)
    tau: tuple[float, float] = (0.9, 1.6)
    perturbation: float = 0.6
    max_voxels: int = 0
    points: int = 2048
    losses: WeightConfig = field(default_factory=lambda: WeightConfig(weights=dict(DIRECT_WEIGHTS)))
    rendered_views: int = 1
    ssim_weight: float = 0.2
    perceptual_weight: float = 0.0
    validation_objects: int = 8
    validation_tau: float = 1.0


@dataclass(frozen=True)
class SlatVaeConfig(MeshTaskConfig):
    """Encoder sizes in addition. input_gain: see ``start_boldly``; 1 starts as published."""

    encoder_channels: int = 96
    encoder_blocks: int = 2
    encoder_heads: int = 4
    input_gain: float = 20.0


class SlatVae(nn.Module):
    """Encoder, mesh decoder and the weights of their losses."""

    def __init__(self, encoder: dict[str, Any], decoder: dict[str, Any], losses: WeightConfig) -> None:
        super().__init__()
        self.encoder = SLatEncoder(**encoder)
        self.decoder = SLatMeshDecoder(**decoder)
        self.loss_weights = LossWeights(losses)


def decoder_config(config: MeshTaskConfig, resolution: int) -> dict[str, Any]:
    """The decoder's constructor arguments, as a bundle keeps them."""
    return {
        "resolution": resolution,
        "model_channels": config.decoder_channels,
        "latent_channels": config.latent_channels,
        "num_blocks": config.decoder_blocks,
        "num_heads": config.decoder_heads,
        "representation_config": {"use_color": True},
        "num_upsample": len(config.upsample_channels),
        "upsample_channels": list(config.upsample_channels),
    }


class MeshTask:
    """Data, supervision, validation and pictures of a mesh decoder; a subclass says where latents come from."""

    config: Any

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device = torch.device("cpu")

    # ---- for subclasses

    def encode(self, model: Any, batch: dict[str, Tensor], sample: bool) -> tuple[SparseTensor, dict[str, Tensor]]:
        """Latents of a batch (drawn from the posterior if ``sample``), and further losses by name."""
        raise NotImplementedError

    # ---- data

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = StructuredData(self.config.data, "train", self.config.features)
        self.held_out = StructuredData(self.config.data, "validation", self.config.features)

    def size(self) -> int:
        return len(self.data)

    def cost(self, index: int) -> int:
        """About how many voxels the sample has: what balanced batches count."""
        return capped(self.data.voxels(index), self.config.max_voxels)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        config, generator = self.config, np.random.default_rng(seed)
        sample = draw_sample(
            self.data[index],
            self.data.resolution,
            self.data.band,
            generator,
            tau=config.tau,
            perturbation=config.perturbation,
            max_voxels=config.max_voxels,
            points=config.points,
            levels=len(config.upsample_channels),
        )
        eps = generator.standard_normal((int(sample["count"]), config.latent_channels), dtype=np.float32)
        sample["eps"] = torch.from_numpy(eps)
        if any(config.losses.weights.get(name, 0) > 0 for name in RENDERED):
            chosen = np.sort(generator.permutation(4)[: config.rendered_views])
            sample |= drawn_views(self.data.views(index), int(sample["symmetry"]), chosen.tolist())
        return sample

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return join_samples(samples)

    def inputs(self, batch: dict[str, Tensor]) -> SparseTensor:
        """What the encoder sees: attributes (n, 10) or cached features (n, C)."""
        feats = batch["features"].float() if "features" in batch else decode_attributes(batch["attributes"])
        return SparseTensor(feats, batch["coords"], len(batch["lengths"]), self.data.resolution, check=False)

    # ---- loss

    def loss(self, model: Any, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        latents, losses = self.encode(model, batch, True)
        out = model.decoder(latents)
        with torch.autocast(self.device.type, enabled=False):
            lattice = lattice_of(out, batch["rows"], len(batch["target"]))
            losses |= direct_losses(lattice, batch)
            losses |= rendered_losses(
                out, batch, model.loss_weights, step, self.config.ssim_weight, self.config.perceptual_weight
            )
            total, logged = model.loss_weights(losses, step)
        logged["voxels"] = batch["lengths"].float().mean()
        return total, logged

    # ---- validation

    def _held_out_batches(self, count: int) -> list[tuple[int, dict[str, Tensor]]]:
        batches = []
        for number in range(min(count, len(self.held_out))):
            sample = draw_sample(
                self.held_out[number],
                self.held_out.resolution,
                self.held_out.band,
                np.random.default_rng(number),
                tau=(self.config.validation_tau,) * 2,
                perturbation=0.0,
                points=4096,
                levels=len(self.config.upsample_channels),
                symmetry=0,
            )
            batch = {key: value.to(self.device) for key, value in join_samples([sample]).items()}
            batches.append((number, batch))
        return batches

    def validate(self, model: Any) -> dict[str, float]:
        """Of held-out objects, from the posterior's mean, on the active set of ``validation_tau``:

        tsdf_error (fine voxels) and sign_accuracy at lattice vertices within 1.5 fine voxels of the surface,
        color_error and normal_error (0-1) at surface points, chamfer of the extracted mesh in model units.
        """
        found: dict[str, list[float]] = {}
        for number, batch in self._held_out_batches(self.config.validation_objects):
            out = model.decoder(self.encode(model, batch, False)[0])
            lattice = lattice_of(out, batch["rows"], len(batch["target"]))
            near = batch["target"].abs() < NEAR
            error = (lattice.field - batch["target"]).abs()[near].mean() * FINE_BAND
            right = ((lattice.field < 0) == (batch["target"] < 0))[near].float().mean()
            direct = direct_losses(lattice, batch)
            points = self.held_out[number]["points"].astype(np.float32) / 65534
            measured: dict[str, Any] = {
                "tsdf_error": error,
                "sign_accuracy": right,
                "surface_error": direct["surface"],
                "color_error": direct["point_color"],
                "normal_error": direct["point_normal"],
                "chamfer": self._chamfer(out, batch, points),
            }
            for key, value in measured.items():
                found.setdefault(key, []).append(float(value))
        means = {key: float(np.mean(values)) for key, values in found.items()}
        means["loss"] = means["tsdf_error"] + means["surface_error"] + 2 * means["color_error"]
        return means

    def _chamfer(self, out: SparseTensor, batch: dict[str, Tensor], points: np.ndarray) -> float:
        coords, resolution = out.coords[:, 1:], out.resolution or 1
        mesh = outer_mesh(features_to_mesh(coords, out.feats.float(), resolution), coords, resolution)
        true = outer_mesh(true_mesh(coords, 0, batch, resolution), coords, resolution)
        return two_sided_distance(mesh, points, true)

    def pictures(self, model: Any) -> Image.Image | None:
        """Each held-out object: prepared colours and normals, then those of the reconstructed mesh, from four sides."""
        cameras, rows = rig_cameras(), []
        for number, batch in self._held_out_batches(4):
            out = model.decoder(self.encode(model, batch, False)[0])
            coords, resolution = out.coords[:, 1:], out.resolution or 1
            mesh = outer_mesh(features_to_mesh(coords, out.feats.float(), resolution), coords, resolution)
            views = self.held_out.views(number)
            albedo = torch.from_numpy(views["albedo"]).permute(0, 3, 1, 2).float() / 255
            normal = torch.from_numpy(views["normal"]).permute(0, 3, 1, 2).float() / 127.5 - 1
            turn = torch.stack([camera.rotation() for camera in cameras])
            facing = torch.einsum("bij,bjhw->bihw", turn, normal) * 0.5 + 0.5
            true = torch.cat([albedo, torch.cat([facing, albedo[:, 3:]], dim=1)])
            if not len(mesh.faces):
                rows += [true]
                continue
            drawn = render_views(mesh, cameras, albedo.shape[-1])
            rows += [true, torch.cat([picture(drawn, cameras, mode) for mode in ("albedo", "normal")])]
        return contact_sheet(rows) if rows else None

    # ---- export

    def latent_statistics(self, model: Any, count: int = 64) -> dict[str, list[float]]:
        """Mean and standard deviation of each latent channel over ``count`` training samples' voxels."""
        total, squares, voxels = torch.zeros(()), torch.zeros(()), 0
        for index in range(0, len(self.data), max(1, len(self.data) // count)):
            batch = self.collate([self.sample(index, index)])
            batch = {key: value.to(self.device) for key, value in batch.items()}
            z = self.encode(model, batch, False)[0].feats.double()
            total, squares, voxels = total + z.sum(0), squares + z.square().sum(0), voxels + len(z)
        mean = total / voxels
        std = (squares / voxels - mean**2).clamp_min(1e-12).sqrt()
        return {"mean": mean.tolist(), "std": std.tolist()}


def start_boldly(model: SlatVae, gain: float) -> None:
    """Another start than the published one, for runs of hundreds of steps instead of hundreds of thousands.

    Positions enter the networks with variance 1/2 a channel, attributes and latents with a tenth of it, and the
    published output layers begin at zero with a posterior of deviation 1: for the first few hundred steps nothing but
    colour gets through. Here the input layers are ``gain`` times as strong, outputs begin small, and the posterior
    narrow (e^-3).
    """
    if gain == 1:
        return
    channels = model.encoder.latent_channels
    with torch.no_grad():
        for network in (model.encoder, model.decoder):
            network.input_layer.weight.mul_(gain)
            nn.init.normal_(network.out_layer.weight, std=0.02)
        nn.init.normal_(model.encoder.out_layer.weight, std=0.05)
        model.encoder.out_layer.weight[channels:] = 0
        model.encoder.out_layer.bias[channels:] = -6


class SlatVaeTask(MeshTask):
    config: SlatVaeConfig

    def __init__(self, config: SlatVaeConfig) -> None:
        super().__init__(config)

    def encoder_config(self, resolution: int, in_channels: int) -> dict[str, Any]:
        config = self.config
        return {
            "resolution": resolution,
            "in_channels": in_channels,
            "model_channels": config.encoder_channels,
            "latent_channels": config.latent_channels,
            "num_blocks": config.encoder_blocks,
            "num_heads": config.encoder_heads,
        }

    def network_configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Constructor arguments of encoder and decoder, with the data's resolution and feature width."""
        data = StructuredData(self.config.data, "train", self.config.features)
        channels = data[0]["features"].shape[1] if self.config.features else ATTRIBUTES
        return self.encoder_config(data.resolution, channels), decoder_config(self.config, data.resolution)

    def build_model(self) -> nn.Module:
        encoder, decoder = self.network_configs()
        model = SlatVae(encoder, decoder, self.config.losses)
        start_boldly(model, self.config.input_gain)
        return model

    def encode(self, model: SlatVae, batch: dict[str, Tensor], sample: bool) -> tuple[SparseTensor, dict[str, Tensor]]:
        z, mean, logvar = model.encoder(self.inputs(batch), sample, True, eps=batch.get("eps"))
        return z, {"kl": kl_loss(mean, logvar)}

    def export(self, model: SlatVae, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components
        from trainer.model_card import write_model_card

        encoder, decoder = self.network_configs()
        sampling = {"slat_normalization": self.latent_statistics(model), "active_band": self.config.validation_tau}
        components: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "slat_encoder": (model.encoder, encoder),
            "slat_decoder_mesh": (model.decoder, decoder),
        }
        write_components(folder, components, provenance, sampling=sampling)
        write_model_card(folder, provenance, self.data.records)


__all__ = ["MeshTask", "MeshTaskConfig", "SlatVae", "SlatVaeConfig", "SlatVaeTask", "at_points", "decoder_config"]
