"""The rasteriser against geometry that is known, against rays, and its gradients against finite differences."""

from __future__ import annotations

import math
import resource
import sys

import numpy as np
import pytest
import torch
import trimesh

from triptych.errors import TriptychError
from triptych.geometry.cameras import FRAME_FILL, RIG_HALF_EXTENT, Camera, rig_cameras
from triptych.render import rasterize as module
from triptych.render.backends import choose_backend
from triptych.render.rasterize import antialias, barycentrics_from, interpolate, rasterize

PERSPECTIVE = Camera(azimuth_deg=30, elevation_deg=20, radius=2.0, half_extent=None, fov_deg=40)
REAL_OBJECTS = ("ycb/072_d_toy_airplane.glb", "gso/Android_Figure_Orange.glb", "gso/Wishbone_Pencil_Case.glb")


def screen(points: list[list[float]], width: int, height: int, depth: float = 1.0) -> torch.Tensor:
    """Clip coordinates (1, V, 4) of pixel coordinates (column, row), where whole numbers are pixel centres."""
    out = [[2 * (x + 0.5) / width - 1, 1 - 2 * (y + 0.5) / height, depth, 1.0] for x, y in points]
    return torch.tensor([out], dtype=torch.float32)


def draw(vertices: np.ndarray, faces: np.ndarray, cameras: list[Camera], size: int):
    points = torch.tensor(np.asarray(vertices), dtype=torch.float32)
    clip = torch.stack([camera.clip(points) for camera in cameras])
    return clip, rasterize(clip, torch.tensor(np.asarray(faces), dtype=torch.int64), size, size)


def test_known_triangle_covers_exactly_the_centres_inside():
    clip = screen([[1, 1], [5, 1], [1, 5]], 16, 8)
    seen = rasterize(clip, torch.tensor([[0, 1, 2]]), 8, 16).triangle_id[0] == 0
    row, column = torch.meshgrid(torch.arange(8), torch.arange(16), indexing="ij")
    assert torch.equal(seen, (column >= 1) & (row >= 1) & (column + row <= 6))  # edges count


def test_background_is_marked():
    fragments = rasterize(screen([[1, 1], [3, 1], [1, 3]], 8, 8), torch.tensor([[0, 1, 2]]), 8, 8)
    empty = fragments.triangle_id == -1
    assert int(empty.sum()) == 64 - 6
    assert torch.isinf(fragments.depth[empty]).all() and (fragments.barycentrics[empty] == 0).all()
    nothing = rasterize(torch.zeros(2, 0, 4), torch.zeros(0, 3, dtype=torch.int64), 5, 4)
    assert nothing.triangle_id.shape == (2, 5, 4) and (nothing.triangle_id == -1).all()


@pytest.mark.parametrize("whole", [True, False])
def test_a_tessellated_quad_covers_every_pixel(whole: bool):
    # Corners on pixel centres (every tie there is) and at random: no crack, and no pixel beyond the outline.
    generator = torch.Generator().manual_seed(0)
    n, size = 24, 96
    x, y = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="xy")
    grid = torch.stack([x, y], dim=-1).float() * (size / n)
    jitter = (torch.rand(grid.shape, generator=generator) - 0.5) * (0 if whole else 3.6)
    jitter[0], jitter[-1], jitter[:, 0], jitter[:, -1] = 0, 0, 0, 0
    corners = (grid + jitter).view(-1, 2)
    index = (torch.arange(n)[:, None] * (n + 1) + torch.arange(n)).reshape(-1, 1)
    faces = torch.cat([index + torch.tensor([0, 1, n + 1]), index + torch.tensor([1, n + 2, n + 1])])
    fragments = rasterize(screen(corners.tolist(), 128, 128), faces, 128, 128)
    expected = torch.zeros(128, 128, dtype=torch.bool)
    expected[: size + 1, : size + 1] = True
    assert torch.equal(fragments.triangle_id[0] >= 0, expected)


