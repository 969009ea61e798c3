"""Sheets by FLUX.1: Kontext with given views, dev from text alone.

Kontext takes one picture. Several given views are joined side by side into one, in the order front, left, back, right,
as Kontext's users do by hand and with ComfyUI's picture-stitching node. Sheets and references keep their own sizes: the
pipeline would otherwise bring every sheet to a megapixel and every reference to a size of its list.

Guidance is a number that the network is told. Only a network without that input gets a second pass with the negative
prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import TriptychError
from .backend import FluxViews, OnStep


class _Flux1Views(FluxViews):
    """What Kontext and dev share."""

    def uses_negative(self, guidance: float) -> bool:
        return guidance > 1 and not self.pipeline.transformer.config.guidance_embeds

    def _noise(self, generator: torch.Generator) -> Tensor:
        channels = self.pipeline.transformer.config.in_channels // 4
        side = 2 * (2 * self.card.panel_size // (2 * self.pipeline.vae_scale_factor))
        noise = torch.randn(1, channels, side, side, generator=generator)
        return self.pipeline._pack_latents(noise, 1, channels, side, side)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        return self.pipeline.encode_prompt(text, None, max_sequence_length=self.card.max_sequence_length)[:2]

    def _sample(
        self,
        text: Any,
        negative: Any,
        pictures: list[Image.Image],
        noise: Tensor,
        levels: list[float],
        guidance: float,
        on_step: OnStep | None,
    ) -> Tensor:
        size = 2 * self.card.panel_size
        second = {}
        if negative is not None:
            second = {
                "negative_prompt_embeds": negative[0],
                "negative_pooled_prompt_embeds": negative[1],
                "true_cfg_scale": guidance,
            }
        return self.pipeline(
            prompt_embeds=text[0],
            pooled_prompt_embeds=text[1],
            height=size,
            width=size,
            num_inference_steps=len(levels),
            sigmas=levels,
            guidance_scale=guidance,
            latents=noise.to(self.pipeline._execution_device, text[0].dtype),
            output_type="pt",
            callback_on_step_end=self._callback(on_step, noise, levels) if on_step else None,
            **second,
            **self._inputs(pictures, size),
        ).images

    def _inputs(self, pictures: list[Image.Image], size: int) -> dict[str, Any]:
        """Arguments that only one of the two pipelines has."""
        raise NotImplementedError

    def _grid(self, latents: Tensor) -> Tensor:
        pipeline, config = self.pipeline, self.pipeline.vae.config
        size = 2 * self.card.panel_size
        grid = pipeline._unpack_latents(latents, size, size, pipeline.vae_scale_factor)
        return grid / config.scaling_factor + config.shift_factor


class KontextViews(_Flux1Views):
    """Over diffusers' FluxKontextPipeline."""

    def notes(self, *, guidance: float | None = None, negative: str = "", references: int = 0) -> tuple[str, ...]:
        joined = (f"{self.card.name} sees the {references} given views as one picture",) if references > 1 else ()
        return (*joined, *super().notes(guidance=guidance, negative=negative))

    def _inputs(self, pictures: list[Image.Image], size: int) -> dict[str, Any]:
        image = side_by_side(pictures) if pictures else None
        return {"image": image, "max_area": size * size, "_auto_resize": False}


class FluxDevViews(_Flux1Views):
    """Over diffusers' FluxPipeline."""

    def _inputs(self, pictures: list[Image.Image], size: int) -> dict[str, Any]:
        if pictures:
            raise TriptychError(
                f"{self.card.name} makes sheets from text only, {len(pictures)} views were given: choose a FLUX.2 "
                "klein or FLUX.1 Kontext model"
            )
        return {}


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row
