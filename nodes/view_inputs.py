"""Inputs and outputs that all nodes with views have: one picture and mask a side, how the object is found in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .pictures import MASK_MODES, cut_out
from .schema import ADVANCED

if TYPE_CHECKING:
    import numpy as np

NAMES = ("front", "left", "back", "right")


def missing_side_inputs() -> list[io.Input]:
    """A picture of each side, for nodes that draw the sides which are not connected."""
    return [
        io.Image.Input(name, optional=True, tooltip=f"A picture of the {name}, if there is one; the rest is drawn.")
        for name in NAMES
    ]


def mask_inputs() -> list[io.Input]:
    """The mask of each side's picture."""
    return [
        io.Mask.Input(f"{name}_mask", optional=True, tooltip=f"Which part of the {name} picture is the object.")
        for name in NAMES
    ]


def foreground_inputs(where: str = "") -> list[io.Input]:
    """How the object is found, and what the masks show. where: put after "found" in the tooltip."""
    return [
        io.Combo.Input(
            "foreground",
            options=["auto", "alpha", "plain", "matting"],
            default="auto",
            tooltip=f"How the object is found{where}: by mask or transparency, on a plain background, or by a matting "
            "network (package rembg). auto takes the first that works.",
        ),
        io.Combo.Input(
            "mask_shows",
            options=list(MASK_MODES),
            default="auto",
            tooltip="What is white in the masks. Load Image marks the background, segmentation nodes the "
            "object; auto looks at the picture's border.",
            **ADVANCED,
        ),
    ]


def side_outputs() -> list[io.Output]:
    """Each side as a picture of its own."""
    return [
        io.Image.Output(f"{name}_view", display_name=name, tooltip=f"The prepared {name} view over white.")
        for name in NAMES
    ]


def connected_sides(given: dict[str, Any], mask_shows: str) -> dict[str, np.ndarray]:
    """The connected pictures by side, with masks as alpha; ``given``: a node's arguments by name."""
    return {
        name: cut_out(image, given.get(f"{name}_mask"), mask_shows, f"the {name} view")
        for name in NAMES
        if (image := given.get(name)) is not None
    }
