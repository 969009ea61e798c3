"""The form that ComfyUI's editor saves -> the API form that its servers take.

The editor's form lists a node's widget values in the order of its inputs, without names, and with the values of
controls that belong to the page alone (what happens to a seed after a run, an upload button). So the server's
description of each class is needed to read it. Muted nodes are left out with the links from them; links through
bypassed nodes, reroutes and primitive nodes are followed to what they stand for. Subgraphs, group nodes and inputs
whose widgets depend on other widgets are refused: the editor exports these (Workflow > Export (API)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import TriptychError
from .server import Graph

ACTIVE, MUTED, BYPASSED = 0, 2, 4
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")  # integers that get the control below without asking for it
CONTROLS = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload", "upload")
UPLOAD_VALUES = ("image", "video", "audio", "upload", "file")
EXPORT = "export it from the editor with Workflow > Export (API) instead"

ObjectInfo = Callable[[str], dict[str, Any] | None]


def convert(workflow: dict[str, Any], object_info: ObjectInfo) -> Graph:
    """The API form of a workflow in the editor's form.

    object_info: class -> its description as the server gives it at /object_info/CLASS, None for an unknown class.
    Raises TriptychError for what cannot be converted, with the node.
    """
    return _Conversion(workflow, object_info).graph()


class _Conversion:
    def __init__(self, workflow: dict[str, Any], object_info: ObjectInfo) -> None:
        self._info, self._known = object_info, dict[str, dict[str, Any]]()
        self._nodes: dict[str, dict[str, Any]] = {str(node["id"]): node for node in workflow["nodes"]}
        self._links: dict[Any, tuple[str, int]] = {}  # link id -> (node id, output)
        for link in workflow["links"]:
            if isinstance(link, dict):
                self._links[link["id"]] = str(link["origin_id"]), int(link["origin_slot"])
            elif isinstance(link, list) and len(link) >= 5:
                self._links[link[0]] = str(link[1]), int(link[2])
        subgraphs = (workflow.get("definitions") or {}).get("subgraphs") or ()
        self._subgraphs = {str(subgraph.get("id")) for subgraph in subgraphs}

    def graph(self) -> Graph:
        made: Graph = {}
        for key, node in self._nodes.items():
            if node.get("mode", ACTIVE) in (MUTED, BYPASSED) or _is_virtual(node):
                continue
            info = self._described(node)
            title = node.get("title") or info.get("display_name") or node["type"]
            made[key] = {
                "inputs": self._inputs(node, info), "class_type": node["type"], "_meta": {"title": title},
            }  # fmt: skip
        if not made:
            raise TriptychError("the workflow has no node that runs: unmute some, or choose another file")
        return made

    def _described(self, node: dict[str, Any]) -> dict[str, Any]:
        kind = str(node["type"])
        if kind in self._subgraphs:
            raise TriptychError(f"{_named(node)} is a subgraph, which is not converted here: {EXPORT}")
        if kind.startswith(("workflow>", "workflow/")):
            raise TriptychError(f"{_named(node)} is a group node, which is not converted here: {EXPORT}")
        if kind not in self._known:
            info = self._info(kind)
            if info is None:
                raise TriptychError(f"the server has no node {kind!r} ({_named(node)}): install its pack, or {EXPORT}")
            self._known[kind] = info
        return self._known[kind]

    def _inputs(self, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        values = self._widget_values(node, info)
        for slot in node.get("inputs") or ():
            source = self._source(slot.get("link"))
            if source is not None:
                values[slot["name"]] = source
        order = [name for _, name, _ in _declared(info)]
        return {name: values[name] for name in dict.fromkeys((*order, *values)) if name in values}

    def _widget_values(self, node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
        """Every widget's value by name; the class's default for those that the file does not know yet."""
        stored = node.get("widgets_values")
        slots = {slot["name"] for slot in node.get("inputs") or () if slot.get("widget")}
        widgets = [item for item in _declared(info) if _is_widget(item, slots, node)]
        if isinstance(stored, dict):  # some packs store their nodes' values by name
            return {name: _literal(stored.get(name, _default(spec))) for _, name, spec in widgets}
        left = list(stored or ())
        values: dict[str, Any] = {}
        uploads = any(_options(spec).get(key) for _, _, spec in widgets for key in UPLOADS)
        for number, (section, name, spec) in enumerate(widgets):
            if section == "optional" and uploads and (not number or widgets[number - 1][0] != section):
                uploads = _skip(left, UPLOAD_VALUES)  # the button stands between the required and the optional
            values[name] = _literal(left.pop(0) if left else _default(spec))
            controlled = _options(spec).get("control_after_generate")
            controlled = controlled or (controlled is None and name in SEEDS and spec[0] == "INT")
            if controlled and _skip(left, CONTROLS) and spec[0] not in ("INT", "FLOAT"):
                _skip(left, ("",))  # the filter of a list's values
        missing = [name for name, value in values.items() if value is _NOTHING and not _linked(node, name)]
        if missing:
            raise TriptychError(
                f"{_named(node)} has no value for {', '.join(missing)}: open the workflow and save it again"
            )
        return {name: value for name, value in values.items() if value is not _NOTHING}

    def _source(self, link: Any, seen: frozenset[Any] = frozenset()) -> Any:
        """What an input that this link leads to gets: [node id, output], the value of a primitive node, or None for
        a link that ends at nothing."""
        if link is None or link not in self._links:
            return None
        if link in seen:
            raise TriptychError("the workflow's reroutes or bypassed nodes form a circle: untangle them in the editor")
        key, output = self._links[link]
        node = self._nodes.get(key)
        if node is None:
            raise TriptychError(f"a link comes from node {key}, which the workflow does not have: {EXPORT}")
        mode = node.get("mode", ACTIVE)
        if mode == MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            value = (node.get("widgets_values") or [None])[0]
            return _literal(value)
        if node["type"] == "Reroute" or mode == BYPASSED:
            slots = node.get("inputs") or ()
            through = slots[0] if node["type"] == "Reroute" and slots else _passing(node, output)
            return self._source(through.get("link"), seen | {link}) if through else None
        return [key, output]


class _Nothing:
    pass


_NOTHING = _Nothing()


def _declared(info: dict[str, Any]) -> list[tuple[str, str, list[Any]]]:
    """(section, name, [type, options]) of a class's inputs, in their order."""
    inputs, order = info.get("input") or {}, info.get("input_order") or {}
    return [
        (section, name, inputs[section][name])
        for section in ("required", "optional")
        for name in order.get(section) or inputs.get(section) or ()
        if name in (inputs.get(section) or ())
    ]


