"""What tasks share: the tree of their prompts' common beginnings.

Theory of operation. Each prompt is written as one string: its root (API, tier, and what the
template renders before the first message), then its messages with control characters between their
parts. Sorted, tasks that begin alike are neighbours, and the lengths of the common beginnings of
neighbours are the tree: a *branch* is a string that at least two tasks begin with and after which
they part. Nobody has to declare that ten tasks are about one document.

A branch is *worth filling* if it holds enough tokens beyond the next one above it that is. Such a
branch has an end in the terms of requests (`SharedEnd`), moved back to white space, where no
tokenizer joins what is before with what comes after.

Lengths are estimates from characters; only the order and the choice of branches follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keepwarm.api.reading import read
from keepwarm.batch.tasks import Task
from keepwarm.core.plan import FILL_MIN_TOKENS
from keepwarm.core.prompt import Segment, SharedEnd, is_raw, prompt_of, segments_of
from keepwarm.core.rates import Rates

# How far back from a parting white space is looked for. Scripts without spaces have none; there the
# engine's own tokens decide when the branch is filled.
_WORD_CHARS = 64
# Without a space the last token may hold characters of both sides; few tokens have more than these.
_UNSURE_CHARS = 8
# What a message costs beyond its text, in characters, as in `core.prompt`.
_TURN_CHARS = 16
# A tier by this name is chosen for each request, so nothing is known of its length.
_AUTO = "auto"
_DEFAULT_REPLY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Branch:
    """A common beginning of at least two tasks.

    `above` is the index of the next branch above it, None below the root; `tokens` its length from
    the prompt's start; `tasks` how many tasks begin with it; `end` where it ends in the task's own
    messages, None if it isn't worth filling.
    """

    above: int | None
    root: int
    tokens: int
    tasks: int
    end: SharedEnd | None


@dataclass(frozen=True, slots=True)
class Root:
    """What comes before the messages. `tier` '' is none; its `tokens` are warm in any case."""

    label: str
    tier: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Leaf:
    """One task's place: its root, its branches from the top, and its lengths in tokens."""

    root: int
    branches: tuple[int, ...]
    tokens: int
    reply_tokens: int


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """The tree over a list of tasks; `leaves` are in the tasks' order, `order` is depth first.

    `continues` has for each task the one whose whole prompt opens its own, if there is one: an
    earlier turn of the same conversation.
    """

    tasks: tuple[Task, ...]
    roots: tuple[Root, ...]
    branches: tuple[Branch, ...]
    leaves: tuple[Leaf, ...]
    order: tuple[int, ...]
    continues: tuple[int | None, ...]

    def shared_tokens(self, one: int, other: int) -> int:
        """Tokens that two tasks begin with alike."""
        a, b = self.leaves[one], self.leaves[other]
        if a.root != b.root:
            return 0
        shared = self.roots[a.root].tokens
        for x, y in zip(a.branches, b.branches, strict=False):
            if x != y:
                break
            shared = self.branches[x].tokens
        if one == other:
            return a.tokens
        return min(shared, a.tokens, b.tokens)

    def fillable(self, leaf: int) -> list[int]:
        """The branches of a task that are worth filling, from the top."""
        return [b for b in self.leaves[leaf].branches if self.branches[b].end is not None]

    def ends(self, leaf: int) -> list[SharedEnd]:
        """Where they end, for the request's header."""
        return [end for b in self.fillable(leaf) if (end := self.branches[b].end) is not None]

    def branch_tokens(self, number: int) -> int:
        """A branch's tokens beyond what is above it."""
        branch = self.branches[number]
        root_tokens = self.roots[branch.root].tokens
        above = root_tokens if branch.above is None else self.branches[branch.above].tokens
        return max(branch.tokens - above, 0)

    def leaf_tokens(self, number: int) -> int:
        """A task's tokens beyond its branches; one is always evaluated again."""
        leaf = self.leaves[number]
        root_tokens = self.roots[leaf.root].tokens
        above = self.branches[leaf.branches[-1]].tokens if leaf.branches else root_tokens
        return max(leaf.tokens - above, 1)

    @property
    def least_tokens(self) -> int:
        """The fewest tokens that have to be prefilled: each that differs, once, but no tier's."""
        branches = sum(map(self.branch_tokens, range(len(self.branches))))
        return branches + sum(map(self.leaf_tokens, range(len(self.leaves))))


@dataclass(frozen=True, slots=True)
class _Flat:
    """A prompt as one string, the only copy of it while the tree is made.

    `starts` are the offsets of its segments' texts, `sizes` the lengths of their texts and extras.
    """

    text: str
    starts: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    root: int
    head_chars: int
    reply_tokens: int


