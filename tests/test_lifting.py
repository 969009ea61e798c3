"""Lifting: tokens look at the pixels they project to, whatever the order and number of views."""

import pytest
import torch

from triptych.geometry.cameras import Camera, rig_cameras
from triptych.models.lifting import LiftedStructureFlow, PosedViews, block_points

RIG = rig_cameras()
CONFIG = {
    "resolution": 8, "in_channels": 4, "out_channels": 4, "model_channels": 48, "cond_channels": 48, "num_blocks": 2,
    "num_heads": 4, "patch_size": 2, "share_mod": True, "image_size": 64, "encoder_channels": (16, 24),
    "encoder_blocks": (1, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def flow() -> LiftedStructureFlow:
    torch.manual_seed(0)
    model = LiftedStructureFlow(**CONFIG)
    for parameter in model.parameters():  # also those that start at zero, or nothing would reach the output
        torch.nn.init.normal_(parameter, std=0.1)
    model.set_latent_statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.full((4,), 2.0), torch.ones(4))
    return model.eval().requires_grad_(False)


def pictures(count: int, seed: int = 0, half: int = 24) -> torch.Tensor:
    rgba = torch.rand(count, 4, 64, 64, generator=torch.Generator().manual_seed(seed))
    rgba[:, 3] = 0
    rgba[:, 3, 32 - half : 32 + half, 32 - half : 32 + half] = 1
    return rgba


def velocity(flow: LiftedStructureFlow, views: PosedViews, noise: torch.Tensor, time: float = 1.0) -> torch.Tensor:
    return flow(noise, torch.full((len(noise),), 1000 * time), flow.condition(views))


def test_order_of_views_does_not_matter(flow):
    images, noise = pictures(4), torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    order = [2, 0, 3, 1]
    straight = velocity(flow, PosedViews(images, tuple(RIG), (4,)), noise)
    shuffled = velocity(flow, PosedViews(images[order], tuple(RIG[i] for i in order), (4,)), noise)
    torch.testing.assert_close(shuffled, straight, atol=2e-5, rtol=0)


def test_a_batch_equals_its_samples_alone(flow):
    first, second = pictures(3, seed=1), pictures(1, seed=2, half=12)
    noise = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    cameras = (RIG[0], RIG[1], RIG[3], RIG[2])
    both = velocity(flow, PosedViews(torch.cat([first, second]), cameras, (3, 1)), noise, 0.7)
    alone = [
        velocity(flow, PosedViews(first, cameras[:3], (3,)), noise[:1], 0.7),
        velocity(flow, PosedViews(second, cameras[3:], (1,)), noise[1:], 0.7),
    ]
    torch.testing.assert_close(both, torch.cat(alone), atol=2e-5, rtol=0)


def test_a_drawn_view_is_marked_and_binds_no_outline(flow):
    """In a flow that knows drawn views; one that does not takes them like others."""
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.cat([pictures(1, half=20), pictures(1, seed=1, half=6)])
    given, marked = (PosedViews(images, (RIG[0], RIG[1]), (2,), drawn) for drawn in ((), (False, True)))
    assert torch.equal(velocity(flow, marked, noise), velocity(flow, given, noise))
    knows = LiftedStructureFlow(**CONFIG, drawn_views=True).eval().requires_grad_(False)
    missing = knows.load_state_dict(flow.state_dict(), strict=False)
    assert set(missing.missing_keys) == {"drawn_pairs", "drawn_tokens"} and not missing.unexpected_keys
    assert torch.equal(velocity(knows, given, noise), velocity(flow, given, noise))
    front = flow.condition(PosedViews(images[:1], (RIG[0],), (1,)))
    cond = knows.condition(marked)
    assert torch.equal(cond.active, front.active) and torch.equal(cond.hull_TD, front.hull_TD)
    assert cond.active.sum() > flow.condition(given).active.sum()
    unmarked = velocity(knows, marked, noise)
    knows.drawn_pairs.fill_(0.5)
    by_pairs = velocity(knows, marked, noise)
    knows.drawn_tokens.fill_(0.5)
    assert not torch.equal(by_pairs, unmarked) and not torch.equal(velocity(knows, marked, noise), by_pairs)


def test_where_all_views_are_drawn_their_outlines_bind():
    knows = LiftedStructureFlow(**CONFIG, drawn_views=True).eval().requires_grad_(False)
    images = torch.cat([pictures(1, half=20), pictures(1, seed=1, half=6)])
    cameras = (RIG[0], RIG[1], RIG[0], RIG[1])
    both = knows.condition(PosedViews(torch.cat([images, images]), cameras, (2, 2), (True, True, False, True)))
    alone = knows.condition(PosedViews(images, cameras[:2], (2,)))
    assert torch.equal(both.active[0], alone.active[0]) and both.active[1].sum() > both.active[0].sum()


def test_marks_are_one_for_each_view():
    with pytest.raises(ValueError, match="drawn says of 1 views what made them, there are 2"):
        PosedViews(pictures(2), (RIG[0], RIG[1]), (2,), (True,))


def test_every_view_tells(flow):
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    images = pictures(4)
    whole = velocity(flow, PosedViews(images, tuple(RIG), (4,)), noise)
    for missing in range(4):
        kept = [i for i in range(4) if i != missing]
        less = velocity(flow, PosedViews(images[kept], tuple(RIG[i] for i in kept), (3,)), noise)
        assert (less - whole).abs().max() > 1e-3


def test_blocks_outside_a_silhouette_are_empty(flow):
    """A mask on the right half of the front view: +X. What lies at -X takes the empty latent exactly."""
    images = pictures(1)
    images[:, 3, :, :32] = 0
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    cond = flow.condition(PosedViews(images, (RIG[0],), (1,)))
    active = cond.active.view(4, 4, 4)
    assert active[2:].any() and not active[0].any()
    clean = noise - flow(noise, torch.tensor([1000.0]), cond)
    empty = flow.normalize(torch.ones(1, 4, 8, 8, 8))
    torch.testing.assert_close(clean[:, :, :2], empty[:, :, :2], atol=1e-5, rtol=0)


def test_left_is_left():
    """The camera at azimuth 90 stands on +X: its picture's right is -Z, so a mask there keeps blocks with z < 0."""
    flow = LiftedStructureFlow(
        resolution=8, in_channels=4, out_channels=4, model_channels=48, cond_channels=48, num_blocks=1, num_heads=4,
        patch_size=2, image_size=64, encoder_channels=(16, 24), encoder_blocks=(1, 1),
    )  # fmt: skip
    images = pictures(1)
    images[:, 3, :, :32] = 0
    active = flow.condition(PosedViews(images, (RIG[1],), (1,))).active.view(4, 4, 4)
    assert active[:, :, 0].any() and not active[:, :, 3].any()


@pytest.mark.parametrize("camera", [RIG[0], RIG[1], Camera(30, 20), Camera(200, -10, half_extent=None, fov_deg=40)])
def test_tokens_see_the_pixels_they_project_to(flow, camera):
    """A change in one corner of the picture moves the lifted features of the blocks that project there, not others."""
    images = pictures(1, half=32)
    changed = images.clone()
    changed[:, :3, 50:, 50:] = 1 - changed[:, :3, 50:, 50:]
    plain = flow.condition(PosedViews(images, (camera,), (1,)))
    other = flow.condition(PosedViews(changed, (camera,), (1,)))
    assert plain.active.all() == other.active.all()
    moved = (plain.lifted_TC - other.lifted_TC).abs().amax(dim=1)
    ndc, _ = camera.project(block_points(4, 2))
    near = ((ndc[..., 0] > 0.3) & (ndc[..., 1] < -0.3)).any(dim=1)[plain.active[0]]
    far = ((ndc[..., 0] < -0.1) | (ndc[..., 1] > 0.1)).all(dim=1)[plain.active[0]]
    touched = moved / moved.max()
    assert near.any() and touched[near].max() == 1
    # Group norms see the whole picture, so a far token is not untouched, only much less so.
    assert touched[far].mean() < 0.25 * touched[near].mean()


def test_null_condition_knows_the_silhouettes_and_no_picture(flow):
    noise = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(4))
    time = torch.tensor([1000.0])
    nulls = [flow.condition(PosedViews(pictures(4, seed), tuple(RIG), (4,))).null() for seed in (1, 2)]
    assert torch.equal(flow(noise, time, nulls[0]), flow(noise, time, nulls[1]))


