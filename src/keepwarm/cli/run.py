"""`keepwarm run`: a coding agent on the local model, in one command."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.cli import options as opt
from keepwarm.cli.interrupt import run_until_interrupted
from keepwarm.cli.output import err
from keepwarm.engine.gguf_header import read_model
from keepwarm.errors import ConfigError
from keepwarm.operate.address import own_key, own_url
from keepwarm.operate.clients import CLIENTS, Endpoint
from keepwarm.operate.machine import find_models, look
from keepwarm.operate.propose import propose
from keepwarm.operate.run import ClientRun, printed
from keepwarm.operate.started import write_private
from keepwarm.settings import Places, Settings, gateway_key, load_settings, user_environment
from keepwarm.tiers.files import deployed_tiers, tools_template


def run(
    client: Annotated[str, typer.Argument(metavar="CLIENT", help=f"One of: {', '.join(CLIENTS)}.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ARGUMENTS", help="Passed to the client unchanged."),
    ] = None,
    model: opt.Model = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="A Keepwarm that runs. [default: the settings']"),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", metavar="KEY", help="Its API key. [default: KEEPWARM_API_KEY]"),
    ] = None,
    config: opt.ConfigFile = None,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print what would be set, and start nothing.")
    ] = False,
) -> None:
    """Run a coding agent on the local model, warm from its second start on.

    Uses the Keepwarm that runs, or starts one for as long as the client does; then --model names
    the model, which is remembered. Nothing of the client's own configuration is written.

    Examples:

      keepwarm run claude --model ~/models/qwen3-coder.gguf

      keepwarm run codex -- exec "What does this repository do?"

      keepwarm run --print opencode
    """
    known = CLIENTS.get(client)
    if known is None:
        raise ConfigError(f"There is no client {client!r}; there are {', '.join(CLIENTS)}.")
    settings, places = load_settings(file=config, flags={"engine.model": model})
    address = (url or own_url(settings.server)).rstrip("/")
    key = key or gateway_key() or (None if url else own_key(settings.server))
    home = _private_home(places)
    rest = tuple(arguments or ())
    if print_only:
        folder = home / known.name
        configured = known.configure(Endpoint(address, key or "none"), folder)
        typer.echo(printed(known, configured, folder, rest))
        return
    loaded = None if url else (settings, places)
    session = ClientRun(
        client=known,
        arguments=rest,
        url=address,
        key=key,
        make_settings=lambda: _settings_to_start(config, model, loaded, home),
        home=home,
        tell=_tell,
    )
    raise typer.Exit(run_until_interrupted(session.run()))


def _tell(text: str) -> None:
    err.print(f"keepwarm: {text}", markup=False, soft_wrap=True, style="bright_black")


def _settings_to_start(
    config: Path | None, model: str | None, loaded: tuple[Settings, Places] | None, home: Path
) -> Settings | None:
    """Settings of a gateway that is started: the owner's, and for the rest what fits the machine.

    Raises:
        ConfigError: no model is known and nobody can be asked.
    """
    if loaded is None:
        return None
    settings, places = loaded
    defaults = _for_clients(settings, places)
    if settings.engine.upstream:
        return load_settings(file=config, defaults=defaults)[0]
    remembered = home / "model"
    chosen = Path(settings.engine.model or _remembered(remembered) or _ask()).expanduser()
    chosen = chosen.absolute()
    header = read_model(chosen)
    proposed = propose(look(*user_environment()), header, tools_template=tools_template())
    fitting = {one.key: one.value for one in proposed}
    if not home.is_relative_to(places.state_home):
        # Where the state can't be written, the store is as temporary as the rest.
        fitting |= {"store.dir": str(home / "store"), "batch.dir": str(home / "batches")}
    flags = {"engine.model": str(chosen)}
    ready, _ = load_settings(file=config, flags=flags, defaults={**fitting, **defaults})
    if model or not settings.engine.model:
        write_private(remembered, f"{chosen}\n")
    return ready


def _for_clients(settings: Settings, places: Places) -> dict[str, Any]:
    """What a gateway for clients has where its owner says nothing else.

    The blocks that change are moved, and of the tiers, which these clients don't ask for, only the
    smallest is warmed, while nobody waits.
    """
    _, tiers = deployed_tiers(settings.tiers, places)
    smallest = min(tiers, key=lambda tier: tier.static_chars)
    return {
        "hygiene.rules": ["drop-billing", "move-known"],
        "tiers.warm": [smallest.name],
        "tiers.wait": False,
    }


def _remembered(file: Path) -> str:
    """The model of an earlier run; empty where there is none any more."""
    try:
        path = file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    return path if Path(path).is_file() else ""


def _ask() -> str:
    """Let the person at the terminal choose a model.

    Raises:
        ConfigError: there is nobody to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "No Keepwarm runs, and no model is given to start one with. Say which with --model "
            "FILE.gguf; it is remembered."
        )
    models = find_models(*user_environment())
    for number, model in enumerate(models, 1):
        size = f"{model.size_bytes / 1e9:.1f} GB"
        err.print(f"{number:3}  {model.name}  ({size}, {model.source})", markup=False)
    said = str(typer.prompt("Which model (a number or a path; it is remembered)", err=True)).strip()
    if said.isdecimal() and 1 <= int(said) <= len(models):
        return str(models[int(said) - 1].path)
    return said


def _private_home(places: Places) -> Path:
    """The directory of all runs; a temporary one where the state can't be written."""
    home = places.state_home / "keepwarm" / "run"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="keepwarm-run-"))
    return home
