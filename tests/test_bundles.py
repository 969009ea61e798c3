"""Weight bundles: what is written comes back, from wherever it lies, and nothing else is ever run."""

import json
import pickle

import pytest
import torch
from tiny_bundle import DECODER, FLOW, make_tiny_bundle

from triptych.bundles import bundle as bundles
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.bundles.components import CLASSES, build_component
from triptych.bundles.manifest import MANIFEST, file_sha256, read_manifest, write_bundle
from triptych.errors import TriptychError
from triptych.models.structure_vae import SparseStructureDecoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_bundle(folder, provenance={"steps": 0}, view_rig={"views": 4})
    return folder


def test_networks_come_back_in_the_precision_that_was_written(tmp_path):
    torch.manual_seed(1)
    decoder = SparseStructureDecoder(**DECODER)
    written = write_bundle(tmp_path, {"decoder": (decoder, DECODER)}, name="one", licence="MIT", sampling={"steps": 3})
    assert read_manifest(tmp_path) == written
    loaded = Bundle(tmp_path).network("decoder")
    assert type(loaded) is SparseStructureDecoder and not loaded.training
    for name, value in decoder.state_dict().items():
        expected = value.bfloat16().float() if value.dim() > 1 else value  # vectors keep all their bits
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.float32, False)}
    exact = tmp_path / "exact"
    write_bundle(exact, {"decoder": (decoder, DECODER)}, name="one", licence="MIT", dtype="float32")
    latent = torch.randn(1, 8, 4, 4, 4)
    with torch.inference_mode():
        assert torch.equal(Bundle(exact).network("decoder")(latent), decoder.eval()(latent))


def test_the_manifest_states_the_files(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["format"], manifest["up"], manifest["front"]) == (1, "+Y", "+Z")
    assert (manifest["provenance"], manifest["view_rig"]) == ({"steps": 0}, {"views": 4})
    assert set(manifest["components"]) == {"structure_flow", "structure_decoder"}
    for component in manifest["components"].values():
        file = folder / component["file"]
        assert (file_sha256(file), file.stat().st_size) == (component["sha256"], component["bytes"])
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST, *(component["file"] for component in manifest["components"].values())
    }  # fmt: skip


def test_the_same_networks_make_the_same_files(folder, tmp_path):
    make_tiny_bundle(tmp_path, provenance={"steps": 0}, view_rig={"views": 4})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_networks_are_kept_until_they_are_released(folder):
    opened = Bundle(folder)
    opened.verify()
    first = opened.network("structure_decoder")
    assert opened.network("structure_decoder") is first
    opened.release()
    assert opened.network("structure_decoder") is not first
    assert opened.has("structure_flow") and not opened.has("text_encoder")
    with pytest.raises(TriptychError, match="tiny-random has no .*'text_encoder'.*structure_flow, structure_decoder"):
        opened.network("text_encoder")


def test_a_bundle_is_found_by_folder_search_folder_or_as_the_embedded_one(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_bundle(folder).folder == folder
    assert load_bundle(str(folder)).folder == folder
    assert load_bundle("tiny", search=[tmp_path, folder.parent]).folder == folder
    monkeypatch.setattr(bundles, "_WEIGHTS", folder.parent)
    assert load_bundle("tiny").folder == folder
    monkeypatch.setattr(bundles, "EMBEDDED", "tiny")
    assert load_bundle().folder == folder
    with pytest.raises(TriptychError) as caught:
        load_bundle("nowhere", search=[tmp_path / "a"])
    for place in (tmp_path / "a" / "nowhere", folder.parent / "nowhere"):
        assert str(place) in str(caught.value)


class _Boom:
    def __reduce__(self):
        return (open, ("ran.txt", "w"))


def test_a_pickle_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tiny_bundle(tmp_path / "b")
    file = tmp_path / "b" / "structure_decoder.safetensors"
    file.write_bytes(pickle.dumps(_Boom()))
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    manifest["components"]["structure_decoder"].update(sha256=file_sha256(file), bytes=file.stat().st_size)
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TriptychError, match=r"structure_decoder\.safetensors is not a whole safetensors file"):
        Bundle(tmp_path / "b").network("structure_decoder")
    assert not (tmp_path / "ran.txt").exists()


def test_every_known_class_is_there_and_only_those_are_built():
    with pytest.raises(TriptychError, match=r"network class 'torch\.nn\.Linear', known are SparseStructureEncoder"):
        build_component("torch.nn.Linear", {"in_features": 1, "out_features": 1})
    for name in CLASSES:
        with pytest.raises(TriptychError, match=f"config does not fit {name}"):
            build_component(name, {"no_such_argument": 1})
    assert type(build_component("LiftedStructureFlow", FLOW)).__name__ == "LiftedStructureFlow"


def test_an_interrupted_write_leaves_no_manifest(tmp_path, monkeypatch):
    from triptych.bundles import manifest

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest.json, "dumps", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_tiny_bundle(tmp_path)
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(TriptychError, match="is not a bundle: it has no bundle.json"):
        read_manifest(tmp_path)


STRANGE = {
    "format": [None, "1", 0.5, 0, True],
    "components": [[], None, {"a": None}, {"a": {}}],
    "name": [None, 3],
    "sampling": [[], None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in STRANGE.items() for value in values])
def test_a_manifest_of_wrong_types_is_damaged(field, value, folder, tmp_path):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TriptychError, match="is damaged"):
        read_manifest(tmp_path)


STRANGE_PARTS = {
    "file": [3, None], "bytes": ["many", None], "sha256": [None],
    "tensors": [None, [], {"a": 3}, {"a": ["float32", "x"]}], "config": [None, []], "class_name": [None, ["a"]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, value) for f, values in STRANGE_PARTS.items() for value in values])
def test_a_component_of_wrong_types_is_damaged(field, value, folder, tmp_path):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["components"]["structure_decoder"][field] = value
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TriptychError, match="is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_nested_without_end_is_damaged(tmp_path):
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(TriptychError, match="is damaged"):
        read_manifest(tmp_path)
