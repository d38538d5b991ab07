"""What is asked: the same question to every arm, in the shape each needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec

from keepwarm.core.tiers import Tier, compose

# Questions differ from their first word on, so that a slot that has answered one holds nothing of
# the next but the tier; and they are about as long as one another in every tokenizer.
_THINGS = (
    *("Birds", "Cities", "Rivers", "Colors", "Metals", "Fruits", "Tools", "Sports", "Planets"),
    *("Animals", "Trees", "Flowers", "Drinks", "Games", "Songs", "Books", "Letters", "Shapes"),
    *("Clothes", "Trains", "Houses", "Islands", "Lakes", "Mountains", "Cakes", "Cheeses", "Nuts"),
    *("Herbs", "Stones", "Boats", "Dances", "Poems", "Films", "Hats", "Shoes", "Roads", "Winds"),
)
_FIRST_NUMBER = 101
# The size of the request that an agent with a dozen tools opens with.
OWN_BYTES = 9000

Turn = dict[str, str]


class Questions:
    """Questions that no server has seen before in this run."""

    def __init__(self) -> None:
        self._numbers = count(_FIRST_NUMBER)

    def new(self) -> str:
        """The next one."""
        number = next(self._numbers)
        return f"{_THINGS[number % len(_THINGS)]} {number}: name one."


def user(text: str) -> Turn:
    """A user's message."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    """The model's message. An empty one is refused by some templates."""
    return {"role": "assistant", "content": text or "Done."}


def direct_request(tier: Tier, turns: Sequence[Turn], *, reply_tokens: int) -> dict[str, Any]:
    """A body for a bare engine: the tier's static prompt and tools are sent along in full.

    It renders to the same tokens as `keepwarm_request`'s.
    """
    return compose(tier, _base(tier, turns, reply_tokens))


def keepwarm_request(tier: Tier, turns: Sequence[Turn], *, reply_tokens: int) -> dict[str, Any]:
    """A body for Keepwarm, which puts the tier's prompt in itself: the model's name is the tier."""
    return _base(tier, turns, reply_tokens)


def own_request(size_bytes: int, text: str, *, reply_tokens: int) -> dict[str, Any]:
    """A body of exactly so many bytes of JSON: a system prompt of the client's own, one question.

    Raises:
        ValueError: so few bytes don't hold even the question.
    """
    body: dict[str, Any] = {
        "model": "own",
        "messages": [{"role": "system", "content": ""}, user(text)],
        "max_tokens": reply_tokens,
        "temperature": 0,
    }
    room = size_bytes - len(msgspec.json.encode(body))
    if room < 0:
        raise ValueError(f"{size_bytes} bytes don't hold the question")
    body["messages"][0]["content"] = rules(room)
    return body


def rules(chars: int, *, start: int = 1) -> str:
    """So many characters of an agent's rules, numbered from `start` on; ASCII, one line."""
    written = ""
    numbers = count(start)
    while len(written) < chars:
        number = next(numbers)
        thing = _THINGS[number % len(_THINGS)].lower()
        written += f"Rule {number}: when {thing} are asked for, name one and stop. "
    return written[:chars]


def _base(tier: Tier, turns: Sequence[Turn], reply_tokens: int) -> dict[str, Any]:
    return {
        "model": tier.name,
        "messages": list(turns),
        "max_tokens": reply_tokens,
        "temperature": 0,
    }
