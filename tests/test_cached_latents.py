"""`trainer latents` end to end: meshes, prepared and structured, become cached latents that the large recipes train
on, with a small random bundle of the published layout."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_structured_data import _box
from torch import Tensor

from tests.published_folder import COND_CHANNELS, write_published_folder
from trainer.__main__ import main
from trainer.cached import SURFACE, CachedData, published_coords, published_volume
from trainer.config import build_task
from trainer.loop import export, train
from trainer.lora import LiftingConfig
from trainer.prepare.build import BuildOptions
from trainer.prepare.latents import condition_cameras, raw_tokens, token_extractor
from trainer.prepare.run import prepare
from trainer.prepare.sources import find_sources
from trainer.recipes_large import large_multiview_lora, slat_flow_large, structure_flow_large
from trainer.structured import StructuredData
from triptych.bundles.bundle import load_bundle
from triptych.geometry.files import write_mesh
from triptych.models.image_conditioning import ImageEncoder
from triptych.sparse.tensor import SparseTensor

RES, SIDE, PATCHES = 16, 32, 4
CPU = torch.device("cpu")
HERE = f"{__name__}:"


def tokens(device: torch.device):
    """A stand-in image encoder: class token and four registers, then 4 x 4 patches of COND_CHANNELS channels."""
    matrix = torch.randn(3, COND_CHANNELS, generator=torch.Generator().manual_seed(0)).to(device)

    def extract(pictures: Tensor) -> Tensor:
        assert pictures.shape[1:] == (3, SIDE, SIDE) and pictures.min() >= 0 and 0.3 < pictures.max() <= 1
        patches = torch.nn.functional.adaptive_avg_pool2d(pictures, PATCHES).flatten(2).transpose(1, 2) @ matrix
        return torch.cat([patches.mean(dim=1, keepdim=True).expand(-1, 5, -1), patches], dim=1)

    return extract


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Four boxes: prepared, structured with features, and a small published folder."""
    root = tmp_path_factory.mktemp("latents")
    (root / "meshes").mkdir()
    for number in range(4):
        mesh = _box((0.5, 0.2 + 0.06 * number, 0.3), color=(1.0, 0.2 * number, 0.5))
        write_mesh(mesh, root / "meshes" / f"box_{number}.ply")
    options = BuildOptions(resolution=RES, view_size=SIDE, yaws=1)
    prepare(find_sources([root / "meshes"]), root / "data", options, workers=0)
    index = json.loads((root / "data" / "index.json").read_text())
    for record, split in zip(index["records"], ("train", "train", "validation", "train"), strict=True):
        record["split"] = split
    (root / "data" / "index.json").write_text(json.dumps(index))
    structure = ["structure", str(root / "data"), str(root / "meshes"), "--workers", "0", "--features", HERE + "tokens"]
    assert main([*structure, "--feature-views", "6", "--feature-size", str(SIDE)]) == 0
    write_published_folder(root / "bundle")
    return root


def _command(made: Path, out: Path, *more: str, sources: bool = True) -> list[str]:
    places = [str(made / "data"), *([str(made / "meshes")] if sources else [])]
    sizes = ["--render-size", "48", "--encoder-size", str(SIDE), "--image-size", "32", "--views", "6"]
    names = ["--features", "tokens", "--image-encoder", HERE + "tokens", "--device", "cpu"]
    return ["latents", *places, "--bundle", str(made / "bundle"), "--out", str(out), *sizes, *names, *more]


@pytest.fixture(scope="module")
def cache(made) -> Path:
    assert main(_command(made, made / "cache")) == 0
    return made / "cache"


def test_an_object_is_what_the_bundle_s_encoders_make_of_it(made, cache) -> None:
    data, structured = CachedData(cache, "train", "latents"), StructuredData(made / "data", "train", "tokens")
    assert (len(data), data.tokens, data.channels) == (3, 5 + PATCHES**2, COND_CHANNELS)
    assert [record.views for record in data.records] == [6, 6, 6] and all(r.posed for r in data.records)
    found, item = data.read(1, "structure", "coords", "latents"), structured[1]
    near = np.abs(item["sdf"].astype(np.float32)) * (structured.band / 127) < SURFACE
    volume = np.zeros((RES,) * 3, np.float32)
    volume[tuple(item["coords"][near].T.astype(int))] = 1
    upright = np.ascontiguousarray(published_volume(volume))
    assert np.array_equal(found["coords"].numpy(), np.argwhere(upright))
    bundle = load_bundle(made / "bundle")
    encoder = bundle.network("structure_encoder")
    assert torch.equal(found["structure"], encoder(torch.from_numpy(upright)[None, None])[0])
    # Features by place, whatever the order of the rows.
    feats = torch.zeros(*(RES,) * 3, COND_CHANNELS)
    feats[tuple(torch.from_numpy(published_coords(item["coords"].astype(int), RES)).t())] = torch.from_numpy(
        item["features"].astype(np.float32)
    )
    coords = torch.nn.functional.pad(found["coords"].int(), (1, 0))
    x = SparseTensor(feats[tuple(found["coords"].long().t())], coords, 1, RES)
    torch.testing.assert_close(found["latents"], bundle.network("slat_encoder")(x).feats, atol=1e-6, rtol=1e-6)


