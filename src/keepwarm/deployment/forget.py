"""Forgetting an API key: its slots are emptied first, so that nothing of them is saved later."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from keepwarm.deployment.deployment import Deployment
from keepwarm.store.types import Forgotten, tenant_of

log = logging.getLogger("keepwarm")

# Emptying a slot takes milliseconds, taking in a save well under a second.
_PATIENCE_S = 5.0
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class ForgottenKey:
    """What was removed of a key. `busy_slots` compute for it still, and may be saved later.

    `requests` is how many the history lost; None if it couldn't be written.
    """

    store: Forgotten
    requests: int | None
    busy_slots: int


async def forget_key(deployment: Deployment, namespace: str) -> ForgottenKey:
    """Remove all that is one API key's own of slots, store and history.

    Raises: SnapshotError if not all of it is gone; again is safe.
    """
    deployment.ahead.forget(namespace)
    until_s = time.monotonic() + _PATIENCE_S
    # What its slots wait for may be a save or a reply, which have no event in common.
    while (  # noqa: ASYNC110
        busy := deployment.dispatcher.forget_tenant(namespace)
    ) and time.monotonic() < until_s:
        await asyncio.sleep(_LOOK_S)
    told = await deployment.store.forget(namespace)
    deployment.prefixes.warmed = [
        warmed for warmed in deployment.prefixes.warmed if tenant_of(warmed.name) != namespace
    ]
    requests = await deployment.explainer.forget(namespace)
    log.info(
        "forgot a key on request: %d extents, %d bytes, %d pins, %s requests",
        *(told.extents, told.size_bytes, len(told.pins), requests),
    )
    return ForgottenKey(told, requests, busy)


def forgotten_in_all(parts: Sequence[ForgottenKey]) -> ForgottenKey:
    """What was removed of a key at several models. They share one history of requests."""
    told = [part.requests for part in parts]
    return ForgottenKey(
        Forgotten(
            extents=sum(part.store.extents for part in parts),
            size_bytes=sum(part.store.size_bytes for part in parts),
            pins=tuple(pin for part in parts for pin in part.store.pins),
        ),
        None if None in told else sum(requests or 0 for requests in told),
        sum(part.busy_slots for part in parts),
    )
