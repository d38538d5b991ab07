"""Slots and the requests that want them: a state machine, events in, effects out.

Theory of operation. Each event is a method that changes the state and returns the effects the shell
must carry out, in order; each effect that touches a slot ends in exactly one later event about that
slot (`step_done` or `finished`). Nothing here waits, reads a clock, or does I/O, so every decision
can be replayed from the log of events.

A request (a `Job`) is queued, then planned (see `plan`), and its slot is led through *steps*:
empty other slots, save, restore, fill, save, and at last `Start`, which hands the slot to the
gateway until `finished`. A step that fails only costs warmth: a failed restore leaves an empty slot
and the request goes on cold.

What happens to a waiting request, each time that something has changed (`_dispatch`):
1. The engine is down, or a request that must be alone has a slot: nobody begins.
   While what is computed ahead is ended for those who wait (`ahead`), nobody begins either.
2. Requests are looked at by priority, then in turn (`turns`); one that is being counted is passed.
3. What the store has of it is looked up, and what is on its way into the store counts as well.
4. Another request fills its static part: it waits for that, rather than prefill the same beside it.
5. What it begins with is being saved: it waits, if that is shorter than a prefill.
6. Its marks leave more in doubt than counting costs: its prompt is counted.
7. The plan with the least estimated time to first token is chosen (`plan.choose`).
8. There is none while no slot is idle, or no room is left in the pool: later requests wait, too.
   What is computed ahead of a request begins at once or not at all, and empties no other slot.
9. Its slot is led through the plan's steps.

What an event does to a slot:

| event          | idle                | preparing                 | serving                       |
|----------------|---------------------|---------------------------|-------------------------------|
| a plan (9)     | preparing           |                           |                               |
| `step_done`    |                     | the next step; behind the |                               |
|                |                     | last one serving, or idle |                               |
|                |                     | if no job is to be served |                               |
| `finished`     |                     |                           | idle, or saved if cheap;      |
|                |                     |                           | without counts looked at      |
| `retry`        |                     |                           | idle, content unknown         |
| `cancelled`    |                     | its job is gone; a fill   | as `finished`                 |
|                |                     | for nobody is broken off  |                               |
| `tick`         | saved or emptied,   |                           |                               |
|                | if that is worth it |                           |                               |
| `drain`        | saved, if worth it  |                           |                               |
| `engine_down`  | empty               | idle, empty; job waits    | idle, empty                   |
| `engine_slept` | empty               |                           |                               |
| `absorbed`, no | emptied             | emptied behind its steps, | emptied before the next one   |
| numbers        |                     | its job served cold       |                               |

Saved, emptied and looked at are steps, so such a slot is preparing until they are done.

Invariants (tested as a Hypothesis state machine):
1. A slot has at most one job, and an idle slot has none.
2. A job ends exactly once: by `finished`, by `cancelled`, or by a `Fail` effect.
3. No plan promises tokens which the slot or snapshot isn't known to hold exactly.
4. With a shared pool, what slots hold plus what is granted stays within it, unless one prompt
   alone exceeds it (then the engine answers the client).
5. Only one fill of a static part runs at a time; who needs the same waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from keepwarm.core.ahead import overtaken
from keepwarm.core.contents import (
    after_count,
    after_fill,
    after_look,
    after_reply,
    after_restore,
    while_unsure,
)
from keepwarm.core.effects import (
    CountPrompt,
    Effect,
    EraseSlot,
    Fail,
    FilledSlot,
    FillSlot,
    Interrupt,
    LookedSlot,
    LookSlot,
    Outcome,
    RestoredSlot,
    RestoreSlot,
    SavedSlot,
    SaveSlot,
    Start,
    Step,
    StepFailed,
)
from keepwarm.core.job import Job
from keepwarm.core.plan import (
    Machine,
    Plan,
    Source,
    Stored,
    choose,
)
from keepwarm.core.prompt import Mark, Prompt, Segment
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.returns import Returns, first_turn
from keepwarm.core.slots import Content, Slot, SlotState, loss, uncounted
from keepwarm.core.tree import Tokens
from keepwarm.core.turns import Turns, is_full, order
from keepwarm.core.waiting import TAKING_IN, must_count, waits_for_fill, waits_for_save

# A slot that has been idle for so long is saved if that is worth it: the agent is thinking or
# gone, and nobody waits for the engine's loop.
SAVE_AFTER_IDLE_S = 0.3
# What only a slot holds is saved behind a reply if computing it again costs so many times the save:
# a loop of short turns is then slowed by a fiftieth at most.
SAVE_AT_ONCE = 50.0
# In a shared pool every token in it slows every other slot's prefill and decode down (1 us a token
# and step, SmolLM2-135M on two cores), so what is saved and idle leaves it as soon as others
# compute: a restore costs ten milliseconds. What isn't saved leaves after this.
ERASE_AFTER_IDLE_S = 2.0
# Owner of what no request may begin with: no key has this name, so a slot of his is emptied first.
_NOBODY = "\0"

# Finds the longest restorable prefix of a prompt: by its tokens where they are given, else by its
# marks. A model that can't be cut must be left a token to evaluate.
Lookup = Callable[[Prompt, str, Tokens | None], Stored | None]


# Steps that are taken for the slot's sake, also when the client has left.
_ALWAYS = (SaveSlot, LookSlot)


@dataclass(slots=True)
class _Fresh:
    """A static part that was just saved and that the store is still taking in."""

    staged_name: str
    tokens: int
    size_bytes: int


@dataclass(slots=True)
class Scheduler:
    """The state of all slots and requests. See the module's text.

    Args of the events are seconds of one monotonic clock (`now_s`).
    """

    slots: list[Slot]
    machine: Machine
    rates: Rates
    lookup: Lookup
    knows: Callable[[bytes, str], bool] = lambda _digest, _namespace: False
    queue_limit: int = 256
    tenants: int = 1
    up: bool = True
    jobs: dict[str, Job] = field(default_factory=dict)
    _queue: list[str] = field(default_factory=list)
    _scripts: dict[int, deque[Step]] = field(default_factory=dict)
    _running: dict[int, Step] = field(default_factory=dict)
    _helping: dict[int, int] = field(default_factory=dict)
    _fills: dict[bytes, str] = field(default_factory=dict)
    _fresh: dict[bytes, _Fresh] = field(default_factory=dict)
    _absorbing: dict[str, Content] = field(default_factory=dict)
    _returns: Returns = field(default_factory=Returns)
    _turns: Turns = field(default_factory=Turns)

    def submit(self, job: Job, now_s: float) -> list[Effect]:
        """A request has come."""
        waiting = [self.jobs[j] for j in self._queue]
        if is_full(waiting, job, limit=self.queue_limit, tenants=self.tenants):
            return [Fail(job.id, "queue_full")]
        self._turns.take(job)
        self.jobs[job.id] = job
        self._queue.append(job.id)
        return self._dispatch(now_s)

    def step_done(self, step: Step, outcome: Outcome, now_s: float) -> list[Effect]:
        """A step has ended. One that ran on an engine which died meanwhile is ignored."""
        if self._running.get(step.slot) is not step:
            return []
        del self._running[step.slot]
        slot = self.slots[step.slot]
        self._apply(slot, step, outcome)
        return [*self._advance(slot, now_s), *self._dispatch(now_s)]

    def finished(
        self,
        job_id: str,
        now_s: float,
        *,
        counts: Counts | None,
        reply: Segment | None,
        touched: bool = True,
    ) -> list[Effect]:
        """A forwarded request has ended.

        Args:
            job_id: which.
            now_s: when.
            counts: the engine's counts; None if the reply didn't come to its end.
            reply: what the model said, as the client will send it back.
            touched: False if the engine refused the request before it looked at the slot.
        """
        job = self.jobs.get(job_id)
        if job is None or job.plan is None:
            return []
        del self.jobs[job_id]
        slot = self.slots[job.plan.slot]
        if slot.job != job_id:
            return self._dispatch(now_s)  # the engine died meanwhile and the slot was taken back
        is_spoiled = slot.is_spoiled or (counts is not None and self.is_shifted(counts))
        if counts is not None and not is_spoiled:
            self._learn(job, slot, counts, reply)
        if counts is not None or touched:
            slot.owner = job.namespace
        if is_spoiled:
            slot.held_tokens = max(slot.most_tokens, self.machine.slot_tokens)
            slot.content, slot.owner, slot.is_spoiled = None, _NOBODY, False
        effects: list[Effect] = []
        if counts is None and touched and not is_spoiled:
            effects += self._look(slot, job, now_s)
            return [*effects, *self._dispatch(now_s)]
        self._free(slot, now_s)
        if slot.content and self._is_cheap_to_keep(slot.content):
            effects += self._save_if_worth(slot, now_s)
        return [*effects, *self._dispatch(now_s)]

    def counted(
        self,
        job_id: str,
        now_s: float,
        *,
        contents: Sequence[tuple[Content, Tokens]] = (),
    ) -> list[Effect]:
        """A job's prompt was counted, or couldn't be: its `ids` and `is_refused` are set.

        Args:
            job_id: whose.
            now_s: when.
            contents: what was counted of slots beside it.
        """
        held = [slot.content for slot in self.slots]
        for content, counted in contents:
            if any(content is one for one in held):
                after_count(content, counted, None)
        job = self.jobs.get(job_id)
        if job is None:
            return self._dispatch(now_s)
        job.is_counting, job.is_counted = False, True
        if job.known_ids is not None:
            self.rates.observe_count(chars=job.prompt.chars, seconds=job.counted_s)
        return self._dispatch(now_s)

    def cancelled(self, job_id: str, now_s: float) -> list[Effect]:
        """The client has gone before its request was forwarded."""
        job = self.jobs.get(job_id)
        if job is None:
            return []
        slot = self.slots[job.plan.slot] if job.plan else None
        if slot and (slot.job != job_id or slot.state is SlotState.SERVING):
            # It was granted in the very moment in which the client left.
            return self.finished(job_id, now_s, counts=None, reply=None, touched=False)
        job.gone = True
        if job_id in self._queue:
            self._queue.remove(job_id)
            del self.jobs[job_id]
        # Otherwise a step runs for it; the slot is freed when that has ended. A long one is cut
        # short unless others wait for what it makes.
        effects: list[Effect] = []
        running = self._running.get(job.plan.slot) if job.plan else None
        static = job.prompt.static
        if isinstance(running, FillSlot) and static:
            waiting = (self.jobs[j].prompt.static for j in self._queue)
            if not any(s and s.digest == static.digest for s in waiting):
                effects.append(Interrupt(running))
        return [*effects, *self._dispatch(now_s)]

    def engine_down(self, now_s: float) -> list[Effect]:
        """The engine is gone, and with it what every slot held. Planned requests queue again."""
        self.up = False
        for slot in self.slots:
            slot.content, slot.held_tokens, slot.granted_tokens, slot.owner = None, 0, 0, ""
            slot.is_spoiled, slot.staged_name = False, ""
            job = self.jobs.get(slot.job) if slot.job else None
            planned_here = job is not None and job.plan is not None and job.plan.slot == slot.id
            if slot.state is SlotState.PREPARING and job and planned_here:
                self._requeue(job)
            slot.state, slot.job, slot.idle_since_s = SlotState.IDLE, None, now_s
        self._scripts.clear()
        self._running.clear()
        self._helping.clear()
        self._fills.clear()
        return []

    def retry(self, job_id: str, now_s: float) -> list[Effect]:
        """A forwarded request got no byte of an answer: plan it again, ahead of the others."""
        job = self.jobs.get(job_id)
        if job is None or job.plan is None:
            return []
        slot = self.slots[job.plan.slot]
        if slot.job == job_id:
            slot.content, slot.owner = None, _NOBODY if slot.is_spoiled else job.namespace
            slot.held_tokens, slot.is_spoiled = slot.most_tokens, False
            self._free(slot, now_s)
        self._requeue(job)
        return self._dispatch(now_s)

    def engine_up(self, now_s: float) -> list[Effect]:
        """The engine serves again; `set_content` has told what was warmed."""
        self.up = True
        return self._dispatch(now_s)

    def absorbed(
        self,
        staged_name: str,
        now_s: float,
        *,
        ids: Tokens | None = None,
        states: tuple[int, ...] = (),
        spoiled_slot: int | None = None,
    ) -> list[Effect]:
        """The store has taken a staged file in (or refused it): look-ups answer from now on.

        `ids` and `states` are the file's: what the slot held, counted. `spoiled_slot` is the one it
        was saved from if its rows are no numbers: nothing may go on from there.
        """
        effects: list[Effect] = []
        if spoiled_slot is not None:
            copies = [slot for slot in self.slots if slot.staged_name == staged_name]
            for slot in {s.id: s for s in (self.slots[spoiled_slot], *copies)}.values():
                effects += self._spoil(slot, now_s)
        content = self._absorbing.pop(staged_name, None)
        if content is not None and ids is not None:
            after_count(content, ids, states)
        for digest, fresh in list(self._fresh.items()):
            if fresh.staged_name == staged_name:
                del self._fresh[digest]
        return [*effects, *self._dispatch(now_s)]

    def _spoil(self, slot: Slot, now_s: float) -> list[Effect]:
        """Empty a slot, or mark it: then it is emptied before anybody goes on from it."""
        slot.is_spoiled = self.up
        if slot.state is not SlotState.IDLE or not self.up:
            return []
        slot.state = SlotState.PREPARING
        return self._advance(slot, now_s)

    def tick(self, now_s: float) -> list[Effect]:
        """Time has passed: save what has been idle, end what has waited too long."""
        effects: list[Effect] = []
        for job_id in [j for j in self._queue if self.jobs[j].deadline_s <= now_s]:
            self._queue.remove(job_id)
            del self.jobs[job_id]
            effects.append(Fail(job_id, "deadline"))
        if not self._queue and self.up:
            for slot in self.slots:
                if now_s - slot.idle_since_s >= SAVE_AFTER_IDLE_S:
                    effects += self._save_if_worth(slot, now_s)
        if self.up:
            effects += self._thin_out(now_s)
        return [*effects, *self._dispatch(now_s)]

    def is_quiet(self, now_s: float) -> bool:
        """Whether the next tick, too, does nothing if the last one did: nobody waits or is served.

        Every slot has been idle for so long that all was done for which idleness is waited for.
        """
        idle_since_s = max((slot.idle_since_s for slot in self.slots), default=now_s)
        is_long = now_s - idle_since_s > max(SAVE_AFTER_IDLE_S, ERASE_AFTER_IDLE_S)
        return is_long and not self._queue and not self.busy

    def is_settled(self, now_s: float) -> bool:
        """Whether nobody has asked for a while and all is saved that is worth it."""
        if not self.up or self._queue or self.busy or self._absorbing:
            return False
        return all(
            now_s - slot.idle_since_s >= SAVE_AFTER_IDLE_S and not self._worth_saving(slot, now_s)
            for slot in self.slots
        )

    def drain(self, now_s: float) -> list[Effect]:
        """Save what is worth it in every idle slot, before the engine is stopped."""
        return [e for slot in self.slots for e in self._save_if_worth(slot, now_s)]

    def is_shifted(self, counts: Counts) -> bool:
        """Whether a reply went on beyond its slot's end: text was dropped from under its rows.

        They were computed behind what is gone (`--context-shift`), so they are nobody's prefix.
        """
        limit = self.machine.slot_tokens
        return bool(limit) and counts.prompt + counts.decoded > limit

    def engine_slept(self) -> int:
        """The engine unloaded its model by itself and is up still; returns how many slots it cost.

        A request that runs keeps it awake, so all slots are idle.
        """
        held = 0
        for slot in self.slots:
            if slot.state is SlotState.IDLE:
                held += slot.content is not None
                slot.content, slot.held_tokens, slot.owner = None, 0, ""
        return held

    def set_content(self, slot_id: int, content: Content | None, now_s: float) -> None:
        """Tell what a slot holds; only for an idle slot, by who warmed it."""
        slot = self.slots[slot_id]
        assert slot.state is SlotState.IDLE
        slot.content, slot.idle_since_s = content, now_s
        slot.held_tokens = content.tokens if content else 0
        slot.owner = content.namespace if content else ""

    def forget_tenant(self, namespace: str, now_s: float) -> list[Effect]:
        """Empty the idle slots that hold a tenant's text. Nothing of it is saved any more."""
        effects: list[Effect] = []
        for slot in self.slots_of(namespace):
            if slot.state is SlotState.IDLE:
                slot.state = SlotState.PREPARING
                self._scripts[slot.id] = deque([EraseSlot(slot.id)])
                effects += self._advance(slot, now_s)
        return effects

    def slots_of(self, namespace: str) -> list[Slot]:
        """The slots that hold a tenant's text, or compute for it."""
        return [
            slot
            for slot in self.slots
            if slot.owner == namespace
            or (slot.content is not None and slot.content.namespace == namespace)
            or (slot.job is not None and self.jobs[slot.job].namespace == namespace)
        ]

    def forget_contents(self) -> None:
        """Texts render to other tokens than before: nothing is known of what slots hold."""
        for slot in self.slots:
            slot.content = None

    @property
    def queued(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    def queued_of(self, namespace: str) -> int:
        """Those of them that one tenant sent."""
        return sum(self.jobs[job_id].namespace == namespace for job_id in self._queue)

    @property
    def serving(self) -> frozenset[str]:
        """The requests that the engine computes now."""
        return frozenset(
            slot.job for slot in self.slots if slot.state is SlotState.SERVING and slot.job
        )

    @property
    def is_preparing(self) -> bool:
        """Whether a slot is being saved, restored, filled or emptied."""
        return any(slot.state is SlotState.PREPARING for slot in self.slots)

    @property
    def busy(self) -> bool:
        """Whether any slot is prepared or serving."""
        return any(slot.state is not SlotState.IDLE for slot in self.slots)

    def _dispatch(self, now_s: float) -> list[Effect]:
        """Give idle slots to waiting requests; the numbers are those of the module's text."""
        effects: list[Effect] = []
        if not self.up or any(job.is_alone and job.plan for job in self.jobs.values()):  # 1
            return effects
        if (ending := overtaken(self.jobs, self._queue, self._running)) is not None:
            return ending
        for job in sorted(map(self.jobs.__getitem__, self._queue), key=order):  # 2
            if job.is_counting:
                continue
            stored = self._stored(job)  # 3
            if waits_for_fill(job, stored, self._fills, rates=self.rates):  # 4
                job.waited_for_fill = True
                continue
            idle = [slot for slot in self.slots if slot.state is SlotState.IDLE]
            known = (job, stored, idle)
            if waits_for_save(
                *known, self._being_saved(), machine=self.machine, rates=self.rates
            ):  # 5
                continue
            if must_count(*known, machine=self.machine, rates=self.rates):  # 6
                job.is_counting = True
                effects.append(CountPrompt(job.id, uncounted(self.slots, job.namespace)))
                continue
            plan = choose(  # 7
                job.demand(),
                self.slots,
                stored,
                machine=self.machine,
                rates=self.rates,
                now_s=now_s,
            )
            if plan is None and job.ahead_of is None:  # 8
                break
            self._queue.remove(job.id)
            if plan is None or (job.ahead_of is not None and plan.evict):
                del self.jobs[job.id]
                effects.append(Fail(job.id, "no_room"))
                continue
            self._turns.served(job)
            effects += self._begin(job, plan, now_s)  # 9
            if job.is_alone:
                break
        return effects

    def _stored(self, job: Job) -> Stored | None:
        """The longest of what the store holds and what is on its way into it."""
        if self.machine.tells_time and job.known_ids is None:
            return None
        stored = self.lookup(job.prompt, job.namespace, job.known_ids)
        if not self._fresh:
            return stored
        marks = job.prompt.marks
        index = max((i for i, m in enumerate(marks) if m.digest in self._fresh), default=-1)
        fresh = self._fresh[marks[index].digest] if index >= 0 else None
        if fresh and (stored is None or stored.tokens < fresh.tokens):
            return Stored(
                mark_index=index,
                tokens=fresh.tokens,
                promise_tokens=fresh.tokens,
                size_bytes=fresh.size_bytes,
                ready=True,
                staged_name=fresh.staged_name,
            )
        return stored

    def _being_saved(self) -> list[tuple[Content, float]]:
        """What the store has in a moment, and in how many times of what its save takes."""
        soon = [(content, TAKING_IN) for content in self._absorbing.values()]
        soon += [
            (slot.content, 1.0 if slot.job is None else 1.0 + TAKING_IN)
            for slot in self.slots
            if isinstance(self._running.get(slot.id), SaveSlot | LookSlot) and slot.content
        ]
        return soon

    def _begin(self, job: Job, plan: Plan, now_s: float) -> list[Effect]:
        slot = self.slots[plan.slot]
        job.plan = plan
        slot.state, slot.job = SlotState.PREPARING, job.id
        slot.granted_tokens = plan.granted_tokens
        script: deque[Step] = deque()
        effects: list[Effect] = []
        for other_id, save in plan.evict:
            other = self.slots[other_id]
            other.state, other.job = SlotState.PREPARING, job.id
            steps: list[Step] = (
                [self._save_step(other), EraseSlot(other_id)] if save else [EraseSlot(other_id)]
            )
            self._scripts[other_id] = deque(steps)
            self._helping[other_id] = slot.id
        if plan.save_first:
            script.append(self._save_step(slot))
        if plan.restore:
            script.append(RestoreSlot(slot.id, plan.restore, job.id))
        elif slot.is_foreign(job.namespace):
            script.append(EraseSlot(slot.id))
        static = job.prompt.static
        fill = plan.fill or self._must_fill(job)
        if static and fill and static.digest not in self._fills:
            script.append(FillSlot(slot.id, job.id))
            self._fills[static.digest] = job.id
        self._scripts[slot.id] = script
        for other_id, _ in plan.evict:
            effects += self._advance(self.slots[other_id], now_s)
        if not plan.evict:
            effects += self._advance(slot, now_s)
        return effects

    def _must_fill(self, job: Job) -> bool:
        """Whether the store lacks what this job is to save, though a slot may hold it."""
        if not job.must_save or job.static_tokens is None:
            return False
        stored = self._stored(job)
        return stored is None or stored.promise_tokens < job.static_tokens

    def _advance(self, slot: Slot, now_s: float) -> list[Effect]:
        """Take the next step of a slot's script, or end it."""
        if slot.state is not SlotState.PREPARING or slot.id in self._running:
            return []
        job = self.jobs.get(slot.job) if slot.job else None
        script = self._scripts.get(slot.id)
        helped = self._helping.get(slot.id)
        if slot.is_spoiled and not script:
            script = self._scripts[slot.id] = self._to_be_emptied(slot, job)
        if script and (job is None or not job.gone or isinstance(script[0], _ALWAYS)):
            step = script.popleft()
            self._running[slot.id] = step
            return [step]
        self._scripts.pop(slot.id, None)
        if helped is not None:
            del self._helping[slot.id]
            self._free(slot, now_s)
            target = self.slots[helped]
            return [] if helped in self._helping.values() else self._advance(target, now_s)
        if job is None or job.plan is None:
            self._free(slot, now_s)
            return []
        self._end_fill(job)
        if job.gone:
            del self.jobs[job.id]
            self._free(slot, now_s)
            return []
        slot.state = SlotState.SERVING
        if job.is_alone:
            # Nothing is known any more of what they hold, but whose it is.
            for other in self.slots:
                if other is not slot:
                    other.content, other.owner = None, job.namespace
        return [Start(job.id, job.plan)]

    def _to_be_emptied(self, slot: Slot, job: Job | None) -> deque[Step]:
        """What empties a spoiled slot; its job begins at its first token."""
        slot.content, slot.owner, slot.is_spoiled = None, _NOBODY, False
        if job is not None and job.plan is not None and job.plan.slot == slot.id:
            job.plan = replace(
                job.plan, source=Source.COLD, reuse_tokens=0, promise_tokens=0, restore=None
            )
        return deque([EraseSlot(slot.id)])

    def _apply(self, slot: Slot, step: Step, outcome: Outcome) -> None:
        """What a step's outcome says of its slot."""
        job = self.jobs.get(slot.job) if slot.job else None
        if isinstance(outcome, StepFailed):
            self._failed(slot, step, job, emptied=outcome.emptied)
            return
        if isinstance(step, EraseSlot | RestoreSlot):
            slot.is_spoiled, slot.staged_name = False, ""
        if isinstance(step, EraseSlot):
            slot.content, slot.held_tokens, slot.owner = None, 0, ""
        elif isinstance(step, SaveSlot) and isinstance(outcome, SavedSlot):
            if slot.content:
                # All that the slot holds, even if that is less than was thought: another save would
                # bring no more.
                slot.content.saved_tokens = max(outcome.tokens, slot.content.tokens)
                self._absorbing[outcome.staged_name] = slot.content
            if step.static and job and job.prompt.static:
                self._fresh[job.prompt.static.digest] = _Fresh(
                    outcome.staged_name, outcome.tokens, outcome.size_bytes
                )
        elif isinstance(step, RestoreSlot) and isinstance(outcome, RestoredSlot) and job:
            slot.content = after_restore(job, step.stored, outcome.tokens, outcome.ids)
            slot.content.held_from = max(outcome.tokens - self.machine.window_tokens, 0)
            slot.held_tokens, slot.owner = outcome.tokens, slot.content.namespace
            slot.staged_name = step.stored.staged_name or ""
        elif isinstance(step, FillSlot) and isinstance(outcome, FilledSlot) and job:
            self._filled(slot, job, outcome.tokens)
        elif isinstance(step, LookSlot) and isinstance(outcome, LookedSlot) and slot.content:
            slot.content = after_look(slot.content, outcome.tokens)
            slot.held_tokens = outcome.tokens

    def _failed(self, slot: Slot, step: Step, job: Job | None, *, emptied: bool) -> None:
        """A step failed: the slot's content is as before, or else unknown."""
        if isinstance(step, SaveSlot) and slot.content:
            slot.content.save_failed = True
        if isinstance(step, LookSlot):
            slot.content = None
        if isinstance(step, FillSlot) and job:
            slot.owner, slot.held_tokens = job.namespace, slot.most_tokens
            if not emptied:
                # It was broken off: what was computed is as good as any.
                slot.content = while_unsure(job, slot.content)
                self._scripts.setdefault(slot.id, deque()).appendleft(LookSlot(slot.id))
        if emptied:
            slot.content = None
        if job is None or job.plan is None or job.plan.slot != slot.id:
            return
        if emptied or isinstance(step, RestoreSlot):
            # What was to be reused isn't there: promise nothing, and blame no snapshot for it.
            job.plan = replace(
                job.plan, source=Source.COLD, reuse_tokens=0, promise_tokens=0, restore=None
            )
        elif isinstance(step, FillSlot):
            # Nobody knows where the engine was when it stopped; the look behind it may say less.
            job.plan = replace(job.plan, promise_tokens=0)
        if isinstance(step, EraseSlot) and slot.is_foreign(job.namespace):
            # A fill here would be measured against another tenant's tokens.
            self._scripts.pop(slot.id, None)
            job.plan = replace(job.plan, discard=True)
        if isinstance(step, RestoreSlot) and slot.is_foreign(job.namespace):
            self._scripts.setdefault(slot.id, deque()).appendleft(EraseSlot(slot.id))

    def _filled(self, slot: Slot, job: Job, tokens: int) -> None:
        job.static_tokens = tokens
        slot.content = after_fill(
            *(job, slot.content, tokens, job.static_ids), window_tokens=self.machine.window_tokens
        )
        slot.held_tokens, slot.owner = tokens, slot.content.namespace
        if job.plan:
            job.plan = replace(job.plan, promise_tokens=tokens)
        if self.machine.can_save:
            save = replace(self._save_step(slot), static=True)
            self._scripts.setdefault(slot.id, deque()).appendleft(save)

    def _learn(self, job: Job, slot: Slot, counts: Counts, reply: Segment | None) -> None:
        """A slot's new content after a request, and the rates that its reply taught."""
        said = job.prompt.continued(reply) if reply else None
        if not job.is_final:
            self._returns.observe(job.namespace, job.prompt)
        returns = self._returns.chance(job.namespace, job.prompt)
        slot.content = after_reply(
            *(job, slot.content, counts, said),
            returns=returns,
            window_tokens=self.machine.window_tokens,
        )
        if said and self._is_kept(job, said):
            # Asked and answered before, word for word: there is nothing new to save.
            slot.content.saved_tokens = slot.content.tokens
        slot.held_tokens = slot.content.tokens
        self.rates.observe_prefill(tokens=counts.prefilled, seconds=counts.prefill_s)
        looked_back = counts.prompt + counts.decoded / 2
        self.rates.decode_cost.observe(
            context_tokens=looked_back, tokens=counts.decoded, seconds=counts.decode_s
        )
        is_text = job.prompt.marks[-1].tokens is None and not job.prompt.has_media
        if counts.prompt >= 64 and is_text:
            self.rates.tokens_per_char.learn(counts.prompt / max(job.prompt.chars, 1))

    def _is_kept(self, job: Job, said: Mark) -> bool:
        """Whether the store has a prompt with this very reply, or is to have it in a moment."""
        arriving = any(said.digest in content.marks for content in self._absorbing.values())
        return arriving or self.knows(said.digest, job.namespace)

    def _look(self, slot: Slot, job: Job, now_s: float) -> list[Effect]:
        """A reply ended without counts: see what the slot holds of it before anybody gets it."""
        slot.held_tokens = slot.most_tokens
        slot.content = while_unsure(job, slot.content)
        self._free(slot, now_s)
        if slot.content is None or not self.up:
            return []
        slot.state = SlotState.PREPARING
        self._scripts[slot.id] = deque([LookSlot(slot.id)])
        return self._advance(slot, now_s)

    def _worth_saving(self, slot: Slot, now_s: float) -> bool:
        content = slot.content
        if slot.state is not SlotState.IDLE or content is None or not self.machine.can_save:
            return False
        # While nobody waits for the engine, even what is seldom needed is saved.
        at_least = 0.0 if self.busy else first_turn().value
        return loss(
            slot,
            kept_tokens=0,
            row_bytes=self.machine.row_bytes,
            rates=self.rates,
            returns=slot.returns(now_s, at_least=at_least),
            can_save=True,
        ).save

    def _is_cheap_to_keep(self, content: Content) -> bool:
        """Whether a conversation is saved at once: it has gone on before, so it will again.

        An agent in a loop never leaves its slot idle, and a crash would cost it all of the loop;
        but its next turn comes in a moment, and waits for the save.
        """
        save_s = self.rates.save_s(content.tokens * self.machine.row_bytes)
        unsaved_s = self.rates.prefill_s(content.tokens - content.saved_tokens)
        return content.turns > 1 and unsaved_s >= SAVE_AT_ONCE * save_s

    def _thin_out(self, now_s: float) -> list[Effect]:
        """Empty slots of a shared pool that are idle, while others compute.

        At once what the store has; after a while what isn't worth a save, and what can be continued
        from more places in its slot than from the store.
        """
        if self.machine.pool_tokens is None or not self.busy:
            return []
        effects: list[Effect] = []
        for slot in self.slots:
            content = slot.content
            if slot.state is not SlotState.IDLE or content is None or slot.held_tokens == 0:
                continue
            if content.media_at is not None:
                continue  # no save brings its pictures back
            if any(content is absorbing for absorbing in self._absorbing.values()):
                continue
            is_kept = content.saved_tokens >= content.tokens and self.machine.cuttable
            is_old = now_s - slot.idle_since_s >= ERASE_AFTER_IDLE_S
            if is_kept or (is_old and not self._worth_saving(slot, now_s)):
                slot.state = SlotState.PREPARING
                self._scripts[slot.id] = deque([EraseSlot(slot.id)])
                effects += self._advance(slot, now_s)
        return effects

    def _save_if_worth(self, slot: Slot, now_s: float) -> list[Effect]:
        if not self._worth_saving(slot, now_s):
            return []
        slot.state = SlotState.PREPARING
        self._scripts[slot.id] = deque([self._save_step(slot)])
        return self._advance(slot, now_s)

    def _save_step(self, slot: Slot) -> SaveSlot:
        content = slot.content
        assert content
        return SaveSlot(
            slot.id,
            content.namespace,
            tuple(content.marks.items()),
            prefill_s=self.rates.prefill_s(content.tokens),
            static=False,
        )

    def _requeue(self, job: Job) -> None:
        job.plan = None
        if job.gone:
            del self.jobs[job.id]
        else:
            self._queue.insert(0, job.id)

    def _end_fill(self, job: Job) -> None:
        static = job.prompt.static
        if static and self._fills.get(static.digest) == job.id:
            del self._fills[static.digest]

    def _free(self, slot: Slot, now_s: float) -> None:
        if slot.job is not None:
            slot.idle_since_s = now_s  # not after a save on its own: that is no use of it
        slot.state, slot.job, slot.granted_tokens = SlotState.IDLE, None, 0
