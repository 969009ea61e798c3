"""The one training loop, for every task.

`train` opens the run and holds the loop, to be read from top to bottom; what it calls is small and named for what it
does. All state of a run is: the weights, their EMA, the optimizer's moments, and the numbers in Progress. No state of
random numbers is kept: data order, samples and the generator that a loss sees are functions of the step
(trainer.order).

Not covered: sharded parameters (FSDP), and bit-equality on a GPU, where some kernels add in no fixed order.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.balance import batch_order
from trainer.checkpoint import (
    Checkpoint,
    complete_checkpoints,
    find_checkpoint,
    load_weights,
    remove_unfinished,
    rotate,
    save_checkpoint,
)
from trainer.config import TrainConfig, build_task, config_hash, config_to_dict
from trainer.logs import RunLog
from trainer.memory import explained, memory_controller
from trainer.names import nearest
from trainer.optim import (
    Ema,
    build_optimizer,
    frozen_groups,
    learning_rate,
    load_optimizer_state,
    load_tensors,
    optimizer_state,
    persistent_buffers,
    saved_tensors,
    set_learning_rate,
    trainable,
)
from trainer.order import batches, check_shares, stream_seed
from trainer.parallel import any_process, average_gradients, make_accelerator, mean_over_processes
from trainer.runs import claim_run_dir, code_version, read_run, run_lock
from trainer.task import Task
from triptych.errors import TriptychError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """The numbers of a run that are not tensors; saved as state.json."""

    step: int = 0  # finished optimizer steps
    samples: int = 0
    best_value: float | None = None
    best_step: int | None = None
    stale_validations: int = 0  # since the best one
    skipped_steps: int = 0  # non-finite ones, in all
    bad_streak: int = 0  # non-finite ones, in a row
    wall_s: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    sums: dict[str, float] = field(default_factory=dict)  # over the finite steps of the log interval under way
    counted: int = 0  # those steps

    def count_step(self, config: TrainConfig, scalars: dict[str, float], finite: bool) -> None:
        """One more step; TriptychError when too many in a row were not finite."""
        self.step += 1
        self.samples += config.batch_size
        if finite:
            self.bad_streak = 0
            self.counted += 1
            for key, value in scalars.items():
                self.sums[key] = self.sums.get(key, 0.0) + value
            return
        self.skipped_steps += 1
        self.bad_streak += 1
        if self.bad_streak >= config.max_bad_steps:
            raise TriptychError(
                f"the loss or its gradient was not finite {self.bad_streak} times in a row up to step {self.step} "
                f"(loss {scalars['loss']}, gradient norm {scalars['grad_norm']}): lower lr or check the data"
            )

    def end_interval(self) -> dict[str, float]:
        """The means of the log interval, which begins anew."""
        means = {key: value / self.counted for key, value in self.sums.items()}
        self.sums, self.counted = {}, 0
        return means | {"skipped_steps": self.skipped_steps}


@dataclass
class Session:
    """A run opened in this process."""

    config: TrainConfig
    run_dir: Path
    task: Task
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    progress: Progress
    accelerator: Accelerator

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def train(config: TrainConfig, run_dir: Path, *, recipe: str = "", device: str = "auto") -> str:
    """Trains a run from its newest complete checkpoint, or from the start, to the end of its config.

    Returns the sentence that says how it ended: finished, stopped early, or interrupted (Ctrl-C, SIGTERM) and saved.
    Raises TriptychError when the folder belongs to another run, the processes cannot share a batch, memory runs out,
    nothing can be saved, or the loss stays non-finite.
    """
    accelerator = make_accelerator(device)
    check_shares(config, accelerator.num_processes)
    if accelerator.is_main_process:
        claim_run_dir(run_dir, config, recipe)
    exclusive = run_lock(run_dir, enabled=accelerator.is_main_process)
    with exclusive, explained(config, accelerator.num_processes):
        if accelerator.is_main_process:
            remove_unfinished(run_dir / "checkpoints")
        accelerator.wait_for_everyone()
        run = open_session(config, run_dir, accelerator)
        if ended := _how_it_ended(run, []):
            return ended
        with (
            RunLog(run_dir, config, run.progress.step, enabled=accelerator.is_main_process) as log,
            stop_signals() as received,
        ):
            sentence = _loop(run, log, received)
    accelerator.end_training()
    return sentence


def _loop(run: Session, log: RunLog, received: list[str]) -> str:
    config, progress, accelerator, model = run.config, run.progress, run.accelerator, run.model
    main = accelerator.is_main_process
    parameters = list(trainable(model).values())
    order = batch_order(run.task, config, progress.step, accelerator.process_index, accelerator.num_processes)
    memory = memory_controller(model, config, accelerator.device)
    clock = Clock(run)
    ended, failure = None, None
    model.train()
    with batches(run.task, order, config.workers, accelerator.device) as supply:
        while True:
            step = progress.step
            set_learning_rate(run.optimizer, learning_rate(step, config), step)
            totals: dict[str, torch.Tensor] = {}
            for part in order.parts(step):
                batch = next(supply)
                torch.manual_seed(stream_seed(config.seed, "loss", part.samples[0]))
                with frozen_groups(run.optimizer, step), memory.watching(part.cost):
                    with autocast(config, accelerator.device):
                        loss, extras = run.task.loss(model, batch, step)
                    (loss * part.share).backward()
                _add(totals, {"loss": loss, **extras}, part.share)
            average_gradients(accelerator, parameters)
            totals["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            scalars = mean_over_processes(accelerator, totals)
            if finite := math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"]):
                run.optimizer.step()
                run.ema.update(step)
            run.optimizer.zero_grad(set_to_none=True)
            progress.count_step(config, scalars, finite)

            if _due(progress.step, config.log_every, config):
                clock_line = clock.read(learning_rate(step, config)) | memory.report()
                log.train_line(progress.step, progress.end_interval(), clock_line)
            if main:
                improved = _due(progress.step, config.validate_every, config) and _validate(run, log)
                if _due(progress.step, config.pictures_every, config):
                    _save_pictures(run)
                ended = _how_it_ended(run, received)
                if improved or ended or clock.checkpoint_due():
                    failure = _save(run, clock)
            if any_process(accelerator, bool(ended or failure or received)):
                break
    if main and not (ended or failure):  # the signal came to another process, or after the save
        ended, failure = _how_it_ended(run, received or ["a signal"]), _save(run, clock)
    if failure:
        raise TriptychError(f"training stopped at step {progress.step}, {clock.last_save()} is intact: {failure}")
    return ended or f"stopped at step {progress.step} with the main process"


def open_session(config: TrainConfig, run_dir: Path, accelerator: Accelerator) -> Session:
    """Model, optimizer, EMA and progress, from the newest complete checkpoint when there is one."""
    report = print if accelerator.is_main_process else _quiet
    task, model = _task_and_model(config, accelerator.device)
    if config.init_from:
        _start_from(model, Path(config.init_from), report)
    optimizer = build_optimizer(model, config)
    run = Session(config, run_dir, task, model, optimizer, Ema(model, config.ema_decay), Progress(), accelerator)
    if checkpoint := next(complete_checkpoints(run.checkpoints, report), None):
        _load(run, checkpoint)
        report(f"resuming {run_dir} at step {checkpoint.step} of {config.steps}")
        if checkpoint.state.get("data_sha256") not in (None, _data_sha256(task)):
            report(
                f"the training data is not what it was up to step {checkpoint.step}, so that this run is not what it "
                "would have been without the interruption: put the old data back to have that, or go on"
            )
    return run


def open_trained(run_dir: Path, which: str, device: str) -> tuple[Session, Checkpoint]:
    """A run with the weights of one checkpoint ("last", "best" or a step number), for evaluation and export."""
    config, _ = read_run(run_dir)
    checkpoint = find_checkpoint(run_dir / "checkpoints", which)
    accelerator = make_accelerator(device)
    task, model = _task_and_model(config, accelerator.device)
    optimizer = build_optimizer(model, config)
    run = Session(config, run_dir, task, model, optimizer, Ema(model, config.ema_decay), Progress(), accelerator)
    _load(run, checkpoint)
    return run, checkpoint


@contextmanager
def evaluating(run: Session) -> Iterator[torch.nn.Module]:
    """The model in eval mode with EMA weights, without gradients, in the run's precision, under a fixed seed."""
    run.model.eval()
    torch.manual_seed(stream_seed(run.config.seed, "evaluate", 0))
    with torch.no_grad(), run.ema.in_place_of_weights(), autocast(run.config, run.accelerator.device):
        yield run.model
    run.model.train()


