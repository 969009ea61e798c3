"""A folder of the published TRELLIS layout: its file names, classes and dtypes, random weights, a small size.

What the stages exchange fits as in the published set (8 latent channels, a structure latent of a quarter of the grid),
so the two-stage pipeline runs on it.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from triptych.bundles.components import build_component

COND_CHANNELS = 24
_ATTENTION = dict(num_heads=2, mlp_ratio=2, pe_mode="ape", use_fp16=True)
_SWIN = _ATTENTION | dict(
    resolution=16, model_channels=64, latent_channels=8, num_blocks=2, attn_mode="swin", window_size=8
)
_GAUSSIANS = {
    "lr": {"_xyz": 1.0, "_features_dc": 1.0, "_opacity": 1.0, "_scaling": 1.0, "_rotation": 0.1},
    "perturb_offset": True, "voxel_size": 1.5, "num_gaussians": 4, "2d_filter_kernel_size": 0.1,
    "3d_filter_kernel_size": 9e-4, "scaling_bias": 4e-3, "opacity_bias": 0.1, "scaling_activation": "softplus",
}  # fmt: skip
_VAE = dict(latent_channels=8, num_res_blocks=1, num_res_blocks_middle=1, use_fp16=True)
_FLOW = _ATTENTION | dict(
    in_channels=8, out_channels=8, model_channels=32, cond_channels=COND_CHANNELS, num_blocks=2, qk_rms_norm=True
)

# Component -> (key in pipeline.json or None, file stem, class, constructor arguments).
SMALL: dict[str, tuple[str | None, str, str, dict[str, Any]]] = {
    "structure_decoder": (
        "sparse_structure_decoder", "ss_dec_conv3d_16l8_fp16", "SparseStructureDecoder",
        _VAE | dict(out_channels=1, channels=[16, 8, 8]),
    ),
    "structure_flow": (
        "sparse_structure_flow_model", "ss_flow_img_dit_L_16l8_fp16", "SparseStructureFlowModel",
        _FLOW | dict(resolution=4, patch_size=1),
    ),
    "slat_flow": (
        "slat_flow_model", "slat_flow_img_dit_L_64l8p2_fp16", "SLatFlowModel",
        _FLOW | dict(resolution=16, patch_size=2, num_io_res_blocks=2, io_block_channels=[16]),
    ),
    "slat_decoder_mesh": (
        "slat_decoder_mesh", "slat_dec_mesh_swin8_B_64l8m256c_fp16", "SLatMeshDecoder",
        _SWIN | dict(model_channels=256, mlp_ratio=0.25, representation_config={"use_color": True}),
    ),
    "slat_decoder_gs": (
        "slat_decoder_gs", "slat_dec_gs_swin8_B_64l8gs32_fp16", "SLatGaussianDecoder",
        _SWIN | dict(representation_config=_GAUSSIANS),
    ),
    "slat_decoder_rf": (
        "slat_decoder_rf", "slat_dec_rf_swin8_B_64l8r16_fp16", "SLatRadianceFieldDecoder",
        _SWIN | dict(representation_config={"rank": 4, "dim": 2}),
    ),
    "structure_encoder": (
        None, "ss_enc_conv3d_16l8_fp16", "SparseStructureEncoder", _VAE | dict(in_channels=1, channels=[8, 8, 16]),
    ),
    "slat_encoder": (None, "slat_enc_swin8_B_64l8_fp16", "SLatEncoder", _SWIN | dict(in_channels=COND_CHANNELS)),
}  # fmt: skip

MEAN = [-2.17, -0.004, -0.13, -0.08, -0.53, 0.72, -1.14, 1.2]
STD = [2.38, 2.39, 2.12, 2.17, 2.66, 2.37, 2.62, 2.68]


def pipeline_json(steps: int = 3) -> dict[str, Any]:
    sampler = {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {"steps": steps, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
    }
    models = {key: f"ckpts/{stem}" for key, stem, _, _ in SMALL.values() if key is not None}
    return {
        "name": "TrellisImageTo3DPipeline",
        "args": {
            "models": models,
            "sparse_structure_sampler": sampler,
            "slat_sampler": sampler,
            "slat_normalization": {"mean": MEAN, "std": STD},
            "image_cond_model": "dinov2_vitl14_reg",
        },
    }


def small_network(component: str, seed: int = 0) -> nn.Module:
    """The network as it is saved: float16 torso, every tensor random, also those that start at zero."""
    _, _, class_name, config = SMALL[component]
    network = build_component(class_name, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.dim() > 1 else 0.1
            gain = parameter.dim() == 1 and name.endswith(("weight", "gamma"))
            parameter.copy_(noise * scale + gain)
    return network.eval().requires_grad_(False)


def write_published_folder(folder: Path, steps: int = 3, components: tuple[str, ...] = tuple(SMALL)) -> Path:
    """Writes the folder (about 5 MB) and returns it. The structure decoder calls about half of the grid solid."""
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    for seed, component in enumerate(components):
        _, stem, class_name, config = SMALL[component]
        state = {key: value.contiguous() for key, value in small_network(component, seed).state_dict().items()}
        save_file(state, folder / "ckpts" / f"{stem}.safetensors")
        entry = json.dumps({"name": class_name, "args": config})
        (folder / "ckpts" / f"{stem}.json").write_text(entry, encoding="utf-8")
    (folder / "pipeline.json").write_text(json.dumps(pipeline_json(steps), indent=4), encoding="utf-8")
    return folder


def write_runnable_folder(folder: Path) -> Path:
    """The small folder, whose structure decoder's bias leaves about a twentieth of the 16^3 voxels."""
    write_published_folder(folder)
    file = folder / "ckpts" / f"{SMALL['structure_decoder'][1]}.safetensors"
    state = load_file(file)
    decoder = small_network("structure_decoder", list(SMALL).index("structure_decoder"))
    latent = torch.randn(1, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    decoder.convert_to(torch.float32)
    state["out_layer.2.bias"] -= decoder(latent).quantile(0.95).to(state["out_layer.2.bias"])
    save_file(state, file)
    return folder


def write_image_encoder(folder: Path) -> Path:
    """A DINOv2 of one layer as transformers saves it, random, as wide as the small flows' conditions."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=COND_CHANNELS, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, image_size=56,
        patch_size=14, num_register_tokens=4,
    )  # fmt: skip
    torch.manual_seed(0)
    Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


def name_image_encoder(folder: Path, encoder: Path) -> None:
    """Has the folder's pipeline.json name an image encoder that lies on this machine."""
    data = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    data["args"]["image_cond_model"] = str(encoder)
    (folder / "pipeline.json").write_text(json.dumps(data), encoding="utf-8")
