"""A prompt is what the engine renders: what digests can't tell is counted, never guessed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from served import Serve, Served
from tinymodels import small_model, write_tiny_qwen3

pytestmark = pytest.mark.live

# As Llama 3.1's and gpt-oss's do, but with the second in place of the day.
CLOCK = """{{- '<|im_start|>system\\nNow: ' + strftime_now('%H:%M:%S') + '\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}{%- if not (loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
RULES = {"role": "system", "content": "Name the disk, then the hour, then the reason why. " * 60}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.fixture
def start(serve: Serve, tmp_path: Path):
    def run(template: str | None = None) -> Served:
        model = tmp_path / "tiny.gguf"
        write_tiny_qwen3(model, small_model())
        more = {}
        if template:
            path = tmp_path / "template.jinja"
            path.write_text(template)
            more["chat_template"] = str(path)
        return serve(model=str(model), slots=2, context=8192, pool="split", **more)

    return run


def test_a_template_that_prints_the_time_costs_no_second_prefill_and_breaks_no_promise(
    start,
) -> None:
    served = start(CLOCK)
    for number in range(4):
        answer = served.chat(RULES, user(f"Question {number}?"))
        assert answer.status == 200
        assert answer.prefilled <= answer.body["usage"]["prompt_tokens"]
        time.sleep(1.1)
    assert served.metric("keepwarm_misses_total") == 0


def test_another_argument_that_renders_the_same_shares_the_history(start) -> None:
    served = start()
    said = {"role": "assistant", "content": "It stopped at noon, and the disk was full."}
    history = [RULES, user("What happened in the night? " * 20), said]
    served.chat(*history, user("And then?"))
    side = served.chat(
        *history, user("Give it a title."), chat_template_kwargs={"enable_thinking": False}
    )
    assert side.prefilled < 40
    again = served.chat(*history, user("And then?"))
    assert again.prefilled < 40


def test_nothing_is_reused_nor_promised_where_the_client_wants_none(start) -> None:
    served = start()
    served.chat(RULES, user("First?"))
    fresh = served.chat(RULES, user("First?"), cache_prompt=False)
    assert fresh.cached == 0
    assert served.metric("keepwarm_misses_total") == 0
    served.chat(RULES, user("Third?"))
    fourth = served.chat(RULES, user("Fourth?"))
    assert fourth.prefilled < 40, "the prefix is there for the others"


def test_what_the_template_refuses_is_refused_before_it_costs_a_prefill(start) -> None:
    strict = (
        "{%- for message in messages -%}{%- if message.role == 'tool' -%}"
        "{{- raise_exception('No tools here.') -}}{%- endif -%}"
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
        "{%- endif -%}"
    )
    served = start(strict)
    before = served.metric("keepwarm_prompt_tokens_total")
    rules = {"role": "system", "content": "Other rules, which nobody has sent before this. " * 60}
    refused = served.chat(rules, user("Hm?"), {"role": "tool", "content": "4", "tool_call_id": "a"})
    assert refused.status in (400, 500)
    assert served.metric("keepwarm_prompt_tokens_total") == before
