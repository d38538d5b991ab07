"""Notice an engine that died or hangs, and bring it back.

Theory of operation. One task looks at the engine: its process's end is noticed at once, silence by
asking `/health` every few seconds and whenever a request got no answer. An engine that is gone is
started again with growing pauses; after too many failures in a row the circuit opens: requests are
refused at once (503 with `Retry-After`), and a start is still tried now and then. What waits in the
queue goes on when the engine is back and warm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from keepwarm.engine.client import EngineClient
from keepwarm.engine.process import EngineProcess
from keepwarm.errors import KeepwarmError

log = logging.getLogger("keepwarm")

_POLL_S = 0.03
_HEALTH_EVERY_S = 2.0
# Once it didn't answer it is asked more often; an attached one is given up after a second, since
# its process can't be seen.
_AGAIN_S = 0.2
_ATTACHED_SILENCE_S = 1.0
# Restarts in a row before the circuit opens, and the longest pause between two of them.
_MAX_RESTARTS = 8
_MAX_BACKOFF_S = 30.0


class Deployment(Protocol):
    """What the supervisor needs of the runtime."""

    client: EngineClient

    @property
    def process(self) -> EngineProcess | None:
        """The engine's current process; None for an attached one."""

    def engine_lost(self, reason: str) -> None:
        """The engine is gone: its slots are empty, requests wait."""

    async def engine_again(self) -> None:
        """Start a new engine and warm it.

        Raises:
            KeepwarmError: it didn't come up.
        """

    def engine_back(self) -> None:
        """The engine is up and warm: requests go on."""

    def engine_failed(self, error: KeepwarmError, *, gave_up: bool) -> None:
        """A start failed; if `gave_up`, the circuit is open."""


class Supervisor:
    """See the module."""

    def __init__(self, deployment: Deployment, *, hang_timeout_s: float) -> None:
        self._deployment = deployment
        self._hang_timeout_s = hang_timeout_s
        self._suspected = asyncio.Event()
        self._asking: list[asyncio.Future[None]] = []
        self._answered = 0

    def suspect(self) -> None:
        """A request got no answer: look at the engine now rather than at the next interval."""
        self._suspected.set()

    async def look(self) -> None:
        """Look at the engine now; returns when it answered, or was found dead and given up.

        Who sends a request again before that only finds the same dead engine.
        """
        asking = asyncio.get_running_loop().create_future()
        self._asking.append(asking)
        self._suspected.set()
        await asking

    async def watch(self) -> None:
        """Look at the engine for ever."""
        unhealthy_since: float | None = None
        while True:
            reason = await self._trouble(unhealthy_since)
            if reason == "unanswered":
                unhealthy_since = unhealthy_since or time.monotonic()
                continue
            unhealthy_since = None
            if reason:
                await self._recover(reason)
            else:
                self._tell_asking(self._answered)

    def _tell_asking(self, count: int) -> None:
        """Tell those who asked first; who asked during a look waits for the next."""
        asking, self._asking = self._asking[:count], self._asking[count:]
        for future in asking:
            if not future.done():
                future.set_result(None)

    async def _trouble(self, unhealthy_since: float | None) -> str | None:
        """Wait for the next sign of life or its absence: None, unanswered, died or hung."""
        process = self._deployment.process
        waits = [asyncio.ensure_future(self._suspected.wait())]
        if process:
            waits.append(asyncio.ensure_future(process.exited.wait()))
        try:
            every_s = _HEALTH_EVERY_S if unhealthy_since is None else _AGAIN_S
            await asyncio.wait(waits, timeout=every_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._suspected.clear()
        self._answered = len(self._asking)
        if process and process.exited.is_set():
            return "died"
        if await self._deployment.client.health():
            return None
        if process and process.exited.is_set():
            return "died"
        # A large batch holds the engine's loop but not its HTTP threads, so /health is answered
        # while it works; silence for long is a hang.
        limit_s = self._hang_timeout_s if process else _ATTACHED_SILENCE_S
        if unhealthy_since is not None and time.monotonic() - unhealthy_since >= limit_s:
            return "hung"
        await asyncio.sleep(_POLL_S)
        return "unanswered"

    async def _recover(self, reason: str) -> None:
        """Bring the engine back, however long that takes."""
        self._deployment.engine_lost(reason)
        self._tell_asking(len(self._asking))
        log.warning("the engine %s; restarting it", reason)
        attempt = 0
        while not await self._try(gave_up=attempt >= _MAX_RESTARTS - 1):
            attempt += 1
            await asyncio.sleep(pause_s(attempt))
        log.info("the engine is back and warm")

    async def _try(self, *, gave_up: bool) -> bool:
        try:
            await self._deployment.engine_again()
        except KeepwarmError as error:
            log.error("the engine didn't come back: %s", error)
            self._deployment.engine_failed(error, gave_up=gave_up)
            return False
        self._deployment.engine_back()
        return True


def pause_s(attempt: int) -> float:
    """Seconds between a start's `attempt`-th failure in a row and the next start."""
    if attempt >= _MAX_RESTARTS:
        return _MAX_BACKOFF_S
    return min(0.25 * 2.0**attempt, _MAX_BACKOFF_S)
