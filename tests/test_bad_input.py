"""Bad input gets one clear sentence, a non-zero exit, and nothing new on the disk.

Meshes that break the rules are in test_mesh_attacks.py. Every test here calls the command line as a user would.
"""

import builtins
import errno
import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_bundle import make_tiny_bundle

from triptych.bundles.manifest import file_sha256
from triptych.cli import main
from triptych.geometry.mesh import Material, Mesh


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "bundle"
    make_tiny_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A red block on white."""
    file = tmp_path_factory.mktemp("pictures") / "block.png"
    image = Image.new("RGB", (120, 150), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 100, 130), fill=(190, 40, 40))
    image.save(file)
    return file


@pytest.fixture
def quick(monkeypatch):
    """A reconstruction that is there at once, for what comes after it."""
    from triptych.pipelines import reconstruct

    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]], np.int64)
    paint = Material("paint", base_color_texture=np.full((8, 8, 3), 90, np.uint8))
    mesh = Mesh(corners, faces, uv=corners[:, :2].copy(), materials=(paint,))
    settings = reconstruct.Settings(steps=1, guidance=0.0)
    made = reconstruct.Reconstruction(mesh, np.zeros((1, 1, 1), np.float32), {}, (), settings)
    monkeypatch.setattr(reconstruct, "mesh_from_views", lambda *_, **__: made)


def tree(folder):
    """Every path below a folder, with what the files hold."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(capsys, folder, *argv):
    """The one sentence of a command that must fail and change nothing in ``folder``."""
    before = tree(folder)
    capsys.readouterr()
    code = main([str(word) for word in argv])
    stdout, stderr = capsys.readouterr()
    assert (code, stdout) == (1, "")
    assert tree(folder) == before
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    return stderr.removeprefix("error: ").rstrip("\n")


# Pictures ----------------------------------------------------------------------------------------------------------


