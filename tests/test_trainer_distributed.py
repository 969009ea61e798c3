"""Two processes train what one process trains."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer_toy import recipe
from trainer.checkpoint import find_checkpoint
from trainer.logs import read_log
from trainer.loop import train

ROOT = Path(__file__).resolve().parent.parent
NAME = "tests.trainer_toy:recipe"


def _launch(run_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # --multi_gpu is accelerate's name for its torch.distributed launcher; --device cpu makes the trainer use gloo.
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "-m", "trainer"]
    command += ["train", NAME, "--run-dir", str(run_dir), "--device", "cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def _curve(run_dir: Path) -> list[tuple[int, str, float]]:
    return [(line["step"], line["kind"], line["loss"]) for line in read_log(run_dir / "log.jsonl")]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_two_processes_have_the_curve_of_one(tmp_path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = _launch(two, "--set", "accumulation=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: ") == 1  # only the main process speaks
    train(recipe(), one, recipe=NAME, device="cpu")

    assert len(_curve(one)) == 15
    assert [line[:2] for line in _curve(two)] == [line[:2] for line in _curve(one)]
    assert [line[2] for line in _curve(two)] == pytest.approx([line[2] for line in _curve(one)], rel=1e-5)
    a, b = (find_checkpoint(run / "checkpoints") for run in (one, two))
    assert (a.state["device"], b.state["device"]) == ("1 x cpu", "2 x cpu")
    assert a.state["samples"] == b.state["samples"] == 480
    for name in ("model", "ema", "optimizer"):
        first, second = a.tensors(name), b.tensors(name)
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], rtol=1e-4, atol=1e-6) for key in first)
