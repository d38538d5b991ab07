"""A report for people: Markdown, a terminal table, and the rows of its picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from keepwarm.bench.ahead import OFF, ON
from keepwarm.bench.arms import DEFAULTS, KEEPWARM, NO_CACHE
from keepwarm.bench.picture import GREY, ORANGE, TEAL, Panel, Row, Value, picture, seconds_text
from keepwarm.bench.results import Amount, BenchReport, Duration, Figure, Sample, select, ttfts
from keepwarm.bench.scenarios import SETTLING
from keepwarm.bench.stats import Summary, median, summarize

# What each scenario's table is headed with.
TITLES = {
    "first": "First request on each tier after a start with nothing saved",
    "identical": "Identical requests",
    "new": "New conversations",
    "restart": "After the engine's SIGKILL",
    "overhead": "An identical request through Keepwarm and directly to the engine's hot slot",
    "unknown": "Prompts of the client's own that nobody has seen before",
    "load": "Sixteen clients at a time, through Keepwarm and directly to the engine",
    "page": "Bursts of sixteen requests, with the page's event stream open and without",
    "idle": "Resident memory of the gateway with 200 idle streams",
    "cache_reuse": "A prompt of which a part was moved (--cache-reuse)",
    "ready": "Start to ready with every tier saved",
    "switch": "One slot, from tier to tier",
    "conversations": "Several conversations at a time",
    "ahead": "The next turn, prefilled while nobody asks",
}


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One step in one arm."""

    step: str
    arm: str
    ttft: Summary
    cached_tokens: float
    prefilled_tokens: float
    plans: str


def lines_of(samples: Sequence[Sample], scenario: str) -> list[ReportLine]:
    """A scenario's samples summed up by step and arm, in the order they were measured."""
    chosen = [s for s in select(samples, scenario=scenario) if s.step != SETTLING]
    steps = dict.fromkeys(s.step for s in chosen)
    arms = dict.fromkeys(s.arm for s in samples)
    out = []
    for step in steps:
        for arm in arms:
            if not (these := select(chosen, step=step, arm=arm)):
                continue
            plans = dict.fromkeys(s.plan for s in these if s.plan)
            out.append(
                ReportLine(
                    step,
                    arm,
                    summarize(ttfts(these)),
                    median([s.cached_tokens for s in these]),
                    median([s.prefilled_tokens for s in these]),
                    ", ".join(plans),
                )
            )
    return out


_HEAD = ("step", "arm", "n", "median", "p95", "min", "max", "cached", "prefilled", "plan")
_TEXT_COLUMNS = (0, 1, 9)


def _cells(line: ReportLine) -> tuple[str, ...]:
    t = line.ttft
    times = (seconds_text(v) for v in (t.median, t.p95, t.minimum, t.maximum))
    tokens = (f"{line.cached_tokens:,.0f}", f"{line.prefilled_tokens:,.0f}")
    return (line.step, line.arm, str(t.n), *times, *tokens, line.plans)


_DURATION_HEAD = ("step", "arm", "n", "median", "min", "max")


def _duration_rows(durations: Sequence[Duration], scenario: str) -> list[tuple[str, ...]]:
    chosen = [d for d in durations if d.scenario == scenario]
    out = []
    for step, arm in dict.fromkeys((d.step, d.arm) for d in chosen):
        s = summarize([d.seconds for d in chosen if (d.step, d.arm) == (step, arm)])
        times = (seconds_text(v) for v in (s.median, s.minimum, s.maximum))
        out.append((step, arm, str(s.n), *times))
    return out


_AMOUNT_HEAD = (*_DURATION_HEAD, "unit")


def _amount_rows(amounts: Sequence[Amount], scenario: str) -> list[tuple[str, ...]]:
    chosen = [a for a in amounts if a.scenario == scenario]
    out = []
    for step, arm, unit in dict.fromkeys((a.step, a.arm, a.unit) for a in chosen):
        s = summarize([a.value for a in chosen if (a.step, a.arm, a.unit) == (step, arm, unit)])
        values = (_plain(v) for v in (s.median, s.minimum, s.maximum))
        out.append((step, arm, str(s.n), *values, unit))
    return out


def _scenarios(report: BenchReport) -> list[str]:
    seen = {s.scenario for s in report.samples} | {d.scenario for d in report.durations}
    seen |= {a.scenario for a in report.amounts}
    return [name for name in TITLES if name in seen]


def _verdict(figure: Figure) -> str:
    return "" if figure.met is None else ("reached" if figure.met else "MISSED")


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _figure_row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.what,
        f"{_plain(figure.value)} {figure.unit}",
        figure.goal,
        _verdict(figure),
        figure.detail,
    )


