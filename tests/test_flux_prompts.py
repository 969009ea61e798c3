"""Prompts: what becomes of anything that people type, and what they are told."""

import pytest
from fake_views import card

from triptych.errors import TriptychError
from triptych.flux.prompts import (
    FRAME_TOKENS,
    check_prompt,
    clean_text,
    estimate_tokens,
    fill_template,
    unknown_words,
)

FREE = card(vocabulary=None)


@pytest.mark.parametrize("text", ["", "  \n\t ", "\x00\x07", "\u200b\ufeff", "...", "?! -"])
def test_nothing_to_go_by_is_an_error_unless_there_is_a_picture(text):
    with pytest.raises(
        TriptychError, match=r"no picture is given: write what the object is, such as .* or give a photo"
    ):
        check_prompt(text, FREE, False)
    assert check_prompt(text, FREE, True) == ("", ())


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\tred \r\n\n chair\x00 ", "a red chair"),
        ("red\u200b\u202e chair\ufeff", "red chair"),
        ("cafe\u0301\u00a0table", "caf\u00e9 table"),
        ("a \ud800 chair", "a chair"),
        ("👩\u200d🚀 figure", "👩\u200d🚀 figure"),  # one emoji, held together by what cannot be seen
        ("一把红色的椅子", "一把红色的椅子"),
    ],
)
def test_text_is_one_clean_line(text, clean):
    assert clean_text(text) == clean
    assert check_prompt(text, FREE, False) == (clean, ())


def test_a_model_that_knows_language_gets_any_text_untouched():
    for text in ("A Red Dragon", "红色的椅子", "🐉", "стул", "2001"):
        assert check_prompt(text, FREE, False) == (text, ())


def test_a_long_prompt_is_cut_between_words_and_the_user_learns_where():
    text = "a red wooden chair with a tall round back " * 250
    used, (warning,) = check_prompt(text[:10_000], FREE, False)
    assert text.startswith(used) and text[len(used)] == " "
    count, total = len(used.split()), len(text[:10_000].split())
    assert (
        f"has 10,000 characters, more than the 512 tokens that fake reads: only the first {count:,} of its" in warning
    )
    assert f"of its {total:,} words were used" in warning
    room = 512 - FRAME_TOKENS - estimate_tokens(". given: front, left, back.")
    assert estimate_tokens(used) <= room < estimate_tokens(text[: len(used) + 9])


def test_a_long_prompt_is_cut_by_the_models_own_count_where_there_is_one():
    used, (warning,) = check_prompt("chair " * 2000, FREE, False, lambda part: 2 * len(part.split()))
    assert used.split() == ["chair"] * ((512 - FRAME_TOKENS) // 2 - 5)  # ". given: front, left, back."
    assert "has 11,999 characters" in warning


def test_a_long_template_leaves_less_room():
    wordy = card(vocabulary=None, prompt_template="{text}, " + "one of four views " * 50 + "{given}")
    used, _ = check_prompt("chair " * 2000, wordy, False, lambda part: len(part.split()))
    assert len(used.split()) == 512 - FRAME_TOKENS - 1 - 200 - 3


@pytest.mark.parametrize("sign", ["x", "椅", "🪑"])
def test_a_single_endless_word_is_cut_inside(sign):
    used, (warning,) = check_prompt(sign * 10_000, FREE, False)
    assert 0 < len(used) < 2000 and set(used) == {sign}
    assert f"only its first {len(used):,} characters were used" in warning


def test_words_are_compared_without_case_and_plural():
    known = ("chair", "shelf", "Bus", "berry", "man", "glass", "dark red", "wooden")
    assert unknown_words("Chairs, SHELVES; buses! berries men's glasses chair's", known) == ()
    assert unknown_words("dark-red wooden-chair", known) == ()
    assert unknown_words("a set of the 12 Dragons: dragons and dark-blue _ 🐉🐉", known) == (
        "set", "12", "Dragons", "dark-blue", "🐉",
    )  # fmt: skip


def test_unknown_words_are_named_once_with_what_was_perhaps_meant():
    text, (warning,) = check_prompt("A Red chiar with dragons, a DRAGONS 🐉", card(), False)
    assert text == "a red chiar with dragons, a dragons 🐉"  # the vocabulary has small letters only
    assert warning == (
        "the small model fake does not know: chiar (chair?), dragons, 🐉; it knows about 9 words, see "
        '"vocabulary" in its views.json'
    )
    assert check_prompt("Red chairs and dark shelves", card(), False) == ("red chairs and dark shelves", ())
    assert check_prompt("Red chair", card(vocabulary=("Red", "chair")), False) == ("Red chair", ())


def test_other_scripts_are_told_that_the_small_model_knows_english_only():
    text, warnings = check_prompt("红色的椅子 стул dragon chaise-longue", card(), False)
    assert text == "红色的椅子 стул dragon chaise-longue" and len(warnings) == 2
    assert "fake knows English only and cannot read 红色的椅子, стул: write the prompt in English" in warnings[0]
    assert "does not know: dragon, chaise-longue; it knows" in warnings[1]


def test_many_unknown_words_make_one_sentence_of_bearable_length():
    _, warnings = check_prompt(" ".join(f"word{i}" * 12 for i in range(30)), card(max_sequence_length=4000), False)
    (warning,) = warnings
    assert "and 22 more; it knows" in warning and len(warning) < 600


def test_the_template_is_filled_and_braces_in_the_text_stay():
    assert fill_template(card(), "a red chair", ()) == "a red chair. given: nothing."
    assert fill_template(card(), "a red chair.", ["left", "front"]) == "a red chair. given: front, left."
    assert fill_template(card(), "", ("back",)) == ". given: back."
    assert fill_template(card(), "{given} {text} {0}", ("front",)) == "{given} {text} {0}. given: front."
    assert fill_template(card(prompt_template="views of {text}"), "a cup", ("front",)) == "views of a cup"
    with pytest.raises(TriptychError, match="unknown view 'top'"):
        fill_template(card(), "a cup", ("top",))
