"""The next user's turn, prefilled before he asks: what is worth it, and who it stands back for.

Theory of operation. Some templates write a history otherwise once a user asks anew: reasoning is
taken out, and with it goes all that a slot holds behind the first of it. Between a reply and the
next request the machine is idle, and the engine's own template tells already what that request will
begin with: the history and the reply, up to the first word of the user's. That much is filled and
saved as a job of its own, of the lowest priority, and found by its tokens like any content.

Where a template appends, a slot holds the next turn's beginning already, and none of this is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from keepwarm.core.effects import Effect, Fail, FillSlot, Interrupt, SaveSlot, Step
from keepwarm.core.job import Job
from keepwarm.core.plan import Machine, Stored
from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.reply import Reply
from keepwarm.core.slots import Content
from keepwarm.core.tree import Tokens

# Behind interactive requests (0), batches (1) and tiers that are made again (2).
PRIORITY = 3
# Fewer aren't worth a save and a job.
LEAST_TOKENS = 32
# A second for which somebody waits is worth so many idle ones. So the first turn that is ever seen
# is prepared (its chance is a third, see `returns`), and no more once two had no second one.
WAITED_FOR_IDLE = 4.0


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a conversation that has ended: its slot's content, and what renders it."""

    slot: int
    content: Content
    namespace: str
    chat: Mapping[str, Any]
    reply: Mapping[str, Any]


def ended_turn(job: Job, slot: int, content: Content | None, reply: Reply) -> Turn | None:
    """The turn that a reply has ended; None where no user's message follows, or none is known.

    Behind a tool call its result follows, which a template appends.
    """
    if reply.finish_reason != "stop" or reply.calls or reply.counts is None:
        return None
    if content is None or job.is_final or job.is_alone or not job.is_savable or not job.reuses:
        return None
    if not isinstance(job.chat, Mapping) or job.prompt.is_raw or job.prompt.has_media:
        return None
    said: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.reasoning:
        said["reasoning_content"] = reply.reasoning
    return Turn(slot, content, job.namespace, job.chat, said)


def lacking_tokens(
    content: Content, prompt: Prompt, ids: Tokens, stored: Stored | None, *, machine: Machine
) -> int:
    """How many of the next turn's first tokens would be prefilled if nothing were done."""
    reuse = content.reuse(
        prompt, ids, cuttable=machine.cuttable, window_tokens=machine.window_tokens
    )
    return int(ids.size) - max(reuse.tokens, stored.tokens if stored else 0)


def is_worth(*, lacking: int, chance: float) -> bool:
    """Whether what is lacking is computed now, given the chance that the conversation goes on."""
    return lacking >= LEAST_TOKENS and chance * WAITED_FOR_IDLE >= 1.0


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
