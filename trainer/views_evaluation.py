"""How good are a model's views? One protocol for every model, on real scans that were never trained on.

Each object's photograph (its front, cut out, filling the frame: what a user has) goes through the model once for each
seed, with the protocol's text and the model's own steps and guidance. The sheet's left, back and right are compared
with the true ones. Beside the model stand what it has to beat and what it cannot beat:

- model, fitted: its views centred, in the scale and with the colours in which its front is the photograph in true
  size, and the back in the photograph's mirrored outline, as the pipeline does with a set; what is left when the
  unknown size is taken out;
- photo copied: the photograph itself, in the true scale, as the left and right view, mirrored as the back;
- photo copied, size unknown: the same with the photograph as the model sees it, filling its frame;
- front copied: the same with the true front under the light of the true views, so that only the side is wrong;
- truth, cut out: the true views laid on the model's background and cut out again;
- truth through the VAE: the same with the autoencoder between, for models that have one.

``views_metrics`` says how it is measured, ``views_meshes`` what the reconstruction makes of it, ``views_text`` whether
words are obeyed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from trainer.prepare.shards import write_json
from trainer.views_metrics import Lpips, hull_agreement, load_lpips, silhouette, view_scores
from trainer.views_tables import COMPARED, summary
from trainer.views_truth import Protocol, TrueObject, lone, named, true_object, true_views
from triptych.geometry.cameras import VIEW_NAMES
from triptych.images.files import resize_premultiplied
from triptych.images.foreground import alpha_box
from triptych.images.sheets import flatten
from triptych.images.views import place_view
from triptych.render.sheets import contact_sheet

if TYPE_CHECKING:
    from triptych.flux.backend import FluxViews
    from triptych.models.proportions import Proportions

OBJECTS_PER_PAGE = 8

Panels = dict[str, np.ndarray]  # view name -> (S, S, 4) float32, sRGB, straight alpha
Report = Callable[[str], None]


def evaluate_views(
    model: FluxViews,
    protocol: Protocol,
    data: Path | str,
    *,
    objects: int | None = None,
    meshes: bool = True,
    text: bool = True,
    bundle: str | Path | None = None,
    out: Path | None = None,
    device: str = "cpu",
    report: Report = print,
) -> dict[str, Any]:
    """All of the protocol, or its first parts on about ``objects`` of its objects.

    data: the folder of the object data, with index.csv. meshes, text: also reconstruct; also obey prompts. bundle: that
    reconstructs, None is the embedded one. out: a folder for report.json, contact sheets and what can be used again.
    report: hears one sentence an object. Returns the report; ``views_tables.markdown`` shows it.
    """
    from trainer.views_meshes import Meshes
    from triptych.bundles.bundle import load_bundle

    data = Path(data)
    lpips = load_lpips(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    model = cast("FluxViews", LastSheet(model))
    reconstructions = Meshes(load_bundle(bundle), protocol, out, device) if meshes else None
    rows: list[dict[str, Any]] = []
    page: list[torch.Tensor] = []
    changed: list[str] = []
    for name in protocol.object_ids(objects):
        item = true_object(protocol, data, name)
        changed += [name] if item.pixels != protocol.pixels[name] else []
        for seed in protocol.seeds:
            started = time.perf_counter()
            panels = generated_panels(model, protocol, item, seed)
            row: dict[str, Any] = {"id": name, "seed": seed, "sheet_s": time.perf_counter() - started}
            row |= score_object(model, protocol, item, panels, lpips)
            if reconstructions is not None:
                row["meshes"] = reconstructions.rows(item, panels, model, seed)
            rows.append(row)
            page.append(_picture_row(item, panels, protocol.panel_px))
            report(_sentence(row))
            if out is not None and len(page) % OBJECTS_PER_PAGE == 0:
                _save_page(page, out)
    result = summary(model, protocol, rows, changed)
    if text:
        from trainer.views_text import evaluate_prompts

        result["prompts"] = evaluate_prompts(model, protocol, data, out=out, report=report)
    if out is not None:
        if len(page) % OBJECTS_PER_PAGE:
            _save_page(page, out)
        write_json(out / "report.json", result)
    return result


class LastSheet:
    """A model that remembers its last sheet: the pipeline asks for the one that was compared just before."""

    def __init__(self, model: FluxViews) -> None:
        self.model, self.card = model, model.card
        self._asked: tuple[Any, ...] | None = None
        self._references: list[torch.Tensor] = []
        self._sheet: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def sheet(self, prompt: str, references: Sequence[torch.Tensor] = (), **settings: Any) -> torch.Tensor:
        """As of the model; on_step is not called when the sheet is remembered."""
        asked = (prompt, sorted((key, value) for key, value in settings.items() if key != "on_step"))
        same = asked == self._asked and len(references) == len(self._references)
        if self._sheet is None or not (same and all(map(torch.equal, references, self._references))):
            self._sheet = self.model.sheet(prompt, references, **settings)
            self._asked, self._references = asked, list(references)
        return self._sheet.clone()


def generated_panels(model: FluxViews, protocol: Protocol, item: TrueObject, seed: int) -> Panels:
    """The four views that the model makes of the object's lone photograph, at the model's own size."""
    from triptych.flux.panels import with_mirror_images

    # Prepared twice as in views_from_prompt, so that its first sheet is this one.
    card, cut = model.card, framed_photo(item, protocol.meshes["view_px"], model.card.panel_size)
    reference = torch.from_numpy(flatten(cut, card.background)).permute(2, 0, 1).contiguous()[None]
    references = list(with_mirror_images(reference) if card.mirrored else reference)
    return sheet_panels(model, protocol.text, references, ("front",), protocol, seed)


def sheet_panels(
    model: FluxViews,
    text: str,
    references: list[torch.Tensor],
    given: Sequence[str],
    protocol: Protocol,
    seed: int,
) -> Panels:
    """One sheet of the model, cut out."""
    from triptych.flux.panels import cut_sheet
    from triptych.flux.prompts import fill_template

    prompt = fill_template(model.card, text, given)
    sheet = model.sheet(prompt, references, seed=seed, steps=protocol.steps, guidance=protocol.guidance)
    return cut_sheet(sheet, model.card)


def score_object(
    model: FluxViews, protocol: Protocol, item: TrueObject, panels: Panels, lpips: Lpips | None = None
) -> dict[str, Any]:
    """views: method -> view -> scores; hull: method -> view -> agreement of its silhouette with the others' hull."""
    size = protocol.panel_px
    truth = named(item.truth)
    photo = resize_premultiplied(item.photo, size, size)
    drawn = {name: resized(panel, size) for name, panel in panels.items()}
    methods: dict[str, Panels] = {
        "model": drawn,
        "model, fitted": fitted(photo, drawn, model.proportions),
        "photo copied": copied(photo),
        "photo copied, size unknown": copied(resized(framed_photo(item, model.card.panel_size), size)),
        "front copied": copied(truth["front"]),
        **{name: {view: resized(p, size) for view, p in found.items()} for name, found in _ceilings(model, item)},
    }
    scores = {
        method: {name: view_scores(found[name], truth[name], lpips) for name in COMPARED}
        for method, found in methods.items()
    }
    sets = {
        "model": {**methods["model"], "front": photo},
        "model, its own front": methods["model"],
        "photo copied": {**methods["photo copied"], "front": photo},
        "truth": truth,
    }
    hull = {
        method: dict(zip(VIEW_NAMES, hull_agreement(masks_of(found)).tolist(), strict=True))
        for method, found in sets.items()
    }
    return {"views": scores, "hull": hull}


