"""The store removes what it can prove it made, never at start, and never for another's fault."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from keepwarm.errors import SnapshotError
from keepwarm.store.admin import leave_room
from keepwarm.store.checks import integrity, prune_root, stores
from keepwarm.store.index import SCHEMA_VERSION
from keepwarm.store.lock import OwnerLock, owner_of
from keepwarm.store.neighbours import hold
from keepwarm.store.places import is_store
from keepwarm.store.shelf import Shelf
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Origin
from storesamples import (
    HYBRID,
    PLAIN,
    NoSyncDisk,
    digest_of,
    opened,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

TEN = PLAIN.rows_bytes(10)


def run(start: int, count: int = 10) -> list[int]:
    return list(range(start, start + count))


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def of_ten(base: Path, extents: int, **changed: Any) -> Snapshots:
    return opened(settings_in(base, quota_bytes=extents * TEN, **changed), NoSyncDisk())


def filled(base: Path, extents: int, **changed: Any) -> Path:
    """A store that was closed again, with so many extents; its directory."""
    store = of_ten(base, 100, **changed)
    for i in range(extents):
        save(store, run(1000 * i))
    store.close()
    return store.shelf.settings.directory


def all_extents(store: Snapshots) -> Sequence[int]:
    return sorted(extent.id for extent in store.shelf.catalog.tree)


# A root that others use, too.


def test_whatever_else_lies_in_the_root_stays(tmp_path: Path) -> None:
    root = tmp_path / "store"
    theirs = {
        "poetry.lock": b"lock",
        "poetry/pyproject.toml": b"[tool]" * 10_000,
        "node-0.lock": b"",
        "node-0/store/0000000001.rows": b"a node's" * 10_000,
        "0123456789abcdef0123456789abcdef.lock": b"",
        "0123456789abcdef0123456789abcdef/0000000001.rows": b"a name like ours" * 10_000,
    }
    for name, content in theirs.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    store = of_ten(tmp_path, 2)
    for i in range(5):
        save(store, run(100 * i))
    assert len(all_extents(store)) == 2, "what isn't ours doesn't count, either"
    store.prune(0)
    store.close()
    prune_root(root, 0)
    found = contents(root)
    assert {name: found[name] for name in theirs} == theirs


def test_whatever_else_lies_in_a_stores_directory_stays(tmp_path: Path) -> None:
    old = filled(tmp_path, 3, fingerprint="before the upgrade")
    theirs = {"notes.txt": b"n", "000000002a.rows.bak": b"b", "quarantine/mine.rows": b"m" * 9999}
    for name, content in theirs.items():
        (old / name).write_bytes(content)
    store = of_ten(tmp_path, 3)
    for i in range(3):
        save(store, run(100 * i))
    found = contents(old)
    assert {name: found[name] for name in theirs} == theirs
    assert not list(old.glob("*.rows")), "its own files made room"

    own = store.shelf.settings.directory
    for name, content in theirs.items():
        (own / name).write_bytes(content)
    saved = save(store, run(900))
    store.shelf.quarantine_extent(saved.extent_id)
    store.close()
    store = of_ten(tmp_path, 3)
    store.prune(0)
    assert store.shelf.used_bytes == 0
    assert {name: contents(own)[name] for name in theirs} == theirs


def test_a_directory_whose_tag_names_another_is_not_ours(tmp_path: Path) -> None:
    old = filled(tmp_path, 1, fingerprint="before the upgrade")
    assert is_store(old)
    copy = old.with_name("f" * 32)
    shutil.copytree(old, copy)
    assert not is_store(copy)
    link = old.with_name("e" * 32)
    link.symlink_to(old)
    assert not is_store(link)


# An index that can't be used now.


def test_a_lost_index_costs_no_file_at_start(tmp_path: Path) -> None:
    directory = filled(tmp_path, 3)
    directory.with_suffix(".index").unlink()
    before = contents(directory)
    store = of_ten(tmp_path, 100)
    assert contents(directory) == before
    assert store.shelf.report.stray_files == 3
    assert store.shelf.used_bytes == 3 * TEN
    assert "left as they are" in store.shelf.report.lines()[0]
    saved = save(store, run(7))
    assert saved.extent_id == 4, "no file may replace one that is there"
    assert contents(directory).items() >= before.items()
    store.prune(10**9)
    assert [p.name for p in directory.glob("*.rows")] == ["0000000004.rows"]
    assert integrity(store) == ()


def test_files_without_rows_go_first_when_room_is_needed(tmp_path: Path) -> None:
    directory = filled(tmp_path, 3)
    directory.with_suffix(".index").unlink()
    store = of_ten(tmp_path, 4)
    for i in range(4):
        save(store, run(100 * i))
    assert len(all_extents(store)) == 4
    assert store.shelf.used_bytes == 4 * TEN


def test_files_that_come_back_are_found_by_the_next_start(tmp_path: Path) -> None:
    directory = filled(tmp_path, 3)
    away = tmp_path / "away"
    away.mkdir()
    for path in directory.glob("*.rows"):
        path.rename(away / path.name)
    store = of_ten(tmp_path, 100)
    assert all_extents(store) == []
    assert store.shelf.report.missing_files == 3
    store.close()
    for path in away.iterdir():
        path.rename(directory / path.name)
    store = of_ten(tmp_path, 100)
    assert all_extents(store) == [1, 2, 3]
    assert restored(store, 1, 10) == slot_file(run(0))


def test_a_busy_index_is_no_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = filled(tmp_path, 3)
    before = contents(directory)
    connect = sqlite3.connect

    def impatient(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return connect(*args, **kwargs | {"timeout": 0.05})

    holder = connect(directory.with_suffix(".index"), isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(sqlite3, "connect", impatient)
    with refused("index"):
        of_ten(tmp_path, 100)
    holder.close()
    assert contents(directory) == before
    store = of_ten(tmp_path, 100)
    assert all_extents(store) == [1, 2, 3]


@pytest.mark.parametrize("damage", ["zeros", "cut", "other", "tables"])
def test_a_damaged_index_is_set_aside_with_its_files(tmp_path: Path, damage: str) -> None:
    directory = filled(tmp_path, 3)
    index = directory.with_suffix(".index")
    files = contents(directory)
    match damage:
        case "zeros":
            index.write_bytes(b"\0" * index.stat().st_size)
        case "cut":
            index.write_bytes(index.read_bytes()[:6000])
        case "other":
            index.write_bytes(b"a text " * 1000)
        case "tables":
            with sqlite3.connect(index) as db:
                db.execute("DROP TABLE pins")
    broken = index.read_bytes()
    store = of_ten(tmp_path, 100)
    aside = directory.with_name(directory.name + ".1.aside")
    assert contents(aside) == files
    assert index.with_name(index.name + ".1.aside").read_bytes()[:4096] == broken[:4096]
    assert aside.name in (store.shelf.report.set_aside or "")
    assert integrity(store) == ()
    save(store, run(0))
    store.close()
    # Until room is needed: then it goes first.
    assert aside.exists()
    store = of_ten(tmp_path, 3)
    for i in range(3):
        save(store, run(100 * i))
    assert not aside.exists()
    assert len(all_extents(store)) == 3


def test_an_index_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    directory = filled(tmp_path, 3)
    with sqlite3.connect(directory.with_suffix(".index")) as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    before = contents(tmp_path / "store")
    with refused("index"):
        of_ten(tmp_path, 100)
    assert contents(tmp_path / "store") == before
    assert owner_of(directory.with_suffix(".lock")) is None


@pytest.mark.parametrize(
    "poison",
    [
        "UPDATE extents SET tokens = 'text' WHERE id = 2",
        "UPDATE extents SET tokens = x'0102' WHERE id = 2",
        "UPDATE extents SET origin = 'elsewhere' WHERE id = 2",
        "UPDATE extents SET prefill_s = 'much' WHERE id = 2",
        "UPDATE extents SET lo = -4 WHERE id = 2",
        "UPDATE extents SET parent = 2 WHERE id = 2",
        "UPDATE extents SET heat = 9e999 WHERE id = 2",
        "UPDATE extents SET checksum = NULL WHERE id = 2",
        "INSERT INTO pins VALUES ('x', 'y', 1, 'tier', NULL, 1, 1, NULL, 1)",
        "INSERT INTO pins VALUES ('x', 1, 10, 'nowhere', NULL, 1, 1, NULL, 1)",
        "INSERT INTO marks VALUES ('one', 2, 3, 4, 5)",
        "INSERT INTO boundaries VALUES (1, 'x', 5, x'00')",
    ],
)
def test_rows_that_make_no_sense_are_passed_over(tmp_path: Path, poison: str) -> None:
    directory = filled(tmp_path, 3)
    with sqlite3.connect(directory.with_suffix(".index")) as db:
        db.execute("PRAGMA ignore_check_constraints=ON")
        try:
            db.execute(poison)
        except sqlite3.IntegrityError:
            pytest.skip("the schema doesn't let it in")
    db.close()
    store = of_ten(tmp_path, 100)
    assert {1, 3} <= set(all_extents(store)) <= {1, 2, 3}
    assert restored(store, 3, 10) == slot_file(run(2000))
    save(store, run(1000))
    store.prune(10**9)
    assert integrity(store) == ()


def test_damaged_tokens_are_never_given_out(tmp_path: Path) -> None:
    """A pin's tokens are asked of the engine at the next start: they must be those saved."""
    store = of_ten(tmp_path, 100)
    saved = save(store, run(0))
    store.pin(
        "tier:x", saved.extent_id, 10, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0.0
    )
    store.close()
    with sqlite3.connect(store.shelf.index_path) as db:
        tokens = bytearray(db.execute("SELECT tokens FROM extents").fetchone()[0])
        tokens[3] ^= 0x80
        db.execute("UPDATE extents SET tokens = ?", (bytes(tokens),))
    db.close()
    store = of_ten(tmp_path, 100)
    with refused("checksum"):
        store.proved_tokens(saved.extent_id, 10)
    assert store.shelf.catalog.pins == {}
    assert integrity(store) == ()


