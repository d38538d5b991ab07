"""`keepwarm batch` as far as it needs no server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from typer.testing import CliRunner

from batchsamples import document, line
from keepwarm.cli.batch import app

NOWHERE = ["--base", "http://127.0.0.1:9", "--wait", "0"]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def closed_hours() -> str:
    now = time.localtime().tm_hour
    return f"{(now + 2) % 24:02d}:00-{(now + 3) % 24:02d}:00"


def test_a_plan_without_a_server_says_what_is_shared(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    tasks = [line(f"t{i}", f"{document(i % 2)} Part {i}?") for i in range(8)]
    file.write_bytes(b"{bad\n" + b"".join(tasks))
    code, said = run("plan", str(file), "--slots", "2", "--json")
    assert code == 0, said
    plan = json.loads(said[said.index("{\n") :])
    assert (plan["tasks"], plan["lanes"], plan["fills"]) == (8, 2, 2)
    assert sorted(plan["order"]) == [f"t{i}" for i in range(8)]
    assert [e["line"] for e in plan["errors"]] == [1]
    code, said = run("plan", str(file))
    assert code == 0
    assert "Report 0." in said
    assert "least possible" in said


def test_a_file_that_isnt_there_is_one_clear_error(tmp_path: Path) -> None:
    code, said = run("plan", str(tmp_path / "none.jsonl"))
    assert code == 1
    assert "can't be read" in said


def test_a_server_that_isnt_there_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(line("a"))
    code, said = run("run", str(file), "-o", str(tmp_path / "out.jsonl"), *NOWHERE)
    assert code == 1
    assert "No Keepwarm answers" in said
    assert not (tmp_path / "out.jsonl").exists()


def test_a_watch_outside_its_hours_ends_and_leaves_the_files(tmp_path: Path) -> None:
    file = tmp_path / "night.jsonl"
    file.write_bytes(line("a"))
    os.utime(file, (1e9, 1e9))
    code, said = run("watch", str(tmp_path), "--once", "--hours", closed_hours(), *NOWHERE)
    assert code == 0, said
    assert "outside the hours" in said
    assert file.exists()


def test_an_empty_directory_ends_a_watch_once(tmp_path: Path) -> None:
    assert run("watch", str(tmp_path), "--once", *NOWHERE)[0] == 0
    assert run("watch", str(tmp_path / "none"), "--once", *NOWHERE)[0] == 1
