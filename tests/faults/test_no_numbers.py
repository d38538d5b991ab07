"""Rows that are no numbers (NaN, infinity) are kept by nobody, and nobody goes on from them."""

from __future__ import annotations

from rig import Keepwarm, until

STORY = "What of the mail relay, in all its parts? " * 40


async def test_a_slot_whose_rows_are_no_numbers_is_emptied_and_counted(keepwarm: Keepwarm) -> None:
    engine, scheduler = keepwarm.engine, keepwarm.deployment.dispatcher.scheduler
    extents = keepwarm.deployment.store.stats().extents
    prompt = list(range(9000, 9800))
    url = f"{keepwarm.base}/completion"

    async def go_on(tokens: list[int]) -> int:
        body = {"prompt": tokens, "max_tokens": 4}
        async with keepwarm.session.post(url, json=body) as response:
            assert response.status == 200
            return int((await response.json())["timings"]["cache_n"])

    assert await go_on(prompt) == 0
    slot = next(i for i, held in enumerate(engine.slots) if held[:800] == prompt)
    engine.poisoned.add(slot)
    await keepwarm.counted('keepwarm_misses_total{reason="not_finite"} 1.0')
    await until(lambda: engine.slots[slot] == [])
    await keepwarm.settled()
    assert scheduler.slots[slot].content is None
    assert keepwarm.deployment.store.stats().extents == extents
    assert await go_on([*prompt, *range(100, 130)]) == 0, "computed anew"
