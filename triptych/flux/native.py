"""Flux transformers and their VAE in the native key format, which ComfyUI loads.

ComfyUI converts FLUX.1 from diffusers by itself, but stops with a KeyError at FLUX.2: so a full fine-tune has to be
exported. `keys` has the names. Not covered: quantised files, FLUX.3, ControlNets.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import TriptychError
from .keys import FAMILIES, Piece, family_of, modules_of, piece_of, split_rows, swap_halves

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NATIVE_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_WEIGHTS = "diffusion_pytorch_model"


def native_plan(keys: Iterable[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Native key -> (the diffusers keys whose rows it joins, whether its halves are swapped), of a whole transformer.

    Raises TriptychError for keys that no Flux transformer has, and for joined matrices of which a part is missing.
    """
    keys = list(keys)
    family = family_of(keys)
    found: dict[str, dict[int, str]] = {}
    pieces: dict[str, Piece] = {}
    strange = []
    for key in keys:
        module, _, leaf = key.rpartition(".")
        piece = piece_of(module, family)
        if piece is None or leaf not in ("weight", "bias"):
            strange.append(key)
            continue
        native = f"{piece.native}.{'scale' if piece.native.endswith('_norm') else leaf}"
        found.setdefault(native, {})[piece.part] = key
        pieces[native] = piece
    if strange:
        raise TriptychError(
            f"these tensors ({len(strange)}) do not belong to a {FAMILIES[family]} transformer: "
            f"{', '.join(strange[:3])}; export the model that diffusers saved"
        )
    lacking = [native for native, parts in found.items() if len(parts) != pieces[native].parts]
    if lacking:
        raise TriptychError(f"a part of {lacking[0]} is missing among the weights: fetch the model again")
    return {
        native: (tuple(key for _, key in sorted(parts.items())), pieces[native].swapped)
        for native, parts in found.items()
    }


def to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a diffusers FluxTransformer2DModel or Flux2Transformer2DModel -> native keys; same values, dtypes.

    Tensors that need no change are shared, not copied. Raises TriptychError like `native_plan`.
    """
    return {native: _made(keys, swapped, state.__getitem__) for native, (keys, swapped) in native_plan(state).items()}


def from_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Native keys, with or without ``model.diffusion_model.``, -> the state dict that diffusers loads.

    Raises TriptychError for keys that no Flux transformer has.
    """
    bare = {_without_prefix(key): tensor for key, tensor in state.items()}
    family = family_of(bare)
    made: dict[str, Tensor] = {}
    strange = []
    for key, tensor in bare.items():
        native, _, leaf = key.rpartition(".")
        modules = modules_of(native, family)
        if not modules or leaf not in ("weight", "bias", "scale"):
            strange.append(key)
            continue
        swapped = _swapped(modules[0], family)
        parts = (swap_halves(tensor),) if swapped else split_rows(tensor, len(modules))
        leaf = "weight" if leaf == "scale" else leaf
        made |= {f"{module}.{leaf}": part for module, part in zip(modules, parts, strict=True)}
    if strange:
        raise TriptychError(
            f"these tensors ({len(strange)}) do not belong to a native {FAMILIES[family]} transformer: "
            f"{', '.join(strange[:3])}; quantised files are not read here"
        )
    return made


def _swapped(module: str, family: str) -> bool:
    piece = piece_of(module, family)
    return piece is not None and piece.swapped


def _without_prefix(key: str) -> str:
    for prefix in NATIVE_PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def _made(keys: tuple[str, ...], swapped: bool, get: Callable[[str], Tensor]) -> Tensor:
    if len(keys) > 1:
        return torch.cat([get(key) for key in keys])
    return swap_halves(get(keys[0])) if swapped else get(keys[0])


# ---------------------------------------------------------------------------------------------------------- the VAE

