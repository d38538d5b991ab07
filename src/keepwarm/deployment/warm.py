"""Warm the tiers and learned prefixes: restore what was saved, prefill the rest, prove all of it.

Tiers go in nesting order through one slot, so that a larger one prefills only what it adds to the
smaller. Each is then restored from its snapshot into the slot where it will wait, and proved there
by the engine's own count: a snapshot that restores but isn't reused is no snapshot.

Whatever the store or a restore fails at costs warmth and nothing else. A snapshot that the engine
refuses is asked for once more from an empty slot, then made anew; if there is none to be had, the
prefix is prefilled where it waits, or left to its first request, and the miss is counted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from keepwarm.core.job import Progress as FillProgress
from keepwarm.core.plan import Machine, Stored
from keepwarm.core.prompt import Prompt, prompt_of
from keepwarm.core.rates import Rates
from keepwarm.core.slots import Content, Position, positions
from keepwarm.core.tiers import TierSet, compose
from keepwarm.deployment.slot_store import SlotStore
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.static_end import common_length, static_tokens
from keepwarm.errors import (
    EngineDownError,
    EngineError,
    EngineRefusedError,
    SnapshotError,
    TierError,
)
from keepwarm.store.files import UNTRUSTED
from keepwarm.store.store import Store
from keepwarm.store.types import KeptMark, Origin

log = logging.getLogger("keepwarm")


@dataclass(frozen=True, slots=True)
class KeptPrefix:
    """One prefix to warm: a tier's, or one learned from clients."""

    name: str
    tokens: list[int]
    prompt: Prompt | None
    digest: bytes
    origin: Origin
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class Warmed:
    """What warming one prefix took. `slot` None: it waits in staging, not in a slot.

    `how` cold: there is no snapshot of it and it is in no slot. `size_bytes` 0: it isn't saved.
    """

    name: str
    tokens: int
    how: Literal["restored", "prefilled", "cold"]
    prefilled_tokens: int
    seconds: float
    size_bytes: int
    slot: int | None
    proved: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "how": self.how,
            "prefilled_tokens": self.prefilled_tokens,
            "seconds": round(self.seconds, 4),
            "bytes": self.size_bytes,
            "slot": self.slot,
            "proved": self.proved,
        }


Progress = Callable[[str, int, int], None]


async def tier_prefixes(
    tiers: TierSet, counter: PromptCounter, *, fingerprint: str, only: Iterable[str] = ()
) -> list[KeptPrefix]:
    """Render and tokenize every tier with the running model.

    Raises:
        TierError: the model's template leaves out a tier's tools or text.
        EngineError: the engine can't render.
    """
    wanted = set(only)
    out = []
    for tier in tiers:
        if wanted and tier.name not in wanted:
            continue
        static = compose(tier, {"messages": []})
        tokens = await static_tokens(counter, static)
        await check_tools(counter.client, static, tier.name)
        prompt = prompt_of(
            static,
            fingerprint=fingerprint,
            namespace="",
            shared_segments=len(static["messages"]),
        )
        assert prompt.static
        out.append(
            KeptPrefix(f"tier:{tier.name}", tokens, prompt, prompt.static.digest, Origin.TIER)
        )
    return out


async def check_tools(client: EngineClient, static: dict[str, Any], tier: str) -> None:
    """Refuse a template that drops a tier's tools: the model would never hear of them.

    Raises:
        TierError: a tool's name isn't in the rendered prompt.
    """
    tools = static.get("tools") or []
    if not tools:
        return
    probe = {**static, "messages": [*static["messages"], {"role": "user", "content": "hello"}]}
    rendered = await client.render(probe)
    missing = [t["function"]["name"] for t in tools if t["function"]["name"] not in rendered]
    if missing:
        raise TierError(
            f"The model's chat template drops the tools of tier {tier!r} ({len(missing)} of "
            f"{len(tools)} are not in the rendered prompt: {', '.join(missing[:3])}, ...). The "
            "model would never see them. Give a template that renders tools with "
            "--chat-template FILE; for ChatML models Keepwarm brings "
            "configs/chat-templates/chatml-tools.jinja."
        )


