"""What one tenant may take of what all share: queue, slots in turn, learned pins, figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from keepwarm.core.effects import Effect, Fail, Start
from keepwarm.core.job import Job
from keepwarm.core.plan import Machine
from keepwarm.core.prompt import prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import Slot
from keepwarm.deployment.proof import Prover
from keepwarm.errors import ConfigError
from keepwarm.keys import load_keys
from keepwarm.store.types import Origin, Pin


def scheduler(*, slots: int, queue: int, tenants: int = 2) -> Scheduler:
    return Scheduler(
        slots=[Slot(number) for number in range(slots)],
        machine=Machine(row_bytes=1, cuttable=True, can_save=False, pool_tokens=None),
        rates=Rates(),
        lookup=lambda *_: None,
        queue_limit=queue,
        tenants=tenants,
    )


def job(name: str, *, priority: int = 0) -> Job:
    """`a1` is a request of tenant `a`."""
    prompt = prompt_of({"prompt": name}, fingerprint="f", namespace=name[0])
    return Job(name, name[0], prompt, arrived_s=0.0, deadline_s=9.0, priority=priority)


def is_refused(effects: list[Effect]) -> bool:
    return any(isinstance(effect, Fail) for effect in effects)


def test_a_batch_keeps_no_interactive_request_out_of_the_queue() -> None:
    made = scheduler(slots=0, queue=4)
    refused = [is_refused(made.submit(job(f"a{n}", priority=1), 0.0)) for n in range(4)]
    assert refused == [False, False, True, True], "half is one tenant's"
    assert not is_refused(made.submit(job("a9"), 0.0))


def test_one_tenant_cant_fill_the_queue_for_all() -> None:
    made = scheduler(slots=0, queue=4)
    assert [is_refused(made.submit(job(f"a{n}"), 0.0)) for n in range(3)] == [False, False, True]
    assert [is_refused(made.submit(job(f"b{n}"), 0.0)) for n in range(2)] == [False, False]
    assert is_refused(made.submit(job("c0"), 0.0)), "it is full"
    assert made.queued_of("a") == made.queued_of("b") == 2


def test_a_single_tenant_has_the_whole_queue() -> None:
    made = scheduler(slots=0, queue=3, tenants=1)
    assert [is_refused(made.submit(job(f"a{n}"), 0.0)) for n in range(4)] == [*[False] * 3, True]


def test_tenants_take_turns() -> None:
    made = scheduler(slots=1, queue=99)
    order: list[str] = []

    def note(effects: list[Effect]) -> None:
        order.extend(effect.job for effect in effects if isinstance(effect, Start))

    for name in ("a0", "a1", "a2", "a3", "b0", "c0", "b1"):
        note(made.submit(job(name), 0.0))
    while len(order) < 7:
        note(made.finished(order[-1], 1.0, counts=None, reply=None, touched=False))
    assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


async def test_what_one_tenant_learns_costs_the_others_no_pin() -> None:
    pins = [
        Pin(f"learned:{who}:{number}", number, 10, Origin.LEARNED, b"d", 1.0, number, None, 0)
        for who, numbers in (("few:x", range(2)), ("many", range(2, 12)))
        for number in numbers
    ]
    gone: list[str] = []

    async def unpin(name: str) -> None:
        gone.append(name)

    deployment = SimpleNamespace(
        store=SimpleNamespace(pins=lambda: pins, unpin=unpin),
        settings=SimpleNamespace(store=SimpleNamespace(learned=8)),
    )
    await Prover(cast("Any", deployment))._forget_oldest()
    assert gone == [f"learned:many:{number}" for number in range(2, 6)]


def test_figures_of_all_are_for_operators_and_for_who_is_alone() -> None:
    alone = load_keys(["alice:1", "alice:2"], "")
    assert alone.sees_all("alice")
    assert alone.tenants == 1
    several = load_keys(["alice:1", "bob:2"], "", ["bob"])
    assert not several.sees_all("alice")
    assert several.sees_all("bob")
    with pytest.raises(ConfigError, match="carol"):
        load_keys(["alice:1"], "", ["carol"])
