"""Several models with room for one: each is warm when its turn comes, and nobody is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from served import Answer, Serve, Served
from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2, write_tiny_qwen3

pytestmark = pytest.mark.live

NAMES = ("p", "h", "w")
LONG = " ".join(
    f"Note {i}: disk {i} of the shelf was looked at and is as it was." for i in range(90)
)
NEXT = {"role": "user", "content": "And which of them is the next?"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind of memory: plain, hybrid, windowed."""
    place = tmp_path_factory.mktemp("models")
    made = {name: place / f"{name}.gguf" for name in NAMES}
    write_tiny_qwen3(made["p"], small_model())
    write_tiny_lfm2(made["h"], small_model())
    write_tiny_gemma3(made["w"], small_model())
    return made


@pytest.fixture
def several(serve: Serve, files: dict[str, Path]) -> Callable[..., Served]:
    """Serves models by name: `several("p", "h", max_models=2)`."""

    def start(*names: str, **engine: Any) -> Served:
        tables = {f"models.{n}": {"model": str(files[n])} for n in names}
        return serve(slots=2, context=8192, **engine, **tables)

    return start


def states(served: Served) -> dict[str, str]:
    return {one["name"]: one["state"] for one in served.get("/keepwarm/models")["models"]}


def model(served: Served, name: str) -> dict[str, Any]:
    told = served.get("/keepwarm/models")["models"]
    return next(one for one in told if one["name"] == name)


def talk(served: Served, name: str, *more: dict[str, Any]) -> Answer:
    """A long question to a model, and what was said behind it."""
    answer = served.chat({"role": "user", "content": f"{name}. {LONG}"}, *more, model=name)
    assert answer.status == 200, answer.body
    return answer


