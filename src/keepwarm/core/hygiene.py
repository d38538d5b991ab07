"""Prompt hygiene: named rules that take what changes out of the front of a prompt, by consent.

Theory of operation. Each rule is off unless a deployment names it (but for the billing line, which
says nothing to a model and makes all that stands behind it cold), works on a request's decoded
body before anything else reads it, and says how often it changed something, so nothing is rewritten
in silence. A body that no rule applies to is returned as it came: the same object.

- `drop-billing`: a line of accounting that a client puts before its system prompt, new with each
  session or request and meant for its vendor (`_BILLING`), is left out always; with the rule, so
  are lines that the deployment names.
- `move-volatile`: a line of the system prompt that only tells a date, a time or an id goes behind
  a message of the user. What holds for a day or a conversation goes behind the *first* one, where
  it stands still while the conversation grows. What may be new with each request goes behind the
  *last* one; the next request has that message without it, so what comes behind is prefilled again
  then, and nothing before it. So goes a JSON object of metadata that ends a system prompt.
- `move-known`: the blocks of coding agents' prompts that tell the directory, the repository's
  status and the day go before the question in the first message of the user (`moved_blocks`).
- `sort-tools`: tools are listed by name and their keys stand in one order. The JSON values are the
  same, and no API gives a meaning to either order.

Rules look at the leading system messages only: what a client adds later is history, which it sends
again as it was.

Invariants: cleaning twice is cleaning once; tools keep their JSON values; texts in which no rule
finds anything keep every character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from keepwarm.core.moved_blocks import is_agent, metadata_start, take_blocks
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.core.volatile import find_volatile

RULES = ("sort-tools", "move-volatile", "drop-billing", "move-known")
MOST_EXPRESSIONS = 16
MOST_EXPRESSION_CHARS = 200

Kind = Literal["chat", "responses", "messages"]

# Where a kind of body has its system text besides messages, and where it has its messages.
_FIELD: Mapping[Kind, str] = {"chat": "", "responses": "instructions", "messages": "system"}
_LIST: Mapping[Kind, str] = {"chat": "messages", "responses": "input", "messages": "messages"}

# What clients are known to send. Each is anchored at a line's start and takes `name=value;` pairs
# only: a client's blocks are joined without a line break, so real text may follow on the line.
#
# Claude Code (2.1.177 here): `x-anthropic-billing-header: cc_version=2.1.177.01c;
# cc_entrypoint=cli; cch=36ee5;`, of which `cch` is new with each request. Seen in
# github.com/anthropics/claude-code/issues/68900 and github.com/ggml-org/llama.cpp/pull/21793.
_PAIR = r"[ \t]*[\w-]{1,40}=[^;\s]{0,200}(?:;|(?=[ \t\r]*$))"
_BILLED = "x-anthropic-billing-header:"
_BILLING = re.compile(rf"(?m)^(?:{_BILLED}(?:{_PAIR})+[ \t\r]*)+\n?")
# A longer line isn't tried against a deployment's expressions, whose cost nobody bounds.
_MOST_DROPPED_CHARS = 1000

# A volatile line has little besides what changes: a label and a few words. A longer one says
# something, which must stay where it stands.
_MOST_LINE_CHARS = 160
_MOST_WORDS_CHARS = 60
# More such lines are a table or a log, which stays together.
_MOST_MOVED = 8
_MOVED_KINDS = frozenset(("date", "time", "id"))
# A prompt with more lines that may be volatile is a document; trying them would hold everybody up.
_MOST_TRIED = 1000
# Whatever `find_volatile` finds of these kinds has one of the first and one of the second. The
# first is quick and tried on each line of each request; the second is one search instead of two
# dozen, and few other lines have it.
_GLANCE = re.compile(r"\d|day|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b")
_HINT = re.compile(
    r"\d[-/.:]\d|\d{4}|\d\s?[apAP]\.?[mM]|[0-9a-fA-F]{7}|[_-][0-9A-Za-z]{8}|day"
    r"|\b(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\b"
    r"|\b(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
)
_OF_A_CONVERSATION = re.compile(r"(?i)\b(?:session|conversation|chat|thread|started)\b")
_TIME_OF_DAY = re.compile(r"\d:\d|\d\s?(?i:[ap]\.?m\b)")

# As people write tools, and as templates and models know them; other keys follow by name.
_KEYS = {
    key: rank
    for rank, key in enumerate(
        ("type", "function", "name", "description", "parameters", "input_schema", "properties")
    )
}
# A schema nested deeper is left as it is.
_MOST_NESTED = 64


class Cleaned(NamedTuple):
    """A body, and how many lines or tools each rule changed, of the rules that changed any."""

    body: dict[str, Any]
    rewrites: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Hygiene:
    """The rules of a deployment."""

    rules: frozenset[str]
    drop_lines: tuple[re.Pattern[str], ...] = ()

    def clean(self, kind: Kind, body: dict[str, Any], *, keeps_text: bool = False) -> Cleaned:
        """Apply the rules to a request.

        Args:
            kind: whose body it is.
            body: is not changed; what comes back shares what is equal with it. Wrong types are left
                as they are: the engine tells the client what is wrong.
            keeps_text: only tools may be changed, since somebody counts the texts' characters.
        """
        rewrites: dict[str, int] = {}
        if not keeps_text:
            named = self.drop_lines if "drop-billing" in self.rules else ()
            body, rewrites["drop-billing"] = _drop(kind, body, named)
        if "move-known" in self.rules and not keeps_text:
            body, rewrites["move-known"] = _move_known(kind, body)
        if "move-volatile" in self.rules and not keeps_text:
            body, rewrites["move-volatile"] = _move(kind, body)
        if "sort-tools" in self.rules:
            body, rewrites["sort-tools"] = _sort_tools(body)
        return Cleaned(body, {rule: rewrites[rule] for rule in RULES if rewrites.get(rule)})


def hygiene_of(rules: Sequence[str], drop_lines: Sequence[str]) -> Hygiene:
    """The rules by name. Raises: ValueError as the two checks below."""
    check_rules(rules)
    return Hygiene(frozenset(rules), compile_lines(drop_lines))


def check_rules(rules: Sequence[str]) -> None:
    """Raises: ValueError: a name that is no rule's."""
    for rule in rules:
        if rule not in RULES:
            raise ValueError(f"there is no rule {rule[:40]!r}; the rules are {', '.join(RULES)}")


