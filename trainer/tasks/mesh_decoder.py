"""Task: a mesh decoder on frozen latents, with the published losses.

The encoder comes from a bundle (an exported slat_vae, or a published encoder with cached features) and stays as it is;
latents are computed in the step, without gradients. ``start`` begins from the bundle's own mesh decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.losses import PUBLISHED_WEIGHTS, LossWeights, WeightConfig
from trainer.structured import StructuredData
from trainer.tasks.slat_vae import MeshTask, MeshTaskConfig, decoder_config
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.models.slat_decoder import SLatMeshDecoder
from triptych.models.slat_encoder import SLatEncoder
from triptych.sparse.tensor import SparseTensor


def _published_losses() -> WeightConfig:
    return WeightConfig(weights={name: weight for name, weight in PUBLISHED_WEIGHTS.items() if name != "kl"})


@dataclass(frozen=True)
class MeshDecoderConfig(MeshTaskConfig):
    """encoder: a bundle folder with ``slat_encoder``. start: also take its mesh decoder's weights; its sizes then count
    instead of this config's. sample_posterior: train on draws, not on means."""

    encoder: str = ""
    start: bool = False
    sample_posterior: bool = True
    losses: WeightConfig = field(default_factory=_published_losses)


class MeshDecoderModel(nn.Module):
    """The decoder and the weights of its losses."""

    def __init__(self, decoder: SLatMeshDecoder, losses: WeightConfig) -> None:
        super().__init__()
        self.decoder = decoder
        self.loss_weights = LossWeights(losses)


class MeshDecoderTask(MeshTask):
    config: MeshDecoderConfig

    def __init__(self, config: MeshDecoderConfig) -> None:
        super().__init__(config)
        if not config.encoder:
            raise TriptychError("mesh_decoder needs task_config.encoder: the folder of an exported slat_vae")

    def build_model(self) -> nn.Module:
        bundle = load_bundle(Path(self.config.encoder))
        if self.config.start:
            decoder = bundle.network("slat_decoder_mesh").float().requires_grad_(True)
            self.decoder_config = dict(bundle.manifest.components["slat_decoder_mesh"].config)
            if not isinstance(decoder, SLatMeshDecoder):
                raise TriptychError(f"{self.config.encoder} holds no mesh decoder to start from")
        else:
            resolution = StructuredData(self.config.data, "train", self.config.features).resolution
            self.decoder_config = decoder_config(self.config, resolution)
            decoder = SLatMeshDecoder(**self.decoder_config)
        return MeshDecoderModel(decoder, self.config.losses)

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        bundle = load_bundle(Path(self.config.encoder))
        encoder = bundle.network("slat_encoder")
        if not isinstance(encoder, SLatEncoder):
            raise TriptychError(f"{self.config.encoder} holds no slat_encoder: export a run of the task slat_vae")
        if encoder.latent_channels != self.config.latent_channels:
            raise TriptychError(
                f"the encoder has {encoder.latent_channels} latent channels, the config {self.config.latent_channels}: "
                f"set task_config.latent_channels={encoder.latent_channels}"
            )
        self.encoder = encoder.to(device).eval().requires_grad_(False)
        self.encoder_config = dict(bundle.manifest.components["slat_encoder"].config)
        self.encoder_provenance = bundle.manifest.provenance

    @torch.no_grad()
    def encode(
        self, model: MeshDecoderModel, batch: dict[str, Tensor], sample: bool
    ) -> tuple[SparseTensor, dict[str, Tensor]]:
        drawn = sample and self.config.sample_posterior
        z = self.encoder(self.inputs(batch), drawn, eps=batch.get("eps") if drawn else None)
        return z, {}

    def export(self, model: MeshDecoderModel, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components
        from trainer.model_card import write_model_card

        sampling = {"slat_normalization": self.latent_statistics(model), "active_band": self.config.validation_tau}
        components: dict[str, tuple[nn.Module, dict[str, Any]]] = {
            "slat_encoder": (self.encoder, self.encoder_config),
            "slat_decoder_mesh": (model.decoder, self.decoder_config),
        }
        provenance = provenance | {"slat_encoder": self.encoder_provenance}
        write_components(folder, components, provenance, sampling=sampling)
        write_model_card(folder, provenance, self.data.records)
