"""Extents that travel: reading them out of a store, and taking others' in.

For a second level behind the store (see `keepwarm.fleet`). Extents are told apart by what they
hold, not by this store's ids: `address` names all tokens up to an extent's end. All functions run
on the store's thread, in turn with its other work.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from keepwarm.core.tree import Tokens
from keepwarm.errors import SnapshotError
from keepwarm.slotfile import Buffer, RowsPart
from keepwarm.slotfile.cells import as_view
from keepwarm.store.catalog import namespaces_of
from keepwarm.store.intake import Why
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.store import Store
from keepwarm.store.types import KeptMark, Origin, Saved


@dataclass(frozen=True, slots=True)
class Place:
    """One extent of a chain: its address, its tokens `[lo, hi)`, of which `[lo, take)` are meant.

    `namespace` is the extent's own. `size_bytes` is what its object holds, without the tokens.
    """

    address: str
    namespace: str
    lo: int
    hi: int
    take: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class KnownMark:
    """A digest and where its prefix ends."""

    namespace: str
    mark: KeptMark


@dataclass(frozen=True, slots=True)
class Path:
    """A prefix: its tokens, and the extents that hold them, root first.

    `extents` are this store's ids of them; empty for a path that came from elsewhere.
    """

    tokens: Tokens
    places: tuple[Place, ...]
    prefill_s: float
    extents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one extent holds: payload as the store keeps it, and boundary states by position."""

    lo: int
    hi: int
    tokens: Tokens
    payload: Buffer
    ends: tuple[tuple[int, Buffer], ...]


def address(namespace: str, tokens: Tokens) -> str:
    """The name of the rows that end behind `tokens`, the same on every node: 32 hex digits.

    The namespace is part of it: the same text of two tenants is two objects, as it is two extents.
    """
    h = hashlib.blake2b(digest_size=16, key=b"keepwarm/extent", salt=b"1")
    name = namespace.encode()
    h.update(len(name).to_bytes(4, "little") + name)
    h.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    return h.hexdigest()


def newest(store: Store) -> int:
    """The id that the next new extent gets. Returns at once, from memory."""
    return store._snapshots.shelf.next_id


async def kept_since(store: Store, first_id: int) -> list[int]:
    """Ids of the extents there are from this id on, in order, so parents come first."""
    return await store._run(
        lambda s: [i for i in s.extent_ids() if i >= first_id], store._snapshots
    )


async def marks_ending_in(store: Store, extent_id: int) -> list[KnownMark]:
    """The marks of an extent that are exact or end with it; those in between are estimates."""
    return await store._run(_marks, store._snapshots, extent_id)


async def path_to(store: Store, extent_id: int, at: int) -> Path:
    """How the prefix that ends in an extent is made up. Raises: SnapshotError('unknown')."""
    return await store._run(_path, store._snapshots, extent_id, at)


async def read_place(store: Store, extent_id: int) -> Place:
    """Where an extent is, all of it. Raises: SnapshotError('unknown')."""
    return await store._run(_place, store._snapshots, extent_id)


async def read_piece(store: Store, extent_id: int) -> Piece:
    """An extent's own content, verified before its first use. Raises: SnapshotError."""
    return await store._run(_read, store._snapshots, extent_id)


async def keep_pieces(
    store: Store,
    tokens: Tokens,
    pieces: Sequence[Piece],
    *,
    namespace: str,
    marks: Sequence[KeptMark],
    prefill_s: float,
) -> Saved:
    """Keep a prefix whose last extents came from elsewhere.

    Args:
        store: where.
        tokens: the whole prefix.
        pieces: what is lacking here, in order, without gaps, up to the prefix's end; the store
            must have what stands before the first.
        namespace, marks: whose it is, and what it is found by.
        prefill_s: what a cold prefill of all of it costs.

    Raises: SnapshotError: 'tokens' if the pieces don't hold these tokens, 'missing' if what stands
    before them isn't here, or as `Store.absorb`. Nothing is half-written.
    """
    why = Why(namespace, tuple(marks), Origin.IMPORT, prefill_s)
    return await store._run(_keep, store._snapshots, tokens, tuple(pieces), why)


