"""One deployment at work: engine, store, scheduler, and the life they share.

Theory of operation. `start` brings everything up in order: the engine's process begins to load
first, since that takes longest; then the probe, the store, the tiers' warming. The supervisor (see
`supervision`) then watches: when the engine dies or hangs, slots are declared empty, a new one is
started, the pinned prefixes are warmed again, and what waits in the queue goes on. `stop` lets
running requests end, saves what is worth it, and ends the engine.

States: starting -> warming -> ready <-> down, and stopping at the end. Requests are admitted when
ready.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable
from enum import StrEnum
from typing import Any

from keepwarm.api.steering import SystemPlaces
from keepwarm.core.hygiene import hygiene_of
from keepwarm.core.job import Job
from keepwarm.core.memory import MemoryKind
from keepwarm.core.plan import Machine, Plan
from keepwarm.core.rates import Rates
from keepwarm.core.reply import Counts
from keepwarm.core.scheduler import Scheduler
from keepwarm.core.slots import Slot
from keepwarm.core.tiers import TierSet
from keepwarm.deployment.aging import evict_unused
from keepwarm.deployment.ahead import Ahead
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.dispatcher import Dispatcher
from keepwarm.deployment.explaining import begin_explaining
from keepwarm.deployment.prefixes import Prefixes, UnprovedError
from keepwarm.deployment.probe import probe
from keepwarm.deployment.proof import Prover
from keepwarm.deployment.slot_store import SlotStore
from keepwarm.deployment.supervision import Supervisor
from keepwarm.deployment.warm import (
    Progress,
)
from keepwarm.engine.attach import plan_launch, seen_again
from keepwarm.engine.beginning import Beginning, prepare, start_process
from keepwarm.engine.client import EngineClient, names_of
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.fingerprint import fingerprint, memory_kind
from keepwarm.engine.process import EngineProcess
from keepwarm.engine.rendering import fitted_tiers, system_places, unrendered_arguments
from keepwarm.engine.session import wait_ready
from keepwarm.errors import (
    DeadlineError,
    EngineDownError,
    EngineError,
    EngineReplacedError,
    KeepwarmError,
    NotFoundError,
    UnknownFlagError,
)
from keepwarm.explain.explainer import Explainer, Sink
from keepwarm.explain.metrics import Metrics
from keepwarm.explain.tracing import start_tracing
from keepwarm.keys import load_keys
from keepwarm.settings import Places, Settings, trace_export
from keepwarm.store.shelf import StoreSettings
from keepwarm.store.store import Store
from keepwarm.tiers.router_files import load_router
from keepwarm.tiers.routing import TierRouter
from keepwarm.tiers.tiering import AUTO, TieredRequest

log = logging.getLogger("keepwarm")

_CANCEL_AGAIN_S = 1.0


class State(StrEnum):
    """Where a deployment is in its life."""

    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DOWN = "down"
    FAILED = "failed"
    STOPPING = "stopping"


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they have ended.

    Once isn't always enough: a cancellation that comes with what a task awaits is lost in a
    `wait_for` (Python 3.11), and a stop would wait for that task for ever.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_CANCEL_AGAIN_S)


class Runtime(Deployment):
    """See the module. Make it, `start` it, hand it to the HTTP server, `stop` it."""

    prefixes: Prefixes
    prover: Prover

    def __init__(
        self,
        settings: Settings,
        places: Places,
        *,
        on_status: Callable[[str], None] | None = None,
        on_progress: Progress | None = None,
        leaves: bool = False,
        beginning: Beginning | None = None,
    ) -> None:
        """Read keys, tiers and the router's rules.

        Args:
            settings: all of them.
            places: where files are.
            on_status: told in a line what is being done.
            on_progress: told how far a prefix is.
            leaves: an attached server is warmed and then left to itself.
            beginning: what was begun before; its engine is this one's from `start` on.

        Raises:
            ConfigError, TierError: nothing was started.
        """
        self.settings = settings
        self.places = places
        server = settings.server
        self.keys = load_keys(server.api_keys, server.api_key_file, server.operators)
        self._beginning = beginning or prepare(settings, places)
        self.tiers_dir = self._beginning.tiers_dir
        self.tiers: TierSet = self._beginning.tiers
        self.prefixes = Prefixes(self, leaves=leaves, on_progress=on_progress)
        self.router = TierRouter(
            self.tiers,
            load_router(
                tiers_dir=self.tiers_dir,
                own_tools=list(self.tiers)[-1].tools,
            ),
            costs=self.prefixes.costs,
            untiered=settings.tiers.untiered,
        )
        # Set once the engine is up and has been asked; see `engine.rendering`.
        self.takes = SystemPlaces()
        self.model_names: tuple[str, ...] = ()
        self.hygiene = hygiene_of(settings.hygiene.rules, settings.hygiene.drop_lines)
        self.metrics = Metrics()
        self.tracing = start_tracing(trace_export())
        sinks: list[Sink] = [self.metrics, *([self.tracing] if self.tracing else [])]
        self.explainer = Explainer(keeps_text=settings.log.prompts, sinks=sinks)
        self.state = State.STARTING
        self.status = "starting"
        self.started_s = time.time()
        self.failure: KeepwarmError | None = None
        self._on_status = on_status
        self._process: EngineProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = asyncio.Event()
        self._supervisor: Supervisor | None = None
        self._slept = False
        self._serving_at_death: frozenset[str] = frozenset()
        self._vital: list[asyncio.Task[None]] = []

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id, None for an attached one."""
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        """Whether those tasks still run without which nobody would see a dead engine."""
        return not any(task.done() for task in self._vital)

    async def start(self) -> None:
        """Bring everything up and warm; returns when ready.

        Raises:
            KeepwarmError: it can't run. Everything begun was ended again.
        """
        try:
            await self._start()
        except BaseException:
            await self.stop(drain=False)
            raise

    async def _start(self) -> None:
        settings = self.settings
        begun = self._beginning
        self._process = begun.process
        self.launch = begun.launch or await plan_launch(
            settings.engine, slot_dir=begun.staging, tier_chars=begun.tier_chars
        )
        self.client = EngineClient(
            self.launch.base_url,
            api_key=settings.engine.upstream_key or None,
            opens_ahead=self.launch.attached is None,
        )
        await self._start_engine()
        await self._open_all()
        try:
            await self._warm()
        except UnprovedError:
            # The engine doesn't take the mended window: keep its windowed layers whole instead.
            log.warning("the sliding window can't be restored on this engine: using --swa-full")
            await self._stop_engine()
            await self.store.close()
            self.launch = self.launch.with_swa_full()
            await self._start_engine()
            await self._open_all()
            await self._warm()
        await begin_explaining(self)
        self._supervisor = Supervisor(
            self,
            hang_timeout_s=settings.engine.hang_timeout_s,
            max_rss_bytes=settings.engine.max_rss_bytes,
        )
        self.ahead.start()
        self._vital = [self.dispatcher.start(), self.supervise(self._supervisor.watch())]
        if settings.store.max_age_days:
            self.supervise(evict_unused(self))
        self._set_ready()

    def _set_ready(self) -> None:
        self.state = State.READY
        self.tell_warmth()
        self._open.set()

    def tell_warmth(self) -> None:
        """Say how many prefixes are warm, and how many aren't yet; once it is ready."""
        if self.state is not State.READY:
            return
        warmed, lacking = len(self.prefixes.warmed), len(self.prefixes.lacking)
        self.metrics.warm.set(not lacking)
        self.tell(f"ready: {warmed} prefixes warm" + (f", {lacking} still cold" if lacking else ""))

    async def _start_engine(self) -> None:
        """Start a process, unless one was begun, and wait until its model is loaded."""
        self.tell("loading the model")
        timeout_s = self.settings.engine.start_timeout_s
        while True:
            if self._process is None:
                self._process = await start_process(self.launch)
            try:
                await wait_ready(self.client, self._process, timeout_s=timeout_s)
            except UnknownFlagError as error:
                self.launch = self.launch.without(error)
                await self._stop_engine()
            else:
                return

    async def _stop_engine(self) -> None:
        if self._process:
            await self._process.stop()
            self._process = None

    def check_model(self, name: object) -> None:
        """Refuse a model that isn't here, where the settings say so.

        Raises:
            NotFoundError: there is no such model.
        """
        if not self.settings.server.strict_models or not name:
            return
        known = (*self.tiers.names, AUTO, *self.model_names)
        if name not in known:
            raise NotFoundError(
                f"There is no model {str(name)[:80]!r} here. There are: {', '.join(known)}."
            )

    async def _open_all(self) -> None:
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
        if not self.probed.is_usable:
            log.warning(
                "slots of this engine can't be saved and restored (%s): every start is cold",
                self.probed.reason,
            )
        elif self.probed.layout is None:
            log.warning(
                "the engine's slot files aren't understood (%s): whole snapshots only",
                self.probed.reason,
            )
        pool = None
        if self._shares_pool(slots):
            # A slot's own limit is the model's trained context, which the pool may exceed.
            options = self.launch.options
            pool = options.context_tokens if options else slot_tokens
        self.fingerprint = fingerprint(self.launch, props, form=self._form(slots))
        self.store = await Store.open(
            StoreSettings(
                root=self._beginning.store_dir,
                fingerprint=self.fingerprint,
                layout=self.probed.layout,
                quota_bytes=self.settings.store.quota_bytes,
                staging=self.launch.slot_dir,
                staging_bytes=self.settings.store.staging_bytes,
                streams=self.probed.streams,
                max_tokens=slot_tokens,
                tenants=self.keys.tenants,
                file_mode=self.probed.file_mode,
                owner=f"keepwarm (pid {os.getpid()})",
            )
        )
        for line in self.store.report.lines():
            log.info("store: %s", line)
        self.machine = Machine(
            row_bytes=self.probed.row_bytes,
            cuttable=self.probed.cuttable,
            can_save=self.probed.is_usable,
            pool_tokens=pool,
            # A prefix that doesn't fill its window is reused but for its last token.
            slack_tokens=int(self.probed.kind is MemoryKind.SLIDING_WINDOW),
            slot_tokens=slot_tokens,
            appends=self.counter.appends,
            tells_time=self.counter.tells_time,
            window_tokens=self.launch.model.window_tokens if self.launch.model else 0,
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
            rates=Rates(),
            lookup=self.slot_store.lookup,
            knows=self.slot_store.knows,
            queue_limit=self.settings.server.queue,
            tenants=self.keys.tenants,
        )
        self.dispatcher = Dispatcher(
            scheduler, self.counter, self.slot_store, self.metrics, self.supervise
        )
        self.prover = Prover(self)
        self.dispatcher.on_kept = self.prover.kept
        self.ahead = Ahead(self)

    async def _warm(self) -> None:
        """Warm all prefixes. Raises: UnprovedError, ConfigError; see `Prefixes.warm`."""
        self.state = State.WARMING
        self.tell("warming")
        await self.prefixes.warm()

    def _shares_pool(self, slots: int) -> bool:
        options = self.launch.options
        if options and not options.without & {"--kv-unified", "--no-kv-unified"}:
            return options.unified and slots > 1
        # Such a server doesn't say; a file with one stream for several slots tells.
        return slots > 1 and self.probed.streams == 1

    def _form(self, slots: int) -> str:
        """Whole snapshots fit only the slot layout they were saved under; rows fit any."""
        if self.probed.layout is not None:
            return "rows"
        return f"whole/{slots}/{self.probed.streams}"

    async def stop(self, *, drain: bool = True) -> None:
        """Let requests end, save, close the store, end the engine."""
        was_ready = self.state is State.READY
        self.state = State.STOPPING
        self.metrics.warm.set(0)
        self.tell("stopping: saving slots")
        if hasattr(self, "dispatcher"):
            self.dispatcher.refuse_waiting(self._why_down())
        if drain and was_ready:
            await self.dispatcher.drain(self.settings.server.drain_timeout_s)
        absorbing = [t for t in self._tasks if t.get_name() == "absorb"]
        if absorbing:
            await asyncio.wait(absorbing, timeout=30)
        if hasattr(self, "dispatcher"):
            self.dispatcher.close()
        if self._supervisor:
            self._supervisor.close()
        if hasattr(self, "client"):
            # What still runs has had its time; each client is told.
            self.client.http.abort()
        await end_tasks(self._tasks)
        await self.explainer.close()
        if self.tracing:
            await asyncio.to_thread(self.tracing.close)
        if hasattr(self, "store"):
            await self.store.close()
        if hasattr(self, "client"):
            self.client.http.close()
        await self._stop_engine()

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Run a task in the background; a failure of it is logged, never lost."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a background task failed", exc_info=error)

    def suspect_engine(self) -> None:
        """A request got no answer: look at the engine now rather than at the next interval."""
        if self._supervisor:
            self._supervisor.suspect()

    async def look_at_engine(self) -> None:
        """As `suspect_engine`; returns when it answered, or was found dead."""
        if self._supervisor:
            await self._supervisor.look()

    @property
    def process(self) -> EngineProcess | None:
        """The engine's current process; None for an attached one."""
        return self._process

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        scheduler = self.dispatcher.scheduler
        return not scheduler.busy and not scheduler.queued

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
        if self._is_asleep(props):
            return True
        slots = int(props.get("total_slots") or 1)
        now = fingerprint(seen_again(self.launch, props), props, form=self._form(slots))
        return now == self.fingerprint and slots == len(self.dispatcher.scheduler.slots)

    @property
    def may_sleep(self) -> bool:
        """Whether the engine may unload its model by itself (`--sleep-idle-seconds`)."""
        options = self.launch.options
        return options is None or "--sleep-idle-seconds" in options.extra

    def _is_asleep(self, props: dict[str, Any]) -> bool:
        """Whether the engine says that it has unloaded its model; its slots are empty then."""
        was_asleep, self._slept = self._slept, bool(props.get("is_sleeping"))
        if self._slept and not was_asleep:
            log.info("the engine sleeps: its slots are empty, the next request loads its model")
            self.dispatcher.engine_slept()
        return self._slept

    def engine_lost(self, reason: str) -> None:
        """The engine is gone: its slots are empty, requests wait."""
        self.state = State.DOWN
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
        if self._process and not self._process.exited.is_set():
            self._process.kill()
        await self._stop_engine()
        await self._start_engine()
        if not self._process and not await self.is_same_engine():
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
        self.failure = None
        self._set_ready()
        self.dispatcher.engine_up()

    def engine_failed(self, error: KeepwarmError, *, gave_up: bool) -> None:
        """A start failed; if `gave_up`, the circuit is open."""
        self.failure = error
        if gave_up:
            self.state = State.FAILED
            self.tell("the engine doesn't come back")
            self.dispatcher.refuse_waiting(self._why_down())

    async def ready(self) -> None:
        """Wait until it has been ready for the first time."""
        await self._open.wait()

    async def admitted(self) -> None:
        """Wait until requests are served.

        Raises:
            EngineDownError: the circuit is open, or Keepwarm is stopping.
            DeadlineError: it took too long.
        """
        if self.state is State.READY or self.state is State.DOWN:
            return
        if self.state in (State.FAILED, State.STOPPING):
            raise EngineDownError(self._why_down())
        try:
            await asyncio.wait_for(self._open.wait(), self.settings.server.queue_timeout_s)
        except TimeoutError as error:
            raise DeadlineError("Keepwarm wasn't ready within the time allowed.") from error

    def _why_down(self) -> str:
        """For clients: why nothing is served. The engine's own lines are for the log."""
        why = str(self.failure or "Keepwarm is stopping.").partition(" Its last lines:")[0]
        return f"The engine isn't available. {why}"

    def proved(
        self, job: Job, plan: Plan, counts: Counts, *, ttft_s: float, tier: TieredRequest
    ) -> None:
        """Compare a reply's counts with its plan."""
        self.prover.proved(job, plan, counts, ttft_s=ttft_s, tier=tier)

    def tell(self, status: str) -> None:
        """Say what is being done, in a line."""
        self.status = status
        if self._on_status:
            self._on_status(status)
