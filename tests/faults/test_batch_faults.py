"""Batches of the API over an engine, a disk and tasks that misbehave: one never ends another."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from typing import Any

import aiohttp
import pytest
from rig import Keepwarm

from batchsamples import line
from keepwarm.batch.ledger import Ledger

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


async def begin(keepwarm: Keepwarm, lines: list[bytes], *, endpoint: str = CHAT) -> str:
    """Upload tasks and begin a batch of them; its id."""
    form = aiohttp.FormData()
    form.add_field("purpose", "batch")
    form.add_field("file", b"".join(lines), filename="tasks.jsonl")
    async with keepwarm.session.post(f"{keepwarm.base}/v1/files", data=form) as reply:
        file = await reply.json()
    asked = {"input_file_id": file["id"], "endpoint": endpoint, "completion_window": "24h"}
    async with keepwarm.session.post(f"{keepwarm.base}/v1/batches", json=asked) as reply:
        return str((await reply.json())["id"])


async def ended(keepwarm: Keepwarm, batch_id: str) -> dict[str, Any]:
    """The batch when it has ended."""
    async with asyncio.timeout(30):
        while True:
            async with keepwarm.session.get(f"{keepwarm.base}/v1/batches/{batch_id}") as reply:
                batch = await reply.json()
            if batch["status"] in ENDED:
                return dict(batch)
            await asyncio.sleep(0.05)


def responses(custom_id: str, **body: Any) -> bytes:
    value = {"custom_id": custom_id, "method": "POST", "url": "/v1/responses", "body": body}
    return json.dumps(value).encode() + b"\n"


@pytest.mark.parametrize("tools", [5, "x", [5], {"a": 1}])
async def test_an_odd_line_ends_neither_its_batch_nor_anybody_elses(
    keepwarm: Keepwarm, tools: object
) -> None:
    odd = [responses(f"o{i}", input="hi", instructions="be", tools=tools) for i in range(2)]
    first = await begin(keepwarm, odd, endpoint="/v1/responses")
    second = await begin(keepwarm, [line("a", model="minimal"), line("b", model="minimal")])
    assert (await ended(keepwarm, second))["request_counts"]["completed"] == 2
    assert (await ended(keepwarm, first))["status"] == "completed"


async def test_a_task_that_raises_has_failed_and_the_next_one_runs(
    keepwarm: Keepwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = keepwarm.deployment.router
    tier = router.tier

    def broken(api: Any, body: Any, *rest: Any) -> Any:
        if "odd" in str(body):
            raise TypeError("'int' object is not iterable")
        return tier(api, body, *rest)

    monkeypatch.setattr(router, "tier", broken)
    batch = await begin(
        keepwarm, [line("a", "odd", model="minimal"), line("b", "even", model="minimal")]
    )
    monkeypatch.setattr("keepwarm.batch.runner._MAX_PAUSE_S", 0.01)
    counts = (await ended(keepwarm, batch))["request_counts"]
    assert counts == {"total": 2, "completed": 1, "failed": 1}


async def test_a_batch_that_fails_unforeseen_leaves_the_others_running(
    keepwarm: Keepwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Ledger.paths
    broken: list[str] = []

    def odd_paths(ledger: Ledger, batch_id: str) -> Any:
        if not broken:
            broken.append(batch_id)
            raise TypeError("nobody thought of this")
        return paths(ledger, batch_id)

    monkeypatch.setattr(Ledger, "paths", odd_paths)
    first = await begin(keepwarm, [line("a", model="minimal")])
    failed = await ended(keepwarm, first)
    assert failed["status"] == "failed"
    assert failed["errors"]["data"][0]["code"] == "batch_failed"
    second = await begin(keepwarm, [line("b", model="minimal")])
    assert (await ended(keepwarm, second))["status"] == "completed"


async def test_an_error_of_the_ledgers_database_is_waited_for(
    keepwarm: Keepwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepwarm.gateway.batch_service._IDLE_S", 0.05)
    unfinished = Ledger.unfinished
    times = 0

    class Raw:
        def execute(self, *_: object) -> Any:
            raise sqlite3.OperationalError("disk I/O error")

    def failing(ledger: Ledger) -> Any:
        nonlocal times
        times += 1
        if times > 3:
            return unfinished(ledger)
        db, ledger._db = ledger._db, Raw()  # type: ignore[assignment]
        try:
            return unfinished(ledger)
        finally:
            ledger._db = db

    monkeypatch.setattr(Ledger, "unfinished", failing)
    batch = await begin(keepwarm, [line("a", model="minimal")])
    assert (await ended(keepwarm, batch))["status"] == "completed"
    assert times > 3
