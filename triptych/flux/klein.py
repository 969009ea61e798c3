"""Sheets by FLUX.2 klein: references are tokens beside the sheet's, guidance is a second pass.

diffusers numbers the i-th reference with the time index 10 + 10 i, and leaves a square picture of a multiple of 16
pixels up to 1024 as it is, so references reach the VAE pixel for pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .backend import FluxViews, OnStep


class KleinViews(FluxViews):
    """Over diffusers' Flux2KleinPipeline."""

    @property
    def is_distilled(self) -> bool:
        return bool(self.pipeline.config.is_distilled)

    def uses_negative(self, guidance: float) -> bool:
        return guidance > 1 and not self.is_distilled

    def notes(self, *, guidance: float | None = None, negative: str = "", references: int = 0) -> tuple[str, ...]:
        wanted = self.card.usual(bool(references))[1] if guidance is None else guidance
        ignored = self.is_distilled and wanted > 1
        text = f"{self.card.name} is distilled to few steps and does not use the guidance {wanted:g}"
        more = super().notes(guidance=guidance, negative=negative, references=references)
        return (*([text] if ignored else []), *more)

    def _noise(self, generator: torch.Generator) -> Tensor:
        side = 2 * self.card.panel_size // (2 * self.pipeline.vae_scale_factor)
        return torch.randn(1, self.pipeline.transformer.config.in_channels, side, side, generator=generator)

    def _encode(self, text: str) -> Tensor:
        return self.pipeline.encode_prompt(text, max_sequence_length=self.card.max_sequence_length)[0]

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
        packed = noise.flatten(2).transpose(1, 2)
        return self.pipeline(
            image=pictures or None,
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=size,
            width=size,
            num_inference_steps=len(levels),
            sigmas=levels,
            guidance_scale=guidance if negative is not None else 1.0,
            latents=noise,
            output_type="pt",
            callback_on_step_end=self._callback(on_step, packed, levels) if on_step else None,
        ).images

    def _grid(self, latents: Tensor) -> Tensor:
        pipeline, vae = self.pipeline, self.pipeline.vae
        side = round(latents.shape[1] ** 0.5)
        grid = latents.transpose(1, 2).unflatten(2, (side, side))
        mean, var = (b.view(1, -1, 1, 1).to(grid) for b in (vae.bn.running_mean, vae.bn.running_var))
        grid = grid * torch.sqrt(var + vae.config.batch_norm_eps) + mean
        return pipeline._unpatchify_latents(grid)
