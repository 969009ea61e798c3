"""Captions: clean words from asset names, the right colour names from pixels, phrasings that say what they should."""

import itertools
import time

import numpy as np
import pytest
import torch

from trainer.captions import (
    CATEGORY_WORDS,
    COLOUR_NAMES,
    caption,
    caption_words,
    colour_shares,
    colour_words,
    describe,
    random_colours,
    srgb_to_lab,
    vocabulary,
    words_of,
)
from trainer.data import draw_recolouring


def _record(name: str, category: str = "furniture", key: str = "", **more):
    return {"name": name, "category": category, "key": key or f"basemesh__{name}", **more}


def _picture(*parts: tuple[tuple[int, int, int], int], size: int = 64) -> np.ndarray:
    """(4, size, size, 4): each colour fills its number of the 16 columns of blocks, the rest is invisible green."""
    albedo = np.zeros((4, size, size, 4), dtype=np.uint8)
    albedo[..., :3] = (0, 255, 0)
    start, unit = 0, size // 16
    for colour, columns in parts:
        stop = start + columns * unit
        albedo[:, :, start:stop] = (*colour, 255)
        start = stop
    return albedo


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mug-1", "mug"),
        ("CommonTree_Dead_3", "dead tree"),
        ("BirchTree_Dead_Snow_2", "dead snowy birch tree"),
        ("outdoor_folding_chair", "folding outdoor chair"),
        ("chr_bro", ""),
        ("chr_army3", "army"),
        ("obj_house8a", "house"),
        ("Military Airplane", "military airplane"),
        ("2Story_Wide_Mat", ""),
        ("kitchenCabinetDrawer 1", "kitchen cabinet drawer"),
        ("residential_CoffeeTable_01", "coffee table"),
        ("retail_BookE_01", "book"),
        ("warehouse_TrashCanC_01", "trash can"),
        ("WatchTowerWRoof", "watch tower roof"),
        ("tree_pine_orange_small", "small pine tree"),
        ("red_and_white_striped_towel", "striped towel"),
        ("black_shoe_with_green_stripes", "shoe with stripes"),
        ("Orange_2", "orange"),
        ("Orange_Harvested", "harvested orange"),
        ("Armor_Metal", "metal armor"),
        ("rustic_wood_hand_basket", "rustic wooden hand basket"),
        ("cocktail_glass", "cocktail glass"),
        ("Resource_Rock_1", "rock"),
        ("Barrel_Pistol_1", "pistol barrel"),
        ("Planet_1-transformed", "planet"),
        ("veh_fire", "fire truck"),
        ("veh_car4", "car"),
        ("6.35mm_audio_jack", "audio jack"),
        ("0_001229", ""),
        ("Flat2", ""),
        ("wood_02", "wood"),
        ("", ""),
        ("\u6905\u5b50", ""),
    ],
)
def test_words_of_asset_names(name, words):
    assert words_of(name) == words


def test_lab_of_known_colours():
    rgb = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [128 / 255] * 3], dtype=float)
    published = [
        [100, 0, 0],
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [0, 0, 0],
        [53.59, 0, 0],
    ]
    np.testing.assert_allclose(srgb_to_lab(rgb), published, atol=0.02)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 255, 255), "white"), ((200, 200, 200), "light grey"), ((128, 128, 128), "grey"),
        ((70, 70, 70), "dark grey"), ((8, 8, 8), "black"), ((220, 20, 30), "red"), ((110, 10, 16), "dark red"),
        ((255, 130, 20), "orange"), ((250, 225, 40), "yellow"), ((205, 160, 40), "gold"), ((236, 220, 184), "beige"),
        ((140, 92, 46), "brown"), ((206, 160, 104), "light brown"), ((72, 42, 22), "dark brown"),
        ((30, 160, 50), "green"), ((20, 80, 30), "dark green"), ((160, 230, 150), "light green"),
        ((16, 130, 130), "teal"), ((40, 225, 225), "cyan"), ((30, 80, 220), "blue"), ((24, 40, 100), "dark blue"),
        ((150, 200, 240), "light blue"), ((120, 40, 170), "purple"), ((200, 165, 230), "light purple"),
        ((250, 130, 175), "pink"), ((235, 20, 230), "magenta"),
    ],
)  # fmt: skip
def test_one_colour_has_its_name(rgb, name):
    assert colour_words(_picture((rgb, 5))) == [name]
    assert colour_shares(_picture((rgb, 5))) == [(name, 1.0)]


