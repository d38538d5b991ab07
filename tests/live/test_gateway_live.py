"""The gateway with the real engine: warmth on every API, for everyone, and for nobody else."""

from __future__ import annotations

import gzip
import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from served import Answer, Served
from tinymodels import small_model

pytestmark = pytest.mark.live

ALICE, BOB = "alice-key", "bob-key"
SLOTS = 4
RULES = "Always answer with the name of the disk, the hour and one short reason. " * 14


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, small_tiers: Path) -> Iterator[Served]:
    """One Keepwarm for the module, with two tenants."""
    served = Served(
        tmp_path_factory.mktemp("served"),
        engine={"model": str(small_model()), "slots": SLOTS, "context": 8192},
        server={"api_keys": [f"alice:{ALICE}", f"bob:{BOB}"], "operators": ["alice"]},
        tiers={"dir": str(small_tiers)},
    ).wait_ready()
    yield served
    served.stop()


@pytest.fixture(autouse=True)
def idle(served: Served) -> None:
    """Each test begins on idle slots."""
    served.settled()


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def warmed_tokens(served: Served, tier: str) -> int:
    warmed = served.get("/keepwarm/status")["warmed"]
    return int(next(w["tokens"] for w in warmed if w["name"] == f"tier:{tier}"))


@pytest.mark.parametrize("tier", ["minimal", "standard"])
def test_the_first_request_on_a_tier_prefills_its_question_only(served: Served, tier: str) -> None:
    answer = served.ask("Is the backup disk there?", model=tier)
    assert answer.status == 200
    assert answer.plan in ("slot", "snapshot")
    assert answer.headers["x-keepwarm-tier"] == f"{tier}; explicit"
    assert answer.cached >= warmed_tokens(served, tier)
    assert answer.prefilled < 30


def test_a_header_names_the_tier_too(served: Served) -> None:
    body = {"messages": [user("Is it noon?")], "max_tokens": 4}
    answer = served.post("/v1/chat/completions", body, X_Keepwarm_Tier="standard")
    assert answer.headers["x-keepwarm-tier"] == "standard; explicit"
    assert answer.cached >= warmed_tokens(served, "standard")


def test_a_stream_comes_piece_by_piece_and_ends_with_its_counts(served: Served) -> None:
    body = {"model": "minimal", "messages": [user("Count the disks.")], "max_tokens": 24}
    stream = served.stream(body)
    assert stream.response.headers["X-Keepwarm-Plan"] in ("slot", "snapshot")
    came = []
    for event in stream.events():
        came.append(time.monotonic())
        last = event
    assert len(came) > 10
    assert came[-1] > came[0]
    assert last["timings"]["cache_n"] >= warmed_tokens(served, "minimal")


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_a_tier_is_as_warm_on_the_other_apis(served: Served, api: str) -> None:
    tokens = warmed_tokens(served, "standard")
    if api == "responses":
        body = {"model": "standard", "input": "Is the disk full?", "max_output_tokens": 4}
        usage = served.post("/v1/responses", body).body["usage"]
        cached = usage["input_tokens_details"]["cached_tokens"]
    else:
        body = {"model": "standard", "messages": [user("Is the disk full?")], "max_tokens": 4}
        cached = served.post("/v1/messages", body).body["usage"]["cache_read_input_tokens"]
    assert cached >= tokens


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_a_raw_prompt_that_comes_again_is_warm(served: Served, path: str) -> None:
    body = {"prompt": "The backup disk is mounted " * 12 + path, "max_tokens": 4, "n_predict": 4}
    first = served.post(path, body)
    assert first.status == 200
    served.settled()
    again = served.post(path, body)
    assert again.body["timings"]["prompt_n"] == 1


def test_what_the_engine_refuses_reaches_the_client_unchanged(served: Served) -> None:
    too_long = "disk " * 9000
    answer = served.chat(user(too_long), model="any")
    assert answer.status == 400
    assert answer.body["error"]["type"] == "exceed_context_size_error"
    served.settled()
    assert served.ask("Still there?", model="minimal").status == 200


