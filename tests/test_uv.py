"""UV unwrapping: one-to-one, deterministic, geometry untouched, failures stated."""

import numpy as np
import pytest
import torch
import trimesh

from triptych.errors import TriptychError
from triptych.geometry.mesh import Mesh
from triptych.geometry.uv import unwrap, unwrap_with_report
from triptych.render.rasterize import rasterize


def bumpy_ball(subdivisions=4) -> Mesh:
    ball = trimesh.creation.icosphere(subdivisions)
    wave = 1 + 0.15 * np.sin(7 * ball.vertices[:, [1]]) + 0.1 * np.sin(11 * ball.vertices[:, [2]])
    return Mesh((ball.vertices * wave * [1.0, 0.6, 1.4] * 0.3).astype(np.float32), ball.faces.astype(np.int64))


def box(extents=(1.0, 0.6, 0.4)) -> Mesh:
    solid = trimesh.creation.box(extents)
    return Mesh(solid.vertices.astype(np.float32), solid.faces.astype(np.int64))


def uv_areas(mesh: Mesh) -> np.ndarray:
    a, b, c = mesh.corner_uv().astype(np.float64).transpose(1, 0, 2)
    return np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2


def test_geometry_stays_and_the_layout_lies_in_the_unit_square():
    mesh = bumpy_ball()
    result, report = unwrap_with_report(mesh, texture_size=512)
    assert result.vertices is mesh.vertices and result.faces is mesh.faces
    assert result.uv.dtype == np.float32 and result.uv_faces.shape == mesh.faces.shape
    assert np.isfinite(result.uv).all() and result.uv.min() >= 0 and result.uv.max() <= 1
    assert 1 <= report.charts < 200 and 0.4 < report.utilisation < 1 and report.unplaced_faces == 0


def test_no_two_faces_share_a_texel():
    """The texels that all faces cover one by one are as many as the texels covered together."""
    mesh = unwrap(bumpy_ball(3), texture_size=256, padding=3)
    uv = torch.from_numpy(mesh.corner_uv())
    clip = torch.cat([uv * 2 - 1, torch.ones_like(uv)], dim=-1)
    size, single = 128, 0
    alone = torch.arange(3)[None]
    together = rasterize(clip.reshape(1, -1, 4), torch.arange(3 * len(uv)).reshape(-1, 3), size, size).triangle_id >= 0
    for start in range(0, len(uv), 256):
        single += int((rasterize(clip[start : start + 256], alone, size, size).triangle_id >= 0).sum())
    covered = int(together.sum())
    assert covered > 0.4 * size**2
    assert single - covered <= 0.002 * covered  # centres exactly on a shared edge belong to both


def test_charts_keep_the_gutter():
    """Charts grown by one texel each still do not meet: the gutter is at least two texels wide."""
    from scipy import ndimage

    mesh, report = unwrap_with_report(box(), texture_size=256, padding=4)
    assert report.gutter_texels >= 3.5
    uv = torch.from_numpy(mesh.corner_uv())
    clip = torch.cat([uv * 2 - 1, torch.ones_like(uv)], dim=-1).reshape(1, -1, 4)
    covered = rasterize(clip, torch.arange(len(uv) * 3).reshape(-1, 3), 256, 256).triangle_id[0].numpy() >= 0
    square = np.ones((3, 3))
    assert ndimage.label(covered, square)[1] == ndimage.label(ndimage.binary_dilation(covered, square), square)[1] == 6


def test_texels_are_square_on_the_surface():
    mesh = unwrap(box((1.0, 0.5, 0.25)), texture_size=512)
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(np.float64) for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    ratio = uv_areas(mesh) / area
    np.testing.assert_allclose(ratio / ratio.mean(), 1, atol=0.02)
    edges = mesh.corner_uv()[:, [1, 2, 0]] - mesh.corner_uv()
    lengths = np.linalg.norm(np.stack([b - a, c - b, a - c], axis=1), axis=2)
    stretch = np.linalg.norm(edges, axis=2) / lengths
    np.testing.assert_allclose(stretch / stretch.mean(), 1, atol=0.03)


def test_the_same_mesh_gets_the_same_layout():
    first, second = unwrap(bumpy_ball()), unwrap(bumpy_ball())
    assert np.array_equal(first.uv, second.uv) and np.array_equal(first.uv_faces, second.uv_faces)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_scale_and_place_do_not_matter(scale):
    mesh = box()
    moved = mesh.replace(vertices=(mesh.vertices * scale + np.float32(3 * scale)).astype(np.float32))
    assert unwrap_with_report(moved)[1].charts == unwrap_with_report(mesh)[1].charts == 6


def test_degenerate_and_doubled_faces_are_reported_and_draw_no_line():
    mesh = box()
    faces = np.concatenate([mesh.faces, mesh.faces[3:4], mesh.faces[5:6, ::-1], [[0, 0, 1], [4, 7, 7]]])
    result, report = unwrap_with_report(mesh.replace(faces=faces))
    areas = uv_areas(result)
    assert (areas[:12] > 1e-3).all() and (areas[-2:] == 0).all() and report.unplaced_faces == 2
    assert (np.ptp(result.corner_uv()[-2:], axis=1) == 0).all()


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (box().replace(faces=np.zeros((0, 3), np.int64)), "no faces"),
        (box().replace(faces=np.array([[0, 1, 99]])), "vertex 99 of 8"),
        (box().replace(vertices=np.full((8, 3), np.nan, np.float32)), "not finite"),
        (box().replace(faces=np.array([[0, 1, 1], [2, 2, 2]])), "has an area"),
    ],
)
def test_what_cannot_be_unwrapped_is_said(mesh, words):
    with pytest.raises(TriptychError, match=words):
        unwrap(mesh)


@pytest.mark.parametrize("size", [0, 63, 8193, 100.5])
def test_texture_size_has_bounds(size):
    with pytest.raises(TriptychError, match=r"64 to 8192"):
        unwrap(box(), texture_size=size)
