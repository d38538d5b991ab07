"""What is equal in two slot files of one fingerprint: tensor types, widths, and their order."""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from keepwarm.core.memory import MemoryKind

Bytes: TypeAlias = NDArray[np.uint8]
Ints: TypeAlias = NDArray[np.int32]
# What holds bytes. `collections.abc.Buffer` says it in Python 3.12.
Buffer: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | Bytes

Reason = Literal[
    "magic",  # not a slot file
    "version",  # another version of the format
    "truncated",  # the bytes end before what they announce
    "trailing",  # bytes are left over after what was announced
    "empty",  # the slot held nothing
    "tokens",  # token ids don't fit: too many, negative, or not as many as the rows
    "media",  # the prompt holds images or audio: tokens alone don't identify it
    "streams",  # not exactly one stream has cells
    "sequence",  # a cell belongs to other sequences than the slot's own
    "position",  # positions aren't 0..n-1 (rows), or not up to n-1 (window)
    "layout",  # tensors that aren't understood, or differ from the layout given
    "checkpoints",  # the appended context checkpoints aren't understood
    "boundary",  # boundary state missing, superfluous, or of another end
    "parts",  # extents don't continue each other, or their size isn't right
]


class SlotFileError(ValueError):
    """Bytes that aren't a slot file as it is understood here; nothing was changed.

    `reason` is one of `Reason`, fit for counting misses.
    """

    def __init__(self, message: str, *, reason: Reason) -> None:
        super().__init__(message)
        self.reason: Reason = reason


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """K or V of one layer.

    `type` is ggml's type number, `row_bytes` the bytes of one token. `element_bytes` is 0 for rows
    stored token after token; else the tensor is transposed (all tokens of one element together)
    and this is the bytes of one element.
    """

    type: int
    row_bytes: int
    element_bytes: int = 0

    @property
    def width(self) -> int:
        """Elements a token of a transposed tensor."""
        return self.row_bytes // self.element_bytes


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """One attention cache: K of each layer, then V of each layer.

    `v_trans` is whether V is transposed (flash attention off), `rotation` the two words the file
    has for K's and V's rotation, kept as they are. `cell_words` are what a cell has beside its
    position and its sequence: 0, or where positions have several parts (M-RoPE) 3.
    """

    v_trans: bool
    rotation: tuple[int, int]
    keys: tuple[TensorLayout, ...]
    values: tuple[TensorLayout, ...]
    cell_words: int = 0

    @property
    def tensors(self) -> tuple[TensorLayout, ...]:
        """In the order of the file and of an extent's payload."""
        return self.keys + self.values

    @property
    def row_bytes(self) -> int:
        """Bytes of one token in all layers, K and V."""
        return sum(t.row_bytes for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Layout:
    """What two slot files must have in common for rows of one to fit into the other.

    `window` is a sliding window's cache, `recurrent` the tensors of a hybrid's recurrent state.
    """

    version: int
    kind: MemoryKind
    rows: CacheLayout
    window: CacheLayout | None = None
    recurrent: tuple[TensorLayout, ...] | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's rows, all layers, K and V."""
        return self.rows.row_bytes

    def rows_bytes(self, tokens: int) -> int:
        """Bytes of the payload of an extent of this many tokens."""
        return tokens * self.rows.row_bytes

    def to_json(self) -> str:
        """One line of text, the same for equal layouts."""
        return json.dumps(
            {
                "version": self.version,
                "kind": self.kind.value,
                "rows": _cache_to_json(self.rows),
                "window": self.window and _cache_to_json(self.window),
                "recurrent": self.recurrent and _listed(self.recurrent),
            },
            separators=(",", ":"),
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Layout:
        """The layout that `to_json` wrote.

        Raises:
            SlotFileError: 'layout', when it isn't one.
        """
        try:
            found = json.loads(text)
            window, recurrent = found["window"], found["recurrent"]
            return cls(
                version=_natural(found["version"]),
                kind=MemoryKind(found["kind"]),
                rows=_cache_from_json(found["rows"]),
                window=None if window is None else _cache_from_json(window),
                recurrent=None
                if recurrent is None
                else _tensors(recurrent, transposed=False, may_be_empty=True),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SlotFileError(f"not a stored layout: {error}", reason="layout") from error


def _cache_to_json(cache: CacheLayout) -> dict[str, Any]:
    more = {"cell_words": cache.cell_words} if cache.cell_words else {}
    return more | {
        "v_trans": cache.v_trans,
        "rotation": list(cache.rotation),
        "keys": _listed(cache.keys),
        "values": _listed(cache.values),
    }


def _listed(tensors: tuple[TensorLayout, ...]) -> list[list[int]]:
    return [[t.type, t.row_bytes, t.element_bytes] for t in tensors]


def _cache_from_json(found: Any) -> CacheLayout:
    v_trans = found["v_trans"]
    if not isinstance(v_trans, bool):
        raise TypeError("v_trans isn't true or false")
    first, second = found["rotation"]
    keys = _tensors(found["keys"], transposed=False)
    values = _tensors(found["values"], transposed=v_trans)
    if not keys or len(keys) != len(values):
        raise ValueError("K and V of different layers")
    cell_words = _natural(found.get("cell_words", 0))
    return CacheLayout(v_trans, (_natural(first), _natural(second)), keys, values, cell_words)


def _tensors(
    rows: Any, *, transposed: bool, may_be_empty: bool = False
) -> tuple[TensorLayout, ...]:
    made = tuple(TensorLayout(*(_natural(n) for n in row)) for row in rows)
    for t in made:
        if (not t.row_bytes and not may_be_empty) or bool(t.element_bytes) != transposed:
            raise ValueError(f"impossible tensor {t}")
        if transposed and t.row_bytes % t.element_bytes:
            raise ValueError(f"impossible tensor {t}")
    return made


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} isn't a number")
    return value
