"""`keepwarm batch`: plan a pile of tasks, run it, or watch a directory for piles."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from keepwarm.batch.hours import Hours, parse_hours
from keepwarm.batch.job import BatchPaths, BatchRun, read_tasks
from keepwarm.batch.planner import plan as plan_night
from keepwarm.batch.runner import RetryRule, Runner
from keepwarm.batch.tree import build_tree
from keepwarm.batch.watched_directory import WatchedDirectory
from keepwarm.cli import options as opt
from keepwarm.cli.batch_session import BatchSession, estimated_tiers, read_key, session
from keepwarm.cli.batch_view import NightBar, plan_as_dict, show_end, show_line_errors, show_plan
from keepwarm.cli.output import err, fail, print_json
from keepwarm.errors import ConfigError
from keepwarm.gateway.batch_service import minute_of_day
from keepwarm.settings import Places, Settings

app = typer.Typer(
    help="Run piles of tasks (OpenAI batch files) in the order that reuses most.",
    no_args_is_help=True,
)

Base = Annotated[
    str | None,
    typer.Option("--base", metavar="URL", help="A running Keepwarm. [default: start one]"),
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="File with the API key for --base."),
]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", metavar="N", min=1, help="Tasks at a time. [default: its slots]"),
]
HoursOption = Annotated[
    str, typer.Option("--hours", metavar="HH:MM-HH:MM", help="Begin tasks only in these hours.")
]
Attempts = Annotated[
    int, typer.Option("--attempts", min=1, help="How often a task is tried before it has failed.")
]
Wait = Annotated[
    float,
    typer.Option("--wait", metavar="SECONDS", min=0, help="How long Keepwarm may be away."),
]


@dataclass(frozen=True, slots=True)
class _Wishes:
    """How a command wants its tasks run."""

    settings: Settings
    places: Places
    base: str | None
    key: str | None
    parallel: int | None
    hours: Hours
    retry: RetryRule
    sync: bool
    retry_failed: bool = False


class _Stop:
    """Ctrl-C and SIGTERM: the first lets running tasks end, the second doesn't wait for them."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.runner: Runner | None = None
        self._main = asyncio.current_task()

    def night(self) -> None:
        """The night is over: running tasks end, and no other begins."""
        if self.runner:
            self.runner.stop()

    def __call__(self) -> None:
        if self.wanted.is_set():
            if self._main:
                self._main.cancel()
            return
        self.wanted.set()
        err.print("stopping: running tasks end first; once more drops them for the next run")
        self.night()


class _HoursGate:
    """Lets tasks begin within the hours. `closed` is called outside them, else it is waited for."""

    def __init__(self, hours: Hours, closed: Callable[[], None] | None) -> None:
        self._hours = hours
        self._closed = closed

    async def wait(self) -> None:
        """Until the hours are open; the clock may be set meanwhile, so it is looked at again."""
        while (minutes := self._hours.opens_in_min(minute_of_day())) > 0:
            if self._closed:
                self._closed()
                return
            await asyncio.sleep(min(minutes * 60, 10.0))


@app.command("plan")
def plan(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS.jsonl", help="An OpenAI batch file.")],
    config: opt.ConfigFile = None,
    base: Base = None,
    key_file: KeyFile = None,
    slots: opt.SlotCount = None,
    tiers: opt.Tiers = None,
    as_json: opt.Json = False,
) -> None:
    """Show what tasks share, and what a night with them would cost. Nothing is run.

    With --base the tiers' lengths are those of a running Keepwarm; without, they are estimated.
    """
    settings, places = opt.settings_from(config, {"engine.slots": slots, "tiers.dir": tiers})
    parsed = read_tasks(tasks, max_body_bytes=settings.server.max_body_bytes)
    lanes, nodes = settings.engine.slots, 1
    if base is None:
        tier_tokens = estimated_tiers(settings, places)
    else:
        there = asyncio.run(_looked_at(settings, places, base, read_key(key_file)))
        tier_tokens, lanes = dict(there.tier_tokens), slots or there.slots
        nodes = there.nodes
    tree = build_tree(parsed.tasks, tier_tokens=tier_tokens)
    night = plan_night(tree, lanes=lanes, now_s=time.time(), nodes=nodes)
    if as_json:
        print_json(plan_as_dict(tree, night, parsed, lanes))
    else:
        show_plan(tree, night, parsed, lanes)
    if not parsed.tasks:
        raise ConfigError(f"{tasks} holds no task that can be run.")


