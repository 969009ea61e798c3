"""As much of ComfyUI's V3 interface as it takes to read the nodes' schemas without ComfyUI.

It is as strict as the oldest core that is supported (0.3.64): an argument that this core does not know is a
TypeError. Nothing runs here; tests/test_comfy_nodes.py does that in a real ComfyUI.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACK = "triptych_pack"


@dataclass
class Schema:
    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list | None = None
    outputs: list | None = None
    hidden: list | None = None
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False


@dataclass
class Input:
    id: str
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    lazy: bool | None = None
    extra_dict: dict = field(default_factory=dict)
    io_type = ""


@dataclass
class Output:
    id: str | None = None
    display_name: str | None = None
    tooltip: str | None = None
    is_output_list: bool = False
    io_type = ""


def _widget(**own: Any) -> type[Input]:
    """An input class that knows these arguments besides an input's."""

    class Widget(Input):
        def __init__(self, id, display_name=None, optional=False, tooltip=None, lazy=None, default=None,
                     socketless=None, force_input=None, **given):  # fmt: skip
            super().__init__(id, display_name, optional, tooltip, lazy)
            self.default = default
            unknown = set(given) - set(own)
            if unknown:
                raise TypeError(f"{type(self).__name__} got unexpected arguments {sorted(unknown)}")
            vars(self).update(own | given)

    return Widget


def _type(io_type: str, input_class: type[Input] = Input) -> type:
    made_input = type("Input", (input_class,), {"io_type": io_type})
    made_output = type("Output", (Output,), {"io_type": io_type})
    return type(io_type.title(), (), {"io_type": io_type, "Input": made_input, "Output": made_output})


class MultiTypeInput(Input):
    def __init__(self, id, types, display_name=None, optional=False, tooltip=None, lazy=None, extra_dict=None):
        super().__init__(id, display_name, optional, tooltip, lazy, extra_dict or {})
        self.io_type = ",".join(one.io_type for one in types)


class ComfyNode:
    pass


class NodeOutput:
    def __init__(self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None):
        self.args, self.ui = args, ui

    @property
    def result(self) -> tuple:
        return self.args


_NUMBER = {"min": None, "max": None, "step": None, "control_after_generate": None, "display_mode": None}
_COMBO = {"options": None, "control_after_generate": None, "upload": None, "image_folder": None, "remote": None}
io = SimpleNamespace(
    Schema=Schema,
    Input=Input,
    Output=Output,
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Custom=_type,
    MultiType=SimpleNamespace(Input=MultiTypeInput),
    Boolean=_type("BOOLEAN", _widget(label_on=None, label_off=None)),
    Int=_type("INT", _widget(**_NUMBER)),
    Float=_type("FLOAT", _widget(**{k: v for k, v in _NUMBER.items() if k != "control_after_generate"}, round=None)),
    String=_type("STRING", _widget(multiline=False, placeholder=None, dynamic_prompts=None)),
    Combo=_type("COMBO", _widget(**_COMBO)),
    Image=_type("IMAGE"),
    Mask=_type("MASK"),
    Mesh=_type("MESH"),
    Model=_type("MODEL"),
    Clip=_type("CLIP"),
    Vae=_type("VAE"),
    Conditioning=_type("CONDITIONING"),
    Latent=_type("LATENT"),
    Sigmas=_type("SIGMAS"),
)


@contextmanager
def pack(base: Path) -> Iterator[ModuleType]:
    """The repository imported as ComfyUI imports it, with ComfyUI's folders under ``base``; undone at the end."""
    paths = ModuleType("folder_paths")
    for name in ("input", "output", "temp", "models"):
        (base / name).mkdir(parents=True, exist_ok=True)
    vars(paths).update(
        models_dir=str(base / "models"),
        get_input_directory=lambda: str(base / "input"),
        get_output_directory=lambda: str(base / "output"),
        get_temp_directory=lambda: str(base / "temp"),
        get_folder_paths=lambda key: [str(base / "models" / key)],
        add_model_folder_path=lambda key, folder: None,
    )
    latest = ModuleType("comfy_api.latest")
    vars(latest).update(io=io, ui=SimpleNamespace(), ComfyExtension=type("ComfyExtension", (), {}))
    server = ModuleType("server")
    vars(server).update(PromptServer=type("PromptServer", (), {}))
    fakes = {"comfy_api": ModuleType("comfy_api"), "comfy_api.latest": latest, "folder_paths": paths, "server": server}
    before = {name: sys.modules.get(name) for name in fakes}
    outer = {name: sys.modules.pop(name) for name in _pack_modules()}  # one pack may be imported inside another
    sys.modules.update(fakes)
    try:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in _pack_modules():
            del sys.modules[name]
        sys.modules.update(outer)
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def _pack_modules() -> list[str]:
    return [name for name in sys.modules if name == PACK or name.startswith(f"{PACK}.")]
