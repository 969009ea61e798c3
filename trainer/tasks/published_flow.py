"""Tasks: both flows at the published shape, on cached latents and image tokens (trainer/cached.py).

As published (arXiv 2412.01506): one random view of each object is the condition, a tenth of the conditions are zeros,
times are logit-normal(1, 1), the loss is the mean squared error of the velocity. The image encoder is not in the loop.
A sample's view, time, noise and dropping come from its seed. Each sample weighs the same here; published training
weighs samples of the second stage by their voxels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.cached import CachedData
from trainer.plan import MemoryShape, flow_shape
from trainer.task import Task
from triptych.bundles.bundle import load_bundle
from triptych.bundles.published import PublishedBundle, weightless
from triptych.errors import TriptychError
from triptych.sampling.flow_matching import interpolate, logit_normal_times, velocity
from triptych.sparse.tensor import SparseTensor

VALIDATION_TIMES = (0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class PublishedFlowConfig:
    """data: a cached folder. start: a published folder or repository to start from, None for fresh weights."""

    data: str
    start: str | None = None
    resolution: int = 16
    latent_channels: int = 8
    model_channels: int = 1024
    cond_channels: int = 1024
    num_blocks: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: int = 1
    qk_rms_norm: bool = True
    share_mod: bool = False
    use_checkpoint: bool = False
    drop_condition: float = 0.1
    time_mean: float = 1.0
    time_std: float = 1.0
    validation_objects: int = 32


@dataclass(frozen=True)
class PublishedSlatFlowConfig(PublishedFlowConfig):
    """max_voxels: of one sample, 0 for all; more than that are cut to the voxels around a random one. start also
    gives the latents' mean and deviation; without it they are those of the cached folder."""

    resolution: int = 64
    patch_size: int = 2
    io_channels: int = 128
    io_blocks: int = 2
    max_voxels: int = 32_768


