"""The preparation as a person reads it: report.html, and report/page_NNN.html with every object.

All pages hold their pictures and styles themselves and ask for nothing from elsewhere. report.html shows the numbers,
every dropped and every flagged object with its reason, and a wall of samples; the pages hold 500 objects each, so
that ten thousand stay usable. Names and sentences come from other people's files: everything is escaped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from html import escape
from pathlib import Path

from safetensors import safe_open

from .charts import bars, histogram, number
from .gates import GATES
from .shards import write_json, write_text
from .statistics import flag_kind, statistics_of, write_attribution
from .thumbnails import thumbnail_uri

OBJECTS_A_PAGE = 500
WALL = 144
_SECTIONS = ("distributions", "dropped", "flagged", "samples")
_SPLITS = ("train", "validation", "test")


def write_report(out: Path, index: dict, summary: dict) -> None:
    """Writes statistics.json, ATTRIBUTION.md, report.html and report/page_NNN.html into a prepared folder."""
    statistics = statistics_of(index, summary)
    write_json(out / "statistics.json", statistics)
    write_attribution(out, index)
    pictures = _thumbnails(out, index["records"])
    ok = [r for r in index["records"] if r["status"] == "ok"]
    pages = [ok[i : i + OBJECTS_A_PAGE] for i in range(0, len(ok), OBJECTS_A_PAGE)]
    (out / "report").mkdir(exist_ok=True)
    for place, records in enumerate(pages):
        write_text(out / "report" / f"page_{place + 1:03d}.html", _object_page(records, place, pages, pictures))
    for path in (out / "report").glob("page_*.html"):
        if int(path.stem.split("_")[1]) > len(pages):
            path.unlink()
    write_text(out / "report.html", _main_page(out, index, statistics, pages, pictures))


def _thumbnails(out: Path, records: list[dict]) -> dict[str, str]:
    """Data URIs by key: the front view at yaw 0 of what the shards hold, the record's own picture of the rest."""
    found = {r["key"]: r["thumbnail"] for r in records if r.get("thumbnail")}
    by_shard = defaultdict(list)
    for record in records:
        if record["rows"]:
            by_shard[record["shard"]].append(record)
    for shard, held in sorted(by_shard.items()):
        with safe_open(str(out / "shards" / f"{shard}.safetensors"), framework="numpy") as handle:
            albedo, normal = handle.get_slice("albedo"), handle.get_slice("normal")
            for record in held:
                row = record["rows"][0]
                found[record["key"]] = thumbnail_uri(albedo[row, 0], normal[row, 0])
    return found


def _main_page(out: Path, index: dict, statistics: dict, pages: list[list[dict]], pictures: dict[str, str]) -> str:
    records, summary = index["records"], statistics["summary"]
    ok = [r for r in records if r["status"] == "ok"]
    dropped = [r for r in records if r["status"] != "ok"]
    flagged = [r for r in ok if r["flags"]]
    options = index["options"]
    lead = (
        f"{options['resolution']}³ voxels, four views of {options['view_size']} px, {options['yaws']} yaws; "
        f"{summary['built']:,} built in this run of {_duration(summary['seconds'])}."
    )
    body = [
        f"<header><h1>{escape(out.resolve().name)}</h1><p>{lead}</p></header>",
        _figures(summary, len(records), statistics),
        "<nav>", *(f"<a href='#{name}'>{name.title()}</a>" for name in _SECTIONS),
        "<span>All objects:</span>", _page_links(len(pages), "report/"), "</nav>",
        "<section id=distributions><h2>Distributions</h2><p>Of the objects that are ready.</p><div class=charts>",
        _charts(ok, statistics), "</div></section>",
        _groups("dropped", dropped, lambda r: [r["gate"]], GATES, lambda r: [r["reason"]], pictures),
        _groups("flagged", flagged, _flag_kinds, FLAGS, lambda r: r["flags"], pictures),
        "<section id=samples><h2>Samples</h2><p>Front views, yaw 0, drawn by content.</p><div class=wall>",
        *(_tile(r, pictures) for r in sorted(ok, key=lambda r: r["geometry_hash"])[:WALL]), "</div></section>",
    ]  # fmt: skip
    return _html(f"{out.resolve().name}: preparation", body)


def _flag_kinds(record: dict) -> list[str]:
    return sorted({flag_kind(flag) for flag in record["flags"]})


FLAGS = {
    "open": "many edges belong to one triangle: the solid is a guess there",
    "degenerate": "some triangles have no area",
    "left out": "the reader left something out, such as a missing texture",
}


