"""The OpenAI batch format, line by line: tasks in. For results and errors see `lines`.

A line is `{"custom_id", "method", "url", "body"}`. Beside those four a line may say, in an object
`keepwarm`, what a night needs to know of it:

- `priority`: a whole number, smaller goes first, 0 if absent;
- `deadline`: when it should have ended, RFC 3339 with a zone;
- `depends_on`: custom ids that must have succeeded before it begins;
- `conversation`: a name; tasks of one conversation run one after another, in the file's order.

A line that can't be used becomes an error with its number; the others aren't touched by it.

A night's prompts may be larger than the memory. So a task knows where its line is
(`TaskSource`) and its digest, and its body is read again each time it is needed; a line that has
changed since it was first read is an error, never another task's prompt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, BinaryIO

import msgspec

from keepwarm.api.reading import Api
from keepwarm.errors import ConfigError

URLS: dict[str, Api] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "responses",
}
_CONTENT: dict[Api, str] = {"chat": "messages", "completion": "prompt", "responses": "input"}
# OpenAI's own bound on a custom id's use is none; this keeps error messages and reports readable.
_MAX_ID_CHARS = 512


class TaskFile:
    """A task file that stays open, so that it can be renamed or replaced meanwhile."""

    def __init__(self, file: BinaryIO) -> None:
        """Take an open file over."""
        self._file = file

    def read(self, at: int, size: int) -> bytes:
        """Bytes of it; fewer if it has been cut since. Raises: OSError."""
        return os.pread(self._file.fileno(), size, at)


@dataclass(frozen=True, slots=True)
class TaskSource:
    """Where a line is: in a file, or in memory (`text`)."""

    file: TaskFile | None
    at: int
    size: int
    text: bytes = b""

    def read(self) -> bytes:
        """The line as it is now. Raises: OSError."""
        return self.text if self.file is None else self.file.read(self.at, self.size)


@dataclass(frozen=True, slots=True)
class Task:
    """One valid line. `deadline_s` is in seconds of the Unix epoch.

    `digest` tells whether a task is one that was run under its id before. `after` are custom ids
    that must have ended, well or not (an earlier turn); `depends_on` must have succeeded.
    """

    line: int
    custom_id: str
    api: Api
    url: str
    source: TaskSource = field(repr=False)
    digest: str
    priority: int = 0
    deadline_s: float | None = None
    depends_on: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    conversation: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The request's body, read anew. Raises: ConfigError: the line isn't what it was."""
        try:
            body = _body_of(_object(self.source.read()))
            if _digest(self.url, body) == self.digest:
                return body
        except (OSError, _BadLineError):
            pass
        raise ConfigError(
            f"Line {self.line} of the tasks ({self.custom_id!r}) was changed while they run. What "
            "has ended is kept: run the same command again to go on with the file as it is."
        )


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
    lines: Iterable[bytes],
    *,
    endpoint: str | None = None,
    max_body_bytes: int | None = None,
    file: TaskFile | None = None,
) -> Parsed:
    """Read a task file.

    Args:
        lines: the file's; empty ones are skipped, but counted.
        endpoint: if given, the only URL allowed (a batch made by the API has one).
        max_body_bytes: longer lines are errors; the gateway would refuse them.
        file: where `lines` are, one behind the other; without it tasks keep their lines in memory.
    """
    tasks: dict[str, Task] = {}
    errors: list[LineError] = []
    at = 0
    for number, raw in enumerate(lines, start=1):
        source = TaskSource(file, at, len(raw)) if file else TaskSource(None, 0, len(raw), raw)
        at += len(raw)
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
            task = _task(number, value, source, endpoint)
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


def _body_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """A line's body, without what asks for a stream: a batch has nobody to stream to."""
    body = value.get("body")
    if not isinstance(body, dict):
        raise _BadLineError("invalid_body", "The body must be a JSON object.", "body")
    return {k: v for k, v in body.items() if k not in ("stream", "stream_options")}


def _digest(url: str, body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(msgspec.json.encode([url, body]), digest_size=16).hexdigest()


def _task(number: int, value: Mapping[str, Any], source: TaskSource, endpoint: str | None) -> Task:
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
    body = _body_of(value)
    api = URLS[url]
    if not body.get(_CONTENT[api]):
        raise _BadLineError("invalid_body", f"The body has no {_CONTENT[api]}.", "body")
    task = Task(number, custom_id, api, url, source, _digest(url, body))
    return _with_wishes(task, value.get("keepwarm"))


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
    """Leave out what can never begin: it needs a task that isn't there, or itself. In linear time.

    1. What needs a task that isn't there, and what needs that, and so on.
    2. What is in a circle; then what needs one of those, as in 1.
    """
    known = {task.custom_id: task for task in tasks}
    waiters: dict[str, list[str]] = {}
    for task in tasks:
        for need in task.depends_on:
            waiters.setdefault(need, []).append(task.custom_id)
    errors: list[LineError] = []

    def drop(name: str, code: str, message: str) -> None:
        task = known.pop(name)
        errors.append(LineError(task.line, code, message, name, "depends_on"))

    def drop_waiters(missing: list[str]) -> None:
        while missing:
            gone = missing.pop()
            for name in waiters.get(gone, ()):
                if name in known:
                    text = f"It depends on {gone!r}, which isn't a valid task of this file."
                    drop(name, "unknown_dependency", text)
                    missing.append(name)

    drop_waiters([need for need in waiters if need not in known])
    looped = _in_a_cycle(known)
    for name in looped:
        drop(name, "dependency_cycle", "It depends on itself, through others.")
    drop_waiters(looped)
    if not errors:
        return list(tasks), []
    # A turn that is left out hands its place in the conversation to the one before it.
    kept = (replace(t, after=()) for t in tasks if t.custom_id in known)
    return _conversations(kept), errors


def _in_a_cycle(tasks: Mapping[str, Task]) -> list[str]:
    """Names that are left when everything that can run has run, less what merely waits for them."""
    needs = {name: {*t.depends_on, *t.after} & tasks.keys() for name, t in tasks.items()}
    waiters: dict[str, list[str]] = {name: [] for name in tasks}
    for name, before in needs.items():
        for one in before:
            waiters[one].append(name)
    left = _peeled({name: len(before) for name, before in needs.items()}, waiters)
    counts = {name: sum(w in left for w in waiters[name]) for name in left}
    return list(_peeled(counts, {name: [n for n in needs[name] if n in left] for name in left}))


def _peeled(counts: dict[str, int], then: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """What is left when whatever counts 0 is taken away and counts off what comes `then`."""
    free = [name for name, count in counts.items() if not count]
    while free:
        gone = free.pop()
        del counts[gone]
        for name in then[gone]:
            counts[name] -= 1
            if not counts[name]:
                free.append(name)
    return counts
