"""Reading a slot file through views, with every claimed size checked against the bytes there are.

Files are written by another program, possibly another version of it, into a directory that a crash
may leave anything in. So no number from a file is used before it is known to fit: loops are bounded
by constants, tensors are views of bytes that exist, and in the end every byte is accounted for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepwarm.core.slotfile.layout import (
    Buffer,
    Bytes,
    CacheLayout,
    Ints,
    Layout,
    MemoryKind,
    SlotFileError,
    TensorLayout,
)

MAGIC = 0x67677371  # LLAMA_STATE_SEQ_MAGIC
VERSION = 4  # LLAMA_STATE_SEQ_VERSION of the builds this was tried with
TOKENS_AT = 24  # magic, version, word count, then -1, 1, token count
MAX_STREAMS = 256  # LLAMA_MAX_SEQ; also bounds sequence ids
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_POSITION = 2**31 - 1  # llama_pos is an i32


@dataclass(frozen=True, slots=True)
class CellBlock:
    """The cells of one stream of one attention cache, as views of the file.

    `positions` are in the file's order. `tensors` follow `layout.tensors`: arrays
    [cells, row_bytes] or, transposed, [width, cells, element_bytes].
    """

    layout: CacheLayout
    positions: Ints
    sequence: int
    tensors: tuple[Bytes, ...]


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

    def u32s(self, count: int) -> tuple[int, ...]:
        """The next `count` numbers."""
        at = self.skip(4 * count)
        return struct.unpack_from(f"<{count}I", self.view, at)

    def type_and_size(self) -> tuple[int, int]:
        """A tensor's type (i32) and the bytes of a row (u64)."""
        at = self.skip(12)
        kind, size = struct.unpack_from("<iQ", self.view, at)
        return kind, size

    def bytes_view(self, size: int) -> Bytes:
        """The next `size` bytes, not copied."""
        return np.frombuffer(self.view, np.uint8, size, self.skip(size))


def as_view(buffer: Buffer) -> memoryview:
    """The buffer's bytes as one flat, read-only row."""
    whole = buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)
    return whole.cast("B").toreadonly()


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A parsed file. Its arrays are views: they keep the buffer, and are valid as long as it is.

    `streams` is how many streams the file has (1 with a unified KV cache, else one a slot), `slot`
    the engine's slot it was saved from (the sequence id).
    """

    tokens: Ints
    layout: Layout
    streams: int
    slot: int
    _cells: CellBlock
    _order: NDArray[np.intp] | None
    _boundary: memoryview | None

    def rows(self, lo: int, hi: int) -> list[Bytes]:
        """The payload of the extent [lo, hi): one flat array a tensor, first all K, then all V.

        Together they are `layout.rows_bytes(hi - lo)` bytes. Views, except for transposed V and for
        cells that the engine had scattered, which must be gathered.

        Raises:
            IndexError: the range isn't inside the file.
        """
        if not 0 <= lo <= hi <= len(self.tokens):
            raise IndexError(f"tokens [{lo}, {hi}) of {len(self.tokens)}")
        which = slice(lo, hi) if self._order is None else self._order[lo:hi]
        return [
            np.ascontiguousarray(data[:, which] if t.element_bytes else data[which]).reshape(-1)
            for t, data in zip(self.layout.rows.tensors, self._cells.tensors, strict=True)
        ]

    def boundary(self) -> memoryview | None:
        """What holds only at this file's end, as it lies in the file; None for plain attention."""
        return self._boundary

    @property
    def is_in_order(self) -> bool:
        """The cells lie in the order of their positions, as `assemble` writes them."""
        return self._order is None


