"""From settings to an engine: which one, with which flags, and how it is identified."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from keepwarm.core.slotfile import MemoryKind
from keepwarm.engine.client import EngineClient
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
from keepwarm.errors import (
    ConfigError,
    EngineDownError,
    EngineError,
    EngineStartError,
    ModelError,
)
from keepwarm.settings import EngineSettings


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

    def with_swa_full(self) -> Launch:
        """The same with sliding-window layers kept whole."""
        assert self.options
        return replace(self, options=replace(self.options, swa_full=True))


# A prompt's characters come to fewer tokens than this times them, JSON included (measured on the
# packaged tiers with SmolLM2's small vocabulary: 0.25; larger vocabularies need fewer).
_MOST_TOKENS_PER_CHAR = 0.3
# A slot's part of the context holds the largest tier and half as much again for the task.
_ROOM_FOR_TASK = 1.5


async def plan_launch(
    settings: EngineSettings, *, slot_dir: Path, saves: bool = True, tier_chars: int = 0
) -> Launch:
    """Decide how the engine is run, from the settings and the model's header.

    Args:
        settings: the engine's section.
        slot_dir: where slot files pass through; an attached server has its own.
        saves: False for a look at the model only: an attached server needs no slot directory then.
        tier_chars: characters of the largest tier, which decides whether the context is split.

    Raises:
        ConfigError: no engine is named, or two are.
        ModelError: the model's file can't be used.
        EngineStartError: the binary can't be run.
    """
    if settings.upstream:
        return await _plan_attached(settings, slot_dir if not saves else None)
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
        extra=settings.extra,
    )
    binary = Path(settings.binary).expanduser() if settings.binary else None
    if settings.extra and binary is None:
        raise ConfigError(
            "Arguments behind `--` go to an engine binary, but the embedded engine is used. Give "
            "the binary with --engine PATH/llama-server."
        )
    identity = await binary_identity(binary) if binary else embedded_identity()
    return Launch(identity, model, options, binary, None, slot_dir, free_port())


def _shares_pool(settings: EngineSettings, tier_chars: int) -> bool:
    """Whether all slots share one pool of context; see docs/decisions/0003-slot-setup.md."""
    if settings.pool != "auto":
        return settings.pool == "shared"
    part = settings.context // settings.slots
    return part < tier_chars * _MOST_TOKENS_PER_CHAR * _ROOM_FOR_TASK


async def _plan_attached(settings: EngineSettings, unused_dir: Path | None) -> Launch:
    if settings.model or settings.binary:
        raise ConfigError(
            "--upstream attaches to a server that runs already, so --model and --engine say "
            "nothing. Leave them out, or leave out --upstream."
        )
    if not settings.slot_dir and unused_dir is None:
        raise ConfigError(
            "--upstream needs --slot-dir DIR: the directory that server was given as "
            "--slot-save-path, as it is seen from here."
        )
    slot_dir = unused_dir or Path(settings.slot_dir).expanduser()
    if not slot_dir.is_dir():
        raise ConfigError(f"The slot directory {slot_dir} doesn't exist (--slot-dir).")
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
    finally:
        await client.close()
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
    harmless = {"-ngl", "--gpu-layers", "--n-gpu-layers", "-t", "--threads", "-lv", "--verbosity"}
    out: list[str] = []
    skip = False
    for argument in extra:
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
