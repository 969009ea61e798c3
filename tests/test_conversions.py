"""Round trips between meshes, voxels, points and depth maps, each with its stated bound."""

import csv
import math

import numpy as np
import pytest
import torch
import trimesh
from scipy import spatial

from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera, rig_cameras
from triptych.geometry.convert import (
    EMPTY,
    SURFACE,
    UNKNOWN,
    depth_from_mesh,
    fuse_depths,
    mesh_from_depth,
    mesh_from_voxels,
    points_from_depth,
    points_from_mesh,
    points_from_voxels,
    unproject,
    voxels_from_depths,
    voxels_from_points,
)
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.geometry.voxels import fill_interior, surface_voxels, voxel_centers

CENTER, RADIUS = np.array([0.06, -0.03, 0.09]), 0.33
ORTHOGRAPHIC = [*rig_cameras(), Camera(elevation_deg=80.0), Camera(elevation_deg=-80.0)]
PERSPECTIVE = [
    Camera(azimuth_deg=azimuth, elevation_deg=elevation, radius=2.5, half_extent=None, fov_deg=30.0)
    for azimuth in (0, 90, 180, 270)
    for elevation in (-35, 35)
]
RIGS = pytest.mark.parametrize("cameras", [ORTHOGRAPHIC, PERSPECTIVE], ids=["orthographic", "perspective"])


def as_mesh(other: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(other.vertices, dtype=np.float32), np.asarray(other.faces, dtype=np.int64))


