"""python -m triptych generate, and the demo of a single photo: what they write, print and refuse."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from fake_views import FakeViews, blank, truth
from PIL import Image, ImageDraw
from tiny_bundle import make_tiny_bundle

from triptych.cli import arguments, main
from triptych.cli.generate import PICTURE_SUFFIXES, prompt_name, sort_words
from triptych.flux import backend, hub, parts
from triptych.geometry.cameras import VIEW_NAMES
from triptych.geometry.files import read_mesh
from triptych.images.sheets import split_sheet
from triptych.images.views import prepare_views
from triptych.pipelines import reconstruct as reconstruct_pipeline

_real = reconstruct_pipeline.mesh_from_views
SMALL = ["--texture-size", "64", "--faces", "300", "--ensemble", "1", "--device", "cpu", "--quiet"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    make_tiny_bundle(folder)
    return str(folder)


@pytest.fixture
def fake(monkeypatch):
    """Loading gives this model; model.asked: the arguments of the loads."""
    model = FakeViews()
    model.asked = []

    def load(source, **options):
        options.pop("progress")("load", 1.0)
        model.asked.append((source, options))
        return model

    monkeypatch.setattr(backend, "load_flux_views", load)
    return model


@pytest.fixture
def photo(tmp_path):
    """robot.png: the sample object's front on white."""
    view = truth()["front"]
    flat = view[..., :3] * view[..., 3:] + (1 - view[..., 3:])
    path = tmp_path / "robot.png"
    Image.fromarray((flat * 255).round().astype(np.uint8)).save(path)
    return path


def run(capsys, *argv):
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


def test_a_sentence_becomes_a_mesh_with_its_views_beside_it(fake, bundle, tmp_path, capsys):
    out = tmp_path / "chair.obj"
    words = ["generate", "a red", "chair", "-o", out, "--bundle", bundle, "--seed", 4, *SMALL]
    code, stdout, stderr = run(capsys, *words, "--json", tmp_path / "summary.json")
    assert (code, stderr) == (0, "")
    summary = json.loads(stdout)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    names = {"chair.obj", "chair.mtl", "chair_albedo.png", "chair_views.png"}
    assert {str(tmp_path / name) for name in names} == set(summary["files"])
    assert summary["views"] == dict.fromkeys(VIEW_NAMES, "generated")
    assert (summary["prompt"], summary["views_prompt"]) == ("a red chair", "a red chair. given: nothing.")
    assert (summary["views_model"], summary["views_seed"], summary["rerolls"]) == ("triptych-tiny", 4, 0)
    assert (summary["seed"], summary["bundle"], summary["warnings"]) == (4, "tiny-random", [])
    seconds = summary["timings_s"]
    views = {"views_prepare", "views_load", "views_generate", "views_fit"}
    assert set(seconds) == views | {"prepare", "load", "structure", "surface", "texture", "write", "total"}
    assert sum(value for stage, value in seconds.items() if stage != "total") <= seconds["total"] + 0.01
    assert len(read_mesh(out).faces) == summary["faces"] > 0
    cells = split_sheet(tmp_path / "chair_views.png")
    expected = prepare_views(dict(truth().items()), size=512)
    for name, cell, other in zip(VIEW_NAMES, cells.values(), expected.masks.numpy(), strict=True):
        assert cell.shape == (512, 512, 4), name
        assert ((cell[..., 3] > 0.5) & (other > 0.5)).sum() / ((cell[..., 3] > 0.5) | (other > 0.5)).sum() > 0.97
    assert fake.calls[0]["seed"] == 4 and fake.unloaded == 1
    # `views --sheet` sees the same views again, but for 8-bit rounding
    again = prepare_views(dict(cells.items()), size=512).masks.numpy()
    for cell, mask in zip(cells.values(), again, strict=True):
        assert np.abs(cell[..., 3] - mask).mean() < 0.003
    # and a second run keeps the first one's files
    code, stdout, _ = run(capsys, *words)
    assert code == 0 and str(tmp_path / "chair_00002_views.png") in json.loads(stdout)["files"]
    assert (tmp_path / "chair_00002.obj").read_text() == out.read_text().replace("chair", "chair_00002")