def masks_of(panels: Panels) -> np.ndarray:
    """(4, S, S) bool, front, left, back, right."""
    return np.stack([silhouette(panels[name]) for name in VIEW_NAMES])


def framed_photo(item: TrueObject, *sizes: int) -> np.ndarray:
    """The lone photograph as it is prepared for a model, brought to each of the sizes in turn: (S, S, 4)."""
    from triptych.images.views import prepare_views

    cut = lone(item.photo)
    for size in sizes:
        cut = prepare_views({"front": cut}, size=size, foreground="alpha").images[0].permute(1, 2, 0).numpy()
    return cut


def copied(front: np.ndarray) -> Panels:
    """The front view in place of all others: mirrored for the back, as it is for the sides."""
    return {"front": front, "left": front, "back": front[:, ::-1], "right": front}


def resized(panel: np.ndarray, size: int) -> np.ndarray:
    return panel if panel.shape[0] == size else resize_premultiplied(np.ascontiguousarray(panel), size, size)


def fitted(photo: np.ndarray, panels: Panels, proportions: Proportions | None = None) -> Panels:
    """The compared panels as the pipeline leaves them where the front is given, at the photograph's true size."""
    from triptych.pipelines.drawn_views import in_expected_widths, in_known_colours, in_mirrored_outline, sheet_frame

    moved, known = in_known_colours(panels, {"front": photo}), {"front": photo}
    told = sheet_frame(moved, known)
    if told is not None:
        moved = in_expected_widths(moved, known, told[0], proportions)
    views = {name: _placed(moved[name], photo, told) for name in COMPARED}
    return views | {"back": in_mirrored_outline(views["back"], photo)}


