"""Fine-tuning published Flux models, on random small ones: LoRA, quantised bases, full; cached prompts; FLUX.1's tokens
beside diffusers' own; photographs as references; the memory plan against counted bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from tests.flux_tiny import copied, klein_folder, kontext_folder  # noqa: E402
from tests.live_memory import LiveMemory  # noqa: E402
from trainer import flux_plan  # noqa: E402
from trainer.__main__ import main  # noqa: E402
from trainer.config import TrainConfig, config_from_dict, config_to_dict  # noqa: E402
from trainer.data import relight  # noqa: E402
from trainer.flux_base import (  # noqa: E402
    FrozenParts,
    LoraSettings,
    Words,
    add_adapters,
    encoded_references,
    find_base,
    training_transformer,
    velocity_of,
)
from trainer.loop import export, open_trained, train  # noqa: E402
from trainer.order import stream_seed  # noqa: E402
from trainer.prepare import sheet_cache  # noqa: E402
from trainer.prepare.build import BuildOptions, _bytes, turned  # noqa: E402
from trainer.prepare.photos import (  # noqa: E402
    PhotoOptions,
    Photos,
    camera_rotations,
    photo_references,
    photograph,
    photograph_folder,
    symmetric_photos,
)
from trainer.prepare.run import prepare  # noqa: E402
from trainer.prepare.sheet_cache import SheetOptions, _vae_hash, cache_sheets  # noqa: E402
from trainer.prepare.sources import find_sources  # noqa: E402
from trainer.recipes import build_recipe  # noqa: E402
from trainer.sheet_data import SheetData, TextCache, cache_text  # noqa: E402
from trainer.tasks.flux_views import (  # noqa: E402
    FluxViewsConfig,
    FluxViewsTask,
    TransformerSize,
    cache_words,
    drawn_prompts,
    template_of,
)
from triptych.errors import TriptychError  # noqa: E402
from triptych.flux.card import default_card, read_card, verify_files  # noqa: E402
from triptych.flux.lora import read_lora  # noqa: E402
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, Camera  # noqa: E402
from triptych.geometry.files import read_mesh  # noqa: E402
from triptych.geometry.mesh import Mesh  # noqa: E402
from triptych.render.views import render_views  # noqa: E402

PUBLISHED = ("flux2_klein_4b_lora", "flux2_klein_4b_full", "flux2_klein_9b_lora", "flux1_kontext_lora")
TEMPLATE = "{text}. given: {given}."
LORA = LoraSettings(rank=4, alpha=2.0, dropout=0.1)
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def sheets(folder: Path, model: Path, channels: int, *, count: int = 6) -> Path:
    """A cache of random latents, as `trainer sheets` lays it out."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    options = {"panel": 64, "background": [1.0, 1.0, 1.0], "variants": 1, "captions": 2, "lone_photo": 0.5, "seed": 0}
    names = []
    for split in ("train", "validation"):
        said, references, ends = [], [], []
        for i in range(count):
            given = ["front"] if i % 2 else ["front", "left"]
            facts = {"key": f"{split}{i}", "split": split, "name": "box", "category": "toy", "licence": "CC0-1.0"}
            words = {"captions": [f"a red box {i % 3}", "a box"], "colours": ["red"], "attribution": "nobody"}
            said.append({**facts, **words, "given": given, "faces_front": i % 3 > 0})
            references.append(torch.randn(len(given), channels, 4, 4, generator=generator))
            ends.append((ends[-1] if ends else 0) + len(given))
        name = f"{split}_0_0_0000"
        target = torch.randn(count, channels, 8, 8, generator=generator).bfloat16()
        arrays = {"target": target, "references": torch.cat(references).bfloat16(), "ends": torch.tensor(ends)}
        save_file(arrays, str(folder / f"{name}.safetensors"))
        (folder / f"{name}.json").write_text(json.dumps(said))
        names.append(name)
    index = {"format": 1, "options": options, "vae": _vae_hash(model), "shards": names, "samples": 2 * count}
    (folder / "sheets.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def klein_sheets(tmp_path_factory) -> Path:
    return sheets(tmp_path_factory.mktemp("klein") / "sheets", klein_folder(), 128)


@pytest.fixture(scope="module")
def flux1_sheets(tmp_path_factory) -> Path:
    return sheets(tmp_path_factory.mktemp("flux1") / "sheets", kontext_folder(), 64)


def views_config(cache: Path, base: Path, **changes) -> FluxViewsConfig:
    facts = {"text_tokens": 24, "validation_sheets": 2, "generated_sheets": 2, "sample_steps": 1, "sample_batch": 1}
    return FluxViewsConfig(cache=(str(cache),), base=str(base), **facts | changes)


def run_config(task_config: FluxViewsConfig, **changes) -> TrainConfig:
    facts = {
        "steps": 4, "batch_size": 2, "accumulation": 1, "warmup_steps": 1, "log_every": 1, "validate_every": 0,
        "pictures_every": 0, "checkpoint_every": 2, "workers": 0, "tensorboard": False, "lr": 1e-2,
    }  # fmt: skip
    return replace(build_recipe("flux2_klein_4b_lora"), task_config=task_config, **facts | changes)


def checkpoint(run: Path, step: int = 4) -> Path:
    return run / "checkpoints" / f"step_{step:07d}"


def resumed(config: TrainConfig, run: Path, again: Path) -> Path:
    """The run once more, from its checkpoint in the middle."""
    shutil.copytree(run, again)
    shutil.rmtree(checkpoint(again))
    train(config, again, device="cpu")
    return again


@pytest.fixture(scope="module")
def lora_run(klein_sheets, tmp_path_factory) -> tuple[TrainConfig, Path]:
    config = run_config(views_config(klein_sheets, klein_folder(), lora=LORA, gradient_checkpointing=True))
    run = tmp_path_factory.mktemp("runs") / "lora"
    train(config, run, device="cpu")
    return config, run


# ---- training


def test_a_lora_resumes_bit_for_bit_and_keeps_nothing_of_the_base(lora_run, tmp_path):
    config, run = lora_run
    again = resumed(config, run, tmp_path / "again")
    for file in FILES:
        assert (checkpoint(again) / file).read_bytes() == (checkpoint(run) / file).read_bytes()
    kept = load_file(checkpoint(run) / "model.safetensors")
    assert kept and all(".lora_A." in name or ".lora_B." in name for name in kept)
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert any(float(tensor.abs().max()) > 0 for name, tensor in kept.items() if ".lora_B." in name)


def test_an_exported_lora_is_what_was_trained_and_makes_sheets(lora_run, tmp_path):
    from triptych.flux.backend import load_flux_views

    config, run = lora_run
    folder = tmp_path / "model"
    export(run, folder, device="cpu")
    card = read_card(folder)
    verify_files(folder, card)
    assert (card.architecture, card.lora, card.panel_size) == ("flux2-klein", "lora.safetensors", 64)
    readme = (folder / "README.md").read_text()
    assert f"A LoRA of {klein_folder().name}, fine-tuned" in readme and card.licence in readme
    assert (folder / card.base).resolve() == klein_folder().resolve() and not Path(card.base).is_absolute()
    assert str(tmp_path) not in (folder / "views.json").read_text()

    file = read_lora(folder / "lora.safetensors")
    ema = load_file(checkpoint(run) / "ema.safetensors")
    assert file.rank == LORA.rank and len(file.targets) == len(ema) // 2
    for module in file.targets:
        down, up = (ema[f"{module}.lora_{x}.triptych.weight"] for x in "AB")
        found = file.tensors[f"{module}.lora_B.weight"] @ file.tensors[f"{module}.lora_A.weight"]
        wanted = LORA.alpha / LORA.rank * up @ down
        assert torch.allclose(found, wanted, atol=2e-2 * float(wanted.abs().max()))

    model = load_flux_views(folder)
    made = model.sheet("a box. given: nothing.", seed=1, steps=1, guidance=1.0)
    assert made.shape == (3, 128, 128) and torch.isfinite(made).all()
    model.pipeline.transformer.disable_lora()
    assert not torch.equal(made, model.sheet("a box. given: nothing.", seed=1, steps=1, guidance=1.0))


def test_a_full_fine_tune_resumes_and_exports_for_diffusers_and_comfyui(klein_sheets, tmp_path):
    from diffusers import Flux2Transformer2DModel

    from triptych.flux.native import from_native

    config = run_config(views_config(klein_sheets, klein_folder()), lr=1e-3)
    run = tmp_path / "full"
    train(config, run, device="cpu")
    again = resumed(config, run, tmp_path / "again")
    for file in FILES:
        assert (checkpoint(again) / file).read_bytes() == (checkpoint(run) / file).read_bytes()
    base = Flux2Transformer2DModel.from_pretrained(klein_folder(), subfolder="transformer").state_dict()
    assert load_file(checkpoint(run) / "model.safetensors").keys() == base.keys()

    folder = tmp_path / "whole"
    export(run, folder, device="cpu")
    card = read_card(folder)
    verify_files(folder, card)
    assert card.lora is None and card.base is None
    ema = load_file(checkpoint(run) / "ema.safetensors")
    native = from_native(load_file(folder / "comfyui" / "whole.safetensors"))
    saved = Flux2Transformer2DModel.from_pretrained(folder, subfolder="transformer").state_dict()
    for name, tensor in ema.items():
        assert torch.equal(native[name].float(), tensor.bfloat16().float())
        assert torch.equal(saved[name].float(), tensor.bfloat16().float())
    assert any(not torch.equal(ema[name], base[name]) for name in base)


def velocity_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    noisy, references = (
        torch.randn(2, 128, 8, 8, generator=generator),
        torch.randn(2, 1, 128, 4, 4, generator=generator),
    )
    return noisy, torch.tensor([0.3, 0.9]), torch.randn(2, 24, 96, generator=generator).bfloat16(), references


def lora_model(quantisation: str = "none", checkpointing: bool = False) -> torch.nn.Module:
    """The random base with adapters that already say something."""
    torch.manual_seed(0)
    model = training_transformer(find_base(str(klein_folder())), LoraSettings(rank=4), quantisation, checkpointing)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The velocity, and all gradients in one row."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = velocity_of(model, *velocity_inputs())
    velocity.float().square().mean().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    return velocity.detach().float(), torch.cat([g.flatten() for g in found if g is not None])


def test_checkpointing_changes_no_number():
    plain, recomputed = gradients(lora_model()), gradients(lora_model(checkpointing=True))
    assert torch.equal(plain[0], recomputed[0]) and torch.equal(plain[1], recomputed[1])


@pytest.mark.parametrize(("quantisation", "limit"), [("int8", 0.02), ("fp8", 0.08)])
def test_adapters_learn_beside_a_quantised_base_as_beside_the_whole(quantisation, limit):
    pytest.importorskip("torchao")
    whole, model = gradients(lora_model()), lora_model(quantisation, checkpointing=True)
    small = gradients(model)
    for a, b in zip(small, whole, strict=True):
        assert 0 < float((a - b).norm()) < limit * float(b.norm())
    held = flux_plan.held_bytes(model)
    assert held == pytest.approx(flux_plan.shape_of(model).frozen(f"lora, {quantisation} base"), rel=0.02)


def test_a_run_on_a_quantised_base_resumes(klein_sheets, tmp_path):
    pytest.importorskip("torchao")
    config = run_config(views_config(klein_sheets, klein_folder(), lora=LORA, quantisation="int8"), steps=2)
    config = replace(config, checkpoint_every=1)
    train(config, tmp_path / "run", device="cpu")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(checkpoint(tmp_path / "again", 2))
    train(config, tmp_path / "again", device="cpu")
    for file in FILES:
        assert (checkpoint(tmp_path / "again", 2) / file).read_bytes() == (
            checkpoint(tmp_path / "run", 2) / file
        ).read_bytes()


def test_what_cannot_be_trained_is_said(klein_sheets, tmp_path):
    with pytest.raises(TriptychError, match="distilled to few steps"):
        find_base(str(klein_folder(distilled=True)))
    with pytest.raises(TriptychError, match="holds a frozen base"):
        training_transformer(find_base(str(klein_folder())), LoraSettings(), "int8", False)
    if not torch.cuda.is_available():
        with pytest.raises(TriptychError, match="nf4 needs a CUDA GPU: choose int8"):
            training_transformer(find_base(str(klein_folder())), LORA, "nf4", False)
    with pytest.raises(TriptychError, match="needs a base"):
        FluxViewsTask(FluxViewsConfig(cache=("x",), parts="y", lora=LORA))
    with pytest.raises(TriptychError, match="set one"):
        FluxViewsTask(FluxViewsConfig(cache=("x",)))
    base = find_base(str(klein_folder()))
    for targets, said in (("nothing", "do not fit"), (r"single_stream_modulation\.linear", "dropped by ComfyUI")):
        with pytest.raises(TriptychError, match=said):
            training_transformer(base, LoraSettings(rank=2, targets=targets), "none", False)
    other = copied(klein_folder(), tmp_path / "other")
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    save_file(
        {key: tensor + (key == "encoder.conv_in.weight") for key, tensor in load_file(weights).items()}, str(weights)
    )
    task = FluxViewsTask(views_config(klein_sheets, other))
    with pytest.raises(TriptychError, match="another autoencoder"):
        task.setup(torch.device("cpu"))


def test_configs_of_runs_from_before_still_load():
    """What the small model's runs saved knows nothing of bases."""
    config = build_recipe("flux_views_tiny")
    saved = config_to_dict(config)
    for key in (
        "base",
        "lora",
        "quantisation",
        "gradient_checkpointing",
        "text",
        "sample_shift",
        "sample_batch",
        "licence",
    ):
        del saved["task_config"][key]
    assert config_from_dict(saved) == config


@pytest.mark.parametrize("thin_padding", [0, 4])
def test_the_small_model_trains_in_float32_too(klein_sheets, thin_padding):
    size = TransformerSize(heads=1, double_blocks=1, single_blocks=1)
    facts = {"text_tokens": 24, "validation_sheets": 1, "generated_sheets": 1, "sample_steps": 1, "size": size}
    config = FluxViewsConfig((str(klein_sheets),), parts=str(klein_folder()), thin_padding=thin_padding, **facts)
    task = FluxViewsTask(config)
    task.setup(torch.device("cpu"))
    model = task.build_model()
    loss, _ = task.loss(model, task.collate([task.sample(i, i) for i in range(2)]), 0)
    loss.backward()
    assert torch.isfinite(loss) and model.proj_out.weight.grad.dtype == torch.float32
    with torch.no_grad():
        assert np.isfinite(task.validate(model)["loss"])


# ---- cached prompts


def test_a_card_gets_one_prompt_and_one_picture_at_a_time(monkeypatch, tmp_path):
    def embed(prompts):
        sizes.append(len(prompts))
        return {"words": torch.tensor([[[float(len(prompt))]] for prompt in prompts])}

    def encode(pictures):
        sizes.append(len(pictures))
        return pictures.mean(dim=(2, 3))

    facts = {"architecture": "flux2-klein", "tokens": 1}
    sizes: list[int] = []
    for name, step in (("cpu", {}), ("card", {"at_a_time": 1})):
        cache_text(tmp_path / name, [letter * (1 + i) for i, letter in enumerate("abcdefghij")], embed, **facts, **step)
    assert sizes == [8, 2] + [1] * 10
    first, second = ((tmp_path / name / "text_0000.safetensors").read_bytes() for name in ("cpu", "card"))
    assert first == second
    monkeypatch.setattr(sheet_cache, "sheet_encoder", lambda model, device: encode)
    monkeypatch.setattr(sheet_cache, "_ENCODERS", {})
    sizes.clear()
    pictures = torch.rand(5, 3, 4, 4)
    made = [sheet_cache._encoder("model", device)(pictures) for device in ("cpu", "cuda")]
    assert sizes == [5, 1, 1, 1, 1, 1] and torch.equal(*made)


def test_no_logits_over_the_vocabulary_are_made_for_a_prompt():
    parts, shapes = FrozenParts(klein_folder(), torch.device("cpu")), []
    parts.part("text_encoder").lm_head.register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))
    parts.embed(["a red chair", "a car"], 24)
    parts.embed_thinly(["a red chair", "a car"], 24, 2, 0)
    assert shapes == [(2, 1), (2, 1)]


