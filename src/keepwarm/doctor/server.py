"""Rules about the server: what it is, its flags, its slots, its model's memory. Pure."""

from __future__ import annotations

import re

from keepwarm.core.memory import MemoryKind
from keepwarm.doctor.facts import ServerFacts
from keepwarm.doctor.finding import Finding, Severity

# What a request needs behind its static part: a question, some turns, an answer.
_ROOM_TOKENS = 1024

# The oldest build whose slots, counts and flags were compared with what Keepwarm counts on.
OLDEST_BUILD = 10587


def no_answer(facts: ServerFacts) -> Finding | None:
    """Nothing can be asked."""
    if facts.kind != "none":
        return None
    return Finding(
        "no_answer",
        Severity.ERROR,
        f"Nothing answers at {facts.url}: {facts.failure}",
        "Start it (`keepwarm serve`, `keepwarm service status`), or say where it is with "
        "--upstream URL. What follows is only what can be seen without it.",
    )


def not_ready(facts: ServerFacts) -> Finding | None:
    """Keepwarm answers, but isn't warm."""
    if facts.kind != "keepwarm" or facts.state == "ready":
        return None
    is_failed = facts.state == "failed"
    return Finding(
        "not_ready",
        Severity.ERROR if is_failed else Severity.WARNING,
        f"Keepwarm isn't ready: {facts.state} ({facts.status}).",
        "Its engine doesn't come up; its log says why."
        if is_failed
        else "Ask again when it is warm.",
    )


def engine_old(facts: ServerFacts) -> Finding | None:
    """The engine is older than any that Keepwarm counts on."""
    match = re.fullmatch(r"b(\d+)\b.*", facts.build)
    # Builds without a number, as in packages of others, are "b0"; later ones are called "v1.0".
    if match is None or not 0 < int(match[1]) < OLDEST_BUILD:
        return None
    return Finding(
        "engine_old",
        Severity.WARNING,
        f"The engine is llama.cpp {facts.build}, older than b{OLDEST_BUILD}, the oldest that "
        "Keepwarm counts on.",
        "Upgrade it. Until then Keepwarm leaves out the flags that it doesn't know, and is cold "
        "where its slot files aren't understood.",
    )


def idle_slots_cleared(facts: ServerFacts) -> Finding | None:
    """A slot that was warmed is empty when it is needed."""
    by_flags = facts.flags.empties_idle_slots if facts.flags and facts.slots != 1 else False
    if facts.keeps_idle is True or not (by_flags or facts.keeps_idle is False):
        return None
    how = (
        "tried just now: a slot was empty after another one had worked"
        if facts.keeps_idle is False
        else "unified KV with --cache-idle-slots, as its command line has it"
    )
    return Finding(
        "idle_slots_cleared",
        Severity.ERROR,
        f"Each task that starts clears all idle slots ({how}), so what was warmed is gone when it "
        "is needed.",
        "Start it with --no-cache-idle-slots, or --cache-ram 0, or without unified KV (an explicit "
        "--parallel N and no --kv-unified).",
    )


def idle_slots_unknown(facts: ServerFacts) -> Finding | None:
    """Neither the command line nor an experiment could tell."""
    known = facts.flags is not None or facts.keeps_idle is not None or facts.slots == 1
    if facts.kind != "llama-server" or known:
        return None
    return Finding(
        "idle_slots_unknown",
        Severity.UNKNOWN,
        f"Whether idle slots are cleared isn't known: {facts.untried}.",
        "`keepwarm doctor --try` finds out by overwriting two slots.",
    )


def slots_unset(facts: ServerFacts) -> Finding | None:
    """The number of slots was left to the build."""
    if facts.flags is None or facts.flags.slots is not None:
        return None
    return Finding(
        "slots_unset",
        Severity.WARNING,
        f"The number of slots isn't set (-np), so this build's default counts: "
        f"{facts.slots or 'several'} slots over one unified KV, perhaps others with the next.",
        "Give --parallel N, and --kv-unified or not, so that an upgrade doesn't change what fits.",
    )


