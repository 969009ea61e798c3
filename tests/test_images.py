"""Reading and writing pictures, and cutting the object out of them."""

import io
import os
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw
from scipy import ndimage

from triptych.errors import TriptychError
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.files import read_mesh
from triptych.images import files
from triptych.images.files import read_image, resize_premultiplied, to_pil, write_png
from triptych.images.foreground import alpha_box, decontaminate, extract_foreground, fit_plain_background
from triptych.render.views import render_views, shade

SIDE = 320
RED = np.array([0.75, 0.25, 0.2])
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE] / SIDE


def coverage(draw_shape) -> np.ndarray:
    """The exact antialiased mask of what ``draw_shape(draw, scale)`` draws in pixels of a SIDE x SIDE picture."""
    scale = 8
    picture = Image.new("L", (SIDE * scale, SIDE * scale))
    draw_shape(ImageDraw.Draw(picture), scale)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32) / 255


def ellipse(left, top, right, bottom, fill=255):
    return lambda draw, s: draw.ellipse([left * s, top * s, right * s, bottom * s], fill=fill)


def photo(alpha: np.ndarray, colour, background, quality: int | None = None) -> np.ndarray:
    """8-bit picture of a foreground over a background, through JPEG when a quality is given. (H, W, 4) float32."""
    alpha = alpha[..., None]
    rgb = np.broadcast_to(alpha * colour + (1 - alpha) * np.asarray(background), (*alpha.shape[:2], 3))
    picture = Image.fromarray(np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8))
    if quality is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        picture = Image.open(buffer)
    return read_image(picture).rgba


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    a, b = mask > 0.5, truth > 0.5
    return np.count_nonzero(a & b) / np.count_nonzero(a | b)


BLOB = coverage(
    lambda draw, s: (
        draw.ellipse([60 * s, 50 * s, 200 * s, 240 * s], fill=255),
        draw.rectangle([160 * s, 160 * s, 265 * s, 280 * s], fill=255),
        draw.polygon([(48 * s, 300 * s), (72 * s, 160 * s), (120 * s, 200 * s)], fill=255),
    )
)
TEXTURE = np.stack([0.7 + 0.2 * np.sin(20 * COLUMNS), 0.2 + 0.15 * np.cos(9 * ROWS), 0.25 + 0.1 * COLUMNS], axis=-1)
BALL = coverage(ellipse(60, 60, 260, 260))


# --- files -----------------------------------------------------------------------------------------------------------


def gradient_rgb() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def test_png_round_trip_is_exact_for_rgb_and_rgba(tmp_path):
    rng = np.random.default_rng(1)
    for channels in (3, 4):
        array = rng.integers(0, 256, (9, 13, channels), dtype=np.uint8)
        path = write_png(array, tmp_path / f"{channels}.png")
        back = read_image(path)
        assert Image.open(path).mode == {3: "RGB", 4: "RGBA"}[channels]
        np.testing.assert_array_equal(np.rint(back.rgba[..., :channels] * 255), array)
        assert back.has_alpha == (channels == 4)
        assert back.rgba.dtype == np.float32
        assert back.rgba.shape == (9, 13, 4)


def test_opaque_alpha_channel_is_no_alpha():
    assert not read_image(Image.new("RGBA", (4, 4), (1, 2, 3, 255))).has_alpha
    assert read_image(Image.new("RGBA", (4, 4), (1, 2, 3, 254))).has_alpha


def test_exif_orientation_is_applied(tmp_path):
    array = gradient_rgb()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    rgba = read_image(tmp_path / "turned.png").rgba
    np.testing.assert_array_equal(np.rint(rgba[..., :3] * 255), np.rot90(array, -1))


