"""The one way in: every request is looked up, let in or refused, answered, and told what failed.

In this order, whatever the route: its line of the table (`api.routes`), the web site it comes from
(`api.origins`), its key, its body's size and pace; only then what answers. Each refusal is JSON in
the dialect of the API that was asked, and readable for the pages that may ask.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from keepwarm.api.dialect import OPENAI, Dialect, dialect_of
from keepwarm.api.origins import Origins, preflight_headers, reply_headers
from keepwarm.api.routes import Access, Found, Route, Way, access_of, find, methods_of
from keepwarm.deployment.life import Life
from keepwarm.errors import (
    EngineRefusedError,
    ForbiddenError,
    KeepwarmError,
    NotFoundError,
    QueueFullError,
    RequestError,
    TooLargeError,
)

log = logging.getLogger("keepwarm")

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
_QUERY = re.compile(r"[!-~]{0,8000}")
# A body may take this long, and longer by what has come of it: a slow line sends on, a stuck one
# is cut off.
_BODY_S = 30.0
_BODY_BYTES_PER_S = 20_000


class UnservedError(RequestError):
    """The route is known and not served here, as the engine says it of what it can't do."""

    status = 501
    kind = "not_supported_error"


class SlowBodyError(RequestError):
    """The body didn't come within its time."""

    status = 408
    kind = "timeout_error"


class BrokenBodyError(RequestError):
    """The body's frame is wrong: it ended too early, or its chunks or its encoding are broken."""


class TooMuchHeldError(QueueFullError):
    """The bodies of requests that are being read, waiting or served take too much memory."""


class UnforeseenError(KeepwarmError):
    """A fault of ours. The client is told that much, the log the rest."""


class HeldBodies:
    """Bytes of bodies that are held for requests which haven't ended, in all and by tenant."""

    def __init__(self, limit_bytes: int, *, tenants: int) -> None:
        self._limit_bytes = limit_bytes
        self._share_bytes = limit_bytes if tenants == 1 else limit_bytes // 2
        self._held: dict[str, int] = {}

    def take(self, namespace: str, size_bytes: int) -> None:
        """Hold some more.

        Raises:
            TooMuchHeldError: there is no room; it isn't held.
        """
        own = self._held.get(namespace, 0) + size_bytes
        if own > self._share_bytes or sum(self._held.values()) + size_bytes > self._limit_bytes:
            raise TooMuchHeldError(
                "The requests that are being served hold too much memory (server.queue_bytes). "
                "Try again later."
            )
        self._held[namespace] = own

    def release(self, namespace: str, size_bytes: int) -> None:
        """Hold it no more."""
        self._held[namespace] -= size_bytes
        if not self._held[namespace]:
            del self._held[namespace]


# What proxies write into their logs for it; it reaches nobody.
_CLIENT_LEFT = 499

# What is read of a request by its handler: whose it is, and its line of the table.
_NAMESPACE = web.RequestKey("namespace", str)
_FOUND = web.RequestKey("found", Found)
# The page that may read the reply.
_ORIGIN = web.RequestKey("origin", str)
_BODY_BYTES = web.RequestKey("body_bytes", int)
_HELD = web.RequestKey("held", HeldBodies)


