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
