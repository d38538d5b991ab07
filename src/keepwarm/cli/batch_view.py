"""What people see of a batch: the plan as a tree, the night as a bar, the end as a few lines."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.tree import Tree as RichTree

from keepwarm.batch.job import BatchPaths
from keepwarm.batch.planner import BatchPlan
from keepwarm.batch.progress import BatchProgress
from keepwarm.batch.tasks import Parsed
from keepwarm.batch.tree import PrefixTree
from keepwarm.cli.output import err, out

# A tree is looked at, not searched: so many branches are drawn below one another.
_MAX_SHOWN = 12
# Where nobody looks at a terminal, a line so often.
_LINE_EVERY_S = 60.0


def plan_as_dict(tree: PrefixTree, plan: BatchPlan, parsed: Parsed, lanes: int) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "tasks": len(parsed.tasks),
        "errors": [error.as_dict() for error in parsed.errors],
        "lanes": lanes,
        "mode": plan.mode,
        "order": [tree.tasks[leaf].custom_id for leaf in plan.order],
        "prefill_tokens": plan.tally.prefilled_tokens,
        "restore_tokens": plan.tally.restored_tokens,
        "decode_tokens": plan.tally.decoded_tokens,
        "fills": plan.tally.fills,
        "naive_prefill_tokens": plan.naive.prefilled_tokens,
        "least_prefill_tokens": plan.least_tokens,
        "seconds": round(plan.seconds, 1),
        "naive_seconds": round(plan.naive_s, 1),
    }


def show_plan(tree: PrefixTree, plan: BatchPlan, parsed: Parsed, lanes: int) -> None:
    """The tree, then tokens and time against the file's own order."""
    shown = RichTree(f"{len(parsed.tasks)} tasks on {lanes} slots")
    for number, root in enumerate(tree.roots):
        leaves = [i for i, leaf in enumerate(tree.leaves) if leaf.root == number]
        node = shown.add(f"{root.label}: {_many(len(leaves), 'task')}, {root.tokens:,} tokens warm")
        _add_branches(tree, node, number, None, leaves)
    out.print(shown)
    table = Table(box=None, pad_edge=False)
    for name in ("", "prefill", "restore", "about"):
        table.add_column(name, justify="left" if not name else "right")
    tally, naive = plan.tally, plan.naive
    table.add_row(
        "planned",
        f"{tally.prefilled_tokens:,}",
        f"{tally.restored_tokens:,}",
        duration(plan.seconds),
    )
    table.add_row(
        "the file's order, nothing saved",
        f"{naive.prefilled_tokens:,}",
        "0",
        duration(plan.naive_s),
    )
    table.add_row("least possible", f"{plan.least_tokens:,}", "", "")
    out.print(table)
    ends = time.strftime("%H:%M", time.localtime(time.time() + plan.seconds))
    out.print(f"begun now it would end at about {ends}; a run corrects this after its first tasks")
    show_line_errors(parsed)


def _add_branches(
    tree: PrefixTree, node: RichTree, root: int, above: int | None, leaves: list[int]
) -> None:
    """The branches worth filling below one, and how many tasks hang there directly."""
    groups: dict[int | None, list[int]] = {}
    for leaf in leaves:
        path = tree.fillable(leaf)
        at = path.index(above) + 1 if above is not None else 0
        groups.setdefault(path[at] if at < len(path) else None, []).append(leaf)
    alone = groups.pop(None, [])
    for count, (branch, below) in enumerate(groups.items()):
        if count == _MAX_SHOWN:
            node.add(f"... and {len(groups) - count} more")
            break
        assert branch is not None
        known = tree.branches[above].tokens if above is not None else tree.roots[root].tokens
        fresh = tree.branches[branch].tokens - known
        child = node.add(f"{_opening(tree, branch, below[0])!r} +{fresh:,} tokens", highlight=False)
        _add_branches(tree, child, root, branch, below)
    if alone:
        known = tree.branches[above].tokens if above is not None else tree.roots[root].tokens
        own = sum(max(tree.leaves[leaf].tokens - known, 1) for leaf in alone)
        node.add(f"{_many(len(alone), 'task')}, {own:,} tokens of their own")