def test_statistics_are_those_of_the_training_latents(cache) -> None:
    data = CachedData(cache, "train", "latents")
    every = torch.cat([data.read(i, "latents")["latents"] for i in range(len(data))])
    assert data.statistics is not None
    torch.testing.assert_close(data.statistics[0], every.mean(dim=0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(data.statistics[1], every.std(dim=0, unbiased=False), atol=1e-5, rtol=1e-5)


def test_pictures_show_the_rig_first_and_then_the_object_from_anywhere(cache) -> None:
    data = CachedData(cache, "validation", "images")
    images = data.views(0, "images", [0, 1, 2, 3])
    assert images.shape == (4, 4, 32, 32) and data.views(0, "azimuths", [0, 1, 2, 3]).tolist() == [0, 90, 180, 270]
    covered = (images[:, 3] > 127).float().mean(dim=(1, 2))
    assert covered[0] == pytest.approx(float(covered[2]), abs=0.02) and covered[0] > 1.3 * covered[1]  # a long box
    cameras = condition_cameras(400, np.random.default_rng(0))
    fovs, heights = [c.fov_deg for c in cameras[4:]], [c.elevation_deg for c in cameras[4:]]
    assert (
        10 <= min(fovs) < 12
        and 60 < max(fovs) <= 70
        and np.sin(np.deg2rad(heights)).std() == pytest.approx(0.57, abs=0.04)
    )
    for camera in cameras[4:]:  # the object's sphere just fits
        assert np.sin(np.deg2rad(camera.fov_deg / 2)) * camera.radius == pytest.approx(np.sqrt(3) / 2)


def test_a_stopped_call_goes_on_and_parts_share_the_work(made, cache, tmp_path, capsys) -> None:
    whole = {path.name: load_file(path) for path in sorted((cache / "objects").iterdir())}
    shutil.copytree(cache, tmp_path / "again")
    objects = sorted((tmp_path / "again" / "objects").iterdir())
    objects[0].write_bytes(objects[0].read_bytes()[:-9])
    objects[1].unlink()
    kept = objects[2].stat().st_mtime_ns
    assert main(_command(made, tmp_path / "again")) == 0
    assert "4 objects" in (said := capsys.readouterr().out) and "2 of them new, 0 skipped" in said
    assert objects[2].stat().st_mtime_ns == kept
    for part in ("0/2", "1/2"):
        assert main(_command(made, tmp_path / "parts", "--part", part)) == 0
        assert "2 of them new" in capsys.readouterr().out and not (tmp_path / "parts" / "index.json").exists()
    assert main(_command(made, tmp_path / "parts")) == 0
    assert "0 of them new" in capsys.readouterr().out
    assert (tmp_path / "parts" / "index.json").read_text() == (cache / "index.json").read_text()
    for folder in ("again", "parts"):
        for name, arrays in whole.items():
            found = load_file(tmp_path / folder / "objects" / name)
            assert found.keys() == arrays.keys() and all(torch.equal(found[key], arrays[key]) for key in found)
    assert main(_command(made, tmp_path / "parts", "--image-size", "16")) == 0  # made otherwise: all anew
    assert "4 of them new" in capsys.readouterr().out


def test_without_meshes_the_prepared_views_are_used(made, cache, tmp_path) -> None:
    assert main(_command(made, tmp_path / "views", "--no-structured", sources=False)) == 0
    data, other = (CachedData(folder, "train", "images") for folder in (tmp_path / "views", cache))
    assert [record.views for record in data.records] == [4, 4, 4] and data.statistics is None
    assert torch.equal(data.read(0, "structure")["structure"], other.read(0, "structure")["structure"])
    alpha = [cached.views(0, "images", [0, 1, 2, 3])[:, 3].float() / 255 for cached in (data, other)]
    assert (alpha[0] - alpha[1]).abs().mean() < 0.02  # edges; a wrong view: .1 and more


def test_what_cannot_be_encoded_is_named(made, tmp_path, capsys) -> None:
    shutil.copytree(made / "meshes", tmp_path / "meshes")
    write_mesh(_box((0.5, 0.1, 0.1)), tmp_path / "meshes" / "box_2.ply")
    command = _command(made, tmp_path / "out")
    command[2] = str(tmp_path / "meshes")
    assert main(command) == 0
    assert "box_2.ply has changed since it was prepared" in capsys.readouterr().out
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert len(index["records"]) == 3 and index["skipped"][0]["reason"].startswith("TriptychError: box_2.ply")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--features", "dinov2"], "no features 'dinov2' in the split 'train'"),
        (["--views", "3"], "--views must be at least 4, got 3"),
        (["--part", "2/2"], "give I/N with I from 0 to N - 1"),
        (["--image-encoder", "tests.nowhere:it"], "no module 'tests.nowhere'"),
    ],
)
def test_wrong_arguments_are_one_sentence(made, tmp_path, capsys, more, message) -> None:
    assert main(_command(made, tmp_path / "out", *more)) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_raw_tokens_are_those_of_the_conditions_before_their_norm() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, num_register_tokens=4
    )
    encoder = ImageEncoder(transformers.Dinov2WithRegistersModel(config).eval())
    pictures = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        raw = raw_tokens(encoder)(pictures)
        torch.testing.assert_close(torch.nn.functional.layer_norm(raw, raw.shape[-1:]), encoder(pictures))
        assert (raw - encoder(pictures)).abs().max() > 0.1
    assert token_extractor(HERE + "tokens", CPU)(torch.rand(1, 3, SIDE, SIDE)).shape == (1, 21, COND_CHANNELS)


