"""What core's MESH holds and our mesh does not: carried beside ours, so that core -> ours -> core loses nothing.

Three kinds, by what keeps them true. Switches such as unlit hold for any surface. What lies in the texture's layout
(emissive, occlusion_in_mr, further numbers of the material) holds as long as the UV stays. Tangents, and arrays of
newer cores that nobody here knows, hold for the very vertices that they came with. What no longer holds is left out,
and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from ..triptych.geometry.mesh import Mesh

# Read and written by core_mesh.
OURS = frozenset({
    "vertices", "faces", "uvs", "vertex_colors", "normals", "texture", "metallic_roughness", "normal_map", "material",
    "vertex_counts", "face_counts",
})  # fmt: skip
OUR_NUMBERS = frozenset({"base_color_factor", "metallic_factor", "roughness_factor"})
OF_THE_LAYOUT = frozenset({"emissive", "occlusion_in_mr"})
MATERIAL = "material"  # of which only the keys beyond ours are carried


@dataclass(frozen=True, eq=False)
class CoreFields:
    """Fields of core's class by name, arrays as a batch of one. vertices, faces, uv: of our mesh, as they came."""

    always: Mapping[str, Any]
    with_layout: Mapping[str, Any]
    with_vertices: Mapping[str, Any]
    vertices: np.ndarray
    faces: np.ndarray
    uv: np.ndarray | None


def carried_from(value: Any, index: int, mesh: Mesh) -> CoreFields | None:
    """What mesh ``index`` of core's batch holds beyond ``mesh``, which was made of it; None for nothing."""
    kinds: dict[str, dict[str, Any]] = {"always": {}, "with_layout": {}, "with_vertices": {}}
    for name, content in vars(value).items():
        if name in OURS or content is None or content is False:
            continue
        if name in OF_THE_LAYOUT:
            kinds["with_layout"][name] = _one_of(content, index, len(value.vertices))
        elif hasattr(content, "detach"):
            one = _one_of(content, index, len(value.vertices))
            kinds["with_vertices"][name] = _unpadded(one, value, mesh)
        else:
            kinds["always"][name] = content
    further = {key: one for key, one in _numbers(value).items() if key not in OUR_NUMBERS}
    if further:
        kinds["with_layout"][MATERIAL] = further
    if not any(kinds.values()):
        return None
    return CoreFields(**kinds, vertices=mesh.vertices, faces=mesh.faces, uv=mesh.uv)


def _numbers(value: Any) -> dict[str, Any]:
    return getattr(value, MATERIAL, None) or {}


def fitting(mesh: Mesh) -> dict[str, Any]:
    """The carried fields that are still true of the mesh, whose UV is one per vertex where arrays are to fit."""
    import numpy as np

    carried = mesh.carried
    if not isinstance(carried, CoreFields):
        return {}
    found = dict(carried.always)
    if _same_layout(mesh.uv, carried.uv):
        found |= carried.with_layout
        if not any(material.metallic_roughness_texture is not None for material in mesh.materials):
            found.pop("occlusion_in_mr", None)  # it says that this texture's red is the occlusion
        if mesh.uv_faces is None and all(
            np.array_equal(*pair) for pair in ((mesh.vertices, carried.vertices), (mesh.faces, carried.faces))
        ):
            found |= carried.with_vertices
    return found


def lost(before: Mesh, after: Mesh) -> list[str]:
    """A sentence on the carried fields that an operation had to drop; none for none."""
    names = sorted(set(_carried(before)) - set(fitting(after)))
    return [f"{_listed(names)} of the core mesh no longer fit and are dropped"] if names else []


def left_out(mesh: Mesh) -> list[str]:
    """A sentence on the carried fields that a mesh file does not get; none for none."""
    names = sorted(_carried(mesh))
    return [f"{_listed(names)} of the core mesh are left out: files get none of them"] if names else []


def _carried(mesh: Mesh) -> dict[str, Any]:
    carried = mesh.carried
    if not isinstance(carried, CoreFields):
        return {}
    return {**carried.always, **carried.with_layout, **carried.with_vertices}


def _listed(names: list[str]) -> str:
    said = ["further numbers of the material" if name == MATERIAL else name for name in names]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _one_of(content: Any, index: int, batch: int) -> Any:
    """An array's row as a batch of one, copied; one that all of the batch share, and what is no array, as it is."""
    if not hasattr(content, "detach"):
        return content
    own = content.ndim > 0 and len(content) in (1, batch)
    row = content[min(index, len(content) - 1)][None] if own else content
    return row.detach().cpu().clone()


def _unpadded(one: Any, value: Any, mesh: Mesh) -> Any:
    """A row without what pads it to the batch's longest mesh."""
    for array, count in ((value.vertices, len(mesh.vertices)), (value.faces, len(mesh.faces))):
        if one.ndim > 1 and one.shape[1] == array.shape[1]:
            return one[:, :count]
    return one


def _same_layout(uv: np.ndarray | None, before: np.ndarray | None) -> bool:
    """Whether a mesh's UV are some of those before: welding and cutting keep them, a new unwrap does not."""
    import numpy as np

    if uv is None or before is None:
        return uv is None and before is None
    rows = [np.ascontiguousarray(one, np.float32).view("f4,f4").ravel() for one in (uv, before)]
    return bool(np.isin(*rows).all())
