"""One thread beside the event loop: what is asked at once, what is left a little later."""

from __future__ import annotations

import asyncio
import threading

import pytest

from keepwarm.errors import SnapshotError
from keepwarm.worker import Worker


async def test_what_is_left_is_done_soon_on_the_thread() -> None:
    worker = Worker("test", failure="it failed")
    done = asyncio.Event()
    loop, where = asyncio.get_running_loop(), []

    def work(name: str) -> None:
        where.append((name, threading.current_thread().name))
        loop.call_soon_threadsafe(done.set)

    worker.leave(work, "a")
    assert not where
    async with asyncio.timeout(10):
        await done.wait()
    assert [(name, thread.startswith("keepwarm-test")) for name, thread in where] == [("a", True)]
    worker.close()


async def test_what_is_asked_for_finds_all_done_that_was_left_before() -> None:
    worker = Worker("test", failure="it failed")
    done: list[int] = []
    for number in range(3):
        worker.leave(done.append, number)
    assert await asyncio.wrap_future(worker.submit(lambda: list(done))) == [0, 1, 2]
    worker.leave(done.append, 3)
    worker.close()
    async with asyncio.timeout(10):
        while done != [0, 1, 2, 3]:  # noqa: ASYNC110 - a thread fills it
            await asyncio.sleep(0.001)


async def test_a_failure_of_what_was_left_is_logged_and_the_next_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = Worker("test", failure="it failed")

    def fail(error: Exception) -> None:
        raise error

    worker.leave(fail, ValueError("a fault of ours"))
    worker.leave(fail, SnapshotError("the disk is full", reason="no_space"))
    assert await asyncio.wrap_future(worker.submit(lambda: 5)) == 5
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("ERROR", "it failed"),
        ("WARNING", "the disk is full"),
    ]
    worker.close()