CLOCK = {
    "type": "function",
    "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object"}},
}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": True, "top_logprobs": 3},
        {"tools": [CLOCK]},
        {"stop": ["the"], "max_tokens": 30},
        {"response_format": {"type": "json_object"}, "max_tokens": 20},
        {"n": 2},
    ],
    ids=["text", "logprobs", "tools", "stop", "format", "several"],
)
def test_a_whole_reply_is_what_the_engine_itself_would_say(
    served: Served, extra: dict[str, Any]
) -> None:
    body = {
        "messages": [user("Name three disks, and say which is full.")],
        "max_tokens": 12,
        "temperature": 0,
        **extra,
    }
    served.post("/v1/chat/completions", body)
    served.settled()
    through = served.post("/v1/chat/completions", body)
    served.settled()
    slot = int(through.headers["x-keepwarm-slot"])
    direct = json.loads(
        urllib.request.urlopen(
            urllib.request.Request(
                served.get("/keepwarm/status")["engine_url"] + "/v1/chat/completions",
                json.dumps({**body, "id_slot": slot}).encode(),
                {"Content-Type": "application/json"},
            ),
            timeout=120,
        ).read()
    )
    for reply in (through.body, direct):
        assert reply.pop("id").startswith("chatcmpl-")
        assert reply.pop("created") > 0
        assert reply.pop("timings")["predicted_n"] > 0
    assert through.body == direct
    assert list(through.body) == list(direct)


def test_everything_else_is_served_too(served: Served) -> None:
    tokens = served.post("/tokenize", {"content": "The backup disk."}).body["tokens"]
    assert len(tokens) >= 4
    names = [model["id"] for model in served.get("/v1/models")["data"]]
    assert {"minimal", "standard", "auto"} <= set(names)
    assert "chat_template" in served.get("/props")
    assert len(served.get("/slots")) == SLOTS
    page = urllib.request.Request(served.base + "/", headers={"Accept-Encoding": "gzip"})
    page.add_header("Authorization", f"Bearer {ALICE}")
    with urllib.request.urlopen(page) as reply:
        assert reply.headers["Content-Encoding"] == "gzip"
        assert b"</html>" in gzip.decompress(reply.read())
    metrics = served.read("/metrics")
    assert "llamacpp:prompt_tokens_total" in metrics
    assert "keepwarm_prompt_tokens_total" in metrics


def test_without_a_key_nothing_is_told(served: Served) -> None:
    for path in ("/v1/chat/completions", "/completion", "/tokenize", "/v1/messages"):
        answer = served.post(path, {"content": "x", "prompt": "x", "messages": []}, key="wrong")
        assert answer.status == 401, path


def test_four_new_conversations_with_an_unknown_prefix_prefill_it_once(served: Served) -> None:
    rules = system("First of all: " + RULES)
    before = served.metric('keepwarm_prompt_tokens_total{source="cold"}')
    calls = [
        partial(served.chat, rules, user(f"Question number {n}?"), max_tokens=4) for n in range(4)
    ]
    answers: list[Answer] = served.at_once(*calls)
    assert [a.status for a in answers] == [200] * 4
    prompt = max(a.cached + int(a.body["timings"]["prompt_n"]) for a in answers)
    assert prompt > 200
    # By the replies' own counts, and by the metrics: the rules once, and four short questions.
    assert sum(a.prefilled for a in answers) < prompt + 4 * 30
    served.settled()
    metered = served.metric('keepwarm_prompt_tokens_total{source="cold"}') - before
    assert metered == sum(a.prefilled for a in answers)
    plans = sorted(a.plan for a in answers)
    assert plans.count("cold") == 1
    assert set(plans) <= {"cold", "shared", "slot", "snapshot"}


def test_more_conversations_than_slots_prefill_their_new_turns_only(served: Served) -> None:
    count = SLOTS + 2
    talks: list[list[dict[str, Any]]] = [
        [system(f"You are helper {n}. " + RULES[: 400 + 40 * n]), user("What do you do?")]
        for n in range(count)
    ]
    held = []
    for talk in talks:
        answer = served.chat(*talk, max_tokens=12)
        talk += [{"role": "assistant", "content": answer.text}, user("And after that?")]
        held.append(answer.cached + int(answer.body["timings"]["prompt_n"]))
        served.settled()
    for talk, known in zip(talks, held, strict=True):
        answer = served.chat(*talk, max_tokens=4)
        assert answer.status == 200
        # All that the first turn had, but for the few tokens around the reply's end.
        assert answer.cached >= known
        assert answer.prefilled < 40
        served.settled()


