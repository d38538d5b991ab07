"""What clients see when the engine misbehaves, and that no slot is lost by it."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from fakeengine import FAILURE, INABILITY, REFUSAL, FakeEngine, Fault
from rig import Keepwarm, until

from keepwarm.deployment.condition import State

ANSWER = "It is noon."


def answer_of(body: dict[str, object]) -> str:
    choices = body["choices"]
    assert isinstance(choices, list)
    return str(choices[0]["message"]["content"])


def events_of(text: str) -> list[dict[str, object]]:
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def said_in(text: str) -> str:
    deltas = [e["choices"][0]["delta"] for e in events_of(text) if e.get("choices")]  # type: ignore[index]
    return "".join(delta.get("content", "") for delta in deltas)


async def assert_well(keepwarm: Keepwarm) -> None:
    """Everything is given back, and the next request is answered and warm."""
    await keepwarm.settled()
    status, _, body = await keepwarm.ask()
    assert status == 200
    assert answer_of(body) == ANSWER
    assert body["timings"]["cache_n"] >= 60
    await keepwarm.settled()


async def test_without_faults_a_tier_is_warm_whole_and_streamed(keepwarm: Keepwarm) -> None:
    status, headers, body = await keepwarm.ask()
    assert status == 200
    assert headers["x-keepwarm-tier"] == "minimal; explicit"
    assert headers["x-keepwarm-plan"] == "slot"
    tokens = next(w.tokens for w in keepwarm.deployment.prefixes.warmed if w.name == "tier:minimal")
    assert body["timings"]["cache_n"] >= tokens
    status, text = await keepwarm.ask_streamed()
    assert status == 200
    assert said_in(text) == ANSWER
    assert text.rstrip().endswith("data: [DONE]")
    await assert_well(keepwarm)


@pytest.mark.parametrize(
    "fault", [Fault.CLOSED_BEFORE_FIRST_BYTE, Fault.LOADING], ids=lambda f: f.name.lower()
)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_a_request_without_a_byte_of_an_answer_is_sent_again(
    keepwarm: Keepwarm, fault: Fault, streamed: bool
) -> None:
    keepwarm.engine.faults.append(fault)
    if streamed:
        status, text = await keepwarm.ask_streamed()
        assert (status, said_in(text)) == (200, ANSWER)
    else:
        status, _, body = await keepwarm.ask()
        assert (status, answer_of(body)) == (200, ANSWER)
    await assert_well(keepwarm)


@pytest.mark.parametrize("fault", [Fault.CLOSED_IN_HEADERS, Fault.CLOSED_MID_BODY])
async def test_an_answer_that_broke_off_before_the_client_saw_any_is_asked_for_again(
    keepwarm: Keepwarm, fault: Fault
) -> None:
    keepwarm.engine.faults.append(fault)
    if fault is Fault.CLOSED_IN_HEADERS:
        status, text = await keepwarm.ask_streamed()
        assert (status, said_in(text)) == (200, ANSWER)
    else:
        status, _, body = await keepwarm.ask()
        assert (status, answer_of(body)) == (200, ANSWER)
    await assert_well(keepwarm)


async def test_an_engine_that_never_answers_a_request_is_given_up_with_a_503(
    keepwarm: Keepwarm,
) -> None:
    keepwarm.engine.faults.extend([Fault.CLOSED_BEFORE_FIRST_BYTE] * 3)
    status, headers, body = await keepwarm.ask()
    assert status == 503
    assert body["error"]["type"] == "engine_unavailable"
    assert int(headers["retry-after"]) > 0
    await assert_well(keepwarm)


async def test_a_request_that_kills_the_engine_is_sent_once_more_and_then_refused(
    keepwarm: Keepwarm,
) -> None:
    engine = keepwarm.engine
    engine.faults.extend([Fault.DIES] * 3)
    status, headers, body = await keepwarm.ask()
    assert engine.died == 2
    assert status == 422
    assert body["error"]["type"] == "engine_crashed"
    assert "retry-after" not in headers
    assert 'keepwarm_failures_total{kind="request_crashed"} 1.0' in await keepwarm.metrics()
    engine.faults.clear()
    await assert_well(keepwarm)


async def test_a_request_beside_one_that_kills_the_engine_is_answered(keepwarm: Keepwarm) -> None:
    engine = keepwarm.engine
    engine.faults.append(Fault.STALL)
    beside = asyncio.create_task(keepwarm.ask("Beside it?"))
    await until(lambda: engine.busy)
    culprit = asyncio.create_task(keepwarm.ask("Who kills it?"))
    # Whoever of the two goes first: this text alone is deadly.
    engine.deadly = "Who kills it?"
    status, _, body = await beside
    assert (status, answer_of(body)) == (200, ANSWER)
    status, _, body = await culprit
    assert (status, body["error"]["type"]) == (422, "engine_crashed")
    assert engine.died <= 3
    engine.deadly = ""
    await assert_well(keepwarm)


async def test_a_stream_that_breaks_off_ends_in_an_error_event(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.CLOSED_MID_STREAM)
    status, text = await keepwarm.ask_streamed()
    assert status == 200
    events = events_of(text)
    assert said_in(text) == "It is"
    assert "error" in events[-1]
    error = events[-1]["error"]
    assert isinstance(error, dict)
    assert "send the request again" in error["message"]
    assert "[DONE]" not in text
    assert 'keepwarm_failures_total{kind="engine_died"} 1.0' in await keepwarm.metrics()
    await assert_well(keepwarm)


async def test_garbage_with_status_200_is_a_502(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.GARBAGE)
    status, headers, body = await keepwarm.ask()
    assert status == 502
    assert body["error"]["type"] == "upstream_error"
    assert headers["x-keepwarm-request-id"]
    await assert_well(keepwarm)


@pytest.mark.parametrize(
    ("fault", "answer"), [(Fault.REFUSED, (400, REFUSAL)), (Fault.UNABLE, (501, INABILITY))]
)
async def test_a_refusal_of_something_else_costs_no_slot_its_content(
    keepwarm: Keepwarm, fault: Fault, answer: tuple[int, dict[str, object]]
) -> None:
    await keepwarm.occupy()
    held = [slot.content for slot in keepwarm.deployment.dispatcher.scheduler.slots]
    keepwarm.engine.faults.append(fault)
    body = {"prompt": list(range(7000, 7200)), "max_tokens": 4}
    async with keepwarm.session.post(f"{keepwarm.base}/completion", json=body) as response:
        assert (response.status, await response.json()) == answer
    await keepwarm.settled()
    assert all(held)
    assert [slot.content for slot in keepwarm.deployment.dispatcher.scheduler.slots] == held


async def test_a_refusal_is_passed_on_unchanged_and_keeps_the_slot_warm(
    keepwarm: Keepwarm,
) -> None:
    keepwarm.engine.faults.append(Fault.REFUSED)
    status, headers, body = await keepwarm.ask()
    assert (status, body) == (400, REFUSAL)
    assert headers["x-keepwarm-plan"] == "slot"
    await keepwarm.settled()
    _, headers, _ = await keepwarm.ask()
    assert headers["x-keepwarm-plan"] == "slot"
    await assert_well(keepwarm)


async def test_an_internal_error_of_the_engine_is_passed_on_and_costs_no_slot(
    keepwarm: Keepwarm,
) -> None:
    keepwarm.engine.faults.append(Fault.FAILED)
    status, _, body = await keepwarm.ask()
    assert (status, body) == (500, FAILURE)
    await assert_well(keepwarm)


async def test_a_reply_without_counts_promises_nothing_to_the_next(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.NO_COUNTS)
    status, _, body = await keepwarm.ask()
    assert (status, answer_of(body)) == (200, ANSWER)
    assert 'kind="no_counts"' in await keepwarm.metrics()
    await assert_well(keepwarm)
    assert "keepwarm_misses_total{" not in await keepwarm.metrics()


async def test_a_stalled_request_doesnt_hold_up_another(keepwarm: Keepwarm) -> None:
    keepwarm.engine.faults.append(Fault.STALL)
    stalled = asyncio.create_task(keepwarm.ask("First?"))
    await until(lambda: keepwarm.engine.busy)
    status, _, body = await keepwarm.ask("Second?")
    assert (status, answer_of(body)) == (200, ANSWER)
    assert not stalled.done()
    keepwarm.engine.resume.set()
    status, _, _ = await stalled
    assert status == 200
    await assert_well(keepwarm)


async def test_connections_closed_between_requests_are_never_noticed(keepwarm: Keepwarm) -> None:
    keepwarm.engine.closes_connections = True
    for number in range(5):
        status, _, body = await keepwarm.ask(f"Question {number}?")
        assert (status, answer_of(body)) == (200, ANSWER)
        async with keepwarm.session.get(f"{keepwarm.base}/props") as response:
            assert response.status == 200
    await assert_well(keepwarm)


async def test_requests_wait_for_an_engine_that_is_gone_and_is_warm_when_it_is_back(
    keepwarm: Keepwarm,
) -> None:
    engine = keepwarm.engine
    await engine.stop()
    waiting = [asyncio.create_task(keepwarm.ask(f"Question {n}?")) for n in range(3)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in waiting)
    before = engine.prefilled
    await engine.start()
    for status, _, body in await asyncio.gather(*waiting):
        assert (status, answer_of(body)) == (200, ANSWER)
        assert body["timings"]["cache_n"] >= 60
    # The tiers came back from their snapshots: only the questions and proofs were prefilled.
    assert engine.prefilled - before < 60 + 3 * 30
    await assert_well(keepwarm)


async def test_health_tells_of_an_engine_that_is_gone(keepwarm: Keepwarm) -> None:
    async with keepwarm.session.get(f"{keepwarm.base}/health") as response:
        assert response.status == 200
    await keepwarm.engine.stop()
    asking = asyncio.create_task(keepwarm.ask())
    await until(lambda: keepwarm.deployment.state is State.DOWN)
    async with keepwarm.session.get(f"{keepwarm.base}/health") as response:
        assert response.status == 503
    await keepwarm.engine.start()
    status, _, _ = await asking
    assert status == 200
    async with keepwarm.session.get(f"{keepwarm.base}/health") as response:
        assert response.status == 200


async def test_an_engine_that_loads_again_is_waited_for(keepwarm: Keepwarm) -> None:
    keepwarm.engine.is_loading = True
    asking = asyncio.create_task(keepwarm.ask())
    await asyncio.sleep(0.2)
    assert not asking.done()
    keepwarm.engine.is_loading = False
    status, _, body = await asking
    assert (status, answer_of(body)) == (200, ANSWER)
    await assert_well(keepwarm)


async def test_supervision_outlives_a_health_page_that_isnt_json(keepwarm: Keepwarm) -> None:
    told = keepwarm.engine._told

    def page(path: str, body: dict[str, object]) -> object:
        if path == "/health":
            return aiohttp.web.Response(text="<html>", status=502)
        return told(path, body)

    keepwarm.engine._told = page  # type: ignore[method-assign, assignment]
    keepwarm.deployment.suspect_engine()
    await asyncio.sleep(0.3)
    keepwarm.engine._told = told  # type: ignore[method-assign]
    assert keepwarm.deployment.is_alive
    await assert_well(keepwarm)


async def pins_of(keepwarm: Keepwarm, *names: str) -> None:
    """Wait until these tiers are pinned."""
    store = keepwarm.deployment.store
    await until(lambda: all(store.pin_named(name) for name in names))


async def test_a_restore_that_lies_is_counted_and_costs_no_rows_that_are_good(
    keepwarm: Keepwarm,
) -> None:
    engine = keepwarm.engine
    await keepwarm.occupy()
    engine.loses_restores = True
    status, headers, body = await keepwarm.ask()
    engine.loses_restores = False
    assert (status, answer_of(body)) == (200, ANSWER)
    assert headers["x-keepwarm-plan"] == "snapshot"
    assert body["timings"]["cache_n"] == 0
    await keepwarm.counted('keepwarm_misses_total{reason="not_reused"} 1.0')
    # Its files are what was written, so it isn't to blame: it is proved again, and nothing is lost.
    assert keepwarm.deployment.store.stats().quarantined_extents == 0
    await pins_of(keepwarm, "tier:minimal", "tier:standard")
    await keepwarm.settled()
    await keepwarm.occupy()
    _, headers, body = await keepwarm.ask("And now?", model="standard")
    assert headers["x-keepwarm-plan"] == "snapshot"
    assert body["timings"]["cache_n"] >= 100
    await keepwarm.counted('keepwarm_misses_total{reason="not_reused"} 1.0')


async def test_a_template_whose_opening_changes_by_itself_is_noticed_and_warmed_again(
    keepwarm: Keepwarm, caplog: pytest.LogCaptureFixture
) -> None:
    keepwarm.engine.opening = "Tuesday. "
    status, headers, body = await keepwarm.ask()
    assert (status, answer_of(body)) == (200, ANSWER)
    assert body["timings"]["cache_n"] < 5
    await keepwarm.counted('keepwarm_misses_total{reason="template_changed"} 1.0')
    # It is counted first; until it is mended the old pins are there.
    async with keepwarm.deployment.prover._mending:
        pass
    await pins_of(keepwarm, "tier:minimal", "tier:standard")
    await keepwarm.settled()
    assert "the template renders the tiers otherwise than before" in caplog.text
    for model in ("minimal", "standard"):
        _, headers, body = await keepwarm.ask("And now?", model=model)
        assert headers["x-keepwarm-plan"] in ("slot", "snapshot")
        assert body["timings"]["cache_n"] >= 60
    await keepwarm.settled()
    misses = [line for line in (await keepwarm.metrics()).splitlines() if "misses_total{" in line]
    assert misses == ['keepwarm_misses_total{reason="template_changed"} 1.0']


async def test_a_page_of_the_engine_is_passed_through(keepwarm: Keepwarm) -> None:
    async with keepwarm.session.get(f"{keepwarm.base}/index.html") as response:
        assert response.status == 404
        assert "no /index.html" in await response.text()


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"messages": ' + b"[" * 100_000, b'"\\ud800"'],
    ids=["empty", "cut", "list", "null", "bytes", "deep", "surrogate"],
)
async def test_a_body_that_isnt_a_json_object_is_a_400(keepwarm: Keepwarm, raw: bytes) -> None:
    url = f"{keepwarm.base}/v1/chat/completions"
    async with keepwarm.session.post(url, data=raw) as response:
        assert response.status == 400
        body = await response.json()
    assert body["error"]["type"] == "invalid_request_error"
    await assert_well(keepwarm)


async def test_a_client_that_asks_before_it_sends_its_body_is_answered(keepwarm: Keepwarm) -> None:
    """As curl does with a long one; what it asks is between it and Keepwarm."""
    url = f"{keepwarm.base}/v1/chat/completions"
    # Long enough for the engine's leave to come by itself, were it asked for one.
    keepwarm.engine.faults.append(Fault.STALL)
    asking = asyncio.ensure_future(keepwarm.session.post(url, json=keepwarm.body(), expect100=True))
    await until(lambda: keepwarm.engine.busy)
    await asyncio.sleep(0.05)
    keepwarm.engine.resume.set()
    async with await asking as response:
        assert response.status == 200
        assert answer_of(await response.json()) == ANSWER
    async with keepwarm.session.post(
        f"{keepwarm.base}/tokenize", json={"content": "a disk"}, expect100=True
    ) as response:
        assert response.status == 200
        assert len((await response.json())["tokens"]) == 3


async def test_slots_cant_be_changed_from_outside(keepwarm: Keepwarm) -> None:
    url = f"{keepwarm.base}/slots/0?action=erase"
    async with keepwarm.session.post(url, json={}) as response:
        assert response.status in (400, 403)
    await assert_well(keepwarm)


async def test_an_unknown_tier_is_named_in_the_refusal(keepwarm: Keepwarm) -> None:
    status, _, body = await keepwarm.ask(headers={"X-Keepwarm-Tier": "grand"})
    assert status == 400
    assert "'grand'" in body["error"]["message"]
    assert "minimal" in body["error"]["message"]


async def test_the_model_list_names_the_tiers(keepwarm: Keepwarm, engine: FakeEngine) -> None:
    async with keepwarm.session.get(f"{keepwarm.base}/v1/models") as response:
        names = [model["id"] for model in (await response.json())["data"]]
    assert names == ["fake", "minimal", "standard", "auto"]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_no_chunk_is_shifted_whatever_a_client_asks_for(
    keepwarm: Keepwarm, streamed: bool
) -> None:
    rules = {"role": "system", "content": "Name the disk, then the hour. " * 40}
    asked = {"messages": [rules, {"role": "user", "content": "Which?"}], "model": "own"}
    keepwarm.engine.asked.clear()
    if streamed:
        await keepwarm.ask_streamed(n_cache_reuse=256, **asked)
    else:
        await keepwarm.ask(n_cache_reuse=256, **asked)
    fills = [body for path, body in keepwarm.engine.asked if path == "/completion"]
    chats = [body for path, body in keepwarm.engine.asked if path == "/v1/chat/completions"]
    assert fills
    assert chats
    assert all(body["n_cache_reuse"] == 0 for body in fills + chats)
