"""Round trips of real objects through every format, scene graphs, materials, polygons, and atomic writing."""

import base64
import csv
import errno
import io
import json
import os
import struct
import time

import numpy as np
import pytest
import trimesh
from PIL import Image

from triptych.errors import TriptychError
from triptych.geometry.colour import colors_to_linear, linear_to_srgb, srgb_to_linear
from triptych.geometry.files import (
    MESH_SUFFIXES,
    MeshWarning,
    free_stem,
    read_mesh,
    write_files,
    write_glb,
    write_mesh,
    write_obj,
    write_ply,
)
from triptych.geometry.gltf_writer import encode_glb, split_seams
from triptych.geometry.mesh import Material, Mesh
from triptych.geometry.polygons import triangulate

ASSETS = (
    "khronos__Avocado",
    "khronos__Fox",
    "khronos__FlightHelmet",
    "khronos__RiggedFigure",
    "khronos__GlassHurricaneCandleHolder",
    "odedstein__spot",
    "polyhaven__wooden_table_02_1k",
    "playcanvas__low_poly_tree",
    "trimesh__7_8ths_cube",
    "webxr__controller",
    "usdwg__car_van",
    "babylon__moltenDagger",
    "prl__pop_tarts_case",
)


@pytest.fixture(scope="module", params=ASSETS)
def asset(request, data_dir) -> Mesh:
    with open(data_dir / "index.csv", newline="", encoding="utf-8") as stream:
        rows = {row["id"]: row for row in csv.DictReader(stream)}
    return read_mesh(data_dir / rows[request.param]["file"])


def corners(mesh: Mesh) -> np.ndarray:
    return mesh.vertices[mesh.faces]


def box(size=(1.0, 2.0, 3.0)) -> Mesh:
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]).astype(np.int64)
    return Mesh(signs * np.array(size, np.float32) / 2, faces)


def painted_box(materials: int = 2) -> Mesh:
    """A box with corner UV, several textured materials, interleaved face materials and normals."""
    mesh, random = box(), np.random.default_rng(0)
    uv = random.random((20, 2)).astype(np.float32)
    pictures = [random.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(3 * materials)]
    return mesh.replace(
        normals=mesh.vertex_normals(),
        uv=uv,
        uv_faces=random.integers(0, 20, (12, 3)),
        materials=tuple(
            Material(
                name=f"paint {i}",
                base_color=(0.2 * i + 0.1, 0.5, 1.0, 1.0),
                base_color_texture=pictures[3 * i],
                metallic=0.25,
                roughness=0.5,
                metallic_roughness_texture=pictures[3 * i + 1],
                normal_texture=pictures[3 * i + 2],
            )
            for i in range(materials)
        ),
        face_materials=np.arange(12) % materials if materials > 1 else None,
    )


def assert_same_material(read: Material, written: Material, color_atol: float = 1e-6) -> None:
    assert np.allclose(read.base_color, written.base_color, rtol=0, atol=color_atol)
    assert read.metallic == pytest.approx(written.metallic, abs=1e-6)
    assert read.roughness == pytest.approx(written.roughness, abs=1e-6)
    for field in ("base_color_texture", "metallic_roughness_texture", "normal_texture"):
        a, b = getattr(read, field), getattr(written, field)
        assert (a is None) == (b is None), field
        assert a is None or np.array_equal(a, b), field


# --- real objects ----------------------------------------------------------------------------------------------


def test_obj_round_trip_is_exact(asset, tmp_path):
    files = write_obj(asset, tmp_path / "thing.obj")
    assert files[-1] == tmp_path / "thing.obj" and sorted(tmp_path.iterdir()) == sorted(files)
    read = read_mesh(files[-1])
    assert np.array_equal(read.vertices, asset.vertices) and read.vertices.dtype == np.float32
    assert np.array_equal(read.faces, asset.faces) and read.faces.dtype == np.int64
    if asset.uv is None:
        assert read.uv is None
    else:
        assert np.array_equal(read.corner_uv(), asset.corner_uv())
    used = np.unique(asset.face_materials) if asset.face_materials is not None else [0]
    which = [0] * len(asset.faces) if read.face_materials is None else read.face_materials
    wanted = asset.face_materials if len(used) > 1 else [used[0]] * len(which)
    back = {int(a): int(b) for a, b in zip(which, wanted, strict=True)}
    assert sorted(back.values()) == sorted(int(u) for u in used)
    for ours, theirs in back.items():
        assert_same_material(read.materials[ours], asset.materials[theirs])


