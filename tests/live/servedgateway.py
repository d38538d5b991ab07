"""A real `keepwarm serve` process for tests, ended by its own pid."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinymodels import small_model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "configs" / "chat-templates" / "chatml-tools.jinja"


@dataclass
class Gateway:
    """A running gateway."""

    url: str
    process: subprocess.Popen[str]
    log: Path

    def get(self, path: str, headers: dict[str, str] | None = None) -> Any:
        return self._call(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **(headers or {})},
        )
        return self._call(request)

    def _call(self, request: urllib.request.Request) -> Any:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())

    def status(self) -> Any:
        return self.get("/keepwarm/status")

    def wait_ready(self, limit_s: float = 300) -> None:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the gateway ended: {self.log.read_text()}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if self.get("/health"):
                    return
            time.sleep(0.05)
        raise AssertionError(f"the gateway isn't ready: {self.log.read_text()}")


@contextlib.contextmanager
def serve_gateway(
    root: Path,
    *extra: str,
    tiers: Path,
    model: Path | None = None,
    slots: int = 4,
    context: int = 8192,
    environment: dict[str, str] | None = None,
) -> Iterator[Gateway]:
    """Serve until the block ends; the store stays in `root` for the next one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = root / f"gateway-{port}.log"
    command = [sys.executable, "-m", "keepwarm", "serve", "--model", str(model or small_model())]
    command += ["--chat-template", str(TEMPLATE), "--port", str(port), "--tiers", str(tiers)]
    command += ["--store", str(root / "store"), "--slots", str(slots), "--context", str(context)]
    with log.open("w") as sink:
        process = subprocess.Popen(
            [*command, *extra],
            stdout=sink,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=root,
            env=os.environ | (environment or {}),
        )
    gateway = Gateway(f"http://127.0.0.1:{port}", process, log)
    try:
        gateway.wait_ready()
        yield gateway
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
