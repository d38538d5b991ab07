"""The OpenAI batch format, line by line: results and errors out. For tasks see `tasks`."""

from __future__ import annotations

import json
import uuid
from typing import Any

import msgspec


def result_line(custom_id: str, *, status: int, request_id: str, body: bytes) -> bytes:
    """A line of the results: what the server said, as it said it."""
    return _line(
        {
            "id": f"batch_req_{uuid.uuid4().hex[:24]}",
            "custom_id": custom_id,
            "response": {
                "status_code": status,
                "request_id": request_id,
                "body": _decoded(body),
            },
            "error": None,
        }
    )


def error_line(
    custom_id: str | None,
    *,
    code: str,
    message: str,
    line: int | None = None,
    status: int | None = None,
    request_id: str = "",
    body: bytes = b"",
) -> bytes:
    """A line of the error file.

    Args:
        custom_id: None if the line had none.
        code, message: what is wrong.
        line: of the task file, for a line that couldn't be used.
        status, request_id, body: the server's answer, if there was one.
    """
    response = None
    if status is not None:
        response = {"status_code": status, "request_id": request_id, "body": _decoded(body)}
    error: dict[str, Any] = {"code": code, "message": message}
    if line is not None:
        error["line"] = line
    return _line(
        {
            "id": f"batch_req_{uuid.uuid4().hex[:24]}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )


def _decoded(body: bytes) -> Any:
    # json and not msgspec: an answer that isn't quite JSON must still be reported.
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", "replace")


def _line(value: object) -> bytes:
    try:
        return msgspec.json.encode(value) + b"\n"
    except ValueError:  # half of a surrogate pair, which only JSON's own escapes can say
        return json.dumps(value).encode() + b"\n"
