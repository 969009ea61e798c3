"""The workflows as an artist meets them: opened in the editor of a real ComfyUI, in a browser, and queued there."""

import io
import json
from itertools import combinations

import numpy as np
import pytest
from comfy_server import ROOT, ComfyServer, find_comfy
from PIL import Image
from web_page import Page, drawn, needs_browser

from triptych.geometry.files import write_obj
from triptych.procedural import sample_object, sample_views

FOUND = find_comfy()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_browser,
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
]

NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
API = {name: json.loads((ROOT / "workflows" / "api" / f"{name}.api.json").read_text()) for name in NAMES}
SIDES = ("front", "left", "back", "right")
# Reconstruct shows what it is making while it runs.
PICTURED = ["Triptych_PrepareViews", "Triptych_FluxViews", "Triptych_FluxPrepare", "Triptych_FluxSplit",
            "Triptych_Reconstruct", "SaveImage"]  # fmt: skip
READY = "window.app?.graph && app.canvas && window.LiteGraph?.registered_node_types['Triptych_Reconstruct']"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as running:
        client, folder = running.client(), tmp_path_factory.mktemp("files")
        client.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False})
        for name, picture in sample_views(128).items():
            picture.save(folder / f"{name}.png")
            client.upload(f"{name}.png", (folder / f"{name}.png").read_bytes())
        for path in write_obj(sample_object(), folder / "model.obj"):
            client.upload(path.name, path.read_bytes())
        yield running


