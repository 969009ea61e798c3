"""The structure VAE and flow against the published numbers, and what we added to them against plain references."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures_io import read_fixture
from torch import nn

from triptych.models.blocks import (
    AbsolutePositionEmbedder,
    ModulatedTransformerCrossBlock,
    MultiHeadRMSNorm,
    TimestepEmbedder,
    attention,
    runs_of,
)
from triptych.models.structure_flow import SparseStructureFlowModel, patchify, unpatchify
from triptych.models.structure_vae import (
    SparseStructureDecoder,
    SparseStructureEncoder,
    occupied_coords,
    pixel_shuffle_3d,
)

PUBLISHED = {
    "SparseStructureEncoder": (
        SparseStructureEncoder,
        dict(in_channels=1, latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, channels=[32, 128, 512]),
    ),
    "SparseStructureDecoder": (
        SparseStructureDecoder,
        dict(out_channels=1, latent_channels=8, num_res_blocks=2, num_res_blocks_middle=2, channels=[512, 128, 32]),
    ),
    "SparseStructureFlowModel": (
        SparseStructureFlowModel,
        dict(
            resolution=16, in_channels=8, out_channels=8, model_channels=1024, cond_channels=1024, num_blocks=24,
            num_heads=16, mlp_ratio=4, patch_size=1, pe_mode="ape", qk_rms_norm=True,
        ),
    ),
}  # fmt: skip

SMALL_FLOW = dict(
    resolution=8, in_channels=2, model_channels=32, cond_channels=12, out_channels=2, num_blocks=2, num_heads=2,
    patch_size=2, qk_rms_norm=True,
)  # fmt: skip


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Also what starts at zero gets a value, so that no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = math.prod(parameter.shape[1:])
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 1 + 0.1 * noise)
    return module.eval()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- published numbers


def test_encoder_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "01_ss_encoder_a.safetensors")
    model = SparseStructureEncoder(**case.config)
    model.load_state_dict(case.weights, strict=True)
    z, mean, logvar = model(case.inputs["x"], return_raw=True)
    for name, value in {"z": z, "mean": mean, "logvar": logvar}.items():
        case.check(name, value)
    case.check("z_sampled", model(case.inputs["x"], sample_posterior=True, eps=case.inputs["eps"]))


def test_decoder_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "01_ss_decoder_a.safetensors")
    model = SparseStructureDecoder(**case.config)
    model.load_state_dict(case.weights, strict=True)
    logits = model(case.inputs["z"])
    case.check("logits", logits)
    case.check("coords", occupied_coords(logits))


def test_flow_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "02_ss_flow_forward_a.safetensors")
    model = SparseStructureFlowModel(**case.config)
    model.load_state_dict(case.weights, strict=True)
    case.check("v", model(**case.inputs))


def test_block_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "08_op_dit_block_a.safetensors")
    block = ModulatedTransformerCrossBlock(**case.config)
    block.load_state_dict(case.weights, strict=True)
    case.check("x", block(**case.inputs))


def test_embeddings_match_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "08_op_embeddings_a.safetensors")
    for channels in case.run["ape_channels"]:
        case.check(f"ape{channels}", AbsolutePositionEmbedder(channels)(case.inputs["coords"]))
    case.check("t_freq", TimestepEmbedder.timestep_embedding(case.inputs["t"], case.run["t_dim"]))


def test_rms_norm_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "08_op_rms_norm_a.safetensors")
    norm = MultiHeadRMSNorm(**case.config)
    norm.load_state_dict(case.weights, strict=True)
    case.check("x", norm(case.inputs["x"]))


def test_reindexing_matches_published(fixtures_dir: Path) -> None:
    case = read_fixture(fixtures_dir / "08_op_pixel_shuffle_patchify_a.safetensors")
    x = case.inputs["x"]
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        case.check("shuffled", pixel_shuffle_3d(x.contiguous(memory_format=layout), case.run["factor"]))
    case.check("patched", patchify(x, case.run["patch"]))
    case.check("unpatched", unpatchify(x, case.run["patch"]))


def published_table(path: Path, class_name: str) -> dict[str, tuple[list[int], str]]:
    """Key -> (shape, dtype) of one published file; a row ending in xN stands for blocks 0..N-1."""
    section = re.search(rf"^=====[^\n]* {class_name} [^\n]*\n(.*?)(?=^=====|\Z)", path.read_text(), re.M | re.S)
    assert section, f"{class_name} is not in {path.name}"
    table = {}
    for key, shape, dtype, repeat in re.findall(r"^ +(\S+) \[([\d, ]*)\] (\w+) ?(?:x(\d+))?", section[1], re.M):
        for i in range(int(repeat or 1)):
            table[key.replace("{i}", str(i))] = ([int(n) for n in shape.split(",")], dtype)
    return table


@pytest.mark.parametrize("class_name", PUBLISHED)
def test_state_dict_is_the_published_one(fixtures_dir: Path, class_name: str) -> None:
    model_class, config = PUBLISHED[class_name]
    with torch.device("meta"):
        model = model_class(**config, use_fp16=True)
    ours = {k: (list(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in model.state_dict().items()}
    assert ours == published_table(fixtures_dir / "published_keys.txt", class_name)


# ---- packing


@pytest.mark.parametrize("share_mod", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 9, 9], [5, 0, 8], [11, 2, 6]])
def test_packed_block_equals_each_sample_alone(lengths: list[int], share_mod: bool) -> None:
    block = randomised(ModulatedTransformerCrossBlock(24, 10, 3, qk_rms_norm=True, share_mod=share_mod))
    context_lengths = [4, 6, 6]
    x, context = draw(1, sum(lengths), 24), draw(1, sum(context_lengths), 10, seed=2)
    mod = draw(3, 24 * (6 if share_mod else 1), seed=3)
    packed = block(x, mod, context, lengths=lengths, context_lengths=context_lengths)
    alone = [
        block(x_1LC, mod[i : i + 1], context_1LC)
        for i, (x_1LC, context_1LC) in enumerate(
            zip(x.split(lengths, dim=1), context.split(context_lengths, dim=1), strict=True)
        )
        if lengths[i]
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=0)


def test_packed_subset_of_a_flow_has_the_gradients_of_each_sample_alone() -> None:
    """What the lifted model does: embed all tokens, keep some of each sample, run them packed."""
    model = randomised(SparseStructureFlowModel(**SMALL_FLOW, share_mod=True))
    x, t, cond = draw(2, 2, 8, 8, 8), torch.tensor([300.0, 800.0]), draw(2, 5, 12, seed=2)
    keep = [torch.arange(0, 64, 2), torch.arange(10, 31)]
    tokens, t_emb = model.embed(x), model.t_embedder(t)

    h = torch.cat([tokens[i, keep[i]] for i in range(2)])[None]
    packed = model.head(model.run_blocks(h, t_emb, cond, lengths=[len(rows) for rows in keep]))
    alone = torch.cat(
        [model.head(model.run_blocks(tokens[i : i + 1, keep[i]], t_emb[i : i + 1], cond[i : i + 1])) for i in range(2)],
        dim=1,
    )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    weight = draw(*packed.shape, seed=4)
    grads = [
        torch.autograd.grad((out * weight).mean(), list(model.parameters()), retain_graph=True)
        for out in (packed, alone)
    ]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_whole_flow_is_its_parts() -> None:
    model = randomised(SparseStructureFlowModel(**SMALL_FLOW))
    x, t, cond = draw(2, 2, 8, 8, 8), torch.tensor([10.0, 990.0]), draw(2, 5, 12, seed=2)
    packed = model.embed(x).flatten(0, 1)[None]
    h = model.run_blocks(packed, model.t_embedder(t), cond, lengths=[64, 64])
    v = model.to_grid(model.head(h).view(2, 64, -1))
    torch.testing.assert_close(v, model(x, t, cond), atol=1e-5, rtol=0)


def test_disagreeing_lengths_are_refused() -> None:
    block = ModulatedTransformerCrossBlock(24, 10, 3)
    x, mod, context = draw(1, 9, 24), draw(2, 24), draw(2, 4, 10)
    with pytest.raises(ValueError, match="add up to 8"):
        block(x, mod, context, lengths=[4, 4])
    with pytest.raises(ValueError, match="3 lengths but 2 context lengths"):
        block(x, mod, context, lengths=[3, 3, 3])
    with pytest.raises(ValueError, match="context is None"):
        block(x, mod, None)
    with pytest.raises(ValueError, match="mod has 2 rows for 1 samples"):
        block(x, mod, context[:1])
    with pytest.raises(ValueError, match="expected"):
        SparseStructureFlowModel(**SMALL_FLOW)(draw(1, 2, 8, 8, 4), torch.zeros(1), draw(1, 4, 12))


def test_equal_neighbours_form_one_run() -> None:
    assert [tuple(run) for run in runs_of([4, 4, 0, 7, 7, 7], [2, 2, 2, 5, 5, 3])] == [
        (2, 4, 2), (1, 0, 2), (2, 7, 5), (1, 7, 3),
    ]  # fmt: skip


# ---- precision and speed paths


def test_cache_sized_attention_equals_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients within what bfloat16 rounding of the inputs and scores allows, in one group or many."""
    base = [draw(2, n, 4, 32, seed=n).bfloat16() for n in (96, 80, 81)]
    base[2] = base[2][:, :80]
    exact_in = [x.double().requires_grad_() for x in base]
    exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact_in)).transpose(1, 2)
    grad = draw(*exact.shape, seed=5).bfloat16()
    exact_grads = torch.autograd.grad(exact, exact_in, grad.double())
    for most in (1 << 20, 96 * 80):
        monkeypatch.setattr("triptych.models.blocks.MAX_SCORES", most)
        ours_in = [x.clone().requires_grad_() for x in base]
        ours = attention(*ours_in)
        assert type(ours.grad_fn).__name__ == "_CacheSizedAttentionBackward"
        for name, got, want in zip(
            ("out", "dq", "dk", "dv"), (ours, *torch.autograd.grad(ours, ours_in, grad)), (exact, *exact_grads),
            strict=True,
        ):  # fmt: skip
            error = float((got.detach().double() - want.detach()).norm() / want.detach().norm())
            assert error < 0.01, f"{name}: relative error {error:.4f}"


