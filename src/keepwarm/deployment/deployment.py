"""One model at work: its engine, slots, scheduler, kept prefixes and store, made and ended as one.

Theory of operation. `start` brings everything up in order: the engine's process begins to load
first, since that takes longest; then the probe, the store, the tiers' warming. The supervisor (see
`supervision`) then watches: when the engine dies or hangs, slots are declared empty, a new one is
started, the pinned prefixes are warmed again, and what waits in the queue goes on. `halt` lets
running requests end and saves what is worth it, `close` ends the store and the engine. The states
are in `condition`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from keepwarm.api.steering import SystemPlaces
from keepwarm.core.plan import Machine
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import Slot
from keepwarm.deployment.aging import evict_unused
from keepwarm.deployment.ahead import Ahead
from keepwarm.deployment.condition import Condition, State
from keepwarm.deployment.dispatcher import Dispatcher
from keepwarm.deployment.engine_run import EngineRun
from keepwarm.deployment.explaining import begin_explaining
from keepwarm.deployment.house import House
from keepwarm.deployment.learned import Learned, nothing_learned
from keepwarm.deployment.opening import form_of, machine_of, open_store
from keepwarm.deployment.prefixes import Prefixes, UnprovedError
from keepwarm.deployment.probe import ProbeResult, probe
from keepwarm.deployment.proof import Prover
from keepwarm.deployment.slot_store import SlotStore
from keepwarm.deployment.supervision import Supervisor
from keepwarm.deployment.tasks import Tasks
from keepwarm.deployment.warm import Progress
from keepwarm.engine.attach import seen_again
from keepwarm.engine.beginning import Beginning
from keepwarm.engine.client import EngineClient, names_of
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.fingerprint import fingerprint, memory_kind
from keepwarm.engine.launch import Launch
from keepwarm.engine.process import EngineProcess
from keepwarm.engine.rendering import fitted_tiers, system_places, unrendered_arguments
from keepwarm.errors import (
    EngineError,
    EngineReplacedError,
    KeepwarmError,
)
from keepwarm.settings import Settings
from keepwarm.store.store import Store

log = logging.getLogger("keepwarm")


class Deployment:
    """See the module. Make it, `start` it, ask it, `halt` and `close` it."""

    def __init__(
        self,
        house: House,
        settings: Settings,
        beginning: Beginning,
        *,
        on_status: Callable[[str], None] | None = None,
        on_progress: Progress | None = None,
        leaves: bool = False,
        learned: Learned | None = None,
    ) -> None:
        """Read the router's rules; nothing is started.

        Args:
            house: what it shares with others.
            settings: all of them, its engine's among them.
            beginning: what was begun before; its engine is this one's from `start` on.
            on_status: told in a line what is being done.
            on_progress: told how far a prefix is.
            leaves: an attached server is warmed and then left to itself.
            learned: what the one before it has learned.

        Raises:
            ConfigError: the router's rules can't be used.
        """
        self.settings = settings
        self.metrics, self.explainer = house.metrics, house.explainer
        self.started_s = house.started_s
        self._house = house
        self._beginning = beginning
        self.tiers = beginning.tiers
        self.prefixes = Prefixes(self, leaves=leaves, on_progress=on_progress)
        self.learned = learned or nothing_learned(beginning, untiered=settings.tiers.untiered)
        self.router = self.learned.router
        self.router.costs = self.prefixes.costs
        # Set once the engine is up and has been asked; see `engine.rendering`.
        self.takes = SystemPlaces()
        self.model_names: tuple[str, ...] = ()
        self._condition = Condition(on_status)
        self.is_open = False
        """Whether the engine has been asked what it is: what is set behind that is there."""
        # Requests under which the engine died go again one at a time, so that the culprit is found.
        self.suspects = asyncio.Lock()
        self._run: EngineRun | None = None
        self.tasks = Tasks()
        self._supervisor: Supervisor | None = None
        self._serving_at_death: frozenset[str] = frozenset()
        self._vital: list[asyncio.Task[None]] = []
        self.counter: PromptCounter
        self.probed: ProbeResult
        self.slot_tokens: int
        self.fingerprint: str
        self.machine: Machine
        self.store: Store
        self.slot_store: SlotStore
        self.dispatcher: Dispatcher
        self.prover: Prover
        self.ahead: Ahead

    @property
    def engine(self) -> EngineRun:
        """Its engine, once `start` has decided which it is."""
        assert self._run
        return self._run

    @property
    def launch(self) -> Launch:
        """How its engine is run."""
        return self.engine.launch

    @property
    def client(self) -> EngineClient:
        """How its engine is reached."""
        return self.engine.client

    @property
    def process(self) -> EngineProcess | None:
        """The engine's current process; None for an attached one."""
        return self._run.process if self._run else None

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id, None for an attached one."""
        return self._run.pid if self._run else None

    @property
    def state(self) -> State:
        """Where it is in its life."""
        return self._condition.state

    @property
    def status(self) -> str:
        """What is being done, in a line."""
        return self._condition.status

    @property
    def is_alive(self) -> bool:
        """Whether those tasks still run without which nobody would see a dead engine."""
        return not any(task.done() for task in self._vital)

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        scheduler = self.dispatcher.scheduler
        return not scheduler.busy and not scheduler.queued

    async def start(self) -> None:
        """Bring everything up and warm; returns when ready.

        Raises:
            KeepwarmError: it can't run; what was begun is ended by `halt` and `close`.
        """
        self._run = await EngineRun.planned(self.settings.engine, self._beginning)
        self.tell("loading the model")
        await self.engine.start()
        await self._open()
        try:
            await self._warm()
        except UnprovedError:
            # The engine doesn't take the mended window: keep its windowed layers whole instead.
            log.warning("the sliding window can't be restored on this engine: using --swa-full")
            await self.engine.stop()
            await self.store.close()
            self.engine.launch = self.launch.with_swa_full()
            await self.engine.start()
            await self._open()
            await self._warm()
        await begin_explaining(self)
        self._supervisor = Supervisor(
            self,
            hang_timeout_s=self.settings.engine.hang_timeout_s,
            max_rss_bytes=self.settings.engine.max_rss_bytes,
        )
        self.ahead.start()
        self._vital = [self.dispatcher.start(), self.supervise(self._supervisor.watch())]
        if self.settings.store.max_age_days:
            self.supervise(evict_unused(self))
        self._set_ready()

    def _set_ready(self) -> None:
        self._condition.set_ready()
        self.tell_warmth()

    def tell_warmth(self) -> None:
        """Say how many prefixes are warm, and how many aren't yet; once it is ready."""
        if self.state is not State.READY:
            return
        warmed, lacking = len(self.prefixes.warmed), len(self.prefixes.lacking)
        self.metrics.warm.set(not lacking)
        self.tell(f"ready: {warmed} prefixes warm" + (f", {lacking} still cold" if lacking else ""))

    async def _open(self) -> None:
        """Learn what the engine is, open the store that fits, and set up the scheduler."""
        props = await self.client.props()
        slots = int(props.get("total_slots") or 1)
        slot_tokens = int((props.get("default_generation_settings") or {}).get("n_ctx") or 4096)
        self.slot_tokens = slot_tokens
        self.counter = PromptCounter(self.client, template=str(props.get("chat_template") or ""))
        # The first keeps the engine's loop busy, the others its HTTP threads.
        self.probed, self.router.unrendered, self.takes, _ = await asyncio.gather(
            probe(
                self.client,
                self.launch.slot_dir,
                kind=memory_kind(self.launch),
                max_tokens=slot_tokens,
                is_ours=self.launch.attached is None,
            ),
            unrendered_arguments(self.client),
            system_places(self.client),
            self.counter.prepare(),
        )
        if self.settings.server.strict_models:
            self.model_names = names_of(await self.client.models())
        self.tiers = self.router.tiers = await fitted_tiers(
            self.client, self._beginning.tiers, self.takes
        )
        form = form_of(self.probed, slots=slots)
        self.fingerprint = fingerprint(self.launch, props, form=form)
        self.store = await open_store(
            self.settings,
            self.launch,
            self.probed,
            root=self._beginning.store_dir,
            fingerprint=self.fingerprint,
            slot_tokens=slot_tokens,
            tenants=self._house.keys.tenants,
        )
        self.machine = machine_of(
            self.launch, self.probed, self.counter, slots=slots, slot_tokens=slot_tokens
        )
        self.slot_store = SlotStore(
            self.store,
            row_bytes=self.probed.row_bytes,
            cuttable=self.probed.cuttable,
            is_usable=self.probed.is_usable,
        )
        scheduler = Scheduler(
            slots=[Slot(i) for i in range(slots)],
            machine=self.machine,
            rates=self.learned.rates,
            lookup=self.slot_store.lookup,
            knows=self.slot_store.knows,
            queue_limit=self.settings.server.queue,
            tenants=self._house.keys.tenants,
        )
        self.dispatcher = self._dispatcher(scheduler)
        self.prover = Prover(self)
        self.dispatcher.on_kept = self.prover.kept
        self.ahead = Ahead(self)
        self.is_open = True

    def _dispatcher(self, scheduler: Scheduler) -> Dispatcher:
        return Dispatcher(scheduler, self.counter, self.slot_store, self.metrics, self.supervise)

    async def _warm(self) -> None:
        """Warm all prefixes. Raises: UnprovedError, ConfigError; see `Prefixes.warm`."""
        self._condition.state = State.WARMING
        self.tell("warming")
        await self.prefixes.warm()

    async def halt(self, *, drain: bool = True) -> None:
        """Let requests end, save what is worth it, and break off the rest."""
        # Stopping: a halt that was broken off is done again.
        is_served = self.state in (State.READY, State.STOPPING)
        self._condition.state = State.STOPPING
        self.metrics.warm.set(0)
        self.tell("stopping: saving slots")
        if self._supervisor:
            self._supervisor.close()
        if self.is_open:
            self.dispatcher.refuse_waiting(self._condition.why_down())
        if drain and is_served and self.is_open:
            await self.dispatcher.drain(self.settings.server.drain_timeout_s)
        await self.tasks.absorbed()
        if self.is_open:
            self.dispatcher.close()
        if self._run:
            # What still runs has had its time; each client is told.
            self.client.http.abort()

    async def close(self) -> None:
        """End its tasks, close the store, end the engine."""
        await self.tasks.end()
        if self.is_open:
            self.is_open = False
            await self.store.close()
        if self._run:
            self.client.http.close()
            await self.engine.stop()
        else:
            await self._beginning.stop()

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Run a task in the background; a failure of it is logged, never lost."""
        return self.tasks.supervise(work, name=name)

    def suspect_engine(self) -> None:
        """A request got no answer: look at the engine now rather than at the next interval."""
        if self._supervisor:
            self._supervisor.suspect()

    async def look_at_engine(self) -> None:
        """As `suspect_engine`; returns when it answered, or was found dead."""
        if self._supervisor:
            await self._supervisor.look()

    async def engine_rest(self) -> bool:
        """Start nothing new, let what runs end, and save the slots.

        Returns:
            False if something runs still; then all is as before.
        """
        scheduler = self.dispatcher.scheduler
        scheduler.up = False
        await self.dispatcher.drain(self.settings.server.drain_timeout_s)
        if scheduler.busy:
            self.dispatcher.engine_up()
            return False
        return True

    async def is_same_engine(self) -> bool:
        """Whether the engine that answers is the one whose snapshots these are."""
        try:
            props = await self.client.props()
        except EngineError:
            return True  # it doesn't answer: that is looked at elsewhere
        if props.get("is_sleeping"):
            if self.engine.falls_asleep():
                self.dispatcher.engine_slept()
            return True
        self.engine.is_asleep = False
        slots = int(props.get("total_slots") or 1)
        form = form_of(self.probed, slots=slots)
        now = fingerprint(seen_again(self.launch, props), props, form=form)
        return now == self.fingerprint and slots == len(self.dispatcher.scheduler.slots)

    @property
    def may_sleep(self) -> bool:
        """Whether the engine may unload its model by itself (`--sleep-idle-seconds`)."""
        return self.engine.may_sleep

    def engine_lost(self, reason: str) -> None:
        """The engine is gone: its slots are empty, requests wait."""
        self._condition.state = State.DOWN
        self.metrics.warm.set(0)
        self.metrics.restarted(reason)
        self._serving_at_death = self.dispatcher.scheduler.serving
        self.dispatcher.engine_down()

    def was_alone_at_death(self, job_id: str) -> bool | None:
        """Whether the engine served nobody else when it died last; None: it didn't serve this."""
        if job_id not in self._serving_at_death:
            return None
        return len(self._serving_at_death) == 1

    async def engine_again(self) -> None:
        """Start a new engine and warm it.

        Raises:
            KeepwarmError: it didn't come up.
        """
        self.tell("loading the model")
        await self.engine.renew()
        if not self.process and not await self.is_same_engine():
            raise EngineReplacedError(
                f"The server at {self.launch.base_url} runs another model, build or template than "
                "the one that Keepwarm was started with. Start Keepwarm anew for it."
            )
        try:
            await self._warm()
        except UnprovedError:
            # It was proved at the first start, so the engine isn't the one it was.
            log.warning("prefixes are restored but not reused: serving cold until a restart")

    def engine_back(self) -> None:
        """The engine is up and warm: requests go on."""
        self._set_ready()
        self.dispatcher.engine_up()

    def engine_failed(self, error: KeepwarmError, *, gave_up: bool) -> None:
        """A start failed; if `gave_up`, the circuit is open."""
        self._condition.failure = error
        if gave_up:
            self._condition.state = State.FAILED
            self.tell("the engine doesn't come back")
            self.dispatcher.refuse_waiting(self._condition.why_down())

    async def admitted(self) -> None:
        """Wait until requests are served. Raises: EngineDownError, DeadlineError."""
        await self._condition.admitted(timeout_s=self.settings.server.queue_timeout_s)

    def tell(self, status: str) -> None:
        """Say what is being done, in a line."""
        self._condition.tell(status)
