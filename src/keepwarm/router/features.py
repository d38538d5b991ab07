"""Cheap features of a request: what kind of request it is, and how it meets the tools on offer.

All are numbers of about 0 to 1. Few, and each with a meaning a person can name, since the router is
to hold on requests of a style that nobody has labelled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Final

from keepwarm.router.catalog import ToolCatalog, ToolFacts, WordWeights, trigrams, verb_class_of
from keepwarm.router.lexicon import lexicon
from keepwarm.router.words import (
    concepts_of,
    content_stems,
    count_cues,
    foreign_cues,
    foreign_share,
    grams,
    stem,
    words,
)

_NUMBER = re.compile(r"\d[\d.,]*")
_QUOTED = re.compile(
    r"\"[^\"\n]{1,60}\"|(?<!\w)'[^'\n]{1,60}'(?!\w)|\u201c[^\u201d\n]{1,60}\u201d|`[^`\n]{1,60}`"
)
_ENTITY = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
_ADDRESS = re.compile(r"[\w.+-]{1,64}@[\w-]{1,64}\.|https?://|\d{4}-\d\d-\d\d")
_ENDINGS = (
    "txt|md|pdf|csv|tsv|json|ya?ml|toml|xml|py|js|ts|tsx|c|h|cpp|rs|go|java|sh|sql|html?|css|docx?"
    "|xlsx?|pptx?|log|ini|cfg|conf|zip|png|jpe?g|ipynb|tex"
)
#: The end of a file's name, or a path: looked for before the slower `_FILE`.
_FILE_END = re.compile(rf"\.(?:{_ENDINGS})\b|/[\w.-]+/")
_FILE = re.compile(
    rf"(?<![\w/.-])(?:[~.]{{0,2}}/)?(?:[\w-]{{1,64}}/){{0,12}}[\w-]{{1,64}}\.(?:{_ENDINGS})\b"
    r"|(?<![\w:/.])(?:~|\.{1,2})?/(?:[\w.-]{1,64}/){1,12}[\w.-]*"
)
_FILE_VERB = re.compile(
    r"\b(?:open|read|edit|move|copy|delete|remove|rename|append|write|save|show|list|compare|diff"
    r"|sort|fix|summari[sz]e|look at|look in|check|update|print|count|find|create|change|translate"
    r"|convert)\b",
    re.IGNORECASE,
)
#: Cues that make a question more than one of general knowledge.
_NOT_BARE: Final = ("self", "now", "act", "look-up", "files", "shared", "earlier", "tool-words")
_CODE = re.compile(
    r"```|[{};]\s*\n|^\s*(?:def|class|import|#include|SELECT|function)\b", re.MULTILINE
)
_FORMULA = re.compile(r"\$[^$\n]+\$|\\[a-z]{3,}|[=^<>]{1,2}|\b[a-z]\([a-z]\)")
_STEP_MARK = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*\u2022]|[a-h]\))\s", re.MULTILINE)

#: What a word of the same concept counts, beside 1 for the same word.
AKIN: Final = 0.7
#: Words of a request whose letters are compared; in a longer one too many meet by chance.
TRIGRAM_WORDS: Final = 80
#: Tools that are compared in detail; the rest lost on the weight of common words.
CANDIDATES: Final = 3

_YEAR = re.compile(r"\b(?:1[0-9]|20)\d\d\b|\d(?:st|nd|rd|th)\b")
_MONEY = re.compile(r"[$\u20ac\u00a3\u00a5]\s?\d|\d\s?[\u20ac\u00a3]")
_PLACE = re.compile(
    r"\b(?:in|near|at|from|to|for|around|between|of|visit|and) (?:the )?[A-Z][a-z]+"
    r"|[A-Z]\w+, [A-Z]\w"
)


@cache
def _value_of() -> dict[str, tuple[str, ...]]:
    kinds = lexicon().value_words
    named = {word for listed in kinds.values() for word in listed}
    return {word: tuple(k for k, listed in kinds.items() if word in listed) for word in named}


@dataclass(frozen=True, slots=True)
class Seen:
    """What a request shows by itself: named numbers, its words, cues and a few plain facts."""

    values: dict[str, float]
    words: list[str]
    cues: dict[str, int]
    foreign: float
    asks_for_files: bool
    is_small_talk: bool
    tier_words_removed: bool
    text: str
    grams: tuple[str, ...] = ()
    gram_share: float = 1.0

    @property
    def n_words(self) -> int:
        """How many words were seen."""
        return len(self.words)


@dataclass(frozen=True, slots=True)
class Met:
    """How a request meets the tools on offer; `best_tool` is the one that fits best."""

    values: dict[str, float]
    best_tool: str


def _saturated(count: float, at: float) -> float:
    return min(count, at) / at


def look(text: str, *, tier_words_removed: bool = False) -> Seen:
    """What a request shows by itself. `text` is its seen part (`words.seen`)."""
    found = words(text)
    cues = count_cues(found)
    foreign = foreign_share(text, found)
    if foreign or len(found) < 8:
        for cue in foreign_cues(text):
            cues[cue] = cues.get(cue, 0) + 1
    # 'How do I boil an egg' isn't about me.
    for cue in ("self", "self-question"):
        if cue in cues and "how-to" in cues:
            cues[cue] = max(0, cues[cue] - cues["how-to"])
    n = len(found)
    opening = found[:6]
    found_grams, share = grams(found)
    lists, verbs = lexicon(), verb_class_of()
    first_verb = next((verbs[s] for w in opening if (s := stem(w)) in verbs), None)
    ends_asking = "?" in text[-40:]
    first_asks = bool(opening) and opening[0] in lists.asking and opening[0] not in lists.polite
    sentences = 1 + sum(text.count(mark) for mark in (". ", "? ", "! ", "\n"))
    numbers = len(_NUMBER.findall(text))
    has_files = bool(_FILE_END.search(text)) and any(
        each.lower() not in lists.projects for each in _FILE.findall(text)
    )
    values = {
        "length": _saturated(math.log1p(n), 6.5),
        "one sentence": float(sentences <= 1),
        "sentences": _saturated(sentences - 1, 10),
        "asks": float(first_asks),
        "ends asking": float(ends_asking),
        "imperative": float(bool(found) and stem(found[0]) in verbs),
        "opens with a verb": float(first_verb is not None),
        "polite": float(bool(opening) and opening[0] in lists.polite),
        "numbers": _saturated(numbers, 4),
        "any number": float(numbers > 0),
        "quoted": _saturated(len(_QUOTED.findall(text)), 2),
        "entities": _saturated(len(_ENTITY.findall(text)), 3),
        "identifiers": _saturated(_identifiers(text, found), 2),
        "file named": float(has_files),
        "code shown": _saturated(len(_CODE.findall(text)), 4),
        "formula": _saturated(len(_FORMULA.findall(text)), 5),
        "listed steps": _saturated(len(_STEP_MARK.findall(text)), 4),
        "foreign": foreign,
    }
    scale = max(1.0, n / 40)  # a cue says less in a long text
    for cue, at in _CUE_AT.items():
        values[f"cue {cue}"] = _saturated(cues.get(cue, 0) / scale, at)
    values["self share"] = _saturated(cues.get("self", 0) / max(n, 8), 0.25)
    values["bare question"] = float(first_asks and not any(cues.get(cue) for cue in _NOT_BARE))
    values["asks of self"] = values["asks"] * values["cue self-question"]
    return Seen(
        values=values,
        words=found,
        cues=cues,
        foreign=foreign,
        asks_for_files=_asks_for_files(text, values, cues),
        is_small_talk=0 < n <= 6 and cues.get("small-talk", 0) > 0 and n <= 4 * cues["small-talk"],
        tier_words_removed=tier_words_removed,
        text=text,
        grams=found_grams,
        gram_share=share,
    )


def _identifiers(text: str, found: Sequence[str]) -> int:
    """Addresses, dates, and words of letters with digits or underscores."""
    count = sum(not (word.isalpha() or word.isdigit() or "'" in word) for word in found)
    return count + text.count("_") + len(_ADDRESS.findall(text))


def _asks_for_files(text: str, values: dict[str, float], cues: dict[str, int]) -> bool:
    """Named files are to be used, as opposed to code that would use some."""
    if not values["file named"] or cues.get("code", 0) or values["code shown"] > 0:
        return False
    return bool(cues.get("files", 0) or _FILE_VERB.search(text))


#: How many of a cue count as much as it can, in a short text.
_CUE_AT: Final[dict[str, float]] = {
    "now": 1, "look-up": 1, "act": 2, "compute": 1, "tool-words": 1, "explain": 1, "write": 2,
    "code": 2, "advice": 1, "past-conversation": 1, "earlier": 1, "shared": 1, "self-question": 1,
    "files": 2, "steps": 3, "depth": 3, "story-problem": 5, "small-talk": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """A request's words, prepared once to be compared with tools."""

    stems: tuple[str, ...]
    known: frozenset[str]
    pairs: frozenset[tuple[str, str]]
    given: frozenset[str]
    conceptual: tuple[tuple[str, tuple[str, ...]], ...]
    concepts: frozenset[str]
    verbs: frozenset[str]
    trigrams: frozenset[str]
    weight: float
    lowered: str


