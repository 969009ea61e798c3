"""Pictures of an object -> a prepared view set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from ..triptych.errors import TriptychError
from .pictures import cut_out, images, over
from .running import run
from .schema import ViewsSocket, schema
from .view_inputs import NAMES, connected_sides, foreground_inputs, mask_inputs

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..triptych.images.views import ViewSet

_SIDES = {
    "front": "The front view.",
    "left": "The view of the object's own left side (camera azimuth 90).",
    "back": "The back view.",
    "right": "The view of the object's own right side (camera azimuth 270).",
}


class PrepareViews(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        pictures = [io.Image.Input(name, optional=True, tooltip=_SIDES[name]) for name in NAMES]
        return schema(
            "PrepareViews",
            display_name="Prepare views",
            description="Cuts the object out of 1-4 pictures, or a view sheet, and brings all views to one scale.",
            search_aliases=["multiview", "remove background", "turnaround", "front left back right"],
            inputs=[
                *pictures,
                *mask_inputs(),
                io.Image.Input(
                    "sheet",
                    optional=True,
                    tooltip="All views in one picture, instead of the four above: 2 x 2 (front left / back right) or "
                    "a row (front, left, back, and perhaps right).",
                ),
                io.Combo.Input(
                    "layout", options=["auto", "grid", "row"], default="auto", tooltip="How the sheet is laid out."
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Side of a prepared view in pixels; the texture is taken from these.",
                ),
                *foreground_inputs(),
            ],
            outputs=[
                ViewsSocket.Output("views", tooltip="For Reconstruct and Texture mesh."),
                io.Image.Output("images", display_name="images", tooltip="The prepared views over white, a batch."),
                io.Mask.Output("masks", display_name="masks", tooltip="White where the object is, a batch."),
            ],
        )

    @classmethod
    def execute(cls, layout: str, size: int, foreground: str, mask_shows: str, **given: Any) -> io.NodeOutput:
        from ..triptych.images.views import prepare_views

        pictured = sources(given, layout, mask_shows)
        views = run(lambda reporter: prepare_views(pictured, size=size, foreground=foreground))
        pictures = over(views.images, "white")
        shown = ui.PreviewImage(row(views), cls=cls).as_dict() | {"text": ["\n".join(views.warnings)]}
        return io.NodeOutput(views, pictures, views.masks.clone(), ui=shown)


def sources(given: dict[str, Tensor | None], layout: str, mask_shows: str) -> dict[str, np.ndarray]:
    """The pictures by view, with masks as alpha. Raises TriptychError for none, and for a sheet besides pictures."""
    from ..triptych.images.sheets import split_sheet

    named = {name: image for name in NAMES if (image := given.get(name)) is not None}
    sheet = given.get("sheet")
    if sheet is not None:
        if named:
            raise TriptychError(f"both a sheet and the {', '.join(named)} view are connected: connect one or the other")
        return dict(split_sheet(cut_out(sheet, None, mask_shows, "the sheet"), layout))
    if not named:
        raise TriptychError("no picture is connected: connect at least the front view, or a view sheet")
    return connected_sides(given, mask_shows)


def row(views: ViewSet) -> Tensor:
    """The views side by side over grey, IMAGE (1, S, V S, 3)."""
    import torch

    return images(torch.cat([view[None] for view in over(views.images, "grey").permute(0, 3, 1, 2)], dim=3))
