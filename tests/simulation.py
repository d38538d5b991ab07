"""The scheduler against a simulated engine and store that remember every token.

The scheduler only knows digests, counts and estimates. The engine simulated here knows what each
slot really holds and who wrote it, so each promise, each budget and each namespace can be held
against the truth, at every step, under any order of events.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from random import Random
from typing import Any

from keepwarm.core.ahead import PRIORITY, prompt_of_ids
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
    Start,
    Step,
    StepFailed,
)
from keepwarm.core.job import Job
from keepwarm.core.plan import Machine, Plan, Stored
from keepwarm.core.prompt import Prompt, Segment, prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import Content, Position, Slot, SlotState
from keepwarm.core.tree import Tokens, as_tokens

ROW_BYTES = 1000
FINGERPRINT = "a model"
CHARS_A_TOKEN = 4

# A token and whose request brought it; '' for what all may share.
Held = list[tuple[int, str]]


def _token_of(text: bytes) -> int:
    return zlib.crc32(text) & 0x7FFFFFFF


def _tokens(text: str) -> list[int]:
    step = CHARS_A_TOKEN
    return [_token_of(text[i : i + step].encode()) for i in range(0, len(text), step)]


def segment_tokens(segment: Segment) -> list[int]:
    """One message as a template would render it."""
    return [
        _token_of(segment.role.encode()),
        *_tokens(segment.text),
        *_tokens(segment.extra),
        _token_of(b"end of turn"),
    ]


@dataclass
class Request:
    """One request, its prompt's real tokens, and what has become of it."""

    id: str
    namespace: str
    body: dict[str, Any]
    prompt: Prompt
    tokens: list[int]
    static_tokens: int
    shared_tokens: int
    job: Job
    plan: Plan | None = None
    reply: str = ""
    gone: bool = False

    def held(self, upto: int) -> Held:
        """Its first tokens, and whose they are."""
        return [
            (token, "" if i < self.shared_tokens else self.namespace)
            for i, token in enumerate(self.tokens[:upto])
        ]


def request_of(
    number: int,
    body: dict[str, Any],
    *,
    namespace: str,
    shared_segments: int,
    now_s: float,
    wait_s: float = 1e9,
    is_alone: bool = False,
) -> Request:
    """A request with its identity and its real tokens."""
    prompt = prompt_of(
        body,
        fingerprint=FINGERPRINT,
        namespace=namespace,
        shared_segments=shared_segments,
    )
    static = shared = 0
    if "prompt" in body:
        tokens = list(body["prompt"])
    else:
        tokens = _tokens(str(body["tools"])) if body.get("tools") else []
        static = len(tokens)
        leading = True
        for count, message in enumerate(body["messages"]):
            # As it was sent, not as the identity reads it: white space is tokens too.
            segment = Segment(message["role"], message["content"])
            tokens += segment_tokens(segment)
            leading = count < shared_segments or (leading and segment.role == "system")
            if leading:
                static = len(tokens)
            if count < shared_segments:
                shared = len(tokens)
        if prompt.static is not None:
            static += 1  # the opening of the user's turn is the same in all of them
            shared += prompt.is_static_shared
        tokens.append(_token_of(b"assistant"))
    job = Job(
        id=f"r{number}",
        namespace=namespace,
        prompt=prompt,
        arrived_s=now_s,
        deadline_s=now_s + wait_s,
        reply_tokens=40,
        can_fill=prompt.static is not None,
        static_shared=prompt.is_static_shared,
        is_alone=is_alone,
        # Every other request can be counted; the others are placed by their marks alone.
        chat=body if number % 2 else None,
    )
    return Request(job.id, namespace, body, prompt, tokens, static, shared, job)


def ahead_of(number: int, content: Content, tokens: list[int], *, now_s: float) -> Request:
    """What is computed ahead of the next turn behind a content: these tokens."""
    ids = as_tokens(tokens)
    job = Job(
        id=f"r{number}",
        namespace=content.namespace,
        prompt=prompt_of_ids(ids, b"ahead" + ids.tobytes()),
        arrived_s=now_s,
        deadline_s=now_s + 1.0,
        reply_tokens=1,
        priority=PRIORITY,
        can_fill=True,
        static_tokens=len(tokens),
        static_ids=ids,
        must_save=True,
        ids=ids,
        ahead_of=content,
    )
    size = len(tokens)
    return Request(job.id, job.namespace, {}, job.prompt, tokens, size, 0, job)


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


