"""Recipes: Python functions that return a complete, typed TrainConfig.

A recipe registers with ``@recipe`` under its function's name; heavy imports (its task's config) go inside the function,
so that listing recipes stays fast. Outside this file a recipe is named ``module:function``.
"""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import TrainConfig
from trainer.names import import_named
from triptych.errors import TriptychError

Recipe = Callable[[], TrainConfig]
# Recipes of the second stage and of the published shape live in files of their own; naming them imports nothing.
RECIPES: dict[str, str] = {
    name: f"trainer.recipes_slat:{name}"
    for name in (
        "slat_vae_tiny",
        "slat_flow_tiny",
        "mesh_decoder_tiny",
        "slat_vae_large",
        "mesh_decoder_large",
        "slat_vae_learned",
        "mesh_decoder_staged",
        "slat_flow_staged",
    )
}
_LARGE = ("structure_flow_large", "slat_flow_large", "large_multiview_lora")
RECIPES |= {name: f"trainer.recipes_large:{name}" for name in _LARGE}
_FLUX_TINY = ("flux_vae_tiny", "flux_text_tiny", "proportions_tiny", "flux_views_tiny")
_FLUX = ("flux2_klein_4b_lora", "flux2_klein_4b_full", "flux2_klein_9b_lora", "flux1_kontext_lora")
RECIPES |= {name: f"trainer.recipes_flux:{name}" for name in (*_FLUX_TINY, *_FLUX)}
CHAIN_NAMES = ("flux_tiny",)  # recipes of several runs, see trainer/chain.py


def recipe(function: Recipe) -> Recipe:
    """Registers ``function`` under its own name."""
    name = function.__name__
    if name in RECIPES:
        raise ValueError(f"two recipes are called {name!r}: {RECIPES[name]} and {function.__module__}")
    RECIPES[name] = f"{function.__module__}:{name}"
    return function


def build_recipe(name: str) -> TrainConfig:
    """The config of a registered recipe or of ``module:function``."""
    if name in CHAIN_NAMES:
        raise TriptychError(f"{name} is several runs: train or resume it, or name one of them (flux_views_tiny)")
    config = import_named(name, RECIPES, "recipe")()
    if not isinstance(config, TrainConfig):
        raise TriptychError(f"recipe {name!r} returned {type(config).__name__}: a recipe returns a TrainConfig")
    return config


@recipe
def structure_vae_tiny() -> TrainConfig:
    """The tiny structure VAE: about half an hour on two CPU cores."""
    from trainer.tasks.structure_vae import StructureVaeConfig

    return TrainConfig(
        name="structure_vae_tiny",
        task="structure_vae",
        task_config=StructureVaeConfig(data="data"),
        steps=2000,
        batch_size=8,
        lr=2e-3,
        warmup_steps=50,
        weight_decay=0.01,
        precision="bf16",
        ema_decay=0.995,
        checkpoint_every=250,
        validate_every=250,
        pictures_every=500,
    )


@recipe
def structure_flow_tiny() -> TrainConfig:
    """The tiny lifted structure flow; longer is better (--set steps=...)."""
    from trainer.tasks.structure_flow import StructureFlowConfig

    return TrainConfig(
        name="structure_flow_tiny",
        task="structure_flow",
        task_config=StructureFlowConfig(data="data"),
        steps=6000,
        batch_size=16,
        lr=8e-4,
        schedule="wsd",
        decay_share=0.25,
        warmup_steps=150,
        weight_decay=0.02,
        precision="bf16",
        ema_decay=0.998,
        checkpoint_every=250,
        validate_every=500,
        pictures_every=500,
    )
