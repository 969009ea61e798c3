"""Bar charts as inline SVG: no script, no library, colours from the page's style sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT, BASE = 380, 150, 118  # SVG units; BASE is where bars stand


def histogram(values: Sequence[float], title: str, *, log: bool = False, bins: int = 28, unit: str = "") -> str:
    """A figure with the distribution of ``values`` (0 or more when ``log``), its median marked."""
    if not len(values):
        return ""
    data = np.asarray(values, dtype=np.float64)
    forward: Callable = (lambda x: np.log10(np.maximum(x, 1))) if log else np.asarray
    low, high = float(forward(data).min()), float(forward(data).max())
    high = high if high > low else low + 1
    counts, edges = np.histogram(forward(data), bins=bins, range=(low, high))
    back: Callable = (lambda x: 10**x) if log else (lambda x: x)
    step = WIDTH / bins
    bars = [
        f'<rect x="{i * step + 0.5:.1f}" y="{BASE - height:.1f}" width="{step - 1:.1f}" height="{height:.1f}">'
        f"<title>{number(back(edges[i]))} to {number(back(edges[i + 1]))}{unit}: {n}</title></rect>"
        for i, n in enumerate(counts)
        if (height := max(1.5, 100 * n / counts.max()) if n else 0)
    ]
    ticks = [
        f'<text x="{share * WIDTH:.0f}" y="{BASE + 16}" text-anchor="{anchor}">'
        f"{number(back(low + share * (high - low)))}{unit}</text>"
        for share, anchor in ((0, "start"), (0.5, "middle"), (1, "end"))
    ]
    middle = float(np.median(data))
    at = (float(forward(middle)) - low) / (high - low) * WIDTH
    mark = f'<line class="median" x1="{at:.1f}" x2="{at:.1f}" y1="10" y2="{BASE}"/>'
    note = f"median {number(middle)}{unit}" + (", log scale" if log else "")
    body = f'<line x1="0" x2="{WIDTH}" y1="{BASE}" y2="{BASE}"/>{"".join(bars)}{mark}{"".join(ticks)}'
    return _figure(title, note, f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{body}</svg>')


def bars(counts: dict[str, int], title: str, most: int = 14) -> str:
    """A figure with one horizontal bar a name, the largest first; what is beyond ``most`` is summed up."""
    if not counts:
        return ""
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(items) > most:
        rest = items[most - 1 :]
        items = [*items[: most - 1], (f"{len(rest)} others", sum(n for _, n in rest))]
    largest, total = max(n for _, n in items), sum(n for _, n in items)
    rows = [
        f"<tr><th>{escape(name)}</th><td><i style='width:{100 * n / largest:.1f}%'></i></td>"
        f"<td class=n>{n:,}</td><td class=n>{n / total:.1%}</td></tr>"
        for name, n in items
    ]
    return _figure(title, f"{total:,} objects", f"<table class=bars>{''.join(rows)}</table>")


def number(value: float) -> str:
    """Three digits at most: 0.25, 17, 4.2k, 1.3M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _figure(title: str, note: str, body: str) -> str:
    caption = f"<figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
    return f"<figure class=chart>{caption}{body}</figure>"
