"""Prefix identity: from a request's body to a chain of marks, without rendering or tokenizing.

Theory of operation. A prompt is read as a *head* (everything a template may render before the first
message or that changes how messages render: tools, template arguments, adapters) and a list of
*segments*, one a message. A `Mark` names one position in it by a digest of all that stands before,
so two requests that share a mark share everything up to it. There is a mark after the head, after
every `BLOCK_CHARS` characters inside a message (so that prefixes that part in the middle of a long
message are found) and after each message. Behind the leading system messages is the *static end*,
what a client sends with every task: a mark of its own, since a user's turn must follow.

Digests are keyed by fingerprint and namespace, and blake2b is used since one tenant must not be
able to construct another's digest. What doesn't reach the rendered prompt (sampling parameters,
`stream`, an absent against an empty `content`) is left out of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import msgspec

from keepwarm.core.roles import ANSWER_ROLES, SYSTEM_ROLES
from keepwarm.core.tree import Tokens, as_tokens

# 256 characters are about 64 tokens: the finest prefill worth distinguishing (a third of a second
# on a slow CPU), and about one digest a microsecond of hashing.
BLOCK_CHARS = 256
# The same for prompts given as token ids.
BLOCK_TOKENS = 64
# A message costs a few characters (role and turn tokens) beyond its text.
_TURN_CHARS = 16
# A request brings all that was said before it once more, so marks are remembered: of so many
# messages, and of none that is so long that together they would fill the memory.
_REMEMBERED_SEGMENTS, _REMEMBERED_CHARS = 512, 1 << 15

# What of a body, besides its messages, may change how they render: the one list of it. What this
# engine's template doesn't look at is found by rendering (`engine.rendering`) and taken out of a
# body before it is compared.
SHAPING = (
    "tools",
    "functions",
    "chat_template_kwargs",
    "chat_template",
    "response_format",
    "json_schema",
    "reasoning_effort",
    "lora",
    "thinking",
    "thinking_budget_tokens",
    "parallel_tool_calls",
    "tool_choice",
)
# Where nothing is said, a model may call a tool or not.
_NO_CHOICE = "auto"
# A picture or a sound is a few hundred tokens or some thousands, whatever its bytes.
_MEDIA_CHARS = 4096
# Longer values in a part that isn't text are its bytes: a digest stands for them.
_MOST_PART_CHARS = 512


@dataclass(frozen=True, slots=True)
class Mark:
    """One position in a prompt. `chars` counts canonical characters from its start."""

    digest: bytes
    chars: int
    tokens: int | None = None  # exact position, known only for prompts given as token ids


@dataclass(frozen=True, slots=True)
class Segment:
    """One message in canonical form; `extra` is what a template may render besides the text.

    `media` counts its pictures and sounds, of which `extra` has the digests; `text` is what stands
    before the first of them, and `extra` also has what follows it.
    """

    role: str
    text: str
    extra: str = ""
    media: int = 0

    @property
    def chars(self) -> int:
        """What it weighs, in characters: a message costs its role and its media their tokens."""
        text = len(self.text) + len(self.extra)
        return text + _TURN_CHARS + self.media * _MEDIA_CHARS


class SharedEnd(NamedTuple):
    """A place up to which a prompt is declared to equal others': inside or before a segment.

    All segments before `segment` (an index) and the first `chars` characters of its text.
    """

    segment: int
    chars: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request's identity.

    `is_raw`: it isn't rendered of messages. `marks` are in order of position; `static_index` is
    the index of the static end's mark, or -1 if there is nothing static; `turns` counts how often
    the model is asked in it: by a user, or by a tool's result; `is_static_shared`: the static part
    is a tier's and nothing else. `asked_index` is the mark before its last user message,
    `answered_index` the one behind the last message of the model's (-1: there is none); `ids` are
    the tokens of a prompt given as such. `text_index` is the last mark before its first picture or
    sound (-1: there are none).
    """

    is_raw: bool
    marks: tuple[Mark, ...]
    static_index: int
    turns: int
    is_static_shared: bool = False
    text_index: int = -1
    asked_index: int = -1
    answered_index: int = -1
    ids: Tokens | None = None

    @property
    def has_media(self) -> bool:
        """Whether there are pictures or sounds in it."""
        return self.text_index >= 0

    @property
    def asked(self) -> Mark | None:
        """The mark before the last user message: engines keep a checkpoint there."""
        return self.marks[self.asked_index] if self.asked_index >= 0 else None

    @property
    def chars(self) -> int:
        """Canonical characters of the whole prompt."""
        return self.marks[-1].chars

    @property
    def static(self) -> Mark | None:
        """The mark behind the leading system messages and the tools."""
        return self.marks[self.static_index] if self.static_index >= 0 else None

    def continued(self, reply: Segment) -> Mark:
        """The mark that a next request has behind this prompt's reply."""
        return _segment_marks(self.marks[-1], reply)[-1]


