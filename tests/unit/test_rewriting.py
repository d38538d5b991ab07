"""What a client makes of a reply in its history: learned from what comes back, and applied."""

from __future__ import annotations

from typing import Any

import pytest

from keepwarm.core.reply import read_reply
from keepwarm.core.rewriting import Rewriting, Rewritings
from simulation import request_of

RULES = {"role": "system", "content": "Follow the rules of the house. " * 20}
USER = {"role": "user", "content": "What now?"}
ARGUMENTS = '{"b":"caf\u00e9","a":[1,2]}'


def said(text: str = "Noon.", arguments: str = "", **more: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    calls = {"tool_calls": [call]} if arguments else {}
    return {"role": "assistant", "content": text, **calls, **more}


def job(*messages: dict[str, Any], namespace: str = "a") -> Any:
    body = {"messages": list(messages)}
    made = request_of(1, body, namespace=namespace, shared_segments=0, now_s=0.0).job
    made.chat = body
    return made


@pytest.mark.parametrize(
    ("reply", "returned"),
    [
        (said(reasoning_content="A clock."), said()),
        (said("\n\nNoon. "), said("Noon.")),
        (said("\n\nNoon. "), said("Noon.", content=[{"type": "text", "text": "Noon."}])),
        (said(arguments=ARGUMENTS), said(arguments='{"b": "caf\\u00e9", "a": [1, 2]}')),
        (said(arguments=ARGUMENTS), said(arguments='{"b": "caf\u00e9", "a": [1, 2]}')),
        (said(arguments='{"a": 1}'), said(arguments='{"a":1}')),
    ],
)
def test_what_came_back_otherwise_is_expected_to_do_so_again(
    reply: dict[str, Any], returned: dict[str, Any]
) -> None:
    way = Rewriting().learned(reply, returned)
    expected = way.applied(reply)
    if isinstance(returned["content"], list):
        returned = {**returned, "content": "Noon."}
    assert expected == returned
    assert way.learned(reply, reply) == Rewriting(), "the last one decides"


def test_a_reply_that_could_show_nothing_changes_nothing() -> None:
    way = Rewriting(drops_reasoning=True, trims=True)
    assert way.learned(said(), said()) == way
    assert way.learned(said(" Noon."), said("Something else")) == way
    broken = said(arguments="{not json")
    assert Rewriting().learned(broken, said(arguments="{}")) == Rewriting()
    assert Rewriting().learned(said(arguments="{}"), {"role": "assistant"}) == Rewriting()


def test_each_client_has_its_own_way() -> None:
    ways = Rewritings()
    reply = said(reasoning_content="A clock.")
    ways.answered(job(RULES, USER), reply)
    later = job(RULES, USER, said(), USER)
    assert ways.way(later) == Rewriting()
    ways.answered(later, reply)
    assert ways.way(later).drops_reasoning
    assert ways.way(job(RULES, {"role": "user", "content": "Other"})).drops_reasoning
    assert not ways.way(job(RULES, USER, namespace="b")).drops_reasoning
    assert not ways.way(job({**RULES, "content": "Others. " * 50}, USER)).drops_reasoning


def test_a_key_is_forgotten_with_what_it_was_told() -> None:
    ways = Rewritings()
    reply = said(reasoning_content="A clock.")
    later = job(RULES, USER, said(), USER)
    for namespace in ("a", "b"):
        ways.answered(job(RULES, USER, namespace=namespace), reply)
    ways.forget("a")
    ways.answered(later, None)
    assert ways.way(later) == Rewriting(), "the reply is forgotten"
    others = job(RULES, USER, said(), USER, namespace="b")
    ways.answered(others, None)
    assert ways.way(others).drops_reasoning
    ways.forget("b")
    assert ways.way(others) == Rewriting()


def test_an_edited_history_teaches_nothing() -> None:
    ways = Rewritings()
    ways.answered(job(RULES, USER), said(reasoning_content="A clock."))
    edited = job(RULES, {"role": "user", "content": "What then?"}, said(), USER)
    ways.answered(edited, None)
    assert ways.way(edited) == Rewriting()
    asked_again = job(RULES, USER, USER)
    ways.answered(asked_again, None)
    assert ways.way(asked_again) == Rewriting(), "it was left out"


def test_a_reply_of_the_responses_api_is_read_as_chats() -> None:
    raw = b"""{"object":"response","status":"completed","output":[
        {"type":"reasoning","content":[{"type":"reasoning_text","text":"A clock."}]},
        {"type":"message","content":[{"type":"output_text","text":"I look."}]},
        {"type":"function_call","call_id":"c1","name":"look","arguments":"{}"}]}"""
    reply = read_reply(raw, streamed=False)
    assert reply.message == said("I look.", "{}", reasoning_content="A clock.")
    assert reply.finish_reason == "tool_calls"
    ended = read_reply(b'{"object":"response","status":"completed","output":[]}', streamed=False)
    assert (ended.finish_reason, ended.message) == ("stop", None)
    event = b'data: {"type":"response.completed","response":{"object":"response",'
    event += b'"status":"incomplete","output":[]}}'
    assert read_reply(event, streamed=True).finish_reason == "length"