def test_every_name_has_a_test_above_and_every_name_can_be_drawn():
    (mark,) = [m for m in test_one_colour_has_its_name.pytestmark if m.name == "parametrize"]
    assert sorted(name for _, name in mark.args[1]) == sorted(COLOUR_NAMES)
    generator = np.random.default_rng(0)
    drawn = [random_colours(generator) for _ in range(600)]
    assert {name for names in drawn for name in names} == set(COLOUR_NAMES)
    assert {len(names) for names in drawn} == {1, 2} and all(len(set(names)) == len(names) for names in drawn)


def test_shares_order_words_and_small_shares_are_left_out():
    red, blue, navy, grey = (220, 20, 30), (30, 80, 220), (24, 40, 100), (128, 128, 128)
    assert colour_words(_picture((red, 6), (blue, 4))) == ["red", "blue"]
    assert colour_words(_picture((red, 4), (blue, 6))) == ["blue", "red"]
    assert colour_words(_picture((red, 9), (blue, 1))) == ["red"]
    assert colour_words(_picture((red, 8), (blue, 2))) == ["red", "blue"]
    assert colour_words(_picture((red, 8), (grey, 2))) == ["red"], "a grey fifth does not strike the eye"
    assert colour_words(_picture((red, 4), (blue, 3), (navy, 3))) == ["blue", "red"], "blues count together"
    shares = dict(colour_shares(_picture((red, 4), (blue, 3), (navy, 3))))
    assert shares == pytest.approx({"red": 0.4, "blue": 0.3, "dark blue": 0.3})


def test_invisible_pixels_count_nothing_and_small_things_are_seen():
    assert colour_words(_picture()) == [] and colour_shares(_picture()) == []
    speck = np.zeros((4, 128, 128, 4), dtype=np.uint8)
    speck[0, 3, 3] = (220, 20, 30, 255)
    assert colour_words(speck) == ["red"]
    faint = _picture(((30, 80, 220), 5))
    faint[:, :, :4, 3] = 100
    faint[:, :, :4, :3] = (220, 20, 30)
    assert colour_words(faint) == ["blue"]


@pytest.mark.parametrize(
    ("flat", "name"),
    [((0.8, 0.05, 0.1), "red"), ((0.1, 0.2, 0.8), "blue"), ((0.1, 0.6, 0.2), "green"), ((0.9, 0.85, 0.1), "yellow")],
)
def test_recoloured_pixels_give_their_own_colours(flat, name):
    albedo = _picture(((120, 120, 120), 6), ((140, 140, 140), 4))
    rgb = torch.from_numpy(albedo[..., :3].copy()).float() / 255
    recolouring = draw_recolouring(np.random.default_rng(0))
    recolouring = type(recolouring)(torch.eye(3) * 0.1, torch.tensor(flat) - 0.05)
    albedo[..., :3] = (recolouring(rgb, dim=3).numpy() * 255).round()
    assert colour_words(albedo) == [name]


def test_colour_words_are_quick_and_the_same_every_time():
    noise = np.random.default_rng(3).integers(0, 256, (4, 128, 128, 4)).astype(np.uint8)
    first = colour_words(noise)
    took = []
    for _ in range(20):
        began = time.perf_counter()
        assert colour_words(noise) == first
        took.append(time.perf_counter() - began)
    assert sorted(took)[5] < 5e-3


def _captions(record, colours, count=400):
    return [describe(record, colours, np.random.default_rng(seed)) for seed in range(count)]


def test_phrasings_of_a_chair():
    found = _captions(_record("Chair_3", key="quaternius__Chair_3"), ["red", "brown"])
    texts = {item.text for item in found}
    wanted = {"a red chair", "chair", "a chair", "red chair", "a red and brown chair", "a low-poly red chair"}
    wanted |= {
        "a chair that is red and brown",
        "chair, red, brown",
        "a red chair, furniture",
        "3d model of a red chair",
    }
    assert wanted <= texts
    assert any("piece of furniture" in text for text in texts)
    assert not any("  " in text or text != text.strip() or text != text.lower() for text in texts)


