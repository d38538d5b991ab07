"""What a slot holds, as far as Keepwarm knows, and what it would cost to lose it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from keepwarm.core.prompt import Mark, Prompt
from keepwarm.core.rates import Rates
from keepwarm.core.returns import Chance, first_turn
from keepwarm.core.tree import Tokens, common_tokens

# Estimated places of states and of a prompt's parting may differ by the opening of a turn.
_STATE_SLACK_TOKENS = 8
# Fewer uncounted tokens cost no more to prefill than to count.
_WORTH_COUNTING_TOKENS = 96
# The chance that a conversation comes back halves with every ten minutes of silence.
_RETURN_HALF_LIFE_S = 600.0


class SlotState(StrEnum):
    """Who may change a slot: nobody else while it isn't idle."""

    IDLE = "idle"
    PREPARING = "preparing"  # a save, restore, fill or erase is under way
    SERVING = "serving"  # a request has been forwarded


@dataclass(frozen=True, slots=True)
class Position:
    """Where a mark lies in a slot's or snapshot's tokens.

    `exact`: counted in tokens; otherwise estimated from characters, and only good for planning.
    """

    tokens: int
    exact: bool

    @property
    def slack_tokens(self) -> int:
        """By how much the true place may lie before this one."""
        return 0 if self.exact else _STATE_SLACK_TOKENS


class Reuse(NamedTuple):
    """What a slot spares a prompt.

    `mark_index` is the last of the prompt's marks that the slot holds (-1: none), `tokens` how many
    the engine is expected to reuse, `certain` how many of them are known by their ids.
    """

    mark_index: int
    tokens: int
    certain: int


NOTHING = Reuse(-1, 0, 0)


@dataclass(slots=True)
class Content:
    """The prefix a slot holds.

    `tokens` is its length; `ids` are the first of them, as far as they were counted (from a
    rendering, a fill or a slot file), None if none was; `marks` says where the prompt's marks are,
    for the ordinary step that needs no count. `states` are the ends at which a model that can't be
    cut can go on: its own end, and the engine's checkpoints (message starts and prompt ends), exact
    where a slot file has told them and estimated otherwise; `held_from` is the first position whose
    cells a sliding window's cache still has.

    `saved_tokens` is how much of it the store holds too, `turns` as its prompt's (0: nobody has
    asked yet), `returns` the chance that it goes on; `namespace` whose it is ('' for a tier alone);
    `is_final`: nobody is expected to go on from its end; `save_failed`: it couldn't be saved, and
    isn't tried again unchanged; `is_savable`: as its job's. `end` is the mark of its end: a prompt
    that has it goes on from here. `chat`: what its last prompt is rendered from, to be counted.
    `ahead_from`: behind this place it was computed before anybody asked (None: nothing was).
    `media_at` is the place of its first picture or sound, estimated until a slot file has told it
    (None: there is none): the store keeps what comes before.
    """

    namespace: str
    marks: dict[bytes, Position]
    tokens: int
    saved_tokens: int = 0
    turns: int = 0
    returns: Chance = field(default_factory=first_turn)
    is_final: bool = False
    save_failed: bool = False
    is_savable: bool = True
    ids: Tokens | None = None
    states: tuple[Position, ...] = ()
    held_from: int = 0
    end: bytes | None = None
    chat: Mapping[str, Any] | str | None = None
    ahead_from: int | None = None
    media_at: int | None = None

    @property
    def savable_tokens(self) -> int:
        """How much of it the store could hold."""
        return self.tokens if self.media_at is None else min(self.media_at, self.tokens)

    @property
    def counted_tokens(self) -> int:
        """How many of its tokens are known by their ids."""
        return 0 if self.ids is None else int(self.ids.size)

    def match(self, prompt: Prompt) -> tuple[int, Position]:
        """The last of a prompt's marks that this holds: its index (-1: none) and position."""
        for index in range(len(prompt.marks) - 1, -1, -1):
            position = self.marks.get(prompt.marks[index].digest)
            if position is not None:
                return index, position
        return -1, Position(0, exact=True)

    def goes_on(self, prompt: Prompt) -> bool:
        """Whether a prompt goes on from this slot's end: an agent's ordinary step."""
        return self.end is not None and any(m.digest == self.end for m in reversed(prompt.marks))

    def reuse(
        self,
        prompt: Prompt,
        ids: Tokens | None,
        *,
        is_whole: bool = True,
        cuttable: bool,
        window_tokens: int = 0,
    ) -> Reuse:
        """What of this content a prompt, counted or not, can start from.

        Ids decide as far as both are known; behind them, and without them, the marks do. A model
        that can't be cut goes on from the last state before that place, or, with a sliding window,
        from the place itself if the cells before it are still held. Not `is_whole`: `ids` are those
        of the prompt's static part.
        """
        index, position = self.match(prompt)
        place, certain = position.tokens, self._promised(prompt, index)
        if ids is not None and self.ids is not None:
            place = certain = common_tokens(self.ids, ids)
            if certain == self.counted_tokens or (certain == ids.size and not is_whole):
                place = max(certain, position.tokens)
            if is_whole:
                place = min(place, int(ids.size))
        place = min(place, self.tokens)
        if cuttable:
            return Reuse(index, place, min(certain, place))
        if window_tokens and place - window_tokens >= self.held_from:
            return Reuse(index, place, 0)
        reached = (s.tokens for s in self.states if s.tokens <= place + s.slack_tokens)
        state = max(reached, default=0)
        # Where an estimate is off by a token or two nothing is promised, so nothing is broken.
        return Reuse(index if state else -1, min(state, place), 0)

    def _promised(self, prompt: Prompt, index: int) -> int:
        """Tokens certain to be reused by an uncounted prompt that matches up to mark `index`."""
        static = prompt.static_index
        if not 0 <= static <= index:
            static = index
        positions = (self.marks.get(m.digest) for m in prompt.marks[: static + 1])
        return max((p.tokens for p in positions if p and p.exact), default=0)


