"""Hold a reply's first bytes back until it is clear that they are an answer.

A tier that is too small says so in the first words of its reply (see `keepwarm.router.escalation`).
For almost every reply one token decides it. Once a model's reasoning is seen the reply is let
through: holding that back would be a silent wait, and the marker is only asked for at the start.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from keepwarm.core.reply import read_reply
from keepwarm.router import Escalation, MarkerWatch, Verdict, escalation_needed


class FirstWords:
    """Watches one reply. Feed it all bytes so far; `decided` once nothing need be held."""

    def __init__(self, *, tier: str, tools: Collection[str], streamed: bool) -> None:
        self._tier = tier
        self._tools = tools
        self._streamed = streamed

    def judge(self, raw: bytes, *, complete: bool) -> tuple[bool, Escalation | None]:
        """Whether it is decided, and whether to replay one tier up.

        Args:
            raw: all bytes of the reply so far.
            complete: no more will come.
        """
        reply = read_reply(raw, streamed=self._streamed)
        text = reply.segment.text if reply.segment else ""
        finish = reply.finish_reason or ("stop" if complete and not reply.error else None)
        escalation = escalation_needed(
            text,
            tier=self._tier,
            finish_reason=finish,
            tool_calls=reply.calls,
            known_tools=self._tools,
        )
        if escalation or finish or reply.reasons or reply.calls or complete:
            return True, escalation
        return MarkerWatch().feed(text) is not Verdict.UNDECIDED, None


def tool_names(body: Mapping[str, Any]) -> frozenset[str]:
    """The names of the tools a request offers, in any API's shape."""
    names = set()
    for tool in body.get("tools") or []:
        if isinstance(tool, Mapping):
            function = tool.get("function")
            holder = function if isinstance(function, Mapping) else tool
            names.add(str(holder.get("name", "")))
    return frozenset(names)
