"""Slot files made from arrays, written apart from the codec, so that it isn't checked by itself."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

MAGIC, VERSION = 0x67677371, 4
Bytes = NDArray[np.uint8]


def random_bytes(seed: int, *shape: int) -> Bytes:
    # Without one bit of the exponent, so that none of it is NaN as F16 or F32.
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8) & np.uint8(0xBF)


@dataclass(frozen=True)
class CacheSpec:
    """An attention cache of `tokens` cells: K and V rows of each layer, [tokens, bytes].

    `element_bytes` of V is written transposed when `v_trans`. `positions` are what the cells say,
    in the order they lie in. `words` are what each cell says besides, as with M-RoPE.
    """

    keys: Sequence[Bytes]
    values: Sequence[Bytes]
    v_trans: bool = False
    element_bytes: int = 2
    types: tuple[int, int] = (1, 1)
    rotation: tuple[int, int] = (0, 0)
    positions: Sequence[int] | None = None
    words: Sequence[tuple[int, ...]] | None = None

    @classmethod
    def random(
        cls, seed: int, *, tokens: int, layers: int = 2, row_bytes: int = 8, v_trans: bool = False
    ) -> CacheSpec:
        keys = [random_bytes(seed + i, tokens, row_bytes) for i in range(layers)]
        values = [random_bytes(seed + 100 + i, tokens, row_bytes) for i in range(layers)]
        return cls(keys, values, v_trans=v_trans)

    @property
    def row_bytes(self) -> int:
        return sum(tensor.shape[1] for tensor in (*self.keys, *self.values))

    def cut(self, lo: int, hi: int) -> CacheSpec:
        return replace(
            self,
            keys=[k[lo:hi] for k in self.keys],
            values=[v[lo:hi] for v in self.values],
            positions=None if self.positions is None else self.positions[lo:hi],
            words=None if self.words is None else self.words[lo:hi],
        )

    def block(self, slot: int) -> bytes:
        """One stream's cells."""
        count = len(self.keys[0])
        positions = range(count) if self.positions is None else self.positions
        out = [struct.pack("<I", count)]
        words = self.words or [()] * count
        out += [
            struct.pack(f"<iI{len(more)}ii", position, 1, *more, slot)
            for position, more in zip(positions, words, strict=True)
        ]
        out.append(struct.pack("<4I", self.v_trans, len(self.keys), *self.rotation))
        for key in self.keys:
            out.append(struct.pack("<iQ", self.types[0], key.shape[1]) + key.tobytes())
        for value in self.values:
            if self.v_trans:
                width = value.shape[1] // self.element_bytes
                shaped = value.reshape(count, width, self.element_bytes)
                out.append(struct.pack("<iII", self.types[1], self.element_bytes, width))
                out.append(shaped.transpose(1, 0, 2).tobytes())
            else:
                out.append(struct.pack("<iQ", self.types[1], value.shape[1]) + value.tobytes())
        return b"".join(out)

    def cache(self, *, slot: int, streams: int) -> bytes:
        """The whole cache, with the streams that have no cells."""
        at = slot if streams > 1 else 0
        empty = struct.pack("<I", 0)
        others = streams - at - 1
        return struct.pack("<I", streams) + empty * at + self.block(slot) + empty * others


@dataclass(frozen=True)
class FileSpec:
    """A slot file. At most one of `window` and `recurrent`; `checkpoints` are whole appendices."""

    tokens: Sequence[int]
    rows: CacheSpec
    window: CacheSpec | None = None
    recurrent: bytes | None = None
    appendix: bytes = b""
    slot: int = 0
    streams: int = 1
    tail: Sequence[int] = field(default=(0,))

    def to_bytes(self) -> bytes:
        words = [-1, 1, len(self.tokens), *self.tokens, *self.tail]
        out = struct.pack(f"<3I{len(words)}i", MAGIC, VERSION, len(words), *words)
        out += self.rows.cache(slot=self.slot, streams=self.streams)
        if self.window is not None:
            out += self.window.cache(slot=self.slot, streams=self.streams)
        if self.recurrent is not None:
            out += self.recurrent
        return out + self.appendix


def recurrent_state(end: int, *, seed: int = 5, layers: int = 3, row_bytes: int = 8) -> bytes:
    """What a hybrid keeps beside its rows: each layer's two tensors, of one cell."""
    out = [struct.pack("<IiIII", 1, end - 1, 0, 0, layers)]
    out += [
        struct.pack("<iQ", 0, row_bytes) + random_bytes(seed + i, row_bytes).tobytes()
        for i in range(layers)
    ]
    out += [struct.pack("<iQ", 0, 0)] * layers
    return b"".join(out)


def checkpoints(*states: tuple[int, int, bytes], version: int = 1) -> bytes:
    """The appendix: for each state its end, its first position, and its bytes."""
    out = [struct.pack("<4s2I", b"SCKP", version, len(states))]
    for end, first, state in states:
        data = struct.pack("<Ii", 0xAF143CD8, 0) + state
        out.append(struct.pack("<qiiQ", end, first, end - 1, len(data)) + data)
        out.append(struct.pack("<QQ", 0, 0))
    return b"".join(out)


def plain_file(
    count: int, *, seed: int = 1, v_trans: bool = False, slot: int = 0, streams: int = 1
) -> FileSpec:
    tokens = [int(t) for t in np.random.default_rng(seed).integers(0, 50_000, count)]
    rows = CacheSpec.random(seed, tokens=count, v_trans=v_trans)
    return FileSpec(tokens, rows, slot=slot, streams=streams)


def parted(spec: FileSpec) -> FileSpec:
    """The same of a model with M-RoPE: cells say their position in three parts, and their token."""
    words = [(at, at, token) for at, token in enumerate(spec.tokens)]
    return replace(spec, rows=replace(spec.rows, words=words))


def window_spec(end: int, *, size: int, seed: int = 9, v_trans: bool = False) -> CacheSpec:
    lo = max(0, end - size)
    spec = CacheSpec.random(seed, tokens=end - lo, layers=3, row_bytes=4, v_trans=v_trans)
    return replace(spec, positions=range(lo, end))


def sliding_file(count: int, *, size: int = 5, v_trans: bool = False) -> FileSpec:
    made = plain_file(count, v_trans=v_trans)
    return replace(made, window=window_spec(count, size=size, v_trans=v_trans))


def hybrid_file(count: int) -> FileSpec:
    return replace(plain_file(count), recurrent=recurrent_state(count))
