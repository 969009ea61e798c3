"""Flux training on a few objects: none held out, or none of the held-out sheets shows the front alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from tests.flux_tiny import klein_folder  # noqa: E402
from tests.prepared_folder import write_prepared_folder  # noqa: E402
from trainer.loop import train  # noqa: E402
from trainer.prepare.sheet_cache import SheetOptions, cache_sheets  # noqa: E402
from trainer.recipes import build_recipe  # noqa: E402
from trainer.sheet_data import SheetData, held_out_sheets  # noqa: E402
from trainer.tasks.flux_text import FluxTextConfig, FluxTextTask  # noqa: E402
from trainer.tasks.flux_vae import FluxVaeConfig, FluxVaeTask  # noqa: E402
from trainer.tasks.flux_views import (  # noqa: E402
    FluxViewsConfig,
    FluxViewsTask,
    TransformerSize,
    cache_words,
    drawn_prompts,
)

OPTIONS = SheetOptions(panel=64, variants=1, captions=1)
CPU = torch.device("cpu")


def _config(cache: Path, **changes) -> FluxViewsConfig:
    size = TransformerSize(heads=1, double_blocks=1, single_blocks=1)
    facts = {"size": size, "text_tokens": 24, "validation_sheets": 2, "generated_sheets": 2, "sample_steps": 1}
    return FluxViewsConfig(cache=(str(cache),), parts=str(klein_folder()), **facts | changes)


def _train(config: FluxViewsConfig, run: Path, steps: int = 1) -> None:
    intervals = {"log_every": 1, "validate_every": 1, "pictures_every": 1, "checkpoint_every": 1}
    facts = {"steps": steps, "batch_size": 1, "warmup_steps": 1, "tensorboard": False, **intervals}
    train(replace(build_recipe("flux_views_tiny"), task_config=config, **facts), run, device="cpu")


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Path, Path]:
    """Three training objects, none held out, and their sheets."""
    folder = tmp_path_factory.mktemp("three")
    data = write_prepared_folder(folder / "data", ["train"] * 3)
    assert cache_sheets([data], klein_folder(), folder / "sheets", OPTIONS) == 3
    return data, folder / "sheets"


def _with_given(cache: Path, copy: Path, given: list[str]) -> Path:
    """The sheets of objects of which each is given these views."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(cache, copy)
    (arrays,), (texts,) = list(copy.glob("train_*.safetensors")), list(copy.glob("train_*.json"))
    said = [one | {"given": given} for one in json.loads(texts.read_text())]
    texts.write_text(json.dumps(said))
    tensors = load_file(arrays)
    tensors["references"] = tensors["references"][:1].repeat(len(given) * len(said), 1, 1, 1)
    tensors["ends"] = len(given) * (torch.arange(len(said)) + 1)
    save_file(tensors, str(arrays))
    return copy


def test_a_data_set_without_held_out_objects_trains(three, tmp_path, capsys):
    _, sheets = three
    held_out = held_out_sheets([sheets])
    assert len(held_out) == 2 and len(SheetData([sheets])) == 3
    assert "2 of the training objects are validated on" in capsys.readouterr().err
    _train(_config(sheets), tmp_path / "run")
    assert list((tmp_path / "run" / "pictures").iterdir())


def test_the_parts_of_a_small_model_train_on_it_too(three, capsys):
    data, _ = three
    vae = FluxVaeTask(FluxVaeConfig(data=(str(data),)))
    vae.setup(CPU)
    assert len(vae._sheets(vae.held_out, 8)[0]) == 2 and vae.size() == 3
    text = FluxTextTask(FluxTextConfig(data=(str(data),), tokenizer_captions=1))
    text.setup(CPU)
    assert [record["key"] for record, _, _ in text.held_out] == ["object_0", "object_1"]
    assert capsys.readouterr().err.count("2 of the training objects") == 2


def test_held_out_objects_are_taken_where_any_folder_has_them(three, tmp_path):
    data, _ = three
    more = write_prepared_folder(tmp_path / "more", ["train", "validation"])
    text = FluxTextTask(FluxTextConfig(data=(str(data), str(more)), tokenizer_captions=1))
    text.setup(CPU)
    assert [record["key"] for record, _, _ in text.held_out] == ["object_1"]
    assert cache_sheets([data, more], klein_folder(), tmp_path / "sheets", OPTIONS) == 5
    assert len(SheetData([tmp_path / "sheets"], "validation")) == 1


def test_sheets_of_several_views_are_cut_down_to_the_front(three, tmp_path):
    cache = _with_given(three[1], tmp_path / "sheets", ["front", "left"])
    task = FluxViewsTask(_config(cache))
    task.setup(CPU)
    with torch.no_grad():
        model = task.build_model().to(torch.bfloat16)
        assert set(task.validate(model)) == {"loss", "psnr", "iou"}
        assert task.pictures(model).size == (256, 384)
    assert task._lone_fronts[0][1].endswith("given: front.")
    assert task._lone_fronts[0][1] in drawn_prompts(task.config)


def test_without_a_front_view_the_comparison_is_left_out_and_that_is_said(three, tmp_path, capsys):
    cache = _with_given(three[1], tmp_path / "sheets", ["back"])
    _train(_config(cache), tmp_path / "run", steps=2)
    assert "without psnr and iou" in capsys.readouterr().err
    _train(_config(cache), tmp_path / "run", steps=2)


def test_prompts_cached_before_are_enough(three, tmp_path):
    """Prompts of sheets cut down to the front are not in the caches of earlier versions."""
    cache = _with_given(three[1], tmp_path / "sheets", ["front", "left"])
    config = _config(cache)
    cache_words([cache], klein_folder(), tmp_path / "text", template=config.prompt_template, tokens=24)
    asked = []
    for _ in range(2):
        task = FluxViewsTask(replace(config, text=str(tmp_path / "text")))
        task.setup(CPU)
        asked.append([prompt for _, prompt in task._lone_fronts])
        index = json.loads((tmp_path / "text" / "text.json").read_text())
        for prompt in asked[0]:
            index["prompts"].pop(prompt, None)
        (tmp_path / "text" / "text.json").write_text(json.dumps(index))
    assert [len(prompts) for prompts in asked] == [2, 0]
