"""Lifting for the second stage: a latent flow whose voxels look at the posed views, and at the first stage's field.

Each active voxel is projected into every view that is given and collects what is found there: the pixel itself,
features of stride 4 and of stride 8, the direction it is seen from, and how far it lies behind the surface that the
view sees first. The last comes from a depth buffer of the active voxels themselves, and tells colours that belong to
the voxel from colours of what hides it. The views are averaged with learned weights, as in the first stage.

Beside the pictures a voxel sees the first stage's signed field in its neighbourhood of 3^3 voxels, which is already a
good guess of the surface: the flow learns what to change about it. Cross-attention to coarse image tokens stays.

The network predicts the clean latents; its output is converted to the velocity that samplers integrate.

Shape suffixes: B samples, N voxels of all samples, P pairs of voxel and view, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.cameras import Camera
from ..sparse.tensor import SparseTensor
from .blocks import AbsolutePositionEmbedder
from .lifting import GEOMETRY, Lift, PosedViews, ViewEncoder, waves
from .slat_flow import SLatFlowModel

FIELD_BAND = 2.0  # voxels: the field is clipped here, as the trainer's is
_BEHIND = 6.0  # voxels: how far behind what a view sees first still makes a difference
_VIEW_FEATURES = GEOMETRY + 2  # direction and place in the frame, depth behind the first surface, inside the frame
_MIN_TIME = 0.05  # below it the step from latent to velocity is held, so that it stays finite


@dataclass(frozen=True)
class LiftedVoxels:
    """What the voxels know, computed once for all sampling steps.

    lifted_NC: from the views; hint_NC: from the first stage's field. context: (1, image tokens of all samples, Cc).
    counts: voxels of each sample.
    """

    lifted_NC: Tensor
    hint_NC: Tensor
    context: Tensor
    context_lengths: tuple[int, ...]
    counts: tuple[int, ...]

    def null(self) -> LiftedVoxels:
        """The unconditional twin for guidance: the field, and no picture."""
        return self.without(torch.ones(len(self.counts), dtype=torch.bool))

    def without(self, drop: Tensor) -> LiftedVoxels:
        """The pictures of the samples in ``drop`` (B,) bool are taken away."""
        keep = (~drop).to(self.lifted_NC)
        voxels = keep.repeat_interleave(torch.tensor(self.counts, device=keep.device))
        tokens = keep.repeat_interleave(torch.tensor(self.context_lengths, device=keep.device)).to(self.context.dtype)
        lifted, context = self.lifted_NC * voxels[:, None], self.context * tokens[None, :, None]
        return replace(self, lifted_NC=lifted, context=context)


class LiftedSLatFlow(SLatFlowModel):
    """SLatFlowModel conditioned by lifting; the state dict holds the base's keys and the lifting's.

    image_size: S of the views. encoder_channels, encoder_blocks: as in LiftedStructureFlow, whose view encoder fits.
    """

    def __init__(
        self,
        *,
        image_size: int = 128,
        encoder_channels: tuple[int, int] = (48, 96),
        encoder_blocks: tuple[int, int] = (2, 2),
        **flow,
    ) -> None:
        super().__init__(**flow)
        context = flow["cond_channels"]
        outer = self.input_layer.out_features
        fine, coarse = encoder_channels
        self.image_size = image_size
        self.view_encoder = ViewEncoder((fine, coarse), (encoder_blocks[0], encoder_blocks[1]), context)
        self.view_geometry = nn.Linear(GEOMETRY, context)
        self.lift = Lift(fine + coarse + 4, _VIEW_FEATURES, outer, heads=4)
        self.hint_layer = nn.Linear(27, outer)
        self.register_buffer("latent_mean", torch.zeros(self.in_channels))
        self.register_buffer("latent_std", torch.ones(self.in_channels))
        patches = image_size // 16
        places = torch.cartesian_prod(torch.arange(patches), torch.arange(patches))
        self.register_buffer("image_pos", AbsolutePositionEmbedder(context, 2)(places), persistent=False)
        nn.init.normal_(self.out_layer.weight, std=0.02)  # a clean latent is predicted: zero is no better a start

    latent_mean: Tensor
    latent_std: Tensor
    image_pos: Tensor

    # ---- latents

    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """mean, std (channels,) of the latents."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)

    def normalize(self, z: Tensor) -> Tensor:
        """(N, channels) latents to mean 0, deviation 1."""
        return (z - self.latent_mean) / self.latent_std

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.latent_std + self.latent_mean

    # ---- condition

    def condition(self, views: PosedViews, voxels: SparseTensor, field: Tensor) -> LiftedVoxels:
        """Encodes the views for the voxels of a batch.

        voxels: the active voxels (their features are not read). field (B, R, R, R): the first stage's signed field in
        voxels, positive inside. Raises ValueError where sizes or numbers of samples disagree.
        """
        size = self.image_size
        if views.images.shape[1:] != (4, size, size):
            raise ValueError(f"views are {tuple(views.images.shape)}, expected (N, 4, {size}, {size})")
        if len(views.counts) != voxels.batch_size or field.shape != (voxels.batch_size, *[self.resolution] * 3):
            raise ValueError(
                f"{len(views.counts)} sets of views, {voxels.batch_size} sets of voxels, a field {tuple(field.shape)}"
            )
        fine, coarse, tokens = self.view_encoder.pyramid(views.images)
        rotations = torch.stack([camera.rotation() for camera in views.cameras]).to(views.images.device)
        pose = self.view_geometry(torch.cat([rotations[:, 2], waves(rotations[:, 0])], dim=-1))
        context = tokens.flatten(2).transpose(1, 2) + self.image_pos + pose[:, None]
        rgba = torch.cat([views.images[:, :3] * views.images[:, 3:], views.images[:, 3:]], dim=1)
        return LiftedVoxels(
            lifted_NC=self._lift(views, voxels, (rgba.to(fine.dtype), fine, coarse)),
            hint_NC=self.hint_layer(neighbourhood(voxels, field)),
            context=context.flatten(0, 1)[None],
            context_lengths=tuple(count * context.shape[1] for count in views.counts),
            counts=tuple(voxels.counts),
        )

    def _lift(self, views: PosedViews, voxels: SparseTensor, maps: Sequence[Tensor]) -> Tensor:
        """Pairs of view and voxel, ordered by view; see Lift."""
        centres = (voxels.coords[:, 1:].float() + 0.5) / self.resolution - 0.5
        pixels, geometry, rows, n = [], [], [], 0
        for b, count in enumerate(views.counts):
            span = voxels.layout[b]
            for camera in views.cameras[n : n + count]:
                grid, seen_from = self._seen(camera, centres[span])
                found = [
                    F.grid_sample(m[n : n + 1], grid.to(m.dtype)[None, None], align_corners=False)[0, :, 0].T
                    for m in maps
                ]
                pixels.append(torch.cat(found, dim=1))
                geometry.append(seen_from)
                rows.append(torch.arange(span.start, span.stop, device=centres.device))
                n += 1
        lift = self.lift
        return lift(
            lift.from_pixels(torch.cat(pixels)), lift.from_geometry(torch.cat(geometry)), torch.cat(rows), len(voxels)
        )

    @torch.no_grad()
    def _seen(self, camera: Camera, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Where a camera sees points (n, 3): grid_sample's coordinates (n, 2), and the geometry of each (n, G)."""
        with torch.autocast(centres.device.type, enabled=False):
            ndc, depth = camera.project(centres)
            grid = ndc * ndc.new_tensor([1, -1])
            voxel = 1 / self.resolution
            behind = ((depth - first_depth(grid, depth, self.resolution)) / voxel).clamp(0, _BEHIND) / _BEHIND
            inside = (grid.abs() <= 1).all(dim=-1, keepdim=True).float()
            place = waves(torch.cat([ndc.clamp(-1.5, 1.5), (depth - camera.radius)[:, None]], dim=-1))
            direction = camera.rotation()[2].to(centres).expand(len(centres), 3)
            return grid, torch.cat([direction, behind[:, None], inside, place], dim=-1)

    # ---- velocity

    def predict(self, x: SparseTensor, t: Tensor, cond: LiftedVoxels) -> SparseTensor:
        """Clean normalised latents (N, out_channels) from noisy ones; t (B,) in [0, 1000]."""
        t_emb = self.t_embedder(t)
        h = self.enter(x)
        h = h.replace(h.feats + cond.lifted_NC + cond.hint_NC)
        tokens, skips = self.down(h, t_emb)
        tokens = self.run_blocks(tokens, t_emb, cond.context, cond.context_lengths)
        return self.head(tokens, skips, t_emb)

    def forward(self, x: SparseTensor, t: Tensor, cond: LiftedVoxels) -> SparseTensor:  # type: ignore[override]
        """Velocity (N, out_channels) at normalised latents x; t (B,) is the flow time times 1000."""
        clean = self.predict(x, t, cond).feats
        time = (t / 1000).clamp_min(_MIN_TIME)[x.coords[:, 0].long(), None]
        return x.replace((x.feats - clean) / time)


def neighbourhood(voxels: SparseTensor, field: Tensor) -> Tensor:
    """The field (B, R, R, R) in the 3^3 voxels around each of ``voxels``: (N, 27), clipped, -1 to 1; outside: -1."""
    padded = F.pad(field, (1,) * 6, value=-FIELD_BAND)
    b, x, y, z = voxels.coords.long().unbind(1)
    steps = torch.cartesian_prod(*[torch.arange(3, device=field.device)] * 3)
    around = padded[b[:, None], x[:, None] + steps[:, 0], y[:, None] + steps[:, 1], z[:, None] + steps[:, 2]]
    return around.clamp(-FIELD_BAND, FIELD_BAND) / FIELD_BAND


def first_depth(grid: Tensor, depth: Tensor, resolution: int) -> Tensor:
    """For points (n, 2) in a frame with depths (n,), the least depth among points within about a pixel: (n,).

    The frame is cut into pixels somewhat larger than a voxel, so that a closed layer of voxels has no gaps.
    """
    side = max(1, int(resolution * 0.75))
    cell = ((grid + 1) / 2 * side).floor().long().clamp(-1, side) + 1
    place = cell[:, 0] * (side + 2) + cell[:, 1]
    nearest = depth.new_full(((side + 2) ** 2,), float("inf")).scatter_reduce(0, place, depth, "amin")
    return nearest[place]
