"""What the store keeps, finds and gives back."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from keepwarm.core.memory import MemoryKind
from keepwarm.errors import ConfigError
from keepwarm.slotfile import CacheLayout, Layout, TensorLayout
from keepwarm.store.checks import integrity
from keepwarm.store.intake import Why
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import KeptMark, Origin
from storesamples import (
    HYBRID,
    LAYOUTS,
    PLAIN,
    WINDOWED,
    NoSyncDisk,
    allowing,
    digest_of,
    opened,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

FIRST = list(range(100, 140))
TURN = [*FIRST, *range(300, 320)]
BRANCH = [*FIRST[:25], *range(500, 515)]

ALL_FORMS = pytest.mark.parametrize("layout", [*LAYOUTS.values(), None], ids=[*LAYOUTS, "whole"])


@pytest.fixture
def store(tmp_path: Path) -> Snapshots:
    return opened(settings_in(tmp_path), NoSyncDisk())


@ALL_FORMS
def test_what_was_saved_is_given_back_byte_for_byte(tmp_path: Path, layout: Layout | None) -> None:
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    kept = [(tokens, save(store, tokens)) for tokens in (FIRST, TURN, BRANCH)]
    store.staging.forget()
    for tokens, saved in kept:
        found = restored(store, saved.extent_id, len(tokens))
        assert found == slot_file(tokens, layout, for_engine=layout is not None)
    assert integrity(store) == ()


def test_only_the_rows_behind_the_known_prefix_are_written(store: Snapshots) -> None:
    assert save(store, FIRST).new_bytes == PLAIN.rows_bytes(40)
    turn = save(store, TURN)
    assert (turn.new_tokens, turn.new_bytes) == (20, PLAIN.rows_bytes(20))
    branch = save(store, BRANCH)
    assert (branch.new_tokens, branch.new_bytes) == (15, PLAIN.rows_bytes(15))
    again = save(store, TURN)
    assert (again.new_tokens, again.new_bytes) == (0, 0)
    on_disk = sum(path.stat().st_size for path in store.shelf.files.root.glob("*.rows"))
    assert on_disk == PLAIN.rows_bytes(75) == store.shelf.used_bytes


def test_a_turn_costs_hardly_more_disk_writes_than_its_own_rows(tmp_path: Path) -> None:
    """What the index's log grows by is counted; a 135M model's rows are as small as they come."""
    row = (TensorLayout(1, 384),) * 30
    layout = Layout(4, MemoryKind.PLAIN, CacheLayout(False, (0, 0), row, row))
    store = opened(settings_in(tmp_path, layout, quota_bytes=10**8, staging_bytes=10**8))
    save(store, list(range(160)))
    log = store.shelf.index_path.with_name(store.shelf.index_path.name + "-wal")
    before = log.stat().st_size
    turn = list(range(200))
    saved = save(store, turn, marks=[KeptMark(digest_of(turn[:n]), n) for n in (180, 190, 200)])
    assert saved.new_tokens == 40
    own = layout.rows_bytes(40)
    written = rows_of(store, saved.extent_id).stat().st_size + log.stat().st_size - before
    assert own < written <= 1.05 * own


def test_a_plain_prefix_can_be_restored_at_any_token(store: Snapshots) -> None:
    turn = save(store, TURN)
    for at in (1, 17, 40, 59):
        assert restored(store, turn.extent_id, at) == slot_file(TURN[:at])


@pytest.mark.parametrize("layout", [WINDOWED, HYBRID], ids=["windowed", "hybrid"])
def test_a_model_with_boundary_state_is_restored_only_at_saved_ends(
    tmp_path: Path, layout: Layout
) -> None:
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    save(store, FIRST, marks=[KeptMark(b"f" * 16, 40)])
    turn = save(store, TURN, marks=[KeptMark(b"m" * 16, 50), KeptMark(b"t" * 16, 60)])
    with refused("boundary"):
        store.materialize(turn.extent_id, 50)
    middle = store.lookup([b"f" * 16, b"m" * 16], [""])
    assert middle is not None
    assert (middle.at_tokens, middle.is_exact) == (40, False), "the end before, as a lower bound"
    end = store.lookup([b"f" * 16, b"m" * 16, b"t" * 16], [""])
    assert end is not None
    assert (end.index, end.at_tokens, end.is_exact) == (2, 60, True)


@pytest.mark.parametrize("layout", [WINDOWED, HYBRID], ids=["windowed", "hybrid"])
def test_boundary_states_are_kept_beside_rows_that_were_known(
    tmp_path: Path, layout: Layout
) -> None:
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    turn = save(store, TURN)
    first = save(store, FIRST)
    assert first.extent_id == turn.extent_id
    assert first.new_tokens == 0
    assert first.new_bytes > 0
    assert save(store, FIRST).new_bytes == 0
    store.staging.forget()
    expected = slot_file(FIRST, layout, for_engine=True)
    assert restored(store, first.extent_id, 40) == expected


def test_a_whole_snapshot_is_found_at_its_very_end_only(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path, None), NoSyncDisk())
    first, turn = save(store, FIRST), save(store, TURN)
    assert first.extent_id != turn.extent_id
    assert save(store, FIRST).new_bytes == 0, "the same tokens are kept once"
    hit = store.match([*TURN, 1, 2], "")
    assert hit is not None
    assert (hit.extent_id, hit.at_tokens) == (turn.extent_id, 60)
    hit = store.match(TURN[:59], "")
    assert hit is not None
    assert hit.extent_id == first.extent_id
    with refused("unknown"):
        store.materialize(turn.extent_id, 40)


def test_the_last_known_digest_wins(store: Snapshots) -> None:
    save(store, FIRST, marks=[KeptMark(b"a" * 16, 10), KeptMark(b"b" * 16, 40)])
    turn = save(store, TURN, marks=[KeptMark(b"a" * 16, 10), KeptMark(b"c" * 16, 60)])
    hit = store.lookup([b"a" * 16, b"b" * 16, b"c" * 16, b"?" * 16], [""])
    assert hit is not None
    assert (hit.index, hit.extent_id, hit.at_tokens) == (2, turn.extent_id, 60)
    assert store.lookup([b"?" * 16], [""]) is None
    assert store.lookup([], [""]) is None


def test_an_estimated_place_is_known_but_nothing_starts_from_it(store: Snapshots) -> None:
    saved = save(
        store, TURN, marks=[KeptMark(b"a" * 16, 50), KeptMark(b"b" * 16, 45, is_exact=False)]
    )
    hit = store.lookup([b"a" * 16, b"b" * 16], [""])
    assert hit is not None
    assert (hit.index, hit.at_tokens, hit.is_exact) == (0, 50, True)
    store.mark(saved.extent_id, 60, "", [KeptMark(b"b" * 16, 58, is_exact=False)])
    hit = store.lookup([b"a" * 16, b"b" * 16], [""])
    assert hit is not None
    assert (hit.index, hit.at_tokens, hit.is_exact) == (0, 50, True)
    assert store.lookup([b"b" * 16], [""]) is None
    assert store.shelf.catalog.knows(b"b" * 16, [""])


def test_an_exact_mark_is_not_replaced_by_a_bound(store: Snapshots) -> None:
    saved = save(store, TURN, marks=[KeptMark(b"a" * 16, 50)])
    store.mark(saved.extent_id, 60, "", [KeptMark(b"a" * 16, 55, is_exact=False)])
    hit = store.lookup([b"a" * 16], [""])
    assert hit is not None
    assert (hit.at_tokens, hit.is_exact) == (50, True)


def test_one_tenants_digests_do_not_answer_anothers(store: Snapshots) -> None:
    save(store, FIRST)
    save(store, TURN, namespace="a")
    digests = [digest_of(FIRST), digest_of(TURN)]
    for namespaces, at in ((("", "a"), 60), (("", "b"), 40), (("",), 40)):
        hit = store.lookup(digests, namespaces)
        assert hit is not None
        assert hit.at_tokens == at
    found = store.match(TURN, "b")
    assert found is not None
    assert found.at_tokens == 40


def test_a_private_save_does_not_make_its_tokens_known_to_all(store: Snapshots) -> None:
    save(store, TURN, namespace="a")
    assert save(store, TURN, namespace="b").new_tokens == 60
    assert save(store, TURN).new_tokens == 60
    assert save(store, [*TURN, 7], namespace="b").new_tokens == 1


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: file[:-1], "truncated"),
        (lambda file: file + b"\0", "trailing"),
        (lambda file: b"\0" + file[1:], "magic"),
        (lambda file: file[:40], "truncated"),
    ],
)
def test_a_staged_file_that_is_not_understood_is_refused_and_removed(
    store: Snapshots, damage: object, reason: str
) -> None:
    name = store.staging.expect(1000)
    store.staging.path(name).write_bytes(damage(slot_file(FIRST)))  # type: ignore[operator]
    with refused(reason):
        store.absorb(name, Why("", [], Origin.FILL, 1.0), expected_tokens=None, now_s=0.0)
    assert not store.staging.path(name).exists()
    assert store.staging.used_bytes == 0
    assert integrity(store) == ()
    assert len(store.shelf.catalog.tree) == 0


def test_a_slot_that_holds_other_tokens_than_expected_is_refused(store: Snapshots) -> None:
    name = store.staging.expect(1000)
    store.staging.path(name).write_bytes(slot_file(TURN))
    with refused("tokens"):
        store.absorb(name, Why("", [], Origin.TIER, 1.0), expected_tokens=FIRST, now_s=0.0)


def test_a_staged_file_that_never_came_is_refused(store: Snapshots) -> None:
    name = store.staging.expect(1000)
    with refused("missing"):
        store.absorb(name, Why("", [], Origin.TIER, 1.0), expected_tokens=None, now_s=0.0)
    for strange in (name, "../etc/passwd", "kw-00000000-1.slot"):
        with refused("name"):
            store.absorb(strange, Why("", [], Origin.TIER, 1.0), expected_tokens=None, now_s=0.0)


def test_a_mark_beyond_the_end_is_refused(store: Snapshots) -> None:
    with refused("mark"):
        save(store, FIRST, marks=[KeptMark(b"a" * 16, 41)])
    saved = save(store, FIRST)
    with refused("mark"):
        store.mark(saved.extent_id, 40, "", [KeptMark(b"a" * 16, 41)])


def test_a_slot_file_of_another_layout_is_refused(store: Snapshots) -> None:
    name = store.staging.expect(1000)
    store.staging.path(name).write_bytes(slot_file(FIRST, LAYOUTS["transposed"]))
    with refused("layout"):
        store.absorb(name, Why("", [], Origin.FILL, 1.0), expected_tokens=None, now_s=0.0)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def rows_of(store: Snapshots, extent_id: int) -> Path:
    return store.shelf.files.root / f"{extent_id:010x}.rows"


def test_a_flipped_bit_is_found_at_first_use_and_never_restored(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    first, turn, other = save(store, FIRST), save(store, TURN), save(store, [1, 2, 3])
    store.pin("tier:x", turn.extent_id, 50, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0)
    store.close()
    flip(rows_of(store, first.extent_id), 100)

    store = opened(settings_in(tmp_path), NoSyncDisk())
    with refused("checksum"):
        store.materialize(turn.extent_id, 60)
    assert store.lookup([digest_of(FIRST), digest_of(TURN)], [""]) is None
    with refused("unknown"):
        store.materialize(turn.extent_id, 60)
    assert store.shelf.catalog.pins == {}
    assert [path.name for path in (store.shelf.files.root / "quarantine").iterdir()] == [
        rows_of(store, first.extent_id).name
    ]
    assert store.shelf.used_bytes == PLAIN.rows_bytes(40 + 3), "what is set aside counts"
    assert restored(store, other.extent_id, 3) == slot_file([1, 2, 3])
    assert save(store, TURN).new_tokens == 60
    assert integrity(store) == ()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.unlink(), "missing"),
    ],
)
def test_a_file_that_was_cut_or_lost_is_quarantined(
    store: Snapshots, damage: object, reason: str
) -> None:
    saved = save(store, FIRST)
    store.staging.forget()
    damage(rows_of(store, saved.extent_id))  # type: ignore[operator]
    with refused(reason):
        store.materialize(saved.extent_id, 40)
    assert store.lookup([digest_of(FIRST)], [""]) is None
    assert integrity(store) == ()


def test_damaged_tokens_in_the_index_fail_like_a_damaged_file(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, FIRST)
    tokens = bytearray(store.shelf.catalog.row(saved.extent_id).tokens)
    tokens[4] ^= 1
    store.shelf.index._db.execute("UPDATE extents SET tokens = ?", (bytes(tokens),))
    store.close()
    store = opened(settings_in(tmp_path), NoSyncDisk())
    with refused("checksum"):
        store.materialize(saved.extent_id, 40)


@pytest.mark.parametrize("layout", [WINDOWED, HYBRID], ids=["windowed", "hybrid"])
def test_a_damaged_boundary_state_costs_only_its_end(tmp_path: Path, layout: Layout) -> None:
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    turn = save(store, TURN)
    save(store, FIRST)
    store.staging.forget()
    flip(store.shelf.files.root / f"{turn.extent_id:010x}-{60:08x}.end", 40)
    with refused("checksum"):
        store.materialize(turn.extent_id, 60)
    hit = store.match(TURN, "")
    assert hit is not None
    assert hit.at_tokens == 40
    expected = slot_file(FIRST, layout, for_engine=True)
    assert restored(store, hit.extent_id, 40) == expected
    assert store.stats().quarantined_ends == 1
    assert integrity(store) == ()


def test_a_failed_proof_drops_no_rows_that_are_good(store: Snapshots) -> None:
    first = save(store, FIRST)
    turn, theirs = save(store, TURN, namespace="a"), save(store, BRANCH, namespace="b")
    store.mark(turn.extent_id, 60, "", [KeptMark(digest_of(TURN), 60)])
    store.pin("tier:x", first.extent_id, 40, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0)
    for namespace in ("a", ""):
        removed = store.quarantine(turn.extent_id, 60, namespace)
        assert removed.extents == ()
        assert removed.pins == ()
    # Only the digests that led there are forgotten, where they were said to.
    assert store.lookup([digest_of(TURN)], ["", "a"]) is None
    assert store.lookup([digest_of(FIRST)], [""]) is not None
    assert store.lookup([digest_of(BRANCH)], ["b"]) is not None
    assert restored(store, turn.extent_id, 60) == slot_file(TURN)
    # A pin that ends there is to be proved, and stays.
    assert store.quarantine(first.extent_id, 40, "").pins == ("tier:x",)
    assert set(store.shelf.catalog.pins) == {"tier:x"}
    assert restored(store, theirs.extent_id, len(BRANCH)) == slot_file(BRANCH)
    assert len(store.shelf.catalog.tree) == 3
    assert integrity(store) == ()


def test_a_failed_proof_sets_aside_what_is_damaged(store: Snapshots) -> None:
    first, turn, branch = save(store, FIRST), save(store, TURN), save(store, BRANCH)
    store.pin("tier:x", turn.extent_id, 60, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0)
    flip(store.shelf.files.root / f"{turn.extent_id:010x}.rows", 40)
    removed = store.quarantine(turn.extent_id, 60, "")
    assert removed.extents == (turn.extent_id,)
    assert removed.pins == ("tier:x",)
    assert not store.staging.is_ready(turn.extent_id, 60)
    flip(store.shelf.files.root / f"{first.extent_id:010x}.rows", 40)
    removed = store.quarantine(branch.extent_id, 20, "")
    assert set(removed.extents) == {first.extent_id, branch.extent_id}, "it ended in the first"
    assert store.quarantine(branch.extent_id, 20, "").extents == ()
    assert integrity(store) == ()


def test_forgotten_marks_stay_forgotten_and_cost_no_rows(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    save(store, FIRST)
    save(store, TURN, namespace="a")
    assert store.forget_marks() == 2
    store.close()
    store = opened(settings_in(tmp_path), NoSyncDisk())
    assert store.lookup([digest_of(FIRST), digest_of(TURN)], ["", "a"]) is None
    assert store.match(TURN, "a") is not None
    assert integrity(store) == ()


def test_the_quarantine_is_bounded(tmp_path: Path) -> None:
    # A twentieth of the quota: room for two of the three.
    store = opened(settings_in(tmp_path, quota_bytes=PLAIN.rows_bytes(100) * 20), NoSyncDisk())
    for start in (1000, 2000, 3000):
        saved = save(store, range(start, start + 40))
        store.shelf.quarantine_extent(saved.extent_id)
    assert store.shelf.files.quarantined_bytes == PLAIN.rows_bytes(80)
    assert len(list((store.shelf.files.root / "quarantine").iterdir())) == 2
    assert store.prune(10**9).extents == ()
    assert store.shelf.used_bytes == 0


def test_pins_survive_a_restart_with_all_that_is_known_of_them(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, TURN)
    store.pin(
        "tier:full",
        saved.extent_id,
        50,
        origin=Origin.TIER,
        digest=b"d" * 16,
        prefill_s=9.5,
        now_s=7,
    )
    store.touch(saved.extent_id, 50, now_s=8.0)
    before = store.shelf.catalog.pins
    assert before["tier:full"].uses == 1
    store.close()
    store = opened(settings_in(tmp_path), NoSyncDisk())
    assert store.shelf.catalog.pins == before
    pin = before["tier:full"]
    assert store.tokens_of(pin.extent_id, pin.at_tokens).tolist() == TURN[:50]
    assert store.unpin("tier:full")
    assert not store.unpin("tier:full")


def test_a_pin_moves_when_its_name_is_pinned_again(store: Snapshots) -> None:
    first, other = save(store, FIRST), save(store, [1, 2, 3])
    for saved, at in ((first, 40), (other, 3)):
        store.pin(
            "tier:x", saved.extent_id, at, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0
        )
    assert not store.shelf.catalog.is_pinned(first.extent_id)
    assert store.shelf.catalog.is_pinned(other.extent_id)


def test_only_what_can_be_restored_can_be_pinned(store: Snapshots) -> None:
    saved = save(store, FIRST)
    for extent_id, at in ((saved.extent_id, 41), (saved.extent_id, 0), (99, 1)):
        with refused("unknown"):
            store.pin("x", extent_id, at, origin=Origin.TIER, digest=None, prefill_s=1, now_s=0)
    assert store.shelf.catalog.pins == {}


def test_another_layout_has_a_store_of_its_own(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, FIRST)
    store.close()
    other = opened(settings_in(tmp_path, HYBRID), NoSyncDisk())
    assert other.lookup([digest_of(FIRST)], [""]) is None
    assert save(other, FIRST).new_tokens == 40
    assert other.shelf.report.lines() == []
    other.close()
    store = opened(settings_in(tmp_path), NoSyncDisk())
    assert restored(store, saved.extent_id, 40) == slot_file(FIRST)
    assert integrity(store) == ()


@pytest.mark.parametrize("where", [0, 30, 4096 + 200, -3000])
def test_a_corrupt_index_is_set_aside_and_a_new_one_begun(tmp_path: Path, where: int) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    for start in range(0, 4000, 40):
        save(store, range(start, start + 40))
    path = store.shelf.index_path
    store.close()
    data = bytearray(path.read_bytes())
    at = where % len(data)
    data[at : at + 2000] = b"\xa5" * 2000
    path.write_bytes(data)
    store = opened(settings_in(tmp_path), NoSyncDisk())
    if store.shelf.report.set_aside is not None:
        aside = store.shelf.settings.directory.with_suffix(".1.aside")
        assert len(list(aside.glob("*.rows"))) == 100
        assert path.with_name(path.name + ".1.aside").exists()
        assert "new snapshot index" in store.shelf.report.lines()[0]
        assert len(store.shelf.catalog.tree) == 0
    assert integrity(store) == ()
    # Whatever is still listed is either right or refused.
    for extent in list(store.shelf.catalog.tree):
        tokens = store.tokens_of(extent.id, extent.hi).tolist()
        with allowing("checksum", "truncated", "unknown"):
            assert restored(store, extent.id, extent.hi) == slot_file(tokens)
    save(store, FIRST)
    assert integrity(store) == ()


def test_a_second_owner_is_told_who_has_the_store(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, owner="keepwarm serve")
    store = opened(settings, NoSyncDisk())
    with pytest.raises(ConfigError, match=r"in use by process \d+ \(keepwarm serve\)"):
        opened(settings, NoSyncDisk())
    other = opened(settings_in(tmp_path, fingerprint="another model"), NoSyncDisk())
    other.close()
    store.close()
    opened(settings, NoSyncDisk()).close()


def test_all_is_private_to_the_user(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, FIRST)
    store.materialize(saved.extent_id, 20)
    for path in [tmp_path / "store", tmp_path / "staging", *(tmp_path / "store").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    made = [
        p for p in (tmp_path / "staging").glob("*.slot") if p.stat().st_size < len(slot_file(FIRST))
    ]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o600]


def test_uses_are_noted_also_when_the_clock_was_set_back(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), now_s=1e9)
    extent = save(store, [1, 2, 3], now_s=1e9).extent_id
    store.touch(extent, 3, now_s=1e9 - 86400)
    assert not store.shelf.catalog.take_uses(), "they are in the index already"
    store.close()
