"""Parameter groups: rates by name, thawing later, and the same bytes after an interruption."""

import dataclasses
import shutil

import pytest
import torch
from test_slat_tasks import SMALL, write_boxes

from tests.trainer_toy import recipe
from trainer.checkpoint import find_checkpoint
from trainer.config import ParameterGroup, TrainConfig, apply_overrides, config_from_dict, config_to_dict
from trainer.logs import read_log
from trainer.loop import export, train
from trainer.losses import scheduled
from trainer.optim import build_optimizer, frozen_groups, set_learning_rate, trainable
from trainer.recipes_slat import mesh_decoder_staged, slat_flow_staged, slat_vae_learned
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


# ---- the shipped staged recipes, a fiftieth as long


def _shrunk(config: TrainConfig, data, scale: int = 50, **changes) -> TrainConfig:
    """The recipe with every step of its stages divided by ``scale``, on small networks."""
    losses = config.task_config.losses
    schedules = {name: [(step // scale, value) for step, value in points] for name, points in losses.schedules.items()}
    sizes = SMALL if hasattr(config.task_config, "encoder_channels") else {"max_voxels": 300, "points": 256}
    task = dataclasses.replace(
        config.task_config, data=str(data), losses=dataclasses.replace(losses, schedules=schedules), **(sizes | changes)
    )
    groups = tuple(
        dataclasses.replace(g, thaw_step=g.thaw_step if g.thaw_step < 0 else g.thaw_step // scale, warmup_steps=2)
        for g in config.groups
    )
    return dataclasses.replace(
        config, task_config=task, groups=groups, batch_size=1, warmup_steps=0, precision="fp32", checkpoint_every=1,
        keep_checkpoints=99, validate_every=0, pictures_every=0, tensorboard=False, log_every=1,
    )  # fmt: skip


def _weights(run, step: int) -> dict[str, torch.Tensor]:
    return find_checkpoint(run / "checkpoints", str(step)).tensors("model")


def _resumes_exactly(config: TrainConfig, run, steps) -> None:
    """Interrupted after any of ``steps`` it ends with the same bytes."""
    kinds = ("model", "ema", "optimizer")
    whole = {kind: find_checkpoint(run / "checkpoints", str(config.steps)).tensors(kind) for kind in kinds}
    for kept in steps:
        for step in range(kept + 1, config.steps + 1):
            shutil.rmtree(run / "checkpoints" / f"step_{step:07d}")
        train(config, run, device="cpu")
        for kind, tensors in whole.items():
            found = find_checkpoint(run / "checkpoints", str(config.steps)).tensors(kind)
            assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in found)


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory):
    """slat_vae_learned: the encoder thaws at step 2, colours come in from 6 to 12."""
    root = tmp_path_factory.mktemp("staged")
    (root / "data").mkdir()
    config = dataclasses.replace(_shrunk(slat_vae_learned(), write_boxes(root / "data")), steps=14)
    train(config, root / "run", device="cpu")
    return root, config


def test_learned_weights_in_stages(learned_run) -> None:
    root, config = learned_run
    before, thawed, end = (_weights(root / "run", step) for step in (1, 4, 14))
    encoder = [name for name in end if name.startswith("encoder.") and "blocks" in name and name.endswith("weight")]
    second = _weights(root / "run", 2)
    assert encoder and all(torch.equal(before[name], second[name]) for name in encoder)
    assert not any(torch.equal(second[name], thawed[name]) for name in encoder)
    spread = {name.rpartition(".")[2]: end[name] for name in end if "log_variance" in name}
    assert spread.keys() == {"sdf", "surface", "point_color", "point_normal"}
    # A weight of 0 leaves its uncertainty where it was; all have moved in the end.
    assert _weights(root / "run", 6)["loss_weights.log_variance.point_color"] == 0 != spread["point_color"]
    assert all(value != 0 for value in spread.values())
    assert scheduled(config.task_config.losses.schedules["point_color"], 9) == 0.5
    # Kendall et al.: it moves towards the loss's own size, small losses get the larger weight.
    assert spread["point_normal"] < 0


def test_a_learned_run_resumes_exactly_in_every_stage(learned_run) -> None:
    root, config = learned_run
    _resumes_exactly(config, root / "run", (1, 8))  # the encoder frozen; colours half in


def test_a_staged_decoder_thaws_and_resumes_exactly(learned_run, tmp_path) -> None:
    root, vae = learned_run
    export(root / "run", tmp_path / "vae", device="cpu")
    config = _shrunk(mesh_decoder_staged(), vae.task_config.data, encoder=str(tmp_path / "vae"))
    config = dataclasses.replace(config, steps=8)
    train(config, tmp_path / "run", device="cpu")
    first, frozen, end = (_weights(tmp_path / "run", step) for step in (1, 5, 8))
    torso = [name for name in end if name.startswith("decoder.blocks.") and name.endswith("to_out.weight")]
    assert torso and all(torch.equal(first[name], frozen[name]) for name in torso)  # thawed at step 250 / 50
    assert not any(torch.equal(frozen[name], end[name]) for name in torso)
    assert torch.equal(first["decoder.input_layer.weight"], end["decoder.input_layer.weight"])
    assert not torch.equal(first["decoder.out_layer.weight"], frozen["decoder.out_layer.weight"])
    lines = [line for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "train"]
    assert ["mask" in line for line in lines] == [False] * 2 + [True] * 6  # not rendered before its weight
    assert ["color" in line for line in lines] == [False] * 4 + [True] * 4
    _resumes_exactly(config, tmp_path / "run", (2, 5))


def test_the_image_encoder_thaws_late_and_slowly() -> None:
    config = slat_flow_staged()
    assert config.task_config.structure and config_from_dict(config_to_dict(config)) == config
    assert {group.match for group in config.groups} == {"view_encoder.*", "view_geometry.*"}
    assert all(group.thaw_step > 0 and group.lr_factor < 1 for group in config.groups)
