"""Prove each plan by the engine's own count, and learn which prefixes clients repeat."""

from __future__ import annotations

import asyncio
import logging
import time

from keepwarm.core.job import Job
from keepwarm.core.plan import FILL_MIN_TOKENS, Plan, Stored
from keepwarm.core.reply import Counts
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.rebuild import rebuild
from keepwarm.deployment.warm import Target, tier_targets
from keepwarm.errors import EngineError, SnapshotError, TierError
from keepwarm.store.types import Origin, Pin
from keepwarm.tiers.tiering import Tiered

log = logging.getLogger("keepwarm")

# A prefix is learned when it is seen for the second time within this many distinct ones.
_SEEN_LIMIT = 4096
# A template with the date in it is warmed anew when the date changes; one with the time isn't.
_WARM_ANEW_AFTER_S = 3600.0


class Prover:
    """Counts hits and misses; pins what comes again; looks into broken promises."""

    def __init__(self, runtime: Deployment) -> None:
        self._runtime = runtime
        self._seen: dict[bytes, int] = {}
        self._pinning: set[str] = set()
        self._missed: set[tuple[int | None, int]] = set()
        self._mending = asyncio.Lock()
        self._warmed_anew_s = -_WARM_ANEW_AFTER_S

    def proved(self, job: Job, plan: Plan, counts: Counts, *, ttft_s: float, tier: Tiered) -> None:
        """Compare what was promised with what the engine reused."""
        runtime = self._runtime
        name = tier.tier.name if tier.tier else "none"
        runtime.metrics.replied(
            plan=plan.source,
            tier=name,
            counts=counts,
            ttft_s=ttft_s,
        )
        self._note_use(job)
        if plan.ahead_tokens:
            runtime.metrics.used_ahead(min(plan.ahead_tokens, counts.cached))
        # One token is always evaluated again, so a prompt that is all known reuses one less.
        promised = min(plan.promise_tokens, counts.prompt - 1)
        if counts.cached < promised - runtime.machine.slack_tokens:
            runtime.supervise(self._broken(job, plan, counts))
        elif (
            job.prompt.static
            and not tier.tier
            and not job.is_final
            and job.is_savable
            and runtime.settings.store.learned
        ):
            self._learn(job)

    def _note_use(self, job: Job) -> None:
        """A static part that a slot holds is of use too, though nothing was restored."""
        static = job.prompt.static
        store = self._runtime.store
        if static and (hit := store.lookup([static.digest], namespace=job.namespace)):
            store.touch(hit.extent_id, hit.at_tokens)

    async def _broken(self, job: Job, plan: Plan, counts: Counts) -> None:
        """Fewer tokens were reused than promised: find out why, and mend it."""
        runtime = self._runtime
        log.warning(
            "%s: promised %d tokens from a %s, the engine reused %d",
            job.id,
            plan.promise_tokens,
            plan.source.value,
            counts.cached,
        )
        # An attached server may have been restarted between two looks at it.
        runtime.suspect_engine()
        async with self._mending:
            moved = await self._moved()
            if moved:
                runtime.metrics.miss("template_changed")
                log.warning("the template renders the tiers otherwise than before: warming again")
                lost = await self._drop_stale(moved)
                if time.monotonic() < self._warmed_anew_s + _WARM_ANEW_AFTER_S:
                    return  # a clock: what is warmed now is stale in a minute
                self._warmed_anew_s = time.monotonic()
            elif plan.restore is None:
                runtime.metrics.miss("slot_lost")
                return
            else:
                runtime.metrics.miss("not_reused")
                lost = set(await self._quarantine(plan.restore, "not_reused", job.namespace))
                self._leave_alone(plan.restore)
            for target in runtime.prefixes.targets:
                if target.name in lost:
                    await rebuild(runtime, target)

    def _leave_alone(self, stored: Stored) -> None:
        """Offer no more for some time what the engine has not reused for the second time.

        Once is one client's miss. Files that are what was written and still aren't reused cost a
        restore and a whole prefill each time.
        """
        assert stored.extent_id is not None or stored.staged_name is not None
        key = stored.extent_id, stored.tokens
        if key in self._missed:
            self._missed.discard(key)
            self._runtime.slot_store.refused(stored)
        else:
            self._missed.add(key)

    async def _quarantine(self, stored: Stored, reason: str, namespace: str) -> tuple[str, ...]:
        try:
            return await self._runtime.slot_store.quarantine(stored, reason, namespace=namespace)
        except SnapshotError as error:
            self._runtime.metrics.miss(error.reason)
            return ()

    async def _drop_stale(self, moved: list[Target]) -> set[str]:
        """Forget what was rendered before: digests are of texts, and their tokens have changed."""
        runtime = self._runtime
        runtime.dispatcher.forget_rendered()
        lost = {target.name for target in moved}
        try:
            await runtime.store.forget_marks()
        except SnapshotError as error:
            runtime.metrics.miss(error.reason)
        for target in runtime.prefixes.targets:
            runtime.dispatcher.know_static(target.digest, target.tokens)
        return lost

    async def _moved(self) -> list[Target]:
        """The tiers that render to other tokens now (a date in the template), as they were."""
        runtime = self._runtime
        try:
            now = await tier_targets(
                runtime.tiers,
                runtime.counter,
                fingerprint=runtime.fingerprint,
                only=runtime.settings.tiers.warm,
            )
        except (EngineError, TierError) as error:
            log.warning("the tiers can't be rendered: %s", error)
            return []
        moved = [
            a for a, b in zip(runtime.prefixes.targets, now, strict=False) if a.tokens != b.tokens
        ]
        runtime.prefixes.targets = now
        return moved

    def _learn(self, job: Job) -> None:
        """Count a client's own static part; the second time it is pinned.

        That of a coding agent is pinned at once, under the agent's name, where what changes in it
        is moved (`move-known`): it comes again as long as that version is used.
        """
        static = job.prompt.static
        assert static
        if len(self._seen) >= _SEEN_LIMIT:
            self._seen.pop(next(iter(self._seen)))
        seen = self._seen.pop(static.digest, 0) + 1
        self._seen[static.digest] = seen
        plain = f"learned:{job.namespace}:{static.digest.hex()}"
        name = f"{plain}~{job.agent}" if job.agent else plain
        is_stable = job.agent and "move-known" in self._runtime.settings.hygiene.rules
        is_long = (job.static_tokens or FILL_MIN_TOKENS) >= FILL_MIN_TOKENS
        # Another version may send the same prompt.
        is_known = name in self._pinning or any(
            pin.name.partition("~")[0] == plain for pin in self._runtime.store.pins()
        )
        if (seen >= 2 or is_stable) and is_long and not is_known:
            self._pinning.add(name)
            task = self._runtime.supervise(self._pin(job, name))
            task.add_done_callback(lambda _: self._pinning.discard(name))

    async def _pin(self, job: Job, name: str) -> None:
        runtime = self._runtime
        static = job.prompt.static
        assert static
        hit = runtime.store.lookup([static.digest], namespace=job.namespace)
        if hit is None or not hit.is_exact:
            return
        try:
            await runtime.store.pin(
                name,
                hit.extent_id,
                hit.at_tokens,
                origin=Origin.LEARNED,
                digest=static.digest,
                prefill_s=runtime.dispatcher.rates.prefill_s(hit.at_tokens),
            )
        except SnapshotError as error:  # evicted meanwhile, or the disk is full
            log.info("a prefix that clients repeat isn't kept: %s", error)
            return
        log.info("learned a prefix of %d tokens that clients repeat", hit.at_tokens)
        await self._forget_oldest()

    async def _forget_oldest(self) -> None:
        """Keep as many learned prefixes as the settings allow.

        The tenant that has most of them gives up the one that it used longest ago: nobody's are
        lost to what another one learns, as long as they are no more than its share.
        """
        learned: dict[str, list[Pin]] = {}
        for pin in self._runtime.store.pins():
            if pin.origin is Origin.LEARNED:
                learned.setdefault(_tenant_of(pin.name), []).append(pin)
        while sum(map(len, learned.values())) > self._runtime.settings.store.learned:
            most = max(learned.values(), key=len)
            oldest = min(most, key=lambda pin: pin.used_s or pin.created_s)
            most.remove(oldest)
            await self._runtime.store.unpin(oldest.name)

    async def learned_targets(self) -> list[Target]:
        """What was learned in earlier lives, most recently used first."""
        store = self._runtime.store
        out: list[Target] = []
        pins = [p for p in store.pins() if p.origin is Origin.LEARNED and p.digest]
        for pin in sorted(pins, key=lambda p: p.used_s or p.created_s, reverse=True):
            try:
                tokens = await store.tokens_of(pin.extent_id, pin.at_tokens)
            except SnapshotError as error:
                self._runtime.metrics.miss(error.reason)
                continue
            assert pin.digest
            namespace = _tenant_of(pin.name)
            out.append(
                Target(
                    pin.name,
                    [int(t) for t in tokens],
                    None,
                    pin.digest,
                    Origin.LEARNED,
                    namespace,
                )
            )
            self._seen[pin.digest] = 2
        return out


def _tenant_of(name: str) -> str:
    """Whose a learned pin is, by its name. A key's name may hold colons itself."""
    return name.removeprefix("learned:").rpartition(":")[0]