def test_cached_prompts_train_alike_and_nothing_else_is_loaded(klein_sheets, tmp_path):
    text = tmp_path / "text"
    total, fresh = cache_words([klein_sheets], klein_folder(), text, template=TEMPLATE, tokens=24)
    assert total == fresh == len(TextCache(text, "flux2-klein", 24))
    plain = views_config(klein_sheets, klein_folder(), lora=LORA)
    cached = replace(plain, text=str(text))
    for name, task_config in (("plain", plain), ("cached", cached)):
        train(run_config(task_config, steps=2), tmp_path / name, device="cpu")
    a, b = ((checkpoint(tmp_path / name, 2) / "model.safetensors").read_bytes() for name in ("plain", "cached"))
    assert a == b

    run, _ = open_trained(tmp_path / "cached", "last", "cpu")
    task = run.task
    batch = task.collate([task.sample(i, i) for i in range(4)])
    task.loss(run.model, batch, 0)[0].backward()
    assert task.parts.loaded == ()
    loaded: list[tuple[str, ...]] = []
    decode = task.parts.decode
    task.parts.decode = lambda latents: (decode(latents), loaded.append(task.parts.loaded))[0]
    with torch.no_grad():
        metrics, picture = task.validate(run.model), task.pictures(run.model)
    assert metrics.keys() == {"loss", "psnr", "iou"} and picture.size == (256, 384)
    assert set(loaded) == {("vae",)} and task.parts.loaded == ()


