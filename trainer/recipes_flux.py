"""Recipes of the Flux multi-view models: the parts of the small one, and fine-tuning of published ones."""

from __future__ import annotations

from trainer.config import TrainConfig


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


def flux_views_tiny() -> TrainConfig:
    """The small multi-view model: hours on CPU cores. Short prompts first; a last part with 512 text tokens, as
    pipelines run it, starts from this run (--set init_from=RUN --set task_config.text_tokens=512)."""
    from trainer.tasks.flux_views import FluxViewsConfig

    return TrainConfig(
        name="flux_views_tiny",
        task="flux_views",
        task_config=FluxViewsConfig(cache=("sheets",), parts="flux-parts", text_tokens=48),
        steps=4000,
        batch_size=16,
        lr=1e-3,
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
