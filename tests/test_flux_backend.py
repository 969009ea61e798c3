"""Flux models behind one interface: the same pixels as diffusers' pipelines, and a sentence for whatever is wrong."""

import functools
import gc
import importlib.util
import json
import sys
import threading
import weakref
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from triptych.errors import TriptychError
from triptych.flux.card import ViewsCard, default_card, read_card, sigmas, verify_files, write_card
from triptych.sampling.flow_euler import Cancelled

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from flux_tiny import copied, klein_folder, kontext_folder, write_klein_card  # noqa: E402

from triptych.flux import backend, hub, parts  # noqa: E402
from triptych.flux.backend import FluxViews, load_flux_views  # noqa: E402
from triptych.flux.preview import latent_colours, rough_picture  # noqa: E402

S = 64
PROMPT = "a red chair. given: front."


@functools.cache
def klein() -> FluxViews:
    return load_flux_views(klein_folder("mini", card=True))


@functools.cache
def kontext() -> FluxViews:
    return load_flux_views(kontext_folder(card=True))


@functools.cache
def dev() -> FluxViews:
    return load_flux_views(kontext_folder(text_only=True, card=True))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def views(count: int, seed: int = 0) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, S, S, generator=torch.Generator().manual_seed(seed)))


def pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def directly(pipeline, **arguments) -> torch.Tensor:
    """A sheet by the pipeline itself, with its own noise."""
    return pipeline(
        prompt=PROMPT,
        height=2 * S,
        width=2 * S,
        num_inference_steps=3,
        sigmas=sigmas(3, 1.0),
        generator=torch.Generator().manual_seed(5),
        max_sequence_length=64,
        output_type="pt",
        **arguments,
    ).images[0]


# ---- the same as diffusers


@pytest.mark.parametrize("count", [0, 1, 3])
def test_klein_equals_the_pipeline_bit_for_bit(count: int) -> None:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(klein_folder("mini"))
    pictures = [pil(view) for view in views(count)] or None
    expected = directly(pipeline, image=pictures, guidance_scale=2.0)
    sheet = klein().sheet(PROMPT, views(count), seed=5, steps=3)
    assert torch.equal(sheet, expected)
    assert sheet.shape == (3, 2 * S, 2 * S) and sheet.dtype == torch.float32
    assert sheet.std() > 0.05 and sheet.min() >= 0 and sheet.max() <= 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_kontext_equals_the_pipeline_bit_for_bit_and_sees_several_views_side_by_side(count: int) -> None:
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(kontext_folder())
    row = pil(torch.cat(views(count), dim=2)) if count else None
    expected = directly(pipeline, image=row, guidance_scale=2.5, max_area=4 * S * S, _auto_resize=False)
    assert torch.equal(kontext().sheet(PROMPT, views(count), seed=5, steps=3), expected)


def test_dev_equals_the_pipeline_bit_for_bit_and_takes_no_pictures() -> None:
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(kontext_folder(text_only=True))
    assert torch.equal(dev().sheet(PROMPT, seed=5, steps=3), directly(pipeline, guidance_scale=2.5))
    with pytest.raises(TriptychError, match="makes sheets from text only, 2 views were given: choose a FLUX.2 klein"):
        dev().sheet(PROMPT, views(2), steps=1)


def test_a_schedulers_own_shift_does_not_matter(tmp_path: Path) -> None:
    folder = copied(klein_folder("mini"), tmp_path / "published")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    config |= {"use_dynamic_shifting": True, "shift": 3.0}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    write_klein_card(folder)
    assert torch.equal(load_flux_views(folder).sheet("a", steps=2), klein().sheet("a", steps=2))


def test_the_cards_shift_is_used(tmp_path: Path) -> None:
    folder = copied(klein_folder("mini"), tmp_path / "shifted")
    write_klein_card(folder, shift=3.0)
    model, seen = load_flux_views(folder), []
    model.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["timestep"].item()), with_kwargs=True
    )
    model.sheet("a", steps=4, guidance=1.0)
    assert seen == pytest.approx([1.0, 0.9, 0.75, 0.5], abs=1e-6)


# ---- what reaches the networks


