"""Recipes of the structured-latent VAE and the mesh decoder; see trainer/recipes.py."""

from __future__ import annotations

from trainer.config import ParameterGroup, TrainConfig


def slat_vae_tiny() -> TrainConfig:
    """Encoder and mesh decoder of the tiny bundle, on attributes, from distances and points."""
    from trainer.tasks.slat_vae import SlatVaeConfig

    return TrainConfig(
        name="slat_vae_tiny",
        task="slat_vae",
        task_config=SlatVaeConfig(data="data", upsample_channels=(48,), tau=(0.9, 1.3), max_voxels=5000),
        steps=2000,
        batch_size=4,
        lr=3e-3,
        schedule="wsd",
        decay_share=0.25,
        warmup_steps=50,
        weight_decay=0.01,
        precision="bf16",
        ema_decay=0.998,
        checkpoint_every=250,
        validate_every=500,
        pictures_every=500,
    )


def slat_flow_tiny() -> TrainConfig:
    """The tiny lifted latent flow; needs `structure` and `predict` on the data, and an exported slat_vae_tiny."""
    from trainer.tasks.slat_flow import SlatFlowConfig

    return TrainConfig(
        name="slat_flow_tiny",
        task="slat_flow",
        task_config=SlatFlowConfig(data="data", vae="slat_vae_tiny"),
        steps=2500,
        batch_size=4,
        lr=8e-4,
        schedule="wsd",
        decay_share=0.3,
        warmup_steps=50,
        weight_decay=0.02,
        precision="bf16",
        ema_decay=0.995,
        checkpoint_every=250,
        validate_every=500,
        pictures_every=500,
    )


def mesh_decoder_tiny() -> TrainConfig:
    """The tiny mesh decoder once more, on frozen latents, with rendered losses added to the direct ones."""
    from trainer.losses import WeightConfig
    from trainer.tasks.mesh_decoder import MeshDecoderConfig
    from trainer.tasks.slat_vae import DIRECT_WEIGHTS

    rendered = {"mask": 1.0, "normal": 1.0, "color": 1.0, "cubes": 0.1}
    weights = {name: weight for name, weight in DIRECT_WEIGHTS.items() if name != "kl"} | rendered
    return TrainConfig(
        name="mesh_decoder_tiny",
        task="mesh_decoder",
        task_config=MeshDecoderConfig(
            data="data",
            encoder="slat_vae_tiny",
            start=True,
            tau=(0.9, 1.2),
            losses=WeightConfig(weights=weights, schedules={name: [(0, 0.0), (100, 1.0)] for name in rendered}),
        ),
        steps=500,
        batch_size=2,
        lr=3e-4,
        warmup_steps=20,
        weight_decay=0.01,
        precision="bf16",
        ema_decay=0.99,
        checkpoint_every=100,
        validate_every=100,
        pictures_every=100,
    )


def slat_vae_learned() -> TrainConfig:
    """slat_vae_tiny with loss weights by learned uncertainty, and in two stages: shape alone at first, then colour too.

    What the fixed weights weigh by hand (sdf in voxels against colours 0-1) finds its own balance; consistency and KL
    keep theirs, because they describe no data. The encoder thaws once the decoder can read it, at half the rate.
    """
    from dataclasses import replace

    from trainer.losses import WeightConfig
    from trainer.tasks.slat_vae import DIRECT_WEIGHTS

    base = slat_vae_tiny()
    shape, colour = ("sdf", "surface"), ("point_color", "point_normal")
    losses = WeightConfig(
        mode="learned",
        weights={name: 1.0 if name in shape + colour else weight for name, weight in DIRECT_WEIGHTS.items()},
        schedules={name: [(300, 0.0), (600, 1.0)] for name in colour},
        learned=shape + colour,
    )
    return replace(
        base,
        name="slat_vae_learned",
        task_config=replace(base.task_config, losses=losses),
        groups=(
            ParameterGroup("encoder.*", lr_factor=0.5, thaw_step=100, warmup_steps=100),
            ParameterGroup("loss_weights.*", lr_factor=3.0, warmup_steps=50, weight_decay=0.0),
        ),
    )


