"""Learn the router's weights from labelled requests, and report how well they hold.

    python scripts/learn_router.py DATA.jsonl            # learn and tell what was learned
    python scripts/learn_router.py DATA.jsonl --write    # learn from all of it, write weights.json

Needs NumPy and SciPy (scikit-learn brings it); what it writes is scored in plain Python. DATA.jsonl
has one object a line: `query`, `tools` (a list of {name, description}; null unknown, [] none),
`tool_needed`, `context_needed`, `hard` (or null), `source`.

How it learns: logistic regressions whose weights may only have the sign that their feature was made
to have (more words in common with a tool can't argue against it), strongly regularised, each source
weighing the square root of its size. A query is also tried with other catalogs: with distractors
beside its own tools, with tools that lie near it but aren't its own, and with random ones. So what
is learned is the relation between a request and what is on offer, not the style of one source.

How well it holds is told by scripts/judge_router.py.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped,import-not-found,unused-ignore]

from keepwarm.router.catalog import ToolText, WordWeights, prepare_catalog
from keepwarm.router.features import (
    Seen,
    fit,
    look,
    meet,
    prepare_request,
    rough_matches,
    tool_features,
)
from keepwarm.router.model import LinearScore, Platt, Weights, weights_to_json
from keepwarm.router.types import FULL, MINIMAL, STANDARD
from keepwarm.router.words import content_stems, name_words, seen, words

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: A stem in fewer texts than this is rare: it isn't listed and weighs 1.
LISTED_FROM: Final = 4
WEIGHTS_FILE: Final = Path(__file__).parents[1] / "src" / "keepwarm" / "router" / "weights.json"
#: The most common stems that are listed; the file stays small and the rest are rare enough.
LISTED_STEMS: Final = 900
#: What a tool must share with a request's own tool to count as the same one under another name.
SAME_TOOL: Final = 0.45
#: What a label that is about a certain catalog weighs as evidence about the request itself.
OPEN_WEIGHT: Final = 0.2
#: Standard deviations below this are taken as this, so that rare features aren't blown up.
LEAST_SPREAD: Final = 0.05


@dataclass(frozen=True)
class Shape:
    """One score: its features, by the only sign each may have, and the inverse regularisation."""

    argues_for: tuple[str, ...]
    argues_against: tuple[str, ...]
    strength: float
    #: The share of requests that need it, to which the score is calibrated. An assumption, since
    #: the data's shares are their collectors': half of the requests made with a certain catalog,
    #: one in seven of those made with an unknown one; few look back, few are beyond a small prompt.
    prior: float


SHAPES: Final = {
    "tools_offered": Shape(
        argues_for=(
            "tool covered", "tool name covered", "tool purpose covered", "strongest common word",
            "common words", "common weight", "request covered", "common pairs", "same action",
            "same verb", "concepts shared", "letters in common", "tool named", "values given",
            "values for tool",
            "cue tool-words", "cue now", "cue act", "cue look-up", "imperative", "numbers",
            "quoted",
            "entities", "identifiers",
        ),
        argues_against=(
            "tool purpose missed", "other action", "concepts apart", "many tools", "values missing",
            "computes nothing", "cue explain", "cue write", "cue code", "cue advice",
            "cue small-talk", "cue story-problem", "code shown", "formula", "asks", "foreign",
        ),
        strength=0.001,
        prior=0.5,
    ),
    "tools_open": Shape(
        argues_for=(
            "cue tool-words", "cue now", "cue act", "cue look-up", "cue files", "file named",
            "imperative", "opens with a verb", "quoted", "entities", "identifiers", "self share",
            "polite", "cue compute", "cue self-question", "cue earlier",
        ),
        argues_against=(
            "cue explain", "cue write", "cue code", "cue advice", "cue small-talk",
            "cue story-problem", "cue depth", "code shown", "formula", "foreign", "listed steps",
            "sentences", "bare question",
        ),
        strength=0.003,
        prior=0.15,
    ),
    "context": Shape(
        argues_for=(
            "cue past-conversation", "cue earlier", "cue shared", "cue self-question",
            "self share", "asks",
            "asks of self", "one sentence", "ends asking",
        ),
        argues_against=(
            "cue write", "cue code", "cue compute", "cue act", "cue look-up", "cue now", "numbers",
            "quoted", "entities", "identifiers", "imperative", "formula", "code shown", "length",
            "sentences", "polite", "cue explain", "cue advice", "cue story-problem", "foreign",
        ),
        strength=0.003,
        prior=0.06,
    ),
    "depth": Shape(
        argues_for=(
            "cue depth", "cue code", "code shown", "formula", "length", "listed steps", "sentences",
            "cue steps", "numbers",
        ),
        argues_against=(
            "cue write", "cue small-talk", "cue now", "cue look-up", "cue act", "one sentence",
            "cue self-question", "entities",
        ),
        strength=0.003,
        prior=0.1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One labelled request. `tools` None: what was on offer is unknown; (): nothing was."""

    query: str
    tools: tuple[ToolText, ...] | None
    needs_tool: bool
    needs_context: bool
    is_hard: bool | None
    source: str
    id: str = ""

    @property
    def least_tier(self) -> str:
        """The smallest tier that has what the labels say is needed (hard tasks aside)."""
        return FULL if self.needs_context else STANDARD if self.needs_tool else MINIMAL


