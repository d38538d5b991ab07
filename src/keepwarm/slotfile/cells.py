"""Reading within bounds: a cursor, and the cells of an attention cache as views.

Files are written by another program, possibly another version of it, into a directory that a crash
may leave anything in. So no number from a file is used before it is known to fit: loops are bounded
by constants, and tensors are views of bytes that exist.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from keepwarm.slotfile.layout import (
    Buffer,
    Bytes,
    CacheLayout,
    Ints,
    SlotFileError,
    TensorLayout,
)

MAX_STREAMS = 256  # LLAMA_MAX_SEQ; also bounds sequence ids
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_TYPE = 255  # ggml's types are far fewer, its numbers small
# What a cell says beside its position and sequence where positions have several parts (M-RoPE): two
# of those parts and the token (xllamacpp 2026.10.11549).
PARTED_CELL_WORDS = 3


def as_view(buffer: Buffer) -> memoryview:
    """The buffer's bytes as one flat, read-only row."""
    whole = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    return whole.cast("B").toreadonly()


class Cursor:
    """A place in a buffer that can't leave it."""

    __slots__ = ("at", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.view) - self.at

    def skip(self, size: int) -> int:
        """The offset of the next `size` bytes; the place moves behind them."""
        if size > self.left:
            raise SlotFileError(
                f"{size} bytes announced at {self.at}, {self.left} there", reason="truncated"
            )
        at = self.at
        self.at += size
        return at

    def take(self, size: int) -> memoryview:
        """The next `size` bytes, not copied."""
        at = self.skip(size)
        return self.view[at : at + size]

    def u32s(self, count: int) -> tuple[int, ...]:
        """The next `count` numbers."""
        return struct.unpack_from(f"<{count}I", self.view, self.skip(4 * count))

    def number(self, form: str) -> int:
        """The next number, of a `struct` format like 'i' or 'Q'."""
        form = f"<{form}"
        (value,) = struct.unpack_from(form, self.view, self.skip(struct.calcsize(form)))
        return int(value)

    def starts_with(self, word: bytes) -> bool:
        """Whether the next bytes are these; the place stays."""
        return self.view[self.at : self.at + len(word)] == word


@dataclass(frozen=True, slots=True)
class CellBlock:
    """The cells of one stream of one attention cache, as views of the file.

    `positions` are in the file's order, and so are the `words` of each cell,
    [cells, layout.cell_words]. `tensors` follow `layout.tensors`: arrays [cells, row_bytes] or,
    transposed, [width, cells, element_bytes].
    """

    layout: CacheLayout
    positions: Ints
    sequence: int
    tensors: tuple[Bytes, ...]
    words: Ints


@dataclass(frozen=True, slots=True)
class Cache:
    """One attention cache of a file: the one of its streams that has cells.

    `raw` is that stream's part of the file, from its cell count to its last tensor.
    """

    streams: int
    stream: int
    block: CellBlock
    raw: memoryview


def read_cache(cursor: Cursor, *, may_be_parted: bool = False) -> Cache:
    """The next attention cache. Exactly one stream must have cells: the saved slot's own.

    `may_be_parted`: its cells may have `PARTED_CELL_WORDS`; the file doesn't say it otherwise.
    """
    streams = cursor.number("I")
    if not 0 < streams <= MAX_STREAMS:
        raise SlotFileError(f"{streams} streams", reason="streams")
    found: Cache | None = None
    for stream in range(streams):
        start = cursor.at
        count = cursor.number("I")
        if count == 0:
            continue
        if found is not None:
            raise SlotFileError("two streams have cells", reason="streams")
        block = _read_cells(cursor, count, may_be_parted=may_be_parted)
        found = Cache(streams, stream, block, cursor.view[start : cursor.at])
    if found is None:
        raise SlotFileError("no stream has cells", reason="empty")
    if streams > 1 and found.block.sequence != found.stream:
        raise SlotFileError(
            f"sequence {found.block.sequence} in stream {found.stream}", reason="sequence"
        )
    return found


def read_block(raw: Buffer) -> CellBlock:
    """The cells that `Cache.raw` holds."""
    cursor = Cursor(as_view(raw))
    block = _read_cells(cursor, cursor.number("I"))
    if cursor.left:
        raise SlotFileError(f"{cursor.left} bytes after the cells", reason="trailing")
    return block


def read_rows(
    cursor: Cursor, count: int, *, may_be_empty: bool = False
) -> tuple[TensorLayout, Bytes]:
    """A tensor of `count` rows after one another: [count, row_bytes]."""
    kind, row_bytes = cursor.number("i"), cursor.number("Q")
    if not 0 <= kind <= MAX_TYPE or (row_bytes == 0 and not may_be_empty):
        raise SlotFileError(f"type {kind}, {row_bytes} bytes a row", reason="layout")
    data = np.frombuffer(cursor.take(count * row_bytes), np.uint8)
    return TensorLayout(kind, row_bytes), data.reshape(count, row_bytes)


def _read_transposed(cursor: Cursor, count: int) -> tuple[TensorLayout, Bytes]:
    kind, element_bytes, width = cursor.number("i"), cursor.number("I"), cursor.number("I")
    if not 0 <= kind <= MAX_TYPE or element_bytes == 0 or width == 0:
        raise SlotFileError(
            f"type {kind}, {width} elements of {element_bytes} bytes", reason="layout"
        )
    data = np.frombuffer(cursor.take(width * count * element_bytes), np.uint8)
    layout = TensorLayout(kind, width * element_bytes, element_bytes)
    return layout, data.reshape(width, count, element_bytes)


def _read_meta(cursor: Cursor, count: int, *, cell_words: int) -> tuple[Ints, int]:
    """What the next `count` cells say, [cells, 3 + cell_words], and the sequence they are of."""
    width = 3 + cell_words
    meta = np.frombuffer(cursor.take(4 * width * count), "<i4").reshape(count, width)
    if not count or (meta[:, 1] != 1).any():
        raise SlotFileError("a cell that isn't of one sequence", reason="sequence")
    sequence = int(meta[0, -1])
    if not 0 <= sequence < MAX_STREAMS or (meta[:, -1] != sequence).any():
        raise SlotFileError("cells of several sequences", reason="sequence")
    return meta, sequence


def _read_cells(cursor: Cursor, count: int, *, may_be_parted: bool = False) -> CellBlock:
    """The `count` cells of a stream: whose they are, then the tensors."""
    start = cursor.at
    try:
        meta, sequence = _read_meta(cursor, count, cell_words=0)
    except SlotFileError as error:
        if not may_be_parted or error.reason != "sequence":
            raise
        cursor.at = start
        meta, sequence = _read_meta(cursor, count, cell_words=PARTED_CELL_WORDS)
    v_trans, layers, *rotation = cursor.u32s(4)
    if v_trans > 1 or not 0 < layers <= MAX_LAYERS:
        raise SlotFileError(f"{layers} layers, V transposed {v_trans}", reason="layout")
    found = [read_rows(cursor, count) for _ in range(layers)]
    read_value = _read_transposed if v_trans else read_rows
    found += [read_value(cursor, count) for _ in range(layers)]
    layouts = [layout for layout, _ in found]
    return CellBlock(
        CacheLayout(
            bool(v_trans),
            (rotation[0], rotation[1]),
            tuple(layouts[:layers]),
            tuple(layouts[layers:]),
            meta.shape[1] - 3,
        ),
        meta[:, 0],
        sequence,
        tuple(data for _, data in found),
        meta[:, 2:-1],
    )
