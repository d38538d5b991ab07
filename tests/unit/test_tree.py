"""The token tree beside whole token lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from keepwarm.core.tree import Link, Match, TokenTree, as_tokens, common_tokens

NAMESPACES = ["", "a", "b"]


def visible(namespace: str) -> tuple[str, ...]:
    return ("", namespace) if namespace else ("",)


def add(
    tree: TokenTree, extent_id: int, tokens: Sequence[int], *, namespace: str = ""
) -> int | None:
    """Keep what isn't known of `tokens` as one extent, as the store does; None if all is known."""
    known = tree.match(as_tokens(tokens), namespaces=visible(namespace))
    if known.at == len(tokens):
        return None
    tree.add(
        extent_id,
        parent=known.extent_id,
        lo=known.at,
        token_bytes=as_tokens(tokens)[known.at :].tobytes(),
        namespace=namespace,
        size_bytes=len(tokens) - known.at,
    )
    return extent_id


def match(tree: TokenTree, tokens: Sequence[int], namespace: str = "") -> Match:
    return tree.match(as_tokens(tokens), namespaces=visible(namespace))


def test_a_branch_hangs_where_the_tokens_part() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3, 4])
    add(tree, 2, [1, 2, 9, 9])
    assert tree[2].parent == 1
    assert tree[2].lo == 2
    assert tree.chain(2, 4) == [Link(1, 0, 2), Link(2, 2, 4)]
    assert tree.tokens_of(2, 3).tolist() == [1, 2, 9]


def test_a_prefix_that_ends_inside_an_extent_is_found_there() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3, 4])
    assert match(tree, [1, 2, 3]) == Match(1, 3)
    assert match(tree, [1, 2, 8, 8]) == Match(1, 2)
    assert match(tree, [2]) == Match(None, 0)
    assert match(tree, []) == Match(None, 0)


def test_one_namespace_does_not_find_what_another_sent() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3])
    add(tree, 2, [1, 2, 3, 4, 5], namespace="a")
    assert match(tree, [1, 2, 3, 4, 5], "a") == Match(2, 5)
    assert match(tree, [1, 2, 3, 4, 5], "b") == Match(1, 3)
    assert match(tree, [1, 2, 3, 4, 5]) == Match(1, 3)


def test_shared_tokens_never_hang_off_private_ones() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3], namespace="a")
    add(tree, 2, [1, 2, 3, 4])
    assert tree[2].parent is None
    with pytest.raises(ValueError, match="namespace"):
        tree.add(3, parent=1, lo=3, token_bytes=b"\1\0\0\0", namespace="b", size_bytes=1)


def test_the_longer_of_a_shared_and_a_private_branch_wins() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3], namespace="a")
    add(tree, 2, [1, 2, 3, 4, 5, 6])
    assert match(tree, [1, 2, 3, 4, 5, 6, 7], "a") == Match(2, 6)
    add(tree, 3, [1, 2, 3, 4, 5, 6, 7, 8], namespace="a")
    assert match(tree, [1, 2, 3, 4, 5, 6, 7, 8], "a") == Match(3, 8)


@pytest.mark.parametrize(
    ("parent", "lo", "tokens"),
    [
        (None, 1, [5]),  # a root that begins later
        (1, 0, [5]),  # before the parent's first token
        (1, 4, [5]),  # behind the parent's end
        (1, 2, [3, 3]),  # the parent goes on with the same token
        (7, 3, [5]),  # no such parent
        (1, 3, []),  # no token
    ],
)
def test_an_extent_that_breaks_an_invariant_is_refused(
    parent: int | None, lo: int, tokens: list[int]
) -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3])
    with pytest.raises(ValueError):
        tree.add(
            2,
            parent=parent,
            lo=lo,
            token_bytes=as_tokens(tokens).tobytes(),
            namespace="",
            size_bytes=1,
        )
    assert len(tree) == 1
    assert add(tree, 2, [1, 2, 3, 4]) == 2


def test_only_a_leaf_can_be_removed() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2])
    add(tree, 2, [1, 2, 3])
    with pytest.raises(ValueError, match="children"):
        tree.remove(1)
    tree.remove(2)
    assert match(tree, [1, 2, 3]) == Match(1, 2)
    tree.remove(1)
    assert match(tree, [1, 2, 3]) == Match(None, 0)