@pytest.fixture(scope="module")
def page(comfy, tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile"), width=1600, height=1000) as opened:
        opened.goto(f"http://127.0.0.1:{comfy.port}/", until=READY, timeout_s=600)
        yield opened


def load(page, name):
    """Opens a workflow as the template dialog does: its file from the server, loaded as a graph."""
    content = json.loads((ROOT / "workflows" / f"{name}.json").read_text())
    page.evaluate(f"app.loadGraphData({json.dumps(content)}, true, true, {json.dumps(name)})")
    page.wait(f"app.graph._nodes.length === {len(content['nodes'])}")
    return content


def fit(page):
    page.evaluate("app.canvas.fitViewToSelectionAnimated?.(); app.canvas.selectItems?.([]); 0")
    page.evaluate(
        "(() => { const all = app.graph._nodes, c = app.canvas, b = c.canvas.getBoundingClientRect();"
        " const x0 = Math.min(...all.map(n => n.pos[0])) - 40, y0 = Math.min(...all.map(n => n.pos[1])) - 90;"
        " const x1 = Math.max(...all.map(n => n.pos[0] + n.size[0]));"
        " const y1 = Math.max(...all.map(n => n.pos[1] + n.size[1]));"
        " c.ds.scale = Math.min(b.width / (x1 - x0 + 40), b.height / (y1 - y0 + 40));"
        " c.ds.offset = [-x0, -y0]; app.graph.setDirtyCanvas(true, true); })()"
    )


def overlaps(page):
    """Titles of the nodes that cover each other as they stand in the editor now, title bars included."""
    page.screenshot()  # nodes grow when they are drawn
    boxes = page.evaluate(
        "app.graph._nodes.map(n => [n.title, n.pos[0], n.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,"
        " n.pos[0] + n.size[0], n.pos[1] + n.size[1]])"
    )
    return [
        (one, two)
        for (one, *a), (two, *b) in combinations(boxes, 2)
        if max(a[0], b[0]) < min(a[2], b[2]) and max(a[1], b[1]) < min(a[3], b[3])
    ]


def show_pictures(page):
    """What a run would bring to the nodes that show pictures, the ones during the run included, with two lines said."""
    told = json.dumps({"images": [{"filename": "front.png", "subfolder": "", "type": "input"}], "text": ["one\ntwo"]})
    pictured = f"app.graph._nodes.filter(n => {json.dumps(PICTURED)}.includes(n.type))"
    page.evaluate(
        f"{pictured}.forEach(n => app.api.dispatchCustomEvent('executed',"
        f" {{ node: `${{n.id}}`, display_node: `${{n.id}}`, prompt_id: '', output: {told} }}))"
    )
    page.wait(f"{pictured}.every(n => n.imgs?.length)")


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_whole_and_means_what_its_api_form_says(page, comfy, name):
    content = load(page, name)
    unknown = page.evaluate(
        "app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type] || n.has_errors).map(n => n.type)"
    )
    assert unknown == []
    dialogs = page.evaluate("[...document.querySelectorAll('.p-dialog')].map(d => d.innerText)")
    assert dialogs == [], "the editor complains"
    fit(page)
    assert overlaps(page) == []
    page.keep(f"workflow_{name}")
    made = page.evaluate("app.graphToPrompt().then(p => p.output)")
    wanted = API[name]
    assert {key: node["class_type"] for key, node in made.items()} == {
        key: node["class_type"] for key, node in wanted.items()
    }
    for key, node in wanted.items():
        inputs = {k: v for k, v in made[key]["inputs"].items() if k != "upload"}
        known = {k: v for k, v in node["inputs"].items() if k != "upload"}
        assert {k: inputs.get(k) for k in known} == known, node["class_type"]
        # An input that came after the files were written has its default.
        assert set(inputs) >= set(known)
    titles = {str(node["id"]): node.get("title") for node in content["nodes"]}
    shown = page.evaluate("Object.fromEntries(app.graph._nodes.map(n => [n.id, n.title]))")
    assert all(shown[key] == title for key, title in titles.items() if title)


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another_once_the_pictures_of_a_run_are_shown(page, name):
    load(page, name)
    fit(page)
    show_pictures(page)
    fit(page)
    found = overlaps(page)
    page.keep(f"workflow_{name}_with_pictures")
    assert found == []


def test_a_workflow_is_queued_from_the_page(page, comfy):
    load(page, "views_to_obj")
    small = {
        "Triptych_PrepareViews": {"size": 128},
        "Triptych_Reconstruct": {"ensemble": 1, "steps": 1},
        "Triptych_CleanMesh": {"target_faces": 1000},
        "Triptych_TextureMesh": {"texture_size": 128},
    }
    for kind, values in small.items():
        for widget, value in values.items():
            found = f"app.graph._nodes.find(n => n.type === '{kind}').widgets.find(w => w.name === '{widget}')"
            page.evaluate(f"{found}.value = {value}; 0")
    page.evaluate("app.queuePrompt(0, 1)")
    node = "app.graph._nodes.find(n => n.type === 'Triptych_Preview3D')"
    page.wait(f"window.triptychViewers.get({node})?.host.dataset.ready === 'yes'", timeout_s=900)
    fit(page)
    assert overlaps(page) == []
    page.keep("workflow_queued")
    viewer = f"triptychViewers.get({node})"
    assert page.evaluate(f"{viewer}.model.hasTexture") is True
    page.evaluate(f"{viewer}.set({{mode: 'texture', grid: false}}); {viewer}.draw()")
    pixels = page.canvas(f"{viewer}.canvas")
    body = pixels[drawn(pixels)][:, :3]
    # The views are of yellow and purple things: a mesh without its texture is grey all over.
    assert (np.ptp(body, axis=1) > 60).mean() > 0.3
    history = comfy.client().get("/history")
    assert [entry["status"]["status_str"] for entry in history.values()] == ["success"]
    suffixes = {path.suffix for path in (comfy.output / "mesh").iterdir()}
    assert suffixes == {".obj", ".mtl", ".png"}


def test_the_templates_are_offered_under_the_packs_name(page, comfy):
    assert sorted(comfy.client().get("/workflow_templates")["triptych"]) == NAMES
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    entry = "[...document.querySelectorAll('.p-dialog *, [role=dialog] *')].find(e => !e.children.length && {})"
    page.wait(entry.format("/triptych/i.test(e.textContent)"), timeout_s=120)
    page.evaluate(f"{entry.format('/^triptych$/i.test(e.textContent.trim())')}?.click(); 0")
    page.wait(entry.format(f"e.textContent.trim().replaceAll(' ', '_') === {json.dumps(NAMES[0])}"), timeout_s=120)
    texts = page.evaluate(
        "[...document.querySelectorAll('.p-dialog *, [role=dialog] *')].filter(e => !e.children.length)"
        ".map(e => e.textContent.trim().replaceAll(' ', '_'))"
    )
    assert set(NAMES) <= set(texts)
    # Thumbnails are loaded as they come into sight; the size tells ours from the dialog's own.
    seen = "[...document.querySelectorAll('.p-dialog img, [role=dialog] img')].filter(i => i.naturalWidth === 480)"
    page.wait(f"{seen}.length >= 3", timeout_s=120)
    page.keep("workflow_templates")
    for name in NAMES:
        status, body, headers = comfy.client().request("GET", f"/api/workflow_templates/triptych/{name}.jpg")
        assert status == 200 and headers["Content-Type"] == "image/jpeg", name
        assert Image.open(io.BytesIO(body)).size == (480, 320)
