"""Task: the lifted structure flow, 1-4 posed views -> a solid, as a latent or as the field itself.

With a ``vae`` the flow runs in its latent space, as TRELLIS does. Without one it runs on the truncated signed distance
field, 64^3 voxels in blocks of 8^3: the mean of what is possible is then a field with a sensible surface, while the
mean of latents decodes to nothing in particular. docs/reconstruction.md has the numbers behind that choice.

Each sample draws its views (any subset of the rig), light and colours, one of eight symmetries, a noise level and the
noise from its own seed. Where a views model has drawn the objects' other views (`trainer drawn`), a share of the
samples are such sets, with the drawn views marked: the flow learns how far to believe them. A latent is encoded in the
step: with the tiny encoder that costs a quarter of it, and it makes all symmetries available without a cache eight
times the size of the data.
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

from trainer.data import (
    JoinedData,
    PreparedData,
    drawn_sets,
    mirrored,
    posed_views,
    quarter_turn,
    relight,
    rescaled,
    soft_occupancy,
    symmetric_sample,
    view_order,
)
from trainer.tasks.structure_vae import field_sheet, solid_iou
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, rig_cameras
from triptych.models.lifting import LiftedCondition, LiftedStructureFlow, PosedViews
from triptych.models.structure_vae import SparseStructureDecoder, SparseStructureEncoder
from triptych.sampling.flow_matching import interpolate, logit_normal_times

_RIG = rig_cameras(VIEW_AZIMUTHS_DEG)


@dataclass(frozen=True)
class StructureFlowConfig:
    """data: a prepared folder. extra_data: further ones to train on; validation stays with the first. vae: folder that
    the structure_vae task exported, None for the field. view_shares: how often a sample has 1, 2, 3 and 4 views.
    drop_condition: share of samples without pictures, for guidance. drawn_share: of the samples of rows that have drawn
    sets, how many take one; 0 for a flow that knows no drawn views. drawn_whole: of these, how many have no given view.
    drop_drawn: how often a drawn view of a set is left out, as the pipeline leaves out what contradicts the given ones.
    normal_weight: of the loss of the view encoder's
    surface directions, 0 for an encoder without them."""

    data: str
    extra_data: tuple[str, ...] = ()
    vae: str | None = None
    model_channels: int = 256
    num_blocks: int = 4
    num_heads: int = 4
    mlp_ratio: float = 3.0
    image_size: int = 128
    encoder_channels: tuple[int, int] = (48, 96)
    encoder_blocks: tuple[int, int] = (2, 2)
    view_shares: tuple[float, float, float, float] = (0.25, 0.2, 0.15, 0.4)
    drop_condition: float = 0.05
    drawn_share: float = 0.0
    drawn_whole: float = 0.2
    drop_drawn: float = 0.25
    time_mean: float = 7.0  # of the logit; many voxels tell of the whole through much noise (latents: 1 and 1)
    time_std: float = 2.0
    min_weight_time: float = 0.3  # the velocity loss weighs a latent's error by 1 / t^2, from this time up
    softness: float = 0.4
    normal_weight: float = 0.2
    validation_objects: int = 48


def load_vae(folder: str | Path) -> tuple[SparseStructureEncoder, SparseStructureDecoder, dict[str, Any]]:
    """Encoder and decoder of an exported structure VAE, frozen, with the encoder's and decoder's configs."""
    bundle = load_bundle(Path(folder))
    encoder, decoder = bundle.network("structure_encoder"), bundle.network("structure_decoder")
    if not (isinstance(encoder, SparseStructureEncoder) and isinstance(decoder, SparseStructureDecoder)):
        raise TriptychError(f"{folder} holds no structure VAE: export a run of the task structure_vae")
    for module in (encoder, decoder):
        module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    configs = {key: bundle.manifest.components[f"structure_{key}"].config for key in ("encoder", "decoder")}
    return encoder, decoder, configs


class StructureFlowTask:
    config: StructureFlowConfig

    def __init__(self, config: StructureFlowConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")

    # ---- model

    def flow_config(self, latent_channels: int, resolution: int) -> dict[str, Any]:
        config = self.config
        return {
            "resolution": resolution,
            "in_channels": latent_channels,
            "out_channels": latent_channels,
            "model_channels": config.model_channels,
            "cond_channels": config.model_channels,
            "num_blocks": config.num_blocks,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio,
            "patch_size": 2 if self.config.vae else resolution // 8,
            "share_mod": True,
            "qk_rms_norm": False,
            "image_size": config.image_size,
            "encoder_channels": list(config.encoder_channels),
            "encoder_blocks": list(config.encoder_blocks),
            "hull_skip": not config.vae and resolution == 64,
            "normal_head": config.normal_weight > 0,
            "drawn_views": config.drawn_share > 0,
        }

    def build_model(self) -> nn.Module:
        data = self._training_data()
        if not self.config.vae:
            model = LiftedStructureFlow(**self.flow_config(1, int(data.options["resolution"])))
            model.set_latent_statistics(torch.zeros(1), torch.ones(1), -torch.ones(1))
            return model
        encoder, _, _ = load_vae(self.config.vae)
        band = float(data.options["sdf_band"])
        every = max(1, len(data) // 64)
        fields = torch.from_numpy(np.stack([data.field(i) for i in range(0, len(data), every)][:64]))
        with torch.no_grad():
            targets = soft_occupancy(fields, band, self.config.softness)[:, None]
            z = torch.cat([encoder(part) for part in targets.split(8)])
            nothing = encoder(torch.zeros_like(targets[:1]))[0]
        empty = nothing.flatten(1).median(dim=1).values  # the border sees the padding
        far = (z - nothing).abs().sum(dim=1)
        occupied = far > 0.05 * far.max()
        chosen = z.movedim(1, -1)[occupied]
        model = LiftedStructureFlow(**self.flow_config(z.shape[1], z.shape[2]))
        model.set_latent_statistics(chosen.mean(dim=0), chosen.std(dim=0), empty)
        return model

    def _training_data(self) -> JoinedData:
        return JoinedData((self.config.data, *self.config.extra_data))

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = self._training_data()
        resolution = int(self.data.options["resolution"])
        self.latent_shape: tuple[int, ...] = (1, *[resolution] * 3)
        if self.config.vae:
            self.encoder, self.decoder, self.vae_configs = load_vae(self.config.vae)
            self.encoder.to(device)
            self.decoder.to(device)
            encoder = self.vae_configs["encoder"]
            side = resolution // 2 ** (len(encoder["channels"]) - 1)
            self.latent_shape = (encoder["latent_channels"], *[side] * 3)
        self.held_out = PreparedData(self.config.data, "validation")
        if self.data.options["view_size"] != self.config.image_size:
            raise TriptychError(
                f"{self.config.data} holds views of {self.data.options['view_size']} px, the config wants "
                f"{self.config.image_size}: prepare with --view-size {self.config.image_size}"
            )
        self.band = float(self.data.options["sdf_band"])
        self.drawn = drawn_sets(self.data.parts) if self.config.drawn_share else {}

    # ---- data

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        made = self._drawn_sample(index, generator) or self._true_sample(index, generator)
        time = logit_normal_times(
            torch.tensor(generator.standard_normal(), dtype=torch.float32), self.config.time_mean, self.config.time_std
        )
        return made | {
            "noise": torch.from_numpy(generator.standard_normal(self.latent_shape, dtype=np.float32)),
            "time": time,
            "drop": torch.tensor(bool(generator.random() < self.config.drop_condition)),
        }

    def _true_sample(self, index: int, generator: np.random.Generator) -> dict[str, Any]:
        """Views as they are, under a random light."""
        item = quarter_turn(self.data[index], int(generator.integers(4)))
        if generator.random() < 0.5:
            item = mirrored(item)
        count = 1 + int(generator.choice(4, p=np.array(self.config.view_shares) / sum(self.config.view_shares)))
        views = np.sort(generator.permutation(4)[:count])
        pictures = relight(item["albedo"], item["normal"], generator, views.tolist())
        return {
            "images": (pictures * 255 + 0.5).to(torch.uint8),
            "views": torch.from_numpy(views),
            "drawn": torch.zeros(count, dtype=torch.bool),
            "normals": camera_normals(item["normal"], item["albedo"][..., 3], views.tolist()),
            "sdf": torch.from_numpy(np.ascontiguousarray(item["sdf"])),
        }

    def _drawn_sample(self, index: int, generator: np.random.Generator) -> dict[str, Any] | None:
        """Views as a model drew them beside the given ones, in the scale of their set; None where there are none, and
        when the sample is to have true views."""
        part, shard, row = self.data.place(index)
        sets = self.drawn.get(part)
        if sets is None or not sets.count(shard, row) or generator.random() >= self.config.drawn_share:
            return None
        number = int(generator.integers(sets.count(shard, row)))
        found = sets.get(shard, row, number, whole=bool(generator.random() < self.config.drawn_whole))
        field = symmetric_sample(self.data[index], found["symmetry"])["sdf"]
        item = {"albedo": found["views"], "sdf": rescaled(field, found["scale"])}
        item["normal"] = np.zeros((*item["albedo"].shape[:3], 3), dtype=np.uint8)
        symmetry = int(generator.integers(8))
        item, order = symmetric_sample(item, symmetry), view_order(symmetry)
        kept = generator.random(4) >= self.config.drop_drawn
        shown, given = found["shown"][order], found["given"][order]
        views = np.flatnonzero(shown & (given | kept) if (given | (shown & kept)).any() else shown)
        pictures = torch.from_numpy(np.ascontiguousarray(item["albedo"][views])).permute(0, 3, 1, 2).contiguous()
        side = self.config.image_size // 4
        return {
            "images": pictures,
            "views": torch.from_numpy(views),
            "drawn": torch.from_numpy(~given[views]),
            "normals": torch.zeros(len(views), 4, side, side, dtype=torch.half),
            "sdf": torch.from_numpy(np.ascontiguousarray(item["sdf"])),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("sdf", "noise", "time", "drop")}
        batch["images"] = torch.cat([s["images"] for s in samples])
        for key in {"normals", "drawn"} & set(samples[0]):
            batch[key] = torch.cat([s[key] for s in samples])
        batch["views"] = torch.cat([s["views"] for s in samples])
        batch["counts"] = torch.tensor([len(s["views"]) for s in samples])
        return batch

    def posed(self, batch: dict[str, Any]) -> PosedViews:
        return posed_views(batch, self.device)

    # ---- loss

    def loss(self, model: LiftedStructureFlow, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        with torch.no_grad():
            x_0 = model.normalize(self._encode(batch["sdf"]))
        x_t = model.to_tokens(interpolate(x_0, batch["noise"], batch["time"]))
        seen = model.condition(self.posed(batch))
        cond = drop_some(seen, batch["drop"])
        clean = model.predict_tokens(x_t[cond.active], 1000 * batch["time"], cond)
        error = (clean.float() - model.to_tokens(x_0)[cond.active]).square().mean(dim=-1)
        error = torch.stack([part.mean() for part in error.split(cond.lengths)])
        weight = batch["time"].clamp_min(self.config.min_weight_time) ** -2
        loss = (error * weight).mean()
        logged = {"latent_error": error.detach().mean(), "active": cond.active.float().mean()}
        if seen.normals is not None:
            wrong = normal_error(seen.normals.float(), batch["normals"])
            loss, logged["normal_error"] = loss + self.config.normal_weight * wrong, wrong.detach()
        return loss, logged

    def _encode(self, sdf: Tensor) -> Tensor:
        if not self.config.vae:
            return sdf[:, None].float() / -127
        return self.encoder(soft_occupancy(sdf, self.band, self.config.softness)[:, None]).float()

    def _decode(self, x: Tensor) -> Tensor:
        """Clean latents or fields (B, C, R, R, R) -> logits or fields (B, 1, 64, 64, 64), positive inside."""
        return self.decoder(x) if self.config.vae else x

    # ---- validation

    def held_out_batch(self, views: list[int]) -> dict[str, Any]:
        """The first validation objects, unturned, under fixed lights."""
        step = len(self.held_out) // len(self.held_out.records)
        samples = []
        for i in range(min(self.config.validation_objects, len(self.held_out.records))):
            item = self.held_out[i * step]
            generator = np.random.default_rng(i)
            pictures = relight(item["albedo"], item["normal"], generator)[views]  # the same light, however many views
            noise = generator.standard_normal(self.latent_shape, dtype=np.float32)
            samples.append(
                {
                    "images": (pictures * 255 + 0.5).to(torch.uint8),
                    "views": torch.tensor(views),
                    "sdf": torch.from_numpy(np.ascontiguousarray(item["sdf"])),
                    "noise": torch.from_numpy(noise),
                    "time": torch.tensor(1.0),
                    "drop": torch.tensor(False),
                }
            )
        return self.collate(samples)

    def validate(self, model: LiftedStructureFlow) -> dict[str, float]:
        """One-step predictions from noise with all four views and with the front alone."""
        found: dict[str, float] = {}
        for name, views in (("four", [0, 1, 2, 3]), ("one", [0])):
            batch = self.held_out_batch(views)
            sdf = batch["sdf"].to(self.device)
            x_0 = model.normalize(torch.cat([self._encode(part) for part in sdf.split(8)]))
            cond = model.condition(self.posed(batch))
            v = model(batch["noise"].to(self.device), torch.full((len(sdf),), 1000.0, device=self.device), cond)
            clean = batch["noise"].to(self.device) - v
            logits = torch.cat([self._decode(part) for part in model.denormalize(clean).split(8)])
            wrong = (model.to_tokens(clean) - model.to_tokens(x_0)).square().mean(-1)
            found |= {f"latent_error_{name}": float(wrong[cond.active].mean())}
            found |= {f"iou_{name}": float(solid_iou(logits.float(), sdf).mean())}
        found["loss"] = found["latent_error_four"] + found["latent_error_one"]
        return found

    def pictures(self, model: LiftedStructureFlow) -> Image.Image | None:
        """True solids, then one-step predictions from four views and from the front alone."""
        rows = []
        for views in ([0, 1, 2, 3], [0]):
            batch = self.held_out_batch(views)
            noise = batch["noise"].to(self.device)
            cond = model.condition(self.posed(batch))
            clean = noise - model(noise, torch.full((len(noise),), 1000.0, device=self.device), cond)
            logits = self._decode(model.denormalize(clean[:12]))
            rows.append((logits[:, 0] > 0).float().cpu().numpy())
        true = (batch["sdf"][:12] < 0).float().numpy()
        return field_sheet([true, *rows, *[np.rot90(r, axes=(1, 3)) for r in (true, *rows)]])

    def export(self, model: LiftedStructureFlow, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components
        from trainer.model_card import write_model_card

        config = self.flow_config(model.in_channels, model.resolution)
        components: dict[str, tuple[nn.Module, dict[str, Any]]] = {"structure_flow": (model, config)}
        # benchmarks/tune_surface.py: the smallest shift of the surface within 3 % of the best on validation objects.
        sampling = {"steps": 1, "rescale_t": 8.0, "voxels_per_unit": self.band, "smoothing_voxels": 0.5, "level": -0.7}
        if self.config.vae:
            components["structure_decoder"] = (self.decoder, self.vae_configs["decoder"])
            provenance = provenance | {"structure_vae": load_bundle(Path(self.config.vae)).manifest.provenance}
            sampling = {"steps": 4, "rescale_t": 3.0, "voxels_per_unit": self.config.softness}
        write_components(folder, components, provenance, sampling=sampling)
        write_model_card(folder, provenance, self.data.records)


def camera_normals(normal: np.ndarray, alpha: np.ndarray, views: list[int]) -> Tensor:
    """World normals of the rig's views (4, S, S, 3) bytes and their alpha (4, S, S) bytes -> (V, 4, S/4, S/4) float16:
    mean directions in each camera's frame, -1 to 1, and the share of each 4 x 4 pixels that the object covers."""
    world = torch.from_numpy(np.ascontiguousarray(normal[views])).float() * (2 / 255) - 1
    cover = torch.from_numpy(np.ascontiguousarray(alpha[views])).float()[:, None] / 255
    rotation = torch.stack([_RIG[i].rotation() for i in views])
    seen = torch.einsum("vij,vhwj->vihw", rotation, world)
    share = F.avg_pool2d(cover, 4)
    mean = F.avg_pool2d(seen * cover, 4) / share.clamp_min(1e-3)
    return torch.cat([mean, share], dim=1).half()


def normal_error(found: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference over the pixels that the object covers; found (N, 3, s, s), target (N, 4, s, s)."""
    weight = target[:, 3:].float()
    return ((found - target[:, :3].float()).abs() * weight).sum() / (3 * weight.sum()).clamp_min(1.0)


def drop_some(cond: LiftedCondition, drop: Tensor) -> LiftedCondition:
    """The condition with the pictures of the samples in ``drop`` (B,) taken away."""
    if not drop.any():
        return cond
    keep = (~drop).to(cond.lifted_TC.dtype)
    lengths = torch.tensor(cond.lengths, device=drop.device)
    context_lengths = torch.tensor(cond.context_lengths, device=drop.device)
    return LiftedCondition(
        active=cond.active,
        lengths=cond.lengths,
        lifted_TC=cond.lifted_TC * keep.repeat_interleave(lengths)[:, None],
        hull_TD=cond.hull_TD,
        context=cond.context * keep.repeat_interleave(context_lengths)[None, :, None],
        context_lengths=cond.context_lengths,
    )
