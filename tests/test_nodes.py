"""The nodes as far as they go without ComfyUI: schemas, words, conversions, names of files, running and cancelling."""

import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_comfy
import numpy as np
import pytest
import torch
from fake_comfy import ROOT

NAMES = ("front", "left", "back", "right")


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    with fake_comfy.pack(tmp_path_factory.mktemp("comfy")) as module:
        from triptych_pack.nodes import voxel_picture  # noqa: F401 (what nodes import when they run)

        yield module


@pytest.fixture(scope="module")
def nodes(pack):
    return pack.nodes


@pytest.fixture(scope="module")
def schemas(nodes):
    return {schema.node_id: schema for schema in (node.define_schema() for node in nodes.NODES)}


@pytest.fixture(scope="module")
def error(pack):
    """The library's error as the pack knows it: imported by ComfyUI, the library has another name than in tests."""
    from triptych_pack.triptych.errors import TriptychError

    return TriptychError


@pytest.fixture(scope="module")
def textured(pack):
    """A small textured mesh of the pack's own library, with seams in its UV."""
    from triptych_pack.triptych.geometry.mesh import Material
    from triptych_pack.triptych.geometry.uv import unwrap
    from triptych_pack.triptych.procedural import sample_object

    mesh = unwrap(sample_object().replace(colors=None, materials=()), texture_size=64)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return mesh.replace(materials=(Material(base_color_texture=picture, metallic=0.25, roughness=0.5),))


def test_importing_the_root_does_nothing():
    """pytest, packaging and other tools may import it."""
    before = set(sys.modules)
    spec = fake_comfy.importlib.util.spec_from_file_location("triptych_root", ROOT / "__init__.py")
    module = fake_comfy.importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(sys.modules) - before <= {"pathlib"} and (ROOT / module.WEB_DIRECTORY).is_dir()
    assert module.__all__ == ["WEB_DIRECTORY", "comfy_entrypoint"]


def test_importing_the_nodes_imports_nothing_heavy(tmp_path):
    """What ComfyUI has loaded anyway is free; the rest waits until a node runs."""
    code = (
        "import sys, pathlib, asyncio; sys.path.insert(0, 'tests'); import fake_comfy\n"
        f"with fake_comfy.pack(pathlib.Path({str(tmp_path)!r})) as pack:\n"
        "    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())\n"
        "    [node.define_schema() for node in nodes]\n"
        "    print(len(nodes), sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    import subprocess

    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    heavy = {"torch", "scipy", "trimesh", "skimage", "xatlas", "transformers", "huggingface_hub", "fast_simplification"}
    heavy |= {"diffusers", "peft", "accelerate", "tokenizers"}
    assert int(out.split()[0]) >= 16 and not {name for name in heavy if f"'{name}'" in out}


def test_schemas_are_complete(nodes, schemas):
    assert len(schemas) == len(nodes.NODES), "no two nodes share an id"
    for name, schema in schemas.items():
        assert name.startswith("Triptych_") and schema.category == "Triptych" and schema.description.endswith(".")
        ids = [one.id for one in (*schema.inputs, *schema.outputs)]
        assert len(ids) == len(set(ids)), f"{name}: ids must differ between inputs and outputs too"
        for one in (*schema.inputs, *schema.outputs):
            assert one.tooltip and one.tooltip.rstrip().endswith("."), f"{name}.{one.id} needs a tooltip sentence"
        for one in schema.inputs:
            if one.io_type in ("INT", "FLOAT"):
                assert one.min <= one.default <= one.max
            if one.io_type == "COMBO" and one.id != "file":
                assert one.default in one.options


def test_inputs_are_those_of_execute(nodes):
    """A schema and its function may not drift apart."""
    import inspect

    for node in nodes.NODES:
        parameters = inspect.signature(node.execute).parameters.values()
        named = {one.name for one in parameters if one.kind is not inspect.Parameter.VAR_KEYWORD}
        ids = {one.id for one in node.define_schema().inputs}
        assert named <= ids and (named == ids or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters))
        optional = {one.id for one in node.define_schema().inputs if one.optional}
        defaults = {one.name for one in parameters if one.default is not inspect.Parameter.empty}
        assert optional & named <= defaults, f"{node.__name__}: an input that may be absent needs a default"


