"""`keepwarm simulate`: what a fleet would make of a request trace, before it is bought."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table

from keepwarm.cli import options as opt
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError
from keepwarm.simulate import (
    POLICIES,
    Hardware,
    Outcome,
    Trace,
    oracle_hit_rate,
    read_trace,
    simulate,
)
from keepwarm.simulate.picture import picture
from keepwarm.simulate.trace import BLOCK_TOKENS

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_DEFAULTS = Hardware()


def _size(text: str | float) -> float:
    """`512G`, `512GB` or `1.5e12` as a number; a unit is a power of 1,000."""
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmgtp]?)b?(?:/s)?\s*", str(text).lower()
    )
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 512GB")
    return float(match[1]) * _UNITS[match[2]]


def _counts(text: str) -> list[int]:
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1 or counts[-1] > 4096:
        raise typer.BadParameter(f"{text!r} is not a list such as 1,4,16")
    return counts


def _positive(value: float) -> float:
    if value <= 0:
        raise typer.BadParameter("it must be more than 0")
    return value


def _size_option(default: float, *names: str, help: str) -> Any:  # noqa: A002 - Typer's own name
    return typer.Option(
        *names, metavar="BYTES", parser=_size, show_default=f"{default:,.0f}", help=help
    )


def simulate_command(
    trace: Annotated[
        Path, typer.Argument(help="Requests in Mooncake's format, a JSON object a line.")
    ],
    nodes: Annotated[
        str, typer.Option(metavar="N,N,...", help="Sizes of fleet to try.")
    ] = "1,4,16,64,256",
    policies: Annotated[
        str, typer.Option("--policies", metavar="NAME,...", help=f"Of {', '.join(POLICIES)}.")
    ] = ",".join(POLICIES),
    store: Annotated[
        float, _size_option(_DEFAULTS.store_bytes, "--store", help="A node's own store.")
    ] = _DEFAULTS.store_bytes,
    shared: Annotated[
        float,
        _size_option(_DEFAULTS.shared_bytes, "--shared", help="The shared store; 0 for none."),
    ] = _DEFAULTS.shared_bytes,
    row_bytes: Annotated[
        float, _size_option(_DEFAULTS.row_bytes, "--token-bytes", help="KV state of one token.")
    ] = _DEFAULTS.row_bytes,
    prefill: Annotated[
        float,
        typer.Option("--prefill-rate", metavar="TOKENS/S", callback=_positive, help="Of a node."),
    ] = _DEFAULTS.prefill_tokens_per_s,
    decode: Annotated[
        float,
        typer.Option("--decode-rate", metavar="TOKENS/S", callback=_positive, help="Of one reply."),
    ] = _DEFAULTS.decode_tokens_per_s,
    slots: Annotated[int, typer.Option(min=1, help="Requests a node decodes at a time.")] = (
        _DEFAULTS.slots
    ),
    restore: Annotated[
        float,
        _size_option(
            _DEFAULTS.restore_bytes_per_s,
            "--restore-bandwidth",
            help="From a node's store, a second.",
        ),
    ] = _DEFAULTS.restore_bytes_per_s,
    fetch: Annotated[
        float,
        _size_option(
            _DEFAULTS.fetch_bytes_per_s,
            "--fetch-bandwidth",
            help="From the shared store to a node.",
        ),
    ] = _DEFAULTS.fetch_bytes_per_s,
    upload: Annotated[
        float,
        _size_option(
            _DEFAULTS.upload_bytes_per_s,
            "--upload-bandwidth",
            help="From a node to the shared store.",
        ),
    ] = _DEFAULTS.upload_bytes_per_s,
    shared_bandwidth: Annotated[
        float,
        _size_option(
            _DEFAULTS.shared_bytes_per_s, "--shared-bandwidth", help="To all nodes together."
        ),
    ] = _DEFAULTS.shared_bytes_per_s,
    speed: Annotated[
        float,
        typer.Option(metavar="FACTOR", callback=_positive, help="Requests come this much faster."),
    ] = 1.0,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Take only so many. [default: all]")
    ] = (None),
    block_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens a hash of the trace stands for.")
    ] = (BLOCK_TOKENS),
    routers: Annotated[
        int, typer.Option(min=1, help="How many route, each with its own view.")
    ] = 1,
    report: Annotated[
        float, typer.Option("--report-every", metavar="S", callback=_positive, help="Nodes report.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the random policy.")] = 1,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a picture (SVG).")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Route a request trace over fleets of several sizes, and say what comes of it.

    The routing decision, the costs and what is evicted are those of a real fleet; engines and
    network are modelled by the rates given. The same arguments give the same figures.
    """
    hardware = Hardware(
        row_bytes=int(row_bytes),
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        slots=slots,
        store_bytes=store,
        restore_bytes_per_s=restore,
        fetch_bytes_per_s=fetch,
        upload_bytes_per_s=upload,
        shared_bytes=shared,
        shared_bytes_per_s=shared_bandwidth,
    )
    for field in fields(hardware):
        if field.name not in ("shared_bytes", "store_bytes") and not getattr(hardware, field.name):
            raise ConfigError(f"{field.name} can't be 0.")
    read = _read(trace, block_tokens, requests).sped_up(speed)
    chosen = [name for name in POLICIES if name in policies.split(",")]
    unknown = set(policies.split(",")) - set(POLICIES)
    if unknown:
        raise ConfigError(
            f"There is no policy {', '.join(sorted(unknown))}: {', '.join(POLICIES)}."
        )
    outcomes: list[Outcome] = []
    runs = [(count, policy) for count in _counts(nodes) for policy in chosen]
    with Progress(console=err, transient=True) as progress:
        bar = progress.add_task("", total=len(runs))
        for count, policy in runs:
            progress.update(bar, description=f"{policy}, {count} nodes")
            outcomes.append(
                simulate(
                    read,
                    nodes=count,
                    policy=policy,
                    hardware=hardware,
                    seed=seed,
                    routers=routers,
                    report_s=report,
                )
            )
            progress.advance(bar)
    if plot is not None:
        _draw(plot, outcomes, read)
    if as_json:
        print_json(
            {
                "trace": {
                    "requests": len(read.requests),
                    "prompt_tokens": read.prompt_tokens,
                    "duration_s": read.duration_s,
                    "oracle_hit_rate": oracle_hit_rate(read),
                },
                "hardware": hardware,
                "outcomes": [outcome.to_json() for outcome in outcomes],
            }
        )
        return
    out.print(
        f"{len(read.requests):,} requests in {read.duration_s:,.0f} s, {read.prompt_tokens:,} "
        f"prompt tokens; a shared cache without bounds would reuse {oracle_hit_rate(read):.1%}."
    )
    out.print(_table(outcomes))
    if any(outcome.utilization > 0.9 for outcome in outcomes):
        out.print("Where the load is near 100 %, the queue grew without end: too few nodes.")


def _read(path: Path, block_tokens: int, most: int | None) -> Trace:
    try:
        with path.open("rb") as lines:
            return read_trace(lines, block_tokens=block_tokens, most=most)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error


def _draw(path: Path, outcomes: list[Outcome], trace: Trace) -> None:
    text = picture(
        outcomes,
        title="A fleet over a request trace",
        subtitle=f"{len(trace.requests):,} requests in {trace.duration_s:,.0f} s, simulated",
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}.") from error


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("nodes", justify="right")
    table.add_column("policy")
    for name in (
        "not prefilled",
        "from own",
        "TTFT p50",
        "p90",
        "p99",
        "imbalance",
        "load",
        "moved",
    ):
        table.add_column(name, justify="right")
    for one in outcomes:
        table.add_row(
            str(one.nodes),
            one.policy,
            f"{one.hit_rate:.1%}",
            f"{one.local_rate:.1%}",
            *(f"{value:,.2f} s" for value in (one.ttft.p50_s, one.ttft.p90_s, one.ttft.p99_s)),
            f"{one.imbalance:.2f}",
            f"{one.utilization:.0%}",
            f"{one.moved_bytes / 1e12:,.2f} TB",
        )
    return table
