"""Load Flux views model and Flux views: without ComfyUI on a model that knows its picture, and in a real ComfyUI on a
small random one."""

import io
import json
import shutil
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import fake_comfy
import numpy as np
import pytest
import torch
from comfy_server import ROOT, ApiError, ComfyServer, find_comfy
from PIL import Image

from triptych.flux.card import ViewsCard

NAMES = ("front", "left", "back", "right")
PANEL = 64
MAGENTA = (1.0, 0.0, 1.0)
TRAINED = ROOT / "weights" / "triptych-tiny" / "flux"
FOUND = find_comfy()
real = pytest.mark.skipif(isinstance(FOUND, str), reason=str(FOUND))
SETTINGS = {
    "prompt": "a red chair", "seed": 4, "steps": 3, "guidance": -1.0, "rerolls": 1, "size": 96, "foreground": "auto",
    "mask_shows": "auto",
}  # fmt: skip
LOADING = {"lora": "none", "lora_strength": 1.0, "dtype": "auto", "offload": "auto", "quantisation": "none"}


class Interrupted(Exception):
    """Stands for comfy.model_management.InterruptProcessingException."""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("comfy")


@pytest.fixture(scope="module")
def flux(base):
    with fake_comfy.pack(base):
        from triptych_pack.nodes import flux as module
        from triptych_pack.triptych.pipelines import views  # noqa: F401 (what the node imports when it runs)

        module.ui.PreviewImage = lambda image, cls: SimpleNamespace(as_dict=lambda: {"images": [image.shape]})
        yield module


@pytest.fixture(scope="module")
def error(flux):
    """The library's error as the pack knows it: imported by ComfyUI, the library has another name than in tests."""
    from triptych_pack.triptych.errors import TriptychError

    return TriptychError


@pytest.fixture(scope="module")
def sides():
    """The sample object cut out, (PANEL, PANEL, 4) by view name."""
    from triptych.geometry.cameras import rig_cameras
    from triptych.procedural import sample_object
    from triptych.render.views import render_views, shade

    cameras = rig_cameras()
    rgba = shade(render_views(sample_object(), cameras, PANEL), cameras).clamp(0, 1)
    return {name: view.permute(1, 2, 0).numpy() for name, view in zip(NAMES, rgba, strict=True)}


@pytest.fixture(scope="module")
def painted(sides):
    """The sheet of the sample object on magenta, (3, 2 PANEL, 2 PANEL)."""
    from triptych.images.sheets import join_sheet

    return torch.from_numpy(join_sheet(sides, "grid", MAGENTA)).permute(2, 0, 1)


