"""Batches of samples of very different sizes, dealt out by what they cost.

A task with ``cost(index) -> int`` (voxels, tokens) and a config with ``max_cost`` get these instead of the plain order:

- every step has ``batch_size`` samples as always, but an epoch is dealt so that all steps cost about the same: the
  samples, sorted by cost, are cut into as many strata as a batch has places, and each batch takes one of each at
  random. So two full batches of an epoch differ by no more than the dearest sample differs from the cheapest.
- a step's samples go to the processes, and there to backward passes, by cost: the dearest first, each to where least
  is. There are ``accumulation`` backward passes, and more where one of them would cost above ``max_cost``.

An epoch's deal depends on (seed, costs, batch_size) alone, so neither processes nor interruptions change which sample
comes when; every sample comes once an epoch. Backward passes then differ in samples; their losses are weighted by it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.config import TrainConfig
from trainer.order import BatchOrder, Part, SampleOrder
from triptych.errors import TriptychError


class BalancedOrder(SampleOrder):
    """SampleOrder whose steps of ``batch_size`` samples cost about the same; costs (size,) int, each at least 1."""

    def __init__(self, costs: np.ndarray, seed: int, batch_size: int) -> None:
        super().__init__(len(costs), seed)
        self.costs = costs
        self.batch_size = batch_size
        self._ascending = np.argsort(costs, kind="stable")

    def cost(self, g: int) -> int:
        """What sample ``g`` costs."""
        return int(self.costs[self.index(g)])

    def arrange(self, epoch: int, generator: np.random.Generator) -> np.ndarray:
        # A step may take its first samples from the epoch before: `head` of this one's complete such a step.
        head = min(-epoch * self.size % self.batch_size, self.size)
        full = (self.size - head) // self.batch_size
        loose = self.size - full * self.batch_size
        # Samples of unfinished steps: at even distances in the order of costs, so that they cost what others do.
        places = ((np.arange(loose) + generator.random()) * (self.size / max(loose, 1))).astype(np.int64)
        picked = generator.permutation(self._ascending[places])
        rest = np.delete(self._ascending, places).reshape(self.batch_size, full)
        steps = generator.permuted(rest, axis=1).T.reshape(-1)
        return np.concatenate([picked[:head], steps, picked[head:]])


class BalancedBatchOrder(BatchOrder):
    """BatchOrder that divides a step by cost; no backward pass costs more than ``config.max_cost``."""

    order: BalancedOrder

    def __init__(
        self, order: BalancedOrder, config: TrainConfig, first_step: int, process: int, processes: int
    ) -> None:
        super().__init__(order, config, first_step, process, processes)
        self.process = process
        self.processes = processes

    def first_sample(self, step: int, part: int) -> int:
        return self.parts(step)[part].samples[0]

    def parts(self, step: int) -> list[Part]:
        size, limit = self.config.batch_size, self.config.max_cost
        numbers = range(step * size, step * size + size)
        costs = [self.order.cost(g) for g in numbers]
        mine = even_groups(costs, self.processes)[self.process]
        own = [costs[i] for i in mine]
        groups = bounded_groups(own, limit, self.config.accumulation)
        return [
            Part(
                samples=[numbers[mine[i]] for i in group],
                share=len(group) * self.processes / size,
                cost=sum(own[i] for i in group),
            )
            for group in groups
        ]


def batch_order(task: Any, config: TrainConfig, first_step: int, process: int, processes: int) -> BatchOrder:
    """The batches of a process: balanced where the config has a max_cost, else in the plain order."""
    if not config.max_cost:
        return BatchOrder(SampleOrder(task.size(), config.seed), config, first_step, process, processes)
    order = BalancedOrder(task_costs(task, config), config.seed, config.batch_size)
    return BalancedBatchOrder(order, config, first_step, process, processes)


def task_costs(task: Any, config: TrainConfig) -> np.ndarray:
    """(size,) int64 of ``task.cost``. TriptychError where the task has none, or a sample costs above max_cost."""
    if not hasattr(task, "cost"):
        raise TriptychError(
            f"config: max_cost is {config.max_cost}, but the task {config.task} has no costs: set it to 0"
        )
    costs = np.fromiter((max(1, int(task.cost(i))) for i in range(task.size())), dtype=np.int64, count=task.size())
    if len(costs) and costs.max() > config.max_cost:
        index = int(costs.argmax())
        raise TriptychError(
            f"sample {index} costs {costs[index]:,}, one backward pass may cost {config.max_cost:,}: raise max_cost, "
            "or limit the samples (max_voxels of the task)"
        )
    return costs


def even_groups(costs: Sequence[int], count: int) -> list[list[int]]:
    """Places of ``costs`` in ``count`` groups of about the same sum, ascending in each: the dearest first, each to the
    group that costs least. With at least ``count`` places none is empty."""
    heap = [(0, 0, group) for group in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, members, group = heapq.heappop(heap)
        groups[group].append(place)
        heapq.heappush(heap, (total + costs[place], members + 1, group))
    return [sorted(group) for group in groups]


def bounded_groups(costs: Sequence[int], limit: int, at_least: int) -> list[list[int]]:
    """The fewest even groups, ``at_least`` where there are as many places, none of which costs above ``limit``.

    Each cost is at most ``limit``.
    """
    count = max(min(at_least, len(costs)), -(-sum(costs) // limit))
    while True:
        groups = even_groups(costs, count)
        if all(sum(costs[i] for i in group) <= limit for group in groups):
            return groups
        count += 1
