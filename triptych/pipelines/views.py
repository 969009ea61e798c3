"""The front half of the main job: a sentence, one photo, or some of the four views -> a whole view set.

    prompt, given views --Flux views model--> 2 x 2 sheet --cut, checked--> panels
       --given views put back, one scale--> view set

The model draws all four views at once, so that they agree with each other; those that were given are references, and
stand in the result as they were given. A sheet whose panels are empty, cut off, in pieces or of different size is drawn
again with the next seed, a few times at most, and the best one is kept. Functions take progress, preview and cancel
callbacks and touch no files but the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import TriptychError
from ..flux.panels import check_views, cut_sheet, grouped, lost_in_key, with_mirror_images
from ..flux.prompts import check_prompt, fill_template, require_prompt
from ..geometry.cameras import VIEW_NAMES
from ..images.files import ImageSource
from ..images.sheets import flatten, sheet_of
from ..images.views import ViewKey, ViewSet, azimuth_of, prepare_views, view_name
from ..sampling.flow_euler import Cancelled
from .drawn_views import put_together
from .reconstruct import Cancel, Progress, _Clock

if TYPE_CHECKING:
    from ..flux.backend import FluxViews
    from ..flux.card import ViewsCard

MAX_REROLLS = 100
_SEEDS = 2**63
_LOST_SHARE = 0.03

Preview = Callable[[Tensor], None]


@dataclass(frozen=True)
class ViewSettings:
    """seed: of the noise, 0 to 2^63 - 1; a reroll takes the next one. steps, guidance: of the model; None takes its
    card's. rerolls: how often a sheet with faulty panels is drawn again at most. size: pixels of a finished view,
    16-4096. foreground: how the given pictures are cut out, see `prepare_views`."""

    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    rerolls: int = 2
    size: int = 256
    foreground: str = "auto"


@dataclass(frozen=True, eq=False)
class GeneratedViews:
    """view_set: the views, prepared, one scale. sheet: (2S, 2S, 4) float32, the same in a grid (transparent where a
    view is missing). views: by name, each (S, S, 4) float32, sRGB straight alpha 0-1. generated: the names of those
    that the model drew. seed: of the sheet that was kept. rerolls: how many sheets were drawn beyond the first.
    drawn: (H, W, 3) float32, the sheet as the model painted it; None when no model was needed. prompt: what it read.
    """

    view_set: ViewSet
    sheet: np.ndarray
    views: dict[str, np.ndarray]
    generated: tuple[str, ...]
    seed: int
    rerolls: int
    warnings: tuple[str, ...]
    timings_s: dict[str, float]
    drawn: np.ndarray | None = None
    prompt: str = ""


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One sheet: seed, pixels (3, 2P, 2P), its panels (P, P, 4) by name, and what is wrong with them."""

    seed: int
    sheet: Tensor
    panels: dict[str, np.ndarray]
    complaints: list[str]


