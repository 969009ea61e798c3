"""Sheets follow the prepared folder that they were made of, and a run says when they are not what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from tests.flux_tiny import klein_folder  # noqa: E402
from tests.prepared_folder import write_prepared_folder  # noqa: E402
from tests.test_small_data_sets import _config, _train  # noqa: E402
from trainer.prepare.sheet_cache import SheetOptions, cache_sheets  # noqa: E402
from trainer.sheet_data import SheetData  # noqa: E402
from triptych.errors import TriptychError  # noqa: E402


def _cache(data: Path, out: Path, variants: int = 1) -> Path:
    cache_sheets([data], klein_folder(), out, SheetOptions(panel=64, variants=variants, captions=1))
    return out


def _times(cache: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in cache.glob("*_0_*.safetensors")}


@pytest.fixture
def data(tmp_path) -> Path:
    return write_prepared_folder(tmp_path / "data", ["train", "train", "train", "validation"])


@pytest.mark.parametrize("change", [{"file_sha256": "f" * 64}, {"rows": [0]}, {"key": "another"}, {"name": "blue_box"}])
def test_sheets_of_objects_that_changed_are_made_again(data, tmp_path, capsys, change):
    cache = _cache(data, tmp_path / "sheets", variants=2)
    before = _times(cache)
    assert _times(_cache(data, cache, variants=2)) == before and "made again" not in capsys.readouterr().err
    index = json.loads((data / "index.json").read_text())
    index["records"][1] |= change
    (data / "index.json").write_text(json.dumps(index))
    after = _times(_cache(data, cache, variants=2))
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"train_0_0_0000.safetensors", "train_0_1_0000.safetensors"}
    assert "2 shards of" in capsys.readouterr().err
    said = SheetData([cache]).said
    fresh = SheetData([_cache(data, tmp_path / "fresh", variants=2)]).said
    assert said == fresh


def test_sheets_of_earlier_versions_train_and_are_kept_where_their_objects_are_the_same(data, tmp_path):
    """They tell the objects' keys and names alone."""
    cache = _cache(data, tmp_path / "sheets")
    file = cache / "train_0_0_0000.json"
    whole = file.read_text()
    said = [{key: value for key, value in one.items() if key != "made_of"} for one in json.loads(whole)]
    file.write_text(json.dumps(said))
    assert len(SheetData([cache])) == 3
    before = _times(cache)
    assert _times(_cache(data, cache)) == before and json.loads(file.read_text()) == said
    said[1]["key"] = "another"
    file.write_text(json.dumps(said))
    _cache(data, cache)
    assert file.read_text() == whole


def test_a_cache_that_is_half_made_again_is_not_trained_on(data, tmp_path, monkeypatch):
    cache = _cache(data, tmp_path / "sheets")
    (cache / "train_0_0_0000.json").write_text("[]")

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.prepare.sheet_cache._build_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        _cache(data, cache)
    with pytest.raises(TriptychError, match="is not finished: run the same"):
        SheetData([cache])


def test_a_run_that_goes_on_with_other_sheets_says_so(data, tmp_path, capsys):
    cache, run = _cache(data, tmp_path / "sheets"), tmp_path / "run"
    config = _config(cache, generated_sheets=0, validation_sheets=1)
    for steps, others in ((1, False), (1, False), (1, True)):
        if others:
            shutil.rmtree(cache)
            index = json.loads((data / "index.json").read_text())
            index["records"][0]["file_sha256"] = "e" * 64
            (data / "index.json").write_text(json.dumps(index))
            _cache(data, cache)
        capsys.readouterr()
        _train(config, run, steps=steps)
        assert ("the training data is not what it was up to step 1" in capsys.readouterr().out) == others
