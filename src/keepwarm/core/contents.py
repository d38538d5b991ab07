"""What a slot holds after a fill, a restore, a reply, or half of one.

Each function tells only what is known for certain to be exact as exact: a later plan promises it,
and a broken promise quarantines the snapshot it was made for.
"""

from __future__ import annotations

from dataclasses import replace

from keepwarm.core.job import Job
from keepwarm.core.plan import Stored
from keepwarm.core.prompt import Mark
from keepwarm.core.reply import Counts
from keepwarm.core.returns import Chance
from keepwarm.core.slots import Content, Position, positions


def after_fill(job: Job, before: Content | None, tokens: int) -> Content:
    """A slot that was filled to the exact end of a job's static part."""
    static = job.prompt.static
    assert static
    # What the slot held before and the prompt begins with keeps its exact places.
    known = dict(before.marks) if before else {}
    known[static.digest] = Position(tokens, exact=True)
    upto = job.prompt.marks[: job.prompt.static_index + 1]
    marks = positions(upto, known=known, total_tokens=tokens)
    return Content("" if job.static_shared else job.namespace, marks, tokens)


def after_restore(job: Job, stored: Stored, tokens: int) -> Content:
    """A slot that a snapshot was restored into."""
    marks: dict[bytes, Position] = {}
    prompt = job.prompt
    static = prompt.static
    matched = prompt.marks[: stored.mark_index + 1]
    exact = stored.promise_tokens == stored.tokens
    if static and stored.mark_index >= prompt.static_index and stored.promise_tokens:
        # The promise is of the matched mark if that is exact, else of the static end.
        own = job.static_tokens if exact else stored.promise_tokens
        if own:
            marks[static.digest] = Position(own, exact=True)
    if matched and exact:
        marks[matched[-1].digest] = Position(stored.tokens, exact=True)
    marks |= positions(matched, known=marks, total_tokens=stored.tokens)
    shared = job.static_shared and stored.mark_index <= prompt.static_index
    return Content("" if shared else job.namespace, marks, tokens, saved_tokens=tokens)


def after_reply(
    job: Job, before: Content | None, counts: Counts, said: Mark | None, *, returns: Chance
) -> Content:
    """A slot whose request was answered to the end.

    `said` is the mark behind its reply, `returns` the chance that it goes on.
    """
    prompt = job.prompt
    known = dict(before.marks) if before else {}
    if job.static_tokens is not None and prompt.static:
        known[prompt.static.digest] = Position(job.static_tokens, exact=True)
    marks = positions(prompt.marks, known=known, total_tokens=counts.prompt)
    saved = min(before.saved_tokens, counts.cached) if before else 0
    # The last token that was generated isn't computed itself.
    total = counts.prompt + max(counts.decoded - 1, 0)
    if said is not None:
        marks[said.digest] = Position(total, exact=False)
    return Content(
        *(job.namespace, marks, total, saved, prompt.turns, returns, job.is_final),
        is_savable=job.is_savable,
    )


def after_silence(before: Content, reused_tokens: int) -> Content | None:
    """A slot whose reply ended without counts (a hang-up, an error): what was there before.

    The engine may have cut the slot or gone on from it; what the plan reused is still its
    beginning. Nothing in it is promised.
    """
    marks = {
        digest: Position(position.tokens, exact=False)
        for digest, position in before.marks.items()
        if position.tokens <= reused_tokens
    }
    if not marks:
        return None
    tokens = max(position.tokens for position in marks.values())
    saved = min(before.saved_tokens, tokens)
    return replace(before, marks=marks, tokens=tokens, saved_tokens=saved, save_failed=False)
