"""Recipes at the published shape, for GPUs; see trainer/recipes.py. `python -m trainer plan RECIPE` says which ones."""

from __future__ import annotations

from typing import Any

from trainer.config import ParameterGroup, TrainConfig


def structure_flow_large() -> TrainConfig:
    """The published structure flow, on cached latents and image tokens, with the published loss and rates."""
    from trainer.tasks.published_flow import PublishedFlowConfig

    return _published(
        "structure_flow_large",
        "trainer.tasks.published_flow:PublishedStructureFlowTask",
        PublishedFlowConfig(data="cache"),
    )


def slat_flow_large() -> TrainConfig:
    """The published latent flow, likewise; batches are balanced by voxels."""
    from trainer.tasks.published_flow import PublishedSlatFlowConfig

    return _published(
        "slat_flow_large",
        "trainer.tasks.published_flow:PublishedSlatFlowTask",
        PublishedSlatFlowConfig(data="cache"),
        max_cost=80_000,
    )


def _published(name: str, task: str, task_config: Any, **changes: Any) -> TrainConfig:
    """What the two published flows have in common."""
    return TrainConfig(
        name=name,
        task=task,
        task_config=task_config,
        steps=400_000,
        batch_size=256,
        accumulation=8,
        lr=1e-4,
        schedule="constant",
        warmup_steps=0,
        precision="bf16",
        ema_decay=0.9999,
        workers=8,
        checkpoint_every=5000,
        validate_every=10_000,
        memory_target=0.9,
        **changes,
    )


def large_multiview_lora() -> TrainConfig:
    """Lifting and adapters for the published structure flow, in two stages: the new layers learn alone at first, then
    the adapters thaw at half the rate. Data and bundle: --set task_config.data=... and task_config.bundle=..."""
    from trainer.lora import MultiviewLoraConfig

    return TrainConfig(
        name="large_multiview_lora",
        task="trainer.lora:MultiviewLoraTask",
        task_config=MultiviewLoraConfig(data="cache", bundle="microsoft/TRELLIS-image-large"),
        steps=20_000,
        batch_size=32,
        accumulation=8,
        lr=2e-4,
        schedule="cosine",
        warmup_steps=500,
        precision="bf16",
        ema_decay=0.999,
        workers=4,
        checkpoint_every=500,
        validate_every=1000,
        groups=(ParameterGroup("*.lora_?.weight", lr_factor=0.5, thaw_step=1000, warmup_steps=500),),
        memory_target=0.9,
    )
