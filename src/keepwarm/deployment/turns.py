"""Models take turns in memory: they are loaded when they are asked for, and go when others are.

Theory of operation. A request for a model that isn't loaded waits (`wait`). One task looks at all
models whenever something has changed (`core.swaps` decides) and carries out one swap at a time:
1. Those that go take no new requests; what they have is let end.
2. Their slots are saved, their stores closed, their engines ended.
3. The other is loaded and warmed, and its requests go on.
If nobody waits for it any more during 1, those that were to go stay.

A model that can't be loaded is tried a second time at once, unless its file or its settings are to
blame; then whoever waits is told, and it isn't tried again before a pause, longer each time. What
had gone for it comes back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from keepwarm.core.swaps import Limits, Swap, decide, has_room_ever, unused
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.model import Model, Models, ModelState, Stay, Waiting
from keepwarm.deployment.supervision import failure_of, pause_s
from keepwarm.errors import (
    ConflictError,
    DeadlineError,
    EngineDownError,
    EngineStartError,
    KeepwarmError,
    SnapshotError,
)
from keepwarm.settings import EngineSettings
from keepwarm.store.neighbours import hold

log = logging.getLogger("keepwarm")

# While somebody waits, what has waited longer may weigh more; else models are looked at for being
# unused.
_LOOK_S, _QUIET_LOOK_S = 0.1, 1.0
_LET_END_S = 0.02
_LONG_PAUSE_S = 30.0


class ModelFailedError(EngineStartError):
    """A model couldn't be loaded; it is tried again after a pause."""

    retry = True
    kind = "model_failed"


def limits_of(settings: EngineSettings) -> Limits:
    """How many models may be loaded, by the settings."""
    models = settings.max_models or (0 if settings.memory_bytes else 1)
    return Limits(models, settings.memory_bytes, settings.swap_wait_s)