def parse(buffer: Buffer, *, kind: MemoryKind, max_tokens: int) -> SlotFile:
    """Take a whole slot file apart, copying nothing.

    `kind` is what the model's header says: a file doesn't name it. `max_tokens` is the context that
    a restore must fit into.

    Raises:
        SlotFileError: anything that isn't exactly such a file.
    """
    cursor = Cursor(as_view(buffer))
    tokens = _read_tokens(cursor, max_tokens=max_tokens)
    streams, stream, cells, _ = _read_cache(cursor)
    order = _rows_order(cells, tokens=len(tokens))
    window: CacheLayout | None = None
    boundary: memoryview | None = None
    if kind is MemoryKind.SLIDING_WINDOW:
        window_streams, window_stream, block, span = _read_cache(cursor)
        if (window_streams, window_stream) != (streams, stream):
            raise SlotFileError("the window is in another stream than the rows", reason="streams")
        check_window(block, tokens=len(tokens))
        window, boundary = block.layout, cursor.view[span]
    elif kind is MemoryKind.HYBRID:
        boundary = cursor.view[cursor.skip(cursor.left) :]
        if not boundary:
            raise SlotFileError("no recurrent state after the rows", reason="truncated")
    if cursor.left:
        raise SlotFileError(f"{cursor.left} bytes after the end", reason="trailing")
    if streams > 1 and cells.sequence != stream:
        raise SlotFileError(f"sequence {cells.sequence} in stream {stream}", reason="sequence")
    layout = Layout(VERSION, kind, cells.layout, window)
    return SlotFile(tokens, layout, streams, cells.sequence, cells, order, boundary)


def file_tokens(buffer: Buffer) -> Ints:
    """The token ids a slot file says it holds; a view. The state behind them isn't looked at.

    Raises:
        SlotFileError: the header isn't one of a text prompt in version 4.
    """
    return _read_tokens(Cursor(as_view(buffer)), max_tokens=MAX_POSITION)


def window_range(layout: Layout, boundary: Buffer) -> tuple[int, int]:
    """The positions [lo, hi) in a sliding window's boundary state; hi is the end it was saved at.

    With lo > 0 a restore is reused by the engine from `hi` on, since `assemble` mends it. With
    lo == 0 the prefix fits into the window, and the engine prefills it all after a restore (unless
    it runs with a full-size window cache).

    Raises:
        SlotFileError: it isn't a window of this layout.
    """
    positions = read_window(layout, boundary).positions
    return int(positions.min()), int(positions.max()) + 1


def read_window(layout: Layout, boundary: Buffer) -> CellBlock:
    """The cells of a sliding window's boundary state."""
    cursor = Cursor(as_view(boundary))
    (count,) = cursor.u32s(1)
    block = _read_block(cursor, count)
    if cursor.left or block.layout != layout.window:
        raise SlotFileError("the window isn't of this layout", reason="boundary")
    return block


def check_window(block: CellBlock, *, tokens: int) -> None:
    """Refuse a window that isn't some positions in a row up to the end."""
    positions = np.sort(block.positions)
    lo = tokens - len(positions)
    if lo < 0 or not np.array_equal(positions, np.arange(lo, tokens, dtype=np.int32)):
        raise SlotFileError("the window's positions don't lead up to the end", reason="position")


def _read_tokens(cursor: Cursor, *, max_tokens: int) -> Ints:
    if cursor.left < 8:
        raise SlotFileError("no room for a header", reason="truncated")
    magic, version = cursor.u32s(2)
    if magic != MAGIC:
        raise SlotFileError(f"magic {magic:#x}", reason="magic")
    if version != VERSION:
        raise SlotFileError(f"version {version}, {VERSION} is known", reason="version")
    (count,) = cursor.u32s(1)
    words = np.frombuffer(cursor.view, "<i4", count, cursor.skip(4 * count))
    if count < 4 or words[0] != -1 or words[1] != 1:
        raise SlotFileError("the token list begins in an unknown way", reason="tokens")
    found = int(words[2])
    if not 0 <= found <= count - 4:
        raise SlotFileError(f"{found} tokens in {count} words", reason="tokens")
    tokens = words[3 : 3 + found]
    if found != count - 4 or words[-1] != 0:
        raise SlotFileError("the prompt holds more than text", reason="media")
    if found > max_tokens:
        raise SlotFileError(f"{found} tokens, at most {max_tokens} fit", reason="tokens")
    if found and int(tokens.min()) < 0:
        # Placeholders of media are negative, so such a prompt isn't told by its token ids.
        raise SlotFileError("the prompt holds a token that isn't text", reason="media")
    return tokens


