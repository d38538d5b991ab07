"""Room on the disk and in the staging directory: who goes, who stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from keepwarm.store.checks import integrity, prune_root, stores
from keepwarm.store.lock import OwnerLock
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.staging import Staging
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

DAY_S = 24 * 3600.0
TEN = PLAIN.rows_bytes(10)


def run(start: int, count: int = 10) -> list[int]:
    return list(range(start, start + count))


def small(tmp_path: Path, tens: int, **changed: Any) -> Snapshots:
    """A store with room for so many extents of ten tokens."""
    return opened(settings_in(tmp_path, quota_bytes=tens * TEN, **changed), NoSyncDisk())


def test_the_quota_holds_at_every_step(tmp_path: Path) -> None:
    peak = 0

    class Watching(NoSyncDisk):
        def rename(self, source: Path, target: Path) -> None:
            nonlocal peak
            super().rename(source, target)
            peak = max(peak, sum(p.stat().st_size for p in target.parent.glob("*.rows")))

    settings = settings_in(tmp_path, quota_bytes=5 * TEN)
    store = opened(settings, Watching())
    for i in range(20):
        save(store, run(i * 100), now_s=float(i))
    assert peak <= 5 * TEN
    assert store.shelf.used_bytes <= 5 * TEN
    assert len(store.shelf.catalog.tree) >= 4
    assert integrity(store) == ()


def test_the_least_valuable_goes_first(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    old = save(store, run(0), now_s=0.0)
    used = save(store, run(100), now_s=0.0)
    dear = save(store, run(200), prefill_s=50.0, now_s=0.0)
    store.touch(used.extent_id, 10, now_s=DAY_S)
    save(store, run(300), now_s=DAY_S)
    assert old.extent_id not in store.shelf.catalog.tree
    save(store, run(400), now_s=DAY_S)
    assert dear.extent_id in store.shelf.catalog.tree
    assert used.extent_id in store.shelf.catalog.tree, "used twice, the newer ones once"


def test_a_conversation_goes_from_its_end(tmp_path: Path) -> None:
    store = small(tmp_path, 4)
    tokens: list[int] = []
    for turn in range(3):
        tokens += run(turn * 100)
        save(store, tokens, now_s=float(turn))
    save(store, run(900), prefill_s=50.0, now_s=3.0)
    save(store, run(1000), prefill_s=50.0, now_s=4.0)
    hit = store.match(tokens, "")
    assert hit is not None
    assert hit.at_tokens == 20
    assert store.lookup([digest_of(tokens)], [""]) is None
    assert store.lookup([digest_of(tokens[:20])], [""]) is not None


def test_using_a_conversation_keeps_what_it_begins_with(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    root = save(store, run(0), now_s=0.0)
    save(store, run(500), now_s=0.0)
    leaf = save(store, [*run(0), *run(100)], now_s=0.0)
    store.touch(leaf.extent_id, 20, now_s=1.0)
    store.prune(TEN)
    assert [extent.id for extent in store.shelf.catalog.tree] == [root.extent_id]


def test_a_pinned_chain_is_never_evicted(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    save(store, run(0), now_s=0.0, prefill_s=0.001)
    leaf = save(store, [*run(0), *run(100)], now_s=0.0, prefill_s=0.001)
    store.pin("tier:x", leaf.extent_id, 15, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0.0)
    for i in range(1, 9):
        save(store, run(i * 1000), now_s=i * DAY_S)
    assert restored(store, leaf.extent_id, 15) == slot_file([*run(0), *run(100)][:15])
    assert len(store.shelf.catalog.tree) == 3
    store.unpin("tier:x")
    for i in range(11, 14):
        save(store, run(i * 1000), now_s=i * DAY_S)
    assert leaf.extent_id not in store.shelf.catalog.tree


def test_what_cannot_fit_beside_the_pins_evicts_nothing(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    pinned = save(store, run(0))
    store.pin(
        "tier:x", pinned.extent_id, 10, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0.0
    )
    other = save(store, run(100))
    with refused("quota"):
        save(store, run(200, 21))
    assert other.extent_id in store.shelf.catalog.tree
    assert store.staging.is_ready(other.extent_id, 10)
    assert integrity(store) == ()


def test_a_save_does_not_evict_what_it_hangs_off(tmp_path: Path) -> None:
    store = small(tmp_path, 2)
    root = save(store, run(0), now_s=0.0, prefill_s=0.001)
    save(store, run(100), now_s=9 * DAY_S)
    leaf = save(store, [*run(0), *run(200)], now_s=9 * DAY_S)
    assert {extent.id for extent in store.shelf.catalog.tree} == {root.extent_id, leaf.extent_id}


def test_an_evicted_extent_leaves_no_ready_file(tmp_path: Path) -> None:
    store = small(tmp_path, 2)
    gone = save(store, run(0), now_s=0.0)
    for i in (1, 2):
        save(store, run(i * 100), now_s=float(i))
    assert not store.staging.is_ready(gone.extent_id, 10)
    assert len(list((tmp_path / "staging").glob("*.slot"))) == 2
    with refused("unknown"):
        store.materialize(gone.extent_id, 10)


def test_a_dear_boundary_state_goes_before_cheap_rows(tmp_path: Path) -> None:
    """An end in the middle of a conversation spares few tokens beyond the end before it."""
    tokens = run(0, 60)
    store = opened(settings_in(tmp_path, HYBRID), NoSyncDisk())
    for end in (30, 31, 60):
        save(store, tokens[:end], prefill_s=end / 10)
    before = store.shelf.used_bytes
    store.prune(before - 1)
    kept = [at for extent in store.shelf.catalog.tree for at in extent.boundaries]
    assert sorted(kept) == [30, 60]
    hit = store.match(tokens[:31], "")
    assert hit is not None
    assert hit.at_tokens == 30
    store.staging.forget()
    assert restored(store, 1, 30) == slot_file(tokens[:30], HYBRID)
    assert integrity(store) == ()


def test_rows_that_no_restore_can_reach_go_with_their_last_end(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path, HYBRID), NoSyncDisk())
    save(store, run(0))
    save(store, [*run(0), *run(100)])
    store.prune(0)
    assert len(store.shelf.catalog.tree) == 0
    assert store.shelf.used_bytes == 0


def test_other_fingerprints_files_go_first(tmp_path: Path) -> None:
    old = small(tmp_path, 4, fingerprint="before the upgrade")
    save(old, run(0))
    save(old, run(100))
    old.close()
    store = small(tmp_path, 4)
    for i in range(4):
        save(store, run(i * 100))
    assert len(store.shelf.catalog.tree) == 4
    assert not old.shelf.settings.directory.exists()
    assert [listed.fingerprint for listed in stores(tmp_path / "store")] == [
        store.shelf.settings.fingerprint
    ]


def test_another_fingerprints_store_that_is_open_is_left_alone(tmp_path: Path) -> None:
    other = small(tmp_path, 4, fingerprint="another model")
    save(other, run(0))
    store = small(tmp_path, 3)
    for i in range(3):
        save(store, run(i * 100))
    assert len(other.shelf.catalog.tree) == 1
    assert restored(other, 1, 10) == slot_file(run(0))
    assert store.shelf.used_bytes + other.shelf.used_bytes <= 3 * TEN


def test_uses_survive_a_restart(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    used = save(store, run(0), now_s=0.0)
    save(store, run(100), now_s=1.0)
    store.touch(used.extent_id, 10, now_s=2.0)
    store.close()
    store = small(tmp_path, 3)
    store.prune(TEN)
    assert [extent.id for extent in store.shelf.catalog.tree] == [used.extent_id]
    assert store.shelf.catalog.uses(used.extent_id).count == 1


def test_a_closed_store_can_be_pruned_by_a_command(tmp_path: Path) -> None:
    store = small(tmp_path, 3)
    for i in range(3):
        save(store, run(i * 100), now_s=float(i))
    store.close()
    (listed,) = stores(tmp_path / "store")
    (removed,) = prune_root(tmp_path / "store", TEN)
    assert removed.name == listed.name
    assert removed.extents == 2
    assert removed.size_bytes == 2 * TEN
    store = small(tmp_path, 3)
    assert store.shelf.report.extents == 1
    assert store.shelf.report.lines() == []


def test_an_absorbed_file_is_the_ready_file_of_its_end(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    hit = store.lookup([digest_of(run(0))], [""])
    assert hit is not None
    assert hit.is_ready
    assert restored(store, saved.extent_id, 10) == slot_file(run(0))
    assert store.stats().ready_hits == 1
    assert store.stats().materialized == 0
    store.materialize(saved.extent_id, 5)
    store.materialize(saved.extent_id, 5)
    assert store.stats().materialized == 1


def test_staging_stays_within_its_bound_and_keeps_what_is_pinned_or_held(tmp_path: Path) -> None:
    size = len(slot_file(run(0)))
    store = opened(settings_in(tmp_path, staging_bytes=3 * size), NoSyncDisk())
    pinned, held = save(store, run(0)), save(store, run(100))
    store.pin(
        "tier:x", pinned.extent_id, 10, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0.0
    )
    ready = store.materialize(held.extent_id, 10)
    for i in range(2, 8):
        save(store, run(i * 100))
        assert sum(p.stat().st_size for p in (tmp_path / "staging").glob("*.slot")) <= 3 * size
    assert store.staging.is_ready(pinned.extent_id, 10)
    assert store.staging.path(ready.name).exists()
    store.staging.release(ready.name)
    save(store, run(900))
    save(store, run(950))
    assert not store.staging.path(ready.name).exists()
    assert store.staging.is_ready(pinned.extent_id, 10), "pinned ones go last"


def test_a_file_that_staging_can_never_hold_is_refused(tmp_path: Path) -> None:
    size = len(slot_file(run(0)))
    store = opened(settings_in(tmp_path, staging_bytes=size), NoSyncDisk())
    with refused("no_space"):
        store.staging.expect(size + 1)
    saved = save(store, run(0))
    ready = store.materialize(saved.extent_id, 10)
    with refused("no_space"):
        store.staging.expect(1)
    store.staging.release(ready.name)
    store.staging.expect(1)


def test_a_file_that_is_assembled_is_written_over_the_one_that_made_room(tmp_path: Path) -> None:
    size = len(slot_file(run(0)))
    store = opened(settings_in(tmp_path, staging_bytes=2 * size), NoSyncDisk())
    ids = [save(store, run(i * 100)).extent_id for i in range(3)]

    def assembled(extent_id: int | None, at: int) -> tuple[int, int]:
        assert extent_id is not None
        ready = store.materialize(extent_id, at)
        path = store.staging.path(ready.name)
        assert path.read_bytes() == slot_file(run(100 * ids.index(extent_id))[:at])
        store.staging.release(ready.name)
        return path.stat().st_ino, path.stat().st_size

    store.staging.forget()
    first, _ = assembled(ids[0], 10)
    longer, _ = assembled(ids[1], 10)
    shorter = assembled(ids[2], 4)
    assert shorter == (first, len(slot_file(run(200)[:4]))), "cut to its own length"
    assert assembled(ids[0], 9)[0] == longer
    assert len(list((tmp_path / "staging").glob("*.slot"))) == len(store.staging)


@pytest.mark.parametrize("why", ["the engine saved it", "it may still be read"])
def test_what_the_engine_may_be_reading_is_never_written_over(tmp_path: Path, why: str) -> None:
    size = len(slot_file(run(0)))
    store = opened(settings_in(tmp_path, staging_bytes=size), NoSyncDisk())
    other = save(store, run(100)).extent_id
    saved = save(store, run(0)).extent_id
    assert saved is not None
    assert other is not None
    if why == "it may still be read":
        store.staging.forget()
    ready = store.materialize(saved, 10)
    with store.staging.path(ready.name).open("rb") as reading:
        store.staging.release(ready.name, is_read=why == "the engine saved it")
        store.staging.release(store.materialize(other, 10).name)
        assert not store.staging.path(ready.name).exists()
        assert reading.read() == slot_file(run(0))


def test_a_held_file_is_removed_with_its_last_hold(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    first = store.materialize(saved.extent_id, 10)
    second = store.materialize(saved.extent_id, 10)
    assert first.name == second.name
    store.quarantine(saved.extent_id, 10, "")
    store.staging.release(first.name)
    assert store.staging.path(first.name).exists()
    store.staging.release(second.name)
    assert not store.staging.path(first.name).exists()


def test_a_ready_file_that_someone_removed_is_made_again(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    for path in (tmp_path / "staging").glob("*.slot"):
        path.unlink()
    assert restored(store, saved.extent_id, 10) == slot_file(run(0))


def test_a_dead_lifes_files_go_when_room_is_needed_and_no_others(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    dead = ["kw-0123abcd-7.slot", "kw-0123abcd-8.slot.new", "kw-0123abcd.lock"]
    theirs = ["kw-0123abcd.slot", "notes.slot", "kw-0123abcd-7.slot.bak", "kw-99999999-7.slot"]
    living = ["kw-abcdef01-1.slot"]
    for name in [*dead, *theirs, *living]:
        (staging / name).write_bytes(b"x")
    with OwnerLock(staging / "kw-abcdef01.lock", what="another gateway"):
        store = opened(settings_in(tmp_path), NoSyncDisk())
        assert {path.name for path in staging.iterdir()} >= {*dead, *theirs, *living}
        save(store, run(0))
        store.staging.expect(10)
        store.close()
        left = {*theirs, *living, "kw-abcdef01.lock"}
        assert {path.name for path in staging.iterdir()} == left


def test_a_staging_directory_that_was_taken_away_is_made_again(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    shutil.rmtree(tmp_path / "staging")
    assert restored(store, saved.extent_id, 10) == slot_file(run(0))
    shutil.rmtree(tmp_path / "staging")
    save(store, run(100))
    assert integrity(store) == ()
    store.close()
    assert list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize("is_written_here", [False, True])
def test_a_damaged_ready_file_is_made_again(tmp_path: Path, is_written_here: bool) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    if is_written_here:
        store.staging.forget()
        restored(store, saved.extent_id, 10)
    (path,) = (tmp_path / "staging").glob("*.slot")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert restored(store, saved.extent_id, 10) == slot_file(run(0))
    assert store.stats().damaged_staged == 1


def test_a_row_file_that_is_damaged_after_its_first_use_is_not_believed(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, run(0))
    for at in (9, 8):
        assert restored(store, saved.extent_id, at) == slot_file(run(0)[:at])
    path = store.shelf.files.root / "0000000001.rows"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with refused("checksum"):
        store.materialize(saved.extent_id, 7)


def test_a_small_file_system_for_staging_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is ready makes room before the file system is full, whatever the bound says."""
    size = len(slot_file(run(0)))

    def free_bytes(staging: Staging) -> int:
        return 3 * size - sum(p.stat().st_size for p in staging.root.glob("*.slot"))

    monkeypatch.setattr(Staging, "_free_bytes", free_bytes)
    store = opened(settings_in(tmp_path), NoSyncDisk())
    for i in range(6):
        saved = save(store, run(100 * i))
        store.staging.forget({saved.extent_id} if i % 2 else set())
        assert restored(store, saved.extent_id, 10) == slot_file(run(100 * i))
        assert sum(p.stat().st_size for p in (tmp_path / "staging").glob("*.slot")) <= 3 * size
    with refused("no_space"):
        store.staging.expect(4 * size)


def test_names_in_staging_are_never_given_twice(tmp_path: Path) -> None:
    staging = Staging(tmp_path, bound_bytes=100, disk=NoSyncDisk())
    again = Staging(tmp_path, bound_bytes=100, disk=NoSyncDisk())
    names = [where.expect(0) for where in (staging, again) for _ in range(50)]
    assert len(set(names)) == 100


def test_a_released_lock_names_nobody(tmp_path: Path) -> None:
    path = tmp_path / "store.lock"
    with OwnerLock(path, what="first"):
        assert path.read_bytes()
    assert path.read_bytes() == b""
    with OwnerLock(path, what="second"), pytest.raises(Exception, match="second"):
        OwnerLock(path, what="third")