def test_unwelded_fan_has_no_cracks():
    angles = np.sort(np.random.default_rng(1).uniform(0, 2 * np.pi, 300))
    centre, rim = np.array([31.37, 30.81]), np.stack([np.cos(angles), np.sin(angles)], 1) * 200
    corners = np.stack([np.broadcast_to(centre, rim.shape), centre + rim, centre + np.roll(rim, -1, 0)], axis=1)
    fragments = rasterize(screen(corners.reshape(-1, 2).tolist(), 64, 64), torch.arange(900).view(-1, 3), 64, 64)
    assert (fragments.triangle_id >= 0).all()


def test_nearest_wins_and_ties_go_to_the_smallest_id():
    corners = [[0, 0], [20, 0], [0, 20]]
    near, far = screen(corners, 8, 8, 1.0), screen(corners, 8, 8, 2.0)
    clip = torch.cat([far, near, near], dim=1)
    fragments = rasterize(clip, torch.tensor([[0, 1, 2], [6, 7, 8], [3, 4, 5], [5, 3, 4]]), 8, 8)
    assert (fragments.triangle_id == 1).all()
    torch.testing.assert_close(fragments.depth, torch.ones(1, 8, 8))


def test_order_of_faces_changes_only_the_ids():
    sphere = trimesh.creation.icosphere(3, radius=0.4)
    order = np.random.default_rng(0).permutation(len(sphere.faces))
    _, first = draw(sphere.vertices, sphere.faces, [PERSPECTIVE], 96)
    _, again = draw(sphere.vertices, sphere.faces, [PERSPECTIVE], 96)
    _, shuffled = draw(sphere.vertices, sphere.faces[order], [PERSPECTIVE], 96)
    assert torch.equal(first.triangle_id, again.triangle_id) and torch.equal(first.barycentrics, again.barycentrics)
    assert torch.equal(first.depth, shuffled.depth)
    back = torch.where(shuffled.triangle_id < 0, -1, torch.tensor(order)[shuffled.triangle_id])
    assert torch.equal(first.triangle_id, back)


def test_a_tilted_plane_has_exact_depth_and_perspective_correct_attributes():
    # The plane z = 0.6 x + 0.2 y, seen by a perspective camera from the front; attributes are the world positions.
    camera = Camera(radius=2.0, half_extent=None, fov_deg=50)
    xy = torch.tensor([[-1.5, -1.5], [1.5, -1.5], [1.5, 1.5], [-1.5, 1.5]])
    vertices = torch.cat([xy, (0.6 * xy[:, :1] + 0.2 * xy[:, 1:])], dim=1)
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    fragments = rasterize(camera.clip(vertices)[None], faces, 64, 64)
    origins, directions = camera.rays(64)
    plane = torch.tensor([-0.6, -0.2, 1.0])
    distance = -(origins @ plane) / (directions @ plane)
    points = origins + distance[..., None] * directions
    assert (fragments.triangle_id >= 0).all()
    torch.testing.assert_close(fragments.depth[0], 2 - points[..., 2], rtol=1e-5, atol=0)
    torch.testing.assert_close(interpolate(vertices, faces, fragments)[0], points, rtol=0, atol=1e-5)


def test_attributes_per_vertex_per_image_and_per_corner_agree():
    sphere = trimesh.creation.icosphere(2, radius=0.4)
    vertices, faces = torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces)
    clip = torch.stack([camera.clip(vertices) for camera in rig_cameras()])
    fragments = rasterize(clip, faces, 48, 48)
    per_vertex = interpolate(vertices, faces, fragments)
    assert torch.equal(per_vertex, interpolate(vertices[faces], faces, fragments))
    assert torch.equal(per_vertex, interpolate(vertices.expand(4, -1, -1), faces, fragments))
    assert (per_vertex[fragments.triangle_id < 0] == 0).all()
    with pytest.raises(TriptychError, match="attributes must be"):
        interpolate(torch.zeros(2, 7, 3), faces, fragments)


