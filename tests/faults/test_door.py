"""The door: each route with no key, another's key, another site's page, another name of ours."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakeengine import Fault
from rig import Keepwarm, until

from keepwarm.api.routes import ROUTES, Access, Route, Way
from keepwarm.settings import ServerSettings

ALICE, BOB = "alice-key", "bob-key"
EVIL = "https://evil.example"
LOCAL_PAGE = "http://localhost:5173"
CHAT = "/v1/chat/completions"


def has_keys(*more: str, **settings: Any) -> Any:
    """Keys for two tenants."""
    keys = (f"alice:{ALICE}", f"bob:{BOB}", *more)
    return pytest.mark.parametrize(
        "server_settings", [ServerSettings(api_keys=keys, **settings)], ids=["keys"]
    )


def example(route: Route) -> str:
    """A path that a route stands for."""
    return re.sub(r"\{(\w+)\*?\}", "1", route.path).replace("/1/1", "/1/pin")


def named(route: Route) -> str:
    return f"{route.method} {route.path}"


def each_route(
    test: Callable[[Keepwarm, Route], Awaitable[None]],
) -> Callable[[Keepwarm], Awaitable[None]]:
    """Try all routes on one Keepwarm; a failure names its route."""

    async def try_all(keepwarm: Keepwarm) -> None:
        for route in ROUTES:
            try:
                await test(keepwarm, route)
            except AssertionError as error:
                raise AssertionError(f"{named(route)}: {error}") from error

    try_all.__name__, try_all.__doc__ = test.__name__, test.__doc__
    return try_all


async def ask(
    keepwarm: Keepwarm,
    method: str,
    path: str,
    *,
    key: str = "",
    data: bytes | None = None,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case, body; the path goes as it is written."""
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    if key:
        told["Authorization"] = f"Bearer {key}"
    if data is None and method == "POST":
        data = b"{}"
    host, _, port = keepwarm.base.removeprefix("http://").partition(":")
    head = {"Host": f"{host}:{port}", "Connection": "close", **told}
    if data is not None:
        head["Content-Length"] = str(len(data))
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in head.items()), "", ""]
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write("\r\n".join(lines).encode("latin-1") + (data or b""))
        async with asyncio.timeout(20):
            top = await reader.readuntil(b"\r\n\r\n")
            first, *rest = top.decode("latin-1").split("\r\n")
            got = {k.lower(): v.strip() for k, _, v in (x.partition(":") for x in rest if x)}
            status = int(first.split()[1])
            is_live = "text/event-stream" in got.get("content-type", "")
            body = b"" if is_live else await reader.read()
    finally:
        writer.close()
    return status, got, body


def is_readable(headers: dict[str, str], origin: str) -> bool:
    return headers.get("access-control-allow-origin") in ("*", origin)


def engine_asked(keepwarm: Keepwarm) -> list[str]:
    """What the engine was asked for, but for what Keepwarm looks at by itself."""
    return [path for path, _ in keepwarm.engine.asked if path not in ("/health", "/metrics")]


@has_keys()
@each_route
async def test_without_a_key_nothing_is_served_but_health_and_pages(
    keepwarm: Keepwarm, route: Route
) -> None:
    keepwarm.engine.asked.clear()
    for key in ("", "wrong"):
        status, _, body = await ask(keepwarm, route.method, example(route), key=key)
        if route.access in (Access.OPEN, Access.SITE):
            assert status != 401
            continue
        assert status == 401
        assert json.loads(body)["error"]["message"]
        assert not engine_asked(keepwarm)


@has_keys()
@each_route
async def test_with_keys_another_site_may_use_the_api_alone_and_only_with_a_key(
    keepwarm: Keepwarm, route: Route
) -> None:
    status, headers, _ = await ask(
        keepwarm, route.method, example(route), key=ALICE, Origin=LOCAL_PAGE
    )
    if route.access is Access.OWN:
        assert status == 403
    if route.access in (Access.OWN, Access.SITE):
        assert not is_readable(headers, LOCAL_PAGE)
    else:
        assert is_readable(headers, LOCAL_PAGE)
    status, headers, _ = await ask(keepwarm, route.method, example(route), Origin=EVIL)
    assert status in (401, 403) or route.access in (Access.OPEN, Access.SITE)


