"""Single measures: the gateway's cost, unknown prompts, ready again, switching, conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from keepwarm.bench.arms import DEFAULTS, KEEPWARM, Arm
from keepwarm.bench.client import ChatClient, TimedReply
from keepwarm.bench.prompts import (
    OWN_BYTES,
    Turn,
    assistant,
    direct_request,
    keepwarm_request,
    own_request,
    rules,
    user,
)
from keepwarm.bench.scenarios import REPLY_TOKENS, Bench
from keepwarm.bench.servers import KeepwarmServer, Server
from keepwarm.bench.stats import rotated
from keepwarm.core.tiers import Tier
from keepwarm.errors import EngineError

DIRECT = "engine, hot slot"
BARE = "engine alone"
OWN_PROMPT = f"own prompt, {OWN_BYTES // 1000} kB"
# A pair takes some 60 ms on a small model; the first few warm sockets and code paths.
_SETTLING_PAIRS = 5
_AT_ONCE = 4
_CONVERSATIONS, _TURNS = 6, 3
# About 900 tokens, as the outside client's.
_UNKNOWN_CHARS = 3600
_UNKNOWN_NEW = 5
# Until what a server does behind the last replies is done: the other arm is asked next.
_UNKNOWN_REST_S = 1.0
# An agent that calls tools asks again as soon as it is answered, and says little each time.
_LOOP_TURNS = 8


async def overhead(bench: Bench, arm: Arm, *, pairs: int) -> None:
    """One identical request through Keepwarm and directly to the engine's hot slot, in turns.

    Once on the default tier, whose prompt Keepwarm puts in itself, and once with a prompt of the
    client's own, which passes through whole.

    The direct requests go to the very engine, and the slot, that Keepwarm has just served it from,
    so both find the same state. A pair whose two replies reused different amounts compares nothing;
    it is left out and told in the notes.

    Raises:
        EngineError: half of the pairs don't compare; something else uses the engine.
    """
    keepwarm = arm.server
    assert isinstance(keepwarm, KeepwarmServer)
    await bench.start(arm)
    tier = bench.tiers.default
    turns = [user(bench.questions.new())]
    through = keepwarm_request(tier, turns, reply_tokens=REPLY_TOKENS)
    direct = direct_request(tier, turns, reply_tokens=REPLY_TOKENS)
    await _hot_pairs(bench, arm, tier.name, through=through, direct=direct, pairs=pairs)
    own = own_request(OWN_BYTES, bench.questions.new(), reply_tokens=REPLY_TOKENS)
    await _hot_pairs(bench, arm, OWN_PROMPT, through=own, direct=own, pairs=pairs)


async def _hot_pairs(
    bench: Bench,
    arm: Arm,
    step: str,
    *,
    through: dict[str, Any],
    direct: dict[str, Any],
    pairs: int,
) -> None:
    keepwarm = arm.server
    assert isinstance(keepwarm, KeepwarmServer)
    engine = str((await keepwarm.status())["engine_url"])
    left_out = 0
    for pair in range(-_SETTLING_PAIRS, pairs):
        bench.watcher.doing(f"overhead, {step}: pair {max(pair + 1, 0)} of {pairs}")
        answers: dict[str, TimedReply] = {}
        for way in rotated((KEEPWARM, DIRECT), pair):
            # Before either, since a look wakes the engine for what comes next.
            slot = await _last_slot(arm.client, engine)
            if way == KEEPWARM:
                answers[way] = await arm.client.ask(keepwarm.base_url, through)
            else:
                body = {**direct, "id_slot": slot, "cache_prompt": True}
                answers[way] = await arm.client.ask(engine, body)
        if pair < 0:
            continue
        if len({answer.counts.prefilled for answer in answers.values()}) > 1:
            left_out += 1
            continue
        for way, answer in answers.items():
            bench.record.sample(answer, scenario="overhead", step=step, arm=way, run=pair)
    if left_out * 2 > pairs:
        raise EngineError(
            f"{left_out} of {pairs} pairs of requests to a hot slot reused different amounts: "
            "something else uses this engine, so the two ways can't be compared."
        )
    if left_out:
        bench.record.notes.append(
            f"overhead, {step}: {left_out} of {pairs} pairs left out, since the two replies reused "
            "different amounts"
        )


async def _last_slot(client: ChatClient, engine: str) -> int:
    """The slot that ran the engine's latest task."""
    _, slots = await client.get(engine + "/slots")
    if not isinstance(slots, list) or not slots:
        raise EngineError("The engine doesn't list its slots.")
    return int(max(slots, key=lambda s: s.get("id_task", -1))["id"])


async def unknown(bench: Bench, *, rounds: int, requests: int) -> None:
    """Prompts that no server has seen, asked first, again and again, and in new conversations.

    Where nothing is known beforehand a gateway can only lose. Both arms go through the three steps
    in turns, each time with a system prompt of the client's own that is new to it; told is what
    each step takes in all.
    """
    arms = [arm for arm in bench.arms if arm.name in (DEFAULTS, KEEPWARM)]
    for arm in arms:
        await bench.start(arm)
    number = 1
    for turn in range(rounds):
        for arm in rotated(arms, turn):
            await asyncio.sleep(_UNKNOWN_REST_S)
            number += _UNKNOWN_CHARS
            # Numbered otherwise, so prompts have no more in common than their opening.
            system = {"role": "system", "content": rules(_UNKNOWN_CHARS, start=number)}
            same = [system, user(bench.questions.new())]
            steps = {
                "the first request": [same],
                f"{requests} identical": [same] * requests,
                f"{_UNKNOWN_NEW} new conversations": [
                    [system, user(bench.questions.new())] for _ in range(_UNKNOWN_NEW)
                ],
            }
            for step, asked in steps.items():
                bench.watcher.doing(f"unknown: round {turn + 1} of {rounds}, {step}, {arm.name}")
                seconds = 0.0
                for messages in asked:
                    body = {"model": "own", "messages": messages, "temperature": 0}
                    body["max_tokens"] = REPLY_TOKENS
                    answer = await arm.client.ask(arm.server.base_url, body)
                    seconds += answer.total_s
                    bench.record.sample(
                        answer, scenario="unknown", step=step, arm=arm.name, run=turn
                    )
                bench.record.duration(
                    seconds, scenario="unknown", step=step, arm=arm.name, run=turn
                )


