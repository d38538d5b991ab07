"""The OpenAI batch format, line by line: tasks in, results and errors out.

A line is `{"custom_id", "method", "url", "body"}`. Beside those four a line may say, in an object
`keepwarm`, what a night needs to know of it:

- `priority`: a whole number, smaller goes first, 0 if absent;
- `deadline`: when it should have ended, RFC 3339 with a zone;
- `depends_on`: custom ids that must have succeeded before it begins;
- `conversation`: a name; tasks of one conversation run one after another, in the file's order.

A line that can't be used becomes an error with its number; the others aren't touched by it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import msgspec

from keepwarm.api.reading import Api

URLS: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
}
_CONTENT: dict[Api, str] = {"chat": "messages", "completion": "prompt", "responses": "input"}
# OpenAI's own bound on a custom id's use is none; this keeps error messages and reports readable.
_MAX_ID_CHARS = 512


@dataclass(frozen=True, slots=True)
class Task:
    """One valid line. `deadline_s` is in seconds of the Unix epoch.

    `after` are custom ids that must have ended, well or not (an earlier turn); `depends_on` must
    have succeeded.
    """

    line: int
    custom_id: str
    api: Api
    url: str
    body: dict[str, Any]
    priority: int = 0
    deadline_s: float | None = None
    depends_on: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    conversation: str | None = None


@dataclass(frozen=True, slots=True)
class LineError:
    """Why a line can't be used. `line` counts from 1; `code` is one of a bounded set of words."""

    line: int
    code: str
    message: str
    custom_id: str | None = None
    param: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """As in a batch object's `errors.data`."""
        return {
            "code": self.code,
            "line": self.line,
            "message": self.message,
            "param": self.param,
        }


@dataclass(frozen=True, slots=True)
class Parsed:
    """A task file: what can run, in the file's order, and what can't, by line."""

    tasks: tuple[Task, ...]
    errors: tuple[LineError, ...]


