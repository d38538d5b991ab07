"""What front, router and nodes tell each other, and what a fleet is set up with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from keepwarm.cli.main import app
from keepwarm.core.hygiene import hygiene_of
from keepwarm.errors import ConfigError, TooLargeError
from keepwarm.fleet import status
from keepwarm.fleet.config import fleet_of, load_fleet
from keepwarm.fleet.costs import NodeCosts
from keepwarm.fleet.ledger import WarmthLedger
from keepwarm.fleet.node import node_directory
from keepwarm.fleet.routing import Fleet
from keepwarm.fleet.wire import Ask, NodeNote, ask_of, bounded, packed, unpacked

COSTS = NodeCosts(0.001, 1e-5, 0.002, 1e-4, 0.02, True)
JSON = [("content-type", "application/json")]


def chat(*texts: str, **more: Any) -> bytes:
    roles = ["system", *(["user", "assistant"] * len(texts))]
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return json.dumps({"messages": messages, **more}).encode()


def asked(body: bytes, *headers: tuple[str, str], path: str = "/v1/chat/completions") -> Ask:
    return ask_of("POST", path, [*JSON, *headers], body)


def test_a_conversation_s_next_request_begins_with_the_last_one_s_prefixes() -> None:
    first = asked(chat("be terse", "hello"))
    second = asked(chat("be terse", "hello", "hi", "and now?"))
    assert first.prefixes
    assert second.prefixes[: len(first.prefixes)] == first.prefixes
    assert second.ends_chars == sorted(second.ends_chars)
    assert len(second.prefixes) == len(second.ends_chars) > len(first.prefixes)


@pytest.mark.parametrize(
    "header",
    [("Authorization", "Bearer two"), ("x-api-key", "two"), ("X-Keepwarm-Tier", "full")],
)
def test_other_credentials_or_tiers_are_other_prefixes(header: tuple[str, str]) -> None:
    body = chat("be terse", "hello")
    plain = asked(body, ("authorization", "Bearer one"))
    assert not set(plain.prefixes) & set(asked(body, header).prefixes)


def test_a_virtual_model_is_another_prefix() -> None:
    one, two = asked(chat("s", "q", model="standard")), asked(chat("s", "q", model="full"))
    assert not set(one.prefixes) & set(two.prefixes)


def test_a_prefix_is_what_the_nodes_make_of_the_request() -> None:
    hygiene = hygiene_of(["drop-billing"], ())

    def told(stamp: str, path: str, *headers: tuple[str, str]) -> Ask:
        rules = f"x-anthropic-billing-header: cc_version=2.1; cch={stamp};\nBe terse."
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
        if path == "/v1/messages":
            body["system"] = rules
        else:
            body["messages"] = [{"role": "system", "content": rules}, *body["messages"]]
        return ask_of("POST", path, [*JSON, *headers], json.dumps(body).encode(), hygiene)

    for path in ("/v1/chat/completions", "/v1/messages"):
        one, two = told("36ee5", path), told("0aaa9", path)
        assert one.prefixes == two.prefixes
        assert one.body != two.body
    batch = ("X-Keepwarm-Priority", "batch")
    assert not set(told("36ee5", "/v1/messages", batch).prefixes) & set(one.prefixes)


def test_a_message_of_either_api_is_read() -> None:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    data = json.dumps(body).encode()
    assert asked(data, path="/v1/messages").prefixes == asked(data).prefixes
    assert asked(json.dumps({"prompt": "x" * 600}).encode(), path="/completion").prefixes


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", b""),
        ("POST", "/tokenize", chat("a", "b")),
        ("POST", "/v1/chat/completions", b"{"),
        ("POST", "/v1/chat/completions", b"[1]"),
        ("POST", "/v1/messages", b'{"messages": 3}'),
    ],
)
def test_what_is_not_planned_or_not_understood_goes_to_any_node(
    method: str, path: str, body: bytes
) -> None:
    ask = ask_of(method, path, JSON, body)
    assert ask.prefixes == ask.ends_chars == []
    assert (ask.method, ask.path, ask.body) == (method, path, body)
    made = Fleet()
    made.join("a", COSTS, now_s=0.0)
    assert [c.node for c in made.rank(ask.want(0.3), now_s=0.0)] == ["a"]


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=50))
def test_numbers_travel_as_bytes(numbers: list[int]) -> None:
    assert unpacked(packed(numbers)) == numbers


def test_a_report_travels_and_is_believed() -> None:
    ask = asked(chat("be terse " * 200, "hello"))
    told = NodeNote(
        taken_s=5.0,
        backlog_s=0.0,
        costs=COSTS,
        tokens_per_char=0.25,
        held=packed(ask.prefixes),
        stored=packed(ask.prefixes[:1]),
        state="ready",
        about={"node": "node-0"},
    )
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=NodeNote)
    assert back == told
    made = Fleet()
    made.join("other", COSTS, now_s=5.0)
    made.report("warm", back.report(), now_s=5.0)
    best = made.rank(ask.want(0.25), now_s=5.0)[0]
    assert best.node == "warm"
    assert best.way.reuse_tokens == ask.want(0.25).total_tokens - 1


def test_the_ledger_keeps_the_latest_requests_that_fit() -> None:
    ledger = WarmthLedger(capacity_tokens=1000)
    ledger.served([1, 2], [300, 600], now_s=1.0)
    ledger.served([1, 3], [300, 500], now_s=2.0)
    assert ledger.held() == [2, 1, 3]
    ledger.served([4], [400], now_s=3.0)
    # 300 + 200 + 400 fit, the 300 of the prefix used longest ago don't.
    assert ledger.held() == [1, 3, 4]
    assert ledger.stored(before_s=2.0) == [1, 3]
    assert ledger.stored(before_s=float("-inf")) == []


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True)), max_size=30
    )
)
def test_the_ledger_never_holds_more_than_fits(requests: list[tuple[list[int]]]) -> None:
    ledger = WarmthLedger(capacity_tokens=500)
    for number, (prefixes,) in enumerate(requests):
        ends = [100 * (i + 1) for i in range(len(prefixes))]
        ledger.served(prefixes, ends, now_s=float(number))
        assert len(ledger) <= 5
        assert ledger.held()[-len(prefixes) :] == prefixes


def test_a_node_takes_the_first_directory_that_no_other_node_has(tmp_path: Path) -> None:
    first, lock = node_directory(tmp_path, most=2)
    second, other = node_directory(tmp_path, most=2)
    assert [first.name, second.name] == ["node-0", "node-1"]
    with pytest.raises(ConfigError, match="2 nodes"):
        node_directory(tmp_path, most=2)
    lock.release()
    again, lock = node_directory(tmp_path, most=2)
    assert again == first
    for held in (lock, other):
        held.release()


FLEET = """
[fleet]
nodes = 2
max_nodes = 5

