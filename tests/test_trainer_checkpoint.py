"""Checkpoints are complete or absent, whatever happened to the disk."""

import json
import shutil
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.trainer_toy import file_size_limit, recipe
from trainer.checkpoint import (
    complete_checkpoints,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    rotate,
    save_checkpoint,
)
from trainer.optim import build_optimizer, load_optimizer_state, load_tensors, optimizer_state
from triptych.errors import TriptychError

TENSOR_FILES = ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
FILES = sorted([*TENSOR_FILES, "manifest.json", "optimizer.json", "state.json"])


def _save(folder, step, best_step=None):
    generator = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(3, 4, generator=generator) for name in ("a.weight", "b.weight")}
    return save_checkpoint(
        folder,
        step,
        {"model": weights, "ema": {k: v * 2 for k, v in weights.items()}, "optimizer": {}},
        {"state": {"step": step, "best_step": best_step}, "optimizer": {"updates": {}}},
    )


def test_round_trip_and_equal_bytes(tmp_path) -> None:
    path = _save(tmp_path / "one", 12)
    other = _save(tmp_path / "two", 12)
    assert path.name == "step_0000012"
    assert sorted(file.name for file in path.iterdir()) == FILES
    assert all((path / name).read_bytes() == (other / name).read_bytes() for name in FILES)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.state) == (12, {"step": 12, "best_step": None})
    weights = checkpoint.tensors("model")
    assert torch.equal(weights["a.weight"], torch.randn(3, 4, generator=torch.Generator().manual_seed(12)))
    assert torch.equal(checkpoint.tensors("ema")["b.weight"], weights["b.weight"] * 2)
    assert [folder.name for folder in (tmp_path / "one").iterdir()] == ["step_0000012"]


def _truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(path) -> None:
    path.write_bytes(b"")


def _remove(path) -> None:
    path.unlink()


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _remove])
def test_any_damage_is_seen_and_the_older_one_loads(tmp_path, name, damage) -> None:
    _save(tmp_path, 10)
    damage(_save(tmp_path, 20) / name)
    said: list[str] = []
    assert find_checkpoint(tmp_path, report=said.append).step == 10
    assert len(said) == 1 and "step_0000020" in said[0] and name in said[0]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "step": 20, "sha256": {}}', '{"format": 9, "sha256": {}}']
)
def test_a_manifest_that_says_nothing_is_damage(tmp_path, content) -> None:
    _save(tmp_path, 10)
    (_save(tmp_path, 20) / "manifest.json").write_text(content)
    said: list[str] = []
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path, said.append)] == [10]
    assert len(said) == 1