async def readiness(bench: Bench, keepwarm: Server, bare: Server, *, runs: int) -> None:
    """Starts until ready, in turns: Keepwarm with every tier saved, and its engine alone.

    The engine alone is started with exactly Keepwarm's flags. Keepwarm has been started before, so
    its store holds the tiers.
    """
    await keepwarm.stop()
    for run in range(runs):
        for name, server in rotated([(KEEPWARM, keepwarm), (BARE, bare)], run):
            bench.watcher.doing(f"ready: start {run + 1} of {runs}, {name}")
            seconds = await server.start()
            bench.record.duration(
                seconds, scenario="ready", step="start to ready", arm=name, run=run
            )
            await server.stop()


async def switching(bench: Bench, arm: Arm, *, runs: int) -> None:
    """Up and down the tiers on one slot: minimal, standard, full and back, a new question each.

    Args:
        bench: tiers and record.
        arm: a Keepwarm with a single slot, so that each request has to change what it holds.
        runs: how often.
    """
    up: Sequence[Tier] = list(bench.tiers)
    path = [*up, *reversed(up[:-1])]
    for run in range(runs):
        for before, tier in zip([path[-1], *path], path, strict=False):
            step = f"{before.name} to {tier.name}"
            text = bench.questions.new()
            await bench.ask(arm, tier, text, scenario="switch", step=step, run=run)


async def conversations(bench: Bench, *, runs: int) -> None:
    """Four new ones at once, a loop of short turns, six interleaved, and all six after a crash.

    Each arm goes through the whole of it before the next begins, since what its slots hold is what
    is looked at; arms begin in turn.
    """
    arms = [arm for arm in bench.arms if arm.name in (DEFAULTS, KEEPWARM)]
    for run in range(runs):
        for arm in rotated(arms, run):
            await arm.server.stop()
            bench.watcher.doing(f"conversations: starting {arm.name}")
            await arm.server.start(bench.watcher.doing)
            await _converse(bench, arm, run)
            await arm.server.stop()


async def _converse(bench: Bench, arm: Arm, run: int) -> None:
    tiers = list(bench.tiers)
    rounds = _Rounds(bench, arm, run)
    for tier in tiers:
        await rounds.one("first on each tier", tier, [user(bench.questions.new())])
    texts = [bench.questions.new() for _ in range(_AT_ONCE)]
    await rounds.at_once(f"{_AT_ONCE} new at once", bench.tiers.default, texts)
    loop: list[Turn] = []
    for _ in range(_LOOP_TURNS):
        loop.append(user(bench.questions.new()))
        said = await rounds.one(f"loop of {_LOOP_TURNS} turns", bench.tiers.default, loop)
        loop.append(assistant(said))
    talks: list[tuple[Tier, list[Turn]]] = [
        (tiers[i % len(tiers)], []) for i in range(_CONVERSATIONS)
    ]
    step = f"{_CONVERSATIONS} interleaved"
    for _ in range(_TURNS):
        for tier, turns in talks:
            turns.append(user(bench.questions.new()))
            turns.append(assistant(await rounds.one(step, tier, turns)))
    seconds = await arm.server.crash()
    bench.record.duration(
        seconds, scenario="conversations", step="killed to ready", arm=arm.name, run=run
    )
    for tier, turns in talks:
        turns.append(user(bench.questions.new()))
        await rounds.one("resumed after SIGKILL", tier, turns)
    rounds.close()


class _Rounds:
    """One arm's way through the conversations; sums up what each step took in all."""

    def __init__(self, bench: Bench, arm: Arm, run: int) -> None:
        self._bench = bench
        self._arm = arm
        self._run = run
        self._walls: dict[str, float] = {}

    async def one(self, step: str, tier: Tier, turns: Sequence[Turn]) -> str:
        """Ask, record, and return what was said."""
        self._bench.watcher.doing(f"conversations: {step}, {self._arm.name}")
        answer = await self._arm.ask(tier, turns, reply_tokens=REPLY_TOKENS)
        self._keep(step, answer)
        self._walls[step] = self._walls.get(step, 0.0) + answer.total_s
        return answer.text

    async def at_once(self, step: str, tier: Tier, texts: Sequence[str]) -> None:
        """Ask all of them at the same moment."""
        self._bench.watcher.doing(f"conversations: {step}, {self._arm.name}")
        asked = (self._arm.ask(tier, [user(t)], reply_tokens=REPLY_TOKENS) for t in texts)
        answers = await asyncio.gather(*asked)
        for answer in answers:
            self._keep(step, answer)
        self._walls[step] = max(answer.total_s for answer in answers)

    def _keep(self, step: str, answer: TimedReply) -> None:
        sample = self._bench.record.sample(
            answer, scenario="conversations", step=step, arm=self._arm.name, run=self._run
        )
        self._bench.watcher.measured(sample)

    def close(self) -> None:
        """Record the sums."""
        for step, seconds in self._walls.items():
            self._bench.record.duration(
                seconds, scenario="conversations", step=step, arm=self._arm.name, run=self._run
            )
