"""Numbers about a preparation, for machines and for its report; and the credits that its objects' licences ask for."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from .gates import GATES
from .shards import write_text

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MEASURES = ("faces", "vertices", "inside_voxels", "open_edges", "file_bytes")


def statistics_of(index: dict, summary: dict) -> dict:
    """Counts of what was dropped, flagged and kept; quantiles of the kept objects' measures; categories; licences."""
    records = index["records"]
    ok = [r for r in records if r["status"] == "ok"]
    dropped = [r for r in records if r["status"] != "ok"]
    return {
        "summary": summary,
        "options": index["options"],
        "dropped": {gate: [r["key"] for r in dropped if r["gate"] == gate] for gate in GATES if _any(dropped, gate)},
        "flagged": dict(Counter(kind for r in ok for kind in sorted({flag_kind(flag) for flag in r["flags"]}))),
        "textured": sum(bool(r.get("textured")) for r in ok),
        "sheet_only": sum(bool(r.get("sheet_only")) for r in ok),
        "measures": {name: _quantiles([r[name] for r in ok if r.get(name) is not None]) for name in MEASURES},
        "categories": _by_category(ok),
        "licences": dict(Counter(r["licence"] or "unknown" for r in ok).most_common()),
    }


def flag_kind(flag: str) -> str:
    return flag.partition(":")[0]


def _any(records: list[dict], gate: str) -> bool:
    return any(r["gate"] == gate for r in records)


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.quantile(values, QUANTILES)
    return {f"{share:g}": round(float(value), 4) for share, value in zip(QUANTILES, found, strict=True)}


def _by_category(ok: list[dict]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in ok:
        counts[record["category"] or "none"][record["split"]] += 1
    order = sorted(counts, key=lambda name: (-sum(counts[name].values()), name))
    return {name: {"objects": sum(counts[name].values()), **counts[name]} for name in order}


def write_attribution(out: Path, index: dict) -> None:
    """ATTRIBUTION.md: who made the objects that the shards hold, by licence, with every object's name."""
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for record in index["records"]:
        if record["rows"]:  # a duplicate lies in the shards too
            groups[record["licence"], record["attribution"]].append(record)
    total = sum(len(found) for found in groups.values())
    lead = f"The {total} objects in this folder, by licence and author. Keep this file with them."
    lines = ["# Attribution", "", lead, ""]
    for licence in sorted({licence for licence, _ in groups}):
        lines += [f"## {licence or 'Licence unknown'}", ""]
        if not licence:
            lines += ["No index.csv named one: find out before you share these objects or a model made of them.", ""]
        for (of, attribution), found in sorted(groups.items()):
            if of == licence:
                names = ", ".join(sorted(_plain(record["name"] or record["key"]) for record in found))
                lines += [f"### {_plain(attribution) or 'Author unknown'} ({len(found)})", "", names, ""]
    write_text(out / "ATTRIBUTION.md", "\n".join(lines))


def _plain(text: str) -> str:
    """One line, with nothing that Markdown would take for a tag or a link."""
    return " ".join(text.split()).replace("<", "‹").replace(">", "›").replace("[", "(").replace("]", ")")
