"""A run that is killed, stopped or damaged ends with the bytes of the run that was not.

The killed runs are real processes of ``python -m trainer``, ended with signals while they train.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.trainer_toy import ToyTask, file_size_limit, recipe
from trainer.__main__ import main
from trainer.checkpoint import find_checkpoint
from trainer.config import TrainConfig, apply_overrides
from trainer.logs import read_log
from trainer.loop import evaluate, export, open_trained, train
from trainer.runs import run_lock
from triptych.errors import TriptychError

ROOT = Path(__file__).resolve().parent.parent
NAME = "tests.trainer_toy:recipe"
TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "optimizer.json")
CLOCK_FIELDS = {"samples_per_s", "wall_s"}
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")


def _config(*changes: str) -> TrainConfig:
    return apply_overrides(recipe(), ["task_config.dropout=0.1", *changes])


def _trainer(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", *map(str, arguments), "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out if code == 0 else err


def _wait_for_a_checkpoint_after(step: int, process: subprocess.Popen[str], run_dir: Path) -> int:
    def newest() -> int:
        return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*")), default=0)

    _wait_until(process, lambda: newest() > step)
    return newest()


def _wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not train"
        time.sleep(0.02)


def _numbers(run_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k not in CLOCK_FIELDS} for line in read_log(run_dir / "log.jsonl")]


def _assert_same_run(first: Path, second: Path) -> None:
    a, b = (find_checkpoint(run / "checkpoints") for run in (first, second))
    assert a.step == b.step
    for name in TENSOR_FILES:
        assert (a.path / name).read_bytes() == (b.path / name).read_bytes(), name
    volatile = {"wall_s", "config_sha256", "commit", "dirty"}
    assert {k: v for k, v in a.state.items() if k not in volatile} == {
        k: v for k, v in b.state.items() if k not in volatile
    }
    assert _numbers(first) == _numbers(second)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """The uninterrupted run of _config()."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    sentence = train(_config(), run_dir, recipe=NAME, device="cpu")
    assert sentence == f"finished: {run_dir} is trained to step 60 of 60"
    losses = [line["loss"] for line in read_log(run_dir / "log.jsonl") if line["kind"] == "train"]
    assert len(losses) == 12 and losses[-1] < losses[0] / 2
    return run_dir


@POSIX
def test_kill_9_again_and_again_changes_nothing(tmp_path, reference) -> None:
    run_dir = tmp_path / "run"
    settings = ["--set", "task_config.dropout=0.1", "--set", "task_config.seconds_per_step=0.05"]
    moments = random.Random(7)
    process = _trainer("train", NAME, "--run-dir", run_dir, *settings)
    saved = 0
    for kill in range(3):
        saved = _wait_for_a_checkpoint_after(saved, process, run_dir)
        time.sleep(moments.uniform(0.0, 0.3))  # a checkpoint is due every 0.35 s
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before the kill"
        if kill == 1:  # and as if the power had failed in the middle of a save and of a log line
            (run_dir / "checkpoints" / ".writing-step_0000099").mkdir(parents=True, exist_ok=True)
            with open(run_dir / "log.jsonl", "a") as file:
                file.write('{"step": 59, "kind": "tr')
        process = _trainer("resume", run_dir)
    assert "finished" in _finish(process)
    _assert_same_run(run_dir, reference)
    assert not list((run_dir / "checkpoints").glob(".writing*"))


@POSIX
def test_sigterm_to_the_whole_group_saves_that_step_and_exits_0(tmp_path, reference) -> None:
    run_dir = tmp_path / "run"
    changes = ["task_config.dropout=0.1", "task_config.seconds_per_step=0.03", "workers=2", "checkpoint_every=0"]
    process = _trainer("train", NAME, "--run-dir", run_dir, *(part for c in changes for part in ("--set", c)))
    _wait_until(process, lambda: len(read_log(run_dir / "log.jsonl")) > 0)
    os.killpg(process.pid, signal.SIGTERM)
    said = _finish(process)
    step = find_checkpoint(run_dir / "checkpoints").step
    assert 0 < step < 60
    assert f"interrupted by SIGTERM at step {step} and saved: python -m trainer resume {run_dir}" in said
    assert train(_config(*changes), run_dir, device="cpu").startswith("finished")  # the same config goes on
    _assert_same_run(run_dir, reference)