def test_written_texts_are_up_to_date(schemas):
    """Locales and help pages say what the schemas say; else run docs/write_node_texts.py."""
    sys.path.insert(0, str(ROOT / "docs"))
    from write_node_texts import texts

    made = dict(texts())
    assert len(made) == 1 + 2 * len(schemas)
    for path, text in made.items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python docs/write_node_texts.py"


def test_translation_covers_everything():
    english, chinese = (
        json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        for language in ("en", "zh")
    )

    def shape(value):
        return {key: shape(one) for key, one in value.items()} if isinstance(value, dict) else bool(value)

    assert shape(chinese) == shape(english)
    leaves = [
        one["tooltip"] for node in chinese.values() for part in ("inputs", "outputs") for one in node[part].values()
    ]
    assert all(any("\u4e00" <= character <= "\u9fff" for character in text) for text in leaves)


class NewMesh:
    """The newest core's class, as far as its constructor goes."""

    def __init__(self, vertices, faces, uvs=None, vertex_colors=None, texture=None, metallic_roughness=None,
                 vertex_counts=None, face_counts=None, unlit=False, normals=None, tangents=None, normal_map=None,
                 occlusion_in_mr=False, material=None, emissive=None):  # fmt: skip
        vars(self).update({name: value for name, value in locals().items() if name != "self"})


class OldMesh:
    def __init__(self, vertices, faces):
        self.vertices, self.faces = vertices, faces


@pytest.mark.parametrize("core_class", [NewMesh, OldMesh])
def test_core_mesh_round_trip(nodes, textured, core_class):
    core_mesh = nodes.core_mesh
    core = core_mesh.to_core(textured, core_class)
    assert (
        core.vertices.ndim == 3 and core.faces.dtype == torch.int64 and core.uvs.shape == (*core.vertices.shape[:2], 2)
    )
    assert core.texture.shape == (1, 64, 64, 3) and core.material["roughness_factor"] == 0.5
    assert all(hasattr(core, name) for name in core_mesh.OPTIONAL_FIELDS), "newer nodes read every field"
    back = core_mesh.from_core(core, 0)
    np.testing.assert_array_equal(back.vertices[back.faces], textured.vertices[textured.faces])
    np.testing.assert_allclose(back.corner_uv(), textured.corner_uv(), atol=1e-6)
    np.testing.assert_array_equal(back.materials[0].base_color_texture, textured.materials[0].base_color_texture)
    assert (back.materials[0].metallic, back.materials[0].roughness) == (0.25, 0.5)
    # v = 0 is the top row there: the same texel has the same colour in both conventions
    u, v = core.uvs[0, 0].numpy()
    np.testing.assert_allclose([u, 1 - v], back.uv[0], atol=1e-6)


def test_core_mesh_colours_are_linear_and_copies(nodes, textured):
    colours = np.random.default_rng(1).random((len(textured.vertices), 4)).astype(np.float32)
    mesh = textured.replace(colors=colours, uv=None, uv_faces=None, materials=())
    core = nodes.core_mesh.to_core(mesh, NewMesh)
    grey = nodes.core_mesh.to_core(mesh.replace(colors=np.full_like(colours, 0.5)), NewMesh).vertex_colors[0, 0]
    assert grey[0] == pytest.approx(0.2140, abs=1e-3) and grey[3] == 0.5, "0.5 in sRGB, alpha untouched"
    before = core.vertices.clone()
    back = nodes.core_mesh.from_core(core, 0)
    np.testing.assert_allclose(back.colors, colours, atol=1e-5)
    back.vertices[:] = 0
    assert torch.equal(core.vertices, before), "an input is never changed"