def test_a_cache_of_prompts_goes_on_and_refuses_what_it_is_not_for(klein_sheets, tmp_path, monkeypatch):
    from trainer import sheet_data

    monkeypatch.setattr(sheet_data, "PROMPTS_PER_FILE", 5)
    text = tmp_path / "text"
    embeds = FrozenParts.embed
    calls: list[int] = []

    def failing(self, prompts, tokens):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return embeds(self, prompts, tokens)

    monkeypatch.setattr(FrozenParts, "embed", failing)
    with pytest.raises(KeyboardInterrupt):
        cache_words([klein_sheets], klein_folder(), text, template=TEMPLATE, tokens=24)
    assert len(TextCache(text, "flux2-klein", 24)) == 5
    total, fresh = cache_words([klein_sheets], klein_folder(), text, template=TEMPLATE, tokens=24)
    assert fresh == total - 5
    config = FluxViewsConfig(cache=(str(klein_sheets),), parts=str(klein_folder()), text_tokens=24)
    cache = TextCache(text, "flux2-klein", 24)
    one = FrozenParts(klein_folder(), torch.device("cpu"))
    for prompt in drawn_prompts(config):
        assert cache[prompt]["words"].shape == (24, 96)
    prompt = drawn_prompts(config)[-1]
    assert torch.allclose(cache[prompt]["words"], embeds(one, [prompt], 24)[0], atol=0.05, rtol=0.02)
    with pytest.raises(TriptychError, match="lacks the prompt 'a cat'"):
        cache["a cat"]
    with pytest.raises(TriptychError, match="text of 24 tokens, 48 are needed"):
        TextCache(text, "flux2-klein", 48)
    with pytest.raises(TriptychError, match="flux1-dev is needed"):
        TextCache(text, "flux1-dev", 24)


