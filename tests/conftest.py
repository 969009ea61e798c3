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


@pytest.fixture(scope="session")
def boxes_and_balls(tmp_path_factory) -> Path:
    """A prepared folder of forty boxes and balls of different sides; some land in each split. Not to be changed."""
    import numpy as np
    import trimesh

    from trainer.prepare.build import BuildOptions
    from trainer.prepare.run import prepare
    from trainer.prepare.sources import find_sources

    folder = tmp_path_factory.mktemp("meshes")
    generator = np.random.default_rng(0)
    for i in range(40):
        shape = trimesh.creation.box(generator.uniform(0.3, 1, 3)) if i % 2 else trimesh.creation.icosphere(2)
        shape.apply_scale(generator.uniform(0.5, 1, 3))
        shape.export(folder / f"{i:02d}.ply")
    out = tmp_path_factory.mktemp("data")
    summary = prepare(find_sources([folder]), out, BuildOptions(yaws=1, view_size=64), workers=0)
    assert summary["objects"] == 40 and min(summary["splits"].values()) >= 0 and summary["splits"]["validation"] > 0
    return out
