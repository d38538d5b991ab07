"""The same request to Keepwarm and to the bare engine: what each does with all that clients send.

Where the two differ on purpose, docs/door.md says so in tables, which are read here: a row that
doesn't hold, and a difference without a row, fail.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bareengine import end_engine, start_engine
from served import Served

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "configs" / "chat-templates" / "chatml-tools.jinja"
SAYS = "The code is 7461."
# Of those words; what a block comes to less than that isn't sent.
SAYS_TOKENS = 8
QUESTION = "What is the code?"
USER = {"role": "user", "content": QUESTION}
LIMITS = {"temperature": 0, "max_tokens": 6}
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
    "RU5ErkJggg=="
)
CODED = base64.b64encode(SAYS.encode()).decode()


@dataclass(frozen=True)
class Said:
    """One answer: its status, the prompt's tokens, its words, the names of its fields."""

    status: int
    tokens: int
    text: str
    fields: frozenset[str]


@dataclass(frozen=True)
class Pair:
    """Keepwarm and the bare engine, over the same model and template."""

    keepwarm: str
    bare: str

    def ask(self, path: str, body: dict[str, Any]) -> tuple[Said, Said]:
        """The bare engine's answer, and Keepwarm's."""
        return ask(self.bare, path, body), ask(self.keepwarm, path, body)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, small_tiers: Path, quick_model: Path
) -> Iterator[Pair]:
    root, model = tmp_path_factory.mktemp("beside"), quick_model
    (root / "slots").mkdir()
    bare = start_engine(
        model,
        root / "slots",
        {"n_ctx": 8192, "n_parallel": 2, "chat_template": TEMPLATE.read_text()},
    )
    engine = {"model": str(model), "slots": 2, "context": 8192, "chat_template": str(TEMPLATE)}
    served = Served(root / "keepwarm", engine=engine, tiers={"dir": str(small_tiers)})
    try:
        yield Pair(served.wait_ready().base, bare.base)
    finally:
        end_engine(bare)
        served.stop()


def call(base: str, path: str, body: Any) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read())
    finally:
        connection.close()


def ask(base: str, path: str, body: dict[str, Any]) -> Said:
    status, said = call(base, path, body)
    usage = said.get("usage") or {} if isinstance(said, dict) else {}
    tokens = usage.get("prompt_tokens", usage.get("input_tokens", 0))
    tokens += usage.get("cache_read_input_tokens", 0)
    return Said(status, tokens, words(said), frozenset(fields(said)))


def words(said: Any) -> str:
    """All texts of an answer, whichever its API."""
    if isinstance(said, dict):
        own = [said[k] for k in ("text", "content", "arguments") if isinstance(said.get(k), str)]
        return "".join(own + [words(v) for v in said.values() if not isinstance(v, str)])
    return "".join(map(words, said)) if isinstance(said, list) else ""


