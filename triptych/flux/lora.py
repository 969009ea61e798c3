"""LoRA files of the views models: one file that diffusers and ComfyUI's own loader read alike.

The form that both read exactly is diffusers' (``transformer.<module>.lora_A.weight`` and ``lora_B.weight``) with the
scale alpha / rank already multiplied into ``lora_B``: ComfyUI does not see an alpha that stands in the file's header,
and diffusers refuses ``.alpha`` tensors for FLUX.2. Modules for which ComfyUI has no name are not trained at all,
because they would be dropped without a word (`not_mappable`). `lora_forms` reads the files of others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import TriptychError
from ..geometry.files import write_files
from .keys import FAMILIES, module_names, piece_of
from .lora_forms import A, B, bare, check_keys, json_object, normalised, pairs

_STRENGTHS = "_triptych_lora_strengths"  # on a transformer: adapter -> strength, which PEFT does not remember
FAMILY = {"flux2-klein": "flux2", "flux1-kontext": "flux1", "flux1-dev": "flux1"}  # of a card's architecture
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
# For PEFT's target_modules. A string is matched against the whole name there; a list of endings would not do, because
# attn.to_out is a layer in FLUX.2's single blocks and a list of layers in its double blocks.
DEFAULT_TARGETS: dict[str, str] = {
    "flux2-klein": rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
} | {
    name: rf"transformer_blocks\.\d+\.({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2))"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
    for name in ("flux1-kontext", "flux1-dev")
}
_PUBLISHED = {  # family, width, double blocks, single blocks
    ("flux1", 3072, 19, 38): "FLUX.1",
    ("flux2", 6144, 8, 48): "FLUX.2-dev",
    ("flux2", 3072, 5, 20): "FLUX.2-klein-4B",
    ("flux2", 4096, 8, 24): "FLUX.2-klein-9B",
}


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A LoRA in diffusers names.

    tensors: ``<module>.lora_A.weight`` (R, inputs) and ``<module>.lora_B.weight`` (outputs, R), float32, the scale
        included, all of one rank. base: the model it was trained on, as the file says, or None. asked: how it
        wants to be asked, fields of a card (`card.how_to_ask`); nothing where the file does not say.
    architecture: a card's (`FAMILY`), or None when the file does not say. family: "flux1", "flux2", or None when its
    layers are in both. targets: its modules. label: what errors call it.
    """

    tensors: dict[str, Tensor]
    base: str | None
    architecture: str | None
    rank: int
    targets: tuple[str, ...]
    family: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    label: str = "the LoRA"


def not_mappable(architecture: str) -> tuple[str, ...]:
    """Modules that must not be trained, because ComfyUI's loader drops their LoRA without a word: modulation and time
    embedding of FLUX.2. Raises TriptychError for an unknown architecture."""
    if family_of_architecture(architecture) != "flux2":
        return ()
    outside = (module for module in module_names("flux2", "") if piece_of(module, "flux2") is not None)
    return tuple(m for m in outside if m.startswith("time_guidance_embed") or "_modulation" in m)


def check_targets(architecture: str, modules: Iterable[str]) -> None:
    """Raises TriptychError for modules whose LoRA would not load in ComfyUI and diffusers alike."""
    modules = list(modules)
    refused = sorted(set(modules) & set(not_mappable(architecture)))
    if refused:
        raise TriptychError(
            f"a LoRA of {', '.join(refused[:3])} is dropped by ComfyUI without a word: train other modules "
            "(attention and MLPs, x_embedder, context_embedder, proj_out), or fine-tune the whole model"
        )
    family = family_of_architecture(architecture)
    unknown = sorted(module for module in modules if piece_of(module, family) is None)
    if unknown:
        raise TriptychError(f"a {FAMILIES[family]} transformer has no {', '.join(unknown[:3])}: choose other modules")
    if not modules:
        raise TriptychError("no module is chosen for the LoRA: its targets fit nothing in the model")


