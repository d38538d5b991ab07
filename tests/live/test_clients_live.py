"""The real `openai` and `anthropic` clients against a running gateway: the same warmth for all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from servedgateway import Gateway, serve_gateway
from smalltiers import write_small_tiers

pytestmark = pytest.mark.live

SYSTEM = "You are a clerk. " + " ".join(
    f"Rule {i}: for item {i * 7 % 83} answer T{i * 13 % 97} and nothing else." for i in range(24)
)
# The anthropic client has no such parameter; the API takes it all the same.
GREEDY = {"temperature": 0}
CLOCK = {
    "name": "clock",
    "description": "Tell the time in a zone.",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    root = tmp_path_factory.mktemp("clients")
    tiers = write_small_tiers(root / "tiers")
    with serve_gateway(root, tiers=tiers) as running:
        yield running


@pytest.fixture
def openai_client(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture
def anthropic_client(gateway: Gateway) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0)


def chat(client: openai.OpenAI, user: str, **more: Any) -> Any:
    messages: Any = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
    return client.chat.completions.create(
        model="local", messages=messages, max_tokens=4, temperature=0, **more
    )


def test_chat_streamed_and_whole_say_the_same_and_the_second_is_warm(
    openai_client: openai.OpenAI,
) -> None:
    whole = chat(openai_client, "Name a color.")
    text, usage = "", None
    for chunk in chat(
        openai_client, "Name a color.", stream=True, stream_options={"include_usage": True}
    ):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_prefix_sent_over_one_api_is_warm_on_the_other_two(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    first = chat(openai_client, "Name a metal.")
    static = first.usage.prompt_tokens - 24  # the question and its turn tokens at most
    message = anthropic_client.messages.create(
        model="local",
        max_tokens=4,
        system=SYSTEM,
        messages=[{"role": "user", "content": "Name a river."}],
    )
    assert (message.usage.cache_read_input_tokens or 0) >= static
    response = openai_client.responses.create(
        model="local", instructions=SYSTEM, input="Name a bird.", max_output_tokens=16
    )
    assert response.usage is not None
    assert response.usage.input_tokens_details.cached_tokens >= static


def test_a_message_streams_with_its_counts_in_the_first_event(
    anthropic_client: anthropic.Anthropic,
) -> None:
    def ask() -> tuple[str, Any]:
        with anthropic_client.messages.stream(
            model="local",
            max_tokens=4,
            extra_body=GREEDY,
            system=SYSTEM,
            messages=[{"role": "user", "content": "Name a fruit."}],
        ) as stream:
            text = "".join(stream.text_stream)
            return text, stream.get_final_message()

    first, _ = ask()
    text, message = ask()
    assert text == first
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert message.usage.cache_read_input_tokens > message.usage.input_tokens
    assert message.usage.output_tokens > 0


def test_a_forced_tool_call_comes_back_to_each_client_in_its_own_shape(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    messages: Any = [{"role": "user", "content": "What time is it in Rome?"}]
    tool: Any = {"type": "function", "function": CLOCK}
    called = openai_client.chat.completions.create(
        model="local",
        messages=messages,
        tools=[tool],
        tool_choice="required",
        max_tokens=200,
        temperature=0,
    )
    own: Any = {
        "name": "clock",
        "description": CLOCK["description"],
        "input_schema": CLOCK["parameters"],
    }
    answered = anthropic_client.messages.create(
        model="local",
        max_tokens=200,
        extra_body=GREEDY,
        tools=[own],
        tool_choice={"type": "any"},
        messages=messages,
    )
    calls = called.choices[0].message.tool_calls or []
    blocks = [b for b in answered.content if b.type == "tool_use"]
    # The same prompt and sampling on both: whatever the small model does, it does on both.
    assert [c.function.name for c in calls] == [b.name for b in blocks]
    assert (called.choices[0].finish_reason == "tool_calls") == (answered.stop_reason == "tool_use")


def test_a_tiers_prompt_is_warm_for_a_message_too(
    gateway: Gateway, anthropic_client: anthropic.Anthropic
) -> None:
    tokens = {w["name"]: w["tokens"] for w in gateway.status()["warmed"]}
    message = anthropic_client.messages.create(
        model="minimal", max_tokens=2, messages=[{"role": "user", "content": "Hello."}]
    )
    assert message.usage.cache_read_input_tokens == tokens["tier:minimal"]


def test_an_error_reaches_each_client_as_its_own_kind(
    openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic
) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(openai_client, "Hi", extra_headers={"X-Keepwarm-Tier": "enormous"})
    with pytest.raises(anthropic.BadRequestError, match="enormous"):
        anthropic_client.messages.create(
            model="local",
            max_tokens=2,
            messages=[{"role": "user", "content": "Hi"}],
            extra_headers={"X-Keepwarm-Tier": "enormous"},
        )


def test_logprobs_response_format_and_several_choices_pass_through(
    openai_client: openai.OpenAI,
) -> None:
    reply = chat(openai_client, "Name a city.", logprobs=True, top_logprobs=2)
    assert len(reply.choices[0].logprobs.content[0].top_logprobs) == 2
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    made = openai_client.chat.completions.create(
        model="local",
        messages=[{"role": "user", "content": "Give a."}],
        max_tokens=30,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        },
    )
    assert json.loads(made.choices[0].message.content or "") == {"a": 1}
    assert len(chat(openai_client, "Name a star.", n=2).choices) == 2


def test_what_is_not_planned_is_passed_on(gateway: Gateway, openai_client: openai.OpenAI) -> None:
    names = {model.id for model in openai_client.models.list()}
    assert {"minimal", "auto"} <= names
    assert gateway.post("/tokenize", {"content": "hello"})["tokens"]
    counted = gateway.post(
        "/v1/messages/count_tokens",
        {"model": "local", "messages": [{"role": "user", "content": "hello there"}]},
    )
    assert counted["input_tokens"] > 2


def test_slots_can_be_read_but_not_changed(gateway: Gateway, openai_client: openai.OpenAI) -> None:
    assert isinstance(gateway.get("/slots"), list)
    with pytest.raises(openai.PermissionDeniedError):
        openai_client.post("/../slots/0?action=erase", body={}, cast_to=object)
