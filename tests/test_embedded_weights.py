"""What the repository carries: its size, and that the files are those that were hashed."""

from pathlib import Path

import pytest

from triptych.bundles.bundle import load_bundle
from triptych.flux.card import read_card, verify_files

WEIGHTS = Path(__file__).parent.parent / "weights"
MB = 10**6


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_embedded_weights_stay_small():
    assert 10 * MB < size_of(WEIGHTS / "triptych-tiny" / "flux") <= 40 * MB
    assert 20 * MB < size_of(WEIGHTS) <= 75 * MB


@pytest.mark.parametrize("part", ["bundle", "flux"])
def test_the_embedded_weights_are_whole_and_name_no_place(part):
    folder = WEIGHTS / "triptych-tiny"
    if part == "bundle":
        load_bundle(folder).verify()
        text = (folder / "bundle.json").read_text()
    else:
        verify_files(folder / "flux", read_card(folder / "flux"))
        text = (folder / "flux" / "views.json").read_text()
    assert not any(place in text for place in ("/work/", "/root/", "/home/", "/tmp/", "Users"))
