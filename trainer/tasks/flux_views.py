"""Task: Flux multiview, words and given views -> one 2 x 2 sheet of all four views.

A rectified flow in the latents of Flux's own autoencoder: x_s = (1 - s) x + s noise, and the transformer learns
noise - x. References are clean tokens after the noisy ones, the i-th at time index 10 + 10 i; words are what the text
encoder makes of them in its chat template. That is FLUX.2 klein as published, so what is trained here runs in
diffusers and in ComfyUI as it is.

Noise levels are logit-normal, bent by a shift as the sampler's are. They are drawn here, from the sample's seed: the
published schedulers bend only the levels they sample with.

Words are dropped for guidance, as the empty prompt with which pipelines guide; references are dropped so that words
alone make a sheet, but only where the object faces the front that its source meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.sheet_data import CachedSheet, SheetData
from trainer.task import Task
from triptych.errors import TriptychError
from triptych.flux.card import ViewsCard, sigmas, write_card

TEMPLATE = "{text}. given: {given}."


@dataclass(frozen=True)
class TransformerSize:
    """Of a transformer that starts from random weights; a head has 128 channels, as published."""

    heads: int = 2
    double_blocks: int = 2
    single_blocks: int = 6


@dataclass(frozen=True)
class FluxViewsConfig:
    """cache: folders of `trainer sheets`. parts: a folder with vae/, text_encoder/ and tokenizer/ in diffusers' layout.
    text_tokens: length that prompts are padded to. shift, logit_mean, logit_std: of the noise levels.
    vocabulary: a JSON list of the words that a small text encoder knows, for the card; "" for one that knows language.
    """

    cache: tuple[str, ...]
    parts: str
    size: TransformerSize = TransformerSize()
    prompt_template: str = TEMPLATE
    text_tokens: int = 512
    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    drop_text: float = 0.1
    drop_references: float = 0.15
    vocabulary: str = ""
    sample_steps: int = 8
    sample_guidance: float = 2.0
    validation_sheets: int = 64
    generated_sheets: int = 16


class FluxViewsTask(Task):
    config: FluxViewsConfig

    def __init__(self, config: FluxViewsConfig) -> None:
        self.config = config

    def build_model(self) -> torch.nn.Module:
        return small_transformer(self.config.size, *_widths(Path(self.config.parts)))

    def setup(self, device: torch.device) -> None:
        self.device = device
        self.data = SheetData(self.config.cache, "train")
        self.held_out = SheetData(self.config.cache[:1], "validation")
        self.parts = frozen_parts(Path(self.config.parts), device)

    def size(self) -> int:
        return len(self.data)

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        return self._drawn(self.data[index], np.random.default_rng(seed))

    def _drawn(self, cached: CachedSheet, generator: np.random.Generator) -> dict[str, Any]:
        config, said = self.config, cached.said
        level = 1 / (1 + np.exp(-generator.normal(config.logit_mean, config.logit_std)))
        text = said["captions"][int(generator.integers(len(said["captions"])))]
        drops_text = generator.random() < config.drop_text
        drops_references = generator.random() < config.drop_references and said["faces_front"]
        given = "nothing" if drops_references else ", ".join(said["given"])
        return {
            "target": cached.target,
            "references": cached.references[:0] if drops_references else cached.references,
            "noise": torch.from_numpy(generator.standard_normal(cached.target.shape, dtype=np.float32)),
            "level": float(config.shift * level / (1 + (config.shift - 1) * level)),
            "prompt": "" if drops_text else config.prompt_template.format(text=text, given=given),
        }

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows with equally many references side by side; ``groups`` are their numbers of rows."""
        samples = sorted(samples, key=lambda sample: len(sample["references"]))
        counts = [len(sample["references"]) for sample in samples]
        return {
            "target": torch.stack([sample["target"] for sample in samples]),
            "noise": torch.stack([sample["noise"] for sample in samples]),
            "level": torch.tensor([sample["level"] for sample in samples]),
            "references": torch.cat([sample["references"] for sample in samples]),
            "prompts": [sample["prompt"] for sample in samples],
            "groups": [(count, counts.count(count)) for count in sorted(set(counts))],
        }

    def loss(self, model: Any, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        target, noise = batch["target"], batch["noise"]
        level = batch["level"].view(-1, 1, 1, 1)
        noisy = torch.lerp(target, noise, level)
        words = self.parts.embed(batch["prompts"], self.config.text_tokens)
        velocity = grouped_velocity(model, noisy, batch["level"], words, batch["references"], batch["groups"])
        errors = (velocity.float() - (noise - target)).square().flatten(1).mean(1)
        high = batch["level"] > 0.75
        return errors.mean(), {"loss_high": errors[high].mean().detach() if high.any() else errors.mean().detach()}

    def validate(self, model: Any) -> dict[str, float]:
        """The loss on fixed held-out samples and levels; and of sheets made from one view: PSNR in dB over the union
        of both silhouettes and their intersection over union, for left, back and right."""
        losses = []
        for start in range(0, min(self.config.validation_sheets, len(self.held_out)), 8):
            stop = min(start + 8, self.config.validation_sheets, len(self.held_out))
            drawn = [self._drawn(self.held_out[i], np.random.default_rng(i)) for i in range(start, stop)]
            losses.append(float(self.loss(model, self._moved(self.collate(drawn)), 0)[0]))
        true, made = self._from_one_view(model, self.config.generated_sheets)
        psnr, overlap = compared(made, true, self.data.options["background"])
        return {"loss": float(np.mean(losses)), "psnr": psnr, "iou": overlap}

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _from_one_view(self, model: Any, count: int) -> tuple[Tensor, Tensor]:
        """True and generated sheets (N, 3, H, W) of held-out objects whose one reference is the front view."""
        places = [i for i, said in enumerate(self.held_out.said) if said["given"] == ["front"]][:count]
        cached = [self.held_out[i] for i in places]
        prompts = [self.config.prompt_template.format(text=c.said["captions"][0], given="front") for c in cached]
        references = torch.stack([c.references[0] for c in cached])
        made = self.generate(model, prompts, references, guidance=1.0)
        return self.parts.decode(torch.stack([c.target for c in cached]).to(self.device)), made

    def generate(self, model: Any, prompts: Sequence[str], references: Tensor | None, guidance: float) -> Tensor:
        """Sheets (B, 3, H, W) 0-1 by the sampler that pipelines use; references (B, C, P, P) one each, or None."""
        count, config = len(prompts), self.config
        side = self.data.options["panel"] // 8
        shape = (count, self.held_out[0].target.shape[0], side, side)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        words = self.parts.embed(list(prompts), config.text_tokens)
        empty = self.parts.embed([""] * count, config.text_tokens) if guidance != 1 else None
        rows = references.to(self.device) if references is not None else x.new_zeros(0, *shape[1:])
        groups = [(0 if references is None else 1, count)]
        levels = [*sigmas(config.sample_steps, config.shift), 0.0]
        for now, after in zip(levels, levels[1:], strict=False):
            level = torch.full((count,), now, device=self.device)
            velocity = grouped_velocity(model, x, level, words, rows, groups).float()
            if empty is not None:
                without = grouped_velocity(model, x, level, empty, rows, groups).float()
                velocity = without + guidance * (velocity - without)
            x = x + (after - now) * velocity
        return self.parts.decode(x)

    def pictures(self, model: Any) -> Image.Image | None:
        """Truth above what one view gives, and below both what words alone give."""
        true, made = self._from_one_view(model, 8)
        prompts = [
            self.config.prompt_template.format(text=text, given="nothing") for text in PICTURE_PROMPTS[: len(made)]
        ]
        words = self.generate(model, prompts, None, self.config.sample_guidance)
        rows = [torch.cat(list(part), dim=-1) for part in (true, made, words)]
        pixels = (torch.cat(rows, dim=-2).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def export(self, model: Any, folder: Path, provenance: dict[str, Any]) -> None:
        """A whole model in diffusers' layout with its card."""
        from trainer.export import without_places
        from trainer.model_card import attribution_of

        config, options = self.config, self.data.options
        pipeline = self.parts.pipeline(model.to(torch.bfloat16))
        pipeline.save_pretrained(folder)
        card = ViewsCard(
            name=folder.name,
            licence="Apache-2.0",
            architecture="flux2-klein",
            prompt_template=config.prompt_template,
            panel_size=options["panel"],
            background=tuple(options["background"]),
            max_sequence_length=config.text_tokens,
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            shift=config.shift,
            vocabulary=_vocabulary(config.vocabulary),
            provenance=without_places(provenance | {"sheets": len(self.data), "options": options}),
            attribution=attribution_of(self.data.said),
        )
        write_card(folder, card)


PICTURE_PROMPTS = (
    "a red chair",
    "a blue car",
    "a green tree",
    "a brown wooden table",
    "a yellow sword",
    "a white house",
    "an orange bottle",
    "a grey rock",
)


def small_transformer(size: TransformerSize, channels: int, text_width: int) -> Any:
    """A Flux2Transformer2DModel with random weights whose last layer is zero, as published ones begin."""
    from diffusers import Flux2Transformer2DModel

    model: Any = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=channels,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=128,
        num_attention_heads=size.heads,
        joint_attention_dim=text_width,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(32, 32, 32, 32),
        rope_theta=2000,
        guidance_embeds=False,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("proj_out.weight") or "modulation" in name or name.startswith("norm_out"):
            torch.nn.init.zeros_(parameter)
    return model


def grouped_velocity(
    model: Any, noisy: Tensor, level: Tensor, words: Tensor, references: Tensor, groups: Sequence[tuple[int, int]]
) -> Tensor:
    """Velocities (B, C, H, W) of noisy latents; rows come in ``groups`` of (references each, rows), in order.

    level (B,) 0-1, words (B, L, D), references (M, C, P, P) in the order of the rows.
    """
    parts, row, used = [], 0, 0
    for count, rows in groups:
        own = references[used : used + count * rows].unflatten(0, (rows, count)) if count else None
        at = slice(row, row + rows)
        parts.append(velocity_of(model, noisy[at], level[at], words[at], own))
        row, used = row + rows, used + count * rows
    return torch.cat(parts)


def velocity_of(model: Any, noisy: Tensor, level: Tensor, words: Tensor, references: Tensor | None) -> Tensor:
    """(B, C, H, W) for noisy (B, C, H, W), level (B,), words (B, L, D), references (B, V, C, P, P) or None."""
    _, _, height, width = noisy.shape
    tokens, ids = [noisy.flatten(2).transpose(1, 2)], [token_ids(height, width, 0)]
    if references is not None:
        for i in range(references.shape[1]):
            tokens.append(references[:, i].flatten(2).transpose(1, 2))
            ids.append(token_ids(references.shape[3], references.shape[4], 10 + 10 * i))
    text_ids = torch.zeros(words.shape[1], 4)
    text_ids[:, 3] = torch.arange(words.shape[1])
    output = model(
        hidden_states=torch.cat(tokens, dim=1).to(words.dtype),
        encoder_hidden_states=words,
        timestep=level.to(words.dtype),
        img_ids=torch.cat(ids).to(noisy.device),
        txt_ids=text_ids.to(noisy.device),
        guidance=None,
        return_dict=False,
    )[0]
    return output[:, : height * width].transpose(1, 2).unflatten(2, (height, width))


def token_ids(height: int, width: int, time: int) -> Tensor:
    """(H W, 4) float32 places of latent tokens: time, row, column, 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    zero = torch.zeros_like(rows)
    return torch.stack([zero + time, rows, columns, zero], dim=-1).reshape(-1, 4).float()


class FrozenParts:
    """Autoencoder, text encoder and tokenizer of a diffusers folder, which training leaves as they are."""

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, device: torch.device) -> None:
        self.vae, self.text_encoder, self.tokenizer, self.device = vae, text_encoder, tokenizer, device

    def pipeline(self, transformer: Any) -> Any:
        """The pipeline that users run, with this transformer."""
        from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=transformer,
            is_distilled=False,
        )

    @torch.no_grad()
    def embed(self, prompts: list[str], tokens: int) -> Tensor:
        """(B, tokens, D): what pipelines give the transformer for these prompts."""
        return self.pipeline(None).encode_prompt(prompt=prompts, device=self.device, max_sequence_length=tokens)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised, patchified latents (B, 4 C, H, W) -> pictures (B, 3, 16 H, 16 W) float32 0-1."""
        vae = self.vae
        mean = vae.bn.running_mean.float().view(1, -1, 1, 1)
        deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        b, c, h, w = latents.shape
        whole = (latents.float() * deviation + mean).view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3)
        pixels = vae.decode(whole.reshape(b, c // 4, 2 * h, 2 * w).to(vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def frozen_parts(folder: Path, device: torch.device) -> FrozenParts:
    """The parts of a folder in diffusers' layout; TriptychError names what is missing."""
    from diffusers import AutoencoderKLFlux2
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

    for name in ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        if not (folder / name).is_file():
            raise TriptychError(f"{folder} has no {name}: name a folder in diffusers' layout, or train the small parts")
    vae: Any = AutoencoderKLFlux2.from_pretrained(folder, subfolder="vae", torch_dtype=torch.bfloat16)
    text: Any = Qwen3ForCausalLM.from_pretrained(folder, subfolder="text_encoder", dtype=torch.bfloat16)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, subfolder="tokenizer")
    vae, text = vae.to(device).eval().requires_grad_(False), text.to(device).eval().requires_grad_(False)
    return FrozenParts(vae, text, tokenizer, device)


def _widths(parts: Path) -> tuple[int, int]:
    """Channels of a patchified latent and of the words, of a folder's configs."""
    import json

    vae = json.loads((parts / "vae" / "config.json").read_text(encoding="utf-8"))
    text = json.loads((parts / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return 4 * vae["latent_channels"], 3 * text["hidden_size"]


def _vocabulary(file: str) -> tuple[str, ...] | None:
    import json

    return tuple(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None


def compared(made: Tensor, true: Tensor, background: Sequence[float]) -> tuple[float, float]:
    """Mean PSNR in dB over the union of both silhouettes and their mean overlap, for the views left, back and right.

    made, true: (N, 3, 2S, 2S) sheets on the background colour; a pixel belongs to the object when it differs from it
    by more than 0.3 in any channel.
    """
    key = torch.tensor(background, device=made.device).view(3, 1, 1)
    size = made.shape[-1] // 2
    psnr, overlap = [], []
    for row, column in ((0, size), (size, 0), (size, size)):
        a, b = (x[..., row : row + size, column : column + size] for x in (made, true))
        seen_a, seen_b = ((x - key).abs().amax(1) > 0.3 for x in (a, b))
        union = (seen_a | seen_b).flatten(1).sum(1).clamp_min(1)
        error = ((a - b).square().mean(1) * (seen_a | seen_b)).flatten(1).sum(1) / union
        psnr.append(-10 * error.clamp_min(1e-6).log10())
        overlap.append((seen_a & seen_b).flatten(1).sum(1) / union)
    return float(torch.stack(psnr).mean()), float(torch.stack(overlap).mean())
