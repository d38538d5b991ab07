"""Reading a slot file: whole, through views, every byte accounted for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile.boundary import (
    APPENDIX_MAGIC,
    Boundary,
    read_boundary,
    read_checkpoints,
)
from keepwarm.slotfile.cells import CellBlock, Cursor, as_view, read_cache
from keepwarm.slotfile.layout import (
    Buffer,
    Bytes,
    Ints,
    Layout,
    SlotFileError,
)

MAGIC = 0x67677371  # LLAMA_STATE_SEQ_MAGIC
VERSION = 4  # LLAMA_STATE_SEQ_VERSION of the builds this was tried with
MAX_POSITION = 2**31 - 1  # llama_pos is an i32


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Boundary state of an earlier end of the same tokens, kept by the engine."""

    end_tokens: int
    boundary: memoryview


@dataclass(frozen=True, slots=True)
class SlotFile:
    """A parsed file. Its arrays are views: they keep the buffer, and are valid as long as it is.

    `streams` is how many streams the file has (1 with a unified KV cache, else one a slot), `slot`
    the engine's slot it was saved from. `checkpoints` hold boundary state of earlier ends, in the
    file's order; `appendix` is the part of the file they are in (empty where there is none).

    Of a slot with pictures or sounds, `tokens`, rows and checkpoints are those before the first of
    them, and there is no boundary state; `held_tokens` counts all that the slot held.
    """

    tokens: Ints
    held_tokens: int
    layout: Layout
    streams: int
    slot: int
    checkpoints: tuple[Checkpoint, ...]
    appendix: memoryview
    _cells: CellBlock
    _order: NDArray[np.intp] | None
    _boundary: memoryview | None

    def rows(self, lo: int, hi: int) -> list[memoryview]:
        """The payload of the extent [lo, hi): one flat row of bytes a tensor, all K, then all V.

        Together they are `layout.rows_bytes(hi - lo)` bytes. Views, except for transposed V and for
        cells that the engine had scattered, which must be gathered.

        Raises:
            IndexError: the range isn't inside the file.
        """
        if not 0 <= lo <= hi <= len(self.tokens):
            raise IndexError(f"tokens [{lo}, {hi}) of {len(self.tokens)}")
        which = slice(lo, hi) if self._order is None else self._order[lo:hi]
        return [
            np.ascontiguousarray(data[:, which] if t.element_bytes else data[which])
            .reshape(-1)
            .data
            for t, data in zip(self.layout.rows.tensors, self._cells.tensors, strict=True)
        ]

    @property
    def cells(self) -> tuple[Bytes, ...]:
        """All rows, one array a tensor, in whatever order they lie in the file."""
        return self._cells.tensors

    def boundary(self) -> memoryview | None:
        """What holds only at this file's end, as it lies in the file.

        None for plain attention, and where the end lies behind a picture.
        """
        return self._boundary

    @property
    def is_cut(self) -> bool:
        """Whether the slot held more than this: pictures or sounds, and what followed them."""
        return len(self.tokens) < self.held_tokens

    @property
    def is_in_order(self) -> bool:
        """The cells lie in the order of their positions, as `assemble` writes them."""
        return self._order is None


def parse(buffer: Buffer, *, kind: MemoryKind, max_tokens: int) -> SlotFile:
    """Take a whole slot file apart, copying nothing.

    `kind` is what the model's header says: a file doesn't name it. `max_tokens` is the context that
    a restore must fit into. All of a file is checked, also what lies behind a picture.

    Raises:
        SlotFileError: anything that isn't exactly such a file.
    """
    cursor = Cursor(as_view(buffer))
    tokens, held = _read_tokens(cursor, max_tokens=max_tokens)
    is_cut = len(tokens) < held
    cache = read_cache(cursor, may_be_parted=kind is not MemoryKind.SLIDING_WINDOW)
    order = _rows_order(cache.block, tokens=tokens, held=held)
    # There a picture's tokens share positions, so that what lies behind it is counted otherwise.
    is_parted = is_cut and cache.block.layout.cell_words > 0
    end: Boundary | None = None
    if kind is not MemoryKind.PLAIN:
        end = read_boundary(cursor, kind)
        if end.end_tokens != held and not is_parted:
            raise SlotFileError(
                f"boundary state of {end.end_tokens} tokens, not {held}", reason="position"
            )
        if end.sequence not in (None, cache.block.sequence):
            raise SlotFileError("rows and window are of two slots", reason="sequence")
    layout = Layout(
        version=VERSION,
        kind=kind,
        rows=cache.block.layout,
        window=None if end is None else end.window,
        recurrent=None if end is None else end.recurrent,
    )
    start = cursor.at
    checkpoints: tuple[Checkpoint, ...] = ()
    if end is not None and cursor.starts_with(APPENDIX_MAGIC):
        checkpoints = tuple(
            _checked(found, end, tokens=at, is_exact=not is_parted or at <= len(tokens))
            for at, found in read_checkpoints(cursor, kind)
        )
    if cursor.left:
        raise SlotFileError(f"{cursor.left} bytes after the end", reason="trailing")
    if is_cut:
        checkpoints = tuple(c for c in checkpoints if c.end_tokens <= len(tokens))
    return SlotFile(
        tokens=tokens,
        held_tokens=held,
        layout=layout,
        streams=cache.streams,
        slot=cache.block.sequence,
        checkpoints=checkpoints,
        appendix=cursor.view[start:],
        _cells=cache.block,
        _order=order,
        _boundary=None if end is None or is_cut else end.raw,
    )