@pytest.fixture
def comfy(monkeypatch):
    """ComfyUI's progress bar, interrupt flag and memory management; what was asked of them."""
    asked = SimpleNamespace(interrupted=False, updates=[], freed=[], loaded=[], device=torch.device("cpu"))

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            asked.updates.append((value / self.total, preview))

    def check():
        if asked.interrupted:
            asked.interrupted = False
            raise Interrupted

    names = ("comfy", "comfy.model_management", "comfy.utils", "comfy.model_patcher")
    modules = {name: ModuleType(name) for name in names}
    management = modules["comfy.model_management"]
    vars(modules["comfy"]).update(model_management=management)
    vars(modules["comfy.utils"]).update(ProgressBar=ProgressBar)
    vars(modules["comfy.model_patcher"]).update(ModelPatcher=lambda model, **devices: SimpleNamespace(model=model))
    vars(management).update(
        throw_exception_if_processing_interrupted=check,
        get_torch_device=lambda: asked.device,
        unet_offload_device=lambda: torch.device("cpu"),
        free_memory=lambda amount, device: asked.freed.append((amount, device)),
        load_models_gpu=lambda models, memory_required: asked.loaded.append((models, memory_required)),
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return asked


class Painter:
    """A model that paints a given sheet, once it has seen as many seeds as ``after`` says; else an empty one."""

    def __init__(self, sheet, *, after=0, pause_s=0.0):
        self.card = ViewsCard(
            "painter", "Apache-2.0", "flux2-klein", "{text}. given: {given}.", PANEL, MAGENTA, steps=8, guidance=2.0
        )
        self.painting, self.after, self.pause_s, self.calls = sheet, after, pause_s, []
        self.warnings: tuple[str, ...] = ()
        self.pipeline, self.proportions = SimpleNamespace(), None

    def notes(self, *, guidance, references):
        return (f"painter ignores the guidance {guidance:g}",) if guidance else ()

    def sheet(self, prompt, references, *, seed, steps=None, guidance=None, negative="", on_step=None):
        usual = self.card.usual(bool(references))
        steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
        self.calls.append(
            SimpleNamespace(prompt=prompt, references=references, seed=seed, steps=steps, guidance=guidance)
        )
        for step in range(steps):
            time.sleep(self.pause_s)
            on_step(step + 1, steps, lambda: self.painting[:, ::2, ::2])
        empty = torch.tensor(MAGENTA)[:, None, None].expand_as(self.painting)
        return self.painting if len(self.calls) > self.after else empty


def drawn(flux, model, **changes):
    """The node's result and what it shows."""
    output = flux.FluxViews.execute(flux.LoadedFlux(model, torch.device("cpu")), **SETTINGS | changes)
    return output.result, output.ui


@pytest.fixture
def output_of(monkeypatch, flux):
    """io.NodeOutput, as far as a node's end goes."""

    class NodeOutput:
        def __init__(self, *result, ui=None):
            self.result, self.ui = result, ui

    monkeypatch.setattr(flux.io, "NodeOutput", NodeOutput, raising=False)


def test_a_sentence_becomes_views(flux, comfy, output_of, painted, sides):
    model = Painter(painted)
    (views, sheet, mask, *pictures, info), shown = drawn(flux, model)
    (call,) = model.calls
    assert (call.prompt, call.references) == ("a red chair. given: nothing.", [])
    assert (call.seed, call.steps, call.guidance) == (4, 3, 2.0), "guidance -1 is the model's own"
    assert views.names == NAMES and views.size == 96
    assert sheet.shape == (1, 192, 192, 3) and mask.shape == (1, 192, 192)
    np.testing.assert_allclose(mask[0, :96, :96], views.masks[0], atol=1e-6)
    for row, (name, picture) in enumerate(zip(NAMES, pictures, strict=True)):
        alpha = views.masks[row, ..., None]
        expected = views.images[row, :3].permute(1, 2, 0) * alpha + 1 - alpha
        torch.testing.assert_close(picture, expected[None])
        agreement = _overlap(views.masks[row].numpy() > 0.5, _resized(sides[name][..., 3], 96) > 0.5)
        assert agreement > 0.9, f"the {name} output shows the {name} panel"
    assert info.splitlines()[0] == "painter drew front, left, back, right for 'a red chair'"
    assert shown["text"] == [info] and shown["images"] == [(1, 192, 192, 3)]
    assert shown["triptych_views"] == [{"generated": NAMES, "seed": 4, "rerolls": 0, "warnings": ()}]


def test_a_given_picture_stays_and_guides(flux, comfy, output_of, painted, sides):
    front = torch.from_numpy(np.kron(sides["front"], np.ones((2, 2, 1), np.float32)))
    model = Painter(painted)
    (views, *_, info), shown = drawn(flux, model, prompt="", front=front[None, ..., :3], front_mask=front[None, ..., 3])
    (call,) = model.calls
    assert call.prompt.endswith("given: front.") and [one.shape for one in call.references] == [(3, PANEL, PANEL)]
    assert shown["triptych_views"][0]["generated"] == ("left", "back", "right")
    from triptych.images.views import prepare_views

    alone = prepare_views({"front": front.numpy()}, size=96)
    assert _overlap(views.masks[0].numpy() > 0.5, alone.masks[0].numpy() > 0.5) > 0.9
    assert info.startswith("painter drew left, back, right\n")


def test_the_native_route_brings_sides_to_the_width_that_the_model_expects(flux, painted, sides):
    """What the loader puts on the VAE goes through the plan to where the sheet is split."""
    from triptych_pack.nodes import flux_models, flux_native
    from triptych_pack.triptych.flux.card import default_card
    from triptych_pack.triptych.images.views import prepare_views

    class Network:
        size = 24

        def __call__(self, pictures):
            return torch.tensor([[np.log(0.2), 0.0]]).expand(len(pictures), 2)

    vae = SimpleNamespace(latent_channels=128)
    assert flux_models.proportions_of(vae) is None, "of ComfyUI's own loaders"
    setattr(vae, flux_models.PROPORTIONS_ATTRIBUTE, Network())
    given = prepare_views({"front": sides["front"]}, size=128)
    sheet, widths = painted.permute(1, 2, 0)[None], []
    for network in (None, flux_models.proportions_of(vae)):
        plan = flux_native.Plan(default_card("flux2-klein"), given, 128, (), network)
        views, _ = flux_native.put_together(sheet, plan, MAGENTA, 128)
        columns = np.flatnonzero((views.pictures["left"][..., 3] > 0.5).any(axis=0))
        rows = np.flatnonzero((views.pictures["front"][..., 3] > 0.5).any(axis=1))
        widths.append((columns[-1] - columns[0] + 1) / (rows[-1] - rows[0] + 1))
    assert widths[0] > 0.3 and widths[1] == pytest.approx(0.2, abs=0.03)


def test_a_bad_sheet_is_drawn_again_and_said(flux, comfy, output_of, painted):
    model = Painter(painted, after=1)
    (*_, info), shown = drawn(flux, model)
    assert [call.seed for call in model.calls] == [4, 5] and "seed 5, 2 sheets drawn" in info
    facts = shown["triptych_views"][0]
    assert (facts["seed"], facts["rerolls"]) == (5, 1) and "drawn again once" in facts["warnings"][0]
    assert info.splitlines()[-1] == facts["warnings"][-1], "warnings reach the user"


def test_what_loading_and_settings_say_is_passed_on(flux, comfy, output_of, painted):
    model = Painter(painted)
    model.warnings = ("the LoRA was made for another size",)
    (*_, info), shown = drawn(flux, model, guidance=7.5)
    assert list(shown["triptych_views"][0]["warnings"]) == info.splitlines()[3:]
    assert info.splitlines()[3:] == ["the LoRA was made for another size", "painter ignores the guidance 7.5"]


def test_a_side_that_stays_empty_gives_no_picture(flux, comfy, output_of, painted):
    half = painted.clone()
    half[:, :, PANEL:] = torch.tensor(MAGENTA)[:, None, None]
    (views, _, mask, *pictures, info), _ = drawn(flux, Painter(half), rerolls=0)
    assert views.names == ("front", "back") and [one is None for one in pictures] == [False, True, False, True]
    assert float(mask[0, :, 96:].max()) == 0 and "left and right panel stayed empty" in info


def test_every_step_is_shown(flux, comfy, output_of, painted):
    drawn(flux, Painter(painted), steps=5)
    shares = [share for share, _ in comfy.updates]
    assert shares == sorted(shares) and shares[-1] == 1
    previews = [preview for _, preview in comfy.updates if preview is not None]
    assert len(previews) == 5 and {(kind, image.size) for kind, image, _ in previews} == {("JPEG", (PANEL, PANEL))}
    pixels = np.asarray(previews[-1][1]).astype(int)
    np.testing.assert_allclose(pixels, painted[:, ::2, ::2].permute(1, 2, 0).numpy() * 255, atol=0.51)


def test_cancel_within_a_step(flux, comfy, output_of, painted):
    model = Painter(painted, pause_s=1.5)
    comfy.updates, began = Interrupting(comfy), time.monotonic()
    with pytest.raises(Interrupted):
        drawn(flux, model, steps=50)
    assert time.monotonic() - began < 1.2 and len(model.calls) == 1
    flux.run(lambda reporter: None)  # waits for what is left of the step
    assert time.monotonic() - began < 6, "the sheet is given up after the step"


class Interrupting(list):
    """Updates of the progress bar, the first of which makes the user press cancel."""

    def __init__(self, comfy):
        super().__init__()
        self.comfy = comfy

    def append(self, update):
        super().append(update)
        self.comfy.interrupted = True


def test_what_is_missing_or_wrong_is_said(flux, comfy, output_of, painted, error):
    with pytest.raises(error, match=r"prompt.*pic|pic.*prompt"):
        drawn(flux, Painter(painted), prompt="  ")
    with pytest.raises(error, match="the left view is a batch of 2 pictures"):
        drawn(flux, Painter(painted), left=torch.rand(2, 8, 8, 3))


def test_room_is_made_before_the_work(flux, comfy, output_of, painted):
    drawn(flux, Painter(painted))
    assert comfy.freed == [(flux.WORK_BYTES, torch.device("cpu"))] and comfy.loaded == []
    comfy.freed.clear()
    patcher = object()
    assert flux.LoadedFlux(None, "cuda:0", patcher).load(7.0) == "cuda:0"
    assert comfy.loaded == [([patcher], 7.0)] and comfy.freed == []


# Which models a graph can name.


@pytest.fixture
def models(base):
    """Models of every kind in ComfyUI's folders, and folders that are none."""
    folder = base / "models"
    contents = {
        "triptych/mine/views.json": "{}",
        "triptych/bundle/flux/views.json": "{}",
        "triptych/other/bundle.json": "{}",
        "diffusers/klein/model_index.json": json.dumps({"_class_name": "Flux2KleinPipeline"}),
        "diffusers/klein/transformer/weights.safetensors": "w",
        "diffusers/sdxl/model_index.json": json.dumps({"_class_name": "StableDiffusionXLPipeline"}),
        "diffusers/broken/model_index.json": "{",
        "diffusers/listed/model_index.json": "[]",
        "loras/one.safetensors": "1",
        "loras/deep/two.safetensors": "2",
        "loras/old.pt": "3",
    }
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    yield folder
    for name in ("triptych", "diffusers", "loras"):
        shutil.rmtree(folder / name)


def test_models_are_found_where_they_may_lie(flux, models, error):
    embedded = ["triptych-tiny"] if (TRAINED / "views.json").is_file() else []
    assert flux.model_names() == [*embedded, "bundle", "mine", "klein"]
    assert flux.model_folder("mine") == models / "triptych" / "mine"
    assert flux.model_folder("bundle") == models / "triptych" / "bundle" / "flux"
    assert flux.model_folder("klein") == models / "diffusers" / "klein"
    for name in ("sdxl", "broken", "listed", "other", "nowhere"):
        with pytest.raises(error, match=f"no Flux model '{name}' found.*choose another"):
            flux.model_folder(name)
    for name in ("../mine", "/mine", ""):
        with pytest.raises(error, match="give a name inside"):
            flux.model_folder(name)


def test_a_user_may_replace_the_embedded_model(flux, models):
    place = models / "triptych" / "triptych-tiny" / "flux"
    place.mkdir(parents=True)
    (place / "views.json").write_text("{}")
    assert flux.model_folder("triptych-tiny") == place and flux.model_names().count("triptych-tiny") == 1


def test_loras_are_safetensors(flux, models, error):
    assert flux.lora_names() == ["one.safetensors", "deep/two.safetensors"]
    assert flux.lora_file("deep/two.safetensors").read_text() == "2"
    for name in ("three.safetensors", "../triptych/mine/views.json"):
        with pytest.raises(error):
            flux.lora_file(name)


def test_equal_inputs_are_equal_and_a_changed_file_is_not(flux, models):
    def state(**changes):
        return flux.LoadFlux.fingerprint_inputs(**{"name": "klein", "lora": "one.safetensors"} | changes)

    first = state()
    assert state() == first and state(name="mine") != first and state(lora="none") != first
    assert state(repository="a/b") == state(repository=" a/b ", name="mine") != state(repository="a/c")
    (models / "diffusers/klein/transformer/weights.safetensors").write_text("other")
    second = state()
    assert second != first
    (models / "loras/one.safetensors").write_text("other")
    assert state() != second
    linked = flux.LoadFlux.fingerprint_inputs(repository="")
    assert linked != linked, "what comes from another node is not known yet: run again"


def test_a_wrong_repository_is_refused_before_the_run(flux, error, comfy):
    check = flux.LoadFlux.validate_inputs
    assert check(repository="") is check(repository=" black-forest-labs/FLUX.2-klein-base-4B ") is True
    for name in ("../x", "a", "a/b/c", "https://a/b", "a/" + "b" * 200):
        assert "is no Hugging Face id" in check(repository=name)
        with pytest.raises(error, match="is no Hugging Face id"):
            flux.LoadFlux.execute("klein", repository=name, **LOADING)


def test_loading_passes_every_choice_on(flux, models, comfy, output_of, monkeypatch):
    calls = []
    model = SimpleNamespace(offload="sequential", quantisation="none", warnings=("slow",))
    backend = ModuleType("triptych_pack.triptych.flux.backend")
    backend.load_flux_views = lambda source, **given: calls.append((source, given)) or model
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    changes = {"lora": "deep/two.safetensors", "lora_strength": 0.5, "dtype": "bfloat16", "offload": "sequential"}
    output = flux.LoadFlux.execute("klein", **LOADING | changes)
    (loaded,) = output.result
    ((source, given),) = calls
    progress, cancel = given.pop("progress"), given.pop("cancel")
    assert loaded.views is model and source == models / "diffusers" / "klein"
    assert callable(progress) and callable(cancel)
    assert output.ui == {"text": ["slow"]} and loaded.patcher is None, "its own hooks move it"
    assert given == {
        "device": torch.device("cpu"), "dtype": "bfloat16", "offload": "sequential", "quantisation": "none",
        "lora": models / "loras/deep/two.safetensors", "lora_strength": 0.5,
        "models": [models / "triptych", models / "diffusers"],  # where the base of a LoRA may lie
    }  # fmt: skip
    flux.LoadFlux.execute("klein", repository="a/b", **LOADING)
    assert calls[1][0] == "a/b" and calls[1][1]["dtype"] is None and calls[1][1]["lora"] is None
    weights = len("w")
    assert comfy.freed[0][0] == weights + flux.WORK_BYTES < comfy.freed[2][0] > 1e12, "room for all of it"


@pytest.mark.timeout(300)
def test_an_interrupted_download_ends_at_once_and_does_not_block_the_pack(flux, comfy, tmp_path, monkeypatch):
    from flux_tiny import klein_folder
    from test_published_bundles import FakeHub, _handler
    from triptych_pack.triptych.bundles import hub
    from triptych_pack.triptych.flux import hub as flux_hub

    fake, weights = FakeHub(klein_folder("mini")), "text_encoder/model.safetensors"  # the first large one
    go_on = threading.Event()
    fake.held[weights] = (30_000, go_on)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    where = {"endpoint": f"http://127.0.0.1:{server.server_address[1]}", "cache_dir": tmp_path / "cache"}
    made = hub.HubFolder
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(hub, "_RESUMED_BYTES", 10_000)
    monkeypatch.setattr(flux_hub, "HubFolder", lambda name, revision=None: made(name, revision, **where))
    part = tmp_path / "cache" / "models--owner--small" / "blobs"

    def interrupt():
        while not any(path.stat().st_size >= 29_000 for path in part.glob("*.triptych-part")):
            time.sleep(0.02)
        comfy.interrupted = True

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Interrupted):
        flux.LoadFlux.execute("klein", repository="owner/small", **LOADING)
    assert not go_on.is_set(), "interrupted while the Hub held the file back"
    shares = [share for share, _ in comfy.updates]
    assert shares == sorted(shares) and 0 < shares[-1] < 0.5
    go_on.set()
    flux.run(lambda reporter: None)  # waits for the remnant
    server.shutdown()
    server.server_close()
    (begun,) = part.glob("*.triptych-part")
    assert begun.stat().st_size < len(fake.files()[weights]) / 2, "the library was told to stop as well"
    assert not [name for name in fake.gets() if name.startswith(("transformer/", "vae/"))]


