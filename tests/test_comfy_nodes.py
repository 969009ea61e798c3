"""The nodes in a real ComfyUI, driven as an API client drives it. Without one these tests are skipped."""

import io
import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from comfy_server import ROOT, ApiError, Client, ComfyServer, find_comfy
from PIL import Image

from triptych.bundles.bundle import load_bundle
from triptych.geometry.files import read_mesh, write_obj
from triptych.images.views import prepare_views
from triptych.pipelines.reconstruct import Settings, mesh_from_views
from triptych.procedural import sample_object, sample_views

FOUND = find_comfy()
pytestmark = [
    pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND)),
    pytest.mark.timeout(1800),  # a busy machine takes minutes for the start alone
]

NAMES = ("front", "left", "back", "right")
SIZE = 128
QUICK = {
    "seed": 3, "steps": 2, "guidance": -1.0, "ensemble": 1, "texture_size": 128, "target_faces": 1500,
    "keep_silhouettes": True,
}  # fmt: skip
CLEAN = {
    "weld": True, "weld_distance": 0.0, "min_part": 0.01, "fill_holes": 64, "remesh": "none", "remesh_resolution": 32,
    "smooth": 0, "target_faces": 0,
}  # fmt: skip
RENDER = {
    "cameras": "four sides", "count": 4, "azimuths": "0, 90", "elevation": 15.0, "size": SIZE, "mode": "albedo",
    "background": "white", "field_of_view": 0.0, "normalize": True,
}  # fmt: skip
TEXTURE = {
    "source": "auto", "texture_size": 128, "unwrap": "where needed", "fill": "diffuse",
    "fit_to_views": False, "padding": 3,
}  # fmt: skip
COMPARE = {"normalize": False, "threshold": 0.05, "samples": 4000}
PREPARE = {"layout": "auto", "size": SIZE, "foreground": "auto", "mask_shows": "auto"}
ATTACKS = (
    "../../secret.obj", "/etc/passwd", "a/../../secret.obj", "..\\..\\secret.obj", "link/secret.obj",
    "%2e%2e/secret.obj", "a\0.obj", "x" * 5000 + ".obj", "C:\\secret.obj", "../secret.obj [output]", "",
)  # fmt: skip


