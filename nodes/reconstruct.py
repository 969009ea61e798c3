"""Views -> mesh, with a picture of the voxels after every step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .running import Reporter, run
from .schema import ADVANCED, BundleSocket, MeshSocket, ViewsSocket, schema

if TYPE_CHECKING:
    from ..triptych.bundles.bundle import Bundle
    from ..triptych.images.views import ViewSet
    from ..triptych.pipelines.published import PublishedReconstruction, PublishedSettings
    from ..triptych.pipelines.reconstruct import Reconstruction, Settings
    from .bundles import LoadedBundle

SECOND_STAGE = {"bundle's own": None, "on": True, "off": False}
# As pipelines.published.MODES, which is too heavy to import here; auto takes the bundle's own way.
MULTI_VIEW = ("auto", "stochastic", "multidiffusion", "concat", "lifting")
WORK_BYTES = 1.5e9  # what sampling takes besides the weights


class Reconstruct(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Reconstruct",
            display_name="Reconstruct mesh",
            description="Makes a textured mesh from 1-4 prepared views.",
            search_aliases=["image to 3d", "image to mesh", "multiview to 3d", "generate mesh", "trellis"],
            inputs=[
                BundleSocket.Input("bundle", tooltip="The networks, from Load Triptych bundle."),
                ViewsSocket.Input("views", tooltip="What to reconstruct, from Prepare views."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise that sampling begins with: the same seed gives the same mesh.",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=1000, tooltip="Sampling steps; 0 takes the bundle's own number."
                ),
                io.Float.Input(
                    "guidance",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How strongly the views pull; -1 takes the bundle's own value. Above 0 every step takes "
                    "twice as long.",
                ),
                io.Int.Input(
                    "ensemble",
                    default=4,
                    min=1,
                    max=8,
                    tooltip="How many turned and mirrored copies of the object are reconstructed and averaged: more is "
                    "smoother and slower.",
                ),
                io.Int.Input(
                    "texture_size",
                    default=1024,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="Side of the texture in texels; 0 gives vertex colours and no texture.",
                ),
                io.Int.Input(
                    "target_faces",
                    default=12_000,
                    min=0,
                    max=1_000_000,
                    step=100,
                    tooltip="The mesh is decimated to about this many triangles; 0 keeps all.",
                ),
                io.Boolean.Input(
                    "keep_silhouettes",
                    default=True,
                    tooltip="Keep to the outlines of the given views: what reaches beyond one is cut away, and where "
                    "one shows something and nothing is, it is filled. Turn it off when the views do not agree with "
                    "each other.",
                    **ADVANCED,
                ),
                # Optional: workflows saved before these inputs existed stay valid.
                io.Combo.Input(
                    "second_stage",
                    options=list(SECOND_STAGE),
                    default=next(iter(SECOND_STAGE)),
                    optional=True,
                    tooltip="Whether the bundle's second stage refines the shape: bundle's own does where it has one, "
                    "off is faster and smoother.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "second_steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Sampling steps of the second stage; 0 takes the bundle's own number.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "second_guidance",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="How strongly the views pull in the second stage; -1 takes the bundle's own value.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "multi_view",
                    options=list(MULTI_VIEW),
                    default=MULTI_VIEW[0],
                    optional=True,
                    tooltip="What several views do. auto: what suits the bundle. Published bundles (pipeline.json) "
                    "take stochastic: in turn, one each step; multidiffusion: all, averaged at each step; concat: all "
                    "at once. Others, such as triptych-tiny, take lifting: each from its camera.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                MeshSocket.Output("mesh", display_name="mesh", tooltip="In model space, +Y up, facing +Z."),
                io.String.Output("report", display_name="report", tooltip="Sizes, times, settings used, warnings."),
            ],
        )

    @classmethod
    def execute(cls, bundle: LoadedBundle, views: ViewSet, **settings) -> io.NodeOutput:
        made = reconstruct(bundle, views, **settings)
        text = report(made)
        return io.NodeOutput(made.mesh, text, ui={"text": [text]})


def reconstruct(
    loaded: LoadedBundle,
    views: ViewSet | None,
    *,
    steps: int,
    guidance: float,
    second_stage: str = "bundle's own",
    second_steps: int = 0,
    second_guidance: float = -1.0,
    multi_view: str = "auto",
    **settings,
) -> Reconstruction | PublishedReconstruction:
    """``mesh_from_views``, or ``mesh_from_pictures`` of a published bundle, on ComfyUI's device.

    Steps 0, guidance below 0 and multi_view auto leave these to the bundle. Raises TriptychError for what the bundle
    cannot do.
    """
    from ..triptych.bundles.published import PublishedBundle
    from ..triptych.pipelines.reconstruct import Settings

    if views is None:
        raise TriptychError(
            "there are no views: Render views gives a set only for its four sides; prepare views instead"
        )
    wanted = Settings(
        steps=steps or None,
        guidance=None if guidance < 0 else guidance,
        second_stage=SECOND_STAGE[second_stage],
        slat_steps=second_steps or None,
        slat_guidance=None if second_guidance < 0 else second_guidance,
        **settings,
    )
    if isinstance(loaded.bundle, PublishedBundle):
        return _from_pictures(loaded, views, published_settings(loaded.bundle, wanted, multi_view))
    if multi_view not in ("auto", "lifting"):
        raise TriptychError(
            f"multi_view {multi_view} is for published bundles: {loaded.bundle.name} was trained to look at several "
            "views at once, so choose auto"
        )
    return _from_posed_views(loaded, views, wanted)


def _from_posed_views(loaded: LoadedBundle, views: ViewSet, wanted: Settings) -> Reconstruction:
    from ..triptych.pipelines.reconstruct import mesh_from_views
    from .voxel_picture import voxel_picture

    device = loaded.load(WORK_BYTES)

    def work(reporter: Reporter) -> Reconstruction:
        return mesh_from_views(
            views,
            loaded.bundle,
            wanted,
            device=device,
            progress=reporter.progress,
            preview=lambda field: reporter.picture(voxel_picture(field)),
            cancel=reporter.cancel,
        )

    return run(work)


def _from_pictures(loaded: LoadedBundle, views: ViewSet, wanted: PublishedSettings) -> PublishedReconstruction:
    """Published networks know no cameras: they see the views as plain pictures, only the texture is projected."""
    from ..triptych.images.published import published_pictures_of
    from ..triptych.pipelines.published import mesh_from_pictures

    device = loaded.load(WORK_BYTES)

    def work(reporter: Reporter) -> PublishedReconstruction:
        return mesh_from_pictures(
            published_pictures_of(views),
            loaded.bundle,
            wanted,
            device=device,
            texture_views=views if wanted.texture_size else None,
            progress=reporter.progress,
            cancel=reporter.cancel,
        )

    made = run(work)
    return replace(made, warnings=(*views.warnings, *made.warnings))


def published_settings(bundle: Bundle, wanted: Settings, multi_view: str) -> PublishedSettings:
    """The node's settings as a published bundle takes them. Raises TriptychError for what it cannot do."""
    from ..triptych.pipelines.published import PublishedSettings, Sampling

    if multi_view == "lifting":
        raise TriptychError(
            f"multi_view lifting is for bundles that were trained for it, such as triptych-tiny: {bundle.name} is a "
            f"published bundle, so choose one of {', '.join(mode for mode in MULTI_VIEW if mode != 'lifting')}"
        )
    if wanted.second_stage is False:
        raise TriptychError(
            f"second_stage off leaves {bundle.name} without a mesh, which a published bundle makes in its second "
            "stage: choose bundle's own"
        )
    return PublishedSettings(
        seed=wanted.seed,
        structure=Sampling(steps=wanted.steps, guidance=wanted.guidance),
        slat=Sampling(steps=wanted.slat_steps, guidance=wanted.slat_guidance),
        multi_view=PublishedSettings().multi_view if multi_view == "auto" else multi_view,
        texture_size=wanted.texture_size,
        target_faces=wanted.target_faces,
    )


def report(made: Reconstruction | PublishedReconstruction) -> str:
    from ..triptych.pipelines.published import PublishedReconstruction

    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.timings_s.items())
    lines = _published_lines(made) if isinstance(made, PublishedReconstruction) else _lines(made)
    return "\n".join(
        [f"{len(made.mesh.vertices):,} vertices, {len(made.mesh.faces):,} faces", *lines, times, *made.warnings]
    )


def _lines(made: Reconstruction) -> list[str]:
    used = made.settings
    lines = [f"seed {used.seed}, {used.steps} steps, guidance {used.guidance:g}, ensemble {used.ensemble}"]
    if used.second_stage:
        lines.append(f"second stage: {used.slat_steps} steps, guidance {used.slat_guidance:g}")
    return lines


def _published_lines(made: PublishedReconstruction) -> list[str]:
    used = made.settings
    first, second = used.structure, used.slat
    return [
        f"seed {used.seed}, {first.steps} steps, guidance {first.guidance:g}, multi_view {used.multi_view}",
        f"second stage: {second.steps} steps, guidance {second.guidance:g}",
        "a published bundle makes no use of ensemble and keep_silhouettes",
    ]