def test_a_subtree_is_listed_so_that_it_can_be_removed_in_order() -> None:
    tree = TokenTree()
    for extent_id, tokens in enumerate([[1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [9]], 1):
        add(tree, extent_id, tokens)
    order = tree.subtree(1)
    assert sorted(order) == [1, 2, 3, 4]
    for extent_id in order:
        tree.remove(extent_id)
    assert [extent.id for extent in tree] == [5]


def test_the_last_boundary_may_lie_in_an_ancestor() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3, 4])
    add(tree, 2, [1, 2, 3, 9, 9])
    tree.add_boundary(1, 2, size_bytes=10)
    tree.add_boundary(1, 4, size_bytes=10)
    assert tree.last_boundary(1, 4) == Match(1, 4)
    assert tree.last_boundary(1, 3) == Match(1, 2)
    assert tree.last_boundary(2, 5) == Match(1, 2), "the one at 4 is of another branch"
    tree.add_boundary(2, 5, size_bytes=10)
    assert tree.last_boundary(2, 5) == Match(2, 5)
    assert tree.last_boundary(1, 1) == Match(None, 0)
    assert tree.total_bytes() == 4 + 2 + 30
    assert tree.remove_boundary(2, 5) == 10
    assert tree.last_boundary(2, 5) == Match(1, 2)


def test_the_holder_of_a_position_is_the_extent_it_lies_in() -> None:
    tree = TokenTree()
    add(tree, 1, [1, 2, 3, 4])
    add(tree, 2, [1, 2, 9, 9])
    assert [tree.holder(2, at) for at in (0, 1, 2, 3, 4, 5)] == [None, 1, 1, 2, 2, None]


def test_a_whole_snapshot_matches_at_exactly_its_end() -> None:
    tree = TokenTree()

    def add_whole(extent_id: int, tokens: list[int]) -> None:
        token_bytes = as_tokens(tokens).tobytes()
        tree.add(
            extent_id,
            parent=None,
            lo=0,
            token_bytes=token_bytes,
            namespace="a",
            size_bytes=9,
            whole=True,
        )

    add_whole(1, [1, 2, 3])
    add_whole(2, [1, 2, 3, 4, 5])
    assert match(tree, [1, 2, 3, 4, 5, 6], "a") == Match(2, 5)
    assert match(tree, [1, 2, 3, 4], "a") == Match(1, 3)
    assert match(tree, [1, 2], "a") == Match(None, 0)
    assert match(tree, [1, 2, 3], "b") == Match(None, 0)
    with pytest.raises(ValueError, match="already"):
        add_whole(3, [1, 2, 3])
    with pytest.raises(ValueError):
        tree.chain(1, 2)
    tree.remove(2)
    assert match(tree, [1, 2, 3, 4, 5, 6], "a") == Match(1, 3)


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_tokens_counts_what_both_begin_with(left: list[int], right: list[int]) -> None:
    n = common_tokens(np.asarray(left, np.int32), np.asarray(right, np.int32))
    assert left[:n] == right[:n]
    assert n == min(len(left), len(right)) or left[n] != right[n]


tokens_lists = st.lists(st.integers(0, 2), min_size=1, max_size=9)


class TreeBesideLists(RuleBasedStateMachine):
    """Every listed extent's whole token list is remembered beside the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = TokenTree()
        self.lists: dict[int, tuple[str, list[int]]] = {}
        self.last_id = 0

    @rule(tokens=tokens_lists, namespace=st.sampled_from(NAMESPACES))
    def save(self, tokens: list[int], namespace: str) -> None:
        if add(self.tree, self.last_id + 1, tokens, namespace=namespace) is not None:
            self.last_id += 1
            self.lists[self.last_id] = namespace, tokens
        assert match(self.tree, tokens, namespace).at == len(tokens)

    @precondition(lambda self: len(self.lists) > 0)
    @rule(data=st.data())
    def evict_a_leaf(self, data: st.DataObject) -> None:
        leaves = [i for i in self.lists if self.tree.children_count(i) == 0]
        leaf = data.draw(st.sampled_from(leaves))
        self.tree.remove(leaf)
        del self.lists[leaf]

    @rule(tokens=tokens_lists, namespace=st.sampled_from(NAMESPACES))
    def find(self, tokens: list[int], namespace: str) -> None:
        found = match(self.tree, tokens, namespace)
        known = [kept for where, kept in self.lists.values() if where in visible(namespace)]
        longest = max((common(tokens, kept) for kept in known), default=0)
        assert found.at == longest
        if found.extent_id is not None:
            assert self.tree[found.extent_id].namespace in visible(namespace)
            assert self.tree.tokens_of(found.extent_id, found.at).tolist() == tokens[: found.at]

    @invariant()
    def what_is_listed_has_all_its_tokens(self) -> None:
        assert {extent.id for extent in self.tree} == set(self.lists)
        for extent_id, (_, tokens) in self.lists.items():
            assert self.tree.tokens_of(extent_id, len(tokens)).tolist() == tokens

    @invariant()
    def no_visible_token_is_kept_twice(self) -> None:
        for namespace in NAMESPACES:
            own = [tokens for where, tokens in self.lists.values() if where == namespace]
            prefixes = {tuple(tokens[:n]) for tokens in own for n in range(1, len(tokens) + 1)}
            kept = sum(e.hi - e.lo for e in self.tree if e.namespace == namespace)
            assert kept <= len(prefixes)


def common(left: list[int], right: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


TestTreeBesideLists = TreeBesideLists.TestCase
TestTreeBesideLists.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