def test_an_unfinished_save_is_invisible_and_swept_by_the_next(tmp_path) -> None:
    complete = _save(tmp_path, 10)
    shutil.copytree(complete, tmp_path / ".writing-step_0000020")
    assert find_checkpoint(tmp_path).step == 10
    _save(tmp_path, 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000010", "step_0000030"]


def test_saving_a_step_again_replaces_it(tmp_path) -> None:
    _flip(_save(tmp_path, 10) / "model.safetensors")
    _save(tmp_path, 10)
    assert find_checkpoint(tmp_path).step == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000010"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path) -> None:
    for step in (1, 2, 3, 4, 5):
        _save(tmp_path, step, best_step=2)
    rotate(tmp_path, keep=2, protect=2)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [5, 4, 2]
    assert find_checkpoint(tmp_path, "best").step == 2
    assert find_checkpoint(tmp_path, "4").step == 4
    for which, message in (("3", "step_0000003"), ("newest", "expected last, best or a step number")):
        with pytest.raises(TriptychError, match=message):
            find_checkpoint(tmp_path, which)


def test_no_checkpoint_is_a_sentence(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(TriptychError, match="no complete checkpoint"):
            find_checkpoint(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX service")
def test_a_full_disk_leaves_the_older_checkpoint_and_no_rest(tmp_path) -> None:
    _save(tmp_path, 10)
    big = {"w": torch.zeros(100_000)}
    with file_size_limit(50_000), pytest.raises(TriptychError, match="could not save the checkpoint of step 20"):
        save_checkpoint(tmp_path, 20, {"model": big}, {"state": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000010"]
    assert find_checkpoint(tmp_path).step == 10


def test_weights_to_start_from(tmp_path) -> None:
    run = tmp_path / "run"
    path = _save(run / "checkpoints", 10)
    expected = read_checkpoint(path).tensors("ema")
    for source in (run, path, path / "ema.safetensors"):
        loaded = load_weights(source)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    (tmp_path / "junk").write_bytes(b"junk")
    for wrong in (tmp_path / "junk", tmp_path / "absent"):
        with pytest.raises(TriptychError, match=wrong.name):
            load_weights(wrong)


def _stepped_model() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    optimizer = build_optimizer(model, recipe())
    for _ in range(3):
        optimizer.zero_grad()
        model[0](torch.ones(4, 2)).square().sum().backward()  # the last layer gets no gradient, so no state
        optimizer.step()
    return model, optimizer


def test_optimizer_state_survives_as_plain_tensors(tmp_path) -> None:
    model, optimizer = _stepped_model()
    tensors, updates = optimizer_state(model, optimizer)
    assert updates == {"0.weight": 3, "0.bias": 3}
    save_checkpoint(tmp_path, 3, {"optimizer": tensors}, {"state": {}, "optimizer": {"updates": updates}})
    checkpoint = read_checkpoint(tmp_path / "step_0000003")

    fresh = build_optimizer(model, recipe())
    load_optimizer_state(model, fresh, checkpoint.tensors("optimizer"), checkpoint.json("optimizer")["updates"])
    weight = model[0].weight
    weight_before = weight.detach().clone()
    results = []
    for each in (optimizer, fresh):
        with torch.no_grad():
            weight.copy_(weight_before)
        each.zero_grad()
        model[0](torch.full((4, 2), 0.3)).sum().backward()
        each.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results) and not torch.equal(results[0], weight_before)


def _block_model() -> torch.nn.Module:
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([torch.nn.Linear(6, 6) for _ in range(2)])
    return torch.nn.ModuleDict({"into": torch.nn.Linear(4, 6), "blocks": blocks, "out": torch.nn.Linear(6, 1)})


def _block_step(model, optimizer, seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    hidden = model["into"](x)
    for block in model["blocks"]:
        hidden = hidden + torch.tanh(block(hidden))
    loss = (model["out"](hidden)[:, 0] - x.prod(1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_muon_has_the_matrices_of_blocks_and_its_state_survives() -> None:
    config = replace(recipe(), optimizer="muon", lr=0.01, weight_decay=0.1)
    model = _block_model()
    optimizer = build_optimizer(model, config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    before = [block.weight.detach().clone() for block in model["blocks"]]
    _block_step(model, optimizer, 0)
    for old, block in zip(before, model["blocks"], strict=True):  # an orthogonal update of AdamW's size
        update = (old * (1 - 0.01 * 0.1) - block.weight.detach()) / (0.01 * 0.2 * 6**0.5)
        singular = torch.linalg.svdvals(update)
        assert singular.max() < 1.3 and singular[:4].min() > 0.5
    tensors, updates = optimizer_state(model, optimizer)
    assert {name for name in tensors if name.startswith("momentum")} == {
        "momentum_buffer.blocks.0.weight", "momentum_buffer.blocks.1.weight"
    }  # fmt: skip
    assert "exp_avg_sq.blocks.0.bias" in tensors and "exp_avg.into.weight" in tensors
    other = _block_model()
    other.load_state_dict(model.state_dict())
    fresh = build_optimizer(other, config)
    load_optimizer_state(other, fresh, {name: t.clone() for name, t in tensors.items()}, updates)
    for seed in (1, 2):
        _block_step(model, optimizer, seed)
        _block_step(other, fresh, seed)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(TriptychError, match="'momentum_buffer' is missing"):
        load_optimizer_state(other, fresh, {}, {"blocks.0.weight": 1})
    with pytest.raises(TriptychError, match="no matrix of repeated blocks"):
        build_optimizer(torch.nn.Linear(2, 3), config)


def test_state_of_another_model_is_refused() -> None:
    model, optimizer = _stepped_model()
    tensors, updates = optimizer_state(model, optimizer)
    with pytest.raises(TriptychError, match="'0.weight' is unknown"):
        load_optimizer_state(torch.nn.Linear(2, 3), optimizer, tensors, {"0.weight": 3})
    with pytest.raises(TriptychError, match="'exp_avg_sq' is missing"):
        load_optimizer_state(model, optimizer, {"exp_avg.0.weight": tensors["exp_avg.0.weight"]}, {"0.weight": 3})
    target = {"w": torch.zeros(2)}
    for source, message in (
        ({}, "'w' is missing"),
        ({"w": torch.zeros(2), "x": torch.zeros(1)}, "'x' is unknown"),
        ({"w": torch.zeros(3)}, r"w is \(3,\) torch.float32, the model needs \(2,\)"),
        ({"w": torch.zeros(2, dtype=torch.float16)}, "w is .* torch.float16"),
    ):
        with pytest.raises(TriptychError, match=message):
            load_tensors(target, source, "here")
    assert torch.equal(target["w"], torch.zeros(2))


def test_the_manifest_lists_every_other_file(tmp_path) -> None:
    path = _save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    assert sorted([*manifest["sha256"], "manifest.json"]) == FILES
