"""FlexiCubes: the published outputs, sparse against dense, gradients, closed surfaces, empty and bad input."""

import importlib.util
from pathlib import Path

import pytest
import torch
from fixtures_io import read_fixture
from torch import Tensor

from triptych.errors import TriptychError
from triptych.geometry.flexicubes import (
    FlexiMesh,
    deformed_positions,
    features_to_mesh,
    flexicubes_dense,
    flexicubes_sparse,
)
from triptych.geometry.flexicubes_grid import grid_coords, touched_vertices, unique_ids
from triptych.geometry.flexicubes_tables import CORNERS, EDGES, case_tables

DECODER = importlib.util.find_spec("triptych.models.slat_decoder")


def random_shell(resolution: int, share: float, seed: int = 0) -> Tensor:
    """(N, 3) distinct cubes of the grid, in random order."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(resolution**3, generator=generator)[: int(share * resolution**3)]
    return grid_coords(chosen, resolution)


def random_values(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sphere(resolution: int, radius: float, training: bool = False) -> FlexiMesh:
    """A ball in the middle of a dense grid, with all weights and deformations 0."""
    side = resolution + 1
    positions = deformed_positions(grid_coords(torch.arange(side**3), side), torch.zeros(side**3, 3), resolution)
    cubes = resolution**3
    weights = torch.zeros(cubes, 12), torch.zeros(cubes, 8), torch.zeros(cubes)
    return flexicubes_dense(
        positions, positions.norm(dim=1) - radius, *weights, resolution, colours=positions, training=training
    )


def directed_edges(faces: Tensor) -> set[tuple[int, int]]:
    """Every edge of every face as (from, to); fails where one appears twice."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]).tolist()
    distinct = {(a, b) for a, b in edges}
    assert len(distinct) == len(edges), f"{len(edges) - len(distinct)} edges are used twice in one direction"
    return distinct


def assert_closed(faces: Tensor) -> None:
    edges = directed_edges(faces)
    assert {(b, a) for a, b in edges} == edges


def signed_volume(mesh: FlexiMesh) -> float:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


# ---- published outputs


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dense_grid_equals_the_published_extraction(fixtures_dir: Path, mode: str) -> None:
    fixture = read_fixture(fixtures_dir / "07_flexicubes_a.safetensors")
    given = fixture.inputs
    mesh = flexicubes_dense(
        given["voxelgrid_vertices"],
        given["scalar_field"],
        given["beta"],
        given["alpha"],
        given["gamma_f"],
        fixture.run["resolution"],
        colours=given["colors"],
        training=mode == "train",
    )
    assert mesh.colours is not None
    assert mesh.faces.dtype == torch.int64
    fixture.check(f"{mode}/faces", mesh.faces.int())
    fixture.check(f"{mode}/vertices", mesh.vertices)
    fixture.check(f"{mode}/colors", mesh.colours)
    fixture.check("L_dev", mesh.deviation)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_decoder_channels_give_the_published_mesh(fixtures_dir: Path, mode: str) -> None:
    fixture = read_fixture(fixtures_dir / "06_mesh_extract_a.safetensors")
    feats = fixture.inputs["feats"].clone()
    mesh = features_to_mesh(fixture.inputs["coords"][:, 1:], feats, fixture.config["res"], training=mode == "train")
    assert mesh.vertex_attrs is not None
    fixture.check(f"{mode}/faces", mesh.faces.int())
    fixture.check(f"{mode}/vertices", mesh.vertices)
    fixture.check(f"{mode}/vertex_attrs", mesh.vertex_attrs)
    assert torch.equal(feats, fixture.inputs["feats"]), "the caller's features were changed"
    if mode == "eval":
        assert (mesh.reg_loss, mesh.tsdf_v, mesh.tsdf_s) == (None, None, None)
        return
    assert mesh.reg_loss is not None and mesh.tsdf_v is not None and mesh.tsdf_s is not None
    fixture.check("train/reg_loss", mesh.reg_loss.view(1))
    fixture.check("train/tsdf_v", mesh.tsdf_v)
    fixture.check("train/tsdf_s", mesh.tsdf_s)


