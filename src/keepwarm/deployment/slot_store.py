"""Between the scheduler's terms (marks, positions, sources) and the store's (extents, digests)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from keepwarm.core.plan import LEAST_TOKENS, Stored
from keepwarm.core.prompt import Prompt
from keepwarm.core.slots import Position
from keepwarm.core.tree import Tokens
from keepwarm.errors import SnapshotError
from keepwarm.store.store import Store
from keepwarm.store.types import Hit, KeptMark, Origin, Saved


@dataclass(frozen=True, slots=True)
class HandedFile:
    """A complete slot file in the engine's slot directory."""

    name: str
    tokens: int


# A prefix that the engine has refused isn't asked for again for so long. Nothing is removed: the
# pool may have been full, or the file not to be read by a server of another user's. Until then each
# request would wait for the refusal.
_REFUSED_FOR_S = 600.0


class SlotStore:
    """The store, for slots. `row_bytes` is one token's KV state; in whole form an estimate.

    `is_usable` False: this engine restores nothing, so nothing is offered.
    """

    def __init__(
        self, store: Store, *, row_bytes: int, cuttable: bool, is_usable: bool = True
    ) -> None:
        self.store = store
        self.row_bytes = row_bytes
        self.cuttable = cuttable
        self._is_usable = is_usable
        self._refused: dict[int, float] = {}

    def lookup(self, prompt: Prompt, namespace: str, ids: Tokens | None = None) -> Stored | None:
        """The longest kept prefix of a prompt, from memory: by its tokens where they are known.

        By its digests only what was counted is found: a place that is estimated is no end to start
        from, and a prompt of which more than that is in doubt is counted.
        """
        if not self._is_usable:
            return None
        if ids is not None:
            # The last token is evaluated again, which a state that can't be cut can't do.
            wanted = ids if self.cuttable or prompt.has_media else ids[:-1]
            hit = self.store.match_now(wanted, namespace=namespace)
            if hit is not None and hit.at_tokens < LEAST_TOKENS:
                return None
        else:
            digests = [mark.digest for mark in prompt.marks]
            hit = self.store.lookup(digests, namespace=namespace)
        if hit is None or self.is_refused(hit.extent_id):
            return None
        return self._stored(hit, hit.at_tokens)

    def knows(self, digest: bytes, namespace: str) -> bool:
        """Whether a prompt with this mark was saved, wherever its end is."""
        return self.store.knows(digest, namespace=namespace)

    def refused(self, stored: Stored) -> None:
        """The engine has refused to restore this: it isn't offered for some time."""
        if stored.extent_id is not None:
            self._refused[stored.extent_id] = time.monotonic() + _REFUSED_FOR_S

    def is_refused(self, extent_id: int | None) -> bool:
        """Whether the engine has refused to restore this not long ago."""
        return extent_id is not None and time.monotonic() < self._refused.get(extent_id, 0.0)

    async def match(self, tokens: Sequence[int], namespace: str) -> Stored | None:
        """The longest restorable prefix of these very tokens."""
        if not self._is_usable:
            return None
        hit = await self.store.match(tokens, namespace=namespace)
        return self._stored(hit, hit.at_tokens) if hit else None

    def _stored(self, hit: Hit, promise: int) -> Stored:
        return Stored(
            mark_index=hit.index,
            tokens=hit.at_tokens,
            promise_tokens=promise,
            size_bytes=hit.restore_bytes,
            ready=hit.is_ready,
            extent_id=hit.extent_id,
        )

    async def expect(self, tokens: int) -> str:
        """A name for the engine to save so many tokens to."""
        # The header and each layer's description come to a few kilobytes.
        return await self.store.new_save(tokens * (self.row_bytes + 16) + 65536)

    async def discard(self, name: str) -> None:
        """The save failed."""
        await self.store.discard(name)

    async def absorb(
        self,
        name: str,
        *,
        namespace: str,
        marks: Sequence[tuple[bytes, Position]],
        tokens: int,
        prefill_s: float,
        origin: Origin,
        expected: Sequence[int] | None = None,
    ) -> Saved:
        """Take a saved file in; see `Store.absorb`. Marks beyond its end are left out."""
        kept = [
            KeptMark(digest, min(p.tokens, tokens), p.exact)
            for digest, p in marks
            if 0 < p.tokens <= tokens
        ]
        return await self.store.absorb(
            name,
            namespace=namespace,
            marks=kept,
            origin=origin,
            prefill_s=prefill_s,
            expected_tokens=expected,
        )

    @asynccontextmanager
    async def ready(self, stored: Stored) -> AsyncIterator[HandedFile]:
        """A slot file for a restore, held while the context lasts."""
        if stored.staged_name is not None:
            yield HandedFile(stored.staged_name, stored.tokens)
            return
        assert stored.extent_id is not None
        file = await self.store.materialize(stored.extent_id, stored.tokens)
        is_read = False
        try:
            yield HandedFile(file.name, file.at_tokens)
            is_read = True
        finally:
            # Cancelled or failed, the engine may not be through with it.
            self.store.release(file.name, is_read=is_read)
        self.store.touch(stored.extent_id, stored.tokens)

    def ids_of(self, saved: Saved) -> Tokens | None:
        """The tokens of what was saved."""
        return self.store.tokens_now(saved.extent_id, saved.at_tokens)

    def ids_at(self, stored: Stored) -> Tokens | None:
        """The tokens of what was restored; None where they aren't known any more."""
        if stored.extent_id is None:
            return None
        return self.store.tokens_now(stored.extent_id, stored.tokens)

    async def quarantine(
        self, stored: Stored, reason: str, *, namespace: str = ""
    ) -> tuple[str, ...]:
        """A restore wasn't reused: see `Store.quarantine`. Returns pins that need warming again."""
        if stored.extent_id is None:
            return ()
        removed = await self.store.quarantine(
            stored.extent_id, stored.tokens, reason=reason, namespace=namespace
        )
        return removed.pins

    async def pin(
        self, name: str, stored: Stored, *, origin: Origin, digest: bytes, prefill_s: float
    ) -> None:
        """Keep a prefix from eviction under a name."""
        if stored.extent_id is None:
            raise SnapshotError("A file that isn't kept yet can't be pinned.", reason="unknown")
        known = self.store.pin_named(name)
        if known and (known.extent_id, known.at_tokens) == (stored.extent_id, stored.tokens):
            return
        await self.store.pin(
            name,
            stored.extent_id,
            stored.tokens,
            origin=origin,
            digest=digest,
            prefill_s=prefill_s,
        )
