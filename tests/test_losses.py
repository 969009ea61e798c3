"""Losses of the second stage against known answers, and their gradients."""

import math
import sys

import pytest
import torch

from trainer.losses import (
    PUBLISHED_WEIGHTS,
    LossWeights,
    WeightConfig,
    consistency_loss,
    depth_loss,
    field_loss,
    kl_loss,
    mask_loss,
    perceptual_distance,
    picture_loss,
    render_surface,
    scheduled,
    ssim,
    vertex_means,
)
from trainer.structured import corner_places
from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera
from triptych.geometry.flexicubes_tables import CORNERS


def test_plain_picture_losses():
    a, b = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.25)
    assert mask_loss(a[:, :1], b[:, :1]).item() == 0.25
    assert picture_loss(a, b, 0.0, 0.0).item() == 0.25
    assert picture_loss(b, b, 0.2, 0.0).item() == pytest.approx(0, abs=1e-6)


def test_depth_loss_is_quadratic_below_its_beta_and_blind_elsewhere():
    true = torch.zeros(1, 1, 1, 4)
    predicted = torch.tensor([0.1, 1 / 1024, 5.0, 0.0]).view(1, 1, 1, 4)
    both = torch.tensor([True, True, False, True]).view(1, 1, 1, 4)
    expected = ((0.1 - 0.5 / 512) + 0.5 * (1 / 1024) ** 2 * 512) / 4
    assert depth_loss(predicted, true, both).item() == pytest.approx(expected, rel=1e-5)


def test_ssim_of_flat_pictures_is_the_formula_and_of_equal_ones_is_1():
    torch.manual_seed(0)
    noise = torch.rand(2, 3, 32, 32)
    assert ssim(noise, noise).item() == pytest.approx(1, abs=1e-5)
    # Away from the border, flat pictures have no variance: only the luminance term is left.
    a, b = torch.full((1, 1, 301, 301), 0.2), torch.full((1, 1, 301, 301), 0.6)
    c1 = 0.01**2
    luminance = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    assert ssim(a, b).item() == pytest.approx(luminance, abs=0.015)
    assert ssim(noise, 1 - noise).item() < 0.1


def test_ssim_gradient():
    torch.manual_seed(1)
    a, b = torch.rand(1, 1, 6, 6, dtype=torch.float64, requires_grad=True), torch.rand(1, 1, 6, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ssim(x, b, size=3), a)


def test_perceptual_loss_without_its_extra_is_a_sentence(monkeypatch):
    perceptual_distance.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(TriptychError, match="lpips.*set its weight to 0"):
        picture_loss(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), 0.0, 0.2)


def test_kl_of_known_gaussians():
    assert kl_loss(torch.zeros(5, 2), torch.zeros(5, 2)).item() == 0
    value = kl_loss(torch.full((3, 1), 2.0), torch.full((3, 1), math.log(4.0))).item()
    assert value == pytest.approx(0.5 * (4 + 4 - math.log(4) - 1), rel=1e-6)


def test_field_loss_weighs_near_and_far():
    predicted, target = torch.tensor([0.0, 0.0]), torch.tensor([0.1, 1.0])
    assert field_loss(predicted, target, 0.5, 0.25).item() == pytest.approx((0.1 + 0.25) / 1.25)


@pytest.mark.parametrize("levels", [1, 2])
def test_vertex_means_equal_a_scatter_over_coordinates(levels):
    torch.manual_seed(0)
    coords = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 1]])
    side = 2**levels
    child = torch.zeros(1, 3, dtype=torch.int64)
    for _ in range(levels):
        child = (2 * child[:, None] + torch.cartesian_prod(*[torch.arange(2)] * 3)).flatten(0, 1)
    corner = (coords[:, None] * side + child)[:, :, None] + CORNERS  # (n, K, 8, 3)
    local = torch.cartesian_prod(*[torch.arange(side + 1)] * 3)
    vertices, rows = torch.unique((coords[:, None] * side + local).flatten(0, 1), dim=0, return_inverse=True)
    values = torch.randn(3, 8**levels, 8, 2, requires_grad=True)
    means, counts = vertex_means(values, rows.view(3, -1), corner_places(levels), len(vertices))
    for number, vertex in enumerate(vertices):
        here = values[(corner == vertex).all(dim=-1)]
        torch.testing.assert_close(means[number], here.mean(dim=0), atol=1e-5, rtol=1e-5)
        assert counts[number] == len(here)
    index = (corner[:, :, :, None] == vertices).all(dim=-1).float().argmax(dim=-1)
    expected = (values - means[index]).square().mean()
    torch.testing.assert_close(consistency_loss(values, means, counts), expected, atol=1e-5, rtol=1e-4)
    wanted = torch.autograd.grad(expected, values, retain_graph=True)[0]
    found = torch.autograd.grad(consistency_loss(values, means, counts), values)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_schedules_are_piecewise_linear():
    points = [(10, 0.0), (20, 1.0), (40, 0.5)]
    assert [scheduled(points, s) for s in (0, 10, 15, 20, 30, 40, 99)] == [0, 0, 0.5, 1, 0.75, 0.5, 0.5]
    with pytest.raises(TriptychError, match="at least one"):
        scheduled([], 3)


