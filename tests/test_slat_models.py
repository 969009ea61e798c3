"""The structured-latent networks against the published numbers, and what we added to them against plain references."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_io import Fixture, read_fixture
from test_structure_models import draw, published_table, randomised
from torch import Tensor, nn

from triptych.errors import TriptychError
from triptych.models.slat_decoder import SLatGaussianDecoder, SLatMeshDecoder, SLatRadianceFieldDecoder
from triptych.models.slat_encoder import SLatEncoder
from triptych.models.slat_flow import SLatFlowModel
from triptych.models.structure_flow import SparseStructureFlowModel
from triptych.sampling.flow_euler import cycle_conditions, flow_euler_sample, multidiffusion
from triptych.sampling.slat import denormalize_slat, normalize_slat, slat_noise
from triptych.sparse.tensor import SparseTensor

TORSO = dict(resolution=64, model_channels=768, latent_channels=8, num_blocks=12, num_heads=12, mlp_ratio=4,
             attn_mode="swin", window_size=8)  # fmt: skip
GAUSSIANS = dict(
    lr=dict(_xyz=1.0, _features_dc=1.0, _opacity=1.0, _scaling=1.0, _rotation=0.1), perturb_offset=True,
    voxel_size=1.5, num_gaussians=32,
)  # fmt: skip
PUBLISHED: dict[str, tuple[Any, dict[str, Any]]] = {
    "ElasticSLatEncoder": (SLatEncoder, dict(TORSO, in_channels=1024)),
    "ElasticSLatFlowModel": (
        SLatFlowModel,
        dict(
            resolution=64, in_channels=8, out_channels=8, model_channels=1024, cond_channels=1024, num_blocks=24,
            num_heads=16, mlp_ratio=4, patch_size=2, num_io_res_blocks=2, io_block_channels=[128], pe_mode="ape",
            qk_rms_norm=True,
        ),
    ),
    "ElasticSLatMeshDecoder": (SLatMeshDecoder, dict(TORSO, representation_config=dict(use_color=True))),
    "ElasticSLatGaussianDecoder": (SLatGaussianDecoder, dict(TORSO, representation_config=GAUSSIANS)),
    "ElasticSLatRadianceFieldDecoder": (
        SLatRadianceFieldDecoder, dict(TORSO, representation_config=dict(rank=16, dim=8)),
    ),
}  # fmt: skip

SMALL_TORSO = dict(resolution=16, model_channels=48, latent_channels=3, num_blocks=2, num_heads=2)
SMALL_FLOW = dict(
    resolution=16, in_channels=3, out_channels=3, model_channels=32, cond_channels=12, num_blocks=2, num_heads=2,
    patch_size=2, io_block_channels=[16], qk_rms_norm=True,
)  # fmt: skip


def load(path: Path, model_class: Any) -> tuple[Fixture, Any]:
    case = read_fixture(path)
    model = model_class(**case.config)
    model.load_state_dict({key: value.float() for key, value in case.weights.items()}, strict=True)
    return case, model.eval()


def voxels(counts: Sequence[int], channels: int, seed: int = 0, resolution: int = 16) -> SparseTensor:
    """Distinct random voxels in random order, `counts` in each sample."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(counts):
        cells = torch.randperm(resolution**3, generator=generator)[:count]
        xyz = [cells // resolution**2, cells // resolution % resolution, cells % resolution]
        rows.append(torch.stack([torch.full_like(cells, sample), *xyz], dim=1))
    feats = torch.randn(sum(counts), channels, generator=generator)
    return SparseTensor(feats, torch.cat(rows).int(), len(counts), resolution)


def small_models() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """One network of each kind with random weights, and inputs for it: two samples of unequal size."""
    x, t, cond = voxels([60, 25], 3), torch.tensor([300.0, 800.0]), draw(2, 5, 12)
    return {
        "flow": (randomised(SLatFlowModel(**SMALL_FLOW)), (x, t, cond)),
        "encoder": (randomised(SLatEncoder(**SMALL_TORSO, in_channels=3)), (x,)),
        "decoder": (randomised(SLatMeshDecoder(**SMALL_TORSO, representation_config=dict(use_color=True))), (x,)),
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected.detach()).norm() / expected.detach().norm())