def build_tree(
    tasks: Sequence[Task],
    *,
    tier_tokens: Mapping[str, int],
    tokens_per_char: float | None = None,
    min_tokens: int = FILL_MIN_TOKENS,
) -> PrefixTree:
    """Find what tasks share.

    Args:
        tasks: in the file's order.
        tier_tokens: the deployment's tiers and how long each is.
        tokens_per_char: measured, or None for the prior.
        min_tokens: a branch is worth filling if it adds as many.
    """
    per_char = tokens_per_char or Rates().tokens_per_char.value
    roots: dict[tuple[str, ...], int] = {}
    listed: list[Root] = []
    flats = [_flatten(task, tier_tokens, roots, listed) for task in tasks]

    def tokens_at(flat: _Flat, offset: int) -> int:
        return listed[flat.root].tokens + int(_chars_at(flat, offset) * per_char)

    ranked = sorted(range(len(flats)), key=lambda i: flats[i].text)
    branches, paths = _branches(ranked, flats, tokens_at, min_tokens)
    leaves = [
        Leaf(
            flat.root,
            tuple(path),
            max(tokens_at(flat, len(flat.text)), 1),
            flat.reply_tokens,
        )
        for flat, path in zip(flats, paths, strict=True)
    ]
    order = _depth_first(tasks, leaves)
    return PrefixTree(
        tuple(tasks),
        tuple(listed),
        tuple(branches),
        tuple(leaves),
        tuple(order),
        tuple(_continued(ranked, flats)),
    )


def _flatten(
    task: Task,
    tier_tokens: Mapping[str, int],
    roots: dict[tuple[str, ...], int],
    listed: list[Root],
) -> _Flat:
    body = task.body
    model = body.get("model")
    tier = model if isinstance(model, str) and (model in tier_tokens or model == _AUTO) else ""
    chat = read(task.api, task.body)
    if is_raw(chat):
        tier = ""
        prompt = body.get("prompt")
        text = prompt if isinstance(prompt, str) else None
        segments = [Segment("raw", text)] if text is not None else []
        # Token ids and lists of prompts are left to the gateway: each is a root of its own.
        head, head_chars = ("", 0) if text is not None else (task.custom_id, 0)
    else:
        mark = prompt_of(chat, fingerprint="", namespace="").marks[0]
        head, head_chars = mark.digest.hex(), mark.chars
        segments = segments_of(chat)
    key = (task.api, tier, head)
    root = roots.setdefault(key, len(listed))
    if root == len(listed):
        label = tier or ("own tools" if head_chars else "no tier")
        label += "" if task.url.endswith("/chat/completions") else f", {task.api}"
        listed.append(Root(label, tier, tier_tokens.get(tier, 0)))
    parts = [f"{root}\0"]
    starts = []
    at = len(parts[0])
    for segment in segments:
        opened = f"\1{segment.role}\2"
        starts.append(at + len(opened))
        parts += [opened, segment.text, "\3", segment.extra, "\4"]
        at += len(opened) + len(segment.text) + len(segment.extra) + 2
    sizes = tuple((len(segment.text), len(segment.extra)) for segment in segments)
    return _Flat("".join(parts), tuple(starts), sizes, root, head_chars, _reply_tokens(body))


def _continued(ranked: Sequence[int], flats: Sequence[_Flat]) -> list[int | None]:
    """For each prompt the longest other one that it goes on from, by whole messages."""
    out: list[int | None] = [None] * len(flats)
    open_: list[int] = []
    for index in ranked:
        text = flats[index].text
        while open_ and not text.startswith(flats[open_[-1]].text):
            open_.pop()
        above = open_[-1] if open_ else None
        if above is not None and len(flats[above].sizes) < len(flats[index].sizes):
            out[index] = above
        elif above is not None:
            out[index] = out[above]  # the same prompt again
        if flats[index].sizes:
            open_.append(index)
    return out


def _branches(
    ranked: Sequence[int],
    flats: Sequence[_Flat],
    tokens_at: Callable[[_Flat, int], int],
    min_tokens: int,
) -> tuple[list[Branch], list[list[int]]]:
    """The branches, each after the one above it, and each task's path through them."""
    # Open branches from the top: (offset where it ends, index of its first task in `ranked`).
    stack: list[tuple[int, int]] = []
    spans: list[tuple[int, int, int]] = []  # offset, first, behind the last
    for position, index in enumerate(ranked):
        common = 0
        if position:
            before = flats[ranked[position - 1]]
            if before.root == flats[index].root:
                common = _common(before.text, flats[index].text)
        first = position - 1
        while stack and stack[-1][0] > common:
            offset, first = stack.pop()
            spans.append((offset, first, position))
        if common and (not stack or stack[-1][0] < common):
            stack.append((common, first))
    spans += [(offset, first, len(ranked)) for offset, first in stack]
    return _named(ranked, flats, spans, tokens_at, min_tokens)


