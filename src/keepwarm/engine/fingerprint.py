"""What makes saved state usable: model, engine build, layout, flags, template, adapters."""

from __future__ import annotations

from typing import Any

import xxhash

from keepwarm.core.memory import MemoryKind
from keepwarm.engine.launch import Launch
from keepwarm.engine.tuning import without_rows


def fingerprint(launch: Launch, props: dict[str, Any], *, form: str) -> str:
    """What must be equal for saved state to be used: see the fingerprint in the house's terms.

    Args:
        launch: the engine, its model and flags.
        props: the running engine's `/props`, for the template it really uses.
        form: the layout the engine writes, or the flags that shape whole snapshots.
    """
    h = xxhash.xxh3_128()
    options = launch.options
    parts = [
        launch.identity.kind,
        launch.identity.build,
        launch.model.file_id if launch.model else _described(props),
        str(props.get("chat_template", "")),
        form,
    ]
    if options:
        parts += [options.kv_type_k, options.kv_type_v, options.flash_attention]
        parts += [str(options.swa_full), *_adapters(options.extra)]
        parts += options.tuning.rows_identity
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(4, "little"))
        h.update(raw)
    return h.hexdigest()


def _described(props: dict[str, Any]) -> str:
    """A server whose model file can't be seen is known by all that it says of the model."""
    keys = ("model_path", "model_alias", "model_ftype", "bos_token", "eos_token")
    return "\n".join(f"{key}={props.get(key)}" for key in keys)


def _adapters(extra: tuple[str, ...]) -> list[str]:
    """Arguments of a binary that change what it computes; ports and the like don't matter."""
    harmless = {"-t", "--threads", "-lv", "--verbosity"}
    out: list[str] = []
    skip = False
    without = without_rows(extra)
    for index, argument in enumerate(extra):
        if index in without:
            continue
        if skip:
            skip = False
        elif argument in harmless:
            skip = True
        else:
            out.append(argument)
    return out


def memory_kind(launch: Launch) -> MemoryKind | None:
    """The model's memory type, None if its header can't be seen."""
    return launch.model.memory if launch.model else None
