"""How a client is spoken to: the engine's own APIs as they are, Anthropic's translated."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from keepwarm.api.message_reply import MessageStream, error_reply, message_reply


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

    def counted(self, tokens: int) -> bytes:
        """The answer to a question for a prompt's length."""

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
        return raw if status == 200 else _with_code(raw)

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

    def counted(self, tokens: int) -> bytes:
        """See `Dialect`."""
        counted = {"input_tokens": tokens, "object": "response.input_tokens"}
        return msgspec.json.encode(counted)


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
            sizes = _too_long(said)
            if sizes is not None:
                # The words by which clients know that it is time to compact.
                text = "prompt is too long: {} tokens > {} maximum".format(*sizes)
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

    def counted(self, tokens: int) -> bytes:
        """See `Dialect`."""
        return msgspec.json.encode({"input_tokens": tokens})


OPENAI = OpenAI()


def _too_long(error: object) -> tuple[int, int] | None:
    """The tokens of a prompt that doesn't fit, and how many would; None of other errors."""
    if not isinstance(error, dict) or error.get("type") != "exceed_context_size_error":
        return None
    asked, most = error.get("n_prompt_tokens"), error.get("n_ctx")
    return (asked, most) if isinstance(asked, int) and isinstance(most, int) else None


def _with_code(raw: bytes) -> bytes:
    """The engine's error, with the code by which OpenAI's clients know a prompt that's too long."""
    try:
        body: Any = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return raw
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or _too_long(error) is None:
        return raw
    return msgspec.json.encode({**body, "error": {**error, "code": "context_length_exceeded"}})


def dialect_of(path: str, *, model: str = "") -> Dialect:
    """The dialect of a path; `model` is what the client called it."""
    return Anthropic(model) if path.startswith("/v1/messages") else OPENAI
