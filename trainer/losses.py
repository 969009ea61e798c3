"""Losses of the second stage: on pictures of a predicted surface, on its distance field, and how they are weighed.

Weights of the published training of the mesh decoder (TRELLIS, arXiv 2412.01506, and its configs): mask 1, depth 10
(smooth L1, beta 1/512), rendered normals 1, normal channels and colours 0.1, each of these pictures as L1 + 0.2 (1 -
SSIM) + 0.2 LPIPS (VGG); TSDF 0.01; cube regularisers 1; KL 1e-6.

Pictures are (B, C, H, W), masks (B, 1, H, W), 0-1.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera
from triptych.render.rasterize import antialias, interpolate, rasterize

PUBLISHED_WEIGHTS = {
    "mask": 1.0,
    "depth": 10.0,
    "normal": 1.0,
    "normal_channel": 0.1,
    "color": 0.1,
    "sdf": 0.01,
    "cubes": 1.0,
    "kl": 1e-6,
}
DEPTH_BETA = 1 / 512
Schedule = Sequence[tuple[int, float]]


# ---- pictures


def mask_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Mean absolute difference of two masks."""
    return (predicted - true).abs().mean()


def depth_loss(predicted: Tensor, true: Tensor, both: Tensor) -> Tensor:
    """Smooth L1 of depths in world units where ``both`` (bool) surfaces are seen, over all pixels; beta 1/512."""
    difference = torch.where(both, predicted - true, torch.zeros(()).to(predicted))
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=DEPTH_BETA)


@functools.lru_cache(maxsize=8)
def _window(size: int, sigma: float) -> Tensor:
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-place.square() / (2 * sigma * sigma))
    return (line / line.sum()).float()


def ssim(a: Tensor, b: Tensor, size: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of pictures 0-1 (Wang et al. 2004): Gaussian window, zeros beyond the border."""
    channels = a.shape[1]
    line = _window(size, sigma).to(a)
    across = line.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    down = across.transpose(2, 3)

    def mean(x: Tensor) -> Tensor:
        x = F.conv2d(x, across, padding=(0, size // 2), groups=channels)
        return F.conv2d(x, down, padding=(size // 2, 0), groups=channels)

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    alike = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (alike / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


@functools.lru_cache(maxsize=2)
def perceptual_distance(device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS with VGG features of pictures 0-1, a scalar. Raises TriptychError when the extra is not installed."""
    try:
        lpips = importlib.import_module("lpips")
    except ImportError as error:
        raise TriptychError(
            "the perceptual loss needs the package lpips: install the extra `lpips`, or set its weight to 0"
        ) from error
    network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    return lambda a, b: network(a * 2 - 1, b * 2 - 1).mean()


def picture_loss(predicted: Tensor, true: Tensor, ssim_weight: float = 0.2, perceptual_weight: float = 0.2) -> Tensor:
    """L1 + ssim_weight (1 - SSIM) + perceptual_weight LPIPS of pictures 0-1; a weight of 0 leaves its term out."""
    loss = (predicted - true).abs().mean()
    if ssim_weight:
        loss = loss + ssim_weight * (1 - ssim(predicted, true))
    if perceptual_weight:
        loss = loss + perceptual_weight * perceptual_distance(str(predicted.device))(predicted, true)
    return loss


@dataclass(frozen=True)
class Pictures:
    """Renders of one surface from B cameras. mask (B, 1, S, S) 0-1; depth (B, 1, S, S) world units, 0 in the
    background; normal (B, 3, S, S) (n + 1) / 2 of the faces, 0 in the background; channels (B, C, S, S) of the vertex
    attributes, 0 in the background; seen (B, 1, S, S) bool."""

    mask: Tensor
    depth: Tensor
    normal: Tensor
    channels: Tensor
    seen: Tensor


def render_surface(
    vertices: Tensor, faces: Tensor, attributes: Tensor | None, cameras: Sequence[Camera], size: int
) -> Pictures:
    """Draws a predicted mesh, differentiable in vertices (V, 3) and attributes (V, C); faces (F, 3) int64.

    Inside the outline gradients come from interpolation, at the outline from antialiasing. A mesh without faces gives
    empty pictures.
    """
    channels = 0 if attributes is None else attributes.shape[1]
    if not len(faces):
        empty = vertices.new_zeros(len(cameras), 4 + 1 + channels, size, size)
        return Pictures(empty[:, :1], empty[:, 1:2], empty[:, 2:5], empty[:, 5:], empty[:, :1] > 0)
    vertices = vertices.float()
    clip = torch.stack([camera.clip(vertices) for camera in cameras])
    fragments = rasterize(clip, faces, size, size)
    corners = vertices[faces]
    normals = F.normalize(torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), dim=1)
    seen = fragments.triangle_id >= 0
    mask = seen[..., None].float()
    flat = normals[fragments.triangle_id.clamp_min(0)] * 0.5 + 0.5
    depth = torch.where(seen, fragments.depth, 0.0)[..., None]
    parts = [mask, depth, flat * mask]
    if attributes is not None:
        parts.append(interpolate(attributes.float(), faces, fragments))
    # Depth is not blended: half of it between surface and background is neither.
    blended = antialias(torch.cat([parts[0], *parts[2:]], dim=-1), fragments, clip, faces).permute(0, 3, 1, 2)
    return Pictures(blended[:, :1], depth.permute(0, 3, 1, 2), blended[:, 1:4], blended[:, 4:], seen[:, None])


