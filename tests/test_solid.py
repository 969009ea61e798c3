"""The solid of any mesh: shapes whose signed distance is known, and the rule for those that are not watertight."""

import numpy as np
import pytest
import trimesh

from triptych.errors import TriptychError
from triptych.geometry.mesh import Mesh
from triptych.geometry.solid import cover_surface, solid_sdf
from triptych.procedural import sample_object

R, BAND = 32, 3.0
AXIS = (np.arange(R) + 0.5) / R - 0.5
X, Y, Z = np.meshgrid(AXIS, AXIS, AXIS, indexing="ij")
BOX_FACES = {
    "-z": [[0, 2, 1], [0, 3, 2]], "+z": [[4, 5, 6], [4, 6, 7]], "-y": [[0, 1, 5], [0, 5, 4]],
    "+y": [[2, 3, 7], [2, 7, 6]], "+x": [[1, 2, 6], [1, 6, 5]], "-x": [[0, 4, 7], [0, 7, 3]],
}  # fmt: skip


def box(half, centre=(0, 0, 0), without=()):
    corners = [(x, y, z) for z in (-1, 1) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    vertices = np.array(corners) * half + centre
    faces = np.concatenate([faces for side, faces in BOX_FACES.items() if side not in without])
    return Mesh(vertices.astype(np.float32), faces)


def join(*meshes):
    offsets = np.cumsum([0] + [len(m.vertices) for m in meshes])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + o for m, o in zip(meshes, offsets, strict=False)]),
    )


def sphere(radius, subdivisions=4):
    ball = trimesh.creation.icosphere(subdivisions, radius)
    return Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int64))


def box_distance(half, centre=(0, 0, 0)):
    """Exact, in voxels."""
    gap = np.abs(np.stack([X, Y, Z], axis=-1) - centre) - half
    outside = np.linalg.norm(np.maximum(gap, 0), axis=-1)
    return (outside + np.minimum(gap.max(axis=-1), 0)) * R


def check(sdf, exact, error, mean_error):
    exact = exact.clip(-BAND, BAND)
    assert sdf.dtype == np.float32 and sdf.shape == (R, R, R)
    assert np.abs(sdf - exact).max() <= error
    assert np.abs(sdf - exact).mean() <= mean_error
    clear = np.abs(exact) > error
    assert ((sdf < 0) == (exact < 0))[clear].all()


def test_a_sphere():
    exact = (np.sqrt(X**2 + Y**2 + Z**2) - 0.4) * R
    check(solid_sdf(sphere(0.4), R, BAND), exact, error=0.1, mean_error=0.02)


@pytest.mark.parametrize("half", [(0.4, 0.3, 0.2), (0.5, 0.5, 0.5), (0.47, 0.11, 0.333)])
def test_a_box_with_few_large_triangles(half):
    check(solid_sdf(box(half), R, BAND), box_distance(half), error=0.4, mean_error=0.03)


