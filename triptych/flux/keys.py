"""Module names of Flux transformers: diffusers' and the native ones of Black Forest Labs, which ComfyUI uses.

Both name the same layers, with three differences that names do not show. Query, key and value are one matrix in the
native format (and, in the single blocks of FLUX.1, the MLP's first layer with them). The last modulation,
``norm_out.linear``, holds scale then shift in diffusers and shift then scale natively. RMS norms call their weight
``scale``. A family is "flux1" (dev, Kontext, schnell, Fill) or "flux2" (dev, klein).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..errors import TriptychError

_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks|double_blocks|single_blocks)\.(\d+)\.(.+)")
_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}


@dataclass(frozen=True)
class Piece:
    """Where a diffusers module lies: rows ``part`` of ``parts`` of a native module, perhaps with its halves swapped."""

    native: str
    part: int = 0
    parts: int = 1
    swapped: bool = False


def _joined(native: str, *modules: str) -> dict[str, Piece]:
    return {module: Piece(native, part, len(modules)) for part, module in enumerate(modules)}


def _renamed(**names: str) -> dict[str, Piece]:
    return {module: Piece(native) for module, native in names.items()}


_DOUBLE = {
    **_joined("img_attn.qkv", "attn.to_q", "attn.to_k", "attn.to_v"),
    **_joined("txt_attn.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.to_out.0": Piece("img_attn.proj"),
    "attn.to_add_out": Piece("txt_attn.proj"),
    "attn.norm_q": Piece("img_attn.norm.query_norm"),
    "attn.norm_k": Piece("img_attn.norm.key_norm"),
    "attn.norm_added_q": Piece("txt_attn.norm.query_norm"),
    "attn.norm_added_k": Piece("txt_attn.norm.key_norm"),
}
_SINGLE = {"attn.norm_q": Piece("norm.query_norm"), "attn.norm_k": Piece("norm.key_norm")}
_TOP = {
    **_renamed(x_embedder="img_in", context_embedder="txt_in", proj_out="final_layer.linear"),
    "norm_out.linear": Piece("final_layer.adaLN_modulation.1", swapped=True),
}


def _embedders(parent: str, **natives: str) -> dict[str, Piece]:
    ends = {"linear_1": "in_layer", "linear_2": "out_layer"}
    return {
        f"{parent}.{name}.{end}": Piece(f"{native}.{ends[end]}") for name, native in natives.items() for end in ends
    }


# Family -> kind of block ("" outside of the blocks) -> diffusers module -> its place.
_TABLES: dict[str, dict[str, dict[str, Piece]]] = {
    "flux1": {
        "": _TOP
        | _embedders(
            "time_text_embed", timestep_embedder="time_in", guidance_embedder="guidance_in", text_embedder="vector_in"
        ),
        "transformer_blocks": _DOUBLE
        | {
            "norm1.linear": Piece("img_mod.lin"),
            "norm1_context.linear": Piece("txt_mod.lin"),
            "ff.net.0.proj": Piece("img_mlp.0"),
            "ff.net.2": Piece("img_mlp.2"),
            "ff_context.net.0.proj": Piece("txt_mlp.0"),
            "ff_context.net.2": Piece("txt_mlp.2"),
        },
        "single_transformer_blocks": _SINGLE
        | _joined("linear1", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        | {"proj_out": Piece("linear2"), "norm.linear": Piece("modulation.lin")},
    },
    "flux2": {
        "": _TOP
        | _embedders("time_guidance_embed", timestep_embedder="time_in", guidance_embedder="guidance_in")
        | {
            f"{name}.linear": Piece(f"{name}.lin")
            for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
        },
        "transformer_blocks": _DOUBLE
        | {
            "ff.linear_in": Piece("img_mlp.0"),
            "ff.linear_out": Piece("img_mlp.2"),
            "ff_context.linear_in": Piece("txt_mlp.0"),
            "ff_context.linear_out": Piece("txt_mlp.2"),
        },
        "single_transformer_blocks": _SINGLE
        | {"attn.to_qkv_mlp_proj": Piece("linear1"), "attn.to_out": Piece("linear2")},
    },
}
FAMILIES = {"flux1": "FLUX.1", "flux2": "FLUX.2"}


def piece_of(module: str, family: str) -> Piece | None:
    """The native place of a diffusers module; None when the family ("flux1", "flux2") has no such module."""
    found = _BLOCK.fullmatch(module)
    if not found:
        return _TABLES[family][""].get(module)
    kind, index, inner = found.groups()
    piece = _TABLES[family].get(kind, {}).get(inner)
    if piece is None:
        return None
    return Piece(f"{_BLOCKS[kind]}.{int(index)}.{piece.native}", piece.part, piece.parts, piece.swapped)


def modules_of(native: str, family: str) -> tuple[str, ...]:
    """The diffusers modules that a native module holds, from its first row down; () when there are none."""
    found = _BLOCK.fullmatch(native)
    kind, index, inner = found.groups() if found else ("", "", native)
    outer = next((name for name, other in _BLOCKS.items() if other == kind), kind)
    modules = _inverse(family).get((outer, inner), ())
    return tuple(f"{outer}.{int(index)}.{module}" if found else module for module in modules)


@cache
def _inverse(family: str) -> dict[tuple[str, str], tuple[str, ...]]:
    made: dict[tuple[str, str], tuple[str, ...]] = {}
    for kind, table in _TABLES[family].items():
        for module, piece in table.items():
            made[kind, piece.native] = (*made.get((kind, piece.native), ()), module)
    return made


def split_rows(tensor: Tensor, parts: int) -> tuple[Tensor, ...]:
    """The rows of a native matrix or bias by diffusers module: 3 equal ones, or q, k, v and an MLP of four times that.

    Raises TriptychError when the number of rows does not divide.
    """
    unit = {1: 1, 3: 3, 4: 7}[parts]
    if tensor.shape[0] % unit:
        raise TriptychError(f"a matrix with {tensor.shape[0]} rows cannot hold {parts} layers of Flux: fetch it again")
    width = tensor.shape[0] // unit
    return tuple(tensor.split([width] * min(parts, 3) + [4 * width] * (parts == 4)))


def swap_halves(tensor: Tensor) -> Tensor:
    """Scale and shift of the last modulation in the other order; a new tensor."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def family_of(keys: Iterable[str]) -> str:
    """The family by the key names of a whole transformer, diffusers or native. Raises TriptychError for neither."""
    names = set(keys)
    if any("double_stream_modulation_img" in name for name in names):
        return "flux2"
    if any(re.search(r"blocks\.0\.(norm1\.linear|img_mod\.lin)\.", name) for name in names):
        return "flux1"
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    raise TriptychError(f"these are no weights of a FLUX.1 or FLUX.2 transformer (they hold {shown}): choose another")


def module_names(family: str, kind: str) -> tuple[str, ...]:
    """All modules of a kind of block: "" (outside of the blocks), diffusers' two kinds or the two native ones."""
    table = _TABLES[family]
    if kind in table and kind:
        return tuple(table[kind])
    outer = next((name for name, other in _BLOCKS.items() if other == kind), "")
    natives = tuple(native for found, native in _inverse(family) if found == outer)
    return natives if kind else (*table[""], *natives)
