"""Settings of the Flux views task and of its sheets that cannot work are refused at once, in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("diffusers")

from tests.flux_tiny import klein_folder  # noqa: E402
from trainer.__main__ import main as trainer_main  # noqa: E402
from trainer.prepare.sheet_cache import SheetOptions  # noqa: E402
from trainer.recipes import build_recipe  # noqa: E402
from trainer.tasks.flux_views import TransformerSize  # noqa: E402
from triptych.errors import TriptychError  # noqa: E402


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shift": 0.0}, "shift is 0.0, it has to be a number 0.01-100"),
        ({"prompt_template": "hello"}, "prompt_template is 'hello', it has to be a text with {text}"),
        ({"prompt_template": "{text} {foo}"}, "it has to be a text with {text}"),
        ({"logit_std": -1.0}, "logit_std is -1.0, it has to be at least 0"),
        ({"logit_mean": float("nan")}, "logit_mean nan"),
        ({"sample_steps": 0}, "sample_steps is 0, it has to be a whole number 1-1000"),
        ({"photo_steps": -1}, "photo_steps is -1, .* or 0 for none of its own"),
        ({"drop_text": 7.0}, "drop_text is 7.0, it has to be 0-1"),
        ({"words_share": -0.1}, "words_share is -0.1"),
        ({"sample_guidance": -3.0}, "sample_guidance is -3.0, it has to be a number 0-100"),
        ({"text_tokens": 8}, "text_tokens is 8, it has to be a whole number 16-4096"),
        ({"validation_sheets": 0}, "validation_sheets is 0"),
        ({"cache": ()}, "cache names no folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(changes, said):
    with pytest.raises(TriptychError, match=said):
        replace(build_recipe("flux_views_tiny").task_config, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"background": (255.0, 255.0, 255.0)}, "--background is .255.0, 255.0, 255.0., .* three numbers 0-1"),
        ({"captions": 0}, "--captions 0 have to be at least 1"),
        ({"variants": 0}, "--variants 0 and"),
        ({"panel": 100}, "--panel is 100, it has to be a multiple of 16 from 64"),
        ({"lone_photo": 2.0}, "lone_photo 2.0 is a share"),
    ],
)
def test_sheets_that_no_card_could_describe_are_not_cached(changes, said):
    with pytest.raises(TriptychError, match=said):
        SheetOptions(**changes)


def test_a_size_without_heads_and_prompts_without_text_are_refused_at_once(tmp_path, capsys):
    with pytest.raises(TriptychError, match="a transformer of 0 heads"):
        TransformerSize(heads=0)
    command = ["sheets", str(tmp_path), "--model", str(klein_folder()), "--out", str(tmp_path / "out"), "--text"]
    assert trainer_main([*command, "--template", "hello"]) == 1
    assert "--template is 'hello'" in capsys.readouterr().err
    assert trainer_main([*command, "--text-tokens", "8"]) == 1
    assert "--text-tokens is 8" in capsys.readouterr().err
