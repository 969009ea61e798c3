"""Captions of prepared objects: words from their names, colours from their pixels, several ways to put them.

Asset names are no prose: "CommonTree_Dead_3", "kitchenCabinetDrawer 1", "chr_bro", "tree_pine_orange_small". They lose
numbers, variants and the words of their packs, states and materials move to the front, and colours are dropped: an
augmented object has other colours than its name says, so that colour words always come from pixels.

Not covered: grammar beyond articles and obvious plurals, and names whose category was guessed wrong when the data were
gathered ("computer_mouse" is an animal there). ``describe`` keeps what a caption said beside its text, so that the text
encoder can be trained to say it back.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# Names of colours, each with typical sRGB bytes. A pixel takes the name of the nearest of them in CIE Lab.
_COLOURS: dict[str, str] = {
    "white": "ffffff f6f6f6 f5f3ee f0f4f8",
    "light grey": "d8d8d8 c0c0c0 c4c8cc ccc8c4",
    "grey": "a0a0a0 888888 747474 8a8f96 908b86 70767e",
    "dark grey": "585858 464646 50555c 565049 3c4046",
    "black": "000000 141414 262626 1a1c22 221c1a",
    "red": "ff0000 e01818 c81e1e e83c3c d83048 b81414 f04848",
    "dark red": "8b0000 700a0a 8a1c24 641018 4c0808",
    "orange": "ffb84c ff8c00 ff7010 f08030 e06c18 ffa030 ff5c20",
    "yellow": "ffff00 ffe020 f8d838 fff070 f0e040 ffd000",
    "gold": "d4a820 c89c30 b89020 dcb040",
    "beige": "f0e0c0 e0cca8 d8c09c f5e6c8 dcc094 e8d0a8 ddc8b4",
    "light brown": "d2a56e c8965a d8ac78 cca070 c49a6c dca878 bc9060",
    "brown": "8b5a2b a0642c 96603c b07840 784820 a07048 8c6446 a47850 7c5c40",
    "dark brown": "50301a 402414 5c3820 4a3628 341e10",
    "light green": "d8f4c8 d0f0d0 c8ecc8 90ee90 a0e070 b8e890 98d898 b0f0b0 c0e840 a8d040",
    "green": "00c000 20a030 40b040 60c040 50a050 00ff00 3c9040 70b030 80a848 589048",
    "dark green": "006400 104818 205028 2c5c30 38502c 505c28 183020",
    "teal": "008080 109090 208078 309890 105c5c 2c6c70",
    "cyan": "00ffff 20e0e0 40d0d0 60d8d0 80f0f0 a0e8e8",
    "light blue": "a0d0f8 80c0f0 b0d8f0 90b8e8 b0c4e8 60b0f0",
    "blue": "0000ff 1040e0 2060d0 3070e0 2080f0 4068c0 0090e8 4080c0 5088b8 3c50b0",
    "dark blue": "0c2038 0e2840 000080 102060 182c70 20306c 101848 203858 2c4468",
    "purple": "800080 7020a0 8a40c0 6030a0 9050b8 a030d0 58287c 705098 481858 6000c0",
    "light purple": "c8a0e8 b898e0 d0b0f0 b0a0d8 c090e0",
    "pink": "ffb0c0 ff80b0 f060a0 ff50a0 e890b0 f0c0d0 e84890 f8a0a8",
    "magenta": "ff00ff e020d0 d010a0 f040e0 b81890 c000c0",
}
COLOUR_NAMES = tuple(_COLOURS)
_SECOND_SHARE = 0.15  # of the visible pixels, for a second word
_SECOND_NEUTRAL_SHARE = 0.22  # of a white, grey or black one, which strikes the eye less


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a category is called, first the plain name that the text encoder learns to say.
CATEGORY_WORDS: dict[str, tuple[str, ...]] = {
    "animal": ("animal", "creature"),
    "building": ("building", "structure"),
    "character": ("character", "figure"),
    "clothing": ("clothing", "wearable"),
    "container": ("container",),
    "electronics": ("electronics", "device"),
    "food": ("food", "something to eat"),
    "furniture": ("furniture", "piece of furniture"),
    "kitchen_tableware": ("tableware", "kitchen item"),
    "music": ("instrument", "musical instrument"),
    "other": ("object", "thing"),
    "plant_nature": ("plant", "nature"),
    "sculpture": ("sculpture", "statue"),
    "sign_prop": ("prop", "decoration"),
    "tool": ("tool",),
    "toy_sport": ("toy", "game piece"),
    "vehicle": ("vehicle",),
    "weapon": ("weapon",),
}
# A look by the pack that an object comes from: the first part of its key.
_STYLES = {
    **dict.fromkeys(_words("quaternius quaternius_fbx kaykit kenney pmndrs"), ("low-poly", "stylised", "cartoon")),
    "mmmm": ("voxel", "blocky"),
    **dict.fromkeys(_words("gso_vima threedscans"), ("scanned", "realistic")),
}

_COMPOUNDS = {
    "ac": "air conditioner", "airconditioner": "air conditioner", "alarmclock": "alarm clock", "ar": "assault rifle",
    "archeryrange": "archery range", "basemodule": "base module", "boxingring": "boxing ring", "busstop": "bus stop",
    "cargodepot": "cargo depot", "celltower": "cell tower", "coffeemug": "coffee mug", "cubelarge": "large cube",
    "cubemedium": "cube", "cuttingboard": "cutting board", "cylinderlarge": "large cylinder",
    "cylindermedium": "cylinder", "dishrack": "dish rack", "dogstand": "hot dog stand", "dogue": "dog",
    "engi": "engineer", "expresso": "espresso", "extractorhood": "extractor hood", "fatkid": "kid",
    "firehydrant": "fire hydrant", "firstaid": "first aid", "firstaidkit": "first aid kit", "fryingpan": "frying pan",
    "gamecontroller": "game controller", "guitarcase": "guitar case", "horologe": "clock", "hotdog": "hot dog",
    "icecream": "ice cream", "innercorner": "corner", "jackolantern": "jack o lantern",
    "kitchencabinet": "kitchen cabinet", "kitchencounter": "kitchen counter", "kitchentable": "kitchen table",
    "landingpad": "landing pad", "lillypad": "lily pad", "lilypad": "lily pad", "lollypop": "lollipop",
    "moss": "mossy", "musterd": "mustard", "newsbox": "news box", "outercorner": "corner",
    "papertowel": "paper towel", "pictureframe": "picture frame", "piggybank": "piggy bank", "playgrnd": "playground",
    "playstation": "game console", "pyramidlarge": "large pyramid", "riotcop": "riot cop",
    "rollofpaper": "roll of paper", "roofmodule": "roof module", "sidehouse": "house", "simpletower": "tower",
    "skirted": "skirting", "smg": "submachine gun", "smokebomb": "smoke bomb", "sniper": "sniper rifle",
    "snow": "snowy", "solarpanel": "solar panel", "solarpanels": "solar panels", "spacetruck": "space truck",
    "spherelarge": "large sphere", "stationwagon": "station wagon", "stlight": "street light", "super": "superhero",
    "toruslarge": "large torus", "towelrail": "towel rail", "trafficlight": "traffic light", "trashcan": "trash can",
    "trex": "tyrannosaurus", "trlight": "traffic light", "tv": "television", "vegetableburger": "vegetable burger",
    "waterbottle": "water bottle", "waterplant": "water plant", "watertower": "water tower",
    "weaponrack": "weapon rack", "windturbine": "wind turbine", "wineglass": "wine glass", "woodfire": "wood fire",
}  # fmt: skip
_COLOUR_TOKENS = _words(
    "white black grey gray silver red orange yellow gold golden green teal cyan blue purple pink brown beige"
)
# Words of packs, variants, file kinds and people's names, which say nothing that can be seen.
_DROPPED = _words(
    "a an mm the and or aws retail residential obj chr mob veh mat props prop drc practice first low poly lvl level "
    "transformed animated anim alternative default collectible pickup resource common basic dummy ui icon asus xtion "
    "intel realsense orbbec hokuyo scanse sweep velodyne hdl razer nintendo pepsi max next wild caffeine free depot "
    "ariac kit prototype dsim robocup salon test task dropping lab at dx ds color colored mesh model fbx glb age leve "
    "way bridget bro brookie mike beardo naked fernando finn rae leela barbara thea les paul fi sci variant smooth "
    "cluttering weathertop salloon story left right straight mid group batch mini nes coronavirus dim normal formal "
    "bob zenith imperial omen executioner dispatcher challenger handed warehouse panda"
)
_FRONT = _words(
    "small large big medium tiny tall short long wide narrow thin thick round rounded square circular flat curved "
    "open closed broken damaged destroyed cracked empty full filled half dead snowy mossy decorated stacked folded "
    "folding hanging mounted floating single double triple old rustic antique vintage modern fancy simple dirty clean "
    "cooked raw chopped sliced harvested packed burnt potted lit evil angry spiky striped cushioned rusty luxury "
    "infected"
)
_MATERIALS = {
    **{"wood": "wooden", "wooden": "wooden", "metal": "metal", "metallic": "metal", "iron": "iron", "steel": "steel"},
    **{"stone": "stone", "leather": "leather", "plastic": "plastic", "concrete": "concrete", "cardboard": "cardboard"},
    **{"porcelain": "porcelain", "ceramic": "ceramic", "bronze": "bronze", "brick": "brick", "marble": "marble"},
}
_MOVED_MATERIALS = _words("wood wooden metal metallic leather plastic")
_NOUN_FIRST = _words("tree stock grip barrel magazine body")  # "Stock_Pistol_3", "tree_pine"
_WHOLE_NAMES = {"veh_fire": "fire truck"}
_SINGULAR_S = ("ss", "us", "is", "as")
_VOWELS = tuple("aeiou")


def words_of(name: str) -> str:
    """A clean English phrase from an asset's name, lower case, without colours; "" when nothing is left.

    "kitchenCabinetDrawer 1" -> "kitchen cabinet drawer", "CommonTree_Dead_3" -> "dead tree", "chr_bro" -> "".
    """
    if name in _WHOLE_NAMES:
        return _WHOLE_NAMES[name]
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    text = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", text)
    tokens = [part for token in re.findall(r"[a-z]+", text.lower()) for part in _COMPOUNDS.get(token, token).split()]
    kept = [token for token in tokens if len(token) > 1 and token not in _DROPPED]
    plain = [token for token in kept if token not in _COLOUR_TOKENS]
    if "orange" in kept and not set(plain) - _FRONT:
        plain.append("orange")  # the fruit: no other noun is left
    words = [word for i, word in enumerate(plain) if word not in plain[:i]]
    while words and words[-1] in ("with", "without", "of", "in", "on", "no", "up", "off"):
        words.pop()
    return " ".join(_in_order(words))


def _in_order(words: list[str]) -> list[str]:
    """States first, then materials, then the rest; states alone are no phrase, a material alone is a thing."""
    if len(words) > 1 and words[0] in _NOUN_FIRST:
        words = words[1:] + words[:1]
    last = len(words) - 1
    front: list[str] = []
    material: list[str] = []
    nouns: list[str] = []
    for i, word in enumerate(words):
        if word in _FRONT:
            front.append(word)
        elif word in _MATERIALS and (i < last or word in _MOVED_MATERIALS):
            material.append(_MATERIALS[word])
        else:
            nouns.append(word)
    if nouns:
        return front + material + nouns
    return [*front, words[-1]] if material else []


_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def srgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) sRGB 0-1 -> CIE L*a*b* (D65, 2 degrees), float64 (CIE 15:2004)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@lru_cache(maxsize=1)
def _colour_table() -> np.ndarray:
    """(32, 32, 32) uint8: the number of the name of each 5-bit sRGB colour."""
    codes = [(number, code) for number, name in enumerate(_COLOURS) for code in _COLOURS[name].split()]
    owners = np.array([number for number, _ in codes], dtype=np.uint8)
    known = srgb_to_lab(np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for _, code in codes]) / 255)
    level = np.arange(32) / 31
    grid = srgb_to_lab(np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1)).reshape(-1, 1, 3)
    nearest = [((part - known) ** 2).sum(axis=-1).argmin(axis=1) for part in np.array_split(grid, 32)]
    return owners[np.concatenate(nearest)].reshape(32, 32, 32)


def colour_shares(albedo: np.ndarray) -> list[tuple[str, float]]:
    """Names of the visible colours with their shares of the visible pixels, largest first; [] if none is visible.

    albedo (..., S, S, 4) uint8, straight alpha, alpha from 128 on is visible. Names are COLOUR_NAMES; large pictures
    are read at a quarter of their pixels or fewer.
    """
    step = max(1, albedo.shape[-2] // 48)
    pixels = albedo[..., step // 2 :: step, step // 2 :: step, :].reshape(-1, 4)
    if not (pixels[:, 3] >= 128).any():
        pixels = albedo.reshape(-1, 4)
    rgb = (pixels[pixels[:, 3] >= 128, :3].astype(np.int64) * 31 + 127) // 255
    if not len(rgb):
        return []
    counts = np.bincount(_colour_table()[rgb[:, 0], rgb[:, 1], rgb[:, 2]], minlength=len(COLOUR_NAMES))
    order = np.argsort(-counts, kind="stable")
    return [(COLOUR_NAMES[i], float(counts[i] / len(rgb))) for i in order if counts[i]]


def colour_words(albedo: np.ndarray) -> list[str]:
    """One or two names of the dominant colours of the visible pixels, see colour_shares; [] if none is visible.

    Shades of one colour ("blue", "dark blue") count together under the most frequent of them; a second word needs a
    colour of its own and a share of 15 % (white, grey, black: 22 %).
    """
    total: dict[str, float] = {}
    names: dict[str, str] = {}
    for name, share in colour_shares(albedo):
        family = name.split()[-1]
        total[family] = total.get(family, 0.0) + share
        names.setdefault(family, name)
    order = sorted(total, key=lambda family: -total[family])
    rest = [family for family in order[1:] if total[family] >= _second_share(family)]
    return [names[family] for family in order[:1] + rest[:1]]


def _second_share(family: str) -> float:
    return _SECOND_NEUTRAL_SHARE if family in ("white", "grey", "black") else _SECOND_SHARE


def random_colours(generator: np.random.Generator) -> list[str]:
    """One or two different names, as an augmented object might have."""
    count = 1 + int(generator.random() < 0.45)
    return [COLOUR_NAMES[i] for i in generator.choice(len(COLOUR_NAMES), size=count, replace=False)]


def random_adjective(generator: np.random.Generator) -> str:
    """A material or a state, as an object of that name might have."""
    words = sorted(set(_MATERIALS.values())) if generator.random() < 0.6 else sorted(_FRONT)
    return words[int(generator.integers(len(words)))]


@dataclass(frozen=True)
class Description:
    """A caption and what it says. words: the object's own, "" if it names but the category; colours: those it names."""

    text: str
    category: str
    words: str
    colours: tuple[str, ...]


