"""Judge how the router holds on requests it hasn't learned from: the figures in docs/router.md.

    python scripts/judge_router.py DATA.jsonl [--json]
    python scripts/judge_router.py DATA.jsonl --latency

Nothing that is judged was learned from. `within`: five folds, grouped by query. `pairs`: one source
with need and one without are both left out, since most sources have one label only and no AUC of
their own. `sources`: each source left out in turn, judged by the whole router as requests come to a
deployment with the packaged tiers: who brings tools has these on offer, and everybody else the
tiers' own, which may be used for anything; at default costs with every tier warm, and with none.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from learn_router import Bools, Floats, Row, load, written
from learn_router import learn as learn_rows
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from keepwarm.core.tiers import DEFAULT_AGENT_NAME
from keepwarm.router.catalog import (
    NO_TOOLS,
    UNKNOWN_TOOLS,
    CatalogCache,
    ToolCatalog,
    ToolText,
    WordWeights,
    prepare_catalog,
    tool_texts,
)
from keepwarm.router.config import DEFAULT_COSTS, RouterConfig
from keepwarm.router.decide import route, score
from keepwarm.router.features import look
from keepwarm.router.model import Weights
from keepwarm.router.types import MINIMAL, TIERS, Decision, MissCosts, RouteRequest
from keepwarm.router.words import seen
from keepwarm.tiers.files import load_tiers
from keepwarm.tiers.router_files import shipped_weights

#: The tiers that come with the project.
TIERS_DIR: Final = Path(__file__).parents[1] / "configs" / "prompt-tiers"

#: The share of requests with need that may fall under a threshold when its other side is told.
UNDER_TIERED: Final = 0.02
#: Bins of the expected calibration error, of equal width.
BINS: Final = 10

RELEVANT: Final = (
    "bfcl/simple_python", "bfcl/multiple", "bfcl/parallel", "bfcl/parallel_multiple",
)  # fmt: skip
IRRELEVANT: Final = "bfcl/irrelevance"
#: A cold prompt on two cores with a small model; what `keepwarm.core.rates` begins with.
PREFILL_S_PER_TOKEN: Final = 0.005
#: The packaged tiers' static tokens (docs/prompt-tiers.md).
TIER_TOKENS: Final = {"minimal": 241, "standard": 2083, "full": 3633}

UNNEEDED: Final = ("arena_hard_v2/hard_prompt", "arena_hard_v2/creative_writing", "routellm/gsm8k")


def learn(rows: Sequence[Row]) -> Weights:
    """Weights from labelled rows and all written ones."""
    return learn_rows([*rows, *written()])


def calibration_error(p: Floats, y: Bools) -> float:
    """ECE: the mean distance of stated and found shares over bins, weighted by their size."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float(p[bins == at].mean()) - float(y[bins == at].mean())) * int((bins == at).sum())
        for at in set(bins.tolist())
    ]
    return sum(gaps) / len(p)


def figures(p: Floats, y: Bools) -> dict[str, float]:
    """AUC, accuracy at 0.5, ECE, and the share without need below the threshold that 2 % of those
    with need fall under."""
    threshold = float(np.quantile(p[y], UNDER_TIERED))
    return {
        "requests": len(y),
        "auc": float(roc_auc_score(y, p)),
        "accuracy": float(((p > 0.5) == y).mean()),
        "ece": calibration_error(p, y),
        "unneeded_below": float((p[~y] < threshold).mean()),
    }


def catalog_of(row: Row, words: WordWeights) -> ToolCatalog:
    """A row's catalog: what was on offer, nothing, or unknown."""
    if row.tools is None:
        return UNKNOWN_TOOLS
    return prepare_catalog(row.tools, words) if row.tools else NO_TOOLS


def p_tools(rows: Sequence[Row], weights: Weights) -> Floats:
    """P(needs tools) of each row."""
    return np.array(
        [
            score(look(seen(row.query)), catalog_of(row, weights.words), weights).tools
            for row in rows
        ]
    )


def p_tools_open(rows: Sequence[Row], weights: Weights) -> Floats:
    """P(needs tools) of each row where what is on offer isn't told."""
    return np.array([score(look(seen(row.query)), UNKNOWN_TOOLS, weights).tools for row in rows])


def p_earlier(rows: Sequence[Row], weights: Weights) -> Floats:
    """P(the answer lies in earlier conversations) of each row."""
    return np.array([score(look(seen(row.query)), UNKNOWN_TOOLS, weights).context for row in rows])


