"""A prompt taken apart, to be compared with others: tools, arguments, messages.

In the canonical form that a prompt's identity is made of (see `prompt`), so what can't reach the
engine isn't taken for a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keepwarm.core.prompt import Segment, dump, head_of, is_raw, raw_of, segments_of
from keepwarm.core.texts import common_chars, common_tail_chars


class Tool(NamedTuple):
    """A tool and its JSON as it was sent, key order included."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Parts:
    """A prompt taken apart for comparison.

    `arguments` are what else shapes the rendering, as (name, JSON). `sent` has, for each segment,
    the message as it was sent, or None where it was no message of its own.
    """

    tools: tuple[Tool, ...]
    arguments: tuple[tuple[str, str], ...]
    segments: tuple[Segment, ...]
    sent: tuple[Mapping[str, Any] | None, ...]

    @property
    def chars(self) -> int:
        """Characters of all of it: what keeping it costs."""
        head = sum(len(tool.text) for tool in self.tools)
        head += sum(len(text) for _, text in self.arguments)
        return head + sum(len(s.text) + len(s.extra) for s in self.segments)

    def continued(self, reply: Segment | None) -> Parts:
        """The prompt with the model's reply behind it."""
        if reply is None:
            return self
        return Parts(self.tools, self.arguments, (*self.segments, reply), (*self.sent, None))


def parts_of(body: Mapping[str, Any]) -> Parts:
    """Take a request apart: in chat's terms, or of a raw prompt."""
    if is_raw(body):
        return Parts((), (), (_raw_segment(raw_of(body)),), (None,))
    head = head_of(body)
    tools = head.pop("tools", None)
    listed = tools if isinstance(tools, list) else []
    segments = tuple(segments_of(body))
    items = body["messages"]
    sent = [m for m in items if isinstance(m, Mapping)] if isinstance(items, list) else []
    return Parts(
        tuple(Tool(_tool_name(tool), dump(tool)) for tool in listed),
        tuple((key, dump(value)) for key, value in head.items()),
        segments,
        tuple(sent),
    )


def _raw_segment(prompt: object) -> Segment:
    if isinstance(prompt, str):
        return Segment("prompt", prompt)
    if isinstance(prompt, list) and all(isinstance(t, int) for t in prompt):
        return Segment("tokens", " ".join(map(str, prompt)))
    return Segment("prompt", dump(prompt))


def _tool_name(tool: object) -> str:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return str(inner.get("name", ""))[:80] if isinstance(inner, Mapping) else ""


def chars_before(segments: Sequence[Segment], index: int) -> int:
    """Characters of the messages before one, as a prompt's marks count them behind the head."""
    return sum(s.chars for s in segments[:index])


def likeness_chars(before: Parts, after: Parts) -> int:
    """How many characters two prompts have in common, wherever: to find the nearest of several."""
    is_same = before.tools == after.tools  # as nearly always: then none is looked for by itself
    chars = sum(len(tool.text) for tool in after.tools if is_same or tool in before.tools)
    old, new = before.segments, after.segments
    pairs = enumerate(zip(old, new, strict=False))
    index = next(
        (i for i, (a, b) in pairs if a is not b and a != b),
        min(len(old), len(new)),
    )
    chars += sum(len(s.text) for s in new[:index])
    if index < min(len(old), len(new)):
        a, b = old[index].text, new[index].text
        front = common_chars(a, b)
        chars += front + common_tail_chars(a[front:], b[front:])
    later = set(old[index + 1 :])
    return chars + sum(len(s.text) for s in new[index + 1 :] if s in later)