def category_words(category: str) -> tuple[str, ...]:
    """What a category of the data is called; an unknown one (of generated shapes) by its own name."""
    return CATEGORY_WORDS.get(category) or (words_of(category) or "object",)


def describe(record: Mapping[str, Any], colours: Sequence[str], generator: np.random.Generator) -> Description:
    """A caption of a record of the prepared data (key, name, category, sides) and what it says.

    ``colours``: of colour_words, the dominant first. The phrasing, what is left out and the synonyms are drawn from
    ``generator``; about one caption in nine names no colour and one in nine the category instead of the object.
    """
    draw = generator.random
    names = category_words(str(record["category"]))
    words = words_of(str(record["name"]))
    if words and draw() < 0.3:
        words = " ".join(_without_sizes(words.split())) or words
    own = words if draw() < 0.89 else ""
    noun = own or names[int(generator.integers(len(names)))]
    said = tuple(colours) if draw() < 0.7 else tuple(colours[:1])
    said = said if draw() < 0.89 else ()
    style = _pick(_STYLES.get(re.split(r"__|/", str(record.get("key", "")))[0], ()), 0.15, generator)
    shape = _pick(_shape_words(record), 0.3, generator)
    shape = "" if shape in noun.split() else shape
    colour = " and ".join(said)
    way = draw()
    if colour and way < 0.12:
        text = f"{_with_article(_phrase(noun, style, shape, ''))} that is {colour}"
    elif colour and way < 0.22:
        text = f"{_phrase(noun, style, shape, '')}, {', '.join(said)}"
    elif way < 0.42:
        text = _phrase(noun, style, shape, colour)
    elif way < 0.48:
        text = f"3d model of {_with_article(_phrase(noun, style, shape, colour))}"
    else:
        text = _with_article(_phrase(noun, style, shape, colour))
    if own and draw() < 0.15:
        text += f", {names[int(generator.integers(len(names)))]}"
    return Description(text, names[0], own, said)


