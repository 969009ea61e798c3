"""What is dropped, what is only flagged, and the sentence that says why. Every threshold is here.

Building measures, ``judge`` decides. The measurements are kept with every object, so a preparation that is run again
with other thresholds decides anew without building again; only an object that was dropped and now passes is built.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

# In the order in which they are asked; the first that applies names the object's reason.
GATES = {
    "empty": "no faces",
    "broken": "cannot be read",
    "non-finite": "coordinates that are NaN or infinite",
    "killed": "stopped its worker process twice",
    "time": "took too long",
    "error": "stopped the preparation's own code",
    "faces": "too few or too many triangles",
    "flat": "a flat sheet",
    "degenerate": "triangles without area",
    "open": "open beyond the limit",
    "solid": "no solid can be made of it",
    "thin": "too thin for the voxels",
    "duplicate": "the same geometry as another object",
}
# Not measurements: what happened on the way. They hold until the object is built again.
INCIDENTS = ("killed", "time", "error", "solid")


def _gate(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Gates:
    """The thresholds; each is a command line option of the same name."""

    min_faces: int = _gate(4, "drop objects with fewer triangles")
    max_faces: int = _gate(2_000_000, "drop objects with more triangles")
    min_thickness: float = _gate(1e-3, "drop flat sheets: smallest side over longest side below this")
    flag_degenerate: float = _gate(0.02, "flag objects with a greater share of triangles without area")
    drop_degenerate: float = _gate(0.5, "drop objects with a greater share of triangles without area")
    flag_open: float = _gate(0.25, "flag objects with a greater share of edges that belong to one triangle")
    drop_open: float = _gate(1.0, "drop objects with a greater share of such edges (1: never)")
    min_inside_voxels: int = _gate(24, "drop objects with fewer voxels inside")
    max_seconds: float = _gate(300.0, "drop an object that takes a worker longer (not with --workers 0)")


class Verdict(NamedTuple):
    """gate: a key of GATES, or None for an object that passes; reason: a sentence, or None; flags: sentences."""

    gate: str | None
    reason: str | None
    flags: list[str]


def judge(record: dict[str, Any], gates: Gates) -> Verdict:
    """The verdict on one object by itself, from its record; duplicates are found when all are known."""
    if record.get("gate") in INCIDENTS:
        return Verdict(record["gate"], record["reason"], [])
    if record.get("faces") is None:
        return Verdict(record.get("gate") or "broken", record["reason"], [])
    gate, reason = next(_reasons(record, gates), (None, None))
    return Verdict(gate, reason, list(_flags(record, gates)))


def reading_gate(sentence: str, file_bytes: int | None) -> str:
    """Which gate a reader's sentence belongs to; for counting only, the sentence itself is what is shown."""
    if file_bytes == 0 or "no faces" in sentence:
        return "empty"
    if "no extent" in sentence:
        return "degenerate"
    return "non-finite" if "NaN or infinite" in sentence else "broken"


def _reasons(record: dict[str, Any], gates: Gates):
    faces, smallest = record["faces"], min(record["sides"])
    if faces < gates.min_faces:
        yield "faces", f"{faces} triangles, fewer than {gates.min_faces}: no solid has so few"
    if faces > gates.max_faces:
        yield "faces", f"{faces:,} triangles, more than {gates.max_faces:,}: decimate it first"
    if smallest < gates.min_thickness:
        yield "flat", f"a flat sheet: the smallest side is {smallest:.1e} of the longest"
    degenerate = record.get("degenerate", 0.0)
    if degenerate > gates.drop_degenerate:
        yield "degenerate", f"{degenerate:.0%} of the triangles have no area"
    if record["open_edges"] > gates.drop_open:
        yield "open", f"open: {record['open_edges']:.0%} of the edges belong to one triangle"
    inside = record.get("inside_voxels")
    if inside is not None and inside < gates.min_inside_voxels:
        yield "thin", f"only {inside} voxels inside: too thin to learn from"


def _flags(record: dict[str, Any], gates: Gates):
    if record["open_edges"] > gates.flag_open:
        yield f"open: {record['open_edges']:.0%} of the edges belong to one triangle"
    degenerate = record.get("degenerate", 0.0)
    if degenerate > gates.flag_degenerate:
        yield f"degenerate: {degenerate:.0%} of the triangles have no area"
    if "degenerate" not in record:  # built before the share was kept: the flag of then
        yield from (f"degenerate: {flag}" for flag in record["flags"] if "no area" in flag)
    yield from (f"left out: {note}" for note in record.get("notes", ()))


def add_gate_arguments(parser: Any) -> None:
    group = parser.add_argument_group("gates", "what is dropped or flagged; run again with others at any time")
    for item in fields(Gates):
        name = "--" + item.name.replace("_", "-")
        kind = type(item.default)
        group.add_argument(name, type=kind, default=item.default, metavar="N" if kind is int else "X",
                           help=f"{item.metadata['help']} (default: {item.default:g})")  # fmt: skip


def gates_from(args: Any) -> Gates:
    return Gates(**{item.name: getattr(args, item.name) for item in fields(Gates)})
