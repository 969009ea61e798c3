"""The tasks slat_vae and mesh_decoder: they learn, validate, draw, export and are pure functions of (index, seed)."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from test_structured_data import RES, _box, _field

from trainer.losses import LossWeights, WeightConfig
from trainer.prepare.structured import FOLDER, ragged, structure_sample
from trainer.recipes_slat import (
    mesh_decoder_large,
    mesh_decoder_staged,
    mesh_decoder_tiny,
    slat_vae_large,
    slat_vae_learned,
    slat_vae_tiny,
)
from trainer.structured import draw_sample, join_samples
from trainer.tasks.mesh_decoder import MeshDecoderConfig, MeshDecoderTask
from trainer.tasks.mesh_supervision import (
    direct_losses,
    drawn_views,
    lattice_of,
    outer_mesh,
    rendered_losses,
    true_mesh,
    two_sided_distance,
)
from trainer.tasks.slat_vae import DIRECT_WEIGHTS, SlatVaeConfig, SlatVaeTask
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import rig_cameras
from triptych.render.views import render_views
from triptych.sparse.spatial import subdivide
from triptych.sparse.tensor import SparseTensor

CPU = torch.device("cpu")
SMALL = {
    "encoder_channels": 32,
    "encoder_blocks": 1,
    "encoder_heads": 2,
    "decoder_channels": 32,
    "decoder_blocks": 1,
    "decoder_heads": 2,
    "upsample_channels": (16,),
    "points": 256,
    "max_voxels": 400,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_boxes(tmp_path_factory.mktemp("slat"))


def write_boxes(root):
    """Two training boxes and a held-out one, prepared by hand."""
    records, samples, views = [], [], {"albedo": [], "normal": [], "sdf": []}
    for number, split in enumerate(("train", "train", "validation")):
        mesh = _box((0.5, 0.2 + 0.05 * number, 0.3))
        sdf = _field(mesh)
        samples.append(structure_sample(mesh, sdf, 2.0))
        drawn = render_views(mesh, rig_cameras(), 32)
        rgba = torch.cat([drawn.albedo, drawn.alpha], 1).permute(0, 2, 3, 1)
        views["albedo"].append((rgba * 255 + 0.5).to(torch.uint8).numpy())
        views["normal"].append(((drawn.normal.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).to(torch.uint8).numpy())
        views["sdf"].append(sdf)
        record = {"key": f"box {number}", "name": "box", "category": "", "licence": "CC0", "attribution": ""}
        records.append(record | {"status": "ok", "split": split, "shard": "shard_00000", "rows": [number]})
    for folder in ("shards", FOLDER):
        (root / folder).mkdir()
    stacked = {key: np.ascontiguousarray(np.stack(value)) for key, value in views.items()}
    save_file(stacked, str(root / "shards" / "shard_00000.safetensors"))
    save_file(ragged(samples, [0, 1, 2]), str(root / FOLDER / "shard_00000.safetensors"))
    (root / FOLDER / "shard_00000.json").write_text(json.dumps({"format": 1, "rows": [0, 1, 2], "skipped": []}))
    options = {"resolution": RES, "sdf_band": 2.0, "view_size": 32}
    (root / "index.json").write_text(json.dumps({"options": options, "records": records}))
    return root


def _task(data, **changes):
    task = SlatVaeTask(SlatVaeConfig(data=str(data), **(SMALL | changes)))
    torch.manual_seed(0)
    model = task.build_model()
    task.setup(CPU)
    return task, model


def _perfect(batch, resolution=RES, channels=101):
    """The decoder's features that describe the true lattice."""
    from trainer.structured import corner_places

    x = SparseTensor(torch.zeros(len(batch["coords"]), 1), batch["coords"], len(batch["lengths"]), resolution)
    fine = subdivide(x)
    feats = torch.zeros(len(fine), channels)
    feats[:, :8] = batch["target"][batch["rows"][:, corner_places(1)]].flatten(0, 1) + 1 / (2 * resolution)
    return fine.replace(feats)


def _whole(task, number=0, symmetry=0):
    item = task.data[number]
    options = {"tau": (1.2, 1.2), "perturbation": 0.0, "symmetry": symmetry, "points": 4096}
    return item, draw_sample(item, RES, 2.0, np.random.default_rng(0), **options)


def test_the_true_lattice_has_no_direct_loss_and_gives_the_true_mesh(data):
    task, _ = _task(data)
    item, sample = _whole(task)
    batch = join_samples([sample, sample])
    out = _perfect(batch)
    lattice = lattice_of(out, batch["rows"], len(batch["target"]))
    losses = direct_losses(lattice, batch)
    assert losses["sdf"] < 1e-5 and losses["consistency"] < 1e-6 and losses["surface"] < 0.1
    coords = out.sample(0).coords[:, 1:]
    mesh = outer_mesh(true_mesh(coords, 1, batch, 2 * RES), coords, 2 * RES)
    assert np.abs(mesh.vertices).max() < 0.51
    # The band's inner rim has no surface: nothing lies deep inside the box.
    assert np.abs(mesh.vertices / np.array([0.5, 0.2, 0.3])).max(axis=1).min() > 0.9
    assert two_sided_distance(mesh, item["points"] / 65534, mesh, samples=20_000) < 0.012


