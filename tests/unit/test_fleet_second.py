"""The shared store as a second level: what one node saved, another has, byte for byte, or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import storesamples as samples
from keepwarm.core.prompt import Prompt, prompt_of
from keepwarm.core.rates import Mean, Rates
from keepwarm.errors import ConfigError, SnapshotError
from keepwarm.fleet import second_level as second_module
from keepwarm.fleet.objects import Seal, directory, read_seal
from keepwarm.fleet.second_level import SecondLevel, message_ends
from keepwarm.slotfile import Buffer, Layout
from keepwarm.store.store import Store
from keepwarm.store.types import Mark, Origin

TIER = list(range(1000, 1100))
TURN = [*TIER, *range(300)]
NEXT = [*TURN, *range(5000, 5200)]


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_module, "LOOK_EVERY_S", 0.005)


class Bucket:
    """An object store in memory that can be away."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.is_away = False
        self.fails = 0
        self.gets: list[str] = []
        self.puts: list[str] = []

    def _try(self) -> None:
        if self.is_away or self.fails:
            self.fails = max(self.fails - 1, 0)
            raise SnapshotError("away", reason="away")

    async def get(
        self, name: str, *, timeout_s: float | None = None, size_bytes: int = 0
    ) -> Buffer | None:
        self._try()
        self.gets.append(name)
        return self.objects.get(name)

    async def has(self, name: str) -> bool:
        self._try()
        return name in self.objects

    async def put(self, name: str, buffers: Sequence[Buffer]) -> int:
        self._try()
        self.puts.append(name)
        self.objects[name] = b"".join(bytes(b) for b in buffers)
        return len(self.objects[name])


class Node:
    """A store with a second level, and the engine's part in saving."""

    def __init__(self, store: Store, second: SecondLevel) -> None:
        self.store, self.second = store, second

    async def save(
        self, tokens: list[int], digest: bytes, *, namespace: str = "", settle: bool = True
    ) -> None:
        name = await self.store.new_save(1000)
        file = samples.slot_file(tokens, self.store.settings.layout)
        (self.store.settings.staging / name).write_bytes(file)
        await self.store.absorb(
            name,
            namespace=namespace,
            marks=[Mark(digest, len(tokens))],
            origin=Origin.CONVERSATION,
            prefill_s=10.0,
        )
        if settle:
            await self.settled()

    async def settled(self) -> None:
        while self.second.pending:  # noqa: ASYNC110 - what is tested has no event
            await asyncio.sleep(0.005)

    async def restored(self, digest: bytes, namespace: str = "") -> bytes | None:
        hit = self.store.lookup([digest], namespace=namespace)
        if hit is None:
            return None
        ready = await self.store.materialize(hit.extent_id, hit.at_tokens)
        found = (self.store.settings.staging / ready.name).read_bytes()
        self.store.release(ready.name)
        return found


@asynccontextmanager
async def node(
    base: Path,
    bucket: Bucket,
    *,
    layout: Layout | None = samples.PLAIN,
    seal: Seal | None = None,
    prefill_s_per_token: float = 1.0,
    **changed: Any,
) -> AsyncIterator[Node]:
    base.mkdir(exist_ok=True)
    store = await Store.open(samples.settings_in(base, layout, **changed))
    # A second a token: anything is worth moving.
    rates = Rates(prefill_s_per_token=Mean(prefill_s_per_token))
    second = SecondLevel(store, bucket, rates=rates, row_bytes=20, seal=seal)
    second.start()
    try:
        yield Node(store, second)
    finally:
        await second.close()
        await store.close()


def prompt(*texts: str, namespace: str = "a") -> Prompt:
    roles = ["system", *(["user", "assistant"] * len(texts))]
    body = {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]}
    return prompt_of(body, fingerprint="f", namespace=namespace)


TALK = prompt("You are terse.", "hello", "hi", "and now?")
TALK_END = TALK.marks[-1].digest
LATER = prompt("You are terse.", "hello", "hi", "and now?", "this", "go on")


async def bring(there: Node, asked: Prompt = LATER, *, namespace: str = "a", local: int = 0) -> Any:
    return await there.second.bring(asked, namespace, total_tokens=len(NEXT), local_tokens=local)


