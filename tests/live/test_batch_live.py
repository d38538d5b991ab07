"""Batches through the real gateway and engine, by the `openai` client and by the command."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from batchsamples import document, line
from servedgateway import TEMPLATE, Gateway, serve_gateway
from smalltiers import write_small_tiers
from tinymodels import small_model, write_tiny_lfm2

pytestmark = pytest.mark.live

KEYS = ("anna:key-of-anna", "bert:key-of-bert")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    root = tmp_path_factory.mktemp("batch")
    environment = {
        "XDG_STATE_HOME": str(root / "state"),
        "KEEPWARM_SERVER_API_KEYS": ",".join(KEYS),
        "KEEPWARM_BATCH_GAP_S": "0.2",
    }
    tiers = write_small_tiers(root / "tiers")
    with serve_gateway(root, tiers=tiers, environment=environment) as served:
        yield served


def client(gateway: Gateway, name: str = "anna") -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.url + "/v1", api_key=f"key-of-{name}", max_retries=0)


def tasks(count: int = 6, documents: int = 2, *, start: int = 0, max_tokens: int = 4) -> bytes:
    out = []
    for i in range(count):
        about = start + i % documents
        text = f"{document(about, sentences=10)}\n\nQuestion {i}: which part?"
        out.append(line(f"t{i}", text, model="minimal", max_tokens=max_tokens))
    return b"".join(out)


def upload(api: openai.OpenAI, raw: bytes) -> str:
    return api.files.create(file=("tasks.jsonl", raw), purpose="batch").id


def create(api: openai.OpenAI, raw: bytes) -> Any:
    return api.batches.create(
        input_file_id=upload(api, raw),
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"night": "first"},
    )


def wait_for(api: openai.OpenAI, batch_id: str, done: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        batch = api.batches.retrieve(batch_id)
        if done(batch):
            return batch
        time.sleep(0.1)
    raise AssertionError(f"still {batch.status}: {batch.request_counts}")


def has_ended(batch: Any) -> bool:
    return batch.status in ("completed", "failed", "cancelled", "expired")


def lines_of(api: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    return [json.loads(raw) for raw in api.files.content(file_id).text.splitlines()]


def test_the_openai_client_runs_a_batch_unchanged(gateway: Gateway) -> None:
    api = client(gateway)
    bad = b"{no json\n" + line("t0", "a second t0")
    batch = create(api, tasks() + bad)
    assert batch.status == "validating"
    batch = wait_for(api, batch.id, has_ended)
    assert batch.status == "completed"
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (8, 6, 2)
    assert batch.metadata == {"night": "first"}
    assert {(e.line, e.code) for e in batch.errors.data} == {
        (7, "invalid_json"),
        (8, "duplicate_custom_id"),
    }
    results = lines_of(api, batch.output_file_id)
    assert sorted(r["custom_id"] for r in results) == [f"t{i}" for i in range(6)]
    assert all(r["response"]["status_code"] == 200 for r in results)
    assert all(r["response"]["body"]["choices"][0]["message"] for r in results)
    # Each document was prefilled once: what its tasks evaluated is their questions.
    prefilled = [r["response"]["body"]["timings"]["prompt_n"] for r in results]
    assert max(prefilled) < 60
    assert len(lines_of(api, batch.error_file_id)) == 2
    assert batch.id in [b.id for b in api.batches.list(limit=5)]
    output = api.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.bytes > 0) == ("batch_output", True)
    assert batch.output_file_id in [f.id for f in api.files.list()]
    assert api.files.delete(batch.output_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        api.files.content(batch.output_file_id)


def test_another_keys_files_and_batches_dont_exist(gateway: Gateway) -> None:
    anna, bert = client(gateway), client(gateway, "bert")
    file_id = upload(anna, line("a"))
    calls: list[Callable[[], object]] = [
        lambda: bert.files.retrieve(file_id),
        lambda: bert.files.content(file_id),
        lambda: bert.files.delete(file_id),
        lambda: bert.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            call()
    assert list(bert.files.list()) == []
    stranger = openai.OpenAI(base_url=gateway.url + "/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.files.list()
    assert anna.files.retrieve(file_id).id == file_id


def test_what_is_kept_is_private_to_the_user(gateway: Gateway) -> None:
    upload(client(gateway), line("a"))
    root = gateway.log.parent / "state" / "keepwarm" / "batches"
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in (root, *root.rglob("*"))}
    assert modes
    assert all(mode == (0o700 if p.is_dir() else 0o600) for p, mode in modes.items()), modes


def test_a_file_without_any_task_fails_with_its_lines(gateway: Gateway) -> None:
    api = client(gateway)
    batch = wait_for(api, create(api, b"[]\n{}\n").id, has_ended)
    assert batch.status == "failed"
    assert [e.line for e in batch.errors.data] == [1, 2]
    with pytest.raises(openai.BadRequestError):
        api.batches.create(
            input_file_id=batch.input_file_id, endpoint="/v1/images", completion_window="24h"
        )  # type: ignore[call-overload]


def test_a_body_over_the_context_is_an_error_and_the_rest_goes_on(gateway: Gateway) -> None:
    api = client(gateway)
    batch = create(api, line("long", "word " * 30_000, max_tokens=2) + line("short", max_tokens=2))
    batch = wait_for(api, batch.id, has_ended)
    assert [r["custom_id"] for r in lines_of(api, batch.output_file_id)] == ["short"]
    (error,) = lines_of(api, batch.error_file_id)
    assert error["custom_id"] == "long"
    assert error["response"]["status_code"] == 400
    assert error["error"]["message"]


def test_a_batch_that_is_cancelled_keeps_what_it_has(gateway: Gateway) -> None:
    api = client(gateway)
    batch = create(api, tasks(40, 4, start=10, max_tokens=24))
    wait_for(api, batch.id, lambda b: b.request_counts.completed >= 2)
    with pytest.raises(openai.ConflictError):
        api.files.delete(batch.input_file_id)
    assert api.batches.cancel(batch.id).status == "cancelling"
    batch = wait_for(api, batch.id, has_ended)
    assert batch.status == "cancelled"
    done = lines_of(api, batch.output_file_id)
    assert 2 <= len(done) < 40
    assert batch.request_counts.completed == len(done)
    with pytest.raises(openai.BadRequestError):
        api.batches.cancel(batch.id)


def test_an_interactive_request_is_served_while_a_batch_runs_and_holds_it_back(
    gateway: Gateway,
) -> None:
    api = client(gateway)
    batch = create(api, tasks(40, 4, start=20, max_tokens=32))
    wait_for(api, batch.id, lambda b: b.request_counts.completed >= 1)
    stop = threading.Event()

    def talk() -> None:
        while not stop.is_set():
            api.chat.completions.create(
                model="minimal", messages=[{"role": "user", "content": "Count."}], max_tokens=24
            )

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        # What ran when it began may end (three at a time); after that nothing begins.
        time.sleep(1)
        wait_for(api, batch.id, lambda _: slots_serving_batches(gateway) == 0)
        before = api.batches.retrieve(batch.id).request_counts.completed
        for _ in range(3):
            api.chat.completions.create(
                model="minimal", messages=[{"role": "user", "content": "Wait."}], max_tokens=24
            )
        assert api.batches.retrieve(batch.id).request_counts.completed == before
    finally:
        stop.set()
        talker.join()
    wait_for(api, batch.id, lambda b: b.request_counts.completed > before)
    api.batches.cancel(batch.id)
    wait_for(api, batch.id, has_ended)


def slots_serving_batches(gateway: Gateway) -> int:
    """Slots at work beside the one or none that the talker has."""
    headers = {"Authorization": "Bearer key-of-anna"}
    slots = gateway.get("/keepwarm/status", headers)["slots"]
    return max(sum(slot["state"] != "idle" for slot in slots) - 1, 0)


def batch_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "from keepwarm.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "batch", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ,
        check=False,
    )


def test_the_command_runs_a_file_against_a_running_gateway(
    gateway: Gateway, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("key-of-bert\n")
    (tmp_path / "tasks.jsonl").write_bytes(tasks(8, 2, start=40))
    where = ["--base", gateway.url, "--key-file", "key"]
    planned = batch_command("plan", "tasks.jsonl", "--json", *where, cwd=tmp_path)
    plan = json.loads(planned.stdout)
    assert plan["fills"] == 2
    assert plan["prefill_tokens"] < plan["naive_prefill_tokens"]
    done = batch_command("run", "tasks.jsonl", "-o", "out.jsonl", "--json", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert (report["succeeded"], report["left"], report["fills"]) == (8, 0, 2)
    # The documents once, the questions each: that is the least possible.
    results = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert max(r["response"]["body"]["timings"]["prompt_n"] for r in results) < 60
    assert (tmp_path / "out.night.svg").read_text().startswith("<svg")
    again = batch_command("run", "tasks.jsonl", "-o", "out.jsonl", *where, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 8


def test_the_command_watches_a_directory_once(gateway: Gateway, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("key-of-bert\n")
    drop = tmp_path / "drop"
    drop.mkdir()
    (drop / "one.jsonl").write_bytes(tasks(2, 1, start=60))
    (drop / "two.jsonl").write_bytes(b"{bad\n" + tasks(2, 1, start=61))
    where = ["--base", gateway.url, "--key-file", "key"]
    done = batch_command("watch", "drop", "--once", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    homes = sorted((drop / "done").iterdir())
    assert [home.name.partition("-")[0] for home in homes] == ["one", "two"]
    assert all(len((home / "results.jsonl").read_text().splitlines()) == 2 for home in homes)
    assert (homes[1] / "results.errors.jsonl").exists()
    assert not list(drop.glob("*.jsonl"))


def test_a_keepwarm_of_its_own_fills_ends_for_a_model_whose_state_cant_be_cut(
    tmp_path: Path,
) -> None:
    write_tiny_lfm2(tmp_path / "lfm2.gguf", small_model())
    write_small_tiers(tmp_path / "tiers")
    (tmp_path / "tasks.jsonl").write_bytes(tasks(9, 2))
    own = ["--model", "lfm2.gguf", "--chat-template", str(TEMPLATE), "--tiers", "tiers"]
    own += ["--store", "store", "--slots", "2", "--context", "4096"]
    done = batch_command("run", "tasks.jsonl", "-o", "out.jsonl", "--json", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert (report["succeeded"], report["fills"]) == (9, 2)
    results = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    # Restored at the very end of what is shared, or gone on from the engine's checkpoint there:
    # else the whole prompt would be prefilled.
    assert max(r["response"]["body"]["timings"]["prompt_n"] for r in results) < 60
    assert set(report["by_plan"]) <= {"slot", "snapshot", "shared"}