def prompt_of(
    body: Mapping[str, Any],
    *,
    fingerprint: str,
    namespace: str,
    shared_segments: int = 0,
    ends: Sequence[SharedEnd] = (),
) -> Prompt:
    """Read the identity of a request.

    Args:
        body: a request in chat's terms (`keepwarm.api.reading`), or one of a raw prompt: text or
            token ids. Wrong types are taken as they are: the engine, not Keepwarm, tells the
            client what is wrong with its request.
        fingerprint, namespace: what the digests are keyed by.
        shared_segments: so many messages (and the head) are a tier's, the same for all
            namespaces; only what follows is the tenant's own.
        ends: places inside messages that get a mark of their own, since others share the prompt
            up to there.
    """
    own = _digest(b"keepwarm/1", fingerprint.encode(), namespace.encode())
    key = _digest(b"keepwarm/1", fingerprint.encode(), b"") if shared_segments else own
    if is_raw(body):
        return _raw_prompt(raw_of(body), key, [e.chars for e in ends])
    head = head_of(body)
    # Key order is kept: templates print tools in the order given, so another order is another
    # prompt.
    text = dump(head) if head else ""
    marks = [Mark(_digest(key, _bytes(text)), len(text))]
    segments = segments_of(body)
    statics = _leading(segments, shared_segments)
    has_static = bool(statics or head.get("tools")) and _asks_at(segments, statics)
    # Tokens alone don't tell pictures, and a static part is known by its tokens.
    has_static = has_static and not any(s.media for s in segments[:statics])
    static_index = text_index = asked_index = answered_index = -1
    asked = max((i for i, s in enumerate(segments) if s.role == "user"), default=-1)
    for count in range(len(segments) + 1):
        if has_static and count == statics:
            static_index = len(marks)
            marks.append(Mark(_digest(marks[-1].digest, b"and then a user"), marks[-1].chars))
        if count == len(segments):
            break
        if count == asked:
            asked_index = len(marks) - 1
        before = marks[-1]
        if shared_segments and count == shared_segments:
            before = Mark(_digest(before.digest, own), before.chars)
        cuts = [e.chars for e in ends if e.segment == count]
        marks += _segment_marks(before, segments[count], cuts)
        if segments[count].media and text_index < 0:
            text_index = len(marks) - 2
        if segments[count].role in ANSWER_ROLES:
            answered_index = len(marks) - 1
    static_shared = has_static and 0 < statics == shared_segments
    return Prompt(
        *(False, tuple(marks), static_index, _turns(segments), static_shared),
        text_index=text_index,
        asked_index=asked_index,
        answered_index=answered_index,
    )


def _leading(segments: Sequence[Segment], shared_segments: int) -> int:
    """How many messages a client sends with every task: a tier's and its own system messages."""
    count = min(shared_segments, len(segments))
    while count < len(segments) and segments[count].role in SYSTEM_ROLES:
        count += 1
    return count


