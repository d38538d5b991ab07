"""Clients that hang up on the real engine: it stops computing, and every slot is free again."""

from __future__ import annotations

import http.client
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from served import Served
from tinymodels import small_model

pytestmark = pytest.mark.live

SLOTS = 2
LONG = "The disk was full, and then it was not, and nobody knew. " * 40


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, small_tiers: Any) -> Iterator[Served]:
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={"model": str(small_model()), "slots": SLOTS, "context": 4096},
        tiers={"dir": str(small_tiers)},
    ).wait_ready()
    yield served
    served.stop()


def story(**changes: Any) -> dict[str, Any]:
    """A request that takes long to answer."""
    messages = [{"role": "user", "content": "Tell a long story."}]
    return {
        "model": "minimal",
        "messages": messages,
        "max_tokens": 600,
        "ignore_eos": True,
        **changes,
    }


def send(served: Served, body: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request and wait for nothing."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection


def assert_well(served: Served) -> None:
    served.settled()
    answer = served.ask("Is the disk there?", model="minimal")
    assert answer.status == 200
    assert answer.cached >= 60
    served.settled()


def test_hanging_up_mid_stream_stops_the_decode(served: Served) -> None:
    stream = served.stream(story())
    events = stream.events()
    for _ in range(3):
        next(events)
    assert served.busy_slots() == 1
    stream.hang_up()
    served.until(lambda: served.busy_slots() == 0, seconds=30)
    assert_well(served)


def test_hanging_up_on_a_whole_reply_stops_the_decode(served: Served) -> None:
    connection = send(served, story(stream=False))
    served.until(lambda: served.busy_slots() == 1)
    connection.close()
    served.until(lambda: served.busy_slots() == 0, seconds=30)
    assert_well(served)


def test_hanging_up_during_a_fill_stops_the_prefill(served: Served) -> None:
    rules = {"role": "system", "content": LONG}
    body = {"messages": [rules, {"role": "user", "content": "Well?"}], "max_tokens": 4}
    connection = send(served, body)
    served.until(lambda: served.busy_slots() == 1)
    connection.close()
    served.until(lambda: served.busy_slots() == 0, seconds=30)
    assert_well(served)


def test_hanging_up_while_queued_leaves_the_running_alone(served: Served) -> None:
    streams = [served.stream(story(max_tokens=60)) for _ in range(SLOTS)]
    running = [stream.events() for stream in streams]
    for events in running:
        next(events)
    waiting = [send(served, story()) for _ in range(3)]
    served.until(lambda: served.metric("keepwarm_queue ") == 3)
    for connection in waiting:
        connection.close()
    served.until(lambda: served.metric("keepwarm_queue ") == 0)
    for events in running:
        assert list(events)[-1]["timings"]["predicted_n"] == 60
    assert_well(served)


def test_a_crowd_that_hangs_up_at_random_leaves_every_slot_free(served: Served) -> None:
    chance = random.Random(7)
    waits = [chance.random() for _ in range(10)]

    def client(number: int) -> None:
        messages = [{"role": "user", "content": f"Story number {number}, please."}]
        tier = ("minimal", "standard")[number % 2]
        connection = send(served, story(messages=messages, model=tier, stream=number % 3 > 0))
        threading.Event().wait(waits[number])
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(waits))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_well(served)
    assert served.metric("keepwarm_engine_restarts_total") == 0
    assert "engine_died" not in served.read("/metrics")
