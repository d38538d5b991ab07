"""The next user's turn prefilled ahead, on each kind of memory: the template drops reasoning."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bareengine import StartEngine
from keepwarm.core.texts import common_chars
from scriptedengine import scripted
from served import Answer, Serve, Served
from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2, write_tiny_qwen3

pytestmark = pytest.mark.live

WRITERS: dict[str, Callable[..., None]] = {
    "plain": write_tiny_qwen3,
    "window": write_tiny_gemma3,
    "hybrid": write_tiny_lfm2,
}
# Reasoning is rendered behind the last question only, as Qwen's and DeepSeek's templates do.
TEMPLATE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content and loop.index0 > ns.last -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- (m.content or '') + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
THOUGHT = "The disk was full at noon and the backup ran into it, then stopped. " * 2
SAID = "The backup stopped at noon, because the disk had no room left for it. " * 3
RULES = {"role": "system", "content": "Name the disk, then the hour, then the reason why. " * 12}
COMPUTED, USED = (
    'keepwarm_ahead_tokens_total{what="computed"',
    'keepwarm_ahead_tokens_total{what="used"',
)
# A batch of 512 tokens takes these models a tenth of a second, and others may use the machine.
WAITED_S = 5.0
# A question of four words, and the opening of two turns.
QUESTION_TOKENS = 16


@pytest.fixture(params=list(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / f"ahead-{request.param}.gguf"
    if not path.exists():
        WRITERS[request.param](path, small_model())
    return path


def start(
    serve: Serve,
    model: Path,
    tmp_path: Path,
    *,
    ahead: str = "auto",
    slots: int = 2,
    store: Path | None = None,
) -> Served:
    template = tmp_path / "think.jinja"
    template.write_text(TEMPLATE)
    return serve(
        model=str(model),
        slots=slots,
        context=8192 * slots,
        chat_template=str(template),
        pool="split",
        ahead=ahead,
        tiers={"warm": ["minimal"]},
        store={"dir": str(store or tmp_path / "store")},
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def think(served: Served, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """Ask, have a reply with reasoning, and return the conversation with it."""
    grammar = f'root ::= "<think>\\n{THOUGHT}\\n</think>\\n\\n{SAID}"'
    answer = served.chat(*messages, max_tokens=2000, grammar=grammar)
    choice = answer.body["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["reasoning_content"]
    return [*messages, choice["message"]]


def prepared(served: Served, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """As `think`, and wait until the next turn was computed ahead."""
    before = served.metric(COMPUTED)
    talk = think(served, *messages)
    deadline = time.monotonic() + 60
    while served.metric(COMPUTED) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert served.metric(COMPUTED) > before
    served.settled()
    return talk


def test_a_new_question_is_all_that_is_left(serve: Serve, model: Path, tmp_path: Path) -> None:
    served = start(serve, model, tmp_path)
    talk: list[dict[str, Any]] = [RULES]
    for turn in range(3):
        talk = prepared(served, *talk, user(f"And what then, {turn}?"))
    last = served.chat(*talk, user("Why is it so?"))
    assert last.plan == "ahead"
    assert last.prefilled <= QUESTION_TOKENS
    assert 0 < served.metric(USED) <= served.metric(COMPUTED)
    assert served.metric("keepwarm_misses_total") == 0
    told = served.get(f"/keepwarm/requests/{last.headers['x-keepwarm-request-id']}")
    assert told["ahead"]["tokens"] > 0


def test_the_answer_is_the_engines_own_to_the_last_bit(
    serve: Serve, model: Path, tmp_path: Path
) -> None:
    # A prompt that is computed in two requests differs from one that is computed in one in its last
    # bits, Keepwarm or not. So it is compared with the engine's own answer in the same two.
    ask: dict[str, Any] = {"max_tokens": 12, "logprobs": True, "top_logprobs": 5}
    heard: dict[str, Answer] = {}
    for ahead in ("auto", "off"):
        served = start(serve, model, tmp_path, ahead=ahead, store=tmp_path / ahead)
        talk = (prepared if ahead == "auto" else think)(served, RULES, user("What happened?"))
        if ahead == "off":
            served.settled()
            compute_by_hand(served, talk)
        heard[ahead] = served.chat(*talk, user("Why is it so?"), **ask)
        assert heard[ahead].prefilled <= QUESTION_TOKENS
        served.stop()
    assert heard["auto"].plan == "ahead"
    assert heard["auto"].logprobs == heard["off"].logprobs


def compute_by_hand(served: Served, talk: list[dict[str, Any]]) -> None:
    """Have the engine compute what the next turn begins with, past Keepwarm."""
    engine = str(served.get("/keepwarm/status")["engine_url"])
    slots = served.get("/keepwarm/slots")["slots"]
    slot = next(s["id"] for s in slots if s["holds"] == "conversation")

    def post(path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            engine + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    texts = [post("/apply-template", messages=[*talk, user(word)])["prompt"] for word in ("Q", "7")]
    common = texts[0][: common_chars(*texts)]
    ids = post("/tokenize", content=common, add_special=True, parse_special=True)["tokens"]
    post("/completion", prompt=ids, n_predict=0, id_slot=slot, cache_prompt=True)


def test_what_is_generated_again_finds_the_old_rendering(
    serve: Serve, model: Path, tmp_path: Path
) -> None:
    served = start(serve, model, tmp_path, slots=1)
    talk = prepared(served, RULES, user("What happened?"))
    talk = prepared(served, *talk, user("And what then?"))
    again = served.chat(*talk[:-1])
    assert again.prefilled <= QUESTION_TOKENS
    assert served.metric("keepwarm_misses_total") == 0


def test_two_conversations_share_one_slot(serve: Serve, model: Path, tmp_path: Path) -> None:
    served = start(serve, model, tmp_path, slots=1)
    talks = [prepared(served, RULES, user(f"What happened on day {day}?")) for day in (1, 2)]
    for talk in talks:
        answer = served.chat(*talk, user("Why is it so?"))
        assert answer.prefilled <= QUESTION_TOKENS
    assert served.metric("keepwarm_misses_total") == 0


def test_a_question_comes_at_any_moment_of_it(serve: Serve, model: Path, tmp_path: Path) -> None:
    served = start(serve, model, tmp_path)

    @given(seconds=st.floats(0.0, 0.9))
    @settings(max_examples=10, deadline=None, database=None)
    @example(seconds=0.45)
    @example(seconds=0.5)
    def asked(seconds: float) -> None:
        talk = think(served, RULES, user("What happened?"))
        time.sleep(seconds)
        answer = served.chat(*talk, user("Why is it so?"))
        assert answer.status == 200
        # Nothing but the reply in its new words and the question.
        assert answer.prefilled <= 150
        assert queued_s(answer) < WAITED_S

    asked()
    assert served.metric("keepwarm_misses_total") == 0


def queued_s(answer: Answer) -> float:
    """How long a request waited for its slot."""
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    return float(timing["queue"]) / 1e3


def test_the_longest_that_is_computed_ahead_is_interrupted_within_a_batch(
    serve: Serve, model: Path, tmp_path: Path
) -> None:
    served = start(serve, model, tmp_path, slots=1)
    # Tools' results in between are all written anew once a user asks.
    results = [
        {"role": "tool", "tool_call_id": "x", "content": f"{number}: " + SAID * 16}
        for number in range(4)
    ]
    steps = [{"role": "assistant", "content": "", "reasoning_content": THOUGHT}, *results]
    talk = think(served, RULES, user("What happened?"), *steps)
    served.until(served.busy_slots, seconds=10)
    answer = served.chat(*talk, user("Why is it so?"))
    assert answer.status == 200
    assert queued_s(answer) < WAITED_S
    served.settled()
    # What was computed by then is of use, and accounted for.
    served.until(lambda: served.metric(COMPUTED) > 0)
    assert answer.prefilled + served.metric(COMPUTED) <= answer.cached + answer.prefilled
    assert served.metric("keepwarm_misses_total") == 0


def test_an_engine_that_dies_meanwhile_costs_warmth_alone(
    serve: Serve, model: Path, tmp_path: Path
) -> None:
    served = start(serve, model, tmp_path)
    talk = think(served, RULES, user("What happened?"))
    time.sleep(0.45)
    os.kill(served.engine_pid, signal.SIGKILL)
    assert served.chat(*talk, user("Why is it so?")).status == 200
    talk = prepared(served, *talk, user("And what then?"))
    assert served.chat(*talk, user("Why is it so?")).plan in ("ahead", "snapshot")


# All is appended: only what the client itself writes otherwise is lost.
APPENDS = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') -}}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>' + call.function.name + ' ' + call.function.arguments + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def test_arguments_that_a_client_prints_again_are_prepared_behind_the_call(
    serve: Serve, model: Path, tmp_path: Path, bare_engine: StartEngine
) -> None:
    engine = bare_engine(model, n_parallel=2, n_ctx=16384, chat_template=APPENDS)

    def reply(number: int, *, spaced: bool) -> dict[str, Any]:
        arguments = {"at": [number, SAID], "why": THOUGHT}
        text = json.dumps(arguments, separators=(", ", ": ") if spaced else (",", ":"))
        call = {"name": "look", "arguments": text}
        calls = [{"id": f"call{number}", "type": "function", "function": call}]
        return {"role": "assistant", "content": "I look.", "tool_calls": calls}

    def script(chat: Mapping[str, Any]) -> dict[str, Any]:
        return reply(len(chat["messages"]), spaced=False)

    with scripted(engine, script) as base:
        attached: dict[str, Any] = {"upstream": base, "slot_dir": str(engine.slot_dir)}
        served = serve(**attached, ahead="auto", tiers={"warm": ["minimal"]})
        talk = [RULES, user("What happened?")]
        answers: list[Answer] = []
        for _ in range(4):
            answers.append(served.chat(*talk))
            call = reply(len(talk), spaced=True)
            talk += [call, {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"]}]
            talk[-1]["content"] = "The disk is full."
            time.sleep(2.0)
        served.stop()
    # The first result shows how the client prints; what the call comes to is evaluated once more.
    assert answers[1].prefilled > 60
    for answer in answers[2:]:
        assert answer.plan == "ahead"
        assert answer.prefilled <= QUESTION_TOKENS
