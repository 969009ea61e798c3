"""The main job: posed views of one object -> a textured mesh.

    views --lifted structure flow (and decoder)--> signed field --second stage or marching cubes--> mesh
       --views--> texture

A bundle with a second stage refines the field with structured latents (pipelines/structured.py); without one, the mesh
is the field's isosurface. A bundle with a structure decoder runs the first flow in its latent space; one without runs
it on the field itself. The given views' outlines hold (pipelines/outlines.py): no point of the field projects outside
of one, and none stays empty. Functions take progress and cancel callbacks and touch no files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from ..bundles.bundle import Bundle
from ..errors import TriptychError
from ..geometry.cameras import Camera
from ..geometry.cleanup import decimate, keep_components, smooth
from ..geometry.isosurface import isosurface
from ..geometry.mesh import Mesh
from ..geometry.voxels import turn_volume
from ..images.views import ViewSet
from ..memory import give_back
from ..models.lifting import LiftedStructureFlow, PosedViews
from ..models.slat_decoder import SLatMeshDecoder
from ..models.slat_lifting import LiftedSLatFlow
from ..render.texture import Fill, colour_from_views
from ..sampling.flow_euler import Cancelled, flow_euler_sample
from ..sparse.tensor import SparseTensor
from .outlines import Outlines, covered, outlines_of
from .structured import has_second_stage, latents_from_views, mesh_from_latents

VIEW_SIZE = 512  # pixels: what to prepare views at, for the texture's sake
HULL_SIZE = 256
DEFAULT_STEPS, DEFAULT_GUIDANCE, DEFAULT_RESCALE = 4, 0.0, 3.0

POSES = ((0, False), (0, True), (2, False), (2, True), (1, False), (1, True), (3, False), (3, True))  # turns, mirrored

Progress = Callable[[str, float], None]
Preview = Callable[[np.ndarray], None]
Cancel = Callable[[], bool]


@dataclass(frozen=True)
class Settings:
    """seed: of the noise. steps, guidance: of the flow; None takes the bundle's own. texture_size: texels per side, 0
    for vertex colours. target_faces: the mesh is decimated to about that many, 0 leaves it. keep_silhouettes: cut away
    what projects outside of a view, and fill where one shows something and nothing is. second_stage: refine the field
    with the bundle's second stage; None does where it has one. slat_steps, slat_guidance: of that stage's flow; None
    takes the bundle's own. ensemble: how many poses of the object (turned by quarters, mirrored; 1-8) are reconstructed
    together and averaged: the network is not exactly symmetric, and what it is sure of stays."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    texture_size: int = 1024
    target_faces: int = 12_000
    keep_silhouettes: bool = True
    ensemble: int = 4
    second_stage: bool | None = None
    slat_steps: int | None = None
    slat_guidance: float | None = None


@dataclass(frozen=True)
class Reconstruction:
    """mesh: textured, model space. field: (R, R, R) float32, voxels, positive inside. timings_s: seconds a stage.
    settings: as used, nothing left open."""

    mesh: Mesh
    field: np.ndarray
    timings_s: dict[str, float]
    warnings: tuple[str, ...]
    settings: Settings


def mesh_from_views(
    views: ViewSet,
    bundle: Bundle,
    settings: Settings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    preview: Preview | None = None,
    cancel: Cancel | None = None,
) -> Reconstruction:
    """Reconstructs the object that ``views`` (1-4, prepared) show.

    progress(stage, fraction) is called with the share of the whole that is done, 0-1. preview(field) is called after
    every step of the first stage with the solid it heads for, as ``structure_from_views`` says. cancel() is asked
    between steps, and while colours are baked; Cancelled is raised when it returns True. Raises TriptychError when
    nothing solid is found and for settings out of range.
    """
    settings = _resolved(settings or Settings(), bundle)
    clock = _Clock(progress or (lambda stage, fraction: None), cancel or (lambda: False))
    with clock.stage("structure", 0.0, 0.45):
        field, hull = _structure(views, bundle, settings, device, clock.step, preview, cancel)
    if settings.second_stage:
        with clock.stage("latents", 0.45, 0.6):
            latents = latents_of(views, field, bundle, settings, device=device, step=clock.step, cancel=cancel)
        with clock.stage("surface", 0.6, 0.75):
            mesh = surface_from_latents(latents, field, bundle, settings.target_faces, hull)
    else:
        with clock.stage("surface", 0.45, 0.6):
            mesh = surface_from_field(field, settings.target_faces)
    with clock.stage("texture", 0.75 if settings.second_stage else 0.6, 1.0):
        fill = fill_of(mesh, views)
        mesh = colour_from_views(
            mesh, views, texture_size=settings.texture_size, fill=fill, progress=clock.step, cancel=cancel
        )
    give_back()
    return Reconstruction(mesh, field, clock.seconds, views.warnings, settings)


