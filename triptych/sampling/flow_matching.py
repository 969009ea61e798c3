"""The training side of the rectified flow: pure functions of given random draws (TRELLIS, arXiv 2412.01506).

x_t = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) noise, and its velocity dx_t/dt = (1 - sigma_min) noise - x_0. The
draws come from the caller, so that a step is a function of (seed, step, sample) alone.
"""

import torch
from torch import Tensor

SIGMA_MIN = 1e-5


def interpolate(x_0: Tensor, noise: Tensor, t: Tensor, sigma_min: float = SIGMA_MIN) -> Tensor:
    """x_t between data (B, ...) and standard normal noise (B, ...) at times t (B,) in [0, 1]."""
    t = _column(t, x_0)
    return (1 - t) * x_0 + (sigma_min + (1 - sigma_min) * t) * noise


def velocity(x_0: Tensor, noise: Tensor, sigma_min: float = SIGMA_MIN) -> Tensor:
    """The network's target, the same at every time."""
    return (1 - sigma_min) * noise - x_0


def predict_x_0(x_t: Tensor, t: Tensor, v: Tensor, sigma_min: float = SIGMA_MIN) -> Tensor:
    """The data that velocity v (B, ...) at x_t (B, ...) and t (B,) points to; exact for the true velocity."""
    return (1 - sigma_min) * x_t - (sigma_min + (1 - sigma_min) * _column(t, x_t)) * v


def logit_normal_times(normal: Tensor, mean: float = 1.0, std: float = 1.0) -> Tensor:
    """Times in (0, 1) from standard normal draws of any shape; TRELLIS trains with mean 1 and std 1."""
    return torch.sigmoid(mean + std * normal)


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.dim() - 1)).to(like.dtype)
