"""What the running engine really writes: proved on a small file of its own before anything is kept.

The codec must account for every byte of a slot file and write the same file again; otherwise the
store keeps whole files, restorable only at their exact ends. A format it doesn't know is never
guessed at.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.client import EngineClient
from keepwarm.errors import EngineDownError, EngineError, EngineStartError
from keepwarm.slotfile import Layout, SlotFileError, file_tokens, parse, round_trip_ok

_TEXT = "Keepwarm looks at one small slot file before it trusts the format."
_PRIVATE = 0o600
# What engines before llama.cpp PR #25076 (July 2026) say of every slot where there is a projector.
_BESIDE_PROJECTOR = "not supported by multimodal"


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What was found. `layout` None: whole files only, for `reason`.

    `is_usable` False: nothing can be saved and restored on this engine, for `reason`. `file_mode`
    is what its own files have, which files for it must have too.
    """

    kind: MemoryKind
    layout: Layout | None
    streams: int
    row_bytes: int
    reason: str = ""
    is_usable: bool = True
    file_mode: int = _PRIVATE

    @property
    def cuttable(self) -> bool:
        """Whether a slot can be reused up to any token, not only to its end."""
        return self.kind is MemoryKind.PLAIN


async def probe(
    client: EngineClient,
    slot_dir: Path,
    *,
    kind: MemoryKind | None,
    max_tokens: int,
    is_ours: bool = False,
) -> ProbeResult:
    """Save a short prefix from slot 0, take the file apart, and have a copy of it restored.

    Args:
        client: an idle engine; slot 0 is emptied afterwards.
        slot_dir: where the engine saves, as seen from here.
        kind: the memory type by the model's header; None tries all.
        max_tokens: what a slot may hold.
        is_ours: whether Keepwarm started it: what it can't do isn't a mistake in how it was set up.

    Raises:
        EngineStartError: a server that was set up by others can't save slots, but for its projector
            (`mmproj`), saves them elsewhere, or so that they can't be read; or the engine is gone.
    """
    await client.notice_drafts()
    tokens = await client.tokenize(_TEXT)
    cold = ProbeResult(kind or MemoryKind.HYBRID, None, 1, 1, is_usable=False)
    name = f"probe-{secrets.token_hex(4)}.slot"
    path = slot_dir / name
    try:
        await client.fill(tokens, slot=0)
        info = await client.save(0, name)
        await client.erase(0)
    except EngineDownError as error:
        raise EngineStartError(f"The engine can't save a slot: {error}") from error
    except EngineError as error:
        if _BESIDE_PROJECTOR in str(error):
            return replace(cold, reason="beside a projector a newer llama.cpp saves slots")
        if is_ours:
            return replace(cold, reason="it saves no slots")
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
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        with suppress(OSError):  # said below, where ours can't be written either
            path.unlink(missing_ok=True)
    per_token = max(info.size_bytes // max(info.tokens, 1), 1)
    found = _understood(raw, kind, per_token=per_token, max_tokens=max_tokens)
    found = replace(found, file_mode=_PRIVATE if is_ours else mode)
    if found.layout is None and not _is_header_known(raw, tokens):
        return replace(found, is_usable=False)
    if not await _takes_ours(client, slot_dir, raw, mode=found.file_mode, tokens=len(tokens)):
        return replace(found, is_usable=False, reason="it doesn't restore what it saved")
    return found


def _understood(
    raw: bytes, kind: MemoryKind | None, *, per_token: int, max_tokens: int
) -> ProbeResult:
    """What a file's bytes say of the engine."""
    reason = "unknown"
    for candidate in [kind] if kind else list(MemoryKind):
        try:
            file = parse(raw, kind=candidate, max_tokens=max_tokens)
        except SlotFileError as error:
            reason = error.reason
            continue
        if round_trip_ok(raw, candidate):
            layout = file.layout
            return ProbeResult(candidate, layout, file.streams, layout.row_bytes)
        reason = "round_trip"
    return ProbeResult(kind or MemoryKind.HYBRID, None, 1, per_token, reason)


def _is_header_known(raw: bytes, tokens: list[int]) -> bool:
    """Whether a file that isn't understood at least says which tokens it holds."""
    try:
        return [int(token) for token in file_tokens(raw)] == tokens
    except SlotFileError:
        return False


async def _takes_ours(
    client: EngineClient, slot_dir: Path, raw: bytes, *, mode: int, tokens: int
) -> bool:
    """Whether the engine restores a file that Keepwarm wrote.

    Raises:
        EngineStartError: none can be written where it looks for them, or the engine is gone.
    """
    path = slot_dir / f"probe-{secrets.token_hex(4)}.slot"
    try:
        path.write_bytes(raw)
        path.chmod(mode)
        restored = await client.restore(0, path.name)
        await client.erase(0)
    except OSError as error:
        raise _unreadable(path, error) from error
    except EngineDownError as error:
        raise EngineStartError(f"The engine went away over a restore: {error}") from error
    except EngineError:
        return False
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return restored.tokens == tokens


def _unreadable(path: Path, error: OSError) -> EngineStartError:
    return EngineStartError(
        f"Slot files in {path.parent} can't be shared with the llama-server ({error.strerror}). It "
        f"and Keepwarm (user {os.getuid()}) must both read and write there: run both as the same "
        "user (`--user` of a container), or let a group own the directory and give the server a "
        "umask of 007."
    )
