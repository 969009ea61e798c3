"""A small FLUX.2 klein in diffusers layout as ComfyUI's own MODEL, CLIP and VAE.

ComfyUI's loaders read the sizes of published models from tables: they assume the VAE's widths, and tell text encoders
by their width. So a small model is built here, from ComfyUI's own classes, with the sizes of its config files. What
comes out works with every sampler, LoRA loader and patch, and gives the pictures that diffusers gives.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..triptych.errors import TriptychError

if TYPE_CHECKING:
    from torch import Tensor

    from ..triptych.flux.card import ViewsCard
    from ..triptych.models.proportions import Proportions

CARD_ATTRIBUTE = "triptych_card"  # on the VAE: how the model wants to be asked
PROPORTIONS_ATTRIBUTE = "triptych_proportions"  # on the VAE: the network that tells depths, if the model has it
HEAD = 128  # channels of an attention head, which ComfyUI fixes for FLUX.2 and for Qwen3
TEXT_TOKENS = 512  # ComfyUI puts zeros before a shorter text, which diffusers does not
LAYERS = [9, 18, 27]  # of the text encoder, whose states klein reads
FLOAT32_BYTES = 1e9  # networks below that are kept in float32: rounding shows in small ones, and costs nothing


def load_small_klein(folder: Path) -> tuple[Any, Any, Any]:
    """(ModelPatcher, CLIP, VAE) of a folder in diffusers layout; the VAE carries the card, see `card_of`.

    Files are checked against the card's hashes. Raises TriptychError for other architectures and too old a ComfyUI.
    """
    from ..triptych.flux.card import default_card, read_card, verify_files
    from ..triptych.models.proportions import read_proportions

    index = _config(folder / "model_index.json")
    if index.get("_class_name") != "Flux2KleinPipeline":
        raise TriptychError(
            f"{folder} holds a {index.get('_class_name')}, not a FLUX.2 klein: load it with ComfyUI's own loaders"
        )
    card = default_card("flux2-klein", distilled=bool(index.get("is_distilled")))
    if (folder / "views.json").is_file():
        card = read_card(folder)
        verify_files(folder, card)
    if card.max_sequence_length < TEXT_TOKENS:
        raise TriptychError(
            f"{card.name} reads {card.max_sequence_length} tokens of text, and ComfyUI fills FLUX.2's text up to "
            f"{TEXT_TOKENS}, which would change its pictures: use Load Flux views model and Flux views instead"
        )
    vae = load_vae(folder / "vae")
    setattr(vae, CARD_ATTRIBUTE, card)
    setattr(vae, PROPORTIONS_ATTRIBUTE, read_proportions(folder, card.files))
    return load_model(folder), load_clip(folder, card.max_sequence_length), vae


def card_of(vae: Any) -> ViewsCard:
    """The card of the model that a VAE belongs to: its own, else the default one, by its latent channels."""
    from ..triptych.flux.card import default_card

    own = getattr(vae, CARD_ATTRIBUTE, None)
    if own is not None:
        return own
    architecture = {128: "flux2-klein", 16: "flux1-kontext"}.get(vae.latent_channels)
    if architecture is None:
        raise TriptychError(
            f"the VAE has {vae.latent_channels} latent channels, Flux has 128 (FLUX.2) or 16 (FLUX.1): load the VAE "
            "that belongs to the Flux model"
        )
    return default_card(architecture)


def proportions_of(vae: Any) -> Proportions | None:
    """What tells depths, of the model that a VAE belongs to; None where it has nothing of the kind."""
    return getattr(vae, PROPORTIONS_ATTRIBUTE, None)


def load_model(folder: Path) -> Any:
    """The transformer as a ModelPatcher."""
    import comfy.sd
    from comfy import model_detection

    from ..triptych.flux.native import to_native, weight_files

    native = to_native(_weights(weight_files(folder)))
    found = model_detection.detect_unet_config(native, "") or {}
    width = native["img_in.weight"].shape[0]
    if found.get("image_model") != "flux2" or found.get("num_heads", 0) * HEAD != width:
        raise TriptychError("this ComfyUI is too old for FLUX.2 klein: update it to 0.9.2 or newer")
    dtype = _dtype(native)
    return comfy.sd.load_diffusion_model_state_dict(native, model_options={"dtype": dtype} if dtype else {})


def load_vae(folder: Path) -> Any:
    """The AutoencoderKLFlux2 as a VAE: 128 latent channels at a sixteenth of the picture's size."""
    import comfy.sd

    from ..triptych.flux.native import vae_settings, vae_to_native

    config = _config(folder / "config.json")
    native = vae_to_native(_weights([folder / "diffusion_pytorch_model.safetensors"]))
    vae = comfy.sd.VAE(sd=native, config={"params": vae_settings(config)}, dtype=_dtype(native))
    vae.downscale_ratio = vae.upscale_ratio = 2 ** len(config["block_out_channels"])
    vae.latent_channels = 4 * config["latent_channels"]
    _all_there(vae.first_stage_model, native, folder)
    return vae