def test_glb_round_trip_is_exact_up_to_the_flip_of_v(asset, tmp_path):
    read = read_mesh(write_glb(asset, tmp_path / "thing.glb")[0])
    assert np.array_equal(read.vertices, asset.vertices)
    order = np.argsort(asset.face_materials, kind="stable") if asset.face_materials is not None else slice(None)
    assert np.array_equal(read.faces, asset.faces[order])
    if asset.uv is None:
        assert read.uv is None
    else:
        assert np.abs(read.corner_uv() - asset.corner_uv()[order]).max() <= 2e-7 * max(1, np.abs(asset.uv).max())
    for read_material, material in zip(read.materials, asset.materials, strict=True):
        assert read_material.name == material.name
        assert_same_material(read_material, material, color_atol=1e-12)


@pytest.mark.parametrize("suffix", [".ply", ".off", ".stl", ".gltf"])
def test_shape_round_trip_is_exact(asset, tmp_path, suffix):
    read = read_mesh(write_mesh(asset, tmp_path / f"thing{suffix}")[-1])
    order = slice(None)
    if suffix == ".gltf" and asset.face_materials is not None:
        order = np.argsort(asset.face_materials, kind="stable")
    assert np.array_equal(corners(read), corners(asset)[order])
    if suffix != ".stl":
        assert np.array_equal(read.faces, asset.faces[order])
    if suffix == ".ply" and asset.uv is not None:
        assert np.array_equal(read.uv, asset.uv)


def test_stl_merges_equal_corners(data_dir, tmp_path):
    source = box()
    read = read_mesh(write_mesh(source, tmp_path / "box.stl")[0])
    assert len(read.vertices) == 8 and len(read.faces) == 12


def test_trimesh_agrees_on_what_we_write_and_read(asset, tmp_path):
    """The reference beside our own glTF code: trimesh reads our GLB alike, and we read its GLB alike."""
    ours = write_glb(asset, tmp_path / "ours.glb")[0]
    scene = trimesh.load_scene(ours, process=False)
    joined = scene.to_mesh()
    assert len(joined.faces) == len(asset.faces)
    assert np.allclose(joined.bounds, asset.bounds, atol=1e-6)
    assert joined.area == pytest.approx(trimesh.Trimesh(asset.vertices, asset.faces, process=False).area, rel=1e-5)
    (tmp_path / "theirs.glb").write_bytes(scene.export(file_type="glb"))
    read = read_mesh(tmp_path / "theirs.glb")
    assert len(read.faces) == len(asset.faces) and np.allclose(read.bounds, asset.bounds, atol=1e-6)
    if asset.uv is not None:
        used = np.unique(asset.faces)
        assert np.allclose(np.sort(np.unique(read.uv[np.unique(read.faces)].round(4), axis=0), axis=0)[[0, -1]],
                           np.sort(np.unique(asset.uv[used].round(4), axis=0), axis=0)[[0, -1]], atol=2e-4)  # fmt: skip


def test_the_whole_data_set_reads_quickly(data_dir):
    files = sorted((data_dir / "objects" / "train").rglob("*.glb"))[::40]
    start = time.process_time()
    faces = sum(len(read_mesh(file).faces) for file in files)
    assert len(files) > 90 and faces > 100 * len(files)
    assert (time.process_time() - start) / len(files) < 0.015


