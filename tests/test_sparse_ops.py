"""Sparse operators against dense or loop references, values and gradients, and against the published modules."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fixtures_io import read_fixture
from torch import Tensor

from triptych.sparse import attention, conv
from triptych.sparse.attention import cross_attention, full_attention, window_partition, windowed_attention
from triptych.sparse.conv import SparseConv3d, neighbour_table, subdivided_conv, table_conv
from triptych.sparse.norm import SparseGroupNorm32
from triptych.sparse.spatial import SparseDownsample, SparseSubdivide, SparseUpsample, downsample, subdivide, upsample
from triptych.sparse.tensor import SparseTensor

SIDE = 7


def voxels(counts: tuple[int, ...] = (60, 0, 1, 45), side: int = SIDE, seed: int = 0) -> Tensor:
    """Samples of that many voxels on a grid, rows unsorted inside each sample."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for sample, count in enumerate(counts):
        flat = torch.randperm(side**3, generator=generator)[:count]
        xyz = torch.stack([flat // side**2, flat // side % side, flat % side], dim=1)
        parts.append(F.pad(xyz, (1, 0), value=sample))
    return torch.cat(parts).int()


def random_tensor(*channels: int, counts: tuple[int, ...] = (60, 0, 1, 45), dtype=torch.float64) -> SparseTensor:
    coords = voxels(counts)
    feats = torch.randn(len(coords), *channels, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return SparseTensor(feats.requires_grad_(), coords, len(counts), SIDE)


def compare(ours: Callable[[], Tensor], reference: Callable[[], Tensor], *leaves: Tensor) -> None:
    """Equal values and equal gradients of every leaf, in float64."""
    a, b = ours(), reference()
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    direction = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(2))
    for x, y in zip(torch.autograd.grad(a, leaves, direction), torch.autograd.grad(b, leaves, direction), strict=True):
        assert float(y.abs().max()) > 0
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


# ---- neighbours


def test_neighbours_are_those_of_a_dictionary() -> None:
    x = random_tensor(1)
    row_of = {tuple(c): i for i, c in enumerate(x.coords.tolist())}
    offsets = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).tolist()
    expected = [
        [row_of.get((b, i + dx, j + dy, k + dz), len(x)) for dx, dy, dz in offsets] for b, i, j, k in x.coords.tolist()
    ]
    table = neighbour_table(x)
    assert table.dtype == torch.int32
    assert table.tolist() == expected
    assert 0.1 < float((table < len(x)).float().mean()) < 0.9


def test_neighbours_are_searched_once_and_derived_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def search(coords: Tensor) -> Tensor:
        searched.append(len(coords))
        return _search_table(coords)

    _search_table = conv._search_table
    monkeypatch.setattr(conv, "_search_table", search)
    x = random_tensor(2)
    layers = [SparseConv3d(2, 2).double() for _ in range(2)]
    y = layers[1](layers[0](x))
    for _ in range(2):
        layers[0](downsample(y, 2))
    grandchild = subdivide(subdivide(x))
    layers[0](grandchild)
    assert searched == [len(x), len(downsample(x, 2))]
    assert torch.equal(neighbour_table(grandchild), _search_table(grandchild.coords))


def test_a_grid_of_one_voxel_and_no_voxels() -> None:
    for counts in [(1,), (0, 0)]:
        x = random_tensor(2, counts=counts)
        y = SparseConv3d(2, 3).double()(x)
        assert y.feats.shape == (sum(counts), 3)
        assert torch.equal(neighbour_table(x)[:, 13], torch.arange(sum(counts)).int())
        assert windowed_attention(torch.ones(len(x), 3, 1, 2), x, 4).shape == (len(x), 1, 2)
        assert full_attention(torch.ones(len(x), 3, 1, 2), x).shape == (len(x), 1, 2)
        assert len(subdivide(x)) == 8 * len(x)
        assert SparseUpsample(2)(SparseDownsample(2)(x)).counts == list(counts)


def test_repeated_voxels_are_refused() -> None:
    coords = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="1 of 3 rows repeat"):
        neighbour_table(SparseTensor(torch.zeros(3, 1), coords))


