"""A night whose processes are killed at random points: every task ends, and none twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from batchsamples import document, line
from smalltiers import write_small_tiers
from tinymodels import small_model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "configs" / "chat-templates" / "chatml-tools.jinja"
MAIN = [sys.executable, "-c", "from keepwarm.cli import main; main()"]
KILLS = 10
TASKS = 48


class Night:
    """A gateway and a batch command, each of which is started again when it is gone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tiers = write_small_tiers(root / "tiers")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self.gateway = self._serve()
        self.wait_ready()
        self.batch: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start the command."""
        self.batch = self._run()

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self._root / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*MAIN, *arguments],
                stdout=log,
                stderr=log,
                cwd=self._root,
                env=os.environ | {"XDG_STATE_HOME": str(self._root / "state")},
            )

    def _serve(self) -> subprocess.Popen[bytes]:
        flags = ["--model", str(small_model()), "--chat-template", str(TEMPLATE)]
        flags += ["--tiers", str(self._tiers), "--store", str(self._root / "store")]
        flags += ["--port", str(self._port), "--slots", "3", "--context", "6144"]
        return self._start("gateway", "serve", *flags)

    def _run(self) -> subprocess.Popen[bytes]:
        files = ["tasks.jsonl", "-o", "out.jsonl", "--base", self.url, "--attempts", "20"]
        return self._start("batch", "batch", "run", *files)

    def status(self) -> dict[str, Any]:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(self.url + "/keepwarm/status", timeout=10) as reply,
        ):
            return dict(json.loads(reply.read()))
        return {}

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 300
        while self.status().get("state") != "ready":
            assert time.monotonic() < deadline, (self._root / "gateway.log").read_text()
            if self.gateway.poll() is not None:
                # Its engine was killed while it loaded; a service manager starts it again.
                self.gateway = self._serve()
            time.sleep(0.1)

    def kill(self, victim: str) -> bool:
        """SIGKILL a process; False if it isn't there to be killed."""
        if victim == "engine":
            pid = self.status().get("engine_pid")
            if not isinstance(pid, int):
                return False
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
            return False
        process = self.gateway if victim == "gateway" else self.batch
        assert process
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        if victim == "gateway":
            self.gateway = self._serve()
        else:
            self.batch = self._run()
        return True

    def end(self) -> None:
        for process in (self.batch, self.gateway):
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ids(path: Path) -> list[str]:
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [json.loads(raw)["custom_id"] for raw in lines]


@pytest.mark.live
def test_ten_kills_lose_nothing_and_end_nothing_twice(tmp_path: Path) -> None:
    lines = [
        line(f"t{i}", f"{document(i % 6, sentences=10)}\n\nQuestion {i}?", model="minimal")
        for i in range(TASKS)
    ]
    (tmp_path / "tasks.jsonl").write_bytes(b"".join(lines))
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    night = Night(tmp_path)
    killed: Counter[str] = Counter()
    try:
        night.begin()
        assert night.batch
        # All three kinds are killed at least twice, the rest by chance.
        victims = ["batch", "gateway", "engine"] * 3 + [chance.choice(["batch", "engine"])]
        chance.shuffle(victims)
        assert len(victims) == KILLS
        for victim in victims:
            time.sleep(chance.uniform(0.05, 3.0))
            if night.batch.poll() is None:
                killed[victim] += night.kill(victim)
        night.wait_ready()
        code = night.batch.wait(900)
    finally:
        night.end()
    log = (tmp_path / "batch.log").read_text()
    assert code == 0, f"seed {seed}, killed {killed}: {log[-2000:]}"
    assert Counter(ids(tmp_path / "out.jsonl")) == Counter(f"t{i}" for i in range(TASKS))
    assert ids(tmp_path / "out.errors.jsonl") == []
    assert sum(killed.values()) >= KILLS - 2, f"seed {seed}: the night was over too early, {killed}"


@pytest.mark.live
def test_a_batch_of_the_api_goes_on_after_its_gateway_was_killed(tmp_path: Path) -> None:
    lines = [
        line(f"t{i}", f"{document(i % 3, sentences=10)}\n\nQuestion {i}?", model="minimal")
        for i in range(24)
    ]
    night = Night(tmp_path)
    try:
        api = openai.OpenAI(base_url=night.url + "/v1", api_key="any", max_retries=0)
        file = api.files.create(file=("tasks.jsonl", b"".join(lines)), purpose="batch")
        batch = api.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        for done in (2, 9):
            wait_for(
                night, api, batch.id, lambda b, least=done: b.request_counts.completed >= least
            )
            night.kill("gateway")
            night.wait_ready()
        ended = wait_for(night, api, batch.id, lambda b: b.status == "completed")
        results = api.files.content(ended.output_file_id).text.splitlines()
    finally:
        night.end()
    assert ended.request_counts.completed == 24
    assert ended.error_file_id is None
    found = Counter(json.loads(raw)["custom_id"] for raw in results)
    assert found == Counter(f"t{i}" for i in range(24))


def wait_for(night: Night, api: openai.OpenAI, batch_id: str, done: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        batch = api.batches.retrieve(batch_id)
        if done(batch):
            return batch
        time.sleep(0.02)
    raise AssertionError(f"{batch}: {(night.gateway.poll())}")
