"""Low-rank adapters (LoRA, arXiv 2106.09685): linear layers that learn a small correction of frozen weights.

y = W x + scale * B (A x), with A (rank, in) random, B (out, rank) zero at first, scale = alpha / rank. The base weights
keep their state-dict keys; an adapter adds ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``. The base is frozen
and may be held in float16, bfloat16, or in 8 bits with one scale per output channel.

An adapter file is a safetensors file of those two keys per layer, with scale multiplied into B, so that a reader needs
no rank or alpha: W + B A is the tuned weight. Further tensors are those of layers that the base does not have
(triptych/models/lifted_published.py). Its metadata names the base it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import TriptychError
from ..geometry.files import write_files

FORMAT = "triptych-adapter-1"
A, B = ".lora_A.weight", ".lora_B.weight"
# Every matrix of the attentions and of the MLP of a transformer block.
ATTENTION_AND_MLP = tuple(f"blocks.*.{name}" for name in ("to_qkv", "to_out", "to_q", "to_kv", "mlp.0", "mlp.2"))


class _Int8Linear(torch.autograd.Function):
    """x W^T with W = q * scale, which is made anew on the way back instead of kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale)
        return F.linear(x, q.to(x.dtype) * scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        q, scale = ctx.saved_tensors
        return grad @ (q.to(grad.dtype) * scale.to(grad.dtype)), None, None


class LoraLinear(nn.Linear):
    """A frozen linear layer (..., in) -> (..., out) and its adapter in float32. rank: 1 to min(in, out)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(f"rank {rank} must lie in 1..{min(base.in_features, base.out_features)}")
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=False)
        base.requires_grad_(False)
        self.weight = base.weight
        self.bias = base.bias
        self.scale = alpha / rank
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def quantize(self) -> None:
        """The base weight in 8 bits from here on: int8 times one float32 scale for each output channel."""
        weight = self.weight.detach().float()
        scale = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-12)
        self.register_buffer("weight_q", (weight / scale).round().to(torch.int8), persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.weight = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        cast = torch.is_autocast_enabled(x.device.type)
        if self.weight is None:
            given = x.type(torch.get_autocast_dtype(x.device.type)) if cast else x
            y = _Int8Linear.apply(given, self.weight_q, self.weight_scale)
            y = y if self.bias is None else y + self.bias.type(y.dtype)
        else:
            y = F.linear(x, self.weight, self.bias)
        low = self.lora_A(x if cast else x.type(self.lora_A.weight.dtype))
        return y + (self.lora_B(low) * self.scale).type(y.dtype)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, (out, in) float32."""
        return self.scale * (self.lora_B.weight.detach().float() @ self.lora_A.weight.detach().float())


def add_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ATTENTION_AND_MLP) -> list[str]:
    """Replaces the linear layers whose names match one of ``targets`` (shell patterns) and freezes the whole model.

    Only the adapters require gradients afterwards. Returns the layers' names. Raises TriptychError for a pattern that
    matches no linear layer, and for a rank that a layer is too small for.
    """
    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    model.requires_grad_(False)
    for target in targets:
        if not any(fnmatchcase(name, target) for name in linear):
            raise TriptychError(f"the adapter's target {target!r} matches no linear layer of {type(model).__name__}")
    chosen = [name for name in linear if any(fnmatchcase(name, target) for target in targets)]
    for name in chosen:
        try:
            adapted = LoraLinear(linear[name], rank, alpha)
        except ValueError as error:
            raise TriptychError(f"the adapter does not fit {name}: {error}") from error
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, adapted)
    return chosen


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