def test_its_isosurface_lies_on_the_surface():
    half = np.array([0.41, 0.28, 0.19])
    sdf = solid_sdf(box(half), R, BAND)
    for axis in range(3):
        line = sdf[tuple(slice(None) if a == axis else R // 2 for a in range(3))]
        last = np.flatnonzero(line < 0)[-1]
        crossing = AXIS[last] + line[last] / (line[last] - line[last + 1]) / R
        assert crossing == pytest.approx(half[axis], abs=0.05 / R)


@pytest.mark.parametrize("order", ["outward", "inward", "mixed"])
def test_the_winding_does_not_matter(order):
    mesh = box((0.4, 0.3, 0.2))
    flip = {"outward": np.zeros(12, bool), "inward": np.ones(12, bool), "mixed": np.arange(12) % 3 == 0}[order]
    faces = np.where(flip[:, None], mesh.faces[:, ::-1], mesh.faces)
    other, sdf = solid_sdf(mesh.replace(faces=faces), R, BAND), solid_sdf(mesh, R, BAND)
    assert np.abs(other - sdf).max() < 0.35 and np.abs(other - sdf).mean() < 0.003
    assert ((other < 0) == (sdf < 0)).all()


@pytest.mark.parametrize("half", [(0.4, 0.3, 0.2), (0.3, 0.5, 0.2)])
def test_a_box_without_a_floor_is_filled(half):
    """Also when it is wider than it is tall, and so stands above the bottom of the cube."""
    check(solid_sdf(box(half, without="-y"), R, BAND), box_distance(half), error=0.4, mean_error=0.03)


def shell_distance(half, sides):
    """To the given sides of a box, in voxels, exact."""
    found = np.full((R, R, R), np.inf)
    for side in sides:
        axis, sign = "xyz".index(side[1]), 1 if side[0] == "+" else -1
        gap = [np.maximum(np.abs(c) - h, 0) for c, h in zip((X, Y, Z), half, strict=True)]
        gap[axis] = (X, Y, Z)[axis] - sign * half[axis]
        found = np.minimum(found, np.sqrt(sum(g**2 for g in gap)))
    return found * R


@pytest.mark.parametrize("open_side", ["+y", "+x", "-z"])
def test_a_box_open_at_the_top_or_a_side_stays_hollow_with_walls_of_a_voxel(open_side):
    """Two of its walls lie midway between two layers of voxel centres: they belong to both, not to neither."""
    half = (0.4, 0.3, 0.25)
    sides = [side for side in BOX_FACES if side != open_side]
    sdf = solid_sdf(box(half, without=[open_side]), R, BAND)
    distance = shell_distance(half, sides)
    near = distance < 2
    assert np.abs(sdf - (distance - 0.5))[near].mean() < 0.1
    assert np.abs(sdf - (distance - 0.5))[near].max() < 0.6
    assert (sdf[distance < 0.51] < 0).all() and (sdf[distance > 0.95] > 0).all()
    assert (sdf[box_distance(half) < -2] == BAND).any(), "the cavity is outside"


def test_a_thick_cup_stays_hollow_and_its_wall_keeps_its_thickness():
    outer, inner = box((0.4, 0.4, 0.4)), box((0.25, 0.4, 0.25), (0, 0.1, 0))
    walls = [s for s in BOX_FACES if s != "+y"]
    rim = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], np.float32)
    ring = np.concatenate([0.4 * rim, 0.25 * rim])
    top = Mesh(
        np.stack([ring[:, 0], np.full(8, 0.4), ring[:, 1]], axis=1).astype(np.float32),
        np.array([f for i in range(4) for f in ([i, 4 + i, (i + 1) % 4], [(i + 1) % 4, 4 + i, 4 + (i + 1) % 4])]),
    )
    inner = inner.replace(vertices=np.minimum(inner.vertices, 0.4))
    inner = inner.replace(faces=np.concatenate([BOX_FACES[s] for s in walls])[:, ::-1])
    outer = outer.replace(faces=np.concatenate([BOX_FACES[s] for s in walls]))
    sdf = solid_sdf(join(outer, inner, top), R, BAND)
    inner_half, inner_centre = np.array([0.25, 0.5, 0.25]), (0, 0.2, 0)  # the cavity runs on above the rim
    exact = np.maximum(box_distance((0.4, 0.4, 0.4)), -box_distance(inner_half, inner_centre))
    assert ((sdf < 0) == (exact < 0))[np.abs(exact) > 0.5].all()
    assert np.abs(sdf - exact.clip(-BAND, BAND))[np.abs(exact) < 1].max() < 0.75


def test_a_sheet_becomes_one_voxel_thick():
    corners = np.array([[-0.4, -0.35, 0.01], [0.4, -0.35, 0.01], [0.4, 0.35, 0.01], [-0.4, 0.35, 0.01]], np.float32)
    sdf = solid_sdf(Mesh(corners, np.array([[0, 1, 2], [0, 2, 3]])), R, BAND)
    core = (np.abs(X) < 0.36) & (np.abs(Y) < 0.31)
    exact = np.abs(Z - 0.01) * R - 0.5
    assert np.abs(sdf - exact)[core & (exact < 1.5)].max() <= 0.06
    assert (sdf[core & (exact > 1.5)] > 1.4).all()
    assert (sdf < 0).sum() == pytest.approx(0.8 * 0.7 * R * R, rel=0.2)


@pytest.mark.parametrize("inner", ["thick wall", "sheet", "box"])
def test_inner_walls_vanish(inner):
    """Also where a voxel's centre lies on one of them."""
    half = (0.4, 0.3, 0.25)
    corners = np.array([[0.203125, -0.3, -0.25], [0.203125, 0.3, -0.25], [0.203125, 0, 0.25]], np.float32)
    mesh = {
        "thick wall": box((0.046875, 0.3, 0.25)),
        "sheet": Mesh(corners, np.array([[0, 1, 2]])),
        "box": box((0.109375, 0.1, 0.1), (-0.1875, 0, 0)),
    }[inner]
    assert np.isin(mesh.vertices[:, 0], AXIS.astype(np.float32)).any()
    check(solid_sdf(join(box(half), mesh), R, BAND), box_distance(half), error=0.4, mean_error=0.03)