@pytest.mark.parametrize("layout", samples.LAYOUTS.values(), ids=samples.LAYOUTS)
async def test_a_conversation_goes_on_at_another_node_from_the_same_bytes(
    tmp_path: Path, layout: Layout
) -> None:
    bucket = Bucket()
    async with (
        node(tmp_path / "one", bucket, layout=layout) as one,
        node(tmp_path / "two", bucket, layout=layout) as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        brought = await bring(two)
        assert (brought.tokens, brought.moved_tokens) == (len(TURN), len(TURN))
        there = await two.restored(TALK_END, "a")
        assert there == await one.restored(TALK_END, "a")
        assert there == samples.slot_file(TURN, layout, for_engine=True)


async def test_a_file_that_is_kept_whole_moves_whole(tmp_path: Path) -> None:
    bucket = Bucket()
    async with (
        node(tmp_path / "one", bucket, layout=None) as one,
        node(tmp_path / "two", bucket, layout=None) as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        assert (await bring(two)).moved_tokens == len(TURN)
        assert await two.restored(TALK_END, "a") == samples.slot_file(TURN)


async def test_only_rows_that_are_lacking_are_moved(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        for there in (one, two):
            await there.save(TIER, b"t" * 16)
        await one.save(TURN, TALK_END, namespace="a")
        brought = await bring(two)
        assert brought.moved_tokens == len(TURN) - len(TIER)
        assert brought.moved_bytes < sum(len(o) for o in bucket.objects.values())
        assert sum("/rows/" in name for name in bucket.gets) == 1
        assert await two.restored(TALK_END, "a") == samples.slot_file(TURN)
        assert two.store.stats().extents == 2


async def test_a_conversation_that_moves_twice_is_stored_once(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        await bring(two)
        await two.save(NEXT, LATER.marks[-1].digest, namespace="a")
        await one.second.bring(LATER, "a", total_tokens=len(NEXT) + 1, local_tokens=len(TURN))
        assert await one.restored(LATER.marks[-1].digest, "a") == samples.slot_file(NEXT)
        rows = [name for name in bucket.puts if "/rows/" in name]
        assert len(rows) == len(set(rows)) == 2
        assert one.second.counts.moved_tokens == len(NEXT) - len(TURN)


async def test_a_prefix_in_two_cuts_joins_another_node_s_extents_in_the_middle(
    tmp_path: Path,
) -> None:
    bucket = Bucket()
    branch = [*TURN[:200], *range(7000, 7300)]
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, b"x" * 16, namespace="a")
        await one.save(branch, TALK_END, namespace="a")
        await two.save(TURN[:150], b"y" * 16, namespace="a")
        assert (await bring(two)).moved_tokens == len(branch) - 150
        assert await two.restored(TALK_END, "a") == samples.slot_file(branch)


async def test_namespaces_are_kept(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        assert await bring(two, namespace="b") is None
        assert await two.restored(TALK_END, "b") is None
        assert {name.split("/")[1][:2] for name in bucket.objects} == {"n-"}


async def test_another_fingerprint_never_shares(tmp_path: Path) -> None:
    bucket = Bucket()
    async with (
        node(tmp_path / "one", bucket) as one,
        node(tmp_path / "two", bucket, fingerprint="model a, engine c") as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        assert await bring(two) is None
        # Even if somebody copies the objects to where they would be found.
        here = (
            directory(samples.FINGERPRINT, "a", Seal()),
            directory("model a, engine c", "a", Seal()),
        )
        for name in list(bucket.objects):
            bucket.objects[name.replace(*here)] = bucket.objects[name]
        assert await bring(two) is None
        assert two.second.counts.misses["checksum"] == 1  # its name is part of it
        assert two.store.stats().extents == 0


@pytest.mark.parametrize("kind", ["rows", "marks"])
@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "empty"])
async def test_a_damaged_object_costs_warmth_and_nothing_else(
    tmp_path: Path, kind: str, damage: str
) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        await one.save([*range(400)], b"o" * 16, namespace="a")
        first, other = [name for name in bucket.objects if f"/{kind}/" in name][:2]
        data = bytearray(bucket.objects[first])
        if damage == "flip":
            data[-3] ^= 16
        bucket.objects[first] = {
            "flip": bytes(data),
            "cut": bytes(data[:-5]),
            "swap": bucket.objects[other],
            "empty": b"",
        }[damage]
        brought = await bring(two)
        if brought is not None:  # another prefix's mark is a sound one: of tokens nobody asked for
            assert (kind, damage) == ("marks", "swap")
        else:
            assert two.store.stats().extents == 0
            assert sum(two.second.counts.misses.values()) == 1


async def test_rows_that_were_damaged_are_not_asked_for_again(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        rows = next(n for n in bucket.objects if "/rows/" in n)
        bucket.objects[rows] = bucket.objects[rows][:-1]
        assert await bring(two) is None
        asked = bucket.gets.count(rows)
        assert await bring(two) is None
        assert bucket.gets.count(rows) == asked == 1


async def test_work_goes_on_while_the_store_is_away_and_what_waits_is_written_later(
    tmp_path: Path,
) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        bucket.is_away = True
        await one.save(TURN, TALK_END, namespace="a", settle=False)
        await asyncio.sleep(0.05)
        assert await bring(two) is None
        assert await one.restored(TALK_END, "a") == samples.slot_file(TURN)
        assert not bucket.objects
        assert one.second.idle_since_s == float("inf")
        bucket.is_away = False
        await one.settled()
        assert (await bring(two)).tokens == len(TURN)


async def test_a_mark_is_never_written_before_its_rows(tmp_path: Path) -> None:
    for fails_at in range(1, 5):
        bucket = Bucket()
        async with node(tmp_path / str(fails_at), bucket) as one:
            await one.save(TIER, b"t" * 16, settle=False)
            bucket.fails = fails_at
            await one.save(TURN, TALK_END, namespace="a")
            names = [name.split("/")[2] for name in bucket.puts]
            assert names.index("rows") < names.index("marks")
            for at, name in enumerate(bucket.puts):
                if "/marks/" in name:
                    assert any("/rows/" in before for before in bucket.puts[:at])
            assert sum("/rows/" in name for name in bucket.objects) == 2


async def test_requests_that_want_the_same_prefix_at_once_move_it_once(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        brought = await asyncio.gather(*(bring(two) for _ in range(5)))
        assert {b.tokens for b in brought} == {len(TURN)}
        assert sum("/rows/" in name for name in bucket.gets) == 1


async def test_a_request_that_has_little_to_gain_asks_nobody(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        assert await bring(two, local=len(NEXT) - 20) is None
        assert not bucket.gets


async def test_a_tier_is_pulled_before_a_node_serves_and_offered_by_who_has_it(
    tmp_path: Path,
) -> None:
    bucket = Bucket()
    digest = b"t" * 16
    async with node(tmp_path / "one", bucket) as one:
        await one.save(TIER, digest)
    bucket.objects.clear()  # a shared store that was begun after this node, or has expired
    async with node(tmp_path / "one", bucket) as one:
        await one.second.offer(digest)
        assert {name.split("/")[2] for name in bucket.objects} == {"rows", "marks"}
    async with node(tmp_path / "two", bucket) as two:
        assert await two.second.pull(b"n" * 16) is None
        assert (await two.second.pull(digest)).tokens == len(TIER)
        assert await two.restored(digest) == samples.slot_file(TIER)


async def test_what_waits_is_written_before_the_end(tmp_path: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one:
        await one.save(TURN, TALK_END, namespace="a", settle=False)
        await one.second.close(flush_s=5.0)
        assert any("/marks/" in name for name in bucket.objects)


def test_message_ends_are_asked_for_and_blocks_inside_messages_are_not() -> None:
    long = prompt("Be brief. " * 100, "x" * 3000, "yes", "z" * 700)
    ends = message_ends(long)
    assert len(long.marks) > 15
    assert long.static in ends
    assert {mark.chars for mark in ends} == {1016, 1016 + 3016, 4032 + 19, 4051 + 716}
    many = prompt("s", *(["q", "a"] * 20))
    asked = message_ends(many)
    assert asked[-1] == many.marks[-1]
    assert many.static in asked
    assert len(asked) == second_module.MARKS_ASKED + 1


async def test_a_request_waits_no_longer_than_its_prefill_and_the_next_one_has_the_rows(
    tmp_path: Path,
) -> None:
    class Slow(Bucket):
        delay_s = 0.0

        async def get(
            self, name: str, *, timeout_s: float | None = None, size_bytes: int = 0
        ) -> Buffer | None:
            if "/rows/" in name:
                await asyncio.sleep(self.delay_s)
            return await super().get(name, timeout_s=timeout_s, size_bytes=size_bytes)

    bucket = Slow()
    async with (
        node(tmp_path / "one", bucket) as one,
        node(tmp_path / "two", bucket, prefill_s_per_token=0.001) as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        bucket.delay_s = 1.5
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        assert await bring(two) is None
        # 600 tokens of a millisecond each; twice that for a machine that does other things.
        assert loop.time() - began_s < 1.2
        assert two.second.counts.misses["late"] == 1
        await asyncio.sleep(1.5)
        assert await two.restored(TALK_END, "a") == await one.restored(TALK_END, "a")


async def test_an_extent_that_takes_too_long_holds_up_neither_writes_nor_reads(
    tmp_path: Path,
) -> None:
    class Narrow(Bucket):
        most_bytes = 1 << 40

        def _fits(self, size_bytes: int) -> None:
            if size_bytes > self.most_bytes:
                raise SnapshotError("too large for the time limit", reason="slow")

        async def put(self, name: str, buffers: Sequence[Buffer]) -> int:
            self._fits(sum(len(bytes(b)) for b in buffers))
            return await super().put(name, buffers)

    bucket = Narrow()
    bucket.most_bytes = 8000
    async with node(tmp_path / "one", bucket) as one:
        await one.save(TURN, TALK_END, namespace="a")  # this one doesn't fit
        await one.save(TIER, b"tier".ljust(16), namespace="")
        assert any("/rows/" in name for name in bucket.objects)
        assert one.second.counts.misses["slow"] >= 1
        assert not one.second.pending


KEY, OTHER_KEY = Seal(b"k" * 32), Seal(b"o" * 32)


async def test_what_somebody_without_the_key_wrote_is_not_taken(tmp_path: Path) -> None:
    bucket = Bucket()
    async with (
        node(tmp_path / "one", bucket, seal=OTHER_KEY) as one,
        node(tmp_path / "two", bucket, seal=KEY) as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        assert await bring(two) is None
        # Even where it would be found.
        for name in list(bucket.objects):
            bucket.objects[name.replace(OTHER_KEY.suffix, KEY.suffix)] = bucket.objects[name]
        assert await bring(two) is None
        assert two.second.counts.misses["checksum"] == 1
        assert await two.restored(TALK_END, "a") is None
    async with node(tmp_path / "three", Bucket(), seal=KEY) as three:
        assert await three.restored(TALK_END, "a") is None


async def test_nodes_with_one_key_share(tmp_path: Path) -> None:
    bucket = Bucket()
    async with (
        node(tmp_path / "one", bucket, seal=KEY) as one,
        node(tmp_path / "two", bucket, seal=KEY) as two,
    ):
        await one.save(TURN, TALK_END, namespace="a")
        assert (await bring(two)).moved_tokens == len(TURN)


async def test_rows_under_the_name_of_others_are_not_taken(tmp_path: Path) -> None:
    # The same last tokens behind other first ones: the rows differ, and their tokens don't.
    bucket = Bucket()
    async with node(tmp_path / "one", bucket) as one, node(tmp_path / "two", bucket) as two:
        await one.save(TURN, TALK_END, namespace="a")
        rows = [name for name in bucket.objects if "/rows/" in name]
        other = [*range(7000, 7100), *TURN[100:]]
        await one.save(other, b"other".ljust(16), namespace="a")
        theirs = [n for n in bucket.objects if "/rows/" in n and n not in rows]
        bucket.objects[rows[-1]] = bucket.objects[theirs[-1]]
        assert await bring(two) is None
        assert two.second.counts.misses["checksum"] == 1


def test_a_key_file_is_read_once_and_must_hold_a_key(tmp_path: Path) -> None:
    assert read_seal("") == Seal()
    file = tmp_path / "key"
    file.write_text("0123456789abcdef0123456789abcdef\n")
    assert read_seal(str(file)).suffix
    file.write_text("short")
    with pytest.raises(ConfigError, match="fewer than 16 bytes"):
        read_seal(str(file))
    with pytest.raises(ConfigError, match="can't be read"):
        read_seal(str(tmp_path / "none"))
