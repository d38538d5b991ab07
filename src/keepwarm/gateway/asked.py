"""A request as its sender asked it; see `core.hints` for what its headers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keepwarm.core.hints import (
    PRIORITY_HEADER,
    SHARED_HEADER,
    is_planned,
    parse_ends,
    parse_priority,
)
from keepwarm.core.hygiene import Cleaned, Hygiene, Kind
from keepwarm.core.prompt import Api, SharedEnd, segments_of
from keepwarm.errors import RequestError
from keepwarm.gateway.dialect import OPENAI, Dialect
from keepwarm.tiers.tiering import Tiered

# An editor asks for what belongs in a gap at every pause of typing; nothing continues such prompts.
INFILL = "/infill"
MESSAGES = "/v1/messages"
# Paths whose requests get a slot that was chosen for them, and the shape of their bodies.
PLANNED: Mapping[str, Api] = {
    "/v1/chat/completions": "chat",
    "/chat/completions": "chat",
    "/v1/responses": "responses",
    "/responses": "responses",
    "/completion": "completion",
    "/completions": "completion",
    "/v1/completions": "completion",
    INFILL: "completion",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: whose, of which API, to which path of the engine, and how it is answered.

    `rewrites` counts what hygiene changed in the body.
    """

    api: Api
    body: dict[str, Any]
    namespace: str
    path: str
    headers: Mapping[str, str]
    dialect: Dialect = OPENAI
    rewrites: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_infill(self) -> bool:
        """Whether code for a gap is asked for."""
        return self.path.startswith(INFILL)

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


def cleaned(asked: Asked, hygiene: Hygiene | None) -> Asked:
    """The request with its body cleaned."""
    if hygiene is None or asked.api == "completion":
        return asked
    body, rewrites = cleaned_body(hygiene, asked.api, asked.body, asked.headers)
    return replace(asked, body=body, rewrites=rewrites) if rewrites else asked


def cleaned_body(
    hygiene: Hygiene | None, kind: Kind, body: dict[str, Any], headers: Mapping[str, str]
) -> Cleaned:
    """A client's body as it goes on; the same one if no rule applies.

    A batch's texts are kept: its planner has cut them at places that are counted in characters.
    """
    if hygiene is None:
        return Cleaned(body, {})
    return hygiene.clean(kind, body, keeps_text=is_planned(headers))
