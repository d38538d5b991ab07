"""One wrong set-up of a real engine for each of the doctor's findings."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bareengine import StartEngine
from keepwarm.cli.main import app
from keepwarm.engine.process import free_port
from keepwarm.tiers.files import packaged_configs
from servedgateway import serve_gateway
from smalltiers import write_small_tiers
from tinymodels import small_model, write_tiny_gemma3, write_tiny_lfm2

pytestmark = pytest.mark.live

STAND_IN = Path(__file__).with_name("llama_server_stand_in.py")
PACKAGED = packaged_configs() / "prompt-tiers"
TEMPLATE = packaged_configs() / "chat-templates" / "chatml-tools.jinja"
# How loaded the machine is that runs the tests says nothing about the set-up under test.
_CIRCUMSTANCES = {"busy_machine"}

Diagnose = Callable[..., dict[str, dict[str, str]]]


@pytest.fixture
def diagnose(tmp_path: Path) -> Diagnose:
    """Run the command; findings by code. `status` is the exit status that it must have."""

    def run(*arguments: str, status: int | None = None, **settings: str) -> dict[str, Any]:
        environment = {
            "HOME": str(tmp_path / "home"),
            "XDG_CONFIG_HOME": str(tmp_path / "config"),
            "XDG_STATE_HOME": str(tmp_path / "state"),
            **{f"KEEPWARM_{key.upper()}": value for key, value in settings.items()},
        }
        done = CliRunner().invoke(app, ["doctor", "--json", *arguments], env=environment)
        report = json.loads(done.stdout)
        assert done.exit_code == report["exit_status"]
        found = {finding["code"]: finding for finding in report["findings"]}
        if status is not None:
            assert done.exit_code == status, found
        return {code: found[code] for code in found if code not in _CIRCUMSTANCES}

    return run


@pytest.fixture
def tiers(tmp_path: Path) -> Path:
    return write_small_tiers(tmp_path / "small-tiers")


@contextmanager
def llama_server(*flags: str, model: Path | None = None, context: int = 4096) -> Iterator[str]:
    """A bare server with these flags; its URL. Nothing but its command line tells what they are."""
    port = free_port()
    command = [sys.executable, str(STAND_IN), "--model", str(model or small_model())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", str(context)]
    if "--threads" not in flags:
        command += ["--threads", "1"]
    process = subprocess.Popen(
        [*command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server with as much wrong at once as fits."""
    folder = tmp_path_factory.mktemp("wrong")
    template = folder / "dated.jinja"
    dated = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n"
    template.write_text(dated + TEMPLATE.read_text().replace("tools", "toolz"))
    flags = ("--cache-ram", "1", "--threads", "64", "--chat-template-file", str(template))
    with llama_server(*flags, context=1024) as url:
        yield url


@pytest.mark.parametrize(
    ("code", "severity", "said"),
    [
        ("idle_slots_cleared", "error", "--cache-idle-slots"),
        ("slots_unset", "warning", "4 slots"),
        ("cannot_save", "warning", "can't save slots"),
        ("too_many_threads", "warning", "64 threads"),
        ("template_drops_tools", "error", "read_file"),
        ("template_changes", "error", time.strftime("%Y")),
        ("context_too_small", "error", "doesn't fit"),
    ],
)
def test_what_is_wrong_with_a_bare_server_is_found(
    wrong: str, diagnose: Diagnose, code: str, severity: str, said: str
) -> None:
    found = diagnose("--upstream", wrong, "--tiers", str(PACKAGED), status=2)[code]
    assert found["severity"] == severity
    assert said in found["what"]
    assert found["advice"]