def test_sphere_silhouette_and_depth():
    radius, size = 0.45, 256
    sphere = trimesh.creation.icosphere(5, radius=radius)
    _, fragments = draw(sphere.vertices, sphere.faces, [Camera(azimuth_deg=50, elevation_deg=-30)], size)
    pixel = 2 * RIG_HALF_EXTENT / size
    area = float((fragments.triangle_id >= 0).sum()) * pixel**2
    assert area == pytest.approx(math.pi * radius**2, rel=2e-3)
    centres = (torch.arange(size) + 0.5) * pixel - RIG_HALF_EXTENT
    square = centres[:, None] ** 2 + centres[None] ** 2
    inner = square < (0.9 * radius) ** 2
    exact = 2 - (radius**2 - square).clamp_min(0).sqrt()
    assert (fragments.depth[0] - exact)[inner].abs().max() < 1e-3
    camera = Camera(radius=1.5, half_extent=None, fov_deg=60)
    _, fragments = draw(sphere.vertices, sphere.faces, [camera], size)
    tangent = radius / math.sqrt(1.5**2 - radius**2) / math.tan(math.radians(30))  # NDC radius of the outline
    assert float((fragments.triangle_id >= 0).sum()) == pytest.approx(math.pi * (tangent * size / 2) ** 2, rel=3e-3)


@pytest.mark.parametrize("name", REAL_OBJECTS)
@pytest.mark.parametrize("camera", [Camera(azimuth_deg=90), PERSPECTIVE])
def test_agrees_with_ray_casting_on_real_scans(data_dir, name: str, camera: Camera):
    pytest.importorskip("embreex", reason="embreex casts the rays to compare with: pip install embreex")
    from trimesh.ray.ray_pyembree import RayMeshIntersector

    mesh = trimesh.load(data_dir / "objects" / "eval" / name, force="mesh", process=False)
    size = 192
    _, fragments = draw(mesh.vertices, mesh.faces, [camera], size)
    origins, directions = (ray.reshape(-1, 3).double().numpy() for ray in camera.rays(size))
    ids, rays, hits = RayMeshIntersector(mesh).intersects_id(
        origins, directions, multiple_hits=False, return_locations=True
    )
    cast_id = torch.full((size * size,), -1)
    cast_depth = torch.full((size * size,), torch.inf)
    cast_id[rays] = torch.tensor(ids)
    cast_depth[rays] = camera.project(torch.tensor(hits).float())[1]
    drawn_id, drawn_depth = fragments.triangle_id.view(-1), fragments.depth.view(-1)
    assert ((cast_id >= 0) == (drawn_id >= 0)).float().mean() > 0.999
    both = (cast_id >= 0) & (drawn_id >= 0)
    assert int(both.sum()) > 1000
    close = (cast_depth - drawn_depth)[both].abs() < 2e-4
    same = (cast_id == drawn_id)[both]
    assert close.float().mean() > 0.998
    assert same.float().mean() > 0.995


def test_faces_behind_the_camera_or_not_finite_are_dropped():
    camera = Camera(radius=1.0, half_extent=None, fov_deg=90)
    front = torch.tensor([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0, 0.5, 0]])
    behind = front + torch.tensor([0, 0, 3.0])
    broken = front.clone()
    broken[1, 0] = torch.nan
    endless = front.clone()
    endless[2, 1] = torch.inf
    clip = camera.clip(torch.cat([behind, broken, endless, front]))[None]
    fragments = rasterize(clip, torch.arange(12).view(4, 3), 32, 32)
    assert set(fragments.triangle_id.unique().tolist()) == {-1, 3}
    _, orthographic = draw(behind.numpy(), np.array([[0, 1, 2]]), [Camera(radius=1.0)], 32)
    assert (orthographic.triangle_id == -1).all()


def test_a_floor_that_passes_under_the_camera_is_cut_not_dropped():
    # A huge floor at y = -0.3: below the horizon everything is floor at the analytic depth, above it nothing.
    camera = Camera(radius=1.0, half_extent=None, fov_deg=90)
    floor = torch.tensor([[-500, -0.3, -500.0], [500, -0.3, -500.0], [0, -0.3, 900.0]])
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        fragments = rasterize(camera.clip(floor[order])[None], torch.tensor([[0, 1, 2]]), 64, 64)
        assert (fragments.triangle_id[0, :32] == -1).all() and (fragments.triangle_id[0, 33:] == 0).all()
        slope = (torch.arange(40, 64) + 0.5) / 32 - 1
        torch.testing.assert_close(fragments.depth[0, 40:, 30], 0.3 / slope, rtol=2e-3, atol=0)


