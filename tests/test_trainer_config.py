"""Configs, overrides, recipes, the schedule, and the data order."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trainer_toy import ToyConfig, recipe
from trainer.config import TrainConfig, apply_overrides, config_from_dict, config_hash, config_to_dict, differing_keys
from trainer.loop import train
from trainer.optim import Ema, build_optimizer, learning_rate
from trainer.order import BatchOrder, SampleOrder, check_shares
from trainer.recipes import build_recipe
from triptych.errors import TriptychError

ROOT = Path(__file__).resolve().parent.parent


def test_json_round_trip_keeps_every_value_and_type() -> None:
    changes = ["task_config.options.shape=3,4,5", "task_config.options.label=a b", "init_from=weights/x.safetensors"]
    config = apply_overrides(recipe(), changes)
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert isinstance(again.task_config, ToyConfig) and again.task_config.options.shape == (3, 4, 5)
    assert config_hash(again) == config_hash(config) != config_hash(recipe())
    assert differing_keys(config_to_dict(recipe()), config_to_dict(config)) == [
        "init_from",
        "task_config.options.label",
        "task_config.options.shape",
    ]


@pytest.mark.parametrize(
    ("assignment", "read", "expected"),
    [
        ("steps=7", lambda c: c.steps, 7),
        ("lr=3e-4", lambda c: c.lr, 3e-4),
        ("lr=1", lambda c: c.lr, 1.0),
        ("betas=0.8,0.95", lambda c: c.betas, (0.8, 0.95)),
        ("betas=[0.8, 0.95]", lambda c: c.betas, (0.8, 0.95)),
        ("betas=(0.8, 0.95)", lambda c: c.betas, (0.8, 0.95)),
        ("tensorboard=True", lambda c: c.tensorboard, True),
        ("tensorboard=no", lambda c: c.tensorboard, False),
        ("schedule=wsd", lambda c: c.schedule, "wsd"),
        ("init_from=none", lambda c: c.init_from, None),
        ("init_from=a=b", lambda c: c.init_from, "a=b"),
        ("task_config.width=5", lambda c: c.task_config.width, 5),
        ("task_config.options.shape=()", lambda c: c.task_config.options.shape, ()),
        ("task_config.options.label=null", lambda c: c.task_config.options.label, None),
        ("task_config.options.scale=2", lambda c: c.task_config.options.scale, 2.0),
    ],
)
def test_override_parses_by_the_annotation(assignment, read, expected) -> None:
    value = read(apply_overrides(recipe(), [assignment]))
    assert value == expected and type(value) is type(expected)


def test_overrides_apply_together() -> None:
    """batch_size and accumulation must fit each other only in the end."""
    config = apply_overrides(recipe(), ["accumulation=3", "batch_size=9", "task_config.noise=0", "task_config.width=4"])
    assert (config.accumulation, config.batch_size) == (3, 9)
    assert config.task_config == ToyConfig(noise=0.0, width=4)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=7", "unknown key, did you mean 'steps'"),
        ("task_config.witdh=7", "task_config.witdh: unknown key, did you mean 'width'"),
        ("task_config.options.shap=7", "did you mean 'shape'"),
        ("steps=7.5", "steps='7.5': expected an integer"),
        ("lr=fast", "lr='fast': expected a number"),
        ("lr=nan", "lr must be positive and finite, got nan"),
        ("tensorboard=maybe", "expected true or false"),
        ("schedule=linear", "must be one of constant, cosine, wsd"),
        ("betas=0.9", "expected 2 values, got 1"),
        ("steps", "expected key=value"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("ema_decay=1.5", r"ema_decay must lie in \[0, 1\], got 1.5"),
        ("accumulation=3", "batch_size 8 is not a multiple of accumulation 3"),
        ("lr.x=1", "lr has no fields"),
        ("task_config.options=1", "set its fields, as in --set task_config.options.scale"),
        ("name=../up", "name must be a plain folder name"),
        ("task=other:Task", "a recipe's task is fixed"),
    ],
)
def test_wrong_override_is_one_sentence(assignment, message) -> None:
    with pytest.raises(TriptychError, match=message) as caught:
        apply_overrides(recipe(), [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"setps": 1}, "unknown key 'setps', did you mean 'steps'"),
        ({"steps": "60"}, "steps must be int, got '60'"),
        ({"steps": True}, "steps must be int, got True"),
        ({"steps": 6.0}, "steps must be int, got 6.0"),
        ({"tensorboard": 1}, "tensorboard must be bool, got 1"),
        ({"task_config": {"width": 3, "wide": 1}}, "unknown key 'task_config.wide'"),
        ({"betas": [0.9, 0.9, 0.9]}, "betas: expected 2 values, got 3"),
        ({"task": 3}, "'task' is missing or not a string"),
        ({"task": "structure_vea"}, "no task is called 'structure_vea'"),
        ({"task": "tests.trainer_toy:ToyTsk"}, "has no 'ToyTsk': did you mean 'ToyTask'"),
        ({"task": "nowhere.toy:Task"}, "no module 'nowhere'"),
    ],
)
def test_damaged_json_is_refused(change, message) -> None:
    with pytest.raises(TriptychError, match=message):
        config_from_dict(config_to_dict(recipe()) | change)


def test_missing_required_key_is_refused_and_a_default_is_filled() -> None:
    data = config_to_dict(recipe())
    del data["tensorboard"]
    assert config_from_dict(data).tensorboard is True
    del data["lr"]
    with pytest.raises(TriptychError, match="missing lr"):
        config_from_dict(data)


def test_recipes_are_found_by_import_path_and_wrong_names_are_explained() -> None:
    assert build_recipe("tests.trainer_toy:recipe") == recipe()
    with pytest.raises(TriptychError, match="did you mean 'recipe'"):
        build_recipe("tests.trainer_toy:recipee")
    with pytest.raises(TriptychError, match="no recipe is called 'nothing_like_it'"):
        build_recipe("nothing_like_it")
    with pytest.raises(TriptychError, match="returned ToyConfig"):
        build_recipe("tests.trainer_toy:ToyConfig")


def _rates(**changes) -> list[float]:
    config = dataclasses.replace(recipe(), lr=1.0, steps=100, warmup_steps=10, **changes)
    return [learning_rate(step, config) for step in range(100)]


def test_schedules_warm_up_stay_and_decay() -> None:
    for schedule in ("constant", "cosine", "wsd"):
        rates = _rates(schedule=schedule)
        assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(_rates(schedule="constant")[10:]) == {1.0}
    cosine = _rates(schedule="cosine", min_lr_ratio=0.1)
    assert cosine[10] == 1.0 and cosine[55] == pytest.approx(0.55)
    assert all(a > b for a, b in zip(cosine[10:], cosine[11:], strict=False))
    assert 0.1 < cosine[-1] < 0.101
    wsd = _rates(schedule="wsd", decay_share=0.2)
    assert set(wsd[10:81]) == {1.0} and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)


def test_ema_follows_at_once_and_then_slowly() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
    ema = Ema(model, limit=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update(step=0)  # decay 1/10
    assert ema.tensors["weight"].item() == pytest.approx(0.9)
    ema.update(step=1000)  # decay: the limit
    assert ema.tensors["weight"].item() == pytest.approx(0.95)
    with ema.in_place_of_weights():
        assert model.weight.item() == pytest.approx(0.95)
    assert model.weight.item() == 1.0


def test_weight_decay_spares_biases() -> None:
    groups = build_optimizer(torch.nn.Linear(3, 2), dataclasses.replace(recipe(), weight_decay=0.1)).param_groups
    assert {(g["params"][0].ndim, g["weight_decay"]) for g in groups} == {(2, 0.1), (1, 0.0)}


def test_every_epoch_sees_every_object_once_in_another_order() -> None:
    order = SampleOrder(size=37, seed=5)
    first, second = ([order(g)[0] for g in range(start, start + 37)] for start in (0, 37))
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second
    assert len({order(g)[1] for g in range(500)}) == 500
    assert [SampleOrder(37, 6)(g) for g in range(37)] != [SampleOrder(37, 5)(g) for g in range(37)]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 2)])
def test_the_global_batch_does_not_depend_on_who_computes_it(processes, accumulation) -> None:
    config = dataclasses.replace(recipe(), accumulation=accumulation, steps=9)
    first_step = 3
    shares = [list(BatchOrder(SampleOrder(50, 0), config, first_step, p, processes)) for p in range(processes)]
    assert {len(share) for share in shares} == {(9 - first_step) * accumulation}
    expected = SampleOrder(50, 0)
    for step in range(first_step, 9):
        parts = slice((step - first_step) * accumulation, (step - first_step + 1) * accumulation)
        together = [pair for share in shares for batch in share[parts] for pair in batch]
        assert together == [expected(g) for g in range(step * 8, step * 8 + 8)]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(TriptychError, match="divides 8, or a new run with --set batch_size=9 --set accumulation=1"):
        BatchOrder(SampleOrder(50, 0), recipe(), 0, 0, 3)
    config = replace(recipe(), accumulation=8)
    with pytest.raises(TriptychError, match="batch_size 8 cannot be shared by 2 processes x accumulation 8: --set acc"):
        check_shares(config, 2)
    for processes, accumulation in ((1, 8), (2, 4), (4, 2), (8, 1)):
        check_shares(replace(config, accumulation=accumulation), processes)
        if processes > 1:
            with pytest.raises(TriptychError, match=f"--set accumulation={accumulation}$"):
                check_shares(config, processes)


def test_processes_that_cannot_share_a_batch_are_refused_before_anything_is_loaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trainer.loop.make_accelerator", lambda device: SimpleNamespace(num_processes=2))
    with pytest.raises(TriptychError, match="--set accumulation=4"):
        train(build_recipe("flux2_klein_4b_lora"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from trainer.__main__ import _parser; _parser([]).format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_default_config_is_complete() -> None:
    """A recipe needs only the fields that have no sensible default."""
    config = TrainConfig("a", "tests.trainer_toy:ToyTask", ToyConfig(), steps=1, batch_size=1, lr=1e-3)
    assert config_from_dict(config_to_dict(config)) == config
