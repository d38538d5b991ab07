"""A systemd user instance of its own for tests, and what a test asks of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

_BOOTED = Path("/run/systemd/system")
_WAIT_S = 120.0


class UserManager:
    """`systemd --user` with directories of its own; nothing of it touches the machine's units."""

    def __init__(self, root: Path) -> None:
        """Start it, or skip the test and say why."""
        if shutil.which("systemctl") is None or shutil.which("systemd-analyze") is None:
            pytest.skip("systemd isn't installed")
        program = shutil.which("systemd") or "/usr/lib/systemd/systemd"
        if not Path(program).exists():
            pytest.skip("systemd isn't installed")
        try:
            # systemd takes this directory for the sign that a machine was booted with it.
            _BOOTED.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            pytest.skip(f"{_BOOTED} isn't there and can't be made: {error.strerror}")
        self.root = root
        self.config = root / "config"
        self.units = self.config / "systemd" / "user"
        run = root / "run"
        for folder in (self.units, run, root / "state", root / "home"):
            folder.mkdir(parents=True, mode=0o700)
        dropped = ("DBUS_SESSION_BUS_ADDRESS", "NOTIFY_SOCKET")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
            "XDG_RUNTIME_DIR": str(run),
            "XDG_CONFIG_HOME": str(self.config),
            "XDG_STATE_HOME": str(root / "state"),
            "HOME": str(root / "home"),
            "SYSTEMD_LOG_LEVEL": "info",
        }
        self.log = root / "systemd.log"
        # There is no journal here: what services say goes to the same file.
        said = f"append:{self.log}"
        (self.units / "service.d").mkdir()
        (self.units / "service.d" / "output.conf").write_text(
            f"[Service]\nStandardOutput={said}\nStandardError={said}\n"
        )
        with self.log.open("a") as sink:
            self._process = subprocess.Popen(
                [program, "--user"], env=self.environment, stdout=sink, stderr=sink
            )
        deadline = time.monotonic() + 20
        while self.systemctl("is-system-running", check=False).stdout.strip() not in (
            "running",
            "degraded",
        ):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                pytest.skip(f"systemd --user doesn't run here: {self.log.read_text()[-300:]}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it and all it runs."""
        for name in ("keepwarm", "llama-server"):
            self.systemctl("kill", "--signal=KILL", name, check=False)
        self._process.terminate()
        self._process.wait(30)

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(["systemctl", "--user", "--no-pager", *words], check=check)

    def run(self, command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False, timeout=300
        )
        if check and done.returncode:
            pytest.fail(
                f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}\n"
                f"{self.log.read_text()[-3000:]}"
            )
        return done

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", f"--property={key}", "--value", unit).stdout.strip()

    def wait_for(self, unit: str, key: str, value: str) -> None:
        """Until a property has this value."""
        deadline = time.monotonic() + _WAIT_S
        while (found := self.show(unit, key)) != value:
            if time.monotonic() > deadline:
                pytest.fail(f"{key} of {unit} is {found!r}: {self.log.read_text()[-3000:]}")
            time.sleep(0.1)


def get(url: str) -> Any:
    """A page as JSON; urllib.error.HTTPError where it isn't 200."""
    with urllib.request.urlopen(url, timeout=30) as reply:
        return json.load(reply)


def post_chat(base: str, body: dict[str, Any]) -> dict[str, Any]:
    """A short chat reply."""
    return _chat(base, {**body, "max_tokens": 4, "temperature": 0})[1]


def ask(base: str, model: str, text: str) -> tuple[dict[str, str], dict[str, Any]]:
    """A short chat reply of a tier: its headers in lower case, and its body."""
    messages = [{"role": "user", "content": text}]
    return _chat(base, {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0})


def _chat(base: str, body: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    request = urllib.request.Request(
        f"{base}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=_WAIT_S) as reply:
        return {k.lower(): v for k, v in reply.headers.items()}, json.load(reply)


def wait_until_ready(base: str) -> dict[str, Any]:
    """Keepwarm's status once it says that it is ready."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            status: dict[str, Any] = get(f"{base}/keepwarm/status")
            if status["state"] == "ready":
                return status
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass
        time.sleep(0.1)
    pytest.fail("Keepwarm didn't become ready")