def solid(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


def ball_depth(camera: Camera, size: int = 128) -> np.ndarray:
    """Depth map of the ball around CENTER by the quadratic formula."""
    origins, directions = (ray.numpy().astype(np.float64) for ray in camera.rays(size))
    offset = origins - CENTER
    half_b = (offset * directions).sum(axis=-1)
    root = half_b**2 - (offset**2).sum(axis=-1) + RADIUS**2
    hits = origins + directions * (-half_b - np.sqrt(np.maximum(root, 0)))[..., None]
    depth = camera.radius - hits @ camera.rotation().numpy()[2]
    return np.where(root > 0, depth, np.inf).astype(np.float32)


def ray_depth(mesh: Mesh, camera: Camera, size: int) -> np.ndarray:
    """Depth map by embree: the reference for the rasteriser."""
    origins, directions = (ray.reshape(-1, 3).numpy() for ray in camera.rays(size))
    hits, rays, _ = solid(mesh).ray.intersects_location(origins, directions, multiple_hits=False)
    depth = np.full(size * size, np.inf, dtype=np.float32)
    depth[rays] = camera.radius - hits @ camera.rotation().numpy()[2]
    return depth.reshape(size, size)


# --- voxels and points ------------------------------------------------------------------------------------------------


def test_voxels_to_points_and_back_is_exact():
    voxels = np.random.default_rng(0).random((24, 24, 24)) < 0.1
    points = points_from_voxels(voxels)
    assert points.shape == (voxels.sum(), 3) and points.dtype == np.float32
    np.testing.assert_array_equal(points, voxel_centers(24)[voxels])
    np.testing.assert_array_equal(voxels_from_points(points, 24), voxels)


def test_points_to_voxels_and_back_is_within_half_a_diagonal():
    points = np.random.default_rng(1).uniform(-0.5, 0.5, (4000, 3))
    distance, _ = spatial.cKDTree(points_from_voxels(voxels_from_points(points, 32))).query(points)
    assert distance.max() <= math.sqrt(3) / 2 / 32 + 1e-6


def test_points_need_company_and_must_lie_in_the_cube():
    points = np.array([[0.01, 0.01, 0.01]] * 3 + [[0.4, 0.4, 0.4], [3, 0, 0]])
    assert voxels_from_points(points, 8).sum() == 2
    assert np.argwhere(voxels_from_points(points, 8, min_points=3)).tolist() == [[4, 4, 4]]
    assert voxels_from_points(np.array([[0.5, -0.5, 0.5]]), 8)[7, 0, 7]  # the cube is closed
    with pytest.raises(TriptychError, match="none of the 1 points"):
        voxels_from_points(points[-1:], 8)
    with pytest.raises(TriptychError, match="finite"):
        voxels_from_points(np.array([[np.nan, 0, 0]]), 8)


def test_points_from_a_mesh_lie_on_it_and_fill_its_surface_voxels():
    mesh = as_mesh(trimesh.creation.icosphere(subdivisions=4, radius=0.45))
    points, normals = points_from_mesh(mesh, 40_000, seed=3)
    assert points.shape == normals.shape == (40_000, 3)
    length = np.linalg.norm(points, axis=1)
    assert np.abs(length - 0.45).max() < 0.45 * 0.003
    assert (normals * points).sum(axis=1).min() > 0.45 * 0.99
    sampled, exact = voxels_from_points(points, 24), surface_voxels(mesh, 24)
    assert not (sampled & ~exact).any()
    assert sampled.sum() > 0.9 * exact.sum()  # corners that the surface only grazes hold no sample


def test_blocky_mesh_has_the_voxels_volume_and_gives_them_back():
    voxels = np.random.default_rng(2).random((10, 10, 10)) < 0.3
    mesh = mesh_from_voxels(voxels)
    blocks = solid(mesh)
    assert blocks.is_winding_consistent
    assert blocks.volume == pytest.approx(voxels.mean(), rel=1e-5)
    _, uses = np.unique(blocks.edges_sorted, axis=0, return_counts=True)
    assert set(uses) <= {2, 4}  # closed; four where voxels meet along an edge only
    np.testing.assert_array_equal(blocks.contains(voxel_centers(10).reshape(-1, 3)), voxels.ravel())


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_smooth_mesh_keeps_every_voxel_on_its_side(share):
    voxels = np.random.default_rng(4).random((10, 10, 10)) < share
    mesh = solid(mesh_from_voxels(voxels, smooth=True))
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0
    np.testing.assert_array_equal(mesh.contains(voxel_centers(10).reshape(-1, 3)), voxels.ravel())


def test_mesh_to_voxels_to_smooth_mesh_is_within_a_voxel():
    resolution = 32
    voxels = fill_interior(surface_voxels(as_mesh(trimesh.creation.icosphere(subdivisions=4, radius=0.4)), resolution))
    excess = {
        smooth: (np.linalg.norm(mesh_from_voxels(voxels, smooth=smooth).vertices, axis=1) - 0.4) * resolution
        for smooth in (False, True)
    }
    # Conservative voxels stand outside of the surface: by up to a diagonal, in the mean by about half a voxel.
    assert excess[False].min() > -0.01 and excess[False].max() < math.sqrt(3)
    assert excess[True].min() > 0 and excess[True].max() < 1
    assert excess[True].std() < 0.3 * excess[False].std()


def test_voxels_must_be_a_boolean_cube_with_something_in_it():
    with pytest.raises(TriptychError, match="none of the 8"):
        mesh_from_voxels(np.zeros((8, 8, 8), dtype=bool))
    with pytest.raises(TriptychError, match="float64"):
        points_from_voxels(np.zeros((8, 8, 8)))


# --- depth maps -------------------------------------------------------------------------------------------------------


@RIGS
def test_depth_to_points_lies_on_the_surface(cameras):
    for camera in cameras:
        depth = ball_depth(camera)
        points = points_from_depth(depth, camera)
        assert len(points) == np.isfinite(depth).sum() > 2000
        assert np.abs(np.linalg.norm(points - CENTER, axis=1) - RADIUS).max() < 1e-5


@RIGS
def test_points_to_depth_is_the_inverse(cameras):
    depth = ball_depth(cameras[1], 32)
    points = unproject(depth, cameras[1])
    np.testing.assert_array_equal(np.isnan(points[..., 0]), np.isinf(depth))
    row, column = np.nonzero(np.isfinite(depth))
    ndc, distance = cameras[1].project(torch.from_numpy(points[row, column]))
    np.testing.assert_allclose(distance, depth[row, column], atol=1e-5)
    np.testing.assert_allclose(ndc, np.stack([(column + 0.5) / 16 - 1, 1 - (row + 0.5) / 16], axis=1), atol=1e-5)


@RIGS
def test_mesh_to_depth_equals_ray_casting_and_comes_back(cameras):
    torus = trimesh.creation.torus(0.3, 0.1, major_sections=48, minor_sections=24)
    torus.apply_transform(trimesh.transformations.rotation_matrix(0.5, [1, 1, 0]))
    mesh = as_mesh(torus)
    depth, expected = depth_from_mesh(mesh, cameras[1], 96), ray_depth(mesh, cameras[1], 96)
    assert depth.shape == (96, 96) and depth.dtype == np.float32
    both = np.isfinite(depth) & np.isfinite(expected)
    assert (np.isfinite(depth) != np.isfinite(expected)).sum() <= 2  # rays along a silhouette edge
    assert np.quantile(np.abs(depth[both] - expected[both]), 0.999) < 1e-4
    back = depth_from_mesh(mesh_from_depth(depth, cameras[1]), cameras[1], 96)
    kept = np.isfinite(back)
    assert kept[np.isfinite(depth)].mean() > 0.94 and not (kept & ~np.isfinite(depth)).any()
    assert np.abs(back[kept] - depth[kept]).max() < 1e-5


@RIGS
def test_mesh_from_depth_faces_the_camera_and_lies_on_the_ball(cameras):
    mesh = mesh_from_depth(ball_depth(cameras[0]), cameras[0])
    offset = mesh.vertices[mesh.faces].mean(axis=1) - CENTER
    assert (mesh.face_normals() * offset).sum(axis=1).min() > 0.95 * RADIUS
    assert np.linalg.norm(offset, axis=1).max() <= RADIUS + 1e-5


def test_mesh_from_depth_is_cut_where_the_depth_jumps():
    depth = np.full((32, 32), np.inf, dtype=np.float32)
    depth[4:28, 4:16], depth[4:28, 16:28] = 1.8, 2.2
    mesh = mesh_from_depth(depth, Camera())
    assert len(mesh.faces) == 2 * (2 * 23 * 11)
    assert len(solid(mesh).split(only_watertight=False)) == 2
    joined = mesh_from_depth(depth, Camera(), max_slope=1000)
    assert len(joined.faces) == 2 * 23 * 23
    ramp = np.broadcast_to(2 + np.arange(32) * 0.05, (32, 32))  # 1.4 times the pixel's width: one surface
    assert len(mesh_from_depth(ramp, Camera()).faces) == 2 * 31 * 31


@RIGS
def test_carving_never_cuts_the_object_and_leaves_little_around_it(cameras):
    resolution = 64
    state = voxels_from_depths(np.stack([ball_depth(camera) for camera in cameras]), cameras, resolution)
    excess = (np.linalg.norm(voxel_centers(resolution) - CENTER, axis=-1) - RADIUS) * resolution
    assert not (state[excess <= 0] == EMPTY).any()
    assert excess[state != EMPTY].max() < 2.5  # the tolerance, a pixel, and what six or eight views cannot see
    assert (np.abs(excess[state == SURFACE]) < 2.5).all()
    assert (state[excess < -2] == UNKNOWN).all()
    assert (state[np.abs(excess) < 0.4] == SURFACE).mean() > 0.9


def test_carving_from_one_view_keeps_its_shadow_unknown():
    camera = Camera()
    state = voxels_from_depths(ball_depth(camera)[None], [camera], 32)
    behind = voxel_centers(32)[state == UNKNOWN]
    assert behind[:, 2].min() < -0.48  # as far as the cube reaches
    assert np.linalg.norm(behind[:, :2] - CENTER[:2], axis=1).max() < RADIUS + 2 / 32


@RIGS
def test_fused_depths_give_back_the_ball_to_a_fraction_of_a_voxel(cameras):
    resolution = 64
    field = fuse_depths(np.stack([ball_depth(camera) for camera in cameras]), cameras, resolution)
    assert field.shape == (resolution,) * 3 and field.dtype == np.float32 and np.abs(field).max() <= 3
    mesh = isosurface(field)
    error = np.abs(np.linalg.norm(mesh.vertices - CENTER, axis=1) - RADIUS) * resolution
    assert np.median(error) < 0.05 and np.quantile(error, 0.99) < 0.3 and error.max() < 0.6
    assert solid(mesh).is_watertight
    assert solid(mesh).volume == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.01)