@dataclass(frozen=True)
class Example:
    """What one score learns from: features come from the query and these tools."""

    query: str
    tools: tuple[ToolText, ...]
    label: bool
    source: str
    weight: float = 1.0


def load(path: Path) -> list[Row]:
    """The rows of a JSONL file, in order."""
    rows = []
    # Not splitlines(): texts hold U+2028, which JSON leaves bare and splitlines() cuts at.
    for line in filter(None, path.read_text(encoding="utf-8").split("\n")):
        raw = json.loads(line)
        tools = raw["tools"]
        if tools is not None:
            tools = tuple(ToolText(tool["name"], tool["description"]) for tool in tools)
        rows.append(
            Row(
                query=raw["query"],
                tools=tools,
                needs_tool=raw["tool_needed"],
                needs_context=raw["context_needed"],
                is_hard=raw["hard"],
                source=raw["source"],
                id=raw["id"],
            )
        )
    return rows


def word_weights(rows: Sequence[Row]) -> WordWeights:
    """Inverse document frequencies over the requests and the distinct tools, 0.05 to 1."""
    counts: Counter[str] = Counter()
    tools = {tool for row in rows for tool in row.tools or ()}
    for row in rows:
        counts.update(content_stems(words(seen(row.query))))
    for tool in tools:
        counts.update(content_stems([*name_words(tool.name), *words(tool.description)]))
    total = len(rows) + len(tools)
    rarest = math.log(total / LISTED_FROM)
    common = sorted(counts.items(), key=lambda each: (-each[1], each[0]))[:LISTED_STEMS]
    return WordWeights(
        {
            word: max(0.05, min(1.0, math.log(total / count) / rarest))
            for word, count in common
            if count >= LISTED_FROM and word.isascii()
        }
    )


@cache
def looked(query: str) -> Seen:
    """What a query shows by itself; it doesn't depend on anything learned."""
    return look(seen(query))


def features(query: str, tools: tuple[ToolText, ...], weights: WordWeights) -> dict[str, float]:
    """All features of a query against a catalog (none: the request's own only)."""
    request = looked(query)
    if not tools:
        return request.values
    return {**request.values, **meet(request, prepare_catalog(tools, weights), weights).values}


def same_tool(one: ToolText, others: Sequence[ToolText], weights: WordWeights) -> bool:
    """Whether a tool is, by its words, one of the others under a different name."""

    def stems(tool: ToolText) -> set[str]:
        return set(content_stems([*name_words(tool.name), *words(tool.description)]))

    mine = stems(one)
    for other in others:
        theirs = stems(other)
        least = min(weights.total(mine), weights.total(theirs))
        if weights.total(mine & theirs) > SAME_TOOL * least:
            return True
    return False


