"""python -m triptych: what each command writes, prints and refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from tiny_bundle import make_field_bundle, make_tiny_bundle

import triptych
from triptych.cli import arguments, main
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_NAMES
from triptych.geometry.files import MESH_SUFFIXES, read_mesh, write_mesh, write_obj
from triptych.geometry.mesh import Material, Mesh
from triptych.images.foreground import METHODS
from triptych.images.sheets import join_sheet
from triptych.images.views import prepare_views
from triptych.render.views import RENDER_MODES

SMALL = ["--texture-size", "64", "--faces", "300", "--ensemble", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    make_tiny_bundle(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files chair_front.png and so on: a red block with a blue one on top, off the middle, on white."""
    folder = tmp_path_factory.mktemp("pictures")
    files = {}
    for name, shift in zip(VIEW_NAMES, (30, 0, -30, 0), strict=True):
        image = Image.new("RGB", (200, 220), "white")
        draw = ImageDraw.Draw(image)
        draw.rectangle((50, 100, 150, 190), fill=(190, 40, 40))
        draw.rectangle((80 + shift, 30, 120 + shift, 100), fill=(40, 60, 190))
        files[name] = str(folder / f"chair_{name}.png")
        image.save(files[name])
    return files


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def box(size=(1.0, 2.0, 3.0)):
    """A closed box from the origin to ``size``, 8 vertices and 12 faces that look outwards."""
    vertices = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float32) * np.float32(size)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([face for a, b, c, d in quads for face in ((a, b, c), (a, c, d))], np.int64)
    return Mesh(vertices, faces)


def textured_box():
    uv = np.random.default_rng(0).random((8, 2)).astype(np.float32)
    texture = np.full((16, 8, 3), (200, 60, 30), np.uint8)
    return box().replace(uv=uv, materials=(Material("paint", base_color_texture=texture),))


# The main job ----------------------------------------------------------------------------------------------------


def test_views_writes_what_its_summary_says_and_never_over_another_export(bundle, pictures, tmp_path, capsys):
    out = tmp_path / "deep" / "chair.obj"
    command = ["views", pictures["front"], pictures["left"], "--right", pictures["right"], "--back", pictures["back"],
               "-o", out, "--bundle", bundle, "--seed", 7, "--quiet", *SMALL]  # fmt: skip
    code, stdout, stderr = run(
        capsys, *command, "--formats", "obj,glb,ply,stl", "--viewer", "--turntable", "--json", tmp_path / "summary.json"
    )
    assert (code, stderr) == (0, "")
    summary = json.loads(stdout)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    names = {"chair.obj", "chair.mtl", "chair_albedo.png", "chair.glb", "chair.ply", "chair.stl", "chair_turntable.png",
             "viewer.html"}  # fmt: skip
    assert {path.name for path in out.parent.iterdir()} == names
    assert {str(out.parent / name) for name in names} == set(summary["files"])
    assert summary["views"] == pictures
    assert (summary["seed"], summary["steps"], summary["guidance"]) == (7, 2, 0.0)
    assert (summary["bundle"], summary["texture_size"], summary["warnings"]) == ("tiny-random", 64, [])
    seconds = summary["timings_s"]
    assert set(seconds) == {"prepare", "load", "structure", "surface", "texture", "write", "total"}
    assert sum(value for stage, value in seconds.items() if stage != "total") <= seconds["total"] + 0.01

    mesh = read_mesh(out)
    assert (len(mesh.vertices), len(mesh.faces)) == (summary["vertices"], summary["faces"])
    assert mesh.materials[0].base_color_texture.shape == (64, 64, 3)
    for suffix in ("glb", "ply", "stl"):
        assert len(read_mesh(out.with_suffix(f".{suffix}")).faces) == summary["faces"]
    # Views narrower than they are high: the longest side is the height, and fills model space.
    assert np.ptp(mesh.bounds[:, 1]) == pytest.approx(1, abs=0.05)

    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    code, stdout, _ = run(capsys, *command)
    again = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    assert code == 0 and {name: again[name] for name in before} == before
    assert set(again) - set(before) == {"chair_00002.obj", "chair_00002.mtl", "chair_00002_albedo.png"}
    assert again["chair_00002.obj"].replace(b"chair_00002", b"chair") == before["chair.obj"]  # same seed, same mesh

    out.write_text("old")
    code, stdout, _ = run(capsys, *command, "--overwrite")
    assert code == 0 and out.read_bytes() == before["chair.obj"]
    names = ("chair.obj", "chair.mtl", "chair_albedo.png")
    assert set(json.loads(stdout)["files"]) == {str(out.parent / name) for name in names}


