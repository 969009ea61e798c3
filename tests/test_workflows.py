"""workflows/: both forms of each say the same, fit the nodes, and run in a real ComfyUI (skipped without one)."""

import copy
import json
import subprocess
import sys

import pytest
from comfy_server import ROOT, find_comfy, server_with_flux
from object_info import object_info
from PIL import Image

from triptych.api import JobFailed, Rejected, Server, convert, run_workflow
from triptych.errors import TriptychError
from triptych.geometry.files import read_mesh, write_obj
from triptych.procedural import sample_object, sample_views

FOLDER = ROOT / "workflows"
NAMES = (
    "clean_and_texture",
    "image_to_obj",
    "photo_to_obj",
    "photo_to_obj_klein",
    "text_to_obj",
    "turntable",
    "views_to_obj",
)
RUNNABLE = tuple(name for name in NAMES if name != "photo_to_obj_klein")  # see test_flux_native_comfy
SIDES = ("front", "left", "back", "right")
WIDGETS = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
FOUND = find_comfy()
real = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))


def editor_form(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def api_form(name: str) -> dict:
    return json.loads((FOLDER / "api" / f"{name}.api.json").read_text())


@pytest.fixture(scope="module")
def info(tmp_path_factory):
    return object_info(tmp_path_factory.mktemp("base"))


def test_all_workflows_are_here():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(NAMES)  # ComfyUI lists these as templates
    assert sorted(path.name for path in (FOLDER / "api").iterdir()) == [f"{name}.api.json" for name in NAMES]


def test_files_are_what_the_script_writes(tmp_path):
    """A change of a node's inputs that is not in the workflows shows here."""
    script = FOLDER / "write.py"
    code = (
        f"import sys, pathlib, runpy; sys.argv = ['write.py']; space = runpy.run_path({str(script)!r});"
        f"space['main'].__globals__['HERE'] = pathlib.Path({str(tmp_path)!r}); space['main']()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    for path in (*FOLDER.glob("*.json"), *FOLDER.glob("api/*.json")):
        assert (tmp_path / path.relative_to(FOLDER)).read_text() == path.read_text(), path.name


@pytest.mark.parametrize("name", NAMES)
def test_conversion_gives_the_api_form(name, info):
    assert convert(editor_form(name), info.get) == api_form(name)


@pytest.mark.parametrize("name", NAMES)
def test_api_form_fits_the_nodes(name, info):
    graph = api_form(name)
    for node, content in graph.items():
        known = info[content["class_type"]]["input"]
        declared = known["required"] | known.get("optional", {})
        given = content["inputs"]
        assert set(known["required"]) <= set(given) <= set(declared), node
        for key, value in given.items():
            kind, options = declared[key][0], declared[key][1]
            if isinstance(value, list):
                source = info[graph[value[0]]["class_type"]]
                assert source["output"][value[1]] in kind.split(","), (node, key)
            elif kind == "COMBO":
                assert value in options["options"] or key == "file", (node, key)
            elif isinstance(kind, str):
                assert isinstance(value, WIDGETS[kind]), (node, key)
                if kind in ("INT", "FLOAT"):
                    assert options["min"] <= value <= options["max"], (node, key)


@pytest.mark.parametrize("name", NAMES)
def test_editor_form_is_sound(name):
    """Links agree with the slots at both ends, ids are unique, no two nodes lie over each other."""
    content = editor_form(name)
    nodes = {node["id"]: node for node in content["nodes"]}
    assert len(nodes) == len(content["nodes"]) == content["last_node_id"]
    assert len({link[0] for link in content["links"]}) == len(content["links"]) == content["last_link_id"]
    for link, source, output, target, slot, kind in content["links"]:
        made, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert link in made["links"] and taken["link"] == link and made["type"] == kind in taken["type"].split(",")
    boxes = [
        (*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1]) for node in nodes.values()
    ]
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


# Conversion of what the files here do not have.


@pytest.fixture
def small():
    """LoadImage -> Reroute -> SaveImage, and a primitive that gives the prefix."""
    return {
        "nodes": [
            {"id": 1, "type": "LoadImage", "inputs": [], "widgets_values": ["a.png", "image"],
             "outputs": [{"name": "IMAGE", "type": "IMAGE"}]},
            {"id": 2, "type": "Reroute", "inputs": [{"name": "", "type": "*", "link": 1}], "outputs": [{"type": "*"}]},
            {"id": 3, "type": "SaveImage", "widgets_values": ["old"], "title": "save", "inputs": [
                {"name": "images", "type": "IMAGE", "link": 2},
                {"name": "filename_prefix", "type": "STRING", "link": 3, "widget": {"name": "filename_prefix"}}]},
            {"id": 4, "type": "PrimitiveNode", "widgets_values": ["new", "fixed"], "outputs": [{"type": "STRING"}]},
            {"id": 5, "type": "Note", "widgets_values": ["hello"]},
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"], [3, 4, 0, 3, 1, "STRING"]],
    }  # fmt: skip


def test_reroutes_primitives_and_notes(small, info):
    graph = convert(small, info.get)
    assert list(graph) == ["1", "3"] and graph["1"]["inputs"] == {"image": "a.png"}
    assert (
        graph["3"]["inputs"] == {"images": ["1", 0], "filename_prefix": "new"}
        and graph["3"]["_meta"]["title"] == "save"
    )


def test_links_of_the_newer_kind(small, info):
    newer = copy.deepcopy(small)
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    newer["links"] = [dict(zip(keys, link, strict=True)) for link in small["links"]]
    assert convert(newer, info.get) == convert(small, info.get)


def test_muted_and_bypassed(info):
    content = editor_form("views_to_obj")
    nodes = {node.get("title") or node["type"]: node for node in content["nodes"]}
    whole = convert(content, info.get)
    nodes["left"]["mode"] = 2
    nodes["Triptych_CleanMesh"]["mode"] = 4
    graph = convert(content, info.get)
    views, clean, made = (str(nodes[f"Triptych_{name}"]["id"]) for name in ("PrepareViews", "CleanMesh", "Reconstruct"))
    assert set(whole) - set(graph) == {str(nodes["left"]["id"]), clean}
    assert set(whole[views]["inputs"]) - set(graph[views]["inputs"]) == {"left", "left_mask"}
    painted = graph[str(nodes["Triptych_TextureMesh"]["id"])]["inputs"]
    assert painted["mesh"] == [made, 0]  # past the bypassed node


def test_seed_control_may_be_absent_and_new_inputs_take_their_defaults(info):
    content = editor_form("views_to_obj")
    made = next(node for node in content["nodes"] if node["type"] == "Triptych_Reconstruct")
    made["widgets_values"] = [7, 3]  # as a form that an older version of the node wrote
    inputs = convert(content, info.get)[str(made["id"])]["inputs"]
    assert (inputs["seed"], inputs["steps"], inputs["guidance"], inputs["ensemble"]) == (7, 3, -1.0, 4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda form: form["nodes"][0].update(type="Unknown_Node"), "no node 'Unknown_Node'.*install its pack"),
        (lambda form: form.update(definitions={"subgraphs": [{"id": "LoadImage"}]}), "subgraph.*Export"),
        (lambda form: form["nodes"][0].update(type="workflow>mine"), "group node"),
        (lambda form: form["links"].append([9, 77, 0, 2, 0, "IMAGE"]) or form["nodes"][1]["inputs"][0].update(link=9),
         "node 77"),
        (lambda form: form["links"].append([9, 2, 0, 2, 0, "*"]) or form["nodes"][1]["inputs"][0].update(link=9),
         "circle"),
        (lambda form: [node.update(mode=2) for node in form["nodes"]], "no node that runs"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_said(small, info, change, sentence):
    change(small)
    with pytest.raises(TriptychError, match=sentence):
        convert(small, info.get)


# In a real ComfyUI.

SMALL = {
    "Triptych_PrepareViews": {"size": 128}, "Triptych_Reconstruct": {"ensemble": 1, "steps": 2},
    "Triptych_CleanMesh": {"target_faces": 1000}, "Triptych_TextureMesh": {"texture_size": 128},
    "Triptych_RenderViews": {"count": 3, "size": 64}, "Triptych_FluxViews": {"steps": 2, "rerolls": 0, "size": 128},
}  # fmt: skip


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    with server_with_flux(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    files = {"mesh": write_obj(sample_object(), folder / "chair.obj")[-1]}
    for name, picture in sample_views(128).items():
        files[name] = folder / f"{name}.png"
        picture.save(files[name])
    return files


def small_values(content: dict) -> list[str]:
    nodes = content.get("nodes") or [{"type": node["class_type"]} for node in content.values()]
    classes = {node["type"] for node in nodes}
    return [
        f"{name}.{key}={value}" for name, values in SMALL.items() if name in classes for key, value in values.items()
    ]


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNNABLE)
def test_both_forms_run(name, comfy, inputs, tmp_path):
    server = Server(f"http://127.0.0.1:{comfy.port}")
    results = []
    for form in (api_form(name), editor_form(name)):
        nodes = form.get("nodes") or [{"title": node["_meta"]["title"]} for node in form.values()]
        given = {key: inputs[key] for key in ("mesh", *SIDES) if any(node.get("title") == key for node in nodes)}
        heard: list[str] = []
        result = run_workflow(
            form, [server], tmp_path, inputs=given, values=small_values(form), timeout_s=900,
            progress=lambda node, share, heard=heard: heard.append(node),
        )  # fmt: skip
        results.append((result, heard))
    (first, heard), (second, _) = results
    if "Triptych_FluxViews" in json.dumps(api_form(name)):
        assert "drew" in first.texts["Flux views"][0], "API users are told what was drawn"
    assert first.files == second.files and second.cached  # the same graph: nothing to do, and the same files
    kept = [path for path in first.files if "temp" not in path.relative_to(tmp_path).parts]
    if name == "turntable":
        assert [Image.open(path).size for path in kept] == [(64, 64)] * 3
    else:
        assert {path.suffix for path in kept} == {".obj", ".mtl", ".png"} and len(kept) == 3
        mesh = read_mesh(next(path for path in kept if path.suffix == ".obj"))
        assert 500 < len(mesh.faces) <= 1100 and mesh.materials[0].base_color_texture.shape[:2] == (128, 128)
    assert heard


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_server_lists_and_serves_the_templates(comfy):
    client = comfy.client()
    assert sorted(client.get("/workflow_templates")["triptych"]) == list(NAMES)
    for name in NAMES:
        assert client.get(f"/api/workflow_templates/triptych/{name}.json") == editor_form(name)


def _without_core_titles(graph: dict) -> dict:
    """ComfyUI changes the display names of its own nodes between versions; ours are ours."""
    return {
        number: node if node["class_type"].startswith("Triptych_") else {k: v for k, v in node.items() if k != "_meta"}
        for number, node in graph.items()
    }


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_descriptions_convert_alike_and_failures_name_the_node(comfy, inputs, tmp_path):
    server = Server(f"http://127.0.0.1:{comfy.port}")
    for name in NAMES:
        assert _without_core_titles(convert(editor_form(name), server.object_info)) == _without_core_titles(
            api_form(name)
        )
    graph = api_form("turntable")
    with pytest.raises(Rejected, match=r"mesh \(node 1, Triptych_LoadMesh\): .*model\.obj"):
        run_workflow(graph, [server], tmp_path)
    values = ["RenderViews.cameras=azimuths", "RenderViews.azimuths=north"]
    with pytest.raises(
        JobFailed, match=r"Render views \(node 2, Triptych_RenderViews\) failed: the azimuths are 'north'"
    ):
        run_workflow(graph, [server], tmp_path, inputs={"mesh": inputs["mesh"]}, values=values)
    assert server.load() == 0