@each_route
async def test_without_keys_other_sites_get_nothing(keepwarm: Keepwarm, route: Route) -> None:
    if route.access is Access.OPEN:
        return
    keepwarm.engine.asked.clear()
    tries: list[dict[str, str]] = [{"Host": "evil.example:8090"}]
    if route.access is not Access.SITE:  # pages without data may be linked to
        tries += [
            {"Origin": EVIL, "Content_Type": "text/plain"},
            {"Origin": "null"},
            {"Host": "evil.example", "Origin": "http://evil.example"},
            {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
        ]
    for headers in tries:
        status, told, body = await ask(keepwarm, route.method, example(route), **headers)
        assert status == 403, headers
        assert route.method == "HEAD" or json.loads(body)["error"]["message"]
        assert "access-control-allow-origin" not in told
    assert not engine_asked(keepwarm)


@each_route
async def test_a_preflight_is_answered_without_a_key_where_a_page_may_ask(
    keepwarm: Keepwarm, route: Route
) -> None:
    asks = {
        "Access_Control_Request_Method": route.method,
        "Access_Control_Request_Headers": "authorization,content-type",
    }
    for origin, may in ((LOCAL_PAGE, True), (EVIL, False)):
        status, headers, _ = await ask(keepwarm, "OPTIONS", example(route), Origin=origin, **asks)
        may_read = may and route.access in (Access.API, Access.OPEN)
        may_read = may_read or route.access is Access.OPEN
        assert (status in (200, 204)) == may_read
        assert is_readable(headers, origin) == may_read
        if may_read:
            assert "authorization" in headers["access-control-allow-headers"]


@has_keys(cors_origins=("https://chat.example.org",))
async def test_only_the_sites_that_the_settings_name_may_ask(keepwarm: Keepwarm) -> None:
    for origin, expected in (("https://chat.example.org", 200), (EVIL, 403), (LOCAL_PAGE, 403)):
        status, headers, _ = await ask(keepwarm, "GET", "/v1/models", key=ALICE, Origin=origin)
        assert status == expected
        assert is_readable(headers, origin) == (expected == 200)


async def test_a_page_reads_answers_streams_and_errors(keepwarm: Keepwarm) -> None:
    for body, expected in (
        (keepwarm.body(), 200),
        (keepwarm.body(stream=True), 200),
        ([], 400),
    ):
        status, headers, _ = await ask(
            keepwarm, "POST", CHAT, data=json.dumps(body).encode(), Origin=LOCAL_PAGE
        )
        assert status == expected
        assert is_readable(headers, LOCAL_PAGE)


ODD = [
    "/slots%2F0?action=erase",
    "/slots/0/?action=erase",
    "/%73lots/0?action=erase",
    "/slots%252F0?action=erase",
    "//slots/0?action=erase",
    "/x/../slots/0?action=erase",
    "/slots/0;x?action=erase",
    "/slots\\0?action=erase",
    "/slots/0%00?action=erase",
    "/slots/%ff?action=erase",
    "/v1/stream",
    "/v1/stream/alice",
    "/v1%2Fstreams%2Flookup",
    "/v1/streams/lookup",
    "/v1/chat/completions/control",
    "/props",
    "/lora-adapters",
    "/tools",
    "/cors-proxy",
    "/models/load",
    "/v1/embeddings",
    "/rerank",
    "/v1/audio/transcriptions",
    "/anything",
    "/v1/anything?x=1",
]


@pytest.mark.parametrize("path", ODD)
async def test_what_isnt_in_the_table_doesnt_reach_the_engine(
    keepwarm: Keepwarm, path: str
) -> None:
    keepwarm.engine.asked.clear()
    status, _, body = await ask(keepwarm, "POST", path)
    assert status in (403, 404, 501)
    assert json.loads(body)["error"]["message"]
    assert not engine_asked(keepwarm)


@pytest.mark.parametrize("path", ["/v1%2Fchat%2Fcompletions", "/v1/chat/%63ompletions/"])
async def test_a_path_is_what_it_decodes_to(keepwarm: Keepwarm, path: str) -> None:
    body = keepwarm.body() | {"id_slot": 1}
    status, headers, _ = await ask(keepwarm, "POST", path, data=json.dumps(body).encode())
    assert status == 200
    assert "x-keepwarm-plan" in headers, "it went by the plan"
    path_asked, sent = keepwarm.engine.asked[-1]
    assert path_asked == CHAT
    assert str(sent["id_slot"]) == headers["x-keepwarm-slot"]


async def test_the_engine_hears_only_the_headers_that_are_allowed(keepwarm: Keepwarm) -> None:
    headers = {
        "X_Conversation_Id": "alice",
        "Cookie": "a=b",
        "X_Forwarded_For": "1.2.3.4",
        "Origin": LOCAL_PAGE,
        "Last_Event_ID": "7",
    }
    for path, body in ((CHAT, keepwarm.body()), ("/tokenize", {"content": "a disk"})):
        keepwarm.engine.heard.clear()
        status, _, _ = await ask(keepwarm, "POST", path, data=json.dumps(body).encode(), **headers)
        assert status == 200
        for heard in keepwarm.engine.heard:
            assert not {name.replace("_", "-").lower() for name in headers} & set(heard)


async def test_a_messages_client_is_refused_in_its_own_dialect(keepwarm: Keepwarm) -> None:
    for method, path, data in (
        ("POST", "/v1/messages", b"not json"),
        ("POST", "/v1/messages/none", b"{}"),
        ("DELETE", "/v1/messages", b""),
    ):
        status, _, body = await ask(keepwarm, method, path, data=data)
        assert status in (400, 404)
        assert json.loads(body)["type"] == "error"


async def test_somebody_who_knocks_is_answered(keepwarm: Keepwarm) -> None:
    assert (await ask(keepwarm, "HEAD", "/"))[0] == 200
    assert (await ask(keepwarm, "HEAD", "/health"))[0] == 200


def test_every_planned_route_has_a_shape() -> None:
    from keepwarm.gateway.client_request import COUNTED, MESSAGES, PLANNED  # noqa: PLC0415

    planned = {route.path for route in ROUTES if route.way is Way.PLANNED}
    assert planned == {*PLANNED, *COUNTED, MESSAGES}


@has_keys("root:root-key", operators=("root",))
async def test_a_key_sees_no_sizes_of_what_another_asked(keepwarm: Keepwarm) -> None:
    def figures(status: dict[str, Any]) -> dict[str, Any]:
        slots = [(slot["tokens"], slot["saved_tokens"]) for slot in status["slots"]]
        return {"slots": slots, "store": status["store"], "warmed": status["warmed"]}

    async def seen(path: str, key: str) -> Any:
        return json.loads((await ask(keepwarm, "GET", path, key=key))[2])

    pages = ("/keepwarm/status", "/keepwarm/store", "/slots", "/keepwarm/overview")
    await asyncio.sleep(0)
    before = {path: await seen(path, BOB) for path in pages}
    words = " ".join(f"word{number}" for number in range(300))
    body = {"messages": [{"role": "system", "content": words}, {"role": "user", "content": "a"}]}
    for _ in range(3):
        raw = json.dumps(body | {"max_tokens": 4}).encode()
        assert (await ask(keepwarm, "POST", CHAT, data=raw, key=ALICE))[0] == 200
        await keepwarm.settled()
    assert await seen("/slots", BOB) == before["/slots"]
    stored, stored_before = await seen("/keepwarm/store", BOB), before["/keepwarm/store"]
    for key in ("used_bytes", "others", "unlisted"):
        assert stored[key] == stored_before[key], key
    assert [e["id"] for e in stored["extents"]] == [e["id"] for e in stored_before["extents"]]
    told = figures(await seen("/keepwarm/status", BOB))
    assert told["store"] == before["/keepwarm/status"]["store"]
    assert told["warmed"] == before["/keepwarm/status"]["warmed"]
    assert all(tokens < 300 for tokens, _ in told["slots"])
    all_told = figures(await seen("/keepwarm/status", "root-key"))
    assert any(tokens > 300 for tokens, _ in all_told["slots"])
    metrics = (await ask(keepwarm, "GET", "/metrics", key=BOB))[2].decode()
    assert "keepwarm_warm 1.0" in metrics
    assert "tokens" not in metrics
    assert "queue" not in metrics
    assert b"keepwarm_prompt_tokens" in (await ask(keepwarm, "GET", "/metrics", key="root-key"))[2]


WORDS = " ".join(f"word{number}" for number in range(9_000))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": WORDS}]}),
        (CHAT, {"messages": [{"role": "user", "content": "a b"}] * 9_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 4_000_000}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": WORDS}], "max_tokens": 4}),
        ("/v1/responses", {"input": WORDS}),
        ("/completion", {"prompt": WORDS}),
        ("/completion", {"prompt": [1] * 9_000}),
    ],
    ids=["text", "messages", "megabytes", "anthropic", "responses", "prompt", "tokens"],
)
async def test_what_cant_fit_is_refused_before_it_holds_a_slot(
    keepwarm: Keepwarm, path: str, body: dict[str, Any]
) -> None:
    keepwarm.engine.asked.clear()
    for stream in (False, True):
        raw = json.dumps(body | {"stream": stream}).encode()
        status, _, answer = await ask(keepwarm, "POST", path, data=raw)
        assert status == 400
        assert "8192" in json.loads(answer)["error"]["message"]
    assert set(engine_asked(keepwarm)) <= {"/tokenize"}
    await keepwarm.settled()


