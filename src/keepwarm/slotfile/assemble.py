"""Writing a slot file from parts that came from other files."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile.boundary import (
    APPENDIX_MAGIC,
    APPENDIX_VERSION,
    STATE_MAGIC,
    boundary_end,
    read_window,
)
from keepwarm.slotfile.cells import MAX_STREAMS, CellBlock, as_view
from keepwarm.slotfile.layout import (
    Buffer,
    Bytes,
    CacheLayout,
    Ints,
    Layout,
    SlotFileError,
)
from keepwarm.slotfile.parse import MAGIC, MAX_POSITION, VERSION, parse

MASKED_ROWS = 2  # see _mended


@dataclass(frozen=True, slots=True)
class RowsPart:
    """The rows of [lo, hi) as `SlotFile.rows` gave them, of which [lo, take) are used.

    `payload` may be a memory-mapped file: it isn't copied unless V is transposed.
    """

    payload: Buffer
    lo: int
    hi: int
    take: int


def assemble(
    layout: Layout,
    *,
    tokens: Ints,
    parts: Sequence[RowsPart],
    boundary: Buffer | None,
    streams: int,
    slot: int = 0,
    mend: bool = True,
    appendix: Buffer = b"",
) -> list[memoryview | bytes]:
    """A whole slot file, as buffers to be written one after the other (`writev`).

    `streams` is the running engine's count. `slot` is only what the file says: an engine restores
    into whichever slot it is asked to. `boundary` is what `SlotFile.boundary` gave at exactly this
    end. With `mend`, a sliding window gets what llama-server needs to use it: masked rows before
    it, or, where it begins at position 0, a context checkpoint behind it. `appendix` is written at
    the end as it is; it is for a file that is to be as it was, so without `mend`.

    Raises:
        SlotFileError: the parts don't make a file that the engine would take.
    """
    count = len(tokens)
    if not 0 < count <= MAX_POSITION:
        raise SlotFileError(f"{count} tokens", reason="empty" if not count else "tokens")
    if int(np.min(tokens)) < 0:
        raise SlotFileError("a token that isn't text", reason="media")
    if layout.version != VERSION:
        raise SlotFileError(f"version {layout.version}, {VERSION} is known", reason="version")
    if not 0 < streams <= MAX_STREAMS or not 0 <= slot < MAX_STREAMS:
        raise SlotFileError(f"slot {slot} in {streams} streams", reason="streams")
    if streams > 1 and slot >= streams:
        raise SlotFileError(f"slot {slot} in {streams} streams", reason="streams")
    blocks = [_part_tensors(layout.rows, part) for part in _in_a_row(parts, tokens=count)]
    before, after = _other_streams(streams, slot)
    out: list[memoryview | bytes] = [_header(tokens), before]
    out += _block(
        layout.rows,
        _cells(np.arange(count, dtype=np.int32), slot=slot, layout=layout.rows, tokens=tokens),
        list(zip(*blocks, strict=True)),
    )
    out.append(after)
    if layout.kind is MemoryKind.PLAIN:
        if boundary is not None:
            raise SlotFileError("boundary state for plain attention", reason="boundary")
    else:
        out += _tail(layout, boundary, tokens=count, slot=slot, streams=streams, mend=mend)
    out.append(as_view(appendix))
    return [part for part in out if part]


def round_trip_ok(buffer: Buffer, kind: MemoryKind) -> bool:
    """The proof at start-up that this engine's files are understood.

    True when every byte is accounted for and the file put together from its parts is the same
    file. Meant for a file of a fresh engine: one whose cells lie scattered is written in order, so
    it isn't the same.
    """
    view = as_view(buffer)
    try:
        found = parse(view, kind=kind, max_tokens=MAX_POSITION)
        count = len(found.tokens)
        cut = count // 2
        parts = [
            RowsPart(b"".join(found.rows(lo, hi)), lo, hi, hi)
            for lo, hi in ((0, cut), (cut, count))
            if lo < hi
        ]
        made = assemble(
            found.layout,
            tokens=found.tokens,
            parts=parts,
            boundary=found.boundary(),
            streams=found.streams,
            slot=found.slot,
            mend=False,
            appendix=found.appendix,
        )
    except SlotFileError:
        return False
    at = 0
    for piece in map(as_view, made):
        there = np.frombuffer(view[at : at + len(piece)], np.uint8)
        if not np.array_equal(there, np.frombuffer(piece, np.uint8)):
            return False
        at += len(piece)
    return at == len(view)


def _header(tokens: Ints) -> bytes:
    words = np.empty(len(tokens) + 4, "<i4")
    words[:3] = -1, 1, len(tokens)
    words[3:-1] = tokens
    words[-1] = 0
    return struct.pack("<3I", MAGIC, VERSION, len(words)) + words.tobytes()


def _other_streams(streams: int, slot: int) -> tuple[bytes, bytes]:
    """What stands before and after the one stream that has cells: counts of no cells."""
    at = slot if streams > 1 else 0
    return struct.pack(f"<{1 + at}I", streams, *[0] * at), bytes(4 * (streams - at - 1))


def _cells(
    positions: Ints, *, slot: int, layout: CacheLayout | None = None, tokens: Ints | None = None
) -> bytes:
    """The count of cells, and whose they are; `tokens` where the cells' layout has them, too."""
    meta = np.empty((len(positions), 3 + (layout.cell_words if layout else 0)), "<i4")
    meta[:, 0], meta[:, 1], meta[:, -1] = positions, 1, slot
    if layout and layout.cell_words:
        meta[:, 2:4], meta[:, 4] = positions[:, None], tokens
    return struct.pack("<I", len(positions)) + meta.tobytes()