def test_contradictory_silhouettes_leave_every_block(flow):
    images = pictures(2)
    images[0, 3, 32:] = 0
    images[1, 3, :32] = 0
    assert flow.condition(PosedViews(images, (RIG[0], RIG[2]), (2,))).active.float().mean() in (0.5, 1.0)
    images[0, 3, 20:] = 0
    images[1, 3, :44] = 0
    assert flow.condition(PosedViews(images, (RIG[0], RIG[2]), (2,))).active.all()


def test_wrong_sizes_are_named(flow):
    with pytest.raises(ValueError, match="32, 32"):
        flow.condition(PosedViews(torch.rand(1, 4, 32, 32), (RIG[0],), (1,)))
    with pytest.raises(ValueError, match=r"2 images, 1 cameras"):
        PosedViews(torch.rand(2, 4, 64, 64), (RIG[0],), (1,))


def test_low_precision_does_not_move_the_pixels():
    """Under autocast the places that tokens look at, and the hull they find there, stay exact."""
    from dataclasses import replace

    config = {
        "resolution": 8, "in_channels": 4, "out_channels": 4, "model_channels": 48, "cond_channels": 48, "num_heads": 4,
        "num_blocks": 1, "patch_size": 2, "image_size": 64, "encoder_channels": (16, 24), "encoder_blocks": (1, 1),
    }  # fmt: skip
    camera = replace(RIG[0], azimuth_deg=33.0)
    views = PosedViews(pictures(1, half=20), (camera,), (1,))
    exact = LiftedStructureFlow(**config).condition(views)
    with torch.autocast("cpu", torch.bfloat16):
        rough = LiftedStructureFlow(**config).condition(views)
    assert torch.equal(exact.active, rough.active)
    assert torch.equal(exact.hull_TD, rough.hull_TD)


def test_the_hull_is_added_to_a_field():
    """A fresh flow with hull_skip predicts half the hull, and emptiness where the silhouettes rule the block out."""
    torch.manual_seed(0)
    flow = LiftedStructureFlow(
        resolution=32, in_channels=1, out_channels=1, model_channels=48, cond_channels=48, num_blocks=1, num_heads=4,
        patch_size=8, image_size=64, encoder_channels=(16, 24), encoder_blocks=(1, 1), hull_skip=True,
    )  # fmt: skip
    flow.set_latent_statistics(torch.zeros(1), torch.ones(1), -torch.ones(1))
    images = pictures(4, half=8)  # a cube 16 of 64 pixels wide
    cond = flow.condition(PosedViews(images, tuple(RIG), (4,)))
    noise = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    field = (noise - flow(noise, torch.tensor([1000.0]), cond)).detach()[0, 0]
    assert field[16, 16, 16] == pytest.approx(0.5, abs=1e-5) and field[0, 0, 0] == -1
    side = (field[:, 16, 16] > 0).sum().item() / 32
    assert side == pytest.approx(16 / 64 / 0.85, abs=2 / 32)
