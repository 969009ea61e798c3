"""How deep is what a picture shows? A small network that answers with a number.

A small Flux model draws sides that look right and are too narrow or too wide: one number among thousands of pixels has
hardly a part in its loss. A residual network that is asked for nothing else learns it from the same objects in minutes
(docs/flux_training.md has the figures), so that sides which were drawn can be brought to the width that is likely.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import TriptychError
from ..geometry.files import write_files

FILE = "proportions.safetensors"
MOST = 3.0  # of the logarithm: thinner than a twentieth of the visible extent is as thin


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 one; halves the sides."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.SiLU(),
        )
        self.across = nn.Conv2d(channels, out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.across(x)


class Proportions(nn.Module):
    """(B, 4, size, size) pictures -> (B, 2): the natural logarithm of an object's depth by its largest visible extent,
    and that of the error to expect (mean absolute deviation).

    Pictures are sRGB 0-1, straight alpha, each object in the middle with its largest extent filling FRAME_FILL of the
    frame. They are small on purpose: prepared views have one scale, so what is deep was drawn small, and in larger
    pictures its blur would tell. A picture and its mirror image have the same answer once the network is in eval mode.
    """

    def __init__(self, size: int = 24, width: int = 32, blocks: int = 3, dropout: float = 0.3) -> None:
        super().__init__()
        if size < 1 << blocks:
            raise TriptychError(f"pictures of {size} px do not halve {blocks} times: choose a larger size")
        self.size, self.width, self.blocks, self.dropout = size, width, blocks, dropout
        channels = [width << i for i in range(blocks + 1)]
        self.stem = nn.Conv2d(4, width, 3, stride=2, padding=1)
        self.body = nn.Sequential(*[ResidualBlock(*pair) for pair in zip(channels, channels[1:], strict=False)])
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(channels[-1], 2))

    def config(self) -> dict[str, int | float]:
        """The constructor's arguments."""
        return {"size": self.size, "width": self.width, "blocks": self.blocks, "dropout": self.dropout}

    def forward(self, pictures: Tensor) -> Tensor:
        rgb, alpha = pictures[:, :3], pictures[:, 3:]
        x = torch.cat([(rgb - 0.5) * alpha, alpha], dim=1).contiguous(memory_format=torch.channels_last)
        return self._answer(x) if self.training else (self._answer(x) + self._answer(x.flip(-1))) / 2

    def _answer(self, x: Tensor) -> Tensor:
        mean, spread = self.head(self.body(self.stem(x)).mean((2, 3))).float().unbind(1)
        return torch.stack([mean, spread.clamp(-MOST, 1.0)], dim=1)


def laplace_loss(answers: Tensor, true: Tensor) -> Tensor:
    """The mean negative log-likelihood of (B,) logarithms under (B, 2) answers, up to a constant."""
    mean, spread = answers.unbind(1)
    return ((mean - true).abs() * torch.exp(-spread) + spread).mean()


def read_proportions(folder: Path, listed: Container[str]) -> Proportions | None:
    """The network of a views model's folder, in eval mode on the CPU; None where its card lists none.

    Raises TriptychError for a file of another network.
    """
    if FILE not in listed:
        return None
    path = folder / FILE
    try:
        with safe_open(str(path), "pt") as file:
            network = Proportions(**json.loads(file.metadata()["config"]))
            network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TriptychError(f"{path} is damaged or of another version ({error}): fetch the model again") from error
    return network.eval()


def write_proportions(network: Proportions, folder: Path) -> None:
    """The file that `read_proportions` reads, float16."""
    state = network.state_dict().items()
    halves = {key: (value.half() if value.is_floating_point() else value).cpu() for key, value in state}
    write_files(folder, {FILE: save(halves, {"config": json.dumps(network.config())})})