@pytest.mark.parametrize("share_mod", [False, True])
def test_bfloat16_autocast_stays_close(share_mod: bool) -> None:
    """Documented bound: under autocast the velocity deviates by about one percent of its size, gradients by a few."""
    model = randomised(SparseStructureFlowModel(**SMALL_FLOW, share_mod=share_mod))
    x, t, cond = draw(2, 2, 8, 8, 8), torch.tensor([300.0, 800.0]), draw(2, 5, 12, seed=2)
    weight = draw(2, 2, 8, 8, 8, seed=6)
    exact = model(x, t, cond)
    exact_grads = torch.autograd.grad((exact * weight).sum(), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, t, cond)
    assert low.dtype == torch.float32
    assert float((low - exact).detach().norm() / exact.detach().norm()) < 0.02
    grads = torch.autograd.grad((low * weight).sum(), list(model.parameters()))
    flat, exact_flat = (torch.cat([g.flatten() for g in group]) for group in (grads, exact_grads))
    assert float((flat - exact_flat).norm() / exact_flat.norm()) < 0.05


def test_published_half_precision_torso_runs() -> None:
    """float16 weights in the torso: outputs stay near those of the same numbers in float32."""
    x, t, cond = draw(1, 2, 8, 8, 8), torch.tensor([500.0]), draw(1, 5, 12, seed=2)
    config = dict(latent_channels=4, num_res_blocks=1, channels=[8, 16])
    flow = randomised(SparseStructureFlowModel(**SMALL_FLOW))
    encoder = randomised(SparseStructureEncoder(in_channels=2, **config))
    for model, inputs in ((flow, (x, t, cond)), (encoder, (x,))):
        exact = model(*inputs)
        model.convert_to(torch.float16)
        low = model(*inputs)
        assert low.dtype == torch.float32
        assert 0 < float((low - exact).detach().norm() / exact.detach().norm()) < 5e-3


