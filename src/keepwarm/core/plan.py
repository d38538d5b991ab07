"""Which slot serves a request, and from which source: the least estimated time to first token.

Pure: `choose` gets all it looks at and only decides. Five sources, as a client sees them in
`X-Keepwarm-Plan`:

1. *slot*: an idle slot already holds a prefix of the prompt.
2. *snapshot*: the store (or a save that is on its way into it) holds a longer one; it is restored.
3. *shared*: as 2, but the request has waited for another one's prefill of that prefix.
4. *ahead*: as 1, and part of it was prefilled before anybody asked (see `ahead`).
5. *cold*: nothing worth using. A long static part is then filled and saved on its own before the
   rest, so that others can start from it at once.

Each candidate is charged with what its slot loses (see `slots.loss`): what nobody else holds and is
dearer to prefill than to save is saved first, on the request's own time.

A prompt is matched by tokens where they were counted, in slots and in the store alike, and by the
marks of its digest chain otherwise. `doubt_tokens` says how much is at stake: what would be
prefilled by the marks' account, though a count might find it. Where that is dearer than to count,
the scheduler has the prompt counted before it plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from keepwarm.core.prompt import Prompt
from keepwarm.core.rates import Rates
from keepwarm.core.slots import NOTHING, Loss, Reuse, Slot, loss
from keepwarm.core.tree import Tokens

# A static part that is shorter than this isn't worth a fill of its own (render, tokenize, save:
# about 30 ms) on any machine that needs Keepwarm; a tenth of a second at 1 ms a token.
FILL_MIN_TOKENS = 96
# Turn tokens of a template that follow the last message, and the one token always evaluated again.
_TURN_TOKENS = 6
# The opening of a turn is in any two prompts of a model: that is nothing to start from.
LEAST_TOKENS = 16
# A new message of fewer tokens isn't worth looking for: to count a prompt of 2,000 tokens costs as
# much as to prefill 40 of them.
_LONG_NEW_TOKENS = 256
# A reply for which so much of a shared pool is left needn't wait for more, and no reply takes more
# than half of what is left beyond it: agents' replies are shorter, and others come meanwhile.
AMPLE_TOKENS = 4096
# Of the tokens that were estimated and not counted, one in so many may be missing.
_ESTIMATE_MARGIN = 4


class Source(StrEnum):
    """Where a request's first tokens come from."""

    SLOT = "slot"
    SNAPSHOT = "snapshot"
    SHARED = "shared"
    AHEAD = "ahead"
    COLD = "cold"


@dataclass(frozen=True, slots=True)
class Stored:
    """The longest prefix of a prompt that can be restored.

    Either an extent of the store or a staged file that is on its way there (`staged_name`).
    `promise_tokens` of it are certain to be reused.
    """

    mark_index: int
    tokens: int
    promise_tokens: int
    size_bytes: int
    ready: bool
    extent_id: int | None = None
    staged_name: str | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """One way that was considered, kept to explain the choice.

    `mark_index` is the last of the prompt's marks that is reused (-1: none).
    """

    source: Source
    slot: int
    reuse_tokens: int
    ttft_s: float
    loss_s: float
    mark_index: int = -1


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done for one request.

    `reuse_tokens` is the estimate, `promise_tokens` the part of it that `cache_n` must show.
    `save_first`: the slot's content is saved before it is overwritten. `fill`: the static part is
    prefilled and saved on its own. `evict`: other slots to empty, so that a shared pool suffices;
    True where their content is saved first. `discard`: the engine must not compare the prompt with
    what the slot holds, since that may be another tenant's and couldn't be erased. `reply_tokens`
    is what each reply may come to in a shared pool (0: it has the context to itself),
    `granted_tokens` what the slots come to with it at most. `ahead_tokens` of what is reused were
    prefilled before anybody asked.
    """

    source: Source
    slot: int
    reuse_tokens: int
    promise_tokens: int
    prompt_tokens: int
    estimate_s: float
    save_first: bool
    fill: bool
    restore: Stored | None
    evict: tuple[tuple[int, bool], ...]
    considered: tuple[Option, ...]
    discard: bool = False
    reply_tokens: int = 0
    granted_tokens: int = 0
    ahead_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Machine:
    """What plans need to know of the engine.

    `cuttable`: a slot or snapshot can be reused up to any token; otherwise (sliding windows,
    recurrent models) only to its very end. `pool_tokens` is the context all slots share, None where
    each has its own part. `slack_tokens` of a restored prefix may be computed again. `slot_tokens`
    is what a slot may hold, 0 if that isn't known; `window_tokens` the model's sliding window, 0 if
    it has none. `appends`: its template renders a history the same whatever follows;
    `tells_time`: it prints the date or the time, so that what was rendered once may be past.
    """

    row_bytes: int
    cuttable: bool
    can_save: bool
    pool_tokens: int | None
    slack_tokens: int = 0
    window_tokens: int = 0
    appends: bool = True
    tells_time: bool = False
    slot_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks for. `static_tokens` is known once its static part was tokenized.

    `is_alone`: every other slot must be idle, and is emptied; `ids`, `static_ids`: its tokens and
    its static part's where they are known; `reuses`, `is_refused`, `text_ids`: see `Job`. `replies`
    are computed at once.
    """

    prompt: Prompt
    reply_tokens: int
    can_fill: bool
    namespace: str = ""
    static_tokens: int | None = None
    waited_for_fill: bool = False
    is_alone: bool = False
    ids: Tokens | None = None
    static_ids: Tokens | None = None
    reuses: bool = True
    is_refused: bool = False
    replies: int = 1
    text_ids: Tokens | None = None

    @property
    def is_counted(self) -> bool:
        """Whether its tokens are known, or all before its first picture."""
        return self.ids is not None or self.text_ids is not None


