"""Who runs what next: the state of one night, events in, work out.

Theory of operation. There are *lanes*, one for each task that may be in flight, and so one for each
slot they use. A lane asks for work (`take`), does it, and tells (`filled`, `ended`, `requeue`).
Tasks below the same deepest branch worth filling are a *group*. A lane stays with its group while
that has tasks, since its slot holds the group's prefix; then it opens the next group, filling first
the branches above it that nobody has filled; when none is left to open it helps with the group that
has most to do, whose prefix is saved by then and is restored instead. So a branch is prefilled
once, and restored only where a lane changes its group.

On several nodes (see `cut`) each task has a home, and lanes take turns over the nodes: lane 5 of
three nodes is on node 2. A lane opens and helps with what is at home on its node; only when that is
through does it take from the node that has most left.

Bounds on that order, in this sequence:
1. A task begins only when what it depends on has succeeded, and the turns before it have ended.
2. A task with a deadline is taken at once when all that is due by then would only just be done.
3. Smaller `priority` first; a lane leaves its group for it.
4. Earlier deadlines, then earlier lines, open first.

Invariants (tested): a task runs on one lane at a time and ends once; a branch is filled by one lane
at a time; while tasks are left and nothing runs, `take` finds work.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from keepwarm.batch.tree import PrefixTree

# Estimates of seconds may be off by as much before a task misses its deadline for that.
_DEADLINE_MARGIN = 1.5


@dataclass(frozen=True, slots=True)
class FillBranch:
    """Fill and save a branch, as the beginning of one of its tasks."""

    branch: int
    leaf: int


@dataclass(frozen=True, slots=True)
class RunTask:
    """Send a task."""

    leaf: int


Work = FillBranch | RunTask
_Key = tuple[float, float, int]


class Night:
    """See the module. `now_s` is in seconds of the Unix epoch."""

    def __init__(
        self,
        tree: PrefixTree,
        *,
        fills: bool = True,
        order: Sequence[int] | None = None,
        ended: Mapping[int, bool] | None = None,
        seconds: Callable[[int], float] | None = None,
        homes: Sequence[int] = (),
    ) -> None:
        """Begin, or go on with what an earlier run has left.

        Args:
            tree: the tasks.
            fills: False leaves the branches to the gateway's own look-ups.
            order: take tasks strictly in this order, as far as they are ready; None plans.
            ended: tasks that have ended before, and whether well.
            seconds: about how long a task takes; for deadlines.
            homes: the node of each task; none if there is one node.
        """
        self.tree = tree
        self._fills = fills
        self._listed = list(order) if order is not None else None
        self._head = 0
        self._seconds = seconds or (lambda _: 0.0)
        self._homes = list(homes) or [0] * len(tree.tasks)
        self._nodes = max(self._homes, default=0) + 1
        ranks = order if order is not None else tree.order
        self._rank = {leaf: rank for rank, leaf in enumerate(ranks)}
        self._left = [branch.tasks for branch in tree.branches]
        self._branch: dict[int, str] = {}
        self._parked: dict[int, list[int]] = {}
        self._group_of = [self._group(leaf) for leaf in range(len(tree.tasks))]
        self._ready: dict[int, list[tuple[_Key, int]]] = {}
        self._is_ready: set[int] = set()
        self._unopened: list[list[tuple[_Key, int]]] = [[] for _ in range(self._nodes)]
        self._open: set[int] = set()
        self._lane_group: dict[int, int] = {}
        self._priorities: list[tuple[int, int]] = []
        self._ended: dict[int, bool] = {}
        self._due = sorted(
            (t.deadline_s, i) for i, t in enumerate(tree.tasks) if t.deadline_s is not None
        )
        self._slack_until_s = -math.inf
        self._needs, self._hard, self._waiters = self._edges()
        for leaf in range(len(tree.tasks)):
            if not self._needs[leaf]:
                self._make_ready(leaf)
        for leaf, ok in (ended or {}).items():
            self.ended(leaf, ok=ok)

    @property
    def left(self) -> int:
        """Tasks that haven't ended."""
        return len(self.tree.tasks) - len(self._ended)

    def has_ended(self, leaf: int) -> bool:
        """Whether a task has ended, also by what it depends on."""
        return leaf in self._ended

    def take(self, lane: int, now_s: float) -> Work | None:
        """Work for a lane, or None: all is done, or runs, or waits for what runs."""
        if self._listed is not None:
            return self._take_listed()
        urgent = self._urgent(now_s)
        if urgent is not None and (work := self._work(lane, self._group_of[urgent], urgent)):
            return work
        best = self._best_priority()
        if best is None:
            return None
        own = self._lane_group.get(lane)
        if own is not None and self._top(own) == best and (work := self._work(lane, own)):
            return work
        return self._open_next(lane, best) or self._help(lane, best)

    def filled(self, branch: int, *, ok: bool) -> None:
        """A branch's fill has ended. If it failed, its tasks go on without it."""
        self._branch[branch] = "filled" if ok else "failed"
        for group in self._parked.pop(branch, []):
            self._offer(group)

    def requeue(self, leaf: int) -> None:
        """A task that ran is to be tried again."""
        if leaf not in self._ended:
            self._make_ready(leaf)

    def ended(self, leaf: int, *, ok: bool) -> list[int]:
        """A task has ended.

        Returns:
            Tasks that can't run any more, since they depend on it and it failed; they have ended
            by that.
        """
        lost: list[int] = []
        todo = [(leaf, ok)]
        while todo:
            one, well = todo.pop()
            if one in self._ended:
                continue
            if one != leaf:
                lost.append(one)
            self._ended[one] = well
            self._is_ready.discard(one)
            for branch in self.tree.leaves[one].branches:
                self._left[branch] -= 1
            for waiter in self._waiters.get(one, ()):
                self._needs[waiter].discard(one)
                if not well and one in self._hard[waiter]:
                    todo.append((waiter, False))
                elif not self._needs[waiter] and waiter not in self._ended:
                    self._make_ready(waiter)
        return lost

    def _group(self, leaf: int) -> int:
        """A task's group: its deepest branch worth filling, on its node; or its own."""
        branches = self.tree.fillable(leaf) if self._fills else []
        return branches[-1] * self._nodes + self._homes[leaf] if branches else -1 - leaf

    def _home(self, group: int) -> int:
        return group % self._nodes if group >= 0 else self._homes[-1 - group]

    def _edges(self) -> tuple[list[set[int]], list[set[int]], dict[int, list[int]]]:
        tasks = self.tree.tasks
        index = {task.custom_id: i for i, task in enumerate(tasks)}
        hard = [{index[n] for n in task.depends_on if n in index} for task in tasks]
        needs = [
            h | {index[a] for a in t.after if a in index} for h, t in zip(hard, tasks, strict=True)
        ]
        turns = [
            n | ({before} if before is not None else set())
            for n, before in zip(needs, self.tree.continues, strict=True)
        ]
        # What a file says goes before what its prompts look like.
        if _has_no_cycle(turns):
            needs = turns
        waiters: dict[int, list[int]] = {}
        for leaf, before in enumerate(needs):
            for one in before:
                waiters.setdefault(one, []).append(leaf)
        return needs, hard, waiters

    def _key(self, leaf: int) -> _Key:
        task = self.tree.tasks[leaf]
        deadline = task.deadline_s if task.deadline_s is not None else math.inf
        return (task.priority, deadline, self._rank[leaf])

    def _make_ready(self, leaf: int) -> None:
        if leaf in self._is_ready:
            return
        self._is_ready.add(leaf)
        group = self._group_of[leaf]
        heapq.heappush(self._ready.setdefault(group, []), (self._key(leaf), leaf))
        heapq.heappush(self._priorities, (self.tree.tasks[leaf].priority, leaf))
        if group not in self._open:
            self._offer(group)

    def _offer(self, group: int) -> None:
        """Put a group among those that can be opened, by its most urgent task."""
        self._open.discard(group)
        if (top := self._first(group)) is not None:
            heapq.heappush(self._unopened[self._home(group)], (self._key(top), group))

    def _first(self, group: int) -> int | None:
        """A group's most urgent ready task."""
        heap = self._ready.get(group)
        while heap and heap[0][1] not in self._is_ready:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def _top(self, group: int) -> int | None:
        first = self._first(group)
        return None if first is None else self.tree.tasks[first].priority

    def _best_priority(self) -> int | None:
        while self._priorities and self._priorities[0][1] not in self._is_ready:
            heapq.heappop(self._priorities)
        return self._priorities[0][0] if self._priorities else None

    def _urgent(self, now_s: float) -> int | None:
        """The ready task that is due first, if what is due by some time leaves no slack.

        Tasks that end only give slack, so until the moment that was found last there is no need to
        look again.
        """
        if now_s < self._slack_until_s:
            return None
        due_s = 0.0
        first: int | None = None
        slack_until_s = math.inf
        self._due = [due for due in self._due if due[1] not in self._ended]
        for deadline_s, leaf in self._due:
            due_s += self._seconds(leaf)
            if first is None and leaf in self._is_ready:
                first = leaf
            latest_s = deadline_s - due_s * _DEADLINE_MARGIN
            if first is not None and now_s >= latest_s:
                return first
            slack_until_s = min(slack_until_s, latest_s)
        self._slack_until_s = slack_until_s
        return None

    def _open_next(self, lane: int, priority: int) -> Work | None:
        own = lane % self._nodes
        others = [node for node in range(self._nodes) if node != own]
        for node in (own, *sorted(others, key=lambda n: -len(self._unopened[n]))):
            if work := self._open_of(lane, priority, self._unopened[node]):
                return work
        return None

    def _open_of(self, lane: int, priority: int, unopened: list[tuple[_Key, int]]) -> Work | None:
        while unopened:
            key, group = unopened[0]
            first = self._first(group)
            if first is None or group in self._open or self._key(first) != key:
                heapq.heappop(unopened)
                if first is not None and group not in self._open:
                    # Its most urgent task has begun or a more urgent one came: weigh it anew.
                    heapq.heappush(unopened, (self._key(first), group))
                continue
            if key[0] != priority:
                return None
            heapq.heappop(unopened)
            if (filling := self._being_filled(first)) is not None:
                self._parked.setdefault(filling, []).append(group)
                continue
            return self._work(lane, group)
        return None

    def _help(self, lane: int, priority: int) -> Work | None:
        """Join the open group with most to do, of the lane's own node if there is one."""
        own = lane % self._nodes
        held = set(self._lane_group.values())
        self._open = {g for g in self._open if g in held or self._first(g) is not None}
        able = [g for g in self._open if self._top(g) == priority]
        for group in sorted(able, key=lambda g: (self._home(g) != own, -len(self._ready[g]), g)):
            if work := self._work(lane, group):
                return work
        return None

    def _work(self, lane: int, group: int, leaf: int | None = None) -> Work | None:
        """The next step towards a group's most urgent task, or a given one."""
        chosen = leaf if leaf is not None else self._first(group)
        if chosen is None or chosen not in self._is_ready:
            return None
        if self._being_filled(chosen) is not None:
            return None
        self._lane_group[lane] = group
        self._open.add(group)
        branch = self._unfilled(chosen)
        if branch is not None:
            self._branch[branch] = "filling"
            return FillBranch(branch, chosen)
        self._is_ready.discard(chosen)
        return RunTask(chosen)

    def _being_filled(self, leaf: int) -> int | None:
        if not self._fills:
            return None
        path = self.tree.fillable(leaf)
        return next((b for b in path if self._branch.get(b) == "filling"), None)

    def _unfilled(self, leaf: int) -> int | None:
        """The topmost branch above a task that others will use and nobody has filled."""
        if not self._fills:
            return None
        path = self.tree.fillable(leaf)
        return next((b for b in path if b not in self._branch and self._left[b] > 1), None)

    def _take_listed(self) -> Work | None:
        assert self._listed is not None
        while self._head < len(self._listed) and self._listed[self._head] in self._ended:
            self._head += 1
        for leaf in itertools.islice(self._listed, self._head, None):
            if leaf not in self._is_ready or self._being_filled(leaf) is not None:
                continue
            branch = self._unfilled(leaf)
            if branch is not None:
                self._branch[branch] = "filling"
                return FillBranch(branch, leaf)
            self._is_ready.discard(leaf)
            return RunTask(leaf)
        return None


def _has_no_cycle(needs: Sequence[set[int]]) -> bool:
    left = [set(n) for n in needs]
    waiters: dict[int, list[int]] = {}
    for leaf, before in enumerate(left):
        for one in before:
            waiters.setdefault(one, []).append(leaf)
    free = [leaf for leaf, before in enumerate(left) if not before]
    seen = 0
    while free:
        one = free.pop()
        seen += 1
        for waiter in waiters.get(one, ()):
            left[waiter].discard(one)
            if not left[waiter]:
                free.append(waiter)
    return seen == len(left)
