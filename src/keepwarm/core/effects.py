"""What the scheduler asks the shell to do (effects), and what the shell reports back (outcomes).

Effects are imperative, outcomes are past. Each step names the one slot it works on; steps compare
by identity, since the same save may be asked for twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from keepwarm.core.plan import Plan, Stored
from keepwarm.core.slots import Content, Position
from keepwarm.core.tree import Tokens


@dataclass(frozen=True, slots=True, eq=False)
class SaveSlot:
    """Save a slot, then hand the file to the store with these marks."""

    slot: int
    namespace: str
    marks: tuple[tuple[bytes, Position], ...]
    prefill_s: float
    static: bool


@dataclass(frozen=True, slots=True, eq=False)
class RestoreSlot:
    """Bring a snapshot into a slot."""

    slot: int
    stored: Stored
    job: str


@dataclass(frozen=True, slots=True, eq=False)
class FillSlot:
    """Prefill the static part of a job's prompt, to its exact end."""

    slot: int
    job: str


@dataclass(frozen=True, slots=True, eq=False)
class EraseSlot:
    """Empty a slot."""

    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class LookSlot:
    """Wait until the engine is through with a slot, and see how many tokens it holds."""

    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class CountPrompt:
    """Render and tokenise a job's prompt, and what these contents were rendered from."""

    job: str
    contents: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class Interrupt:
    """Nobody wants a running step's result any more: end it early; its `step_done` still comes."""

    step: FillSlot


@dataclass(frozen=True, slots=True)
class Start:
    """Forward the request to its slot."""

    job: str
    plan: Plan


@dataclass(frozen=True, slots=True)
class Fail:
    """The request ends without having been forwarded.

    `queue_full`, `deadline`, and what is computed ahead by `no_room` or `overtaken`.
    """

    job: str
    reason: str


Step = SaveSlot | RestoreSlot | FillSlot | EraseSlot | LookSlot
Effect = Step | CountPrompt | Interrupt | Start | Fail


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """A save succeeded: a file of `tokens` waits in staging."""

    staged_name: str
    tokens: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class RestoredSlot:
    """A restore succeeded. `ids` are the restored tokens, None if the store has forgotten them."""

    tokens: int
    ids: Tokens | None = None


@dataclass(frozen=True, slots=True)
class FilledSlot:
    """A fill succeeded: the static part is exactly `tokens` long."""

    tokens: int


@dataclass(frozen=True, slots=True)
class LookedSlot:
    """The engine has let go of a slot, which holds so many tokens."""

    tokens: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step failed; `emptied` tells whether the slot lost its content by it."""

    emptied: bool


Outcome = SavedSlot | RestoredSlot | FilledSlot | LookedSlot | StepFailed | None