_VAE_NAMES = (
    (r"\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r".down.\1.block.\2."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r".down.\1.downsample.conv."),
    (r"\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r".up.\1.block.\2."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r".up.\1.upsample.conv."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_to_native(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of AutoencoderKLFlux2 or AutoencoderKL -> the keys of ComfyUI's VAE, the latents' statistics included.

    The attention's matrices become 1x1 convolutions, and the decoder's levels are counted from the finest one.
    """
    levels = 1 + max((int(n) for key in state for n in re.findall(r"up_blocks\.(\d+)\.", key)), default=0)
    made = {}
    for key, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)\.", lambda found: f"up_blocks.{levels - 1 - int(found[1])}.", key)
        for pattern, replacement in _VAE_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".mid.attn_1." in name:
            front, inner = name.split(".mid.attn_1.")
            module, leaf = inner.rsplit(".", 1)
            name = f"{front}.mid.attn_1.{_VAE_ATTENTION[module]}.{leaf}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        made[name] = tensor
    return made


def vae_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a diffusers VAE -> the arguments of ComfyUI's AutoencoderKL, for sizes that its loader assumes.

    Raises TriptychError for widths that are no multiples of the first.
    """
    widths = list(config["block_out_channels"])
    if any(width % widths[0] for width in widths):
        raise TriptychError(f"a VAE of widths {widths} has no native form: each has to be a multiple of the first")
    settings = {
        "double_z": True, "z_channels": config["latent_channels"], "resolution": 256, "dropout": 0.0,
        "in_channels": config["in_channels"], "out_ch": config["out_channels"], "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths], "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [], "batch_norm_latent": "batch_norm_eps" in config or "patch_size" in config,
    }  # fmt: skip
    return {"ddconfig": settings, "embed_dim": config["latent_channels"]}


# ------------------------------------------------------------------------------------------------------------ export


def export_native(source: str | Path, target: str | Path, *, dtype: str | None = "bf16") -> Path:
    """Writes the transformer of a diffusers folder as one file for ComfyUI's ``models/diffusion_models``.

    source: a model folder or its ``transformer/``; one file or shards. dtype: "bf16", "fp16", "fp32", or None to
    keep each tensor's own. One tensor is in memory at a time, and the file appears under its name when it is whole.
    Raises TriptychError for folders without such weights, damaged files, an unknown dtype and a full disk.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TriptychError(f"unknown dtype {dtype!r}: choose {', '.join(DTYPES)}")
    files = weight_files(Path(source))
    target = Path(target)
    with ExitStack() as stack:
        try:
            handles = [stack.enter_context(safe_open(str(file), framework="pt")) for file in files]
            owner = {key: handle for handle in handles for key in handle.keys()}  # noqa: SIM118  (safe_open is no dict)
            plan = native_plan(owner)

            def tensor(native: str) -> Tensor:
                return _made(*plan[native], lambda key: owner[key].get_tensor(key)).to(kinds[native])

            facts = {"format": "pt", "modelspec.architecture": FAMILIES[family_of(owner)]}
            slices = {native: [owner[key].get_slice(key) for key in keys] for native, (keys, _) in plan.items()}
            shapes = {native: _shape([part.get_shape() for part in parts]) for native, parts in slices.items()}
            kinds = {
                native: _kind(native, {part.get_dtype() for part in parts}, dtype) for native, parts in slices.items()
            }
            _write_safetensors(target, shapes, kinds, facts, (tensor(native) for native in plan))
        except SafetensorError as error:
            raise TriptychError(f"the weights in {source} are damaged ({error}): fetch the model again") from error
    return target


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of the transformer of a diffusers folder. Raises TriptychError when any is missing."""
    inner = folder / "transformer" if (folder / "transformer").is_dir() else folder
    index = inner / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise TriptychError(f"{index} is damaged ({error}): fetch the model again") from error
        if any(Path(name).name != name for name in names):
            raise TriptychError(f"{index} names files of other folders: fetch the model again")
    else:
        names = [f"{_WEIGHTS}.safetensors"]
    missing = [name for name in names if not (inner / name).is_file()]
    if missing:
        raise TriptychError(f"{inner} has no {missing[0]}: choose a folder that diffusers saved (save_pretrained)")
    return [inner / name for name in names]


def _shape(shapes: list[list[int]]) -> list[int]:
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]]


def _kind(native: str, stored: set[str], wanted: str | None) -> torch.dtype:
    """The dtype to write. Raises TriptychError for numbers that mean something only with their scales."""
    kinds = [kind for kind, name in _NAMES.items() if name in stored]
    if len(kinds) != len(stored):
        raise TriptychError(
            f"{native} is stored as {', '.join(sorted(stored))}: export the model before it is quantised, in one of "
            f"{', '.join(DTYPES)}"
        )
    return DTYPES[wanted] if wanted else max(kinds, key=lambda kind: kind.itemsize)


def _write_safetensors(
    path: Path,
    shapes: Mapping[str, list[int]],
    kinds: Mapping[str, torch.dtype],
    facts: dict[str, str],
    tensors: Iterator[Tensor],
) -> None:
    """Writes tensors, in the order of ``shapes``, one after the other as they come. Replaces ``path`` at the end."""
    header: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * kinds[name].itemsize
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                stream.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise TriptychError(
            f"cannot write {path} ({error.strerror or error}): choose another folder or free some space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
