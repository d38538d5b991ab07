"""`keepwarm route`: explain a decision, decide many, learn from outcomes, show what happened."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import aiohttp
import typer
from rich.table import Table
from typer.core import TyperGroup

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError, TierError
from keepwarm.router.calibrate import Fit, Refit, refit
from keepwarm.router.catalog import ToolText
from keepwarm.router.config import DEFAULT_COSTS, probability_thresholds
from keepwarm.router.types import TIERS, RouteRequest
from keepwarm.settings import Places, Settings
from keepwarm.tiers.files import find_tiers_directory, load_tiers
from keepwarm.tiers.router_files import Router, load_router, read_refits, write_refits
from keepwarm.tiers.router_outcomes import OutcomeLog

#: Seconds to wait for a running gateway's word on what the tiers cost now.
_SERVER_WAIT_S: Final = 1.5
_DAY_S: Final = 86_400.0


class _TextOrCommand(TyperGroup):
    """A group whose first argument may be a text to route instead of a command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command that takes a text in front of what isn't a command's name."""
        if args and args[0] != "--help" and args[0] not in self.commands:
            args = ["text", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_TextOrCommand,
    no_args_is_help=True,
    help='Explain which tier a request gets: keepwarm route "text". Or --batch FILE for many; see'
    " `keepwarm route text --help`.",
)


@app.command("text")
def explain(
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

    `keepwarm route "text"` is short for this. Works without a running server; with one, the costs
    are what the tiers cost now.
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
            "costs": {each.tier: each.seconds for each in DEFAULT_COSTS},
            "costs_from": "defaults: no server answered",
        }
    if as_json:
        print_json(told)
    else:
        _show(told)


def _state_dir(places: Places) -> Path:
    return places.state_home / "keepwarm"


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
    return load_router(tiers_dir=directory, state_dir=_state_dir(places), own_tools=own_tools)


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
    for head in ("tier", "costs now, s", "expected with misses, s"):
        costs.add_column(head, justify="left" if head == "tier" else "right")
    for tier, expected in told.get("expected_s", {}).items():
        now = told.get("costs", {}).get(tier)
        costs.add_row(tier, "-" if now is None else f"{now:.2f}", f"{expected:.2f}")
    out.print()
    out.print(costs)
    out.print(f"(costs from {told.get('costs_from', 'the server')})", markup=False)
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


_Days = Annotated[
    float, typer.Option("--days", min=0.01, help="How far back to look.", metavar="DAYS")
]


@app.command("report")
def report(config: opt.ConfigFile = None, days: _Days = 30.0, as_json: opt.Json = False) -> None:
    """Show where requests went: tiers, reasons, escalations and tool use."""
    _, places = opt.settings_from(config, {})
    log = OutcomeLog(_state_dir(places))
    outcomes = log.read(since_s=time.time() - days * _DAY_S)
    rows = []
    for tier in sorted({each.tier for each in outcomes}, key=_tier_order):
        of_tier = [each for each in outcomes if each.tier == tier]
        rows.append(
            {
                "tier": tier,
                "requests": len(of_tier),
                "explicit": sum(each.is_explicit for each in of_tier),
                "tools_used": sum(bool(each.tools_used) for each in of_tier),
                "escalated": sum(each.escalated is not None for each in of_tier),
            }
        )
    reasons = Counter(each.reason for each in outcomes).most_common()
    causes = Counter(str(each.escalated) for each in outcomes if each.escalated).most_common()
    told = {
        "days": days,
        "requests": len(outcomes),
        "tiers": rows,
        "reasons": dict(reasons),
        "escalations": dict(causes),
    }
    if as_json:
        print_json(told)
        return
    if not outcomes:
        out.print(f"No routed request in the last {days:g} days ({log.path}).", markup=False)
        return
    table = Table(box=None, pad_edge=False)
    for head in ("tier", "requests", "explicit", "tools used", "escalated from it"):
        table.add_column(head, justify="left" if head == "tier" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    out.print(table)
    for title, counted in (("reason", reasons), ("escalation", causes)):
        for name, count in counted:
            out.print(f"{count:>7}  {title} {name}", markup=False)


def _tier_order(tier: str) -> tuple[int, str]:
    return (TIERS.index(tier) if tier in TIERS else len(TIERS), tier)


@app.command("calibrate")
def calibrate(
    config: opt.ConfigFile = None,
    tiers: opt.Tiers = None,
    days: _Days = 90.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, but keep nothing.")] = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="Back to the shipped calibration.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Refit the scores to what became of this deployment's requests; show before and after.

    A running gateway takes the new calibration at its next start.
    """
    settings, places = opt.settings_from(config, {"tiers.dir": tiers})
    state_dir = _state_dir(places)
    if reset:
        write_refits(state_dir, {})
        err.print("Back to the shipped calibration.", markup=False)
        return
    current = read_refits(state_dir)
    outcomes = OutcomeLog(state_dir).read(since_s=time.time() - days * _DAY_S)
    thresholds = probability_thresholds(_router(settings, places).config.costs, DEFAULT_COSTS)
    found = refit(outcomes, current=current, thresholds=thresholds)
    fitted = {name: each.after.platt for name, each in found.items() if each.after is not None}
    if fitted and not dry_run:
        write_refits(state_dir, {**current, **fitted})
    kept = bool(fitted) and not dry_run
    if as_json:
        print_json(
            {"outcomes": len(outcomes), "kept": kept, "scores": [_told(e) for e in found.values()]}
        )
        return
    _show_refits(list(found.values()))
    out.print("Kept." if kept else "Nothing was changed.", markup=False)


def _told(each: Refit) -> dict[str, Any]:
    def fit(told: Fit | None) -> dict[str, float] | None:
        if told is None:
            return None
        return {
            "slope": told.platt.slope,
            "offset": told.platt.offset,
            "log_loss": told.log_loss,
            "ece": told.ece,
            "threshold": told.threshold,
            "under_tiered": told.under_tiered,
            "over_tiered": told.over_tiered,
        }

    return {
        "score": each.score,
        "outcomes": each.outcomes,
        "needed": each.needed,
        "before": fit(each.before),
        "after": fit(each.after),
        "why": each.why,
    }


def _show_refits(found: Sequence[Refit]) -> None:
    table = Table(box=None, pad_edge=False)
    heads = ("score", "outcomes", "needed", "", "log loss", "ECE", "threshold", "under", "over")
    for head in heads:
        table.add_column(head, justify="left" if head in ("score", "") else "right")
    for each in found:
        for name, fit in (("before", each.before), ("after", each.after)):
            if fit is None:
                continue
            cells = (fit.log_loss, fit.ece, fit.threshold, fit.under_tiered, fit.over_tiered)
            first = (
                (each.score, str(each.outcomes), str(each.needed))
                if name == "before"
                else ("",) * 3
            )
            table.add_row(*first, name, *(f"{cell:.3f}" for cell in cells))
    out.print(table)
    for each in found:
        if each.why:
            out.print(f"{each.score} stays: {each.why}.", markup=False)