def node(class_type: str, /, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def ours(name: str, /, **inputs) -> dict:
    return node(f"Triptych_{name}", **inputs)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Client:
    return server.client()


@pytest.fixture(scope="module")
def pictures(client, tmp_path_factory) -> dict[str, Path]:
    """Four RGBA pictures of the sample object, in ComfyUI's input folder and here."""
    folder = tmp_path_factory.mktemp("views")
    paths = {}
    for name, picture in sample_views(256).items():
        paths[name] = folder / f"{name}.png"
        picture.save(paths[name])
        client.upload(f"{name}.png", paths[name].read_bytes())
    return paths


@pytest.fixture(scope="module")
def object_file(client, tmp_path_factory) -> str:
    """The sample object as OBJ and MTL in ComfyUI's input folder."""
    written = write_obj(sample_object(), tmp_path_factory.mktemp("mesh") / "sample.obj")
    for path in written:
        client.upload(path.name, path.read_bytes(), "objects")
    return "objects/sample.obj"


def main_job(prefix: str = "mesh/Test", names=NAMES, **settings) -> dict:
    """Load Image x n -> Prepare views -> Reconstruct -> Export and Preview."""
    graph = {f"load_{name}": node("LoadImage", image=f"{name}.png") for name in names}
    views = {name: [f"load_{name}", 0] for name in names} | {f"{name}_mask": [f"load_{name}", 1] for name in names}
    return graph | {
        "bundle": ours("LoadBundle", name="triptych-tiny", repository=""),
        "views": ours("PrepareViews", **views, **PREPARE),
        "mesh": ours("Reconstruct", bundle=["bundle", 0], views=["views", 0], **QUICK | settings),
        "export": ours("ExportMesh", mesh=["mesh", 0], filename_prefix=prefix, file_format="obj"),
        "preview": ours("Preview3D", mesh=["mesh", 0]),
    }


def test_main_job_equals_a_direct_call(client, server, pictures, tmp_path):
    result = client.run(main_job())
    files = result.outputs["export"]["files"]
    for entry in files:
        (tmp_path / entry["filename"]).write_bytes(client.fetch(entry))
    stems = {Path(entry["filename"]).stem.removesuffix("_albedo") for entry in files}
    assert {Path(entry["filename"]).suffix for entry in files} == {".obj", ".mtl", ".png"} and len(stems) == 1
    shown = result.outputs["export"]["3d"][0]
    assert shown == files[-1] and shown["subfolder"] == "mesh" and shown["type"] == "output"
    assert result.outputs["export"]["result"][0] == f"mesh/{shown['filename']}"

    views = prepare_views(pictures, size=SIZE)
    settings = Settings(seed=3, steps=2, ensemble=1, texture_size=128, target_faces=1500)
    direct = mesh_from_views(views, load_bundle(), settings).mesh
    made = read_mesh(tmp_path / shown["filename"])
    np.testing.assert_array_equal(made.faces, direct.faces)
    np.testing.assert_allclose(made.vertices, direct.vertices, atol=2e-6)
    made_texture, texture = (mesh.materials[0].base_color_texture for mesh in (made, direct))
    assert np.abs(made_texture[..., :3].astype(int) - texture[..., :3]).max() <= 1

    glb = result.outputs["preview"]["3d"][0]
    (tmp_path / glb["filename"]).write_bytes(client.fetch(glb))
    assert len(read_mesh(tmp_path / glb["filename"]).faces) == len(direct.faces)
    model = result.outputs["preview"]["triptych"][0]["models"][0]
    assert model["faces"] == len(direct.faces) and model["texture"] == [128, 128] and glb["type"] == "temp"
    prepared = result.outputs["views"]["images"][0]
    assert Image.open(io.BytesIO(client.fetch(prepared))).size == (4 * SIZE, SIZE)


def test_unchanged_graph_does_no_work(client, server, pictures):
    job = main_job("again/Test")
    client.run(job)
    before = sorted(path.name for path in (server.output / "again").iterdir())
    second = client.run(job)
    assert second.cached == set(job) and sorted(path.name for path in (server.output / "again").iterdir()) == before
    job["mesh"]["inputs"]["seed"] += 1
    third = client.run(job)
    assert third.cached == set(job) - {"mesh", "export", "preview"}
    assert len({path.stem for path in (server.output / "again").glob("*.obj")}) == 2


def test_one_view_alone_is_enough(client, pictures):
    made = client.run(main_job("one/Test", names=("front",))).outputs["export"]["triptych"][0]["models"][0]
    assert made["format"] == "obj" and made["faces"] > 100 and made["uv"]


def test_progress_and_voxel_pictures_arrive(client, pictures):
    listener = client.listen()
    prompt_id = client.queue(main_job("progress/Test", steps=3, seed=11))
    seen = listener.until(lambda name, data: name == "execution_success" and data["prompt_id"] == prompt_id)
    listener.close()
    values = [data["value"] / data["max"] for name, data in seen if name == "progress" and data["node"] == "mesh"]
    assert values == sorted(values) and values[-1] == 1 and len(set(values)) >= 5
    shots = [np.asarray(Image.open(io.BytesIO(data)).convert("L")) for name, data in seen if name == "picture"]
    assert len(shots) >= 3 and shots[-1].shape == (256, 256) and shots[-1].std() > 10, "the object must be seen"


@pytest.mark.parametrize("stage", ["structure", "texture"])
def test_cancel_is_answered_within_a_second(client, server, pictures, stage):
    heavy = {"structure": {"steps": 500}, "texture": {"texture_size": 2048, "target_faces": 20_000, "steps": 1}}[stage]
    begins = {"structure": 0.0, "texture": 0.6}[stage]
    listener = client.listen()
    client.queue(main_job("cancel/Test", **heavy, seed=5 if stage == "texture" else 6))
    listener.until(lambda name, data: name == "progress" and data["node"] == "mesh"
                   and data["value"] / data["max"] >= begins and (begins or data["value"] > 0))  # fmt: skip
    asked, busy = time.monotonic(), server.cpu_s()
    client.post("/interrupt", {})
    listener.until(lambda name, data: name == "execution_interrupted")
    elapsed, worked = time.monotonic() - asked, server.cpu_s() - busy
    listener.close()
    print(f"cancel in {stage}: {elapsed:.2f} s, of which the server had {worked:.2f} s of a processor")
    assert min(elapsed, worked) < 1.0, (
        "a machine that is busy elsewhere gives the server less than a second in a second"
    )
    again = client.run(main_job("cancel/Test", names=("front",), seed=7))
    assert again.succeeded, "a cancelled job must not harm the next"


def test_errors_are_the_library_s_sentences(client, pictures):
    job = main_job("error/Test", names=())
    with pytest.raises(ApiError) as failure:
        client.run(job)
    error = failure.value.body
    assert error["node_type"] == "Triptych_PrepareViews" and error["exception_type"].endswith("TriptychError")
    assert (
        error["exception_message"].strip()
        == "no picture is connected: connect at least the front view, or a view sheet"
    )


def test_mesh_nodes_in_one_graph(client, server, object_file):
    """File -> clean -> four sides -> texture -> every format; through core's own mesh nodes and back; compared."""
    graph = {
        "load": ours("LoadMesh", file=object_file, normalize=True),
        "clean": ours("CleanMesh", mesh=["load", 0], **CLEAN),
        "sides": ours("RenderViews", mesh=["load", 0], **RENDER),
        "small": ours("CleanMesh", mesh=["load", 0], **CLEAN | {"remesh": "voxels", "target_faces": 2000}),
        "texture": ours("TextureMesh", mesh=["small", 0], views=["sides", 4], **TEXTURE),
        "core": ours("MeshToCore", mesh=["texture", 0]),
        "save": node("SaveGLB", mesh=["core", 0], filename_prefix="core/Test"),
        "back": ours("MeshFromCore", core_mesh=["core", 0], index=0),
        "same": ours("CompareMeshes", mesh=["core", 0], reference=["texture", 0], **COMPARE),
        "like": ours("CompareMeshes", mesh=["back", 0], reference=["load", 0], **COMPARE),
        "show": node("PreviewImage", images=["sides", 0]),
        "depth": node("PreviewImage", images=["sides", 3]),
        "sheet": ours("JoinViewSheet", views=["sides", 4], layout="grid", background="white"),
        "split": ours("SplitViewSheet", sheet=["sheet", 0], layout="grid"),
        "one": node("PreviewImage", images=["split", 1]),
        "two": ours("Preview3D", mesh=["clean", 0], compare_with=["core", 0]),
    }  # fmt: skip
    for kind in ("obj", "glb", "ply", "stl"):
        graph[kind] = ours("ExportMesh", mesh=["back", 0], filename_prefix="all/%year%", file_format=kind)
    result = client.run(graph)
    out = result.outputs
    assert len(out["show"]["images"]) == 4 and len(out["two"]["triptych"][0]["models"]) == 2
    assert out["save"]["3d"][0]["filename"].endswith(".glb")
    same, like = (out[name]["triptych_metrics"][0] for name in ("same", "like"))
    assert same["f_score"] > 0.9 and like["f_score"] > 0.9 and like["normal_consistency"] > 0.7
    left = Image.open(io.BytesIO(client.fetch(out["one"]["images"][0])))
    sides = [Image.open(io.BytesIO(client.fetch(entry))) for entry in out["show"]["images"]]
    assert np.abs(np.asarray(left.convert("RGB"), int) - np.asarray(sides[1].convert("RGB"))).max() <= 2
    counts = {}
    for kind in ("obj", "glb", "ply", "stl"):
        for entry in out[kind]["files"]:
            path = server.output / entry["subfolder"] / entry["filename"]
            assert path.read_bytes() == client.fetch(entry)
        mesh = read_mesh(server.output / out[kind]["result"][0])
        counts[kind] = len(mesh.faces)
        has_texture = any(material.base_color_texture is not None for material in mesh.materials)
        assert has_texture == (kind in ("obj", "glb"))
    assert len(set(counts.values())) == 1 and re.fullmatch(r"all/\d{4}_\d{5}_\.obj", out["obj"]["result"][0])


def test_changed_file_is_read_again(client, tmp_path):
    def upload(scale: float) -> None:
        mesh = sample_object()
        for path in write_obj(mesh.replace(vertices=mesh.vertices * np.float32(scale)), tmp_path / "grow.obj"):
            client.upload(path.name, path.read_bytes())

    upload(1.0)
    graph = {
        "load": ours("LoadMesh", file="grow.obj", normalize=False),
        "show": ours("Preview3D", mesh=["load", 0]),
    }
    first = client.run(graph)
    assert client.run(graph).cached == {"load", "show"}
    upload(2.0)
    second = client.run(graph)
    sizes = [run.outputs["show"]["triptych"][0]["models"][0]["size"] for run in (first, second)]
    np.testing.assert_allclose(np.array(sizes[1]), 2 * np.array(sizes[0]), rtol=1e-4)
    assert first.outputs["show"]["3d"] != second.outputs["show"]["3d"], "a browser must not show the older file"


@pytest.mark.parametrize("name", ATTACKS)
def test_load_mesh_stays_in_its_folders(client, server, tmp_path, name):
    secret = tmp_path / "secret.obj"
    write_obj(sample_object(), secret)
    (server.base / "secret.obj").write_bytes(secret.read_bytes())
    link = server.base / "input" / "link"
    if not link.exists():
        link.symlink_to(server.base)
    graph = {"load": ours("LoadMesh", file=name, normalize=False), "show": ours("Preview3D", mesh=["load", 0])}
    with pytest.raises(ApiError) as refusal:
        client.run(graph)
    problem = refusal.value.body["node_errors"]["load"]["errors"][0]
    assert refusal.value.status == 400 and problem["type"] == "custom_validation_failed"
    assert str(server.base) not in json.dumps(refusal.value.body), "no path of the machine is told"


@pytest.mark.parametrize("prefix", ("../out", "/tmp/out", "a/../../out", "..\\out", "link/out", "a\0b", "x" * 3000, ""))
def test_export_stays_in_output(client, server, object_file, tmp_path, prefix):
    link = server.output / "link"
    outside = server.base / "outside"
    outside.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(outside)
    before = sorted(str(path) for path in server.base.rglob("*") if "user" not in path.parts)
    graph = {
        "load": ours("LoadMesh", file=object_file, normalize=False),
        "save": ours("ExportMesh", mesh=["load", 0], filename_prefix=prefix, file_format="stl"),
    }
    with pytest.raises(ApiError) as refusal:
        client.run(graph)
    assert refusal.value.body["exception_type"].endswith("TriptychError")
    assert sorted(str(path) for path in server.base.rglob("*") if "user" not in path.parts) == before


def test_routes(client, server, pictures):
    status, body, headers = client.request("GET", "/triptych")
    built = (ROOT / "web" / "dist" / "studio.html").is_file()
    if built:
        assert status == 302 and headers["Location"] == "extensions/triptych/studio.html"
        assert client.request("GET", "/extensions/triptych/studio.html")[0] == 200
    else:
        assert status == 200 and b"python install.py" in body
    client.run(main_job("gallery/Test", names=("front",), seed=21))
    listed = client.get("/triptych/results?limit=1")
    assert listed["total"] >= 1 and listed["results"][0]["subfolder"] == "gallery"
    suffixes = sorted(Path(entry["filename"]).suffix for entry in listed["results"][0]["files"])
    assert suffixes == [".mtl", ".obj", ".png"]
    assert client.get("/api/triptych/results?limit=-1&offset=99999999999999999999")["total"] == listed["total"]
    for path in ("/triptych/../../etc/passwd", "/triptych/%2e%2e/%2e%2e/etc/passwd", "/triptych//etc/passwd",
                 "/triptych/" + "x" * 200, "/triptych/a%00b", "/extensions/triptych/%2e%2e/%2e%2e/run.py",
                 "/extensions/triptych/../../pyproject.toml"):  # fmt: skip
        assert client.request("GET", path)[0] in (400, 403, 404), path
    for path in ("/triptych", "/triptych/results"):
        assert client.request("GET", path, Origin="http://elsewhere.example")[0] == 403


def test_info_help_and_translations(client, server):
    info = client.get("/object_info")
    names = sorted(name for name in info if name.startswith("Triptych_"))
    written = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert names == sorted(written) and all(info[name]["category"] == "Triptych" for name in names)
    translated = client.get("/i18n")
    web = ROOT / "web" / ("dist" if (ROOT / "web" / "dist").is_dir() else "public")
    for name in names:
        assert translated["zh"]["nodeDefs"][name]["display_name"] != translated["en"]["nodeDefs"][name]["display_name"]
        for page in (f"{name}.md", f"{name}/zh.md"):
            if (web / "docs").is_dir():
                assert client.request("GET", f"/extensions/triptych/docs/{page}")[0] == 200


def test_import_costs_at_most_a_second():
    """CPU seconds of the pack's import and schemas, on top of what ComfyUI has loaded; other programs do not count."""
    folder, python = FOUND
    code = (
        f"import sys, time, asyncio, importlib.util; sys.path.insert(0, {str(folder)!r})\n"
        "sys.argv = ['main.py', '--cpu']\n"
        "import utils.install_util, comfy.options\n"  # utils first: a dependency has a module of that name too
        "comfy.options.enable_args_parsing()\n"
        "import comfy_api.latest, server, folder_paths, comfy.model_management\n"
        "began = time.process_time()\n"
        f"spec = importlib.util.spec_from_file_location('pack', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "pack = importlib.util.module_from_spec(spec); sys.modules['pack'] = pack; spec.loader.exec_module(pack)\n"
        "nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())\n"
        "[node.GET_SCHEMA() for node in nodes]\n"
        "print('COST', len(nodes), time.process_time() - began)\n"
    )
    done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("COST")), None)
    assert line, done.stderr[-2000:]
    count, cost = int(line.split()[1]), float(line.split()[2])
    print(f"pack import: {cost:.2f} s of CPU time, {count} nodes")
    written = json.loads((ROOT / "locales" / "en" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert count == len(written) and cost <= 1.0