class PublishedFlowTask(Task):
    """What both stages share; a subclass says what a latent is."""

    config: Any
    component: str
    class_name: str
    needs: str

    def __init__(self, config: Any) -> None:
        self.config = config
        self.device = torch.device("cpu")

    def flow_config(self) -> dict[str, Any]:
        """The network's constructor arguments, as a bundle keeps them."""
        config = self.config
        names = ("resolution", "model_channels", "cond_channels", "num_blocks", "num_heads", "mlp_ratio", "patch_size")
        sizes = {name: getattr(config, name) for name in (*names, "qk_rms_norm", "share_mod")}
        return sizes | {"in_channels": config.latent_channels, "out_channels": config.latent_channels}

    def build_model(self) -> nn.Module:
        from triptych.bundles.components import build_component

        model = build_component(self.class_name, self.flow_config())
        if self.config.start:
            bundle = load_bundle(self.config.start)
            source = bundle.network(self.component)
            try:
                model.load_state_dict(source.state_dict(), strict=True)
            except RuntimeError as error:
                raise TriptychError(f"the {self.component} of {bundle.name} has another shape: {error}") from error
            bundle.release()
        model.use_checkpoint = self.config.use_checkpoint  # type: ignore[assignment]
        return model.requires_grad_(True)

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = CachedData(self.config.data, "train", self.needs)
        self.held_out = CachedData(self.config.data, "validation", self.needs)
        if self.data.channels != self.config.cond_channels:
            raise TriptychError(
                f"{self.config.data} holds image tokens of {self.data.channels} channels, the config wants "
                f"{self.config.cond_channels}: set cond_channels, or cache with another image encoder"
            )

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Tensor]:
        generator = np.random.default_rng(seed)
        view = int(generator.integers(self.data.records[index].views))
        normal = torch.tensor(generator.standard_normal(), dtype=torch.float32)
        return {
            "cond": self.data.views(index, "conditions", [view])[0],
            "time": logit_normal_times(normal, self.config.time_mean, self.config.time_std),
            "drop": torch.tensor(bool(generator.random() < self.config.drop_condition)),
            **self.latent(self.data, index, generator),
        }

    def latent(self, data: CachedData, index: int, generator: np.random.Generator | None) -> dict[str, Tensor]:
        """x_0 and noise of an object; without a generator whole, with noise from its index."""
        raise NotImplementedError

    def errors(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """(B,) mean squared error of each sample's velocity."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        return self.errors(model, batch).mean(), {}

    def condition(self, batch: dict[str, Any]) -> Tensor:
        keep = ~batch["drop"].to(self.device)
        return batch["cond"].to(self.device).float() * keep[:, None, None]

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out objects under their first view, at fixed times, with fixed noise: loss (the mean), and by time."""
        found: dict[str, list[float]] = {f"loss_{time:g}": [] for time in VALIDATION_TIMES}
        for index in range(min(len(self.held_out), self.config.validation_objects)):
            cond = self.held_out.views(index, "conditions", [0])[0]
            sample = {"cond": cond, "drop": torch.tensor(False), **self.latent(self.held_out, index, None)}
            for time in VALIDATION_TIMES:
                batch = self.collate([sample | {"time": torch.tensor(time)}])
                batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                found[f"loss_{time:g}"].append(float(self.errors(model, batch).mean()))
        means = {name: float(np.mean(values)) for name, values in found.items()}
        return {"loss": float(np.mean(list(means.values()))), **means}

    def export(self, model: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        from trainer.export import write_components

        components = {self.component: (model, self.flow_config())}
        write_components(folder, components, provenance, sampling=self.sampling(), dtype="float16")

    def sampling(self) -> dict[str, Any]:
        return {"steps": 25, "guidance": 5.0, "rescale_t": 3.0}

    def memory_shape(self) -> MemoryShape:
        """For `trainer plan`: no data is read."""
        tokens, voxels = self.tokens()
        config = self.flow_config()
        return flow_shape(weightless(self.class_name, config), config, tokens=tokens, voxels=voxels)

    def tokens(self) -> tuple[int, int]:
        """Tokens of one sample in the torso, and voxels of it in blocks of convolutions."""
        raise NotImplementedError


class PublishedStructureFlowTask(PublishedFlowTask):
    config: PublishedFlowConfig
    component, class_name, needs = "structure_flow", "SparseStructureFlowModel", "structure"

    def __init__(self, config: PublishedFlowConfig) -> None:
        super().__init__(config)

    def tokens(self) -> tuple[int, int]:
        return (self.config.resolution // self.config.patch_size) ** 3, 0

    def latent(self, data: CachedData, index: int, generator: np.random.Generator | None) -> dict[str, Tensor]:
        x_0 = data.read(index, "structure")["structure"]
        generator = generator or np.random.default_rng(index)
        return {"x_0": x_0, "noise": torch.from_numpy(generator.standard_normal(tuple(x_0.shape), dtype=np.float32))}

    def errors(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        x_t = interpolate(batch["x_0"], batch["noise"], batch["time"])
        v = model(x_t, 1000 * batch["time"], self.condition(batch))
        return (v.float() - velocity(batch["x_0"], batch["noise"])).square().flatten(1).mean(dim=1)


class PublishedSlatFlowTask(PublishedFlowTask):
    config: PublishedSlatFlowConfig
    component, class_name, needs = "slat_flow", "SLatFlowModel", "latents"

    def __init__(self, config: PublishedSlatFlowConfig) -> None:
        super().__init__(config)

    def flow_config(self) -> dict[str, Any]:
        io = {"num_io_res_blocks": self.config.io_blocks, "io_block_channels": [self.config.io_channels]}
        return super().flow_config() | io

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        bundle = load_bundle(self.config.start) if self.config.start else None
        if isinstance(bundle, PublishedBundle) and bundle.slat_normalization:
            self.mean, self.std = (
                torch.tensor(v) for v in (bundle.slat_normalization.mean, bundle.slat_normalization.std)
            )
        elif self.data.statistics is not None:
            self.mean, self.std = self.data.statistics
        else:
            raise TriptychError(f"{self.config.data} has no statistics of its latents: run `trainer latents` again")

    def cost(self, index: int) -> int:
        """Voxels that a sample has at most."""
        voxels, limit = self.data.records[index].voxels, self.config.max_voxels
        return min(voxels, limit) if limit else voxels

    def tokens(self) -> tuple[int, int]:
        return 20_000 // 3, 20_000  # an ordinary object; three voxels of a surface share a token of 2^3

    def latent(self, data: CachedData, index: int, generator: np.random.Generator | None) -> dict[str, Tensor]:
        arrays = data.read(index, "coords", "latents")
        coords, x_0 = arrays["coords"].int(), (arrays["latents"] - self.mean) / self.std
        limit = self.config.max_voxels
        if generator is not None and 0 < limit < len(coords):
            reach = (coords - coords[int(generator.integers(len(coords)))]).abs().amax(dim=1)
            kept = torch.argsort(reach, stable=True)[:limit].sort().values
            coords, x_0 = coords[kept], x_0[kept]
        generator = generator or np.random.default_rng(index)
        noise = torch.from_numpy(generator.standard_normal(tuple(x_0.shape), dtype=np.float32))
        return {"coords": coords, "x_0": x_0, "noise": noise}

    def collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("cond", "time", "drop")}
        batch |= {key: torch.cat([s[key] for s in samples]) for key in ("x_0", "noise")}
        numbered = [numbered_coords(s["coords"], b) for b, s in enumerate(samples)]
        return batch | {"coords": torch.cat(numbered)}

    def errors(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        count, owner = len(batch["time"]), batch["coords"][:, 0].long()
        x_t = interpolate(batch["x_0"], batch["noise"], batch["time"][owner])
        x = SparseTensor(x_t, batch["coords"], count, self.config.resolution, check=False)
        v = model(x, 1000 * batch["time"], self.condition(batch)).feats.float()
        wrong = (v - velocity(batch["x_0"], batch["noise"])).square().mean(dim=1)
        return torch.stack([part.mean() for part in wrong.split(x.counts)])

    def sampling(self) -> dict[str, Any]:
        normalization = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return super().sampling() | {"slat_normalization": normalization}


def numbered_coords(coords: Tensor, number: int) -> Tensor:
    """(n, 3) -> (n, 4) with the sample's number first."""
    return torch.cat([torch.full_like(coords[:, :1], number), coords], dim=1)
