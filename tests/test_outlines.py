"""Given outlines hold: nothing outside of them, something behind every point of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera, rig_cameras
from triptych.geometry.voxels import hull_field, silhouette_fields
from triptych.pipelines.outlines import Outlines, covered, outlines_of

R = 32
CENTERS = np.stack(np.meshgrid(*[np.arange(R) - (R - 1) / 2] * 3, indexing="ij"), axis=-1)  # voxels


def ball(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    return (radius - np.linalg.norm(CENTERS - centre, axis=-1)).astype(np.float32)


def rod(start: tuple[float, float, float], end: tuple[float, float, float], radius: float) -> np.ndarray:
    a, b = np.array(start), np.array(end)
    along = np.clip(((CENTERS - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)[..., None]
    return (radius - np.linalg.norm(CENTERS - a - along * (b - a), axis=-1)).astype(np.float32)


def shadows(field: np.ndarray, azimuths: tuple[float, ...], size: int = 256) -> torch.Tensor:
    """What orthographic views in the rig's frame show of a field: (V, S, S)."""
    masks = []
    for azimuth in azimuths:
        seen = field.max(axis=2 if azimuth % 180 == 0 else 0)  # [x, y], or [y, z]
        flat = seen.T if azimuth % 180 == 0 else seen
        flat = {0.0: flat, 90.0: flat[:, ::-1], 180.0: flat[:, ::-1], 270.0: flat}[azimuth][::-1]
        whole = round(size * 0.85)
        image = torch.nn.functional.interpolate(
            torch.from_numpy(flat.copy())[None, None], size=(whole, whole), mode="bilinear", align_corners=False
        )
        edge = (size - whole) // 2
        masks.append(torch.nn.functional.pad(image[0, 0] > 0, (edge, size - whole - edge) * 2).float())
    return torch.stack(masks)


def looked_at(field: np.ndarray, azimuths: tuple[float, ...] = VIEW_AZIMUTHS_DEG) -> Outlines:
    return outlines_of(shadows(field, azimuths), rig_cameras(azimuths), R)


def uncovered(field: np.ndarray, outlines: Outlines) -> int:
    """Rays clearly inside of an outline that meet nothing."""
    rays = 0
    for distance, axis in zip(outlines.distances, outlines.axes, strict=True):
        rays += int(
            ((distance.max(axis=axis) > 0.75) & (np.minimum(field, outlines.allowed).max(axis=axis) <= 0)).sum()
        )
    return rays


BODY, ARM = ball(7.0, (-4.0, 0.0, 1.0)), rod((0.0, 2.0, 2.0), (12.0, 8.0, -4.0), 1.9)


def test_distances_of_each_view_are_those_of_the_hull():
    masks, cameras = shadows(BODY, VIEW_AZIMUTHS_DEG), rig_cameras()
    fields = silhouette_fields(masks, cameras, R)
    assert fields.shape == (4, R, R, R)
    np.testing.assert_array_equal(fields.min(axis=0), hull_field(masks, cameras, R))


@pytest.mark.parametrize("azimuths", [VIEW_AZIMUTHS_DEG, (0.0, 90.0), (180.0, 270.0)])
def test_a_lost_limb_comes_back_where_two_directions_fix_it(azimuths):
    """The field knows the limb a little: it is highest there, but below the surface."""
    truth = np.maximum(BODY, ARM)
    outlines = looked_at(truth, azimuths)
    field = np.maximum(BODY, np.minimum(ARM, 0.4) - 0.8).clip(-2, 2)
    lost = (truth > 0.3) & (field <= 0)
    assert uncovered(field, outlines) > 10 and lost.sum() > 30
    made = np.minimum(covered(field, outlines), outlines.allowed)
    assert uncovered(made, outlines) < uncovered(field, outlines) / 4, "slivers may stay"
    assert (made > -0.5)[lost].mean() > 0.9
    assert np.quantile(truth[(made > 0) & (field <= 0)], 0.1) > -1.5, (
        "and hardly anything farther than a voxel beside it"
    )


def test_what_is_missing_along_a_rim_alone_is_left():
    """A field a voxel smaller than its outlines has lost no part."""
    outlines = looked_at(ball(8.0))
    smaller = ball(7.0).clip(-2, 2)
    np.testing.assert_array_equal(covered(smaller, outlines), smaller)


def test_a_lone_outline_is_filled_at_the_depth_of_what_is_beside_it():
    """The field is flat along the limb, which lies in the plane of the body's middle."""
    arm = rod((0.0, 0.0, 1.0), (14.0, 0.0, 1.0), 2.0)
    truth = np.maximum(BODY, arm)
    outlines = looked_at(truth, (0.0,))
    field = BODY.clip(-2, 2)
    made = np.minimum(covered(field, outlines), outlines.allowed)
    assert uncovered(field, outlines) > 5 and uncovered(made, outlines) == 0
    assert truth[(made > 0) & (field <= 0)].min() > -1.5
    thickness = (made > 0)[R // 2 + 8].sum(axis=1).max()
    assert 1 <= thickness <= 3, "two voxels, or as deep as it is wide"


def test_a_field_that_keeps_its_outlines_stays_as_it_is():
    truth = np.maximum(BODY, rod((0.0, 2.0, 2.0), (12.0, 8.0, -4.0), 2.5)).clip(-2, 2)
    made = covered(truth, looked_at(truth))
    assert ((made > 0) == (truth > 0)).all() and (made != truth).mean() < 1e-3


def test_what_an_outline_shows_beyond_the_others_is_not_filled():
    """Two views of which one shows an arm that the other has no room for."""
    masks = torch.cat([shadows(np.maximum(BODY, rod((0, 0, 0), (12, 10, 0), 1.5)), (0.0,)), shadows(BODY, (90.0,))])
    outlines = outlines_of(masks, rig_cameras((0.0, 90.0)), R)
    field = BODY.clip(-2, 2)
    made = np.minimum(covered(field, outlines), outlines.allowed)
    assert ((made > 0) <= (outlines.allowed > 0)).all() and not (made[:, R // 2 + 9 :] > 0).any()


def test_views_along_no_axis_and_fields_that_know_nothing_ask_for_nothing():
    masks = shadows(np.maximum(BODY, ARM), (0.0,))
    for camera in (Camera(azimuth_deg=30), Camera(elevation_deg=10), Camera(half_extent=None, fov_deg=40)):
        outlines = outlines_of(masks, [camera], R)
        assert outlines.axes == (None,)
        np.testing.assert_array_equal(covered(BODY, outlines), BODY)
    empty = np.full((R, R, R), -2.0, dtype=np.float32)
    np.testing.assert_array_equal(covered(empty, outlines_of(masks, rig_cameras((0.0,)), R)), empty)


def test_outlines_without_a_common_point_are_refused():
    low, high = shadows(ball(3, (0, -9, 0)), (0.0,)), shadows(ball(3, (0, 9, 0)), (90.0,))
    with pytest.raises(TriptychError, match="the outlines contradict each other, no point lies inside all of them"):
        outlines_of(torch.cat([low, high]), rig_cameras((0.0, 90.0)), R)