@dataclass(slots=True)
class Slot:
    """One llama-server sequence. `job` is the id of the request it is prepared for or serves.

    `content` is what is known of it. The engine's sequence may hold more than that (a reply that
    was cut off, a fill that was given up): at most `held_tokens`, and `owner` is the only tenant
    whose tokens can be among them ('' for none but a tier's). `granted_tokens` is what the request
    it is given to may come to. `staged_name` is the file it was restored from before the store had
    looked at it. `is_spoiled`: the rows it holds are no numbers, and it is emptied before anybody
    goes on from them.
    """

    id: int
    state: SlotState = SlotState.IDLE
    content: Content | None = None
    job: str | None = None
    idle_since_s: float = 0.0
    held_tokens: int = 0
    granted_tokens: int = 0
    owner: str = ""
    staged_name: str = ""
    is_spoiled: bool = False

    @property
    def most_tokens(self) -> int:
        """What it may come to in a shared pool."""
        return max(self.held_tokens, self.granted_tokens)

    def is_foreign(self, namespace: str) -> bool:
        """Whether it may hold another tenant's tokens.

        The engine compares tokens itself, so a prompt in this slot would show by its count and its
        time how much of it the other one had sent.
        """
        return self.owner not in ("", namespace)

    def returns(self, now_s: float, *, at_least: float = 0.0) -> float:
        """The estimated chance that this slot's conversation goes on."""
        if self.content is None or self.content.is_final:
            return 0.0
        chance = max(self.content.returns.value, at_least)
        return float(chance * 0.5 ** (max(now_s - self.idle_since_s, 0.0) / _RETURN_HALF_LIFE_S))


def uncounted(slots: Iterable[Slot], namespace: str) -> tuple[Content, ...]:
    """What idle slots hold that a namespace may start from, and that was never counted."""
    held = (s.content for s in slots if s.state is SlotState.IDLE and not s.is_foreign(namespace))
    return tuple(
        content
        for content in held
        if content is not None
        and content.chat is not None
        and content.tokens - content.counted_tokens >= _WORTH_COUNTING_TOKENS
    )


@dataclass(frozen=True, slots=True)
class Loss:
    """What overwriting a slot costs: seconds, and whether its content is to be saved first."""

    seconds: float
    save: bool


def loss(
    slot: Slot, *, kept_tokens: int, row_bytes: int, rates: Rates, returns: float, can_save: bool
) -> Loss:
    """What is lost when a slot keeps only its first `kept_tokens`.

    `returns` is the chance that its conversation goes on. If it does, its tail must come back: by a
    restore, or by a prefill behind what the slot has kept, whichever is less. What only the slot
    holds can't be restored unless it is saved now.
    """
    content = slot.content
    if content is None or content.tokens <= kept_tokens:
        return Loss(0.0, save=False)
    size_bytes = content.tokens * row_bytes
    can_save = can_save and content.is_savable and not content.save_failed
    restore_s = rates.restore_s(size_bytes, ready=False)
    savable = content.savable_tokens
    gone = content.tokens - max(savable, kept_tokens)  # behind a picture: no restore brings it
    if gone > 0:
        restore_s += rates.prefill_s(gone)
    tail_s = returns * min(restore_s, rates.prefill_s(content.tokens - kept_tokens))
    unsaved = savable - max(content.saved_tokens, kept_tokens)
    if unsaved <= 0:
        return Loss(tail_s, save=False)
    lost_s = returns * rates.prefill_s(unsaved + max(gone, 0))
    save_s = rates.save_s(size_bytes)
    if can_save and save_s + tail_s < lost_s:
        return Loss(save_s + tail_s, save=True)
    return Loss(lost_s, save=False)


def positions(
    marks: Iterable[Mark], *, known: dict[bytes, Position], total_tokens: int
) -> dict[bytes, Position]:
    """Where each of a prompt's marks lies, by interpolation between those whose place is known.

    Args:
        marks: in order.
        known: positions from an earlier save, fill or restore of the same prefix.
        total_tokens: the prompt's length as the engine counted it.
    """
    ordered = list(marks)
    out: dict[bytes, Position] = {}
    left_chars, left_tokens = 0, 0
    pending: list[Mark] = []

    def place(right_chars: int, right_tokens: int) -> None:
        span = max(right_chars - left_chars, 1)
        for mark in pending:
            share = (mark.chars - left_chars) / span
            tokens = left_tokens + int(share * (right_tokens - left_tokens))
            out[mark.digest] = Position(max(min(tokens, right_tokens), 0), exact=False)
        pending.clear()

    for mark in ordered:
        position = known.get(mark.digest)
        if mark.tokens is not None:
            position = Position(mark.tokens, exact=True)
        if position is None or not position.exact or position.tokens > total_tokens:
            pending.append(mark)
            continue
        place(mark.chars, position.tokens)
        out[mark.digest] = position
        left_chars, left_tokens = mark.chars, position.tokens
    if pending:
        place(pending[-1].chars, total_tokens)
    return out
