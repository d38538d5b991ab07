"""Odd and hostile requests, byte by byte: each is answered or cut off, never a 5xx, never a hang.

What reaches the engine is asked for by the table's paths, in a slot that was planned.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from rig import QUESTION, Keepwarm

from keepwarm.api.routes import ROUTES, Way
from keepwarm.settings import ServerSettings

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
ASKED = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4, "model": "own"}
BODY = json.dumps(ASKED)
ENGINE_PATHS = {r.path for r in ROUTES if r.way in (Way.PLANNED, Way.PASSED)}
# What Keepwarm itself asks its engine for.
OURS = {"/health", "/props", "/slots", "/v1/models", "/metrics", "/completion"}
CUT_OFF = 0


async def send(keepwarm: Keepwarm, raw: bytes, *, seconds: float = 15.0) -> tuple[int, str]:
    """Status and text of the answer to some bytes; 0 if the connection was closed without one."""
    host, _, port = keepwarm.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(raw)
        async with asyncio.timeout(seconds):
            answer = await reader.read()
    except ConnectionError:
        return CUT_OFF, ""
    finally:
        writer.close()
    text = answer.decode("utf-8", "replace")
    return (int(text.split(" ", 2)[1]), text) if text.startswith("HTTP/1.") else (CUT_OFF, text)


def request(path: str, *lines: str, method: str = "POST", body: str = BODY) -> bytes:
    own = [f"{method} {path} HTTP/1.1", "Connection: close", *lines]
    if not any(line.lower().startswith("host:") for line in lines):
        own.append("Host: 127.0.0.1")
    told = {line.partition(":")[0].lower() for line in lines}
    if body and not told & {"content-length", "transfer-encoding"}:
        own.append(f"Content-Length: {len(body.encode())}")
    return ("\r\n".join(own) + "\r\n\r\n" + body).encode("utf-8", "surrogateescape")


def check_engine(keepwarm: Keepwarm) -> None:
    """The engine was asked for nothing but the table's paths, without a word of the client's."""
    slots = set(range(len(keepwarm.engine.slots)))
    for path, body in keepwarm.engine.asked:
        is_own_slot = path.startswith("/slots/") and path.split("/")[2].isdecimal()
        assert path in ENGINE_PATHS | OURS or is_own_slot, path
        if "id_slot" in body:
            assert body["id_slot"] in slots
    for headers in keepwarm.engine.heard:
        assert not headers.keys() & {"x-conversation-id", "cookie", "origin", "upgrade", "x-evil"}


PATHS = (
    *("//v1/chat/completions", "/v1//chat/completions", "/v1/./chat/completions", "/..;/slots"),
    *("/V1/CHAT/COMPLETIONS", "/v1/chat/completions;x=1", "/%2e%2e/slots/0", "/slots/0%00"),
    *("/v1%2fchat%2fcompletions", "/v1/chat%252fcompletions", "/slots%2F0?action=erase"),
    *("/slots/0/?action=erase", "/slots/%30?action=restore", "/v1\\chat\\completions"),
    *("http://evil.example/v1/chat/completions", "/v1/chat/completions?id_slot=1&action=erase"),
    *("/v1/chat/completions#frag", "*", "evil.example:443", "", "/%", "/%zz", "/\u00e4"),
    *("/keepwarm/../slots/0?action=erase", "/v1/messages/../../slots/0", "/" + "a" * 9000),
    *("/v1/chat/completions/control", "/v1/stream/x", "/v1/streams/lookup", "/cors-proxy?url=x"),
    *("/slots/0?action=save", "/props", "/lora-adapters", "/models/load", "/%2Fslots/0"),
)


@pytest.mark.parametrize(
    "method", ["GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "X"]
)
async def test_no_path_and_method_are_more_than_the_table_says(
    keepwarm: Keepwarm, method: str
) -> None:
    for path in PATHS:
        status, text = await send(keepwarm, request(path, method=method))
        assert status < 500, (path, text[:300])
    check_engine(keepwarm)
    assert not any("action" in str(body) for _, body in keepwarm.engine.asked)
    await keepwarm.settled()


HEADERS: dict[str, tuple[list[str], str]] = {
    "both lengths": ([f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"], BODY),
    "two lengths": ([f"Content-Length: {len(BODY)}", "Content-Length: 3"], BODY),
    "a length twice": ([f"Content-Length: {len(BODY)}"] * 2, BODY),
    "a negative length": (["Content-Length: -5"], BODY),
    "a length in words": (["Content-Length: ten"], BODY),
    "a length with a sign": ([f"Content-Length: +{len(BODY)}"], BODY),
    "a length beyond all": (["Content-Length: " + "9" * 30], BODY),
    "chunks that aren't": (["Transfer-Encoding: chunked"], "zz\r\n" + BODY),
    "a chunk of a negative size": (["Transfer-Encoding: chunked"], "-1\r\n" + BODY),
    "a chunk beyond all": (["Transfer-Encoding: chunked"], "f" * 40 + "\r\n" + BODY),
    "encodings that aren't": (["Transfer-Encoding: xchunked"], BODY),
    "chunked twice": (["Transfer-Encoding: chunked, chunked"], "0\r\n\r\n"),
    "a packed body that isn't": (["Content-Encoding: gzip"], BODY),
    "packed by nobody": (["Content-Encoding: zzz"], BODY),
    "a folded header": (["X-A: b\r\n c"], BODY),
    "a header without a name": ([": x"], BODY),
    "a space in a name": (["X-Evil : x"], BODY),
    "a zero in a header": (["X-A: a\0b"], BODY),
    "a long header": (["X-A: " + "a" * 200_000], BODY),
    "many headers": ([f"X-{n}: a" for n in range(5000)], BODY),
    "names for the hop": (["Connection: close, id_slot, content-type", "X-Evil: 1"], BODY),
    "a conversation": (["X-Conversation-Id: c1"], BODY),
    "an upgrade": (
        ["Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"],
        BODY,
    ),
    "an upgrade to HTTP/2": (["Upgrade: h2c", "HTTP2-Settings: AAA"], BODY),
    "two hosts": (["Host: 127.0.0.1", "Host: evil.example"], BODY),
    "an empty host": (["Host: "], BODY),
    "a host that isn't": (["Host: a b/c@d"], BODY),
    "an expectation": (["Expect: 100-continue"], BODY),
    "an expectation of nobody": (["Expect: a miracle"], BODY),
    "plain text": (["Content-Type: text/plain"], BODY),
    "a form": (["Content-Type: application/x-www-form-urlencoded"], "messages=a"),
    "parts that break off": (["Content-Type: multipart/form-data; boundary=x"], "--x\r\n"),
    "parts without a bound": (["Content-Type: multipart/form-data"], "--x\r\n"),
    "parts that aren't": (["Content-Type: multipart/form-data; boundary=x"], BODY),
    "parts of nothing": (["Content-Type: multipart/form-data; boundary=x"], "--x--\r\n"),
    "a part in words": (
        ["Content-Type: multipart/form-data; boundary=x"],
        '--x\r\nContent-Disposition: form-data; name="file"\r\nContent-Length: x\r\n\r\n'
        "a\r\n--x--\r\n",
    ),
    "a part in a part": (
        ["Content-Type: multipart/form-data; boundary=x"],
        "--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\na\r\n--x--\r\n",
    ),
    "a charset of nobody": (["Content-Type: application/json; charset=zzz"], BODY),
    "a tier of nobody": (["X-Keepwarm-Tier: ../../etc"], BODY),
    "a priority of nobody": (["X-Keepwarm-Priority: now"], BODY),
    "places beyond all": (["X-Keepwarm-Shared: " + "9" * 5000 + ":1"], BODY),
    "a trace that isn't": (["Traceparent: " + "\u00e4" * 300], BODY),
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/files"])
async def test_no_head_is_a_fault_of_ours(keepwarm: Keepwarm, path: str) -> None:
    for name, (lines, body) in HEADERS.items():
        status, text = await send(keepwarm, request(path, *lines, body=body))
        assert status < 500, (name, text[:300])
    check_engine(keepwarm)
    await keepwarm.settled()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200,
        b"\0" * 5000,
        b"POST /v1/chat/completions HTTP/1.0\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\nGET /slots",
    ],
    ids=range(10),
)
async def test_bytes_that_are_no_request_are_cut_off(keepwarm: Keepwarm, raw: bytes) -> None:
    host, _, port = keepwarm.base.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(raw)
    writer.write_eof()
    async with asyncio.timeout(15):
        answer = await reader.read()
    writer.close()
    assert b" 50" not in answer.split(b"\r\n")[0]


BODIES: dict[str, str | bytes] = {
    "a slot named twice": BODY[:-1] + ', "id_slot": 7, "id_slot": -1}',
    "a slot that isn't": BODY[:-1] + ', "id_slot": 99}',
    "a slot in words": BODY[:-1] + ', "id_slot": "../1"}',
    "a slot of 5,000 digits": BODY[:-1] + ', "id_slot": ' + "9" * 5000 + "}",
    "messages twice": BODY[:-1] + ', "messages": 7}',
    "no number": BODY[:-1] + ', "temperature": NaN}',
    "beyond numbers": BODY[:-1] + ', "temperature": Infinity}',
    "a large exponent": BODY[:-1] + ', "temperature": 1e999}',
    "UTF-16 with its mark": BODY.encode("utf-16"),
    "UTF-8 with its mark": b"\xef\xbb\xbf" + BODY.encode(),
    "half a character": BODY.replace(QUESTION, "\\ud83d!"),
    "a zero": BODY.replace(QUESTION, "a\\u0000b"),
    "no UTF-8": BODY.encode().replace(b"disk", b"\xff\xfe\xc0"),
    "deep": BODY[:-1] + ', "metadata": ' + "[" * 5000 + "]" * 5000 + "}",
    "more behind it": BODY + "{}",
    "cache_prompt in words": BODY[:-1] + ', "cache_prompt": "no"}',
    "a limit below nothing": BODY[:-1] + ', "n_predict": -9, "max_tokens": -9}',
    "replies in words": BODY[:-1] + ', "n": "two"}',
    "many replies": BODY[:-1] + ', "n": 100000}',
    "a stream in words": BODY[:-1] + ', "stream": "yes"}',
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/responses", "/completion", "/infill"])
async def test_no_body_takes_a_slot_of_its_own_choice(keepwarm: Keepwarm, path: str) -> None:
    for name, body in BODIES.items():
        raw = body.encode() if isinstance(body, str) else body
        if path == "/v1/responses":
            raw = raw.replace(b'"messages"', b'"input"')
        elif path in ("/completion", "/infill"):
            raw = raw.replace(b'"messages"', b'"prompt": [1, 2], "m"')
        head = request(path, f"Content-Length: {len(raw)}", body="")
        status, text = await send(keepwarm, head + raw)
        # The scripted engine has neither of the two.
        assert status < 500 or path in ("/v1/responses", "/infill"), (name, text[:300])
    check_engine(keepwarm)
    await keepwarm.settled()


KEYS = ServerSettings(api_keys=("alice:alice-key", "bob:bob-key"))


@pytest.mark.parametrize("server_settings", [KEYS], ids=["keys"])
async def test_a_key_is_a_header_and_nothing_else(keepwarm: Keepwarm) -> None:
    tries: list[Any] = [
        (f"{CHAT}?api_key=alice-key", ()),
        (f"{CHAT}?key=alice-key", ()),
        (CHAT, ("Cookie: api_key=alice-key",)),
        (CHAT, ("Authorization: Basic YWxpY2UtYWxpY2Uta2V5",)),
        (CHAT, ("Authorization: Bearer alice",)),
        (CHAT, ("Authorization: Bearer",)),
        (CHAT, ("Authorization: Bearer alice-key\0",)),
        (CHAT, ("Authorization: Bearer alice-keyx",)),
        (CHAT, ("X-Api-Key: ",)),
        (CHAT, ("Proxy-Authorization: Bearer alice-key",)),
        ("http://alice:alice-key@127.0.0.1/v1/chat/completions", ()),
    ]
    for path, lines in tries:
        status, text = await send(keepwarm, request(path, *lines))
        assert status in (400, 401, 403, 404, CUT_OFF), (path, lines, text[:200])
    assert not [path for path, _ in keepwarm.engine.asked if path == CHAT]
    for line in ("Authorization: Bearer alice-key", "X-Api-Key: alice-key"):
        assert (await send(keepwarm, request(CHAT, line)))[0] == 200


@pytest.mark.parametrize("server_settings", [KEYS], ids=["keys"])
async def test_a_preflight_of_any_route_needs_no_key_and_tells_nothing(keepwarm: Keepwarm) -> None:
    keepwarm.engine.asked.clear()
    for route in ROUTES:
        path = route.path.replace("{", "").replace("*}", "").replace("}", "")
        lines = ("Origin: https://a.example", f"Access-Control-Request-Method: {route.method}")
        status, text = await send(keepwarm, request(path, *lines, method="OPTIONS", body=""))
        assert status in (204, 403), (path, text[:200])
    assert not [path for path, _ in keepwarm.engine.asked if path not in OURS]
