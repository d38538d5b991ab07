"""Options that several commands share, each tied to its setting's key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.errors import ConfigError
from keepwarm.settings import Places, Settings, load_settings, model_name_of

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file. [default: ./keepwarm.toml, then the user's]"),
]
Model = Annotated[str | None, typer.Option("--model", metavar="FILE", help="GGUF model to serve.")]
Engine = Annotated[
    str | None,
    typer.Option("--engine", metavar="PATH", help="llama-server binary. [default: embedded]"),
]
Upstream = Annotated[
    str | None,
    typer.Option("--upstream", metavar="URL", help="Attach to a llama-server that runs already."),
]
SlotDir = Annotated[
    str | None,
    typer.Option(
        "--slot-dir", metavar="DIR", help="That server's --slot-save-path, seen from here."
    ),
]
SlotCount = Annotated[
    int | None, typer.Option("--slots", metavar="N", help="Sequences kept at a time. [default: 4]")
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="TOKENS", help="Context that all slots share. [default: 32768]"
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads. [default: all cores]")
]
Tiers = Annotated[
    str | None,
    typer.Option(
        "--tiers",
        metavar="DIR",
        help="Prompt tiers. [default: ./configs/prompt-tiers, the user's, the packaged ones]",
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="Jinja chat template. [default: the model's own]"
    ),
]
StoreDir = Annotated[
    str | None,
    typer.Option("--store", metavar="DIR", help="Snapshot store. [default: under XDG_STATE_HOME]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def settings_from(config: Path | None, flags: dict[str, Any]) -> tuple[Settings, Places]:
    """Settings with a command's flags on top; flags that weren't given are None."""
    return load_settings(file=config, flags=flags)


def engine_flags(
    *,
    model: str | None,
    engine: str | None,
    upstream: str | None,
    slot_dir: str | None,
    slots: int | None,
    context: int | None,
    threads: int | None,
    tiers: str | None,
    chat_template: str | None,
    store: str | None,
) -> dict[str, Any]:
    """The flags above by their settings' keys."""
    return {
        "engine.model": model,
        "engine.binary": engine,
        "engine.upstream": upstream,
        "engine.slot_dir": slot_dir,
        "engine.slots": slots,
        "engine.context": context,
        "engine.threads": threads,
        "tiers.dir": tiers,
        "engine.chat_template": chat_template,
        "store.dir": store,
    }


def model_flags(files: list[str]) -> dict[str, Any]:
    """Several models by their files, each named by its file's name.

    Raises:
        ConfigError: two have the same name.
    """
    flags = {f"models.{model_name_of(file)}": {"model": file} for file in files}
    if len(flags) < len(files):
        raise ConfigError(
            "Two of the models have the same file name. Give them names of their own in "
            "keepwarm.toml, in tables [models.NAME]."
        )
    return flags
