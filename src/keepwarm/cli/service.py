"""`keepwarm service`: Keepwarm under systemd."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError
from keepwarm.service import installation, systemd
from keepwarm.service.installation import Unit
from keepwarm.service.render import Scope, Wanted

app = typer.Typer(
    help="Run under systemd: warm before it counts as started, warm again after a crash.",
    no_args_is_help=True,
)

ForUser = Annotated[bool, typer.Option("--user", help="A service of yours, not of the system.")]
Plain = Annotated[
    bool, typer.Option("--plain", help="A llama-server without a gateway, warmed at its start.")
]
Directory = Annotated[
    Path | None,
    typer.Option("--directory", metavar="DIR", help="Where the unit lies. [default: systemd's]"),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[
    int | None, typer.Option("--port", help="Port. [default: 8090, with --plain 8080]")
]
Extra = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ENGINE_ARGS", help="Passed to the llama-server unchanged."),
]

_PROPERTIES = (
    "LoadState",
    "ActiveState",
    "SubState",
    "StatusText",
    "Result",
    "MainPID",
    "NRestarts",
    "ActiveEnterTimestamp",
    "UnitFileState",
    "DropInPaths",
)
# As systemctl: 3 is "not running".
_NOT_RUNNING = 3


@app.command("print")
def print_unit(
    extra: Extra = None,
    user: ForUser = False,
    plain: Plain = False,
    config: opt.ConfigFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    store: opt.StoreDir = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """Print the unit; without a model, as it stands in deploy/systemd, to be filled in by hand."""
    unit, text, _ = _render(locals())
    sys.stdout.write(text or installation.template_of(unit))


@app.command("install")
def install(
    extra: Extra = None,
    user: ForUser = False,
    plain: Plain = False,
    config: opt.ConfigFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    store: opt.StoreDir = None,
    host: Host = None,
    port: Port = None,
    directory: Directory = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a unit that was changed by hand, with --yes too."
        ),
    ] = False,
    start: Annotated[
        bool, typer.Option("--start/--no-start", help="Start it now and wait until it is warm.")
    ] = True,
    yes: Yes = False,
) -> None:
    """Write the unit, enable it and start it. Shows every change before it is made.

    Examples:

      keepwarm service install --user --model ~/models/qwen3-8b.gguf

      sudo keepwarm service install --model /srv/models/qwen3-8b.gguf --port 8090
    """
    unit, text, wanted = _render(locals())
    if text is None or wanted is None:
        raise ConfigError("Say which model the service runs, with --model FILE.gguf.")
    _warn_unreadable(wanted)
    _verify(unit, text)
    new, old = installation.final(text), unit.text
    difference = installation.difference(old, new, unit.path)
    if difference:
        sys.stdout.write(difference)
        sys.stdout.flush()
        _ask_before_writing(unit, yes=yes, overwrite=overwrite)
        systemd.write(unit.path, new)
        err.print(f"wrote {unit.path}", markup=False)
    else:
        err.print(f"{unit.path} is as it should be", markup=False)
    if directory is None:
        _activate(unit, start=start, is_change=bool(difference))


@app.command("uninstall")
def uninstall(
    user: ForUser = False,
    plain: Plain = False,
    directory: Directory = None,
    yes: Yes = False,
) -> None:
    """Stop the service and remove its unit. The store stays; its place is told."""
    unit = _unit(user=user, plain=plain, directory=directory)
    if unit.text is None:
        raise ConfigError(f"There is no unit at {unit.path}.")
    what = {
        "intact": "",
        "changed": " It was changed by hand since it was installed.",
        "foreign": " It wasn't written by `keepwarm service install`.",
    }[unit.state]
    if what and yes:
        raise ConfigError(f"{unit.path} is not removed unasked.{what} Run it without --yes.")
    if not yes:
        typer.confirm(f"Stop {unit.name} and remove {unit.path}?{what}", abort=True, err=True)
    if directory is None:
        _run(unit, "disable", "--now", unit.name)
    unit.path.unlink()
    if directory is None:
        _run(unit, "daemon-reload")
    kept = {
        Scope.SYSTEM: f"/var/lib/{unit.name.removesuffix('.service')}",
        Scope.USER: "~/.local/state/" + unit.name.removesuffix(".service"),
    }[unit.scope]
    err.print(f"removed {unit.path}; what was saved stays in {kept}", markup=False)


@app.command("status")
def status(
    user: ForUser = False,
    plain: Plain = False,
    directory: Directory = None,
    as_json: opt.Json = False,
) -> None:
    """Say whether the service runs and is warm. Exit status 0 if it is, 3 if not."""
    unit = _unit(user=user, plain=plain, directory=directory)
    found = systemd.properties(unit.scope, unit.name, _PROPERTIES)
    report: dict[str, Any] = {
        "unit": unit.name,
        "scope": unit.scope.value,
        "file": str(unit.path),
        "file_state": unit.state,
        "systemd": found,
        "running": found is not None and found.get("ActiveState") == "active",
    }
    if as_json:
        print_json(report)
    else:
        _show_status(unit, found)
    if not report["running"]:
        sys.exit(_NOT_RUNNING)


def _show_status(unit: Unit, found: dict[str, str] | None) -> None:
    said = {
        "missing": "not installed",
        "intact": "as it was installed",
        "changed": "changed by hand since it was installed",
        "foreign": "not written by `keepwarm service install`",
    }[unit.state]
    rows = [("unit", f"{unit.path} ({said})")]
    if found is None:
        rows.append(("systemd", "no manager answers here"))
    else:
        state = f"{found['ActiveState']} ({found['SubState']})"
        rows.append(("state", state + (f": {found['StatusText']}" if found["StatusText"] else "")))
        if found["ActiveState"] == "failed":
            rows.append(("failed", f"{found['Result']}; see journalctl -u {unit.name}"))
        rows.append(("at boot", found["UnitFileState"] or "no"))
        rows.append(("restarts", found["NRestarts"]))
        if found["ActiveEnterTimestamp"]:
            rows.append(("warm since", found["ActiveEnterTimestamp"]))
        if found["DropInPaths"]:
            rows.append(("changed by", found["DropInPaths"]))
    for name, value in rows:
        out.print(f"{name:11}{value}", markup=False, soft_wrap=True)


def _unit(*, user: bool, plain: bool, directory: Path | None) -> Unit:
    _, places = opt.settings_from(None, {})
    return installation.unit_at(plain=plain, user=user, directory=directory, places=places)


def _render(given: dict[str, Any]) -> tuple[Unit, str | None, Wanted | None]:
    """The unit of a command's options; no text where no model is named."""
    names = ("model", "engine", "slots", "context", "threads", "tiers", "chat_template", "store")
    flags = opt.engine_flags(upstream=None, slot_dir=None, **{name: given[name] for name in names})
    flags |= {"server.host": given["host"], "server.port": given["port"]}
    flags["engine.extra"] = given["extra"] or None
    settings, places = opt.settings_from(given["config"], flags)
    unit = installation.unit_at(
        plain=given["plain"],
        user=given["user"],
        directory=given.get("directory"),
        places=places,
    )
    if not settings.engine.model:
        return unit, None, None
    wanted = installation.wanted_of(
        unit,
        settings,
        places,
        slots=given["slots"],
        context=given["context"],
        threads=given["threads"],
        port=given["port"],
    )
    return unit, installation.rendered(unit, wanted), wanted


