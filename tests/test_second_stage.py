"""The second stage from prepared meshes to a textured mesh: structure, predict, train both, export, reconstruct."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import make_field_bundle

from trainer.config import ParameterGroup
from trainer.join import join_bundles
from trainer.loop import export, train
from trainer.prepare.build import BuildOptions
from trainer.prepare.predicted import PredictedFields, predict
from trainer.prepare.run import prepare
from trainer.prepare.sources import find_sources
from trainer.prepare.structured import structure
from trainer.recipes import build_recipe
from trainer.tasks.slat_flow import SlatFlowConfig, SlatFlowTask, symmetric_view
from trainer.tasks.slat_vae import SlatVaeConfig
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import rig_cameras
from triptych.geometry.flexicubes_field import features_to_closed_mesh, lattice_background
from triptych.images.views import prepare_views
from triptych.models.lifting import PosedViews
from triptych.models.slat_lifting import LiftedSLatFlow, first_depth, neighbourhood
from triptych.pipelines.reconstruct import Settings, mesh_from_views
from triptych.pipelines.structured import active_voxels
from triptych.procedural import sample_views
from triptych.sparse.tensor import SparseTensor

FLOW = dict(
    resolution=16, in_channels=4, out_channels=4, model_channels=32, cond_channels=24, num_blocks=1, num_heads=2,
    patch_size=2, num_io_res_blocks=1, io_block_channels=[16], share_mod=True, image_size=32,
    encoder_channels=(8, 16), encoder_blocks=(1, 1),
)  # fmt: skip


def ball(resolution: int, radius: float = 0.35) -> torch.Tensor:
    """A field in voxels, positive inside."""
    axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
    return (radius - torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)) * resolution


def shell(field: torch.Tensor, samples: int = 1, channels: int = 4) -> SparseTensor:
    rows = (field.abs() < 1).nonzero().int()
    coords = torch.cat([torch.cat([torch.full_like(rows[:, :1], b), rows], dim=1) for b in range(samples)])
    feats = torch.randn(len(coords), channels, generator=torch.Generator().manual_seed(0))
    return SparseTensor(feats, coords, samples, len(field))


def lifted() -> LiftedSLatFlow:
    torch.manual_seed(0)
    model = LiftedSLatFlow(**FLOW).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


def posed(counts: tuple[int, ...], size: int = 32) -> PosedViews:
    generator = torch.Generator().manual_seed(1)
    cameras = [camera for count in counts for camera in rig_cameras()[:count]]
    return PosedViews(torch.rand(len(cameras), 4, size, size, generator=generator), tuple(cameras), counts)


# ---- the network


def test_samples_of_a_batch_do_not_see_each_other():
    model, field = lifted(), ball(16)
    both, views = shell(field, 2), posed((3, 1))
    fields = torch.stack([field, field.roll(1, 0)])
    t = torch.tensor([900.0, 500.0])
    together = model(both, t, model.condition(views, both, fields))
    first = posed((3,))
    alone = both.sample(0)
    apart = model(alone, t[:1], model.condition(first, alone, fields[:1]))
    torch.testing.assert_close(together.feats[both.layout[0]], apart.feats, atol=1e-5, rtol=1e-5)


def test_the_order_of_the_views_does_not_matter_and_each_view_does():
    model, field = lifted(), ball(16)
    x, views = shell(field), posed((4,))
    t = torch.tensor([1000.0])
    order = [2, 0, 3, 1]
    turned = PosedViews(views.images[order], tuple(views.cameras[i] for i in order), (4,))
    found = model(x, t, model.condition(views, x, field[None])).feats
    torch.testing.assert_close(model(x, t, model.condition(turned, x, field[None])).feats, found, atol=1e-5, rtol=1e-5)
    for i in range(4):
        images = views.images.clone()
        images[i] = 1 - images[i]
        other = model(x, t, model.condition(PosedViews(images, views.cameras, (4,)), x, field[None])).feats
        assert (other - found).abs().max() > 1e-4


def test_without_pictures_only_the_field_is_left():
    model, field = lifted(), ball(16)
    x = shell(field, 2)
    views, fields = posed((2, 2)), torch.stack([field, field])
    other = PosedViews(1 - views.images, views.cameras, views.counts)
    t = torch.tensor([700.0, 700.0])
    null = model(x, t, model.condition(views, x, fields).null()).feats
    torch.testing.assert_close(model(x, t, model.condition(other, x, fields).null()).feats, null)
    half = model.condition(views, x, fields).without(torch.tensor([True, False]))
    found = model(x, t, half).feats
    torch.testing.assert_close(found[x.layout[0]], null[x.layout[0]], atol=1e-6, rtol=1e-6)
    assert (found[x.layout[1]] - null[x.layout[1]]).abs().max() > 1e-4


def test_a_voxel_behind_another_is_told_so():
    grid = torch.tensor([[0.1, 0.1], [0.1, 0.1], [-0.5, 0.3]])
    depth = torch.tensor([1.0, 1.5, 2.0])
    torch.testing.assert_close(first_depth(grid, depth, 16), torch.tensor([1.0, 1.0, 2.0]))


def test_the_neighbourhood_is_that_of_the_field():
    field = torch.arange(27.0).view(1, 3, 3, 3) / 13 - 1
    x = SparseTensor(torch.zeros(2, 1), torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.int32), 1, 3)
    around = neighbourhood(x, field)
    torch.testing.assert_close(around[0], field.flatten() / 2)
    corner = around[1].view(3, 3, 3)
    torch.testing.assert_close(corner[1:, 1:, 1:], field[0, :2, :2, :2] / 2)
    assert (corner[0] == -1).all() and (corner[:, 0] == -1).all() and (corner[..., 0] == -1).all()


def test_sizes_that_disagree_are_said():
    model, field = lifted(), ball(16)
    with pytest.raises(ValueError, match="expected \\(N, 4, 32, 32\\)"):
        model.condition(posed((1,), 48), shell(field), field[None])
    with pytest.raises(ValueError, match="2 sets of views, 1 sets of voxels"):
        model.condition(posed((1, 1)), shell(field), field[None])


# ---- from features to a closed mesh


def plane_features(coords: torch.Tensor, field_at, resolution: int) -> torch.Tensor:
    """Decoder features whose corners hold ``field_at`` (positions -> signed, negative inside), and nothing else."""
    from triptych.geometry.flexicubes_tables import CORNERS

    corners = (coords[:, None] + CORNERS) / resolution - 0.5
    feats = torch.zeros(len(coords), 101)
    feats[:, :8] = field_at(corners) + 1 / resolution
    return feats


def test_a_band_of_cubes_in_a_field_gives_one_closed_sheet():
    """The same ball fine in a band and coarse elsewhere: watertight, one component, as round as the fine one."""
    import trimesh

    field, side = ball(32), 64
    rows = torch.from_numpy(active_voxels(field.numpy(), 1.0))
    fine = (rows[:, None] * 2 + torch.cartesian_prod(*[torch.arange(2)] * 3)).flatten(0, 1)
    feats = plane_features(fine, lambda p: (p.norm(dim=-1) - 0.35) * 16, side)
    background = (lattice_background(field, side) / 2).clamp(-1, 1)
    assert background.shape == (65, 65, 65) and background[0].min() > 0
    found = features_to_closed_mesh(fine, feats, side, background)
    mesh = trimesh.Trimesh(found.vertices.numpy(), found.faces.numpy(), process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.body_count == 1
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.35**3, rel=0.01)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert np.abs(radius - 0.35).max() < 0.3 / side
    np.testing.assert_allclose(found.vertex_attrs.numpy(), 0.5, atol=1e-6)


def test_the_background_is_the_field_between_voxel_centres():
    field = torch.zeros(4, 4, 4) + torch.arange(4.0)[:, None, None]
    out = -lattice_background(field, 8)
    # Vertex i of 8 lies at voxel coordinate i / 2 - 1/2; outside of the outer centres the field falls to -1.
    torch.testing.assert_close(out[1:8, 4, 4], torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]))
    torch.testing.assert_close(out[0, 4, 4], torch.tensor(-0.5))
    assert out[4, 0, 4] < out[4, 1, 4]


def test_structures_out_of_bounds_are_refused():
    with pytest.raises(TriptychError, match="nothing solid"):
        active_voxels(np.full((8, 8, 8), -2.0), 1.0)
    checkers = np.indices((64, 64, 64)).sum(axis=0) % 2 - 0.5
    with pytest.raises(TriptychError, match="262,144 active voxels, 100,000 are allowed"):
        active_voxels(checkers, 1.0)


def test_a_flat_field_has_active_voxels_at_its_change_of_sign_only():
    field = ball(64).numpy() * 0.02  # within the band almost everywhere
    coords = active_voxels(field, 0.95)
    distance = np.abs(np.linalg.norm((coords + 0.5) / 64 - 0.5, axis=1) - 0.35) * 64
    assert distance.max() < 2.5 and len(coords) < 30_000
    changes = (field > 0)[1:] != (field > 0)[:-1]
    found = np.zeros((64, 64, 64), bool)
    found[tuple(coords.T)] = True
    assert found[1:][changes].all() and found[:-1][changes].all()


# ---- training


@pytest.mark.parametrize("symmetry", range(8))
def test_views_follow_the_symmetries(symmetry):
    from trainer.data import mirrored, quarter_turn

    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 2, 2, 4), np.uint8)
    item = {"albedo": pictures, "normal": np.zeros((4, 2, 2, 3), np.uint8), "sdf": np.zeros((2, 2, 2), np.int8)}
    item = quarter_turn(item, symmetry % 4)
    if symmetry >= 4:
        item = mirrored(item)
    for view in range(4):
        assert item["albedo"][symmetric_view(view, symmetry), 0, 0, 0] == view


@pytest.fixture(scope="module")
def data(tmp_path_factory, data_dir) -> Path:
    """A few objects with second-stage arrays and fields of a first stage that says all is solid within the views."""
    folder = tmp_path_factory.mktemp("second")
    sources = find_sources([data_dir], ("train",), None, None)[:30:5]
    prepare(sources, folder / "data", BuildOptions(yaws=1), workers=0)
    index = json.loads((folder / "data" / "index.json").read_text())
    for number, record in enumerate(index["records"]):  # six objects seldom fall into both splits
        record["split"] = "validation" if number % 3 == 0 else "train"
    (folder / "data" / "index.json").write_text(json.dumps(index))
    structure(folder / "data", sources, workers=0)
    make_field_bundle(folder / "first")
    assert predict(folder / "data", load_bundle(folder / "first"), sets=2) == len(
        [r for r in index["records"] if r["status"] == "ok"]
    )
    return folder


def test_predicted_fields_are_those_of_the_pipeline(data):
    fields = PredictedFields(data / "data")
    (shard, row), *_ = fields.places
    field, views = fields.get(shard, row, 0)
    assert views == [0, 1, 2, 3] and field.shape == (64, 64, 64) and field.dtype == np.int8
    assert field.max() == 127 and field.min() == -127  # solid inside of all outlines, empty outside
    stamp = {path: path.stat().st_mtime_ns for path in (data / "data" / "predicted").iterdir()}
    predict(data / "data", load_bundle(data / "first"), sets=2)
    assert {path: path.stat().st_mtime_ns for path in (data / "data" / "predicted").iterdir()} == stamp


def test_a_second_stage_is_trained_exported_and_used(data):
    small = {"validate_every": 2, "pictures_every": 2, "steps": 2, "batch_size": 2, "warmup_steps": 1, "workers": 0}
    vae = replace(
        build_recipe("slat_vae_tiny"),
        task_config=SlatVaeConfig(
            data=str(data / "data"), encoder_channels=24, encoder_blocks=1, encoder_heads=2, decoder_channels=32,
            decoder_blocks=1, decoder_heads=2, upsample_channels=(16,), max_voxels=800, points=256,
            validation_objects=1,
        ),
        **small,
    )  # fmt: skip
    train(vae, data / "vae", device="cpu")
    export(data / "vae", data / "vae-bundle", device="cpu")
    flow = replace(
        build_recipe("slat_flow_tiny"),
        task_config=SlatFlowConfig(
            data=str(data / "data"), vae=str(data / "vae-bundle"), structure=str(data / "first"), model_channels=32,
            num_blocks=1, num_heads=2, io_channels=16, cond_channels=32, encoder_channels=(16, 24),
            encoder_blocks=(1, 1), max_voxels=800, validation_objects=1,
        ),
        groups=(ParameterGroup("view_encoder.*", lr_factor=0.1, thaw_step=1),),
        **small,
    )  # fmt: skip
    task = SlatFlowTask(flow.task_config)
    lent = load_bundle(data / "first").network("structure_flow").view_encoder.state_dict()
    for key, value in task.build_model().view_encoder.state_dict().items():
        torch.testing.assert_close(value, lent[key])
    train(flow, data / "flow", device="cpu")
    export(data / "flow", data / "second", device="cpu")
    task.setup(torch.device("cpu"))
    task.fields.get = lambda shard, row, number: (np.full((64,) * 3, -127, np.int8), [0, 1, 2, 3])  # nothing inside
    model = task.build_model()
    assert task.validate(model) == {"latent_error": 1, "chamfer": 1, "chamfer_first": 1, "loss": 1}
    assert task.pictures(model).size[0] > 0
    second = load_bundle(data / "second")
    assert second.manifest.provenance["slat_vae"]["step"] == 2
    join_bundles([load_bundle(data / "first"), second], data / "whole")
    bundle = load_bundle(data / "whole")
    bundle.verify()
    assert bundle.name == "whole"
    assert set(bundle.manifest.components) == {"structure_flow", "slat_flow", "slat_decoder_mesh"}
    assert bundle.manifest.sampling["voxels_per_unit"] == 2.0 and bundle.manifest.sampling["active_band"] == 0.95
    assert bundle.manifest.provenance["slat_flow"]["step"] == 2
    with pytest.raises(TriptychError, match="both have a slat_flow: leave one out"):
        join_bundles([second, second], data / "twice")
    with pytest.raises(TriptychError, match="is not empty"):
        join_bundles([second], data / "whole")
    views = prepare_views(sample_views(128), size=128)
    found = mesh_from_views(views, bundle, Settings(texture_size=0, ensemble=1, target_faces=4000))
    assert found.settings.second_stage and set(found.timings_s) == {"structure", "latents", "surface", "texture"}
    low, high = found.mesh.bounds
    assert (high - low).max() == pytest.approx(1, abs=0.1)
    plain = mesh_from_views(views, bundle, Settings(texture_size=0, ensemble=1, second_stage=False))
    assert set(plain.timings_s) == {"structure", "surface", "texture"}
    with pytest.raises(TriptychError, match="has no second stage"):
        mesh_from_views(views, load_bundle(data / "first"), Settings(second_stage=True))