# ---- published numbers


@torch.no_grad()
def test_encoder_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "04_slat_encoder_a.safetensors", SLatEncoder)
    x = SparseTensor(case.inputs["feats"], case.inputs["coords"])
    z, mean, logvar = model(x, return_raw=True)
    for name, value in {"z": z.feats, "mean": mean, "logvar": logvar, "coords": z.coords}.items():
        case.check(name, value)
    case.check("z_sampled", model(x, sample_posterior=True, eps=case.inputs["eps"]).feats)


@torch.no_grad()
def test_flow_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "05_slat_flow_a.safetensors", SLatFlowModel)
    x = SparseTensor(case.inputs["x_feats"], case.inputs["coords"])
    v = model(x, case.inputs["t"], case.inputs["cond"])
    case.check("forward_v", v.feats)
    case.check("coords", v.coords)


def test_flow_sampling_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "05_slat_flow_a.safetensors", SLatFlowModel)
    run = case.run
    result = flow_euler_sample(
        model,
        SparseTensor(case.inputs["noise_feats"], case.inputs["coords"]),
        steps=run["steps"],
        guidance=run["cfg_strength"],
        guidance_interval=tuple(run["cfg_interval"]),
        rescale_t=run["rescale_t"],
        sigma_min=run["sigma_min"],
        cond=case.inputs["cond"],
        neg_cond=case.inputs["neg_cond"],
        keep_trajectory=True,
    )
    case.check("sampling/samples", result.samples.feats)
    for name in ("pred_x_t", "pred_x_0", "v"):
        case.check(f"sampling/{name}", torch.stack([x.feats for x in getattr(result, name)]))
    slat = denormalize_slat(result.samples, run["slat_mean"], run["slat_std"])
    case.check("sampling/slat", slat.feats)
    back = normalize_slat(slat, run["slat_mean"], run["slat_std"])
    torch.testing.assert_close(back.feats, result.samples.feats, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mesh_decoder_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "06_slat_mesh_decoder_a.safetensors", SLatMeshDecoder)
    out = model(SparseTensor(case.inputs["feats"], case.inputs["coords"], resolution=case.config["resolution"]))
    rows = case.outputs["rows"].long()
    case.check("n_rows", torch.tensor([len(out)], dtype=torch.int32))
    case.check("coords_rows", out.coords[rows])
    case.check("feats_rows", out.feats[rows])
    case.check("channel_mean", out.feats.mean(dim=0))
    case.check("channel_std", out.feats.std(dim=0, correction=0))
    case.check("channel_absmax", out.feats.abs().amax(dim=0))
    assert out.resolution == 64


@torch.no_grad()
def test_gaussian_decoder_matches_published(fixtures_dir: Path) -> None:
    case, model = load(fixtures_dir / "09_slat_gaussian_decoder_a.safetensors", SLatGaussianDecoder)
    out = model(SparseTensor(case.inputs["feats"], case.inputs["coords"]))
    case.check("feats", out.feats)
    for i, gaussians in enumerate(model.gaussians(out)):
        for name, value in vars(gaussians).items():
            case.check(f"{i}/{name}", value)
    fresh = SLatGaussianDecoder(**case.config)
    torch.testing.assert_close(fresh.offset_perturbation, case.weights["offset_perturbation"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_state_dict_is_the_published_one(fixtures_dir: Path, class_name: str) -> None:
    model_class, config = PUBLISHED[class_name]
    with torch.device("meta"):
        model = model_class(**config, use_fp16=True)
    ours = {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()}
    assert ours == published_table(fixtures_dir / "published_keys.txt", class_name)


# ---- the flow beside the dense flow, and beside itself one sample at a time


def dense_twin(**options: Any) -> tuple[SLatFlowModel, SparseStructureFlowModel]:
    config = dict(SMALL_FLOW, resolution=4, patch_size=1, **options)
    dense = randomised(SparseStructureFlowModel(**{k: v for k, v in config.items() if k != "io_block_channels"}))
    sparse = SLatFlowModel(**dict(config, io_block_channels=None))
    sparse.load_state_dict({k: v for k, v in dense.state_dict().items() if k != "pos_emb"}, strict=True)
    return sparse.eval(), dense


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(share_mod=True, qk_rms_norm_cross=True)])
def test_patch_size_1_on_a_full_grid_is_the_dense_flow(options: dict[str, Any]) -> None:
    sparse, dense = dense_twin(**options)
    x, t, cond = draw(2, 3, 4, 4, 4), torch.tensor([300.0, 800.0]), draw(2, 5, 12, seed=2)
    v = sparse(SparseTensor.from_dense(x), t, cond).to_dense()
    torch.testing.assert_close(v, dense(x, t, cond), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["stochastic", "multidiffusion"])
