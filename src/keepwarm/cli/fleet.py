"""`keepwarm fleet`: several nodes behind one endpoint, on Ray Serve."""

from __future__ import annotations

import importlib
import queue
import signal
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.table import Table

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError, KeepwarmError
from keepwarm.fleet.config import FleetConfig, load_fleet
from keepwarm.keys import is_loopback, load_keys
from keepwarm.settings import gateway_key

app = typer.Typer(help="Run several nodes behind one endpoint, on Ray.", no_args_is_help=True)

_Config = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="The fleet's settings (docs/fleet.md).")
]


@app.command("up")
def bring_up(config: _Config = Path("fleet.toml")) -> None:
    """Start a fleet and stay until interrupted; ready when every node's tiers are warm.

    Without an `address` in the file a Ray of this machine is started with it, and ends with it.
    After SIGHUP the file is read again and the nodes are replaced, a fifth of them at a time.
    """
    fleet = load_fleet(config)
    _check(fleet)
    fleet_up = _ray("keepwarm.fleet.up")
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    try:
        fleet_up.up(fleet, tell=_tell)
        # Not before: Ray takes the signals for itself when it starts, and dies of them.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: signals.put(number))
        _tell(f"the fleet is ready on http://{fleet.fleet.host}:{fleet.fleet.port}")
        while signals.get() == signal.SIGHUP:
            fleet = _updated(config, fleet, fleet_up)
        _tell("stopping")
    finally:
        fleet_up.down()


def _updated(path: Path, running: FleetConfig, fleet_up: Any) -> FleetConfig:
    """Change a fleet that runs to what its file says now; a file that is wrong changes nothing."""
    try:
        fleet = load_fleet(path)
        _check(fleet)
        _check_change(running, fleet)
        _tell("updating")
        fleet_up.deploy(fleet, tell=_tell)
    except KeepwarmError as error:
        _tell(f"not updated: {error}")
        return running
    _tell("the fleet is updated")
    return fleet


def _check_change(running: FleetConfig, wanted: FleetConfig) -> None:
    """What a fleet that runs can't change. Raises: ConfigError."""
    for key in ("address", "host", "port"):
        if getattr(running.fleet, key) != getattr(wanted.fleet, key):
            raise ConfigError(
                f"[fleet] {key} can't change while the fleet runs. End it and start it again."
            )


def _tell(text: str) -> None:
    err.print(text, markup=False)


@app.command("config")
def show_config(config: _Config = Path("fleet.toml")) -> None:
    """Print what `serve deploy` takes, for a Ray cluster that is looked after by others."""
    fleet = load_fleet(config)
    _check(fleet)
    print_json(_deploy_file(fleet))


def _check(fleet: FleetConfig) -> None:
    """Tell mistakes here, where that can still be done plainly."""
    settings, _ = opt.settings_from(None, fleet.node_flags())
    keys = load_keys(settings.server.api_keys, settings.server.api_key_file)
    if not is_loopback(fleet.fleet.host) and not keys:
        raise ConfigError(
            f"Listening on {fleet.fleet.host} would let everyone on the network use these models. "
            "Set an API key in [node.server] (api_keys or api_key_file), or listen on 127.0.0.1."
        )


def _deploy_file(fleet: FleetConfig) -> dict[str, Any]:
    found: dict[str, Any] = _ray("keepwarm.fleet.up").deploy_file(fleet)
    return found


@app.command("status")
def show_status(
    url: Annotated[
        str, typer.Option("--url", help="Where the fleet listens.")
    ] = "http://127.0.0.1:8090",
    as_json: opt.Json = False,
) -> None:
    """Show the nodes: load, prompt tokens by source, what was moved.

    The fleet's own page, at /keepwarm/, shows the same while it changes.
    """
    request = urllib.request.Request(url.rstrip("/") + "/keepwarm/fleet")  # noqa: S310 - the user's
    if key := gateway_key():
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:  # noqa: S310
            status = msgspec.json.decode(reply.read(), type=dict)
    except (OSError, urllib.error.URLError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"No fleet answers at {url} ({error}). Name another address with --url."
        ) from error
    if as_json:
        print_json(status)
    else:
        out.print(_table(status.get("nodes", {})))


def _table(nodes: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, side in (("node", "left"), ("state", "left"), ("heard", "right"), ("busy", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for name in ("queued", "backlog", "asked", "reused", "cold", "moved here", "store", "written"):
        table.add_column(name, justify="right")
    for name, node in sorted(nodes.items(), key=lambda item: str(item[1].get("node", item[0]))):
        shared, tokens = node.get("shared", {}), node.get("tokens", {})
        heard = node.get("heard_s_ago")
        table.add_row(
            str(node.get("node", name)),
            str(node.get("state")),
            "never" if heard is None else f"{heard:.1f} s ago",
            f"{node.get('busy_slots', 0)} of {node.get('slots', 0)}",
            str(node.get("queued", 0)),
            f"{node.get('backlog_s', 0.0):.1f} s",
            str(node.get("asked", 0)),
            f"{tokens.get('slot', 0) + tokens.get('snapshot', 0):,}",
            f"{tokens.get('cold', 0):,}",
            f"{shared.get('moved_tokens', 0):,}",
            f"{node.get('store_bytes', 0) / 1e6:,.0f} MB",
            f"{shared.get('stored_bytes', 0) / 1e6:,.0f} MB",
        )
    return table


def _ray(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"A fleet needs Ray: pip install 'keepwarm[fleet]' ({error.name} is missing)."
        ) from error