def test_every_prompt_that_can_be_drawn_is_cached(klein_sheets):
    task = FluxViewsTask(views_config(klein_sheets, klein_folder(), drop_references=0.5, drop_text=0.2))
    task.data, task.held_out = SheetData([klein_sheets]), SheetData([klein_sheets], "validation")
    drawn = {task.sample(i % len(task.data), seed)["prompt"] for i, seed in enumerate(range(300))}
    assert drawn <= set(drawn_prompts(task.config)) and "" in drawn and len(drawn) > 8


# ---- FLUX.1


def flux1_pipeline(text_only: bool):
    from diffusers import FluxKontextPipeline, FluxPipeline

    kind = FluxPipeline if text_only else FluxKontextPipeline
    pipe = kind.from_pretrained(kontext_folder(text_only=text_only), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("text_only", "given"), [(True, 0), (False, 0), (False, 1), (False, 2)])
def test_tokens_of_flux1_are_those_of_the_published_pipeline(text_only, given):
    """One step of the pipeline from the same noise is the same velocity; two views are one picture side by side."""
    pipe = flux1_pipeline(text_only)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 64, 8, 8, generator=generator)
    packed = noise.flatten(2).transpose(1, 2)
    views = torch.rand(given, 3, 64, 64, generator=generator)
    steps: list[torch.Tensor] = []
    further = {
        "image": torch.cat(list(views), dim=-1)[None] if given else None,
        "max_area": 128 * 128,
        "_auto_resize": False,
    }
    pipe(
        prompt="a chair", height=128, width=128, sigmas=[1.0, 0.5], guidance_scale=2.5, latents=packed,
        output_type="latent", max_sequence_length=24, **({} if text_only else further),
        callback_on_step_end=lambda p, i, t, state: steps.append(state["latents"]) or {},
    )  # fmt: skip
    theirs = ((steps[0] - packed) / -0.5).transpose(1, 2).unflatten(2, (8, 8))
    words = Words(*pipe.encode_prompt("a chair", None, max_sequence_length=24)[:2])
    parts = FrozenParts(kontext_folder(), torch.device("cpu"), "flux1-kontext")
    parts._loaded["vae"] = pipe.vae
    own = encoded_references(parts.encode, [views], joined=True)[None] if given else None
    with torch.no_grad():
        ours = velocity_of(pipe.transformer, noise, torch.ones(1), words, own, 2.5)
        assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()
        assert not torch.allclose(velocity_of(pipe.transformer, noise, torch.ones(1), words, own), theirs, atol=2e-4)


