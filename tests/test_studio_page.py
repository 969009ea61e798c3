"""The studio page in a real browser on a real ComfyUI: a sentence or pictures in, a textured mesh out, errors as
sentences. Views are drawn by the embedded model, or, where it is not there, by a random one of its kind."""

import io
import json
import zipfile

import numpy as np
import pytest
from comfy_server import find_comfy, server_with_flux
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

RECONSTRUCT, TEXTURE, DRAW = "Triptych_Reconstruct", "Triptych_TextureMesh", "Triptych_FluxViews"
IDLE = "document.querySelector('#make').disabled === false"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    built_web()
    with server_with_flux(tmp_path_factory.mktemp("comfy")) as running:
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
    page.wait(IDLE, timeout_s=900)
    return page.evaluate("document.querySelector('#error').textContent")


def put(page, **values):
    for name, value in values.items():
        page.evaluate(f"document.getElementById({name!r}).value = {json.dumps(str(value))}")


def text(page, name):
    return page.evaluate(f"document.getElementById({name!r}).textContent")


def say(page, sentence):
    put(page, sentence=sentence)
    page.evaluate("document.getElementById('sentence').dispatchEvent(new Event('input'))")


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
    page.wait("document.getElementById('server').textContent.startsWith('Connected')")
    assert text(page, "plan") == "" and page.evaluate("document.getElementById('sheet').hidden") is True
    page.click("#make")
    assert text(page, "error") == "Put in at least one picture of the object, or write what it is."
    page.keep("studio_start")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, textarea')].filter(e => !(e.ariaLabel ||"
        " e.textContent.trim() || e.closest('label'))).map(e => e.outerHTML)"
    )
    assert unnamed == []


def test_the_plan_says_what_will_be_drawn(page, pictures):
    """One picture is completed unless the user decides otherwise; four are not; a sentence alone draws all."""
    say(page, "a red chair")
    assert text(page, "plan") == "All four views are drawn from the sentence, then the mesh is made."
    page.give_files(".slot[data-side=front] input", pictures["front"])
    page.wait("document.querySelectorAll('.slot.filled').length === 1")
    assert text(page, "plan") == "The left, back and right will be drawn to match the front, then the mesh is made."
    page.give_files(".slot[data-side=back] input", pictures["back"])
    page.wait("document.querySelectorAll('.slot.filled').length === 2")
    assert text(page, "plan") == "The mesh is made from the front and back alone. The sentence is not used."
    page.click("#complete")
    assert text(page, "plan").startswith("The left and right will be drawn to match the front and back")
    page.click("#complete")
    for side in ("front", "back"):
        page.click(f".slot[data-side={side}] button")
    say(page, "")
    assert text(page, "plan") == "" and page.evaluate("document.querySelectorAll('.slot.filled').length") == 0


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


def clear(page):
    page.evaluate("document.querySelectorAll('.slot.filled button').forEach(button => button.click())")


def sheet_of(page):
    """The address of the drawn sheet once the browser has it."""
    page.wait("!document.getElementById('sheet').hidden && document.querySelector('#sheet img').naturalWidth > 0")
    return page.evaluate("document.querySelector('#sheet img').src")


