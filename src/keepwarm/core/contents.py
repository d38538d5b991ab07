"""What a slot holds after a fill, a restore, a reply, or half of one.

Each function tells only what is known for certain to be exact as exact: a later plan promises it,
and a broken promise says that identity and tokens disagree.
"""

from __future__ import annotations

from dataclasses import replace

from keepwarm.core.job import Job
from keepwarm.core.plan import Stored
from keepwarm.core.prompt import Mark
from keepwarm.core.reply import Counts
from keepwarm.core.returns import Chance
from keepwarm.core.slots import Content, Position, positions
from keepwarm.core.tree import Tokens, common_tokens

# The engine keeps a checkpoint so many tokens before a prompt's end (llama.cpp b11549: a prompt
# asked again evaluates 4 tokens of a model that can't be cut).
_PROMPT_END_TOKENS = 4
# And one before the last piece of a longer prefill: it computes so many tokens at a time.
_UBATCH_TOKENS = 512
# A sliding window's cache has room for the window and such a piece, in multiples of so many cells.
_CELLS = 256


def after_fill(
    job: Job, before: Content | None, tokens: int, ids: Tokens | None, *, window_tokens: int = 0
) -> Content:
    """A slot that was filled to the exact end of a job's static part."""
    static = job.prompt.static
    assert static
    # What the slot held before and the prompt begins with keeps its exact places.
    known = dict(before.marks) if before else {}
    known[static.digest] = Position(tokens, exact=True)
    upto = job.prompt.marks[: job.prompt.static_index + 1]
    marks = positions(upto, known=known, total_tokens=tokens)
    content = Content("" if job.static_shared else job.namespace, marks, tokens)
    content.ids, content.end = ids, static.digest
    content.states = (Position(tokens, exact=True),)
    if job.ahead_of is not None:
        content.turns, content.returns = job.ahead_of.turns, job.ahead_of.returns
        content.ahead_from = tokens - job.filled_tokens
        content.held_from = _held_from(before, content.ahead_from, tokens, window_tokens)
    return content


def after_restore(job: Job, stored: Stored, tokens: int, ids: Tokens | None) -> Content:
    """A slot that a snapshot was restored into."""
    marks: dict[bytes, Position] = {}
    prompt = job.prompt
    static = prompt.static
    matched = prompt.marks[: stored.mark_index + 1]
    static_tokens = job.static_tokens or 0
    if (
        static
        and static_tokens
        and (
            stored.mark_index >= prompt.static_index
            or (job.ids is not None and stored.tokens >= static_tokens)
        )
    ):
        marks[static.digest] = Position(static_tokens, exact=True)
    if matched:
        marks[matched[-1].digest] = Position(stored.tokens, exact=True)
    marks |= positions(matched, known=marks, total_tokens=stored.tokens)
    by_mark = 0 <= stored.mark_index <= prompt.static_index
    shared = job.static_shared and (by_mark or stored.tokens <= static_tokens)
    content = Content("" if shared else job.namespace, marks, tokens, saved_tokens=tokens, ids=ids)
    # The checkpoints that the engine had in this slot are of what stood here before.
    content.states = (Position(tokens, exact=True),)
    content.end = matched[-1].digest if matched else None
    return content


