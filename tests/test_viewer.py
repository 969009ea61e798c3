"""The viewer page: whole, self-contained, true to the mesh, and drawn right by a real browser."""

import base64
import json
import re

import numpy as np
import pytest
from browser import CHROMIUM, SOFTWARE_GL, Browser

from triptych.errors import TriptychError
from triptych.geometry.mesh import Material, Mesh
from triptych.procedural import sample_object
from triptych.viewer import export, write_viewer


@pytest.fixture(autouse=True)
def built_in_page(monkeypatch, tmp_path):
    """These tests are about the page that needs no build; tests/test_widget.py has the one with the built module."""
    monkeypatch.setattr(export, "BUILT_MODULE", tmp_path / "not" / "built.mjs")


def scene_of(page):
    return json.loads(re.search(r'<script type="application/json" id="scene">(.*?)</script>', page, re.S)[1])


def decoded(text, dtype, width):
    return np.frombuffer(base64.b64decode(text), dtype=dtype).reshape(-1, width)


def quad(**changes):
    """A unit square at z = 0 that faces +Z, with a UV per vertex."""
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], dtype=np.float32)
    uv = (vertices[:, :2] + 0.5).astype(np.float32)
    return Mesh(vertices=vertices, faces=np.array([[0, 1, 2], [0, 2, 3]]), uv=uv).replace(**changes)


def test_the_page_needs_nothing_from_anywhere(tmp_path):
    page = write_viewer(sample_object(), tmp_path / "viewer.html", title="Toy").read_text(encoding="utf-8")
    assert "http://" not in page and "https://" not in page and "@import" not in page
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*\b(?:src|href)=(?!\"data:)", page)
    assert "default-src 'none'" in page
    assert "__TRIPTYCH" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["viewer.html"]


def test_the_arrays_are_those_of_the_mesh(tmp_path):
    mesh = sample_object()
    (shown,) = scene_of(write_viewer(mesh, tmp_path / "v.html").read_text(encoding="utf-8"))["objects"]
    faces = decoded(shown["indices"], "<u4", 3)
    np.testing.assert_array_equal(decoded(shown["positions"], "<f4", 3)[faces], mesh.vertices[mesh.faces])
    colors = decoded(shown["colors"], "u1", 4)[faces] / 255
    np.testing.assert_allclose(colors, mesh.colors[mesh.faces], atol=0.5 / 255 + 1e-6)
    normals = decoded(shown["normals"], "i1", 4)[faces][..., :3] / 127
    np.testing.assert_allclose(normals, mesh.vertex_normals()[mesh.faces], atol=0.6 / 127)
    assert (shown["vertices"], shown["triangles"]) == (len(mesh.vertices), len(mesh.faces))
    np.testing.assert_allclose(shown["bounds"], mesh.bounds)


def test_a_vertex_on_a_uv_seam_is_repeated_and_every_corner_keeps_its_uv(tmp_path):
    uv = np.array([[0, 0], [1, 0], [1, 1], [0.2, 0.3], [0.4, 0.9], [0.1, 0.7]], dtype=np.float32)
    mesh = quad(uv=uv, uv_faces=np.array([[0, 1, 2], [3, 4, 5]]))
    (shown,) = scene_of(write_viewer(mesh, tmp_path / "v.html").read_text(encoding="utf-8"))["objects"]
    faces = decoded(shown["indices"], "<u4", 3)
    positions, seen_uv = decoded(shown["positions"], "<f4", 3), decoded(shown["uv"], "<f4", 2)
    assert len(positions) == 6 and shown["vertices"] == 4
    np.testing.assert_array_equal(positions[faces], mesh.vertices[mesh.faces])
    np.testing.assert_allclose(seen_uv[faces] * [1, -1] + [0, 1], mesh.corner_uv(), atol=1e-6)


