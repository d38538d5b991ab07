"""Prefills the next turn while the machine is idle: see `core.ahead` for what and when.

One task looks at the turns that have ended, once nobody has asked for a while and all slots are
saved. What it fills is a job like any other, granted a slot, filled, saved and ended; the scheduler
ends it for whoever comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
import uuid
from collections import OrderedDict, deque
from pathlib import Path

import numpy as np

from keepwarm.core.ahead import (
    PRIORITY,
    Kept,
    Prepared,
    Turn,
    ended_turn,
    lacking_tokens,
    prompt_of_ids,
    why_not,
)
from keepwarm.core.job import Job
from keepwarm.core.reply import Reply
from keepwarm.core.rewriting import Rewritings
from keepwarm.core.tree import Tokens
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.engine.static_end import history_tokens
from keepwarm.errors import EngineError, KeepwarmError

log = logging.getLogger("keepwarm")

# How often it is looked whether the machine is idle, while a turn has ended that isn't prepared.
_LOOK_EVERY_S = 0.1
# An interrupted one is through with its batch by so many looks, or isn't accounted for; each comes
# before the request that goes on from it is answered.
_LOOKS, _LET_GO_EVERY_S = 12_000, 0.005
# A fill that can't begin at once isn't begun.
_BEGINS_WITHIN_S = 1.0
# Turns whose next one was prepared and hasn't come, and turns of which is known why none was.
_PREPARED, _LOOKED_AT = 64, 256
# Where processes of low priority take more than this share of the cores, somebody runs a load of
# his own; it is looked again after this long.
_NICE_SHARE, _LOOK_AGAIN_S = 0.5, 1.0
_POWER = Path("/sys/class/power_supply")
_CORES = Path("/proc/stat")
# Ticks a second of that file, on every Linux there is (USER_HZ).
_TICKS_S = 100.0


class Ahead:
    """See the module. All methods are called on the event loop that made it."""

    def __init__(self, deployment: KeptEngine) -> None:
        self._deployment = deployment
        self._is_on = deployment.settings.engine.ahead == "auto"
        # The last turn of each slot, until it was looked at.
        self._ended: dict[int, Turn] = {}
        self._has_ended = asyncio.Event()
        self._rewritings = Rewritings()
        self._prepared: deque[Prepared] = deque()
        self._came_of: OrderedDict[bytes, tuple[Kept, int]] = OrderedDict()

    def start(self) -> None:
        """Begin to look at what has ended; where nothing is to be done, begin nothing."""
        if self._is_on:
            self._deployment.supervise(self._run())

    def note(self, job: Job, reply: Reply) -> None:
        """A request has been answered, and its slot was given back."""
        if not self._is_on or job.plan is None or reply.counts is None:
            return
        self._settle(job, reply.counts.cached)
        self._rewritings.answered(job, reply.message)
        slot = job.plan.slot
        turn = ended_turn(
            *(job, slot, self._deployment.dispatcher.scheduler.slots[slot].content, reply),
            machine=self._deployment.machine,
            way=self._rewritings.way(job),
        )
        if turn is not None:
            self._ended[slot] = turn
            self._has_ended.set()

    def forget(self, namespace: str) -> None:
        """Forget all that is one key's own; what is being prefilled goes with its slot."""
        self._rewritings.forget(namespace)
        self._ended = {s: t for s, t in self._ended.items() if t.namespace != namespace}
        self._prepared = deque(p for p in self._prepared if p.namespace != namespace)

    def came_of(self, job: Job) -> str:
        """What came of the turn that a request goes on from, in words; empty: nothing is known."""
        for mark in reversed(job.prompt.marks[:-1]):
            if (known := self._came_of.get(mark.digest)) is not None:
                kept, turns = known
                return kept.value if job.prompt.turns == turns + 1 else ""
        return ""

    def _settle(self, job: Job, cached: int) -> None:
        """Account for what was prefilled for this request: used, or wasted."""
        metrics = self._deployment.metrics
        for prepared in list(self._prepared):
            if (used := prepared.used(job, cached)) is not None:
                self._prepared.remove(prepared)
                metrics.used_ahead(used)
                metrics.wasted_ahead(prepared.tokens - used)

    async def _run(self) -> None:
        nice_s = _LOOK_EVERY_S * _NICE_SHARE * (os.cpu_count() or 1)
        while True:
            await self._has_ended.wait()
            before_s = nice_seconds()
            await asyncio.sleep(_LOOK_EVERY_S)
            is_loaded = nice_seconds() - before_s > nice_s
            for turn in [t for t in self._ended.values() if not self._is_last(t)]:
                del self._ended[turn.slot]
                if turn.asked not in self._came_of:
                    self.remember(turn, Kept.OVERTAKEN)
            if not self._ended:
                self._has_ended.clear()
            elif self._is_settled():
                turn = next(iter(self._ended.values()))
                if is_loaded:
                    self.remember(turn, Kept.LOADED)
                    await asyncio.sleep(_LOOK_AGAIN_S)
                    continue
                self.remember(turn, await self._prepare(turn))
                if self._ended.get(turn.slot) is turn:
                    del self._ended[turn.slot]

    def remember(self, turn: Turn, kept: Kept) -> None:
        """Keep what came of looking at a turn."""
        self._came_of[turn.asked] = kept, turn.turns
        if len(self._came_of) > _LOOKED_AT:
            self._came_of.popitem(last=False)

    def _is_last(self, turn: Turn) -> bool:
        """Whether its slot still holds it and nothing else."""
        return self._deployment.dispatcher.scheduler.slots[turn.slot].content is turn.content

    def _is_settled(self) -> bool:
        return self._deployment.dispatcher.scheduler.is_settled(time.monotonic())

    async def _prepare(self, turn: Turn) -> Kept:
        """Fill and save what the next turn begins with, if that is worth it."""
        deployment, scheduler = self._deployment, self._deployment.dispatcher.scheduler
        try:
            ids = await history_tokens(deployment.counter, turn.chat, turn.reply)
        except EngineError as error:
            log.debug("the next turn's history can't be counted: %s", error)
            return Kept.UNKNOWN
        if not ids.size or not self._is_last(turn) or not self._is_settled():
            return Kept.OVERTAKEN
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16, key=b"ahead").digest()
        prompt = prompt_of_ids(ids, digest)
        # One token more: a request goes on behind these, so they may be found whole.
        asked: Tokens = np.append(ids, ids[-1:])
        lacking = lacking_tokens(
            *(turn.content, prompt, ids, scheduler.lookup(prompt, turn.namespace, asked)),
            machine=deployment.machine,
        )
        chance = scheduler.slots[turn.slot].returns(time.monotonic())
        if reason := why_not(lacking=lacking, chance=chance):
            return reason
        if await asyncio.to_thread(on_battery):
            return Kept.BATTERY
        return await self._fill(turn, ids, job=_job_of(turn, ids, digest))

    async def _fill(self, turn: Turn, ids: Tokens, *, job: Job) -> Kept:
        dispatcher, metrics = self._deployment.dispatcher, self._deployment.metrics
        kept = Kept.PREFILLED
        try:
            await dispatcher.acquire(job, [int(token) for token in ids])
            dispatcher.finish(job, counts=None, reply=None, touched=False)
        except KeepwarmError as error:
            log.debug("the next turn of slot %d wasn't prefilled: %s", turn.slot, error)
            kept = Kept.OVERTAKEN
            await self._let_go(job)
        if job.filled_tokens:
            log.debug("prefilled %d tokens of the next turn", job.filled_tokens)
            metrics.computed_ahead(job.filled_tokens)
            start = job.plan.reuse_tokens if job.plan else 0
            done = ids if kept is Kept.PREFILLED else ids[: start + job.filled_tokens]
            self.note_prepared(Prepared(done, job.filled_tokens, turn.namespace, turn.asked))
        return kept

    async def _let_go(self, job: Job) -> None:
        """Wait until it is known how far an interrupted fill came: a batch at most."""
        for _ in range(_LOOKS):
            if job.id not in self._deployment.dispatcher.scheduler.jobs:
                return
            await asyncio.sleep(_LET_GO_EVERY_S)

    def note_prepared(self, prepared: Prepared) -> None:
        """Wait for the turn that uses it; what waits for longest is wasted."""
        if len(self._prepared) >= _PREPARED:
            self._deployment.metrics.wasted_ahead(self._prepared.popleft().tokens)
        self._prepared.append(prepared)


def _job_of(turn: Turn, ids: Tokens, digest: bytes) -> Job:
    now_s = time.monotonic()
    return Job(
        id=uuid.uuid4().hex[:16],
        namespace=turn.namespace,
        prompt=prompt_of_ids(ids, digest),
        arrived_s=now_s,
        deadline_s=now_s + _BEGINS_WITHIN_S,
        reply_tokens=1,
        priority=PRIORITY,
        must_save=True,
        ids=ids,
        ahead_of=turn.content,
    )


def on_battery(power: Path = _POWER) -> bool:
    """Whether this machine has a mains supply, and it is off."""
    try:
        supplies = [(path / "online", path / "type") for path in power.iterdir()]
        mains = [
            online.read_text(encoding="utf-8").strip()
            for online, kind in supplies
            if kind.read_text(encoding="utf-8").strip() == "Mains"
        ]
    except OSError:
        return False
    return bool(mains) and "1" not in mains


def nice_seconds(cores: Path = _CORES) -> float:
    """What processes of low priority have taken of all cores since the machine was started."""
    try:
        with cores.open(encoding="ascii") as file:
            return int(file.readline().split()[2]) / _TICKS_S
    except (OSError, ValueError, IndexError):
        return 0.0
