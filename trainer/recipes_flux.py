"""Recipes of the Flux multi-view models: the parts of the small one, and fine-tuning of published ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.tasks.flux_views import FluxViewsConfig


def flux_vae_tiny() -> TrainConfig:
    """The small autoencoder of view sheets: about twenty minutes on one CPU core."""
    from trainer.tasks.flux_vae import FluxVaeConfig

    return TrainConfig(
        name="flux_vae_tiny",
        task="flux_vae",
        task_config=FluxVaeConfig(data=("data",)),
        steps=2400,
        batch_size=16,
        lr=1.5e-3,
        schedule="wsd",
        decay_share=0.35,
        warmup_steps=50,
        weight_decay=0.01,
        ema_decay=0.99,
        checkpoint_every=400,
        validate_every=400,
        pictures_every=400,
        log_every=25,
    )


def flux_text_tiny() -> TrainConfig:
    """The small text encoder and its tokenizer: about a quarter of an hour on one CPU core."""
    from trainer.tasks.flux_text import FluxTextConfig

    return TrainConfig(
        name="flux_text_tiny",
        task="flux_text",
        task_config=FluxTextConfig(data=("data",)),
        steps=600,
        batch_size=16,
        lr=0.003,
        warmup_steps=50,
        weight_decay=0.01,
        betas=(0.9, 0.98),
        ema_decay=0.99,
        checkpoint_every=150,
        validate_every=150,
        log_every=25,
    )


def proportions_tiny() -> TrainConfig:
    """The network that tells a depth from one picture: about a quarter of an hour on two CPU cores."""
    from trainer.tasks.proportions import ProportionsConfig

    return TrainConfig(
        name="proportions_tiny",
        task="proportions",
        task_config=ProportionsConfig(data=("data",)),
        steps=6000,
        batch_size=32,
        lr=2e-3,
        schedule="cosine",
        warmup_steps=200,
        weight_decay=0.05,
        precision="bf16",
        checkpoint_every=500,
        validate_every=500,
        log_every=50,
    )


def flux_views_tiny() -> TrainConfig:
    """The small multi-view model: hours on CPU cores."""
    from trainer.tasks.flux_views import FluxViewsConfig

    return TrainConfig(
        name="flux_views_tiny",
        task="flux_views",
        task_config=FluxViewsConfig(
            cache=("sheets",),
            parts="flux-parts",
            thin_padding=8,
            # A model of this size is best where nearly all is noise: few steps, each close to what is likely. From a
            # photograph one step is best, so that the highest levels have to be seen too.
            shift=10.0,
            logit_mean=0.7,
            logit_std=1.5,
            sample_steps=3,
            sample_guidance=5.0,
            photo_steps=1,
            photo_guidance=1.0,
            words_share=0.4,
            drop_references=0.0,
            drop_text=0.15,
            spread_prompts=1500,
        ),
        steps=4000,
        batch_size=16,
        lr=1e-3,
        optimizer="muon",
        schedule="wsd",
        decay_share=0.3,
        warmup_steps=100,
        weight_decay=0.02,
        precision="bf16",
        ema_decay=0.995,
        checkpoint_every=250,
        validate_every=250,
        pictures_every=250,
    )


def _fine_tuning(name: str, task_config: Any, **changes: Any) -> TrainConfig:
    """What fine-tuning a published model has in common: one sheet at a time, eight to a step."""
    facts: dict[str, Any] = {
        "steps": 5000,
        "batch_size": 8,
        "accumulation": 8,
        "lr": 1e-4,
        "schedule": "constant",
        "warmup_steps": 100,
        "precision": "bf16",
        "ema_decay": 0.99,
        "workers": 2,
        "checkpoint_every": 250,
        "validate_every": 500,
        "pictures_every": 500,
    }
    return TrainConfig(name=name, task="flux_views", task_config=task_config, **facts | changes)


def _views_config(base: str, architecture: str, licence: str, **changes: Any) -> FluxViewsConfig:
    """Sheets of 1024 px on white, the sentence of the architecture's card, cached prompts. The noise levels' shift is
    the one that trainers of these models share, sqrt(10); sheets are sampled with the published one."""
    from trainer.flux_base import LoraSettings
    from trainer.tasks.flux_views import FluxViewsConfig
    from triptych.flux.card import default_card

    card = default_card(architecture)
    facts: dict[str, Any] = {
        "lora": LoraSettings(rank=32),
        "gradient_checkpointing": True,
        "prompt_template": card.prompt_template,
        "shift": 3.162,
        "sample_shift": card.shift,
        "sample_steps": 28,
        "sample_guidance": card.guidance,
        "sample_batch": 1,
        "validation_sheets": 32,
        "generated_sheets": 4,
        "licence": licence,
    }
    return FluxViewsConfig(cache=("sheets",), base=base, text="sheets/text", **facts | changes)


def flux2_klein_4b_lora() -> TrainConfig:
    """The recommended one: a LoRA on FLUX.2-klein-base-4B, whose weights may be shared under Apache-2.0. With
    --set task_config.quantisation=int8 for a smaller card; `python -m trainer plan` says which."""
    config = _views_config("black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein", "Apache-2.0")
    return _fine_tuning("flux2_klein_4b_lora", config)


def flux2_klein_4b_full() -> TrainConfig:
    """All weights of FLUX.2-klein-base-4B, for one card of 141 GB: more to gain, and more to forget, than a LoRA."""
    from trainer.flux_base import LoraSettings

    config = _views_config("black-forest-labs/FLUX.2-klein-base-4B", "flux2-klein", "Apache-2.0", lora=LoraSettings())
    return _fine_tuning("flux2_klein_4b_full", config, lr=1e-5, batch_size=32, accumulation=32)


def flux2_klein_9b_lora() -> TrainConfig:
    """A LoRA on FLUX.2-klein-base-9B, whose licence forbids commercial use; the base in 8 bits."""
    licence = "FLUX Non-Commercial License, as its publisher states"
    config = _views_config("black-forest-labs/FLUX.2-klein-base-9B", "flux2-klein", licence, quantisation="int8")
    return _fine_tuning("flux2_klein_9b_lora", config)


def flux1_kontext_lora() -> TrainConfig:
    """A LoRA on FLUX.1-Kontext-dev, whose licence forbids commercial use; the base in 8 bits. Several given views are
    one picture to it. FLUX.1-dev, from words alone, is trained with --set task_config.base=..."""
    licence = "FLUX.1-dev Non-Commercial License, as its publisher states"
    config = _views_config("black-forest-labs/FLUX.1-Kontext-dev", "flux1-kontext", licence, quantisation="int8")
    return _fine_tuning("flux1_kontext_lora", config)