def views_from_prompt(
    prompt: str = "",
    images: Mapping[ViewKey, ImageSource] | None = None,
    model: FluxViews | str | Callable[[], FluxViews] = "triptych-tiny",
    settings: ViewSettings | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    preview: Preview | None = None,
    cancel: Cancel | None = None,
) -> GeneratedViews:
    """The views front, left, back and right of what the prompt says and the images show.

    prompt: what the object is; may be empty with an image. images: none to four pictures by view name or azimuth (0,
    90, 180, 270), as `prepare_views` takes them; with all four nothing is generated and no model is loaded.
    model: a loaded one, which stays loaded; a name, folder or repository id for `load_flux_views`, or a function that
    loads one: these are unloaded in the end. The same model, seed and settings give the same views.
    progress(stage, fraction) is called with the share of the whole that is done, 0-1. preview((3, h, w) float 0-1) is
    called after each sampling step. cancel() is asked between steps; Cancelled is raised when it returns True. Raises
    TriptychError: neither prompt nor image, settings out of range, a view that cannot be drawn or prepared.
    """
    settings = settings or ViewSettings()
    _check(settings)
    clock = _Clock(progress or (lambda stage, fraction: None), cancel or (lambda: False))
    sources = _by_name(images or {})
    require_prompt(prompt, has_image=bool(sources))
    given: ViewSet | None = None
    notes: list[str] = []
    with clock.stage("prepare", 0.0, 0.05):
        if sources:
            given = prepare_views(dict(sources.items()), size=settings.size, foreground=settings.foreground)
            notes += given.warnings
    missing = tuple(name for name in VIEW_NAMES if name not in sources)
    if not missing and given is not None:
        return _nothing_to_do(given, prompt, settings, notes, clock)
    with clock.stage("load", 0.05, 0.15):
        loaded, is_ours = _load(model, device, clock)
    try:
        card = loaded.card
        text, said = check_prompt(prompt, card, bool(sources), _token_counter(loaded))
        notes += [*said, *loaded.warnings, *loaded.notes(guidance=settings.guidance, references=len(sources))]
        filled = fill_template(card, text, sources)
        references, said = given_references(given, card)
        notes += said
        with clock.stage("generate", 0.15, 0.95):
            attempts = _draw(loaded, filled, references, missing, settings, clock, preview)
    finally:
        if is_ours:
            loaded.unload()
    best = min(attempts, key=lambda attempt: len(attempt.complaints))  # the earliest of equals
    notes += _report(attempts, best)
    with clock.stage("fit", 0.95, 1.0):
        view_set, left = put_together(given, best.panels, missing, settings.size, loaded.proportions)
    notes += left
    drawn = best.sheet.permute(1, 2, 0).contiguous().numpy()
    generated = tuple(name for name in missing if name in view_set.names)
    return _result(view_set, generated, best.seed, len(attempts) - 1, notes, clock, drawn, filled)


def _check(settings: ViewSettings) -> None:
    if not 0 <= settings.seed < _SEEDS:
        raise TriptychError(f"the seed must be 0 to 2^63 - 1, got {settings.seed}")
    if settings.steps is not None and not 1 <= settings.steps <= 1000:
        raise TriptychError(f"the steps of the views must be 1-1000, got {settings.steps}")
    if settings.guidance is not None and not 0 <= settings.guidance <= 100:
        raise TriptychError(f"the guidance of the views must be 0-100, got {settings.guidance}")
    if not 0 <= settings.rerolls <= MAX_REROLLS:
        raise TriptychError(f"the rerolls must be 0-{MAX_REROLLS}, got {settings.rerolls}")
    if not 16 <= settings.size <= 4096:
        raise TriptychError(f"the size of a view must be 16-4096 pixels, got {settings.size}")


def _by_name(images: Mapping[ViewKey, ImageSource]) -> dict[str, ImageSource]:
    """The pictures by view name, in the order front, left, back, right."""
    found: dict[str, ImageSource] = {}
    for key, picture in images.items():
        name = view_name(azimuth_of(key))
        if name not in VIEW_NAMES:
            raise TriptychError(
                f"a picture from azimuth {name} cannot guide the model: give {', '.join(VIEW_NAMES)} views (0, 90, 180 "
                "and 270 degrees) only"
            )
        if name in found:
            raise TriptychError(f"the {name} view is given twice; give it once")
        found[name] = picture
    return {name: found[name] for name in VIEW_NAMES if name in found}


def _nothing_to_do(
    given: ViewSet, prompt: str, settings: ViewSettings, notes: list[str], clock: _Clock
) -> GeneratedViews:
    if require_prompt(prompt, has_image=True):
        notes.append("all four views are given, so nothing was generated and the prompt is not used")
    clock.progress("fit", 1.0)
    return _result(given, (), settings.seed, 0, notes, clock, None, "")


def _load(
    model: FluxViews | str | Callable[[], FluxViews], device: torch.device | str, clock: _Clock
) -> tuple[FluxViews, bool]:
    """The model, and whether it was loaded here."""
    if isinstance(model, str):
        from ..flux.backend import load_flux_views

        return load_flux_views(
            model, device=device, progress=lambda stage, share: clock.step(share), cancel=clock.cancel
        ), True
    return (model(), True) if not hasattr(model, "sheet") else (cast("FluxViews", model), False)


def _token_counter(model: FluxViews) -> Callable[[str], int] | None:
    """Counts as the text encoder that reads most of the prompt does (the T5 of FLUX.1)."""
    tokenizer = getattr(model.pipeline, "tokenizer_2", None) or getattr(model.pipeline, "tokenizer", None)
    return None if tokenizer is None else lambda text: len(tokenizer(text, verbose=False).input_ids)


