"""What is known when a request ends, gathered for the explainer while it still holds."""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from keepwarm.core.parts import parts_of
from keepwarm.core.recent import SHARED, Remembered
from keepwarm.core.tiers import compose
from keepwarm.gateway.dialect import Anthropic
from keepwarm.gateway.explainer import Identity
from keepwarm.gateway.record import Ended

if TYPE_CHECKING:
    from keepwarm.gateway.proxy import Exchange
    from keepwarm.gateway.runtime import Runtime


def observe_deployment(runtime: Runtime) -> None:
    """Set the metrics that say what holds at this moment."""
    if not hasattr(runtime, "dispatcher"):
        return
    slots = runtime.dispatcher.scheduler.slots
    stats = runtime.store.stats()
    runtime.metrics.observe_deployment(
        queued=runtime.dispatcher.scheduler.queued,
        slot_states=[slot.state for slot in slots],
        slot_tokens=sum(slot.content.tokens for slot in slots if slot.content),
        store_bytes=stats.used_bytes,
        quota_bytes=stats.quota_bytes,
        evicted_extents=stats.evicted_extents,
        prefill_s_per_token=runtime.dispatcher.rates.prefill_s_per_token.value,
    )


async def begin_explaining(runtime: Runtime) -> None:
    """Open the history beside the store, and let prompts be compared with the tiers."""
    identity = Identity(
        runtime.fingerprint, await _described(runtime), cuttable=runtime.machine.cuttable
    )
    targets = {target.name: target for target in runtime.prefixes.targets}
    tiers = []
    for tier in runtime.tiers:
        target = targets.get(f"tier:{tier.name}")
        if target is None or target.prompt is None:
            continue
        parts = parts_of("chat", compose(tier, {"messages": []}))
        digests = frozenset(mark.digest for mark in target.prompt.marks)
        tiers.append(Remembered(target.name, SHARED, parts, digests, runtime.started_s))
    await runtime.explainer.open(runtime.store.settings.root, identity, tiers)


async def _described(runtime: Runtime) -> dict[str, str]:
    """What the fingerprint is made of, in names that mean something to people."""
    launch = runtime.launch
    template = str((await runtime.client.props()).get("chat_template", ""))
    described = {
        "engine": launch.identity.kind,
        "engine build": launch.identity.build,
        "model": launch.model.file_id if launch.model else "",
        "chat template": hashlib.blake2b(template.encode(), digest_size=8).hexdigest(),
        "slot layout": runtime.probed.layout.to_json() if runtime.probed.layout else "whole",
    }
    if launch.options:
        options = launch.options
        described |= {
            "KV types": f"{options.kv_type_k} {options.kv_type_v}",
            "flash attention": options.flash_attention,
            "engine arguments": " ".join(options.extra),
        }
    return described


def tell_ended(runtime: Runtime, exchange: Exchange) -> None:
    """Hand a request that has ended, however it did, to the explainer."""
    # Both at once: between them nothing may happen, or requests of one moment seem to follow each
    # other and are explained by each other.
    now_s, clock_s = time.monotonic(), time.time()
    runtime.router.note(exchange.tiered, exchange.reply)
    job, grant, tiered = exchange.job, exchange.grant, exchange.tiered
    runtime.explainer.ended(
        Ended(
            id=exchange.id,
            api=exchange.asked.api,
            client_api="messages"
            if isinstance(exchange.asked.dialect, Anthropic)
            else exchange.asked.api,
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
            prefill_s_per_token=runtime.dispatcher.rates.prefill_s_per_token.value,
            engine=runtime.engine_pid,
            traceparent=exchange.asked.headers.get("traceparent", "")[:64],
            rewrites=exchange.asked.rewrites,
        )
    )
