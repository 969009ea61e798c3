"""Blocks of the structured-latent networks: published numbers, naive references, and what they refuse."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures_io import Fixture, read_fixture
from torch import Tensor, nn

from triptych.models.blocks import ModulatedTransformerCrossBlock
from triptych.models.sparse_blocks import (
    ModulatedSparseTransformerCrossBlock,
    SparseResBlock3d,
    SparseSubdivideBlock3d,
    SparseTransformerBlock,
)
from triptych.sparse.spatial import downsample, subdivide
from triptych.sparse.tensor import SparseTensor


def fixture(fixtures_dir: Path, name: str) -> tuple[Fixture, SparseTensor]:
    file = read_fixture(fixtures_dir / f"08_op_{name}_a.safetensors")
    return file, SparseTensor(file.inputs["feats"], file.inputs["coords"])


def example(channels: int, counts: tuple[int, ...] = (40, 0, 25), side: int = 8) -> SparseTensor:
    generator = torch.Generator().manual_seed(0)
    coords = []
    for sample, count in enumerate(counts):
        flat = torch.randperm(side**3, generator=generator)[:count]
        xyz = torch.stack([flat // side**2, flat // side % side, flat % side], dim=1)
        coords.append(F.pad(xyz, (1, 0), value=sample))
    rows = torch.cat(coords).int()
    return SparseTensor(torch.randn(len(rows), channels, generator=generator), rows, len(counts), side)


def randomise(module: nn.Module) -> nn.Module:
    """No parameter at its initial value: some start at zero and would hide a branch."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


# ---- published numbers


@pytest.mark.parametrize(
    ("name", "block"), [("swin_block", SparseTransformerBlock), ("subdivide_block", SparseSubdivideBlock3d)]
)
def test_published_blocks(fixtures_dir: Path, name: str, block: type[nn.Module]) -> None:
    file, x = fixture(fixtures_dir, name)
    module = block(**file.config)
    module.load_state_dict(file.weights, strict=True)
    y = module(x)
    file.check("feats", y.feats)
    if "coords" in file.outputs:
        file.check("coords", y.coords)


def test_published_residual_blocks(fixtures_dir: Path) -> None:
    file, x = fixture(fixtures_dir, "sparse_resblock")
    outer, emb_channels, inner = (file.config[name] for name in ("channels", "emb_channels", "mid_channels"))
    chain = nn.ModuleDict(
        {
            "down": SparseResBlock3d(outer, emb_channels, inner, downsample=True),
            "up": SparseResBlock3d(inner, emb_channels, outer, upsample=True),
            "flat": SparseResBlock3d(outer, emb_channels),
        }
    )
    chain.load_state_dict(file.weights, strict=True)
    down = chain["down"](x, file.inputs["emb"])
    file.check("down_coords", down.coords)
    file.check("down_feats", down.feats)
    up = chain["up"](down, file.inputs["emb"])
    assert torch.equal(up.coords, x.coords)
    file.check("up_feats", up.feats)
    file.check("flat_feats", chain["flat"](up, file.inputs["emb"]).feats)


def test_modulated_block_equals_the_published_dense_one(fixtures_dir: Path) -> None:
    """Samples of 50 tokens each; where the voxels lie does not matter to full attention."""
    file = read_fixture(fixtures_dir / "08_op_dit_block_a.safetensors")
    block = ModulatedSparseTransformerCrossBlock(**file.config)
    block.load_state_dict(file.weights, strict=True)
    x = file.inputs["x"]
    sparse = example(1, counts=(x.shape[1],) * x.shape[0]).replace(x.flatten(0, 1))
    y = block(sparse, file.inputs["mod"], file.inputs["context"])
    assert y.coords is sparse.coords
    file.check("x", y.feats.view_as(x))


# ---- references


