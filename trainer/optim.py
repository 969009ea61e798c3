"""AdamW and Muon, the learning-rate schedule, the EMA, and their state as named tensors (nothing is ever pickled)."""

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


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that step together. Muon (Jordan et al. 2024) makes the update of a matrix orthogonal; it is
    scaled to the size of AdamW's (Liu et al. 2025), so that one learning rate and one weight decay serve both."""

    def __init__(self, adamw: torch.optim.AdamW | None, muon: torch.optim.Optimizer) -> None:
        self.parts = [part for part in (adamw, muon) if part]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


def _is_inner_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether it is a matrix of one of several equal blocks, which have a number in their names; what lies before and
    behind them (embeddings, projections to and from pixels or words) is none."""
    return parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))


def build_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The config's optimizer, in groups as the config has them; weight decay on parameters with two or more axes only
    (not on biases and norms). TriptychError where nothing can be trained at the first step, where a group matches
    nothing, and for Muon without a matrix to train or with a torch that lacks it."""
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
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)
    inner = {parameter for name, parameter in parameters.items() if _is_inner_matrix(name, parameter)}
    if not hasattr(torch.optim, "Muon"):
        raise TriptychError(f"optimizer muon needs torch 2.9, this is {torch.__version__}: update it, or choose adamw")
    if not inner:
        raise TriptychError("optimizer muon: no matrix of repeated blocks is trained: choose adamw")
    split = [
        [group | {"params": found} for group in groups if (found := [p for p in group["params"] if (p in inner) is of])]
        for of in (False, True)
    ]
    adamw = torch.optim.AdamW(split[0], lr=config.lr, betas=config.betas, fused=fused) if split[0] else None
    return MuonAndAdamW(adamw, torch.optim.Muon(split[1], lr=config.lr, adjust_lr_fn="match_rms_adamw"))


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
MUON_MOMENTS = ("momentum_buffer",)


def _owners(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, tuple[torch.optim.Optimizer, tuple[str, ...]]]:
    """The optimizer that updates each parameter, and the names of the moments that it keeps of it."""
    parts = optimizer.parts if isinstance(optimizer, MuonAndAdamW) else [optimizer]
    return {
        parameter: (part, MOMENTS if isinstance(part, torch.optim.AdamW) else MUON_MOMENTS)
        for part in parts
        for group in part.param_groups
        for parameter in group["params"]
    }


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, int]]:
    """The moments as ``moment.parameter`` tensors, and the number of updates of each parameter (1 for Muon, which does
    not count them)."""
    tensors: Tensors = {}
    updates: dict[str, int] = {}
    owners = _owners(optimizer)
    for name, parameter in trainable(model).items():
        part, moments = owners[parameter]
        if state := part.state.get(parameter):  # absent until the parameter's first update
            updates[name] = int(state.get("step", 1))
            tensors |= {f"{moment}.{name}": state[moment] for moment in moments}
    return tensors, updates


def load_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors, updates: dict[str, int]
) -> None:
    """The inverse of optimizer_state; TriptychError when it belongs to other parameters."""
    parameters = trainable(model)
    if unknown := sorted(updates.keys() - parameters.keys()):
        raise TriptychError(f"optimizer state: parameter {unknown[0]!r} is unknown to the model")
    owners = _owners(optimizer)
    for name, count in updates.items():
        parameter = parameters[name]
        part, kept = owners[parameter]
        moments = {moment: torch.empty_like(parameter, requires_grad=False) for moment in kept}
        load_tensors(
            moments, {m: tensors[f"{m}.{name}"] for m in kept if f"{m}.{name}" in tensors}, f"optimizer {name}"
        )
        if "exp_avg" in moments:
            fused = bool(part.param_groups[0].get("fused"))
            moments["step"] = torch.tensor(float(count), device=parameter.device if fused else "cpu")
        part.state[parameter] = moments


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