@POSIX
def test_ctrl_c_saves_too(tmp_path, monkeypatch) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(ToyTask, "loss", _then_signal(ToyTask.loss, signal.SIGINT, at_step=9))
    assert "interrupted by Ctrl-C at step 10 and saved" in train(_config(), run_dir, device="cpu")
    assert find_checkpoint(run_dir / "checkpoints").step == 10


def _then_signal(loss, number: int, at_step: int):
    def wrapped(self, model, batch, step):
        if step == at_step:
            signal.raise_signal(number)
        return loss(self, model, batch, step)

    return wrapped


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, reference, capsys) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    newest = find_checkpoint(run_dir / "checkpoints")
    content = bytearray((newest.path / "ema.safetensors").read_bytes())
    content[-1] ^= 255
    (newest.path / "ema.safetensors").write_bytes(content)
    train(_config(), run_dir, device="cpu")
    said = capsys.readouterr().out
    assert "passing over a damaged checkpoint" in said and "ema.safetensors" in said
    assert f"resuming {run_dir} at step 56 of 60" in said
    _assert_same_run(run_dir, reference)


def test_more_steps_by_resume_equal_a_longer_run(tmp_path) -> None:
    changes = ("schedule=constant", "log_every=4", "validate_every=10")
    train(_config(*changes, "steps=20"), tmp_path / "two", recipe=NAME, device="cpu")
    assert main(["resume", str(tmp_path / "two"), "--set", "steps=40", "--device", "cpu"]) == 0
    train(_config(*changes, "steps=40"), tmp_path / "one", device="cpu")
    _assert_same_run(tmp_path / "two", tmp_path / "one")


