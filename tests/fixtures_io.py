"""Read a reference file of shared/fixtures/trellis: weights, inputs and outputs of the original implementation."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Fixture:
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    config: dict[str, Any]
    run: dict[str, Any]
    tolerance: dict[str, float]
    metadata: dict[str, str]

    def check(self, name: str, actual: Tensor) -> None:
        """Assert equality for integers and for outputs without a tolerance, else the file's absolute tolerance."""
        expected = self.outputs[name]
        assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
        atol = self.tolerance.get(name)
        if atol is None or not expected.is_floating_point():
            assert torch.equal(actual, expected), f"{name} differs"
            return
        error = float((actual.detach() - expected).abs().max())
        assert error <= atol, f"{name}: error {error:.2e} > {atol:.0e}"


def read_fixture(path: Path) -> Fixture:
    groups: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for key in file.keys():  # noqa: SIM118  (safe_open is no dict)
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    numbers = {
        name: float(value) for name, value in json.loads(metadata.get("tolerance", "{}")).items() if _is_number(value)
    }
    return Fixture(
        weights=groups["weights"],
        inputs=groups["input"],
        outputs=groups["output"],
        config=json.loads(metadata.get("config", "{}")),
        run=json.loads(metadata.get("run", "{}")),
        tolerance=numbers,
        metadata=metadata,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
