"""Conversations with pictures: warm up to the first one, also in another life."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bareengine import StartEngine
from keepwarm.core.memory import MemoryKind
from keepwarm.slotfile import RowsPart, assemble, parse
from served import Answer, Serve, Served
from tinymodels import (
    small_model,
    write_tiny_gemma3,
    write_tiny_lfm2,
    write_tiny_qwen3,
    write_tiny_qwen3vl,
)
from tinyprojector import PICTURE_TOKENS, picture, png_base64, write_tiny_projector

pytestmark = pytest.mark.live

WRITERS: dict[str, Callable[..., None]] = {
    "plain": write_tiny_qwen3,
    "mrope": write_tiny_qwen3vl,
    "window": write_tiny_gemma3,
    "hybrid": write_tiny_lfm2,
}
SLOTS, CONTEXT = 2, 4096
RULES = {"role": "system", "content": "Look at each picture and name what is to be seen. " * 30}
# So long that it is worth a save at any machine's speed.
TALK = [
    RULES,
    {"role": "user", "content": "I'll show you the garden. " * 200},
    {"role": "assistant", "content": "I shall look at it closely. " * 12},
]
ROUNDING = 0.02  # in a logprob; forty times what was seen
BEFORE = "Here it is, as it was this morning: "


def shown(seed: int) -> dict[str, Any]:
    """A question about a picture, with text on both sides of it."""
    parts = [{"type": "text", "text": BEFORE}, picture(seed), {"type": "text", "text": "And?"}]
    return {"role": "user", "content": parts}


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("projector") / "mmproj.gguf"
    write_tiny_projector(path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def model(kind: str) -> Path:
        path = root / f"{kind}.gguf"
        if not path.exists():
            WRITERS[kind](path, small_model())
        return path

    return model


def start(serve: Serve, model: Path, projector: Path) -> Served:
    # Slots of their own: what another one holds can't change the last bits.
    return serve(
        model=str(model),
        mmproj=str(projector),
        slots=SLOTS,
        context=CONTEXT * SLOTS,
        pool="split",
        tiers={"warm": []},
        store={"learned": 0},  # so that slots are empty after a start
    )


def tokens_before_picture(served: Served, *messages: dict[str, Any]) -> int:
    """How many tokens of a prompt come before its first picture."""
    text = served.post("/apply-template", {"messages": list(messages)}).body["prompt"]
    marker = served.get("/props")["media_marker"]
    return len(
        served.post(
            "/tokenize", {"content": text.partition(marker)[0], "parse_special": True}
        ).body["tokens"]
    )


def saved(served: Served) -> None:
    """Wait until what is idle is saved and taken in."""
    served.settled()
    before = -1.0
    while (now := served.metric("keepwarm_store_bytes")) != before or now == 0:
        before = now
        time.sleep(0.4)


def asked(served: Served, *messages: dict[str, Any]) -> Answer:
    answer = served.chat(*messages, logprobs=True, top_logprobs=5)
    assert answer.status == 200, answer.body
    return answer


@pytest.mark.parametrize("kind", ["plain", "mrope"])
def test_the_text_before_a_picture_is_there_after_a_crash(
    serve: Serve, models: Callable[[str], Path], projector: Path, kind: str
) -> None:
    model = models(kind)
    served = start(serve, model, projector)
    first = asked(served, *TALK, shown(1))
    more = [*TALK, shown(1), {"role": "assistant", "content": first.text}]
    more.append({"role": "user", "content": "And behind the tree?"})
    hot = asked(served, *more)
    text = tokens_before_picture(served, *more)
    assert hot.cached > text + PICTURE_TOKENS, "its slot has the picture, too"
    saved(served)
    served.kill()

    served = start(serve, model, projector)
    again = asked(served, *more)
    assert again.plan == "snapshot"
    assert again.cached == text
    # Computed in other portions than in its slot, so the last bits differ.
    ours, theirs = (dict(one.logprobs[0][2]) for one in (again, hot))
    both = ours.keys() & theirs.keys()
    assert len(both) >= 3
    assert all(ours[token] == pytest.approx(theirs[token], abs=ROUNDING) for token in both)
    # Another picture is another prompt, from there on.
    other = asked(served, *TALK, shown(2), *more[len(TALK) + 1 :])
    assert other.cached == text
    assert other.logprobs != again.logprobs
    assert served.metric("keepwarm_misses_total") == 0
    served.stop()


@pytest.mark.parametrize("kind", ["plain", "mrope"])
def test_what_a_file_holds_before_a_picture_says_what_the_slot_in_memory_says(
    models: Callable[[str], Path], projector: Path, bare_engine: StartEngine, kind: str
) -> None:
    bare = bare_engine(models(kind), mmproj__path=str(projector), n_parallel=SLOTS)
    talk = [*TALK, shown(1)]
    marker = json.loads(urllib.request.urlopen(f"{bare.base}/props").read())["media_marker"]
    prompt = bare.post("/apply-template", {"messages": talk})["prompt"]
    ids = bare.tokenize(prompt.partition(marker)[0])
    body = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 5}

    def said(*, slot: int, seed: int = 1) -> tuple[int, Any]:
        asked = {"messages": [*TALK, shown(seed)], "id_slot": slot, **body}
        answer = Answer(200, {}, bare.post("/v1/chat/completions", asked))
        return answer.cached, answer.logprobs

    said(slot=0, seed=2)
    raw = bare.save(0)
    found = parse(raw, kind=MemoryKind.PLAIN, max_tokens=CONTEXT)
    assert found.is_cut
    count = len(found.tokens)
    assert found.tokens[: len(ids)].tolist() == ids
    assert found.held_tokens > count + PICTURE_TOKENS
    part = RowsPart(b"".join(found.rows(0, count)), 0, count, count)
    text = assemble(
        found.layout, tokens=found.tokens, parts=[part], boundary=None, streams=found.streams
    )
    bare.restore(b"".join(text), slot=1)
    assert said(slot=1) == said(slot=0)
    bare.restore(b"".join(text), slot=1)
    assert said(slot=1)[0] == count


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_models_that_cant_be_cut_go_on_from_a_place_before_the_picture(
    serve: Serve, models: Callable[[str], Path], projector: Path, kind: str
) -> None:
    served = start(serve, models(kind), projector)
    rules = asked(served, *TALK[:2])
    talk = [*TALK[:2], {"role": "assistant", "content": rules.text}, shown(1)]
    first = asked(served, *talk)
    talk += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "More?"}]
    assert asked(served, *talk).cached > tokens_before_picture(served, *talk)
    saved(served)
    served.kill()

    served = start(serve, models(kind), projector)
    again = asked(served, *talk)
    assert again.plan == "snapshot"
    assert again.cached > int(rules.headers["x-keepwarm-filled"]), "more than the rules alone"
    assert again.cached <= tokens_before_picture(served, *talk)
    assert served.metric("keepwarm_misses_total") == 0


def test_a_picture_in_a_tools_result_is_served_as_the_engine_serves_it(
    serve: Serve, models: Callable[[str], Path], projector: Path, bare_engine: StartEngine
) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": png_base64(3)}
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "garden"}}
    result = {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [
            {"type": "text", "text": "Taken at noon."},
            {"type": "image", "source": source},
        ],
    }
    body = {
        "model": "any",
        "max_tokens": 8,
        "temperature": 0,
        "system": RULES["content"],
        "messages": [
            {"role": "user", "content": "What is in the garden?"},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ],
    }
    served = start(serve, models("plain"), projector)
    answer = served.post("/v1/messages", body)
    assert answer.status == 200, answer.body
    counted = served.post("/v1/messages/count_tokens", body).body["input_tokens"]
    served.settled()
    again = served.post("/v1/messages", body)
    served.stop()
    bare = bare_engine(models("plain"), mmproj__path=str(projector), n_parallel=SLOTS, n_ctx=8192)
    reply = bare.post("/v1/messages", body)
    assert answer.body["content"] == reply["content"]

    def told(usage: dict[str, int]) -> int:
        return usage["input_tokens"] + usage.get("cache_read_input_tokens", 0)

    assert told(answer.body["usage"]) == told(reply["usage"]) == counted
    assert again.body["usage"]["cache_read_input_tokens"] >= counted - PICTURE_TOKENS
