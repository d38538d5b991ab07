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
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize  # type: ignore[import-untyped,import-not-found,unused-ignore]
from scipy.sparse import csr_matrix, hstack  # type: ignore[import-untyped,import-not-found,unused-ignore]

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
#: A gram in fewer examples than this isn't weighed.
GRAM_FROM: Final = 2
#: Gram weights below this aren't kept: together they move no probability by a hundredth.
LEAST_GRAM: Final = 0.02
EXAMPLES_FILE: Final = Path(__file__).with_name("router_examples.txt")
#: How many requests a written line with alternatives becomes, and what share of all requests gets
#: a sentence put before it.
FROM_A_LINE: Final = 8
WITH_SENTENCE: Final = 0.3
#: What a written request weighs: few say what many of a collector's do.
WRITTEN_WEIGHT: Final = 3.0
#: Parts that the sources are dealt into when a score is calibrated on what it hasn't seen.
PARTS: Final = 6


@dataclass(frozen=True)
class Shape:
    """One score: its features, by the only sign each may have, and the inverse regularisation."""

    argues_for: tuple[str, ...]
    argues_against: tuple[str, ...]
    strength: float
    #: Whether single words and pairs are weighed too, beside the features.
    has_grams: bool = False
    #: The share of requests that need it, to which the score is calibrated. An assumption, since
    #: the data's shares are their collectors': two in three of the requests that bring tools of
    #: their own, three in ten of those made with the tiers' tools or unknown ones; few look back,
    #: few are beyond a small prompt.
    prior: float = 0.5


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
        prior=0.65,
    ),
    "tools_open": Shape(
        argues_for=(
            "cue tool-words", "cue now", "cue act", "cue look-up", "cue files", "file named",
            "identifiers", "self share", "cue self-question", "cue earlier", "cue shared",
            "cue past-conversation", "asks of self",
        ),
        argues_against=(
            "cue explain", "cue write", "cue code", "cue advice", "cue small-talk",
            "cue story-problem", "cue depth", "code shown", "formula", "foreign", "bare question",
        ),
        strength=0.3,
        has_grams=True,
        prior=0.3,
    ),
    "context": Shape(
        argues_for=(
            "cue past-conversation", "cue earlier", "cue shared", "cue self-question",
            "self share", "asks of self",
        ),
        argues_against=(
            "cue write", "cue code", "cue compute", "cue act", "cue look-up", "cue now",
            "identifiers", "formula", "code shown", "cue explain", "cue advice",
            "cue story-problem", "foreign", "cue files", "file named",
        ),
        strength=0.3,
        has_grams=True,
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
    def is_written(self) -> bool:
        """Whether it was written for learning."""
        return self.source.startswith("written/")

    @property
    def counts(self) -> float:
        """What it weighs among examples of the request alone."""
        return WRITTEN_WEIGHT if self.is_written else 1.0

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


def written(path: Path = EXAMPLES_FILE) -> list[Row]:
    """The requests that were written for learning, with their alternatives drawn."""
    dice = random.Random(1)  # noqa: S311  (draws examples, keeps no secret)
    lines: dict[str, list[str]] = {}
    kind = ""
    for line in map(str.strip, path.read_text(encoding="utf-8").split("\n")):
        if line.startswith("["):
            kind = line[1:-1]
        elif line and not line.startswith("#"):
            lines.setdefault(kind, []).append(line)
    rows = []
    for kind in ("nothing", "tools", "context"):
        for line in lines[kind]:
            varies = "{" in line
            drawn = [_drawn(line, dice) for _ in range(FROM_A_LINE if varies else 1)]
            for text in dict.fromkeys(drawn):
                led = text.isascii() and dice.random() < WITH_SENTENCE
                rows.append(
                    Row(
                        query=f"{dice.choice(lines['around'])} {text}" if led else text,
                        tools=() if kind == "nothing" else None,
                        needs_tool=kind != "nothing",
                        needs_context=kind == "context",
                        is_hard=None,
                        source=f"written/{kind}{' varied' if varies else ''}",
                    )
                )
    for line in lines["with tools"]:
        text, _, tool = line.partition(" => ")
        offered = ToolText(*tool.split(": ", maxsplit=1))
        rows.append(
            Row(
                query=text,
                tools=(offered,),
                needs_tool=True,
                needs_context=False,
                is_hard=None,
                source="written/with tools",
            )
        )
    return rows


def _drawn(line: str, dice: random.Random) -> str:
    """A line with one of each of its alternatives."""
    while found := re.search(r"\{([^{}]*)\}", line):
        line = line[: found.start()] + dice.choice(found[1].split("|")) + line[found.end() :]
    return " ".join(line.split())


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
            found.append(Example(row.query, (), row.needs_tool, row.source, row.counts))
        elif row.needs_tool:
            found.append(Example(row.query, (), True, row.source, OPEN_WEIGHT))
        elif looked(row.query).values["bare question"]:
            found.append(Example(row.query, (), False, row.source))
    return found


def context_examples(rows: Sequence[Row]) -> list[Example]:
    """Whether the answer lies in earlier conversations."""
    return [Example(row.query, (), row.needs_context, row.source, row.counts) for row in rows]


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
        plain = ("written/with tools", "written/nothing")
        chosen = [row for row in rows if not row.is_written or row.source in plain]
        return offered_examples(chosen, weights)
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


def descend(
    x: Floats | csr_matrix, y: Bools, w: Floats, *, strength: float, signs: Sequence[int]
) -> Floats:
    """Weights and intercept (last) of a logistic regression whose weights keep to their signs.

    A sign of 0 leaves a weight free.
    """
    side = np.where(y, 1.0, -1.0)

    def loss(point: Floats) -> tuple[float, Floats]:
        margin = side * (x @ point[:-1] + point[-1])
        pull = -w * side / (1.0 + np.exp(np.clip(margin, -50, 50)))
        value = strength * float(w @ np.logaddexp(0.0, -margin)) + 0.5 * float(
            point[:-1] @ point[:-1]
        )
        return value, np.append(strength * (x.T @ pull) + point[:-1], strength * pull.sum())

    free = {1: (0.0, None), -1: (None, 0.0), 0: (None, None)}
    bounds = [free[sign] for sign in signs] + [(None, None)]
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
    """One score's examples as numbers. `grams` are columns behind the features', none for some."""

    names: tuple[str, ...]
    signs: tuple[int, ...]
    x: Floats
    examples: Sequence[Example]
    grams: tuple[str, ...] = ()
    gram_x: csr_matrix | None = None


def table(name: str, rows: Sequence[Row], weights: WordWeights) -> Table:
    """Features of all examples of a score."""
    shape = SHAPES[name]
    names = shape.argues_for + shape.argues_against
    signs = (1,) * len(shape.argues_for) + (-1,) * len(shape.argues_against)
    examples = examples_of(name, rows, weights)
    told = [features(each.query, each.tools, weights) for each in examples]
    x = np.array([[each.get(key, 0.0) for key in names] for each in told])
    if not shape.has_grams:
        return Table(names, signs, x, examples)
    seen_by = [looked(each.query) for each in examples]
    counts = Counter(gram for each in seen_by for gram in each.grams)
    grams = tuple(sorted(gram for gram, count in counts.items() if count >= GRAM_FROM))
    at = {gram: column for column, gram in enumerate(grams)}
    cells = [
        (row, at[gram], each.gram_share)
        for row, each in enumerate(seen_by)
        for gram in each.grams
        if gram in at
    ]
    where, column, share = zip(*cells, strict=True)
    gram_x = csr_matrix((share, (where, column)), shape=(len(examples), len(grams)))
    return Table(names, signs, x, examples, grams, gram_x)


def regress(name: str, data: Table, chosen: Bools) -> LinearScore:
    """One score's regression on some of its examples, with the scaling folded in.

    Features are scaled by their spread; beside grams, which are many and small, by a half.
    """
    x = data.x[chosen]
    y, w = balanced([each for each, kept in zip(data.examples, chosen, strict=True) if kept])
    mean, spread = x.mean(0), np.maximum(x.std(0), LEAST_SPREAD)
    signs = data.signs
    columns: Floats | csr_matrix
    if data.gram_x is None:
        columns = (x - mean) / spread
    else:
        mean, spread = mean * 0.0, mean * 0.0 + 2.0
        columns = hstack([csr_matrix(x / spread), data.gram_x[np.flatnonzero(chosen)]]).tocsr()
        signs += (0,) * len(data.grams)
    point = descend(columns, y, w, strength=SHAPES[name].strength, signs=signs)
    slopes = point[: len(data.names)] / spread
    used = [at for at, slope in enumerate(slopes) if abs(slope) > 1e-3]
    of_grams = zip(data.grams, point[len(data.names) : -1], strict=True)
    return LinearScore(
        name=name,
        intercept=float(point[-1] - slopes @ mean),
        weights={data.names[at]: float(slopes[at]) for at in used},
        centers={data.names[at]: float(x[:, at].mean()) for at in used},
        grams={gram: float(weight) for gram, weight in of_grams if abs(weight) >= LEAST_GRAM},
    )


def raw_logits(score: LinearScore, data: Table) -> Floats:
    """Uncalibrated logits of a table's examples."""
    slopes = np.array([score.weights.get(name, 0.0) for name in data.names])
    logits = data.x @ slopes + score.intercept
    if data.gram_x is not None:
        logits = logits + data.gram_x @ np.array([score.grams.get(g, 0.0) for g in data.grams])
    return np.asarray(logits, dtype=np.float64)


def parts_of(data: Table) -> list[Bools]:
    """The examples in parts of whole sources, none of which holds the only source of its label."""
    base = np.array([each.source.split(" ")[-1] for each in data.examples])
    sizes = Counter(base.tolist())
    held = np.zeros(len(base), dtype=np.int64)
    load_of = [0] * PARTS
    for source, size in sorted(sizes.items(), key=lambda each: (-each[1], each[0])):
        part = load_of.index(min(load_of))
        load_of[part] += size
        held[base == source] = part
    labels = np.array([each.label for each in data.examples])
    parts = []
    for part in range(PARTS):
        inside = held == part
        if not inside.any():
            continue
        if len(set(labels[~inside].tolist())) == 2:
            parts.append(inside)
        else:  # the only source of a label can't be left out; its examples are split instead
            halves = np.arange(len(base)) % 2 == 0
            parts += [inside & halves, inside & ~halves]
    return parts


def learn_score(name: str, rows: Sequence[Row], weights: WordWeights) -> LinearScore:
    """One score, calibrated on what it says of sources it hasn't seen (an inner leave-out)."""
    data = table(name, rows, weights)
    held_out = np.zeros(len(data.examples))
    for part in parts_of(data):
        held_out[part] = raw_logits(regress(name, data, ~part), data)[part]
    y, w = balanced(data.examples, SHAPES[name].prior)
    whole = regress(name, data, np.ones(len(data.examples), dtype=bool))
    return replace(whole, platt=platt(held_out, y, w))


def learn(rows: Sequence[Row], *, only: Collection[str] = tuple(SHAPES)) -> Weights:
    """All scores (or some, for judging one) from labelled rows.

    Word weights come from rows with labels of others alone: written ones have their words chosen.
    """
    listed = word_weights([row for row in rows if not row.is_written])
    return Weights(words=listed, scores={name: learn_score(name, rows, listed) for name in only})


def main() -> None:
    """Learn, tell what was learned, and with --write keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path, help="labelled requests, one JSON object a line")
    parser.add_argument("--write", action="store_true", help=f"write {WEIGHTS_FILE.name}")
    parser.add_argument("--to", type=Path, default=WEIGHTS_FILE, help="where --write writes")
    told = parser.parse_args()
    rows = load(told.data)
    own = written()
    trained_on = f"{len(rows)} labelled and {len(own)} written requests"
    weights = replace(learn([*rows, *own]), trained_on=trained_on)
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
