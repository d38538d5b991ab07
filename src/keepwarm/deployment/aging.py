"""Evicting what nobody used for `store.max_age_days`, in quiet moments."""

from __future__ import annotations

import asyncio
import logging

from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.errors import SnapshotError

log = logging.getLogger("keepwarm")

_DAY_S = 24 * 3600.0
# Days are meant: some minutes later is soon enough, and never at start.
_LOOK_S = 600.0


async def evict_unused(deployment: KeptEngine, *, look_s: float = _LOOK_S) -> None:
    """Look every `look_s`, and evict if no request runs or waits. Ends only by cancellation."""
    max_age_s = deployment.settings.store.max_age_days * _DAY_S
    while True:
        await asyncio.sleep(look_s)
        scheduler = deployment.dispatcher.scheduler
        if scheduler.busy or scheduler.queued:
            continue
        try:
            removed = await deployment.store.evict_unused(max_age_s)
        except SnapshotError as error:
            log.warning("what is too old isn't evicted: %s", error)
            continue
        if removed.extents or removed.pins:
            log.info(
                "evicted %d extents (%d bytes) and %d learned prefixes that nobody used for %d "
                "days",
                *(len(removed.extents), removed.size_bytes, len(removed.pins)),
                deployment.settings.store.max_age_days,
            )