# ---- training from it


@pytest.mark.parametrize("recipe", [structure_flow_large, slat_flow_large, large_multiview_lora])
def test_the_large_recipes_train_from_it(recipe, made, cache, tmp_path) -> None:
    config = recipe()
    changes: dict = {"data": str(cache), "validation_objects": 1}
    if recipe is large_multiview_lora:
        lifting = LiftingConfig(image_size=32, encoder_channels=(8, 16), encoder_blocks=(1, 1), lift_channels=16)
        changes |= {"bundle": str(made / "bundle"), "rank": 4, "base": "fp32", "lifting": lifting}
    else:
        changes |= {"start": str(made / "bundle"), "model_channels": 32, "num_blocks": 2, "num_heads": 2}
        changes |= {"mlp_ratio": 2.0, "cond_channels": COND_CHANNELS}
        changes |= {"resolution": 4} if recipe is structure_flow_large else {"resolution": 16, "io_channels": 16}
    config = dataclasses.replace(
        config, task_config=dataclasses.replace(config.task_config, **changes), steps=2, batch_size=2, accumulation=1,
        workers=0, validate_every=2, log_every=1, precision="fp32", tensorboard=False, memory_target=0.0, groups=(),
        max_cost=4000 if config.max_cost else 0, warmup_steps=0,
    )  # fmt: skip
    train(config, tmp_path / "run", device="cpu")
    export(tmp_path / "run", tmp_path / "out", device="cpu")
    component = "slat_flow" if recipe is slat_flow_large else "structure_flow"
    network = load_bundle(tmp_path / "out").network(component)
    before = load_bundle(made / "bundle").network(component).state_dict()
    state = network.state_dict()
    assert any(not torch.equal(state[key].float(), value.float()) for key, value in before.items())
    if recipe is slat_flow_large:
        fresh = build_task(dataclasses.replace(config, task_config=dataclasses.replace(config.task_config, start=None)))
        fresh.setup(CPU)
        assert torch.equal(fresh.mean, CachedData(cache, "train", "latents").statistics[0])


def test_files_say_how_they_were_made(cache) -> None:
    path = next((cache / "objects").iterdir())
    with safe_open(str(path), framework="pt") as handle:
        assert len(handle.metadata()["identity"]) == 64
    made = json.loads((cache / "index.json").read_text())["made"]
    assert (
        made["meshes"] is True and made["views"] == 6 and set(made["networks"]) == {"structure_encoder", "slat_encoder"}
    )


def test_coordinates_turn_like_volumes() -> None:
    volume = np.random.default_rng(0).random((8, 8, 8)) > 0.7
    turned = np.zeros_like(volume)
    turned[tuple(published_coords(np.argwhere(volume), 8).T)] = True
    assert np.array_equal(turned, published_volume(volume))