def fields(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{path}.{key}"
            yield from fields(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from fields(inner, f"{path}[]")


def table(name: str) -> list[list[str]]:
    """A table of docs/door.md: the cells of each row."""
    text = (ROOT / "docs" / "door.md").read_text()
    found = re.search(f"<!-- {name} -->\n(.*?)<!-- end of {name} -->", text, re.DOTALL)
    assert found, f"docs/door.md has no table of {name}"
    lines = found[1].strip().split("\n")[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def listed(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# What becomes of a block, by the tokens that it adds to the prompt.
def verdict(said: Said, without: Said) -> str:
    if said.status != 200:
        return str(said.status)
    return "sent" if said.tokens - without.tokens >= SAYS_TOKENS else "dropped"


BLOCKS: dict[str, Any] = {
    "text": {"type": "text", "text": SAYS, "cache_control": {"type": "ephemeral"}},
    "text: null": {"type": "text", "text": None},
    "a string": SAYS,
    "image: base64": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": PNG},
    },
    "image: url": {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/a.png"}},
    "image: file": {"type": "image", "source": {"type": "file", "file_id": "f"}},
    "document: text": {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": SAYS},
    },
    "document: base64 text": {
        "type": "document",
        "source": {"type": "base64", "media_type": "text/plain", "data": CODED},
    },
    "document: content": {
        "type": "document",
        "source": {"type": "content", "content": [{"type": "text", "text": SAYS}]},
    },
    "document: PDF": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"},
    },
    "document: file": {"type": "document", "source": {"type": "file", "file_id": "f"}},
    "search_result": {
        "type": "search_result",
        "source": "https://a.example",
        "title": "A",
        "content": [{"type": "text", "text": SAYS}],
    },
    "thinking": {"type": "thinking", "thinking": SAYS, "signature": "x"},
    "redacted_thinking": {"type": "redacted_thinking", "data": SAYS},
    "tool_use": {"type": "tool_use", "id": "t9", "name": "look", "input": {"path": SAYS}},
    "tool_result": {"type": "tool_result", "tool_use_id": "t1", "content": SAYS},
    "server_tool_use": {
        "type": "server_tool_use",
        "id": "s1",
        "name": "web_search",
        "input": {"query": SAYS},
    },
    "web_search_tool_result": {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [{"type": "web_search_result", "title": SAYS, "encrypted_content": "x"}],
    },
    "code_execution_tool_result": {
        "type": "code_execution_tool_result",
        "tool_use_id": "s1",
        "content": {"type": "code_execution_result", "stdout": SAYS, "return_code": 0},
    },
    "mcp_tool_use": {"type": "mcp_tool_use", "id": "m1", "name": "look", "input": {"q": SAYS}},
    "mcp_tool_result": {
        "type": "mcp_tool_result",
        "tool_use_id": "m1",
        "content": [{"type": "text", "text": SAYS}],
    },
    "tool_reference": {"type": "tool_reference", "tool_name": SAYS},
    "container_upload": {"type": "container_upload", "file_id": "f"},
    "any other": {"type": "hologram", "words": SAYS},
}
PLACES = ("system", "question", "answer", "result", "document")


def messages_body(place: str, block: Any, *, is_first: bool = True) -> dict[str, Any]:
    """A messages request with a block in a place, at the beginning of it or at the end."""

    def beside(text: str) -> list[Any]:
        own = {"type": "text", "text": text}
        return [block, own] if is_first else [own, block]

    turns: list[dict[str, Any]] = [USER]
    if place == "question":
        turns = [{"role": "user", "content": beside(QUESTION)}]
    elif place == "answer":
        turns = [USER, {"role": "assistant", "content": beside("Well.")}, USER]
    elif place == "result":
        call = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
        told = {"type": "tool_result", "tool_use_id": "t1", "content": beside("Here.")}
        turns = [
            USER,
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [told]},
        ]
    elif place == "document":
        source = {"type": "content", "content": beside("Look.")}
        document = {"type": "document", "source": source}
        turns = [{"role": "user", "content": [document, {"type": "text", "text": QUESTION}]}]
    system = {"system": beside("Be brief.")} if place == "system" else {}
    return {"model": "m", "messages": turns, **system, **LIMITS}


@pytest.mark.parametrize("place", PLACES)
def test_a_block_of_a_message_is_served_as_the_docs_say(pair: Pair, place: str) -> None:
    told: dict[str, tuple[str, str]] = {}
    for names, places, bare, keepwarm in table("blocks"):
        if place in listed(places):
            told |= dict.fromkeys(listed(names), (bare, keepwarm))
    seen: dict[str, tuple[str, str]] = {}
    empty = {"type": "text", "text": ""}
    for is_first in (True, False):
        nothing = pair.ask("/v1/messages", messages_body(place, empty, is_first=is_first))
        for name, block in BLOCKS.items():
            said = pair.ask("/v1/messages", messages_body(place, block, is_first=is_first))
            found = (verdict(said[0], nothing[0]), verdict(said[1], nothing[1]))
            assert seen.setdefault(name, found) == found, (name, "first and last differ")
            # A result stands before what else the user says, whichever came first.
            if said[0].tokens == said[1].tokens and said[0].status == 200 and name != "tool_result":
                assert said[0].text == said[1].text, name
                assert said[0].fields <= said[1].fields, name
    assert seen == told


ITEMS: dict[str, Any] = {
    "message": {"type": "message", "role": "user", "content": SAYS},
    "message: assistant": {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": SAYS}],
    },
    "message: assistant, untyped": {"role": "assistant", "content": SAYS},
    "message: text": {"role": "user", "content": [{"type": "text", "text": SAYS}]},
    "message: null": {"role": "user", "content": None},
    "message: refusal": {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "refusal", "refusal": SAYS}],
    },
    "message: input_image": {
        "role": "user",
        "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}],
    },
    "message: input_file": {
        "role": "user",
        "content": [{"type": "input_file", "file_data": f"data:text/plain;base64,{CODED}"}],
    },
    "message: input_audio": {
        "role": "user",
        "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
    },
    "message: role tool": {"role": "tool", "content": SAYS},
    "function_call": {
        "type": "function_call",
        "call_id": "1",
        "name": "look",
        "arguments": json.dumps({"path": SAYS}),
    },
    "function_call: broken": {
        "type": "function_call",
        "call_id": "1",
        "name": "look",
        "arguments": json.dumps({"path": SAYS})[:-2],
    },
    "function_call_output": {"type": "function_call_output", "call_id": "1", "output": SAYS},
    "reasoning": {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": SAYS}],
    },
    "reasoning: summary": {
        "type": "reasoning",
        "summary": [{"type": "summary_text", "text": SAYS}],
    },
    "reasoning: encrypted": {"type": "reasoning", "summary": [], "encrypted_content": "x"},
    "custom_tool_call": {
        "type": "custom_tool_call",
        "call_id": "1",
        "name": "patch",
        "input": SAYS,
    },
    "custom_tool_call_output": {"type": "custom_tool_call_output", "call_id": "1", "output": SAYS},
    "local_shell_call": {
        "type": "local_shell_call",
        "call_id": "1",
        "action": {"type": "exec", "command": [SAYS]},
    },
    "web_search_call": {"type": "web_search_call", "id": "w", "status": "completed"},
    "compaction": {"type": "compaction", "encrypted_content": "x"},
    "additional_tools": {
        "type": "additional_tools",
        "tools": [{"type": "function", "name": "more", "description": SAYS, "parameters": {}}],
    },
    "item_reference": {"type": "item_reference", "id": "r"},
    "any other": {"type": "hologram", "text": SAYS},
}
TOOLS: dict[str, Any] = {
    "function": {"type": "function", "name": "look", "description": SAYS, "parameters": {}},
    "custom": {"type": "custom", "name": "patch", "description": SAYS},
    "namespace": {"type": "namespace", "name": "fs", "description": SAYS, "tools": []},
    "web_search": {"type": "web_search"},
    "local_shell": {"type": "local_shell"},
    "null": None,
}


