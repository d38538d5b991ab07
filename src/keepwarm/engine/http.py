"""HTTP to the engine: one connection a request, its reply read in pieces as they come.

On the way of every request and every token, so it is as thin as it can be: a protocol of asyncio
around the parser of httptools (docs/decisions/0009-engine-http.md). One connection a request, since
the engine closes kept ones under its client as it likes. The next request's may be opened ahead,
when a reply has ended.
"""

from __future__ import annotations

import asyncio
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from typing import cast
from urllib.parse import urlsplit

import httptools
from multidict import CIMultiDict

from keepwarm.errors import ConfigError, EngineDownError, EngineUnreachableError

_CONNECT_S = 5.0
# llama-server closes a connection on which nothing comes after five seconds (cpp-httplib's
# default), so one opened ahead is used well before that.
_AHEAD_S = 3.0
# A reader that is slower than the engine: so much waits here before the engine is made to wait.
_WAITING_BYTES = 1 << 20


class EngineHttp:
    """Requests to one address. Close it if it opens connections ahead."""

    def __init__(
        self, base_url: str, *, api_key: str | None = None, opens_ahead: bool = False
    ) -> None:
        """Take an address and, if the server asks for one, its key.

        Args:
            base_url: the address; `unix:PATH`, or a path that ends in `.sock`, is a Unix socket.
            api_key: the server's key.
            opens_ahead: open the next request's connection behind a POST's reply. It holds one of
                the server's HTTP threads for some seconds, so only for a server of our own.

        Raises:
            ConfigError: it isn't an http or https URL.
        """
        self._socket = _socket_path(base_url)
        try:
            url = urlsplit("http://localhost" if self._socket else base_url)
            port = url.port
        except ValueError:
            url, port = urlsplit(""), None
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(
                f"{base_url!r} isn't a server's URL. Give one like http://127.0.0.1:8080."
            )
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._host, self._port = url.hostname, port or (443 if self._tls else 80)
        self._prefix = url.path.rstrip("/")
        self._fixed = f"Host: {url.netloc.rpartition('@')[2]}\r\nConnection: close\r\n"
        self._opens_ahead = opens_ahead
        self._opening: asyncio.Future[_Received] | None = None
        self._ahead: _Received | None = None
        self._ahead_s = 0.0
        self._open: weakref.WeakSet[_Received] = weakref.WeakSet()
        if api_key:
            self._fixed += f"Authorization: Bearer {api_key}\r\n"

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None = None,
    ) -> Response:
        """Send a request and wait for its reply's headers. Close the reply, even if half read.

        Args:
            method: as in HTTP.
            path: with its query, behind the address's own path.
            headers: without those that describe the connection or the body's length.
            body: the whole body.

        Raises:
            EngineDownError: it can't be reached, or no HTTP came back.
        """
        head = [f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fixed}"]
        head += [f"{name}: {value}\r\n" for name, value in headers.items()]
        if body is not None:
            head.append(f"Content-Length: {len(body)}\r\n")
        head.append("\r\n")
        received = self._take_ahead() or await self._connect()
        self._open.add(received)
        received.is_head = method == "HEAD"
        response = Response(received, self._open_ahead if method == "POST" else _nothing)
        try:
            # A header goes as it came: aiohttp gives and takes bytes that aren't UTF-8 this way.
            data = "".join(head).encode("utf-8", "surrogateescape") + (body or b"")
            received.transport.write(data)
            await response.read_headers()
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        """Close what was opened ahead, and open nothing more."""
        self._opens_ahead = False
        if self._opening:
            self._opening.cancel()
        if ahead := self._take_ahead():
            ahead.transport.close()

    def abort(self) -> None:
        """Break off whatever is under way: who waits for it gets EngineDownError."""
        for received in list(self._open):
            received.transport.abort()

    async def _connect(self) -> _Received:
        try:
            async with asyncio.timeout(_CONNECT_S):
                loop = asyncio.get_running_loop()
                if self._socket:
                    _, received = await loop.create_unix_connection(_Received, self._socket)
                else:
                    _, received = await loop.create_connection(
                        _Received, self._host, self._port, ssl=self._tls
                    )
        except (OSError, TimeoutError) as error:
            raise EngineUnreachableError(
                f"The engine can't be reached: {error or 'no connection in time'}."
            ) from error
        return received

    def _take_ahead(self) -> _Received | None:
        received, self._ahead = self._ahead, None
        if received is None or received.is_over:
            return None
        if time.monotonic() - self._ahead_s > _AHEAD_S:
            received.transport.close()
            return None
        return received

    def _open_ahead(self) -> None:
        if self._opens_ahead and self._opening is None:
            self._opening = asyncio.ensure_future(self._connect())
            self._opening.add_done_callback(self._opened)

    def _opened(self, opening: asyncio.Future[_Received]) -> None:
        self._opening = None
        # The engine may be gone, which the next request finds out by itself.
        if opening.cancelled() or opening.exception():
            return
        if spare := self._take_ahead():
            spare.transport.close()
        self._ahead, self._ahead_s = opening.result(), time.monotonic()