def _warn_unreadable(wanted: Wanted) -> None:
    for name in installation.unreadable(wanted):
        err.print(
            f"warning: {name} can't be read by others, so the service's own user can't read it. "
            f"Allow it (chmod -R o+rX), or install a service of yours with --user.",
            markup=False,
        )


def _verify(unit: Unit, text: str) -> None:
    checked = systemd.verify(unit.name, text, unit.scope)
    if not checked.ran:
        err.print("systemd-analyze can't check the unit here; it is written unchecked")
    for line in checked.lines:
        err.print(line, markup=False)
    if not checked.is_valid:
        raise ConfigError("systemd refuses this unit, for the reasons above; nothing was written.")


def _ask_before_writing(unit: Unit, *, yes: bool, overwrite: bool) -> None:
    told = {
        "missing": "",
        "intact": "",
        "changed": f"{unit.path} was changed by hand since it was installed; the lines marked - "
        "are lost. `systemctl edit` keeps changes of yours beside the unit. ",
        "foreign": f"{unit.path} wasn't written by `keepwarm service install`. ",
    }[unit.state]
    if yes and told and not overwrite:
        raise ConfigError(f"{told}Nothing was written: give --overwrite, or answer without --yes.")
    if told:
        err.print(told, markup=False)
    if not yes:
        typer.confirm("Write it?", abort=True, err=True)


def _activate(unit: Unit, *, start: bool, is_change: bool) -> None:
    flag = "--user " if unit.scope is Scope.USER else ""
    done, said = systemd.systemctl(unit.scope, "daemon-reload")
    if not done:
        err.print(f"No systemd answers here ({said}). Where it does, run:", markup=False)
        err.print(f"  systemctl {flag}daemon-reload && systemctl {flag}enable --now {unit.name}")
        return
    _run(unit, "enable", unit.name)
    if unit.scope is Scope.USER and not systemd.lingers(getpass.getuser()):
        err.print("It ends when you log out; `loginctl enable-linger` keeps it running.")
    if not start:
        err.print(f"start it with: systemctl {flag}start {unit.name}")
        return
    err.print("starting; a first start prefills every tier, which may take minutes")
    _run(unit, "restart" if is_change else "start", unit.name)
    err.print(f"{unit.name} runs and is warm")


def _run(unit: Unit, *arguments: str) -> None:
    done, said = systemd.systemctl(unit.scope, *arguments)
    if not done:
        flag = "--user " if unit.scope is Scope.USER else ""
        raise ConfigError(
            f"systemctl {flag}{' '.join(arguments)} failed: {said}. See "
            f"journalctl {flag}-u {unit.name}."
        )
