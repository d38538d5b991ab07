"""The next turn prefilled while nobody asks, against the same conversations without it, in turns.

A model that reasons is played: its replies are held to given words by a grammar, reasoning first,
and the conversation is sent back as agents do, with the reasoning in a field of its own. Between
the turns the machine rests, as it does while somebody reads.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from keepwarm.bench.arms import Arm
from keepwarm.bench.client import TimedReply
from keepwarm.bench.prompts import rules, user
from keepwarm.bench.scenarios import Bench
from keepwarm.bench.servers import KeepwarmServer
from keepwarm.bench.stats import rotated

ON, OFF = "ahead", "no ahead"
NEW, AGAIN = "new question", "asked again"
# How many tools are called in each turn of a conversation, by its name.
TALKS = {"chat": 0, "agent": 3}
_TURNS = 6
# A slot is saved after 0.3 s and the next turn begun behind that; then it is waited for.
_REST_S, _LOOK_EVERY_S, _LOOKS = 2.0, 0.2, 1500
# Characters: some 500, 40, 120, 60 and 150 tokens.
_SYSTEM, _QUESTION, _THOUGHT, _REPLY, _RESULT = 1700, 110, 350, 170, 440

Message = dict[str, Any]


async def next_turns(bench: Bench, arms: dict[str, Arm], *, runs: int) -> None:
    """Both arms go through a chat and an agent's loop, turn by turn.

    Args:
        bench: where it is recorded.
        arms: by `ON` and `OFF`, a Keepwarm each.
        runs: how often.

    Raises:
        EngineError: no answer.
    """
    for arm in arms.values():
        await bench.start(arm)
    for run in range(runs):
        for talk, calls in TALKS.items():
            talks = {name: _Talk(bench, arm, talk, run) for name, arm in arms.items()}
            for turn in range(_TURNS):
                for name in rotated(tuple(arms), turn):
                    await talks[name].turn(turn, calls)
            for one in talks.values():
                await one.again()


class _Talk:
    """One arm's conversation."""

    def __init__(self, bench: Bench, arm: Arm, name: str, run: int) -> None:
        self._bench = bench
        self._arm = arm
        self._name = name
        self._run = run
        opening = f"{name} {run}. " + rules(_SYSTEM)
        self._history: list[Message] = [{"role": "system", "content": opening}]

    async def turn(self, turn: int, calls: int) -> None:
        """One question, the tools that are called for it, and the reply; then a rest."""
        self._bench.watcher.doing(
            f"ahead, {self._name}: turn {turn + 1} of {_TURNS}, {self._arm.name}"
        )
        start = 1000 * turn
        self._history.append(user(f"Question {turn}: " + rules(_QUESTION, start=start)))
        for number in range(start, start + calls):
            thought = rules(_THOUGHT, start=number + 100)
            answer = await self._ask(reply_tokens=1)
            if number == start:
                self._record(answer, NEW, turn)
            function = {"name": "look", "arguments": json.dumps({"at": number})}
            call = {"id": f"call{number:05}", "type": "function", "function": function}
            reply = {"role": "assistant", "content": "", "reasoning_content": thought}
            result = {"role": "tool", "tool_call_id": call["id"]}
            self._history += [
                {**reply, "tool_calls": [call]},
                {**result, "content": rules(_RESULT, start=number + 200)},
            ]
        thought, said = rules(_THOUGHT, start=start + 300), rules(_REPLY, start=start + 400)
        answer = await self._ask(words=f"<think>\n{thought}\n</think>\n\n{said}")
        if not calls:
            self._record(answer, NEW, turn)
        self._history.append({"role": "assistant", "content": said, "reasoning_content": thought})
        await self._rest()

    async def again(self) -> None:
        """The last question once more, as for another answer to it."""
        self._history.pop()
        self._record(await self._ask(reply_tokens=1), AGAIN, _TURNS)
        await self._rest()

    def _record(self, answer: TimedReply, step: str, turn: int) -> None:
        if turn == 0:
            return  # nothing could be known before
        sample = self._bench.record.sample(
            answer,
            scenario="ahead",
            step=f"{self._name}, {step}",
            arm=self._arm.name,
            run=self._run,
        )
        self._bench.watcher.measured(sample)

    async def _ask(self, *, reply_tokens: int = 2000, words: str = "") -> TimedReply:
        """Ask; `words` are what the model is to say."""
        body: Message = {"messages": self._history, "max_tokens": reply_tokens, "temperature": 0}
        if words:
            body["grammar"] = f"root ::= {json.dumps(words)}"
        return await self._arm.client.ask(self._arm.server.base_url, body)

    async def _rest(self) -> None:
        """Wait as somebody who reads, and until the server has nothing left to do."""
        server = self._arm.server
        assert isinstance(server, KeepwarmServer)
        await asyncio.sleep(_REST_S)
        for _ in range(_LOOKS):
            slots = (await server.slots_now()).get("slots") or []
            if all(slot.get("state") == "idle" for slot in slots):
                return
            await asyncio.sleep(_LOOK_EVERY_S)
