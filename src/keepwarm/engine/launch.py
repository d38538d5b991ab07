"""From settings to an engine: which one, with which flags, and how it is identified."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.engine.arguments import COSTS, REFUSED_VARIABLES, conflicts, flag_of
from keepwarm.engine.gguf_header import ModelHeader, read_model
from keepwarm.engine.options import EngineOptions
from keepwarm.engine.process import (
    EngineIdentity,
    EngineProcess,
    binary_engine,
    binary_identity,
    embedded_engine,
    embedded_identity,
    free_port,
)
from keepwarm.engine.tuning import tuning_of
from keepwarm.errors import ConfigError, UnknownFlagError
from keepwarm.settings import EngineSettings, variables_set

log = logging.getLogger("keepwarm")


@dataclass(frozen=True, slots=True)
class Launch:
    """All that is decided before an engine starts.

    `model` is None for an attached server whose model file can't be seen from here; `attached` is
    its URL.
    """

    identity: EngineIdentity
    model: ModelHeader | None
    options: EngineOptions | None
    binary: Path | None
    attached: str | None
    slot_dir: Path
    port: int

    @property
    def base_url(self) -> str:
        """Where the engine is reached."""
        return self.attached or f"http://127.0.0.1:{self.port}"

    def process(self) -> EngineProcess | None:
        """A new run of the engine; None for an attached one."""
        if self.options is None:
            return None
        if self.binary is None:
            return embedded_engine(self.options, port=self.port)
        return binary_engine(self.binary, self.options, port=self.port)

    def without(self, error: UnknownFlagError) -> Launch:
        """The same without the flag that this engine doesn't know, if it can be run so.

        Raises:
            UnknownFlagError: the user asked for it, or nothing works without.
        """
        options = self.options
        ours = options.binary_flags(host="", port=0) if options else []
        flag = flag_of(error.argument, ours[: len(ours) - len(options.extra)] if options else [])
        if options is None or flag is None:
            raise error
        log.warning("this engine doesn't know %s: %s", flag, COSTS[flag])
        return replace(self, options=replace(options, without=options.without | {flag}))

    def with_swa_full(self) -> Launch:
        """The same with sliding-window layers kept whole."""
        assert self.options
        return replace(self, options=replace(self.options, swa_full=True))


# A prompt's characters come to fewer tokens than this times them, JSON included (measured on the
# packaged tiers with SmolLM2's small vocabulary: 0.25; larger vocabularies need fewer).
_MOST_TOKENS_PER_CHAR = 0.3
# A slot's part of the context holds the largest tier and half as much again for the task.
_ROOM_FOR_TASK = 1.5


async def plan_own(settings: EngineSettings, *, slot_dir: Path, tier_chars: int = 0) -> Launch:
    """Decide how an engine of ours is run, from the settings and the model's header.

    Args:
        settings: the engine's section.
        slot_dir: where slot files pass through.
        tier_chars: characters of the largest tier, which decides whether the context is split.

    Raises:
        ConfigError: no engine is named, or two are.
        ModelError: the model's file can't be used.
        EngineStartError: the binary can't be run.
    """
    if not settings.model:
        raise ConfigError(
            "No model is given. Say which with --model FILE.gguf (add --engine PATH for a "
            "llama-server of your own), or attach to a running server with --upstream URL "
            "--slot-dir DIR."
        )
    model = read_model(Path(settings.model).expanduser())
    template = Path(settings.chat_template).expanduser() if settings.chat_template else None
    if template and not template.is_file():
        raise ConfigError(f"The chat template {template} doesn't exist (engine.chat_template).")
    options = EngineOptions(
        model=model.path,
        slots=settings.slots,
        context_tokens=settings.context,
        slot_dir=slot_dir,
        unified=_shares_pool(settings, tier_chars),
        threads=settings.threads or None,
        kv_type_k=settings.kv_type_k,
        kv_type_v=settings.kv_type_v,
        flash_attention=settings.flash_attention,
        chat_template=template,
        is_talking=log.isEnabledFor(logging.DEBUG),
        extra=settings.extra,
        tuning=tuning_of(settings, embedded=not settings.binary),
    )
    binary = Path(settings.binary).expanduser() if settings.binary else None
    if settings.extra and binary is None:
        raise ConfigError(
            "Arguments behind `--` go to an engine binary, but the embedded engine is used. Give "
            "the binary with --engine PATH/llama-server."
        )
    if binary and (found := conflicts(settings.extra, variables_set(REFUSED_VARIABLES))):
        raise ConfigError(
            f"The engine can't be given {'; '.join(found)}. Leave it out, and run Keepwarm again."
        )
    identity = await binary_identity(binary) if binary else embedded_identity()
    return Launch(identity, model, options, binary, None, slot_dir, free_port())


def _shares_pool(settings: EngineSettings, tier_chars: int) -> bool:
    """Whether all slots share one pool of context; see docs/decisions/0003-slot-setup.md."""
    if settings.pool != "auto":
        return settings.pool == "shared"
    part = settings.context // settings.slots
    return part < tier_chars * _MOST_TOKENS_PER_CHAR * _ROOM_FOR_TASK