def fill_of(mesh: Mesh, views: ViewSet) -> Fill:
    """How to colour what no view shows: with the colours that the second stage predicted, or spread from what is seen.

    From one view the prediction is no better than a guess, and a smooth one looks truer (SSIM of novel views .405
    against .374 on 20 validation objects, higher on every one of them).
    """
    return "diffuse" if mesh.colors is None or len(views.images) == 1 else "colors"


def structure_from_views(
    views: ViewSet,
    bundle: Bundle,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    step: Callable[[float], None] | None = None,
    preview: Preview | None = None,
    cancel: Cancel | None = None,
) -> np.ndarray:
    """The solid as (R, R, R) float32, about the signed distance in voxels near the surface, positive inside.

    step(fraction) is called after each sampling step. So is preview(field), with what the step foresees: (R, R, R)
    float32, positive inside, before outlines, averaging and smoothing.
    """
    return _structure(views, bundle, _resolved(settings, bundle), device, step, preview, cancel)[0]


def _structure(
    views: ViewSet,
    bundle: Bundle,
    settings: Settings,
    device: torch.device | str,
    step: Callable[[float], None] | None,
    preview: Preview | None,
    cancel: Cancel | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """``structure_from_views``'s field, and what the outlines allow of it, which is None where they are not kept.

    What a model drew is an opinion: it cuts nothing away, and every second pose is reconstructed from the given views
    alone.
    """
    flow, decoder = networks(bundle)
    flow, decoder = flow.to(device), decoder.to(device)
    poses = POSES[: settings.ensemble]
    every, given = (_network_views(one, flow.image_size, device) for one in (views, views.seen))
    posed = _posed([(every, given)[number % 2] for number in range(len(poses))], poses)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (len(poses), flow.in_channels, *[flow.resolution] * 3)
    noise = torch.randn(shape, generator=generator).to(device)
    low_precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=_has_fast_bfloat16(device))
    steps, guidance = settings.steps or DEFAULT_STEPS, settings.guidance or 0.0

    def after_step(done: int, total: int, foreseen: torch.Tensor) -> None:
        if step is not None:
            step(done / total)
        if preview is not None:  # the first pose is the object's own
            preview(decoder(flow.denormalize(foreseen[:1]))[0, 0].float().cpu().numpy())

    with torch.inference_mode(), low_precision:
        cond = flow.condition(posed)
        latent = flow_euler_sample(
            flow,
            noise,
            steps=steps,
            guidance=guidance,
            guidance_interval=(0.5, 1.0),
            rescale_t=_number(bundle, "rescale_t", DEFAULT_RESCALE),
            cond=cond,
            neg_cond=cond.null() if guidance else None,
            callback=after_step,
            cancel=cancel,
        ).samples
        parts = [decoder(part)[:, 0].float() for part in flow.denormalize(latent).split(2)]
        fields = torch.cat(parts).cpu().numpy()
    upright = [_restore(one, turns, mirror) for one, (turns, mirror) in zip(fields, poses, strict=True)]
    field, outlines = np.mean(upright, axis=0), None
    if settings.keep_silhouettes:
        outlines = outlines_of(_resize(views.seen.images, HULL_SIZE)[:, 3], views.seen.cameras, len(field))
    return _settled(field, bundle, outlines), None if outlines is None else outlines.allowed


def settled_field(
    field: np.ndarray, bundle: Bundle, masks: torch.Tensor | None, cameras: Sequence[Camera]
) -> np.ndarray:
    """What the network predicted (R, R, R), as the signed field whose zero is the surface, in voxels.

    masks (V, S, S): the views' alpha, whose outlines it is brought to keep; None leaves it as it is. Raises
    TriptychError for views that contradict each other.
    """
    return _settled(field, bundle, None if masks is None else outlines_of(masks, cameras, len(field)))


def _settled(field: np.ndarray, bundle: Bundle, outlines: Outlines | None) -> np.ndarray:
    # Blocks are predicted side by side: a little smoothing closes the steps between them. The mean of what is possible
    # shrinks what is thin, so the surface is taken below zero. Both were chosen on validation objects.
    field = field * _number(bundle, "voxels_per_unit", 1.0)
    field = ndimage.gaussian_filter(field, _number(bundle, "smoothing_voxels", 0.0)) - _number(bundle, "level", 0.0)
    return (field if outlines is None else np.minimum(covered(field, outlines), outlines.allowed)).astype(np.float32)


