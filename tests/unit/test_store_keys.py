"""A store that several API keys share: whose data goes first, and forgetting a key's."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from keepwarm.cli.main import app
from keepwarm.core.evict import Candidate, SharedQueue, over_share
from keepwarm.deployment.aging import evict_unused
from keepwarm.explain.history import FILE_NAME, History, PastRequest
from keepwarm.store import admin, files
from keepwarm.store.checks import forget_key, integrity
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.store import Store
from keepwarm.store.types import KeptMark, Origin, tenant_of
from storesamples import (
    PLAIN,
    NoSyncDisk,
    digest_of,
    opened,
    refused,
    restored,
    save,
    settings_in,
)

TEN = PLAIN.rows_bytes(10)


def run(start: int, count: int = 10) -> list[int]:
    return list(range(start, start + count))


def small(tmp_path: Path, tens: int, tenants: int = 2) -> Snapshots:
    settings = settings_in(tmp_path, quota_bytes=tens * TEN, tenants=tenants)
    return opened(settings, NoSyncDisk())


def test_who_holds_more_than_a_share_gives_first() -> None:
    assert over_share({"a": 51, "b": 49}, share_bytes=50) == {"a"}
    assert over_share({"a": 50, "b": 50}, share_bytes=50) == set()


owned = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 10)), max_size=30)


@given(owned, st.integers(0, 12), st.integers(0, 30))
def test_nobody_under_a_share_loses_while_somebody_is_over(
    items: list[tuple[str, float]], share: int, bound: int
) -> None:
    """Each item is one byte; beside a list that is searched anew each time."""
    queue = SharedQueue()
    for number, (owner, worth) in enumerate(items):
        queue.push(owner, Candidate(number, None), worth)
    left = dict(enumerate(items))
    while len(left) > bound:
        held = Counter(owner for owner, _ in left.values())
        over = over_share(held, share_bytes=share)
        taken = queue.pop(
            lambda candidate: left[candidate.extent_id][1] if candidate.extent_id in left else None,
            first=over,
        )
        assert taken is not None
        owner, worth = left.pop(taken.extent_id)
        rest = [(o, w) for o, w in [*left.values(), (owner, worth)] if not over or o in over]
        assert (owner, worth) in rest
        assert worth == min(w for _, w in rest)


def test_one_key_cant_evict_anothers_data(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    quiet = [save(store, run(i * 100), namespace="quiet", now_s=0.0) for i in range(3)]
    for i in range(10, 40):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert all(one.extent_id in store.shelf.catalog.tree for one in quiet)
    assert store.shelf.catalog.held_by_key() == {"quiet": 3 * TEN, "busy": 3 * TEN}
    assert integrity(store) == ()


def test_one_key_alone_may_use_all_and_gives_it_back(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    for i in range(10):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert store.shelf.catalog.held_by_key() == {"busy": 6 * TEN}
    for i in range(20, 30):
        save(store, run(i * 100), namespace="late", now_s=0.0)
    assert store.shelf.catalog.held_by_key() == {"busy": 3 * TEN, "late": 3 * TEN}


def test_shares_hold_after_opening_anew(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    for i in range(3):
        save(store, run(i * 100), namespace="quiet", now_s=0.0)
    store.close()
    store = small(tmp_path, 6)
    for i in range(10, 20):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert store.shelf.catalog.held_by_key() == {"quiet": 3 * TEN, "busy": 3 * TEN}


def test_what_all_share_is_in_no_keys_share(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    tier = save(store, run(0), prefill_s=1.0)
    for i in range(10, 20):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert tier.extent_id in store.shelf.catalog.tree, "the busy key gives its own first"


@pytest.mark.parametrize("often", [1, files.TRIES - 1, files.TRIES])
def test_a_read_error_is_a_miss_until_it_comes_too_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: int
) -> None:
    store = small(tmp_path, 6)
    saved = save(store, run(0))
    store.staging.forget()

    def fails(*_: object, **__: object) -> bytes:
        raise OSError(errno.EIO, "a disk that stumbles")

    with monkeypatch.context() as broken:
        broken.setattr(files, "read_checksum", fails)
        for count in range(1, often + 1):
            with refused("unreadable" if count == files.TRIES else "io"):
                store.materialize(saved.extent_id, 10)
    if often < files.TRIES:
        assert restored(store, saved.extent_id, 10)
    else:
        with refused("unknown"):
            store.materialize(saved.extent_id, 10)


def pin(store: Snapshots, name: str, extent_id: int, at: int) -> None:
    origin = Origin.LEARNED if name.startswith("learned:") else Origin.TIER
    store.pin(name, extent_id, at, origin=origin, digest=None, prefill_s=1.0, now_s=0.0)


def filled(tmp_path: Path) -> Snapshots:
    """A tier; `ann` and `bob` go on from it, and each has a prompt of its own that is pinned."""
    store = small(tmp_path, 100)
    tier = save(store, run(0))
    pin(store, "tier:standard", tier.extent_id, 10)
    for start, name in ((1000, "ann"), (2000, "bob")):
        save(store, run(0) + run(start), namespace=name)
        own = save(store, run(start + 500), namespace=name)
        save(store, run(start + 500) + run(start + 700), namespace=name)
        pin(store, f"learned:{name}:{'0' * 32}~codex", own.extent_id, 10)
        pin(store, f"hand:{name}:{tier.extent_id}", tier.extent_id, 10)
        store.mark(tier.extent_id, 10, name, [KeptMark(digest_of(run(start)), 10)])
    return store


def test_a_forgotten_key_leaves_nothing_and_others_keep_all(tmp_path: Path) -> None:
    store = filled(tmp_path)
    catalog = store.shelf.catalog
    theirs = {e.id for e in catalog.tree if e.namespace != "ann"}
    secret = run(1500)
    index = store.shelf.index_path
    needle = b"".join(t.to_bytes(4, "little") for t in secret)
    told = admin.forget(store, "ann")
    assert (told.extents, told.size_bytes, told.marks) == (3, 3 * TEN, 1)
    assert set(told.pins) == {f"learned:ann:{'0' * 32}~codex", "hand:ann:1"}
    assert {e.id for e in catalog.tree} == theirs
    assert set(catalog.pins) == {"tier:standard", f"learned:bob:{'0' * 32}~codex", "hand:bob:1"}
    assert store.lookup([digest_of(secret)], ["", "ann"]) is None
    assert store.lookup([digest_of(run(1000))], ["", "ann"]) is None
    assert integrity(store) == ()
    store.close()
    for path in index.parent.glob(index.name + "*"):
        assert needle not in path.read_bytes(), path
    again = small(tmp_path, 100)
    assert {e.id for e in again.shelf.catalog.tree} == theirs
    assert restored(again, 1, 10)
    assert admin.forget(again, "ann").extents == 0
    again.close()


def test_what_was_quarantined_goes_with_any_key(tmp_path: Path) -> None:
    store = filled(tmp_path)
    own = next(e.id for e in store.shelf.catalog.tree if e.namespace == "ann")
    store.shelf.quarantine_extent(own)
    assert store.shelf.files.quarantined_bytes == TEN
    told = admin.forget(store, "ann")
    assert told.refuse_bytes == TEN
    assert store.shelf.files.quarantined_bytes == 0


def test_whose_a_pin_is() -> None:
    assert tenant_of("learned:team:a:00ff~codex") == "team:a"
    assert tenant_of("hand:ann:17") == "ann"
    assert tenant_of("tier:standard") is None
    assert tenant_of("learned::00ff") is None


def entry(number: int, namespace: str) -> PastRequest:
    return PastRequest(
        id=f"request-{number}",
        namespace=namespace,
        at_s=float(number),
        day="2026-11-28",
        cause="new",
        plan="cold",
        fingerprint="f",
        opening=b"",
        has_text=False,
        record={"id": number},
    )


def test_the_command_forgets_a_key_when_nothing_runs(tmp_path: Path) -> None:
    filled(tmp_path).close()
    root = tmp_path / "store"
    history = History(root / FILE_NAME, keeps_text=False)
    for number, name in enumerate(["ann", "bob", "ann"]):
        history.add(entry(number, name))
    history.close()
    command = ["store", "rm", "--key", "ann", "--store", str(root), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    removed = json.loads(result.stdout)["removed"]
    assert [line.get("extents") for line in removed] == [3, None]
    assert removed[1]["requests"] == 2
    history = History(root / FILE_NAME, keeps_text=False)
    assert history.latest(namespace="ann", limit=9) == []
    assert len(history.latest(namespace="bob", limit=9)) == 1
    history.close()
    said = CliRunner().invoke(app, command[:-1]).stdout
    assert "removed 0 extents" in said
    assert "removed 0 requests" in said


def test_a_store_that_a_gateway_has_open_is_left_and_told(tmp_path: Path) -> None:
    store = filled(tmp_path)
    root = tmp_path / "store"
    assert [one.owner is not None for one in forget_key(root, "ann")] == [True]
    nowhere = ["--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(
        app, ["store", "rm", "--key", "ann", "--store", str(root), *nowhere]
    )
    assert result.exit_code == 1
    assert "left as it is" in result.output
    assert "ann" in store.shelf.catalog.held_by_key()
    store.close()


def test_what_is_too_old_goes_and_what_is_pinned_by_hand_or_used_stays(tmp_path: Path) -> None:
    store = small(tmp_path, 100)
    tier = save(store, run(0), now_s=0.0)
    pin(store, "tier:standard", tier.extent_id, 10)
    trunk = save(store, run(100), namespace="ann", now_s=0.0)
    branch = save(store, run(100) + run(200), namespace="ann", now_s=0.0)
    other = save(store, run(100) + run(300), namespace="ann", now_s=0.0)
    old = save(store, run(400), namespace="ann", now_s=0.0)
    pin(store, "learned:ann:00", old.extent_id, 10)
    used = save(store, run(500), namespace="ann", now_s=0.0)
    pin(store, "learned:ann:01", used.extent_id, 10)
    store.touch(branch.extent_id, 20, now_s=50.0)
    store.touch(used.extent_id, 10, now_s=50.0)
    assert admin.evict_unused(store, 0.0).extents == (), "nothing is older than that"
    removed = admin.evict_unused(store, 50.0)
    assert set(removed.extents) == {other.extent_id, old.extent_id}
    assert removed.pins == ("learned:ann:00",)
    assert removed.size_bytes == 2 * TEN
    left = {extent.id for extent in store.shelf.catalog.tree}
    assert left == {one.extent_id for one in (tier, trunk, branch, used)}
    assert set(store.shelf.catalog.pins) == {"tier:standard", "learned:ann:01"}
    assert store.stats().evicted_extents == 2
    assert integrity(store) == ()
    store.close()
    assert {e.id for e in small(tmp_path, 100).shelf.catalog.tree} == left


async def test_age_is_looked_at_in_quiet_moments_only(tmp_path: Path) -> None:
    store = small(tmp_path, 100)
    save(store, run(0), namespace="ann", now_s=0.0)
    store.close()
    opened_store = await Store.open(settings_in(tmp_path), clock=lambda: 3 * 24 * 3600.0)
    scheduler = SimpleNamespace(busy=True, queued=0)
    deployment: Any = SimpleNamespace(
        settings=SimpleNamespace(store=SimpleNamespace(max_age_days=2)),
        store=opened_store,
        dispatcher=SimpleNamespace(scheduler=scheduler),
    )
    looking = asyncio.create_task(evict_unused(deployment, look_s=0.001))
    await asyncio.sleep(0.05)
    assert opened_store.stats().extents == 1, "a request runs"
    scheduler.busy = False
    async with asyncio.timeout(5):
        while opened_store.stats().extents:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking
    await opened_store.close()
