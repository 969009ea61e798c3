"""Euler sampling of a rectified flow, with guidance in an interval of times (TRELLIS, arXiv 2412.01506; 2404.07724).

Time runs from 1 (noise) to 0 (data); the network sees 1000 t and predicts the velocity dx/dt. `rescale_t` spends more
of the steps near the noise end. Nothing here knows what is sampled: a dense grid or a sparse tensor, anything with `-`,
`*` by a number, and `shape[0]` (or `batch_size`) samples. The caller draws the noise, on the CPU, so that a seed means
the same everywhere.

Several pictures of one object (tuning-free, for networks trained with one): `cycle_conditions` shows them in turn, one
per step; `multidiffusion` averages the velocities they lead to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import TriptychError

ModelFn = Callable[[Any, Tensor, Any], Any]  # (x, 1000 t (B,), condition) -> velocity like x


class Cancelled(RuntimeError):
    """The caller's `cancel` asked to stop."""


@dataclass(frozen=True)
class FlowSamples:
    """`samples`, and after each step (only with keep_trajectory): x, the x_0 foreseen by the step, and the velocity."""

    samples: Any
    pred_x_t: list[Any] = field(default_factory=list)
    pred_x_0: list[Any] = field(default_factory=list)
    v: list[Any] = field(default_factory=list)


def flow_times(steps: int, rescale_t: float = 1.0) -> list[float]:
    """The steps + 1 times from 1 to 0: evenly spaced t mapped to r t / (1 + (r - 1) t)."""
    if steps < 1:
        raise TriptychError(f"steps is {steps}: give at least 1")
    if not rescale_t > 0:
        raise TriptychError(f"rescale_t is {rescale_t}: give a number above 0 (1 leaves the times evenly spaced)")
    even = [1 - i / steps for i in range(steps + 1)]
    return [rescale_t * t / (1 + (rescale_t - 1) * t) for t in even]


@torch.no_grad()
def flow_euler_sample(
    model_fn: ModelFn,
    noise: Any,
    *,
    steps: int,
    guidance: float = 0.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    rescale_t: float = 1.0,
    sigma_min: float = 1e-5,
    cond: Any = None,
    neg_cond: Any = None,
    callback: Callable[[int, int, Any], None] | None = None,
    cancel: Callable[[], bool] | None = None,
    keep_trajectory: bool = False,
) -> FlowSamples:
    """Integrate from `noise` to data in `steps` evaluations of `model_fn(x, 1000 t, condition)`.

    While guidance_interval[0] <= t <= guidance_interval[1] (t after rescaling) the velocity is
    (1 + guidance) v(cond) - guidance v(neg_cond), two evaluations; elsewhere, and with guidance 0, it is v(cond), one.
    `cond`: a tensor (a batch of 1 serves all samples), a list of conditions for `multidiffusion`, a function of the
    step (`cycle_conditions`), or any other object, which is handed on untouched.
    `callback(step, steps, pred_x_0)` is called after each step, counted from 1. `cancel()` is asked before each step;
    when it returns True, Cancelled is raised. Raises TriptychError for settings out of range.
    """
    times = flow_times(steps, rescale_t)
    low, high = guidance_interval
    if not low <= high:
        raise TriptychError(f"guidance_interval is {guidance_interval}: its first value must not exceed its second")
    if guidance and neg_cond is None:
        raise TriptychError(f"guidance is {guidance}, which needs neg_cond: give one, or set guidance to 0")
    batch = _batch_size(noise)
    neg_cond = _repeat(neg_cond, batch)
    result = FlowSamples(noise)
    x, pred_x_t, pred_x_0, velocities = noise, result.pred_x_t, result.pred_x_0, result.v
    for step, (t, t_next) in enumerate(zip(times, times[1:], strict=False)):
        if cancel is not None and cancel():
            raise Cancelled(f"stopped before step {step + 1} of {steps}")
        t_model = torch.full((batch,), 1000 * t, dtype=torch.float32, device=noise.device)
        v = model_fn(x, t_model, _repeat(cond(step) if callable(cond) else cond, batch))
        if guidance and low <= t <= high:
            v = (1 + guidance) * v - guidance * model_fn(x, t_model, neg_cond)
        x_0 = (1 - sigma_min) * x - (sigma_min + (1 - sigma_min) * t) * v
        x = x - (t - t_next) * v
        if keep_trajectory:
            pred_x_t.append(x)
            pred_x_0.append(x_0)
            velocities.append(v)
        if callback is not None:
            callback(step + 1, steps, x_0)
    return FlowSamples(x, pred_x_t, pred_x_0, velocities)


def cycle_conditions(conditions: Sequence[Any]) -> Callable[[int], Any]:
    """`cond` of the `stochastic` mode: step i sees condition i mod N. With N > steps some are never seen."""
    if not len(conditions):
        raise TriptychError("no conditions to cycle through: give at least one view")
    return lambda step: conditions[step % len(conditions)]


def multidiffusion(model_fn: ModelFn) -> ModelFn:
    """A `model_fn` that takes a list of conditions and returns the mean of the velocities they lead to.

    A condition that is not a list (the negative one) passes through, so guidance acts on the mean.
    """

    def mean_velocity(x: Any, t: Tensor, cond: Any) -> Any:
        if not isinstance(cond, list):
            return model_fn(x, t, cond)
        total = model_fn(x, t, cond[0])
        for other in cond[1:]:
            total = total + model_fn(x, t, other)
        return total * (1 / len(cond))

    return mean_velocity


def _batch_size(noise: Any) -> int:
    return int(noise.batch_size if hasattr(noise, "batch_size") else noise.shape[0])


def _repeat(cond: Any, batch: int) -> Any:
    """A tensor with a batch of 1 serves all samples; lists hold one condition each; anything else is handed on."""
    if isinstance(cond, list):
        if not cond:
            raise TriptychError("the list of conditions is empty: give at least one view")
        return [_repeat(one, batch) for one in cond]
    if not isinstance(cond, Tensor) or cond.shape[0] == batch:
        return cond
    if cond.shape[0] != 1:
        raise TriptychError(f"the condition has {cond.shape[0]} samples for {batch} noises: give one, or one per noise")
    return cond.expand(batch, *cond.shape[1:])
