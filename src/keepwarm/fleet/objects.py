"""What lies in the shared store: two kinds of immutable object, and what they are called.

    FINGERPRINT/NAMESPACE/rows/ADDRESS    the rows of one extent, and its boundary states
    FINGERPRINT/NAMESPACE/marks/DIGEST    where a prefix ends: its tokens and its chain of extents

An object, all numbers little-endian:

    8 bytes   magic, b"KEEPWOBJ"
    u32       version, 2
    u32       bytes of the header, at most 16 MiB
    16 bytes  sum of the object's name and the header
    16 bytes  sum of the object's name and all that follows the header
    n bytes   header: JSON, `RowsHeader` or `MarkHeader`
    4 x t     the token ids, int32: an extent's own, or all of a mark's prefix
    m bytes   payload, then boundary states in the header's order (rows only)

`ADDRESS` names all tokens up to the extent's end, so whoever saved them first has saved them for
all, and an object never changes. `FINGERPRINT` and `NAMESPACE` are digests: equal, or nothing is
looked at; the header says the fingerprint itself once more, and it is compared.

A sum is xxh3_128, which tells damage, or, where the fleet has a key (`Seal`), a keyed BLAKE2b,
which tells origin, too: whoever can write to the shared store but hasn't the key can remove what is
there, and nothing else. The name is part of it, so that an object that was moved to another's name
is refused. Objects under another key are in another directory.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path as FilePath
from typing import Any, TypeVar

import msgspec
import numpy as np
import xxhash

from keepwarm.core.tree import SHARED, Tokens
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.slotfile.cells import as_view
from keepwarm.store.exchange import Path, Piece, Place
from keepwarm.store.types import Mark

MAGIC = b"KEEPWOBJ"
VERSION = 2
MAX_HEADER_BYTES = 16 << 20
_MIN_KEY_BYTES = 16
_HEAD = struct.Struct("<8sII16s16s")


class RowsHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Of an extent. `ends` are positions and sizes of its boundary states."""

    fingerprint: str
    layout: str | None
    lo: int
    hi: int
    payload_bytes: int
    ends: tuple[tuple[int, int], ...]


class MarkHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Of a mark. `places` are those of `store.exchange.Path`."""

    fingerprint: str
    layout: str | None
    tokens: int
    is_exact: bool
    prefill_s: float
    places: tuple[Place, ...]


H = TypeVar("H", RowsHeader, MarkHeader)


@dataclass(frozen=True, slots=True)
class Seal:
    """How objects are summed; with a key, only who has it can make one that is taken."""

    key: bytes = b""

    @property
    def suffix(self) -> str:
        """What tells the directories of different keys apart; says nothing of the key."""
        if not self.key:
            return ""
        return "-" + hashlib.blake2b(b"keepwarm/key", key=self.key, digest_size=8).hexdigest()

    def sum(self, name: str, *parts: Buffer) -> bytes:
        """16 bytes over an object's name and a part of it."""
        told = name.encode()
        head = len(told).to_bytes(4, "little") + told
        hasher: Any = (
            hashlib.blake2b(head, key=self.key, digest_size=16)
            if self.key
            else xxhash.xxh3_128(head)
        )
        for part in parts:
            hasher.update(as_view(part))
        return bytes(hasher.digest())


def read_seal(file: str) -> Seal:
    """The seal of a fleet's key file; without one, of no key.

    Raises: ConfigError if it can't be read or holds less than 16 bytes.
    """
    if not file:
        return Seal()
    try:
        key = FilePath(file).expanduser().read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"shared.key_file {file} can't be read: {error.strerror}.") from error
    if len(key) < _MIN_KEY_BYTES:
        raise ConfigError(
            f"shared.key_file {file} holds fewer than {_MIN_KEY_BYTES} bytes. Make one with "
            "`openssl rand -hex 32`."
        )
    # Of any length in the file, of one length here.
    return Seal(hashlib.blake2b(key, digest_size=32).digest())


def directory(fingerprint: str, namespace: str, seal: Seal) -> str:
    """Where a namespace's objects of one fingerprint are."""
    whose = "shared"
    if namespace != SHARED:
        whose = "n-" + hashlib.blake2b(namespace.encode(), digest_size=16).hexdigest()
    return f"{xxhash.xxh3_128_hexdigest(fingerprint.encode())}{seal.suffix}/{whose}"


def rows_name(fingerprint: str, place: Place, seal: Seal) -> str:
    """What an extent's object is called."""
    return f"{directory(fingerprint, place.namespace, seal)}/rows/{place.address}"


def mark_name(fingerprint: str, namespace: str, digest: bytes, seal: Seal) -> str:
    """What a mark's object is called."""
    return f"{directory(fingerprint, namespace, seal)}/marks/{digest.hex()}"