@dataclass(frozen=True)
class Adapter:
    """An adapter file. tensors: A and B of the layers, and those of further layers. base: name of the bundle it was
    trained on, component: of its network, class_name: of that. lifting: arguments of the layers that it adds to the
    base, empty for none. provenance: how it was trained."""

    tensors: dict[str, Tensor]
    base: str
    component: str
    class_name: str
    lifting: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def layers(self) -> list[str]:
        return sorted(name.removesuffix(A) for name in self.tensors if name.endswith(A))

    def others(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if not name.endswith((A, B))}


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, float32 on the CPU, with the scale in B."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        found[name + A] = layer.lora_A.weight.detach().float().cpu().contiguous()
        found[name + B] = (layer.lora_B.weight.detach().float() * layer.scale).cpu().contiguous()
    return found


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Writes the file, whole or not at all."""
    facts = {
        "format": FORMAT,
        "base": adapter.base,
        "component": adapter.component,
        "class_name": adapter.class_name,
        "lifting": json.dumps(adapter.lifting),
        "provenance": json.dumps(adapter.provenance),
    }
    write_files(path.parent, {path.name: save(adapter.tensors, metadata=facts)})


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter file. Raises TriptychError for anything else."""
    try:
        with safe_open(str(path), framework="pt") as handle:
            facts = handle.metadata() or {}
            if facts.get("format") != FORMAT:
                raise TriptychError(f"{path} is no adapter of format {FORMAT}: choose a file that a LoRA run exported")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (safe_open is no dict)
        details = {key: json.loads(facts[key]) for key in ("lifting", "provenance")}
        adapter = Adapter(tensors, facts["base"], facts["component"], facts["class_name"], **details)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TriptychError(f"{path} is not a whole adapter file ({error}): fetch it again") from error
    for name in adapter.layers():
        if name + B not in tensors or tensors[name + A].shape[0] != tensors[name + B].shape[1]:
            raise TriptychError(f"{path} is damaged: the two matrices of {name} do not fit each other: fetch it again")
    return adapter


@torch.no_grad()
def merge_adapter(network: nn.Module, adapter: Adapter, *, base: str, strength: float = 1.0) -> None:
    """Adds strength * B A to the weights of a network, in place. base: the network's bundle, for what errors say.

    Raises TriptychError, before anything is changed, where the adapter belongs to another network.
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    other = f"the adapter was trained on {adapter.base} ({adapter.class_name}), this is {base}"
    if type(network).__name__ != adapter.class_name and not isinstance(network, _classes(adapter.class_name)):
        raise TriptychError(f"{other} ({type(network).__name__}): choose the adapter's own base")
    for name in adapter.layers():
        wanted = [adapter.tensors[name + B].shape[0], adapter.tensors[name + A].shape[1]]
        if name not in layers:
            raise TriptychError(f"{other}, which has no layer {name}: choose the adapter's own base")
        if (found := list(layers[name].weight.shape)) != wanted:
            raise TriptychError(f"{other}, whose {name} is {found} and not {wanted}: choose the adapter's own base")
    for name in adapter.layers():
        weight = layers[name].weight
        a, b = (adapter.tensors[name + part].to(weight.device).float() for part in (A, B))
        weight.copy_(weight.float() + strength * (b @ a))


def _classes(name: str) -> tuple[type[nn.Module], ...]:
    """The class that a bundle may call ``name``; none for an unknown name."""
    from importlib import import_module

    from ..bundles.components import CLASSES

    module = CLASSES.get(name, "").removeprefix("triptych.")
    return (getattr(import_module(f"...{module}", __name__), name),) if module else ()


def adapted(network: nn.Module, adapter: Adapter, *, base: str, strength: float = 1.0) -> nn.Module:
    """The network with the adapter merged into it (in place), and with the lifting layers that the adapter brings.

    Raises TriptychError where the adapter belongs to another network.
    """
    merge_adapter(network, adapter, base=base, strength=strength)
    if not adapter.lifting:
        return network
    from .lifted_published import LiftedPublishedFlow
    from .structure_flow import SparseStructureFlowModel

    if not isinstance(network, SparseStructureFlowModel):
        raise TriptychError(f"the adapter brings lifting for a structure flow, {base} gave {type(network).__name__}")
    lifted = LiftedPublishedFlow.around(network, adapter.lifting)
    wanted = lifted.lifting_state()
    found = adapter.others()
    if {n: t.shape for n, t in wanted.items()} != {n: t.shape for n, t in found.items()}:
        raise TriptychError(f"the adapter trained on {adapter.base} lacks or misfits lifting layers: fetch it again")
    lifted.load_state_dict(found, strict=False)
    return lifted.eval().requires_grad_(False)


__all__ = [
    "ATTENTION_AND_MLP", "Adapter", "LoraLinear", "adapted", "adapter_tensors", "add_lora", "lora_layers",
    "merge_adapter", "read_adapter", "write_adapter",
]  # fmt: skip