# ---- convolution


def dense_conv(x: SparseTensor, layer: SparseConv3d) -> Tensor:
    kernel = layer.conv.weight.permute(0, 4, 1, 2, 3)
    dense = F.conv3d(x.to_dense(), kernel, layer.conv.bias, padding=1)
    return dense.movedim(1, -1)[x.coords.long().unbind(1)]


@pytest.mark.parametrize("block_bytes", [1 << 22, 1])
def test_convolution_equals_dense(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest block holds 128 rows, so that this tensor takes one or two blocks."""
    monkeypatch.setitem(conv.BLOCK_BYTES, "cpu", block_bytes)
    x = random_tensor(5, counts=(100, 0, 80))
    layer = SparseConv3d(5, 4).double()
    compare(lambda: layer(x).feats, lambda: dense_conv(x, layer), x.feats, layer.conv.weight, layer.conv.bias)


def test_blocks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []

    def gather(padded: Tensor, table: Tensor, columns: Tensor | None) -> Tensor:
        block = _gather(padded, table, columns)
        gathered.append(block.numel() * block.element_size())
        return block

    _gather = conv._gather
    monkeypatch.setattr(conv, "_gather", gather)
    monkeypatch.setitem(conv.BLOCK_BYTES, "cpu", 1 << 20)
    feats = torch.randn(5000, 16, requires_grad=True)
    weight = torch.randn(8, 27, 16, requires_grad=True)
    table_conv(feats, weight, torch.randint(0, 5001, (5000, 27), dtype=torch.int32)).sum().backward()
    assert max(gathered) <= 1 << 20
    assert sum(gathered) == 5000 * 27 * 4 * (16 + 8 + 16)


def test_convolution_of_children_equals_subdivide_then_convolve() -> None:
    x = random_tensor(3)
    layer = SparseConv3d(3, 4).double()
    children = layer.forward_subdivided(x)
    assert torch.equal(children.coords, subdivide(x).coords)
    compare(
        lambda: layer.forward_subdivided(x).feats,
        lambda: dense_conv(subdivide(x), layer),
        x.feats,
        layer.conv.weight,
        layer.conv.bias,
    )
    with pytest.raises(ValueError, match="apply it first"):
        SparseConv3d(3, 4, 1).double().forward_subdivided(x)


def test_kernel_of_one_reinterprets_its_storage() -> None:
    x = random_tensor(3)
    layer = SparseConv3d(3, 4, 1).double()
    matrix = [[layer.conv.weight.flatten()[4 * i + o] for o in range(4)] for i in range(3)]
    columns = [sum(x.feats[:, i] * matrix[i][o] for i in range(3)) + layer.conv.bias[o] for o in range(4)]
    compare(lambda: layer(x).feats, lambda: torch.stack(columns, dim=1), x.feats, layer.conv.weight, layer.conv.bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_convolution_is_near_and_trains_float32_weights(autocast: bool) -> None:
    x = random_tensor(16, dtype=torch.float32)
    layer = SparseConv3d(16, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x if autocast else x.type(torch.bfloat16)).feats
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x).feats, rtol=0.02, atol=0.02)
    y.float().square().sum().backward()
    assert layer.conv.weight.grad.dtype == torch.float32
    assert bool((layer.conv.weight.grad != 0).any(dim=-1).all())


def test_wrong_channels_are_named() -> None:
    x = random_tensor(5)
    with pytest.raises(ValueError, match=r"takes feats \(N, 4\), not \(106, 5\)"):
        SparseConv3d(4, 8)(x)
    with pytest.raises(ValueError, match=r"takes feats \(N, 4\), not \(106, 5\)"):
        SparseGroupNorm32(2, 4)(x)
    with pytest.raises(ValueError, match="kernel_size is 5"):
        SparseConv3d(4, 8, 5)
    with pytest.raises(ValueError, match="5 channels do not divide into 2 groups"):
        SparseGroupNorm32(2, 5)


# ---- resampling


@pytest.mark.parametrize("include_self", [True, False])
def test_downsample_equals_pooling(include_self: bool) -> None:
    x = random_tensor(3)
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, (b, i, j, k) in enumerate(x.coords.tolist()):
        rows_of.setdefault((b, i // 2, j // 2, k // 2), []).append(row)
    cells = sorted(rows_of)
    y = downsample(x, 2, include_self)
    assert y.coords.tolist() == [list(cell) for cell in cells]
    assert (y.batch_size, y.resolution) == (x.batch_size, 4)

    def pooled() -> Tensor:
        return torch.stack([x.feats[rows_of[c]].sum(0) / (len(rows_of[c]) + include_self) for c in cells])

    compare(lambda: downsample(x, 2, include_self).feats, pooled, x.feats)


def test_upsample_returns_to_the_rows_it_came_from() -> None:
    x = random_tensor(3)
    y = downsample(downsample(x, 2), 2)
    middle = SparseUpsample(2)(y.replace(y.feats * 2))
    fine = SparseUpsample(2)(middle)
    assert fine.coords is x.coords
    assert fine.maps is x.maps
    row_of = {tuple(c): i for i, c in enumerate(y.coords.tolist())}
    rows = [row_of[(b, i // 4, j // 4, k // 4)] for b, i, j, k in x.coords.tolist()]
    compare(lambda: upsample(upsample(y, downsample(x, 2)), x).feats, lambda: y.feats[rows], y.feats)
    apart = SparseTensor(y.feats, y.coords.clone(), y.batch_size, y.resolution)
    assert torch.equal(upsample(apart, x, factor=4).feats, y.feats[rows])
    with pytest.raises(ValueError, match="not from downsampling"):
        SparseUpsample(2)(x)
    with pytest.raises(ValueError, match="from downsampling by 2: it cannot be upsampled by 4"):
        SparseUpsample(4)(y)
    with pytest.raises(ValueError, match="give upsample the factor"):
        upsample(apart, x)
    with pytest.raises(ValueError, match="does not have the voxels"):
        upsample(apart, x, factor=2)


def test_subdivision_repeats_features() -> None:
    x = random_tensor(3)
    y = SparseSubdivide()(x)
    halves = torch.cartesian_prod(*[torch.arange(2)] * 3).tolist()
    expected = [[b, 2 * i + p, 2 * j + q, 2 * k + r] for b, i, j, k in x.coords.tolist() for p, q, r in halves]
    assert y.coords.tolist() == expected
    assert (y.resolution, y.counts) == (2 * SIDE, [8 * count for count in x.counts])
    compare(lambda: subdivide(x).feats, lambda: x.feats[torch.arange(len(x)).repeat_interleave(8)], x.feats)


# ---- norm


def test_group_norm_equals_torch_per_sample() -> None:
    x = random_tensor(6)
    norm = SparseGroupNorm32(3, 6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = x.replace(x.feats.detach().float().requires_grad_())

    def reference() -> Tensor:
        samples = [part.t()[None] for part in x.feats.split(x.counts) if len(part)]
        return torch.cat([F.group_norm(part, 3, norm.weight, norm.bias, 1e-5)[0].t() for part in samples])

    ours = norm(x).feats
    torch.testing.assert_close(ours, reference(), rtol=1e-5, atol=2e-6)
    leaves = (x.feats, norm.weight, norm.bias)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(reference().square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert norm(x.type(torch.bfloat16)).dtype == torch.bfloat16


# ---- attention


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(L, H, D), (M, H, D), (M, H, D) -> (L, H, D), as the formula says."""
    scores = torch.einsum("lhd,mhd->hlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v)


def loop_attention(qkv: Tensor, groups: list[list[int]]) -> Tensor:
    rows = torch.tensor([row for group in groups for row in group])
    out = torch.cat([softmax_attention(*qkv[group].unbind(1)) for group in groups])
    return out[torch.argsort(rows)]


def groups_of(keys: list[tuple[int, ...]]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def window_groups(x: SparseTensor, size: tuple[int, ...], shift: tuple[int, ...]) -> list[list[int]]:
    return groups_of(
        [(b, *((c + s) // w for c, s, w in zip(xyz, shift, size, strict=True))) for b, *xyz in x.coords.tolist()]
    )


@pytest.mark.parametrize("free_waste", [1 << 14, 0])
@pytest.mark.parametrize(("size", "shift"), [(4, 0), (4, 2), ((3, 7, 2), (1, 0, 1))])
def test_windowed_attention_equals_a_loop(size, shift, free_waste: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """free_waste 0 makes many buckets of this small tensor, some of them without padding."""
    monkeypatch.setitem(attention.FREE_WASTE, "cpu", free_waste)
    x = random_tensor(3, 2, 4)
    triple = [value if isinstance(value, tuple) else (value,) * 3 for value in (size, shift)]
    groups = window_groups(x, *triple)
    windows = window_partition(x, size, shift)
    assert sorted(windows.lengths) == sorted(len(group) for group in groups)
    assert torch.equal(windows.order[windows.inverse], torch.arange(len(x)))
    parts = {tuple(part.tolist()) for part in windows.order.split(windows.lengths)}
    assert parts == {tuple(group) for group in groups}
    compare(lambda: windowed_attention(x.feats, x, size, shift), lambda: loop_attention(x.feats, groups), x.feats)


@pytest.mark.parametrize("counts", [(60, 0, 1, 45), (70,), (30, 30)])
def test_full_attention_equals_a_loop(counts: tuple[int, ...]) -> None:
    x = random_tensor(3, 2, 4, counts=counts)
    groups = groups_of([(b,) for b in x.coords[:, 0].tolist()])
    compare(lambda: full_attention(x.feats, x), lambda: loop_attention(x.feats, groups), x.feats)


def test_cross_attention_equals_a_loop() -> None:
    x = random_tensor(2, 4)
    kv = torch.randn(4, 5, 2, 2, 4, dtype=torch.float64, requires_grad=True)

    def loop() -> Tensor:
        return torch.cat(
            [softmax_attention(q, *kv[i].unbind(1)) for i, q in enumerate(x.feats.split(x.counts)) if len(q)]
        )

    compare(lambda: cross_attention(x.feats, kv, x), loop, x.feats, kv)


def test_bfloat16_attention_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for CPUs, cut into several parts: windows by a small cache, a long sample by blocks of queries."""
    x = random_tensor(3, 2, 8, dtype=torch.float32)
    low = x.feats.detach().bfloat16().requires_grad_()
    exact = low.detach().float().requires_grad_()
    direction = torch.randn(len(x), 2, 8).bfloat16()
    monkeypatch.setattr(attention, "MAX_SCORES", 3000)
    ours, expected = windowed_attention(low, x, 4, 2), windowed_attention(exact, x, 4, 2)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.03)
    ours.backward(direction)
    expected.backward(direction.float())
    torch.testing.assert_close(low.grad.float(), exact.grad, rtol=0, atol=0.06)
    one = random_tensor(3, 2, 8, counts=(150,), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            full_attention(one.feats.bfloat16(), one).float(), full_attention(one.feats, one), rtol=0, atol=0.03
        )


def test_buckets_are_few_and_waste_is_bounded() -> None:
    lengths = torch.randint(1, 513, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    ragged = attention.bucket_groups(lengths, None, torch.device("cpu"))
    assert sorted(group for bucket in ragged.buckets for group in bucket.groups) == list(range(600))
    assert len(ragged.buckets) <= 20
    padded = sum(len(bucket.groups) * bucket.length**2 for bucket in ragged.buckets)
    real = sum(length**2 for length in lengths)
    assert padded <= (1 + attention.WASTE["cpu"]) * real + len(ragged.buckets) * attention.FREE_WASTE["cpu"]
    assert torch.equal(ragged.rows[ragged.places], torch.arange(sum(lengths)))
    long = attention.bucket_groups([1500, 1400, 1500, 90, 0, 91], None, torch.device("cpu"))
    assert [(bucket.groups, bucket.length, bucket.mask is None) for bucket in long.buckets] == [
        ([0, 2], 1500, True),
        ([1], 1400, True),
        ([5, 3], 91, False),
    ]


def test_partitions_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []

    def partition(*args):
        computed.append(1)
        return _partition(*args)

    _partition = attention._window_partition
    monkeypatch.setattr(attention, "_window_partition", partition)
    x = random_tensor(3, 2, 4)
    for shift in (0, 2, 0, (2, 2, 2), 0):
        windowed_attention(x.feats, x.replace(x.feats * 2), 4, shift)
        window_partition(x, 4, shift)
    assert len(computed) == 2


def test_wrong_shapes_of_attention_are_named() -> None:
    x = random_tensor(3, 2, 4)
    with pytest.raises(ValueError, match=r"qkv is \(106, 2, 2, 4\), it must be \(106, 3, heads, channels\)"):
        full_attention(x.feats[:, :2], x)
    with pytest.raises(ValueError, match=r"kv is \(3, 5, 2, 2, 4\), it must be \(4, tokens, 2, 2, 4\)"):
        cross_attention(x.feats[:, 0], torch.zeros(3, 5, 2, 2, 4), x)
    with pytest.raises(ValueError, match="at least 1"):
        window_partition(x, 0)
    with pytest.raises(ValueError, match="one for each of x, y, z"):
        window_partition(x, (4, 4))


# ---- published numbers


def fixture(fixtures_dir: Path, name: str):
    file = read_fixture(fixtures_dir / f"08_op_{name}_a.safetensors")
    feats = file.inputs.get("feats", torch.zeros(len(file.inputs["coords"]), 0))
    return file, SparseTensor(feats, file.inputs["coords"])


@pytest.mark.parametrize(
    ("name", "module"),
    [("subm_conv3", SparseConv3d), ("subm_conv1", SparseConv3d), ("sparse_group_norm", SparseGroupNorm32)],
)
def test_published_modules(fixtures_dir: Path, name: str, module: type[torch.nn.Module]) -> None:
    file, x = fixture(fixtures_dir, name)
    layer = module(**file.config)
    layer.load_state_dict(file.weights, strict=True)
    file.check("feats", layer(x).feats)


def test_published_resampling(fixtures_dir: Path) -> None:
    file, x = fixture(fixtures_dir, "sparse_downsample")
    down = SparseDownsample(file.run["factor"])(x)
    file.check("down_coords", down.coords)
    file.check("down_feats", down.feats)
    up = SparseUpsample(file.run["factor"])(down)
    file.check("up_coords", up.coords)
    file.check("up_feats", up.feats)
    file, x = fixture(fixtures_dir, "sparse_subdivide")
    file.check("coords", subdivide(x).coords)
    file.check("feats", subdivide(x).feats)


def test_published_attention(fixtures_dir: Path) -> None:
    file, x = fixture(fixtures_dir, "sparse_attention")
    file.check("self_out", full_attention(file.inputs["qkv"], x))
    file.check("cross_out", cross_attention(file.inputs["q"], file.inputs["kv"], x))
    file, x = fixture(fixtures_dir, "window_attention")
    for shift in file.run["shifts"]:
        windows = window_partition(x, file.run["window_size"], shift)
        group = torch.empty(len(x), dtype=torch.int32)
        for rows in windows.order.split(windows.lengths):
            group[rows] = int(rows.min())
        file.check(f"shift{shift}/group", group)
        file.check(f"shift{shift}/seq_lens", torch.tensor(sorted(windows.lengths), dtype=torch.int32))
        file.check(f"shift{shift}/out", windowed_attention(file.inputs["qkv"], x, file.run["window_size"], shift))


def test_children_of_children_match_the_reference_convolution() -> None:
    """The table of the coarse voxels alone carries two subdivisions."""
    x = random_tensor(2, counts=(20, 9))
    fine = subdivide(x)
    weight = torch.randn(3, 27, 2, dtype=torch.float64)
    ours = subdivided_conv(fine.feats, weight, neighbour_table(fine))
    expected = table_conv(subdivide(fine).feats, weight, conv._search_table(subdivide(fine).coords))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
