"""Surface voxels against exact rational clipping; hulls against solids whose silhouettes are known in closed form."""

import csv
import math
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
import trimesh

from triptych.errors import TriptychError
from triptych.geometry.cameras import RIG_HALF_EXTENT, Camera, rig_cameras
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.geometry.voxels import (
    fill_interior,
    hull_field,
    points_to_indices,
    silhouette_distance,
    surface_voxels,
    visual_hull,
    voxel_centers,
)


def as_mesh(other: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(other.vertices, dtype=np.float32), np.asarray(other.faces, dtype=np.int64))


def clips(triangle: np.ndarray, low: np.ndarray) -> bool:
    """Plain reference: whether anything is left of the triangle after exact clipping to the closed unit box."""
    polygon = [tuple(Fraction(float(x)) for x in corner) for corner in triangle]
    for axis in range(3):
        for sign, bound in ((1, int(low[axis])), (-1, -int(low[axis]) - 1)):
            clipped = []
            for p, q in zip(polygon, polygon[1:] + polygon[:1], strict=True):
                a, b = sign * p[axis] - bound, sign * q[axis] - bound
                if a >= 0:
                    clipped.append(p)
                if a * b < 0:
                    clipped.append(tuple(x + a / (a - b) * (y - x) for x, y in zip(p, q, strict=True)))
            polygon = clipped
    return bool(polygon)


@pytest.mark.parametrize("kind", ["random", "ties", "segment", "point", "in a boundary plane", "partly outside"])
def test_surface_voxels_equal_exact_clipping(kind):
    generator, resolution = np.random.default_rng(5), 4
    for _ in range(6):
        triangle = generator.uniform(-0.5, 0.5, (3, 3))
        if kind == "ties":
            triangle = np.round(triangle * 8) / 8  # corners on voxel corners, edges through voxel edges
        if kind in ("segment", "point"):
            triangle[1:] = triangle[0] if kind == "point" else [triangle[1], (triangle[0] + triangle[1]) / 2]
            triangle = np.round(triangle * 8) / 8
        if kind == "in a boundary plane":
            triangle[:, generator.integers(3)] = generator.choice([-0.5, -0.25, 0.0, 0.5])
        if kind == "partly outside":
            triangle = triangle * 2 + 0.3
        triangle = triangle.astype(np.float32)
        found = surface_voxels(Mesh(triangle, np.array([[0, 1, 2]])), resolution)
        scaled = (triangle.astype(np.float64) + 0.5) * resolution
        expected = [clips(scaled, np.array(index)) for index in np.ndindex(*found.shape)]
        np.testing.assert_array_equal(found.ravel(), expected)


def test_surface_voxels_of_a_cube_are_its_shell_and_index_order_is_xyz():
    low, high = np.array([1, 3, 6]), np.array([15, 10, 11])  # voxel boundaries, exact in float32
    box = trimesh.creation.box(bounds=[low / 16 - 0.5, high / 16 - 0.5])
    expected = np.zeros((16, 16, 16), dtype=bool)
    expected[0:16, 2:11, 5:12] = True  # a face on a boundary touches the voxels on both of its sides
    expected[2:14, 4:9, 7:10] = False
    np.testing.assert_array_equal(surface_voxels(as_mesh(box), 16), expected)


def test_every_sampled_surface_point_lies_in_a_surface_voxel():
    torus = trimesh.creation.torus(0.3, 0.12)
    voxels = surface_voxels(as_mesh(torus), 64)
    points, _ = trimesh.sample.sample_surface(torus, 50_000, seed=1)
    assert voxels[tuple(points_to_indices(points, 64).T)].all()
    # And conservative is not generous: no set voxel's centre is further from the surface than half a diagonal.
    centers = voxel_centers(64)[voxels]
    ring = np.hypot(np.hypot(centers[:, 0], centers[:, 1]) - 0.3, centers[:, 2])
    assert np.abs(ring - 0.12).max() < math.sqrt(3) / 2 / 64 + 2e-3  # the torus has flat faces


def test_twenty_thousand_faces_take_less_than_half_a_second():
    sphere = as_mesh(trimesh.creation.icosphere(subdivisions=5, radius=0.5))
    seconds = []  # of this process, so that a busy machine does not count
    for _ in range(3):
        start = time.process_time()
        surface_voxels(sphere, 64)
        seconds.append(time.process_time() - start)
    assert len(sphere.faces) == 20_480
    assert min(seconds) < 0.5


