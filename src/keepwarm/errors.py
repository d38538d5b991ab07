"""The one error tree: each leaf says whose fault it is and whether a retry helps.

Snapshot errors are absent from what a client can see: they become a cold prefill, counted by
reason (see `SnapshotError`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class KeepwarmError(Exception):
    """Any failure that Keepwarm itself reports.

    `status` is the HTTP status a client gets, `retry` whether the same request may succeed later,
    `headers` what the client is told besides of what had been done until then.
    The message is one paragraph: what is wrong, then what to do.
    """

    status: ClassVar[int] = 500
    retry: ClassVar[bool] = False
    kind: ClassVar[str] = "server_error"
    headers: Mapping[str, str] = MappingProxyType({})


class ConfigError(KeepwarmError):
    """Settings, a tier or a command's arguments can't be used; nothing was started or written."""


class ModelError(KeepwarmError):
    """The model file is missing, truncated or not GGUF; nothing was started."""


class TierError(ConfigError):
    """A tier can't be composed: it extends itself, its tools aren't JSON, and the like."""


class EngineError(KeepwarmError):
    """The engine answered with an error or something that isn't an answer; it still runs."""

    status = 502
    retry = True
    kind = "upstream_error"


class EngineDownError(EngineError):
    """The engine can't be reached: not started yet, died, or restarting. Its slots are empty."""

    status = 503
    kind = "engine_unavailable"


class EngineUnreachableError(EngineDownError):
    """There was no connection to it, so it hasn't seen the request."""


class EngineCrashedError(EngineError):
    """The engine died over one request, alone and again: it isn't sent a third time.

    422, since clients and batches send again what fails with 5xx.
    """

    status = 422
    retry = False
    kind = "engine_crashed"


class EngineStartError(EngineError):
    """The engine can't start. The message holds its last lines and what to do."""

    status = 503
    retry = False


class UnknownFlagError(EngineStartError):
    """The engine ended over an argument that it doesn't know."""

    def __init__(self, message: str, *, argument: str) -> None:
        super().__init__(message)
        self.argument = argument


class EngineReplacedError(EngineStartError):
    """The attached server runs another model, build or template than before: what is saved for the
    one must not reach the other. Its slots aren't touched any more.
    """


class EngineRefusedError(EngineError):
    """The engine refused one request as wrong (4xx); the slot is as before.

    `body` is the engine's own answer, passed to the client unchanged.
    """

    status = 400
    retry = False
    kind = "invalid_request_error"

    def __init__(self, message: str, *, status: int, body: bytes = b"") -> None:
        super().__init__(message)
        self.refused_status = status
        self.body = body


class RequestError(KeepwarmError):
    """The client's request can't be served as it is."""

    status = 400
    kind = "invalid_request_error"


class UnauthorizedError(RequestError):
    """No API key, or one that isn't known."""

    status = 401
    kind = "authentication_error"


class ForbiddenError(RequestError):
    """Who asks may not do this; nothing was done."""

    status = 403
    kind = "permission_error"


class NotFoundError(RequestError):
    """There is no such thing, or it isn't who asks' own."""

    status = 404
    kind = "not_found_error"


class ConflictError(RequestError):
    """What is asked for contradicts the present state; nothing was done."""

    status = 409
    kind = "conflict_error"


class TooLargeError(RequestError):
    """The body is over the bound."""

    status = 413


class QueueFullError(KeepwarmError):
    """As many requests wait as the settings allow; nothing was started for this one."""

    status = 429
    retry = True
    kind = "rate_limit_error"


class DeadlineError(KeepwarmError):
    """The request waited in the queue for longer than the settings allow."""

    status = 503
    retry = True
    kind = "timeout_error"


class SnapshotError(KeepwarmError):
    """A snapshot can't be read, written or trusted. Never reaches a client.

    `reason` is the bounded label under which the miss is counted.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
