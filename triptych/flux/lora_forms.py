"""The forms that LoRA files for Flux come in, brought to diffusers names.

diffusers (``transformer.``), PEFT (``base_model.model.``), native (``diffusion_model.``), and kohya's underscores
(``lora_unet_``) with native or diffusers names; alpha as a tensor, in the header or in PEFT's adapter_config.json.
Every key has to mean something. Not covered: LoKr, LoHa, DoRA, biases, text encoders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TriptychError
from .keys import FAMILIES, module_names, modules_of, piece_of, split_rows, swap_halves

A, B = ".lora_A.weight", ".lora_B.weight"
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_KEY = re.compile(r"(.+?)\.(?:lora_([AB])(?:\.\w+)?\.weight|lora[_.](down|up)\.weight|(alpha))")
_OTHER_KINDS = {
    "lokr_": "LoKr", "hada_": "LoHa", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
}  # fmt: skip
_MAX_CONFIG_BYTES = 4 << 20

Pair = tuple[Tensor, Tensor]  # (R, inputs), (outputs, R)
Resolved = tuple[str, frozenset[str], bool]  # a module's dotted name, the families that have it, whether it is native


def normalised(
    state: Mapping[str, Tensor], header: Mapping[str, str], path: Path
) -> tuple[dict[str, Tensor], str | None]:
    """A file's tensors -> ``<module>.lora_A.weight`` and ``.lora_B.weight`` in diffusers names, float32, with the scale
    in them and all of the largest rank; and the family, None when the modules are in both.

    header: the file's metadata. path: of the file, for its name and for PEFT's configuration beside it.
    Raises TriptychError when the file is damaged, is no LoRA, or holds a key that means nothing for Flux.
    """
    found, alphas = pairs(state, path.name)
    try:
        scales = _scales(found, alphas, header, path)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise TriptychError(f"the configuration of {path.name} is damaged ({error}): fetch it again") from error
    resolved = {name: _resolve(bare(name), path.name) for name in found}
    family = _family(found, resolved, path.name)
    scaled = {name: (down, up.float() * scales[name]) for name, (down, up) in found.items()}
    tensors = _in_diffusers_names(scaled, resolved, family or "flux2", path.name)
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise TriptychError(f"{path.name} holds numbers that are not finite, in {broken[0]}: fetch it again")
    rank = max(tensor.shape[0] for key, tensor in tensors.items() if key.endswith(A))
    return {key: _filled(key, tensor, rank) for key, tensor in tensors.items()}, family


def check_keys(keys: Iterable[str], label: str) -> None:
    """Raises TriptychError for adapters of other kinds, and for keys that are no part of a LoRA."""
    keys = list(keys)
    for mark, kind in _OTHER_KINDS.items():
        if any(mark in key for key in keys):
            raise TriptychError(f"{label} is a {kind} adapter, which is not supported: use a LoRA")
    unknown = [key for key in keys if not _KEY.fullmatch(key)]
    if unknown:
        raise _unknown(unknown, label)


def pairs(state: Mapping[str, Tensor], label: str) -> tuple[dict[str, Pair], dict[str, float]]:
    """Module as the file names it -> its two matrices; and -> its alpha, where a tensor says so."""
    check_keys(state, label)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, peft, kohya, alpha = _KEY.fullmatch(key).groups()  # type: ignore[union-attr]
        if alpha:
            alphas[name] = tensor
        else:
            halves.setdefault(name, {})[peft or {"down": "A", "up": "B"}[kohya]] = tensor
    lonely = [f"{name}.alpha" for name, alpha in alphas.items() if name not in halves or alpha.numel() != 1]
    if lonely:
        raise _unknown(lonely, label)
    for name, pair in halves.items():
        if len(pair) != 2 or not _is_pair(pair["A"], pair["B"]):
            raise TriptychError(f"{label} is damaged: the two matrices of {name} do not fit each other: fetch it again")
    if not halves:
        raise TriptychError(f"{label} holds no LoRA: choose another file")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}, {n: float(t) for n, t in alphas.items()}


def _is_pair(down: Tensor, up: Tensor) -> bool:
    return down.ndim == up.ndim == 2 and 0 < down.shape[0] == up.shape[1]


def _unknown(keys: list[str], label: str) -> TriptychError:
    text = [key for key in keys if key.startswith(("lora_te", "text_encoder"))]
    shown = ", ".join(sorted(text or keys)[:3]) + (" ..." if len(text or keys) > 3 else "")
    if text:
        return TriptychError(
            f"{label} also changes a text encoder ({shown}), which is not supported: choose another LoRA"
        )
    return TriptychError(
        f"{label} has keys without meaning for FLUX.1 and FLUX.2 ({len(keys)}: {shown}): nothing was loaded; choose a "
        "LoRA of a Flux transformer"
    )


def bare(name: str) -> str:
    """A module's name without what trainers put before it; names with underscores keep their prefix."""
    while (shorter := next((name.removeprefix(p) for p in _PREFIXES if name.startswith(p)), name)) != name:
        name = shorter
    return name


