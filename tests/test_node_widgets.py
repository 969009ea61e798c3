"""What the nodes say and take in the editor of a real ComfyUI, in classic nodes and in Nodes 2.0."""

import json
import time

import pytest
from comfy_server import ComfyServer, find_comfy
from PIL import Image, ImageDraw
from web_page import Page, built_web, needs_browser

from triptych.geometry.files import write_mesh
from triptych.procedural import sample_object

COMFY = find_comfy()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    needs_browser,
    pytest.mark.skipif(isinstance(COMFY, str), reason=str(COMFY)),
]
READY = "window.app?.graph && app.canvas && window.triptychViewers && window.LiteGraph?.registered_node_types['{}']"


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    built_web()
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as running:
        # Else the frontend greets a new user with its templates, over the graph.
        running.client().post("/settings", {"Comfy.TutorialCompleted": True})
        yield running


@pytest.fixture(params=["classic", "vue"])
def page(request, comfy, tmp_path):
    comfy.client().post("/settings", {"Comfy.VueNodes.Enabled": request.param == "vue"})
    with Page(tmp_path / "profile", width=1600, height=1000) as opened:
        opened.goto(f"http://127.0.0.1:{comfy.port}/", until=READY.format("Triptych_PrepareViews"), timeout_s=600)
        assert opened.evaluate("!!LiteGraph.vueNodesMode") is (request.param == "vue")
        opened.kind = request.param
        yield opened


def build(page, nodes, links):
    """A graph in the editor: {name: (type, {widget: value})} in columns, and (from, output, to, input) by names; the
    nodes are then ``at.name`` in the page."""
    page.evaluate("app.graph.clear(); window.at = {}; app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 60]; 0")
    for number, (name, (kind, values)) in enumerate(nodes.items()):
        page.evaluate(
            f"(() => {{ const node = LiteGraph.createNode('{kind}'); node.pos = [40 + 380 * {number}, 40];"
            f" app.graph.add(node); at.{name} = node; for (const [key, value] of Object.entries({json.dumps(values)}))"
            " node.widgets.find(widget => widget.name === key).value = value; })()"
        )
    for source, output, target, name in links:
        page.evaluate(f"at.{source}.connect({output}, at.{target}, at.{target}.findInputSlot('{name}')) && 0")


def queued(page, server):
    """Queues the graph and waits for its end; its entry in the history."""
    known = set(server.client().get("/history"))
    page.evaluate("app.queuePrompt(0, 1)")
    end = time.monotonic() + 900
    while not (new := set(history := server.client().get("/history")) - known):
        assert time.monotonic() < end, page.problems
        time.sleep(0.3)
    entry = history[new.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]["messages"]
    return entry


def text(name):
    """The texts that are in sight in a node, in the page."""
    area = f"at.{name}.widgets?.find(widget => widget.name === 'triptych_text')?.element"
    return (
        f"(a => a?.isConnected && a.getBoundingClientRect().height > 20 && a.checkVisibility() ? a.value : '')({area})"
    )