@pytest.mark.skipif(DECODER is None, reason="triptych.models.slat_decoder is not there yet")
def test_the_mesh_decoder_ends_in_the_published_meshes(fixtures_dir: Path) -> None:
    from triptych.models.slat_decoder import SLatMeshDecoder
    from triptych.sparse.tensor import SparseTensor

    network = read_fixture(fixtures_dir / "06_slat_mesh_decoder_a.safetensors")
    meshes = read_fixture(fixtures_dir / "06_slat_mesh_decoder_meshes_a.safetensors")
    decoder = SLatMeshDecoder(**network.config).eval()
    decoder.load_state_dict({name: value.float() for name, value in network.weights.items()})
    resolution = network.config["resolution"]
    with torch.no_grad():
        output = decoder(SparseTensor(meshes.inputs["feats"], meshes.inputs["coords"], resolution=resolution))
    for number in range(output.batch_size):
        sample = output.sample(number)
        mesh = features_to_mesh(sample.coords[:, 1:], sample.feats, 4 * resolution)
        assert mesh.vertex_attrs is not None
        meshes.check(f"{number}/faces", mesh.faces.int())
        meshes.check(f"{number}/vertices", mesh.vertices)
        meshes.check(f"{number}/vertex_attrs", mesh.vertex_attrs)


# ---- sparse against dense


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_sparse_equals_dense_bit_for_bit(share: float, training: bool) -> None:
    resolution, side = 9, 10
    cubes = random_shell(resolution, share)
    touched = touched_vertices(cubes, resolution)
    count = len(touched.ids)
    sdf, deform = random_values(1, count), random_values(2, count, 3)
    colours, weights = random_values(3, count, 6), random_values(4, len(cubes), 21)
    sparse = flexicubes_sparse(cubes, sdf, deform, weights, resolution, colours=colours, training=training)

    dense_sdf = torch.ones(side**3).index_put((touched.ids,), sdf)
    dense_deform = torch.zeros(side**3, 3).index_put((touched.ids,), deform)
    dense_colours = torch.zeros(side**3, 6).index_put((touched.ids,), colours)
    dense_weights = torch.zeros(resolution, resolution, resolution, 21).index_put(cubes.unbind(1), weights).view(-1, 21)
    dense = flexicubes_dense(
        deformed_positions(grid_coords(torch.arange(side**3), side), dense_deform, resolution),
        dense_sdf,
        *dense_weights[:, :20].split([12, 8], dim=1),
        dense_weights[:, 20],
        resolution,
        colours=dense_colours,
        training=training,
    )
    assert sparse.colours is not None and dense.colours is not None
    assert len(sparse.faces) > 100
    assert torch.equal(sparse.faces, dense.faces)
    assert torch.equal(sparse.vertices, dense.vertices)
    assert torch.equal(sparse.colours, dense.colours)
    assert torch.equal(sparse.deviation, dense.deviation)


def test_row_order_does_not_matter() -> None:
    cubes, feats = random_shell(12, 0.2), random_values(5, 345, 101)
    shuffle = torch.randperm(len(cubes), generator=torch.Generator().manual_seed(6))
    straight, shuffled = features_to_mesh(cubes, feats, 12), features_to_mesh(cubes[shuffle], feats[shuffle], 12)
    assert torch.equal(straight.faces, shuffled.faces)
    torch.testing.assert_close(straight.vertices, shuffled.vertices, atol=2e-6, rtol=0)


def test_training_and_evaluation_share_the_dual_vertices() -> None:
    cubes, feats = random_shell(12, 0.2), random_values(5, 345, 101)
    plain, training = features_to_mesh(cubes, feats, 12), features_to_mesh(cubes, feats, 12, training=True)
    torch.testing.assert_close(training.vertices[: len(plain.vertices)], plain.vertices, atol=2e-6, rtol=0)
    assert len(training.faces) == 2 * len(plain.faces)


