"""The one table of what a client may ask for. What isn't in it reaches nobody.

A path is brought into its normal form before it is looked up, since the engine decodes paths, too:
what we read as unknown must not be a route of its own. The engine is asked for the table's path,
never for the client's, and hears only the headers named here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import unquote


class Way(StrEnum):
    """Who answers."""

    PLANNED = "planned"  # the engine, in a slot that was chosen for the request
    OWN = "own"  # Keepwarm
    PASSED = "passed"  # the engine; no slot is touched
    REFUSED = "refused"


class Access(StrEnum):
    """Who may ask: whether a key is needed where there are keys, and which web sites may."""

    OPEN = "open"  # no key, and nothing to see
    API = "api"  # a key; other web sites by the rules of CORS
    SITE = "site"  # no key, no data; pages of this very address
    OWN = "own"  # a key; pages of this very address


@dataclass(frozen=True, slots=True)
class Route:
    """One line of the table. `{name}` in a path is one segment, `{name*}` the rest.

    `handler` names what answers where Keepwarm does; `reason` is what a refused client is told,
    with `status`.
    """

    method: str
    path: str
    way: Way
    access: Access = Access.API
    handler: str = ""
    reason: str = ""
    status: int = 403


_SLOTS = "Slots are saved, restored and erased by Keepwarm itself; /slots is read-only here."
_ADAPTERS = (
    "Adapters for all requests can't be changed while Keepwarm keeps what was computed without the "
    'change. Name them in a request ("lora"), or start the server with them.'
)
_PROPS = (
    "The engine's properties can't be changed while Keepwarm keeps what was computed with them."
)
_STREAMS = (
    "Streams that outlive their client aren't served: anyone who knows a conversation's id could "
    "read or end it, and its slot would decode for nobody."
)
_CONTROL = (
    "A running completion can't be changed from outside: it may be another client's. End it by "
    "closing its connection."
)
_NO_SLOT = (
    "This would be computed in a slot that the engine chooses, and what is warm there would be "
    "lost. Start a server of its own for it."
)
_NETWORK = "This would let a client use the server's own network or run its tools."
_MODELS = "Models can't be loaded or unloaded here: Keepwarm keeps the state of the one it runs."

_CHAT = ("/v1/chat/completions", "/chat/completions")
_RESPONSES = ("/v1/responses", "/responses")
_COMPLETIONS = ("/completion", "/completions", "/v1/completions", "/infill")
_COUNTS = (*(f"{path}/input_tokens" for path in _CHAT + _RESPONSES), "/v1/messages/count_tokens")
_READS_TEXT = ("/tokenize", "/detokenize", "/apply-template")
# What the engine's own page is made of.
_ENGINE_PAGES = (
    *("/index.html", "/favicon.ico", "/favicon.svg", "/favicon-dark.ico", "/favicon-dark.svg"),
    *("/sw.js", "/build.json", "/manifest.webmanifest", "/_app/{file*}", "/loading.html"),
    *("/bundle.js", "/bundle.css", "/bundle.{hash}.js", "/bundle.{hash}.css"),
)
_SLOT_TAKERS = (
    *("/embedding", "/embeddings", "/v1/embeddings", "/v1/systemone"),
    *("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"),
    *("/audio/transcriptions", "/v1/audio/transcriptions"),
)


def _table() -> Iterator[Route]:
    for path in (*_CHAT, *_RESPONSES, *_COMPLETIONS):
        yield Route("POST", path, Way.PLANNED)
    yield Route("POST", "/v1/messages", Way.PLANNED)
    for path in _COUNTS:
        yield Route("POST", path, Way.PLANNED)
    for path in _READS_TEXT:
        yield Route("POST", path, Way.PASSED)
    for path in ("/props", "/lora-adapters"):
        yield Route("GET", path, Way.PASSED)
    yield from _own("GET", "/health", "health", Access.OPEN)
    yield from _own("GET", "/v1/health", "health", Access.OPEN)
    yield from _own("GET", "/metrics", "metrics")
    yield from _own("GET", "/slots", "engine_slots")
    yield from _own("GET", "/models", "models")
    yield from _own("GET", "/v1/models", "models")
    yield from _own("POST", "/v1/files", "upload")
    yield from _own("GET", "/v1/files", "files")
    yield from _own("GET", "/v1/files/{id}", "file")
    yield from _own("DELETE", "/v1/files/{id}", "delete_file")
    yield from _own("GET", "/v1/files/{id}/content", "file_content")
    yield from _own("POST", "/v1/batches", "create_batch")
    yield from _own("GET", "/v1/batches", "batches")
    yield from _own("GET", "/v1/batches/{id}", "batch")
    yield from _own("POST", "/v1/batches/{id}/cancel", "cancel_batch")
    yield from _own("GET", "/keepwarm", "page", Access.SITE)
    for name in ("status", "overview", "slots", "events", "requests", "store"):
        yield from _own("GET", f"/keepwarm/{name}", name, Access.OWN)
    yield from _own("GET", "/keepwarm/requests/{id}", "request", Access.OWN)
    yield from _own("POST", "/keepwarm/store/{extent}/{action}", "change_store", Access.OWN)
    yield from _own("POST", "/keepwarm/store/forget", "forget", Access.OWN)
    yield from _own("POST", "/keepwarm/route", "route", Access.OWN)
    yield from _own("GET", "/keepwarm/models", "models_now", Access.OWN)
    yield from _own("POST", "/keepwarm/models/{name}/{action}", "change_model", Access.OWN)
    yield from _own("POST", "/keepwarm/warm-prefix", "warm_prefix", Access.OWN)
    yield Route("HEAD", "/", Way.OWN, Access.SITE, "knock")
    for path in ("/", *_ENGINE_PAGES):
        yield Route("GET", path, Way.PASSED, Access.SITE)
    yield from _refused(_SLOTS, "POST /slots/{id}", "POST /slots")
    yield from _refused(_ADAPTERS, "POST /lora-adapters")
    yield from _refused(_PROPS, "POST /props")
    yield from _refused(_CONTROL, *(f"POST {path}/control" for path in _CHAT))
    for method in ("GET", "POST", "DELETE"):
        for path in ("/v1/stream", "/v1/stream/{id*}", "/v1/streams", "/v1/streams/{id*}"):
            yield from _refused(_STREAMS, f"{method} {path}")
        yield from _refused(_NETWORK, f"{method} /cors-proxy", f"{method} /tools")
    yield from _refused(_MODELS, "POST /models/load", "POST /models/unload")
    # As the engine says it of what a model can't do.
    yield from _refused(_NO_SLOT, *(f"POST {path}" for path in _SLOT_TAKERS), status=501)


def _own(method: str, path: str, handler: str, access: Access = Access.API) -> Iterator[Route]:
    yield Route(method, path, Way.OWN, access, handler)


def _refused(reason: str, *asked: str, status: int = 403) -> Iterator[Route]:
    for line in asked:
        method, _, path = line.partition(" ")
        yield Route(method, path, Way.REFUSED, reason=reason, status=status)


ROUTES: tuple[Route, ...] = tuple(_table())

_EXACT: Mapping[tuple[str, str], Route] = {
    (route.method, route.path): route for route in ROUTES if "{" not in route.path
}


def _expression(path: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\*?\})", path)
    return re.compile(
        "".join(
            re.escape(part)
            if not part.startswith("{")
            else f"(?P<{part[1:-2]}>.+)"
            if part.endswith("*}")
            else f"(?P<{part[1:-1]}>[^/]+)"
            for part in parts
        )
    )


_PATTERNS = [(route, _expression(route.path)) for route in ROUTES if "{" in route.path]
# Every path of the table is written with these alone. What else a path may hold (a second layer of
# percent signs, backslashes, semicolons, bytes that aren't ASCII) is read differently by everyone.
_PLAIN = re.compile(r"/[A-Za-z0-9/_.:@~+=,-]*")
_LONGEST_PATH = 1024


def normal_path(raw: str) -> str | None:
    """A path as the table writes it: decoded, without a slash at its end; None if it is odd."""
    path = raw
    if "%" in path:
        try:
            path = unquote(path, errors="strict")
        except UnicodeDecodeError:
            return None
    if len(path) > _LONGEST_PATH or not _PLAIN.fullmatch(path):
        return None
    if len(path) > 1 and path.endswith("/"):
        path = path[:-1]
    segments = path.split("/")[1:]
    if path != "/" and any(segment in ("", ".", "..") for segment in segments):
        return None
    return path


@dataclass(frozen=True, slots=True)
class Found:
    """A request's line of the table, and what stands at the places of its `{names}`."""

    route: Route
    path: str
    names: Mapping[str, str]


