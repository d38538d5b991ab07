"""The two forms in which slot files are kept, behind one interface.

`RowsForm` takes a file apart: rows that any prefix shares, and boundary state. It needs the codec
to understand the engine's files (proved at start). `WholeForm` keeps the file as it is, whatever
the model; it is matched at exactly its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from keepwarm.core.memory import MemoryKind
from keepwarm.core.tree import Tokens
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import (
    Buffer,
    Layout,
    RowsPart,
    SlotFile,
    SlotFileError,
    assemble,
    boundary_end,
    file_tokens,
    parse,
    rows_of,
)
from keepwarm.slotfile.boundary import boundary_tensors
from keepwarm.slotfile.finite import rows_are_finite


@dataclass(frozen=True, slots=True)
class Taken:
    """A slot file understood: its tokens, the payload of any `[lo, hi)`, and what else is to keep.

    `ends` has the boundary state of its end, then of earlier ends that the engine had kept (its
    context checkpoints). `check_end` of such a state, and where pieces are joined `rows`, raise
    SnapshotError('not_finite') for what was computed from NaN or infinity. `is_restorable`: the
    file itself, unchanged, can be given back. `held_tokens`: what the slot held in all, where that
    is more, since pictures follow (0: nothing more).
    """

    tokens: Tokens
    rows: Callable[[int, int], Sequence[Buffer]]
    ends: Sequence[tuple[int, Buffer]]
    is_restorable: bool
    check_end: Callable[[Buffer], None] = lambda _state: None
    held_tokens: int = 0


class Form(Protocol):
    """How slot files become extents and back."""

    name: str
    is_whole: bool
    needs_boundary: bool

    def take(self, buffer: Buffer) -> Taken:
        """Check a slot file. Raises: SnapshotError with the codec's reason."""

    def give(
        self,
        tokens: Tokens,
        parts: Sequence[RowsPart],
        boundary: Buffer | None,
        *,
        for_engine: bool,
    ) -> Sequence[Buffer]:
        """The slot file of `tokens`. Not `for_engine`: as the engine would have saved it.

        Raises: SnapshotError with the codec's reason.
        """

    def join(
        self, tokens: Tokens, parts: Sequence[RowsPart], ends: Sequence[tuple[int, Buffer]]
    ) -> Taken:
        """The last rows of `tokens` and states of ends, as another store kept them.

        Raises: SnapshotError with the codec's reason, here or when its rows are asked for.
        """

    def payload_bytes(self, tokens: int, *, file_bytes: int) -> int:
        """Bytes of an extent of `tokens` new tokens out of a file of `file_bytes`."""


