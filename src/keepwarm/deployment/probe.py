"""What the running engine really writes: proved on a small file of its own before anything is kept.

The codec must account for every byte of a slot file and write the same file again; otherwise the
store keeps whole files, restorable only at their exact ends. A format it doesn't know is never
guessed at.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineDownError, EngineError, EngineStartError
from keepwarm.slotfile import Layout, SlotFileError, parse, round_trip_ok

_TEXT = "Keepwarm looks at one small slot file before it trusts the format."


@dataclass(frozen=True, slots=True)
class Probed:
    """What was found. `layout` None: whole files only, for `reason`."""

    kind: MemoryKind
    layout: Layout | None
    streams: int
    row_bytes: int
    reason: str = ""

    @property
    def cuttable(self) -> bool:
        """Whether a slot can be reused up to any token, not only to its end."""
        return self.kind is MemoryKind.PLAIN


async def probe(
    client: EngineClient, slot_dir: Path, *, kind: MemoryKind | None, max_tokens: int
) -> Probed:
    """Save a short prefix from slot 0 and take the file apart.

    Args:
        client: an idle engine; slot 0 is emptied afterwards.
        slot_dir: where the engine saves, as seen from here.
        kind: the memory type by the model's header; None tries all.
        max_tokens: what a slot may hold.

    Raises:
        EngineStartError: the engine can't save slots, or saves them elsewhere.
    """
    tokens = await client.tokenize(_TEXT)
    name = f"probe-{secrets.token_hex(4)}.slot"
    path = slot_dir / name
    try:
        await client.fill(tokens, slot=0)
        info = await client.save(0, name)
        await client.erase(0)
    except EngineDownError as error:
        raise EngineStartError(f"The engine can't save a slot: {error}") from error
    except EngineError as error:
        # Without a directory it answers 501, in older builds 400.
        raise EngineStartError(
            f"The llama-server can't save slots ({str(error).rstrip('.')}). Start it with "
            "--slot-save-path DIR and give Keepwarm the same directory with --slot-dir."
        ) from error
    if not path.is_file():
        raise EngineStartError(
            f"The llama-server saved a slot, but {slot_dir} doesn't hold it: that isn't its "
            "--slot-save-path. Give the same directory with --slot-dir."
        )
    try:
        raw = path.read_bytes()
    finally:
        path.unlink(missing_ok=True)
    per_token = max(info.size_bytes // max(info.tokens, 1), 1)
    reason = "unknown"
    for candidate in [kind] if kind else list(MemoryKind):
        try:
            file = parse(raw, kind=candidate, max_tokens=max_tokens)
        except SlotFileError as error:
            reason = error.reason
            continue
        if round_trip_ok(raw, candidate):
            layout = file.layout
            return Probed(candidate, layout, file.streams, layout.row_bytes)
        reason = "round_trip"
    return Probed(kind or MemoryKind.HYBRID, None, 1, per_token, reason)
