"""views.json: what is written is read back, and whatever is wrong with it ends in one sentence with the file's name."""

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from triptych.errors import TriptychError
from triptych.flux.card import (
    ARCHITECTURES,
    CARD,
    ViewsCard,
    default_card,
    loadable_files,
    read_card,
    sigmas,
    verify_files,
    write_card,
)

FULL = ViewsCard(
    name="chairs",
    licence="Apache-2.0",
    architecture="flux2-klein",
    prompt_template="{text}. given: {given}.",
    panel_size=128,
    background=(1.0, 0.0, 1.0),
    max_sequence_length=256,
    steps=8,
    guidance=2.5,
    shift=3.0,
    vocabulary=("red", "grün", "椅子"),
    provenance={"steps": 1000, "commit": "abc"},
    attribution="objects by A and B",
)


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    for name in ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/m.txt"):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / "model" / "README.md").write_text("free to change")
    return tmp_path / "model"


def changed(folder: Path, **changes) -> None:
    """Writes a card with these values, or without the key where the value is Ellipsis."""
    data = asdict(write_card(folder, FULL)) | changes
    (folder / CARD).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def test_a_card_is_read_as_it_was_written_with_the_hash_of_every_loadable_file(folder: Path) -> None:
    written = write_card(folder, FULL)
    assert read_card(folder) == written == replace(FULL, files=written.files)
    assert list(written.files) == sorted(
        ["model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/m.txt"]
    )
    assert "椅子" in (folder / CARD).read_text(encoding="utf-8")
    verify_files(folder, written)
    (folder / "README.md").write_text("changed")
    verify_files(folder, written)


def test_writing_again_replaces_stale_hashes(folder: Path) -> None:
    first = write_card(folder, FULL)
    (folder / "vae/config.json").write_text("other")
    second = write_card(folder, first)
    assert second.files["vae/config.json"] != first.files["vae/config.json"]
    verify_files(folder, second)


def test_changed_missing_and_unlisted_files_are_refused(folder: Path) -> None:
    card = write_card(folder, FULL)
    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(
        TriptychError, match=r"diffusion_pytorch_model.safetensors was changed \(sha256 2d711642b726\.\."
    ):
        verify_files(folder, card)
    weights.unlink()
    with pytest.raises(TriptychError, match=r"diffusion_pytorch_model.safetensors is missing"):
        verify_files(folder, card)
    card = write_card(folder, FULL)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")
    with pytest.raises(TriptychError, match=r"transformer.config.json is not listed in .*views.json: remove it"):
        verify_files(folder, card)


def test_hidden_files_and_the_card_itself_are_not_loadable(folder: Path) -> None:
    write_card(folder, FULL)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    assert loadable_files(folder) == sorted(read_card(folder).files)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"colour": "red"}, "has the unknown key 'colour': remove it"),
        ({"name": ...}, "lacks the key 'name'"),
        ({"licence": ...}, "lacks the key 'licence'"),
        ({"format_version": 2}, "has format 2, 1 is the newest known: update Triptych"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": ...}, "format_version is None"),
        ({"architecture": "flux3"}, "architecture is 'flux3', it has to be flux2-klein or flux1-kontext or flux1-dev"),
        ({"architecture": ["flux2-klein"]}, "architecture is "),
        ({"name": ""}, "name is ''"),
        ({"panel_size": 100}, "panel_size is '100', it has to be a multiple of 16"),
        ({"panel_size": 128.0}, "panel_size is '128.0'"),
        ({"panel_size": 48}, "panel_size is '48'"),
        ({"background": [1, 0]}, "background is"),
        ({"background": [1, 0, 1.5]}, "background is .* three numbers 0-1"),
        ({"background": "white"}, "background is 'white'"),
        ({"prompt_template": "a chair"}, r"prompt_template is 'a chair', it has to be a text with \{text\}"),
        ({"prompt_template": "{text} {0}"}, "prompt_template is"),
        ({"prompt_template": "{text.__class__}"}, "prompt_template is"),
        ({"prompt_template": "{text"}, "prompt_template is"),
        ({"prompt_template": "{text} {text!r}"}, "prompt_template is"),
        ({"steps": 0}, "steps is '0', it has to be a whole number 1-1000"),
        ({"steps": True}, "steps is 'True'"),
        ({"guidance": -1}, "guidance is '-1'"),
        ({"guidance": math.nan}, "guidance is 'nan'"),
        ({"shift": 0}, "shift is '0'"),
        ({"max_sequence_length": 8}, "max_sequence_length is '8'"),
        ({"vocabulary": "red green"}, "vocabulary is 'red green', it has to be a list of words or null"),
        ({"vocabulary": ["red", " "]}, "vocabulary is"),
        ({"files": {"../secret": "0" * 64}}, "files is .* relative paths inside of the folder"),
        ({"files": {"/etc/passwd": "0" * 64}}, "files is"),
        ({"files": {"vae/../../x": "0" * 64}}, "files is"),
        ({"files": {"C:/x": "0" * 64}}, "files is"),
        ({"files": {"vae\\x": "0" * 64}}, "files is"),
        ({"files": {"x": "0" * 63}}, "files is"),
        ({"files": {"x": "G" * 64}}, "files is"),
        ({"lora": "../l.safetensors", "base": "a/b"}, "lora is .* it has to be a file of the same folder"),
        ({"lora": "l.safetensors"}, "base and lora go together"),
        ({"base": "a/b"}, "base and lora go together"),
        ({"provenance": []}, "provenance is"),
        ({"attribution": None}, "attribution is 'None'"),
    ],
)
def test_wrong_values_are_named_with_file_and_remedy(folder: Path, changes: dict, sentence: str) -> None:
    changed(folder, **changes)
    with pytest.raises(TriptychError, match=sentence) as raised:
        read_card(folder)
    assert CARD in str(raised.value) and "\n" not in str(raised.value)


