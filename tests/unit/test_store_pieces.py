"""Extents that come from another store: what is here already is neither read nor copied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from keepwarm.slotfile import Layout
from keepwarm.store import exchange
from keepwarm.store.checks import integrity
from keepwarm.store.exchange import Piece
from keepwarm.store.files import ExtentFiles
from keepwarm.store.intake import Why
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Origin
from storesamples import (
    LAYOUTS,
    NoSyncDisk,
    opened,
    refused,
    restored,
    save,
    settings_in,
    slot_file,
)

TOKENS = np.arange(100, 160, dtype=np.int32)
WHY = Why("a", (), Origin.IMPORT, 1.0)


def pieces_of(base: Path, layout: Layout | None, *ends: int) -> list[Piece]:
    """The extents of a store that has saved these tokens up to each end, one after the other."""
    store = opened(settings_in(base / "from", layout), NoSyncDisk())
    ids = [save(store, TOKENS[:end].tolist(), namespace="a").extent_id for end in ends]
    found = [exchange._read(store, extent_id) for extent_id in ids]
    found = [replace(piece, payload=bytes(piece.payload)) for piece in found]
    store.close()
    return found


def other(base: Path, layout: Layout | None) -> Snapshots:
    return opened(settings_in(base / "to", layout), NoSyncDisk())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_tail_is_kept_without_reading_what_stands_before_it(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, middle, last = pieces_of(tmp_path, layout, 20, 41, 60)
    store = other(tmp_path, layout)
    save(store, TOKENS[:20].tolist(), namespace="a")
    with monkeypatch.context() as patch:
        patch.setattr(ExtentFiles, "open", lambda *_: pytest.fail("rows were read"))
        patch.setattr(type(store.form), "give", lambda *_, **__: pytest.fail("rows were copied"))
        saved = exchange._keep(store, TOKENS, (middle, last), WHY)
    assert saved.new_tokens == 40
    found = restored(store, saved.extent_id, 60)
    assert found == slot_file(TOKENS.tolist(), layout, for_engine=True)
    assert integrity(store) == ()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pieces_that_are_none_leave_nothing(tmp_path: Path, layout: Layout) -> None:
    head, middle, last = pieces_of(tmp_path, layout, 20, 41, 60)
    store = other(tmp_path, layout)
    with refused("missing"):
        exchange._keep(store, TOKENS, (middle, last), WHY)
    with refused("parts"):
        exchange._keep(store, TOKENS, (head, middle, replace(last, payload=b"short")), WHY)
    bad = bytes([0xFF]) * len(last.payload)  # type: ignore[arg-type]
    with refused("not_finite"):
        exchange._keep(store, TOKENS, (head, middle, replace(last, payload=bad)), WHY)
    if layout.kind.value != "plain":
        with refused("boundary"):
            exchange._keep(store, TOKENS, (head, middle, replace(last, ends=())), WHY)
        moved = tuple((at, middle.ends[0][1]) for at, _ in last.ends)
        with refused("boundary"):
            exchange._keep(store, TOKENS, (head, middle, replace(last, ends=moved)), WHY)
    assert len(store.shelf.catalog.tree) == 0
    assert integrity(store) == ()
    saved = exchange._keep(store, TOKENS, (head, middle, last), WHY)
    found = restored(store, saved.extent_id, 60)
    assert found == slot_file(TOKENS.tolist(), layout, for_engine=True)


def test_a_whole_file_that_comes_is_kept_as_it_is(tmp_path: Path) -> None:
    (piece,) = pieces_of(tmp_path, None, 60)
    store = other(tmp_path, None)
    saved = exchange._keep(store, TOKENS, (piece,), WHY)
    assert restored(store, saved.extent_id, 60) == slot_file(TOKENS.tolist())
