"""The pipeline's own arithmetic: poses of an ensemble, fields and surfaces."""

import numpy as np
import pytest
import torch

from triptych.errors import TriptychError
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.voxels import visual_hull, voxel_centers
from triptych.images.views import ViewSet
from triptych.pipelines.reconstruct import POSES, _posed, _restore, surface_from_field
from triptych.procedural import sample_object
from triptych.render.views import render_views


@pytest.mark.parametrize("pose", POSES)
def test_poses_are_undone_exactly(pose):
    """The hull of the posed views, put back, is the hull of the views: turns, mirror and cameras agree."""
    cameras = rig_cameras((0.0, 90.0, 270.0))
    drawn = render_views(sample_object(), cameras, 96)
    views = ViewSet.from_rig_renders(torch.cat([drawn.albedo, drawn.alpha], dim=1), [c.azimuth_deg for c in cameras])
    straight = visual_hull(views.masks, views.cameras, 32)
    posed = _posed(views.images, views.cameras, [pose])
    there = visual_hull(posed.images[:, 3], list(posed.cameras), 32)
    np.testing.assert_allclose(_restore(there.numpy(), *pose), straight.numpy(), atol=2e-3)
    if pose != (0, False):
        assert (there - straight).abs().max() > 0.5, "the object must be asymmetric for this to mean anything"


def test_surface_of_a_ball_is_round_and_whole():
    centres = voxel_centers(64)
    field = (0.3 - np.linalg.norm(np.asarray(centres), axis=-1)) * 64
    crumb = np.full_like(field, -5.0)
    crumb[2:4, 2:4, 2:4] = 1.0
    mesh = surface_from_field(np.maximum(field, crumb).astype(np.float32), target_faces=2000)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radius - 0.3).max() < 0.3 / 64 and len(mesh.faces) <= 2000


def test_nothing_solid_is_a_sentence():
    with pytest.raises(TriptychError, match="nothing solid"):
        surface_from_field(np.full((64, 64, 64), -1.0, dtype=np.float32))
