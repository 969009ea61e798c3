"""The studio page in a real browser on a real ComfyUI: pictures in, a textured mesh out, errors as sentences."""

import io
import json
import zipfile

import numpy as np
import pytest
from comfy_server import ComfyServer, find_comfy
from web_page import Page, built_web, drawn, needs_browser

from triptych.geometry.files import read_mesh
from triptych.procedural import sample_views

FOUND = find_comfy()
pytestmark = [
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_browser,
]

RECONSTRUCT, TEXTURE = "Triptych_Reconstruct", "Triptych_TextureMesh"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    built_web()
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile")) as opened:
        opened.goto(f"http://127.0.0.1:{server.port}/triptych", timeout_s=300)
        yield opened


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = {}
    for name, picture in sample_views(256).items():
        paths[name] = folder / f"{name}.png"
        picture.save(paths[name])
    return paths


def settle(page):
    """Until the job has ended and its result is drawn, or a sentence says why not."""
    page.wait("document.querySelector('#make').disabled === false", timeout_s=900)
    return page.evaluate("document.querySelector('#error').textContent")


def put(page, **values):
    for name, value in values.items():
        page.evaluate(f"document.getElementById({name!r}).value = {json.dumps(str(value))}")


def last_job(server):
    history = server.client().get("/history")
    entry = list(history.values())[-1]
    cached = {
        node for name, data in entry["status"]["messages"] if name == "execution_cached" for node in data["nodes"]
    }
    return entry, {entry["prompt"][2][node]["class_type"] for node in cached if node in entry["prompt"][2]}


def test_the_page_explains_itself_before_anything_is_made(page):
    assert page.evaluate("document.title") == "Triptych studio"
    assert page.evaluate("document.querySelectorAll('#slots .slot').length") == 4
    assert page.evaluate("document.getElementById('sentence').disabled") is True
    assert "not part of this version" in page.evaluate("document.getElementById('sentence-why').textContent")
    page.wait("document.getElementById('server').textContent.startsWith('Connected')")
    page.click("#make")
    assert page.evaluate("document.getElementById('error').textContent").startswith("Put in at least one picture")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select')].filter(e => !(e.ariaLabel || e.textContent.trim() ||"
        " e.closest('label'))).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_pictures_become_a_textured_mesh_that_is_shown_and_downloaded(page, server, pictures):
    page.give_files(".slot[data-side=front] input", pictures["front"], pictures["left"], pictures["back"])
    page.wait("document.querySelectorAll('.slot.filled').length === 3")
    put(page, quality="quick", seed=7, steps=2, texture_size=256, target_faces=1500)
    page.evaluate(
        "window.seen = []; new MutationObserver(() => seen.push([document.getElementById('stage').textContent,"
        " document.querySelector('#preview img').naturalWidth])).observe(document.getElementById('result'),"
        " {subtree: true, childList: true, characterData: true, attributes: true}); 0"
    )
    page.click("#make")
    page.wait("!document.getElementById('preview').hidden", timeout_s=900)
    page.keep("studio_progress")
    assert settle(page) == ""
    assert page.evaluate("seen.some(([stage]) => /Making the shape: \\d+ %/.test(stage))")
    assert page.evaluate("Math.max(...seen.map(([, width]) => width))") == 256
    shot = page.keep("studio_result")
    assert shot.shape == (860, 1280, 3)
    pixels = page.canvas("studio.viewer.canvas")
    background = pixels[5, pixels.shape[1] // 2, :3]
    assert 0.03 < drawn(pixels, background).mean() < 0.95
    assert page.evaluate("studio.viewer.model.hasTexture") is True
    faces = page.evaluate("studio.viewer.model.triangles")
    assert 100 < faces <= 1500

    entry, _ = last_job(server)
    ((exported),) = [
        output["3d"][0]
        for node, output in entry["outputs"].items()
        if entry["prompt"][2][node]["class_type"] == "Triptych_ExportMesh"
    ]
    mesh = read_mesh(server.output / exported["subfolder"] / exported["filename"])
    assert len(mesh.faces) == faces
    files = saved(page, "obj")
    stem = exported["filename"].removesuffix(".obj")
    assert {f"{stem}.obj", f"{stem}.mtl"} <= set(files) and any(name.endswith(".png") for name in files)
    assert files[f"{stem}.obj"] == (server.output / exported["subfolder"] / exported["filename"]).read_bytes()


def saved(page, kind):
    """The files of the zip that the download menu offers."""
    numbers = page.evaluate(
        "(async () => { const make = URL.createObjectURL; let kept; URL.createObjectURL = blob => { kept = blob;"
        " return make.call(URL, blob); };"
        f" await studio.viewer.save({kind!r}); URL.createObjectURL = make;"
        " return [...new Uint8Array(await kept.arrayBuffer())]; })()"
    )
    with zipfile.ZipFile(io.BytesIO(bytes(numbers))) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_change_of_the_texture_computes_only_the_texture_again(page, server):
    put(page, texture_size=512)
    page.click("#make")
    assert settle(page) == ""
    entry, cached = last_job(server)
    assert entry["status"]["status_str"] == "success"
    assert RECONSTRUCT in cached and TEXTURE not in cached


def test_an_error_is_shown_as_its_sentence(page, tmp_path):
    (tmp_path / "front.png").write_bytes(b"this is not a picture")
    page.give_files(".slot[data-side=front] input", tmp_path / "front.png")
    page.click("#make")
    sentence = settle(page)
    assert sentence and "Traceback" not in sentence and "\n  File" not in sentence
    page.keep("studio_error")
    assert page.evaluate("document.getElementById('error').hidden") is False


def test_a_refused_input_names_the_node(page, pictures):
    page.give_files(".slot[data-side=front] input", pictures["front"])
    put(page, steps=100000)
    page.evaluate("document.getElementById('form').noValidate = true")
    page.click("#make")
    sentence = settle(page)
    put(page, steps=2)
    assert sentence.startswith("Making the shape: ") and "100000" in sentence


def test_earlier_results_have_pictures_and_open_again_and_compare(page, server):
    page.goto(f"http://127.0.0.1:{server.port}/triptych", timeout_s=300)
    page.wait("document.querySelectorAll('#tiles li').length >= 2")
    page.wait("document.querySelectorAll('#tiles img').length >= 2", timeout_s=300)
    page.click("#tiles .open")
    page.wait("studio.viewer.model && document.querySelector('#viewer').dataset.ready === 'yes'")
    page.evaluate("document.querySelectorAll('#tiles .against:not([hidden])')[0].click()")
    page.wait("studio.viewer.other")
    shot = page.keep("studio_compare")
    assert np.ptp(shot) > 100
    page.click("#theme")
    page.keep("studio_other_theme")
    page.size(420, 900, mobile=True)
    page.keep("studio_phone")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.size(1280, 860)


def test_nothing_was_loaded_from_elsewhere(page, server):
    own = f"http://127.0.0.1:{server.port}/"
    assert [url for url in page.requests if not url.startswith((own, "blob:", "data:"))] == []
    assert page.problems == []
