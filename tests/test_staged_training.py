"""Parameter groups: rates by name, thawing later, and the same bytes after an interruption."""

import dataclasses
import shutil

import pytest
import torch

from tests.trainer_toy import recipe
from trainer.checkpoint import find_checkpoint
from trainer.config import ParameterGroup, TrainConfig, apply_overrides, config_from_dict, config_to_dict
from trainer.loop import train
from trainer.optim import build_optimizer, frozen_groups, set_learning_rate, trainable
from triptych.errors import TriptychError


def _config(*groups: ParameterGroup, **changes) -> TrainConfig:
    return dataclasses.replace(recipe(), groups=groups, **changes)


def _model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def test_groups_survive_json_and_are_set_by_json() -> None:
    config = _config(ParameterGroup("0.*", 0.1, thaw_step=7, warmup_steps=3, weight_decay=0.5), ParameterGroup("2.*"))
    assert config_from_dict(config_to_dict(config)) == config
    given = 'groups=[{"match": "0.*", "lr_factor": 0.1, "thaw_step": 7, "warmup_steps": 3, "weight_decay": 0.5},'
    assert apply_overrides(recipe(), [given + ' {"match": "2.*"}]']) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"match": "a", "lr": 1}]', "unknown key 'groups[0].lr', known: lr_factor"),
        ('[{"match": "a", "thaw_step": 1.5}]', "groups[0].thaw_step must be int, got 1.5"),
        ('[{"match": "a", "lr_factor": 0}]', "lr_factor of the group 'a' must be above 0, got 0.0"),
        ('[{"match": ""}]', "needs a pattern"),
        ('[{"match": "a", "thaw_step": -2}]', "needs thaw_step >= -1"),
        ('[{"lr_factor": 2}]', "missing groups[0].match"),
    ],
)
def test_wrong_groups_are_one_sentence(text, message) -> None:
    with pytest.raises(TriptychError) as caught:
        apply_overrides(recipe(), [f"groups={text}"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_rates_follow_name_thaw_and_warm_up() -> None:
    model = _model()
    rules = ParameterGroup("0.*", 0.5, thaw_step=10, warmup_steps=4), ParameterGroup("*.bias", 3.0, weight_decay=0.7)
    optimizer = build_optimizer(model, _config(*rules, weight_decay=0.1))
    by_name = {
        name: next(g for g in optimizer.param_groups if any(p is q for q in g["params"]))
        for name, p in trainable(model).items()
    }
    for step, expected in ((0, 0.0), (10, 0.125), (12, 0.375), (13, 0.5), (99, 0.5)):
        set_learning_rate(optimizer, 1.0, step)
        assert {name: group["lr"] for name, group in by_name.items()} == {
            "0.weight": expected, "0.bias": expected, "2.weight": 1.0, "2.bias": 3.0,
        }  # fmt: skip
    assert {name: group["weight_decay"] for name, group in by_name.items()} == {
        "0.weight": 0.1, "0.bias": 0.0, "2.weight": 0.1, "2.bias": 0.0,
    }  # fmt: skip


def test_frozen_parameters_get_no_gradient_and_are_trainable_again() -> None:
    model = _model()
    optimizer = build_optimizer(model, _config(ParameterGroup("0.*", thaw_step=2)))
    for step, expected in ((1, {"2.weight", "2.bias"}), (2, set(trainable(model)))):
        with frozen_groups(optimizer, step):
            model(torch.ones(1, 3)).sum().backward()
        assert {name for name, p in trainable(model).items() if p.grad is not None} == expected
        optimizer.zero_grad(set_to_none=True)
    assert len(trainable(model)) == 4


def test_groups_that_fit_nothing_are_refused() -> None:
    with pytest.raises(TriptychError, match=r"the group 'encoder.\*' matches no trainable parameter"):
        build_optimizer(_model(), _config(ParameterGroup("encoder.*")))
    with pytest.raises(TriptychError, match=r"the group '0.weight' matches no trainable parameter that no earlier"):
        build_optimizer(_model(), _config(ParameterGroup("0.*"), ParameterGroup("0.weight")))
    with pytest.raises(TriptychError, match="freeze every parameter at step 0"):
        build_optimizer(_model(), _config(ParameterGroup("*", thaw_step=5)))


def test_a_staged_run_is_frozen_then_learns_and_resumes_exactly(tmp_path, capsys) -> None:
    rule = ParameterGroup("0.*", 0.3, thaw_step=15, warmup_steps=6)
    config = _config(rule, steps=28, keep_checkpoints=9, validate_every=0)
    config = dataclasses.replace(config, task_config=dataclasses.replace(config.task_config, dropout=0.1))
    train(config, tmp_path / "run", device="cpu")
    checkpoints = tmp_path / "run" / "checkpoints"
    at = {step: find_checkpoint(checkpoints, str(step)) for step in (7, 14, 21, 28)}
    weights = {step: checkpoint.tensors("model") for step, checkpoint in at.items()}
    for name in ("0.weight", "0.bias"):
        assert torch.equal(weights[7][name], weights[14][name])
        assert not torch.equal(weights[14][name], weights[21][name])
    assert not torch.equal(weights[7]["3.weight"], weights[14]["3.weight"])
    assert at[14].json("optimizer")["updates"] == {"3.weight": 14, "3.bias": 14}
    assert at[28].json("optimizer")["updates"] == {"0.weight": 13, "0.bias": 13, "3.weight": 28, "3.bias": 28}

    whole = {name: at[28].tensors(name) for name in ("model", "ema", "optimizer")}
    for resumed_at, removed in ((14, (21, 28)), (21, (28,))):  # while frozen, and while warming up
        for step in removed:
            shutil.rmtree(checkpoints / f"step_{step:07d}")
        capsys.readouterr()
        train(config, tmp_path / "run", device="cpu")
        assert f"at step {resumed_at} of 28" in capsys.readouterr().out
        again = find_checkpoint(checkpoints)
        for name, tensors in whole.items():
            found = again.tensors(name)
            assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)
