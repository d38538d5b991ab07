"""Escalation: seeing in a reply's first characters that its tier was too small.

The minimal and standard tiers tell the model one static line to begin with when it can't do the
task: `NEED_MORE: tools` or `NEED_MORE: context`. `MarkerWatch` reads a stream's first characters
and holds them back only while they may still become that line: for almost every reply one
character. `escalation_needed` judges a whole first reply; a replay goes one tier up, once a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from keepwarm.router.types import next_tier

MARKER: Final = "NEED_MORE:"
KINDS: Final = ("tools", "context")
#: What a small model may put around the line: emphasis, code marks, quotes.
_DRESS: Final = " \t\r\n*`\"'_>#"


class Verdict(StrEnum):
    """What is known of a reply so far."""

    UNDECIDED = "undecided"
    PASS = "pass"  # noqa: S105  (not a password)
    ESCALATE = "escalate"


class EscalationCause(StrEnum):
    """Why a reply is replayed one tier up."""

    ASKED_TOOLS = "asked-tools"
    ASKED_CONTEXT = "asked-context"
    ASKED = "asked"
    EMPTY = "empty-answer"
    UNKNOWN_TOOL = "unknown-tool"


@dataclass(frozen=True, slots=True)
class Escalation:
    """Replay the request with `tier`, because of `cause`; `detail` names the unknown tool."""

    tier: str
    cause: EscalationCause
    detail: str = ""


def _judge(text: str, *, is_whole: bool) -> tuple[Verdict, EscalationCause | None]:
    """What a reply's beginning says. `is_whole`: no more text will come."""
    bare = text.lstrip(_DRESS)
    if not bare:
        return (Verdict.PASS if is_whole else Verdict.UNDECIDED), None
    head = bare[: len(MARKER)].upper().replace(" ", "_")
    if head != MARKER[: len(head)]:
        return Verdict.PASS, None
    if len(head) < len(MARKER):
        return (Verdict.PASS if is_whole else Verdict.UNDECIDED), None
    rest = bare[len(MARKER) :].lstrip(_DRESS).lower()
    for kind in KINDS:
        if rest.startswith(kind):
            return Verdict.ESCALATE, EscalationCause(f"asked-{kind}")
        if not is_whole and kind.startswith(rest):
            return Verdict.UNDECIDED, None
    # The marker with another word after it, or nothing: it wants more, it can't say what.
    return Verdict.ESCALATE, EscalationCause.ASKED


class MarkerWatch:
    """Reads a reply's text as it streams, until it is clear whether it begins with the marker.

    `held` is what must not have been sent yet: once `feed` gives PASS the caller sends it (it is
    all the text so far) and needs this object no more. The verdict never changes once it is given.
    """

    def __init__(self) -> None:
        self.held = ""
        self.verdict = Verdict.UNDECIDED
        self.cause: EscalationCause | None = None

    def feed(self, delta: str) -> Verdict:
        """Take the next piece of the reply's content."""
        if self.verdict is Verdict.UNDECIDED:
            self.held += delta
            self.verdict, self.cause = _judge(self.held, is_whole=False)
        return self.verdict

    def finish(self) -> Verdict:
        """The stream ended: PASS what was held, or ESCALATE for a marker cut short of its word."""
        if self.verdict is Verdict.UNDECIDED:
            self.verdict, self.cause = _judge(self.held, is_whole=True)
        return self.verdict


def _called_names(tool_calls: Iterable[Any] | None) -> list[str]:
    names: list[str] = []
    for call in tool_calls or ():
        inner = call.get("function", call) if isinstance(call, Mapping) else call
        name = inner.get("name") if isinstance(inner, Mapping) else inner
        if isinstance(name, str):
            names.append(name)
    return names


def escalation_needed(
    first_text: str,
    *,
    tier: str,
    finish_reason: str | None,
    tool_calls: Iterable[Any] | None = None,
    known_tools: Collection[str] = (),
) -> Escalation | None:
    """Whether a first reply must be replayed one tier up, and why; None: it stands.

    `finish_reason` None means the reply is still coming: then an empty text is no evidence yet.
    `tool_calls` are OpenAI's, or names. Nothing escalates beyond the largest tier.
    """
    up = next_tier(tier)
    if up is None:
        return None
    called = _called_names(tool_calls)
    if unknown := next((name for name in called if name not in known_tools), None):
        return Escalation(up, EscalationCause.UNKNOWN_TOOL, unknown)
    verdict, cause = _judge(first_text, is_whole=finish_reason is not None)
    if verdict is Verdict.ESCALATE and cause is not None:
        return Escalation(up, cause)
    # 'length' with no text: the client allowed no token, so a larger tier would say as little.
    if finish_reason == "stop" and not called and not first_text.strip():
        return Escalation(up, EscalationCause.EMPTY)
    return None