def _marks(snapshots: Snapshots, extent_id: int) -> list[KnownMark]:
    catalog = snapshots.shelf.catalog
    extent = catalog.tree.get(extent_id)
    found: list[tuple[str, bytes]] = []
    with contextlib.suppress(sqlite3.Error):  # nobody finds it elsewhere then, and that is all
        found = snapshots.shelf.index.marks_of(extent_id)
    out = []
    for namespace, digest in found:
        place = catalog.mark_place(namespace, digest)
        if extent is None or place is None or place.extent_id != extent_id:
            continue
        if place.is_exact or place.at == extent.hi:
            out.append(KnownMark(namespace, KeptMark(digest, place.at, place.is_exact)))
    return out


def _path(snapshots: Snapshots, extent_id: int, at: int) -> Path:
    catalog = snapshots.shelf.catalog
    tokens = snapshots.tokens_of(extent_id, at)
    places = []
    prefill_s = 0.0
    links = catalog.tree.chain(extent_id, at)
    for link in links:
        place = replace(_place(snapshots, link.extent_id), take=link.take)
        places.append(place)
        own = catalog.row(link.extent_id).prefill_s
        prefill_s += own * (link.take - place.lo) / (place.hi - place.lo)
    return Path(tokens, tuple(places), prefill_s, tuple(link.extent_id for link in links))


def _place(snapshots: Snapshots, extent_id: int) -> Place:
    extent = snapshots.shelf.catalog.tree.get(extent_id)
    if extent is None:
        raise SnapshotError(f"no extent {extent_id}", reason="unknown")
    whole = snapshots.tokens_of(extent.id, extent.hi)
    return Place(
        address(extent.namespace, whole),
        extent.namespace,
        extent.lo,
        extent.hi,
        extent.hi,
        extent.total_bytes,
    )


def _read(snapshots: Snapshots, extent_id: int) -> Piece:
    catalog, files = snapshots.shelf.catalog, snapshots.shelf.files
    extent = catalog.tree.get(extent_id)
    if extent is None:
        raise SnapshotError(f"no extent {extent_id}", reason="unknown")
    payload = files.open(catalog.row(extent_id))
    ends = tuple((at, files.open(catalog.end(extent_id, at))) for at in sorted(extent.boundaries))
    return Piece(extent.lo, extent.hi, extent.tokens.copy(), payload, ends)


def _keep(snapshots: Snapshots, tokens: Tokens, pieces: tuple[Piece, ...], why: Why) -> Saved:
    form = snapshots.form
    base = pieces[0].lo
    takes = [*(piece.lo for piece in pieces[1:]), tokens.size]
    for piece, take in zip(pieces, takes, strict=True):
        own = piece.tokens[: take - piece.lo]
        if not piece.lo < take <= piece.hi or not np.array_equal(own, tokens[piece.lo : take]):
            raise SnapshotError("pieces that don't hold this prefix", reason="tokens")
    parts = [
        RowsPart(piece.payload, piece.lo, piece.hi, take)
        for piece, take in zip(pieces, takes, strict=True)
    ]
    ends = [end for piece in pieces for end in piece.ends if end[0] <= tokens.size]
    if form.needs_boundary and all(at != tokens.size for at, _ in ends):
        raise SnapshotError("no boundary state for this end", reason="boundary")
    if base:
        # What stands before the pieces isn't copied, since it is kept; so it must be here.
        known = snapshots.shelf.catalog.tree.match(
            tokens[:base], namespaces=namespaces_of(why.namespace)
        )
        if known.at != base:
            raise SnapshotError(f"the first {base} tokens aren't here", reason="missing")
    ends.sort(key=lambda end: end[0] != tokens.size)  # that of its own end first
    taken = form.join(tokens, parts, ends if form.needs_boundary else ())
    if not np.array_equal(taken.tokens, tokens):
        raise SnapshotError("pieces of other tokens than they say", reason="tokens")
    size = sum(as_view(part.payload).nbytes for part in parts)
    return snapshots._keep(taken, why, file_bytes=size, now_s=time.time())