def given_values(request: Seen) -> frozenset[str]:
    """The kinds of value a request gives, of those that tools ask for."""
    text, values = request.text, request.values
    kinds = _value_of()
    given = {kind for word in request.words for kind in kinds.get(word, ())}
    if values["any number"]:
        given.add("amount")
        if _YEAR.search(text):
            given.add("time")
        if _MONEY.search(text):
            given.add("money")
    if _PLACE.search(text):
        given.add("place")
    if values["entities"] or values["quoted"]:
        given.add("name")
    if values["quoted"] or ":" in text:
        given.add("text")
    if values["identifiers"]:
        given.add("id")
    return frozenset(given)


def prepare_request(request: Seen, weights: WordWeights) -> Asked:
    """The request's side of the comparison with the tools on offer."""
    verbs = verb_class_of()
    stems = tuple(content_stems(request.words))
    in_order = [stem(word) for word in request.words]
    conceptual = tuple((each, named) for each in stems if (named := concepts_of(each)))
    return Asked(
        stems=stems,
        known=frozenset(stems),
        pairs=frozenset(pairwise(in_order)),
        given=given_values(request),
        conceptual=conceptual,
        concepts=frozenset(each for _, named in conceptual for each in named),
        verbs=frozenset(verbs[each] for each in stems if each in verbs),
        trigrams=trigrams(dict.fromkeys(request.words[:TRIGRAM_WORDS])),
        weight=weights.total(stems),
        lowered=request.text.lower(),
    )


