"""Colours from posed views: the right colour in the right place, nothing from what hides it, no seams, no holes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from scipy import ndimage

from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera, rig_cameras
from triptych.geometry.mesh import Material, Mesh, weld_index
from triptych.geometry.uv import unwrap
from triptych.render.inpaint import diffuse, dilate, split_long_edges
from triptych.render.texture import (
    bake_texture,
    bake_vertex_colours,
    colour_from_views,
    corner_normals,
    vertex_colours_from_views,
    view_weights,
)
from triptych.render.views import render_views

# Colours of a box's sides by their axis and sign; all different from one another, from black and from white.
SIDE_COLOURS = {
    (2, 1): (0.9, 0.1, 0.1), (0, 1): (0.1, 0.8, 0.2), (2, -1): (0.15, 0.2, 0.9), (0, -1): (0.9, 0.8, 0.1),
    (1, 1): (0.8, 0.1, 0.8), (1, -1): (0.1, 0.8, 0.8),
}  # fmt: skip


def box(extents, centre=(0.0, 0.0, 0.0)) -> Mesh:
    solid = trimesh.creation.box(extents)
    return Mesh((solid.vertices + np.asarray(centre)).astype(np.float32), solid.faces.astype(np.int64))


def join(*meshes: Mesh) -> Mesh:
    starts = np.cumsum([0] + [len(m.vertices) for m in meshes])
    faces = np.concatenate([m.faces + start for m, start in zip(meshes, starts, strict=False)])
    return Mesh(np.concatenate([m.vertices for m in meshes]), faces)


def side_of(mesh: Mesh) -> list[tuple[int, int]]:
    normals = mesh.face_normals()
    axis = np.abs(normals).argmax(axis=1)
    return [(int(a), int(np.sign(n[a]))) for a, n in zip(axis, normals, strict=True)]


def painted(mesh: Mesh, face_colours) -> Mesh:
    """Split vertices, one colour per face."""
    colours = np.repeat(np.asarray(face_colours, np.float32), 3, axis=0)
    colours = np.concatenate([colours, np.ones((len(colours), 1), np.float32)], axis=1)
    corners = mesh.vertices[mesh.faces].reshape(-1, 3)
    return Mesh(corners, np.arange(len(corners)).reshape(-1, 3), colors=colours)


def views_of(mesh: Mesh, size=128, cameras=None) -> SimpleNamespace:
    cameras = cameras or rig_cameras()
    drawn = render_views(mesh, cameras, size)
    return SimpleNamespace(images=torch.cat([drawn.albedo, drawn.alpha], dim=1), cameras=cameras)


def colours_at(mesh: Mesh, points_per_face) -> np.ndarray:
    """The texture at barycentric points (K, 3) of every face: (F, K, 3) in 0-255, nearest texel."""
    uv = np.einsum("kc,fcd->fkd", points_per_face, mesh.corner_uv())
    texture = mesh.materials[0].base_color_texture
    size = len(texture)
    column = np.clip((uv[..., 0] * size).astype(int), 0, size - 1)
    row = np.clip(((1 - uv[..., 1]) * size).astype(int), 0, size - 1)
    return texture[row, column].astype(float)


def inner_points(count=60, margin=0.06) -> np.ndarray:
    weights = np.random.default_rng(0).dirichlet([1, 1, 1], 4 * count)
    return weights[weights.min(axis=1) > margin][:count]


@pytest.fixture(scope="module")
def coloured_box():
    mesh = box((0.9, 0.7, 0.5))
    viewset = views_of(painted(mesh, [SIDE_COLOURS[s] for s in side_of(mesh)]))
    return mesh, viewset, *bake_texture(unwrap(mesh, texture_size=256), viewset, 256)


def test_every_side_of_a_box_gets_its_own_colour(coloured_box):
    mesh, _, baked, report = coloured_box
    colours = colours_at(baked, inner_points())
    for face, side in enumerate(side_of(mesh)):
        if side[0] != 1:
            assert np.abs(colours[face] - 255 * np.array(SIDE_COLOURS[side])).max() <= 2, side
    unseen = 2 * 0.9 * 0.5 / (2 * (0.9 * 0.5 + 0.9 * 0.7 + 0.5 * 0.7))
    assert report.seen_share == pytest.approx(1 - unseen, abs=0.02) and report.size == 256


def test_top_and_bottom_take_a_mixture_of_the_sides(coloured_box):
    mesh, _, baked, _ = coloured_box
    colours = colours_at(baked, inner_points()) / 255
    sides = np.array([SIDE_COLOURS[s] for s in SIDE_COLOURS if s[0] != 1])
    hidden = colours[[side[0] == 1 for side in side_of(mesh)]].reshape(-1, 3)
    assert (hidden >= sides.min(axis=0) - 0.01).all() and (hidden <= sides.max(axis=0) + 0.01).all()
    # Next to a side, its colour dominates: on the top, half a centimetre from the front edge of a metre.
    top = baked.faces[[i for i, s in enumerate(side_of(mesh)) if s == (1, 1)]]
    probe = np.array([0.0, 0.35, 0.245])
    for face in top:
        weights = np.linalg.lstsq(np.vstack([baked.vertices[face].T, np.ones(3)]), np.append(probe, 1), rcond=None)[0]
        if weights.min() > 0:
            index = np.flatnonzero((baked.faces == face).all(axis=1))[0]
            near_front = colours_at(baked, weights[None])[index, 0] / 255
            assert np.abs(near_front - SIDE_COLOURS[(2, 1)]).max() < 0.15


def test_the_texture_outside_the_charts_continues_them(coloured_box):
    """No black: the darkest mixture of the box's colours has a channel above 0.3."""
    baked = coloured_box[2]
    texture = baked.materials[0].base_color_texture
    assert texture.shape == (256, 256, 3) and texture.dtype == np.uint8
    assert texture.max(axis=2).min() >= 0.3 * 255
    assert baked.colors is None and baked.face_materials is None