def test_core_batches(nodes, textured, error):
    one = nodes.core_mesh.to_core(textured, NewMesh)
    count, faces = one.vertices.shape[1], one.faces.shape[1]
    padded = NewMesh(
        torch.cat([one.vertices, torch.zeros_like(one.vertices)]),
        torch.cat([one.faces, torch.zeros_like(one.faces)]),
        vertex_counts=torch.tensor([count, 3]),
        face_counts=torch.tensor([faces, 1]),
    )
    small = nodes.core_mesh.from_core(padded, 1)
    assert (len(small.vertices), len(small.faces)) == (3, 1)
    with pytest.raises(error, match="batch of 2: choose one"):
        nodes.core_mesh.as_mesh(padded)
    with pytest.raises(error, match="no number 2"):
        nodes.core_mesh.from_core(padded, 2)
    with pytest.raises(error, match="a str is connected"):
        nodes.core_mesh.as_mesh("mesh")


@pytest.fixture(scope="module")
def full_core(nodes, textured):
    """A core mesh with every field set, one that no core has yet among them."""
    colours = np.random.default_rng(2).random((len(textured.vertices), 4)).astype(np.float32)
    core = nodes.core_mesh.to_core(textured.replace(colors=colours), NewMesh)
    count = core.vertices.shape[1]
    generator = torch.Generator().manual_seed(0)

    def picture():
        return torch.randint(0, 256, (1, 16, 16, 3), generator=generator) / 255

    core.normals = torch.nn.functional.normalize(torch.randn(1, count, 3, generator=generator), dim=-1)
    core.tangents = torch.randn(1, count, 4, generator=generator)
    core.metallic_roughness, core.normal_map, core.emissive = picture(), picture(), picture()
    core.unlit = core.occlusion_in_mr = True
    core.material |= {"alpha_mode": "MASK", "double_sided": True, "emissive_factor": [1.0, 0.5, 0.0]}
    core.joints = torch.randint(0, 9, (1, count, 4), generator=generator)
    core.vertex_counts, core.face_counts = torch.tensor([count]), torch.tensor([core.faces.shape[1]])
    return core


def assert_same_fields(made, core, but=()):
    for name, value in vars(core).items():
        if name in ("vertex_counts", "face_counts", *but):
            continue
        kept = getattr(made, name)
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(kept, value, atol=1e-5, rtol=0, msg=name)
        else:
            assert kept == value, name


@pytest.mark.parametrize("core_class", [NewMesh, OldMesh])
def test_every_field_of_a_core_mesh_comes_back(nodes, full_core, core_class):
    core_mesh = nodes.core_mesh
    assert all(value is not None and value is not False for value in vars(full_core).values())
    assert_same_fields(core_mesh.to_core(core_mesh.from_core(full_core, 0), core_class), full_core)


def test_one_of_a_padded_batch_takes_its_own_fields(nodes, full_core):
    count, faces = full_core.vertices.shape[1], full_core.faces.shape[1]
    two = NewMesh(**{
        name: torch.cat([value, value.flip(0) * 0]) if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        for name, value in vars(full_core).items() if name != "joints"
    })  # fmt: skip
    two.tangents = torch.arange(2 * count * 4, dtype=torch.float32).view(2, count, 4)
    two.vertex_counts, two.face_counts = torch.tensor([count, 3]), torch.tensor([faces, 1])
    made = nodes.core_mesh.to_core(nodes.core_mesh.from_core(two, 1), NewMesh)
    assert torch.equal(made.tangents, two.tangents[1:, :3]) and torch.equal(made.emissive, two.emissive[1:])


