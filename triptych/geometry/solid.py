"""What is inside: a signed distance grid for any triangle soup.

Half of the meshes in the wild are not watertight: open backs, inner walls, several bodies, sheets without thickness.
The network learns solids, so a rule decides what "inside" means:

1. Every triangle is covered by a lattice of points no further apart than half a fine cell (twice the resolution), so
   the marked fine cells let no 6-connected path through.
2. Whatever a flood from above and from the sides cannot reach is inside. The flood does not enter from below: an
   object stands on the floor, so an open bottom is filled and closed: a cup stays hollow, a house not.
3. Each surface sample looks to both of its sides. Inside and outside: a wall of the solid, its normal now points out.
   Outside on both sides: a sheet, given a thickness of one voxel. Inside on both sides: an inner wall, dropped.
   At an edge, one look runs along another face and meets neither: then what lies around decides.
4. The distance at a voxel's centre is measured to the nearest kept sample's tangent disc.

Not covered: openings to the side or top that were meant to be closed (they stay open, and the walls get one voxel).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from ..errors import TriptychError
from .mesh import Mesh

_SURFACE, _OUTSIDE, _INSIDE = 1, 2, 3
_DISC_RADIUS = 0.35  # of a voxel: what one sample stands for, sideways
# A little over half a voxel: a sheet midway between two layers of centres, as in every mirror-symmetric leaf or blade,
# belongs to both instead of neither.
_SHEET_HALF = 0.55
_MAX_SAMPLES = 6_000_000


def cover_surface(mesh: Mesh, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points on every triangle, in rows along its longest edge, at most ``spacing`` apart.

    Returns (points (N, 3) float32, face index (N,) int64). Raises TriptychError beyond 6 million points.
    """
    corners = mesh.vertices[mesh.faces].astype(np.float32)
    edges = np.linalg.norm(corners - np.roll(corners, -1, axis=1), axis=2)
    turn = (edges.argmax(axis=1)[:, None] + np.arange(3)) % 3
    a, b, c = np.take_along_axis(corners, turn[:, :, None], axis=1).transpose(1, 0, 2)
    longest = edges.max(axis=1)
    height = np.linalg.norm(np.cross(b - a, c - a), axis=1) / np.maximum(longest, 1e-12)

    rows = np.ceil(height / spacing).astype(np.int64) + 1
    face = np.repeat(np.arange(len(corners)), rows)
    step = np.arange(len(face)) - np.repeat(np.cumsum(rows) - rows, rows)
    up = step / np.maximum(rows[face] - 1, 1)
    counts = np.ceil(longest[face] * (1 - up) / spacing).astype(np.int64) + 1
    if counts.sum() > _MAX_SAMPLES:
        raise TriptychError(
            f"the mesh needs {counts.sum():,} surface samples, more than {_MAX_SAMPLES:,}, for its faces overlap: "
            "merge duplicate faces first"
        )
    row = np.repeat(np.arange(len(face)), counts)
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    along = (column / np.maximum(counts[row] - 1, 1)).astype(np.float32)[:, None]
    up = up[row].astype(np.float32)[:, None]
    face = face[row]
    left = a[face] + (c[face] - a[face]) * up
    right = b[face] + (c[face] - b[face]) * up
    return left + (right - left) * along, face


def _labels(cells: np.ndarray, size: int) -> np.ndarray:
    """(size + 2,) * 3 uint8 grid, one cell of margin: surface, outside, inside."""
    grid = np.full((size + 2,) * 3, _INSIDE, dtype=np.uint8)
    grid[tuple(cells.T + 1)] = _SURFACE
    # The floor is where the object stands, which in a cube is not the lowest layer of an object wider than it is tall.
    floor = int(cells[:, 1].min()) + 1
    above = grid[:, floor:]
    free, _ = ndimage.label(above != _SURFACE)
    ways_in = np.unique(np.concatenate([free[:, -1].ravel(), *(free[s].ravel() for s in (0, -1)),
                                        *(free[:, :, s].ravel() for s in (0, -1))]))  # fmt: skip
    reached = np.zeros(free.max() + 1, dtype=bool)
    reached[ways_in[ways_in > 0]] = True
    above[reached[free] & (above != _SURFACE)] = _OUTSIDE
    grid[:, :floor] = _OUTSIDE
    return grid