def test_faces_are_grouped_by_material(tmp_path):
    materials = (Material(base_color=(1, 0, 0, 1)), Material(), Material(roughness=0.25, metallic=1.0))
    mesh = quad(materials=materials, face_materials=np.array([2, 0]))
    (shown,) = scene_of(write_viewer(mesh, tmp_path / "v.html").read_text(encoding="utf-8"))["objects"]
    assert shown["groups"] == [{"material": 0, "start": 0, "count": 3}, {"material": 2, "start": 3, "count": 3}]
    np.testing.assert_array_equal(decoded(shown["indices"], "<u4", 3), [[0, 2, 3], [0, 1, 2]])
    assert shown["materials"][2] == {"color": [1.0, 1.0, 1.0], "metallic": 1.0, "roughness": 0.25, "texture": None}


def test_names_and_titles_are_text_never_markup(tmp_path):
    evil = "</script><script>alert(1)</script>&"
    path = write_viewer([quad(), quad()], tmp_path / "v.html", title=evil, names=[evil, "second"])
    page = path.read_text(encoding="utf-8")
    assert [shown["name"] for shown in scene_of(page)["objects"]] == [evil, "second"]
    assert "<script>alert" not in page
    assert page.count("&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 2


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        (quad(faces=np.zeros((0, 3), dtype=np.int64)), "no faces"),
        (quad(vertices=np.full((4, 3), np.nan, dtype=np.float32)), "not finite"),
        (quad(faces=np.array([[0, 1, 9]])), r"point to 0\.\.9, but there are 4"),
        (quad(faces=np.array([[0, 1, -1]])), r"point to -1\.\.1"),
        (quad(uv_faces=np.array([[0, 1, 7], [0, 1, 2]])), "uv_faces point to 0..7"),
        (quad(face_materials=np.array([0, 3])), "face_materials go up to 3"),
    ],
)
def test_a_broken_mesh_is_one_sentence_and_no_file(tmp_path, mesh, sentence):
    with pytest.raises(TriptychError, match=sentence):
        write_viewer(mesh, tmp_path / "v.html")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_show_or_unlike_names_is_an_error(tmp_path):
    with pytest.raises(TriptychError, match="at least one mesh"):
        write_viewer([], tmp_path / "v.html")
    with pytest.raises(TriptychError, match="2 names for 1 mesh"):
        write_viewer(quad(), tmp_path / "v.html", names=["a", "b"])