def huge_png():
    """A PNG of some sixty bytes that declares 10,000 x 10,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def png(image):
    def write(file):
        image.save(file, format="PNG")

    return write


BAD_PICTURES = {
    "not an image": (lambda file: file.write_text("a letter to my bank"), r"is not a picture that can be read"),
    "0 bytes": (lambda file: file.write_bytes(b""), r"is empty \(0 bytes\)"),
    "100 megapixels": (lambda file: file.write_bytes(huge_png()), r"has 100 megapixels, over the limit of 64"),
    "truncated": (lambda file: file.write_bytes(huge_png()[:20]), r"not a picture that can be read"),
    "fully transparent": (png(Image.new("RGBA", (64, 64), (9, 9, 9, 0))), "the front view is fully transparent"),
    "plain white": (png(Image.new("RGB", (64, 64), "white")), "no object was found in the front view"),
    "missing": (lambda file: None, "there is no picture file"),
    "a folder": (lambda file: file.mkdir(), "is a folder, not a picture"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
@pytest.mark.parametrize("command", ["views", "demo"])
def test_a_bad_picture(case, command, bundle, tmp_path, capsys):
    write, sentence = BAD_PICTURES[case]
    file = tmp_path / "picture.png"
    write(file)
    said = refused(capsys, tmp_path, command, file, "-o", tmp_path / "made" / "here", "--bundle", bundle)
    assert re.search(sentence, said)
    assert "the front view" in said or str(file) in said


def test_a_bad_picture_among_good_ones_is_named(bundle, picture, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    Image.new("RGB", (64, 64), "white").save(bad)
    said = refused(capsys, tmp_path, "views", picture, picture, bad, "-o", tmp_path / "x.obj", "--bundle", bundle)
    assert "the back view" in said


def test_five_pictures(bundle, picture, tmp_path, capsys):
    said = refused(capsys, tmp_path, "views", *[picture] * 5, "-o", tmp_path / "x.obj", "--bundle", bundle)
    assert said == "5 pictures were given, at most 4 can be used (front, left, back, right): leave some out"


def test_a_sheet_that_does_not_divide(bundle, tmp_path, capsys):
    Image.new("RGB", (101, 64), "white").save(tmp_path / "sheet.png")
    sheet = tmp_path / "sheet.png"
    said = refused(capsys, tmp_path, "views", "--sheet", sheet, "-o", tmp_path / "x.obj", "--bundle", bundle)
    assert "even sides, got 101 x 64 pixels" in said


def test_views_of_different_sizes_are_fine(quick, bundle, picture, tmp_path, capsys):
    with Image.open(picture) as image:
        image.resize((431, 577)).save(tmp_path / "left.png")
    words = ["views", picture, tmp_path / "left.png", "-o", tmp_path / "x.obj", "--bundle", bundle]
    assert main([str(word) for word in words]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert list(summary["views"]) == ["front", "left"] and summary["warnings"] == []


# Bundles -----------------------------------------------------------------------------------------------------------


def edit(folder, change, sign=None):
    """Changes the manifest's JSON; ``sign`` names a component whose hash and size are set to its file's."""
    path = folder / "bundle.json"
    data = json.loads(path.read_text())
    change(data)
    if sign:
        component = data["components"][sign]
        file = folder / component["file"]
        component.update(sha256=file_sha256(file), bytes=file.stat().st_size)
    path.write_text(json.dumps(data))


def part(data):
    return data["components"]["structure_decoder"]


def flip_last_byte(folder):
    file = folder / "structure_decoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(folder, sign=None):
    file = folder / "structure_decoder.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    edit(folder, lambda data: None, sign)


def rename(folder):
    (folder / "structure_decoder.safetensors").rename(folder / "decoder.safetensors")


def swap(folder):
    first, second = (folder / f"structure_{name}.safetensors" for name in ("flow", "decoder"))
    shutil.copy(second, first)


def other_shape_in_manifest(data):
    part(data)["tensors"]["out_layer.2.bias"][1] = [2]


BAD_BUNDLES = {
    "missing file": (
        lambda folder: (folder / "structure_flow.safetensors").unlink(), r"structure_flow\.safetensors is missing"),
    "truncated file": (truncate, r"structure_decoder\.safetensors has [\d,]+ bytes instead of [\d,]+"),
    "truncated file, signed": (
        lambda folder: truncate(folder, "structure_decoder"), r"decoder\.safetensors is not a whole safetensors"),
    "renamed file": (rename, r"structure_decoder\.safetensors is missing"),
    "one file under another's name": (swap, r"structure_flow\.safetensors has [\d,]+ bytes instead of"),
    "tampered file": (flip_last_byte, r"structure_decoder\.safetensors was changed \(sha256 "),
    "wrong shape in the manifest": (
        lambda folder: edit(folder, other_shape_in_manifest),
        r"tensor out_layer\.2\.bias is \['float32', \[1\]\], the manifest says \['float32', \[2\]\]"),
    "wrong shape for the network": (
        lambda folder: edit(folder, lambda data: part(data)["config"].update(channels=[16, 8, 6])),
        r"structure_decoder\.safetensors: tensor \S+ is \[.*\], SparseStructureDecoder needs \["),
    "tensors of another network": (
        lambda folder: edit(folder, lambda data: part(data)["config"].update(num_res_blocks_middle=2)),
        r"lacks tensor middle_block\.1\.\S+ and \d+ more"),
    "unknown class": (
        lambda folder: edit(folder, lambda data: part(data).update(class_name="os.system")), r"class 'os\.system'"),
    "config that the class does not take": (
        lambda folder: edit(folder, lambda data: part(data)["config"].update(colour="red")), r"does not fit .*colour"),
    "file outside of the folder": (
        lambda folder: edit(folder, lambda data: part(data).update(file="../bundle/structure_decoder.safetensors")),
        r"outside of its folder"),
    "component left out": (
        lambda folder: edit(folder, lambda data: data["components"].pop("structure_decoder")),
        r"has no 'structure_decoder', only structure_flow"),
    "newer format": (
        lambda folder: edit(folder, lambda data: data.update(format=99)), r"has format 99, .*update Triptych"),
    "manifest that is no JSON": (
        lambda folder: (folder / "bundle.json").write_bytes(b"\x80PK garbage"), r"bundle\.json is damaged"),
    "manifest that is a list": (lambda folder: (folder / "bundle.json").write_text("[]"), r"bundle\.json is damaged"),
    "manifest without a name": (
        lambda folder: edit(folder, lambda data: data.pop("name")), r"bundle\.json is damaged \(.*name"),
    "manifest with a strange field": (
        lambda folder: edit(folder, lambda data: data.update(run="rm")), r"bundle\.json is damaged \(.*run"),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), r"no bundle .* found \(looked at "),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_a_bad_bundle(case, bundle, picture, tmp_path, capsys):
    spoil, sentence = BAD_BUNDLES[case]
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    spoil(folder)
    said = refused(capsys, tmp_path, "views", picture, "-o", tmp_path / "out" / "x.obj", "--bundle", folder)
    assert re.search(sentence, said)


# Where the results go -------------------------------------------------------------------------------------------------


def test_a_file_where_the_output_folder_should_be(bundle, picture, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken" / "x.obj", tmp_path / "taken" / "deeper" / "x.obj"):
        said = refused(capsys, tmp_path, "views", picture, "-o", out, "--bundle", bundle)
        assert said == f"{tmp_path / 'taken'} is a file where a folder is needed: choose another output folder"
    said = refused(capsys, tmp_path, "demo", picture, "-o", tmp_path / "taken", "--bundle", bundle)
    assert said.startswith(f"{tmp_path / 'taken'} is a file where a folder is needed")


def test_an_output_folder_that_may_not_be_written(monkeypatch, bundle, picture, tmp_path, capsys):
    # A denied mkdir stands for a folder without permission: tests may run as root, whom nothing is denied.
    def denied(path, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", denied)
    said = refused(capsys, tmp_path, "views", picture, "-o", tmp_path / "new" / "x.obj", "--bundle", bundle)
    assert said.startswith(f"cannot write into {tmp_path / 'new'} (Permission denied)")
    said = refused(capsys, tmp_path, "views", picture, "-o", tmp_path / "x.obj", "--bundle", bundle)
    assert said.startswith(f"cannot write into {tmp_path} (Permission denied)")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at(monkeypatch, owner, name, turn):
    """Lets ``owner.name`` work until its ``turn``-th call (1 is the first), which finds the disk full."""
    real, calls = getattr(owner, name), iter(range(1, 10_000))
    monkeypatch.setattr(owner, name, lambda *a, **k: full() if next(calls) == turn else real(*a, **k))


WRITES = [(os, "fsync", turn) for turn in (1, 3, 4)] + [(os, "replace", turn) for turn in (1, 6, 9, 11)]


@pytest.mark.parametrize(("owner", "name", "turn"), WRITES, ids=lambda value: str(getattr(value, "__name__", value)))
def test_a_full_disk(owner, name, turn, quick, monkeypatch, bundle, picture, tmp_path, capsys):
    fail_at(monkeypatch, owner, name, turn)
    out = tmp_path / "new" / "out"
    said = refused(capsys, tmp_path, "demo", picture, "-o", out, "--bundle", bundle, "--device", "cpu")
    assert said == f"cannot write into {out} (No space left on device): choose another output folder or free some space"


def test_a_full_disk_in_the_middle_of_a_file(quick, monkeypatch, bundle, picture, tmp_path, capsys):
    real = builtins.open

    class Full:
        """A file that takes the first kilobyte."""

        def __init__(self, stream):
            self.stream, self.left = stream, 1024

        def write(self, content):
            self.stream.write(bytes(content)[: self.left])
            self.left -= len(content)
            return len(content) if self.left >= 0 else full()

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

    def opened(file, mode="r", *rest, **named):
        stream = real(file, mode, *rest, **named)
        return Full(stream) if "x" in mode and str(file).endswith(".part") else stream

    monkeypatch.setattr(builtins, "open", opened)
    said = refused(capsys, tmp_path, "views", picture, "-o", tmp_path / "x.glb", "--bundle", bundle)
    assert "(No space left on device)" in said


def test_a_full_disk_leaves_what_was_there(quick, monkeypatch, bundle, picture, tmp_path, capsys):
    (tmp_path / "x.obj").write_text("an older mesh")
    (tmp_path / "x.mtl").write_text("its material")
    fail_at(monkeypatch, os, "fsync", 2)
    refused(capsys, tmp_path, "views", picture, "-o", tmp_path / "x.obj", "--bundle", bundle, "--overwrite")


def test_a_summary_that_cannot_be_written(quick, bundle, picture, tmp_path, capsys):
    (tmp_path / "taken").write_text("mine")
    words = ["views", picture, "-o", tmp_path / "x.obj", "--bundle", bundle]
    said = refused(capsys, tmp_path, *words, "--json", tmp_path / "taken" / "summary.json")
    assert "summary.json" in said


@pytest.mark.parametrize("command", [["convert"], ["render", "-o"]], ids=" ".join)
def test_the_other_writers_meet_a_full_disk(command, monkeypatch, tmp_path, capsys):
    source = tmp_path / "a.off"
    source.write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    fail_at(monkeypatch, os, "fsync", 1)
    target = tmp_path / "new" / ("x.glb" if command == ["convert"] else "x.png")
    said = refused(capsys, tmp_path, command[0], source, *command[1:], target)
    assert said.startswith(f"cannot write into {tmp_path / 'new'} (No space left on device)")
