"""Which prefixes a deployment keeps warm, how far each is, and what each would cost a request now.

The tiers, then what was learned from clients. All are warm before the first request; where the
owner prefers availability (`tiers.wait = false`) only what the store holds is, and the rest is made
warm behind the requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from keepwarm.core.memory import MemoryKind
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.deployment.rebuild import rebuild
from keepwarm.deployment.warm import (
    KeptPrefix,
    Progress,
    Warmed,
    Warmer,
    last_used_s,
    tier_prefixes,
)
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.router import TierCost

log = logging.getLogger("keepwarm")

# A task of one sentence, in a chat template: the median of the router's labelled requests.
_TASK_TOKENS = 60


class UnprovedError(Exception):
    """A sliding-window model's restored prefix wasn't reused."""


class Prefixes:
    """See the module. `warm` is called each time an engine has come up."""

    def __init__(
        self, deployment: KeptEngine, *, leaves: bool, on_progress: Progress | None
    ) -> None:
        """As the deployment takes them."""
        self._deployment = deployment
        self._leaves = leaves
        self._on_progress = on_progress
        self._later: asyncio.Task[None] | None = None
        self.kept: list[KeptPrefix] = []
        """The tiers as the running model renders them."""
        self.warmed: list[Warmed] = []
        """What warming each of them, and each learned prefix, took."""
        self.lacking: set[str] = set()
        """Names of those that aren't warm yet."""

    async def rendered(self) -> list[KeptPrefix]:
        """Render the tiers with the running model.

        Raises:
            TierError, EngineError: as `tier_prefixes`.
        """
        deployment = self._deployment
        settings = deployment.settings.tiers
        return await tier_prefixes(
            deployment.tiers,
            deployment.counter,
            fingerprint=deployment.fingerprint,
            only=settings.warm,
        )

    async def warm(self) -> None:
        """Warm all of them and tell the scheduler.

        Raises:
            ConfigError: a tier doesn't fit into a slot.
            UnprovedError: this engine needs other flags.
        """
        deployment = self._deployment
        dispatcher = deployment.dispatcher
        self.kept = await self.rendered()
        for prefix in self.kept:
            self._check_fits(prefix)
            dispatcher.know_static(prefix.digest, prefix.tokens)
        warmer = Warmer(
            deployment.client,
            deployment.slot_store,
            deployment.machine,
            dispatcher.rates,
            slots=len(dispatcher.scheduler.slots),
            miss=deployment.metrics.miss,
            progress=self._progressed,
            leaves=self._leaves,
            is_ours=deployment.launch.attached is None,
        )
        kept = [*self.kept, *await deployment.prover.learned_prefixes()]
        waits = deployment.settings.tiers.wait or self._leaves
        later = [] if waits else await self._unsaved()
        self.warmed, contents = await warmer.warm([t for t in kept if t not in later])
        self._check_proofs()
        now_s = time.monotonic()
        for slot, content in contents.items():
            dispatcher.scheduler.set_content(slot, content, now_s)
        self.lacking = {prefix.name for prefix in later}
        self.lacking |= {warmed.name for warmed in self.warmed if warmed.how == "cold"}
        # After a restart of the engine the task that was begun before it goes on.
        if later and (self._later is None or self._later.done()):
            self._later = deployment.supervise(self._warm_later(later))

    def costs(self) -> list[TierCost]:
        """What each tier would cost a new request at this moment, by the rates learned here."""
        dispatcher, store = self._deployment.dispatcher, self._deployment.store
        rates = dispatcher.rates
        slots = dispatcher.scheduler.slots
        held = [slot.content.marks for slot in slots if slot.content]
        row_bytes = self._deployment.machine.row_bytes
        out = []
        for prefix in self.kept:
            tokens = len(prefix.tokens)
            if any(prefix.digest in marks for marks in held):
                first_s = 0.0
            elif hit := store.lookup([prefix.digest], namespace=""):
                first_s = rates.restore_s(hit.restore_bytes, ready=hit.is_ready)
                first_s += rates.prefill_s(tokens - hit.at_tokens)
            else:
                first_s = rates.prefill_s(tokens)
            # Its rows stand where somebody else's stood, who has them restored later.
            is_free = len(held) < len(slots)
            displaced_s = 0.0 if is_free else rates.restore_s(tokens * row_bytes, ready=True)
            # The task itself, behind the tier.
            first_s += rates.prefill_s(_TASK_TOKENS)
            token_s = rates.decode_cost.at(tokens + _TASK_TOKENS)
            name = prefix.name.removeprefix("tier:")
            out.append(TierCost(name, first_s, token_s, displaced_s))
        return out

    async def _unsaved(self) -> list[KeptPrefix]:
        """The tiers that would have to be prefilled (new, changed, or under another engine).

        What was used last comes first, then the smallest.
        """
        deployment = self._deployment
        out = []
        for prefix in self.kept:
            try:
                stored = await deployment.slot_store.match(prefix.tokens, prefix.namespace)
            except SnapshotError as error:
                deployment.metrics.miss(error.reason)
                stored = None
            if stored is None or stored.tokens < len(prefix.tokens):
                out.append(prefix)
        return sorted(
            out, key=lambda prefix: (-last_used_s(deployment.store, prefix), len(prefix.tokens))
        )

    async def _warm_later(self, prefixes: Sequence[KeptPrefix]) -> None:
        """Warm tiers behind all requests, which are served cold meanwhile."""
        for prefix in [*prefixes, *prefixes]:  # again, if the engine died meanwhile
            if prefix.name not in self.lacking:
                continue
            began_s, tokens = time.monotonic(), len(prefix.tokens)
            stored = await rebuild(self._deployment, prefix)
            if stored is None:
                # A dead engine is found dead first, or the second try would meet it as well.
                await self._deployment.look_at_engine()
                continue
            self.lacking.discard(prefix.name)
            seconds = time.monotonic() - began_s
            self.warmed.append(
                Warmed(
                    *(prefix.name, tokens, "prefilled", tokens, seconds, stored.size_bytes),
                    slot=None,
                    proved=False,  # by the first request that starts from it
                )
            )
            self._deployment.tell_warmth()

    def _check_fits(self, prefix: KeptPrefix) -> None:
        """A tier that fills a slot leaves no room for a task.

        Raises:
            ConfigError: it is too large for the engine's slots.
        """
        room = self._deployment.slot_tokens
        if len(prefix.tokens) < room:
            return
        raise ConfigError(
            f"The tier {prefix.name.removeprefix('tier:')!r} has {len(prefix.tokens):,} tokens, "
            f"but a slot has room for {room:,} only. Give a larger --context or fewer "
            '--slots, let slots share the context (engine.pool = "shared"), or name the tiers to '
            "warm (tiers.warm)."
        )

    def _check_proofs(self) -> None:
        deployment = self._deployment
        unproved = [w.name for w in self.warmed if not w.proved and w.how != "cold"]
        if not unproved:
            return
        options = deployment.launch.options
        windowed = deployment.probed.kind is MemoryKind.SLIDING_WINDOW
        if windowed and options and not options.swa_full:
            raise UnprovedError
        for name in unproved:
            deployment.metrics.miss("unproved")
            log.warning("%s was restored, but the engine didn't reuse it", name)

    def _progressed(self, name: str, done: int, total: int) -> None:
        self._deployment.tell(f"{name.removeprefix('tier:')}: {done:,} of {total:,} tokens")
        if self._on_progress:
            self._on_progress(name, done, total)
