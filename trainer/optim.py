"""AdamW, the learning-rate schedule, the EMA, and their state as named tensors (nothing is ever pickled)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch

from trainer.config import ParameterGroup, TrainConfig
from triptych.errors import TriptychError

Tensors = dict[str, torch.Tensor]


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that require gradients, by name; shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def persistent_buffers(model: torch.nn.Module) -> Tensors:
    """The buffers that belong to the state dict (running statistics and the like), by name."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def saved_tensors(model: torch.nn.Module) -> Tensors:
    """What a checkpoint holds of a model: trainable parameters and persistent buffers, not copied."""
    return {name: parameter.detach() for name, parameter in trainable(model).items()} | persistent_buffers(model)


@torch.no_grad()
def load_tensors(target: Tensors, source: Tensors, what: str) -> None:
    """Copies ``source`` into ``target`` in place; TriptychError unless names, shapes and dtypes are the same."""
    if missing := sorted(target.keys() - source.keys()):
        raise TriptychError(f"{what}: tensor {missing[0]!r} is missing ({len(missing)} in all): another model wrote it")
    if extra := sorted(source.keys() - target.keys()):
        raise TriptychError(f"{what}: tensor {extra[0]!r} is unknown to the model ({len(extra)} in all)")
    for name, tensor in target.items():
        if (tensor.shape, tensor.dtype) != (source[name].shape, source[name].dtype):
            raise TriptychError(
                f"{what}: {name} is {tuple(source[name].shape)} {source[name].dtype}, "
                f"the model needs {tuple(tensor.shape)} {tensor.dtype}"
            )
    for name, tensor in target.items():
        tensor.copy_(source[name])


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of optimizer step ``step`` (counted from 0): linear warm-up times the schedule."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        level = 1.0
    else:
        start = config.warmup_steps if config.schedule == "cosine" else config.steps * (1 - config.decay_share)
        done = min(1.0, max(0.0, (step - start) / max(1.0, config.steps - start)))
        remaining = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        level = config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining
    return config.lr * warmup * level


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, in groups as the config has them; weight decay on parameters with two or more axes only (not on biases and
    norms). TriptychError where nothing can be trained at the first step, or a group matches nothing."""
    parameters = trainable(model)
    if not parameters:
        raise TriptychError(
            f"task {config.task!r}: no parameter of the model requires gradients, nothing can be trained"
        )
    groups: list[dict[str, Any]] = []
    for rule, members in grouped(parameters, config.groups):
        decay = config.weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
        for matrices in (True, False):
            params = [p for p in members if (p.ndim >= 2) == matrices]
            groups.append({"params": params, "weight_decay": decay if matrices else 0.0, "rule": rule})
    groups = [group for group in groups if group["params"]]
    if all(_is_frozen(group["rule"], 0) for group in groups):
        raise TriptychError("config: the groups freeze every parameter at step 0: give one of them thaw_step 0")
    fused = all(p.is_cuda for p in parameters.values())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def grouped(
    parameters: dict[str, torch.nn.Parameter], rules: tuple[ParameterGroup, ...]
) -> list[tuple[ParameterGroup | None, list[torch.nn.Parameter]]]:
    """The parameters of each rule, and first (None) those of no rule. TriptychError for a rule without any."""
    members: list[list[torch.nn.Parameter]] = [[] for _ in rules]
    others: list[torch.nn.Parameter] = []
    for name, parameter in parameters.items():
        place = next((i for i, rule in enumerate(rules) if fnmatchcase(name, rule.match)), None)
        (others if place is None else members[place]).append(parameter)
    for rule, found in zip(rules, members, strict=True):
        if not found:
            raise TriptychError(
                f"config: the group {rule.match!r} matches no trainable parameter that no earlier group has; "
                f"one of them is {next(iter(parameters))!r}"
            )
    return [(None, others), *zip(rules, members, strict=True)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, step: int = 0) -> None:
    """Sets the rate of every group for optimizer step ``step``, given that of the schedule."""
    for group in optimizer.param_groups:
        rule: ParameterGroup | None = group.get("rule")
        group["lr"] = rate if rule is None else rate * rule.lr_factor * _warmth(rule, step)


def _is_frozen(rule: ParameterGroup | None, step: int) -> bool:
    return rule is not None and (rule.thaw_step < 0 or step < rule.thaw_step)


def _warmth(rule: ParameterGroup, step: int) -> float:
    return min(1.0, max(0, step - rule.thaw_step + 1) / rule.warmup_steps) if rule.warmup_steps else 1.0


@contextmanager
def frozen_groups(optimizer: torch.optim.Optimizer, step: int) -> Iterator[None]:
    """Inside the block the parameters of groups that are not thawed yet require no gradients, and get none.

    Afterwards they do again, so that checkpoints and the EMA hold the same tensors all the time.
    """
    frozen = [p for group in optimizer.param_groups if _is_frozen(group.get("rule"), step) for p in group["params"]]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, int]]:
    """The moments as ``moment.parameter`` tensors, and the number of updates of each parameter."""
    tensors: Tensors = {}
    updates: dict[str, int] = {}
    for name, parameter in trainable(model).items():
        if state := optimizer.state.get(parameter):  # absent until the parameter's first update
            updates[name] = int(state["step"])
            tensors |= {f"{moment}.{name}": state[moment] for moment in MOMENTS}
    return tensors, updates


def load_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, updates: dict[str, int]
) -> None:
    """The inverse of optimizer_state; TriptychError when it belongs to other parameters."""
    parameters = trainable(model)
    if unknown := sorted(updates.keys() - parameters.keys()):
        raise TriptychError(f"optimizer state: parameter {unknown[0]!r} is unknown to the model")
    fused = bool(optimizer.param_groups[0].get("fused"))
    for name, count in updates.items():
        parameter = parameters[name]
        moments = {moment: torch.empty_like(parameter, requires_grad=False) for moment in MOMENTS}
        load_tensors(
            moments, {m: tensors[f"{m}.{name}"] for m in MOMENTS if f"{m}.{name}" in tensors}, f"optimizer {name}"
        )
        step = torch.tensor(float(count), device=parameter.device if fused else "cpu")
        optimizer.state[parameter] = {"step": step, **moments}


class Ema:
    """An exponential moving average of the trainable parameters, in float32 on their device.

    The decay is ``min(limit, (1 + step) / (10 + step))``, so that a short run gets a useful average too.
    """

    def __init__(self, model: torch.nn.Module, limit: float) -> None:
        self.limit = limit
        self.live = trainable(model)
        self.tensors: Tensors = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step ``step`` (counted from 0)."""
        decay = min(self.limit, (1 + step) / (10 + step)) if self.limit else 0.0
        averages = list(self.tensors.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self.live.values()], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """The model computes with the average inside the block, and has its own weights back afterwards."""
        own = {name: p.detach().clone() for name, p in self.live.items()}
        try:
            for name, parameter in self.live.items():
                parameter.copy_(self.tensors[name])
            yield
        finally:
            for name, parameter in self.live.items():
                parameter.copy_(own[name])