@pytest.mark.parametrize("colours", [["red"], ["light blue", "dark green"], []])
@pytest.mark.parametrize("name", ["Chair_3", "0_0012", "tree_pine_orange_small"])
def test_a_caption_says_what_its_description_says(name, colours):
    record = _record(name, "plant_nature", sides=[0.2, 1.0, 0.2])
    for item in _captions(record, colours):
        said = set(caption_words(item.text))
        for colour in colours:
            assert (colour in item.colours) == (set(colour.split()) <= said)
        assert list(item.colours) == colours[: len(item.colours)]
        assert item.category == "plant"
        assert set(item.words.split()) <= said
        assert not item.words or item.words.split()[-1] == words_of(name).split()[-1]
        assert item.words or any(set(word.split()) <= said for word in CATEGORY_WORDS["plant_nature"])


def test_adjectives_stand_in_english_order_and_articles_fit():
    texts = {item.text for item in _captions(_record("wooden_small_bench"), ["orange"])}
    assert "a small orange wooden bench" in texts
    assert not any("orange small" in text or "wooden orange" in text for text in texts)
    texts = {item.text for item in _captions(_record("wooden_bench"), ["orange"])}
    assert "an orange wooden bench" in texts
    assert "rocks" in {item.text for item in _captions(_record("rocksSmall"), [])}
    for name, article in (
        ("rocks", ""),
        ("glass", "a "),
        ("cactus", "a "),
        ("compass", "a "),
        ("stack_of_blocks", "a "),
    ):
        texts = {item.text for item in _captions(_record(name), [])}
        phrase = name.replace("_", " ")
        assert (f"a {phrase}" in texts) == bool(article) and article + phrase in texts


def test_shape_words_follow_the_measures_and_styles_the_pack():
    shapes = {"tall": [0.3, 1.0, 0.3], "flat": [1.0, 0.05, 0.9], "long": [1.0, 0.2, 0.2]}
    for word, sides in shapes.items():
        found = {w for item in _captions(_record("lamp", sides=sides), ["red"]) for w in caption_words(item.text)}
        assert found & set(shapes) == {word}
    for key, word in (("mmmm__lamp", "voxel"), ("threedscans__lamp", "scanned"), ("kaykit__lamp", "low-poly")):
        found = {w for item in _captions(_record("lamp", key=key), ["red"]) for w in caption_words(item.text)}
        assert found & {"voxel", "scanned", "low-poly"} == {word}


def test_unknown_categories_speak_for_themselves():
    item = describe(_record("0_000014", "vase", "primitives/vase/0_000014.glb"), ["teal"], np.random.default_rng(1))
    assert (item.category, item.words) == ("vase", "") and "vase" in item.text
    assert describe(_record("0_1", "0_2", "x"), ["teal"], np.random.default_rng(1)).category == "object"


def test_the_same_generator_gives_the_same_caption():
    record = _record("Chair", sides=[0.3, 1.0, 0.3])
    one, two = ([caption(record, ["red"], np.random.default_rng(seed)) for seed in range(50)] for _ in range(2))
    assert one == two and len(set(one)) > 8


def test_vocabulary_counts_objects_and_holds_all_colours():
    records = [_record(f"chair_{i}", key=f"kaykit__chair_{i}") for i in range(3)] + [
        _record("xylophone"),
        _record("gong_2"),
    ]
    words = vocabulary(records, least=3, rounds=60)
    assert words == sorted(set(words)) and words == vocabulary(records, least=3, rounds=60)
    assert {"chair", "furniture", "low-poly", "a", "and", "that"} <= set(words)
    assert {word for name in COLOUR_NAMES for word in name.split()} <= set(words)
    assert not {"xylophone", "gong"} & set(words)
    assert {"xylophone", "gong"} <= set(vocabulary(records, least=1))


def test_colour_tokens_never_come_from_names():
    names = [f"{a}_{b}_cup" for a, b in itertools.permutations(("red", "golden", "blue", "grey"), 2)]
    assert {words_of(name) for name in names} == {"cup"}
