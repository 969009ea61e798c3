"""New triangles on an old surface: closed, in the same place, with the colours of the old one."""

import sys

import numpy as np
import pytest

from triptych.errors import TriptychError
from triptych.geometry.cleanup import boundary_loops
from triptych.geometry.mesh import Mesh
from triptych.geometry.remesh import isotropic_remesh, voxel_remesh


def double_box():
    """A box of 4 x 2 x 1 away from the origin with a smaller one inside; red at low x, blue at high x."""
    x, y, z = np.meshgrid([10.0, 14.0], [0.0, 2.0], [-3.0, -2.0], indexing="ij")
    vertices = np.stack([x, y, z], axis=-1).reshape(-1, 3).astype(np.float32)
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))], np.int64)
    centre = vertices.mean(axis=0)
    vertices = np.concatenate([vertices, (vertices - centre) * np.float32(0.5) + centre])
    faces = np.concatenate([faces, faces + 8])
    colors = np.where(vertices[:, :1] < 12, [[1, 0, 0, 1]], [[0, 0, 1, 1]]).astype(np.float32)
    return Mesh(vertices, faces, colors=colors)


def test_voxels_keep_the_outside_in_its_place():
    source = double_box()
    made = voxel_remesh(source, 32)
    assert not boundary_loops(made)
    np.testing.assert_allclose(made.bounds, source.bounds, atol=4 / 28)  # a voxel
    corners = made.vertices[made.faces].astype(np.float64)
    volume = np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert volume == pytest.approx(8.0, rel=0.15), "the inner wall is gone, and faces point outwards"
    assert made.uv is None and made.normals is None
    wanted = np.where(made.vertices[:, :1] < 12, [[1, 0, 0, 1]], [[0, 0, 1, 1]])
    clear = np.abs(made.vertices[:, 0] - 12) > 0.01
    np.testing.assert_array_equal(made.colors[clear], wanted[clear])


def test_finer_voxels_give_more_triangles_and_too_few_are_refused():
    assert len(voxel_remesh(double_box(), 48).faces) > 2 * len(voxel_remesh(double_box(), 24).faces)
    with pytest.raises(TriptychError, match="the resolution is 4 voxels: give at least 8"):
        voxel_remesh(double_box(), 4)


def test_isotropic_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymeshlab", None)
    with pytest.raises(TriptychError, match="pip install pymeshlab, or choose voxels"):
        isotropic_remesh(double_box(), 32)
