"""Views -> mesh, with a picture of the voxels after every step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .running import Reporter, run
from .schema import ADVANCED, BundleSocket, MeshSocket, ViewsSocket, schema

if TYPE_CHECKING:
    from ..triptych.images.views import ViewSet
    from ..triptych.pipelines.reconstruct import Reconstruction
    from .bundles import LoadedBundle

SECOND_STAGE = {"bundle's own": None, "on": True, "off": False}
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
                    tooltip="Cut away what reaches beyond the outline of a view. Turn it off when the views do not "
                    "agree with each other.",
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
    **settings,
) -> Reconstruction:
    """``mesh_from_views`` on ComfyUI's device; steps 0 and guidance below 0 leave these to the bundle."""
    from ..triptych.pipelines.reconstruct import Settings, mesh_from_views
    from .voxel_picture import voxel_picture

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


def report(made: Reconstruction) -> str:
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.timings_s.items())
    used = made.settings
    lines = [
        f"{len(made.mesh.vertices):,} vertices, {len(made.mesh.faces):,} faces",
        f"seed {used.seed}, {used.steps} steps, guidance {used.guidance:g}, ensemble {used.ensemble}",
        *([f"second stage: {used.slat_steps} steps, guidance {used.slat_guidance:g}"] if used.second_stage else []),
        times,
        *made.warnings,
    ]
    return "\n".join(lines)
