"""How much memory training takes: what a block's activations take, and a controller that recomputes few blocks.

A block that is kept holds its activations until the backward pass, a recomputed one only its input (triptych/models/
torso.py). The controller recomputes no more blocks than the batch at hand needs. Memory beyond what is in use before a
backward pass is taken to be ``a * cost * kept share + b``; a and b come from the peaks of passes so far. Without
CUDA nothing is measured: a is the analytic estimate below and the device is as large as the config says.

Numbers do not depend on it: a recomputed block computes the same again. So nothing of it is saved.

Where memory does run out, `explained` says what the run's config leaves to be done about it.

Not covered: fragmentation (leave some room: memory_target 0.75 to 0.9), and a first pass that already fails with every
block recomputed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.tasks import find_task
from triptych.errors import TriptychError
from triptych.models.blocks import MultiHeadRMSNorm, SelfAttention

GIB = 1 << 30
OPTIMIZER_BYTES = 20  # of a trainable number: weight, gradient, two moments and EMA, float32
_REMEMBERED = 64  # passes


class Meter(Protocol):
    """Memory of one device, in bytes."""

    def capacity(self) -> int: ...

    def in_use(self) -> int: ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int: ...


class CudaMeter:
    """What torch has allocated on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def capacity(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def in_use(self) -> int:
        return int(torch.cuda.memory_allocated(self.device))

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self.device))


class Recomputable:
    """One torso: its blocks, in the order in which recomputing them is worth it, and what each keeps."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.blocks: list[nn.Module] = module.torso_blocks() if hasattr(module, "torso_blocks") else list(module.blocks)
        self.bytes = [block_bytes(block, block_width(block)) for block in self.blocks]
        if not hasattr(module, "recompute_blocks"):  # all of its blocks, or none
            self.blocks, self.bytes = [module], [sum(self.bytes)]
        # Tokens of one unit of cost: a dense flow counts samples, a sparse network voxels.
        self.tokens = len(module.pos_emb) if isinstance(getattr(module, "pos_emb", None), torch.Tensor) else 1

    def recompute(self, count: int) -> None:
        if hasattr(self.module, "recompute_blocks"):
            self.module.recompute_blocks = count
        else:
            self.module.use_checkpoint = count > 0


def recomputables(model: nn.Module) -> list[Recomputable]:
    """The torsos of a model whose blocks can be recomputed, the largest first."""
    found = [Recomputable(m) for m in model.modules() if hasattr(m, "use_checkpoint") and _has_blocks(m)]
    return sorted(found, key=lambda torso: -sum(torso.bytes) * torso.tokens)


def _has_blocks(module: Any) -> bool:
    return hasattr(module, "torso_blocks") or isinstance(getattr(module, "blocks", None), nn.ModuleList)


class MemoryController:
    """Chooses how many blocks each backward pass recomputes. Pass cost: tokens or samples, in the same unit always."""

    def __init__(
        self, torsos: list[Recomputable], meter: Meter | None, capacity: int, static: int, target: float
    ) -> None:
        self.torsos = torsos
        self.meter = meter
        self.static = static  # without a meter: bytes beside activations
        self.limit = target * capacity
        weights = [(t, size * t.tokens) for t in torsos for size in t.bytes]
        self.total = float(sum(size for _, size in weights))  # bytes of one unit of cost with every block kept
        self.shares = [1.0]  # what is kept with 0, 1, 2 ... blocks recomputed
        for _, size in weights:
            self.shares.append(self.shares[-1] - size / self.total)
        self.shares[-1] = 0.0
        self.recomputed = len(weights)
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._reach = 0.0  # the largest cost * kept share so far

    def line(self) -> tuple[float, float]:
        """a and b. The line lies above every pass that is remembered; a is the estimate until two of them differ."""
        if self.meter is None:
            return self.total, 0.0
        if not self._seen:
            return 0.0, 0.0
        x, y = torch.tensor(self._seen, dtype=torch.float64).T
        spread = ((x - x.mean()) ** 2).sum()
        a = max(0.0, float(((x - x.mean()) * (y - y.mean())).sum() / spread)) if spread > 0 else self.total
        return a, max(0.0, float((y - a * x).max()))

    def choose(self, cost: int) -> int:
        """How many blocks the next pass recomputes."""
        a, b = self.line()
        room = self.limit - (self.meter.in_use() if self.meter else self.static)
        for count, share in enumerate(self.shares):
            known = self.meter is None or share == 0 or cost * share <= self._trusted(cost)
            if known and a * cost * share + b <= room:
                return count
        return len(self.shares) - 1

    def _trusted(self, cost: int) -> float:
        """How far the line is believed: twice as far as seen, and by one block at least once anything was seen."""
        return 2 * self._reach + cost * self.shares[-2] * 1.001 if self._seen else 0.0

    @contextmanager
    def watching(self, cost: int) -> Iterator[None]:
        """Around one forward and backward pass: sets the blocks, then learns from the peak."""
        self.recomputed = left = self.choose(cost)
        for torso in self.torsos:
            torso.recompute(min(left, len(torso.blocks)))
            left -= min(left, len(torso.blocks))
        if self.meter is None:
            yield
            return
        before = self.meter.in_use()
        self.meter.reset_peak()
        yield
        x = cost * self.shares[self.recomputed]
        self._seen.append((x, float(self.meter.peak() - before)))
        self._reach = max(self._reach, x)

    def report(self) -> dict[str, float]:
        """For the log."""
        return {"recomputed_blocks": self.recomputed}


class NoController:
    """Leaves recomputing to the model's own use_checkpoint."""

    @contextmanager
    def watching(self, cost: int) -> Iterator[None]:
        yield

    def report(self) -> dict[str, float]:
        return {}


