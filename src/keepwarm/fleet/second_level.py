"""The shared store as the second level behind a node's own: write-behind, read-through.

Theory of operation. A task looks now and then whether the local store has new extents, and writes
each one's rows, then the marks that end in it, so a mark that can be read always leads to rows
that are there. Nothing waits for it. A request for which much is lacking here asks for the marks
of its message ends; the longest one found is weighed as the router does (`costs.best_way`), and if
moving it is faster than prefilling, only the rows that are lacking here are fetched, verified and
kept, before the request is planned. Then the local store simply has them.

Any doubt or failure ends in a cold prefill, counted by reason. Rows that turned out wrong are not
asked for again in this process's life.

Bounds:
1. A request waits for the shared store no longer than its cold prefill would take (`_stake_s`). A
   fetch that takes longer goes on without it, and what comes is there for the next request.
2. An object that doesn't fit the time limit (`slow`) is tried twice and then left: others pass it
   by, in both directions, and the marks that need it aren't written.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol, TypedDict

from keepwarm.core.prompt import BLOCK_CHARS, Mark, Prompt
from keepwarm.core.rates import Mean, Rates
from keepwarm.core.tree import SHARED
from keepwarm.errors import SnapshotError
from keepwarm.fleet.costs import MOVE_MIN_TOKENS, NodeCosts, PrefixOrigin, best_way
from keepwarm.fleet.objects import (
    Seal,
    mark_name,
    pack_mark,
    pack_rows,
    rows_name,
    unpack_mark,
    unpack_rows,
)
from keepwarm.slotfile import Buffer
from keepwarm.store import exchange
from keepwarm.store.catalog import namespaces_of
from keepwarm.store.exchange import Path, Piece, Place
from keepwarm.store.store import Store
from keepwarm.store.types import KeptMark as StoreMark

log = logging.getLogger("keepwarm.fleet")

LOOK_EVERY_S = 0.25
MARKS_ASKED = 6
"""Message ends that are asked for, last first: a conversation goes on from its last or last but one
turn, an edited one from a few before."""
FETCHES_AT_ONCE = 8
_MARK_TIMEOUT_S = 1.0
_KNOWN_ADDRESSES = 100_000
_SLOW_TRIES = 2
CHECK_AGAIN_S = 3600.0
"""Objects may expire; an hour after it was seen one is looked for again before it is relied on."""
# A request isn't held up for a look at the shared store unless this much prefill is at stake.
_STAKE_CALLS = 3.0


class Objects(Protocol):
    """What is needed of a shared store; see `shared.SharedStore`, which is one."""

    @property
    def is_away(self) -> bool:
        """Whether calls are refused just now."""

    async def get(
        self, name: str, *, timeout_s: float | None = None, size_bytes: int = 0
    ) -> Buffer | None:
        """An object of about this size, or None. Raises: SnapshotError('away', 'slow')."""

    async def has(self, name: str) -> bool:
        """Whether there is one. Raises: SnapshotError('away')."""

    async def put(self, name: str, buffers: Sequence[Buffer]) -> int:
        """Write one; returns its bytes. Raises: SnapshotError('away', 'slow')."""


class _Ours(TypedDict):
    """What this node's objects are marked with."""

    fingerprint: str
    layout: str | None
    seal: Seal


@dataclass(frozen=True, slots=True)
class Brought:
    """What one request got: `tokens` are now in the local store, `moved_tokens` came from afar."""

    tokens: int
    moved_tokens: int
    moved_bytes: int
    seconds: float


@dataclass(slots=True)
class SecondCounts:
    """What the second level did since the start. `misses` by reason."""

    asked: int = 0
    moved: int = 0
    moved_tokens: int = 0
    moved_bytes: int = 0
    stored_extents: int = 0
    stored_bytes: int = 0
    misses: Counter[str] = field(default_factory=Counter)