def _placed(panel: np.ndarray, photo: np.ndarray, told: tuple[float, float] | None) -> np.ndarray:
    """A panel (S, S, 4) at the photograph's scale, by what the sheet tells, else at its height; empty ones stay."""
    if not silhouette(panel).any():
        return panel
    left, top, right, bottom = alpha_box(panel[..., 3])
    _, true_top, _, true_bottom = alpha_box(photo[..., 3])
    scale, middle = told or ((true_bottom - true_top) / (bottom - top), (top + bottom) / 2)
    return place_view(panel, ((left + right) / 2, middle), scale, len(photo))


def _ceilings(model: FluxViews, item: TrueObject) -> list[tuple[str, Panels]]:
    """The true views through what every sheet of the model goes through, at the model's own size."""
    from triptych.flux.panels import sheet_to_views
    from triptych.images.sheets import join_sheet

    card = model.card
    truth = item.truth if item.truth.shape[1] == card.panel_size else true_views(item.mesh, card.panel_size)
    flat = join_sheet(named(truth), background=card.background)
    sheet = torch.from_numpy(np.ascontiguousarray(flat)).permute(2, 0, 1).contiguous()
    found = [("truth, cut out", sheet_to_views(sheet, card.background))]
    vae = getattr(getattr(model, "pipeline", None), "vae", None)
    if vae is not None:
        with torch.no_grad():
            latent = vae.encode((sheet[None] * 2 - 1).to(model.device, model.dtype)).latent_dist.mode()
            decoded = vae.decode(latent).sample[0].float().cpu() / 2 + 0.5
        found.append(("truth through the VAE", sheet_to_views(decoded.clamp(0, 1), card.background)))
    return found


def _sentence(row: dict[str, Any]) -> str:
    scores = row["views"]["model"]
    means = {key: np.mean([scores[name][key] for name in COMPARED]) for key in ("psnr", "ssim", "iou")}
    line = f"{row['id'][:48]:48} seed {row['seed']}: " + ", ".join(f"{k} {v:.3f}" for k, v in means.items())
    if "meshes" in row:
        line += ", chamfer " + " ".join(f"{scores['chamfer']:.4f}" for scores in row["meshes"].values())
    return f"{line}, {row['sheet_s']:.1f} s"


def _picture_row(item: TrueObject, panels: Panels, size: int) -> torch.Tensor:
    """Photograph | the model's front, left, back, right | the true left, back, right: (8, 4, S, S)."""
    shown = [resize_premultiplied(item.photo, size, size)]
    shown += [resized(panels[name], size) for name in VIEW_NAMES]
    shown += [view for name, view in named(item.truth).items() if name in COMPARED]
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)


def _save_page(rows: list[torch.Tensor], out: Path) -> None:
    number = (len(rows) - 1) // OBJECTS_PER_PAGE
    contact_sheet(rows[number * OBJECTS_PER_PAGE :], out / f"views_{number + 1:02}.png", background=(1.0, 1.0, 1.0))
