"""Group norm of sparse tensors: statistics per sample and group, over all voxels of the sample."""

import torch
from torch import Tensor, nn

from .tensor import SparseTensor


class SparseGroupNorm32(nn.Module):
    """Group norm of (N, C) features with float32 statistics; the result has the dtype of the features.

    One group of one sample is normalised over its channels and all voxels of that sample.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        if num_channels % num_groups:
            raise ValueError(f"{num_channels} channels do not divide into {num_groups} groups")
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(self, x: SparseTensor) -> SparseTensor:
        if x.feats.dim() != 2 or x.feats.shape[1] != self.num_channels:
            raise ValueError(f"the norm takes feats (N, {self.num_channels}), not {tuple(x.feats.shape)}")
        parts = [self._normalise(part) for part in x.feats.split(x.counts)]
        return x.replace(parts[0] if len(parts) == 1 else torch.cat(parts)) if parts else x

    def _normalise(self, feats: Tensor) -> Tensor:
        grouped = feats.float().unflatten(1, (self.num_groups, -1))
        if not len(feats):
            return feats
        var, mean = torch.var_mean(grouped, dim=(0, 2), correction=0, keepdim=True)
        gain = torch.rsqrt(var + self.eps).expand(-1, -1, grouped.shape[2]).flatten(1)
        shift = mean.expand_as(grouped[:1]).flatten(1)
        if self.weight is None or self.bias is None:
            return ((feats.float() - shift) * gain).type(feats.dtype)
        return torch.addcmul(self.bias.float(), feats.float() - shift, gain * self.weight.float()).type(feats.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}"
