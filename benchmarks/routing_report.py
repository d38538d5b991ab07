"""What a run of the routing benchmark comes to: pure functions of its samples, and its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from msgspec import Struct
from rich.console import Group
from rich.text import Text

from keepwarm.bench.picture import seconds_text
from keepwarm.bench.report import md_table, rich_table
from keepwarm.bench.results import MachineRecord, Prefix
from keepwarm.bench.stats import Summary, median, summarize
from keepwarm.router import AUTO, TIERS
from keepwarm.router.types import FULL, STANDARD

# Every class together.
ALL = "all"
# What small machines give a model; a tier's prompt stands in it before the task does.
WINDOWS = (4096, 8192)


class RoutingArm(Struct, frozen=True):
    """One arm. `asked` is the tier that every request names; `auto`: the router decides."""

    is_cached: bool
    asked: str

    @property
    def name(self) -> str:
        """For people."""
        cache = "on" if self.is_cached else "off"
        return f"{cache}, {'routed' if self.asked == AUTO else f'always {self.asked}'}"


COLD_FULL, COLD_ROUTED = RoutingArm(False, FULL), RoutingArm(False, AUTO)
WARM_FULL, WARM_ROUTED = RoutingArm(True, FULL), RoutingArm(True, AUTO)
WARM_STANDARD = RoutingArm(True, STANDARD)
ARMS = (COLD_FULL, COLD_ROUTED, WARM_FULL, WARM_STANDARD, WARM_ROUTED)


class RoutedRequest(Struct, frozen=True, kw_only=True):
    """One request as its client saw it.

    `task` counts from 0 within `kind`, the tier the task was written for. `chosen` is the tier it
    was sent to, `used` the one that answered: a larger one if the model asked for more, and then
    `ttft_s` holds both attempts and the tokens are the second one's. Tokens and `decode_s` are the
    engine's own counts.
    """

    arm: str
    kind: str
    task: int
    round: int
    chosen: str
    used: str
    ttft_s: float
    total_s: float
    cached_tokens: int
    prefilled_tokens: int
    decoded_tokens: int
    decode_s: float

    @property
    def prompt_tokens(self) -> int:
        """The whole prompt's."""
        return self.cached_tokens + self.prefilled_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        """Decoding alone."""
        return self.decoded_tokens / self.decode_s

    @property
    def context_tokens(self) -> int:
        """What it occupies in its slot when it is done."""
        return self.prompt_tokens + self.decoded_tokens


class RoutingReport(Struct, frozen=True, kw_only=True):
    """A whole run, as it is written to JSON.

    `row_bytes` is one token's KV state. `cold_costs_s` is what a tier takes where nothing is kept,
    in seconds; `cold_tiers` where the router then sends the tasks, those not asked too, by class.
    """

    kind: str = "routing"
    keepwarm: str
    began: str
    seconds: float
    machine: MachineRecord
    engine: str
    model: str
    settings: dict[str, str]
    row_bytes: int
    pool_tokens: int
    prefixes: Sequence[Prefix]
    cold_costs_s: dict[str, float]
    cold_tiers: dict[str, list[str]]
    samples: Sequence[RoutedRequest]
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One arm's requests of one class; tokens and speeds are medians."""

    arm: str
    kind: str
    ttft: Summary
    prompt_tokens: float
    prefilled_tokens: float
    decode_tokens_per_s: float
    kv_bytes: float


