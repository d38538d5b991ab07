"""Where two prompts part, and what that looks like: a date, a reordered object, a rewritten turn.

Nothing here knows what was warm; `explain` does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, NamedTuple

from keepwarm.core.prompt import Segment, dump
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.texts import common_chars, common_tail_chars
from keepwarm.core.volatile import find_volatile
from keepwarm.explain.parts import Parts, Tool, chars_before

# What a person needs to recognise the place, and no more of the prompt than that.
_CONTEXT_CHARS = 40
_EXCERPT_CHARS = 120
# A volatile text is at most a long path; the window around the difference must hold all of it.
_WINDOW_CHARS = 120
# Objects around the difference that are tried as JSON, innermost first.
_MOST_NESTED = 4
_MOST_OBJECT_CHARS = 8000


class Cause(StrEnum):
    """Why tokens of a request were prefilled. The bounded label of metrics, logs and the page."""

    NONE = "none"
    NEW_TEXT = "new_text"
    FIRST_SEEN = "first_seen"
    NEW_NAMESPACE = "new_namespace"
    NEW_FINGERPRINT = "new_fingerprint"
    TIMESTAMP = "timestamp"
    IDENTIFIER = "identifier"
    ENVIRONMENT = "environment"
    KEY_ORDER = "key_order"
    TOOL_ADDED = "tool_added"
    TOOL_REMOVED = "tool_removed"
    TOOL_CHANGED = "tool_changed"
    TOOL_ORDER = "tool_order"
    ARGUMENT_CHANGED = "argument_changed"
    TEXT_CHANGED = "text_changed"
    HISTORY_CHANGED = "history_changed"
    HISTORY_CUT = "history_cut"
    REASONING_DROPPED = "reasoning_dropped"
    TEMPLATE_REWRITES = "template_rewrites"
    EVICTED = "evicted"
    ENGINE_RESTARTED = "engine_restarted"
    SNAPSHOT_FAILED = "snapshot_failed"
    ENDS_ONLY = "ends_only"
    FAILED = "failed"


_VOLATILE = {
    "date": Cause.TIMESTAMP,
    "time": Cause.TIMESTAMP,
    "id": Cause.IDENTIFIER,
    "pid": Cause.ENVIRONMENT,
    "path": Cause.ENVIRONMENT,
    "host": Cause.ENVIRONMENT,
    "ip": Cause.ENVIRONMENT,
}


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a prompt parts from an earlier one.

    `index` counts tools or messages from 0; `name` is the tool's, the argument's, or the message's
    role. `at_chars` is the offset inside that tool or message, of `part_chars` characters in all.
    `prompt_chars` is how many characters of messages come before it, as a prompt's marks count
    them behind the head; 0 in the head.
    `context` is the common text right before, `before` and `after` begin where the texts part (or
    where the date or id begins that differs); they are None where text isn't kept, and then
    the hashes tell whether the same change came again.
    """

    cause: Cause
    where: Literal["tool", "argument", "message", "tokens"]
    index: int
    name: str
    at_chars: int
    part_chars: int
    prompt_chars: int
    kind: str = ""
    context: str | None = None
    before: str | None = None
    after: str | None = None
    before_hash: str = ""
    after_hash: str = ""

    def hashed(self, key: bytes) -> Difference:
        """The same with hashes added, keyed so that they say nothing outside of this store."""
        return _replaced(
            self,
            before_hash=_hash(self.before, key),
            after_hash=_hash(self.after, key),
        )

    def without_text(self) -> Difference:
        """The same without any text of the prompts."""
        return _replaced(self, context=None, before=None, after=None)


def _replaced(difference: Difference, **changes: Any) -> Difference:
    values = {name: getattr(difference, name) for name in Difference.__slots__}
    return Difference(**(values | changes))


def _hash(text: str | None, key: bytes) -> str:
    raw = (text or "").encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw, key=key[:64], digest_size=6).hexdigest()


def first_difference(before: Parts, after: Parts) -> Difference | None:
    """Where `after` parts from the earlier `before`; None if one continues the other."""
    return (
        _tool_difference(before, after)
        or _argument_difference(before, after)
        or (_message_difference(before, after))
    )