[shared]
url = "s3://bucket/warm"
upload_bytes_per_s = 5e7

[shared.options]
endpoint = "http://127.0.0.1:9000"

[node.engine]
model = "m.gguf"
slots = 2
"""


def test_a_fleet_s_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET)
    config = load_fleet(file)
    assert config.most_nodes == 5
    assert config.shared.options == {"endpoint": "http://127.0.0.1:9000"}
    assert config.node_flags() == {"engine.model": "m.gguf", "engine.slots": 2}
    # It travels as plain values, to nodes and to `serve deploy`.
    assert fleet_of(json.loads(json.dumps(msgspec.to_builtins(config))), source="x") == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[fleet]\nnodes = 0\n[node.engine]\nmodel='m'", "nodes"),
        ("[fleet]\nnode = 3\n[node.engine]\nmodel='m'", "node"),
        ("[fleet]\nnodes = 2", "names no engine"),
        ("[fleet", "valid TOML"),
        ("[node.engine]\nmodel='m'\n[node.server]\nport=1", r"\[fleet\] port"),
    ],
)
def test_a_file_that_is_wrong_is_told_with_its_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_fleet(file)
    assert "fleet.toml" in str(caught.value)


def test_a_setting_of_a_node_that_is_not_known_is_told_before_ray_starts(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text("[node.engine]\nmodel = 'm'\nslotz = 2")
    done = CliRunner().invoke(app, ["fleet", "up", "--config", str(file)])
    assert isinstance(done.exception, ConfigError)
    assert "slotz" in str(done.exception)


def test_a_fleet_that_is_not_there_is_told() -> None:
    done = CliRunner().invoke(app, ["fleet", "status", "--url", "http://127.0.0.1:9"])
    assert isinstance(done.exception, ConfigError)
    assert "No fleet answers" in str(done.exception)


def test_an_open_door_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text("[fleet]\nhost = '0.0.0.0'\n[node.engine]\nmodel = 'm'")
    for command in ("up", "config"):
        done = CliRunner().invoke(app, ["fleet", command, "--config", str(file)])
        assert isinstance(done.exception, ConfigError)
        assert "API key" in str(done.exception)


class Router:
    """What the status page reads of a router."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.told: dict[str, NodeNote] = {}
        self.heard_s: dict[str, float] = {}


def test_the_page_and_the_metrics_show_what_the_routers_know() -> None:
    router = Router()
    about = {"node": "node-0", "queued": 1, "busy_slots": 2, "asked": 9, "store_bytes": 50}
    told = NodeNote(
        taken_s=0.0,
        backlog_s=0.0,
        costs=COSTS,
        tokens_per_char=0.25,
        held=packed([1, 2]),
        stored=b"",
        state="ready",
        about=about,
    )
    router.fleet.report("x", told.report(), now_s=0.0)
    router.fleet.join("silent", COSTS, now_s=0.0)
    router.told["x"], router.heard_s["x"] = told, 0.0
    status.ROUTERS.add(router)
    shown = status.fleet_status()
    assert shown["nodes"]["x"]["prefixes"] == shown["known_prefixes"] == 2
    assert shown["nodes"]["silent"]["state"] == "unknown"
    text = status.fleet_metrics().decode()
    assert 'keepwarm_fleet_requests{node="node-0"} 9.0' in text
    assert 'keepwarm_fleet_ready{node="node-0"} 1.0' in text
    assert "silent" not in text


def test_a_sender_may_ask_for_a_node() -> None:
    headers = [*JSON, ("x-keepwarm-node", " node-1 ")]
    assert ask_of("POST", "/v1/chat/completions", headers, b"{}").node == "node-1"
    assert ask_of("POST", "/v1/chat/completions", JSON, b"{}").node == ""


async def test_the_front_takes_no_more_of_a_body_than_a_node_would() -> None:
    async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    assert await bounded(chunks(b"ab", b"cd"), None, most=4) == b"abcd"
    with pytest.raises(TooLargeError):
        await bounded(chunks(b"ab", b"cde"), None, most=4)
    told = chunks(b"x" * 5)
    with pytest.raises(TooLargeError):
        await bounded(told, "5", most=4)
    assert await anext(told) == b"x" * 5, "what says its size is refused before it is read"
