"""A request's bytes as a body that the engine can take, whatever a client made of them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from keepwarm.errors import RequestError

# The longer mark first: it begins with the shorter one's bytes.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_REPLACEMENT = "\ufffd"


def decode_body(raw: bytes) -> dict[str, Any]:
    """A request's JSON object.

    Any encoding of Unicode is read, with or without its mark. Half a surrogate pair, which is no
    character, becomes the replacement character, always: the same text is the same prompt.

    Raises:
        RequestError: it isn't one.
    """
    raw = _utf8(raw)
    try:
        body = msgspec.json.decode(raw)
    except RecursionError as error:
        raise RequestError("The request body isn't valid JSON: it is nested too deep.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        body = _with_halves(raw, error)
    if not isinstance(body, dict):
        raise RequestError("The request body must be a JSON object.")
    return body


def _utf8(raw: bytes) -> bytes:
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return raw[len(mark) :].decode(name, "replace").encode()
    # JSON begins with two ASCII characters: where the zeros stand tells the encoding.
    if raw[:1] == b"\0":
        return raw.decode("utf-16-be", "replace").encode()
    if raw[1:2] == b"\0":
        return raw.decode("utf-16-le", "replace").encode()
    return raw


def _with_halves(raw: bytes, error: Exception) -> object:
    """The value of JSON that has half a character somewhere; `error` is what was said of it."""

    def refuse(name: str) -> object:
        raise ValueError(f"{name} isn't JSON")

    try:
        text = raw.decode("utf-8", "replace")
        return _whole(json.loads(text, parse_constant=refuse))
    except (ValueError, RecursionError):
        raise RequestError(f"The request body isn't valid JSON: {error}.") from error


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(_REPLACEMENT if "\ud800" <= c <= "\udfff" else c for c in value)
    if isinstance(value, list):
        return [_whole(one) for one in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(one) for key, one in value.items()}
    return value


def with_whole_arguments(body: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """A chat body whose tool calls have JSON for arguments, and how many had not.

    A model that was cut off in a call leaves broken JSON in the history; the engine fails on it
    with 500 at every turn from then on.
    """
    messages = body.get("messages")
    changed = 0
    out: list[Any] = []
    for message in messages if isinstance(messages, list) else ():
        calls = message.get("tool_calls") if isinstance(message, Mapping) else None
        new = [_mended_call(call) for call in calls] if isinstance(calls, list) else []
        count = sum(a is not b for a, b in zip(new, calls or (), strict=True))
        changed += count
        out.append({**message, "tool_calls": new} if count else message)
    return ({**body, "messages": out}, changed) if changed else (body, 0)


def _mended_call(call: object) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str) or (whole := whole_json(arguments)) is arguments:
        return call
    assert isinstance(call, Mapping)
    assert isinstance(function, Mapping)
    return {**call, "function": {**function, "arguments": whole}}


def whole_json(text: str) -> str:
    """The text itself if it is JSON; closed where it breaks off; else an object that holds it."""
    if _is_json(text):
        return text
    if not text.strip():
        return "{}"
    closed = _closed(text)
    return closed if _is_json(closed) else json.dumps({"input": text}, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return True


def _closed(text: str) -> str:
    """JSON that breaks off, with all closed that is open."""
    open_ends: list[str] = []
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "{[":
            open_ends.append("}" if char == "{" else "]")
        elif char in "}]" and open_ends:
            open_ends.pop()
    out = text[:-1] if escaped else text
    out = f'{out}"' if in_string else out.rstrip().removesuffix(",")
    if out.endswith(":"):
        out += " null"
    ends = "".join(reversed(open_ends))
    # A key without its value is left as a key of nothing.
    with_value = f"{out}: null{ends}"
    return with_value if not _is_json(out + ends) and _is_json(with_value) else out + ends
