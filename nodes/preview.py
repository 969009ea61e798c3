"""A mesh for the eye: a GLB in ComfyUI's temp folder, and what a viewer needs to know about it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .core_mesh import as_mesh
from .paths import entry
from .schema import mesh_input, schema

if TYPE_CHECKING:
    from ..triptych.geometry.mesh import Mesh

FOLDER = "triptych"  # inside temp
UI_VERSION = 1


class Preview3D(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Preview3D",
            display_name="Preview mesh",
            description="Shows a mesh to turn and look at, or two with a slider between them.",
            search_aliases=["preview 3d", "view mesh", "viewer", "show mesh"],
            is_output_node=True,
            inputs=[
                mesh_input("mesh", "The mesh to show."),
                mesh_input("compare_with", "A second mesh, to compare with a slider.", optional=True),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, mesh: Any, compare_with: Any = None) -> io.NodeOutput:
        shown = {"mesh": as_mesh(mesh)}
        if compare_with is not None:
            shown["reference"] = as_mesh(compare_with)
        return io.NodeOutput(ui=preview(shown))


def preview(meshes: dict[str, Mesh]) -> dict[str, list[Any]]:
    """Writes a GLB of each mesh to temp and returns the node's UI output. The name follows from the content: the same
    mesh keeps its address, and a browser never shows an older one."""
    import folder_paths

    from ..triptych.geometry.files import write_files
    from ..triptych.geometry.gltf_writer import encode_glb

    temp = Path(folder_paths.get_temp_directory())
    (temp / FOLDER).mkdir(parents=True, exist_ok=True)
    models = []
    for label, mesh in meshes.items():
        data = encode_glb(mesh, label)
        path = temp / FOLDER / f"{label}_{hashlib.sha256(data).hexdigest()[:16]}.glb"
        write_files(path.parent, {path.name: data})
        models.append(entry(path, temp, "temp") | described(mesh, "glb", label))
    return ui_output(models)


def ui_output(models: list[dict[str, Any]]) -> dict[str, list[Any]]:
    files = [{key: model[key] for key in ("filename", "subfolder", "type")} for model in models]
    return {"3d": files, "triptych": [{"version": UI_VERSION, "models": models, "settings": {}}]}


def described(mesh: Mesh, file_format: str, label: str) -> dict[str, Any]:
    """Facts about a mesh that a viewer shows."""
    textures = [m.base_color_texture.shape for m in mesh.materials if m.base_color_texture is not None]
    low, high = mesh.bounds
    return {
        "format": file_format,
        "label": label,
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "size": [round(float(side), 6) for side in high - low],
        "texture": [int(textures[0][1]), int(textures[0][0])] if textures else None,
        "vertex_colors": mesh.colors is not None,
        "uv": mesh.uv is not None,
    }