def _turns(segments: Sequence[Segment]) -> int:
    """Runs of messages that ask: several tools' results are one turn."""
    asks = [s.role not in ANSWER_ROLES for s in segments if s.role not in SYSTEM_ROLES]
    return sum(now and not before for before, now in pairwise([False, *asks]))


def _asks_at(segments: Sequence[Segment], index: int) -> bool:
    """Whether a user message stands here, or will: nothing else comes behind yet.

    Templates open a turn by its role, so the tokens that all requests share go on into the opening
    of the user's turn. A prompt that goes on with another role doesn't have those.
    """
    return index == len(segments) or segments[index].role == "user"


def prefix_of(prompt: Prompt, segments: Sequence[Segment], end: SharedEnd) -> Prompt:
    """The part of a prompt up to a shared end, all of it static: something to fill and save.

    Args:
        prompt: read with `end` among its `ends`.
        segments: the same body's, by `segments_of`.
        end: where the part ends.
    """
    head_chars = 0 if prompt.is_raw else prompt.marks[0].chars
    before = sum(s.chars for s in segments[: end.segment])
    chars = head_chars + before + end.chars
    index = max(i for i, mark in enumerate(prompt.marks) if mark.chars <= chars or i == 0)
    shared = prompt.is_static_shared and index <= prompt.static_index
    return Prompt(prompt.is_raw, prompt.marks[: index + 1], index, 0, shared)


def head_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What of a body shapes how its messages render, in the order of `SHAPING`."""
    head = {k: body[k] for k in SHAPING if body.get(k) not in (None, [], {})}
    if head.get("tool_choice") == _NO_CHOICE:
        del head["tool_choice"]
    return head


def is_raw(body: Mapping[str, Any]) -> bool:
    """Whether a body has a prompt of its own rather than messages to render."""
    return "messages" not in body


def segments_of(body: Mapping[str, Any]) -> list[Segment]:
    """The messages of a body in chat's terms, in canonical form; none of a raw prompt."""
    items = body.get("messages")
    listed = items if isinstance(items, list) else []
    return [segment_of(item) for item in listed if isinstance(item, Mapping)]


def segment_of(message: Mapping[str, Any]) -> Segment:
    """One message in canonical form.

    Clients send back what the model said in many shapes (`content` null, empty or absent, reasoning
    left out, white space trimmed, arguments parsed and printed again); those are one segment here.
    Where their tokens differ all the same, the engine's `cache_n` tells.
    """
    role = str(message.get("role") or "")
    text, extra, media = _text(message.get("content"))
    if role in ("assistant", "model"):
        text = text.strip()
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        functions = (c.get("function", c) for c in calls if isinstance(c, Mapping))
        extra += "".join(_call(f) for f in functions if isinstance(f, Mapping))
    return Segment(role, text, extra, media)


def _text(content: object) -> tuple[str, str, int]:
    """Text of a content field, a canonical form of its other parts, and how many are media.

    Text behind a picture belongs to those: what stands before it must be the same for all who
    share a mark in it.
    """
    if content is None:
        return "", "", 0
    if isinstance(content, str):
        return content, "", 0
    texts: list[str] = []
    extra: list[str] = []
    media = 0
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, Mapping):
            (extra if media else texts).append(str(part))
        elif part.get("type") in ("text", "input_text", "output_text"):
            (extra if media else texts).append(str(part.get("text", "")))
        elif part.get("type") not in ("thinking", "redacted_thinking", "reasoning"):
            extra.append(_dump(_shortened(part)))
            media += 1
    return "\n".join(texts), "\n".join(extra), media