def test_a_sheet_gives_the_mesh_of_its_pictures_and_a_folder_takes_their_name(bundle, pictures, tmp_path, capsys):
    sheet = tmp_path / "chair_views.png"
    cells = [np.asarray(Image.open(file)) for file in pictures.values()]
    Image.fromarray((join_sheet(cells)[..., :3] * 255).round().astype(np.uint8)).save(sheet)
    options = ["--bundle", bundle, "--formats", "ply", "--quiet", *SMALL, "--texture-size", "0"]
    code, stdout, _ = run(capsys, "views", *pictures.values(), "-o", tmp_path / "a", *options)
    assert code == 0 and json.loads(stdout)["files"] == [str(tmp_path / "a" / "chair.ply")]
    code, stdout, _ = run(capsys, "views", "--sheet", sheet, "-o", tmp_path / "b", *options)
    assert code == 0 and json.loads(stdout)["files"] == [str(tmp_path / "b" / "chair.ply")]
    assert (tmp_path / "a" / "chair.ply").read_bytes() == (tmp_path / "b" / "chair.ply").read_bytes()
    assert read_mesh(tmp_path / "a" / "chair.ply").colors is not None


def test_the_demo_without_pictures_shows_the_sample_object(bundle, tmp_path, capsys):
    out = tmp_path / "out"
    code, stdout, _ = run(capsys, "demo", "-o", out, "--bundle", bundle, *SMALL)
    assert code == 0
    names = {"sample.obj", "sample.mtl", "sample_albedo.png", "sample.glb", "sample_turntable.png", "sample_views.png",
             "viewer.html"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    with Image.open(out / "sample_views.png") as sheet:
        assert sheet.size == (4 * 512, 512)
    assert [line.split()[0] for line in stdout.splitlines()[1:-1]] == [
        str(out / f"sample{end}") if end[0] in "_." else str(out / end)
        for end in ("_views.png", "_turntable.png", "viewer.html", ".obj", ".glb")
    ]
    assert re.search(r"\d triangles from 4 views \(front, left, back, right\) by tiny-random, seed 0, 2 steps", stdout)
    assert re.search(r"^\d+\.\d s: prepare \d+\.\d, load .*write \d+\.\d\.$", stdout.splitlines()[-1])


# A pipeline that does nothing, for what lies around it --------------------------------------------------------------


@pytest.fixture
def given(monkeypatch):
    """Replaces the reconstruction by a box; what it was called with."""
    from triptych.pipelines import reconstruct

    calls = []

    def instead(views, bundle, settings, **rest):
        calls.append((views, settings, rest))
        settings = settings if settings.steps else triptych.pipelines.reconstruct.Settings(steps=1, guidance=0.0)
        return reconstruct.Reconstruction(textured_box(), np.zeros((1, 1, 1), np.float32), {}, (), settings)

    monkeypatch.setattr(reconstruct, "mesh_from_views", instead)
    return calls


def test_options_reach_the_pipeline(given, bundle, pictures, tmp_path, capsys):
    code, stdout, _ = run(
        capsys, "views", "--back", pictures["back"], "--front", pictures["front"], "-o", tmp_path / "x.glb", "--bundle",
        bundle, "--seed", 3, "--steps", 9, "--guidance", 2.5, "--ensemble", 2, "--texture-size", 256, "--faces", 0,
        "--device", "cpu",
    )  # fmt: skip
    assert code == 0
    ((views, settings, rest),) = given
    assert (settings.seed, settings.steps, settings.guidance) == (3, 9, 2.5)
    assert (settings.texture_size, settings.target_faces, settings.ensemble) == (256, 0, 2)
    assert rest["device"] == "cpu"
    expected = prepare_views({"front": pictures["front"], "back": pictures["back"]}, size=512)
    assert views.names == ("front", "back") and bool((views.images == expected.images).all())
    assert list(json.loads(stdout)["views"]) == ["front", "back"]


def test_one_picture_is_the_front_and_warnings_are_told_twice(given, bundle, pictures, tmp_path, capsys):
    wide = tmp_path / "front.png"
    Image.new("RGB", (40, 40), "white").save(wide)
    ImageDraw.Draw(image := Image.open(wide)).rectangle((8, 10, 30, 30), fill="black")
    image.save(wide)  # an object of 23 pixels: it works, with a warning
    code, stdout, stderr = run(capsys, "views", wide, "-o", tmp_path / "out", "--bundle", bundle, *SMALL)
    summary = json.loads(stdout)
    assert code == 0 and given[0][0].names == ("front",)
    assert len(summary["warnings"]) == 1 and "front view" in summary["warnings"][0]
    assert stderr == f"warning: {summary['warnings'][0]}\n"
    assert summary["files"][-1] == str(tmp_path / "out" / "object.obj")


def test_an_interrupt_leaves_nothing(monkeypatch, bundle, pictures, tmp_path, capsys):
    from triptych.pipelines import reconstruct

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(reconstruct, "mesh_from_views", interrupted)
    code, stdout, stderr = run(capsys, "demo", pictures["front"], "-o", tmp_path / "a" / "b", "--bundle", bundle)
    assert (code, stdout) == (130, "")
    assert stderr == "error: interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["views", "-o", "x.obj"], "no pictures were given"),
        (["views", "FRONT", "--front", "FRONT", "-o", "x.obj"], "front view is given twice, as picture 1 .*--front"),
        (["views", "FRONT", "LEFT", "--left", "BACK", "-o", "x.obj"], r"the left view is given twice, as picture 2"),
        (["views", "FRONT", "--sheet", "LEFT", "-o", "x.obj"], "give the sheet or single pictures, not both"),
        (["views", "FRONT", "-o", "x.fbx"], r"x\.fbx has no suffix of a mesh format: use one of obj, glb"),
        (["views", "FRONT", "-o", "x.obj", "--formats", "fbx"], "must be some of obj,glb"),
        (["views", "FRONT", "-o", "x.obj", "--steps", "0"], "must be a whole number from 1 to 1000, got '0'"),
        (["views", "FRONT"], "required: -o"),
        (["compare", "a.obj", "b.obj", "--thresholds", "0.1,-1"], "must be positive numbers"),
        (["render", "a.obj", "-o", "a.png", "--turntable", "4", "--azimuths", "0"], "not allowed with"),
        (["sculpt"], "invalid choice: 'sculpt'"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_usage_is_exit_code_2(words, sentence, bundle, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [pictures.get(word.lower(), word) for word in words]
    code, stdout, stderr = run(capsys, *words, *(["--bundle", bundle] if words[:1] == ["views"] else []))
    assert (code, stdout) == (2, "")
    assert re.search(rf"error: .*{sentence}", stderr)
    assert list(tmp_path.iterdir()) == []


# convert, render, inspect, compare ---------------------------------------------------------------------------------


def test_convert_goes_through_every_format(tmp_path, capsys):
    write_mesh(box(), tmp_path / "start.off")
    source = tmp_path / "start.off"
    for number, suffix in enumerate(arguments.FORMATS):
        target = tmp_path / "made" / f"{number}.{suffix}"
        code, stdout, stderr = run(capsys, "convert", source, target)
        assert (code, stderr) == (0, "") and str(target) in json.loads(stdout)["files"]
        source = target
    result = read_mesh(source)
    assert np.array_equal(result.vertices[result.faces], box().vertices[box().faces])


def test_convert_cleans_fills_reduces_and_normalizes(tmp_path, capsys):
    whole = box((2, 2, 2))
    holed = whole.replace(faces=whole.faces[2:])
    soup = Mesh(holed.vertices[holed.faces].reshape(-1, 3), np.arange(3 * len(holed.faces)).reshape(-1, 3))
    crumb = Mesh(soup.vertices * 0.01 + 9, soup.faces)
    both = Mesh(np.concatenate([soup.vertices, crumb.vertices]), np.concatenate([soup.faces, crumb.faces + 30]))
    write_obj(both, tmp_path / "soup.obj")
    code, stdout, _ = run(
        capsys, "convert", tmp_path / "soup.obj", tmp_path / "solid.glb", "--clean", "--fill-holes", "--normalize"
    )
    summary = json.loads(stdout)
    assert code == 0 and summary["source"] == {"file": str(tmp_path / "soup.obj"), "vertices": 60, "faces": 20}
    assert (summary["vertices"], summary["faces"]) == (8, 12)
    _, stdout, _ = run(capsys, "inspect", tmp_path / "solid.glb")
    (entry,) = json.loads(stdout)
    assert entry["watertight"] and entry["volume"] == pytest.approx(1)
    assert entry["bounds"] == [[-0.5] * 3, [0.5] * 3]


def test_convert_tells_what_is_lost_and_asks_before_it_overwrites(tmp_path, capsys):
    write_obj(textured_box(), tmp_path / "a.obj")
    code, stdout, stderr = run(capsys, "convert", tmp_path / "a.obj", tmp_path / "a.stl")
    assert code == 0 and json.loads(stdout)["warnings"] == ["STL holds no textures: they are left out"]
    assert stderr == "warning: STL holds no textures: they are left out\n"
    code, stdout, _ = run(capsys, "convert", tmp_path / "a.obj", tmp_path / "b.glb", "--faces", "8")
    assert code == 0 and json.loads(stdout)["warnings"] == ["--faces drops UV and materials: the result has no texture"]

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, stdout, stderr = run(capsys, "convert", tmp_path / "b.glb", tmp_path / "a.obj")
    assert (code, stdout) == (1, "")
    taken = f"{tmp_path / 'a.mtl'}, {tmp_path / 'a.obj'}"
    assert stderr == f"error: {taken} exist already: choose another name, or add --overwrite\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    code, _, _ = run(capsys, "convert", tmp_path / "b.glb", tmp_path / "a.obj", "--overwrite")
    assert code == 0 and len(read_mesh(tmp_path / "a.obj").faces) == len(read_mesh(tmp_path / "b.glb").faces)


def test_render_shows_each_side(tmp_path, capsys):
    red, blue = (1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 1.0, 1.0)
    cube = box((1, 1, 1))
    corners = cube.vertices[cube.faces]
    mesh = Mesh(
        corners.reshape(-1, 3), np.arange(36).reshape(-1, 3),
        colors=np.array([red if face[:, 2].min() > 0.5 else blue for face in corners], np.float32).repeat(3, 0),
    )  # fmt: skip
    write_mesh(mesh, tmp_path / "box.ply")
    out = tmp_path / "new" / "sides.png"
    command = ["render", tmp_path / "box.ply", "-o", out, "--mode", "albedo", "--size", "32", "--elevation", "0"]
    code, stdout, stderr = run(capsys, *command, "--azimuths", "0", "180")
    assert (code, stderr) == (0, "") and json.loads(stdout)["files"] == [str(out)]
    page = np.asarray(Image.open(out).convert("RGB"))
    assert page.shape == (4 + 36, 4 + 2 * 36, 3)
    assert page[20, 20].tolist() == [255, 0, 0] and page[20, 56].tolist() == [0, 0, 255]  # +z is the front
    code, _, stderr = run(capsys, *command)
    assert code == 1 and "exists already" in stderr
    assert run(capsys, "render", tmp_path / "box.ply", "-o", tmp_path / "x.jpg")[0] == 1
    code, stdout, _ = run(capsys, *command, "--overwrite", "--turntable", "10")
    assert code == 0 and json.loads(stdout)["azimuths_deg"] == [36.0 * i for i in range(10)]
    with Image.open(out) as page:  # rows of eight
        assert page.size == (4 + 8 * 36, 4 + 2 * 36)


def test_inspect_counts(tmp_path, capsys, bundle):
    opened = box().replace(faces=box().faces[2:])
    two = Mesh(
        np.concatenate([opened.vertices, opened.vertices + 9]), np.concatenate([opened.faces, opened.faces + 8])
    )  # fmt: skip
    write_obj(textured_box(), tmp_path / "closed.obj")
    write_mesh(two, tmp_path / "open.ply")
    (tmp_path / "broken.glb").write_bytes(b"glTF")
    files = [tmp_path / name for name in ("closed.obj", "open.ply", "broken.glb")]
    code, stdout, stderr = run(capsys, "inspect", *files, bundle)
    closed, opened, broken, weights = json.loads(stdout)
    assert (closed["vertices"], closed["faces"], closed["components"], closed["open_edges"]) == (8, 12, 1, 0)
    assert closed["watertight"] and closed["volume"] == pytest.approx(6) and closed["area"] == pytest.approx(22)
    assert closed["size"] == [1, 2, 3] and closed["bounds"] == [[0, 0, 0], [1, 2, 3]]
    assert closed["uv"] and closed["materials"][0]["textures"] == {"base_color": [8, 16]}
    assert (opened["components"], opened["open_edges"], opened["watertight"], opened["volume"]) == (2, 8, False, None)
    assert opened["uv"] is None and opened["materials"] == []
    assert code == 1 and stderr == f"error: {broken['error']}\n" and str(tmp_path / "broken.glb") in broken["error"]
    assert weights["verified"] and set(weights["components"]) == {"structure_flow", "structure_decoder"}
    assert weights["components"]["structure_flow"]["class"] == "LiftedStructureFlow"


def test_compare_measures_in_the_meshes_units_or_normalized(tmp_path, capsys):
    write_mesh(box((1, 1, 1)), tmp_path / "a.off")
    write_mesh(box((4, 4, 4)), tmp_path / "b.off")
    command = ["compare", tmp_path / "a.off", tmp_path / "b.off", "--samples", "4000", "--thresholds", "0.1,0.5"]
    code, stdout, _ = run(capsys, *command)
    far = json.loads(stdout)
    assert code == 0 and far["chamfer"] > 0.5 and far["volume_iou"] == pytest.approx(1 / 64, abs=0.005)
    assert list(far["f_scores"]) == ["0.1", "0.5"]
    code, stdout, _ = run(capsys, *command, "--align", "normalize")
    near = json.loads(stdout)
    assert code == 0 and near["chamfer"] < 0.03 and near["volume_iou"] == 1 and near["f_scores"]["0.1"] == 1


# Around the commands -----------------------------------------------------------------------------------------------


def test_choices_are_the_librarys_own():
    assert sorted(f".{name}" for name in arguments.FORMATS) == sorted(MESH_SUFFIXES)
    assert (arguments.RENDER_MODES, arguments.FOREGROUNDS, arguments.VIEWS) == (RENDER_MODES, METHODS, VIEW_NAMES)


@pytest.mark.parametrize("words", [["--help"], ["views", "--help"], ["--version"]], ids=" ".join)
def test_help_and_version_load_nothing_heavy(words):
    code = (
        "import sys\nfrom triptych.cli import main\nstatus = main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'scipy', 'trimesh'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert triptych.__version__ in done.stdout if words == ["--version"] else "usage: python -m triptych" in done.stdout


def test_the_module_runs_and_reports_by_its_exit_code(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "triptych", "inspect", str(tmp_path / "none.obj")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr == f"error: {tmp_path / 'none.obj'} does not exist: check the spelling and the folder\n"


def test_views_with_a_bundle_without_decoder(pictures, tmp_path, capsys):
    """The embedded bundle is of this kind: its flow's result is the field."""
    make_field_bundle(tmp_path / "field")
    code, stdout, stderr = run(
        capsys, "views", pictures["front"], "-o", tmp_path / "out.ply", "--bundle", tmp_path / "field", "--quiet",
        "--texture-size", 0, "--faces", 500, "--ensemble", 1,
    )  # fmt: skip
    assert (code, stderr) == (0, "")
    assert len(read_mesh(tmp_path / "out.ply").faces) == json.loads(stdout)["faces"] > 100


def test_a_workflow_of_ours_goes_by_its_name(tmp_path, monkeypatch):
    from triptych.cli.api import workflow_file

    monkeypatch.chdir(tmp_path)
    assert workflow_file(Path("turntable")).name == "turntable.api.json"
    for there in ("mine.json", "folder/turntable"):
        assert workflow_file(Path(there)) == Path(there)
    (tmp_path / "turntable").write_text("{}")
    assert workflow_file(Path("turntable")) == Path("turntable")
    with pytest.raises(TriptychError, match="there is no workflow turntables: choose clean_and_texture, image_to_obj"):
        workflow_file(Path("turntables"))