def test_what_an_operation_must_drop_is_dropped_and_said(nodes, full_core):
    core_mesh, lost = nodes.core_mesh, nodes.core_fields.lost
    source = core_mesh.from_core(full_core, 0)
    assert lost(source, source) == []
    moved = source.replace(vertices=source.vertices * 2)
    assert lost(source, moved) == ["joints and tangents of the core mesh no longer fit and are dropped"]
    made = core_mesh.to_core(moved, NewMesh)
    assert made.tangents is None and not hasattr(made, "joints")
    assert_same_fields(made, full_core, but=("vertices", "tangents", "joints"))
    from triptych_pack.triptych.geometry.cleanup import decimate
    from triptych_pack.triptych.geometry.uv import unwrap

    unwrapped = unwrap(source, texture_size=64)
    again = core_mesh.to_core(unwrapped, NewMesh)
    assert again.unlit is True and again.emissive is None and again.occlusion_in_mr is False
    assert "double_sided" not in again.material
    names = "emissive, joints, further numbers of the material, occlusion_in_mr and tangents"
    assert lost(source, unwrapped) == [f"{names} of the core mesh no longer fit and are dropped"]
    assert "unlit" in lost(source, decimate(source, 200))[0], "a new surface keeps nothing"
    assert "tangents" in nodes.files.notes(source, "glb") and "tangents" not in nodes.files.notes(moved.replace(
        carried=None), "glb")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    (
        "../x",
        "/x",
        "a/../../x",
        "..\\x",
        "C:\\x",
        "",
        ".",
        "a\0b",
        "a\nb",
        "x" * 300,
        "a/" * 600,
        "é" * 150,
        "..",
        "\\\\host\\x",
    ),
)
def test_names_that_lead_elsewhere(nodes, error, tmp_path, name):
    with pytest.raises(error, match="give a name inside ComfyUI's input or output folder"):
        nodes.paths.inside(tmp_path, name)


def test_links_that_lead_elsewhere(nodes, error, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "secret.obj").write_text("o")
    (root / "link").symlink_to(outside)
    (root / "file.obj").symlink_to(outside / "secret.obj")
    for name in ("link/secret.obj", "file.obj", "link/new.obj"):
        with pytest.raises(error, match="leads out of root"):
            nodes.paths.inside(root, name)
    assert list(nodes.paths.mesh_files(root)) == ["file.obj"], "folders behind links are not listed"
    assert nodes.routes.listed(root) == [], "and links to files are listed nowhere"
    assert nodes.paths.inside(root, "a/./b.obj") == root / "a" / "b.obj"


def test_results_are_listed_with_their_files(nodes, textured, tmp_path):
    from triptych_pack.triptych.geometry.files import write_mesh

    (tmp_path / "mesh").mkdir()
    for number in (1, 11):
        write_mesh(textured, tmp_path / "mesh" / f"Test_{number:05}_.obj")
    rows = nodes.routes.listed(tmp_path)
    assert [len(row["files"]) for row in rows] == [3, 3] and {row["format"] for row in rows} == {"obj"}
    assert all(entry["subfolder"] == "mesh" and entry["type"] == "output" for row in rows for entry in row["files"])


def test_load_mesh_is_cached_by_the_file_and_what_it_names(nodes, textured):
    import folder_paths
    from triptych_pack.triptych.geometry.files import write_mesh

    folder = Path(folder_paths.get_input_directory()) / "crowded"
    folder.mkdir()
    for number in range(600):
        (folder / f"a{number:03}.png").write_bytes(b"neighbour")
    obj, mtl, picture = (next(p for p in write_mesh(textured, folder / "z.obj") if p.suffix == suffix)
                         for suffix in (".obj", ".mtl", ".png"))  # fmt: skip
    (folder / "z.obj").with_suffix(".bin").write_bytes(b"no part of it")

    def state():
        return nodes.files.LoadMesh.fingerprint_inputs(file="crowded/z.obj")

    first = state()
    assert first == state() and len(first) == 3
    (folder / "b.obj").write_text("o other")
    (folder / "a000.png").write_bytes(b"changed")
    assert state() == first, "other uploads are no news"
    for path in (obj, mtl, picture):
        before = state()
        path.write_bytes(path.read_bytes() + b"\n")
        assert state() != before, f"a changed {path.suffix} is read again"
    before = state()
    picture.unlink()
    assert state() != before, "and so is one that is gone"