@dataclass
class Kept:
    """A snapshot in the simulated store."""

    held: Held
    marks: dict[bytes, Position]
    namespace: str


@dataclass
class Simulation:
    """A scheduler, the engine it thinks it steers, and the rules both must keep."""

    slots: int = 3
    cuttable: bool = True
    pool_tokens: int | None = None
    queue_limit: int = 64
    now_s: float = 1000.0
    engine: list[Held] = field(init=False)
    scheduler: Scheduler = field(init=False)
    requests: dict[str, Request] = field(default_factory=dict)
    pending: list[Step] = field(default_factory=list)
    interrupted: list[FillSlot] = field(default_factory=list)
    staged: dict[str, Held] = field(default_factory=dict)
    arriving: dict[str, Kept] = field(default_factory=dict)
    store: list[Kept] = field(default_factory=list)
    counting: list[CountPrompt] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    said: Counter[str] = field(default_factory=Counter)
    erase_failed: bool = False
    saved_from: dict[str, int] = field(default_factory=dict)
    spoiled: set[int] = field(default_factory=set)
    """Slots that are known to hold what nobody may go on from."""
    _files: int = 0

    def __post_init__(self) -> None:
        self.engine = [[] for _ in range(self.slots)]
        self.scheduler = Scheduler(
            slots=[Slot(i) for i in range(self.slots)],
            machine=Machine(
                row_bytes=ROW_BYTES,
                cuttable=self.cuttable,
                can_save=True,
                pool_tokens=self.pool_tokens,
            ),
            rates=Rates(),
            lookup=self.lookup,
            knows=self.knows,
            queue_limit=self.queue_limit,
        )

    # What the store answers.

    def lookup(self, prompt: Prompt, namespace: str, ids: Tokens | None = None) -> Stored | None:
        """The longest kept prefix, as the gateway's look-up gives it."""
        if ids is not None:
            return self._match([int(token) for token in ids], namespace)
        for index in range(len(prompt.marks) - 1, -1, -1):
            digest = prompt.marks[index].digest
            for number, kept in enumerate(self.store):
                at = kept.marks.get(digest)
                if at is None or not at.exact or kept.namespace not in ("", namespace):
                    continue
                if not self.cuttable and at.tokens != len(kept.held):
                    continue
                return Stored(
                    mark_index=index,
                    tokens=at.tokens,
                    promise_tokens=at.tokens,
                    size_bytes=at.tokens * ROW_BYTES,
                    ready=True,
                    extent_id=number,
                )
        return None

    def _match(self, tokens: list[int], namespace: str) -> Stored | None:
        best: Stored | None = None
        for number, kept in enumerate(self.store):
            if kept.namespace not in ("", namespace):
                continue
            at = common([token for token, _ in kept.held], tokens)
            if not self.cuttable and not at == len(kept.held) < len(tokens):
                continue
            if at and (best is None or at > best.tokens):
                size = at * ROW_BYTES
                best = Stored(-1, at, at, size_bytes=size, ready=True, extent_id=number)
        return best

    def knows(self, digest: bytes, namespace: str) -> bool:
        """Whether a prompt with this mark was saved."""
        kept = [k for k in self.store if k.namespace in ("", namespace)]
        return any(digest in k.marks for k in kept)

    # What the engine does.

    def reusable(self, slot: int, tokens: list[int]) -> int:
        """How many tokens a prompt on this slot isn't computed again for."""
        held = [token for token, _ in self.engine[slot]]
        same = common(held, tokens)
        if not self.cuttable and same != len(held):
            return 0
        return min(same, len(tokens) - 1)

    def write(self, slot: int, request: Request, upto: int) -> int:
        """Prefill a request's first tokens into a slot; returns how many were reused."""
        tokens = request.tokens[:upto]
        reused = self.reusable(slot, tokens)
        if upto and common([t for t, _ in self.engine[slot]], tokens) == upto:
            reused = max(reused, upto - 1)
        for _, whose in self.engine[slot][:reused]:
            assert whose in ("", request.namespace), "one tenant's tokens answered another's prompt"
        # What a tier's text begins with is everyone's, whoever wrote it first.
        self.engine[slot] = [
            old if i < reused and new[1] else new
            for i, (old, new) in enumerate(
                zip_longest(self.engine[slot][:upto], request.held(upto), fillvalue=(0, ""))
            )
        ]
        return reused

    # Events.

    def submit(self, request: Request) -> None:
        """A client sends a request."""
        self.requests[request.id] = request
        self.perform(self.scheduler.submit(request.job, self.now_s))

    def complete(self, step: Step, *, failure: StepFailed | None = None) -> None:
        """A pending step ends."""
        self.pending.remove(step)
        if step in self.interrupted:
            self.interrupted.remove(step)
            failure = StepFailed(emptied=False)
        outcome: Outcome = failure
        if failure is None:
            outcome = self._succeed(step)
        else:
            self._fail(step, failure)
        self.perform(self.scheduler.step_done(step, outcome, self.now_s))

    def _succeed(self, step: Step) -> Outcome:
        slot = step.slot
        if isinstance(step, EraseSlot | RestoreSlot):
            self.spoiled.discard(slot)
        if isinstance(step, EraseSlot):
            self.engine[slot] = []
            return None
        if isinstance(step, FillSlot):
            request = self.requests[step.job]
            reused = self.write(slot, request, request.static_tokens)
            request.job.filled_tokens = request.static_tokens - reused
            request.job.static_tokens = request.static_tokens
            request.job.static_ids = as_tokens(request.tokens[: request.static_tokens])
            return FilledSlot(request.static_tokens)
        if isinstance(step, LookSlot):
            return LookedSlot(len(self.engine[slot]))
        if isinstance(step, RestoreSlot):
            stored = step.stored
            if stored.staged_name is not None:
                held = self.staged[stored.staged_name]
            else:
                assert stored.extent_id is not None
                held = self.store[stored.extent_id].held
            self.engine[slot] = list(held[: stored.tokens])
            ids = as_tokens([token for token, _ in self.engine[slot]])
            return RestoredSlot(len(self.engine[slot]), ids)
        self._files += 1
        name = f"file-{self._files}"
        held = list(self.engine[slot])
        if not held:
            return StepFailed(emptied=True)
        marks = {d: p for d, p in step.marks if 0 < p.tokens <= len(held)}
        self.staged[name] = held
        self.saved_from[name] = slot
        self.arriving[name] = Kept(held, marks, step.namespace)
        return SavedSlot(name, len(held), len(held) * ROW_BYTES)

    def _fail(self, step: Step, failure: StepFailed) -> None:
        if isinstance(step, EraseSlot):
            self.erase_failed = True
        elif isinstance(step, FillSlot):
            request = self.requests[step.job]
            reused = self.reusable(step.slot, request.tokens[: request.static_tokens])
            self.write(step.slot, request, (reused + request.static_tokens) // 2)
        elif isinstance(step, RestoreSlot) and failure.emptied:
            self.engine[step.slot] = []

    def absorb(self, name: str, *, refused: bool = False, spoiled: bool = False) -> None:
        """The store has looked at a staged file; `spoiled`: its rows are no numbers."""
        kept = self.arriving.pop(name)
        slot = self.saved_from[name] if spoiled else None
        refused = refused or spoiled
        if slot is not None and self.scheduler.up:
            self.spoiled.add(slot)
        if not refused:
            self.store.append(kept)
        ids = None if refused else as_tokens([token for token, _ in kept.held])
        effects = self.scheduler.absorbed(
            name, self.now_s, ids=ids, states=(len(kept.held),), spoiled_slot=slot
        )
        self.perform(effects)

    def count(self, effect: CountPrompt) -> None:
        """A prompt was counted, and what slots hold that it might start from."""
        request = self.requests[effect.job]
        request.job.ids = as_tokens(request.tokens)
        by_prompt = {id(r.job.chat): r for r in self.requests.values()}
        contents = [(c, as_tokens(by_prompt[id(c.chat)].tokens)) for c in effect.contents]
        self.perform(self.scheduler.counted(effect.job, self.now_s, contents=contents))

    def finish(self, request: Request, *, decoded: int, heard: bool, touched: bool = True) -> None:
        """A forwarded request ends: with the engine's counts, with none, or refused."""
        assert request.plan
        slot = request.plan.slot
        counts = reply = None
        if self.scheduler.slots[slot].job == request.id and touched:
            cached = self.write(slot, request, len(request.tokens))
            if heard:
                request.reply = f"reply to {len(request.tokens)} " + "x" * (4 * decoded)
                reply = Segment("assistant", request.reply)
                said = [*_tokens(reply.text), _token_of(b"end of turn")]
                self.engine[slot] += [(t, request.namespace) for t in said[:-1]]
                counts = Counts(cached, len(request.tokens) - cached, len(said))
            else:
                keep = max(cached, len(request.tokens) - decoded)
                self.engine[slot] = self.engine[slot][:keep]
        self._end(request)
        self.perform(
            self.scheduler.finished(
                request.id, self.now_s, counts=counts, reply=reply, touched=touched
            )
        )
        if not request.gone:
            self.served[request.id] += 1

    def continued(self, request: Request, *, trimmed: bool) -> dict[str, Any]:
        """The body of the next turn; `trimmed`: white space makes other tokens of the reply."""
        text = request.reply + (" " * 5 if trimmed else "")
        said = {"role": "assistant", "content": text}
        more = {"role": "user", "content": "and then?"}
        return {**request.body, "messages": [*request.body["messages"], said, more]}

    def cancel(self, request: Request) -> None:
        """The client hangs up before its request was forwarded."""
        request.gone = True
        if not self.ended[request.id]:
            self._end(request)
        self.perform(self.scheduler.cancelled(request.id, self.now_s))

    def retry(self, request: Request) -> None:
        """The engine gave no byte of an answer."""
        assert request.plan
        slot = request.plan.slot
        if self.scheduler.slots[slot].job == request.id:
            self.write(slot, request, len(request.tokens) // 2)
        request.plan = None
        self.perform(self.scheduler.retry(request.id, self.now_s))

    def engine_down(self) -> None:
        """The engine dies, and its slots with it; running steps will report a failure, late."""
        self.engine = [[] for _ in range(self.slots)]
        self.spoiled.clear()
        late, self.pending = self.pending, []
        self.interrupted.clear()
        self.perform(self.scheduler.engine_down(self.now_s))
        for step in late:
            self.perform(self.scheduler.step_done(step, StepFailed(emptied=True), self.now_s))

    def engine_up(self) -> None:
        """The engine serves again, empty."""
        self.perform(self.scheduler.engine_up(self.now_s))

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds
        self.perform(self.scheduler.tick(self.now_s))

    def drain(self) -> None:
        """The end is near: save what is worth it."""
        self.perform(self.scheduler.drain(self.now_s))

    def _end(self, request: Request) -> None:
        self.ended[request.id] += 1
        assert self.ended[request.id] == 1, f"{request.id} ended twice"

    # Effects.

    def perform(self, effects: list[Effect]) -> None:
        """Carry out effects in order, and hold each against the truth."""
        for effect in effects:
            self.said[type(effect).__name__] += 1
            if isinstance(effect, Start):
                self._started(effect)
            elif isinstance(effect, Fail):
                self._end(self.requests[effect.job])
            elif isinstance(effect, Interrupt):
                assert effect.step in self.pending, "a step that doesn't run was interrupted"
                self.interrupted.append(effect.step)
            elif isinstance(effect, CountPrompt):
                self.counting.append(effect)
            else:
                running = [step.slot for step in self.pending]
                assert effect.slot not in running, "two steps work on one slot"
                assert self.scheduler.slots[effect.slot].state is SlotState.PREPARING
                self.pending.append(effect)
        self.check()
        while self.counting:
            self.count(self.counting.pop(0))
        for request in [r for r in self.running if r.job.ahead_of is not None]:
            # What was computed ahead is there to be filled and saved, and nothing is forwarded.
            self._end(request)
            self.perform(
                self.scheduler.finished(
                    request.id, self.now_s, counts=None, reply=None, touched=False
                )
            )

    def _started(self, effect: Start) -> None:
        request = self.requests[effect.job]
        plan = effect.plan
        slot = self.scheduler.slots[plan.slot]
        assert not self.ended[request.id], "a request that had ended was started"
        assert request.plan is None, "a request was started twice"
        assert slot.state is SlotState.SERVING
        assert slot.job == request.id
        assert plan.slot not in [step.slot for step in self.pending]
        assert self.scheduler.up, "a request was started on an engine that is down"
        request.plan = plan
        if request.job.is_alone:
            for other in self.scheduler.slots:
                if other.id != plan.slot:
                    assert other.content is None, "what another slot holds is about to be lost"
                    # It empties them in the end; a shared pool has to rely on that.
                    self.engine[other.id] = [] if self.pool_tokens else request.held(99_999)
        if plan.discard:
            self.engine[plan.slot] = []  # what `cache_prompt: false` does
            self.spoiled.discard(plan.slot)
        assert plan.slot not in self.spoiled, "a request goes on from what are no numbers"
        reused = self.reusable(plan.slot, request.tokens)
        promised = min(plan.promise_tokens, len(request.tokens) - 1)
        assert reused >= promised, f"promised {promised} tokens, the slot has {reused}: {plan}"
        for _, whose in self.engine[plan.slot][:reused]:
            assert whose in ("", request.namespace), "a slot holds another tenant's tokens"
        self._check_pool(request, plan)

    def _check_pool(self, request: Request, plan: Plan) -> None:
        if self.pool_tokens is None or self.erase_failed:
            return
        used = plan.prompt_tokens + request.job.reply_tokens
        others = 0
        for slot in self.scheduler.slots:
            if slot.id == plan.slot:
                continue
            granted = 0
            if slot.job in self.requests and slot.state is SlotState.SERVING:
                other = self.requests[slot.job]
                if other.plan:
                    granted = other.plan.prompt_tokens + other.job.reply_tokens
            others += max(len(self.engine[slot.id]), granted)
        # Lengths are estimates before the engine has counted them.
        assert others == 0 or used + others <= self.pool_tokens * 1.02, (
            f"{used} granted beside {others} in a pool of {self.pool_tokens}"
        )

    def check(self) -> None:
        """What holds between any two events."""
        scheduler = self.scheduler
        working = {step.slot for step in self.pending}
        for slot in scheduler.slots:
            if slot.state is SlotState.IDLE:
                assert slot.job is None, "an idle slot has a job"
                assert slot.id not in working, "a step works on an idle slot"
            elif slot.state is SlotState.SERVING:
                assert slot.id not in working, "a step works on a serving slot"
                assert slot.job in scheduler.jobs, "a slot serves a job that is gone"
                assert not self.ended[slot.job], "a slot serves a request that has ended"
            else:
                helpers = {s.id for s in scheduler.slots if s.job is not None and s.job == slot.job}
                assert ({slot.id} | helpers) & working, "nothing prepares a preparing slot"
        serving = [s.job for s in scheduler.slots if s.state is SlotState.SERVING]
        if any(self.requests[job].job.is_alone for job in serving if job):
            busy = [s.id for s in scheduler.slots if s.state is not SlotState.IDLE]
            assert len(busy) == 1, "a request that must be alone isn't"
        assert len(serving) == len(set(serving)), "a job has two slots"
        fills = [
            self.requests[step.job].prompt.static
            for step in self.pending
            if isinstance(step, FillSlot)
        ]
        digests = [static.digest for static in fills if static]
        assert len(digests) == len(set(digests)), "a static part is filled twice at a time"

    @property
    def waiting(self) -> list[Request]:
        """Requests that were sent and neither started nor ended."""
        return [r for r in self.requests.values() if r.plan is None and not self.ended[r.id]]

    @property
    def running(self) -> list[Request]:
        """Requests that were started and haven't ended."""
        return [r for r in self.requests.values() if r.plan and not self.ended[r.id]]

    def settle(self, random: Random | None = None) -> None:
        """Let the engine come up and everything end well, and see that nothing was left behind."""
        choose = (random or Random(0)).choice
        self.engine_up()
        for _ in range(200_000):
            if self.pending:
                self.complete(choose(self.pending))
            elif self.running:
                self.finish(choose(self.running), decoded=3, heard=True)
            elif self.arriving:
                self.absorb(choose(list(self.arriving)))
            elif self.waiting:
                self.tick(0.01)
                going = self.pending or self.running
                assert going, f"{len(self.waiting)} requests wait and nothing goes on"
            else:
                break
        for _ in range(5):
            self.tick(1.0)
            while self.pending:
                self.complete(self.pending[0])
        scheduler = self.scheduler
        assert not self.waiting
        assert all(count == 1 for count in self.ended.values())
        assert set(self.ended) >= set(self.requests)
        assert [s.state for s in scheduler.slots] == [SlotState.IDLE] * self.slots
        assert not scheduler.jobs
        assert scheduler.queued == 0
