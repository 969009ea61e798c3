"""The model card of an exported bundle: what it is, what it saw, under which licences, and how good it is.

Quality is left open, between two marks, for ``python -m benchmarks.quality --card`` to fill with what it measured.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from triptych.flux.card import ViewsCard
from triptych.geometry.files import write_files

QUALITY_MARKS = ("<!-- quality -->", "<!-- /quality -->")
_QUALITY = ("## Quality", "", QUALITY_MARKS[0], "not measured", QUALITY_MARKS[1], "")


def write_model_card(folder: Path, provenance: dict[str, Any], records: list[dict]) -> None:
    """``folder``/README.md. provenance: of the last stage, earlier ones nested in it; records: the training objects."""
    lines = [
        f"# {folder.name}",
        "",
        "Weights of Triptych (Apache-2.0), trained by its own trainer; safetensors with hashes in `bundle.json`.",
        "1-4 posed views of one object -> a 64^3 solid. `docs/reconstruction.md` says how.",
        "",
        "## Training",
        "",
        *_training(provenance),
        "",
        f"{len(records)} objects (the training split of the prepared data), each as it is and turned once, all quarter",
        "turns and mirror images, random light and colours. Evaluation objects were not among them.",
        "",
        *_QUALITY,
        "## Limits",
        "",
        "- Thin parts below 1/64 of the longest side are lost; tops and undersides are seen by no view of the rig.",
        "- Mostly stylised, low-poly training objects: fine relief of real things is smoothed away.",
        "- Views are taken as orthographic, level and cut out; other pictures are outside of what it saw.",
        "",
        "## Data and credits",
        "",
        *_credits(records),
        "",
    ]
    write_files(folder, {"README.md": "\n".join(lines).encode()})


def write_views_card(folder: Path, card: ViewsCard, records: list[dict], base: str = "") -> None:
    """``folder``/README.md of a Flux multi-view model; records: what is said of the training sheets, one a sheet.

    base: what it was fine-tuned from, "" for weights that started from random ones.
    """
    own = list({record["key"]: record for record in records}.values())
    lines = [
        f"# {folder.name}: words or views -> a sheet of four views",
        "",
        *(_tuned(card, base) if base else _OWN),
        "",
        "## Training",
        "",
        *_training(card.provenance),
        "",
        f"{len(records)} sheets of {len(own)} objects: the training split of the prepared data, as they are,",
        "recoloured, mirrored and turned. Evaluation objects were not among them.",
        "",
        *_QUALITY,
        "## Limits",
        "",
        f"- Sheets of {2 * card.panel_size} px, {card.panel_size} px a view.",
        *(_SMALL if card.vocabulary is not None else ()),
        "- It has seen one object at a time, level, cut out. What no view shows is made up.",
        "",
        "## Data and credits",
        "",
        *_credits(own),
        "",
    ]
    write_files(folder, {"README.md": "\n".join(lines).encode()})


_OWN = (
    "A small model of FLUX.2 klein's architecture with weights of our own (Apache-2.0), trained from random ones:",
    "transformer, autoencoder, text encoder and tokenizer in diffusers' layout, with hashes in `views.json`.",
    "It holds nothing of any published Flux checkpoint. `docs/flux_training.md` says how it is trained.",
)
_SMALL = (
    "- Soft: it predicts what a side view is like on average, not its details.",
    "- English, lower case, and only the words in `views.json`.",
)


def _tuned(card: ViewsCard, base: str) -> list[str]:
    what = "A LoRA of" if card.lora else "The whole of"
    return [
        f"{what} {base}, fine-tuned; its licence ({card.licence}) holds for this too. Hashes are in `views.json`.",
        "`docs/flux_training.md` says how it is trained.",
    ]


def fill_quality(card: Path, text: str) -> None:
    """Puts ``text`` between the card's quality marks."""
    before, rest = card.read_text(encoding="utf-8").split(QUALITY_MARKS[0])
    after = rest.split(QUALITY_MARKS[1])[1]
    card.write_text(f"{before}{QUALITY_MARKS[0]}\n{text}\n{QUALITY_MARKS[1]}{after}", encoding="utf-8")


def _stages(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    earlier = [value for value in provenance.values() if isinstance(value, dict) and "recipe" in value]
    return [stage for part in earlier for stage in _stages(part)] + [provenance]


def _training(provenance: dict[str, Any]) -> list[str]:
    head = ["| stage | recipe | steps | samples | hours | device | commit |", "|---|---|---|---|---|---|---|"]
    return head + [_stage(stage) for stage in _stages(provenance)]


def _stage(stage: dict[str, Any]) -> str:
    commit = str(stage.get("commit", "unknown"))[:12] + ("+" if stage.get("dirty") else "")
    hours = float(stage.get("wall_s", 0)) / 3600
    name = stage.get("config", {}).get("task", "")
    return (
        f"| {name} | {stage.get('recipe', '')} | {stage.get('step', '')} | {stage.get('samples', '')} | {hours:.2f} | "
        f"{stage.get('device', '')} | {commit} |"
    )


def _credits(records: list[dict]) -> list[str]:
    found = Counter((r.get("licence") or "not stated", r.get("attribution") or "not stated") for r in records)
    rows = sorted(found.items())
    head = ["| licence | credit | objects |", "|---|---|---|"]
    return head + [f"| {licence} | {credit.replace('|', '/')} | {count} |" for (licence, credit), count in rows]


def attribution_of(records: list[dict]) -> str:
    """One line of credits: objects by licence and author, most first. records: with key, licence and attribution."""
    own = {record["key"]: record for record in records}.values()
    counts = Counter(f"{record.get('attribution') or 'unnamed'} ({record.get('licence') or 'own'})" for record in own)
    return "; ".join(f"{count} objects by {credit}" for credit, count in counts.most_common())