def test_a_server_as_the_plain_unit_starts_it_has_no_warnings(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    slots = tmp_path / "slots"
    slots.mkdir()
    flags = ["--parallel", "4", "--no-kv-unified", "--no-cache-idle-slots", "--cache-ram", "0"]
    with llama_server(*flags, "--slot-save-path", f"{slots}/", context=8192) as url:
        assert diagnose("--upstream", url, "--tiers", str(tiers), status=None) == {}
    assert list(slots.iterdir()) == []


def test_an_emptied_slot_is_found_by_trying_and_what_slots_held_is_put_back(
    diagnose: Diagnose, tiers: Path, bare_engine: StartEngine
) -> None:
    # This engine's command line tells nothing.
    params = {"n_ctx": 2048, "n_parallel": 2, "kv_unified": True, "cpuparams__n_threads": 1}
    engine = bare_engine(small_model(), cache_ram_mib=64, cache_idle_slots=True, **params)
    arguments = ["--upstream", engine.base, "--tiers", str(tiers)]
    unseen = diagnose(*arguments)["idle_slots_unknown"]
    assert unseen["severity"] == "unknown"
    tried = [*arguments, "--slot-dir", str(engine.slot_dir)]
    assert "tried just now" in diagnose(*tried)["idle_slots_cleared"]["what"]

    engine = bare_engine(small_model(), cache_ram_mib=0, **params)
    ids = engine.tokenize("The backup job runs each night and the disk is in the second bay.")
    engine.fill(ids, slot=0)
    found = diagnose(
        "--upstream", engine.base, "--tiers", str(tiers), "--slot-dir", str(engine.slot_dir)
    )
    assert "idle_slots_cleared" not in found
    assert "idle_slots_unknown" not in found
    assert engine.ask([*ids, ids[0]], slot=0).cache_tokens == len(ids)
    assert list(engine.slot_dir.iterdir()) == []


def test_a_prompt_cache_too_small_for_the_tiers_is_found(
    diagnose: Diagnose, tmp_path: Path
) -> None:
    slots = tmp_path / "slots"
    slots.mkdir()
    flags = ["--parallel", "2", "--cache-ram", "8", "--slot-save-path", f"{slots}/"]
    with llama_server(*flags, "--chat-template-file", str(TEMPLATE), context=8192) as url:
        found = diagnose("--upstream", url, "--tiers", str(PACKAGED))
    assert "--cache-ram 8" in found["small_cache"]["what"]


def test_a_sliding_window_without_swa_full_is_found(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny_gemma3(model, small_model())
    with llama_server("--parallel", "1", model=model) as url:
        found = diagnose("--upstream", url, "--tiers", str(tiers))["sliding_window"]
        assert (found["severity"], "64 tokens" in found["what"]) == ("warning", True)
    with llama_server("--parallel", "1", "--swa-full", model=model) as url:
        assert "sliding_window" not in diagnose("--upstream", url, "--tiers", str(tiers))


def test_recurrent_layers_are_told(diagnose: Diagnose, tiers: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny.gguf"
    write_tiny_lfm2(model, small_model())
    with llama_server("--parallel", "2", model=model) as url:
        found = diagnose("--upstream", url, "--tiers", str(tiers))
    assert "2 slots for 2 tiers" in found["few_slots"]["what"]
    assert found["recurrent_memory"]["severity"] == "note"


def test_a_template_with_room_for_one_system_message_only_is_found(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('one system message only') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with llama_server("--parallel", "1", "--chat-template-file", str(template)) as url:
        found = diagnose("--upstream", url, "--tiers", str(tiers), status=2)
    assert "one system message only" in found["tier_unrendered"]["what"]


def test_volatile_lines_of_a_tier_are_found(diagnose: Diagnose, tiers: Path, wrong: str) -> None:
    path = tiers / "standard" / "context.md"
    path.write_text(path.read_text() + "\nThis text was written on 12 May 2026.\n")
    found = diagnose("--upstream", wrong, "--tiers", str(tiers))["volatile_tiers"]
    assert "standard/context.md:5 (date: 12 May 2026)" in found["what"]


def test_tiers_that_cannot_be_read_are_found(diagnose: Diagnose, tiers: Path, wrong: str) -> None:
    (tiers / "minimal" / "tier.toml").write_text("descriptoin = 'x'\n")
    found = diagnose("--upstream", wrong, "--tiers", str(tiers), status=2)
    assert "tier.toml" in found["tiers_unusable"]["what"]


def test_a_slot_directory_in_memory_is_found(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    slots = Path("/dev/shm") / f"keepwarm-test-{os.getpid()}"
    if not slots.parent.is_dir():
        pytest.skip("there is no /dev/shm")
    slots.mkdir()
    # In unified KV too each tier is warmed into a slot, since no gateway would restore it later.
    flags = ["--parallel", "3", "--kv-unified", "--cache-ram", "0"]
    flags += ["--slot-save-path", f"{slots}/"]
    try:
        with llama_server(*flags) as url:
            found = diagnose("--upstream", url, "--tiers", str(tiers), status=1)
            assert found["slot_dir_forgets"]["severity"] == "warning"
            store = tmp_path / "store"
            arguments = ["--tiers", str(tiers), "--store", str(store)]
            warm = ["warmup", "--upstream", url, "--slot-dir", str(slots), *arguments]
            done = CliRunner().invoke(app, warm)
            assert done.exit_code == 0, done.output
            found = diagnose("--upstream", url, *arguments)
            assert found["slot_dir_forgets"]["severity"] == "note"
    finally:
        shutil.rmtree(slots)


@contextmanager
def _small_file_system(point: Path, *, size_mib: int) -> Iterator[None]:
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(point)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_slot_directory_that_is_nearly_full_is_found(diagnose: Diagnose, tmp_path: Path) -> None:
    slots = tmp_path / "slots"
    with _small_file_system(slots, size_mib=16):
        flags = ["--parallel", "2", "--cache-ram", "0", "--slot-save-path", f"{slots}/"]
        with llama_server(*flags, "--chat-template-file", str(TEMPLATE), context=8192) as url:
            found = diagnose("--upstream", url, "--tiers", str(PACKAGED), status=2)
        assert found["slot_dir_full"]["severity"] == "error"
        assert "the largest tier alone takes" in found["slot_dir_full"]["what"]


@contextmanager
def _slow_disk(path: Path, *, bytes_s: int) -> Iterator[list[str]]:
    """A command prefix under which writes to the path's disk are slow."""
    group = Path("/sys/fs/cgroup/blkio") / f"keepwarm-test-{os.getpid()}"
    device = path.stat().st_dev
    limit = f"{os.major(device)}:{os.minor(device)} {bytes_s}"
    try:
        group.mkdir()
        (group / "blkio.throttle.write_bps_device").write_text(limit)
    except OSError as error:
        pytest.skip(f"a disk can't be made slow here: {error.strerror}")
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$0" "$@"']
    finally:
        group.rmdir()


def test_a_slow_disk_is_found_under_the_slot_directory_and_the_store(
    tiers: Path, tmp_path: Path
) -> None:
    slots, store = tmp_path / "slots", tmp_path / "store"
    slots.mkdir()
    store.mkdir()
    flags = ["--parallel", "2", "--cache-ram", "0", "--slot-save-path", f"{slots}/"]
    with llama_server(*flags) as url, _slow_disk(slots, bytes_s=8_000_000) as slowly:
        command = [sys.executable, "-m", "keepwarm", "doctor", "--json", "--upstream", url]
        command += ["--tiers", str(tiers), "--store", str(store)]
        done = subprocess.run([*slowly, *command], capture_output=True, text=True, check=False)
    found = {finding["code"] for finding in json.loads(done.stdout)["findings"]}
    assert {"slot_dir_slow", "store_slow"} <= found


def test_a_quota_beyond_the_disk_and_a_store_in_memory_are_found(
    diagnose: Diagnose, tiers: Path, wrong: str
) -> None:
    store = Path("/dev/shm") / f"keepwarm-test-store-{os.getpid()}"
    if not store.parent.is_dir():
        pytest.skip("there is no /dev/shm")
    store.mkdir()
    try:
        arguments = ["--upstream", wrong, "--tiers", str(tiers), "--store", str(store)]
        found = diagnose(*arguments, store_quota_bytes=str(1 << 49))
    finally:
        store.rmdir()
    assert found["store_disk"]["severity"] == found["store_forgets"]["severity"] == "warning"


def test_a_warm_keepwarm_has_no_findings_and_other_fingerprints_are_told(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    def own(url: str) -> dict[str, dict[str, str]]:
        arguments = ["--tiers", str(tiers), "--store", str(tmp_path / "store")]
        return diagnose(*arguments, server_port=url.rpartition(":")[2], engine_threads="1")

    small = {"tiers": tiers, "slots": 2, "context": 4096}
    with serve_gateway(tmp_path, "--threads", "1", **small) as gateway:  # type: ignore[arg-type]
        assert own(gateway.url) == {}
    environment = {"KEEPWARM_ENGINE_KV_TYPE_K": "q8_0", "KEEPWARM_ENGINE_KV_TYPE_V": "q8_0"}
    with serve_gateway(
        tmp_path,
        "--threads",
        "1",
        environment=environment,
        **small,  # type: ignore[arg-type]
    ) as gateway:
        found = own(gateway.url)
    assert list(found) == ["foreign_snapshots"]
    assert "1 other fingerprint " in found["foreign_snapshots"]["what"]


def test_a_keepwarm_that_is_still_warming_is_said_to_be(diagnose: Diagnose, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "keepwarm", "serve", "--model", str(small_model())]
    command += ["--chat-template", str(TEMPLATE), "--tiers", str(PACKAGED), "--port", str(port)]
    command += ["--store", str(tmp_path / "store"), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(f"http://127.0.0.1:{port}/keepwarm/status"):
            assert process.poll() is None
            time.sleep(0.02)
        found = diagnose(server_port=str(port))
        assert found["not_ready"]["severity"] == "warning"
    finally:
        process.kill()
        process.wait()


def test_nothing_that_answers_and_settings_that_cannot_be_used_are_errors(
    diagnose: Diagnose, tiers: Path, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = diagnose("--upstream", url, "--tiers", str(tiers), status=2)
    assert "no_answer" in found
    settings = tmp_path / "keepwarm.toml"
    settings.write_text("[engine]\nslotz = 4\n")
    found = diagnose("--config", str(settings), status=2)
    assert "slotz" in found["settings"]["what"]
