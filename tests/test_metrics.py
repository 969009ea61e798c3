"""Distances and volumes of shapes with known answers, and agreement with brute force and with trimesh."""

import csv
import time

import numpy as np
import pytest

from triptych.errors import TriptychError
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.metrics import compare_meshes, is_watertight, sample_surface, solid_from, volume_iou


def box(size=(1.0, 1.0, 1.0), centre=(0.0, 0.0, 0.0)) -> Mesh:
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int64)
    return Mesh((corners * size + centre).astype(np.float32), faces)


def sphere(radius=0.5, subdivisions=4) -> Mesh:
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return Mesh(np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int64))


def square(z=0.0, tilt_deg=0.0) -> Mesh:
    t = np.radians(tilt_deg)
    points = np.array([[x, y * np.cos(t), y * np.sin(t) + z] for x, y in ((0, 0), (1, 0), (1, 1), (0, 1))], np.float32)
    return Mesh(points, np.array([[0, 1, 2], [0, 2, 3]]))


def joined(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0, *(len(m.vertices) for m in meshes)])
    faces = np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)])
    return Mesh(np.concatenate([m.vertices for m in meshes]), faces)


# --- sampling --------------------------------------------------------------------------------------------------


def test_samples_lie_on_their_faces_in_proportion_to_area():
    mesh = box((1, 2, 4))
    points, normals = sample_surface(mesh, 14_000, seed=3)
    assert points.shape == normals.shape == (14_000, 3) and points.dtype == normals.dtype == np.float32
    half = np.array([0.5, 1, 2])
    outward = np.abs(points) / half
    assert np.abs(outward.max(axis=1) - 1).max() < 1e-6
    axis = outward.argmax(axis=1)
    assert np.allclose(normals[np.arange(len(points)), axis], np.sign(points[np.arange(len(points)), axis]), atol=1e-6)
    # Areas 2 * (8, 4, 2) of 28: shares by axis, exact within a point or two because the draws are stratified.
    assert np.abs(np.bincount(axis) / 14_000 - np.array([8, 4, 2]) / 14).max() < 1e-3


def test_samples_are_uniform_inside_a_triangle():
    mesh = Mesh(np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32), np.array([[0, 1, 2]]))
    points, _ = sample_surface(mesh, 20_000, seed=0)
    assert points[:, :2].min() >= 0 and points[:, :2].sum(axis=1).max() <= 1 + 1e-6
    assert np.abs(points.mean(axis=0) - [1 / 3, 1 / 3, 0]).max() < 0.006
    quarter = (points[:, 0] < 0.5) & (points[:, 1] < 0.5) & (points[:, :2].sum(axis=1) > 0.5)  # the middle triangle
    assert quarter.mean() == pytest.approx(0.25, abs=0.012)