def file_tokens(buffer: Buffer) -> Ints:
    """The token ids a slot file says it holds; a view. The state behind them isn't looked at.

    Raises:
        SlotFileError: the header isn't one of a text prompt in version 4.
    """
    tokens, held = _read_tokens(Cursor(as_view(buffer)), max_tokens=MAX_POSITION)
    if len(tokens) < held:
        raise SlotFileError("the prompt holds more than text", reason="media")
    return tokens


def _read_tokens(cursor: Cursor, *, max_tokens: int) -> tuple[Ints, int]:
    """The tokens before the first picture or sound, and how many there are in all."""
    magic, version = cursor.u32s(2)
    if magic != MAGIC:
        raise SlotFileError(f"magic {magic:#x}", reason="magic")
    if version != VERSION:
        raise SlotFileError(f"version {version}, {VERSION} is known", reason="version")
    count = cursor.number("I")
    words = np.frombuffer(cursor.take(4 * count), "<i4")
    if count < 4 or words[0] != -1 or words[1] != 1:
        raise SlotFileError("the token list begins in an unknown way", reason="tokens")
    found = int(words[2])
    if not 0 <= found <= count - 4:
        raise SlotFileError(f"{found} tokens in {count} words", reason="tokens")
    if found > max_tokens:
        raise SlotFileError(f"{found} tokens, at most {max_tokens} fit", reason="tokens")
    tokens, media = words[3 : 3 + found], words[3 + found :]
    # Placeholders of media are negative, so what follows the first isn't told by its token ids.
    placeholders = np.flatnonzero(tokens < 0)
    if not placeholders.size:
        if media.size != 1 or media[0] != 0:
            raise SlotFileError("the prompt holds more than text", reason="media")
        return tokens, found
    first, starts = int(placeholders[0]), media[1 : 1 + max(int(media[0]), 0)]
    if not starts.size or int(starts.min()) != first:
        raise SlotFileError("media don't begin where a token says so", reason="media")
    if not first:
        raise SlotFileError("the prompt begins with media", reason="media")
    return tokens[:first], found


def _rows_order(cells: CellBlock, *, tokens: Ints, held: int) -> NDArray[np.intp] | None:
    """Where each position's cell lies in the file; None when they lie in order.

    A unified cache gives a slot whatever cells are free, so they may come in any order. With M-RoPE
    each cell says its position in three parts, and its token: of text they are all the same. What
    a picture's cells say isn't looked at, but that they lie behind the text.
    """
    count = len(tokens)
    if len(cells.positions) != held:
        raise SlotFileError(f"{len(cells.positions)} cells for {held} tokens", reason="tokens")
    order = np.argsort(cells.positions, kind="stable")
    positions, words = cells.positions[order], cells.words[order[:count]]
    expected = np.arange(held, dtype=np.int32)
    if cells.layout.cell_words:
        is_right = np.array_equal(positions[:count], expected[:count])
        is_right &= bool((positions[count:] >= count).all())
        is_right &= bool((words[:, :2] == expected[:count, None]).all())
        is_right &= np.array_equal(words[:, 2], tokens)
    else:
        is_right = np.array_equal(positions, expected)
    if not is_right:
        raise SlotFileError("positions aren't those of the tokens", reason="position")
    return None if np.array_equal(order[:count], expected[:count]) else order


def _checked(found: Boundary, end: Boundary, *, tokens: int, is_exact: bool) -> Checkpoint:
    if (found.window, found.recurrent) != (end.window, end.recurrent):
        raise SlotFileError("a checkpoint of another layout", reason="checkpoints")
    if tokens != found.end_tokens and is_exact:
        raise SlotFileError("a checkpoint holds another state", reason="checkpoints")
    if found.end_tokens > end.end_tokens:
        raise SlotFileError("a checkpoint from after the end", reason="checkpoints")
    return Checkpoint(tokens, found.raw)
