"""The typed configuration of a run: one frozen dataclass, its JSON form, and ``--set`` overrides.

Values are checked against the annotations of the dataclasses, nested ones included: bool, int, float, str, Path,
Literal, Optional, tuple, list, dict and dataclasses. Anything unknown is an error that names the nearest key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from trainer.names import nearest
from trainer.tasks import find_task
from triptych.errors import TriptychError

_AT_LEAST = {
    0: (
        *("seed", "warmup_steps", "weight_decay", "grad_clip", "workers", "checkpoint_every", "checkpoint_minutes"),
        *("validate_every", "pictures_every", "early_stop_patience", "max_cost", "memory_gib"),
    ),
    1: ("steps", "batch_size", "accumulation", "log_every", "keep_checkpoints", "max_bad_steps"),
}


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at a rate of their own, or later.

    match: pattern of their full names (``view_encoder.*``; * ? [] as in a shell, * also across dots). A parameter
    belongs to the first group that matches it; those of none learn at the config's rate from the start.
    """

    match: str
    lr_factor: float = 1.0  # times the rate of the schedule
    thaw_step: int = 0  # frozen before this step; -1: frozen for good
    warmup_steps: int = 0  # linear, from thaw_step on, beside the warm-up of the schedule
    weight_decay: float | None = None  # None: the config's

    def __post_init__(self) -> None:
        if not self.match:
            raise TriptychError("config: a parameter group needs a pattern in match, got an empty one")
        if not (math.isfinite(self.lr_factor) and self.lr_factor > 0):
            raise TriptychError(f"config: lr_factor of the group {self.match!r} must be above 0, got {self.lr_factor}")
        if self.thaw_step < -1 or self.warmup_steps < 0 or (self.weight_decay is not None and self.weight_decay < 0):
            raise TriptychError(
                f"config: the group {self.match!r} needs thaw_step >= -1, warmup_steps >= 0 and weight_decay >= 0, got "
                f"{self.thaw_step}, {self.warmup_steps} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run's numbers, and how often it reports and saves. An interval of 0 means never."""

    name: str  # the run's folder under runs/
    task: str  # a name in trainer.tasks.TASKS, or "module:Class"
    task_config: Any  # the task's own dataclass
    steps: int  # optimizer steps in all
    batch_size: int  # samples per optimizer step, over all processes and accumulation
    lr: float
    seed: int = 0
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"  # wsd: warm up, stay, decay
    warmup_steps: int = 100
    decay_share: float = 0.2  # of the steps, at the end of "wsd"
    min_lr_ratio: float = 0.0  # the last learning rate over lr
    weight_decay: float = 0.0  # on parameters with two or more axes
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of repeated blocks; adamw for the rest
    grad_clip: float = 1.0  # L2 norm over all parameters; 0: no clipping
    accumulation: int = 1  # backward passes per step
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast; parameters and EMA stay float32
    ema_decay: float = 0.999  # the limit of a ramp (1 + step) / (10 + step); 0: the EMA equals the weights
    workers: int = 0  # data processes beside each training process; 0: samples are made in it
    checkpoint_every: int = 1000  # steps
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3  # the newest ones, beside the best one
    validate_every: int = 0  # steps; also after the last step
    pictures_every: int = 0  # steps; also after the last step
    log_every: int = 10  # steps
    best_metric: str = "loss"  # a key of Task.validate
    best_is: Literal["lowest", "highest"] = "lowest"
    early_stop_patience: int = 0  # validations without improvement
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops
    tensorboard: bool = True  # when the package is installed
    init_from: str | None = None  # a .safetensors file, a checkpoint folder or a run folder to start from
    groups: tuple[ParameterGroup, ...] = ()  # rates and thaw steps by parameter name
    max_cost: int = 0  # of one backward pass, in units of Task.cost; above 0 batches are balanced (trainer.balance)
    memory_target: float = 0.0  # share of the device to fill by recomputing few blocks; 0: as the task says
    memory_gib: float = 0.0  # of the device; 0: what it has. Needed for a memory_target without CUDA

    def __post_init__(self) -> None:
        for low, keys in _AT_LEAST.items():
            for key in keys:
                if not getattr(self, key) >= low:
                    raise TriptychError(f"config: {key} must be at least {low}, got {getattr(self, key)}")
        for key, high in {"ema_decay": 1.0, "min_lr_ratio": 1.0, "decay_share": 1.0, "memory_target": 1.0}.items():
            if not 0 <= getattr(self, key) <= high:
                raise TriptychError(f"config: {key} must lie in [0, {high:g}], got {getattr(self, key)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise TriptychError(f"config: lr must be positive and finite, got {self.lr}")
        if self.ema_decay == 1:
            raise TriptychError("config: ema_decay must be below 1, got 1.0: the average would never leave its start")
        if self.batch_size % self.accumulation:
            raise TriptychError(
                f"config: batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )
        if self.early_stop_patience and not self.validate_every:
            raise TriptychError("config: early_stop_patience needs validate_every > 0")
        if not self.name or Path(self.name).name != self.name:
            raise TriptychError(f"config: name must be a plain folder name, got {self.name!r}")


def build_task(config: TrainConfig) -> Any:
    """The task object of a config."""
    return find_task(config.task)(config.task_config)


def task_config_type(task: str) -> type:
    """The dataclass that a task's class annotates its ``config`` with."""
    task_class = find_task(task)
    hint = typing.get_type_hints(task_class).get("config")
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        raise TypeError(f"{task_class.__qualname__} must annotate `config` with its dataclass, got {hint!r}")
    return hint


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON values; tuples become lists, paths become strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=_path_to_text, allow_nan=False))


def config_from_dict(data: dict[str, Any]) -> TrainConfig:
    """The inverse of config_to_dict, strict: unknown and mistyped keys are errors.

    A missing key takes its default, so that a run outlives a new option; without a default it is an error.
    """
    if not isinstance(data, dict) or not isinstance(data.get("task"), str):
        raise TriptychError("config: 'task' is missing or not a string; the run's config.json is not a trainer config")
    return _dataclass_from_dict(data, TrainConfig, "", task_config_type(data["task"]))


def config_hash(config: TrainConfig) -> str:
    """sha256 over the canonical JSON of the config."""
    return hashlib.sha256(json.dumps(config_to_dict(config), sort_keys=True).encode()).hexdigest()


def apply_overrides(config: TrainConfig, assignments: list[str]) -> TrainConfig:
    """The config with ``key=value`` texts applied, all at once; keys of nested dataclasses are dotted.

    Numbers, booleans (true/false), strings as they are, ``none`` for optional values, ``1,2,3`` for tuples and lists,
    JSON for anything deeper. Raises TriptychError with the key and the value.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise TriptychError(f"--set {assignment!r}: expected key=value, as in --set lr=1e-4")
        path = key.strip().split(".")
        owner: Any = config
        branch = changes
        for depth, part in enumerate(path):
            where = ".".join(path[: depth + 1])
            if not dataclasses.is_dataclass(owner):
                raise TriptychError(f"--set {key}: {'.'.join(path[:depth])} has no fields (it is {owner!r})")
            hints = _hints(type(owner))
            if part not in hints:
                raise TriptychError(f"--set {where}: unknown key, {nearest(part, hints)}")
            if depth + 1 < len(path):
                owner = getattr(owner, part)
                branch = branch.setdefault(part, {})
            elif dataclasses.is_dataclass(getattr(owner, part)):
                first = next(iter(_hints(type(getattr(owner, part)))))
                raise TriptychError(f"--set {where}: set its fields, as in --set {where}.{first}=...")
            else:
                branch[part] = _Leaf(parse_text(text.strip(), hints[part], where))
    if isinstance(changes.get("task"), _Leaf):
        raise TriptychError("--set task: a recipe's task is fixed, choose another recipe")
    return _replace(config, changes)


def differing_keys(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two JSON objects."""
    keys: list[str] = []
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b or (key in first) != (key in second):
            keys.append(prefix + key)
    return keys


@dataclass(frozen=True)
class _Leaf:
    value: Any  # told apart from a branch, which is a dict


def _replace(owner: Any, changes: dict[str, Any]) -> Any:
    values = {
        key: change.value if isinstance(change, _Leaf) else _replace(getattr(owner, key), change)
        for key, change in changes.items()
    }
    return dataclasses.replace(owner, **values)


def _hints(owner: type) -> dict[str, Any]:
    hints = typing.get_type_hints(owner)
    return {field.name: hints[field.name] for field in dataclasses.fields(owner) if field.init}


def _path_to_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a config value of type {type(value).__name__} has no JSON form: {value!r}")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def parse_text(text: str, hint: Any, key: str) -> Any:
    """A command-line text as a value of type ``hint``; TriptychError names ``key``, the text and the type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if _is_union(hint):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        return _first_that_fits(text, hint, key, parse_text)
    if origin is Literal:
        if text not in arguments:
            raise TriptychError(f"{key}={text!r}: must be one of {', '.join(map(str, arguments))}")
        return text
    if origin in (tuple, list):
        if text.startswith("[") or "{" in text:
            return value_from_json(_json_from_text(text, key), hint, key)
        inner = text.strip("()").strip()
        parts = [part.strip() for part in inner.rstrip(",").split(",")] if inner else []
        return _sequence(parts, hint, key, parse_text)
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise TriptychError(f"{key}={text!r}: expected true or false")
        return text.lower() in ("true", "1", "yes")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise TriptychError(f"{key}={text!r}: expected {'an integer' if hint is int else 'a number'}") from None
    if hint in (str, Path):
        return hint(text)
    return value_from_json(_json_from_text(text, key), hint, key)


def value_from_json(value: Any, hint: Any, key: str) -> Any:
    """A JSON value as a value of type ``hint``, strictly: no text becomes a number and no 1 becomes True."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if _is_union(hint):
        if value is None and type(None) in arguments:
            return None
        return _first_that_fits(value, hint, key, value_from_json)
    if origin is Literal and value in arguments:
        return value
    if origin in (tuple, list) and isinstance(value, list):
        return _sequence(value, hint, key, value_from_json)
    if origin is dict and isinstance(value, dict):
        return {name: value_from_json(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _dataclass_from_dict(value, hint, f"{key}.")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, int, str) and type(value) is hint:
        return value
    raise TriptychError(f"config: {key} must be {_describe(hint)}, got {value!r}")


def _sequence(parts: list[Any], hint: Any, key: str, convert: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or arguments[-1] is Ellipsis:
        return origin(convert(part, arguments[0], f"{key}[{i}]") for i, part in enumerate(parts))
    if len(parts) != len(arguments):
        raise TriptychError(f"{key}: expected {len(arguments)} values, got {len(parts)} ({parts!r})")
    return tuple(
        convert(part, item, f"{key}[{i}]") for i, (part, item) in enumerate(zip(parts, arguments, strict=True))
    )


def _first_that_fits(value: Any, union: Any, key: str, convert: Any) -> Any:
    options = [option for option in typing.get_args(union) if option is not type(None)]
    for option in options:
        try:
            return convert(value, option, key)
        except TriptychError:
            if len(options) == 1:
                raise
    raise TriptychError(f"{key}={value!r}: expected {_describe(union)}")


def _dataclass_from_dict(data: dict[str, Any], owner: type, prefix: str, task_type: type | None = None) -> Any:
    hints = _hints(owner) | ({"task_config": task_type} if task_type else {})
    for key in data:
        if key not in hints:
            raise TriptychError(f"config: unknown key {prefix + key!r}, {nearest(key, hints)}")
    required = {field.name for field in dataclasses.fields(owner) if _has_no_default(field)}
    if missing := [prefix + key for key in hints if key in required and key not in data]:
        raise TriptychError(f"config: missing {', '.join(missing)}; write it or start from the recipe again")
    return owner(**{key: value_from_json(value, hints[key], prefix + key) for key, value in data.items()})


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _json_from_text(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TriptychError(f"{key}={text!r}: expected JSON ({error})") from None


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
