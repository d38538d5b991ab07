"""What a sender says about its request beside the body, in `X-Keepwarm-*` headers.

- `X-Keepwarm-Priority: batch`: one task of a pile. It gets a slot when no interactive request waits
  for one, waits as long as its sender does, and nobody is expected to go on from its end.
- `X-Keepwarm-Shared: 0:3584, 2:0`: places up to which other requests begin alike, as
  `segment:characters` of the sender's own messages (a system prompt of its own counts as the
  first): here the first 3,584 characters of message 0, and everything before message 2. Each gets
  a mark, so a prefix that ends there is found to the character. Saying something wrong costs
  nothing but the mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keepwarm.core.prompt import SharedEnd
from keepwarm.errors import RequestError

PRIORITY_HEADER = "X-Keepwarm-Priority"
SHARED_HEADER = "X-Keepwarm-Shared"
# Of a request to a fleet: the node that should serve it. Of an answer: the one that did.
NODE_HEADER = "X-Keepwarm-Node"
BATCH = "batch"

_PRIORITIES = {"": 0, "interactive": 0, BATCH: 1}
# A path in a prefix tree is rarely deeper than this, and each place costs a digest.
_MAX_ENDS = 16


def parse_priority(text: str) -> int:
    """The scheduler's priority: 0 interactive, 1 batch.

    Raises:
        RequestError: the header says something else.
    """
    said = text.strip().lower()
    if said not in _PRIORITIES:
        raise RequestError(f"{PRIORITY_HEADER} is `batch` or `interactive`, not {said[:40]!r}.")
    return _PRIORITIES[said]


def is_planned(headers: Mapping[str, str]) -> bool:
    """Whether the sender has planned by this text: it is of a pile, or names places in it."""
    told = {name.lower(): value.strip().lower() for name, value in headers.items()}
    return told.get(PRIORITY_HEADER.lower()) == BATCH or bool(told.get(SHARED_HEADER.lower()))


def parse_ends(text: str) -> list[SharedEnd]:
    """`segment:characters`, separated by commas, in ascending order; none for an empty text.

    Raises:
        RequestError: it isn't that, or there are too many.
    """
    if not text.strip():
        return []
    ends = []
    for part in text.split(","):
        segment, _, chars = part.strip().partition(":")
        if not (segment.isdecimal() and chars.isdecimal() and len(part) < 40):
            raise RequestError(
                f"{SHARED_HEADER} is a list of `segment:characters`, not {part.strip()[:40]!r}."
            )
        ends.append(SharedEnd(int(segment), int(chars)))
    if len(ends) > _MAX_ENDS:
        raise RequestError(f"{SHARED_HEADER} names {len(ends)} places; {_MAX_ENDS} at most.")
    return sorted(ends)


def format_ends(ends: Sequence[SharedEnd]) -> str:
    """The header's value; the deepest places if there are too many."""
    return ", ".join(f"{end.segment}:{end.chars}" for end in sorted(ends)[-_MAX_ENDS:])
