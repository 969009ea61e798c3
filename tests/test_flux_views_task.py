"""The multi-view task on random parts: cached sheets, its tokens beside diffusers' own, training, export."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from tests.flux_tiny import klein_folder  # noqa: E402
from trainer.__main__ import main as trainer_main  # noqa: E402
from trainer.data import JoinedData  # noqa: E402
from trainer.flux_base import FrozenParts  # noqa: E402
from trainer.loop import evaluating, export, open_trained, train  # noqa: E402
from trainer.prepare.sheet_cache import SheetOptions, cache_sheets  # noqa: E402
from trainer.prepare.sheets import canonical_shade, references  # noqa: E402
from trainer.recipes import build_recipe  # noqa: E402
from trainer.sheet_data import SheetData  # noqa: E402
from trainer.tasks import flux_views  # noqa: E402
from trainer.tasks.flux_vae import FluxVaeConfig  # noqa: E402
from trainer.tasks.flux_views import (  # noqa: E402
    FluxViewsConfig,
    FluxViewsTask,
    TransformerSize,
    compared,
    grouped_velocity,
    small_transformer,
    spread_words,
    velocity_of,
)
from triptych.errors import TriptychError  # noqa: E402
from triptych.flux.card import read_card, verify_files  # noqa: E402

SMALL = {"steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every": 1, "validate_every": 4, "pictures_every": 4}


@pytest.fixture(scope="module")
def cache(boxes_and_balls, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sheets")
    cache_sheets([boxes_and_balls], klein_folder(), out, SheetOptions(panel=64), workers=0)
    return out


def _config(cache: Path, **changes) -> FluxViewsConfig:
    size = TransformerSize(heads=1, double_blocks=1, single_blocks=1)
    facts = {"size": size, "text_tokens": 24, "validation_sheets": 2, "generated_sheets": 2, "sample_steps": 2}
    return FluxViewsConfig(cache=(str(cache),), parts=str(klein_folder()), **facts | changes)


def test_a_cache_is_a_function_of_its_options_and_goes_on(boxes_and_balls, cache, tmp_path):
    again = tmp_path / "again"
    count = cache_sheets([boxes_and_balls], klein_folder(), again, SheetOptions(panel=64), workers=0)
    assert count == len(SheetData([cache])) + len(SheetData([cache], "validation"))
    for file in sorted(cache.glob("train_*")):
        assert (again / file.name).read_bytes() == file.read_bytes()
    victim = next(again.glob("train_*.safetensors"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-5])
    cache_sheets([boxes_and_balls], klein_folder(), again, SheetOptions(panel=64), workers=0)
    assert victim.read_bytes() == whole
    with pytest.raises(TriptychError, match="another options"):
        cache_sheets([boxes_and_balls], klein_folder(), again, SheetOptions(panel=64, captions=1), workers=0)
    with pytest.raises(TriptychError, match="panels of 128 px need a multiple"):
        cache_sheets([boxes_and_balls], klein_folder(), tmp_path / "large", SheetOptions(), workers=0)


def test_words_alone_are_only_asked_of_objects_that_face_the_front(cache):
    task = FluxViewsTask(_config(cache, drop_references=1.0))
    task.data = SheetData([cache])
    for index, said in enumerate(task.data.said):
        drawn = task.sample(index, 7)
        assert (len(drawn["references"]) == 0) == said["faces_front"]
        assert drawn["prompt"] in ("", *(f"{t}. given: nothing." for t in said["captions"])) or not said["faces_front"]


def test_a_share_of_the_samples_is_made_from_words_alone(cache):
    task = FluxViewsTask(_config(cache, drop_references=0.0, words_share=0.5))
    task.data = SheetData([cache])
    drawn = [task.sample(index, seed) for index in range(4) for seed in range(40)]
    alone = [len(one["references"]) == 0 for one in drawn]
    assert 0.35 < np.mean(alone) < 0.65
    assert all(one["prompt"] == "" or one["prompt"].endswith("nothing.") for one in np.array(drawn)[alone])
    facing = [c.target for c in (task.data[i] for i in range(len(task.data))) if c.said["faces_front"]]
    for one in np.array(drawn)[alone][:10]:
        assert any(torch.equal(one["target"], target) for target in facing)


def test_the_fixed_light_keeps_a_colour_within_its_bounds():
    albedo = np.full((4, 8, 8, 4), 255, dtype=np.uint8)
    normal = np.full((4, 8, 8, 3), 127, dtype=np.uint8)
    normal[..., 1] = 255  # all pixels face up: no headlight, all of the sky
    shaded = canonical_shade(albedo, normal)
    linear = 0.35 + 0.30
    assert shaded.shape == (4, 4, 8, 8)
    assert torch.allclose(shaded[:, :3], torch.tensor(1.055 * linear ** (1 / 2.4) - 0.055), atol=5e-3)
    albedo[:, :4, :, 3] = 0
    assert not canonical_shade(albedo, normal)[:, :, :4].any()


def test_references_fill_their_frame_by_themselves():
    view = torch.zeros(1, 4, 64, 64)
    view[:, 1:, 20:30, 40:46] = 1.0  # ten pixels high, six wide, off the centre
    moved = references(view, np.random.default_rng(0), jitter=0.0)[0]
    rows, columns = (moved[3] > 0.5).any(1).nonzero(), (moved[3] > 0.5).any(0).nonzero()
    assert abs(int(rows[-1] - rows[0]) + 1 - 0.85 * 64) <= 1
    assert abs(float(columns[-1] + columns[0]) / 2 - 31.5) <= 0.5
    inside = moved[:3, 28:36, 28:36]
    assert torch.allclose(inside, torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1).expand_as(inside))
    with pytest.raises(TriptychError, match="empty"):
        references(torch.zeros(1, 4, 8, 8), np.random.default_rng(0))


@pytest.mark.parametrize("given", [0, 1, 3])
def test_tokens_are_those_of_the_published_pipeline(given):
    """One step of the pipeline from the same noise is the same velocity, with any number of references."""
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(klein_folder(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, 128, 8, 8, generator=generator)
    pixels = [torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8) for _ in range(given)]
    pictures = [Image.fromarray(one.numpy()) for one in pixels]
    steps: list[torch.Tensor] = []
    pipe(
        prompt="a chair",
        image=pictures or None,
        height=128,
        width=128,
        sigmas=[1.0, 0.5],
        guidance_scale=1.0,
        latents=noise,
        output_type="latent",
        max_sequence_length=24,
        callback_on_step_end=lambda p, i, t, state: steps.append(state["latents"]) or {},
    )
    theirs = ((steps[0] - noise.flatten(2).transpose(1, 2)) / -0.5).transpose(1, 2).unflatten(2, (8, 8))
    words = pipe.encode_prompt(prompt="a chair", max_sequence_length=24)[0]
    own = None
    if given:
        latents = [pipe._encode_vae_image(p.permute(2, 0, 1)[None] / 127.5 - 1, generator) for p in pixels]
        own = torch.stack(latents, dim=1)
    with torch.no_grad():
        ours = velocity_of(pipe.transformer, noise, torch.ones(1), words, own)
    assert torch.allclose(ours, theirs, atol=2e-4), (ours - theirs).abs().max()


@torch.no_grad()
def test_a_few_padding_tokens_stand_for_all():
    parts = FrozenParts(klein_folder(), torch.device("cpu"))
    model = parts.pipeline(small_transformer(TransformerSize(heads=1, double_blocks=1, single_blocks=1), 128, 96))
    model = model.transformer.to(torch.bfloat16)
    for parameter in model.parameters():  # at the start every output is zero
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 12)
    prompts = ["a red chair. given: front.", ""]
    noise = torch.randn(2, 128, 8, 8, generator=torch.Generator().manual_seed(0))

    def velocity(words):
        return grouped_velocity(model, noise, torch.full((2,), 0.9), words, noise[:0], [(0, 2)]).float()

    whole = parts.embed(prompts, 256)
    wanted = velocity(whole)
    every = parts.embed_thinly(prompts, 256, 256, seed=0)
    assert torch.equal(every.places, torch.arange(256)) and not every.log_counts.any()
    rounding = (velocity(every) - wanted).square().mean().sqrt()
    few = [parts.embed_thinly(prompts, 256, 8, seed=seed) for seed in range(4)]
    assert few[0].embeds.shape[1] == few[0].log_counts.shape[1] < 80
    assert not torch.equal(few[0].places, few[1].places)
    for thin in few:
        counts = thin.log_counts.float().exp().sum(1)
        assert torch.allclose(counts, torch.full((2,), 256.0), rtol=0.02)  # bfloat16
        states = whole[:, thin.places]  # of the words, and of padding wherever it is
        assert (thin.embeds - states).abs().max() < 0.05 * states.abs().max()
    error = torch.stack([(velocity(thin) - wanted).square().mean() for thin in few]).mean().sqrt()
    without = len(few[0].places) - 8
    cut = (velocity(whole[:, :without]) - wanted).square().mean().sqrt()
    assert rounding < 0.3 * cut and error < 0.5 * cut, (rounding, error, cut)


def test_references_of_a_mirrored_cache_come_with_their_mirror_images(boxes_and_balls, cache, tmp_path):
    options = SheetOptions(panel=64, mirrored=True, variants=1)
    cache_sheets([boxes_and_balls], klein_folder(), tmp_path / "mirrored", options, workers=0)
    plain, mirrored = SheetData([cache]), SheetData([tmp_path / "mirrored"])
    parts = FrozenParts(klein_folder(), torch.device("cpu"))
    for index in range(3):
        one, two = plain[index], mirrored[index]
        assert torch.equal(one.target, two.target) and len(two.references) == 2 * len(one.references)
        assert torch.allclose(one.references, two.references[::2], atol=0.05)
    with pytest.raises(TriptychError, match="another options"):
        SheetData([cache, tmp_path / "mirrored"])
    task = FluxViewsTask(_config(tmp_path / "mirrored", thin_padding=4))
    task.setup(torch.device("cpu"))
    model = task.build_model().to(torch.bfloat16)
    loss, _ = task.loss(model, task.collate([task.sample(i, i) for i in range(4)]), 0)
    assert torch.isfinite(loss) and set(task.validate(model)) == {"loss", "psnr", "iou"}
    assert task.card("mirrored", {}).mirrored and not parts.loaded


def test_latents_of_a_cache_decode_to_its_sheet():
    """Encoding as the cache does and decoding as training does are inverse up to the autoencoder itself."""
    from diffusers import Flux2KleinPipeline

    parts = FrozenParts(klein_folder(), torch.device("cpu"))
    pipe = Flux2KleinPipeline.from_pretrained(klein_folder(), torch_dtype=torch.bfloat16)
    latents = torch.randn(1, 128, 8, 8, generator=torch.Generator().manual_seed(1))
    mean = pipe.vae.bn.running_mean.view(1, -1, 1, 1).float()
    deviation = (pipe.vae.bn.running_var.view(1, -1, 1, 1).float() + pipe.vae.config.batch_norm_eps).sqrt()
    theirs = pipe.vae.decode(pipe._unpatchify_latents(latents * deviation + mean).bfloat16()).sample
    with torch.no_grad():
        assert torch.equal(parts.decode(latents), (theirs.detach().float() / 2 + 0.5).clamp(0, 1))


def test_training_resumes_bit_for_bit_and_exports_a_whole_model(cache, tmp_path):
    config = replace(build_recipe("flux_views_tiny"), task_config=_config(cache), **SMALL, checkpoint_every=2)
    train(config, tmp_path / "whole", device="cpu")
    train(config, tmp_path / "halves", device="cpu")
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "step_0000004")
    train(config, tmp_path / "halves", device="cpu")
    folders = []
    for name in ("whole", "halves"):
        export(tmp_path / name, tmp_path / f"{name}-model", device="cpu")
        folders.append(tmp_path / f"{name}-model")
    first, second = ((f / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() for f in folders)
    assert first == second
    card = read_card(folders[0])
    verify_files(folders[0], card)
    assert (card.panel_size, card.background, card.max_sequence_length) == (64, (1.0, 0.0, 1.0), 24)
    assert card.provenance["step"] == 4
    readme = (folders[0] / "README.md").read_text()
    assert "64 px a view" in readme and "weights of our own" in readme and "only the words" not in readme
    texts = {file.name: file.read_text() for file in folders[0].rglob("*.json")}
    assert "config.json" in texts and not any(
        place in text for text in texts.values() for place in (str(tmp_path), str(klein_folder()))
    )


def test_the_loss_is_that_of_the_velocity_from_the_sheet_to_the_noise(cache, monkeypatch):
    task = FluxViewsTask(_config(cache))
    task.data = SheetData([cache])
    task.parts = FrozenParts(klein_folder(), torch.device("cpu"))
    batch = task.collate([task.sample(index, index) for index in range(6)])
    level = batch["level"].view(-1, 1, 1, 1)
    found = {}

    def answers(sign):
        def velocity(model, noisy, levels, words, references, groups):
            found["noisy"] = noisy
            return sign * (batch["noise"] - batch["target"])

        return velocity

    monkeypatch.setattr(flux_views, "grouped_velocity", answers(1.0))
    assert float(task.loss(None, batch, 0)[0]) == 0
    torch.testing.assert_close(found["noisy"], (1 - level) * batch["target"] + level * batch["noise"])
    monkeypatch.setattr(flux_views, "grouped_velocity", answers(-1.0))
    wrong = float(task.loss(None, batch, 0)[0])
    assert wrong == pytest.approx(float(4 * (batch["noise"] - batch["target"]).square().mean()), rel=1e-4)


def test_noise_levels_are_logit_normal_and_shifted_once(cache):
    """The logit of s t / (1 + (s - 1) t) is that of t plus ln s."""
    task = FluxViewsTask(_config(cache, shift=4.0, logit_mean=0.5, logit_std=1.5))
    task.data = SheetData([cache])
    levels = torch.tensor([task.sample(seed % 7, seed)["level"] for seed in range(2000)], dtype=torch.float64)
    logits = torch.logit(levels)
    assert float(logits.mean()) == pytest.approx(0.5 + np.log(4.0), abs=0.12)
    assert float(logits.std()) == pytest.approx(1.5, abs=0.1)
    assert float(((logits - logits.mean()) ** 3).mean() / logits.std() ** 3) == pytest.approx(0, abs=0.2), "no skew"


def test_text_and_pictures_drop_out_as_often_as_asked(cache):
    task = FluxViewsTask(_config(cache, drop_text=0.3, drop_references=0.4))
    task.data = SheetData([cache])
    facing = [index for index, said in enumerate(task.data.said) if said["faces_front"]]
    drawn = [task.sample(facing[seed % len(facing)], seed) for seed in range(1500)]
    prompts = [one["prompt"] for one in drawn]
    assert np.mean([prompt == "" for prompt in prompts]) == pytest.approx(0.15, abs=0.03)
    assert np.mean([prompt.startswith(". given: ") for prompt in prompts]) == pytest.approx(0.15, abs=0.03)
    assert np.mean([len(one["references"]) == 0 for one in drawn]) == pytest.approx(0.4, abs=0.04)
    for one in drawn:
        assert one["prompt"].endswith("nothing.") == (len(one["references"]) == 0) or not one["prompt"]


def test_the_exported_model_draws_what_training_showed(cache, tmp_path):
    """The sampler of the sample sheets is that of the exported model: same noise, steps, shift and guidance."""
    from triptych.flux.backend import load_flux_views

    config = replace(build_recipe("flux_views_tiny"), task_config=_config(cache), **SMALL)
    train(config, tmp_path / "run", device="cpu")
    provenance = export(tmp_path / "run", tmp_path / "four steps", device="cpu")
    prompt = "a chair. given: nothing."
    run, _ = open_trained(tmp_path / "run", "last", "cpu")
    with evaluating(run) as network:
        torch.nn.init.normal_(network.proj_out.weight, std=0.2)  # four steps have hardly moved it from zero
        (tmp_path / "model").mkdir()
        run.task.export(network, tmp_path / "model", provenance)
        shown, other = (run.task.generate(network, [prompt], None, guidance)[0] for guidance in (2.0, 40.0))
        run.task.config = replace(run.task.config, shift=1.0)
        unshifted = run.task.generate(network, [prompt], None, 2.0)[0]
    sheet = load_flux_views(str(tmp_path / "model")).sheet(prompt, [], seed=0, steps=2, guidance=2.0)
    assert sheet.shape == (3, 128, 128) and float(sheet.min()) >= 0 and float(sheet.max()) <= 1
    away, by_guidance, by_shift = ((picture - shown).abs().mean() for picture in (sheet, other, unshifted))
    assert away < 0.005 < min(by_guidance, by_shift), "bfloat16 alone makes a difference"


def test_a_run_is_evaluated_by_the_protocol(cache, data_dir, tmp_path, capsys):
    config = replace(build_recipe("flux_views_tiny"), task_config=_config(cache), **SMALL)
    train(config, tmp_path / "run", device="cpu")
    capsys.readouterr()
    words = ["--objects", str(data_dir), "--count", "1", "--no-meshes", "--device", "cpu"]
    assert not trainer_main(["evaluate", str(tmp_path / "run"), *words, "--out", str(tmp_path / "report")])
    said = capsys.readouterr()
    assert "1 of 63 objects" in said.out and "| model, fitted |" in said.out and "seed 0" not in said.out
    assert "seed 0: psnr" in said.err and (tmp_path / "report" / "report.json").is_file()


def test_the_autoencoders_encoder_is_principal_components_and_its_decoder_learns(boxes_and_balls, tmp_path):
    from diffusers import AutoencoderKLFlux2

    from trainer.linear_codec import linear_encoder, patches_of, principal_components
    from trainer.tasks.flux_vae import component_pictures

    facts = FluxVaeConfig(
        data=(str(boxes_and_balls),), channels=(12, 48, 72, 72), crop=32, validation_objects=2, component_sheets=8
    )
    config = replace(build_recipe("flux_vae_tiny"), task_config=facts, **SMALL)
    train(config, tmp_path / "vae", device="cpu")
    export(tmp_path / "vae", tmp_path / "parts", device="cpu")
    vae = AutoencoderKLFlux2.from_pretrained(tmp_path / "parts", subfolder="vae", dtype=torch.float32)
    pixels = component_pictures(JoinedData([boxes_and_balls]), facts) * 2 - 1
    directions, squares = principal_components(pixels, facts.background, 32)
    assert torch.allclose(directions @ directions.T, torch.eye(32), atol=1e-5)
    assert (squares.diff() <= 0).all()
    key = torch.tensor(facts.background).view(1, 3, 1, 1) * 2 - 1
    expected = facts.scale * torch.einsum("lp,bphw->blhw", directions, patches_of(pixels[:2] - key))
    with torch.no_grad():
        latents = vae.encode(pixels[:2]).latent_dist.mode()
        as_matrix = linear_encoder(vae)
        assert as_matrix and (as_matrix(pixels[:2]) - latents).abs().max() < 0.01 * latents.abs().max()
        vae.encoder.down_blocks[0].resnets[0].conv2.weight.normal_()
        assert linear_encoder(vae) is None
    assert (latents - expected).abs().max() < 0.01 * expected.abs().max()  # its weights are bfloat16
    assert not torch.allclose(vae.bn.running_var, torch.ones(128))


def test_words_are_spread_so_that_their_differences_show():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 6, 16, generator=generator) * 30
    words = shared + torch.randn(200, 6, 16, generator=generator) * 0.05
    weight = torch.randn(8, 16, generator=generator)
    before, size = weight.clone(), (words @ weight.T).square().mean()
    spread_words(weight, words)

    def contrast(w: torch.Tensor) -> float:
        seen = words @ w.T
        return float((seen - seen.mean(0)).std() / seen.std())

    assert contrast(weight) > 20 * contrast(before)
    assert (words @ weight.T).square().mean() == pytest.approx(float(size), rel=1e-3)


def test_comparison_sees_what_is_wrong():
    key = (1.0, 0.0, 1.0)
    true = torch.tensor(key).view(1, 3, 1, 1).expand(1, 3, 64, 64).clone()
    for row, column in ((0, 0), (0, 32), (32, 0), (32, 32)):
        true[:, :, row + 8 : row + 24, column + 8 : column + 24] = 0.5
    psnr, overlap = compared(true, true, key)
    assert overlap == 1 and psnr == pytest.approx(60)
    moved = true.roll(4, dims=-1)
    assert compared(moved, true, key)[1] == pytest.approx(12 / 20)
    darker = torch.where(true == 0.5, 0.4, true)
    assert compared(darker, true, key)[0] == pytest.approx(20, abs=1e-3)
