"""The next user's turn prefilled ahead, on each kind of memory: the template drops reasoning."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
ROUNDING = 0.02  # in a logprob, as for all that was computed in other pieces
# A question of four words, and the opening of two turns.
QUESTION_TOKENS = 16


@pytest.fixture(params=list(WRITERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.getbasetemp() / f"ahead-{request.param}.gguf"
    if not path.exists():
        WRITERS[request.param](path, small_model())
    return path


def start(
    serve: Serve, model: Path, tmp_path: Path, *, ahead: str = "auto", slots: int = 2
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


def test_a_new_question_is_all_that_is_left_and_the_answer_is_the_same(
    serve: Serve, model: Path, tmp_path: Path
) -> None:
    # One token: later ones of a model without sense hang on the last bits, which differ where a
    # prompt was computed in other pieces.
    ask: dict[str, Any] = {"max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    answers: dict[str, list[Answer]] = {"auto": [], "off": []}
    for ahead, heard in answers.items():
        served = start(serve, model, tmp_path, ahead=ahead)
        talk: list[dict[str, Any]] = [RULES]
        for turn in range(3):
            talk = [*talk, user(f"And what then, {turn}?")]
            if turn:
                answer = served.chat(*talk, **ask)
                heard.append(answer)
                if ahead == "auto":
                    assert answer.plan in ("ahead", "slot")
            talk = (prepared if ahead == "auto" else think)(served, *talk)
        if ahead == "auto":
            last: Answer = served.chat(*talk, user("Why is it so?"))
            assert last.plan == "ahead"
            assert last.prefilled <= QUESTION_TOKENS
            assert 0 < served.metric(USED) <= served.metric(COMPUTED)
            assert served.metric("keepwarm_misses_total") == 0
        else:
            assert served.metric(COMPUTED) == 0
        served.stop()
    for ours, theirs in zip(answers["auto"], answers["off"], strict=True):
        first, second = dict(ours.logprobs[0][2]), dict(theirs.logprobs[0][2])
        both = first.keys() & second.keys()
        assert len(both) >= 3
        assert all(first[token] == pytest.approx(second[token], abs=ROUNDING) for token in both)


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
    talk: list[dict[str, Any]] = [RULES]
    for tenths in range(3, 9):
        talk = think(served, *talk, user("And what then?"))
        time.sleep(tenths / 10)
        answer = served.chat(*talk, user("Why is it so?"))
        assert answer.status == 200
        # Nothing but the reply in its new words and the question.
        assert answer.prefilled <= 150
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
