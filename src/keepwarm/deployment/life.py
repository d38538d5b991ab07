"""The life of what serves models: begun, looked after, and ended, with all that it needs.

`start` brings the first model's deployment up and returns when it is warm; `stop` lets requests
end, saves, and leaves nothing running. Where there are several models, or one may be unloaded, they
take `turns`; one alone stays as it is. What recovers an engine that died is the deployment's own
(`supervision`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.house import open_house
from keepwarm.deployment.model import Model, Models, ModelState, Stay
from keepwarm.deployment.tasks import Tasks, end_tasks
from keepwarm.deployment.turns import Turns
from keepwarm.deployment.warm import Progress
from keepwarm.engine.beginning import Beginning, prepare
from keepwarm.errors import KeepwarmError
from keepwarm.settings import Places, Settings

log = logging.getLogger("keepwarm")


class Life:
    """See the module. Make it, `start` it, hand it to the HTTP server, `stop` it."""

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
            beginning: what was begun before; its engine is the first model's from `start` on.

        Raises:
            ConfigError, TierError: nothing was started.
        """
        self.settings, self.places = settings, places
        self.house = house = open_house(settings, places)
        self.keys, self.hygiene = house.keys, house.hygiene
        self.metrics, self.explainer = house.metrics, house.explainer
        self.started_s = house.started_s
        self._on_status, self._on_progress, self._leaves = on_status, on_progress, leaves
        self._begun = beginning or prepare(settings, places)
        self._tasks = Tasks()
        self._turning: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._was_ready = asyncio.Event()
        self._line = "starting"
        self.models = Models(settings)
        self.models.check_tiers(self._begun.tiers.names)
        self.turns = Turns(
            self.models,
            settings.engine,
            make=self._next,
            tell=self._tell,
            wait_s=settings.server.queue_timeout_s,
        )
        first = self.models.default
        first.deployment = self._shown = self._make(first, self._begun)
        first.state = ModelState.LOADED

    def _next(self, model: Model) -> Deployment:
        return self._make(model, self._begun.of_model(model.name))

    def _make(self, model: Model, beginning: Beginning) -> Deployment:
        return Deployment(
            self.house,
            model.settings,
            beginning,
            on_status=partial(self._told, model),
            on_progress=self._on_progress,
            leaves=self._leaves,
            learned=model.learned,
        )

    @property
    def takes_turns(self) -> bool:
        """Whether a model may be unloaded."""
        return self.models.several or self.settings.engine.idle_unload_s > 0

    @property
    def deployment(self) -> Deployment:
        """What there is to see: the first model's deployment that is there; else the last one."""
        for model in self.models:
            if model.deployment is not None:
                self._shown = model.deployment
                break
        return self._shown

    @property
    def deployments(self) -> list[Deployment]:
        """All that there are, whatever their state."""
        return [model.deployment for model in self.models if model.deployment is not None]

    @property
    def state(self) -> State:
        """Where it is in its life: ready, too, while models take turns."""
        if self._is_stopping:
            return State.STOPPING
        if self._turning is None:
            return self.deployment.state
        states = [
            model.deployment.state for model in self.models if model.is_open and model.deployment
        ]
        return State.READY if not states or State.READY in states else states[0]

    @property
    def serves_people(self) -> bool:
        """Whether somebody waits for a reply or for a model, batches aside."""
        return any(
            model.users or any(not waiting.is_batch for waiting in model.waiting.values())
            for model in self.models
        ) or any(
            job.priority == 0
            for one in self.deployments
            if one.is_open
            for job in one.dispatcher.scheduler.jobs.values()
        )

    @property
    def status(self) -> str:
        """What is being done, in a line."""
        return self._line

    @property
    def is_alive(self) -> bool:
        """Whether those tasks still run without which nobody would see a dead engine."""
        if self._turning is not None and self._turning.done():
            return False
        return all(
            model.deployment.is_alive for model in self.models if model.is_open and model.deployment
        )

    async def start(self) -> None:
        """Bring the first model up and warm; returns when ready.

        Of several, one that can't be loaded leaves it to the others.

        Raises:
            KeepwarmError: it can't run. Everything begun was ended again.
        """
        first = self.models.default
        assert first.deployment
        began_s = asyncio.get_running_loop().time()
        try:
            await first.deployment.start()
        except KeepwarmError as error:
            if not self.models.several:
                await self.stop(drain=False)
                raise
            await self.turns.failed(first, error)
        except BaseException:
            await self.stop(drain=False)
            raise
        else:
            first.load_s = asyncio.get_running_loop().time() - began_s
            self.turns.loaded(first, first.deployment)
        if self.takes_turns:
            self._turning = self.supervise(self.turns.run())
        self._was_ready.set()

    async def stop(self, *, drain: bool = True) -> None:
        """Let requests end, save, close the stores, end the engines."""
        self._is_stopping = True
        self.turns.close("The engine isn't available. Keepwarm is stopping.")
        if self._turning is not None:
            await end_tasks([self._turning])
        deployments = self.deployments
        await asyncio.gather(*(one.halt(drain=drain) for one in deployments))
        # At once: none may go on without the others.
        await asyncio.gather(self._tasks.end(), *(one.tasks.end() for one in deployments))
        await self.explainer.close()
        if self.house.tracing:
            await asyncio.to_thread(self.house.tracing.close)
        await asyncio.gather(*(one.close() for one in deployments))
        for model in self.models:
            model.let_go()

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Run a task in the background; a failure of it is logged, never lost."""
        return self._tasks.supervise(work, name=name)

    async def ready(self) -> None:
        """Wait until it has been ready for the first time."""
        await self._was_ready.wait()

    async def admitted(self, model: Model | None = None, *, is_batch: bool = False) -> Stay:
        """Wait until a model serves requests, having it loaded if need be.

        Args:
            model: which; None: whichever is loaded, for what any can tell.
            is_batch: who asks can wait for hours.

        Returns:
            A request's stay at the deployment that serves it.

        Raises:
            EngineDownError: the circuit is open, or Keepwarm is stopping.
            DeadlineError: it took too long.
            ModelFailedError, ConflictError: see `Turns.wait`.
        """
        if model is None:
            model = next((one for one in self.models if one.is_open), self.models.default)
        while True:
            deployment = model.deployment
            if deployment is None or not model.is_open:
                return await self.turns.wait(model, is_batch=is_batch)
            await deployment.admitted()
            # It may have gone while this waited for it to be warm.
            if model.is_open and model.deployment is deployment:
                return Stay(model, deployment, is_batch=is_batch)

    async def glanced(self) -> Stay | None:
        """A stay of somebody who only looks at what is loaded; None if nothing is.

        It loads nothing, and keeps nothing loaded behind it.

        Raises: as `admitted`.
        """
        model = next((one for one in self.models if one.is_open), None)
        deployment = model.deployment if model else None
        if model is None or deployment is None:
            return None
        await deployment.admitted()
        if not model.is_open or model.deployment is not deployment:
            return None
        return Stay(model, deployment, is_batch=False, is_glance=True)

    def check_model(self, name: object) -> None:
        """Refuse a model that isn't here, where the settings say so.

        Raises:
            NotFoundError: there is no such model.
        """
        if self.settings.server.strict_models:
            default = self.models.default.deployment
            names = default.model_names if default else ()
            self.models.check(name, self._begun.tiers.names, names)

    def _told(self, model: Model, line: str) -> None:
        self._tell(f"{model.name}: {line}" if self.models.several else line)

    def _tell(self, line: str) -> None:
        self._line = line
        if self._on_status:
            self._on_status(line)