def _nothing() -> None:
    pass


def _socket_path(base_url: str) -> str:
    """The path of a Unix socket that an address names; empty if it names none."""
    if base_url.startswith("unix:"):
        path = base_url.removeprefix("unix:")
        return path.removeprefix("//") if path.startswith("//") else path
    return base_url if base_url.endswith(".sock") and "://" not in base_url else ""


class Response:
    """A reply: status and headers at once, the body as it comes."""

    def __init__(self, received: _Received, on_close: Callable[[], None]) -> None:
        self._received, self._on_close = received, on_close

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._received.status

    @property
    def headers(self) -> CIMultiDict[str]:
        """The headers, by names of any case."""
        return self._received.headers

    @property
    def is_stream(self) -> bool:
        """Whether server-sent events come."""
        return self.headers.get("Content-Type", "").startswith("text/event-stream")

    @property
    def is_json(self) -> bool:
        """Whether the body is JSON that we can read."""
        kind = self.headers.get("Content-Type", "")
        return kind.startswith("application/json") and "Content-Encoding" not in self.headers

    async def read_headers(self) -> None:
        """Wait until the headers are there.

        Raises: as `read_some`.
        """
        while not self._received.has_headers:
            await self._received.more()

    async def read_some(self) -> bytes:
        """The next bytes of the body, as many as are there; empty at its end.

        Raises:
            EngineDownError: it broke off.
        """
        received = self._received
        while not received.body and not received.is_complete:
            await received.more()
        some = bytes(received.body)
        received.body.clear()
        transport = received.transport
        if not transport.is_reading() and not transport.is_closing():
            transport.resume_reading()
        return some

    async def read(self) -> bytes:
        """The whole body.

        Raises: as `read_some`.
        """
        pieces = [await self.read_some()]
        while pieces[-1]:
            pieces.append(await self.read_some())
        return b"".join(pieces)

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines as they come, each whole and without its end.

        Raises: as `read_some`.
        """
        rest = b""
        while some := await self.read_some():
            *whole, rest = (rest + some).split(b"\n")
            for line in whole:
                yield line
        if rest:
            yield rest

    def close(self) -> None:
        """Close the connection; a stream's decode ends by it."""
        self._received.transport.close()
        self._on_close()


class _Received(asyncio.Protocol):
    """What has come of a reply. The names of its methods are asyncio's and httptools'."""

    def __init__(self) -> None:
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.body = bytearray()
        self.has_headers = False
        self.is_complete = False
        self.is_head = False
        self._trouble: Exception | str = ""
        self._waiter: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._parser.get_status_code()

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        return bool(self._trouble) or self.transport.is_closing()

    async def more(self) -> None:
        """Wait for something to come.

        Raises:
            EngineDownError: nothing more can come.
        """
        if not self._trouble:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._trouble and not self.body and not self.is_complete:
            raise EngineDownError(f"The engine broke off its answer: {self._trouble}.")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._trouble = error
        if len(self.body) > _WAITING_BYTES:
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        # Without a length and without chunks, only the connection's end ends the body.
        framed = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        if self.has_headers and not framed and not exc:
            self.is_complete = True
        self._trouble = self._trouble or exc or "the connection was closed"
        self._wake()

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.add(name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))

    def on_headers_complete(self) -> None:
        if self.status < 200:
            self.headers.clear()  # the answer itself is still to come
            return
        self.has_headers = True
        # To HEAD, the length is that of a body that doesn't come.
        self.is_complete = self.is_head

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = self.has_headers

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
