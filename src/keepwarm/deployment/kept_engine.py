"""What those who keep an engine's prefixes warm ask of the deployment they belong to.

A `Deployment` is one; nothing of how its engine is started, watched and ended is theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

from keepwarm.core.plan import Machine
from keepwarm.core.tiers import TierSet
from keepwarm.deployment.dispatcher import Dispatcher
from keepwarm.deployment.probe import ProbeResult
from keepwarm.deployment.slot_store import SlotStore
from keepwarm.deployment.warm import KeptPrefix
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.launch import Launch
from keepwarm.explain.explainer import Explainer
from keepwarm.explain.metrics import Metrics
from keepwarm.settings import Settings
from keepwarm.store.store import Store


class KeptPrefixes(Protocol):
    """What is kept warm whatever clients do."""

    kept: list[KeptPrefix]
    """The tiers as the running model renders them."""


class LearnedPrefixes(Protocol):
    """What clients brought more than once."""

    async def learned_prefixes(self) -> list[KeptPrefix]:
        """What was learned in earlier lives, most recently used first."""


class KeptEngine(Protocol):
    """See the module. All but the settings and the tiers is known once the engine has started."""

    settings: Settings
    tiers: TierSet
    metrics: Metrics
    explainer: Explainer
    started_s: float
    counter: PromptCounter
    fingerprint: str
    probed: ProbeResult
    machine: Machine
    slot_tokens: int
    store: Store
    slot_store: SlotStore
    dispatcher: Dispatcher
    is_open: bool

    @property
    def prefixes(self) -> KeptPrefixes:
        """What it keeps warm."""

    @property
    def prover(self) -> LearnedPrefixes:
        """What it has learned."""

    @property
    def launch(self) -> Launch:
        """How its engine is run."""

    @property
    def client(self) -> EngineClient:
        """How its engine is reached."""

    def supervise(
        self, work: Coroutine[Any, Any, None], *, name: str | None = None
    ) -> asyncio.Task[None]:
        """Run a task in the background; a failure of it is logged, never lost."""

    def suspect_engine(self) -> None:
        """A request got no answer: look at the engine now rather than at the next interval."""

    async def look_at_engine(self) -> None:
        """As `suspect_engine`; returns when it answered, or was found dead."""

    def tell(self, status: str) -> None:
        """Say what is being done, in a line."""

    def tell_warmth(self) -> None:
        """Say how many prefixes are warm, and how many aren't yet; once it is ready."""
