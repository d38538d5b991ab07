"""What the page and `keepwarm top` show of a running deployment, as one API key may see it.

Each function reads memory and returns plain JSON. Of other keys' slots and extents only an operator
sees sizes: what someone else asks, how much and when, is nobody's business.
"""

from __future__ import annotations

import time
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from keepwarm import __version__
from keepwarm.core.slots import Content, Slot, SlotState
from keepwarm.deployment.turns import limits_of
from keepwarm.explain.history import Totals
from keepwarm.store.types import Listed
from keepwarm.tiers.tiering import AUTO

if TYPE_CHECKING:
    from keepwarm.deployment.deployment import Deployment
    from keepwarm.deployment.life import Life
    from keepwarm.keys import Keyring

SHARED = ""
_AUTO = "routed to the smallest tier that can do the task"
# A page shows no more rows than this, and a store may hold a hundred thousand.
_MOST_EXTENTS = 250


async def overview(life: Life, namespace: str) -> dict[str, Any]:
    """All that changes rarely, and the sums of this namespace."""
    deployment = life.deployment
    today, ever = await life.explainer.totals(namespace=namespace)
    out: dict[str, Any] = {
        "version": __version__,
        "state": _state(life),
        "status": life.status,
        "started": life.started_s,
        "has_keys": bool(life.keys),
        "namespace": namespace,
        "keeps_text": life.settings.log.prompts,
        "hygiene": list(life.settings.hygiene.rules),
        "totals": {"today": _totals(today), "ever": _totals(ever)},
        "tiers": [],
    }
    if life.models.several:
        out["models"] = models_now(life)["models"]
    if not deployment.is_open:
        return out
    launch, rates = deployment.launch, deployment.dispatcher.rates
    model = launch.model
    return out | {
        "model": (model.name or model.path.name) if model else "attached server",
        "engine": f"{launch.identity.kind} {launch.identity.build}",
        "fingerprint": deployment.fingerprint,
        "memory": deployment.probed.kind.value,
        "pool_tokens": deployment.machine.pool_tokens,
        "row_bytes": deployment.machine.row_bytes,
        "prefill_s_per_token": rates.prefill_s_per_token.value,
        "tiers": _tiers(deployment),
    }


def _state(life: Life) -> str:
    """For those who look: `loading`, too, while models change places."""
    return "loading" if life.models.is_swapping else life.state.value


def _totals(totals: Totals) -> dict[str, float]:
    return {
        "requests": totals.requests,
        "warm_tokens": totals.warm_tokens,
        "cold_tokens": totals.cold_tokens,
        "decoded_tokens": totals.decoded_tokens,
        "spared_s": round(totals.spared_s, 3),
    }


def _tiers(deployment: Deployment) -> list[dict[str, Any]]:
    kept = {prefix.name: prefix for prefix in deployment.prefixes.kept}
    slots = deployment.dispatcher.scheduler.slots
    out = []
    for tier in deployment.tiers:
        prefix = kept.get(f"tier:{tier.name}")
        holding = [
            slot.id
            for slot in slots
            if prefix and slot.content and prefix.digest in slot.content.marks
        ]
        pin = deployment.store.pin_named(f"tier:{tier.name}")
        out.append(
            {
                "name": tier.name,
                "description": tier.description,
                "extends": tier.extends,
                "is_default": tier.is_default,
                "tools": len(tier.tools),
                "tokens": len(prefix.tokens) if prefix else None,
                "slots": holding,
                "on_disk": pin is not None,
                "uses": pin.uses if pin else 0,
            }
        )
    return out


def status_now(life: Life, namespace: str) -> dict[str, Any]:
    """What is warm where: `/keepwarm/status`."""
    deployment = life.deployment
    sees_all = life.keys.sees_all(namespace)
    out: dict[str, Any] = {
        "state": life.state.value,
        "status": life.status,
        "hygiene": list(life.settings.hygiene.rules),
        "engine_pid": deployment.engine_pid,
        "engine_url": deployment.client.base_url if deployment.is_open else None,
        "warmed": [
            warmed.as_dict()
            for warmed in deployment.prefixes.warmed
            if sees_all or _is_seen(warmed.name, namespace)
        ],
    }
    if life.takes_turns:
        out["models"] = models_now(life)["models"]
    if not deployment.is_open:
        return out
    out["slots"] = [
        {
            "id": slot.id,
            "state": slot.state.value,
            "tokens": content.tokens
            if (content := _own_content(life.keys, slot, namespace))
            else 0,
            "saved_tokens": content.saved_tokens if content else 0,
        }
        for slot in deployment.dispatcher.scheduler.slots
    ]
    stats = deployment.store.stats()
    out["store"] = msgspec.to_builtins(stats) if sees_all else {"quota_bytes": stats.quota_bytes}
    return out