def offered_examples(rows: Sequence[Row], weights: WordWeights) -> list[Example]:
    """Requests with catalogs: their own, their own among distractors, near ones, random ones."""
    dice = random.Random(len(rows))  # noqa: S311  (draws examples, keeps no secret)
    pool = sorted(
        {tool for row in rows for tool in row.tools or ()}, key=lambda t: (t.name, t.description)
    )
    whole = prepare_catalog(pool, weights)
    found: list[Example] = []
    for row in rows:
        if row.tools:
            beside = [
                tool for tool in dice.sample(pool, 24) if not same_tool(tool, row.tools, weights)
            ]
            found.append(Example(row.query, row.tools, row.needs_tool, row.source))
            crowd = [*row.tools, *beside[: dice.choice((2, 4, 8, 16))]]
            dice.shuffle(crowd)
            found.append(Example(row.query, tuple(crowd), row.needs_tool, row.source, 0.5))
        if row.tools and row.needs_tool:
            asked = prepare_request(looked(row.query), weights)
            near = [
                (fit(tool_features(asked, whole.tools[at], weights)), at)
                for at in rough_matches(asked, whole, weights, top=60)
                if not same_tool(pool[at], row.tools, weights)
            ]
            near.sort(reverse=True)
            # The very nearest often would do after all; those of middling fit are the lesson.
            if near[5:40]:
                tool = pool[dice.choice(near[5:40])[1]]
                found.append(Example(row.query, (tool,), False, f"near {row.source}"))
            if beside:
                few = tuple(beside[: dice.choice((1, 1, 2, 8))])
                found.append(Example(row.query, few, False, f"random {row.source}", 0.3))
        elif row.tools == () and not row.needs_tool:
            few = tuple(dice.sample(pool, dice.choice((1, 1, 2, 3, 8, 16))))
            found.append(Example(row.query, few, False, f"random {row.source}", 0.3))
    return found


def open_examples(rows: Sequence[Row]) -> list[Example]:
    """Requests whose catalog isn't told.

    Where a catalog was told, the label is about that catalog. A fitting tool says little about the
    request by itself, so it weighs `OPEN_WEIGHT`; a misfit says nothing, except that a question of
    general knowledge can do without: those are the only short plain questions there are.
    """
    found = []
    for row in rows:
        if not row.tools:
            found.append(Example(row.query, (), row.needs_tool, row.source))
        elif row.needs_tool:
            found.append(Example(row.query, (), True, row.source, OPEN_WEIGHT))
        elif looked(row.query).values["bare question"]:
            found.append(Example(row.query, (), False, row.source))
    return found


def context_examples(rows: Sequence[Row]) -> list[Example]:
    """Whether the answer lies in earlier conversations."""
    return [Example(row.query, (), row.needs_context, row.source) for row in rows]


def depth_examples(rows: Sequence[Row]) -> list[Example]:
    """Whether a task is known to be hard; requests made for one tool call count as easy, weakly."""
    return [
        Example(
            row.query, (), bool(row.is_hard), row.source, 1.0 if row.is_hard is not None else 0.3
        )
        for row in rows
        if row.is_hard is not None or row.tools
    ]


def examples_of(name: str, rows: Sequence[Row], weights: WordWeights) -> list[Example]:
    """The examples that one score learns from."""
    if name == "tools_offered":
        return offered_examples(rows, weights)
    return {"tools_open": open_examples, "context": context_examples, "depth": depth_examples}[
        name
    ](rows)


def balanced(examples: Sequence[Example], prior: float = 0.5) -> tuple[Bools, Floats]:
    """Labels and weights: each source the root of its size, positives `prior` of the sum."""
    sizes = Counter(each.source for each in examples)
    labels = np.array([each.label for each in examples])
    weights = np.array([each.weight / math.sqrt(sizes[each.source]) for each in examples])
    if labels.any() and not labels.all():
        for label, share in ((labels, prior), (~labels, 1.0 - prior)):
            weights[label] *= share / weights[label].sum()
    return labels, weights * len(weights) / weights.sum()


def descend(x: Floats, y: Bools, w: Floats, *, strength: float, signs: Sequence[int]) -> Floats:
    """Weights and intercept (last) of a logistic regression whose weights keep to their signs."""
    side = np.where(y, 1.0, -1.0)

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = side * (x @ point[:-1] + point[-1])
        pull = -w * side / (1.0 + np.exp(np.clip(margin, -50, 50)))
        value = strength * float(w @ np.logaddexp(0.0, -margin)) + 0.5 * float(
            point[:-1] @ point[:-1]
        )
        return value, np.append(strength * (x.T @ pull) + point[:-1], strength * pull.sum())

    bounds = [(0.0, None) if sign > 0 else (None, 0.0) for sign in signs] + [(None, None)]
    start = np.zeros(x.shape[1] + 1)
    found = minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B")
    return np.asarray(found.x, dtype=np.float64)