def caption(record: Mapping[str, Any], colours: Sequence[str], generator: np.random.Generator) -> str:
    """One caption of many, see describe: "a red chair", "small wooden table, furniture", "a tree that is green"."""
    return describe(record, colours, generator).text


def vocabulary(records: Iterable[Mapping[str, Any]], least: int = 3, rounds: int = 12, seed: int = 0) -> list[str]:
    """The words that the captions of at least ``least`` of the records use, sorted; all colour words are among them.

    ``rounds`` captions of each record are drawn with random colours, deterministic under ``seed``.
    """
    counts: Counter[str] = Counter()
    for number, record in enumerate(records):
        generator = np.random.default_rng((seed, number))
        found: set[str] = set()
        for _ in range(rounds):
            found |= set(caption_words(caption(record, random_colours(generator), generator)))
        counts.update(found)
    kept = {word for word, count in counts.items() if count >= least}
    return sorted(kept | {word for name in COLOUR_NAMES for word in name.split()})


def caption_words(text: str) -> list[str]:
    """The lower-case words of a text as the vocabulary counts them: letters, digits and inner hyphens."""
    return re.findall(r"[^\W_]+(?:-[^\W_]+)*", text.lower())


def _without_sizes(words: list[str]) -> list[str]:
    return [word for word in words if word not in ("small", "large", "big", "medium", "tiny")]


