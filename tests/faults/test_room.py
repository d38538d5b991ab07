"""What a prompt and its reply may come to: refused, waiting, or bounded, and nobody loses by it."""

from __future__ import annotations

import asyncio

from fakeengine import Fault
from rig import Keepwarm, until

ROOM = 8192


def sent(keepwarm: Keepwarm) -> list[dict[str, object]]:
    return [body for path, body in keepwarm.engine.asked if path == "/v1/chat/completions"]


async def test_a_prompt_longer_than_its_room_is_refused_before_anything_is_done_for_it(
    keepwarm: Keepwarm,
) -> None:
    held = [slot.content for slot in keepwarm.deployment.dispatcher.scheduler.slots]
    status, _, body = await keepwarm.ask("word " * ROOM)
    assert status == 400
    assert body["error"]["type"] == "exceed_context_size_error"
    assert body["error"]["n_ctx"] == ROOM
    assert sent(keepwarm) == []
    assert [slot.content for slot in keepwarm.deployment.dispatcher.scheduler.slots] == held
    url = f"{keepwarm.base}/v1/messages"
    asked = keepwarm.body("word " * ROOM)
    async with keepwarm.session.post(url, json=asked) as response:
        assert response.status == 400
        told = await response.json()
    assert told["type"] == "error"
    assert "8192" in told["error"]["message"]
    await keepwarm.settled()


async def test_a_counted_prompt_is_refused_in_its_clients_words(keepwarm: Keepwarm) -> None:
    # Its text alone is below the room; what the template adds isn't.
    words = "word " * (ROOM // 2 - 1)
    asked = {"model": "any", "messages": [{"role": "user", "content": words}], "max_tokens": 4}
    errors = []
    for path in ("/v1/chat/completions", "/v1/messages"):
        async with keepwarm.session.post(keepwarm.base + path, json=asked) as response:
            assert response.status == 400
            errors.append((await response.json())["error"])
    assert errors[0]["code"] == "context_length_exceeded"
    tokens = errors[0]["n_prompt_tokens"]
    assert ROOM <= tokens < ROOM + 20
    assert errors[1]["message"] == f"prompt is too long: {tokens} tokens > {ROOM} maximum"
    assert sent(keepwarm) == []
    await keepwarm.settled()


async def test_in_a_shared_pool_a_reply_is_bounded_to_what_was_reserved_for_it(
    keepwarm: Keepwarm,
) -> None:
    assert keepwarm.deployment.machine.pool_tokens == ROOM
    body = keepwarm.body()
    del body["max_tokens"]
    async with keepwarm.session.post(f"{keepwarm.base}/v1/chat/completions", json=body) as response:
        assert response.status == 200
    (forwarded,) = sent(keepwarm)
    limit = forwarded["max_tokens"]
    assert isinstance(limit, int)
    assert 1024 < limit < ROOM
    # What it may come to is taken from nobody who runs beside it.
    keepwarm.engine.asked.clear()
    keepwarm.engine.faults.append(Fault.STALL)
    first = asyncio.create_task(keepwarm.ask("First?", max_tokens=4000))
    await until(lambda: keepwarm.engine.busy)
    second = asyncio.create_task(keepwarm.ask("Second?", max_tokens=4090))
    await until(lambda: keepwarm.deployment.dispatcher.scheduler.queued)
    keepwarm.engine.resume.set()
    assert [(await task)[0] for task in (first, second)] == [200, 200]
    assert [body["max_tokens"] for body in sent(keepwarm)] == [4000, 4090]
    await keepwarm.settled()
