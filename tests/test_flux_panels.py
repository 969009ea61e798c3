"""Panels of a generated sheet: cut out of their background, and judged."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_views import MAGENTA, WHITE, sheet_of, shifted, truth
from scipy import ndimage

from triptych.errors import TriptychError
from triptych.flux.card import default_card
from triptych.flux.panels import (
    check_panel,
    check_views,
    cut_panel,
    cut_sheet,
    grouped,
    key_share,
    own_key_share,
    sheet_to_views,
)
from triptych.geometry.cameras import VIEW_NAMES


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def disc(size=128, radius=40, colour=(0.2, 0.5, 0.3), centre=(0.5, 0.5)):
    """(S, S, 4) with an antialiased disc."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    distance = np.hypot(x - centre[1], y - centre[0]) * size
    alpha = np.clip(radius - distance + 0.5, 0, 1)
    return np.concatenate(
        [np.broadcast_to(np.float32(colour), (size, size, 3)), alpha[..., None]], -1, dtype=np.float32
    )


def over(view, background):
    return (view[..., :3] * view[..., 3:] + np.float32(background) * (1 - view[..., 3:])).astype(np.float32)


@pytest.mark.parametrize(("background", "edge"), [(MAGENTA, 0.99), ((0.0, 1.0, 0.0), 0.98), (WHITE, 0.97)])
def test_a_clean_sheet_gives_back_its_views(background, edge):
    found = sheet_to_views(sheet_of(truth(), background), background)
    assert tuple(found) == VIEW_NAMES
    assert check_views(found) == []
    for name, view in truth().items():
        assert found[name].dtype == np.float32 and found[name].shape == (128, 128, 4)
        assert iou(found[name][..., 3] > 0.5, view[..., 3] > 0.5) > edge
        assert np.abs(found[name][..., 3] - view[..., 3]).mean() < 0.004
        solid = view[..., 3] > 0.99
        assert np.abs(found[name] - view)[solid][:, :3].mean() < 0.006


def test_the_blur_and_noise_of_a_small_model_leave_soft_edges_without_the_key():
    sheet = sheet_of(truth()).numpy()
    noise = np.random.default_rng(0).normal(0, 0.03, sheet.shape)
    blurred = np.clip(ndimage.gaussian_filter(sheet, (0, 1, 1)) + noise, 0, 1)
    found = sheet_to_views(torch.from_numpy(blurred), MAGENTA)
    assert check_views(found) == []
    for name, view in truth().items():
        assert iou(found[name][..., 3] > 0.5, view[..., 3] > 0.5) > 0.97
        edge = (found[name][..., 3] > 0.05) & (found[name][..., 3] < 0.95)
        assert 0.01 < edge.mean() < 0.15
        rgb = found[name][edge]
        pinkness = np.minimum(rgb[:, 0], rgb[:, 2]) - rgb[:, 1]
        # the purple fin is the most of the key's hue that the object has
        assert np.quantile(pinkness, 0.99) < 0.35
        assert (found[name][..., 3][ndimage.binary_erosion(view[..., 3] > 0.99, iterations=5)] > 0.95).all()


@pytest.mark.parametrize(
    "colour", [(0.55, 0.2, 0.6), (0.98, 0.81, 0.18), (0.02, 0.02, 0.02), (1, 1, 1), (0.9, 0.45, 0.7)]
)
def test_alpha_and_colour_are_exact_whatever_the_objects_colour(colour):
    view = disc(colour=colour)
    found = cut_panel(over(view, MAGENTA), MAGENTA)
    assert np.abs(found[..., 3] - view[..., 3]).max() < 0.08
    assert np.abs(found[..., :3] - np.float32(colour))[found[..., 3] > 0.3].max() < 0.025


