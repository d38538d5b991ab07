"""Thousands of seeded storms of events, held against the truth at every step."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from keepwarm.core.effects import EraseSlot, StepFailed
from simulation import Request, Simulation, request_of

TIER = {"role": "system", "content": "You are the agent of this house. " * 40}
OWN = [
    {"role": "system", "content": "Own instructions, long ones. " * 30},
    {"role": "system", "content": "Own instructions, others. " * 60},
    {"role": "system", "content": "Short."},
]
ASKED = ["What is the time?", "Tell me a story. " * 30, "Once more.", "Tell me a story. " * 15]
TOOLS = [{"type": "function", "function": {"name": f"tool_{i}"}} for i in range(12)]


def body_of(random: Random) -> tuple[dict[str, Any], int]:
    """A first turn, and how many of its messages are a tier's."""
    user = {"role": "user", "content": random.choice(ASKED)}
    kind = random.random()
    if kind < 0.3:
        return {"messages": [TIER, user]}, 1
    if kind < 0.4:
        return {"messages": [TIER, random.choice(OWN), user]}, 1
    if kind < 0.5:
        return {"messages": [*OWN[:2], user]}, 0
    if kind < 0.8:
        body: dict[str, Any] = {"messages": [random.choice(OWN), user]}
        if random.random() < 0.4:
            body["tools"] = TOOLS[: random.choice((1, 12))]
        return body, 0
    if kind < 0.9:
        return {"messages": [user]}, 0
    return {"prompt": [random.randrange(50) for _ in range(random.choice((5, 130)))]}, 0


STORMS = 250  # in each of ten parts


class Storm:
    """One seeded run."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.sim = Simulation(
            slots=self.random.choice((1, 2, 3, 4)),
            cuttable=self.random.random() < 0.7,
            pool_tokens=self.random.choice((None, None, 1200, 2500)),
            queue_limit=self.random.choice((3, 64)),
        )
        self.number = 0
        self.is_up = True

    def run(self, events: int) -> Simulation:
        for _ in range(events):
            self.step()
        self.sim.settle(self.random)
        return self.sim

    def step(self) -> None:
        random, sim = self.random, self.sim
        event = random.random()
        if event < 0.25:
            self.submit()
        elif event < 0.55 and sim.pending:
            self.complete()
        elif event < 0.75 and sim.running:
            self.finish(random.choice(sim.running))
        elif event < 0.82 and sim.arriving:
            sim.absorb(random.choice(list(sim.arriving)), refused=random.random() < 0.1)
        elif event < 0.90 and sim.waiting:
            sim.cancel(random.choice(sim.waiting))
        elif event < 0.93 and sim.running:
            self.cancel_or_retry(random.choice(sim.running))
        elif event < 0.99:
            sim.tick(random.choice((0.0, 0.05, 0.4, 60.0)))
        elif self.is_up and random.random() < 0.5:
            self.is_up = False
            sim.engine_down()
        elif not self.is_up:
            self.is_up = True
            sim.engine_up()
        else:
            sim.drain()

    def submit(self) -> None:
        self.number += 1
        sim, random = self.sim, self.random
        past = [r for r in sim.requests.values() if r.reply and "prompt" not in r.body]
        namespace = random.choice("ab")
        if past and random.random() < 0.5:
            before = random.choice(past)
            body = sim.continued(before, trimmed=random.random() < 0.3)
            shared = 1 if before.shared_tokens else 0
            namespace = before.namespace
        else:
            body, shared = body_of(random)
        sim.submit(
            request_of(
                self.number,
                body,
                namespace=namespace,
                shared_segments=shared,
                now_s=sim.now_s,
                wait_s=random.choice((1e9, 30.0)),
                is_alone=random.random() < 0.05,
            )
        )

    def complete(self) -> None:
        step = self.random.choice(self.sim.pending)
        failure = None
        if self.random.random() < 0.15 and not isinstance(step, EraseSlot):
            failure = StepFailed(emptied=self.random.random() < 0.5)
        self.sim.complete(step, failure=failure)

    def finish(self, request: Request) -> None:
        kind = self.random.random()
        decoded = self.random.choice((0, 2, 20))
        self.sim.finish(request, decoded=decoded, heard=kind < 0.8, touched=kind < 0.9)

    def cancel_or_retry(self, request: Request) -> None:
        if self.random.random() < 0.5:
            self.sim.retry(request)
        else:
            self.sim.cancel(request)


@pytest.mark.parametrize("block", range(10))
def test_no_storm_of_events_breaks_a_rule_or_loses_a_request(block: int) -> None:
    served = 0
    for seed in range(block * STORMS, (block + 1) * STORMS):
        try:
            sim = Storm(seed).run(50)
        except AssertionError as error:
            raise AssertionError(f"storm {seed}: {error}") from error
        served += sum(sim.served.values())
    assert served > 1000