def test_rendered_losses_of_the_true_mesh_are_small_under_every_symmetry(data):
    task, _ = _task(data)
    weights = LossWeights(WeightConfig(weights=dict.fromkeys(("mask", "normal", "depth", "cubes"), 1.0)))
    for symmetry in (0, 1, 6):
        _, sample = _whole(task, symmetry=symmetry)
        sample |= drawn_views(task.data.views(0), symmetry, [0, 1])
        batch = join_samples([sample])
        out = _perfect(batch)
        out = out.replace(out.feats.requires_grad_())
        losses = rendered_losses(out, batch, weights, 0, 0.0, 0.0)
        assert losses["mask"] < 0.03 and losses["normal"] < 0.05 and losses["depth"] < 1e-3, symmetry
    losses["mask"].backward()
    assert out.feats.grad[:, :8].abs().sum() > 0
    late = LossWeights(WeightConfig(weights={"mask": 1.0}, schedules={"mask": [(10, 0.0), (11, 1.0)]}))
    assert rendered_losses(out, batch, late, 5, 0.0, 0.0) == {}


def test_samples_are_functions_of_index_and_seed(data):
    task, _ = _task(data)
    first, again, other = task.sample(0, 3), task.sample(0, 3), task.sample(0, 4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["eps"], other["eps"])
    assert first["count"] == len(first["coords"]) <= 400


def test_slat_vae_learns_and_validates(data):
    task, model = _task(data, max_voxels=500, tau=(1.0, 1.0), perturbation=0.0, points=4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    history = []
    for step in range(40):
        batch = task.collate([task.sample(0, step)])
        loss, logged = task.loss(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append({key: float(value) for key, value in logged.items()})
    assert set(DIRECT_WEIGHTS) <= set(history[0])
    assert history[-1]["sdf"] < 0.75 * history[0]["sdf"]
    assert history[-1]["point_color"] < 0.2 * history[0]["point_color"]
    with torch.no_grad():
        measured = task.validate(model.eval())
    assert 0 < measured["chamfer"] <= 1 and 0.5 < measured["sign_accuracy"] <= 1
    assert measured["loss"] == pytest.approx(
        measured["tsdf_error"] + measured["surface_error"] + 2 * measured["color_error"]
    )


def test_two_subdivisions_and_learned_weights(data):
    losses = WeightConfig(mode="learned", weights={"sdf": 1.0, "point_color": 1.0, "kl": 1e-6}, learned=("sdf",))
    task, model = _task(data, upsample_channels=(16, 16), max_voxels=100, losses=losses)
    batch = task.collate([task.sample(0, 0), task.sample(1, 1)])
    loss, logged = task.loss(model, batch, 0)
    loss.backward()
    assert torch.isfinite(loss) and logged["sdf_uncertainty"] == 1
    assert model.loss_weights.log_variance["sdf"].grad.abs() > 0
    assert batch["rows"].shape[1] == 125


def test_export_and_mesh_decoder(data, tmp_path):
    task, model = _task(data)
    with torch.no_grad():
        (tmp_path / "vae").mkdir()
        task.export(model.eval(), tmp_path / "vae", {"run": "test"})
        assert task.pictures(model).size[0] > 0
    bundle = load_bundle(tmp_path / "vae")
    assert set(bundle.manifest.components) == {"slat_encoder", "slat_decoder_mesh"}
    statistics = bundle.manifest.sampling["slat_normalization"]
    assert len(statistics["mean"]) == len(statistics["std"]) == 8 and min(statistics["std"]) > 0

    sizes = {key: value for key, value in SMALL.items() if not key.startswith("encoder")}
    config = MeshDecoderConfig(data=str(data), encoder=str(tmp_path / "vae"), start=True, **sizes)
    config = replace(config, losses=WeightConfig(weights={"sdf": 1.0, "mask": 1.0, "normal": 0.5, "cubes": 0.1}))
    decoder = MeshDecoderTask(config)
    network = decoder.build_model()
    decoder.setup(CPU)
    before = {key: value.clone() for key, value in decoder.encoder.state_dict().items()}
    loss, logged = decoder.loss(network, decoder.collate([decoder.sample(0, 0)]), 0)
    loss.backward()
    assert {"sdf", "mask", "normal", "cubes"} <= set(logged)
    assert all(p.grad is not None for p in network.decoder.upsample.parameters())
    assert all(torch.equal(value, before[key]) for key, value in decoder.encoder.state_dict().items())
    assert all(p.grad is None for p in decoder.encoder.parameters())
    with pytest.raises(TriptychError, match="8 latent channels"):
        MeshDecoderTask(replace(config, latent_channels=4)).setup(CPU)
    with pytest.raises(TriptychError, match="task_config.encoder"):
        MeshDecoderTask(MeshDecoderConfig(data=str(data)))


@pytest.mark.parametrize(
    "recipe",
    [slat_vae_tiny, slat_vae_learned, mesh_decoder_tiny, mesh_decoder_staged, slat_vae_large, mesh_decoder_large],
)
def test_recipes_are_complete(recipe):
    config = recipe()
    assert config.name == recipe.__name__
    LossWeights(config.task_config.losses)
    if recipe is mesh_decoder_large:
        assert config.task_config.losses.weights["depth"] == 10 and config.task_config.perceptual_weight == 0.2
