"""How a model remembers."""

from __future__ import annotations

from enum import StrEnum


class MemoryKind(StrEnum):
    """How the model remembers, which decides what a slot file holds. From the model's header."""

    PLAIN = "plain"
    """Every layer attends to every token: rows only."""
    SLIDING_WINDOW = "sliding_window"
    """Some layers attend to the last tokens only: rows, then a cache of the window."""
    HYBRID = "hybrid"
    """Some layers keep a recurrent state: rows, then that state."""
