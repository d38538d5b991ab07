"""The tools on offer, prepared once a tools list so that a request is compared with them cheaply.

A `ToolCatalog` is an index from stem to the tools that use it; comparing a request with it costs
one look-up a stem of the request plus the details of the few best tools, however many there are.
The same question needs a tool or not depending on the catalog, so this is the router's strongest
and most transferable evidence.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any, Final

from keepwarm.router.lexicon import lexicon
from keepwarm.router.words import by_stem, concepts, content_stems, name_words, stem, words

#: Characters of a description that are looked at; longer ones turn to details and examples.
DESCRIPTION_SEEN_CHARS: Final = 400

#: Where a description stops saying what the tool does and starts saying from which arguments.
_ARGUMENTS = re.compile(
    r"\b(based on|given|using|by|for|from|with|in|at|according|within|during|that|which|when)\b"
    r"|[.,;(]",
    re.IGNORECASE,
)


@cache
def verb_class_of() -> dict[str, str]:
    """By stem: what a verb asks for."""
    classes = lexicon().verb_classes
    return {stem(word): kind for kind, listed in classes.items() for word in listed}


@cache
def _slot_of() -> dict[str, tuple[str, ...]]:
    return by_stem(lexicon().slot_words)


@dataclass(frozen=True, slots=True)
class ToolText:
    """What the router reads of a tool: its name and description, in the deployment's words."""

    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class ToolFacts:
    """One tool, taken apart. Stems are content stems; weights are inverse document frequencies."""

    name: str
    name_stems: tuple[str, ...]
    core_stems: tuple[str, ...]
    all_stems: frozenset[str]
    weight: float
    pairs: frozenset[tuple[str, str]]
    concepts: frozenset[str]
    verbs: frozenset[str]
    trigrams: frozenset[str]
    slots: frozenset[str]


@dataclass(frozen=True, slots=True)
class ToolCatalog:
    """A tools list, ready to be compared with requests. Immutable; share it freely.

    `is_open` says that the tools do more than their words tell, or aren't known: then a request can
    need one without having words in common with it. True of the tiers' own (a shell, the web).
    """

    tools: tuple[ToolFacts, ...]
    index: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    by_concept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    is_open: bool = False


#: Nothing is on offer: no request can need a tool.
NO_TOOLS: Final = ToolCatalog(tools=())
#: What is on offer can't be told: only the request itself is evidence.
UNKNOWN_TOOLS: Final = ToolCatalog(tools=(), is_open=True)


@dataclass(frozen=True, slots=True)
class WordWeights:
    """Inverse document frequencies, 0 to 1, of stems common in requests and tool descriptions.

    A stem that isn't listed is rare, hence weighs 1.
    """

    listed: Mapping[str, float] = field(default_factory=dict)

    def of(self, found: str) -> float:
        """The weight of one stem."""
        return self.listed.get(found, 1.0)

    def total(self, found: Iterable[str]) -> float:
        """The weight of several stems together."""
        get = self.listed.get
        return sum(get(each, 1.0) for each in found)


def trigrams(found: Iterable[str]) -> frozenset[str]:
    """Letter trigrams inside words of four letters or more; they meet where stems just miss."""
    return frozenset(
        word[at : at + 3] for word in found if len(word) > 3 for at in range(len(word) - 2)
    )


def tool_texts(tools: Sequence[Any] | None) -> tuple[ToolText, ...]:
    """Names and descriptions out of a request's `tools`, OpenAI's nested or the flat form.

    What isn't a tool with a name is skipped: the engine will say what it thinks of it.
    """
    found: list[ToolText] = []
    for tool in tools or ():
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            continue
        description = inner.get("description")
        found.append(ToolText(inner["name"], description if isinstance(description, str) else ""))
    return tuple(found)


def tool_facts(tool: ToolText, weights: WordWeights) -> ToolFacts:
    """One tool taken apart: done once a tools list."""
    named = name_words(tool.name)
    described = words(tool.description[:DESCRIPTION_SEEN_CHARS])
    head = tool.description[:DESCRIPTION_SEEN_CHARS]
    # The first word is the verb, so the search for where the arguments begin starts after it.
    cut = _ARGUMENTS.search(head, min(len(head), 12))
    core = words(head[: cut.start()] if cut else head)

    lists, verbs, slots = lexicon(), verb_class_of(), _slot_of()

    def meaning(found: Iterable[str]) -> tuple[str, ...]:
        return tuple(content_stems(word for word in found if word not in lists.tool_stop))

    name_stems, every = meaning(named), meaning([*named, *described])
    kinds = {verbs[each] for word in (*named, *core[:2]) if (each := stem(word)) in verbs}
    in_order = [stem(word) for word in described if word not in lists.stop]
    named_in_order = [stem(word) for word in named]
    return ToolFacts(
        name=tool.name,
        name_stems=name_stems,
        core_stems=meaning(core),
        all_stems=frozenset(every),
        weight=weights.total(every),
        pairs=frozenset(pairwise(in_order)) | frozenset(pairwise(named_in_order)),
        concepts=frozenset(concepts(every)),
        verbs=frozenset(kinds),
        trigrams=trigrams([*named, *described]),
        slots=frozenset(
            slot for word in (*named, *described) for slot in slots.get(stem(word), ())
        ),
    )


def prepare_catalog(
    tools: Sequence[ToolText], weights: WordWeights, *, is_open: bool = False
) -> ToolCatalog:
    """A tools list taken apart; about 50 us a tool."""
    facts = tuple(tool_facts(tool, weights) for tool in tools)
    return ToolCatalog(
        tools=facts,
        index=_inverted(tool.all_stems for tool in facts),
        by_concept=_inverted(tool.concepts for tool in facts),
        is_open=is_open,
    )


def _inverted(sets: Iterable[frozenset[str]]) -> dict[str, tuple[int, ...]]:
    found: dict[str, list[int]] = {}
    for at, members in enumerate(sets):
        for each in members:
            found.setdefault(each, []).append(at)
    return {each: tuple(where) for each, where in found.items()}


class CatalogCache:
    """The last `capacity` tools lists, prepared. Agents send the same list with every request."""

    def __init__(self, weights: WordWeights, *, capacity: int = 64) -> None:
        self._weights = weights
        self._capacity = capacity
        self._prepared: OrderedDict[tuple[bool, tuple[ToolText, ...]], ToolCatalog] = OrderedDict()

    def get(self, tools: Sequence[ToolText], *, is_open: bool = False) -> ToolCatalog:
        """The catalog of a tools list, prepared now if it is new."""
        key = (is_open, tuple(tools))
        if (found := self._prepared.get(key)) is not None:
            self._prepared.move_to_end(key)
            return found
        found = prepare_catalog(key[1], self._weights, is_open=is_open) if tools else NO_TOOLS
        self._prepared[key] = found
        while len(self._prepared) > self._capacity:
            self._prepared.popitem(last=False)
        return found
