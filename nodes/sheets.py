"""View sheets: several views in one picture, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .pictures import BACKGROUNDS, images, picture
from .schema import ViewsSocket, schema
from .view_inputs import NAMES

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..triptych.images.views import ViewSet


class SplitViewSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "SplitViewSheet",
            display_name="Split view sheet",
            description="Cuts a sheet of views into its pictures: a 2 x 2 grid (front left / back right) or a row.",
            search_aliases=["character sheet", "turnaround", "crop grid"],
            inputs=[
                io.Image.Input("sheet", tooltip="One picture that shows three or four views of equal size."),
                io.Combo.Input(
                    "layout",
                    options=["auto", "grid", "row"],
                    default="auto",
                    tooltip="grid: front and left above, back and right below. row: front, left, back (and right) side "
                    "by side. auto: three or four times as wide as high is a row.",
                ),
            ],
            outputs=[
                io.Image.Output(name, display_name=name, tooltip=f"The {name} view (the object's own left and right).")
                for name in NAMES
            ],
        )

    @classmethod
    def execute(cls, sheet: Tensor, layout: str) -> io.NodeOutput:
        from ..triptych.images.sheets import split_sheet

        channels = sheet.shape[-1]
        found = split_sheet(picture(sheet, "the sheet"), layout)
        # A row of three has no right view: the socket then carries nothing, which an optional input understands.
        cut = (images(found[name][None, ..., :channels]) if name in found else None for name in NAMES)
        return io.NodeOutput(*cut)


class JoinViewSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "JoinViewSheet",
            display_name="Join view sheet",
            description="Lays prepared views, or pictures of one size, side by side in one picture.",
            search_aliases=["contact sheet", "image grid", "character sheet"],
            inputs=[
                ViewsSocket.Input("views", optional=True, tooltip="A prepared set with all views of the layout."),
                *(io.Image.Input(name, optional=True, tooltip=f"The {name} view, instead of a set.") for name in NAMES),
                io.Combo.Input(
                    "layout",
                    options=["grid", "row"],
                    default="grid",
                    tooltip="grid: front left / back right. row: front, left, back, and right where there is one.",
                ),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    default="white",
                    tooltip="What transparent parts are laid on; the mask keeps where the object is.",
                ),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="One picture with all views."),
                io.Mask.Output("mask", display_name="mask", tooltip="White where an object is."),
            ],
        )

    @classmethod
    def execute(
        cls, layout: str, background: str, views: ViewSet | None = None, **pictures: Tensor | None
    ) -> io.NodeOutput:
        from ..triptych.images.sheets import flatten, join_sheet

        sheet = join_sheet(views if views is not None else _named(pictures), layout)
        return io.NodeOutput(images(flatten(sheet, BACKGROUNDS[background])[None]), images(sheet[None, ..., 3]))


def _named(pictures: dict[str, Tensor | None]) -> dict[str, np.ndarray]:
    named = {name: picture(image, f"the {name} view") for name, image in pictures.items() if image is not None}
    if not named:
        raise TriptychError("nothing is connected: connect a set of views, or the front, left, back and right pictures")
    return named
