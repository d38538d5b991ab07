"""A store that several API keys share: whose data goes first, and forgetting a key's."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.core.evict import Candidate, SharedQueue, over_share
from keepwarm.store import files
from keepwarm.store.checks import integrity
from keepwarm.store.snapshots import Snapshots
from storesamples import PLAIN, NoSyncDisk, opened, refused, restored, save, settings_in

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
    assert store.shelf.catalog.keys() == {"quiet": 3 * TEN, "busy": 3 * TEN}
    assert integrity(store) == ()


def test_one_key_alone_may_use_all_and_gives_it_back(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    for i in range(10):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert store.shelf.catalog.keys() == {"busy": 6 * TEN}
    for i in range(20, 30):
        save(store, run(i * 100), namespace="late", now_s=0.0)
    assert store.shelf.catalog.keys() == {"busy": 3 * TEN, "late": 3 * TEN}


def test_shares_hold_after_opening_anew(tmp_path: Path) -> None:
    store = small(tmp_path, 6)
    for i in range(3):
        save(store, run(i * 100), namespace="quiet", now_s=0.0)
    store.close()
    store = small(tmp_path, 6)
    for i in range(10, 20):
        save(store, run(i * 100), namespace="busy", now_s=1e6, prefill_s=100.0)
    assert store.shelf.catalog.keys() == {"quiet": 3 * TEN, "busy": 3 * TEN}


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