class Warmer:
    """Warms prefixes on an idle engine.

    `leaves`: no gateway will restore anything afterwards, so each prefix needs a slot to wait in.
    `is_ours`: nobody else has filled the engine's slots, so a restore that is refused from an empty
    one is the snapshot's fault. `miss` counts what was to be warm and isn't, by reason.
    """

    def __init__(
        self,
        client: EngineClient,
        snapshots: SlotStore,
        machine: Machine,
        rates: Rates,
        *,
        slots: int,
        miss: Callable[[str], None],
        progress: Progress | None = None,
        leaves: bool = False,
        is_ours: bool = True,
    ) -> None:
        self._leaves = leaves
        self._is_ours = is_ours
        self._miss = miss
        self._client = client
        self._snapshots = snapshots
        self._machine = machine
        self._rates = rates
        self._slots = slots
        self._progress = progress

    async def warm(self, prefixes: list[KeptPrefix]) -> tuple[list[Warmed], dict[int, Content]]:
        """Warm all of them in order.

        Returns:
            What was done for each, and what the slots hold now.

        Raises:
            EngineDownError: the engine is gone; what was saved so far is kept.
        """
        contents: dict[int, Content] = {}
        report: list[Warmed] = []
        # The slot that a cold fill goes through is the last one to get a prefix of its own.
        workbench = self._slots - 1
        room = self._room(prefixes)
        for index, prefix in enumerate(prefixes):
            slot = room.get(index)
            report.append(await self._warm_one(prefix, slot, workbench, contents))
        if prefixes and workbench not in contents and self._machine.can_save:
            # What was left there would take room in a shared pool that nobody counts.
            await self._client.erase(workbench)
        return report, contents

    def _room(self, prefixes: list[KeptPrefix]) -> dict[int, int]:
        """Which of them (by index) wait in which slot: those used last; one slot stays free.

        In a shared pool what waits slows every other slot down, and a ready file is restored in
        milliseconds, so only one waits there; unless nobody will be there to restore it.
        """
        pool_tokens = self._machine.pool_tokens
        all_wait = pool_tokens is None or self._leaves
        spare = max(self._slots - 1, 1) if all_wait else 1
        chosen: list[int] = []
        for index in sorted(
            range(len(prefixes)), key=lambda i: -last_used_s(self._snapshots.store, prefixes[i])
        ):
            fits = pool_tokens is None or len(prefixes[index].tokens) <= pool_tokens // 2
            if fits and len(chosen) < spare:
                chosen.append(index)
        return {index: slot for slot, index in enumerate(chosen)}

    async def _warm_one(
        self, prefix: KeptPrefix, slot: int | None, workbench: int, contents: dict[int, Content]
    ) -> Warmed:
        began_s = time.monotonic()
        if not self._machine.can_save:
            return await self._warm_unsaved(prefix, slot, contents, began_s)
        try:
            return await self._warm_saved(prefix, slot, workbench, contents, began_s)
        except EngineDownError:
            raise
        except (SnapshotError, EngineError) as error:
            reason = error.reason if isinstance(error, SnapshotError) else "refused"
            self._miss(reason)
            log.warning("%s has no snapshot to start from: %s", prefix.name, error)
            return await self._warm_unsaved(prefix, slot, contents, began_s)

    async def _warm_saved(
        self,
        prefix: KeptPrefix,
        slot: int | None,
        workbench: int,
        contents: dict[int, Content],
        began_s: float,
        *,
        is_again: bool = False,
    ) -> Warmed:
        """Warm from a snapshot, which is made if there is none.

        Raises:
            SnapshotError: there is none to be had.
            EngineError: the engine doesn't take it, or refuses the prefix itself.
        """
        stored = await self._snapshots.match(prefix.tokens, prefix.namespace)
        prefilled = 0
        if stored is None or stored.tokens != len(prefix.tokens):
            contents.pop(workbench, None)
            prefilled = await self._fill(prefix, stored, workbench)
            stored = await self._snapshots.match(prefix.tokens, prefix.namespace)
            if stored is None or stored.tokens != len(prefix.tokens):
                raise SnapshotError(
                    f"{prefix.name} was saved but isn't found again.", reason="not_kept"
                )
        # Once is enough: what was just made and isn't taken won't be the next time.
        is_last = is_again or prefilled > 0
        try:
            await keep(self._snapshots, prefix, stored, rates=self._rates)
            proved = await self._place(prefix, stored, workbench if slot is None else slot)
        except SnapshotError as error:
            if is_last or error.reason not in UNTRUSTED:
                raise
            # The store has set it aside; what is left of it may be sound.
            return await self._warm_saved(
                prefix, slot, workbench, contents, began_s, is_again=is_again
            )
        except EngineDownError:
            raise
        except EngineError:
            if is_last or not self._is_ours:
                raise
            self._miss("refused")
            await self._snapshots.quarantine(stored, "refused")
            return await self._warm_saved(prefix, slot, workbench, contents, began_s, is_again=True)
        if not proved and not is_last:
            # It restores and isn't reused: never trust it again, make it anew.
            await self._snapshots.quarantine(stored, "unproved")
            return await self._warm_saved(prefix, slot, workbench, contents, began_s, is_again=True)
        if slot is not None:
            contents[slot] = content_of(prefix)
        return Warmed(
            prefix.name,
            len(prefix.tokens),
            "prefilled" if prefilled else "restored",
            prefilled,
            time.monotonic() - began_s,
            stored.size_bytes,
            slot,
            proved,
        )

    async def _warm_unsaved(
        self, prefix: KeptPrefix, slot: int | None, contents: dict[int, Content], began_s: float
    ) -> Warmed:
        """Without a snapshot: prefilled where it waits, else left to its first request."""
        prefilled = 0
        if slot is not None:
            contents.pop(slot, None)
            try:
                counts = await self._client.fill(
                    prefix.tokens, slot=slot, progress=self._progress_of(prefix)
                )
            except EngineDownError:
                raise
            except EngineError as error:
                log.warning("%s stays cold: %s", prefix.name, error)
                slot = None
            else:
                prefilled = counts.prefilled
                self._rates.observe_prefill(tokens=prefilled, seconds=counts.prefill_s)
                contents[slot] = replace(content_of(prefix), saved_tokens=0)
        return Warmed(
            *(prefix.name, len(prefix.tokens), "cold" if slot is None else "prefilled"),
            prefilled,
            time.monotonic() - began_s,
            size_bytes=0,
            slot=slot,
            proved=slot is not None,
        )

    async def _fill(self, prefix: KeptPrefix, stored: Stored | None, slot: int) -> int:
        """Prefill to the exact end, starting from what is there, and save it."""
        if stored is not None:
            try:
                async with self._snapshots.ready(stored) as file:
                    await self._client.restore(slot, file.name)
            except EngineDownError:
                raise
            except (SnapshotError, EngineError) as error:
                log.warning("%s is prefilled from its beginning: %s", prefix.name, error)
        counts = await self._client.fill(
            prefix.tokens, slot=slot, progress=self._progress_of(prefix)
        )
        self._rates.observe_prefill(tokens=counts.prefilled, seconds=counts.prefill_s)
        name = await self._snapshots.expect(len(prefix.tokens))
        await self._client.save(slot, name)
        marks = tuple(content_of(prefix).marks.items())
        await self._snapshots.absorb(
            name,
            namespace=prefix.namespace,
            marks=marks,
            tokens=len(prefix.tokens),
            prefill_s=counts.prefill_s * len(prefix.tokens) / max(counts.prefilled, 1),
            origin=prefix.origin,
            expected=prefix.tokens,
        )
        return counts.prefilled

    async def _place(self, prefix: KeptPrefix, stored: Stored, slot: int) -> bool:
        """Restore into a slot and see by one more token that all of it is reused."""
        async with self._snapshots.ready(stored) as file:
            try:
                await self._client.restore(slot, file.name)
            except EngineRefusedError:
                # What the slot held may have been in the way; now it is empty.
                await self._client.erase(slot)
                await self._client.restore(slot, file.name)
            counts = await self._client.fill([*prefix.tokens, prefix.tokens[-1]], slot=slot)
            if not self._machine.cuttable:
                # The proof has moved the slot beyond the end that can be reused.
                await self._client.restore(slot, file.name)
        return counts.cached >= len(prefix.tokens) - self._machine.slack_tokens

    def _progress_of(self, prefix: KeptPrefix) -> Callable[[FillProgress], None]:
        def told(at: FillProgress) -> None:
            if self._progress:
                self._progress(prefix.name, at.processed, at.total)

        return told