def _is_seen(prefix: str, namespace: str) -> bool:
    """Whether a kept prefix is shared, or a namespace's own."""
    return not prefix.startswith("learned:") or prefix.startswith(f"learned:{namespace}:")


def _own_content(keys: Keyring, slot: Slot, namespace: str) -> Content | None:
    """What a slot holds, if a namespace may know how much that is."""
    content = slot.content
    if content is None or keys.sees_all(namespace):
        return content
    return content if content.namespace in (SHARED, namespace) else None


def slots_now(life: Life, namespace: str) -> dict[str, Any]:
    """The slots and the queue at this moment."""
    deployment = life.deployment
    if not deployment.is_open:
        return {"state": _state(life), "status": life.status, "slots": [], "queued": 0, "store": ""}
    scheduler = deployment.dispatcher.scheduler
    stats, sees_all = deployment.store.stats(), life.keys.sees_all(namespace)
    return {
        "state": _state(life),
        "status": life.status,
        "slots": [_slot(deployment, slot, namespace) for slot in scheduler.slots],
        "queued": scheduler.queued if sees_all else scheduler.queued_of(namespace),
        # Changes when the store did: the page then asks for it again.
        "store": f"{stats.saves}.{stats.evicted_extents}.{stats.quarantined_extents}.{stats.pins}",
    }


def _slot(deployment: Deployment, slot: Slot, namespace: str) -> dict[str, Any]:
    content, scheduler = slot.content, deployment.dispatcher.scheduler
    job = scheduler.jobs.get(slot.job) if slot.job else None
    is_own = job is None or job.namespace == namespace
    holds_own = content is None or content.namespace in (SHARED, namespace)
    plan = job.plan if job and is_own else None
    return {
        "id": slot.id,
        "state": slot.state.value,
        "tokens": content.tokens if content and holds_own else None if content else 0,
        "saved_tokens": content.saved_tokens if content and holds_own else 0,
        "turns": content.turns if content and holds_own else 0,
        "holds": _holds(deployment, slot) if holds_own else "another key's",
        "job": job.id if job and is_own else None,
        "is_own": is_own,
        "plan": plan.source.value if plan else None,
        "prompt_tokens": plan.prompt_tokens if plan else None,
        "since": _wall_s(job.arrived_s)
        if job and is_own and slot.state is not SlotState.IDLE
        else None,
    }


def _holds(deployment: Deployment, slot: Slot) -> str:
    """What a slot's content begins with, in a word: the largest tier it goes through."""
    content = slot.content
    if content is None:
        return "empty"
    held = [t for t in deployment.prefixes.kept if t.digest in content.marks]
    if not held:
        return "conversation" if content.turns else "prefix"
    largest = max(held, key=lambda t: len(t.tokens))
    name = largest.name.removeprefix("tier:")
    return name if content.tokens == len(largest.tokens) else f"{name} +"


@cache
def _monotonic_zero_s() -> float:
    """The wall clock's time at which the monotonic one read 0; fixed, so that views compare."""
    return time.time() - time.monotonic()


def _wall_s(monotonic_s: float) -> float:
    return round(_monotonic_zero_s() + monotonic_s, 3)


async def store_now(life: Life, namespace: str) -> dict[str, Any]:
    """The token tree: what is on disk, what of it is in slots, how often it was used."""
    deployment = life.deployment
    if not deployment.is_open:
        return {"extents": [], "used_bytes": 0, "quota_bytes": 0, "others": None}
    listed = await deployment.store.list_extents()
    stats = deployment.store.stats()
    holding = _slots_by_extent(deployment, namespace)
    seen = [e for e in listed if e.namespace in (SHARED, namespace)]
    shown = _most_recent(seen)
    hidden = [e for e in listed if e.namespace not in (SHARED, namespace)]
    sees_all = life.keys.sees_all(namespace)
    others = {"extents": len(hidden), "bytes": sum(e.size_bytes for e in hidden)}
    return {
        "used_bytes": stats.used_bytes if sees_all else sum(e.size_bytes for e in seen),
        "quota_bytes": stats.quota_bytes,
        "others": others if sees_all else None,
        "extents": [_extent(e, holding.get(e.extent_id, [])) for e in shown],
        "unlisted": len(seen) - len(shown),
        "may_change_shared": not life.keys,
    }


