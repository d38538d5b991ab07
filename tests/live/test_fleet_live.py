"""A fleet on a real Ray Serve with real engines: routing, moving, and nodes that are killed.

Skipped where the fleet extra isn't installed. One fleet of two nodes serves all tests here; each
puts up with what the ones before it did to the nodes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from browser import Page
from runningfleet import NEEDS_RAY, READY_S, STORY, Answer, RunningFleet, user

pytestmark = NEEDS_RAY


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    running = RunningFleet(tmp_path_factory.mktemp("fleet"))
    running.wait(running.settled, READY_S)
    try:
        yield running
    finally:
        running.stop()


def test_a_conversation_goes_on_at_the_node_that_has_it(fleet: RunningFleet) -> None:
    talks = [[user(f"{number}. {STORY} What hums?")] for number in range(4)]
    with ThreadPoolExecutor(4) as at_once:
        answers = list(at_once.map(fleet.chat, talks))
    nodes = [answer.node for answer in answers]
    assert len(set(nodes)) == 2
    for talk, answer in zip(talks, answers, strict=True):
        talk += [answer.message, user("Where?")]
    fleet.wait(fleet.settled, READY_S)  # a node that seems busy is left for another one
    for talk, node in zip(talks, nodes, strict=True):
        later = fleet.chat(talk)
        assert later.node == node
        assert later.headers["x-keepwarm-plan"] in ("slot", "snapshot")
        assert later.body["timings"]["prompt_n"] < 60


def test_a_pile_of_tasks_is_cut_so_that_a_document_is_filled_on_one_node(
    fleet: RunningFleet, tmp_path: Path
) -> None:
    tasks, results = tmp_path / "tasks.jsonl", tmp_path / "results.jsonl"
    documents = [f"Report {number}. {STORY}" for number in range(4)]
    lines = [
        {
            "custom_id": f"{about}-{part}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "minimal",
                "max_tokens": 4,
                "messages": [user(f"{document} What of part {part}?")],
            },
        }
        for part in range(3)
        for about, document in enumerate(documents)
    ]
    tasks.write_text("".join(json.dumps(one) + "\n" for one in lines))
    before = {name: node["asked"] for name, node in fleet.nodes().items()}
    command = [sys.executable, "-m", "keepwarm", "batch", "run", str(tasks), "-o", str(results)]
    ran = subprocess.run(
        [*command, "--base", fleet.url], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert len(results.read_text().splitlines()) == 12
    report = json.loads((tmp_path / "results.report.json").read_text())
    # Each document once, wherever: not once on each node.
    assert report["prefilled_tokens"] < 4 * 290 + 12 * 40
    fleet.wait(fleet.settled, READY_S)
    asked = {name: node["asked"] - before[name] for name, node in fleet.nodes().items()}
    assert min(asked.values()) >= 6, "both nodes have worked"


def test_a_conversation_whose_node_was_killed_goes_on_from_the_shared_store(
    fleet: RunningFleet,
) -> None:
    talk = [user(f"Once. {STORY} What hums?")]
    first = fleet.chat(talk)
    talk += [first.message, user("Where?")]
    time.sleep(1.0)  # the slot is saved when it was idle for a moment
    fleet.wait(fleet.settled, READY_S)
    pid = fleet.kill(first.node)
    later = fleet.chat(talk)
    assert int(later.headers["x-keepwarm-moved"]) > 150
    assert later.body["timings"]["prompt_n"] < 60
    nodes = fleet.wait_replaced(pid)
    for node in nodes.values():
        assert node["state"] == "ready"
    # The one that took its place is warm from what is kept, without a prefill.
    assert set(nodes[first.node]["warmed"].values()) == {"restored"}


def test_a_node_that_is_killed_under_load_loses_no_request_but_the_streaming_one(
    fleet: RunningFleet,
) -> None:
    answers: list[Any] = []

    def ask(number: int) -> None:
        try:
            answers.append(fleet.chat([user(f"{number}: {STORY} Go on.")], max_tokens=4))
        except OSError as error:
            answers.append(error)

    with fleet.open([user("Count to a thousand.")], max_tokens=600, stream=True) as stream:
        node = stream.headers["X-Keepwarm-Node"]
        assert stream.readline().startswith(b"data: ")
        load = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in load:
            thread.start()
        time.sleep(1.0)
        pid = fleet.kill(node)
        rest = stream.read().decode()
    event = rest.strip().split("\n\n")[-1]
    assert event.startswith("event: error\ndata: ")
    assert json.loads(event.partition("data: ")[2])["error"]["type"] == "node_unavailable"
    for thread in load:
        thread.join()
    assert len(answers) == 4
    assert all(isinstance(answer, Answer) for answer in answers), answers
    fleet.wait_replaced(pid)


def test_a_router_that_lost_all_it_knew_costs_no_request(fleet: RunningFleet) -> None:
    talk = [user(f"Long ago. {STORY} What hums?")]
    first = fleet.chat(talk)
    talk += [first.message, user("Where?")]
    time.sleep(1.0)  # the slot is saved when it was idle for a moment
    fleet.wait(fleet.settled, READY_S)
    pid = fleet.status()["router_pid"]
    os.kill(pid, signal.SIGKILL)
    with ThreadPoolExecutor(4) as at_once:
        asked = [at_once.submit(fleet.chat, [user(f"{n}: Who?")]) for n in range(4)]
        assert all(future.result().message["content"] for future in asked)
    assert fleet.status()["router_pid"] != pid
    # Wherever it goes now, its turns are there or come from the shared store.
    fleet.wait(fleet.settled, READY_S)
    assert fleet.chat(talk).body["timings"]["prompt_n"] < 60


def test_its_page_and_its_metrics_show_the_nodes(fleet: RunningFleet) -> None:
    with urllib.request.urlopen(fleet.url + "/keepwarm/") as page:
        assert page.headers["Content-Type"].startswith("text/html")
        assert "script-src 'sha256-" in page.headers["Content-Security-Policy"]
        assert b"Keepwarm fleet" in page.read()
    for node in fleet.nodes().values():
        assert set(node["tokens"]) == {"slot", "snapshot", "cold"}
    with urllib.request.urlopen(fleet.url + "/metrics") as text:
        metrics = text.read().decode()
    assert 'keepwarm_fleet_prompt_tokens{node="node-0",source="snapshot"}' in metrics


@pytest.mark.browser
def test_its_page_shows_them_in_a_browser(fleet: RunningFleet) -> None:
    page = Page(fleet.url)
    try:
        page.open()
        page.until(lambda: len(page.all("#nodes tr")) == 2, "both nodes are shown")
        assert page.text("#t-ready") == "2 of 2"
        shown = page.text("#nodes")
        assert "node-0" in shown
        # Restored where a node of the file's tests before was replaced, else prefilled.
        hows = {node["warmed"]["tier:minimal"] for node in fleet.nodes().values()}
        assert hows
        assert all(f"minimal {how}" in shown for how in hows)
        asked = page.text("#t-asked")
        fleet.chat([user("And now?")])
        page.until(lambda: page.text("#t-asked") != asked, "a request is counted")
        for width in (360, 1280):
            page.resize(width, 800)
            assert page.run("return document.documentElement.scrollWidth") <= width
        assert page.complaints() == []
        assert page.serious_findings() == []
    finally:
        page.close()


def test_a_file_that_is_wrong_leaves_a_running_fleet_as_it_is(fleet: RunningFleet) -> None:
    pids = fleet.pids()
    fleet.write(fleet="nodes = 0")
    assert "fleet.nodes" in fleet.reload()
    fleet.write(fleet='nodes = 2\nhost = "127.0.0.2"')
    assert "host can't change" in fleet.reload()
    fleet.write()
    assert fleet.pids() == pids


def test_an_update_replaces_all_nodes_and_loses_no_stream(fleet: RunningFleet) -> None:
    before = fleet.pids()
    stopping = threading.Event()
    answers: list[Any] = []

    def ask_on() -> None:
        while not stopping.is_set():
            try:
                answers.append(fleet.chat([user(f"{len(answers)}: What hums?")], max_tokens=2))
            except OSError as error:
                answers.append(error)

    with fleet.open([user("Count on.")], max_tokens=500, ignore_eos=True, stream=True) as stream:
        assert stream.readline().startswith(b"data: ")
        asking = threading.Thread(target=ask_on)
        asking.start()
        fleet.write(node="[node.server]\nqueue_timeout_s = 250")
        said = []
        updating = threading.Thread(target=lambda: said.append(fleet.reload()))
        updating.start()
        rest = stream.read().decode()
    updating.join()
    stopping.set()
    asking.join()
    assert "the fleet is updated" in said[0]
    assert rest.rstrip().endswith("data: [DONE]")
    assert "event: error" not in rest
    assert answers
    assert all(isinstance(answer, Answer) for answer in answers), answers
    fleet.wait(fleet.settled, READY_S)
    assert not fleet.pids() & before
    for node in fleet.nodes().values():
        assert set(node["warmed"].values()) == {"restored"}


def test_nodes_are_added_while_prompts_wait_and_taken_away_again(fleet: RunningFleet) -> None:
    lines = (
        "nodes = 1",
        "max_nodes = 2",
        "target_ongoing = 900",  # so that only the wait can ask for another node
        "target_wait_s = 0.3",
        "scale_up_s = 0.5",
        "scale_down_s = 0.5",
    )
    fleet.write(fleet="\n".join(lines))
    assert "the fleet is updated" in fleet.reload()
    fleet.wait(lambda: len(fleet.nodes()) == 1, READY_S)
    stopping = threading.Event()

    def ask_on(lane: int) -> None:
        number = 0
        while not stopping.is_set():
            fleet.chat([user(f"{lane}, {number}: {STORY}")], max_tokens=1)
            number += 1

    lanes = [threading.Thread(target=ask_on, args=(lane,)) for lane in range(6)]
    for thread in lanes:
        thread.start()
    try:
        fleet.wait(lambda: len(fleet.nodes()) == 2, READY_S)
    finally:
        stopping.set()
        for thread in lanes:
            thread.join()
    fleet.wait(lambda: len(fleet.nodes()) == 1, READY_S)