def _in_a_row(parts: Sequence[RowsPart], *, tokens: int) -> Sequence[RowsPart]:
    at = 0
    for part in parts:
        if part.lo != at or not part.lo < part.take <= part.hi:
            raise SlotFileError(
                f"rows [{part.lo}, {part.take}) of {part.hi} after {at}", reason="parts"
            )
        at = part.take
    if at != tokens:
        raise SlotFileError(f"rows of {at} tokens for {tokens}", reason="parts")
    return parts


def rows_of(layout: CacheLayout, parts: Sequence[RowsPart], lo: int, hi: int) -> list[memoryview]:
    """The payload of the extent [lo, hi) out of parts that hold it, as `SlotFile.rows` gives it.

    Views where one part holds all of it.

    Raises:
        SlotFileError: the parts aren't as long as they say, or don't hold these tokens.
    """
    tensors: list[list[Bytes]] = [[] for _ in layout.tensors]
    at = lo
    for part in parts:
        begin, end = max(lo, part.lo), min(hi, part.take)
        if begin >= end:
            continue
        if begin != at:
            break
        at = end
        which = slice(begin - part.lo, end - part.lo)
        found = _part_tensors(layout, part)
        for pieces, tensor, data in zip(tensors, layout.tensors, found, strict=True):
            pieces.append(data[:, which] if tensor.element_bytes else data[which])
    if at != hi or lo >= hi:
        raise SlotFileError(f"rows up to {at} for [{lo}, {hi})", reason="parts")
    return [
        np.ascontiguousarray(
            pieces[0]
            if len(pieces) == 1
            else np.concatenate(pieces, axis=1 if tensor.element_bytes else 0)
        )
        .reshape(-1)
        .data
        for tensor, pieces in zip(layout.tensors, tensors, strict=True)
    ]


def _part_tensors(layout: CacheLayout, part: RowsPart) -> list[Bytes]:
    """The rows that are used of each tensor of a part, as views."""
    count, used = part.hi - part.lo, part.take - part.lo
    payload = np.frombuffer(as_view(part.payload), np.uint8)
    if len(payload) != count * layout.row_bytes:
        raise SlotFileError(
            f"{len(payload)} bytes for {count} rows of {layout.row_bytes}", reason="parts"
        )
    found: list[Bytes] = []
    at = 0
    for tensor in layout.tensors:
        size = count * tensor.row_bytes
        data = payload[at : at + size]
        at += size
        if tensor.element_bytes:
            shaped = data.reshape(tensor.width, count, tensor.element_bytes)
            found.append(shaped[:, :used])
        else:
            found.append(data.reshape(count, tensor.row_bytes)[:used])
    return found