def test_one_huge_triangle_at_a_fine_resolution_stays_cheap():
    triangle = np.array([[-0.5, -0.5, -0.5], [0.5, 0.5, -0.4], [-0.4, 0.5, 0.5]], dtype=np.float32)
    start = time.process_time()
    count = surface_voxels(Mesh(triangle, np.array([[0, 1, 2]])), 256).sum()
    assert time.process_time() - start < 2
    assert 256**2 / 2 < count < 4 * 256**2


def test_meshes_outside_of_the_cube_and_bad_numbers():
    triangle = np.eye(3, dtype=np.float32)
    assert not surface_voxels(Mesh(triangle + 5, np.array([[0, 1, 2]])), 8).any()
    assert not surface_voxels(Mesh(triangle, np.zeros((0, 3), dtype=np.int64)), 8).any()
    triangle[0, 0] = np.nan
    with pytest.raises(TriptychError, match="not finite"):
        surface_voxels(Mesh(triangle, np.array([[0, 1, 2]])), 8)
    with pytest.raises(TriptychError, match="got 5000"):
        surface_voxels(Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]])), 5000)


def test_fill_interior_fills_a_closed_shell_and_not_one_with_a_hole():
    shell = surface_voxels(as_mesh(trimesh.creation.icosphere(subdivisions=4, radius=0.4)), 32)
    filled = fill_interior(shell)
    radius = np.linalg.norm(voxel_centers(32), axis=-1)
    assert filled[radius < 0.4].all()
    assert not filled[radius > 0.4 + math.sqrt(3) / 2 / 32].any()
    shell[16, 16, 16:] = False
    np.testing.assert_array_equal(fill_interior(shell), shell)


# --- visual hull ------------------------------------------------------------------------------------------------------


def disc(size: int, radius: float, center=(0.0, 0.0), half: float = RIG_HALF_EXTENT) -> np.ndarray:
    """Antialiased picture of a disc, world units, 8 x 8 samples per pixel: (size, size) float32."""
    samples = ((np.arange(size * 8) + 0.5) / (size * 8) * 2 - 1) * half
    inside = (samples[None, :] - center[0]) ** 2 + (-samples[:, None] - center[1]) ** 2 < radius**2
    return inside.reshape(size, 8, size, 8).mean(axis=(1, 3)).astype(np.float32)


def test_silhouette_distance_of_a_disc_is_accurate_to_a_tenth_of_a_pixel():
    size, radius = 96, 0.4
    found = silhouette_distance(disc(size, radius))
    axis = ((np.arange(size) + 0.5) / size * 2 - 1) * RIG_HALF_EXTENT
    expected = (radius - np.hypot(axis[None, :], axis[:, None])) * size / (2 * RIG_HALF_EXTENT)
    assert np.abs(found - expected).max() < 0.1  # alpha is not linear across a slanted edge
    assert np.abs(found - expected).mean() < 0.05
    np.testing.assert_array_equal(found[np.abs(expected) > 0.1] > 0, expected[np.abs(expected) > 0.1] > 0)


def test_silhouette_distance_of_empty_and_full_pictures():
    assert (silhouette_distance(np.zeros((8, 8))) < -8).all()
    full = silhouette_distance(np.ones((8, 8)))
    assert full[0, 1:-1] == pytest.approx(0.5) and full.max() == pytest.approx(3.5)


def test_hull_of_two_discs_is_the_steinmetz_solid():
    radius, resolution = 0.4, 64
    masks = np.stack([disc(256, radius)] * 4)
    x, y, z = np.moveaxis(voxel_centers(resolution), -1, 0)
    exact = np.minimum(radius - np.hypot(x, y), radius - np.hypot(z, y)) * resolution
    field = hull_field(masks, rig_cameras(), resolution)
    assert field.dtype == np.float32
    near = np.abs(exact) < 8
    assert np.abs(field - exact)[near].max() < 0.1
    soft = visual_hull(masks, rig_cameras(), resolution)
    clear = np.abs(exact) > 1
    np.testing.assert_array_equal((soft > 0.5)[clear], (exact > 0)[clear])
    # Volume of two crossing cylinders: 16 / 3 r^3.
    surface = isosurface(field)
    volume = trimesh.Trimesh(surface.vertices, surface.faces, process=False).volume
    assert volume == pytest.approx(16 / 3 * radius**3, rel=2e-3)


