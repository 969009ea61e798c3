"""`python -m triptych parity`: every reference file of the published modules, and what it says of others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from triptych.cli import main
from triptych.errors import TriptychError
from triptych.models.voxel_features import mean_patch_features, opencv_cameras, project_points
from triptych.parity import RUNNERS, compare, read_case, run_case

NAMES = [
    "01_ss_decoder", "01_ss_encoder", "02_ss_flow_forward", "03_ss_flow_sampling", "04_slat_encoder",
    "05_slat_flow", "06_mesh_extract", "06_slat_mesh_decoder", "06_slat_mesh_decoder_meshes", "07_flexicubes",
    "08_op_dit_block", "08_op_embeddings", "08_op_pixel_shuffle_patchify", "08_op_rms_norm",
    "08_op_sparse_attention", "08_op_sparse_downsample", "08_op_sparse_group_norm", "08_op_sparse_resblock",
    "08_op_sparse_subdivide", "08_op_subdivide_block", "08_op_subm_conv1", "08_op_subm_conv3", "08_op_swin_block",
    "08_op_window_attention", "09_slat_gaussian_decoder", "10_multi_image", "11_voxel_features",
]  # fmt: skip


def rewrite(source: Path, target: Path, tensors: dict | None = None, **metadata: str) -> Path:
    """The reference file with some tensors (None: dropped) and some metadata replaced."""
    with safe_open(source, framework="pt") as file:
        everything = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})  # noqa: SIM118
        facts = {**file.metadata(), **metadata}
    save_file({k: v for k, v in everything.items() if v is not None}, target, metadata=facts)
    return target


@pytest.fixture(scope="module")
def norm(fixtures_dir: Path) -> Path:
    return fixtures_dir / "08_op_rms_norm_a.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_every_output_of_every_file_is_within_its_tolerance(fixtures_dir: Path, name: str) -> None:
    case = read_case(fixtures_dir / f"{name}_a.safetensors")
    rows = compare(case, run_case(case))
    assert [row.name for row in rows] == sorted(case.outputs)
    assert {row.name: (row.error, row.note) for row in rows if not row.passed} == {}


def test_the_list_above_is_all_there_is(fixtures_dir: Path) -> None:
    files = sorted(fixtures_dir.glob("*.safetensors"))
    assert [file.name for file in files] == [f"{name}_a.safetensors" for name in NAMES]
    assert {read_case(file).class_name for file in files} == set(RUNNERS)


def test_the_command_prints_each_error_beside_its_tolerance(fixtures_dir: Path, norm: Path, capsys) -> None:
    other = fixtures_dir / "08_op_sparse_subdivide_a.safetensors"
    assert main(["parity", str(norm), str(other)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "08_op_rms_norm_a.safetensors: MultiHeadRMSNorm"
    words = lines[1].split()
    assert words[:2] == ["x", "error"] and words[3:] == ["allowed", "5.0e-06", "ok"] and 0 <= float(words[2]) <= 5e-6
    assert lines[2:] == [
        "08_op_sparse_subdivide_a.safetensors: SparseSubdivide",
        "  coords  error 0.0e+00  must be equal  ok",
        "  feats   error 0.0e+00  must be equal  ok",
        "2 files: all 3 outputs are within their tolerances",
    ]


def test_an_error_above_the_tolerance_is_one(norm: Path, tmp_path: Path, capsys) -> None:
    expected = read_case(norm).outputs["x"]
    moved = rewrite(norm, tmp_path / "moved.safetensors", {"output/x": expected + 6e-6})
    assert main(["parity", str(norm), str(moved)]) == 1
    out = capsys.readouterr().out
    assert out.count("  ok\n") == 1 and out.count("  OVER\n") == 1
    assert out.endswith("2 files: 1 of 2 outputs is over its tolerance\n")
    looser = rewrite(moved, tmp_path / "looser.safetensors", tolerance=json.dumps({"x": 7e-6}))
    assert main(["parity", str(looser)]) == 0
    weights = read_case(norm).weights["gamma"]
    assert main(["parity", str(rewrite(norm, tmp_path / "w.safetensors", {"weights/gamma": weights * 1.001}))]) == 1


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda x: x[:, 1:].contiguous(), "shape [2, 7, 4, 16] instead of [2, 6, 4, 16]"),
        (lambda x: x.masked_fill(x > 3, torch.nan), "NaN"),
        (lambda x: x.int(), "torch.float32 instead of torch.int32"),
    ],
)
def test_what_cannot_be_subtracted_is_over(change, note: str, norm: Path, tmp_path: Path, capsys) -> None:
    changed = rewrite(norm, tmp_path / "c.safetensors", {"output/x": change(read_case(norm).outputs["x"])})
    assert main(["parity", str(changed)]) == 1
    assert f"error inf  allowed 5.0e-06  OVER: {note}" in capsys.readouterr().out


def test_an_output_nobody_computes_is_over(norm: Path, tmp_path: Path) -> None:
    tolerance = json.dumps({"x": 5e-6, "y": 1.0})
    case = read_case(rewrite(norm, tmp_path / "y.safetensors", {"output/y": torch.zeros(2)}, tolerance=tolerance))
    assert [(row.name, row.passed, row.note) for row in compare(case, run_case(case))] == [
        ("x", True, ""), ("y", False, "not computed"),
    ]  # fmt: skip


CANNOT = {
    "class": (dict(metadata={"class": "os.system"}), "is of 'os.system', known are SparseStructureEncoder"),
    "config": (dict(metadata={"config": '{"dim": 16, "heads": 4, "depth": 2}'}), "not fit MultiHeadRMSNorm: .*depth"),
    "shape": (dict(metadata={"config": '{"dim": 8, "heads": 4}'}), "not fit MultiHeadRMSNorm: .*mismatch for gamma"),
    "input": (dict(tensors={"input/x": None}), "does not fit MultiHeadRMSNorm: it has no 'x'"),
    "weights": (dict(tensors={"weights/gamma": None}), "does not fit MultiHeadRMSNorm: .*Missing key"),
    "outputs": (dict(tensors={"output/x": None}), "is no reference file .it has no 'output'"),
    "tolerance": (dict(metadata={"tolerance": "{}"}), "gives no tolerance for x"),
    "json": (dict(metadata={"tolerance": "{"}), "is no reference file"),
}  # fmt: skip


@pytest.mark.parametrize("what", CANNOT)
def test_a_file_that_cannot_be_run_is_a_sentence_and_two(what: str, norm: Path, tmp_path: Path, capsys) -> None:
    changes, sentence = CANNOT[what]
    file = rewrite(norm, tmp_path / "x.safetensors", changes.get("tensors"), **changes.get("metadata", {}))
    with pytest.raises(TriptychError, match=sentence):
        run_case(read_case(file))
    assert main(["parity", str(file), str(norm)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert "08_op_rms_norm" in shown.out and shown.out.endswith("within their tolerances; 1 could not be run\n")


def test_missing_and_broken_files_are_sentences(tmp_path: Path, norm: Path, capsys) -> None:
    (tmp_path / "short.safetensors").write_bytes(norm.read_bytes()[:-10])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, said in {"short": "not a whole", "other": "no reference file", "none": "is no file"}.items():
        assert main(["parity", str(tmp_path / f"{name}.safetensors")]) == 2
        assert said in capsys.readouterr().err


def test_meshes_need_the_weights_beside_them(fixtures_dir: Path, tmp_path: Path) -> None:
    alone = tmp_path / "meshes.safetensors"
    alone.write_bytes((fixtures_dir / "06_slat_mesh_decoder_meshes_a.safetensors").read_bytes())
    (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
    with pytest.raises(TriptychError, match="has no weights, and no file beside it has its SLatMeshDecoder"):
        run_case(read_case(alone))


# ---- voxel features


def test_a_voxel_lands_where_the_camera_sees_it() -> None:
    """A camera on -Y that looks at the origin, z up: +X is right in its picture, +Z is up."""
    pose = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, -2], [0, 1, 0, 0], [0, 0, 0, 1]])[None]
    extrinsics, intrinsics = opencv_cameras(pose, torch.tensor([2 * torch.pi / 4]))
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0, 0.5], [0, 2, 0.5]])
    expected = torch.tensor([[0.5, 0.5], [0.625, 0.5], [0.5, 0.375], [0.5, 0.4375]])
    torch.testing.assert_close(project_points(points, extrinsics, intrinsics)[0], expected, atol=1e-6, rtol=0)


def test_views_may_come_one_by_one_and_must_match_the_cameras(fixtures_dir: Path) -> None:
    x = read_case(fixtures_dir / "11_voxel_features_a.safetensors").inputs
    cameras = x["transform_matrix"], x["camera_angle_x"]
    whole = mean_patch_features(x["coords"], x["tokens"], *cameras)
    assert mean_patch_features(x["coords"], iter(x["tokens"]), *cameras).equal(whole)
    for views in (4, 6):
        with pytest.raises(TriptychError, match="one camera for each view"):
            mean_patch_features(x["coords"], x["tokens"][torch.arange(views) % 5], *cameras)
    with pytest.raises(TriptychError, match="1370 patch tokens do not fill a square"):
        mean_patch_features(x["coords"], x["tokens"], *cameras, prefix_tokens=4)
