"""The second stage's arrays: against analytic solids, under symmetries, through the command, and as drawn samples."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from trainer.__main__ import main
from trainer.prepare.build import BuildOptions
from trainer.prepare.features import FeatureOptions, cache_features, sphere_cameras
from trainer.prepare.run import prepare
from trainer.prepare.sources import find_sources
from trainer.prepare.structured import FINE_BAND, FOLDER, lattice_mask, plan, structure_sample
from trainer.structured import (
    StructuredData,
    corner_places,
    decode_attributes,
    draw_active,
    draw_sample,
    join_samples,
    symmetric_coords,
    symmetric_vectors,
)
from triptych.errors import TriptychError
from triptych.geometry.files import write_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.solid import solid_sdf
from triptych.geometry.voxels import turn_volume

BAND, RES = 2.0, 32


def _box(half, centre=(0.0, 0.0, 0.0), color=(1.0, 0.0, 0.0)):
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([f for a, b, c, d in quads for f in ((a, b, c), (a, c, d))], np.int64)
    colors = np.tile(np.array([*color, 1.0], np.float32), (8, 1))
    return Mesh((corners * np.array(half, np.float32) + np.array(centre, np.float32)), faces, colors=colors)


def _joined(*meshes):
    offsets = np.cumsum([0, *(len(m.vertices) for m in meshes)])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + o for m, o in zip(meshes, offsets, strict=False)]),
        colors=np.concatenate([m.colors for m in meshes]),
    )


def _field(mesh, resolution=RES):
    return np.rint(solid_sdf(mesh, resolution, BAND) * (127 / BAND)).astype(np.int8)


def _lattice(sample, resolution=RES):
    return np.argwhere(lattice_mask(sample["coords"], resolution)) / (2 * resolution) - 0.5


def _box_distance(points, half):
    outside = np.abs(points) - np.array(half)
    return np.linalg.norm(np.maximum(outside, 0), axis=-1) + np.minimum(outside.max(axis=-1), 0)


@pytest.fixture(scope="module")
def box():
    half = (0.5, 0.27, 0.31)
    mesh = _box(half)
    return half, mesh, structure_sample(mesh, _field(mesh), BAND)


def test_fine_distance_of_a_box_is_analytic(box):
    half, _, sample = box
    found = sample["fine_sdf"] * (FINE_BAND / 127)
    true = _box_distance(_lattice(sample), half) * 2 * RES
    assert len(found) == len(true)
    error = np.abs(found - true.clip(-4, 4))
    near = np.abs(true) < 1.5
    # A cell at an edge keeps a sample of one of its faces: half a fine voxel there, nothing elsewhere.
    assert error[near].mean() < 0.05 and error[near].max() < 0.75
    assert np.median(error[near]) < 0.02 and error.max() < 1.6
    clear = np.abs(true) > 0.5
    assert ((found < 0) == (true < 0))[clear].all()


def test_attributes_of_a_box(box):
    half, _, sample = box
    values = decode_attributes(torch.from_numpy(sample["attributes"])).numpy()
    centres = (sample["coords"] + 0.5) / RES - 0.5
    foot = centres + values[:, 6:9] / RES
    assert np.abs(_box_distance(foot, half)).max() * RES < 0.2
    length = np.abs(np.linalg.norm(values[:, 6:9], axis=1) - np.abs(_box_distance(centres, half)) * RES)
    assert length.mean() < 0.05 and length.max() < 0.6
    assert (values[:, :3] == values[0, :3]).all() and values[0, 0] == 1 and values[0, 1] == -1
    distance = _box_distance(centres, half) * RES
    flat = (np.abs(centres[:, 1:]) < np.array(half[1:]) - 0.1).all(axis=1)
    np.testing.assert_allclose(values[flat, 3], np.sign(centres[flat, 0]), atol=0.02)
    assert (values[distance > 1, 9] == 0).all() and values[:, 9].max() == 1


def test_points_of_a_box(box):
    half, _, sample = box
    points = sample["points"] / 65534
    assert np.abs(_box_distance(points, half)).max() < 1e-3
    normals = sample["point_normals"] / 127
    outwards = np.take_along_axis(points * normals, np.abs(normals).argmax(axis=1)[:, None], axis=1)
    assert (outwards > 0).all()
    assert (sample["point_colors"] == [255, 0, 0]).all()
    # By area: the two faces across x have 4 * .27 * .31 of 8 * (.27 * .31 + .5 * .31 + .5 * .27).
    share = (np.abs(normals[:, 0]) > 0.9).mean()
    assert share == pytest.approx(0.27 * 0.31 / (0.27 * 0.31 + 0.5 * 0.31 + 0.5 * 0.27), abs=0.02)


def test_inner_walls_are_in_none_of_the_arrays():
    mesh = _joined(_box((0.5, 0.3, 0.3)), _box((0.2, 0.1, 0.1), color=(0.0, 0.0, 1.0)))
    sample = structure_sample(mesh, _field(mesh), BAND)
    assert (sample["point_colors"] == [255, 0, 0]).all()
    assert (sample["attributes"][:, 2] == 0).all()
    assert np.abs(_box_distance(sample["points"] / 65534, (0.5, 0.3, 0.3))).max() < 1e-3


def test_a_sheet_has_two_sides():
    sheet = Mesh(
        np.array([[-0.5, 0, -0.4], [0.5, 0, -0.4], [0.5, 0, 0.4], [-0.5, 0, 0.4]], np.float32),
        np.array([[0, 1, 2], [0, 2, 3]]),
    )
    sample = structure_sample(sheet, _field(sheet), BAND)
    points, normals = sample["points"] / 65534, sample["point_normals"] / 127
    assert 0.4 < (normals[:, 1] > 0).mean() < 0.6
    np.testing.assert_allclose(points[:, 1], np.sign(normals[:, 1]) * 0.55 / (2 * RES), atol=1e-4)
    values = decode_attributes(torch.from_numpy(sample["attributes"])).numpy()
    away = np.abs(sample["coords"][:, 1] - RES / 2 + 0.5) > 1
    assert (values[away, 4] * (sample["coords"][away, 1] - RES / 2 + 0.5) > 0).all()


@pytest.mark.parametrize("number", [1, 3, 4, 6])
def test_symmetries_equal_recomputing(number):
    mesh = _joined(_box((0.5, 0.2, 0.14)), _box((0.1, 0.15, 0.1), (0.2, 0.3, 0.2), (0.0, 1.0, 0.0)))
    field = _field(mesh)
    sample = structure_sample(mesh, field, BAND)
    moved = mesh.replace(
        vertices=np.ascontiguousarray(symmetric_vectors(mesh.vertices, number)),
        faces=mesh.faces[:, ::-1] if number >= 4 else mesh.faces,
    )
    turned = turn_volume(field, number % 4)
    other = structure_sample(moved, turned[::-1] if number >= 4 else turned, BAND)

    def drawn(item, symmetry):
        return draw_sample(
            item, RES, BAND, np.random.default_rng(0), tau=(1.2, 1.2), perturbation=0.0, symmetry=symmetry
        )

    first, second = drawn(sample, number), drawn(other, 0)
    key = lambda s: (s["coords"].long() * torch.tensor([RES * RES, RES, 1])).sum(1).argsort()  # noqa: E731
    a, b = key(first), key(second)
    assert torch.equal(first["coords"][a], second["coords"][b])
    difference = (first["target"][first["rows"][a]] - second["target"][second["rows"][b]]).abs() * FINE_BAND
    assert difference.mean() < 0.05
    attributes = decode_attributes(first["attributes"][a]) - decode_attributes(second["attributes"][b])
    assert attributes[:, :6].abs().mean() < 0.04
    assert attributes[:, 6:9].abs().mean() < 0.09


def test_symmetric_coords_are_those_of_a_volume():
    volume = np.zeros((5, 5, 5))
    coords = np.array([[0, 1, 3], [4, 2, 0]])
    volume[tuple(coords.T)] = [1, 2]
    for number in range(8):
        turned = turn_volume(volume, number % 4)
        turned = turned[::-1] if number >= 4 else turned
        np.testing.assert_array_equal(turned[tuple(symmetric_coords(coords, number, 5).T)], [1, 2])


@pytest.mark.parametrize("levels", [1, 2])
def test_drawn_sample_interpolates_and_collates(box, levels):
    _, _, item = box
    options = {"tau": (0.9, 1.6), "perturbation": 0.6, "levels": levels}
    sample = draw_sample(item, RES, BAND, np.random.default_rng(5), **options)
    again = draw_sample(item, RES, BAND, np.random.default_rng(5), **options)
    assert all(torch.equal(sample[key], again[key]) for key in sample)
    assert sample["count"] == len(sample["coords"])
    torch.testing.assert_close(sample["point_weights"].sum(1), torch.ones(len(sample["point_rows"])))
    # The surface is where the interpolated distance vanishes.
    there = (sample["target"][sample["point_rows"]] * sample["point_weights"]).sum(1) * FINE_BAND
    assert there.abs().mean() < 0.1
    batch = join_samples([sample, sample])
    half = len(sample["coords"])
    torch.testing.assert_close(batch["target"][batch["rows"]][:half], batch["target"][batch["rows"]][half:])
    assert batch["coords"][half:, 0].eq(1).all() and batch["lengths"].tolist() == [half, half]
    # A vertex that neighbours share is one row: its coordinates are the same whichever voxel names it.
    side = 2**levels + 1
    local = torch.cartesian_prod(*[torch.arange(side)] * 3)
    place = sample["coords"][:, None].long() * 2**levels + local
    first = torch.zeros(len(sample["target"]), 3, dtype=torch.int64)
    first[sample["rows"]] = place
    assert torch.equal(first[sample["rows"]], place)
    assert corner_places(levels).shape == (8**levels, 8)


def test_active_sets(box):
    _, _, item = box
    distance = item["sdf"].astype(np.float32) * (BAND / 127)
    plain = draw_active(item["coords"], distance, RES, np.random.default_rng(0), (1.0, 1.0), 0.0)
    np.testing.assert_array_equal(plain, np.flatnonzero(np.abs(distance) < 1))
    counts = set()
    for seed in range(6):
        noisy = draw_active(item["coords"], distance, RES, np.random.default_rng(seed), (1.0, 1.0), 0.6)
        assert np.abs(distance[noisy]).max() < 1.6
        counts.add(len(noisy))
    assert len(counts) > 1
    some = draw_active(item["coords"], distance, RES, np.random.default_rng(0), (1.0, 1.0), 0.0, max_voxels=100)
    assert len(some) == 100 and set(some) <= set(plain)
    spans = np.ptp(item["coords"][some].astype(int), axis=0)
    assert spans.max() < np.ptp(item["coords"].astype(int), axis=0).max()
    none = draw_active(item["coords"][:5], np.full(5, 1.7, np.float32), RES, np.random.default_rng(0), (1, 1), 0.0)
    assert len(none) == 5


def test_too_narrow_a_band_is_a_sentence(box):
    _, mesh, _ = box
    with pytest.raises(TriptychError, match="1.75 are needed"):
        structure_sample(mesh, _field(mesh), 1.5)


# ---- a prepared folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("structured")
    (root / "meshes").mkdir()
    for number in range(3):
        write_mesh(_box((0.5, 0.2 + 0.05 * number, 0.3)), root / "meshes" / f"box_{number}.ply")
    sources = find_sources([root / "meshes"])
    prepare(sources, root / "data", BuildOptions(resolution=RES, view_size=16, yaws=2), workers=0)
    index = json.loads((root / "data" / "index.json").read_text())
    for record, split in zip(index["records"], ("train", "train", "validation"), strict=True):
        record["split"] = split
    (root / "data" / "index.json").write_text(json.dumps(index))
    assert main(["structure", str(root / "data"), str(root / "meshes"), "--workers", "0"]) == 0
    return root


def test_structure_command_is_resumable(folder, capsys):
    shard = folder / "data" / FOLDER / "shard_00000.safetensors"
    before = shard.stat().st_mtime_ns
    assert main(["structure", str(folder / "data"), str(folder / "meshes"), "--workers", "0"]) == 0
    assert "3 samples" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before
    arrays = load_file(str(shard))
    assert arrays["rows"].tolist() == [0, 2, 4]
    assert arrays["voxel_ends"][-1] == len(arrays["coords"]) == len(arrays["attributes"]) == len(arrays["sdf"])
    assert arrays["vertex_ends"][-1] == len(arrays["fine_sdf"])
    assert arrays["points"].shape == (3, 4096, 3)
    shard.write_bytes(shard.read_bytes()[:-10])
    assert main(["structure", str(folder / "data"), str(folder / "meshes"), "--workers", "0"]) == 0
    again = load_file(str(shard))
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)


def test_reading_splits(folder):
    train, held_out = StructuredData(folder / "data"), StructuredData(folder / "data", "validation")
    assert (len(train), len(held_out)) == (2, 1)
    item = train[1]
    assert len(item["coords"]) == train.voxels(1) == len(item["attributes"])
    assert len(item["fine_sdf"]) == lattice_mask(item["coords"], RES).sum()
    assert train.views(1)["albedo"].shape == (4, 16, 16, 4)
    with pytest.raises(TriptychError, match="'test'"):
        StructuredData(folder / "data", "test")


def test_wrong_folders_are_sentences(folder, tmp_path, capsys):
    assert main(["structure", str(tmp_path), str(folder / "meshes")]) == 1
    assert "run `python -m trainer prepare" in capsys.readouterr().err
    (tmp_path / "others").mkdir()
    write_mesh(_box((0.5, 0.2, 0.2)), tmp_path / "others" / "thing.ply")
    assert main(["structure", str(folder / "data"), str(tmp_path / "others")]) == 1
    assert "no object" in capsys.readouterr().err


def test_cached_features(folder):
    def colours(pictures):  # a stand-in encoder: one class token, then the mean colour of each of 8 x 8 patches
        patches = torch.nn.functional.adaptive_avg_pool2d(pictures, 8).flatten(2).transpose(1, 2)
        return torch.cat([torch.full_like(patches[:, :1], 9.0), patches], dim=1)

    data = folder / "data"
    jobs = plan(data, find_sources([folder / "meshes"]))[0]
    options = FeatureOptions("colours", views=6, size=32, prefix_tokens=1, batch=4)
    assert cache_features(data, jobs, colours, options) == 3
    assert cache_features(data, jobs, colours, options) == 0
    read = StructuredData(data, features="colours")
    item = read[1]
    assert item["features"].shape == (len(item["coords"]), 3) and item["features"].dtype == np.float16
    # Red boxes: every view that shows the voxel adds red, none adds green or blue.
    assert item["features"][:, 0].min() > 0.05 and np.abs(item["features"][:, 1:]).max() == 0
    sample = draw_sample(item, RES, BAND, np.random.default_rng(0), tau=(1.0, 1.0), perturbation=0.0)
    assert sample["features"].shape == (len(sample["coords"]), 3)
    assert len({round(c.elevation_deg, 3) for c in sphere_cameras(options)}) == 6
    with pytest.raises(TriptychError, match="no features 'other'"):
        StructuredData(data, features="other")


def test_features_of_a_random_dinov2(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4
    )
    model = transformers.Dinov2WithRegistersModel(config).eval()
    data = folder / "data"
    jobs = plan(data, find_sources([folder / "meshes"]))[0]
    options = FeatureOptions("dino", views=3, size=28)
    assert cache_features(data, jobs, lambda x: model(x).last_hidden_state, options) == 3
    assert np.isfinite(StructuredData(data, features="dino")[0]["features"]).all()
