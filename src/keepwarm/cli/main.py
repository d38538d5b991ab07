"""The command line: one module a command, errors turned into one paragraph and an exit status."""

from __future__ import annotations

import sys

import typer

from keepwarm import __version__
from keepwarm.cli import (
    batch,
    bench,
    demo,
    doctor,
    explain,
    fleet,
    route,
    serve,
    service,
    simulate,
    store,
    tiers,
    top,
    warmup,
)
from keepwarm.cli.output import fail
from keepwarm.errors import KeepwarmError

app = typer.Typer(
    name="keepwarm",
    help="Keeps llama-server's prompt prefixes warm: no prompt token is prefilled twice, and what "
    "was warm is warm again before the first request after a restart.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("warmup")(warmup.warmup)
app.command("tiers")(tiers.tiers_command)
app.command("bench")(bench.bench)
app.command("demo")(demo.demo)
app.command("explain")(explain.explain)
app.command("top")(top.top)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate_command)
app.add_typer(batch.app, name="batch")
app.add_typer(fleet.app, name="fleet")
app.add_typer(store.app, name="store")
app.add_typer(route.app, name="route")
app.add_typer(service.app, name="service")


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
