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

# The priors, as (went on, of so many): half of the first turns, and nine in ten later ones. They
# err towards saving: a save costs some milliseconds, a turn that is lost its prefill.
_FIRST, _LATER = (1.0, 2.0), (9.0, 10.0)
# About the last twenty turns count. Never less than one in 22 is then expected to go on, so what
# takes twenty-two times its save to compute again is always saved.
_FADES = 0.95


@dataclass(slots=True)
class Chance:
    """How many turns were seen, and how many of them went on."""

    turns: float = 0.0
    went_on: float = 0.0

    def begun(self) -> None:
        """One more turn that may go on."""
        self.turns = self.turns * _FADES + 1.0
        self.went_on *= _FADES

    def value(self, prior: tuple[float, float]) -> float:
        """The estimate, from 0 to 1."""
        went_on, turns = prior
        # Conversations from before the count began go on too.
        return min((went_on + self.went_on) / (turns + self.turns), 1.0)


@dataclass(slots=True)
class Returns:
    """The chances of every tenant."""

    _first: defaultdict[str, Chance] = field(default_factory=lambda: defaultdict(Chance))
    _later: defaultdict[str, Chance] = field(default_factory=lambda: defaultdict(Chance))

    def observe(self, namespace: str, prompt: Prompt) -> None:
        """A prompt was answered."""
        if prompt.api == "completion":
            return  # text or tokens: where a turn ends isn't known
        if prompt.turns > 1:
            before = self._first if prompt.turns == 2 else self._later
            before[namespace].went_on += 1.0
        (self._first if prompt.turns <= 1 else self._later)[namespace].begun()

    def chance(self, namespace: str, prompt: Prompt) -> float:
        """The estimated chance that a prompt's conversation goes on."""
        if prompt.api == "completion":
            return PRIOR
        if prompt.turns > 1:
            return self._later[namespace].value(_LATER)
        return self._first[namespace].value(_FIRST)


# What to expect of a first turn before any was seen.
PRIOR = Chance().value(_FIRST)