def prompt_tokens(demand: Demand, rates: Rates) -> int:
    """A prompt's length: counted, or else an estimate."""
    per_char = rates.tokens_per_char.value
    prompt = demand.prompt
    if demand.ids is not None:
        return int(demand.ids.size)
    if prompt.marks[-1].tokens is not None:
        return prompt.marks[-1].tokens
    if demand.text_ids is not None:
        rest = prompt.chars - prompt.marks[prompt.text_index].chars
        return int(demand.text_ids.size) + int(rest * per_char) + _TURN_TOKENS
    if demand.static_tokens is not None and prompt.static is not None:
        rest = prompt.chars - prompt.static.chars
        return demand.static_tokens + int(rest * per_char) + _TURN_TOKENS
    return int(prompt.chars * per_char) + _TURN_TOKENS


def static_tokens(demand: Demand, rates: Rates) -> int:
    """An estimate of the static part's length."""
    if demand.static_tokens is not None:
        return demand.static_tokens
    static = demand.prompt.static
    return int(static.chars * rates.tokens_per_char.value) if static else 0


def doubt_tokens(
    demand: Demand, slots: Sequence[Slot], stored: Stored | None, *, machine: Machine, rates: Rates
) -> int:
    """How many tokens would be prefilled by the marks' account that a count might find somewhere.

    0 where the marks decide: the prompt is counted already, or goes on from a slot's end (what is
    behind that is new). In doubt is what was said before, up to the model's last message; what is
    behind that is new, and in doubt only if it is long. Where a template may write the history
    otherwise once a user asks anew, or a client does (what was computed ahead tells), the marks say
    nothing of a slot that was asked before that.
    """
    if demand.is_counted or not demand.reuses or demand.is_refused:
        return 0
    prompt = demand.prompt
    contents = [s.content for s in slots if s.content and not s.is_foreign(demand.namespace)]
    if not machine.appends or any(c.ahead_from is not None for c in contents):
        contents = [c for c in contents if c.match(prompt)[0] > prompt.asked_index]
    if any(content.goes_on(prompt) for content in contents):
        return 0
    reuses = [
        c.reuse(prompt, None, cuttable=machine.cuttable, window_tokens=machine.window_tokens)
        for c in contents
    ]
    known = [(reuse.tokens, reuse.mark_index) for reuse in reuses]
    if stored:
        known.append((stored.tokens, stored.mark_index))
    tokens, index = max(known, default=(0, -1))
    per_char = rates.tokens_per_char.value
    lacking = prompt_tokens(demand, rates) - tokens
    if index >= 0:
        # By its characters a whole prompt may come out shorter than what is known of it.
        behind = int((prompt.chars - prompt.marks[index].chars) * per_char) + _TURN_TOKENS
        lacking = max(lacking, behind)
    before = max(prompt.answered_index, prompt.static_index, 0)
    new = int((prompt.chars - prompt.marks[before].chars) * per_char) + _TURN_TOKENS
    return max(lacking - new if new < _LONG_NEW_TOKENS else lacking, 0)


