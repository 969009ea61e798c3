"""Shared fixtures: where the real data and the published numbers lie, and what to say when they do not."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _shared(variable: str, default: Path, what: str) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.skip(f"{what} not found at {path}: put it there or set {variable}")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """shared/data: real objects with licences and splits."""
    return _shared("TRIPTYCH_DATA", ROOT.parent / "shared" / "data", "the object data")


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """shared/fixtures/trellis: inputs, weights and outputs of the published modules."""
    return _shared("TRIPTYCH_FIXTURES", ROOT.parent / "shared" / "fixtures" / "trellis", "the numeric fixtures")