def family_of_architecture(architecture: str) -> str:
    """ "flux1" or "flux2". Raises TriptychError for an unknown architecture."""
    if architecture not in FAMILY:
        raise TriptychError(f"unknown architecture {architecture!r}: choose {', '.join(FAMILY)}")
    return FAMILY[architecture]


def save_lora(
    path: str | Path,
    state: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    base: str,
    architecture: str,
    *,
    asked: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a LoRA that diffusers, ComfyUI and `read_lora` load with the same effect.

    state: PEFT's, ``[base_model.model.]<module>.lora_A[.<adapter>].weight`` (rank, inputs) and lora_B (outputs, rank),
    of diffusers modules. alpha / rank is multiplied into lora_B, so that the file's own alpha is its rank. dtype: of
    the file; None keeps the tensors'. The header holds base, architecture, rank, provenance, and what ``asked`` says of
    how to ask the model (`card.how_to_ask`).
    Raises TriptychError for modules that do not load everywhere, wrong shapes and numbers that are not finite.
    """
    if rank < 1 or not alpha > 0:
        raise TriptychError(f"rank {rank} with alpha {alpha} is no LoRA: both have to be above 0")
    found, _ = pairs(state, "the LoRA")
    modules = {bare(name): pair for name, pair in found.items()}
    check_targets(architecture, modules)
    tensors = {}
    for module, (down, up) in modules.items():
        if down.shape[0] != rank:
            raise TriptychError(f"the LoRA of {module} has rank {down.shape[0]}, not {rank}: save it with its own rank")
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise TriptychError(
                f"the LoRA of {module} is not finite: the training has diverged, lower its learning rate"
            )
        scaled = up.float() * (alpha / rank)
        tensors[f"transformer.{module}{A}"] = down.detach().to("cpu", dtype or down.dtype).contiguous()
        tensors[f"transformer.{module}{B}"] = scaled.detach().to("cpu", dtype or up.dtype).contiguous()
    facts = {
        "base": base, "architecture": architecture, "rank": rank, "alpha": rank, "trained_alpha": alpha,
        "asked": dict(asked or {}), "provenance": dict(provenance or {}),
    }  # fmt: skip
    header = {
        "format": "pt", "triptych": json.dumps(facts, ensure_ascii=False), "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora", "modelspec.title": Path(path).stem,
        "ss_base_model_version": base,
    }  # fmt: skip
    path = Path(path)
    write_files(path.parent, {path.name: save(tensors, metadata=header)})
    return path


def read_lora(path: str | Path) -> LoraFile:
    """Reads a LoRA of any of the usual forms into diffusers names.

    Raises TriptychError for files that are damaged, are no LoRA, or hold a key that means nothing here.
    """
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt") as handle:
            header = handle.metadata() or {}
            check_keys(handle.keys(), path.name)  # before a whole model is read in vain
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (OSError, SafetensorError) as error:
        raise TriptychError(f"{path} is no whole safetensors file ({error}): fetch it again") from error
    facts = json_object(header.get("triptych"))
    tensors, family = normalised(state, header, path)
    targets = tuple(sorted(key.removesuffix(A) for key in tensors if key.endswith(A)))
    said = {key: value for key, value in facts.items() if isinstance(value, str)}
    return LoraFile(
        tensors,
        said.get("base") or header.get("ss_base_model_version"),
        said["architecture"] if said.get("architecture") in FAMILY else None,
        tensors[targets[0] + A].shape[0],
        targets,
        family,
        facts["asked"] if isinstance(facts.get("asked"), dict) else {},
        path.name,
    )


def apply_lora(target: Any, file: LoraFile | str | Path, strength: float = 1.0) -> None:
    """Puts the LoRA on a diffusers pipeline or transformer, through PEFT, beside those that were applied before.

    Raises TriptychError when it belongs to another model.
    """
    file = file if isinstance(file, LoraFile) else read_lora(file)
    transformer = getattr(target, "transformer", target)
    check_fits(file, transformer)
    strengths = dict(getattr(transformer, _STRENGTHS, {}))
    name = f"triptych_{len(strengths)}"
    dtype = transformer.dtype if transformer.dtype.is_floating_point else torch.float32
    state = {f"transformer.{key}": tensor.to(dtype) for key, tensor in file.tensors.items()}
    pipeline = None if transformer is target else target
    transformer.load_lora_adapter(state, prefix="transformer", adapter_name=name, _pipeline=pipeline)
    strengths[name] = strength
    setattr(transformer, _STRENGTHS, strengths)
    transformer.set_adapters(list(strengths), list(strengths.values()))


def remove_loras(target: Any) -> None:
    """Takes all applied LoRAs off a diffusers pipeline or transformer again; its weights are as they were."""
    transformer = getattr(target, "transformer", target)
    if getattr(transformer, "peft_config", None):
        transformer.unload_lora()
    setattr(transformer, _STRENGTHS, {})


@torch.no_grad()
def merge_lora(transformer: nn.Module, file: LoraFile | str | Path, strength: float = 1.0) -> None:
    """Adds strength * B A to the weights of a diffusers transformer, in place, computed in float32.

    Raises TriptychError, before anything is changed, when the LoRA belongs to another model or weights are quantised.
    """
    file = file if isinstance(file, LoraFile) else read_lora(file)
    check_fits(file, transformer)
    layers = {name: _layer(transformer, name) for name in file.targets}
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise TriptychError(
                f"{file.label} cannot be merged: {name} is quantised; load the model unquantised, or apply it"
            )
    for name, layer in layers.items():
        weight = layer.weight
        down, up = (file.tensors[name + end].to(weight.device, torch.float32) for end in (A, B))
        weight.copy_(weight.float() + strength * (up @ down))


def check_fits(file: LoraFile, transformer: nn.Module) -> None:
    """Raises TriptychError, naming both models, when the LoRA's modules or shapes are not the transformer's."""
    modules = dict(transformer.named_modules())
    for name in file.targets:
        layer = modules.get(name)
        wanted = (file.tensors[name + B].shape[0], file.tensors[name + A].shape[1])
        layer = getattr(layer, "base_layer", layer)
        found = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if found != wanted:
            raise TriptychError(
                f"{file.label} was made for {_described(file)}; the loaded model is {_described_model(transformer)}: "
                "choose a LoRA of this model, or load the other one"
            )


def _layer(transformer: nn.Module, name: str) -> Any:
    layer = transformer.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _described(file: LoraFile) -> str:
    """ "FLUX.1-dev (3072 wide, 57 blocks)", as far as the file tells: it may not touch every block."""
    doubles = 1 + max((int(n) for t in file.targets for n in re.findall(r"^transformer_blocks\.(\d+)", t)), default=-1)
    singles = 1 + max((int(n) for t in file.targets for n in re.findall(r"^single_\w+\.(\d+)", t)), default=-1)
    widths = [
        file.tensors[t + A].shape[1] for t in file.targets if t.endswith((".to_q", ".to_qkv_mlp_proj", ".linear_in"))
    ]
    width = widths[0] if widths else min(file.tensors[file.targets[0] + end].shape[i] for end, i in ((A, 1), (B, 0)))
    guesses = [
        name for (family, wide, most_doubles, most_singles), name in _PUBLISHED.items()
        if family == (file.family or family) and wide == width and doubles <= most_doubles and singles <= most_singles
    ]  # fmt: skip
    name = file.base or (guesses[0] if len(guesses) == 1 else f"a {FAMILIES.get(file.family or '', 'Flux')} model")
    return f"{name} ({width} wide, {doubles + singles} blocks)"


def _described_model(transformer: nn.Module) -> str:
    config: Any = transformer.config
    family = "flux2" if "Flux2" in type(transformer).__name__ else "flux1"
    width = config.num_attention_heads * config.attention_head_dim
    doubles, singles = config.num_layers, config.num_single_layers
    name = _PUBLISHED.get((family, width, doubles, singles), f"a {FAMILIES[family]} model")
    return f"{name} ({width} wide, {doubles + singles} blocks)"