class Door:
    """See the module. `answers` are the handlers by the table's names, and those of two ways."""

    def __init__(
        self, life: Life, *, own: Mapping[str, Answer], planned: Answer, passed: Answer
    ) -> None:
        server = life.settings.server
        self._life = life
        self._own, self._planned, self._passed = own, planned, passed
        # One body of the largest size has room in each share.
        room_bytes = max(server.queue_bytes, 2 * server.max_body_bytes)
        self._held = HeldBodies(room_bytes, tenants=life.keys.tenants)
        self._origins = Origins(
            tuple(origin.lower().rstrip("/") for origin in server.cors_origins),
            tuple(host.lower() for host in server.hosts),
            has_keys=bool(life.keys),
        )

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer any request."""
        dialect = dialect_of(request.path)
        try:
            return await self._answer(request)
        except EngineRefusedError as error:
            raw = dialect.whole(error.body, status=error.refused_status)
            return web.Response(
                body=raw, status=error.refused_status, content_type="application/json"
            )
        except KeepwarmError as error:
            self._life.metrics.failed(error.kind)
            if error.status >= 500:
                log.warning("%s %s: %s", request.method, request.path, error)
            response = error_response(error, dialect)
            response.headers.update(error.headers)
            return response
        except ConnectionError:
            # The client has left; there is nobody to tell, and nothing that an owner should see.
            log.debug("%s %s: its client has left", request.method, request.path)
            return web.Response(status=_CLIENT_LEFT)

    @property
    def unrouted(self) -> Middleware:
        """Brings what aiohttp finds no route for to the door, too: `OPTIONS *`, `CONNECT`."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.match_info.http_exception is None:
                return await handler(request)
            return await self.answer(request)

        return middleware

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._enter(request)
        except (KeepwarmError, web.HTTPMove, ConnectionError):
            raise
        except web.HTTPRequestEntityTooLarge as error:
            limit = self._life.settings.server.max_body_bytes
            raise TooLargeError(
                f"The request body is over {limit:,} bytes (server.max_body_bytes)."
            ) from error
        except web.HTTPException as error:
            raise RequestError(f"{error.reason}.") from error
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise BrokenBodyError(f"The request body can't be read: {error}.") from error
        except RecursionError as error:
            raise RequestError("The request body is nested too deeply.") from error
        except Exception as error:
            log.exception("%s %s failed", request.method, request.path)
            raise UnforeseenError(
                "Keepwarm failed on this request; its log says where. This is a fault of Keepwarm."
            ) from error

    async def _enter(self, request: web.Request) -> web.StreamResponse:
        raw_path = request.rel_url.raw_path
        if request.method == "OPTIONS":
            return self._preflight(request, raw_path)
        found = find(request.method, raw_path)
        access = found.route.access if found else access_of(raw_path)
        if refusal := self._origins.refusal(access, request.method, request.headers):
            raise ForbiddenError(refusal)
        origin = request.headers.get("Origin", "")
        if origin and access in (Access.API, Access.OPEN):
            request[_ORIGIN] = origin
        namespace = ""
        if access in (Access.API, Access.OWN):
            namespace = self._life.keys.namespace(request.headers)
        if found is None:
            raise NotFoundError(f"There is no {request.method} {request.path[:200]} here.")
        return await self._led(request, found, namespace)

    async def _led(self, request: web.Request, found: Found, namespace: str) -> web.StreamResponse:
        """Let a request through to what answers it."""
        route = found.route
        if route.way is Way.REFUSED:
            raise (UnservedError if route.status == 501 else ForbiddenError)(route.reason)
        if not _QUERY.fullmatch(request.rel_url.raw_query_string):
            raise RequestError("The query can't be read.")
        request[_NAMESPACE], request[_FOUND], request[_HELD] = namespace, found, self._held
        request.match_info.update(found.names)
        try:
            return await self._handled(request, route)
        finally:
            if size_bytes := request.get(_BODY_BYTES):
                self._held.release(namespace, size_bytes)

    async def _handled(self, request: web.Request, route: Route) -> web.StreamResponse:
        if route.way is Way.PLANNED:
            return await self._planned(request)
        if route.way is Way.PASSED:
            return await self._passed(request)
        return await self._own[route.handler](request)

    def _preflight(self, request: web.Request, raw_path: str) -> web.StreamResponse:
        methods = methods_of(raw_path)
        origin = request.headers.get("Origin", "")
        if not origin or "Access-Control-Request-Method" not in request.headers:
            return web.Response(status=204, headers={"Allow": ", ".join(("OPTIONS", *methods))})
        access, headers = access_of(raw_path), request.headers
        refusal = self._origins.refusal(access, "OPTIONS", headers)
        if refusal or not self._origins.lets_in(access, headers.get("Host", ""), origin):
            raise ForbiddenError(refusal or "Another web site may not use this page.")
        return web.Response(status=204, headers=preflight_headers(origin, headers))


async def go_on(request: web.Request) -> None:
    """Ask a client that waits before it sends its body to send it; it is refused behind that."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # It counts as output, behind which no answer could be refused any more.
        request.writer.output_size = 0


async def let_page_read(request: web.Request, response: web.StreamResponse) -> None:
    """Before any reply's headers go: tell the browser that the page it comes from may read it."""
    if origin := request.get(_ORIGIN):
        response.headers.update(reply_headers(origin))


async def read_body(request: web.Request) -> bytes:
    """A request's whole body, within the bounds of size, time and memory.

    Raises:
        TooLargeError, SlowBodyError, TooMuchHeldError: it isn't.
    """
    limit, held, namespace = request.client_max_size, request[_HELD], request[_NAMESPACE]
    loop = asyncio.get_running_loop()
    began_s, raw = loop.time(), bytearray()
    try:
        async with asyncio.timeout_at(began_s + _BODY_S) as timeout:
            while chunk := await request.content.readany():
                held.take(namespace, len(chunk))
                raw += chunk
                request[_BODY_BYTES] = len(raw)
                if limit and len(raw) > limit:
                    raise web.HTTPRequestEntityTooLarge(max_size=limit, actual_size=len(raw))
                # By what has come, so that a large body on a slow line isn't cut off.
                timeout.reschedule(began_s + _BODY_S + len(raw) / _BODY_BYTES_PER_S)
    except TimeoutError as error:
        raise SlowBodyError("The request body didn't come in time.") from error
    return bytes(raw)


def namespace_of(request: web.Request) -> str:
    """Whose request it is, as its key said at the door."""
    return request[_NAMESPACE]


def path_of(request: web.Request) -> str:
    """The table's path of a request, without a query."""
    return request[_FOUND].path


def error_response(error: KeepwarmError, dialect: Dialect = OPENAI) -> web.Response:
    """An error in the client's dialect, with `Retry-After` where a retry helps."""
    return web.Response(
        body=dialect.error(str(error), kind=error.kind, status=error.status),
        status=error.status,
        content_type="application/json",
        headers={"Retry-After": "5"} if error.retry else {},
    )
