"""Preparation: which objects are found, what is dropped and why, and that no accident loses or changes anything."""

import argparse
import base64
import errno
import io
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import prepare_faults
import pytest
from PIL import Image
from safetensors.numpy import load_file

from trainer.data import PreparedData
from trainer.prepare import build as build_module
from trainer.prepare import report as report_module
from trainer.prepare import run as run_module
from trainer.prepare import shards as shards_module
from trainer.prepare.build import BuildOptions, framed, geometry_hash, open_edge_share
from trainer.prepare.gates import Gates
from trainer.prepare.run import add_arguments, build_all, main, plan, prepare
from trainer.prepare.shards import read_records, split_of
from trainer.prepare.sources import Source, find_sources
from trainer.prepare.workers import Job
from trainer.runs import run_lock
from triptych.errors import TriptychError
from triptych.geometry.files import write_mesh
from triptych.geometry.mesh import Mesh

# A bar thinner than a voxel becomes one or two voxels thick: up to 64 of them at this resolution.
SMALL = BuildOptions(resolution=16, view_size=16, yaws=1, gates=Gates(min_inside_voxels=100))
BOX_FACES = np.array([[0, 2, 1], [0, 3, 2], [4, 5, 6], [4, 6, 7], [0, 1, 5], [0, 5, 4],
                      [2, 3, 7], [2, 7, 6], [1, 2, 6], [1, 6, 5], [0, 4, 7], [0, 7, 3]])  # fmt: skip


def box(x=1.0, y=1.0, z=1.0):
    corners = [(i, j, k) for k in (0, z) for i, j in ((0, 0), (x, 0), (x, y), (0, y))]
    return Mesh(np.array(corners, np.float32), BOX_FACES)


def write_boxes(folder, count, suffix=".ply"):
    for i in range(count):
        write_mesh(box(1, 0.3 + 0.02 * i, 0.5), folder / f"box_{i:02d}{suffix}")
    return folder


def prepared(folder, out, options=SMALL, **kwargs):
    return prepare(find_sources([folder]), out, options, workers=0, **kwargs)


def index_of(out):
    return json.loads((out / "index.json").read_text(encoding="utf-8"))


def by_name(out):
    return {record["name"]: record for record in index_of(out)["records"]}


def arrays_of(out):
    return {path.name: load_file(path) for path in sorted((out / "shards").glob("*.safetensors"))}


def assert_same_preparation(a, b):
    assert index_of(a) == index_of(b)
    first, second = arrays_of(a), arrays_of(b)
    assert first.keys() == second.keys()
    for shard, arrays in first.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, second[shard][name])


# Layouts


def test_shapenet_modelnet_and_objaverse_trees(tmp_path):
    for place in (
        "ShapeNetCore/03001627/1a2b/models/model_normalized.obj",
        "ModelNet40/chair/train/chair_0001.off",
        "ModelNet40/chair/test/chair_0890.OFF",
        "objaverse/glbs/000-001/0f1e.glb",
        "mine/pots/old pot.stl",
        "mine/top.ply",
    ):
        written = tmp_path / Path(place).with_suffix(Path(place).suffix.lower())
        written.parent.mkdir(parents=True, exist_ok=True)
        write_mesh(box(), written)
        written.rename(tmp_path / place)
    (tmp_path / "mine" / "notes.txt").write_text("no mesh")
    found = find_sources([tmp_path / name for name in ("ShapeNetCore", "ModelNet40", "objaverse", "mine")])
    assert [(s.key, s.name, s.category, s.frame) for s in found] == [
        ("ModelNet40/chair/test/chair_0890.OFF", "chair_0890", "chair", ("+z", "-y")),
        ("ModelNet40/chair/train/chair_0001.off", "chair_0001", "chair", ("+z", "-y")),
        ("ShapeNetCore/03001627/1a2b/models/model_normalized.obj", "1a2b", "chair", ("+y", "-z")),
        ("mine/pots/old pot.stl", "old pot", "pots", ("+y", "+z")),
        ("mine/top.ply", "top", "", ("+y", "+z")),
        ("objaverse/glbs/000-001/0f1e.glb", "0f1e", "", ("+y", "+z")),
    ]
    assert {s.frame for s in find_sources([tmp_path / "mine"], up="+z", front="-x")} == {("+z", "-x")}


