"""Sets that a views model draws of prepared objects, and a flow that learns how far to believe them."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_views import FakeViews, blank

from trainer.data import DrawnSets, PreparedData, symmetric_sample
from trainer.loop import export, train
from trainer.prepare import drawn
from trainer.recipes import build_recipe
from trainer.tasks.structure_flow import StructureFlowConfig, StructureFlowTask
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.images.views import prepare_views
from triptych.pipelines.reconstruct import Settings, mesh_from_views
from triptych.procedural import sample_views


class Painter(FakeViews):
    """Draws the sample object whatever it is shown; nothing at all of its left side."""

    def __init__(self):
        super().__init__()
        self.faults = dict.fromkeys(range(2**20), [("left", blank)])

    def sheet(self, prompt, references, *, seed, **rest):
        return super().sheet(prompt, references, seed=0, **rest)


@pytest.fixture(scope="module")
def data(boxes_and_balls, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    shutil.copytree(boxes_and_balls, folder)
    with pytest.raises(TriptychError, match="has no drawn sets: run `python -m trainer drawn"):
        DrawnSets(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "_model", lambda name, device: Painter())
        count = drawn.draw_sets(folder, "painter", sets=2)
        assert count == 2 * len(PreparedData(folder, "train").records)
        # A second run finds all done, and asks no model.
        patch.setattr(drawn, "_model", lambda name, device: pytest.fail("drawn again"))
        assert drawn.draw_sets(folder, "painter", sets=2) == count
    return folder


def test_given_views_stand_beside_drawn_ones_at_the_scale_that_is_told(data):
    sets, train_data = DrawnSets(data), PreparedData(data, "train")
    lone = 0
    for index, (shard, row, _) in enumerate(train_data.rows):
        assert sets.count(shard, row) == 2
        found = sets.get(shard, row, 0, whole=False)
        true = symmetric_sample(train_data[index], found["symmetry"])["albedo"][..., 3]
        lone += found["given"].sum() == 1
        assert found["given"].any() and (found["shown"] | ~found["given"]).all()
        assert found["shown"][1] == found["given"][1], "the left panel is always empty"
        for view in np.flatnonzero(found["given"]):
            area = (found["views"][view, ..., 3] > 127).sum() / (true[view] > 127).sum()
            assert np.sqrt(area) == pytest.approx(found["scale"], rel=0.09), "a few pixels"
        whole = sets.get(shard, row, 0, whole=True)
        assert not whole["given"].any() and whole["shown"].tolist() == [True, False, True, True]
    assert 0.4 * len(train_data) < lone < len(train_data)


def test_a_sample_is_a_set_in_any_symmetry_with_its_drawn_views_marked(data):
    task = StructureFlowTask(StructureFlowConfig(data=str(data), image_size=64, drawn_share=1.0, drawn_whole=0.3))
    task.setup(torch.device("cpu"))
    whole = 0
    for seed in range(40):
        sample = task.sample(seed % task.size(), seed)
        count = len(sample["views"])
        assert sample["images"].shape == (count, 4, 64, 64) and sample["drawn"].shape == (count,)
        assert sample["sdf"].shape == (64, 64, 64) and (sample["sdf"] < 0).any()
        assert sample["drawn"].any() or count < 4
        whole += bool(sample["drawn"].all())
        solid = (sample["sdf"] < 0).numpy()
        for view, is_drawn, image in zip(
            sample["views"].tolist(), sample["drawn"].tolist(), sample["images"], strict=True
        ):
            if not is_drawn:  # the given view's outline is the solid's shadow
                shadow = solid.any(axis=0 if view % 2 else 2)
                shadow = np.maximum(shadow, shadow[::-1]) if view % 2 else shadow
                height = np.ptp(np.flatnonzero(shadow.any(axis=1 if view % 2 else 0)))
                wanted = np.ptp(np.flatnonzero((image[3] > 127).any(dim=1).numpy())) / 0.85
                assert height == pytest.approx(wanted, abs=4)
    assert 4 < whole < 25
    again = task.sample(7, 7)
    assert all(torch.equal(again[key], value) for key, value in task.sample(7, 7).items())


def test_a_flow_trained_on_drawn_sets_reads_the_marks(data, tmp_path):
    recipe = replace(
        build_recipe("structure_flow_tiny"),
        task_config=StructureFlowConfig(
            data=str(data), model_channels=48, num_blocks=1, num_heads=4, image_size=64, encoder_channels=(8, 16),
            encoder_blocks=(1, 1), validation_objects=2, drawn_share=0.7,
        ),
        steps=3, batch_size=4, warmup_steps=1, validate_every=3, pictures_every=0,
    )  # fmt: skip
    train(recipe, tmp_path / "run", device="cpu")
    export(tmp_path / "run", tmp_path / "bundle", device="cpu")
    bundle = load_bundle(tmp_path / "bundle")
    flow = bundle.network("structure_flow")
    assert flow.reads_drawn_views and flow.drawn_pairs.abs().sum() > 0 and flow.drawn_tokens.abs().sum() > 0
    with torch.no_grad():
        flow.out_layer.bias.fill_(1.0)
        flow.drawn_pairs.normal_(std=3.0)
    views = prepare_views(sample_views(128), size=128)
    settings = Settings(texture_size=0, ensemble=2)
    fields = [
        mesh_from_views(replace(views, generated=marks), bundle, settings).field for marks in ((), (90.0, 180.0, 270.0))
    ]
    assert not np.array_equal(*fields)