def test_fixed_and_scheduled_weights():
    weights = LossWeights(WeightConfig(weights={"a": 2.0, "b": 3.0}, schedules={"b": [(0, 0.0), (10, 1.0)]}))
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(1.0), "logged only": torch.tensor(7.0)}
    assert weights(losses, 0)[0].item() == 2.0
    assert weights(losses, 5)[0].item() == 3.5
    total, logged = weights(losses, 50)
    assert total.item() == 5.0 and logged["logged only"] == 7.0
    assert weights.weight("b", 0) == 0 and weights.weight("unknown", 0) == 0
    with pytest.raises(TriptychError, match="'c'"):
        LossWeights(WeightConfig(weights={"a": 1.0}, schedules={"c": [(0, 1.0)]}))


def test_learned_uncertainty_settles_at_the_loss():
    weights = LossWeights(WeightConfig(mode="learned", weights={"small": 1.0, "large": 1.0}))
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(400):
        optimizer.zero_grad()
        weights({"small": torch.tensor(0.1), "large": torch.tensor(4.0)}, 0)[0].backward()
        optimizer.step()
    # d/ds of exp(-s) L + s / 2 vanishes where exp(s) = 2 L.
    found = {name: s.exp().item() for name, s in weights.log_variance.items()}
    assert found == pytest.approx({"small": 0.2, "large": 8.0}, rel=1e-3)


def test_published_weights_are_the_published_ones():
    assert PUBLISHED_WEIGHTS["depth"] == 10 and PUBLISHED_WEIGHTS["sdf"] == 0.01 and PUBLISHED_WEIGHTS["kl"] == 1e-6


_SQUARE = torch.tensor([[-0.3, -0.3, 0.1], [0.3, -0.3, 0.1], [0.3, 0.3, 0.1], [-0.3, 0.3, 0.1]])
_FACES = torch.tensor([[0, 1, 2], [0, 2, 3]])


def test_render_of_a_square():
    camera = Camera(half_extent=0.5)
    attributes = torch.tensor([[0.2, 0.4, 0.6]]).expand(4, 3)
    drawn = render_surface(_SQUARE, _FACES, attributes, [camera], 40)
    assert drawn.mask.mean().item() == pytest.approx(0.36, abs=1e-3)
    inside = drawn.seen[0, 0]
    torch.testing.assert_close(drawn.depth[0, 0][inside], torch.full((int(inside.sum()),), 1.9))
    middle = (slice(None), 20, 20)
    torch.testing.assert_close(drawn.normal[0][middle], torch.tensor([0.5, 0.5, 1.0]))
    torch.testing.assert_close(drawn.channels[0][middle], torch.tensor([0.2, 0.4, 0.6]))
    empty = render_surface(_SQUARE, _FACES[:0], attributes, [camera], 8)
    assert empty.mask.sum() == 0 and empty.channels.shape == (1, 3, 8, 8)


def test_mask_gradient_grows_the_square():
    camera, scale = Camera(half_extent=0.5), torch.tensor(1.0, requires_grad=True)
    drawn = render_surface(_SQUARE * torch.stack([scale, scale, torch.tensor(1.0)]), _FACES, None, [camera], 41)
    drawn.mask.mean().backward()
    assert scale.grad.item() == pytest.approx(0.72, rel=0.05)  # d(0.36 s^2) / ds


def test_depth_and_colour_gradients_reach_the_vertices():
    camera = Camera(half_extent=0.5)
    lift = torch.tensor(0.0, requires_grad=True)
    color = torch.full((4, 3), 0.5, requires_grad=True)
    vertices = _SQUARE + torch.stack([torch.zeros(()), torch.zeros(()), lift])
    drawn = render_surface(vertices, _FACES, color, [camera], 20)
    (drawn.depth.sum() / drawn.seen.sum()).backward(retain_graph=True)
    assert lift.grad.item() == pytest.approx(-1, abs=1e-4)
    drawn.channels.sum().backward()
    assert color.grad.sum().item() == pytest.approx(3 * drawn.mask.sum().item(), rel=1e-4)
