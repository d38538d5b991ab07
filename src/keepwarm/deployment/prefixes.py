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
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.rebuild import rebuild
from keepwarm.deployment.warm import KeptPrefix, Progress, Warmed, Warmer, last_used_s, tier_targets
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.router import TierCost

log = logging.getLogger("keepwarm")

# A task of one sentence, in a chat template: the median of the router's labelled requests.
_TASK_TOKENS = 60


class UnprovedError(Exception):
    """A sliding-window model's restored prefix wasn't reused."""


class Prefixes:
    """See the module. `warm` is called each time an engine has come up."""

    def __init__(self, runtime: Deployment, *, leaves: bool, on_progress: Progress | None) -> None:
        """As the runtime takes them."""
        self._runtime = runtime
        self._leaves = leaves
        self._on_progress = on_progress
        self._later: asyncio.Task[None] | None = None
        self.targets: list[KeptPrefix] = []
        """The tiers as the running model renders them."""
        self.warmed: list[Warmed] = []
        """What warming each of them, and each learned prefix, took."""
        self.lacking: set[str] = set()
        """Names of those that aren't warm yet."""

    async def rendered(self) -> list[KeptPrefix]:
        """Render the tiers with the running model.

        Raises:
            TierError, EngineError: as `tier_targets`.
        """
        runtime = self._runtime
        settings = runtime.settings.tiers
        return await tier_targets(
            runtime.tiers, runtime.counter, fingerprint=runtime.fingerprint, only=settings.warm
        )

    async def warm(self) -> None:
        """Warm all of them and tell the scheduler.

        Raises:
            ConfigError: a tier doesn't fit into a slot.
            UnprovedError: this engine needs other flags.
        """
        runtime = self._runtime
        dispatcher = runtime.dispatcher
        self.targets = await self.rendered()
        for target in self.targets:
            self._check_fits(target)
            dispatcher.know_static(target.digest, target.tokens)
        warmer = Warmer(
            runtime.client,
            runtime.slot_store,
            runtime.machine,
            dispatcher.rates,
            slots=len(dispatcher.scheduler.slots),
            miss=runtime.metrics.miss,
            progress=self._progressed,
            leaves=self._leaves,
            is_ours=runtime.launch.attached is None,
        )
        targets = [*self.targets, *await runtime.prover.learned_targets()]
        waits = runtime.settings.tiers.wait or self._leaves
        later = [] if waits else await self._unsaved()
        self.warmed, contents = await warmer.warm([t for t in targets if t not in later])
        self._check_proofs()
        now_s = time.monotonic()
        for slot, content in contents.items():
            dispatcher.scheduler.set_content(slot, content, now_s)
        self.lacking = {target.name for target in later}
        self.lacking |= {warmed.name for warmed in self.warmed if warmed.how == "cold"}
        # After a restart of the engine the task that was begun before it goes on.
        if later and (self._later is None or self._later.done()):
            self._later = runtime.supervise(self._warm_later(later))

    def costs(self) -> list[TierCost]:
        """What each tier would cost a new request at this moment, by the rates learned here."""
        dispatcher, store = self._runtime.dispatcher, self._runtime.store
        rates = dispatcher.rates
        slots = dispatcher.scheduler.slots
        held = [slot.content.marks for slot in slots if slot.content]
        row_bytes = self._runtime.machine.row_bytes
        out = []
        for target in self.targets:
            tokens = len(target.tokens)
            if any(target.digest in marks for marks in held):
                first_s = 0.0
            elif hit := store.lookup([target.digest], namespace=""):
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
            name = target.name.removeprefix("tier:")
            out.append(TierCost(name, first_s, token_s, displaced_s))
        return out

    async def _unsaved(self) -> list[KeptPrefix]:
        """The tiers that would have to be prefilled (new, changed, or under another engine).

        What was used last comes first, then the smallest.
        """
        runtime = self._runtime
        out = []
        for target in self.targets:
            try:
                stored = await runtime.slot_store.match(target.tokens, target.namespace)
            except SnapshotError as error:
                runtime.metrics.miss(error.reason)
                stored = None
            if stored is None or stored.tokens < len(target.tokens):
                out.append(target)
        return sorted(
            out, key=lambda target: (-last_used_s(runtime.store, target), len(target.tokens))
        )

    async def _warm_later(self, targets: Sequence[KeptPrefix]) -> None:
        """Warm tiers behind all requests, which are served cold meanwhile."""
        for target in [*targets, *targets]:  # again, if the engine died meanwhile
            if target.name not in self.lacking:
                continue
            began_s, tokens = time.monotonic(), len(target.tokens)
            stored = await rebuild(self._runtime, target)
            if stored is None:
                # A dead engine is found dead first, or the second try would meet it as well.
                await self._runtime.look_at_engine()
                continue
            self.lacking.discard(target.name)
            seconds = time.monotonic() - began_s
            self.warmed.append(
                Warmed(
                    *(target.name, tokens, "prefilled", tokens, seconds, stored.size_bytes),
                    slot=None,
                    proved=False,  # by the first request that starts from it
                )
            )
            self._runtime.tell_warmth()

    def _check_fits(self, target: KeptPrefix) -> None:
        """A tier that fills a slot leaves no room for a task.

        Raises:
            ConfigError: it is too large for the engine's slots.
        """
        room = self._runtime.slot_tokens
        if len(target.tokens) < room:
            return
        raise ConfigError(
            f"The tier {target.name.removeprefix('tier:')!r} has {len(target.tokens):,} tokens, "
            f"but a slot has room for {room:,} only. Give a larger --context or fewer "
            '--slots, let slots share the context (engine.pool = "shared"), or name the tiers to '
            "warm (tiers.warm)."
        )

    def _check_proofs(self) -> None:
        runtime = self._runtime
        unproved = [w.name for w in self.warmed if not w.proved and w.how != "cold"]
        if not unproved:
            return
        options = runtime.launch.options
        windowed = runtime.probed.kind is MemoryKind.SLIDING_WINDOW
        if windowed and options and not options.swa_full:
            raise UnprovedError
        for name in unproved:
            runtime.metrics.miss("unproved")
            log.warning("%s was restored, but the engine didn't reuse it", name)

    def _progressed(self, name: str, done: int, total: int) -> None:
        self._runtime.tell(f"{name.removeprefix('tier:')}: {done:,} of {total:,} tokens")
        if self._on_progress:
            self._on_progress(name, done, total)
