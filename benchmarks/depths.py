"""How well does a views model know the depth of what a photograph shows? Errors of the logarithm, by who tells it.

    python -m benchmarks.depths [--model triptych-tiny] [--data ../shared/data] [--objects N]

Each evaluation object's lone photograph (docs/views_evaluation.md) goes through the views model. Depth is the width of
the left view by the largest extent of the front; the rows are the sides as they were drawn (mean of the logarithms of
left and right), what the model's own network expects (`models.proportions`), and the best constant, which nobody knows.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.machine import describe
from benchmarks.quality import data_folder
from trainer.views_evaluation import framed_photo, generated_panels
from trainer.views_truth import load_protocol, true_object
from triptych.flux.backend import load_flux_views
from triptych.flux.panels import is_empty
from triptych.images.foreground import alpha_box
from triptych.pipelines.drawn_views import expected_widths
from triptych.pipelines.views import ViewSettings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="triptych-tiny")
    parser.add_argument("--data", type=Path, default=data_folder())
    parser.add_argument("--objects", type=int, default=None)
    args = parser.parse_args()
    protocol, model = load_protocol(), load_flux_views(args.model)
    true: list[float] = []
    told: dict[str, list[float]] = {"sides as drawn": [], "the network": []}
    for name in protocol.object_ids(args.objects):
        item = true_object(protocol, args.data, name)
        panels = generated_panels(model, protocol, item, seed=0)
        if any(is_empty(panels[side]) for side in ("front", "left", "right")):
            print(f"{name}: a panel is empty, left out")
            continue
        true.append(_log_ratio(item.truth[1], item.truth[0]))
        drawn = [_log_ratio(panels[side], panels["front"]) for side in ("left", "right")]
        told["sides as drawn"].append(float(np.mean(drawn)))
        photo = framed_photo(item, ViewSettings().size)
        width = expected_widths({"front": photo}, model.proportions).get("left")
        if width is not None:
            told["the network"].append(float(np.log(width / max(_sides(photo)))))
    print(f"{describe()}\n\n{len(true)} objects\n")
    print("| depth told by | root mean square error | mean absolute error | correlation |\n|---|---|---|---|")
    truth = np.array(true)
    for who, values in told.items():
        if values:
            error = np.array(values) - truth
            together = np.corrcoef(values, truth)[0, 1]
            print(f"| {who} | {np.sqrt(np.square(error).mean()):.3f} | {np.abs(error).mean():.3f} | {together:.2f} |")
    print(f"| the best constant | {truth.std():.3f} | {np.abs(truth - np.median(truth)).mean():.3f} | |")
    return 0


def _sides(view: np.ndarray) -> tuple[float, float]:
    left, top, right, bottom = alpha_box(view[..., 3])
    return right - left, bottom - top


def _log_ratio(side: np.ndarray, front: np.ndarray) -> float:
    return float(np.log(_sides(side)[0] / max(_sides(front))))


if __name__ == "__main__":
    raise SystemExit(main())
