"""What generated views are worth: reconstructions from them, against the true object.

Five ways to reconstruct one object with a bundle, each from the same photograph:

| row | views | scale |
|---|---|---|
| photo | the photograph alone | the rig's: what a turntable would know |
| photo, lone | the photograph alone, filling its frame | unknown, as for a user |
| photo + generated | and the model's left, back and right as they lie in its sheet | the sheet's |
| photo + generated, lone | what ``views_from_prompt`` makes of the lone photograph | found by the pipeline |
| photo + true | and the true left, back and right at the panels' size: the most that a sheet can give | the rig's |

The rows without the model depend on the bundle and the protocol alone: they are kept beside the report and read again.
A set of views that no solid agrees with counts as failed, with the protocol's ``failed_chamfer`` and F-scores of 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer.prepare.shards import write_json
from trainer.views_metrics import silhouette, surface_scores
from trainer.views_truth import Protocol, TrueObject, lone, named
from triptych.bundles.bundle import Bundle
from triptych.bundles.manifest import file_sha256
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_AZIMUTHS_DEG, VIEW_NAMES
from triptych.geometry.mesh import Mesh
from triptych.images.files import resize_premultiplied
from triptych.images.views import ViewSet, bleed, prepare_views
from triptych.pipelines.reconstruct import Settings, mesh_from_views

if TYPE_CHECKING:
    from triptych.flux.backend import FluxViews

ROWS = ("photo", "photo, lone", "photo + generated", "photo + generated, lone", "photo + true")
_SIDES = dict(zip(VIEW_NAMES[1:], VIEW_AZIMUTHS_DEG[1:], strict=True))
_WITHOUT_MODEL = ("photo", "photo, lone", "photo + true")

Scores = dict[str, float]


class Meshes:
    """Reconstructs and scores; keeps the rows without the model in ``folder``, None keeps them nowhere."""

    def __init__(self, bundle: Bundle, protocol: Protocol, folder: Path | None, device: str = "cpu") -> None:
        self.bundle, self.protocol, self.device = bundle, protocol, device
        self.settings = Settings(texture_size=0, target_faces=0)
        self.file = None if folder is None else folder / f"reconstructions_{self._key()}.json"
        self.known: dict[str, dict[str, Scores]] = {}
        if self.file is not None and self.file.is_file():
            self.known = json.loads(self.file.read_text(encoding="utf-8"))

    def rows(self, item: TrueObject, panels: dict[str, np.ndarray], model: FluxViews, seed: int) -> dict[str, Scores]:
        """The scores by ROWS, "failed" 0 or 1 among them. panels: the sheet's views, (S, S, 4) each by name."""
        kept = self.known.setdefault(f"{item.id} {item.pixels}", {})
        views: dict[str, Callable[[], ViewSet]] = {
            "photo": lambda: rig_set(item.photo, {}),
            "photo, lone": lambda: prepare_views({"front": lone(item.photo)}, size=self.protocol.meshes["view_px"]),
            "photo + generated": lambda: replace(
                rig_set(item.photo, panels), generated=tuple(a for n, a in _SIDES.items() if n in panels)
            ),
            "photo + generated, lone": lambda: self._piped(item, model, seed),
            "photo + true": lambda: rig_set(item.photo, named(item.truth)),
        }
        scores = {name: kept.get(name) or self._scored(views[name], item.mesh) for name in ROWS}
        if not set(_WITHOUT_MODEL) <= set(kept):
            kept |= {name: scores[name] for name in _WITHOUT_MODEL}
            if self.file is not None:
                write_json(self.file, self.known)
        return scores

    def _piped(self, item: TrueObject, model: FluxViews, seed: int) -> ViewSet:
        from triptych.pipelines.views import ViewSettings, views_from_prompt

        protocol = self.protocol
        settings = ViewSettings(
            seed=seed, steps=protocol.steps, guidance=protocol.guidance, size=protocol.meshes["view_px"]
        )
        made = views_from_prompt(
            protocol.text, {"front": lone(item.photo)}, model=model, settings=settings, device=self.device
        )
        return made.view_set

    def _scored(self, views: Callable[[], ViewSet], truth: Mesh) -> Scores:
        samples, thresholds = self.protocol.meshes["samples"], self.protocol.meshes["thresholds"]
        try:
            mesh = mesh_from_views(views(), self.bundle, self.settings, device=self.device).mesh
            return {"failed": 0.0, **surface_scores(mesh, truth, samples, thresholds)}
        except TriptychError:  # empty or contradicting views: the sentence is for users, here only the fact counts
            worst = {"chamfer": float(self.protocol.meshes["failed_chamfer"])} | {f"f{t:g}": 0.0 for t in thresholds}
            return {"failed": 1.0, **worst, **{f"fitted_{key}": value for key, value in worst.items()}}

    def _key(self) -> str:
        """Of everything that the rows without the model depend on, but the objects' pixels, which key the rows."""
        folder = self.bundle.folder
        parts = [file_sha256(path) for path in [*sorted(folder.glob("*.safetensors")), folder / "bundle.json"]]
        parts += [repr(self.settings), json.dumps(self.protocol.meshes, sort_keys=True), str(self.protocol.panel_px)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def rig_set(photo: np.ndarray, others: dict[str, np.ndarray]) -> ViewSet:
    """The photograph (P, P, 4) in the rig's scale and other views as they lie in their panels, brought to its size."""
    size = photo.shape[0]
    views = [photo] + [resize_premultiplied(others[name], size, size) for name in VIEW_NAMES[1:] if name in others]
    azimuths = [
        azimuth
        for name, azimuth in zip(VIEW_NAMES, VIEW_AZIMUTHS_DEG, strict=True)
        if name == "front" or name in others
    ]
    if any(not silhouette(view).any() for view in views):
        raise TriptychError("a generated view is empty; generate again with another seed")
    images = np.stack([bleed(view).transpose(2, 0, 1) for view in views])
    return ViewSet.from_rig_renders(torch.from_numpy(np.ascontiguousarray(images)), azimuths)
