"""NaN and infinity are seen in rows of every type that a KV cache may have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from keepwarm.slotfile import TensorLayout, parse
from keepwarm.slotfile.boundary import boundary_tensors
from keepwarm.slotfile.finite import rows_are_finite
from keepwarm.store.checks import integrity
from keepwarm.store.intake import Why
from keepwarm.store.types import Origin
from storesamples import LAYOUTS, NoSyncDisk, opened, refused, save, settings_in, slot_file

FLOATS = {0: np.float32, 1: np.float16}
BLOCKS = {2: (18, 1), 3: (20, 2), 6: (22, 1), 7: (24, 2), 8: (34, 1), 20: (18, 1)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("at", [0, 777, 599_999])
def test_one_number_that_is_none_is_seen(kind: int, bad: float, at: int) -> None:
    numbers = np.linspace(-60000, 60000, 600_000).astype(FLOATS[kind])
    layout = TensorLayout(kind, 8 * numbers.itemsize)
    assert rows_are_finite([layout], [numbers.tobytes()])
    numbers[at] = bad
    assert not rows_are_finite([layout], [numbers.tobytes()])


def test_bfloat16_is_seen() -> None:
    numbers = np.full(64, 0x3F80, np.uint16)
    assert rows_are_finite([TensorLayout(30, 8)], [numbers.tobytes()])
    numbers[9] = 0x7FC0
    assert not rows_are_finite([TensorLayout(30, 8)], [numbers.tobytes()])


@pytest.mark.parametrize("kind", BLOCKS)
def test_scales_of_blocks_are_seen_and_their_integers_are_not(kind: int) -> None:
    size, scales = BLOCKS[kind]
    blocks = np.full((50, size), 0xFF, np.uint8)
    blocks[:, : 2 * scales] = np.frombuffer(np.ones(scales, np.float16).tobytes(), np.uint8)
    assert rows_are_finite([TensorLayout(kind, size)], [blocks.tobytes()])
    blocks[31, 2 * scales - 2 : 2 * scales] = np.frombuffer(
        np.array([np.nan], np.float16).tobytes(), np.uint8
    )
    assert not rows_are_finite([TensorLayout(kind, size)], [blocks.tobytes()])


def test_rows_that_are_not_finite_are_never_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(settings_in(tmp_path), NoSyncDisk())
    save(store, [1, 2, 3])
    monkeypatch.setattr("keepwarm.store.forms.rows_are_finite", lambda *_: False)
    with refused("not_finite"):
        save(store, [1, 2, 3, 4])
    assert len(store.shelf.catalog.tree) == 1
    assert len(store.staging) == 1, "nor given out as it was staged"
    assert integrity(store) == ()


@pytest.mark.parametrize("name", ["windowed", "hybrid"])
def test_a_state_that_is_not_finite_is_never_kept(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    save(store, [1, 2, 3])
    raw = slot_file([1, 2, 3, 4], layout)
    found = parse(raw, kind=layout.kind, max_tokens=100)
    state = found.boundary()
    assert state is not None
    _, data = boundary_tensors(layout, state)[-1]
    at = raw.index(bytes(data.reshape(-1)))
    bad = raw[:at] + b"\xff" * 4 + raw[at + 4 :]
    staged = store.staging.expect(len(bad))
    store.staging.save_path(staged).write_bytes(bad)
    why = Why("", [], Origin.CONVERSATION, 1.0)
    with refused("not_finite"):
        store.absorb(staged, why, expected_tokens=None, now_s=0.0)
    assert len(store.shelf.catalog.tree) == 1
    assert integrity(store) == ()
    save(store, [1, 2, 3, 4])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_that_is_kept_already_and_no_number_now_spoils_the_file(
    name: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    store = opened(settings_in(tmp_path, layout), NoSyncDisk())
    save(store, [1, 2, 3])
    raw = slot_file([1, 2, 3, 4], layout)
    found = parse(raw, kind=layout.kind, max_tokens=100)
    at = raw.index(bytes(found.cells[0].reshape(-1)))  # K of the first layer, the first token
    bad = raw[:at] + b"\xff" * 2 + raw[at + 2 :]
    staged = store.staging.expect(len(bad))
    store.staging.save_path(staged).write_bytes(bad)
    with refused("not_finite"):
        store.absorb(staged, Why("", [], Origin.CONVERSATION, 1.0), expected_tokens=None, now_s=0.0)
    assert len(store.shelf.catalog.tree) == 1
