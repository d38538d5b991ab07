"""Prove each plan by the engine's own count, and learn which prefixes clients repeat."""

from __future__ import annotations

import asyncio
import logging
import time

from keepwarm.core.job import Job
from keepwarm.core.plan import FILL_MIN_TOKENS, Plan, Stored
from keepwarm.core.reply import Counts
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.deployment.rebuild import rebuild
from keepwarm.deployment.warm import KeptPrefix, tier_prefixes
from keepwarm.errors import EngineError, SnapshotError, TierError
from keepwarm.store.types import Origin, Pin
from keepwarm.tiers.tiering import TieredRequest

log = logging.getLogger("keepwarm")

# A prefix is learned when it is seen for the second time within this many distinct ones.
_SEEN_LIMIT = 4096
# Static parts that are to be pinned once a save has brought them, at most.
_UNSAVED_LIMIT = 64
# A template with the date in it is warmed anew when the date changes; one with the time isn't.
_WARM_ANEW_AFTER_S = 3600.0


class Prover:
    """Counts hits and misses; pins what comes again; looks into broken promises."""

    def __init__(self, deployment: KeptEngine) -> None:
        self._deployment = deployment
        self._seen: dict[bytes, int] = {}
        self._pinning: set[str] = set()
        self._missed: set[tuple[int | None, int]] = set()
        # By the pin's name: whose it is, and the digest of the static part.
        self._unsaved: dict[str, tuple[str, bytes]] = {}
        self._mending = asyncio.Lock()
        self._warmed_anew_s = -_WARM_ANEW_AFTER_S

    def proved(
        self, job: Job, plan: Plan, counts: Counts, *, ttft_s: float, tier: TieredRequest
    ) -> None:
        """Compare what was promised with what the engine reused."""
        deployment = self._deployment
        name = tier.tier.name if tier.tier else "none"
        deployment.metrics.replied(
            plan=plan.source,
            tier=name,
            counts=counts,
            ttft_s=ttft_s,
        )
        self._note_use(job)
        # One token is always evaluated again, so a prompt that is all known reuses one less.
        promised = min(plan.promise_tokens, counts.prompt - 1)
        if counts.cached < promised - deployment.machine.slack_tokens:
            deployment.supervise(self._broken(job, plan, counts))
        elif (
            job.prompt.static
            and not tier.tier
            and not job.is_final
            and job.is_savable
            and deployment.settings.store.learned
        ):
            self._learn(job)

    def _note_use(self, job: Job) -> None:
        """A static part that a slot holds is of use too, though nothing was restored."""
        static = job.prompt.static
        store = self._deployment.store
        if static and (hit := store.lookup([static.digest], namespace=job.namespace)):
            store.touch(hit.extent_id, hit.at_tokens)

    async def _broken(self, job: Job, plan: Plan, counts: Counts) -> None:
        """Fewer tokens were reused than promised: find out why, and mend it."""
        deployment = self._deployment
        log.warning(
            "%s: promised %d tokens from a %s, the engine reused %d",
            job.id,
            plan.promise_tokens,
            plan.source.value,
            counts.cached,
        )
        # An attached server may have been restarted between two looks at it.
        deployment.suspect_engine()
        async with self._mending:
            moved = await self._moved()
            if moved:
                deployment.metrics.miss("template_changed")
                log.warning("the template renders the tiers otherwise than before: warming again")
                lost = await self._drop_stale(moved)
                if time.monotonic() < self._warmed_anew_s + _WARM_ANEW_AFTER_S:
                    return  # a clock: what is warmed now is stale in a minute
                self._warmed_anew_s = time.monotonic()
            elif plan.restore is None:
                deployment.metrics.miss("slot_lost")
                return
            else:
                deployment.metrics.miss("not_reused")
                lost = set(await self._quarantine(plan.restore, "not_reused", job.namespace))
                self._leave_alone(plan.restore)
            for prefix in deployment.prefixes.kept:
                if prefix.name in lost:
                    await rebuild(deployment, prefix)

    def _leave_alone(self, stored: Stored) -> None:
        """Offer no more for some time what the engine has not reused for the second time.

        Once is one client's miss. Files that are what was written and still aren't reused cost a
        restore and a whole prefill each time.
        """
        assert stored.extent_id is not None or stored.staged_name is not None
        key = stored.extent_id, stored.tokens
        if key in self._missed:
            self._missed.discard(key)
            self._deployment.slot_store.refused(stored)
        else:
            self._missed.add(key)

    async def _quarantine(self, stored: Stored, reason: str, namespace: str) -> tuple[str, ...]:
        try:
            return await self._deployment.slot_store.quarantine(stored, reason, namespace=namespace)
        except SnapshotError as error:
            self._deployment.metrics.miss(error.reason)
            return ()

    async def _drop_stale(self, moved: list[KeptPrefix]) -> set[str]:
        """Forget what was rendered before: digests are of texts, and their tokens have changed."""
        deployment = self._deployment
        deployment.dispatcher.forget_rendered()
        lost = {prefix.name for prefix in moved}
        try:
            await deployment.store.forget_marks()
        except SnapshotError as error:
            deployment.metrics.miss(error.reason)
        for prefix in deployment.prefixes.kept:
            deployment.dispatcher.know_static(prefix.digest, prefix.tokens)
        return lost

    async def _moved(self) -> list[KeptPrefix]:
        """The tiers that render to other tokens now (a date in the template), as they were."""
        deployment = self._deployment
        try:
            now = await tier_prefixes(
                deployment.tiers,
                deployment.counter,
                fingerprint=deployment.fingerprint,
                only=deployment.settings.tiers.warm,
            )
        except (EngineError, TierError) as error:
            log.warning("the tiers can't be rendered: %s", error)
            return []
        moved = [
            a for a, b in zip(deployment.prefixes.kept, now, strict=False) if a.tokens != b.tokens
        ]
        deployment.prefixes.kept = now
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
        is_stable = job.agent and "move-known" in self._deployment.settings.hygiene.rules
        is_long = (job.static_tokens or FILL_MIN_TOKENS) >= FILL_MIN_TOKENS
        # Another version may send the same prompt.
        is_known = name in self._pinning or any(
            pin.name.partition("~")[0] == plain for pin in self._deployment.store.pins()
        )
        if (seen >= 2 or is_stable) and is_long and not is_known:
            self._begin_pin(name, job.namespace, static.digest)

    def kept(self) -> None:
        """The store has taken something in: it may hold what is to be pinned.

        A first reply ends before the store is through with the static part that was filled for it,
        and a static part that wasn't filled is saved with its conversation, when that is idle.
        """
        for name, (namespace, digest) in list(self._unsaved.items()):
            if self._deployment.store.lookup([digest], namespace=namespace):
                del self._unsaved[name]
                self._begin_pin(name, namespace, digest)

    def _begin_pin(self, name: str, namespace: str, digest: bytes) -> None:
        self._pinning.add(name)
        task = self._deployment.supervise(self._pin(name, namespace, digest))
        task.add_done_callback(lambda _: self._pinning.discard(name))

    async def _pin(self, name: str, namespace: str, digest: bytes) -> None:
        deployment = self._deployment
        hit = deployment.store.lookup([digest], namespace=namespace)
        if hit is None:
            if len(self._unsaved) >= _UNSAVED_LIMIT:
                self._unsaved.pop(next(iter(self._unsaved)))
            self._unsaved[name] = namespace, digest
            return
        if not hit.is_exact:
            return
        try:
            await deployment.store.pin(
                name,
                hit.extent_id,
                hit.at_tokens,
                origin=Origin.LEARNED,
                digest=digest,
                prefill_s=deployment.dispatcher.rates.prefill_s(hit.at_tokens),
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
        for pin in self._deployment.store.pins():
            if pin.origin is Origin.LEARNED:
                learned.setdefault(_tenant_of(pin.name), []).append(pin)
        while sum(map(len, learned.values())) > self._deployment.settings.store.learned:
            most = max(learned.values(), key=len)
            oldest = min(most, key=lambda pin: pin.used_s or pin.created_s)
            most.remove(oldest)
            await self._deployment.store.unpin(oldest.name)

    async def learned_prefixes(self) -> list[KeptPrefix]:
        """What was learned in earlier lives, most recently used first."""
        store = self._deployment.store
        out: list[KeptPrefix] = []
        pins = [p for p in store.pins() if p.origin is Origin.LEARNED and p.digest]
        for pin in sorted(pins, key=lambda p: p.used_s or p.created_s, reverse=True):
            try:
                tokens = await store.tokens_of(pin.extent_id, pin.at_tokens)
            except SnapshotError as error:
                self._deployment.metrics.miss(error.reason)
                continue
            assert pin.digest
            namespace = _tenant_of(pin.name)
            out.append(
                KeptPrefix(
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
