"""Training tasks by name. A name maps to ``module:Class`` so that naming one imports nothing."""

from __future__ import annotations

from typing import Any

from trainer.names import import_named

TASKS: dict[str, str] = {
    "structure_vae": "trainer.tasks.structure_vae:StructureVaeTask",
    "structure_flow": "trainer.tasks.structure_flow:StructureFlowTask",
    "slat_vae": "trainer.tasks.slat_vae:SlatVaeTask",
    "mesh_decoder": "trainer.tasks.mesh_decoder:MeshDecoderTask",
    "slat_flow": "trainer.tasks.slat_flow:SlatFlowTask",
    "flux_vae": "trainer.tasks.flux_vae:FluxVaeTask",
    "flux_text": "trainer.tasks.flux_text:FluxTextTask",
    "proportions": "trainer.tasks.proportions:ProportionsTask",
    "flux_views": "trainer.tasks.flux_views:FluxViewsTask",
}


def find_task(name: str) -> type[Any]:
    """The task class of a short name or of ``module:Class``; TriptychError when there is none."""
    return import_named(name, TASKS, "task")
