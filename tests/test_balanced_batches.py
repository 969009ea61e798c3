"""Batches dealt by cost: even, bounded, complete, and the same whoever computes them."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from tests.trainer_toy import ToyTask, recipe
from trainer.balance import BalancedBatchOrder, BalancedOrder, batch_order, bounded_groups, even_groups
from trainer.checkpoint import find_checkpoint
from trainer.config import TrainConfig
from trainer.loop import train
from trainer.order import BatchOrder, SampleOrder
from triptych.errors import TriptychError

SIZE, BATCH = 203, 16  # neither divides the other: steps run across epochs


def _costs(size: int = SIZE) -> np.ndarray:
    """Like voxel counts: a long tail over two orders of magnitude."""
    return np.random.default_rng(3).lognormal(8, 0.8, size).clip(300, 30_000).astype(np.int64)


def _config(**changes) -> TrainConfig:
    return dataclasses.replace(recipe(), batch_size=BATCH, max_cost=32_768, steps=40, **changes)


def _orders(processes: int, first_step: int = 0, **changes) -> list[BalancedBatchOrder]:
    config = _config(**changes)
    return [
        BalancedBatchOrder(BalancedOrder(_costs(), config.seed, BATCH), config, first_step, p, processes)
        for p in range(processes)
    ]


def test_every_sample_comes_once_an_epoch_in_another_deal() -> None:
    order = BalancedOrder(_costs(), 5, BATCH)
    epochs = [[order.index(g) for g in range(e * SIZE, (e + 1) * SIZE)] for e in range(3)]
    assert all(sorted(epoch) == list(range(SIZE)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    companions = [{frozenset(epoch[i : i + BATCH]) for i in range(0, SIZE - BATCH, BATCH)} for epoch in epochs[:1]]
    assert companions[0].isdisjoint(frozenset(epochs[1][i : i + BATCH]) for i in range(SIZE))


def test_full_steps_differ_by_less_than_the_range_of_costs() -> None:
    costs = _costs()
    balanced, naive = BalancedOrder(costs, 5, BATCH), SampleOrder(SIZE, 5)
    steps = [range(s * BATCH, s * BATCH + BATCH) for s in range(60)]
    within = [step for step in steps if step[0] // SIZE == step[-1] // SIZE]
    sums = [sum(balanced.cost(g) for g in step) for step in within]
    epoch = {step[0] // SIZE for step in within}
    for e in epoch:
        own = [total for step, total in zip(within, sums, strict=True) if step[0] // SIZE == e]
        assert max(own) - min(own) <= costs.max() - costs.min()
    plain = [sum(int(costs[naive.index(g)]) for g in step) for step in steps]
    everywhere = [sum(balanced.cost(g) for g in step) for step in steps]
    assert np.std(everywhere) < np.std(plain) / 2


def test_two_ranks_cost_the_same_where_the_plain_order_leaves_one_waiting() -> None:
    costs = _costs()
    shares = [[sum(part.cost for part in order.parts(step)) for step in range(40)] for order in _orders(2)]
    plain = [BatchOrder(SampleOrder(SIZE, 0), _config(), 0, p, 2) for p in range(2)]
    naive = [[sum(costs[i] for i, _ in batch) for batch in order] for order in plain]

    def waiting(a, b) -> float:
        """Share of the two ranks' time in which the cheaper one waits."""
        return float(np.abs(np.subtract(a, b)).sum() / (2 * np.maximum(a, b)).sum())

    assert waiting(*shares) < 0.01 < 0.08 < waiting(*naive)


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (2, 4), (4, 2)])
def test_who_computes_a_step_changes_no_sample_and_no_mean(processes, accumulation) -> None:
    orders = _orders(processes, accumulation=accumulation)
    for step in range(30):
        parts = [order.parts(step) for order in orders]
        assert all(part.cost <= 32_768 for own in parts for part in own)
        assert all(len(own) >= min(accumulation, sum(len(p.samples) for p in own)) for own in parts)
        numbers = sorted(g for own in parts for part in own for g in part.samples)
        assert numbers == list(range(step * BATCH, (step + 1) * BATCH))
        for own in parts:
            for part in own:
                assert part.share == pytest.approx(len(part.samples) * processes / BATCH)
                assert part.cost == sum(orders[0].order.cost(g) for g in part.samples)