def p_depth(rows: Sequence[Row], weights: Weights) -> Floats:
    """P(hard) of each row."""
    return np.array([score(look(seen(row.query)), UNKNOWN_TOOLS, weights).depth for row in rows])


def within(rows: Sequence[Row]) -> dict[str, float]:
    """The BFCL relevance sources against irrelevance, five folds grouped by query."""
    judged = [row for row in rows if row.source in (*RELEVANT, IRRELEVANT)]
    others = [row for row in rows if row.source not in (*RELEVANT, IRRELEVANT)]
    groups = [row.query.strip().lower() for row in judged]
    p = np.zeros(len(judged))
    for seen_at, held_at in GroupKFold(5).split(judged, groups=groups):
        weights = learn([*others, *(judged[at] for at in seen_at)])
        p[held_at] = p_tools([judged[at] for at in held_at], weights)
    return figures(p, np.array([row.needs_tool for row in judged]))


def pair(
    rows: Sequence[Row],
    held: Callable[[Row], bool],
    scored: Callable[[Sequence[Row], Weights], Floats],
    label: Callable[[Row], bool],
) -> dict[str, float]:
    """Figures on the rows held out, learned from all others."""
    weights = learn([row for row in rows if not held(row)])
    judged = [row for row in rows if held(row)]
    return figures(scored(judged, weights), np.array([label(row) for row in judged]))