def test_the_seed_decides():
    first, again, other = (sample_surface(box(), 100, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_degenerate_faces_are_never_drawn_and_no_area_is_an_error():
    mesh = box()
    with_flat = mesh.replace(faces=np.concatenate([[[0, 0, 1]], mesh.faces, [[1, 1, 1]]]))
    _, normals = sample_surface(with_flat, 1000)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1)
    with pytest.raises(TriptychError, match="no surface to sample"):
        sample_surface(mesh.replace(faces=np.array([[0, 0, 1]])), 10)
    with pytest.raises(TriptychError, match="no surface to sample"):
        sample_surface(mesh.replace(faces=np.zeros((0, 3), np.int64)), 10)


# --- distances -------------------------------------------------------------------------------------------------


def test_parallel_squares_have_their_distance():
    result = compare_meshes(square(0.0), square(0.03), samples=40_000)
    # Points of the other sample are 0.0025 apart on average, which adds in quadrature.
    assert result.chamfer == pytest.approx(0.03, rel=0.01)
    assert result.f_scores[0.01] == result.f_scores[0.02] == 0.0 and result.f_scores[0.05] == 1.0
    assert result.normal_consistency == pytest.approx(1.0, abs=1e-6)
    assert result.volume_iou is None


def test_normals_are_compared_without_their_sign():
    tilted = compare_meshes(square(), square(tilt_deg=60), samples=5000)
    assert tilted.normal_consistency == pytest.approx(0.5, abs=1e-5)
    flipped = square().replace(faces=square().faces[:, ::-1])
    assert compare_meshes(square(), flipped, samples=2000).normal_consistency == pytest.approx(1.0, abs=1e-6)


def test_concentric_spheres():
    result = compare_meshes(sphere(0.5), sphere(0.46), samples=30_000)
    assert result.chamfer == pytest.approx(0.04, rel=0.02)
    assert result.volume_iou == pytest.approx((0.46 / 0.5) ** 3, abs=0.01)
    assert result.normal_consistency > 0.98


def test_precision_and_recall_say_which_mesh_has_more():
    """``a`` holds ``b`` and as much again far away: all of ``b`` is found, half of ``a`` is wrong."""
    b = box()
    result = compare_meshes(joined(b, box(centre=(10, 0, 0))), b, samples=10_000, thresholds=(0.1,))
    assert result.recall == {0.1: 1.0} and result.precision[0.1] == pytest.approx(0.5, abs=0.001)
    assert result.f_scores[0.1] == pytest.approx(2 / 3, abs=0.001)
    swapped = compare_meshes(b, joined(b, box(centre=(10, 0, 0))), samples=10_000, thresholds=(0.1,))
    assert swapped.precision == {0.1: 1.0} and swapped.recall[0.1] == pytest.approx(0.5, abs=0.001)


def test_chamfer_agrees_with_brute_force():
    a, b = box(), sphere(0.6, 2)
    result = compare_meshes(a, b, samples=600, seed=5)
    points_a, points_b = sample_surface(a, 600, 5)[0], sample_surface(b, 600, 6)[0]
    distances = np.linalg.norm(points_a[:, None] - points_b[None], axis=2)
    expected = (distances.min(axis=1).mean() + distances.min(axis=0).mean()) / 2
    assert result.chamfer == pytest.approx(expected, rel=1e-5)
    assert result.precision[0.05] == (distances.min(axis=1) <= 0.05).mean()


def test_a_mesh_is_at_the_sampling_floor_from_itself():
    result = compare_meshes(box(), box())
    assert result.chamfer == pytest.approx(0.5 * np.sqrt(6 / 30_000), rel=0.05)
    assert result.f_scores[0.02] == pytest.approx(1, abs=0.002) and result.volume_iou == 1.0


# --- volumes ---------------------------------------------------------------------------------------------------


def test_watertight_or_not():
    closed = box()
    assert is_watertight(closed) and is_watertight(sphere())
    assert not is_watertight(closed.replace(faces=closed.faces[1:]))
    flipped = closed.faces.copy()
    flipped[3] = flipped[3, ::-1]
    assert not is_watertight(closed.replace(faces=flipped))
    soup = Mesh(closed.vertices[closed.faces].reshape(-1, 3), np.arange(36).reshape(12, 3))
    assert is_watertight(soup)  # seams of texture are no holes
    assert is_watertight(joined(closed, box(centre=(1, 0, 0))))
    assert not is_watertight(closed.replace(faces=np.zeros((0, 3), np.int64)))


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 2.0])
def test_iou_of_shifted_boxes(shift):
    overlap = max(0.0, 1 - shift)
    expected = overlap / (2 - overlap)
    # The shifted pair's grid has cells of (1 + shift) / 64: one layer of them is the most that can be wrong.
    assert volume_iou(box(), box(centre=(shift, 0, 0))) == pytest.approx(expected, abs=2 * (1 + shift) / 64)


def test_iou_of_overlapping_bodies_counts_their_union():
    pair = joined(box(), box(centre=(0.5, 0, 0)))
    assert volume_iou(pair, box((1.5, 1, 1), centre=(0.25, 0, 0))) == 1.0
    assert volume_iou(box(), box().replace(faces=box().faces[:, ::-1])) == 1.0  # inside out is the same solid


def test_hollow_solids_are_hollow():
    inner = box((0.5, 0.5, 0.5))
    hollow = joined(box(), inner.replace(faces=inner.faces[:, ::-1]))
    assert volume_iou(hollow, box()) == pytest.approx(1 - 0.125, abs=0.02)


def test_solid_agrees_with_the_formula_of_a_sphere_cell_by_cell():
    inside = solid_from(sphere(0.4, 5), np.full(3, -0.5), 1.0, 40)
    centres = (np.arange(40) + 0.5) / 40 - 0.5
    x, y, z = np.meshgrid(centres, centres, centres, indexing="ij")
    distance = np.sqrt(x**2 + y**2 + z**2) - 0.4
    sure = np.abs(distance) > 0.001
    assert np.array_equal(inside[sure], (distance < 0)[sure])


def test_solid_agrees_with_trimesh_on_real_objects(data_dir):
    import trimesh

    with open(data_dir / "index.csv", newline="", encoding="utf-8") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream)}
    for name in ("odedstein__spot", "trimesh__7_8ths_cube", "prl__plastic_bowl"):
        mesh = read_mesh(data_dir / rows[name]["file"])
        assert is_watertight(mesh), name
        inside = solid_from(mesh, np.full(3, -0.5), 1.0, 64)
        reference = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
        assert inside.mean() == pytest.approx(reference.volume, rel=0.03), name
        assert not solid_from(mesh, np.full(3, 2.0), 1.0, 8).any()


def test_comparing_real_scans_takes_under_two_seconds(data_dir):
    files = sorted((data_dir / "objects" / "eval").rglob("*.glb"))[:2]
    a, b = (read_mesh(file) for file in files)
    start = time.process_time()
    result = compare_meshes(a, b)
    assert time.process_time() - start < 2.0
    assert 0 < result.chamfer < 0.5 and 0 < result.normal_consistency < 1
