"""Task: the lifted latent flow, 1-4 posed views and a first stage's field -> structured latents.

It trains on what it will be given: the field that the first stage made of the same views (`trainer predict`), and the
voxels which that field calls the surface. The latents to find are encoded in the step, from the attributes of those
voxels: an active set differs from sample to sample, and the eight symmetries come free. Voxels outside of the band
around the true surface, where the first stage was wrong by more than it, have no true latent and no loss.

Each sample draws its set of views, light and colours, one of the eight symmetries, a time and the noise from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.data import Recolouring, draw_recolouring, posed_views, relight, symmetric_sample
from trainer.prepare.predicted import PredictedFields
from trainer.structured import StructuredData, capped, decode_attributes, symmetric_attributes, symmetric_coords
from trainer.tasks.mesh_supervision import two_sided_distance
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, rig_cameras
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.models.lifting import LiftedStructureFlow, PosedViews
from triptych.models.slat_decoder import SLatMeshDecoder
from triptych.models.slat_encoder import SLatEncoder
from triptych.models.slat_lifting import FIELD_BAND, LiftedSLatFlow
from triptych.pipelines.structured import mesh_from_latents
from triptych.render.sheets import contact_sheet
from triptych.render.views import picture, render_views
from triptych.sampling.flow_matching import interpolate, logit_normal_times
from triptych.sparse.tensor import SparseTensor

_RIG = rig_cameras(VIEW_AZIMUTHS_DEG)
_NOTHING = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))


@dataclass(frozen=True)
class SlatFlowConfig:
    """data: a prepared folder with second-stage arrays and predicted fields. vae: a folder that slat_vae exported.
    structure: a bundle whose structure flow lends its view encoder as a start, None for a fresh one (the config's
    ``groups`` freeze it and thaw it later). active_band: half width of the active set, in voxels. max_voxels: of one
    sample, 0 for all. drop_condition: share of samples without pictures."""

    data: str
    vae: str
    structure: str | None = None
    model_channels: int = 192
    num_blocks: int = 4
    num_heads: int = 4
    mlp_ratio: float = 3.0
    io_channels: int = 64
    io_blocks: int = 1
    cond_channels: int = 256
    image_size: int = 128
    encoder_channels: tuple[int, int] = (48, 96)
    encoder_blocks: tuple[int, int] = (2, 2)
    active_band: float = 0.95
    max_voxels: int = 7000
    drop_condition: float = 0.05
    time_mean: float = 3.0
    time_std: float = 2.0
    min_weight_time: float = 0.3  # the velocity loss weighs a latent's error by 1 / t^2, from this time up
    validation_objects: int = 8


def load_slat_vae(folder: str | Path) -> tuple[SLatEncoder, SLatMeshDecoder, Bundle]:
    """Encoder and decoder of an exported structured-latent VAE, frozen, and their bundle."""
    bundle = load_bundle(Path(folder))
    if not (bundle.has("slat_encoder") and bundle.has("slat_decoder_mesh")):
        raise TriptychError(f"{folder} holds no structured-latent VAE: export a run of the task slat_vae")
    encoder, decoder = bundle.network("slat_encoder"), bundle.network("slat_decoder_mesh")
    if not (isinstance(encoder, SLatEncoder) and isinstance(decoder, SLatMeshDecoder)):
        raise TriptychError(f"{folder} holds no structured-latent VAE: export a run of the task slat_vae")
    return encoder, decoder, bundle


class SlatFlowTask:
    config: SlatFlowConfig

    def __init__(self, config: SlatFlowConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")

    # ---- model

    def flow_config(self) -> dict[str, Any]:
        config = self.config
        latent_channels = load_bundle(Path(config.vae)).component("slat_encoder").config["latent_channels"]
        return {
            "resolution": StructuredData(config.data).resolution,
            "in_channels": latent_channels,
            "out_channels": latent_channels,
            "model_channels": config.model_channels,
            "cond_channels": config.cond_channels,
            "num_blocks": config.num_blocks,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio,
            "patch_size": 2,
            "num_io_res_blocks": config.io_blocks,
            "io_block_channels": [config.io_channels],
            "share_mod": True,
            "image_size": config.image_size,
            "encoder_channels": list(config.encoder_channels),
            "encoder_blocks": list(config.encoder_blocks),
        }

    def build_model(self) -> nn.Module:
        model = LiftedSLatFlow(**self.flow_config())
        statistics = load_bundle(Path(self.config.vae)).manifest.sampling.get("slat_normalization")
        if not isinstance(statistics, dict):
            raise TriptychError(f"{self.config.vae} has no slat_normalization in its manifest: export the VAE again")
        model.set_latent_statistics(torch.tensor(statistics["mean"]), torch.tensor(statistics["std"]))
        if self.config.structure:
            lend_encoder(model, load_bundle(self.config.structure))
        return model

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.encoder, self.decoder, self.vae = load_slat_vae(self.config.vae)
        self.encoder.to(device)
        self.decoder.to(device)
        self.fields = PredictedFields(self.config.data)
        self.data = self._with_fields(StructuredData(self.config.data, "train"))
        self.held_out = self._with_fields(StructuredData(self.config.data, "validation"))
        if self.data.options["view_size"] != self.config.image_size:
            raise TriptychError(
                f"{self.config.data} holds views of {self.data.options['view_size']} px, the config wants "
                f"{self.config.image_size}: prepare with --view-size {self.config.image_size}"
            )

    def _with_fields(self, data: StructuredData) -> StructuredData:
        data.rows = [row for i, row in enumerate(data.rows) if self.fields.has(row[0], data.prepared_row(i))]
        if not data.rows:
            raise TriptychError(f"{self.config.data} has no predicted fields of this split: run `trainer predict`")
        return data

    # ---- data

    def size(self) -> int:
        return len(self.data)

    def cost(self, index: int) -> int:
        """About how many voxels the sample has: what balanced batches count."""
        return capped(self.data.voxels(index), self.config.max_voxels)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        return self.draw(self.data, index, generator, int(generator.integers(self.fields.sets)), training=True)

    def draw(
        self, data: StructuredData, index: int, generator: np.random.Generator, number: int, *, training: bool
    ) -> dict[str, Any]:
        """One sample as CPU tensors; without ``training`` it is not turned, whole, at time 1."""
        config, side = self.config, data.resolution
        item, pictures = data[index], data.views(index)
        field, views = self.fields.get(data.rows[index][0], data.prepared_row(index), number)
        symmetry = int(generator.integers(8)) if training else 0
        turned = symmetric_sample({**pictures, "sdf": field}, symmetry)
        seen = [symmetric_view(view, symmetry) for view in views]
        recolouring = draw_recolouring(generator)  # of the object: its true colours change with its pictures
        shown = relight(turned["albedo"], turned["normal"], generator, sorted(seen), recolouring)
        hint = np.ascontiguousarray(turned["sdf"])

        coords = np.argwhere(np.abs(hint.astype(np.int16)) < config.active_band * 127 / FIELD_BAND)
        if training and 0 < config.max_voxels < len(coords):
            reach = np.abs(coords - coords[generator.integers(len(coords))]).max(axis=1)
            coords = coords[np.sort(np.argsort(reach, kind="stable")[: config.max_voxels])]
        place = np.full((side,) * 3, -1, dtype=np.int64)
        band = symmetric_coords(item["coords"].astype(np.int64), symmetry, side)
        place[tuple(band.T)] = np.arange(len(band))
        row = place[tuple(coords.T)]
        attributes = symmetric_attributes(item["attributes"], symmetry)[row.clip(0)]
        time = logit_normal_times(
            torch.tensor(generator.standard_normal(), dtype=torch.float32), config.time_mean, config.time_std
        )
        noise = generator.standard_normal((len(coords), self.encoder.latent_channels), dtype=np.float32)
        return {
            "images": (shown * 255 + 0.5).to(torch.uint8),
            "views": torch.tensor(sorted(seen)),
            "field": torch.from_numpy(hint),
            "coords": torch.from_numpy(coords.astype(np.int32)),
            "attributes": recoloured(torch.from_numpy(attributes), recolouring),
            "known": torch.from_numpy(row >= 0),
            "noise": torch.from_numpy(noise),
            "time": time if training else torch.tensor(1.0),
            "drop": torch.tensor(training and bool(generator.random() < config.drop_condition)),
            "count": torch.tensor(len(coords)),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("field", "time", "drop", "count")}
        batch |= {
            key: torch.cat([s[key] for s in samples]) for key in ("images", "views", "attributes", "known", "noise")
        }
        batch["counts"] = torch.tensor([len(s["views"]) for s in samples])
        batch["coords"] = torch.cat(
            [torch.cat([torch.full_like(s["coords"][:, :1], b), s["coords"]], dim=1) for b, s in enumerate(samples)]
        )
        return batch

    def posed(self, batch: dict[str, Any]) -> PosedViews:
        return posed_views(batch, self.device)

    def voxels(self, batch: dict[str, Any], feats: Tensor) -> SparseTensor:
        coords = batch["coords"].to(self.device)
        return SparseTensor(feats, coords, len(batch["count"]), self.data.resolution, check=False)

    @torch.no_grad()
    def latents(self, model: LiftedSLatFlow, batch: dict[str, Any]) -> Tensor:
        """(N, C) normalised latents of the known voxels, 0 elsewhere."""
        known = batch["known"].to(self.device)
        feats = decode_attributes(batch["attributes"].to(self.device))[known]
        coords = batch["coords"].to(self.device)[known]
        x = SparseTensor(feats, coords, len(batch["count"]), self.data.resolution, check=False)
        z = model.normalize(self.encoder(x).feats.float())
        return z.new_zeros(len(known), z.shape[1]).masked_scatter(known[:, None], z)

    def field_of(self, batch: dict[str, Any]) -> Tensor:
        return batch["field"].to(self.device).float() * (FIELD_BAND / 127)

    # ---- loss

    def loss(self, model: LiftedSLatFlow, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        x_0 = self.latents(model, batch)
        owner = batch["coords"][:, 0].long()
        time = batch["time"][owner]
        x_t = interpolate(x_0, batch["noise"], time)
        cond = model.condition(self.posed(batch), self.voxels(batch, x_t), self.field_of(batch))
        cond = cond.without(batch["drop"]) if batch["drop"].any() else cond
        clean = model.predict(self.voxels(batch, x_t), 1000 * batch["time"], cond).feats.float()
        known = batch["known"]
        error = (clean - x_0).square().mean(dim=1)[known]
        weight = (batch["time"].clamp_min(self.config.min_weight_time) ** -2)[owner][known]
        logged = {"latent_error": error.detach().mean(), "known": known.float().mean(), "voxels": float(len(known))}
        return (error * weight).mean(), logged

    # ---- validation

    def predictions(self, model: LiftedSLatFlow, number: int, count: int):
        """For held-out objects: index, batch, and the clean latents (N, C) that one step from noise finds."""
        for index in range(0, len(self.held_out), max(1, len(self.held_out) // count)):
            generator = np.random.default_rng(index)
            batch = self.collate([self.draw(self.held_out, index, generator, number, training=False)])
            if not len(batch["coords"]):  # a first stage that found nothing leaves nothing to refine
                yield index, batch, batch["noise"].to(self.device)
                continue
            x = self.voxels(batch, batch["noise"].to(self.device))
            cond = model.condition(self.posed(batch), x, self.field_of(batch))
            yield index, batch, model.predict(x, torch.full((1,), 1000.0, device=self.device), cond).feats.float()

    def validate(self, model: LiftedSLatFlow) -> dict[str, float]:
        """One-step predictions from noise with all four views (set 0) on held-out objects.

        latent_error: mean squared, of the known voxels (1: no better than the mean). chamfer, chamfer_first: of the
        mesh, and of the first stage's isosurface, to the true surface. An object of which the first stage found nothing
        counts 1 in each.
        """
        found: dict[str, list[float]] = {"latent_error": [], "chamfer": [], "chamfer_first": []}
        for index, batch, clean in self.predictions(model, 0, self.config.validation_objects):
            known = batch["known"].to(self.device)
            error = 1.0
            if known.any():
                error = float((clean - self.latents(model, batch)).square().mean(dim=1)[known].mean())
            found["latent_error"].append(error)
            field, true = self.field_of(batch)[0].cpu().numpy(), self._surface_points(index)
            first = isosurface(field) if (field > 0).any() else _NOTHING
            found["chamfer"].append(two_sided_distance(self._mesh(model, batch, clean), true, samples=20_000))
            found["chamfer_first"].append(two_sided_distance(first, true, samples=20_000))
        means = {key: float(np.mean(values)) for key, values in found.items()}
        return means | {"loss": means["latent_error"]}

    def _surface_points(self, index: int) -> np.ndarray:
        return self.held_out[index]["points"].astype(np.float32) / 65534

    def _mesh(self, model: LiftedSLatFlow, batch: dict[str, Any], clean: Tensor) -> Mesh:
        if not len(clean):
            return _NOTHING
        latents = self.voxels(batch, model.denormalize(clean))
        return mesh_from_latents(self.decoder, latents, self.field_of(batch)[0])

    def pictures(self, model: LiftedSLatFlow) -> Image.Image | None:
        """Held-out objects: what was prepared, then the mesh from four views."""
        rows = []
        for index, batch, clean in self.predictions(model, 0, 4):
            albedo = torch.from_numpy(self.held_out.views(index)["albedo"]).permute(0, 3, 1, 2).float() / 255
            mesh = self._mesh(model, batch, clean)
            if not len(mesh.faces):
                rows += [albedo]
                continue
            drawn = render_views(mesh, _RIG, self.config.image_size)
            rows += [albedo, torch.cat([picture(drawn, _RIG, mode) for mode in ("albedo", "normal")])]
        return contact_sheet(rows) if rows else None

    def export(self, model: LiftedSLatFlow, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components
        from trainer.model_card import write_model_card

        components = {
            "slat_flow": (model, self.flow_config()),
            "slat_decoder_mesh": (self.decoder, self.vae.manifest.components["slat_decoder_mesh"].config),
        }
        sampling = {"active_band": self.config.active_band, "slat_steps": 1, "slat_rescale_t": 3.0}
        # Of 0, .25, .4, .5, .6, .75 and 1 the best from one view, and near the best from four, on validation objects.
        sampling["slat_trust"] = 0.75
        sampling["slat_draws"] = 2
        provenance = provenance | {"slat_vae": self.vae.manifest.provenance}
        write_components(folder, components, provenance, sampling=sampling)
        write_model_card(folder, provenance, self.data.records)


def recoloured(attributes: Tensor, recolouring: Recolouring) -> Tensor:
    """(N, 10) uint8 attributes with the object's colours changed."""
    colors = recolouring(attributes[:, :3].float() / 255, dim=1) * 255 + 0.5
    return torch.cat([colors.to(torch.uint8), attributes[:, 3:]], dim=1)


def symmetric_view(view: int, symmetry: int) -> int:
    """The rig's number of a view (0-3) once the object is under one of the eight symmetries."""
    turned = (view + symmetry) % 4
    return (4 - turned) % 4 if symmetry >= 4 else turned


def lend_encoder(model: LiftedSLatFlow, bundle: Bundle) -> None:
    """Copies the view encoder of a bundle's structure flow into ``model``.

    Raises TriptychError where the bundle has none or one of other sizes.
    """
    lender = bundle.network("structure_flow")
    if not isinstance(lender, LiftedStructureFlow):
        raise TriptychError(f"the bundle {bundle.name} has no lifted structure flow: leave `structure` empty")
    for name in ("view_encoder", "view_geometry"):
        try:
            getattr(model, name).load_state_dict(getattr(lender, name).state_dict())
        except RuntimeError as error:
            raise TriptychError(f"the {name} of {bundle.name} does not fit the config: {error}") from error