def test_modulated_block_treats_samples_apart() -> None:
    block = randomise(ModulatedSparseTransformerCrossBlock(16, 6, 2, qk_rms_norm=True))
    dense = ModulatedTransformerCrossBlock(16, 6, 2, qk_rms_norm=True)
    dense.load_state_dict(block.state_dict(), strict=True)
    x, mod, context = example(16), torch.randn(3, 16), torch.randn(3, 5, 6)
    y = block(x, mod, context)
    for i, rows in enumerate(x.layout):
        if rows.stop > rows.start:
            alone = dense(x.feats[None, rows], mod[i : i + 1], context[i : i + 1])[0]
            torch.testing.assert_close(y.feats[rows], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_rms_norm", [False, True])
def test_windows_as_large_as_the_grid_are_full_attention(qk_rms_norm: bool) -> None:
    options = {"mlp_ratio": 2.0, "qk_rms_norm": qk_rms_norm, "qkv_bias": False, "ln_affine": True}
    full = randomise(SparseTransformerBlock(12, 3, attn_mode="full", **options))
    windowed = SparseTransformerBlock(12, 3, attn_mode="windowed", window_size=8, **options)
    windowed.load_state_dict(full.state_dict(), strict=True)
    x = example(12)
    torch.testing.assert_close(windowed(x).feats, full(x).feats, rtol=1e-5, atol=1e-5)
    shifted = SparseTransformerBlock(12, 3, attn_mode="windowed", window_size=8, shift_window=4, **options)
    shifted.load_state_dict(full.state_dict(), strict=True)
    assert float((shifted(x).feats - full(x).feats).detach().abs().max()) > 0.01


def test_subdivide_block_equals_its_layers_one_by_one() -> None:
    """Values and gradients, in float64 except for the norms."""
    block = randomise(SparseSubdivideBlock3d(8, 8, 4, num_groups=2)).double()
    x = example(8)
    x = x.replace(x.feats.double().requires_grad_())
    fine = block(x)

    h = subdivide(block.act_layers(x))
    for layer in block.out_layers:
        h = layer(h)
    naive = h.feats + block.skip_connection(subdivide(x)).feats
    torch.testing.assert_close(fine.feats, naive, rtol=1e-5, atol=1e-5)
    leaves = [x.feats, *block.parameters()]
    direction = torch.randn(naive.shape, dtype=naive.dtype)
    gradients = [torch.autograd.grad(out, leaves, direction) for out in (fine.feats, naive)]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert fine.resolution == 16
    same = SparseSubdivideBlock3d(8, 8, num_groups=2)
    assert [key for key in same.state_dict() if key.startswith("skip")] == []
    assert torch.equal(same(example(8)).feats, subdivide(example(8)).feats)


def test_residual_block_starts_as_its_skip() -> None:
    x, emb = example(4), torch.randn(3, 6)
    assert torch.equal(SparseResBlock3d(4, 6)(x, emb).feats, x.feats)
    down = SparseResBlock3d(4, 6, downsample=True)(x, emb)
    assert torch.equal(down.feats, downsample(x, 2).feats)
    up = SparseResBlock3d(4, 6, upsample=True)(down, emb)
    assert up.coords is x.coords


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_parameter_learns(dtype: torch.dtype) -> None:
    """In bfloat16 weights and features are bfloat16, the norms float32, as in a converted torso."""
    x, emb, context = example(16), torch.randn(3, 6).to(dtype), torch.randn(3, 5, 6).to(dtype)
    down, up = SparseResBlock3d(16, 6, downsample=True), SparseResBlock3d(16, 6, 16, upsample=True)
    flow = ModulatedSparseTransformerCrossBlock(16, 6, 2)
    windowed = SparseTransformerBlock(16, 2, attn_mode="windowed", window_size=4, shift_window=2)
    children = SparseSubdivideBlock3d(16, 8, 8, num_groups=4)
    everything = randomise(nn.ModuleList([down, up, flow, windowed, children]))
    for module in everything.modules():
        if "Norm" not in type(module).__name__:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    mod = torch.randn(3, 16).to(dtype)
    h = flow(down(x.type(dtype), emb), mod, context)
    y = children(windowed(up(h, emb)))
    assert y.dtype == dtype
    y.feats.float().square().mean().backward()
    for name, parameter in everything.named_parameters():
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


# ---- refusals


def refusals() -> list[tuple[nn.Module, list[Tensor], str]]:
    return [
        (SparseTransformerBlock(8, 2), [], r"takes feats \(N, 8\), not \(65, 4\)"),
        (SparseSubdivideBlock3d(32, 8), [], r"takes feats \(N, 32\), not \(65, 4\)"),
        (SparseResBlock3d(8, 6), [torch.zeros(3, 6)], r"takes feats \(N, 8\), not \(65, 4\)"),
        (SparseResBlock3d(4, 6), [torch.zeros(2, 6)], "one row for each of the 3 samples"),
        (SparseResBlock3d(4, 6, upsample=True), [torch.zeros(3, 6)], "does not come from downsampling"),
        (
            ModulatedSparseTransformerCrossBlock(4, 6, 2),
            [torch.zeros(2, 4), torch.zeros(3, 5, 6)],
            "one row for each of the 3 samples",
        ),
    ]


@pytest.mark.parametrize("case", range(6))
def test_wrong_inputs_are_named(case: int) -> None:
    module, arguments, words = refusals()[case]
    with pytest.raises(ValueError, match=words):
        module(example(4), *arguments)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="attn_mode is 'shifted'"):
        SparseTransformerBlock(8, 2, attn_mode="shifted")
    with pytest.raises(ValueError, match="needs a window_size"):
        SparseTransformerBlock(8, 2, attn_mode="windowed")
    with pytest.raises(ValueError, match="8 channels do not divide into 3 heads"):
        SparseTransformerBlock(8, 3)
    with pytest.raises(ValueError, match="at once"):
        SparseResBlock3d(4, 6, downsample=True, upsample=True)
