"""Power cuts, kills and full disks at every step of a save."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import pytest

from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer, Layout
from keepwarm.store.checks import integrity
from keepwarm.store.disk import Disk, Written
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Origin
from storesamples import (
    HYBRID,
    PLAIN,
    WINDOWED,
    NoSyncDisk,
    digest_of,
    opened,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

FIRST = list(range(100, 130))
TURN = [*FIRST, *range(300, 320)]
OTHER = list(range(700, 730))

FORMS = pytest.mark.parametrize(
    "layout", [PLAIN, WINDOWED, HYBRID, None], ids=["plain", "windowed", "hybrid", "whole"]
)


class PowerCutError(BaseException):
    """Nothing in the store may catch this, as nothing catches the real one."""


class FailingDisk(Disk):
    """Fails at the n-th step once armed, and knows what a power cut at that moment would lose."""

    def __init__(self, fail: Callable[[str], None]) -> None:
        self.fail = fail
        self.steps_left: int | None = None
        self.steps: list[str] = []
        self.unsynced: set[Path] = set()
        self.renamed: dict[Path, Path] = {}
        self.unlinked: dict[Path, bytes] = {}

    def arm(self, step: int) -> None:
        self.steps_left = step

    def step(self, name: str) -> bool:
        self.steps.append(name)
        if self.steps_left is None:
            return False
        self.steps_left -= 1
        return self.steps_left < 0

    def check(self, name: str) -> None:
        if self.step(name):
            self.steps_left = None
            self.fail(name)

    def write_new(self, path: Path, buffers: Iterable[Buffer], *, seal: bytes = b"") -> Written:
        self.check("create")
        self.unsynced.add(path)
        written = super().write_new(path, buffers, seal=seal)
        self.unsynced.discard(path)
        return written

    def write(self, fd: int, buffers: Iterable[Buffer], *, seal: bytes = b"") -> Written:
        pieces = [bytes(buffer) for buffer in buffers]
        whole = b"".join(pieces)
        super().write(fd, [whole[: len(whole) // 2]])
        self.check("write")
        os.lseek(fd, 0, os.SEEK_SET)
        return super().write(fd, pieces, seal=seal)

    def sync_file(self, fd: int) -> None:
        self.check("sync file")

    def rename(self, source: Path, target: Path) -> None:
        self.check("rename")
        super().rename(source, target)
        self.renamed[target] = source

    def sync_dir(self, path: Path) -> None:
        self.check("sync directory")
        self.renamed.clear()
        self.unlinked.clear()

    def unlink(self, path: Path) -> None:
        self.check("unlink")
        if path.is_file():
            self.unlinked[path] = path.read_bytes()
        super().unlink(path)

    def commit(self, connection: sqlite3.Connection) -> None:
        self.check("commit")
        super().commit(connection)
        self.check("committed")

    def lose_what_was_not_flushed(self, original: Path, copy: Path) -> None:
        """Make `copy` of the store's root what might be found after the power is back."""

        def there(path: Path) -> Path:
            return copy / path.relative_to(original)

        for path, content in self.unlinked.items():
            if path.is_relative_to(original):
                there(path).write_bytes(content)
        for target, source in self.renamed.items():
            if target.is_relative_to(original) and there(target).exists():
                there(target).rename(there(source))
        for path in self.unsynced:
            if path.is_relative_to(original) and there(path).exists():
                os.truncate(there(path), there(path).stat().st_size // 2)


def cut(_: str) -> None:
    raise PowerCutError


def after_power_cut(base: Path, disk: FailingDisk, *, lossy: bool, layout: Layout | None) -> Path:
    """A copy of what is on the disk at this moment, for the next life to open."""
    copy = base / "next"
    shutil.copytree(base / "store", copy / "store")
    if lossy:
        disk.lose_what_was_not_flushed(base / "store", copy / "store")
    return copy


def check_next_life(
    base: Path, layout: Layout | None, *, certain: list[list[int]], possible: list[list[int]]
) -> None:
    """What was saved before is there; what was being saved is there in full, or not at all."""
    store = opened(settings_in(base, layout), NoSyncDisk())
    assert store.shelf.report.set_aside is None
    assert integrity(store) == ()
    for tokens in certain:
        assert store.lookup([digest_of(tokens)], [""]) is not None
    for tokens in [*certain, *possible]:
        hit = store.lookup([digest_of(tokens)], [""])
        if hit is not None:
            assert hit.at_tokens == len(tokens)
            expected = slot_file(tokens, layout, for_engine=layout is not None)
            assert restored(store, hit.extent_id, hit.at_tokens) == expected
    for tokens in possible:
        save(store, tokens)
        assert store.lookup([digest_of(tokens)], [""]) is not None
    assert integrity(store) == ()
    store.close()


@FORMS
@pytest.mark.parametrize("lossy", [False, True], ids=["killed", "power-cut"])
def test_a_cut_at_any_step_of_a_save_loses_at_most_that_save(
    tmp_path: Path, layout: Layout | None, *, lossy: bool
) -> None:
    for step in count():
        base = tmp_path / str(step)
        disk = FailingDisk(cut)
        store = opened(settings_in(base, layout), disk)
        save(store, FIRST)
        disk.steps.clear()
        disk.arm(step)
        try:
            save(store, TURN)
        except PowerCutError:
            copy = after_power_cut(base, disk, lossy=lossy, layout=layout)
            # "committed" is the step after the commit: from there on the save counts.
            done = [TURN] if disk.steps[-1] == "committed" else []
            check_next_life(copy, layout, certain=[FIRST, *done], possible=[TURN])
            if step > 50:
                pytest.fail("a save of this many steps")
            continue
        break
    assert {"create", "write", "sync file", "rename", "sync directory", "commit"} <= {*disk.steps}


@FORMS
@pytest.mark.parametrize("lossy", [False, True], ids=["killed", "power-cut"])
def test_a_cut_at_any_step_of_an_eviction_loses_only_what_was_to_go(
    tmp_path: Path, layout: Layout | None, *, lossy: bool
) -> None:
    for step in count():
        base = tmp_path / str(step)
        disk = FailingDisk(cut)
        store = opened(settings_in(base, layout), disk)
        kept = save(store, FIRST)
        store.pin(
            "x", kept.extent_id, len(FIRST), origin=Origin.TIER, digest=None, prefill_s=1, now_s=0
        )
        save(store, TURN)
        disk.steps.clear()
        disk.arm(step)
        try:
            store.prune(0)
        except PowerCutError:
            copy = after_power_cut(base, disk, lossy=lossy, layout=layout)
            check_next_life(copy, layout, certain=[FIRST], possible=[TURN])
            continue
        break
    assert {"commit", "unlink"} <= {*disk.steps}


@FORMS
@pytest.mark.parametrize("lossy", [False, True], ids=["killed", "power-cut"])
def test_a_cut_while_quarantining_leaves_nothing_doubtful(
    tmp_path: Path, layout: Layout | None, *, lossy: bool
) -> None:
    for step in count():
        base = tmp_path / str(step)
        disk = FailingDisk(cut)
        store = opened(settings_in(base, layout), disk)
        save(store, OTHER)
        bad = save(store, FIRST)
        save(store, TURN)
        disk.steps.clear()
        disk.arm(step)
        try:
            store.forget_ready(store.shelf.quarantine_extent(bad.extent_id))
        except PowerCutError:
            copy = after_power_cut(base, disk, lossy=lossy, layout=layout)
            check_next_life(copy, layout, certain=[OTHER], possible=[FIRST, TURN])
            continue
        break


def full(name: str) -> None:
    if name == "committed":
        return
    if name == "commit":
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@FORMS
def test_a_disk_that_is_full_at_any_step_leaves_nothing_and_a_usable_store(
    tmp_path: Path, layout: Layout | None
) -> None:
    for step in count():
        base = tmp_path / str(step)
        disk = FailingDisk(full)
        store = opened(settings_in(base, layout), disk)
        save(store, FIRST)
        before = store.shelf.used_bytes
        disk.steps.clear()
        disk.arm(step)
        reason = None
        try:
            save(store, TURN)
        except SnapshotError as error:
            reason = error.reason
        if reason is not None:
            assert reason == "no_space"
            assert store.shelf.used_bytes == before
            assert integrity(store) == ()
            assert store.lookup([digest_of(TURN)], [""]) is None
            assert save(store, TURN).at_tokens == len(TURN)
            assert integrity(store) == ()
            store.close()
            check_next_life(base, layout, certain=[FIRST, TURN], possible=[OTHER])
            continue
        if disk.steps_left is not None:  # the save ended before this step
            break
    assert {"create", "write", "sync file", "rename", "commit"} <= {*disk.steps}


def test_an_index_that_is_really_full_refuses_the_save(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    save(store, FIRST)
    pages = store.shelf.index._db.execute("PRAGMA page_count").fetchone()[0]
    store.shelf.index._db.execute(f"PRAGMA max_page_count={pages}")
    with refused("no_space"):
        save(store, list(range(3000)))
    assert integrity(store) == ()
    store.shelf.index._db.execute("PRAGMA max_page_count=1000000")
    save(store, list(range(3000)))
    assert integrity(store) == ()


def test_a_full_disk_can_be_eased_though_the_index_cannot_be_written(tmp_path: Path) -> None:
    disk = FailingDisk(full)
    store = opened(settings_in(tmp_path), disk)
    save(store, FIRST)
    save(store, OTHER)
    disk.arm(0)
    removed = store.prune(0)
    assert len(removed.extents) == 2
    assert not list(store.shelf.files.root.glob("*.rows"))
    assert save(store, TURN).new_tokens == len(TURN)
    store.close()
    store = opened(settings_in(tmp_path), NoSyncDisk())
    assert store.shelf.report.lines() == [], "once the files had made room, it could be"
    hit = store.lookup([digest_of(TURN)], [""])
    assert hit is not None
    assert restored(store, hit.extent_id, len(TURN)) == slot_file(TURN)
    assert integrity(store) == ()


def test_no_room_in_staging_leaves_no_file_there(tmp_path: Path) -> None:
    class FullStaging(NoSyncDisk):
        is_full = False

        def write_staged(self, fd: int, buffers: Iterable[Buffer]) -> Written:
            size = super().write_staged(fd, list(buffers)[:2])
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return size

    disk = FullStaging()
    store = opened(settings_in(tmp_path), disk)
    saved = save(store, FIRST)
    store.staging.forget()
    disk.is_full = True
    with refused("no_space"):
        store.materialize(saved.extent_id, 20)
    assert list((tmp_path / "staging").glob("*.slot*")) == []
    assert store.staging.used_bytes == 0


SAVING_CHILD = """
import sys
from pathlib import Path
from storesamples import opened, save, settings_in
store = opened(settings_in(Path(sys.argv[1])))
tokens = []
for turn in range(1000):
    tokens = [*tokens[:turn % 50], *range(turn, turn + 10)]
    save(store, tokens)
    print(*tokens, flush=True)
"""


@pytest.mark.parametrize("saves", [1, 7, 20])
def test_what_was_said_to_be_saved_outlives_a_kill(tmp_path: Path, saves: int) -> None:
    paths = [str(Path(__file__).parents[1]), *sys.path]
    child = subprocess.Popen(
        [sys.executable, "-c", SAVING_CHILD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(saves)]
    child.send_signal(signal.SIGKILL)
    said += child.stdout.readlines()
    child.wait()
    store: Snapshots = opened(settings_in(tmp_path), NoSyncDisk())
    assert integrity(store) == ()
    for line in said:
        tokens = [int(word) for word in line.split()]
        if line.endswith("\n"):
            hit = store.lookup([digest_of(tokens)], [""])
            assert hit is not None
            assert restored(store, hit.extent_id, hit.at_tokens) == slot_file(tokens)
    assert list((tmp_path / "staging").glob("*.new")) == []
