"""The flow sampler: published trajectories, and the promises it makes to callers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_io import Fixture, read_fixture
from torch import Tensor

from triptych.errors import TriptychError
from triptych.models.structure_flow import SparseStructureFlowModel
from triptych.sampling.flow_euler import (
    Cancelled,
    cycle_conditions,
    flow_euler_sample,
    flow_times,
    multidiffusion,
)
from triptych.sampling.flow_matching import interpolate, logit_normal_times, predict_x_0, velocity
from triptych.sparse.tensor import SparseTensor


def load(path: Path) -> tuple[Fixture, SparseStructureFlowModel]:
    case = read_fixture(path)
    model = SparseStructureFlowModel(**case.config)
    model.load_state_dict(case.weights, strict=True)
    return case, model


def check_trajectory(case: Fixture, prefix: str, model_fn: Any, cond: Any) -> None:
    run = case.run
    result = flow_euler_sample(
        model_fn,
        case.inputs["noise"],
        steps=run["steps"],
        guidance=run["cfg_strength"],
        guidance_interval=tuple(run["cfg_interval"]),
        rescale_t=run["rescale_t"],
        sigma_min=run["sigma_min"],
        cond=cond,
        neg_cond=case.inputs["neg_cond"],
        keep_trajectory=True,
    )
    case.check(prefix + "samples", result.samples)
    for name in ("pred_x_t", "pred_x_0", "v"):
        case.check(prefix + name, torch.stack(getattr(result, name)))


def test_trajectory_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "03_ss_flow_sampling_a.safetensors")
    check_trajectory(case, "", model, case.inputs["cond"])


def test_several_images_match_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "10_multi_image_a.safetensors")
    views = list(case.inputs["cond"].split(1))
    check_trajectory(case, "stochastic/", model, cycle_conditions(views))
    check_trajectory(case, "multidiffusion/", multidiffusion(model), views)


class Recorder:
    """A model with velocity x - cond that remembers when it was asked, and with which condition."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, Any]] = []

    def __call__(self, x: Any, t: Tensor, cond: Any) -> Any:
        self.calls.append((float(t[0]) / 1000, cond))
        return x - (cond if isinstance(cond, Tensor) else 0.0)


def test_times_are_rescaled_and_end_at_zero() -> None:
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow_times(2, rescale_t=3.0) == [1.0, 0.75, 0.0]


def test_one_step_jumps_to_the_predicted_data() -> None:
    noise = torch.randn(2, 3)
    model = Recorder()
    result = flow_euler_sample(model, noise, steps=1, cond=torch.full((1, 3), 0.25), sigma_min=0.0)
    torch.testing.assert_close(result.samples, torch.full((2, 3), 0.25))
    assert [t for t, _ in model.calls] == [1.0]
    assert result.pred_x_t == result.pred_x_0 == result.v == []


def test_without_guidance_each_step_costs_one_evaluation() -> None:
    model = Recorder()
    flow_euler_sample(model, torch.randn(1, 3), steps=5, cond=torch.zeros(1, 3), neg_cond=torch.ones(1, 3))
    assert len(model.calls) == 5


def test_guidance_acts_inside_the_interval_with_both_ends() -> None:
    model = Recorder()
    cond, neg_cond = torch.zeros(1, 3), torch.ones(1, 3)
    flow_euler_sample(
        model, torch.randn(1, 3), steps=4, guidance=2.0, guidance_interval=(0.5, 0.75), cond=cond, neg_cond=neg_cond
    )
    asked = [(t, "neg" if given.sum() else "cond") for t, given in model.calls]
    assert asked == [(1.0, "cond"), (0.75, "cond"), (0.75, "neg"), (0.5, "cond"), (0.5, "neg"), (0.25, "cond")]


def test_guidance_formula() -> None:
    noise, cond, neg_cond = torch.randn(1, 3), torch.randn(1, 3), torch.randn(1, 3)
    result = flow_euler_sample(
        Recorder(), noise, steps=2, guidance=3.0, cond=cond, neg_cond=neg_cond, keep_trajectory=True
    )
    torch.testing.assert_close(result.v[0], 4 * (noise - cond) - 3 * (noise - neg_cond))
    assert result.samples is result.pred_x_t[-1]


def test_progress_and_cancel() -> None:
    seen: list[tuple[int, int]] = []
    noise = torch.randn(1, 3)
    with pytest.raises(Cancelled, match="before step 3 of 5"):
        flow_euler_sample(
            Recorder(), noise, steps=5, callback=lambda i, n, _: seen.append((i, n)), cancel=lambda: len(seen) == 2
        )
    assert seen == [(1, 5), (2, 5)]


def test_sparse_tensors_are_sampled_like_dense_ones() -> None:
    coords = torch.tensor([[0, 0, 0, 1], [0, 3, 2, 1], [1, 1, 1, 1]], dtype=torch.int32)
    feats = torch.randn(3, 4)

    def shrink(x: Any, t: Tensor, cond: Any) -> Any:
        assert t.shape == (2,) if isinstance(x, SparseTensor) else (3,)
        return x * 0.5

    sparse = flow_euler_sample(shrink, SparseTensor(feats, coords), steps=3, guidance=2.0, neg_cond=object())
    dense = flow_euler_sample(shrink, feats, steps=3, guidance=2.0, neg_cond=object())
    assert torch.equal(sparse.samples.feats, dense.samples)
    assert sparse.samples.coords is coords


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(steps=0), "steps is 0"),
        (dict(steps=2, rescale_t=0.0), "rescale_t is 0.0"),
        (dict(steps=2, guidance=1.0), "needs neg_cond"),
        (dict(steps=2, guidance_interval=(0.9, 0.1)), "guidance_interval"),
        (dict(steps=2, cond=torch.zeros(3, 4)), "3 samples for 2 noises"),
        (dict(steps=2, cond=[]), "list of conditions is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(TriptychError, match=words):
        flow_euler_sample(Recorder(), torch.randn(2, 4), **settings)


def test_the_training_path_leads_from_data_to_noise() -> None:
    x_0, noise, t = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.linspace(0, 1, 5)
    x_t = interpolate(x_0, noise, t)
    torch.testing.assert_close(x_t[-1], noise[-1])
    torch.testing.assert_close(x_t[0], x_0[0] + 1e-5 * noise[0])
    torch.testing.assert_close(predict_x_0(x_t, t, velocity(x_0, noise)), x_0, atol=1e-5, rtol=0)
    h = torch.tensor(1e-3, dtype=torch.float64)
    slope = (interpolate(x_0.double(), noise.double(), t + h) - interpolate(x_0.double(), noise.double(), t)) / h
    torch.testing.assert_close(slope, velocity(x_0.double(), noise.double()), atol=1e-3, rtol=0)


def test_the_sampler_inverts_the_training_path() -> None:
    """With the true velocity, Euler steps of any number land on the data, because the path is a straight line."""
    x_0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    result = flow_euler_sample(lambda x, t, c: velocity(x_0, noise), noise, steps=7, rescale_t=3.0)
    torch.testing.assert_close(result.samples, x_0 + 1e-5 * noise, atol=1e-12, rtol=0)


def test_logit_normal_times() -> None:
    draws = torch.tensor([0.0, -1.0, 2.0])
    torch.testing.assert_close(torch.logit(logit_normal_times(draws, mean=0.5, std=2.0)), 0.5 + 2.0 * draws)