def test_latents_of_flux1_decode_as_the_pipeline_does():
    pipe = flux1_pipeline(False)
    parts = FrozenParts(kontext_folder(), torch.device("cpu"), "flux1-kontext")
    parts._loaded["vae"] = pipe.vae
    latents = torch.randn(1, 64, 8, 8, generator=torch.Generator().manual_seed(2))
    whole = pipe._unpack_latents(latents.flatten(2).transpose(1, 2), 128, 128, pipe.vae_scale_factor)
    config = pipe.vae.config
    with torch.no_grad():
        theirs = pipe.vae.decode(whole / config.scaling_factor + config.shift_factor).sample
        assert torch.allclose(parts.decode(latents), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("text_only", [False, True])
def test_flux1_trains_and_exports_a_lora(flux1_sheets, tmp_path, text_only):
    base = kontext_folder(text_only=text_only)
    text = tmp_path / "text"
    cache_words([flux1_sheets], base, text, template=TEMPLATE, tokens=24)
    sheets = flux1_sheets
    if text_only:  # its own autoencoder
        sheets = copied(flux1_sheets, tmp_path / "sheets")
        index = json.loads((sheets / "sheets.json").read_text()) | {"vae": _vae_hash(base)}
        (sheets / "sheets.json").write_text(json.dumps(index))
    task_config = views_config(sheets, base, lora=LoraSettings(rank=2), text=str(text))
    run = tmp_path / "run"
    train(run_config(task_config, steps=2, validate_every=2, pictures_every=2), run, device="cpu")
    assert len(list((run / "pictures").glob("*.png"))) == 1
    export(run, tmp_path / "model", device="cpu")
    card = read_card(tmp_path / "model")
    assert card.architecture == ("flux1-dev" if text_only else "flux1-kontext")
    assert read_lora(tmp_path / "model" / "lora.safetensors").family == "flux1"
    session, _ = open_trained(run, "last", "cpu")
    drawn = [session.task.sample(i, i) for i in range(len(session.task.data))]
    assert ("pooled" in drawn[0]) and drawn[0]["words"].shape == (24, 32)
    if text_only:
        assert all(len(one["references"]) == 0 for one in drawn) and len(drawn) == 4


# ---- photographs


@pytest.fixture(scope="module")
def photographed(tmp_path_factory) -> tuple[Path, Path]:
    """A prepared folder of asymmetric objects with photographs, and its source."""
    source, out = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("data")
    for i in range(3):
        parts = [trimesh.creation.box((0.9, 0.3 + 0.1 * i, 0.4)), trimesh.creation.icosphere(1, radius=0.25)]
        parts[1].apply_translation((0.35, 0.3, 0.2))
        trimesh.util.concatenate(parts).export(source / f"{i}.ply")
    prepare(find_sources([source]), out, BuildOptions(yaws=2, view_size=64), workers=0)
    index = json.loads((out / "index.json").read_text())
    for i, record in enumerate(index["records"]):
        record["split"] = "train" if i else "validation"
    (out / "index.json").write_text(json.dumps(index))
    made = photograph_folder(out, [source], PhotoOptions(size=64), workers=0)
    assert made == {"samples": 6, "skipped": 0, "absent": 0}
    return out, source


def test_photographs_are_of_the_object_as_it_was_prepared_or_none(tmp_path):
    source, data = tmp_path / "meshes", tmp_path / "data"
    source.mkdir()
    for i in range(2):
        tall = trimesh.creation.box((0.3, 0.2 + 0.1 * i, 1.0))  # up is +z in the file
        tall.export(source / f"{i}.ply")
    prepare(find_sources([source], up="+z", front="-y"), data, BuildOptions(yaws=1, view_size=64), workers=0)
    trimesh.creation.box((1, 1, 1)).export(source / "1.ply")
    made = photograph_folder(data, [source], PhotoOptions(size=64), workers=0)
    assert made == {"samples": 1, "skipped": 1, "absent": 0}
    report = json.loads(next((data / "photos").glob("shard*.json")).read_text())
    assert "1.ply has changed since it was prepared: run prepare again" in report["skipped"][0]["reason"]
    records = {r["key"]: r for r in json.loads((data / "index.json").read_text())["records"]}
    record = records["meshes/0.ply"]
    alpha = Photos(data).get(record["shard"], record["rows"][0])["albedo"][..., 3] > 128
    for view in alpha:
        assert view.any(1).sum() > 1.5 * view.any(0).sum(), "it stands"


def test_photographs_go_on_and_show_the_prepared_object(photographed):
    data, source = photographed
    records = [r for r in json.loads((data / "index.json").read_text())["records"] if r["status"] == "ok"]
    photos = Photos(data)
    for record in records:
        for row, yaw in zip(record["rows"], record["yaws_deg"], strict=True):
            found = photos.get(record["shard"], row)
            assert found is not None
            facts = found["cameras"]
            aside = (facts[:, 0] - np.array(VIEW_AZIMUTHS_DEG) + 180) % 360 - 180
            assert (np.abs(aside) <= 10).all() and (facts[:, 1] >= -15).all() and (facts[:, 1] <= 30).all()
            assert (facts[:, 2] >= 15).all() and (facts[:, 2] <= 50).all()
            mesh = turned(read_mesh(source / Path(record["key"]).with_suffix(".ply").name).normalized(), yaw)
            again = photograph(mesh, PhotoOptions(size=64), stream_seed(0, f"photo/{record['key']}", row))
            assert all(np.array_equal(found[key], again[key]) for key in again)
            alpha = found["albedo"][..., 3]
            assert not alpha[:, 0].any() and not alpha[:, -1].any() and not alpha[:, :, [0, -1]].any()
            assert (alpha > 0).mean() > 0.05
    assert photos.get(records[0]["shard"], 10_000) is None
    file = next((data / "photos").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    photograph_folder(data, [source], PhotoOptions(size=64), workers=0)
    assert file.read_bytes() == whole
    with pytest.raises(TriptychError, match="other options"):
        photograph_folder(data, [source], PhotoOptions(size=32), workers=0)


def lopsided() -> Mesh:
    parts = [trimesh.creation.box((0.9, 0.3, 0.4)), trimesh.creation.icosphere(2, radius=0.25)]
    parts[1].apply_translation((0.35, 0.3, 0.2))
    joined = trimesh.util.concatenate(parts)
    return Mesh(np.asarray(joined.vertices, np.float32), np.asarray(joined.faces, np.int64)).normalized()


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_photographs_of_a_turned_object_are_turned_photographs(number):
    """The symmetry of the pictures is the render of the turned or mirrored mesh by the moved cameras."""
    mesh = lopsided()
    photos = photograph(mesh, PhotoOptions(size=48), seed=4)
    moved = symmetric_photos(photos, number)
    angle = np.deg2rad(90 * (number % 4))
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    vertices = mesh.vertices @ turn.T.astype(np.float32)
    faces = mesh.faces
    if number >= 4:
        vertices, faces = vertices * np.array([-1, 1, 1], np.float32), mesh.faces[:, ::-1]
    other = mesh.replace(vertices=vertices.astype(np.float32), faces=np.ascontiguousarray(faces))
    reach = float(np.linalg.norm(mesh.vertices, axis=1).max())
    cameras = [
        Camera(float(a), float(e), reach / np.sin(np.deg2rad(fov) / 2), half_extent=None, fov_deg=float(fov))
        for a, e, fov in moved["cameras"]
    ]
    views = render_views(other, cameras, 48)
    alpha = _bytes(views.alpha[:, 0])
    assert (np.abs(alpha.astype(int) - moved["albedo"][..., 3]) > 40).mean() < 2e-3
    normal = _bytes((views.normal.permute(0, 2, 3, 1) + 1) / 2)
    inside = (alpha == 255) & (moved["albedo"][..., 3] == 255)
    assert (np.abs(normal.astype(int) - moved["normal"])[inside].max(-1) > 12).mean() < 0.03


def test_light_on_photographs_follows_their_cameras():
    mesh = lopsided()
    rig = render_views(mesh, [Camera(azimuth) for azimuth in VIEW_AZIMUTHS_DEG], 48)
    albedo = _bytes(torch.cat([rig.albedo, rig.alpha], dim=1).permute(0, 2, 3, 1))
    normal = _bytes((rig.normal.permute(0, 2, 3, 1) + 1) / 2)
    own = camera_rotations(np.array([[azimuth, 0, 20] for azimuth in VIEW_AZIMUTHS_DEG], np.float32))
    for seed in range(4):
        before = relight(albedo, normal, np.random.default_rng(seed), (0, 2))
        assert torch.equal(before, relight(albedo, normal, np.random.default_rng(seed), (0, 2), rotations=own))
    other = camera_rotations(np.array([[azimuth + 40, 20, 20] for azimuth in VIEW_AZIMUTHS_DEG], np.float32))
    assert not torch.equal(before, relight(albedo, normal, np.random.default_rng(3), (0, 2), rotations=other))


def test_references_from_photographs_have_one_height_and_their_background():
    photos = photograph(lopsided(), PhotoOptions(size=64), seed=1)
    made = photo_references(photos, (0, 1, 2), np.random.default_rng(0), (1.0, 0.0, 1.0), jitter=0.0)
    assert made.shape == (3, 3, 64, 64) and float(made.min()) >= 0 and float(made.max()) <= 1
    key = torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)
    seen = (made - key).abs().amax(1) > 0.3
    heights = [int(view.any(1).sum()) for view in seen]
    extents = [max(int(view.any(1).sum()), int(view.any(0).sum())) for view in seen]
    assert max(heights) - min(heights) <= 2 and abs(max(extents) - 0.85 * 64) <= 2
    again = photo_references(photos, (0, 1, 2), np.random.default_rng(0), (1.0, 0.0, 1.0), jitter=0.0)
    assert torch.equal(made, again)


# ---- recipes and the plan


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_complete_and_says_what_fits(name):
    config = build_recipe(name)
    assert config_from_dict(config_to_dict(config)) == config
    task_config = config.task_config
    architecture = "flux1-kontext" if "flux1" in name else "flux2-klein"
    assert task_config.prompt_template == default_card(architecture).prompt_template
    prompt = task_config.prompt_template.format(text="a red chair", given="front")
    assert prompt.startswith("a red chair. One sheet") and prompt.endswith("front.")
    text = FluxViewsTask(task_config).memory_plan(None, config.batch_size // config.accumulation)
    for card in (12, 16, 24, 48, 80):
        assert text.count(f"\n{card} GB ") == len(flux_plan.MODES)
    with pytest.raises(TriptychError, match="--gpu must be 1"):
        FluxViewsTask(task_config).memory_plan([0], 1)


def test_the_plan_is_for_the_most_references_that_a_sheet_can_have(tmp_path):
    config = replace(build_recipe("flux2_klein_4b_lora").task_config, cache=(str(tmp_path),))
    shape = flux_plan.plan_shape(config.base, config.lora)

    def fits(text: str, references: int) -> bool:
        row = "".join(f"{n or 'none':>12}" for n in flux_plan.fit(shape, "lora", 16, references).batches)
        return f"\n{'16 GB':<8}{'lora':<18}{row}" in text

    text = flux_plan.plan_text(config, [16], 1)
    assert "\n1 reference, recomputed " in text and "\n3 references, recomputed " in text
    assert fits(text, 3) and not fits(text, 1)
    (tmp_path / "sheets.json").write_text('{"options": {"mirrored": true}}')
    text = flux_plan.plan_text(config, [16], 1)
    assert "\n1 reference, all kept " in text and "\n6 references, all kept " in text and fits(text, 6)
    dev = flux_plan.plan_text(replace(config, base="black-forest-labs/FLUX.1-dev"), [24], 1)
    assert "\n0 references, recomputed " in dev and "1 reference" not in dev


@pytest.mark.parametrize(
    ("base", "billions"),
    [("FLUX.2-klein-base-4B", 3.88), ("FLUX.2-klein-base-9B", 9.08), ("FLUX.1-Kontext-dev", 11.90)],
)
def test_published_sizes_are_known_without_their_weights(base, billions):
    shape = flux_plan.plan_shape(f"black-forest-labs/{base}", LoraSettings(rank=32))
    assert round(shape.numbers / 1e9, 2) == billions
    assert shape.frozen("lora") == 2 * shape.numbers
    assert 0.5 < shape.frozen("lora, int8 base") / (1.0 * shape.numbers) < 1.06
    memory = [sum(shape.static(mode).values()) for mode in flux_plan.MODES]
    assert memory == sorted(memory, reverse=True)
    fits = [flux_plan.fit(shape, "lora, int8 base", card).batches for card in (12, 16, 24, 48, 80)]
    assert fits == sorted(fits) and all(a >= b >= c for a, b, c in fits)


def test_planned_adapters_are_those_that_are_added():
    for folder, architecture in ((klein_folder(), "flux2-klein"), (kontext_folder(), "flux1-kontext")):
        planned = flux_plan.plan_shape(str(folder), LoraSettings(rank=4))
        model = training_transformer(find_base(str(folder)), LoraSettings(rank=4), "none", False)
        assert planned == flux_plan.shape_of(model)
        assert planned.adapters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert planned.frozen("lora") == flux_plan.held_bytes(model), architecture


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps, each once, without those of ``known``."""

    def __init__(self, known) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        skip = {t.untyped_storage().data_ptr() for t in known}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in skip:
                self.storages[storage.data_ptr()] = storage
            return tensor

        super().__init__(keep, lambda tensor: tensor)

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def small_transformer(family: str, recompute: bool) -> tuple[torch.nn.Module, Any]:
    """A random bfloat16 transformer with adapters, and words for it."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel

    sizes = {"num_layers": 2, "num_single_layers": 3, "attention_head_dim": 128, "num_attention_heads": 2}
    torch.manual_seed(0)
    if family == "flux2":
        model = Flux2Transformer2DModel(in_channels=128, joint_attention_dim=96, guidance_embeds=False, **sizes)
        words = torch.randn(1, 64, 96).bfloat16()
    else:
        model = FluxTransformer2DModel(
            in_channels=64, joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, **sizes
        )
        words = Words(torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 32).bfloat16())
    model = model.to(torch.bfloat16)
    add_adapters(model, "flux2-klein" if family == "flux2" else "flux1-dev", LoraSettings(rank=8))
    if recompute:
        model.enable_gradient_checkpointing()
    return model.train(), words


@pytest.mark.parametrize("references", [0, flux_plan.MOST_REFERENCES])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["flux2", "flux1"])
def test_planned_activations_are_those_that_autograd_keeps(family, recompute, references):
    model, words = small_transformer(family, recompute)
    shape = flux_plan.shape_of(model)
    noisy = torch.randn(1, model.config.in_channels, 16, 16)
    given = torch.randn(1, references, model.config.in_channels, 8, 8) if references else None
    kept, tokens = Kept([*model.parameters(), *model.buffers()]), flux_plan.sheet_tokens(256, references, 64)
    with LiveMemory() as live:
        with kept, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = velocity_of(model, noisy, torch.ones(1), words, given).float().square().mean()
        counted = kept.total()
        loss.backward()
    planned = shape.activations("lora", tokens, recompute=recompute, cuda=False)
    if recompute:  # the plan has the block that is there again on the way back
        planned -= tokens * max(shape.kept(kind, "lora", cuda=False) for kind in shape.blocks)
    assert counted == pytest.approx(planned, rel=0.12 if recompute else 0.06)
    if recompute:
        foreseen = shape.sample("lora", tokens, cuda=False) + 6 * shape.adapters  # gradients and bfloat16 copies
        assert live.peak == pytest.approx(foreseen, rel=0.15)


