"""Which node runs which tasks: the prefix tree cut so that nodes share as little as possible.

What two nodes both need is prefilled twice, or moved. So the tree is cut below its roots (a tier is
warm on every node) into whole branches, and these are dealt out, the heaviest first, each to the
node with least to do. Only a branch that is more than a node's share is cut further down; then its
own tokens are what its parts share. Tasks that wait for each other stay together.

Dealing out the heaviest first is at most a third over the best balance (R. L. Graham, "Bounds on
Multiprocessing Timing Anomalies", 1969). What is uneven after all, idle lanes take from others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from keepwarm.batch.tree import PrefixTree

# A generated token costs about as much as four prefilled ones (20 and 5 ms: `BatchCosts`).
_DECODE_WEIGHT = 4
# A branch of up to so much over a node's share stays whole: cutting it would cost its tokens again.
_OVER_SHARE = 1.25


def cut(tree: PrefixTree, nodes: int) -> list[int]:
    """A node for each task, in the tasks' order.

    Args:
        tree: the tasks.
        nodes: how many there are, numbered from 0.
    """
    if nodes <= 1:
        return [0] * len(tree.tasks)
    parts = _parts(tree, nodes)
    homes = [0] * len(tree.tasks)
    load = [0.0] * nodes
    has: list[set[int]] = [set() for _ in range(nodes)]
    for part in sorted(parts, key=lambda p: (-_weight(tree, p, set()), p[0])):
        # Where its branch lies already the branch's own tokens come for nothing.
        node = min(range(nodes), key=lambda n: (load[n] + _weight(tree, part, has[n]), n))
        load[node] += _weight(tree, part, has[node])
        for leaf in part:
            homes[leaf] = node
            has[node].update(tree.leaves[leaf].branches)
    return homes


def _parts(tree: PrefixTree, nodes: int) -> list[list[int]]:
    """Groups of tasks that are dealt out whole."""
    share = _weight(tree, range(len(tree.tasks)), set()) / nodes * _OVER_SHARE
    todo = [(list(leaves), 0) for leaves in _split(tree, range(len(tree.tasks)), 0)]
    parts: list[list[int]] = []
    while todo:
        leaves, depth = todo.pop()
        deeper = max(len(tree.leaves[leaf].branches) for leaf in leaves) > depth
        if deeper and len(leaves) > 1 and _weight(tree, leaves, set()) > share:
            todo += [(part, depth + 1) for part in _split(tree, leaves, depth + 1)]
        else:
            parts.append(leaves)
    return _joined(tree, parts)


def _split(tree: PrefixTree, leaves: Sequence[int], depth: int) -> list[list[int]]:
    """Tasks by the branch they have at a depth; those without one each by itself."""
    by_branch: defaultdict[int, list[int]] = defaultdict(list)
    for leaf in leaves:
        path = tree.leaves[leaf].branches
        by_branch[path[depth] if len(path) > depth else -1 - leaf].append(leaf)
    return list(by_branch.values())


def _joined(tree: PrefixTree, parts: list[list[int]]) -> list[list[int]]:
    """Parts with tasks that wait for each other made one."""
    index = {task.custom_id: i for i, task in enumerate(tree.tasks)}
    part_of = {leaf: number for number, part in enumerate(parts) for leaf in part}
    root = list(range(len(parts)))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    for leaf, task in enumerate(tree.tasks):
        before = [index[name] for name in (*task.depends_on, *task.after) if name in index]
        turn = tree.continues[leaf]
        for other in [*before, *([turn] if turn is not None else [])]:
            root[find(part_of[other])] = find(part_of[leaf])
    joined: defaultdict[int, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        joined[find(number)] += part
    return [sorted(part) for part in joined.values()]


def _weight(tree: PrefixTree, leaves: Sequence[int], has: set[int]) -> float:
    """Tokens to prefill for these tasks where the branches `has` are, and to generate, weighed."""
    prefill = sum(map(tree.branch_tokens, _branches(tree, leaves) - has))
    prefill += sum(map(tree.leaf_tokens, leaves))
    return prefill + _DECODE_WEIGHT * sum(tree.leaves[leaf].reply_tokens for leaf in leaves)


def _branches(tree: PrefixTree, leaves: Sequence[int]) -> set[int]:
    return {branch for leaf in leaves for branch in tree.leaves[leaf].branches}
