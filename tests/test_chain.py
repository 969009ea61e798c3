"""Recipes of several runs: stages in their order, settings that reach them, going on after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from trainer import chain  # noqa: E402
from trainer.__main__ import main  # noqa: E402
from trainer.chain import FLUX_TINY, Chain, Stage, run_chain  # noqa: E402
from trainer.recipes import CHAIN_NAMES, build_recipe  # noqa: E402
from trainer.runs import claim_run_dir  # noqa: E402
from triptych.errors import TriptychError  # noqa: E402
from triptych.flux.backend import load_flux_views  # noqa: E402

SMALL = ("steps=2", "batch_size=2", "warmup_steps=1", "tensorboard=false", "validate_every=0", "pictures_every=0")
SETTINGS = (
    *(f"{stage}.{setting}" for stage in ("vae", "text", "proportions", "views") for setting in SMALL),
    *(
        f"vae.task_config.{s}"
        for s in ("channels=12,48,72,72", "crop=32", "validation_objects=2", "component_sheets=8")
    ),
    *(f"text.task_config.{s}" for s in ("vocabulary_size=400", "intermediate_size=32", "attention_heads=1")),
    "proportions.task_config.width=8",
    *(f"sheets.{s}" for s in ("panel=64", "variants=1", "captions=1", "workers=0")),
    *(f"views.task_config.size.{s}" for s in ("heads=1", "double_blocks=1", "single_blocks=1")),
    *(f"views.task_config.{s}" for s in ("text_tokens=24", "sample_steps=1", "spread_prompts=0")),
)


def flags(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_command_makes_a_views_model_and_says_its_parts(boxes_and_balls, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)  # the stages are processes that import the trainer
    words = ["train", "flux_tiny", "--run-dir", str(tmp_path / "chain"), "--device", "cpu"]
    settings = flags(f"data={boxes_and_balls}", *SETTINGS)
    assert main([*words, *settings]) == 0
    said = capfd.readouterr().out
    for number, stage in enumerate(FLUX_TINY.stages, start=1):
        assert f"flux_tiny {number}/10, {stage.name}: " in said
    assert f"python -m trainer sheets {boxes_and_balls} --model {tmp_path / 'chain' / 'parts'}" in said
    assert said.splitlines()[-1].endswith(f"--views-model {tmp_path / 'chain' / 'flux'} -o chair.obj")
    model = load_flux_views(tmp_path / "chain" / "flux")
    assert model.card.panel_size == 64 and model.card.mirrored and "red" in model.card.vocabulary
    assert model.sheet("a red box. given: .", seed=0).shape == (3, 128, 128)
    assert model.proportions.width == 8 and not model.proportions.training

    # Again: nothing is left to do. Resumed: the same. Of other settings: refused.
    assert main([*words, *settings]) == 0 and main(["resume", str(tmp_path / "chain")]) == 0
    said = capfd.readouterr().out
    assert said.count("finished: ") == 2 and "flux_tiny 1/10" not in said
    assert main([*words, *settings, "--set", "views.lr=1"]) == 1
    told = capfd.readouterr().err
    assert (
        "was begun with another views.lr (the default), and its stage views has used it: change the run itself" in told
    )


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "lr=1",
            "a chain takes data=FOLDER and the keys of its stages (vae.KEY, text.KEY, proportions.KEY, sheets.KEY",
        ),
        ("data.x=1", "a chain takes data=FOLDER"),
        ("parts.x=1", "a chain takes data=FOLDER"),
        ("views.stpes=1", "stage views: --set stpes: unknown key, did you mean 'steps'"),
        ("views.steps=many", "stage views: steps='many': expected an integer"),
        ("sheets.variant=1", "unknown key 'variant', did you mean 'variants'"),
        ("sheets.panel=100", "stage sheets: --panel is 100, it has to be"),
        ("sheets.panel=wide", "stage sheets: argument --panel: invalid int value: 'wide'"),
        ("sheets.variants=0", "stage sheets: --variants 0"),
        ("vae.batch_size=0", "stage vae: "),
    ],
)
def test_wrong_settings_are_told_before_anything_runs(tmp_path, capsys, setting, told):
    assert main(["train", "flux_tiny", "--run-dir", str(tmp_path / "chain"), "--set", setting]) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "chain").exists()


def test_what_is_not_a_chain_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main(["train", "flux_tiny", "--run-dir", str(tmp_path / "other")]) == 1
    assert "is not empty and is not a chain" in capsys.readouterr().err
    assert main(["plan", "flux_tiny"]) == 1
    assert "flux_tiny is several runs: train or resume it, or name one of them" in capsys.readouterr().err
    assert main(["train", "flux_views_tiny", "--processes", "2"]) == 1
    assert "--processes 2 is for recipes of several runs" in capsys.readouterr().err
    assert main(["train", "flux_tiny", "--processes", "0"]) == 1
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err
    assert main(["train", "flux_tiny", "--processes", "3"]) == 1
    assert "stage vae: batch_size 16 cannot be shared by 3 processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["train", "flux_tiny"]) == 1
    assert "run it without a launcher, with --processes N" in capsys.readouterr().err
    assert tuple(chain.CHAINS) == CHAIN_NAMES


@pytest.fixture
def two_stages(monkeypatch) -> Chain:
    """The first makes a folder, the second trains."""
    words = ("sheets", "--model", "m", "--out", "{}/sheets")
    stages = (
        Stage("first", words, out="sheets", options=("panel",), reads_data=True),
        Stage("second", ("train", "flux_vae_tiny"), recipe="flux_vae_tiny", run="second"),
    )
    made = Chain(stages, "second", "look at {}/second")
    monkeypatch.setitem(chain.CHAINS, "two", made)
    return made


def test_it_goes_on_in_the_stage_that_was_interrupted(two_stages, tmp_path, monkeypatch, capsys):
    ran: list[list[str]] = []
    stop_in, trained = ["first"], [False]
    folder = tmp_path / "chain"

    def run(stage, folder, command, processes):
        ran.append(command)
        assert processes == 2
        if stage.out:
            assert not (folder / stage.out).exists(), "what an interrupted command left is gone"
            (folder / stage.out).mkdir()
        else:
            claim_run_dir(folder / stage.run, build_recipe("flux_vae_tiny"), "flux_vae_tiny")
        return stage.name in stop_in, stage.name not in stop_in

    monkeypatch.setattr(chain, "_run", run)
    monkeypatch.setattr(chain, "_is_trained", lambda folder: trained[0])

    def go(*settings: str) -> str:
        return run_chain("two", folder, list(settings), processes=2, device="cpu")

    with pytest.raises(
        TriptychError, match=f"{tmp_path / 'none'} is not a prepared folder: run `python -m trainer prep"
    ):
        go(f"data={tmp_path / 'none'}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").touch()
    data = f"data={tmp_path / 'data'}"
    resume = f"saved: python -m trainer resume {folder} --processes 2 --device cpu"
    assert go("first.panel=128", data) == f"two was interrupted in first and {resume}"
    stop_in.clear()
    assert go(data, "first.panel=64") == f"two was interrupted in second and {resume}", "told to stop, it ends well too"
    assert f"sheets {tmp_path / 'data'} --model m --out {folder}/sheets --panel 64" in capsys.readouterr().out
    # What the first stage has used, and the run that has begun, keep their settings; the run is resumed as itself.
    for setting in ("first.panel=128", "second.steps=5"):
        with pytest.raises(TriptychError, match=f"was begun with another {setting.split('=')[0]}"):
            go(data, setting, *(["first.panel=64"] if setting.startswith("second") else []))
    trained[0] = True
    assert chain.resume_chain(folder, [], processes=2, device="cpu").endswith(f"look at {folder}/second")
    assert [command[0] for command in ran] == ["sheets", "sheets", "train", "resume"]
    assert ran[-1] == ["resume", str(folder / "second"), "--device", "cpu"]
    (folder / "chain.json").write_text(json.dumps({"format": 9, "recipe": "two"}))
    with pytest.raises(TriptychError, match="not a chain of format 1"):
        chain.resume_chain(folder, [])


def test_a_stage_that_stops_between_two_ends_the_chain_and_is_done(two_stages, tmp_path, monkeypatch):
    monkeypatch.setattr(chain, "_run", lambda stage, *_: (True, True))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").touch()
    said = run_chain("two", tmp_path / "chain", [f"data={tmp_path / 'data'}"])
    assert said.startswith("two was interrupted in first and saved")
    assert json.loads((tmp_path / "chain" / "chain.json").read_text())["done"] == ["first"]


SLEEPS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print(1, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code", "ends"), [("SIGTERM", 0, (True, True)), ("SIGINT", 0, (True, False)), ("SIGTERM", 1, None)]
)
def test_signals_reach_the_stage_and_a_failure_is_told(two_stages, tmp_path, monkeypatch, number, code, ends):
    """By itself the child would go on for a minute. Python ends with 130 or -2 after SIGINT."""
    stage, popen = two_stages.stages[1], subprocess.Popen

    def started(command, **options):
        child = popen([sys.executable, "-c", SLEEPS.format(code=code)], stdout=subprocess.PIPE, **options)
        child.stdout.readline()  # it listens
        os.kill(os.getpid(), getattr(signal, number))
        return child

    monkeypatch.setattr(chain.subprocess, "Popen", started)
    if ends is None:
        with pytest.raises(TriptychError, match="the stage second ended with the exit code 1: see what it said above"):
            chain._run(stage, tmp_path, ["train"], 1)
    else:
        assert chain._run(stage, tmp_path, ["train"], 1) == ends