def test_references_reach_the_vae_pixel_for_pixel_and_are_numbered_by_ten(monkeypatch) -> None:
    model, seen, ids = klein(), [], []
    encode = model.pipeline.vae.encode
    monkeypatch.setattr(model.pipeline.vae, "encode", lambda x, **given: seen.append(x) or encode(x, **given))
    hook = model.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, given: ids.append(given["img_ids"][0, :, 0].unique(return_counts=True)), with_kwargs=True
    )
    model.sheet("a", views(2), steps=1)
    hook.remove()
    for picture, view in zip(seen, views(2), strict=True):
        assert torch.equal(picture[0], (view * 255).round() / 255 * 2 - 1)
    tokens = (S // 16) ** 2
    assert [(times.tolist(), counts.tolist()) for times, counts in ids] == [
        ([0, 10, 20], [4 * tokens, tokens, tokens])
    ] * 2


@pytest.mark.parametrize(("guidance", "passes"), [(0.0, 1), (1.0, 1), (1.5, 2)])
def test_guidance_is_a_second_pass(guidance: float, passes: int) -> None:
    count = []
    hook = klein().pipeline.transformer.register_forward_hook(lambda *given: count.append(1))
    klein().sheet("a", steps=3, guidance=guidance)
    hook.remove()
    assert len(count) == 3 * passes


def test_a_distilled_klein_is_never_guided_and_says_so() -> None:
    model, count = load_flux_views(klein_folder("mini", distilled=True, card=True)), []
    model.pipeline.transformer.register_forward_hook(lambda *given: count.append(1))
    model.sheet("a", steps=2, guidance=4.0)
    assert len(count) == 2
    assert model.notes(guidance=1.0) == ()
    assert "distilled to few steps and does not use the guidance 4" in model.notes(guidance=4.0, negative="x")[0]
    assert "does not use a negative prompt with guidance 4" in model.notes(guidance=4.0, negative="x")[1]


def test_the_negative_prompt_counts_where_there_is_a_second_pass() -> None:
    with_it, without = klein().sheet("a", steps=1, negative="a blue sphere"), klein().sheet("a", steps=1)
    assert not torch.equal(with_it, without)
    assert klein().notes(negative="x") == ()
    assert "negative" in klein().notes(negative="x", guidance=1.0)[0]
    assert "negative" in kontext().notes(negative="x")[0]
    assert "sees the 2 given views as one picture" in kontext().notes(references=2)[0]


def test_a_flux1_network_without_guidance_input_gets_the_second_pass(monkeypatch) -> None:
    from diffusers import FluxTransformer2DModel

    model = load_flux_views(kontext_folder(card=True))
    torch.manual_seed(0)
    config = dict(model.pipeline.transformer.config) | {"guidance_embeds": False}
    plain = FluxTransformer2DModel.from_config(config).eval()
    monkeypatch.setattr(model.pipeline, "transformer", plain)
    expected = directly(model.pipeline, negative_prompt="", true_cfg_scale=3.0, max_area=4 * S * S, _auto_resize=False)
    assert torch.equal(model.sheet(PROMPT, seed=5, steps=3, guidance=3.0), expected)


def test_equal_prompts_are_encoded_once_and_eight_are_kept() -> None:
    model, count = load_flux_views(klein_folder("mini", card=True)), []
    model.pipeline.text_encoder.register_forward_hook(lambda *given: count.append(1))
    first = model.sheet("a", steps=1)
    assert len(count) == 2  # the prompt and the empty negative
    assert torch.equal(model.sheet("a", steps=1), first) and len(count) == 2
    for i in range(8):
        model.sheet(f"other {i}", steps=1, guidance=1.0)
    assert len(count) == 10
    model.sheet("a", steps=1, guidance=1.0)
    assert len(count) == 11


def test_the_same_seed_is_the_same_sheet_and_another_is_another() -> None:
    torch.manual_seed(1)
    first = klein().sheet("a", seed=2**64 - 1)
    torch.manual_seed(2)
    assert torch.equal(klein().sheet("a", seed=2**64 - 1), first)
    assert (klein().sheet("a", seed=0) - first).abs().mean() > 1e-3
    assert (klein().sheet("b", seed=2**64 - 1) - first).abs().max() > 1e-6


# ---- steps, previews, cancelling


@pytest.mark.parametrize("model", [klein, kontext], ids=["klein", "kontext"])
def test_previews_are_where_the_sampler_is_heading(model) -> None:
    seen = []
    sheet = model().sheet(
        "a", views(1), steps=2, on_step=lambda step, total, preview: seen.append((step, total, preview()))
    )
    assert [(step, total) for step, total, _ in seen] == [(1, 2), (2, 2)]
    # From the first step on, the straight way to the end is what a single step makes.
    assert torch.allclose(seen[0][2], model().sheet("a", views(1), steps=1), atol=1e-4)
    assert torch.allclose(seen[1][2], sheet, atol=1e-6)
    assert not torch.allclose(seen[0][2], sheet, atol=1e-4)


@pytest.mark.parametrize("folder", [klein_folder, kontext_folder], ids=["klein", "kontext"])
def test_with_an_offload_previews_bring_no_network_to_the_device(folder, monkeypatch) -> None:
    accelerate = pytest.importorskip("accelerate")
    moves: list[str] = []

    def place(pipeline, device, offload: str) -> None:
        """As diffusers' offload "model" does, on the CPU."""
        hook = None
        for name in pipeline.model_cpu_offload_seq.replace("image_encoder->", "").split("->"):
            _, hook = accelerate.cpu_offload_with_hook(getattr(pipeline, name), "cpu", hook)
            before = hook.hook.pre_forward
            hook.hook.pre_forward = lambda module, *given, _before=before, _name=name, **named: (
                moves.append(_name), _before(module, *given, **named))[1]  # fmt: skip

    monkeypatch.setattr(backend, "decide_offload", lambda *given: ("model", ()))
    monkeypatch.setattr(backend, "place", place)
    model = load_flux_views(folder(card=True))
    plain = model.sheet("a", steps=3, guidance=1.0)
    expected, shown = [*moves], []
    assert expected.count("vae") == 1 and expected.count("transformer") == 3
    moves.clear()
    again = model.sheet("a", steps=3, guidance=1.0, on_step=lambda step, total, preview: shown.append(preview()))
    assert moves == [name for name in expected if "text" not in name] and torch.equal(again, plain)
    assert len(shown) == 3 and all(one.shape == (3, 2 * S, 2 * S) and 0 <= one.min() <= one.max() <= 1 for one in shown)


def test_a_rough_preview_shows_the_colours_where_they_are() -> None:
    from diffusers import AutoencoderKLFlux2

    from triptych.images.sheets import join_sheet
    from triptych.procedural import sample_views

    vae = AutoencoderKLFlux2.from_pretrained(hub.EMBEDDED_FOLDER / "vae")
    sides = {name: np.asarray(view.convert("RGBA")) / 255.0 for name, view in sample_views(128).items()}
    sheet = torch.from_numpy(join_sheet(sides, "grid", (1.0, 0.0, 1.0))).permute(2, 0, 1).float()
    with torch.no_grad():
        latents = vae.encode(sheet[None] * 2 - 1).latent_dist.mode()
    rough = rough_picture(latents, latent_colours(vae), 256)
    pooled = torch.nn.functional.avg_pool2d(torch.stack([rough, sheet]), 8)
    assert rough.shape == sheet.shape and (pooled[0] - pooled[1]).abs().mean() < 0.04
    assert (pooled[1] - pooled[1].mean(dim=(1, 2), keepdim=True)).abs().mean() > 0.1


def test_nothing_is_decoded_for_a_preview_that_nobody_looks_at(monkeypatch) -> None:
    model, count = klein(), []
    decode = model.pipeline.vae.decode
    monkeypatch.setattr(model.pipeline.vae, "decode", lambda *a, **k: count.append(1) or decode(*a, **k))
    model.sheet("a", steps=3, on_step=lambda step, total, preview: None)
    assert len(count) == 1


def test_raising_from_on_step_cancels_and_leaves_the_model_usable() -> None:
    class Stop(Exception):
        pass

    def stop(step: int, total: int, preview) -> None:
        if step == 2:
            raise Stop

    expected, count = klein().sheet("a", steps=3), []
    hook = klein().pipeline.transformer.register_forward_hook(lambda *given: count.append(1))
    with pytest.raises(Stop):
        klein().sheet("a", steps=3, on_step=stop)
    hook.remove()
    assert len(count) == 4
    assert torch.equal(klein().sheet("a", steps=3), expected)


def test_two_threads_do_not_disturb_each_other() -> None:
    expected = {seed: klein().sheet("a", seed=seed) for seed in range(4)}
    found: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: klein().sheet("a", seed=seed)}))
        for seed in expected
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"references": [torch.rand(3, 32, 32)]},
            r"reference 1 has the shape \(3, 32, 32\), random klein takes \(3, 64, 64\)",
        ),
        ({"references": [*views(1), torch.rand(4, S, S)]}, r"reference 2 has the shape"),
        ({"references": [torch.full((3, S, S), np.nan)]}, "reference 1 must hold finite numbers 0-1"),
        ({"references": [torch.zeros(3, S, S, dtype=torch.uint8)]}, "reference 1 must hold finite numbers"),
        ({"steps": 0}, "0 steps with shift 1.0 do not work"),
        ({"guidance": -1.0}, "guidance is -1.0, it has to be 0-100"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**64}, "the seed is 18446744073709551616"),
    ],
)
def test_wrong_input_is_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(TriptychError, match=sentence):
        klein().sheet("a", **arguments)