class _BadLineError(Exception):
    """One line is wrong; caught where lines are collected."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


def parse_tasks(
    lines: Iterable[bytes], *, endpoint: str | None = None, max_body_bytes: int | None = None
) -> Parsed:
    """Read a task file.

    Args:
        lines: the file's; empty ones are skipped, but counted.
        endpoint: if given, the only URL allowed (a batch made by the API has one).
        max_body_bytes: longer lines are errors; the gateway would refuse them.
    """
    tasks: dict[str, Task] = {}
    errors: list[LineError] = []
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        custom_id = None
        try:
            if max_body_bytes is not None and len(raw) > max_body_bytes:
                raise _BadLineError(
                    "line_too_long", f"The line has {len(raw):,} bytes; {max_body_bytes:,} at most."
                )
            value = _object(raw)
            custom_id = value.get("custom_id") if isinstance(value.get("custom_id"), str) else None
            task = _task(number, value, endpoint)
            if task.custom_id in tasks:
                raise _BadLineError(
                    "duplicate_custom_id",
                    f"The custom_id {task.custom_id!r} is that of line "
                    f"{tasks[task.custom_id].line} too; this line is left out.",
                    "custom_id",
                )
            tasks[task.custom_id] = task
        except _BadLineError as error:
            errors.append(LineError(number, error.code, str(error), custom_id, error.param))
    ordered = _conversations(tasks.values())
    good, bad = _checked_dependencies(ordered)
    return Parsed(tuple(good), tuple(sorted([*errors, *bad], key=lambda e: e.line)))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise _BadLineError("invalid_json", f"The line isn't valid JSON: {error}.") from error
    except RecursionError as error:
        raise _BadLineError("invalid_json", "The line's JSON is nested too deeply.") from error
    if not isinstance(value, dict):
        raise _BadLineError("invalid_json", "The line must be a JSON object.")
    return value


def _task(number: int, value: Mapping[str, Any], endpoint: str | None) -> Task:
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _BadLineError("missing_custom_id", "The line has no custom_id.", "custom_id")
    if len(custom_id) > _MAX_ID_CHARS:
        raise _BadLineError(
            "invalid_custom_id", f"A custom_id has {_MAX_ID_CHARS} characters at most.", "custom_id"
        )
    if value.get("method", "POST") != "POST":
        raise _BadLineError("invalid_method", "The method must be POST.", "method")
    url = value.get("url")
    if not isinstance(url, str) or url not in URLS:
        raise _BadLineError(
            "invalid_url", f"The url {url!r} isn't one of {', '.join(URLS)}.", "url"
        )
    if endpoint is not None and url != endpoint:
        raise _BadLineError(
            "mismatched_url", f"The url {url!r} isn't the batch's endpoint {endpoint!r}.", "url"
        )
    body = value.get("body")
    if not isinstance(body, dict):
        raise _BadLineError("invalid_body", "The body must be a JSON object.", "body")
    api = URLS[url]
    if not body.get(_CONTENT[api]):
        raise _BadLineError("invalid_body", f"The body has no {_CONTENT[api]}.", "body")
    # A batch has nobody to stream to.
    body = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
    return _with_wishes(Task(number, custom_id, api, url, body), value.get("keepwarm"))


def _with_wishes(task: Task, wishes: object) -> Task:
    """What the `keepwarm` object of a line says."""
    if wishes is None:
        return task
    if not isinstance(wishes, dict):
        raise _BadLineError("invalid_keepwarm", "`keepwarm` must be an object.", "keepwarm")
    unknown = set(wishes) - {"priority", "deadline", "depends_on", "conversation"}
    if unknown:
        raise _BadLineError(
            "invalid_keepwarm", f"`keepwarm` knows no {', '.join(sorted(unknown))}.", "keepwarm"
        )
    priority = wishes.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise _BadLineError("invalid_priority", "priority must be a whole number.", "priority")
    needs = wishes.get("depends_on", [])
    if not isinstance(needs, list) or not all(isinstance(n, str) for n in needs):
        raise _BadLineError(
            "invalid_depends_on", "depends_on must be a list of custom ids.", "depends_on"
        )
    conversation = wishes.get("conversation")
    if conversation is not None and not isinstance(conversation, str):
        raise _BadLineError("invalid_conversation", "conversation must be text.", "conversation")
    return replace(
        task,
        priority=priority,
        deadline_s=_deadline(wishes.get("deadline")),
        depends_on=tuple(dict.fromkeys(needs)),
        conversation=conversation,
    )


def _deadline(value: object) -> float | None:
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value) if isinstance(value, str) else None
        if at is None or at.tzinfo is None:
            raise ValueError
        return at.timestamp()
    except (ValueError, OverflowError) as error:
        raise _BadLineError(
            "invalid_deadline",
            "deadline must be a time with a zone, like 2026-01-31T06:30:00+01:00.",
            "deadline",
        ) from error


def _conversations(tasks: Iterable[Task]) -> list[Task]:
    """Each turn comes after the one before it in the file."""
    last: dict[str, str] = {}
    out = []
    for task in tasks:
        if task.conversation is None:
            out.append(task)
            continue
        before = last.get(task.conversation)
        out.append(replace(task, after=(before,)) if before else task)
        last[task.conversation] = task.custom_id
    return out


def _checked_dependencies(tasks: Sequence[Task]) -> tuple[list[Task], list[LineError]]:
    """Leave out what can never begin: it needs a task that isn't there, or itself."""
    known = {task.custom_id: task for task in tasks}
    errors: list[LineError] = []

    def drop(task: Task, code: str, message: str) -> None:
        del known[task.custom_id]
        errors.append(LineError(task.line, code, message, task.custom_id, "depends_on"))

    dropped = True
    while dropped:
        dropped = False
        for task in [t for t in tasks if t.custom_id in known]:
            missing = next((n for n in task.depends_on if n not in known), None)
            if missing is not None:
                text = f"It depends on {missing!r}, which isn't a valid task of this file."
                drop(task, "unknown_dependency", text)
                dropped = True
        if not dropped and (looped := _in_a_cycle(known)):
            for name in looped:
                drop(known[name], "dependency_cycle", "It depends on itself, through others.")
            dropped = True
    good = [
        replace(t, after=tuple(a for a in t.after if a in known))
        for t in tasks
        if t.custom_id in known
    ]
    return good, errors


def _in_a_cycle(tasks: Mapping[str, Task]) -> list[str]:
    """Names that are left when everything that can run has run, less what merely waits for them."""
    left = {name: {*t.depends_on, *t.after} & set(tasks) for name, t in tasks.items()}
    while True:
        free = [name for name, needs in left.items() if not needs]
        if not free:
            break
        gone = set(free)
        for name in free:
            del left[name]
        for needs in left.values():
            needs.difference_update(gone)
    while True:
        needed = {n for needs in left.values() for n in needs}
        ends = [name for name in left if name not in needed]
        if not ends:
            return list(left)
        for name in ends:
            del left[name]


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
    except ValueError:
        return body.decode("utf-8", "replace")


def _line(value: object) -> bytes:
    return msgspec.json.encode(value) + b"\n"
