"""What a deployment is and holds at the moment, told to the explainer and the metrics."""

from __future__ import annotations

import hashlib

from keepwarm.core.tiers import compose
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.explain.explainer import Identity
from keepwarm.explain.parts import parts_of
from keepwarm.explain.recent import SHARED, Remembered


def observe_deployment(deployment: KeptEngine) -> None:
    """Set the metrics that say what holds at this moment."""
    if not deployment.is_open:
        return
    slots = deployment.dispatcher.scheduler.slots
    stats = deployment.store.stats()
    deployment.metrics.observe_deployment(
        queued=deployment.dispatcher.scheduler.queued,
        slot_states=[slot.state for slot in slots],
        slot_tokens=sum(slot.content.tokens for slot in slots if slot.content),
        store_bytes=stats.used_bytes,
        quota_bytes=stats.quota_bytes,
        evicted_extents=stats.evicted_extents,
        damaged_rows=stats.quarantined_extents + stats.quarantined_ends,
        damaged_staged=stats.damaged_staged,
        prefill_s_per_token=deployment.dispatcher.rates.prefill_s_per_token.value,
    )


async def begin_explaining(deployment: KeptEngine) -> None:
    """Open the history beside the store, and let prompts be compared with the tiers."""
    identity = Identity(
        deployment.fingerprint, await _described(deployment), cuttable=deployment.machine.cuttable
    )
    kept = {prefix.name: prefix for prefix in deployment.prefixes.kept}
    tiers = []
    for tier in deployment.tiers:
        prefix = kept.get(f"tier:{tier.name}")
        if prefix is None or prefix.prompt is None:
            continue
        parts = parts_of(compose(tier, {"messages": []}))
        digests = frozenset(mark.digest for mark in prefix.prompt.marks)
        tiers.append(Remembered(prefix.name, SHARED, parts, digests, deployment.started_s))
    await deployment.explainer.open(deployment.store.settings.root, identity, tiers)


async def _described(deployment: KeptEngine) -> dict[str, str]:
    """What the fingerprint is made of, in names that mean something to people."""
    launch = deployment.launch
    template = str((await deployment.client.props()).get("chat_template", ""))
    described = {
        "engine": launch.identity.kind,
        "engine build": launch.identity.build,
        "model": launch.model.file_id if launch.model else "",
        "chat template": hashlib.blake2b(template.encode(), digest_size=8).hexdigest(),
        "slot layout": deployment.probed.layout.to_json() if deployment.probed.layout else "whole",
    }
    if launch.options:
        options = launch.options
        described |= {
            "KV types": f"{options.kv_type_k} {options.kv_type_v}",
            "flash attention": options.flash_attention,
            "engine arguments": " ".join(options.extra),
        }
    return described