def test_comfy_moves_a_whole_model(flux, comfy, models, output_of, monkeypatch):
    parts = {"transformer": torch.nn.Linear(2, 2), "vae": torch.nn.Linear(3, 3)}
    pipeline = SimpleNamespace(components=parts | {"tokenizer": object()})
    model = SimpleNamespace(offload="none", quantisation="none", warnings=(), pipeline=pipeline)
    backend = ModuleType("triptych_pack.triptych.flux.backend")
    backend.load_flux_views = lambda source, **given: model
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    (loaded,) = flux.LoadFlux.execute("klein", **LOADING).result
    assert dict(loaded.patcher.model.items()) == parts and comfy.loaded == [([loaded.patcher], 0)]
    model.quantisation = "int8"
    (loaded,) = flux.LoadFlux.execute("klein", **LOADING).result
    assert loaded.patcher is None and len(comfy.loaded) == 1


def over_white(views):
    """The first of (V, 4, S, S) as (S, S, 3), 0-255."""
    rgba = views[0].permute(1, 2, 0).numpy()
    return 255 * (rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:])


def _overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def _resized(plane, size):
    return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.BILINEAR))


# In a real ComfyUI.

DRAWING = {"prompt": "a red chair", "seed": 4, "steps": 2, "guidance": -1.0, "rerolls": 0, "size": 64,
           "foreground": "auto", "mask_shows": "auto"}  # fmt: skip


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    from flux_tiny import copied, klein_folder, write_klein_card

    folder = copied(klein_folder("mini"), tmp_path_factory.mktemp("flux") / "random")
    write_klein_card(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, random_model):
    from flux_tiny import copied

    place = tmp_path_factory.mktemp("comfy")
    copied(random_model, place / "models" / "triptych" / "random")
    (place / "models" / "loras").mkdir()
    write_lora(place / "models" / "loras" / "own.safetensors")
    with ComfyServer(place) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def write_lora(path):
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    base = "transformer.proj_out"
    save_file(
        {f"{base}.lora_{part}.weight": torch.randn(shape, generator=generator) for part, shape in
         (("A", (4, 128)), ("B", (128, 4)))},
        path,
    )  # fmt: skip


