"""A request as its sender asked it; see `core.hints` for what its headers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.core.hints import PRIORITY_HEADER, SHARED_HEADER, parse_ends, parse_priority
from keepwarm.core.prompt import Api, SharedEnd, segments_of
from keepwarm.errors import RequestError
from keepwarm.gateway.dialect import OPENAI, Dialect
from keepwarm.gateway.tiering import Tiered


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: whose, of which API, to which path of the engine, and how it is answered."""

    api: Api
    body: dict[str, Any]
    namespace: str
    path: str
    headers: Mapping[str, str]
    dialect: Dialect = OPENAI

    @property
    def priority(self) -> int:
        """The scheduler's: 0 interactive, 1 batch.

        Raises:
            RequestError: the header says something else.
        """
        return parse_priority(self.headers.get(PRIORITY_HEADER, ""))

    def ends(self, tiered: Tiered) -> list[SharedEnd]:
        """The shared places that the header names, in the segments of the composed request.

        A tier puts its messages before the sender's, so a sender's segment is counted from the end.

        Raises:
            RequestError: the header can't be read or names a segment that isn't there.
        """
        named = parse_ends(self.headers.get(SHARED_HEADER, ""))
        if not named or self.api == "completion":
            return named
        own = len(segments_of(self.api, self.body))
        shift = len(segments_of(self.api, tiered.body)) - own
        for end in named:
            if end.segment > own or (end.segment == own and end.chars):
                raise RequestError(
                    f"{SHARED_HEADER} names message {end.segment}, but there are {own}."
                )
        return [SharedEnd(max(end.segment + shift, 0), end.chars) for end in named]
