"""Mesh repair and simplification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .core_fields import lost
from .core_mesh import as_mesh
from .running import Reporter, run
from .schema import ADVANCED, MeshSocket, mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.mesh import Mesh

REMESHERS = ("none", "voxels", "isotropic")


class CleanMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "CleanMesh",
            display_name="Clean mesh",
            description="Welds, drops crumbs, closes holes, remeshes, smooths and decimates, in this order.",
            search_aliases=["decimate", "simplify", "remesh", "repair", "fill holes", "smooth", "merge vertices"],
            inputs=[
                mesh_input("mesh", "The mesh to clean; it is not changed, the result is a new one."),
                io.Boolean.Input(
                    "weld", default=True, tooltip="Join vertices at one place, and drop faces without an area."
                ),
                io.Float.Input(
                    "weld_distance",
                    default=0.0,
                    min=0.0,
                    max=0.1,
                    step=0.0001,
                    round=0.00001,
                    tooltip="How far apart vertices may be to be joined, as a share of the longest side; 0 joins equal "
                    "ones only.",
                    **ADVANCED,
                ),
                io.Float.Input(
                    "min_part",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=0.0001,
                    tooltip="Loose parts below this share of the largest part's area are dropped; 0 keeps all.",
                ),
                io.Int.Input(
                    "fill_holes",
                    default=64,
                    min=0,
                    max=100_000,
                    tooltip="Holes with at most this many edges are closed; 0 closes none.",
                ),
                io.Combo.Input(
                    "remesh",
                    options=list(REMESHERS),
                    default="none",
                    tooltip="voxels: a closed surface around the solid, whatever the state of the mesh. isotropic: "
                    "even triangles on the same surface (needs the package pymeshlab). Both drop the texture and keep "
                    "vertex colours.",
                ),
                io.Int.Input(
                    "remesh_resolution",
                    default=96,
                    min=16,
                    max=256,
                    step=8,
                    tooltip="Voxels, or triangle edges, along the longest side.",
                ),
                io.Int.Input(
                    "smooth", default=0, min=0, max=200, tooltip="Smoothing passes that keep the volume (Taubin)."
                ),
                io.Int.Input(
                    "target_faces",
                    default=0,
                    min=0,
                    max=5_000_000,
                    step=100,
                    tooltip="Decimate to about this many triangles; 0 keeps all. Drops the texture, keeps vertex "
                    "colours: texture the mesh afterwards.",
                ),
            ],
            outputs=[
                MeshSocket.Output("clean_mesh", display_name="mesh", tooltip="The cleaned mesh."),
                io.String.Output("report", display_name="report", tooltip="Vertices and faces before and after."),
            ],
        )

    @classmethod
    def execute(cls, mesh: Any, **settings) -> io.NodeOutput:
        source, wanted = as_mesh(mesh), CleanSettings(**settings)
        result = run(lambda reporter: cleaned(source, wanted, reporter))
        text = f"{size_of(source)} before\n{size_of(result)} after"
        if source.uv is not None and result.uv is None:
            text += "\nthe texture is dropped: use Texture mesh next"
        text = "\n".join([text, *lost(source, result)])
        return io.NodeOutput(result, text, ui={"text": [text]})


@dataclass(frozen=True)
class CleanSettings:
    weld: bool = True
    weld_distance: float = 0.0
    min_part: float = 0.01
    fill_holes: int = 64
    remesh: str = "none"
    remesh_resolution: int = 96
    smooth: int = 0
    target_faces: int = 0


def cleaned(mesh: Mesh, wanted: CleanSettings, reporter: Reporter) -> Mesh:
    """The mesh after every step that the settings ask for."""
    from ..triptych.geometry import cleanup
    from ..triptych.geometry.remesh import isotropic_remesh, voxel_remesh
    from ..triptych.sampling.flow_euler import Cancelled

    steps = []
    if wanted.weld:
        longest = float((mesh.bounds[1] - mesh.bounds[0]).max())
        steps.append(lambda m: cleanup.remove_degenerate(cleanup.weld(m, wanted.weld_distance * longest)))
    if wanted.min_part > 0:
        steps.append(lambda m: cleanup.keep_components(m, min_share=wanted.min_part))
    if wanted.fill_holes:
        steps.append(lambda m: cleanup.fill_holes(m, max_edges=wanted.fill_holes))
    if wanted.remesh != "none":
        remesher = voxel_remesh if wanted.remesh == "voxels" else isotropic_remesh
        steps.append(lambda m: remesher(m, wanted.remesh_resolution))
    if wanted.smooth:
        steps.append(lambda m: cleanup.smooth(m, iterations=wanted.smooth))
    if wanted.target_faces:
        steps.append(lambda m: cleanup.decimate(m, wanted.target_faces))
    for done, step in enumerate(steps):
        if reporter.cancel():
            raise Cancelled("stopped while cleaning")
        mesh = step(mesh)
        reporter.progress("clean", (done + 1) / len(steps))
    return mesh


def size_of(mesh: Mesh) -> str:
    return f"{len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces"