def test_a_conversation_goes_on_when_json_is_asked_for_now_and_then(served: Served) -> None:
    """This model's template renders nothing of a schema, nor of a tool choice."""
    turns = [system("Now and then an object is asked for. " + RULES)]
    asked = [{}, {"response_format": {"type": "json_object"}}, {"tool_choice": "none"}, {}]
    for number, extra in enumerate(asked):
        turns.append(user(f"Which disk is number {number}, and at what hour?"))
        answer = served.chat(*turns, model="any", max_tokens=8, **extra)
        assert answer.status == 200
        if number:
            assert answer.prefilled < 40
        turns.append({"role": "assistant", "content": answer.text})
        served.settled()


def test_several_replies_at_once_cost_no_conversation_its_tokens(served: Served) -> None:
    """The engine computes them in other slots, whatever those hold."""
    talks = [
        [system(f"You are worker {n}. " + RULES), user("Which disk?")] for n in range(SLOTS - 1)
    ]
    held = []
    for talk in talks:
        answer = served.chat(*talk, max_tokens=4)
        held.append(answer.cached + int(answer.body["timings"]["prompt_n"]))
        served.settled()
    draft = [system("You write drafts. " + RULES), user("A name for a disk, please.")]
    bodies = [[*talk, {"role": "assistant", "content": "It."}, user("So?")] for talk in talks]
    with ThreadPoolExecutor(SLOTS) as pool:
        several = pool.submit(served.chat, *draft, n=SLOTS - 1, max_tokens=12)
        others = [pool.submit(served.chat, *body, max_tokens=4) for body in bodies]
        assert len(several.result().body["choices"]) == SLOTS - 1
        for other, known in zip(others, held, strict=True):
            # All of the first turn's prompt, but for the opening of the reply.
            assert other.result().cached >= known - 4


def test_a_conversation_goes_on_when_its_reply_comes_back_trimmed(served: Served) -> None:
    talk = [system("A trimming client. " + RULES), user("Tell me of the disks.")]
    first = served.chat(*talk, max_tokens=16)
    said = {"role": "assistant", "content": first.text.strip() + " ", "tool_calls": None}
    served.settled()
    again = served.chat(*talk, said, user("Go on."), max_tokens=4)
    assert again.cached >= first.cached + int(first.body["timings"]["prompt_n"]) - 2


def test_one_tenants_conversation_shows_nowhere_in_anothers(served: Served) -> None:
    tier = warmed_tokens(served, "minimal")
    for hour in ("Noon", "Early", "Late", "Tonight"):
        secret = user(f"{hour} is when the vault opens: twelve, forty, seven and nine.")
        # On a tier, which both share: its tokens and no more, whatever slot it comes to.
        assert served.chat(secret, model="minimal", key=ALICE).status == 200
        served.settled()
        guess = served.chat(secret, model="minimal", key=BOB, max_tokens=1)
        assert guess.cached == tier
        served.settled()


def test_one_tenants_own_prompt_is_cold_for_another(served: Served) -> None:
    talk = [system("My house. " + RULES), user("Where is the key?")]
    for _ in range(2):
        own = served.chat(*talk, key=ALICE)
        served.settled()
    assert own.prefilled < 30
    other = served.chat(*talk, key=BOB)
    prompt = own.cached + int(own.body["timings"]["prompt_n"])
    assert other.plan == "cold"
    # All but the opening of a turn, which every prompt begins with.
    assert other.prefilled >= prompt - 4


def test_a_body_beyond_the_bound_is_refused(served: Served) -> None:
    answer = served.ask("x" * 4_000_000, model="minimal")
    assert answer.status in (400, 413)
    served.settled()
    assert served.ask("Still there?", model="minimal").status == 200
