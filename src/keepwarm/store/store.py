"""The store as the gateway sees it: asynchronous, on one thread of its own.

Theory of operation. `Snapshots` does the work and isn't thread-safe, so all of it runs on one
worker thread, in the order of the calls. What waits there is disk and memory bandwidth, and the
big steps (checksums, `writev`, flushes, SQLite) release the interpreter, so the event loop goes on.
`lookup`, `pins`, `pin_named` and `stats` read memory and return at once, on any thread.

A call that is cancelled isn't undone: it runs to its end, and what it would have held is let go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import ParamSpec, TypeVar

from keepwarm.core.tree import Tokens
from keepwarm.errors import SnapshotError
from keepwarm.store import admin
from keepwarm.store.catalog import namespaces_of
from keepwarm.store.checks import integrity, verify_extent
from keepwarm.store.disk import Disk
from keepwarm.store.intake import Why
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import (
    Forgotten,
    Hit,
    Imported,
    KeptMark,
    Listed,
    OpenReport,
    Origin,
    Pin,
    Ready,
    Removed,
    Saved,
    StoreFinding,
    StoreStats,
    Verified,
)
from keepwarm.store.unsaved import open_or_do_without
from keepwarm.worker import Worker

log = logging.getLogger("keepwarm.store")

P = ParamSpec("P")
T = TypeVar("T")


class Store:
    """See the module. Made by `open`; `close` it.

    Every method may raise SnapshotError; its `reason` is one of a bounded set: 'no_space' (disk or
    staging full), 'quota', 'checksum', 'truncated', 'missing', 'unreadable', 'io', 'index',
    'unknown' (no such extent), 'boundary' (nothing can be restored there), 'name', 'mark',
    'fingerprint', 'format', 'closed', or the codec's. After any of them the store is usable.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        worker: Worker,
        clock: Callable[[], float],
    ) -> None:
        self._snapshots = snapshots
        self._worker = worker
        self._clock = clock
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        settings: ShelfSettings,
        *,
        clock: Callable[[], float] = time.time,
        disk: Disk | None = None,
        must_last: bool = False,
    ) -> Store:
        """Open the store of one fingerprint and layout, or begin it.

        One that can't be used now (a full disk, an index that somebody holds) is replaced by one in
        the staging directory for this life, and `report.unsaved` says why; unless it `must_last`.

        Raises: ConfigError, if another process has it (the message says which) or its root can be
        no directory; SnapshotError('index', 'no_space', 'io').
        """
        worker = Worker("store", failure="the store failed")
        try:
            snapshots = await asyncio.wrap_future(
                worker.submit(
                    open_or_do_without,
                    settings,
                    disk=disk or Disk(),
                    now_s=clock(),
                    must_last=must_last,
                )
            )
        except BaseException:
            worker.close()
            raise
        return cls(snapshots, worker, clock)

    @property
    def settings(self) -> ShelfSettings:
        """What it was opened with."""
        return self._snapshots.shelf.settings

    @property
    def report(self) -> OpenReport:
        """What opening found and put right."""
        return self._snapshots.shelf.report

    def lookup(self, digests: Sequence[bytes], *, namespace: str) -> Hit | None:
        """The longest kept prefix of a request, whose digests are given shortest first.

        The last digest that is known in `namespace` or to all, and restorable. In memory: no disk,
        no waiting. What it says may be gone a moment later; `materialize` then says 'unknown'.
        """
        return self._snapshots.lookup(digests, namespaces_of(namespace))

    def match_now(self, tokens: Tokens, *, namespace: str) -> Hit | None:
        """As `match`, from memory, as `lookup` does: what changes meanwhile is a miss."""
        try:
            return self._snapshots.find(tokens, namespace)
        except (KeyError, RuntimeError):
            return None

    def knows(self, digest: bytes, *, namespace: str) -> bool:
        """Whether a prompt with this digest was saved, even if its place is an estimate."""
        return self._snapshots.shelf.catalog.knows(digest, namespaces_of(namespace))

    async def match(self, tokens: Sequence[int] | Tokens, *, namespace: str) -> Hit | None:
        """The longest restorable prefix of these very tokens; `is_exact` if it is all of them.

        For warming, where the tokens are known: what is there needs no prefill, only a `mark`.
        """
        return await self._run(self._snapshots.match, tokens, namespace)

    async def new_save(self, expected_bytes: int) -> str:
        """A fresh name for the engine to save to, with room made for about this many bytes.

        Then `absorb` it, or `discard` it if the save failed.

        Raises: SnapshotError('no_space') if it can't fit into the staging directory.
        """
        return await self._run(self._snapshots.staging.expect, expected_bytes)

    async def discard(self, name: str) -> None:
        """Remove a file that was named by `new_save` and won't be absorbed."""
        await self._run(self._snapshots.staging.discard, name)

    async def absorb(
        self,
        name: str,
        *,
        namespace: str,
        marks: Sequence[KeptMark],
        origin: Origin,
        prefill_s: float,
        expected_tokens: Sequence[int] | Tokens | None = None,
    ) -> Saved:
        """Keep what is new of a staged file; when this returns, it is on the disk.

        `marks` are the request's prefixes, none beyond the file's end; boundary states that the
        file has for earlier ends are kept where a mark is. `prefill_s` is what a cold prefill of
        the whole file costs. `expected_tokens`: the file must hold exactly these. The file is used
        up: it stays as the ready file for its end, if the engine can take it as it is.

        Raises: SnapshotError: the codec's reason for a bad file, 'tokens', 'mark', 'quota',
        'no_space', 'io', 'index'. Nothing is half-written, and the staged file is removed.
        """
        why = Why(namespace, tuple(marks), origin, prefill_s)
        return await self._run(
            self._snapshots.absorb, name, why, expected_tokens=expected_tokens, now_s=self._clock()
        )

    async def mark(
        self, extent_id: int, at_tokens: int, *, namespace: str, marks: Sequence[KeptMark]
    ) -> None:
        """Let more digests find a prefix that is kept (another spelling, another namespace)."""
        await self._run(self._snapshots.mark, extent_id, at_tokens, namespace, tuple(marks))

    async def materialize(self, extent_id: int, at_tokens: int) -> Ready:
        """A complete slot file of a prefix in the staging directory, for the engine to restore.

        It is held: call `release(ready.name)` when the restore is over, however it ended.

        Raises: SnapshotError: 'unknown' if it is gone, 'boundary', 'no_space'; 'checksum',
        'truncated', 'missing' or 'unreadable' after the culprit was quarantined.
        """
        future = self._submit(self._snapshots.materialize, extent_id, at_tokens)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            # It may be done already, or end on the store's thread.
            loop = asyncio.get_running_loop()
            future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._let_go, done))
            raise

    def release(self, name: str, *, is_read: bool = True) -> None:
        """The engine has restored it. `is_read` False: it may be reading it still."""
        if not self._is_closed:
            self._worker.leave(self._snapshots.staging.release, name, is_read=is_read)

    def touch(self, extent_id: int, at_tokens: int) -> None:
        """Note that a prefix was of use. Returns at once; written to the index now and then."""
        if not self._is_closed:
            self._worker.leave(self._snapshots.touch, extent_id, at_tokens, now_s=self._clock())

    async def pin(
        self,
        name: str,
        extent_id: int,
        at_tokens: int,
        *,
        origin: Origin,
        digest: bytes | None = None,
        prefill_s: float = 0.0,
    ) -> Pin:
        """Never evict this prefix. A pin of the same name moves here."""
        return await self._run(
            self._snapshots.pin,
            name,
            extent_id,
            at_tokens,
            origin=origin,
            digest=digest,
            prefill_s=prefill_s,
            now_s=self._clock(),
        )

    async def unpin(self, name: str) -> bool:
        """Let it be evicted like any other. False if there is no such pin."""
        return await self._run(self._snapshots.unpin, name)

    def pins(self) -> tuple[Pin, ...]:
        """All pins, by name."""
        pins = self._snapshots.shelf.catalog.pins
        return tuple(pins[name] for name in sorted(pins))

    def pin_named(self, name: str) -> Pin | None:
        """One pin, or None."""
        return self._snapshots.shelf.catalog.pins.get(name)

    async def tokens_of(self, extent_id: int, at_tokens: int) -> Tokens:
        """The token ids of a kept prefix, proved to be those that were saved.

        Raises: SnapshotError('unknown'); 'checksum', 'truncated', 'missing' or 'unreadable' after
        the culprit was quarantined.
        """
        return await self._run(self._snapshots.proved_tokens, extent_id, at_tokens)

    def tokens_now(self, extent_id: int, at_tokens: int) -> Tokens | None:
        """As `tokens_of`, from memory; None if it is gone."""
        try:
            return self._snapshots.tokens_of(extent_id, at_tokens)
        except (SnapshotError, RuntimeError):
            return None

    async def quarantine(
        self, extent_id: int, at_tokens: int, *, reason: str, namespace: str = ""
    ) -> Removed:
        """A proof of this prefix has failed: compare its files anew, and set aside what is damaged.

        What hangs off a damaged extent goes with it. If all is what was written, the rows aren't
        to blame and stay: only this namespace's digests don't lead there any more. `pins` of the
        answer lost their prefix, or their digest: they are to be warmed, or proved, again.
        """
        removed = await self._run(self._snapshots.quarantine, extent_id, at_tokens, namespace)
        if removed.extents:
            log.warning(
                "quarantined extent %d and %d that hang off it: %s",
                removed.extents[0],
                len(removed.extents) - 1,
                reason,
            )
        else:
            log.warning("extent %d is what was written (%s)", extent_id, reason)
        return removed

    async def forget_marks(self) -> int:
        """No digest leads anywhere any more, since texts became other tokens; returns how many.

        Rows stay, and are found by their tokens.
        """
        return await self._run(self._snapshots.forget_marks)

    async def verify(self, progress: Callable[[int, int], None] | None = None) -> Verified:
        """Read all files again and compare; quarantine what differs. `progress(done, total)`.

        One extent at a time, so that saves and restores come in between.
        """
        ids = await self._run(self._snapshots.extent_ids)
        read_bytes = 0
        findings: list[StoreFinding] = []
        for done, extent_id in enumerate(ids, 1):
            size, found = await self._run(verify_extent, self._snapshots, extent_id)
            read_bytes += size
            findings += found
            if progress is not None:
                progress(done, len(ids))
        return Verified(len(ids), read_bytes, tuple(findings))

    async def prune(self, bound_bytes: int) -> Removed:
        """Empty the quarantine and evict the least valuable until within `bound_bytes`."""
        return await self._run(self._snapshots.prune, bound_bytes)

    async def export(self, what: str | tuple[int, int], path: Path) -> int:
        """Write one prefix, a pin's name or (extent id, at), to one file; returns its bytes.

        Raises: SnapshotError('unknown') if there is no such thing, 'no_space', 'io', 'missing'.
        """
        return await self._run(self._snapshots.export, what, path)

    async def import_(self, path: Path, *, namespace: str = "") -> Imported:
        """Keep what `export` wrote, pin included.

        Raises: SnapshotError('fingerprint') for another model, engine or template, 'layout',
        'format', 'truncated', 'checksum', 'missing'.
        """
        return await self._run(
            self._snapshots.import_, path, namespace=namespace, now_s=self._clock()
        )

    async def check_integrity(self) -> tuple[StoreFinding, ...]:
        """Compare index, directory and memory, without reading payloads. Empty if all agree."""
        return await self._run(integrity, self._snapshots)

    async def list_extents(self) -> list[Listed]:
        """All extents, parents before children."""
        return await self._run(admin.list_extents, self._snapshots)

    async def last_end(self, extent_id: int) -> int:
        """Up to where an extent's prefix can be restored. Raises: SnapshotError('unknown')."""
        return await self._run(admin.last_end, self._snapshots, extent_id)

    async def evict_extent(self, extent_id: int) -> Removed:
        """Evict an extent and what hangs off it now. Raises: SnapshotError('unknown', 'pinned')."""
        return await self._run(admin.evict_extent, self._snapshots, extent_id)

    async def evict_unused(self, max_age_s: float) -> Removed:
        """Evict what wasn't used for so long; `pins` of the answer are no longer kept."""
        return await self._run(admin.evict_unused, self._snapshots, self._clock() - max_age_s)

    async def leave_room(self, stores: int) -> Removed:
        """Before it is closed: evict so that the others of so many under one root have room."""
        return await self._run(admin.leave_room, self._snapshots, stores)

    async def forget(self, namespace: str) -> Forgotten:
        """Remove all that is one API key's own. Raises: SnapshotError; again is safe."""
        return await self._run(admin.forget, self._snapshots, namespace)

    def stats(self) -> StoreStats:
        """Sizes and counts, from memory."""
        return self._snapshots.stats()

    async def close(self) -> None:
        """Finish what was asked, write what is pending, remove our staged files, free the lock."""
        if self._is_closed:
            return
        closing = self._submit(self._snapshots.close)
        self._is_closed = True
        try:
            await asyncio.wrap_future(closing)
        finally:
            self._worker.close()

    def _submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._is_closed:
            raise SnapshotError("the store is closed", reason="closed")
        return self._worker.submit(work, *args, **kwargs)

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._submit(work, *args, **kwargs))

    def _let_go(self, future: Future[Ready]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.release(future.result().name)
