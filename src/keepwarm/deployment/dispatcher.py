"""Carries out the scheduler's effects: the only place where slots are saved, restored and filled.

Theory of operation. One event loop owns the scheduler. A request calls `acquire`, which ends when
its slot is ready, and then `finish` exactly once (or `retry`, which is `acquire` again). Steps run
as tasks, one at a time a slot; each reports its outcome to the scheduler, whose next effects are
carried out at once. Store work that nobody waits for (taking a saved file in) runs behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

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
from keepwarm.core.plan import Plan
from keepwarm.core.prompt import Segment
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.tree import Tokens, as_tokens
from keepwarm.deployment.slot_store import SlotStore
from keepwarm.engine.counting import PromptCounter, count_all
from keepwarm.engine.static_end import static_tokens
from keepwarm.errors import (
    DeadlineError,
    EngineDownError,
    EngineError,
    EngineRefusedError,
    QueueFullError,
    SnapshotError,
)
from keepwarm.explain.metrics import Metrics
from keepwarm.store.types import Origin

log = logging.getLogger("keepwarm")

_TICK_S = 0.1
# While nothing can happen by time alone. A wake costs 0.3 ms (two cores), so that ten a second were
# most of what an idle gateway cost.
_QUIET_TICK_S = 2.0
# A slot that its client left is looked at so often, and for so long: a batch of 2,048 tokens takes
# minutes on the slowest machines.
_LOOK_EVERY_S = 0.02
_LOOK_FOR_S = 300.0
# What nobody has asked for is filled in pieces of what the engine computes at a time.
_PIECE_TOKENS = 512
# Static parts whose tokens are remembered, so that filling one again needs no rendering.
_KNOWN_STATICS = 64


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot for one request, and what getting it cost in seconds."""

    plan: Plan
    queued_s: float
    prepared_s: float


