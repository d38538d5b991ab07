"""What changes is found, and what doesn't is left alone."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.tiers import Volatile, find_volatile

CHANGES = [
    ("date", "Today Date: 26 Jul 2024", "26 Jul 2024"),
    ("date", "Today is 2025-03-01.", "2025-03-01"),
    ("date", "Built 2025-03-01T12:30:05Z by CI", "2025-03-01T12:30:05Z"),
    ("date", "It is 2025/03/01 14:05 here", "2025/03/01 14:05"),
    ("date", "on 5/1/2025 we met", "5/1/2025"),
    ("date", "am 01.05.2025 war", "01.05.2025"),
    ("date", "on Monday, March 3, 2025, we", "Monday, March 3, 2025"),
    ("date", "the 3rd of May 2025", "3rd of May 2025"),
    ("date", "Thursday, 6 June", "Thursday, 6 June"),
    ("date", "Today is Monday.", "Monday"),
    ("date", "The current date is March 2025.", "March 2025"),
    ("time", "The current time is 14:05.", "14:05"),
    ("time", "It is now 2:30 pm in Rome", "2:30 pm"),
    ("time", "logged at 14:05:33,120", "14:05:33,120"),
    ("time", "server clock 09:00 UTC", "09:00 UTC"),
    ("time", "[09:41] hello", "09:41"),
    ("time", "started_at 1741000000", "1741000000"),
    ("time", "stamp 1741000000123", "1741000000123"),
    ("path", "Your files are in /home/anna/notes.", "/home/anna/notes"),
    ("path", "cwd: /Users/anna/src/app", "/Users/anna/src/app"),
    ("path", "see /tmp/run-7/out.txt for it", "/tmp/run-7/out.txt"),
    ("path", "Working directory: /projects/blue/web", "/projects/blue/web"),
    ("path", r"open C:\Users\anna\notes.txt now", r"C:\Users\anna\notes.txt"),
    ("path", "file:///srv/a/b.md", "file:///srv/a/b.md"),
    ("id", "session 123e4567-e89b-12d3-a456-426614174000", "123e4567-e89b-12d3-a456-426614174000"),
    ("id", "trace 4bf92f3577b34da6a3ce929d0e0e4736", "4bf92f3577b34da6a3ce929d0e0e4736"),
    ("id", "span 00f067aa0ba902b7", "00f067aa0ba902b7"),
    ("id", "at commit 04d1cc2", "commit 04d1cc2"),
    ("id", "request req_8f3kQ2mZ4x", "req_8f3kQ2mZ4x"),
    ("host", "You run on mars.local", "mars.local"),
    ("host", "db-1.prod.internal answers", "db-1.prod.internal"),
    ("host", "Hostname: thinkpad-x1", "thinkpad-x1"),
    ("ip", "the printer is 192.168.1.20", "192.168.1.20"),
    ("ip", "peer fe80::1ff:fe23:4567:890a", "fe80::1ff:fe23:4567:890a"),
    ("pid", "You are PID 41233", "41233"),
    ("pid", "process id: 812", "812"),
]

STAYS = [
    "Write dates as YYYY-MM-DD and times as HH:MM.",
    "Open from 9:00 to 17:00, every Monday and on 25 December.",
    "You may 2 or 3 times ask. In May the garden needs water.",
    "llama.cpp b11434, Python 3.11.4, HTTP/1.1, version 10.2.3.4, v1.2.3.4",
    "Listen on 127.0.0.1:8090, localhost, ::1 or 0.0.0.0.",
    "POST /v1/chat/completions and GET /health, then /keepwarm/status/now.",
    "Use /usr/bin/env, /etc/hosts, /dev/null, ~/notes and ./configs/prompt-tiers.",
    "See https://example.com/home/page and https://docs.python.org/3/tmp/x.html.",
    "error in parser.py:12:30, at 16:9, ratio 4:30",
    "The answer is 42, or 123456789012, or 1,741,000,000.",
    "call_function_name, session_identifier, call_function1, run-anything",
    "deadbeef, effaced, 0xff, #aabbcc, std::vector, a::b",
    "and/or, he/she, input/output, km/h",
    "The pid of a process, the host name, an IP address.",
    "Set settings.local.json and docker-compose.local.yml aside.",
    "100.5.3 and 3.14 and 1/2/3",
]


@pytest.mark.parametrize(("kind", "text", "excerpt"), CHANGES)
def test_what_changes_is_found(kind: str, text: str, excerpt: str) -> None:
    found = find_volatile(text)
    assert [(v.kind, v.excerpt) for v in found] == [(kind, excerpt)]


@pytest.mark.parametrize("text", STAYS)
def test_what_stays_is_left_alone(text: str) -> None:
    assert find_volatile(text) == []


def test_places_are_told_by_line_and_column_from_one() -> None:
    text = "one\n\n  on 2025-03-01 at 192.168.0.7\nPID 4321"
    assert find_volatile(text) == [
        Volatile(3, 6, "date", "2025-03-01"),
        Volatile(3, 20, "ip", "192.168.0.7"),
        Volatile(4, 5, "pid", "4321"),
    ]


def test_a_date_with_a_time_is_one_finding() -> None:
    assert [v.kind for v in find_volatile("now 2025-03-01 12:30:05 +0200")] == ["date"]


def test_a_long_finding_has_a_short_excerpt() -> None:
    (found,) = find_volatile("/home/" + "x" * 200)
    assert len(found.excerpt) == 60
    assert found.excerpt.endswith("…")


@given(st.text(max_size=200), st.uuids(), st.text(max_size=200))
def test_an_id_is_found_at_its_place_in_any_text(before: str, id_: uuid.UUID, after: str) -> None:
    text = f"{before}\n{id_} {after}"
    line = text[: len(before) + 1].count("\n") + 1
    assert any(
        (v.line, v.column, v.kind, v.excerpt) == (line, 1, "id", str(id_))
        for v in find_volatile(text)
    )


@given(st.text(alphabet="0123456789abcdef:/.-\\ \nTZ[]MayonPID", max_size=300))
def test_every_finding_lies_in_the_text(text: str) -> None:
    lines = text.split("\n")
    for found in find_volatile(text):
        rest = "\n".join([lines[found.line - 1][found.column - 1 :], *lines[found.line :]])
        shown = found.excerpt.removesuffix("…")
        assert " ".join(rest.split()).startswith(shown)