def _pick(options: Sequence[str], chance: float, generator: np.random.Generator) -> str:
    drawn, number = generator.random(), generator.random()
    return options[int(number * len(options))] if options and drawn < chance else ""


def _shape_words(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What its measures along (x, up, z) say under every turn about the vertical axis."""
    sides = record.get("sides")
    if not sides:
        return ()
    x, up, z = (max(float(side), 1e-3) for side in sides)
    wide, deep = max(x, z), min(x, z)
    if up > 2.2 * wide:
        return ("tall", "slender") if up > 4 * wide else ("tall",)
    if up < 0.2 * deep:
        return ("flat",)
    return ("long",) if wide > 2.5 * max(up, deep) else ()


def _phrase(noun: str, style: str, shape: str, colour: str) -> str:
    """The noun with its adjectives in English order: look, size and state, shape, colour, material."""
    words = noun.split()
    states = next((i for i, word in enumerate(words) if word not in _FRONT), 0)
    return " ".join(filter(None, [style, *words[:states], shape, colour, *words[states:]]))


def _with_article(phrase: str) -> str:
    head = re.split(r" (?:with|without|of|in|on|to) ", phrase)[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(_SINGULAR_S)
    if plural or head in ("clothing", "food", "furniture", "tableware", "nature", "something"):
        return phrase
    return f"{'an' if phrase.startswith(_VOWELS) else 'a'} {phrase}"