def test_full_screen_triangles_stay_within_bounded_memory(monkeypatch):
    size, count = 512, 400
    clip = screen([[-900, -900], [5000, -900], [-900, 5000]], size, size).repeat(1, count, 1)
    clip[0, :, 2] = torch.linspace(3, 2, count).repeat_interleave(3)
    faces = torch.arange(3 * count).view(-1, 3)
    largest = 0
    expand = module._expand

    def watched(counts: torch.Tensor):
        nonlocal largest
        entries, places = expand(counts)
        largest = max(largest, len(entries))
        return entries, places

    monkeypatch.setattr(module, "_expand", watched)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fragments = rasterize(clip, faces[:24], size, size)  # 24 x 512 x 512 = 6 M pixels
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1 if sys.platform == "darwin" else 1024)
    assert (fragments.triangle_id == 23).all()
    assert largest <= module.PIXELS_PER_CHUNK + size
    assert grown < (400 if sys.platform != "darwin" else 400 * 1024**2)


def test_chunks_do_not_change_the_picture(monkeypatch):
    sphere = trimesh.creation.icosphere(3, radius=0.4)
    _, whole = draw(sphere.vertices, sphere.faces, [PERSPECTIVE, Camera()], 64)
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 700)
    monkeypatch.setattr(module, "PIXELS_PER_CHUNK", 90)
    _, parts = draw(sphere.vertices, sphere.faces, [PERSPECTIVE, Camera()], 64)
    assert torch.equal(whole.triangle_id, parts.triangle_id)


def test_barycentrics_have_the_gradient_of_finite_differences():
    clip = screen([[1.2, 0.7], [8.3, 1.9], [2.4, 8.8]], 10, 10).double()
    clip[0, :, 3] = torch.tensor([1.0, 1.7, 0.6])
    clip[0, :, :2] *= clip[0, :, 3:]
    faces = torch.tensor([[0, 1, 2]])
    fragments = rasterize(clip.float(), faces, 10, 10)

    def outputs(moved: torch.Tensor):
        weights, depth = barycentrics_from(moved, faces, fragments)
        inside = (weights > 0.02).all(dim=-1)
        return weights[inside], depth[inside]

    assert torch.autograd.gradcheck(outputs, (clip.requires_grad_(),), eps=1e-6, atol=1e-5)


def test_rasterize_passes_gradients_of_depth_and_attributes():
    vertices = torch.tensor([[-0.4, -0.4, 0.1], [0.4, -0.4, 0.0], [0.0, 0.4, -0.1]], requires_grad=True)
    colors = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    faces = torch.tensor([[0, 1, 2]])
    fragments = rasterize(PERSPECTIVE.clip(vertices)[None], faces, 32, 32)
    seen = fragments.triangle_id >= 0
    (fragments.depth[seen].sum() + interpolate(colors, faces, fragments).sum()).backward()
    assert torch.isfinite(vertices.grad).all() and float(vertices.grad.abs().sum()) > 1
    assert float(colors.grad.sum()) == pytest.approx(2 * float(seen.sum()), rel=1e-5)  # weights sum to 1


def coverage(vertices: torch.Tensor, faces: torch.Tensor, size: int = 64, camera: Camera | None = None) -> torch.Tensor:
    clip = (camera or Camera()).clip(vertices)[None]
    fragments = rasterize(clip, faces, size, size)
    return antialias((fragments.triangle_id >= 0).float()[..., None], fragments, clip, faces)[0, ..., 0]


def square(half: float = 0.21) -> tuple[torch.Tensor, torch.Tensor]:
    corners = torch.tensor([[-half, -half, 0], [half, -half, 0], [half, half, 0], [-half, half, 0]])
    return corners, torch.tensor([[0, 1, 2], [0, 2, 3]])


def test_antialiased_area_is_exact_at_straight_edges():
    vertices, faces = square()
    for shift in np.linspace(0, 0.02, 7):
        area = coverage(vertices + torch.tensor([shift, 0.3 * shift, 0]), faces).sum()
        assert float(area) == pytest.approx((0.42 * FRAME_FILL * 64) ** 2, abs=1.0)  # a pixel: the four corners


