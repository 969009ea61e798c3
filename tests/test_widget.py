"""The viewer module and the node widget in a real browser: what is drawn, kept, saved and given back."""

import io
import json
import zipfile

import numpy as np
import pytest
import trimesh
from comfy_server import ComfyServer, find_comfy
from web_page import Page, Served, copy_web, drawn, needs_browser

from triptych.geometry.files import read_mesh, write_mesh
from triptych.geometry.gltf_writer import encode_glb
from triptych.geometry.mesh import Material, Mesh
from triptych.procedural import sample_object
from triptych.viewer import export, write_viewer

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200), needs_browser]

FORMATS = ("glb", "obj", "ply", "stl")
COMFY = find_comfy()

# What the extension needs of ComfyUI's frontend: nodes with DOM widgets, and the address of the API.
APP = """
export const app = { extensions: [], registerExtension(e) { this.extensions.push(e); },
  api: { apiURL: path => "/api" + path }, ui: { settings: { getSettingValue: () => "en" } } };
window.app = app;
let next = 1;
window.makeNode = (properties = {}, width = 300, height = 260) => {
  const frame = document.createElement("div");
  Object.assign(frame.style, { width: width + "px", height: height + "px", display: "inline-block" });
  const node = { id: next++, comfyClass: "Triptych_Preview3D", pos: [0, 0], size: [100, 100], properties, frame,
    setSize(size) { this.size = size; },
    addDOMWidget(name, type, element) { frame.append(element); document.body.append(frame); return {}; },
    remove() { this.onRemoved?.(); frame.remove(); } };
  for (const e of app.extensions) e.nodeCreated(node);
  return node;
};
window.viewerOf = node => triptychViewers.get(node);
"""
HOST = """<!doctype html><html lang="en"><body style="margin: 0"><script>
window.contexts = 0;
const plain = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  const made = plain.call(this, kind, ...rest);
  if (/webgl/.test(kind) && made && !this.counted) { this.counted = true; window.contexts++; }
  return made;
};
</script><script type="module">
import "./scripts/app.js";
import "./extensions/triptych/triptych.js";
import { Viewer, Stage } from "./extensions/triptych/viewer.mjs";
Object.assign(window, { Viewer, Stage });
document.documentElement.dataset.ready = "yes";
</script></body></html>"""


def quad():
    """A unit square at z = 0 that faces +Z: top orange, bottom left green, bottom right blue."""
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], dtype=np.float32)
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:32], picture[32:, :32], picture[32:, 32:] = (200, 100, 50), (30, 160, 90), (60, 70, 220)
    return Mesh(
        vertices=vertices,
        faces=np.array([[0, 1, 2], [0, 2, 3]]),
        uv=(vertices[:, :2] + 0.5).astype(np.float32),
        materials=(Material(base_color_texture=picture),),
    )


def ball():
    """A sphere of few faces with UV, whose seam repeats vertices and whose file shall look round."""
    sphere = trimesh.creation.uv_sphere(radius=0.5, count=[8, 10])
    corners = sphere.vertices[sphere.faces].reshape(-1, 3)
    return Mesh(
        vertices=sphere.vertices.astype(np.float32),
        faces=sphere.faces.astype(np.int64),
        uv=(corners[:, :2] + 0.5).astype(np.float32),
        uv_faces=np.arange(len(corners)).reshape(-1, 3),
        materials=(Material(roughness=0.8),),
    )


def without_normals(glb):
    """A GLB whose NORMAL attributes go by a name that no reader knows; not a byte moves."""
    assert b'"NORMAL"' in glb
    return glb.replace(b'"NORMAL"', b'"_ORMAL"')


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    models = copy_web(folder)
    for suffix in FORMATS:
        write_mesh(sample_object(), models / f"toy.{suffix}")
        write_mesh(ball(), models / f"ball.{suffix}")
    (models / "bare.glb").write_bytes(without_normals(encode_glb(ball())))
    for suffix in ("glb", "obj"):
        write_mesh(quad(), models / f"square.{suffix}")
    with Served(folder, {"/scripts/app.js": APP, "/host.html": HOST}) as served:
        yield served