def pack_rows(
    piece: Piece, *, name: str, fingerprint: str, layout: str | None, seal: Seal
) -> list[Buffer]:
    """An extent as an object of this name."""
    states = [state for _, state in piece.ends]
    header = RowsHeader(
        fingerprint=fingerprint,
        layout=layout,
        lo=piece.lo,
        hi=piece.hi,
        payload_bytes=as_view(piece.payload).nbytes,
        ends=tuple((at, as_view(state).nbytes) for at, state in piece.ends),
    )
    return _pack(header, piece.tokens, [piece.payload, *states], name=name, seal=seal)


def pack_mark(
    mark: Mark, path: Path, *, name: str, fingerprint: str, layout: str | None, seal: Seal
) -> list[Buffer]:
    """A mark as an object of this name."""
    header = MarkHeader(
        fingerprint=fingerprint,
        layout=layout,
        tokens=int(path.tokens.size),
        is_exact=mark.is_exact,
        prefill_s=path.prefill_s,
        places=path.places,
    )
    return _pack(header, path.tokens, [], name=name, seal=seal)


def unpack_rows(
    data: Buffer, *, name: str, fingerprint: str, layout: str | None, seal: Seal
) -> Piece:
    """An extent's object, verified.

    Raises: SnapshotError('format', 'truncated', 'checksum', 'fingerprint', 'layout').
    """
    header, rest = _unpack(data, RowsHeader, name=name, seal=seal)
    _same(header, fingerprint=fingerprint, layout=layout)
    count = header.hi - header.lo
    sizes = [header.payload_bytes, *(size for _, size in header.ends)]
    if header.lo < 0 or count <= 0 or min(sizes) < 0 or len(rest) != 4 * count + sum(sizes):
        raise SnapshotError("an object hasn't the size its header says", reason="truncated")
    tokens = np.frombuffer(rest[: 4 * count], "<i4")
    at = 4 * count
    parts = []
    for size in sizes:
        parts.append(rest[at : at + size])
        at += size
    ends = tuple((end, part) for (end, _), part in zip(header.ends, parts[1:], strict=True))
    return Piece(header.lo, header.hi, tokens, parts[0], ends)


def unpack_mark(
    data: Buffer, *, name: str, fingerprint: str, layout: str | None, seal: Seal
) -> tuple[bool, Path]:
    """A mark's object, verified: whether its end is exact, and the prefix.

    Raises: SnapshotError, as `unpack_rows`.
    """
    header, rest = _unpack(data, MarkHeader, name=name, seal=seal)
    _same(header, fingerprint=fingerprint, layout=layout)
    places = header.places
    joined = all(a.lo < b.lo == a.take <= a.hi for a, b in pairwise(places))
    if (
        len(rest) != 4 * header.tokens
        or not places
        or places[0].lo != 0
        or places[-1].take != header.tokens
        or not places[-1].lo < places[-1].take <= places[-1].hi
        or not joined
    ):
        raise SnapshotError("a mark's chain has gaps", reason="format")
    return header.is_exact, Path(np.frombuffer(rest, "<i4"), places, header.prefill_s)


def _pack(
    header: RowsHeader | MarkHeader,
    tokens: Tokens,
    rest: Sequence[Buffer],
    *,
    name: str,
    seal: Seal,
) -> list[Buffer]:
    told = msgspec.json.encode(header)
    ids = np.ascontiguousarray(tokens, "<i4").tobytes()
    sums = seal.sum(name, told), seal.sum(name, ids, *rest)
    head = _HEAD.pack(MAGIC, VERSION, len(told), *sums)
    return [head, told, ids, *rest]


def _unpack(data: Buffer, kind: type[H], *, name: str, seal: Seal) -> tuple[H, memoryview]:
    view = as_view(data)
    if len(view) < _HEAD.size:
        raise SnapshotError("an object is too short", reason="truncated")
    magic, version, size, header_sum, rest_sum = _HEAD.unpack_from(view)
    if magic != MAGIC or version != VERSION:
        raise SnapshotError("an object of a format that isn't known", reason="format")
    body = view[_HEAD.size :]
    if size > min(MAX_HEADER_BYTES, len(body)):
        raise SnapshotError("an object ends before its header does", reason="truncated")
    told, rest = body[:size], body[size:]
    if not (
        hmac.compare_digest(seal.sum(name, told), header_sum)
        and hmac.compare_digest(seal.sum(name, rest), rest_sum)
    ):
        raise SnapshotError("an object isn't what was written", reason="checksum")
    try:
        return msgspec.json.decode(told, type=kind), rest
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"an object has a strange header: {error}", reason="format") from error


def _same(header: RowsHeader | MarkHeader, *, fingerprint: str, layout: str | None) -> None:
    if header.fingerprint != fingerprint:
        raise SnapshotError("an object of another model or engine", reason="fingerprint")
    if header.layout != layout:
        raise SnapshotError("an object of another layout", reason="layout")