def platt(logits: Floats, y: Bools, w: Floats) -> Platt:
    """Slope and offset that calibrate logits; the slope stays positive, so the order is kept."""
    if y.all() or not y.any():
        return Platt()
    scale = float(np.abs(logits).mean()) or 1.0
    point = descend((logits / scale)[:, None], y, w, strength=1.0, signs=[1])
    return Platt(slope=float(point[0]) / scale, offset=float(point[1]))


@dataclass(frozen=True)
class Table:
    """One score's examples as numbers."""

    names: tuple[str, ...]
    signs: tuple[int, ...]
    x: Floats
    examples: Sequence[Example]


def table(name: str, rows: Sequence[Row], weights: WordWeights) -> Table:
    """Features of all examples of a score."""
    shape = SHAPES[name]
    names = shape.argues_for + shape.argues_against
    signs = (1,) * len(shape.argues_for) + (-1,) * len(shape.argues_against)
    examples = examples_of(name, rows, weights)
    told = [features(each.query, each.tools, weights) for each in examples]
    x = np.array([[each.get(key, 0.0) for key in names] for each in told])
    return Table(names, signs, x, examples)


def regress(name: str, data: Table, chosen: Bools) -> LinearScore:
    """One score's regression on some of its examples, with the scaling folded in."""
    x = data.x[chosen]
    y, w = balanced([each for each, kept in zip(data.examples, chosen, strict=True) if kept])
    mean, spread = x.mean(0), np.maximum(x.std(0), LEAST_SPREAD)
    strength = SHAPES[name].strength
    point = descend((x - mean) / spread, y, w, strength=strength, signs=data.signs)
    slopes = point[:-1] / spread
    used = [at for at, slope in enumerate(slopes) if abs(slope) > 1e-3]
    return LinearScore(
        name=name,
        intercept=float(point[-1] - slopes @ mean),
        weights={data.names[at]: float(slopes[at]) for at in used},
        centers={data.names[at]: float(mean[at]) for at in used},
    )


def raw_logits(score: LinearScore, data: Table) -> Floats:
    """Uncalibrated logits of a table's examples."""
    slopes = np.array([score.weights.get(name, 0.0) for name in data.names])
    return np.asarray(data.x @ slopes + score.intercept, dtype=np.float64)


def learn_score(name: str, rows: Sequence[Row], weights: WordWeights) -> LinearScore:
    """One score, calibrated on what it says of sources it hasn't seen (an inner leave-one-out)."""
    data = table(name, rows, weights)
    base = np.array([each.source.split(" ")[-1] for each in data.examples])
    held_out = np.zeros(len(base))
    for source in sorted(set(base)):
        # A score's only positive source can't be left out; its examples are split instead.
        labels = {
            each.label for each, kept in zip(data.examples, base != source, strict=True) if kept
        }
        if len(labels) == 2:
            parts = [base == source]
        else:
            halves = np.arange(len(base)) % 2 == 0
            parts = [(base == source) & halves, (base == source) & ~halves]
        for part in parts:
            held_out[part] = raw_logits(regress(name, data, ~part), data)[part]
    y, w = balanced(data.examples, SHAPES[name].prior)
    whole = regress(name, data, np.ones(len(base), dtype=bool))
    return LinearScore(name, whole.intercept, whole.weights, whole.centers, platt(held_out, y, w))


def learn(rows: Sequence[Row], *, only: Collection[str] = tuple(SHAPES)) -> Weights:
    """All scores (or some, for judging one) from labelled rows."""
    listed = word_weights(rows)
    return Weights(words=listed, scores={name: learn_score(name, rows, listed) for name in only})


def main() -> None:
    """Learn, tell what was learned, and with --write keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path, help="labelled requests, one JSON object a line")
    parser.add_argument("--write", action="store_true", help=f"write {WEIGHTS_FILE.name}")
    parser.add_argument("--to", type=Path, default=WEIGHTS_FILE, help="where --write writes")
    told = parser.parse_args()
    rows = load(told.data)
    weights = replace(learn(rows), trained_on=f"{len(rows)} requests")
    for score in weights.scores.values():
        print(f"{score.name}: {len(score.weights)} features, intercept {score.intercept:.2f}")
        for feature, weight in sorted(score.weights.items(), key=lambda each: -abs(each[1])):
            print(f"  {weight:+.2f}  {feature}")
    if told.write:
        told.to.write_text(
            json.dumps(weights_to_json(weights), indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        print(f"wrote {told.to}: {told.to.stat().st_size} bytes")


if __name__ == "__main__":
    main()
