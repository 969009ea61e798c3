"""FlexiCubes inside a coarser field: fine cubes where the surface is expected, the field's sign everywhere else.

The published extraction takes all that is not active for outside. A band of cubes around the surface of a solid then
gets a second surface on its inner side. Where a first stage already says what is inside, its field fills the rest of
the lattice: the mesh is closed, one sheet thick, and where the band's own surface leaves the band it meets the field's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .flexicubes import (
    ExtractedMesh,
    _corner_mean,
    _place,
    _rows_or,
    _split_channels,
    _vertex_attributes,
)
from .flexicubes_grid import (
    SurfaceCubes,
    check_cubes,
    dense_surface,
    dual_topology,
    linear_ids,
    lookup,
    touched_vertices,
    unique_ids,
)


def features_to_closed_mesh(
    coords: Tensor,
    feats: Tensor,
    resolution: int,
    background: Tensor,
    limit: Tensor | None = None,
    trust: float = 1.0,
) -> ExtractedMesh:
    """``features_to_mesh`` with another outside than +1, not for training.

    coords (N, 3), feats (N, 101 or 53), resolution: as there. background: (R + 1,) * 3 signed values at the grid
    vertices, negative inside, in the unit of the features' sdf; its sign counts where no active cube touches a vertex.
    limit: the same of a solid that the mesh is cut by, such as a visual hull; None cuts nothing. trust: how much of the
    features' sdf is taken where there is one, 0-1; the rest is the background's.
    Memory is that of the dense lattice, 129^3 floats for 128^3 cubes. Raises TriptychError for cubes outside the grid.
    """
    check_cubes(coords, resolution)
    sdf, corner_values, weights = _split_channels(feats, resolution)
    touched = touched_vertices(coords, resolution)
    filled = background.to(sdf).flatten().clone()
    filled[touched.ids] = filled[touched.ids].lerp(_corner_mean([sdf[..., None]], touched)[:, 0], trust)
    if limit is not None:
        filled = torch.maximum(filled, limit.to(filled).flatten())
    surface = dense_surface((filled < 0).view(*[resolution + 1] * 3))
    cubes, order = torch.sort(linear_ids(coords, resolution))
    row = lookup(cubes, surface.rows)
    rows = torch.where(row >= 0, order[row.clamp(min=0)], -1) if len(order) else row
    surface = SurfaceCubes(surface.coords, surface.inside, rows)
    topology = dual_topology(surface, resolution)
    ids, ends = unique_ids(topology.ends, (resolution + 1) ** 3)
    values = _corner_mean(corner_values, touched, lookup(touched.ids, ids))
    mesh = _place(
        topology,
        ends,
        filled[ids],
        _vertex_attributes(ids, values, resolution),
        _rows_or(weights, rows, 0.0),
        training=False,
    )
    return ExtractedMesh(mesh.vertices, mesh.faces, mesh.colours, None, None, None)


def lattice_background(field: Tensor, resolution: int) -> Tensor:
    """A field (R, R, R) at voxel centres, positive inside, at the (resolution + 1)^3 vertices of a finer grid, negated.

    Linear between centres; half a voxel beyond the last centres, at the cube's faces, it is outside.
    """
    side = field.shape[0]
    place = torch.arange(resolution + 1, device=field.device) * (side / resolution) + 0.5  # in the padded field
    low = place.floor().long().clamp(0, side)
    share = (place - low).to(field)
    out = F.pad(field[None, None], (1,) * 6, value=-1.0)[0, 0]
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = -1
        weight = share.view(shape)
        out = out.index_select(axis, low) * (1 - weight) + out.index_select(axis, low + 1) * weight
    return -out