# --- materials, colours, several of everything -----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_obj_keeps_every_material_and_texture(tmp_path, count):
    mesh = painted_box(count)
    files = write_obj(mesh, tmp_path / "my cup.obj")
    kinds = ("albedo", "metallic_roughness", "normal")
    middles = [""] if count == 1 else [f"paint_{i}_" for i in range(count)]
    pictures = {f"my cup_{middle}{kind}.png" for middle in middles for kind in kinds}
    assert {file.name for file in files} == pictures | {"my cup.mtl", "my cup.obj"}
    read = read_mesh(tmp_path / "my cup.obj")
    assert np.array_equal(read.uv, mesh.uv) and np.array_equal(read.uv_faces, mesh.uv_faces)
    assert np.abs(read.normals - mesh.normals).max() < 1e-6
    assert [m.name for m in read.materials] == [f"paint_{i}" for i in range(count)]
    for ours, theirs in zip(read.materials, mesh.materials, strict=True):
        assert_same_material(ours, theirs, color_atol=1e-7)
    if count > 1:
        assert np.array_equal(read.face_materials, mesh.face_materials)


def test_glb_keeps_every_material_and_texture_and_splits_seams(tmp_path):
    mesh = painted_box(3)
    read = read_mesh(write_glb(mesh, tmp_path / "box.glb")[0])
    order = np.argsort(mesh.face_materials, kind="stable")
    assert np.array_equal(corners(read), corners(mesh)[order])
    assert np.abs(read.corner_uv() - mesh.corner_uv()[order]).max() < 1e-6
    assert np.array_equal(read.face_materials, mesh.face_materials[order])
    assert np.abs(read.normals[read.faces] - mesh.normals[mesh.faces][order]).max() < 1e-6
    for ours, theirs in zip(read.materials, mesh.materials, strict=True):
        assert_same_material(ours, theirs, color_atol=1e-12)


def test_material_names_that_collide_get_files_of_their_own(tmp_path):
    mesh = painted_box(3)
    names = ("Skin/..", "skin", "")
    mesh = mesh.replace(
        materials=tuple(
            Material(name=n, base_color_texture=m.base_color_texture)
            for n, m in zip(names, mesh.materials, strict=True)
        )
    )
    files = write_obj(mesh, tmp_path / "a.obj")
    assert [f.name for f in files] == [
        "a_Skin_albedo.png",
        "a_skin_2_albedo.png",
        "a_material_albedo.png",
        "a.mtl",
        "a.obj",
    ]
    for ours, theirs in zip(read_mesh(files[-1]).materials, mesh.materials, strict=True):
        assert np.array_equal(ours.base_color_texture, theirs.base_color_texture)


@pytest.mark.parametrize(
    ("suffix", "atol"), [(".obj", 6e-7), (".glb", 1e-6), (".gltf", 1e-6), (".ply", 0.5 / 255 + 1e-6)]
)
def test_vertex_colours_come_back_as_srgb(tmp_path, suffix, atol):
    colors = np.random.default_rng(1).random((8, 4)).astype(np.float32)
    read = read_mesh(write_mesh(box().replace(colors=colors), tmp_path / f"box{suffix}")[-1])
    assert read.colors.shape == (8, 4) and read.colors.dtype == np.float32
    assert np.abs(read.colors[:, :3] - colors[:, :3]).max() <= atol
    alpha = np.ones(8) if suffix == ".obj" else colors[:, 3]  # OBJ has no place for it
    assert np.abs(read.colors[:, 3] - alpha).max() <= atol


def test_glb_of_a_mesh_without_normals_has_smooth_ones_of_length_one(tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=2)
    ball = Mesh(ball.vertices.astype(np.float32), ball.faces.astype(np.int64))
    corners_uv = np.repeat(np.eye(3, 2, dtype=np.float32)[None], len(ball.faces), axis=0).reshape(-1, 2)
    lonely = np.array([[2, 0, 0]], np.float32)
    mesh = ball.replace(
        vertices=np.concatenate([ball.vertices, lonely]),
        uv=corners_uv,
        uv_faces=np.arange(len(corners_uv)).reshape(-1, 3),
    )
    for write, name in ((write_glb, "ball.glb"), (write_mesh, "ball.gltf")):
        read = read_mesh(write(mesh, tmp_path / name)[0])
        assert len(read.vertices) == 3 * len(mesh.faces)  # every corner is a vertex: all edges are seams
        assert np.abs(np.linalg.norm(read.normals, axis=1) - 1).max() < 1e-5
        outwards = read.vertices / np.linalg.norm(read.vertices, axis=1, keepdims=True)
        assert (read.normals * outwards).sum(axis=1).min() > 0.99
    plain = read_mesh(write_glb(mesh.replace(uv=None, uv_faces=None), tmp_path / "plain.glb")[0])
    assert np.abs(np.linalg.norm(plain.normals, axis=1) - 1).max() < 1e-5
    for shape in (trimesh.creation.box(), trimesh.creation.cylinder(0.3, 1.0)):  # else their edges would be rounded off
        hard = Mesh(shape.vertices.astype(np.float32), shape.faces.astype(np.int64))
        assert read_mesh(write_glb(hard, tmp_path / "hard.glb")[0]).normals is None