def test_a_late_start_sees_what_the_whole_run_sees() -> None:
    whole, late = list(_orders(2)[1]), list(_orders(2, first_step=23)[1])
    assert late == whole[-len(late) :]
    assert sum(len(_orders(2)[1].parts(step)) for step in range(23, 40)) == len(late)


def test_groups_are_even_bounded_and_few() -> None:
    assert even_groups([7, 6, 5, 4, 3, 2], 2) == [[0, 3, 4], [1, 2, 5]]
    assert even_groups([1, 1, 1], 3) == [[0], [1], [2]]
    assert bounded_groups([5, 5, 5, 5], 10, 1) == [[0, 2], [1, 3]]
    assert bounded_groups([5, 5, 5, 5], 10, 4) == [[0], [1], [2], [3]]
    assert bounded_groups([5, 5], 100, 8) == [[0], [1]]
    assert len(bounded_groups([6, 6, 6], 10, 1)) == 3  # two would do by their sum


def test_costs_that_cannot_be_met_are_refused() -> None:
    task = SizedToyTask(dataclasses.replace(recipe().task_config, objects=20))
    with pytest.raises(TriptychError, match=r"sample 19 costs 2,000, one backward pass may cost 1,999"):
        batch_order(task, dataclasses.replace(recipe(), max_cost=1999), 0, 0, 1)
    with pytest.raises(TriptychError, match="has no costs: set it to 0"):
        batch_order(ToyTask(recipe().task_config), dataclasses.replace(recipe(), max_cost=9), 0, 0, 1)


class SizedToyTask(ToyTask):
    """The toy task, whose later objects cost more."""

    def cost(self, index: int) -> int:
        return 100 * (index + 1)


def test_an_interrupted_balanced_run_ends_with_the_same_bytes(tmp_path, capsys) -> None:
    config = dataclasses.replace(
        recipe(), task="tests.test_balanced_batches:SizedToyTask", max_cost=9000, accumulation=2, steps=24,
        keep_checkpoints=9, task_config=dataclasses.replace(recipe().task_config, dropout=0.1),
    )  # fmt: skip
    train(config, tmp_path / "run", device="cpu")
    checkpoints = tmp_path / "run" / "checkpoints"
    whole = find_checkpoint(checkpoints)
    before = {name: whole.tensors(name) for name in ("model", "ema", "optimizer")}
    for step in (20, 21, 24):  # as if the run had been cut off at step 14
        shutil.rmtree(checkpoints / f"step_{step:07d}", ignore_errors=True)
    capsys.readouterr()
    train(config, tmp_path / "run", device="cpu")
    assert "at step 14 of 24" in capsys.readouterr().out
    after = find_checkpoint(checkpoints)
    assert after.step == whole.step == 24
    for name, tensors in before.items():
        again = after.tensors(name)
        assert tensors.keys() == again.keys() and all(torch.equal(tensors[key], again[key]) for key in tensors)


def test_weighted_passes_are_the_mean_over_the_batch(tmp_path) -> None:
    """However a step is cut into passes, its gradient is that of the whole batch."""
    ends = []
    for limit in (100_000, 6000):
        config = dataclasses.replace(recipe(), task="tests.test_balanced_batches:SizedToyTask", max_cost=limit, steps=6)
        train(config, tmp_path / str(limit), device="cpu")
        ends.append(find_checkpoint(tmp_path / str(limit) / "checkpoints").tensors("model"))
    assert all(torch.allclose(ends[0][key], ends[1][key], rtol=1e-4, atol=1e-6) for key in ends[0])
