"""Augmentation equals preparing the turned or mirrored object, and relighting stays in range and repeats."""

import numpy as np
import pytest
import torch
import trimesh

from trainer.data import (
    draw_recolouring,
    mirrored,
    quarter_turn,
    relight,
    rescaled,
    soft_occupancy,
    symmetric_sample,
    view_order,
)
from trainer.prepare.build import SDF_BAND, BuildOptions, _sample, turned
from trainer.tasks.slat_flow import recoloured
from trainer.tasks.structure_flow import camera_normals, normal_error
from triptych.geometry.mesh import Mesh
from triptych.procedural import sample_object

OPTIONS = BuildOptions(resolution=32, view_size=48, yaws=1)


def mirror_image(mesh):
    return mesh.replace(vertices=mesh.vertices * np.array([-1, 1, 1], np.float32), faces=mesh.faces[:, ::-1])


@pytest.fixture(scope="module")
def sample():
    return _sample(sample_object(), OPTIONS)


def compare(made, expected):
    """Equal but for pixels and voxels on an edge, where a sample may fall to either side."""
    assert {name: (a.shape, a.dtype) for name, a in made.items()} == {
        name: (a.shape, a.dtype) for name, a in expected.items()
    }
    alpha_a, alpha_b = made["albedo"][..., 3].astype(int), expected["albedo"][..., 3].astype(int)
    assert (np.abs(alpha_a - alpha_b) > 64).mean() < 0.005
    solid = (alpha_a == 255) & (alpha_b == 255)
    assert 0.1 < solid.mean() < 0.9
    for name, limit in (("albedo", 8), ("normal", 8)):
        gap = np.abs(made[name][..., :3].astype(int) - expected[name][..., :3].astype(int)).max(axis=-1)
        assert (gap[solid] > limit).mean() < 0.03, name
    gap = np.abs(made["sdf"].astype(int) - expected["sdf"].astype(int)) * (SDF_BAND / 127)
    assert (gap > 0.3).mean() < 0.01
    assert ((made["sdf"] < 0) != (expected["sdf"] < 0)).mean() < 0.004


def differ(a, b):
    return (np.abs(a["albedo"].astype(int) - b["albedo"]).max(axis=-1) > 64).mean() > 0.03


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_equals_preparing_the_turned_object(sample, turns):
    made = quarter_turn(sample, turns)
    compare(made, _sample(turned(sample_object(), 90.0 * turns), OPTIONS))
    assert differ(made, sample) and differ(made, quarter_turn(sample, turns + 1))


def test_mirroring_equals_preparing_the_mirrored_object(sample):
    compare(mirrored(sample), _sample(mirror_image(sample_object()), OPTIONS))
    assert differ(mirrored(sample), sample)


def test_turns_and_mirrors_compose(sample):
    def same(a, b):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])

    same(quarter_turn(sample, 4), sample)
    same(quarter_turn(sample, -1), quarter_turn(sample, 3))
    same(quarter_turn(quarter_turn(sample, 1), 3), sample)
    same(mirrored(mirrored(sample)), sample)
    same(mirrored(quarter_turn(sample, 1)), quarter_turn(mirrored(sample), 3))


def test_a_turn_moves_the_front_to_the_subjects_left(sample):
    # The left view, from +X, is second in the rig.
    np.testing.assert_array_equal(quarter_turn(sample, 1)["albedo"][1], sample["albedo"][0])
    x = np.zeros((4, 4, 4), np.int8)
    x[2, 1, 3] = 1  # in front: large z
    [(i, j, k)] = np.argwhere(quarter_turn({**sample, "sdf": x}, 1)["sdf"])
    assert (i, j, k) == (3, 1, 1)  # at the left, large x, and what was right of the middle is behind


def test_relighting_is_in_range_and_repeats(sample):
    before = {name: array.copy() for name, array in sample.items()}
    pictures = []
    for seed in range(40):
        lit = relight(sample["albedo"], sample["normal"], np.random.default_rng(seed))
        assert lit.shape == (4, 4, 48, 48) and lit.dtype == torch.float32
        assert torch.isfinite(lit).all() and lit.min() >= 0 and lit.max() <= 1
        np.testing.assert_array_equal(lit[:, 3].numpy(), (sample["albedo"][..., 3] / np.float32(255)))
        pictures.append(lit)
    again = relight(sample["albedo"], sample["normal"], np.random.default_rng(7))
    assert torch.equal(again, pictures[7])
    assert not torch.equal(pictures[6], pictures[7])
    for name, array in sample.items():
        np.testing.assert_array_equal(array, before[name])
    means = torch.stack([p[:, :3][p[:, 3:].expand(-1, 3, -1, -1) == 1].mean() for p in pictures])
    assert means.std() > 0.08 and means.min() > 0.1 and means.max() < 0.98, "dark and bright, none black or blank"