def drawing(loading=None, **settings):
    """Load Flux views model -> Flux views -> the sheet and every view as a picture."""
    ours = {
        "model": ("Triptych_LoadFlux", {"name": "random", "repository": "", **LOADING, **(loading or {})}),
        "views": ("Triptych_FluxViews", {"model": ["model", 0], **DRAWING, **settings}),
        "sheet": ("PreviewImage", {"images": ["views", 1]}),
        "again": ("Triptych_JoinViewSheet", {"views": ["views", 0], "layout": "grid", "background": "white"}),
        "joined": ("PreviewImage", {"images": ["again", 0]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in ours.items()}


def shown_by(client, result, name):
    data = client.fetch(result.outputs[name]["images"][0])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_comfyui_it_equals_a_direct_call(client, random_model):
    from triptych.flux.backend import load_flux_views
    from triptych.images.sheets import flatten
    from triptych.pipelines.views import ViewSettings, views_from_prompt

    result = client.run(drawing())
    wanted = ViewSettings(seed=4, steps=2, rerolls=0, size=64)
    direct = views_from_prompt("a red chair", model=load_flux_views(random_model), settings=wanted)
    expected = flatten(direct.sheet) * 255
    for name in ("views", "sheet", "joined"):
        assert np.abs(shown_by(client, result, name) - expected).max() <= 1.01, name
    facts = result.outputs["views"]["triptych_views"][0]
    assert (facts["generated"], facts["seed"], facts["rerolls"]) == (list(direct.generated), 4, 0)
    assert facts["warnings"] == list(direct.warnings) != [], "noise is no object, and the user hears of it"


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_comfyui_only_what_changed_runs(client, server):
    first = client.run(drawing(seed=7))
    assert client.run(drawing(seed=7)).cached == set(drawing())
    other = client.run(drawing(seed=8))
    assert other.cached == {"model"}
    assert np.abs(shown_by(client, first, "sheet") - shown_by(client, other, "sheet")).max() > 20
    added = client.run(drawing({"lora": "own.safetensors"}, seed=8))
    assert not added.cached and np.abs(shown_by(client, added, "sheet") - shown_by(client, other, "sheet")).max() > 5
    none = client.run(drawing({"lora": "own.safetensors", "lora_strength": 0.0}, seed=8))
    assert np.abs(shown_by(client, none, "sheet") - shown_by(client, other, "sheet")).max() <= 1
    card = server.base / "models" / "triptych" / "random" / "views.json"
    changed = json.loads(card.read_text()) | {"guidance": 7.0}
    card.write_text(json.dumps(changed))
    after = client.run(drawing(seed=8))
    assert not after.cached and np.abs(shown_by(client, after, "sheet") - shown_by(client, other, "sheet")).max() > 5


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_comfyui_a_picture_guides_and_stays(client, sides):
    from triptych.images.views import prepare_views

    front = (np.kron(sides["front"], np.ones((4, 4, 1))) * 255).round().astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(front).save(stream, "PNG")
    client.upload("front.png", stream.getvalue())
    graph = drawing(prompt="", front=["photo", 0], front_mask=["photo", 1])
    graph["photo"] = {"class_type": "LoadImage", "inputs": {"image": "front.png"}}
    graph["front"] = {"class_type": "PreviewImage", "inputs": {"images": ["views", 3]}}
    result = client.run(graph)
    assert result.outputs["views"]["triptych_views"][0]["generated"] == ["left", "back", "right"]
    shown = (shown_by(client, result, "front") < 250).any(axis=-1)
    expected = over_white(prepare_views({"front": front}, size=64).images) < 250
    assert _overlap(shown, expected.any(axis=-1)) > 0.9


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_comfyui_steps_are_shown_and_cancel_is_prompt(client, server):
    listener = client.listen()
    prompt_id = client.queue(drawing(steps=5, seed=20))
    seen = listener.until(lambda name, data: name == "execution_success" and data["prompt_id"] == prompt_id)
    values = [data["value"] / data["max"] for name, data in seen if name == "progress" and data["node"] == "views"]
    assert values == sorted(values) and values[-1] == 1 and len(set(values)) >= 5
    shots = [Image.open(io.BytesIO(data)).size for name, data in seen if name == "picture"]
    assert len(shots) >= 5 and set(shots) == {(256, 256)}, "as large as ComfyUI shows them"
    client.queue(drawing(steps=1000, seed=21))
    listener.until(lambda name, data: name == "picture")
    asked, busy = time.monotonic(), server.cpu_s()
    client.post("/interrupt", {})
    listener.until(lambda name, data: name == "execution_interrupted")
    elapsed, worked = time.monotonic() - asked, server.cpu_s() - busy
    listener.close()
    assert min(elapsed, worked) < 1.0, f"{elapsed:.2f} s, of which the server had {worked:.2f} s of a processor"
    assert client.run(drawing(seed=22)).succeeded, "a cancelled job must not harm the next"


@real
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_comfyui_errors_are_sentences(client):
    with pytest.raises(ApiError) as failure:
        client.run(drawing(prompt=""))
    error = failure.value.body
    assert error["node_type"] == "Triptych_FluxViews" and error["exception_type"].endswith("TriptychError")
    with pytest.raises(ApiError) as refusal:
        client.run(drawing({"repository": "../x"}))
    problem = refusal.value.body["node_errors"]["model"]["errors"][0]
    assert problem["type"] == "custom_validation_failed" and "is no Hugging Face id" in problem["details"]
