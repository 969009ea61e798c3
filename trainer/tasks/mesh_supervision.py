"""What a mesh decoder's features are compared with: the lattice, surface points, and pictures.

Losses by name, all means:

| name | compares | unit |
|---|---|---|
| sdf | distance at the lattice vertices, averaged over the cubes that share one | fine voxels |
| surface | distance at surface points, which is 0 | fine voxels |
| point_color, point_normal | the channels interpolated at surface points | 0-1 |
| consistency | corner values of cubes that share a vertex | squared channels |
| mask, depth, normal, normal_channel, color | renders of the mesh with prepared pictures | see trainer/losses.py |
| cubes | FlexiCubes' regularisers, as published | |

The decoder's distance is in units of FINE_BAND fine voxels: the +1 that FlexiCubes assumes outside continues it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data import symmetric_sample
from trainer.losses import (
    LossWeights,
    consistency_loss,
    depth_loss,
    field_loss,
    mask_loss,
    picture_loss,
    render_surface,
    vertex_means,
)
from trainer.structured import FINE_BAND, corner_places
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.flexicubes import ExtractedMesh, features_to_mesh
from triptych.geometry.mesh import Mesh
from triptych.sparse.tensor import SparseTensor

NEAR = 1.5 / FINE_BAND  # of the field: the vertices that decide where the surface lies
RENDERED = ("mask", "depth", "normal", "normal_channel", "color", "cubes")
_COLOR_START = 53  # of the decoder's channels
_RIG = rig_cameras()


@dataclass(frozen=True)
class Lattice:
    """The decoder's averages at the lattice: field (V,), channels (V, 6) 0-1 or None, and what they come from."""

    field: Tensor
    channels: Tensor | None
    values: Tensor
    means: Tensor
    counts: Tensor


def lattice_of(out: SparseTensor, rows: Tensor, count: int) -> Lattice:
    """Averages the corners of the decoder's cubes (K for each of n voxels); rows (n, L) of ``count`` vertices."""
    n = len(rows)
    cubes = len(out) // max(n, 1)
    levels = {8: 1, 64: 2}[cubes] if n else 1
    feats = out.feats.float().view(n, cubes, -1)
    field = feats[..., :8, None] - 1 / (out.resolution or 1)
    parts = [field]
    if feats.shape[2] > _COLOR_START:
        parts.append(feats[..., _COLOR_START:].unflatten(2, (8, 6)))
    values = torch.cat(parts, dim=3)
    means, counts = vertex_means(values, rows, corner_places(levels), count)
    channels = means[:, 1:].sigmoid() if means.shape[1] > 1 else None
    return Lattice(means[:, 0], channels, values, means, counts)