# ---- fields


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """Mean KL divergence of diagonal Gaussians from the standard normal, per component."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1).mean()


def field_loss(predicted: Tensor, target: Tensor, near: float, far_weight: float) -> Tensor:
    """Weighted mean absolute difference (V,): weight 1 where |target| < near, far_weight elsewhere."""
    weight = torch.where(target.abs() < near, 1.0, far_weight)
    return (weight * (predicted - target).abs()).sum() / weight.sum().clamp_min(1e-6)


def vertex_means(values: Tensor, rows: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Corner values averaged over the fine cubes that share a lattice vertex.

    values (n, K, 8, C): K cubes of each voxel; places (K, 8) from ``corner_places``; rows (n, L) of each voxel's
    vertices among ``count``. Returns means (count, C) and how many corners met in each vertex, (count,) float32.
    """
    n, cubes, corners, channels = values.shape
    local = rows.shape[1]
    collect = torch.zeros(local, cubes * corners, dtype=values.dtype, device=values.device)
    collect[places.to(values.device).flatten(), torch.arange(cubes * corners, device=values.device)] = 1
    sums = torch.matmul(collect, values.reshape(n, cubes * corners, channels))
    met = collect.sum(dim=1).float().expand(n, local)
    index = rows.reshape(-1)
    counts = torch.zeros(count, device=values.device).index_add_(0, index, met.reshape(-1))
    total = sums.new_zeros(count, channels).index_add(0, index, sums.reshape(-1, channels))
    return total / counts[:, None].clamp_min(1).to(total), counts


def consistency_loss(values: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Mean squared difference of corner values (n, K, 8, C) from the means (V, C) of their vertices, without a gather:
    the sum of squares less what the means account for."""
    spread = values.float().square().sum() - (counts[:, None] * means.float().square()).sum()
    return spread.clamp_min(0) / max(values.numel(), 1)


# ---- weights


def scheduled(points: Schedule, step: int) -> float:
    """Piecewise linear in the step through (step, value) points in ascending order, constant beyond the ends."""
    if not points:
        raise TriptychError("a schedule needs at least one (step, weight) point")
    before = points[0]
    for after in points:
        if step <= after[0]:
            span = after[0] - before[0]
            return before[1] if span <= 0 else before[1] + (after[1] - before[1]) * (step - before[0]) / span
        before = after
    return points[-1][1]


@dataclass(frozen=True)
class WeightConfig:
    """How losses are weighed.

    mode: "fixed" takes ``weights``; "learned" also learns one uncertainty a loss (Kendall et al. 2018): each becomes
    exp(-s) w L + s / 2 with s learned from 0. schedules: by name, (step, factor) points that multiply the weight.
    """

    mode: Literal["fixed", "learned"] = "fixed"
    weights: dict[str, float] = field(default_factory=dict)
    schedules: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    learned: tuple[str, ...] = ()  # which of them in mode "learned"; empty: all with a weight above 0


class LossWeights(nn.Module):
    """Sums losses by name. Part of the model, so that learned uncertainties train and are saved with it."""

    def __init__(self, config: WeightConfig) -> None:
        super().__init__()
        self.config = config
        names = config.learned or tuple(name for name, weight in config.weights.items() if weight > 0)
        if unknown := set(names) - config.weights.keys():
            raise TriptychError(f"the losses {sorted(unknown)} have no weight: give each one in weights")
        if unknown := config.schedules.keys() - config.weights.keys():
            raise TriptychError(f"the schedules {sorted(unknown)} have no weight: give each one in weights")
        self.log_variance = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in names} if config.mode == "learned" else {}
        )

    def weight(self, name: str, step: int) -> float:
        """The weight before any uncertainty; 0 means that the loss need not be computed."""
        factor = scheduled(self.config.schedules[name], step) if name in self.config.schedules else 1.0
        return self.config.weights.get(name, 0.0) * factor

    def forward(self, losses: Mapping[str, Tensor], step: int) -> tuple[Tensor, dict[str, Any]]:
        """The weighted sum, and every loss unweighted (and learned uncertainty) to log."""
        total: Tensor = torch.zeros((), device=next(iter(losses.values())).device)
        logged: dict[str, Any] = {}
        for name, loss in losses.items():
            weight = self.weight(name, step)
            logged[name] = loss.detach()
            if not weight:
                continue
            if name in self.log_variance:
                s = self.log_variance[name]
                total = total + torch.exp(-s) * weight * loss + s / 2
                logged[f"{name}_uncertainty"] = s.detach().exp().sqrt()
            else:
                total = total + weight * loss
        return total, logged
