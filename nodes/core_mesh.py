"""Our mesh and core's MESH, both ways.

Core's MESH holds a batch of meshes as tensors: vertices (B, N, 3), faces (B, M, 3); its newest class adds per-vertex
UV (v downwards, as in glTF), linear vertex colours, normals, textures and material numbers, and counts where a batch
is padded. Older cores know vertices and faces only; there the rest is set as attributes all the same, so that
it survives a trip through nodes that hand the object on, and our own nodes find it again. What our mesh has no place
for (unlit, tangents, emissive, further numbers of the material) is carried beside it; see ``core_fields``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..triptych.errors import TriptychError
from .core_fields import MATERIAL, carried_from, fitting, lost
from .schema import MeshSocket, mesh_input, schema

if TYPE_CHECKING:
    import numpy as np

    from ..triptych.geometry.mesh import Material, Mesh

OPTIONAL_FIELDS = {
    "uvs": None,
    "vertex_colors": None,
    "texture": None,
    "metallic_roughness": None,
    "vertex_counts": None,
    "face_counts": None,
    "unlit": False,
    "normals": None,
    "tangents": None,
    "normal_map": None,
    "occlusion_in_mr": False,
    "material": None,
    "emissive": None,
}


class MeshToCore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MeshToCore",
            display_name="Mesh to core mesh",
            description="Hands a Triptych mesh to ComfyUI's own mesh nodes, with UV, colours, normals and textures.",
            search_aliases=["convert mesh", "MESH"],
            inputs=[mesh_input("mesh", "The mesh to hand on.")],
            outputs=[io.Mesh.Output("core_mesh", display_name="MESH", tooltip="For ComfyUI's own mesh nodes.")],
        )

    @classmethod
    def execute(cls, mesh: Any) -> io.NodeOutput:
        source = as_mesh(mesh)
        return io.NodeOutput(to_core(source), ui={"text": lost(source, source)})


class MeshFromCore(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "MeshFromCore",
            display_name="Mesh from core mesh",
            description="Takes one mesh of a batch from ComfyUI's own mesh nodes, with what it carries.",
            search_aliases=["convert mesh", "MESH"],
            inputs=[
                io.Mesh.Input("core_mesh", tooltip="From ComfyUI's own mesh nodes."),
                io.Int.Input("index", default=0, min=0, max=4095, tooltip="Which mesh of the batch, counted from 0."),
            ],
            outputs=[MeshSocket.Output("mesh", display_name="mesh", tooltip="For Triptych's nodes.")],
        )

    @classmethod
    def execute(cls, core_mesh: Any, index: int) -> io.NodeOutput:
        return io.NodeOutput(from_core(core_mesh, index))


def as_mesh(value: Any) -> Mesh:
    """A mesh socket's value, ours or core's, as ours. Raises TriptychError for core batches of several meshes."""
    if hasattr(value, "face_materials"):
        return value
    if not hasattr(value, "vertices") or not hasattr(value, "faces"):
        raise TriptychError(f"a {type(value).__name__} is connected where a mesh is needed: connect a mesh")
    if len(value.vertices) != 1:
        raise TriptychError(
            f"the connected core mesh is a batch of {len(value.vertices)}: choose one of them with Mesh from core mesh"
        )
    return from_core(value, 0)


def to_core(mesh: Mesh, core_class: type | None = None) -> Any:
    """A batch of one in core's class (``core_class`` or the newest that is there); arrays are copied."""
    import numpy as np
    import torch

    from ..triptych.geometry.colour import colors_to_linear
    from ..triptych.geometry.gltf_writer import split_seams

    core_class = core_class or _core_class()
    split = split_seams(mesh)
    fields: dict[str, Any] = dict(OPTIONAL_FIELDS)

    def batch(array: np.ndarray | None) -> torch.Tensor | None:
        return None if array is None else torch.tensor(np.ascontiguousarray(array))[None]

    if split.uv is not None:
        fields["uvs"] = batch(np.stack([split.uv[:, 0], 1 - split.uv[:, 1]], axis=1).astype(np.float32))
    if split.colors is not None:
        fields["vertex_colors"] = batch(colors_to_linear(split.colors))
    fields["normals"] = batch(None if split.normals is None else split.normals.astype(np.float32))
    if split.materials:
        fields |= _material_fields(_only_material(split))
    carried = fitting(mesh)
    numbers = carried.pop(MATERIAL, {}) | (fields[MATERIAL] or {})
    fields |= {**carried, MATERIAL: numbers or None}
    required = {"vertices": batch(split.vertices.astype(np.float32)), "faces": batch(split.faces.astype(np.int64))}
    known = inspect.signature(core_class).parameters
    result = core_class(**required, **{name: value for name, value in fields.items() if name in known})
    for name, value in fields.items():
        if name not in known:
            setattr(result, name, value)
    return result