def networks(bundle: Bundle) -> tuple[LiftedStructureFlow, torch.nn.Module]:
    """The flow of a bundle and what turns its result into a field: the structure decoder, or nothing to do.

    Raises TriptychError when the bundle was not made for posed views, lacks a part, or lies in another frame.
    """
    flow, manifest = bundle.network("structure_flow"), bundle.manifest
    if not isinstance(flow, LiftedStructureFlow):
        raise TriptychError(
            f"the bundle {bundle.name} was not trained for posed views ({type(flow).__name__}): "
            "choose one with a LiftedStructureFlow, such as triptych-tiny"
        )
    if (manifest.up, manifest.front) != ("+Y", "+Z"):
        raise TriptychError(
            f"the bundle {bundle.name} has {manifest.up} up and {manifest.front} in front: only +Y, +Z are read yet"
        )
    is_field = flow.in_channels == 1 and not bundle.has("structure_decoder")
    return flow, torch.nn.Identity() if is_field else bundle.network("structure_decoder")


def _has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether bfloat16 is worth it: processors without instructions for it emulate them."""
    return torch.device(device).type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def surface_from_field(field: np.ndarray, target_faces: int = 0) -> Mesh:
    """The isosurface of a signed field, without floating crumbs, decimated to about ``target_faces`` (0: all)."""
    if not (field > 0).any():
        raise TriptychError("the network found nothing solid: check that each view shows the whole object, cut out")
    return _tidied(isosurface(field), 4, target_faces)


def latents_of(
    views: ViewSet,
    field: np.ndarray,
    bundle: Bundle,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    step: Callable[[float], None] | None = None,
    cancel: Cancel | None = None,
) -> SparseTensor:
    """The second stage's latents for the views and the first stage's ``field`` (R, R, R).

    step(fraction) is called after each sampling step. Raises TriptychError for a bundle without a second stage for
    posed views.
    """
    settings = _resolved(settings, bundle)
    flow = bundle.network("slat_flow")
    if not isinstance(flow, LiftedSLatFlow):
        raise TriptychError(
            f"the second stage of {bundle.name} was not trained for posed views ({type(flow).__name__}): "
            "choose a bundle with a LiftedSLatFlow, such as triptych-tiny"
        )
    flow = flow.to(device)
    posed = _network_views(views, flow.image_size, device)
    low_precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=_has_fast_bfloat16(device))
    with torch.inference_mode(), low_precision:
        return latents_from_views(
            posed,
            field,
            flow,
            band=_number(bundle, "active_band", 1.0),
            seed=settings.seed,
            steps=settings.slat_steps or 1,
            guidance=settings.slat_guidance or 0.0,
            rescale_t=_number(bundle, "slat_rescale_t", 3.0),
            draws=int(_number(bundle, "slat_draws", 1)),
            step=step,
            cancel=cancel,
        )


def surface_from_latents(
    latents: SparseTensor, field: np.ndarray, bundle: Bundle, target_faces: int = 0, hull: np.ndarray | None = None
) -> Mesh:
    """The mesh of the second stage, with vertex colours, without floating crumbs, decimated to ``target_faces``.

    hull (R, R, R): what the silhouettes allow (``hull_field``), by which the mesh is cut; None leaves it whole.
    """
    decoder = bundle.network("slat_decoder_mesh").to(latents.device)
    low_precision = torch.autocast(latents.device.type, torch.bfloat16, enabled=_has_fast_bfloat16(latents.device))
    with torch.inference_mode(), low_precision:
        allowed = None if hull is None else torch.from_numpy(hull).to(latents.device)
        known = torch.from_numpy(np.ascontiguousarray(field)).to(latents.device)
        trust = _number(bundle, "slat_trust", 1.0)
        mesh = mesh_from_latents(cast(SLatMeshDecoder, decoder), latents, known, allowed, trust)
    if not len(mesh.faces):
        raise TriptychError("the network found nothing solid: check that each view shows the whole object, cut out")
    # Where the views leave it open each voxel guesses for itself, and the surface is rough: these rounds cost no
    # accuracy on validation objects (none, 5 and 12 scored the same).
    return _tidied(mesh, 10, target_faces)


def _tidied(mesh: Mesh, smoothing: int, target_faces: int) -> Mesh:
    """Without floating crumbs, after rounds of smoothing, decimated to about ``target_faces`` (0: all)."""
    mesh = smooth(keep_components(mesh, min_share=0.02), iterations=smoothing)
    if target_faces and len(mesh.faces) > target_faces:
        mesh = decimate(mesh, target_faces)
    return mesh


def _network_views(views: ViewSet, size: int, device: torch.device | str) -> PosedViews:
    """A view set as a network with views of ``size`` pixels takes it."""
    drawn = tuple(azimuth in views.generated for azimuth in views.azimuths_deg)
    return PosedViews(_resize(views.images, size).to(device), tuple(views.cameras), (views.count,), drawn)


def _posed(sets: Sequence[PosedViews], poses: Sequence[tuple[int, bool]]) -> PosedViews:
    """The views of the object in each pose: mirrored in x first, then turned by quarters about +Y."""
    pictures, seen_from = [], []
    for views, (turns, mirror) in zip(sets, poses, strict=True):
        pictures.append(views.images.flip(-1) if mirror else views.images)
        for camera in views.cameras:
            azimuth = (-camera.azimuth_deg if mirror else camera.azimuth_deg) + 90.0 * turns
            seen_from.append(replace(camera, azimuth_deg=azimuth % 360))
    counts = tuple(len(views.cameras) for views in sets)
    return PosedViews(torch.cat(pictures), tuple(seen_from), counts, sum((views.drawn for views in sets), ()))


def _restore(volume: np.ndarray, turns: int, mirror: bool) -> np.ndarray:
    """A (R, R, R) volume of the object in a pose -> of the object itself."""
    volume = turn_volume(volume, -turns)
    return volume[::-1] if mirror else volume


def _resize(rgba: torch.Tensor, size: int) -> torch.Tensor:
    """(V, 4, S, S) straight alpha -> (V, 4, size, size), averaged with alpha as the weight."""
    if rgba.shape[-1] == size:
        return rgba
    weighted = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
    small = F.interpolate(weighted, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return torch.cat([small[:, :3] / small[:, 3:].clamp_min(1e-4), small[:, 3:]], dim=1).clamp(0, 1)


def _resolved(settings: Settings, bundle: Bundle) -> Settings:
    """The settings with nothing left open. Raises TriptychError for one out of range."""
    refines = has_second_stage(bundle) if settings.second_stage is None else settings.second_stage
    if refines and not has_second_stage(bundle):
        raise TriptychError(f"the bundle {bundle.name} has no second stage: choose another bundle, or leave it out")
    steps, guidance = _flow_settings(bundle, settings.steps, settings.guidance, "", DEFAULT_STEPS, DEFAULT_GUIDANCE)
    slat_steps, slat_guidance = _flow_settings(bundle, settings.slat_steps, settings.slat_guidance, "slat_", 1, 0.0)
    if not 1 <= settings.ensemble <= len(POSES):
        raise TriptychError(f"the ensemble must be 1-{len(POSES)} poses, got {settings.ensemble}")
    if settings.target_faces and settings.target_faces < 100:
        raise TriptychError(f"the target number of faces must be 0 (all) or at least 100, got {settings.target_faces}")
    return replace(
        settings,
        steps=steps,
        guidance=guidance,
        second_stage=refines,
        slat_steps=slat_steps,
        slat_guidance=slat_guidance,
    )


def _flow_settings(
    bundle: Bundle, steps: int | None, guidance: float | None, prefix: str, own_steps: int, own_guidance: float
) -> tuple[int, float]:
    """Steps and guidance of a flow: as given, else the bundle's, else ours. Raises TriptychError out of range."""
    steps = int(_number(bundle, f"{prefix}steps", own_steps)) if steps is None else steps
    guidance = _number(bundle, f"{prefix}guidance", own_guidance) if guidance is None else guidance
    which = "the second stage's " if prefix else ""
    if not 1 <= steps <= 1000:
        raise TriptychError(f"{which}steps must be 1-1000, got {steps}")
    if not 0 <= guidance <= 100:
        raise TriptychError(f"{which}guidance must be 0-100, got {guidance}")
    return steps, guidance


def _number(bundle: Bundle, key: str, default: float) -> float:
    """A sampling setting of the bundle's manifest. Raises TriptychError when it is no number."""
    value = bundle.manifest.sampling.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TriptychError(f"the bundle {bundle.name} has {key}={value!r} in its manifest: it must be a number")
    return float(value)


class _Clock:
    """Times the stages, and maps progress inside one to progress of the whole."""

    def __init__(self, progress: Progress, cancel: Cancel) -> None:
        self.progress, self.cancel = progress, cancel
        self.seconds: dict[str, float] = {}
        self._span = ("", 0.0, 1.0)

    @contextmanager
    def stage(self, name: str, begin: float, end: float) -> Iterator[None]:
        if self.cancel():
            raise Cancelled(f"stopped before the stage {name!r}")
        self._span = (name, begin, end)
        self.progress(name, begin)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 4)
        self.progress(name, end)

    def step(self, fraction: float) -> None:
        name, begin, end = self._span
        self.progress(name, begin + (end - begin) * fraction)
