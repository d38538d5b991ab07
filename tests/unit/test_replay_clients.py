"""Recorded sessions that are sent again: what is read of them, and their sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.replay_clients import (
    Evaluated,
    Measured,
    Recorded,
    is_lawful,
    recordings,
    rows_of,
)


def line(phase: str, path: str, body: dict[str, Any]) -> str:
    headers = [["Host", "x"], ["anthropic-version", "1"]]
    row = {"n": 1, "phase": phase, "method": "POST", "path": path, "headers": headers, "body": body}
    return json.dumps(row)


def test_a_recording_is_read_without_what_only_counts(tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hello."}]}
    lines = [
        line("A", "/v1/messages?beta=true", body),
        line("A", "/v1/messages/count_tokens", body),
    ]
    (tmp_path / "one.jsonl").write_text("\n".join(lines))
    (asked,) = recordings(tmp_path)["one"]
    assert asked.api == "messages"
    assert asked.headers == {"anthropic-version": "1"}
    assert asked.chat["messages"] == body["messages"]


def test_a_reply_is_whole_and_kept_short_in_the_clients_own_words() -> None:
    def short(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return Recorded("one", "A", path, {}, body).short

    chat, responses = "/v1/chat/completions", "/v1/responses"
    assert short(chat, {"stream": True}) == {"max_tokens": 8, "stream": False}
    assert short(responses, {"stream_options": {}}) == {"max_output_tokens": 8, "stream": False}
    own = {"max_completion_tokens": 900}
    assert short(chat, own) == {"max_completion_tokens": 8, "stream": False}


def measured(*, keepwarm: int, bare: int = 2000, least: int = 1000) -> Measured:
    requests = [Recorded("one", phase, "/v1/chat/completions", {}, {}) for phase in "AB"]

    def of(tokens: int) -> list[Evaluated]:
        return [Evaluated(3000, tokens), Evaluated(100, 10)]

    return Measured(requests, of(least), of(keepwarm), of(20), of(bare))


def test_sums_are_told_by_phase_and_in_all() -> None:
    assert rows_of(measured(keepwarm=1100)) == [
        ("A", (3000, 1000, 1100, 20, 2000)),
        ("B", (100, 10, 10, 10, 10)),
        ("all", (3100, 1010, 1110, 30, 2010)),
    ]


def test_more_than_the_least_or_than_the_bare_engine_breaks_the_law() -> None:
    assert is_lawful(measured(keepwarm=1500))
    assert not is_lawful(measured(keepwarm=1600))
    assert not is_lawful(measured(keepwarm=1500, bare=900))
