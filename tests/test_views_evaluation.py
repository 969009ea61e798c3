"""The evaluation of view models: metrics with known answers, a fixed protocol, and models whose quality is known."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import ndimage

from trainer import views_meshes
from trainer.views_evaluation import LastSheet, evaluate_views
from trainer.views_evaluation import fitted as fitted_views
from trainer.views_metrics import PSNR_CAP_DB, fitted, hull_agreement, load_lpips, surface_scores, view_scores
from trainer.views_tables import COMPARED, markdown, view_table
from trainer.views_text import Known, colour_family, judged, ranked_nouns, rates, silhouettes_of
from trainer.views_truth import PROTOCOL_FILE, load_protocol, lone, named, true_object
from triptych.errors import TriptychError
from triptych.flux.backend import FluxViews
from triptych.flux.card import ViewsCard
from triptych.geometry.cameras import VIEW_NAMES, rig_cameras
from triptych.geometry.isosurface import isosurface
from triptych.geometry.mesh import Mesh
from triptych.geometry.voxels import hull_field, visual_hull
from triptych.images.sheets import join_sheet

PROTOCOL = load_protocol()
CARD = ViewsCard(
    "known", "Apache-2.0", "flux2-klein", "{text}. given: {given}.", panel_size=128, background=(1, 0, 1), steps=2
)


def square(left: int, width: int = 20, colour: float = 0.4) -> np.ndarray:
    picture = np.zeros((64, 64, 4), np.float32)
    picture[20:40, left : left + width] = (colour, colour, colour, 1)
    return picture


# --- metrics -------------------------------------------------------------------------------------------------------


def test_a_view_against_itself_is_perfect() -> None:
    assert view_scores(square(10), square(10)) == {"psnr": PSNR_CAP_DB, "ssim": pytest.approx(1), "iou": 1.0}


def test_known_degradations_have_known_scores() -> None:
    brighter = view_scores(square(10, colour=0.5), square(10))
    assert brighter["psnr"] == pytest.approx(20, abs=1e-4) and brighter["iou"] == 1.0
    moved = view_scores(square(15), square(10))
    # 15 of 25 columns agree; the others are 0.4 against white
    assert moved["iou"] == pytest.approx(0.6)
    assert moved["psnr"] == pytest.approx(-10 * np.log10(0.4 * 0.36), abs=1e-4)
    assert moved["ssim"] < brighter["ssim"] < 1


def test_what_is_painted_outside_of_the_truth_costs() -> None:
    wide, narrow = view_scores(square(10, 40), square(10)), view_scores(square(10, 22), square(10))
    assert wide["psnr"] < narrow["psnr"] < PSNR_CAP_DB and wide["iou"] == 0.5


def test_an_empty_view_scores_zero_overlap_and_an_empty_truth_is_refused() -> None:
    assert view_scores(square(10, 0), square(10))["iou"] == 0
    with pytest.raises(TriptychError, match="true view is empty"):
        view_scores(square(10), square(10, 0))


def test_hull_agreement_is_that_of_the_voxel_hull() -> None:
    # 34 voxels of the cube are 34 of the frame's 40 pixels, centre on centre
    generator = np.random.default_rng(0)
    masks = np.zeros((4, 40, 40), bool)
    noise = ndimage.gaussian_filter(generator.standard_normal((4, 34, 34)), (0, 3, 3))
    masks[:, 3:37, 3:37] = noise > np.quantile(noise, 0.4)
    found = hull_agreement(masks)
    cameras = rig_cameras()
    for view in range(4):
        others = [i for i in range(4) if i != view]
        hull = visual_hull(masks[others].astype(np.float32), [cameras[i] for i in others], 34) > 0.5
        along_z = view in (0, 2)
        seen = hull.any(axis=2).T[::-1] if along_z else hull.any(axis=0)[::-1]  # rows: y down; columns: x or z
        seen = seen[:, ::-1] if view in (1, 2) else seen
        own = masks[view, 3:37, 3:37]
        assert found[view] == pytest.approx((seen & own).sum() / (seen | masks[view, 3:37, 3:37]).sum())
    assert 0.05 < found.min() < found.max() < 0.95


def test_a_true_set_agrees_with_itself_and_a_wider_side_does_not() -> None:
    masks = np.zeros((4, 32, 32), bool)
    masks[0, 8:24, 4:12] = True
    masks[2] = masks[0][:, ::-1]
    masks[1, 8:24, 10:30] = True
    masks[3] = masks[1][:, ::-1]
    assert hull_agreement(masks).tolist() == [1, 1, 1, 1]
    masks[1, 8:24, 10:20] = False
    assert hull_agreement(masks).tolist() == [1, 0.5, 1, 0.5]
    masks[1, 16:24] = False  # and lower by half: the front loses its lower half in the hull
    assert hull_agreement(masks).tolist() == [0.5, 0.25, 0.5, 0.25]
    with pytest.raises(TriptychError, match="front, left, back and right"):
        hull_agreement(masks[:3])


def tetrahedron() -> Mesh:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 0, 0.3]], np.float32) - 0.25
    return Mesh(vertices, np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]]))


def test_one_scale_and_translation_are_taken_out_of_the_fitted_distance_and_nothing_else() -> None:
    truth = tetrahedron()
    moved = truth.replace(vertices=truth.vertices * 0.7 + np.float32(0.2))
    np.testing.assert_allclose(fitted(moved, truth).vertices, truth.vertices, atol=1e-6)
    scores = surface_scores(moved, truth, 4000, (0.02,))
    assert scores["fitted_chamfer"] < 0.01 < 0.1 < scores["chamfer"] and scores["fitted_f0.02"] > 0.99
    deeper = truth.replace(vertices=truth.vertices * np.array([1, 1, 2], np.float32))
    assert surface_scores(deeper, truth, 4000, (0.02,))["fitted_chamfer"] > 0.02


def test_a_fitted_sheet_has_the_photographs_scale_and_lies_in_the_middle() -> None:
    """The front is drawn at half the size of the photograph, so the side becomes twice as large, its height too."""

    def slab(left, top, width, height):
        view = np.zeros((64, 64, 4), np.float32)
        view[top : top + height, left : left + width] = (0.4, 0.4, 0.4, 1)
        return view

    photo, side = slab(12, 22, 40, 20), slab(16, 20, 32, 24)
    panels = {"front": slab(30, 4, 20, 10), "left": slab(3, 3, 16, 12), "back": slab(30, 4, 20, 10)}
    panels["right"] = np.zeros_like(photo)
    found = fitted_views(photo, panels)
    for name, wanted in (("left", side), ("back", photo)):
        scores = view_scores(found[name], wanted)
        assert scores["iou"] == 1 and scores["psnr"] > 20, "edges alone are softer"
    assert not found["right"].any()
    unknown = fitted_views(photo, panels | {"front": panels["right"]})
    assert view_scores(unknown["left"], slab(19, 22, 27, 20))["iou"] > 0.95, "without a front all heights are equal"


class FakeLpips(torch.nn.Module):
    """Mean absolute difference, of pictures in the range that the real network takes."""

    def __init__(self, net, verbose):
        super().__init__()
        assert net == "alex"

    def forward(self, a, b):
        assert a.shape == b.shape == (1, 3, 16, 16) and -1 <= float(a.min()) < -0.9 and 0.9 < float(b.max()) <= 1
        return (a - b).abs().mean()


def test_lpips_is_measured_where_it_is_installed_and_told_where_not(monkeypatch) -> None:
    found, truth = (np.ones((16, 16, 4), np.float32) for _ in range(2))
    found[..., :3] = 0.0
    heard: list[str] = []
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert load_lpips(heard.append) is None and "pip install lpips" in heard[-1]
    module = types.ModuleType("lpips")
    monkeypatch.setitem(sys.modules, "lpips", module)
    module.LPIPS = FakeLpips
    measure = load_lpips(heard.append)
    assert view_scores(found, truth, measure)["lpips"] == pytest.approx(2.0) and len(heard) == 1
    assert "lpips" not in view_scores(found, truth)
    rows = {"model": {name: {"psnr": 1.0, "ssim": 0.5, "iou": 0.5, "lpips": 0.25} for name in (*COMPARED, "mean")}}
    assert "LPIPS mean" in view_table(rows) and "0.250" in view_table(rows)

    def without_weights(**options):
        raise OSError("no network")

    module.LPIPS = without_weights
    assert load_lpips(heard.append) is None and "AlexNet weights could not be had: no network" in heard[-1]


# --- the protocol --------------------------------------------------------------------------------------------------


def test_the_protocol_names_the_evaluation_scans_and_their_pixels_are_rendered_again(data_dir) -> None:
    from benchmarks.quality import evaluation_objects

    assert PROTOCOL.object_ids() == [name for name, _ in evaluation_objects(data_dir)]
    assert len(PROTOCOL.pixels) == 63 and len(PROTOCOL.object_ids(5)) == 5
    for name in PROTOCOL.object_ids(2):
        item = true_object(PROTOCOL, data_dir, name)
        assert item.pixels == PROTOCOL.pixels[name]
        assert item.truth.shape == (4, 128, 128, 4) and item.photo.shape == (512, 512, 4)
        crop = lone(item.photo)[..., 3] > 0.5
        extent = max(np.ptp(np.flatnonzero(crop.any(axis))) + 1 for axis in (0, 1))
        assert 0.85 < extent / max(crop.shape) < 0.95


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics_version": 99}, "for version 99 of the metrics"),
        ({"extra": 1}, "extra"),
        ({"truth_light": {"head": 1.0}}, "lights the true views"),
    ],
)
def test_a_protocol_of_other_definitions_is_refused(tmp_path, change, said) -> None:
    path = tmp_path / "protocol.json"
    path.write_text(json.dumps(json.loads(PROTOCOL_FILE.read_text()) | change))
    with pytest.raises(TriptychError, match=said):
        load_protocol(path)


def test_data_without_the_objects_is_refused(tmp_path) -> None:
    with pytest.raises(TriptychError, match="cannot be read"):
        true_object(PROTOCOL, tmp_path, "gso__BABY_CAR")
    (tmp_path / "index.csv").write_text("id,split,file\na,eval,a.glb\n")
    with pytest.raises(TriptychError, match="gso__BABY_CAR"):
        true_object(PROTOCOL, tmp_path, "gso__BABY_CAR")


# --- models whose quality is known -----------------------------------------------------------------------------------


class KnownModel(FluxViews):
    """Knows the true sheets in order, and gives them as they are ("truth"), as "blur", or a "copy" of the reference."""

    _grid = _encode = _noise = _sample = None

    def __init__(self, data_dir, kind: str, objects: int) -> None:
        super().__init__(SimpleNamespace(transformer=SimpleNamespace(dtype=torch.float32)), CARD)
        self.kind, self.calls = kind, 0
        self.sheets = [true_object(PROTOCOL, data_dir, name).truth for name in PROTOCOL.object_ids(objects)]

    def uses_negative(self, guidance: float) -> bool:
        return False

    def sheet(self, prompt, references=(), *, seed=0, steps=None, guidance=None, negative="", on_step=None):
        assert prompt == ". given: front." and (steps, guidance) == (None, None)
        truth = self.sheets[self.calls % len(self.sheets)]
        self.calls += 1
        if self.kind == "copy":
            front = references[0]
            return torch.cat([torch.cat([front, front], 2), torch.cat([front.flip(2), front], 2)], 1)
        flat = join_sheet(named(truth), background=CARD.background).transpose(2, 0, 1)
        if self.kind == "blur":
            flat = ndimage.gaussian_filter(flat, (0, 1.5, 1.5))
        return torch.from_numpy(np.ascontiguousarray(flat))


@pytest.fixture(scope="module")
def reports(data_dir, tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("reports"), []
    made = {}
    for kind in ("truth", "blur", "copy"):
        model = KnownModel(data_dir, kind, 2)
        made[kind] = evaluate_views(
            model, PROTOCOL, data_dir, objects=2, meshes=False, text=False, out=folder / kind, report=said.append
        )
        assert model.calls == 2
    return SimpleNamespace(folder=folder, said=said, **made)


def test_better_models_score_better(reports) -> None:
    truth, blur, copy = (report["views"]["model"]["mean"] for report in (reports.truth, reports.blur, reports.copy))
    assert all(truth[key] > blur[key] > copy[key] for key in ("psnr", "ssim"))
    assert min(truth["iou"], blur["iou"]) > 0.95 > copy["iou"] + 0.15
    assert reports.truth["wins"] == {"psnr": 1, "ssim": 1, "iou": 1}
    assert reports.copy["wins"]["psnr"] == 0
    assert reports.copy["hull"]["model"]["mean"] < reports.blur["hull"]["model"]["mean"]
    assert reports.truth["hull"]["truth"]["mean"] > 0.995


def test_a_perfect_model_is_exactly_at_its_ceiling(reports) -> None:
    views = reports.truth["views"]
    assert views["model"] == views["truth, cut out"]
    assert views["model"]["mean"]["iou"] > 0.97 and views["model"]["mean"]["psnr"] > 33
    assert views["front copied"]["back"]["iou"] > 0.995  # opposite outlines are mirror images
    assert "truth through the VAE" not in views  # the model has none


def test_the_report_is_kept_and_shown(reports) -> None:
    kept = json.loads((reports.folder / "blur" / "report.json").read_text())
    assert kept["views"] == reports.blur["views"] and len(kept["objects"]) == 2
    assert kept["protocol"]["pixels_changed"] == [] and kept["protocol"]["of"] == 63
    assert (reports.folder / "blur" / "views_01.png").stat().st_size > 50_000
    text = markdown(reports.blur)
    assert all(f"| {method} |" in text for method in reports.blur["views"]) and "the protocol's own pixels" in text
    assert "not comparable" in markdown(
        reports.blur | {"protocol": reports.blur["protocol"] | {"pixels_changed": ["a"]}}
    )


def test_the_same_sheet_is_drawn_once(data_dir) -> None:
    model = KnownModel(data_dir, "truth", 1)
    kept = LastSheet(model)
    asked = {"seed": 1, "steps": None, "guidance": None}
    reference = torch.zeros(3, 128, 128)
    first = kept.sheet(". given: front.", [reference], **asked)
    assert torch.equal(kept.sheet(". given: front.", [reference.clone()], on_step=print, **asked), first)
    assert model.calls == 1
    kept.sheet(". given: front.", [reference + 0.1], **asked)
    kept.sheet(". given: front.", [reference + 0.1], **asked | {"seed": 2})
    assert model.calls == 3


# --- reconstructions -------------------------------------------------------------------------------------------------


@pytest.fixture
def hulls(monkeypatch):
    """The visual hull in place of the networks, and how often it was asked for."""
    calls = []

    def hull(views, bundle, settings, *, device):
        calls.append(views.count)
        return SimpleNamespace(mesh=isosurface(hull_field(views.masks, views.cameras, 32)))

    monkeypatch.setattr(views_meshes, "mesh_from_views", hull)
    return calls


def tiny_bundle(tmp_path) -> SimpleNamespace:
    (tmp_path / "bundle.json").write_text("{}")
    return SimpleNamespace(folder=tmp_path)


def test_reconstruction_from_true_panels_is_the_ceiling_and_is_kept(data_dir, hulls, tmp_path) -> None:
    protocol = replace(PROTOCOL, photo_px=128, meshes=PROTOCOL.meshes | {"samples": 2000, "view_px": 96})
    item = true_object(protocol, data_dir, protocol.object_ids()[13])  # a shoe, longer than the front tells
    model = KnownModel(data_dir, "truth", 1)
    model.sheets = [item.truth]
    meshes = views_meshes.Meshes(tiny_bundle(tmp_path), protocol, tmp_path)
    rows = meshes.rows(item, named(item.truth), model, 0)
    assert hulls == [1, 1, 4, 4, 4]
    assert rows["photo + generated"] == rows["photo + true"]
    assert rows["photo + true"]["chamfer"] < 0.7 * rows["photo"]["chamfer"]
    assert rows["photo + generated, lone"]["chamfer"] < 1.2 * rows["photo + true"]["chamfer"]
    assert rows["photo, lone"]["fitted_chamfer"] < rows["photo, lone"]["chamfer"]
    again = views_meshes.Meshes(tiny_bundle(tmp_path), protocol, tmp_path).rows(item, named(item.truth), model, 0)
    assert hulls[5:] == [4, 4] and again == rows
    (tmp_path / "bundle.json").write_text('{"another": 1}')
    assert views_meshes.Meshes(SimpleNamespace(folder=tmp_path), protocol, tmp_path).known == {}


def test_an_empty_panel_fails_the_reconstruction_and_is_counted(data_dir, hulls, tmp_path) -> None:
    protocol = replace(PROTOCOL, photo_px=64, meshes=PROTOCOL.meshes | {"samples": 500, "view_px": 64})
    item = true_object(protocol, data_dir, protocol.object_ids()[0])
    model = KnownModel(data_dir, "truth", 1)
    panels = named(item.truth) | {"back": np.zeros_like(item.truth[0])}
    rows = views_meshes.Meshes(tiny_bundle(tmp_path), protocol, None).rows(item, panels, model, 0)
    failed = rows["photo + generated"]
    assert failed["failed"] == 1 and failed["fitted_chamfer"] == 0.25 and failed["f0.05"] == 0
    assert failed.keys() == rows["photo"].keys() and rows["photo"]["failed"] == 0


# --- prompts -------------------------------------------------------------------------------------------------------


def box_views(width: int, height: int, depth: int, colour=(0.8, 0.05, 0.05)) -> np.ndarray:
    views = np.zeros((4, 64, 64, 4), np.float32)
    for view, across in zip(views, (width, depth, width, depth), strict=True):
        view[32 - height // 2 : 32 + height // 2, 32 - across // 2 : 32 + across // 2] = (*colour, 1)
    return views


def known_boxes() -> Known:
    sizes = {"sword": (4, 54, 2), "table": (54, 30, 40), "door": (30, 54, 4)}
    kept = [(noun, (w + 2 * i, h, d + 2 * i)) for noun, (w, h, d) in sizes.items() for i in range(3)]
    features = np.stack([silhouettes_of(box_views(*size), 16) for _, size in kept])
    nouns = np.array([noun for noun, _ in kept])
    colours = np.array(["red"] * 8 + ["grey"])
    return Known(features, nouns, np.arange(len(kept)).astype(str), colours, np.array(["red"] * 6 + ["brown"] * 3))


def test_a_noun_is_recognised_under_any_quarter_turn() -> None:
    known = known_boxes()
    door = silhouettes_of(box_views(30, 54, 6), 16)
    for turn in range(4):
        assert ranked_nouns(np.roll(door, turn, axis=0)[None], known, PROTOCOL)[0][0] == "door"


def test_the_judge_says_colour_and_place() -> None:
    known, protocol = known_boxes(), PROTOCOL
    panels = named(box_views(54, 32, 40))
    right = judged(panels, "red", "table", known, protocol)
    assert right == {"colour": "red", "noun": "table", "found_colour": "red", "nearest_noun": "table", "place": 0}
    wrong = judged(panels, "blue", "sword", known, protocol)
    assert wrong["found_colour"] == "red" and wrong["place"] > 0
    empty = judged({name: np.zeros((64, 64, 4), np.float32) for name in VIEW_NAMES}, "red", "table", known, protocol)
    assert empty["found_colour"] == "" and empty["place"] == len(known.nouns)
    assert colour_family(box_views(20, 20, 20, (0.1, 0.2, 0.8))) == "blue"


def test_rates_stand_beside_chance_and_ceiling() -> None:
    known = known_boxes()
    grid = [(colour, noun) for colour in ("red", "blue") for noun in ("sword", "table", "door")]
    rows = [{"colour": c, "noun": n, "found_colour": "red", "place": 0 if n == "door" else 2} for c, n in grid]
    found = rates(rows, known, PROTOCOL)
    assert found["colour"] == {"agreement": 0.5, "chance": 0.5, "ceiling": 0.75}
    category = found["category"]
    assert category["top1"] == pytest.approx(1 / 3) and category["chance1"] == pytest.approx(1 / 3)
    assert category["top5"] == category["chance5"] == 1 and category["ceiling1"] == 1


# --- commands --------------------------------------------------------------------------------------------------------


def test_the_command_runs_a_real_model_to_its_tables(data_dir, tmp_path, capsys) -> None:
    pytest.importorskip("diffusers")
    from benchmarks.views_quality import main
    from tests.flux_tiny import klein_folder

    folder = str(klein_folder(card=True))
    options = ["--model", folder, "--data", str(data_dir), "--objects", "1", "--no-meshes", "--no-prompts"]
    assert main([*options, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "| truth through the VAE |" in said and "1 of 63 objects" in said and "2 steps, guidance 2" in said
    scores = json.loads((tmp_path / "report.json").read_text())["objects"][0]["views"]
    assert set(scores["model"]) == set(COMPARED)
    assert main([*options[:2], "--data", str(tmp_path / "nowhere"), "--no-meshes"]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_the_gpu_benchmark_runs_small_and_says_when_it_measures_nothing(capsys) -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from benchmarks import published_flux as bench

    if not torch.cuda.is_available():
        bench.main([])
        assert capsys.readouterr().out.count("not measured") == 2
    small = replace(bench.TINY, training_px=(64,))
    bench.sheet_times(small, "cpu", "bfloat16", False, 1)
    bench.training_times(small, "cpu", 1e12, 1)
    said = capsys.readouterr().out
    assert "2 steps (4 passes)" in said and "training at 64 px" in said


def test_training_flops_are_twice_to_three_times_those_of_a_forward_pass() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import published_flux as bench
    from trainer.tasks.flux_views import velocity_of

    sample = bench.training_sample(bench.TINY, 256, "meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        velocity_of(
            bench.transformer_of(bench.TINY, "meta"), sample.noise, sample.level, sample.words, sample.references
        )
    assert 2 < bench.training_flops(bench.TINY, 256) / counter.get_total_flops() < 3