def test_options_reach_the_model_and_further_copies_are_written(fake, bundle, photo, tmp_path, capsys):
    fake.faults = {9: [("right", blank)]}
    left = tmp_path / "side.png"
    Image.fromarray((truth()["left"] * 255).round().astype(np.uint8)).save(left)
    code, stdout, stderr = run(
        capsys, "generate", photo, "a red robot", "--left", left, "-o", tmp_path / "out", "--bundle", bundle, *SMALL,
        "--seed", 9, "--views-model", "some/model", "--lora", "my.safetensors", "--lora-strength", 0.5, "--views-steps",
        2, "--views-guidance", 1.5, "--rerolls", 1, "--offload", "model", "--quantisation", "int8", "--sheet-out",
        tmp_path / "deep" / "sheet.png", "--views-out", tmp_path / "single", "--formats", "ply", "--turntable",
    )  # fmt: skip
    assert code == 0
    summary = json.loads(stdout)
    assert fake.asked == [("some/model", {"device": "cpu", "offload": "model", "quantisation": "int8",
                                          "lora": "my.safetensors", "lora_strength": 0.5})]  # fmt: skip
    assert [(call["seed"], call["steps"], call["guidance"]) for call in fake.calls] == [(9, 2, 1.5), (10, 2, 1.5)]
    assert len(fake.calls[0]["references"]) == 2
    assert fake.calls[0]["prompt"] == "a red robot. given: front, left."
    assert summary["views"] == {"front": str(photo), "left": str(left), "back": "generated", "right": "generated"}
    assert (summary["views_seed"], summary["rerolls"], summary["seed"]) == (10, 1, 9)
    (told,) = summary["warnings"]
    assert told == "the views were drawn again once and those of seed 10 kept (seed 9: the right panel is empty)"
    assert stderr == f"warning: {told}\n"
    written = {
        "out/robot.ply", "out/robot_turntable.png", "out/robot_views.png", "deep/sheet.png",
        *(f"single/{name}.png" for name in VIEW_NAMES),
    }  # fmt: skip
    assert set(summary["files"]) == {str(tmp_path / name) for name in written}
    assert all((tmp_path / name).is_file() for name in written)
    assert (tmp_path / "deep/sheet.png").read_bytes() == (tmp_path / "out/robot_views.png").read_bytes()


def test_four_pictures_need_no_model(fake, bundle, tmp_path, capsys):
    files = []
    for name, view in truth().items():
        files.append(tmp_path / f"{name}.png")
        Image.fromarray((view * 255).round().astype(np.uint8)).save(files[-1])
    code, stdout, _ = run(capsys, "generate", *files, "-o", tmp_path / "x.glb", "--bundle", bundle, *SMALL)
    summary = json.loads(stdout)
    assert code == 0 and fake.asked == []
    assert summary["views"] == dict(zip(VIEW_NAMES, map(str, files), strict=True))
    assert summary["views_model"] is None


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        ([], 2, 'there is nothing to go by: write what the object is, as in generate "a red chair" -o chair.obj'),
        ([""], 1, "the prompt is empty and no picture is given"),
        ([" ... "], 1, "the prompt '...' has no words and no picture is given"),
        (["gone.jpg"], 1, "gone.jpg does not exist: check the path, or write what the object is in words"),
        (["photos of/my chair.PNG", "a chair"], 1, "photos of/my chair.PNG does not exist"),
        (["folder/"], 1, "folder/ is a folder: name one to four pictures in it"),
        (["--left", "gone.png"], 1, "gone.png"),
        (["note.txt"], 1, "note.txt"),
        (["PHOTO", "--front", "PHOTO"], 2, "the front view is given twice"),
        (["PHOTO"] * 5, 1, "5 pictures were given, at most 4 can be used"),
        (["a chair", "--rerolls", "-1"], 2, "must be a whole number from 0 to 100, got '-1'"),
        (["a chair", "--views-guidance", "200"], 1, "the guidance of the views must be 0-100, got 200.0"),
        (["a chair", "--sheet-out", "sheet.jpg"], 2, "--sheet-out sheet.jpg must be a .png file"),
        (["a chair", "--sheet-out", "PHOTO"], 1, "exists already: choose another name, or add --overwrite"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(
    words, code, sentence, fake, bundle, photo, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "note.txt").write_text("no picture")
    before = sorted(tmp_path.rglob("*"))
    words = [str(photo) if word == "PHOTO" else word for word in words]
    found, stdout, stderr = run(capsys, "generate", *words, "-o", "new/x.obj", "--bundle", bundle, *SMALL)
    assert (found, stdout) == (code, "")
    assert re.search(r"(^|\n)\S*.*error: .*" + re.escape(sentence), stderr)
    assert sorted(tmp_path.rglob("*")) == before


def test_words_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "chair").mkdir()
    (tmp_path / "no suffix").touch()
    assert sort_words(["photo.jpg", "a", "red", "chair", "no suffix"]) == ("a red chair", ["photo.jpg", "no suffix"])
    strange = ["x" * 10_000, "nul\0byte", "a chair, 1.5 m high", "椅子", ""]
    assert sort_words(strange) == (" ".join(strange), [])


def test_files_are_named_after_the_prompt():
    assert prompt_name("A red wooden chair!") == "red_wooden_chair"
    assert prompt_name("the 红色的 椅子") == "红色的_椅子"
    assert prompt_name("🐉 ../../etc") == "etc" and prompt_name("🐉") == "object" and prompt_name("a") == "object"
    assert prompt_name("one two three four five six seven eight nine") == "one_two_three_four_five_six_seven_eight"
    assert prompt_name("x" * 300) == "x" * 40


