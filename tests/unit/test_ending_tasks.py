"""A stop ends every task, also one that a first cancellation doesn't reach."""

from __future__ import annotations

import asyncio

import pytest

from keepwarm.deployment import tasks as tasks_module
from keepwarm.deployment.tasks import end_tasks


async def test_a_task_that_loses_its_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks_module, "_CANCEL_AGAIN_S", 0.01)
    lost = 0

    async def loses_two() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    async def usual() -> None:
        await asyncio.sleep(60)

    async def fails() -> None:
        await asyncio.sleep(0)
        raise RuntimeError

    tasks = [asyncio.create_task(work()) for work in (loses_two, usual, fails)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(5):
        await end_tasks(tasks)
    assert all(task.done() for task in tasks)
    assert isinstance(tasks[2].exception(), RuntimeError)


async def test_nothing_is_ended_at_once() -> None:
    await end_tasks([])
