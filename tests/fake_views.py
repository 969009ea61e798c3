"""A Flux views model without Flux: it paints the sample object, and any fault on demand."""

import functools

import numpy as np
import torch

from triptych.flux.backend import FluxViews
from triptych.flux.card import ViewsCard
from triptych.geometry.cameras import VIEW_NAMES, rig_cameras

MAGENTA, WHITE = (1.0, 0.0, 1.0), (1.0, 1.0, 1.0)
WORDS = ("a", "red", "green", "chair", "robot", "shelf", "dark", "wooden", "glass")


def card(**changes) -> ViewsCard:
    facts = {
        "name": "fake", "licence": "CC0-1.0", "architecture": "flux2-klein", "panel_size": 128, "background": MAGENTA,
        "prompt_template": "{text}. given: {given}.", "steps": 3, "guidance": 2.0, "vocabulary": WORDS,
    }  # fmt: skip
    return ViewsCard(**{**facts, **changes})


@functools.cache
def truth(size: int = 128) -> dict[str, np.ndarray]:
    """The sample object's rig views by name, (size, size, 4) float32."""
    from triptych.procedural import sample_object
    from triptych.render.views import render_views, shade

    cameras = rig_cameras()
    rgba = shade(render_views(sample_object(), cameras, size), cameras).permute(0, 2, 3, 1).numpy()
    return dict(zip(VIEW_NAMES, rgba, strict=True))


def sheet_of(views: dict[str, np.ndarray], background=MAGENTA) -> torch.Tensor:
    """(3, 2S, 2S) from four views (S, S, 4)."""
    flat = [views[name][..., :3] * views[name][..., 3:] + np.float32(background) * (1 - views[name][..., 3:])
            for name in VIEW_NAMES]  # fmt: skip
    sheet = np.concatenate([np.concatenate(flat[:2], 1), np.concatenate(flat[2:], 1)], 0)
    return torch.from_numpy(np.ascontiguousarray(sheet.transpose(2, 0, 1), dtype=np.float32))


def blank(view: np.ndarray) -> np.ndarray:
    """Nothing where the view was."""
    return np.zeros_like(view)


def shifted(view: np.ndarray, rows: int, columns: int = 0) -> np.ndarray:
    """The view moved, with nothing coming in from the other side."""
    moved = np.roll(view, (rows, columns), (0, 1))
    moved[: max(rows, 0)], moved[:, : max(columns, 0)] = 0, 0
    return moved


class FakeViews(FluxViews):
    """faults: seed -> [(view name, function of its (S, S, 4) picture)]. calls: what `sheet` was asked for."""

    pipeline = None
    proportions = None
    warnings = ()

    def __init__(self, views_card: ViewsCard | None = None, faults=None):
        self.card = views_card or card()
        self.faults = faults or {}
        self.calls: list[dict] = []
        self.unloaded = 0

    def sheet(self, prompt, references, *, seed, steps=None, guidance=None, negative="", on_step=None):
        usual = self.card.usual(bool(references))
        steps, guidance = usual[0] if steps is None else steps, usual[1] if guidance is None else guidance
        self.calls.append({"prompt": prompt, "references": references, "seed": seed, "steps": steps,
                           "guidance": guidance})  # fmt: skip
        views = dict(truth(self.card.panel_size))
        for name, fault in self.faults.get(seed, []):
            views[name] = fault(views[name])
        sheet = sheet_of(views, self.card.background)
        for step in range(1, steps + 1):
            if on_step is not None:
                on_step(step, steps, lambda step=step: sheet * step / steps)
        return sheet

    def unload(self):
        self.unloaded += 1

    def uses_negative(self, guidance):
        return False

    # what a real `sheet` is made of
    _noise = _encode = _sample = _grid = None
