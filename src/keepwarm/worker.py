"""One thread beside the event loop, for work in the order in which it was asked.

What nobody waits for is *left* to it: begun a tenth of a second later, or right before the next
work that is asked for. Begun at once, it would share the interpreter and a core with the way in of
the next request, which a client in a loop sends within a millisecond: connecting to the engine then
took 0.8 ms instead of 0.3 (two cores).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from keepwarm.errors import KeepwarmError

log = logging.getLogger("keepwarm")

P = ParamSpec("P")
T = TypeVar("T")

_LEFT_S = 0.1


class Worker:
    """See the module. Close it; what was asked and left is done before the thread ends."""

    def __init__(self, name: str, *, failure: str) -> None:
        """Start it. `failure` is what the log says where something that was left failed."""
        self._failure = failure
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"keepwarm-{name}")
        self._left: list[Callable[[], object]] = []
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have it done as soon as what came before is. On the event loop's thread, as `leave`."""
        self._begin_left()
        return self._thread.submit(work, *args, **kwargs)

    def leave(self, work: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Have it done within a tenth of a second. Its failure is logged, nobody is told."""
        self._left.append(lambda: work(*args, **kwargs))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_LEFT_S, self._begin_left)

    def close(self) -> None:
        """Begin what was left, take nothing more."""
        self._begin_left()
        self._thread.shutdown(wait=False)

    def _begin_left(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left, self._left = self._left, []
        for work in left:
            self._thread.submit(work).add_done_callback(self._tell_failure)

    def _tell_failure(self, future: Future[object]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, KeepwarmError):
            log.warning("%s", error)
        elif error is not None:
            log.error(self._failure, exc_info=error)
