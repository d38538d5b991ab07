"""The runner against a scripted sender: retries, restarts, stops, what is written down."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from batchsamples import document, line
from keepwarm.batch.job import BatchPaths, BatchRun, read_tasks
from keepwarm.batch.journal import DiskFullError, Entry
from keepwarm.batch.progress import BatchProgress
from keepwarm.batch.runner import RetryRule
from keepwarm.batch.senders import Answer, UnreachableError
from keepwarm.batch.tasks import Task
from keepwarm.batch.watched_directory import WatchedDirectory
from keepwarm.core.prompt import SharedEnd
from keepwarm.errors import ConfigError, EngineDownError

FAST = RetryRule(attempts=3, pause_s=0.001, patience_s=0.2)


def reply(status: int = 200, kind: str = "some_error", **headers: str) -> Answer:
    if status == 200:
        body = {"timings": {"cache_n": 90, "prompt_n": 10, "predicted_n": 4, "prompt_ms": 40}}
    else:
        body = {"error": {"message": f"status {status}", "type": kind}}
    return Answer(
        status, json.dumps(body).encode(), {k.replace("_", "-"): v for k, v in headers.items()}
    )


class Script:
    """A sender that answers by a function; keeps what it was sent and how much at a time."""

    def __init__(self, answer: Callable[[Task, int], Answer | Exception] | None = None) -> None:
        self._answer = answer or (lambda *_: reply())
        self.sent: list[str] = []
        self.filled: list[tuple[str, SharedEnd]] = []
        self.ends: dict[str, Sequence[SharedEnd]] = {}
        self.up = True
        self.refuses = ""
        self.at_once = self.most_at_once = 0

    async def send(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        self.sent.append(task.custom_id)
        self.ends[task.custom_id] = ends
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(0.001)
            answer = self._answer(task, self.sent.count(task.custom_id))
        finally:
            self.at_once -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def fill(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        self.filled.append((task.custom_id, ends[-1]))
        return Answer(
            200, b'{"tokens": 300, "prefilled_tokens": 300, "plan": "cold", "slot": 1}', {}
        )

    async def is_up(self) -> bool:
        return self.up

    async def refusal(self) -> str:
        return self.refuses


def shared(count: int) -> list[bytes]:
    return [line(f"t{i}", f"{document(1)} Part {i}?") for i in range(count)]


class Desk:
    """A task file and what comes of it."""

    def __init__(self, root: Path, lines: list[bytes]) -> None:
        self.paths = BatchPaths.beside(root / "tasks.jsonl", root / "out.jsonl")
        self.paths.tasks.write_bytes(b"".join(lines))

    def job(self, lanes: int = 4) -> BatchRun:
        return BatchRun(self.paths, read_tasks(self.paths.tasks), tier_tokens={}, lanes=lanes)

    async def run(self, sender: Script, *, lanes: int = 4, retry: RetryRule = FAST) -> BatchRun:
        job = self.job(lanes)
        try:
            await job.runner(sender, retry=retry).run()
            job.write_report()
        finally:
            job.close()
        return job

    def ids(self, path: Path) -> list[str]:
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [json.loads(raw)["custom_id"] for raw in lines]

    @property
    def results(self) -> list[str]:
        return self.ids(self.paths.results)

    @property
    def errors(self) -> dict[str, str]:
        raw = self.paths.errors.read_bytes().splitlines() if self.paths.errors.exists() else []
        return {(v := json.loads(x))["custom_id"]: v["error"]["code"] for x in raw}


async def test_each_task_ends_once_with_its_shared_prefix_filled_before(tmp_path: Path) -> None:
    desk, sender = Desk(tmp_path, shared(9)), Script()
    await desk.run(sender, lanes=3)
    assert sorted(desk.results) == sorted(f"t{i}" for i in range(9))
    assert sorted(sender.sent) == sorted(desk.results)
    assert len(sender.filled) == 1
    assert {ends[-1] for ends in sender.ends.values()} == {sender.filled[0][1]}
    assert sender.most_at_once == 3
    report = json.loads(desk.paths.report.read_bytes()) if desk.paths.report else {}
    assert (report["succeeded"], report["failed"], report["left"]) == (9, 0, 0)
    assert report["prefilled_tokens"] == 300 + 90
    assert report["reused_tokens"] == 9 * 90 - 300
    assert desk.paths.picture is not None
    assert desk.paths.picture.read_text().count("</title></rect>") == 10


async def test_a_failure_that_may_pass_is_tried_again_within_the_bound(tmp_path: Path) -> None:
    def answer(task: Task, attempt: int) -> Answer:
        if task.custom_id == "t1":
            return reply(500)
        return reply() if task.custom_id != "t2" or attempt == 3 else reply(429)

    desk, sender = Desk(tmp_path, shared(4)), Script(answer)
    await desk.run(sender)
    assert sorted(desk.results) == ["t0", "t2", "t3"]
    assert desk.errors == {"t1": "some_error"}
    assert (sender.sent.count("t1"), sender.sent.count("t2")) == (3, 3)


async def test_a_refusal_is_not_tried_again_and_its_answer_is_kept(tmp_path: Path) -> None:
    desk, sender = (
        Desk(tmp_path, shared(2)),
        Script(lambda t, _: reply(400 if t.line == 1 else 200)),
    )
    await desk.run(sender)
    assert sender.sent.count("t0") == 1
    error = json.loads(desk.paths.errors.read_bytes())
    assert error["response"]["status_code"] == 400
    assert error["error"]["message"] == "status 400"


async def test_bad_lines_go_to_the_errors_once_and_the_rest_goes_on(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [line("a"), b"{bad\n", line("a"), line("b")])
    await desk.run(Script())
    await desk.run(Script())
    lines = [json.loads(x) for x in desk.paths.errors.read_bytes().splitlines()]
    assert [(x["custom_id"], x["error"]["line"]) for x in lines] == [(None, 2), ("a", 3)]
    assert sorted(desk.results) == ["a", "b"]


async def test_a_server_that_goes_away_is_waited_for_without_charging_tasks(tmp_path: Path) -> None:
    gone = {"left": 5}

    def answer(*_: object) -> Answer | Exception:
        if gone["left"]:
            gone["left"] -= 1
            return UnreachableError("down", begun=False)
        return reply()

    desk = Desk(tmp_path, shared(3))
    job = await desk.run(Script(answer), retry=RetryRule(attempts=1, pause_s=0.001, patience_s=5))
    assert sorted(desk.results) == ["t0", "t1", "t2"]
    assert job.parsed.errors == ()


async def test_a_task_that_takes_the_server_down_each_time_is_given_up(tmp_path: Path) -> None:
    def answer(task: Task, _: int) -> Answer | Exception:
        return UnreachableError("reset", begun=True) if task.custom_id == "t1" else reply()

    desk = Desk(tmp_path, shared(3))
    await desk.run(Script(answer))
    assert desk.errors == {"t1": "connection_lost"}
    assert sorted(desk.results) == ["t0", "t2"]


async def test_failures_are_remembered_over_restarts(tmp_path: Path) -> None:
    class Hangs(Script):
        hanging = asyncio.Event()

        async def send(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
            answer = await super().send(task, ends, lane=lane)
            if len(self.sent) == 2:
                self.hanging.set()
                await asyncio.Event().wait()
            return answer

    desk = Desk(tmp_path, [line("a")])
    sender = Hangs(lambda *_: reply(500))
    job = desk.job()
    running = asyncio.create_task(job.runner(sender, retry=FAST).run())
    await sender.hanging.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    job.close()
    again = Script(lambda *_: reply(500))
    await desk.run(again)
    assert len(again.sent) == 2, "one of three had failed, and one was cut off"
    assert desk.errors == {"a": "some_error"}


async def test_when_the_server_stays_away_what_has_ended_is_kept(tmp_path: Path) -> None:
    sender = Script(lambda t, _: reply() if t.line == 1 else UnreachableError("down", begun=False))
    desk = Desk(tmp_path, [line("a"), line("b")])
    sender_down = sender
    sender_down.up = False
    with pytest.raises(EngineDownError, match="run the same command again"):
        await desk.run(sender_down, lanes=1)
    assert desk.results == ["a"]
    await desk.run(Script())
    assert sorted(desk.results) == ["a", "b"]


async def test_stopping_lets_running_tasks_end_and_begins_none(tmp_path: Path) -> None:
    desk = Desk(tmp_path, shared(12))
    sender = Script()
    job = desk.job(lanes=2)

    def stop(progress: BatchProgress) -> None:
        if progress.ended >= 3:
            runner.stop()

    runner = job.runner(sender, retry=FAST, on_progress=stop)
    await runner.run()
    job.close()
    done = desk.results
    assert 3 <= len(done) <= 5
    assert sorted(sender.sent) == sorted(done)
    rest = Script()
    await desk.run(rest)
    assert sorted(desk.results) == sorted(f"t{i}" for i in range(12))
    assert not set(rest.sent) & set(done)


async def test_dependents_of_a_failed_task_are_told_why(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [line("a"), line("b", depends_on=["a"]), line("c", depends_on=["b"])])
    sender = Script(lambda *_: reply(400))
    await desk.run(sender)
    assert sender.sent == ["a"]
    assert desk.errors == {"a": "some_error", "b": "dependency_failed", "c": "dependency_failed"}


async def test_a_task_that_was_added_behind_an_old_failure_ends_too(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [line("a")])
    await desk.run(Script(lambda *_: reply(400)))
    desk.paths.tasks.write_bytes(line("a") + line("b", depends_on=["a"]))
    await desk.run(Script())
    assert desk.errors == {"a": "some_error", "b": "dependency_failed"}


async def test_the_same_ids_with_other_bodies_are_refused(tmp_path: Path) -> None:
    desk = Desk(tmp_path, [line("a")])
    await desk.run(Script())
    desk.paths.tasks.write_bytes(line("a", "Something else."))
    with pytest.raises(ConfigError, match="other bodies"):
        await desk.run(Script())
    assert desk.results == ["a"]


async def test_a_full_disk_holds_the_result_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, shared(4))
    job = desk.job()
    real, full = job.journal.end, {"times": 3}

    def end(entries: list[Entry]) -> None:
        if full["times"]:
            full["times"] -= 1
            raise DiskFullError("full")
        real(entries)

    monkeypatch.setattr(job.journal, "end", end)
    sender = Script()
    await job.runner(sender, retry=RetryRule(attempts=1, pause_s=0.001, patience_s=0.5)).run()
    job.close()
    assert sorted(desk.results) == ["t0", "t1", "t2", "t3"]
    assert len(sender.sent) == 4


async def test_a_disk_that_stays_full_ends_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, shared(4))
    job = desk.job(lanes=1)

    def end(_: list[Entry]) -> None:
        raise DiskFullError("full")

    monkeypatch.setattr(job.journal, "end", end)
    with pytest.raises(DiskFullError):
        await job.runner(Script(), retry=FAST).run()
    job.close()
    await desk.run(Script())
    assert sorted(desk.results) == ["t0", "t1", "t2", "t3"]


async def test_a_server_that_cant_fill_prefixes_is_served_all_the_same(tmp_path: Path) -> None:
    class Plain(Script):
        async def fill(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
            return reply(404)

    desk = Desk(tmp_path, shared(5))
    await desk.run(Plain())
    assert len(desk.results) == 5


def test_a_dropped_file_has_a_home_of_its_own_until_it_is_done(tmp_path: Path) -> None:
    drop = WatchedDirectory(tmp_path)
    drop.prepare()
    dropped = tmp_path / "night.jsonl"
    dropped.write_bytes(line("a"))
    assert drop.next() is None, "it may still be written"
    long_ago = 1_000_000_000
    os.utime(dropped, (long_ago, long_ago))
    paths = drop.next()
    assert paths is not None
    assert not dropped.exists()
    assert paths.tasks.read_bytes() == line("a")
    dropped.write_bytes(line("b"))
    os.utime(dropped, (long_ago, long_ago))
    assert drop.next() == paths, "what was begun goes on first"
    drop.done(paths)
    other = drop.next()
    assert other is not None
    assert other.tasks.parent != paths.tasks.parent
    assert (tmp_path / "done" / paths.tasks.parent.name / "night.jsonl").exists()
    drop.failed(other)
    assert drop.next() is None
    assert drop.is_empty()


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refusal_of_the_whole_run_is_no_tasks_failure(tmp_path: Path, status: int) -> None:
    desk, sender = Desk(tmp_path, shared(6)), Script(lambda *_: reply(status))
    sender.refuses = "The key isn't known."
    with pytest.raises(EngineDownError, match="key isn't known"):
        await desk.run(sender)
    assert desk.results == []
    assert desk.errors == {}
    sender = Script()
    await desk.run(sender)
    assert len(desk.results) == 6


async def test_a_key_that_is_known_again_lets_the_night_go_on(tmp_path: Path) -> None:
    asked = 0

    def answer(task: Task, attempt: int) -> Answer:
        nonlocal asked
        asked += 1
        return reply(401 if 3 < asked < 9 else 200)

    desk, sender = Desk(tmp_path, shared(6)), Script(answer)
    await desk.run(sender)
    assert len(desk.results) == 6
    assert desk.errors == {}


async def test_a_404_of_a_server_that_takes_the_others_is_the_tasks_own(tmp_path: Path) -> None:
    desk = Desk(tmp_path, shared(4))
    await desk.run(Script(lambda task, _: reply(404 if task.custom_id == "t2" else 200)))
    assert sorted(desk.results) == ["t0", "t1", "t3"]
    assert desk.errors == {"t2": "some_error"}


async def test_a_task_that_ends_the_engine_is_sent_once_more_alone_and_has_failed(
    tmp_path: Path,
) -> None:
    alone: list[bool] = []

    def answer(task: Task, attempt: int) -> Answer:
        if task.custom_id != "t1":
            return reply()
        alone.append(sender.at_once == 1)
        return reply(503, "engine_unavailable")

    desk, sender = Desk(tmp_path, shared(12)), Script(answer)
    await desk.run(sender, retry=RetryRule(attempts=12, pause_s=0.001, patience_s=0.2))
    assert sender.sent.count("t1") == 2
    assert alone[-1], "it was tried beside others, who would have been lost with it"
    assert desk.errors == {"t1": "engine_unavailable"}
    assert len(desk.results) == 11


async def test_a_task_that_the_gateway_found_to_crash_the_engine_is_not_sent_again(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, shared(3))
    sender = Script(
        lambda task, _: reply(502, "engine_crashed") if task.custom_id == "t1" else reply()
    )
    await desk.run(sender)
    assert sender.sent.count("t1") == 1
    assert desk.errors == {"t1": "engine_crashed"}


async def test_what_has_failed_is_run_again_on_demand_and_what_succeeded_is_not(
    tmp_path: Path,
) -> None:
    lines = [*shared(4), line("after", depends_on=["t1"]), b"{no json\n"]
    desk = Desk(tmp_path, lines)
    await desk.run(Script(lambda task, _: reply(400 if task.custom_id == "t1" else 200)))
    assert sorted(desk.results) == ["t0", "t2", "t3"]
    assert desk.errors == {"t1": "some_error", "after": "dependency_failed", None: "invalid_json"}
    sender = Script()
    await desk.run(sender)
    assert sender.sent == [], "without being asked nothing runs again"
    job = BatchRun(
        desk.paths, read_tasks(desk.paths.tasks), tier_tokens={}, lanes=2, retry_failed=True
    )
    await job.runner(sender, retry=FAST).run()
    job.close()
    assert sender.sent == ["t1", "after"]
    assert sorted(desk.results) == ["after", "t0", "t1", "t2", "t3"]
    assert desk.errors == {None: "invalid_json"}


async def test_prompts_stay_in_the_file_and_one_that_was_changed_is_never_sent(
    tmp_path: Path,
) -> None:
    desk = Desk(tmp_path, shared(3))
    parsed = read_tasks(desk.paths.tasks)
    assert all(not task.source.text for task in parsed.tasks)
    body = parsed.tasks[1].body
    desk.paths.tasks.rename(tmp_path / "elsewhere.jsonl")
    assert parsed.tasks[1].body == body
    raw = (tmp_path / "elsewhere.jsonl").read_bytes()
    (tmp_path / "elsewhere.jsonl").write_bytes(raw.replace(b"Part 1?", b"Part 9?"))
    assert parsed.tasks[0].body
    with pytest.raises(ConfigError, match=r"Line 2 .* was changed"):
        _ = parsed.tasks[1].body
