"""All rules, worst first."""

from __future__ import annotations

from collections.abc import Callable

from keepwarm.doctor import machine, prompts, server
from keepwarm.doctor.facts import ServerFacts
from keepwarm.doctor.finding import Finding

RULES: tuple[Callable[[ServerFacts], Finding | None], ...] = (
    server.no_answer,
    server.not_ready,
    server.engine_old,
    server.idle_slots_cleared,
    server.idle_slots_unknown,
    server.slots_unset,
    server.few_slots,
    server.small_cache,
    server.cannot_save,
    server.context_too_small,
    server.sliding_window,
    server.recurrent_memory,
    prompts.tiers_unusable,
    prompts.tier_unrendered,
    prompts.template_drops_tools,
    prompts.template_changes,
    prompts.volatile_tiers,
    prompts.agents_change,
    machine.slot_dir_full,
    machine.slot_dir_slow,
    machine.slot_dir_forgets,
    machine.store_disk,
    machine.store_slow,
    machine.store_forgets,
    machine.foreign_snapshots,
    machine.swapped,
    machine.too_many_threads,
    machine.busy_machine,
)


def diagnose(facts: ServerFacts) -> list[Finding]:
    """What the rules find, worst first and in the rules' order."""
    found = [finding for rule in RULES if (finding := rule(facts))]
    return sorted(found, key=lambda finding: -finding.severity)
