"""Native keys: exact round trips, files that are whole or not there, and clear words for what cannot be exported."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from flux_tiny import klein_folder, klein_pipeline, klein_transformer, kontext_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from triptych.errors import TriptychError
from triptych.flux import native
from triptych.flux.keys import family_of, modules_of, piece_of, split_rows
from triptych.flux.native import export_native, from_native, to_native, vae_settings, vae_to_native


@cache
def transformer(family: str):
    return klein_transformer() if family == "flux2" else kontext_pipeline().transformer


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_round_trip_is_exact(family):
    state = transformer(family).state_dict()
    made = to_native(state)
    assert family_of(state) == family_of(made) == family
    assert sum(t.numel() for t in made.values()) == sum(t.numel() for t in state.values())
    for prefix in ("", "model.diffusion_model.", "diffusion_model."):
        back = from_native({prefix + key: tensor for key, tensor in made.items()})
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_what_the_names_do_not_show():
    state = transformer("flux1").state_dict()
    made = to_native(state)
    block = "single_transformer_blocks.0."
    rows = [state[f"{block}{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(made["single_blocks.0.linear1.weight"], torch.cat(rows))
    scale, shift = state["norm_out.linear.bias"].chunk(2)
    assert torch.equal(made["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale]))
    norm = state["transformer_blocks.0.attn.norm_added_k.weight"]
    assert torch.equal(made["double_blocks.0.txt_attn.norm.key_norm.scale"], norm)


def test_names_of_modules_both_ways():
    assert piece_of("transformer_blocks.12.attn.add_k_proj", "flux2") == native.Piece(
        "double_blocks.12.txt_attn.qkv", 1, 3
    )
    assert piece_of("single_transformer_blocks.3.attn.to_q", "flux2") is None
    assert modules_of("single_blocks.3.linear1", "flux2") == ("single_transformer_blocks.3.attn.to_qkv_mlp_proj",)
    assert modules_of("double_blocks.0.img_mlp.9", "flux1") == ()
    with pytest.raises(TriptychError, match="10 rows cannot hold 3 layers"):
        split_rows(torch.ones(10, 2), 3)


@pytest.mark.parametrize("shard", ["10GB", "200KB"])
def test_export_writes_one_file_of_the_wanted_precision(tmp_path, shard):
    model = transformer("flux2")
    model.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (shard == "200KB")
    wanted = to_native(model.state_dict())
    for name, kind in {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        None: torch.float32,
    }.items():
        target = export_native(tmp_path, tmp_path / "out" / "model.safetensors", dtype=name)
        found = load_file(target)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key].to(kind)) for key in wanted)
    with safe_open(str(target), framework="pt") as handle:
        assert handle.metadata() == {"format": "pt", "modelspec.architecture": "FLUX.2"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_export_says_what_is_wrong_and_leaves_nothing(tmp_path, monkeypatch):
    state = transformer("flux2").state_dict()
    folder, target = tmp_path / "model", tmp_path / "model.safetensors"
    folder.mkdir()
    weights = folder / "diffusion_pytorch_model.safetensors"

    def refused(message: str, tensors: dict[str, torch.Tensor] | None, **more) -> None:
        if tensors is not None:
            save_file(tensors, weights)
        with pytest.raises(TriptychError, match=message):
            export_native(folder, target, **more)
        assert not target.exists() and not list(tmp_path.glob(".*"))

    refused("has no diffusion_pytorch_model.safetensors", None)
    refused(
        r"\(1\) do not belong to a FLUX\.2 transformer: lora\.weight; export", state | {"lora.weight": torch.ones(1)}
    )
    part = "transformer_blocks.0.attn.to_k.weight"
    refused(
        r"a part of double_blocks\.0\.img_attn\.qkv\.weight is missing", {k: v for k, v in state.items() if k != part}
    )
    refused("stored as F32, I8: export the model before it is quantised", state | {part: state[part].to(torch.int8)})
    refused("no weights of a FLUX.1 or FLUX.2 transformer", {"conv.weight": torch.ones(1)})
    refused("unknown dtype 'fp8': choose bf16, fp16, fp32", state, dtype="fp8")
    weights.write_bytes(weights.read_bytes()[:-9])
    refused("are damaged", None)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../other.safetensors"}}))
    refused("names files of other folders", None)
    index.write_text("{}")
    refused("index.json is damaged", None)
    index.unlink()
    save_file(state, weights)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.os, "fsync", full)
    refused(r"cannot write .*No space left on device", None)


def test_a_file_of_strange_keys_is_not_read():
    state = to_native(transformer("flux2").state_dict())
    with pytest.raises(
        TriptychError, match=r"native FLUX\.2 transformer: double_blocks\.0\.img_attn\.qkv\.weight_scale"
    ):
        from_native(state | {"double_blocks.0.img_attn.qkv.weight_scale": torch.ones(1)})


def test_vae_keys_are_those_of_the_latent_diffusion_family():
    """Names of the published ae.safetensors and flux2-vae.safetensors; with a ComfyUI, what they do is compared."""
    state = klein_pipeline().vae.state_dict()
    made = vae_to_native(state)
    assert len(made) == len(state)
    assert made["encoder.mid.attn_1.proj_out.weight"].shape == (32, 32, 1, 1)
    assert torch.equal(made["decoder.up.3.block.0.conv1.weight"], state["decoder.up_blocks.0.resnets.0.conv1.weight"])
    assert torch.equal(
        made["encoder.down.2.downsample.conv.bias"], state["encoder.down_blocks.2.downsamplers.0.conv.bias"]
    )
    assert torch.equal(made["bn.running_mean"], state["bn.running_mean"])
    level = r"(down|up)\.[0-3]\.(block\.[01]|(down|up)sample\.conv)"
    part = rf"(conv_in|conv_out|norm_out|mid\.(block_[12]|attn_1)|{level})"
    layer = r"(\.(norm[12]?|conv[12]|nin_shortcut|[qkv]|proj_out))?"
    pattern = re.compile(rf"((en|de)coder\.{part}{layer}|(post_)?quant_conv|bn)\.\w+")
    assert [key for key in made if not pattern.fullmatch(key)] == []


def test_settings_of_a_small_vae():
    config = json.loads(Path(klein_folder("tiny"), "vae", "config.json").read_text())
    settings = vae_settings(config)
    assert settings["embed_dim"] == 32
    inner = settings["ddconfig"]
    assert (inner["ch"], inner["ch_mult"], inner["num_res_blocks"], inner["z_channels"]) == (32, [1, 2, 3, 3], 1, 32)
    assert inner["batch_norm_latent"] is True
    assert vae_settings(dict(kontext_pipeline().vae.config))["ddconfig"]["batch_norm_latent"] is False
    with pytest.raises(TriptychError, match=r"widths \[32, 48\] has no native form"):
        vae_settings(config | {"block_out_channels": [32, 48]})