@pytest.fixture(scope="module")
def shared_page(site, tmp_path_factory):
    with Page(tmp_path_factory.mktemp("profile"), width=1600, height=1100) as opened:
        yield opened


@pytest.fixture
def page(shared_page, site):
    """A fresh host page; no test may leave an error in it."""
    shared_page.problems.clear()
    shared_page.goto(f"{site.url}/host.html")
    yield shared_page
    assert [problem for problem in shared_page.problems if "CONTEXT_LOST" not in problem] == []


def output(*names):
    return {"3d": [{"filename": name, "subfolder": "", "type": "temp"} for name in names]}


def show(page, *names, state=None, properties=None):
    """A node of its own with these files, drawn front on; its name in the page is ``node``."""
    page.evaluate(f"window.node?.remove(); window.node = makeNode({json.dumps(properties or {})}, 480, 480); 0")
    page.evaluate(f"node.onExecuted({json.dumps(output(*names))})")
    page.wait("viewerOf(node).host.dataset.ready === 'yes'")
    settings = {"grid": False, "mode": "clay", **(state or {})}
    page.evaluate(f"viewerOf(node).set({json.dumps(settings)}); 0")
    page.evaluate(
        "viewerOf(node).state.pose.azimuth = 0; viewerOf(node).state.pose.elevation = 0;"
        " viewerOf(node).fit(); viewerOf(node).set({})"
    )
    return canvas(page)


def canvas(page):
    page.evaluate("viewerOf(node).draw()")
    return page.canvas("viewerOf(node).canvas")


def where(pixels, colour, tolerance=3):
    return np.argwhere(np.abs(pixels[..., :3] - colour).max(axis=2) <= tolerance)


def test_the_four_formats_are_drawn_alike(page):
    shapes, counts, colours = {}, {}, {}
    for suffix in FORMATS:
        shapes[suffix] = drawn(show(page, f"toy.{suffix}"))
        counts[suffix] = page.evaluate("[viewerOf(node).model.triangles, viewerOf(node).model.vertices]")
        if suffix != "stl":
            page.evaluate("viewerOf(node).set({mode: 'colors'})")
            colours[suffix] = canvas(page)
    mesh = sample_object()
    distinct = len(np.unique(mesh.vertices, axis=0))
    assert {name: tuple(count) for name, count in counts.items()} == dict.fromkeys(FORMATS, (len(mesh.faces), distinct))
    assert 0.1 < shapes["glb"].mean() < 0.6
    for suffix in FORMATS[1:]:
        assert (shapes[suffix] & shapes["glb"]).sum() / (shapes[suffix] | shapes["glb"]).sum() > 0.995
    for pixels in colours.values():
        yellow, purple = (where(pixels, colour) for colour in ((250, 207, 46), (122, 59, 153)))
        assert len(yellow) > 200 and len(purple) > 200
        # The ball is in the left hand: at the right of the front view.
        assert np.median(purple[:, 1]) < 240 < np.median(yellow[:, 1])


@pytest.mark.parametrize("suffix", ["glb", "obj"])
def test_a_texture_is_shown_in_its_own_colours_the_right_way_up(page, suffix):
    pixels = show(page, f"square.{suffix}", state={"mode": "texture"})
    assert page.evaluate("viewerOf(node).model.hasTexture") is True
    found = [where(pixels, colour) for colour in ((200, 100, 50), (30, 160, 90), (60, 70, 220))]
    assert min(map(len, found)) > 2000
    top, left, right = (places.mean(axis=0) for places in found)
    assert top[0] < left[0] and left[0] == pytest.approx(right[0], abs=2) and left[1] < right[1]
    assert page.evaluate("viewerOf(node).set({mode: 'plain'})") is None
    assert len(where(canvas(page), (200, 100, 50))) == 0


