"""Views -> mesh, with a picture of the voxels after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .running import Reporter, run
from .schema import ADVANCED, BundleSocket, MeshSocket, ViewsSocket, schema

if TYPE_CHECKING:
    import numpy as np

    from ..triptych.bundles.bundle import Bundle
    from ..triptych.images.views import ViewSet
    from ..triptych.pipelines.reconstruct import Reconstruction
    from .bundles import LoadedBundle

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
    loaded: LoadedBundle, views: ViewSet | None, *, steps: int, guidance: float, **settings
) -> Reconstruction:
    """``mesh_from_views`` on ComfyUI's device; steps 0 and guidance below 0 leave these to the bundle."""
    from ..triptych.pipelines.reconstruct import Settings, mesh_from_views

    if views is None:
        raise TriptychError(
            "there are no views: Render views gives a set only for its four sides; prepare views instead"
        )
    wanted = Settings(steps=steps or None, guidance=None if guidance < 0 else guidance, **settings)
    device = loaded.load(WORK_BYTES)

    def work(reporter: Reporter) -> Reconstruction:
        with shown_steps(loaded.bundle, reporter):
            return mesh_from_views(
                views, loaded.bundle, wanted, device=device, progress=reporter.progress, cancel=reporter.cancel
            )

    return run(work)


@contextmanager
def shown_steps(bundle: Bundle, reporter: Reporter) -> Iterator[None]:
    """Sends a picture of the solid that each evaluation of the structure flow foresees."""
    from .voxel_picture import voxel_picture

    flow = bundle.network("structure_flow") if bundle.has("structure_flow") else None
    if flow is None or not hasattr(flow, "denormalize"):  # not a flow that works on volumes
        yield
        return
    seen: set[float] = set()

    def after(_, inputs, velocity) -> None:
        x, t = inputs[0], float(inputs[1][0]) / 1000
        if t in seen:  # the second evaluation of a guided step
            return
        seen.add(t)
        field = foreseen(flow.denormalize, decoder, x[:1], velocity[:1], t)
        reporter.picture(voxel_picture(field))

    decoder = bundle.network("structure_decoder") if bundle.has("structure_decoder") else None
    handle = flow.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def foreseen(denormalize: Callable, decoder: Callable | None, x, velocity, t: float) -> np.ndarray:
    """The field (R, R, R) that the flow heads for: x minus t times the velocity, decoded."""
    latent = denormalize(x - t * velocity)
    return (latent if decoder is None else decoder(latent))[0, 0].float().cpu().numpy()


def report(made: Reconstruction) -> str:
    times = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in made.timings_s.items())
    used = made.settings
    lines = [
        f"{len(made.mesh.vertices):,} vertices, {len(made.mesh.faces):,} faces",
        f"seed {used.seed}, {used.steps} steps, guidance {used.guidance:g}, ensemble {used.ensemble}",
        times,
        *made.warnings,
    ]
    return "\n".join(lines)
