"""What systemd knows of a running Keepwarm: status, ready, alive, stopping.

Theory of operation. Whatever the deployment says of itself becomes the status line. Until ready,
each sign of progress asks for more time, so a slow prefill isn't killed while one that stands still
is.
From then on one task on the event loop pings the watchdog: a loop that is stuck sends nothing, and
neither does one whose supervising tasks have ended, since then nobody would notice a dead engine.
The pings repeat what is true (`READY=1`), so that no single datagram matters.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from keepwarm.sdnotify import Notifier, message
from keepwarm.settings import Settings

# Without a watchdog the pings still keep the status current.
_IDLE_PING_S = 30.0
# Between two signs of progress while warming lies one batch of 512 tokens (or the end of a save):
# nearly five minutes on a machine that prefills two tokens a second.
_PROGRESS_S = 300.0


# What comes after the requests have ended: saving slots (5 s), taking the saved files in (30 s),
# ending the engine (10 s); rounded up.
_AFTER_DRAIN_S = 60.0


def stop_timeout_s(settings: Settings) -> float:
    """Seconds that a graceful stop may take; systemd must not kill before."""
    return settings.server.drain_timeout_s + _AFTER_DRAIN_S


class Presence:
    """See the module. All methods are called on one event loop."""

    def __init__(
        self, notifier: Notifier, *, watchdog_s: float | None, load_s: float, stop_s: float
    ) -> None:
        """Say nothing yet.

        Args:
            notifier: where it goes.
            watchdog_s: seconds without a ping after which systemd restarts us; None: no watchdog.
            load_s: seconds the model may take to load, in which there is no progress to be seen.
            stop_s: seconds a graceful stop may take.
        """
        self._notifier = notifier
        # Half the time, as sd_watchdog_enabled(3) advises.
        self._interval_s = watchdog_s / 2 if watchdog_s else _IDLE_PING_S
        self._load_s = load_s
        self._stop_s = stop_s
        self._is_ready = False
        self._is_stopping = False

    def status(self, text: str) -> None:
        """The deployment said something of itself."""
        extend_s = None
        if not self._is_ready and not self._is_stopping:
            extend_s = _PROGRESS_S + (self._load_s if text.startswith("loading") else 0.0)
        self._notifier.send(message(status=text, extend_s=extend_s))

    def ready(self) -> None:
        """Everything is warm."""
        self._is_ready = True
        self._notifier.send(message(ready=True, watchdog=True))

    def stopping(self) -> None:
        """A graceful stop begins."""
        self._is_stopping = True
        self._notifier.send(message(stopping=True, extend_s=self._stop_s))

    async def ping(self, is_alive: Callable[[], bool]) -> None:
        """Ping for as long as the task runs and `is_alive` says so."""
        if not self._notifier:
            return
        while True:
            if is_alive():
                self._notifier.send(
                    message(ready=self._is_ready and not self._is_stopping, watchdog=True)
                )
            await asyncio.sleep(self._interval_s)

    def close(self) -> None:
        """Say nothing more."""
        self._notifier.close()