class ModelTurns:
    """See the module. `make` makes a model's next deployment; `tell` is told what is being done."""

    def __init__(
        self,
        models: Models,
        settings: EngineSettings,
        *,
        make: Callable[[Model], Deployment],
        tell: Callable[[str], None],
        wait_s: float,
    ) -> None:
        """Take all of them; `wait_s` is how long a request may wait."""
        self._models = models
        self._limits = limits_of(settings)
        self._make, self._tell, self._wait_s = make, tell, wait_s
        self._news = asyncio.Event()
        self._asked: list[tuple[str, asyncio.Future[None]]] = []
        self._is_stopping = False

    def news(self) -> None:
        """Something has changed."""
        self._news.set()

    def close(self, message: str) -> None:
        """Nobody gets a turn any more: tell whoever waits."""
        self._is_stopping = True
        for model in self._models:
            _refuse(model, EngineDownError(message))
        for _, done in self._asked:
            if not done.done():
                done.set_exception(EngineDownError(message))

    async def wait(self, model: Model, *, is_batch: bool) -> Stay:
        """Wait until a model is loaded.

        Raises:
            ModelFailedError: it can't be, or couldn't be a moment ago.
            ConflictError: those that are pinned leave it no room.
            DeadlineError: it took too long.
            EngineDownError: Keepwarm is stopping.
        """
        now_s = time.monotonic()
        if self._is_stopping:
            raise EngineDownError("The engine isn't available. Keepwarm is stopping.")
        if model.failure is not None and now_s < model.again_s:
            raise _failed(model)
        if not has_room_ever(model.name, [m.now(now_s) for m in self._models], self._limits):
            raise ConflictError(
                f"The model {model.name!r} has no room beside those that are pinned. Unpin one."
            )
        future: asyncio.Future[Stay] = asyncio.get_running_loop().create_future()
        model.waiting[future] = Waiting(now_s, is_batch)
        self._news.set()
        try:
            async with asyncio.timeout(None if is_batch else self._wait_s):
                return await future
        except (TimeoutError, asyncio.CancelledError) as error:
            if future.done() and not future.cancelled() and not future.exception():
                future.result().leave()  # it was its turn in the same moment
            if isinstance(error, asyncio.CancelledError):
                raise
            raise DeadlineError(
                f"The model {model.name!r} wasn't loaded within the time allowed."
            ) from error
        finally:
            del model.waiting[future]
            self._news.set()

    async def load(self, model: Model) -> None:
        """Have a model loaded although nobody asks for it. Raises: as `wait`."""
        if not model.is_open:
            (await self.wait(model, is_batch=False)).leave()

    async def unload(self, model: Model) -> None:
        """Have a model go once what it has is done.

        Raises:
            EngineDownError: Keepwarm is stopping.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append((model.name, done))
        self._news.set()
        await done

    async def run(self) -> None:
        """Let models take turns for ever."""
        while True:
            self._news.clear()
            if not await self._step():
                waits = any(model.waiting for model in self._models)
                try:
                    async with asyncio.timeout(_LOOK_S if waits else _QUIET_LOOK_S):
                        await self._news.wait()
                except TimeoutError:
                    continue

    async def _step(self) -> bool:
        """Do one thing; False if there is nothing to do."""
        if self._asked:
            name, done = self._asked.pop(0)
            model = self._models.by_name[name]
            if model.is_open:
                await self._unload(model)
            if not done.done():
                done.set_result(None)
            return True
        now_s = time.monotonic()
        if self._limits.memory_bytes:
            for model in self._models:
                model.measure()
        known = [model.now(now_s) for model in self._models]
        if swap := decide(known, self._limits):
            await self._swap(swap)
            return True
        for model in self._models:
            idle_s = model.settings.engine.idle_unload_s
            if model.is_open and model.name in unused(known, idle_s):
                await self._unload(model)
                return True
        return False

    async def _swap(self, swap: Swap) -> None:
        wanted = self._models.by_name[swap.load]
        gone = []
        for name in swap.unload:
            model = self._models.by_name[name]
            if not await self._unload(model, unless=lambda: not wanted.waiting):
                return
            gone.append(model)
        if not await self._load(wanted) and gone:
            await self._load(gone[-1])

    async def _unload(self, model: Model, *, unless: Callable[[], bool] = lambda: False) -> bool:
        """Save a model's slots and end its engine; False if it stays."""
        deployment = model.deployment
        assert deployment
        model.state = ModelState.LEAVING
        while model.users or model.batch_users or (deployment.is_open and not deployment.is_idle):
            if unless():
                self._admit(model, deployment)
                return False
            await asyncio.sleep(_LET_END_S)
        self._tell(f"{model.label}: saving slots")
        began_s = time.monotonic()
        model.measure()
        await deployment.halt()
        await self._leave_store(model, deployment)
        model.deployment, model.state = None, ModelState.UNLOADED
        log.info("%s: saved and unloaded in %.2f s", model.label, time.monotonic() - began_s)
        self._tell(f"{model.label}: unloaded")
        return True

    async def _leave_store(self, model: Model, deployment: Deployment) -> None:
        """Close a model's store with room for the others in it, and keep it from them."""
        if not deployment.is_open:
            await deployment.close()
            return
        store = deployment.store
        try:
            await store.leave_room(len(list(self._models)))
        except SnapshotError as error:
            log.warning("%s: its store leaves the others no room: %s", model.name, error)
        await deployment.close()
        model.held = await asyncio.to_thread(
            hold, store.settings.directory, what=f"{store.settings.owner}, {model.name} is unloaded"
        )

    async def _load(self, model: Model) -> bool:
        """Load a model and let its requests go on; or tell them why not."""
        error = await self._try(model)
        if isinstance(error, EngineStartError):
            log.warning("%s couldn't be loaded, and is tried again: %s", model.label, error)
            error = await self._try(model)
        if error is None:
            return True
        self._failed(model, error)
        return False

    async def failed(self, model: Model, error: KeepwarmError) -> None:
        """A model couldn't be started by others: end what is left of it."""
        await self._drop(model)
        self._failed(model, error)

    def _failed(self, model: Model, error: KeepwarmError) -> None:
        model.failure, model.failures = error, model.failures + 1
        # Another was put away for it, so what only a person can mend isn't tried often.
        may_mend_itself = isinstance(error, EngineStartError)
        pause = pause_s(model.failures) if may_mend_itself else _LONG_PAUSE_S
        model.again_s = time.monotonic() + pause
        log.error("%s can't be loaded: %s", model.label, error)
        self._tell(f"{model.label}: can't be loaded")
        _refuse(model, _failed(model))

    async def _try(self, model: Model) -> KeepwarmError | None:
        began_s = time.monotonic()
        model.state = ModelState.LOADING
        for other in self._models:
            if other.settings.engine.model == model.settings.engine.model:
                other.let_go()  # run otherwise, the same file may have the same store
        error = await failure_of(self._start(model))
        if error is not None:
            await self._drop(model)
            return error
        assert model.deployment
        model.load_s = time.monotonic() - began_s
        log.info("%s: loaded and warm in %.2f s", model.label, model.load_s)
        self.loaded(model, model.deployment)
        return None

    async def _start(self, model: Model) -> None:
        model.deployment = self._make(model)
        await model.deployment.start()

    def loaded(self, model: Model, deployment: Deployment) -> None:
        """A model's deployment is warm."""
        model.loads, model.loaded_s = model.loads + 1, time.monotonic()
        model.learned = deployment.learned
        model.failure, model.failures = None, 0
        model.measure()
        self._admit(model, deployment)

    def _admit(self, model: Model, deployment: Deployment) -> None:
        model.deployment, model.state = deployment, ModelState.LOADED
        for future, waiting in model.waiting.items():
            if not future.done():
                future.set_result(Stay(model, deployment, is_batch=waiting.is_batch))

    async def _drop(self, model: Model) -> None:
        """End what was begun of a model."""
        deployment, model.deployment = model.deployment, None
        model.state = ModelState.UNLOADED
        if deployment is not None:
            await deployment.halt(drain=False)
            await deployment.close()


def _failed(model: Model) -> ModelFailedError:
    why = str(model.failure).partition(" Its last lines:")[0]
    return ModelFailedError(f"The model {model.name!r} can't be loaded. {why}")


def _refuse(model: Model, error: KeepwarmError) -> None:
    for future in model.waiting:
        if not future.done():
            future.set_exception(error)