def test_unique_ids_counts_and_sorts_to_the_same_rows() -> None:
    ids = torch.randint(0, 500, (40, 8), generator=torch.Generator().manual_seed(0))
    counted, sorted_ = unique_ids(ids, 500), unique_ids(ids, 10**9)
    assert torch.equal(counted[0], sorted_[0]) and torch.equal(counted[1], sorted_[1])
    assert torch.equal(counted[0][counted[1]], ids)


# ---- the surface


def test_every_loop_is_closed_on_the_faces_of_the_cube() -> None:
    tables = case_tables()
    for case in range(256):
        inside = torch.tensor([bool(case >> corner & 1) for corner in range(8)])
        crossed = inside[EDGES[:, 0]] != inside[EDGES[:, 1]]
        assert torch.equal(tables.dual_of_edge[case] >= 0, crossed)
        for loop in range(int(tables.dual_count[case])):
            edges = EDGES[tables.dual_of_edge[case] == loop]
            assert len(edges) >= 3
            for axis in range(3):
                for side in range(2):
                    on_face = (CORNERS[edges][:, :, axis] == side).all(dim=1)
                    assert int(on_face.sum()) % 2 == 0
    assert tables.dual_count.bincount().tolist() == [2, 162, 82, 8, 2]


@pytest.mark.parametrize("seed", range(3))
def test_a_field_of_noise_gives_a_closed_manifold_surface(seed: int) -> None:
    resolution, side = 8, 9
    sdf = random_values(seed, side, side, side)
    border = torch.ones_like(sdf, dtype=torch.bool)
    border[1:-1, 1:-1, 1:-1] = False
    sdf[border] = 1.0
    positions = deformed_positions(grid_coords(torch.arange(side**3), side), torch.zeros(side**3, 3), resolution)
    weights = torch.zeros(512, 12), torch.zeros(512, 8), torch.zeros(512)
    mesh = flexicubes_dense(positions, sdf.flatten(), *weights, resolution, training=True)
    assert len(mesh.faces) > 2000
    assert_closed(mesh.faces)
    assert mesh.colours is None


@pytest.mark.parametrize("training", [False, True])
def test_a_ball_is_closed_outward_and_round(training: bool) -> None:
    mesh = sphere(24, 0.4, training)
    assert_closed(mesh.faces)
    # Dual vertices are means of points on the sphere, so the ball comes out a little small.
    assert 0.98 < signed_volume(mesh) / (4 / 3 * torch.pi * 0.4**3) < 1
    assert float((mesh.vertices.norm(dim=1) - 0.4).abs().max()) < 0.1 / 24
    assert mesh.colours is not None  # the field of positions, interpolated as the positions are
    torch.testing.assert_close(mesh.colours, mesh.vertices.sigmoid(), atol=1e-3, rtol=0)


def test_grid_vertices_exactly_on_the_surface_keep_it_closed_and_outward() -> None:
    mesh = sphere(16, 0.375)
    assert_closed(mesh.faces)
    assert 0.96 < signed_volume(mesh) / (4 / 3 * torch.pi * 0.375**3) < 1


def test_a_surface_that_leaves_the_grid_is_open() -> None:
    edges = directed_edges(sphere(12, 0.6).faces)
    assert len({(b, a) for a, b in edges} - edges) > 10


# ---- gradients


