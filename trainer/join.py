"""Joining bundles: stages that were trained and exported one by one become one bundle.

Files are copied as they are, so hashes stay; settings are merged, provenance is kept by component. Nothing
is joined that does not fit: the same component twice, or networks of different frames.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from trainer.model_card import QUALITY_MARKS
from triptych.bundles.bundle import Bundle, load_bundle
from triptych.bundles.manifest import MANIFEST, Manifest, verify_file
from triptych.errors import TriptychError
from triptych.geometry.files import write_files

_CARD = "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="exported bundles; the card is the first one's")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder; its name is the bundle's")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="COMPONENT", help="networks that are not wanted")


def main(args: argparse.Namespace) -> int:
    manifest = join_bundles([load_bundle(name) for name in args.bundles], args.out, set(args.leave_out))
    print(f"{args.out}: {', '.join(manifest.components)}")
    return 0


def join_bundles(bundles: list[Bundle], out: Path, leave_out: set[str] | None = None) -> Manifest:
    """Writes the networks of ``bundles``, but for ``leave_out``, into ``out``, and returns its manifest.

    Raises TriptychError: a folder that is not empty, a component that two bundles have, other axes, a damaged file.
    """
    if out.is_dir() and any(out.iterdir()):
        raise TriptychError(f"{out} is not empty: choose a new folder")
    first = bundles[0].manifest
    components: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    sampling: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    for bundle in bundles:
        manifest = bundle.manifest
        if (manifest.up, manifest.front) != (first.up, first.front):
            axes = f"{manifest.up} up and {manifest.front} in front"
            raise TriptychError(f"{manifest.name} has {axes}, {first.name} has not: join networks of one frame")
        for name, component in manifest.components.items():
            if name in (leave_out or set()):
                continue
            if name in components:
                raise TriptychError(f"{manifest.name} and an earlier bundle both have a {name}: leave one out")
            content = verify_file(bundle.folder, component).read_bytes()
            components[name] = replace(component, file=f"{name}.safetensors")
            files[f"{name}.safetensors"] = content
            provenance[name] = manifest.provenance.get(name, manifest.provenance)
        sampling |= manifest.sampling
    joined = replace(first, name=out.name, components=components, sampling=sampling, provenance=provenance)
    files[MANIFEST] = (json.dumps(asdict(joined), indent=1) + "\n").encode()
    files[_CARD] = _card(out.name, [bundle.folder / _CARD for bundle in bundles]).encode()
    write_files(out, files)
    return joined


def _card(name: str, cards: list[Path]) -> str:
    """One model card of several: the first, with the training rows and credits of the others merged into its tables."""
    texts = [card.read_text(encoding="utf-8") for card in cards if card.is_file()]
    if not texts:
        return f"# {name}\n"
    stages = list(dict.fromkeys(row for text in texts for row in _rows(text, "## Training")))
    credits: dict[str, int] = {}
    for text in texts:
        for row in _rows(text, "## Data and credits"):
            source, _, count = row.rstrip("| ").rpartition("|")
            credits[source] = max(credits.get(source, 0), int(count))
    merged = re.sub(r"\A# .*", f"# {name}", texts[0])
    merged = _with_rows(merged, "## Training", stages)
    merged = _with_rows(merged, "## Data and credits", [f"{source}| {count} |" for source, count in credits.items()])
    before, after = merged.split(QUALITY_MARKS[0])[0], merged.split(QUALITY_MARKS[1])[-1]
    return f"{before}{QUALITY_MARKS[0]}\nnot measured\n{QUALITY_MARKS[1]}{after}"


def _table(text: str, heading: str) -> re.Match[str] | None:
    return re.search(re.escape(heading) + r"\n\n\|.*\|\n\|[-|]+\|\n((?:\|.*\|\n?)*)", text)


def _rows(text: str, heading: str) -> list[str]:
    found = _table(text, heading)
    return found[1].splitlines() if found else []


def _with_rows(text: str, heading: str, rows: list[str]) -> str:
    found = _table(text, heading)
    if found is None:
        return text
    return text[: found.start(1)] + "\n".join(rows) + "\n" + text[found.end(1) :]
