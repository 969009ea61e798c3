"""``views.json``: what a Flux multiview model is, how it wants to be asked, and the hashes of its files.

A model is a folder in diffusers layout (``model_index.json``, ``transformer/``, ``vae/`` and so on), or a folder with
``lora.safetensors`` whose card names its base. A plain diffusers folder, without a card, is used with the default card
of its architecture. Every file that loading may open has to be listed with its SHA-256: what is not listed, is
missing or was changed is refused before anything is loaded. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..bundles.manifest import file_sha256
from ..errors import TriptychError
from ..geometry.files import write_files
from ..sampling.flow_euler import Cancelled

FORMAT_VERSION = 1
CARD = "views.json"
MODEL_INDEX = "model_index.json"
ARCHITECTURES = ("flux2-klein", "flux1-kontext", "flux1-dev")
LOADED_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
_MAX_CARD_BYTES = 4 << 20
_HASH = re.compile(r"[0-9a-f]{64}")
_PATCH_PX = 16  # one latent token: the VAE's factor 8 times the 2x2 patch


@dataclass(frozen=True)
class ViewsCard:
    """The fields of views.json.

    architecture: one of ARCHITECTURES. base: repository id or folder of the model that `lora` (a file of this folder)
    belongs to. panel_size: pixels of one view; the sheet has twice that. background: sRGB 0-1 of the training sheets.
    prompt_template: with {text} and {given}. steps, guidance, shift: defaults of the sampler, see `sigmas`;
    photo_steps, photo_guidance: instead of them when views are given, None for the same.
    vocabulary: the only words that the model knows; None for a model that knows language. mirrored: every reference is
    followed by its mirror image, so that the outline of the opposite view, which is the mirrored one, stands somewhere
    to be copied. files: relative path -> sha256. provenance: how it was trained. attribution: whose objects it was
    trained on.
    """

    name: str
    licence: str
    architecture: str
    prompt_template: str
    panel_size: int = 512
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    base: str | None = None
    lora: str | None = None
    max_sequence_length: int = 512
    steps: int = 50
    guidance: float = 4.0
    shift: float = 1.0
    vocabulary: tuple[str, ...] | None = None
    mirrored: bool = False
    photo_steps: int | None = None
    photo_guidance: float | None = None
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    attribution: str = ""
    format_version: int = FORMAT_VERSION

    def usual(self, given: bool) -> tuple[int, float]:
        """Steps and guidance for a sheet; given: whether some of its views are."""
        steps = self.photo_steps if given and self.photo_steps is not None else self.steps
        return steps, self.photo_guidance if given and self.photo_guidance is not None else self.guidance


LAYOUT = ("prompt_template", "panel_size", "background", "mirrored", "max_sequence_length")
SAMPLER = ("steps", "guidance", "shift", "photo_steps", "photo_guidance")

_SHEET_PROMPT = (
    "{text}. One sheet with a 2x2 grid of four orthographic views of this single object at eye level, all at one scale,"
    " each centred in its panel on a plain white background: the front at the top left, the object's left side at the "
    "top right, the back at the bottom left, the object's right side at the bottom right. Views that are given as "
    "pictures, in this order, and stand unchanged in their panels, the front in the first panel: {given}."
)


def default_card(architecture: str, *, distilled: bool = False) -> ViewsCard:
    """The card of a published model that has none. distilled: the few-step FLUX.2 klein, from its model_index.json.

    shift is what the published schedulers come to for a sheet of 1024 px at these steps: exp(mu) of diffusers'
    `compute_empirical_mu(4096, steps)` for FLUX.2, and of 1.15 for FLUX.1.
    """
    if architecture == "flux2-klein":
        steps, guidance, shift = (4, 1.0, math.exp(2.29118)) if distilled else (50, 4.0, math.exp(2.02335))
        name, licence = "FLUX.2 klein", "as its publisher states (klein-4B: Apache-2.0)"
    elif architecture == "flux1-kontext":
        steps, guidance, shift = 28, 2.5, math.exp(1.15)
        name, licence = "FLUX.1 Kontext", "as its publisher states (Kontext-dev: FLUX.1-dev Non-Commercial)"
    elif architecture == "flux1-dev":
        steps, guidance, shift = 28, 3.5, math.exp(1.15)
        name, licence = "FLUX.1", "as its publisher states (FLUX.1-dev: Non-Commercial)"
    else:
        raise TriptychError(f"unknown architecture {architecture!r}: choose {', '.join(ARCHITECTURES)}")
    return ViewsCard(name, licence, architecture, _SHEET_PROMPT, steps=steps, guidance=guidance, shift=round(shift, 4))


def sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of the steps, `steps` numbers from 1 down; the last step goes to 0, which is not listed.

    linspace(1, 1 / steps) bent by s' = shift s / (1 + (shift - 1) s).
    """
    if not 1 <= steps <= 1000 or not 0.01 <= shift <= 100:
        raise TriptychError(f"{steps} steps with shift {shift} do not work: steps are 1-1000 and shift is 0.01-100")
    even = [1 - i / steps for i in range(steps)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def how_to_ask(card: ViewsCard) -> dict[str, Any]:
    """What a LoRA file has to carry, for it is often copied without its card: fields of LAYOUT and SAMPLER, as JSON."""
    return {name: value for name, value in json.loads(json.dumps(asdict(card))).items() if name in LAYOUT + SAMPLER}


def asked_like(card: ViewsCard, said: Mapping[str, Any], label: str) -> ViewsCard:
    """The card with the fields that ``said`` has, see `how_to_ask`. Raises TriptychError for a value out of range."""
    for name, value in said.items():
        problem = field_problem(name, value) if name in LAYOUT + SAMPLER else "one of " + ", ".join(LAYOUT + SAMPLER)
        if problem:
            raise TriptychError(f"{label}: {name} is {str(value)[:80]!r} in its header, it has to be {problem}")
    changes: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    return replace(card, **changes)


def read_card(folder: str | Path) -> ViewsCard:
    """The card of a folder. Raises TriptychError when it is missing, broken, of a later format or has unknown keys."""
    path = Path(folder) / CARD
    if not path.is_file():
        raise TriptychError(f"{folder} is no Flux views model of ours: it has no {CARD}")
    return _card(small_json(path, _MAX_CARD_BYTES, "a card"), path)


def small_json(path: Path, most_bytes: int, what: str) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises TriptychError when it is damaged, no object, or not small."""
    if path.stat().st_size > most_bytes:
        raise TriptychError(f"{path} has {path.stat().st_size:,} bytes, too many for {what}: fetch the model again")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise TypeError(f"it holds a {type(data).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise TriptychError(f"{path} is damaged ({error}): fetch the model again") from error
    return data


def write_card(folder: str | Path, card: ViewsCard) -> ViewsCard:
    """Hashes every file of the folder that loading may open, writes views.json, and returns the card as written."""
    folder = Path(folder)
    hashes = {name: file_sha256(folder / name) for name in loadable_files(folder)}
    card = replace(card, files=hashes)
    data = asdict(card)
    _card(json.loads(json.dumps(data)), folder / CARD)
    write_files(folder, {CARD: (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()})
    return card


def loadable_files(folder: Path) -> list[str]:
    """Relative paths, with forward slashes, of what loading may open: configs, tokenizers and safetensors."""
    found = [path for path in folder.rglob("*") if path.suffix in LOADED_SUFFIXES and path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in found]
    return sorted(name for name in names if name != CARD and not any(part[0] == "." for part in name.split("/")))


def verify_files(folder: str | Path, card: ViewsCard, cancel: Callable[[], bool] | None = None) -> None:
    """Checks that exactly the loadable files that the card lists are there, and unchanged. Reads all of them; cancel()
    is asked between them, and Cancelled raised when it returns True."""
    folder = Path(folder)
    for name, wanted in card.files.items():
        if cancel is not None and cancel():
            raise Cancelled(f"stopped while the files of {card.name} were checked")
        path = folder / name
        if not path.is_file():
            raise TriptychError(f"{path} is missing: fetch the model {card.name} again")
        found = file_sha256(path)
        if found != wanted:
            raise TriptychError(
                f"{path} was changed (sha256 {found[:12]}.. instead of {wanted[:12]}..): fetch the model again"
            )
    unlisted = sorted(set(loadable_files(folder)) - set(card.files))
    if unlisted:
        raise TriptychError(
            f"{folder / unlisted[0]} is not listed in {folder / CARD}: remove it, or write the card anew if it is yours"
        )


def _card(data: dict[str, Any], path: Path) -> ViewsCard:
    """The checked card of a JSON object read from path."""
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise TriptychError(f"{path}: format_version is {version!r}, wanted is {FORMAT_VERSION}: fetch the model again")
    if version > FORMAT_VERSION:
        raise TriptychError(f"{path} has format {version}, {FORMAT_VERSION} is the newest known: update Triptych")
    known = {f.name for f in fields(ViewsCard)}
    unknown, missing = sorted(set(data) - known), sorted(_REQUIRED - set(data))
    if unknown:
        raise TriptychError(f"{path} has the unknown key {unknown[0]!r}: remove it, or update Triptych")
    if missing:
        raise TriptychError(f"{path} lacks the key {missing[0]!r}: fetch the model again")
    for name, value in data.items():
        problem = field_problem(name, value)
        if problem:
            raise TriptychError(f"{path}: {name} is {str(value)[:80]!r}, it has to be {problem}")
    if (data.get("lora") is None) != (data.get("base") is None):
        raise TriptychError(f"{path}: base and lora go together, one of them is missing: name both or none")
    tuples = {key: tuple(data[key]) for key in ("background", "vocabulary") if data.get(key) is not None}
    return ViewsCard(**data | tuples)


_REQUIRED = {"name", "licence", "architecture", "prompt_template", "format_version"}


def field_problem(name: str, value: Any) -> str | None:
    """What the value of a card's field has to be, when it is not; else None. Sequences are lists, as in JSON."""
    right, wanted = {
        "name": (isinstance(value, str) and bool(value), "a name"),
        "licence": (isinstance(value, str) and bool(value), "the licence of the weights"),
        "architecture": (value in ARCHITECTURES, " or ".join(ARCHITECTURES)),
        "prompt_template": (_is_template(value), "a text with {text} and, if wanted, {given}"),
        "panel_size": (
            _is_number(value, 64, 4096, int) and value % _PATCH_PX == 0,
            f"a multiple of {_PATCH_PX} from 64 to 4096",
        ),
        "background": (
            isinstance(value, list) and len(value) == 3 and all(_is_number(v, 0, 1) for v in value),
            "three numbers 0-1",
        ),
        "base": (value is None or isinstance(value, str) and bool(value), "a repository id or a folder"),
        "lora": (value is None or is_inside(value), "a file of the same folder"),
        "max_sequence_length": (_is_number(value, 16, 4096, int), "a whole number 16-4096"),
        "steps": (_is_number(value, 1, 1000, int), "a whole number 1-1000"),
        "guidance": (_is_number(value, 0, 100), "a number 0-100"),
        "photo_steps": (value is None or _is_number(value, 1, 1000, int), "a whole number 1-1000 or null"),
        "photo_guidance": (value is None or _is_number(value, 0, 100), "a number 0-100 or null"),
        "shift": (_is_number(value, 0.01, 100), "a number 0.01-100"),
        "vocabulary": (value is None or _all_words(value), "a list of words or null"),
        "mirrored": (isinstance(value, bool), "true or false"),
        "files": (_all_hashes(value), "relative paths inside of the folder with their sha256"),
        "provenance": (isinstance(value, dict), "an object"),
        "attribution": (isinstance(value, str), "a text"),
        "format_version": (True, ""),
    }[name]
    return None if right else wanted


def is_inside(name: Any) -> bool:
    """Whether a path of a card stays inside of its folder: relative, forward slashes, no ``..``, no drive."""
    return (
        isinstance(name, str)
        and bool(name)
        and not any(c in name for c in "\\:\0")
        and not PurePosixPath(name).is_absolute()
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def _is_number(value: Any, low: float, high: float, kind: type = float) -> bool:
    return type(value) in (int, kind) and low <= value <= high


def _is_template(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        parts = list(string.Formatter().parse(value))
    except ValueError:
        return False
    names = [(name, form, conversion) for _, name, form, conversion in parts if name is not None]
    return ("text", "", None) in names and set(names) <= {("text", "", None), ("given", "", None)}


def _all_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word and word == word.strip() for word in value)


def _all_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        is_inside(name) and isinstance(digest, str) and _HASH.fullmatch(digest) for name, digest in value.items()
    )