@POSIX
def test_a_full_disk_stops_cleanly_with_the_older_checkpoint(tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    config = _config("task_config.width=4000", "checkpoint_every=10", "steps=10")
    with file_size_limit(60_000), pytest.raises(TriptychError, match="step 10, the run's config is intact: could not"):
        train(config, run_dir, recipe=NAME, device="cpu")
    assert list((run_dir / "checkpoints").iterdir()) == []
    train(config, run_dir, recipe=NAME, device="cpu")

    with file_size_limit(60_000):
        assert main(["resume", str(run_dir), "--set", "steps=60", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: training stopped at step 20, the checkpoint of step 10 is intact: could not save")
    assert said.count("\n") == 1
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_0000010"]
    assert main(["resume", str(run_dir), "--device", "cpu"]) == 0
    assert find_checkpoint(run_dir / "checkpoints").step == 60


def test_data_workers_and_log_do_not_change_the_numbers(tmp_path, reference) -> None:
    train(_config("workers=2"), tmp_path / "run", device="cpu")
    _assert_same_run(tmp_path / "run", reference)


def test_accumulation_gives_the_curve_of_the_whole_batch(tmp_path) -> None:
    curves = []
    for parts in (1, 4):
        train(apply_overrides(recipe(), [f"accumulation={parts}"]), tmp_path / str(parts), device="cpu")
        curves.append([line["loss"] for line in read_log(tmp_path / str(parts) / "log.jsonl")])
    assert len(curves[0]) == 15
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_non_finite_steps_are_skipped_and_counted(tmp_path) -> None:
    config = _config("task_config.bad_from=10", "task_config.bad_to=13")
    train(config, tmp_path / "run", device="cpu")
    checkpoint = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert (checkpoint.state["skipped_steps"], checkpoint.state["bad_streak"], checkpoint.step) == (3, 0, 60)
    assert set(checkpoint.json("optimizer")["updates"].values()) == {57}
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.tensors("model").values())


def test_a_loss_that_stays_non_finite_stops_the_run(tmp_path) -> None:
    config = _config("task_config.bad_from=12", "max_bad_steps=5")
    with pytest.raises(TriptychError, match="not finite 5 times in a row up to step 17 .*lower lr"):
        train(config, tmp_path / "run", device="cpu")
    assert find_checkpoint(tmp_path / "run" / "checkpoints").step == 14


def test_early_stop_keeps_the_best_checkpoint_and_stays_stopped(tmp_path) -> None:
    run_dir = tmp_path / "run"
    # The highest loss is that of the first validation: every later one is worse by this measure.
    changes = ("best_is=highest", "validate_every=4", "early_stop_patience=3", "keep_checkpoints=1", "warmup_steps=0")
    sentence = train(_config(*changes), run_dir, device="cpu")
    assert sentence.startswith("stopped early at step 16: loss has not improved for 3 validations")
    assert find_checkpoint(run_dir / "checkpoints", "best").step == 4
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["step_0000004", "step_0000016"]
    assert train(_config(*changes), run_dir, device="cpu") == sentence


def test_a_folder_of_something_else_is_refused(tmp_path, reference) -> None:
    with pytest.raises(TriptychError, match=r"another config \(it differs in lr, task_config.width\)"):
        train(_config("lr=0.5", "task_config.width=3"), reference, device="cpu")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(TriptychError, match="not empty and is not a run"):
        train(_config(), tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letter.txt"]


def test_a_run_has_one_writer(tmp_path) -> None:
    train(_config("steps=2"), tmp_path / "run", device="cpu")
    before = (tmp_path / "run" / "config.json").read_bytes()
    with run_lock(tmp_path / "run", enabled=True):
        with pytest.raises(TriptychError, match="another process is training this run"):
            train(_config("steps=2"), tmp_path / "run", device="cpu")
        assert main(["resume", str(tmp_path / "run"), "--set", "steps=4"]) == 1
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("change", ["seed=3", "batch_size=16"])
def test_resume_keeps_what_would_break_the_data_order(reference, change, capsys) -> None:
    before = (reference / "config.json").read_bytes()
    assert main(["resume", str(reference), "--set", change]) == 1
    assert f"a run keeps its {change.split('=')[0]}" in capsys.readouterr().err
    assert (reference / "config.json").read_bytes() == before


def test_start_from_other_weights(tmp_path, reference, capsys) -> None:
    config = _config(f"init_from={reference}", "steps=1", "lr=1e-12", "warmup_steps=0", "weight_decay=0")
    train(config, tmp_path / "run", device="cpu")
    ours = find_checkpoint(tmp_path / "run" / "checkpoints").tensors("model")
    theirs = find_checkpoint(reference / "checkpoints").tensors("ema")
    assert all(torch.allclose(ours[key], theirs[key], rtol=0, atol=1e-9) for key in theirs)
    with pytest.raises(TriptychError, match=r"0.weight is \(32, 1\) .* the model needs \(5, 1\)"):
        train(_config(f"init_from={reference}", "task_config.width=5"), tmp_path / "other", device="cpu")


def test_evaluate_and_export_use_the_average(tmp_path, reference, capsys) -> None:
    run, checkpoint = open_trained(reference, "last", "cpu")
    metrics = evaluate(run)
    assert metrics == checkpoint.state["metrics"]
    assert main(["evaluate", str(reference), "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(reference), "step": 60, **metrics}

    provenance = export(reference, tmp_path / "out", device="cpu")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text()) == provenance
    assert (provenance["recipe"], provenance["step"], provenance["samples"]) == (NAME, 60, 480)
    assert provenance["metrics"] == metrics and provenance["config"]["lr"] == 0.01
    assert {"commit", "dirty", "wall_s", "device"} <= provenance.keys()
    exported, average = load_file(tmp_path / "out" / "toy.safetensors"), checkpoint.tensors("ema")
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[key], average[key]) for key in average)
    assert not all(torch.equal(exported[key], value) for key, value in checkpoint.tensors("model").items())
    with pytest.raises(TriptychError, match="is not empty"):
        export(reference, tmp_path / "out", device="cpu")


def test_bf16_pictures_and_boards(tmp_path) -> None:
    config = _config("precision=bf16", "pictures_every=30", "tensorboard=true", "schedule=wsd")
    train(config, tmp_path / "run", device="cpu")
    sheets = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in sheets] == ["step_0000030.png", "step_0000060.png"]
    assert Image.open(sheets[0]).size == (32, 32)
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    weights = find_checkpoint(tmp_path / "run" / "checkpoints").tensors("model")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [line["loss"] for line in read_log(tmp_path / "run" / "log.jsonl") if line["kind"] == "train"]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "no recipe is called 'nothing'"),
        (["train", NAME, "--set", "stepz=1"], "did you mean 'steps'"),
        (["resume", "no/such/run"], "no run at no/such/run"),
        (["evaluate", "no/such/run"], "no run at no/such/run"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_1(arguments, message, capsys) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
