"""Node classes as a server describes them at /object_info, made from the pack's schemas without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_comfy

# The two classes of ComfyUI itself that workflows/ uses, as far as conversion and checks need them.
CORE = {
    "LoadImage": {
        "input": {"required": {"image": [["example.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"],
        "display_name": "Load Image",
    },
    "SaveImage": {
        "input": {
            "required": {"images": ["IMAGE", {}], "filename_prefix": ["STRING", {"default": "ComfyUI"}]},
            "hidden": {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        },
        "output": [],
        "display_name": "Save Image",
        "output_node": True,
    },
}  # fmt: skip
_OPTIONS = ("default", "min", "max", "options", "control_after_generate")


def object_info(base: Path) -> dict[str, dict[str, Any]]:
    """Class -> description, of the pack and of ``CORE``; ComfyUI's folders are made under ``base``."""
    with fake_comfy.pack(base) as pack:
        import importlib

        nodes = importlib.import_module(f"{pack.__name__}.nodes")
        described = [_described(node.define_schema()) for node in nodes.NODES]
    return CORE | {one["name"]: one for one in described}


def _described(schema: fake_comfy.Schema) -> dict[str, Any]:
    inputs: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for item in schema.inputs or ():
        options = {key: value for key in _OPTIONS if (value := getattr(item, key, None)) is not None}
        inputs["optional" if item.optional else "required"][item.id] = [item.io_type, options]
    return {
        "input": inputs,
        "input_order": {section: list(items) for section, items in inputs.items()},
        "output": [item.io_type for item in schema.outputs or ()],
        "output_name": [item.display_name or item.id for item in schema.outputs or ()],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "output_node": schema.is_output_node,
    }
