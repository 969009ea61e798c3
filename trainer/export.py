"""From a run to a bundle: networks with their configs, and where they came from."""

from __future__ import annotations

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


def write_components(
    folder: Path,
    modules: dict[str, tuple[nn.Module, dict[str, Any]]],
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
        provenance=provenance,
    )