@pytest.mark.parametrize("name", ["ball.glb", "bare.glb", "ball.ply", "ball.stl"])
def test_a_curved_mesh_is_shaded_round_in_every_format(page, name):
    wanted, seen = (show(page, each, state={"mode": "shaded"}) for each in ("ball.obj", name))
    # Facets of a ball this coarse are tens of levels off.
    assert np.abs(seen[..., :3] - wanted[..., :3]).max() <= 8


def test_every_mode_is_drawn_differently_and_absent_ones_are_closed(page):
    pictures = {"shaded": show(page, "square.glb", state={"mode": "shaded"})}
    body = np.s_[150:320, 150:320]
    for mode in ("clay", "normals", "wireframe", "uv", "texture"):
        page.evaluate(f"viewerOf(node).set({{mode: '{mode}'}})")
        pictures[mode] = canvas(page)
    names = list(pictures)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert np.abs(pictures[first][body] - pictures[second][body]).mean() > 0.5, (first, second)
    # A normal that faces the viewer is drawn (128, 128, 255).
    assert np.abs(pictures["normals"][body][..., :3] - (128, 128, 255)).max() <= 2
    show(page, "toy.stl")
    closed = page.evaluate(
        "[...viewerOf(node).host.shadowRoot.querySelector('[data-name=mode]').options].filter(o => o.disabled)"
        ".map(o => o.value)"
    )
    assert closed == ["uv", "texture", "colors"]


def test_pointer_keys_and_buttons_do_what_they_say(page):
    front = show(page, "toy.glb", state={"mode": "colors"})
    page.drag((200, 150), (200 + 225, 150))  # 0.4 degrees per pixel: a quarter turn to the right side
    assert page.evaluate("viewerOf(node).state.pose.azimuth") == pytest.approx(-90)
    assert np.abs(canvas(page) - front).mean() > 3
    page.press("1")
    np.testing.assert_array_equal(canvas(page), front)
    distance = page.evaluate("viewerOf(node).state.pose.distance")
    page.press("+")
    assert page.evaluate("viewerOf(node).state.pose.distance") == pytest.approx(0.88 * distance)
    page.press("f")
    np.testing.assert_array_equal(canvas(page), front)
    page.press("b")
    assert canvas(page)[5, 5, :3].min() > 200
    page.press("g")
    assert page.evaluate("viewerOf(node).state.grid") is True
    page.press("m")
    assert page.evaluate("viewerOf(node).state.mode") == "shaded"
    lit = canvas(page)
    page.press("]")
    assert page.evaluate("viewerOf(node).state.light") == -25 and np.abs(canvas(page) - lit).mean() > 0.05
    page.press("t")
    before = page.evaluate("viewerOf(node).state.pose.azimuth")
    page.wait(f"viewerOf(node).state.pose.azimuth !== {before}")
    touch(page, [(200, 150), (260, 150)], [(170, 150), (290, 150)])
    assert page.evaluate("viewerOf(node).state.turn") is False
    assert page.evaluate("viewerOf(node).state.pose.distance") == pytest.approx(distance / 2, rel=0.02)


# [name, x and y of the middle, width, height, whether a press there reaches it] of every control over the view.
CONTROLS = """(() => {
  const root = viewerOf(node).host.shadowRoot;
  return [...root.querySelectorAll("button, .bars select, input")].map(each => {
    const { x, y, width, height } = each.getBoundingClientRect();
    const [across, down] = [x + width / 2, y + height / 2];
    return [each.dataset.name, across, down, width, height, each.contains(root.elementFromPoint(across, down))];
  });
})()"""


