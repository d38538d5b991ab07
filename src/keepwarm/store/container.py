"""One snapshot in one file, to be carried to another machine.

    8 bytes   magic, b"KEEPWARM"
    u32       version, 1 (all numbers little-endian)
    u32       bytes of the header, at most 16 MiB
    16 bytes  xxh3_128 of the header
    n bytes   header: JSON, see `Header`
    4 x t     the token ids, int32
    m bytes   the slot file, as the engine would have saved it

The file says by itself what it fits (fingerprint, layout) and whether it is whole (a checksum of
tokens and slot file). It is one slot file rather than the store's extents, so that it holds the
prefix alone and nothing of the conversations that share its rows.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from keepwarm.core.tree import Tokens
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer
from keepwarm.slotfile.cells import as_view
from keepwarm.store.disk import Disk, disk_errors, map_file
from keepwarm.store.types import Origin

MAGIC = b"KEEPWARM"
VERSION = 1
MAX_HEADER_BYTES = 16 << 20
_HEAD = struct.Struct("<8sII16s")


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the JSON says. `layout` is the codec's, None for the whole form. Bytes are base64."""

    fingerprint: str
    form: str
    layout: str | None
    tokens: int
    slot_file_bytes: int
    checksum: bytes
    pin: str | None
    origin: Origin
    digest: bytes | None
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Container:
    """An opened file: views of it, valid as long as they are kept."""

    header: Header
    tokens: Tokens
    slot_file: memoryview


def checksum_of(tokens: Tokens, buffers: Sequence[Buffer]) -> bytes:
    """xxh3_128 of the token ids, then of the slot file."""
    hasher = xxhash.xxh3_128(np.ascontiguousarray(tokens, "<i4").tobytes())
    for buffer in buffers:
        hasher.update(as_view(buffer))
    return hasher.digest()


def write_container(
    path: Path, header: Header, tokens: Tokens, slot_file: Sequence[Buffer], *, disk: Disk
) -> int:
    """Write the file (0600), complete or not at all; returns its bytes.

    It replaces an exported snapshot, and nothing else.

    Raises: SnapshotError('exists', 'no_space', 'io', 'missing' for a directory that isn't there).
    """
    with disk_errors(f"exporting to {path}"):
        if path.exists() and not _is_exported(path):
            raise SnapshotError(f"{path} is there, and no exported snapshot", reason="exists")
    told = msgspec.json.encode(header)
    head = _HEAD.pack(MAGIC, VERSION, len(told), xxhash.xxh3_128_digest(told))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    with disk_errors(f"exporting to {path}"):
        try:
            ids = np.ascontiguousarray(tokens, "<i4").tobytes()
            written = disk.write_new(temporary, [head, told, ids, *slot_file])
            disk.rename(temporary, path)
            disk.sync_dir(path.parent)
        except OSError:
            disk.unlink(temporary)
            raise
    return written.size_bytes


def _is_exported(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_container(path: Path) -> Container:
    """Open and verify a file; sizes are checked against what is there before they are used.

    Raises: SnapshotError('missing', 'format' for what isn't such a file, 'truncated', 'checksum').
    """
    with disk_errors(f"importing {path}"):
        view = memoryview(map_file(path))
    if len(view) < _HEAD.size:
        raise SnapshotError(f"{path} is too short to be an exported snapshot", reason="truncated")
    magic, version, header_bytes, checksum = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise SnapshotError(f"{path} isn't an exported snapshot", reason="format")
    if version != VERSION:
        raise SnapshotError(
            f"{path} has format {version}, this Keepwarm knows {VERSION}", reason="format"
        )
    body = view[_HEAD.size :]
    if header_bytes > min(MAX_HEADER_BYTES, len(body)):
        raise SnapshotError(f"{path} ends before its header does", reason="truncated")
    told = body[:header_bytes]
    if xxhash.xxh3_128_digest(told) != checksum:
        raise SnapshotError(f"{path} has a damaged header", reason="checksum")
    try:
        header = msgspec.json.decode(told, type=Header)
    except msgspec.MsgspecError as error:
        raise SnapshotError(f"{path} has a strange header: {error}", reason="format") from error
    rest = body[header_bytes:]
    if header.tokens < 1 or len(rest) != 4 * header.tokens + header.slot_file_bytes:
        raise SnapshotError(f"{path} hasn't the size its header says", reason="truncated")
    tokens = np.frombuffer(rest[: 4 * header.tokens], "<i4")
    slot_file = rest[4 * header.tokens :]
    if checksum_of(tokens, [slot_file]) != header.checksum:
        raise SnapshotError(f"{path} isn't what was exported", reason="checksum")
    return Container(header, tokens, slot_file)
