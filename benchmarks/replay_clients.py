"""Recorded sessions of real clients, sent again: prompt tokens by client and phase.

    python -m benchmarks.replay_clients --recordings DIR --model m.gguf --chat-template t.jinja

`DIR` holds one file for each client, `CLIENT.jsonl`, a line a request in the order they came:
`{"n": 1, "phase": "A", "method": "POST", "path": "/v1/messages", "headers": [...], "body": {...}}`.
They are sent one after the other, each with its own path and headers and a whole reply of a few
tokens:

1. to Keepwarm on an empty store, and once more after it was stopped and started again;
2. to the engine alone with its defaults (four slots over one pool, its cache in memory).

Beside what each evaluated stands the least possible: what lies beyond the longest common token
prefix with anything asked before in the first pass. Writes a Markdown table to standard output.
Exit status 1 if Keepwarm evaluated more than the engine alone, or than the least by more than 2 %,
beyond one batch a client.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from benchmarks.options import add_options, settings_of
from keepwarm.api.messages import chat_request
from keepwarm.api.reading import chat_form
from keepwarm.bench.client import ChatClient
from keepwarm.bench.servers import KeepwarmServer, Server, Workplace, bare_engine
from keepwarm.core.reply import counts_of
from keepwarm.core.tree import Tokens, common_tokens
from keepwarm.engine.attach import plan_launch
from keepwarm.engine.client import EngineClient
from keepwarm.engine.counting import PromptCounter
from keepwarm.errors import EngineError, KeepwarmError
from keepwarm.settings import Settings, StoreSettings

_REPLY_TOKENS = 8
_TIMEOUT_S = 1800.0
_SLACK_TOKENS = 512
_WITHIN = 1.02
# What a client sets a reply's length by; the first is used where it sets none.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Set by whoever sends.
_OWN_HEADERS = {"host", "content-length", "accept-encoding", "connection", "transfer-encoding"}
COLUMNS = ("prompt", "least", "Keepwarm", "after a restart", "bare engine")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One request of a recording."""

    client: str
    phase: str
    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]

    @property
    def api(self) -> str:
        """Which API it is of."""
        return self.path.partition("?")[0].rpartition("/")[2]

    @property
    def short(self) -> dict[str, Any]:
        """Its body, with a reply of a few tokens that comes whole.

        A stream's headers are sent before its prompt is computed, so they can't tell what was
        filled ahead of it.
        """
        own = [name for name in _LENGTHS if name in self.body]
        usual = "max_output_tokens" if self.api == "responses" else "max_tokens"
        body = self.body | dict.fromkeys(own or [usual], _REPLY_TOKENS) | {"stream": False}
        return {name: value for name, value in body.items() if name != "stream_options"}

    @property
    def chat(self) -> dict[str, Any]:
        """What the engine renders it from."""
        if self.api == "messages":
            return chat_request(self.body)
        return chat_form("responses" if self.api == "responses" else "chat", self.body) or {}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Tokens of one prompt, and how many of them were evaluated."""

    prompt: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A recording's figures, request by request; `least` as `bare`."""

    requests: Sequence[Recorded]
    least: Sequence[Evaluated]
    keepwarm: Sequence[Evaluated]
    restarted: Sequence[Evaluated]
    bare: Sequence[Evaluated]