def test_a_place_that_cannot_be_written_keeps_what_was_there(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TriptychError, match="cannot write"):
        write_viewer(quad(), tmp_path / "file" / "v.html")
    (tmp_path / "v.html").mkdir()
    with pytest.raises(TriptychError, match="cannot write"):
        write_viewer(quad(), tmp_path / "v.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "v.html"]
    assert (tmp_path / "file").read_text() == "mine"


# In a real browser ---------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install it to draw the page")
FRONT = "#azimuth=0&elevation=0&grid=0"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile"), *SOFTWARE_GL) as opened:
        yield opened


def pixels_of(shot, colour):
    """(n, 2) rows and columns of the pixels of one colour."""
    return np.argwhere(np.abs(shot - colour).max(axis=2) <= 1)


@needs_browser
@pytest.mark.browser
def test_a_texture_is_shown_in_its_own_colours_the_right_way_up(tmp_path, browser):
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    picture[:4], picture[4:, :4], picture[4:, 4:] = (200, 100, 50), (30, 160, 90), (60, 70, 220)
    mesh = quad(materials=(Material(base_color_texture=picture),))
    browser.open(write_viewer(mesh, tmp_path / "v.html"), FRONT + "&mode=texture")
    shot = browser.screenshot()
    found = [pixels_of(shot, colour) for colour in ((200, 100, 50), (30, 160, 90), (60, 70, 220))]
    assert min(map(len, found)) > 2000
    top, left, right = (places.mean(axis=0) for places in found)
    assert top[0] < left[0] and left[0] == pytest.approx(right[0], abs=2) and left[1] < right[1]


@needs_browser
@pytest.mark.browser
def test_the_sample_object_is_drawn_in_every_mode_and_left_is_left(tmp_path, browser):
    page = write_viewer(sample_object(), tmp_path / "v.html", title="Toy")
    browser.open(page, FRONT + "&mode=colors")
    colours = browser.screenshot()
    yellow, purple = (pixels_of(colours, colour)[:, 1] for colour in ((250, 207, 46), (122, 59, 153)))
    assert len(yellow) > 500 and len(purple) > 500 and np.median(purple) < 320 < np.median(yellow)
    body = np.s_[160:380, 260:380]
    is_drawn = np.abs(colours[body] - (23, 24, 27)).max(axis=2) > 10
    assert is_drawn.mean() > 0.8
    centre = [colours[body]]
    for mode in ("shaded", "clay", "normals", "wireframe"):
        browser.evaluate(f"document.querySelector('[data-mode={mode}]').click()")
        centre.append(browser.screenshot()[body])
    for i, first in enumerate(centre):
        for second in centre[i + 1 :]:
            assert np.abs(first - second)[is_drawn].mean() > 8
    # A normal that faces the viewer is drawn (128, 128, 255); the body's middle has one.
    assert np.abs(centre[3] - (128, 128, 255)).max(axis=2).min() <= 6
    assert browser.evaluate("document.querySelector('[data-mode=texture]').disabled") is True


@needs_browser
@pytest.mark.browser
def test_keys_pointer_and_buttons_do_what_they_say(tmp_path, browser):
    page = write_viewer([sample_object(), quad()], tmp_path / "v.html", names=["toy", "square"])
    browser.open(page, FRONT + "&mode=colors")
    front = browser.screenshot()
    browser.press("3")
    back = browser.screenshot()
    yellow = [np.median(pixels_of(shot, (250, 207, 46))[:, 1]) for shot in (front, back)]
    assert yellow[0] > 320 > yellow[1]
    browser.drag((320, 300), (320 + 225, 300))  # 0.4 degrees per pixel: a quarter turn back to the left side
    assert browser.evaluate("state.azimuth") == pytest.approx(90)
    fitted = browser.evaluate("state.distance")
    browser.press("+")
    assert browser.evaluate("state.distance") == pytest.approx(0.88 * fitted)
    browser.press("f")
    browser.press("1")
    inside = np.s_[8:440, 8:632]  # less the ring that shows the keyboard focus
    np.testing.assert_array_equal(browser.screenshot()[inside], front[inside])
    browser.press("b")
    assert browser.screenshot()[300, 40].min() > 200
    browser.evaluate("document.getElementById('object').value = 1; document.getElementById('object').onchange()")
    assert browser.evaluate("document.getElementById('triangles').textContent") == "2"
    browser.press("t")
    before = browser.evaluate("state.azimuth")
    browser.screenshot()
    assert browser.evaluate("state.azimuth") > before


@needs_browser
@pytest.mark.browser
def test_a_hundred_thousand_triangles_are_drawn(tmp_path, browser):
    side = 225
    x, y = np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side))
    vertices = np.stack([x, y, 0.1 * np.sin(9 * x) * np.cos(7 * y)], axis=-1).reshape(-1, 3).astype(np.float32)
    corner = (np.arange(side - 1)[:, None] * side + np.arange(side - 1)).reshape(-1, 1)
    steps = np.array([[0, 1, side + 1], [0, side + 1, side]])
    faces = (corner[:, None] + steps).reshape(-1, 3)
    page = write_viewer(Mesh(vertices=vertices, faces=faces), tmp_path / "v.html")
    assert len(faces) > 100_000 and page.stat().st_size < 6_000_000
    browser.open(page, FRONT)
    assert browser.evaluate("document.getElementById('triangles').textContent") == f"{len(faces):,}"
    assert (np.abs(browser.screenshot()[200:360, 240:400] - (23, 24, 27)).max(axis=2) > 30).mean() > 0.99


@needs_browser
@pytest.mark.browser
def test_without_webgl_the_page_says_so(tmp_path):
    page = write_viewer(quad(), tmp_path / "v.html")
    with Browser(tmp_path / "profile", "--disable-3d-apis") as browser:
        browser.open(page, until="!document.getElementById('message').hidden")
        sentence = browser.evaluate("document.getElementById('message').textContent")
    assert sentence.startswith("This browser cannot draw with WebGL 2 here.")