def _tool_difference(before: Parts, after: Parts) -> Difference | None:
    old, new = before.tools, after.tools
    if old == new:
        return None
    pairs = zip(old, new, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(new)))
    a = old[index] if index < len(old) else None
    b = new[index] if index < len(new) else None
    if a and b and a.name == b.name:
        return _texts_part(
            a.text,
            b.text,
            where="tool",
            index=index,
            name=b.name,
            prompt_chars=0,
            otherwise=Cause.TOOL_CHANGED,
        )
    old_names, new_names = {t.name for t in old}, {t.name for t in new}
    shown: Tool | None
    if b and b.name not in old_names:
        cause, shown = Cause.TOOL_ADDED, b
    elif a and a.name not in new_names:
        cause, shown = Cause.TOOL_REMOVED, a
    else:
        cause, shown = Cause.TOOL_ORDER, b or a
    assert shown
    return Difference(
        cause,
        "tool",
        index,
        shown.name,
        0,
        len(shown.text),
        0,
        before=_cut(a.text) if a else "",
        after=_cut(b.text) if b else "",
    )


def _argument_difference(before: Parts, after: Parts) -> Difference | None:
    if before.arguments == after.arguments:
        return None
    old, new = dict(before.arguments), dict(after.arguments)
    name = next((k for k in [*new, *old] if old.get(k) != new.get(k)), None)
    if name is None:
        return None
    a, b = old.get(name, ""), new.get(name, "")
    return _texts_part(
        a,
        b,
        where="argument",
        index=0,
        name=name,
        prompt_chars=0,
        otherwise=Cause.ARGUMENT_CHANGED,
    )


def _message_difference(before: Parts, after: Parts) -> Difference | None:
    old, new = before.segments, after.segments
    pairs = enumerate(zip(old, new, strict=False))
    index = next((i for i, (a, b) in pairs if a != b), None)
    if index is None:
        return None
    start = chars_before(new, index)
    a, b = old[index], new[index]
    return _texts_part(
        a.text + a.extra,
        b.text + b.extra,
        where="tokens" if b.role == "tokens" else "message",
        index=index,
        name=b.role,
        prompt_chars=start,
        otherwise=_turn_cause(old, new, index),
    )


def _turn_cause(old: Sequence[Segment], new: Sequence[Segment], index: int) -> Cause:
    """What it means that this message is another one, if its text doesn't say."""
    a, b = old[index], new[index]
    if b.role == "assistant" and _without_reasoning(a.text) == b.text != a.text:
        return Cause.REASONING_DROPPED
    leading = all(s.role in SYSTEM_ROLES for s in new[: index + 1])
    if leading:
        return Cause.TEXT_CHANGED
    if b in old[index + 1 :]:
        return Cause.HISTORY_CUT
    if index == len(new) - 1 and a.role == b.role:
        return Cause.NEW_TEXT
    later = set(new[index + 1 :]) & set(old[index + 1 :])
    if later or _mostly_alike(a.text + a.extra, b.text + b.extra):
        return Cause.HISTORY_CHANGED
    return Cause.NEW_TEXT


def _without_reasoning(text: str) -> str:
    """A reply's text behind its reasoning, as templates and clients cut it out."""
    head, found, rest = text.partition("</think>")
    return rest.strip() if found else head.strip()


def _mostly_alike(a: str, b: str) -> bool:
    shorter = min(len(a), len(b))
    if not shorter:
        return False
    front = common_chars(a, b)
    return front + common_tail_chars(a[front:], b[front:]) >= shorter / 2


