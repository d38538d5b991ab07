"""Notice an engine that died or hangs, and bring it back.

Theory of operation. One task looks at the engine: its process's end is noticed at once, silence by
asking `/health` every few seconds and whenever a request got no answer. An engine that is gone is
started again with growing pauses; after too many failures in a row the circuit opens: requests are
refused at once (503 with `Retry-After`), and a start is still tried now and then. What waits in the
queue goes on when the engine is back and warm.

An engine whose memory has grown over the owner's limit is treated before the kernel does it: when
nothing runs its slots are saved, and a new one takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from keepwarm.engine.client import EngineClient
from keepwarm.engine.process import EngineProcess
from keepwarm.errors import EngineReplacedError, EngineStartError, KeepwarmError

log = logging.getLogger("keepwarm")

_POLL_S = 0.03
_HEALTH_EVERY_S = 2.0
_HEALTH_TIMEOUT_S = 5.0
# Once it didn't answer it is asked more often; an attached one is given up after a second, since
# its process can't be seen.
_AGAIN_S = 0.2
_ATTACHED_SILENCE_S = 1.0
# Restarts in a row before the circuit opens, and the longest pause between two of them.
_MAX_RESTARTS = 8
_MAX_BACKOFF_S = 30.0
# An engine over its limit is left alone so long while requests keep coming; then they wait.
_IDLE_PATIENCE_S = 60.0
# A new engine that is already near the limit wouldn't become smaller by another restart.
_GROWN = 1.1
_SAID = {
    "died": "died",
    "hung": "hangs",
    "outgrown": "has outgrown its limit",
    "replaced": "is another one",
}


class EngineLife(Protocol):
    """What the supervisor needs of a deployment."""

    @property
    def client(self) -> EngineClient:
        """How the engine is reached."""

    @property
    def process(self) -> EngineProcess | None:
        """The engine's current process; None for an attached one."""

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""

    @property
    def may_sleep(self) -> bool:
        """Whether the engine may unload its model by itself; `is_same_engine` then notices."""

    async def engine_rest(self) -> bool:
        """Start nothing new, let what runs end, and save the slots.

        Returns:
            False if something runs still; then all is as before.
        """

    async def is_same_engine(self) -> bool:
        """Whether the engine that answers is the one whose snapshots these are."""

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


@dataclass(slots=True)
class Growth:
    """Decides when an engine's memory has grown enough for a new one. Pure.

    `limit_bytes` 0 means never. `fresh_bytes` is what the current engine had when it was new.
    """

    limit_bytes: int
    fresh_bytes: int | None = None
    over_since_s: float | None = None

    def restarted(self) -> None:
        """A new engine takes over; its first look tells its own size."""
        self.fresh_bytes = self.over_since_s = None

    def observe(self, rss_bytes: int, *, is_idle: bool, now_s: float) -> bool:
        """Whether to restart now: it is over the limit by growing, and idle or over for long."""
        if self.fresh_bytes is None:
            self.fresh_bytes = rss_bytes
        if rss_bytes <= max(self.limit_bytes, int(self.fresh_bytes * _GROWN)):
            self.over_since_s = None
            return False
        if self.over_since_s is None:
            self.over_since_s = now_s
        return is_idle or now_s - self.over_since_s >= _IDLE_PATIENCE_S


class Supervisor:
    """See the module."""

    def __init__(self, life: EngineLife, *, hang_timeout_s: float, max_rss_bytes: int = 0) -> None:
        self._life = life
        self._hang_timeout_s = hang_timeout_s
        self._growth = Growth(max_rss_bytes)
        self._suspected = asyncio.Event()
        self._asking: list[asyncio.Future[None]] = []
        self._answered = 0
        self._is_recovering = False
        self._is_closed = False

    def close(self) -> None:
        """Nobody looks any more: let those go on who wait for a look."""
        self._is_closed = True
        self._tell_asking(len(self._asking))

    def suspect(self) -> None:
        """A request got no answer: look at the engine now rather than at the next interval."""
        self._suspected.set()

    async def look(self) -> None:
        """Look at the engine now; returns when it answered, or was found dead and given up.

        Who sends a request again before that only finds the same dead engine.
        """
        if self._is_recovering or self._is_closed:
            # It is known to be gone; who asks now would wait until it is back. The loop still gets
            # its turn, or somebody who asks again and again would keep it from coming back.
            await asyncio.sleep(0)
            return
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
            if reason and self._is_closed:
                # Nobody needs another one, but who computes there needn't be waited for.
                self._life.engine_lost(reason)
                return
            if reason:
                await self._recover(reason)
            else:
                self._tell_asking(self._answered)
                if self._has_outgrown() and await self._life.engine_rest():
                    await self._recover("outgrown")

    def _has_outgrown(self) -> bool:
        process = self._life.process
        if process is None or not self._growth.limit_bytes:
            return False
        rss_bytes = process.resident_bytes()
        if rss_bytes is None:
            return False
        due = self._growth.observe(rss_bytes, is_idle=self._life.is_idle, now_s=time.monotonic())
        if due:
            log.warning("the engine has grown to %.0f MB: it is renewed", rss_bytes / 1e6)
        return due

    def _tell_asking(self, count: int) -> None:
        """Tell those who asked first; who asked during a look waits for the next."""
        asking, self._asking = self._asking[:count], self._asking[count:]
        for future in asking:
            if not future.done():
                future.set_result(None)

    async def _trouble(self, unhealthy_since: float | None) -> str | None:
        """Wait for the next sign of life or its absence.

        Returns:
            None if all is well, `unanswered`, or what `_SAID` has.
        """
        process = self._life.process
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
        # An engine that hangs doesn't answer this either: it must not take longer than a hang may.
        patience_s = min(_HEALTH_TIMEOUT_S, self._hang_timeout_s)
        if await self._life.client.health(timeout_s=patience_s):
            if process and not self._life.may_sleep:
                return None
            is_same = await self._life.is_same_engine()
            # One of our own can't be another one: its process would have ended.
            return None if process or is_same else "replaced"
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
        self._is_recovering = True
        self._life.engine_lost(reason)
        self._growth.restarted()
        self._tell_asking(len(self._asking))
        log.warning("the engine %s; restarting it", _SAID[reason])
        attempt = 0
        while not await self._try(gave_up=attempt >= _MAX_RESTARTS - 1):
            if self._is_closed:
                return
            attempt += 1
            await asyncio.sleep(pause_s(attempt))
        self._is_recovering = False
        log.info("the engine is back and warm")

    async def _try(self, *, gave_up: bool) -> bool:
        error = await failure_of(self._life.engine_again())
        if error is None:
            self._life.engine_back()
            return True
        log.error("the engine didn't come back: %s", error)
        gave_up = gave_up or isinstance(error, EngineReplacedError)
        self._life.engine_failed(error, gave_up=gave_up)
        return False


async def failure_of(start: Awaitable[None]) -> KeepwarmError | None:
    """Why a start failed, whatever it was; None if it didn't."""
    try:
        await start
    except KeepwarmError as error:
        return error
    except Exception as error:  # nobody else would try it again
        log.error("an engine can't be started", exc_info=error)
        return EngineStartError(f"It can't be started ({type(error).__name__}).")
    return None


def pause_s(attempt: int) -> float:
    """Seconds between a start's `attempt`-th failure in a row and the next start."""
    if attempt >= _MAX_RESTARTS:
        return _MAX_BACKOFF_S
    return min(0.25 * 2.0**attempt, _MAX_BACKOFF_S)