async def keep(snapshots: SlotStore, prefix: KeptPrefix, stored: Stored, *, rates: Rates) -> None:
    """Let the digest find a prefix that the store holds, and keep it from eviction."""
    assert stored.extent_id is not None
    tokens = len(prefix.tokens)
    mark = KeptMark(prefix.digest, tokens)
    await snapshots.store.mark(stored.extent_id, tokens, namespace=prefix.namespace, marks=[mark])
    await snapshots.pin(
        prefix.name,
        stored,
        origin=prefix.origin,
        digest=prefix.digest,
        prefill_s=rates.prefill_s(tokens),
    )


def last_used_s(store: Store, prefix: KeptPrefix) -> float:
    """When a prefix, or what it was before a change, was last of use; 0 if it is new."""
    pin = store.pin_named(prefix.name)
    return (pin.used_s or pin.created_s) if pin else 0.0


def content_of(prefix: KeptPrefix) -> Content:
    """What a slot holds that was restored to a prefix's end."""
    tokens = len(prefix.tokens)
    marks = {prefix.digest: Position(tokens, exact=True)}
    if prefix.prompt is not None:
        marks = positions(prefix.prompt.marks, known=marks, total_tokens=tokens)
    return Content(prefix.namespace, marks, tokens, saved_tokens=tokens)


def shared_tokens(prefixes: list[KeptPrefix]) -> list[tuple[str, str, int]]:
    """For each pair of neighbours in nesting order: how many tokens they begin with alike."""
    pairs = pairwise(prefixes)
    return [(a.name, b.name, common_length(a.tokens, b.tokens)) for a, b in pairs]
