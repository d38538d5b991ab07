"""What is known when a request ends, gathered for the explainer while it still holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from keepwarm.api.dialect import Anthropic
from keepwarm.explain.record import EndedRequest

if TYPE_CHECKING:
    from keepwarm.deployment.deployment import Deployment
    from keepwarm.gateway.exchange import Exchange


def tell_ended(deployment: Deployment, exchange: Exchange) -> None:
    """Hand a request that has ended, however it did, to the explainer."""
    # Both at once: between them nothing may happen, or requests of one moment seem to follow each
    # other and are explained by each other.
    now_s, clock_s = time.monotonic(), time.time()
    deployment.router.note(exchange.tiered, exchange.reply)
    job, grant, tiered = exchange.job, exchange.grant, exchange.tiered
    deployment.explainer.ended(
        EndedRequest(
            id=exchange.id,
            api="messages" if isinstance(exchange.asked.dialect, Anthropic) else exchange.asked.api,
            namespace=exchange.asked.namespace,
            model=str(exchange.asked.body.get("model") or "")[:100],
            body=tiered.shaping,
            prompt=job.prompt,
            plan=grant.plan if grant else None,
            tier=tiered.tier.name if tiered.tier else "none",
            tier_reason=tiered.reason,
            at_s=clock_s - (now_s - exchange.received_s),
            received_s=exchange.received_s,
            arrived_s=job.arrived_s,
            queued_s=grant.queued_s if grant else now_s - job.arrived_s,
            prepared_s=grant.prepared_s if grant else 0.0,
            first_byte_s=exchange.first_byte_s,
            ended_s=now_s,
            streamed=exchange.streamed,
            status=exchange.status,
            trouble=exchange.trouble,
            reply=exchange.reply,
            static_tokens=job.static_tokens,
            filled_tokens=job.filled_tokens,
            failed_restore=job.failed_restore,
            prefill_s_per_token=deployment.dispatcher.rates.prefill_s_per_token.value,
            engine=deployment.engine_pid,
            traceparent=exchange.asked.headers.get("traceparent", "")[:64],
            rewrites=exchange.asked.rewrites,
            fingerprint=deployment.fingerprint,
            ahead=deployment.ahead.came_of(job),
        )
    )
