"""The next turn, prefilled before anybody asks: what is worth it, and who it stands back for.

Theory of operation. Some templates write a history otherwise once a user asks anew: reasoning is
taken out, and with it goes all that a slot holds behind the first of it. Some clients send back a
reply otherwise than they got it (see `rewriting`). Between a reply and the next request the machine
is idle, and the engine's own template tells already what that request will begin with: the history
and the reply, up to the first word of the user's or of the tool's result. That much is filled and
saved as a job of its own, of the lowest priority, and found by its tokens like any content.

Where nothing can be written otherwise, a slot holds the next turn's beginning already, and none of
this is done. Why it wasn't is kept for whoever asks (`Kept`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from keepwarm.core.effects import Effect, Fail, FillSlot, Interrupt, SaveSlot, Step
from keepwarm.core.job import Job
from keepwarm.core.plan import Machine, Stored
from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.reply import Reply
from keepwarm.core.rewriting import Rewriting
from keepwarm.core.slots import Content
from keepwarm.core.tree import Tokens, common_tokens

# Behind interactive requests (0), batches (1) and tiers that are made again (2).
PRIORITY = 3
# Fewer aren't worth a save and a job.
LEAST_TOKENS = 32
# The opening of a turn, which no slot holds before it.
_TURN_TOKENS = 8
# A second for which somebody waits is worth so many idle ones. So the first turn that is ever seen
# is prepared (its chance is a third, see `returns`), and no more once two had no second one.
WAITED_FOR_IDLE = 4.0


class Kept(StrEnum):
    """What came of looking at a turn that has ended."""

    PREFILLED = "another history was expected"
    HELD = "the slot holds what the next turn begins with"
    FEW = "too few tokens would be spared"
    SELDOM = "such conversations seldom go on"
    UNKNOWN = "the history can't be rendered"
    OVERTAKEN = "somebody asked first"
    BATTERY = "the machine runs on battery"
    LOADED = "other work runs on the machine"


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A turn of a conversation that has ended: its slot's content, and what renders it.

    `reply` is as its client will send it back; `asked` is the digest of the whole prompt, `turns`
    as the prompt's.
    """

    slot: int
    content: Content
    namespace: str
    chat: Mapping[str, Any]
    reply: Mapping[str, Any]
    asked: bytes
    turns: int


def ended_turn(
    job: Job, slot: int, content: Content | None, reply: Reply, *, machine: Machine, way: Rewriting
) -> Turn | None:
    """The turn that a reply has ended; None where its slot holds what follows, or that is unknown.

    Behind a reply that stopped a user's message follows, behind tool calls their results. A slot
    whose content can't be cut is lost by a single token that is written otherwise, white space at
    the end of a text, say.
    """
    message = reply.message
    if reply.finish_reason not in ("stop", "tool_calls") or reply.counts is None or not message:
        return None
    if content is None or job.is_final or job.is_alone or not job.is_savable or not job.reuses:
        return None
    if not isinstance(job.chat, Mapping) or job.prompt.is_raw or job.prompt.has_media:
        return None
    returned = way.applied(message)
    if machine.appends and machine.cuttable and returned == message:
        return None
    asked = job.prompt.marks[-1].digest
    return Turn(slot, content, job.namespace, job.chat, returned, asked, job.prompt.turns)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What was prefilled ahead, behind a turn: the last `tokens` of these ids."""

    ids: Tokens
    tokens: int
    namespace: str
    asked: bytes

    def used(self, job: Job, cached: int) -> int | None:
        """How many of them a request was spared; None if it doesn't go on from that turn.

        Args:
            job: the request, answered.
            cached: how many of its tokens the engine reused.
        """
        if job.namespace != self.namespace or job.ahead_of is not None:
            return None
        if not any(mark.digest == self.asked for mark in job.prompt.marks[:-1]):
            return None
        if job.ids is None:
            return 0
        start = int(self.ids.size) - self.tokens
        return max(min(common_tokens(self.ids, job.ids), cached) - start, 0)


def lacking_tokens(
    content: Content, prompt: Prompt, ids: Tokens, stored: Stored | None, *, machine: Machine
) -> int:
    """How many of the next turn's first tokens would be prefilled if nothing were done."""
    reuse = content.reuse(
        prompt, ids, cuttable=machine.cuttable, window_tokens=machine.window_tokens
    )
    return int(ids.size) - max(reuse.tokens, stored.tokens if stored else 0)


def why_not(*, lacking: int, chance: float) -> Kept | None:
    """Why what is lacking isn't computed, given the chance that it is needed; None if it is."""
    if lacking < LEAST_TOKENS:
        return Kept.FEW if lacking > _TURN_TOKENS else Kept.HELD
    return None if chance * WAITED_FOR_IDLE >= 1.0 else Kept.SELDOM


def prompt_of_ids(ids: Tokens, digest: bytes) -> Prompt:
    """A prompt that is known by its tokens alone: no request's marks lead to it."""
    size = int(ids.size)
    return Prompt(is_raw=True, marks=(Mark(digest, size, size),), static_index=0, turns=0)


def overtaken(
    jobs: Mapping[str, Job], queue: Iterable[str], running: Mapping[int, Step]
) -> list[Effect] | None:
    """What ends the job that is computed ahead, once somebody waits; None: there is nothing to end.

    Until it has ended, a batch at most, nobody else begins: what it has computed by then may be
    what they need. A save behind the fill is let through.
    """
    if all(jobs[job_id].ahead_of is not None for job_id in queue):
        return None
    for job in jobs.values():
        if job.ahead_of is None or job.plan is None:
            continue
        if job.gone:
            return []
        step = running.get(job.plan.slot)
        if step is None or (isinstance(step, SaveSlot) and step.static):
            continue
        job.gone = True
        end = Fail(job.id, "overtaken")
        return [end, Interrupt(step)] if isinstance(step, FillSlot) else [end]
    return None