def _block(
    layout: CacheLayout, cells: bytes, tensors: Sequence[Sequence[Bytes]]
) -> Iterator[memoryview | bytes]:
    """One stream's cells. Each tensor is given as arrays whose rows follow each other."""
    yield cells
    yield struct.pack("<4I", layout.v_trans, len(layout.keys), *layout.rotation)
    for tensor, pieces in zip(layout.tensors, tensors, strict=True):
        if tensor.element_bytes:
            yield struct.pack("<iII", tensor.type, tensor.element_bytes, tensor.width)
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
            yield np.ascontiguousarray(joined).reshape(-1).data
        else:
            yield struct.pack("<iQ", tensor.type, tensor.row_bytes)
            yield from (piece.reshape(-1).data for piece in pieces)


def _tail(
    layout: Layout,
    boundary: Buffer | None,
    *,
    tokens: int,
    slot: int,
    streams: int,
    mend: bool,
) -> Iterator[memoryview | bytes]:
    """What follows the rows: the window's cache, or the recurrent state."""
    if boundary is None:
        raise SlotFileError("this model needs boundary state at its end", reason="boundary")
    end_tokens = boundary_end(layout, boundary)
    if end_tokens != tokens:
        raise SlotFileError(f"boundary state of {end_tokens} tokens at {tokens}", reason="boundary")
    if layout.kind is MemoryKind.HYBRID:
        yield as_view(boundary)
        return
    window = read_window(layout, boundary)
    lo = int(window.positions.min())
    before, after = _other_streams(streams, slot)
    yield before
    if mend and lo > 0:
        yield from _mended(window, slot=slot)
    else:
        yield from _as_saved(window, boundary, slot=slot)
    yield after
    if mend and lo == 0:
        state = (before, *_as_saved(window, boundary, slot=slot), after)
        yield from _checkpoint(state, end_tokens=tokens, slot=slot)


def _as_saved(window: CellBlock, boundary: Buffer, *, slot: int) -> tuple[memoryview | bytes, ...]:
    cells = _cells(window.positions, slot=slot)
    return cells, as_view(boundary)[len(cells) :]


def _mended(window: CellBlock, *, slot: int) -> Iterator[memoryview | bytes]:
    """The window with rows before it, of any bytes, so of the first row's.

    llama-server prefills everything unless a row lies before the window of the first token it
    evaluates. One row is enough for the token after the end; the second also lets the last token
    be evaluated again, which needs no row that isn't there. Not one more: the engine would take it
    for a window that reaches further back. Positions start at 0; one below aborts the server.
    """
    lo = int(window.positions.min())
    count = min(MASKED_ROWS, lo)
    before = np.arange(lo - count, lo, dtype=np.int32)
    tensors = [
        (np.repeat(data[:, :1], count, axis=1), data)
        if tensor.element_bytes
        else (np.repeat(data[:1], count, axis=0), data)
        for tensor, data in zip(window.layout.tensors, window.tensors, strict=True)
    ]
    cells = _cells(np.concatenate((before, window.positions)), slot=slot)
    yield from _block(window.layout, cells, tensors)


def _checkpoint(
    state: Sequence[memoryview | bytes], *, end_tokens: int, slot: int
) -> Iterator[memoryview | bytes]:
    """An appendix that holds the window once more, as a context checkpoint at the file's own end.

    With a prefix that fits into the window there is no row to put before it. But an engine that
    reads the appendix goes back to a checkpoint that starts at position 0.
    """
    opening = struct.pack("<Ii", STATE_MAGIC, slot)
    yield struct.pack("<4s2I", APPENDIX_MAGIC, APPENDIX_VERSION, 1)
    yield struct.pack("<qii", end_tokens, 0, end_tokens - 1)
    yield struct.pack("<Q", len(opening) + sum(map(len, state))) + opening
    yield from state
    yield bytes(16)  # no draft model's state, no speculative decoder's
