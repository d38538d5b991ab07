"""Keepwarm under a real systemd: a user instance that the test starts, and the units as shipped."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from keepwarm.core.tiers import compose
from keepwarm.engine.process import free_port
from keepwarm.tiers.files import load_tiers, packaged_configs
from smalltiers import write_small_tiers
from systemmanager import SystemManager
from tinymodels import small_model
from usermanager import UserManager, ask, get, post_chat, wait_until_ready

pytestmark = pytest.mark.live

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
KEEPWARM = Path(sys.executable).parent / "keepwarm"
UNIT = "keepwarm.service"
PLAIN = "llama-server.service"
STAND_IN = Path(__file__).with_name("llama_server_stand_in.py")


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserManager]:
    manager = UserManager(tmp_path_factory.mktemp("systemd"))
    yield manager
    manager.stop()


@pytest.fixture(scope="module")
def tiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_tiers(tmp_path_factory.mktemp("tiers"))


@pytest.fixture(scope="module")
def base(manager: UserManager, tiers: Path) -> str:
    """The service installed and started by its own command; its address."""
    if not KEEPWARM.exists():
        pytest.skip("the keepwarm command isn't installed beside this Python")
    # Blanks, percent and dollar signs are what a unit's quoting must get right.
    odd = manager.root / "a model %h $HOME's"
    odd.mkdir()
    model = odd / "small.gguf"
    model.symlink_to(small_model())
    port = free_port()
    manager.run(
        [
            *(str(KEEPWARM), "service", "install", "--user", "--yes", "--model", str(model)),
            *("--port", str(port), "--tiers", str(tiers), "--slots", "2", "--context", "2048"),
            *("--threads", "1"),
        ]
    )
    return f"http://127.0.0.1:{port}"


def test_started_means_warm_and_status_says_so(manager: UserManager, base: str) -> None:
    assert manager.show(UNIT, "ActiveState") == "active"
    assert manager.show(UNIT, "StatusText") == "ready: 2 prefixes warm"
    assert get(f"{base}/health")["status"] == "ok"
    said = manager.run([str(KEEPWARM), "service", "status", "--user"]).stdout
    assert "active (running)" in said
    assert "as it was installed" in said


def test_the_first_request_after_the_start_is_warm(base: str) -> None:
    headers, body = ask(base, "standard", "Is the backup disk there?")
    assert headers["x-keepwarm-plan"] in ("slot", "snapshot")
    assert body["timings"]["cache_n"] >= 100


def test_the_unit_lets_the_gateway_ask_for_short_turns(manager: UserManager, base: str) -> None:
    asks = (
        "import sys; from keepwarm.timeslice import ask_for_short_turns as ask; sys.exit(not ask())"
    )
    if subprocess.run([sys.executable, "-c", asks], check=False).returncode:
        pytest.skip("this kernel has no turns of a thread's own")
    told = Path(f"/proc/{manager.show(UNIT, 'MainPID')}/sched")
    if not told.exists():
        pytest.skip("this kernel doesn't tell")
    assert re.search(r"se\.slice\s*:\s*200000\n", told.read_text(encoding="ascii"))


def test_a_killed_engine_comes_back_and_the_queued_requests_with_it(
    manager: UserManager, base: str
) -> None:
    before = get(f"{base}/keepwarm/status")["engine_pid"]
    main = manager.show(UNIT, "MainPID")
    replies: list[tuple[dict[str, str], dict[str, object]]] = []

    def send(number: int) -> None:
        replies.append(ask(base, "standard", f"Look at disk {number}, please."))

    # Six requests for two slots: some run, the others wait.
    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    os.kill(before, signal.SIGSTOP)
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(before, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert len(replies) == 6
    assert get(f"{base}/keepwarm/status")["engine_pid"] != before
    assert manager.show(UNIT, "MainPID") == main
    assert all(headers["x-keepwarm-plan"] != "cold" for headers, _ in replies)


def test_a_killed_keepwarm_is_restarted_by_systemd_and_warm_from_snapshots(
    manager: UserManager, base: str
) -> None:
    engine = get(f"{base}/keepwarm/status")["engine_pid"]
    restarts = int(manager.show(UNIT, "NRestarts"))
    os.kill(int(manager.show(UNIT, "MainPID")), signal.SIGKILL)
    manager.wait_for(UNIT, "NRestarts", str(restarts + 1))
    manager.wait_for(UNIT, "SubState", "running")
    status = wait_until_ready(base)
    assert [tier["how"] for tier in status["warmed"]] == ["restored", "restored"]
    assert not Path(f"/proc/{engine}").exists()
    _, body = ask(base, "standard", "Is the relay up?")
    assert body["timings"]["cache_n"] >= 100


def test_a_stuck_event_loop_is_restarted_by_the_watchdog(manager: UserManager, base: str) -> None:
    dropin = manager.units / f"{UNIT}.d"
    dropin.mkdir()
    (dropin / "fast.conf").write_text("[Service]\nWatchdogSec=2\n")
    manager.systemctl("daemon-reload")
    manager.systemctl("restart", UNIT)
    main = int(manager.show(UNIT, "MainPID"))
    restarts = int(manager.show(UNIT, "NRestarts"))
    os.kill(main, signal.SIGSTOP)
    manager.wait_for(UNIT, "NRestarts", str(restarts + 1))
    manager.wait_for(UNIT, "SubState", "running")
    assert manager.show(UNIT, "MainPID") != str(main)
    shutil.rmtree(dropin)
    manager.systemctl("daemon-reload")
    manager.systemctl("restart", UNIT)


def test_a_stop_saves_the_slots_so_that_a_conversation_goes_on_after_it(
    manager: UserManager, base: str
) -> None:
    words = " ".join(f"item {i} is on shelf {i * 7 % 30}." for i in range(60))
    question = f"Remember this list. {words}"
    ask(base, "standard", question)
    kept = get(f"{base}/keepwarm/status")["store"]["kept_tokens"]
    manager.systemctl("stop", UNIT)
    assert manager.show(UNIT, "Result") == "success"
    manager.systemctl("start", UNIT)
    status = get(f"{base}/keepwarm/status")
    assert status["store"]["kept_tokens"] >= kept
    headers, body = ask(base, "standard", question)
    assert headers["x-keepwarm-plan"] == "snapshot"
    assert body["timings"]["cache_n"] > 500


def test_uninstalling_leaves_the_store(manager: UserManager, base: str) -> None:
    assert base
    manager.run([str(KEEPWARM), "service", "uninstall", "--user", "--yes"])
    assert not (manager.units / UNIT).exists()
    assert manager.show(UNIT, "LoadState") == "not-found"
    assert list((manager.root / "state" / "keepwarm" / "store").iterdir())


def _llama_server(folder: Path) -> Path:
    """The binary named in the environment, else the packaged engine behind the same options."""
    if named := os.environ.get("KEEPWARM_TEST_LLAMA_SERVER"):
        return Path(named)
    program = folder / "llama-server"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    program.chmod(0o755)
    return program


def _install_plain(manager: UserManager, *more: str, port: int) -> list[str]:
    return [
        *(str(KEEPWARM), "service", "install", "--user", "--plain", "--yes"),
        *("--engine", str(_llama_server(manager.root)), "--model", str(small_model())),
        *("--port", str(port), "--threads", "1", *more),
    ]


def test_a_plain_llama_server_is_started_only_when_its_tiers_are_warm(
    manager: UserManager, tiers: Path
) -> None:
    port = free_port()
    command = _install_plain(manager, "--tiers", str(tiers), "--context", "4096", port=port)
    manager.run(command)
    assert manager.show(PLAIN, "ActiveState") == "active"
    standard = load_tiers(tiers, "Keeper").get("standard")
    assert standard
    body = compose(standard, {"messages": [{"role": "user", "content": "Hello?"}]})
    assert post_chat(f"http://127.0.0.1:{port}", body)["timings"]["cache_n"] >= 100
    # The second start restores what the first one prefilled.
    manager.systemctl("restart", PLAIN)
    assert post_chat(f"http://127.0.0.1:{port}", body)["timings"]["cache_n"] >= 100
    manager.run([str(KEEPWARM), "service", "uninstall", "--user", "--plain", "--yes"])


def test_a_plain_llama_server_that_cannot_be_warmed_is_not_up(manager: UserManager) -> None:
    # The model's own template drops tools, which the packaged tiers have.
    tiers = packaged_configs() / "prompt-tiers"
    command = _install_plain(manager, "--tiers", str(tiers), port=free_port())
    done = manager.run(command, check=False)
    assert done.returncode == 1
    assert manager.show(PLAIN, "ActiveState") != "active"
    manager.run([str(KEEPWARM), "service", "uninstall", "--user", "--plain", "--yes"])


@pytest.fixture
def system(tmp_path: Path) -> Iterator[SystemManager]:
    manager = SystemManager(tmp_path)
    yield manager
    manager.stop()


def _status_of_process(system: SystemManager, pid: str) -> dict[str, str]:
    lines = system.inside("cat", f"/proc/{pid}/status").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_the_hardened_system_service_warms_answers_and_saves(
    system: SystemManager, tiers: Path
) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [
        *(str(KEEPWARM), "service", "install", "--yes", "--directory", str(system.units)),
        *("--model", str(small_model()), "--tiers", str(tiers), "--port", str(port)),
        *("--slots", "2", "--context", "2048", "--threads", "1"),
    ]
    # Pytest's folders are private; the service's own user must be able to read the tiers.
    for folder in (tiers, *tiers.parents[:2]):
        folder.chmod(0o755)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    system.systemctl("daemon-reload")
    system.systemctl("start", UNIT)
    process = _status_of_process(system, system.show(UNIT, "MainPID"))
    assert process["Uid"].split()[0] != "0"
    assert int(process["CapEff"], 16) == 0
    assert process["Seccomp"] == "2"
    _, body = ask(base, "standard", "Is the backup disk there?")
    assert body["timings"]["cache_n"] >= 100
    system.inside("kill", "-KILL", str(get(f"{base}/keepwarm/status")["engine_pid"]))
    _, body = ask(base, "standard", "And is the web page up?")
    assert body["timings"]["cache_n"] >= 100
    system.systemctl("restart", UNIT)
    status = get(f"{base}/keepwarm/status")
    assert [tier["how"] for tier in status["warmed"]] == ["restored", "restored"]
    system.systemctl("stop", UNIT)
    assert system.show(UNIT, "Result") == "success"


@pytest.mark.parametrize("name", [UNIT, PLAIN])
def test_the_system_units_leave_little_exposed(manager: UserManager, name: str) -> None:
    done = manager.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(DEPLOY / name)]
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert found
    assert float(found[1]) <= 2.0


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.service")), ids=str)
def test_systemd_has_nothing_to_say_against_a_unit_but_its_example_paths(
    manager: UserManager, path: Path
) -> None:
    scope = ["--user"] if path.parent.name == "user" else []
    done = manager.run(["systemd-analyze", *scope, "verify", "--man=no", str(path)], check=False)
    own = [line for line in done.stderr.splitlines() if line.startswith(path.name)]
    assert all("is not executable: No such file" in line for line in own)
    assert own
