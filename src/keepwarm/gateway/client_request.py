"""A request as its sender asked it; see `core.hints` for what its headers say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from keepwarm.api.arrival import arrived
from keepwarm.api.dialect import OPENAI, Dialect
from keepwarm.api.reading import Api, read
from keepwarm.api.steering import SystemPlaces
from keepwarm.core.hints import (
    PRIORITY_HEADER,
    SHARED_HEADER,
    is_planned,
    parse_ends,
    parse_priority,
)
from keepwarm.core.hygiene import Hygiene
from keepwarm.core.prompt import SharedEnd, is_raw, segments_of
from keepwarm.errors import RequestError
from keepwarm.tiers.tiering import TieredRequest

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

# Paths that ask how long a prompt is, and the client's API.
COUNTED: Mapping[str, str] = {
    "/v1/messages/count_tokens": "messages",
    "/v1/responses/input_tokens": "responses",
    "/responses/input_tokens": "responses",
    "/v1/chat/completions/input_tokens": "chat",
    "/chat/completions/input_tokens": "chat",
}


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request: whose, of which API, to which path of the engine, and how it is answered.

    `rewrites` counts what was changed in the body on its way; `chat` is the body in chat's terms.
    """

    api: Api
    body: dict[str, Any]
    namespace: str
    path: str
    headers: Mapping[str, str]
    dialect: Dialect = OPENAI
    rewrites: Mapping[str, int] = field(default_factory=dict)
    chat: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Read the body once."""
        object.__setattr__(self, "chat", read(self.api, self.body))

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

    def ends(self, tiered: TieredRequest) -> list[SharedEnd]:
        """The shared places that the header names, in the segments of the composed request.

        A tier puts its messages before the sender's, so a sender's segment is counted from the end.

        Raises:
            RequestError: the header can't be read or names a segment that isn't there.
        """
        named = parse_ends(self.headers.get(SHARED_HEADER, ""))
        if not named or is_raw(self.chat):
            return named
        own = len(segments_of(self.chat))
        shift = len(segments_of(tiered.chat)) - own
        for end in named:
            if end.segment > own or (end.segment == own and end.chars):
                raise RequestError(
                    f"{SHARED_HEADER} names message {end.segment}, but there are {own}."
                )
        return [SharedEnd(max(end.segment + shift, 0), end.chars) for end in named]


def asked_of(
    asked: ClientRequest, hygiene: Hygiene, takes: SystemPlaces, *, kind: str = ""
) -> ClientRequest:
    """The request as it goes on, from one that has the body its client sent.

    A batch's texts are kept: its planner has cut them at places that are counted in characters.

    Args:
        asked: as it came.
        hygiene: the deployment's rules.
        takes: where the running template takes system messages.
        kind: the client's API, where it isn't the engine's.

    Raises:
        RequestError: there is something in it that can't be served.
    """
    keeps_text = is_planned(asked.headers)
    api, body, rewrites = arrived(
        kind or asked.api, asked.body, hygiene=hygiene, takes=takes, keeps_text=keeps_text
    )
    if body is asked.body and api == asked.api:
        return asked
    return replace(asked, api=api, body=body, rewrites=rewrites)