@pytest.mark.parametrize("folder", ["03001627", "chair", "glbs"])
def test_a_layout_is_known_from_a_folder_inside_it_too(tmp_path, folder):
    place = {"03001627": "1a2b/models/model_normalized.obj", "chair": "train/chair_0001.off", "glbs": "000-001/0f.glb"}
    (tmp_path / folder / place[folder]).parent.mkdir(parents=True)
    write_mesh(box(), tmp_path / folder / place[folder])
    assert find_sources([tmp_path / folder])[0].category == {"03001627": "chair", "chair": "chair", "glbs": ""}[folder]


def test_an_index_names_splits_licences_and_authors(tmp_path):
    write_mesh(box(), tmp_path / "a.glb")
    (tmp_path / "index.csv").write_text(
        "id,split,file,name,category,licence,attribution\n"
        'a,train,a.glb,Crate,prop,CC-BY-4.0,"Ann, of Example"\nb,eval,b.glb,Hidden,prop,,\nc,train,gone.glb,,,,\n'
    )
    first, second = find_sources([tmp_path])
    assert first == Source("a", tmp_path / "a.glb", "Crate", "prop", "CC-BY-4.0", "Ann, of Example")
    assert (second.key, second.name) == ("c", "c")
    assert [s.key for s in find_sources([tmp_path], ("eval",))] == ["b"]
    prepared(tmp_path, tmp_path / "out")
    assert by_name(tmp_path / "out")["c"]["reason"] == "gone.glb does not exist: check the spelling and the folder"


