"""What is made of a reply's counts: which prefixes are learned from clients."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from keepwarm.core.job import Job
from keepwarm.core.plan import Plan, Source, Stored
from keepwarm.core.prompt import prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.deployment.proof import Prover
from keepwarm.store.types import Hit
from keepwarm.tiers.tiering import TieredRequest

RULES = {"role": "system", "content": "Follow the rules of the house. " * 40}
PLAN = Plan(Source.SLOT, 0, 300, 0, 310, 0.1, False, False, None, (), ())


class SlowStore:
    """Knows every prefix, and takes a turn of the event loop for each pin."""

    def __init__(self) -> None:
        self.pinned: list[str] = []
        self.is_empty = False

    def lookup(self, digests: list[bytes], *, namespace: str) -> Hit | None:
        return None if self.is_empty else Hit(0, 1, 300, True, 0, True)

    def touch(self, extent_id: int, at_tokens: int) -> None:
        pass

    def pin_named(self, name: str) -> str | None:
        return name if name in self.pinned else None

    def pins(self) -> list[Any]:
        return []

    async def pin(self, name: str, *args: object, **kwargs: object) -> None:
        await asyncio.sleep(0)
        self.pinned.append(name)


def prover(store: SlowStore) -> Prover:
    def supervise(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(work)

    return Prover(
        cast(
            "Any",
            SimpleNamespace(
                store=store,
                supervise=supervise,
                metrics=SimpleNamespace(replied=lambda **_: None),
                machine=SimpleNamespace(slack_tokens=0),
                settings=SimpleNamespace(
                    store=SimpleNamespace(learned=16),
                    hygiene=SimpleNamespace(rules=["move-known"]),
                ),
                dispatcher=SimpleNamespace(rates=Rates()),
            ),
        )
    )


def reply_to(made: Prover, question: str, *, agent: str = "") -> None:
    body = {"messages": [RULES, {"role": "user", "content": question}]}
    prompt = prompt_of(body, fingerprint="model", namespace="me")
    job = Job("r", "me", prompt, arrived_s=0.0, deadline_s=9.0, reply_tokens=4)
    job.agent = agent
    made.proved(
        job,
        PLAN,
        Counts(300, 10, 4),
        ttft_s=0.1,
        tier=TieredRequest(body=body, tier=None, reason="pass"),
    )


async def test_a_prefix_that_comes_again_several_times_at_once_is_learned_once() -> None:
    store = SlowStore()
    made = prover(store)
    reply_to(made, "First?")
    await asyncio.sleep(0.01)
    assert store.pinned == []
    for question in ("Second?", "Third?", "Fourth?"):
        reply_to(made, question)
    await asyncio.sleep(0.01)
    assert len(store.pinned) == 1


async def test_what_is_not_reused_twice_is_left_alone_for_some_time_and_once_is_no_reason() -> None:
    refused: list[Stored] = []

    async def quarantine(*_args: object, **_kwargs: object) -> tuple[str, ...]:
        return ()

    async def nothing_moved() -> list[Any]:
        return []

    made = prover(SlowStore())
    deployment = cast("Any", made)._deployment
    deployment.slot_store = SimpleNamespace(quarantine=quarantine, refused=refused.append)
    deployment.metrics.miss = lambda _reason: None
    deployment.suspect_engine = lambda: None
    deployment.prefixes = SimpleNamespace(kept=[])
    cast("Any", made)._moved = nothing_moved
    stored = Stored(0, 300, 300, 1000, ready=True, extent_id=7)
    plan = replace(PLAN, source=Source.SNAPSHOT, promise_tokens=300, restore=stored)
    body = {"messages": [RULES, {"role": "user", "content": "Why?"}]}
    prompt = prompt_of(body, fingerprint="model", namespace="me")
    for expected in ([], [stored]):
        job = Job("r", "me", prompt, arrived_s=0.0, deadline_s=9.0, reply_tokens=4)
        tier = TieredRequest(body=body, tier=None, reason="pass")
        made.proved(job, plan, Counts(0, 310, 4), ttft_s=0.1, tier=tier)
        await asyncio.sleep(0.01)
        assert refused == expected


async def test_what_isnt_saved_yet_when_a_reply_ends_is_learned_as_soon_as_it_is() -> None:
    store = SlowStore()
    store.is_empty = True
    made = prover(store)
    reply_to(made, "First?", agent="codex_exec/0.171.0")
    await asyncio.sleep(0.01)
    made.kept()
    await asyncio.sleep(0.01)
    assert store.pinned == []
    store.is_empty = False
    made.kept()
    made.kept()
    await asyncio.sleep(0.01)
    assert [name.partition("~")[2] for name in store.pinned] == ["codex_exec/0.171.0"]
