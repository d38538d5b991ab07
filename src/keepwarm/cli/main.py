"""The command line: one module a command, errors turned into one paragraph and an exit status."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from keepwarm import __version__
from keepwarm.cli.output import fail
from keepwarm.errors import KeepwarmError

# Each is a module of this package: a group of commands is its `app`, a single one a function.
_COMMANDS = (
    *(
        "run",
        "init",
        "serve",
        "warmup",
        "tiers",
        "bench",
        "demo",
        "explain",
        "top",
        "doctor",
        "simulate",
    ),
    *("batch", "fleet", "models", "store", "route", "service"),
)


class _Commands(TyperGroup):
    """Imports a command's module when it is asked for: all of them take as long as an engine."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name; None if there is none."""
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"keepwarm.cli.{cmd_name}")
        parent = typer.Typer(add_completion=False, rich_markup_mode=None)
        if hasattr(module, "app"):
            parent.add_typer(module.app, name=cmd_name)
        else:
            # A function whose name the module needs for something else ends in `_command`.
            function = getattr(module, f"{cmd_name}_command", None) or getattr(module, cmd_name)
            parent.command(cmd_name)(function)
        return typer.main.get_group(parent).commands[cmd_name]


app = typer.Typer(
    name="keepwarm",
    cls=_Commands,
    help="Keeps llama-server's prompt prefixes warm: no prompt token is prefilled twice, and what "
    "was warm is warm again before the first request after a restart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"keepwarm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    """See the application's help."""


def main() -> None:
    """Run the command; every error of ours is one paragraph on stderr and exit status 1."""
    try:
        app()
    except KeepwarmError as error:
        fail(str(error))
        sys.exit(1)
