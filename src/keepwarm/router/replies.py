"""How long a reply will be: by the kind of task, learned while running."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from keepwarm.core.rates import Mean
from keepwarm.router.features import Seen


class TaskKind(StrEnum):
    """What a task's reply will be like."""

    TALK = "talk"
    QUESTION = "question"
    EXPLANATION = "explanation"
    TEXT = "text"
    CODE = "code"
    ERRAND = "errand"


#: Tokens of a reply before any has been seen. Guesses: the first reply of its kind replaces them.
USUAL_REPLY_TOKENS: Final[Mapping[str, float]] = MappingProxyType(
    {
        TaskKind.TALK: 30.0,
        TaskKind.QUESTION: 80.0,
        TaskKind.EXPLANATION: 250.0,
        TaskKind.TEXT: 250.0,
        TaskKind.CODE: 300.0,
        TaskKind.ERRAND: 80.0,
    }
)


def task_kind(request: Seen) -> TaskKind:
    """The kind of task, by the first of these that a request shows."""
    cues, values = request.cues, request.values
    if request.is_small_talk:
        return TaskKind.TALK
    if cues.get("code") or values["code shown"]:
        return TaskKind.CODE
    if cues.get("write"):
        return TaskKind.TEXT
    if cues.get("explain") or cues.get("advice") or cues.get("depth"):
        return TaskKind.EXPLANATION
    return TaskKind.QUESTION if values["asks"] or values["ends asking"] else TaskKind.ERRAND


class ReplyLengths:
    """Means of the replies' tokens, one a kind."""

    def __init__(self) -> None:
        self._means = {kind: Mean(USUAL_REPLY_TOKENS[kind]) for kind in TaskKind}

    def learn(self, kind: str, tokens: int) -> None:
        """Take one whole reply into the mean of its kind."""
        if tokens > 0:
            self._means[TaskKind(kind)].learn(float(tokens))

    def expected(self) -> dict[str, float]:
        """By kind: the tokens to expect."""
        return {kind: mean.value for kind, mean in self._means.items()}
