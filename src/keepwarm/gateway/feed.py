"""The live stream of what happens, for whoever looks: nothing is done while nobody does.

Theory of operation. A listener has a bounded queue of ready events. One task beats while there are
listeners: it looks at the slots four times a second and sends what changed, once for each
namespace that listens. Finished requests are pushed by the explainer. A listener that doesn't keep
up loses its place and is told to begin anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

# Fast enough to see a short request pass through its slot, slow enough to cost nothing.
_BEAT_S = 0.25
# Proxies close connections that are silent for a minute.
_KEEP_ALIVE_S = 15.0
# A burst of this many events fits; some megabytes at most.
_QUEUE = 512


@dataclass(slots=True, eq=False)
class Listener:
    """One open stream. `events` holds encoded server-sent events; None ends it."""

    namespace: str
    events: asyncio.Queue[bytes | None] = field(default_factory=lambda: asyncio.Queue(_QUEUE))

    def send(self, event: bytes) -> None:
        """Queue an event; a listener that is too far behind is ended, and its client comes back."""
        if self.events.qsize() >= _QUEUE - 1:
            self.end()
        else:
            self.events.put_nowait(event)

    def end(self) -> None:
        """End the stream, whatever waits in it."""
        while not self.events.empty():
            self.events.get_nowait()
        self.events.put_nowait(None)


class Feed:
    """See the module. All methods are called on one event loop.

    `look` gives the slots' state as a namespace may see it, as plain JSON, every `beat_s`.
    """

    def __init__(self, look: Callable[[str], dict[str, Any]], *, beat_s: float = _BEAT_S) -> None:
        self._look = look
        self._beat_s = beat_s
        self._listeners: set[Listener] = set()
        self._beating: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def attach(self, namespace: str) -> Listener:
        """Begin to listen, with how things stand now."""
        listener = Listener(namespace)
        listener.send(encode_event("slots", self._look(namespace)))
        self._listeners.add(listener)
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beat())
        return listener

    def detach(self, listener: Listener) -> None:
        """Listen no more."""
        self._listeners.discard(listener)
        if not self._listeners and self._beating is not None:
            self._beating.cancel()
            self._beating = None

    def publish(self, namespace: str, name: str, body: dict[str, Any]) -> None:
        """Tell this namespace's listeners."""
        told = [listener for listener in self._listeners if listener.namespace == namespace]
        if told:
            event = encode_event(name, body)
            for listener in told:
                listener.send(event)

    def close(self) -> None:
        """End all streams."""
        for listener in list(self._listeners):
            listener.end()
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None

    async def _beat(self) -> None:
        sent: dict[str, bytes] = {}
        silent_s = 0.0
        while True:
            alive = {listener.namespace for listener in self._listeners}
            sent = {namespace: sent.get(namespace, b"") for namespace in alive}
            for namespace in alive:
                event = encode_event("slots", self._look(namespace))
                if event != sent[namespace]:
                    sent[namespace] = event
                    silent_s = 0.0
                    for listener in self._listeners:
                        if listener.namespace == namespace:
                            listener.send(event)
            if silent_s >= _KEEP_ALIVE_S:
                silent_s = 0.0
                for listener in self._listeners:
                    listener.send(b": still here\n\n")
            silent_s += self._beat_s
            await asyncio.sleep(self._beat_s)


def encode_event(name: str, body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"
