"""A fleet of the tests: `keepwarm fleet up` as a process, and how to ask it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from keepwarm.engine.process import free_port
from keepwarm.tiers.files import packaged_configs
from smalltiers import write_small_tiers
from tinymodels import small_model

NEEDS_RAY = [
    pytest.mark.live,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("ray", "obstore")),
        reason="the fleet extra isn't installed (pip install 'keepwarm[fleet]')",
    ),
]

READY_S = 240.0
STORY = "The relay in the attic hums at night and the children count the seconds between. " * 12


class Answer(NamedTuple):
    """One reply: its headers in lower case, and its body."""

    headers: dict[str, str]
    body: Any

    @property
    def node(self) -> str:
        return self.headers["x-keepwarm-node"]

    @property
    def message(self) -> dict[str, str]:
        return dict(self.body["choices"][0]["message"])


class RunningFleet:
    """`keepwarm fleet up`, and how to ask it."""

    def __init__(self, base: Path, *, fleet: str = "nodes = 2") -> None:
        write_small_tiers(base / "tiers")
        self.base, self.port = base, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "up.log"
        self.config = base / "fleet.toml"
        self.write(fleet=fleet)
        command = [sys.executable, "-m", "keepwarm", "fleet", "up", "--config", str(self.config)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait(lambda: "the fleet is ready" in self.log.read_text(), READY_S)

    def write(self, *, fleet: str = "nodes = 2", node: str = "") -> None:
        """Write fleet.toml, with these lines in [fleet] and more tables of the node."""
        base = self.base
        self.config.write_text(f"""
[fleet]
{fleet}
port = {self.port}
report_s = 0.5

[shared]
url = "{base / "shared"}"

[node.engine]
model = "{small_model()}"
chat_template = "{packaged_configs() / "chat-templates" / "chatml-tools.jinja"}"
slots = 2
context = 4096
threads = 1

[node.store]
dir = "{base / "nodes"}"
staging_bytes = 200000000

[node.tiers]
dir = "{base / "tiers"}"

{node}
""")

    def reload(self) -> str:
        """Have the fleet read its file again; returns what it says when it is through with it."""
        seen = len(self.log.read_text())
        self.process.send_signal(signal.SIGHUP)
        said = ""

        def is_through() -> bool:
            nonlocal said
            said = self.log.read_text()[seen:]
            return "the fleet is updated" in said or "not updated" in said

        self.wait(is_through, READY_S)
        return said

    def wait(self, is_so: Callable[[], bool], at_most_s: float) -> None:
        until = time.monotonic() + at_most_s
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def open(self, messages: list[dict[str, str]], **more: Any) -> Any:
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, "model": "minimal", **more}
        request = urllib.request.Request(
            self.url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=300)

    def chat(self, messages: list[dict[str, str]], **more: Any) -> Answer:
        with self.open(messages, **more) as reply:
            headers = {name.lower(): value for name, value in reply.headers.items()}
            return Answer(headers, json.load(reply))

    def status(self) -> dict[str, Any]:
        """What the fleet says of itself."""
        command = [sys.executable, "-m", "keepwarm", "fleet", "status", "--json", "--url"]
        told = subprocess.run([*command, self.url], capture_output=True, check=False)
        assert told.returncode == 0, told.stderr.decode()
        return dict(json.loads(told.stdout))

    def nodes(self) -> dict[str, Any]:
        """What is known of each node, by its own name."""
        known = self.status()["nodes"].values()
        return {node["node"]: node for node in known if "node" in node}

    def settled(self) -> bool:
        """Whether both nodes have told of themselves, and nothing waits to be written behind."""
        nodes = self.nodes()
        return len(nodes) == 2 and not any(
            node["shared"]["pending"] or node["busy_slots"] for node in nodes.values()
        )

    def kill(self, node: str) -> int:
        """Kill a node's process as the kernel would; returns its id."""
        pid: int = self.nodes()[node]["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_replaced(self, pid: int) -> dict[str, Any]:
        """Wait until two nodes are there and none is the one that was killed."""
        self.wait(lambda: self.settled() and pid not in self.pids(), READY_S)
        return self.nodes()

    def stop(self) -> None:
        """End it, as a user would."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()

    def pids(self) -> set[int]:
        return {node["pid"] for node in self.nodes().values()}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
