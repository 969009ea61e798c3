"""Which cubes, edges and vertices a FlexiCubes surface has: integers only, no gradients.

Grids have R cubes and R + 1 grid vertices on a side and are numbered with x slowest and z fastest. A sparse grid names
its active cubes; a grid vertex is touched where it is a corner of an active cube. Nothing here has the size of the
dense grid except one table of `unique_ids`, used where it is smaller than sorting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TriptychError
from .flexicubes_tables import CORNERS, EDGE_AXIS, EDGES, case_tables


@dataclass(frozen=True)
class TouchedVertices:
    """The grid vertices that are corners of active cubes.

    ids: (V,) int64 ascending. rows: (N, 8) int64, the row in `ids` of each corner of each active cube.
    counts: (V,) int64, active cubes round the vertex, 1 to 8.
    """

    ids: Tensor
    rows: Tensor
    counts: Tensor


@dataclass(frozen=True)
class SurfaceCubes:
    """The cubes with corners on both sides.

    coords: (M, 3) int64, ascending. inside: (M, 8) bool. rows: (M,) int64, the cube's row among the attributes, -1 for
    an inactive cube (all attributes 0).
    """

    coords: Tensor
    inside: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Topology:
    """The dual surface, not yet placed in space.

    ends: (E, 2) int64, ids of the grid vertices of each crossed edge; edges ascending by (first, second) end.
    first_inside: (E,) bool, whether the first end is inside.
    A crossed edge of a surface cube is one entry; entries ascend by dual vertex, then by the edge's number in the cube:
    entry_cube, entry_local, entry_edge, entry_vertex: (G,) int64, row of the cube, edge number 0..11 in the cube, row
    of the edge, dual vertex. vertex_cube: (D,) int64, row of the cube that each dual vertex lies in.
    quads: (Q, 4) int64 dual vertices, counter-clockwise from outside.
    """

    ends: Tensor
    first_inside: Tensor
    entry_cube: Tensor
    entry_local: Tensor
    entry_edge: Tensor
    entry_vertex: Tensor
    vertex_cube: Tensor
    quads: Tensor


def linear_ids(coords: Tensor, side: int) -> Tensor:
    """(..., 3) integer coordinates in [0, side) to (...) int64 ids, x slowest."""
    x, y, z = coords.long().unbind(-1)
    return (x * side + y) * side + z


def grid_coords(ids: Tensor, side: int) -> Tensor:
    """The inverse of `linear_ids`: (...) ids to (..., 3) int64."""
    return torch.stack([ids // (side * side), ids // side % side, ids % side], dim=-1)


def unique_ids(ids: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """The distinct ids (U,) ascending, and for each given id its row among them; ids lie in [0, bound)."""
    if bound > 8 * ids.numel():
        return torch.unique(ids, return_inverse=True)
    present = torch.zeros(bound, dtype=torch.bool, device=ids.device)
    present[ids.flatten()] = True
    rank = torch.cumsum(present, dim=0, dtype=torch.int32)
    rows = rank.index_select(0, ids.flatten()).long().sub_(1)
    return present.nonzero()[:, 0], rows.view_as(ids)


def lookup(sorted_ids: Tensor, ids: Tensor) -> Tensor:
    """The row of each id in `sorted_ids`, -1 where it is missing."""
    if not len(sorted_ids):
        return torch.full_like(ids, -1)
    rows = torch.searchsorted(sorted_ids, ids).clamp_(max=len(sorted_ids) - 1)
    return torch.where(sorted_ids[rows] == ids, rows, -1)


def corner_ids(coords: Tensor, resolution: int) -> Tensor:
    """(N, 3) cubes to (N, 8) ids of their corners in the grid of R + 1 vertices."""
    side = resolution + 1
    return linear_ids(coords, side)[:, None] + linear_ids(CORNERS.to(coords.device), side)


def check_cubes(coords: Tensor, resolution: int) -> None:
    """Raise TriptychError for cubes outside the grid."""
    if coords.dim() != 2 or coords.shape[1] != 3 or coords.is_floating_point():
        raise TriptychError(f"cubes must be (N, 3) integers, not {tuple(coords.shape)} {coords.dtype}: drop the sample")
    if len(coords) and (int(coords.min()) < 0 or int(coords.max()) >= resolution):
        raise TriptychError(
            f"cubes span {int(coords.min())}..{int(coords.max())}, outside a grid of {resolution}: give its resolution"
        )


def touched_vertices(cubes: Tensor, resolution: int) -> TouchedVertices:
    """The corners of the active cubes (N, 3), which lie in [0, resolution)."""
    ids, rows = unique_ids(corner_ids(cubes, resolution), (resolution + 1) ** 3)
    return TouchedVertices(ids, rows, torch.bincount(rows.flatten(), minlength=len(ids)))


def dense_surface(inside: Tensor) -> SurfaceCubes:
    """The surface cubes of a whole grid; `inside` is (R + 1, R + 1, R + 1) bool."""
    side = inside.shape[0]
    corners = [inside[x : x + side - 1, y : y + side - 1, z : z + side - 1] for x, y, z in CORNERS.tolist()]
    inside_XYZ8 = torch.stack(corners, dim=-1)
    mixed = inside_XYZ8.any(dim=-1) & ~inside_XYZ8.all(dim=-1)
    coords = mixed.nonzero()
    return SurfaceCubes(coords, inside_XYZ8[mixed], linear_ids(coords, side - 1))


def sparse_surface(cubes: Tensor, touched: TouchedVertices, inside: Tensor, resolution: int) -> SurfaceCubes:
    """The surface cubes of a sparse grid: of the active cubes (N, 3) and of their inactive neighbours.

    inside: (V,) bool of the touched vertices; all other grid vertices are outside. So an inactive cube can only be
    crossed where it shares an inside vertex with an active one, which spares a search among all neighbours.
    Raises TriptychError where a cube appears twice.
    """
    ids, order = torch.sort(linear_ids(cubes, resolution))
    if bool((ids[1:] == ids[:-1]).any()):
        raise TriptychError(f"{int((ids[1:] == ids[:-1]).sum())} of {len(ids)} cubes appear twice: merge them first")
    corners = inside[touched.rows]
    active = (corners.any(dim=1) & ~corners.all(dim=1)).nonzero()[:, 0]
    border = grid_coords(touched.ids[inside & (touched.counts < 8)], resolution + 1)
    around = (border[:, None] - CORNERS.to(border.device)).flatten(0, 1)
    around = around[((around >= 0) & (around < resolution)).all(dim=1)]
    around_ids = torch.unique(linear_ids(around, resolution))
    ring = grid_coords(around_ids[lookup(ids, around_ids) < 0], resolution)
    vertex = lookup(touched.ids, corner_ids(ring, resolution))
    ring_inside = inside[vertex.clamp(min=0)] & (vertex >= 0)
    mixed = ~ring_inside.all(dim=1)
    coords = torch.cat([cubes[active].long(), ring[mixed]])
    rows = torch.cat([active, active.new_full((int(mixed.sum()),), -1)])
    ascending = torch.argsort(linear_ids(coords, resolution))
    return SurfaceCubes(coords[ascending], torch.cat([corners[active], ring_inside[mixed]])[ascending], rows[ascending])


def resolved_cases(surface: SurfaceCubes, resolution: int) -> Tensor:
    """(M,) int64 case of each cube, complemented where two ambiguous cubes share their ambiguous face."""
    cases = (surface.inside.long() << torch.arange(8, device=surface.inside.device)).sum(dim=1)
    step = case_tables().shared_face.to(cases.device)[cases]
    doubtful = step.any(dim=1).nonzero()[:, 0]
    ids = linear_ids(surface.coords[doubtful], resolution)
    neighbours = surface.coords[doubtful] + step[doubtful]
    in_grid = ((neighbours >= 0) & (neighbours < resolution)).all(dim=1)
    # Such a cube has one ambiguous face only, so a doubtful neighbour behind it doubts the same face.
    both = in_grid & (lookup(ids, linear_ids(neighbours, resolution)) >= 0)
    cases[doubtful[both]] = 255 - cases[doubtful[both]]
    return cases


def dual_topology(surface: SurfaceCubes, resolution: int) -> Topology:
    """Dual vertices of the surface cubes and the quads between them.

    Dual vertices are numbered by the number of dual vertices in their cube, then by cube, then as in the cube. A quad
    crosses each crossed edge that has four cubes; an edge on the border of the grid has fewer, and no quad. Quads come
    in two runs, first those whose edge begins outside, each ascending by edge.
    """
    device = surface.coords.device
    tables, edges = case_tables(), EDGES.to(device)
    cases = resolved_cases(surface, resolution)
    crossed = surface.inside[:, edges[:, 0]] != surface.inside[:, edges[:, 1]]
    cube, local = crossed.nonzero(as_tuple=True)
    ends, edge = _unique_edges(corner_ids(surface.coords, resolution), cube, local, resolution)

    count = tables.dual_count.to(device)[cases]
    order = torch.argsort(count, stable=True)
    first = torch.empty_like(count)
    first[order] = torch.cumsum(count[order], dim=0) - count[order]
    vertex = first[cube] + tables.dual_of_edge.to(device)[cases[cube], local]

    first_inside = torch.zeros(len(ends), dtype=torch.bool, device=device)
    first_inside[edge] = surface.inside[cube, edges[local, 0]]
    by_vertex = torch.argsort(vertex, stable=True)
    return Topology(
        ends=ends,
        first_inside=first_inside,
        entry_cube=cube[by_vertex],
        entry_local=local[by_vertex],
        entry_edge=edge[by_vertex],
        entry_vertex=vertex[by_vertex],
        vertex_cube=order.repeat_interleave(count[order]),
        quads=_quads(edge, vertex, first_inside),
    )


def _unique_edges(corners: Tensor, cube: Tensor, local: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """(E, 2) vertex ids of the distinct edges of the entries, and the row of each entry's edge.

    corners: (M, 8) vertex ids of the cubes. Edges along x and z begin at their lower end, edges along y at their upper
    one; so edges that begin at one vertex ascend by their other end in the order y, z, x.
    """
    side = resolution + 1
    step = torch.tensor([-side, 1, side * side], device=corners.device)
    rank = torch.tensor([2, 0, 1], device=corners.device)[EDGE_AXIS.to(corners.device)]
    keys, edge = torch.unique(
        corners[cube, EDGES[:, 0].to(corners.device)[local]] * 3 + rank[local], return_inverse=True
    )
    start = keys // 3
    return torch.stack([start, start + step[keys % 3]], dim=1), edge


def _quads(edge: Tensor, vertex: Tensor, first_inside: Tensor) -> Tensor:
    """(Q, 4) dual vertices round each edge with four cubes; entries of one edge come in ascending order of cubes."""
    full = torch.bincount(edge, minlength=len(first_inside)) == 4
    kept = full[edge].nonzero()[:, 0]
    around = vertex[kept[torch.argsort(edge[kept], stable=True)]].view(-1, 4)
    outward = first_inside[full]
    return torch.cat([around[~outward][:, [0, 1, 3, 2]], around[outward][:, [2, 3, 1, 0]]])