def test_checkpointing_changes_nothing() -> None:
    plain = randomised(SparseStructureFlowModel(**SMALL_FLOW, share_mod=True))
    saving = SparseStructureFlowModel(**SMALL_FLOW, share_mod=True, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    inputs = draw(1, 2, 8, 8, 8), torch.tensor([300.0]), draw(1, 5, 12, seed=2)
    grads = [
        torch.autograd.grad(model.train()(*inputs).square().sum(), list(model.parameters()))
        for model in (plain, saving)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# ---- the VAE's own options


def test_vae_without_residual_blocks_keeps_sizes() -> None:
    encoder = SparseStructureEncoder(1, 4, num_res_blocks=0, channels=[4, 8, 12], num_res_blocks_middle=0)
    decoder = SparseStructureDecoder(1, 4, num_res_blocks=0, channels=[12, 8, 4], num_res_blocks_middle=0)
    x = (draw(2, 1, 16, 16, 16) > 1).float()
    z = encoder(x)
    assert z.shape == (2, 4, 4, 4, 4)
    assert decoder(z).shape == x.shape


def test_grids_stay_channels_last_through_the_decoder() -> None:
    decoder = SparseStructureDecoder(1, 4, num_res_blocks=1, channels=[16, 8], num_res_blocks_middle=1)
    layouts: list[bool] = []
    for module in decoder.modules():
        if isinstance(module, nn.Conv3d) and module.out_channels > 1:
            module.register_forward_hook(
                lambda _m, _i, out: layouts.append(out.is_contiguous(memory_format=torch.channels_last_3d))
            )
    decoder(draw(2, 4, 4, 4, 4))  # a batch of two: tiny single inputs take torch's contiguous kernel
    assert layouts == [True] * 8


def test_posterior_sampling_follows_the_generator() -> None:
    encoder = randomised(SparseStructureEncoder(1, 2, num_res_blocks=1, channels=[4, 8]))
    x = (draw(1, 1, 8, 8, 8) > 0).float()
    first, again, other = (
        encoder(x, sample_posterior=True, generator=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    _, mean, logvar = encoder(x, return_raw=True)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(first, mean + (0.5 * logvar).exp() * eps)