def _read_cache(cursor: Cursor) -> tuple[int, int, CellBlock, slice]:
    """One attention cache: how many streams, which has cells, these, and where they lie."""
    (streams,) = cursor.u32s(1)
    if not 0 < streams <= MAX_STREAMS:
        raise SlotFileError(f"{streams} streams", reason="streams")
    found: tuple[int, CellBlock, slice] | None = None
    for stream in range(streams):
        start = cursor.at
        (count,) = cursor.u32s(1)
        if count == 0:
            continue
        if found is not None:
            raise SlotFileError("two streams have cells", reason="streams")
        block = _read_block(cursor, count)
        found = stream, block, slice(start, cursor.at)
    if found is None:
        raise SlotFileError("no stream has cells", reason="empty")
    return streams, *found


def _read_block(cursor: Cursor, count: int) -> CellBlock:
    """The `count` cells of a stream: whose they are, then the tensors."""
    meta = np.frombuffer(cursor.view, "<i4", 3 * count, cursor.skip(12 * count)).reshape(count, 3)
    if not count or (meta[:, 1] != 1).any():
        raise SlotFileError("a cell that isn't of one sequence", reason="sequence")
    sequence = int(meta[0, 2])
    if not 0 <= sequence < MAX_STREAMS or (meta[:, 2] != sequence).any():
        raise SlotFileError("cells of several sequences", reason="sequence")
    v_trans, layers, *rotation = cursor.u32s(4)
    if v_trans > 1 or not 0 < layers <= MAX_LAYERS:
        raise SlotFileError(f"{layers} layers, V transposed {v_trans}", reason="layout")
    found = [_read_rows(cursor, count) for _ in range(layers)]
    read_value = _read_transposed if v_trans else _read_rows
    found += [read_value(cursor, count) for _ in range(layers)]
    layouts = [layout for layout, _ in found]
    return CellBlock(
        CacheLayout(
            bool(v_trans),
            (rotation[0], rotation[1]),
            tuple(layouts[:layers]),
            tuple(layouts[layers:]),
        ),
        meta[:, 0],
        sequence,
        tuple(data for _, data in found),
    )


def _read_rows(cursor: Cursor, count: int) -> tuple[TensorLayout, Bytes]:
    kind, row_bytes = cursor.type_and_size()
    if kind < 0 or row_bytes == 0:
        raise SlotFileError(f"type {kind}, {row_bytes} bytes a row", reason="layout")
    data = cursor.bytes_view(count * row_bytes)
    return TensorLayout(kind, row_bytes), data.reshape(count, row_bytes)


def _read_transposed(cursor: Cursor, count: int) -> tuple[TensorLayout, Bytes]:
    kind, element_bytes, width = cursor.u32s(3)
    if kind >= 2**31 or element_bytes == 0 or width == 0:
        raise SlotFileError(
            f"type {kind}, {width} elements of {element_bytes} bytes", reason="layout"
        )
    data = cursor.bytes_view(width * count * element_bytes)
    layout = TensorLayout(kind, width * element_bytes, element_bytes)
    return layout, data.reshape(width, count, element_bytes)


def _rows_order(cells: CellBlock, *, tokens: int) -> NDArray[np.intp] | None:
    """Where each position's cell lies in the file; None when they lie in order.

    A unified cache gives a slot whatever cells are free, so they may come in any order.
    """
    if len(cells.positions) != tokens:
        raise SlotFileError(f"{len(cells.positions)} cells for {tokens} tokens", reason="tokens")
    expected = np.arange(tokens, dtype=np.int32)
    if np.array_equal(cells.positions, expected):
        return None
    order = np.argsort(cells.positions, kind="stable")
    if not np.array_equal(cells.positions[order], expected):
        raise SlotFileError("positions aren't those of the tokens", reason="position")
    return order