def test_area_gradient_matches_finite_differences():
    """Tolerance 6 %: the steps of finite differences smooth over the corners of the outline, the gradient does not."""
    sphere = trimesh.creation.icosphere(3, radius=0.3)  # at the rim its triangles are thinner than a pixel
    vertices, faces = torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces)
    for camera in (Camera(), PERSPECTIVE):
        scale = torch.tensor(1.0, requires_grad=True)
        area = coverage(vertices * scale, faces, camera=camera).sum()
        area.backward()
        step = 0.03
        larger, smaller = (coverage(vertices * factor, faces, camera=camera).sum() for factor in (1 + step, 1 - step))
        finite = (larger - smaller) / (2 * step)
        assert float(scale.grad) == pytest.approx(float(finite), rel=0.06)
        assert float(scale.grad) == pytest.approx(2 * float(area.detach()), rel=0.08)  # area grows with scale squared


def test_edges_inside_a_surface_are_left_alone():
    vertices, faces = square()
    clip = Camera().clip(vertices)[None]
    fragments = rasterize(clip, faces, 32, 32)
    image = (fragments.triangle_id == 0).float()[..., None]
    inner = torch.zeros(32, 32, dtype=torch.bool)
    inner[12:20, 12:20] = True
    assert torch.equal(antialias(image, fragments, clip, faces)[0][inner], image[0][inner])


def test_an_occluder_edge_moves_over_the_surface_behind_it():
    front, faces = square(0.15)
    back, _ = square(0.5)
    shift = torch.zeros(3, requires_grad=True)
    vertices = torch.cat([front + torch.tensor([0.1, 0, 0.2]) + shift, back])
    faces = torch.cat([faces, faces + 4])
    clip = Camera().clip(vertices)[None]
    fragments = rasterize(clip, faces, 64, 64)
    image = (fragments.triangle_id // 2 == 0).float() * (fragments.triangle_id >= 0)
    smooth = antialias(image[..., None], fragments, clip, faces)[0, ..., 0]
    smooth[:, :36].sum().backward()  # the window's right border cuts the occluder: moving right uncovers its left edge
    assert float(shift.grad[0]) == pytest.approx(-(0.3 * FRAME_FILL * 64) * FRAME_FILL * 64, rel=0.08)


def test_a_translation_is_recovered_from_a_silhouette():
    sphere = trimesh.creation.icosphere(2, radius=0.25)
    vertices, faces = torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces)
    truth = torch.tensor([0.11, -0.07, 0.0])
    target = coverage(vertices + truth, faces)
    shift = torch.zeros(3, requires_grad=True)
    losses = []
    for step in range(40):
        drawn = coverage(vertices + shift, faces)
        loss = 1 - (drawn * target).sum() / (drawn + target - drawn * target).sum()
        (slope,) = torch.autograd.grad(loss, shift)
        if step == 0:
            assert slope[0] < 0 < slope[1]  # descent moves right and down, where the target is
        with torch.no_grad():
            shift -= 0.012 * (1 - step / 40) * slope / slope.norm()
        losses.append(float(loss.detach()))
    assert (shift.detach() - truth)[:2].abs().max() < 2e-3  # an eighth of a pixel is 2.3e-3
    perfect = 1 - float((target * target).sum() / (2 * target - target * target).sum())  # soft rims never reach 0
    assert losses[0] > 0.4 and losses[-1] < perfect + 0.002


def test_wrong_input_is_refused_in_a_sentence():
    clip, faces = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    with pytest.raises(TriptychError, match=r"\(B, V, 4\)"):
        rasterize(clip[0], faces, 8, 8)
    with pytest.raises(TriptychError, match=r"\(F, 3\) int64"):
        rasterize(clip, faces.float(), 8, 8)
    with pytest.raises(TriptychError, match="vertices 0 to 2, but there are 2"):
        rasterize(clip[:, :2], faces, 8, 8)
    with pytest.raises(TriptychError, match="0 x 8"):
        rasterize(clip, faces, 0, 8)
    with pytest.raises(TriptychError, match="backend 'opengl'"):
        rasterize(clip, faces, 8, 8, backend="opengl")


def test_backend_choice():
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu) == choose_backend("torch", cpu) == "torch"
    with pytest.raises(TriptychError, match="nvdiffrast cannot draw"):
        choose_backend("nvdiffrast", cpu, faces=10, longest_side=64)