def test_glb_stores_vertex_colours_linear():
    blob = encode_glb(box().replace(colors=np.full((8, 4), 0.5, np.float32)))
    stored = np.frombuffer(blob, np.float32, 32, len(blob) - 8 * 16 - 12 * 3 * 4).reshape(8, 4)
    assert np.allclose(stored, [[0.21404114, 0.21404114, 0.21404114, 0.5]] * 8, atol=1e-7)


def test_srgb_and_linear_are_inverse_and_pass_known_values():
    values = np.linspace(0, 1, 1001)
    assert np.abs(linear_to_srgb(srgb_to_linear(values)) - values).max() < 1e-9
    assert srgb_to_linear(np.array([0.5]))[0] == pytest.approx(0.214041140482, abs=1e-9)
    assert colors_to_linear(np.array([[1, 0, 0.04045, 0.3]], np.float32))[0] == pytest.approx(
        [1, 0, 0.04045 / 12.92, 0.3], abs=1e-7
    )


def test_obj_maps_of_others_are_understood(tmp_path):
    """Options before file names, spaces in them, grey maps, Windows separators, Tr, negative indices, comments."""
    (tmp_path / "maps").mkdir()
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    color = np.random.default_rng(2).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    Image.fromarray(color).save(tmp_path / "maps" / "base colour.png")
    Image.fromarray(grey).save(tmp_path / "rough.png")
    Image.fromarray(grey[::-1].copy()).save(tmp_path / "metal.png")
    (tmp_path / "m.mtl").write_text(
        "# made by hand\nnewmtl Red Paint\nKd 0.5 0.5 0.5\nTr 0.25\nmap_Kd -s 1 1 1 -clamp on maps\\base colour.png\n"
        "map_Pr rough.png\nmap_Pm -imfchan r metal.png\nnorm -bm 0.5 maps/base colour.png\nmap_Pm_unknown x\n"
    )
    (tmp_path / "m.obj").write_text(
        "mtllib m.mtl\nv 0 0 0\nv 1 0 0 # here\nv 1 1 0\n\tv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nvn 0 0 1\n"
        "usemtl Red Paint\nf -4/-4/-1 -3/-3/-1 \\\n-2/-2/-1 -1/-1/-1 # quad\n"
    )
    mesh = read_mesh(tmp_path / "m.obj")
    assert np.array_equal(mesh.faces, [[0, 1, 2], [0, 2, 3]]) and mesh.uv_faces is None
    assert np.array_equal(mesh.uv, mesh.vertices[:, :2]) and np.array_equal(mesh.normals, [[0, 0, 1]] * 4)
    (material,) = mesh.materials
    assert material.name == "Red Paint" and material.base_color == pytest.approx(
        (0.21404, 0.21404, 0.21404, 0.75), abs=1e-5
    )
    assert np.array_equal(material.base_color_texture, color)
    assert np.array_equal(material.normal_texture, color[..., :3])
    assert np.array_equal(material.metallic_roughness_texture[..., 1], grey)
    assert np.array_equal(material.metallic_roughness_texture[..., 2], grey[::-1])
    assert material.metallic == 1.0 and material.roughness == 1.0


def test_a_missing_texture_or_library_is_reported_and_the_shape_is_kept(tmp_path):
    (tmp_path / "m.obj").write_text("mtllib gone.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl a\nf 1 2 3\n")
    with pytest.warns(MeshWarning, match=r"gone\.mtl"):
        assert len(read_mesh(tmp_path / "m.obj").faces) == 1
    (tmp_path / "gone.mtl").write_text("newmtl a\nmap_Kd lost.png\n")
    with pytest.warns(MeshWarning, match=r"lost\.png"):
        assert read_mesh(tmp_path / "m.obj").materials[0].base_color_texture is None
    (tmp_path / "lost.png").write_bytes(b"not a picture")
    with pytest.warns(MeshWarning, match="cannot be decoded"):
        assert read_mesh(tmp_path / "m.obj").materials[0].base_color_texture is None


