"""The report of ``evaluate_views`` as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from triptych.geometry.cameras import VIEW_NAMES

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
        f"{pixels}, seeds {', '.join(map(str, model['seeds']))}, {model['steps']} steps, guidance {model['guidance']:g}, "
        f"{model['sheet_s']:.1f} s a sheet (median)"
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
