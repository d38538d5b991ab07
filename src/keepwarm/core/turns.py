"""Who waits for a slot, and in which order: start-time fair queueing over API keys. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from keepwarm.core.job import Job


def is_full(waiting: Sequence[Job], job: Job, *, limit: int, tenants: int) -> bool:
    """Whether no more of a job's kind may wait, or no more of its tenant's.

    A batch's jobs are counted apart: many that can wait must not keep out one that can't. And
    where there are several tenants, one of them can't fill the queue for all.
    """
    alike = [other for other in waiting if (other.priority > 0) == (job.priority > 0)]
    share = limit if tenants == 1 else max(limit // 2, 1)
    own = sum(other.namespace == job.namespace for other in alike)
    return len(alike) >= limit or own >= share


def order(job: Job) -> tuple[int, int]:
    """What waiting jobs are sorted by."""
    return job.priority, job.turn


@dataclass(slots=True)
class Turns:
    """Gives each job its turn.

    Each tenant's jobs stand one turn apart, from the turn that is served now on: who sends many at
    once has them served between the few of the others. One tenant's are first come, first served.
    """

    # The last turn that was given to a tenant's jobs of a priority, and the last that was served.
    _given: dict[tuple[str, int], int] = field(default_factory=dict)
    _served: dict[int, int] = field(default_factory=dict)

    def take(self, job: Job) -> None:
        """A job begins to wait."""
        last = self._given.get((job.namespace, job.priority), 0)
        job.turn = max(last, self._served.get(job.priority, 0)) + 1
        self._given[job.namespace, job.priority] = job.turn

    def served(self, job: Job) -> None:
        """A job has got its slot."""
        self._served[job.priority] = max(self._served.get(job.priority, 0), job.turn)
