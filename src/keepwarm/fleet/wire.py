"""What front, router and nodes tell each other: plain values that travel anywhere.

Pure. Tokens that a template or a tier adds are the same on every node, so they don't matter for a
choice between nodes. A request is known to the router by numbers, made here from its body alone:
the digests of `core.prompt`, keyed by who asks, cut to 64 bits. Whoever asks is told apart by the
credentials as they were sent, so that no tenant's warmth answers another's question, whatever the
keys mean.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from keepwarm.api.arrival import arrived
from keepwarm.api.reading import Api, read
from keepwarm.api.steering import SystemPlaces
from keepwarm.core.hints import NODE_HEADER, is_planned
from keepwarm.core.hygiene import Hygiene, hygiene_of
from keepwarm.core.prompt import prompt_of
from keepwarm.errors import KeepwarmError, TooLargeError
from keepwarm.fleet.costs import NodeCosts
from keepwarm.fleet.routing import NodeReport, Want
from keepwarm.gateway.client_request import PLANNED

_MESSAGES = "/v1/messages"
# An estimate that serves until a node has reported what it measured (English text, common models).
TOKENS_PER_CHAR = 0.26


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request on its way to a node.

    `prefixes` and `ends_chars` are its marks for routing, shortest first; empty where any node will
    do. `node` is the one it would rather go to, by the fleet's name for it or its own.
    """

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    prefixes: list[int]
    ends_chars: list[int]
    node: str = ""

    def want(self, tokens_per_char: float) -> Want:
        """The same for the router."""
        ends = [int(chars * tokens_per_char) for chars in self.ends_chars]
        return Want(self.prefixes, ends, ends[-1] if ends else 1)


class NodeNote(msgspec.Struct, frozen=True, kw_only=True):
    """A node's report, and what it says of itself for people."""

    taken_s: float
    backlog_s: float
    costs: NodeCosts
    tokens_per_char: float
    held: bytes
    stored: bytes
    state: str
    about: dict[str, Any]

    def report(self) -> NodeReport:
        """As the router's state takes it."""
        return NodeReport(
            taken_s=self.taken_s,
            backlog_s=self.backlog_s,
            costs=self.costs,
            held=unpacked(self.held),
            stored=unpacked(self.stored),
        )


def packed(numbers: Sequence[int]) -> bytes:
    """64-bit numbers as bytes."""
    return array.array("Q", numbers).tobytes()


def unpacked(data: bytes) -> list[int]:
    """The numbers again. Raises: ValueError if these aren't whole ones."""
    numbers = array.array("Q")
    numbers.frombytes(data)
    return numbers.tolist()


def ask_of(
    method: str,
    path_qs: str,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    hygiene: Hygiene | None = None,
) -> Ask:
    """Read what of a request the router needs. A body that isn't understood goes to any node, which
    will say what is wrong with it.

    `hygiene` is the nodes': a request is known by what they make of it, and travels as it came.
    """
    prefixes: list[int] = []
    ends: list[int] = []
    path = path_qs.partition("?")[0]
    if method == "POST" and (path in PLANNED or path == _MESSAGES):
        # Whatever is wrong with a body is for the node to say; any node can.
        with contextlib.suppress(msgspec.MsgspecError, KeepwarmError):
            decoded = msgspec.json.decode(body, type=dict)
            kind = "messages" if path == _MESSAGES else PLANNED[path]
            told = dict(headers)
            came = arrived(
                kind,
                decoded,
                hygiene=hygiene or hygiene_of((), ()),
                takes=SystemPlaces(),
                keeps_text=is_planned(told),
            )
            prefixes, ends = _marks(came.api, came.body, headers)
    return Ask(
        method=method,
        path=path_qs,
        headers=list(headers),
        body=body,
        prefixes=prefixes,
        ends_chars=ends,
        node=_asked_node(headers),
    )


def _marks(
    api: Api, body: dict[str, Any], headers: Sequence[tuple[str, str]]
) -> tuple[list[int], list[int]]:
    told = {name.lower(): value for name, value in headers}
    who = f"{told.get('authorization', '')}\0{told.get('x-api-key', '')}"
    whose = hashlib.blake2b(who.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    # A tier is composed in by the node; which one is asked for is part of what the prompt is.
    tier = f"{told.get('x-keepwarm-tier', '')}\0{body.get('model', '')}"
    prompt = prompt_of(read(api, body), fingerprint=f"fleet\0{tier}", namespace=whose)
    marks = [mark for mark in prompt.marks if mark.chars > 0]
    return (
        [int.from_bytes(mark.digest[:8], "little") for mark in marks],
        [mark.chars for mark in marks],
    )


def _asked_node(headers: Sequence[tuple[str, str]]) -> str:
    """The node that a sender would rather have."""
    return next((v.strip() for k, v in headers if k.lower() == NODE_HEADER.lower()), "")


async def bounded(chunks: AsyncIterator[bytes], declared: str | None, *, most: int) -> bytes:
    """A request's body, no more of it than allowed.

    Args:
        chunks: it, as it comes.
        declared: its `Content-Length`, if there is one.
        most: bytes (`server.max_body_bytes`).

    Raises: TooLargeError; what came is dropped.
    """
    too_large = TooLargeError(f"The request body is over {most:,} bytes (server.max_body_bytes).")
    if declared and declared.isdecimal() and int(declared) > most:
        raise too_large
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)
