"""The nodes' words: translations for ComfyUI and help pages, made from the schemas, so that none is forgotten.

English comes from the schemas. Another language's ``locales/<language>/nodeDefs.json`` is written by hand in the same
form; its help pages are made from it. ``docs/write_node_texts.py`` writes what follows, tests compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

HEADINGS = {
    "en": {"inputs": "Inputs", "outputs": "Outputs", "name": "Name", "meaning": "What it does", "optional": "optional"},
    "zh": {"inputs": "输入", "outputs": "输出", "name": "名称", "meaning": "说明", "optional": "可选"},
}


def node_defs(schemas: Iterable[Any]) -> dict[str, Any]:
    """ComfyUI's nodeDefs for the schemas: names and tooltips by node, input and output number."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {one.id: {"name": one.display_name or one.id, "tooltip": one.tooltip} for one in schema.inputs},
            "outputs": {
                str(number): {"name": one.display_name or one.id, "tooltip": one.tooltip}
                for number, one in enumerate(schema.outputs)
            },
        }
        for schema in schemas
    }


def help_page(schema: Any, words: dict[str, Any], notes: str, language: str = "en") -> str:
    """A node's help page in Markdown: description, inputs, outputs, notes. words: its part of nodeDefs."""
    headings = HEADINGS[language]
    lines = [f"# {words['display_name']}", "", words["description"], ""]
    optional = {one.id for one in schema.inputs if one.optional}
    for part in ("inputs", "outputs"):
        if not words[part]:
            continue
        lines += [f"## {headings[part]}", "", f"| {headings['name']} | {headings['meaning']} |", "|---|---|"]
        for key, word in words[part].items():
            name = f"`{key}`" if part == "inputs" else f"`{word['name']}`"
            name += f" ({headings['optional']})" if part == "inputs" and key in optional else ""
            lines.append(f"| {name} | {word['tooltip']} |")
        lines.append("")
    return "\n".join([*lines, notes.strip(), ""])