def _texts_part(
    a: str,
    b: str,
    *,
    where: Literal["tool", "argument", "message", "tokens"],
    index: int,
    name: str,
    prompt_chars: int,
    otherwise: Cause,
) -> Difference:
    """The difference of two texts of one part, with the cause that the place itself shows."""
    at = common_chars(a, b)
    tail = common_tail_chars(a[at:], b[at:])
    cause, kind, start = otherwise, "", at
    before, after = a[at : len(a) - tail], b[at : len(b) - tail]
    # New text is new text, whatever it begins with, unless it is an old one with something changed.
    is_new = otherwise is Cause.NEW_TEXT and 2 * (at + tail) < min(len(a), len(b))
    if not is_new and otherwise is not Cause.REASONING_DROPPED and where != "tokens":
        old, new = _volatile_at(a, at), _volatile_at(b, at)
        if old and new and _VOLATILE[old.kind] is _VOLATILE[new.kind]:
            cause, kind, start = _VOLATILE[new.kind], new.kind, min(old.start, new.start)
            before, after = a[start : old.end], b[start : new.end]
        elif _same_object(a, b, at):
            cause = Cause.KEY_ORDER
    return Difference(
        cause,
        where,
        index,
        name,
        at,
        len(b),
        prompt_chars + at,
        kind=kind,
        context=b[max(start - _CONTEXT_CHARS, 0) : start],
        before=_cut(before),
        after=_cut(after),
    )


def _cut(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARS else text[: _EXCERPT_CHARS - 1] + "…"


class _Span(NamedTuple):
    kind: str
    start: int
    end: int


def _volatile_at(text: str, at: int) -> _Span | None:
    """What changes by its nature at this place."""
    start = max(at - _WINDOW_CHARS, 0)
    if start:
        # From the next blank on, so that no pattern begins in the middle of a word.
        blank = text.find(" ", start, at)
        start = blank if blank >= 0 else start
    window = text[start : at + _WINDOW_CHARS]
    lines = window.split("\n")
    for found in find_volatile(window):
        line_start = start + sum(len(line) + 1 for line in lines[: found.line - 1])
        begin = line_start + found.column - 1
        end = begin + len(found.excerpt)
        if begin <= at <= end:
            return _Span(found.kind, begin, end)
    return None


def _same_object(a: str, b: str, at: int) -> bool:
    """Whether the place lies in a JSON object that both have, with its keys in another order."""
    decoder = json.JSONDecoder()
    depth = 0
    tried = 0
    for place in range(min(at, len(a) - 1, len(b) - 1), max(at - _MOST_OBJECT_CHARS, -1), -1):
        char = a[place]
        if char == "}":
            depth += place < at
        elif char == "{" and depth:
            depth -= 1
        elif char == "{" and b[place] == "{":
            try:
                old, _ = decoder.raw_decode(a, place)
                new, _ = decoder.raw_decode(b, place)
            except (ValueError, RecursionError):
                old, new = None, {}
            if old == new:
                return True
            tried += 1
        if tried == _MOST_NESTED:
            return False
    return False


def sent_difference(before: Parts, after: Parts) -> Difference | None:
    """Where messages that are canonically the same were sent in another form.

    Their identity is equal, but the engine renders them as they are: other key order in a call's
    arguments, reasoning left out, white space.
    """
    for index, (a, b) in enumerate(zip(before.sent, after.sent, strict=False)):
        if a is None or b is None or a is b:
            continue
        if a == b and not a.get("tool_calls") and isinstance(a.get("content"), str):
            continue  # nothing in it has an order of keys that a template could show
        old, new = dump(a), dump(b)
        if old == new:
            continue
        otherwise = Cause.HISTORY_CHANGED
        if any(a.get(key) and not b.get(key) for key in ("reasoning_content", "reasoning")):
            otherwise = Cause.REASONING_DROPPED
        elif a == b or _arguments(a) == _arguments(b) != []:
            otherwise = Cause.KEY_ORDER
        at = common_chars(old, new)
        return Difference(
            otherwise,
            "message",
            index,
            after.segments[index].role,
            at,
            len(new),
            chars_before(after.segments, index),
            context=new[max(at - _CONTEXT_CHARS, 0) : at],
            before=_cut(old[at:]),
            after=_cut(new[at:]),
        )
    return None


def _arguments(message: Mapping[str, Any]) -> list[Any]:
    out: list[Any] = []
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, Mapping) else None
        raw = function.get("arguments") if isinstance(function, Mapping) else None
        try:
            out.append(json.loads(raw) if isinstance(raw, str) else raw)
        except ValueError:
            out.append(raw)
    return out