def test_specks_go_small_holes_close_and_large_ones_stay():
    view = disc()
    view[60:63, 60:62, 3] = 0  # the model's slip inside the object
    view[80:92, 60:72, 3] = 0  # a handle
    view[5:9, 5:9] = (0.1, 0.1, 0.1, 1)  # a crumb in the corner
    alpha = cut_panel(over(view, MAGENTA), MAGENTA)[..., 3]
    assert (alpha[58:65, 58:64] == 1).all()
    assert (alpha[83:89, 63:69] == 0).all()
    assert alpha[:20, :20].max() == 0


@pytest.mark.parametrize("background", [MAGENTA, WHITE])
def test_empty_cut_and_divided_panels_are_named(background):
    views = dict(truth())
    views["left"] = np.zeros_like(views["left"])
    views["back"] = shifted(views["back"], 30)
    pair = np.maximum(disc(radius=18, centre=(0.5, 0.22)), disc(radius=18, centre=(0.5, 0.78)))
    views["right"] = pair
    found = sheet_to_views(sheet_of(views, background), background)
    assert check_views(found, ("front",)) == []
    empty, cut, pieces = check_views(found)[:3]
    assert empty == "the left panel is empty"
    assert cut == "the back panel: the object touches the bottom border, so it is cut off"
    assert pieces == "the right panel: not one object but 2 that lie apart"


@pytest.mark.parametrize("background", [MAGENTA, WHITE])
def test_a_panel_of_one_colour_and_one_of_noise(background):
    blank = np.broadcast_to(np.float32(background), (64, 64, 3))
    assert cut_panel(blank, background)[..., 3].max() == 0
    assert check_panel(cut_panel(blank, background), "it") == ["it is empty"]
    full = np.full((64, 64, 3), 0.3, np.float32)
    (sentence,) = check_panel(cut_panel(full, background))
    assert sentence == "the panel: the object touches the border all around, so it is cut off"
    noise = np.random.default_rng(0).random((64, 64, 3), dtype=np.float32)
    assert check_panel(cut_panel(noise, background)) != []


def test_what_is_the_same_in_several_panels_is_said_once():
    views = {name: np.zeros((64, 64, 4), np.float32) for name in VIEW_NAMES}
    assert grouped(check_views(views)) == ["the front, left, back and right panels are empty"]
    views["left"][:, 20:40] = views["right"][:, 20:40] = 1
    cut = "the left and right panels: the object touches the top and bottom border, so it is cut off"
    assert grouped(check_views(views)) == ["the front and back panels are empty", cut]
    views["back"][20:40, 20:40] = 1
    sizes = check_views(views)[-1]
    assert sizes.startswith("the panels show views of different size: ")
    assert grouped(check_views(views)) == ["the front panel is empty", cut, sizes]


def test_near_parts_are_one_object_and_far_small_ones_do_not_count():
    near = np.maximum(disc(radius=20, centre=(0.5, 0.3)), disc(radius=20, centre=(0.5, 0.64)))
    assert check_panel(near) == []
    crumb = np.maximum(disc(radius=30), disc(radius=5, centre=(0.1, 0.1)))
    assert check_panel(crumb) == []


def test_views_of_different_height_are_named_with_their_heights():
    views = {name: disc(radius=50) for name in VIEW_NAMES}
    views["back"] = disc(radius=40)
    assert check_views(views, ("front", "left", "right")) == []
    (sentence,) = check_views(views)
    assert sentence == (
        "the panels show views of different size: the object's height is front 78%, left 78%, back 62%, right 78% of "
        "the panel, back differs most"
    )
    views["back"] = disc(radius=44)
    assert check_views(views) == []
    flat = {name: disc(radius=50) * (abs(np.arange(128) - 63.5) < 6)[:, None, None] for name in VIEW_NAMES}
    flat["left"] = disc(radius=50) * (abs(np.arange(128) - 63.5) < 4)[:, None, None]
    assert check_views(flat) == [], "two pixels of something flat are a third of its height"


