"""What is said to the engine for a request, and what comes back: headers, whole replies, pieces."""

from __future__ import annotations

import re
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
# What an event of a stream holds that tells how far the prompt is; in text its quotes are escaped.
PROGRESS = b'"prompt_progress"'
# What the engine says of requests that it can't read or render; never of a slot's failure, nor of
# what a model said ("Failed to parse input at pos").
_UNREADABLE = re.compile(
    r"\[json\.exception|^Failed to parse (?!input at)|^Missing |is required$|^Unsupported "
    r"|^Expected |^Invalid (?!input batch)|While executing|Jinja|^Unable to generate parser"
    r"|^(image|audio|video) input is not supported|^vector::_M_range_check"
)


@dataclass(frozen=True, slots=True)
class WholeReply:
    """A whole reply. `first_byte_s` is when the engine began to answer."""

    status: int
    headers: dict[str, str]
    raw: bytes
    first_byte_s: float


@asynccontextmanager
async def post_body(
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


async def read_whole(upstream: Response, *, opening: str = "") -> WholeReply:
    """Read a reply to its end; a stream of chat chunks becomes the whole completion.

    `opening`: see `gather_chat`.

    Raises:
        EngineDownError: it broke off.
        EngineError: it has status 200 and isn't JSON: garbage is never passed on as an answer.
    """
    raw = await upstream.read_some()
    while raw and upstream.is_stream and is_quiet(raw):
        raw = await upstream.read_some()
    first_byte_s = time.monotonic()
    raw += await upstream.read()
    status = upstream.status
    headers = reply_headers(upstream.headers)
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
    status, raw = corrected_blame(status, raw)
    return WholeReply(status, headers, raw, first_byte_s)


def is_quiet(raw: bytes) -> bool:
    """Whether these bytes of a stream are no words yet: pings, and how far the prompt is."""
    return all(
        not line.strip() or line.startswith(b":") or PROGRESS in line for line in raw.split(b"\n")
    )


def corrected_blame(status: int, raw: bytes) -> tuple[int, bytes]:
    """An answer's status and body; a 500 for a request that can't be read becomes a 400.

    The engine gives 500 for whatever is thrown while it reads a request. Clients send such a
    request again and again, and it is as wrong each time.
    """
    if status != 500:
        return status, raw
    try:
        said = msgspec.json.decode(raw)["error"]
        is_clients = _UNREADABLE.search(said["message"]) is not None
    except (msgspec.DecodeError, KeyError, TypeError, RecursionError):
        return status, raw
    if not is_clients:
        return status, raw
    error = {**said, "code": 400, "type": "invalid_request_error"}
    return 400, msgspec.json.encode({"error": error})


def _check_json(raw: bytes) -> None:
    try:
        msgspec.json.decode(raw, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise EngineError("The engine's answer isn't JSON.") from error


def reply_headers(headers: Mapping[str, str], *, is_unchanged: bool = False) -> dict[str, str]:
    """The engine's headers for the client; `is_unchanged` as in `request_headers`."""
    skipped = _SKIPPED - {"content-encoding"} if is_unchanged else _SKIPPED
    # Which pages may read a reply is for the door to say.
    return {
        name: value
        for name, value in headers.items()
        if (low := name.lower()) not in skipped and not low.startswith("access-control-")
    }
