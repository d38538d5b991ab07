"""A streamed request shows a sign of life at once and each second, wherever it waits."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from itertools import pairwise
from typing import Any

import anthropic
import openai
import pytest
from fakeengine import Fault
from rig import Keepwarm, until

from keepwarm.settings import ServerSettings

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
RESPONSES, COMPLETION = "/v1/responses", "/completion"
LONG_S = 2.6


def body_of(path: str, keepwarm: Keepwarm) -> dict[str, Any]:
    if path == COMPLETION:
        return {"prompt": list(range(50)), "stream": True}
    return keepwarm.body(stream=True)


class Seen:
    """What a client saw of one stream, and when, from the moment at which it asked."""

    status = 0
    headers_s = 0.0
    headers: dict[str, str]

    def __init__(self) -> None:
        self.pieces: list[tuple[float, str]] = []

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.pieces)

    def longest_silence_s(self) -> float:
        times = [self.headers_s, *(at_s for at_s, _ in self.pieces)]
        return max(b - a for a, b in pairwise(times))


async def ask(keepwarm: Keepwarm, path: str, body: dict[str, Any]) -> Seen:
    seen, began_s = Seen(), time.monotonic()
    async with keepwarm.session.post(keepwarm.base + path, json=body) as response:
        seen.status, seen.headers_s = response.status, time.monotonic() - began_s
        seen.headers = {k.lower(): v for k, v in response.headers.items()}
        async for piece in response.content.iter_any():
            seen.pieces.append((time.monotonic() - began_s, piece.decode()))
    return seen


async def resume_later(keepwarm: Keepwarm) -> None:
    await asyncio.sleep(LONG_S)
    keepwarm.engine.resume.set()


@pytest.mark.parametrize("path", [CHAT, MESSAGES, COMPLETION])
async def test_a_slow_engine_is_no_silence(keepwarm: Keepwarm, path: str) -> None:
    keepwarm.engine.faults.append(Fault.STALL)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    seen = await ask(keepwarm, path, body_of(path, keepwarm))
    await waking
    assert seen.status == 200
    assert seen.headers_s < 1.5
    assert seen.longest_silence_s() < 1.5
    ping = "event: ping\n" if path == MESSAGES else ": keepwarm\n"
    assert seen.text.count(ping) >= 2
    assert seen.headers["x-keepwarm-plan"]
    assert "noon" in seen.text
    # A ping is no first word: the figure has the whole wait.
    metrics = await keepwarm.metrics()
    total = sum(
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("keepwarm_ttft_seconds_sum")
    )
    assert total >= LONG_S - 0.1
    await keepwarm.settled()


async def test_the_queue_is_no_silence_and_what_is_known_later_is_told(
    keepwarm: Keepwarm,
) -> None:
    keepwarm.engine.faults.extend([Fault.STALL, Fault.STALL])
    first = [asyncio.ensure_future(keepwarm.ask(f"{n} disks?")) for n in range(2)]
    await until(lambda: len(keepwarm.engine.busy) == 2)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    seen = await ask(keepwarm, CHAT, keepwarm.body(stream=True))
    await asyncio.gather(waking, *first)
    assert seen.status == 200
    assert seen.headers_s < 1.5
    assert seen.longest_silence_s() < 1.5
    assert "x-keepwarm-plan" not in seen.headers, "nobody could know it yet"
    assert "\n: X-Keepwarm-Plan: " in seen.text
    assert "noon" in seen.text


@pytest.mark.parametrize("server_settings", [ServerSettings(queue_timeout_s=2)], ids=["short"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_late_refusal_is_an_event(keepwarm: Keepwarm, path: str) -> None:
    keepwarm.engine.faults.extend([Fault.STALL, Fault.STALL])
    first = [asyncio.ensure_future(keepwarm.ask(f"{n} disks?")) for n in range(2)]
    await until(lambda: len(keepwarm.engine.busy) == 2)
    seen = await ask(keepwarm, path, keepwarm.body(stream=True))
    keepwarm.engine.resume.set()
    await asyncio.gather(*first)
    assert seen.status == 200
    last = seen.text.strip().rpartition("data: ")[2]
    assert "No slot was free" in json.loads(last)["error"]["message"]
    if path == MESSAGES:
        assert "event: error\n" in seen.text
    await keepwarm.settled()


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_a_quick_refusal_has_its_status(keepwarm: Keepwarm, path: str) -> None:
    keepwarm.engine.faults.append(Fault.REFUSED)
    seen = await ask(keepwarm, path, keepwarm.body(stream=True))
    assert seen.status == 400
    assert "too long" in json.loads(seen.text)["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_progress_that_is_asked_for_is_told_while_a_slot_is_filled(
    keepwarm: Keepwarm, path: str
) -> None:
    keepwarm.engine.fill_s = 3.0
    said = {"role": "system", "content": "The rules of this house are many. " * 40}
    body = keepwarm.body(stream=True, return_progress=True, model="own")
    if path == MESSAGES:
        body["system"] = said["content"]
    else:
        body["messages"].insert(0, said)
    seen = await ask(keepwarm, path, body)
    events = [json.loads(li[5:]) for li in seen.text.split("\n") if li.startswith("data: {")]
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert "noon" in seen.text
    assert seen.longest_silence_s() < 1.6
    if path == MESSAGES:  # the engine tells none there
        assert not told
        return
    assert told
    assert all(sorted(at) == ["cache", "processed", "time_ms", "total"] for at in told)
    assert 0 < told[-1]["processed"] < told[-1]["total"]
    first = events[0]
    assert (first["object"], first["model"]) == ("chat.completion.chunk", "own")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}


async def test_progress_that_nobody_asked_for_isnt_told(keepwarm: Keepwarm) -> None:
    keepwarm.engine.fill_s = 2.0
    said = {"role": "system", "content": "The rules of this house are many. " * 40}
    body = keepwarm.body(stream=True, model="own")
    body["messages"].insert(0, said)
    seen = await ask(keepwarm, CHAT, body)
    assert "prompt_progress" not in seen.text
    assert ": keepwarm\n" in seen.text


async def test_a_quick_reply_has_no_pings(keepwarm: Keepwarm) -> None:
    seen = await ask(keepwarm, CHAT, keepwarm.body(stream=True))
    assert seen.text.startswith("data: ")
    assert ": keepwarm" not in seen.text


async def test_silence_in_the_middle_is_pinged_between_events(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL_MID_STREAM)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    seen = await ask(keepwarm, CHAT, keepwarm.body(stream=True))
    await waking
    assert seen.longest_silence_s() < 1.6
    lines = [line for line in seen.text.split("\n") if line and not line.startswith(":")]
    assert all(line == "data: [DONE]" or json.loads(line[5:]) for line in lines)


async def test_a_client_that_leaves_an_opened_stream_ends_it(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL)
    asking = asyncio.ensure_future(ask(keepwarm, CHAT, keepwarm.body(stream=True)))
    await asyncio.sleep(1.4)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await keepwarm.settled()


@pytest.mark.parametrize("server_settings", [ServerSettings(ping_s=0)], ids=["off"])
async def test_pings_can_be_turned_off(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    seen = await ask(keepwarm, CHAT, keepwarm.body(stream=True))
    await waking
    assert seen.headers_s > LONG_S - 0.2
    assert ": keepwarm" not in seen.text


NODE = """
const [url, body, limit] = process.argv.slice(1);
await fetch(url.replace(/\\/v1.*/, "/health"));
const Agent = globalThis[Symbol.for("undici.globalDispatcher.1")].constructor;
const dispatcher = new Agent({ headersTimeout: +limit, bodyTimeout: +limit });
const headers = { "Content-Type": "application/json" };
const reply = await fetch(url, { method: "POST", body, headers, dispatcher });
console.log(reply.status, (await reply.text()).includes("noon"));
"""


async def in_node(keepwarm: Keepwarm, *, limit_ms: int) -> str:
    """What Node's fetch says of a stream whose first word comes after five seconds."""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node here")
    keepwarm.engine.faults.append(Fault.STALL)
    body = json.dumps(keepwarm.body(stream=True))
    asked = await asyncio.create_subprocess_exec(
        *(node, "--input-type=module", "-e", NODE, keepwarm.base + CHAT, body, str(limit_ms)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    await asyncio.sleep(5)
    keepwarm.engine.resume.set()
    said, _ = await asked.communicate()
    return said.decode()


async def test_nodes_fetch_outlasts_a_silence_longer_than_its_limit(keepwarm: Keepwarm) -> None:
    assert (await in_node(keepwarm, limit_ms=2500)).strip() == "200 true"


@pytest.mark.parametrize("server_settings", [ServerSettings(ping_s=0)], ids=["off"])
async def test_without_pings_nodes_fetch_gives_up(keepwarm: Keepwarm) -> None:
    assert "imeout" in await in_node(keepwarm, limit_ms=2500)


async def test_real_clients_read_a_pinged_stream(keepwarm: Keepwarm) -> None:
    user: Any = {"role": "user", "content": "Which disk?"}
    keepwarm.engine.faults.append(Fault.STALL)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    async with openai.AsyncOpenAI(base_url=f"{keepwarm.base}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="minimal", messages=[user], stream=True, max_tokens=8
        )
        said = [c.choices[0].delta.content or "" async for c in stream if c.choices]
    assert "".join(said) == "It is noon."
    await waking
    keepwarm.engine.resume.clear()
    keepwarm.engine.faults.append(Fault.STALL)
    waking = asyncio.ensure_future(resume_later(keepwarm))
    async with (
        anthropic.AsyncAnthropic(base_url=keepwarm.base, api_key="none") as claude,
        claude.messages.stream(model="minimal", messages=[user], max_tokens=8) as messages,
    ):
        assert await messages.get_final_text() == "It is noon."
    await waking


@pytest.mark.parametrize("server_settings", [ServerSettings(queue_timeout_s=2)], ids=["short"])
async def test_real_clients_raise_a_late_refusal(keepwarm: Keepwarm) -> None:
    user: Any = {"role": "user", "content": "Which disk?"}
    keepwarm.engine.faults.extend([Fault.STALL, Fault.STALL])
    first = [asyncio.ensure_future(keepwarm.ask(f"{n} disks?")) for n in range(2)]
    await until(lambda: len(keepwarm.engine.busy) == 2)
    async with openai.AsyncOpenAI(base_url=f"{keepwarm.base}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="minimal", messages=[user], stream=True, max_tokens=8
        )
        with pytest.raises(openai.APIError, match="No slot was free"):
            async for _ in stream:
                pass
    async with anthropic.AsyncAnthropic(base_url=keepwarm.base, api_key="none") as claude:
        with pytest.raises(anthropic.APIStatusError, match="No slot was free"):
            async with claude.messages.stream(
                model="minimal", messages=[user], max_tokens=8
            ) as messages:
                await messages.get_final_text()
    keepwarm.engine.resume.set()
    await asyncio.gather(*first)
