"""From a finished request to its record: explained off the loop, logged, told to who listens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finished import SYSTEM, asks, ended, plan
from keepwarm.core.plan import Source
from keepwarm.core.reply import Counts, Reply
from keepwarm.dashboard import __file__ as dashboard_file
from keepwarm.explain.explainer import Explainer, Identity
from keepwarm.explain.record import brief
from keepwarm.gateway.feed import Feed, encode_event
from keepwarm.gateway.pages import content_policy
from keepwarm.logs import request_fields, request_line, set_up_logging
from keepwarm.settings import LogSettings

SECRET = "the safe is behind the clock"


async def opened(directory: Path, *, keeps_text: bool = False, **changes: Any) -> Explainer:
    explainer = Explainer(keeps_text=keeps_text)
    identity = Identity("f", {"engine build": "1", "chat template": "a"}, cuttable=True)
    await explainer.open(directory, replace(identity, **changes), [])
    return explainer


@pytest.fixture
async def explainer(tmp_path: Path) -> AsyncIterator[Explainer]:
    explainer = await opened(tmp_path)
    yield explainer
    await explainer.close()


async def record_of(explainer: Explainer, number: int, namespace: str = "ada") -> dict[str, Any]:
    found = await explainer.get(f"request{number:05}", namespace=namespace)
    assert found is not None
    return found


async def test_what_was_asked_before_is_what_a_request_is_compared_with(
    explainer: Explainer,
) -> None:
    explainer.ended(ended(1, asks("x", "It is 2026-11-24 09:00. " + SYSTEM)))
    explainer.ended(ended(2, asks("x", "It is 2026-11-24 09:05. " + SYSTEM)))
    first, second = await record_of(explainer, 1), await record_of(explainer, 2)
    assert first["cause"] == "new_namespace"
    assert second["cause"] == "timestamp"
    assert second["nearest"] == {"id": "request00001", "age_s": 10.0}
    assert second["difference"]["place"].startswith("message 1 (system), character ")
    tokens = {"slot": 0, "snapshot": 0, "shared": 0, "cold": 400}
    assert second["tokens"] == tokens | {"prompt": 400, "decoded": 9}


async def test_an_answer_knows_of_all_that_ended_before_it(explainer: Explainer) -> None:
    for i in range(50):
        explainer.ended(ended(i, asks(f"question {i}")))
    latest = await explainer.latest(namespace="ada", limit=99)
    assert [r["id"] for r in latest] == [f"request{i:05}" for i in reversed(range(50))]
    last = await explainer.get("last", namespace="ada")
    assert last == latest[0]


async def test_a_namespace_sees_its_own_requests_only(explainer: Explainer) -> None:
    explainer.ended(ended(1, asks("x"), namespace="ada"))
    explainer.ended(ended(2, asks("x"), namespace="bob"))
    assert await explainer.get("request00001", namespace="bob") is None
    assert (await record_of(explainer, 2, "bob"))["nearest"] is None
    _, ever = await explainer.totals(namespace="bob")
    assert ever.requests == 1
    assert ever.cold_tokens == 400


async def test_text_is_in_no_record_file_or_log_line_unless_the_settings_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    explainer = await opened(tmp_path)
    with caplog.at_level(logging.DEBUG, "keepwarm"):
        explainer.ended(ended(1, asks("x", SECRET + SYSTEM)))
        explainer.ended(ended(2, asks("x", "another thing " + SYSTEM)))
        record = await record_of(explainer, 2)
    await explainer.close()
    assert record["cause"] == "text_changed"
    assert record["difference"]["before"] is None
    assert record["difference"]["before_hash"]
    told = json.dumps(record) + "".join(repr(vars(r)) for r in caplog.records)
    assert SECRET[:12] not in told
    for file in tmp_path.iterdir():
        assert SECRET[:12].encode() not in file.read_bytes()


async def test_text_is_told_where_the_settings_keep_it(tmp_path: Path) -> None:
    explainer = await opened(tmp_path, keeps_text=True)
    explainer.ended(ended(1, asks("x", SECRET + SYSTEM)))
    explainer.ended(ended(2, asks("x", "another thing " + SYSTEM)))
    record = await record_of(explainer, 2)
    await explainer.close()
    assert record["difference"]["before"] == SECRET
    assert record["difference"]["after"] == "another thing "


async def test_a_new_fingerprint_is_named_with_what_changed(tmp_path: Path) -> None:
    explainer = await opened(tmp_path)
    explainer.ended(ended(1, asks("x")))
    await explainer.close()
    described = {"engine build": "1", "chat template": "b"}
    later = await opened(tmp_path, fingerprint="g", described=described)
    later.ended(ended(2, asks("x")))
    later.ended(ended(3, asks("x", "A text that nobody has sent before. " * 20)))
    record, other = await record_of(later, 2), await record_of(later, 3)
    await later.close()
    assert record["cause"] == "new_fingerprint"
    assert "changed: chat template" in record["summary"]
    assert other["cause"] == "first_seen"


async def test_after_a_restart_of_keepwarm_a_known_opening_is_called_so(tmp_path: Path) -> None:
    explainer = await opened(tmp_path)
    explainer.ended(ended(1, asks("x")))
    await explainer.close()
    later = await opened(tmp_path)
    later.ended(ended(2, asks("x")))
    record = await record_of(later, 2)
    await later.close()
    assert record["cause"] == "engine_restarted"


async def test_a_request_without_an_answer_has_a_record_too(explainer: Explainer) -> None:
    explainer.ended(ended(1, asks("x"), reply=None, status=0, plan=None, first_byte_s=None))
    explainer.ended(ended(2, asks("x"), reply=None, status=0, trouble="rate_limit_error"))
    explainer.ended(ended(3, asks("x"), reply=Reply(None, None), status=400))
    explainer.ended(ended(4, asks("x"), reply=None, status=0, trouble="escalated"))
    outcomes = [(await record_of(explainer, i))["outcome"] for i in range(1, 5)]
    assert outcomes == ["hung_up", "failed", "refused", "escalated"]
    assert (await record_of(explainer, 1))["cause"] == "failed"
    # None of them is what a later prompt is compared with: their tokens may be nowhere.
    explainer.ended(ended(5, asks("x")))
    assert (await record_of(explainer, 5))["nearest"] is None


async def test_the_way_that_was_taken_is_marked_among_those_considered(
    explainer: Explainer,
) -> None:
    explainer.ended(ended(1, asks("x"), plan=plan(Source.SHARED, reuse=300)))
    record = await record_of(explainer, 1)
    assert record["plan"] == "shared"
    assert [o["chosen"] for o in record["considered"]] == [False, True]


async def test_what_would_have_been_cold_leaves_out_what_made_it_warm(
    explainer: Explainer,
) -> None:
    counts = Counts(cached=390, prefilled=10, decoded=9, prefill_s=0.5, decode_s=1.0)
    explainer.ended(
        ended(1, asks("x"), reply=Reply(counts, None), prepared_s=0.3, first_byte_s=101.0)
    )
    timing = (await record_of(explainer, 1))["timing"]
    assert timing["ttft_s"] == pytest.approx(1.0)
    assert timing["cold_ttft_s"] == pytest.approx(1.0 - 0.5 - 0.3 + 400 * 0.005)


async def test_listeners_are_told_on_the_loop(explainer: Explainer) -> None:
    told: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
    explainer.on_record = lambda namespace, record: told.put_nowait((namespace, record))
    explainer.ended(ended(1, asks("x")))
    namespace, record = await asyncio.wait_for(told.get(), 10)
    assert namespace == "ada"
    assert record == await record_of(explainer, 1)
    assert brief(record)["tokens"] == record["tokens"]


async def test_what_ends_before_it_is_open_or_after_it_is_closed_is_forgotten(
    tmp_path: Path,
) -> None:
    explainer = Explainer(keeps_text=False)
    explainer.ended(ended(1, asks("x")))
    assert await explainer.get("last", namespace="ada") is None
    await explainer.open(tmp_path, Identity("f", {}, cuttable=True), [])
    await explainer.close()
    explainer.ended(ended(2, asks("x")))
    assert await explainer.latest(namespace="ada", limit=9) == []


async def test_a_fault_in_one_explanation_is_logged_and_the_next_one_is_told(
    explainer: Explainer, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ended(1, asks("x"), reply=Reply("no counts", None))  # type: ignore[arg-type]
    with caplog.at_level("ERROR", "keepwarm"):
        explainer.ended(broken)
        explainer.ended(ended(2, asks("x")))
        assert await record_of(explainer, 2)
    assert [r.getMessage() for r in caplog.records] == ["a request couldn't be explained"]


# --- log lines


async def test_a_request_is_one_line_for_people_and_fields_for_programs(
    explainer: Explainer, capsys: pytest.CaptureFixture[str]
) -> None:
    explainer.ended(ended(1, asks("x", "It is 2026-11-24 09:00. " + SYSTEM)))
    explainer.ended(ended(2, asks("x", "It is 2026-11-24 09:05. " + SYSTEM)))
    record = await record_of(explainer, 2)
    assert request_line(record) == (
        "request00002 chat tier=none plan=cold slot=1 warm=0 cold=400 out=9 ttft=2.000s "
        "(cold 2.10s) timestamp"
    )
    fields = request_fields(record)
    assert fields["cold_tokens"] == 400
    assert fields["difference"]["kind"] == "date"
    assert "before" not in fields["difference"]


@pytest.mark.parametrize("form", ["human", "json"])
async def test_each_form_of_the_log_is_one_line_a_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    set_up_logging(LogSettings(format=form))  # type: ignore[arg-type]
    try:
        explainer = await opened(tmp_path)
        explainer.ended(ended(1, asks("x\ny")))
        explainer.ended(ended(2, asks("x\nz"), reply=None, status=0, trouble="timeout_error"))
        await explainer.close()
        lines = capsys.readouterr().err.splitlines()
    finally:
        logger = logging.getLogger("keepwarm")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    assert len(lines) == 2
    if form == "json":
        first, second = map(json.loads, lines)
        assert (first["id"], first["level"], first["cause"]) == (
            "request00001",
            "info",
            "new_namespace",
        )
        assert (second["level"], second["error"]) == ("warning", "timeout_error")
    else:
        assert "request00001 chat tier=none plan=cold" in lines[0]
        assert "WARNING" in lines[1]


# --- the live stream


async def test_nothing_is_looked_at_while_nobody_listens() -> None:
    looks: list[str] = []

    def look(namespace: str) -> dict[str, Any]:
        looks.append(namespace)
        return {"n": len(looks)}

    feed = Feed(look)
    feed.publish("ada", "request", {"x": 1})
    await asyncio.sleep(0)
    assert looks == []
    listener = feed.attach("ada")
    assert await listener.events.get() == encode_event("slots", {"n": 1})
    feed.detach(listener)
    seen = len(looks)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(looks) == seen
    assert len(feed) == 0


async def test_whoever_comes_is_told_how_things_stand_though_nothing_changes() -> None:
    feed = Feed(lambda _: {"same": True}, beat_s=0.0)
    first = feed.attach("ada")
    await asyncio.sleep(0.01)
    second = feed.attach("ada")
    for listener in (first, second):
        assert listener.events.get_nowait() == encode_event("slots", {"same": True})
    feed.close()


async def test_a_listener_hears_its_own_namespace_only() -> None:
    feed = Feed(lambda _: {})
    ada, bob = feed.attach("ada"), feed.attach("bob")
    for listener in (ada, bob):
        listener.events.get_nowait()
    feed.publish("ada", "request", {"x": 1})
    assert ada.events.get_nowait() == encode_event("request", {"x": 1})
    assert bob.events.empty()
    feed.close()


async def test_a_state_that_did_not_change_is_not_sent_at_each_beat() -> None:
    looked = asyncio.Semaphore(0)

    def look(_: str) -> dict[str, Any]:
        looked.release()
        return {"same": True}

    feed = Feed(look, beat_s=0.0)
    listener = feed.attach("ada")
    for _ in range(9):
        await looked.acquire()
    # Once for who came, once for the namespace.
    assert listener.events.qsize() <= 2
    feed.close()


async def test_a_listener_that_does_not_keep_up_is_ended_not_waited_for() -> None:
    feed = Feed(lambda _: {})
    slow = feed.attach("ada")
    for i in range(2000):
        feed.publish("ada", "request", {"i": i})
    assert slow.events.qsize() < 600
    waiting = [slow.events.get_nowait() for _ in range(slow.events.qsize())]
    assert None in waiting
    feed.close()


async def test_closing_ends_every_stream() -> None:
    feed = Feed(lambda _: {})
    behind, waiting = feed.attach("ada"), feed.attach("bob")

    async def read_to_the_end() -> None:
        while await waiting.events.get() is not None:
            pass

    reading = asyncio.ensure_future(read_to_the_end())
    for _ in range(5):
        await asyncio.sleep(0)  # it has read all there was, and waits
    feed.close()
    await asyncio.wait_for(reading, 10)
    assert await behind.events.get() is None


def test_the_page_is_small_and_may_load_nothing_from_elsewhere() -> None:
    html = Path(dashboard_file).with_name("index.html").read_bytes()
    assert len(html) < 150_000
    assert html.count(b"<script>") == 1
    for outside in (b"src=", b"@import", b"url(http", b'href="http', b"innerHTML", b"eval("):
        assert outside not in html
    policy = content_policy(html)
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 1
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy
