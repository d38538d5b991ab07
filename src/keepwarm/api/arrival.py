"""What becomes of a client's body before anything else reads it, by the API it came by.

Nothing a client sends is dropped in silence: what the engine would refuse or the template can't
take goes on in a form that they do, and each such change is counted by name; the counts are told
in `X-Keepwarm-Hygiene`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keepwarm.api import items, messages
from keepwarm.api.mending import with_whole_arguments
from keepwarm.api.reading import Api
from keepwarm.api.steering import RULE, SystemPlaces, steered
from keepwarm.core.hygiene import Cleaned, Hygiene

ARGUMENTS = "mend-arguments"
TURNED, LEFT_OUT = "turn-items", "leave-out-items"
"""The changes that aren't rules of hygiene: what the engine would refuse otherwise."""
CHANGES = (RULE, ARGUMENTS, TURNED, LEFT_OUT)


class Arrived(NamedTuple):
    """A body as it goes on: of which API of the engine's, what was changed how often."""

    api: Api
    body: dict[str, Any]
    rewrites: Mapping[str, int]


def arrived(
    kind: str,
    body: dict[str, Any],
    *,
    hygiene: Hygiene,
    takes: SystemPlaces,
    keeps_text: bool = False,
) -> Arrived:
    """A client's body as it goes on; what nothing applies to is the same object.

    Args:
        kind: the client's API: `chat`, `responses`, `messages`, or `completion`.
        body: as it was sent.
        hygiene: the deployment's rules.
        takes: where the running template takes system messages.
        keeps_text: somebody counts the texts' characters, so those stay as they are.

    Raises:
        RequestError: there is something in it that can't be served.
    """
    return _DOORS[kind](body, hygiene, takes, keeps_text)


def _raw(body: dict[str, Any], *_: object) -> Arrived:
    return Arrived("completion", body, {})


def _chat(body: dict[str, Any], hygiene: Hygiene, takes: SystemPlaces, keeps_text: bool) -> Arrived:
    cleaned = hygiene.clean("chat", body, keeps_text=keeps_text)
    return _whole_chat(cleaned, takes)


def _messages(
    body: dict[str, Any], hygiene: Hygiene, takes: SystemPlaces, keeps_text: bool
) -> Arrived:
    # Before its blocks are joined, so that a line is what the client meant as one.
    body, rewrites = hygiene.clean("messages", body, keeps_text=keeps_text)
    return _whole_chat(Cleaned(messages.chat_request(body), rewrites), takes)


def _whole_chat(cleaned: Cleaned, takes: SystemPlaces) -> Arrived:
    body, mended = with_whole_arguments(cleaned.body)
    body, moved = steered(body, takes)
    return Arrived("chat", body, {**cleaned.rewrites, **_counted({ARGUMENTS: mended, RULE: moved})})


def _responses(
    body: dict[str, Any], hygiene: Hygiene, takes: SystemPlaces, keeps_text: bool
) -> Arrived:
    body, rewrites = hygiene.clean("responses", body, keeps_text=keeps_text)
    mended = items.mended(body)
    body, moved = steered(mended.body, takes, place="input")
    counts = {TURNED: mended.turned, LEFT_OUT: mended.left_out, RULE: moved}
    return Arrived("responses", body, {**rewrites, **_counted(counts)})


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count}


_DOORS: Mapping[str, Callable[[dict[str, Any], Hygiene, SystemPlaces, bool], Arrived]] = {
    "chat": _chat,
    "messages": _messages,
    "responses": _responses,
    "completion": _raw,
}
