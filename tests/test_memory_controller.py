"""The memory controller on a simulated device, what blocks keep against counted tensors, and that nothing changes."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer_toy import ToyTask, recipe
from trainer.__main__ import main
from trainer.checkpoint import find_checkpoint
from trainer.loop import train
from trainer.memory import (
    GIB,
    MemoryController,
    NoController,
    Recomputable,
    memory_controller,
    recomputables,
    remedies,
    static_bytes,
    transformer_bytes,
)
from trainer.recipes import build_recipe
from triptych.errors import TriptychError
from triptych.models.slat_flow import SLatFlowModel
from triptych.models.structure_flow import SparseStructureFlowModel
from triptych.sparse.tensor import SparseTensor

CPU = torch.device("cpu")


def _slat_flow(blocks: int = 4) -> SLatFlowModel:
    torch.manual_seed(0)
    return SLatFlowModel(
        resolution=8, in_channels=4, model_channels=32, cond_channels=16, out_channels=4, num_blocks=blocks,
        num_heads=2, patch_size=2, num_io_res_blocks=1, io_block_channels=[16], share_mod=True,
    )  # fmt: skip


@dataclass
class SimulatedDevice:
    """A card on which a pass takes ``slope * cost * kept share + fixed`` bytes beside what the model takes."""

    torso: Any
    slope: float = 3000.0
    fixed: int = 40_000_000
    total: int = GIB
    model: int = 300_000_000
    cost: int = 0
    worst: int = 0

    def capacity(self) -> int:
        return self.total

    def in_use(self) -> int:
        return self.model

    def reset_peak(self) -> None:
        pass

    def peak(self) -> int:
        kept = 1 - self.torso.module.recompute_blocks / len(self.torso.blocks)
        taken = int(self.model + self.slope * self.cost * kept + self.fixed)
        self.worst = max(self.worst, taken)
        return taken


def _simulated(target: float = 0.8, blocks: int = 24) -> tuple[MemoryController, SimulatedDevice]:
    torso = Recomputable(_slat_flow(blocks))
    torso.blocks, torso.bytes = torso.blocks[:blocks], torso.bytes[:blocks]  # transformer blocks alone: all alike
    device = SimulatedDevice(torso)
    return MemoryController([torso], device, device.capacity(), 0, target), device


def _run(controller: MemoryController, device: SimulatedDevice, costs: list[int]) -> list[int]:
    chosen = []
    for cost in costs:
        device.cost = cost
        with controller.watching(cost):
            chosen.append(controller.recomputed)
    return chosen


def test_it_recomputes_as_few_blocks_as_the_batch_needs() -> None:
    controller, device = _simulated()
    _run(controller, device, [50_000] * 12)
    room = 0.8 * device.total - device.model - device.fixed
    for cost in (50_000, 150_000, 200_000, 400_000, 1_000_000, 90_000):
        fits = [n for n in range(25) if device.slope * cost * (1 - n / 24) <= room]
        assert _run(controller, device, [cost] * 6)[-1] == min(fits)
    assert device.worst <= 0.8 * device.total


def test_it_begins_with_every_block_recomputed_and_keeps_more_step_by_step() -> None:
    controller, device = _simulated()
    chosen = _run(controller, device, [50_000] * 8)
    assert chosen[0] == 24 and chosen[1] == 23 and chosen[-1] == 0
    assert all(later <= earlier for earlier, later in zip(chosen, chosen[1:], strict=False))
    assert controller.line() == (pytest.approx(device.slope, rel=1e-6), pytest.approx(device.fixed, rel=1e-6))


def test_the_target_holds_while_the_costs_jump() -> None:
    controller, device = _simulated()
    costs = torch.randint(1_000, 2_000_000, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    chosen = _run(controller, device, costs)
    assert device.worst <= 0.8 * device.total and len(set(chosen)) > 8


def test_without_cuda_it_takes_the_estimate_and_the_configured_size() -> None:
    model = _slat_flow()
    config = dataclasses.replace(recipe(), memory_target=0.5, memory_gib=0.02)
    controller = memory_controller(model, config, CPU)
    assert isinstance(controller, MemoryController)
    room = 0.5 * 0.02 * GIB - static_bytes(model)
    assert static_bytes(model) == 20 * sum(p.numel() for p in model.parameters())
    for cost in (1, 100, 500, 1000, 10_000):
        share = controller.shares[controller.choose(cost)]
        assert share == 0 or controller.total * cost * share <= room
        fewer = controller.shares[max(0, controller.choose(cost) - 1)]
        assert share == 1 or controller.total * cost * fewer > room
    assert controller.choose(1) == 0 and controller.choose(10**6) == len(controller.shares) - 1


def test_wishes_that_cannot_be_met_are_refused() -> None:
    config = dataclasses.replace(recipe(), memory_target=0.8)
    with pytest.raises(TriptychError, match="set memory_gib"):
        memory_controller(_slat_flow(), config, CPU)
    with pytest.raises(TriptychError, match="has no blocks to recompute"):
        memory_controller(nn.Linear(2, 2), config, CPU)
    with pytest.raises(TriptychError, match=r"memory_target must lie in \[0, 1\], got 1.5"):
        dataclasses.replace(recipe(), memory_target=1.5)
    assert isinstance(memory_controller(nn.Linear(2, 2), recipe(), CPU), NoController)


# ---- the estimate


class _Count(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps, each once; weights are left out."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.storages[storage.data_ptr()] = storage
            return tensor

        super().__init__(keep, lambda tensor: tensor)

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def _flow(blocks: int, **changes) -> SparseStructureFlowModel:
    torch.manual_seed(0)
    sizes = dict(
        resolution=8, in_channels=4, model_channels=64, cond_channels=16, out_channels=4, num_blocks=blocks,
        num_heads=2, patch_size=1, mlp_ratio=4,
    )  # fmt: skip
    return SparseStructureFlowModel(**(sizes | changes)).train()


def _kept(blocks: int, **changes) -> int:
    model = _flow(blocks, **changes)
    x = torch.randn(1, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    count = _Count(model)
    with count:
        loss = model(x, torch.tensor([500.0]), torch.randn(1, 4, 16)).square().mean()
    total = count.total()
    loss.backward()
    return total


@pytest.mark.parametrize("changes", [{}, {"qk_rms_norm": True}, {"mlp_ratio": 2}, {"model_channels": 96}])
def test_what_a_block_keeps_is_what_autograd_counts(changes) -> None:
    """The difference of three and one block, by token; within a fiftieth."""
    counted = (_kept(3, **changes) - _kept(1, **changes)) / 2 / 512
    expected = transformer_bytes(
        changes.get("model_channels", 64), changes.get("mlp_ratio", 4), low=False,
        qk_rms_norm=changes.get("qk_rms_norm", False),
    )  # fmt: skip
    assert counted == pytest.approx(expected, rel=0.02)
    torso = recomputables(_flow(3, **changes))[0]
    assert sum(torso.bytes) == 3 * expected and torso.tokens == 512


def test_a_torso_that_recomputes_all_or_nothing_is_one_block() -> None:
    """Then the estimate alone says whether everything can be kept: no smaller step could be tried."""

    class AllOrNothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.use_checkpoint = False
            self.blocks = _slat_flow(4).blocks

    torso = recomputables(AllOrNothing())[0]
    assert torso.bytes == [sum(Recomputable(_slat_flow(4)).bytes[:4])]
    device = SimulatedDevice(torso)
    device.peak = lambda: device.model + device.fixed  # type: ignore[method-assign]
    controller = MemoryController([torso], device, device.capacity(), 0, 0.8)
    room = 0.8 * device.total - device.model - device.fixed
    fits = int(room / torso.bytes[0])
    assert _run(controller, device, [1000]) == [1] and torso.module.use_checkpoint is True
    assert [controller.choose(cost) for cost in (fits, fits + 1)] == [0, 1]


def test_bf16_blocks_keep_half() -> None:
    counted = []
    for blocks in (1, 3):
        model = _flow(blocks)
        x, count = torch.randn(1, 4, 8, 8, 8), _Count(model)
        with torch.autocast("cpu", dtype=torch.bfloat16), count:
            loss = model(x, torch.tensor([500.0]), torch.randn(1, 4, 16)).square().mean()
        weights = sum(2 * p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)  # autocast's copies
        counted.append(count.total() - weights)
        loss.backward()
    expected = transformer_bytes(64, 4, low=True, cpu=True)
    assert (counted[1] - counted[0]) / 2 / 512 == pytest.approx(expected, rel=0.1)


def test_recomputed_blocks_keep_their_input_alone() -> None:
    kept = []
    for count in (0, 2, 4):
        model = _slat_flow().train()
        model.recompute_blocks = count
        coords = torch.cat([torch.zeros(512, 1, dtype=torch.int32), torch.cartesian_prod(*[torch.arange(8)] * 3)], 1)
        x = SparseTensor(torch.randn(512, 4), coords.int(), 1, 8)
        counter = _Count(model)
        with counter:
            loss = model(x, torch.tensor([500.0]), torch.randn(1, 4, 16)).feats.square().mean()
        kept.append(counter.total())
        loss.backward()
    block = transformer_bytes(32, 4, low=False) * 64  # 64 tokens of 2^3 voxels
    assert kept[0] - kept[1] == pytest.approx(2 * (block - 64 * 32 * 4), rel=0.06)
    assert kept[1] - kept[2] == pytest.approx(2 * (block - 64 * 32 * 4), rel=0.06)


# ---- results


@dataclass(frozen=True)
class BlocksConfig:
    width: int = 32


class BlocksTask(ToyTask):
    """A latent flow learns to give back noise: only here for its blocks."""

    config: BlocksConfig  # type: ignore[assignment]

    def build_model(self) -> nn.Module:
        model = _slat_flow()
        nn.init.normal_(model.out_layer.weight, std=0.1)
        nn.init.normal_(model.adaLN_modulation[1].weight, std=0.1)
        return model

    def setup(self, device: torch.device) -> None:
        self.device = device

    def size(self) -> int:
        return 12

    def sample(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed % 2**31)
        return {"x": torch.randn(64, 4, generator=generator), "cond": torch.randn(3, 16, generator=generator)}

    def loss(self, model: Any, batch: dict[str, Any], step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        count = len(batch["x"])
        number = torch.arange(count, dtype=torch.int32).repeat_interleave(64)[:, None]
        grid = torch.cartesian_prod(*[torch.arange(4, dtype=torch.int32)] * 3).repeat(count, 1)
        x = SparseTensor(batch["x"].flatten(0, 1), torch.cat([number, grid], dim=1), count, 8)
        return (model(x, torch.full((count,), 300.0), batch["cond"]).feats.float() - x.feats).square().mean(), {}

    def validate(self, model: Any) -> dict[str, float]:
        return {"loss": 0.0}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_do_not_depend_on_it(tmp_path, precision) -> None:
    base = dataclasses.replace(
        recipe(), task="tests.test_memory_controller:BlocksTask", task_config=BlocksConfig(), batch_size=4,
        steps=4, precision=precision, validate_every=0,
    )  # fmt: skip
    model = _slat_flow()
    activations = 4 * sum(recomputables(model)[0].bytes)  # of four samples, cost 1 each
    half = (static_bytes(model) + activations / 2) / 0.9 / GIB
    runs, recomputed = [], []
    for name, changes in (
        ("off", {}),
        ("none", {"memory_target": 1.0, "memory_gib": 8.0}),
        ("some", {"memory_target": 0.9, "memory_gib": half}),
        ("all", {"memory_target": 0.9, "memory_gib": 1e-6}),
    ):
        train(dataclasses.replace(base, **changes), tmp_path / name, device="cpu")
        log = (tmp_path / name / "log.jsonl").read_text()
        recomputed.append(log.split('"recomputed_blocks": ')[1].split("}")[0] if "recomputed" in log else None)
        runs.append(find_checkpoint(tmp_path / name / "checkpoints"))
    assert recomputed[:2] == [None, "0"] and recomputed[3] == "6" and recomputed[2] in ("1", "2", "3", "4", "5")
    for other in runs[1:]:
        for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            assert (other.path / file).read_bytes() == (runs[0].path / file).read_bytes()


# ---- when it runs out


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: no")]
)
def test_out_of_memory_is_one_sentence_with_a_remedy(tmp_path, monkeypatch, capsys, error) -> None:
    monkeypatch.setattr(ToyTask, "loss", lambda *_: (_ for _ in ()).throw(error))
    command = ["train", "tests.trainer_toy:recipe", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory with 8 samples at a time") and said.count("\n") == 1
    assert "--set accumulation=2, or close what else uses the memory" in said


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ToyTask, "loss", lambda *_: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "tests.trainer_toy:recipe", "--run-dir", str(tmp_path / "run"), "--device", "cpu"])


def test_remedies_are_those_that_the_config_leaves_open() -> None:
    klein = build_recipe("flux2_klein_4b_lora")
    assert remedies(klein, 1) == [
        "--set task_config.quantisation=int8",
        "a new run on sheets of a smaller --panel",
        "close what else uses the memory",
    ]
    assert remedies(replace(klein, accumulation=2), 2)[0] == "--set accumulation=4"
    assert remedies(build_recipe("flux2_klein_9b_lora"), 1)[0] == "--set task_config.quantisation=nf4"
    assert remedies(build_recipe("flux2_klein_4b_full"), 1)[0] == "a new run with a LoRA"
    tiny = remedies(build_recipe("flux_views_tiny"), 1)
    assert tiny[:2] == ["--set accumulation=2", "--set task_config.gradient_checkpointing=true"]


def test_a_command_that_trains_nothing_says_it_too(tmp_path, monkeypatch, capsys) -> None:
    def fails(args) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainer.prepare.sheet_cache.main", fails)
    assert main(["sheets", str(tmp_path), "--model", "x", "--out", "y", "--device", "cuda"]) == 1
    said = capsys.readouterr().err
    assert "close what else uses the memory, or --device cpu, or fewer --workers" in said and said.count("\n") == 1
