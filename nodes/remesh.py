"""New triangles on an old surface. Both functions keep the place and size of a mesh, and its vertex colours (from the
nearest old vertex); UV and textures are dropped, for they belong to the old triangles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..triptych.errors import TriptychError

if TYPE_CHECKING:
    import numpy as np

    from ..triptych.geometry.mesh import Mesh


def voxel_remesh(mesh: Mesh, resolution: int) -> Mesh:
    """The closed surface of the solid that the mesh bounds, from ``resolution`` voxels along its longest side.

    Holes are bridged and inner walls dropped by the rules of ``geometry.solid``; details below a voxel vanish.
    """
    from ..triptych.geometry.isosurface import isosurface
    from ..triptych.geometry.solid import solid_sdf

    low, high = mesh.bounds.astype("float64")
    longest = float((high - low).max())
    # Shrunk by two voxels on each side, so that the surface closes inside of the grid.
    scale = (resolution - 4) / resolution
    unit = mesh.normalized()
    made = isosurface(-solid_sdf(unit.replace(vertices=unit.vertices * scale), resolution))
    vertices = made.vertices / scale * longest + (low + high) / 2
    return _coloured(made.replace(vertices=vertices.astype("float32")), mesh)


def isotropic_remesh(mesh: Mesh, resolution: int) -> Mesh:
    """Even triangles whose edges are the longest side divided by ``resolution``, by pymeshlab (GPL, on request only).

    Raises TriptychError when pymeshlab is not installed.
    """
    try:
        import pymeshlab
    except ImportError as error:
        raise TriptychError(
            "isotropic remeshing needs the package pymeshlab, which is not installed: pip install pymeshlab, or choose "
            "voxels"
        ) from error
    import numpy as np

    from ..triptych.geometry.cleanup import weld
    from ..triptych.geometry.mesh import Mesh

    welded = weld(mesh)
    work = pymeshlab.MeshSet()
    work.add_mesh(pymeshlab.Mesh(welded.vertices.astype(np.float64), welded.faces.astype(np.int32)))
    edge = float((mesh.bounds[1] - mesh.bounds[0]).max()) / resolution
    work.meshing_isotropic_explicit_remeshing(targetlen=pymeshlab.PureValue(edge), iterations=6)
    result = work.current_mesh()
    made = Mesh(result.vertex_matrix().astype(np.float32), result.face_matrix().astype(np.int64))
    return _coloured(made, mesh)


def _coloured(made: Mesh, source: Mesh) -> Mesh:
    if source.colors is None:
        return made.replace(normals=None)
    from scipy.spatial import cKDTree

    _, nearest = cKDTree(source.vertices).query(made.vertices)
    colors: np.ndarray = source.colors[nearest]
    return made.replace(colors=colors, normals=None)
