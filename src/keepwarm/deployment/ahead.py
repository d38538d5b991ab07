"""Prefills the next user's turn while the machine is idle: see `core.ahead` for what and when.

One task looks at the turns that have ended, once nobody has asked for a while and all slots are
saved. What it fills is a job like any other, granted a slot, filled, saved and ended; the scheduler
ends it for whoever comes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from pathlib import Path

import numpy as np

from keepwarm.core.ahead import (
    PRIORITY,
    Turn,
    ended_turn,
    is_worth,
    lacking_tokens,
    prompt_of_ids,
)
from keepwarm.core.job import Job
from keepwarm.core.reply import Reply
from keepwarm.core.tree import Tokens
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.engine.static_end import history_tokens
from keepwarm.errors import EngineError, KeepwarmError

log = logging.getLogger("keepwarm")

# How often it is looked whether the machine is idle, while a turn has ended that isn't prepared.
_LOOK_EVERY_S = 0.1
# A fill that can't begin at once isn't begun.
_BEGINS_WITHIN_S = 1.0
_POWER = Path("/sys/class/power_supply")


class Ahead:
    """See the module. All methods are called on the event loop that made it."""

    def __init__(self, deployment: KeptEngine) -> None:
        self._deployment = deployment
        # Where a template appends, a slot holds the next turn's beginning already.
        self._is_on = deployment.settings.engine.ahead == "auto" and not deployment.machine.appends
        # The last turn of each slot, until it was looked at.
        self._ended: dict[int, Turn] = {}
        self._has_ended = asyncio.Event()

    def start(self) -> None:
        """Begin to look at what has ended; where nothing is to be done, begin nothing."""
        if self._is_on:
            self._deployment.supervise(self._run())

    def note(self, job: Job, reply: Reply) -> None:
        """A request has been answered, and its slot was given back."""
        if not self._is_on or job.plan is None:
            return
        slot = job.plan.slot
        content = self._deployment.dispatcher.scheduler.slots[slot].content
        turn = ended_turn(job, slot, content, reply)
        if turn is not None:
            self._ended[slot] = turn
            self._has_ended.set()

    async def _run(self) -> None:
        while True:
            await self._has_ended.wait()
            await asyncio.sleep(_LOOK_EVERY_S)
            for turn in [t for t in self._ended.values() if not self._is_last(t)]:
                del self._ended[turn.slot]
            if not self._ended:
                self._has_ended.clear()
            elif self._is_settled():
                turn = next(iter(self._ended.values()))
                await self._prepare(turn)
                if self._ended.get(turn.slot) is turn:
                    del self._ended[turn.slot]

    def _is_last(self, turn: Turn) -> bool:
        """Whether its slot still holds it and nothing else."""
        return self._deployment.dispatcher.scheduler.slots[turn.slot].content is turn.content

    def _is_settled(self) -> bool:
        return self._deployment.dispatcher.scheduler.is_settled(time.monotonic())

    async def _prepare(self, turn: Turn) -> None:
        """Fill and save what the next turn begins with, if that is worth it."""
        deployment, scheduler = self._deployment, self._deployment.dispatcher.scheduler
        try:
            ids = await history_tokens(deployment.counter, turn.chat, turn.reply)
        except EngineError as error:
            log.debug("the next turn's history can't be counted: %s", error)
            return
        if not ids.size or not self._is_last(turn) or not self._is_settled():
            return
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16, key=b"ahead").digest()
        prompt = prompt_of_ids(ids, digest)
        # One token more: a request goes on behind these, so they may be found whole.
        asked: Tokens = np.append(ids, ids[-1:])
        lacking = lacking_tokens(
            *(turn.content, prompt, ids, scheduler.lookup(prompt, turn.namespace, asked)),
            machine=deployment.machine,
        )
        chance = scheduler.slots[turn.slot].returns(time.monotonic())
        if not is_worth(lacking=lacking, chance=chance) or await asyncio.to_thread(on_battery):
            return
        await self._fill(turn, ids, job=_job_of(turn, ids, digest))

    async def _fill(self, turn: Turn, ids: Tokens, *, job: Job) -> None:
        dispatcher = self._deployment.dispatcher
        try:
            await dispatcher.acquire(job, [int(token) for token in ids])
            dispatcher.finish(job, counts=None, reply=None, touched=False)
        except KeepwarmError as error:
            log.debug("the next turn of slot %d wasn't prefilled: %s", turn.slot, error)
            return
        self._deployment.metrics.computed_ahead(job.filled_tokens)
        log.debug("prefilled %d tokens of the next turn", job.filled_tokens)


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
