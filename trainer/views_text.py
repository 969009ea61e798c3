"""Are words obeyed? Sheets from prompts, judged by a classifier of our own that has seen renders only.

The prompts are all pairs of the protocol's colours and nouns. **Colour**: the first of ``captions.colour_words`` of the
generated pixels is a shade of the prompt's colour. **Category**: the four silhouettes, a few pixels each, are compared
with those of training objects whose names end in one of the nouns; a noun is as far as its nearest few objects on
average, under the quarter turn that fits best, because training objects face any side. Top 1 and top 5 count where the
prompt's noun stands among all nouns, as a mean over nouns.

Chance and ceiling stand beside both. Chance of a colour: what the same answers score against prompts dealt at random.
Ceiling of a colour: how often the fixed light leaves a true sheet the colour word of the unlit object. Ceiling of a
category: true sheets of the same objects, each judged without its own shape.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from trainer.captions import colour_words, words_of
from trainer.views_truth import Protocol, true_views, unlit_views
from triptych.errors import TriptychError
from triptych.geometry.cameras import VIEW_NAMES
from triptych.geometry.files import read_mesh
from triptych.render.sheets import contact_sheet

if TYPE_CHECKING:
    from triptych.flux.backend import FluxViews

Panels = dict[str, np.ndarray]
Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Known:
    """Training objects of the nouns: silhouettes (N, 4, K, K) float32, nouns and shape groups (N,), and the colour
    family of each, unlit and lit."""

    silhouettes: np.ndarray
    nouns: np.ndarray
    shapes: np.ndarray
    colours: np.ndarray
    lit_colours: np.ndarray


def evaluate_prompts(
    model: FluxViews, protocol: Protocol, data: Path, *, out: Path | None = None, report: Report = print
) -> dict[str, Any]:
    """The protocol's grid of prompts: rates with chance and ceiling, and one row a prompt.

    out: a folder for contact sheets, one a noun, a row a colour, and for what is known of the training objects.
    """
    from trainer.views_evaluation import sheet_panels

    asked = protocol.prompts
    nouns, colours = tuple(asked["nouns"]), tuple(asked["colours"])
    known = known_objects(protocol, data, out)
    rows: list[dict[str, Any]] = []
    for noun in nouns:
        pictures = []
        for colour in colours:
            text = asked["template"].format(colour=colour, noun=noun)
            for seed in asked["seeds"]:
                panels = sheet_panels(model, text, [], (), protocol, seed)
                rows.append({"prompt": text, "seed": seed, **judged(panels, colour, noun, known, protocol)})
                pictures.append(torch.from_numpy(np.stack([panels[name] for name in VIEW_NAMES])).permute(0, 3, 1, 2))
        report(f"{noun}: {_sentence([row for row in rows if row['noun'] == noun])}")
        if out is not None:
            per_line = max(1, 8 // len(pictures[0]))
            lines = [torch.cat(pictures[i : i + per_line]) for i in range(0, len(pictures), per_line)]
            contact_sheet(lines, out / f"prompts_{noun}.png", background=(1.0, 1.0, 1.0))
    return rates(rows, known, protocol) | {"rows": rows}


def judged(panels: Panels, colour: str, noun: str, known: Known, protocol: Protocol) -> dict[str, Any]:
    """What a sheet for "colour noun" shows: its colour family ("" when it is empty), and the place of the noun."""
    found = colour_family(np.stack([panels[name] for name in VIEW_NAMES]))
    features = silhouettes_of(np.stack([panels[name] for name in VIEW_NAMES]), protocol.prompts["feature_px"])
    order = ranked_nouns(features[None], known, protocol)[0] if found else []
    place = order.index(noun) if noun in order else len(known.nouns)
    return {"colour": colour, "noun": noun, "found_colour": found, "nearest_noun": (order or [""])[0], "place": place}


def rates(rows: Sequence[dict[str, Any]], known: Known, protocol: Protocol) -> dict[str, Any]:
    """Agreement, chance and ceiling of colours and categories."""
    wanted, found = np.array([r["colour"] for r in rows]), np.array([r["found_colour"] for r in rows])
    nouns = sorted(set(known.nouns.tolist()))
    places = {noun: np.array([r["place"] for r in rows if r["noun"] == noun]) for noun in nouns}
    ceiling = _leave_one_out(known, protocol)
    used = np.isin(known.colours, protocol.prompts["colours"])
    chance = float(np.mean([(wanted == answer).mean() for answer in found]))
    colour = {"agreement": float((wanted == found).mean()), "chance": chance}
    if used.any():
        colour["ceiling"] = float((known.colours == known.lit_colours)[used].mean())
    category: dict[str, float] = {"ceiling_objects": len(known.nouns)}
    for top in (1, 5):
        category[f"top{top}"] = float(np.mean([(place < top).mean() for place in places.values() if len(place)]))
        category[f"chance{top}"] = min(1.0, top / len(nouns))
        category[f"ceiling{top}"] = float(np.mean([(ceiling[noun] < top).mean() for noun in nouns]))
    return {"sheets": len(rows), "colour": colour, "category": category}


def colour_family(rgba: np.ndarray) -> str:
    """The plain name of the dominant colour of views (..., S, S, 4) float 0-1, such as "red" of "dark red"; "" when
    nothing is visible."""
    words = colour_words((rgba.clip(0, 1) * 255 + 0.5).astype(np.uint8))
    return words[0].split()[-1] if words else ""


def silhouettes_of(rgba: np.ndarray, size: int) -> np.ndarray:
    """(4, S, S, 4) -> (4, size, size) float32 mean alpha."""
    alpha = torch.from_numpy(np.ascontiguousarray(rgba[None, ..., 3])).float()
    return F.interpolate(alpha, size=(size, size), mode="area")[0].numpy()


def ranked_nouns(
    features: np.ndarray, known: Known, protocol: Protocol, without: np.ndarray | None = None
) -> list[list[str]]:
    """For each of (M, 4, K, K) silhouettes, the nouns from near to far. without: (M, N) bool, objects to pass over."""
    distance = _distances(features, known.silhouettes)
    if without is not None:
        distance = np.where(without, np.inf, distance)
    names = sorted(set(known.nouns.tolist()))
    neighbours = protocol.prompts["neighbours"]
    columns = []
    for name in names:
        nearest = np.sort(distance[:, known.nouns == name], axis=1)[:, :neighbours]
        columns.append(np.where(np.isfinite(nearest), nearest, 1e9).mean(axis=1))
    order = np.argsort(np.stack(columns, axis=1), axis=1, kind="stable")
    return [[names[i] for i in row] for row in order]


def _distances(features: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(M, N) squared distances under the best of four quarter turns, which move the views round."""
    reference = known.reshape(len(known), -1)
    lengths = np.square(reference).sum(axis=1)
    turns = []
    for turn in range(4):
        query = np.roll(features, turn, axis=1).reshape(len(features), -1)
        turns.append(np.square(query).sum(axis=1)[:, None] + lengths[None] - 2 * query @ reference.T)
    return np.min(turns, axis=0)


