"""The benchmark's client against a scripted server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from keepwarm.bench.client import ChatClient, content_of
from keepwarm.errors import EngineDownError, EngineError

ROLE = {"choices": [{"delta": {"role": "assistant", "content": None}}]}
HELLO = {"choices": [{"delta": {"content": "Hel"}}]}
MORE = {"choices": [{"delta": {"content": "lo"}}]}
COUNTS = {
    "choices": [],
    "timings": {"cache_n": 90, "prompt_n": 7, "predicted_n": 2},
    "usage": {"prompt_tokens": 97, "completion_tokens": 2},
}


@asynccontextmanager
async def serving(handle: Callable[[web.Request], Any]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def client() -> AsyncIterator[ChatClient]:
    made = ChatClient()
    yield made
    await made.close()


def streaming(*events: object, gates: dict[int, asyncio.Event] | None = None) -> Any:
    """A handler that sends these events, each behind its gate if it has one."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "X-Keepwarm-Plan": "snapshot"}
        )
        await response.prepare(request)
        for i, event in enumerate(events):
            if gates and i in gates:
                await gates[i].wait()
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    return handle


async def test_counts_text_and_plan_are_read_from_a_stream(client: ChatClient) -> None:
    async with serving(streaming(ROLE, HELLO, MORE, COUNTS)) as url:
        answer = await client.ask(url, {"messages": []})
    assert answer.text == "Hello"
    assert (answer.counts.cached, answer.counts.prefilled) == (90, 7)
    assert answer.plan == "snapshot"
    assert 0 < answer.ttft_s <= answer.total_s


async def test_the_first_token_is_the_first_content_not_the_role(client: ChatClient) -> None:
    held: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        """Sends the role, and the content a while later; notes how long it held that back."""
        began = time.perf_counter()
        gate = asyncio.Event()

        def open_gate() -> None:
            held.append(time.perf_counter() - began)
            gate.set()

        asyncio.get_running_loop().call_later(0.1, open_gate)
        response: web.StreamResponse = await streaming(ROLE, HELLO, COUNTS, gates={1: gate})(
            request
        )
        return response

    async with serving(handle) as url:
        answer = await client.ask(url, {"messages": []})
    assert answer.ttft_s > held[0]


async def test_a_body_asks_for_a_stream_with_usage(client: ChatClient) -> None:
    seen: dict[str, Any] = {}

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.update(await request.json())
        response: web.StreamResponse = await streaming(HELLO, COUNTS)(request)
        return response

    async with serving(handle) as url:
        await client.ask(url, {"model": "minimal", "messages": [1]})
    assert seen == {
        "model": "minimal",
        "messages": [1],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def test_an_error_status_is_told_with_what_the_server_said(client: ChatClient) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=400, text="too long")

    async with serving(handle) as url:
        with pytest.raises(EngineError, match="400: too long"):
            await client.ask(url, {})


async def test_an_error_in_the_middle_of_a_stream_is_an_error(client: ChatClient) -> None:
    async with serving(streaming(HELLO, {"error": {"message": "gone"}})) as url:
        with pytest.raises(EngineError, match="gone"):
            await client.ask(url, {})


async def test_a_reply_without_counts_proves_nothing_and_is_refused(client: ChatClient) -> None:
    async with serving(streaming(HELLO)) as url:
        with pytest.raises(EngineError, match="counts"):
            await client.ask(url, {})


async def test_a_server_that_is_not_there_is_down(client: ChatClient) -> None:
    with pytest.raises(EngineDownError):
        await client.ask("http://127.0.0.1:9", {})
    assert await client.get("http://127.0.0.1:9/health") == (0, None)


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"reasoning_content": "hm"}, "hm"),
        ({"tool_calls": [{"function": {"name": "ls", "arguments": "{}"}}]}, "ls{}"),
    ],
)
def test_reasoning_and_tool_calls_are_content_too(delta: dict[str, Any], said: str) -> None:
    assert content_of({"choices": [{"delta": delta}]}) == said