def _resolve(name: str, label: str) -> Resolved:
    """A bare name -> the dotted module, the families that have it, and whether the name is native."""
    flat = next((name.removeprefix(prefix) for prefix in _FLAT_PREFIXES if name.startswith(prefix)), None)
    if flat is not None:
        name = _dotted(flat) or name
    diffusers = frozenset(family for family in FAMILIES if piece_of(name, family))
    if diffusers:
        return name, diffusers, False
    native = frozenset(family for family in FAMILIES if modules_of(name, family))
    if not native:
        raise _unknown([name], label)
    return name, native, True


def _dotted(flat: str) -> str | None:
    found = re.fullmatch(r"((?:single_)?transformer_blocks|double_blocks|single_blocks)_(\d+)_(.+)", flat)
    if not found:
        return _flat_names().get(("", flat))
    inner = _flat_names().get((found[1], found[3]))
    return inner and f"{found[1]}.{found[2]}.{inner}"


@cache
def _flat_names() -> dict[tuple[str, str], str]:
    kinds = ("", "transformer_blocks", "single_transformer_blocks", "double_blocks", "single_blocks")
    return {
        (kind, name.replace(".", "_")): name
        for family in FAMILIES
        for kind in kinds
        for name in module_names(family, kind)
    }


def _family(pairs: Mapping[str, Pair], resolved: Mapping[str, Resolved], label: str) -> str | None:
    """The family that has all modules: by their names, and where native names are the same, by their shapes."""
    families = frozenset(FAMILIES)
    for name, (module, possible, native) in resolved.items():
        if native and len(possible) > 1:
            possible &= _families_by_shape(module, *pairs[name])
        families &= possible
    if not families:
        raise TriptychError(f"{label} mixes layers of FLUX.1 and FLUX.2, or of another model: choose another LoRA")
    return next(iter(families)) if len(families) == 1 else None


def _families_by_shape(native: str, down: Tensor, up: Tensor) -> frozenset[str]:
    """FLUX.1's MLPs are 4 wide; FLUX.2's are 3 wide and gated, so that their first layers have 6 times the width."""
    inputs, outputs = down.shape[1], up.shape[0]
    end = native.rpartition(".")[2] if native.startswith("single_blocks") else ".".join(native.split(".")[-2:])
    ratios = {
        "linear1": (outputs, inputs, 7, 9), "linear2": (inputs, outputs, 5, 4),
        "img_mlp.0": (outputs, inputs, 4, 6), "txt_mlp.0": (outputs, inputs, 4, 6),
        "img_mlp.2": (inputs, outputs, 4, 3), "txt_mlp.2": (inputs, outputs, 4, 3),
    }  # fmt: skip
    if end not in ratios:
        return frozenset(FAMILIES)
    large, small, first, second = ratios[end]
    return frozenset(family for family, ratio in (("flux1", first), ("flux2", second)) if large == ratio * small)


def _in_diffusers_names(
    pairs: Mapping[str, Pair], resolved: Mapping[str, Resolved], family: str, label: str
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        module, _, native = resolved[name]
        parts: Iterable[tuple[str, Tensor]] = [(module, up)]
        if native:
            modules = modules_of(module, family)
            piece = piece_of(modules[0], family)
            swapped = piece is not None and piece.swapped
            parts = zip(modules, (swap_halves(up),) if swapped else split_rows(up, len(modules)), strict=True)
        for part, rows in parts:
            if part + A in tensors:
                raise TriptychError(f"{label} changes {part} twice, under different names: choose another LoRA")
            tensors[part + A] = down.float()
            tensors[part + B] = rows.contiguous()
    return tensors


def _scales(
    pairs: Mapping[str, Pair], alphas: Mapping[str, float], header: Mapping[str, str], path: Path
) -> dict[str, float]:
    """alpha / rank by module: of its own tensor, of diffusers' header, of PEFT's adapter_config.json, else 1."""
    config = {
        key.removeprefix("transformer."): value
        for key, value in json_object(header.get("lora_adapter_metadata")).items()
    }
    beside = path.with_name("adapter_config.json")
    if not config and any(name.startswith("base_model.model.") for name in pairs) and beside.is_file():
        config = json_object(beside.read_text(encoding="utf-8") if beside.stat().st_size <= _MAX_CONFIG_BYTES else None)
    scales = {}
    for name, (down, _) in pairs.items():
        rank = down.shape[0]
        alpha = alphas.get(name, _of_config(config, bare(name), rank))
        scales[name] = alpha / (rank**0.5 if config.get("use_rslora") and name not in alphas else rank)
    return scales


def _of_config(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The alpha that a PEFT configuration gives a module; its rank when it says nothing."""
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return float(alpha)
    return float(config.get("lora_alpha") or rank)


def _filled(key: str, tensor: Tensor, rank: int) -> Tensor:
    """The matrix at the file's largest rank: added rows and columns of zeros change nothing."""
    missing = rank - tensor.shape[0 if key.endswith(A) else 1]
    if not missing:
        return tensor
    return nn.functional.pad(tensor, (0, 0, 0, missing) if key.endswith(A) else (0, missing))


def json_object(text: str | None) -> dict[str, Any]:
    try:
        data = json.loads(text) if text else {}
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
