"""Task: Flux multiview, words and given views -> one 2 x 2 sheet of all four views.

A rectified flow in the latents of Flux's own autoencoder: x_s = (1 - s) x + s noise, and the transformer learns
noise - x. References are clean tokens after the noisy ones, the i-th at time index 10 + 10 i; words are what the text
encoder makes of them in its chat template. That is FLUX.2 klein as published, so what is trained here runs in
diffusers and in ComfyUI as it is.

Noise levels are logit-normal, bent by a shift as the sampler's are. They are drawn here, from the sample's seed: the
published schedulers bend only the levels they sample with.

Words are dropped for guidance, as the empty prompt with which pipelines guide; references are dropped so that words
alone make a sheet, but only where the object faces the front that its source meant.

Without a base the transformer is small and starts from random weights. With one (a published model, or a small one of
ours) it is fine-tuned, as LoRA or whole: trainer/flux_base.py. FLUX.1 Kontext and dev are trained in the same way; dev
takes no references, so it learns sheets from words alone. Big text encoders stay out of the loop: the embeddings of
every prompt that can be drawn are made once (`cache_words`).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.flux_base import (
    KLEIN,
    FluxBase,
    FrozenParts,
    LoraSettings,
    Words,
    find_base,
    for_a_while,
    grouped_velocity,
    token_ids,
    training_transformer,
    velocity_of,
    write_lora,
    write_whole,
)
from trainer.parallel import say
from trainer.sheet_data import (
    EMBEDDED_AT_A_TIME,
    CachedSheet,
    SheetData,
    TextCache,
    cache_text,
    held_out_sheets,
    same_autoencoder,
)
from trainer.task import Task
from triptych.errors import TriptychError
from triptych.flux.card import ViewsCard, default_card, field_problem, sigmas, write_card
from triptych.models.proportions import FILE as PROPORTIONS

__all__ = ["FluxViewsConfig", "FluxViewsTask", "TransformerSize", "grouped_velocity", "token_ids", "velocity_of"]

_SPREAD_TOKENS = 48  # what short prompts take; more would be padding alone
TEMPLATE = "{text}. given: {given}."


@dataclass(frozen=True)
class TransformerSize:
    """Of a transformer that starts from random weights; a head has 128 channels, as published."""

    heads: int = 2
    double_blocks: int = 2
    single_blocks: int = 6

    def __post_init__(self) -> None:
        if self.heads < 1 or self.double_blocks < 0 or self.single_blocks < 0:
            raise TriptychError(
                f"size: a transformer of {self.heads} heads, {self.double_blocks} double and {self.single_blocks} "
                "single blocks cannot be built: set heads to 1 or more, blocks to 0 or more"
            )


@dataclass(frozen=True)
class FluxViewsConfig:
    """cache: folders of `trainer sheets`. parts: a folder with vae/, text_encoder/ and tokenizer/ in diffusers' layout;
    the network of the recipe proportions_tiny, if it is there, goes into the exported model.

    text_tokens: length that prompts are padded to. shift, logit_mean, logit_std: of the noise levels. words_share: of
    the samples, made from words alone, of objects that face the front of their source, which are few among all;
    drop_references is for the others. vocabulary: a JSON list of the words that a small text encoder knows, for the
    card; "" for one that knows language.

    base: a folder in diffusers' layout or a repository to fine-tune; "" starts a transformer of ``size``. lora,
    quantisation, gradient_checkpointing: how, see trainer/flux_base.py. text: a folder of cached prompts; "" keeps the
    text encoder at hand. sample_shift: of the sampler and the card, 0 takes that of training. sample_batch: sheets
    generated at a time, 0 for all. photo_steps, photo_guidance: of the sampler where views are given, 0 as without
    them. licence: of the weights, for the card; "" takes the base's (of ours: Apache-2.0).
    spread_prompts: for a transformer from random weights: how many prompts its first look at words is spread by, see
    `spread_words`; 0 leaves it random. thin_padding: for FLUX.2: how many of the padding tokens behind a prompt a
    training step reads, see `FrozenParts.embed_thinly`; 0 reads all. Several times faster with small transformers.
    """

    cache: tuple[str, ...]
    parts: str = ""
    size: TransformerSize = TransformerSize()
    prompt_template: str = TEMPLATE
    text_tokens: int = 512
    shift: float = 3.0
    logit_mean: float = 0.0
    logit_std: float = 1.0
    drop_text: float = 0.1
    drop_references: float = 0.15
    words_share: float = 0.0
    vocabulary: str = ""
    sample_steps: int = 8
    sample_guidance: float = 2.0
    photo_steps: int = 0
    photo_guidance: float = 0.0
    validation_sheets: int = 64
    generated_sheets: int = 16
    base: str = ""
    lora: LoraSettings = LoraSettings()
    quantisation: Literal["none", "int8", "fp8", "nf4"] = "none"
    gradient_checkpointing: bool = False
    text: str = ""
    sample_shift: float = 0.0
    sample_batch: int = 0
    spread_prompts: int = 0
    thin_padding: int = 0
    licence: str = ""

    def __post_init__(self) -> None:
        if not self.cache:
            raise TriptychError("task_config.cache names no folder: set it to those of `python -m trainer sheets`")
        for key, of_card in _OF_CARD.items():
            value = getattr(self, key)
            may_be_zero = key in _ZERO_IS_UNSET
            if (wanted := field_problem(of_card, value)) and not (may_be_zero and value == 0):
                unset = ", or 0 for none of its own" if may_be_zero else ""
                raise TriptychError(f"task_config.{key} is {value!r}, it has to be {wanted}{unset}")
        for key, (low, high) in _RANGES.items():
            if not low <= getattr(self, key) <= high:
                wanted = f"at least {low}" if math.isinf(high) else f"{low}-{high}"
                raise TriptychError(f"task_config.{key} is {getattr(self, key)}, it has to be {wanted}")
        if not (math.isfinite(self.logit_mean) and math.isfinite(self.logit_std)):
            raise TriptychError(
                f"task_config.logit_mean {self.logit_mean} and logit_std {self.logit_std} have to be finite numbers"
            )


_OF_CARD = {  # settings that are exported as fields of the card, and its names of them
    "prompt_template": "prompt_template",
    "text_tokens": "max_sequence_length",
    "shift": "shift",
    "sample_shift": "shift",
    "sample_steps": "steps",
    "sample_guidance": "guidance",
    "photo_steps": "steps",
    "photo_guidance": "guidance",
}
_ZERO_IS_UNSET = ("sample_shift", "photo_steps", "photo_guidance")
_RANGES = {
    "logit_std": (0, math.inf),
    "drop_text": (0, 1),
    "drop_references": (0, 1),
    "words_share": (0, 1),
    "validation_sheets": (1, math.inf),
    "generated_sheets": (0, math.inf),
    "sample_batch": (0, math.inf),
    "spread_prompts": (0, math.inf),
    "thin_padding": (0, math.inf),
}


class FluxViewsTask(Task):
    config: FluxViewsConfig

    def __init__(self, config: FluxViewsConfig) -> None:
        if not (config.parts or config.base):
            raise TriptychError("flux_views needs the base to fine-tune, or parts to start a small model: set one")
        if config.thin_padding and config.text:
            raise TriptychError(
                f"thin_padding {config.thin_padding} needs the text encoder at hand: set task_config.text to nothing"
            )
        if config.lora.rank and not config.base:
            raise TriptychError(f"a LoRA of rank {config.lora.rank} needs a base: set task_config.base")
        self.config = config
        self.text: TextCache | None = None

    @cached_property
    def base(self) -> FluxBase | None:
        return find_base(self.config.base) if self.config.base else None

    @property
    def architecture(self) -> str:
        return self.base.architecture if self.base else KLEIN

    @property
    def words_only(self) -> bool:
        return self.architecture == "flux1-dev"

    def build_model(self) -> torch.nn.Module:
        config = self.config
        if self.base:
            return training_transformer(self.base, config.lora, config.quantisation, config.gradient_checkpointing)
        model = small_transformer(config.size, *_widths(Path(config.parts)))
        if config.spread_prompts:
            spread_words(model.context_embedder.weight, self._embedded_prompts(config.spread_prompts))
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        return model

    def _embedded_prompts(self, count: int) -> Tensor:
        """(N, tokens, D) of prompts spread over the training sheets, the same on every call."""
        config, said = self.config, SheetData(self.config.cache, "train").said
        places = np.linspace(0, len(said) - 1, min(count, len(said))).astype(int)
        prompts = [
            config.prompt_template.format(text=said[place]["captions"][0], given=("nothing", "front")[number % 2])
            for number, place in enumerate(places)
        ]
        return FrozenParts(Path(config.parts), torch.device("cpu")).embed(
            prompts, min(_SPREAD_TOKENS, config.text_tokens)
        )

    def setup(self, device: torch.device) -> None:
        config = self.config
        self.device = device
        facing = (lambda said: said["faces_front"]) if self.words_only else None
        self.data = SheetData(config.cache, "train", facing)
        self.held_out = held_out_sheets(config.cache[:1], facing)
        folder = Path(config.parts) if config.parts or not self.base else self.base.folder
        self.parts = FrozenParts(folder, device, self.architecture)
        if self.base:
            same_autoencoder(self.data, folder)
        self.text = TextCache(Path(config.text), self.architecture, config.text_tokens) if config.text else None
        if config.generated_sheets and not self.words_only and not self._lone_fronts:
            say(
                f"no held-out sheet of {config.cache[0]} can be given the front view alone: validation has the loss, "
                "without psnr and iou, and pictures have no row of one view; cache sheets of more objects for them"
            )

    def size(self) -> int:
        return len(self.data)

    def data_sha256(self) -> str:
        return self.data.sha256()

    def sample(self, index: int, seed: int) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        if self.config.words_share and generator.random() < self.config.words_share:
            index = self._facing[int(generator.integers(len(self._facing)))]
            return self._drawn(self.data[index], generator, words_alone=True)
        return self._drawn(self.data[index], generator)

    @cached_property
    def _facing(self) -> list[int]:
        found = [index for index, said in enumerate(self.data.said) if said["faces_front"]]
        if not found:
            raise TriptychError("words_share needs sheets that face the front, and there are none: set it to 0")
        return found

    def _drawn(self, cached: CachedSheet, generator: np.random.Generator, words_alone: bool = False) -> dict[str, Any]:
        config, said = self.config, cached.said
        level = 1 / (1 + np.exp(-generator.normal(config.logit_mean, config.logit_std)))
        text = said["captions"][int(generator.integers(len(said["captions"])))]
        drops_text = generator.random() < config.drop_text
        share = 1.0 if self.words_only else config.drop_references
        drops_references = words_alone or (generator.random() < share and said["faces_front"])
        given = "nothing" if drops_references else ", ".join(said["given"])
        prompt = config.prompt_template.format(text="" if drops_text else text, given=given)
        if drops_text and generator.random() < 0.5:
            prompt = ""  # what guidance compares with; the other half is what a photo without words sends
        return {
            "target": cached.target,
            "references": cached.references[:0] if drops_references else cached.references,
            "noise": torch.from_numpy(generator.standard_normal(cached.target.shape, dtype=np.float32)),
            "level": float(config.shift * level / (1 + (config.shift - 1) * level)),
            "prompt": prompt,
            "padding_seed": int(generator.integers(2**31)),
            **(self.text[prompt] if self.text else {}),
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
            "padding_seed": samples[0]["padding_seed"],
            "groups": [(count, counts.count(count)) for count in sorted(set(counts))],
            **{key: torch.stack([s[key] for s in samples]) for key in ("words", "pooled") if key in samples[0]},
        }

    def loss(self, model: Any, batch: dict[str, Any], step: int) -> tuple[Tensor, dict[str, Any]]:
        target, noise = batch["target"], batch["noise"]
        level = batch["level"].view(-1, 1, 1, 1)
        noisy = torch.lerp(target, noise, level)
        words = self._words_of(batch)
        velocity = grouped_velocity(model, noisy, batch["level"], words, batch["references"], batch["groups"])
        errors = (velocity.float() - (noise - target)).square().flatten(1).mean(1)
        high = batch["level"] > 0.75
        return errors.mean(), {"loss_high": errors[high].mean().detach() if high.any() else errors.mean().detach()}

    def _words_of(self, batch: dict[str, Any]) -> Any:
        config = self.config
        if "words" in batch:
            return as_words(batch)
        if config.thin_padding:
            return self.parts.embed_thinly(
                batch["prompts"], config.text_tokens, config.thin_padding, batch["padding_seed"]
            )
        return self.parts.embed(batch["prompts"], config.text_tokens)

    def validate(self, model: Any) -> dict[str, float]:
        """The loss on fixed held-out samples and levels; and of sheets made from one view: PSNR in dB over the union
        of both silhouettes and their intersection over union, for left, back and right."""
        with for_a_while(self.parts, borrowed=self.base is not None):
            return self._validated(model)

    def _validated(self, model: Any) -> dict[str, float]:
        losses = []
        size = self.config.sample_batch or 8
        for start in range(0, min(self.config.validation_sheets, len(self.held_out)), size):
            stop = min(start + size, self.config.validation_sheets, len(self.held_out))
            drawn = [self._drawn(self.held_out[i], np.random.default_rng(i)) for i in range(start, stop)]
            losses.append(float(self.loss(model, self._moved(self.collate(drawn)), 0)[0].detach()))
        pair = self._from_one_view(model, self.config.generated_sheets)
        if pair is None:
            return {"loss": float(np.mean(losses))}
        true, made = pair
        psnr, overlap = compared(made, true, self.data.options["background"])
        return {"loss": float(np.mean(losses)), "psnr": psnr, "iou": overlap}

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    @cached_property
    def _lone_fronts(self) -> list[tuple[int, str]]:
        """Held-out sheets that are made from the front view alone, and their prompts."""
        found = [(place, self._lone_prompt(self.held_out.said[place])) for place in lone_fronts(self.held_out.said)]
        return [(place, prompt) for place, prompt in found if self.text is None or prompt in self.text.places]

    def _lone_prompt(self, said: dict[str, Any]) -> str:
        return self.config.prompt_template.format(text=said["captions"][0], given="front")

    def _from_one_view(self, model: Any, count: int) -> tuple[Tensor, Tensor] | None:
        """True and generated sheets (N, 3, H, W) of held-out objects from the front view alone. None where no sheet
        can be compared: for a network that is given nothing, and where no front view is held out."""
        chosen = [] if self.words_only else self._lone_fronts[:count]
        if not chosen:
            return None
        cached = [self.held_out[place] for place, _ in chosen]
        fronts = [c.references[: len(c.references) // len(c.said["given"])] for c in cached]  # and its mirror image
        guidance = self.config.photo_guidance or self.config.sample_guidance
        made = self.generate(model, [prompt for _, prompt in chosen], torch.stack(fronts), guidance)
        return self._decoded(torch.stack([c.target for c in cached])), made

    def _decoded(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of latents, sample_batch at a time."""
        size = self.config.sample_batch or len(latents)
        return torch.cat([self.parts.decode(part.to(self.device)) for part in latents.split(size)])

    def words(self, prompts: list[str]) -> Any:
        """What the transformer reads of prompts, on the device."""
        if not self.text:
            return self.parts.embed(prompts, self.config.text_tokens)
        found = [self.text[prompt] for prompt in prompts]
        return as_words({key: torch.stack([one[key] for one in found]).to(self.device) for key in found[0]})

    def generate(self, model: Any, prompts: Sequence[str], references: Tensor | None, guidance: float) -> Tensor:
        """Sheets (B, 3, H, W) 0-1 by the sampler that pipelines use; references (B, V, C, P, P), or None."""
        side = self.data.options["panel"] // 8
        shape = (len(prompts), self.held_out[0].target.shape[0], side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size = self.config.sample_batch or len(prompts)
        sheets = []
        for start in range(0, len(prompts), size):
            at = slice(start, start + size)
            rows = None if references is None else references[at].to(self.device)
            sheets.append(self._sampled(model, noise[at].to(self.device), list(prompts[at]), rows, guidance))
        return torch.cat(sheets)

    def _sampled(self, model: Any, x: Tensor, prompts: list[str], references: Tensor | None, guidance: float) -> Tensor:
        config, count = self.config, len(prompts)
        told = guidance if getattr(model.config, "guidance_embeds", False) else 1.0
        second = guidance != 1 and told == 1  # a network that is told the guidance needs no second pass
        words = self.words(prompts)
        empty = self.words([""] * count) if second else None
        rows = references.flatten(0, 1) if references is not None else x.new_zeros(0, *x.shape[1:])
        groups = [(0 if references is None else references.shape[1], count)]
        steps = config.photo_steps if references is not None and config.photo_steps else config.sample_steps
        levels = [*sigmas(steps, config.sample_shift or config.shift), 0.0]
        for now, after in zip(levels, levels[1:], strict=False):
            level = torch.full((count,), now, device=self.device)
            velocity = grouped_velocity(model, x, level, words, rows, groups, told).float()
            if empty is not None:
                without = grouped_velocity(model, x, level, empty, rows, groups, told).float()
                velocity = without + guidance * (velocity - without)
            x = x + (after - now) * velocity
        return self.parts.decode(x)

    def pictures(self, model: Any) -> Image.Image | None:
        """Truth above what one view gives, and below both what words alone give."""
        prompts = picture_prompts(self.config)
        with for_a_while(self.parts, borrowed=self.base is not None):
            parts = list(self._from_one_view(model, min(8, self.config.generated_sheets)) or ())
            prompts = prompts[: len(parts[0])] if parts else prompts
            parts.append(self.generate(model, prompts, None, self.config.sample_guidance))
        rows = [torch.cat(list(part), dim=-1) for part in parts]
        pixels = (torch.cat(rows, dim=-2).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())

    def export(self, model: Any, folder: Path, provenance: dict[str, Any]) -> None:
        """A whole model in diffusers' layout with its card; a LoRA with the card that names its base."""
        config = self.config
        from trainer.model_card import write_views_card

        provenance = provenance | self._earlier()
        card = self.card(folder.name, provenance)
        if self.base and config.lora.rank:
            card = write_lora(model, folder, self.base, config.lora, card)
        elif self.base:
            write_whole(model, folder, self.parts)
        else:
            self.parts.save(model, folder)
            if (tells := Path(config.parts) / PROPORTIONS).is_file():
                shutil.copyfile(tells, folder / PROPORTIONS)
        card = write_card(folder, card)
        base = Path(self.base.source).name if self.base and Path(self.base.source).exists() else ""
        write_views_card(folder, card, self.data.said, base or (self.base.source if self.base else ""))

    def _earlier(self) -> dict[str, Any]:
        """Where the parts come from, when they were trained here."""
        found = {}
        for name in ("flux_vae", "flux_text", "proportions"):
            file = Path(self.config.parts) / f"{name}.json"
            if self.config.parts and file.is_file():
                said = json.loads(file.read_text(encoding="utf-8"))
                found[name] = said.get("provenance", said)
        return found

    def card(self, name: str, provenance: dict[str, Any]) -> ViewsCard:
        """What users of the exported model need to know."""
        from trainer.export import without_places
        from trainer.model_card import attribution_of

        config, options = self.config, self.data.options
        return ViewsCard(
            name=name,
            licence=config.licence or (self.base.licence if self.base else "Apache-2.0"),
            architecture=self.architecture,
            prompt_template=config.prompt_template,
            panel_size=options["panel"],
            background=tuple(options["background"]),
            max_sequence_length=config.text_tokens,
            mirrored=options.get("mirrored", False),
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            shift=config.sample_shift or config.shift,
            photo_steps=config.photo_steps or None,
            photo_guidance=config.photo_guidance or None,
            vocabulary=_vocabulary(config.vocabulary),
            provenance=without_places(provenance | {"sheets": len(self.data), "options": options}),
            attribution=attribution_of(self.data.said),
        )

    @staticmethod
    def memory_remedies(config: FluxViewsConfig) -> list[str]:
        """What a run without memory can change, the cheapest first."""
        found = []
        if not config.gradient_checkpointing:
            found.append("--set task_config.gradient_checkpointing=true")
        if config.sample_batch != 1:
            found.append("--set task_config.sample_batch=1 for validation and pictures")
        if config.base and not config.text:
            found.append("prompts of `sheets --text` in task_config.text")
        if config.base and not config.lora.rank:
            found.append("a new run with a LoRA")
        elif config.base and config.quantisation != "nf4":
            fewer = "int8" if config.quantisation == "none" else "nf4"
            found.append(f"--set task_config.quantisation={fewer}")
        return [*found, "a new run on sheets of a smaller --panel"]

    def memory_plan(self, cards_gib: Sequence[int] | None, batch: int) -> str:
        """For `trainer plan`; neither data nor weights are read."""
        from trainer.flux_plan import plan_text

        return plan_text(self.config, cards_gib, batch)


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


def as_words(tensors: dict[str, Tensor]) -> Any:
    """``words`` (B, L, D), with ``pooled`` (B, E) of FLUX.1, as networks take them."""
    return Words(tensors["words"], tensors["pooled"]) if "pooled" in tensors else tensors["words"]


def picture_prompts(config: FluxViewsConfig) -> list[str]:
    return [config.prompt_template.format(text=text, given="nothing") for text in PICTURE_PROMPTS]


def lone_fronts(said: Sequence[dict[str, Any]]) -> list[int]:
    """Places of the sheets whose one reference is the front view; where there are none, as in a small data set, of
    those that have it first among others and can be cut down to it (FLUX.1's, encoded side by side, but for a seam)."""
    alone = [place for place, one in enumerate(said) if one["given"] == ["front"]]
    return alone or [place for place, one in enumerate(said) if one["given"][:1] == ["front"]]


def drawn_prompts(config: FluxViewsConfig) -> list[str]:
    """Every prompt that a run of this config can ask for, the empty one first."""
    found = {prompt: None for prompt in ("", *picture_prompts(config))}
    for split in ("train", "validation"):
        for said in SheetData(config.cache, split, needed=split == "train").said:
            givens = (", ".join(said["given"]), *(["nothing"] if said["faces_front"] else []))
            for text in ("", *said["captions"]):
                found |= {config.prompt_template.format(text=text, given=given): None for given in givens}
    held_out = held_out_sheets(config.cache[:1], report=lambda sentence: None).said
    for place in lone_fronts(held_out):
        found[config.prompt_template.format(text=held_out[place]["captions"][0], given="front")] = None
    return list(found)


def cache_words(
    cache: Sequence[Path], model: Path, out: Path, *, template: str, tokens: int = 512, device: str = "cpu"
) -> tuple[int, int]:
    """Writes the embeddings of every prompt that sheets of ``cache`` and this template give, made by the text encoders
    of ``model``; those that ``out`` has are kept. Returns the numbers of prompts and of new ones."""
    from triptych.flux.parts import architecture_of

    architecture = architecture_of(model) if (model / "model_index.json").is_file() else KLEIN
    config = FluxViewsConfig(tuple(map(str, cache)), parts=str(model), prompt_template=template, text_tokens=tokens)
    parts = FrozenParts(model, torch.device(device), architecture)
    prompts = drawn_prompts(config)

    def embed(batch: list[str]) -> dict[str, Tensor]:
        words = parts.embed(batch, tokens)
        return {"words": words.embeds, "pooled": words.pooled} if isinstance(words, Words) else {"words": words}

    step = EMBEDDED_AT_A_TIME if parts.device.type == "cpu" else 1  # beside its weights a card has little room
    return len(prompts), cache_text(out, prompts, embed, architecture=architecture, tokens=tokens, at_a_time=step)


def template_of(model: Path) -> str:
    """The prompt template for training on the model in a folder: its card's, or that of its architecture."""
    from triptych.flux.card import read_card
    from triptych.flux.parts import architecture_of

    if (model / "views.json").is_file():
        return read_card(model).prompt_template
    return default_card(architecture_of(model)).prompt_template if (model / "model_index.json").is_file() else TEMPLATE


@torch.no_grad()
def spread_words(weight: Tensor, words: Tensor) -> None:
    """Makes the projection of words (C, D) see what differs between prompts as strongly as what they share.

    Of a small text encoder's states nearly all is template: the mean squares of their directions lie a factor of
    thousands apart, and "red" and "blue" in the weak ones, where a random projection hardly learns to look. So it is
    preceded by the inverse square root of their second moments, and scaled to the size it had. words: (N, L, D).
    """
    states = words.float().reshape(-1, words.shape[-1])
    moments = (states.T.double() @ states.double()) / len(states)
    squares, directions = torch.linalg.eigh(moments)
    floor = 2e-3 * squares.mean()
    spread = weight @ (directions @ torch.diag((squares + floor).rsqrt()) @ directions.T).float()
    weight.copy_(spread * ((states @ weight.T).square().mean() / (states @ spread.T).square().mean()).sqrt())


def _widths(parts: Path) -> tuple[int, int]:
    """Channels of a patchified latent and of the words, of a folder's configs."""
    vae = json.loads((parts / "vae" / "config.json").read_text(encoding="utf-8"))
    text = json.loads((parts / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    return 4 * vae["latent_channels"], 3 * text["hidden_size"]


def _vocabulary(file: str) -> tuple[str, ...] | None:
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