def oval(path, width):
    """A blue oval, ``width`` x 160, on white."""
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((128 - width // 2, 48, 128 + width // 2, 208), fill=(30, 60, 200))
    picture.save(path)
    return path.read_bytes()


VALUES = "JSON.stringify(app.graph.serialize().nodes.map(node => [node.type, node.widgets_values ?? []]))"
PROMPT = "app.graphToPrompt().then(prompt => JSON.stringify(prompt.output))"


def test_a_warning_is_shown_on_its_node_and_goes_with_its_cause(page, comfy, tmp_path):
    for name, width in (("front.png", 80), ("wide.png", 140), ("same.png", 80)):
        comfy.client().upload(name, oval(tmp_path / name, width))
    build(
        page,
        {
            "front": ("LoadImage", {"image": "front.png"}), "back": ("LoadImage", {"image": "wide.png"}),
            "views": ("Triptych_PrepareViews", {"size": 64}), "shown": ("PreviewImage", {}),
        },
        [("front", 0, "views", "front"), ("back", 0, "views", "back"), ("views", 1, "shown", "images")],
    )  # fmt: skip
    values, prompt, height = page.evaluate(VALUES), page.evaluate(PROMPT), page.evaluate("at.views.size[1]")
    assert page.evaluate(text("views")) == ""
    entry = queued(page, comfy)
    sentence = next(output["text"][0] for output in entry["outputs"].values() if "text" in output)
    assert "front" in sentence and "back" in sentence
    page.wait(f"{text('views')} === {json.dumps(sentence)}")
    page.keep(f"node_text_{page.kind}")
    assert (page.evaluate(VALUES), page.evaluate(PROMPT)) == (values, prompt)
    # It is read only, and no text of a node is markup.
    assert page.evaluate("document.querySelector('.triptych-text').readOnly") is True

    saved = page.evaluate("JSON.stringify(app.graph.serialize())")
    page.evaluate(f"app.loadGraphData({saved})")
    page.wait("app.graph._nodes.length === 4")
    for kind, name in (("Triptych_PrepareViews", "views"), ("PreviewImage", "shown")):
        page.evaluate(f"at.{name} = app.graph._nodes.find(node => node.type === '{kind}'); 0")
    page.evaluate("at.back = app.graph._nodes.filter(node => node.type === 'LoadImage')[1]; 0")
    page.wait(f"{text('views')} === {json.dumps(sentence)}")

    page.evaluate("at.back.widgets.find(widget => widget.name === 'image').value = 'same.png'; 0")
    queued(page, comfy)
    page.wait("!at.views.widgets.some(widget => widget.name === 'triptych_text')")
    page.wait("!document.querySelector('.triptych-text')")
    page.keep(f"node_text_gone_{page.kind}")
    if page.kind == "classic":
        # The preview that came meanwhile has its room, the text's is given back.
        assert page.evaluate("at.views.size[1]") >= height
    assert page.evaluate(VALUES) == values.replace("wide.png", "same.png")


def test_numbers_and_sizes_are_shown_and_a_long_text_scrolls(page, comfy, tmp_path):
    write_mesh(sample_object(), tmp_path / "toy.glb")
    comfy.client().upload("toy.glb", (tmp_path / "toy.glb").read_bytes())
    build(
        page,
        {"mesh": ("Triptych_LoadMesh", {"file": "toy.glb"}), "table": ("Triptych_CompareMeshes", {"samples": 1000})},
        [("mesh", 0, "table", "mesh"), ("mesh", 0, "table", "reference")],
    )
    queued(page, comfy)
    page.wait(f"{text('mesh')}.includes({json.dumps(f'{len(sample_object().faces):,} faces')})")
    page.wait(f"{text('table')}.startsWith('Chamfer distance') && {text('table')}.includes('volume IoU')")
    page.wait("window.triptychViewers.get(at.table)?.host.dataset.ready === 'yes'")
    page.keep(f"node_table_{page.kind}")
    heights = page.evaluate(
        "['mesh', 'table'].map(name => at[name].widgets.find(w => w.name === 'triptych_text').element)"
        ".map(area => [area.clientHeight, area.scrollHeight])"
    )
    assert all(inner >= whole for inner, whole in heights), "nothing is cut off"
    viewer = page.evaluate("triptychViewers.get(at.table).host.getBoundingClientRect().height")
    assert viewer > 200
    page.evaluate("at.mesh.onExecuted({ text: ['<b>bold</b>\\n' + 'word '.repeat(2000)] })")
    page.wait(f"{text('mesh')}.startsWith('<b>bold</b>')")
    area = "at.mesh.widgets.find(w => w.name === 'triptych_text').element"
    page.wait(f"{area}.scrollHeight > {area}.clientHeight + 100 && {area}.clientHeight < 200")
    assert page.evaluate(f"{area}.children.length") == 0
