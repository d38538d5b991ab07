"""What a request's body must look like before anything of it is read.

Only what Keepwarm itself reads is looked at: lists where there must be lists, objects where there
must be objects. All else is the engine's to judge, which takes more than the documents of these
APIs say. Each refusal names the place.
"""

from __future__ import annotations

from typing import Any

import msgspec

from keepwarm.errors import RequestError

# Tools' schemas nest some ten deep, what models and clients write as arguments less. The engine
# itself fails at about a thousand, and so does Python.
MOST_NESTED = 128

_Text = str | None
# The engine takes any; tiers have names.
_Name = str | int | float | None
_Object = dict[str, Any]


class _Function(msgspec.Struct):
    name: _Text = None
    arguments: str | _Object | None = None


class _Call(msgspec.Struct):
    function: _Function | None = None


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Object] | None = None
    tool_calls: list[_Call] | None = None
    reasoning_content: _Text = None


class _ToolFunction(msgspec.Struct):
    name: _Text = None
    description: _Text = None


class _Tool(msgspec.Struct):
    function: _ToolFunction | None = None


class _Chat(msgspec.Struct):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    model: _Name = None


class _NamedTool(msgspec.Struct):
    name: _Text = None
    description: _Text = None


class _AnyMessage(msgspec.Struct):
    role: str
    content: str | list[_Object | str] | None = None


class _Messages(msgspec.Struct):
    messages: list[_AnyMessage]
    system: str | list[_Object | str] | None = None
    tools: list[_NamedTool] | None = None
    stop_sequences: list[str] | None = None
    model: _Name = None


class _Responses(msgspec.Struct):
    input: str | list[_Object]
    instructions: _Text = None
    tools: list[_Object | None] | None = None
    model: _Name = None


class _Completion(msgspec.Struct):
    model: _Name = None


_SHAPES: dict[str, type[msgspec.Struct]] = {
    "chat": _Chat,
    "messages": _Messages,
    "responses": _Responses,
    "completion": _Completion,
}


def check_body(kind: str, body: dict[str, Any]) -> None:
    """Refuse a body that can't be read.

    Args:
        kind: `chat`, `messages`, `responses` or `completion`.
        body: decoded.

    Raises:
        RequestError: it can't be.
    """
    if _is_deeper(body, MOST_NESTED):
        raise RequestError(f"The request body is nested more than {MOST_NESTED} deep.")
    try:
        msgspec.convert(body, _SHAPES[kind])
    except msgspec.ValidationError as error:
        raise RequestError(f"The request body has another shape than it must have: {error}.") from (
            error
        )


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            child
            for value in level
            for child in _children(value)
            if child.__class__ is dict or child.__class__ is list
        ]
        if not level:
            return False
    return True
