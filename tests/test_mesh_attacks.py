"""Damaged and hostile mesh files: each ends in one TriptychError sentence, without large allocations or traceback."""

import base64
import json
import os
import struct
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import trimesh.exchange.load  # noqa: F401 (imported lazily by the readers: not part of what they allocate)
from PIL import Image

from triptych.errors import TriptychError
from triptych.geometry.files import MESH_SUFFIXES, MeshWarning, ReadLimits, read_mesh, write_mesh
from triptych.geometry.mesh import Material, Mesh

MANY = 50_000_000


def tetrahedron() -> Mesh:
    picture = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Mesh(
        np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32),
        np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [0, 3, 2]]),
        colors=np.full((4, 4), 0.5, np.float32),
        uv=np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32),
        materials=(Material(base_color_texture=picture),),
    )


@pytest.fixture(params=MESH_SUFFIXES)
def valid(request, tmp_path):
    """A good file of each format."""
    return write_mesh(tetrahedron(), tmp_path / f"good{request.param}")[-1]


def refused(path, *words: str, limits: ReadLimits | None = None, peak_mib: float = 8.0) -> str:
    """The sentence with which a file is refused: it names the path, has the words, and costs little memory and time."""
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(TriptychError) as caught:
            read_mesh(path, limits=limits or ReadLimits())
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 600
    assert all(word in message for word in words), message
    assert peak < peak_mib and time.process_time() - start < 3.0
    return message


# --- no such file, not a file, too large -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_missing_empty_and_folder(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    refused(path, "does not exist")
    path.touch()
    refused(path, "0 bytes")
    path.unlink()
    path.mkdir()
    refused(path, "not a file")


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.fbx").write_bytes(b"x")
    refused(tmp_path / "a.fbx", ".fbx", *MESH_SUFFIXES)


def test_too_many_bytes_are_refused_before_they_are_read(tmp_path):
    path = tmp_path / "a.obj"
    with open(path, "wb") as stream:
        stream.truncate(3 << 30)  # sparse: takes no room
    refused(path, "3,072 MiB", "1,024 MiB")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this platform")
def test_a_pipe_does_not_hang_the_reader(tmp_path):
    os.mkfifo(tmp_path / "a.obj")
    refused(tmp_path / "a.obj", "not a file")


# --- damaged bytes ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::triptych.geometry.limits.MeshWarning")
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.8, 0.97])
def test_truncated(valid, share):
    """Cut anywhere, a file is refused; text formats may still hold whole faces, and then those are read."""
    data = valid.read_bytes()
    valid.write_bytes(data[: max(1, int(len(data) * share))])
    if valid.suffix == ".obj":
        try:
            assert 0 < len(read_mesh(valid).faces) < 4
        except TriptychError:
            refused(valid)
    else:
        refused(valid)


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
@pytest.mark.parametrize("kind", ["bytes", "text", "zeros", "newlines", "json", "deep"])
def test_garbage(tmp_path, suffix, kind):
    random = np.random.default_rng(len(kind))
    data = {
        "bytes": random.bytes(5000),
        "text": b"the quick brown fox jumps over the lazy dog " * 99,
        "zeros": bytes(5000),
        "newlines": b"\n" * 5000,
        "json": b'{"asset": {"version": "2.0"}, "scenes": 7, "nodes": "x", "meshes": {}}',
        "deep": b'{"asset":' * 100_000,
    }[kind]
    (tmp_path / f"a{suffix}").write_bytes(data)
    refused(tmp_path / f"a{suffix}")


def test_random_damage_never_ends_in_a_traceback(valid):
    """Property: a file with random bytes changed, removed or doubled is a sound mesh or a TriptychError."""
    data, random, refusals = valid.read_bytes(), np.random.default_rng(7), 0
    rounds = 250
    for _ in range(rounds):
        damaged = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            position = int(random.integers(len(damaged)))
            kind = int(random.integers(4))
            if kind == 0:
                damaged[position] = int(random.integers(256))
            elif kind == 1:
                del damaged[position : position + int(random.integers(1, 9))]
            elif kind == 2:
                damaged[position:position] = damaged[position : position + int(random.integers(1, 40))]
            else:
                damaged[position] = ord(random.choice(list('0123456789-./ \n{}[]",:')))
        valid.write_bytes(bytes(damaged) or b"x")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MeshWarning)
            try:
                mesh = read_mesh(valid)
            except TriptychError as error:
                refusals += 1
                assert "\n" not in str(error)
                continue
        assert len(mesh.faces) and np.isfinite(mesh.vertices).all()
        assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
        if mesh.uv is not None:
            assert mesh.corner_uv().shape == (len(mesh.faces), 3, 2)
        if mesh.face_materials is not None:
            assert len(mesh.face_materials) == len(mesh.faces) and mesh.face_materials.max() < len(mesh.materials)
    assert 0 < refusals <= rounds


