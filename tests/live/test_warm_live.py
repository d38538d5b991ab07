"""Every form of engine: warm before ready, restored at the second start, gone with Keepwarm."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bareengine import StartEngine
from served import Serve, Served, pid_runs
from tinymodels import small_model, write_tiny_lfm2

pytestmark = pytest.mark.live

STAND_IN = Path(__file__).with_name("llama_server_stand_in.py")
NAMED = os.environ.get("KEEPWARM_TEST_LLAMA_SERVER")


@pytest.fixture(params=["embedded", "stand-in", "llama-server"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """The engine's section of the settings, for each form of it that Keepwarm starts itself."""
    settings = {"model": str(small_model()), "slots": 3, "context": 6144}
    if request.param == "stand-in":
        # The real engine behind llama-server's command line: flags, guard and log are tried.
        binary = tmp_path / "llama-server"
        binary.write_text(
            f"#!{sys.executable}\nimport runpy\n"
            f"runpy.run_path({str(STAND_IN)!r}, run_name='__main__')\n"
        )
        binary.chmod(0o755)
        settings["binary"] = str(binary)
    elif request.param == "llama-server":
        if not NAMED:
            pytest.skip("KEEPWARM_TEST_LLAMA_SERVER names no llama-server")
        settings["binary"] = NAMED
    return settings


def warmed(served: Served) -> dict[str, dict[str, Any]]:
    found = served.get("/keepwarm/status")["warmed"]
    return {w["name"].removeprefix("tier:"): w for w in found}


def assert_warm(served: Served) -> None:
    for tier, warm in warmed(served).items():
        assert warm["proved"]
        answer = served.ask("Is the backup disk there?", model=tier)
        assert answer.status == 200
        assert answer.plan in ("slot", "snapshot")
        assert answer.cached >= warm["tokens"]
        assert answer.prefilled < 30
        served.settled()


def test_an_engine_of_any_form_is_warm_restored_and_ended(
    serve: Serve, engine: dict[str, Any]
) -> None:
    served = serve(**engine)
    first = warmed(served)
    assert {w["how"] for w in first.values()} == {"prefilled"}
    # The larger tier begins with the smaller, so only what it adds was prefilled.
    assert first["standard"]["prefilled_tokens"] <= (
        first["standard"]["tokens"] - first["minimal"]["tokens"] + 8
    )
    assert_warm(served)
    pid = served.engine_pid
    served.stop()
    assert not pid_runs(pid)

    again = serve(**engine)
    second = warmed(again)
    assert {w["how"] for w in second.values()} == {"restored"}
    assert sum(w["prefilled_tokens"] for w in second.values()) == 0
    assert [w["tokens"] for w in second.values()] == [w["tokens"] for w in first.values()]
    assert_warm(again)

    # Killed itself, an engine comes back; Keepwarm killed, no engine is left behind.
    pid = again.engine_pid
    os.kill(pid, signal.SIGKILL)
    again.until(lambda: not pid_runs(pid))
    assert again.ask("Are you back?", model="minimal").cached >= first["minimal"]["tokens"]
    pid = again.engine_pid
    again.kill()
    again.until(lambda: not pid_runs(pid))


def attached(serve: Serve, url: str, slot_dir: Path) -> Served:
    return serve(upstream=url, slot_dir=str(slot_dir))


def test_an_attached_server_is_warmed_and_left_running(
    serve: Serve, bare_engine: StartEngine
) -> None:
    bare = bare_engine(small_model(), kv_unified=True)
    served = attached(serve, bare.base, bare.slot_dir)
    assert {w["how"] for w in warmed(served).values()} == {"prefilled"}
    assert_warm(served)
    served.stop()
    assert bare.process.poll() is None
    assert list(bare.slot_dir.iterdir()) == []

    again = attached(serve, bare.base, bare.slot_dir)
    assert {w["how"] for w in warmed(again).values()} == {"restored"}
    assert_warm(again)
    again.stop()


def test_an_attached_server_that_was_restarted_with_another_model_gets_nothing_of_the_old(
    serve: Serve, bare_engine: StartEngine, tmp_path: Path
) -> None:
    models = []
    for seed in (1, 2):
        path = tmp_path / f"{seed}.gguf"
        write_tiny_lfm2(path, small_model(), seed=seed)
        models.append(path)
    bare = bare_engine(models[0])
    port = int(bare.base.rsplit(":", 1)[1])
    served = attached(serve, bare.base, bare.slot_dir)
    assert_warm(served)

    # The same address, the same shape, other weights.
    other = bare_engine(models[1], port=port)
    assert other.base == bare.base
    served.until(lambda: refuses(served))
    answer = served.ask("Is the disk there?", model="minimal")
    assert answer.status == 503
    assert "another model" in answer.body["error"]["message"]
    served.process.kill()


def refuses(served: Served) -> bool:
    return bool(served.ask("Is the disk there?", model="minimal").status == 503)


def test_what_follows_two_dashes_reaches_the_binary_unchanged(tmp_path: Path) -> None:
    """Everything a `llama-server` is started with, as that binary sees it."""
    seen = tmp_path / "arguments.json"
    binary = tmp_path / "llama-server"
    binary.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        f"if '--version' not in sys.argv: json.dump(sys.argv[1:], open({str(seen)!r}, 'w'))\n"
        "else: print('version: 1 (abc)')\n"
        "sys.stderr.write('failed to allocate buffer\\n')\n"
        "sys.exit(0 if '--version' in sys.argv else 3)\n"
    )
    binary.chmod(0o755)
    run: Callable[..., Any] = Served.command
    done = run(
        *("serve", "--model", str(small_model()), "--engine", str(binary)),
        *("--slots", "2", "--context", "4096", "--store", str(tmp_path / "store")),
        *("--port", "0", "--", "-ngl", "99", "--mlock"),
        root=tmp_path,
    )
    assert done.returncode == 1
    # It says what the engine said last, and what to do about it.
    assert "status 3" in done.stderr
    assert "failed to allocate buffer" in done.stderr
    assert "smaller --context" in done.stderr
    arguments = json.loads(seen.read_text())
    assert arguments[-3:] == ["-ngl", "99", "--mlock"]
    assert arguments[arguments.index("--parallel") + 1] == "2"
    assert arguments[arguments.index("--ctx-size") + 1] == "4096"
    assert arguments[arguments.index("--cache-ram") + 1] == "0"
    assert arguments[arguments.index("--slot-prompt-similarity") + 1] == "0"
