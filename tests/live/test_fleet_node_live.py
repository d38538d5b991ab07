"""Two nodes with the real engine and a shared store between them, without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from keepwarm.fleet.node import NodeLife
from keepwarm.gateway.app import make_app
from keepwarm.settings import load_settings
from keepwarm.slotfile import Buffer
from tinymodels import small_model

pytestmark = pytest.mark.live

STORY = "The relay in the attic hums at night and the children count the seconds between. " * 12


class Bucket:
    """An object store in memory."""

    is_away = False

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def get(
        self, name: str, *, timeout_s: float | None = None, size_bytes: int = 0
    ) -> Buffer | None:
        return self.objects.get(name)

    async def has(self, name: str) -> bool:
        return name in self.objects

    async def put(self, name: str, buffers: Sequence[Buffer]) -> int:
        self.objects[name] = b"".join(bytes(b) for b in buffers)
        return len(self.objects[name])


class Node:
    """A running node and its address."""

    def __init__(self, life: NodeLife, url: str) -> None:
        self.life, self.url = life, url

    async def chat(self, messages: list[dict[str, str]]) -> tuple[dict[str, Any], dict[str, str]]:
        """One greedy reply of eight tokens, and the headers it came with."""
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, "model": "minimal"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + "/v1/chat/completions", json=body) as reply,
        ):
            assert reply.status == 200, await reply.text()
            return msgspec.json.decode(await reply.read()), dict(reply.headers)


@asynccontextmanager
async def node(
    base: Path, tiers: Path, bucket: Bucket | None, **engine: Any
) -> AsyncIterator[Node]:
    flags = {
        "engine.model": str(small_model()),
        "engine.slots": 2,
        "engine.context": 4096,
        "engine.threads": 1,
        "store.dir": str(base),
        "batch.dir": str(base / "batches"),
        "store.staging_bytes": 300_000_000,
        "tiers.dir": str(tiers),
        **{f"engine.{key}": value for key, value in engine.items()},
    }
    settings, places = load_settings(flags=flags)
    life = NodeLife(settings, places, shared=bucket)
    runner = web.AppRunner(make_app(life))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        await life.start()
        yield Node(life, "http://{}:{}".format(*runner.addresses[0][:2]))
    finally:
        await life.stop()
        await runner.cleanup()


async def test_a_second_node_is_warm_without_a_prefill_and_goes_on_where_the_first_was(
    tmp_path: Path, small_tiers: Path
) -> None:
    bucket = Bucket()
    first = [{"role": "user", "content": STORY + "What hums?"}]
    async with node(tmp_path / "one", small_tiers, bucket) as one:
        assert {w.how for w in one.life.node.prefixes.warmed} == {"prefilled"}
        reply, _ = await one.chat(first)
        talk = [*first, reply["choices"][0]["message"], {"role": "user", "content": "Where?"}]
    # It has ended, and what it had was written behind.
    async with node(tmp_path / "two", small_tiers, bucket) as two:
        assert {w.how for w in two.life.node.prefixes.warmed} == {"restored"}
        assert all(w.proved for w in two.life.node.prefixes.warmed)
        there, headers = await two.chat(talk)
        assert headers["X-Keepwarm-Plan"] == "snapshot"
        moved = two.life.node.moved[headers["X-Keepwarm-Request-Id"]]
        assert moved > 150
        assert there["timings"]["cache_n"] > moved
        assert there["timings"]["prompt_n"] < 40
        second = two.life.node.second
        assert second is not None
        assert second.counts.misses.total() == 0
    # The one it was begun on answers the same from its own store, bit for bit.
    async with node(tmp_path / "one", small_tiers, None) as alone:
        here, headers = await alone.chat(talk)
        assert headers["X-Keepwarm-Plan"] in ("snapshot", "slot")
        assert here["choices"][0]["message"] == there["choices"][0]["message"]


async def test_a_node_of_another_build_shares_nothing(tmp_path: Path, small_tiers: Path) -> None:
    bucket = Bucket()
    async with node(tmp_path / "one", small_tiers, bucket):
        pass
    before = set(bucket.objects)
    assert before
    async with node(tmp_path / "two", small_tiers, bucket, kv_type_k="q8_0") as two:
        assert {w.how for w in two.life.node.prefixes.warmed} == {"prefilled"}
        assert two.life.node.second is not None
        assert two.life.node.second.counts.moved == 0
    ours = {name.split("/")[0] for name in before}
    assert ours.isdisjoint(name.split("/")[0] for name in set(bucket.objects) - before)
