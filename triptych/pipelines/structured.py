"""The second stage: from a first stage's field to structured latents, and from those to a mesh with vertex colours.

    field --its surface--> active voxels --lifted latent flow--> latents --mesh decoder--> FlexiCubes --> mesh

The active voxels are those within ``active_band`` voxels of the field's zero level. FlexiCubes works on them alone; the
field says what is inside elsewhere, so the mesh is closed. Functions take progress and cancel callbacks and touch no
files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..bundles.bundle import Bundle
from ..errors import TriptychError
from ..geometry.flexicubes_field import features_to_closed_mesh, lattice_background
from ..geometry.mesh import Mesh
from ..models.lifting import PosedViews
from ..models.slat_decoder import SLatMeshDecoder
from ..models.slat_lifting import LiftedSLatFlow
from ..sampling.flow_euler import flow_euler_sample
from ..sparse.tensor import SparseTensor

FINE_BAND = 4.0  # fine voxels: the unit of the tiny decoder's signed distance
FLAT_VOXELS = 30_000  # more than a surface of 64^3 has, but for the most crinkled ones
MAX_VOXELS = 100_000


def has_second_stage(bundle: Bundle) -> bool:
    """Whether the bundle refines its first stage's field with structured latents."""
    return bundle.has("slat_flow") and bundle.has("slat_decoder_mesh")


def active_voxels(field: np.ndarray, band: float) -> np.ndarray:
    """(N, 3) int32 voxels where ``field`` (R, R, R) is within ``band`` voxels of its surface.

    A first stage that is unsure (one view) is flat around zero over a wide region: then only voxels next to a change of
    sign count. Raises TriptychError when there are none, or more than a machine should be asked for.
    """
    near = np.abs(field) < band
    if near.sum() > FLAT_VOXELS:
        inside = field > 0
        changes = np.zeros_like(inside)
        for axis in range(3):
            step = np.diff(inside, axis=axis)
            for pad in ((1, 0), (0, 1)):
                changes |= np.pad(step, [pad if k == axis else (0, 0) for k in range(3)])
        near &= ndimage.binary_dilation(changes)
    coords = np.argwhere(near).astype(np.int32)
    if not len(coords):
        raise TriptychError("the network found nothing solid: check that each view shows the whole object, cut out")
    if len(coords) > MAX_VOXELS:
        raise TriptychError(
            f"the structure has {len(coords):,} active voxels, {MAX_VOXELS:,} are allowed: the pictures may not be cut "
            "out, or show more than one object"
        )
    return coords


def latents_from_views(
    posed: PosedViews,
    field: np.ndarray,
    flow: LiftedSLatFlow,
    *,
    band: float,
    seed: int = 0,
    steps: int = 1,
    guidance: float = 0.0,
    rescale_t: float = 1.0,
    draws: int = 1,
    step: Callable[[float], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> SparseTensor:
    """Structured latents (N, C) of the views of one object, on the active voxels of ``field`` (R, R, R).

    draws: the mean is taken of so many samples from different noise. A small flow follows its noise where the views
    leave a voxel open, and single voxels that go astray are shards of the mesh.
    step(fraction) is called after each sampling step. Raises Cancelled, and TriptychError as ``active_voxels`` does.
    """
    device = posed.images.device
    rows = torch.from_numpy(active_voxels(field, band)).to(device)
    coords = torch.cat([torch.zeros_like(rows[:, :1]), rows], dim=1)
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(len(rows), flow.in_channels, generator=generator).to(device) for _ in range(draws)]
    x = SparseTensor(noises[0], coords, 1, flow.resolution)
    cond = flow.condition(posed, x, torch.from_numpy(np.ascontiguousarray(field)).to(device)[None])
    neg_cond = cond.null() if guidance else None
    total = torch.zeros_like(noises[0])
    for number, noise in enumerate(noises):
        found = flow_euler_sample(
            flow,
            x.replace(noise),
            steps=steps,
            guidance=guidance,
            guidance_interval=(0.5, 1.0),
            rescale_t=rescale_t,
            cond=cond,
            neg_cond=neg_cond,
            callback=partial(_told, step, number, draws) if step else None,
            cancel=cancel,
        ).samples
        total = total + found.feats.float()
    return x.replace(flow.denormalize(total / draws))


def _told(step: Callable[[float], None], number: int, draws: int, done: int, steps: int, _: object) -> None:
    step((number + done / steps) / draws)


def mesh_from_latents(
    decoder: SLatMeshDecoder, latents: SparseTensor, field: Tensor, hull: Tensor | None = None, trust: float = 1.0
) -> Mesh:
    """The closed mesh of one sample's latents, vertex-coloured, in model space.

    field (R, R, R): the first stage's, in voxels, positive inside. hull: the same of what the silhouettes allow, by
    which the mesh is cut; None leaves it whole. trust: share of the decoder in the distances, the rest is the field's.
    """
    features = decoder(latents)
    side = features.resolution or latents.resolution
    assert side is not None
    scale = side / field.shape[0] / FINE_BAND
    background = (lattice_background(field.float(), side) * scale).clamp(-1, 1)
    limit = None if hull is None else (lattice_background(hull.float(), side) * scale).clamp(-1, 1)
    found = features_to_closed_mesh(features.coords[:, 1:], features.feats.float(), side, background, limit, trust)
    colors = None
    if found.vertex_attrs is not None:
        rgb = found.vertex_attrs[:, :3].float().cpu().numpy()
        colors = np.concatenate([rgb, np.ones_like(rgb[:, :1])], axis=1).astype(np.float32)
    vertices = found.vertices.float().cpu().numpy()
    return Mesh(vertices, found.faces.cpu().numpy().astype(np.int32), colors=colors)
