"""Published TRELLIS checkpoints: one to four pictures of an object -> a mesh with vertex colours.

    pictures --DINOv2--> tokens --structure flow, decoder--> voxels --latent flow--> latents --mesh decoder--> mesh

The pictures are not posed, and the networks were trained with one. Several are used without further training:
`stochastic` shows them in turn, one per step; `multidiffusion` averages the velocities they lead to at every step;
`concat` gives the tokens of all to every step. `lifting` (features at their place in space) needs networks that were
trained for it, which published ones are not.

Stages load, run and leave memory one after another (see `memory`). A seed gives the noise that the published code draws
for it: both noises come from one generator on the CPU, the structure's first.

Frames: the mesh decoder's output stands upright along +Z and faces -Y, ours along +Y and faces +Z. `mesh_of_features`
turns it, (x, y, z) -> (x, z, -y), and nothing else does. Functions take progress and cancel callbacks and touch no
files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..bundles.bundle import Bundle
from ..bundles.published import PublishedBundle
from ..errors import TriptychError
from ..geometry.cleanup import decimate
from ..geometry.flexicubes import features_to_mesh
from ..geometry.mesh import Mesh
from ..images.views import MAX_VIEWS, ViewSet
from ..models.accelerate import compile_blocks, quantize_blocks
from ..models.image_conditioning import load_image_encoder, negative_condition
from ..models.structure_vae import occupied_coords
from ..render.texture import Fill, colour_from_views
from ..sampling.flow_euler import cycle_conditions, flow_euler_sample, multidiffusion
from ..sampling.slat import MAX_VOXELS, denormalize_slat, slat_noise
from ..sparse.tensor import SparseTensor
from .memory import StageMemory, Stages
from .reconstruct import Cancel, Progress, _Clock, _has_fast_bfloat16

MODES = ("stochastic", "multidiffusion", "concat", "lifting")
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COMPONENTS = ("structure_flow", "structure_decoder", "slat_flow", "slat_decoder_mesh")


@dataclass(frozen=True)
class Sampling:
    """Settings of one stage's sampler, as `flow_euler_sample` takes them; None takes the bundle's own."""

    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    rescale_t: float | None = None


@dataclass(frozen=True)
class PublishedSettings:
    """seed: of the noise. structure, slat: the samplers of the two stages. multi_view: what several pictures do, one of
    MODES. precision: of the torsos, one of PRECISIONS; None takes float16 on a GPU, on a CPU bfloat16 where it has
    instructions for it, else float32. image_encoder: as `load_image_encoder` takes it, None takes the bundle's.
    max_voxels: structures with more are refused. target_faces: the mesh is decimated to about that many, 0 leaves it.
    texture_size: texels per side of the texture from posed views, where these are given. keep_loaded: networks stay in
    memory for the next run. compiled: the flows' blocks through torch.compile. int8: the flows' matrices as 8-bit
    integers (torchao)."""

    seed: int = 0
    structure: Sampling = field(default_factory=Sampling)
    slat: Sampling = field(default_factory=Sampling)
    multi_view: str = "stochastic"
    precision: str | None = None
    image_encoder: str | None = None
    max_voxels: int = MAX_VOXELS
    target_faces: int = 0
    texture_size: int = 1024
    keep_loaded: bool = False
    compiled: bool = False
    int8: bool = False


@dataclass(frozen=True)
class PublishedReconstruction:
    """mesh: model space, +Y up, +Z front, vertex colours (or a texture, where views were given for it). coords: (N, 3)
    int32, the structure's voxels in the networks' own frame. timings_s: seconds a stage. memory: what each stage took.
    settings: as used, nothing left open."""

    mesh: Mesh
    coords: np.ndarray
    timings_s: dict[str, float]
    memory: tuple[StageMemory, ...]
    warnings: tuple[str, ...]
    settings: PublishedSettings


def mesh_from_pictures(
    pictures: Tensor,
    bundle: Bundle,
    settings: PublishedSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    encoder: nn.Module | None = None,
    texture_views: ViewSet | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> PublishedReconstruction:
    """Reconstructs the object that ``pictures`` (V, 3, S, S) show; see `images.published.published_pictures`.

    encoder: (V, 3, S, S) -> (V, tokens, channels), None loads the one that the settings or the bundle name.
    texture_views: posed views from which a texture is made; the mesh is then scaled to a longest side of 1.
    progress(stage, fraction) is called with the share of the whole that is done, 0-1. cancel() is asked between steps;
    Cancelled is raised when it returns True. Raises TriptychError for settings out of range, a bundle without a needed
    part, an empty structure, one of more than max_voxels voxels, and when memory runs out.
    """
    published, settings = _checked(pictures, bundle, settings or PublishedSettings(), device)
    dtype = PRECISIONS[str(settings.precision)]
    clock = _Clock(progress or (lambda stage, fraction: None), cancel or (lambda: False))
    stages = Stages(device, keep_loaded=settings.keep_loaded and not (settings.int8 or settings.compiled))
    generator = torch.Generator().manual_seed(settings.seed)
    notes = _notes(len(pictures), settings)

    def flow(name: str) -> Callable[[], nn.Module]:
        return lambda: _adapted(published.network(name, dtype), settings)

    def dropped(name: str) -> Callable[[], None]:
        return lambda: published.release(name)

    with torch.no_grad():
        with clock.stage("image encoder", 0.0, 0.05):
            name = settings.image_encoder or published.image_cond_model
            with stages.run("image encoder", lambda: encoder or load_image_encoder(name)) as network:
                tokens = network(pictures.to(device)).float()
        with (
            clock.stage("structure", 0.05, 0.4),
            stages.run("structure flow", flow("structure_flow"), dropped("structure_flow")) as network,
        ):
            latent = sample_structure(network, tokens, settings, generator, step=clock.step, cancel=cancel)
        with (
            clock.stage("structure decoder", 0.4, 0.45),
            stages.run(
                "structure decoder",
                lambda: published.network("structure_decoder", dtype),
                dropped("structure_decoder"),
            ) as network,
        ):
            coords = occupied_coords(network(latent))
        with (
            clock.stage("latents", 0.45, 0.85),
            stages.run("latent flow", flow("slat_flow"), dropped("slat_flow")) as network,
        ):
            slat = sample_slat(network, coords, tokens, settings, generator, step=clock.step, cancel=cancel)
            assert published.slat_normalization is not None
            slat = denormalize_slat(slat, published.slat_normalization.mean, published.slat_normalization.std)
        with (
            clock.stage("mesh decoder", 0.85, 0.93),
            stages.run(
                "mesh decoder",
                lambda: published.network("slat_decoder_mesh", dtype),
                dropped("slat_decoder_mesh"),
            ) as network,
        ):
            features = network(slat)
        with clock.stage("mesh", 0.93, 1.0), stages.run("mesh"):
            mesh = _finished(mesh_of_features(features), settings, texture_views, clock.step, cancel)
    where = coords[:, 1:].cpu().numpy()
    return PublishedReconstruction(mesh, where, clock.seconds, tuple(stages.memory), notes, settings)


def sample_structure(
    flow: nn.Module,
    tokens: Tensor,
    settings: PublishedSettings,
    generator: torch.Generator,
    *,
    step: Callable[[float], None] | None = None,
    cancel: Cancel | None = None,
) -> Tensor:
    """The structure latent (1, C, R, R, R) that pictures with these tokens (V, M, Cc) lead to.

    settings: with every field of `structure` given. step(fraction) is called after each sampling step.
    """
    _check_channels(flow, tokens)
    net = cast(Any, flow)
    noise = torch.randn(1, net.in_channels, *[net.resolution] * 3, generator=generator).to(tokens.device)
    return _sample(flow, noise, tokens, settings.multi_view, settings.structure, step, cancel)


def sample_slat(
    flow: nn.Module,
    coords: Tensor,
    tokens: Tensor,
    settings: PublishedSettings,
    generator: torch.Generator,
    *,
    step: Callable[[float], None] | None = None,
    cancel: Cancel | None = None,
) -> SparseTensor:
    """Structured latents (N, C) on voxels coords (N, 4) int32, on the flow's own scale (see `denormalize_slat`).

    Otherwise as `sample_structure`. Raises TriptychError for no voxels, and for more than max_voxels.
    """
    _check_channels(flow, tokens)
    net = cast(Any, flow)
    limit = settings.max_voxels
    noise = slat_noise(coords, net.in_channels, net.resolution, batch_size=1, generator=generator, max_voxels=limit)
    return _sample(flow, noise, tokens, settings.multi_view, settings.slat, step, cancel)


def mesh_of_features(features: SparseTensor) -> Mesh:
    """The mesh that the mesh decoder's features (N, 101 or 53) of one sample describe, turned into our frame.

    Colours are the predicted ones, sRGB; the predicted normals are left out, the faces have their own.
    Raises TriptychError when they describe no surface.
    """
    assert features.resolution is not None
    found = features_to_mesh(features.coords[:, 1:], features.feats.float(), features.resolution)
    if not len(found.faces):
        raise TriptychError("the mesh decoder describes no surface: check the pictures' masks, or try another seed")
    colors = None
    if found.vertex_attrs is not None:
        rgb = found.vertex_attrs[:, :3].float().cpu().numpy()
        colors = np.concatenate([rgb, np.ones_like(rgb[:, :1])], axis=1)
    return Mesh(turned_upright(found.vertices.float().cpu().numpy()), found.faces.cpu().numpy(), colors=colors)


def turned_upright(vertices: np.ndarray) -> np.ndarray:
    """(V, 3) in the published frame (+Z up, -Y front) -> ours (+Y up, +Z front): a quarter turn about x."""
    x, y, z = vertices.T
    return np.stack([x, z, -y], axis=1)


# ---- settings


def _checked(
    pictures: Tensor, bundle: Bundle, settings: PublishedSettings, device: torch.device | str
) -> tuple[PublishedBundle, PublishedSettings]:
    """The bundle and the settings with nothing left open; TriptychError before anything is loaded."""
    if not isinstance(bundle, PublishedBundle):
        raise TriptychError(f"the bundle {bundle.name} is not a published one (pipeline.json): use mesh_from_views")
    if pictures.dim() != 4 or not 1 <= len(pictures) <= MAX_VIEWS:
        raise TriptychError(f"pictures are {tuple(pictures.shape)}: give (V, 3, S, S) with V from 1 to {MAX_VIEWS}")
    if settings.multi_view not in MODES:
        raise TriptychError(f"unknown multi-view mode {settings.multi_view!r}: choose one of {', '.join(MODES)}")
    if settings.multi_view == "lifting":
        raise TriptychError(
            f"the bundle {bundle.name} was not trained for lifting: use {', '.join(MODES[:3])}, or a bundle that lifts "
            "(triptych-tiny, or one fine-tuned by the recipe large_multiview_lora)"
        )
    missing = [name for name in COMPONENTS if not bundle.has(name)]
    if missing:
        raise TriptychError(f"the bundle {bundle.name} has no {', '.join(missing)}: fetch the whole folder again")
    precision = settings.precision
    if precision is None:
        on_gpu, fast = torch.device(device).type != "cpu", _has_fast_bfloat16(device)
        precision = "float16" if on_gpu else "bfloat16" if fast else "float32"
    if precision not in PRECISIONS:
        raise TriptychError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if settings.max_voxels < 1 or settings.target_faces < 0 or settings.texture_size < 0:
        raise TriptychError("max_voxels must be 1 or more, target_faces and texture_size 0 or more: correct them")
    stated = bundle.manifest.sampling
    return bundle, replace(
        settings,
        structure=_sampling(settings.structure, stated.get("structure", {}), "structure"),
        slat=_sampling(settings.slat, stated.get("slat", {}), "slat"),
        precision=precision,
    )


def _sampling(asked: Sampling, stated: dict[str, Any], name: str) -> Sampling:
    chosen = {f.name: getattr(asked, f.name) for f in fields(asked)}
    defaults = {"steps": 25, "guidance": 5.0, "guidance_interval": (0.5, 1.0), "rescale_t": 3.0}
    chosen = {key: stated.get(key, defaults[key]) if value is None else value for key, value in chosen.items()}
    if not 1 <= chosen["steps"] <= 1000:
        raise TriptychError(f"steps of {name} must be 1-1000, got {chosen['steps']}")
    if not 0 <= chosen["guidance"] <= 100:
        raise TriptychError(f"guidance of {name} must be 0-100, got {chosen['guidance']}")
    return Sampling(**chosen)


def _notes(views: int, settings: PublishedSettings) -> tuple[str, ...]:
    steps = min(cast(int, settings.structure.steps), cast(int, settings.slat.steps))
    if settings.multi_view == "stochastic" and views > steps:
        return (f"{views} pictures take turns in {steps} steps, so some are never seen: take more steps",)
    return ()


def _check_channels(flow: nn.Module, tokens: Tensor) -> None:
    wanted = cast(Any, flow).blocks[0].cross_attn.to_kv.in_features
    if tokens.shape[-1] != wanted:
        raise TriptychError(
            f"the image encoder gives {tokens.shape[-1]} channels, the flow was trained with {wanted}: "
            "use the encoder that the bundle names"
        )


# ---- sampling and finishing


def _sample(
    flow: nn.Module,
    noise: Any,
    tokens: Tensor,
    mode: str,
    sampling: Sampling,
    step: Callable[[float], None] | None,
    cancel: Cancel | None,
) -> Any:
    views = list(tokens.split(1))
    negative = negative_condition(tokens[:1])
    model, cond = flow, cast(Any, cycle_conditions(views))
    if mode == "multidiffusion":
        model, cond = cast(Any, multidiffusion(flow)), views
    elif mode == "concat":
        cond = tokens.flatten(0, 1)[None]
    return flow_euler_sample(
        model,
        noise,
        steps=cast(int, sampling.steps),
        guidance=cast(float, sampling.guidance),
        guidance_interval=cast("tuple[float, float]", sampling.guidance_interval),
        rescale_t=cast(float, sampling.rescale_t),
        cond=cond,
        neg_cond=negative,
        callback=(lambda done, total, _: step(done / total)) if step else None,
        cancel=cancel,
    ).samples


def _adapted(flow: nn.Module, settings: PublishedSettings) -> nn.Module:
    if settings.int8:
        quantize_blocks(flow)
    if settings.compiled:
        compile_blocks(flow)
    return flow


def _finished(
    mesh: Mesh,
    settings: PublishedSettings,
    views: ViewSet | None,
    step: Callable[[float], None],
    cancel: Cancel | None,
) -> Mesh:
    if settings.target_faces and len(mesh.faces) > settings.target_faces:
        mesh = decimate(mesh, settings.target_faces)
    if views is not None:
        fill: Fill = "diffuse" if mesh.colors is None else "colors"  # what no view shows keeps its predicted colour
        mesh = colour_from_views(
            mesh.normalized(), views, texture_size=settings.texture_size, fill=fill, progress=step, cancel=cancel
        )
    return mesh
