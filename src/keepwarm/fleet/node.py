"""One node's deployment: Keepwarm itself, with the shared store behind its own.

Theory of operation. `NodeDeployment` is a `Deployment` that differs in three places: before it
warms, it pulls the tiers' rows from the shared store; a request is given to the scheduler only
after its lacking rows were fetched, if that pays (`_FetchingDispatcher`); and before it stops, what
waits is written behind.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keepwarm.core.job import Job
from keepwarm.core.plan import prompt_tokens
from keepwarm.core.prompt import prompt_of
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import SlotState
from keepwarm.core.tiers import compose
from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.dispatcher import Dispatcher, Grant
from keepwarm.deployment.life import Life
from keepwarm.deployment.model import Model
from keepwarm.engine.beginning import Beginning
from keepwarm.errors import ConfigError
from keepwarm.fleet.costs import NodeCosts
from keepwarm.fleet.objects import Seal
from keepwarm.fleet.second_level import Objects, SecondLevel
from keepwarm.settings import Places, Settings
from keepwarm.store.lock import OwnerLock

log = logging.getLogger("keepwarm.fleet")

FLUSH_S = 20.0
_REMEMBERED = 1024


class _FetchingDispatcher(Dispatcher):
    """Fetches a request's lacking rows before it is planned."""

    second: SecondLevel
    moved: OrderedDict[str, int]

    async def acquire(self, job: Job, static: dict[str, Any] | list[int] | None) -> Grant:
        """See `Dispatcher.acquire`."""
        if job.chat is not None and not job.is_counted:
            # The node's own store is matched by tokens, and what it has isn't fetched again.
            await self.count_ahead(job)
        total = prompt_tokens(job.demand(), self.rates)
        brought = await self.second.bring(
            job.prompt,
            job.namespace,
            total_tokens=total,
            local_tokens=self._local_tokens(job),
            wait_s=backlog_s(self),
        )
        if brought is not None and brought.moved_tokens:
            self.moved[job.id] = brought.moved_tokens
            if len(self.moved) > _REMEMBERED:
                self.moved.popitem(last=False)
        return await super().acquire(job, static)

    def _local_tokens(self, job: Job) -> int:
        """How much of a prompt a slot or the node's own store holds."""
        stored = self.scheduler.lookup(job.prompt, job.namespace, job.known_ids)
        is_whole = job.ids is not None
        best = stored.tokens if stored is not None else 0
        for slot in self.scheduler.slots:
            if slot.content is not None and not slot.is_foreign(job.namespace):
                reuse = slot.content.reuse(
                    job.prompt, job.known_ids, is_whole=is_whole, cuttable=True
                )
                best = max(best, reuse.tokens)
        return best


# What a reply without a limit is taken to come to.
_LONG_REPLY_TOKENS = 512


def backlog_s(dispatcher: Dispatcher) -> float:
    """An estimate of the seconds until the engine is through with the prompts it was given."""
    scheduler, rates = dispatcher.scheduler, dispatcher.rates
    work = 0.0
    for job in list(scheduler.jobs.values()):
        if job.plan is None:
            work += rates.prefill_s(prompt_tokens(job.demand(), rates))
        elif scheduler.slots[job.plan.slot].state is SlotState.PREPARING:
            work += job.plan.estimate_s
    if all(slot.state is not SlotState.IDLE for slot in scheduler.slots):
        # A slot gets free when a reply ends: half of what the shortest may come to.
        least = min((j.reply_tokens for j in scheduler.jobs.values() if j.plan), default=0)
        work += rates.decode_s_per_token.value * min(least, _LONG_REPLY_TOKENS) / 2
    return work


