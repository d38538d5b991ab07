"""One snapshot in one file, to and fro."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Layout
from keepwarm.store.checks import integrity
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Origin
from storesamples import (
    HYBRID,
    LAYOUTS,
    PLAIN,
    NoSyncDisk,
    opened,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

TOKENS = list(range(100, 160))
FORMS = {**LAYOUTS, "whole": None}


def exported(base: Path, layout: Layout | None, at: int = 60) -> Path:
    store = opened(settings_in(base / "from", layout), NoSyncDisk())
    saved = save(store, TOKENS)
    store.pin(
        "tier:x",
        saved.extent_id,
        at,
        origin=Origin.TIER,
        digest=b"d" * 16,
        prefill_s=2.5,
        now_s=1.0,
    )
    path = base / "snapshot.keepwarm"
    size = store.export("tier:x", path)
    assert size == path.stat().st_size
    store.close()
    return path


def other_store(base: Path, layout: Layout | None = PLAIN, **changed: Any) -> Snapshots:
    return opened(settings_in(base / "to", layout, **changed), NoSyncDisk())


@pytest.mark.parametrize("layout", FORMS.values(), ids=FORMS.keys())
def test_a_pin_goes_to_another_store_and_keeps_what_is_known_of_it(
    tmp_path: Path, layout: Layout | None
) -> None:
    path = exported(tmp_path, layout)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store = other_store(tmp_path, layout)
    imported = store.import_(path, namespace="", now_s=5.0)
    assert imported.tokens.tolist() == TOKENS
    pin = store.shelf.catalog.pins["tier:x"]
    assert (pin.origin, pin.digest, pin.prefill_s) == (Origin.TIER, b"d" * 16, 2.5)
    found = restored(store, pin.extent_id, pin.at_tokens)
    assert found == slot_file(TOKENS, layout, for_engine=layout is not None)
    hit = store.lookup([b"d" * 16], [""])
    assert hit is not None
    assert hit.at_tokens == 60
    assert store.import_(path, namespace="", now_s=6.0).saved.new_bytes == 0
    assert integrity(store) == ()


def test_an_exported_prefix_holds_nothing_of_what_came_after_it(tmp_path: Path) -> None:
    path = exported(tmp_path, PLAIN, at=20)
    assert slot_file(TOKENS[:20]) in path.read_bytes()
    store = other_store(tmp_path)
    assert store.import_(path, namespace="", now_s=0.0).saved.at_tokens == 20
    assert path.stat().st_size < len(slot_file(TOKENS[:20])) + 1000


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_prefix_makes_the_round_trip(data: st.DataObject) -> None:
    lists = data.draw(
        st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4)
    )
    layout = data.draw(st.sampled_from([*LAYOUTS.values(), None]))
    with tempfile.TemporaryDirectory() as base:
        here = opened(settings_in(Path(base) / "a", layout), NoSyncDisk())
        there = opened(settings_in(Path(base) / "b", layout), NoSyncDisk())
        for tokens in lists:
            saved = save(here, tokens)
            path = Path(base) / "one"
            here.export((saved.extent_id, saved.at_tokens), path)
            taken = there.import_(path, namespace="", now_s=0.0)
            assert taken.pin is None
            found = restored(there, taken.saved.extent_id, taken.saved.at_tokens)
            assert found == slot_file(tokens, layout, for_engine=layout is not None)
        here.close()
        there.close()


def test_another_fingerprint_is_refused_clearly(tmp_path: Path) -> None:
    path = exported(tmp_path, PLAIN)
    store = other_store(tmp_path, fingerprint="another model")
    with pytest.raises(SnapshotError, match="another model, engine or template") as caught:
        store.import_(path, namespace="", now_s=0.0)
    assert caught.value.reason == "fingerprint"
    assert len(store.shelf.catalog.tree) == 0


def test_another_layout_is_refused(tmp_path: Path) -> None:
    path = exported(tmp_path, PLAIN)
    with refused("layout"):
        other_store(tmp_path, HYBRID).import_(path, namespace="", now_s=0.0)


def test_what_is_not_an_export_is_refused(tmp_path: Path) -> None:
    store = other_store(tmp_path)
    with refused("missing"):
        store.import_(tmp_path / "strange", namespace="", now_s=0.0)
    for content, reason in ((b"", "truncated"), (b"GGUF", "truncated"), (b"GGUF" * 99, "format")):
        # A file for each: what is written to while the last error still maps it waits for that.
        path = tmp_path / f"strange {len(content)}"
        path.write_bytes(content)
        with refused(reason):
            store.import_(path, namespace="", now_s=0.0)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
@settings(max_examples=80, deadline=None)
def test_no_damaged_export_is_taken(where: float, bit: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        path = exported(base, PLAIN)
        data = bytearray(path.read_bytes())
        at = int(where * len(data))
        if cut:
            data = data[:at]
        else:
            data[at] ^= 1 << bit
        path.write_bytes(data)
        store = other_store(base)
        with pytest.raises(SnapshotError) as caught:
            store.import_(path, namespace="", now_s=0.0)
        assert caught.value.reason in {"format", "truncated", "checksum"}
        assert store.shelf.used_bytes == 0
        store.close()


def test_an_export_replaces_a_file_only_when_it_is_complete(tmp_path: Path) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    saved = save(store, TOKENS)
    path = tmp_path / "one"
    path.write_bytes(b"a letter")
    with refused("exists"):
        store.export((saved.extent_id, 60), path)
    assert path.read_bytes() == b"a letter", "it isn't ours to replace"
    path.write_bytes(b"KEEPWARM, exported before")
    with refused("unknown"):
        store.export("tier:none", path)
    with refused("missing"):
        store.export((saved.extent_id, 60), tmp_path / "nowhere" / "one")
    assert path.read_bytes() == b"KEEPWARM, exported before"
    store.export((saved.extent_id, 60), path)
    assert path.read_bytes() != b"before"
    assert {p.name for p in tmp_path.iterdir()} == {"one", "store", "staging"}
