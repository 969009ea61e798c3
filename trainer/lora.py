"""Task: a published structure flow learns to use several posed views, as LoRA with lifting beside it.

The published weights stay as they are, in 16 or 8 bits; what learns are low-rank adapters of the attentions and MLPs
and the new lifting layers (triptych/models/lifted_published.py). At the first step the result is the published
network's. Data: a cached folder with pictures, cameras and image tokens (trainer/cached.py). Each sample draws its set
of views, time and noise from its seed; the loss is the published one.

The run exports a bundle with the merged network, and the adapter alone for everyone who has the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from trainer.cached import CachedData
from trainer.plan import MemoryShape, flow_shape
from trainer.task import Task
from trainer.tasks.published_flow import VALIDATION_TIMES
from triptych.bundles.bundle import load_bundle
from triptych.bundles.published import weightless
from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera
from triptych.models.adapters import (
    ATTENTION_AND_MLP,
    Adapter,
    adapted,
    adapter_tensors,
    add_lora,
    lora_layers,
    write_adapter,
)
from triptych.models.lifted_published import LiftedPublishedFlow
from triptych.models.lifting import PosedViews
from triptych.models.structure_flow import SparseStructureFlowModel
from triptych.sampling.flow_matching import interpolate, logit_normal_times, velocity

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.bfloat16}
ADAPTER_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class LiftingConfig:
    """Arguments of LiftedPublishedFlow beside the published ones."""

    image_size: int = 256
    encoder_channels: tuple[int, int] = (96, 192)
    encoder_blocks: tuple[int, int] = (2, 3)
    lift_channels: int = 256

    def arguments(self) -> dict[str, Any]:
        return {
            "image_size": self.image_size, "encoder_channels": list(self.encoder_channels),
            "encoder_blocks": list(self.encoder_blocks), "lift_channels": self.lift_channels,
        }  # fmt: skip


@dataclass(frozen=True)
class MultiviewLoraConfig:
    """data: a cached folder with pictures. bundle: the published folder or repository. base: how its weights are held;
    in int8 the adapted matrices have one scale per output channel, the rest is bfloat16. view_shares: how often a
    sample has 1, 2, 3 and 4 views."""

    data: str
    bundle: str
    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ATTENTION_AND_MLP
    base: Literal["fp32", "fp16", "bf16", "int8"] = "bf16"
    lifting: LiftingConfig = field(default_factory=LiftingConfig)
    use_checkpoint: bool = False
    view_shares: tuple[float, float, float, float] = (0.25, 0.2, 0.15, 0.4)
    drop_condition: float = 0.1
    time_mean: float = 1.0
    time_std: float = 1.0
    validation_objects: int = 32


class MultiviewLoraTask(Task):
    config: MultiviewLoraConfig

    def __init__(self, config: MultiviewLoraConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")

    # ---- model

    def build_model(self) -> nn.Module:
        config = self.config
        bundle = load_bundle(config.bundle)
        network = bundle.network("structure_flow", _DTYPES[config.base])
        bundle.release()
        if not isinstance(network, SparseStructureFlowModel) or isinstance(network, LiftedPublishedFlow):
            raise TriptychError(f"the bundle {bundle.name} has no published structure flow: choose another bundle")
        add_lora(network, config.rank, config.alpha, config.targets)
        if config.base == "int8":
            for layer in lora_layers(network).values():
                layer.quantize()
        model = LiftedPublishedFlow.around(network, config.lifting.arguments())
        model.use_checkpoint = config.use_checkpoint
        return model

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = CachedData(self.config.data, "train", "images")
        self.held_out = CachedData(self.config.data, "validation", "images")

    # ---- data

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        there = min(self.data.records[index].views, 4)
        shares = np.array(self.config.view_shares[:there])
        count = 1 + int(generator.choice(there, p=shares / shares.sum()))
        chosen = np.sort(generator.permutation(there)[:count]).tolist()
        normal = torch.tensor(generator.standard_normal(), dtype=torch.float32)
        time = logit_normal_times(normal, self.config.time_mean, self.config.time_std)
        drop = bool(generator.random() < self.config.drop_condition)
        return self.seen(self.data, index, chosen, generator) | {"time": time, "drop": torch.tensor(drop)}

    def seen(self, data: CachedData, index: int, chosen: list[int], generator: np.random.Generator) -> dict[str, Any]:
        x_0 = data.read(index, "structure")["structure"]
        return {
            "x_0": x_0,
            "noise": torch.from_numpy(generator.standard_normal(tuple(x_0.shape), dtype=np.float32)),
            **{name: data.views(index, name, chosen) for name in ("conditions", "images", "azimuths")},
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {
            key: torch.stack([s[key] for s in samples]) for key in ("x_0", "noise", "time", "drop")
        }
        batch |= {key: torch.cat([s[key] for s in samples]) for key in ("conditions", "images")}
        batch["azimuths"] = [float(a) for s in samples for a in s["azimuths"]]
        batch["counts"] = [len(s["images"]) for s in samples]
        return batch

    # ---- loss

    def errors(self, model: LiftedPublishedFlow, batch: dict[str, Any]) -> Tensor:
        """(B,) mean squared error of each sample's velocity."""
        images = batch["images"].to(self.device).float() / 255
        posed = PosedViews(images, tuple(Camera(azimuth) for azimuth in batch["azimuths"]), tuple(batch["counts"]))
        cond = model.condition(batch["conditions"].to(self.device).float(), posed)
        if batch["drop"].any():
            cond = cond.without(batch["drop"].to(self.device))
        x_t = interpolate(batch["x_0"], batch["noise"], batch["time"])
        v = model(x_t, 1000 * batch["time"], cond)
        return (v.float() - velocity(batch["x_0"], batch["noise"])).square().flatten(1).mean(dim=1)

    def loss(self, model: nn.Module, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        return self.errors(cast(LiftedPublishedFlow, model), batch).mean(), {}

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out objects at fixed times with fixed noise: the error with all their views and with the first alone."""
        found: dict[str, list[float]] = {"loss_all": [], "loss_one": []}
        for index in range(min(len(self.held_out), self.config.validation_objects)):
            views = list(range(min(self.held_out.records[index].views, 4)))
            for name, chosen in (("loss_all", views), ("loss_one", views[:1])):
                for time in VALIDATION_TIMES:
                    sample = self.seen(self.held_out, index, chosen, np.random.default_rng(index))
                    sample |= {"time": torch.tensor(time), "drop": torch.tensor(False)}
                    batch = self.collate([sample])
                    batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                    found[name].append(float(self.errors(cast(LiftedPublishedFlow, model), batch).mean()))
        means = {name: float(np.mean(values)) for name, values in found.items()}
        return {"loss": (means["loss_all"] + means["loss_one"]) / 2, **means}

    # ---- export

    def adapter(self, model: LiftedPublishedFlow, provenance: dict[str, Any]) -> Adapter:
        """What the run learned, without the base."""
        lifting = {name: tensor.cpu().contiguous() for name, tensor in model.lifting_state().items()}
        return Adapter(
            tensors=adapter_tensors(model) | lifting,
            base=load_bundle(self.config.bundle).name,
            component="structure_flow",
            class_name="SparseStructureFlowModel",
            lifting=self.config.lifting.arguments(),
            provenance=provenance,
        )

    def export(self, model: nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """The adapter alone, and a bundle whose network has it merged into the base's own weights."""
        from trainer.export import without_places, write_components

        bundle = load_bundle(self.config.bundle)
        adapter = self.adapter(cast(LiftedPublishedFlow, model), without_places(provenance))
        merged = adapted(bundle.network("structure_flow"), adapter, base=bundle.name)
        config = bundle.component("structure_flow").config | self.config.lifting.arguments()
        for key in ("use_fp16", "use_checkpoint"):
            config.pop(key, None)
        sampling = {"steps": 25, "guidance": 5.0, "rescale_t": 3.0}
        provenance = provenance | {"base": bundle.manifest.provenance | {"name": bundle.name}}
        write_components(folder, {"structure_flow": (merged, config)}, provenance, sampling=sampling, dtype="float16")
        write_adapter(folder / ADAPTER_FILE, adapter)

    def memory_shape(self) -> MemoryShape:
        """For `trainer plan`, of the published image-large; neither data nor weights are read."""
        return multiview_shape(PUBLISHED_STRUCTURE_FLOW, self.config.lifting, self.config.rank, self.config.targets)


PUBLISHED_STRUCTURE_FLOW: dict[str, Any] = {
    "resolution": 16, "in_channels": 8, "out_channels": 8, "model_channels": 1024, "cond_channels": 1024,
    "num_blocks": 24, "num_heads": 16, "mlp_ratio": 4, "patch_size": 1, "qk_rms_norm": True,
}  # fmt: skip


def multiview_shape(
    config: dict[str, Any], lifting: LiftingConfig, rank: int, targets: Sequence[str], views: int = 4
) -> MemoryShape:
    """What a sample with ``views`` views takes."""
    network = weightless("SparseStructureFlowModel", config)
    lifted = LiftedPublishedFlow(**config | {"num_blocks": 0}, **lifting.arguments())
    tokens = (config["resolution"] // config["patch_size"]) ** 3
    fine, coarse = lifting.encoder_channels
    cells = (lifting.image_size // 4) ** 2
    # Norm, two convolutions and a nonlinearity of each residual block; then what each block of voxels collects.
    encoder = 2 * 4 * cells * (fine * lifting.encoder_blocks[0] + coarse / 4 * lifting.encoder_blocks[1])
    pairs = tokens * (2 * 8 * coarse + 4 * 8 * lifting.lift_channels)
    return flow_shape(
        network, config, tokens=tokens, context_tokens=1374 * views, rank=rank, targets=targets,
        added=sum(p.numel() for p in lifted.lifting_parameters()), added_bytes=views * (encoder + pairs),
    )  # fmt: skip
