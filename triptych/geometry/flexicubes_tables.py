"""Case tables of dual marching cubes, derived from the geometry of one cube.

A cube has 8 corners, each inside (negative) or outside: 256 cases. The surface crosses the edges whose ends differ. On
each face, crossed edges belong together in pairs: two of them always; where all four are crossed (inside corners on one
diagonal only), the two edges around each inside corner, so that inside corners are kept apart. Following the pairs
round the cube gives closed loops, and each loop becomes one dual vertex (Nielson, Dual Marching Cubes, 2004).

Some cases use an ambiguous face for a single loop: four crossed edges of one face, one vertex. Where two such cubes
meet in that face, four quads would share the edge between their two vertices, which is no manifold (Wenger,
Isosurfaces, 2013). Then both cubes take the loops of their complement, which keep the
outside corners of the face apart and so have two vertices each. `shared_face` names that face.

Numbering, which the channels of the published decoder follow: corner i lies at bits (x, y, z) = (i & 1, i >> 1 & 1,
i >> 2 & 1). Edges 0-3 run round the side y = 0, edges 4-7 round y = 1 (each: along x at z = 0, along z at x = 1, along
x at z = 1, along z at x = 0) and begin at their lower end; edges 8-11 run down from y = 1, at corners 2, 3, 7 and 6.
A loop separates one connected part of the inside corners from one of the outside corners; the dual vertices of a cube
are numbered by the smallest corner of the inside part, then by that of the outside part. (No published text states the
order; this rule gives it in all 254 cases of the reference data.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

_CORNERS = [(i & 1, i >> 1 & 1, i >> 2 & 1) for i in range(8)]
_SIDE = [(0, 1), (1, 5), (4, 5), (0, 4)]
_EDGES = [*_SIDE, *((a + 2, b + 2) for a, b in _SIDE), (2, 0), (3, 1), (7, 5), (6, 4)]
CORNERS = torch.tensor(_CORNERS)
EDGES = torch.tensor(_EDGES)
EDGE_AXIS = (CORNERS[EDGES[:, 1]] - CORNERS[EDGES[:, 0]]).abs().argmax(dim=1)


@dataclass(frozen=True)
class CaseTables:
    """One row for each case; bit i of the case is set where corner i is inside.

    dual_of_edge: (256, 12) int64, the dual vertex of the cube that each crossed edge belongs to, -1 for other edges.
    dual_count: (256,) int64, dual vertices of the cube, 0 to 4.
    shared_face: (256, 3) int64, the step to the neighbour behind a face that could make the surface no manifold, or 0.
    """

    dual_of_edge: Tensor
    dual_count: Tensor
    shared_face: Tensor


@cache
def case_tables() -> CaseTables:
    """The tables, computed on first use."""
    dual_of_edge = torch.full((256, 12), -1)
    shared_face = torch.zeros(256, 3, dtype=torch.long)
    for case in range(256):
        loops, ambiguous = _loops(case)
        for number, loop in enumerate(loops):
            dual_of_edge[case, loop] = number
        if len(ambiguous) == 1 and len(loops) == 1:
            axis, side = ambiguous[0]
            shared_face[case, axis] = 2 * side - 1
    return CaseTables(dual_of_edge, dual_of_edge.amax(dim=1) + 1, shared_face)


def _loops(case: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The loops of crossed edges, each ascending, in the order above; and the ambiguous faces as (axis, side)."""
    inside = [case >> corner & 1 for corner in range(8)]
    crossed = [inside[a] != inside[b] for a, b in _EDGES]
    part = _merged(8, [edge for edge, cut in zip(_EDGES, crossed, strict=True) if not cut])
    pairs, ambiguous = [], []
    for axis, side in product(range(3), range(2)):
        on_face = [corner[axis] == side for corner in _CORNERS]
        around = [e for e, (a, b) in enumerate(_EDGES) if crossed[e] and on_face[a] and on_face[b]]
        if len(around) == 4:
            ambiguous.append((axis, side))
            kept_apart = [corner for corner in range(8) if on_face[corner] and inside[corner]]
            pairs += [tuple(e for e in around if corner in _EDGES[e]) for corner in kept_apart]
        elif around:
            pairs.append(tuple(around))
    loop_of = _merged(12, pairs)
    loops = [[e for e in range(12) if crossed[e] and loop_of[e] == name] for name in range(12)]

    def separated_parts(loop: list[int]) -> tuple[int, int]:
        a, b = _EDGES[loop[0]]
        return (part[a], part[b]) if inside[a] else (part[b], part[a])

    return sorted(filter(None, loops), key=separated_parts), ambiguous


def _merged(count: int, pairs: list[tuple[int, ...]]) -> list[int]:
    """For each of `count` things the smallest thing that the pairs connect it with."""
    smallest = list(range(count))
    for pair in pairs:
        joined = {smallest[thing] for thing in pair}
        smallest = [min(joined) if name in joined else name for name in smallest]
    return smallest