def _shortened(value: object) -> object:
    """A part with digests for the bytes it brings: two pictures are two prompts, and none is long.

    base64 of 4 MB would be counted as a million tokens.
    """
    if isinstance(value, str) and len(value) > _MOST_PART_CHARS:
        return _digest(_bytes(value)).hex()
    if isinstance(value, Mapping):
        return {key: _shortened(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_shortened(one) for one in value]
    return value


def _call(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    return _dump([call.get("name"), arguments])


def dump(value: object) -> str:
    """JSON with the keys in the order they came in."""
    try:
        # A tenth of the time of the standard library's, and this runs for every tool of a request.
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, UnicodeError, TypeError, ValueError):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _is_token(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


def _bytes(text: str) -> bytes:
    # JSON can escape half of a surrogate pair; that is odd, not wrong.
    return text.encode("utf-8", "surrogatepass")


def _digest(*parts: bytes) -> bytes:
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        h.update(len(part).to_bytes(4, "little"))
        h.update(part)
    return h.digest()


def _segment_marks(before: Mark, segment: Segment, cuts: Sequence[int] = ()) -> tuple[Mark, ...]:
    """Marks inside and behind one segment that follows `before`."""
    is_long = len(segment.text) + len(segment.extra) > _REMEMBERED_CHARS
    return (_marked if is_long else _remembered)(before, segment, tuple(cuts))


def _marked(before: Mark, segment: Segment, cuts: tuple[int, ...]) -> tuple[Mark, ...]:
    h = hashlib.blake2b(digest_size=16)
    h.update(before.digest)
    h.update(_bytes(segment.role))
    h.update(b"\0")
    marks: list[Mark] = []
    text = segment.text
    blocks = range(BLOCK_CHARS, len(text) + 1, BLOCK_CHARS)
    places = sorted({*blocks, *(c for c in cuts if 0 < c < len(text))}) if cuts else blocks
    start = 0
    for end in places:
        h.update(_bytes(text[start:end]))
        marks.append(Mark(h.digest(), before.chars + end))
        start = end
    h.update(_bytes(text[start:]))
    h.update(b"\0")
    h.update(_bytes(segment.extra))
    h.update(b"\0end")
    chars = before.chars + segment.chars
    marks.append(Mark(h.digest(), chars))
    return tuple(marks)


_remembered = lru_cache(_REMEMBERED_SEGMENTS)(_marked)


def raw_of(body: Mapping[str, Any]) -> object:
    """What a raw prompt begins with: text, token ids, or whatever stands there instead.

    An infill has its context files first and then what comes before the gap.
    """
    if "input_prefix" not in body:
        return body.get("prompt")
    extra = body.get("input_extra")
    return (dump(extra) if extra else "") + str(body["input_prefix"])


def _raw_prompt(prompt: object, key: bytes, cuts: Sequence[int] = ()) -> Prompt:
    """Identity of a `/completion` prompt: text, token ids, or anything else (never shared)."""
    if isinstance(prompt, str):
        marks = _segment_marks(Mark(key, 0), Segment("raw", prompt), cuts)
        return Prompt(True, marks, -1, 1)
    if isinstance(prompt, list) and prompt and all(_is_token(t) for t in prompt):
        ids = as_tokens(prompt)
        return Prompt(True, token_marks(prompt, key), -1, 1, ids=ids)
    opaque = _digest(key, _bytes(_dump(prompt)))
    return Prompt(True, (Mark(opaque, len(_dump(prompt))),), -1, 1)


def token_marks(tokens: Sequence[int], key: bytes) -> tuple[Mark, ...]:
    """Marks of a prompt given as token ids: one every `BLOCK_TOKENS`, and the end's."""
    h = hashlib.blake2b(key, digest_size=16)
    marks = []
    for block, end in _blocks(tokens):
        h.update(b"".join(t.to_bytes(4, "little", signed=True) for t in block))
        marks.append(Mark(h.digest(), end * 4, end))
    return tuple(marks)


def _blocks(tokens: Sequence[int]) -> Iterable[tuple[Sequence[int], int]]:
    for start in range(0, len(tokens), BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        yield block, start + len(block)