def recordings(folder: Path) -> dict[str, list[Recorded]]:
    """The requests of each client, in order; what only counts tokens is left out."""
    out: dict[str, list[Recorded]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        lines = [msgspec.json.decode(line) for line in file.read_bytes().splitlines()]
        out[file.stem] = [
            Recorded(
                file.stem,
                line["phase"],
                line["path"],
                {k: v for k, v in line["headers"] if k.lower() not in _OWN_HEADERS},
                line["body"],
            )
            for line in lines
            if line["method"] == "POST" and line["body"] and "count_tokens" not in line["path"]
        ]
    return out


async def send(session: aiohttp.ClientSession, base: str, asked: Recorded) -> Evaluated:
    """Send one request and read its counts.

    Raises:
        EngineError: it was refused, or the reply holds no counts.
    """
    data = msgspec.json.encode(asked.short)
    async with session.post(base + asked.path, data=data, headers=asked.headers) as reply:
        raw = await reply.read()
        ahead = int(reply.headers.get("X-Keepwarm-Filled", "0"))
    if reply.status != 200:
        raise EngineError(f"{asked.client} {asked.path}: {reply.status}: {raw[:300]!r}")
    counts = _counts(msgspec.json.decode(raw))
    if counts is None:
        raise EngineError(f"{asked.client} {asked.path}: no counts in {raw[-300:]!r}")
    cached, prefilled = counts
    return Evaluated(cached + prefilled, prefilled + ahead)


def _counts(reply: dict[str, Any]) -> tuple[int, int] | None:
    """Cached and prefilled tokens, by any API's words."""
    if counts := counts_of(reply):
        return counts.cached, counts.prefilled
    usage = reply.get("usage")
    if isinstance(usage, dict) and "cache_read_input_tokens" in usage:
        return usage["cache_read_input_tokens"], usage.get("input_tokens", 0)
    return None


async def least_of(counter: PromptCounter, requests: Sequence[Recorded]) -> list[Evaluated]:
    """What each request must cost whoever remembers all that was asked before."""
    known: list[Tokens] = []
    out: list[Evaluated] = []
    for asked in requests:
        ids = await counter.count(asked.chat)
        common = max((common_tokens(ids, other) for other in known), default=0)
        size = int(ids.size)
        out.append(Evaluated(size, size - min(common, size - 1)))
        known.append(ids)
    return out


async def replayed(server: Server, requests: Sequence[Recorded]) -> list[Evaluated]:
    """All requests of a recording, one after the other."""
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    # llama-server closes a connection that has just carried a stream under its client.
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return [await send(session, server.base_url, asked) for asked in requests]


async def measure(settings: Settings, requests: Sequence[Recorded], place: Path) -> Measured:
    """One recording on Keepwarm, twice, and on the bare engine. One server runs at a time."""
    client = ChatClient()
    launch = await plan_launch(settings.engine, slot_dir=place)
    assert launch.options
    bare = bare_engine(launch.options, binary=launch.binary, client=client, defaults=True)
    keepwarm = KeepwarmServer(settings, directory=place, client=client)
    try:
        await keepwarm.start()
        first = await replayed(keepwarm, requests)
        await keepwarm.stop()
        await keepwarm.start()
        second = await replayed(keepwarm, requests)
        await keepwarm.stop()
        await bare.start()
        alone = await replayed(bare, requests)
        counter = PromptCounter(EngineClient(bare.base_url))
        await counter.prepare()
        least = await least_of(counter, requests)
        counter.client.http.close()
    finally:
        for server in (bare, keepwarm):
            await server.stop()
        await client.close()
    return Measured(requests, least, first, second, alone)


def rows_of(measured: Measured) -> list[tuple[str, tuple[int, ...]]]:
    """Sums by phase, and of all; the columns are `COLUMNS`."""
    phases = list(dict.fromkeys(asked.phase for asked in measured.requests))
    groups = [(phase, [a.phase == phase for a in measured.requests]) for phase in phases]
    groups.append(("all", [True] * len(measured.requests)))
    evaluated = (measured.least, measured.keepwarm, measured.restarted, measured.bare)

    def total(numbers: Sequence[int], chosen: Sequence[bool]) -> int:
        return sum(n for n, is_chosen in zip(numbers, chosen, strict=True) if is_chosen)

    return [
        (
            name,
            (
                total([one.prompt for one in measured.bare], chosen),
                *(total([one.tokens for one in side], chosen) for side in evaluated),
            ),
        )
        for name, chosen in groups
    ]


def is_lawful(measured: Measured) -> bool:
    """Whether Keepwarm kept to the least and to the bare engine's count, within a batch."""
    _, least, first, _, bare = rows_of(measured)[-1][1]
    return first <= min(_WITHIN * least, bare) + _SLACK_TOKENS


async def run(settings: Settings, folder: Path, chosen: Sequence[str]) -> bool:
    """All recordings, a table of each as it is done; whether all kept the law."""
    head = ["client", "phase", *COLUMNS]
    _tell(head)
    _tell(["---", "---", *("---:" for _ in COLUMNS)])
    lawful = True
    for client, requests in recordings(folder).items():
        if chosen and client not in chosen:
            continue
        with Workplace(settings.store.staging_bytes) as place:
            store = place.store("store")
            kept = StoreSettings(dir=str(store), staging_dir=str(place.staging(store)))
            own = msgspec.structs.replace(settings, store=kept)
            measured = await measure(own, requests, place.root)
        for phase, numbers in rows_of(measured):
            _tell([client, phase, *(f"{number:,}" for number in numbers)])
        lawful &= is_lawful(measured)
    return lawful


def _tell(cells: Sequence[str]) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--recordings", type=Path, required=True)
    parser.add_argument("--only", default="", help="clients, separated by commas")
    args = parser.parse_args()
    settings, _ = settings_of(args)
    chosen = [name for name in args.only.split(",") if name]
    try:
        return int(not asyncio.run(run(settings, args.recordings, chosen)))
    except KeepwarmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
