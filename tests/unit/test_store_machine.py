"""The store beside a dict, under saves, evictions, restarts, damage and quarantine."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from keepwarm.slotfile import Layout
from keepwarm.store.checks import integrity, verify_extent
from keepwarm.store.snapshots import Snapshots
from keepwarm.store.types import Mark, Origin
from storesamples import (
    LAYOUTS,
    NoSyncDisk,
    allowing,
    digest_of,
    opened,
    restored,
    save,
    settings_in,
    slot_file,
)

NAMESPACES = ["", "a", "b"]
tokens_lists = st.lists(st.integers(0, 2), min_size=1, max_size=12)


def visible(namespace: str) -> tuple[str, ...]:
    return ("", namespace) if namespace else ("",)


class StoreBesideDict(RuleBasedStateMachine):
    """`sent` remembers which tokens each namespace sent; `kept` those that nothing took away."""

    layout: Layout | None
    store: Snapshots

    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="keepwarm-test-"))
        self.sent: dict[str, set[tuple[int, ...]]] = {name: set() for name in NAMESPACES}
        self.kept: set[tuple[str, tuple[int, ...]]] = set()
        self.pinned: dict[str, tuple[int, ...]] = {}
        self.now_s = 0.0

    @initialize(layout=st.sampled_from([*LAYOUTS.values(), None]))
    def begin(self, layout: Layout | None) -> None:
        self.layout = layout
        self.open()

    def open(self) -> None:
        quota = 6000 if self.layout is not None else 20_000
        self.store = opened(
            settings_in(self.base, self.layout, quota_bytes=quota, staging_bytes=20_000),
            NoSyncDisk(),
            self.now_s,
        )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.base)

    @rule(tokens=tokens_lists, namespace=st.sampled_from(NAMESPACES), data=st.data())
    def save(self, tokens: list[int], namespace: str, data: st.DataObject) -> None:
        self.now_s += 1.0
        ends = data.draw(st.sets(st.integers(1, len(tokens)), max_size=2)) | {len(tokens)}
        marks = [Mark(digest_of(tokens[:end]), end) for end in sorted(ends)]
        before = self.store.shelf.counts.evicted_bytes
        saved = save(self.store, tokens, namespace=namespace, marks=marks, now_s=self.now_s)
        assert saved.at_tokens == len(tokens)
        assert self.store.tokens_of(saved.extent_id, len(tokens)).tolist() == tokens
        if self.store.shelf.counts.evicted_bytes != before:
            self.kept.clear()
        self.sent[namespace].add(tuple(tokens))
        self.kept.add((namespace, tuple(tokens)))

    @rule(tokens=tokens_lists, namespace=st.sampled_from(NAMESPACES))
    def find(self, tokens: list[int], namespace: str) -> None:
        digests = [digest_of(tokens[:end]) for end in range(1, len(tokens) + 1)]
        for hit in (
            self.store.lookup(digests, visible(namespace)),
            self.store.match(tokens, namespace),
        ):
            if hit is None:
                continue
            kept = tokens[: hit.at_tokens]
            assert self.store.tokens_of(hit.extent_id, hit.at_tokens).tolist() == kept
            assert any(
                list(sent[: hit.at_tokens]) == kept
                for name in visible(namespace)
                for sent in self.sent[name]
            ), "nobody who may be seen sent this"
            found = restored(self.store, hit.extent_id, hit.at_tokens)
            assert found == slot_file(kept, self.layout, for_engine=self.layout is not None)

    @precondition(lambda self: len(self.kept) > 0)
    @rule(data=st.data())
    def what_nothing_took_away_is_there(self, data: st.DataObject) -> None:
        namespace, tokens = data.draw(st.sampled_from(sorted(self.kept)))
        hit = self.store.lookup([digest_of(tokens)], visible(namespace))
        assert hit is not None
        assert hit.is_exact
        assert hit.at_tokens == len(tokens)

    @precondition(lambda self: len(self.store.shelf.catalog.tree) > 0)
    @rule(data=st.data(), name=st.sampled_from(["tier:a", "tier:b"]))
    def pin(self, data: st.DataObject, name: str) -> None:
        tree = self.store.shelf.catalog.tree
        extent = tree[data.draw(st.sampled_from([extent.id for extent in tree]))]
        end = self.store.shelf.catalog.restorable(extent.id, extent.hi)
        if end.extent_id is not None:
            self.store.pin(
                name,
                end.extent_id,
                end.at,
                origin=Origin.TIER,
                digest=None,
                prefill_s=1.0,
                now_s=self.now_s,
            )
            self.pinned[name] = tuple(self.store.tokens_of(end.extent_id, end.at).tolist())

    @rule(name=st.sampled_from(["tier:a", "tier:b"]))
    def unpin(self, name: str) -> None:
        assert self.store.unpin(name) == (self.pinned.pop(name, None) is not None)

    @rule(share=st.floats(0, 1))
    def prune(self, share: float) -> None:
        bound = int(self.store.shelf.used_bytes * share)
        self.store.prune(bound)
        assert self.store.shelf.used_bytes <= max(bound, self.pinned_bytes())
        self.kept.clear()

    def pinned_bytes(self) -> int:
        tree = self.store.shelf.catalog.tree
        return sum(
            extent.total_bytes for extent in tree if self.store.shelf.catalog.is_pinned(extent.id)
        )

    @precondition(lambda self: len(self.store.shelf.catalog.tree) > 0)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.now_s += 30.0
        tree = self.store.shelf.catalog.tree
        extent = tree[data.draw(st.sampled_from([extent.id for extent in tree]))]
        self.store.touch(extent.id, extent.hi, now_s=self.now_s)

    @rule()
    def restart(self) -> None:
        before = {extent.id: extent.token_bytes for extent in self.store.shelf.catalog.tree}
        self.store.close()
        self.open()
        after = {extent.id: extent.token_bytes for extent in self.store.shelf.catalog.tree}
        assert after == before
        assert self.store.shelf.report.lines() == []

    @precondition(lambda self: len(self.store.shelf.catalog.tree) > 0)
    @rule(data=st.data())
    def damage_a_file_and_restart(self, data: st.DataObject) -> None:
        self.store.close()
        directory = self.store.shelf.files.root
        files = sorted(path for path in directory.iterdir() if path.is_file())
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "remove"]))
        if how == "flip":
            content[at] ^= 0x10
            path.write_bytes(content)
        elif how == "cut":
            path.write_bytes(content[:at])
        else:
            path.unlink()
        self.open()
        self.kept.clear()
        # Use everything: whatever is doubted goes, and takes its pins along.
        for extent in list(self.store.shelf.catalog.tree):
            for end in [*extent.boundaries, extent.hi]:
                self.restore_or_doubt(extent.id, end)
        for extent_id in self.store.extent_ids():
            verify_extent(self.store, extent_id)  # also rows that no restore can reach
        self.store.shelf.clear_refuse()
        self.pinned = {
            name: tokens
            for name, tokens in self.pinned.items()
            if name in self.store.shelf.catalog.pins
        }

    def restore_or_doubt(self, extent_id: int, at: int) -> None:
        with allowing("checksum", "truncated", "unknown", "boundary"):
            tokens = self.store.tokens_of(extent_id, at).tolist()
            found = restored(self.store, extent_id, at)
            assert found == slot_file(tokens, self.layout, for_engine=self.layout is not None)

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def pins_are_whole(self) -> None:
        pins = self.store.shelf.catalog.pins
        assert pins.keys() == self.pinned.keys()
        for name, pin in pins.items():
            found = self.store.tokens_of(pin.extent_id, pin.at_tokens).tolist()
            assert found == list(self.pinned[name])

    @precondition(lambda self: hasattr(self, "store"))
    @invariant()
    def index_files_and_memory_agree_within_the_quota(self) -> None:
        assert integrity(self.store) == ()
        assert self.store.shelf.used_bytes <= self.store.shelf.settings.quota_bytes
        staged = sum(path.stat().st_size for path in self.store.staging.root.glob("*.slot*"))
        assert staged == self.store.staging.used_bytes <= self.store.staging.bound_bytes


TestStoreBesideDict = StoreBesideDict.TestCase
TestStoreBesideDict.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
