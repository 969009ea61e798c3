"""Rendered views: left is left, colours are exact, light falls where it should, sheets are written whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_NAMES, Camera, rig_cameras, turntable_cameras
from triptych.geometry.mesh import Material, Mesh
from triptych.render import views as module
from triptych.render.sheets import contact_sheet, turntable_sheet
from triptych.render.views import linear_to_srgb, render_mesh, render_views, shade, srgb_to_linear

CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], dtype=np.float32)
SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
CUBE = np.array([[q[0], q[i], q[i + 1]] for q in SIDES for i in (1, 2)])
PERSPECTIVE = Camera(azimuth_deg=20, elevation_deg=25, radius=2.5, half_extent=None, fov_deg=40)
RED, GREEN, BLUE = (1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)


def box(centre: tuple[float, ...], sides: tuple[float, ...], color: tuple[float, ...]) -> Mesh:
    vertices = (CORNERS * np.array(sides) + np.array(centre)).astype(np.float32)
    return Mesh(vertices, CUBE, colors=np.tile(np.array(color, dtype=np.float32), (8, 1)))


def join(*parts: Mesh) -> Mesh:
    return Mesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.faces + 8 * i for i, part in enumerate(parts)]),
        colors=np.concatenate([part.colors for part in parts]),
    )


def jack() -> Mesh:
    """A grey cube with a red arm to +X, a green one to +Y and a blue one to +Z."""
    grey = box((0, 0, 0), (0.2, 0.2, 0.2), (0.5, 0.5, 0.5, 1))
    red = box((0.3, 0, 0), (0.4, 0.1, 0.1), RED)
    green = box((0, 0.3, 0), (0.1, 0.4, 0.1), GREEN)
    return join(grey, red, green, box((0, 0, 0.3), (0.1, 0.1, 0.4), BLUE))


def quad(**changes) -> Mesh:
    """A unit square in the plane z = 0 that faces +Z, UV (0, 0) at its lower left."""
    vertices = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]], dtype=np.float32)
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], dtype=np.float32)
    return Mesh(vertices, np.array([[0, 1, 2], [0, 2, 3]]), uv=uv).replace(**changes)


def close_up() -> list[Camera]:
    return [Camera(half_extent=0.5)]


def centre_of(picture: torch.Tensor, channel: int) -> tuple[float, float]:
    """Mean (x right, y up) in NDC of the pixels where one channel is saturated and the others are not."""
    others = [i for i in range(3) if i != channel]
    mask = (picture[channel] > 0.9) & (picture[others].amax(dim=0) < 0.1)
    assert int(mask.sum()) > 20
    row, column = mask.nonzero().float().unbind(1)
    size = picture.shape[-1]
    return float((2 * (column + 0.5) / size - 1).mean()), float((1 - 2 * (row + 0.5) / size).mean())


def test_left_is_left_and_up_is_up():
    albedo = render_views(jack(), rig_cameras(), 96).albedo
    for name, picture in zip(VIEW_NAMES, albedo, strict=True):
        assert centre_of(picture, 1)[1] > 0.3, name
    red = {name: centre_of(albedo[i], 0) for i, name in enumerate(VIEW_NAMES) if name != "right"}
    blue = {name: centre_of(albedo[i], 2) for i, name in enumerate(VIEW_NAMES) if name != "back"}
    # The camera at azimuth 90 stands on +X, the subject's left: it sees +Z on its left hand, and +X head on.
    assert red["front"][0] > 0.3 and red["back"][0] < -0.3 and abs(red["left"][0]) < 0.02
    assert blue["left"][0] < -0.3 and blue["right"][0] > 0.3 and abs(blue["front"][0]) < 0.02
    right_view = albedo[3]
    assert not ((right_view[0] > 0.9) & (right_view[1] < 0.1)).any()  # the red arm is behind the cube from there


def test_depth_is_measured_along_the_view_axis():
    views = render_views(jack(), rig_cameras(), 64)
    assert float(views.depth[0].min()) == pytest.approx(1.5, abs=1e-5)  # the blue arm ends at z = .5, camera at 2
    assert float(views.depth[2].min()) == pytest.approx(1.9, abs=1e-5)  # the cube's back
    assert torch.equal(torch.isinf(views.depth), views.alpha == 0)


def test_alpha_is_the_covered_share():
    views = render_views(quad(), [Camera(half_extent=1.0)], 30, supersample=4)
    # The square spans 15 pixels of 30: 7.5 on each side of the middle, so its rim pixels are half covered.
    profile = views.alpha[0, 0, 15]
    assert profile[8:22].eq(1).all() and profile[:7].eq(0).all() and profile[23:].eq(0).all()
    assert profile[7] == profile[22] == 0.5
    assert float(views.alpha.sum()) == pytest.approx(225, abs=1e-3)


def test_colours_are_straight_at_the_rim():
    mesh = box((0, 0, 0), (0.5, 0.6, 0.7), (0.8, 0.4, 0.2, 1))
    views = render_views(mesh, [PERSPECTIVE, Camera(30, 40)], 50, supersample=3)
    seen = (views.alpha > 0).expand(-1, 3, -1, -1)
    expected = torch.tensor([0.8, 0.4, 0.2])[None, :, None, None].expand_as(seen)
    assert ((views.alpha > 0) & (views.alpha < 1)).any()
    torch.testing.assert_close(views.albedo[seen], expected[seen], atol=1e-5, rtol=0)
    assert (views.albedo[~seen] == 0).all() and (views.normal[~seen] == 0).all()


def test_a_texture_keeps_its_pixels_and_its_upright_way():
    texture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mesh = quad(materials=(Material(base_color_texture=texture),))
    albedo = render_views(mesh, close_up(), 16, supersample=1).albedo[0]  # one pixel is one texel
    assert np.abs(albedo.permute(1, 2, 0).numpy() * 255 - texture).max() < 0.1


def test_uv_wraps_and_corner_uv_are_used():
    texture = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    mesh = quad(materials=(Material(base_color_texture=texture),))
    shifted = mesh.replace(uv=mesh.uv + np.array([2, -3], dtype=np.float32))
    order = np.array([2, 0, 3, 1])
    corner = mesh.replace(uv=mesh.uv[order], uv_faces=np.argsort(order)[mesh.faces])
    plain = render_views(mesh, close_up(), 16).albedo
    torch.testing.assert_close(render_views(shifted, close_up(), 16).albedo, plain, atol=1e-4, rtol=0)
    assert torch.equal(render_views(corner, close_up(), 16).albedo, plain)


def test_texture_vertex_colour_and_factor_multiply_in_linear_light():
    texture = np.full((2, 2, 3), 128, dtype=np.uint8)
    colors = np.tile(np.array([0.5, 1.0, 0.0, 1.0], dtype=np.float32), (4, 1))
    mesh = quad(colors=colors, materials=(Material(base_color=(0.5, 0.25, 1.0, 1.0), base_color_texture=texture),))
    grey = srgb_to_linear(torch.tensor(128 / 255))
    half = srgb_to_linear(torch.tensor(0.5))
    expected = linear_to_srgb(torch.stack([grey * half * 0.5, grey * 0.25, grey * 0]))
    got = render_views(mesh, close_up(), 8).albedo[0, :, 4, 4]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_several_materials_go_to_their_faces():
    texture = np.zeros((4, 8, 3), dtype=np.uint8)
    texture[..., 1] = 255
    materials = (Material(base_color=RED), Material(base_color_texture=texture), Material(base_color=BLUE))
    mesh = quad(materials=materials, face_materials=np.array([2, 1]))
    albedo = render_views(mesh, close_up(), 32).albedo[0]
    torch.testing.assert_close(albedo[:, 28, 24], torch.tensor([0.0, 0.0, 1.0]))  # the lower right half is face 0
    torch.testing.assert_close(albedo[:, 4, 8], torch.tensor([0.0, 1.0, 0.0]))
    without_uv = render_views(mesh.replace(uv=None), close_up(), 32).albedo[0]
    torch.testing.assert_close(without_uv[:, 4, 8], torch.ones(3))
    torch.testing.assert_close(without_uv[:, 28, 24], torch.tensor([0.0, 0.0, 1.0]))


def test_normals_face_the_viewer_on_both_sides():
    away = quad(faces=quad().faces[:, ::-1])
    stored = [np.tile(np.array([0, 0, z], dtype=np.float32), (4, 1)) for z in (1, -1)]
    for mesh in (quad(), away, *(quad(normals=normals) for normals in stored)):
        for camera, z in ((Camera(half_extent=0.5), 1.0), (Camera(180, half_extent=0.5), -1.0), (PERSPECTIVE, 1.0)):
            normal = render_views(mesh, [camera], 16).normal[0, :, 8, 8]
            torch.testing.assert_close(normal, torch.tensor([0, 0, z]), atol=1e-6, rtol=0)


def test_vertex_and_face_normals_are_what_they_say():
    trimesh = pytest.importorskip("trimesh")
    sphere = trimesh.creation.icosphere(2, radius=0.5)
    mesh = Mesh(sphere.vertices.astype(np.float32), np.asarray(sphere.faces, dtype=np.int64))
    camera, size = Camera(half_extent=0.6), 64
    centres = (torch.arange(size) + 0.5) * (1.2 / size) - 0.6
    y, x = torch.meshgrid(-centres, centres, indexing="ij")
    inner = x**2 + y**2 < 0.4**2
    exact = torch.stack([x, y, (0.25 - x**2 - y**2).clamp_min(0).sqrt()]) / 0.5

    def worst_deg(normals: str, source: Mesh = mesh) -> float:
        normal = render_views(source, [camera], size, normals=normals).normal[0]
        return float(torch.rad2deg(torch.acos((normal * exact).sum(dim=0)[inner].clamp(-1, 1))).max())

    assert worst_deg("vertex") < 2 < 5 < worst_deg("face") < 20
    assert worst_deg("auto") == worst_deg("face")
    stored = mesh.replace(normals=(mesh.vertices / 0.5).astype(np.float32))
    assert worst_deg("auto", stored) < 2


def test_cameras_of_both_kinds_mix_and_batches_do_not_matter(monkeypatch):
    cameras = [*rig_cameras(), PERSPECTIVE]
    together = render_views(jack(), cameras, 40)
    alone = [render_views(jack(), [camera], 40) for camera in cameras]
    monkeypatch.setattr(module, "PIXELS_PER_BATCH", 80 * 80 * 2)
    in_twos = render_views(jack(), cameras, 40)
    for name in ("albedo", "alpha", "normal", "depth"):
        torch.testing.assert_close(getattr(together, name), getattr(in_twos, name), atol=1e-5, rtol=0)
        separately = torch.cat([getattr(views, name) for views in alone])
        torch.testing.assert_close(getattr(together, name), separately, atol=1e-5, rtol=0)


def test_render_is_repeatable_and_leaves_the_mesh_alone():
    mesh = jack()
    for array in (mesh.vertices, mesh.faces, mesh.colors):
        array.setflags(write=False)
    first, second = render_views(mesh, [PERSPECTIVE], 48), render_views(mesh, [PERSPECTIVE], 48)
    assert torch.equal(first.albedo, second.albedo) and torch.equal(first.normal, second.normal)


def test_light_falls_from_where_it_stands():
    cube = box((0, 0, 0), (0.6, 0.6, 0.6), (0.8, 0.8, 0.8, 1))
    cameras = [Camera(45, 35)]
    rendered = render_views(cube, cameras, 64)
    plain = {"ambient": 0.0, "headlight": 0.0, "key": 1.0}

    def side(normal_axis: int, azimuth: float, follow: bool = False) -> float:
        lamp = {"light_azimuth_deg": azimuth, "light_elevation_deg": 0, "follow_camera": follow}
        image = shade(rendered, cameras, **lamp, **plain)
        return float(image[0, 0][rendered.normal[0, normal_axis] > 0.99].mean())

    # A lamp on +X (azimuth 90, the subject's left) lights the +X side fully, and the +Z side not at all.
    assert side(0, 90) == pytest.approx(0.8, abs=1e-5) and side(2, 90) < 1e-9
    assert side(2, 0) == pytest.approx(0.8, abs=1e-5) and side(0, 0) < 1e-9
    assert side(0, 45, follow=True) == pytest.approx(0.8, abs=1e-5)
    half = linear_to_srgb(srgb_to_linear(torch.tensor(0.8)) * np.cos(np.radians(60)))
    assert side(0, 30) == pytest.approx(float(half), abs=1e-5)  # Lambert's cosine, in linear light


def test_render_modes():
    cameras = turntable_cameras(3)
    for mode in module.RENDER_MODES:
        image = render_mesh(jack(), cameras, 24, mode)
        assert image.shape == (3, 4, 24, 24) and image.dtype == torch.float32
        assert float(image.min()) >= 0 and float(image.max()) <= 1
        assert (image[:, :3] * (image[:, 3:] == 0) == 0).all()
    clay = render_mesh(jack(), cameras, 24, "clay")
    assert float((clay[:, 0] - clay[:, 1]).abs().max()) < 0.06  # no object colour left
    with pytest.raises(TriptychError, match="'wire'"):
        render_mesh(jack(), cameras, 24, "wire")


def test_an_empty_mesh_renders_as_nothing_and_bad_choices_are_refused():
    empty = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    views = render_views(empty, rig_cameras(), 16)
    assert (views.alpha == 0).all() and views.albedo.shape == (4, 3, 16, 16)
    assert (shade(views, rig_cameras()) == 0).all()
    for bad in ({"size": 0}, {"supersample": 0}, {"cameras": []}, {"normals": "smooth"}):
        arguments = {"cameras": rig_cameras(), "size": 8} | bad
        with pytest.raises(TriptychError):
            render_views(jack(), **arguments)


def test_turntable_sheet_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "turntable.png"
    page = turntable_sheet(jack(), path, count=5, size=40)
    assert page.size == (5 * 44 + 4, 2 * 44 + 4) and [p.name for p in tmp_path.iterdir()] == ["turntable.png"]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(page))
    picture = np.asarray(page)
    assert (picture[0, 0] > 240).all() and (picture[4:44, 4:44].min() < 150)
    with pytest.raises(TriptychError, match="cannot write"):
        turntable_sheet(jack(), tmp_path / "missing" / "sheet.png", count=1, size=8)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(TriptychError, match="cannot write"):
        turntable_sheet(jack(), tmp_path / "folder.png", count=1, size=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "turntable.png"]
    with pytest.raises(TriptychError, match="rows of"):
        turntable_sheet(jack(), count=2, rows=("wire",))


def test_contact_sheet_places_rows_of_different_kinds():
    red, clear = torch.zeros(2, 3, 8, 8), torch.zeros(1, 4, 6, 6)
    red[:, 0] = 1
    page = np.asarray(contact_sheet([red, clear], gap=2, background=(0.0, 1.0, 0.0)))
    assert page.shape == (2 + 10 + 8, 2 + 20, 3)
    assert (page[2:10, 2:10] == [255, 0, 0]).all() and (page[12:18, 2:8] == [0, 255, 0]).all()
    with pytest.raises(TriptychError, match="needs rows"):
        contact_sheet([])
