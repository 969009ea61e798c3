"""LoRA files: the same picture wherever they are loaded, every foreign form, and clear words for the wrong ones."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from flux_tiny import klein_pipeline, kontext_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from triptych.errors import TriptychError
from triptych.flux.keys import module_names, piece_of
from triptych.flux.lora import (
    DEFAULT_TARGETS,
    FAMILY,
    apply_lora,
    check_targets,
    merge_lora,
    not_mappable,
    read_lora,
    remove_loras,
    save_lora,
)

pytest.importorskip("peft")
RANK, ALPHA = 4, 10.0
ARCHITECTURES = ("flux2-klein", "flux1-kontext")


@cache
def trained(architecture: str):
    """A pipeline whose transformer has a random adapter with alpha != rank, as PEFT trains it; and its tensors."""
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = klein_pipeline() if architecture == "flux2-klein" else kontext_pipeline()
    torch.manual_seed(1)
    targets = DEFAULT_TARGETS[architecture]
    pipeline.transformer.add_adapter(
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
    )
    return pipeline, get_peft_model_state_dict(pipeline.transformer)


def saved(folder: Path, architecture: str = "flux2-klein", **more) -> Path:
    state = trained(architecture)[1]
    return save_lora(folder / "lora.safetensors", state, RANK, ALPHA, "a small model", architecture, **more)


def deltas(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def wanted_deltas(architecture: str) -> dict[str, torch.Tensor]:
    return {name: ALPHA / RANK * delta for name, delta in deltas(trained(architecture)[1]).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        torch.testing.assert_close(found[name], delta, atol=1e-5, rtol=1e-5)


def picture(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(2))
    return pipeline(
        prompt="a red chair", height=64, width=64, num_inference_steps=2, sigmas=[1.0, 0.5], guidance_scale=1.0,
        latents=noise, output_type="pt", max_sequence_length=32,
    ).images  # fmt: skip


# ------------------------------------------------------------------------------------------------------ our own files


def test_one_file_gives_one_picture_however_diffusers_loads_it(tmp_path):
    path = saved(tmp_path)
    plain, direct, applied, merged = (klein_pipeline() for _ in range(4))
    without, wanted = picture(plain), picture(trained("flux2-klein")[0])
    direct.load_lora_weights(str(path))
    apply_lora(applied, path)
    merge_lora(merged.transformer, path)
    for pipeline in (direct, applied, merged):
        torch.testing.assert_close(picture(pipeline), wanted, atol=1e-5, rtol=0)
    assert (without - wanted).abs().max() > 1e-3
    remove_loras(applied)
    assert torch.equal(picture(applied), without)
    apply_lora(applied, path, 0.25)
    apply_lora(applied.transformer, path, 0.5)  # beside the first
    merge_lora(plain.transformer, path, 0.75)
    both = picture(applied)
    torch.testing.assert_close(both, picture(plain), atol=1e-5, rtol=0)
    assert (both - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_has_the_form_that_both_loaders_read(tmp_path, architecture):
    path = saved(tmp_path, architecture, asked={"prompt_template": "{text}, four views"}, dtype=torch.bfloat16)
    state = load_file(path)
    assert all(re.fullmatch(r"transformer\..+\.lora_[AB]\.weight", key) for key in state)  # no .alpha
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    with safe_open(str(path), framework="pt") as handle:
        header = handle.metadata()
    assert "lora_adapter_metadata" not in header
    file = read_lora(path)
    assert (file.base, file.architecture, file.rank) == ("a small model", architecture, RANK)
    assert (file.family, file.asked) == (FAMILY[architecture], {"prompt_template": "{text}, four views"})
    assert set(file.targets) == set(wanted_deltas(architecture))


def test_what_is_saved_is_read_back(tmp_path):
    assert_same(deltas(read_lora(saved(tmp_path)).tensors), wanted_deltas("flux2-klein"))


def test_saving_refuses_what_would_not_load_everywhere(tmp_path):
    down, up = torch.ones(RANK, 128), torch.ones(128, RANK)

    def save(module: str, down=down, rank=RANK, alpha=1.0):
        state = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        save_lora(tmp_path / "x.safetensors", state, rank, alpha, "b", "flux2-klein")

    with pytest.raises(TriptychError, match=r"LoRA of single_stream_modulation\.linear is dropped by ComfyUI without"):
        save("single_stream_modulation.linear")
    with pytest.raises(TriptychError, match=r"FLUX\.2 transformer has no transformer_blocks\.0\.norm1\.linear"):
        save("transformer_blocks.0.norm1.linear")
    with pytest.raises(TriptychError, match=r"has rank 4, not 8"):
        save("x_embedder", rank=8)
    with pytest.raises(TriptychError, match=r"is not finite: the training has diverged"):
        save("x_embedder", down=down * torch.nan)
    with pytest.raises(TriptychError, match=r"rank 4 with alpha 0 is no LoRA"):
        save("x_embedder", alpha=0)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("architecture", FAMILY)
def test_default_targets_are_all_the_layers_of_the_blocks(architecture):
    family = FAMILY[architecture]
    wanted = {
        f"{kind}.7.{name}"
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for name in module_names(family, kind)
        if ".norm" not in f".{name}"
    }
    everything = wanted | {
        f"{kind}.7.{name}"
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for name in (*module_names(family, kind), "attn.to_out", "attn.to_out.1", "ff", "attn")
    }
    chosen = {name for name in everything if re.fullmatch(DEFAULT_TARGETS[architecture], name)}
    assert chosen == wanted
    check_targets(architecture, chosen)


def test_modules_without_a_name_in_comfyui_are_known():
    transformer = klein_pipeline().transformer
    layers = {name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    refused = {
        "double_stream_modulation_img.linear", "double_stream_modulation_txt.linear", "single_stream_modulation.linear",
        "time_guidance_embed.timestep_embedder.linear_1", "time_guidance_embed.timestep_embedder.linear_2",
    }  # fmt: skip
    assert layers & set(not_mappable("flux2-klein")) == refused
    check_targets("flux2-klein", layers - refused)
    assert not_mappable("flux1-dev") == ()
    with pytest.raises(TriptychError, match="unknown architecture 'flux3'"):
        not_mappable("flux3")
    with pytest.raises(TriptychError, match="its targets fit nothing in the model"):
        check_targets("flux2-klein", [])


# ------------------------------------------------------------------------------------------------------ foreign files


def native_pairs(architecture: str) -> tuple[dict[str, list[torch.Tensor]], dict[str, torch.Tensor]]:
    """A LoRA on native modules: name -> [A, B]; and the same change by diffusers module."""
    family, made, wanted = FAMILY[architecture], {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, delta in wanted_deltas(architecture).items():
        piece = piece_of(name, family)
        rows, columns = delta.shape
        if piece.native not in made:
            made[piece.native] = [torch.randn(RANK, columns, generator=generator), []]
        made[piece.native][1].append((piece.part, torch.randn(rows, RANK, generator=generator)))
        wanted[name] = made[piece.native][1][-1][1] @ made[piece.native][0]
    joined = {
        name: [down, torch.cat([rows for _, rows in sorted(ups, key=lambda pair: pair[0])])]
        for name, (down, ups) in made.items()
    }
    return joined, wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_native_forms(tmp_path, architecture):
    native, wanted = native_pairs(architecture)
    forms = {
        "diffusion_model.": lambda n: f"diffusion_model.{n}",
        "base_model.model.": lambda n: f"base_model.model.{n}",
        "kohya": lambda n: "lora_unet_" + n.replace(".", "_"),
    }
    for label, named in forms.items():
        ends = ("lora_down", "lora_up") if label == "kohya" else ("lora_A", "lora_B")
        state = {f"{named(n)}.{end}.weight": t for n, pair in native.items() for end, t in zip(ends, pair, strict=True)}
        if label == "kohya":
            state |= {f"{named(n)}.alpha": torch.tensor(ALPHA) for n in native}
        save_file(state, tmp_path / "foreign.safetensors")
        file = read_lora(tmp_path / "foreign.safetensors")
        scale = ALPHA / RANK if label == "kohya" else 1.0
        assert file.family == FAMILY[architecture]
        assert_same(deltas(file.tensors), {name: scale * delta for name, delta in wanted.items()})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_diffusers_forms_and_where_alpha_may_stand(tmp_path, architecture):
    state, wanted = trained(architecture)[1], wanted_deltas(architecture)
    path = tmp_path / "adapter_model.safetensors"

    save_file({f"transformer.{key}": tensor for key, tensor in state.items()}, path)
    assert_same(deltas(read_lora(path).tensors), deltas(state))

    header = {"transformer.r": RANK, "transformer.lora_alpha": ALPHA, "transformer.alpha_pattern": {}}
    with_header = {f"transformer.{key}": tensor for key, tensor in state.items()}
    save_file(with_header, path, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    assert_same(deltas(read_lora(path).tensors), wanted)

    save_file({f"base_model.model.{key}": tensor for key, tensor in state.items()}, path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    assert_same(deltas(read_lora(path).tensors), wanted)

    def flat(key: str) -> str:
        module, end = key.removesuffix(".weight").rsplit(".", 1)
        return f"lora_unet_{module.replace('.', '_')}.{'lora_down' if end == 'lora_A' else 'lora_up'}.weight"

    modules = {flat(key).split(".")[0] for key in state}
    save_file({flat(k): t for k, t in state.items()} | {f"{m}.alpha": torch.tensor(ALPHA) for m in modules}, path)
    assert_same(deltas(read_lora(path).tensors), wanted)


def test_ranks_that_differ_are_brought_to_one_without_changing_anything(tmp_path):
    generator = torch.Generator().manual_seed(4)
    state = {}
    for module, rank in {"transformer_blocks.0.attn.to_q": 2, "x_embedder": 5}.items():
        state[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, 128, generator=generator)
        state[f"transformer.{module}.lora_B.weight"] = torch.randn(128, rank, generator=generator)
    save_file(state, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert file.rank == 5 and {t.shape[0] for k, t in file.tensors.items() if "lora_A" in k} == {5}
    assert_same(deltas(file.tensors), {k.removeprefix("transformer."): d for k, d in deltas(state).items()})
    pipelines = klein_pipeline(), klein_pipeline()
    apply_lora(pipelines[0], file)
    merge_lora(pipelines[1].transformer, file)
    torch.testing.assert_close(picture(pipelines[0]), picture(pipelines[1]), atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------------- wrong files


def pair(module: str, inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": torch.ones(1, inputs), f"{module}.lora_B.weight": torch.ones(outputs, 1)}


def test_keys_that_mean_nothing_are_an_error(tmp_path):
    path = tmp_path / "x.safetensors"

    def reading(state: dict[str, torch.Tensor], message: str) -> None:
        save_file(state, path)
        with pytest.raises(TriptychError, match=message):
            read_lora(path)

    good = pair("transformer.x_embedder", 8, 8)
    reading(
        good | {"b.diff": torch.ones(1), "a.diff_b": torch.ones(1)},
        r"keys without meaning .*\(2: a\.diff_b, b\.diff\): nothing was loaded",
    )
    reading(good | pair("unet.down_blocks.0.proj", 8, 8), r"\(1: unet\.down_blocks\.0\.proj\)")
    reading(
        good | pair("transformer.transformer_blocks.0.attn.to_kv", 8, 8), r"\(1: transformer_blocks\.0\.attn\.to_kv\)"
    )
    reading(
        {"lora_te1_text_model.lora_down.weight": torch.ones(1, 2), "lora_te1_q.alphas": torch.ones(1)}, "text encoder"
    )
    reading({"lora_unet_single_blocks_0_linear1.lokr_w1": torch.ones(2, 2)}, "is a LoKr adapter")
    reading(good | {"transformer.x_embedder.lora_magnitude_vector": torch.ones(2)}, "is a DoRA adapter")
    reading({"x_embedder.lora_A.weight": torch.ones(1, 2)}, "two matrices of x_embedder do not fit each other")
    reading(good | {"transformer.proj_out.alpha": torch.ones(())}, r"\(1: transformer\.proj_out\.alpha\)")
    reading(good | {"transformer.x_embedder.alpha": torch.ones(2)}, r"\(1: transformer\.x_embedder\.alpha\)")
    reading(good | pair("diffusion_model.img_in", 8, 8), "changes x_embedder twice, under different names")
    reading(
        pair("transformer.x_embedder", 8, 8) | {"transformer.x_embedder.lora_B.weight": torch.full((8, 1), torch.nan)},
        r"not finite, in x_embedder\.lora_B",
    )
    save_file(good, path, metadata={"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"(": 1}})})
    with pytest.raises(TriptychError, match=r"the configuration of x\.safetensors is damaged"):
        read_lora(path)
    mixed = pair("transformer_blocks.0.norm1.linear", 8, 8) | pair("transformer_blocks.0.ff.linear_in", 8, 8)
    reading(mixed, "mixes layers of FLUX.1 and FLUX.2")
    path.write_bytes(b"no tensors")
    with pytest.raises(TriptychError, match="no whole safetensors file"):
        read_lora(path)


def test_a_lora_for_another_model_names_both(tmp_path):
    path = tmp_path / "other.safetensors"
    pipeline = klein_pipeline()
    before = {key: tensor.clone() for key, tensor in pipeline.transformer.state_dict().items()}
    loaded = r"the loaded model is a FLUX\.2 model \(128 wide, 2 blocks\)"

    def both_named(state: dict[str, torch.Tensor], made_for: str, header: dict[str, str] | None = None) -> None:
        save_file(state, path, metadata=header)
        for use in (apply_lora, lambda target, file: merge_lora(target.transformer, file)):
            with pytest.raises(TriptychError, match=rf"other\.safetensors was made for {made_for}; {loaded}"):
                use(pipeline, path)

    to_q = "transformer.transformer_blocks.{}.attn.to_q"
    last = "transformer.single_transformer_blocks.{}.{}"
    dev = pair(to_q.format(18), 3072, 3072) | pair(last.format(37, "proj_mlp"), 3072, 12288)
    both_named(dev, r"FLUX\.1 \(3072 wide, 57 blocks\)")
    both_named(dev, r"FLUX\.1-dev \(3072 wide, 57 blocks\)", {"ss_base_model_version": "FLUX.1-dev"})
    klein = pair(to_q.format(7), 4096, 4096) | pair(last.format(23, "attn.to_qkv_mlp_proj"), 4096, 36864)
    both_named(klein, r"FLUX\.2-klein-9B \(4096 wide, 32 blocks\)")
    both_named(pair(to_q.format(0), 256, 256), r"a Flux model \(256 wide, 1 blocks\)")
    both_named(pair(to_q.format(1), 128, 128), r"a Flux model \(128 wide, 2 blocks\)")  # a block that is not there
    after = pipeline.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
