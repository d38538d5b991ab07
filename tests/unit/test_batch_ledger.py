"""The ledger removes what it wrote down that it made, and nothing else."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from keepwarm.batch.journal import Journal
from keepwarm.batch.ledger import Ledger
from keepwarm.errors import ConfigError


def _upload(ledger: Ledger, content: bytes = b"{}\n") -> str:
    part = ledger.part()
    part.write_bytes(content)
    made = ledger.add_file(part, namespace="", filename="a.jsonl", purpose="batch")
    ledger.drop_part(part)
    return str(made["id"])


def _files_under(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def _begun_batch(ledger: Ledger, file_id: str) -> str:
    batch = ledger.add_batch(
        namespace="",
        input_file_id=file_id,
        endpoint="/v1/chat/completions",
        window="24h",
        window_s=60,
        metadata=None,
    )
    return str(batch["id"])


def test_files_of_others_in_its_directory_stay(tmp_path: Path) -> None:
    theirs = {
        "files/letter.txt": b"dear",
        "files/file-0123456789abcdef01234567": b"looks like ours and isn't",
        "files/part-0123456789abcdef0123456789abcdef": b"looks like ours and isn't",
        "files/photos/one.jpg": b"jpg",
        "journals/2026.journal": b"my diary",
        "journals/batch_0123456789abcdef01234567.journal": b"looks like ours and isn't",
    }
    for name, content in theirs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        ledger = Ledger(tmp_path)
        file_id = _upload(ledger)
        assert ledger.used_bytes() == 3  # theirs aren't counted, either
        ledger.finish(_begun_batch(ledger, file_id), status="completed")
        ledger.delete_file(file_id, "")
        ledger.close()
    for name, content in theirs.items():
        assert (tmp_path / name).read_bytes() == content


def test_what_a_crash_left_of_an_upload_goes_with_the_next_one(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    kept = _upload(ledger)
    ledger.part().write_bytes(b"half of it")
    ledger.close()

    ledger = Ledger(tmp_path)
    assert ledger.used_bytes() == 13
    assert len(_files_under(tmp_path / "files")) == 2  # nothing is removed by opening
    _upload(ledger)
    assert ledger.used_bytes() == 6
    assert kept in _files_under(tmp_path / "files")
    ledger.close()


def test_a_running_upload_is_not_taken_for_what_a_crash_left(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    slow = ledger.part()
    slow.write_bytes(b"half")
    _upload(ledger)
    assert slow.exists()
    ledger.drop_part(slow)
    assert not slow.exists()
    ledger.close()


def test_a_deletion_that_was_cut_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    file_id = _upload(ledger)

    def cannot(path: Path, missing_ok: bool = False) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", cannot)
        ledger.delete_file(file_id, "")
    assert (tmp_path / "files" / file_id).exists()
    _upload(ledger)
    assert not (tmp_path / "files" / file_id).exists()
    ledger.close()


def test_the_journal_of_an_ended_batch_goes_and_its_results_stay(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    batch_id = _begun_batch(ledger, _upload(ledger))
    paths = ledger.paths(batch_id)
    Journal(paths.journal, results=paths.results, errors=paths.errors).close()
    paths.results.write_bytes(b"{}\n")
    paths.errors.write_bytes(b"")
    ended = ledger.finish(batch_id, status="completed")
    assert ended["output_file_id"] == paths.results.name
    assert paths.results.exists()
    assert not paths.errors.exists()
    assert not paths.journal.exists()
    ledger.close()
    with sqlite3.connect(tmp_path / "batches.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM refuse").fetchone() == (0,)


def test_a_database_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "batches.sqlite"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE files (name TEXT)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="isn't Keepwarm's"):
        Ledger(tmp_path)
    assert path.read_bytes() == before