def test_every_control_is_there_in_a_node_of_the_default_width(page):
    """320 wide, of which ComfyUI's margins leave 296."""
    page.evaluate("window.node?.remove(); window.node = makeNode({}, 296, 260); 0")
    page.evaluate(f"node.onExecuted({json.dumps(output('toy.glb', 'square.glb'))})")
    page.wait("viewerOf(node).host.dataset.ready === 'yes'")
    page.evaluate("viewerOf(node).set({grid: false, mode: 'clay', light: 0})")
    page.keep("widget_narrow")
    controls = page.evaluate(CONTROLS)
    names = {name for name, *_ in controls}
    assert {"light", "help", "mode", "fit", "compare", "picture", "to-input", "download"} <= names
    for name, x, y, width, height, is_on_top in controls:
        assert is_on_top and width >= 24 and height >= 24, name
        assert width / 2 <= x <= 296 - width / 2 and height / 2 <= y <= 260 - height / 2, name
    places = {name: (x, y) for name, x, y, *_ in controls}
    rows = {y for name, (_, y) in places.items() if name != "help"}
    assert len(rows) == 2, "the bars leave room for the model"
    x, y = places["light"]
    touch(page, [(x - 18, y)], [(x + 18, y)])
    page.wait("viewerOf(node).state.light > 60", timeout_s=30)
    touch(page, [places["help"]], [])
    page.wait("!viewerOf(node).host.shadowRoot.querySelector('.help').hidden")
    page.keep("widget_narrow_help")
    bottom = "viewerOf(node).host.shadowRoot.querySelector('.help').getBoundingClientRect().bottom"
    assert page.evaluate(bottom) < 260


def touch(page, start, end):
    """Fingers from ``start`` to ``end``; a tap without one."""

    def points(places):
        return [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]

    page.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points(start))
    if end:
        page.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=points(end))
    page.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def test_two_meshes_are_compared_at_the_divider(page):
    toy = show(page, "toy.glb", "square.glb", state={"against": None, "mode": "shaded"})
    page.press("c")
    page.evaluate("viewerOf(node).set({against: 1, split: 0.5, mode: 'texture'})")
    page.wait("viewerOf(node).other")
    page.evaluate("viewerOf(node).set({object: 1, against: 0, mode: 'texture'})")
    page.evaluate("viewerOf(node).fit()")
    both = canvas(page)
    assert len(where(both[:, :240], (30, 160, 90))) > 500 and len(where(both[:, 240:], (60, 70, 220))) == 0
    page.evaluate("viewerOf(node).host.shadowRoot.querySelector('.divider').focus()")
    page.press("End")
    assert page.evaluate("viewerOf(node).state.split") == 1
    assert len(where(canvas(page)[:, 240:], (60, 70, 220))) > 500
    assert toy.shape == both.shape


def test_twenty_previews_share_one_graphics_context_and_give_everything_back(page):
    page.evaluate("window.nodes = Array.from({length: 20}, () => makeNode({}, 300, 250)); 0")
    page.evaluate(
        f"nodes.forEach((node, i) => node.onExecuted(i % 2 ? {json.dumps(output('square.glb'))} :"
        f" {json.dumps(output('toy.glb'))}))"
    )
    page.wait("nodes.every(node => viewerOf(node).host.dataset.ready === 'yes')")
    page.evaluate("nodes.forEach(node => viewerOf(node).set({grid: false}))")
    assert page.evaluate("contexts") == 1
    page.keep("widget_twenty_previews")
    shapes = [drawn(page.canvas(f"(viewerOf(nodes[{i}]).draw(), viewerOf(nodes[{i}]).canvas)")) for i in range(20)]
    assert all(0.02 < shape.mean() < 0.8 for shape in shapes)
    assert all(np.array_equal(shape, shapes[i % 2]) for i, shape in enumerate(shapes))
    held = page.evaluate("Stage.get().memory")
    assert held["geometries"] >= 20 and held["textures"] >= 10
    page.evaluate("nodes.forEach(node => node.remove())")
    assert page.evaluate("Stage.get().memory.geometries") <= 1
    assert page.evaluate("Stage.get().memory.textures") <= held["textures"] - 10
    show(page, "toy.glb")
    assert page.evaluate("contexts") == 1
    page.evaluate("node.remove(); window.node = undefined")


