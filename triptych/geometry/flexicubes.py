"""FlexiCubes: from a signed field on a grid, with per-cube weights, to a triangle mesh with gradients.

The method (Shen et al., Flexible Isosurface Extraction for Gradient-Based Mesh Optimization, 2023) is dual marching
cubes (Nielson 2004) made adjustable. Each cube that the surface crosses holds one vertex for each loop of crossed edges
(see `flexicubes_tables`), and each crossed edge gives a quad between the vertices of the four cubes round it. What is
learned, besides the field (negative inside) and the position of the grid vertices:

- alpha, for each corner of a cube, scales the field as that cube sees it, which slides its crossings along the edges;
- beta, for each edge of a cube, weighs the crossings whose mean is the dual vertex;
- gamma, one for each cube, decides how a quad is split: along the diagonal whose two gammas have the larger product. In
  training all four triangles round a middle vertex are made instead, which lies between both diagonals' middles in
  proportion to the products, so that gamma has a gradient too.

Raw weights pass through tanh or a sigmoid into (0.01, 1.99) for alpha and beta and (0.005, 0.995) for gamma. Attributes
of grid vertices (colours) pass a sigmoid and are interpolated with the same weights as positions. `deviation` is how
much the distances from a dual vertex to its uncorrected crossings differ from their mean: the method's regulariser.

Three ways in: `flexicubes_dense` on a whole grid, the plain reference; `flexicubes_sparse` on a list of active cubes,
where vertices that no active cube touches are outside (+1) and all else is 0, equal bit for bit to the dense grid that
is filled like this; and `features_to_mesh`, from the 101 channels of the published TRELLIS mesh decoder. Numbering of
corners, edges, vertices and faces is that of the published code, so that results can be compared index by index.

Faces are counter-clockwise from outside. Positions are in the model's own frame (published: z up, [-0.5, 0.5]^3 and up
to half a cube beyond); converting them is the caller's.

Not covered: the surface is left open where it leaves the grid; quads may fold over where weights are extreme, nothing
prevents self-intersection; no placing of dual vertices by an error quadric, no tetrahedra, no grids with unequal sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TriptychError
from .flexicubes_grid import (
    Topology,
    TouchedVertices,
    check_cubes,
    dense_surface,
    dual_topology,
    grid_coords,
    lookup,
    sparse_surface,
    touched_vertices,
    unique_ids,
)
from .flexicubes_tables import EDGES

WEIGHT_SCALE = 0.99  # keeps alpha and beta off 0 and 2, gamma off 0 and 1
CHANNELS = {"sdf": 8, "deform": 24, "beta": 12, "alpha": 8, "gamma": 1, "colour": 48}  # of the decoder, in order


@dataclass(frozen=True)
class FlexiMesh:
    """vertices (V, 3), faces (F, 3) int64, colours (V, C) in [0, 1] or None, deviation (G,) the regulariser."""

    vertices: Tensor
    faces: Tensor
    colours: Tensor | None
    deviation: Tensor


@dataclass(frozen=True)
class ExtractedMesh:
    """The mesh of one sample of the mesh decoder.

    vertices: (V, 3) in the model's frame. faces: (F, 3) int64. vertex_attrs: (V, 6) in [0, 1], red, green, blue and a
    normal as (n + 1) / 2, or None without colour channels. In training also reg_loss (), tsdf_v (T, 3) and tsdf_s (T,),
    deformed positions and signed values of the touched grid vertices, ascending by x, y, z; else None.
    """

    vertices: Tensor
    faces: Tensor
    vertex_attrs: Tensor | None
    reg_loss: Tensor | None
    tsdf_v: Tensor | None
    tsdf_s: Tensor | None


def flexicubes_dense(
    positions: Tensor,
    sdf: Tensor,
    beta: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    resolution: int,
    colours: Tensor | None = None,
    training: bool = False,
) -> FlexiMesh:
    """The surface of a whole grid of R^3 cubes; both kinds of rows are in grid order, x slowest.

    positions ((R+1)^3, 3), sdf ((R+1)^3,) negative inside, colours ((R+1)^3, C) before the sigmoid or None: of the grid
    vertices. beta (R^3, 12), alpha (R^3, 8), gamma (R^3,): of the cubes, raw. All of one floating dtype.
    A grid without a crossing gives a mesh without vertices. Raises TriptychError where row counts do not fit R.
    """
    vertices, cubes = (resolution + 1) ** 3, resolution**3
    _check_rows("grid vertices", vertices, positions=positions, sdf=sdf, colours=colours)
    _check_rows("cubes", cubes, beta=beta, alpha=alpha, gamma=gamma)
    side = resolution + 1
    surface = dense_surface((sdf.detach() < 0).view(side, side, side))
    topology = dual_topology(surface, resolution)
    ids, ends = unique_ids(topology.ends, vertices)
    attributes = positions[ids] if colours is None else torch.cat([positions[ids], colours[ids].sigmoid()], dim=1)
    weights = torch.cat([beta, alpha, gamma[:, None]], dim=1)[surface.rows]
    return _place(topology, ends, sdf[ids], attributes, weights, training)


def flexicubes_sparse(
    cubes: Tensor,
    sdf: Tensor,
    deform: Tensor,
    weights: Tensor,
    resolution: int,
    colours: Tensor | None = None,
    training: bool = False,
    touched: TouchedVertices | None = None,
) -> FlexiMesh:
    """The surface of the active cubes (N, 3), integers in [0, resolution), in any order and each once.

    weights (N, 21): beta 12, alpha 8, gamma 1, raw. Of the V touched grid vertices in ascending order (see
    `flexicubes_grid.touched_vertices`, whose result may be given): sdf (V,) negative inside; deform (V, 3) before the
    tanh, see `deformed_positions`; colours (V, C) before the sigmoid, or None.
    Raises TriptychError for cubes outside the grid or repeated, and where row counts do not fit.
    """
    if touched is None:
        check_cubes(cubes, resolution)
        touched = touched_vertices(cubes, resolution)
    _check_rows("touched grid vertices", len(touched.ids), sdf=sdf, deform=deform, colours=colours)
    _check_rows("cubes", len(cubes), weights=weights)
    surface = sparse_surface(cubes, touched, sdf.detach() < 0, resolution)
    topology = dual_topology(surface, resolution)
    ids, ends = unique_ids(topology.ends, (resolution + 1) ** 3)
    rows = lookup(touched.ids, ids)
    raw = deform if colours is None else torch.cat([deform, colours], dim=1)
    return _place(
        topology,
        ends,
        _rows_or(sdf, rows, 1.0),
        _vertex_attributes(ids, _rows_or(raw, rows, 0.0), resolution),
        _rows_or(weights, surface.rows, 0.0),
        training,
    )


def features_to_mesh(coords: Tensor, feats: Tensor, resolution: int, training: bool = False) -> ExtractedMesh:
    """The mesh that the channels of the published mesh decoder describe (TRELLIS, SparseFeatures2Mesh).

    coords: (N, 3) integers in [0, resolution), the active cubes of one sample. feats: (N, 101), or (N, 53) without
    colours: sdf (8 corners), deform (8 x 3), beta 12, alpha 8, gamma 1, colour (8 x 6: RGB, normal). Corner values are
    averaged over the active cubes that share the corner, after -1/resolution is added to the sdf. Half precision is
    computed in float32. Differentiable with respect to feats; feats are not changed.

    training: a middle vertex in each quad, and reg_loss = mean squared difference of a cube's corner values from their
    averages + 0.5 mean deviation + 0.2 mean |beta, alpha| (raw).
    No cubes or no crossing gives empty tensors. Raises TriptychError for cubes outside the grid or repeated, another
    number of channels, and (outside training) for values that are not finite.
    """
    check_cubes(coords, resolution)
    _check_rows("cubes", len(coords), feats=feats)
    sdf, corner_values, weights = _split_channels(feats, resolution)
    touched = touched_vertices(coords, resolution)
    if training:
        return _training_mesh(coords, sdf, corner_values, weights, touched, resolution)
    sdf_V = _corner_mean([sdf[..., None]], touched)[:, 0]
    _check_finite(sdf_V, "signed distances")
    surface = sparse_surface(coords, touched, sdf_V.detach() < 0, resolution)
    topology = dual_topology(surface, resolution)
    ids, ends = unique_ids(topology.ends, (resolution + 1) ** 3)
    rows = lookup(touched.ids, ids)
    # Most touched vertices are no end of a crossed edge: averaging only those that are saves most of the memory.
    values = _corner_mean(corner_values, touched, rows)
    mesh = _place(
        topology,
        ends,
        _rows_or(sdf_V, rows, 1.0),
        _vertex_attributes(ids, values, resolution),
        _rows_or(weights, surface.rows, 0.0),
        training=False,
    )
    _check_finite(mesh.vertices, "vertex coordinates")
    return ExtractedMesh(mesh.vertices, mesh.faces, mesh.colours, None, None, None)


def deformed_positions(coords: Tensor, deform: Tensor, resolution: int) -> Tensor:
    """(V, 3) grid vertices, integers in [0, resolution], in the model cube [-0.5, 0.5]^3, each within half a cube."""
    # torch rounds tanh and sigmoid of strided rows otherwise than of contiguous ones.
    return coords.to(deform.dtype) / resolution - 0.5 + (1 - 1e-8) / (2 * resolution) * torch.tanh(deform.contiguous())


# ---- from the decoder's channels


def _split_channels(feats: Tensor, resolution: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """sdf (N, 8) with its bias, deform (N, 8, 3) and where present colours (N, 8, 6), weights (N, 21)."""
    full = sum(CHANNELS.values())
    plain = full - CHANNELS["colour"]
    if feats.dim() != 2 or feats.shape[1] not in (full, plain):
        raise TriptychError(
            f"features must be (N, {full}), or (N, {plain}) without colours, not {tuple(feats.shape)}: "
            f"take them from a mesh decoder"
        )
    if feats.dtype in (torch.float16, torch.bfloat16):
        feats = feats.float()
    bounds = [CHANNELS["sdf"], CHANNELS["deform"], 21]
    sdf, deform, weights, colour = feats.split([*bounds, feats.shape[1] - sum(bounds)], dim=1)
    values = [deform.unflatten(1, (8, 3))]
    if colour.shape[1]:
        values.append(colour.unflatten(1, (8, 6)))
    return sdf - 1 / resolution, values, weights


def _corner_mean(values: list[Tensor], touched: TouchedVertices, rows: Tensor | None = None) -> Tensor:
    """Mean at the touched vertices of corner values, each (N, 8, C_i), side by side: (V, C).

    With `rows` (n,) only at those vertices: (n, C), 0 where a row is -1.
    """
    if rows is None:
        target, counts = touched.rows.flatten(), touched.counts
        source = torch.cat(values, dim=2).flatten(0, 1)
    else:
        known = (rows >= 0).nonzero()[:, 0]
        wanted = torch.full_like(touched.ids, -1)
        wanted[rows[known]] = known
        target = wanted[touched.rows]
        keep = (target >= 0).nonzero(as_tuple=True)
        target, counts = target[keep], torch.where(rows >= 0, touched.counts[rows.clamp(min=0)], 1)
        source = torch.cat([value[keep] for value in values], dim=1)
    return _sum_by(source, target, len(counts)) / counts[:, None]


def _training_mesh(
    coords: Tensor, sdf: Tensor, corner_values: list[Tensor], weights: Tensor, touched: TouchedVertices, resolution: int
) -> ExtractedMesh:
    values = torch.cat([sdf[..., None], *corner_values], dim=2)
    mean = _corner_mean([values], touched)
    has_colours = mean.shape[1] > 4
    mesh = flexicubes_sparse(
        coords,
        mean[:, 0],
        mean[:, 1:4],
        weights,
        resolution,
        colours=mean[:, 4:] if has_colours else None,
        training=True,
        touched=touched,
    )
    reg_loss = values.new_zeros(())
    if len(coords):
        # Corner by corner: all eight at once would be the largest array of the whole extraction.
        squares = [(values[:, c] - _take(mean, touched.rows[:, c])).square().sum() for c in range(8)]
        reg_loss = torch.stack(squares).sum() / values.numel() + 0.2 * weights[:, :20].abs().mean()
    if len(mesh.faces):
        reg_loss = reg_loss + 0.5 * mesh.deviation.mean()
    positions = deformed_positions(grid_coords(touched.ids, resolution + 1), mean[:, 1:4], resolution)
    return ExtractedMesh(mesh.vertices, mesh.faces, mesh.colours, reg_loss, positions, mean[:, 0])


# ---- vertices in space


def _vertex_attributes(ids: Tensor, raw: Tensor, resolution: int) -> Tensor:
    """(V, 3 + C): positions from the raw deformation raw[:, :3], then raw[:, 3:] through a sigmoid."""
    positions = deformed_positions(grid_coords(ids, resolution + 1), raw[:, :3], resolution)
    return torch.cat([positions, raw[:, 3:].contiguous().sigmoid()], dim=1)


def _place(
    topology: Topology, ends: Tensor, sdf: Tensor, attributes: Tensor, raw_weights: Tensor, training: bool
) -> FlexiMesh:
    """Vertices and triangles of a topology.

    ends: (E, 2) rows of sdf (n,) and attributes (n, 3 + C), positions first. raw_weights: (M, 21) of the surface cubes.
    """
    alpha_beta = torch.tanh(raw_weights[:, :20]) * WEIGHT_SCALE + 1
    gamma = torch.sigmoid(raw_weights[:, 20]) * WEIGHT_SCALE + (1 - WEIGHT_SCALE) / 2
    cube, local, edge, vertex = (
        topology.entry_cube,
        topology.entry_local,
        topology.entry_edge,
        topology.entry_vertex,
    )
    beta = _take(alpha_beta.flatten(), 20 * cube + local)[:, None]
    alpha = _take(alpha_beta.flatten(), 20 * cube[:, None] + 12 + EDGES.to(cube.device)[local])
    dual_count = len(topology.vertex_cube)
    crossing = _interpolate(_take(sdf, ends[edge]) * alpha, attributes, ends[edge])
    dual = _sum_by(crossing * beta, vertex, dual_count) / _sum_by(beta, vertex, dual_count)
    uncorrected = _interpolate(_take(sdf, ends), attributes[:, :3], ends)
    deviation = _deviation(dual[:, :3], _take(uncorrected, edge), vertex)
    dual, faces = _triangles(dual, topology.quads, _take(gamma, topology.vertex_cube), training)
    colours = dual[:, 3:] if attributes.shape[1] > 3 else None
    return FlexiMesh(dual[:, :3], faces, colours, deviation)


def _interpolate(sdf: Tensor, attributes: Tensor, ends: Tensor) -> Tensor:
    """Where the linear function with values sdf (k, 2) at the ends is 0: attributes (k, C) there; ends (k, 2) rows."""
    first, second = sdf[:, :1], sdf[:, 1:]
    return (_take(attributes, ends[:, 0]) * second - _take(attributes, ends[:, 1]) * first) / (second - first)


def _sum_by(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """(k, C) summed over rows of one group: (groups, C)."""
    return values.new_zeros(groups, values.shape[1]).scatter_add(0, group[:, None].expand_as(values), values)


def _deviation(dual: Tensor, crossing: Tensor, vertex: Tensor) -> Tensor:
    """(G,) how far the distance of each crossing (G, 3) from its dual vertex is from the mean of that vertex."""
    distance = torch.linalg.vector_norm(crossing - _take(dual, vertex), dim=1, keepdim=True)
    mean = _sum_by(distance, vertex, len(dual)) / _sum_by(torch.ones_like(distance), vertex, len(dual))
    return (distance - _take(mean, vertex))[:, 0].abs()


def _triangles(dual: Tensor, quads: Tensor, gamma: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    """Vertices with those added in training, and faces (F, 3). gamma: (D,) of the dual vertices."""
    g = _take(gamma, quads)
    even, odd = g[:, 0] * g[:, 2], g[:, 1] * g[:, 3]
    if not training:
        # A tie (quads among inactive cubes) takes the second diagonal.
        along_even = quads[:, [0, 1, 2, 0, 2, 3]]
        along_odd = quads[:, [0, 1, 3, 3, 1, 2]]
        return dual, torch.where((even > odd)[:, None], along_even, along_odd).view(-1, 3)
    corners = _take(dual, quads)
    middles = (corners[:, 0] + corners[:, 2]) / 2, (corners[:, 1] + corners[:, 3]) / 2
    centre = (middles[0] * even[:, None] + middles[1] * odd[:, None]) / (even + odd + 1e-8)[:, None]
    number = len(dual) + torch.arange(len(quads), device=quads.device)[:, None].expand(-1, 4)
    faces = torch.stack([quads, quads.roll(-1, dims=1), number], dim=2).view(-1, 3)
    return torch.cat([dual, centre]), faces


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], by an operation whose gradient is some 20 times faster on a processor than that of indexing."""
    return values.index_select(0, rows.flatten()).view(*rows.shape, *values.shape[1:])


def _rows_or(values: Tensor, rows: Tensor, default: float) -> Tensor:
    """values[rows], and `default` where the row is -1."""
    padded = torch.cat([values, values.new_full((1, *values.shape[1:]), default)])
    return _take(padded, torch.where(rows < 0, len(values), rows))


def _check_rows(what: str, count: int, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and len(tensor) != count:
            raise TriptychError(f"{name} has {len(tensor)} rows for {count} {what}: give one row for each")


def _check_finite(values: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise TriptychError(
            f"{bad} of {values.numel()} {what} are not finite: the decoder overflowed, run it in float32 or bfloat16"
        )