def _is_widget(item: tuple[str, str, list[Any]], slots: set[str], node: dict[str, Any]) -> bool:
    _, name, spec = item
    if isinstance(spec[0], str) and "DYNAMIC" in spec[0]:
        raise TriptychError(
            f"the input {name!r} of {_named(node)} changes with its value, which is not converted: {EXPORT}"
        )
    options = _options(spec)
    if options.get("forceInput") or options.get("rawLink"):
        return False
    return isinstance(spec[0], list) or spec[0] in WIDGETS or name in slots


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}


def _default(spec: list[Any]) -> Any:
    options = _options(spec)
    if "default" in options:
        return options["default"]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options") or ()
    return choices[0] if choices else "" if spec[0] == "STRING" else _NOTHING


def _literal(value: Any) -> Any:
    return {"__value__": value} if isinstance(value, list) else value  # a bare list would be a link


def _skip(left: list[Any], values: tuple[str, ...]) -> bool:
    """Takes the next stored value away where it is one of these, the value of a control of the page."""
    if left and isinstance(left[0], str) and left[0] in values:
        del left[0]
        return True
    return False


def _passing(node: dict[str, Any], output: int) -> dict[str, Any] | None:
    """The input that a bypassed node hands on at this output: the one across if it is of the type, else the first."""
    outputs, inputs = node.get("outputs") or [], node.get("inputs") or []
    if output >= len(outputs):
        return None
    kind = outputs[output].get("type")
    candidates = [*inputs[output : output + 1], *inputs]
    return next((slot for slot in candidates if kind == "*" or kind in str(slot.get("type")).split(",")), None)


def _is_virtual(node: dict[str, Any]) -> bool:
    return node["type"] in (*NOTES, "Reroute", "PrimitiveNode")


def _linked(node: dict[str, Any], name: str) -> bool:
    return any(slot["name"] == name and slot.get("link") is not None for slot in node.get("inputs") or ())


def _named(node: dict[str, Any]) -> str:
    title = node.get("title")
    return f"{title} (node {node['id']})" if title else f"node {node['id']} ({node['type']})"
