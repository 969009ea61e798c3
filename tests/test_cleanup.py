"""Repair and simplification on shapes with known answers; nothing is changed in place, attributes stay."""

import csv

import numpy as np
import pytest

from triptych.errors import TriptychError
from triptych.geometry.cleanup import (
    boundary_loops,
    decimate,
    face_components,
    fill_holes,
    keep_components,
    remove_degenerate,
    smooth,
    weld,
)
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Material, Mesh
from triptych.geometry.metrics import compare_meshes, is_watertight


def box(size=(1.0, 1.0, 1.0), centre=(0.0, 0.0, 0.0)) -> Mesh:
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int64)
    return Mesh((corners * size + centre).astype(np.float32), faces)


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes)])
    faces = np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)])
    return Mesh(np.concatenate([m.vertices for m in meshes]), faces)


def sphere(radius=0.5, subdivisions=3) -> Mesh:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return Mesh(np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int64))


def soup(mesh: Mesh) -> Mesh:
    """Every face with vertices, UV, colours and material of its own."""
    count = len(mesh.faces)
    random = np.random.default_rng(0)
    return Mesh(
        mesh.vertices[mesh.faces].reshape(-1, 3),
        np.arange(3 * count).reshape(count, 3),
        colors=random.random((3 * count, 4)).astype(np.float32),
        uv=random.random((3 * count, 2)).astype(np.float32),
        materials=(Material("a"), Material("b")),
        face_materials=np.arange(count) % 2,
    )


def volume(mesh: Mesh) -> float:
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(np.float64) for i in range(3))
    return float((np.cross(a, b) * c).sum() / 6)


@pytest.fixture(scope="module")
def spot(data_dir) -> Mesh:
    with open(data_dir / "index.csv", newline="", encoding="utf-8") as stream:
        file = next(row["file"] for row in csv.DictReader(stream) if row["id"] == "odedstein__spot")
    return read_mesh(data_dir / file)


OPERATIONS = {
    "weld": weld,
    "weld within": lambda m: weld(m, 0.01),
    "remove_degenerate": remove_degenerate,
    "keep_components": keep_components,
    "fill_holes": fill_holes,
    "decimate": lambda m: decimate(m, 8),
    "smooth": smooth,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_changed_in_place(name):
    mesh = soup(joined(box(), box((0.1, 0.1, 0.1), centre=(2, 0, 0))))
    arrays = ("vertices", "faces", "colors", "uv", "face_materials")
    before = {key: getattr(mesh, key).copy() for key in arrays}
    for key in arrays:
        getattr(mesh, key).setflags(write=False)
    result = OPERATIONS[name](mesh)
    assert isinstance(result, Mesh) and len(result.faces)
    assert all(np.array_equal(getattr(mesh, key), before[key]) for key in arrays)


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_are_sound(name, spot):
    result = OPERATIONS[name](spot)
    assert result.vertices.dtype == np.float32 and result.faces.dtype == np.int64
    assert result.faces.min() >= 0 and result.faces.max() < len(result.vertices)
    assert np.isfinite(result.vertices).all()


# --- weld ------------------------------------------------------------------------------------------------------


def test_weld_joins_a_soup_and_keeps_corner_uv_and_materials():
    split = soup(box())
    merged = weld(split)
    assert len(merged.vertices) == 8 and is_watertight(merged) and len(np.unique(merged.faces)) == 8
    assert np.array_equal(merged.vertices[merged.faces], split.vertices[split.faces])
    assert np.array_equal(merged.corner_uv(), split.corner_uv())
    assert np.array_equal(merged.face_materials, split.face_materials) and merged.materials is split.materials
    for vertex in range(8):  # colours are the mean of what was merged
        same = np.flatnonzero((split.vertices == merged.vertices[vertex]).all(axis=1))
        assert np.allclose(merged.colors[vertex], split.colors[same].mean(axis=0), atol=1e-6)


def test_weld_tolerance_and_negative_zero():
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [-0.0, 0, 0], [1.0004, 0, 0], [0, -1, 0]], np.float32)
    mesh = Mesh(points, np.array([[0, 1, 2], [4, 3, 5]]))
    assert len(weld(mesh).vertices) == 5
    assert len(weld(mesh, 0.01).vertices) == 4
    with pytest.raises(TriptychError, match="at least 0"):
        weld(mesh, -1)