def _leave_one_out(known: Known, protocol: Protocol) -> dict[str, np.ndarray]:
    """The place of its own noun for every known object, by noun."""
    same = known.shapes[:, None] == known.shapes[None]
    orders = ranked_nouns(known.silhouettes, known, protocol, without=same)
    places = np.array([order.index(noun) for order, noun in zip(orders, known.nouns.tolist(), strict=True)])
    return {noun: places[known.nouns == noun] for noun in sorted(set(known.nouns.tolist()))}


def known_objects(protocol: Protocol, data: Path, folder: Path | None = None) -> Known:
    """The classifier's training objects, rendered, or read from ``folder`` where an earlier run left them."""
    chosen = _chosen_objects(protocol, data)
    stamp = repr((sorted(protocol.prompts.items()), protocol.truth_light, [row["id"] for row in chosen]))
    key = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    kept = None if folder is None else folder / f"nouns_{key}.npz"
    if kept is not None and kept.is_file():
        with np.load(kept, allow_pickle=False) as arrays:
            return Known(**{name: arrays[name] for name in arrays.files})
    silhouettes, colours, lit_colours = [], [], []
    for row in chosen:
        mesh = read_mesh(Path(data) / row["file"]).normalized()
        lit, unlit = true_views(mesh, 64, 1), unlit_views(mesh, 64, 1)
        silhouettes.append(silhouettes_of(lit, protocol.prompts["feature_px"]))
        colours.append(colour_family(unlit))
        lit_colours.append(colour_family(lit))
    shapes = [row["shape_group"] for row in chosen]
    nouns = [row["noun"] for row in chosen]
    known = Known(np.stack(silhouettes), *(np.array(part) for part in (nouns, shapes, colours, lit_colours)))
    if kept is not None:
        with kept.open("wb") as stream:
            np.savez(stream, **vars(known))
    return known


def _chosen_objects(protocol: Protocol, data: Path) -> list[dict[str, str]]:
    """At most ``objects_per_noun`` training objects of each noun, of different shapes, in an order by hash."""
    nouns, most = tuple(protocol.prompts["nouns"]), int(protocol.prompts["objects_per_noun"])
    found: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    try:
        with (Path(data) / "index.csv").open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                noun = (words_of(row["name"]).split() or [""])[-1]
                if row["split"] == "train" and noun in nouns:
                    found[noun].setdefault(row["shape_group"], {**row, "noun": noun})
    except OSError as error:
        raise TriptychError(
            f"{data}/index.csv cannot be read: name the folder of the object data with --data"
        ) from error
    if missing := [noun for noun in nouns if noun not in found]:
        raise TriptychError(f"{data} has no training object called {missing[0]}: get the data of the protocol")
    return [
        found[noun][shape]
        for noun in nouns
        for shape in sorted(found[noun], key=lambda shape: hashlib.sha256(shape.encode()).hexdigest())[:most]
    ]


def _sentence(rows: Sequence[dict[str, Any]]) -> str:
    right = sum(row["colour"] == row["found_colour"] for row in rows)
    first, fifth = (sum(row["place"] < top for row in rows) for top in (1, 5))
    return f"colour {right} of {len(rows)}, category {first} at the first place and {fifth} among five"