def test_load_bundle_is_cached_by_the_files_of_all_its_folders(nodes, tmp_path):
    (tmp_path / "ckpts").mkdir()
    for name in ("pipeline.json", "ckpts/flow.json", "ckpts/flow.safetensors"):
        (tmp_path / name).write_text("{}")
    first = nodes.bundles.state(tmp_path)
    (tmp_path / "triptych-files.json").write_text("{}")
    (tmp_path / "README.md").write_text("words")
    assert nodes.bundles.state(tmp_path) == first, "using a bundle or describing it does not change it"
    for name in ("pipeline.json", "ckpts/flow.json", "ckpts/flow.safetensors"):
        before = nodes.bundles.state(tmp_path)
        (tmp_path / name).write_text("{ }" + name)
        assert nodes.bundles.state(tmp_path) != before, name


def test_prefixes_follow_comfy_s_rules_inside_output(nodes, pack, error, monkeypatch, tmp_path):
    import folder_paths

    calls = []

    def get_save_image_path(prefix, folder):
        calls.append(prefix)
        return f"{folder}/mesh", "Test", 7, "mesh", prefix

    monkeypatch.setattr(folder_paths, "get_save_image_path", get_save_image_path, raising=False)
    assert nodes.files.free_name(tmp_path, "mesh/Test", "obj") == tmp_path / "mesh" / "Test_00007_.obj"
    with pytest.raises(error):
        nodes.files.free_name(tmp_path, "../Test", "obj")
    assert calls == ["mesh/Test"]


def test_masks_of_load_image_and_of_segmentation(nodes, error):
    picture = torch.rand(1, 8, 8, 3)
    alpha = torch.zeros(1, 8, 8)
    alpha[:, 2:6, 2:6] = 1
    cut = nodes.pictures.cut_out
    for mask, shows in ((alpha, "auto"), (1 - alpha, "auto"), (alpha, "object"), (1 - alpha, "background")):
        made = cut(picture, mask, shows, "the front view")
        np.testing.assert_array_equal(made[..., 3], alpha[0])
        np.testing.assert_array_equal(made[..., :3], picture[0])
    assert cut(picture, torch.zeros(1, 64, 64), "auto", "x").shape == (8, 8, 3), "Load Image's mask of opaque pictures"
    with pytest.raises(error, match="the mask of the front view is 4 x 8 pixels, the picture 8 x 8"):
        cut(picture, torch.rand(1, 8, 4), "auto", "the front view")
    with pytest.raises(error, match="the left view is a batch of 2"):
        cut(torch.rand(2, 8, 8, 3), None, "auto", "the left view")
    eight_bit = torch.arange(256).reshape(1, 16, 16) / 255
    restored = cut(torch.rand(1, 16, 16, 3), 1 - eight_bit, "background", "x")[..., 3]
    np.testing.assert_array_equal(restored, eight_bit[0]), "an alpha survives Load Image bit for bit"


def test_sources_name_what_is_missing(nodes, error):
    picture = torch.rand(1, 8, 8, 3)
    with pytest.raises(error, match="no picture is connected"):
        nodes.views.sources({}, "auto", "auto")
    with pytest.raises(error, match="both a sheet and the left view"):
        nodes.views.sources({"sheet": picture, "left": picture}, "auto", "auto")
    assert list(nodes.views.sources({"sheet": torch.rand(1, 8, 24, 3)}, "auto", "auto")) == ["front", "left", "back"]


def test_sheets_round_trip(nodes):
    pictures = {name: torch.rand(1, 8, 8, 3) for name in NAMES}
    sheet, mask = nodes.sheets.JoinViewSheet.execute("grid", "white", **pictures).result
    assert sheet.shape == (1, 16, 16, 3) and float(mask.min()) == 1
    for name, cut in zip(NAMES, nodes.sheets.SplitViewSheet.execute(sheet, "grid").result, strict=True):
        torch.testing.assert_close(cut, pictures[name])
    row, _ = nodes.sheets.JoinViewSheet.execute("row", "black", **{n: pictures[n] for n in NAMES[:3]}).result
    assert nodes.sheets.SplitViewSheet.execute(row, "auto").result[3] is None