def choose(
    demand: Demand,
    slots: Sequence[Slot],
    stored: Stored | None,
    *,
    machine: Machine,
    rates: Rates,
    now_s: float,
) -> Plan | None:
    """The best plan over the idle slots, or None if none is idle or the pool has no room."""
    idle = [(slot, _reuse(demand, slot, machine)) for slot in slots if slot.state == "idle"]
    if not machine.appends and not demand.is_counted:
        # Marks can't tell a history that is written otherwise now from one that isn't.
        newer = [slot.id for slot, reuse in idle if reuse.mark_index > demand.prompt.asked_index]
        if newer:
            idle = [(s, reuse if s.id in newer else NOTHING) for s, reuse in idle]
    if not demand.reuses or demand.is_refused:
        stored = None
    total = _total_tokens(demand, [reuse for _, reuse in idle], stored, rates)
    best: tuple[float, Option, Loss, int] | None = None
    considered: list[Option] = []
    for slot, reuse in idle:
        for option, lost, promise in _options(
            demand, slot, reuse, stored, total, machine=machine, rates=rates, now_s=now_s
        ):
            considered.append(option)
            cost = option.ttft_s + option.loss_s
            # The longest idle of equals, so that what was used last stays.
            if best is None or (cost, slot.idle_since_s) < (
                best[0],
                slots[best[1].slot].idle_since_s,
            ):
                best = (cost, option, lost, promise)
    if best is None:
        return None
    _, option, lost, promise = best
    room: _Room | None = _Room((), 0, total)
    if not demand.is_refused:
        room = _make_room(demand, slots, option, total, machine=machine, rates=rates, now_s=now_s)
    if room is None:
        return None
    restored = stored if option.source is Source.SNAPSHOT else None
    source = option.source
    if restored and demand.waited_for_fill:
        source = Source.SHARED
    return Plan(
        source=source,
        slot=option.slot,
        reuse_tokens=option.reuse_tokens,
        promise_tokens=promise,
        prompt_tokens=total,
        estimate_s=option.ttft_s + (lost.seconds if lost.save else 0.0),
        save_first=lost.save and not demand.is_refused,
        fill=_lacking_tokens(demand, option, rates) >= FILL_MIN_TOKENS,
        restore=restored,
        evict=room.evict,
        considered=tuple(considered),
        discard=not demand.reuses,
        reply_tokens=room.reply_tokens,
        granted_tokens=room.granted_tokens,
        ahead_tokens=_ahead_tokens(slots[option.slot], option),
    )


def _ahead_tokens(slot: Slot, option: Option) -> int:
    """What of the reused tokens was prefilled before anybody asked."""
    if option.source is not Source.AHEAD or slot.content is None:
        return 0
    return option.reuse_tokens - (slot.content.ahead_from or 0)


def _lacking_tokens(demand: Demand, option: Option, rates: Rates) -> int:
    """Tokens of the static part that a fill would bring."""
    if not demand.can_fill or not demand.reuses or demand.is_refused:
        return 0
    if not demand.is_counted and option.mark_index >= demand.prompt.static_index:
        return 0
    return static_tokens(demand, rates) - option.reuse_tokens


def _reuse(demand: Demand, slot: Slot, machine: Machine) -> Reuse:
    """What of a prompt a slot spares."""
    if slot.content is None or slot.is_foreign(demand.namespace) or not demand.reuses:
        return NOTHING
    is_whole = demand.ids is not None
    ids = next((i for i in (demand.ids, demand.text_ids, demand.static_ids) if i is not None), None)
    return slot.content.reuse(
        demand.prompt,
        ids,
        is_whole=is_whole,
        cuttable=machine.cuttable,
        window_tokens=machine.window_tokens,
    )


def _total_tokens(
    demand: Demand, reuses: Sequence[Reuse], stored: Stored | None, rates: Rates
) -> int:
    """A prompt's length, from the longest part of it whose tokens were counted once.

    From its characters alone it could come out shorter than what a slot holds of it, and then the
    slot that holds more would look no better than one that holds less.
    """
    prompt = demand.prompt
    known = [(reuse.tokens, reuse.mark_index) for reuse in reuses]
    if stored:
        known.append((stored.tokens, stored.mark_index))
    tokens, index = max(known, default=(0, -1))
    if index < 0 or demand.ids is not None or prompt.marks[-1].tokens is not None:
        return prompt_tokens(demand, rates)
    rest = prompt.chars - prompt.marks[index].chars
    return tokens + int(rest * rates.tokens_per_char.value) + _TURN_TOKENS