def test_unload_lets_go_of_the_weights() -> None:
    model = load_flux_views(klein_folder("mini", card=True))
    model.sheet("a", steps=1)
    kept = weakref.ref(model.pipeline.transformer)
    model.unload()
    gc.collect()
    assert kept() is None
    model.unload()
    with pytest.raises(TriptychError, match="random klein was unloaded: load it again"):
        model.sheet("a")


# ---- finding and choosing


def test_what_loading_decides_is_told() -> None:
    told: list[tuple[str, float]] = []
    model = load_flux_views(
        klein_folder("mini", card=True), offload="model", progress=lambda *given: told.append(given)
    )
    assert (model.device.type, model.dtype, model.offload, model.quantisation) == ("cpu", torch.float32, "none", "none")
    assert model.warnings == ("offload 'model' does nothing on a CPU",)
    assert told[0] == ("find", 0.0) and told[-1] == ("load", 1.0)
    model.sheet("a", steps=1)
    assert [(row.stage, row.bytes > 0) for row in model.memory] == [
        ("load", True),
        ("text encoder", True),
        ("sampling", True),
    ]


@pytest.mark.parametrize(("distilled", "steps"), [(False, 50), (True, 4)])
def test_a_plain_diffusers_folder_gets_the_default_card(distilled: bool, steps: int) -> None:
    model = load_flux_views(klein_folder("mini", distilled=distilled), dtype="bfloat16")
    assert model.card == default_card("flux2-klein", distilled=distilled) and model.card.steps == steps
    assert {p.dtype for n in parts.networks_of(model.pipeline).values() for p in n.parameters()} == {torch.bfloat16}
    assert load_flux_views(kontext_folder()).card == default_card("flux1-kontext")


