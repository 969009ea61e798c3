"""The sample object: closed, in model space, and unlike itself from every side."""

import numpy as np
import trimesh

from triptych.geometry.cameras import VIEW_NAMES
from triptych.procedural import sample_object, sample_views


def test_it_is_in_model_space_with_a_colour_per_vertex():
    mesh = sample_object()
    low, high = mesh.bounds
    np.testing.assert_allclose((high - low).max(), 1, atol=1e-6)
    np.testing.assert_allclose(low, -high, atol=1e-6)
    assert mesh.vertices.dtype == np.float32 and mesh.faces.dtype == np.int64
    assert 3000 < len(mesh.faces) < 10_000
    assert mesh.colors.shape == (len(mesh.vertices), 4)
    assert mesh.colors.min() >= 0 and mesh.colors.max() <= 1


def test_every_part_is_closed_and_faces_outwards():
    mesh = sample_object()
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces)
    solid.merge_vertices(merge_norm=True)
    assert solid.is_watertight and solid.is_winding_consistent
    parts = solid.split()
    assert len(parts) == 20
    assert min(part.volume for part in parts) > 0


def test_two_calls_give_the_same_arrays():
    first, second = sample_object(), sample_object()
    np.testing.assert_array_equal(first.vertices, second.vertices)
    np.testing.assert_array_equal(first.colors, second.colors)


def test_left_is_the_subjects_left():
    """The hand's ball, the only large yellow thing, is at +X and a purple fin at -X; the visor is at +Z."""
    mesh = sample_object()

    def centre_of(red, green, blue):
        return mesh.vertices[np.abs(mesh.colors[:, :3] - (red, green, blue)).max(axis=1) < 0.01].mean(axis=0)

    assert centre_of(0.98, 0.81, 0.18)[0] > 0.15
    assert centre_of(0.48, 0.23, 0.60)[0] < -0.25
    assert centre_of(0.11, 0.12, 0.15)[2] > 0.15
    assert centre_of(0.13, 0.36, 0.72)[2] < -0.15


def test_sample_views_are_four_different_pictures_on_white():
    views = sample_views(96)
    assert tuple(views) == VIEW_NAMES
    pictures = {name: np.asarray(view) for name, view in views.items()}
    for picture in pictures.values():
        assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
        assert (picture[:6] == 255).all() and (picture[:, 0] == 255).all()
        assert (picture < 250).any(axis=2).mean() > 0.15
    # The yellow ball is at the right of the front view and at the left of the back view; the fin the other way round.
    for name, ball_is_right in (("front", True), ("back", False)):
        red, green, blue = pictures[name].astype(int).transpose(2, 0, 1)
        yellow = np.argwhere((red > 110) & (green > 90) & (blue < green // 2))[:, 1].mean()
        purple = np.argwhere((blue > red + 15) & (red > green + 15))[:, 1].mean()
        assert (yellow > purple) == ball_is_right, name


def test_no_view_is_the_mirror_image_of_another():
    pictures = [np.asarray(view, dtype=float) / 255 for view in sample_views(64).values()]
    for i, first in enumerate(pictures):
        for second in pictures[i:]:
            assert np.abs(first - second[:, ::-1]).mean() > 0.02