async def test_what_may_fit_is_never_refused_by_an_estimate(keepwarm: Keepwarm) -> None:
    # A token a word: far fewer tokens than the learned rate has for so many characters.
    text = " ".join("w" * 60 for _ in range(2_000))
    status, _, _ = await ask(
        keepwarm,
        "POST",
        CHAT,
        data=json.dumps({"messages": [{"role": "user", "content": text}]}).encode(),
    )
    assert status == 200


@pytest.mark.parametrize(
    "server_settings", [ServerSettings(max_body_bytes=4096, queue_bytes=1024)], ids=["small"]
)
async def test_bodies_are_held_within_bounds(keepwarm: Keepwarm) -> None:
    raw = json.dumps(keepwarm.body("disk " * 600)).encode()
    keepwarm.engine.faults.extend([Fault.STALL, Fault.STALL])
    held = [asyncio.ensure_future(ask(keepwarm, "POST", CHAT, data=raw)) for _ in range(2)]
    await until(lambda: len(keepwarm.engine.busy) == 2)
    status, headers, body = await ask(keepwarm, "POST", CHAT, data=raw)
    assert status == 429
    assert headers["retry-after"]
    assert "server.queue_bytes" in json.loads(body)["error"]["message"]
    keepwarm.engine.resume.set()
    assert [(await one)[0] for one in held] == [200, 200]
    assert (await ask(keepwarm, "POST", CHAT, data=raw))[0] == 200, "it is let go of at the end"
    status, _, _ = await ask(keepwarm, "POST", CHAT, data=b" " * 5000)
    assert status == 413


