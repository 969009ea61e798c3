"""Procedural objects: the same for the same seed, closed and outward, hollow where a vessel is hollow."""

import numpy as np
import pytest

from trainer.__main__ import main
from trainer.prepare import primitives
from trainer.prepare.build import open_edge_share
from trainer.prepare.lofts import Part, rotation, volume
from trainer.prepare.primitives import _cup, _draw_kind, primitive, write_primitives
from triptych.errors import TriptychError
from triptych.geometry.files import read_mesh
from triptych.geometry.mesh import Mesh
from triptych.geometry.solid import solid_sdf

KINDS = sorted(primitives._KINDS)


def _joined(parts: list[Part]) -> Mesh:
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    faces = np.concatenate([part.faces + offset for part, offset in zip(parts, offsets, strict=True)])
    return Mesh(np.concatenate([part.vertices for part in parts]).astype(np.float32), faces).normalized()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_closed_and_outward(kind):
    for seed in range(4):
        for part in primitives._KINDS[kind][1](np.random.default_rng(seed)):
            edges = np.concatenate([part.faces[:, [0, 1]], part.faces[:, [1, 2]], part.faces[:, [2, 0]]])
            there = {tuple(edge) for edge in edges.tolist()}
            assert len(there) == len(edges)  # no edge runs the same way twice
            assert {(b, a) for a, b in there} == there
            assert volume(part) > 0
            assert part.uv.shape == (len(part.faces), 3, 2)
            assert part.paint.shape == (len(part.faces),)


def test_an_object_is_in_model_space_with_unit_normals_that_agree_with_its_faces():
    for index in range(8):
        kind, mesh = primitive(3, index)
        assert kind in KINDS
        np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0).max(), 1, atol=1e-5)
        np.testing.assert_allclose(mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-4)
        corners = mesh.vertices[mesh.faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
        agree = np.einsum("fk,fck->fc", mesh.face_normals(), mesh.normals[mesh.faces])
        assert agree[area > 1e-5].min() > 0.5
        assert open_edge_share(mesh) == 0
        assert 0 <= mesh.uv.min() < mesh.uv.max() <= 1
        assert 100 <= len(mesh.faces) <= 12_000


def test_the_same_seed_and_index_give_the_same_object_and_others_another():
    first, again, other = primitive(1, 5)[1], primitive(1, 5)[1], primitive(2, 5)[1]
    np.testing.assert_array_equal(first.vertices, again.vertices)
    np.testing.assert_array_equal(first.materials[0].base_color_texture, again.materials[0].base_color_texture)
    assert first.vertices.shape != other.vertices.shape or not np.array_equal(first.vertices, other.vertices)


def test_a_standing_cup_is_empty_inside_and_has_a_wall_and_a_floor():
    mesh = _joined([_cup(np.random.default_rng(0))[0]])
    sdf = solid_sdf(mesh, 64)
    middle = sdf[31, :, 31] < 0
    floor = np.flatnonzero(middle)
    low, high = (np.rint((mesh.bounds[:, 1] + 0.5) * 64)).astype(int)
    assert 1 <= len(floor) <= 0.3 * (high - low) and floor.max() < (low + high) / 2
    across = np.flatnonzero(sdf[:, (low + high) // 2, 31] < 0)
    walls = np.split(across, np.flatnonzero(np.diff(across) > 1) + 1)
    assert len(walls) == 2 and all(1 <= len(wall) <= 8 for wall in walls)


def test_boxes_stand_at_every_angle():
    turns = []
    for index in range(60):
        if _draw_kind(np.random.default_rng((0, index))) == "package":
            normals = primitive(0, index)[1].face_normals()
            side = normals[np.abs(normals[:, 1]) < 0.01]
            if len(side):
                turns.append(np.degrees(np.arctan2(*side[0, [0, 2]])) % 90)
    assert len(turns) >= 3
    assert np.ptp(turns) > 20


def test_rotation_turns_the_front_to_the_subjects_left():
    np.testing.assert_allclose(rotation(1, 90) @ [0, 0, 1], [1, 0, 0], atol=1e-12)


def test_written_objects_read_back_and_existing_ones_stay(tmp_path, capsys):
    assert main(["primitives", "--count", "3", "--seed", "7", "--out", str(tmp_path)]) == 0
    files = sorted(tmp_path.rglob("*.*"))
    assert [file.suffix for file in files] == [".glb"] * 3
    by_number = {int(file.stem.split("_")[1]): file for file in files}
    kind, mesh = primitive(7, 1)
    assert by_number[1].parent.name == kind
    read = read_mesh(by_number[1])
    np.testing.assert_array_equal(read.vertices[read.faces], mesh.vertices[mesh.faces])
    texture = read.materials[0].base_color_texture
    np.testing.assert_array_equal(texture[..., :3], mesh.materials[0].base_color_texture)

    content = {number: file.read_bytes() for number, file in by_number.items()}
    by_number[0].unlink()
    before = by_number[1].stat().st_mtime_ns
    assert write_primitives(tmp_path, 3, seed=7) == 1
    assert by_number[0].read_bytes() == content[0]
    assert by_number[1].stat().st_mtime_ns == before
    assert "3 objects written" in capsys.readouterr().out


def test_processes_write_the_same_files(tmp_path):
    write_primitives(tmp_path / "one", 4, seed=2)
    write_primitives(tmp_path / "two", 4, seed=2, workers=2)
    names = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.glb"))
    assert len(names) == 4
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_a_negative_count_is_refused(tmp_path):
    with pytest.raises(TriptychError, match="--count must be 1 or more, got 0"):
        write_primitives(tmp_path, 0)
