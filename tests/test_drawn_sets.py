"""Sets that a views model draws of prepared objects, and a flow that learns how far to believe them."""

import json
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
from triptych.geometry.cameras import FRAME_FILL
from triptych.images.views import prepare_views
from triptych.pipelines.reconstruct import Settings, mesh_from_views
from triptych.procedural import sample_views

EMBEDDED = "triptych-tiny"  # its files are hashed, it is not loaded


class Painter(FakeViews):
    """Draws the sample object whatever it is shown; nothing at all of its left side."""

    def __init__(self):
        super().__init__()
        self.faults = {0: [("left", blank)]}

    def sheet(self, prompt, references, *, seed, **rest):
        assert prompt.startswith(". given: ") and len(prompt.split(", ")) == len(references)
        return super().sheet(prompt, references, seed=0, **rest)


@pytest.fixture(scope="module")
def data(boxes_and_balls, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    shutil.copytree(boxes_and_balls, folder)
    with pytest.raises(TriptychError, match="has no drawn sets: run `python -m trainer drawn"):
        DrawnSets(PreparedData(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "_model", lambda *which: Painter())
        made, skipped = drawn.draw_sets(folder, EMBEDDED, sets=2)
        assert made + skipped == 2 * len(PreparedData(folder).records) and skipped < made / 4
        # A second run finds all done, and asks no model.
        patch.setattr(drawn, "_model", lambda *which: pytest.fail("drawn again"))
        assert drawn.draw_sets(folder, EMBEDDED, sets=2) == (made, skipped)
    return folder


def test_given_views_stand_beside_drawn_ones_at_the_scale_that_is_told(data):
    train_data = PreparedData(data)
    sets, lone, total = DrawnSets(train_data), 0, 0
    for index, (shard, row, _) in enumerate(train_data.rows):
        for number in range(sets.count(shard, row)):
            found = sets.get(shard, row, number, whole=False)
            true = symmetric_sample(train_data[index], found["symmetry"])["albedo"][..., 3]
            total, lone = total + 1, lone + (found["given"].sum() == 1)
            assert found["given"].any() and (found["shown"] | ~found["given"]).all()
            assert found["shown"][1] == found["given"][1], "the left panel is always empty"
            for view in np.flatnonzero(found["given"]):
                area = (found["views"][view, ..., 3] > 127).sum() / (true[view] > 127).sum()
                assert np.sqrt(area) == pytest.approx(found["scale"], rel=0.09), "a few pixels"
            whole = sets.get(shard, row, number, whole=True)
            assert not whole["given"].any() and whole["shown"].tolist() == [True, False, True, True]
    assert 0.5 * total < lone < total


def test_sets_of_objects_that_are_gone_are_refused(data, tmp_path):
    """A folder that was prepared anew has other objects in its rows."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    index = json.loads((folder / "index.json").read_text())
    ready = [record for record in index["records"] if record["status"] == "ok" and record["split"] == "train"]
    ready[0]["key"] = "another"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(TriptychError, match="was prepared again after its sets were drawn"):
        DrawnSets(PreparedData(folder))


def test_what_cannot_be_drawn_is_skipped_and_told_and_a_failing_model_is_an_error(
    boxes_and_balls, tmp_path, monkeypatch
):
    folder = tmp_path / "data"
    shutil.copytree(boxes_and_balls, folder)
    empty = FakeViews()
    monkeypatch.setattr(
        empty, "sheet", lambda *asked, **more: torch.tensor([1.0, 0, 1])[:, None, None].expand(3, 256, 256)
    )
    monkeypatch.setattr(drawn, "_model", lambda *which: empty)
    total = len(PreparedData(folder).records)
    assert drawn.draw_sets(folder, EMBEDDED) == (0, total)
    reasons = [
        one["reason"] for file in (folder / "drawn").glob("*.json") for one in json.loads(file.read_text())["skipped"]
    ]
    assert len(reasons) == total and all("panel: the set has no known scale" in reason for reason in reasons)
    monkeypatch.setattr(drawn, "_model", lambda *which: pytest.fail("an empty shard is done too"))
    assert drawn.draw_sets(folder, EMBEDDED) == (0, total)

    def breaks(*asked, **more):
        raise TriptychError("out of memory")

    monkeypatch.setattr(empty, "sheet", breaks)
    monkeypatch.setattr(drawn, "_model", lambda *which: empty)
    with pytest.raises(TriptychError, match="out of memory"):
        drawn.draw_sets(folder, EMBEDDED, sets=2)


def shadow_of(solid, view):
    """A solid (R, R, R) as the rig's view number ``view`` sees it: rows from the top, columns from the left."""
    across = solid.any(axis=0) if view % 2 else solid.any(axis=2).T  # (y, z) from the left, (y, x) from the front
    return (across if view in (0, 3) else across[:, ::-1])[::-1]


def overlap(mask, shadow):
    """IoU of a view's mask (S, S) with a solid's shadow, which fills the cube and so FRAME_FILL of the frame."""
    side = round(FRAME_FILL * len(mask))
    rows = (np.arange(side) * len(shadow)) // side
    wide = np.zeros_like(mask)
    start = (len(mask) - side) // 2
    wide[start : start + side, start : start + side] = shadow[rows][:, rows]
    return (mask & wide).sum() / (mask | wide).sum()


def test_a_sample_is_a_set_in_any_symmetry_with_its_drawn_views_marked(data):
    task = StructureFlowTask(
        StructureFlowConfig(data=str(data), image_size=64, drawn_share=1.0, drawn_whole=0.3, drop_drawn=0.4)
    )
    task.setup(torch.device("cpu"))
    drawn_ones = [index for index in range(task.size()) if task.drawn[0].count(*task.data.place(index)[1:])]
    whole = told = 0
    fewest = 4
    for seed in range(40):
        sample = task.sample(drawn_ones[seed % len(drawn_ones)], seed)
        count = len(sample["views"])
        assert sample["images"].shape == (count, 4, 64, 64) and sample["drawn"].shape == (count,)
        assert sample["sdf"].shape == (64, 64, 64) and (sample["sdf"] < 0).any()
        fewest = min(fewest, int(sample["drawn"].sum()))
        whole += bool(sample["drawn"].all())
        solid = (sample["sdf"] < 0).numpy()
        for view, is_drawn, image in zip(
            sample["views"].tolist(), sample["drawn"].tolist(), sample["images"], strict=True
        ):
            if not is_drawn:
                assert overlap(image[3].numpy() > 127, shadow_of(solid, view)) > 0.75
                turned = overlap(image[3].numpy() > 127, shadow_of(solid, (view + 1) % 4))
                told += turned < 0.75
    assert fewest == 0, "what is drawn is left out at times, what is given never"
    assert 4 < whole < 25 and told > 5, "else a wrong view would pass"
    again = task.sample(7, 7)
    assert all(torch.equal(again[key], value) for key, value in task.sample(7, 7).items())


def test_further_folders_bring_their_own_drawn_sets(data, boxes_and_balls, tmp_path):
    """A folder without sets gives true views alone; which folder comes first makes no difference."""
    bare = tmp_path / "bare"
    shutil.copytree(boxes_and_balls, bare)
    (bare / "drawn").mkdir()  # as an interrupted command leaves it
    for first, second in ((data, bare), (bare, data)):
        config = StructureFlowConfig(
            data=str(first), extra_data=(str(second),), image_size=64, drawn_share=1.0, drawn_whole=1.0, drop_drawn=0.0
        )
        task = StructureFlowTask(config)
        task.setup(torch.device("cpu"))
        marked = {part: 0 for part in (0, 1)}
        for index in range(task.size()):
            marked[task.data.place(index)[0]] += int(task.sample(index, 3)["drawn"].sum())
        assert [part for part, count in marked.items() if count] == [0 if first == data else 1]
    nowhere = StructureFlowTask(replace(config, extra_data=()))
    with pytest.raises(TriptychError, match="has no drawn sets: run `python -m trainer drawn"):
        nowhere.setup(torch.device("cpu"))


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
    views = replace(prepare_views(sample_views(128), size=128), generated=(90.0, 180.0, 270.0))
    settings = Settings(texture_size=0, ensemble=2, keep_silhouettes=False)
    fields = []
    for strength in (0.0, 3.0):
        with torch.no_grad():
            flow.out_layer.bias.fill_(1.0)
            flow.drawn_pairs.fill_(strength)
        fields.append(mesh_from_views(views, bundle, settings).field)
    assert not np.array_equal(*fields)