def test_copies_and_reloads_show_the_same_and_a_lost_file_is_a_sentence(page, site):
    kept = show(page, "toy.glb", state={"mode": "colors"})
    stored = json.loads(page.evaluate("JSON.stringify(node.properties)"))
    page.goto(f"{site.url}/host.html")
    page.evaluate(f"window.node = makeNode({json.dumps(stored)}, 480, 480); node.onConfigure({{}})")
    page.wait("viewerOf(node).host.dataset.ready === 'yes'")
    np.testing.assert_array_equal(canvas(page), kept)
    page.evaluate("window.copy = makeNode(structuredClone(node.properties), 480, 480); copy.onConfigure({})")
    page.wait("viewerOf(copy).host.dataset.ready === 'yes'")
    page.evaluate("viewerOf(copy).set({mode: 'clay'}); node.remove(); window.node = copy")
    assert drawn(canvas(page)).mean() > 0.1
    page.problems.clear()
    page.evaluate(f"node.onExecuted({json.dumps(output('gone.glb'))})")
    sentence = "viewerOf(node).host.shadowRoot.querySelector('.message')"
    page.wait(f"{sentence}.textContent.startsWith('gone.glb is no longer on the server')")
    assert page.evaluate(f"{sentence}.hidden") is False


def test_the_view_comes_back_after_the_graphics_device_was_lost(page):
    before = show(page, "toy.glb")
    page.evaluate(
        "(async () => { const gl = Stage.get().renderer.getContext(), lose = gl.getExtension('WEBGL_lose_context');"
        " const next = name => new Promise(done => gl.canvas.addEventListener(name, () => setTimeout(done, 100),"
        " { once: true })); const lost = next('webglcontextlost'); lose.loseContext(); await lost;"
        " const back = next('webglcontextrestored'); lose.restoreContext(); await back; })()"
    )
    np.testing.assert_array_equal(canvas(page), before)


def test_what_cannot_be_seen_is_not_drawn(page):
    show(page, "toy.glb")
    page.evaluate("node.frame.style.marginTop = '3000px'")
    page.evaluate("new Promise(done => setTimeout(done, 600))")
    page.evaluate("viewerOf(node).set({turn: true})")
    count = page.evaluate("viewerOf(node).canvas.dataset.drawn")
    page.evaluate("new Promise(done => setTimeout(done, 400))")
    assert page.evaluate("viewerOf(node).canvas.dataset.drawn") == count
    page.evaluate("node.frame.style.marginTop = '0'")
    page.wait(f"Number(viewerOf(node).canvas.dataset.drawn) > {count} + 1")


@pytest.mark.parametrize("suffix", FORMATS)
def test_downloads_made_in_the_browser_are_the_shown_mesh(page, tmp_path, suffix):
    source = "toy.ply" if suffix == "glb" else "toy.glb"
    for name, mesh in ((source, sample_object()), ("square.glb", quad())):
        show(page, name)
        page.evaluate("viewerOf(node).shown.files = {}")
        page.evaluate(
            "(async () => { const make = URL.createObjectURL; URL.createObjectURL = blob => { window.kept = blob;"
            f" return make.call(URL, blob); }}; await viewerOf(node).save('{suffix}');"
            " URL.createObjectURL = make; })()"
        )
        data = bytes(page.evaluate("kept.arrayBuffer().then(buffer => [...new Uint8Array(buffer)])"))
        folder = tmp_path / name
        folder.mkdir()
        if suffix == "obj":
            zipfile.ZipFile(io.BytesIO(data)).extractall(folder)
        else:
            (folder / f"saved.{suffix}").write_bytes(data)
        back = read_mesh(next(folder.glob(f"*.{suffix}")))
        assert len(back.faces) == len(mesh.faces)
        np.testing.assert_allclose(back.bounds, mesh.bounds, atol=1e-5)
        corners = [np.sort(m.vertices[m.faces].reshape(-1, 9), axis=0) for m in (back, mesh)]
        np.testing.assert_allclose(*corners, atol=1e-5)
        if suffix != "stl" and mesh.colors is not None:
            assert back.colors is not None
            seen, true = (np.unique(np.round(m.colors[:, :3] * 51), axis=0) for m in (back, mesh))
            assert len(seen) == len(true)
        if suffix in ("glb", "obj") and mesh.uv is not None:
            texture = back.materials[0].base_color_texture
            np.testing.assert_array_equal(texture[..., :3], mesh.materials[0].base_color_texture)
            np.testing.assert_allclose(
                np.sort(back.corner_uv(), axis=None), np.sort(mesh.corner_uv(), axis=None), atol=1e-6
            )


