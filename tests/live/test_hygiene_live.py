"""What hygiene is worth with the real engine: pairs of requests that differ in what a rule removes.

Each pair is asked of a Keepwarm without rules and of one with all of them. The engine's own count
says how much of the second request was warm.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.core.hygiene import RULES
from keepwarm.tiers.files import packaged_configs
from served import Answer, Served

pytestmark = pytest.mark.live

TEXT = "Always answer with the name of the disk, the hour and one short reason. " * 8
QUESTION = "Is the backup disk there?"
TEMPLATE = packaged_configs() / "chat-templates" / "chatml-tools.jinja"


class Ruled(Served):
    """A Keepwarm with all rules of hygiene, or with none."""

    is_tidy = False


@pytest.fixture(scope="module", params=[(), RULES], ids=["off", "on"])
def served(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_tiers: Path,
    quick_model: Path,
) -> Iterator[Ruled]:
    engine = {"model": str(quick_model), "slots": 2, "context": 4096, "pool": "split"}
    served = Ruled(
        tmp_path_factory.mktemp("served"),
        engine={**engine, "threads": 1, "chat_template": str(TEMPLATE)},
        tiers={"dir": str(small_tiers)},
        hygiene={"rules": list(request.param)},
    ).wait_ready()
    served.is_tidy = bool(request.param)
    yield served
    served.stop()


def messages(served: Ruled, stamp: str) -> Answer:
    """As Claude Code asks: a block of accounting before those of the system prompt."""
    billing = f"x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=cli; cch={stamp};"
    blocks = [{"type": "text", "text": text} for text in (billing, f"You are terse. {TEXT}")]
    turns = [{"role": "user", "content": QUESTION}]
    body = {"model": "local", "max_tokens": 4, "system": blocks, "messages": turns}
    return served.post("/v1/messages", body)


def chat(served: Ruled, time: str) -> Answer:
    system = {"role": "system", "content": f"Current time: {time}\nYou are slow. {TEXT}"}
    return served.chat(system, {"role": "user", "content": QUESTION})


def tool(name: str, *, is_reversed: bool) -> dict[str, Any]:
    properties = {
        "path": {"type": "string", "description": "Which file or directory is meant"},
        "depth": {"type": "integer", "description": "How many levels below it"},
    }
    if is_reversed:
        properties = dict(reversed(properties.items()))
    parameters = {"type": "object", "properties": properties, "required": ["path"]}
    return {"type": "function", "name": name, "description": TEXT, "parameters": parameters}


def responses(served: Ruled, order: str) -> Answer:
    tools = [tool("mount", is_reversed=False), tool("copy", is_reversed=order == "other")]
    tools = tools[::-1] if order == "other" else tools
    body = {"instructions": "You are kind.", "input": QUESTION, "tools": tools}
    return served.post("/v1/responses", body | {"max_output_tokens": 4, "temperature": 0})


def counts(answer: Answer) -> tuple[int, int]:
    """Tokens of the prompt, and those nobody computed for it, by the engine's count."""
    assert answer.status == 200, answer.body
    usage = answer.body["usage"]
    # Filled ahead of the request means computed for it.
    ahead = int(answer.headers.get("x-keepwarm-filled", 0))
    if "cache_read_input_tokens" in usage:
        reused = int(usage["cache_read_input_tokens"])
        return int(usage["input_tokens"]) + reused, reused - ahead
    if "input_tokens" in usage:
        reused = int(usage["input_tokens_details"]["cached_tokens"])
        return int(usage["input_tokens"]), reused - ahead
    return int(usage["prompt_tokens"]), answer.cached - ahead


@pytest.mark.parametrize(
    ("ask", "one", "other", "said"),
    [
        (messages, "36ee5", "0aaa9", "drop-billing=1"),
        (chat, "10:22:31", "11:48:02", "move-volatile=1"),
        (responses, "one", "other", "sort-tools=1"),
    ],
    ids=["drop-billing", "move-volatile", "sort-tools"],
)
def test_a_rule_keeps_the_prefix_that_is_lost_without_it(
    served: Ruled, ask: Any, one: str, other: str, said: str
) -> None:
    rule = said.partition("=")[0]
    # The billing line says nothing to a model: it is left out without a rule, too.
    is_tidy = served.is_tidy or rule == "drop-billing"
    metric = f'keepwarm_hygiene_rewrites_total{{rule="{rule}"}}'
    before = served.metric(metric)
    first = ask(served, one)
    served.settled()
    second = ask(served, other)
    tokens, warm = counts(second)
    assert tokens > 150
    if is_tidy:
        # All but the end of the question, where a moved line stands, and the turn's opening.
        assert warm >= tokens - 40
        assert second.headers["x-keepwarm-hygiene"] == said
        assert served.metric(metric) > before
    else:
        assert warm < tokens / 4
        assert "x-keepwarm-hygiene" not in first.headers | second.headers
        assert served.metric(metric) == before == 0
    record = served.get(f"/keepwarm/requests/{second.headers['x-keepwarm-request-id']}")
    assert record["hygiene"] == ({rule: int(said[-1])} if is_tidy else {})
    assert is_tidy or "hygiene rule" in record["advice"]


def test_the_next_turn_prefills_what_stands_behind_the_moved_time_and_no_more(
    served: Ruled,
) -> None:
    def system(time: str) -> dict[str, Any]:
        return {"role": "system", "content": f"It is {time} now.\nYou are quick. {TEXT}"}

    turns: list[dict[str, Any]] = [{"role": "user", "content": f"{QUESTION} {TEXT}"}]
    first = served.chat(system("10:22"), *turns)
    turns.append({"role": "assistant", "content": first.text})
    turns.append({"role": "user", "content": "And the other one?"})
    served.settled()
    second = served.chat(system("10:23"), *turns)
    served.settled()
    third = served.chat(system("10:23"), *turns)
    first_tokens = counts(first)[0]
    tokens, warm = counts(second)
    if served.is_tidy:
        # The reply comes behind the line that has moved on, so it is prefilled once more.
        assert first_tokens - 40 <= warm <= first_tokens
        assert counts(third) == (tokens, tokens - 1)
    else:
        assert warm < tokens / 4


def test_a_request_that_no_rule_applies_to_is_told_nothing(served: Ruled) -> None:
    answer = served.chat(
        {"role": "system", "content": TEXT},
        {"role": "user", "content": "It is 10:22 now, and what of it?"},
    )
    assert answer.status == 200
    assert "x-keepwarm-hygiene" not in answer.headers
