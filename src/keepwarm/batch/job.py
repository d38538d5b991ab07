"""One task file from reading it to its report: what the command and the gateway both do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from keepwarm.batch.journal import Journal
from keepwarm.batch.outcome import changed_tasks
from keepwarm.batch.picture import night_svg
from keepwarm.batch.planner import BatchPlan, plan
from keepwarm.batch.progress import BatchProgress
from keepwarm.batch.report import build_report
from keepwarm.batch.runner import Gate, RetryRule, Runner
from keepwarm.batch.senders import Sender
from keepwarm.batch.tasks import Parsed, TaskFile, parse_tasks
from keepwarm.batch.tree import PrefixTree, build_tree
from keepwarm.errors import ConfigError, KeepwarmError


@dataclass(frozen=True, slots=True)
class BatchPaths:
    """A night's files. `report` and `picture` are None where nobody wants them."""

    tasks: Path
    results: Path
    errors: Path
    journal: Path
    report: Path | None = None
    picture: Path | None = None

    @staticmethod
    def beside(tasks: Path, results: Path) -> BatchPaths:
        """The names a command uses: `results.jsonl` and what lies beside it."""
        stem = results.name.removesuffix(".jsonl")
        return BatchPaths(
            tasks,
            results,
            results.with_name(f"{stem}.errors.jsonl"),
            results.with_name(f"{results.name}.journal"),
            results.with_name(f"{stem}.report.json"),
            results.with_name(f"{stem}.night.svg"),
        )


def read_tasks(
    path: Path, *, endpoint: str | None = None, max_body_bytes: int | None = None
) -> Parsed:
    """Read a task file. It stays open for as long as one of its tasks is there.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        file = path.open("rb")
        return parse_tasks(
            file, endpoint=endpoint, max_body_bytes=max_body_bytes, file=TaskFile(file)
        )
    except OSError as error:
        raise ConfigError(f"The tasks {path} can't be read: {error.strerror}.") from error


class BatchRun:
    """A task file that is planned, with its journal open. Close it."""

    def __init__(
        self,
        paths: BatchPaths,
        parsed: Parsed,
        *,
        tier_tokens: Mapping[str, int],
        lanes: int,
        tokens_per_char: float | None = None,
        sync: bool = True,
        nodes: int = 1,
        retry_failed: bool = False,
    ) -> None:
        """Plan what is left of it, for `lanes` slots on so many nodes.

        With `retry_failed`, what has failed in earlier runs is left, too, with the bodies that the
        file has now.

        Raises:
            ConfigError: another process runs it, or its tasks aren't those that were run before.
            UnwritableError: the disk is full or gone; nothing is lost.
        """
        self.paths = paths
        self.parsed = parsed
        self.lanes = lanes
        self.tree: PrefixTree = build_tree(
            parsed.tasks, tier_tokens=tier_tokens, tokens_per_char=tokens_per_char
        )
        self.journal = Journal(paths.journal, results=paths.results, errors=paths.errors, sync=sync)
        if retry_failed:
            try:
                self.journal.forget_failures()
            except KeepwarmError:
                self.journal.close()
                raise
        known = self.journal.ended()
        if changed := changed_tasks(parsed.tasks, known):
            self.journal.close()
            raise ConfigError(
                f"{len(changed)} tasks of {paths.tasks} have ended before with other bodies, "
                f"{changed[0].custom_id!r} for one. Give them other ids, or name another output."
            )
        ended = {
            i: known[t.custom_id][0] for i, t in enumerate(parsed.tasks) if t.custom_id in known
        }
        # The whole night's plan is what a report compares with; what is left is what is run.
        self.whole: BatchPlan = plan(self.tree, lanes=lanes, now_s=time.time(), nodes=nodes)
        self.plan = (
            plan(self.tree, lanes=lanes, now_s=time.time(), ended=ended, nodes=nodes)
            if ended
            else self.whole
        )

    def runner(
        self,
        sender: Sender,
        *,
        retry: RetryRule | None = None,
        gate: Gate | None = None,
        on_progress: Callable[[BatchProgress], None] | None = None,
    ) -> Runner:
        """A runner for what is left; see `Runner`."""
        return Runner(
            self.tree,
            self.plan,
            sender,
            self.journal,
            lanes=self.lanes,
            retry=retry,
            gate=gate,
            on_progress=on_progress,
            errors=self.parsed.errors,
        )

    def report(self) -> dict[str, Any]:
        """What it came to so far."""
        tasks, fills = self.journal.stats()
        return build_report(
            tasks,
            fills,
            total=len(self.parsed.tasks),
            bad_lines=len(self.parsed.errors),
            planned_tokens=self.whole.tally.prefilled_tokens,
            naive_tokens=self.whole.naive.prefilled_tokens,
            least_tokens=self.whole.least_tokens,
            planned_prompt_tokens=sum(leaf.tokens for leaf in self.tree.leaves),
        )

    def write_report(self) -> dict[str, Any]:
        """Write report and picture, each whole or not at all.

        Raises:
            ConfigError: they can't be written.
        """
        report = self.report()
        if self.paths.report:
            _replace(self.paths.report, msgspec.json.format(msgspec.json.encode(report), indent=2))
        if self.paths.picture:
            tasks, fills = self.journal.stats()
            title = f"{self.paths.tasks.name}: {report['succeeded']} of {report['tasks']} tasks"
            if report["tasks_an_hour"]:
                title += f", {report['tasks_an_hour']:,.0f} an hour"
            _replace(self.paths.picture, night_svg(tasks, fills, title=title).encode())
        return report

    def close(self) -> None:
        """Give the journal back."""
        self.journal.close()


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}.") from error
