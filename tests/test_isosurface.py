"""Marching cubes: closed for any field, outward, and sub-voxel accurate where the field is a distance."""

import numpy as np
import pytest
import torch
import trimesh
from scipy import ndimage

from triptych.errors import TriptychError
from triptych.geometry.isosurface import isosurface
from triptych.geometry.voxels import voxel_centers


def closed_volume(mesh) -> float:
    """Volume, after checking that each edge lies in exactly two faces of opposite direction, and no face is flat."""
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight and solid.is_winding_consistent
    corners = mesh.vertices[mesh.faces].astype(np.float64)
    areas = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    assert areas.min() > 0
    assert len(np.unique(mesh.faces)) == len(mesh.vertices)
    return solid.volume


@pytest.mark.parametrize("blur", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_fields_give_closed_surfaces(seed, blur):
    field = np.random.default_rng(seed).standard_normal((24, 24, 24))
    field = ndimage.gaussian_filter(field, blur) if blur else field
    level = float(np.quantile(field, 0.6))
    volume = closed_volume(isosurface(field, level))
    # The share of samples inside, as far as the field is smooth: marching cubes cuts every sharp corner of noise.
    assert 0.2 < volume < 0.41
    if blur == 2.0:
        assert volume == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.5, 0.97])
def test_fields_of_zero_and_one_are_closed_too(share):
    """A field in balance on every voxel face: without the tie break, neighbouring cubes disagree and leave holes."""
    field = np.random.default_rng(7).random((20, 20, 20)) < share
    assert closed_volume(isosurface(field, 0.5)) > 0


def test_samples_exactly_on_the_level_do_not_tear_the_surface():
    field = np.random.default_rng(3).integers(-2, 3, (20, 20, 20)).astype(np.float32)  # a fifth of them is zero
    assert closed_volume(isosurface(field, 0.0)) > 0
    x, y, z = np.moveaxis(voxel_centers(16), -1, 0)
    octahedron = 0.34375 - np.abs(x) - np.abs(y) - np.abs(z)  # zero at many centres
    assert (octahedron == 0).sum() > 100
    assert closed_volume(isosurface(octahedron)) == pytest.approx(4 / 3 * 0.34375**3, rel=0.1)  # its edges are cut


def test_sphere_and_torus_are_accurate_to_a_twentieth_of_a_voxel():
    resolution = 64
    centers = voxel_centers(resolution)
    shift = np.array([0.03, -0.021, 0.007], dtype=np.float32)  # so that no symmetry helps

    def sphere(points):
        return 0.4 - np.linalg.norm(points - shift, axis=-1)

    def torus(points):
        x, y, z = np.moveaxis(points - shift, -1, 0)
        return 0.12 - np.hypot(np.hypot(x, y) - 0.3, z)

    for distance, volume in ((sphere, 4 / 3 * np.pi * 0.4**3), (torus, 2 * np.pi**2 * 0.3 * 0.12**2)):
        mesh = isosurface(distance(centers), gradient_normals=True)
        assert np.abs(distance(mesh.vertices)).max() * resolution < 0.05
        assert closed_volume(mesh) == pytest.approx(volume, rel=5e-3)
        steps = 1e-3 * np.eye(3)
        gradient = np.stack([distance(mesh.vertices - step) - distance(mesh.vertices + step) for step in steps], axis=1)
        cosine = (mesh.normals * gradient).sum(axis=1) / np.linalg.norm(gradient, axis=1)
        assert cosine.min() > np.cos(np.radians(2))
        assert np.linalg.norm(mesh.normals, axis=1) == pytest.approx(1, abs=1e-5)


def test_box_faces_are_exact_and_only_edges_are_cut():
    resolution, half = 32, np.array([0.31, 0.22, 0.4])
    outside = np.abs(voxel_centers(resolution)) - half
    distance = np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(axis=-1), 0)
    vertices = isosurface(-distance).vertices
    excess = (np.abs(vertices) - half) * resolution
    assert np.abs(excess.max(axis=1)).max() < 0.5
    flat = (excess < -2).sum(axis=1) == 2  # two voxels away from every edge
    assert flat.sum() > 500
    assert np.abs(excess[flat].max(axis=1)).max() < 0.01


def test_axes_and_level():
    field = np.zeros((16, 16, 16), dtype=np.float32)
    field[9:13, 3:5, 7] = 10
    mesh = isosurface(field, 5.0)
    np.testing.assert_allclose(mesh.bounds, np.array([[9, 3, 7], [13, 5, 8]]) / 16 - 0.5, atol=1e-4)
    wider = isosurface(field, 1.0)
    assert (wider.bounds[0] < mesh.bounds[0]).all() and (wider.bounds[1] > mesh.bounds[1]).all()


def test_a_solid_that_fills_the_cube_is_closed_on_its_faces():
    mesh = isosurface(np.ones((8, 8, 8)), 0.0)
    np.testing.assert_allclose(mesh.bounds, [[-0.5] * 3, [0.5] * 3], atol=1e-3)
    assert closed_volume(mesh) == pytest.approx(1, abs=0.03)  # its edges are cut


def test_tensors_of_any_real_type_are_accepted():
    distance = 0.3 - np.linalg.norm(voxel_centers(16), axis=-1)
    expected = isosurface(distance)
    found = isosurface(torch.from_numpy(distance).requires_grad_())
    np.testing.assert_array_equal(found.vertices, expected.vertices)
    rounded = isosurface(torch.from_numpy(distance).bfloat16())
    assert np.abs(np.linalg.norm(rounded.vertices, axis=1) - 0.3).max() < 0.01
    assert found.vertices.dtype == np.float32 and found.faces.dtype == np.int64


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (np.full((8, 8, 8), -2.5), r"nothing is inside .* -2\.5, .* level 0;"),
        (np.zeros((8, 8, 8)), "nothing is inside"),
        (np.zeros((8, 8)), r"\(8, 8\)"),
        (np.zeros((8, 8, 9)), r"\(8, 8, 9\)"),
        (np.where(np.eye(8)[None].repeat(8, 0) > 0, np.nan, 1.0), "64 values that are not finite"),
    ],
)
def test_fields_without_a_surface_are_refused_in_one_sentence(field, message):
    with pytest.raises(TriptychError, match=message):
        isosurface(field)
