"""How a client is spoken to: the engine's own APIs as they are, Anthropic's translated."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from keepwarm.core.anthropic import MessageStream, error_reply, message_reply


class StreamTranslator(Protocol):
    """Turns a stream's bytes into what the client reads."""

    def feed(self, raw: bytes) -> bytes:
        """Bytes to send on for these."""

    def end(self) -> bytes:
        """Bytes that close the stream."""


class Dialect(Protocol):
    """One API's way of replies and errors."""

    def whole(self, raw: bytes, *, status: int) -> bytes:
        """A whole reply, or the engine's error, for the client."""

    def stream(self) -> StreamTranslator:
        """A translator for one stream."""

    def error(self, message: str, *, kind: str, status: int) -> bytes:
        """An error as a body."""

    def error_event(self, message: str, *, kind: str, status: int) -> bytes:
        """An error in the middle of a stream."""

    def event(self, raw: bytes) -> bytes:
        """An error's body as an event of a stream."""

    def ping(self) -> bytes:
        """What says in a stream that somebody is still there."""


class _AsItIs:
    def feed(self, raw: bytes) -> bytes:
        return raw

    def end(self) -> bytes:
        return b""


class OpenAI:
    """The engine's own APIs: bytes go through unchanged."""

    def whole(self, raw: bytes, *, status: int) -> bytes:
        """See `Dialect`."""
        return raw

    def stream(self) -> StreamTranslator:
        """See `Dialect`."""
        return _AsItIs()

    def error(self, message: str, *, kind: str, status: int) -> bytes:
        """See `Dialect`."""
        error = {"message": message, "type": kind, "code": status}
        return msgspec.json.encode({"error": error})

    def error_event(self, message: str, *, kind: str, status: int) -> bytes:
        """See `Dialect`."""
        return self.event(self.error(message, kind=kind, status=status))

    def event(self, raw: bytes) -> bytes:
        """See `Dialect`."""
        return b"data: " + raw + b"\n\n"

    def ping(self) -> bytes:
        """See `Dialect`."""
        return b": keepwarm\n\n"


class Anthropic:
    """The messages API over chat completions; `model` is what the client called it."""

    def __init__(self, model: str = "") -> None:
        self._model = model

    def whole(self, raw: bytes, *, status: int) -> bytes:
        """See `Dialect`."""
        try:
            body: Any = msgspec.json.decode(raw)
        except msgspec.DecodeError:
            return self.error("The engine's answer isn't JSON.", kind="", status=status)
        if status != 200:
            said = body.get("error") if isinstance(body, dict) else None
            text = said.get("message") if isinstance(said, dict) else str(said)
            return self.error(str(text), kind="", status=status)
        return msgspec.json.encode(message_reply(body, model=self._model))

    def stream(self) -> StreamTranslator:
        """See `Dialect`."""
        return MessageStream(self._model)

    def error(self, message: str, *, kind: str, status: int) -> bytes:
        """See `Dialect`."""
        return msgspec.json.encode(error_reply(message, status=status))

    def error_event(self, message: str, *, kind: str, status: int) -> bytes:
        """See `Dialect`."""
        return self.event(self.error(message, kind=kind, status=status))

    def event(self, raw: bytes) -> bytes:
        """See `Dialect`."""
        return b"event: error\ndata: " + raw + b"\n\n"

    def ping(self) -> bytes:
        """See `Dialect`."""
        return b'event: ping\ndata: {"type": "ping"}\n\n'


OPENAI = OpenAI()


def dialect_of(path: str) -> Dialect:
    """The dialect of a path, for errors of requests that weren't read yet."""
    return Anthropic() if path.startswith("/v1/messages") else OPENAI
