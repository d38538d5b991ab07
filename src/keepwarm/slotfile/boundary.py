"""Boundary state: what a model keeps besides rows, and that holds only for one end.

A sliding window's boundary state is its cells (`Cache.raw`, so not bound to a stream), a hybrid's
is its recurrent part. It is found at the end of a file's state, and again in each of the context
checkpoints that newer engines append to the file: those hold the state of earlier ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile.cells import (
    MAX_LAYERS,
    CellBlock,
    Cursor,
    as_view,
    read_block,
    read_cache,
    read_rows,
)
from keepwarm.slotfile.layout import (
    Buffer,
    Bytes,
    CacheLayout,
    Layout,
    SlotFileError,
    TensorLayout,
)

APPENDIX_MAGIC = b"SCKP"
APPENDIX_VERSION = 1
MAX_CHECKPOINTS = 1024  # what the engine itself accepts
STATE_MAGIC = 0xAF143CD8  # opens a sequence's state in memory


@dataclass(frozen=True, slots=True)
class Boundary:
    """Boundary state of the end `end_tokens`; `raw` is a view.

    `window` or `recurrent` is its layout, as in `Layout`; `sequence` is the slot that a window's
    cells say they are of.
    """

    end_tokens: int
    raw: memoryview
    window: CacheLayout | None = None
    recurrent: tuple[TensorLayout, ...] | None = None
    sequence: int | None = None


def read_boundary(cursor: Cursor, kind: MemoryKind) -> Boundary:
    """The boundary state that comes next, in a file or in a checkpoint."""
    if kind is MemoryKind.SLIDING_WINDOW:
        cache = read_cache(cursor)
        _, hi = _positions_range(cache.block)
        return Boundary(hi, cache.raw, cache.block.layout, sequence=cache.block.sequence)
    start = cursor.at
    end_tokens, found = _read_recurrent(cursor)
    recurrent = tuple(tensor for tensor, _ in found)
    return Boundary(end_tokens, cursor.view[start : cursor.at], recurrent=recurrent)


def read_checkpoints(cursor: Cursor, kind: MemoryKind) -> Iterator[tuple[int, Boundary]]:
    """What the appendix holds, in its order, each with its count of tokens.

    That is the end its state is of, but for M-RoPE behind a picture, whose tokens share positions.
    The cursor stands at the appendix's magic.
    """
    cursor.take(len(APPENDIX_MAGIC))
    version, count = cursor.u32s(2)
    if version != APPENDIX_VERSION or count > MAX_CHECKPOINTS:
        raise SlotFileError(
            f"{count} checkpoints, appendix version {version}", reason="checkpoints"
        )
    for _ in range(count):
        tokens, first, last = cursor.number("q"), cursor.number("i"), cursor.number("i")
        state = Cursor(cursor.take(cursor.number("Q")))
        cursor.take(cursor.number("Q"))  # the draft model's state
        cursor.take(cursor.number("Q"))  # the speculative decoder's state
        if state.number("I") != STATE_MAGIC:
            raise SlotFileError("a checkpoint begins in an unknown way", reason="checkpoints")
        state.number("i")  # the sequence it was made in
        found = read_boundary(state, kind)
        if state.left or not 0 <= first <= last or not tokens >= found.end_tokens == last + 1:
            raise SlotFileError("a checkpoint holds another state", reason="checkpoints")
        yield tokens, found


def window_range(layout: Layout, boundary: Buffer) -> tuple[int, int]:
    """The positions [lo, hi) in a sliding window's boundary state; hi is the end it is of.

    Raises:
        SlotFileError: it isn't a window of this layout.
    """
    return _positions_range(read_window(layout, boundary))


def boundary_end(layout: Layout, boundary: Buffer) -> int:
    """How many tokens come before this boundary state: the only end it can be used at.

    Raises:
        SlotFileError: it isn't of this layout.
    """
    if layout.kind is MemoryKind.SLIDING_WINDOW:
        return window_range(layout, boundary)[1]
    return _recurrent_of(layout, boundary)[0]


def boundary_tensors(layout: Layout, boundary: Buffer) -> list[tuple[TensorLayout, Bytes]]:
    """What a boundary state holds, tensor by tensor, as views.

    Raises:
        SlotFileError: it isn't of this layout.
    """
    if layout.kind is MemoryKind.SLIDING_WINDOW:
        window = read_window(layout, boundary)
        return list(zip(window.layout.tensors, window.tensors, strict=True))
    return _recurrent_of(layout, boundary)[1]


def _recurrent_of(layout: Layout, boundary: Buffer) -> tuple[int, list[tuple[TensorLayout, Bytes]]]:
    cursor = Cursor(as_view(boundary))
    end_tokens, found = _read_recurrent(cursor)
    if cursor.left or tuple(tensor for tensor, _ in found) != layout.recurrent:
        raise SlotFileError("the recurrent state isn't of this layout", reason="boundary")
    return end_tokens, found


def read_window(layout: Layout, boundary: Buffer) -> CellBlock:
    """The cells of a sliding window's boundary state."""
    block = read_block(boundary)
    if block.layout != layout.window:
        raise SlotFileError("the window isn't of this layout", reason="boundary")
    return block


def _positions_range(block: CellBlock) -> tuple[int, int]:
    """The positions [lo, hi) of cells that must be some in a row, in any order."""
    lo, hi = int(block.positions.min()), int(block.positions.max()) + 1
    # As many cells as positions first, so that the claimed positions don't size an array.
    if lo < 0 or hi - lo != len(block.positions):
        raise SlotFileError(f"{len(block.positions)} cells from {lo} to {hi}", reason="position")
    if not np.array_equal(np.sort(block.positions), np.arange(lo, hi)):
        raise SlotFileError("the window's positions aren't in a row", reason="position")
    return lo, hi


def _read_recurrent(cursor: Cursor) -> tuple[int, list[tuple[TensorLayout, Bytes]]]:
    """The end a recurrent state is of, and its tensors.

    How many tensors there are depends on the model: some layers have none, and the file doesn't
    say which. They end where the file ends or the appendix begins, whose magic can't be a type.
    A convolution layer writes the second of its two tensors with rows of 0 bytes.
    """
    cells = cursor.number("I")
    position, sequences = cursor.number("i"), cursor.number("I")
    if cells != 1 or sequences != 0 or position < 0:
        raise SlotFileError(f"{cells} recurrent cells at {position}", reason="layout")
    s_trans, layers = cursor.u32s(2)
    if s_trans or not 0 < layers <= MAX_LAYERS:
        raise SlotFileError(f"{layers} recurrent layers", reason="layout")
    found: list[tuple[TensorLayout, Bytes]] = []
    while cursor.left and not cursor.starts_with(APPENDIX_MAGIC):
        if len(found) == 2 * layers:
            raise SlotFileError("more recurrent tensors than layers have", reason="layout")
        found.append(read_rows(cursor, cells, may_be_empty=True))
    if not found:
        raise SlotFileError("no recurrent tensors", reason="truncated")
    return position + 1, found
