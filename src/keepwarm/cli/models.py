"""`keepwarm models`: which models a running Keepwarm has loaded, and having it load others."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer
from rich.table import Table

from keepwarm.cli import options as opt
from keepwarm.cli.gateway import DEFAULT_URL, Gateway, Key, Url
from keepwarm.cli.output import out, print_json

app = typer.Typer(
    help="Ask a running Keepwarm for its models: sizes, states; load, unload, pin.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model's name, as `ls` shows it.")]


@app.command("ls")
def list_models(url: Url = DEFAULT_URL, key: Key = None, as_json: opt.Json = False) -> None:
    """List all models: which are loaded, what each takes, and who waits."""
    told = asyncio.run(_ask("models", url, key, change=False))
    if as_json:
        print_json(told)
        return
    table = Table("model", "state", "MB", "file MB", "loads in", "loads", "serving", "waiting")
    for model in told["models"]:
        marks = " *" if model["default"] else ""
        marks += " (pinned)" if model["pinned"] else ""
        table.add_row(
            (model["name"] or "(the only one)") + marks,
            model["state"],
            _megabytes(model["bytes"]),
            _megabytes(model["file_bytes"]),
            "" if model["load_s"] is None else f"{model['load_s']:.1f} s",
            *(str(model[key]) for key in ("loads", "serving", "waiting")),
        )
    out.print(table)
    for model in told["models"]:
        if model["failure"]:
            out.print(f"{model['name']}: {model['failure']}", style="red", markup=False)


@app.command("load")
def load_model(name: Name, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Load a model now, and wait until it is warm."""
    told = _change(name, "load", url, key)
    out.print(
        f"{told['name']} is loaded, in {told['load_s']:.1f} s, {_megabytes(told['bytes'])} MB"
    )


@app.command("unload")
def unload_model(name: Name, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """End a model's engine once its requests are done, its slots saved."""
    told = _change(name, "unload", url, key)
    out.print(f"{told['name']} is {told['state']}")


@app.command("pin")
def pin_model(name: Name, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Keep a model loaded, whatever others wait for, until it is unpinned or Keepwarm restarts."""
    _change(name, "pin", url, key)
    out.print(f"{name} is pinned")


@app.command("unpin")
def unpin_model(name: Name, url: Url = DEFAULT_URL, key: Key = None) -> None:
    """Let a model go again when others are asked for."""
    _change(name, "unpin", url, key)
    out.print(f"{name} isn't pinned")


def _change(name: str, action: str, url: str, key: str | None) -> dict[str, Any]:
    return asyncio.run(_ask(f"models/{name}/{action}", url, key, change=True))


async def _ask(path: str, url: str, key: str | None, *, change: bool) -> dict[str, Any]:
    async with Gateway(url, key) as gateway:
        return await gateway.post(path, {}) if change else await gateway.get(path)


def _megabytes(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 1e6:,.0f}"