async def _looked_at(
    settings: Settings, places: Places, base: str, key: str | None
) -> BatchSession:
    async with session(settings, places, base=base, key=key, wait_s=10) as there:
        return there


@app.command("run")
def run(
    tasks: Annotated[Path, typer.Argument(metavar="TASKS.jsonl", help="An OpenAI batch file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="RESULTS.jsonl", help="Where results go.")
    ],
    config: opt.ConfigFile = None,
    base: Base = None,
    key_file: KeyFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    upstream: opt.Upstream = None,
    slot_dir: opt.SlotDir = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    store: opt.StoreDir = None,
    parallel: Parallel = None,
    hours: HoursOption = "",
    attempts: Attempts = 4,
    wait: Wait = 600.0,
    sync: Annotated[
        bool,
        typer.Option(
            "--sync/--no-sync", help="Flush each result to the disk; --no-sync: leave that to it."
        ),
    ] = True,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Run those again that failed in earlier runs."),
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Run tasks against a running Keepwarm (--base), or one of its own with `serve`'s options.

    Each task ends exactly once in RESULTS.jsonl or RESULTS.errors.jsonl. Whatever ends the command,
    running it again goes on where it stopped. Exit status 0 when every task has succeeded.

    Examples:

      keepwarm batch run tasks.jsonl -o results.jsonl --base http://127.0.0.1:8090

      keepwarm batch run tasks.jsonl -o results.jsonl --model m.gguf --hours 22:00-07:00
    """
    flags = opt.engine_flags(
        model=model,
        engine=engine,
        upstream=upstream,
        slot_dir=slot_dir,
        slots=slots,
        context=context,
        threads=threads,
        tiers=tiers,
        chat_template=chat_template,
        store=store,
    )
    wishes = _wishes(config, flags, base, key_file, parallel, hours, attempts, wait, sync)
    wishes = replace(wishes, retry_failed=retry_failed)
    report = asyncio.run(_run(wishes, BatchPaths.beside(tasks, output)))
    if as_json:
        print_json(report)
    if report["failed"] or report["left"] or report["unusable_lines"]:
        sys.exit(1)


@app.command("watch")
def watch(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where task files (*.jsonl) are dropped.")
    ],
    config: opt.ConfigFile = None,
    base: Base = None,
    key_file: KeyFile = None,
    model: opt.Model = None,
    engine: opt.Engine = None,
    upstream: opt.Upstream = None,
    slot_dir: opt.SlotDir = None,
    slots: opt.SlotCount = None,
    context: opt.Context = None,
    threads: opt.Threads = None,
    tiers: opt.Tiers = None,
    chat_template: opt.ChatTemplate = None,
    store: opt.StoreDir = None,
    parallel: Parallel = None,
    hours: HoursOption = "",
    attempts: Attempts = 4,
    wait: Wait = 600.0,
    once: Annotated[
        bool, typer.Option("--once", help="End when no file is left, or the --hours are over.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", metavar="SECONDS", min=0.1, help="How often to look.")
    ] = 5.0,
) -> None:
    """Run each task file that is dropped into DIR, the oldest first.

    A file is moved to a directory of its own in DIR/running, where its results come to, and that to
    DIR/done when all its tasks have ended. It is taken when it hasn't changed for a second; better,
    write it elsewhere and move it there. Failed tasks are in the errors and don't end the command.
    """
    flags = opt.engine_flags(
        model=model,
        engine=engine,
        upstream=upstream,
        slot_dir=slot_dir,
        slots=slots,
        context=context,
        threads=threads,
        tiers=tiers,
        chat_template=chat_template,
        store=store,
    )
    wishes = _wishes(config, flags, base, key_file, parallel, hours, attempts, wait, True)
    asyncio.run(_watch(wishes, WatchedDirectory(directory), once=once, every_s=every))


def _wishes(
    config: Path | None,
    flags: dict[str, Any],
    base: str | None,
    key_file: Path | None,
    parallel: int | None,
    hours: str,
    attempts: int,
    wait_s: float,
    sync: bool,
) -> _Wishes:
    settings, places = opt.settings_from(config, flags)
    return _Wishes(
        settings,
        places,
        base,
        read_key(key_file),
        parallel,
        parse_hours(hours),
        RetryRule(attempts=attempts, patience_s=wait_s),
        sync,
    )


@asynccontextmanager
async def _stoppable() -> AsyncIterator[_Stop]:
    stop = _Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield stop
    except asyncio.CancelledError:
        err.print("stopped: what has ended is kept, the same command goes on from there")
        raise typer.Exit(130) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(wishes: _Wishes, paths: BatchPaths) -> dict[str, Any]:
    async with _stoppable() as stop, _session(wishes, stop) as there:
        return await _run_file(wishes, paths, there, stop)


@asynccontextmanager
async def _session(wishes: _Wishes, stop: _Stop) -> AsyncIterator[BatchSession]:
    """A session; Ctrl-C before it is there ends the command at once."""
    opened = session(
        wishes.settings,
        wishes.places,
        base=wishes.base,
        key=wishes.key,
        wait_s=wishes.retry.patience_s,
    )
    entering = asyncio.ensure_future(opened.__aenter__())
    stopping = asyncio.ensure_future(stop.wanted.wait())
    try:
        await asyncio.wait([entering, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not entering.done():
            entering.cancel()
            raise asyncio.CancelledError
        there = await entering
    finally:
        stopping.cancel()
    try:
        yield there
    finally:
        await opened.__aexit__(None, None, None)


async def _run_file(
    wishes: _Wishes,
    paths: BatchPaths,
    there: BatchSession,
    stop: _Stop,
    *,
    ends_with_hours: bool = False,
) -> dict[str, Any]:
    parsed = await asyncio.to_thread(read_tasks, paths.tasks, max_body_bytes=there.max_body_bytes)
    show_line_errors(parsed)
    job = await asyncio.to_thread(
        lambda: BatchRun(
            paths,
            parsed,
            tier_tokens=there.tier_tokens,
            lanes=wishes.parallel or there.slots,
            tokens_per_char=there.tokens_per_char,
            sync=wishes.sync,
            nodes=there.nodes,
            retry_failed=wishes.retry_failed,
        )
    )
    try:
        with NightBar(paths.tasks.name) as bar:
            runner = job.runner(
                there.sender,
                retry=wishes.retry,
                gate=_HoursGate(wishes.hours, stop.night if ends_with_hours else None),
                on_progress=bar.show,
            )
            stop.runner = runner
            if stop.wanted.is_set():
                runner.stop()
            try:
                await runner.run()
            finally:
                stop.runner = None
        report = await asyncio.to_thread(job.write_report)
        show_end(report, paths)
        return report
    finally:
        job.close()


async def _watch(wishes: _Wishes, drop: WatchedDirectory, *, once: bool, every_s: float) -> None:
    async with _stoppable() as stop:
        drop.prepare()
        while not stop.wanted.is_set():
            if once and not wishes.hours.is_open(minute_of_day()):
                err.print("outside the hours: what is left waits for the next time")
                return
            if (paths := drop.next()) is None:
                if once and drop.is_empty():
                    return
                await _pause(stop, min(every_s, 1.0) if once else every_s)
                continue
            # Keepwarm is there only while there is something to do.
            async with _session(wishes, stop) as there:
                while paths is not None and not stop.wanted.is_set():
                    is_done = await _run_dropped(wishes, drop, paths, there, stop, once=once)
                    paths = drop.next() if is_done else None


async def _run_dropped(
    wishes: _Wishes,
    drop: WatchedDirectory,
    paths: BatchPaths,
    there: BatchSession,
    stop: _Stop,
    *,
    once: bool,
) -> bool:
    """Run one file and put it away; False if tasks of it are left."""
    try:
        report = await _run_file(wishes, paths, there, stop, ends_with_hours=once)
    except ConfigError as error:
        fail(str(error))
        drop.failed(paths)
        return True
    if report["left"]:
        return False
    drop.done(paths)
    return True


async def _pause(stop: _Stop, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wanted.wait(), seconds)
    except TimeoutError:
        return