def load_clip(folder: Path, length: int) -> Any:
    """The Qwen3 text encoder as a CLIP that makes embeddings of ``length`` tokens."""
    import comfy.sd
    import torch
    from comfy.supported_models_base import ClipTarget

    weights = _weights([folder / "text_encoder" / "model.safetensors"])
    state = {key: tensor for key, tensor in weights.items() if key.startswith("model.")}
    tokenizer = KleinTokenizer(folder / "tokenizer", length)
    encoder = _encoder(_qwen_settings(_config(folder / "text_encoder" / "config.json")), tokenizer.padding)
    target = ClipTarget(lambda **_: tokenizer, encoder)
    known = inspect.signature(comfy.sd.CLIP.__init__).parameters
    late = {"state_dict": [state]} if "state_dict" in known else {}
    dtype = _dtype(state) or torch.bfloat16
    size = sum(tensor.numel() for tensor in state.values())
    clip = comfy.sd.CLIP(target, parameters=size, model_options={"dtype": dtype}, **late)
    if not late:
        clip.load_sd(state)
    _all_there(clip.cond_stage_model.qwen3_4b.transformer, state, folder / "text_encoder")
    return clip


class KleinTokenizer:
    """The folder's own tokenizer and chat template in the form that ComfyUI's CLIP asks: as diffusers does it, with a
    fixed number of tokens. Weights in brackets are text like any other, as with ComfyUI's own klein."""

    def __init__(self, folder: Path, length: int) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        self.length, self.padding = length, self.tokenizer.pad_token_id

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        said = [{"role": "user", "content": text}]
        asked = self.tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        ids = self.tokenizer(asked, padding="max_length", truncation=True, max_length=self.length)["input_ids"]
        return {"qwen3_4b": [[(token, 1.0, 0) if return_word_ids else (token, 1.0) for token in ids]]}

    def untokenize(self, pairs: list) -> list:
        return [(pair, self.tokenizer.convert_ids_to_tokens(pair[0])) for pair in pairs]

    def state_dict(self) -> dict:
        return {}


def _encoder(settings: dict[str, Any], padding: int) -> type:
    """ComfyUI's text encoder class for a Qwen3 of these sizes; padding: the token that ends the text."""
    import torch
    from comfy import sd1_clip
    from comfy.text_encoders.llama import Qwen3_4B

    class Encoder(sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device,
                layer=LAYERS,
                textmodel_json_config=dict(settings),
                dtype=dtype,
                special_tokens={"pad": padding},
                layer_norm_hidden_state=False,
                model_class=Qwen3_4B,
                enable_attention_masks=True,
                return_attention_masks=True,
                model_options=model_options or {},
            )

    class Klein(sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(
                device=device, dtype=dtype, name="qwen3_4b", clip_model=Encoder, model_options=model_options or {}
            )

        def encode_token_weights(self, token_weight_pairs):
            states_BLTC, pooled, extra = super().encode_token_weights(token_weight_pairs)
            return torch.movedim(states_BLTC, 1, 2).flatten(2), pooled, extra

    return Klein


def _qwen_settings(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of Qwen3 -> the fields of ComfyUI's Qwen3_4BConfig.

    Raises TriptychError for heads of another size than ComfyUI's.
    """
    if config.get("model_type") != "qwen3" or config.get("head_dim") != HEAD:
        raise TriptychError(
            f"the text encoder is a {config.get('model_type')} with heads of {config.get('head_dim')} channels, "
            f"ComfyUI runs Qwen3 with {HEAD}: load the model with Load Flux views model instead"
        )
    rope = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 1e6)
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    return {name: config[name] for name in names} | {"rope_theta": rope}


def _config(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TriptychError(
            f"{path} cannot be read ({error}): choose a model that diffusers saved, or fetch it again"
        ) from error
    if not isinstance(data, dict):
        raise TriptychError(f"{path} is damaged: fetch the model again")
    return data


def _weights(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {key: tensor for file in files for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise TriptychError(f"{files[0].parent} has no whole weights ({error}): fetch the model again") from error


def _dtype(state: dict[str, Tensor]) -> Any:
    """float32 for small networks; None leaves it to ComfyUI."""
    import torch

    return torch.float32 if sum(4 * tensor.numel() for tensor in state.values()) < FLOAT32_BYTES else None


def _all_there(network: Any, state: dict[str, Tensor], folder: Path) -> None:
    """ComfyUI only logs what a file lacks."""
    missing = sorted(
        key for key in network.state_dict() if key not in state and not key.endswith("num_batches_tracked")
    )
    if missing:
        raise TriptychError(f"the weights in {folder} lack {', '.join(missing[:3])}: fetch the model again")
