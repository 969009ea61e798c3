"""From a folder of meshes to a textured OBJ, with networks trained on the way: every part once, at its smallest."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.__main__ import main as trainer_main
from trainer.loop import export, train
from trainer.recipes import build_recipe
from trainer.tasks.structure_flow import StructureFlowConfig
from trainer.tasks.structure_vae import StructureVaeConfig
from triptych.bundles.bundle import load_bundle
from triptych.geometry.files import read_mesh, write_obj
from triptych.images.views import prepare_views
from triptych.pipelines.reconstruct import Settings, mesh_from_views
from triptych.procedural import sample_views
from triptych.sampling.flow_euler import Cancelled


@pytest.fixture(scope="module")
def trained(boxes_and_balls, tmp_path_factory) -> Path:
    """A bundle whose networks saw a few steps: nothing it says is true, but every file and shape is."""
    runs = tmp_path_factory.mktemp("runs")
    small = {"validate_every": 4, "pictures_every": 4, "steps": 4, "batch_size": 4, "warmup_steps": 1, "log_every": 1}
    vae = replace(
        build_recipe("structure_vae_tiny"),
        task_config=StructureVaeConfig(
            data=str(boxes_and_balls), encoder_channels=(4, 8, 8), decoder_channels=(8, 8, 4), validation_objects=2
        ),
        **small,
    )
    train(vae, runs / "vae", device="cpu")
    export(runs / "vae", runs / "vae-bundle", device="cpu")
    flow = replace(
        build_recipe("structure_flow_tiny"),
        task_config=StructureFlowConfig(
            data=str(boxes_and_balls), vae=str(runs / "vae-bundle"), model_channels=48, num_blocks=1, num_heads=4,
            image_size=64, encoder_channels=(8, 16), encoder_blocks=(1, 1), validation_objects=2,
        ),
        **small,
    )  # fmt: skip
    train(flow, runs / "flow", device="cpu")
    export(runs / "flow", runs / "tiny", device="cpu")
    assert list((runs / "flow" / "pictures").glob("*.png"))
    return runs / "tiny"


def test_bundle_says_where_it_comes_from(trained):
    bundle = load_bundle(trained)
    bundle.verify()
    assert set(bundle.manifest.components) == {"structure_flow", "structure_decoder"}
    assert bundle.manifest.provenance["step"] == 4
    assert bundle.manifest.provenance["structure_vae"]["step"] == 4


def test_a_flow_on_the_field_needs_no_decoder(boxes_and_balls, tmp_path):
    """Without a VAE the flow's blocks are the field: a bundle of one network, told by its bias that all is inside."""
    flow = replace(
        build_recipe("structure_flow_tiny"),
        task_config=StructureFlowConfig(
            data=str(boxes_and_balls), model_channels=48, num_blocks=1, num_heads=4, image_size=64,
            encoder_channels=(8, 16), encoder_blocks=(1, 1), validation_objects=2,
        ),
        steps=2, batch_size=2, warmup_steps=1, validate_every=2, pictures_every=2,
    )  # fmt: skip
    train(flow, tmp_path / "run", device="cpu")
    export(tmp_path / "run", tmp_path / "field", device="cpu")
    bundle = load_bundle(tmp_path / "field")
    assert set(bundle.manifest.components) == {"structure_flow"}
    with torch.no_grad():
        bundle.network("structure_flow").out_layer.bias.fill_(1.0)
    views = prepare_views(sample_views(128), size=128)
    mesh = mesh_from_views(views, bundle, Settings(texture_size=0, ensemble=2)).mesh
    low, high = mesh.bounds
    assert (high - low).max() == pytest.approx(1, abs=0.05)


def test_a_real_task_resumes_bit_for_bit(boxes_and_balls, tmp_path):
    """Four steps at once, and two and two, of the lifted flow in bfloat16: the same weights to the last bit."""
    config = replace(
        build_recipe("structure_flow_tiny"),
        task_config=StructureFlowConfig(
            data=str(boxes_and_balls), model_channels=48, num_blocks=1, num_heads=4, image_size=64,
            encoder_channels=(8, 16), encoder_blocks=(1, 1), validation_objects=1,
        ),
        schedule="constant", batch_size=3, warmup_steps=1, validate_every=0, pictures_every=0, tensorboard=False,
    )  # fmt: skip
    train(replace(config, steps=4), tmp_path / "whole", device="cpu")
    train(replace(config, steps=2), tmp_path / "parts", device="cpu")
    assert trainer_main(["resume", str(tmp_path / "parts"), "--device", "cpu", "--set", "steps=4"]) == 0
    files = [tmp_path / run / "checkpoints" / "step_0000004" / "model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def solid_bundle(folder: Path):
    """The trained bundle, with a decoder that says "inside" so that the silhouettes alone shape the mesh."""
    bundle = load_bundle(folder)
    with torch.no_grad():
        bundle.network("structure_decoder").out_layer[2].weight.zero_()
        bundle.network("structure_decoder").out_layer[2].bias.fill_(3.0)
    return bundle


def test_views_to_textured_obj(trained, tmp_path):
    views = prepare_views(sample_views(256), size=256)
    seen = []
    bundle = solid_bundle(trained)
    settings = Settings(steps=2, texture_size=128, target_faces=3000)
    result = mesh_from_views(views, bundle, settings, progress=lambda stage, share: seen.append((stage, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0 and {stage for stage, _ in seen} == set(result.timings_s)
    write_obj(result.mesh, tmp_path / "toy.obj")
    assert {path.name for path in tmp_path.iterdir()} == {"toy.obj", "toy.mtl", "toy_albedo.png"}
    mesh = read_mesh(tmp_path / "toy.obj")
    assert mesh.materials[0].base_color_texture.shape[:2] == (128, 128)
    low, high = mesh.bounds
    assert (high - low).max() == pytest.approx(1, abs=0.03)
    again = mesh_from_views(views, bundle, settings)
    assert np.array_equal(again.mesh.vertices, result.mesh.vertices)
    uncut = mesh_from_views(views, bundle, replace(settings, keep_silhouettes=False))
    assert not np.array_equal(result.field, uncut.field)


def test_nothing_leaves_the_silhouettes(trained):
    """Every vertex projects onto each view's mask, grown by two pixels of 256."""
    from scipy import ndimage

    views = prepare_views(sample_views(256), size=256)
    mesh = mesh_from_views(views, solid_bundle(trained), Settings(steps=1, texture_size=0, target_faces=0)).mesh
    for mask, camera in zip(views.masks, views.cameras, strict=True):
        grown = ndimage.binary_dilation(mask.numpy() > 0.5, iterations=2)
        ndc = camera.project(torch.from_numpy(mesh.vertices))[0].numpy()
        column, row = ((ndc * [1, -1] + 1) * 128).astype(int).clip(0, 255).T
        assert grown[row, column].mean() > 0.995


def test_cancel_between_steps(trained):
    views = prepare_views({"front": sample_views(128)["front"]}, size=128)
    calls = []
    with pytest.raises(Cancelled):
        stop = Settings(steps=5)
        mesh_from_views(views, load_bundle(trained), stop, cancel=lambda: calls.append(1) or len(calls) > 3)
    assert len(calls) == 4