def _opening(tree: PrefixTree, branch: int, leaf: int) -> str:
    """The first words of the message in which a branch ends."""
    task, end = tree.tasks[leaf], tree.branches[branch].end
    messages = task.body.get("messages") or task.body.get("input") or task.body.get("prompt")
    if isinstance(messages, list) and end is not None:
        place = min(end.segment, len(messages) - 1) - (0 if end.chars else 1)
        item = messages[max(place, 0)]
        messages = item.get("content") if isinstance(item, dict) else item
    text = " ".join(str(messages).split())
    return text[:48] + ("..." if len(text) > 48 else "")


class NightBar:
    """A bar for one night; where there is no terminal, a line now and then."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[detail]}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None
        self._told_s = 0.0

    def __enter__(self) -> NightBar:
        """Begin to draw."""
        self._bars.start()
        self._task = self._bars.add_task(self._title, total=None, detail="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        self._bars.stop()

    def show(self, progress: BatchProgress) -> None:
        """How far it is."""
        assert self._task is not None
        detail = _detail(progress)
        self._bars.update(self._task, completed=progress.ended, total=progress.total, detail=detail)
        now_s = time.monotonic()
        if not err.is_terminal and now_s - self._told_s > _LINE_EVERY_S:
            self._told_s = now_s
            err.print(f"{self._title}: {detail}")


def _detail(progress: BatchProgress) -> str:
    parts = [f"{progress.ended} of {progress.total}"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.ended > progress.ended_before:
        parts.append(f"{progress.tasks_an_hour:,.0f} an hour")
        parts.append(f"{progress.reused_tokens:,} tokens reused")
    if progress.left_s is not None and progress.ended < progress.total:
        parts.append(f"{duration(progress.left_s)} left")
    if progress.waiting_for:
        parts.append(f"waiting for {progress.waiting_for}")
    return ", ".join(parts)


def show_end(report: dict[str, Any], paths: BatchPaths) -> None:
    """What it came to, and where it is."""
    rate = f", {report['tasks_an_hour']:,.0f} an hour" if report["tasks_an_hour"] else ""
    failed = f", {report['failed']} failed" if report["failed"] else ""
    left = f", {report['left']} left" if report["left"] else ""
    out.print(f"{report['succeeded']} of {report['tasks']} tasks done{failed}{left}{rate}")
    naive = report["estimated"]["naive_prefill_tokens"]
    saved = report["seconds_saved"]
    compared = "" if report["left"] else f"; the file's order would have prefilled about {naive:,}"
    out.print(
        f"{report['prefilled_tokens']:,} tokens prefilled, {report['reused_tokens']:,} reused"
        + compared
        + (f" ({duration(saved)} more)" if saved and saved > 0 else ""),
        soft_wrap=True,
    )
    out.print(f"results: {paths.results}", soft_wrap=True)
    if paths.errors.exists():
        again = " (--retry-failed runs those again)" if report["failed"] else ""
        out.print(f"errors:  {paths.errors}{again}", soft_wrap=True)
    out.print(f"report:  {paths.report}, {paths.picture}", soft_wrap=True)


def show_line_errors(parsed: Parsed) -> None:
    """The lines that can't be used, the first few of them."""
    for error in parsed.errors[:_MAX_SHOWN]:
        err.print(f"line {error.line}: ", style="yellow", end="")
        err.print(error.message, markup=False, soft_wrap=True)
    if len(parsed.errors) > _MAX_SHOWN:
        err.print(f"... and {len(parsed.errors) - _MAX_SHOWN} more lines that can't be used")


def duration(seconds: float) -> str:
    """Seconds for people."""
    if not math.isfinite(seconds):
        return "long"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
