"""A node as a Ray Serve replica: Keepwarm in this process, its engine as its child.

Needs Ray. The gateway's own HTTP server listens on a free loopback port, so that a request means
here exactly what it means to `keepwarm serve`; what comes through Serve is passed to it and
streamed back. Serve counts the node as running only when `__init__` has ended, that is, when all
tiers are warm.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from keepwarm.core.hints import NODE_HEADER
from keepwarm.deployment.condition import State
from keepwarm.errors import EngineDownError
from keepwarm.fleet.config import FleetConfig, fleet_of
from keepwarm.fleet.ledger import WarmthLedger
from keepwarm.fleet.node import NodeLife, backlog_s, node_directory
from keepwarm.fleet.objects import read_seal
from keepwarm.fleet.scaling import WAIT
from keepwarm.fleet.shared import open_shared
from keepwarm.fleet.wire import Ask, NodeNote, packed
from keepwarm.gateway.app import make_app
from keepwarm.gateway.listening import HttpRunner
from keepwarm.logs import set_up_logging
from keepwarm.settings import load_settings

log = logging.getLogger("keepwarm.fleet")

# What was saved reaches the shared store this much later at the latest, if nothing waits there:
# a slot is saved after it was idle for 0.3 s, and new extents are looked for every 0.25 s.
_WRITTEN_AFTER_S = 2.0
_HOP = frozenset(("connection", "content-length", "transfer-encoding", "keep-alive", "host"))


class Head(msgspec.Struct, frozen=True):
    """The first thing a node sends of an answer; bytes of the body follow."""

    status: int
    headers: list[tuple[str, str]]


class Node:
    """See the module. Made by Serve, once a replica, on its event loop."""

    async def __init__(self, plain: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        """Start and warm. `plain` is a `FleetConfig` as plain values.

        Raises: KeepwarmError; Serve tries again and shows the message.
        """
        config = fleet_of(plain, source="fleet config")
        settings, places = load_settings(flags=config.node_flags())
        set_up_logging(settings.log)
        root = Path(settings.store.dir).expanduser() if settings.store.dir else places.store
        # One more than there may be: while a node is replaced, both are there.
        place, self._lock = node_directory(root, most=config.most_nodes + 1)
        flags = {
            **config.node_flags(),
            "store.dir": str(place),
            "batch.dir": str(place / "batches"),
            "server.port": 0,
        }
        settings, places = load_settings(flags=flags)
        self.name = place.name
        seal = read_seal(config.shared.key_file)
        self._life = NodeLife(settings, places, shared=_shared(config), seal=seal)
        self._began_s = time.monotonic()
        self._numbers = itertools.count()
        self._asked = 0
        await self._listen()
        try:
            await self._life.start()
        except BaseException:
            await self._close()
            raise
        row_bytes = self._life.node.machine.row_bytes
        self._ledger = WarmthLedger(capacity_tokens=settings.store.quota_bytes // max(row_bytes, 1))
        log.info("%s is ready after %.1f s", self.name, time.monotonic() - self._began_s)

    async def _listen(self) -> None:
        self._runner = HttpRunner(make_app(self._life))
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self._url = f"http://{host}:{port}"
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
        )

    async def ask(self, ask: Ask) -> AsyncIterator[Head | bytes]:
        """Serve one request: a head, then the body as it comes.

        Closing it early (the client has gone) ends the request at the engine, too.
        """
        self._asked += 1
        # The name that the client asked for goes along: the node's door looks at it.
        headers = [(n, v) for n, v in ask.headers if n.lower() not in _HOP - {"host"}]
        async with self._session.request(
            ask.method, self._url + ask.path, headers=headers, data=ask.body or None
        ) as reply:
            told = [(n, v) for n, v in reply.headers.items() if n.lower() not in _HOP]
            told.append((NODE_HEADER, self.name))
            request_id = reply.headers.get("X-Keepwarm-Request-Id", "")
            if moved := self._life.node.moved.get(request_id):
                told.append(("X-Keepwarm-Moved", str(moved)))
            yield Head(reply.status, told)
            async for chunk in reply.content.iter_any():
                yield chunk
        if ask.prefixes and reply.status == 200:
            ends = ask.want(self._tokens_per_char()).ends_tokens
            self._ledger.served(ask.prefixes, ends, now_s=time.monotonic())

    def _tokens_per_char(self) -> float:
        return self._life.node.dispatcher.rates.tokens_per_char.value

    def record_routing_stats(self) -> dict[str, bytes]:
        """What Serve passes on to the routers."""
        node = self._life.node
        second = node.second
        written_s = float("-inf")
        if second is not None and not second.pending:
            written_s = time.monotonic() - _WRITTEN_AFTER_S
        told = NodeNote(
            taken_s=time.time(),
            backlog_s=backlog_s(node.dispatcher),
            costs=node.costs,
            tokens_per_char=self._tokens_per_char(),
            held=packed(self._ledger.held()),
            stored=packed(self._ledger.stored(before_s=written_s)),
            state=node.state.value,
            about=self._about(),
        )
        return {"keepwarm": msgspec.msgpack.encode(told)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes on to the policy that says how many nodes there should be."""
        return {WAIT: backlog_s(self._life.node.dispatcher)}

    def _about(self) -> dict[str, Any]:
        node = self._life.node
        scheduler = node.dispatcher.scheduler
        about: dict[str, Any] = {
            "node": self.name,
            "pid": os.getpid(),
            "asked": self._asked,
            "queued": scheduler.queued,
            "slots": len(scheduler.slots),
            "busy_slots": sum(slot.state.value != "idle" for slot in scheduler.slots),
            "tokens": node.metrics.prompt_tokens(),
            "store_bytes": node.store.stats().used_bytes,
            "warmed": {warmed.name: warmed.how for warmed in node.prefixes.warmed},
        }
        if node.second is not None:
            counts = node.second.counts
            about["shared"] = {
                "pending": node.second.pending,
                "can_fetch": node.second.costs.can_fetch,
                **msgspec.to_builtins(counts),
            }
        return about

    def check_health(self) -> None:
        """Serve replaces a node whose engine doesn't come back. Raises: EngineDownError."""
        if self._life.state is State.FAILED or not self._life.is_alive:
            raise EngineDownError(f"{self.name}: {self._life.status}")

    async def _close(self) -> None:
        await self._session.close()
        await self._runner.cleanup()
        self._lock.release()

    async def __del__(self) -> None:
        """Serve awaits this before it ends a replica."""
        try:
            await asyncio.shield(self._life.stop())
        finally:
            await self._close()


def _shared(config: FleetConfig) -> Any:
    if not config.shared.url:
        return None
    return open_shared(
        config.shared.url,
        options=config.shared.options,
        upload_bytes_per_s=config.shared.upload_bytes_per_s,
        download_bytes_per_s=config.shared.download_bytes_per_s,
        timeout_s=config.shared.timeout_s,
        allow_http=config.shared.allow_http,
    )