class SecondLevel:
    """See the module. Lives on one event loop; `start` it, `close` it before the store."""

    def __init__(
        self,
        store: Store,
        shared: Objects,
        *,
        rates: Rates,
        row_bytes: int,
        seal: Seal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._seal = seal or Seal()
        self._shared = shared
        self._rates = rates
        self._row_bytes = row_bytes
        self._clock = clock
        settings = store.settings
        self._fingerprint = settings.fingerprint
        self._layout = None if settings.layout is None else settings.layout.to_json()
        self._fetch_s_per_byte = Mean(1 / 110e6)  # a gigabit link
        self._call_s = Mean(0.02)
        self._next_id = exchange.newest(store)
        self._pending: deque[int] = deque()
        self._there: OrderedDict[str, float] = OrderedDict()
        self._bad: set[str] = set()
        self._slow: Counter[str] = Counter()
        self._bringing: dict[tuple[str, bytes], asyncio.Task[Brought | None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.counts = SecondCounts()
        self._idle_since_s = clock()

    @property
    def costs(self) -> NodeCosts:
        """What things cost on this node, for its router and for itself."""
        return NodeCosts.of(
            self._rates,
            row_bytes=self._row_bytes,
            fetch_s_per_byte=self._fetch_s_per_byte.value,
            fetch_call_s=self._call_s.value,
            can_fetch=not self._shared.is_away,
        )

    @property
    def pending(self) -> int:
        """Extents that wait to be written."""
        return len(self._pending) + max(exchange.newest(self._store) - self._next_id, 0)

    @property
    def idle_since_s(self) -> float:
        """Since when all there is has been written; `inf` while something waits."""
        return self._idle_since_s if not self.pending else float("inf")

    def start(self) -> None:
        """Begin to write behind; nothing if it has begun."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._write_behind())

    async def close(self, *, flush_s: float = 0.0) -> None:
        """Write what waits, within a time, and end."""
        until = self._clock() + flush_s
        while self._must_flush() and self._clock() < until:  # noqa: ASYNC110 - at shutdown
            await asyncio.sleep(0.02)
        for task in (self._task, *self._bringing.values()):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._task = None

    def _must_flush(self) -> bool:
        return self._task is not None and self.pending > 0 and not self._shared.is_away

    async def bring(
        self,
        prompt: Prompt,
        namespace: str,
        *,
        total_tokens: int,
        local_tokens: int,
        wait_s: float = 0.0,
    ) -> Brought | None:
        """Move a request's longest shared prefix here, if that is faster than to prefill it.

        Args:
            prompt: whose marks are asked for.
            namespace: whose it is.
            total_tokens, local_tokens: its length, and how much of it this node has.
            wait_s: how long it will have to wait anyway.
        """
        stake_s = self._rates.prefill_s(total_tokens - local_tokens)
        if (
            total_tokens - local_tokens < MOVE_MIN_TOKENS
            or stake_s < _STAKE_CALLS * self._call_s.value
            or self._shared.is_away
        ):
            return None
        self.counts.asked += 1
        moving = self._bring(
            prompt,
            namespace,
            total_tokens=total_tokens,
            local_tokens=local_tokens,
            wait_s=wait_s,
        )
        try:
            return await asyncio.wait_for(moving, stake_s)
        except TimeoutError:
            self.counts.misses["late"] += 1
            return None

    async def _bring(
        self,
        prompt: Prompt,
        namespace: str,
        *,
        total_tokens: int,
        local_tokens: int,
        wait_s: float,
    ) -> Brought | None:
        try:
            found = await self._longest(message_ends(prompt), namespace, prompt)
            if found is None:
                return None
            mark, is_exact, path = found
            way = best_way(
                self.costs,
                total_tokens=total_tokens,
                local_tokens=local_tokens,
                shared_tokens=path.tokens.size,
                wait_s=wait_s,
            )
            if way.origin is not PrefixOrigin.MOVED:
                return None
            return await self._single(namespace, mark.digest, is_exact, path)
        except SnapshotError as error:
            self._missed(error)
            return None

    async def pull(self, digest: bytes) -> Brought | None:
        """Move one shared prefix here, whatever it costs: before this node takes requests."""
        try:
            data = await self._mark(SHARED, digest)
            if data is None:
                return None
            return await self._single(SHARED, digest, *data)
        except SnapshotError as error:
            self._missed(error)
            return None

    async def offer(self, digest: bytes) -> None:
        """See to it that a shared prefix which is here can be had by others too."""
        hit = self._store.lookup([digest], namespace=SHARED)
        if hit is None:
            return
        try:
            if await self._shared.has(mark_name(self._fingerprint, SHARED, digest, self._seal)):
                return
            mark = StoreMark(digest, hit.at_tokens, hit.is_exact)
            await self._write_mark(SHARED, mark, hit.extent_id)
        except SnapshotError as error:
            self._missed(error)

    def _missed(self, error: SnapshotError) -> None:
        self.counts.misses[error.reason] += 1
        log.log(logging.DEBUG if error.reason == "away" else logging.WARNING, "%s", error)

    async def _longest(
        self, marks: Sequence[Mark], namespace: str, prompt: Prompt
    ) -> tuple[Mark, bool, Path] | None:
        asked = [
            (mark, space)
            for mark in marks
            for space in (namespaces_of(namespace) if mark is prompt.static else (namespace,))
        ]
        found = await asyncio.gather(
            *(self._mark(space, mark.digest) for mark, space in asked), return_exceptions=True
        )
        best: tuple[Mark, bool, Path] | None = None
        for (mark, _), data in zip(asked, found, strict=True):
            if isinstance(data, SnapshotError):
                self._missed(data)
            elif isinstance(data, BaseException):
                raise data
            elif data is not None and (best is None or data[1].tokens.size > best[2].tokens.size):
                best = mark, *data
        return best

    async def _mark(self, namespace: str, digest: bytes) -> tuple[bool, Path] | None:
        name = mark_name(self._fingerprint, namespace, digest, self._seal)
        began_s = self._clock()
        data = await self._shared.get(name, timeout_s=_MARK_TIMEOUT_S)
        self._call_s.learn(self._clock() - began_s)
        if data is None:
            return None
        return unpack_mark(data, name=name, **self._as_ours)

    async def _single(
        self, namespace: str, digest: bytes, is_exact: bool, path: Path
    ) -> Brought | None:
        """One fetch of a prefix at a time; others who want it wait for the same."""
        key = (namespace, digest)
        task = self._bringing.get(key)
        if task is None:
            work = self._fetch(namespace, digest, is_exact, path)
            task = self._bringing[key] = asyncio.get_running_loop().create_task(work)
            task.add_done_callback(lambda done: self._brought(key, done))
        return await asyncio.shield(task)

    def _brought(self, key: tuple[str, bytes], done: asyncio.Task[Brought | None]) -> None:
        """A fetch has ended, perhaps behind the requests that waited for it."""
        self._bringing.pop(key, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            log.debug("a fetch failed: %s", error)

    async def _fetch(
        self, namespace: str, digest: bytes, is_exact: bool, path: Path
    ) -> Brought | None:
        began_s = self._clock()
        known = await self._store.match(path.tokens, namespace=namespace)
        local = known.at_tokens if known is not None else 0
        mark = StoreMark(digest, path.tokens.size, is_exact)
        if known is not None and known.is_exact:
            await self._store.mark(
                known.extent_id, known.at_tokens, namespace=namespace, marks=[mark]
            )
            return Brought(local, 0, 0, self._clock() - began_s)
        lacking = [place for place in path.places if place.take > local]
        if any(place.address in self._bad for place in lacking):
            raise SnapshotError("rows that were found damaged before", reason="quarantined")
        if any(self._slow[place.address] >= _SLOW_TRIES for place in lacking):
            raise SnapshotError("rows that don't fit the time limit", reason="slow")
        room = asyncio.Semaphore(FETCHES_AT_ONCE)
        pieces = await asyncio.gather(*(self._rows(place, room) for place in lacking))
        fetched_s = self._clock() - began_s
        size = sum(place.size_bytes for place in lacking)
        if size >= 1_000_000:
            self._fetch_s_per_byte.learn(max(fetched_s - self._call_s.value, 1e-5) / size)
        try:
            await exchange.keep_pieces(
                self._store,
                path.tokens,
                pieces,
                namespace=namespace,
                marks=[mark],
                prefill_s=path.prefill_s,
            )
        except SnapshotError as error:
            if error.reason not in ("no_space", "quota", "io", "index", "closed"):
                self._bad.update(place.address for place in lacking)
            raise
        moved = path.tokens.size - local
        self.counts.moved += 1
        self.counts.moved_tokens += moved
        self.counts.moved_bytes += size
        for place in path.places:
            self._note(place.address)
        return Brought(path.tokens.size, moved, size, self._clock() - began_s)

    async def _rows(self, place: Place, room: asyncio.Semaphore) -> Piece:
        name = rows_name(self._fingerprint, place, self._seal)
        async with room:
            try:
                data = await self._shared.get(name, size_bytes=place.size_bytes)
            except SnapshotError as error:
                self._slow[place.address] += error.reason == "slow"
                raise
        if data is None:
            raise SnapshotError("rows that a mark names are gone", reason="missing")
        try:
            piece = unpack_rows(data, name=name, **self._as_ours)
        except SnapshotError:
            self._bad.add(place.address)
            raise
        if (piece.lo, piece.hi) != (place.lo, place.hi):
            raise SnapshotError("rows of another range than the mark says", reason="tokens")
        return piece

    async def _write_behind(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self._write_pending()
            except SnapshotError as error:
                # Away or evicted: what waits is tried again when there is a chance.
                self._missed(error)

    async def _write_pending(self) -> None:
        newest = exchange.newest(self._store)
        if newest > self._next_id:
            self._pending.extend(await exchange.kept_since(self._store, self._next_id))
            self._next_id = newest
        while self._pending and not self._shared.is_away:
            extent_id = self._pending[0]
            try:
                await self._write_extent(extent_id)
                for known in await exchange.marks_ending_in(self._store, extent_id):
                    await self._write_mark(known.namespace, known.mark, extent_id)
            except SnapshotError as error:
                if error.reason == "away":
                    raise
                self._missed(error)  # evicted or quarantined meanwhile, or too slow
            self._pending.popleft()
            self._idle_since_s = self._clock()

    async def _write_extent(self, extent_id: int) -> None:
        """Write an extent's rows unless they are there."""
        hit = await exchange.read_place(self._store, extent_id)
        name = rows_name(self._fingerprint, hit, self._seal)
        if self._is_there(hit.address):
            return
        if self._slow[hit.address] >= _SLOW_TRIES:
            raise SnapshotError("rows that don't fit the time limit", reason="slow")
        if not await self._shared.has(name):
            piece = await exchange.read_piece(self._store, extent_id)
            packed = pack_rows(piece, name=name, **self._as_ours)
            try:
                self.counts.stored_bytes += await self._shared.put(name, packed)
            except SnapshotError as error:
                self._slow[hit.address] += error.reason == "slow"
                raise
            self.counts.stored_extents += 1
        self._note(hit.address)

    async def _write_mark(self, namespace: str, mark: StoreMark, extent_id: int) -> None:
        """Write a mark behind the rows that it needs."""
        path = await exchange.path_to(self._store, extent_id, mark.at_tokens)
        for place, owner in zip(path.places, path.extents, strict=True):
            if not self._is_there(place.address):
                await self._write_extent(owner)
        name = mark_name(self._fingerprint, namespace, mark.digest, self._seal)
        packed = pack_mark(mark, path, name=name, **self._as_ours)
        await self._shared.put(name, packed)

    @property
    def _as_ours(self) -> _Ours:
        return {"fingerprint": self._fingerprint, "layout": self._layout, "seal": self._seal}

    def _is_there(self, address: str) -> bool:
        return self._clock() - self._there.get(address, float("-inf")) < CHECK_AGAIN_S

    def _note(self, address: str) -> None:
        self._there.pop(address, None)
        self._there[address] = self._clock()
        if len(self._there) > _KNOWN_ADDRESSES:
            self._there.popitem(last=False)


def message_ends(prompt: Prompt) -> list[Mark]:
    """The marks of a prompt that are worth asking others for: its last messages' ends, and the
    static end.

    Marks inside a message stand `BLOCK_CHARS` behind one another. An end that happens to do so,
    too, is passed over.
    """
    marks = prompt.marks
    ends = [mark for before, mark in pairwise(marks) if mark.chars - before.chars != BLOCK_CHARS][
        -MARKS_ASKED:
    ]
    static = prompt.static
    if static is not None and static not in ends:
        ends.insert(0, static)
    return ends