def test_an_item_of_responses_is_served_as_the_docs_say(pair: Pair) -> None:
    told: dict[str, tuple[str, str]] = {}
    for names, bare, keepwarm in table("items"):
        told |= dict.fromkeys(listed(names), (bare, keepwarm))

    def asked(items: list[Any]) -> tuple[Said, Said]:
        body = {"model": "m", "input": items, "temperature": 0, "max_output_tokens": 6}
        return pair.ask("/v1/responses", body)

    nothing = asked([USER, USER])
    seen: dict[str, tuple[str, str]] = {}
    for name, item in ITEMS.items():
        said = asked([USER, item, USER])
        seen[name] = (verdict(said[0], nothing[0]), verdict(said[1], nothing[1]))
        if seen[name] == ("sent", "sent"):
            assert said[0] == said[1], name
    assert seen == told


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_of_responses_costs_what_it_costs_on_the_engine(pair: Pair, name: str) -> None:
    body = {"model": "m", "input": QUESTION, "tools": [TOOLS[name]], "max_output_tokens": 2}
    bare, keepwarm = pair.ask("/v1/responses", body)
    assert (bare.status, bare.tokens) == (keepwarm.status, keepwarm.tokens) != (200, 0)


PARTS: dict[str, Any] = {
    "text": {"type": "text", "text": SAYS},
    "text: null": {"type": "text", "text": None},
    "without a type": {"text": SAYS},
    "a string": SAYS,
    "null": None,
    "input_text": {"type": "input_text", "text": SAYS},
    "refusal": {"type": "refusal", "refusal": SAYS},
    "image_url": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
    "image of a file": {"type": "image_url", "image_url": {"url": "file:///etc/hostname"}},
    "input_audio": {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    "video_url": {"type": "video_url", "video_url": {"url": "http://127.0.0.1:1/a"}},
    "file": {"type": "file", "file": {"filename": "a", "file_data": "AAAA"}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
CHAT_PLACES: dict[str, Any] = {
    "system": lambda part: [{"role": "system", "content": [part]}, USER],
    "user": lambda part: [{"role": "user", "content": [part]}],
    "assistant": lambda part: [USER, {"role": "assistant", "content": [part]}, USER],
    "tool": lambda part: [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": [part]},
    ],
}


@pytest.mark.parametrize("place", CHAT_PLACES)
def test_a_part_of_a_chat_is_what_it_is_on_the_engine(pair: Pair, place: str) -> None:
    for name, part in PARTS.items():
        body = {"messages": CHAT_PLACES[place](part), **LIMITS}
        bare, keepwarm = pair.ask("/v1/chat/completions", body)
        if bare.status == 200:
            assert bare == keepwarm, name
        else:  # sent again it is as wrong, so never a 500
            assert keepwarm.status == 400, (name, bare.status)


CHATS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a beginning": {"messages": [USER, {"role": "assistant", "content": "The code is"}]},
    "a beginning in parts": {
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "text", "text": "The code is"}]},
        ]
    },
    "an empty beginning": {"messages": [USER, {"role": "assistant", "content": ""}]},
    "a call at the end": {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    "a role of nobody": {"messages": [{"role": "critic", "content": SAYS}, USER]},
    "no messages": {"messages": []},
    "nothing said": {"messages": [{"role": "user"}]},
    "a name": {"messages": [{**USER, "name": "Bob"}]},
    "stop": {"stop": ["Python"]},
    "limits": {"max_tokens": 3, "n_predict": 6},
    "no limit but one": {"max_tokens": None, "max_completion_tokens": 4},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "grammar": {"grammar": 'root ::= "yes"'},
    "schema": {"response_format": {"type": "json_object"}},
    "format of nobody": {"response_format": {"type": "xx"}},
    "a slot": {"id_slot": 1},
    "a slot that isn't": {"id_slot": 99},
    "a slot in words": {"id_slot": "0"},
    "nothing reused": {"cache_prompt": False},
    "reuse in words": {"cache_prompt": "x"},
    "several": {"n": 2},
    "too many": {"n": 9},
    "less than one": {"n": -1},
    "a number for a model": {"model": 7},
    "a temperature in words": {"temperature": "x"},
    "an adapter that isn't": {"lora": "x"},
    "tokens": {"return_tokens": True},
    "counts": {"timings_per_token": True},
    "more": {"verbose": True},
    "a choice of nobody": {
        "tools": [{"type": "function", "function": {"name": "a"}}],
        "tool_choice": "x",
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_what_it_is_on_the_engine(pair: Pair, name: str) -> None:
    bare, keepwarm = pair.ask("/v1/chat/completions", {"messages": [USER], **LIMITS, **CHATS[name]})
    assert bare.status == keepwarm.status
    if name == "more":  # it tells of the slot that was taken, among others
        assert (bare.tokens, bare.text) == (keepwarm.tokens, keepwarm.text)
        return
    assert bare == keepwarm


RAW: dict[str, dict[str, Any]] = {
    "text": {"prompt": "The code is"},
    "tokens": {"prompt": [1, 2, 3]},
    "both": {"prompt": [1, "The code", 2]},
    "several": {"prompt": ["The code", "A word"]},
    "an object": {"prompt": {"prompt_string": "The code is"}},
    "media": {"prompt": {"prompt_string": "a", "multimodal_data": ["AAAA"]}},
    "nothing": {"prompt": None},
    "a number": {"prompt": 7},
    "tokens that aren't": {"prompt": [99999999]},
    "negative": {"prompt": [-1]},
    "a gap": {"prompt": "", "input_prefix": "def a(", "input_suffix": "return 1"},
    "no gap": {"prompt": "x", "input_prefix": 7},
    "a slot that isn't": {"prompt": "The code is", "id_slot": 99},
    "logprobs": {"prompt": "The code is", "n_probs": 2},
    "a grammar": {"prompt": "The code is", "grammar": 'root ::= "yes"'},
}


@pytest.mark.parametrize("path", ["/completion", "/v1/completions", "/infill"])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_prompt_is_what_it_is_on_the_engine(pair: Pair, path: str, name: str) -> None:
    bare, keepwarm = pair.ask(path, {**RAW[name], **LIMITS, "n_predict": 6})
    assert (bare.status, bare.fields) == (keepwarm.status, keepwarm.fields)
    if bare.status == 200:
        assert (bare.tokens, bare.text) == (keepwarm.tokens, keepwarm.text)


def test_a_message_says_which_of_its_sequences_ended_it(pair: Pair) -> None:
    body = {"model": "m", "messages": [USER], "temperature": 0, "max_tokens": 12}
    whole = call(pair.keepwarm, "/v1/messages", body)[1]["content"][0]["text"]
    word = whole[len(whole) // 2 :][:2]
    stopped = {**body, "stop_sequences": ["never said", word]}
    said = [call(base, "/v1/messages", stopped)[1] for base in (pair.bare, pair.keepwarm)]
    assert said[0]["stop_sequence"] == said[1]["stop_sequence"] == word
    assert said[1]["stop_reason"] == "stop_sequence"
    assert said[0]["content"] == said[1]["content"]
    assert call(pair.keepwarm, "/v1/messages", body)[1]["stop_sequence"] is None


READS: list[tuple[str, Any]] = [
    ("/tokenize", {"content": SAYS, "add_special": True, "with_pieces": True}),
    ("/tokenize", {"content": 7}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [1, 2]}),
    ("/detokenize", {"tokens": [99999999]}),
    ("/detokenize", {"tokens": "x"}),
    ("/apply-template", {"messages": [USER]}),
    ("/apply-template", {}),
    ("/v1/chat/completions/input_tokens", {"messages": [USER]}),
    ("/v1/responses/input_tokens", {"input": QUESTION}),
    ("/v1/messages/count_tokens", {"messages": [USER], "tools": [{"name": "look"}]}),
    ("/embeddings", {"input": SAYS}),
    ("/v1/embeddings", {"input": SAYS}),
    ("/rerank", {"query": SAYS, "documents": [SAYS]}),
    ("/v1/audio/transcriptions", {}),
]


@pytest.mark.parametrize(("path", "body"), READS)
def test_what_takes_no_slot_is_what_it_is_on_the_engine(pair: Pair, path: str, body: Any) -> None:
    bare, keepwarm = call(pair.bare, path, body), call(pair.keepwarm, path, body)
    if bare[0] == 200:
        assert bare == keepwarm
    else:
        assert keepwarm[0] == (400 if bare[0] == 500 else bare[0])
        assert keepwarm[1]["error"]["message"]


def stream_of(base: str, path: str, body: dict[str, Any]) -> list[Any]:
    """The kinds of a stream's events and the names of their fields, each row of equals once."""
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=60)
    try:
        raw = json.dumps({**body, "stream": True, "temperature": 0})
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        lines = connection.getresponse().read().decode().split("\n")
    finally:
        connection.close()
    out: list[Any] = []
    kind = ""
    for line in lines:
        if line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            data = line[5:].strip()
            event = (kind, data if data == "[DONE]" else tuple(sorted(json.loads(data))))
            out += [event] if out[-1:] != [event] else []
            kind = ""
    return out


TOOL = {"name": "look", "input_schema": {"type": "object", "properties": {}}}
BEGUN = [USER, {"role": "assistant", "content": "The code"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"model": "m", "max_tokens": 6, "messages": [USER]}),
        ("/v1/messages", {"model": "m", "max_tokens": 6, "messages": BEGUN}),
        (
            "/v1/messages",
            {"model": "m", "max_tokens": 9, "messages": [USER], "stop_sequences": ["Python"]},
        ),
        ("/v1/messages", {"model": "m", "max_tokens": 6, "messages": [USER], "tools": [TOOL]}),
        ("/v1/chat/completions", {"max_tokens": 6, "messages": [USER]}),
        ("/v1/chat/completions", {"max_tokens": 6, "messages": BEGUN}),
        ("/v1/chat/completions", {"max_tokens": 6, "messages": [USER], "return_progress": True}),
        (
            "/v1/chat/completions",
            {"max_tokens": 6, "messages": [USER], "stream_options": {"include_usage": True}},
        ),
        ("/v1/responses", {"max_output_tokens": 6, "input": QUESTION}),
        ("/completion", {"prompt": QUESTION, "n_predict": 6, "return_progress": True}),
        ("/v1/completions", {"prompt": QUESTION, "max_tokens": 6}),
    ],
)
def test_a_stream_has_the_engines_events(pair: Pair, path: str, body: dict[str, Any]) -> None:
    assert stream_of(pair.bare, path, body) == stream_of(pair.keepwarm, path, body)
