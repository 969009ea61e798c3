"""What is measured on generated views: pixels, silhouettes, agreement between views, and surfaces.

Pixels are judged on white, over the union of the two silhouettes: over the whole frame the empty background would
decide, over the true silhouette alone whatever is drawn outside of it would be free. Every number here is one view's or
one object's; means are taken by the caller. Changing a definition changes METRICS_VERSION, which the protocol names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from triptych.errors import TriptychError
from triptych.geometry.mesh import Mesh
from triptych.geometry.metrics import compare_meshes

METRICS_VERSION = 1
PSNR_CAP_DB = 60.0
SOLID = 0.5  # alpha above it is silhouette

Lpips = Callable[[np.ndarray, np.ndarray], float]


def on_white(rgba: np.ndarray) -> np.ndarray:
    """(..., S, S, 4) float 0-1 straight alpha -> (..., S, S, 3) over white, mixed in sRGB."""
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def silhouette(rgba: np.ndarray) -> np.ndarray:
    """(..., S, S, 4) -> (..., S, S) bool."""
    return rgba[..., 3] > SOLID


def view_scores(found: np.ndarray, truth: np.ndarray, lpips: Lpips | None = None) -> dict[str, float]:
    """One view (S, S, 4) against the true one, float 0-1 sRGB straight alpha, S at least 7.

    psnr: dB over the union of the silhouettes, on white, at most PSNR_CAP_DB. ssim: mean over the same pixels of the
    structural similarity (Wang et al. 2004, even 7 x 7 window, the three channels' mean). iou: of the silhouettes.
    lpips, with the function ``load_lpips`` gives: of the whole pictures on white. Raises TriptychError when the shapes
    differ or the true view is empty.
    """
    from skimage.metrics import structural_similarity

    if found.shape != truth.shape or truth.shape[-1] != 4:
        raise TriptychError(f"views are compared at one size with alpha, got {found.shape} and {truth.shape}")
    union = silhouette(found) | silhouette(truth)
    if not silhouette(truth).any():
        raise TriptychError("the true view is empty: there is nothing to compare with")
    ours, true = on_white(found.astype(np.float64)), on_white(truth.astype(np.float64))
    error = np.square(ours - true)[union].mean()
    _, local = structural_similarity(ours, true, channel_axis=-1, data_range=1.0, full=True)
    scores = {
        "psnr": float(min(PSNR_CAP_DB, -10 * np.log10(max(error, 1e-12)))),
        "ssim": float(local[union].mean()),
        "iou": mask_iou(silhouette(found), silhouette(truth)),
    }
    if lpips is not None:
        scores["lpips"] = lpips(ours, true)
    return scores


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two bool masks; 0 when both are empty, because nothing agrees about nothing."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 0.0


def hull_agreement(masks: np.ndarray) -> np.ndarray:
    """How well each silhouette agrees with the visual hull of the other three: (4,) IoU.

    masks: (4, S, S) bool, the rig's front, left, back, right. Seen orthographically at elevation 0, a row of pixels is
    a slice of the object at one height: the front and back views bound it in x, the left and right ones in z, and the
    hull's slice is the product of the two sets. So the hull of three views, seen from the fourth, is the opposite view
    mirrored, in the rows where the two views from the sides have something in common. Exact at the pixels' resolution.
    """
    if masks.shape[0] != 4 or masks.ndim != 3:
        raise TriptychError(f"the agreement of views needs front, left, back and right, got masks {masks.shape}")
    agreement = []
    for view in range(4):
        opposite = masks[(view + 2) % 4][:, ::-1]
        sides = masks[(view + 1) % 4] & masks[(view + 3) % 4][:, ::-1]
        agreement.append(mask_iou(opposite & sides.any(axis=1, keepdims=True), masks[view]))
    return np.array(agreement)


def load_lpips(report: Callable[[str], None]) -> Lpips | None:
    """LPIPS (Zhang et al. 2018, AlexNet, version 0.1) when its package and weights are there, else None and a sentence.

    The function takes two pictures (S, S, 3) float 0-1.
    """
    import torch

    try:
        from lpips import LPIPS  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        report("LPIPS: not measured (the lpips package is not installed: pip install lpips)")
        return None
    try:
        network = LPIPS(net="alex", verbose=False).eval()
    except OSError as error:  # its backbone's weights are downloaded at first use
        report(f"LPIPS: not measured (its AlexNet weights could not be had: {error})")
        return None

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        pair = [torch.from_numpy(image).float().permute(2, 0, 1)[None] * 2 - 1 for image in (a, b)]
        with torch.inference_mode():
            return float(network(*pair))

    return distance


def surface_scores(mesh: Mesh, truth: Mesh, samples: int, thresholds: Sequence[float]) -> dict[str, float]:
    """Chamfer distance and F-scores as they are ("chamfer", "f0.02", ...) and after ``fitted`` ("fitted_chamfer", ...).

    Both in units of the true object's longest side when ``truth`` is normalised. Chamfer: the mean of the two directed
    mean distances between ``samples`` points each.
    """
    scores: dict[str, float] = {}
    for prefix, candidate in (("", mesh), ("fitted_", fitted(mesh, truth))):
        found = compare_meshes(candidate, truth, samples=samples, thresholds=tuple(thresholds))
        scores[f"{prefix}chamfer"] = found.chamfer
        scores |= {f"{prefix}f{threshold:g}": found.f_scores[threshold] for threshold in thresholds}
    return scores


def fitted(mesh: Mesh, truth: Mesh) -> Mesh:
    """The mesh under one uniform scale and a translation that fit its bounding box to the true one.

    Equal centres; the scale leaves the least squared difference of the boxes' sides. A lone photograph tells neither
    the object's size nor its depth, and this takes the size out of the comparison, not the depth.
    """
    low, high = mesh.bounds.astype(np.float64)
    true_low, true_high = truth.bounds.astype(np.float64)
    sides, true_sides = high - low, true_high - true_low
    scale = float(sides @ true_sides / (sides @ sides))
    vertices = (mesh.vertices - (low + high) / 2) * scale + (true_low + true_high) / 2
    return mesh.replace(vertices=vertices.astype(np.float32))
