"""Stages that load, run and leave memory one after another, and the most that each of them took.

On CUDA the measure is torch's own peak of allocated bytes. On a CPU it is the resident set of the whole process, looked
at every few milliseconds while the stage runs (a shorter spike is missed); where the system tells neither, the bytes of
the weights stand in, and say so.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import TriptychError

GIB = 1 << 30
_LOOK_EVERY_S = 0.02


@dataclass(frozen=True)
class StageMemory:
    """The most memory that a stage took. measure: "allocated" on a GPU, "resident" in the process, or "weights" alone.
    weights: bytes of the stage's network, 0 without one."""

    stage: str
    bytes: int
    weights: int
    measure: str


class Stages:
    """Runs stages on a device. `memory` holds a row for each that has ended.

    keep_loaded: networks stay on the device after their stage.
    """

    def __init__(self, device: torch.device | str, *, keep_loaded: bool = False) -> None:
        self.device = torch.device(device)
        self.keep_loaded = keep_loaded
        self.memory: list[StageMemory] = []

    @contextmanager
    def run(
        self,
        name: str,
        load: Callable[[], nn.Module] | None = None,
        release: Callable[[], None] | None = None,
    ) -> Iterator[Any]:
        """Loads the stage's network (None without one), gives it on the device, and lets go of it at the end.

        release: drops what `load` keeps for later calls; it is called unless networks stay loaded.
        Raises TriptychError when the device's memory runs out.
        """
        meter = _Meter(self.device)
        weights = 0
        network: nn.Module | None = None
        try:
            with meter:
                if load is not None:
                    network = load().to(self.device)
                    weights = network_bytes(network)
                yield network
        except torch.cuda.OutOfMemoryError as error:
            raise TriptychError(
                f"the stage {name!r} ran out of memory on {self.device} (its weights take {weights / GIB:.1f} GiB): "
                "use precision float16, 8-bit weights, fewer pictures or fewer voxels, or the device cpu"
            ) from error
        finally:
            if network is not None and release is not None and not self.keep_loaded:
                release()
            network = None
            if self.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        peak, measure = (meter.peak, meter.measure) if meter.peak else (weights, "weights")
        self.memory.append(StageMemory(name, peak, weights, measure))


def network_bytes(network: nn.Module) -> int:
    """Of all parameters and buffers; also of a network on the meta device."""
    tensors = chain(network.parameters(), network.buffers())
    return sum(_tensor_bytes(tensor) for tensor in tensors)


def memory_table(memory: Sequence[StageMemory]) -> str:
    """A line for each stage, in GiB."""
    width = max((len(row.stage) for row in memory), default=0)
    meanings = {"allocated": "allocated on the GPU", "resident": "in the process", "weights": "weights alone"}
    lines = [
        f"{row.stage:<{width}}  {row.bytes / GIB:6.2f} GiB {meanings[row.measure]}"
        + (f", {row.weights / GIB:.2f} GiB of it weights" if row.weights and row.measure != "weights" else "")
        for row in memory
    ]
    return "\n".join(lines)


class _Meter:
    """The peak of a `with` block; 0 where it cannot be measured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        self.measure = "allocated" if device.type == "cuda" else "resident"
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> _Meter:
        if self.measure == "allocated":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif resident_bytes():
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.measure == "allocated":
            torch.cuda.synchronize(self.device)
            self.peak = int(torch.cuda.max_memory_allocated(self.device))
        elif self._watcher is not None:
            self._ended.set()
            self._watcher.join()
            self.peak = max(self.peak, resident_bytes())

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, resident_bytes())
            if self._ended.wait(_LOOK_EVERY_S):
                return


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where neither the system nor psutil tells."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    try:
        import psutil
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """Also of a quantised weight, whose own dtype is the one it stands for."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
