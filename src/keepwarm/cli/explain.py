"""`keepwarm explain`: why one request was as fast as it was."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from keepwarm.cli import options as opt
from keepwarm.cli.gateway import DEFAULT_URL, Gateway, Key, Url
from keepwarm.cli.output import out, print_json
from keepwarm.core.hygiene import rewrites_text

STYLES = {
    "slot": "green",
    "snapshot": "blue",
    "shared": "magenta",
    "ahead": "green",
    "cold": "red",
    "none": "bright_black",
}


def explain(
    request: Annotated[
        str,
        typer.Argument(
            metavar="ID|last", help="X-Keepwarm-Request-Id of a reply; `last` is the latest."
        ),
    ] = "last",
    url: Url = DEFAULT_URL,
    key: Key = None,
    as_json: opt.Json = False,
) -> None:
    """Tell where a request's tokens came from, and why the rest was prefilled.

    Asks a running Keepwarm. Text of prompts is shown only where log.prompts keeps it.
    """
    record = asyncio.run(_get(request, url, key))
    if as_json:
        print_json(record)
    else:
        out.print(story(record))


async def _get(request: str, url: str, key: str | None) -> dict[str, Any]:
    async with Gateway(url, key) as gateway:
        return await gateway.get(f"requests/{request}")


def story(record: dict[str, Any]) -> RenderableType:
    """A record for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["at"]))
    parts: list[RenderableType] = [
        Text(record["summary"], style="bold"),
        Text(
            f"{record['id']}  {when}  {record['api']}  tier {record['tier']} "
            f"({record['tier_reason']})",
            style="bright_black",
        ),
    ]
    if record["advice"]:
        parts.append(Text(f"\n{record['advice']}"))
    if record["difference"]:
        parts += ["", _difference(record["difference"])]
    if record["tokens"]["prompt"]:
        parts += ["", _tokens(record["tokens"])]
    parts += ["", _facts(record)]
    if record["considered"]:
        parts += ["", _considered(record["considered"])]
    return Group(*parts)


def _difference(difference: dict[str, Any]) -> RenderableType:
    place = difference["place"]
    lines = Text(f"{place[0].upper()}{place[1:]}", style="bold")
    if difference["kind"]:
        lines.append(f" ({difference['kind']})", style="")
    if difference["before"] is None:
        lines.append(
            f"\n  text isn't kept (log.prompts); before {difference['before_hash'] or '-'}, "
            f"after {difference['after_hash'] or '-'}",
            style="bright_black",
        )
        return lines
    context = (difference["context"] or "").replace("\n", "⏎")
    for name, style in (("before", "red"), ("after", "green")):
        lines.append(f"\n  {name:6} …{context}", style="bright_black")
        lines.append(difference[name].replace("\n", "⏎") or "(nothing)", style=style)
    return lines


def _tokens(tokens: dict[str, int], width: int = 48) -> Text:
    """A bar of where the prompt's tokens came from, and the counts."""
    bar, words = Text(), Text("  ")
    for source in ("slot", "snapshot", "shared", "cold"):
        count = tokens[source]
        if count:
            cells = max(round(width * count / tokens["prompt"]), 1)
            bar.append("█" * cells, style=STYLES[source])
            words.append(f"{source} {count:,}  ", style=STYLES[source])
    return bar + words + Text(f"of {tokens['prompt']:,}, {tokens['decoded']:,} written")


def _facts(record: dict[str, Any]) -> Table:
    timing, estimate, steps = record["timing"], record["estimate"], record["steps"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bright_black")
    table.add_column()
    table.add_row("plan", Text(record["plan"], style=STYLES.get(record["plan"], "")))
    if timing["ttft_s"] is not None:
        table.add_row(
            "first token",
            f"{seconds(timing['ttft_s'])}, cold it would be {seconds(timing['cold_ttft_s'])}",
        )
    if estimate:
        table.add_row(
            "estimated",
            f"{seconds(estimate['ttft_s'])} behind the queue, {estimate['reuse_tokens']:,} of "
            f"{estimate['prompt_tokens']:,} tokens reused",
        )
    table.add_row(
        "waited",
        f"{seconds(timing['queue_s'])} for a slot, {seconds(timing['prepare_s'])} preparing it",
    )
    if steps:
        table.add_row("slot", f"{record['slot']}{_steps(steps)}")
    # Records of older versions don't have these two.
    if ahead := record.get("ahead"):
        table.add_row("ahead", _ahead(ahead))
    if rewrites := record.get("hygiene"):
        table.add_row("hygiene", rewrites_text(rewrites))
    if record["nearest"]:
        nearest = record["nearest"]
        table.add_row("nearest", f"{nearest['id']}, {seconds(nearest['age_s'])} before")
    if record["error"]:
        table.add_row("error", f"{record['error']} (status {record['status']})")
    return table


def _ahead(ahead: dict[str, Any]) -> str:
    if ahead["tokens"]:
        return f"{ahead['tokens']:,} tokens had been prefilled before it was asked"
    return f"nothing it could use had been prefilled: {ahead['came_of']}"


def _steps(steps: dict[str, Any]) -> str:
    said = []
    if steps["saved_first"]:
        said.append("what it held was saved first")
    if steps["restored_tokens"]:
        said.append(f"{steps['restored_tokens']:,} tokens restored")
    if steps["filled_tokens"]:
        said.append(f"{steps['filled_tokens']:,} tokens filled ahead and saved for others")
    if steps["failed_restore"]:
        said.append(f"a restore failed ({steps['failed_restore']})")
    return f": {', '.join(said)}" if said else ""


def _considered(options: list[dict[str, Any]]) -> Table:
    table = Table("from", "slot", "reuses", "first token", "slot's loss", "", box=None)
    for option in options:
        table.add_row(
            Text(option["source"], style=STYLES.get(option["source"], "")),
            str(option["slot"]),
            f"{option['reuse_tokens']:,}",
            seconds(option["ttft_s"]),
            seconds(option["loss_s"]) if option["loss_s"] else "-",
            "taken" if option["chosen"] else "",
        )
    return table


def seconds(value: float | None) -> str:
    """A time for people: 12 ms, 1.25 s, 3.4 min."""
    if value is None:
        return "-"
    if value < 0.0995:
        return f"{value * 1e3:.1f} ms" if value < 0.00995 else f"{value * 1e3:.0f} ms"
    if value < 120:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
