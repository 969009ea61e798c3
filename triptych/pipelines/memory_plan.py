"""How much memory a published bundle will take, stage by stage, before anything is loaded.

Weights are exact: the networks are built without memory and their bytes added up. Activations are the tensors that a
forward pass without gradients holds at its worst moment, on CUDA, for one object:

- a transformer block: its input, the input of its caller, the sum so far, the normalised copy and what attention
  leaves, 5 rows of C, and the two hidden rows of the MLP, 2 r C; in half precision the float32 tokens beside
  it; or the norms of attention, 28 bytes a channel (40 in float32);
- the structure decoder: at each level the input, and norm, activation and sum in float32;
- the latent flow: the torso as above, or the first block after it, which joins skip and torso on all voxels: 2 C wide,
  three times or, in half precision, once with two float32 copies; and one gathered block of a convolution;
- the mesh decoder: the last subdivision, 64 rows a voxel, each with its coordinates and the 27 neighbours: four float32
  rows in a norm, or the result beside its last features; or the kernel that a subdivision prepares;
- FlexiCubes: up to MESH_BYTES a cube when every cube of the voxels is crossed; a smooth surface takes a third of it.

tests/test_memory_plan.py compares each with the tensors that are alive in a real pass. Beside it stands a fixed sum for
what kernels use themselves. Not counted: the CUDA context (0.3-0.6 GiB) and fragmentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, cast

import torch

from ..bundles.published import weightless
from ..errors import TriptychError
from ..models.image_conditioning import ENCODERS
from ..models.slat_decoder import COLOR_CHANNELS, CUBE_CHANNELS
from ..sparse.conv import BLOCK_BYTES
from .memory import GIB, network_bytes

SCRATCH_BYTES = 192 << 20  # matrix products, convolutions and sorting
MESH_BYTES = 3800
_TABLE_BYTES = 27 * 4
_COORD_BYTES = 16

Networks = Mapping[str, tuple[str, Mapping[str, Any]]]  # component -> class name and constructor arguments

_FLOW = dict(in_channels=8, out_channels=8, model_channels=1024, cond_channels=1024, num_blocks=24, num_heads=16,
             mlp_ratio=4, pe_mode="ape", qk_rms_norm=True, use_fp16=True)  # fmt: skip
# The networks of TRELLIS-image-large that the pipeline uses.
LARGE: Networks = {
    "structure_flow": ("SparseStructureFlowModel", {**_FLOW, "resolution": 16, "patch_size": 1}),
    "structure_decoder": (
        "SparseStructureDecoder",
        dict(out_channels=1, latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, channels=[512, 128, 32],
             use_fp16=True),
    ),
    "slat_flow": (
        "SLatFlowModel",
        {**_FLOW, "resolution": 64, "patch_size": 2, "num_io_res_blocks": 2, "io_block_channels": [128]},
    ),
    "slat_decoder_mesh": (
        "SLatMeshDecoder",
        dict(resolution=64, model_channels=768, latent_channels=8, num_blocks=12, num_heads=12, mlp_ratio=4,
             attn_mode="swin", window_size=8, pe_mode="ape", use_fp16=True, representation_config={"use_color": True}),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PlannedStage:
    """Bytes of a stage: its weights, exactly, and its activations with scratch memory, as an upper estimate."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def plan_memory(
    networks: Networks = LARGE,
    dtype: torch.dtype = torch.float16,
    views: int = 1,
    voxels: int = 20_000,
    *,
    encoder: str = "dinov2_vitl14_reg",
    tokens: int | None = None,
    concat: bool = False,
) -> dict[str, PlannedStage]:
    """Stage -> bytes on the device, for one object.

    networks: class and config of each component of the pipeline. dtype: of the torsos. views: pictures; with concat
    every step sees the tokens of all. voxels: occupied ones. tokens: of the latent flow; None takes the most there
    can be. Raises TriptychError for numbers below 1 and an unknown encoder.
    """
    if views < 1 or voxels < 1:
        raise TriptychError(f"a plan for {views} views and {voxels} voxels: give 1 or more of each")
    if encoder not in ENCODERS:
        raise TriptychError(f"unknown image encoder {encoder!r}: choose one of {', '.join(ENCODERS)}")
    info, size = ENCODERS[encoder], dtype.itemsize
    configs = {name: dict(config) for name, (_, config) in networks.items()}
    context = info.tokens * (views if concat else 1)
    kept = 2 * views * info.tokens * info.channels * 4  # the tokens of all pictures, and the negative ones
    if tokens is None:
        tokens = min(voxels, (configs["slat_flow"]["resolution"] // configs["slat_flow"]["patch_size"]) ** 3)
    activations = {
        "structure_flow": structure_flow_bytes(configs["structure_flow"], size, context) + kept,
        "structure_decoder": structure_decoder_bytes(configs["structure_decoder"], size, _latent_side(configs)) + kept,
        "slat_flow": slat_flow_bytes(configs["slat_flow"], size, voxels, tokens, context) + kept,
        "slat_decoder_mesh": mesh_decoder_bytes(configs["slat_decoder_mesh"], size, voxels) + kept,
    }
    pictures = views * 3 * info.image_size**2 * 8
    shown = views * info.tokens * info.channels * 13 * 4 + pictures
    plan = {"image encoder": PlannedStage(4 * info.parameters, shown + SCRATCH_BYTES)}
    for name, needed in activations.items():
        plan[name] = PlannedStage(weight_bytes(*networks[name], dtype), needed + SCRATCH_BYTES)
    cubes = voxels * 8 ** configs["slat_decoder_mesh"].get("num_upsample", 2)
    plan["mesh"] = PlannedStage(0, cubes * MESH_BYTES + SCRATCH_BYTES)
    return plan


def plan_table(plan: Mapping[str, PlannedStage]) -> str:
    """A line for each stage, in GiB."""
    width = max(map(len, plan))
    rows = [
        (f"{name:<{width}}", *(part / GIB for part in (s.weights, s.activations, s.total))) for name, s in plan.items()
    ]
    return "\n".join(f"{name}  weights {a:5.2f}  activations {b:5.2f}  together {c:5.2f} GiB" for name, a, b, c in rows)


def weight_bytes(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> int:
    """Of the network's parameters and buffers, its torso in dtype."""
    network = weightless(class_name, dict(config))
    cast(Any, network).convert_to(dtype)
    return network_bytes(network)


# ---- activations, without kernels' scratch memory; size: bytes of a number in the torso


def torso_bytes(config: Mapping[str, Any], size: int, tokens: int, context: int) -> int:
    """One block of a flow at work, with its context in both precisions and as keys and values."""
    width, ratio = config["model_channels"], config.get("mlp_ratio", 4)
    attention = 40 if size == 4 else 28
    row = width * max(attention, (5 + 2 * ratio) * size + (4 if size < 4 else 0))
    seen = context * (config["cond_channels"] * (4 + size) + 2 * width * size)
    return int(tokens * row + seen)


def structure_flow_bytes(config: Mapping[str, Any], size: int, context: int) -> int:
    tokens = (config["resolution"] // config.get("patch_size", 2)) ** 3
    return torso_bytes(config, size, tokens, context)


def structure_decoder_bytes(config: Mapping[str, Any], size: int, side: int) -> int:
    """side: of the latent grid."""
    row = 12 + size + (size if size < 4 else 0)
    levels = [(side * 2**level) ** 3 * width for level, width in enumerate(config["channels"])]
    return max(levels) * row


def slat_flow_bytes(
    config: Mapping[str, Any], size: int, voxels: int, tokens: int, context: int, device: str = "cuda"
) -> int:
    """voxels: on the fine grid. tokens: after the input blocks."""
    widths = [*(config.get("io_block_channels") or []), config["model_channels"]]
    outer, inner = widths[0], widths[min(1, len(widths) - 1)]
    depth = config.get("num_io_res_blocks", 2)
    kept = (voxels + tokens) * (_TABLE_BYTES + _COORD_BYTES) + (voxels * outer * (depth - 1) + tokens * inner) * size
    joined = voxels * 2 * inner * (3 * size if size == 4 else max(3 * size, size + 8)) + 3 * tokens * inner * size
    gathered = max(128 * 27 * 2 * inner * size, min(BLOCK_BYTES[device], voxels * 27 * 2 * inner * size))
    return kept + max(torso_bytes(config, size, tokens, context), joined + gathered)


def mesh_decoder_bytes(config: Mapping[str, Any], size: int, voxels: int, device: str = "cuda") -> int:
    width = config["model_channels"]
    steps = config.get("num_upsample", 2)
    widths = config.get("upsample_channels") or [width // 2 ** (i + 2) for i in range(steps)]
    last, rows = [width, *widths][-1], voxels * 8**steps
    coloured = (config.get("representation_config") or {}).get("use_color", False)
    out = 4 * (CUBE_CHANNELS + COLOR_CHANNELS * bool(coloured))
    tables = sum(voxels * 8**level * (_TABLE_BYTES + _COORD_BYTES + 2) for level in range(steps + 1))
    gathered = max(min(rows, 128) * 27 * last * size, min(BLOCK_BYTES[device], rows * 27 * last * size))
    phases = [
        rows * (out + last * (size + (4 if size < 4 else 0))),  # the result
        rows * 16 * last,  # a norm
        rows * 4 * last * size + gathered,  # a convolution
        *(a * b * (27 * 4 + 64 * (4 + (size if size < 4 else 0))) for a, b in pairwise([width, *widths])),  # its kernel
    ]
    ratio = config.get("mlp_ratio", 4)
    torso = int(voxels * width * ((5 + 2 * ratio) * size + (4 if size < 4 else 0)))
    return tables + max(*phases, torso)


def _latent_side(configs: Mapping[str, Mapping[str, Any]]) -> int:
    return int(configs["structure_flow"]["resolution"])


def flow_flops(config: Mapping[str, Any], tokens: int, context: int, voxels: int = 0) -> int:
    """Floating-point operations of one forward pass of a flow for one object: matrix products, attention and sparse
    convolutions, a multiplication and an addition as two. voxels: of the latent flow, whose convolutions count every
    neighbour, occupied or not."""
    width, ratio, seen = config["model_channels"], config.get("mlp_ratio", 4), config["cond_channels"]
    a_block = tokens * width * (4 * width + 2 * width + 2 * ratio * width)  # self, cross, MLP
    a_block += context * seen * 2 * width + 2 * tokens * (tokens + context) * width + 6 * width**2
    embedder = 256 * width + width**2
    total = config["num_blocks"] * a_block + embedder
    widths = list(config.get("io_block_channels") or [])
    if config.get("io_block_channels") is None:
        patch = config.get("patch_size", 2) ** 3
        return int(2 * (total + tokens * width * patch * (config["in_channels"] + config["out_channels"])))
    outer = widths[0] if widths else width
    total += (voxels if widths else tokens) * outer * (config["in_channels"] + config["out_channels"])
    for a, b, down, joined in _resblocks(config, widths):
        rows = tokens if down else voxels
        total += prod((27, rows, b, joined * a + b)) + 2 * b * width + (rows * joined * a * b if joined * a != b else 0)
    return int(2 * total)


def _resblocks(config: Mapping[str, Any], widths: list[int]) -> list[tuple[int, int, bool, int]]:
    """Of one halving: (channels in, out, on the coarse voxels, 2 where a skip is joined)."""
    if len(widths) > 1:
        raise TriptychError(f"io_block_channels {widths}: operations are counted for one halving of the grid")
    found: list[tuple[int, int, bool, int]] = []
    for width in widths:
        inner, depth = config["model_channels"], config.get("num_io_res_blocks", 2)
        found += [(width, width, False, 1)] * (depth - 1) + [(width, inner, True, 1)]
        joined = 2 if config.get("use_skip_connection", True) else 1
        found += [(inner, width, False, joined)] + [(width, width, False, joined)] * (depth - 1)
    return found
