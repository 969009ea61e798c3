"""Lifting added to a published structure flow: its tokens also look at the posed views they project into.

The published network sees pictures through cross-attention to the tokens of a vision transformer. Here one or more
views with known cameras are given as such tokens, one view after the other, and as pictures. New beside the published
layers: a small view encoder whose features each block of voxels collects where it projects to, the visual hull in the
block, and an embedding of each view's pose on its tokens. The three layers that feed the published network start at
zero: at first the result is the published network's, for one view exactly as it is published, for more with all their
tokens in one context.

It predicts the velocity, as published, and works in the published frame: +Z up, front -Y.

Shape suffixes: B samples, N views of all samples, L tokens of one sample, M image tokens of one view.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import CrossAttention
from .lifting import GEOMETRY, Lift, PosedViews, ViewEncoder, block_points, waves
from .structure_flow import SparseStructureFlowModel

HULL_POINTS = 4  # along each side of a block
_LIFTING = ("view_encoder", "lift", "lift_out", "hull_layer", "pose_layer", "normal_head")


@dataclass(frozen=True)
class PublishedViews:
    """What the tokens need to know of the views, computed once for all sampling steps.

    context: (1, image tokens of all samples, Cc); context_lengths of each sample. lifted_BLC: added to the voxel
    tokens. normals: (N, 3, S/4, S/4) as in LiftedCondition, None without a normal head.
    """

    context: Tensor
    context_lengths: tuple[int, ...]
    lifted_BLC: Tensor
    normals: Tensor | None = None

    def null(self) -> PublishedViews:
        """The unconditional twin for guidance: tokens of zeros, as published, and no picture."""
        return self.without(torch.ones(len(self.context_lengths), dtype=torch.bool, device=self.context.device))

    def without(self, drop: Tensor) -> PublishedViews:
        """The views of the samples in ``drop`` (B,) bool are taken away."""
        keep = (~drop).to(self.context.dtype)
        lengths = torch.tensor(self.context_lengths, device=keep.device)
        context = self.context * keep.repeat_interleave(lengths)[None, :, None]
        return replace(
            self, context=context, lifted_BLC=self.lifted_BLC * keep[:, None, None].to(self.lifted_BLC.dtype)
        )


def to_world(points: Tensor) -> Tensor:
    """Points (..., 3) of the published frame (+Z up, front -Y) in the cameras' world (+Y up, front +Z)."""
    x, y, z = points.unbind(-1)
    return torch.stack([x, z, -y], dim=-1)


