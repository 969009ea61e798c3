"""The folder of a run: its config, its one writer, and where its numbers came from.

runs/NAME/config.json       the resolved config, the recipe's name
         checkpoints/       step_0001234/, see trainer.checkpoint
         pictures/          step_0001234.png
         log.jsonl          see trainer.logs
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpoint import write_text_atomically
from trainer.config import TrainConfig, config_from_dict, config_to_dict, differing_keys
from triptych.errors import TriptychError

CONFIG_NAME = "config.json"
FORMAT = 1
# A resumed run must see the data that the uninterrupted one would have seen.
FIXED_ON_RESUME = ("task", "seed", "batch_size")


def find_run(name: str) -> Path:
    """The run folder at a path, or of that name under runs/."""
    for folder in (Path(name), Path("runs") / name):
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise TriptychError(f"no run at {name} nor at {Path('runs') / name}: there is no {CONFIG_NAME} in either")


def read_run(run_dir: Path) -> tuple[TrainConfig, str]:
    """The config of a run and the name of its recipe; TriptychError when the file is damaged or has wrong keys."""
    path = run_dir / CONFIG_NAME
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TriptychError(f"{path}: not readable ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise TriptychError(f"{path}: not a run config of format {FORMAT}")
    return config_from_dict(document["config"]), str(document.get("recipe", ""))


def write_run(run_dir: Path, config: TrainConfig, recipe: str) -> None:
    document = {"format": FORMAT, "recipe": recipe, "config": config_to_dict(config)}
    write_text_atomically(run_dir / CONFIG_NAME, json.dumps(document, indent=1) + "\n")


def claim_run_dir(run_dir: Path, config: TrainConfig, recipe: str) -> None:
    """Makes the folder of a new run, or accepts that of the same run; TriptychError when it holds anything else."""
    if (run_dir / CONFIG_NAME).exists():
        existing, _ = read_run(run_dir)
        if keys := differing_keys(config_to_dict(existing), config_to_dict(config)):
            raise TriptychError(
                f"{run_dir} holds a run of another config (it differs in {', '.join(keys)}): "
                "choose another --run-dir or name, or change that run with `resume --set`"
            )
    elif run_dir.exists() and any(path.name != LOCK_NAME for path in run_dir.iterdir()):
        raise TriptychError(f"{run_dir} is not empty and is not a run: choose another --run-dir")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_run(run_dir, config, recipe)


def check_resume(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The keys that ``new`` changes; TriptychError for one that a resumed run may not change."""
    changed = differing_keys(config_to_dict(old), config_to_dict(new))
    for key in changed:
        if key in FIXED_ON_RESUME:
            raise TriptychError(
                f"--set {key}: a run keeps its {key} ({getattr(old, key)!r}); start a new run with init_from instead"
            )
    if bool(old.max_cost) != bool(new.max_cost):
        raise TriptychError("--set max_cost: batches by cost and by number have another order; start a new run instead")
    return changed


LOCK_NAME = "run.lock"


@contextmanager
def run_lock(run_dir: Path, *, enabled: bool) -> Iterator[None]:
    """Makes this process the run's one writer; the system releases the lock even when the process is killed."""
    if not enabled:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK_NAME, "a+b") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            raise TriptychError(f"{run_dir}: another process is training this run: wait for it or stop it") from error
        yield


def _lock(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def code_version() -> dict[str, Any]:
    """{"commit": hex or None, "dirty": bool or None} of the repository this file lies in; None outside of git."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()