def evaluate(run: Session) -> dict[str, float]:
    """The task's validation metrics of the EMA weights."""
    with evaluating(run) as model:
        return {key: float(value) for key, value in run.task.validate(model).items()}


def export(run_dir: Path, folder: Path, which: str = "last", device: str = "auto") -> dict[str, Any]:
    """Writes the task's components with EMA weights into ``folder`` (new or empty); returns their provenance."""
    if folder.exists() and any(folder.iterdir()):
        raise TriptychError(f"{folder} is not empty: choose another --out")
    _, recipe = read_run(run_dir)
    run, checkpoint = open_trained(run_dir, which, device)
    state = checkpoint.state
    provenance = {
        "run": run.config.name,
        "recipe": recipe,
        "config": config_to_dict(run.config),
        **{key: state[key] for key in ("step", "samples", "wall_s", "metrics", "commit", "dirty", "device")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with evaluating(run) as model:
        run.task.export(model, folder, provenance)
    return provenance


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16")


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM in the list it yields; a second one interrupts at once."""
    received: list[str] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Clock:
    """Wall time, throughput, and when the next checkpoint is due."""

    def __init__(self, run: Session) -> None:
        self.run = run
        self.began = self.saved_at = self.read_at = time.monotonic()
        self.wall_before_s = run.progress.wall_s
        self.read_samples = run.progress.samples
        self.saved_step = run.progress.step
        self.version = code_version()

    def wall_s(self) -> float:
        return self.wall_before_s + time.monotonic() - self.began

    def read(self, rate: float) -> dict[str, float]:
        """What the log says beside the losses, since the last reading."""
        now, samples = time.monotonic(), self.run.progress.samples
        samples_per_s = (samples - self.read_samples) / max(1e-9, now - self.read_at)
        self.read_at, self.read_samples = now, samples
        return {"lr": rate, "samples": samples, "samples_per_s": samples_per_s, "wall_s": self.wall_s()}

    def checkpoint_due(self) -> bool:
        config = self.run.config
        minutes = (time.monotonic() - self.saved_at) / 60
        by_time = config.checkpoint_minutes > 0 and minutes >= config.checkpoint_minutes
        return by_time or _due(self.run.progress.step, config.checkpoint_every, config)

    def saved(self) -> None:
        self.saved_at, self.saved_step = time.monotonic(), self.run.progress.step

    def last_save(self) -> str:
        return f"the checkpoint of step {self.saved_step}" if self.saved_step else "the run's config"


def _task_and_model(config: TrainConfig, device: torch.device) -> tuple[Task, torch.nn.Module]:
    if device.type == "cuda" and config.precision == "bf16":
        torch.set_float32_matmul_precision("high")
    task: Task = build_task(config)
    torch.manual_seed(config.seed)
    model = task.build_model().to(device)
    task.setup(device)
    return task, model


def _data_sha256(task: Any) -> str | None:
    """Of the task's training data, where it says."""
    return task.data_sha256() if hasattr(task, "data_sha256") else None


def _start_from(model: torch.nn.Module, path: Path, report: Callable[[str], None]) -> None:
    source = load_weights(path)
    target = {name: p.detach() for name, p in model.named_parameters()} | persistent_buffers(model)
    load_tensors({name: tensor for name, tensor in target.items() if name in source}, source, f"init_from {path}")
    if fresh := sorted(trainable(model).keys() - source.keys()):
        report(
            f"init_from {path}: {len(fresh)} trainable tensors are not in it and start fresh, the first is {fresh[0]}"
        )


def _load(run: Session, checkpoint: Checkpoint) -> None:
    load_tensors(saved_tensors(run.model), checkpoint.tensors("model"), f"{checkpoint.path}")
    load_tensors(run.ema.tensors, checkpoint.tensors("ema"), f"{checkpoint.path} (EMA)")
    updates = checkpoint.json("optimizer")["updates"]
    load_optimizer_state(run.model, run.optimizer, checkpoint.tensors("optimizer"), updates)
    known = {item.name for item in dataclasses.fields(Progress)}
    run.progress = Progress(**{key: value for key, value in checkpoint.state.items() if key in known})


def _save(run: Session, clock: Clock) -> TriptychError | None:
    """Saves this step unless it is saved already; a failure is returned, so that all processes can stop together."""
    progress = run.progress
    if clock.saved_step == progress.step:
        return None
    progress.wall_s = clock.wall_s()
    moments, updates = optimizer_state(run.model, run.optimizer)
    state = dataclasses.asdict(progress) | clock.version
    state |= {"config_sha256": config_hash(run.config), "device": describe_device(run.accelerator)}
    state |= {"data_sha256": _data_sha256(run.task)}
    try:
        save_checkpoint(
            run.checkpoints,
            progress.step,
            {"model": saved_tensors(run.model), "ema": run.ema.tensors, "optimizer": moments},
            {"optimizer": {"class": run.config.optimizer, "updates": updates}, "state": state},
        )
        rotate(run.checkpoints, run.config.keep_checkpoints, progress.best_step)
    except TriptychError as error:
        return error
    clock.saved()
    return None


def _validate(run: Session, log: RunLog) -> bool:
    """Runs the fixed protocol and keeps the best; whether this one is."""
    config, progress = run.config, run.progress
    metrics = evaluate(run)
    if config.best_metric not in metrics:
        raise TriptychError(f"validation gave no {config.best_metric!r}, {nearest(config.best_metric, metrics)}")
    log.validation_line(progress.step, metrics)
    value, best = metrics[config.best_metric], progress.best_value
    higher = config.best_is == "highest"
    better = math.isfinite(value) and (best is None or (value > best if higher else value < best))
    progress.metrics = metrics
    if better:
        progress.best_value, progress.best_step, progress.stale_validations = value, progress.step, 0
    else:
        progress.stale_validations += 1
    return better


def _save_pictures(run: Session) -> None:
    with evaluating(run) as model:
        sheet = run.task.pictures(model)
    if sheet is not None:
        folder = run.run_dir / "pictures"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step_{run.progress.step:07d}.png")


def _how_it_ended(run: Session, received: list[str]) -> str | None:
    config, progress = run.config, run.progress
    if progress.step >= config.steps:
        return f"finished: {run.run_dir} is trained to step {progress.step} of {config.steps}"
    if 0 < config.early_stop_patience <= progress.stale_validations:
        return (
            f"stopped early at step {progress.step}: {config.best_metric} has not improved for "
            f"{progress.stale_validations} validations, best {progress.best_value} at step {progress.best_step}"
        )
    if received:
        return f"interrupted by {received[0]} at step {progress.step} and saved: python -m trainer resume {run.run_dir}"
    return None


def _due(step: int, every: int, config: TrainConfig) -> bool:
    return bool(every) and (step % every == 0 or step == config.steps)


def _add(totals: dict[str, torch.Tensor], values: dict[str, Any], share: float) -> None:
    device = values["loss"].device
    for key, value in values.items():
        part = torch.as_tensor(value, device=device).detach().float() * share
        totals[key] = totals[key] + part if key in totals else part


def describe_device(accelerator: Accelerator) -> str:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{accelerator.num_processes} x {name}"


def _quiet(sentence: str) -> None:
    pass
