"""What is said to the engine for a request, and what comes back: headers, whole replies, pieces."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Any

import msgspec

from keepwarm.core.gathered import gather_chat
from keepwarm.core.reply import stream_events
from keepwarm.engine.http import EngineHttp, Response
from keepwarm.errors import EngineDownError, EngineError

# What is between two neighbours only (RFC 9110, 7.6.1), and what each end says of itself.
_SKIPPED = frozenset(
    (
        *("connection", "content-length", "transfer-encoding", "keep-alive"),
        *("expect", "te", "trailer", "upgrade", "proxy-connection"),
        *("host", "content-encoding", "server"),
    )
)


@dataclass(frozen=True, slots=True)
class Fetched:
    """A whole reply. `first_byte_s` is when the engine began to answer."""

    status: int
    headers: dict[str, str]
    raw: bytes
    first_byte_s: float


@asynccontextmanager
async def posted(
    http: EngineHttp, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> AsyncIterator[Response]:
    """Send a request and have its response, closed at the end: that ends a stream's decode.

    Raises:
        EngineDownError: there is no engine, or it loads its model: nothing was computed.
    """
    sent = http.request("POST", path, headers=headers, body=msgspec.json.encode(body))
    with closing(await sent) as upstream:
        if upstream.status == 503:
            # Only while its model loads: it was started anew, and its slots are empty.
            raise EngineDownError("The engine is loading its model.")
        yield upstream


async def read_whole(upstream: Response, *, opening: str = "") -> Fetched:
    """Read a reply to its end; a stream of chat chunks becomes the whole completion.

    `opening`: see `gather_chat`.

    Raises:
        EngineDownError: it broke off.
        EngineError: it has status 200 and isn't JSON: garbage is never passed on as an answer.
    """
    raw = await upstream.read_some()
    first_byte_s = time.monotonic()
    raw += await upstream.read()
    status = upstream.status
    headers = returned(upstream.headers)
    if upstream.is_stream:
        whole = gather_chat(stream_events(raw), opening=opening)
        if whole is None:
            raise EngineDownError("The engine closed the stream before its end.")
        if error := whole.get("error"):
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
        raw = msgspec.json.encode(whole)
        headers["Content-Type"] = "application/json; charset=utf-8"
    elif status == 200:
        _check_json(raw)
    return Fetched(status, headers, raw, first_byte_s)


def _check_json(raw: bytes) -> None:
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise EngineError("The engine's answer isn't JSON.") from error


def forwarded(headers: Mapping[str, str], *, is_unchanged: bool = False) -> dict[str, str]:
    """Request headers for the engine: not the client's key, nor what describes its connection.

    `is_unchanged`: the reply goes to the client as it comes; otherwise the body is JSON of our own,
    and the reply is read here.
    """
    dropped = _SKIPPED | {"authorization", "x-api-key"}
    if is_unchanged:
        return {k: v for k, v in headers.items() if k.lower() not in dropped}
    dropped |= {"accept-encoding", "content-type"}
    out = {k: v for k, v in headers.items() if k.lower() not in dropped}
    return {**out, "Content-Type": "application/json"}


def returned(headers: Mapping[str, str], *, is_unchanged: bool = False) -> dict[str, str]:
    """The engine's headers for the client; `is_unchanged` as in `forwarded`."""
    skipped = _SKIPPED - {"content-encoding"} if is_unchanged else _SKIPPED
    return {k: v for k, v in headers.items() if k.lower() not in skipped}
