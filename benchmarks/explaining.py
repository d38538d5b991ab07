"""What explaining a request costs, in processor time, without an engine.

    python -m benchmarks.explaining

Conversations of several turns, each with 9 kB of instructions of its own, taken in turns as several
agents would: every request is compared with the ones before it, explained, counted, logged and
written to a history on disk. That happens after the reply, on a thread of its own. Told is the
processor time of the whole process for each request, with requests coming as fast as they are
explained. Writes one JSON object to standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.bench.machine import machine
from keepwarm.bench.prompts import OWN_BYTES, assistant, rules, user
from keepwarm.core.plan import Option, Plan, Source
from keepwarm.core.prompt import Segment, prompt_of
from keepwarm.core.reply import Counts, Reply
from keepwarm.explain.explainer import Explainer, Identity
from keepwarm.explain.metrics import Metrics
from keepwarm.explain.record import Ended
from keepwarm.logs import set_up_logging
from keepwarm.settings import LogSettings

AGENTS, TURNS = 8, 6
_SAID = "One of them is the first that comes to mind, and there is nothing more to it. " * 3
_CHARS_PER_TOKEN = 4


def requests_of(count: int) -> Iterator[Ended]:
    """So many requests of agents that take turns, each a little longer than its last one."""
    number = 0
    while number < count:
        talks: list[list[dict[str, str]]] = [
            [{"role": "system", "content": rules(OWN_BYTES, start=1 + 50 * (number + agent))}]
            for agent in range(AGENTS)
        ]
        for turn in range(TURNS):
            for talk in talks:
                talk.append(user(f"Question {number}.{turn}: name one. {_SAID}"))
                yield _ended(number, talk)
                talk.append(assistant(f"Answer {number}. {_SAID}"))
                number += 1


def _ended(number: int, talk: list[dict[str, str]]) -> Ended:
    body = {"model": "own", "messages": list(talk), "max_tokens": 64}
    prompt = prompt_of(body, fingerprint="bench", namespace="")
    tokens = prompt.chars // _CHARS_PER_TOKEN
    warm = tokens - 100 if len(talk) > 2 else 0
    source = Source.SLOT if warm else Source.COLD
    considered = tuple(Option(source, slot, warm, 0.2 + slot, 0.0) for slot in range(4))
    plan = Plan(
        source=source,
        slot=0,
        reuse_tokens=warm,
        promise_tokens=warm,
        prompt_tokens=tokens,
        estimate_s=0.2,
        save_first=False,
        fill=False,
        restore=None,
        evict=(),
        considered=considered,
    )
    now_s = time.time()
    reply = Segment("assistant", f"Answer {number}. {_SAID}")
    return Ended(
        id=f"{number:016x}",
        api="chat",
        namespace="",
        model="own",
        body=body,
        prompt=prompt,
        plan=plan,
        tier="none",
        tier_reason="own_system_prompt",
        at_s=now_s,
        received_s=0.0,
        arrived_s=0.001,
        queued_s=0.0,
        prepared_s=0.0,
        first_byte_s=0.2,
        ended_s=0.0,  # at once: all that came before is known to it
        streamed=True,
        status=200,
        trouble="",
        reply=Reply(Counts(warm, tokens - warm, 60, 0.2, 1.0), reply, "stop"),
        static_tokens=OWN_BYTES // _CHARS_PER_TOKEN,
        filled_tokens=0,
        failed_restore=None,
        prefill_s_per_token=0.004,
        engine=1,
        traceparent="",
        rewrites={},
    )


async def measure(directory: Path, *, count: int, rounds: int) -> dict[str, Any]:
    """Microseconds a request, the median of some rounds; the first one only warms up."""
    told: list[float] = []
    for turn in range(-1, rounds):
        explainer = Explainer(keeps_text=False, sinks=[Metrics()])
        identity = Identity("bench", {"engine": "none"}, cuttable=True)
        place = directory / str(turn)
        place.mkdir()
        await explainer.open(place, identity, [])
        given = list(requests_of(count))
        began = time.process_time()
        for ended in given:
            explainer.ended(ended)
        await explainer.settled()
        used = time.process_time() - began
        kept = await explainer.latest(namespace="", limit=len(given))
        await explainer.close()
        if len(kept) != len(given):
            raise SystemExit(f"{len(given)} requests ended and {len(kept)} are on record")
        if turn >= 0:
            told.append(used / len(given) * 1e6)
    return {
        "requests": count,
        "rounds": rounds,
        "cpu_us_per_request": {
            "median": round(statistics.median(told)),
            "min": round(min(told)),
            "max": round(max(told)),
        },
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=960, help="in a round; at most 1000")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="keepwarm-explain-") as directory,
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stderr(nowhere),  # the log's lines are made as always
    ):
        set_up_logging(LogSettings())
        found = asyncio.run(measure(Path(directory), count=args.requests, rounds=args.rounds))
    json.dump({"machine": msgspec.to_builtins(machine()), **found}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