def later(work: Callable[[], Answer]) -> Callable[[], Answer]:
    """Begin it now; what is returned waits for its answer."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()

    def joined() -> Answer:
        thread.join(60)
        return answers[0]

    return joined


def test_a_conversation_goes_on_behind_a_swap_as_if_there_had_been_none(
    several: Callable[..., Served],
) -> None:
    said: dict[int, dict[str, str]] = {}
    prefilled = {}
    for room in (3, 1):
        served = several(*NAMES, max_models=room)
        first = {name: talk(served, name) for name in NAMES}
        said[room] = {}
        for name in NAMES:
            reply = {"role": "assistant", "content": first[name].text}
            second = talk(served, name, reply, NEXT)
            said[room][name] = f"{first[name].text}|{second.text}"
            if room == 1:
                assert "load;dur=" in second.headers["server-timing"]
                assert second.plan == "snapshot"
                prefilled[name] = second.prefilled
        loads = {name: model(served, name)["loads"] for name in NAMES}
        assert set(loads.values()) == ({1} if room == 3 else {2})
        assert {w["how"] for w in served.get("/keepwarm/status")["warmed"]} == (
            {"prefilled"} if room == 3 else {"restored"}
        )
        if room == 3:
            served.stop()
            # The other begins with nothing, or it would have the first turns, too.
            for left in (served.root / "store").iterdir():
                left.rename(served.root / left.name)
    assert said[1] == said[3]
    # The reply's end, the new message, and the beginning of the next reply.
    assert max(prefilled.values()) <= 24, prefilled


def test_a_model_that_cant_be_loaded_leaves_the_others_as_they_are(
    several: Callable[..., Served], files: dict[str, Path], tmp_path: Path
) -> None:
    name, broken = "broken", tmp_path / "broken.gguf"
    whole = files["h"].read_bytes()
    broken.write_bytes(whole[: len(whole) - 400_000])
    files["broken"] = broken
    served = several("p", "h", name)
    assert talk(served, "p").status == 200
    refused = served.ask("Hello?", model=name)
    assert refused.status == 503
    assert name in refused.body["error"]["message"]
    again = served.ask("Hello?", model=name)
    assert again.status == 503, "behind a failure it isn't tried at each request"
    assert model(served, name)["failure"]
    second = talk(served, "p", {"role": "assistant", "content": "One."}, NEXT)
    assert second.cached > 1500, "what had gone for it is back"
    broken.write_bytes(whole)
    served.until(lambda: served.ask("Hello?", model=name).status == 200, seconds=40)
    assert model(served, name)["failure"] is None


def test_an_engine_that_is_killed_while_it_loads_is_started_again(
    several: Callable[..., Served],
) -> None:
    served = several("p", "h")
    talk(served, "p")
    first = served.engine_pid
    waiting = later(lambda: talk(served, "h"))

    def loading() -> int | None:
        pid = served.get("/keepwarm/status")["engine_pid"]
        return pid if states(served)["h"] == "loading" and pid not in (None, first) else None

    served.until(loading)
    os.kill(served.get("/keepwarm/status")["engine_pid"], signal.SIGKILL)
    assert waiting().status == 200
    assert talk(served, "p", {"role": "assistant", "content": "One."}, NEXT).cached > 1500


def test_who_waits_hears_pings_and_who_hangs_up_has_nothing_loaded(
    several: Callable[..., Served],
) -> None:
    served = several("p", "h", server={"ping_s": 0.2}, swap_wait_s=3.0)
    body = {"messages": [NEXT], "max_tokens": 4000, "ignore_eos": True, "model": "p"}
    busy = served.stream(body)
    next(busy.events())
    gone = served.stream({"messages": [NEXT], "model": "h"})
    assert model(served, "h")["waiting"] == 1
    gone.hang_up()
    served.until(lambda: model(served, "h")["waiting"] == 0)
    served.until(lambda: states(served) == {"p": "loaded", "h": "unloaded"})
    waits = served.stream({"messages": [NEXT], "model": "h", "max_tokens": 4})
    lines = []
    for line in waits.response:
        lines.append(line)
        if line.startswith(b"data:"):
            break
        if len(lines) == 4:
            # It had its turn, or it would take that from the other.
            busy.hang_up()
    assert sum(line.startswith(b":") for line in lines) >= 2, lines
    assert states(served)["h"] == "loaded"


def test_models_are_loaded_unloaded_and_pinned_by_hand_and_go_when_unused(
    several: Callable[..., Served],
) -> None:
    served = several("p", "h", idle_unload_s=1.5)
    run = lambda *words: Served.command(  # noqa: E731 - three words each
        "models", *words, "--url", served.base, root=served.root
    )
    assert run("load", "h").returncode == 0
    assert states(served) == {"p": "unloaded", "h": "loaded"}
    assert model(served, "h")["bytes"] > 10_000_000
    assert run("pin", "h").returncode == 0
    refused = served.ask("Hello?", model="p")
    assert refused.status == 409
    assert run("unpin", "h").returncode == 0
    served.until(lambda: states(served)["h"] == "unloaded", seconds=10)
    assert served.get("/health")["status"] == "ok"
    assert served.get("/slots") == [], "who looks loads nothing"
    assert states(served)["h"] == "unloaded"
    listed = run("ls")
    assert "unloaded" in listed.stdout
    assert {m["id"] for m in served.get("/v1/models")["data"]} >= {"p", "h:minimal", "standard"}
    assert served.ask("Hello?", model="h:minimal").headers["x-keepwarm-tier"].startswith("minimal")
    assert run("unload", "nobody").returncode == 1


def upload(served: Served, tasks: list[dict[str, Any]]) -> str:
    raw = "\n".join(json.dumps(task) for task in tasks)
    form = (
        '--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        '--x\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'
        f"{raw}\r\n--x--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{served.base}/v1/files", form.encode(), headers=headers)
    with urllib.request.urlopen(request, timeout=30) as reply:
        file_id = json.load(reply)["id"]
    made = served.post(
        "/v1/batches",
        {
            "input_file_id": file_id,
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        },
    )
    return str(made.body["id"])


def test_a_batch_over_two_models_loads_each_once_and_gives_way_to_people(
    several: Callable[..., Served],
) -> None:
    served = several("p", "h", batch={"gap_s": 0.0})
    tasks = [
        {
            "custom_id": f"t{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "ph"[i % 2],
                "messages": [{"role": "user", "content": f"What is {i}?"}],
                "max_tokens": 8,
            },
        }
        for i in range(24)
    ]
    batch = upload(served, tasks)

    def counts() -> dict[str, int]:
        found: dict[str, int] = served.get(f"/v1/batches/{batch}")["request_counts"]
        return found

    served.until(lambda: counts()["completed"] == 24, seconds=60)
    assert counts() == {"total": 24, "completed": 24, "failed": 0}
    assert {name: model(served, name)["loads"] for name in "ph"} == {"p": 1, "h": 1}
    # The next one begins on the model that is loaded, and a person wants the other in the middle.
    batch = upload(served, [{**task, "body": {**task["body"], "max_tokens": 60}} for task in tasks])
    served.until(lambda: counts()["completed"] >= 2, seconds=60)
    assert talk(served, "p").status == 200
    served.until(lambda: served.get(f"/v1/batches/{batch}")["status"] == "completed", seconds=60)
    assert counts() == {"total": 24, "completed": 24, "failed": 0}