def test_grey_16_bit_keeps_its_level(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    rgba = read_image(tmp_path / "deep.png").rgba
    np.testing.assert_allclose(rgba[..., 0], values / 65535, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(rgba[..., 0], rgba[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_every_mode_gives_its_colour(mode):
    expected = {"1": (255, 255, 255), "I": None, "F": None}.get(mode, (200, 200, 200))
    if mode == "I":
        picture, expected = Image.fromarray(np.full((5, 6), 51400, dtype=np.int32)), (200, 200, 200)
    elif mode == "F":
        picture, expected = Image.fromarray(np.full((5, 6), 200 / 255, dtype=np.float32)), (200, 200, 200)
    else:
        options = {"palette": Image.Palette.ADAPTIVE} if mode == "P" else {}
        picture = Image.new("RGB", (6, 5), expected).convert(mode, **options)
    assert picture.mode == mode
    rgba = read_image(picture).rgba
    assert rgba.shape == (5, 6, 4)
    np.testing.assert_allclose(rgba[..., :3] * 255, np.broadcast_to(expected, (5, 6, 3)), atol=2)
    assert (rgba[..., 3] == 1).all()


def test_palette_transparency_is_alpha(tmp_path):
    picture = Image.new("P", (4, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putpixel((1, 2), 1)
    picture.save(tmp_path / "palette.png", transparency=0)
    read = read_image(tmp_path / "palette.png")
    assert read.has_alpha
    assert read.rgba[..., 3].sum() == 1
    np.testing.assert_array_equal(read.rgba[2, 1], [0, 0, 1, 1])


def test_embedded_profile_is_converted_to_srgb(tmp_path):
    array = gradient_rgb()
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(array).save(tmp_path / "srgb.png", icc_profile=srgb)
    np.testing.assert_array_equal(np.rint(read_image(tmp_path / "srgb.png").rgba[..., :3] * 255), array)
    linear = _linear_profile(srgb)
    Image.fromarray(array).save(tmp_path / "linear.png", icc_profile=linear)
    shown = read_image(tmp_path / "linear.png").rgba[..., :3]
    values = array / 255
    expected = np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(shown, expected, atol=2.5 / 255)
    Image.fromarray(array).save(tmp_path / "odd.png", icc_profile=xyz)
    with pytest.warns(UserWarning, match="taken as sRGB"):
        np.testing.assert_array_equal(np.rint(read_image(tmp_path / "odd.png").rgba[..., :3] * 255), array)


def _linear_profile(srgb: bytes) -> bytes:
    """sRGB primaries with a linear tone curve: the three curve tags of PIL's sRGB profile made identities."""
    profile = bytearray(srgb)
    for i in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset, _ = struct.unpack(">4sII", profile[132 + 12 * i : 144 + 12 * i])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = struct.pack(">4sII", b"curv", 0, 0)
        if name == b"desc":  # lest it still says sRGB
            start, end = offset, offset + 64
            profile[start:end] = profile[start:end].replace(b"\0s\0R\0G\0B", b"\0l\0i\0n\0e")
    return bytes(profile)


def test_profile_keeps_alpha(tmp_path):
    profile = _linear_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    Image.new("RGBA", (3, 3), (100, 100, 100, 77)).save(tmp_path / "a.png", icc_profile=profile)
    rgba = read_image(tmp_path / "a.png").rgba
    np.testing.assert_allclose(rgba[0, 0] * 255, [168, 168, 168, 77], atol=2)


def test_arrays_of_every_kind():
    array = gradient_rgb()
    expected = np.concatenate([array / 255, np.ones((12, 20, 1))], axis=-1)
    for same in (array, array.astype(np.uint16) * 257, (array / 255).astype(np.float32), array / 255):
        np.testing.assert_allclose(read_image(same).rgba, expected, atol=1e-6)
    assert read_image(np.eye(3, dtype=bool)).rgba[..., 0].tolist() == np.eye(3).tolist()


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 8, 8)), r"\(H, W, 3\).*got shape \(4, 8, 8\)"),
        (np.zeros((0, 4, 3)), "got shape"),
        (np.full((4, 4, 3), 200.0), "divide 0-255 values by 255"),
        (np.full((4, 4, 3), np.nan), "finite"),
        (np.zeros((4, 4, 3), dtype=np.int64), "got int64"),
    ],
)
def test_bad_arrays(array, sentence):
    with pytest.raises(TriptychError, match=sentence):
        read_image(array)


def test_bad_files_get_a_sentence(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray((TEXTURE * 255).astype(np.uint8)).save(jpeg, "JPEG")
    cases = {
        "empty.png": (b"", "empty .0 bytes."),
        "text.png": (b"this is no picture\n" * 20, "not a picture"),
        "half.png": (whole.getvalue()[: len(whole.getvalue()) // 2], "damaged or truncated"),
        "half.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "damaged or truncated"),
        "head.png": (whole.getvalue()[:20], "not a picture"),
    }
    for name, (data, sentence) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TriptychError, match=sentence) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(TriptychError, match="no picture file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(TriptychError, match="is a folder"):
        read_image(tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "text"), [(8100, "66 mega"), (10_000, "100 mega"), (60_000, "more than 179 mega")])
def test_huge_pictures_are_refused_from_the_header(tmp_path, side, text):
    (tmp_path / "huge.png").write_bytes(png_header(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TriptychError, match=f"{text}.*limit of 64"):
            read_image(tmp_path / "huge.png")


def test_max_side_reduces_and_keeps_the_colour_of_edges():
    array = np.zeros((600, 400, 4), dtype=np.uint8)
    array[100:500, 100:300] = (200, 100, 50, 255)
    for source in (array, Image.fromarray(array)):
        rgba = read_image(source, max_side=150).rgba
        assert rgba.shape == (150, 100, 4)
        visible = rgba[..., 3] > 0.25  # 8-bit premultiplied colour is coarse below
        np.testing.assert_allclose(rgba[visible][:, :3] * 255, [[200, 100, 50]] * visible.sum(), atol=4)
        assert abs(rgba[..., 3].sum() - 400 * 200 / 16) < 12


def test_resize_rings_nowhere():
    rgba = np.zeros((97, 97, 4), dtype=np.float32)
    rgba[30:60, 20:70] = (0.9, 0.5, 0.1, 1.0)
    small = resize_premultiplied(rgba, 31, 31, (3.3, 4.2, 90.1, 91.0))
    visible = small[..., 3] > 1e-3
    np.testing.assert_allclose(small[visible][:, :3], np.tile([0.9, 0.5, 0.1], (visible.sum(), 1)), atol=1e-3)


def test_write_png_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = write_png(np.zeros((2, 2, 3), dtype=np.uint8), tmp_path / "a.png")
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TriptychError, match="cannot write .*No space left"):
        write_png(np.ones((2, 2, 3), dtype=np.uint8), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]


def test_write_png_into_a_missing_folder(tmp_path):
    with pytest.raises(TriptychError, match="cannot write"):
        write_png(np.zeros((2, 2, 3), dtype=np.uint8), tmp_path / "none" / "a.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(TriptychError, match="cannot write"):
        write_png(np.zeros((2, 2, 3), dtype=np.uint8), tmp_path / "folder.png")
    assert os.listdir(tmp_path) == ["folder.png"]


def test_to_pil_rounds():
    assert to_pil(np.full((1, 1, 3), 0.5, dtype=np.float32)).getpixel((0, 0)) == (128, 128, 128)


# --- foreground ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [(1, 1, 1), (0.5, 0.5, 0.5), (0, 0.7, 0.2), (0, 0, 0)])
def test_plain_background_gives_mask_matte_and_clean_colour(background):
    cut = extract_foreground(photo(BLOB, TEXTURE, background))
    alpha = cut.rgba[..., 3]
    assert cut.method == "plain"
    assert cut.warnings == ()
    assert iou(alpha, BLOB) > 0.999
    assert np.abs(alpha - BLOB).max() < 0.12
    edge = (BLOB > 0.1) & (BLOB < 1)
    assert np.abs(cut.rgba[..., :3] - TEXTURE)[edge].mean() < 0.025
    np.testing.assert_allclose(cut.box, alpha_box(BLOB), atol=0.3)


@pytest.mark.parametrize("background", [(1, 1, 1), (0.5, 0.5, 0.5), (0, 0.7, 0.2), (0, 0, 0)])
def test_jpeg_noise_is_not_foreground(background):
    cut = extract_foreground(photo(BLOB, TEXTURE, background, quality=85))
    alpha = cut.rgba[..., 3]
    assert cut.warnings == ()
    assert iou(alpha, BLOB) > 0.995
    assert np.abs(alpha - BLOB).mean() < 0.005
    assert np.abs(cut.rgba[..., :3] - TEXTURE)[(BLOB > 0.1) & (BLOB < 1)].mean() < 0.06


def test_no_white_fringe_on_a_dark_object():
    cut = extract_foreground(photo(BALL, np.array([0.1, 0.1, 0.12]), 1.0)).rgba
    assert cut[..., :3][cut[..., 3] > 0.03].max() < 0.2


def test_background_gradient_is_plain():
    slope = (0.8 + 0.1 * COLUMNS + 0.06 * ROWS)[..., None]
    cut = extract_foreground(photo(BALL, RED, slope, quality=90))
    assert cut.method == "plain"
    assert iou(cut.rgba[..., 3], BALL) > 0.995


@pytest.mark.parametrize("quality", [None, 85])
def test_white_object_with_a_dark_outline_stays_whole(quality):
    inner = coverage(ellipse(65, 65, 255, 255))[..., None]
    cut = extract_foreground(photo(BALL, inner * 1.0 + (1 - inner) * 0.1, 1.0, quality))
    assert iou(cut.rgba[..., 3], BALL) > 0.995
    assert (cut.rgba[80:240, 120:200, 3] == 1).all()
    assert any("kept as part of the object" in warning for warning in cut.warnings)


@pytest.mark.parametrize("quality", [None, 85])
@pytest.mark.parametrize("background", [1.0, 0.6])
def test_background_seen_through_a_handle_is_removed(background, quality):
    mug = coverage(
        lambda draw, s: (
            draw.ellipse([170 * s, 90 * s, 300 * s, 220 * s], fill=255),
            draw.ellipse([196 * s, 116 * s, 274 * s, 194 * s], fill=0),
            draw.rectangle([60 * s, 60 * s, 205 * s, 270 * s], fill=255),
        )
    )
    colour = np.stack([0.3 + 0.3 * COLUMNS, 0.4 + 0.1 * ROWS, 0.7 - 0.1 * COLUMNS], axis=-1)
    cut = extract_foreground(photo(mug, colour, background, quality))
    assert mug[155, 240] == 0
    assert cut.rgba[155, 240, 3] == 0
    assert iou(cut.rgba[..., 3], mug) > 0.995
    assert [w for w in cut.warnings if "opening" in w]
    assert len(cut.warnings) == 1


@pytest.mark.parametrize("quality", [None, 85])
def test_white_highlight_inside_the_object_is_kept(quality):
    fade = np.clip(1.6 * np.exp(-(np.hypot(COLUMNS - 0.4, ROWS - 0.4) ** 2) / 0.09**2), 0, 1)[..., None]
    assert np.count_nonzero(fade == 1) > 500  # a clipped, exactly white spot
    cut = extract_foreground(photo(BALL, RED * (1 - fade) + fade, 1.0, quality))
    assert iou(cut.rgba[..., 3], BALL) > 0.999
    assert cut.warnings == ()


@pytest.mark.parametrize("quality", [None, 85])
def test_soft_contact_shadow_is_removed(quality):
    box = coverage(lambda draw, s: draw.rectangle([96 * s, 80 * s, 224 * s, 240 * s], fill=255))
    shadow = ndimage.gaussian_filter(coverage(ellipse(80, 228, 264, 260)), 8)[..., None] * 0.4
    picture = photo(box, RED, 1 - shadow, quality)
    assert iou(np.abs(picture[..., 1] - 1) > 0.02, box) < 0.75  # what a mere threshold would give
    cut = extract_foreground(picture)
    assert iou(cut.rgba[..., 3], box) > 0.97
    assert cut.warnings == ("the picture: a soft shadow was removed",)


@pytest.mark.parametrize("quality", [None, 85])
def test_faintly_shaded_white_object_is_neither_background_nor_shadow(quality):
    """A white bottle on white: 3 to 15 % darker than the background, shaded without an edge inside."""
    bright = (0.97 - 0.12 * np.abs(2 * COLUMNS - 1) ** 2 - 0.06 * ROWS)[..., None]
    bottle = coverage(lambda draw, s: draw.rectangle([90 * s, 50 * s, 230 * s, 270 * s], fill=255))
    cut = extract_foreground(photo(bottle, bright, 1.0, quality))
    assert iou(cut.rgba[..., 3], bottle) > 0.98
    assert (cut.rgba[60:260, 100:220, 3] == 1).all()
    assert cut.warnings == ()


@pytest.mark.parametrize("file", ["gso/MK7.glb", "ycb/025_mug.glb"])
@pytest.mark.parametrize("quality", [None, 85])
def test_real_scans_shown_on_white(data_dir, file, quality):
    """A white bottle, and a mug with a handle: shaded renders on white give their own silhouettes back."""
    mesh = read_mesh(data_dir / "objects" / "eval" / file).normalized()
    cameras = rig_cameras((0.0, 90.0))
    for picture in shade(render_views(mesh, cameras, SIDE, supersample=3), cameras).permute(0, 2, 3, 1).numpy():
        cut = extract_foreground(photo(picture[..., 3], picture[..., :3], 1.0, quality))
        alpha, truth = cut.rgba[..., 3], picture[..., 3]
        assert iou(alpha, truth) > 0.985
        assert np.abs(alpha - truth).mean() < 0.004


def test_thin_rods_survive():
    rods = coverage(
        lambda draw, s: (
            draw.line([48 * s, 48 * s, 272 * s, 160 * s], fill=255, width=3 * s),
            draw.rectangle([80 * s, 224 * s, 240 * s, 248 * s], fill=255),
            draw.rectangle([144 * s, 80 * s, 146 * s, 240 * s], fill=255),
        )
    )
    alpha = extract_foreground(photo(rods, np.array([0.3, 0.2, 0.1]), 1.0)).rgba[..., 3]
    assert iou(alpha, rods) > 0.999
    assert np.abs(alpha - rods).max() < 0.12


def test_alpha_is_used_as_it_is():
    rgba = np.concatenate([TEXTURE, BALL[..., None]], axis=-1).astype(np.float32)
    cut = extract_foreground(rgba)
    assert cut.method == "alpha"
    assert cut.warnings == ()
    np.testing.assert_array_equal(cut.rgba[..., :3], rgba[..., :3])
    np.testing.assert_array_equal(cut.rgba[..., 3], np.where(BALL > 0.02, BALL, 0))


def test_rounded_screenshot_corners_are_no_cut_out():
    rgba = photo(BALL, RED, 1.0)
    rgba[:3, :3, 3] = rgba[-3:, -3:, 3] = 0
    assert extract_foreground(rgba).method == "plain"
    assert extract_foreground(rgba, method="alpha").method == "alpha"


def test_fully_transparent_and_nothing_found():
    with pytest.raises(TriptychError, match="fully transparent"):
        extract_foreground(np.zeros((40, 40, 4), dtype=np.float32))
    with pytest.raises(TriptychError, match="no object was found in the front view"):
        extract_foreground(np.ones((40, 40, 4), dtype=np.float32), label="the front view")
    with pytest.raises(TriptychError, match="unknown foreground method 'magic'"):
        extract_foreground(np.ones((40, 40, 4), dtype=np.float32), method="magic")


def test_tiny_object_is_an_error_and_a_small_one_a_warning():
    with pytest.raises(TriptychError, match="only 12 pixels large"):
        extract_foreground(photo(coverage(ellipse(100, 100, 112, 112)), RED, 1.0))
    cut = extract_foreground(photo(coverage(ellipse(100, 100, 140, 140)), RED, 1.0))
    assert [w for w in cut.warnings if "only 40 pixels" in w]


def test_an_object_cut_by_the_border_is_reported():
    cut = extract_foreground(photo(coverage(ellipse(150, 60, 400, 240)), RED, 1.0))
    assert cut.warnings == ("the picture: the object touches the right border and may be cut off there",)
    assert cut.box[2] == SIDE


def test_several_objects_are_kept_and_specks_are_not():
    two = coverage(lambda draw, s: (ellipse(30, 30, 150, 150)(draw, s), ellipse(190, 160, 290, 300)(draw, s)))
    speck = coverage(ellipse(260, 40, 268, 48))
    cut = extract_foreground(photo(np.maximum(two, speck), RED, 1.0))
    assert iou(cut.rgba[..., 3], two) > 0.999
    assert cut.rgba[44, 264, 3] == 0
    assert [w for w in cut.warnings if "1 speck under 1% of the object removed" in w]
    assert [w for w in cut.warnings if "2 separate objects" in w]


def noise_picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    scene = ndimage.gaussian_filter(rng.random((SIDE, SIDE, 3)), (6, 6, 0))
    return photo(BALL, RED, (scene - scene.min()) / np.ptp(scene))


def test_busy_background_without_the_extra(monkeypatch):
    monkeypatch.setattr("triptych.images.foreground.matting_available", lambda: False)
    assert fit_plain_background(noise_picture()[..., :3]).share < 0.5
    for method in ("auto", "plain"):
        with pytest.raises(TriptychError, match=r'not plain.*pip install "triptych\[matting\]"'):
            extract_foreground(noise_picture(), method=method)
    monkeypatch.setitem(sys.modules, "rembg", None)
    with pytest.raises(TriptychError, match=r'not installed: pip install "triptych\[matting\]"'):
        extract_foreground(noise_picture(), method="matting")


def fake_rembg(monkeypatch, remove):
    module = types.ModuleType("rembg")
    module.remove = remove
    monkeypatch.setitem(sys.modules, "rembg", module)


def test_matting_is_taken_for_a_busy_background(monkeypatch):
    seen = []

    def remove(picture, only_mask):
        seen.append((picture.mode, picture.size, only_mask))
        return Image.fromarray(np.rint(BALL * 255).astype(np.uint8))

    fake_rembg(monkeypatch, remove)
    cut = extract_foreground(noise_picture())
    assert cut.method == "matting"
    assert seen == [("RGB", (SIDE, SIDE), True)]
    assert iou(cut.rgba[..., 3], BALL) == 1
    edge = (BALL > 0.2) & (BALL < 1)
    mixed = np.abs(noise_picture()[..., :3] - RED)[edge].mean()
    assert np.abs(cut.rgba[..., :3] - RED)[edge].mean() < 0.25 * mixed


def test_failed_model_download_is_a_sentence(monkeypatch):
    def remove(picture, only_mask):
        raise ConnectionError("host not found")

    fake_rembg(monkeypatch, remove)
    with pytest.raises(TriptychError, match="matting model could not be loaded or run .host not found.; check the net"):
        extract_foreground(noise_picture())


def test_decontaminate_recovers_the_colour_exactly_where_it_can():
    rgb = photo(BALL, RED, (0.1, 0.6, 0.9))[..., :3]
    clean = decontaminate(rgb, BALL)
    edge = (BALL > 0.3) & (BALL < 1)
    assert np.abs(clean - RED)[edge].max() < 0.04
    assert np.abs(rgb - RED)[edge].max() > 0.3


def test_alpha_box_is_exact_to_a_fraction_of_a_pixel():
    hard = np.zeros((10, 12), dtype=np.float32)
    hard[2:7, 3:9] = 1
    assert alpha_box(hard) == (3, 2, 9, 7)
    for shift in (0.0, 0.2, 0.5, 0.8):
        soft = coverage(lambda draw, s, x=20 + shift: draw.rectangle([x * s, 30 * s, 99 * s, 120 * s - 1], fill=255))
        assert abs(alpha_box(soft)[0] - (20 + round(8 * shift) / 8)) < 0.2
