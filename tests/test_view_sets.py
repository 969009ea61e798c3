"""Prepared view sets and view sheets."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from triptych.errors import TriptychError
from triptych.geometry.cameras import FRAME_FILL
from triptych.images.files import read_image, write_png
from triptych.images.foreground import alpha_box
from triptych.images.sheets import flatten, join_sheet, split_sheet
from triptych.images.views import ViewSet, bleed, prepare_views

NAMES = ("front", "left", "back", "right")


def arrow(side: int, width: float, height: float, x: float, y: float, background="white") -> Image.Image:
    """A two-coloured house shape of a known box centred at (x, y), antialiased."""
    scale = 6
    mode = "RGBA" if background is None else "RGB"
    picture = Image.new(mode, (side * scale, side * scale), background or (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    roof = [(x - width / 4, top), (x + width / 4, top), (right, y), (right, bottom), (left, bottom), (left, y)]
    draw.polygon([(a * scale, b * scale) for a, b in roof], fill=(180, 60, 40))
    draw.rectangle([left * scale, y * scale, x * scale, bottom * scale], fill=(40, 60, 140))
    return picture.reduce(scale)


def box_of(views: ViewSet, name: str) -> tuple[float, float, float, float]:
    return alpha_box(views.masks[views.names.index(name)].numpy())


def numpy_views(views: ViewSet) -> dict[str, np.ndarray]:
    return {name: image.permute(1, 2, 0).numpy() for name, image in zip(views.names, views.images, strict=True)}


@pytest.fixture(scope="module")
def four() -> ViewSet:
    """One object of 200 x 300 x 100 units, photographed at four sizes and croppings."""
    return prepare_views(
        {
            "right": arrow(512, 100, 300, 200, 256),
            "front": arrow(512, 200, 300, 250, 240),
            "back": arrow(300, 400 / 3, 200, 140, 150),
            "left": arrow(800, 150, 450, 400, 420),
        },
        size=128,
    )


def test_one_scale_for_the_whole_set(four):
    assert four.names == NAMES
    assert four.azimuths_deg == (0, 90, 180, 270)
    assert four.images.shape == (4, 4, 128, 128)
    assert four.images.dtype == torch.float32
    assert four.warnings == ()
    tall = FRAME_FILL * 128
    for name, width in zip(NAMES, (200, 100, 200, 100), strict=True):
        left, top, right, bottom = box_of(four, name)
        assert abs(bottom - top - tall) < 0.5
        assert abs(right - left - tall * width / 300) < 0.6
        assert abs(left + right - 128) < 0.6
        assert abs(top + bottom - 128) < 0.6


def test_the_widest_view_decides_when_it_is_wider_than_high():
    views = prepare_views({0: arrow(400, 100, 100, 200, 200), 90.0: arrow(400, 300, 100, 200, 200)}, size=128)
    left, top, right, bottom = box_of(views, "left")
    assert abs(right - left - FRAME_FILL * 128) < 0.6
    assert abs(bottom - top - FRAME_FILL * 128 / 3) < 0.6
    left, top, right, bottom = box_of(views, "front")
    assert abs(right - left - FRAME_FILL * 128 / 3) < 0.6


def test_the_cameras_are_the_rigs(four):
    assert [camera.azimuth_deg for camera in four.cameras] == [0, 90, 180, 270]
    assert all(camera.is_orthographic for camera in four.cameras)
    assert abs(four.cameras[0].half_extent - 0.5 / FRAME_FILL) < 1e-12


def test_a_prepared_set_prepared_again_is_unchanged(four):
    again = prepare_views(numpy_views(four), size=128)
    torch.testing.assert_close(again.images, four.images, rtol=0, atol=0)
    eight_bit = {name: np.rint(view * 255).astype(np.uint8) for name, view in numpy_views(four).items()}
    assert (prepare_views(eight_bit, size=128).images - four.images).abs().mean() < 1 / 255


@pytest.mark.parametrize("background", ["white", (120, 120, 120), None])
@pytest.mark.parametrize("move", [(400, 1.0, 190.0, 210.0), (400, 1.0, 210.25, 195.6), (700, 1.7, 360.0, 350.0)])
def test_place_size_and_background_of_the_input_do_not_matter(background, move):
    side, scale, x, y = move
    reference = prepare_views({"front": arrow(400, 180, 260, 200, 200, None)}, size=128).images[0]
    moved = prepare_views({"front": arrow(side, 180 * scale, 260 * scale, x, y, background)}, size=128).images[0]
    assert (moved[3] - reference[3]).abs().mean() < 1.5 / 255
    solid = (moved[3] > 0.9) & (reference[3] > 0.9)
    assert (moved[:3] - reference[:3]).abs()[:, solid].mean() < 1.5 / 255


def test_large_pictures_and_paths(tmp_path):
    write_png(arrow(350, 200, 250, 160, 175).resize((1400, 1400)), tmp_path / "front.png")
    views = prepare_views({"front": tmp_path / "front.png", "left": str(tmp_path / "front.png")}, size=64)
    left, top, right, bottom = box_of(views, "front")
    assert abs(bottom - top - FRAME_FILL * 64) < 0.5
    assert abs((right - left) / (bottom - top) - 0.8) < 0.01


def test_transparent_pixels_continue_the_colour(four):
    for image in four.images:
        empty = image[3] == 0
        assert empty.any()
        palette = torch.tensor([[180, 60, 40], [40, 60, 140]]) / 255
        distance = (image[:3, empty].T[:, None] - palette).norm(dim=-1).min(dim=1).values
        assert distance.median() < 0.03
        assert image[:3, empty].sum(dim=0).min() > 0.5  # nowhere black
    halved = torch.nn.functional.interpolate(four.images[:1], size=77, mode="bilinear")[0]
    edge = (halved[3] > 0.05) & (halved[3] < 0.95)
    assert halved[:3, edge].sum(dim=0).min() > 0.7


def test_bleed_keeps_visible_pixels():
    rgba = np.zeros((8, 8, 4), dtype=np.float32)
    rgba[3, 3] = (0.2, 0.4, 0.6, 1.0)
    rgba[3, 4] = (0.9, 0.1, 0.1, 0.5)
    out = bleed(rgba)
    np.testing.assert_array_equal(out[..., 3], rgba[..., 3])
    np.testing.assert_array_equal(out[3, 3:5], rgba[3, 3:5])
    np.testing.assert_array_equal(out[0, 0, :3], rgba[3, 3, :3])
    np.testing.assert_array_equal(out[3, 7, :3], rgba[3, 4, :3])


def test_opposite_views_of_different_width_are_reported():
    views = prepare_views({"front": arrow(400, 200, 300, 200, 200), "back": arrow(400, 150, 300, 200, 200)}, size=128)
    assert len(views.warnings) == 1
    assert "the front view is 72 pixels wide" in views.warnings[0]
    assert "the back view 54" in views.warnings[0]
    near = prepare_views({"left": arrow(400, 200, 300, 200, 200), "right": arrow(400, 185, 300, 200, 200)}, size=128)
    assert near.warnings == ()


def test_a_cut_view_is_named_in_the_warning():
    views = prepare_views({"front": arrow(400, 200, 300, 330, 200)}, size=64)
    assert views.warnings == ("the front view: the object touches the right border and may be cut off there",)


PICTURE = np.asarray(arrow(100, 40, 60, 50, 50))


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        ({}, "there are no views"),
        ({0: PICTURE, 72: PICTURE, 144: PICTURE, 216: PICTURE, 288: PICTURE}, "5 views were given, at most 4"),
        ({"front": PICTURE, 360.0: PICTURE}, "the front view .azimuth 0. is given twice"),
        ({"front": PICTURE, "Front": PICTURE}, "given twice"),
        ({"top": PICTURE}, "unknown view 'top'; views are front, left, back, right"),
        ({float("nan"): PICTURE}, "finite number of degrees"),
        ({"left": np.ones((64, 64, 3))}, "no object was found in the left view"),
        ({"left": np.zeros((64, 64, 4))}, "the left view is fully transparent"),
        ({"front": "absent.png"}, "there is no picture file absent.png"),
    ],
)
def test_bad_sets_get_a_sentence(sources, sentence):
    with pytest.raises(TriptychError, match=sentence):
        prepare_views(sources)


def test_bad_size():
    with pytest.raises(TriptychError, match="16-4096 pixels, got 8"):
        prepare_views({"front": PICTURE}, size=8)


def test_any_azimuth_and_negative_ones():
    views = prepare_views({-90: PICTURE, 45: PICTURE}, size=32)
    assert views.azimuths_deg == (45, 270)
    assert views.names == ("45", "right")


def test_subset_keeps_scale_and_pictures(four):
    part = four.subset(["back", 90])
    assert part.names == ("left", "back")
    assert part.count == 2
    torch.testing.assert_close(part.images, four.images[1:3], rtol=0, atol=0)
    with pytest.raises(TriptychError, match="has no front view; it has left, back"):
        part.subset(["front"])
    with pytest.raises(TriptychError, match="no views"):
        four.subset([])


def test_rig_renders_are_taken_as_they_are(four):
    views = ViewSet.from_rig_renders(four.images.flip(0) * 0.5 + 0.4, (270, 180, 90, 0))
    assert views.azimuths_deg == (0, 90, 180, 270)
    torch.testing.assert_close(views.images, four.images * 0.5 + 0.4)
    assert views.masks.shape == (4, 128, 128)
    assert views.size == 128


@pytest.mark.parametrize(
    ("images", "azimuths", "sentence"),
    [
        (torch.rand(2, 3, 8, 8), (0, 90), r"\(V, 4, S, S\), got shape \(2, 3, 8, 8\)"),
        (torch.rand(2, 4, 8, 8), (0,), "2 views need as many azimuths, got 1"),
        (torch.rand(5, 4, 8, 8), (0, 1, 2, 3, 4), "at most 4"),
        (torch.rand(2, 4, 8, 8), (0, 360), "twice"),
        (torch.rand(1, 4, 8, 8) * 255, (0,), "0-1"),
        (torch.full((1, 4, 8, 8), torch.nan), (0,), "finite"),
        (torch.zeros(1, 4, 8, 8), (180,), "the back view is empty"),
    ],
)
def test_bad_rig_renders(images, azimuths, sentence):
    with pytest.raises(TriptychError, match=sentence):
        ViewSet.from_rig_renders(images, azimuths)


# --- sheets ----------------------------------------------------------------------------------------------------------


def test_grid_reads_front_left_back_right():
    colours = {name: np.full((4, 6, 3), i / 4, dtype=np.float32) for i, name in enumerate(NAMES)}
    sheet = join_sheet(colours)
    assert sheet.shape == (8, 12, 4)
    assert [sheet[0, 0, 0], sheet[0, 6, 0], sheet[4, 0, 0], sheet[4, 6, 0]] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("layout", ["grid", "row"])
def test_sheets_round_trip_exactly(four, layout, tmp_path):
    sheet = join_sheet(four, layout)
    views = split_sheet(sheet)
    assert tuple(views) == NAMES
    for name, view in numpy_views(four).items():
        np.testing.assert_array_equal(views[name], view)
    bytes_before = np.rint(sheet * 255).astype(np.uint8)
    for view, original in zip(
        split_sheet(write_png(sheet, tmp_path / "sheet.png")).values(), split_sheet(bytes_before).values(), strict=True
    ):
        np.testing.assert_array_equal(view, original)


def test_triptych_row(four):
    sheet = join_sheet(four.subset(["front", "left", "back"]), "row")
    assert sheet.shape == (128, 384, 4)
    views = split_sheet(sheet)
    assert tuple(views) == ("front", "left", "back")
    np.testing.assert_array_equal(views["back"], numpy_views(four)["back"])


def test_a_split_sheet_prepares_to_the_same_set(four):
    torch.testing.assert_close(prepare_views(split_sheet(join_sheet(four)), size=128).images, four.images)


def test_background_is_mixed_in(four):
    sheet = join_sheet(four, background=(0.2, 0.9, 0.1))
    assert sheet.shape == (256, 256, 3)
    np.testing.assert_allclose(sheet[0, 0], [0.2, 0.9, 0.1], atol=1e-6)
    np.testing.assert_array_equal(flatten(np.float32([[0.2, 0.4, 0.6, 0.5]]), (1, 1, 1)), np.float32([[0.6, 0.7, 0.8]]))


def test_bad_sheets(four):
    with pytest.raises(TriptychError, match="even sides, got 13 x 12"):
        split_sheet(np.zeros((12, 13, 3)))
    with pytest.raises(TriptychError, match="3 or 4 views of equal width, got 12 x 12"):
        split_sheet(np.zeros((12, 12, 3)), "row")
    with pytest.raises(TriptychError, match="equal width, got 37 x 12"):
        split_sheet(np.zeros((12, 37, 3)), "row")
    with pytest.raises(TriptychError, match="unknown sheet layout 'spiral'"):
        join_sheet(four, "spiral")
    with pytest.raises(TriptychError, match="shows the views front, left, back, right, got front, left"):
        join_sheet(four.subset(["front", "left"]))
    with pytest.raises(TriptychError, match="one size, got 4 x 4, 4 x 4, 4 x 5, 4 x 4"):
        join_sheet([np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), np.zeros((5, 4, 3)), np.zeros((4, 4, 3))])
    with pytest.raises(TriptychError, match="three numbers in 0-1"):
        join_sheet(four, background=(255, 255, 255))


def test_sheet_from_a_picture_file(four, tmp_path):
    path = write_png(join_sheet(four, "row"), tmp_path / "row.png")
    np.testing.assert_array_equal(split_sheet(path)["left"], read_image(path).rgba[:, 128:256])