def _filled_floor(labels: np.ndarray, fine: int) -> np.ndarray:
    """(N, 3) float32 points of the floor under an opening that was filled: a surface that the mesh lacks."""
    floor = int((labels != _OUTSIDE).any(axis=(0, 2)).argmax())
    x, z = np.nonzero(labels[:, floor] == _INSIDE)
    cells = np.stack([x, np.full_like(x, floor), z], axis=1) - 1
    return (cells / fine - 0.5).astype(np.float32)


def _sides(points: np.ndarray, normals: np.ndarray, labels: np.ndarray, fine: int) -> tuple[np.ndarray, np.ndarray]:
    """Looks 1.5, then 2.5 cells to both sides; returns the labels (N,), (N,) found along +normal and -normal."""
    found = []
    for sign in (1.0, -1.0):
        seen = np.full(len(points), _SURFACE, dtype=np.uint8)
        for reach in (1.5, 2.5):
            cells = np.rint((points + sign * reach / fine * normals + 0.5) * fine).astype(np.int64) + 1
            there = labels[tuple(np.clip(cells, 0, len(labels) - 1).T)]
            seen = np.where(seen == _SURFACE, there, seen)
        found.append(seen)
    return _edges(points, found[0], found[1], labels, fine)


def _edges(
    points: np.ndarray, plus: np.ndarray, minus: np.ndarray, labels: np.ndarray, fine: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where a look ran along another face, at an edge: what it should have met, by the labels two cells around."""
    unclear = np.flatnonzero((plus == _SURFACE) | (minus == _SURFACE))
    if not len(unclear):
        return plus, minus
    steps = np.stack(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    cells = np.rint((points[unclear] + 0.5) * fine).astype(np.int64) + 1
    around = labels[tuple(np.clip(cells[:, None] + steps, 0, len(labels) - 1).transpose(2, 0, 1))]
    inside, outside = (around == _INSIDE).any(axis=1), (around == _OUTSIDE).any(axis=1)
    a, b = plus[unclear], minus[unclear]
    for one, other in ((a, b), (b, a)):
        blind = one == _SURFACE
        one[blind & (other == _OUTSIDE)] = _OUTSIDE
        one[blind & (other == _OUTSIDE) & inside] = _INSIDE
        one[blind & (other == _INSIDE)] = _INSIDE
        one[blind & (other == _INSIDE) & outside] = _OUTSIDE
    blind = (a == _SURFACE) & (b == _SURFACE)
    a[blind], b[blind] = (
        np.where(outside | ~inside, _OUTSIDE, _INSIDE)[blind],
        np.where(inside, _INSIDE, _OUTSIDE)[blind],
    )
    plus, minus = plus.copy(), minus.copy()
    plus[unclear], minus[unclear] = a, b
    return plus, minus


def solid_sdf(mesh: Mesh, resolution: int = 64, band: float = 2.0) -> np.ndarray:
    """Signed distance from voxel centres to the surface of the solid that ``mesh`` bounds.

    mesh: in model space, inside [-0.5, 0.5]^3, watertight or not. resolution: R. band: in voxels.
    Returns (R, R, R) float32 indexed [x, y, z], centre of voxel i at (i + .5) / R - .5; in voxels, negative inside,
    clipped to [-band, band]. Raises TriptychError when the mesh leaves the cube or has no surface.
    """
    if len(mesh.faces) == 0:
        raise TriptychError("the mesh has no faces: there is no surface to measure from")
    limit = float(np.abs(mesh.vertices[np.unique(mesh.faces)]).max())
    if not limit <= 0.5 + 1e-3:
        raise TriptychError(f"the mesh reaches to {limit:.3f}, outside [-0.5, 0.5]: normalise it first")
    # Fine cells are centred on k / fine, so that the centre of coarse voxel i is the centre of fine cell 2 i + 1.
    fine = 2 * resolution
    points, face = cover_surface(mesh, spacing=0.5 / fine)
    cells = np.rint((points + 0.5) * fine).astype(np.int64).clip(0, fine)
    flat = np.ravel_multi_index(tuple(cells.T), (fine + 1,) * 3)
    _, one_each = np.unique(flat, return_index=True)
    points, face, cells = points[one_each], face[one_each], cells[one_each]
    labels = _labels(cells, fine + 1)

    normals = mesh.face_normals()[face]
    plus, minus = _sides(points, normals, labels, fine)
    normals = np.where(((plus == _INSIDE) & (minus != _INSIDE))[:, None], -normals, normals)
    wall = (plus == _INSIDE) != (minus == _INSIDE)
    kept = wall | (plus != _INSIDE)
    labels[tuple(cells[~kept].T + 1)] = _INSIDE  # a voxel whose centre lies on an inner wall is inside
    wall, points, normals = wall[kept], points[kept], normals[kept]
    floor_points = _filled_floor(labels, fine)
    points = np.concatenate([points, floor_points])
    normals = np.concatenate([normals, np.broadcast_to(np.array([0, -1, 0], dtype=np.float32), floor_points.shape)])
    wall = np.concatenate([wall, np.ones(len(floor_points), dtype=bool)])
    distance, nearest = _nearest(points, normals, resolution, band)

    centre = labels[2:-1:2, 2:-1:2, 2:-1:2]
    found = nearest >= 0
    sdf = np.where(centre == _INSIDE, -distance, distance)
    if len(points):
        index = np.maximum(nearest, 0)
        axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution - 0.5
        grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
        side = np.einsum("...k,...k->...", grid - points[index], normals[index]) * resolution
        sdf = np.where(found & (centre == _SURFACE) & wall[index], np.where(side < 0, -distance, distance), sdf)
        sdf = np.where(found & (centre != _INSIDE) & ~wall[index], distance - _SHEET_HALF, sdf)
    return sdf.clip(-band, band).astype(np.float32)


def _nearest(points: np.ndarray, normals: np.ndarray, resolution: int, band: float) -> tuple[np.ndarray, np.ndarray]:
    """Distance in voxels to the nearest tangent disc, (R, R, R), and its sample's number or -1 beyond the band."""
    reach = int(np.ceil(band))
    size = resolution + 2 * reach + 2
    strides = (size * size, size, 1)
    steps = torch.arange(-reach, reach + 1)
    best = torch.full((size**3,), torch.iinfo(torch.int64).max)
    samples = torch.from_numpy((points + 0.5) * resolution - 0.5)
    directions = torch.from_numpy(np.ascontiguousarray(normals, dtype=np.float32))
    for start in range(0, len(samples), 2048):  # small enough that the pairs stay in the cache
        p, n = samples[start : start + 2048], directions[start : start + 2048]
        nearest = torch.round(p)
        plane, square, place = torch.zeros(()), torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for axis, shape in enumerate(((-1, len(steps), 1, 1), (-1, 1, len(steps), 1), (-1, 1, 1, len(steps)))):
            gap = (nearest - p)[:, axis, None] + steps
            plane = plane + (gap * n[:, axis, None]).view(shape)
            square = square + (gap * gap).view(shape)
            place = place + ((nearest[:, axis].long()[:, None] + steps + reach + 1) * strides[axis]).view(shape)
        plane = plane * plane
        across = (square - plane).clamp_min_(0).sqrt_().sub_(_DISC_RADIUS).clamp_min_(0)
        square_distance = across.mul_(across).add_(plane)
        number = torch.arange(start, start + len(p)).view(-1, 1, 1, 1)
        key = (square_distance.view(torch.int32).long() << 32) | number
        best.scatter_reduce_(0, place.view(-1), key.view(-1), "amin")
    inner = slice(reach + 1, reach + 1 + resolution)
    found = best.view(size, size, size)[inner, inner, inner].contiguous().numpy()
    distance = np.sqrt((found >> 32).astype(np.int32).view(np.float32))
    distance = np.where(found == np.iinfo(np.int64).max, band, np.minimum(distance, band)).astype(np.float32)
    return distance, np.where(distance < band, found & 0xFFFFFFFF, -1)