@pytest.mark.parametrize("up, front", [("+z", "-y"), ("+y", "-z"), ("-x", "+z"), ("+z", "+x")])
def test_a_files_frame_is_turned_into_ours(up, front):
    def vector(axis):
        return np.eye(3)["xyz".index(axis[1])] * (-1 if axis[0] == "-" else 1)

    marks = np.stack([vector(up), vector(front), np.cross(vector(up), vector(front))]).astype(np.float32)
    turned = framed(Mesh(marks, np.array([[0, 1, 2]]), normals=marks), (up, front))
    np.testing.assert_array_equal(turned.vertices, [[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    np.testing.assert_array_equal(turned.normals, turned.vertices)


def test_every_format_gives_the_same_solid(tmp_path):
    for suffix in (".obj", ".ply", ".stl", ".off", ".glb", ".gltf"):
        write_mesh(box(1, 0.5, 0.7), tmp_path / "in" / f"box{suffix}")
    prepared(tmp_path / "in", tmp_path / "out")
    records = index_of(tmp_path / "out")["records"]
    assert len({r["geometry_hash"] for r in records}) == 1
    assert [r["reason"] for r in records] == [None] + ["the same geometry as in/box.glb"] * 5
    [arrays] = arrays_of(tmp_path / "out").values()
    assert len(arrays["sdf"]) == 6
    np.testing.assert_array_equal(arrays["sdf"], np.broadcast_to(arrays["sdf"][:1], arrays["sdf"].shape))


def test_sources_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    for text, said in (
        ("id,file\nx,x.glb\n", "lacks the columns"),
        ("id,split,file\nx,train,../x.glb\n", "outside its folder"),
        ("id,split,file\nx,train,..\\x.glb\n", "outside its folder"),
        ("id,split,file\nx,train,/etc/x.glb\n", "outside its folder"),
        ("id,split,file\nx,train,C:\\x.glb\n", "outside its folder"),
        ("id,split,file\nx,eval,x.glb\n", "its splits: eval"),
        ("id,split,file\nx,train,x.glb\nx,train,y.glb\n", "same key 'x'"),
    ):
        (tmp_path / "index.csv").write_text(text)
        with pytest.raises(TriptychError, match=re.escape(said)):
            find_sources([tmp_path])
    (tmp_path / "index.csv").write_bytes(b"id,split,file\n\xff\xfe,train,x\n")
    with pytest.raises(TriptychError, match="UTF-8"):
        find_sources([tmp_path])
    (tmp_path / "index.csv").unlink()
    with pytest.raises(TriptychError, match="holds no mesh file"):
        find_sources([tmp_path])
    with pytest.raises(TriptychError, match="is not a folder"):
        find_sources([tmp_path / "absent"])
    for parent in ("a", "b"):
        write_boxes(tmp_path / parent / "set", 1)
    with pytest.raises(TriptychError, match=r"same key 'set/box_00\.ply': rename"):
        find_sources([tmp_path / "a" / "set", tmp_path / "b" / "set"])
    assert len(find_sources([tmp_path / "a" / "set"] * 2)) == 1
    with pytest.raises(TriptychError, match="make no frame"):
        find_sources([tmp_path / "a"], up="+z")

    real = os.scandir

    def guarded(path):
        if Path(path).name == "set":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(TriptychError, match="set cannot be read .Permission denied.: mend its permissions"):
        find_sources([tmp_path / "a"])


@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
def test_a_link_that_leads_back_is_walked_once(tmp_path):
    write_boxes(tmp_path / "in", 1)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in", target_is_directory=True)
    assert [s.key for s in find_sources([tmp_path / "in"])] == ["in/box_00.ply"]


# Gates

BAD = {
    "empty": ("empty", "is empty (0 bytes)"),
    "points": ("empty", "no faces"),
    "torn": ("broken", "torn.stl"),
    "nan": ("non-finite", "NaN or infinite"),
    "flat": ("flat", "a flat sheet: the smallest side is 0.0e+00"),
    "dot": ("degenerate", "no extent"),
    "slivers": ("degenerate", "75% of the triangles have no area"),
    "few": ("faces", "2 triangles, fewer than 4"),
    "needle": ("thin", "voxels inside: too thin to learn from"),
    "twin": ("duplicate", "the same geometry as in/good.ply"),
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with one good object, one open one, and one of each bad kind; prepared once."""
    root = tmp_path_factory.mktemp("mixed")
    folder = root / "in"
    good = box(1, 0.6, 0.8)
    write_mesh(good, folder / "good.ply")
    write_mesh(good, folder / "twin.off")
    write_mesh(box(1, 0.7, 0.9).replace(faces=BOX_FACES[2:]), folder / "hole.ply")
    (folder / "empty.obj").write_bytes(b"")
    (folder / "points.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\n")
    (folder / "nan.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    write_mesh(box(), folder / "torn.stl")
    (folder / "torn.stl").write_bytes((folder / "torn.stl").read_bytes()[:-30])
    write_mesh(box(1, 1, 0), folder / "flat.ply")
    write_mesh(box(0, 0, 0), folder / "dot.ply")
    write_mesh(box(1, 1, 1).replace(faces=np.concatenate([BOX_FACES, np.zeros((36, 3), int)])), folder / "slivers.ply")
    write_mesh(box(1, 1, 0.9).replace(faces=np.array([[0, 1, 2], [4, 5, 6]])), folder / "few.ply")
    write_mesh(box(1, 0.01, 0.01), folder / "needle.ply")
    return folder, root / "out", prepared(folder, root / "out")


@pytest.mark.parametrize("name", BAD)
def test_every_gate_says_why(mixed, name):
    _, out, _ = mixed
    record = by_name(out)[name]
    gate, said = BAD[name]
    assert (record["status"], record["gate"]) == ("dropped", gate)
    assert said in record["reason"]
    assert str(out.parent) not in json.dumps(record), "the index travels: no paths of this machine"


def test_what_passes_passes(mixed):
    _, out, summary = mixed
    records = by_name(out)
    assert records["good"]["status"] == "ok" and records["good"]["flags"] == []
    assert (records["hole"]["flags"], records["hole"]["open_edges"]) == ([], round(4 / 17, 4)), "below flag_open"
    assert (summary["objects"], summary["dropped"]) == (2, len(BAD))
    assert summary["dropped_by_gate"] == {
        gate: sum(g == gate for g, _ in BAD.values()) for gate in {g for g, _ in BAD.values()}
    }


def test_thresholds_are_asked_anew_without_building(mixed, tmp_path):
    folder, _, _ = mixed
    out = tmp_path / "out"
    prepared(folder, out)
    share = by_name(out)["hole"]["open_edges"]
    strict = replace(SMALL, gates=replace(SMALL.gates, drop_open=share - 0.01, flag_open=0.05))
    summary = prepared(folder, out, strict)
    assert summary["built"] == 0
    assert by_name(out)["hole"]["gate"] == "open"
    assert by_name(out)["hole"]["reason"] == f"open: {share:.0%} of the edges belong to one triangle"
    summary = prepared(folder, out, replace(SMALL, gates=replace(SMALL.gates, flag_open=0.05)))
    assert (summary["built"], summary["flagged"]) == (0, 1)
    # A dropped object has no arrays, so one that passes now is built.
    summary = prepared(folder, out, replace(SMALL, gates=replace(SMALL.gates, min_faces=2)))
    assert summary["built"] == 1
    assert by_name(out)["few"]["gate"] != "faces"


def test_too_many_triangles(tmp_path):
    write_boxes(tmp_path / "in", 2)
    prepared(tmp_path / "in", tmp_path / "out", replace(SMALL, gates=Gates(max_faces=11)))
    assert {r["reason"] for r in by_name(tmp_path / "out").values()} == {
        "12 triangles, more than 11: decimate it first"
    }
    assert prepared(tmp_path / "in", tmp_path / "out")["objects"] == 2


def test_the_geometry_hash_sees_shape_only():
    mesh = box(1, 0.5, 0.7).normalized()
    order = np.random.default_rng(0).permutation(8)
    shuffled = Mesh(mesh.vertices[order], np.argsort(order)[mesh.faces][::-1][:, [1, 2, 0]])
    assert geometry_hash(shuffled) == geometry_hash(mesh)
    assert geometry_hash(box(1, 0.5, 0.71).normalized()) != geometry_hash(mesh)


def test_open_edges_are_counted_after_merging():
    closed = box()
    soup = Mesh(closed.vertices[closed.faces].reshape(-1, 3), np.arange(36).reshape(12, 3))
    assert open_edge_share(closed) == open_edge_share(soup) == 0
    assert open_edge_share(closed.replace(faces=BOX_FACES[2:])) == pytest.approx(4 / 17)


# Accidents


def test_broken_files_never_stop_a_run(tmp_path):
    rng = np.random.default_rng(3)
    folder = write_boxes(tmp_path / "in", 1)
    for suffix in (".obj", ".ply", ".stl", ".off", ".glb", ".gltf"):
        [*_, path] = write_mesh(box(1, 0.4, 0.6), tmp_path / f"whole{suffix}")
        whole = path.read_bytes()
        for i in range(6):
            data = bytearray(whole[: int(len(whole) * rng.uniform(0.2, 1))] if i % 2 else whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            (folder / f"bad_{i}{suffix}").write_bytes(data)
    summary = prepared(folder, tmp_path / "out")
    records = index_of(tmp_path / "out")["records"]
    assert len(records) == 37 == summary["objects"] + summary["dropped"]
    assert all(bool(r["reason"]) == (r["status"] == "dropped") for r in records)
    assert not [r["reason"] for r in records if r["gate"] == "error"]


def test_a_bug_of_ours_drops_the_object_and_names_the_place(tmp_path, monkeypatch):
    write_boxes(tmp_path / "in", 3)
    real = build_module.solid_sdf

    def sometimes(mesh, *args):
        if mesh.bounds[1, 1] > 0.165:
            raise IndexError("index 7 is out of bounds")
        if mesh.bounds[1, 1] > 0.155:
            raise TriptychError("the mesh needs 9,000,000 surface samples")
        return real(mesh, *args)

    monkeypatch.setattr(build_module, "solid_sdf", sometimes)
    prepared(tmp_path / "in", tmp_path / "out")
    records = by_name(tmp_path / "out")
    assert records["box_02"]["gate"] == "error"
    assert re.fullmatch(r"IndexError at test_prepare\.py:\d+: index 7 is out of bounds", records["box_02"]["reason"])
    assert records["box_01"]["gate"] == "solid"
    assert records["box_00"]["status"] == "ok"
    monkeypatch.setattr(build_module, "solid_sdf", real)
    assert prepared(tmp_path / "in", tmp_path / "out")["objects"] == 1, "not tried again unless asked"
    assert prepared(tmp_path / "in", tmp_path / "out", retry=True)["objects"] == 3


def test_a_stopped_preparation_resumed_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "OBJECTS_A_SHARD", 3)
    folder = write_boxes(tmp_path / "in", 8)
    prepared(folder, tmp_path / "whole")
    real = run_module.build_object
    stopped = tmp_path / "stopped"
    for fatal in ("box_04.ply", "box_07.ply"):  # within the second shard, then within the third

        def build(source, options, fatal=fatal):
            if source.path.name == fatal:
                raise KeyboardInterrupt
            return real(source, options)

        monkeypatch.setattr(run_module, "build_object", build)
        with pytest.raises(KeyboardInterrupt):
            prepared(folder, stopped)
        # With several workers shards end in any order: the first may be the one that is missing.
        (stopped / "shards" / "shard_00000.json").unlink()
        (stopped / "shards" / "shard_00001.json.123.part").write_text("{")
    monkeypatch.setattr(run_module, "build_object", real)
    assert prepared(folder, stopped)["built"] == 5
    assert_same_preparation(tmp_path / "whole", stopped)
    assert not list(stopped.rglob("*.part"))
    assert prepared(folder, stopped)["built"] == 0
    assert_same_preparation(tmp_path / "whole", stopped)


@pytest.mark.slow
def test_the_command_killed_outright_and_run_again_equals_an_uninterrupted_one(tmp_path):
    folder = write_boxes(tmp_path / "in", 60)
    out = tmp_path / "killed"
    small = ["--resolution", "16", "--view-size", "16", "--yaws", "1", "--workers", "2"]
    command = [sys.executable, "-m", "trainer", "prepare", str(folder), "--out", str(out), *small]
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 200
        while not list((out / "shards").glob("shard_*.json")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert not (out / "index.json").exists(), "it was killed too late to prove anything"
    prepared(folder, out)
    prepared(folder, tmp_path / "whole")
    assert_same_preparation(tmp_path / "whole", out)


def fault_jobs(folder, *groups):
    return [
        Job(f"shard_{i:05d}", [Source(f"{i}/{name}", folder, name) for name in group]) for i, group in enumerate(groups)
    ]


def test_workers_that_die_or_hang_cost_their_object_only(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    jobs = fault_jobs(tmp_path, ["a", "kills", "b"], ["hangs", "c"], ["kills once", "d"])
    further = iter(["shard_00003", "shard_00004"])
    build_all(jobs, shards, prepare_faults.build, 2, Gates(max_seconds=4), lambda: next(further))
    records = {r["name"]: r for r in read_records(shards)}
    assert {name: r["gate"] for name, r in records.items()} == {
        "a": None, "b": None, "c": None, "d": None, "kills once": None, "kills": "killed", "hangs": "time"
    }  # fmt: skip
    assert records["kills"]["reason"].startswith("its worker was killed 2 times")
    assert records["hangs"]["reason"].startswith("took longer than 4 s")
    for record in records.values():
        arrays = load_file(shards / f"{record['shard']}.safetensors") if record["rows"] else {}
        assert [arrays["sdf"][row].item() for row in record["rows"]] == (
            [len(record["key"])] if not record["gate"] else []
        )
    assert os.getpid() not in {r.get("pid") for r in records.values()}
    assert json.loads((tmp_path / "deaths.json").read_text()) == {}
    sources = [s for job in jobs for s in job.sources if records[s.name]["gate"]]
    stored = [r | {"file_bytes": tmp_path.stat().st_size, "file_mtime_ns": None} for r in records.values()]
    assert plan(sources, stored, Gates(max_seconds=4))[0] == []
    assert [s.name for s in plan(sources, stored, Gates(max_seconds=9))[0][0].sources] == ["hangs"]
    assert len(plan(sources, stored, Gates(max_seconds=4), retry=True)[0][0].sources) == 2


def test_deaths_are_remembered_by_the_next_preparation(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (tmp_path / "deaths.json").write_text(json.dumps({"0/a": 2, "0/kills": 1}))
    jobs = fault_jobs(tmp_path, ["a", "kills"])
    further = iter(["shard_00003", "shard_00004"])
    build_all(jobs, shards, prepare_faults.build, 1, Gates(), lambda: next(further))
    assert {r["name"]: r["gate"] for r in read_records(shards)} == {"a": "killed", "kills": "killed"}


def test_a_worker_that_cannot_write_ends_the_run_with_a_sentence(tmp_path):
    jobs = fault_jobs(tmp_path, ["a"])
    with pytest.raises(TriptychError, match="cannot write .*free some space or mend the folder"):
        build_all(jobs, tmp_path / "absent", prepare_faults.build, 1, Gates(), lambda: "shard_00001")


@pytest.mark.parametrize("where", ["save_file", "fsync"])
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch, where):
    monkeypatch.setattr(run_module, "OBJECTS_A_SHARD", 2)
    folder = write_boxes(tmp_path / "in", 5)
    prepared(folder, tmp_path / "whole")
    holder = shards_module if where == "save_file" else os
    real, calls = getattr(holder, where), []

    def full(*args):
        calls.append(args)
        if len(calls) > (1 if where == "save_file" else 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(holder, where, full)
    with pytest.raises(TriptychError, match="No space left on device.*what is finished is kept"):
        prepared(folder, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full" / "shards").iterdir() if "part" in p.name] == []
    monkeypatch.setattr(holder, where, real)
    assert prepared(folder, tmp_path / "full")["built"] == 3
    assert_same_preparation(tmp_path / "whole", tmp_path / "full")


def test_changed_files_are_built_again_and_touched_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "OBJECTS_A_SHARD", 2)
    folder, out = write_boxes(tmp_path / "in", 4), tmp_path / "out"
    prepared(folder, out)
    before = by_name(out)
    os.utime(folder / "box_00.ply", ns=(1, 1))
    write_mesh(box(1, 0.9, 0.5), folder / "box_01.ply")  # as many bytes as before
    assert (folder / "box_01.ply").stat().st_size == before["box_01"]["file_bytes"]
    (folder / "box_03.ply").unlink()
    assert prepared(folder, out)["built"] == 1
    after = by_name(out)
    assert after["box_01"]["sides"] == pytest.approx([1, 0.9, 0.5]), "the new record wins"
    assert {name for name in before if after[name] != before[name]} == {"box_01"}
    assert prepare(find_sources([folder], up="+z", front="-y"), out, SMALL, workers=0)["built"] == 3
    assert by_name(out)["box_01"]["sides"] == pytest.approx([1, 0.5, 0.9])


@pytest.mark.parametrize("harm", ["cut", "gone", "records"])
def test_a_damaged_shard_is_built_again(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(run_module, "OBJECTS_A_SHARD", 2)
    folder = write_boxes(tmp_path / "in", 4)
    for name in ("whole", "out"):
        prepared(folder, tmp_path / name)
    path = tmp_path / "out" / "shards" / "shard_00000.safetensors"
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.with_suffix(".json").write_text('[{"key": ')
    assert prepared(folder, tmp_path / "out")["built"] == 2
    assert_same_preparation(tmp_path / "whole", tmp_path / "out")


def test_other_options_and_a_second_writer_are_refused(tmp_path):
    folder, out = write_boxes(tmp_path / "in", 1), tmp_path / "out"
    prepared(folder, out)
    with pytest.raises(TriptychError, match=r"other options \(view_size=16\): choose another --out"):
        prepared(folder, out, replace(SMALL, view_size=32))
    with run_lock(out, enabled=True), pytest.raises(TriptychError, match="another preparation is writing"):
        prepared(folder, out)
    with pytest.raises(TriptychError, match="yaws must be 1 or more, got 0"):
        replace(SMALL, yaws=0)


# What comes out


def test_a_split_never_changes_when_data_is_added(tmp_path):
    folder, out = write_boxes(tmp_path / "in", 3), tmp_path / "out"
    prepared(folder, out)
    before = {name: record["split"] for name, record in by_name(out).items()}
    write_mesh(box(1, 0.3, 0.5), folder / "a_copy_that_comes_first.ply")
    write_mesh(box(0.2, 0.3, 0.5), folder / "aa.ply")
    prepared(folder, out)
    after = by_name(out)
    assert after["box_00"]["gate"] == "duplicate"
    assert after["a_copy_that_comes_first"]["split"] == before["box_00"]
    assert {name: after[name]["split"] for name in ("box_01", "box_02")} == {n: before[n] for n in ("box_01", "box_02")}
    # Known answers: changing the rule would move objects between the splits of data that people have.
    assert [split_of(str(i)) for i in (0, 20, 70, 75)] == KNOWN_SPLITS
    splits = [split_of(str(i)) for i in range(4000)]
    assert [splits.count(name) / 4000 for name in ("train", "validation", "test")] == pytest.approx(
        [0.95, 0.025, 0.025], abs=0.01
    )


KNOWN_SPLITS = ["train", "validation", "test", "validation"]


def test_prepared_data_reads_what_was_prepared(tmp_path):
    folder, out = write_boxes(tmp_path / "in", 4), tmp_path / "out"
    prepared(folder, out, replace(SMALL, yaws=2))
    records = {r["split"] for r in index_of(out)["records"]}
    for split in records:
        data = PreparedData(out, split)
        assert len(data) == 2 * len(data.records)
        sample = data[0]
        assert sample["albedo"].shape == (4, 16, 16, 4) and sample["normal"].shape == (4, 16, 16, 3)
        np.testing.assert_array_equal(sample["sdf"], data.field(0))
        assert (sample["sdf"] < 0).sum() == data.records[0]["inside_voxels"]


class Page:
    """What a page shows and what it would load."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        self.sources = re.findall(r"\bsrc='([^']*)'", self.text)
        self.links = re.findall(r"\bhref='([^']*)'", self.text)


def test_the_report_is_self_contained_and_shows_every_dropped_object(mixed):
    folder, out, _ = mixed
    page = Page(out / "report.html")
    assert page.sources and all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", page.text)
    for link in page.links:
        assert link.startswith("#") and f"id={link[1:]}" in page.text or (out / link).is_file()
    for record in by_name(out).values():
        assert record["key"] in page.text
    for gate, said in BAD.values():
        assert f"<b>{gate}</b>" in page.text and said in page.text
    readable = {"good", "hole", "twin", "flat", "slivers", "few", "needle"}
    for name in readable:
        assert re.search(rf"<img src='data:[^']+' [^>]*alt='{name}'", page.text), name
    for source in set(page.sources):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"), int)
        assert picture.shape == (96, 96, 3)
        assert np.ptp(picture[..., 0]) > 25, "an object stands out from its backdrop"


def test_names_are_escaped_and_pages_follow_the_number_of_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "OBJECTS_A_PAGE", 2)
    folder, out = write_boxes(tmp_path / "in", 5), tmp_path / "out"
    evil = "<script>alert('1')</script>"
    rows = "".join(f'b{i},train,box_{i:02d}.ply,"{evil}","{evil}",L,"{evil}"\n' for i in range(5))
    (folder / "index.csv").write_text("id,split,file,name,category,licence,attribution\n" + rows)
    prepared(folder, out)
    pages = sorted((out / "report").glob("page_*.html"))
    assert [p.name for p in pages] == ["page_001.html", "page_002.html", "page_003.html"]
    assert [Page(p).text.count("<figure") for p in pages] == [2, 2, 1]
    for path in [out / "report.html", *pages]:
        assert "<script>alert" not in path.read_text() and "title='b0; <" not in path.read_text()
    assert "<script" not in (out / "ATTRIBUTION.md").read_text()
    monkeypatch.setattr(report_module, "OBJECTS_A_PAGE", 500)
    prepared(folder, out)
    assert [p.name for p in (out / "report").iterdir()] == ["page_001.html"]


def test_statistics_and_credits(tmp_path):
    folder, out = write_boxes(tmp_path / "in", 4), tmp_path / "out"
    (folder / "index.csv").write_text(
        "id,split,file,name,category,licence,attribution\n"
        "a,train,box_00.ply,Crate,prop,CC-BY-4.0,Ann\nb,train,box_01.ply,Chest,prop,CC-BY-4.0,Ann\n"
        "c,train,box_02.ply,Brick,,CC0-1.0,Bob\nd,train,box_03.ply,Stone,,,\n"
    )
    prepared(folder, out)
    found = json.loads((out / "statistics.json").read_text())
    assert found["licences"] == {"CC-BY-4.0": 2, "CC0-1.0": 1, "unknown": 1}
    assert {name: entry["objects"] for name, entry in found["categories"].items()} == {"none": 2, "prop": 2}
    assert found["measures"]["faces"]["0.5"] == 12
    assert found["summary"]["objects"] == 4 and found["options"]["gates"]["min_faces"] == 4
    credits = (out / "ATTRIBUTION.md").read_text()
    assert "## CC-BY-4.0\n\n### Ann (2)\n\nChest, Crate\n" in credits
    assert "## CC0-1.0\n\n### Bob (1)\n\nBrick\n" in credits
    assert "## Licence unknown\n\nNo index.csv named one" in credits


def test_an_empty_preparation_still_reports(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "only.obj").write_bytes(b"")
    assert prepared(tmp_path / "in", tmp_path / "out")["objects"] == 0
    assert "is empty (0 bytes)" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(TriptychError, match="no objects in the split 'train'"):
        PreparedData(tmp_path / "out")


def test_the_command_line(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    folder, out = write_boxes(tmp_path / "in", 3), tmp_path / "out"
    line = f"{folder} --out {out} --workers 0 --resolution 16 --view-size 16 --limit 2 --drop-open 0.4 --min-faces 13"
    assert main(parser.parse_args(line.split())) == 0
    assert re.match(
        r"0 objects \(0 samples\) ready in .*, 2 dropped, 0 flagged; .*report\.html", capsys.readouterr().out
    )
    gates = index_of(out)["options"]["gates"]
    assert (gates["drop_open"], gates["min_faces"], gates["max_faces"]) == (0.4, 13, 2_000_000)
    with pytest.raises(TriptychError, match="--workers must be 0 or more"):
        prepare([], out, SMALL, workers=-1)
