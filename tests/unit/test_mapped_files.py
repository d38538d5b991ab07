"""A file that somebody cuts while it is read is an error at the worst, never a SIGBUS."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from keepwarm.store import disk
from keepwarm.store.disk import map_file
from storesamples import opened, refused, restored, save, settings_in, slot_file

PAGE = 4096

# Maps a file, says so, and touches its last page once somebody has tried to cut it.
_READER = """
import sys
from pathlib import Path
from keepwarm.store.disk import map_file
found = map_file(Path(sys.argv[1]))
print("mapped", flush=True)
sys.stdin.readline()
print(found[-1], flush=True)
"""


def test_a_file_that_is_cut_while_it_is_mapped_does_not_end_the_process(tmp_path: Path) -> None:
    path = tmp_path / "1.rows"
    path.write_bytes(b"\x07" * 64 * PAGE)
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin
    assert reader.stdout
    assert reader.stdout.readline() == "mapped\n"
    cutter = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.truncate(sys.argv[1], 0)", str(path)]
    )
    with suppress(subprocess.TimeoutExpired):  # or it is done, where nothing makes it wait
        cutter.wait(0.5)
    said, _ = reader.communicate("go\n", timeout=30)
    assert reader.returncode == 0, f"ended by {-reader.returncode}"
    assert said == "7\n"
    assert cutter.wait(30) == 0, "who cuts it waits no longer than it is mapped"
    assert path.stat().st_size == 0


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="leases are Linux's")
def test_a_file_that_is_being_written_is_read_instead(tmp_path: Path) -> None:
    path = tmp_path / "1.rows"
    path.write_bytes(b"\x07" * PAGE)
    assert not isinstance(map_file(path), bytes)
    with path.open("r+b") as writer:
        found = map_file(path)
        os.ftruncate(writer.fileno(), 0)
        assert found == b"\x07" * PAGE


def test_without_leases_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_lease", lambda _fd: False)
    monkeypatch.setattr("keepwarm.store.files.READ_BELOW_BYTES", 1)
    store = opened(settings_in(tmp_path))
    extent = save(store, [1, 2, 3]).extent_id
    store.staging.forget()
    assert restored(store, extent, 3) == slot_file([1, 2, 3], for_engine=True)
    store.staging.forget()
    os.truncate(store.shelf.files.root / "0000000001.rows", 5)
    with refused("truncated"):
        restored(store, extent, 3)
    store.close()