def test_fusing_noisy_depths_averages_the_noise():
    cameras = [Camera(azimuth, elevation) for azimuth in range(0, 360, 45) for elevation in (-40, 0, 40)]
    noise = np.random.default_rng(0).normal(0, 0.5 / 32, (len(cameras), 96, 96)).astype(np.float32)  # half a voxel
    depths = np.stack([ball_depth(camera, 96) for camera in cameras]) + noise
    mesh = isosurface(fuse_depths(depths, cameras, 32))
    error = (np.linalg.norm(mesh.vertices - CENTER, axis=1) - RADIUS) * 32
    assert abs(error.mean()) < 0.25 and error.std() < 0.5


def test_real_object_to_depths_to_mesh(data_dir):
    """Fourteen depth maps of a real object, fused at 64^3: the new surface lies within a voxel of the old one."""
    with (data_dir / "index.csv").open(newline="", encoding="utf-8") as file:
        name = next(row["file"] for row in csv.DictReader(file) if row["id"] == "gso__Android_Lego")
    mesh = as_mesh(trimesh.load(data_dir / name, force="mesh")).normalized()
    cameras = [Camera(azimuth, elevation) for azimuth in range(0, 360, 60) for elevation in (-30, 30)]
    cameras += [Camera(elevation_deg=85.0), Camera(elevation_deg=-85.0)]
    depths = np.stack([depth_from_mesh(mesh, camera, 192) for camera in cameras])
    fused = isosurface(fuse_depths(depths, cameras, 64))
    assert solid(fused).is_watertight
    new, _ = trimesh.sample.sample_surface(solid(fused), 8000, seed=0)
    old, _ = trimesh.sample.sample_surface(solid(mesh), 8000, seed=1)
    to_old, to_new = spatial.cKDTree(old).query(new)[0], spatial.cKDTree(new).query(old)[0]
    # Sampling alone puts neighbours about a third of a voxel apart.
    assert to_old.mean() * 64 < 0.7 and to_new.mean() * 64 < 0.7
    assert np.quantile(to_new, 0.98) * 64 < 2


def test_depth_maps_and_cameras_must_be_sound():
    with pytest.raises(TriptychError, match="2 maps for 1 cameras"):
        fuse_depths(np.full((2, 8, 8), np.inf), [Camera()])
    with pytest.raises(TriptychError, match="NaN, zero or less"):
        points_from_depth(np.zeros((8, 8)), Camera())
    with pytest.raises(TriptychError, match=r"\(8, 9\)"):
        mesh_from_depth(np.ones((8, 9)), Camera())
    with pytest.raises(TriptychError, match="no surface"):
        mesh_from_depth(np.full((8, 8), np.inf), Camera())