def _named(
    ranked: Sequence[int],
    flats: Sequence[_Flat],
    spans: list[tuple[int, int, int]],
    tokens_at: Callable[[_Flat, int], int],
    min_tokens: int,
) -> tuple[list[Branch], list[list[int]]]:
    branches: list[Branch] = []
    paths: list[list[int]] = [[] for _ in ranked]
    filled_to: list[int] = []  # for each branch, tokens at the last end at or above it
    spans.sort(key=lambda span: (span[1], span[0]))
    for offset, first, behind in spans:
        flat = flats[ranked[first]]
        if not flat.starts or offset < flat.starts[0]:
            continue  # only the root is common
        path = paths[ranked[first]]
        above = path[-1] if path else None
        known = filled_to[above] if above is not None else tokens_at(flat, 0)
        end, place = _end_at(flat, offset)
        tokens = tokens_at(flat, place)
        is_worth = tokens - known >= min_tokens
        filled_to.append(tokens if is_worth else known)
        count = behind - first
        branches.append(
            Branch(above, flat.root, tokens_at(flat, offset), count, end if is_worth else None)
        )
        for index in ranked[first:behind]:
            paths[index].append(len(branches) - 1)
    return branches, paths


def _common(one: str, other: str) -> int:
    """The length of the common beginning, by halving: slices compare at memory speed."""
    lo, hi = 0, min(len(one), len(other))
    while lo < hi:
        middle = (lo + hi + 1) // 2
        if one[lo:middle] == other[lo:middle]:
            lo = middle
        else:
            hi = middle - 1
    return lo


def _chars_at(flat: _Flat, offset: int) -> int:
    """Canonical characters of a flat prompt up to an offset; at 0 nothing, not even the head."""
    if offset == 0:
        return 0
    chars = flat.head_chars
    for start, (text_chars, extra_chars) in zip(flat.starts, flat.sizes, strict=True):
        if offset < start:
            break
        length = text_chars + extra_chars
        inside = min(offset - start, length)
        chars += inside + (_TURN_CHARS if inside == length else 0)
    return chars


def _end_at(flat: _Flat, offset: int) -> tuple[SharedEnd, int]:
    """Where a common beginning ends in a request's terms, and that place's offset."""
    index = max(i for i, start in enumerate(flat.starts) if start <= offset)
    start, (text_chars, extra_chars) = flat.starts[index], flat.sizes[index]
    closing = start + text_chars + extra_chars + 2
    if offset >= closing:
        return SharedEnd(index + 1, 0), offset
    chars = min(offset - start, text_chars)
    cut = _word_end(flat.text, start, chars)
    return SharedEnd(index, cut), start + cut


def _word_end(text: str, start: int, chars: int) -> int:
    """The last place before `chars` (from `start`) with a word before it and white space, common
    too, behind."""
    for cut in range(chars - 1, max(chars - _WORD_CHARS, 0), -1):
        if text[start + cut].isspace() and not text[start + cut - 1].isspace():
            return cut
    return max(chars - _UNSURE_CHARS, 0) if chars > _WORD_CHARS else 0


def _reply_tokens(body: Mapping[str, Any]) -> int:
    for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = body.get(key)
        if isinstance(limit, int) and limit > 0:
            return limit
    return _DEFAULT_REPLY_TOKENS


def _depth_first(tasks: Sequence[Task], leaves: Sequence[Leaf]) -> list[int]:
    """The tasks so that those below one branch are adjacent, the most urgent branches first."""

    def urgency(index: int) -> tuple[float, float, int]:
        task = tasks[index]
        deadline = task.deadline_s if task.deadline_s is not None else float("inf")
        return (task.priority, deadline, task.line)

    best: dict[tuple[int, int], tuple[float, float, int]] = {}
    for index, leaf in enumerate(leaves):
        for key in ((-1, leaf.root), *((0, b) for b in leaf.branches)):
            mine = urgency(index)
            best[key] = min(best.get(key, mine), mine)

    def place(index: int) -> list[tuple[float, float, int]]:
        leaf = leaves[index]
        above = [best[-1, leaf.root], *(best[0, b] for b in leaf.branches)]
        return [*above, urgency(index)]

    return sorted(range(len(tasks)), key=place)