class RowsForm:
    """Rows and boundary states of one layout."""

    name = "rows"
    is_whole = False

    def __init__(self, layout: Layout, *, streams: int, max_tokens: int) -> None:
        self.layout = layout
        self.needs_boundary = layout.kind is not MemoryKind.PLAIN
        self._streams = streams
        self._max_tokens = max_tokens
        # Summed over all layers, and asked for in every look-up.
        self._row_bytes = layout.row_bytes

    def take(self, buffer: Buffer) -> Taken:
        """See `Form`."""
        kind = self.layout.kind
        try:
            found = parse(buffer, kind=kind, max_tokens=self._max_tokens)
        except SlotFileError as error:
            raise SnapshotError(f"staged file: {error}", reason=error.reason) from error
        if found.layout != self.layout:
            raise SnapshotError("a slot file of another layout", reason="layout")
        # All of it, not only what is new: a model of quantised weights makes finite rows, and wrong
        # ones, behind rows that are none.
        if not rows_are_finite(self.layout.rows.tensors, found.cells):
            raise SnapshotError("rows that aren't finite", reason="not_finite")
        boundary = found.boundary()
        ends: list[tuple[int, Buffer]] = []
        if boundary is not None:
            self._check_end(boundary)
            ends.append((found.tokens.size, boundary))
        ends += [(c.end_tokens, c.boundary) for c in found.checkpoints]
        if found.is_cut:
            return self._taken_before_media(found, ends)
        # A window's file, as saved, is short of what the engine takes; assembling adds it.
        is_restorable = kind is not MemoryKind.SLIDING_WINDOW
        return Taken(found.tokens, found.rows, ends, is_restorable, self._check_end)

    def _taken_before_media(self, found: SlotFile, ends: Sequence[tuple[int, Buffer]]) -> Taken:
        """What can be restored of a slot with pictures: text, up to the first of them."""
        count = found.tokens.size
        if self.needs_boundary:
            count = max((at for at, _ in ends), default=0)
            if not count:
                raise SnapshotError("no state from before the first picture", reason="media")
        tokens = found.tokens[:count]
        return Taken(tokens, found.rows, ends, False, self._check_end, found.held_tokens)

    def join(
        self, tokens: Tokens, parts: Sequence[RowsPart], ends: Sequence[tuple[int, Buffer]]
    ) -> Taken:
        """See `Form`."""
        with _assembling():
            for at, state in ends:
                if boundary_end(self.layout, state) != at:
                    raise SlotFileError(f"no boundary state of {at} tokens", reason="boundary")

        def rows(lo: int, hi: int) -> Sequence[Buffer]:
            with _assembling():
                buffers = rows_of(self.layout.rows, parts, lo, hi)
            if not rows_are_finite(self.layout.rows.tensors, buffers):
                raise SnapshotError(f"tokens {lo}-{hi} aren't finite", reason="not_finite")
            return buffers

        return Taken(tokens, rows, ends, False, self._check_end)

    def _check_end(self, state: Buffer) -> None:
        held = boundary_tensors(self.layout, state)
        if not rows_are_finite([tensor for tensor, _ in held], [data for _, data in held]):
            raise SnapshotError("a boundary state isn't finite", reason="not_finite")

    def give(
        self,
        tokens: Tokens,
        parts: Sequence[RowsPart],
        boundary: Buffer | None,
        *,
        for_engine: bool,
    ) -> Sequence[Buffer]:
        """See `Form`."""
        with _assembling():
            return assemble(
                self.layout,
                tokens=tokens,
                parts=parts,
                boundary=boundary,
                streams=self._streams,
                mend=for_engine,
            )

    def payload_bytes(self, tokens: int, *, file_bytes: int) -> int:
        """See `Form`."""
        return tokens * self._row_bytes


@contextmanager
def _assembling() -> Iterator[None]:
    try:
        yield
    except SlotFileError as error:
        raise SnapshotError(f"assembling: {error}", reason=error.reason) from error


class WholeForm:
    """Files kept as they came."""

    name = "whole"
    is_whole = True
    needs_boundary = False

    def __init__(self, *, max_tokens: int) -> None:
        self._max_tokens = max_tokens

    def take(self, buffer: Buffer) -> Taken:
        """See `Form`. Only the header is understood."""
        try:
            tokens = file_tokens(buffer)
        except SlotFileError as error:
            raise SnapshotError(f"staged file: {error}", reason=error.reason) from error
        if not 0 < tokens.size <= self._max_tokens:
            raise SnapshotError(f"a slot file of {tokens.size} tokens", reason="tokens")
        return Taken(tokens, lambda _lo, _hi: [buffer], (), is_restorable=True)

    def give(
        self,
        tokens: Tokens,
        parts: Sequence[RowsPart],
        boundary: Buffer | None,
        *,
        for_engine: bool,
    ) -> Sequence[Buffer]:
        """See `Form`."""
        return [parts[0].payload]

    def join(
        self, tokens: Tokens, parts: Sequence[RowsPart], ends: Sequence[tuple[int, Buffer]]
    ) -> Taken:
        """See `Form`."""
        return self.take(parts[0].payload)

    def payload_bytes(self, tokens: int, *, file_bytes: int) -> int:
        """See `Form`."""
        return file_bytes
