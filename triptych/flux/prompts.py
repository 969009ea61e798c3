"""What the user wrote -> what a views model reads.

A prompt is cleaned (one line, no control characters), cut at what the text encoder can take, and compared with the
vocabulary of a model that has one: a small model draws what it was trained on, and the user learns which words it does
not know rather than wonder about the picture. Words are compared without case and without plural.

Not covered: grammar, negation ("no legs"), weights in brackets.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

from ..errors import TriptychError
from ..geometry.cameras import VIEW_NAMES

if TYPE_CHECKING:
    from .card import ViewsCard

FRAME_TOKENS = 20  # what a text encoder's chat frame takes at most
_NAMED = 8  # unknown words that one sentence names
_JOINERS = "\u200c\u200d"  # invisible, but they hold emoji and letters of some scripts together
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
# Words without a picture: nobody misses them in a vocabulary.
_FILLERS = frozenset(
    re.findall(
        r"\w+",
        "a an the this that these those some one of with without and or in on at to for from by as is are it its has "
        "have having very please make me my draw show create generate i want like picture image photo model object 3d",
    )
)
_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("es", ""), ("s", ""), ("men", "man"), ("feet", "foot"))

CountTokens = Callable[[str], int]


def check_prompt(
    text: str, card: ViewsCard, has_image: bool, count_tokens: CountTokens | None = None
) -> tuple[str, tuple[str, ...]]:
    """What the user wrote -> what goes into the template, and sentences for the user.

    has_image: a view is given, so the text may be empty. count_tokens: the model's own tokenizer; None estimates.
    A model whose vocabulary is written small gets its prompt in small letters. Raises TriptychError when there is
    neither text nor picture.
    """
    clean = require_prompt(text, has_image)
    if not clean:
        return "", ()
    vocabulary = card.vocabulary or ()
    warnings: list[str] = []
    count = count_tokens or (lambda part: estimate_tokens(part, vocabulary))
    template = count(fill_template(card, "", VIEW_NAMES[:3]))
    cut = _longest_prefix(clean, count, max(1, card.max_sequence_length - template - FRAME_TOKENS))
    if len(cut) < len(clean):
        used = f"the first {len(cut.split()):,} of its {len(clean.split()):,} words"
        if " " not in cut:
            used = f"its first {len(cut):,} characters"
        warnings.append(
            f"the prompt has {len(clean):,} characters, more than the {card.max_sequence_length} tokens that "
            f"{card.name} reads: only {used} were used"
        )
    if vocabulary:
        warnings += _strange_words(cut, card.name, vocabulary)
        cut = cut.lower() if not any(word != word.lower() for word in vocabulary) else cut
    return cut, tuple(warnings)


def require_prompt(text: str, has_image: bool) -> str:
    """The text in one clean line; "" when nothing in it means anything.

    Raises TriptychError when there is no picture to go by either.
    """
    clean = clean_text(text)
    # letters, digits, and symbols such as emoji; what is left is punctuation
    if any(unicodedata.category(sign)[0] in "LN" or unicodedata.category(sign) == "So" for sign in clean):
        return clean
    if not has_image:
        said = f"the prompt {clean!r} has no words" if clean else "the prompt is empty"
        raise TriptychError(
            f'{said} and no picture is given: write what the object is, such as "a red chair", or give a photo of it'
        )
    return ""


def clean_text(text: str) -> str:
    """One line in composed Unicode: white space is single spaces, what cannot be seen is gone."""
    spaced = "".join(" " if sign.isspace() or unicodedata.category(sign) == "Cc" else sign for sign in text)
    seen = (sign for sign in spaced if sign in _JOINERS or unicodedata.category(sign)[0] != "C")
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


def fill_template(card: ViewsCard, text: str, given: Iterable[str] = ()) -> str:
    """The card's template with the text and the names of the given views, in the order front, left, back, right.

    Braces in the text stay what they are. Raises TriptychError for a name that is no view's.
    """
    names = list(given)
    unknown = [name for name in names if name not in VIEW_NAMES]
    if unknown:
        raise TriptychError(f"unknown view {unknown[0]!r}; views are {', '.join(VIEW_NAMES)}")
    listed = ", ".join(name for name in VIEW_NAMES if name in names) or "nothing"
    if "{text}." in card.prompt_template:
        text = text.rstrip(" .")
    before, placeholder, after = card.prompt_template.replace("{given}", listed).partition("{text}")
    return before + (text if placeholder else "") + after


def estimate_tokens(text: str, vocabulary: Iterable[str] = ()) -> int:
    """About how many tokens a byte-level BPE makes of the text, rather too many than too few.

    With a vocabulary, its words are one token each and all others fall apart into bytes.
    """
    known = _folded(vocabulary) | _FILLERS if vocabulary else frozenset()
    total = 0
    for word in text.split():
        size = len(word.encode())
        if known:
            total += 1 if _is_known(word.strip(".,;:!?").lower(), known) else size
        else:  # a short English word is one token, a Chinese character about one, an emoji two or three
            total += -(-size // 4) if word.isascii() else -(-size // 2)
    return total


def unknown_words(text: str, vocabulary: Iterable[str]) -> tuple[str, ...]:
    """The words and emoji of the text that the vocabulary lacks, as written, each once, in order.

    "Chairs" is known where "chair" is, "dark-red" where "dark" and "red" are.
    """
    known = _folded(vocabulary) | _FILLERS
    found: dict[str, str] = {}
    for word in [*_WORD.findall(text), *(sign for sign in text if unicodedata.category(sign) == "So")]:
        if not _is_known(word.lower(), known):
            found.setdefault(word.lower(), word)
    return tuple(found.values())


def _strange_words(text: str, name: str, vocabulary: Iterable[str]) -> list[str]:
    """At most two sentences: one about words in other scripts, one about the words that are not known."""
    strange = unknown_words(text, vocabulary)
    foreign = [word for word in strange if _is_foreign(word)]
    others = [word for word in strange if not _is_foreign(word)]
    notes = []
    if foreign:
        notes.append(
            f"the small model {name} knows English only and cannot read {_listed(foreign)}: write the prompt in "
            "English, or load a larger model"
        )
    if others:
        names = sorted(set(vocabulary))
        hints = [f"{word} ({close[0]}?)" if (close := _close(word, names)) else word for word in others]
        notes.append(
            f"the small model {name} does not know: {_listed(hints)}; it knows about {len(names)} words, see "
            '"vocabulary" in its views.json'
        )
    return notes


def _listed(words: list[str]) -> str:
    shown = [word if len(word) <= 40 else word[:39] + "…" for word in words[:_NAMED]]
    return ", ".join(shown) + (f" and {len(words) - _NAMED} more" if len(words) > _NAMED else "")


def _close(word: str, names: list[str]) -> list[str]:
    return get_close_matches(word.lower(), names, n=1, cutoff=0.75) if len(word) <= 40 else []


def _is_foreign(word: str) -> bool:
    """Whether its letters are of another script than Latin."""
    return any(sign.isalpha() and "LATIN" not in unicodedata.name(sign, "") for sign in word)


def _folded(words: Iterable[str]) -> frozenset[str]:
    """Every form of every word, and the parts of compound ones."""
    parts = (part for word in words for part in (word, *re.split(r"[\s-]+", word)))
    return frozenset(form for part in parts for form in _forms(part.lower()))


def _forms(word: str) -> set[str]:
    """The word, and what it may be the plural or genitive of."""
    word = re.sub(r"['\u2019]s?$", "", word)
    found = {word}
    for ending, singular in _ENDINGS:
        stem = word.removesuffix(ending)
        if stem != word and len(stem) + len(singular) >= 3:
            found.add(stem + singular)
    return found


def _is_known(word: str, known: frozenset[str]) -> bool:
    if _forms(word) & known:
        return True
    parts = word.split("-")
    return len(parts) > 1 and all(_forms(part) & known for part in parts)


def _longest_prefix(text: str, count: CountTokens, limit: int) -> str:
    """As much of the text as takes at most ``limit`` tokens, cut between words where it has any."""
    if count(text) <= limit:
        return text
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    if count(text[: ends[0]]) > limit:
        ends = list(range(1, ends[0] + 1))
    low, high = 0, len(ends)  # ends[low - 1] fits, ends[high - 1] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(text[: ends[middle - 1]]) <= limit else (low, middle)
    return text[: ends[low - 1]].rstrip(" ,;:-") if low else text[:1]