def _figures(summary: dict, total: int, statistics: dict) -> str:
    splits = summary["splits"]
    cells = [
        (f"{summary['objects']:,}", "objects ready", f"of {total:,}, {summary['samples']:,} samples"),
        (f"{summary['dropped']:,}", "dropped", ", ".join(f"{n} {g}" for g, n in summary["dropped_by_gate"].items())),
        (f"{summary['flagged']:,}", "flagged", ", ".join(f"{n} {kind}" for kind, n in statistics["flagged"].items())),
        (" · ".join(f"{splits[name]:,}" for name in _SPLITS), "train · validation · test", "by content, stable"),
    ]
    items = (f"<div><b>{big}</b><span>{label}</span><small>{escape(note)}</small></div>" for big, label, note in cells)
    return f"<div class=figures>{''.join(items)}</div>"


def _charts(ok: list[dict], statistics: dict) -> str:
    categories = {name: entry["objects"] for name, entry in statistics["categories"].items()}
    looks = {"textured": statistics["textured"], "plain colours": len(ok) - statistics["textured"]}
    return "".join(
        [
            histogram([r["faces"] for r in ok], "Triangles", log=True),
            histogram([r["inside_voxels"] for r in ok], "Voxels inside", log=True),
            histogram([100 * r["open_edges"] for r in ok], "Open edges", unit=" %"),
            bars(categories, "Categories"),
            bars(statistics["licences"], "Licences"),
            bars(statistics["summary"]["splits"], "Splits") + bars(looks, "Appearance") if ok else "",
        ]
    )


def _groups(
    title: str,
    records: list[dict],
    kinds: Callable[[dict], list[str]],
    meanings: dict[str, str],
    why: Callable[[dict], list[str]],
    pictures: dict[str, str],
) -> str:
    groups = defaultdict(list)
    for record in records:
        for kind in kinds(record):
            groups[kind].append(record)
    parts = [f"<section id={title}><h2>{title.title()} <small>{len(records):,}</small></h2>"]
    if not records:
        parts.append(f"<p>No object was {title}.</p>")
    for kind in sorted(groups, key=lambda k: list(meanings).index(k) if k in meanings else len(meanings)):
        found = groups[kind]
        is_open = " open" if len(found) <= 200 else ""
        parts.append(
            f"<details{is_open}><summary><b>{escape(kind)}</b> {escape(meanings.get(kind, ''))} <i>{len(found):,}</i>"
            f"</summary><div class=cards>{''.join(_card(r, why(r), pictures) for r in found)}</div></details>"
        )
    return "".join([*parts, "</section>"])


def _picture(record: dict, pictures: dict[str, str]) -> str:
    uri = pictures.get(record["key"])
    if uri is None:
        return f"<span class=blank>{escape(Path(record['key']).suffix.lstrip('.').upper() or 'no picture')}</span>"
    return (
        f"<img src='{uri}' width=96 height=96 loading=lazy decoding=async alt='{escape(record['name'], quote=True)}'>"
    )


def _card(record: dict, sentences: list[str], pictures: dict[str, str]) -> str:
    said = "".join(f"<p>{escape(sentence or '')}</p>" for sentence in sentences)
    return (
        f"<article>{_picture(record, pictures)}<div><b>{escape(record['name'])}</b>{said}"
        f"<small>{escape(record['key'])}</small></div></article>"
    )


def _tile(record: dict, pictures: dict[str, str]) -> str:
    facts = f"{number(record['faces'])} triangles, {number(record['inside_voxels'])} voxels, {record['split']}"
    title = "; ".join([record["key"], record["category"], facts, *record["flags"]])
    mark = " class=flag" if record["flags"] else ""
    return (
        f"<figure{mark} title='{escape(title, quote=True)}'>{_picture(record, pictures)}"
        f"<figcaption>{escape(record['name'])}</figcaption></figure>"
    )


def _object_page(records: list[dict], place: int, pages: list[list[dict]], pictures: dict[str, str]) -> str:
    first = place * OBJECTS_A_PAGE
    title = f"Objects {first + 1:,} to {first + len(records):,} of {sum(map(len, pages)):,}"
    body = [
        f"<header><h1>{title}</h1><p>By key. An amber edge marks a flagged object; point at one for its facts.</p>"
        "</header>",
        f"<nav><a href='../report.html'>Report</a>{_page_links(len(pages), '', place)}",
        "<input type=search placeholder='Filter by name, category, split' aria-label=Filter></nav>",
        "<div class=wall>", *(_tile(r, pictures) for r in records), "</div>", _FILTER,
    ]  # fmt: skip
    return _html(title, body)


