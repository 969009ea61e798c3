"""Lifting: a structure flow whose voxel tokens look at the posed views they project into.

A published flow sees its pictures through cross-attention alone and must learn from data where things are. Where the
cameras are known that is a waste: the token of a block of voxels projects to a known place in each view. Here each
token receives the image features found there, from every view given (1-4, any subset, any order), together with the
direction it is seen from and its depth. Cross-attention to coarse image tokens stays, for what is not local.

Tokens whose block no silhouette set allows are known to be empty: they are left out, and the rest is packed. With four
views that leaves about a third of the tokens, so a step costs a third.

A view may be drawn by a model. Its outline then rules nothing out, as long as other views were given, and its features
carry a mark, so that a network trained on drawn views (``drawn_views``) learns how far to believe them.

The network predicts the clean latent; its output is converted to the velocity that samplers integrate. It is trained
mostly near t = 1, so a few steps are enough for well-posed inputs.

Not covered: views without a camera (use cross-attention alone), background in the views (masks are needed).

Shape suffixes: B samples, V views of one sample, N views of all samples, T tokens of all samples, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.cameras import Camera
from .blocks import AbsolutePositionEmbedder
from .structure_flow import SparseStructureFlowModel, patchify

HULL_POINTS = 8  # along each side of a block, where the hull is looked up
_MIN_TIME = 0.05  # below it the step from latent to velocity is held, so that it stays finite


@dataclass(frozen=True)
class PosedViews:
    """The views of a batch, one sample after the other.

    images: (N, 4, S, S) float, sRGB 0-1, straight alpha. cameras: N cameras. counts: views of each sample, all >= 1.
    drawn: whether a model drew the view, N of them; empty says that none was drawn.
    """

    images: Tensor
    cameras: tuple[Camera, ...]
    counts: tuple[int, ...]
    drawn: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if len(self.images) != len(self.cameras) or sum(self.counts) != len(self.cameras) or min(self.counts) < 1:
            raise ValueError(f"{len(self.images)} images, {len(self.cameras)} cameras, counts {self.counts} disagree")
        if self.drawn and len(self.drawn) != len(self.cameras):
            raise ValueError(f"drawn says of {len(self.drawn)} views what made them, there are {len(self.cameras)}")


@dataclass(frozen=True)
class LiftedCondition:
    """What the tokens need to know of the views, computed once for all sampling steps.

    active: (B, L) bool, blocks that the silhouettes allow. lengths: active tokens of each sample.
    lifted_TC: features of the active tokens; hull_TD: the visual hull in their blocks, -1 to 1. context:
    (1, image tokens of all samples, Cc); context_lengths. normals: (N, 3, S/4, S/4), each view's surface directions in
    its camera's frame as the encoder sees them, for a training loss; None without a normal head.
    """

    active: Tensor
    lengths: tuple[int, ...]
    lifted_TC: Tensor
    hull_TD: Tensor
    context: Tensor
    context_lengths: tuple[int, ...]
    normals: Tensor | None = None

    def null(self) -> LiftedCondition:
        """The unconditional twin for guidance: same active tokens, no picture."""
        nothing = torch.zeros_like(self.lifted_TC), torch.zeros_like(self.context)
        return LiftedCondition(self.active, self.lengths, nothing[0], self.hull_TD, nothing[1], self.context_lengths)


class _ResBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.gelu(self.conv1(self.norm(x)), approximate="tanh"))


class ViewEncoder(nn.Module):
    """A small convolutional encoder: (N, 4, S, S) straight RGBA -> features of stride 8 and tokens of stride 16."""

    def __init__(self, channels: tuple[int, int], num_res_blocks: tuple[int, int], token_channels: int) -> None:
        super().__init__()
        fine, coarse = channels
        self.stem = nn.Conv2d(4 * 16, fine, 3, padding=1)
        self.fine = nn.Sequential(*[_ResBlock(fine) for _ in range(num_res_blocks[0])])
        self.down = nn.Conv2d(fine, coarse, 2, stride=2)
        self.coarse = nn.Sequential(*[_ResBlock(coarse) for _ in range(num_res_blocks[1])], nn.GroupNorm(1, coarse))
        self.tokens = nn.Conv2d(coarse, token_channels, 2, stride=2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        _, features, tokens = self.pyramid(images)
        return features, tokens

    def pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of stride 4, of stride 8, and tokens of stride 16."""
        x = torch.cat([images[:, :3] * images[:, 3:], images[:, 3:]], dim=1)
        x = F.pixel_unshuffle(x * 2 - 1, 4).contiguous(memory_format=torch.channels_last)
        fine = self.fine(self.stem(x))
        features = self.coarse(self.down(fine))
        return fine, features, self.tokens(features)


