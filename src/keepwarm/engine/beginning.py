"""What a start does first, with little imported: tiers are read and the engine begins to load.

Importing the gateway takes as long as the engine takes to load a small model, so the one is done
while the other goes on. This module and what it imports therefore know neither the gateway nor an
HTTP client.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.core.tiers import TierSet
from keepwarm.engine.launch import Launch, plan_own
from keepwarm.engine.process import EngineProcess
from keepwarm.errors import EngineStartError
from keepwarm.settings import Places, Settings
from keepwarm.staging import default_staging, make_staging
from keepwarm.tiers.files import deployed_tiers

log = logging.getLogger("keepwarm")


@dataclass(frozen=True, slots=True)
class Beginning:
    """What every start needs first. `staging`: where slot files of an engine of ours pass through.

    `launch` and `process` None: the engine is an attached one, or wasn't begun yet.
    """

    tiers_dir: Path
    tiers: TierSet
    store_dir: Path
    staging: Path
    launch: Launch | None = None
    process: EngineProcess | None = None

    def of_model(self, name: str) -> Beginning:
        """For one of several models: nothing was begun, and its slot files have a place of their
        own. '' is the only one there is.
        """
        return replace(self, staging=self.staging / name, launch=None, process=None)

    @property
    def tier_chars(self) -> int:
        """Characters of the largest tier."""
        return max(tier.static_chars for tier in self.tiers)

    async def stop(self) -> None:
        """End an engine that was begun."""
        if self.process:
            await self.process.stop()


def prepare(settings: Settings, places: Places) -> Beginning:
    """Read the tiers and choose the directories; nothing is started.

    Raises:
        TierError: a tier can't be used.
    """
    tiers_dir, tiers = deployed_tiers(settings.tiers, places)
    store_dir = Path(settings.store.dir).expanduser() if settings.store.dir else places.store
    if settings.store.staging_dir:
        staging = Path(settings.store.staging_dir).expanduser()
    else:
        staging = default_staging(store_dir, need_bytes=settings.store.staging_bytes)
    return Beginning(tiers_dir, tiers, store_dir, staging)


async def begin(settings: Settings, places: Places) -> Beginning:
    """`prepare`, and let an engine of ours begin to load. Who calls it stops it, whatever comes.

    Of several models it is the first one's.

    Raises:
        TierError, ConfigError, ModelError, EngineStartError: nothing runs.
    """
    ready = prepare(settings, places)
    first = next(iter(settings.models), "")
    engine = settings.models[first].engine if first else settings.engine
    if engine.upstream:
        return ready
    staging = ready.of_model(first).staging
    launch = await plan_own(engine, slot_dir=staging, tier_chars=ready.tier_chars)
    return replace(ready, launch=launch, process=await start_process(launch))


async def start_process(launch: Launch) -> EngineProcess | None:
    """Start an engine of ours, which loads its model from then on; None for an attached one.

    Raises:
        EngineStartError: it can't be executed, or there is no place for its slot files.
    """
    process = launch.process()
    if process is None:
        return None
    try:
        make_staging(launch.slot_dir)
    except OSError as error:
        raise EngineStartError(
            f"The directory {launch.slot_dir} for slot files can't be made ({error.strerror}). "
            "Choose another with store.staging_dir."
        ) from error
    await process.start(lambda line: log.debug("engine: %s", line))
    return process