def _page_links(count: int, folder: str, here: int | None = None) -> str:
    return "".join(
        f"<a{' class=here' if i == here else ''} href='{folder}page_{i + 1:03d}.html'>{i + 1}</a>" for i in range(count)
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _html(title: str, body: list[str]) -> str:
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


_FILTER = """<script>
const tiles = [...document.querySelectorAll(".wall figure")];
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  for (const tile of tiles) tile.hidden = !words.every(word => tile.title.toLowerCase().includes(word));
});
</script>"""

_STYLE = """
:root{--page:#fbfbfa;--card:#fff;--ink:#1c2228;--soft:#68717b;--line:#e2e5e8;--bar:#2f7f86;--amber:#c9861a;
 --tile:#e8ebef}
@media(prefers-color-scheme:dark){:root{--page:#15191d;--card:#1d2227;--ink:#e8ebee;--soft:#98a2ac;
 --line:#30373e;--bar:#4fa9b0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1280px;padding:32px 28px 80px;background:var(--page);color:var(--ink);
 font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:28px;margin:0;letter-spacing:-.01em}h2{font-size:19px;margin:44px 0 6px}
h2 small{color:var(--soft);font-weight:400}
header p,section>p{color:var(--soft);margin:4px 0 14px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:14px;margin:18px 0}
.figures div,.chart,article{background:var(--card);border:1px solid var(--line);border-radius:8px}
.figures div{padding:14px 18px}
.figures b{display:block;font-size:26px;font-variant-numeric:tabular-nums;letter-spacing:-.02em}
.figures span{display:block}.figures small,article small,.chart span{color:var(--soft);font-size:12px}
nav{display:flex;flex-wrap:wrap;gap:6px;align-items:center;position:sticky;top:0;background:var(--page);
 padding:10px 0;z-index:1}
nav a{color:inherit;text-decoration:none;border:1px solid var(--line);border-radius:6px;padding:3px 10px;
 background:var(--card)}
nav a:hover,nav .here{border-color:var(--bar);color:var(--bar)}nav span{color:var(--soft);margin-left:14px}
nav input{margin-left:auto;width:260px;padding:5px 10px;border:1px solid var(--line);border-radius:6px;
 background:var(--card);
 color:inherit;font:inherit}
.charts{columns:340px;column-gap:14px}
.chart{margin:0 0 14px;padding:14px 18px;break-inside:avoid}
.chart figcaption{display:flex;justify-content:space-between;margin-bottom:8px}
svg{width:100%;display:block}svg rect{fill:var(--bar)}svg line{stroke:var(--line)}
svg .median{stroke:var(--amber);stroke-dasharray:3 3}
svg text{fill:var(--soft);font-size:11px}
.bars{width:100%;border-collapse:collapse;font-variant-numeric:tabular-nums}
.bars th{font-weight:400;text-align:left;padding:1px 10px 1px 0;max-width:150px;overflow:hidden;
 text-overflow:ellipsis;white-space:nowrap}
.bars td:nth-child(2){width:50%}
.bars i{display:block;height:11px;min-width:2px;background:var(--bar);border-radius:2px}
.bars .n{text-align:right;padding-left:8px;color:var(--soft)}
details{margin:8px 0 14px}summary{cursor:pointer;color:var(--soft);padding:4px 0}summary b{color:var(--ink)}
summary i{font-style:normal;color:var(--ink);margin-left:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:10px;margin-top:8px}
article{display:flex;gap:12px;padding:8px;content-visibility:auto;contain-intrinsic-size:auto 114px;overflow:hidden}
article div{min-width:0;overflow-wrap:anywhere}article p{margin:2px 0 4px}article small{display:block}
img,.blank{width:96px;height:96px;flex:none;border-radius:6px;background:var(--tile);display:block}
.blank{display:grid;place-items:center;color:#68717b;border:1px dashed #b6bec6}
.wall{display:grid;grid-template-columns:repeat(auto-fill,96px);gap:14px 10px;margin-top:12px;
 justify-content:space-between}
.wall figure{margin:0;width:96px;content-visibility:auto;contain-intrinsic-size:auto 116px}
.wall figure[hidden]{display:none}
.wall figcaption{font-size:11px;color:var(--soft);white-space:nowrap;overflow:hidden;text-overflow:ellipsis;
 padding-top:3px}
.flag img{outline:2px solid var(--amber);outline-offset:-2px}
"""