def test_views_are_not_mirrored():
    """A ball on the subject's left (+x), high, to the front: each view alone must leave the ball's centre inside."""
    center, radius, cameras = np.array([0.2, 0.15, 0.1], dtype=np.float32), 0.08, rig_cameras((0, 90, 180, 270, 33))
    masks = np.stack([disc(128, radius, tuple((camera.rotation().numpy() @ center)[:2])) for camera in cameras])
    expected = np.linalg.norm(voxel_centers(48) - center, axis=-1) < radius
    hull = visual_hull(masks, cameras, 48) > 0.5
    # Three distinct directions leave little beside the ball itself.
    assert hull[expected].mean() > 0.98 and hull.sum() < 1.5 * expected.sum()


def test_perspective_hull_field_measures_world_distance():
    """A perspective camera sees a centred ball as a disc of known size."""
    radius, distance, fov, resolution = 0.3, 2.0, 40.0, 32
    contour = math.tan(math.asin(radius / distance)) / math.tan(math.radians(fov) / 2)
    cameras = [
        Camera(azimuth_deg=azimuth, elevation_deg=elevation, radius=distance, half_extent=None, fov_deg=fov)
        for azimuth in range(0, 360, 30)
        for elevation in (-60, -20, 20, 60)
    ]
    masks = np.stack([disc(128, contour, half=1.0)] * len(cameras))
    vertices = isosurface(hull_field(masks, cameras, resolution)).vertices
    error = (np.linalg.norm(vertices, axis=1) - radius) * resolution
    assert error.min() > -0.1  # a hull never cuts into the object
    assert error.max() < 0.6 and error.mean() < 0.2  # 48 views leave small ridges between their contours
    soft = visual_hull(masks, cameras, resolution)
    assert (soft[np.linalg.norm(voxel_centers(resolution), axis=-1) < radius - 1 / resolution] > 0.9).all()


def test_outside_of_the_frame_is_empty():
    camera = Camera(half_extent=0.25)
    masks = np.ones((1, 16, 16), dtype=np.float32)
    inside = (np.abs(voxel_centers(16)[..., :2]) <= 0.25).all(axis=-1)
    np.testing.assert_array_equal(visual_hull(masks, [camera], 16), inside.astype(np.float32))
    np.testing.assert_array_equal(hull_field(masks, [camera], 16) > 0, inside)


def test_hull_keeps_the_kind_of_array_and_carries_gradients():
    masks = torch.full((2, 8, 8), 0.5, requires_grad=True)
    hull = visual_hull(masks, rig_cameras((0.0, 90.0)), 8)
    assert isinstance(hull, torch.Tensor) and hull.shape == (8, 8, 8)
    hull.sum().backward()
    assert masks.grad.sum().item() == pytest.approx(8**3, rel=1e-5)  # each voxel takes weight one in all
    same = visual_hull(masks.detach().numpy(), rig_cameras((0.0, 90.0)), 8)
    assert isinstance(same, np.ndarray)
    np.testing.assert_array_equal(same, hull.detach().numpy())


def test_fine_grids_go_in_slabs_with_the_same_result(monkeypatch):
    masks = np.stack([disc(32, 0.3), disc(32, 0.4)])
    whole = hull_field(masks, rig_cameras((0.0, 90.0)), 12)
    monkeypatch.setattr("triptych.geometry.voxels._POINTS_PER_CHUNK", 300)
    np.testing.assert_array_equal(hull_field(masks, rig_cameras((0.0, 90.0)), 12), whole)


def test_masks_and_cameras_must_match():
    with pytest.raises(TriptychError, match=r"\(3, 8, 8\) for 2 cameras"):
        visual_hull(np.zeros((3, 8, 8), dtype=np.float32), rig_cameras((0.0, 90.0)), 8)


def test_hull_of_real_objects_holds_the_object(data_dir):
    """Masks by embree rays, so that the rasteriser has no part in it."""
    with (data_dir / "index.csv").open(newline="", encoding="utf-8") as file:
        chosen = [row["file"] for row in csv.DictReader(file) if row["split"] == "assets"][:60:20]
    for name in chosen:
        mesh = as_mesh(trimesh.load(data_dir / name, force="mesh")).normalized()
        scene = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        cameras, masks = rig_cameras((0.0, 90.0, 45.0)), []
        for camera in cameras:
            origins, directions = (ray.reshape(-1, 3).numpy() for ray in camera.rays(160))
            masks.append(scene.ray.intersects_any(origins, directions).reshape(160, 160).astype(np.float32))
        field = hull_field(np.stack(masks), cameras, 48)
        points, _ = trimesh.sample.sample_surface(scene, 5000, seed=0)
        at_points = field[tuple(points_to_indices(points, 48).T)]
        # A voxel's centre is up to .87 voxel from the point, and a pixel here is a third of a voxel.
        assert (at_points > -1.3).mean() > 0.995, name
