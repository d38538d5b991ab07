"""Many at a time: throughput through the gateway, what waiting streams cost, and an open page.

Both sides of each comparison run on the very engine that Keepwarm has started, in turns and in one
run. Direct requests leave other conversations in the slots than Keepwarm knows of; only the tier's
static part is promised to the requests that are sent here, and that part they leave alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp

from keepwarm.bench.arms import KEEPWARM, Arm
from keepwarm.bench.prompts import OWN_BYTES, direct_request, keepwarm_request, own_request, user
from keepwarm.bench.scenarios import REPLY_TOKENS, Bench
from keepwarm.bench.servers import KeepwarmServer
from keepwarm.bench.stats import rotated
from keepwarm.core.tiers import Tier
from keepwarm.errors import EngineError

ENGINE = "engine, direct"
OPEN, CLOSED = "page open", "page closed"
QUEUED, LISTENING = "queued requests", "open event streams"
TOKENS_A_S, MEGABYTES = "tokens/s", "MB"
CPU_PER_TOKEN, CPU_PER_REQUEST = "µs/token", "µs/request"
CLIENTS = 16
# Long enough that decoding is what is measured; a round of both ways takes somewhat over a minute
# on two cores with a small model.
_LONG_REPLY_TOKENS = 256
# Until buffers and tasks of a change are where they stay.
_SETTLE_S = 1.0
# A queue of 200 requests fills in well under a second.
_FILL_TIMEOUT_S = 60.0


async def throughput(bench: Bench, arm: Arm, *, rounds: int) -> None:
    """Sixteen clients at a time with long replies, both ways in turns.

    The smallest tier is asked, so that a token costs as little engine time as it can and the
    gateway's own shows most. Every reply has the same length (`ignore_eos`).

    Raises:
        EngineError: a request wasn't answered.
    """
    keepwarm = _keepwarm(arm)
    await bench.start(arm)
    tier = next(iter(bench.tiers))
    engine = str((await keepwarm.status())["engine_url"])
    for turn in range(-1, rounds):  # the first warms sockets, code paths and slots
        for way in rotated((KEEPWARM, ENGINE), turn):
            bench.watcher.doing(f"load: round {max(turn + 1, 0)} of {rounds}, {way}")
            texts = [bench.questions.new() for _ in range(CLIENTS)]
            began, began_cpu_s = time.perf_counter(), keepwarm.cpu_seconds()
            base = keepwarm.base_url if way == KEEPWARM else engine
            make = keepwarm_request if way == KEEPWARM else direct_request
            asked = (arm.client.ask(base, _long(make, tier, text)) for text in texts)
            answers = await asyncio.gather(*asked)
            seconds = time.perf_counter() - began
            if turn < 0:
                continue
            decoded = sum(answer.counts.decoded for answer in answers)
            step = f"{CLIENTS} clients"
            bench.record.amount(
                decoded / seconds, TOKENS_A_S, scenario="load", step=step, arm=way, run=turn
            )
            cpu_s = keepwarm.cpu_seconds()
            if way == KEEPWARM and cpu_s is not None and began_cpu_s is not None:
                used = (cpu_s - began_cpu_s) / decoded * 1e6
                bench.record.amount(
                    used, CPU_PER_TOKEN, scenario="load", step="gateway's CPU", arm=way, run=turn
                )
            for answer in answers:
                bench.record.sample(answer, scenario="load", step=step, arm=way, run=turn)


def _long(make: Any, tier: Tier, text: str) -> dict[str, Any]:
    body: dict[str, Any] = make(tier, [user(text)], reply_tokens=_LONG_REPLY_TOKENS)
    return {**body, "ignore_eos": True}


async def page_open(bench: Bench, arm: Arm, *, pairs: int) -> None:
    """Bursts of sixteen short requests, with the page's event stream open and without, in turns.

    Raises:
        EngineError: a request wasn't answered, or the page's events weren't.
    """
    keepwarm = _keepwarm(arm)
    await bench.start(arm)
    tier = next(iter(bench.tiers))
    for pair in range(-2, pairs):
        for state in rotated((CLOSED, OPEN), pair):
            bench.watcher.doing(f"page: pair {max(pair + 1, 0)} of {pairs}, {state}")
            texts = [bench.questions.new() for _ in range(CLIENTS)]
            async with AsyncExitStack() as stack:
                if state == OPEN:
                    await stack.enter_async_context(_listening(keepwarm.base_url, 1))
                began_cpu_s = keepwarm.cpu_seconds()
                asked = (arm.ask(tier, [user(t)], reply_tokens=1) for t in texts)
                answers = await asyncio.gather(*asked)
                cpu_s = keepwarm.cpu_seconds()
            if pair < 0:
                continue
            if cpu_s is not None and began_cpu_s is not None:
                used = (cpu_s - began_cpu_s) / CLIENTS * 1e6
                bench.record.amount(
                    used, CPU_PER_REQUEST, scenario="page", step=state, arm=KEEPWARM, run=pair
                )
            for answer in answers:
                bench.record.sample(answer, scenario="page", step=state, arm=KEEPWARM, run=pair)


async def idle_streams(bench: Bench, arm: Arm, *, streams: int, runs: int) -> None:
    """Resident memory of the gateway with many streams that nothing comes through.

    Two kinds: streaming requests of 9 kB that wait for a slot while long replies hold all of them,
    and readers of the page's events. Each begins on a new process, since memory that an earlier
    load has left behind would be used again and hide what they cost. The server's queue must hold
    `streams`.

    Raises:
        EngineError: the streams couldn't be opened, or the memory can't be read here.
    """
    keepwarm = _keepwarm(arm)
    tier = next(iter(bench.tiers))

    async def fresh(run: int, kind: str) -> int:
        await keepwarm.stop()
        await bench.start(arm)
        bench.watcher.doing(f"idle: run {run + 1} of {runs}, {streams} of {kind}")
        await arm.ask(tier, [user(bench.questions.new())], reply_tokens=REPLY_TOKENS)
        return len((await keepwarm.status())["slots"])

    async def note(step: str, run: int) -> None:
        await asyncio.sleep(_SETTLE_S)
        resident = keepwarm.resident_bytes()
        if resident is None:
            raise EngineError("The gateway's resident memory can't be read on this system.")
        bench.record.amount(
            resident / 1e6, MEGABYTES, scenario="idle", step=step, arm=KEEPWARM, run=run
        )

    for run in range(runs):
        slots = await fresh(run, QUEUED)
        long = [_endless(tier, bench.questions.new()) for _ in range(slots)]
        waiting = [
            {**own_request(OWN_BYTES, bench.questions.new(), reply_tokens=1), "stream": True}
            for _ in range(streams)
        ]
        async with _open_requests(keepwarm, long, running=slots, queued=0):
            await note(f"before {QUEUED}", run)
            async with _open_requests(keepwarm, waiting, running=slots, queued=streams):
                await note(QUEUED, run)
        await fresh(run, LISTENING)
        await note(f"before {LISTENING}", run)
        async with _listening(keepwarm.base_url, streams):
            await note(LISTENING, run)


def _endless(tier: Tier, text: str) -> dict[str, Any]:
    """A stream that goes on until its slot's context is full."""
    body = keepwarm_request(tier, [user(text)], reply_tokens=1_000_000)
    return {**body, "stream": True, "ignore_eos": True}


