"""A texture for a mesh, from views or from its vertex colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .clean import size_of
from .core_fields import lost
from .core_mesh import as_mesh
from .pictures import images
from .running import Reporter, run
from .schema import ADVANCED, MeshSocket, ViewsSocket, mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.mesh import Mesh
    from ..triptych.images.views import ViewSet

SOURCES = ("auto", "views", "vertex colours")


class TextureMesh(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "TextureMesh",
            display_name="Texture mesh",
            description="Unwraps a mesh and bakes a texture from prepared views, or from its vertex colours.",
            search_aliases=["unwrap", "uv", "bake", "project texture", "xatlas", "vertex color to texture"],
            inputs=[
                mesh_input("mesh", "The mesh to colour."),
                ViewsSocket.Input("views", optional=True, tooltip="What the object looks like, from Prepare views."),
                io.Combo.Input(
                    "source",
                    options=list(SOURCES),
                    default="auto",
                    tooltip="Where colours come from; auto takes the views where they are connected.",
                ),
                io.Int.Input(
                    "texture_size",
                    default=1024,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="Side of the texture in texels; 0 gives vertex colours from the views and no texture.",
                ),
                io.Combo.Input(
                    "unwrap",
                    options=["where needed", "always"],
                    default="where needed",
                    tooltip="always replaces UV that the mesh has already.",
                ),
                io.Combo.Input(
                    "fill",
                    options=["diffuse", "mirror"],
                    default="diffuse",
                    tooltip="What no view shows: diffuse continues the colours around it, mirror first takes the other "
                    "side of a symmetric object.",
                ),
                io.Boolean.Input(
                    "fit_to_views",
                    default=False,
                    tooltip="On: centre and scale the mesh for the projection, as for meshes from files. Off: the mesh "
                    "lies where Reconstruct puts it.",
                ),
                io.Int.Input(
                    "padding",
                    default=3,
                    min=0,
                    max=64,
                    tooltip="Texels between UV islands, when the mesh is unwrapped.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                MeshSocket.Output("textured_mesh", display_name="mesh", tooltip="The mesh with UV and texture."),
                io.Image.Output(
                    "texture", display_name="texture", tooltip="The base colour texture; black without one."
                ),
            ],
        )

    @classmethod
    def execute(cls, mesh: Any, views: ViewSet | None = None, **settings) -> io.NodeOutput:
        source = as_mesh(mesh)
        result = run(lambda reporter: textured(source, views, reporter, **settings))
        text = "\n".join([size_of(result), *lost(source, result)])
        return io.NodeOutput(result, texture_of(result), ui={"text": [text]})


def textured(
    mesh: Mesh,
    views: ViewSet | None,
    reporter: Reporter,
    *,
    source: str,
    texture_size: int,
    unwrap: str,
    fill: str,
    fit_to_views: bool,
    padding: int,
) -> Mesh:
    """The mesh with a texture, or vertex colours where ``texture_size`` is 0, in its own place and size."""
    from ..triptych.geometry.uv import unwrap as unwrapped
    from ..triptych.render.texture import bake_texture, bake_vertex_colours, vertex_colours_from_views

    if source == "views" and views is None:
        raise TriptychError(
            "the source is views, but none are connected: connect Prepare views, or choose another source"
        )
    use_views = views is not None and source != "vertex colours"
    if not use_views and texture_size == 0:
        raise TriptychError("the texture size is 0 and no views are connected: there is nothing to do, raise the size")
    if not use_views and mesh.colors is None:
        raise TriptychError(
            "the mesh has no vertex colours and no views are connected: connect views to take colours from"
        )
    placed = mesh.normalized() if fit_to_views else mesh
    if texture_size and (unwrap == "always" or mesh.uv is None):
        placed = unwrapped(placed, texture_size=texture_size, padding=padding, cancel=reporter.cancel)
    told = {"progress": lambda share: reporter.progress("texture", share), "cancel": reporter.cancel}
    if not use_views:
        made = bake_vertex_colours(placed, texture_size, **told)
    elif texture_size:
        made = bake_texture(placed, views, texture_size, fill=fill, **told)[0]
    else:
        made = vertex_colours_from_views(placed, views, fill=fill, **told)
    return made.replace(vertices=mesh.vertices)


def texture_of(mesh: Mesh):
    """The first base colour texture as IMAGE (1, H, W, 3); black and 64 x 64 without one."""
    import numpy as np

    for material in mesh.materials:
        if material.base_color_texture is not None:
            return images(material.base_color_texture[None, ..., :3].astype(np.float32) / 255)
    return images(np.zeros((1, 64, 64, 3), np.float32))
