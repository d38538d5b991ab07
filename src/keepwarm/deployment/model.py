"""The models of a gateway: their names, what is known of each, and who waits for it or uses it.

| state    | its deployment | a request for it                   | next               |
|----------|----------------|------------------------------------|--------------------|
| unloaded | none           | waits, and has it loaded           | loading            |
| loading  | is starting    | waits                              | loaded, unloaded   |
| loaded   | is there       | is served (or waits for its engine | leaving            |
|          |                | as the deployment's state says)    |                    |
| leaving  | is there       | waits; those it has are let end    | unloaded, loaded   |
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

from keepwarm.core.swaps import ModelNow
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.learned import Learned
from keepwarm.errors import ConfigError, KeepwarmError, NotFoundError
from keepwarm.settings import Settings
from keepwarm.store.lock import OwnerLock
from keepwarm.tiers.tiering import AUTO

# What loading takes where it was never measured: a file is read at this rate, and the engine needs
# a moment (SSDs of small machines read 0.5 to 2 GB a second).
_READ_BYTES_PER_S = 1e9
_START_S = 1.0


class ModelState(StrEnum):
    """See the module."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    LEAVING = "leaving"


@dataclass(slots=True)
class Waiting:
    """A request that waits for a model."""

    since_s: float
    is_batch: bool


@dataclass(slots=True, eq=False)
class Model:
    """One model, loaded or not. Seconds are `time.monotonic()`'s.

    `users` and `batch_users`: requests that its deployment has. `load_s` and `size_bytes` None:
    never measured.
    """

    name: str
    settings: Settings
    deployment: Deployment | None = None
    state: ModelState = ModelState.UNLOADED
    is_pinned: bool = False
    waiting: dict[asyncio.Future[Stay], Waiting] = field(default_factory=dict)
    users: int = 0
    batch_users: int = 0
    ended_s: float = -math.inf
    loads: int = 0
    loaded_s: float = -math.inf
    load_s: float | None = None
    size_bytes: int | None = None
    failure: KeepwarmError | None = None
    failures: int = 0
    again_s: float = -math.inf
    learned: Learned | None = None
    held: OwnerLock | None = None
    """On its store while it is unloaded: what it has saved stays, whatever others save."""

    def let_go(self) -> None:
        """Let its store be opened."""
        if self.held is not None:
            self.held.release()
            self.held = None

    @property
    def label(self) -> str:
        """Its name for logs; the only one needs none."""
        return self.name or "the model"

    @property
    def is_open(self) -> bool:
        """Whether a request may go to its deployment now."""
        return self.state is ModelState.LOADED

    @property
    def file_bytes(self) -> int:
        """The size of its file; 0 where that isn't here."""
        try:
            return Path(self.settings.engine.model).expanduser().stat().st_size
        except OSError:
            return 0

    def measure(self) -> None:
        """Note what its engine takes, if there is one."""
        process = self.deployment.process if self.deployment else None
        resident_bytes = process.resident_bytes() if process else None
        if resident_bytes is not None:
            self.size_bytes = resident_bytes

    def now(self, now_s: float) -> ModelNow:
        """What decides whether it is to be loaded, or goes."""
        interactive = [w for w in self.waiting.values() if not w.is_batch]
        file_bytes = self.file_bytes if self.load_s is None or self.size_bytes is None else 0
        load_s = self.load_s
        return ModelNow(
            self.name,
            self.state is not ModelState.UNLOADED,
            _START_S + file_bytes / _READ_BYTES_PER_S if load_s is None else load_s,
            file_bytes if self.size_bytes is None else self.size_bytes,
            waited_s=tuple(now_s - w.since_s for w in interactive),
            batch_waiting=len(self.waiting) - len(interactive),
            pending=self.users,
            batch_pending=self.batch_users,
            idle_s=now_s - self.ended_s,
            loaded_for_s=now_s - self.loaded_s,
            is_pinned=self.is_pinned,
            may_load=now_s >= self.again_s,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "state": self.state.value,
            "pinned": self.is_pinned,
            "bytes": self.size_bytes,
            "file_bytes": self.file_bytes,
            "load_s": None if self.load_s is None else round(self.load_s, 3),
            "loads": self.loads,
            "serving": self.users + self.batch_users,
            "waiting": len(self.waiting),
            "idle_s": None if math.isinf(self.ended_s) else time.monotonic() - self.ended_s,
            "failure": str(self.failure).partition(" Its last lines:")[0] if self.failure else None,
        }