def _options(
    demand: Demand,
    slot: Slot,
    reuse: Reuse,
    stored: Stored | None,
    total: int,
    *,
    machine: Machine,
    rates: Rates,
    now_s: float,
) -> list[tuple[Option, Loss, int]]:
    """The ways one idle slot could serve a prompt of `total` tokens."""
    kept = min(reuse.tokens, total - 1)
    # What stands behind the place from which the same conversation goes on is of no more use.
    goes_on = slot.content is not None and slot.content.goes_on(demand.prompt)

    def lose(tokens: int) -> Loss:
        return loss(
            slot,
            kept_tokens=tokens,
            row_bytes=machine.row_bytes,
            rates=rates,
            returns=slot.returns(now_s),
            can_save=machine.can_save,
        )

    out: list[tuple[Option, Loss, int]] = []
    lost = Loss(0.0, save=False) if goes_on and kept else lose(kept)
    source = Source.SLOT if kept >= LEAST_TOKENS else Source.COLD
    ahead_from = slot.content.ahead_from if slot.content else None
    if ahead_from is not None and kept > ahead_from:
        source = Source.AHEAD
    ttft = rates.prefill_s(total - kept)
    option = Option(source, slot.id, kept, ttft, lost.seconds, reuse.mark_index)
    certain = 0 if machine.tells_time and not demand.is_counted else min(reuse.certain, kept)
    out.append((option, lost, certain))
    if stored and stored.tokens > kept and not (goes_on and kept and not demand.is_counted):
        restored = min(stored.tokens, total - 1)
        ttft = rates.restore_s(stored.size_bytes, ready=stored.ready)
        ttft += rates.prefill_s(total - restored)
        lost = lose(0)
        option = Option(Source.SNAPSHOT, slot.id, restored, ttft, lost.seconds, stored.mark_index)
        out.append((option, lost, stored.promise_tokens))
    return out


@dataclass(frozen=True, slots=True)
class _Room:
    """As `Plan` has it."""

    evict: tuple[tuple[int, bool], ...]
    reply_tokens: int
    granted_tokens: int


def _make_room(
    demand: Demand,
    slots: Sequence[Slot],
    option: Option,
    total: int,
    *,
    machine: Machine,
    rates: Rates,
    now_s: float,
) -> _Room | None:
    """Idle slots to empty so that a prompt and its reply fit into a shared pool, or are alone.

    When the pool overflows while requests run, llama-server fails all of them; when idle slots
    fill it, it purges them unsaved and unasked. So the sum is kept here, with what each reply may
    come to. None: no room until a busy slot is free.
    """
    others = [s for s in slots if s.id != option.slot]
    is_beside = any(s.state != "idle" for s in others)
    lost = {
        s.id: loss(
            s,
            kept_tokens=0,
            row_bytes=machine.row_bytes,
            rates=rates,
            returns=s.returns(now_s),
            can_save=machine.can_save,
        )
        for s in others
        if s.state == "idle" and s.most_tokens
    }
    if demand.is_alone and is_beside:
        return None
    everybody = tuple((slot_id, lose.save) for slot_id, lose in lost.items())
    if machine.pool_tokens is None:
        evict = everybody if demand.is_alone else ()
        return _Room(evict, 0, total + demand.reply_tokens)
    margin = (total - option.reuse_tokens) // _ESTIMATE_MARGIN
    need = total if demand.ids is not None else total + margin
    reply = _reply_tokens(demand, slots, option, need, machine.pool_tokens)
    if reply is None:
        return None
    granted = need + reply * demand.replies
    if total >= machine.pool_tokens:
        # The engine refuses it, before it touches anything.
        return _Room((), reply, granted)
    if demand.is_alone:
        return _Room(everybody, reply, granted)
    over = granted + sum(s.most_tokens for s in others) - machine.pool_tokens
    out: list[tuple[int, bool]] = []
    for slot_id, lose in sorted(lost.items(), key=lambda pair: pair[1].seconds):
        if over <= 0:
            break
        out.append((slot_id, lose.save))
        over -= slots[slot_id].most_tokens
    return _Room(tuple(out), reply, granted)


def _reply_tokens(
    demand: Demand, slots: Sequence[Slot], option: Option, need: int, pool_tokens: int
) -> int | None:
    """What each reply may come to beside the requests that run.

    None: too little is left; a request that ends makes room. With nobody there to wait for it is
    all that is left, and the reply ends with `length` there, as it would on an engine of its own.
    """
    taken = sum(s.most_tokens for s in slots if s.id != option.slot and s.state != "idle")
    left = max(pool_tokens - taken - need, 0) // demand.replies
    wanted = min(demand.reply_tokens, AMPLE_TOKENS)
    if left < wanted:
        return None if taken else max(left, 1)
    return min(demand.reply_tokens, max(wanted, left // 2))
