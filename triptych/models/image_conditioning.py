"""What the published flows see of a picture: all tokens of a DINO vision transformer, before its final norm.

The published conditioning is DINOv2 ViT-L/14 with registers at 518 px: the tokens before the final norm, then a layer
norm without parameters. 37 x 37 patches, four registers and the class token make 1374 tokens of 1024 channels.
TRELLIS.2 treats DINOv3 alike. The networks come from transformers (an optional extra, >= 4.56), whose weights are the
published ones under other names; its image processors are not used, because they need torchvision.

Weights are read from a local folder (config.json, model.safetensors) or a Hugging Face repository; nothing is ever
unpickled, and only the three network classes below are built. DINOv3's repositories are gated: its licence has to be
accepted there once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from ..bundles.access import how_to_enter, refusal
from ..errors import TriptychError

# ImageNet's, of sRGB values 0-1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class EncoderInfo:
    """A published image encoder. parameters: how many. image_size: pixels, what it is used with here. gated: its
    licence must be accepted before it can be fetched."""

    repository: str
    parameters: int
    channels: int
    patch_size: int
    image_size: int
    gated: bool = False

    @property
    def tokens(self) -> int:
        """Of a picture of image_size: class token, four registers, patches."""
        return 5 + (self.image_size // self.patch_size) ** 2


def _dinov2(size: str, parameters: int, channels: int) -> EncoderInfo:
    return EncoderInfo(f"facebook/dinov2-with-registers-{size}", parameters, channels, 14, 518)


def _dinov3(size: str, parameters: int, channels: int) -> EncoderInfo:
    return EncoderInfo(f"facebook/dinov3-{size}-pretrain-lvd1689m", parameters, channels, 16, 512, gated=True)


# By the names of torch.hub, which pipeline.json uses.
ENCODERS = {
    "dinov2_vits14_reg": _dinov2("small", 22_058_112, 384),
    "dinov2_vitb14_reg": _dinov2("base", 86_583_552, 768),
    "dinov2_vitl14_reg": _dinov2("large", 304_372_736, 1024),
    "dinov2_vitg14_reg": _dinov2("giant", 1_136_486_912, 1536),
    "dinov3_vits16": _dinov3("vits16", 21_596_544, 384),
    "dinov3_vitb16": _dinov3("vitb16", 85_660_416, 768),
    "dinov3_vitl16": _dinov3("vitl16", 303_129_600, 1024),
    "dinov3_vith16plus": _dinov3("vith16plus", 840_592_640, 1280),
}

# transformers' model type -> its class and the name of the final norm in it.
_CLASSES = {
    "dinov2": ("Dinov2Model", "layernorm"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "layernorm"),
    "dinov3_vit": ("DINOv3ViTModel", "norm"),
}


class ImageEncoder(nn.Module):
    """Pictures -> tokens. vit: one of transformers' DINO networks, whose final norm is taken away for good."""

    mean: Tensor
    std: Tensor

    def __init__(self, vit: nn.Module, name: str = "") -> None:
        super().__init__()
        config = cast(Any, vit.config)
        if config.model_type not in _CLASSES:
            raise TriptychError(f"{name or 'the image encoder'} is a {config.model_type!r}: {_only_known()}")
        self.name = name or config.model_type
        self.channels = int(config.hidden_size)
        self.patch_size = int(config.patch_size)
        self.prefix_tokens = 1 + int(getattr(config, "num_register_tokens", 0))
        setattr(vit, _CLASSES[config.model_type][1], nn.Identity())
        self.vit = vit
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def token_count(self, size: int) -> int:
        """Tokens of a picture of that many pixels a side."""
        return self.prefix_tokens + (size // self.patch_size) ** 2

    def forward(self, pictures: Tensor) -> Tensor:
        """(V, 3, S, S) sRGB 0-1 -> (V, tokens, channels) float32: class token, registers, patches row by row.

        The network runs in the dtype of its weights, as published float32. Raises TriptychError unless S is a multiple
        of the patch size.
        """
        if pictures.dim() != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
            raise TriptychError(
                f"pictures must be (V, 3, S, S), not {tuple(pictures.shape)}: cut and resize them first"
            )
        if not pictures.shape[-1] or pictures.shape[-1] % self.patch_size:
            side, patch = pictures.shape[-1], self.patch_size
            raise TriptychError(
                f"pictures of {side} pixels do not divide into patches of {patch} ({self.name}): "
                f"use {max(1, round(side / patch)) * patch}"
            )
        weight = next(self.vit.parameters())
        pixels = ((pictures.to(weight.device, torch.float32) - self.mean) / self.std).type(weight.dtype)
        tokens = self.vit(pixel_values=pixels).last_hidden_state.float()
        return F.layer_norm(tokens, tokens.shape[-1:])


def encoder_info(name: str) -> EncoderInfo | None:
    """What is known of an encoder by its torch.hub name or its repository; None for others."""
    by_repository = {info.repository: info for info in ENCODERS.values()}
    return ENCODERS.get(name) or by_repository.get(name)


def load_image_encoder(source: str | Path = "dinov2_vitl14_reg", *, local_files_only: bool = False) -> ImageEncoder:
    """An image encoder on the CPU, float32, in eval mode, without gradients.

    source: a name of ENCODERS, a local folder, or a Hugging Face id ``owner/name`` (``@revision`` picks a commit,
    tag or branch). local_files_only: take only what an earlier download left here.
    Raises TriptychError when transformers is absent, the weights are not to be had, or are not of such a network.
    """
    transformers = _transformers()
    info = encoder_info(str(source))
    is_folder = info is None and Path(source).is_dir()
    place = info.repository if info else str(source)
    if not is_folder and place.count("/") != 1:
        raise TriptychError(
            f"no image encoder {place!r}: give a local folder, a Hugging Face id, or one of {', '.join(ENCODERS)}"
        )
    place, _, revision = place.partition("@") if not is_folder else (place, "", "")
    where: dict[str, Any] = {"local_files_only": local_files_only or is_folder, "revision": revision or "main"}
    try:
        facts, _ = transformers.PretrainedConfig.get_config_dict(place, **where)
        if (kind := facts.get("model_type")) in _CLASSES:
            network = getattr(transformers, _CLASSES[kind][0])
            vit, report = network.from_pretrained(place, use_safetensors=True, output_loading_info=True, **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise TriptychError(_not_loaded(place, is_folder, encoder_info(place), error)) from error
    if kind not in _CLASSES:
        held = f"holds a {kind!r} network" if kind else "names no model_type in its config.json"
        raise TriptychError(f"{place} {held}: {_only_known()}")
    lost = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in report.get(kind, ())]
    if lost:
        raise TriptychError(f"{place} lacks the weights of {lost[0]} and {len(lost) - 1} more: fetch it again")
    return ImageEncoder(vit.float(), str(source)).eval().requires_grad_(False)


def negative_condition(tokens: Tensor) -> Tensor:
    """The condition that guidance leads away from: zeros like the tokens."""
    return torch.zeros_like(tokens)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TriptychError(
            "the image encoder needs the package transformers (4.56 or later), which is not installed: "
            "pip install transformers"
        ) from error
    return transformers


def _only_known() -> str:
    return f"only {', '.join(_CLASSES)} can be used"


def _not_loaded(place: str, is_folder: bool, info: EncoderInfo | None, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if is_folder:
        return f"{place} is no usable image encoder ({reason}): it needs config.json and model.safetensors"
    if (info and info.gated) or refusal(error, place):
        return (
            f"the image encoder {place} could not be fetched ({reason}): it is gated, so {how_to_enter(place)}, or "
            "give a local folder that holds it"
        )
    return (
        f"the image encoder {place} could not be fetched ({reason}): try again with a network, or give a local folder"
    )
