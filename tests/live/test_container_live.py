"""What containers are like: a read-only root, 64 MB of shared memory, no home."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.engine.process import free_port
from served import READY_S

# What runs behind it can write to /dev/shm alone.
CONFINED = """
mount --make-rprivate / && mount -t tmpfs -o size=64m tmpfs /dev/shm &&
mount -o remount,bind,ro / && cd / && exec "$@"
"""


def can_confine() -> bool:
    """Whether this test may have mounts of its own."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    tried = ["unshare", "--mount", "sh", "-c", CONFINED, "sh", "true"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not can_confine(), reason="needs root and mounts of its own")


class Confined:
    """A gateway in it; its log is written from outside."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.port, self.log = free_port(), log
        command = [sys.executable, "-m", "keepwarm", "serve", "--port", str(self.port), *arguments]
        with log.open("w") as sink:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", CONFINED, "sh", *command],
                env={"PATH": os.environ["PATH"]},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )

    def ask(self, path: str, body: object = None) -> dict[str, object]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=30) as reply:
            found: dict[str, object] = json.load(reply)
        return found

    def wait_ready(self) -> Confined:
        until_s = time.monotonic() + READY_S
        while time.monotonic() < until_s and self.process.poll() is None:
            try:
                self.ask("/health")
            except OSError:
                time.sleep(0.1)
            else:
                return self
        self.process.kill()
        pytest.fail(f"it wasn't ready:\n{self.log.read_text()[-3000:]}")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def confined(tmp_path: Path, quick_model: Path, small_tiers: Path) -> Iterator[Confined]:
    model = ("--model", str(quick_model), "--context", "8192", "--slots", "2")
    gateway = Confined(tmp_path / "log", *model, "--tiers", str(small_tiers))
    yield gateway.wait_ready()
    if gateway.process.poll() is None:
        gateway.process.kill()


def test_it_serves_warm_and_says_that_nothing_is_saved(confined: Confined) -> None:
    body = {"model": "minimal", "max_tokens": 2, "messages": [{"role": "user", "content": "Hi."}]}
    reply = confined.ask("/v1/chat/completions", body)
    usage = reply["usage"]
    assert isinstance(usage, dict)
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert confined.ask("/keepwarm/status")["store"]
    assert confined.end() == 0
    log = confined.log.read_text()
    assert "nothing is saved in this life" in log
    assert "Read-only file system" in log
    assert "Traceback" not in log