# --- bad numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_vertices_that_are_not_finite(tmp_path, suffix, value):
    mesh = tetrahedron()
    vertices = mesh.vertices.copy()
    vertices[2, 1] = value
    with np.errstate(invalid="ignore"):
        path = write_mesh(mesh.replace(vertices=vertices), tmp_path / f"a{suffix}")[-1]
    refused(path, "NaN or infinite")


@pytest.mark.parametrize("suffix", [".obj", ".off", ".ply"])
def test_coordinates_beyond_float32(tmp_path, suffix):
    text = {
        ".obj": "v 0 0 0\nv 1e300 0 0\nv 0 1 0\nf 1 2 3\n",
        ".off": "OFF\n3 1 0\n0 0 0\n1e300 0 0\n0 1 0\n3 0 1 2\n",
        ".ply": ply_header(3, 1, "double") + "0 0 0\n1e300 0 0\n0 1 0\n3 0 1 2\n",
    }[suffix]
    (tmp_path / f"a{suffix}").write_text(text)
    refused(tmp_path / f"a{suffix}", "infinite")


@pytest.mark.parametrize("index", [4, 1000, -1, 2**31 - 1])
@pytest.mark.parametrize("suffix", [".obj", ".ply", ".off", ".glb", ".gltf"])
def test_indices_out_of_range(tmp_path, suffix, index):
    if index < 0 and suffix == ".obj":
        index = -2  # written as index -1, which is relative and fine; -2 + 1 would be too: 0 is what is wrong
    mesh = tetrahedron()
    faces = mesh.faces.copy()
    faces[1, 2] = index if suffix != ".obj" or index > 0 else -1
    # With normals: the glTF writer would make them from the faces.
    broken = Mesh(mesh.vertices, faces, normals=mesh.vertex_normals() if suffix in (".glb", ".gltf") else None)
    refused(write_mesh(broken, tmp_path / f"a{suffix}")[-1], "" if suffix == ".off" else "of 4")


@pytest.mark.parametrize(
    "corner", ["1/9/1", "1/1/9", "1//9", "-9", "1/-9", "99999999999999999999", "1/2/3/4", "x", "1.5"]
)
def test_obj_corners_that_mean_nothing(tmp_path, corner):
    (tmp_path / "a.obj").write_text(f"v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvn 0 0 1\nf {corner} {corner} {corner}\n")
    refused(tmp_path / "a.obj")


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_no_faces(tmp_path, suffix):
    mesh = Mesh(tetrahedron().vertices, np.zeros((0, 3), np.int64))
    refused(write_mesh(mesh, tmp_path / f"a{suffix}")[-1])


def test_a_point_cloud_is_called_one(tmp_path):
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\n")
    refused(tmp_path / "a.obj", "no faces", "points")


# --- declared counts -------------------------------------------------------------------------------------------


def ply_header(vertices: int, faces: int, kind: str = "float", encoding: str = "ascii") -> str:
    return (
        f"ply\nformat {encoding} 1.0\nelement vertex {vertices}\n"
        f"property {kind} x\nproperty {kind} y\nproperty {kind} z\n"
        f"element face {faces}\nproperty list uchar int vertex_indices\nend_header\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(
    ("vertices", "faces"), [(3, MANY), (MANY, 1), (10**30, 1), (3, -1), (15_000_000, 1), (3, 15_000_000)]
)
def test_ply_that_declares_too_much(tmp_path, encoding, vertices, faces):
    (tmp_path / "a.ply").write_bytes(ply_header(vertices, faces, encoding=encoding).encode() + bytes(36))
    count = vertices if vertices != 3 else faces
    message = refused(tmp_path / "a.ply", "declares")
    assert f"{count:,}" in message
    assert ("limit of 20,000,000" in message) == (count > 20_000_000)


def test_ply_list_that_declares_too_much(tmp_path):
    body = struct.pack("<9f", *range(9)) + struct.pack("<I", 2**32 - 1) + bytes(64)
    header = ply_header(3, 1, encoding="binary_little_endian").replace("list uchar", "list uint")
    (tmp_path / "a.ply").write_bytes(header.encode() + body)
    refused(tmp_path / "a.ply", "truncated")


