"""Words, stems and cues: what the router sees of a text.

One pass over the words finds every cue (a named list of words and phrases), so the cost is linear
in the text and small: no regular expression but the splitting one runs over all of it. Texts longer
than `SEEN_CHARS` are seen by their beginning and end, where people put what they want.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from typing import Final

from keepwarm.router.lexicon import lexicon

#: Beginning and end of a text that the features look at: 94 % of the
#: labelled requests are shorter, and the others say what they want first or last.
SEEN_HEAD_CHARS: Final = 700
SEEN_TAIL_CHARS: Final = 250

#: Function words that do say something by themselves: whose, and when.
OWNERS_WORDS: Final = frozenset(("my", "our", "ours", "i", "i'm", "i've", "we", "now"))
#: Words whose grams are looked at, and up to which a text is short.
GRAM_WORDS: Final = 60
SHORT_TEXT_WORDS: Final = 12

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NON_LATIN = re.compile(r"[\u0370-\u1fff\u2e80-\ufaff\uff66-\uffdc]")

# Longest first within a step; one inflection, then one derivation. Coarser than Porter's on
# purpose: 'calculator', 'calculation' and 'calculating' must meet; a false meeting costs little.
_INFLECTIONS: Final = ("ings", "ies", "ing", "ed", "es", "s")
_DERIVATIONS: Final = (
    "ization", "ation", "ator", "ition", "ment", "ness", "ion", "ical", "able", "ally", "ity",
    "ive", "ate", "ize", "ise", "ant", "ent", "ial", "er", "or", "al", "ic", "ly", "at",
)  # fmt: skip


def seen(text: str) -> str:
    """The part of a text that the features look at: all of it, or beginning and end."""
    if len(text) <= SEEN_HEAD_CHARS + SEEN_TAIL_CHARS:
        return text
    return f"{text[:SEEN_HEAD_CHARS]}\n{text[-SEEN_TAIL_CHARS:]}"


def words(text: str) -> list[str]:
    """The words of a text, in order, in lower case, with the typographic apostrophe made plain."""
    return _WORD.findall(text.lower().replace("\u2019", "'"))


def name_words(name: str) -> list[str]:
    """The words of a tool's name: `getStockPrice`, `get_stock_price` and `stock.price` alike."""
    return words(_CAMEL.sub(" ", name).replace("_", " "))


@lru_cache(maxsize=20_000)
def stem(word: str) -> str:
    """A coarse English stem. Words of up to three letters or with digits stay as they are."""
    word = word.removesuffix("'s")
    if len(word) <= 3 or not word.isalpha() or not word.isascii():
        return word
    for ending in _INFLECTIONS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word[: -len(ending)] + ("y" if ending == "ies" else "")
            if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdgmnprt":
                word = word[:-1]
            break
    if word.endswith("ersion"):  # conversion, to convert
        return word[:-6] + "ert"
    for ending in _DERIVATIONS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    return word[:-1] if len(word) > 3 and word[-1] in "ey" else word


def content_stems(found: Iterable[str]) -> list[str]:
    """Stems of the words that carry meaning, in order of first use, each once."""
    stop = lexicon().stop
    return list(dict.fromkeys(stem(word) for word in found if word not in stop))


def grams(found: Sequence[str]) -> tuple[tuple[str, ...], float]:
    """Stems, pairs of neighbours and the ends of a text, each once, and what each of them counts.

    Numbers count as one word; in scripts that don't part words, two letters do. Only the first
    `GRAM_WORDS` are taken. A long text has more of them, so each counts less.
    """
    stems: list[str] = []
    for word in found[:GRAM_WORDS]:
        if word.isascii():
            stems.append("<num>" if word[0].isdigit() else stem(word))
        elif _NON_LATIN.match(word) and len(word) > 2:
            stems.extend(map("".join, pairwise(word[:GRAM_WORDS])))
        else:
            stems.append(word)
    del stems[GRAM_WORDS:]
    pairs = map(" ".join, pairwise(("^", *stems, "$")))
    share = 1.0 / math.sqrt(max(1.0, len(stems) / SHORT_TEXT_WORDS))
    stop = lexicon().stop
    # A function word by itself tells the style; what it stands beside tells the rest.
    alone = (each for each in stems if each not in stop or each in OWNERS_WORDS)
    return tuple(dict.fromkeys((*alone, *pairs))), share