def test_bfloat16_is_near_float32() -> None:
    model = load_flux_views(klein_folder("mini", card=True), dtype=torch.bfloat16)
    sheet, exact = model.sheet(PROMPT, views(1), steps=3), klein().sheet(PROMPT, views(1), steps=3)
    assert 0 < (sheet - exact).abs().mean() < 0.02


def test_a_bundle_folder_with_a_flux_folder_inside_is_found(tmp_path: Path) -> None:
    copied(klein_folder("mini", card=True), tmp_path / "bundle" / "flux")
    found = hub.find_model(tmp_path / "bundle")
    assert found.folder == tmp_path / "bundle" / "flux" and found.card == read_card(found.folder)


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"device": "tpu9"}, "unknown device 'tpu9': choose cpu or cuda"),
        ({"dtype": "int4"}, "unknown dtype 'int4': choose float32, bfloat16, float16"),
        ({"offload": "disk"}, "unknown offload 'disk': choose auto, none, model, sequential"),
        ({"quantisation": "int2"}, "unknown quantisation 'int2': choose none, int8, nf4, fp8"),
        ({"quantisation": "nf4"}, "nf4 needs a CUDA GPU"),
        ({"quantisation": "int8", "offload": "sequential"}, "sequential does not go with quantisation int8"),
        ({"source": "no-such-model"}, "no Flux model 'no-such-model' found"),
        ({"source": "../a/b/c"}, "no Flux model '../a/b/c' found"),
    ],
)
def test_choices_that_cannot_be_are_refused_before_anything_is_loaded(choices: dict, sentence: str) -> None:
    with pytest.raises(TriptychError, match=sentence):
        load_flux_views(**{"source": klein_folder("mini", card=True)} | choices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_is_missed_by_name() -> None:
    with pytest.raises(TriptychError, match="device cuda was asked for, but torch finds no CUDA GPU here"):
        load_flux_views(klein_folder("mini", card=True), device="cuda")


def test_offload_is_chosen_by_the_memory_that_is_free() -> None:
    gib = 1 << 30
    sizes = {"transformer": 8 * gib, "text_encoder": 8 * gib, "vae": gib // 4}
    chosen = {free: parts.choose_offload(sizes, free * gib, 512) for free in (80, 24, 16, 12, 8)}
    assert chosen == {80: "none", 24: "none", 16: "model", 12: "model", 8: "sequential"}
    assert parts.choose_offload(sizes, 12 * gib, 1024) == "sequential"


def test_the_embedded_model_is_found_by_name() -> None:
    if not (hub.EMBEDDED_FOLDER / "views.json").is_file():
        with pytest.raises(
            TriptychError, match="the embedded Flux model is missing at .*: get the whole repository again"
        ):
            load_flux_views()
        pytest.skip("the embedded Flux model is not in this checkout")
    card = hub.find_model("triptych-tiny").card
    assert card is not None and card.architecture == "flux2-klein"
    sheet = load_flux_views().sheet("a red chair", steps=1, guidance=1.0)
    assert sheet.shape == (3, 2 * card.panel_size, 2 * card.panel_size)


# ---- damaged folders


def broken(tmp_path: Path, card: bool = False) -> Path:
    return copied(klein_folder("mini", card=card), tmp_path / "broken")


def refused(folder: Path, sentence: str) -> None:
    with pytest.raises(TriptychError, match=sentence) as raised:
        load_flux_views(folder)
    assert "\n" not in str(raised.value)


def test_a_changed_file_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch) -> None:
    folder = broken(tmp_path, card=True)
    with (folder / "vae/diffusion_pytorch_model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    monkeypatch.setattr("triptych.flux.backend.load_pipeline", None)
    refused(folder, r"vae.diffusion_pytorch_model.safetensors was changed \(sha256")


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("vae", "vae is missing: fetch the model again"),
        ("tokenizer", "tokenizer is missing"),
        ("transformer/config.json", "transformer.config.json is missing"),
        ("text_encoder/model.safetensors", "text_encoder has no safetensors file"),
        ("model_index.json", "is no Flux model: it has neither views.json nor model_index.json"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, lost: str, sentence: str) -> None:
    folder = broken(tmp_path)
    (folder / lost).rename(tmp_path / "lost")
    refused(folder, sentence)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "transformer/model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"transformer.model-00002-of-00002.safetensors is missing")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_truncated_file_is_named(tmp_path: Path, part: str) -> None:
    folder = broken(tmp_path)
    file = next((folder / part).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, rf"{part}.{file.name} is not a whole safetensors file")


def rewritten(folder: Path, part: str, change) -> None:
    file = next((folder / part).glob("*.safetensors"))
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_and_misshapen_tensors_are_never_filled_with_random_numbers(tmp_path: Path, part: str) -> None:
    first = sorted(load_file(next((klein_folder("mini") / part).glob("*.safetensors"))))[0]
    folder = broken(tmp_path)
    rewritten(folder, part, lambda state: {name: value for name, value in state.items() if name != first})
    refused(folder, rf"{part} lacks the tensor ({first}|lm_head.weight)")
    rewritten(folder, part, lambda state: state | {first: torch.zeros(3, 5)})
    refused(folder, rf"{part} .*fetch the model again")


def test_tensors_that_nothing_uses_are_reported(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    rewritten(folder, "transformer", lambda state: state | {"extra.weight": torch.zeros(2)})
    assert any(
        "1 tensors that its network does not use, such as extra.weight" in w for w in load_flux_views(folder).warnings
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "is a 'StableDiffusionPipeline', which is no known Flux views model",
        ),
        ({"_class_name": None}, "is a None, which is no known"),
        (
            {"text_encoder": ["os", "system"]},
            r"the text_encoder is \['os', 'system'\], it has to be a Qwen3ForCausalLM",
        ),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "the vae is .* it has to be a AutoencoderKLFlux2 of diffusers"),
        ({"transformer": [None, None]}, "the transformer is"),
    ],
)
def test_only_known_classes_are_built(tmp_path: Path, change: dict, sentence: str) -> None:
    folder = broken(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    refused(folder, sentence)


@pytest.mark.parametrize("content", ["{", "[]", " " * (1 << 21)])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = broken(tmp_path)
    (folder / "model_index.json").write_text(content)
    refused(folder, r"model_index.json (is damaged|has 2,097,152 bytes)")


def test_a_damaged_config_and_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    for name in ("transformer/config.json", "tokenizer/tokenizer.json"):
        before = (folder / name).read_text()
        (folder / name).write_text(before[:100])
        refused(folder, rf"{name.split('/')[0]} could not be loaded .*: fetch the model again")
        (folder / name).write_text(before)
    load_flux_views(folder)


def test_a_card_for_another_architecture_is_refused(tmp_path: Path) -> None:
    folder = broken(tmp_path)
    write_klein_card(folder, architecture="flux1-kontext")
    refused(folder, "random klein is for flux1-kontext, but .* is flux2-klein: choose its own base")


# ---- packages


@pytest.mark.parametrize("package", ["diffusers", "transformers", "accelerate"])
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    remedy = "pip install diffusers transformers accelerate peft"
    with pytest.raises(TriptychError, match=rf"need the package {package}, .*: {remedy}"):
        load_flux_views(klein_folder("mini"))


def test_too_old_a_diffusers_is_named_with_its_version(monkeypatch) -> None:
    import diffusers

    old = type(sys)("diffusers")
    old.__version__, old.__spec__ = "0.31.0", diffusers.__spec__
    monkeypatch.setitem(sys.modules, "diffusers", old)
    with pytest.raises(TriptychError, match="diffusers 0.31.0 has no Flux2KleinPipeline: pip install"):
        load_flux_views(klein_folder("mini"))


# ---- quantisation, LoRA


@pytest.mark.parametrize(("quantisation", "allowed"), [("int8", 0.01), ("fp8", 0.03)])
def test_quantised_blocks_are_smaller_and_near_the_original(quantisation: str, allowed: float) -> None:
    pytest.importorskip("torchao")
    from triptych.pipelines.memory import network_bytes

    model = load_flux_views(klein_folder("mini", card=True), quantisation=quantisation)
    sheet, exact = model.sheet(PROMPT, views(1), steps=3), klein().sheet(PROMPT, views(1), steps=3)
    assert 0 < (sheet - exact).abs().mean() < allowed
    for part in ("transformer", "text_encoder"):
        small, full = (network_bytes(getattr(m.pipeline, part)) for m in (model, klein()))
        assert small < 0.55 * full
    assert network_bytes(model.pipeline.vae) == network_bytes(klein().pipeline.vae)


def test_nf4_leaves_what_is_no_blocks_matrix_as_it_is(monkeypatch) -> None:
    """What bitsandbytes is told; whether it obeys needs a GPU."""
    from diffusers import Flux2Transformer2DModel
    from transformers import Qwen3ForCausalLM

    from triptych.flux import parts

    folder = klein_folder("mini")
    kept = parts.kept_matrices(Flux2Transformer2DModel, folder / "transformer")
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= set(kept)
    assert not any(".attn." in name or ".ff" in name for name in kept)
    linears = [n for n, m in klein().pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    assert 0 < len(kept) < len(linears) and set(kept) < set(linears)
    assert parts.kept_matrices(Qwen3ForCausalLM, folder / "text_encoder") == ["lm_head"]
    find, told = importlib.util.find_spec, {}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: object() if name == "bitsandbytes" else find(name)
    )
    monkeypatch.setattr("diffusers.BitsAndBytesConfig", lambda **options: told.update(options))
    parts._nf4("diffusers", torch.bfloat16, kept)
    assert told["llm_int8_skip_modules"] == kept and told["load_in_4bit"]


def lora_file(
    path: Path, seed: int = 0, architecture: str = "flux2-klein", base: str = "random klein", asked=None
) -> Path:
    from triptych.flux.lora import save_lora

    generator = torch.Generator().manual_seed(seed)
    name = "single_transformer_blocks.0.attn.to_out"
    layer = klein().pipeline.transformer.get_submodule(name)
    state = {
        f"{name}.lora_A.weight": torch.randn(2, layer.in_features, generator=generator),
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 2, generator=generator) * 0.05,
    }
    return save_lora(path, state, 2, 2, base, architecture, asked=asked)


