"""New triangles on an old surface. Both functions keep the place and size of a mesh, and its vertex colours (from the
nearest old vertex); UV and textures are dropped, for they belong to the old triangles."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from ..errors import TriptychError
from .cleanup import weld
from .isosurface import isosurface
from .mesh import Mesh
from .solid import solid_sdf

MARGIN_VOXELS = 2  # between the surface and the grid's border, so that it closes inside of the grid


def voxel_remesh(mesh: Mesh, resolution: int) -> Mesh:
    """The closed surface of the solid that the mesh bounds, from ``resolution`` voxels along its longest side.

    Holes are bridged and inner walls dropped by the rules of ``geometry.solid``; details below a voxel vanish. Raises
    TriptychError for a resolution below 8.
    """
    if resolution < 8:
        raise TriptychError(f"the resolution is {resolution} voxels: give at least 8")
    low, high = mesh.bounds.astype(np.float64)
    longest = float((high - low).max())
    scale = (resolution - 2 * MARGIN_VOXELS) / resolution
    unit = mesh.normalized()
    made = isosurface(-solid_sdf(unit.replace(vertices=unit.vertices * scale), resolution))
    vertices = made.vertices / scale * longest + (low + high) / 2
    return _coloured(made.replace(vertices=vertices.astype(np.float32)), mesh)


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
    _, nearest = cKDTree(source.vertices).query(made.vertices)
    return made.replace(colors=source.colors[nearest], normals=None)
