"""python -m trainer plan RECIPE: what training a recipe takes of a card's memory, before one is rented.

Three ways of training the same network are shown: all weights (float32 with AdamW and an EMA), adapters beside a
frozen base in 16 bits, and beside one in 8 bits. Activations are those of bfloat16 autocast by the formulas of
trainer/memory.py (which tests compare with counted tensors). Not counted: what a framework and its kernels take for
themselves; a tenth of the card is left for them and for fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.config import TrainConfig, build_task
from trainer.memory import GIB, block_bytes, transformer_bytes
from triptych.errors import TriptychError
from triptych.models.adapters import ATTENTION_AND_MLP

CARDS_GIB = (24, 48, 80)
USABLE = 0.9
MAX_BATCH = 1024
MODES = ("full", "lora", "lora, 8-bit base")


@dataclass(frozen=True)
class MemoryShape:
    """What a plan needs to know of a flow. Numbers are counts; bytes are of bfloat16 training unless said otherwise.

    base: numbers of the network; matrices: of those in adapted layers; vectors count among the rest. adapters: numbers
    of low-rank adapters at ``rank``. added: numbers of new layers, trained in every mode. tokens: of one sample in the
    torso. kept_bytes, input_bytes: of one token in one block, kept or recomputed. context_bytes: of one sample in each
    kept block. rest_bytes: of one sample outside of the blocks.
    """

    base: int
    matrices: int
    adapters: int
    added: int
    rank: int
    blocks: int
    tokens: int
    kept_bytes: float
    adapter_bytes: float
    input_bytes: float
    context_bytes: float
    rest_bytes: float

    def static(self, mode: str) -> dict[str, float]:
        """Bytes by kind, without activations."""
        trained = self.added + (self.base if mode == "full" else self.adapters)
        frozen = 0.0
        if mode == "lora":
            frozen = 2.0 * self.base
        elif mode != "full":
            frozen = 1.0 * self.matrices + 2.0 * (self.base - self.matrices)
        # Autocast holds a bfloat16 copy of every trained matrix until the backward pass.
        copies = 2.0 * trained
        return {
            "weights": frozen + 4.0 * trained + copies, "gradients": 4.0 * trained, "optimizer": 8.0 * trained,
            "EMA": 4.0 * trained,
        }  # fmt: skip

    def activations(self, mode: str, batch: int, recomputed: int) -> float:
        """Bytes of a batch with so many blocks recomputed."""
        block = self.tokens * (self.kept_bytes + (0 if mode == "full" else self.adapter_bytes)) + self.context_bytes
        kept = self.blocks - recomputed + (recomputed > 0)  # one block at a time is there again
        return batch * (kept * block + recomputed * self.tokens * self.input_bytes + self.rest_bytes)

    def total(self, mode: str, batch: int, recomputed: int) -> float:
        return sum(self.static(mode).values()) + self.activations(mode, batch, recomputed)


def flow_shape(
    network: nn.Module,
    config: dict[str, Any],
    *,
    tokens: int,
    context_tokens: int = 1374,
    voxels: int | None = None,
    rank: int = 32,
    targets: Sequence[str] = ATTENTION_AND_MLP,
    added: int = 0,
    added_bytes: float = 0.0,
    low: bool = True,
    cpu: bool = False,
) -> MemoryShape:
    """The shape of a flow with constructor arguments ``config``; the network may lie on the meta device.

    voxels: of one sample in the io blocks of the second stage. added, added_bytes: numbers of new layers and bytes of
    their activations a sample. low, cpu: as in ``transformer_bytes``.
    """
    width, channels, blocks = (2 if low else 4), config["model_channels"], config["num_blocks"]
    norm = bool(config.get("qk_rms_norm"))
    layers = [
        m for n, m in network.named_modules() if isinstance(m, nn.Linear) and any(fnmatchcase(n, t) for t in targets)
    ]
    io = [m for name in ("input_blocks", "out_blocks") for m in getattr(network, name, [])]
    head = tokens * channels * (4 + width)  # what the last norm takes and gives
    context = context_tokens * config["cond_channels"] * (6 if low else 4)  # as it comes, and in low precision
    return MemoryShape(
        base=sum(p.numel() for p in network.parameters()),
        matrices=sum(m.weight.numel() for m in layers),
        adapters=sum(rank * (m.in_features + m.out_features) for m in layers),
        added=added,
        rank=rank,
        blocks=blocks,
        tokens=tokens,
        kept_bytes=transformer_bytes(channels, config["mlp_ratio"], qk_rms_norm=norm, low=low, cpu=cpu),
        adapter_bytes=rank * width * len(layers) / blocks,
        input_bytes=channels * width,
        context_bytes=context_tokens * 2 * channels * width,
        rest_bytes=head + context + added_bytes + (voxels or 0) * sum(block_bytes(block, width) for block in io),
    )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """One mode on one card. batch: the largest micro-batch with the fewest recomputed blocks that let it in; plain: the
    largest without recomputing. Bytes of the first. A batch of 0 does not fit at all."""

    mode: str
    card_gib: int
    batch: int
    recomputed: int
    bytes: float
    plain: int


def fit(shape: MemoryShape, mode: str, card_gib: int) -> Fit:
    room = USABLE * card_gib * GIB

    def largest(recomputed: int) -> int:
        fixed = sum(shape.static(mode).values())
        return max(0, min(MAX_BATCH, int((room - fixed) // shape.activations(mode, 1, recomputed))))

    batch = largest(shape.blocks)
    needed = least_recomputed(shape, mode, card_gib, batch) if batch else None
    recomputed = shape.blocks if needed is None else needed
    return Fit(mode, card_gib, batch, recomputed, shape.total(mode, max(batch, 1), recomputed), largest(0))


def least_recomputed(shape: MemoryShape, mode: str, card_gib: int, batch: int) -> int | None:
    """How few blocks a batch needs recomputed on a card; None where it does not fit."""
    room = USABLE * card_gib * GIB
    return next((n for n in range(shape.blocks + 1) if shape.total(mode, batch, n) <= room), None)


def plan_text(shape: MemoryShape, cards_gib: Sequence[int] = CARDS_GIB, batch: int = 1) -> str:
    """The tables that the command prints. batch: of one backward pass, as the recipe has it."""
    lines = [
        f"{shape.base / 1e6:,.0f} M numbers in the network, {shape.added / 1e6:,.1f} M in added layers, "
        f"{shape.adapters / 1e6:,.1f} M in adapters of rank {shape.rank}",
        f"{shape.blocks} blocks, {shape.tokens:,} tokens of one sample",
        "",
        f"{'GiB without activations':<24}" + "".join(f"{kind:>12}" for kind in (*shape.static("full"), "sum")),
    ]
    for mode in MODES:
        parts = shape.static(mode)
        lines.append(f"{mode:<24}" + "".join(f"{v / GIB:>12.2f}" for v in (*parts.values(), sum(parts.values()))))
    one = [shape.activations("full", 1, n) / GIB for n in (0, shape.blocks)]
    lines += [
        "",
        f"activations of one sample: {one[0]:.2f} GiB, with every block recomputed {one[1]:.2f} GiB",
        "",
        f"{'card':<8}{'training':<18}{'largest batch':>14}{'recomputed':>12}{'GiB':>7}{'none recomputed':>17}"
        f"{f'recomputed at batch {batch}':>26}",
    ]
    for card in cards_gib:
        for mode in MODES:
            found, least = fit(shape, mode, card), least_recomputed(shape, mode, card, batch)
            here = "does not fit" if least is None else f"{least} of {shape.blocks}"
            most = f"{found.recomputed} of {shape.blocks}" if found.batch else ""
            cells = f"{found.batch or 'none':>14}{most:>12}{found.bytes / GIB:>7.1f}{found.plain or 'none':>17}"
            lines.append(f"{f'{card} GB':<8}{mode:<18}{cells}{here:>26}")
    return "\n".join(lines)


def plan(config: TrainConfig, cards_gib: Sequence[int] | None = None) -> str:
    """The plan of a config, for the usual cards when none are named. Raises TriptychError for a task without one."""
    task = build_task(config)
    if hasattr(task, "memory_plan"):  # a task with tables of its own
        return task.memory_plan(cards_gib, config.batch_size // config.accumulation)
    cards_gib = cards_gib or CARDS_GIB
    if not hasattr(task, "memory_shape"):
        raise TriptychError(f"the task {config.task} has no memory plan: only flows of the published shape have one")
    if any(card < 1 for card in cards_gib):
        raise TriptychError(f"--gpu must be 1 or more GB, got {min(cards_gib)}")
    return plan_text(task.memory_shape(), cards_gib, config.batch_size // config.accumulation)
