"""The store as the gateway uses it, and commands beside it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import pytest

from keepwarm.core.tree import as_tokens
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.store import (
    KeptMark,
    Origin,
    Saved,
    Store,
    list_extents,
    list_pins,
    prune_root,
    stores,
    verify_files,
)
from keepwarm.store.disk import Written
from keepwarm.store.shelf import Shelf
from storesamples import HYBRID, NoSyncDisk, digest_of, refused, settings_in, slot_file

FIRST = list(range(100, 140))
TURN = [*FIRST, *range(300, 320)]


class Clock:
    """Tells what it is told to."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(settings_in(tmp_path), clock=Clock(), disk=NoSyncDisk())
    yield opened
    await opened.close()


async def save(store: Store, tokens: Sequence[int], *, namespace: str = "") -> Saved:
    file = slot_file(tokens, store.settings.layout)
    name = await store.new_save(len(file))
    (store.settings.staging / name).write_bytes(file)
    return await store.absorb(
        name,
        namespace=namespace,
        marks=[KeptMark(digest_of(tokens), len(tokens))],
        origin=Origin.CONVERSATION,
        prefill_s=2.0,
        expected_tokens=tokens,
    )


async def test_a_save_is_found_restored_pinned_and_counted(store: Store) -> None:
    first = await save(store, FIRST)
    turn = await save(store, TURN, namespace="a")
    hit = store.lookup([digest_of(FIRST), digest_of(TURN)], namespace="a")
    assert hit is not None
    assert (hit.extent_id, hit.at_tokens) == (turn.extent_id, 60)
    ready = await store.materialize(turn.extent_id, 50)
    assert (store.settings.staging / ready.name).read_bytes() == slot_file(TURN[:50])
    store.release(ready.name)
    store.touch(turn.extent_id, 50)
    pin = await store.pin("tier:x", first.extent_id, 40, origin=Origin.TIER, prefill_s=9.0)
    assert store.pins() == (pin,)
    assert store.pin_named("tier:x") == pin
    assert pin.created_s == Clock.now_s
    stats = store.stats()
    assert (stats.extents, stats.kept_tokens, stats.saves, stats.pins) == (2, 60, 2, 1)
    assert stats.written_bytes == stats.used_bytes == 60 * 20
    assert await store.check_integrity() == ()
    assert (await store.match(TURN, namespace="b")) is not None
    assert await store.unpin("tier:x")


async def test_a_save_that_the_engine_refused_leaves_no_claim_on_staging(store: Store) -> None:
    name = await store.new_save(1000)
    assert store.stats().staging_bytes == 1000
    await store.discard(name)
    assert store.stats().staging_bytes == 0


