"""The mesh that every part of Triptych hands to the next.

Arrays are numpy, never mutated in place: every operation returns a new ``Mesh`` (``dataclasses.replace``).
Frame: right-handed, +Y up, the object faces +Z (glTF's frame).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import TriptychError


@dataclass(frozen=True)
class Material:
    """A metallic-roughness material, as in glTF 2.0.

    base_color: factor, (4,) float 0-1, linear as in glTF; multiplies the texture and the vertex colour.
    base_color_texture, metallic_roughness_texture (G roughness, B metallic), normal_texture:
        (H, W, 3 or 4) uint8 or None; row 0 is the top of the picture. Base colour is sRGB, the others linear.
    metallic, roughness: factors in [0, 1].
    """

    name: str = "material"
    base_color: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    base_color_texture: np.ndarray | None = None
    metallic: float = 0.0
    roughness: float = 1.0
    metallic_roughness_texture: np.ndarray | None = None
    normal_texture: np.ndarray | None = None


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh.

    vertices: (V, 3) float32, world units.
    faces: (F, 3) int64, counter-clockwise seen from outside.
    normals: (V, 3) float32 unit vertex normals or None (then computed when needed).
    colors: (V, 4) float32 sRGB 0-1 with alpha, or None.
    uv: (T, 2) float32 or None; v points up (OBJ convention: v = 0 is the bottom row of the texture).
    uv_faces: (F, 3) int64 indices into ``uv`` (corner UV), or None when ``uv`` has one row per vertex.
    materials: one or more materials; face_materials: (F,) int64 index into them, or None when all use the first.
    carried: what a host program keeps beside the mesh. Nothing here looks at it; ``replace`` hands it on.
    """

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray | None = None
    colors: np.ndarray | None = None
    uv: np.ndarray | None = None
    uv_faces: np.ndarray | None = None
    materials: tuple[Material, ...] = ()
    face_materials: np.ndarray | None = None
    carried: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.vertices.ndim != 2 or self.vertices.shape[1] != 3:
            raise TriptychError(f"vertices must be (V, 3), got {self.vertices.shape}")
        if self.faces.ndim != 2 or self.faces.shape[1] != 3:
            raise TriptychError(f"faces must be (F, 3), got {self.faces.shape}: triangulate the mesh first")

    def replace(self, **changes) -> Mesh:
        return replace(self, **changes)

    @property
    def bounds(self) -> np.ndarray:
        """(2, 3) float32: the smallest and largest corner of the vertices that faces use."""
        used = self.vertices[np.unique(self.faces)] if len(self.faces) else self.vertices
        return np.stack([used.min(axis=0), used.max(axis=0)])

    def corner_uv(self) -> np.ndarray | None:
        """(F, 3, 2) float32 UV per face corner, or None."""
        if self.uv is None:
            return None
        return self.uv[self.faces if self.uv_faces is None else self.uv_faces]

    def face_normals(self) -> np.ndarray:
        """(F, 3) float32 unit face normals; zero for degenerate faces."""
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        cross = np.cross(b - a, c - a)
        length = np.linalg.norm(cross, axis=1, keepdims=True)
        return np.divide(cross, length, out=np.zeros_like(cross), where=length > 0)

    def vertex_normals(self) -> np.ndarray:
        """(V, 3) float32: the stored normals, else the area-weighted mean of the face normals."""
        if self.normals is not None:
            return self.normals
        a, b, c = (self.vertices[self.faces[:, i]] for i in range(3))
        cross = np.cross(b - a, c - a)
        total = np.stack(
            [np.bincount(self.faces.ravel(), np.repeat(cross[:, k], 3), len(self.vertices)) for k in range(3)], axis=1
        )
        length = np.linalg.norm(total, axis=1, keepdims=True)
        # Without faces the sums are of whole numbers.
        return np.divide(total, length, out=np.zeros(total.shape), where=length > 1e-20).astype(np.float32)

    def normalized(self) -> Mesh:
        """Centred, longest side 1: model space, inside [-0.5, 0.5]^3.

        Raises TriptychError when the mesh has no extent.
        """
        low, high = self.bounds.astype(np.float64)
        longest = float((high - low).max())
        if not np.isfinite(longest) or longest <= 0:
            raise TriptychError(f"the mesh has no extent ({low.tolist()} to {high.tolist()}): nothing to scale")
        return self.replace(vertices=((self.vertices - (low + high) / 2) / longest).astype(np.float32))


def weld_index(vertices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct positions (W, 3) and, per vertex, its row among them (V,) int64. Only exact copies are merged."""
    # + 0 turns -0.0 into 0.0; comparing rows as bytes is ten times faster than np.unique(axis=0).
    rows = np.ascontiguousarray(vertices.astype(np.float32) + np.float32(0))
    _, first, inverse = np.unique(rows.view("V12").ravel(), return_index=True, return_inverse=True)
    return rows[first], inverse.ravel().astype(np.int64)