def test_the_choices_are_the_librarys():
    assert (tuple(parts.OFFLOADS), tuple(parts.QUANTISATIONS)) == (arguments.OFFLOADS, arguments.QUANTISATIONS)
    assert {".png", ".jpg", ".jpeg", ".webp"} <= set(PICTURE_SUFFIXES)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from triptych.cli import main; assert main(['generate', '--help']) == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--views-model" in done.stdout and "--rerolls" in done.stdout


# The demo ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(monkeypatch, tmp_path):
    """The embedded model seems to be there."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "views.json").touch()
    monkeypatch.setattr(hub, "EMBEDDED_FOLDER", folder)
    return folder


def test_a_demo_of_one_photo_generates_the_other_views(fake, embedded, bundle, photo, tmp_path, capsys):
    code, stdout, _ = run(capsys, "demo", photo, "-o", tmp_path / "out", "--bundle", bundle, *SMALL)
    assert code == 0 and fake.asked[0][0] == "triptych-tiny"
    assert fake.calls[0]["prompt"] == ". given: front."
    assert "from 1 view (front) and 3 generated (left, back, right by triptych-tiny)" in stdout
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"robot.obj", "robot.mtl", "robot_albedo.png", "robot.glb", "robot_turntable.png", "robot_views.png",
                    "viewer.html"}  # fmt: skip
    assert all(name in stdout for name in made if not name.endswith((".mtl", "albedo.png")))


@pytest.mark.parametrize("reason", ["--no-generate", "no model", "no diffusers", "two pictures"])
def test_a_demo_goes_without_a_model(reason, fake, embedded, bundle, photo, tmp_path, monkeypatch, capsys):
    words = ["demo", photo, "-o", tmp_path / "out", "--bundle", bundle, *SMALL]
    warning = ""
    if reason == "--no-generate":
        words.append("--no-generate")
    elif reason == "no model":
        (embedded / "views.json").unlink()
    elif reason == "two pictures":
        words += ["--back", photo]
    else:
        from importlib import util

        find = util.find_spec
        monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "diffusers" else find(name, *rest))
        warning = "warning: the other views are not generated, which needs diffusers: pip install diffusers\n"
    code, stdout, stderr = run(capsys, *words)
    assert (code, fake.asked, stderr) == (0, [], warning)
    views = "2 views (front, back)" if reason == "two pictures" else "1 view (front)"
    assert f"from {views} by tiny-random" in stdout
    assert not (tmp_path / "out" / "robot_views.png").exists()


def test_drawn_views_are_reconstructed_as_the_pipeline_left_them(capsys, monkeypatch, bundle, fake, photo, tmp_path):
    """Marked as drawn, and where they lie in their sheet."""

    def lifted(view):
        whole = view.copy()
        whole[-30:] = 0  # its feet are lost, and the rest stays where it is
        return whole

    fake.faults = {seed: [("left", lifted), ("right", lifted)] for seed in range(9)}
    seen = []
    monkeypatch.setattr(
        reconstruct_pipeline,
        "mesh_from_views",
        lambda views, *rest, **more: seen.append(views) or _real(views, *rest, **more),
    )
    code, _, _ = run(capsys, "generate", photo, "-o", tmp_path / "out.obj", "--bundle", bundle, *SMALL)
    assert code == 0
    (views,) = seen
    assert views.generated == (90.0, 180.0, 270.0) and views.seen.names == ("front",)
    (front, *_), (left, *_) = (np.flatnonzero((mask > 0.5).any(dim=1)) for mask in views.masks[:2])
    assert abs(int(left) - int(front)) <= 6, "by its own box it would lie in the middle"
    rows = [int((mask > 0.5).any(dim=1).sum()) for mask in views.masks]
    assert rows[1] < 0.95 * rows[0] and rows[2] == rows[0]


def test_what_is_wrong_with_a_photo_reaches_whoever_asked(fake, bundle, tmp_path, capsys):
    """Two objects, one of which the picture cuts off: sentences in the summary and on stderr."""
    picture = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(picture).ellipse((20, 60, 110, 150), fill=(40, 90, 160))
    ImageDraw.Draw(picture).ellipse((220, 60, 330, 150), fill=(160, 60, 40))
    picture.save(tmp_path / "two.png")
    words = ["generate", tmp_path / "two.png", "-o", tmp_path / "two.obj", "--bundle", bundle]
    code, stdout, stderr = run(capsys, *words, *[word for word in SMALL if word != "--quiet"])
    assert code == 0
    said = json.loads(stdout)["warnings"]
    for sentence in ("the front view: 2 separate objects found", "the front view: the object touches the right"):
        assert any(sentence in warning for warning in said), said
        assert sentence in stderr
