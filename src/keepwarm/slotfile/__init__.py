"""Slot files: the bytes that llama-server's `save` writes and its `restore` reads, taken apart.

A file is token ids, *rows* (attention caches that keep every token, so they can be cut after any
token and put together again) and, for some models, *boundary state* that holds only for the end it
was saved at. The byte table is in `docs/slot-file-format.md`.

Everything here is pure and reads through views: `parse` copies no rows, `assemble` gives buffers
for `writev`. Nothing is guessed: bytes that aren't understood raise `SlotFileError`.
"""

from keepwarm.slotfile.assemble import RowsPart, assemble, round_trip_ok, rows_of
from keepwarm.slotfile.boundary import boundary_end, window_range
from keepwarm.slotfile.layout import (
    Buffer,
    CacheLayout,
    Layout,
    SlotFileError,
    TensorLayout,
)
from keepwarm.slotfile.parse import Checkpoint, SlotFile, file_tokens, parse

__all__ = [
    "Buffer",
    "CacheLayout",
    "Checkpoint",
    "Layout",
    "RowsPart",
    "SlotFile",
    "SlotFileError",
    "TensorLayout",
    "assemble",
    "boundary_end",
    "file_tokens",
    "parse",
    "round_trip_ok",
    "rows_of",
    "window_range",
]
