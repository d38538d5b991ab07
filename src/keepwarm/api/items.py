"""What agents send over OpenAI's responses API, as items that the engine takes.

An item that it refuses fails every later request of that session, since histories only grow. So
calls of other tools become functions' calls, what has text becomes text, and what has neither (an
encrypted reasoning, a search that another server did) is left out and counted.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from keepwarm.api.mending import whole_json
from keepwarm.api.responses import texts_of
from keepwarm.core.roles import SYSTEM_ROLES
from keepwarm.errors import RequestError

# Parts of a message that are text, whichever role has them.
_TEXTS = frozenset(("input_text", "output_text", "text", "summary_text", "reasoning_text"))
_SPEAKERS = (*SYSTEM_ROLES, "user", "assistant")


class Mended(NamedTuple):
    """A body that the engine takes; how many items were turned into others, and left out."""

    body: dict[str, Any]
    turned: int = 0
    left_out: int = 0


def mended(body: dict[str, Any]) -> Mended:
    """A responses body without what the engine refuses; the same object if it refuses nothing.

    Raises:
        RequestError: there is something that can neither be sent nor left out; it names the item.
    """
    out = body
    if "instructions" in body and not isinstance(body["instructions"], str):
        out = {key: value for key, value in out.items() if key != "instructions"}
    if _asks_for_form(body):
        out = {**out, "response_format": _response_format(body["text"]["format"])}
    items = body.get("input")
    if not isinstance(items, list):
        return Mended(out)
    kept: list[Any] = []
    tools: list[Any] = []
    turned = left_out = 0
    for index, item in enumerate(items):
        if isinstance(item, Mapping) and item.get("type") == "additional_tools":
            tools += [t for t in item.get("tools") or () if isinstance(t, Mapping)]
            turned += 1
            continue
        new = _items(item, index)
        turned += bool(new) and not (len(new) == 1 and new[0] is item)
        left_out += not new
        kept += new
    if turned or left_out:
        out = {**out, "input": _pictures_last(kept)}
    if tools:
        out = {**out, "tools": [*(body.get("tools") or ()), *tools]}
    return Mended(out, turned, left_out)


def _asks_for_form(body: Mapping[str, Any]) -> bool:
    text = body.get("text")
    form = text.get("format") if isinstance(text, Mapping) else None
    wants = isinstance(form, Mapping) and form.get("type") in ("json_object", "json_schema")
    return wants and "response_format" not in body


def _response_format(form: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the answer in chat's words: the engine doesn't look at `text.format`."""
    if form["type"] == "json_object":
        return {"type": "json_object"}
    schema = {key: value for key, value in form.items() if key != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _items(item: object, index: int) -> list[Any]:
    """An item as the engine takes it: itself, others, or none."""
    if isinstance(item, str):
        return [{"role": "user", "content": item}]
    if not isinstance(item, Mapping):
        raise RequestError(f"input[{index}] must be an object.")
    kind = item.get("type") or ("message" if "role" in item else "")
    if kind == "message":
        return [_spoken(item, index)]
    if kind == "reasoning":
        return _reasoning(item)
    if kind == "item_reference":
        raise RequestError(
            f"input[{index}]: nothing is kept here that `item_reference` could name."
        )
    call_id = item.get("call_id")
    if isinstance(kind, str) and isinstance(call_id, str):
        if kind.endswith("_output"):
            return _output(item, call_id, index)
        if kind.endswith("_call"):
            return [_call(item, call_id)]
    # Web searches, compactions, references of other servers: their text, where they have any.
    text = "\n".join(texts_of(item))
    return [{"role": "user", "content": text}] if text else []


def _spoken(item: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    role, content = item.get("role"), item.get("content")
    if role not in _SPEAKERS:
        raise RequestError(f"input[{index}]: there is no role {str(role)[:40]!r}.")
    new: Mapping[str, Any] = item
    if role == "assistant" and item.get("type") != "message":
        new = {**new, "type": "message"}
    if not isinstance(content, str):
        parts = content if isinstance(content, list) else [] if content is None else [content]
        where = f"input[{index}].content"
        turned = [_part(part, str(role), f"{where}[{i}]") for i, part in enumerate(parts)]
        is_same = isinstance(content, list) and all(
            a is b for a, b in zip(turned, parts, strict=True)
        )
        new = new if is_same else {**new, "content": turned}
    return new


def _part(part: object, role: str, where: str) -> Any:
    """A part as the engine takes it from this role.

    Raises:
        RequestError: it can't.
    """
    text_kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(part, str):
        return {"type": text_kind, "text": part}
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} must be an object.")
    kind = part.get("type")
    if kind in _TEXTS or kind is None:
        text = part.get("text")
        is_taken = kind == "input_text" or (kind == text_kind and role == "assistant")
        if is_taken and isinstance(text, str):
            return part
        return {"type": text_kind, "text": text if isinstance(text, str) else ""}
    if kind == "refusal":
        return {"type": text_kind, "text": str(part.get("refusal") or "")}
    if kind in ("input_image", "image_url"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, Mapping) else url
        if isinstance(url, str) and role != "assistant":
            is_taken = kind == "input_image" and part.get("image_url") is url
            return part if is_taken else {"type": "input_image", "image_url": url}
    if kind == "input_file" and (text := _file_text(part)) is not None:
        return {"type": text_kind, "text": text}
    raise RequestError(f"{where}: a part of type {str(kind)[:40]!r} can't be served here.")


def _file_text(part: Mapping[str, Any]) -> str | None:
    """A file's text, if it came with the request and is text."""
    data = part.get("file_data")
    if not isinstance(data, str):
        return None
    head, comma, coded = data.partition(",")
    if not (comma and head.startswith("data:")):
        head, coded = "", data
    if head and not head.startswith(("data:text/", "data:application/json")):
        return None
    try:
        return base64.b64decode(coded, validate=True).decode()
    except (binascii.Error, ValueError):
        return None if head else data


def _reasoning(item: Mapping[str, Any]) -> list[Any]:
    """Reasoning with its words as the content's first part, which alone the engine reads."""
    content = item.get("content")
    parts = content if isinstance(content, list) else []
    texts = list(texts_of({"content": parts})) or list(texts_of({"summary": item.get("summary")}))
    if not texts:
        return []  # encrypted, or empty
    is_taken = isinstance(item.get("summary"), list) and len(parts) == 1 == len(texts)
    if is_taken and isinstance(parts[0], Mapping) and parts[0].get("text") == texts[0]:
        return [item]
    said = [{"type": "reasoning_text", "text": "\n".join(texts)}]
    return [{**item, "summary": [], "content": said}]


def _call(item: Mapping[str, Any], call_id: str) -> Mapping[str, Any]:
    """A call of any kind as a function's."""
    name, arguments = item.get("name"), item.get("arguments")
    is_taken = item["type"] == "function_call" and isinstance(name, str)
    if is_taken and isinstance(arguments, str):
        whole = whole_json(arguments)
        return item if whole is arguments else {**item, "arguments": whole}
    if arguments is None:
        told = {key: item[key] for key in ("input", "action", "operation") if key in item}
        arguments = next(iter(told.values())) if "input" not in told and told else told
    if not isinstance(arguments, str):
        arguments = _dumped(arguments)
    arguments = whole_json(arguments)
    named = name if isinstance(name, str) else str(item["type"]).removesuffix("_call")
    new = {"type": "function_call", "call_id": call_id, "name": named, "arguments": arguments}
    return {**new, "namespace": item["namespace"]} if "namespace" in item else new


def _output(item: Mapping[str, Any], call_id: str, index: int) -> list[Any]:
    """A result of any kind of call as a function's; its pictures as a user's, behind it."""
    output = item.get("output")
    is_function = item.get("type") == "function_call_output"
    if isinstance(output, str):
        if is_function:
            return [item]
        return [{"type": "function_call_output", "call_id": call_id, "output": output}]
    new = {"type": "function_call_output", "call_id": call_id}
    if not isinstance(output, list):
        return [{**new, "output": "" if output is None else _dumped(output)}]
    where = f"input[{index}].output"
    parts = [
        _part(p, "tool", f"{where}[{i}]")
        if _is_known(p)
        else {"type": "input_text", "text": _dumped(p)}
        for i, p in enumerate(output)
    ]
    texts = [p for p in parts if p["type"] == "input_text"]
    pictures = [p for p in parts if p["type"] == "input_image"]
    is_same = is_function and len(texts) == len(parts) == sum(map(_is_plain, output))
    out: list[Any] = [item if is_same else {**new, "output": texts}]
    if pictures:
        out.append({"role": "user", "content": pictures})
    return out


def _is_known(part: object) -> bool:
    kind = part.get("type") if isinstance(part, Mapping) else None
    return isinstance(part, str) or kind in _TEXTS or kind in ("input_image", "input_file")


def _is_plain(part: object) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type") == "input_text"
        and set(part)
        <= {
            "type",
            "text",
        }
    )


def _pictures_last(items: list[Any]) -> list[Any]:
    """Pictures of tools' results behind all results in a row: templates want those together."""
    out: list[Any] = []
    waiting: list[Any] = []
    for item in items:
        is_result = item.get("type") == "function_call_output"
        after_result = bool(out) and out[-1].get("type") == "function_call_output"
        if not is_result and after_result and _is_pictures(item):
            waiting.append(item)
            continue
        if not is_result:
            out += waiting
            waiting = []
        out.append(item)
    return out + waiting


def _is_pictures(item: Mapping[str, Any]) -> bool:
    content = item.get("content")
    return (
        set(item) == {"role", "content"}
        and isinstance(content, list)
        and all(isinstance(p, Mapping) and p.get("type") == "input_image" for p in content)
    )


def _dumped(value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, UnicodeError, TypeError, ValueError):
        return json.dumps(value, default=str)