# --- scene graphs ----------------------------------------------------------------------------------------------


def gltf_scene(nodes, *, meshes=None, extra=None, buffers=()) -> dict:
    """A glTF tree around one right triangle (0,0,0) (1,0,0) (0,1,0)."""
    blob = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes() + b"".join(buffers)
    tree = {
        "asset": {"version": "2.0"},
        "scenes": [{"nodes": [0]}],
        "nodes": nodes,
        "meshes": meshes or [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": len(blob), "uri": "data:;base64," + base64.b64encode(blob).decode()}],
    }
    for key, rows in (extra or {}).items():
        tree[key] = tree.get(key, []) + rows
    return tree


def save_gltf(folder, tree):
    path = folder / "scene.gltf"
    path.write_text(json.dumps(tree))
    return path


def test_node_transforms_nest_and_meshes_can_be_placed_twice(tmp_path):
    half = float(np.sqrt(0.5))
    nodes = [
        {"translation": [10, 0, 0], "children": [1, 2]},
        {"mesh": 0, "rotation": [0, 0, half, half], "scale": [2, 3, 4]},  # a quarter turn about z after scaling
        {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
    ]
    mesh = read_mesh(save_gltf(tmp_path, gltf_scene(nodes)))
    expected = [[10, 0, 0], [10, 2, 0], [7, 0, 0], [10, 0, 5], [11, 0, 5], [10, 1, 5]]
    assert np.allclose(mesh.vertices, expected, atol=1e-5)
    assert np.array_equal(mesh.faces, [[0, 1, 2], [3, 4, 5]])


def test_a_mirrored_node_keeps_its_outside_out(tmp_path):
    for scale, direction in (([1, 1, 1], 1), ([-1, 1, 1], 1), ([-1, -1, 1], 1), ([1, 1, -1], -1)):
        tree = gltf_scene(
            [{"mesh": 0, "scale": scale}],
            meshes=[{"primitives": [{"attributes": {"POSITION": 0, "NORMAL": 1}}]}],
            buffers=[np.array([[0, 0, 1]] * 3, "<f4").tobytes()],
            extra={
                "accessors": [{"bufferView": 1, "componentType": 5126, "count": 3, "type": "VEC3"}],
                "bufferViews": [{"buffer": 0, "byteOffset": 36, "byteLength": 36}],
            },
        )
        mesh = read_mesh(save_gltf(tmp_path, tree))
        assert np.allclose(mesh.face_normals(), [[0, 0, direction]]), scale
        assert np.allclose(mesh.normals, [[0, 0, direction]] * 3), scale


def test_skins_are_applied_in_the_bind_pose(tmp_path):
    joints = np.array([[0, 1, 0, 0]] * 3, "u1").tobytes()
    weights = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0]], "<f4").tobytes()
    tree = gltf_scene(
        [
            {"children": [1, 2, 3]},
            {"mesh": 0, "skin": 0, "translation": [100, 0, 0]},  # void, by the specification
            {"translation": [0, 0, 2]},
            {"translation": [0, 0, 4]},
        ],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0, "JOINTS_0": 1, "WEIGHTS_0": 2}}]}],
        buffers=[joints, weights],
        extra={
            "accessors": [
                {"bufferView": 1, "componentType": 5121, "count": 3, "type": "VEC4"},
                {"bufferView": 2, "componentType": 5126, "count": 3, "type": "VEC4"},
            ],
            "bufferViews": [
                {"buffer": 0, "byteOffset": 36, "byteLength": 12},
                {"buffer": 0, "byteOffset": 48, "byteLength": 48},
            ],
            "skins": [{"joints": [2, 3]}],
        },
    )
    assert np.allclose(read_mesh(save_gltf(tmp_path, tree)).vertices, [[0, 0, 2], [1, 0, 4], [0, 1, 3]])


