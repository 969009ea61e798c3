"""Writes locales/en/nodeDefs.json and web/public/docs from the nodes' schemas, the translations and the notes.

    python docs/write_node_texts.py

locales/zh/nodeDefs.json and docs/node_notes.json are written by hand; run this after changing them or a schema.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "web" / "public" / "docs"


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that is made, and what it should say."""
    sys.path.insert(0, str(ROOT / "tests"))
    import fake_comfy

    notes = json.loads((ROOT / "docs" / "node_notes.json").read_text(encoding="utf-8"))
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as base, fake_comfy.pack(Path(base)):
        from triptych_pack import nodes
        from triptych_pack.nodes.texts import help_page, node_defs

        schemas = [node.define_schema() for node in nodes.NODES]
        english = node_defs(schemas)
        yield ROOT / "locales" / "en" / "nodeDefs.json", json.dumps(english, indent=2, ensure_ascii=False) + "\n"
        for schema in schemas:
            name = schema.node_id
            yield PAGES / f"{name}.md", help_page(schema, english[name], notes[name]["en"])
            yield PAGES / name / "zh.md", help_page(schema, chinese[name], notes[name]["zh"], "zh")


def main() -> None:
    for path, text in texts():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