def _most_recent(extents: list[Listed]) -> list[Listed]:
    """Those that were used last, and what they hang off."""
    if len(extents) <= _MOST_EXTENTS:
        return extents
    by_id = {extent.extent_id: extent for extent in extents}
    keep: set[int] = set()
    for extent in sorted(extents, key=lambda e: (bool(e.pins), e.used_s), reverse=True):
        place: int | None = extent.extent_id
        while place is not None and place not in keep:
            keep.add(place)
            place = by_id[place].parent
        if len(keep) >= _MOST_EXTENTS:
            break
    return [extent for extent in extents if extent.extent_id in keep]


def _extent(extent: Listed, slots: list[dict[str, int]]) -> dict[str, Any]:
    return {
        "id": extent.extent_id,
        "parent": extent.parent,
        "lo": extent.lo,
        "hi": extent.hi,
        "is_shared": extent.namespace == SHARED,
        "origin": extent.origin.value,
        "bytes": extent.size_bytes,
        "pins": [short_pin(name) for name in extent.pins],
        "is_pinned_by_hand": any(name.startswith(HAND) for name in extent.pins),
        "prefill_s": round(extent.prefill_s, 3),
        "created": extent.created_s,
        "used": extent.used_s,
        "uses": extent.uses,
        "slots": slots,
    }


HAND = "hand:"
"""What the names of pins begin with that a person set."""


def short_pin(name: str) -> str:
    """A pin's name without what only machines need: `tier:full`, `learned`, `by hand`.

    What was learned of a coding agent has its name: `claude-cli/2.1.332`.
    """
    if name.startswith(HAND):
        return "by hand"
    return name.partition("~")[2] or "learned" if name.startswith("learned:") else name


def _slots_by_extent(deployment: Deployment, namespace: str) -> dict[int, list[dict[str, int]]]:
    """Which slots hold which extents' prefixes, and up to which token."""
    out: dict[int, list[dict[str, int]]] = {}
    for slot in deployment.dispatcher.scheduler.slots:
        content = slot.content
        if content is None or content.namespace not in (SHARED, namespace):
            continue
        by_place = sorted(content.marks.items(), key=lambda item: item[1].tokens)
        hit = deployment.store.lookup([d for d, _ in by_place], namespace=content.namespace)
        if hit is not None:
            out.setdefault(hit.extent_id, []).append({"slot": slot.id, "at": hit.at_tokens})
    return out


def listed_tiers(life: Life) -> list[dict[str, Any]]:
    """The tiers as virtual models, for `/v1/models`."""
    deployment = life.deployment
    return [
        _listed(life, name, tier.description if tier else _AUTO)
        for name in (*deployment.tiers.names, AUTO)
        for tier in [deployment.tiers.get(name)]
    ]


def listed_models(life: Life) -> dict[str, Any]:
    """`/v1/models` where there are several: each with its state, its tiers, then the default's."""
    data = []
    for model in life.models:
        tokens = model.settings.engine.context
        data.append(
            _listed(life, model.name, f"{model.state.value}; {tokens:,} tokens of context")
            | {"state": model.state.value, "pinned": model.is_pinned}
        )
        data += [
            {**tier, "id": f"{model.name}:{tier['id']}", "state": model.state.value}
            for tier in listed_tiers(life)
        ]
    return {"object": "list", "data": [*data, *listed_tiers(life)]}


def _listed(life: Life, name: str, text: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(life.started_s),
        "owned_by": "keepwarm",
        "description": text,
    }


def models_now(life: Life) -> dict[str, Any]:
    """All models with what was measured of them: `/keepwarm/models`."""
    limits = limits_of(life.settings.engine)
    return {
        "max_models": limits.models,
        "memory_bytes": limits.memory_bytes,
        "models": [
            {**model.as_dict(), "default": model is life.models.default} for model in life.models
        ],
    }
