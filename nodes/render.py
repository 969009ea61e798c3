"""Pictures of a mesh: a turntable, the view rig's four sides, or chosen directions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .core_mesh import as_mesh
from .pictures import BACKGROUNDS, images, over
from .running import Reporter, run
from .schema import ADVANCED, ViewsSocket, mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.cameras import Camera
    from ..triptych.geometry.mesh import Mesh
    from ..triptych.render.views import RenderedViews

CAMERAS = ("turntable", "four sides", "azimuths")
MODES = ("shaded", "albedo", "clay")
MAX_PICTURES = 360
MARGIN = 1.06


class RenderViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "RenderViews",
            display_name="Render views",
            description="Draws a mesh from all around, with masks, normals and depth. Its four sides are a view set.",
            search_aliases=["turntable", "render mesh", "depth map", "normal map", "3d to image"],
            inputs=[
                mesh_input("mesh", "The mesh to draw."),
                io.Combo.Input(
                    "cameras",
                    options=list(CAMERAS),
                    default="turntable",
                    tooltip="turntable: even steps all around. four sides: front, left, back, right as Reconstruct "
                    "expects them. azimuths: the directions below.",
                ),
                io.Int.Input("count", default=8, min=1, max=MAX_PICTURES, tooltip="Pictures of the turntable."),
                io.String.Input(
                    "azimuths",
                    default="0, 45, 90, 180, 270",
                    tooltip="Degrees, separated by commas: 0 front, 90 the object's left, 180 back, 270 its right.",
                ),
                io.Float.Input(
                    "elevation",
                    default=15.0,
                    min=-89.0,
                    max=89.0,
                    step=1.0,
                    tooltip="Degrees above the horizon; the four sides are always level.",
                ),
                io.Int.Input("size", default=512, min=16, max=4096, step=16, tooltip="Side of a picture in pixels."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="shaded",
                    tooltip="shaded: lit. albedo: the bare colours. clay: the form alone.",
                ),
                io.Combo.Input(
                    "background", options=list(BACKGROUNDS), default="white", tooltip="What lies behind the object."
                ),
                io.Float.Input(
                    "field_of_view",
                    default=0.0,
                    min=0.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Degrees of a perspective camera; 0 is orthographic. The four sides are orthographic.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "normalize",
                    default=True,
                    tooltip="Centre the mesh and scale it to the frame. Off: draw it where it lies.",
                    **ADVANCED,
                ),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="One picture per camera, a batch."),
                io.Mask.Output("masks", display_name="masks", tooltip="White where the object is."),
                io.Image.Output(
                    "normals", display_name="normals", tooltip="Normals in the camera's frame, as colours."
                ),
                io.Image.Output("depth", display_name="depth", tooltip="Near is white, the background black."),
                ViewsSocket.Output(
                    "views", display_name="views", tooltip="The four sides as a view set; nothing for other cameras."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        mesh: Any,
        cameras: str,
        count: int,
        azimuths: str,
        elevation: float,
        size: int,
        mode: str,
        background: str,
        field_of_view: float,
        normalize: bool,
    ) -> io.NodeOutput:
        from ..triptych.images.views import ViewSet
        from ..triptych.render.views import picture

        source = as_mesh(mesh)
        source = source.normalized() if normalize else source
        seen_from = chosen_cameras(source, cameras, count, azimuths, elevation, field_of_view)
        drawn = run(lambda reporter: rendered(source, seen_from, size, reporter))
        rgba, normals, depth = (
            picture(drawn, seen_from, kind, follow_camera=True) for kind in (mode, "normal", "depth")
        )
        views = ViewSet.from_rig_renders(rgba, (0, 90, 180, 270)) if cameras == "four sides" else None
        maps = [images(one[:, :3] * one[:, 3:]) for one in (normals, depth)]
        return io.NodeOutput(over(rgba, background), rgba[:, 3].clone(), *maps, views)


def chosen_cameras(
    mesh: Mesh, kind: str, count: int, azimuths: str, elevation_deg: float, fov_deg: float
) -> list[Camera]:
    """Cameras whose common frame holds the mesh; the rig's own for "four sides". Raises TriptychError for azimuths that
    are no numbers."""
    from ..triptych.geometry.cameras import Camera, rig_cameras

    if kind == "four sides":
        return rig_cameras()
    degrees = [360.0 * i / count for i in range(count)] if kind == "turntable" else parsed_azimuths(azimuths)
    cameras = [Camera(azimuth, elevation_deg, radius=2.0, half_extent=1.0) for azimuth in degrees]
    return framed(mesh, cameras, fov_deg)


def parsed_azimuths(text: str) -> list[float]:
    words = [word for word in text.replace(";", ",").replace(" ", ",").split(",") if word]
    try:
        degrees = [float(word) for word in words]
    except ValueError:
        degrees = [math.nan]
    if not degrees or not all(math.isfinite(value) for value in degrees) or len(degrees) > MAX_PICTURES:
        raise TriptychError(
            f"the azimuths are {text[:80]!r}: write 1-{MAX_PICTURES} numbers of degrees, as in 0, 90, 180"
        )
    return degrees


def framed(mesh: Mesh, cameras: list[Camera], fov_deg: float) -> list[Camera]:
    """The cameras with one frame, or one distance, from which all of them see the whole mesh."""
    import numpy as np
    import torch

    vertices = torch.tensor(mesh.vertices[np.unique(mesh.faces)])
    reach = float(vertices.norm(dim=1).max())
    if fov_deg:
        distance = MARGIN * reach / math.sin(math.radians(fov_deg) / 2)
        return [replace(camera, radius=distance, half_extent=None, fov_deg=fov_deg) for camera in cameras]
    half = MARGIN * max(float(camera.project(vertices)[0].abs().max()) for camera in cameras)
    return [replace(camera, radius=max(2.0, 2 * reach), half_extent=half) for camera in cameras]


def rendered(mesh: Mesh, cameras: list[Camera], size: int, reporter: Reporter) -> RenderedViews:
    """``render_views`` camera by camera, so that it can be watched and stopped."""
    import torch

    from ..triptych.render.views import RenderedViews, render_views
    from ..triptych.sampling.flow_euler import Cancelled

    parts = []
    for done, camera in enumerate(cameras):
        if reporter.cancel():
            raise Cancelled("stopped while rendering")
        parts.append(render_views(mesh, [camera], size))
        reporter.progress("render", (done + 1) / len(cameras))
    names = ("albedo", "alpha", "normal", "depth")
    return RenderedViews(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
