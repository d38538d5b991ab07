"""Ten minutes of an agent's low load: does anything grow, get lost or stay open?

    python -m benchmarks.soak --model m.gguf --chat-template t.jinja --minutes 10

Keepwarm runs on an empty store of its own. Every second or so comes a request: a new conversation
on some tier, a further turn of an earlier one, or one whose client hangs up in the middle. After a
warm-up (a fifth of the time), memory and open descriptors of Keepwarm are sampled; at the end
all slots must be idle and both must be as they were. Writes one JSON object to standard output;
exit status 1 if something grew or was lost. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from keepwarm.bench.client import ChatClient
from keepwarm.bench.prompts import Questions, Turn, assistant, keepwarm_request, user
from keepwarm.bench.servers import KeepwarmServer, Workplace
from keepwarm.core.tiers import TierSet
from keepwarm.settings import EngineSettings, Settings, StoreSettings, TierSettings
from keepwarm.tiers.files import find_tiers_directory, load_tiers

_PAUSE_S = 1.0
_HANG_UP_SHARE = 0.15
_FURTHER_SHARE = 0.5
_TALKS = 12
# What may come and go: SQLite's files, a connection that is just being closed.
_SPARE_DESCRIPTORS = 6
# Allocators keep some of what one large prompt needed.
_GROWTH = 1.1


@dataclass(slots=True)
class Samples:
    """What was seen over time: resident bytes and open descriptors of Keepwarm's process."""

    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def take(self, server: KeepwarmServer) -> None:
        """One more of each."""
        resident = server.resident_bytes()
        assert resident
        self.resident.append(resident)
        self.descriptors.append(len(list(Path(f"/proc/{server.pid}/fd").iterdir())))


def grown(samples: Samples) -> list[str]:
    """What grew between the first and the last quarter of the samples, in words."""
    found = []
    quarter = max(len(samples.resident) // 4, 1)

    def middle(values: list[int], *, last: bool) -> float:
        return statistics.median(values[-quarter:] if last else values[:quarter])

    before, after = (middle(samples.resident, last=last) for last in (False, True))
    if after > before * _GROWTH:
        found.append(f"memory grew from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
    opened, open_now = (middle(samples.descriptors, last=last) for last in (False, True))
    if open_now > opened + _SPARE_DESCRIPTORS:
        found.append(f"open descriptors grew from {opened:.0f} to {open_now:.0f}")
    return found


class _Load:
    """One agent's requests, one after another."""

    def __init__(self, server: KeepwarmServer, client: ChatClient, tiers: TierSet) -> None:
        self._server, self._client = server, client
        self._tiers = list(tiers)
        self._random = random.Random(1)  # noqa: S311 - the same load each time
        self._questions = Questions()
        self._talks: list[tuple[Any, list[Turn]]] = []
        self.answered = self.hung_up = 0

    async def one(self) -> None:
        """A request of some kind, to its end or the client's."""
        choose = self._random
        if self._talks and choose.random() < _FURTHER_SHARE:
            tier, turns = choose.choice(self._talks)
        else:
            tier, turns = choose.choice(self._tiers), []
            self._talks = [*self._talks[-_TALKS + 1 :], (tier, turns)]
        turns.append(user(self._questions.new()))
        if choose.random() < _HANG_UP_SHARE:
            await self._hang_up({**keepwarm_request(tier, turns, reply_tokens=400), "stream": True})
            turns.pop()
            return
        body = keepwarm_request(tier, turns, reply_tokens=8)
        answer = await self._client.ask(self._server.base_url, body)
        turns.append(assistant(answer.text))
        self.answered += 1

    async def _hang_up(self, body: dict[str, Any]) -> None:
        url = self._server.base_url + "/v1/chat/completions"
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session,
            session.post(url, json=body) as response,
        ):
            await response.content.readany()
        self.hung_up += 1


async def soak(settings: Settings, tiers: TierSet, *, minutes: float) -> dict[str, Any]:
    """Run it; see the module."""
    client = ChatClient()
    with Workplace(settings.store.staging_bytes) as workplace:
        store = workplace.store("store")
        settings = Settings(
            engine=settings.engine,
            tiers=settings.tiers,
            store=StoreSettings(dir=str(store), staging_dir=str(workplace.staging(store))),
        )
        server = KeepwarmServer(settings, directory=workplace.root, client=client)
        try:
            await server.start()
            load, samples = _Load(server, client, tiers), Samples()
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < minutes * 60:
                await load.one()
                if elapsed > minutes * 12:
                    samples.take(server)
                await asyncio.sleep(_PAUSE_S)
            await asyncio.sleep(2.0)
            slots = (await server.status())["slots"]
        finally:
            await server.stop()
            await client.close()
    lost = [f"slot {slot['id']} is {slot['state']}" for slot in slots if slot["state"] != "idle"]
    return {
        "minutes": minutes,
        "answered": load.answered,
        "hung_up": load.hung_up,
        "resident_mb": [round(v / 1e6, 1) for v in (samples.resident[0], samples.resident[-1])],
        "descriptors": [samples.descriptors[0], samples.descriptors[-1]],
        "troubles": [*lost, *grown(samples)],
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat-template", default="")
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    directory = find_tiers_directory(None, Path.home() / ".config")
    settings = Settings(
        engine=EngineSettings(model=args.model, chat_template=args.chat_template, slots=4),
        tiers=TierSettings(dir=str(directory.absolute())),
    )
    tiers = load_tiers(directory, settings.tiers.agent_name)
    report = asyncio.run(soak(settings, tiers, minutes=args.minutes))
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(report["troubles"]))


if __name__ == "__main__":
    main()
