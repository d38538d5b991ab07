"""Run a night: lanes that take work, send it, and write down what came of it.

Theory of operation. `Night` owns who does what; the journal owns what has ended; this module only
carries out. A lane holds one task at a time and tries it again itself, after a pause, if its
failure may pass; so a server that is short of something is asked more slowly. While the server
can't be reached at all, no task is charged for it: lanes wait until it answers, within
`patience_s`. The same goes for a disk that can't be written: the result is held, nothing new is
begun, and the write is tried again.

What comes back for a task, and what follows:

    200                              a result
    passing (429, 500, ...)          tried again, `attempts` times
    401, 403; 404 from who is        the run's fault, not the task's (a key, an address): waited for
      no Keepwarm                      like a server that is away, and no task is charged for it
    the engine died with it          once more, and then alone if it may be why: of what runs beside
                                       others nobody knows which one it was; dies it alone, it fails
    other                            a failure

`stop` lets running tasks end. Cancelling `run` drops them; they begin anew in the next run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec

from keepwarm.batch.floor import Floor
from keepwarm.batch.journal import Entry, Journal, UnwritableError
from keepwarm.batch.night import FillBranch, Night, RunTask
from keepwarm.batch.outcome import failure, lost, row_of, success, unusable
from keepwarm.batch.planner import BatchPlan
from keepwarm.batch.progress import BatchProgress, work_seconds
from keepwarm.batch.senders import Answer, Sender, UnreachableError
from keepwarm.batch.tasks import LineError, Task
from keepwarm.batch.tree import PrefixTree
from keepwarm.errors import EngineDownError

# Statuses after which the same request may succeed: overload, restarts, a lost engine.
_PASSING = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
# Keepwarm is there and its engine isn't: no use in asking before it says that it is well.
_ENGINE_GONE = frozenset((502, 503))
# The words for it: the gateway's own verdict on a request, and an engine that was lost.
_CRASHED = "engine_crashed"
_DIED = frozenset(("engine_unavailable", "upstream_error"))
# Who is asked doesn't take this run's requests, whatever they are.
_STRANGERS = frozenset((401, 403, 404))
_MAX_PAUSE_S = 60.0
_GO_ON = "What has ended is kept: run the same command again to go on."
_FULL_DISK_PAUSE_S = 5.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryRule:
    """How failures are met.

    A task is tried `attempts` times, `pause_s` apart at first and twice as long each time. The
    server may be unreachable, or the disk full, for `patience_s`.
    """

    attempts: int = 4
    pause_s: float = 1.0
    patience_s: float = 600.0


class Gate(Protocol):
    """When the next task may begin."""

    async def wait(self) -> None:
        """Until it may."""


class _StoppedError(Exception):
    """`stop` was called while a lane waited; what it held begins anew in the next run."""


class _Open:
    async def wait(self) -> None:
        return


class Runner:
    """See the module. Make it, `run` it once."""

    def __init__(
        self,
        tree: PrefixTree,
        plan: BatchPlan,
        sender: Sender,
        journal: Journal,
        *,
        lanes: int,
        retry: RetryRule | None = None,
        gate: Gate | None = None,
        on_progress: Callable[[BatchProgress], None] | None = None,
        errors: Sequence[LineError] = (),
    ) -> None:
        """Prepare a run; nothing is sent yet.

        Args:
            tree, plan: the tasks and how they are run.
            sender: where to.
            journal: what has ended so far; it stays open.
            lanes: tasks in flight at a time.
            retry, gate: how failures are met, and when tasks may begin.
            on_progress: called on the event loop whenever something has changed.
            errors: lines that can't run; they go to the error file first.
        """
        self._tree = tree
        self._sender = sender
        self._journal = journal
        self._lanes = lanes
        self._retry = retry or RetryRule()
        self._gate = gate or _Open()
        self._told = on_progress or (lambda _: None)
        self._errors = errors
        self._known = known = journal.ended()
        ended = {
            index: known[task.custom_id][0]
            for index, task in enumerate(tree.tasks)
            if task.custom_id in known
        }
        self._failures = journal.failures()
        self._night: Night = plan.night(tree, ended)
        self._floor = Floor()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self.progress = BatchProgress(
            total=len(tree.tasks),
            ended=len(ended),
            failed=sum(not ok for ok in ended.values()),
            ended_before=len(ended),
        )
        self._work_s = work_seconds(tree, plan)
        self.progress.work_total_s = sum(self._work_s.values())

    @property
    def is_complete(self) -> bool:
        """Whether every task has ended."""
        return self._night.left == 0

    def stop(self) -> None:
        """Begin nothing more; `run` returns when what runs has ended."""
        self._stopping.set()
        self._changed.set()

    async def run(self) -> None:
        """Run until all has ended, or `stop`.

        Raises:
            EngineDownError: the server wasn't there for `patience_s`.
            UnwritableError: nor was there space. In both cases what has ended is kept.
        """
        try:
            await self._write_down(self._unable())
            lanes = [asyncio.create_task(self._lane(lane)) for lane in range(self._lanes)]
            try:
                await _all_or_first_error(lanes, self.stop)
            finally:
                for lane in lanes:
                    lane.cancel()
                await asyncio.gather(*lanes, return_exceptions=True)
            if self.is_complete:
                await self._in_thread(self._journal.finish)
        finally:
            self._thread.shutdown()

    async def _lane(self, lane: int) -> None:
        while not self._stopping.is_set():
            await self._unless_stopped(self._gate.wait())
            if self._stopping.is_set():
                return
            work = self._night.take(lane, time.time())
            if work is None:
                if self._night.left == 0:
                    self._changed.set()
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            self.progress.running += 1
            self._told(self.progress)
            try:
                if isinstance(work, FillBranch):
                    await self._fill(lane, work)
                else:
                    await self._run_task(lane, work)
            except _StoppedError:
                return
            finally:
                self.progress.running -= 1
                self._changed.set()
                self._told(self.progress)

    async def _fill(self, lane: int, work: FillBranch) -> None:
        ok = False
        try:
            task = self._tree.tasks[work.leaf]
            path = self._tree.leaves[work.leaf].branches
            above = path[: path.index(work.branch) + 1]
            ends = [end for b in above if (end := self._tree.branches[b].end) is not None]
            began_s = time.time()
            for attempt in range(self._retry.attempts):
                answer = await self._welcome(
                    lambda: self._sender.fill(task, ends, lane=lane), _STRANGERS - {404}
                )
                if answer is not None and answer.status not in _PASSING:
                    break
                await self._pause(attempt, answer)
            ok = answer is not None and answer.status == 200
            if answer is not None and ok:
                await self._note_fill(lane, answer, began_s)
        finally:
            self._night.filled(work.branch, ok=ok)

    async def _note_fill(self, lane: int, answer: Answer, began_s: float) -> None:
        try:
            said = msgspec.json.decode(answer.body, type=dict)
        except msgspec.MsgspecError:
            return  # no Keepwarm's answer: the tasks themselves will tell
        stats = {
            "lane": lane,
            "slot": row_of(answer, slot=said.get("slot", lane), lane=lane),
            "began_s": began_s,
            "ended_s": time.time(),
            "plan": said.get("plan", ""),
            "tokens": said.get("tokens", 0),
            "prefilled": said.get("prefilled_tokens", 0),
        }
        self.progress.prefilled_tokens += stats["prefilled"]
        await self._patiently(lambda: self._journal.fill(stats))

    async def _run_task(self, lane: int, work: RunTask) -> None:
        task = self._tree.tasks[work.leaf]
        began_s = time.time()
        done = False
        try:
            entry = await self._tried(lane, task, self._tree.ends(work.leaf), began_s)
            gone = self._night.ended(work.leaf, ok=entry.ok)
            done = True
            self._count(work.leaf, entry)
            await self._write_down(
                [entry, *(lost(self._tree.tasks[i], repr(task.custom_id)) for i in gone)]
            )
            for index in gone:
                self._count(index, None)
        finally:
            if not done:
                self._night.requeue(work.leaf)

    async def _tried(self, lane: int, task: Task, ends: Sequence[Any], began_s: float) -> Entry:
        """Send a task until it has ended, well or not."""
        failures = self._failures.get(task.custom_id, 0)
        is_suspect = False
        while True:
            async with self._floor.taken(alone=is_suspect):
                if self._stopping.is_set() and is_suspect:
                    raise _StoppedError
                sent_s = time.time()
                answer = await self._welcome(lambda: self._sender.send(task, ends, lane=lane))
            stats = {"lane": lane, "began_s": began_s, "sent_s": sent_s, "ended_s": time.time()}
            stats["attempts"] = failures + 1
            if answer is not None and answer.status == 200:
                return success(task, answer, stats)
            failures += 1
            died = answer is not None and answer.status in _ENGINE_GONE
            if answer is not None and (answer.status not in _PASSING or answer.kind == _CRASHED):
                return failure(task, answer, stats)
            if failures >= self._retry.attempts or (died and is_suspect):
                return failure(task, answer, stats)
            self._failures[task.custom_id] = failures
            await self._patiently(lambda: self._journal.failed(task.custom_id))
            if died:
                is_suspect = is_suspect or (answer is not None and answer.kind in _DIED)
                deadline_s = time.monotonic() + self._retry.patience_s
                await self._until_up(deadline_s, "Keepwarm's engine is gone.")
            await self._pause(failures - 1, answer)

    async def _pause(self, failures: int, answer: Answer | None) -> None:
        """Wait before another try."""
        pause_s = self._retry.pause_s * 2**failures
        if answer is not None and answer.retry_after_s is not None:
            pause_s = max(pause_s, answer.retry_after_s)
        await self._unless_stopped(asyncio.sleep(min(pause_s, _MAX_PAUSE_S)))
        if self._stopping.is_set():
            raise _StoppedError

    async def _welcome(
        self, send: Callable[[], Awaitable[Answer]], strangers: Set[int] = _STRANGERS
    ) -> Answer | None:
        """As `_answered`; what would be refused whatever was sent is waited for.

        Raises:
            EngineDownError: it is so for longer than `patience_s`.
        """
        deadline_s = time.monotonic() + self._retry.patience_s
        while True:
            answer = await self._answered(send)
            if answer is None or answer.status not in strangers:
                return answer
            why = await self._sender.refusal()
            if not why and answer.status == 404:
                return answer  # something in the task that isn't there: a model, an adapter
            why = why or f"Keepwarm refuses every request (HTTP status {answer.status})."
            if time.monotonic() > deadline_s:
                raise EngineDownError(f"{why} {_GO_ON}")
            self.progress.waiting_for = "the right key or address"
            self._told(self.progress)
            await self._unless_stopped(asyncio.sleep(min(self._retry.pause_s, 1.0)))
            if self._stopping.is_set():
                raise _StoppedError
            self.progress.waiting_for = ""

    async def _answered(self, send: Callable[[], Awaitable[Answer]]) -> Answer | None:
        """An answer; None if the server went away while it had the request.

        Raises:
            EngineDownError: it can't be reached for longer than `patience_s`.
        """
        deadline_s = time.monotonic() + self._retry.patience_s
        while True:
            try:
                answer = await send()
            except UnreachableError as error:
                await self._until_up(deadline_s, str(error))
                if error.begun:
                    return None
            else:
                return answer

    async def _until_up(self, deadline_s: float, why: str) -> None:
        self.progress.waiting_for = "Keepwarm to come back"
        self._told(self.progress)
        while not await self._sender.is_up():
            if self._stopping.is_set():
                raise _StoppedError
            if time.monotonic() > deadline_s:
                raise EngineDownError(f"{why} {_GO_ON}")
            await self._unless_stopped(asyncio.sleep(min(self._retry.pause_s, 1.0)))
        self.progress.waiting_for = ""

    def _count(self, index: int, entry: Entry | None) -> None:
        progress = self.progress
        progress.ended += 1
        progress.work_done_s += self._work_s.get(index, 0.0)
        if entry is None or not entry.ok:
            progress.failed += 1
        if entry is not None:
            progress.prefilled_tokens += entry.stats.get("prefilled", 0)
            progress.reused_tokens += entry.stats.get("cached", 0)

    def _unable(self) -> list[Entry]:
        """What can't run: bad lines, and tasks that depend on a failure of an earlier run."""
        out = [unusable(error) for error in self._errors]
        for index, task in enumerate(self._tree.tasks):
            if self._night.has_ended(index) and task.custom_id not in self._known:
                out.append(lost(task, "a task"))
                self._count(index, None)
        return out

    async def _write_down(self, entries: list[Entry]) -> None:
        if entries:
            await self._patiently(lambda: self._journal.end(entries))

    async def _patiently(self, write: Callable[[], None]) -> None:
        """Write; while the disk is full, hold what is to be written and try again."""
        deadline_s = time.monotonic() + self._retry.patience_s
        while True:
            try:
                await self._in_thread(write)
            except UnwritableError:
                self.progress.waiting_for = "space on the disk"
                self._told(self.progress)
                if time.monotonic() > deadline_s or self._stopping.is_set():
                    raise
                pause_s = min(_FULL_DISK_PAUSE_S, self._retry.patience_s / 10)
                await self._unless_stopped(asyncio.sleep(pause_s))
            else:
                self.progress.waiting_for = ""
                return

    async def _in_thread(self, work: Callable[[], T]) -> T:
        # A commit takes milliseconds of disk, and a gateway's streams may share this loop. Once
        # begun it is waited for: a result that was answered is written even if the lane is ended.
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await asyncio.shield(future)

    async def _unless_stopped(self, wait: Awaitable[Any]) -> None:
        """Wait for something, or for `stop`."""
        waits = [asyncio.ensure_future(wait), asyncio.ensure_future(self._stopping.wait())]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()
        for one in done:
            one.result()


async def _all_or_first_error(
    lanes: Sequence[asyncio.Task[None]], stop: Callable[[], None]
) -> None:
    """Wait for all lanes; when one fails, let the others end what they run, then raise."""
    await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
    stop()
    await asyncio.wait(lanes)
    for lane in lanes:
        lane.result()