@pytest.mark.parametrize(("vertices", "faces"), [(3, MANY), (MANY, 1), (-3, 1), (10_000_000, 10_000_000)])
def test_off_that_declares_too_much(tmp_path, vertices, faces):
    (tmp_path / "a.off").write_text(f"OFF\n{vertices} {faces} 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    refused(tmp_path / "a.off", "declares")


def test_stl_that_declares_too_much(tmp_path):
    (tmp_path / "a.stl").write_bytes(bytes(80) + struct.pack("<I", MANY) + bytes(50))
    refused(tmp_path / "a.stl", "50,000,000 faces", "limit")
    (tmp_path / "a.stl").write_bytes(bytes(80) + struct.pack("<I", 10_000_000) + bytes(50))
    refused(tmp_path / "a.stl", "10,000,000 faces", "truncated")


def triangle_gltf(**changes) -> dict:
    blob = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
    tree = {
        "asset": {"version": "2.0"},
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36, "uri": "data:;base64," + base64.b64encode(blob).decode()}],
    }
    return tree | changes


def glb(tree: dict, binary: bytes = b"", version: int = 2, length: int | None = None) -> bytes:
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    return struct.pack("<4sII", b"glTF", version, 12 + len(body) if length is None else length) + body


def accessor(**changes) -> list[dict]:
    return [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"} | changes]


GLTF_ATTACKS = {
    "count over the limit": ({"accessors": accessor(count=3 * MANY)}, "50,000,000 faces"),
    "count over the data": ({"accessors": accessor(count=15_000_000)}, "15,000,000"),
    "zeros without data": (
        {"accessors": [{"componentType": 5126, "count": MANY, "type": "VEC3"}]},
        "50,000,000 vertices",
    ),
    "negative count": ({"accessors": accessor(count=-3)}, ""),
    "count as text": ({"accessors": accessor(count="many")}, ""),
    "unknown type": ({"accessors": accessor(type="VEC9")}, ""),
    "offset before the view": ({"accessors": accessor(byteOffset=-12)}, "offset"),
    "offset behind the view": ({"accessors": accessor(byteOffset=4)}, "truncated"),
    "view outside the buffer": ({"bufferViews": [{"buffer": 0, "byteLength": 40}]}, "truncated"),
    "view before the buffer": ({"bufferViews": [{"buffer": 0, "byteOffset": -4, "byteLength": 36}]}, "truncated"),
    "stride of zero width": ({"bufferViews": [{"buffer": 0, "byteLength": 36, "byteStride": 1}]}, "stride"),
    "no such view": ({"accessors": accessor(bufferView=7)}, "bufferViews[7]"),
    "no such mesh": ({"nodes": [{"mesh": -1}]}, "meshes[-1]"),
    "no such node": ({"scenes": [{"nodes": [5]}]}, "nodes[5]"),
    "endless scene": ({"scenes": [{"nodes": [0]}], "nodes": [{"children": [1]}, {"children": [0]}]}, "twice"),
    "no root": ({"nodes": [{"children": [0], "mesh": 0}]}, "no faces"),
    "version 1": ({"asset": {"version": "1.0"}}, "version 1.0"),
    "draco": ({"extensionsRequired": ["KHR_draco_mesh_compression"]}, "KHR_draco_mesh_compression"),
    "buffer of a URL": ({"buffers": [{"byteLength": 36, "uri": "https://example.org/a.bin"}]}, "example.org"),
    "buffer above": ({"buffers": [{"byteLength": 36, "uri": "../a.bin"}]}, "../a.bin"),
    "buffer above, escaped": ({"buffers": [{"byteLength": 36, "uri": "%2e%2e/a.bin"}]}, "outside"),
    "buffer absent": ({"buffers": [{"byteLength": 36, "uri": "b.bin"}]}, "b.bin"),
    "buffer not base64": ({"buffers": [{"byteLength": 36, "uri": "data:;base64,!!!!"}]}, "base64"),
    "no binary chunk": ({"buffers": [{"byteLength": 36}]}, "buffers[0]"),
    "NaN transform": ({"nodes": [{"mesh": 0, "translation": [float("nan"), 0, 0]}]}, "NaN"),
    "matrix too short": ({"nodes": [{"mesh": 0, "matrix": [1, 2, 3]}]}, ""),
}


@pytest.mark.parametrize("name", GLTF_ATTACKS)
def test_gltf_attacks(tmp_path, name):
    changes, word = GLTF_ATTACKS[name]
    (tmp_path / "a.gltf").write_text(json.dumps(triangle_gltf(**changes)))
    # A message may name the buffer file instead of the mesh that names it.
    with pytest.raises(TriptychError) as caught:
        read_mesh(tmp_path / "a.gltf")
    assert word in str(caught.value)
    if "buffer absent" not in name:
        refused(tmp_path / "a.gltf", word)


def test_many_placements_of_one_mesh_are_counted(tmp_path):
    """Amplification: a small file that places one mesh ten thousand times."""
    tree = triangle_gltf(nodes=[{"mesh": 0}] * 10_000)
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    refused(tmp_path / "a.gltf", "limit of 5,000", limits=ReadLimits(max_faces=5000), peak_mib=16)


def test_glb_chunks_that_lie(tmp_path):
    path = tmp_path / "a.glb"
    tree = triangle_gltf()
    path.write_bytes(glb(tree))
    assert len(read_mesh(path).faces) == 1
    for data, word in (
        (glb(tree, version=1), "version 1"),
        (glb(tree, length=2**32 - 1), "truncated"),
        (glb(tree, length=12), "JSON"),
        (glb(tree)[:12] + struct.pack("<I4s", 2**31, b"JSON") + glb(tree)[20:], "declares"),
        (glb(tree)[:19], "truncated"),
        (b"glTF" + bytes(60), "version 0"),
    ):
        path.write_bytes(data)
        refused(path, word)


# --- files that a mesh names -----------------------------------------------------------------------------------


def obj_with_texture(folder, reference: str):
    folder.mkdir(exist_ok=True)
    (folder / "a.mtl").write_text(f"newmtl m\nmap_Kd {reference}\n")
    (folder / "a.obj").write_text("mtllib a.mtl\nv 0 0 0\nv 1 0 0\nv 0 1 0\nusemtl m\nf 1 2 3\n")
    return folder / "a.obj"


def gltf_with_texture(folder, reference: str):
    folder.mkdir(exist_ok=True)
    color = {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}
    primitive = {"attributes": {"POSITION": 0}, "material": 0}
    tree = triangle_gltf(
        meshes=[{"primitives": [primitive]}], materials=[color], textures=[{"source": 0}], images=[{"uri": reference}]
    )
    (folder / "a.gltf").write_text(json.dumps(tree))
    return folder / "a.gltf"


@pytest.mark.parametrize("make", [obj_with_texture, gltf_with_texture])
@pytest.mark.parametrize(
    "reference",
    ["../secret.png", "x/../../secret.png", "..\\secret.png", "C:\\secret.png", "c:secret.png", "\\\\host\\secret.png",
     "https://example.org/secret.png", "file:///secret.png", "~/secret.png", "<absolute>"],
)  # fmt: skip
def test_textures_outside_the_folder_are_refused_and_named(tmp_path, make, reference):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2), "red").save(secret)
    reference = reference.replace("<absolute>", str(secret))
    path = make(tmp_path / "model", reference)
    with pytest.raises(TriptychError) as caught:
        read_mesh(path)
    assert "secret.png" in str(caught.value) and "relative path" in str(caught.value)


