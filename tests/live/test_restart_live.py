"""Killed and back: the engine, and Keepwarm itself, with SIGKILL at the worst moments."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
from typing import Any

import pytest

from served import Answer, Serve, Served, pid_runs
from tinymodels import small_model

pytestmark = pytest.mark.live

RULES = {"role": "system", "content": "Name the disk, then the hour, then the reason why. " * 9}


def start(serve: Serve) -> Served:
    return serve(model=str(small_model()), slots=3, context=6144)


def warmed_tokens(served: Served) -> dict[str, int]:
    warmed = served.get("/keepwarm/status")["warmed"]
    return {w["name"].removeprefix("tier:"): w["tokens"] for w in warmed}


def assert_tiers_warm(served: Served) -> None:
    """The first request on each tier prefills its question only."""
    for tier, tokens in warmed_tokens(served).items():
        if tier not in ("minimal", "standard"):
            continue
        answer = served.ask("Is the disk there?", model=tier)
        assert answer.status == 200
        assert answer.plan in ("slot", "snapshot")
        assert answer.cached >= tokens
        assert answer.prefilled < 30
        served.settled()


def test_an_engine_killed_mid_stream_is_back_warm_and_its_client_told(serve: Serve) -> None:
    served = start(serve)
    before = served.engine_pid
    body = {
        "model": "minimal",
        "messages": [{"role": "user", "content": "Count up to a thousand, one by one."}],
        "max_tokens": 400,
        "ignore_eos": True,
    }
    stream = served.stream(body)
    events = stream.events()
    for _ in range(4):
        assert "choices" in next(events)
    os.kill(before, signal.SIGKILL)
    last = list(events)[-1]
    assert "send the request again" in last["error"]["message"]
    # Sent at once, while there is no engine: it waits, and is answered.
    answer = served.ask("Are you back?", model="minimal")
    assert answer.status == 200
    assert answer.cached >= warmed_tokens(served)["minimal"]
    served.wait_ready()
    assert served.engine_pid != before
    assert not pid_runs(before)
    served.settled()
    assert_tiers_warm(served)
    assert served.metric("keepwarm_engine_restarts_total") == 1
    assert served.metric("keepwarm_misses_total") == 0
    served.stop()


def test_a_request_whose_engine_dies_before_its_first_byte_is_answered_by_the_next(
    serve: Serve,
) -> None:
    served = start(serve)
    before = served.engine_pid
    answers: list[Answer] = []
    long = "The disk was full and then it was not. " * 90

    def ask() -> None:
        answers.append(served.ask(long, model="standard", max_tokens=4))

    asking = threading.Thread(target=ask)
    asking.start()
    served.until(lambda: served.busy_slots() == 1)
    os.kill(before, signal.SIGKILL)
    asking.join(120)
    assert [a.status for a in answers] == [200]
    assert answers[0].cached >= warmed_tokens(served)["standard"]
    served.stop()


def test_keepwarm_killed_leaves_no_engine_and_a_store_that_is_used(serve: Serve) -> None:
    served = start(serve)
    # Long enough that each turn is worth a save at once.
    question = "What is this, and what was it before it came here? " * 10
    talk: list[dict[str, Any]] = [RULES, {"role": "user", "content": question}]
    first = served.chat(*talk, max_tokens=12)
    said = {"role": "assistant", "content": first.text}
    talk += [said, {"role": "user", "content": "And who looks after it?"}]
    second = served.chat(*talk, max_tokens=12)
    served.settled()
    stream = served.stream(
        {
            "model": "standard",
            "messages": [{"role": "user", "content": "Tell a long story."}],
            "max_tokens": 400,
            "ignore_eos": True,
        }
    )
    next(stream.events())
    engine = served.engine_pid
    served.kill()
    served.until(lambda: not pid_runs(engine))

    again = start(serve)
    warmed = again.get("/keepwarm/status")["warmed"]
    assert {w["how"] for w in warmed} == {"restored"}
    assert sum(w["prefilled_tokens"] for w in warmed) == 0
    assert_tiers_warm(again)
    # A conversation that had gone on was saved, so it goes on where it was.
    talk += [
        {"role": "assistant", "content": second.text},
        {"role": "user", "content": "Thank you."},
    ]
    third = again.chat(*talk, max_tokens=4)
    assert third.plan == "snapshot"
    assert third.cached >= second.cached + int(second.body["timings"]["prompt_n"])
    assert again.metric("keepwarm_misses_total") == 0
    again.stop()


def test_a_prompt_that_came_twice_is_warm_after_a_restart_without_being_asked_for(
    serve: Serve,
) -> None:
    served = start(serve)
    for number in range(2):
        served.chat(RULES, {"role": "user", "content": f"Question {number}?"}, max_tokens=2)
        served.settled()
    engine = served.engine_pid
    served.stop()
    assert not pid_runs(engine)

    again = start(serve)
    learned = [w for w in again.get("/keepwarm/status")["warmed"] if "learned" in w["name"]]
    assert [w["how"] for w in learned] == ["restored"]
    answer = again.chat(RULES, {"role": "user", "content": "Something else?"}, max_tokens=2)
    assert answer.cached >= learned[0]["tokens"]
    assert answer.prefilled < 30
    again.stop()


def test_stopping_lets_a_running_reply_end_and_saves_what_only_slots_hold(serve: Serve) -> None:
    served = start(serve)
    talk: list[dict[str, Any]] = [RULES, {"role": "user", "content": "What is this?"}]
    texts: list[str] = []
    stream = served.stream({"messages": talk, "max_tokens": 30, "ignore_eos": True})
    events = stream.events()
    texts.append(next(events)["choices"][0]["delta"].get("content") or "")
    served.process.terminate()
    last: dict[str, Any] = {}
    for event in events:
        last = event
        texts.append(event["choices"][0]["delta"].get("content") or "")
    assert last["timings"]["predicted_n"] == 30
    assert served.process.wait(60) == 0

    again = start(serve)
    talk += [
        {"role": "assistant", "content": "".join(texts)},
        {"role": "user", "content": "Go on."},
    ]
    answer = again.chat(*talk, max_tokens=2)
    assert answer.plan == "snapshot"
    assert answer.cached >= last["timings"]["cache_n"] + last["timings"]["prompt_n"]
    again.stop()


def test_keepwarm_killed_while_a_prompt_is_prefilled_leaves_no_engine(serve: Serve) -> None:
    served = start(serve)
    engine = served.engine_pid
    long = {"role": "user", "content": "Name the disk, then the hour, then the reason why. " * 150}

    def ask() -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            served.chat(long, max_tokens=1)

    asking = threading.Thread(target=ask)
    asking.start()
    served.until(lambda: any(s["state"] != "idle" for s in served.get("/keepwarm/slots")["slots"]))
    served.kill()
    asking.join()
    # Not even what it computes is waited for: its threads don't always end.
    served.until(lambda: not pid_runs(engine))


def test_who_prefers_availability_is_served_before_the_tiers_are_warm(serve: Serve) -> None:
    """Nothing is saved: ready at once, and the tiers are warmed behind the requests."""
    served = serve(model=str(small_model()), slots=3, context=6144, tiers={"wait": False})
    first = served.ask("Is the disk there?", model="standard")
    assert first.status == 200
    served.until(lambda: served.metric("keepwarm_warm") == 1)
    assert set(warmed_tokens(served)) >= {"minimal", "standard"}
    # Whoever waits for the tiers proves each before the first request.
    assert not any(w["proved"] for w in served.get("/keepwarm/status")["warmed"])
    served.settled()
    assert_tiers_warm(served)
    served.stop()
    again = serve(model=str(small_model()), slots=3, context=6144, tiers={"wait": False})
    assert again.metric("keepwarm_warm") == 1
    assert {w["how"] for w in again.get("/keepwarm/status")["warmed"]} == {"restored"}
    again.stop()


def test_an_engine_killed_while_tiers_are_warmed_behind_requests_ends_with_all_of_them_warm(
    serve: Serve,
) -> None:
    served = serve(model=str(small_model()), slots=3, context=6144, tiers={"wait": False})
    os.kill(served.engine_pid, signal.SIGKILL)
    served.until(lambda: served.metric("keepwarm_engine_restarts_total") == 1)
    served.wait_ready()
    served.until(lambda: served.metric("keepwarm_warm") == 1)
    served.settled()
    assert_tiers_warm(served)
    served.stop()