def test_voxel_picture_shows_the_object(nodes):
    axis = (np.arange(32) + 0.5) / 32 - 0.5
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    ball = (0.3 - np.sqrt(x**2 + y**2 + z**2)) * 32
    shown = np.asarray(nodes.voxel_picture.voxel_picture(ball)).astype(int)
    empty = np.asarray(nodes.voxel_picture.voxel_picture(np.full((32, 32, 32), -1.0)))
    covered = (shown != empty).any(axis=-1)
    assert shown.shape == (256, 256, 3) and covered.mean() == pytest.approx(np.pi * 0.3**2 / 1.6**2, rel=0.15)
    rows, columns = np.nonzero(covered)
    assert abs(rows.mean() - 127.5) < 3 and abs(columns.mean() - 127.5) < 3
    assert shown[90, 100].sum() > shown[165, 150].sum(), "lit from above"


def test_azimuths_are_read_or_refused(nodes, error):
    assert nodes.render.parsed_azimuths("0, 45;90 -10") == [0, 45, 90, -10]
    for text in ("", "front", "nan", "1, inf", ",".join(["1"] * 361)):
        with pytest.raises(error, match="write 1-360 numbers of degrees"):
            nodes.render.parsed_azimuths(text)


@pytest.mark.parametrize("fov", [0.0, 40.0])
def test_chosen_cameras_hold_the_mesh(nodes, textured, fov):
    mesh = textured.replace(vertices=textured.vertices * 5)
    vertices = torch.tensor(mesh.vertices)
    for camera in nodes.render.chosen_cameras(mesh, "turntable", 5, "", 30.0, fov):
        ndc, depth = camera.project(vertices)
        assert float(ndc.abs().max()) < 1 and float(depth.min()) > 0


def test_cleaning_changes_no_input(nodes, textured):
    before = {name: getattr(textured, name).copy() for name in ("vertices", "faces", "uv", "uv_faces")}
    wanted = nodes.clean.CleanSettings(smooth=2, remesh="voxels", remesh_resolution=24, target_faces=500)
    reporter = SimpleNamespace(cancel=lambda: False, progress=lambda stage, fraction: None)
    made = nodes.clean.cleaned(textured, wanted, reporter)
    assert len(made.faces) <= 500 and all(np.array_equal(getattr(textured, name), old) for name, old in before.items())
    size, wanted_size = (mesh.bounds[1] - mesh.bounds[0] for mesh in (made, textured))
    np.testing.assert_allclose(size, wanted_size, atol=0.1 * wanted_size.max())


class Interrupted(Exception):
    """Stands for comfy.model_management.InterruptProcessingException."""


@pytest.fixture
def comfy(monkeypatch):
    """ComfyUI's progress bar and interrupt flag."""
    state = SimpleNamespace(interrupted=False, updates=[])

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            state.updates.append((value / self.total, preview))

    def check():
        if state.interrupted:
            state.interrupted = False
            raise Interrupted

    management, utils = ModuleType("comfy.model_management"), ModuleType("comfy.utils")
    management.throw_exception_if_processing_interrupted, utils.ProgressBar = check, ProgressBar
    for name, module in (("comfy", ModuleType("comfy")), (management.__name__, management), (utils.__name__, utils)):
        monkeypatch.setitem(sys.modules, name, module)
    return state


def test_run_reports_and_returns(nodes, comfy):
    def work(reporter):
        reporter.progress("a", 0.25)
        reporter.picture("image")
        reporter.progress("b", 1.0)
        return threading.current_thread(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        thread, inference = nodes.running.run(work)
    assert thread is not threading.current_thread() and inference
    assert comfy.updates == [(0.25, None), (0.25, ("JPEG", "image", 256)), (1.0, None)]
    with pytest.raises(ZeroDivisionError):
        nodes.running.run(lambda reporter: 1 / 0)


def test_cancel_does_not_wait_and_the_next_run_does(nodes, comfy):
    ended = []

    def deaf(reporter):
        comfy.interrupted = True
        time.sleep(0.8)  # as inside one call that nothing can stop
        ended.append(reporter.cancel())

    began = time.monotonic()
    with pytest.raises(Interrupted):
        nodes.running.run(deaf)
    assert time.monotonic() - began < 0.6 and ended == []
    assert nodes.running.run(lambda reporter: list(ended)) == [True], "it waited, and the remnant was told to stop"