class Supervise(Protocol):
    """Runs a task in the background and loses no failure of it."""

    def __call__(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Begin it; what is named `absorb` is waited for at the end."""


@dataclass(slots=True)
class _Waiting:
    future: asyncio.Future[Plan]
    begun_s: float | None = None


class Dispatcher:
    """See the module. All methods are called on the event loop that made it."""

    def __init__(
        self,
        scheduler: Scheduler,
        counter: PromptCounter,
        snapshots: SlotStore,
        metrics: Metrics,
        supervise: Supervise,
    ) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self._counter = counter
        self._client = counter.client
        self._snapshots = snapshots
        self._supervise = supervise
        self._waiting: dict[str, _Waiting] = {}
        # What each job's static part is filled from: a body to render, or its very tokens.
        self._bodies: dict[str, dict[str, Any] | list[int]] = {}
        self._fills: dict[FillSlot, asyncio.Task[Outcome]] = {}
        self._statics: OrderedDict[bytes, list[int]] = OrderedDict()
        self._is_closed = False
        self._has_event = asyncio.Event()
        # Called when the store has taken a slot's file in.
        self.on_kept: Callable[[], None] = lambda: None

    @property
    def rates(self) -> Rates:
        """What things cost here."""
        return self.scheduler.rates

    def start(self) -> asyncio.Task[None]:
        """Begin the clock that saves idle slots and ends waits; its task never ends by itself."""
        return self._supervise(self._tick())

    def close(self) -> None:
        """Begin nothing more: the tasks of running steps are about to be cancelled."""
        self._is_closed = True
        for task in self._fills.values():
            task.cancel()

    async def acquire(self, job: Job, static: dict[str, Any] | list[int] | None) -> Grant:
        """Wait until a slot is ready for a request.

        Args:
            job: the request; its id must be new.
            static: what its static part is filled from, a chat body to render or the token ids;
                None if it can't be filled.

        Raises:
            QueueFullError, DeadlineError: it was not forwarded and holds nothing.
        """
        if isinstance(static, dict) and self._counter.tells_time:
            static = None  # it may render otherwise by the time it is filled
        known = job.prompt.static and self._statics.get(job.prompt.static.digest)
        known = static if isinstance(static, list) else known
        if known:
            job.static_tokens, job.static_ids = len(known), as_tokens(known)
        if static is not None:
            self._bodies[job.id] = static
            job.can_fill = True
        return await self._wait(job, lambda now_s: self.scheduler.submit(job, now_s))

    async def retry(self, job: Job) -> Grant:
        """Give a slot back whose engine gave no answer, and wait for another.

        Raises: as `acquire`; EngineDownError: Keepwarm is stopping.
        """
        if self._is_closed:
            raise EngineDownError("Keepwarm is stopping.")
        return await self._wait(job, lambda now_s: self.scheduler.retry(job.id, now_s))

    def finish(
        self, job: Job, *, counts: Counts | None, reply: Segment | None, touched: bool = True
    ) -> None:
        """Give a slot back; see `Scheduler.finished`. Calling it again does nothing."""
        self._bodies.pop(job.id, None)
        if counts is not None and self.scheduler.is_shifted(counts):
            self.metrics.miss("context_shift")
        self._perform(
            self.scheduler.finished(
                job.id, time.monotonic(), counts=counts, reply=reply, touched=touched
            )
        )

    def know_static(self, digest: bytes, tokens: list[int]) -> None:
        """Remember a static part's tokens, unless its template renders it otherwise later on."""
        if self._counter.tells_time:
            return
        self._statics[digest] = tokens
        self._statics.move_to_end(digest)
        if len(self._statics) > _KNOWN_STATICS:
            self._statics.popitem(last=False)

    def forget_rendered(self) -> None:
        """The template renders otherwise now: no text's tokens are known any more."""
        self._statics.clear()
        self.scheduler.forget_contents()

    def engine_down(self) -> None:
        """The engine is gone and every slot empty."""
        self._perform(self.scheduler.engine_down(time.monotonic()))

    def engine_slept(self) -> None:
        """The engine has unloaded its model, and loads it again for the next request."""
        for _ in range(self.scheduler.engine_slept()):
            self.metrics.miss("slept")

    def engine_up(self) -> None:
        """The engine is back and warmed."""
        self._perform(self.scheduler.engine_up(time.monotonic()))

    def refuse_waiting(self, message: str) -> None:
        """End every wait for a slot: the engine doesn't come back soon."""
        for job_id, waiting in list(self._waiting.items()):
            if not waiting.future.done():
                waiting.future.set_exception(EngineDownError(message))
                self._perform(self.scheduler.cancelled(job_id, time.monotonic()))
        self._forget_bodies()

    async def drain(self, timeout_s: float) -> None:
        """Wait for running requests, then save what is worth it, within a time."""
        deadline = time.monotonic() + timeout_s
        while self.scheduler.busy and time.monotonic() < deadline:  # noqa: ASYNC110 - at shutdown
            await asyncio.sleep(0.02)
        self._perform(self.scheduler.drain(time.monotonic()))
        # What still computes is about to be broken off, so only the saves are waited for.
        while self.scheduler.is_preparing and time.monotonic() < deadline + 5:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def _wait(self, job: Job, event: Callable[[float], list[Effect]]) -> Grant:
        waiting = _Waiting(asyncio.get_running_loop().create_future())
        self._waiting[job.id] = waiting
        began_s = time.monotonic()
        try:
            self._perform(event(began_s))
            plan = await waiting.future
        except asyncio.CancelledError:
            if waiting.future.done() and not waiting.future.cancelled():
                # The slot was ready in the same moment: it was granted, so it is given back.
                self.finish(job, counts=None, reply=None, touched=False)
            else:
                self._perform(self.scheduler.cancelled(job.id, time.monotonic()))
                self._forget_bodies()
            raise
        finally:
            del self._waiting[job.id]
        now_s = time.monotonic()
        prepared_s = now_s - (waiting.begun_s or now_s)
        return Grant(plan, queued_s=now_s - began_s - prepared_s, prepared_s=prepared_s)

    def forget_tenant(self, namespace: str) -> int:
        """Empty the idle slots that hold a tenant's text; returns how many slots hold it yet."""
        self._perform(self.scheduler.forget_tenant(namespace, time.monotonic()))
        return len(self.scheduler.slots_of(namespace))

    def _perform(self, effects: list[Effect]) -> None:
        self._has_event.set()
        for effect in effects:
            if isinstance(effect, Start):
                self._resolve(effect.job, effect.plan)
            elif isinstance(effect, Fail):
                self._refuse(effect)
            elif isinstance(effect, CountPrompt):
                self._supervise(self._count(effect))
            elif isinstance(effect, Interrupt):
                if task := self._fills.get(effect.step):
                    task.cancel()
            else:
                self._mark_begun(effect)
                if isinstance(effect, FillSlot):
                    # Made here and not in `_run`, so that it can be interrupted from now on.
                    self._fills[effect] = asyncio.ensure_future(self._fill_static(effect))
                self._supervise(self._run(effect))

    def _resolve(self, job_id: str, plan: Plan) -> None:
        waiting = self._waiting.get(job_id)
        if waiting and not waiting.future.done():
            waiting.future.set_result(plan)

    def _refuse(self, effect: Fail) -> None:
        self._bodies.pop(effect.job, None)
        waiting = self._waiting.get(effect.job)
        if waiting is None or waiting.future.done():
            return
        if effect.reason == "queue_full":
            waiting.future.set_exception(
                QueueFullError("Too many requests are waiting for a slot. Try again later.")
            )
        else:
            waiting.future.set_exception(
                DeadlineError("No slot was free within the time a request may wait.")
            )

    def _mark_begun(self, step: Step) -> None:
        job_id = self.scheduler.slots[step.slot].job
        waiting = self._waiting.get(job_id) if job_id else None
        if waiting and waiting.begun_s is None:
            waiting.begun_s = time.monotonic()

    async def _run(self, step: Step) -> None:
        # A step that failed in a way nobody thought of must not keep its slot for ever.
        outcome: Outcome = StepFailed(emptied=True)
        try:
            outcome = await self._step(step)
        except SnapshotError as error:
            self.metrics.miss(error.reason)
            self._note_failure(step, error.reason)
            outcome = StepFailed(emptied=isinstance(step, RestoreSlot))
        except EngineError as error:
            reason = "engine"
            if isinstance(step, RestoreSlot) and not isinstance(error, EngineDownError):
                reason = "refused"
                self.metrics.miss(reason)
                self._snapshots.refused(step.stored)
            self._note_failure(step, reason)
            # A refused restore clears the slot; after any other failure its state is unknown.
            outcome = StepFailed(emptied=not isinstance(step, SaveSlot))
        finally:
            if not self._is_closed:
                self._perform(self.scheduler.step_done(step, outcome, time.monotonic()))
                self._forget_bodies()

    def _note_failure(self, step: Step, reason: str) -> None:
        """A failed restore explains why its request was cold."""
        job = self.scheduler.jobs.get(step.job) if isinstance(step, RestoreSlot) else None
        if job is not None:
            job.failed_restore = reason

    def _forget_bodies(self) -> None:
        """Let go of what requests brought that are gone, once no fill needs it any more."""
        for job_id in [j for j in self._bodies if j not in self.scheduler.jobs]:
            del self._bodies[job_id]

    async def _step(self, step: Step) -> Outcome:
        if isinstance(step, SaveSlot):
            return await self._save(step)
        if isinstance(step, RestoreSlot):
            return await self._restore(step)
        if isinstance(step, FillSlot):
            return await self._fill(step)
        if isinstance(step, LookSlot):
            return await self._look(step)
        if isinstance(step, EraseSlot):
            await self._client.erase(step.slot)
        return None

    async def _count(self, effect: CountPrompt) -> None:
        """Have a prompt counted, and slots that it might start from."""
        job = self.scheduler.jobs.get(effect.job)
        counted: list[Tokens | None] = []
        try:
            if job is not None and not job.gone:
                await self.count_ahead(job)
            counted = await count_all(self._counter, [c.chat for c in effect.contents if c.chat])
        finally:
            pairs = zip(effect.contents, counted, strict=False)
            known = [(content, ids) for content, ids in pairs if ids is not None]
            effects = self.scheduler.counted(effect.job, time.monotonic(), contents=known)
            if not self._is_closed:
                self._perform(effects)

    async def count_ahead(self, job: Job) -> None:
        """Count a prompt before it is submitted; what fails is left to the marks."""
        assert job.chat is not None
        try:
            ids, job.counted_s = await self._counter.timed(job.chat, has_media=job.prompt.has_media)
            if job.prompt.has_media:
                job.text_ids = ids
            else:
                job.ids = ids
        except EngineRefusedError:
            job.is_refused = True
        except EngineError as error:
            log.debug("%s couldn't be counted: %s", job.id, error)
        job.is_counted = True

    async def _look(self, step: LookSlot) -> Outcome:
        """Wait for the engine to let go of a slot: a batch at most after its client has left."""
        deadline = time.monotonic() + _LOOK_FOR_S
        while time.monotonic() < deadline:
            seen = next((s for s in await self._client.slots() if s.get("id") == step.slot), None)
            if seen is None or "n_prompt_tokens" not in seen:
                break  # an engine that doesn't tell
            if not seen.get("is_processing"):
                tokens = int(seen["n_prompt_tokens"])
                job = self.scheduler.jobs.get(self.scheduler.slots[step.slot].job or "")
                if job is not None and job.ahead_of is not None and job.plan:
                    # Broken off: what of it was computed.
                    job.filled_tokens = max(tokens - job.plan.reuse_tokens, 0)
                return LookedSlot(tokens)
            await asyncio.sleep(_LOOK_EVERY_S)
        return StepFailed(emptied=True)

    async def _save(self, step: SaveSlot) -> Outcome:
        content = self.scheduler.slots[step.slot].content
        tokens = content.tokens if content else 0
        name = await self._snapshots.expect(tokens)
        began_s = time.monotonic()
        try:
            info = await self._client.save(step.slot, name)
        except EngineError:
            await self._snapshots.discard(name)
            if content is not None and content.media_at is not None:
                self.metrics.miss("media")  # before llama.cpp PR #26640 (August 2026)
            raise
        # The engine's own time: a call also waits for the batch that the engine is working on, but
        # so would a prefill, and it has nothing to do with the file's size.
        taken_s = info.seconds or time.monotonic() - began_s
        self.rates.observe_bytes(
            self.rates.save_s_per_byte, size_bytes=info.size_bytes, seconds=taken_s
        )
        if not info.tokens:
            await self._snapshots.discard(name)
            return StepFailed(emptied=True)
        self._supervise(self._absorb(step, name, info.tokens), name="absorb")
        return SavedSlot(name, info.tokens, info.size_bytes)

    async def _absorb(self, step: SaveSlot, name: str, tokens: int) -> None:
        ids: Tokens | None = None
        states: tuple[int, ...] = ()
        spoiled: int | None = None
        try:
            saved = await self._snapshots.absorb(
                name,
                namespace=step.namespace,
                marks=step.marks,
                tokens=tokens,
                prefill_s=step.prefill_s,
                origin=Origin.FILL if step.static else Origin.CONVERSATION,
            )
            ids, states = self._snapshots.ids_of(saved), saved.ends
            self.on_kept()
        except SnapshotError as error:
            self.metrics.miss(error.reason)
            spoiled = step.slot if error.reason == "not_finite" else None
        finally:
            effects = self.scheduler.absorbed(
                name, time.monotonic(), ids=ids, states=states, spoiled_slot=spoiled
            )
            if not self._is_closed:
                self._perform(effects)

    async def _restore(self, step: RestoreSlot) -> Outcome:
        began_s = time.monotonic()
        async with self._snapshots.ready(step.stored) as file:
            assembled_s = time.monotonic() - began_s
            info = await self._client.restore(step.slot, file.name)
        taken_s = time.monotonic() - began_s
        self.metrics.restored(taken_s)
        self.rates.observe_bytes(
            self.rates.restore_s_per_byte,
            size_bytes=info.size_bytes,
            seconds=info.seconds or taken_s - assembled_s,
        )
        if not step.stored.ready:
            self.rates.observe_bytes(
                self.rates.assemble_s_per_byte, size_bytes=info.size_bytes, seconds=assembled_s
            )
        if info.tokens != file.tokens:
            raise SnapshotError("The engine restored another number of tokens.", reason="restore")
        return RestoredSlot(info.tokens, self._snapshots.ids_at(step.stored))

    async def _fill(self, step: FillSlot) -> Outcome:
        task = self._fills[step]
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                return StepFailed(emptied=False)
            task.cancel()
            raise
        finally:
            del self._fills[step]

    async def _fill_static(self, step: FillSlot) -> Outcome:
        job = self.scheduler.jobs.get(step.job)
        if job is None or job.prompt.static is None:
            return StepFailed(emptied=False)
        digest = job.prompt.static.digest
        given = self._bodies[step.job]
        tokens = given if isinstance(given, list) else self._statics.get(digest)
        if tokens is None:
            assert isinstance(given, dict)
            tokens = await static_tokens(self._counter, given)
            self.know_static(digest, tokens)
        if not tokens:
            return StepFailed(emptied=False)
        job.static_tokens, job.static_ids = len(tokens), as_tokens(tokens)
        await self._start_from_store(step.slot, job, tokens)
        ends = [len(tokens)]
        if job.ahead_of is not None and job.plan:
            # The engine ends nothing within its batch; a piece is all that anybody waits for.
            first = job.plan.reuse_tokens + _PIECE_TOKENS
            ends = [*range(first, len(tokens), _PIECE_TOKENS), *ends]
        job.filled_tokens = 0
        progress = job.on_fill or (lambda _: None)
        for end in ends:
            # In a stream, since only that is ended when the fill is interrupted.
            counts = await self._client.fill(tokens[:end], slot=step.slot, progress=progress)
            job.filled_tokens += counts.prefilled
            self.rates.observe_prefill(tokens=counts.prefilled, seconds=counts.prefill_s)
            self.metrics.filled(counts)
        return FilledSlot(len(tokens))

    async def _start_from_store(self, slot: int, job: Job, tokens: list[int]) -> None:
        """Before a fill, restore what the store has of its very tokens, if the slot has less.

        No mark tells of it when two texts part in the first message. It also keeps what is saved
        later of one piece: the store takes the tokens it knows for known, and rows that were
        computed behind other ones than those would differ from the slot's in their last bits.
        """
        if not self.scheduler.machine.cuttable:
            return
        known = job.plan.reuse_tokens if job.plan else 0
        try:
            stored = await self._snapshots.match(tokens, job.namespace)
            if stored is None or stored.tokens <= known:
                return
            if self._snapshots.is_refused(stored.extent_id):
                return
        except SnapshotError as error:
            self.metrics.miss(error.reason)
            return
        try:
            async with self._snapshots.ready(stored) as file:
                await self._client.restore(slot, file.name)
        except SnapshotError as error:
            self.metrics.miss(error.reason)
        except EngineDownError:
            raise
        except EngineError:
            # The slot is empty now, and filled from its beginning.
            self.metrics.miss("refused")
            self._snapshots.refused(stored)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = time.monotonic()
            effects = self.scheduler.tick(now_s)
            self._perform(effects)
            if not effects and self.scheduler.is_quiet(now_s):
                self._has_event.clear()
                # Not `wait_for`: Python 3.11's loses a cancellation that comes with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_QUIET_TICK_S):
                        await self._has_event.wait()
