"""What the training loop asks of a task, and nothing else.

A task owns its model, data, loss, fixed validation and sample pictures; the loop owns everything that is the same for
all of them. ``class MyTask(Task)`` states the type of its config once, as the annotation of ``config``, and takes
it as its only constructor argument: the config files and ``--set`` are checked against that type.

Randomness: ``build_model`` runs under ``torch.manual_seed(config.seed)``. ``sample(index, seed)`` makes its own
``numpy.random.default_rng(seed)`` or ``torch.Generator`` and touches no global state; this is what makes a resumed run
equal an uninterrupted one. ``loss`` may use torch's global generator (dropout): the loop seeds it before every call
from the number of the first sample in the batch, so it is exact on resume, but it depends on how a batch is divided
over processes. Draw noise and time steps in ``sample`` and this last dependence disappears.

Three methods are looked for beside those of the protocol: ``cost(index) -> int`` for balanced batches
(trainer.balance); the static ``memory_remedies(config) -> list[str]``, what a run that is out of memory can change; and
``data_sha256() -> str`` of what the training samples are, which checkpoints note, so that a run that goes on with
others says so.

With ``workers > 0``, ``sample`` and ``collate`` run in other processes: keep them on the CPU, and keep the task
picklable for platforms that do not fork.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from PIL import Image


def stack_samples(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The usual collation: every key stacked along a new first axis; all samples have the same keys and shapes."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class Task(Protocol):
    """One trainable job. Subclass it to inherit the two defaults, or just have these methods."""

    config: Any  # annotate with the task's own dataclass

    def build_model(self) -> torch.nn.Module:
        """The network on the CPU, deterministic under the global seed; trainable parameters have requires_grad.

        Checkpoints hold trainable parameters and persistent buffers only: frozen parameters must come back
        identical from this call.
        """
        ...

    def setup(self, device: torch.device) -> None:
        """Opens the data and places frozen helpers on ``device``; called once, before any method below."""
        ...

    def size(self) -> int:
        """The number of training samples (objects x variants), at least 1."""
        ...

    def sample(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        """Training sample ``index`` in [0, size) as CPU tensors: a pure function of (index, seed), 0 <= seed < 2^63."""
        ...

    def collate(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return stack_samples(samples)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any], step: int
    ) -> tuple[torch.Tensor, dict[str, float | torch.Tensor]]:
        """The scalar mean over the batch's samples, and further scalars to log.

        ``model`` is the module of build_model, in train mode, on the device, under autocast; ``batch`` is there too;
        ``step`` is the number of finished optimizer steps. Any method of the model may be called, and a parameter
        may stay unused: gradients are averaged over processes after the backward pass.
        """
        ...

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """A fixed protocol on held-out data, in eval mode, without gradients, usually with "loss" (lower is better)."""
        ...

    def pictures(self, model: torch.nn.Module) -> Image.Image | None:
        """A sheet of samples to look at, or None."""
        return None

    def export(self, model: torch.nn.Module, folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the trained components of a bundle into the existing empty ``folder``."""
        ...
