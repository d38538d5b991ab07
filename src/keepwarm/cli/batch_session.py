"""Where a command's tasks go: a Keepwarm that runs already, or one of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from keepwarm.batch.senders import HttpSender, RefusedError, Sender, UnreachableError
from keepwarm.cli.progress import WarmProgress
from keepwarm.core.rates import Rates
from keepwarm.core.tiers import compose
from keepwarm.deployment.life import Life
from keepwarm.errors import ConfigError
from keepwarm.gateway.batch_service import LocalSender
from keepwarm.gateway.proxy import Proxy
from keepwarm.settings import Places, Settings
from keepwarm.tiers.files import deployed_tiers

_POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class BatchSession:
    """A Keepwarm to send tasks to, and what a plan needs to know of it."""

    sender: Sender
    slots: int
    tier_tokens: Mapping[str, int]
    max_body_bytes: int
    tokens_per_char: float | None = None
    nodes: int = 1


@asynccontextmanager
async def session(
    settings: Settings, places: Places, *, base: str | None, key: str | None, wait_s: float
) -> AsyncIterator[BatchSession]:
    """Reach a Keepwarm at `base`, or start one with these settings and end it afterwards.

    Raises:
        UnreachableError: none answers there within `wait_s`.
        KeepwarmError: one of its own can't start.
    """
    if base is None:
        async with _own(settings, places) as own:
            yield own
        return
    async with HttpSender(base, api_key=key) as sender:
        yield await _remote(sender, settings, wait_s=wait_s)


async def _remote(sender: HttpSender, settings: Settings, *, wait_s: float) -> BatchSession:
    deadline_s = time.monotonic() + wait_s
    with WarmProgress() as progress:
        while True:
            try:
                status = await sender.status()
                if await sender.is_up():
                    break
                progress.status(f"waiting until {sender.base_url} is warm")
            except RefusedError:
                raise
            except UnreachableError:
                if time.monotonic() > deadline_s:
                    raise
                progress.status(f"waiting for {sender.base_url}")
            if time.monotonic() > deadline_s:
                raise UnreachableError(
                    f"{sender.base_url} isn't warm yet. Wait for it, or give it more --wait.",
                    begun=False,
                )
            await asyncio.sleep(_POLL_S)
    await sender.find_nodes()
    nodes = max(len(sender.nodes), 1)
    return BatchSession(
        sender,
        # A fleet's nodes have the same settings, and any of them has answered.
        slots=nodes * len(status.get("slots") or [None]),
        nodes=nodes,
        tier_tokens=_tiers_of(status.get("warmed") or []),
        max_body_bytes=settings.server.max_body_bytes,
    )


@asynccontextmanager
async def _own(settings: Settings, places: Places) -> AsyncIterator[BatchSession]:
    with WarmProgress() as progress:
        life = Life(settings, places, on_status=progress.status, on_progress=progress.tokens)
        await life.start()
    proxy = Proxy(life)
    try:
        yield BatchSession(
            LocalSender(life, proxy, "local"),
            slots=len(life.deployment.dispatcher.scheduler.slots),
            tier_tokens=_tiers_of([w.as_dict() for w in life.deployment.prefixes.warmed]),
            max_body_bytes=settings.server.max_body_bytes,
        )
    finally:
        await life.stop()


def _tiers_of(warmed: list[dict[str, object]]) -> dict[str, int]:
    return {
        str(w["name"]).removeprefix("tier:"): int(str(w["tokens"]))
        for w in warmed
        if str(w.get("name", "")).startswith("tier:")
    }


def estimated_tiers(settings: Settings, places: Places) -> dict[str, int]:
    """The tiers' lengths from their texts alone, for a plan without a server."""
    _, tiers = deployed_tiers(settings.tiers, places)
    per_char = Rates().tokens_per_char.value
    out = {}
    for tier in tiers:
        static = compose(tier, {"messages": []})
        chars = len(str(static.get("tools") or ""))
        chars += sum(len(str(m["content"])) for m in static["messages"])
        out[tier.name] = int(chars * per_char)
    return out


def read_key(file: Path | None) -> str | None:
    """The API key in a file's first line, `name:key` or `key`.

    Raises:
        ConfigError: it can't be read or holds none.
    """
    if file is None:
        return None
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"The key file {file} can't be read: {error.strerror}.") from error
    key = lines[0].rpartition(":")[2].strip() if lines else ""
    if not key:
        raise ConfigError(f"The key file {file} holds no key in its first line.")
    return key