def test_gradients_of_the_dense_grid() -> None:
    side, cubes = 4, 27
    given = [
        deformed_positions(grid_coords(torch.arange(side**3), side), random_values(1, 64, 3, dtype=torch.float64), 3),
        random_values(2, 64, dtype=torch.float64),
        random_values(3, cubes, 12, dtype=torch.float64),
        random_values(4, cubes, 8, dtype=torch.float64),
        random_values(5, cubes, dtype=torch.float64),
        random_values(6, 64, 2, dtype=torch.float64),
    ]
    for tensor in given:
        tensor.requires_grad_()

    def outputs(positions: Tensor, sdf: Tensor, beta: Tensor, alpha: Tensor, gamma: Tensor, colours: Tensor) -> tuple:
        mesh = flexicubes_dense(positions, sdf, beta, alpha, gamma, 3, colours=colours, training=True)
        return mesh.vertices, mesh.colours, mesh.deviation

    assert torch.autograd.gradcheck(outputs, given, eps=1e-7, atol=1e-5, fast_mode=True)
    vertices, colours, _ = outputs(*given)
    gradients = torch.autograd.grad(vertices.square().sum() + colours.square().sum(), given)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_gradients_of_every_decoder_channel() -> None:
    cubes = random_shell(4, 0.3)
    feats = random_values(7, len(cubes), 101, dtype=torch.float64).requires_grad_()

    def outputs(feats: Tensor) -> tuple:
        mesh = features_to_mesh(cubes, feats, 4, training=True)
        return mesh.vertices, mesh.vertex_attrs, mesh.reg_loss, mesh.tsdf_v, mesh.tsdf_s

    assert torch.autograd.gradcheck(outputs, [feats], eps=1e-7, atol=1e-5, fast_mode=True)
    vertices, attributes, *_ = outputs(feats)
    (gradient,) = torch.autograd.grad(vertices.square().sum() + attributes.square().sum(), feats)
    assert bool((gradient.abs().amax(dim=0) > 0).all()), "a channel has no influence"


# ---- sizes, types, empty and bad input


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("count", "inside"), [(0, False), (1, False), (64, True)])
def test_no_surface_gives_empty_tensors(count: int, inside: bool, training: bool) -> None:
    """Also where all of the grid is inside: the surface would lie outside the grid."""
    cubes = grid_coords(torch.arange(count), 4)
    feats = torch.full((count, 101), -1.0 if inside else 1.0)
    mesh = features_to_mesh(cubes, feats, 4, training=training)
    assert mesh.vertex_attrs is not None
    assert mesh.vertices.shape == (0, 3) and mesh.faces.shape == (0, 3) and mesh.vertex_attrs.shape == (0, 6)
    assert mesh.faces.dtype == torch.int64
    if training:
        assert mesh.reg_loss is not None and mesh.tsdf_s is not None
        assert float(mesh.reg_loss) == pytest.approx(0.2 if count else 0.0)
        assert len(mesh.tsdf_s) == {0: 0, 1: 8, 64: 125}[count]


def test_one_inside_cube_is_closed_by_its_inactive_neighbours() -> None:
    mesh = features_to_mesh(torch.tensor([[2, 1, 3]]), torch.full((1, 53), -1.0), 1000)
    assert mesh.vertex_attrs is None
    assert mesh.vertices.shape == (26, 3)
    assert_closed(mesh.faces)


def test_half_precision_is_computed_in_float32() -> None:
    cubes, feats = random_shell(6, 0.5), random_values(8, 108, 101).bfloat16()
    mesh, expected = features_to_mesh(cubes, feats, 6), features_to_mesh(cubes, feats.float(), 6)
    assert torch.equal(mesh.vertices, expected.vertices) and mesh.vertices.dtype == torch.float32


@pytest.mark.parametrize(
    ("cubes", "feats", "message"),
    [
        (torch.tensor([[0, 0, 4]]), torch.zeros(1, 101), r"cubes span 0\.\.4, outside a grid of 4"),
        (torch.tensor([[0, 0, 0, 1]]), torch.zeros(1, 101), r"cubes must be \(N, 3\) integers"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 101), "1 of 2 cubes appear twice"),
        (torch.tensor([[0, 0, 1]]), torch.zeros(1, 7), r"features must be \(N, 101\)"),
        (torch.tensor([[0, 0, 1]]), torch.zeros(2, 101), "2 rows for 1 cubes"),
        (torch.tensor([[0, 0, 1]]), torch.full((1, 101), torch.nan), "8 of 8 signed distances are not finite"),
    ],
)
def test_bad_input_is_named(cubes: Tensor, feats: Tensor, message: str) -> None:
    with pytest.raises(TriptychError, match=message):
        features_to_mesh(cubes, feats, 4)