@pytest.mark.parametrize(("mode", "expected"), [(5, [[0, 1, 2], [2, 1, 3]]), (6, [[0, 1, 2], [0, 2, 3]])])
def test_strips_and_fans_are_unrolled(tmp_path, mode, expected):
    tree = gltf_scene(
        [{"mesh": 0}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 1}, "mode": mode}]}],
        buffers=[np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]], "<f4").tobytes()],
        extra={
            "accessors": [{"bufferView": 1, "componentType": 5126, "count": 4, "type": "VEC3"}],
            "bufferViews": [{"buffer": 0, "byteOffset": 36, "byteLength": 48}],
        },
    )
    assert np.array_equal(read_mesh(save_gltf(tmp_path, tree)).faces, expected)


def test_quantised_strided_colours_uv_transforms_and_external_files(tmp_path):
    """Normalised 8-bit linear colours in a strided view, a texture with an escaped name, and a UV transform."""
    rows = np.zeros((3, 8), "u1")
    rows[:, :4] = [[0, 55, 255, 128]] * 3
    uv = np.array([[0, 0], [1, 0], [0, 1]], "<f4")
    (tmp_path / "data.bin").write_bytes(rows.tobytes() + uv.tobytes())
    picture = np.random.default_rng(3).integers(0, 256, (6, 4, 4), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a b.png")
    transform = {"KHR_texture_transform": {"offset": [0.5, 0], "scale": [2, 3]}}
    tree = gltf_scene(
        [{"mesh": 0}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1, "TEXCOORD_0": 2}, "material": 0}]}],
        extra={
            "accessors": [
                {"bufferView": 1, "componentType": 5121, "count": 3, "type": "VEC4", "normalized": True},
                {"bufferView": 2, "componentType": 5126, "count": 3, "type": "VEC2"},
            ],
            "bufferViews": [
                {"buffer": 1, "byteLength": 24, "byteStride": 8},
                {"buffer": 1, "byteOffset": 24, "byteLength": 24},
            ],
            "buffers": [{"byteLength": 48, "uri": "data.bin"}],
            "images": [{"uri": "a%20b.png"}],
            "textures": [{"source": 0}],
            "materials": [
                {
                    "pbrMetallicRoughness": {
                        "baseColorTexture": {"index": 0, "extensions": transform},
                        "metallicFactor": 0.25,
                    }
                }
            ],
        },
    )
    mesh = read_mesh(save_gltf(tmp_path, tree))
    assert np.allclose(mesh.colors, [[0, 0.50178, 1, 128 / 255]] * 3, atol=1e-4)
    assert np.allclose(mesh.uv, [[0.5, 1], [2.5, 1], [0.5, -2]], atol=1e-6)
    assert np.array_equal(mesh.materials[0].base_color_texture, picture[..., :3])  # opaque: its alpha means nothing
    assert mesh.materials[0].metallic == 0.25 and mesh.materials[0].roughness == 1.0


def test_parts_without_colour_or_uv_are_white_and_zero(tmp_path):
    tree = gltf_scene(
        [{"mesh": 0}],
        meshes=[{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 0}}, {"attributes": {"POSITION": 0}}]}],
    )
    mesh = read_mesh(save_gltf(tmp_path, tree))
    assert np.array_equal(mesh.colors, [[0, 0, 0, 1], [1, 0, 0, 1], [0, 1, 0, 1], *[[1, 1, 1, 1]] * 3])
    assert np.array_equal(mesh.faces, [[0, 1, 2], [3, 4, 5]])


# --- other dialects --------------------------------------------------------------------------------------------


def test_ascii_and_big_endian_ply_with_mixed_polygons(tmp_path):
    header = (
        "ply\nformat {} 1.0\ncomment x\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\nelement face 2\n"
        "property list uchar int vertex_index\nend_header\n"
    )
    points = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0.5, 2, 0)]
    polygons = [[0, 1, 2, 3], [3, 2, 4]]
    text = "".join(f"{x} {y} {z} 255 0 51\n" for x, y, z in points) + "4 0 1 2 3\n3 3 2 4\n"
    (tmp_path / "a.ply").write_text(header.format("ascii") + text)
    body = b"".join(struct.pack(">3f3B", *p, 255, 0, 51) for p in points)
    body += b"".join(struct.pack(f">B{len(p)}i", len(p), *p) for p in polygons)
    (tmp_path / "b.ply").write_bytes(header.format("binary_big_endian").encode() + body)
    for name in ("a.ply", "b.ply"):
        mesh = read_mesh(tmp_path / name)
        assert np.array_equal(mesh.vertices, np.array(points, np.float32))
        assert np.array_equal(mesh.faces, [[0, 1, 2], [0, 2, 3], [3, 2, 4]])
        assert np.allclose(mesh.colors, [[1, 0, 0.2, 1]] * 5)


