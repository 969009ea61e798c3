"""What several processes must agree on: gradients, logged means, and when to stop.

Gradients are averaged here after the backward pass rather than by DistributedDataParallel: a task may then call any
method of its model and leave parameters unused, and one process and many run the same code. It does not overlap
communication with the backward pass, and it does not shard parameters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKET_NUMBERS = 1 << 24  # per all-reduce: large enough to fill a link, small enough to spare memory


def make_accelerator(device: str = "auto") -> Accelerator:
    """accelerate's view of this process; ``device`` is "auto" or "cpu"."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(
        mixed_precision="no",  # the loop casts by itself; a launcher's setting must not change a run's numbers
        cpu=device == "cpu",
        # The others wait while the main process validates and saves.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
    )


def say(sentence: str) -> None:
    """Tells the user something once, whatever the number of processes; on stderr, for stdout may be read as JSON."""
    if os.environ.get("RANK", "0") == "0":
        print(sentence, file=sys.stderr, flush=True)


def average_gradients(accelerator: Accelerator, parameters: list[torch.nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the processes; a parameter unused in all of them keeps None."""
    if accelerator.num_processes == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    everywhere = accelerator.reduce(used, "sum").tolist()
    for bucket in _buckets(p for p, count in zip(parameters, everywhere, strict=True) if count):
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        flat = accelerator.reduce(torch.cat([grad.reshape(-1) for grad in grads]), "mean")
        for parameter, mean in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = mean.view_as(parameter)


def mean_over_processes(accelerator: Accelerator, scalars: dict[str, torch.Tensor]) -> dict[str, float]:
    """The mean of each scalar over the processes; all processes give the same keys."""
    values = torch.stack([value.float() for value in scalars.values()])
    if accelerator.num_processes > 1:
        values = accelerator.reduce(values, "mean")
    return dict(zip(scalars, values.tolist(), strict=True))


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether ``flag`` is set in any process; the same answer in all of them."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    buckets: list[list[torch.nn.Parameter]] = []
    numbers = 0
    for parameter in parameters:
        fits = numbers + parameter.numel() <= BUCKET_NUMBERS
        if buckets and fits and buckets[-1][0].dtype == parameter.dtype:
            buckets[-1].append(parameter)
            numbers += parameter.numel()
        else:
            buckets.append([parameter])
            numbers = parameter.numel()
    return buckets
