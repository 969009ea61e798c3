"""A workflow file -> the graph that a server takes, with files and settings filled in by name.

A node is named by its id, its title, or its class (``Triptych_`` may be left out) where it is the only one of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import TriptychError
from .server import Graph, called

# Which input of a node takes the name of an uploaded file; other classes are asked for "node.input".
FILE_INPUTS = {
    "LoadImage": "image", "LoadImageMask": "image", "Triptych_LoadMesh": "file", "LoadAudio": "audio",
    "LoadVideo": "file", "Load3D": "model_file",
}  # fmt: skip
PREFIX = "Triptych_"


def read_workflow(path: Path) -> dict[str, Any]:
    """The content of a workflow file in either form. Raises TriptychError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TriptychError(f"cannot read the workflow {path} ({error.strerror}): check the path") from error
    except ValueError as error:
        raise TriptychError(f"{path} is no JSON file ({error}): save the workflow again") from error
    if not isinstance(content, dict) or not (is_editor_form(content) or is_graph(content)):
        raise TriptychError(f"{path} is no ComfyUI workflow: save one with Workflow > Save or Export (API)")
    return content


def is_editor_form(content: dict[str, Any]) -> bool:
    """Whether this is what the editor saves: a list of nodes with places and colours."""
    return isinstance(content.get("nodes"), list) and isinstance(content.get("links"), list)


def is_graph(content: dict[str, Any]) -> bool:
    """Whether this is the API form: node id -> {"class_type", "inputs"}."""
    nodes = list(content.values())
    return bool(nodes) and all(
        isinstance(node, dict) and isinstance(node.get("class_type"), str) and isinstance(node.get("inputs"), dict)
        for node in nodes
    )


def find_node(graph: Graph, name: str) -> str:
    """The id of the node of this name. Raises TriptychError when none or several have it."""
    if name in graph:
        return name
    wanted = name.strip().lower()
    by_title = [node for node in graph if _title(graph, node).lower() == wanted]
    by_class = [node for node in graph if graph[node]["class_type"].lower() in (wanted, (PREFIX + wanted).lower())]
    found = by_title or by_class
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(called(graph, node) for node in found)
        raise TriptychError(f"{name!r} could be {several}: use the id")
    raise TriptychError(f"the workflow has no node {name!r}; it has {', '.join(called(graph, node) for node in graph)}")


def find_file_input(graph: Graph, name: str) -> tuple[str, str]:
    """(node id, input) that takes a file: ``name`` is a node's, or ``node.input`` for classes not known here."""
    owner, _, key = name.rpartition(".")
    if owner and name not in graph and any(_is(graph, node, owner) for node in graph):
        node = find_node(graph, owner)
        if key in graph[node]["inputs"]:
            return node, key
    loaders = {node: values for node, values in graph.items() if values["class_type"] in FILE_INPUTS}
    if name in loaders or any(_is(loaders, node, name) for node in loaders):
        node = find_node(loaders, name)
        return node, FILE_INPUTS[graph[node]["class_type"]]
    if any(_is(graph, node, name) for node in graph):
        node = find_node(graph, name)
        raise TriptychError(f"{called(graph, node)} is not known to load files: name its input too, as in {name}.file")
    inputs = ", ".join(_title(graph, node) or node for node in loaders) or "none"
    raise TriptychError(f"the workflow has no input {name!r}; its inputs are: {inputs}")


def with_values(graph: Graph, values: Iterable[str], known_inputs: Callable[[str], set[str]]) -> Graph:
    """The graph with settings ``node.input=value``; a value is JSON where it can be read so, else text.

    known_inputs: class -> the names of its inputs, asked for an input that the graph itself does not have.
    """
    changed = copy.deepcopy(graph)
    for text in values:
        target, equals, value = text.partition("=")
        owner, dot, key = target.rpartition(".")
        if not (equals and dot and owner and key):
            raise TriptychError(f"the setting {text!r} cannot be read: write node.input=value")
        node = find_node(changed, owner)
        inputs = changed[node]["inputs"]
        if key not in inputs and key not in (known := known_inputs(changed[node]["class_type"])):
            has = ", ".join(sorted({*inputs, *known})) or "none"
            raise TriptychError(f"{called(changed, node)} has no input {key!r}; its inputs are: {has}")
        inputs[key] = _value(value, inputs.get(key))
    return changed


def without(graph: Graph, names: Iterable[str]) -> Graph:
    """The graph without some nodes, and without the links that come from them."""
    gone = {find_node(graph, name) for name in names}
    left = {node: copy.deepcopy(values) for node, values in graph.items() if node not in gone}
    for values in left.values():
        values["inputs"] = {key: value for key, value in values["inputs"].items() if not _from(value, gone)}
    return left


def _from(value: Any, gone: set[str]) -> bool:
    return isinstance(value, list) and len(value) == 2 and str(value[0]) in gone


def _value(text: str, present: Any) -> Any:
    if isinstance(present, str):  # a name such as 007 stays what it is
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return {"__value__": value} if isinstance(value, list) else value  # a bare list would be a link


def _is(graph: Graph, node: str, name: str) -> bool:
    wanted = name.strip().lower()
    class_type = graph[node]["class_type"].lower()
    return wanted in (node.lower(), _title(graph, node).lower(), class_type, class_type.removeprefix(PREFIX.lower()))


def _title(graph: Graph, node: str) -> str:
    return str((graph[node].get("_meta") or {}).get("title") or "")