def test_a_sentence_becomes_views_and_a_mesh(page, server):
    clear(page)
    say(page, "a red zzqx chair")
    put(page, quality="quick", seed=7, view_seed=3, view_steps=2, steps=2, texture_size=256, target_faces=1500)
    page.evaluate(
        "window.early = false; new MutationObserver(() => { early ||= !sheet.hidden && make.disabled; }).observe("
        "document.getElementById('sheet'), {attributes: true}); 0"
    )
    page.click("#make")
    assert settle(page) == ""
    sheet_of(page)
    assert page.evaluate("early") is True, "the views are shown before the mesh is there"
    entry, _ = last_job(server)
    graph = entry["prompt"][2]
    inputs = next(node["inputs"] for node in graph.values() if node["class_type"] == DRAW)
    assert (inputs["prompt"], inputs["seed"], inputs["steps"], inputs["rerolls"]) == ("a red zzqx chair", 3, 2, 0)
    assert "LoadImage" not in {node["class_type"] for node in graph.values()}
    warnings = page.evaluate("[...document.querySelectorAll('#warnings li')].map(item => item.textContent)")
    assert any("zzqx" in warning for warning in warnings), "a word that the model does not know"
    assert page.evaluate("document.getElementById('warnings').hidden") is False
    assert not any(warning in text(page, "report") for warning in warnings)
    assert 50 < page.evaluate("studio.viewer.model.triangles") <= 1500
    reached = (
        "(at => document.elementFromPoint(at.x + at.width / 2, at.y + at.height / 2) === make)"
        "(document.getElementById('make').getBoundingClientRect())"
    )
    assert page.evaluate(reached) is True, "Make stays in reach, whatever the form shows"
    page.keep("studio_sentence")


def test_other_views_are_drawn_alone_and_then_used(page, server):
    first = sheet_of(page)
    page.click("#reroll")
    page.wait("document.querySelector('#reroll').disabled")
    assert settle(page) == ""
    page.wait(f"document.querySelector('#sheet img').src !== {first!r}")
    seed = int(page.evaluate("document.getElementById('view_seed').value"))
    entry, _ = last_job(server)
    classes = {node: content["class_type"] for node, content in entry["prompt"][2].items()}
    assert seed != 3 and {classes[node] for node in entry["outputs"]} == {"Triptych_LoadFlux", DRAW, "PreviewImage"}
    page.click("#make")
    assert settle(page) == ""
    _, cached = last_job(server)
    assert DRAW in cached and RECONSTRUCT not in cached, "what was drawn is what the mesh is made of"


def test_one_photo_gets_its_other_sides(page, server, pictures):
    page.give_files(".slot[data-side=front] input", pictures["front"])
    page.wait("document.querySelectorAll('.slot.filled').length === 1")
    page.evaluate("document.getElementById('complete').checked || document.getElementById('complete').click()")
    say(page, "")
    page.click("#make")
    assert settle(page) == ""
    sheet_of(page)
    entry, _ = last_job(server)
    drawn = next(output["triptych_views"][0] for output in entry["outputs"].values() if "triptych_views" in output)
    assert "front" not in drawn["generated"] and drawn["generated"]
    page.keep("studio_photo")
    put(page, texture_size=512)
    page.click("#make")
    assert settle(page) == ""
    _, cached = last_job(server)
    assert {DRAW, RECONSTRUCT} <= cached and TEXTURE not in cached


def test_every_text_has_its_chinese(page, server, tmp_path):
    page.call("Network.setUserAgentOverride", userAgent="test", acceptLanguage="zh-CN")
    page.goto(f"http://127.0.0.1:{server.port}/triptych")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    page.wait("document.getElementById('server').textContent.startsWith('已连接')")
    say(page, "a red chair")
    assert text(page, "plan") == "先根据这句话绘制四个视图，再生成网格。"
    page.evaluate("document.getElementById('adjust').open = true")
    page.keep("studio_chinese")
    untranslated = page.evaluate(
        "[...document.querySelectorAll('header *, form *, h2, #none, #empty p')].filter(e => !e.children.length &&"
        " e.textContent.trim() && !/[\\u4e00-\\u9fff]|^[\\d×◐⟳.]+$/.test(e.textContent)).map(e => e.textContent)"
    )
    assert untranslated == ["Triptych"]
    labels = page.evaluate("[...document.querySelectorAll('form [aria-label]')].map(e => e.ariaLabel)")
    assert len(labels) >= 9 and all(any("\u4e00" <= letter <= "\u9fff" for letter in label) for label in labels)
    page.call("Network.setUserAgentOverride", userAgent="test", acceptLanguage="en-GB")
    page.goto(f"http://127.0.0.1:{server.port}/triptych")
    assert text(page, "make") == "Make"


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
    put(page, quality="quick", steps=100000)
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