def memory_controller(
    model: nn.Module, config: TrainConfig, device: torch.device, meter: Meter | None = None
) -> MemoryController | NoController:
    """The controller that the config asks for.

    Raises TriptychError where the model has no blocks to recompute, or the size of the device is unknown.
    """
    if not config.memory_target:
        return NoController()
    torsos = recomputables(model)
    if not torsos:
        raise TriptychError(f"config: task {config.task} has no blocks to recompute: set memory_target to 0")
    if meter is None and device.type == "cuda":
        meter = CudaMeter(device)
    if meter is None and not config.memory_gib:
        raise TriptychError(
            f"config: memory_target {config.memory_target} needs CUDA or a size of the device: set memory_gib"
        )
    capacity = int(config.memory_gib * GIB) if config.memory_gib else (meter.capacity() if meter else 0)
    return MemoryController(torsos, meter, capacity, static_bytes(model), config.memory_target)


# ---- analytic


def static_bytes(model: nn.Module) -> int:
    """Weights, gradients, AdamW's moments, EMA and buffers, without activations."""
    trained = sum(OPTIMIZER_BYTES * p.numel() for p in model.parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return trained + sum(t.numel() * t.element_size() for t in [*frozen, *model.buffers()])


def transformer_numbers(channels: int, mlp_ratio: float, *, cross: bool = True, qk_rms_norm: bool = False) -> float:
    """Numbers that one token of a transformer block keeps for the backward pass, norms' inputs not counted.

    Modulated and projected inputs, q k v, attention's and the gated outputs, and twice the MLP's width; with
    qk_rms_norm both q and k once more before and after the gain. Cross-attention adds its input, q and output.
    """
    return channels * (10 + 2 * mlp_ratio + (4 if qk_rms_norm else 0) + (3 if cross else 0))


def transformer_bytes(
    channels: int,
    mlp_ratio: float,
    *,
    cross: bool = True,
    qk_rms_norm: bool = False,
    low: bool = True,
    cpu: bool = False,
) -> float:
    """Bytes that one token of a block keeps. low: bfloat16 or float16 activations, whose norms keep float32 inputs
    except on CPUs."""
    norms = 3 if cross else 2
    width = 2 if low else 4
    inputs = norms * channels * (2 if low and cpu else 4)
    return width * transformer_numbers(channels, mlp_ratio, cross=cross, qk_rms_norm=qk_rms_norm) + inputs


def block_width(block: nn.Module) -> int:
    """Bytes of an activation: those of the block's own matrices."""
    return next((p.element_size() for p in block.parameters() if p.ndim >= 2 and p.is_floating_point()), 4)


def block_bytes(block: nn.Module, width: int) -> float:
    """Bytes that one token or voxel of any block keeps, from its layers: an estimate for blocks of unknown kind."""
    attention = next((m for m in block.modules() if isinstance(m, SelfAttention)), None)
    hidden = next((m for name, m in block.named_modules() if name.endswith("mlp.0") and isinstance(m, nn.Linear)), None)
    if attention is not None and hidden is not None:
        return transformer_bytes(
            hidden.in_features, hidden.out_features / hidden.in_features, cross=hasattr(block, "cross_attn"),
            qk_rms_norm=any(isinstance(m, MultiHeadRMSNorm) for m in attention.modules()), low=width < 4,
        )  # fmt: skip
    # An input and an output of each layer with a matrix; the norm before it and the nonlinearity after keep as much.
    matrices = [p for n, p in block.named_parameters() if p.ndim >= 2 and "emb_layers" not in n]  # those are by sample
    return float(width * sum(2 * (p.shape[0] + p.shape[-1]) for p in matrices))


# ---- when it runs out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return any(sign in str(error) for sign in ("DefaultCPUAllocator", "MPS backend out of memory"))


@contextmanager
def explained(config: TrainConfig, processes: int) -> Iterator[None]:
    """Running out of memory inside the block becomes a TriptychError with the remedies that are left to the run."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        size = config.batch_size // (processes * config.accumulation)
        raise TriptychError(
            f"out of memory with {size} sample{'s' * (size > 1)} at a time, what was saved before is intact: "
            + ", or ".join(remedies(config, processes))
        ) from error


def remedies(config: TrainConfig, processes: int) -> list[str]:
    """What a run without memory can still do: the cheapest first, always something."""
    found = []
    parts = range(config.accumulation + 1, config.batch_size + 1)
    if finer := next((n for n in parts if config.batch_size % (processes * n) == 0), None):
        found.append(f"--set accumulation={finer}")
    if config.max_cost:
        found.append(f"a max_cost below {config.max_cost}")
    of_task = getattr(find_task(config.task), "memory_remedies", None)
    return [*found, *(of_task(config.task_config) if of_task else ()), "close what else uses the memory"]
