"""Published bundles from pictures to a mesh: both stages on a small folder of random weights, modes, frames, errors."""

import dataclasses

import numpy as np
import pytest
import torch
from published_folder import COND_CHANNELS, small_network, write_runnable_folder
from torch import nn

from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.models.accelerate import compile_blocks, quantize_blocks
from triptych.models.structure_vae import occupied_coords
from triptych.pipelines import published as pipeline
from triptych.pipelines.memory import network_bytes
from triptych.pipelines.published import PublishedSettings, Sampling, mesh_from_pictures
from triptych.sampling.flow_euler import Cancelled, flow_euler_sample
from triptych.sparse.tensor import SparseTensor

FAST = PublishedSettings(
    structure=Sampling(steps=2), slat=Sampling(steps=2), precision="float32", multi_view="multidiffusion"
)


class ToyEncoder(nn.Module):
    """Mean colours of 4 x 4 tiles, as tokens of the small flows' width."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        tiles = nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(2).transpose(1, 2)
        return tiles.repeat(1, 1, COND_CHANNELS // 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_runnable_folder(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))


def reconstruct(folder, pictures, settings=FAST, **more):
    return mesh_from_pictures(pictures, load_bundle(folder), settings, encoder=ToyEncoder(), **more)


@pytest.fixture(scope="module")
def made(folder, pictures):
    seen: list[tuple[str, float]] = []
    result = reconstruct(folder, pictures[:2], progress=lambda stage, share: seen.append((stage, share)))
    return result, seen


def test_pictures_become_a_coloured_mesh(made):
    result, seen = made
    mesh = result.mesh
    assert len(mesh.faces) > 100
    assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)
    assert np.abs(mesh.vertices).max() < 0.55
    assert mesh.colors.shape == (len(mesh.vertices), 4)
    assert mesh.colors.min() >= 0 and mesh.colors.max() == 1
    assert mesh.colors[:, :3].std() > 0.01
    assert 0 < len(result.coords) < 1500 and result.coords.min() >= 0 and result.coords.max() < 16
    assert list(result.timings_s) == [
        "image encoder",
        "structure",
        "structure decoder",
        "latents",
        "mesh decoder",
        "mesh",
    ]
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert [row.stage for row in result.memory][1::2] == ["structure flow", "latent flow", "mesh"]
    assert all(row.bytes > row.weights for row in result.memory)
    assert (result.settings.structure.guidance, result.settings.slat.rescale_t) == (5.0, 3.0)  # of pipeline.json


def test_a_seed_gives_the_same_mesh_and_the_pictures_matter(folder, pictures, made):
    again = reconstruct(folder, pictures[:2])
    assert np.array_equal(again.mesh.vertices, made[0].mesh.vertices)
    assert np.array_equal(again.mesh.colors, made[0].mesh.colors)
    other = reconstruct(folder, pictures[1:])
    assert other.mesh.vertices.shape != made[0].mesh.vertices.shape
    seeded = reconstruct(folder, pictures[:2], dataclasses.replace(FAST, seed=1))
    assert not np.array_equal(seeded.coords, again.coords)


def test_the_mesh_is_that_of_the_steps_one_by_one(folder, pictures, made):
    """The whole pipeline once more from its parts, with the noise that torch.manual_seed gives."""
    bundle = load_bundle(folder)
    networks = {name: bundle.network(name) for name in pipeline.COMPONENTS}
    views = list(ToyEncoder()(pictures[:2]).split(1))
    negative = torch.zeros_like(views[0])

    def average(flow):
        def velocity(x, t, cond):
            if cond is negative or not isinstance(cond, list):
                return flow(x, t, negative)
            first, second = (flow(x, t, one) for one in cond)
            return (first + second) * 0.5

        return velocity

    how = dict(steps=2, guidance=5.0, guidance_interval=(0.5, 1.0), rescale_t=3.0, cond=views, neg_cond=negative)
    torch.manual_seed(0)
    with torch.no_grad():
        noise = torch.randn(1, 8, 4, 4, 4)
        latent = flow_euler_sample(average(networks["structure_flow"]), noise, **how).samples
        coords = occupied_coords(networks["structure_decoder"](latent))
        x = SparseTensor(torch.randn(len(coords), 8), coords, 1, 16)
        slat = flow_euler_sample(average(networks["slat_flow"]), x, **how).samples
        scale = bundle.slat_normalization
        slat = slat.replace(slat.feats * torch.tensor(scale.std) + torch.tensor(scale.mean))
        features = networks["slat_decoder_mesh"](slat)
    assert np.array_equal(coords[:, 1:].numpy(), made[0].coords)
    mesh = pipeline.mesh_of_features(features)
    np.testing.assert_allclose(mesh.vertices, made[0].mesh.vertices, atol=1e-5)
    assert np.array_equal(mesh.faces, made[0].mesh.faces)


def test_one_picture_is_the_same_in_every_mode(folder, pictures):
    ways = [
        reconstruct(folder, pictures[:1], dataclasses.replace(FAST, multi_view=mode)).mesh.vertices
        for mode in ("stochastic", "multidiffusion", "concat")
    ]
    assert np.array_equal(ways[0], ways[1])
    assert np.array_equal(ways[0], ways[2])


def test_modes_show_the_flow_what_they_say():
    seen: list[torch.Tensor] = []

    class Recorder(nn.Module):
        in_channels, resolution = 1, 2

        def __init__(self):
            super().__init__()
            attention = nn.Module()
            attention.to_kv = nn.Linear(6, 2)
            block = nn.Module()
            block.cross_attn = attention
            self.blocks = nn.ModuleList([block])

        def forward(self, x, t, cond):
            seen.append(cond)
            return torch.zeros_like(x)

    tokens = torch.arange(3 * 4 * 6, dtype=torch.float32).view(3, 4, 6) + 1
    sampling = Sampling(4, 1.0, (0.9, 1.0), 1.0)  # guidance in the first step alone
    expected = {
        "stochastic": [tokens[0:1], None, tokens[1:2], tokens[2:3], tokens[0:1]],
        "multidiffusion": [*tokens.split(1), None, *[one for _ in range(3) for one in tokens.split(1)]],
        "concat": [tokens.reshape(1, 12, 6), None, *[tokens.reshape(1, 12, 6)] * 3],
    }
    for mode, conditions in expected.items():
        seen.clear()
        settings = PublishedSettings(structure=sampling, multi_view=mode)
        pipeline.sample_structure(Recorder(), tokens, settings, torch.Generator())
        wanted = [torch.zeros(1, 4, 6) if cond is None else cond for cond in conditions]
        assert len(seen) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True)), mode


def test_the_mesh_is_turned_once_from_z_up_to_y_up():
    # In the published frame: x = 1 the object's left, -y front, +z up.
    front, top, left = [0.0, -0.4, 0.0], [0.0, 0.0, 0.4], [0.4, 0.0, 0.0]
    turned = pipeline.turned_upright(np.array([front, top, left], dtype=np.float32))
    np.testing.assert_array_equal(turned, np.array([[0, 0, 0.4], [0, 0.4, 0], [0.4, 0, 0]], dtype=np.float32))
    # A tall ball with a nose: what the features describe, whose nose points to -y, ends upright with its nose at +z.
    index = torch.cartesian_prod(*[torch.arange(16)] * 3)
    corner = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
    p = (index[:, None] + corner) / 16 - 0.5
    ball = (p / torch.tensor([0.2, 0.2, 0.4])).norm(dim=-1) - 1
    nose = (p - torch.tensor([0.0, -0.25, 0.0])).norm(dim=-1) / 0.12 - 1
    feats = torch.zeros(len(index), 101)
    feats[:, :8] = torch.minimum(ball, nose) + 1 / 16
    features = SparseTensor(feats, nn.functional.pad(index, (1, 0)).int(), 1, 16)
    mesh = pipeline.mesh_of_features(features)
    low, high = mesh.bounds
    assert high[1] == pytest.approx(0.4, abs=0.03) and low[1] == pytest.approx(-0.4, abs=0.03)
    assert high[2] == pytest.approx(0.37, abs=0.03) and low[2] == pytest.approx(-0.2, abs=0.03)
    a, b, c = (mesh.vertices[mesh.faces[:, i]].astype(np.float64) for i in range(3))
    assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6 > 0.05  # faces look outwards still


def test_progress_can_be_cancelled_between_steps(folder, pictures):
    steps: list[float] = []

    def cancel() -> bool:
        return len(steps) > 2

    with pytest.raises(Cancelled):
        reconstruct(folder, pictures[:1], progress=lambda stage, share: steps.append(share), cancel=cancel)
    assert steps[-1] < 0.5


def test_networks_are_released_unless_they_are_kept(folder, pictures):
    bundle = load_bundle(folder)
    mesh_from_pictures(pictures[:1], bundle, FAST, encoder=ToyEncoder())
    assert bundle._networks == {}
    mesh_from_pictures(pictures[:1], bundle, dataclasses.replace(FAST, keep_loaded=True), encoder=ToyEncoder())
    assert {name for name, _ in bundle._networks} == set(pipeline.COMPONENTS)


def test_half_precision_stays_near(folder, pictures, made):
    settings = dataclasses.replace(FAST, precision="bfloat16")
    coarse = reconstruct(folder, pictures[:2], settings)
    sets = [set(map(tuple, result.coords.tolist())) for result in (coarse, made[0])]
    assert len(sets[0] & sets[1]) / len(sets[0] | sets[1]) > 0.8


def test_decimation_and_settings_of_the_bundle(folder, pictures):
    settings = PublishedSettings(target_faces=500, precision="float32", structure=Sampling(guidance=0.0))
    small = reconstruct(folder, pictures[:1], settings)
    assert len(small.mesh.faces) <= 600
    assert small.mesh.colors is not None
    assert (small.settings.structure.steps, small.settings.structure.guidance) == (3, 0.0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"multi_view": "lifting"}, "was not trained for lifting: use stochastic, multidiffusion, concat"),
        ({"multi_view": "all"}, "unknown multi-view mode 'all'"),
        ({"precision": "int4"}, "unknown precision 'int4'"),
        ({"structure": Sampling(steps=0)}, "steps of structure must be 1-1000, got 0"),
        ({"slat": Sampling(guidance=-1.0)}, "guidance of slat must be 0-100"),
        ({"max_voxels": 0}, "max_voxels must be 1 or more"),
        ({"max_voxels": 10}, r"occupied voxels, more than 10: .*another seed .* or raise max_voxels"),
    ],
)
def test_settings_out_of_range(folder, pictures, changes, sentence):
    with pytest.raises(TriptychError, match=sentence):
        reconstruct(folder, pictures[:1], dataclasses.replace(FAST, **changes))


def test_structures_that_cannot_be_used(folder):
    flow = load_bundle(folder).network("slat_flow")
    settings = dataclasses.replace(FAST, slat=Sampling(1, 0.0, (0.5, 1.0), 3.0))
    tokens, empty = torch.zeros(1, 3, COND_CHANNELS), torch.zeros(0, 4, dtype=torch.int32)
    with pytest.raises(TriptychError, match="no occupied voxel: check the pictures' masks"):
        pipeline.sample_slat(flow, empty, tokens, settings, torch.Generator())
    many = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *[torch.arange(59)] * 3).int()
    big = type("Big", (nn.Module,), dict(in_channels=8, resolution=64, blocks=flow.blocks))()
    with pytest.raises(TriptychError, match="205379 occupied voxels, more than 100000"):
        pipeline.sample_slat(big, many, tokens, settings, torch.Generator())


def test_bundles_that_cannot_be_used(folder, pictures, tmp_path):
    with pytest.raises(TriptychError, match="is not a published one"):
        mesh_from_pictures(pictures, load_bundle(), FAST)
    bundle = load_bundle(folder)
    del bundle._stems["slat_flow"]
    with pytest.raises(TriptychError, match="has no slat_flow: fetch the whole folder again"):
        mesh_from_pictures(pictures, bundle, FAST)
    with pytest.raises(TriptychError, match=r"pictures are \(5, 3, 8, 8\)"):
        reconstruct(folder, torch.zeros(5, 3, 8, 8))
    with pytest.raises(TriptychError, match=f"gives 12 channels, the flow was trained with {COND_CHANNELS}"):
        wrong = nn.Sequential(nn.Flatten(2), nn.Linear(56 * 56, 12))
        mesh_from_pictures(pictures, load_bundle(folder), FAST, encoder=wrong)


def test_too_many_pictures_for_the_steps_are_reported(folder, pictures):
    settings = dataclasses.replace(FAST, multi_view="stochastic", slat=Sampling(steps=2))
    assert reconstruct(folder, pictures, settings).warnings == (
        "3 pictures take turns in 2 steps, so some are never seen: take more steps",
    )


# ---- optional ways to run the flows


def test_eight_bit_weights_stay_near_at_a_quarter_of_the_bytes():
    pytest.importorskip("torchao", reason="torchao is not installed: 8-bit weights need it")
    flow = small_network("structure_flow")
    flow.convert_to(torch.float32)
    x, t, cond = torch.randn(1, 8, 4, 4, 4), torch.full((1,), 500.0), torch.randn(1, 5, COND_CHANNELS)
    with torch.no_grad():
        exact, before = flow(x, t, cond), network_bytes(flow.blocks)
        assert quantize_blocks(flow) == 16
        coarse = flow(x, t, cond)
    error = float((coarse - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.02
    assert network_bytes(flow.blocks) < 0.4 * before


def test_without_torchao_one_sentence_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(TriptychError, match="8-bit weights need the package torchao"):
        quantize_blocks(small_network("structure_flow"))


def test_compiled_blocks_are_those_of_torch(monkeypatch):
    compiled = []

    def fake(function, dynamic=None):
        assert dynamic is True
        compiled.append(function)
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", fake)
    flow = small_network("structure_flow")
    flow.convert_to(torch.float32)
    inputs = torch.randn(1, 8, 4, 4, 4), torch.full((1,), 500.0), torch.randn(1, 5, COND_CHANNELS)
    with torch.no_grad():
        before = flow(*inputs)
        compile_blocks(flow)
        assert torch.equal(flow(*inputs), before)
    assert len(compiled) == 2


# ---- the benchmark


def test_the_benchmark_runs_in_small_and_measures_nothing_without_a_gpu(capsys, monkeypatch):
    from benchmarks import published_shape

    published_shape.main(["--smoke", "--precision", "float32"])
    said = capsys.readouterr().out
    for name in ("structure flow", "structure decoder", "latent flow", "mesh decoder", "mesh"):
        assert f"\n{name}" in said
    assert "slat_flow: 0.0" in said and "training slat_flow, batch 1:" in said
    assert "its numbers say nothing about the published shape" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    published_shape.main([])
    said = capsys.readouterr().out
    assert said.count("not measured (no CUDA device here)") == 4
    assert " s\n" not in said