def test_only_what_has_no_default_is_needed(folder: Path) -> None:
    needed = {"name", "licence", "architecture", "prompt_template", "format_version"}
    changed(folder, **{f.name: ... for f in fields(ViewsCard) if f.name not in needed})
    assert read_card(folder) == ViewsCard("chairs", "Apache-2.0", "flux2-klein", FULL.prompt_template)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_damaged_card_is_refused(folder: Path, content: bytes) -> None:
    (folder / CARD).write_bytes(content)
    with pytest.raises(TriptychError, match=r"views.json is damaged .*: fetch the model again"):
        read_card(folder)


def test_no_card_and_a_huge_card_are_refused(folder: Path) -> None:
    with pytest.raises(TriptychError, match=r"has no views.json"):
        read_card(folder)
    (folder / CARD).write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(TriptychError, match="has 4,194,305 bytes, too many for a card"):
        read_card(folder)


def test_a_wrong_card_is_not_written(folder: Path) -> None:
    with pytest.raises(TriptychError, match="steps is '0'"):
        write_card(folder, replace(FULL, steps=0))
    assert not (folder / CARD).exists()


def test_sigmas_start_at_one_fall_and_bend_with_the_shift() -> None:
    assert sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert sigmas(1, 7.0) == [1.0]
    assert sigmas(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert sigmas(50, 3.0) == sorted(sigmas(50, 3.0), reverse=True)
    for steps, shift in ((0, 1.0), (1001, 1.0), (8, 0.0), (8, math.nan), (8, -1.0)):
        with pytest.raises(TriptychError, match="steps are 1-1000 and shift is 0.01-100"):
            sigmas(steps, shift)


def test_default_cards_are_valid_and_say_the_layout(folder: Path) -> None:
    for architecture in ARCHITECTURES:
        card = default_card(architecture)
        assert replace(read_card_of(folder, card), files={}) == card
        assert (card.panel_size, card.background, card.vocabulary) == (512, (1.0, 1.0, 1.0), None)
        prompt = card.prompt_template.format(text="a chair", given="front")
        for words in ("a chair", "front at the top left", "left side at the top right", "back at the bottom left"):
            assert words in prompt
    facts = {a: (default_card(a).steps, default_card(a).guidance) for a in ARCHITECTURES}
    assert facts == {"flux2-klein": (50, 4.0), "flux1-kontext": (28, 2.5), "flux1-dev": (28, 3.5)}
    fast = default_card("flux2-klein", distilled=True)
    assert (fast.steps, fast.guidance) == (4, 1.0)
    with pytest.raises(TriptychError, match="unknown architecture 'flux3'"):
        default_card("flux3")


def read_card_of(folder: Path, card: ViewsCard) -> ViewsCard:
    write_card(folder, card)
    return read_card(folder)


@pytest.mark.parametrize(("distilled", "steps"), [(False, 50), (True, 4)])
def test_default_shift_is_what_the_published_scheduler_comes_to(distilled: bool, steps: int) -> None:
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    card = default_card("flux2-klein", distilled=distilled)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(sigmas=sigmas(steps, 1.0), mu=compute_empirical_mu(64 * 64, steps))
    assert scheduler.sigmas[:-1].tolist() == pytest.approx(sigmas(card.steps, card.shift), abs=2e-5)
