"""How far a night is, and how long it may still take."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from keepwarm.batch.planner import RESTORE_WEIGHT, BatchCosts, BatchPlan
from keepwarm.batch.tree import PrefixTree


@dataclass(slots=True)
class BatchProgress:
    """How far a night is. Tokens are those of this run; tasks count earlier runs too."""

    total: int
    ended: int = 0
    failed: int = 0
    prefilled_tokens: int = 0
    reused_tokens: int = 0
    running: int = 0
    waiting_for: str = ""
    began_s: float = field(default_factory=time.monotonic)
    ended_before: int = 0
    work_done_s: float = 0.0
    work_total_s: float = 0.0

    @property
    def tasks_an_hour(self) -> float:
        """Of this run."""
        return 3600 * (self.ended - self.ended_before) / max(time.monotonic() - self.began_s, 1e-3)

    @property
    def left_s(self) -> float | None:
        """Seconds left by the plan's own proportions; None before the first task has ended."""
        if self.work_done_s <= 0:
            return None
        taken_s = time.monotonic() - self.began_s
        return taken_s * max(self.work_total_s / self.work_done_s - 1.0, 0.0)


def work_seconds(tree: PrefixTree, plan: BatchPlan) -> dict[int, float]:
    """What each task is planned to take, its branch's fill included; those that ended aren't in."""
    costs = BatchCosts()
    out: dict[int, float] = {}
    for step in plan.steps:
        tokens = step.prefilled_tokens + RESTORE_WEIGHT * step.restored_tokens
        seconds = tokens * costs.prefill_s_per_token
        if step.branch is None:
            seconds += tree.leaves[step.leaf].reply_tokens * costs.decode_s_per_token
        out[step.leaf] = out.get(step.leaf, 0.0) + seconds
    return out
