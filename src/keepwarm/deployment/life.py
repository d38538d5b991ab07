"""The life of what serves models: begun, looked after, and ended, with all that it needs.

`start` brings the deployment up and returns when it is warm; `stop` lets requests end, saves, and
leaves nothing running. What recovers an engine that died is the deployment's own (`supervision`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from keepwarm.deployment.condition import State
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.house import open_house
from keepwarm.deployment.tasks import Tasks
from keepwarm.deployment.warm import Progress
from keepwarm.engine.beginning import Beginning, prepare
from keepwarm.errors import NotFoundError
from keepwarm.settings import Places, Settings
from keepwarm.tiers.tiering import AUTO


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
            beginning: what was begun before; its engine is this one's from `start` on.

        Raises:
            ConfigError, TierError: nothing was started.
        """
        self.settings, self.places = settings, places
        self.house = house = open_house(settings, places)
        self.keys, self.hygiene = house.keys, house.hygiene
        self.metrics, self.explainer = house.metrics, house.explainer
        self.started_s = house.started_s
        self._on_status, self._on_progress, self._leaves = on_status, on_progress, leaves
        self._tasks = Tasks()
        self.deployment = self._make(beginning or prepare(settings, places))

    def _make(self, beginning: Beginning) -> Deployment:
        return Deployment(
            self.house,
            self.settings,
            beginning,
            on_status=self._on_status,
            on_progress=self._on_progress,
            leaves=self._leaves,
        )

    @property
    def state(self) -> State:
        """Where the deployment is in its life."""
        return self.deployment.state

    @property
    def status(self) -> str:
        """What is being done, in a line."""
        return self.deployment.status

    @property
    def is_alive(self) -> bool:
        """Whether those tasks still run without which nobody would see a dead engine."""
        return self.deployment.is_alive

    async def start(self) -> None:
        """Bring everything up and warm; returns when ready.

        Raises:
            KeepwarmError: it can't run. Everything begun was ended again.
        """
        try:
            await self.deployment.start()
        except BaseException:
            await self.stop(drain=False)
            raise

    async def stop(self, *, drain: bool = True) -> None:
        """Let requests end, save, close the store, end the engine."""
        deployment = self.deployment
        await deployment.halt(drain=drain)
        # Both at once: neither may go on without the other.
        await asyncio.gather(self._tasks.end(), deployment.tasks.end())
        await self.explainer.close()
        if self.house.tracing:
            await asyncio.to_thread(self.house.tracing.close)
        await deployment.close()

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Run a task in the background; a failure of it is logged, never lost."""
        return self._tasks.supervise(work, name=name)

    async def ready(self) -> None:
        """Wait until it has been ready for the first time."""
        await self.deployment.ready()

    async def admitted(self) -> Deployment:
        """Wait until requests are served.

        Returns:
            What serves them.

        Raises:
            EngineDownError: the circuit is open, or Keepwarm is stopping.
            DeadlineError: it took too long.
        """
        await self.deployment.admitted()
        return self.deployment

    def check_model(self, name: object) -> None:
        """Refuse a model that isn't here, where the settings say so.

        Raises:
            NotFoundError: there is no such model.
        """
        if not self.settings.server.strict_models or not name:
            return
        known = (*self.deployment.tiers.names, AUTO, *self.deployment.model_names)
        if name not in known:
            raise NotFoundError(
                f"There is no model {str(name)[:80]!r} here. There are: {', '.join(known)}."
            )