_FIGURE_HEAD = ("what", "measured", "goal", "", "how it comes about")


def _facts(report: BenchReport) -> list[str]:
    m = report.machine
    facts = [
        f"{report.began}, {report.seconds:.0f} s",
        f"{m.processor}, {m.cores} cores, {m.system}, load {m.load} at the beginning",
        f"engine {report.engine}, model {report.model}, Keepwarm {report.keepwarm}",
        "; ".join(f"{key}: {value}" for key, value in report.settings.items()),
    ]
    if report.prefixes:
        warmed = ", ".join(
            f"{p.tier} {p.tokens:,} tokens ({p.how} in {p.seconds:.1f} s)" for p in report.prefixes
        )
        facts.append(f"tiers: {warmed}; the store takes {report.store_bytes / 1e6:.1f} MB on disk")
    return [*facts, *report.notes]


def markdown(report: BenchReport) -> str:
    """The whole report, ready to be pasted into a document."""
    out = [*(f"- {fact}" for fact in _facts(report)), ""]
    if report.figures:
        out += md_table(_FIGURE_HEAD, [_figure_row(f) for f in report.figures])
    for scenario in _scenarios(report):
        out += [f"### {TITLES[scenario]}", ""]
        if lines := lines_of(report.samples, scenario):
            out += md_table(_HEAD, [_cells(line) for line in lines], left=_TEXT_COLUMNS)
        if rows := _duration_rows(report.durations, scenario):
            out += md_table(_DURATION_HEAD, rows, left=(0, 1))
        if rows := _amount_rows(report.amounts, scenario):
            out += md_table(_AMOUNT_HEAD, rows, left=(0, 1, 6))
    return "\n".join(out).rstrip() + "\n"


def md_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] | None = None
) -> list[str]:
    """A Markdown table and an empty line; `left` are the columns of words, None: all are."""
    align = ["---" if left is None or i in left else "---:" for i in range(len(head))]
    lines = [head, align, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def terminal(report: BenchReport) -> Group:
    """The report as tables for the terminal."""
    parts: list[Table | Text] = []
    for scenario in _scenarios(report):
        if lines := lines_of(report.samples, scenario):
            parts.append(
                rich_table(TITLES[scenario], _HEAD, [_cells(x) for x in lines], _TEXT_COLUMNS)
            )
        if rows := _duration_rows(report.durations, scenario):
            parts.append(rich_table(TITLES[scenario], _DURATION_HEAD, rows, (0, 1)))
        if rows := _amount_rows(report.amounts, scenario):
            parts.append(rich_table(TITLES[scenario], _AMOUNT_HEAD, rows, (0, 1, 6)))
    if report.figures:
        rows = [_figure_row(f) for f in report.figures]
        parts.append(rich_table("What it comes to", _FIGURE_HEAD, rows, range(5)))
    parts.append(Text("\n".join(_facts(report)), style="dim"))
    return Group(*parts)


def rich_table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int]
) -> Table:
    """A table of plain text; `left` are the columns of words, the others are numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=box.SIMPLE_HEAD,
    )
    texts = set(left)
    for i, name in enumerate(head):
        # Numbers stay whole; words are broken where the terminal is narrow.
        words = i in texts
        table.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def svg(report: BenchReport) -> str:
    """The report's picture: a panel for each scenario, medians with their range.

    Raises:
        ValueError: nothing was measured.
    """
    panels = [
        Panel(TITLES[scenario], rows, kind="dots")
        for scenario in _scenarios(report)
        if (rows := _rows(report, scenario))
    ]
    m = report.machine
    subtitle = (
        f"time to first token, logarithmic; dot: median, line: least to most; {report.model}; "
        f"{m.cores} cores"
    )
    colors = {NO_CACHE: GREY, OFF: GREY, DEFAULTS: ORANGE, KEEPWARM: TEAL, ON: TEAL}
    return picture("Keepwarm benchmark", subtitle, panels, colors=colors)


def _rows(report: BenchReport, scenario: str) -> list[Row]:
    rows: dict[str, list[Value]] = {}
    for line in lines_of(report.samples, scenario):
        t = line.ttft
        mark = Value(line.arm, t.median, t.minimum, t.maximum)
        rows.setdefault(line.step, []).append(mark)
    if not rows:
        for d in (d for d in report.durations if d.scenario == scenario):
            rows.setdefault(d.step, [])
            if d.arm not in {m.series for m in rows[d.step]}:
                these = [
                    e.seconds
                    for e in report.durations
                    if (e.scenario, e.step, e.arm) == (scenario, d.step, d.arm)
                ]
                rows[d.step].append(Value(d.arm, median(these), min(these), max(these)))
    return [Row(step, marks) for step, marks in rows.items()]
