"""One request as the scheduler knows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from keepwarm.core.plan import Demand, Plan
from keepwarm.core.prompt import Prompt
from keepwarm.core.slots import Content
from keepwarm.core.tree import Tokens


class Progress(NamedTuple):
    """How far a prefill is, as the engine counts: `processed` holds what was in its cache."""

    total: int
    cache: int
    processed: int
    time_ms: int


@dataclass(slots=True)
class Job:
    """One request in the scheduler. Lower `priority` goes first (0 interactive, 1 batch).

    `is_final`: nothing is expected to continue its prompt, so its tail isn't worth saving.
    `must_save`: it is here to have its static part filled and saved, even if a slot holds it.
    `filled_tokens` is how many tokens its fill prefilled, once that has ended; `failed_restore` the
    reason why its restore failed, if it did. `gone`: its client has left. `is_alone`: the engine
    computes several replies to it at once (`n`), in other slots of its own choice, so that those
    must be idle, and what they hold is lost. `is_savable`: its state is the model's
    own, so that the store may have it. `chat` is what the engine renders it from (None: it can't be
    counted), `ids` its tokens once they were counted, which took `counted_s`; of a prompt with
    pictures only `text_ids`, those before the first one, can be; `is_refused`: the
    engine wouldn't render it, so it is forwarded to be refused and costs no prefill. `reuses`:
    False if its client wants nothing reused (`cache_prompt: false`). `turn` is its place
    among the tenants' jobs, lower first.
    `reply_tokens` is what each of its `replies` may come to. `agent` names the coding agent and
    its version that ask; empty: somebody else. `ahead_of`: nobody has asked yet; its static part
    is the history of the next user's turn behind this content (see `ahead`). `on_fill` is told how
    far its fill is.
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
    turn: int = 0
    replies: int = 1
    filled_tokens: int = 0
    failed_restore: str | None = None
    gone: bool = False
    plan: Plan | None = None
    chat: Mapping[str, Any] | str | None = None
    ids: Tokens | None = None
    static_ids: Tokens | None = None
    text_ids: Tokens | None = None
    is_counting: bool = False
    is_counted: bool = False
    is_refused: bool = False
    counted_s: float = 0.0
    reuses: bool = True
    ahead_of: Content | None = None
    agent: str = ""
    on_fill: Callable[[Progress], None] | None = None

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
            self.ids,
            self.static_ids,
            self.reuses,
            self.is_refused,
            self.replies,
            self.text_ids,
        )

    @property
    def known_ids(self) -> Tokens | None:
        """Its first tokens, as far as they were counted."""
        return self.ids if self.ids is not None else self.text_ids