def test_a_picture_goes_to_the_graphs_input(page, site):
    show(page, "toy.glb")
    page.evaluate("viewerOf(node).sendPicture()")
    assert b"\x89PNG" in site.uploads[-1] and b'name="type"\r\n\r\ninput' in site.uploads[-1]
    note = page.evaluate("viewerOf(node).host.shadowRoot.querySelector('.note').textContent")
    assert "triptych/picture.png" in note


# The exported page -------------------------------------------------------------------------------------------------


def test_the_exported_page_holds_the_same_viewer_and_asks_for_nothing(shared_page, site, tmp_path):
    assert export.BUILT_MODULE.is_file()
    path = write_viewer([sample_object(), quad()], tmp_path / "v.html", title="</script><b>", names=["toy", "square"])
    assert [file.name for file in tmp_path.iterdir()] == ["v.html"]
    shared_page.requests.clear()
    shared_page.problems.clear()
    shared_page.goto(path.as_uri() + "#azimuth=0&elevation=0&grid=0&mode=colors")
    shot = shared_page.keep("viewer_html")
    yellow, purple = (where(shot, colour) for colour in ((250, 207, 46), (122, 59, 153)))
    assert len(yellow) > 500 and len(purple) > 500 and np.median(purple[:, 1]) < 800 < np.median(yellow[:, 1])
    shared_page.press("c")
    shared_page.wait("triptych.other")
    assert shared_page.problems == []
    assert [url for url in shared_page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


# A real ComfyUI ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    if isinstance(COMFY, str):
        pytest.skip(COMFY)
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as running:
        # Else the frontend greets a new user with its templates, over the graph.
        running.client().post("/settings", {"Comfy.TutorialCompleted": True})
        yield running


def preview_graph(name):
    """A graph as the editor saves it: a mesh file, and its preview at (420, 120)."""
    common = {"flags": {}, "mode": 0, "properties": {}}
    sockets = [{"name": each, "type": "TRIPTYCH_MESH", "link": link} for each, link in
               (("mesh", 1), ("compare_with", None))]  # fmt: skip

    def node(number, kind, pos, size, inputs, outputs, values):
        return {"id": number, "type": f"Triptych_{kind}", "pos": pos, "size": size, "order": number - 1,
                "inputs": inputs, "outputs": outputs, "widgets_values": values, **common}  # fmt: skip

    mesh = {"name": "mesh", "type": "TRIPTYCH_MESH", "links": [1]}
    load = node(1, "LoadMesh", [60, 120], [300, 110], [], [mesh], [name, False])
    show = node(2, "Preview3D", [420, 120], [420, 480], sockets, [], [])
    return {"last_node_id": 2, "last_link_id": 1, "version": 0.4, "nodes": [load, show],
            "links": [[1, 1, 0, 2, 0, "TRIPTYCH_MESH"]]}  # fmt: skip


def open_editor(page, server):
    page.goto(f"http://127.0.0.1:{server.port}/", until="window.app?.graph && window.triptychViewers", timeout_s=600)
    page.wait("app.canvas && LiteGraph.registered_node_types['Triptych_Preview3D']", timeout_s=300)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", ["classic", "vue"])
def test_the_widget_shows_the_model_in_a_real_graph(comfy, tmp_path, nodes):
    with Page(tmp_path / "profile") as page:
        comfy.client().post("/settings", {"Comfy.VueNodes.Enabled": nodes == "vue"})
        write_mesh(sample_object(), tmp_path / "toy.glb")
        name = comfy.client().upload("toy.glb", (tmp_path / "toy.glb").read_bytes())
        open_editor(page, comfy)
        assert page.evaluate("!!LiteGraph.vueNodesMode") is (nodes == "vue")
        find = "app.graph._nodes.find(node => node.comfyClass === 'Triptych_Preview3D')"
        viewer = f"triptychViewers.get({find})"
        page.evaluate(f"app.loadGraphData({json.dumps(preview_graph(name))})")
        page.wait(f"{find} && {viewer}")
        page.evaluate("app.queuePrompt(0, 1)")
        page.wait(f"{viewer}.host.dataset.ready === 'yes'", timeout_s=600)
        page.evaluate(f"{viewer}.set({{mode: 'colors', grid: false}}); {viewer}.draw()")
        page.keep(f"widget_comfyui_{nodes}")
        pixels = page.canvas(f"{viewer}.canvas")
        assert len(where(pixels, (250, 207, 46))) > 50 and 0.02 < drawn(pixels).mean() < 0.9
        x, y, width, height = box(page, viewer)
        assert width > 280 and height > 230
        on_screen = page.screenshot()[max(0, y) : y + height, max(0, x) : x + width]
        assert len(where(on_screen, (250, 207, 46), 12)) > 100
        the_pointer_moves_the_model_and_not_the_graph(page, viewer, find, (x + width // 2, y + height // 2))
        it_is_shown_again_after_it_was_out_of_sight(page, viewer, find)
        # The graph that a user saves holds what is needed to show the model again.
        saved = page.evaluate("JSON.stringify(app.graph.serialize())")
        page.evaluate(f"app.loadGraphData({saved})")
        page.wait(f"{viewer}?.host.dataset.ready === 'yes'", timeout_s=300)
        page.evaluate(f"{viewer}.draw()")
        assert len(where(page.canvas(f"{viewer}.canvas"), (250, 207, 46))) > 50
        # A graph that is left takes its widgets with it.
        page.evaluate(f"window.left = {viewer}.host; app.graph.clear()")
        page.wait("!left.isConnected")


def box(page, viewer):
    rectangle = f"(b => [b.x, b.y, b.width, b.height])({viewer}.host.getBoundingClientRect())"
    return tuple(round(value) for value in page.evaluate(rectangle))


def the_pointer_moves_the_model_and_not_the_graph(page, viewer, node, place):
    graph = f"JSON.stringify([[...{node}.pos], app.canvas.ds.scale, [...app.canvas.ds.offset]])"
    pose = page.evaluate(f"structuredClone({viewer}.state.pose)")
    before, scale = page.evaluate(graph), page.evaluate("app.canvas.ds.scale")
    page.drag(place, (place[0] + 60, place[1]))
    assert page.evaluate(f"{viewer}.state.pose.azimuth") == pytest.approx(pose["azimuth"] - 24 / scale, abs=0.5)
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=place[0], y=place[1], deltaX=0, deltaY=-50)
    page.wait(f"{viewer}.state.pose.distance < {pose['distance']}")
    page.screenshot()
    assert page.evaluate(graph) == before


def it_is_shown_again_after_it_was_out_of_sight(page, viewer, node):
    """Collapsed, zoomed far out, and in the other kind of nodes."""
    page.evaluate(f"{node}.collapse(); app.graph.setDirtyCanvas(true, true)")
    page.wait(f"{viewer}.host.getBoundingClientRect().height === 0")
    page.evaluate(f"{node}.collapse(); app.graph.setDirtyCanvas(true, true)")
    page.wait(f"{viewer}.host.getBoundingClientRect().height > 200")
    page.evaluate("app.canvas.ds.scale = 0.15; app.graph.setDirtyCanvas(true, true)")
    page.screenshot()
    page.evaluate("app.canvas.ds.scale = 1; app.graph.setDirtyCanvas(true, true)")
    page.wait(f"{viewer}.host.getBoundingClientRect().height > 200")
    setting = "app.extensionManager.setting"
    for _ in range(2):
        page.evaluate(f"{setting}.set('Comfy.VueNodes.Enabled', !{setting}.get('Comfy.VueNodes.Enabled'))")
        page.screenshot()
        page.wait(f"{viewer}.host.isConnected && {viewer}.host.getBoundingClientRect().height > 200")
