"""`keepwarm bench`: before and after against any model, and what the gateway costs."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.status import Status

from keepwarm.bench.arms import ARMS
from keepwarm.bench.picture import seconds_text
from keepwarm.bench.report import markdown, svg, terminal
from keepwarm.bench.results import BenchReport, Sample, write_json
from keepwarm.bench.run import BEFORE_AFTER, SCENARIOS, BenchScale, run_bench
from keepwarm.cli import options as opt
from keepwarm.cli.interrupt import run_until_interrupted
from keepwarm.cli.output import err, out, print_json
from keepwarm.errors import ConfigError
from keepwarm.tiers.files import deployed_tiers


def bench(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCENARIO...",
            help=f"Any of {', '.join(SCENARIOS)}, or all. [default: {' '.join(BEFORE_AFTER)}]",
        ),
    ] = None,
    config: opt.ConfigFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    arms: Annotated[
        str, typer.Option("--arms", metavar="NAMES", help="Arms to compare, with commas.")
    ] = ",".join(ARMS),
    runs: Annotated[int, typer.Option("--runs", min=1, help="How often each scenario runs.")] = 1,
    requests: Annotated[
        int,
        typer.Option("--requests", min=1, help="Requests in `identical`, `new`, and `unknown`."),
    ] = 10,
    pairs: Annotated[
        int,
        typer.Option(
            "--pairs", min=1, help="Pairs of requests in `overhead`, of bursts in `page`."
        ),
    ] = 200,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Rounds of both ways in `load`, `unknown`.")
    ] = 5,
    starts: Annotated[int, typer.Option("--starts", min=1, help="Starts in `ready`.")] = 5,
    directory: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the results go.")
    ] = Path("bench-results"),
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the report as Markdown.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Measure time to first token before and after, side by side in one run.

    The arms take turns request by request: no-cache, llama-server with its defaults, Keepwarm. Each
    run writes JSON, Markdown and a picture. See docs/benchmark.md.

    Examples:

      keepwarm bench --model m.gguf

      keepwarm bench overhead ready --model m.gguf

      keepwarm bench all --runs 3 --model m.gguf --engine ~/bin/llama-server
    """
    flags = opt.engine_flags(
        model=model,
        engine=engine,
        upstream=None,
        slot_dir=None,
        slots=slots,
        context=context,
        threads=threads,
        tiers=tiers,
        chat_template=chat_template,
        store=None,
    )
    settings, places = opt.settings_from(config, flags)
    chosen = tuple(scenarios or BEFORE_AFTER)
    tier_files, loaded = deployed_tiers(settings.tiers, places)
    # Where Keepwarm's own process would look depends on where it runs.
    found = msgspec.structs.replace(settings.tiers, dir=str(tier_files.absolute()))
    settings = msgspec.structs.replace(settings, tiers=found)
    with _Line() as line:
        report = run_until_interrupted(
            run_bench(
                settings,
                loaded,
                chosen=SCENARIOS if "all" in chosen else chosen,
                arms=_arms(arms),
                scale=BenchScale(
                    runs=runs, requests=requests, pairs=pairs, rounds=rounds, starts=starts
                ),
                watcher=line,
            )
        )
    written = _write(report, directory)
    if as_json:
        print_json(report)
    elif as_markdown:
        out.print(markdown(report), markup=False, soft_wrap=True)
    else:
        out.print(terminal(report))
    for path in written:
        err.print(str(path), markup=False, soft_wrap=True)


def _arms(names: str) -> list[str]:
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in asked if name not in ARMS]:
        raise ConfigError(f"There is no arm {unknown[0]!r}. Arms: {', '.join(ARMS)}.")
    return asked


def _write(report: BenchReport, directory: Path) -> list[Path]:
    """The report in its three forms, under the time it was begun."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = f"bench-{datetime.fromisoformat(report.began):%Y%m%d-%H%M%S}"
    data, text, picture = (directory / f"{stem}.{end}" for end in ("json", "md", "svg"))
    write_json(report, data)
    text.write_text(markdown(report), encoding="utf-8")
    if not (report.samples or report.durations):
        return [data, text]  # amounts alone, of `idle`, have no times to draw
    picture.write_text(svg(report), encoding="utf-8")
    return [data, text, picture]


class _Line:
    """What is being measured, on a status line; a line for each answer when not on a terminal."""

    def __init__(self) -> None:
        self._status = Status("", console=err)

    def __enter__(self) -> _Line:
        """Begin to draw."""
        if err.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the line."""
        self._status.stop()

    def doing(self, text: str) -> None:
        """See `Watcher`."""
        self._status.update(text)

    def measured(self, sample: Sample) -> None:
        """See `Watcher`."""
        err.print(
            f"{sample.scenario:14}{sample.step:26}{sample.arm:14}{seconds_text(sample.ttft_s):>9}"
            f"{sample.prefilled_tokens:7,} prefilled {sample.cached_tokens:7,} cached  "
            f"{sample.plan}",
            markup=False,
            soft_wrap=True,
            style="dim",
        )
