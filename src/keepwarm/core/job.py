"""One request as the scheduler knows it."""

from __future__ import annotations

from dataclasses import dataclass

from keepwarm.core.plan import Demand, Plan
from keepwarm.core.prompt import Prompt


@dataclass(slots=True)
class Job:
    """One request in the scheduler. Lower `priority` goes first (0 interactive, 1 batch).

    `is_final`: nothing is expected to continue its prompt, so its tail isn't worth saving.
    `must_save`: it is here to have its static part filled and saved, even if a slot holds it.
    `filled_tokens` is how many tokens its fill prefilled, once that has ended; `failed_restore` the
    reason why its restore failed, if it did. `gone`: its client has left. `is_alone`: the engine
    computes several replies to it at once (`n`), in other slots of its own choice, so that those
    must be idle, and what they hold is lost. `is_savable`: its state is the model's
    own, so that the store may have it. `reply_tokens` is what each of its `replies` may come to,
    `counted_tokens` its prompt's length, if that was counted.
    """

    id: str
    namespace: str
    prompt: Prompt
    arrived_s: float
    deadline_s: float
    reply_tokens: int = 512
    priority: int = 0
    can_fill: bool = False
    static_tokens: int | None = None
    static_shared: bool = False
    waited_for_fill: bool = False
    is_final: bool = False
    must_save: bool = False
    is_alone: bool = False
    is_savable: bool = True
    replies: int = 1
    counted_tokens: int | None = None
    filled_tokens: int = 0
    failed_restore: str | None = None
    gone: bool = False
    plan: Plan | None = None

    def demand(self) -> Demand:
        """What the plan needs to know of it."""
        return Demand(
            self.prompt,
            self.reply_tokens,
            self.can_fill,
            self.namespace,
            self.static_tokens,
            self.waited_for_fill,
            self.is_alone,
            self.replies,
            self.counted_tokens,
        )