class Lift(nn.Module):
    """One vector for each token from the views it projects into, averaged over the views with learned weights.

    In the structure flow a token is sampled at 2 x 2 x 2 points of its block. Along the rays of an orthographic rig
    many tokens see the same pixels, so pixels are turned into vectors once for each distinct pattern of points, and
    pairs (view, token) only look them up and add their viewing direction and depth.
    """

    def __init__(self, pixel_channels: int, geometry_channels: int, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.from_pixels = nn.Linear(pixel_channels, channels)
        self.from_geometry = nn.Linear(geometry_channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.score = nn.Linear(channels, heads)
        self.out = nn.Linear(2 * channels, channels)

    def forward(self, pixels_PC: Tensor, geometry_PC: Tensor, rows_P: Tensor, tokens: int) -> Tensor:
        """(tokens, C) from P pairs of view and token: pair p belongs to token ``rows_P[p]``; every token has a pair."""
        h = F.gelu(pixels_PC + geometry_PC, approximate="tanh")
        weight = self.score(h).float().clamp(-8, 8).exp()
        value = self.value(h).unflatten(-1, (self.heads, -1))
        one = torch.ones_like(weight[:, :1])
        parts = torch.cat([(value * weight[..., None]).flatten(-2), h.float(), weight, one], dim=-1)
        total = parts.new_zeros(tokens, parts.shape[-1]).index_add(0, rows_P, parts)
        pooled, mean, weight, count = total.split([value[0].numel(), h.shape[-1], self.heads, 1], dim=-1)
        pooled = pooled.unflatten(-1, (self.heads, -1)) / weight[..., None]
        return self.out(torch.cat([pooled.flatten(-2), mean / count], dim=-1))


_FREQUENCIES = 4
GEOMETRY = 3 + 3 * (1 + 2 * _FREQUENCIES)


def waves(x: Tensor) -> Tensor:
    """(..., 3) in [-1, 1] -> (..., 3 + 6 frequencies)."""
    angles = x[..., None] * (2.0 ** torch.arange(_FREQUENCIES, device=x.device)) * torch.pi
    return torch.cat([x, angles.sin().flatten(-2), angles.cos().flatten(-2)], dim=-1)


def block_points(side: int, per_axis: int, device: torch.device | None = None) -> Tensor:
    """Points inside the blocks of a ``side``^3 grid over the cube: (side^3, per_axis^3, 3), z fastest in both."""
    fine = side * per_axis
    axis = (torch.arange(fine, dtype=torch.float32, device=device) + 0.5) / fine - 0.5
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    grid = grid.reshape(side, per_axis, side, per_axis, side, per_axis, 3).permute(0, 2, 4, 1, 3, 5, 6)
    return grid.reshape(side**3, per_axis**3, 3)


class LiftedStructureFlow(SparseStructureFlowModel):
    """SparseStructureFlowModel conditioned by lifting; the state dict holds the base's keys and the lifting's.

    encoder_channels, encoder_blocks: widths and residual blocks of the view encoder at stride 4 and 8.
    image_size: S of the views. Images of another size are a ValueError. hull_skip: for a flow on a field in blocks of
    8^3, the visual hull is added to the prediction: the network learns where the object is less than its hull.
    drawn_views: views that a model drew are marked, and bind no outline; without it they are views like others.
    normal_head: the view encoder's features also say which way the surface faces. Only training asks: every pixel
    teaches shape from shading, long before the voxels do.
    """

    def __init__(
        self,
        *,
        image_size: int = 128,
        encoder_channels: tuple[int, int] = (64, 128),
        encoder_blocks: tuple[int, int] = (2, 2),
        hull_skip: bool = False,
        normal_head: bool = False,
        drawn_views: bool = False,
        **flow,
    ) -> None:
        super().__init__(**flow)
        channels, context = flow["model_channels"], flow["cond_channels"]
        self.image_size = image_size
        self.side = self.resolution // self.patch_size
        depth = HULL_POINTS**3
        fine, coarse = encoder_channels
        self.view_encoder = ViewEncoder((fine, coarse), (encoder_blocks[0], encoder_blocks[1]), context)
        self.lift = Lift(8 * coarse, GEOMETRY, channels)
        self.view_geometry = nn.Linear(GEOMETRY, context)
        self.hull_layer = nn.Linear(depth, channels)
        self.drawn_pairs = nn.Parameter(torch.zeros(channels)) if drawn_views else None
        self.drawn_tokens = nn.Parameter(torch.zeros(context)) if drawn_views else None
        if hull_skip and (self.in_channels != 1 or self.patch_size != HULL_POINTS):
            raise ValueError(f"hull_skip needs a field in blocks of {HULL_POINTS}^3, not patches of {self.patch_size}")
        self.hull_gain = nn.Parameter(torch.tensor([0.5])) if hull_skip else None
        self.normal_head = nn.Conv2d(coarse, 3 * 4, 1) if normal_head else None
        self.register_buffer("latent_mean", torch.zeros(self.in_channels))
        self.register_buffer("latent_std", torch.ones(self.in_channels))
        self.register_buffer("empty", torch.zeros(self.in_channels))
        patches = image_size // 16
        places = torch.cartesian_prod(torch.arange(patches), torch.arange(patches))
        self.register_buffer("image_pos", AbsolutePositionEmbedder(context, 2)(places), persistent=False)
        self.register_buffer("probe", block_points(self.side, 2), persistent=False)
        self.register_buffer("coarse_probe", block_points(self.side, 4), persistent=False)
        self.register_buffer("fine_probe", block_points(self.side, HULL_POINTS), persistent=False)
        self._projections: dict = {}

    latent_mean: Tensor
    latent_std: Tensor
    empty: Tensor
    image_pos: Tensor
    probe: Tensor
    coarse_probe: Tensor
    fine_probe: Tensor

    # ---- latents

    def set_latent_statistics(self, mean: Tensor, std: Tensor, empty: Tensor) -> None:
        """mean, std (channels,) of the latents; empty (channels,): the latent of empty space."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.empty.copy_(empty)

    def normalize(self, z: Tensor) -> Tensor:
        return (z - self.latent_mean[:, None, None, None]) / self.latent_std[:, None, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.latent_std[:, None, None, None] + self.latent_mean[:, None, None, None]

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, C, R, R, R) -> (B, L, C * p^3)."""
        return patchify(x, self.patch_size).flatten(2).transpose(1, 2)

    # ---- condition

    def condition(self, views: PosedViews) -> LiftedCondition:
        """Encodes the views of a batch. Raises ValueError for pictures of another size than ``image_size``."""
        if views.images.shape[1:] != (4, self.image_size, self.image_size):
            size = self.image_size
            raise ValueError(f"views are {tuple(views.images.shape)}, expected (N, 4, {size}, {size})")
        sample = torch.repeat_interleave(torch.arange(len(views.counts)), torch.tensor(views.counts))
        sample = sample.to(views.images.device)
        active, hull = self.hull_blocks(views, sample)
        drawn = self._drawn(views)
        features, tokens = self.view_encoder(views.images)
        rotations = torch.stack([camera.rotation() for camera in views.cameras]).to(views.images.device)
        lifted = self._lift(views, sample, active, features, drawn)
        hull = hull * 2 - 1
        pose = self.view_geometry(torch.cat([rotations[:, 2], waves(rotations[:, 0])], dim=-1))
        context = tokens.flatten(2).transpose(1, 2) + self.image_pos + pose[:, None]
        if self.drawn_tokens is not None:
            is_drawn = torch.tensor(drawn, device=context.device)[:, None, None]
            context = context + is_drawn * self.drawn_tokens.to(context.dtype)
        lengths = tuple(active.sum(dim=1).tolist())
        context_lengths = tuple(count * context.shape[1] for count in views.counts)
        normals = None if self.normal_head is None else F.pixel_shuffle(self.normal_head(features), 2)
        return LiftedCondition(active, lengths, lifted, hull, context.flatten(0, 1)[None], context_lengths, normals)

    @property
    def reads_drawn_views(self) -> bool:
        return self.drawn_tokens is not None

    def _drawn(self, views: PosedViews) -> tuple[bool, ...]:
        return views.drawn if views.drawn and self.reads_drawn_views else (False,) * len(views.cameras)

    @torch.no_grad()
    def hull_blocks(self, views: PosedViews, sample: Tensor) -> tuple[Tensor, Tensor]:
        """The visual hull, block by block: (B, L) bool, the blocks that the slightly dilated silhouettes allow; and for
        those, (T, 512) float, at 8 x 8 x 8 points of each the least alpha over the sample's views (smoothed over
        three pixels, so that it tells how far an outline is). Drawn views count where a sample has no others."""
        alpha = views.images[:, 3:].float()
        smooth = F.pad(F.avg_pool2d(alpha, 3, stride=1, padding=1).flatten(1), (0, 1))  # the last pixel: outside
        dilated = F.pad(F.max_pool2d(alpha, 9, stride=1, padding=4).flatten(1), (0, 1))
        reach = torch.ones(len(views.counts), *self.coarse_probe.shape[:2], device=alpha.device)
        owners, drawn = sample.tolist(), self._drawn(views)
        has_given = {b for b, made in zip(owners, drawn, strict=True) if not made}
        binding = [(n, views.cameras[n], b) for n, b in enumerate(owners) if not (drawn[n] and b in has_given)]
        for n, camera, b in binding:
            reach[b] = torch.minimum(reach[b], dilated[n][self._pixels(camera, alpha.shape[-1], self.coarse_probe)])
        active = (reach > 0.5).any(dim=2)
        active[~active.any(dim=1)] = True  # contradictory silhouettes: trust none of them
        hulls = [torch.ones(int(count), HULL_POINTS**3, device=alpha.device) for count in active.sum(dim=1)]
        for n, camera, b in binding:
            pixels = self._pixels(camera, alpha.shape[-1], self.fine_probe)
            hulls[b] = torch.minimum(hulls[b], smooth[n][pixels[active[b]]])
        return active, torch.cat(hulls)

    @torch.no_grad()
    def _pixels(self, camera: Camera, size: int, probe: Tensor) -> Tensor:
        """(L, points) number of the pixel in which each point of each block lies; S^2 for those outside the frame."""
        key = (camera, size, probe.shape, probe.device)
        if key not in self._projections:
            with torch.inference_mode(False), torch.autocast(probe.device.type, enabled=False):
                ndc, _ = camera.project(probe)
                column, row = ((ndc * ndc.new_tensor([1, -1]) + 1) / 2 * size).floor().long().unbind(-1)
                outside = (column < 0) | (row < 0) | (column >= size) | (row >= size)
                self._projections[key] = torch.where(outside, size * size, row * size + column)
        return self._projections[key]

    def _lift(
        self, views: PosedViews, sample: Tensor, active: Tensor, features: Tensor, drawn: tuple[bool, ...]
    ) -> Tensor:
        """Pairs of view and token, ordered by view; see Lift."""
        start = F.pad(active.sum(dim=1).cumsum(0), (1, 0)).tolist()
        blocks = [row.nonzero()[:, 0] for row in active]
        groups: dict[tuple[Camera, bool], list[int]] = {}
        for n, key in enumerate(zip(views.cameras, drawn, strict=True)):
            groups.setdefault(key, []).append(n)
        found, lookup, geometry, place, rows, offset = [], [], [], [], [], 0
        for number, ((camera, is_drawn), members) in enumerate(groups.items()):
            patterns, pattern_of, seen_from = self._projection(camera)
            sampled = F.grid_sample(
                features[members], patterns.to(features.dtype).expand(len(members), -1, -1, -1),
                align_corners=False, padding_mode="border",
            )  # fmt: skip
            found.append(sampled.permute(0, 2, 3, 1).flatten(2).flatten(0, 1))
            placed = self.lift.from_geometry(seen_from)
            if is_drawn and self.drawn_pairs is not None:
                placed = placed + self.drawn_pairs.to(placed.dtype)
            geometry.append(placed)
            for k, n in enumerate(members):
                b = int(sample[n])
                lookup.append(pattern_of[blocks[b]] + (offset + k * len(patterns)))
                place.append(blocks[b] + number * len(active[0]))
                rows.append(torch.arange(start[b], start[b + 1], device=features.device))
            offset += len(members) * len(patterns)
        pixels = self.lift.from_pixels(torch.cat(found))
        # An embedding, not an index: its gradient is summed in a fixed order.
        pixels, seen_from = F.embedding(torch.cat(lookup), pixels), F.embedding(torch.cat(place), torch.cat(geometry))
        return self.lift(pixels, seen_from, torch.cat(rows), start[-1])

    @torch.no_grad()
    def _projection(self, camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
        """Where a camera sees the blocks, kept for its next use: distinct patterns of sampling points (U, 8, 2), the
        pattern of each block (L,), and its direction and depth (L, G)."""
        key = (camera, self.probe.device)
        if key not in self._projections:
            with torch.inference_mode(False), torch.autocast(self.probe.device.type, enabled=False):
                ndc, depth = camera.project(self.probe)
                grid = torch.round(ndc * ndc.new_tensor([1, -1]) * 4096) / 4096
                patterns, pattern_of = torch.unique(grid.flatten(1), dim=0, return_inverse=True)
                centre = torch.cat([ndc.mean(dim=1), (depth.mean(dim=1) - camera.radius)[:, None]], dim=-1)
                direction = camera.rotation()[2].to(centre).expand(len(centre), 3)
                seen_from = torch.cat([direction, waves(centre)], dim=-1)
                self._projections[key] = patterns.view(-1, *grid.shape[1:]), pattern_of, seen_from
        return self._projections[key]

    # ---- velocity

    def predict_tokens(self, x_TC: Tensor, t: Tensor, cond: LiftedCondition) -> Tensor:
        """Clean latent tokens (T, C p^3) of the active blocks, from noisy ones; t (B,) in [0, 1000]."""
        place = cond.active.nonzero()[:, 1]
        h = self.input_layer(x_TC) + self.pos_emb[place] + cond.lifted_TC + self.hull_layer(cond.hull_TD)
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))  # the residual stream is what a CPU waits for
        h = self.run_blocks(
            h[None], self.t_embedder(t), cond.context, lengths=cond.lengths, context_lengths=cond.context_lengths
        )
        clean = self.head(h[0])
        return clean if self.hull_gain is None else clean + self.hull_gain * cond.hull_TD

    def forward(self, x: Tensor, t: Tensor, cond: LiftedCondition) -> Tensor:  # type: ignore[override]
        """Velocity (B, C, R, R, R) at normalised latents x; t (B,) is the flow time times 1000."""
        noisy = self.to_tokens(x)
        empty = self.normalize(self.empty[None, :, None, None, None].expand_as(x))
        clean = self.to_tokens(empty).clone()
        clean[cond.active] = self.predict_tokens(noisy[cond.active], t, cond).type(clean.dtype)
        time = (t / 1000).clamp_min(_MIN_TIME)[:, None, None]
        return self.to_grid((noisy - clean) / time)