def lora_folder(folder: Path, seed: int = 0, **changes) -> Path:
    lora_file(folder / "lora.safetensors", seed)
    facts = {
        "base": str(klein_folder("mini")),
        "lora": "lora.safetensors",
        "panel_size": S,
        "steps": 2,
        "guidance": 2.0,
        "max_sequence_length": 64,
    }
    card = ViewsCard("a lora", "Apache-2.0", "flux2-klein", "{text}. given: {given}.", **facts | changes)
    write_card(folder, card)
    return folder


def test_a_lora_folder_loads_its_base_and_equals_the_base_with_the_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = lora_folder(tmp_path / "lora")
    model = load_flux_views(folder)
    assert model.card == read_card(folder)
    sheet = model.sheet(PROMPT)
    for lora in (folder, folder / "lora.safetensors"):
        assert torch.equal(load_flux_views(klein_folder("mini", card=True), lora=lora).sheet(PROMPT), sheet)
    plain = klein().sheet(PROMPT)
    assert (sheet - plain).abs().max() > 1e-3
    nothing = load_flux_views(klein_folder("mini", card=True), lora=folder, lora_strength=0.0)
    assert torch.allclose(nothing.sheet(PROMPT), plain, atol=1e-6)


def test_two_loras_add_up_in_any_order_and_without_peft(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("peft")
    first, second = lora_folder(tmp_path / "first", 1), lora_folder(tmp_path / "second", 2)
    sheet = load_flux_views(first, lora=second).sheet(PROMPT)
    assert torch.allclose(load_flux_views(second, lora=first).sheet(PROMPT), sheet, atol=1e-5)
    assert not torch.allclose(load_flux_views(first).sheet(PROMPT), sheet, atol=1e-3)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest))
    assert torch.allclose(load_flux_views(first, lora=second).sheet(PROMPT), sheet, atol=1e-5)


