"""Background tasks that belong together: begun, looked after, and ended as a whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

log = logging.getLogger("keepwarm")

_CANCEL_AGAIN_S = 1.0
# Taking in what the engine has saved takes well under a second each.
_ABSORB_S = 30.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Once isn't always enough: a cancellation that comes with what a task awaits is lost in a
    `wait_for` (Python 3.11), and a stop would wait for that task for ever.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)


class Tasks:
    """Tasks in the background whose failures are logged, never lost."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Begin a task; what is named `absorb` is waited for at the end."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a background task failed", exc_info=error)

    async def absorbed(self, *, timeout_s: float = _ABSORB_S) -> None:
        """Wait until all that was saved is taken in."""
        if absorbing := [task for task in self._running if task.get_name() == "absorb"]:
            await asyncio.wait(absorbing, timeout=timeout_s)

    async def end(self) -> None:
        """Cancel all of them, and wait until they have ended."""
        await end_tasks(self._running)