def test_several_pictures_sample_as_in_the_dense_flow(mode: str) -> None:
    """One condition for two samples, guidance in an interval of rescaled times, three pictures."""
    models, noise, views = dense_twin(), draw(2, 3, 4, 4, 4), list(draw(3, 5, 12, seed=2).split(1))
    sparse, dense = (
        flow_euler_sample(
            model if mode == "stochastic" else multidiffusion(model),
            x,
            steps=3,
            guidance=2.0,
            guidance_interval=(0.5, 0.9),
            rescale_t=3.0,
            cond=cycle_conditions(views) if mode == "stochastic" else views,
            neg_cond=torch.zeros(1, 5, 12),
        ).samples
        for model, x in zip(models, (SparseTensor.from_dense(noise), noise), strict=True)
    )
    torch.testing.assert_close(sparse.to_dense(), dense, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("counts", [[30, 120, 77], [50, 0, 50]])
@pytest.mark.parametrize("name", ["flow", "encoder", "decoder"])
def test_a_sample_does_not_see_the_others(name: str, counts: list[int]) -> None:
    model, _ = small_models()[name]
    x, t, cond = voxels(counts, 3), torch.linspace(100, 900, 3), draw(3, 5, 12)
    together = model(x, t, cond) if name == "flow" else model(x)
    for i in (0, 2):
        alone = model(x.sample(i), t[i : i + 1], cond[i : i + 1]) if name == "flow" else model(x.sample(i))
        torch.testing.assert_close(together.feats[together.layout[i]], alone.feats, atol=2e-5, rtol=0)


@torch.no_grad()
def test_order_of_rows_does_not_matter() -> None:
    flow, decoder = randomised(SLatFlowModel(**SMALL_FLOW)), randomised(SLatMeshDecoder(**SMALL_TORSO))
    x, order = voxels([140], 3), torch.randperm(140, generator=torch.Generator().manual_seed(3))
    shuffled = SparseTensor(x.feats[order], x.coords[order], 1, 16)
    t, cond = torch.tensor([400.0]), draw(1, 5, 12)
    torch.testing.assert_close(flow(shuffled, t, cond).feats, flow(x, t, cond).feats[order], atol=1e-5, rtol=0)
    children = decoder(x).feats.unflatten(0, (140, 64))[order].flatten(0, 1)
    torch.testing.assert_close(decoder(shuffled).feats, children, atol=1e-4, rtol=0)


@torch.no_grad()
def test_whole_flow_is_its_parts_with_ragged_conditions() -> None:
    """What a subclass does: voxels, tokens and context of its own between the parts."""
    model = randomised(SLatFlowModel(**SMALL_FLOW))
    x, t = voxels([40, 90], 3), torch.tensor([300.0, 800.0])
    lengths = [4, 7]
    context = draw(1, sum(lengths), 12)
    t_emb = model.t_embedder(t)
    h, skips = model.down(model.enter(x), t_emb)
    assert h.resolution == 8 and len(skips) == 2
    packed = model.leave(model.up(model.run_blocks(h, t_emb, context, lengths), skips, t_emb))
    for i, part in enumerate(context.split(lengths, dim=1)):
        torch.testing.assert_close(
            packed.feats[x.layout[i]], model(x.sample(i), t[i : i + 1], part).feats, atol=1e-5, rtol=0
        )
    with pytest.raises(ValueError, match="context lengths add up to 10"):
        model.run_blocks(h, t_emb, context, [4, 6])


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, dict(use_skip_connection=False, num_io_res_blocks=1)])
def test_two_halvings_return_to_the_voxels(options: dict[str, Any]) -> None:
    model = randomised(SLatFlowModel(**dict(SMALL_FLOW, patch_size=4, io_block_channels=[8, 16]), **options))
    x = voxels([60, 25], 3)
    v = model(x, torch.tensor([10.0, 990.0]), draw(2, 5, 12))
    assert torch.equal(v.coords, x.coords) and v.feats.shape == (85, 3)
    alone = model(x.sample(1), torch.tensor([990.0]), draw(2, 5, 12)[1:])
    torch.testing.assert_close(v.feats[60:], alone.feats, atol=1e-5, rtol=0)


