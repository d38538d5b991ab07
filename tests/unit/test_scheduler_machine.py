"""The scheduler as a Hypothesis state machine: any order of events, held against the truth."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from keepwarm.core.effects import StepFailed
from simulation import Request, Simulation, ahead_of, request_of

TIER = {"role": "system", "content": "You are the agent of this house. " * 30}
OWN = {"role": "system", "content": "Follow the rules of my own. " * 40}
SHORT = {"role": "system", "content": "Be brief."}
USERS = [{"role": "user", "content": text} for text in ("What now?", "A long question. " * 25)]

# (messages before the user's, how many of them are a tier's)
STATICS: list[tuple[list[dict[str, Any]], int]] = [
    ([TIER], 1),
    ([TIER, SHORT], 1),
    ([OWN], 0),
    ([SHORT], 0),
    ([], 0),
]


class SchedulerMachine(RuleBasedStateMachine):
    """`Simulation` asserts the rules after every event; at the end nothing may be left behind."""

    sim: Simulation

    @initialize(
        slots=st.integers(1, 3),
        cuttable=st.booleans(),
        pool_tokens=st.sampled_from([None, 900, 2500]),
        queue_limit=st.sampled_from([2, 64]),
    )
    def begin(self, slots: int, cuttable: bool, pool_tokens: int | None, queue_limit: int) -> None:
        self.sim = Simulation(
            slots=slots, cuttable=cuttable, pool_tokens=pool_tokens, queue_limit=queue_limit
        )
        self.number = 0
        self.is_up = True

    def send(
        self,
        body: dict[str, Any],
        shared: int,
        namespace: str,
        wait_s: float,
        *,
        is_alone: bool = False,
    ) -> None:
        self.number += 1
        self.sim.submit(
            request_of(
                self.number,
                body,
                namespace=namespace,
                shared_segments=shared,
                now_s=self.sim.now_s,
                wait_s=wait_s,
                is_alone=is_alone,
            )
        )

    @rule(
        static=st.sampled_from(STATICS),
        user=st.sampled_from(USERS),
        namespace=st.sampled_from("ab"),
        wait_s=st.sampled_from([1e9, 20.0]),
        is_alone=st.sampled_from([False, False, False, True]),
    )
    def a_request_comes(
        self,
        static: tuple[list[dict[str, Any]], int],
        user: dict[str, Any],
        namespace: str,
        wait_s: float,
        is_alone: bool,
    ) -> None:
        messages, shared = static
        body = {"messages": [*messages, user]}
        self.send(body, shared, namespace, wait_s, is_alone=is_alone)

    @precondition(
        lambda self: any(r.reply and "messages" in r.body for r in self.sim.requests.values())
    )
    @rule(data=st.data(), trimmed=st.booleans())
    def a_conversation_goes_on(self, data: st.DataObject, trimmed: bool) -> None:
        talks = [r for r in self.sim.requests.values() if r.reply and "messages" in r.body]
        before: Request = data.draw(st.sampled_from(talks))
        body = self.sim.continued(before, trimmed=trimmed)
        self.send(body, 1 if before.shared_tokens else 0, before.namespace, 1e9)

    @precondition(lambda self: any(s.content for s in self.sim.scheduler.slots))
    @rule(data=st.data(), kept=st.floats(0.0, 1.0))
    def a_turn_is_computed_ahead(self, data: st.DataObject, kept: float) -> None:
        slots = [s for s in self.sim.scheduler.slots if s.content]
        slot = data.draw(st.sampled_from(slots))
        held = [t for t, whose in self.sim.engine[slot.id] if whose in ("", slot.owner)]
        self.number += 1
        tokens = [*held[: int(kept * len(held))], *range(self.number, self.number + 40)]
        assert slot.content
        self.sim.submit(ahead_of(self.number, slot.content, tokens, now_s=self.sim.now_s))

    @precondition(lambda self: any(r.job.ahead_of for r in self.sim.requests.values()))
    @rule(data=st.data())
    def the_next_turn_comes(self, data: st.DataObject) -> None:
        ahead = [r for r in self.sim.requests.values() if r.job.ahead_of]
        before: Request = data.draw(st.sampled_from(ahead))
        body = {"prompt": [*before.tokens, *range(7, 30)]}
        self.send(body, 0, before.namespace, 1e9)

    @precondition(lambda self: self.sim.pending)
    @rule(data=st.data(), fails=st.sampled_from([None, None, None, True, False]))
    def a_step_ends(self, data: st.DataObject, fails: bool | None) -> None:
        step = data.draw(st.sampled_from(self.sim.pending))
        self.sim.complete(step, failure=None if fails is None else StepFailed(emptied=fails))

    @precondition(lambda self: self.sim.running)
    @rule(
        data=st.data(),
        decoded=st.integers(0, 20),
        how=st.sampled_from(["heard", "heard", "cut off", "refused"]),
    )
    def a_reply_ends(self, data: st.DataObject, decoded: int, how: str) -> None:
        request = data.draw(st.sampled_from(self.sim.running))
        self.sim.finish(request, decoded=decoded, heard=how == "heard", touched=how != "refused")

    @precondition(lambda self: self.sim.waiting or self.sim.running)
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        self.sim.cancel(data.draw(st.sampled_from([*self.sim.waiting, *self.sim.running])))

    @precondition(lambda self: self.sim.running)
    @rule(data=st.data())
    def a_request_is_sent_again(self, data: st.DataObject) -> None:
        self.sim.retry(data.draw(st.sampled_from(self.sim.running)))

    @precondition(lambda self: self.sim.arriving)
    @rule(data=st.data(), found=st.sampled_from(["sound", "sound", "refused", "no numbers"]))
    def the_store_has_looked(self, data: st.DataObject, found: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.sim.arriving)))
        self.sim.absorb(name, refused=found == "refused", spoiled=found == "no numbers")

    @precondition(lambda self: self.is_up)
    @rule()
    def the_engine_dies(self) -> None:
        self.is_up = False
        self.sim.engine_down()

    @precondition(lambda self: not self.is_up)
    @rule()
    def the_engine_is_back(self) -> None:
        self.is_up = True
        self.sim.engine_up()

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 30.0, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.sim.tick(seconds)

    @rule()
    def the_end_is_near(self) -> None:
        self.sim.drain()

    @rule()
    def the_template_changes(self) -> None:
        self.sim.scheduler.forget_contents()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.settle()


SchedulerMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestSchedulerMachine = SchedulerMachine.TestCase