def few_slots(facts: ServerFacts) -> Finding | None:
    """A bare server keeps prefixes in slots alone, and there are more tiers than slots for them."""
    tiers = [tier for tier in facts.tiers if not tier.failure]
    if facts.kind != "llama-server" or facts.slots is None or facts.slots > len(tiers):
        return None
    return Finding(
        "few_slots",
        Severity.WARNING,
        f"The server has {facts.slots} slot{'s' if facts.slots > 1 else ''} for {len(tiers)} "
        "tiers. Without a gateway a prefix is warm in a slot or not at all, and one slot must be "
        "free for what is asked.",
        f"Give --parallel {len(tiers) + 1} or more, or put Keepwarm in front, which restores them.",
    )


def small_cache(facts: ServerFacts) -> Finding | None:
    """The prompt cache in memory can't hold what it is for."""
    if facts.flags is None or not facts.flags.cache_ram_mib or facts.flags.cache_ram_mib < 0:
        return None
    size_bytes = facts.flags.cache_ram_mib * (1 << 20)
    need = facts.largest_tier_bytes
    if need is None or size_bytes >= 2 * need:
        return None
    tier = facts.largest_tier
    assert tier
    return Finding(
        "small_cache",
        Severity.WARNING,
        f"--cache-ram {facts.flags.cache_ram_mib} holds less than two prompts of the {tier.name} "
        f"tier ({need / 1e6:,.0f} MB each): what goes in pushes out what is needed next.",
        f"Give --cache-ram {int(8 * need) >> 20 or 1} or more, or 0 and let slots keep what they "
        "hold.",
    )


def cannot_save(facts: ServerFacts) -> Finding | None:
    """Nothing of this server survives its restart."""
    if facts.kind != "llama-server" or facts.can_save is not False:
        return None
    return Finding(
        "cannot_save",
        Severity.WARNING,
        "This llama-server can't save slots, so every restart begins cold.",
        "Start it with --slot-save-path DIR; then `keepwarm warmup --slot-dir DIR` restores the "
        "tiers instead of prefilling them.",
    )


def context_too_small(facts: ServerFacts) -> Finding | None:
    """A tier doesn't fit into a slot, or leaves no room behind it."""
    tier = facts.largest_tier
    if tier is None or tier.tokens is None or not facts.slot_tokens:
        return None
    left = facts.slot_tokens - tier.tokens
    if left >= _ROOM_TOKENS:
        return None
    fits = left > 0
    return Finding(
        "context_too_small",
        Severity.WARNING if fits else Severity.ERROR,
        f"A slot has {facts.slot_tokens:,} tokens of context and the {tier.name} tier takes "
        f"{tier.tokens:,}: "
        + (f"{left:,} are left for a conversation." if fits else "it doesn't fit."),
        "Give more context (--context, or --ctx-size of a llama-server), fewer slots where each "
        "has its own part, or unified KV, where each slot may use all of it.",
    )


def sliding_window(facts: ServerFacts) -> Finding | None:
    """A sliding-window model's snapshots restore and aren't used."""
    if facts.memory is not MemoryKind.SLIDING_WINDOW:
        return None
    window = f"{facts.window_tokens:,} tokens"
    if facts.kind == "keepwarm":
        return Finding(
            "sliding_window",
            Severity.NOTE,
            f"This model has a sliding window of {window}. Prefixes longer than that are restored; "
            "shorter ones are kept in slots and prefilled again after a restart.",
        )
    if facts.flags is None:
        return Finding(
            "sliding_window",
            Severity.UNKNOWN,
            f"This model has a sliding window of {window}. Whether the server runs with --swa-full "
            "can't be seen; without it, it reports that a slot was restored and prefills "
            "everything all the same.",
            "Warm it with `keepwarm warmup`, which mends its slot files, or give --swa-full.",
        )
    if facts.flags.swa_full:
        return None
    return Finding(
        "sliding_window",
        Severity.WARNING,
        f"This model has a sliding window of {window} and the server runs without --swa-full: it "
        "reports that a slot was restored and prefills everything all the same.",
        "Warm it with `keepwarm warmup`, which mends its slot files, or give --swa-full (its "
        "windowed layers then take memory for the whole context).",
    )


def recurrent_memory(facts: ServerFacts) -> Finding | None:
    """A hybrid model's state can't be cut."""
    if facts.memory is not MemoryKind.HYBRID:
        return None
    return Finding(
        "recurrent_memory",
        Severity.NOTE,
        "This model has recurrent layers: its state is reusable only from the ends where it was "
        "saved, and only by prompts that go on from there.",
        "" if facts.kind == "keepwarm" else "Save at the end of the static part, as warmup does.",
    )