def find(method: str, raw_path: str) -> Found | None:
    """The line of the table for a request; None if there is none. HEAD is asked like GET."""
    path = normal_path(raw_path)
    if path is None:
        return None
    for asked in (method, "GET") if method == "HEAD" else (method,):
        if route := _EXACT.get((asked, path)):
            return Found(route, path, {})
        for route, expression in _PATTERNS:
            if route.method == asked and (match := expression.fullmatch(path)):
                return Found(route, path, match.groupdict())
    return None


def methods_of(raw_path: str) -> tuple[str, ...]:
    """The methods that a path is asked with; none if nothing is there."""
    path = normal_path(raw_path)
    if path is None:
        return ()
    found = {
        route.method
        for route in ROUTES
        if route.way is not Way.REFUSED
        and (route.path == path or ("{" in route.path and _expression(route.path).fullmatch(path)))
    }
    return tuple(sorted(found | ({"HEAD"} if "GET" in found else set())))


def access_of(raw_path: str) -> Access:
    """The strictest access to a path by any method.

    What isn't in the table is an API's, but for pages of ours that there aren't.
    """
    found = [find(method, raw_path) for method in ("GET", "POST", "DELETE")]
    accesses = {one.route.access for one in found if one}
    strictest = (Access.OWN, Access.SITE, Access.API, Access.OPEN)
    path = normal_path(raw_path) or ""
    unknown = Access.OWN if path.startswith("/keepwarm") else Access.API
    return next((access for access in strictest if access in accesses), unknown)


# What the engine is told of a request. Everything else is between the client and us: a key,
# cookies, where a page comes from, and names under which the engine would keep a stream.
_TOLD = frozenset(
    (
        *("accept", "accept-language", "user-agent", "x-request-id", "traceparent", "tracestate"),
        *("anthropic-version", "anthropic-beta"),
    )
)
_TOLD_UNCHANGED = _TOLD | {
    *("accept-encoding", "content-type", "if-none-match", "if-modified-since", "range"),
}


def request_headers(headers: Mapping[str, str], *, is_unchanged: bool = False) -> dict[str, str]:
    """Request headers for the engine, of those that are allowed.

    `is_unchanged`: body and reply go as they come; otherwise the body is JSON of our own, and the
    reply is read here.
    """
    told = _TOLD_UNCHANGED if is_unchanged else _TOLD
    out = {name: value for name, value in headers.items() if name.lower() in told}
    return out if is_unchanged else {**out, "Content-Type": "application/json"}