#: For each first word: the cues it is by itself, and by second word the phrases it opens.
_PhraseIndex = dict[str, tuple[tuple[str, ...], dict[str, tuple[tuple[tuple[str, ...], str], ...]]]]


@cache
def _phrases() -> _PhraseIndex:
    alone: dict[str, list[str]] = {}
    longer: dict[str, dict[str, list[tuple[tuple[str, ...], str]]]] = {}
    for cue, phrases in lexicon().cues.items():
        for phrase in dict.fromkeys(phrases):
            first, *rest = phrase.split()
            if rest:
                longer.setdefault(first, {}).setdefault(rest[0], []).append((tuple(rest), cue))
            else:
                alone.setdefault(first, []).append(cue)
    return {
        first: (
            tuple(alone.get(first, ())),
            {second: tuple(found) for second, found in longer.get(first, {}).items()},
        )
        for first in alone.keys() | longer.keys()
    }


def by_stem(groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Word lists turned round: from a stem to the lists it stands in."""
    found: dict[str, tuple[str, ...]] = {}
    for group, listed in groups.items():
        for each in dict.fromkeys(map(stem, listed)):
            found[each] = (*found.get(each, ()), group)
    return found


@cache
def _stem_concepts() -> dict[str, tuple[str, ...]]:
    return by_stem(lexicon().concepts)


def count_cues(found: Sequence[str]) -> dict[str, int]:
    """How often each cue occurs in a text's words. Cues that don't occur are absent."""
    counts: dict[str, int] = {}
    opening = _phrases()
    last = len(found) - 1
    for at, word in enumerate(found):
        opened = opening.get(word)
        if opened is None:
            continue
        alone, longer = opened
        for cue in alone:
            counts[cue] = counts.get(cue, 0) + 1
        if longer and at < last:
            for rest, cue in longer.get(found[at + 1], ()):
                if len(rest) == 1 or tuple(found[at + 1 : at + 1 + len(rest)]) == rest:
                    counts[cue] = counts.get(cue, 0) + 1
    return counts


def foreign_cues(text: str) -> set[str]:
    """Cues in languages other than English, found as substrings of the lower-cased text."""
    lowered = text.lower()
    foreign = lexicon().foreign_cues.items()
    return {cue for cue, listed in foreign if any(phrase in lowered for phrase in listed)}


def concepts_of(found: str) -> tuple[str, ...]:
    """The concepts that one stem names; mostly none."""
    return _stem_concepts().get(found, ())


def concepts(stems: Iterable[str]) -> set[str]:
    """The everyday concepts (weather, money, travel, ...) that a text's stems name."""
    named = _stem_concepts()
    return {each for found in stems for each in named.get(found, ())}


def foreign_share(text: str, found: Sequence[str]) -> float:
    """How far a text is from English, 0 to 1: other scripts, or no English function words.

    A text of fewer than four words in Latin letters counts as English: it could be anything.
    """
    if not text.isascii():
        letters = sum(map(str.isalpha, text))
        if (other := len(_NON_LATIN.findall(text))) > 0.2 * letters:
            return min(1.0, 2.0 * other / max(letters, other))
    if len(found) < 3:
        return 0.0
    # 'a', 'me' and the like are English too; only what English doesn't have counts as foreign.
    lists = lexicon()
    stop = lists.stop
    foreign = sum(word in lists.foreign and word not in stop for word in found) / len(found)
    english = sum(word in stop for word in found) / len(found)
    if foreign >= 0.15 and foreign > english:
        return 1.0
    return max(0.0, min(1.0, (0.12 - english) / 0.10)) if len(found) >= 8 else 0.0
