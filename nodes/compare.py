"""How close two meshes are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .core_mesh import as_mesh
from .preview import preview
from .running import run
from .schema import mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.metrics import MeshComparison


class CompareMeshes(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "CompareMeshes",
            display_name="Compare meshes",
            description="Measures how close a mesh is to a reference: Chamfer distance, F-score, normals, volume.",
            search_aliases=["chamfer", "f-score", "iou", "mesh metrics", "difference"],
            is_output_node=True,
            inputs=[
                mesh_input("mesh", "The mesh to judge."),
                mesh_input("reference", "What it should be like."),
                io.Boolean.Input(
                    "normalize",
                    default=True,
                    tooltip="Centre both and scale their longest sides to 1 first. Off: compare them where they lie.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.02,
                    min=0.0001,
                    max=1.0,
                    step=0.005,
                    round=0.0001,
                    tooltip="Distance within which a point counts as right in the F-score.",
                ),
                io.Int.Input(
                    "samples",
                    default=30_000,
                    min=1000,
                    max=1_000_000,
                    step=1000,
                    tooltip="Points on each surface: more is finer and slower.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="All numbers as text."),
                io.Float.Output(
                    "chamfer", display_name="chamfer distance", tooltip="Mean distance between the surfaces; 0 is best."
                ),
                io.Float.Output("f_score", display_name="F-score", tooltip="0-1 at the threshold; 1 is best."),
                io.Float.Output("normal_consistency", display_name="normal consistency", tooltip="0-1; 1 is best."),
                io.Float.Output(
                    "volume_iou",
                    display_name="volume IoU",
                    tooltip="0-1; 1 is best, -1 when one of the meshes is not closed.",
                ),
            ],
        )

    @classmethod
    def execute(cls, mesh: Any, reference: Any, normalize: bool, threshold: float, samples: int) -> io.NodeOutput:
        from ..triptych.geometry.metrics import compare_meshes

        pair = [as_mesh(value) for value in (mesh, reference)]
        judged, wanted = (one.normalized() for one in pair) if normalize else pair
        found = run(lambda reporter: compare_meshes(judged, wanted, samples=samples, thresholds=(threshold,)))
        numbers = metrics(found, threshold)
        text = table(numbers)
        iou = -1.0 if numbers["volume_iou"] is None else numbers["volume_iou"]
        shown = preview({"mesh": judged, "reference": wanted}) | {"text": [text], "triptych_metrics": [numbers]}
        return io.NodeOutput(text, numbers["chamfer"], numbers["f_score"], numbers["normal_consistency"], iou, ui=shown)


def metrics(found: MeshComparison, threshold: float) -> dict[str, float | None]:
    return {
        "chamfer": found.chamfer,
        "f_score": found.f_scores[threshold],
        "precision": found.precision[threshold],
        "recall": found.recall[threshold],
        "normal_consistency": found.normal_consistency,
        "volume_iou": found.volume_iou,
        "threshold": threshold,
    }


def table(numbers: dict[str, float | None]) -> str:
    iou = numbers["volume_iou"]
    return "\n".join(
        [
            f"Chamfer distance    {numbers['chamfer']:.5f}",
            f"F-score at {numbers['threshold']:g}    {numbers['f_score']:.4f}",
            f"precision, recall   {numbers['precision']:.4f}, {numbers['recall']:.4f}",
            f"normal consistency  {numbers['normal_consistency']:.4f}",
            f"volume IoU          {'not closed' if iou is None else f'{iou:.4f}'}",
        ]
    )
