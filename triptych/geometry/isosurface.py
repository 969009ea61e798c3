"""From a scalar field on the model cube to a closed mesh: marching cubes.

The field is sampled at the voxel centres ``(i + .5) / R - .5`` of the model cube, index ``[x, y, z]``. A sample above
the level is inside. What is added to the raw algorithm (Lewiner's, from scikit-image):

- **Padding.** One layer outside the cube mirrors the border's values across the level, so that a solid that touches the
  border is closed exactly on the cube's face.
- **No coincident vertices.** Where a sample equals the level, all edges of that sample cross at one point, and faces of
  no area follow; removing those afterwards tears or pinches the surface. So a sample nearer to the level than ``NUDGE``
  of its largest neighbour is first moved away from it, which moves a vertex by at most that share of a voxel.
- **No ties.** Where the diagonals of a voxel face are in balance (any checkerboard in a field of 0 and 1), neighbouring
  cubes may decide differently how to join them, which leaves holes. The inside is scaled by ``TIE_BREAK``.
- **Sub-voxel vertices.** They lie where the linear interpolation crosses the level, so a signed distance field gives a
  surface far more precise than a voxel; a field that is only 0 or 1 gives steps (see ``convert.mesh_from_voxels``).

What it does not do: keep sharp edges (marching cubes cuts them by up to half a voxel).
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from skimage import measure

from ..errors import TriptychError
from .mesh import Mesh

NUDGE = 5e-3  # of the neighbourhood's largest distance from the level
TIE_BREAK = 0.999  # applied to the inside; moves a vertex by at most 0.0003 voxel


def isosurface(field: np.ndarray | torch.Tensor, level: float = 0.0, *, gradient_normals: bool = False) -> Mesh:
    """The closed surface around the samples above ``level``.

    field: (R, R, R) array or tensor of any real dtype, index [x, y, z], samples at the voxel centres of the model cube.
    gradient_normals: attach unit vertex normals from the field's gradient (smoother than those of the faces).
    Returns a mesh in model space, inside [-0.5, 0.5]^3, faces counter-clockwise from outside, every edge in two faces.
    Raises TriptychError when the field is not a finite cube, or when nothing is inside.
    Source: Lewiner et al., Efficient implementation of marching cubes' cases with topological guarantees, 2003.
    """
    distance = _checked(field) - np.float32(level)
    if not (distance > 0).any():
        raise TriptychError(
            f"nothing is inside the surface: the field's largest value, {float(distance.max() + level):.4g}, does not "
            f"exceed the level {level:.4g}; lower the level, or look at what made the field"
        )
    padded = _away_from_zero(_mirror_pad(distance))
    # scikit-image's "ascent" is what turns the faces of a field that is larger inside outwards.
    vertices, faces, _, _ = measure.marching_cubes(padded, level=0.0, gradient_direction="ascent")
    normals = _gradient_normals(padded, vertices) if gradient_normals else None
    resolution = distance.shape[0]
    # The padding moved indices by one, and the centre of voxel i lies at i + .5.
    model = (vertices.astype(np.float64) - 0.5) / resolution - 0.5
    return Mesh(vertices=model.astype(np.float32), faces=faces.astype(np.int64), normals=normals)


def _checked(field: np.ndarray | torch.Tensor) -> np.ndarray:
    array = field.detach().float().cpu().numpy() if isinstance(field, torch.Tensor) else np.asarray(field)
    if array.ndim != 3 or len(set(array.shape)) != 1 or array.shape[0] < 2:
        raise TriptychError(f"a field must be (R, R, R) with R at least 2, got {tuple(array.shape)}")
    array = array.astype(np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        raise TriptychError(f"the field has {int((~finite).sum())} values that are not finite: replace them first")
    return array


def _mirror_pad(distance: np.ndarray) -> np.ndarray:
    """One layer more on every side, outside everywhere, mirrored across the level so that the crossing is half-way."""
    padded = -np.abs(np.pad(distance, 1, mode="edge"))
    padded[1:-1, 1:-1, 1:-1] = distance
    return padded


def _away_from_zero(padded: np.ndarray) -> np.ndarray:
    smallest = NUDGE * ndimage.maximum_filter(np.abs(padded), size=3, mode="nearest")
    return np.where(padded > 0, TIE_BREAK * np.maximum(padded, smallest), np.minimum(padded, -smallest))


def _gradient_normals(padded: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """(V, 3) float32 unit vectors against the gradient, from central differences interpolated at the vertices."""
    gradient = np.stack(
        [ndimage.map_coordinates(axis, vertices.T, order=1, mode="nearest") for axis in np.gradient(padded)], axis=1
    )
    length = np.linalg.norm(gradient, axis=1, keepdims=True)
    return np.divide(-gradient, length, out=np.zeros_like(gradient), where=length > 1e-20).astype(np.float32)