# --- drawing -------------------------------------------------------------------------------------------------------


def _draw(
    model: FluxViews,
    prompt: str,
    references: list[Tensor],
    missing: tuple[str, ...],
    settings: ViewSettings,
    clock: _Clock,
    preview: Preview | None,
) -> list[_Attempt]:
    """Sheets until one is without fault, 1 + rerolls at most."""
    card = model.card
    attempts: list[_Attempt] = []
    for roll in range(settings.rerolls + 1):
        # Most sheets are well at once, so the first takes most of the bar.
        begin, end = (0.0, 0.7) if roll == 0 else (1 - 0.3 * 0.5 ** (roll - 1), 1 - 0.3 * 0.5**roll)

        def on_step(step: int, total: int, picture: Callable[[], Tensor], begin=begin, end=end) -> None:
            if clock.cancel():
                raise Cancelled(f"stopped after step {step} of {total} of the views")
            clock.step(begin + (end - begin) * step / max(total, 1))
            if preview is not None:
                preview(picture())

        if clock.cancel():
            raise Cancelled("stopped before a sheet of views was drawn")
        seed = (settings.seed + roll) % _SEEDS
        drawn = model.sheet(
            prompt, references, seed=seed, steps=settings.steps, guidance=settings.guidance, on_step=on_step
        )
        sheet = drawn.detach().to("cpu", torch.float32)
        panels = cut_sheet(sheet, card)
        attempts.append(_Attempt(seed, sheet, panels, check_views(panels, missing)))
        if not attempts[-1].complaints:
            break
    return attempts


def given_references(given: ViewSet | None, card: ViewsCard) -> tuple[list[Tensor], tuple[str, ...]]:
    """The given views on the model's background, each (3, P, P) float32 0-1, in the order front, left, back, right,
    with their mirror images between them where the model takes these; sentences about colours that the background has
    too."""
    if given is None:
        return [], ()
    pictures = dict(zip(given.azimuths_deg, given.images.permute(0, 2, 3, 1).numpy(), strict=True))
    small = prepare_views(dict(pictures.items()), size=card.panel_size, foreground="alpha")
    rgba = small.images.permute(0, 2, 3, 1).numpy()
    lost = {name: lost_in_key(view, card.background) for name, view in zip(small.names, rgba, strict=True)}
    notes = tuple(
        f"the {name} view: {share:.0%} of the object has nearly the colour of the model's background, which may be "
        "missing in the generated views"
        for name, share in lost.items()
        if share > _LOST_SHARE
    )
    flat = torch.from_numpy(flatten(rgba, card.background)).permute(0, 3, 1, 2).contiguous()
    return list(with_mirror_images(flat) if card.mirrored else flat), notes


def _report(attempts: list[_Attempt], best: _Attempt) -> list[str]:
    """Which seeds were tried, why they were not good enough, and what is left."""
    notes = []
    if len(attempts) > 1:
        why = "; ".join(
            f"seed {attempt.seed}: {', '.join(grouped(attempt.complaints))}"
            for attempt in attempts
            if attempt is not best
        )
        times = "once" if len(attempts) == 2 else f"{len(attempts) - 1} times"
        notes.append(f"the views were drawn again {times} and those of seed {best.seed} kept ({why})")
    if best.complaints:
        faults = "; ".join(grouped(best.complaints))
        notes.append(
            f"the generated views (seed {best.seed}) are faulty: {faults}: try another seed, more rerolls or another "
            "prompt"
        )
    return notes


def _result(
    view_set: ViewSet,
    generated: tuple[str, ...],
    seed: int,
    rerolls: int,
    notes: list[str],
    clock: _Clock,
    drawn: np.ndarray | None,
    prompt: str,
) -> GeneratedViews:
    warnings = tuple(dict.fromkeys(notes))
    whole, sheet, views = replace(view_set, warnings=warnings), sheet_of(view_set), view_set.pictures
    return GeneratedViews(whole, sheet, views, generated, seed, rerolls, warnings, clock.seconds, drawn, prompt)
