"""How a streamed reply begins while nothing of it is there yet, and how it is kept alive.

Clients and proxies end a request that has shown no byte for long (Node's fetch after 300 s), and a
cold prompt may wait in the queue, be filled, and be prefilled for longer than that. So a reply that
has not begun within a second is opened: its headers go out, with what is known by then, and from
then on a comment (or the API's own ping) follows each second of silence. What becomes known later
follows as a comment ahead of the first words. A refusal within the first second has its status;
after that it is an event.

A reply that begins in time costs a timer that is never due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from aiohttp import web

from keepwarm.api.dialect import Dialect
from keepwarm.errors import EngineRefusedError, KeepwarmError

# A refusal that is known by then has its status; what comes later is an event.
_OPEN_S = 0.9
# How long progress waits to be told.
_PROGRESS_S = 0.5
# A reader that is slower than the model must not hold the engine's slot: this much is buffered for
# it. A reply of 100,000 tokens as server-sent events is about 20 MB.
_WRITE_BUFFER_BYTES = 32 << 20
_SELF_OPENED = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    # Proxies that gather a reply would undo it.
    "X-Accel-Buffering": "no",
}


class Opening:
    """See the module. `close` it at the end, whatever happened.

    `known` gives the headers that are known at a moment, `engine_headers` are the engine's own.
    """

    def __init__(self, request: web.Request, dialect: Dialect, *, ping_s: float) -> None:
        """Begin to count the first second; a `ping_s` of 0 never opens ahead of the first words."""
        self.known: Callable[[], Mapping[str, str]] = dict
        self.engine_headers: Mapping[str, str] = _SELF_OPENED
        self._request, self._dialect, self._ping_s = request, dialect, ping_s
        self._response: web.StreamResponse | None = None
        self._told: Mapping[str, str] = {}
        self._is_late = self._is_inside = False
        self._written_s = 0.0
        self._progress = b""
        self._lock = asyncio.Lock()
        self._pinging: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_OPEN_S, self._begin_pinging) if ping_s else None

    def close(self) -> None:
        """Ping no more."""
        if self._timer:
            self._timer.cancel()
        if self._pinging:
            self._pinging.cancel()

    def progressed(self, raw: bytes) -> None:
        """An event that says how far the prompt is; it goes in place of the next ping."""
        self._progress = raw

    async def write(self, raw: bytes) -> None:
        """Send what belongs to the reply, behind the headers if they haven't gone yet."""
        if not raw:
            return
        self._progress = b""
        response = self._response or await self._open()
        if self._is_late:
            self._is_late = False
            raw = self._facts() + raw
        self._written_s = time.monotonic()
        self._is_inside = not raw.endswith(b"\n\n")
        await response.write(raw)

    async def finish(self) -> web.StreamResponse:
        """End the reply."""
        response = self._response or await self._open()
        await response.write_eof()
        return response

    async def break_off(self, message: str, *, kind: str, status: int) -> web.StreamResponse:
        """End the reply with an error."""
        cut = b"\n\n" if self._is_inside else b""
        event = self._dialect.error_event(message, kind=kind, status=status)
        await self.write(cut + event)
        return await self.finish()

    async def refused(self, error: KeepwarmError) -> web.StreamResponse | None:
        """Tell an error as an event if the reply is open; None if it still can have its status."""
        async with self._lock:
            if self._response is None:
                return None
        if isinstance(error, EngineRefusedError) and error.body:
            raw = self._dialect.whole(error.body, status=error.refused_status)
            return await self._whole(raw)
        return await self.break_off(str(error), kind=error.kind, status=error.status)

    async def replaced(self, response: web.StreamResponse) -> web.StreamResponse:
        """What the client gets where the engine gave a whole reply (an error) instead of a stream:
        that, or, in an open stream, its body as an event."""
        async with self._lock:
            is_open = self._response is not None
        if not is_open or not isinstance(response, web.Response):
            return response
        body = response.body
        return await self._whole(bytes(body) if isinstance(body, bytes | bytearray) else b"{}")

    async def _whole(self, raw: bytes) -> web.StreamResponse:
        await self.write(self._dialect.event(raw))
        return await self.finish()

    async def _open(self) -> web.StreamResponse:
        async with self._lock:
            if self._response is None:
                self._told = dict(self.known())
                response = _StreamResponse(headers={**self.engine_headers, **self._told})
                await response.prepare(self._request)
                if transport := self._request.transport:
                    transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
                self._response = response
            return self._response

    def _begin_pinging(self) -> None:
        self._pinging = asyncio.ensure_future(self._ping())

    async def _ping(self) -> None:
        try:
            if self._response is None:
                await self._open()
                self._is_late = True
            while True:
                silent_s = time.monotonic() - self._written_s
                is_due = silent_s >= self._ping_s or self._progress
                if is_due and not self._is_inside and self._response:
                    self._written_s = time.monotonic()
                    raw, self._progress = self._progress or self._dialect.ping(), b""
                    await self._response.write(raw)
                    silent_s = 0.0
                await asyncio.sleep(max(min(self._ping_s - silent_s, _PROGRESS_S), 0.05))
        except ConnectionError:
            pass  # the client has gone, which its handler is told by itself

    def _facts(self) -> bytes:
        """What wasn't known when the headers went, as a comment."""
        news = [(k, v) for k, v in self.known().items() if self._told.get(k) != v]
        return "".join(f": {name}: {value}\n" for name, value in news).encode() + b"\n"


class _StreamResponse(web.StreamResponse):
    """Its headers go with the first piece of its body, as aiohttp does it for whole responses.

    Sent before it they wake the client, which on a busy machine then takes the core from us.
    """

    _send_headers_immediately = False
