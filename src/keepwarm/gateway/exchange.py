"""One request between client and engine: what the steps of its way know of it, and tell of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keepwarm.core.hygiene import rewrites_text
from keepwarm.core.job import Job
from keepwarm.core.reply import Reply
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.dispatcher import Grant
from keepwarm.gateway.client_request import ClientRequest
from keepwarm.tiers.tiering import HEADER, TieredRequest

# A model that is loaded is there within microseconds.
_LOADED_S = 0.001


@dataclass(slots=True)
class Exchange:
    """One request on its way; what is known of it grows."""

    id: str
    deployment: Deployment
    asked: ClientRequest
    received_s: float
    tiered: TieredRequest
    job: Job
    static: dict[str, Any] | None
    grant: Grant | None = None
    first_byte_s: float | None = None
    streamed: bool = False
    status: int = 0
    trouble: str = ""
    reply: Reply | None = None
    may_escalate: bool = False
    is_left: bool = False
    loaded_s: float = 0.0
    """How long it waited until its model was loaded."""

    @property
    def headers(self) -> dict[str, str]:
        """What the client is told of what happened."""
        tier = self.tiered.tier.name if self.tiered.tier else "none"
        out = {"X-Keepwarm-Request-Id": self.id, HEADER: f"{tier}; {self.tiered.reason}"}
        if self.job.filled_tokens:
            # They were prefilled before the engine's own count of this reply began.
            out["X-Keepwarm-Filled"] = str(self.job.filled_tokens)
        if self.asked.rewrites:
            out["X-Keepwarm-Hygiene"] = rewrites_text(self.asked.rewrites)
        if plan := self.grant.plan if self.grant else self.job.plan:
            out["X-Keepwarm-Plan"] = plan.source.value
            out["X-Keepwarm-Slot"] = str(plan.slot)
        if self.grant:
            route_s = self.job.arrived_s - self.received_s - self.loaded_s
            taken = {
                "route": route_s,
                "queue": self.grant.queued_s,
                "restore": self.grant.prepared_s,
            }
            if self.job.is_counted:
                taken["count"] = self.job.counted_s  # a part of what was queued
            if self.loaded_s >= _LOADED_S:
                taken["load"] = self.loaded_s
            out["Server-Timing"] = ", ".join(
                f"{name};dur={seconds * 1e3:.2f}" for name, seconds in taken.items()
            )
        return out
