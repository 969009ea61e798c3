"""What the networks on sparse voxels share: a torso in its own dtype, whose blocks may be recomputed.

Training keeps the activations of every block for the backward pass. A recomputed block keeps its input alone and runs
once more on the way back: less memory, more time. `recompute_blocks` may change between steps, so that a memory
controller pays only what the batch at hand needs; results do not depend on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..sparse.conv import SparseConv3d
from ..sparse.tensor import SparseTensor


class Torso(nn.Module):
    """Base of the structured-latent networks; a subclass names its torso in `torso_blocks`.

    dtype: of the torso's weights and residual stream. use_checkpoint: recompute every block (as published).
    recompute_blocks: recompute this many, the first of `torso_blocks`; None leaves it to use_checkpoint.
    """

    def __init__(self, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.use_checkpoint = use_checkpoint
        self.recompute_blocks: int | None = None

    def torso_blocks(self) -> list[nn.Module]:
        """The blocks, in the order in which recomputing them is worth it."""
        raise NotImplementedError

    def convert_to(self, dtype: torch.dtype) -> None:
        """Linear layers and convolutions of the torso to `dtype`; norms, embedders, input and output stay float32."""
        self.dtype = dtype
        for block in self.torso_blocks():
            for module in block.modules():
                if isinstance(module, nn.Linear | SparseConv3d):
                    module.to(dtype)

    def torso_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the residual stream: that of the torso's weights, under autocast autocast's own."""
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype

    def recomputed(self) -> frozenset[nn.Module]:
        """The blocks that the next training step recomputes."""
        if not (self.training and torch.is_grad_enabled()):
            return frozenset()
        blocks = self.torso_blocks()
        count = (len(blocks) if self.use_checkpoint else 0) if self.recompute_blocks is None else self.recompute_blocks
        return frozenset(blocks[: max(count, 0)])


def call(recompute: bool, function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), with its activations recomputed in the backward pass if `recompute`."""
    return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)


def call_sparse(recompute: bool, block: nn.Module, x: SparseTensor, *args: Tensor) -> SparseTensor:
    """block(x, *args) as `call` does; the features are named apart, so that checkpointing sees their device."""
    return call(recompute, lambda feats, *rest: block(x.replace(feats), *rest), x.feats, *args)