class LiftedPublishedFlow(SparseStructureFlowModel):
    """SparseStructureFlowModel with lifting; the state dict holds the published keys and the lifting's.

    image_size: S of the pictures. encoder_channels, encoder_blocks: of the view encoder. lift_channels: width of what a
    block collects. normal_head: as in LiftedStructureFlow, for a training loss.
    """

    def __init__(
        self,
        *,
        image_size: int = 256,
        encoder_channels: tuple[int, int] = (96, 192),
        encoder_blocks: tuple[int, int] = (2, 3),
        lift_channels: int = 256,
        normal_head: bool = False,
        **flow: Any,
    ) -> None:
        super().__init__(**flow)
        channels, context = flow["model_channels"], flow["cond_channels"]
        fine, coarse = encoder_channels
        side = self.resolution // self.patch_size
        self.image_size = image_size
        self.view_encoder = ViewEncoder((fine, coarse), (encoder_blocks[0], encoder_blocks[1]), context)
        self.view_encoder.tokens = nn.Identity()  # type: ignore[assignment]  # the vision transformer has them
        self.lift = Lift(8 * coarse, GEOMETRY, lift_channels)
        self.lift_out = nn.Linear(lift_channels, channels)
        self.hull_layer = nn.Linear(HULL_POINTS**3, channels)
        self.pose_layer = nn.Linear(GEOMETRY, context)
        self.normal_head = nn.Conv2d(coarse, 3 * 4, 1) if normal_head else None
        for layer in (self.lift_out, self.hull_layer, self.pose_layer):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("probe", to_world(block_points(side, 2)), persistent=False)
        self.register_buffer("hull_probe", to_world(block_points(side, HULL_POINTS)), persistent=False)

    probe: Tensor
    hull_probe: Tensor

    @classmethod
    def around(cls, network: SparseStructureFlowModel, lifting: dict[str, Any]) -> LiftedPublishedFlow:
        """New lifting around a published network, whose layers are shared, not copied. lifting: its arguments."""
        position = network.pos_emb.shape[-1]
        out = network.out_layer.out_features // network.patch_size**3
        context = next(m.to_kv.in_features for m in network.modules() if isinstance(m, CrossAttention))
        model = cls(
            resolution=network.resolution, in_channels=network.in_channels, model_channels=position,
            cond_channels=context, out_channels=out, num_blocks=0, patch_size=network.patch_size,
            share_mod=network.share_mod, **lifting,
        )  # fmt: skip
        for name, child in network.named_children():
            setattr(model, name, child)
        model.pos_emb = network.pos_emb
        model.dtype, model.use_checkpoint = network.dtype, network.use_checkpoint
        return model

    def lifting_state(self) -> dict[str, Tensor]:
        """The tensors that the published network does not have."""
        return {k: v.detach() for k, v in self.state_dict().items() if k.split(".", 1)[0] in _LIFTING}

    def lifting_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name.split(".", 1)[0] in _LIFTING]

    # ---- condition

    def condition(self, tokens: Tensor, views: PosedViews) -> PublishedViews:
        """tokens (N, M, cond_channels): the vision transformer's, of the same views; views: their pictures and cameras.

        Raises ValueError where numbers and sizes disagree.
        """
        size = self.image_size
        if views.images.shape[1:] != (4, size, size) or len(tokens) != len(views.images):
            raise ValueError(
                f"views are {tuple(views.images.shape)} with {len(tokens)} sets of tokens, expected (N, 4, {size}, "
                f"{size})"
            )
        _, features, _ = self.view_encoder.pyramid(views.images)
        rotations = torch.stack([camera.rotation() for camera in views.cameras]).to(tokens.device)
        pose = self.pose_layer(torch.cat([rotations[:, 2], waves(rotations[:, 0])], dim=-1))
        context = tokens + pose[:, None].type(tokens.dtype)
        normals = None if self.normal_head is None else F.pixel_shuffle(self.normal_head(features), 2)
        lifted = self.lift_out(self._lift(views, features)) + self.hull_layer(self._hull(views))
        return PublishedViews(
            context=context.flatten(0, 1)[None],
            context_lengths=tuple(count * tokens.shape[1] for count in views.counts),
            lifted_BLC=lifted.view(len(views.counts), -1, lifted.shape[-1]),
            normals=normals,
        )

    def _lift(self, views: PosedViews, features: Tensor) -> Tensor:
        """(B L, lift_channels); pairs of view and token, ordered by view."""
        length, pixels, geometry, rows, n = len(self.probe), [], [], [], 0
        for b, count in enumerate(views.counts):
            for camera in views.cameras[n : n + count]:
                ndc, depth = camera.project(self.probe)
                grid = (ndc * ndc.new_tensor([1, -1])).to(features.dtype)
                found = F.grid_sample(features[n : n + 1], grid[None], align_corners=False, padding_mode="border")
                centre = torch.cat([ndc.mean(dim=1), (depth.mean(dim=1) - camera.radius)[:, None]], dim=-1)
                direction = camera.rotation()[2].to(centre).expand(length, 3)
                pixels.append(found[0].permute(1, 2, 0).flatten(1))
                geometry.append(torch.cat([direction, waves(centre)], dim=-1))
                rows.append(torch.arange(b * length, (b + 1) * length, device=features.device))
                n += 1
        lift = self.lift
        seen_from = lift.from_geometry(torch.cat(geometry))
        return lift(lift.from_pixels(torch.cat(pixels)), seen_from, torch.cat(rows), len(views.counts) * length)

    @torch.no_grad()
    def _hull(self, views: PosedViews) -> Tensor:
        """(B L, HULL_POINTS^3) -1 to 1: the least alpha over a sample's views at points of each block."""
        alpha = views.images[:, 3:].float()
        hull = alpha.new_ones(len(views.counts), *self.hull_probe.shape[:2])
        owners = [b for b, count in enumerate(views.counts) for _ in range(count)]
        for n, (camera, b) in enumerate(zip(views.cameras, owners, strict=True)):
            grid = camera.project(self.hull_probe)[0] * alpha.new_tensor([1, -1])
            hull[b] = torch.minimum(hull[b], F.grid_sample(alpha[n : n + 1], grid[None], align_corners=False)[0, 0])
        return hull.flatten(0, 1) * 2 - 1

    # ---- velocity

    def forward(self, x: Tensor, t: Tensor, cond: PublishedViews | Tensor) -> Tensor:  # type: ignore[override]
        """Velocity (B, C, R, R, R) at x; t (B,) is the flow time times 1000. cond: of `condition`, or the published
        network's own (B, M, cond_channels)."""
        if isinstance(cond, Tensor):
            return super().forward(x, t, cond)
        h = self.embed(x) + cond.lifted_BLC
        lengths = [h.shape[1]] * len(h)
        packed = self.run_blocks(
            h.flatten(0, 1)[None],
            self.t_embedder(t),
            cond.context,
            lengths=lengths,
            context_lengths=cond.context_lengths,
        )
        return self.to_grid(self.head(packed.view(h.shape)).type(x.dtype))