def pairs(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Pairs of unseen sources, for each score."""
    found: dict[str, dict[str, float]] = {}
    for needed in RELEVANT:
        found[f"tools offered: {needed} / {IRRELEVANT}"] = pair(
            rows, _from(needed, IRRELEVANT), p_tools, lambda row: row.needs_tool
        )
    for unneeded in UNNEEDED:
        found[f"tools unknown: bfcl/multi_turn_base / {unneeded}"] = pair(
            rows, _from("bfcl/multi_turn_base", unneeded), p_tools_open, lambda row: row.needs_tool
        )
    for scenario in sorted({_scenario(row) for row in rows if row.needs_context}):
        found[f"context: memory {scenario} / half of the others"] = pair(
            rows, _scenario_and_half(rows, scenario), p_earlier, lambda row: row.needs_context
        )
    for family in ("arena_hard_v2", "routellm"):
        sources = {row.source for row in rows if row.source.startswith(family)}
        found[f"depth: {family}"] = pair(
            rows, _from(*sources), p_depth, lambda row: bool(row.is_hard)
        )
    return found


def _from(*sources: str) -> Callable[[Row], bool]:
    return lambda row: row.source in sources


def _scenario(row: Row) -> str:
    """BFCL's memory requests come from five scenarios, each about one person."""
    return row.id.split("-")[1]


def _scenario_and_half(rows: Sequence[Row], scenario: str) -> Callable[[Row], bool]:
    """One scenario, and every second of the sources without need."""
    others = sorted({family_of(row.source) for row in rows if not row.needs_context})[::2]

    def held(row: Row) -> bool:
        if row.needs_context:
            return _scenario(row) == scenario
        return family_of(row.source) in others

    return held


def family_of(source: str) -> str:
    """Sources left out together: MT-Bench's are a handful of requests each."""
    return source.split("/", maxsplit=1)[0] if source.startswith("mt_bench") else source


def left_out(rows: Sequence[Row]) -> dict[str, list[tuple[Row, Decision]]]:
    """Each row's decision by a router that hasn't seen its source, with all warm and all cold."""
    own = tool_texts(
        [tool for tier in load_tiers(TIERS_DIR, DEFAULT_AGENT_NAME) for tool in tier.tools]
    )
    cold = [
        replace(cost, first_s=cost.first_s + TIER_TOKENS[cost.tier] * PREFILL_S_PER_TOKEN)
        for cost in DEFAULT_COSTS
    ]
    found: dict[str, list[tuple[Row, Decision]]] = {"warm": [], "cold": []}
    for source in sorted({family_of(row.source) for row in rows}):
        weights = learn([row for row in rows if family_of(row.source) != source])
        packaged = prepare_catalog(own, weights.words, is_open=True)
        for row in rows:
            if family_of(row.source) != source:
                continue
            catalog = prepare_catalog(row.tools, weights.words) if row.tools else packaged
            request = RouteRequest(text=row.query)
            for name, costs in (("warm", DEFAULT_COSTS), ("cold", cold)):
                decision = route(request, catalog, costs, RouterConfig(), weights)
                found[name].append((row, decision))
    return found


def shares(decided: Sequence[tuple[Row, Decision]]) -> dict[str, Any]:
    """Where requests went, and how many got less than they need.

    `left_small`: those that need something, went to minimal, and don't come back by escalation, by
    the shares that were measured (`MissCosts`).
    """
    at = Counter(decision.tier for _, decision in decided)
    unneeded = [d for row, d in decided if row.least_tier == MINIMAL]
    needed = [(row, d) for row, d in decided if row.least_tier != MINIMAL]
    small = [row for row, d in needed if d.tier == MINIMAL]
    costs = MissCosts()
    stay = sum(1.0 - (costs.context_told if r.needs_context else costs.tools_told) for r in small)
    hard = [d for row, d in decided if row.is_hard]

    def share(count: float, of: Sequence[object]) -> float | None:
        return count / len(of) if of else None

    return {
        "requests": len(decided),
        **{tier: at[tier] / len(decided) for tier in TIERS},
        "none_to_minimal": share(sum(d.tier == MINIMAL for d in unneeded), unneeded),
        "need_to_minimal": share(len(small), needed),
        "left_small": share(stay, needed),
        "hard_above": share(sum(d.tier != MINIMAL for d in hard), hard),
        "reasons": dict(Counter(str(d.reason) for _, d in decided).most_common()),
    }


def judge(rows: Sequence[Row]) -> dict[str, Any]:
    """All figures."""
    decided = left_out(rows)
    by_source: dict[str, list[tuple[Row, Decision]]] = defaultdict(list)
    for row, decision in decided["warm"]:
        by_source[family_of(row.source)].append((row, decision))
    y = np.array([row.least_tier != MINIMAL for row, _ in decided["warm"]])
    p = np.array([max(d.p_tools, d.p_context) for _, d in decided["warm"]])
    return {
        "within": within(rows),
        "pairs": pairs(rows),
        "pooled": figures(p, y),
        "all": shares(decided["warm"]),
        "cold": shares(decided["cold"]),
        "sources": {source: shares(of_source) for source, of_source in by_source.items()},
    }


def latency(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds a decision takes with 100 tools on offer, by the shipped weights.

    `cached`: the tools list has been seen before, as in an agent's every request; `new`: it hasn't.
    Each request's tools are fresh objects, as they are after a body was parsed. It is this thread's
    time, so that other programs on the machine count as little as possible.
    """
    dice = random.Random(1)  # noqa: S311  (draws requests, keeps no secret)
    pool = sorted({tool for row in rows for tool in row.tools or ()}, key=lambda t: t.name)
    tools = dice.sample(pool, 100)
    weights = shipped_weights()
    found = {}
    for name, count in (("cached", 2000), ("new", 200)):
        cache = CatalogCache(weights.words)
        cache.get(tools)
        took = []
        for row in dice.sample(list(rows), count):
            offered = tuple(ToolText(tool.name, tool.description) for tool in tools)
            if name == "new":
                cache = CatalogCache(weights.words)
            start = time.thread_time()
            route(RouteRequest(text=row.query), cache.get(offered), (), RouterConfig(), weights)
            took.append(1e3 * (time.thread_time() - start))
        told = np.quantile(took, (0.5, 0.95, 0.99))
        found[name] = dict(zip(("p50_ms", "p95_ms", "p99_ms"), map(float, told), strict=True))
    return found


def main() -> None:
    """Print the figures, as text or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--latency", action="store_true", help="only how long a decision takes")
    told = parser.parse_args()
    if told.latency:
        print(json.dumps(latency(load(told.data)), indent=1))
        return
    found = judge(load(told.data))
    if told.json:
        print(json.dumps(found, indent=1))
        return
    heads = ("requests", "auc", "accuracy", "ece", "unneeded_below")
    print(f"{'left out':<58}" + "".join(f"{head:>15}" for head in heads))
    for name, row in {
        "within": found["within"],
        "pooled": found["pooled"],
        **found["pairs"],
    }.items():
        print(f"{name:<58}" + "".join(f"{row[head]:>15.3f}" for head in heads))
    columns = (
        *("requests", *TIERS),
        *("none_to_minimal", "need_to_minimal", "left_small", "hard_above"),
    )
    print(f"\n{'source left out':<34}" + "".join(f"{head:>17}" for head in columns))
    for name, row in {
        "all, every tier warm": found["all"],
        "all, every tier cold": found["cold"],
        **found["sources"],
    }.items():
        cells = ("-" if row[head] is None else f"{row[head]:.3f}" for head in columns)
        print(f"{name:<34}" + "".join(f"{cell:>17}" for cell in cells))
        print(f"    {row['reasons']}")


if __name__ == "__main__":
    main()
