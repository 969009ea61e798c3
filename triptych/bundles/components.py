"""The network classes that a bundle may name, and nothing else: a bundle never chooses code to run."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from ..errors import TriptychError

CLASSES = {
    "SparseStructureEncoder": "triptych.models.structure_vae",
    "SparseStructureDecoder": "triptych.models.structure_vae",
    "SparseStructureFlowModel": "triptych.models.structure_flow",
    "LiftedStructureFlow": "triptych.models.lifting",
    "LiftedPublishedFlow": "triptych.models.lifted_published",
    "LiftedSLatFlow": "triptych.models.slat_lifting",
    "SLatEncoder": "triptych.models.slat_encoder",
    "SLatFlowModel": "triptych.models.slat_flow",
    "SLatMeshDecoder": "triptych.models.slat_decoder",
    "SLatGaussianDecoder": "triptych.models.slat_decoder",
    "SLatRadianceFieldDecoder": "triptych.models.slat_decoder",
}


def build_component(class_name: str, config: dict[str, Any]) -> nn.Module:
    """The network ``class_name`` with ``config`` as its constructor's arguments.

    Raises TriptychError for an unknown class and for arguments it does not take.
    """
    if class_name not in CLASSES:
        raise TriptychError(f"the bundle names the network class {class_name!r}, known are {', '.join(CLASSES)}")
    path = CLASSES[class_name].replace("triptych.", "", 1)
    cls = getattr(import_module(f"...{path}", __name__), class_name)
    try:
        return cls(**config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError, RuntimeError, MemoryError) as error:
        raise TriptychError(f"the bundle's config does not fit {class_name}: {error}") from error