def test_ply_corner_texcoords_become_corner_uv(tmp_path):
    (tmp_path / "a.ply").write_text(
        "ply\nformat ascii 1.0\nelement vertex 3\n"
        "property float x\nproperty float y\nproperty float z\nelement face 2\n"
        "property list uchar int vertex_indices\nproperty list uchar float texcoord\nend_header\n"
        "0 0 0\n1 0 0\n0 1 0\n3 0 1 2 6 0 0 1 0 0 1\n3 2 1 0 6 .5 .5 1 1 .25 0\n"
    )
    expected = [[[0, 0], [1, 0], [0, 1]], [[0.5, 0.5], [1, 1], [0.25, 0]]]
    assert np.array_equal(read_mesh(tmp_path / "a.ply").corner_uv(), np.array(expected, np.float32))


def test_ascii_stl_and_off_with_comments(tmp_path):
    facet = "facet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 0\nendloop\nendfacet\n"
    (tmp_path / "a.stl").write_text(
        f"solid x\n{facet}endsolid x\nsolid y\n{facet.replace('0 0 0', '1 1 0')}endsolid y\n"
    )
    mesh = read_mesh(tmp_path / "a.stl")
    assert len(mesh.faces) == 2 and len(mesh.vertices) == 4
    (tmp_path / "a.off").write_text("OFF # kind\n# counts\n4 1 0\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n4 0 1 2 3\n")
    mesh = read_mesh(tmp_path / "a.off")
    assert len(mesh.faces) == 2 and np.allclose(mesh.face_normals(), [[0, 0, 1]] * 2)


def test_suffixes_are_read_in_any_case(tmp_path):
    for suffix in MESH_SUFFIXES:
        path = write_mesh(box(), tmp_path / f"box{suffix}")[-1]
        assert len(read_mesh(path.rename(path.with_suffix(suffix.upper()))).faces) == 12, suffix


# --- polygons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corner_count", [3, 4, 5, 8, 13])
def test_star_polygons_are_cut_without_overlap(corner_count):
    """Property: for random star-shaped polygons in random planes, triangles have the polygon's winding and its area."""
    random = np.random.default_rng(corner_count)
    for _ in range(30):
        angle = np.sort(random.random(corner_count)) * 2 * np.pi
        if np.diff(np.append(angle, angle[0] + 2 * np.pi)).max() > 2.8:
            continue  # the centre is outside: not a star
        radius = random.uniform(0.2, 1.0, corner_count)
        flat = np.stack([radius * np.cos(angle), radius * np.sin(angle), np.zeros(corner_count)], axis=1)
        rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
        points = flat @ rotation.T + random.normal(size=3)
        area = 0.5 * np.cross(points - points[0], np.roll(points, -1, axis=0) - points[0]).sum(axis=0)
        cut = triangulate(points, np.arange(corner_count)[None])[0]
        a, b, c = (points[cut[:, i]] for i in range(3))
        signed = 0.5 * np.cross(b - a, c - a) @ (area / np.linalg.norm(area))
        assert signed.min() > -1e-9 and signed.sum() == pytest.approx(np.linalg.norm(area), rel=1e-6)
        assert np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2 == pytest.approx(np.linalg.norm(area), rel=1e-6)


def test_split_seams_changes_no_corner():
    mesh = painted_box(1)
    split = split_seams(mesh)
    assert split.uv_faces is None and len(split.uv) == len(split.vertices)
    assert np.array_equal(corners(split), corners(mesh)) and np.array_equal(split.corner_uv(), mesh.corner_uv())


