"""Measure the model as a judge of tiers, against the scores: is `tiers.judge` worth turning on?

    keepwarm serve --model MODEL.gguf                    # in another terminal
    python scripts/ask_judge.py DATA.jsonl [--url URL] [--limit N]

DATA.jsonl has an object a line with `query`, `tools`, `tool_needed`, `context_needed`, as in
docs/router.md. The model is asked about all of them. *In doubt* are those where the deployment
would ask: a sure answer would save more than `--asking-s` seconds twice over. Its question is the
system prompt of these requests, so it is prefilled once and warm afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from keepwarm.cli.output import err
from keepwarm.router import DEFAULT_COSTS, NO_TOOLS, TIERS, UNKNOWN_TOOLS, RouterConfig, route
from keepwarm.router.catalog import CatalogCache, ToolText
from keepwarm.router.judge import judges_prompt, question_of, verdict_of
from keepwarm.router.types import FULL, MINIMAL, STANDARD, RouteRequest
from keepwarm.tiers.router_files import shipped_weights


class Row(NamedTuple):
    """One request: the tier its labels ask for, the scores' choice, the model's, what it took."""

    needed: str
    scores: str
    doubt_s: float
    model: str | None
    seconds: float


def needed_tier(given: dict[str, Any]) -> str:
    """What the labels say: context needs full, tools standard."""
    if given["context_needed"]:
        return FULL
    return STANDARD if given["tool_needed"] else MINIMAL


def asked(url: str, text: str) -> tuple[str | None, float]:
    """The model's verdict, and the seconds it took."""
    body = question_of(text)
    system = {"role": "system", "content": judges_prompt().messages[0].text}
    body["messages"] = [system, *body["messages"]]
    request = urllib.request.Request(  # noqa: S310 - the user's own address
        f"{url.rstrip('/')}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        said = json.load(reply)["choices"][0]["message"]["content"]
    return verdict_of(said), time.perf_counter() - began


def told(name: str, pairs: list[tuple[str, str]]) -> str:
    """One line of the table, of (needed, chosen) pairs."""
    if not pairs:
        return f"| {name} | 0 | | | |"
    right = sum(needed == chosen for needed, chosen in pairs)
    under = sum(TIERS.index(chosen) < TIERS.index(needed) for needed, chosen in pairs)
    easy = [chosen for needed, chosen in pairs if needed == MINIMAL]
    small = f"{sum(c == MINIMAL for c in easy) / len(easy):.1%}" if easy else "-"
    n = len(pairs)
    return f"| {name} | {n} | {right / n:.1%} | {under / n:.1%} | {small} |"


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8090")
    parser.add_argument("--limit", type=int, default=300, help="so many, drawn by chance")
    parser.add_argument("--asking-s", type=float, default=0.3, help="what asking costs")
    args = parser.parse_args()
    with args.data.open(encoding="utf-8") as lines_in:
        given = [json.loads(line) for line in lines_in]
    random.Random(1).shuffle(given)  # noqa: S311 - not for secrets
    weights = shipped_weights()
    catalogs = CatalogCache(weights.words)
    rows: list[Row] = []
    for one in track(given[: args.limit], "asking the model", console=err):
        texts = tuple(ToolText(t["name"], t["description"]) for t in one["tools"] or [])
        catalog = catalogs.get(texts) if texts else NO_TOOLS
        if one["tools"] is None:
            catalog = UNKNOWN_TOOLS
        said = RouteRequest(one["query"], tools=texts or None)
        decision = route(said, catalog, DEFAULT_COSTS, RouterConfig(), weights)
        model, took_s = asked(args.url, one["query"])
        rows.append(Row(needed_tier(one), decision.tier, decision.doubt_s, model, took_s))
    doubted = [row for row in rows if row.doubt_s > 2 * args.asking_s]
    seconds = sorted(row.seconds for row in rows)
    lines = [
        "| who | requests | tier right | under-tiered | no need, to minimal |",
        "|---|---|---|---|---|",
        told("rules and scores", [(r.needed, r.scores) for r in rows]),
        told("the model alone", [(r.needed, r.model or r.scores) for r in rows]),
        told(
            "the model where scores doubt",
            [(r.needed, (r.model or r.scores) if r in doubted else r.scores) for r in rows],
        ),
        told("in doubt, by scores", [(r.needed, r.scores) for r in doubted]),
        told("in doubt, by the model", [(r.needed, r.model or r.scores) for r in doubted]),
    ]
    sys.stdout.write("\n".join(lines) + "\n\n")
    sys.stdout.write(
        f"A verdict took {1e3 * statistics.median(seconds):.0f} ms at the median, "
        f"{1e3 * seconds[int(0.95 * len(seconds))]:.0f} ms at the 95th percentile; "
        f"{sum(row.model is None for row in rows)} were none.\n"
    )


if __name__ == "__main__":
    main()
