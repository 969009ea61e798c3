"""From a run to a bundle: networks with their configs, and where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from triptych.bundles.manifest import write_bundle
from triptych.geometry.cameras import FRAME_FILL, VIEW_AZIMUTHS_DEG

VIEW_RIG = {
    "azimuths_deg": list(VIEW_AZIMUTHS_DEG),
    "elevation_deg": 0.0,
    "projection": "orthographic",
    "fill": FRAME_FILL,
}


def without_places(value: Any) -> Any:
    """The same JSON value with absolute paths cut to their last name: where a run lay is nobody's business."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write_components(
    folder: Path,
    modules: Mapping[str, tuple[nn.Module, dict[str, Any]]],
    provenance: dict[str, Any],
    *,
    sampling: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Writes a bundle folder with the trained ``modules`` (name -> network, constructor arguments)."""
    write_bundle(
        folder,
        modules,
        name=folder.name,
        licence="Apache-2.0",
        dtype=dtype,
        view_rig=VIEW_RIG,
        sampling=sampling or {},
        provenance=without_places(provenance),
    )