@dataclass(frozen=True, slots=True)
class Gain:
    """Routed against always the largest tier, over the tasks that both were asked.

    Medians; of all classes together means, since a mix of three has no middle. `times` is above 1
    where routing is faster; `kv_share` is the part of its KV memory that is left.
    """

    is_cached: bool
    kind: str
    n: int
    full_s: float
    routed_s: float
    decode_times: float
    kv_share: float

    @property
    def times(self) -> float:
        """How many times sooner the first token comes."""
        return self.full_s / self.routed_s


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the router sent the tasks of one class; `under` counts those below that tier."""

    kind: str
    n: int
    at: dict[str, int]
    under: int
    over: int

    @property
    def right(self) -> int:
        """At the tier they were written for."""
        return self.n - self.under - self.over


def tier_of(header: str) -> tuple[str, str]:
    """The tier that was chosen and the one that answered, of an `X-Keepwarm-Tier` header.

    `standard; escalated from minimal: tools` was chosen as minimal and answered as standard.
    """
    used, _, reason = header.partition(";")
    words = reason.split()
    chosen = words[2].rstrip(":") if words[:2] == ["escalated", "from"] else used
    return chosen.strip(), used.strip()


def _kinds(samples: Iterable[RoutedRequest]) -> list[str]:
    return [*dict.fromkeys(s.kind for s in samples), ALL]


def _of(samples: Iterable[RoutedRequest], arm: RoutingArm, kind: str) -> list[RoutedRequest]:
    return [s for s in samples if s.arm == arm.name and kind in (ALL, s.kind)]


def lines_of(samples: Sequence[RoutedRequest], row_bytes: int) -> list[Line]:
    """Samples summed up by class and arm."""
    return [
        Line(
            arm.name,
            kind,
            summarize([s.ttft_s for s in these]),
            median([s.prompt_tokens for s in these]),
            median([s.prefilled_tokens for s in these]),
            median([s.decode_tokens_per_s for s in these]),
            median([s.context_tokens * row_bytes for s in these]),
        )
        for kind in _kinds(samples)
        for arm in ARMS
        if (these := _of(samples, arm, kind))
    ]


def gains_of(samples: Sequence[RoutedRequest]) -> list[Gain]:
    """What routing gives, with the cache off and on, in each class."""
    out = []
    for full_arm, routed_arm in ((COLD_FULL, COLD_ROUTED), (WARM_FULL, WARM_ROUTED)):
        for kind in _kinds(samples):
            full = {(s.kind, s.task): s for s in _of(samples, full_arm, kind)}
            routed = {(s.kind, s.task): s for s in _of(samples, routed_arm, kind)}
            both = [(full[key], routed[key]) for key in full if key in routed]
            if not both:
                continue

            before, after = zip(*both, strict=True)
            middle = fmean if kind == ALL else median
            out.append(
                Gain(
                    full_arm.is_cached,
                    kind,
                    len(both),
                    full_s=middle([s.ttft_s for s in before]),
                    routed_s=middle([s.ttft_s for s in after]),
                    decode_times=middle([s.decode_tokens_per_s for s in after])
                    / middle([s.decode_tokens_per_s for s in before]),
                    kv_share=middle([s.context_tokens for s in after])
                    / middle([s.context_tokens for s in before]),
                )
            )
    return out


@dataclass(frozen=True, slots=True)
class Whole:
    """Whole replies of one class with the cache on, routed against always one tier; means."""

    kind: str
    n: int
    standard_s: float
    full_s: float
    routed_s: float


def whole_of(samples: Sequence[RoutedRequest]) -> list[Whole]:
    """How long whole replies take, over the tasks that all three arms were asked."""
    out = []
    for kind in _kinds(samples):
        arms = [
            {(s.kind, s.task): s.total_s for s in _of(samples, arm, kind)}
            for arm in (WARM_STANDARD, WARM_FULL, WARM_ROUTED)
        ]
        common = set.intersection(*(set(each) for each in arms))
        if common:
            means = (fmean(each[key] for key in common) for each in arms)
            out.append(Whole(kind, len(common), *means))
    return out


def placed_of(decided: Mapping[str, Sequence[str]]) -> list[Placed]:
    """Where the router sent them, from the chosen tiers of each class."""
    out = []
    pairs = [(kind, tier) for kind, tiers in decided.items() for tier in tiers]
    for kind in (*decided, ALL):
        these = [(of, tier) for of, tier in pairs if kind in (ALL, of)]
        steps = [TIERS.index(tier) - TIERS.index(of) for of, tier in these]
        at = dict(Counter(tier for _, tier in these))
        under, over = sum(step < 0 for step in steps), sum(step > 0 for step in steps)
        out.append(Placed(kind, len(these), at, under=under, over=over))
    return out


def warm_tiers(samples: Sequence[RoutedRequest]) -> dict[str, list[str]]:
    """The tiers that were chosen for each class where the cache is on and the router decides."""
    routed = _of(samples, WARM_ROUTED, ALL)
    kinds = dict.fromkeys(s.kind for s in routed)
    return {kind: [s.chosen for s in routed if s.kind == kind] for kind in kinds}


_Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], tuple[int, ...]]


def _tables(report: RoutingReport) -> list[_Table]:
    """Title, head, rows and the columns of words of each table."""
    return [
        (
            "Each arm",
            ("class", "cache, tier", "n", "TTFT", "p95", "prompt", "prefilled", "tokens/s", "KV"),
            [
                (
                    line.kind,
                    line.arm,
                    str(line.ttft.n),
                    seconds_text(line.ttft.median),
                    seconds_text(line.ttft.p95),
                    f"{line.prompt_tokens:,.0f}",
                    f"{line.prefilled_tokens:,.0f}",
                    f"{line.decode_tokens_per_s:.1f}",
                    f"{line.kv_bytes / 1e6:.1f} MB",
                )
                for line in lines_of(report.samples, report.row_bytes)
            ],
            (0, 1),
        ),
        (
            "What routing gives: routed against always full, the same tasks (medians; all: means)",
            ("cache", "class", "n", "TTFT full", "routed", "sooner", "decoding", "KV left"),
            [
                (
                    "on" if gain.is_cached else "off",
                    gain.kind,
                    str(gain.n),
                    seconds_text(gain.full_s),
                    seconds_text(gain.routed_s),
                    f"{gain.times:.2f} times",
                    f"{gain.decode_times:.2f} times",
                    f"{gain.kv_share:.0%}",
                )
                for gain in gains_of(report.samples)
            ],
            (0, 1),
        ),
        (
            "Whole replies with the cache on (means)",
            ("class", "n", "standard", "full", "routed", "than standard", "than full"),
            [
                (
                    whole.kind,
                    str(whole.n),
                    *map(seconds_text, (whole.standard_s, whole.full_s, whole.routed_s)),
                    f"{whole.standard_s / whole.routed_s:.2f} times as fast",
                    f"{whole.full_s / whole.routed_s:.2f} times as fast",
                )
                for whole in whole_of(report.samples)
            ],
            (0,),
        ),
        (
            "Where the router sent them",
            ("costs", "class", "n", *TIERS, "right", "under-tiered", "over-tiered"),
            [
                *_placed_rows("cold", report.cold_tiers),
                *_placed_rows("warm", warm_tiers(report.samples)),
            ],
            (0, 1),
        ),
        _tier_table(report),
    ]


def _placed_rows(costs: str, decided: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    return [
        (
            costs,
            placed.kind,
            str(placed.n),
            *(str(placed.at.get(tier, 0)) for tier in TIERS),
            *(f"{count / placed.n:.0%}" for count in (placed.right, placed.under, placed.over)),
        )
        for placed in placed_of(decided)
    ]


def _tier_table(report: RoutingReport) -> _Table:
    left = (f"left of {window:,}" for window in WINDOWS)
    # One after another, each from what it shares with the ones before it.
    after = accumulate(prefix.seconds for prefix in report.prefixes)
    return (
        "What a tier costs before any task: its first use, memory, room in a small window",
        ("tier", "tokens", "warm after", "KV", *left, "fit at once"),
        [
            (
                prefix.tier,
                f"{prefix.tokens:,}",
                seconds_text(after_s),
                f"{prefix.tokens * report.row_bytes / 1e6:.1f} MB",
                *(f"{max(window - prefix.tokens, 0):,}" for window in WINDOWS),
                f"{report.pool_tokens // prefix.tokens:,}",
            )
            for prefix, after_s in zip(report.prefixes, after, strict=True)
        ],
        (0,),
    )


def _facts(report: RoutingReport) -> list[str]:
    m = report.machine
    asked = _of(report.samples, WARM_ROUTED, ALL)
    return [
        f"{report.began}, {report.seconds:.0f} s",
        f"{m.processor}, {m.cores} cores, {m.system}, load {m.load} at the beginning",
        f"engine {report.engine}, model {report.model}, Keepwarm {report.keepwarm}",
        "; ".join(f"{key}: {value}" for key, value in report.settings.items()),
        f"KV: {report.row_bytes:,} bytes a token; a pool of {report.pool_tokens:,} tokens",
        "cold costs told to the router: "
        + ", ".join(f"{tier} {seconds_text(s)}" for tier, s in report.cold_costs_s.items()),
        f"asked for more and were run again one tier up: {sum(s.used != s.chosen for s in asked)} "
        f"of {len(asked)}",
        *report.notes,
    ]


def markdown(report: RoutingReport) -> str:
    """The tables, ready to be pasted into a document."""
    out = [*(f"- {fact}" for fact in _facts(report)), ""]
    for title, head, rows, words in _tables(report):
        out += [f"**{title}**", "", *md_table(head, rows, left=words)]
    return "\n".join(out).rstrip() + "\n"


def terminal(report: RoutingReport) -> Group:
    """The tables for the terminal."""
    tables = [rich_table(*table) for table in _tables(report)]
    return Group(*tables, Text("\n".join(_facts(report)), style="dim"))
