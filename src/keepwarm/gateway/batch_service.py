"""Runs the batches of the API on this very gateway, in the gaps that interactive requests leave.

Theory of operation. One task takes the unfinished batches, the oldest of the namespace that was
served longest ago first, and runs each to its end with the same runner as `keepwarm batch run`.
Its requests go the way of every request, in-process and with a batch's priority, so they get a slot
only when nobody else waits for one. Beyond that a `GapGate` holds the next task back while the
settings' hours are closed, while an interactive request is being served or has just been, and while
the engine isn't there. At most `share` of the slots are used, so that one is free at once for
whoever comes.

A batch that was running when Keepwarm ended goes on at the next start, from its journal.

No batch ends another one, and no task of a batch its others:
1. A task that this gateway can't serve for whatever reason is answered with an error, like a
   request over HTTP.
2. A batch that waits for something (the engine, the disk) lets the others go first meanwhile.
3. A batch that fails in a way nobody foresaw has failed, and is logged. If not even that can be
   written down, it waits, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from keepwarm.batch.hours import Hours
from keepwarm.batch.job import BatchPaths, BatchRun, read_tasks
from keepwarm.batch.journal import UnwritableError
from keepwarm.batch.ledger import Ledger
from keepwarm.batch.outcome import expired
from keepwarm.batch.progress import BatchProgress
from keepwarm.batch.runner import RetryRule, Runner
from keepwarm.batch.senders import Answer, UnreachableError, batch_headers
from keepwarm.batch.tasks import LineError, Parsed, Task
from keepwarm.core.prompt import SharedEnd
from keepwarm.deployment.condition import State
from keepwarm.deployment.life import Life
from keepwarm.errors import EngineDownError, EngineRefusedError, KeepwarmError
from keepwarm.gateway.client_request import ClientRequest
from keepwarm.gateway.door import error_response
from keepwarm.gateway.proxy import Proxy
from keepwarm.gateway.shared_prefix import warm_prefix

log = logging.getLogger("keepwarm")

T = TypeVar("T")

_POLL_S = 0.05
# How long to wait, without news, before the ledger is looked at again.
_IDLE_S = 2.0
# A batch object lists as many bad lines; the error file has all of them.
_MAX_LISTED_ERRORS = 100


class LocalSender:
    """Sends tasks to this process's own gateway, as one namespace."""

    def __init__(self, life: Life, proxy: Proxy, namespace: str) -> None:
        self._life = life
        self._proxy = proxy
        self._namespace = namespace

    async def send(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Send a task. Raises: UnreachableError: the gateway is stopping or has no engine."""
        self._check()
        response = await _outcome(self._proxy.answer(self._asked(task, ends)))
        if isinstance(response, Exception):
            response = _refusal(task, response)
        assert isinstance(response, web.Response)
        assert isinstance(response.body, bytes)
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Answer(response.status, response.body, headers)

    async def fill(self, task: Task, ends: Sequence[SharedEnd], *, lane: int) -> Answer:
        """Fill and save a prefix. Raises: as `send`."""
        self._check()
        warm = await _outcome(warm_prefix(self._life, self._asked(task, ends)))
        if isinstance(warm, Exception):
            response = _refusal(task, warm)
            assert isinstance(response.body, bytes)
            return Answer(response.status, response.body, {})
        return Answer(200, json.dumps(warm.as_dict()).encode(), {})

    async def is_up(self) -> bool:
        """Whether the engine is there and warm."""
        return self._life.state is State.READY

    async def refusal(self) -> str:
        """Always '': no key is asked for here, and no other server could answer."""
        return ""

    def _asked(self, task: Task, ends: Sequence[SharedEnd]) -> ClientRequest:
        return ClientRequest(task.api, task.body, self._namespace, task.url, batch_headers(ends))

    def _check(self) -> None:
        if self._life.state in (State.STOPPING, State.FAILED):
            raise UnreachableError("Keepwarm is stopping or has no engine.", begun=False)


async def _outcome(work: Coroutine[Any, Any, T]) -> T | Exception:
    """What came of some work, or the error that ended it, whichever that is.

    Like the life's `supervise`, for work that is waited for.
    """
    outcomes = await asyncio.gather(work, return_exceptions=True)
    outcome: T | BaseException = outcomes[0]
    if isinstance(outcome, BaseException) and not isinstance(outcome, Exception):
        raise outcome
    return outcome


def _refusal(task: Task, error: Exception) -> web.Response:
    """What a client over HTTP would be answered."""
    if isinstance(error, EngineRefusedError) and error.body:
        return web.Response(body=error.body, status=error.refused_status)
    if isinstance(error, KeepwarmError):
        return error_response(error)
    log.error("the task %r can't be served", task.custom_id, exc_info=error)
    return error_response(KeepwarmError("Keepwarm can't serve this request; its log says why."))


class GapGate:
    """Holds a batch's next task back until it disturbs nobody."""

    def __init__(self, life: Life, hours: Hours, *, gap_s: float) -> None:
        self._life = life
        self._hours = hours
        self._gap_s = gap_s
        self._busy_s = -math.inf

    async def wait(self) -> None:
        """Until nobody interactive is served or was within `gap_s`, and the hours are open."""
        while not self._is_open():  # noqa: ASYNC110 - the clock and other requests open it
            await asyncio.sleep(_POLL_S)

    def _is_open(self) -> bool:
        life = self._life
        if life.state is not State.READY:
            return False
        now_s = time.monotonic()
        if life.serves_people:
            self._busy_s = now_s
        return now_s - self._busy_s >= self._gap_s and self._hours.is_open(minute_of_day())


def minute_of_day() -> float:
    """Of the local day, 0 to 1440."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min + now.tm_sec / 60


class BatchService:
    """See the module."""

    def __init__(
        self, life: Life, proxy: Proxy, ledger: Ledger, *, hours: Hours, retry: RetryRule
    ) -> None:
        self._life = life
        self._proxy = proxy
        self._ledger = ledger
        self._retry = retry
        self._gate = GapGate(life, hours, gap_s=life.settings.batch.gap_s)
        self._news = asyncio.Event()
        self._served: dict[str, int] = {}
        self._running: tuple[str, Runner, dict[str, int]] | None = None

    def created(self) -> None:
        """There is a new batch."""
        self._news.set()

    def cancelled(self, batch_id: str) -> None:
        """A batch is to end: what it has in flight does first."""
        self._news.set()
        if self._running and self._running[0] == batch_id:
            self._running[1].stop()

    def counts(self, batch: dict[str, Any]) -> dict[str, int]:
        """A batch's counts at this moment."""
        if self._running and self._running[0] == batch["id"]:
            return _counts(self._running[1].progress, self._running[2])
        return dict(batch["request_counts"])

    async def run(self) -> None:
        """Run batches for as long as the gateway lives."""
        while True:
            self._news.clear()
            try:
                batch = self._next() if self._life.state is State.READY else None
            except KeepwarmError as error:
                log.error("batches wait: %s", error)
                batch = None
            if batch is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_IDLE_S):
                        await self._news.wait()
                continue
            if not await self._attempt(batch):
                await asyncio.sleep(_IDLE_S)

    async def _attempt(self, batch: dict[str, Any]) -> bool:
        """Run a batch; False if it waits for something. See 2 and 3 in the module's text."""
        error = await _outcome(self._run_one(batch))
        if error is None:
            return True
        if isinstance(error, (UnwritableError, EngineDownError)):
            log.error("batch %s waits: %s", batch["id"], error)
            return False
        log.error("batch %s failed", batch["id"], exc_info=error)
        is_ours = isinstance(error, KeepwarmError)
        text = str(error) if is_ours else "Keepwarm can't run this batch; its log says why."
        errors = _errors([LineError(0, "batch_failed", text)])
        unwritten = await _outcome(self._finish(batch["id"], "failed", errors=errors))
        if unwritten is not None:
            log.error("batch %s: its end can't be written: %s", batch["id"], unwritten)
        return unwritten is None

    def _next(self) -> dict[str, Any] | None:
        waiting = self._ledger.unfinished()
        if not waiting:
            return None
        # The oldest batch of whoever was served longest ago: a pile of one doesn't shut others out.
        batch = min(waiting, key=lambda b: self._served.get(b["namespace"], 0))
        self._served[batch["namespace"]] = max(self._served.values(), default=0) + 1
        return batch

    async def _run_one(self, batch: dict[str, Any]) -> None:
        batch_id = batch["id"]
        paths = self._ledger.paths(batch_id)
        if batch["status"] == "cancelling" and not paths.journal.exists():
            await self._finish(batch_id, "cancelled")
            return
        parsed = await self._whole(batch)
        listed = _errors(parsed.errors[:_MAX_LISTED_ERRORS])
        if not parsed.tasks:
            empty = _errors([LineError(0, "empty_file", "The file holds no task.")])
            await self._finish(batch_id, "failed", errors=listed or empty)
            return
        if batch["status"] == "validating":
            self._ledger.change(batch_id, status="in_progress", errors=listed)
        bad = len(parsed.errors)
        counts = {"total": len(parsed.tasks) + bad, "completed": 0, "failed": bad}
        for part in self._by_model(parsed):
            job = await asyncio.to_thread(self._job, paths, part)
            try:
                ended = await self._run_job(batch, job, counts)
            finally:
                job.close()
            if ended is None:
                return
            counts = ended
        await self._finish(batch_id, "completed", request_counts=counts)
        log.info("batch %s completed: %s", batch_id, counts)

    def _by_model(self, parsed: Parsed) -> list[Parsed]:
        """A batch cut by model, so that each is loaded once; the one that is loaded comes first.

        Tasks that wait for others of another model keep it whole.
        """
        models = self._life.models
        if not models.several:
            return [parsed]
        parts: dict[str, list[Task]] = {}
        for task in parsed.tasks:
            model, _ = models.addressed(task.body.get("model"))
            parts.setdefault(model.name, []).append(task)
        for tasks in parts.values():
            own = {task.custom_id for task in tasks}
            if not all(own.issuperset((*task.after, *task.depends_on)) for task in tasks):
                return [parsed]
        ordered = sorted(parts, key=lambda name: not models.by_name[name].is_open)
        return [Parsed(tuple(parts[name]), parsed.errors) for name in ordered]

    def _read(self, path: Path, endpoint: str) -> Parsed:
        limit = self._life.settings.server.max_body_bytes
        return read_tasks(path, endpoint=endpoint, max_body_bytes=limit)

    def _job(self, paths: BatchPaths, parsed: Parsed) -> BatchRun:
        model, _ = self._life.models.addressed(parsed.tasks[0].body.get("model"))
        deployment, learned = model.deployment, model.learned
        slots = model.settings.engine.slots
        if deployment is not None and deployment.is_open:
            slots = len(deployment.dispatcher.scheduler.slots)
        warmed = deployment.prefixes.warmed if deployment is not None else []
        return BatchRun(
            paths,
            parsed,
            tier_tokens={one.name.removeprefix("tier:"): one.tokens for one in warmed},
            lanes=max(int(slots * self._life.settings.batch.share), 1),
            tokens_per_char=learned.rates.tokens_per_char.value if learned else None,
        )

    async def _run_job(
        self, batch: dict[str, Any], job: BatchRun, before: dict[str, int]
    ) -> dict[str, int] | None:
        """Run one part of a batch; `before` are the counts of those that have ended.

        Returns:
            The counts, this part's among them; None if the batch has ended, or waits.
        """
        batch_id = batch["id"]
        sender = LocalSender(self._life, self._proxy, batch["namespace"])
        runner = job.runner(sender, retry=self._retry, gate=self._gate)
        self._running = (batch_id, runner, before)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(max(batch["expires_at"] - time.time(), 0.0), runner.stop)
        try:
            if self._ledger.status(batch_id) != "cancelling":
                await runner.run()
            counts = _counts(runner.progress, before)
            if runner.is_complete:
                return counts
            await self._end(batch, job, counts)
            return None
        finally:
            timer.cancel()
            self._running = None

    async def _end(self, batch: dict[str, Any], job: BatchRun, counts: dict[str, int]) -> None:
        """End a batch that isn't complete, unless it goes on at the next start."""
        if self._ledger.status(batch["id"]) == "cancelling":
            status = "cancelled"
        elif time.time() >= batch["expires_at"]:
            status = "expired"
            known = job.journal.ended()
            tasks = (await self._whole(batch)).tasks
            left = [task for task in tasks if task.custom_id not in known]
            await asyncio.to_thread(job.journal.end, [expired(task) for task in left])
            counts["failed"] += len(left)
        else:
            return  # Keepwarm is stopping; the batch goes on at the next start.
        await self._finish(batch["id"], status, request_counts=counts)
        log.info("batch %s %s: %s", batch["id"], status, counts)

    async def _whole(self, batch: dict[str, Any]) -> Parsed:
        path = self._ledger.paths(batch["id"]).tasks
        return await asyncio.to_thread(self._read, path, batch["endpoint"])

    async def _finish(self, batch_id: str, status: str, **changes: Any) -> None:
        def finish() -> None:
            self._ledger.finish(batch_id, status=status, **changes)

        await asyncio.to_thread(finish)


def _counts(progress: BatchProgress, before: Mapping[str, int]) -> dict[str, int]:
    """A batch's counts, by those of what ended before and how far the part that runs is."""
    return {
        "total": before["total"],
        "completed": before["completed"] + progress.ended - progress.failed,
        "failed": before["failed"] + progress.failed,
    }


def _errors(errors: Sequence[LineError]) -> dict[str, Any] | None:
    return {"object": "list", "data": [e.as_dict() for e in errors]} if errors else None
