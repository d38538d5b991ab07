"""A request as its sender asked it, and what the sender says about it in `X-Keepwarm-*` headers.

Two headers tell the scheduler what a body can't:

- `X-Keepwarm-Priority: batch`: one task of a pile. It gets a slot when no interactive request waits
  for one, waits as long as its sender does, and nobody is expected to go on from its end.
- `X-Keepwarm-Shared: 0:3584, 2:0`: places up to which other requests begin alike, as
  `segment:characters` of the sender's own messages (a system prompt of its own counts as the
  first): here the first 3,584 characters of message 0, and everything before message 2. Each gets
  a mark, so a prefix that ends there is found to the character. Saying something wrong costs
  nothing but the mark.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.core.prompt import Api, SharedEnd, segments_of
from keepwarm.errors import RequestError
from keepwarm.gateway.tiering import Tiered

PRIORITY_HEADER = "X-Keepwarm-Priority"
SHARED_HEADER = "X-Keepwarm-Shared"
BATCH = "batch"
_PRIORITIES = {"": 0, "interactive": 0, BATCH: 1}
# A path in a prefix tree is rarely deeper than this, and each costs a digest.
_MAX_ENDS = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: whose, of which API, and to which path of the engine it goes."""

    api: Api
    body: dict[str, Any]
    namespace: str
    path: str
    headers: Mapping[str, str]

    @property
    def priority(self) -> int:
        """The scheduler's: 0 interactive, 1 batch.

        Raises:
            RequestError: the header says something else.
        """
        said = self.headers.get(PRIORITY_HEADER, "").strip().lower()
        if said not in _PRIORITIES:
            raise RequestError(f"{PRIORITY_HEADER} is `batch` or `interactive`, not {said!r}.")
        return _PRIORITIES[said]

    def ends(self, tiered: Tiered) -> list[SharedEnd]:
        """The shared places that the header names, in the segments of the composed request.

        A tier puts its messages before the sender's, so a sender's segment is counted from the end.

        Raises:
            RequestError: the header can't be read or names a segment that isn't there.
        """
        text = self.headers.get(SHARED_HEADER, "")
        if not text.strip():
            return []
        named = parse_ends(text)
        if self.api == "completion":
            return named
        own = len(segments_of(self.api, self.body))
        composed = len(segments_of(self.api, tiered.body))
        shift = composed - own
        for end in named:
            if end.segment > own or (end.segment == own and end.chars):
                raise RequestError(
                    f"{SHARED_HEADER} names message {end.segment}, but there are {own}."
                )
        return [SharedEnd(max(end.segment + shift, 0), end.chars) for end in named]


def parse_ends(text: str) -> list[SharedEnd]:
    """`segment:characters`, separated by commas, in ascending order.

    Raises:
        RequestError: it isn't that, or there are too many.
    """
    ends = []
    for part in text.split(","):
        segment, _, chars = part.strip().partition(":")
        # isdecimal admits digits of all scripts, and int() reads them all.
        if not (segment.isdecimal() and chars.isdecimal() and len(part) < 40):
            raise RequestError(
                f"{SHARED_HEADER} is a list of `segment:characters`, not {part.strip()[:40]!r}."
            )
        ends.append(SharedEnd(int(segment), int(chars)))
    if len(ends) > _MAX_ENDS:
        raise RequestError(f"{SHARED_HEADER} names {len(ends)} places; {_MAX_ENDS} at most.")
    return sorted(ends)


def format_ends(ends: list[SharedEnd]) -> str:
    """The header's value; the deepest ones if there are too many."""
    return ", ".join(f"{end.segment}:{end.chars}" for end in sorted(ends)[-_MAX_ENDS:])