def from_core(value: Any, index: int) -> Mesh:
    """Mesh ``index`` of core's batch; arrays are copied, what the class lacks stays None. Raises TriptychError for an
    index beyond the batch and for shapes that are no mesh."""
    import numpy as np

    from ..triptych.geometry.colour import colors_to_srgb
    from ..triptych.geometry.mesh import Mesh

    if not 0 <= index < len(value.vertices):
        raise TriptychError(
            f"the core mesh is a batch of {len(value.vertices)}, it has no number {index}: count from 0"
        )
    counts = _count(value, "vertex_counts", index), _count(value, "face_counts", index)

    def row(name: str, count: int | None = None) -> np.ndarray | None:
        field = getattr(value, name, None)
        if field is None or len(field) == 0:
            return None
        one = field[index if index < len(field) else 0].detach().cpu().numpy()
        return np.array(one if count is None else one[:count])

    vertices, faces = row("vertices", counts[0]), row("faces", counts[1])
    if vertices is None or faces is None or len(vertices) == 0 or len(faces) == 0:
        raise TriptychError("the core mesh has no vertices or no faces: connect one that has a surface")
    uvs, colors, normals = (row(name, counts[0]) for name in ("uvs", "vertex_colors", "normals"))
    uv = None if uvs is None else np.stack([uvs[:, 0], 1 - uvs[:, 1]], axis=1).astype(np.float32)
    mesh = Mesh(
        vertices.astype(np.float32),
        faces.astype(np.int64),
        normals=None if normals is None else normals.astype(np.float32),
        colors=None if colors is None else colors_to_srgb(colors),
        uv=uv,
        materials=_material(value, row),
    )
    return mesh.replace(carried=carried_from(value, index, mesh))


def _core_class() -> type:
    try:
        from comfy_api.latest import Types

        return Types.MESH
    except (ImportError, AttributeError):  # before Types there was only the class of the Hunyuan nodes
        from comfy_extras.nodes_hunyuan3d import MESH

        return MESH


def _count(value: Any, name: str, index: int) -> int | None:
    counts = getattr(value, name, None)
    return None if counts is None else int(counts[index])


def _only_material(mesh: Mesh) -> Material:
    used = {0} if mesh.face_materials is None else set(mesh.face_materials.tolist())
    if len(used) > 1:
        raise TriptychError(
            f"the mesh uses {len(used)} materials and a core mesh holds one: bake one texture with Texture mesh first"
        )
    return mesh.materials[used.pop()]


def _material_fields(material: Material) -> dict[str, Any]:
    return {
        "texture": _texture(material.base_color_texture),
        "metallic_roughness": _texture(material.metallic_roughness_texture),
        "normal_map": _texture(material.normal_texture),
        "material": {
            "base_color_factor": [float(value) for value in material.base_color],
            "metallic_factor": float(material.metallic),
            "roughness_factor": float(material.roughness),
        },
    }


def _texture(picture: np.ndarray | None) -> Any:
    """(H, W, 3 or 4) uint8 -> (1, H, W, 3) float 0-1."""
    import torch

    return None if picture is None else torch.tensor(picture[..., :3].copy())[None].float() / 255


def _material(value: Any, row: Any) -> tuple[Material, ...]:
    import numpy as np

    from ..triptych.geometry.mesh import Material

    pictures = [row(name) for name in ("texture", "metallic_roughness", "normal_map")]
    numbers = getattr(value, "material", None) or {}
    if all(picture is None for picture in pictures) and not numbers:
        return ()
    base, rough, normal = (
        None if one is None else np.rint(np.clip(one, 0, 1) * 255).astype(np.uint8) for one in pictures
    )
    return (
        Material(
            base_color=tuple(numbers.get("base_color_factor", (1.0, 1.0, 1.0, 1.0))),
            base_color_texture=base,
            metallic=float(numbers.get("metallic_factor", 1.0 if rough is not None else 0.0)),
            roughness=float(numbers.get("roughness_factor", 1.0)),
            metallic_roughness_texture=rough,
            normal_texture=normal,
        ),
    )