class Stay:
    """A request at a deployment, which stays loaded as long: `with stay as deployment`.

    `is_glance`: whoever only looks at it doesn't use it.
    """

    __slots__ = ("_is_batch", "_is_glance", "deployment", "model")

    def __init__(
        self, model: Model, deployment: Deployment, *, is_batch: bool, is_glance: bool = False
    ) -> None:
        """Come."""
        self.model, self.deployment = model, deployment
        self._is_batch, self._is_glance = is_batch or is_glance, is_glance
        is_batch = self._is_batch
        if is_batch:
            model.batch_users += 1
        else:
            model.users += 1

    def leave(self) -> None:
        """Go. Call it once."""
        model = self.model
        if self._is_batch:
            model.batch_users -= 1
        else:
            model.users -= 1
        if not self._is_glance:
            model.ended_s = time.monotonic()

    def __enter__(self) -> Deployment:
        """What serves the request."""
        return self.deployment

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Go."""
        self.leave()


class Models:
    """All models by name; the first is the one that is meant where none is named."""

    def __init__(self, settings: Settings) -> None:
        """By the settings: the tables, or the one engine.

        Raises:
            ConfigError: two can't be told apart.
        """
        self.several = bool(settings.models)
        self.by_name: Mapping[str, Model] = (
            {
                name: Model(name, settings.of_model(name), is_pinned=one.pin)
                for name, one in settings.models.items()
            }
            if settings.models
            else {"": Model("", settings)}
        )
        self.default = next(iter(self.by_name.values()))

    def __iter__(self) -> Iterator[Model]:
        """As the settings name them."""
        return iter(self.by_name.values())

    @property
    def is_swapping(self) -> bool:
        """Whether one is being loaded, or about to go."""
        return any(one.state in (ModelState.LOADING, ModelState.LEAVING) for one in self)

    def check_tiers(self, names: tuple[str, ...]) -> None:
        """Refuse a model that is named like a tier.

        Raises:
            ConfigError: nobody could ask for it.
        """
        if alike := [name for name in self.by_name if name in names]:
            raise ConfigError(f"A tier has the name of the model [models.{alike[0]}]: rename it.")

    def addressed(self, name: object) -> tuple[Model, str | None]:
        """The model that a request's `model` names, and what its deployment is to be told instead.

        `NAME:TIER` is a tier on a model; what names none goes to the default.
        """
        if not self.several or not isinstance(name, str):
            return self.default, None
        if model := self.by_name.get(name):
            return model, None
        before, _, tier = name.rpartition(":")
        if before and (model := self.by_name.get(before)):
            return model, tier
        return self.default, None

    def named(self, name: str) -> Model:
        """The model of this very name. Raises: NotFoundError."""
        if not self.several or name not in self.by_name:
            known = ", ".join(self.by_name) if self.several else "one only, without a name"
            raise NotFoundError(f"There is no model {name[:80]!r} here. There are: {known}.")
        return self.by_name[name]

    def check(self, name: object, tiers: tuple[str, ...], engines: tuple[str, ...]) -> None:
        """Refuse a name that stands for nothing here.

        Args:
            name: what a request says.
            tiers: the tiers' names.
            engines: names that the default model's engine has for it.

        Raises:
            NotFoundError: there is no such model.
        """
        if not name:
            return
        known = [*tiers, AUTO, *engines]
        if self.several:
            known += [full for m in self.by_name for full in (m, *(f"{m}:{t}" for t in known))]
        if name not in known:
            raise NotFoundError(
                f"There is no model {str(name)[:80]!r} here. There are: {', '.join(known)}."
            )
