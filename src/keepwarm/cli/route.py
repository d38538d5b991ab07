"""`keepwarm route`: explain a decision, or decide many."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import typer
from rich.table import Table

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError, TierError
from keepwarm.router.catalog import ToolText
from keepwarm.router.types import TIERS, RouteRequest
from keepwarm.settings import Places, Settings
from keepwarm.tiers.files import find_tiers_directory, load_tiers
from keepwarm.tiers.router_files import Router, load_router

#: Seconds to wait for a running gateway's word on what the tiers cost now.
_SERVER_WAIT_S: Final = 1.5


def route(
    text: Annotated[str | None, typer.Argument(help="What a user would say.")] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            metavar="FILE.jsonl",
            help="One object a line with `query` and optionally `tools`; - reads stdin.",
        ),
    ] = None,
    config: opt.ConfigFile = None,
    tiers: opt.Tiers = None,
    as_json: opt.Json = False,
) -> None:
    """Show the tier of a request, the rule or scores behind it, and what each tier would cost.

    Works without a running server; with one, the costs are what the tiers cost now.
    """
    settings, places = opt.settings_from(config, {"tiers.dir": tiers})
    if batch is not None:
        if text is not None:
            raise ConfigError("Give a text or --batch, not both.")
        _route_lines(batch, _router(settings, places))
        return
    if text is None:
        raise ConfigError('Give a text, as in keepwarm route "text", or --batch FILE.')
    told = asyncio.run(_from_server(settings, text))
    if told is None:
        decision = _router(settings, places).route(RouteRequest(text=text), explain=True)
        told = {
            **decision.to_json(),
            "costs_from": "defaults, everything warm: no server answered",
        }
    if as_json:
        print_json(told)
    else:
        _show(told)


def _router(settings: Settings, places: Places) -> Router:
    explicit = Path(settings.tiers.dir).expanduser() if settings.tiers.dir else None
    directory: Path | None = None
    own_tools: list[dict[str, Any]] | None = None
    try:
        directory = find_tiers_directory(explicit, places.config_home)
        tier_set = load_tiers(directory, settings.tiers.agent_name)
        own_tools = [tool for tier in tier_set for tool in tier.tools]
    except TierError as error:
        if explicit is not None:
            raise
        err.print(f"{error} The tiers' tools are taken as unknown.", markup=False)
    return load_router(tiers_dir=directory, own_tools=own_tools)


async def _from_server(settings: Settings, text: str) -> dict[str, Any] | None:
    """A running gateway's decision, with its costs now; None if none answers in time."""
    url = f"http://{settings.server.host}:{settings.server.port}/keepwarm/route"
    keys = settings.server.api_keys
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    body = {"model": "auto", "messages": [{"role": "user", "content": text}]}
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_SERVER_WAIT_S)) as session,
            session.post(url, json=body, headers=headers) as reply,
        ):
            told = await reply.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("tier") not in TIERS:
        return None
    return {"costs_from": f"{settings.server.host}:{settings.server.port}", **told}


def _show(told: dict[str, Any]) -> None:
    detail = f" ({told['detail']})" if told.get("detail") else ""
    out.print(f"tier      {told['tier']}", markup=False)
    out.print(f"because   {told['reason']}{detail}", markup=False)
    out.print(f"scores    P(needs tools) {told['p_tools']:.3f}   P(needs context or depth)"
              f" {told['p_context']:.3f}", markup=False)  # fmt: skip
    costs = Table(box=None, pad_edge=False)
    reply = f"{told.get('reply_tokens', 0)} tokens" if told.get("reply_tokens") else "reply"
    heads = ("tier", "first token", reply, "displaces", "risk", "sum, s")
    for head in heads:
        costs.add_column(head, justify="left" if head == "tier" else "right")
    for tier, cost in told.get("costs", {}).items():
        parts = ("first_s", "reply_s", "displaced_s", "risk_s", "expected_s")
        costs.add_row(tier, *(f"{cost[part]:.2f}" for part in parts))
    out.print()
    out.print(costs)
    kind = f"a reply like those to tasks of the kind '{told.get('kind', '')}'; "
    out.print(f"({kind}costs from {told.get('costs_from', 'the server')})", markup=False)
    moved = Table(box=None, pad_edge=False)
    for head in ("logits", "score", "feature", "value"):
        moved.add_column(head, justify="right" if head in ("logits", "value") else "left")
    for each in told.get("contributions", []):
        moved.add_row(
            f"{each['logits']:+.2f}", each["score"], each["feature"], f"{each['value']:.2f}"
        )
    out.print()
    out.print(moved)


def _lines(source: Path) -> Iterable[bytes]:
    try:
        if str(source) == "-":
            yield from sys.stdin.buffer
        else:
            with source.open("rb") as file:
                yield from file
    except OSError as error:
        raise ConfigError(f"{source} can't be read: {error.strerror}.") from error


def parse_line(line: bytes, where: str) -> RouteRequest:
    """One line of a batch file.

    Raises:
        ConfigError: not an object with a text `query` and, if any, a list of `tools`.
    """
    try:
        raw = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON ({error}).") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("query"), str):
        raise ConfigError(f"{where}: it must be an object with a text `query`.")
    tools = raw.get("tools")
    if tools is None:
        return RouteRequest(text=raw["query"])
    if not isinstance(tools, list):
        raise ConfigError(f"{where}: `tools` must be a list of {{name, description}}.")
    found = []
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ConfigError(f"{where}: each of `tools` must have a text `name`.")
        description = inner.get("description") or ""
        if not isinstance(description, str):
            raise ConfigError(f"{where}: the description of {inner['name']!r} must be a text.")
        found.append(ToolText(inner["name"], description))
    return RouteRequest(text=raw["query"], tools=tuple(found))


def _route_lines(source: Path, router: Router) -> None:
    for number, line in enumerate(_lines(source), 1):
        if not line.strip():
            continue
        decision = router.route(parse_line(line, f"{source}, line {number}"))
        answer = {
            "tier": decision.tier,
            "p_tools": round(decision.p_tools, 5),
            "p_context": round(decision.p_context, 5),
            "reason": str(decision.reason),
        }
        sys.stdout.write(json.dumps(answer) + "\n")
