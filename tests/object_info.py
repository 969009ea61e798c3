"""Node classes as a server describes them at /object_info, made from the pack's schemas without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_comfy

# The classes of ComfyUI itself that workflows/ uses, as far as conversion and checks need them.
CORE = {
    "LoadImage": {
        "input": {"required": {"image": [["example.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
        "display_name": "Load Image",
    },
    "SaveImage": {
        "input": {
            "required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "ComfyUI"}]},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        },
        "output": [],
        "display_name": "Save Image",
        "output_node": True,
    },
    "UNETLoader": {
        "input": {"required": {
            "unet_name": [["flux-2-klein-base-4b.safetensors"], {}], "weight_dtype": [["default", "fp8_e4m3fn"], {}],
        }},
        "output": ["MODEL"],
        "display_name": "Load Diffusion Model",
    },
    "CLIPLoader": {
        "input": {
            "required": {"clip_name": [["qwen_3_4b.safetensors"], {}], "type": [["stable_diffusion", "flux2"], {}]},
            "optional": {"device": [["default", "cpu"], {}]},
        },
        "output": ["CLIP"],
        "display_name": "Load CLIP",
    },
    "VAELoader": {
        "input": {"required": {"vae_name": [["flux2-vae.safetensors"], {}]}},
        "output": ["VAE"],
        "display_name": "Load VAE",
    },
    "LoraLoaderModelOnly": {
        "input": {"required": {
            "model": ["MODEL", {}], "lora_name": [["triptych_klein_views.safetensors"], {}],
            "strength_model": ["FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0}],
        }},
        "output": ["MODEL"],
        "display_name": "Load LoRA",
    },
    "RandomNoise": {
        "input": {"required": {
            "noise_seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}],
        }},
        "output": ["NOISE"],
        "display_name": "RandomNoise",
    },
    "KSamplerSelect": {
        "input": {"required": {"sampler_name": [["euler", "heun"], {}]}},
        "output": ["SAMPLER"],
        "display_name": "KSamplerSelect",
    },
    "CFGGuider": {
        "input": {"required": {
            "model": ["MODEL", {}], "positive": ["CONDITIONING", {}], "negative": ["CONDITIONING", {}],
            "cfg": ["FLOAT", {"default": 8.0, "min": 0.0, "max": 100.0}],
        }},
        "output": ["GUIDER"],
        "display_name": "CFGGuider",
    },
    "SamplerCustomAdvanced": {
        "input": {"required": {
            "noise": ["NOISE", {}], "guider": ["GUIDER", {}], "sampler": ["SAMPLER", {}], "sigmas": ["SIGMAS", {}],
            "latent_image": ["LATENT", {}],
        }},
        "output": ["LATENT", "LATENT"],
        "output_name": ["output", "denoised_output"],
        "display_name": "SamplerCustomAdvanced",
    },
    "VAEDecode": {
        "input": {"required": {"samples": ["LATENT", {}], "vae": ["VAE", {}]}},
        "output": ["IMAGE"],
        "display_name": "VAE Decode",
    },
}  # fmt: skip
_OPTIONS = ("default", "min", "max", "options", "control_after_generate")


def object_info(base: Path) -> dict[str, dict[str, Any]]:
    """Class -> description, of the pack and of ``CORE``; ComfyUI's folders are made under ``base``."""
    with fake_comfy.pack(base) as pack:
        import importlib

        nodes = importlib.import_module(f"{pack.__name__}.nodes")
        described = [_described(node.define_schema()) for node in nodes.NODES]
    return CORE | {one["name"]: one for one in described}


def _described(schema: fake_comfy.Schema) -> dict[str, Any]:
    inputs: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for item in schema.inputs or ():
        options = {key: value for key in _OPTIONS if (value := getattr(item, key, None)) is not None}
        inputs["optional" if item.optional else "required"][item.id] = [item.io_type, options]
    return {
        "input": inputs,
        "input_order": {section: list(items) for section, items in inputs.items()},
        "output": [item.io_type for item in schema.outputs or ()],
        "output_name": [item.display_name or item.id for item in schema.outputs or ()],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "output_node": schema.is_output_node,
    }
