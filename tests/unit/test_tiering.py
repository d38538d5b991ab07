"""A tier put into a request: what is forwarded, and what of it all tenants share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepwarm.api.reading import Api
from keepwarm.core.prompt import Prompt, prompt_of
from keepwarm.core.tiers import TierSet
from keepwarm.errors import RequestError
from keepwarm.tiers.files import load_tiers
from keepwarm.tiers.tiering import TieredRequest, apply_tier, asked_tier, has_own_system
from smalltiers import write_small_tiers

USER = {"role": "user", "content": "Is the disk there?"}
ASKED: dict[str, Any] = {"messages": [USER]}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.fixture
def tiers(tmp_path: Path) -> TierSet:
    return load_tiers(write_small_tiers(tmp_path / "tiers"), "Keeper")


def put(
    tiers: TierSet, body: dict[str, Any], *, tier: str = "minimal", api: Api = "chat"
) -> TieredRequest:
    found = tiers.get(tier)
    assert found
    return apply_tier(api, body, found, "explicit")


def identity(tiered: TieredRequest, namespace: str) -> Prompt:
    return prompt_of(
        tiered.chat,
        fingerprint="model",
        namespace=namespace,
        shared_segments=tiered.shared_segments,
    )


def test_an_argument_that_renders_nothing_leaves_a_tier_shared(tiers: TierSet) -> None:
    minimal = tiers.get("minimal")
    assert minimal
    body = {"messages": [USER], "response_format": {"type": "json_object"}}
    unrendered = frozenset({"response_format"})
    tiered = apply_tier("chat", body, minimal, "explicit", unrendered=unrendered)
    assert tiered.shared_segments == put(tiers, {"messages": [USER]}).shared_segments > 0
    assert tiered.body["response_format"] == {"type": "json_object"}
    assert tiered.shaping == put(tiers, {"messages": [USER]}).body
    assert not put(tiers, body).shared_segments


def test_a_header_wins_over_the_models_name(tiers: TierSet) -> None:
    assert asked_tier({**ASKED, "model": "minimal"}, "standard", tiers) == "standard"
    assert asked_tier({**ASKED, "model": "minimal"}, None, tiers) == "minimal"
    assert asked_tier({**ASKED, "model": "gpt-5"}, None, tiers) == ""
    assert asked_tier({**ASKED, "model": 7}, None, tiers) == ""
    assert asked_tier({**ASKED, "model": "auto"}, None, tiers) == "auto"
    assert asked_tier({"prompt": "x", "model": "minimal"}, "minimal", tiers) == ""


def test_an_unknown_tier_in_the_header_is_refused_and_the_known_are_named(tiers: TierSet) -> None:
    with pytest.raises(RequestError, match=r"minimal, standard, auto"):
        asked_tier(ASKED, "grand", tiers)


def test_the_tiers_text_comes_first_and_the_clients_messages_after_it(tiers: TierSet) -> None:
    tiered = put(tiers, {"messages": [USER], "model": "minimal", "temperature": 0.1})
    first, *rest = tiered.body["messages"]
    assert first["role"] == "system"
    assert "Keeper" in first["content"]
    assert rest == [USER]
    assert tiered.body["temperature"] == 0.1


def test_the_clients_body_is_left_as_it_was(tiers: TierSet) -> None:
    body = {"messages": [USER], "model": "minimal"}
    put(tiers, body)
    assert body == {"messages": [USER], "model": "minimal"}


@pytest.mark.parametrize("tier", ["minimal", "standard"])
def test_two_tenants_share_a_tier_and_nothing_behind_it(tiers: TierSet, tier: str) -> None:
    tiered = put(tiers, {"messages": [USER]}, tier=tier)
    mine, yours = identity(tiered, "me"), identity(tiered, "you")
    assert mine.static == yours.static
    assert mine.is_static_shared
    end = mine.static_index + 1
    assert mine.marks[:end] == yours.marks[:end]
    behind = {m.digest for m in mine.marks[end:]}
    assert behind
    assert not behind & {m.digest for m in yours.marks}


@pytest.mark.parametrize(
    "own",
    [
        {"tools": [TOOL]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}}}},
        {"json_schema": {"type": "object"}},
        {"chat_template_kwargs": {"secret": "words"}},
        {"reasoning_effort": "high"},
    ],
    ids=lambda own: next(iter(own)),
)
def test_what_a_client_adds_to_the_head_is_its_own(tiers: TierSet, own: dict[str, Any]) -> None:
    tiered = put(tiers, {"messages": [USER], **own})
    mine, yours = identity(tiered, "me"), identity(tiered, "you")
    assert not mine.is_static_shared
    assert not {m.digest for m in mine.marks} & {m.digest for m in yours.marks}


def test_a_clients_own_system_message_stays_its_own(tiers: TierSet) -> None:
    body = {"messages": [{"role": "system", "content": "House rules."}, USER]}
    assert has_own_system(body)
    tiered = put(tiers, body)
    assert any("House rules." in str(m["content"]) for m in tiered.body["messages"])
    mine, yours = identity(tiered, "me"), identity(tiered, "you")
    assert mine.static is not None
    assert yours.static is not None
    assert mine.static.digest != yours.static.digest


def test_a_response_gets_the_same_messages_as_a_chat(tiers: TierSet) -> None:
    chat = put(tiers, {"messages": [USER]}, tier="standard")
    response = put(tiers, {"input": USER["content"]}, tier="standard", api="responses")
    assert identity(chat, "me").marks == identity(response, "me").marks


@pytest.mark.parametrize(
    "messages", [None, 5, "text", [5], [None], [{"role": 3}], [{"role": "user", "content": {}}]]
)
def test_odd_messages_are_the_engines_to_refuse(tiers: TierSet, messages: object) -> None:
    try:
        tiered = put(tiers, {"messages": messages})
    except RequestError:
        return
    identity(tiered, "me")
