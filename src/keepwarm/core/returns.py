"""How often a conversation goes on, learned from the requests themselves.

A night's loop asks each question once, an agent goes on for forty turns: whether what a slot holds
is worth a save depends on which of them it is. For each tenant two chances are kept, that a first
turn is followed by a second and that a later one is followed by another, by Laplace's rule of
succession (https://en.wikipedia.org/wiki/Rule_of_succession): what was seen, and the prior as if
it had been seen too. What lies back fades, so that a loop that ends doesn't count for long.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from keepwarm.core.prompt import Prompt

# About the last twenty turns count. Never less than one in 22 is then expected to go on, so what
# takes twenty-two times its save to compute again is always saved.
_FADES = 0.95


@dataclass(slots=True)
class Chance:
    """How many of so many turns went on: those of the prior, and those that were seen."""

    prior_went_on: float
    prior_turns: float
    went_on: float = 0.0
    turns: float = 0.0

    def begun(self) -> None:
        """One more turn that may go on."""
        self.turns = self.turns * _FADES + 1.0
        self.went_on *= _FADES

    @property
    def value(self) -> float:
        """The estimate, from 0 to 1."""
        # Conversations from before the count began go on too, so it could come out above 1.
        turns = self.prior_turns + self.turns
        return min((self.prior_went_on + self.went_on) / turns, 1.0)


# The priors err towards saving: a save costs some milliseconds, a turn that is lost its prefill.
def first_turn() -> Chance:
    """Before anything was seen: half of the first turns are followed by a second."""
    return Chance(1.0, 2.0)


def later_turn() -> Chance:
    """Before anything was seen: nine in ten conversations that have gone on go on again."""
    return Chance(9.0, 10.0)


@dataclass(slots=True)
class Returns:
    """The chances of every tenant."""

    _first: defaultdict[str, Chance] = field(default_factory=lambda: defaultdict(first_turn))
    _later: defaultdict[str, Chance] = field(default_factory=lambda: defaultdict(later_turn))

    def observe(self, namespace: str, prompt: Prompt) -> None:
        """A prompt was answered."""
        if prompt.is_raw:
            return  # text or tokens: where a turn ends isn't known
        if prompt.turns > 1:
            before = self._first if prompt.turns == 2 else self._later
            before[namespace].went_on += 1.0
        self.chance(namespace, prompt).begun()

    def chance(self, namespace: str, prompt: Prompt) -> Chance:
        """The chance that a prompt's conversation goes on; what is seen later counts in it too."""
        if prompt.is_raw:
            return first_turn()
        return (self._later if prompt.turns > 1 else self._first)[namespace]
