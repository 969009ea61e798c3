"""Which sample comes when: a function of (seed, global sample number) and nothing else.

The samples of a run are numbered ``g = 0, 1, 2, ...``; optimizer step ``s`` of batch size ``B`` uses ``[sB, sB + B)``,
and each process takes its contiguous share. Sample ``g`` is object ``permutation(epoch, seed)[g mod size]`` with epoch
``g // size``, drawn with a seed hashed from (seed, g). Processes, workers, accumulation and interruptions change who
computes a sample, never which sample it is.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from trainer.config import TrainConfig
from trainer.task import Task
from triptych.errors import TriptychError


def stream_seed(seed: int, stream: str, number: int) -> int:
    """A 63-bit seed for one use (``stream``) of one number; different streams are independent."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Part(NamedTuple):
    """One backward pass of one process.

    samples: global sample numbers. share: of what the process computes in this step, by count; the shares of a step
    average to 1 / parts over the processes, so weighted means are means over the whole batch. cost: what it costs, in
    units of Task.cost where batches are balanced, else samples.
    """

    samples: Sequence[int]
    share: float
    cost: int


class SampleOrder:
    """Global sample number -> (object index, sample seed)."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise TriptychError("the task has no training samples: check its data folder and split")
        self.size = size
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def arrange(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        """The objects of an epoch in their order, (size,) int64."""
        return generator.permutation(self.size)

    def __call__(self, g: int) -> tuple[int, int]:
        return self.index(g), stream_seed(self.seed, "sample", g)

    def index(self, g: int) -> int:
        """The object of sample ``g``."""
        epoch, position = divmod(g, self.size)
        if epoch not in self._epochs:
            while len(self._epochs) > 1:  # the data processes run ahead, by less than an epoch
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self.arrange(epoch, np.random.default_rng(stream_seed(self.seed, "epoch", epoch)))
        return int(self._epochs[epoch][position])


def check_shares(config: TrainConfig, processes: int) -> None:
    """TriptychError where a batch cannot be dealt evenly to ``processes``; it names an accumulation that works."""
    size, parts = config.batch_size, config.accumulation
    if size % (processes * parts) == 0:
        return
    if fitting := _accumulation(size, processes, parts):
        remedy = f"--set accumulation={fitting}"
    else:
        larger = size + -size % processes
        remedy = (
            f"start a number of processes that divides {size}, or a new run with --set batch_size={larger} "
            f"--set accumulation={_accumulation(larger, processes, parts)}"
        )
    raise TriptychError(f"batch_size {size} cannot be shared by {processes} processes x accumulation {parts}: {remedy}")


def _accumulation(size: int, processes: int, most: int) -> int | None:
    """The largest accumulation up to ``most`` that a batch of ``size`` can have."""
    return next((count for count in range(most, 0, -1) if size % (processes * count) == 0), None)


class BatchOrder:
    """The batches of one process from optimizer step ``first_step`` on, in order: an iterable of lists of pairs."""

    def __init__(self, order: SampleOrder, config: TrainConfig, first_step: int, process: int, processes: int) -> None:
        check_shares(config, processes)
        self.order = order
        self.config = config
        self.first_step = first_step
        self.share = config.batch_size // processes
        self.offset = process * self.share
        self.size = self.share // config.accumulation

    def first_sample(self, step: int, part: int) -> int:
        """The global number of the first sample of backward pass ``part`` of ``step`` in this process."""
        return step * self.config.batch_size + self.offset + part * self.size

    def parts(self, step: int) -> list[Part]:
        """The backward passes of this process in one step, in order."""
        firsts = [self.first_sample(step, part) for part in range(self.config.accumulation)]
        return [Part(range(g, g + self.size), 1 / len(firsts), self.size) for g in firsts]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.first_step, self.config.steps):
            for part in self.parts(step):
                yield [self.order(g) for g in part.samples]


class _Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, torch.Tensor]:
        return self.task.sample(*pair)


@contextmanager
def batches(task: Task, order: BatchOrder, workers: int, device: torch.device) -> Iterator[Iterator[dict[str, Any]]]:
    """The collated batches of ``order`` on ``device``, made ahead of time in ``workers`` processes, or here with 0."""
    loader: Any = torch.utils.data.DataLoader(
        _Samples(task),
        batch_sampler=order,  # type: ignore[arg-type]  # any iterable of index lists will do
        collate_fn=task.collate,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    supply = _on_device(loader, device)
    try:
        yield supply
    finally:
        supply.close()  # ends the data processes


def _on_device(loader: Any, device: torch.device) -> Generator[dict[str, Any], None, None]:
    for batch in loader:
        yield {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }


def _leave_signals_to_the_trainer(worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer still needs its last batch.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