def test_a_sheet_of_wrong_shape_or_with_undefined_values():
    for shape in ((4, 8, 8), (3, 8, 10), (3, 9, 9), (8, 8)):
        with pytest.raises(TriptychError, match=r"a view sheet must be \(3, 2S, 2S\), got shape"):
            sheet_to_views(torch.zeros(shape), MAGENTA)
    found = sheet_to_views(torch.full((3, 64, 64), torch.nan), MAGENTA)
    assert all(np.isfinite(view).all() for view in found.values())


def test_a_soft_sheet_gives_its_key_colour_back_inside_too():
    """A model that is unsure of an object's left half mixes background into it."""
    key = np.array([1.0, 0.0, 1.0], dtype=np.float32)
    own = np.array([0.7, 0.5, 0.3], dtype=np.float32)
    cell = np.tile(key, (64, 64, 1))
    cell[12:52, 12:52] = own
    cell[12:52, 12:24] = 0.6 * own + 0.4 * key
    sheet = np.tile(cell, (2, 2, 1)).transpose(2, 0, 1)
    plain, soft = (sheet_to_views(sheet, tuple(key), soft=is_soft)["back"] for is_soft in (False, True))
    assert np.array_equal(plain[..., 3], soft[..., 3])
    mixed, clean = (slice(20, 44), slice(16, 20)), (slice(20, 44), slice(32, 44))
    assert np.abs(plain[mixed][..., :3] - cell[mixed]).max() < 1e-6
    # The share that is seen is the key's own less what the object's hue hides of it.
    seen = 0.6 * 0.3 + 0.4 - 0.6 * 0.5
    assert np.allclose(soft[mixed][..., :3], (cell[mixed] - seen * key) / (1 - seen), atol=1e-5)
    assert np.allclose(soft[clean][..., :3], own, atol=1e-5)
    white = sheet_to_views(np.ones((3, 128, 128), dtype=np.float32), (1.0, 1.0, 1.0), soft=True)
    assert set(white) == {"front", "left", "back", "right"}


@pytest.mark.parametrize("soft", [False, True])
def test_what_has_half_of_the_keys_colour_stays_whole_and_keeps_it(soft):
    """Purple on magenta, uneven as a small model draws it, with a blurred outline."""
    generator = np.random.default_rng(0)
    key, purple = np.array([1.0, 0.0, 1.0]), np.array([0.5, 0.03, 0.56])
    alpha = np.zeros((128, 128))
    alpha[24:104, 34:94] = 1
    alpha = ndimage.gaussian_filter(alpha, 1.2)[..., None]
    uneven = ndimage.gaussian_filter(generator.standard_normal((128, 128)), 6)[..., None]
    body = purple + 0.1 * uneven / np.abs(uneven).max() * np.array([1.0, 0.0, 1.0])
    cell = alpha * body + (1 - alpha) * key
    assert (key_share(cell[40:90, 50:80], key) > 0.5).mean() > 0.1, "by an even measure these would be holes"
    view = sheet_to_views(np.tile(cell, (2, 2, 1)).transpose(2, 0, 1), tuple(key), soft=soft)["left"]
    assert (view[28:100, 38:90, 3] > 0.95).all() and (view[[16, 112], :, 3] == 0).all()
    edge = np.flatnonzero(view[64, :, 3] > 0.5)[[0, -1]]
    assert edge == pytest.approx([34, 93], abs=1)
    assert np.abs(view[30:98, 40:88, :3] - body[30:98, 40:88]).mean() < 0.05
    assert own_key_share([cell], key) == pytest.approx(0.46, abs=0.05)
    assert own_key_share([np.tile(key, (64, 64, 1))], key) == 0, "nothing is there"


def test_a_card_says_whether_a_sheet_is_soft():
    card = replace(default_card("flux2-klein"), background=(1.0, 0.0, 1.0))
    sheet = np.random.default_rng(0).uniform(0, 1, (3, 64, 64)).astype(np.float32)
    for vocabulary in (None, ("chair",)):
        found = cut_sheet(sheet, replace(card, vocabulary=vocabulary))
        expected = sheet_to_views(sheet, card.background, soft=vocabulary is not None)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
