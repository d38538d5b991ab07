"""Try out what a server doesn't say: does an idle slot keep its tokens while another one works?

The slots' content is saved before and restored after; where that isn't possible, nothing is tried
unless the owner asks for it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineError, EngineRefusedError

_FIRST = "The doctor fills one slot with this sentence and looks at it again a little later."
_SECOND = "Meanwhile another slot is given something else to think about, as agents do all day."


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of it. `keeps_idle` None: not tried, for `reason`.

    `bytes_a_token` as saved slots showed it; `can_save` None where nothing was tried.
    """

    keeps_idle: bool | None
    reason: str = ""
    can_save: bool | None = None
    bytes_a_token: float | None = None


async def try_idle_slot(
    client: EngineClient,
    *,
    slots: int,
    memory: MemoryKind | None,
    slot_dir: Path | None,
    force: bool,
) -> Tried:
    """Fill slot 0, fill slot 1, and see what slot 0 still holds.

    Args:
        client: a llama-server of which nobody else decides the slots.
        slots: how many it has.
        memory: its model's memory type, None if not known.
        slot_dir: its slot directory as seen from here, for removing what was saved on the way.
        force: overwrite what the slots hold if it can't be put back.

    Raises:
        EngineError: the server failed on the way; the two slots may be empty.
    """
    if slots < 2:
        return Tried(None, "there is one slot only")
    if any(slot.get("is_processing") for slot in await _slots(client)):
        return Tried(None, "the server is busy")
    if slot_dir is None and not force:
        return Tried(None, "its slot directory isn't seen from here (--slot-dir)")
    # The third is for measuring: the first two are put back.
    names = [f"keepwarm-doctor-{secrets.token_hex(6)}-{number}" for number in range(3)]
    kept = [0, 0]
    can_save = True
    try:
        try:
            infos = [await client.save(slot, name) for slot, name in enumerate(names[:2])]
        except EngineRefusedError:
            can_save = False
            if not force:
                return Tried(None, "what its slots hold can't be saved first", can_save=False)
        else:
            kept = [info.tokens for info in infos]
        if any(kept) and memory is not MemoryKind.PLAIN and not force:
            reason = "its slots are in use, and this model's state can't be put back exactly"
            return Tried(None, reason, can_save=can_save)
        return await _try(client, names, kept, can_save=can_save)
    finally:
        for name in names:
            if slot_dir is not None:
                (slot_dir / name).unlink(missing_ok=True)


async def _try(client: EngineClient, names: list[str], kept: list[int], *, can_save: bool) -> Tried:
    first, second = await client.tokenize(_FIRST), await client.tokenize(_SECOND)
    size = None
    try:
        await client.fill(first, slot=0)
        await client.fill(second, slot=1)
        counts = await client.fill([*first, first[-1]], slot=0)
        if can_save:
            info = await client.save(0, names[2])
            size = info.size_bytes / max(info.tokens, 1)
    finally:
        if can_save:
            for slot, name in enumerate(names[:2]):
                if kept[slot]:
                    await client.restore(slot, name)
                else:
                    await client.erase(slot)
    return Tried(counts.cached == len(first), can_save=can_save, bytes_a_token=size)


async def _slots(client: EngineClient) -> list[dict[str, object]]:
    try:
        return await client.slots()
    except EngineError:
        return []  # --no-slots