def compile_lines(expressions: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """Expressions that match whole lines.

    Raises:
        ValueError: one isn't a regular expression, is too long, or matches an empty line, which
            would take the paragraphs out of every prompt.
    """
    if len(expressions) > MOST_EXPRESSIONS:
        raise ValueError(f"{len(expressions)} expressions are given; {MOST_EXPRESSIONS} at most")
    out = []
    for expression in expressions:
        shown = f"the expression {expression[:40]!r}"
        if len(expression) > MOST_EXPRESSION_CHARS:
            raise ValueError(
                f"{shown} has {len(expression)} characters; {MOST_EXPRESSION_CHARS} at most"
            )
        try:
            pattern = re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{shown} isn't a regular expression: {error}") from error
        if pattern.fullmatch(""):
            raise ValueError(f"{shown} matches an empty line")
        out.append(pattern)
    return tuple(out)


def told(rewrites: Mapping[str, int]) -> str:
    """Rewrites in a header's words: `sort-tools=3, drop-billing=1`."""
    return ", ".join(f"{rule}={count}" for rule, count in rewrites.items())


def _drop(
    kind: Kind, body: dict[str, Any], expressions: Sequence[re.Pattern[str]]
) -> tuple[dict[str, Any], int]:
    dropped = 0

    def is_dropped(line: str) -> bool:
        bare = line.strip()
        return len(bare) <= _MOST_DROPPED_CHARS and any(e.fullmatch(bare) for e in expressions)

    def change(text: str) -> str:
        nonlocal dropped
        if _BILLED in text:
            text, count = _BILLING.subn("", text)
            dropped += count
        if not expressions:
            return text
        lines = text.split("\n")
        kept = [line for line in lines if not is_dropped(line)]
        dropped += len(lines) - len(kept)
        return "\n".join(kept)

    return _over_system(kind, body, change), dropped


def _move(kind: Kind, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    place = _LIST[kind]
    items = body.get(place)
    is_text = kind == "responses" and isinstance(items, str)
    messages = [{"role": "user", "content": items}] if is_text else items
    if not isinstance(messages, list):
        return body, 0
    questions = [i for i, message in enumerate(messages) if _is_question(message)]
    moved: list[tuple[str, str]] = []
    is_left = False

    def change(text: str) -> str:
        nonlocal is_left
        blocks: list[str] = []
        while start := metadata_start(text):
            blocks.insert(0, text[start:].rstrip())
            text = text[:start].rstrip("\n")
        lines = text.split("\n")
        taken = _volatile_lines(lines)
        kept = [line for i, line in enumerate(lines) if i not in taken]
        moved.extend((line, _tells(line)) for line in taken.values())
        moved.extend((block, "now") for block in blocks)
        is_left = is_left or any(line.strip() for line in kept)
        return "\n".join(kept)

    # Without anybody to ask there is no place behind; a system prompt of a date alone stays one.
    out = _over_system(kind, body, change) if questions else body
    if not moved or not is_left or len(moved) > _MOST_MOVED:
        return body, 0
    messages = list(messages if is_text else out[place])
    for index, what in ((questions[0], "day"), (questions[-1], "now")):
        if lines := [line for line, told in moved if told == what]:
            messages[index] = _with_lines(messages[index], lines, kind)
    return {**out, place: messages[0]["content"] if is_text else messages}, len(moved)


def _move_known(kind: Kind, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """An agent's changing blocks in front of the first question; how many there were.

    A system message directly behind that question goes to the beginning of the user's message:
    what it says is the same in each session, and stood behind what never is.
    """
    tools = body.get("tools")
    items = body.get(_LIST[kind])
    if not isinstance(tools, list) or not isinstance(items, list):
        return body, 0
    first = next((i for i, message in enumerate(items) if _is_question(message)), None)
    if first is None or not is_agent({_tool_name(t) for t in tools if isinstance(t, Mapping)}):
        return body, 0
    texts: list[str] = []

    def gather(text: str) -> str:
        texts.append(text)
        return text

    _over_system(kind, body, gather)
    behind = _system_texts(items[first + 1 : first + 2])
    taken = take_blocks([*texts, *behind])
    if not taken.blocks and not behind:
        return body, 0
    rest = iter(taken.texts)
    out = _over_system(kind, body, lambda _: next(rest))
    messages = list(out[_LIST[kind]])
    messages[first] = _before_question(messages[first], list(rest), taken.blocks)
    if behind:
        del messages[first + 1]
    return {**out, _LIST[kind]: messages}, len(taken.blocks) + bool(behind)


def _system_texts(messages: Sequence[object]) -> list[str]:
    """The texts of a system message; none if it isn't one, or has something else in it."""
    if not messages or not _is_system(messages[0]):
        return []
    content = messages[0].get("content") if isinstance(messages[0], Mapping) else None
    parts = [{"text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        return []
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    return [text for text in texts if isinstance(text, str)] if all(texts) else []


def _before_question(
    message: Mapping[str, Any], opening: Sequence[str], blocks: Sequence[str]
) -> dict[str, Any]:
    """A user's message with texts at its beginning, and in front of its last text, the question.

    What a client puts between them (its reminders) is the same in the next session, or changes as
    rarely as the blocks do.
    """
    content = message["content"]
    before = "".join(f"{text.strip()}\n\n" for text in blocks)
    begin = "".join(f"{text.strip()}\n\n" for text in opening if text.strip())
    if isinstance(content, str):
        return {**message, "content": f"{begin}{before}{content}"}
    parts = list(content)
    places = [
        index
        for index, part in enumerate(parts)
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    ]
    if not places:
        return {**message, "content": [{"type": "text", "text": (begin + before).rstrip()}, *parts]}
    for index, added in ((places[-1], before), (places[0], begin)):
        parts[index] = {**parts[index], "text": f"{added}{parts[index]['text']}"}
    return {**message, "content": parts}


def _volatile_lines(lines: Sequence[str]) -> dict[int, str]:
    """Lines that only tell a date, a time or an id, without the blanks around, by their index."""
    tried: list[tuple[int, str]] = []
    is_fenced = False
    for index, line in enumerate(lines):
        bare = line.strip()
        if bare.startswith("```"):
            is_fenced = not is_fenced
        # Part of a listing, a JSON value, a table or a log: it means something where it stands.
        elif is_fenced or bare.startswith(('"', "{", "[", "|")):
            continue
        elif len(bare) <= _MOST_LINE_CHARS and _GLANCE.search(bare):
            tried.append((index, bare))
    if len(tried) > _MOST_TRIED:
        return {}
    return {index: bare for index, bare in tried if _tells(bare) != "else"}


@lru_cache(maxsize=4096)
def _tells(line: str) -> Literal["else", "day", "now"]:
    """What a line tells: something else; what holds for a day or a conversation; what is now.

    Remembered, since a prompt's lines come again with each request.
    """
    if not _HINT.search(line):
        return "else"
    found = find_volatile(line)
    words = len(line) - sum(len(one.excerpt) for one in found)
    if words > _MOST_WORDS_CHARS or not any(one.kind in _MOVED_KINDS for one in found):
        return "else"
    is_date = {one.kind for one in found} == {"date"} and not _TIME_OF_DAY.search(line)
    return "day" if is_date or _OF_A_CONVERSATION.search(line) else "now"


def _is_question(message: object) -> bool:
    """Whether a user speaks, rather than a tool (whose results Anthropic's API has as a user's)."""
    if not isinstance(message, Mapping) or message.get("role") != "user":
        return False
    content = message.get("content")
    if isinstance(content, list):
        return any(isinstance(p, Mapping) and p.get("type") != "tool_result" for p in content)
    return isinstance(content, str) and bool(content)


def _with_lines(message: Mapping[str, Any], lines: Sequence[str], kind: Kind) -> dict[str, Any]:
    """A user's message with lines behind its text."""
    content, added = message["content"], "\n".join(lines)
    if isinstance(content, str):
        return {**message, "content": f"{content}\n\n{added}"}
    last = content[-1]
    if isinstance(last, Mapping) and isinstance(last.get("text"), str):
        # In the same part, so that a message of one text remains one.
        parts = [*content[:-1], {**last, "text": f"{last['text']}\n\n{added}"}]
    else:
        text_type = "input_text" if kind == "responses" else "text"
        parts = [*content, {"type": text_type, "text": added}]
    return {**message, "content": parts}


def _over_system(kind: Kind, body: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The body with each text of its system prompt changed; the same object if none is."""
    out = body
    field, place = _FIELD[kind], _LIST[kind]
    if field in body and (new := _over_content(body[field], change)) is not body[field]:
        out = {**out, field: new}
    items = body.get(place)
    if isinstance(items, list):
        count = 0
        while count < len(items) and _is_system(items[count]):
            count += 1
        leading = [_over_message(item, change) for item in items[:count]]
        if any(new is not old for new, old in zip(leading, items, strict=False)):
            out = {**out, place: [*leading, *items[count:]]}
    return out


def _is_system(message: object) -> bool:
    return isinstance(message, Mapping) and message.get("role") in SYSTEM_ROLES


def _over_message(message: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    content = message.get("content")
    new = _over_content(content, change)
    return message if new is content else {**message, "content": new}


def _over_content(content: object, change: Callable[[str], str]) -> object:
    """A text, or parts of which those that become empty are left out."""
    if isinstance(content, str):
        changed = change(content)
        return content if changed == content else changed
    if not isinstance(content, list):
        return content
    parts: list[object] = []
    is_same = True
    for part in content:
        text = part.get("text") if isinstance(part, dict) else None
        new = change(text) if isinstance(text, str) else None
        if new is None or new == text:
            parts.append(part)
            continue
        is_same = False
        if new:
            parts.append({**part, "text": new})
    return content if is_same else parts or ""


def _sort_tools(body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    out, changed = body, 0
    for key in ("tools", "functions"):
        tools = body.get(key)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            continue
        ordered = sorted((_ordered(tool) for tool in tools), key=_tool_name)
        count = sum(new is not old for new, old in zip(ordered, tools, strict=True))
        if count:
            out, changed = {**out, key: ordered}, changed + count
    return out, changed


def _tool_name(tool: Mapping[str, Any]) -> str:
    """What a tool is called; of those without a name, what they are."""
    inner = tool.get("function")
    named = inner if isinstance(inner, Mapping) else tool
    return str(named.get("name") or tool.get("type") or "")


def _ordered(value: Any, first: Sequence[object] | None = None, depth: int = 0) -> Any:
    """The same JSON value with keys in one order; the same object if they are.

    `first` is given for a schema's `properties`: the required ones in the order of that list, which
    is how their author thinks of them and in which a model will write them.
    """
    if depth > _MOST_NESTED:
        return value
    if isinstance(value, list):
        items = [_ordered(item, depth=depth + 1) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    if not isinstance(value, dict):
        return value
    if first is None:
        names = sorted(value, key=lambda name: (_KEYS.get(name, len(_KEYS)), name))
    else:
        ranks = {name: rank for rank, name in enumerate(first) if isinstance(name, str)}
        names = sorted(value, key=lambda name: (ranks.get(name, len(ranks)), name))
    required = value.get("required")
    out = {}
    for name in names:
        is_schema = first is None and name == "properties" and isinstance(value[name], dict)
        listed = (required if isinstance(required, list) else []) if is_schema else None
        out[name] = _ordered(value[name], listed, depth + 1)
    is_same = names == list(value) and all(out[name] is value[name] for name in names)
    return value if is_same else out