def test_neighbours_never_differ_by_more_than_a_distance_can():
    """What a bubble or a hole in a solid would show: one voxel away, a distance changes by one at most."""
    mesh = join(box((0.5, 0.2, 0.3)), box((0.1, 0.4, 0.1)), box((0.31, 0.17, 0.33), (0.1, 0.05, 0.02)), sphere(0.28))
    sdf = solid_sdf(mesh, R, BAND)
    assert max(np.abs(np.diff(sdf, axis=axis)).max() for axis in range(3)) < 1.6


def test_overlapping_bodies_are_one_solid_and_separate_ones_stay_apart():
    a, b = ((0.25, 0.2, 0.2), (-0.2, 0, 0)), ((0.2, 0.15, 0.3), (0.15, 0.05, 0))
    exact = np.minimum(box_distance(*a), box_distance(*b))
    sdf = solid_sdf(join(box(*a), box(*b)), R, BAND)
    clear = np.abs(exact) > 0.5
    assert ((sdf < 0) == (exact < 0))[clear].all()
    seam = (box_distance(*a) < -1) & (box_distance(*b) < -1)
    assert seam.sum() > 100 and (sdf[seam] <= -0.9).all(), "nothing of the faces between them is left"

    apart = [((0.1, 0.2, 0.2), (-0.3, 0, 0)), ((0.1, 0.2, 0.2), (0.3, 0, 0))]
    exact = np.minimum(*(box_distance(*body) for body in apart))
    check(solid_sdf(join(*(box(*body) for body in apart)), R, BAND), exact, error=0.4, mean_error=0.03)


def test_a_real_shape_agrees_with_ray_parity():
    mesh = sample_object()
    sdf = solid_sdf(mesh, R, BAND)
    parts = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True).split(only_watertight=False)
    rng = np.random.default_rng(0)
    cells = rng.integers(0, R, (1500, 3))
    points = AXIS[cells]
    inside = np.any([part.contains(points) for part in parts if part.is_watertight], axis=0)
    found = sdf[tuple(cells.T)]
    clear = np.abs(found) > 0.6
    assert inside.sum() > 100 and clear.mean() > 0.8
    assert (inside == (found < 0))[clear].mean() >= 0.998


def test_resolution_and_band_only_rescale():
    mesh = sphere(0.35)
    fine = solid_sdf(mesh, 64, 4.0)
    # The centre of a coarse voxel is the corner of eight fine ones.
    mean = fine.reshape(R, 2, R, 2, R, 2).mean(axis=(1, 3, 5)) / 2
    coarse = solid_sdf(mesh, R, 4.0)
    near = np.abs(mean) < 1.2
    assert np.abs(mean - coarse)[near].max() < 0.1
    np.testing.assert_array_equal(solid_sdf(mesh, R, 1.0), np.clip(solid_sdf(mesh, R, 1.0), -1, 1))


@pytest.mark.parametrize("spacing", [0.3, 0.02])
def test_the_cover_has_no_gap_wider_than_its_spacing(spacing):
    rng = np.random.default_rng(1)
    mesh = Mesh(rng.uniform(-0.5, 0.5, (30, 3)).astype(np.float32), np.arange(30).reshape(10, 3))
    points, face = cover_surface(mesh, spacing)
    for number in range(10):
        weights = rng.dirichlet((1, 1, 1), 300)
        on_face = weights @ mesh.vertices[mesh.faces[number]]
        gap = np.linalg.norm(on_face[:, None] - points[face == number], axis=2).min(axis=1)
        assert gap.max() <= spacing


def test_what_has_no_solid_is_refused():
    mesh = box((0.4, 0.4, 0.4))
    with pytest.raises(TriptychError, match="no faces"):
        solid_sdf(mesh.replace(faces=np.zeros((0, 3), np.int64)), R)
    for bad in (0.7, np.nan):
        with pytest.raises(TriptychError, match="normalise it first"):
            solid_sdf(mesh.replace(vertices=np.where(mesh.vertices > 0.3, np.float32(bad), mesh.vertices)), R)
    with pytest.raises(TriptychError, match="surface samples, more than"):
        solid_sdf(mesh.replace(faces=np.tile(mesh.faces, (400, 1))), 64)
