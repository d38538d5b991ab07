"""What becomes of a task: its line in the results or the errors, and what is known of its run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from keepwarm.batch.journal import Entry
from keepwarm.batch.lines import error_line, result_line
from keepwarm.batch.senders import Answer
from keepwarm.batch.tasks import LineError, Task
from keepwarm.core.reply import read_reply


def changed_tasks(tasks: Sequence[Task], ended: Mapping[str, tuple[bool, str]]) -> list[Task]:
    """Tasks that have ended under the same id with another body."""
    return [
        task
        for task in tasks
        if task.custom_id in ended and ended[task.custom_id][1] not in ("", task.digest)
    ]


def unusable(error: LineError) -> Entry:
    """A line that can't run."""
    line = error_line(error.custom_id, code=error.code, message=error.message, line=error.line)
    return Entry(f"\0line {error.line}: {error.code}", False, "errors", "", line, {})


def lost(task: Task, because: str) -> Entry:
    """A task that can't run, since another has failed."""
    line = error_line(
        task.custom_id,
        code="dependency_failed",
        message=f"It depends on {because}, which has failed.",
    )
    now_s = time.time()
    stats = {"began_s": now_s, "ended_s": now_s, "attempts": 0}
    return Entry(task.custom_id, False, "errors", task.digest, line, stats)


def success(task: Task, answer: Answer, stats: dict[str, Any]) -> Entry:
    """A task that was answered, with the engine's counts beside what `stats` has."""
    line = result_line(
        task.custom_id, status=answer.status, request_id=answer.request_id, body=answer.body
    )
    counts = read_reply(answer.body, streamed=False).counts
    tier = answer.headers.get("x-keepwarm-tier", "").partition(";")[0].strip()
    stats["plan"] = answer.headers.get("x-keepwarm-plan", "")
    stats["tier"] = tier or "none"
    slot = _number(answer.headers.get("x-keepwarm-slot"), stats["lane"])
    stats["slot"] = row_of(answer, slot=slot, lane=stats["lane"])
    if counts is not None:
        # What the gateway has filled for this request, the engine counts as reused.
        filled = _number(answer.headers.get("x-keepwarm-filled"), 0)
        stats["cached"] = max(counts.cached - filled, 0)
        stats["prefilled"] = counts.prefilled + filled
        stats["decoded"] = counts.decoded
        stats["prefill_s"] = counts.prefill_s if not filled else 0.0
        stats["prefill_n"] = counts.prefilled if not filled else 0
    return Entry(task.custom_id, True, "results", task.digest, line, stats)


def row_of(answer: Answer, *, slot: int, lane: int) -> int:
    """Where it is in the picture: its slot; of a fleet, whose nodes all count from 0, its lane."""
    return lane if answer.node else slot


def failure(task: Task, answer: Answer | None, stats: dict[str, Any]) -> Entry:
    """A task that was refused, or tried too often; `answer` None if the server went away."""
    if answer is None:
        line = error_line(
            task.custom_id,
            code="connection_lost",
            message=f"The server went away {stats['attempts']} times while it had this task.",
        )
    else:
        code, message = _said(answer)
        line = error_line(
            task.custom_id,
            code=code,
            message=message,
            status=answer.status,
            request_id=answer.request_id,
            body=answer.body,
        )
    return Entry(task.custom_id, False, "errors", task.digest, line, stats)


def _said(answer: Answer) -> tuple[str, str]:
    """Code and message of an error's body, whatever it is."""
    try:
        error = msgspec.json.decode(answer.body)["error"]
        kind = error.get("type") or f"http_{answer.status}"
        return str(kind), str(error.get("message") or f"HTTP status {answer.status}")
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return f"http_{answer.status}", f"The server answered with HTTP status {answer.status}."


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() else otherwise


def expired(task: Task) -> Entry:
    """A task whose batch has run out of time before it began."""
    line = error_line(
        task.custom_id,
        code="batch_expired",
        message="The batch's completion window ended before this request could be executed.",
    )
    return Entry(task.custom_id, False, "errors", task.digest, line, {})