# Layouts, and files from elsewhere.


def test_two_layouts_under_one_fingerprint_never_meet(tmp_path: Path) -> None:
    plain = filled(tmp_path, 3)
    before = contents(plain)
    hybrid = filled(tmp_path, 2, layout=HYBRID)
    whole = filled(tmp_path, 2, layout=None)
    assert len({plain, hybrid, whole}) == 3
    assert contents(plain) == before
    assert sorted(one.extents for one in stores(tmp_path / "store")) == [2, 2, 3]


# Several gateways on one root.


def test_gateways_on_one_root_share_its_quota(tmp_path: Path) -> None:
    one = of_ten(tmp_path, 10, fingerprint="one", staging=tmp_path / "a")
    for i in range(10):
        save(one, run(100 * i))
    other = of_ten(tmp_path, 10, fingerprint="other", staging=tmp_path / "b")
    with pytest.raises(SnapshotError, match="quota") as caught:
        save(other, run(0))
    assert "in use by" not in str(caught.value)
    assert "process" in str(caught.value), "it says who has the rest"
    assert len(all_extents(one)) == 10
    save(one, run(5000))
    assert len(all_extents(one)) == 5, "it leaves the other its half"
    for i in range(9):
        save(other, run(100 * i))
        total = one.shelf.used_bytes + other.shelf.used_bytes
        assert total <= 10 * TEN
    assert len(all_extents(other)) == 5
    assert len(all_extents(one)) == 5
    one.close()
    for i in range(9):
        save(other, run(9000 + 100 * i))
    assert len(all_extents(other)) == 10, "who has left leaves all of it"


