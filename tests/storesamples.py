"""Small synthetic slot files: every row depends on all tokens before it, as a real one's does.

So a file put together from wrong rows, or of the wrong prefix, differs from the one expected.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keepwarm.core.memory import MemoryKind
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import (
    CacheLayout,
    Layout,
    RowsPart,
    TensorLayout,
    assemble,
)
from keepwarm.store.disk import Disk
from keepwarm.store.intake import Why
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import KeptMark, Origin, Saved
from slotfile_bytes import MAGIC, VERSION, checkpoints

WINDOW_TOKENS = 8
FINGERPRINT = "model a, engine b"


def _cache(*, v_trans: bool = False, rows: tuple[int, ...] = (8, 4, 6, 2)) -> CacheLayout:
    half = len(rows) // 2
    element_bytes = 2 if v_trans else 0
    return CacheLayout(
        v_trans,
        (0, 0),
        tuple(TensorLayout(1, size) for size in rows[:half]),
        tuple(TensorLayout(1, size, element_bytes) for size in rows[half:]),
    )


PLAIN = Layout(4, MemoryKind.PLAIN, _cache())
TRANSPOSED = Layout(4, MemoryKind.PLAIN, _cache(v_trans=True))
WINDOWED = Layout(4, MemoryKind.SLIDING_WINDOW, _cache(), window=_cache(rows=(6, 4)))
HYBRID = Layout(
    4, MemoryKind.HYBRID, _cache(), recurrent=(TensorLayout(0, 40), TensorLayout(0, 24))
)
LAYOUTS = {"plain": PLAIN, "transposed": TRANSPOSED, "windowed": WINDOWED, "hybrid": HYBRID}


def _prefix_hashes(tokens: Sequence[int]) -> Any:
    hashes = np.empty(len(tokens), np.uint32)
    value = 1
    for i, token in enumerate(tokens):
        value = (value * 1_000_003 + token + 1) & 0xFFFFFFFF
        hashes[i] = value
    return hashes


def _tensor(hashes: Any, layout: TensorLayout, number: int) -> bytes:
    """The rows of one tensor, in the file's order of bytes."""
    rows = (hashes[:, None] >> (np.arange(layout.row_bytes) % 24)) + number
    rows = rows.astype(np.uint8) & 0xBF  # so that none is NaN, whatever floats it is read as
    if layout.element_bytes:
        rows = rows.reshape(len(hashes), layout.width, layout.element_bytes).transpose(1, 0, 2)
    return np.ascontiguousarray(rows).tobytes()


def _boundary(layout: Layout, hashes: Any) -> bytes | None:
    count = len(hashes)
    if layout.kind is MemoryKind.HYBRID:
        assert layout.recurrent is not None
        state = struct.pack("<IiI2I", 1, count - 1, 0, 0, 1)
        for number, tensor in enumerate(layout.recurrent):
            state += struct.pack("<iQ", tensor.type, tensor.row_bytes)
            state += _tensor(hashes[-1:], tensor, 50 + number)
        return state
    if layout.kind is MemoryKind.SLIDING_WINDOW:
        assert layout.window is not None
        lo = max(0, count - WINDOW_TOKENS)
        state = struct.pack("<I", count - lo)
        state += b"".join(struct.pack("<iIi", at, 1, 0) for at in range(lo, count))
        state += struct.pack("<4I", 0, len(layout.window.keys), *layout.window.rotation)
        for number, tensor in enumerate(layout.window.tensors):
            state += struct.pack("<iQ", tensor.type, tensor.row_bytes)
            state += _tensor(hashes[lo:], tensor, 90 + number)
        return state
    return None


def slot_file(
    tokens: Sequence[int], layout: Layout | None = PLAIN, *, for_engine: bool = False
) -> bytes:
    """What the engine would save for these tokens; `for_engine`: what it is to be given."""
    layout = layout or PLAIN
    hashes = _prefix_hashes(tokens)
    rows = b"".join(_tensor(hashes, t, i) for i, t in enumerate(layout.rows.tensors))
    made = assemble(
        layout,
        tokens=np.asarray(tokens, np.int32),
        parts=[RowsPart(rows, 0, len(tokens), len(tokens))],
        boundary=_boundary(layout, hashes),
        streams=1,
        mend=for_engine,
    )
    return b"".join(bytes(piece) for piece in made)