@pytest.mark.parametrize("make", [obj_with_texture, gltf_with_texture])
def test_links_that_lead_outside_are_refused(tmp_path, make):
    Image.new("RGB", (2, 2), "red").save(tmp_path / "secret.png")
    path = make(tmp_path / "model", "t.png")
    try:
        (path.parent / "t.png").symlink_to(tmp_path / "secret.png")
    except OSError:
        pytest.skip("this platform lets us make no links")
    with pytest.raises(TriptychError, match=r"t\.png.*outside its folder"):
        read_mesh(path)
    (path.parent / "t.png").unlink()
    (path.parent / "t.png").symlink_to("t.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", MeshWarning)
        with pytest.raises((TriptychError, MeshWarning), match=r"t\.png"):
            read_mesh(path)


def test_a_material_library_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "secret.mtl").write_text("newmtl m\n")
    path = obj_with_texture(tmp_path / "model", "t.png")
    path.write_text(path.read_text().replace("a.mtl", "../secret.mtl"))
    refused(path, "../secret.mtl", "outside")


@pytest.mark.parametrize("make", [obj_with_texture, gltf_with_texture])
def test_textures_with_too_many_pixels_are_not_decoded(tmp_path, make):
    path = make(tmp_path / "model", "t.png")
    Image.new("1", (12_000, 9_000)).save(path.parent / "t.png")  # 108 megapixels in a few kilobytes
    tracemalloc.start()
    with pytest.raises(TriptychError, match="12000 x 9000 pixels, over the limit of 64,000,000"):
        read_mesh(path)
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()
    Image.new("1", (20_000, 20_000)).save(path.parent / "t.png")  # beyond what Pillow itself refuses
    with pytest.raises(TriptychError, match="pixels, over the limit"):
        read_mesh(path)


def test_limits_apply_to_sound_files(valid):
    assert len(read_mesh(valid).faces) == 4
    refused(valid, "limit of 3", limits=ReadLimits(max_faces=3))
    refused(valid, "over the limit", limits=ReadLimits(max_bytes=10))