def after_reply(
    job: Job,
    before: Content | None,
    counts: Counts,
    said: Mark | None,
    *,
    returns: Chance,
    window_tokens: int = 0,
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
    content = Content(
        *(job.namespace, marks, total, saved, prompt.turns, returns, job.is_final),
        is_savable=job.is_savable,
    )
    content.ids = job.known_ids if job.known_ids is not None else _kept(before, counts.cached)
    content.media_at = _media_at(job, before, marks, cached=counts.cached)
    if not prompt.has_media:
        content.chat = job.chat
    elif before is not None and before.media_at is not None:
        # An engine that saves no pictures won't save them in the next turn.
        content.save_failed = before.save_failed
    content.end = (said or prompt.marks[-1]).digest
    content.states = _states(job, before, marks, cached=counts.cached, prompt_tokens=counts.prompt)
    content.states = (*content.states, Position(total, exact=True))
    content.held_from = _held_from(before, counts.cached, total, window_tokens)
    return content


def _media_at(
    job: Job, before: Content | None, marks: dict[bytes, Position], *, cached: int
) -> int | None:
    """Where a prompt's first picture is in its slot."""
    prompt = job.prompt
    if not prompt.has_media:
        return None
    if job.text_ids is not None:
        return int(job.text_ids.size)
    if before is not None and before.media_at is not None and before.media_at < cached:
        return before.media_at
    return marks[prompt.marks[prompt.text_index].digest].tokens


def _kept(before: Content | None, cached: int) -> Tokens | None:
    """The ids of what the engine went on from: it compares tokens, so those are the prompt's."""
    if before is None or before.ids is None or cached <= 0:
        return None
    return before.ids[:cached]


def _held_from(before: Content | None, cached: int, total: int, window_tokens: int) -> int:
    """From where a sliding window's cache still has its cells: it has room for a batch more."""
    if before is None or not cached:
        kept = 0
    elif cached >= before.tokens:
        kept = before.held_from
    else:  # cut there, or gone back to a checkpoint, which holds the window alone
        kept = max(cached - window_tokens, before.held_from)
    cells = -(-(window_tokens + _UBATCH_TOKENS) // _CELLS) * _CELLS
    return max(kept, total - cells)


def _states(
    job: Job,
    before: Content | None,
    marks: dict[bytes, Position],
    *,
    cached: int,
    prompt_tokens: int,
) -> tuple[Position, ...]:
    """Where a model that can't be cut can go on: the engine drops what lies behind a parting."""
    kept = [at for at in before.states if at.tokens <= cached] if before else []
    asked_at = marks.get(job.prompt.asked.digest) if job.prompt.asked else None
    made = [asked_at] if asked_at and asked_at.tokens > cached else []
    if prompt_tokens - cached > _UBATCH_TOKENS + _PROMPT_END_TOKENS:
        before_last = prompt_tokens - _UBATCH_TOKENS - _PROMPT_END_TOKENS
        made.append(Position(before_last, exact=True))
        static = marks.get(job.prompt.static.digest) if job.prompt.static else None
        if static and static.tokens > cached:
            made.append(static)  # the first user message
    return (*kept, *made, Position(max(prompt_tokens - _PROMPT_END_TOKENS, 1), exact=True))


def while_unsure(job: Job, before: Content | None) -> Content | None:
    """A slot whose request or fill ended in the middle: what it may hold of the prompt.

    The engine goes on for a batch at most. How far it came is looked up (`after_look`); until then
    nothing of it is promised, and nobody is planned into it.
    """
    if not job.is_savable:
        return None
    total = before.tokens if before else 0
    prompt = job.prompt
    whole = max(job.plan.prompt_tokens if job.plan else total, total, 1)
    known = before.marks if before else {}
    marks = {
        digest: Position(position.tokens, exact=False)
        for digest, position in positions(prompt.marks, known=known, total_tokens=whole).items()
    }
    content = Content(job.namespace, marks, whole, is_savable=True)
    content.turns = prompt.turns
    content.ids = job.known_ids if job.known_ids is not None else job.static_ids
    reused = job.plan.reuse_tokens if job.plan else 0
    content.media_at = _media_at(job, before, marks, cached=reused)
    if not prompt.has_media:
        content.chat = job.chat
    content.saved_tokens = min(before.saved_tokens, reused) if before else 0
    content.states = _states(job, before, marks, cached=reused, prompt_tokens=whole)
    if job.ahead_of is not None:
        content.ahead_from = reused
    return content


def after_look(content: Content, tokens: int) -> Content | None:
    """What `while_unsure` told, cut to what the engine says that the slot holds."""
    if tokens <= 0:
        return None
    ids = content.ids
    if ids is not None:
        ids = ids[:tokens]
    marks = {d: p for d, p in content.marks.items() if p.tokens <= tokens}
    before = (at for at in content.states if at.tokens < tokens)
    states = (*before, Position(tokens, exact=True))
    return replace(content, marks=marks, tokens=tokens, ids=ids, states=states, end=None)


def after_count(content: Content, ids: Tokens, states: tuple[int, ...] | None) -> None:
    """Take over a count of what a slot holds: one scale, the last one wins.

    With `states` it is a slot file's: of a slot with pictures it ends before the first one.
    """
    if content.ids is not None and content.counted_tokens > ids.size:
        common = common_tokens(content.ids, ids)
        if common == ids.size:
            return  # known already, and more
    content.ids = ids
    if states is None:
        return
    behind: tuple[Position, ...] = ()
    if content.media_at is not None:
        content.media_at = int(ids.size)
        behind = tuple(at for at in content.states if at.tokens > ids.size)
    content.states = (*(Position(at, exact=True) for at in states), *behind)