def mesh_decoder_staged() -> TrainConfig:
    """mesh_decoder_tiny in three stages: the layers after the torso on shape, then colours, then the torso as well.

    Rendered losses come in as they can be met: outlines and normals of a mesh that has a surface, colours last. The
    torso, which the latents were trained with, thaws at a quarter of the rate.
    """
    from dataclasses import replace

    from trainer.losses import WeightConfig

    base = mesh_decoder_tiny()
    weights = base.task_config.losses.weights
    early, late = [(50, 0.0), (150, 1.0)], [(150, 0.0), (250, 1.0)]
    schedules = {"mask": early, "normal": early, "cubes": early, "color": late, "point_color": late}
    return replace(
        base,
        name="mesh_decoder_staged",
        task_config=replace(base.task_config, losses=WeightConfig(weights=weights, schedules=schedules)),
        groups=(
            ParameterGroup("decoder.input_layer.*", lr_factor=0.25, thaw_step=-1),
            ParameterGroup("decoder.blocks.*", lr_factor=0.25, thaw_step=250, warmup_steps=50),
        ),
    )


def slat_flow_staged() -> TrainConfig:
    """slat_flow_tiny on the image encoder of the first stage: frozen, then thawed at a tenth of the rate.

    Until the flow has learned to read its features, gradients from random layers would only spoil the encoder.
    """
    from dataclasses import replace

    base = slat_flow_tiny()
    return replace(
        base,
        name="slat_flow_staged",
        task_config=replace(base.task_config, structure="triptych-tiny"),
        groups=(
            ParameterGroup("view_encoder.*", lr_factor=0.1, thaw_step=800, warmup_steps=200),
            ParameterGroup("view_geometry.*", lr_factor=0.1, thaw_step=800, warmup_steps=200),
        ),
    )


def slat_vae_large() -> TrainConfig:
    """The published encoder and mesh decoder's shape on cached DINOv2 features; needs GPUs."""
    from trainer.losses import WeightConfig
    from trainer.tasks.slat_vae import DIRECT_WEIGHTS, SlatVaeConfig

    weights = DIRECT_WEIGHTS | {"mask": 1.0, "depth": 10.0, "normal": 1.0, "color": 0.1, "cubes": 0.1}
    late = [(20_000, 0.0), (30_000, 1.0)]
    return TrainConfig(
        name="slat_vae_large",
        task="slat_vae",
        task_config=SlatVaeConfig(
            data="data",
            features="dinov2",
            encoder_channels=768,
            encoder_blocks=12,
            encoder_heads=12,
            decoder_channels=768,
            decoder_blocks=12,
            decoder_heads=12,
            upsample_channels=(192, 96),
            tau=(0.87, 1.2),
            perturbation=0.3,
            points=4096,
            losses=WeightConfig(
                weights=weights, schedules={name: late for name in ("mask", "depth", "normal", "color", "cubes")}
            ),
        ),
        steps=300_000,
        batch_size=32,
        accumulation=8,
        lr=1e-4,
        schedule="constant",
        precision="bf16",
        ema_decay=0.9999,
        workers=8,
        checkpoint_every=5000,
        validate_every=10_000,
        pictures_every=10_000,
    )


def mesh_decoder_large() -> TrainConfig:
    """The published mesh decoder on frozen latents with the published losses; needs GPUs and the lpips extra."""
    from trainer.tasks.mesh_decoder import MeshDecoderConfig

    return TrainConfig(
        name="mesh_decoder_large",
        task="mesh_decoder",
        task_config=MeshDecoderConfig(
            data="data",
            encoder="slat_vae_large",
            features="dinov2",
            decoder_channels=768,
            decoder_blocks=12,
            decoder_heads=12,
            upsample_channels=(192, 96),
            tau=(0.87, 1.0),
            perturbation=0.0,
            perceptual_weight=0.2,
        ),
        steps=300_000,
        batch_size=32,
        accumulation=8,
        lr=1e-4,
        schedule="constant",
        precision="bf16",
        ema_decay=0.9999,
        workers=8,
        checkpoint_every=5000,
        validate_every=10_000,
        pictures_every=10_000,
    )
