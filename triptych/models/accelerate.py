"""Two ways to run the flows with less: compiled blocks, and matrices of 8-bit integers. Both are optional.

8-bit weights halve a flow's memory against float16: each output row of a matrix is stored as integers with one scale,
and multiplied in the torso's own dtype. They save time only where reading weights is what takes it, which the
flows at thousands of tokens do not do. Norms, embedders, input and output layers stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..errors import TriptychError


def compile_blocks(flow: nn.Module) -> None:
    """Every transformer block of the flow through torch.compile, in place. The first step then takes much longer.

    Lengths may change from call to call (dynamic shapes). Raises TriptychError where torch cannot compile here.
    """
    for block in cast(Any, flow).blocks:
        try:
            block.forward_runs = torch.compile(block.forward_runs, dynamic=True)
        except RuntimeError as error:
            raise TriptychError(f"torch.compile does not work here ({error}): leave the flows uncompiled") from error


def quantize_blocks(flow: nn.Module) -> int:
    """The matrices of the flow's transformer blocks as 8-bit integers, in place; returns how many there were.

    Raises TriptychError when torchao is absent.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise TriptychError(
            "8-bit weights need the package torchao (0.10 or later), which is not installed: pip install torchao"
        ) from error
    blocks = cast(Any, flow).blocks
    quantize_(blocks, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear))
    return sum(isinstance(module, nn.Linear) for module in blocks.modules())