class NodeDeployment(Deployment):
    """See the module."""

    shared: Objects | None = None
    seal: Seal | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As `Deployment`; `shared` and `seal` are set before it starts."""
        super().__init__(*args, **kwargs)
        self.second: SecondLevel | None = None
        self.moved: OrderedDict[str, int] = OrderedDict()
        """Tokens that were moved for a request, by its id; the latest requests'."""

    @property
    def costs(self) -> NodeCosts:
        """What things cost here, for the routers."""
        if self.second is not None:
            return self.second.costs
        return NodeCosts.of(
            self.dispatcher.rates,
            row_bytes=self.machine.row_bytes,
            fetch_s_per_byte=0.0,
            fetch_call_s=0.0,
            can_fetch=False,
        )

    async def _open(self) -> None:
        if self.second is not None:  # opened anew, for an engine that needs other flags
            await self.second.close()
            self.second = None
        await super()._open()

    def _dispatcher(self, scheduler: Scheduler) -> Dispatcher:
        if self.shared is None:
            return super()._dispatcher(scheduler)
        self.second = SecondLevel(
            self.store,
            self.shared,
            rates=scheduler.rates,
            row_bytes=self.machine.row_bytes,
            seal=self.seal,
        )
        dispatcher = _FetchingDispatcher(
            scheduler, self.counter, self.slot_store, self.metrics, self.supervise
        )
        dispatcher.second, dispatcher.moved = self.second, self.moved
        return dispatcher

    async def _warm(self) -> None:
        if self.second is not None:
            await self._pull_tiers(self.second)
        await super()._warm()
        if self.second is not None:
            for prefix in self.prefixes.kept:
                await self.second.offer(prefix.digest)
            self.second.start()

    async def _pull_tiers(self, second: SecondLevel) -> None:
        """Move tiers here that others have warmed; warming then finds and proves them."""
        wanted = set(self.settings.tiers.warm)
        for tier in self.tiers:
            if wanted and tier.name not in wanted:
                continue
            static = compose(tier, {"messages": []})
            prompt = prompt_of(
                static,
                fingerprint=self.fingerprint,
                namespace="",
                shared_segments=len(static["messages"]),
            )
            assert prompt.static is not None
            if self.store.lookup([prompt.static.digest], namespace="") is None:
                brought = await second.pull(prompt.static.digest)
                if brought is not None:
                    log.info("%s: %d tokens moved here", tier.name, brought.moved_tokens)

    async def halt(self, *, drain: bool = True) -> None:
        """See `Deployment.halt`; what is saved at the end is written to the shared store, too."""
        if self.second is not None:
            if drain and self.state is State.READY:
                await self.dispatcher.drain(self.settings.server.drain_timeout_s)
                await self.tasks.absorbed(timeout_s=FLUSH_S)
            await self.second.close(flush_s=FLUSH_S if drain else 0.0)
        await super().halt(drain=drain)


class NodeLife(Life):
    """The life of a node's deployment. `shared` None: a node that shares nothing."""

    def __init__(
        self,
        settings: Settings,
        places: Places,
        *,
        shared: Objects | None = None,
        seal: Seal | None = None,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        """As `Life`."""
        super().__init__(settings, places, on_status=on_status)
        self.node.shared, self.node.seal = shared, seal

    def _make(self, model: Model, beginning: Beginning) -> Deployment:
        return NodeDeployment(self.house, model.settings, beginning, on_status=self._on_status)

    @property
    def node(self) -> NodeDeployment:
        """Its deployment."""
        assert isinstance(self.deployment, NodeDeployment)
        return self.deployment


def node_directory(root: Path, *, most: int) -> tuple[Path, OwnerLock]:
    """A directory of this machine that no other node uses: the first free one, so that a node that
    is started again finds what the one before it had.

    Raises: ConfigError if as many nodes as there may be are running here, or it can't be made.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(most):
            place = root / f"node-{number}"
            with contextlib.suppress(ConfigError):
                lock = OwnerLock(root / f"node-{number}.lock", what="a node of a fleet")
                place.mkdir(mode=0o700, exist_ok=True)
                return place, lock
    except OSError as error:
        raise ConfigError(f"Nodes can't keep their stores in {root}: {error.strerror}.") from error
    raise ConfigError(f"{most} nodes have their stores in {root} already.")
