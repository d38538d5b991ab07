"""Attaching to a server that runs already; and which of the two it is to be."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from keepwarm.engine.client import EngineClient
from keepwarm.engine.gguf_header import ModelHeader, read_model
from keepwarm.engine.launch import Launch, plan_own
from keepwarm.engine.process import EngineIdentity
from keepwarm.engine.tuning import refuse_tuned
from keepwarm.errors import (
    ConfigError,
    EngineDownError,
    EngineError,
    EngineStartError,
    ModelError,
)
from keepwarm.settings import EngineSettings


async def plan_launch(
    settings: EngineSettings, *, slot_dir: Path, saves: bool = True, tier_chars: int = 0
) -> Launch:
    """Decide which engine is used and how it is run.

    Args:
        settings: the engine's section.
        slot_dir: where slot files pass through; an attached server has its own.
        saves: False for a look at the model only: an attached server needs no slot directory then.
        tier_chars: as for `plan_own`.

    Raises:
        ConfigError, ModelError, EngineStartError: as `plan_own`; or no server that can be used
            answers.
    """
    if settings.upstream:
        return await _plan_attached(settings, slot_dir if not saves else None)
    return await plan_own(settings, slot_dir=slot_dir, tier_chars=tier_chars)


async def _plan_attached(settings: EngineSettings, unused_dir: Path | None) -> Launch:
    if settings.model or settings.binary:
        raise ConfigError(
            "--upstream attaches to a server that runs already, so --model and --engine say "
            "nothing. Leave them out, or leave out --upstream."
        )
    refuse_tuned(settings)
    if not settings.slot_dir and unused_dir is None:
        raise ConfigError(
            "--upstream needs --slot-dir DIR: the directory that server was given as "
            "--slot-save-path, as it is seen from here."
        )
    slot_dir = unused_dir or Path(settings.slot_dir).expanduser()
    if not slot_dir.is_dir():
        raise ConfigError(f"The slot directory {slot_dir} doesn't exist (--slot-dir).")
    if unused_dir is None and not os.access(slot_dir, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(
            f"Keepwarm (user {os.getuid()}) can't write to the slot directory {slot_dir}, which "
            f"belongs to user {slot_dir.stat().st_uid}. Run the llama-server as the same user "
            "(`--user` of a container), or give the directory to both."
        )
    client = EngineClient(settings.upstream, api_key=settings.upstream_key or None)
    try:
        props = await client.props()
    except EngineDownError as error:
        raise EngineStartError(
            f"No llama-server answers at {settings.upstream}: {error} Check the URL, and that the "
            "server has loaded its model."
        ) from error
    except EngineError as error:
        raise EngineStartError(
            f"What answers at {settings.upstream} isn't a llama-server that lets Keepwarm in "
            f"({str(error).rstrip('.')}). Check the URL, and the key if it asks for one "
            "(engine.upstream_key)."
        ) from error
    identity, model = _seen(props)
    return Launch(identity, model, None, None, settings.upstream.rstrip("/"), slot_dir, 0)


def _seen(props: dict[str, Any]) -> tuple[EngineIdentity, ModelHeader | None]:
    """What an attached server is, by what it says and by its model's file if that is here."""
    identity = EngineIdentity("attached", str(props.get("build_info") or "unknown"))
    path = Path(str(props.get("model_path") or ""))
    if not path.is_file():
        return identity, None
    try:
        return identity, read_model(path)
    except ModelError:
        return identity, None


def seen_again(launch: Launch, props: dict[str, Any]) -> Launch:
    """An attached server's launch as it would be planned now."""
    identity, model = _seen(props)
    return replace(launch, identity=identity, model=model)