def _keepwarm(arm: Arm) -> KeepwarmServer:
    assert isinstance(arm.server, KeepwarmServer)
    return arm.server


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
    )


@asynccontextmanager
async def _open_requests(
    server: KeepwarmServer, bodies: Sequence[dict[str, Any]], *, running: int, queued: int
) -> AsyncIterator[None]:
    """Streaming requests that are under way while the context lasts; then the client hangs up."""
    url = server.base_url + "/v1/chat/completions"

    async def read(session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        async with session.post(url, json=body) as response:
            async for _ in response.content.iter_any():
                pass

    async with _session() as session:
        reading = [asyncio.ensure_future(read(session, body)) for body in bodies]
        try:
            await _until(server, running=running, queued=queued)
            yield
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)


async def _until(server: KeepwarmServer, *, running: int, queued: int) -> None:
    """Wait for so many serving slots and waiting requests.

    Raises:
        EngineError: it doesn't come to that.
    """
    deadline = time.perf_counter() + _FILL_TIMEOUT_S
    while time.perf_counter() < deadline:
        now = await server.slots_now()
        serving = sum(slot["state"] == "serving" for slot in now.get("slots", ()))
        if (serving, now.get("queued")) == (running, queued):
            return
        await asyncio.sleep(0.05)
    raise EngineError(
        f"Not {running} requests running and {queued} waiting, but {serving} and "
        f"{now.get('queued')}: the streams that should be idle aren't."
    )


@asynccontextmanager
async def _listening(base_url: str, count: int) -> AsyncIterator[None]:
    """So many readers of the page's events, each with its first event in."""
    first = [asyncio.Event() for _ in range(count)]

    async def read(session: aiohttp.ClientSession, begun: asyncio.Event) -> None:
        async with session.get(base_url + "/keepwarm/events") as response:
            response.raise_for_status()
            async for _ in response.content.iter_any():
                begun.set()

    async with _session() as session:
        reading = [asyncio.ensure_future(read(session, begun)) for begun in first]
        try:
            begun = asyncio.gather(*(event.wait() for event in first))
            await asyncio.wait_for(begun, _FILL_TIMEOUT_S)
            yield
        except TimeoutError:
            raise EngineError("The page's events can't be read.") from None
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)