def test_an_unloaded_models_store_leaves_room_and_stays_whatever_another_saves(
    tmp_path: Path,
) -> None:
    one = of_ten(tmp_path, 10, fingerprint="one", staging=tmp_path / "a")
    for i in range(10):
        save(one, run(100 * i))
    leave_room(one, 2)
    kept = len(all_extents(one))
    assert kept == 7, "half of the other's equal part is free"
    directory = one.shelf.settings.directory
    one.close()
    lock = hold(directory, what="a test")
    assert lock is not None
    other = of_ten(tmp_path, 10, fingerprint="other", staging=tmp_path / "b")
    for i in range(9):
        save(other, run(100 * i))
    assert len(all_extents(other)) == 3
    assert len(list(directory.glob("*.rows"))) == kept
    # One that has less than its equal part loses nothing.
    leave_room(other, 2)
    assert len(all_extents(other)) == 3
    lock.release()
    again = of_ten(tmp_path, 10, fingerprint="one", staging=tmp_path / "a")
    assert len(all_extents(again)) == kept
    assert hold(directory, what="a test") is None, "it is open"


def test_a_save_that_cannot_fit_beside_another_gateway_evicts_nothing(tmp_path: Path) -> None:
    one = of_ten(tmp_path, 10, fingerprint="one", staging=tmp_path / "a")
    other = of_ten(tmp_path, 20, fingerprint="other", staging=tmp_path / "b")
    for i in range(4):
        save(one, run(100 * i))
    for i in range(7):
        save(other, run(100 * i))
    with refused("quota"):
        save(one, run(900, 40))
    assert len(all_extents(one)) == 4


