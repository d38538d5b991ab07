"""Which of several models is loaded next, and which goes for it: a function of what is known now.

Memory holds fewer models than there are. Loading one takes seconds to minutes, and while it is
away those who want another wait; so a model stays while it has work, but nobody waits for ever.

How it is decided (`decide`), each time that something has changed:
1. Wanted is the model that isn't loaded and whose requests have waited longest; what batches wait
   for comes after all others, and a model that failed to load not before its pause is over.
2. There is room for it: it is loaded.
3. Those that would have to go are the ones worth least: what loading one again takes, over how long
   it has been idle. One that is pinned stays.
4. One may go if it has nothing to do and its agent seems gone: idle for as long as loading it again
   takes, at most `LINGER_S`. An agent that is at its tools comes back within that.
5. Or if what waits outweighs what it has: the seconds that requests have waited, added up, are more
   than `STAYS` times its loading for each request that it has (or is about to get).
6. Or if a request has waited for the longest time that any may wait.
7. Otherwise all stay. Only a model that is idle goes for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Two agents of 20 turns on two models, room for one, a turn a tenth of a load: a fifth of the time
# that loading at each change takes, where 1 would be 40 % of it (tests/unit/test_swaps.py).
STAYS = 4.0
# Most tools that agents call between two turns have ended by then.
LINGER_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelNow:
    """One model at a moment. Seconds and bytes are measured, or estimated where it never ran.

    `waited_s`: how long each interactive request has waited for it to be loaded. `pending` and
    `batch_pending`: requests that it has. `idle_s`: since its last one ended; `loaded_for_s`: since
    it was loaded last.
    """

    name: str
    is_loaded: bool
    load_s: float
    size_bytes: int
    waited_s: Sequence[float] = ()
    batch_waiting: int = 0
    pending: int = 0
    batch_pending: int = 0
    idle_s: float = math.inf
    loaded_for_s: float = math.inf
    is_pinned: bool = False
    may_load: bool = True

    @property
    def worth(self) -> float:
        """What is lost if it goes: the less, the longer nobody has asked it."""
        return math.inf if self.pending or self.batch_pending else self.load_s / (1.0 + self.idle_s)

    @property
    def lingers(self) -> bool:
        """Whether whoever asked it last may come back in a moment."""
        return self.idle_s < min(self.load_s, LINGER_S)


@dataclass(frozen=True, slots=True)
class Limits:
    """`models` and `memory_bytes`: what may be loaded at a time, 0 for no limit of that kind.

    `wait_s`: the longest that a request waits for others' work.
    """

    models: int
    memory_bytes: int
    wait_s: float


@dataclass(frozen=True, slots=True)
class Swap:
    """Load a model, once these have gone."""

    load: str
    unload: tuple[str, ...] = ()


def decide(models: Sequence[ModelNow], limits: Limits) -> Swap | None:
    """See the module; None: all stays as it is."""
    wanted = _wanted(models)  # 1
    if wanted is None:
        return None
    leaving = _leaving(wanted, models, limits)  # 2, 3
    if leaving is None or not all(_may_go(one, wanted, limits) for one in leaving):
        return None  # 7
    return Swap(wanted.name, tuple(one.name for one in leaving))


def has_room_ever(name: str, models: Sequence[ModelNow], limits: Limits) -> bool:
    """Whether a model could be loaded if all went that may."""
    wanted = next(one for one in models if one.name == name)
    return wanted.is_loaded or _leaving(wanted, models, limits) is not None


def unused(models: Iterable[ModelNow], idle_unload_s: float) -> list[str]:
    """Models that nobody has asked for so long that their memory is given back."""
    if not idle_unload_s:
        return []
    return [
        one.name
        for one in models
        if one.is_loaded
        and not one.is_pinned
        and not one.pending
        and not one.batch_pending
        and idle_unload_s <= min(one.idle_s, one.loaded_for_s)
    ]


def _wanted(models: Sequence[ModelNow]) -> ModelNow | None:
    out = [one for one in models if not one.is_loaded and one.may_load]
    asked = [one for one in out if one.waited_s]
    if asked:
        return max(asked, key=lambda one: max(one.waited_s))
    return max(
        (one for one in out if one.batch_waiting), key=lambda one: one.batch_waiting, default=None
    )


def _leaving(
    wanted: ModelNow, models: Sequence[ModelNow], limits: Limits
) -> tuple[ModelNow, ...] | None:
    """Those that go so that it has room; None if those that stay leave too little."""
    loaded = [one for one in models if one.is_loaded]
    going: list[ModelNow] = []
    for one in sorted((m for m in loaded if not m.is_pinned), key=lambda m: m.worth):
        if _has_room(wanted, [m for m in loaded if m not in going], limits):
            break
        going.append(one)
    staying = [m for m in loaded if m not in going]
    # One that is alone is loaded whatever its size is thought to be.
    return tuple(going) if not staying or _has_room(wanted, staying, limits) else None


def _has_room(wanted: ModelNow, staying: Sequence[ModelNow], limits: Limits) -> bool:
    if limits.models and len(staying) >= limits.models:
        return False
    taken = sum(one.size_bytes for one in staying) + wanted.size_bytes
    return not limits.memory_bytes or taken <= limits.memory_bytes


def _may_go(one: ModelNow, wanted: ModelNow, limits: Limits) -> bool:
    if not wanted.waited_s:  # a batch
        return not one.pending and not one.batch_pending and not one.lingers
    if not one.pending and not one.lingers:  # 4; a batch goes on when it is back
        return True
    if max(wanted.waited_s) >= limits.wait_s:  # 6
        return True
    claim_s = STAYS * one.load_s * max(one.pending, 1)
    return sum(wanted.waited_s) > claim_s  # 5
