"""Questions for a prompt's length are answered with what would be sent; model names are held to."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rig import QUESTION, Keepwarm

from keepwarm.settings import ServerSettings

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
BILLING = "x-anthropic-billing-header: cc_version=2.1.332.abc; cc_entrypoint=cli;\n"
COUNTS = {
    CHAT: f"{CHAT}/input_tokens",
    MESSAGES: f"{MESSAGES}/count_tokens",
    RESPONSES: f"{RESPONSES}/input_tokens",
}


def body_of(path: str, *, system: str = "") -> dict[str, Any]:
    said = [{"role": "user", "content": QUESTION}]
    if path == MESSAGES:
        return {"messages": said, **({"system": system} if system else {})}
    own = [{"role": "system", "content": system}] if system else []
    return {"input" if path == RESPONSES else "messages": [*own, *said]}


async def post(
    keepwarm: Keepwarm, path: str, body: dict[str, Any], **headers: str
) -> tuple[int, Any]:
    async with keepwarm.session.post(keepwarm.base + path, json=body, headers=headers) as reply:
        return reply.status, await reply.json()


async def counted(keepwarm: Keepwarm, path: str, body: dict[str, Any], **headers: str) -> int:
    status, said = await post(keepwarm, COUNTS[path], body, **headers)
    assert status == 200, said
    return int(said["input_tokens"])


@pytest.mark.parametrize("path", COUNTS)
async def test_a_count_is_of_what_is_sent(keepwarm: Keepwarm, path: str) -> None:
    bare = await counted(keepwarm, path, {**body_of(path), "model": "fake"})
    for asked in ({"model": "minimal"}, {"model": "standard"}, {"model": "auto"}):
        told = await counted(keepwarm, path, {**body_of(path), **asked})
        assert told > bare + 10, asked
    by_header = await counted(keepwarm, path, body_of(path), **{"X-Keepwarm-Tier": "standard"})
    assert by_header == await counted(keepwarm, path, {**body_of(path), "model": "standard"})


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("model", ["fake", "minimal", "standard", "auto"])
async def test_a_count_is_what_the_request_then_costs(
    keepwarm: Keepwarm, path: str, model: str
) -> None:
    body = {**body_of(path), "model": model}
    told = await counted(keepwarm, path, body)
    keepwarm.engine.asked.clear()
    assert (await post(keepwarm, path, {**body, "max_tokens": 4}))[0] == 200
    sent = [said for asked, said in keepwarm.engine.asked if asked == CHAT]
    status, again = await post(keepwarm, COUNTS[CHAT], {"messages": sent[-1]["messages"]})
    assert status == 200
    tools = sent[-1].get("tools")
    if not tools:
        assert told == again["input_tokens"]
    else:
        assert told > again["input_tokens"]


@pytest.mark.parametrize("path", COUNTS)
async def test_a_count_is_without_what_hygiene_takes_out(keepwarm: Keepwarm, path: str) -> None:
    plain = await counted(keepwarm, path, {**body_of(path, system="Be brief."), "model": "fake"})
    billed = {**body_of(path, system=f"{BILLING}Be brief."), "model": "fake"}
    assert await counted(keepwarm, path, billed) == plain


@pytest.mark.parametrize("path", COUNTS)
async def test_a_count_of_what_cant_be_read_is_a_refusal(keepwarm: Keepwarm, path: str) -> None:
    for body in ({}, {"messages": 7, "input": 7}):
        status, said = await post(keepwarm, COUNTS[path], body)
        assert status == 400
        assert said["error"]["message"]


@pytest.mark.parametrize("server_settings", [ServerSettings(strict_models=True)], ids=["strict"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_where_models_are_held_to_an_unknown_name_is_an_error(
    keepwarm: Keepwarm, path: str
) -> None:
    for known in ("fake", "minimal", "auto", None):
        named = {"model": known} if known else {}
        status, said = await post(keepwarm, path, {**body_of(path), **named, "max_tokens": 4})
        assert status == 200, (known, said)
    for asked in (path, COUNTS[path]):
        status, said = await post(keepwarm, asked, {**body_of(path), "model": "gpt-9"})
        assert status == 404
        assert "gpt-9" in said["error"]["message"]
        assert "minimal" in said["error"]["message"]
        assert (said.get("type") == "error") == (path == MESSAGES)
    await keepwarm.settled()


async def test_else_any_name_gets_the_engines_model(keepwarm: Keepwarm) -> None:
    body = {**body_of(CHAT), "model": "gpt-9", "max_tokens": 4}
    assert (await post(keepwarm, CHAT, body))[0] == 200


@pytest.mark.parametrize("beginning", ["The hour: ", [{"type": "text", "text": "The hour: "}]])
async def test_a_whole_reply_begins_with_the_clients_own_words(
    keepwarm: Keepwarm, beginning: Any
) -> None:
    body = body_of(CHAT)
    body["messages"].append({"role": "assistant", "content": beginning})
    status, said = await post(keepwarm, CHAT, {**body, "max_tokens": 4})
    assert status == 200
    assert said["choices"][0]["message"]["content"] == "The hour: It is noon."


@pytest.mark.parametrize(
    "server_settings",
    [
        ServerSettings(
            api_keys=("alice:alice-key", "bob:bob-key", "root:root-key"), operators=("root",)
        )
    ],
    ids=["keys"],
)
async def test_the_command_has_a_running_gateway_forget_a_key(
    keepwarm: Keepwarm, tmp_path: Path
) -> None:
    words = " ".join(f"word{number}" for number in range(300))
    for key in ("alice-key", "bob-key"):
        for _ in range(3):
            body = {**body_of(CHAT, system=words), "max_tokens": 4}
            status, _ = await post(keepwarm, CHAT, body, Authorization=f"Bearer {key}")
            assert status == 200
            await keepwarm.settled()
    assert "alice" in {e.namespace for e in await keepwarm.runtime.store.list_extents()}

    async def remove(key: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "keepwarm", "store", "rm", "--key", "alice"),
            *("--store", str(tmp_path / "store"), "--url", keepwarm.base),
            *("--operator-key", key, "--json"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=tmp_path,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 60)
        return process.returncode or 0, out.decode()

    refused, said = await remove("bob-key")
    assert refused != 0, said
    assert "alice" in {e.namespace for e in await keepwarm.runtime.store.list_extents()}
    status, said = await remove("root-key")
    assert status == 0, said
    assert json.loads(said)["removed"]
    left = {e.namespace for e in await keepwarm.runtime.store.list_extents()}
    assert "alice" not in left
    assert "bob" in left