async def test_the_page_is_served_at_its_address(keepwarm: Keepwarm) -> None:
    status, headers, _ = await ask(keepwarm, "GET", "/keepwarm")
    assert (status, headers["location"]) == (301, "/keepwarm/")
    status, headers, body = await ask(keepwarm, "GET", "/keepwarm/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"<script>" in body
    status, _, body = await ask(keepwarm, "POST", "/keepwarm/store/1/eat", Content_Type="text/json")
    assert status == 404
    assert json.loads(body)["error"]["message"]


@has_keys("root:root-key", operators=("root",))
async def test_an_operator_forgets_a_key_and_no_other_key_can(keepwarm: Keepwarm) -> None:
    async def forget(name: str, key: str) -> tuple[int, Any]:
        raw = json.dumps({"key": name}).encode()
        status, _, body = await ask(
            keepwarm,
            "POST",
            "/keepwarm/store/forget",
            data=raw,
            key=key,
            Content_Type="application/json",
        )
        return status, json.loads(body)

    words = " ".join(f"word{number}" for number in range(300))
    body = {"messages": [{"role": "system", "content": words}, {"role": "user", "content": "a"}]}
    raw = json.dumps(body | {"max_tokens": 4}).encode()
    for key in (ALICE, BOB):
        for _ in range(3):
            assert (await ask(keepwarm, "POST", CHAT, data=raw, key=key))[0] == 200
            await keepwarm.settled()
    deployment = keepwarm.deployment
    before = await deployment.store.list_extents()
    assert {"alice", "bob"} <= {e.namespace for e in before}
    assert (await forget("alice", BOB))[0] == 403
    assert (await forget("", "root-key"))[0] == 400
    status, told = await forget("alice", "root-key")
    assert status == 200
    own = [e for e in before if e.namespace == "alice"]
    assert told["store"]["extents"] == len(own)
    assert told["store"]["size_bytes"] == sum(e.size_bytes for e in own)
    assert (told["requests"], told["busy_slots"]) == (3, 0)
    assert not deployment.dispatcher.scheduler.slots_of("alice")
    after = await deployment.store.list_extents()
    assert [e.extent_id for e in after] == [e.extent_id for e in before if e.namespace != "alice"]
    assert not [p.name for p in deployment.store.pins() if ":alice:" in p.name]
    assert await deployment.explainer.latest(namespace="alice", limit=9) == []
    assert len(await deployment.explainer.latest(namespace="bob", limit=9)) == 3
