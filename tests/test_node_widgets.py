"""What the nodes say and take in the editor of a real ComfyUI, in classic nodes and in Nodes 2.0."""

import base64
import json
import time

import numpy as np
import pytest
from comfy_server import ROOT, ComfyServer, find_comfy
from PIL import Image, ImageDraw
from web_page import Page, built_web, needs_browser

from triptych.geometry.files import write_mesh, write_obj
from triptych.geometry.mesh import Material, Mesh
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


# Load mesh takes files ------------------------------------------------------------------------------------------------


def textured(folder, colour):
    """A square with one colour as its picture, as OBJ, MTL and PNG; their paths, the OBJ first."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], np.float32)
    picture = np.full((16, 16, 3), colour, np.uint8)
    square = Mesh(
        vertices=corners,
        faces=np.array([[0, 1, 2], [0, 2, 3]]),
        uv=corners[:, :2] + 0.5,
        materials=(Material(base_color_texture=picture),),
    )
    folder.mkdir()
    return sorted(write_obj(square, folder / "square.obj"), key=lambda path: path.suffix != ".obj")


def button(page):
    """The middle of the upload button of ``at.mesh``, on the screen; its label is looked at on the way."""
    if page.kind == "vue":
        # Frontend 1.27 writes the text beside the button, later ones into it.
        label = "[...document.querySelectorAll('.lg-node *')].find(e => !e.children.length && e.textContent.trim() === "
        label += "'Upload mesh')"
        find = f"({label}?.closest('button') ?? {label}?.parentElement.querySelector('button'))"
        middle = f"(b => [b.x + b.width / 2, b.y + b.height / 2])({find}.getBoundingClientRect())"
        # It is where it stays once a click there would meet it.
        page.wait(f"{find}?.getBoundingClientRect().height > 5")
        page.wait(f"{find}.contains(document.elementFromPoint(...{middle}))")
        before = None
        while before != (before := page.evaluate(middle)):  # the node's other widgets may still find their places
            time.sleep(0.5)
        return before
    page.screenshot()  # widgets have their places once they are drawn
    return page.evaluate(
        "(() => { const node = at.mesh, widget = node.widgets.find(w => w.label === 'Upload mesh'), c = app.canvas;"
        " const b = c.canvas.getBoundingClientRect(), { scale, offset } = c.ds;"
        " return [b.x + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,"
        " b.y + (node.pos[1] + widget.y + 10 + offset[1]) * scale]; })()"
    )


def drop(page, paths, place="at.mesh"):
    """What the node answers to a drop of these files, once they are taken."""
    files = json.dumps([[path.name, base64.b64encode(path.read_bytes()).decode()] for path in paths])
    return page.evaluate(
        f"(() => {{ const data = new DataTransfer(); for (const [name, text] of {files})"
        " data.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));"
        " const event = new DragEvent('drop', { dataTransfer: data });"
        f" return [{place}.onDragOver(event), {place}.onDragDrop(event)]; }})()"
    )


def assert_shown(page, colour):
    """The preview draws the texture's colour in its middle, at last: an earlier model is there until then."""
    viewer = "window.triptychViewers.get(at.shown)"
    page.wait(f"{viewer}?.host.dataset.ready === 'yes'")
    end = time.monotonic() + 120
    while True:
        page.evaluate(f"{viewer}.set({{mode: 'texture', grid: false}}); {viewer}.state.pose.azimuth = 0;")
        page.evaluate(f"{viewer}.state.pose.elevation = 0; {viewer}.fit(); {viewer}.draw()")
        pixels = page.canvas(f"{viewer}.canvas")
        middle = pixels[pixels.shape[0] // 2, pixels.shape[1] // 2 + 5, :3]
        if np.abs(middle - colour).max() <= 3:
            return
        assert time.monotonic() < end, f"the preview shows {middle}"
        time.sleep(0.5)


FILE = "at.mesh.widgets.find(widget => widget.name === 'file')"
MESH_GRAPH = {"mesh": ("Triptych_LoadMesh", {}), "shown": ("Triptych_Preview3D", {})}


def test_an_obj_is_uploaded_with_what_belongs_to_it(page, comfy, tmp_path):
    build(page, MESH_GRAPH, [("mesh", 0, "shown", "mesh")])
    first, second = textured(tmp_path / "first", (200, 100, 50)), textured(tmp_path / "second", (40, 160, 90))
    assert {path.suffix for path in first} == {".obj", ".mtl", ".png"}
    names = []
    for files, colour in ((first, (200, 100, 50)), (second, (40, 160, 90))):
        before = page.evaluate(f"{FILE}.value ?? ''")
        page.choose_files(button(page), *files)
        page.wait(f"({FILE}.value ?? '') !== {json.dumps(before)}", timeout_s=120)
        names.append(page.evaluate(f"{FILE}.value"))
        assert page.evaluate(f"{FILE}.options.values.includes({FILE}.value)")
        entry = queued(page, comfy)
        said = next(output["text"][0] for output in entry["outputs"].values() if "text" in output)
        assert said == "4 vertices, 2 faces", "nothing was missing"
        page.wait(f"{text('mesh')} === {json.dumps(said)}")
        assert_shown(page, colour)
    page.keep(f"node_upload_{page.kind}")
    assert len(set(names)) == 2 and all(name.startswith("triptych/square-") for name in names)
    # A list that is read anew has them, and the graph's values hold the file and no button.
    offered = comfy.client().get("/object_info/Triptych_LoadMesh")["Triptych_LoadMesh"]["input"]["required"]["file"]
    assert set(names) <= set(offered[1]["options"] if offered[0] == "COMBO" else offered[0])
    kept = "app.graph.serialize().nodes.find(node => node.type === 'Triptych_LoadMesh').widgets_values"
    assert page.evaluate(kept) == [names[1], False]
    prompt = json.loads(page.evaluate(PROMPT))
    assert next(n["inputs"] for n in prompt.values() if n["class_type"] == "Triptych_LoadMesh") == {
        "file": names[1], "normalize": False
    }  # fmt: skip


def test_files_are_dropped_on_the_node_and_what_cannot_be_used_is_named(page, comfy, tmp_path):
    build(page, MESH_GRAPH, [("mesh", 0, "shown", "mesh")])
    obj, *beside = textured(tmp_path / "files", (60, 70, 220))
    notes = tmp_path / "notes.txt"
    notes.write_text("x")
    assert drop(page, [notes]) == [True, False], "ComfyUI opens what is not ours"
    kept = page.evaluate(f"{FILE}.value ?? null")
    page.give_files("input.triptych-mesh-files", notes)
    page.wait(f"{text('mesh')}.startsWith('There is no mesh among the files (notes.txt)')")
    assert page.evaluate(f"{FILE}.value ?? null") == kept
    assert drop(page, [obj, notes]) == [True, True]
    page.wait(f"{FILE}.value?.endsWith('/square.obj')")
    page.wait(f"{text('mesh')} === 'Left out, because a mesh does not use such files: notes.txt.'")
    queued(page, comfy)
    page.wait(f"/square.mtl|material/i.test({text('mesh')})")
    # What was forgotten can follow, beside the mesh that is chosen.
    name = page.evaluate(f"{FILE}.value")
    assert drop(page, beside) == [True, True]
    page.wait("at.mesh.widgets.find(w => w.type === 'button').label === 'Upload mesh'")
    assert page.evaluate(f"{FILE}.value") == name
    queued(page, comfy)
    page.wait(f"{text('mesh')} === '4 vertices, 2 faces'")
    assert_shown(page, (60, 70, 220))
    # A server that refuses says so in the node.
    page.evaluate("window.plain = window.fetch; window.fetch = async () => new Response('', { status: 413 }); 0")
    drop(page, [obj])
    page.wait(f"{text('mesh')}.includes('is larger than the server takes')")
    page.evaluate("window.fetch = window.plain; 0")
    assert page.evaluate(f"{FILE}.value") == name


# Without the web build ------------------------------------------------------------------------------------------------


def unbuilt_pack(folder):
    """This pack as it is after cloning: all of it but web/dist."""
    (folder / "web").mkdir(parents=True)
    for name in ("__init__.py", "nodes", "triptych", "locales", "workflows", "weights", "web/public"):
        (folder / name).symlink_to(ROOT / name)


def test_without_the_build_a_node_says_how_to_get_it_and_links_the_models(tmp_path):
    unbuilt_pack(tmp_path / "comfy" / "custom_nodes" / "triptych")
    mesh = textured(tmp_path / "files", (60, 70, 220))
    ready = READY.replace("window.triptychViewers", "true").format("Triptych_Preview3D")
    with ComfyServer(tmp_path / "comfy") as server, Page(tmp_path / "profile", width=1600, height=1000) as page:
        server.client().post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False})
        for path in mesh:
            server.client().upload(path.name, path.read_bytes())
        page.goto(f"http://127.0.0.1:{server.port}/", until=ready, timeout_s=600)
        assert page.evaluate("typeof triptychViewers") == "undefined"
        nodes = {"mesh": ("Triptych_LoadMesh", {"file": "square.obj"}), "shown": ("Triptych_Preview3D", {})}
        links = [("mesh", 0, "shown", "mesh"), ("mesh", 0, "file", "mesh")]
        build(page, nodes | {"file": ("Triptych_ExportMesh", {})}, links)
        values = page.evaluate(VALUES)
        host = "at.{}.widgets.find(widget => widget.name === 'triptych_fallback').element"
        page.wait(f"{host.format('shown')}.getBoundingClientRect().height > 60")
        said = page.evaluate(f"{host.format('shown')}.innerText")
        assert "not built" in said and "python install.py" in said and "Node.js" in said
        assert page.evaluate(f"{host.format('shown')}.querySelectorAll('a').length") == 0
        queued(page, server)
        page.wait(f"{host.format('file')}.querySelector('a')")
        page.keep("node_fallback")
        kinds = f"[...{host}.querySelectorAll('a')].map(a => a.download.split('.').pop())"
        assert page.evaluate(kinds.format("shown")) == ["glb"]
        assert sorted(page.evaluate(kinds.format("file"))) == ["mtl", "obj", "png"]
        fetched = f"fetch({host.format('shown')}.querySelector('a').href).then(a => a.text()).then(t => t.slice(0, 4))"
        assert page.evaluate(fetched) == "glTF"
        assert page.evaluate(VALUES) == values
        assert [problem for problem in page.problems if "triptych" in problem.lower()] == []
