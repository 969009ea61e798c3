"""Adapters and lifting of a published structure flow, on a small random folder of the published layout."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.cached_folder import IMAGE_SIZE, write_cached_folder
from tests.published_folder import COND_CHANNELS, small_network, write_published_folder
from trainer.checkpoint import find_checkpoint
from trainer.config import ParameterGroup, TrainConfig
from trainer.logs import read_log
from trainer.loop import evaluating, export, open_trained, train
from trainer.lora import ADAPTER_FILE, LiftingConfig, MultiviewLoraConfig, MultiviewLoraTask
from triptych.bundles.bundle import load_bundle
from triptych.errors import TriptychError
from triptych.geometry.cameras import Camera, rig_cameras
from triptych.models.adapters import (
    Adapter,
    LoraLinear,
    adapted,
    adapter_tensors,
    add_lora,
    lora_layers,
    merge_adapter,
    read_adapter,
    write_adapter,
)
from triptych.models.lifted_published import LiftedPublishedFlow, to_world
from triptych.models.lifting import PosedViews
from triptych.models.structure_flow import SparseStructureFlowModel

LIFTING = LiftingConfig(image_size=IMAGE_SIZE, encoder_channels=(8, 16), encoder_blocks=(1, 1), lift_channels=16)


def _network(seed: int = 0) -> SparseStructureFlowModel:
    network = small_network("structure_flow", seed)
    network.convert_to(torch.float32)
    assert isinstance(network, SparseStructureFlowModel)
    return network


def _inputs(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch, 8, 4, 4, 4, generator=generator)
    return x, torch.linspace(200, 900, batch), torch.randn(batch, 6, COND_CHANNELS, generator=generator)


def _posed(counts: tuple[int, ...]) -> PosedViews:
    images = torch.rand(sum(counts), 4, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    cameras = tuple(camera for count in counts for camera in rig_cameras()[:count])
    return PosedViews(images, cameras, counts)


def _train_adapters(network: nn.Module) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(9)
    for layer in lora_layers(network).values():
        layer.lora_B.weight.data.copy_(torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.3)


# ---- the adapters


def test_a_fresh_adapter_changes_nothing_and_learns_alone() -> None:
    inputs, network = _inputs(), _network()
    before, keys = network(*inputs), set(network.state_dict())
    names = add_lora(network, rank=4, alpha=8)
    assert len(names) == 2 * 7 and set(names) >= {"blocks.1.self_attn.to_qkv", "blocks.0.cross_attn.to_kv"}
    assert {"blocks.0.mlp.mlp.0", "blocks.0.mlp.mlp.2", "blocks.1.cross_attn.to_q"} <= set(names)
    assert torch.equal(network(*inputs), before)
    assert keys <= set(network.state_dict()), "published keys stay"
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.lora_{part}.weight" for name in names for part in "AB"}


def test_merged_weights_are_base_plus_adapter(tmp_path) -> None:
    inputs, network = _inputs(), _network()
    plain = network(*inputs)
    add_lora(network, rank=4, alpha=6, targets=("*.to_qkv", "blocks.*.mlp.2"))
    _train_adapters(network)
    tuned = network(*inputs)
    adapter = Adapter(adapter_tensors(network), "small", "structure_flow", "SparseStructureFlowModel")
    write_adapter(tmp_path / "a.safetensors", adapter)
    again = read_adapter(tmp_path / "a.safetensors")
    assert again.layers() == sorted(f"blocks.{i}.{name}" for i in (0, 1) for name in ("self_attn.to_qkv", "mlp.mlp.2"))
    merged = _network()
    merge_adapter(merged, again, base="small")
    assert (merged(*inputs) - tuned).abs().max() <= 1e-6 * tuned.abs().max() < (tuned - plain).abs().max()
    half = _network()
    merge_adapter(half, again, base="small", strength=0.5)
    layer = "blocks.0.self_attn.to_qkv"
    weights = [m.get_submodule(layer).weight for m in (_network(), half, merged)]
    assert torch.allclose(weights[1] * 2, weights[0] + weights[2], atol=1e-6)


def test_an_adapter_of_another_base_names_both_and_changes_nothing() -> None:
    network = _network()
    add_lora(network, rank=2, alpha=2)
    _train_adapters(network)
    adapter = Adapter(adapter_tensors(network), "owner/first", "structure_flow", "SparseStructureFlowModel")
    sizes = dict(resolution=4, in_channels=8, out_channels=8, num_heads=2, mlp_ratio=2, patch_size=1)
    for changes, message in (
        ({"num_blocks": 1}, "which has no layer blocks.1."),
        ({"model_channels": 48}, r"whose blocks.0.cross_attn.to_kv is \[96, 24\] and not \[64, 24\]"),
    ):
        other = SparseStructureFlowModel(
            **(sizes | {"model_channels": 32, "cond_channels": COND_CHANNELS, "num_blocks": 2} | changes)
        )
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(TriptychError, match="trained on owner/first.*this is second.*" + message):
            merge_adapter(other, adapter, base="second")
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(
        TriptychError, match=r"owner/first \(SparseStructureFlowModel\), this is third \(SLatFlowModel\)"
    ):
        merge_adapter(small_network("slat_flow"), adapter, base="third")


def test_damaged_files_and_wrong_wishes_are_one_sentence(tmp_path) -> None:
    network = _network()
    with pytest.raises(TriptychError, match=r"target '\*.to_v' matches no linear layer"):
        add_lora(network, 4, 4, ("*.to_qkv", "*.to_v"))
    with pytest.raises(TriptychError, match=r"does not fit blocks.0.cross_attn.to_kv: rank 25 must lie in 1..24"):
        add_lora(_network(), 25, 4, ("*.to_kv",))
    add_lora(network, 4, 4)
    tensors = adapter_tensors(network)
    path = tmp_path / "a.safetensors"
    write_adapter(path, Adapter(tensors, "b", "structure_flow", "SparseStructureFlowModel"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TriptychError, match="not a whole adapter file"):
        read_adapter(path)
    del tensors["blocks.0.self_attn.to_out.lora_B.weight"]
    write_adapter(path, Adapter(tensors, "b", "structure_flow", "SparseStructureFlowModel"))
    with pytest.raises(TriptychError, match="two matrices of blocks.0.self_attn.to_out do not fit"):
        read_adapter(path)


def test_a_base_in_8_bits_is_close_and_passes_gradients_through() -> None:
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    exact, rough = LoraLinear(base, 4, 4), LoraLinear(nn.Linear(64, 48), 4, 4)
    rough.load_state_dict(exact.state_dict())
    rough.quantize()
    assert rough.weight is None and rough.weight_q.dtype == torch.int8
    assert not any("weight_q" in key or "weight_scale" in key for key in rough.state_dict())
    x = torch.randn(20, 64)
    ends = []
    for layer in (exact, rough):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.square().sum().backward()
        ends.append((y.detach(), given.grad))
    for a, b in zip(*ends, strict=True):
        assert 0 < (a - b).norm() / a.norm() < 0.01
    restored = rough.weight_q.float() * rough.weight_scale
    assert ((restored - base.weight).abs() <= rough.weight_scale / 2 + 1e-7).all()


# ---- the lifting


def test_at_first_the_lifted_flow_is_the_published_one() -> None:
    x, t, cond = _inputs()
    network = _network()
    published = network(x, t, cond)
    lifted = LiftedPublishedFlow.around(network, LIFTING.arguments())
    one = lifted.condition(cond, _posed((1, 1)))
    assert torch.equal(lifted(x, t, one), published)
    assert torch.equal(lifted(x, t, cond), published)
    assert torch.equal(lifted(x, t, one.null()), network(x, t, torch.zeros_like(cond)))
    # Several views: all their tokens in one context.
    tokens = torch.randn(3, 6, COND_CHANNELS, generator=torch.Generator().manual_seed(1))
    several = lifted(x[:1], t[:1], lifted.condition(tokens, _posed((3,))))
    assert torch.equal(several, network(x[:1], t[:1], tokens.flatten(0, 1)[None]))
    mixed = lifted(x, t, lifted.condition(torch.cat([tokens, cond[1:]]), _posed((3, 1))))
    assert torch.allclose(mixed[:1], several, atol=1e-5) and torch.allclose(mixed[1:], published[1:], atol=1e-5)


def test_the_state_is_the_published_keys_and_the_lifting() -> None:
    network = _network()
    lifted = LiftedPublishedFlow.around(network, LIFTING.arguments())
    new = set(lifted.state_dict()) - set(network.state_dict())
    assert set(lifted.lifting_state()) == new and not set(network.state_dict()) - set(lifted.state_dict())
    assert {name.split(".")[0] for name in new} == {"view_encoder", "lift", "lift_out", "hull_layer", "pose_layer"}


def test_every_lifting_layer_learns_and_each_view_counts() -> None:
    x, t, cond = _inputs()
    lifted = LiftedPublishedFlow.around(_network(), LIFTING.arguments())
    torch.manual_seed(1)
    for layer in (lifted.lift_out, lifted.hull_layer, lifted.pose_layer):
        nn.init.normal_(layer.weight, std=0.1)
    for name, parameter in lifted.view_encoder.named_parameters():
        if name.endswith("conv2.weight"):  # zero at first, so that nothing reaches what is before it
            nn.init.normal_(parameter, std=0.1)
    lifted(x[:1], t[:1], lifted.condition(cond, _posed((2,)))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lifted.lifting_parameters())
    posed = _posed((2,))
    with torch.no_grad():
        tokens = torch.cat([cond[:1], cond[:1]])
        there = lifted(x[:1], t[:1], lifted.condition(tokens, posed))
        turned = dataclasses.replace(posed, cameras=(Camera(0.0), Camera(180.0)))
        assert not torch.allclose(lifted(x[:1], t[:1], lifted.condition(tokens, turned)), there)
    with pytest.raises(ValueError, match="expected"):
        lifted.condition(tokens[:1], posed)


def test_the_published_frame_is_seen_the_right_way() -> None:
    """+Z up and front -Y: the front camera sees -Y, and up is up. A hull of one blob is where the blob is."""
    assert torch.equal(to_world(torch.tensor([0.0, -1.0, 0.0])), torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(to_world(torch.tensor([0.0, 0.0, 1.0])), torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(to_world(torch.tensor([1.0, 0.0, 0.0])), torch.tensor([1.0, 0.0, 0.0]))
    lifted = LiftedPublishedFlow.around(_network(), LIFTING.arguments())
    images = torch.zeros(1, 4, IMAGE_SIZE, IMAGE_SIZE)
    images[:, :, : IMAGE_SIZE // 2, IMAGE_SIZE // 2 :] = 1  # above, and at the right of the front picture
    hull = lifted._hull(PosedViews(images, (Camera(0.0),), (1,))).mean(dim=1).view(4, 4, 4)
    assert (hull[2:, :, 2:] > 0).all() and (hull[:2] < 0).all() and (hull[:, :, :2] < 0).all()
    beside = lifted._hull(PosedViews(images, (Camera(90.0),), (1,))).mean(dim=1).view(4, 4, 4)
    # From the subject's left (+X) the front, -Y, lies at the picture's left: what is bright is the back.
    assert (beside[:, 2:, 2:] > 0).all() and (beside[:, :2] < 0).all()


def test_prepared_volumes_come_into_the_published_frame() -> None:
    from trainer.cached import published_volume

    volume = np.random.default_rng(0).random((8, 8, 8))
    turned = published_volume(volume)
    for x, y, z in ((1, 2, 3), (0, 7, 5)):
        centre = (torch.tensor([x, y, z]) + 0.5) / 8 - 0.5
        back = ((to_world(centre) + 0.5) * 8 - 0.5).round().int().tolist()
        assert turned[x, y, z] == volume[tuple(back)]


# ---- a run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("lora")
    bundle = write_published_folder(folder / "small", components=("structure_flow", "structure_decoder"))
    return write_cached_folder(folder / "cache"), bundle


def _config(data: tuple[Path, Path], **changes) -> TrainConfig:
    task = MultiviewLoraConfig(data=str(data[0]), bundle=str(data[1]), rank=4, alpha=8.0, base="fp32", lifting=LIFTING)
    base = TrainConfig(
        name="lora", task="trainer.lora:MultiviewLoraTask", task_config=dataclasses.replace(task, **changes),
        steps=24, batch_size=4, accumulation=2, lr=5e-3, warmup_steps=2, checkpoint_every=8, keep_checkpoints=9,
        log_every=4, validate_every=24, tensorboard=False,
        groups=(ParameterGroup("*.lora_?.weight", lr_factor=0.5, thaw_step=10, warmup_steps=2),),
    )  # fmt: skip
    return base


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    train(_config(data), folder, device="cpu")
    return folder


def test_the_loss_falls_and_only_new_layers_are_saved(run, data) -> None:
    losses = [line["loss"] for line in read_log(run / "log.jsonl") if line["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    saved = find_checkpoint(run / "checkpoints").tensors("model")
    parts = {name.split(".")[0] for name in saved if "lora_" not in name}
    assert parts == {"view_encoder", "lift", "lift_out", "hull_layer", "pose_layer", "pos_emb"}
    early = find_checkpoint(run / "checkpoints", "8").tensors("model")
    assert all(not tensor.any() for name, tensor in early.items() if "lora_B" in name), "thawed too early"
    assert all(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_a_run_that_was_cut_off_ends_with_the_same_bytes(run, data, tmp_path, capsys) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for step in (16, 24):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:07d}")
    train(_config(data), copy, device="cpu")
    assert "at step 8 of 24" in capsys.readouterr().out
    first, second = (find_checkpoint(folder / "checkpoints") for folder in (run, copy))
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "optimizer.json"):
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes()


def test_the_export_is_the_trained_network_twice(run, data, tmp_path, monkeypatch) -> None:
    from triptych.bundles import components

    monkeypatch.setitem(components.CLASSES, "LiftedPublishedFlow", "triptych.models.lifted_published")
    out = tmp_path / "tuned"
    export(run, out, device="cpu")
    opened, _ = open_trained(run, "last", "cpu")
    task = opened.task
    assert isinstance(task, MultiviewLoraTask)
    batch = task.collate([task.sample(0, 3), task.sample(1, 4)]) | {"drop": torch.tensor([False, False])}
    with evaluating(opened) as model:
        expected = task.errors(model, batch)  # type: ignore[arg-type]
    adapter = read_adapter(out / ADAPTER_FILE)
    assert adapter.base == "small" and adapter.provenance["step"] == 24
    applied = adapted(load_bundle(data[1]).network("structure_flow"), adapter, base="small")
    assert isinstance(applied, LiftedPublishedFlow)
    with torch.no_grad():
        assert torch.allclose(task.errors(applied, batch), expected, rtol=1e-5)
        merged = load_bundle(out).network("structure_flow")
        assert isinstance(merged, LiftedPublishedFlow)
        assert torch.allclose(task.errors(merged, batch), expected, rtol=0.01)  # float16 on disk
        plain = adapted(
            load_bundle(data[1]).network("structure_flow"), dataclasses.replace(adapter, lifting={}), base=""
        )
        assert type(plain) is SparseStructureFlowModel


@pytest.mark.parametrize("base", ["bf16", "fp16", "int8"])
def test_a_base_of_few_bits_starts_near_the_exact_one(data, base) -> None:
    errors = []
    for kind in ("fp32", base):
        task = MultiviewLoraTask(_config(data, base=kind).task_config)
        torch.manual_seed(0)
        model = task.build_model().train()
        task.setup(torch.device("cpu"))
        batch = task.collate([task.sample(i, i) for i in range(4)])
        found = task.errors(model, batch)  # type: ignore[arg-type]
        found.mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        errors.append(found.detach())
    assert (errors[1] - errors[0]).abs().max() < 0.05 * errors[0].mean()
    assert not torch.equal(*errors)
