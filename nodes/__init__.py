"""ComfyUI nodes: one module per stage of the graph, each a thin adapter around the library.

    flux or views -> bundles, reconstruct -> clean, texture -> render, files, preview, compare
    core_mesh joins core's MESH

Nothing here computes: a node converts its inputs, calls one function of ``triptych`` and converts the result. Heavy
modules are imported when a node runs, so the pack adds little to ComfyUI's start.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    bundles,
    clean,
    compare,
    core_mesh,
    files,
    flux,
    flux_native,
    preview,
    reconstruct,
    render,
    routes,
    sheets,
    texture,
    views,
)

NODES: list[type[io.ComfyNode]] = [
    bundles.LoadBundle,
    flux.LoadFlux,
    files.LoadMesh,
    views.PrepareViews,
    flux.FluxViews,
    flux_native.FluxTinyNative,
    flux_native.FluxPrepare,
    flux_native.FluxSplit,
    sheets.SplitViewSheet,
    sheets.JoinViewSheet,
    reconstruct.Reconstruct,
    clean.CleanMesh,
    texture.TextureMesh,
    render.RenderViews,
    files.ExportMesh,
    preview.Preview3D,
    compare.CompareMeshes,
    core_mesh.MeshToCore,
    core_mesh.MeshFromCore,
]


class TriptychExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        bundles.register_folder()
        routes.register()
        return NODES