def pictured_file(
    tokens: Sequence[int],
    layout: Layout = PLAIN,
    *,
    picture: tuple[int, int],
    ends: Sequence[int] = (),
) -> bytes:
    """What the engine would save where `tokens[slice(*picture)]` are a picture's.

    It has a checkpoint at each of the `ends`.
    """
    start, end = picture
    raw = slot_file(tokens, layout)
    words = [-1, 1, len(tokens), *tokens[:start], *[-1] * (end - start), *tokens[end:], 1, start, 0]
    head = struct.pack(f"<3I{len(words)}i", MAGIC, VERSION, len(words), *words)
    states = [(at, _boundary(layout, _prefix_hashes(tokens[:at]))) for at in ends]
    streams = struct.pack("<I", 1) if layout.kind is MemoryKind.SLIDING_WINDOW else b""
    held = [(at, 0, streams + state) for at, state in states if state]
    return head + raw[12 + 4 * (len(tokens) + 4) :] + (checkpoints(*held) if held else b"")


def digest_of(tokens: Sequence[int]) -> bytes:
    """Stands for a canonical request's digest: 16 bytes that tell these tokens."""
    return struct.pack("<IIq", int(_prefix_hashes(tokens)[-1]), len(tokens), 0)


def settings_in(base: Path, layout: Layout | None = PLAIN, **changed: Any) -> ShelfSettings:
    """A small store below `base`."""
    given: dict[str, Any] = {
        "root": base / "store",
        "fingerprint": FINGERPRINT,
        "layout": layout,
        "quota_bytes": 1_000_000,
        "staging": base / "staging",
        "staging_bytes": 1_000_000,
        "streams": 1,
        "max_tokens": 100_000,
    }
    return ShelfSettings(**(given | changed))


def opened(settings: ShelfSettings, disk: Disk | None = None, now_s: float = 0.0) -> Snapshots:
    """The synchronous part of a store, as its thread would use it."""
    return Snapshots(settings, disk=disk or Disk(), now_s=now_s)


def save(
    snapshots: Snapshots,
    tokens: Sequence[int],
    *,
    namespace: str = "",
    marks: Sequence[KeptMark] | None = None,
    prefill_s: float = 1.0,
    now_s: float = 0.0,
    file: bytes = b"",
) -> Saved:
    """Let the engine save these tokens, and the store absorb them; marked with their digest.

    `file`: what the engine would write instead.
    """
    file = file or slot_file(tokens, snapshots.shelf.settings.layout)
    name = snapshots.staging.expect(len(file))
    snapshots.staging.path(name).write_bytes(file)
    if marks is None:
        marks = [KeptMark(digest_of(tokens), len(tokens))]
    why = Why(namespace, marks, Origin.CONVERSATION, prefill_s)
    return snapshots.absorb(name, why, expected_tokens=None, now_s=now_s)


def restored(snapshots: Snapshots, extent_id: int, at: int) -> bytes:
    """The bytes that the engine would be given for a prefix."""
    ready = snapshots.materialize(extent_id, at)
    found = snapshots.staging.path(ready.name).read_bytes()
    snapshots.staging.release(ready.name)
    return found


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """Expects a SnapshotError with this reason."""
    with pytest.raises(SnapshotError) as caught:
        yield
    assert caught.value.reason == reason, caught.value


@contextmanager
def allowing(*reasons: str) -> Iterator[None]:
    """Passes over a SnapshotError with one of these reasons."""
    try:
        yield
    except SnapshotError as error:
        if error.reason not in reasons:
            raise


class NoSyncDisk(Disk):
    """For tests that cut no power: thousands of flushes would only take time."""

    def sync_file(self, fd: int) -> None:
        pass

    def sync_dir(self, path: Path) -> None:
        pass