def test_what_is_hidden_does_not_take_the_colour_of_what_hides_it():
    """A small red box before a large green one: the red must not be printed on the green, nor the other way round."""
    small, large = box((0.3, 0.3, 0.1), (0, 0, 0.4)), box((0.9, 0.8, 0.1), (0, 0, -0.2))
    red, green = (0.9, 0.1, 0.1), (0.1, 0.8, 0.2)
    both = join(small, large)
    viewset = views_of(painted(both, [red] * 12 + [green] * 12))
    baked, _ = bake_texture(unwrap(both, texture_size=512), viewset, 512)
    colours = colours_at(baked, inner_points(400, 0.01))
    assert np.abs(colours[:12] - 255 * np.array(red)).max() <= 2
    assert np.abs(colours[12:] - 255 * np.array(green)).max() <= 2
    by_vertex = vertex_colours_from_views(both, viewset).colors
    np.testing.assert_allclose(by_vertex[:8, :3], np.tile(red, (8, 1)), atol=0.02)
    np.testing.assert_allclose(by_vertex[8:, :3], np.tile(green, (8, 1)), atol=0.02)


def test_view_weights_know_angle_occlusion_and_silhouette():
    small, large = box((0.3, 0.3, 0.1), (0, 0, 0.4)), box((0.9, 0.8, 0.1), (0, 0, -0.2))
    both = join(small, large)
    viewset = views_of(both)
    points = [[0.0, 0.0, 0.45], [0.0, 0.0, -0.15], [0.3, 0.3, -0.15], [0.0, 0.0, -0.25], [0.4499, 0.0, -0.15]]
    points = torch.tensor(points)
    normals = torch.tensor([[0.0, 0.0, 1.0]] * 3 + [[0.0, 0.0, -1.0]] + [[0.0, 0.0, 1.0]])
    weights = view_weights(points, normals, both, viewset)
    assert weights.shape == (4, 5)
    front, left, back, right = weights
    assert front[0] == 1 and front[2] == 1 and back[3] == 1
    assert front[1] == 0 and front[3] == 0 and back[:3].max() == 0  # hidden, averted
    assert left.max() == 0 and right.max() == 0  # grazing
    assert front[4] < 0.3  # on the silhouette
    tilted = torch.tensor([[0.0, np.sin(np.pi / 3), np.cos(np.pi / 3)]], dtype=torch.float32)
    assert view_weights(points[2:3], tilted, both, viewset)[0, 0] == pytest.approx(0.5, abs=1e-3)


