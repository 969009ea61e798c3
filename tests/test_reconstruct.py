"""The pipeline's own arithmetic: poses of an ensemble, fields and surfaces."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.voxels import visual_hull, voxel_centers
from triptych.images.views import ViewSet
from triptych.memory import give_back
from triptych.models.lifting import PosedViews
from triptych.pipelines.reconstruct import (
    POSES,
    Settings,
    _posed,
    _restore,
    structure_from_views,
    surface_from_field,
)
from triptych.procedural import sample_object
from triptych.render.views import render_views


@pytest.mark.parametrize("pose", POSES)
def test_poses_are_undone_exactly(pose):
    """The hull of the posed views, put back, is the hull of the views: turns, mirror and cameras agree."""
    cameras = rig_cameras((0.0, 90.0, 270.0))
    drawn = render_views(sample_object(), cameras, 96)
    views = ViewSet.from_rig_renders(torch.cat([drawn.albedo, drawn.alpha], dim=1), [c.azimuth_deg for c in cameras])
    straight = visual_hull(views.masks, views.cameras, 32)
    posed = _posed([PosedViews(views.images, tuple(views.cameras), (3,))], [pose])
    there = visual_hull(posed.images[:, 3], list(posed.cameras), 32)
    np.testing.assert_allclose(_restore(there.numpy(), *pose), straight.numpy(), atol=2e-3)
    if pose != (0, False):
        assert (there - straight).abs().max() > 0.5, "the object must be asymmetric for this to mean anything"


def test_what_a_model_drew_cuts_nothing_away():
    """A side view that is far too narrow: as a picture it is obeyed, as a drawing it is one opinion."""
    cameras = rig_cameras((0.0, 90.0))
    drawn = render_views(sample_object(), cameras, 96)
    images = torch.cat([drawn.albedo, drawn.alpha], dim=1)
    images[1, :, :, :40] = images[1, :, :, 56:] = 0
    views = ViewSet.from_rig_renders(images, (0.0, 90.0))
    assert views.seen is views
    marked = replace(views, generated=(90.0,))
    assert marked.seen.names == ("front",) and marked.subset(["left"]).seen.names == ("left",)
    bundle, settings = load_bundle(), Settings(steps=2, ensemble=2)
    obeyed, kept, alone = (
        structure_from_views(one, bundle, settings) > 0 for one in (views, marked, views.subset(["front"]))
    )
    outside = np.abs(np.asarray(voxel_centers(len(obeyed)))[..., 2]) > 0.12  # where the narrow side leaves nothing
    assert not obeyed[outside].any()
    assert 0 < kept[outside].sum() <= 1.1 * alone[outside].sum()
    assert kept.sum() > 1.2 * obeyed.sum()


def test_surface_of_a_ball_is_round_and_whole():
    centres = voxel_centers(64)
    field = (0.3 - np.linalg.norm(np.asarray(centres), axis=-1)) * 64
    crumb = np.full_like(field, -5.0)
    crumb[2:4, 2:4, 2:4] = 1.0
    mesh = surface_from_field(np.maximum(field, crumb).astype(np.float32), target_faces=2000)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radius - 0.3).max() < 0.3 / 64 and len(mesh.faces) <= 2000


def test_giving_memory_back_works_on_every_system(monkeypatch):
    give_back()
    monkeypatch.setattr("ctypes.CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    give_back()


def test_nothing_solid_is_a_sentence():
    with pytest.raises(TriptychError, match="nothing solid"):
        surface_from_field(np.full((64, 64, 64), -1.0, dtype=np.float32))
