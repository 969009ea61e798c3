"""Sockets, and what ComfyUI's versions disagree about, in one place.

A socket type of ours carries a value of the library: TRIPTYCH_MESH a ``geometry.mesh.Mesh``, TRIPTYCH_VIEWS an
``images.views.ViewSet``, TRIPTYCH_BUNDLE a ``bundles.LoadedBundle``. All are immutable, so ComfyUI may cache them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence

from comfy_api.latest import io

from ..triptych.errors import TriptychError

CATEGORY = "Triptych"
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}(@[A-Za-z0-9][\w./-]{{0,199}})?")

BundleSocket = io.Custom("TRIPTYCH_BUNDLE")
ViewsSocket = io.Custom("TRIPTYCH_VIEWS")
MeshSocket = io.Custom("TRIPTYCH_MESH")

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}
# Shown only on request, where the core can hide inputs.
ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Int.Input.__init__).parameters else {}


def schema(node_id: str, *, search_aliases: Sequence[str] = (), **fields) -> io.Schema:
    """A schema of this pack: id ``Triptych_<node_id>``, our category, aliases where the core searches by them."""
    if "search_aliases" in _SCHEMA_FIELDS:
        fields["search_aliases"] = list(search_aliases)
    return io.Schema(node_id=f"Triptych_{node_id}", category=CATEGORY, **fields)


def repository_input() -> io.Input:
    """A Hugging Face id, which stands in for a name."""
    return io.String.Input(
        "repository",
        default="",
        optional=True,
        tooltip="A Hugging Face id, owner/name or owner/name@revision. When given, it is downloaded once and used "
        "instead of the name above.",
    )


def repository_id(text: str | None) -> str:
    """What `repository_input` holds, without blanks; may be empty. Raises TriptychError for what is no id."""
    wanted = (text or "").strip()
    if wanted and not _REPOSITORY.fullmatch(wanted):
        raise TriptychError(
            f"the repository {wanted[:80]!r} is no Hugging Face id: write owner/name or owner/name@revision, or leave "
            "it empty"
        )
    return wanted


def checked_repository(text: str | None) -> bool | str:
    """`repository_id` as validate_inputs answers: True, or what is wrong."""
    try:
        repository_id(text)
    except TriptychError as error:
        return str(error)
    return True


def mesh_input(name: str, tooltip: str, *, optional: bool = False) -> io.Input:
    """An input that takes our mesh and core's; ``core_mesh.as_mesh`` makes one of both."""
    return io.MultiType.Input(name, types=[MeshSocket, io.Mesh], tooltip=tooltip, optional=optional)