# ---- the commands


@pytest.mark.parametrize("family", ["klein", "kontext"])
def test_sheets_with_photographs_and_prompts_are_made_by_one_command_and_trained_on(family, photographed, tmp_path):
    data, source = photographed
    base = klein_folder() if family == "klein" else kontext_folder()
    out = tmp_path / "sheets"
    command = ["sheets", data, "--model", base, "--out", out, "--panel", 64, "--background", "1,1,1", "--workers", 0]
    command += ["--variants", 1, "--captions", 1, "--photos", source, "--photo-share", 1, "--text"]
    assert main(list(map(str, [*command, "--text-tokens", 24]))) == 0
    sheets = SheetData([out])
    assert (sheets.options["photos"], sheets.options["captions"]) == (1.0, 1)
    channels = 128 if family == "klein" else 64
    assert all(sheets[i].references.shape[1:] == (channels, 4, 4) for i in range(len(sheets)))
    template = template_of(base)
    assert template == default_card("flux2-klein" if family == "klein" else "flux1-kontext").prompt_template
    plain = tmp_path / "plain"
    cache_sheets([data], base, plain, SheetOptions(64, (1, 1, 1), 1, 1), workers=0)
    other = SheetData([plain])
    assert "photos" not in other.options
    assert torch.equal(sheets[0].target, other[0].target) and not torch.equal(sheets[0].references, other[0].references)

    task_config = views_config(out, base, lora=LoraSettings(rank=2), text=str(out / "text"), prompt_template=template)
    train(run_config(task_config, steps=1), tmp_path / "run", device="cpu")
    assert checkpoint(tmp_path / "run", 1).is_dir()


def test_wrong_shares_are_said():
    with pytest.raises(TriptychError, match="--photo-share 1.5 is a share from 0 to 1"):
        SheetOptions(photos=1.5)


def test_the_plan_is_a_command(capsys):
    assert main(["plan", "flux2_klein_4b_lora", "--gpu", "24", "--set", "task_config.lora.rank=16"]) == 0
    said = capsys.readouterr().out
    assert "adapters of rank 16" in said and "24 GB" in said and "80 GB" not in said
    assert main(["plan", "flux_views_tiny"]) == 1
    assert "is not known" in capsys.readouterr().err