def tool_features(asked: Asked, tool: ToolFacts, weights: WordWeights) -> dict[str, float]:
    """How one tool meets a request."""
    of, verbs = weights.of, verb_class_of()
    common = asked.known & tool.all_stems
    common_weight = weights.total(common)
    name_nouns = [s for s in tool.name_stems if s not in verbs] or list(tool.name_stems)
    core_nouns = [s for s in tool.core_stems if s not in verbs] or list(tool.core_stems)

    shared = asked.concepts & tool.concepts

    def met(found: str) -> float:
        """1 for the word itself, AKIN for another word of the same concept."""
        if found in asked.known:
            return 1.0
        return AKIN if shared and not shared.isdisjoint(concepts_of(found)) else 0.0

    def cover(stems: Sequence[str]) -> float:
        total = weights.total(stems)
        return sum(of(s) * met(s) for s in stems) / total if total else 0.0

    akin = 0.0
    if shared:
        akin = AKIN * sum(
            of(s)
            for s, named in asked.conceptual
            if s not in tool.all_stems and not shared.isdisjoint(named)
        )
    verbs_met = [
        of(s) for s in (*tool.name_stems, *tool.core_stems[:1]) if s in asked.known and s in verbs
    ]
    missing = [of(s) * (1.0 - met(s)) for s in {*name_nouns, *core_nouns}]
    tri = len(asked.trigrams & tool.trigrams)
    return {
        "tool covered": common_weight / tool.weight if tool.weight else 0.0,
        "tool name covered": cover(name_nouns),
        "tool purpose covered": cover(core_nouns),
        "tool purpose missed": _saturated(sum(missing), 4.0),
        "strongest common word": max(map(of, common), default=0.0),
        "common words": _saturated(len(common), 6),
        "common weight": _saturated(common_weight, 5.0),
        "request covered": (common_weight + akin) / max(asked.weight, 1.5),
        "same verb": max(verbs_met, default=0.0),
        "common pairs": _saturated(len(asked.pairs & tool.pairs), 2),
        "same action": float(bool(asked.verbs & tool.verbs)),
        "other action": float(bool(asked.verbs and tool.verbs) and not asked.verbs & tool.verbs),
        "concepts shared": len(shared) / len(tool.concepts) if tool.concepts else 0.0,
        "concepts apart": float(bool(asked.concepts and tool.concepts) and not shared),
        "letters in common": tri / max(12.0, len(tool.trigrams)),
        "tool named": float(len(tool.name) > 4 and tool.name.lower() in asked.lowered),
        "values given": len(tool.slots & asked.given) / len(tool.slots) if tool.slots else 0.5,
        "values missing": _saturated(len(tool.slots - asked.given), 4),
        "values for tool": _saturated(len(tool.slots & asked.given), 4),
        "computes nothing": float("compute" in tool.verbs and "amount" not in asked.given),
        "tool computes": float("compute" in tool.verbs),
    }