# ---- precision and memory


@torch.no_grad()
@pytest.mark.parametrize("name", ["flow", "encoder", "decoder"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_torso_stays_close(name: str, dtype: torch.dtype, bound: float) -> None:
    """Documented bound on the relative error (Frobenius) of a torso of weights in half precision."""
    model, inputs = small_models()[name]
    exact = model(*inputs)
    model.convert_to(dtype)
    low = model(*inputs)
    assert low.dtype == torch.float32
    assert 0 < relative(low.feats, exact.feats) < bound


@pytest.mark.parametrize("name", ["flow", "encoder", "decoder"])
def test_bfloat16_autocast_stays_close(name: str) -> None:
    """Documented bound: as the torso in bfloat16; gradients within 3 %."""
    model, inputs = small_models()[name]
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(*inputs)
    assert relative(low.feats, exact.feats) < 2e-2
    weight = draw(*exact.feats.shape, seed=6)
    grads = [
        torch.cat([g.flatten() for g in torch.autograd.grad((out.feats * weight).mean(), list(model.parameters()))])
        for out in (low, exact)
    ]
    assert relative(*grads) < 3e-2


@pytest.mark.parametrize("name", ["flow", "encoder", "decoder"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    """The slope of a random loss along a random direction of the weights and inputs, in float64."""
    model, (x, *rest) = small_models()[name]
    if name == "flow":  # without the norm of queries and keys, which has no float64; sinusoids are float32
        model = randomised(SLatFlowModel(**dict(SMALL_FLOW, qk_rms_norm=False)))
    model.double().convert_to(torch.float64)
    if name == "flow":
        model.t_embedder.float()
    feats = x.feats.double().requires_grad_()
    weight = draw(*model(x.replace(feats), *rest).feats.shape, seed=6).double()
    points = [feats, *(p for p in model.parameters() if p.dtype == torch.float64)]
    steps = [draw(*p.shape, seed=i).double() * 0.1 for i, p in enumerate(points)]

    def loss() -> Tensor:
        return (model(x.replace(feats), *rest).feats * weight).mean()

    slope = sum(float((g * step).sum()) for g, step in zip(torch.autograd.grad(loss(), points), steps, strict=True))
    sides = []
    with torch.no_grad():
        for sign in (1e-3, -2e-3):
            for point, step in zip(points, steps, strict=True):
                point += sign * step
            sides.append(float(loss()))
    assert (sides[0] - sides[1]) / 2e-3 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("name", ["flow", "decoder"])
def test_recomputing_costs_calls_and_changes_nothing(name: str) -> None:
    model, inputs = small_models()[name]
    model.train()
    blocks = model.torso_blocks()
    calls: list[nn.Module] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
        if hasattr(block, "forward_runs"):
            block.norm1.register_forward_pre_hook(lambda _m, _i, block=block: calls.append(block))
    results = []
    for count in (None, 0, 1, len(blocks)):
        calls.clear()
        model.recompute_blocks = count
        out = model(*inputs)
        results.append(torch.autograd.grad(out.feats.square().mean(), list(model.parameters())))
        assert [calls.count(block) for block in blocks] == [2] * (count or 0) + [1] * (len(blocks) - (count or 0))
    model.recompute_blocks, model.use_checkpoint = None, True
    assert len(model.recomputed()) == len(blocks)
    with torch.no_grad():
        assert not model.recomputed()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


# ---- options and bad input


@torch.no_grad()
@pytest.mark.parametrize(("num_upsample", "widths"), [(0, None), (1, None), (2, [20, 6]), (3, [16, 16, 8])])
def test_mesh_decoders_of_other_depths(num_upsample: int, widths: list[int] | None) -> None:
    config = dict(SMALL_TORSO, num_upsample=num_upsample, upsample_channels=widths)
    model = randomised(SLatMeshDecoder(**config))
    out = model(voxels([7, 5], 3))
    assert out.feats.shape == (12 * 8**num_upsample, 53)
    assert out.resolution == 16 * 2**num_upsample
    assert torch.isfinite(out.feats).all()
    assert torch.equal(out.coords[:: 8**num_upsample, 1:], voxels([7, 5], 3).coords[:, 1:] * 2**num_upsample)


def test_fresh_networks_start_at_zero_output_with_a_gradient() -> None:
    x, t, cond = voxels([30], 3), torch.tensor([500.0]), draw(1, 5, 12)
    for model, inputs in ((SLatFlowModel(**SMALL_FLOW), (x, t, cond)), (SLatMeshDecoder(**SMALL_TORSO), (x,))):
        out = model(*inputs).feats
        assert not out.any()
        (out - 1).square().mean().backward()
        assert model.out_layer.weight.grad.abs().max() > 0


def test_posterior_sampling_follows_the_generator() -> None:
    encoder, x = randomised(SLatEncoder(**SMALL_TORSO, in_channels=3)), voxels([20, 9], 3)
    first, again, other = (
        encoder(x, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).feats for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size 2 does not fit io_block_channels \\[\\]"):
        SLatFlowModel(**dict(SMALL_FLOW, io_block_channels=None))
    with pytest.raises(ValueError, match="pe_mode 'rope'"):
        SLatFlowModel(**SMALL_FLOW, pe_mode="rope")
    with pytest.raises(ValueError, match="attn_mode 'shift_order'"):
        SLatEncoder(**SMALL_TORSO, in_channels=3, attn_mode="shift_order")
    with pytest.raises(ValueError, match="one width for each of 2"):
        SLatMeshDecoder(**SMALL_TORSO, upsample_channels=[8])
    with pytest.raises(ValueError, match="lacks lr, voxel_size"):
        SLatGaussianDecoder(**SMALL_TORSO, representation_config=dict(num_gaussians=4))
    model = SLatFlowModel(**SMALL_FLOW)
    with pytest.raises(ValueError, match="expected \\(N, 3\\)"):
        model(voxels([9], 4), torch.zeros(1), draw(1, 5, 12))
    with pytest.raises(ValueError, match="1 times and 1 conditions for 2 samples"):
        model(voxels([9, 9], 3), torch.zeros(1), draw(1, 5, 12))


def test_noise_is_that_of_the_seed_on_a_sound_structure() -> None:
    coords = voxels([20, 9], 0).coords
    noise = slat_noise(coords, 8, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(noise.feats, torch.randn(29, 8, generator=torch.Generator().manual_seed(5)))
    assert noise.batch_size == 2 and noise.resolution == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(coords=torch.zeros(0, 4, dtype=torch.int32)), "the structure has no occupied voxel"),
        (dict(batch_size=3), "sample 2 of the structure has no occupied voxel"),
        (dict(resolution=8), "grid of 8\\^3: voxel coordinates span"),
        (dict(max_voxels=19), "20 occupied voxels, more than 19: .*another seed"),
    ],
)
def test_unusable_structures_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = dict(coords=voxels([20, 9], 0).coords, channels=8, resolution=16) | change
    with pytest.raises(TriptychError, match=message):
        slat_noise(**arguments)
