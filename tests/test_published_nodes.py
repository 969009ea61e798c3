"""Published bundles through the nodes: Load bundle and Reconstruct mesh on a small folder of random weights."""

import importlib
import re
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import fake_comfy
import numpy as np
import pytest
import torch
from comfy_server import ComfyServer, find_comfy
from published_folder import SMALL, name_image_encoder, write_image_encoder, write_runnable_folder

FOUND = find_comfy()
SETTINGS = {
    "seed": 3, "steps": 2, "guidance": -1.0, "ensemble": 4, "texture_size": 0, "target_faces": 400,
    "keep_silhouettes": True, "second_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """ComfyUI's folders with a published bundle called small among the models."""
    base = tmp_path_factory.mktemp("comfy")
    folder = write_runnable_folder(base / "models" / "triptych" / "small")
    name_image_encoder(folder, write_image_encoder(base / "encoder"))
    return base


@pytest.fixture(scope="module")
def nodes(base):
    with fake_comfy.pack(base) as pack:
        importlib.import_module("triptych_pack.nodes.voxel_picture")
        yield pack.nodes


@pytest.fixture
def comfy(monkeypatch):
    """ComfyUI's progress bar, interrupt flag and memory management, as far as they are asked for."""
    state = SimpleNamespace(shares=[], freed=[], interrupt_at=2.0)

    class Interrupted(Exception):
        pass

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            state.shares.append(value / self.total)

    def check():
        if state.shares and state.shares[-1] >= state.interrupt_at:
            raise Interrupted

    class ModelPatcher:
        def __init__(self, model, load_device, offload_device):
            self.model, self.load_device = model, load_device

    package, management = ModuleType("comfy"), ModuleType("comfy.model_management")
    patching, utils = ModuleType("comfy.model_patcher"), ModuleType("comfy.utils")
    management.throw_exception_if_processing_interrupted = check
    management.get_torch_device = management.unet_offload_device = lambda: torch.device("cpu")
    management.free_memory = lambda size, device: state.freed.append(size)
    management.load_models_gpu = lambda models, memory_required=0: None
    patching.ModelPatcher, utils.ProgressBar = ModelPatcher, ProgressBar
    package.model_management = management
    for module in (package, management, patching, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    state.Interrupted = Interrupted
    return state


@pytest.fixture
def loaded(nodes, comfy):
    return nodes.bundles.LoadBundle.execute("small").result[0]


@pytest.fixture(scope="module")
def views(nodes):
    from triptych_pack.triptych.images.views import prepare_views
    from triptych_pack.triptych.procedural import sample_views

    pictures = sample_views(128)
    return prepare_views({name: pictures[name] for name in ("front", "left")}, size=128)


@pytest.fixture(scope="module")
def error(nodes):
    from triptych_pack.triptych.errors import TriptychError

    return TriptychError


def test_the_modes_are_those_of_the_library(nodes):
    from triptych.pipelines.published import MODES

    assert list(nodes.reconstruct.MULTI_VIEW) == ["auto", *MODES]


def test_a_published_folder_is_listed_and_gives_a_mesh(nodes, comfy, loaded, views):
    from triptych.bundles.bundle import load_bundle
    from triptych.images.published import published_pictures_of
    from triptych.pipelines.published import PublishedSettings, Sampling, mesh_from_pictures

    assert "small" in nodes.bundles.bundle_names()
    mesh, text = nodes.reconstruct.Reconstruct.execute(loaded, views, **SETTINGS, multi_view="concat").result
    direct = mesh_from_pictures(
        published_pictures_of(views),
        load_bundle(nodes.bundles.folder_of("small")),
        PublishedSettings(3, Sampling(2), Sampling(2), "concat", target_faces=400),
    )
    assert np.array_equal(mesh.vertices, direct.mesh.vertices) and np.array_equal(mesh.colors, direct.mesh.colors)
    assert "seed 3, 2 steps, guidance 5, multi_view concat\nsecond stage: 2 steps, guidance 5\n" in text
    assert "a published bundle makes no use of ensemble and keep_silhouettes" in text
    assert comfy.shares == sorted(comfy.shares) and len(set(comfy.shares)) > 6 and comfy.shares[-1] == 1.0


def test_comfy_makes_room_for_the_largest_network_and_the_pipeline_lets_go_of_all(nodes, comfy, loaded, views):
    files = (nodes.bundles.folder_of("small") / "ckpts").glob("*.safetensors")
    used = re.compile("ss_flow|ss_dec|slat_flow|slat_dec_mesh")
    largest = max(file.stat().st_size for file in files if used.match(file.name))
    assert loaded.patcher is None and loaded.largest == largest
    nodes.reconstruct.reconstruct(loaded, views, **SETTINGS)
    assert comfy.freed == [nodes.reconstruct.WORK_BYTES + largest] and loaded.bundle._networks == {}


def test_auto_is_the_library_s_mode_and_modes_differ(nodes, loaded, views):
    made = {mode: nodes.reconstruct.reconstruct(loaded, views, **SETTINGS, multi_view=mode)
            for mode in ("auto", "stochastic", "multidiffusion")}  # fmt: skip
    assert np.array_equal(made["auto"].mesh.vertices, made["stochastic"].mesh.vertices)
    assert not np.array_equal(made["auto"].coords, made["multidiffusion"].coords)


def test_a_texture_size_projects_the_views(nodes, loaded, views):
    made = nodes.reconstruct.reconstruct(loaded, views, **SETTINGS | {"texture_size": 64})
    assert made.mesh.materials[0].base_color_texture.shape[:2] == (64, 64)
    assert np.ptp(made.mesh.vertices, axis=0).max() == pytest.approx(1, abs=1e-5)


def test_cancelling_stops_between_steps(nodes, comfy, loaded, views, monkeypatch):
    from triptych_pack.triptych.pipelines import published

    reached = []
    monkeypatch.setattr(published, "sample_slat", lambda *_, **__: reached.append("latents"))
    comfy.interrupt_at = 0.1
    with pytest.raises(comfy.Interrupted):
        nodes.reconstruct.reconstruct(loaded, views, **SETTINGS | {"steps": 1000})
    assert comfy.shares[-1] < 0.3
    comfy.interrupt_at = 2.0
    nodes.running.run(lambda reporter: None)  # waits for the remnant
    assert reached == [], "the library was told to stop as well"


def test_wrong_combinations_name_both(nodes, comfy, loaded, views, error):
    execute, freed = nodes.reconstruct.Reconstruct.execute, len(comfy.freed)
    with pytest.raises(error, match="multi_view lifting is for .* small is a published bundle, so choose one of auto,"):
        execute(loaded, views, **SETTINGS, multi_view="lifting")
    with pytest.raises(error, match="second_stage off leaves small without a mesh.*choose bundle's own"):
        execute(loaded, views, **SETTINGS, second_stage="off")
    own = nodes.bundles.LoadBundle.execute("triptych-tiny").result[0]
    with pytest.raises(error, match="multi_view concat is for published bundles: triptych-tiny .* so choose auto"):
        execute(own, views, **SETTINGS, multi_view="concat")
    assert own.patcher is not None and len(comfy.freed) == freed, "nothing is unloaded for what cannot be done"


@pytest.fixture
def slow_hub(nodes, comfy, tmp_path, monkeypatch):
    """A Hub that serves the small folder as owner/small and holds its first weights back after 30,000 bytes."""
    from test_published_bundles import FakeHub, _handler
    from triptych_pack.triptych.bundles import hub

    made, fake = hub.HubFolder, FakeHub(nodes.bundles.folder_of("small"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    where = {"endpoint": f"http://127.0.0.1:{server.server_address[1]}", "cache_dir": tmp_path / "cache"}
    fake.go_on = threading.Event()
    fake.held[f"ckpts/{SMALL['structure_flow'][1]}.safetensors"] = (30_000, fake.go_on)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(hub, "_RESUMED_BYTES", 10_000)
    monkeypatch.setattr(hub, "HubFolder", lambda name, revision=None: made(name, revision, **where))
    yield fake
    fake.go_on.set()
    server.shutdown()
    server.server_close()


@pytest.mark.timeout(300)
def test_a_download_shows_how_far_it_is_and_can_be_interrupted(nodes, comfy, slow_hub):
    comfy.interrupt_at = 0.01
    with pytest.raises(comfy.Interrupted):
        nodes.bundles.LoadBundle.execute("triptych-tiny", repository=" owner/small@main ")
    assert not slow_hub.go_on.is_set() and 0 < comfy.shares[-1] < 0.5, "interrupted while the Hub held the file back"
    comfy.interrupt_at = 2.0
    comfy.shares.clear()
    slow_hub.go_on.set()
    loaded = nodes.bundles.LoadBundle.execute("triptych-tiny", repository="owner/small@main").result[0]
    assert loaded.bundle.name == "owner/small" and loaded.largest > 0
    assert len(set(comfy.shares)) > 50 and comfy.shares[-1] == 1.0
    before = len(slow_hub.requests)
    assert loaded.bundle.network("slat_decoder_mesh") is not None and len(slow_hub.requests) == before


def test_revisions_are_taken_and_other_names_refused(nodes, comfy, error):
    for loader in (nodes.bundles.LoadBundle, nodes.flux.LoadFlux):
        check = loader.validate_inputs
        for name in ("", "owner/name", "owner/name@main", "owner/name@refs/pr/1", "a/b@" + "0" * 40):
            assert check(repository=name) is True, name
        for name in (
            "owner",
            "owner/name@",
            "owner/name@/x",
            "a/b/c",
            "../x",
            "a/b@../x",
            "a/b@x y",
            "a/b@" + "0" * 300,
        ):
            assert "is no Hugging Face id: write owner/name or owner/name@revision" in check(repository=name), name
    with pytest.raises(error, match="is no Hugging Face id"):
        nodes.bundles.LoadBundle.execute("triptych-tiny", repository="a/b@")


@pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
@pytest.mark.timeout(1800)
def test_in_a_real_comfyui(base):
    from triptych.procedural import sample_views

    with ComfyServer(base) as server:
        client = server.client()
        for name in ("front", "left"):
            sample_views(128)[name].save(base / f"{name}.png")
            client.upload(f"{name}.png", (base / f"{name}.png").read_bytes())
        graph = {name: {"class_type": "LoadImage", "inputs": {"image": f"{name}.png"}} for name in ("front", "left")}
        given = {name: [name, 0] for name in graph} | {f"{name}_mask": [name, 1] for name in graph}
        graph |= {
            "bundle": {"class_type": "Triptych_LoadBundle", "inputs": {"name": "small"}},
            "views": {"class_type": "Triptych_PrepareViews", "inputs": given | {
                "layout": "auto", "size": 128, "foreground": "auto", "mask_shows": "auto",
            }},
            "mesh": {"class_type": "Triptych_Reconstruct", "inputs": SETTINGS | {
                "bundle": ["bundle", 0], "views": ["views", 0], "multi_view": "multidiffusion",
            }},
            "export": {"class_type": "Triptych_ExportMesh", "inputs": {
                "mesh": ["mesh", 0], "filename_prefix": "mesh/Test", "file_format": "glb",
            }},
        }  # fmt: skip
        result = client.run(graph)
        assert "multi_view multidiffusion" in result.outputs["mesh"]["text"][0]
        assert (base / "output" / "mesh" / "Test_00001_.glb").is_file()