def test_a_coloured_background_does_not_bleed_in(coloured_box):
    """The same views with soft edges over magenta, as a matting model leaves them."""
    mesh, viewset, _, _ = coloured_box
    alpha = torch.from_numpy(ndimage.uniform_filter(viewset.images[:, 3].numpy(), (0, 3, 3)))[:, None]
    magenta = torch.tensor([1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    fringed = torch.cat([viewset.images[:, :3] * alpha + magenta * (1 - alpha), alpha], dim=1)
    fringed_set = SimpleNamespace(images=fringed, cameras=viewset.cameras)
    baked, _ = bake_texture(unwrap(mesh, texture_size=256), fringed_set, 256)
    colours = colours_at(baked, inner_points(400, 0.0))
    for face, side in enumerate(side_of(mesh)):
        if side[0] != 1:
            assert np.abs(colours[face] - 255 * np.array(SIDE_COLOURS[side])).mean() <= 1, side


def test_a_part_that_no_view_reaches_takes_the_nearest_colours():
    """A box shut inside another one."""
    outer, inner = box((0.9, 0.9, 0.9)), box((0.2, 0.2, 0.2))
    both = join(outer, inner)
    viewset = views_of(painted(outer, [(0.2, 0.6, 0.4)] * 12))
    baked, _ = bake_texture(unwrap(both, texture_size=128), viewset, 128)
    assert np.abs(colours_at(baked, inner_points()) - 255 * np.array((0.2, 0.6, 0.4))).max() <= 2
    by_vertex = vertex_colours_from_views(both, viewset)
    np.testing.assert_allclose(by_vertex.colors, np.tile((0.2, 0.6, 0.4, 1.0), (16, 1)), atol=0.01)


def test_mirror_fill_gives_the_right_side_the_left_one():
    mesh = box((0.9, 0.7, 0.5))
    cameras = rig_cameras((0.0, 90.0))
    viewset = views_of(painted(mesh, [SIDE_COLOURS[s] for s in side_of(mesh)]), cameras=cameras)
    baked, _ = bake_texture(unwrap(mesh, texture_size=256), viewset, 256, fill="mirror")
    colours = colours_at(baked, inner_points())
    expected = {(2, 1): SIDE_COLOURS[(2, 1)], (0, 1): SIDE_COLOURS[(0, 1)], (0, -1): SIDE_COLOURS[(0, 1)]}
    for face, side in enumerate(side_of(mesh)):
        if side in expected:
            assert np.abs(colours[face] - 255 * np.array(expected[side])).max() <= 2, side


def test_perspective_views_work_too():
    mesh = box((0.9, 0.7, 0.5))
    cameras = [Camera(a, 0.0, 2.5, None, 40.0) for a in (0.0, 90.0, 180.0, 270.0)]
    viewset = views_of(painted(mesh, [SIDE_COLOURS[s] for s in side_of(mesh)]), cameras=cameras)
    baked, _ = bake_texture(unwrap(mesh, texture_size=256), viewset, 256)
    colours = colours_at(baked, inner_points())
    for face, side in enumerate(side_of(mesh)):
        if side[0] != 1:
            assert np.abs(colours[face] - 255 * np.array(SIDE_COLOURS[side])).max() <= 2, side


def load_object(path) -> Mesh:
    scene = trimesh.load(path, force="mesh", process=False)
    texture = np.asarray(scene.visual.material.baseColorTexture.convert("RGB"))
    return Mesh(
        scene.vertices.astype(np.float32), scene.faces.astype(np.int64), uv=scene.visual.uv.astype(np.float32),
        materials=(Material(base_color_texture=texture),),
    ).normalized()  # fmt: skip


def psnr_inside(views: torch.Tensor, rendered: torch.Tensor) -> float:
    """Mean over the views, inside the mask eroded by two pixels, dB."""
    values = []
    for view, other in zip(views, rendered, strict=True):
        inside = torch.from_numpy(ndimage.binary_erosion(view[3].numpy() > 0.99, np.ones((3, 3)), iterations=2))
        values.append(-10 * torch.log10((view[:3] - other[:3])[:, inside].square().mean()).item())
    return float(np.mean(values))


@pytest.mark.parametrize("name", ["gso/BABY_CAR", "gso/Thomas_Friends_Wooden_Railway_Porter_5JzRhMm3a9o"])
def test_the_textured_mesh_shows_the_views_it_was_made_from(data_dir, name):
    source = load_object(data_dir / "objects" / "eval" / f"{name}.glb")
    viewset = views_of(source, 256)
    bare = Mesh(source.vertices, source.faces)
    baked = colour_from_views(bare, viewset, texture_size=1024)
    assert psnr_inside(viewset.images, views_of(baked, 256).images) > 30
    # From between the views, 45 degrees off: the textured original is the judge.
    between = rig_cameras((45.0, 135.0, 225.0, 315.0))
    expected, got = views_of(source, 256, between).images, views_of(baked, 256, between).images
    assert psnr_inside(expected, got) > 23
    fast = colour_from_views(bare, viewset, texture_size=0)
    assert psnr_inside(viewset.images, views_of(fast, 256).images) > 25


@pytest.mark.parametrize("texture_size", [0, 512])
def test_what_no_view_shows_takes_the_meshes_own_colours(texture_size):
    """One view of a ball that is dark behind; its own colours are right but for a tint that the view tells."""
    ball = trimesh.creation.icosphere(5)
    own = np.where(ball.vertices[:, 2:] > 0, 0.8, 0.2) * np.array([1.0, 0.9, 0.8])
    colors = np.concatenate([own, np.ones((len(own), 1))], axis=1).astype(np.float32)
    true = Mesh((ball.vertices * 0.45).astype(np.float32), ball.faces.astype(np.int64), colors=colors)
    guessed = true.replace(colors=np.concatenate([colors[:, :3] - 0.1, colors[:, 3:]], axis=1))
    front, back = views_of(true, 256, rig_cameras((0.0,))), views_of(true, 256, rig_cameras((180.0,))).images
    errors = {}
    for fill in ("diffuse", "colors"):
        made = colour_from_views(guessed, front, texture_size=texture_size, fill=fill)
        errors[fill] = psnr_inside(back, views_of(made, 256, rig_cameras((180.0,))).images)
    assert errors["colors"] > 25 and errors["diffuse"] < 10


def test_baking_is_deterministic(coloured_box):
    mesh, viewset, baked, _ = coloured_box
    again, _ = bake_texture(unwrap(mesh, texture_size=256), viewset, 256)
    assert np.array_equal(again.materials[0].base_color_texture, baked.materials[0].base_color_texture)


def test_vertex_colours_baked_into_a_texture_look_the_same():
    ball = trimesh.creation.icosphere(3)
    colours = np.concatenate([ball.vertices * 0.5 + 0.5, np.ones((len(ball.vertices), 1))], axis=1).astype(np.float32)
    mesh = Mesh((ball.vertices * 0.45).astype(np.float32), ball.faces.astype(np.int64), colors=colours)
    baked = bake_vertex_colours(unwrap(mesh, texture_size=512), 512)
    assert baked.colors is None and baked.materials[0].base_color_texture.shape == (512, 512, 3)
    assert psnr_inside(views_of(mesh).images, views_of(baked).images) > 45


@pytest.mark.parametrize("size", [0, 63, 8193])
def test_texture_size_has_bounds(coloured_box, size):
    mesh, viewset, baked, _ = coloured_box
    with pytest.raises(TriptychError, match="64 to 8192"):
        bake_texture(baked, viewset, size)
    with pytest.raises(TriptychError, match="64 to 8192"):
        bake_vertex_colours(baked, size)


def test_what_cannot_be_baked_is_said(coloured_box):
    mesh, viewset, baked, _ = coloured_box
    empty = SimpleNamespace(images=torch.zeros_like(viewset.images), cameras=viewset.cameras)
    for call, words in [
        (lambda: bake_texture(mesh, viewset, 64), "unwrap it first"),
        (lambda: bake_texture(baked.replace(uv=baked.uv * 3), viewset, 64), "into \\[0, 1\\]"),
        (lambda: bake_texture(baked, empty, 64), "none of the views"),
        (lambda: vertex_colours_from_views(mesh, empty), "none of the views"),
        (lambda: bake_vertex_colours(baked, 64), "no vertex colours"),
        (lambda: bake_texture(baked, viewset, 64, fill="colors"), "no vertex colours to fill"),
        (lambda: bake_texture(baked, viewset, 64, fill="black"), '"diffuse", "mirror" or "colors"'),
    ]:
        with pytest.raises(TriptychError, match=words):
            call()


def test_corner_normals_are_sharp_at_creases_and_smooth_elsewhere():
    cube = box((1, 1, 1))
    np.testing.assert_allclose(corner_normals(cube), np.repeat(cube.face_normals()[:, None], 3, axis=1), atol=1e-6)
    ball = trimesh.creation.icosphere(4)
    got = corner_normals(Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int64)))
    assert (got * ball.vertices[ball.faces]).sum(axis=2).min() > 0.999