# --- writing ---------------------------------------------------------------------------------------------------


def test_unknown_suffix_names_the_known_ones(tmp_path):
    with pytest.raises(TriptychError) as caught:
        write_mesh(box(), tmp_path / "a.fbx")
    assert all(suffix in str(caught.value) for suffix in (".fbx", *MESH_SUFFIXES))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, suffix, call):
    """The disk fills up at every single step in turn: each time one sentence, and an empty folder."""
    names = {"open": "builtins.open", "fsync": "os.fsync", "replace": "os.replace"}
    real = {"open": open, "fsync": os.fsync, "replace": os.replace}[call]
    calls, failing = 0, 0

    def fails(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **keywords)

    mesh = painted_box(1)
    for failing in range(1, 6 if suffix == ".obj" else 2):  # noqa: B007 (read by the closure)
        calls = 0
        with monkeypatch.context() as patch, pytest.raises(TriptychError, match="No space left") as caught:
            patch.setattr(names[call], fails)
            write_mesh(mesh, tmp_path / f"box{suffix}")
        assert calls == failing and str(tmp_path) in str(caught.value)
        assert not list(tmp_path.iterdir())


def test_a_failed_rewrite_keeps_the_old_files(tmp_path, monkeypatch):
    write_obj(painted_box(1), tmp_path / "box.obj")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(TriptychError):
        write_obj(box(), tmp_path / "box.obj")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TriptychError, match="cannot write.*file"):
        write_ply(box(), tmp_path / "file" / "a.ply")
    if os.name == "posix" and os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(TriptychError, match="closed.*[Pp]ermission"):
            write_ply(box(), closed / "a.ply")
        assert not list(closed.iterdir())


def test_an_interruption_cleans_up_and_passes_on(tmp_path, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, {"a": b"1"})
    assert not list(tmp_path.iterdir())


def test_two_exports_into_one_folder_never_share_a_file(tmp_path):
    """Names that look like one another's material pictures included."""
    stems, owned = ["cup", "cup", "cup_paint_1", "CUP", "cup_00002", "cup"], []
    for stem in stems:
        free = free_stem(tmp_path, stem)
        owned.append({file.name.lower() for file in write_obj(painted_box(2), tmp_path / f"{free}.obj")})
    assert sum(map(len, owned)) == len(set.union(*owned)) == len(list(tmp_path.iterdir()))
    assert free_stem(tmp_path, "other") == "other" and free_stem(tmp_path / "absent", "cup") == "cup"
    assert free_stem(tmp_path, "cu") == "cu"


def test_obj_of_a_hundred_thousand_faces_is_fast(tmp_path):
    side = 225
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), [0.1], indexing="ij"), -1).reshape(-1, 3) / side
    row = np.arange(side * side).reshape(side, side)
    a, b, c, d = (block.ravel() for block in (row[:-1, :-1], row[1:, :-1], row[1:, 1:], row[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], 1), np.stack([a, c, d], 1)])
    mesh = Mesh(grid.astype(np.float32), faces, uv=grid[:, :2].astype(np.float32), materials=(Material(),))
    mesh = mesh.replace(normals=mesh.vertex_normals())
    assert len(faces) > 100_000
    start = time.process_time()
    path = write_obj(mesh, tmp_path / "grid.obj")[-1]
    assert time.process_time() - start < 1.5
    start = time.process_time()
    read = read_mesh(path)
    assert time.process_time() - start < 3.0
    assert np.array_equal(read.vertices, mesh.vertices) and np.array_equal(read.faces, mesh.faces)


def test_pictures_of_other_modes_are_converted(tmp_path):
    deep = Image.fromarray((np.arange(12, dtype=np.uint16) * 257).reshape(3, 4))
    palette = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).convert("P")
    for picture in (deep, palette):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        (tmp_path / "t.png").write_bytes(stream.getvalue())
        (tmp_path / "m.mtl").write_text("newmtl a\nmap_Kd t.png\n")
        (tmp_path / "m.obj").write_text("mtllib m.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl a\nf 1 2 3\n")
        texture = read_mesh(tmp_path / "m.obj").materials[0].base_color_texture
        assert np.array_equal(texture, np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4, 1), 3, axis=2))
