"""What follows from what an engine is: its store, and what the scheduler must know of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from keepwarm.core.memory import MemoryKind
from keepwarm.core.plan import Machine
from keepwarm.deployment.probe import ProbeResult
from keepwarm.engine.counting import PromptCounter
from keepwarm.engine.launch import Launch
from keepwarm.settings import Settings
from keepwarm.store.shelf import ShelfSettings
from keepwarm.store.store import Store

log = logging.getLogger("keepwarm")


async def open_store(
    settings: Settings,
    launch: Launch,
    probed: ProbeResult,
    *,
    root: Path,
    fingerprint: str,
    slot_tokens: int,
    tenants: int,
) -> Store:
    """Open the store that fits an engine, and say what it can't keep."""
    if not probed.is_usable:
        log.warning(
            "slots of this engine can't be saved and restored (%s): every start is cold",
            probed.reason,
        )
    elif probed.layout is None:
        log.warning(
            "the engine's slot files aren't understood (%s): whole snapshots only", probed.reason
        )
    store = await Store.open(
        ShelfSettings(
            root=root,
            fingerprint=fingerprint,
            layout=probed.layout,
            quota_bytes=settings.store.quota_bytes,
            staging=launch.slot_dir,
            staging_bytes=settings.store.staging_bytes,
            streams=probed.streams,
            max_tokens=slot_tokens,
            tenants=tenants,
            file_mode=probed.file_mode,
            owner=f"keepwarm (pid {os.getpid()})",
        )
    )
    for line in store.report.lines():
        log.info("store: %s", line)
    return store


def machine_of(
    launch: Launch, probed: ProbeResult, counter: PromptCounter, *, slots: int, slot_tokens: int
) -> Machine:
    """What the scheduler must know of an engine with so many slots, each with so much room."""
    options, pool = launch.options, None
    if _shares_pool(launch, probed, slots=slots):
        # A slot's own limit is the model's trained context, which the pool may exceed.
        pool = options.context_tokens if options else slot_tokens
    return Machine(
        row_bytes=probed.row_bytes,
        cuttable=probed.cuttable,
        can_save=probed.is_usable,
        pool_tokens=pool,
        # A prefix that doesn't fill its window is reused but for its last token.
        slack_tokens=int(probed.kind is MemoryKind.SLIDING_WINDOW),
        slot_tokens=slot_tokens,
        appends=counter.appends,
        tells_time=counter.tells_time,
        window_tokens=launch.model.window_tokens if launch.model else 0,
    )


def _shares_pool(launch: Launch, probed: ProbeResult, *, slots: int) -> bool:
    options = launch.options
    if options and not options.without & {"--kv-unified", "--no-kv-unified"}:
        return options.unified and slots > 1
    # Such a server doesn't say; a file with one stream for several slots tells.
    return slots > 1 and probed.streams == 1


def form_of(probed: ProbeResult, *, slots: int) -> str:
    """Whole snapshots fit only the slot layout they were saved under; rows fit any."""
    return "rows" if probed.layout is not None else f"whole/{slots}/{probed.streams}"
