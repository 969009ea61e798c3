"""The network that tells depths: what it learns, where it is kept, and what it does to drawn sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_views import FakeViews, truth

from trainer.tasks.proportions import ProportionsConfig, ProportionsTask, halved, log_depths, reduced
from triptych.errors import TriptychError
from triptych.flux.backend import proportions_of
from triptych.flux.card import write_card
from triptych.flux.hub import ModelPlace
from triptych.geometry.cameras import VIEW_NAMES
from triptych.images.foreground import alpha_box
from triptych.images.views import prepare_views
from triptych.models.proportions import FILE, Proportions, laplace_loss, read_proportions, write_proportions
from triptych.pipelines.drawn_views import at_width, expected_widths, put_together
from triptych.pipelines.views import ViewSettings, views_from_prompt


class Says(Proportions):
    """Always the same depth; notes what it was shown."""

    def __init__(self, depth: float) -> None:
        super().__init__()
        self.depth = depth
        self.eval()

    def forward(self, pictures):
        self.shown = pictures
        return torch.tensor([[np.log(self.depth), -1.0]]).expand(len(pictures), 2)


def slab(width, height, middle=64):
    """A grey rectangle in a panel of 128, its middle in that row."""
    view = np.zeros((128, 128, 4), dtype=np.float32)
    view[middle - height // 2 : middle + height // 2, 64 - width // 2 : 64 + width // 2] = (0.5, 0.5, 0.5, 1.0)
    return view


def sides(view):
    left, top, right, bottom = alpha_box(view[..., 3])
    return right - left, bottom - top


def test_a_picture_is_framed_as_in_training_and_both_sides_get_its_depth():
    network = Says(0.5)
    known = {"front": np.roll(slab(30, 80), (12, -9), axis=(0, 1))}
    assert expected_widths(known, network) == pytest.approx({"left": 40.0, "right": 40.0})
    assert sides(network.shown[0].permute(1, 2, 0).numpy())[1] == pytest.approx(0.85 * 24, abs=1)
    left, top, right, bottom = alpha_box(network.shown[0, 3].numpy())
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((12, 12), abs=0.5)
    # both views of one axis are asked, and the mean of their logarithms counts
    assert expected_widths(known | {"back": slab(30, 40)}, network)["left"] == pytest.approx(0.5 * (80 * 40) ** 0.5)
    assert set(expected_widths({"right": slab(30, 80)}, network)) == {"front", "back"}
    # two axes are given, or nobody knows
    assert expected_widths(known | {"left": slab(20, 80)}, network) == {} == expected_widths(known, None)
    assert expected_widths({}, network) == {}


def test_drawn_sides_get_the_expected_width_and_keep_their_height():
    known = {"front": slab(40, 80)}
    panels = {name: slab(20, 40) for name in VIEW_NAMES} | {"left": slab(24, 40), "right": slab(10, 40)}
    given, missing = prepare_views(known, size=128), ("left", "back", "right")
    as_drawn, _ = put_together(given, panels, missing, 128)
    brought, notes = put_together(given, panels, missing, 128, Says(0.8))
    assert notes == []
    for name in ("front", "back"):
        assert np.allclose(brought.pictures[name], as_drawn.pictures[name])
    for name in ("left", "right"):
        width, height = sides(brought.pictures[name])
        assert height == pytest.approx(sides(as_drawn.pictures[name])[1], abs=0.6)
        assert width == pytest.approx(0.8 * height, abs=2), name
    # deeper than the front is high: everything makes room, as at every scale
    deep, _ = put_together(given, panels, missing, 128, Says(2.0))
    assert sides(deep.pictures["left"])[0] == pytest.approx(0.85 * 128, abs=2)
    assert sides(deep.pictures["front"])[1] == pytest.approx(0.425 * 128, abs=2)
    # without a given view there is no picture to ask about
    free, _ = put_together(None, panels, VIEW_NAMES, 128, Says(2.0))
    assert np.allclose(free.pictures["left"], put_together(None, panels, VIEW_NAMES, 128)[0].pictures["left"])


def test_a_panel_is_drawn_out_within_limits():
    assert sides(at_width(slab(20, 40), 50.0)) == pytest.approx((50, 40), abs=1)
    assert sides(at_width(slab(60, 40), 15.0)) == pytest.approx((15, 40), abs=1)
    assert at_width(slab(20, 40), 1e6).shape == (128, 6 * 128, 4), "at most six times"


def test_the_pipeline_asks_the_network_of_its_model():
    model = FakeViews()
    picture = {"front": (truth(256)["front"] * 255).round().astype(np.uint8)}
    plain = views_from_prompt(images=picture, model=model, settings=ViewSettings(size=128))
    model.proportions = Says(0.3)
    told = views_from_prompt(images=picture, model=model, settings=ViewSettings(size=128))
    assert sides(told.views["left"])[0] == pytest.approx(0.3 * max(sides(told.views["front"])), abs=2)
    assert abs(sides(plain.views["left"])[0] - sides(told.views["left"])[0]) > 5


def test_depths_are_widths_of_the_view_beside():
    alpha = np.zeros((4, 64, 64), dtype=np.uint8)
    alpha[0::2, 10:50, 20:30] = 255  # front and back: 10 wide, 40 high
    alpha[1::2, 10:50, 22:42] = 255  # sides: 20 wide
    assert log_depths(alpha) == pytest.approx(np.log([0.5, 0.25, 0.5, 0.25]))
    alpha[1::2] = 0  # a sheet of paper
    found = log_depths(alpha)
    assert found[[0, 2]] == pytest.approx([-3.0, -3.0]) and np.isnan(found[[1, 3]]).all()


def test_half_size_views_are_averaged_where_they_are_opaque():
    albedo = np.zeros((4, 4, 4, 4), dtype=np.uint8)
    albedo[..., :3] = 9  # colour of what is transparent
    albedo[:, :2, :1] = (200, 100, 0, 255)
    normal = np.full((4, 4, 4, 3), 7, dtype=np.uint8)
    normal[:, :2, :1] = 255
    small, turned = halved(albedo, normal)
    assert small.shape == (4, 2, 2, 4) and turned.shape == (4, 2, 2, 3)
    assert small[0, 0, 0].tolist() == [200, 100, 0, 128] and turned[0, 0, 0].tolist() == [255] * 3
    assert (small[:, 1:, :, 3] == 0).all()


def test_mirror_images_have_one_answer_and_files_keep_it(tmp_path):
    torch.manual_seed(0)
    network = Proportions(size=32, width=8, blocks=2)
    network(torch.rand(16, 4, 32, 32))  # running means
    network.eval()
    pictures = torch.rand(3, 4, 32, 32)
    assert torch.allclose(network(pictures), network(pictures.flip(-1)), atol=1e-6)
    write_proportions(network, tmp_path)
    again = read_proportions(tmp_path, [FILE])
    assert torch.allclose(again(pictures), network(pictures), atol=2e-2) and not again.training
    assert read_proportions(tmp_path, []) is None, "only what the card lists is read"
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(TriptychError, match="is damaged or of another version .*: fetch the model again"):
        read_proportions(tmp_path, [FILE])
    with pytest.raises(TriptychError, match="pictures of 6 px do not halve 3 times"):
        Proportions(size=6)


def test_a_card_lists_the_file_and_loading_finds_it(tmp_path):
    write_proportions(Proportions(size=32, width=8, blocks=2), tmp_path)
    card = write_card(tmp_path, FakeViews().card)
    assert FILE in card.files
    assert proportions_of(ModelPlace(tmp_path, "it", card)).width == 8
    assert proportions_of(ModelPlace(tmp_path, "it", None)) is None


def test_the_loss_is_least_at_the_median_and_the_mean_deviation():
    true = torch.tensor([0.0, 1.0, 5.0])
    spread = float(torch.tensor((1.0 + 4.0) / 3).log())
    best = laplace_loss(torch.tensor([[1.0, spread]]).expand(3, 2), true)
    for mean, log_spread in ((0.8, spread), (1.3, spread), (1.0, spread - 0.2), (1.0, spread + 0.2)):
        assert laplace_loss(torch.tensor([[mean, log_spread]]).expand(3, 2), true) > best


def test_pictures_are_as_sharp_as_their_size_allows():
    """Something that was drawn small and enlarged looks like something that was drawn large."""
    torch.manual_seed(0)
    large = torch.cat([torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)], dim=1)
    blurred = torch.nn.functional.interpolate(torch.nn.functional.interpolate(large, size=32, mode="area"), size=64)
    assert (large - blurred).abs().mean() > 0.15
    assert torch.allclose(reduced(large, 16, 24), reduced(blurred, 16, 24), atol=1e-5)
    assert reduced(large, 24, 24).shape == (1, 4, 24, 24)
    edge = torch.cat([torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 1, 4, 4)], dim=1)
    edge[:, :, :, :1] = 1
    assert reduced(edge, 2, 2)[0, 0, 0, 0] == 1, "what is transparent has no colour"


def pillar(generator):
    """A prepared sample of something as deep as it is wide, between 8 and 56 of 64 pixels either way."""
    width, height = generator.integers(8, 56, 2)
    albedo = np.zeros((4, 64, 64, 4), dtype=np.uint8)
    albedo[:, 32 - height // 2 : 32 + height // 2, 32 - width // 2 : 32 + width // 2] = (90, 140, 60, 255)
    normal = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    return {"albedo": albedo, "normal": normal, "sdf": np.zeros((8, 8, 8), dtype=np.int8)}


def test_it_learns_what_the_outline_tells():
    task = ProportionsTask(ProportionsConfig(("unused",), (12, 16), width=8, blocks=2, dropout=0.0))
    generator = np.random.default_rng(0)
    task.device = torch.device("cpu")
    task.data, task.held_out = ([pillar(generator) for _ in range(count)] for count in (64, 24))
    sample = task.sample(3, 5)
    assert sample["pictures"].shape == (4, 4, 16, 16) and sample["depths"].shape == (4,)
    assert all(torch.equal(a, b) for a, b in zip(sample.values(), task.sample(3, 5).values(), strict=True))
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for step in range(200):
        batch = task.collate([task.sample((step * 8 + i) % 64, step * 8 + i) for i in range(8)])
        loss, _ = task.loss(model, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = task.validate(model.eval())
    assert found["error"] < 0.7 * found["constant"] and found["explained"] > 0.6, found
