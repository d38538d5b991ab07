"""`keepwarm top`: slots, sums, tiers and the last requests, live in a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from keepwarm.cli import options as opt
from keepwarm.cli.explain import STYLES, seconds
from keepwarm.cli.gateway import DEFAULT_URL, Gateway, GatewayError, Key, Url
from keepwarm.cli.output import out, print_json

_REFRESH_S = 0.25
_KEPT = 200
# Seconds that one cell of a slot's lane stands for.
_CELL_S = 1.0


@dataclass(slots=True)
class Screen:
    """What the gateway has told so far."""

    overview: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Any] = field(default_factory=dict)
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    trouble: str = ""

    def hear(self, name: str, body: dict[str, Any]) -> None:
        """Take an event of the live stream in."""
        if name == "overview":
            self.overview = body
        elif name == "slots":
            self.slots = body
        elif name == "request":
            self.requests.appendleft(body)
            self._count(body)

    def _count(self, record: dict[str, Any]) -> None:
        if record["outcome"] != "answered" or not self.overview:
            return
        tokens = record["tokens"]
        warm = tokens["prompt"] - tokens["cold"]
        for sums in self.overview["totals"].values():
            sums["requests"] += 1
            sums["warm_tokens"] += warm
            sums["cold_tokens"] += tokens["cold"]
            sums["spared_s"] += warm * self.overview.get("prefill_s_per_token", 0.0)


def top(
    url: Url = DEFAULT_URL,
    key: Key = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: opt.Json = False,
) -> None:
    """Watch a running Keepwarm: slots, what is warm, time to first token. Ctrl-C ends it."""
    if as_json:
        print_json(asyncio.run(_once(url, key)))
        return
    if once or not out.is_terminal:
        found = asyncio.run(_once(url, key))
        seen = Screen(found["overview"], found["slots"])
        seen.requests.extend(found["requests"])
        out.print(screen(seen, now_s=time.time(), width=out.width, height=60))
        return
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_watch(url, key))


async def _once(url: str, key: str | None) -> dict[str, Any]:
    """Overview, slots and last requests as they are now."""
    async with Gateway(url, key) as gateway:
        return {
            "overview": await gateway.get("overview"),
            "slots": await gateway.get("slots"),
            "requests": (await gateway.get("requests?limit=50"))["requests"],
        }


async def _watch(url: str, key: str | None) -> None:
    seen = Screen()
    async with Gateway(url, key) as gateway:
        # What is wrong from the start is said at once; later the screen stays and says it.
        seen.requests.extend((await gateway.get("requests?limit=100"))["requests"])
        listening = asyncio.create_task(_listen(gateway, seen))
        with Live(screen=True, auto_refresh=False, console=out) as live:
            try:
                while not listening.done():
                    shown = screen(seen, now_s=time.time(), width=out.width, height=out.height)
                    live.update(shown, refresh=True)
                    await asyncio.sleep(_REFRESH_S)
            finally:
                listening.cancel()
        await listening


async def _listen(gateway: Gateway, seen: Screen) -> None:
    pause_s = 0.5
    while True:
        try:
            async for name, body in gateway.events():
                seen.hear(name, body)
                seen.trouble, pause_s = "", 0.5
        except GatewayError as error:
            seen.trouble = str(error)
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, 10.0)


def screen(seen: Screen, *, now_s: float, width: int, height: int) -> RenderableType:
    """The whole screen as it is now."""
    slots = seen.slots.get("slots", [])
    used = 9 + len(slots) + len(seen.overview.get("tiers", []))
    parts: list[RenderableType] = [
        _head(seen),
        _sums(seen),
        "",
        _lanes(seen, slots, now_s=now_s, width=width),
        "",
        _tiers(seen),
        "",
        _requests(seen, rows=max(height - used - 3, 3), now_s=now_s),
    ]
    return Group(*parts)


def _head(seen: Screen) -> Text:
    state = seen.slots.get("state", "connecting")
    style = {"ready": "bold green", "failed": "bold red", "down": "bold red"}.get(state, "yellow")
    head = Text("keepwarm ", style="bold") + Text(state, style=style)
    if state != "ready" and seen.slots.get("status"):
        head.append(f": {seen.slots['status']}")
    if seen.overview.get("model"):
        head.append(f"  {seen.overview['model']}  {seen.overview['engine']}", style="bright_black")
    if queued := seen.slots.get("queued"):
        head.append(f"  {queued} waiting", style="yellow")
    if seen.trouble:
        head.append(f"\n{seen.trouble}", style="red")
    return head


def _sums(seen: Screen) -> Text:
    if not seen.overview:
        return Text("")
    today, ever = seen.overview["totals"]["today"], seen.overview["totals"]["ever"]
    whole = today["warm_tokens"] + today["cold_tokens"]
    share = f"{100 * today['warm_tokens'] / whole:.1f} % of {whole:,}" if whole else "none yet"
    answered = [r for r in seen.requests if r["outcome"] == "answered"][:50]
    line = Text(
        f"warm today {share} prompt tokens; spared {seconds(today['spared_s'])} of prefill "
        f"today, {seconds(ever['spared_s'])} since ever"
    )
    if answered:
        line.append(
            f"\nfirst token {seconds(median(r['ttft_s'] for r in answered))} (median of "
            f"{len(answered)}), cold {seconds(median(r['cold_ttft_s'] for r in answered))}"
        )
    return line


def _lanes(seen: Screen, slots: list[dict[str, Any]], *, now_s: float, width: int) -> Table:
    """A row a slot: what it holds, and its requests as they ran, the present at the right."""
    cells = max(width - 44, 10)
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="bright_black", no_wrap=True, max_width=18)
    table.add_column(no_wrap=True)
    for slot in slots:
        tokens = "other key" if slot["tokens"] is None else f"{slot['tokens']:,}"
        lane = _lane(seen, slot, cells=cells, now_s=now_s)
        table.add_row(f"slot {slot['id']}", tokens, slot["holds"] if slot["tokens"] else "", lane)
    return table


def _lane(seen: Screen, slot: dict[str, Any], *, cells: int, now_s: float) -> Text:
    marks = ["·"] * cells
    styles = ["bright_black"] * cells

    def paint(from_s: float, to_s: float, mark: str, plan: str | None) -> None:
        first = cells - 1 - int((now_s - from_s) / _CELL_S)
        last = cells - 1 - int((now_s - to_s) / _CELL_S)
        for cell in range(max(first, 0), min(last, cells - 1) + 1):
            marks[cell], styles[cell] = mark, STYLES.get(plan or "none", "bright_black")

    for record in seen.requests:
        if record["slot"] != slot["id"] or now_s - record["at"] > cells * _CELL_S + 600:
            continue
        first_s = record["at"] + (record["ttft_s"] or record["total_s"])
        paint(first_s, record["at"] + record["total_s"], "▒", record["plan"])
        paint(record["at"] + record["queue_s"], first_s, "█", record["plan"])
    if slot["state"] != "idle":
        paint(slot["since"] or now_s, now_s, "█", slot["plan"])
    lane = Text()
    for mark, style in zip(marks, styles, strict=True):
        lane.append(mark, style=style)
    return lane


def _tiers(seen: Screen) -> Table:
    table = Table("tier", box=None, padding=(0, 2, 0, 0))
    for title in ("tokens", "warm in", "requests", "first token"):
        table.add_column(title, justify="left" if title == "warm in" else "right")
    for tier in seen.overview.get("tiers", []):
        own = [r["ttft_s"] for r in seen.requests if r["tier"] == tier["name"] and r["ttft_s"]]
        places = [f"slot {number}" for number in tier["slots"]]
        places += ["disk"] if tier["on_disk"] else []
        table.add_row(
            tier["name"],
            f"{tier['tokens']:,}" if tier["tokens"] else "-",
            ", ".join(places) or "no",
            str(len(own)),
            seconds(median(own)) if own else "-",
        )
    return table


def _requests(seen: Screen, *, rows: int, now_s: float) -> Table:
    table = Table("request", box=None, padding=(0, 2, 0, 0))
    for title in ("ago", "tier", "plan", "warm", "cold", "first token"):
        table.add_column(title, justify="left" if title in ("tier", "plan") else "right")
    table.add_column("why not faster", no_wrap=True)
    for record in list(seen.requests)[:rows]:
        tokens = record["tokens"]
        quiet = record["cause"] in ("none", "new_text")
        why = record["cause"] if record["outcome"] == "answered" else record["outcome"]
        table.add_row(
            record["id"][:8],
            seconds(max(now_s - record["at"], 0.0)),
            record["tier"],
            Text(record["plan"], style=STYLES.get(record["plan"], "")),
            f"{tokens['prompt'] - tokens['cold']:,}",
            f"{tokens['cold']:,}",
            seconds(record["ttft_s"]),
            Text(why.replace("_", " "), style="bright_black" if quiet else ""),
        )
    return table
