"""Sparse tensors: what they hold, what they refuse, and that round trips lose nothing."""

import pytest
import torch

from triptych.sparse.tensor import SparseTensor


def example(channels: int = 3) -> SparseTensor:
    """Three samples of 4, 0 and 2 voxels on a grid of 5, rows unsorted inside each sample."""
    coords = torch.tensor(
        [[0, 4, 0, 1], [0, 0, 0, 0], [0, 2, 3, 4], [0, 0, 0, 1], [2, 1, 1, 1], [2, 0, 4, 2]], dtype=torch.int32
    )
    feats = torch.randn(6, channels, generator=torch.Generator().manual_seed(0))
    return SparseTensor(feats, coords, batch_size=3, resolution=5)


def test_samples_are_slices() -> None:
    x = example()
    assert x.counts == [4, 0, 2]
    assert x.layout == [slice(0, 4), slice(4, 4), slice(4, 6)]
    assert x.shape == (3, 3)
    assert len(x) == 6
    last = x.sample(2)
    assert torch.equal(last.coords, torch.tensor([[0, 1, 1, 1], [0, 0, 4, 2]], dtype=torch.int32))
    assert torch.equal(last.feats, x.feats[4:])
    assert len(x.sample(1)) == 0


def test_splitting_and_joining_samples_is_the_identity() -> None:
    x = example()
    y = SparseTensor.cat_samples([x.sample(i) for i in range(3)])
    assert torch.equal(y.coords, x.coords)
    assert torch.equal(y.feats, x.feats)
    assert (y.batch_size, y.resolution) == (3, 5)


def test_dense_grid_holds_every_row_at_its_voxel() -> None:
    x = example()
    dense = x.to_dense(fill=-7.0)
    assert dense.shape == (3, 3, 5, 5, 5)
    for (b, i, j, k), feats in zip(x.coords.tolist(), x.feats, strict=True):
        assert torch.equal(dense[b, :, i, j, k], feats)
    assert int((dense != -7.0).any(dim=1).sum()) == len(x)


def test_dense_round_trip() -> None:
    dense = torch.randn(2, 3, 4, 4, 4) * (torch.rand(2, 1, 4, 4, 4) > 0.7)
    x = SparseTensor.from_dense(dense)
    assert torch.equal(x.to_dense(), dense)
    assert torch.equal(x.coords, torch.argwhere(dense.ne(0).any(dim=1)).int())
    everything = SparseTensor.from_dense(dense, torch.ones(2, 4, 4, 4, dtype=torch.bool))
    assert everything.counts == [64, 64]


def test_gradients_pass_through_dense() -> None:
    x = example()
    feats = x.feats.clone().requires_grad_()
    weight = torch.randn(3, 3, 5, 5, 5)
    (x.replace(feats).to_dense() * weight).sum().backward()
    expected = torch.stack([weight[b, :, i, j, k] for b, i, j, k in x.coords.tolist()])
    assert torch.equal(feats.grad, expected)


def test_maps_are_computed_once_and_shared_by_replace() -> None:
    x = example()
    computed: list[int] = []

    def compute() -> int:
        computed.append(1)
        return 42

    y = x.replace(x.feats * 2).to(dtype=torch.float16).replace(torch.zeros(6, 9))
    assert [t.cached(("neighbours", 3), compute) for t in (x, y, x)] == [42, 42, 42]
    assert computed == [1]
    assert SparseTensor(x.feats, x.coords).maps == {}


def test_arithmetic_keeps_voxels() -> None:
    x = example()
    y = 2 * x - (x + x.replace(torch.ones(6, 3))) * 0.5
    torch.testing.assert_close(y.feats, 1.5 * x.feats - 0.5)
    assert y.coords is x.coords
    with pytest.raises(ValueError, match="different voxels"):
        x + example().sample(0)
    with pytest.raises(ValueError, match=r"not a tensor \(6, 3\)"):
        x * torch.ones(6, 3)


def test_channels_are_joined_on_equal_voxels_only() -> None:
    x = example()
    same = SparseTensor(x.feats[:, :1], x.coords.clone(), 3, 5)
    assert torch.equal(SparseTensor.cat_feats([x, same]).feats, torch.cat([x.feats, x.feats[:, :1]], dim=1))
    with pytest.raises(ValueError, match="different voxels"):
        SparseTensor.cat_feats([x, SparseTensor(x.feats, x.coords.roll(1, dims=1).clamp(max=0), 3, 5)])


def test_an_empty_tensor_is_allowed() -> None:
    x = SparseTensor(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int32), batch_size=2, resolution=3)
    assert x.counts == [0, 0]
    assert torch.equal(x.to_dense(), torch.zeros(2, 4, 3, 3, 3))


def rows(*coords: list[int]) -> torch.Tensor:
    return torch.tensor(coords, dtype=torch.int32)


@pytest.mark.parametrize(
    ("coords", "count", "options", "words"),
    [
        (rows([0, 1, 1, 1]).long(), 1, {}, r"must be \(N, 4\) int32"),
        (rows([0, 1, 1]), 1, {}, r"must be \(N, 4\) int32"),
        (rows([0, 1, 1, 1]), 2, {}, "one row for each of the 1 coords"),
        (rows([0, 1, 1, 1], [1, 0, 0, 0], [0, 2, 2, 2]), 3, {}, "row 2 is of sample 0 after sample 1"),
        (rows([0, 1, 1, 1], [2, 0, 0, 0]), 2, dict(batch_size=2), r"span 0\.\.2, outside 0\.\.1"),
        (rows([-1, 1, 1, 1]), 1, dict(batch_size=2), r"span -1\.\.-1, outside 0\.\.1"),
        (rows([0, 1, -1, 1]), 1, {}, r"span -1\.\.1, outside 0"),
        (rows([0, 1, 4, 1]), 1, dict(resolution=4), r"span 1\.\.4, outside 0\.\.3"),
    ],
)
def test_wrong_rows_are_refused(coords: torch.Tensor, count: int, options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseTensor(torch.zeros(count, 2), coords, **options)


def test_repeated_voxels_are_found_on_request() -> None:
    example().check_unique()
    with pytest.raises(ValueError, match="1 of 2 rows repeat"):
        SparseTensor(torch.zeros(2, 1), rows([0, 1, 2, 3], [0, 1, 2, 3])).check_unique()