async def test_a_cancelled_materialize_holds_nothing(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(NoSyncDisk):
        is_slow = False

        def write_staged(self, fd: int, buffers: Iterable[Buffer]) -> Written:
            if self.is_slow:
                begun.set()
                go_on.wait(10)
            return super().write_staged(fd, buffers)

    disk = Slow()
    settings = settings_in(tmp_path, staging_bytes=len(slot_file(FIRST)) + 10)
    store = await Store.open(settings, clock=Clock(), disk=disk)
    saved = await save(store, FIRST)
    disk.is_slow = True
    waiting = asyncio.create_task(store.materialize(saved.extent_id, 39))
    await asyncio.to_thread(begun.wait, 10)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    disk.is_slow = False
    go_on.set()
    await store.match(FIRST, namespace="")  # so that the worker has come to letting go
    # All of staging can be had again: nothing is held.
    name = await store.new_save(settings.staging_bytes)
    await store.discard(name)
    await store.close()


async def test_a_closed_store_says_so(store: Store) -> None:
    saved = await save(store, FIRST)
    await store.close()
    with refused("closed"):
        await store.materialize(saved.extent_id, 40)
    store.touch(saved.extent_id, 40)
    store.release("kw-00000000-1.slot")
    await store.close()


async def test_a_store_that_is_in_use_is_not_opened_twice(store: Store) -> None:
    with pytest.raises(ConfigError, match="in use by process"):
        await Store.open(store.settings, clock=Clock())


async def test_a_root_that_is_not_a_directory_is_a_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    with pytest.raises(ConfigError, match="another --store"):
        await Store.open(settings_in(tmp_path), clock=Clock())


async def test_verifying_finds_damage_and_reports_progress(store: Store, tmp_path: Path) -> None:
    first = await save(store, FIRST)
    await save(store, TURN)
    assert (await store.verify()).findings == ()
    (path,) = (tmp_path / "store").rglob(f"{first.extent_id:010x}.rows")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    seen: list[tuple[int, int]] = []
    verified = await store.verify(lambda done, total: seen.append((done, total)))
    assert [(f.what, f.about) for f in verified.findings] == [("checksum", path.name)]
    assert seen == [(1, 2), (2, 2)]
    assert store.stats().quarantined_extents == 1
    assert store.lookup([digest_of(TURN)], namespace="") is None


async def test_an_export_goes_to_another_store(store: Store, tmp_path: Path) -> None:
    saved = await save(store, FIRST)
    await store.pin("tier:x", saved.extent_id, 40, origin=Origin.TIER)
    await store.export("tier:x", tmp_path / "one")
    other = await Store.open(settings_in(tmp_path / "other"), clock=Clock(), disk=NoSyncDisk())
    imported = await other.import_(tmp_path / "one")
    assert imported.pin == "tier:x"
    assert (await other.tokens_of(imported.saved.extent_id, 40)).tolist() == FIRST
    await other.close()


async def test_what_a_failed_proof_shows_damaged_is_quarantined(store: Store) -> None:
    saved = await save(store, FIRST)
    path = store.settings.directory / f"{saved.extent_id:010x}.rows"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    removed = await store.quarantine(saved.extent_id, 40, reason="cached 0 of 40 tokens")
    assert removed.extents == (saved.extent_id,)
    with refused("unknown"):
        await store.materialize(saved.extent_id, 40)


async def test_commands_read_beside_the_running_owner(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, HYBRID, owner="keepwarm serve")
    store = await Store.open(settings, clock=Clock(), disk=NoSyncDisk())
    first = await save(store, FIRST)
    turn = await save(store, TURN, namespace="a")
    pin = await store.pin("tier:x", first.extent_id, 40, origin=Origin.TIER)

    (listed,) = stores(settings.root)
    assert listed.fingerprint == settings.fingerprint
    assert (listed.extents, listed.pins) == (2, 1)
    assert listed.size_bytes == store.stats().used_bytes
    assert "keepwarm serve" in (listed.owner or "")
    one, two = list_extents(settings.root, listed.name)
    assert (one.lo, one.hi, one.boundaries, one.pins) == (0, 40, (40,), ("tier:x",))
    assert (two.extent_id, two.parent, two.namespace) == (turn.extent_id, first.extent_id, "a")
    assert list_pins(settings.root, listed.name) == [pin]

    before = sorted(settings.root.rglob("*"))
    verified = verify_files(settings.root, listed.name)
    assert verified.findings == ()
    assert verified.read_bytes == listed.size_bytes
    assert sorted(settings.root.rglob("*")) == before, "reading leaves nothing behind"
    (pruned,) = prune_root(settings.root, 0)
    assert "keepwarm serve" in (pruned.owner or "")
    assert len(list_extents(settings.root, listed.name)) == 2, "it is left to its owner"

    await store.prune(0)
    assert len(list_extents(settings.root, listed.name)) == 1, "the pinned one stays"
    await store.close()
    assert stores(settings.root)[0].owner is None
    assert verify_files(settings.root, listed.name).extents == 1


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    assert stores(tmp_path / "nowhere") == []
    (tmp_path / "x.index").write_bytes(b"not a database, and long enough to be taken for one" * 99)
    assert stores(tmp_path) == []
    for name in ("x", "y"):
        with refused("index"):
            list_extents(tmp_path, name)
    with pytest.raises(SnapshotError):
        verify_files(tmp_path, "x")


async def test_what_is_looked_up_while_requests_wait_never_opens_the_store_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = await save(store, TURN)

    def revive(_: Shelf) -> bool:
        raise AssertionError("an index that two threads open at once crashes the process")

    monkeypatch.setattr(Shelf, "revive", revive)
    hit = store.match_now(as_tokens(TURN), namespace="")
    assert hit is not None
    assert (hit.extent_id, hit.at_tokens) == (saved.extent_id, len(TURN))
    assert store.lookup([digest_of(TURN)], namespace="") is not None
    assert store.knows(digest_of(TURN), namespace="")
    assert store.tokens_now(saved.extent_id, len(TURN)) is not None
    monkeypatch.undo()
