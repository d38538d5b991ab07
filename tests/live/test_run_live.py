"""`keepwarm run` with a stand-in for each client, a real gateway, and the real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.engine.process import free_port
from keepwarm.operate.clients import CLIENTS
from served import Served, pid_runs

pytestmark = pytest.mark.live

STUB = Path(__file__).with_name("stub_client.py")
TIMEOUT_S = 120


class Runs:
    """A home with every client installed as a stand-in, and a Keepwarm to start for them."""

    def __init__(self, root: Path, model: Path, tiers: Path) -> None:
        self.root, self.model, self.port = root, model, free_port()
        self.report = root / "report.json"
        (root / "bin").mkdir()
        for client in CLIENTS.values():
            program = root / "bin" / client.command
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {STUB} "$@"\n')
            program.chmod(0o755)
        (root / "keepwarm.toml").write_text(
            f"[server]\nport = {self.port}\n[engine]\nthreads = 1\nslots = 2\ncontext = 4096\n"
            f'[tiers]\ndir = "{tiers}"\n'
        )

    @property
    def state(self) -> Path:
        return self.root / "state" / "keepwarm" / "run"

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        self.report.unlink(missing_ok=True)
        places = {name: str(self.root / "state") for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
        return subprocess.Popen(
            [sys.executable, "-m", "keepwarm", "run", *words],
            env={
                **os.environ,
                "HOME": str(self.root),
                "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
                "STUB_REPORT": str(self.report),
                "COLUMNS": "1000",
                **places,
                **environment,
            },
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, out, err

    def told(self, *, signalled: bool = False) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            if self.report.is_file() and self.report.read_text().endswith("}"):
                told: dict[str, Any] = json.loads(self.report.read_text())
                if not signalled or told["signal"]:
                    return told
            time.sleep(0.05)
        pytest.fail("the client wasn't started")

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture
def runs(tmp_path: Path, quick_model: Path, small_tiers: Path) -> Runs:
    return Runs(tmp_path, quick_model, small_tiers)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, quick_model: Path, small_tiers: Path
) -> Iterator[Served]:
    engine = {"model": str(quick_model), "slots": 2, "context": 4096, "threads": 1}
    served = Served(
        tmp_path_factory.mktemp("served"), engine=engine, tiers={"dir": str(small_tiers)}
    ).wait_ready()
    yield served
    served.stop()


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_reaches_the_keepwarm_that_runs_and_it_stays(
    runs: Runs, served: Served, name: str
) -> None:
    status, out, err = runs.run(name, "--url", served.base, "--", "ask", "--its", "own")
    assert status == 7, err
    told = runs.told()
    assert told["base"] == served.base
    assert told["argv"][-3:] == ["ask", "--its", "own"]
    assert "127.0.0.1" in told["environment"]["NO_PROXY"]
    if name == "claude":
        assert told["argv"][0] == "--exclude-dynamic-system-prompt-sections"
        assert told["environment"]["CLAUDE_CODE_AUTO_COMPACT_WINDOW"].isdecimal()
    assert "1 request, " in err
    assert out == ""
    assert "move-known" in err, "nobody is told that the gateway leaves the blocks where they are"
    served.settled()
    # What was written lies in the state, for its owner alone, and nowhere else at home.
    home = {path.name for path in runs.root.iterdir()}
    assert home <= {"bin", "keepwarm.toml", "state", "report.json"}
    for path in runs.state.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_gateway_is_started_its_model_remembered_and_all_of_it_ended(runs: Runs) -> None:
    status, _, err = runs.run("codex", "--model", str(runs.model), "--", "ask")
    assert status == 7, err
    assert f"starting a gateway on http://127.0.0.1:{runs.port}" in err
    assert "spared" in err
    assert not runs.answers()
    settings = (runs.state / "keepwarm.toml").read_text()
    assert 'rules = ["drop-billing", "move-known"]' in settings
    assert "context = 4096" in settings, "the owner's own setting is kept"
    again, _, err = runs.run("claude", "--", "ask")
    assert again == 7, err
    assert "starting a gateway" in err


def test_without_a_model_and_a_terminal_it_says_what_to_give(runs: Runs) -> None:
    status, _, err = runs.run("claude", "--", "ask")
    assert status == 1
    assert "--model" in err
    assert not runs.report.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_the_client_and_its_status_comes_back(
    runs: Runs, number: signal.Signals
) -> None:
    process = runs.start("pi", "--model", str(runs.model), "--", "wait")
    runs.told()
    assert runs.answers()
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 40 + number, err
    assert runs.told(signalled=True)["signal"] == number
    assert not runs.answers()


def test_ctrl_c_while_the_gateway_starts_ends_it(runs: Runs) -> None:
    process = runs.start("pi", "--model", str(runs.model), "--", "ask")
    log = runs.state / "gateway.log"
    deadline = time.monotonic() + TIMEOUT_S
    while not (log.is_file() and "pid " in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(log.read_text().split("pid ")[1].split()[0])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert not runs.report.exists()
    assert not pid_runs(pid)


def test_a_kill_leaves_no_gateway_behind(runs: Runs) -> None:
    process = runs.start("pi", "--model", str(runs.model), "--", "wait")
    runs.told()
    pid = int((runs.state / "gateway.log").read_text().split("pid ")[1].split()[0])
    process.kill()
    process.wait(TIMEOUT_S)  # its pipes stay open as long as the client runs
    deadline = time.monotonic() + TIMEOUT_S
    while pid_runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not pid_runs(pid)


def test_two_runs_share_one_gateway_that_ends_with_the_last(runs: Runs) -> None:
    first = runs.start("pi", "--model", str(runs.model), "--", "wait")
    runs.told()
    second = runs.start("codex", "--", "wait")
    runs.told()
    first.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert first.poll() is None, "it must wait for the other one"
    assert runs.answers()
    second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 40 + signal.SIGTERM
    assert "starting a gateway" not in said
    _, err = first.communicate(timeout=TIMEOUT_S)
    assert "others still use the gateway" in err
    assert not runs.answers()


def test_a_client_that_isnt_installed_is_told_how_before_anything_starts(runs: Runs) -> None:
    (runs.root / "bin" / "hermes").unlink()
    status, _, err = runs.run("hermes", "--model", str(runs.model), PATH=str(runs.root / "bin"))
    assert status == 1
    assert "pip install hermes-agent" in err
    assert not (runs.state / "gateway.log").exists()


def test_an_address_where_none_answers_is_an_error(runs: Runs) -> None:
    status, _, err = runs.run("claude", "--url", f"http://127.0.0.1:{free_port()}", "--", "ask")
    assert status == 1
    assert "keepwarm serve" in err


@pytest.mark.parametrize("name", CLIENTS)
def test_what_is_printed_is_a_script_that_does_the_same(runs: Runs, name: str) -> None:
    status, out, err = runs.run("--print", name, "--", "ask", "it's so")
    assert status == 0, err
    assert not runs.report.exists()
    environment = {"PATH": f"{runs.root / 'bin'}:{os.environ['PATH']}", "HOME": str(runs.root)}
    script = out.replace("127.0.0.1:" + str(runs.port), "127.0.0.1:1")
    done = subprocess.run(
        ["/bin/sh"],
        input=script,
        env={**environment, "STUB_REPORT": str(runs.report)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    # Nothing listens there: the stand-in was started, knew the address, and got no answer.
    assert "Connection refused" in done.stderr
