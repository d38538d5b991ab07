"""What a deployment is and holds at the moment, told to the explainer and the metrics."""

from __future__ import annotations

import hashlib

from keepwarm.core.tiers import compose
from keepwarm.deployment.deployment import Deployment
from keepwarm.explain.explainer import Identity
from keepwarm.explain.parts import parts_of
from keepwarm.explain.recent import SHARED, Remembered


def observe_deployment(runtime: Deployment) -> None:
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


async def begin_explaining(runtime: Deployment) -> None:
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
        parts = parts_of(compose(tier, {"messages": []}))
        digests = frozenset(mark.digest for mark in target.prompt.marks)
        tiers.append(Remembered(target.name, SHARED, parts, digests, runtime.started_s))
    await runtime.explainer.open(runtime.store.settings.root, identity, tiers)


async def _described(runtime: Deployment) -> dict[str, str]:
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