def test_a_bare_lora_file_says_how_a_published_model_is_to_be_asked(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = klein_folder("mini")  # without a card, as published models are
    asked = {"panel_size": 128, "background": [1.0, 0.0, 1.0], "prompt_template": "{text}!", "mirrored": True,
             "steps": 3, "guidance": 2.0}  # fmt: skip
    same = lora_file(tmp_path / "same.safetensors", base=f"someone/{plain.name}@main", asked=asked)
    model = load_flux_views(plain, lora=same)
    card = model.card
    assert (card.panel_size, card.background, card.prompt_template, card.mirrored) == (128, (1, 0, 1), "{text}!", True)
    assert card.usual(False) == (3, 2.0) and not any("LoRA" in note for note in model.warnings)
    other = lora_file(tmp_path / "other.safetensors", base="someone/another-klein", asked=asked)
    model = load_flux_views(plain, lora=other)
    assert model.card.panel_size == 128 and model.card.steps == default_card("flux2-klein").steps
    (note,) = [note for note in model.warnings if "LoRA" in note]
    assert "other.safetensors was trained on someone/another-klein, the loaded model is" in note and plain.name in note
    carded = load_flux_views(klein_folder("mini", card=True), lora=same)
    assert carded.card == read_card(klein_folder("mini", card=True))
    assert any("trained with prompt_template '{text}!' instead of" in note for note in carded.warnings)
    wrong = lora_file(tmp_path / "wrong.safetensors", base=plain.name, asked={"panel_size": 100})
    with pytest.raises(
        TriptychError, match="wrong.safetensors: panel_size is '100' in its header, it has to be a mult"
    ):
        load_flux_views(plain, lora=wrong)


def test_a_lora_of_a_model_of_the_same_shape_names_both(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    layer = "single_transformer_blocks.0.proj_out"
    network = load_flux_views(kontext_folder()).pipeline.transformer.get_submodule(layer)
    state = {f"{layer}.lora_A.weight": torch.randn(2, network.in_features),
             f"{layer}.lora_B.weight": torch.randn(network.out_features, 2)}  # fmt: skip
    from triptych.flux.lora import save_lora

    path = save_lora(tmp_path / "dev.safetensors", state, 2, 2, "someone/FLUX.1-dev", "flux1-dev")
    notes = load_flux_views(kontext_folder(), lora=path).warnings
    assert any("trained on someone/FLUX.1-dev (flux1-dev), the loaded model is" in note for note in notes)
    assert any("(flux1-kontext): the shapes agree" in note for note in notes)


def test_a_lora_keeps_its_precision_on_quantised_weights(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("torchao")
    folder = lora_folder(tmp_path / "lora")
    small, exact = load_flux_views(folder, quantisation="int8"), load_flux_views(folder)
    layer = small.pipeline.transformer.get_submodule("single_transformer_blocks.0.attn.to_out")
    assert type(layer.base_layer.weight.data) is not torch.Tensor
    wanted = exact.pipeline.transformer.get_submodule("single_transformer_blocks.0.attn.to_out")
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, wanted.get_parameter(name))
    difference = (small.sheet(PROMPT) - exact.sheet(PROMPT)).abs().mean()
    assert difference < 0.2 * (klein().sheet(PROMPT) - exact.sheet(PROMPT)).abs().mean()


def test_a_lora_that_does_not_belong_is_refused(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "lora")
    with pytest.raises(TriptychError, match=r"a lora is for flux2-klein \(.*\), but random klein is flux1-kontext"):
        load_flux_views(kontext_folder(card=True), lora=folder)
    with pytest.raises(TriptychError, match="is a full model, not a LoRA"):
        load_flux_views(klein_folder("mini", card=True), lora=klein_folder("mini", card=True))
    with pytest.raises(TriptychError, match="there is no LoRA file .*gone.safetensors"):
        load_flux_views(klein_folder("mini", card=True), lora=tmp_path / "gone.safetensors")
    chained = lora_folder(tmp_path / "chained", base=str(folder))
    refused(chained, "is itself a LoRA: name a full model as base")
    (folder / "lora.safetensors").write_bytes(b"x")
    refused(folder, "lora.safetensors was changed")


def test_the_base_of_a_lora_may_lie_beside_it(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "lora", base="../base")
    copied(klein_folder("mini", card=True), tmp_path / "base")
    assert load_flux_views(folder).sheet("a").shape == (3, 2 * S, 2 * S)


def test_the_base_of_a_lora_may_lie_among_the_models_and_is_not_fetched_then(tmp_path: Path, monkeypatch) -> None:
    def fetch(name: str, *told):
        raise TriptychError(f"{name} is fetched")

    monkeypatch.setattr(hub, "_fetched", fetch)
    folder = lora_folder(tmp_path / "lora", base="someone/some-klein")
    for i, place in enumerate(("some-klein", "someone/some-klein", "some-klein/flux")):
        roots = [tmp_path / "empty", tmp_path / f"models{i}"]
        (roots[0] / "some-klein").mkdir(parents=True, exist_ok=True)  # another kind of model of that name
        copied(klein_folder("mini"), roots[1] / place)
        assert load_flux_views(folder, models=roots).card.name == "a lora"
    for wanted, given in (("some-klein", [tmp_path / "empty"]), ("some-klein@main", roots), ("other-klein", roots)):
        with pytest.raises(TriptychError, match=f"someone/{wanted} is fetched"):
            load_flux_views(lora_folder(tmp_path / "lora", base=f"someone/{wanted}"), models=given)


# ---- a repository


@pytest.fixture()
def repository(tmp_path: Path, monkeypatch):
    """A fake Hub that serves a folder as owner/small; the folder may be filled before the first call."""
    from test_published_bundles import FakeHub, _handler

    from triptych.bundles.hub import HubFolder

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    served = FakeHub(tmp_path / "served")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(served))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    served.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    place = functools.partial(HubFolder, endpoint=served.endpoint, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(hub, "HubFolder", place)
    yield served
    server.shutdown()
    server.server_close()


def test_of_a_repository_only_the_parts_are_fetched_and_then_no_network_is_needed(repository) -> None:
    folder = copied(klein_folder("mini"), repository.folder)
    for extra in (
        "single-file.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/old.bin",
        "assets/a.json",
    ):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"not wanted")
    told: list[tuple[str, float]] = []
    found = hub.find_model("owner/small", progress=lambda *given: told.append(given))
    assert found.card is None and found.title == "owner/small at aaaaaaaaaaaa"
    assert told[0] == ("fetch", 0.0) and told[-1] == ("fetch", 1.0)
    fetched = set(repository.gets()) - {"api"}
    wanted = {p.relative_to(klein_folder("mini")).as_posix() for p in klein_folder("mini").rglob("*") if p.is_file()}
    assert fetched == wanted - {"README.md"}
    repository.endpoint = "http://127.0.0.1:9"
    assert hub.find_model("owner/small").folder == found.folder
    assert parts.architecture_of(found.folder) == "flux2-klein"


def test_of_a_repository_with_a_card_what_it_lists_is_fetched_and_verified(repository) -> None:
    copied(klein_folder("mini", card=True), repository.folder)
    found = hub.find_model("owner/small@main")
    assert found.card == read_card(klein_folder("mini", card=True))
    verify_files(found.folder, found.card)
    refused_card = json.loads((repository.folder / "views.json").read_text())
    refused_card["files"]["vae/config.json"] = "0" * 64
    repository.commit = "b" * 40
    (repository.folder / "views.json").write_text(json.dumps(refused_card))
    with pytest.raises(TriptychError, match=r"vae.config.json was changed \(sha256 .* instead of 000000000000\.\."):
        hub.find_model(f"owner/small@{'b' * 40}")


def test_a_download_that_is_cancelled_goes_on_later_and_its_share_only_rises(repository, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 20_000)
    monkeypatch.setattr("triptych.bundles.hub._RESUMED_BYTES", 100_000)
    copied(klein_folder("mini"), repository.folder)
    told: list[tuple[str, float]] = []

    def note(stage: str, share: float) -> None:
        told.append((stage, share))

    with pytest.raises(Cancelled, match="stopped while owner/small at aaaaaaaaaaaa was fetched"):
        load_flux_views("owner/small", progress=note, cancel=lambda: len(told) > 20)
    assert len(told) == 21 and 0 < told[-1][1] < 0.5
    stopped_at = told[-1][1]
    told.clear()
    with pytest.raises(Cancelled, match="stopped while the views model was loaded"):
        load_flux_views("owner/small", progress=note, cancel=lambda: told[-1:] > [("load", 0.5)])
    assert told[-1] > ("load", 0.5) and told[-1][1] < 0.85, "between two parts"
    ranges = [wanted for method, name, wanted in repository.requests if method == "GET" and "safetensors" in name]
    assert any(wanted is not None for wanted in ranges), "goes on where it stopped"
    shares = [share for _, share in told]
    assert shares == sorted(shares) and len({share for share in shares if stopped_at < share < 0.5}) > 20
    told.clear()
    load_flux_views("owner/small", progress=note, cancel=lambda: False)
    shares = [share for _, share in told]
    assert shares == sorted(shares) and told[0] == ("find", 0.0) and told[-1] == ("load", 1.0)


def test_checking_the_files_of_a_model_can_be_cancelled() -> None:
    with pytest.raises(Cancelled, match="stopped while the files of random klein were checked"):
        hub.find_model(klein_folder("mini", card=True), cancel=lambda: True)


def test_a_repository_that_is_not_there_and_one_of_another_kind_are_named(repository) -> None:
    with pytest.raises(TriptychError, match="owner/other"):
        hub.find_model("owner/other")
    repository.folder.mkdir()
    (repository.folder / "config.json").write_text("{}")
    with pytest.raises(TriptychError, match="owner/small at aaaaaaaaaaaa has neither views.json nor model_index.json"):
        hub.find_model("owner/small")