def at_points(values: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Trilinear interpolation of values (V, C) at points with vertex rows (p, 8) and weights (p, 8): (p, C)."""
    return torch.einsum("pk,pkc->pc", weights, values[rows])


def direct_losses(lattice: Lattice, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """sdf, surface, consistency, and with colour channels point_color and point_normal."""
    losses = {
        "sdf": field_loss(lattice.field, batch["target"], NEAR, 0.2) * FINE_BAND,
        "consistency": consistency_loss(lattice.values, lattice.means, lattice.counts),
    }
    table = lattice.field[:, None] if lattice.channels is None else torch.cat(
        [lattice.field[:, None], lattice.channels], dim=1
    )  # fmt: skip
    there = at_points(table, batch["point_rows"], batch["point_weights"])
    many = max(len(there), 1)
    losses["surface"] = there[:, 0].abs().sum() / many * FINE_BAND
    if lattice.channels is not None:
        losses["point_color"] = (there[:, 1:4] - batch["point_colors"]).abs().sum() / (3 * many)
        losses["point_normal"] = (there[:, 4:] - (batch["point_normals"] + 1) / 2).abs().sum() / (3 * many)
    return losses


# ---- pictures


def drawn_views(views: dict[str, np.ndarray], symmetry: int, chosen: Sequence[int]) -> dict[str, Tensor]:
    """Prepared pictures as targets under a symmetry: ``pictures`` (v, 7, S, S) uint8: alpha, albedo, normal, black
    in the background; ``views`` (v,) int64, which of the rig."""
    item = symmetric_sample(views | {"sdf": np.zeros((1, 1, 1), np.int8)}, symmetry)
    albedo, normal = item["albedo"][list(chosen)], item["normal"][list(chosen)]
    alpha = albedo[..., 3:].astype(np.float32) / 255
    colors = np.concatenate([albedo[..., :3], normal], axis=-1) * alpha + 0.5
    stacked = np.concatenate([albedo[..., 3:], colors.astype(np.uint8)], axis=-1).transpose(0, 3, 1, 2)
    return {"pictures": torch.from_numpy(np.ascontiguousarray(stacked)), "views": torch.tensor(list(chosen))}


def rendered_losses(
    out: SparseTensor,
    batch: Mapping[str, Tensor],
    weights: LossWeights,
    step: int,
    ssim_weight: float,
    perceptual_weight: float,
) -> dict[str, Tensor]:
    """Losses of RENDERED whose weight is not 0 at this step; batch["pictures"]: as many for each sample."""
    wanted = [name for name in RENDERED if weights.weight(name, step) > 0]
    if not wanted:
        return {}
    totals = {name: out.feats.new_zeros((), dtype=torch.float32) for name in wanted}
    resolution = out.resolution or 1
    count = len(batch["pictures"]) // out.batch_size
    for number, rows in enumerate(out.layout):
        coords = out.coords[rows, 1:]
        mesh = features_to_mesh(coords, out.feats[rows].float(), resolution, training=True)
        part = slice(number * count, (number + 1) * count)
        true = batch["pictures"][part].float() / 255
        cameras = [_RIG[i] for i in batch["views"][part].tolist()]
        drawn = render_surface(mesh.vertices, mesh.faces, mesh.vertex_attrs, cameras, true.shape[-1])
        pairs = {"normal": (drawn.normal, true[:, 4:])}
        if mesh.vertex_attrs is not None:
            pairs |= {
                "color": (drawn.channels[:, :3], true[:, 1:4]),
                "normal_channel": (drawn.channels[:, 3:], true[:, 4:]),
            }
        for name, (predicted, picture) in pairs.items():
            if name in wanted:
                totals[name] = totals[name] + picture_loss(predicted, picture, ssim_weight, perceptual_weight)
        if "mask" in wanted:
            totals["mask"] = totals["mask"] + mask_loss(drawn.mask, true[:, :1])
        if "cubes" in wanted and mesh.reg_loss is not None:
            totals["cubes"] = totals["cubes"] + mesh.reg_loss
        if "depth" in wanted:
            with torch.no_grad():
                surface = true_mesh(coords, number, batch, resolution)
                seen = render_surface(surface.vertices, surface.faces, None, cameras, true.shape[-1])
            both = seen.seen & drawn.seen
            totals["depth"] = totals["depth"] + depth_loss(drawn.depth, seen.depth, both)
    return {name: total / out.batch_size for name, total in totals.items()}


def true_mesh(fine_coords: Tensor, number: int, batch: Mapping[str, Tensor], resolution: int) -> ExtractedMesh:
    """The surface of sample ``number`` that its lattice distances describe, on the same cubes (n K, 3)."""
    first = int(batch["lengths"][:number].sum())
    rows = batch["rows"][first : first + int(batch["lengths"][number])]
    levels = {27: 1, 125: 2}[rows.shape[1]]
    field = batch["target"][rows[:, corner_places(levels).to(rows.device)]].flatten(0, 1)
    feats = field.new_zeros(len(field), _COLOR_START)
    feats[:, :8] = field + 1 / resolution
    return features_to_mesh(fine_coords, feats, resolution)


# ---- meshes to look at and to measure


def outer_mesh(mesh: ExtractedMesh, coords: Tensor, resolution: int) -> Mesh:
    """The mesh without the surface that closes the active cubes (N, 3) on their inner side, with vertex colours.

    FlexiCubes takes all that is not active for outside, so a band of cubes gets a second surface inside, just beyond
    its rim, in cubes that are not active: those faces go.
    """
    active = torch.zeros((resolution,) * 3, dtype=torch.bool, device=coords.device)
    active[tuple(coords.long().t())] = True
    vertices = mesh.vertices.detach().float()
    cell = ((vertices + 0.5) * resolution).long().clamp(0, resolution - 1)
    faces = mesh.faces[active[tuple(cell.t())][mesh.faces].all(dim=1)]
    used, inverse = torch.unique(faces, return_inverse=True)
    colors = None
    if mesh.vertex_attrs is not None:
        rgb = mesh.vertex_attrs.detach()[used, :3].float().cpu().numpy()
        colors = np.concatenate([rgb, np.ones_like(rgb[:, :1])], axis=1)
    return Mesh(vertices[used].cpu().numpy(), inverse.view(-1, 3).cpu().numpy(), colors=colors)


def two_sided_distance(mesh: Mesh, points: np.ndarray, true: Mesh | None = None, samples: int = 40_000) -> float:
    """Chamfer distance: the mean of points (P, 3) -> mesh and of the mesh -> ``true``; 1 where a mesh is empty.

    Both directions measure to ``samples`` samples of a surface, which adds 0.0025 to the distance for an area of 1.
    Without ``true`` the points stand for the true surface: the fewer they are, the larger the distance.
    """
    from scipy.spatial import cKDTree

    from triptych.geometry.metrics import sample_surface

    if not len(mesh.faces) or (true is not None and not len(true.faces)):
        return 1.0
    found, _ = sample_surface(mesh, samples)
    wanted = points if true is None else sample_surface(true, samples, seed=1)[0]
    there = cKDTree(found).query(points)[0].mean()
    back = cKDTree(wanted).query(found[:: max(1, samples // len(points))])[0].mean()
    return float(there + back) / 2
