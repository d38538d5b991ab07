"""The journal: each task ends exactly once in its file, whatever happens between."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from keepwarm.batch.journal import DiskFullError, Entry, Journal, UnwritableError, disk_errors
from keepwarm.errors import ConfigError


def entry(key: str, *, ok: bool = True) -> Entry:
    text = json.dumps({"custom_id": key}).encode() + b"\n"
    return Entry(key, ok, "results" if ok else "errors", "digest", text, {"n": 1})


class Place:
    def __init__(self, root: Path) -> None:
        self.results = root / "out.jsonl"
        self.errors = root / "out.errors.jsonl"
        self.path = root / "out.jsonl.journal"

    def open(self, **options: Any) -> Journal:
        return Journal(self.path, results=self.results, errors=self.errors, **options)

    def ids(self, which: str = "results") -> list[str]:
        path = self.results if which == "results" else self.errors
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(line)["custom_id"] for line in lines]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_has_ended_is_in_its_file_and_private(place: Place) -> None:
    journal = place.open()
    journal.end([entry("a"), entry("b", ok=False)])
    assert place.ids() == ["a"]
    assert place.ids("errors") == ["b"]
    assert journal.ended() == {"a": (True, "digest"), "b": (False, "digest")}
    for path in (place.path, place.results, place.errors):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    journal.close()


def test_ending_twice_is_ending_once(place: Place) -> None:
    journal = place.open()
    journal.end([entry("a")])
    journal.end([entry("a"), entry("a", ok=False)])
    journal.close()
    assert place.ids() == ["a"]
    assert place.ids("errors") == []


@pytest.mark.parametrize("torn", [b"", b'{"custom_id": "c"', b'{"custom_id": "x"}\n'])
def test_a_line_that_was_half_written_or_not_noted_is_there_once(place: Place, torn: bytes) -> None:
    journal = place.open()
    journal.end([entry("a")])
    journal.end([entry("b")])
    journal.end([entry("c")])
    journal.close()
    # As after SIGKILL between the commit and the end of the append.
    raw = place.results.read_bytes()
    place.results.write_bytes(raw[: raw.index(b'{"custom_id": "c"')] + torn)
    place.open().close()
    assert place.ids() == ["a", "b", "c"]


def test_results_that_were_lost_are_written_anew_until_all_has_ended(place: Place) -> None:
    journal = place.open()
    journal.end([entry("a"), entry("b")])
    journal.end([entry("c")])
    journal.close()
    place.results.unlink()
    journal = place.open()
    assert place.ids() == ["a", "b", "c"]
    journal.finish()
    journal.close()
    place.results.unlink()
    with pytest.raises(ConfigError, match="lost lines"):
        place.open()


def test_after_the_end_nothing_is_appended_again(place: Place) -> None:
    journal = place.open()
    journal.end([entry("a"), entry("b", ok=False)])
    journal.finish()
    journal.close()
    journal = place.open()
    assert (place.ids(), place.ids("errors")) == (["a"], ["b"])
    tasks, _ = journal.stats()
    assert [row["custom_id"] for row in tasks] == ["a", "b"]
    journal.close()


def test_results_without_a_journal_are_not_touched(place: Place) -> None:
    place.results.write_text("mine\n")
    with pytest.raises(ConfigError, match="is there already"):
        place.open()
    assert place.results.read_text() == "mine\n"
    assert not place.path.exists()


def test_two_processes_cant_run_the_same_tasks(place: Place) -> None:
    journal = place.open()
    with pytest.raises(ConfigError, match="Another keepwarm"):
        place.open()
    journal.close()
    place.open().close()


def test_a_file_that_is_no_journal_is_told(place: Place) -> None:
    place.path.write_bytes(b"not a database, " * 100)
    with pytest.raises(ConfigError, match="damaged or no journal"):
        place.open()


def test_failures_are_counted_until_the_task_has_ended(place: Place) -> None:
    journal = place.open()
    journal.failed("a")
    journal.failed("a")
    journal.close()
    journal = place.open()
    assert journal.failures() == {"a": 2}
    journal.end([entry("a")])
    assert journal.failures() == {}
    journal.close()


def test_a_full_results_disk_keeps_the_result_and_writes_it_later(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = place.open()
    journal.end([entry("a")])
    real = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) > 5:
            return real(fd, bytes(data[:5]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("keepwarm.batch.journal.os.write", full)
    with pytest.raises(DiskFullError):
        journal.end([entry("b")])
    assert place.ids() == ["a"]
    monkeypatch.undo()
    journal.flush()
    assert place.ids() == ["a", "b"]
    journal.close()


def test_a_full_journal_disk_raises_and_the_same_call_succeeds_later(place: Place) -> None:
    place.open().close()
    # The limit holds for a process of its own, so that SQLite meets a real error of the system.
    code = f"""
import resource, signal, sys
from keepwarm.batch.journal import DiskFullError, Entry, Journal, UnwritableError, disk_errors
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path({str(place.path)!r}), results=Path({str(place.results)!r}),
    errors=Path({str(place.errors)!r}))
big = Entry("big", True, "results", "d", b'{{"custom_id": "big"}}' + b" " * 400_000 + b"\\n", {{}})
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    journal.end([big])
except DiskFullError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    journal.end([big])
    journal.close()
    sys.exit(7)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 7, done.stderr
    assert place.ids() == ["big"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_commit_that_never_came_leaves_the_task_to_be_run(place: Place) -> None:
    journal = place.open()
    journal.end([entry("a")])
    journal.close()
    db = sqlite3.connect(place.path)
    db.execute("DELETE FROM ended WHERE key='a'")
    db.execute("UPDATE landed SET size_bytes=0, seq=0")
    db.commit()
    db.close()
    journal = place.open()
    # The line was in the file, but the journal doesn't say so: cut, and written when it ends.
    assert place.ids() == []
    journal.end([entry("a")])
    assert place.ids() == ["a"]
    journal.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, DiskFullError),
        (sqlite3.SQLITE_IOERR_WRITE, DiskFullError),
        (sqlite3.SQLITE_BUSY, UnwritableError),
        (sqlite3.SQLITE_READONLY, UnwritableError),
        (sqlite3.SQLITE_CANTOPEN, UnwritableError),
        (sqlite3.SQLITE_CORRUPT, ConfigError),
        (sqlite3.SQLITE_NOTADB, ConfigError),
    ],
)
def test_an_error_of_sqlite_says_whether_waiting_helps(
    tmp_path: Path, code: int, kind: type[Exception]
) -> None:
    error = sqlite3.OperationalError("something raw")
    error.sqlite_errorcode = code
    with pytest.raises(kind), disk_errors(tmp_path):
        raise error


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.ENODEV, errno.ENOENT])
def test_a_disk_that_is_read_only_or_gone_may_come_back(tmp_path: Path, code: int) -> None:
    with pytest.raises(UnwritableError) as raised, disk_errors(tmp_path):
        raise OSError(code, os.strerror(code))
    assert raised.value.retry


def test_a_database_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl.journal"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE ledger (name TEXT)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="no journal, and is left alone"):
        Journal(path, results=tmp_path / "out.jsonl", errors=tmp_path / "errors.jsonl")
    assert path.read_bytes() == before
