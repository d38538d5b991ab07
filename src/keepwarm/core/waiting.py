"""Why a request waits although a slot is idle: steps 4 to 6 of the scheduler's order.

Each rule is a function of values: the request, what the store has of it, the idle slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from keepwarm.core.job import Job
from keepwarm.core.plan import (
    FILL_MIN_TOKENS,
    LEAST_TOKENS,
    Machine,
    Stored,
    doubt_tokens,
    static_tokens,
)
from keepwarm.core.rates import Rates
from keepwarm.core.slots import Content, Slot

# What the store needs to take a saved file in, in times that the engine needs to save it: it
# compares, writes and flushes (46 MB: some 60 ms after 15).
TAKING_IN = 4.0
# A prompt is counted where what is in doubt costs so many times the count to prefill. A count also
# settles what the next requests may start from, and the estimate of what is in doubt is rough.
COUNT_IF_TIMES = 0.3


def waits_for_fill(
    job: Job, stored: Stored | None, fills: Mapping[bytes, str], *, rates: Rates
) -> bool:
    """Whether another request is prefilling this one's static part right now.

    Waiting is never slower than prefilling the same beside it: the fill is ahead of us, and two
    prefills share the machine. Who is here to have it saved has nothing else to wait for.

    Args:
        job: the request.
        stored: what the store has of it.
        fills: the static parts (by digest) that are being filled, and by which job.
        rates: what the machine does a second.
    """
    static = job.prompt.static
    if static is None or static.digest not in fills or not job.can_fill:
        return False
    if job.must_save:
        return True
    known = stored.tokens if stored else 0
    return static_tokens(job.demand(), rates) - known >= FILL_MIN_TOKENS


def waits_for_save(
    job: Job,
    stored: Stored | None,
    idle: Sequence[Slot],
    soon: Sequence[tuple[Content, float]],
    *,
    machine: Machine,
    rates: Rates,
) -> bool:
    """Whether what a prompt begins with is being saved, and waiting is cheaper than a prefill.

    A slot that is saved on its own is idle again in a moment: an agent often goes on at once when
    its conversation is saved behind its reply. One that is saved since another request takes it is
    found in the store as soon as that has taken it in.

    Args:
        job: the request.
        stored: what the store has of it.
        idle: the slots that could be taken now.
        soon: what is being saved, and in how many times of what its save takes it can be had.
        machine: the slots' kind.
        rates: what the machine does a second.
    """
    if not soon:
        return False
    known = max((_reusable(job, s.content, machine) for s in idle if s.content), default=0)
    known = max(known, stored.tokens if stored else 0)
    for content, saves in soon:
        lacking = _reusable(job, content, machine) - known
        wait_s = saves * rates.save_s(content.tokens * machine.row_bytes)
        if lacking >= LEAST_TOKENS and wait_s < rates.prefill_s(lacking):
            return True
    return False


def must_count(
    job: Job, stored: Stored | None, idle: Sequence[Slot], *, machine: Machine, rates: Rates
) -> bool:
    """Whether what the marks leave in doubt is dearer to prefill than to count.

    Args:
        job: the request.
        stored: what the store has of it.
        idle: the slots that could be taken now.
        machine: the slots' kind.
        rates: what the machine does a second.
    """
    if job.chat is None or job.is_counted or not idle:
        return False
    if machine.tells_time:
        held = [s.content for s in idle if s.content and not s.is_foreign(job.namespace)]
        return not any(content.goes_on(job.prompt) for content in held)
    doubt = doubt_tokens(job.demand(), idle, stored, machine=machine, rates=rates)
    return rates.prefill_s(doubt) > COUNT_IF_TIMES * rates.count_s(job.prompt.chars)


def _reusable(job: Job, content: Content, machine: Machine) -> int:
    """Tokens of a job's prompt that some content spares."""
    if content.namespace not in ("", job.namespace):
        return 0
    return content.reuse(
        job.prompt,
        job.known_ids,
        is_whole=job.ids is not None,
        cuttable=machine.cuttable,
        window_tokens=machine.window_tokens,
    ).tokens