def test_an_object_and_its_pictures_are_recoloured_alike(sample):
    """Without light, what a voxel's recoloured colour says is what the recoloured picture shows."""
    albedo = torch.from_numpy(sample["albedo"][..., :3]).float() / 255
    changes = []
    for seed in range(60):
        change = draw_recolouring(np.random.default_rng(seed))
        pictures = change(albedo.permute(0, 3, 1, 2))
        torch.testing.assert_close(pictures.permute(0, 2, 3, 1), change(albedo, dim=-1))
        grey = change(torch.full((1, 3), 0.5))
        changes.append(grey[0])
        assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.stack(changes).std(dim=0).min() > 0.05  # tints differ
    attributes = torch.randint(0, 256, (50, 10), dtype=torch.uint8)
    made = recoloured(attributes, change)
    assert torch.equal(made[:, 3:], attributes[:, 3:])
    assert (made[:, :3].float() / 255 - change(attributes[:, :3].float() / 255)).abs().max() < 0.003


def test_relighting_shades_by_the_normal(sample):
    """A grey ball under any light is brighter where its normal faces it: the pictures carry shape."""
    albedo = np.full_like(sample["albedo"], 128)
    albedo[..., 3] = 255
    spread = [
        float(relight(albedo, sample["normal"], np.random.default_rng(seed))[:, :3].mean(dim=1).std())
        for seed in range(30)
    ]
    assert np.mean(np.array(spread) > 0.02) > 0.7


def test_camera_normals_are_the_same_for_every_camera():
    """A ball looks alike from everywhere: its directions in the cameras' frames do too, and they face the camera."""
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=0.5)
    ball = Mesh(vertices=np.float32(sphere.vertices), faces=np.int32(sphere.faces))
    made = _sample(ball, OPTIONS)
    seen = camera_normals(made["normal"], made["albedo"][..., 3], [0, 1, 2, 3]).float()
    assert seen.shape == (4, 4, 12, 12)
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], atol=0.03, rtol=0)
    covered = seen[0, 3] > 0.99
    assert seen[0, 2][covered].min() > 0.3 and covered.sum() > 40
    right, up = seen[0, 0], seen[0, 1]
    assert right[6, 9] > 0.3 and right[6, 2] < -0.3 and up[2, 6] > 0.3 and up[9, 6] < -0.3
    assert normal_error(seen[:, :3], seen) == 0
    assert normal_error(-seen[:, :3], seen) > 0.5


def test_soft_occupancy_is_a_sigmoid_of_the_distance():
    sdf = torch.arange(-127, 128, dtype=torch.int8)
    soft = soft_occupancy(sdf, SDF_BAND)
    distance = sdf.float() * SDF_BAND / 127
    assert soft[0] == 1 and soft[-1] == 0 and soft[127] == 0.5
    torch.testing.assert_close(torch.logit(soft[1:-1].double()).float(), -distance[1:-1] / 0.4, atol=1e-3, rtol=1e-3)
    assert (soft[1:] < soft[:-1]).all()


@pytest.mark.parametrize("number", range(8))
def test_the_order_of_views_is_that_of_the_symmetry(sample, number):
    """A mirror image flips every picture too, so the views are told apart by their number alone."""
    numbered = sample | {"albedo": np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None, None, None], (4, 2, 2, 4))}
    assert symmetric_sample(numbered, number)["albedo"][:, 0, 0, 0].tolist() == view_order(number).tolist()


def test_a_rescaled_field_is_that_of_the_rescaled_object():
    centres = np.stack(np.meshgrid(*[(np.arange(64) + 0.5) / 64 - 0.5] * 3, indexing="ij"), -1)

    def ball(radius, middle):
        distance = (np.linalg.norm(centres - middle, axis=-1) - radius) * 64 / SDF_BAND
        return (distance.clip(-1, 1) * 127).astype(np.int8)

    one = ball(0.2, (0.05, 0.1, -0.15))
    assert rescaled(one, 1.001) is one
    for scale in (0.6, 1.5):
        made, true = rescaled(one, scale), ball(0.2 * scale, scale * np.array([0.05, 0.1, -0.15]))
        near = np.abs(true.astype(int)) < 100
        assert np.abs(made.astype(int) - true)[near].mean() * SDF_BAND / 127 < 0.15, "voxels"
        assert ((made < 0) != (true < 0)).mean() < 0.002
    cut = rescaled(one, 3.0) < 0
    assert cut[1:-1, 1:-1, 1:-1].any() and cut.sum() == cut[1:-1, 1:-1, 1:-1].sum(), "closed inside of the cube"
