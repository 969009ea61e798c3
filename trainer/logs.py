"""What a run reports: a progress bar or lines, log.jsonl, and TensorBoard when it is installed.

log.jsonl has one flushed line per log interval or validation. On resume the lines after the checkpoint's step are
dropped, so a killed and resumed run ends with the log of an uninterrupted one, wall-clock fields aside.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.checkpoint import write_text_atomically
from trainer.config import TrainConfig

LOG_NAME = "log.jsonl"


class RunLog:
    """The log of one process of a run; does nothing when ``enabled`` is false (all processes but the main one)."""

    def __init__(self, run_dir: Path, config: TrainConfig, step: int, *, enabled: bool) -> None:
        self.enabled = enabled
        self.steps = config.steps
        self.first = step
        self.started = time.monotonic()
        if not enabled:
            return
        path = run_dir / LOG_NAME
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.board = _tensorboard(run_dir / "tensorboard", step) if config.tensorboard else None
        self.bar = (
            tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True) if sys.stderr.isatty() else None
        )

    def train_line(self, step: int, means: Mapping[str, float], clock: Mapping[str, float]) -> None:
        """The means of a log interval: a line of the log, and the bar moves (a printed line without a terminal)."""
        if not self.enabled:
            return
        self._write(step, "train", {**means, **clock})
        seen = f"loss {means.get('loss', float('nan')):.4g}  {clock['samples_per_s']:.0f} samples/s"
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(seen)
        else:
            pace_s = (time.monotonic() - self.started) / max(1, step - self.first)
            print(f"step {step}/{self.steps}  {seen}  {_duration((self.steps - step) * pace_s)} left", flush=True)

    def validation_line(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        self._write(step, "validate", metrics)
        tqdm.write(f"step {step}: validation " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), file=sys.stdout)
        sys.stdout.flush()

    def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        # A non-finite number has no JSON form; its text does.
        safe = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self.file.write(json.dumps({"step": step, "kind": kind, **safe}) + "\n")
        self.file.flush()
        if self.board:
            for key, value in values.items():
                self.board.add_scalar(f"{kind}/{key}", value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.enabled:
            return
        self.file.close()
        if self.board:
            self.board.close()
        if self.bar is not None:
            self.bar.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; a line that a kill cut short is dropped."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"