def test_weld_twice_is_weld_once(spot):
    once = weld(soup(spot))
    twice = weld(once)
    assert len(once.vertices) == len(np.unique(spot.vertices[np.unique(spot.faces)], axis=0))
    assert np.array_equal(once.vertices, twice.vertices) and np.array_equal(once.faces, twice.faces)


# --- degenerate faces ------------------------------------------------------------------------------------------


def test_degenerate_and_repeated_faces_go_and_attributes_stay_with_their_faces():
    good = soup(box())
    vertices = np.concatenate([good.vertices, [[0, 0, 0], [1, 1, 1], [2, 2, 2]]]).astype(np.float32)
    n = len(good.vertices)
    bad = np.array([[0, 0, 1], [n, n + 1, n + 2], good.faces[4][[1, 2, 0]], good.faces[4][[1, 0, 2]]])
    faces = np.concatenate([good.faces[:3], bad, good.faces[3:]])
    mesh = good.replace(
        vertices=vertices,
        faces=faces,
        colors=None,
        uv=np.random.default_rng(1).random((n + 3, 2)).astype(np.float32),
        face_materials=np.arange(16) % 2,
    )
    result = remove_degenerate(mesh)
    keep = [
        0,
        1,
        2,
        5,
        6,
        7,
        *range(9, 16),
    ]  # the turned copy comes first, so the later original goes; the flipped one stays
    assert np.array_equal(result.vertices[result.faces], mesh.vertices[faces][keep])
    assert np.array_equal(result.corner_uv(), mesh.corner_uv()[keep])
    assert np.array_equal(result.face_materials, mesh.face_materials[keep])
    assert len(result.vertices) == n


def test_needles_go_by_height():
    points = np.array([[0, 0, 0], [1, 0, 0], [0.5, 1e-4, 0], [0, 1, 0]], np.float32)
    mesh = Mesh(points, np.array([[0, 1, 2], [0, 1, 3]]))
    assert len(remove_degenerate(mesh).faces) == 2
    assert len(remove_degenerate(mesh, min_height=1e-3).faces) == 1


# --- components ------------------------------------------------------------------------------------------------


def test_small_components_go_and_seams_do_not_separate():
    mesh = soup(joined(box(), box((0.5, 0.5, 0.5), (3, 0, 0)), box((0.05, 0.05, 0.05), (5, 0, 0))))
    assert np.array_equal(face_components(mesh), np.repeat([0, 1, 2], 12))
    assert len(keep_components(mesh, 0.0).faces) == 36
    assert len(keep_components(mesh, 0.01).faces) == 24  # 0.0025 of the largest area
    largest = keep_components(mesh, 1.0)
    assert len(largest.faces) == 12 and np.array_equal(largest.bounds, box().bounds)
    assert np.array_equal(largest.corner_uv(), mesh.corner_uv()[:12])
    with pytest.raises(TriptychError, match="min_share"):
        keep_components(mesh, 1.5)


# --- holes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [[0], [0, 6], [1, 4], [0, 6, 3, 9]])
def test_holes_of_a_box_are_closed_to_its_volume(missing):
    mesh = box((1, 2, 3))
    opened = mesh.replace(faces=np.delete(mesh.faces, missing, axis=0))
    assert not is_watertight(opened)
    closed = fill_holes(opened)
    assert is_watertight(closed) and len(closed.faces) == 12
    assert np.array_equal(closed.faces[: len(opened.faces)], opened.faces)
    if missing in ([0], [0, 6], [0, 6, 3, 9]):  # flat holes: the solid is the box again
        assert volume(closed) == pytest.approx(6, rel=1e-6)


def test_filled_faces_have_uv_and_material():
    whole = weld(soup(box()))
    opened = whole.replace(faces=whole.faces[1:], uv_faces=whole.uv_faces[1:], face_materials=whole.face_materials[1:])
    closed = fill_holes(opened)
    assert closed.corner_uv().shape == (12, 3, 2) and len(closed.face_materials) == 12