def rough_matches(
    asked: Asked, catalog: ToolCatalog, weights: WordWeights, *, top: int
) -> list[int]:
    """Indices of the tools that share most weight with the request, best first."""
    shared: dict[int, float] = {}
    for each in asked.stems:
        where = catalog.index.get(each)
        if where:
            weight = weights.of(each)
            for at in where:
                shared[at] = shared.get(at, 0.0) + weight
    for each in asked.concepts:
        for at in catalog.by_concept.get(each, ()):
            shared[at] = shared.get(at, 0.0) + AKIN
    tools = catalog.tools
    # By index where equal, so that learning gives the same weights every time.
    return sorted(shared, key=lambda at: (-shared[at] / (2.0 + tools[at].weight), at))[:top]


def fit(values: dict[str, float]) -> float:
    """How well one tool fits, to choose among the few best; the learned score judges the chosen."""
    return (
        values["tool covered"]
        + values["tool name covered"]
        + values["tool purpose covered"]
        + values["common weight"]
        + values["common pairs"]
        + 0.3 * (values["same action"] + values["concepts shared"])
        - values["tool purpose missed"]
    )


def meet(request: Seen, catalog: ToolCatalog, weights: WordWeights) -> Met:
    """How a request meets a catalog of one tool or more: the best tool's features, and how many."""
    asked = prepare_request(request, weights)
    candidates = rough_matches(asked, catalog, weights, top=CANDIDATES) or [0]
    met = [(tool_features(asked, catalog.tools[at], weights), at) for at in candidates]
    values, at = max(met, key=lambda each: fit(each[0]))
    values["many tools"] = min(1.0, math.log(len(catalog.tools)) / math.log(100))
    return Met(values=values, best_tool=catalog.tools[at].name)
