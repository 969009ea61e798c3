"""The report of ``evaluate_views``: means over the objects, and markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.views_truth import Protocol
from triptych.geometry.cameras import VIEW_NAMES

if TYPE_CHECKING:
    from triptych.flux.backend import FluxViews

COMPARED = VIEW_NAMES[1:]

_PIXELS = {"psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".3f"), "iou": ("IoU", ".3f"), "lpips": ("LPIPS", ".3f")}
_SURFACES = {
    "chamfer": ("Chamfer", ".4f"),
    "f0.01": ("F@.01", ".3f"),
    "f0.02": ("F@.02", ".3f"),
    "f0.05": ("F@.05", ".3f"),
    "fitted_chamfer": ("fitted: Chamfer", ".4f"),
    "fitted_f0.02": ("F@.02", ".3f"),
    "fitted_f0.05": ("F@.05", ".3f"),
    "failed": ("failed", ".2f"),
}


def summary(model: FluxViews, protocol: Protocol, rows: list[dict[str, Any]], changed: list[str]) -> dict[str, Any]:
    """Means over the objects, beside the rows themselves."""
    card = model.card
    steps, guidance = card.usual(given=True)
    methods = rows[0]["views"]
    result: dict[str, Any] = {
        "protocol": {
            "version": protocol.version,
            "metrics_version": protocol.metrics_version,
            "objects": len({row["id"] for row in rows}),
            "of": len(protocol.pixels),
            "pixels_changed": changed,
        },
        "model": {
            "name": card.name,
            "architecture": card.architecture,
            "panel_size": card.panel_size,
            "steps": steps if protocol.steps is None else protocol.steps,
            "guidance": guidance if protocol.guidance is None else protocol.guidance,
            "seeds": list(protocol.seeds),
            "sheet_s": float(np.median([row["sheet_s"] for row in rows])),
        },
        "views": {method: _means_by_view([row["views"][method] for row in rows]) for method in methods},
        "hull": {method: _mean([row["hull"][method] for row in rows]) for method in rows[0]["hull"]},
        "wins": _wins(rows),
    }
    for method, values in result["hull"].items():
        result["hull"][method]["mean"] = float(np.mean([values[name] for name in VIEW_NAMES]))
    if "meshes" in rows[0]:
        result["meshes"] = {name: _mean([row["meshes"][name] for row in rows]) for name in rows[0]["meshes"]}
    return result | {"objects": rows}


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def _means_by_view(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    means = {name: _mean([row[name] for row in rows]) for name in COMPARED}
    return means | {"mean": _mean([means[name] for name in COMPARED])}


def _wins(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Share of objects on which the model beats the better copy of the front, by metric; and the photograph alone."""

    def of(row: dict[str, Any], method: str, key: str) -> float:
        return float(np.mean([row["views"][method][name][key] for name in COMPARED]))

    wins = {
        key: float(
            np.mean([of(r, "model", key) > max(of(r, m, key) for m in ("photo copied", "front copied")) for r in rows])
        )
        for key in ("psnr", "ssim", "iou")
    }
    for scale in ("", ", lone") if "meshes" in rows[0] else ():
        pairs = [(r["meshes"][f"photo + generated{scale}"], r["meshes"][f"photo{scale}"]) for r in rows]
        wins[f"chamfer{scale}"] = float(np.mean([ours["chamfer"] < photo["chamfer"] for ours, photo in pairs]))
    return wins


def markdown(report: Mapping[str, Any]) -> str:
    """All tables of a report, with what they are of."""
    parts = [_heading(report), view_table(report["views"]), _hull_text(report["hull"]), _wins_text(report)]
    if "meshes" in report:
        parts.insert(3, _meshes_text(report["meshes"]))
    if "prompts" in report:
        parts.append(prompt_text(report["prompts"]))
    return "\n\n".join(parts)


def _heading(report: Mapping[str, Any]) -> str:
    protocol, model = report["protocol"], report["model"]
    changed = protocol["pixels_changed"]
    pixels = "the protocol's own pixels"
    if changed:
        pixels = (
            f"**other pixels than the protocol's for {len(changed)} objects (the first is {changed[0]}): not "
            "comparable with other reports**"
        )
    return (
        f"{model['name']}: {protocol['objects']} of {protocol['of']} objects, protocol {protocol['version']}, "
        f"{pixels}, seeds {', '.join(map(str, model['seeds']))}, {model['steps']} steps, "
        f"guidance {model['guidance']:g}, {model['sheet_s']:.1f} s a sheet (median)"
    )


def view_table(views: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Methods by rows; left, back, right and their mean by columns."""
    first = next(iter(next(iter(views.values())).values()))
    keys = [key for key in _PIXELS if key in first]
    sides = next(iter(views.values())).keys()
    header = [f"{_PIXELS[key][0]} {side}" for key in keys for side in sides]
    rows = [
        [method, *(format(values[side][key], _PIXELS[key][1]) for key in keys for side in sides)]
        for method, values in views.items()
    ]
    return table(["views", *header], rows)


def _hull_text(hull: Mapping[str, Mapping[str, float]]) -> str:
    columns = (*VIEW_NAMES, "mean")
    rows = [[name, *(f"{values[column]:.3f}" for column in columns)] for name, values in hull.items()]
    return "Silhouettes against the hull of the other three (IoU):\n\n" + table(["views", *columns], rows)


def _meshes_text(meshes: Mapping[str, Mapping[str, float]]) -> str:
    keys = [key for key in _SURFACES if key in next(iter(meshes.values()))]
    rows = [[name, *(format(values[key], _SURFACES[key][1]) for key in keys)] for name, values in meshes.items()]
    return "Reconstructions:\n\n" + table(["from", *(_SURFACES[key][0] for key in keys)], rows)


def _wins_text(report: Mapping[str, Any]) -> str:
    wins = ", ".join(f"{key} {share:.0%}" for key, share in report["wins"].items())
    return (
        "Share of objects on which the model beats the better of the two copies (psnr, ssim, iou: mean of the three "
        f"views), and photo + generated the photo alone (chamfer): {wins}"
    )


def prompt_text(prompts: Mapping[str, Any]) -> str:
    """What evaluate_prompts found."""
    colour, category = prompts["colour"], prompts["category"]
    rows = [
        ["dominant colour", f"{colour['agreement']:.3f}", f"{colour['chance']:.3f}", _or_dash(colour.get("ceiling"))],
        ["category, top 1", f"{category['top1']:.3f}", f"{category['chance1']:.3f}", f"{category['ceiling1']:.3f}"],
        ["category, top 5", f"{category['top5']:.3f}", f"{category['chance5']:.3f}", f"{category['ceiling5']:.3f}"],
    ]
    return (
        f"{prompts['sheets']} sheets from prompts; the ceiling is that of {category['ceiling_objects']} true sheets of "
        "objects that the classifier was not built from:\n\n" + table(["", "model", "chance", "ceiling"], rows)
    )


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A markdown table."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
