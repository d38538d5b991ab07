"""HTTP to the engine: one connection a request, its reply read in pieces as they come.

On the way of every request and every token, so it is as thin as it can be: a protocol of asyncio
around the parser of httptools (docs/decisions/0009-engine-http.md). One connection a request, since
the engine closes kept ones under its client as it likes.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import cast
from urllib.parse import urlsplit

import httptools
from multidict import CIMultiDict

from keepwarm.errors import ConfigError, EngineDownError

_CONNECT_S = 5.0
# A reader that is slower than the engine: so much waits here before the engine is made to wait.
_WAITING_BYTES = 1 << 20


class EngineHttp:
    """Requests to one address. It holds no connection, so it needs no closing."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        """Take an address and, if the server asks for one, its key.

        Raises:
            ConfigError: it isn't an http or https URL.
        """
        try:
            url = urlsplit(base_url)
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
        received = _Received(is_head=method == "HEAD")
        try:
            async with asyncio.timeout(_CONNECT_S):
                transport, _ = await asyncio.get_running_loop().create_connection(
                    lambda: received, self._host, self._port, ssl=self._tls
                )
        except (OSError, TimeoutError) as error:
            raise EngineDownError(
                f"The engine can't be reached: {error or 'no connection in time'}."
            ) from error
        response = Response(received, transport)
        try:
            # A header goes as it came: aiohttp gives and takes bytes that aren't UTF-8 this way.
            transport.write("".join(head).encode("utf-8", "surrogateescape") + (body or b""))
            await response.read_headers()
        except BaseException:
            response.close()
            raise
        return response


class Response:
    """A reply: status and headers at once, the body as it comes."""

    def __init__(self, received: _Received, transport: asyncio.Transport) -> None:
        self._received, self._transport = received, transport

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
        if not self._transport.is_reading() and not self._transport.is_closing():
            self._transport.resume_reading()
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
        self._transport.close()


class _Received(asyncio.Protocol):
    """What has come of a reply. The names of its methods are asyncio's and httptools'."""

    def __init__(self, *, is_head: bool) -> None:
        self.headers: CIMultiDict[str] = CIMultiDict()
        self.body = bytearray()
        self.has_headers = False
        self.is_complete = False
        self._is_head = is_head
        self._trouble: Exception | str = ""
        self._waiter: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._parser.get_status_code()

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
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._trouble = error
        if len(self.body) > _WAITING_BYTES:
            self._transport.pause_reading()
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
        self.is_complete = self._is_head

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_complete = self.has_headers

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)