def test_what_others_take_is_looked_at_again(tmp_path: Path) -> None:
    one = of_ten(tmp_path, 6, fingerprint="one", staging=tmp_path / "a")
    save(one, run(0))
    for number in range(2):
        filled(tmp_path, 3, fingerprint=f"stopped {number}", staging=tmp_path / "b")
        save(one, run(100 * (number + 1)))
        taken = sum(listed.size_bytes for listed in stores(tmp_path / "store"))
        assert taken <= 6 * TEN


def test_a_removed_store_is_told_truly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = filled(tmp_path, 3, fingerprint="before the upgrade")
    store = of_ten(tmp_path, 3)
    with caplog.at_level("WARNING", logger="keepwarm.store"):
        for i in range(3):
            save(store, run(100 * i))
    assert f"removed the store {old}" in caplog.text
    assert f"{3 * TEN} bytes" in caplog.text


# The store taken away while it is open.


def test_a_store_that_was_removed_begins_again(tmp_path: Path) -> None:
    store = of_ten(tmp_path, 100)
    gone = save(store, run(0))
    shutil.rmtree(tmp_path / "store")
    with refused("unknown"):
        store.materialize(gone.extent_id, 10)
    saved = save(store, run(5))
    assert saved.extent_id > gone.extent_id, "ids that are known elsewhere aren't given again"
    store.staging.forget()
    assert restored(store, saved.extent_id, 10) == slot_file(run(5))
    assert integrity(store) == ()
    store.close()
    store = of_ten(tmp_path, 100)
    assert all_extents(store) == [saved.extent_id]


def test_a_store_that_comes_back_is_used_again(tmp_path: Path) -> None:
    store = of_ten(tmp_path, 100)
    saved = save(store, run(0))
    (tmp_path / "store").rename(tmp_path / "away")
    assert store.match(run(0), "") is None
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "away").rename(tmp_path / "store")
    assert store.match(run(0), "") is not None
    assert restored(store, saved.extent_id, 10) == slot_file(run(0))
    assert store.lookup([digest_of(run(0))], [""]) is not None


def test_a_store_that_cannot_come_back_is_a_miss(tmp_path: Path) -> None:
    store = of_ten(tmp_path, 100)
    save(store, run(0))
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_bytes(b"in the way")
    for _ in range(2):
        with refused("index"):
            save(store, run(5))
    assert store.lookup([digest_of(run(0))], [""]) is None
    (tmp_path / "store").unlink()
    saved = save(store, run(5))
    assert restored(store, saved.extent_id, 10) == slot_file(run(5))


# Full disks.


def test_a_lock_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with OwnerLock(tmp_path / "x.lock", what="me"):
        assert owner_of(tmp_path / "x.lock") == "another process"


def test_opening_removes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = filled(tmp_path, 3)
    (directory / "000000000f.rows.new").write_bytes(b"half")
    (directory / "0000000002.rows").rename(tmp_path / "lost")
    filled(tmp_path, 1, fingerprint="another")
    called: list[str] = []
    for name in ("unlink", "rename"):
        monkeypatch.setattr(NoSyncDisk, name, lambda *args, name=name: called.append(name))
    shelf = Shelf(settings_in(tmp_path), disk=NoSyncDisk())
    assert called == []
    assert len(shelf.report.lines()) == 2
