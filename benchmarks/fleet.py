"""What a fleet's parts cost: moving a conversation to another node, and choosing a node.

    python -m benchmarks.fleet --model m.gguf --chat-template t.jinja

Needs the fleet extra, not Ray: the nodes are those of a fleet, one after the other in this process,
each with an engine of its own, and a directory as the shared store. *Moves*: in each round a
conversation begins at a first node, which ends; it goes on at a second one that has never run, so
that what was said is moved there; and at the first one again, from its own store. All are asked
over HTTP for one token, streamed, after the node has answered something else. *Choices*: processor
time of the router's decision among 64 nodes that hold 10,000 prefixes each. Writes one JSON object
to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from rich.progress import track

from benchmarks.options import add_options, settings_of
from keepwarm.bench.client import ChatClient, TimedReply
from keepwarm.bench.machine import describe_model, machine
from keepwarm.bench.prompts import Turn, assistant, keepwarm_request, rules, user
from keepwarm.bench.servers import Workplace
from keepwarm.bench.stats import median, percentile
from keepwarm.cli.output import err
from keepwarm.core.tiers import Tier
from keepwarm.errors import EngineError, KeepwarmError
from keepwarm.fleet.costs import NodeCosts
from keepwarm.fleet.node import NodeLife
from keepwarm.fleet.routing import Fleet, NodeReport, Want
from keepwarm.fleet.shared import open_shared
from keepwarm.gateway.app import make_app
from keepwarm.settings import Places, Settings, StoreSettings

COLD, HOME, MOVED = "its first turn, cold", "its next turn at home", "its next turn elsewhere"
PREFILLED, PULLED = "ready, tiers prefilled", "ready, tiers moved"
NODES, HELD = 64, 10_000
_MARKS = 10
# About 1,000 tokens behind the tier, in a small vocabulary.
_SAID_CHARS = 4000


@dataclass(frozen=True, slots=True)
class Running:
    """A node that is ready, after `seconds`."""

    life: NodeLife
    client: ChatClient
    url: str
    seconds: float

    async def ask(self, tier: Tier, turns: list[Turn]) -> TimedReply:
        """One token."""
        return await self.client.ask(self.url, keepwarm_request(tier, turns, reply_tokens=1))


@asynccontextmanager
async def node(settings: Settings, place: Workplace, name: str) -> AsyncIterator[Running]:
    """A node with this name's store; at its end it writes to the shared store what it has."""
    store = place.store(name)
    kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
    settings = msgspec.structs.replace(settings, store=kept)
    places = Places(config_home=store, state_home=store, runtime_dir=None, settings_file=None)
    shared = open_shared(
        str(place.store("shared")),
        options={},
        upload_bytes_per_s=0,
        download_bytes_per_s=0,
        timeout_s=30,
    )
    life, client = NodeLife(settings, places, shared=shared), ChatClient()
    runner = web.AppRunner(make_app(life), access_log=None)
    began = time.perf_counter()
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        await life.start()
        host, port = runner.addresses[0][:2]
        yield Running(life, client, f"http://{host}:{port}", time.perf_counter() - began)
    finally:
        await life.stop()
        await runner.cleanup()
        await client.close()


async def measure(settings: Settings, tier: Tier, *, rounds: int) -> dict[str, Any]:
    """All of it; see the module. Raises: EngineError where nothing was moved or restored."""
    seconds: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}

    def note(what: str, answer: TimedReply) -> None:
        seconds.setdefault(what, []).append(answer.ttft_s)
        tokens.setdefault(what, []).append(answer.counts.prefilled + answer.filled_tokens)

    moved: list[int] = []
    with Workplace(settings.store.staging_bytes) as place:
        for i in track(range(rounds), "moving", console=err):
            said = user(f"Note {i + 1}: {rules(_SAID_CHARS, start=97 * i + 1)} What is the first?")
            hello = [user("Hello.")]
            async with node(settings, place, "home") as home:
                if i == 0:
                    seconds[PREFILLED] = [home.seconds]
                await home.ask(tier, hello)
                first = await home.ask(tier, [said])
                note(COLD, first)
            talk = [said, assistant(first.text), user("And the second?")]
            async with node(settings, place, f"other-{i}") as other:
                seconds.setdefault(PULLED, []).append(other.seconds)
                if any(warmed.how != "restored" for warmed in other.life.node.prefixes.warmed):
                    raise EngineError("A node that should have pulled its tiers prefilled one.")
                await other.ask(tier, hello)
                note(MOVED, await other.ask(tier, talk))
                moved.append(sum(other.life.node.moved.values()))
            async with node(settings, place, "home") as home:
                await home.ask(tier, hello)
                answer = await home.ask(tier, talk)
                note(HOME, answer)
                if home.life.node.moved or answer.plan != "snapshot":
                    raise EngineError(f"At home the plan was {answer.plan!r}, not a restore.")
    if not min(moved):
        raise EngineError("Nothing was moved, so nothing is told of moving.")
    medians = {what: median(taken) for what, taken in seconds.items()}
    return {
        "rounds": rounds,
        "moved_tokens": median(moved),
        "median_s": {what: round(taken, 3) for what, taken in medians.items()},
        "prefilled_tokens": {what: median(each) for what, each in tokens.items()},
        "moved_over_home": round(medians[MOVED] / medians[HOME], 2),
    }


def measure_choices(*, choices: int) -> dict[str, Any]:
    """Milliseconds of processor time to rank all nodes for conversations that some of them hold."""
    drawn = random.Random(64)  # noqa: S311 - made-up conversations
    costs = NodeCosts(0.001, 1e-5, 0.002, 1e-4, 0.02, can_fetch=True)
    fleet, now_s = Fleet(), 0.0
    # Conversations of ten turns: all of a conversation's prefixes are held where it is.
    talks = [[drawn.getrandbits(64) for _ in range(_MARKS)] for _ in range(NODES * HELD // _MARKS)]
    each = HELD // _MARKS
    for number in range(NODES):
        held = [prefix for talk in talks[number * each : (number + 1) * each] for prefix in talk]
        told = NodeReport(taken_s=now_s, backlog_s=drawn.random(), costs=costs, held=held)
        fleet.report(f"node-{number}", told, now_s=now_s)
    taken: list[float] = []
    ends = [500 * (turn + 1) for turn in range(_MARKS)]
    for _ in range(choices):
        want = Want([*drawn.choice(talks)[:-1], drawn.getrandbits(64)], ends, ends[-1])
        began = time.thread_time()
        fleet.give(want, fleet.rank(want, now_s=now_s)[0], now_s=now_s)
        taken.append(time.thread_time() - began)
    told_ms = {"median": median(taken), "p95": percentile(taken, 0.95)}
    return {
        "nodes": NODES,
        "prefixes_each": HELD,
        "choices": choices,
        "cpu_ms": {name: round(1e3 * seconds, 3) for name, seconds in told_ms.items()},
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--choices", type=int, default=2000)
    args = parser.parse_args()
    try:
        settings, tiers = settings_of(args)
        found = {
            "choices": measure_choices(choices=args.choices),
            "moves": asyncio.run(measure(settings, next(iter(tiers)), rounds=args.rounds)),
        }
    except KeyboardInterrupt:
        sys.exit("interrupted: everything that was started has been ended")
    except KeepwarmError as error:
        sys.exit(f"error: {error}")
    about = {"machine": msgspec.to_builtins(machine()), "model": describe_model(Path(args.model))}
    json.dump({**about, **found}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