def test_long_borders_stay_and_limits_open_them():
    ball = sphere()
    cup = ball.replace(faces=ball.faces[ball.vertices[ball.faces][:, :, 1].max(axis=1) < 0.2])
    (rim,) = boundary_loops(cup)
    assert len(rim) > 16 and fill_holes(cup, max_edges=16) is cup
    closed = fill_holes(cup, max_edges=len(rim))
    assert is_watertight(closed) and volume(closed) > volume(cup)


def test_two_holes_that_touch_in_a_vertex_are_two_loops():
    grid = np.stack(np.meshgrid(range(5), range(5), [0], indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    quads = [(i * 5 + j, i * 5 + j + 5, i * 5 + j + 6, i * 5 + j + 1) for i in range(4) for j in range(4)]
    quads = [q for q in quads if q[0] not in (6, 12)]  # cells (1, 1) and (2, 2) share the middle vertex
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
    mesh = Mesh(grid, faces)
    assert sorted(map(len, boundary_loops(mesh))) == [4, 4, 16]
    filled = fill_holes(mesh, max_edges=4)
    assert len(filled.faces) == 32 and np.allclose(filled.face_normals(), filled.face_normals()[0])


def test_a_torn_scan_becomes_watertight(spot):
    mesh = weld(spot)
    random = np.random.default_rng(4)
    torn = mesh.replace(faces=np.delete(mesh.faces, random.choice(len(mesh.faces), 60, replace=False), axis=0))
    assert is_watertight(mesh) and not is_watertight(torn)
    assert is_watertight(fill_holes(torn)) and volume(fill_holes(torn)) == pytest.approx(volume(mesh), rel=1e-3)


# --- decimation and smoothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [4000, 1000, 300])
def test_decimation_hits_its_target_and_keeps_the_shape(spot, target):
    result = decimate(spot, target)
    assert 0.95 * target - 2 <= len(result.faces) <= target
    comparison = compare_meshes(result, spot, samples=10_000)
    floor = compare_meshes(spot, spot, samples=10_000).chamfer
    assert comparison.chamfer < floor + {4000: 0.0005, 1000: 0.001, 300: 0.004}[target]


def test_decimation_carries_colours_and_leaves_small_meshes_alone():
    ball = sphere(subdivisions=4)
    ball = ball.replace(
        colors=np.concatenate([ball.vertices + 0.5, np.ones((len(ball.vertices), 1))], 1).astype(np.float32)
    )
    result = decimate(ball, 500)
    assert np.abs(result.colors[:, :3] - (result.vertices + 0.5)).max() < 0.05
    assert decimate(ball, len(ball.faces)) is ball
    with pytest.raises(TriptychError, match="at least 4"):
        decimate(ball, 3)


def test_smoothing_removes_noise_without_shrinking():
    ball = sphere(subdivisions=4)
    random = np.random.default_rng(2)
    noisy = ball.replace(
        vertices=(ball.vertices * (1 + 0.02 * random.normal(size=(len(ball.vertices), 1)))).astype(np.float32)
    )
    result = smooth(noisy, iterations=20)
    radius = np.linalg.norm(result.vertices, axis=1)
    assert radius.std() < 0.35 * np.linalg.norm(noisy.vertices, axis=1).std()
    assert volume(result) == pytest.approx(volume(ball), rel=0.01)
    assert np.array_equal(result.faces, noisy.faces)


def test_smoothing_leaves_borders_and_flat_parts_where_they_are():
    grid = np.stack(np.meshgrid(range(9), range(9), [0.0], indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    faces = np.array([t for i in range(8) for j in range(8) for a in [i * 9 + j]
                      for t in ((a, a + 9, a + 10), (a, a + 10, a + 1))])  # fmt: skip
    result = smooth(Mesh(grid, faces), iterations=5)
    border = (grid[:, :2] % 8 == 0).any(axis=1)
    assert np.array_equal(result.vertices[border], grid[border]) and np.all(result.vertices[:, 2] == 0)
    with pytest.raises(TriptychError, match="strength"):
        smooth(Mesh(grid, faces), strength=0)
    assert smooth(Mesh(grid, faces), iterations=0).vertices is not None
