"""The arms that are compared, each a server and a way to ask it.

*no-cache* evaluates every prompt from its first token (`cache_prompt: false`), on an engine with
one slot and nothing else to do: the most a cold prompt can be spared of anything. *llama-server* is
the same engine as it comes, with its own slot choice and RAM prompt cache. *Keepwarm* is
`keepwarm serve` over the same engine. Model, context, threads and template are the same in all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from keepwarm.bench.client import ChatClient, TimedReply
from keepwarm.bench.prompts import Turn, direct_request, keepwarm_request
from keepwarm.bench.results import Amount, Duration, Sample
from keepwarm.bench.servers import KeepwarmServer, Server
from keepwarm.core.tiers import Tier

NO_CACHE = "no-cache"
DEFAULTS = "llama-server"
KEEPWARM = "keepwarm"
ARMS = (NO_CACHE, DEFAULTS, KEEPWARM)


@dataclass(slots=True)
class Arm:
    """One thing under test."""

    name: str
    server: Server
    client: ChatClient

    async def ask(self, tier: Tier, turns: Sequence[Turn], *, reply_tokens: int) -> TimedReply:
        """Ask a tier of this arm's server.

        Raises:
            EngineError: no answer.
        """
        body: dict[str, Any]
        if isinstance(self.server, KeepwarmServer):
            body = keepwarm_request(tier, turns, reply_tokens=reply_tokens)
        else:
            body = direct_request(tier, turns, reply_tokens=reply_tokens)
        if self.name == NO_CACHE:
            body["cache_prompt"] = False
        return await self.client.ask(self.server.base_url, body)


@dataclass(slots=True)
class Record:
    """What has been measured so far."""

    began: float = field(default_factory=time.perf_counter)
    samples: list[Sample] = field(default_factory=list)
    durations: list[Duration] = field(default_factory=list)
    amounts: list[Amount] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def sample(self, answer: TimedReply, *, scenario: str, step: str, arm: str, run: int) -> Sample:
        """Keep one answer."""
        made = Sample(
            scenario=scenario,
            step=step,
            arm=arm,
            run=run,
            ttft_s=answer.ttft_s,
            total_s=answer.total_s,
            cached_tokens=answer.counts.cached,
            prefilled_tokens=answer.counts.prefilled,
            decoded_tokens=answer.counts.decoded,
            plan=answer.plan,
        )
        self.samples.append(made)
        return made

    def duration(self, seconds: float, *, scenario: str, step: str, arm: str, run: int) -> None:
        """Keep the time that something else took."""
        self.durations.append(
            Duration(scenario=scenario, step=step, arm=arm, run=run, seconds=seconds)
        )

    def amount(
        self, value: float, unit: str, *, scenario: str, step: str, arm: str, run: int
    ) -> None:
        """Keep what isn't a time."""
        self.amounts.append(
            Amount(scenario=scenario, step=step, arm=arm, run=run, value=value, unit=unit)
        )
