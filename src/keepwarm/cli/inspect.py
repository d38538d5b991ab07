"""Explain a slot file: whatever llama-server or Keepwarm wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from keepwarm.core.memory import MemoryKind
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.slotfile import SlotFile, SlotFileError, file_tokens, parse
from keepwarm.store.container import MAGIC, read_container
from keepwarm.store.disk import map_file

# Any file that a llama-server of today can write holds fewer tokens.
_MOST_TOKENS = 1 << 24


def describe(path: Path) -> dict[str, Any]:
    """What a file holds, as far as it is understood.

    Raises:
        ConfigError: it can't be read, or is neither a slot file nor an exported prefix.
    """
    try:
        raw = map_file(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    report: dict[str, Any] = {"file": str(path), "bytes": len(raw)}
    buffer: Any = raw
    if bytes(raw[:8]) == MAGIC:
        try:
            container = read_container(path)
        except SnapshotError as error:
            raise ConfigError(f"{path} is a damaged export: {error}.") from error
        report |= {"export_of": container.header.pin, "fingerprint": container.header.fingerprint}
        buffer = container.slot_file
    return report | _slot_file(buffer, path)


def _slot_file(buffer: Any, path: Path) -> dict[str, Any]:
    refused: dict[str, str] = {}
    for kind in MemoryKind:
        try:
            return _understood(parse(buffer, kind=kind, max_tokens=_MOST_TOKENS))
        except SlotFileError as error:
            refused[kind.value] = error.reason
    try:
        tokens = file_tokens(buffer)
    except SlotFileError as error:
        raise ConfigError(
            f"{path} is not a slot file that Keepwarm knows ({error.reason}): {error}."
        ) from error
    return {"tokens": len(tokens), "memory": f"not understood {refused}: a whole snapshot only"}


def _understood(file: SlotFile) -> dict[str, Any]:
    layout = file.layout
    rows = layout.rows_bytes(len(file.tokens))
    state = file.boundary()
    cut = "any token" if layout.kind is MemoryKind.PLAIN else "its saved ends only"
    return {
        "version": layout.version,
        "memory": layout.kind.value,
        "tokens": len(file.tokens),
        "tokens_from_the_first_picture_on": file.held_tokens - len(file.tokens),
        "first_tokens": [int(t) for t in file.tokens[:8]],
        "layers": len(layout.rows.keys),
        "value_rows": "transposed" if layout.rows.v_trans else "token after token",
        "bytes_a_token": layout.row_bytes,
        "rows_bytes": rows,
        "boundary_bytes": len(state) if state is not None else 0,
        "checkpoints_at": [c.end_tokens for c in file.checkpoints],
        "streams": file.streams,
        "slot": file.slot,
        "restorable_at": cut,
    }