def test_splitting_long_edges_leaves_no_gap():
    mesh = box((1.0, 0.2, 0.05))
    corners = mesh.vertices[mesh.faces]
    vertices, faces, values = split_long_edges(mesh.vertices, mesh.faces, corners, max_edge=0.1, max_faces=20_000)
    solid = trimesh.Trimesh(vertices, faces, process=False)
    assert solid.is_watertight and solid.is_winding_consistent
    assert solid.volume == pytest.approx(0.01, rel=1e-5) and solid.edges_unique_length.max() < 0.1 + 1e-6
    np.testing.assert_allclose(values, vertices[faces], atol=1e-6)
    assert len(split_long_edges(mesh.vertices, mesh.faces, corners, max_edge=1e-3, max_faces=5000)[1]) <= 5000


def test_diffusion_is_linear_between_two_ends_and_reaches_lonely_parts():
    """A long strip, black at one end and white at the other, and a loose triangle beside its white end."""
    steps = np.linspace(0, 1, 21)
    vertices = np.array([[x, y, 0] for x in steps for y in (0, 0.05)] + [[1.1, 0, 0], [1.2, 0, 0], [1.1, 0.1, 0]])
    quads = np.arange(0, 40, 2)[:, None] + np.array([0, 2, 1, 1, 2, 3])
    faces = np.concatenate([quads.reshape(-1, 3), [[42, 43, 44]]])
    observed, confidence = np.zeros((45, 3)), np.zeros(45)
    observed[40:42] = 1.0
    confidence[[0, 1, 40, 41]] = 1.0
    result = diffuse(vertices, faces, observed, confidence)
    np.testing.assert_allclose(result[:42], np.repeat(steps, 2)[:, None].repeat(3, axis=1), atol=0.02)
    np.testing.assert_allclose(result[42:], 0.5, atol=0.01)  # the mean of all four observed vertices
    with pytest.raises(ValueError, match="observed"):
        diffuse(vertices, faces, observed, np.zeros(45))


def test_dilation_keeps_the_charts_and_fills_the_rest():
    image = torch.zeros(37, 50, 3)
    covered = torch.zeros(37, 50, dtype=torch.bool)
    image[5:15, 5:15], image[20:30, 30:45] = torch.tensor([1.0, 0.2, 0.2]), torch.tensor([0.2, 0.2, 1.0])
    covered[5:15, 5:15] = covered[20:30, 30:45] = True
    result = dilate(image, covered)
    assert torch.equal(result[covered], image[covered])
    assert torch.allclose(result[3:17, 3:17], image[10, 10].expand(14, 14, 3), atol=1e-6)
    assert result.min() >= 0.2 - 1e-6 and result.max() <= 1 + 1e-6


def test_weld_index_merges_exact_copies_only():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [-0.0, 0, 0], [1, 1e-7, 0]], np.float32)
    rows, index = weld_index(vertices)
    assert len(rows) == 3 and index[0] == index[2] and len(set(index)) == 3
    np.testing.assert_array_equal(rows[index], vertices)
