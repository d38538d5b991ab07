"""Each rule finds what it is for, and keeps silent about a deployment that is as it should be."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from keepwarm.core.memory import MemoryKind
from keepwarm.core.volatile import Volatile
from keepwarm.doctor import machine, prompts, server
from keepwarm.doctor.diagnose import RULES, diagnose
from keepwarm.doctor.facts import DiskFacts, ProcessFacts, ServerFacts, StoreFacts, TierFacts
from keepwarm.doctor.finding import Finding, Severity, exit_status
from keepwarm.doctor.flags import ServerFlags

GB, MB = 10**9, 10**6
SSD = DiskFacts(path="/ssd", kind="ext4", free_bytes=100 * GB, write_bytes_s=500e6)
SHM = DiskFacts(path="/dev/shm/x", kind="tmpfs", free_bytes=8 * GB)
GOOD_FLAGS = ServerFlags(slots=4, unified=True, clears_idle=False, cache_ram_mib=0, slot_dir="/x")
GOOD = ServerFacts(
    url="http://127.0.0.1:8080",
    kind="llama-server",
    today=date(2026, 11, 4),
    slots=4,
    slot_tokens=16384,
    template="{{ messages }}",
    rendered="<|system|>Be brief.<|user|>Hello.",
    flags=GOOD_FLAGS,
    keeps_idle=True,
    can_save=True,
    memory=MemoryKind.PLAIN,
    bytes_a_token=25_000,
    tiers=(TierFacts(name="minimal", tokens=400), TierFacts(name="full", tokens=2_000)),
    slot_dir=SSD,
    store=StoreFacts(disk=SSD, used_bytes=GB, quota_bytes=20 * GB, pins=3, is_open=True),
    process=ProcessFacts(pid=1, swapped_bytes=0, threads=4, cores=4, machine_cores=4, load=0.5),
)
KEEPWARM = replace(GOOD, kind="keepwarm", state="ready", flags=None, keeps_idle=None)


@pytest.mark.parametrize("facts", [GOOD, KEEPWARM], ids=["llama-server", "keepwarm"])
def test_a_good_deployment_has_no_findings(facts: ServerFacts) -> None:
    assert diagnose(facts) == []


def test_every_rule_is_in_the_list() -> None:
    written = {
        rule
        for module in (server, prompts, machine)
        for name, rule in vars(module).items()
        if callable(rule) and getattr(rule, "__module__", "") == module.__name__ and name[0] != "_"
    }
    assert written == set(RULES)


@pytest.mark.parametrize("build", ["b10586-1a2b3c4", "b4404"])
def test_an_engine_older_than_any_that_was_tried_is_found(build: str) -> None:
    assert build in _only(replace(GOOD, build=build), "engine_old").what


@pytest.mark.parametrize("build", ["", "b0-unknown", "b10587-1a2b", "b12352", "v1.0.0", "fake-1"])
def test_other_engines_are_not(build: str) -> None:
    assert diagnose(replace(GOOD, build=build)) == []


def test_the_worst_comes_first_and_decides_the_exit_status() -> None:
    note = Finding("a", Severity.NOTE, "")
    unknown = Finding("b", Severity.UNKNOWN, "")
    warning = Finding("c", Severity.WARNING, "")
    error = Finding("d", Severity.ERROR, "")
    assert exit_status([]) == exit_status([note, unknown]) == 0
    assert exit_status([note, warning]) == 1
    assert exit_status([warning, error]) == 2
    facts = replace(GOOD, keeps_idle=False, process=ProcessFacts(threads=9, cores=2))
    assert [f.severity for f in diagnose(facts)] == [Severity.ERROR, Severity.WARNING]


def _only(facts: ServerFacts, code: str) -> Finding:
    found = diagnose(facts)
    assert [finding.code for finding in found] == [code]
    return found[0]


def test_nothing_that_answers_is_an_error() -> None:
    facts = replace(GOOD, kind="none", failure="refused", flags=None, process=ProcessFacts(cores=4))
    assert "refused" in _only(facts, "no_answer").what


@pytest.mark.parametrize(
    ("state", "severity"), [("warming", Severity.WARNING), ("failed", Severity.ERROR)]
)
def test_a_keepwarm_that_is_not_ready_says_how_far_it_is(state: str, severity: Severity) -> None:
    facts = replace(KEEPWARM, state=state, status="full: 512 of 2,012 tokens")
    found = _only(facts, "not_ready")
    assert found.severity is severity
    assert "512 of 2,012" in found.what


def test_flags_that_clear_idle_slots_are_found_where_nothing_was_tried() -> None:
    flags = ServerFlags(slots=4, unified=True, slot_dir="/x")
    _only(replace(GOOD, flags=flags, keeps_idle=None), "idle_slots_cleared")


def test_what_was_tried_counts_more_than_what_flags_say() -> None:
    flags = ServerFlags(slots=4, unified=True, slot_dir="/x")
    assert diagnose(replace(GOOD, flags=flags, keeps_idle=True)) == []
    _only(replace(GOOD, keeps_idle=False), "idle_slots_cleared")


def test_one_slot_is_never_cleared_by_another() -> None:
    flags = ServerFlags(slots=1, unified=True, slot_dir="/x")
    _only(replace(GOOD, flags=flags, slots=1, keeps_idle=None), "few_slots")


def test_what_can_neither_be_seen_nor_tried_is_said_to_be_unknown() -> None:
    facts = replace(GOOD, flags=None, keeps_idle=None, untried="the server is busy")
    found = _only(facts, "idle_slots_unknown")
    assert "the server is busy" in found.what
    assert found.severity is Severity.UNKNOWN


def test_an_unset_number_of_slots_is_a_warning() -> None:
    flags = replace(GOOD_FLAGS, slots=None)
    _only(replace(GOOD, flags=flags), "slots_unset")


def test_a_bare_server_needs_a_slot_more_than_there_are_tiers() -> None:
    facts = replace(GOOD, slots=2)
    assert "2 slots for 2 tiers" in _only(facts, "few_slots").what
    assert diagnose(replace(GOOD, slots=3)) == []
    assert diagnose(replace(KEEPWARM, slots=2)) == []


@pytest.mark.parametrize(("mib", "is_found"), [(0, False), (-1, False), (60, True), (200, False)])
def test_a_prompt_cache_smaller_than_two_tiers_is_a_warning(mib: int, is_found: bool) -> None:
    facts = replace(GOOD, flags=replace(GOOD_FLAGS, cache_ram_mib=mib))
    assert [f.code for f in diagnose(facts)] == ["small_cache"] * is_found


def test_a_server_without_a_slot_directory_cannot_save() -> None:
    _only(replace(GOOD, can_save=False), "cannot_save")


@pytest.mark.parametrize(
    ("context", "severity"), [(2_000, Severity.ERROR), (2_900, Severity.WARNING)]
)
def test_a_context_that_the_largest_tier_fills_is_too_small(
    context: int, severity: Severity
) -> None:
    assert _only(replace(GOOD, slot_tokens=context), "context_too_small").severity is severity


def test_a_sliding_window_matters_to_a_bare_server_only_without_swa_full() -> None:
    facts = replace(GOOD, memory=MemoryKind.SLIDING_WINDOW, window_tokens=512)
    assert _only(facts, "sliding_window").severity is Severity.WARNING
    assert diagnose(replace(facts, flags=replace(GOOD_FLAGS, swa_full=True))) == []
    unseen = replace(facts, flags=None)
    assert _only(unseen, "sliding_window").severity is Severity.UNKNOWN
    own = replace(KEEPWARM, memory=MemoryKind.SLIDING_WINDOW, window_tokens=512)
    assert _only(own, "sliding_window").severity is Severity.NOTE


def test_recurrent_layers_are_a_note() -> None:
    found = _only(replace(GOOD, memory=MemoryKind.HYBRID), "recurrent_memory")
    assert found.severity is Severity.NOTE


def test_tiers_that_cannot_be_read_are_an_error() -> None:
    facts = replace(GOOD, tiers=(), tiers_failure="tier.toml, line 3: unknown key")
    assert "line 3" in _only(facts, "tiers_unusable").what


def test_a_tier_that_the_template_refuses_is_an_error() -> None:
    tier = TierFacts(name="full", failure="only one system message is supported")
    assert "one system message" in _only(replace(GOOD, tiers=(tier,)), "tier_unrendered").what


def test_dropped_tools_are_named() -> None:
    tier = TierFacts(name="standard", tokens=900, missing_tools=("read_file", "run"))
    assert "read_file, run" in _only(replace(GOOD, tiers=(tier,)), "template_drops_tools").what


@pytest.mark.parametrize(
    "rendered",
    [
        "Today Date: 04 Nov 2026\n\nBe brief.",
        "Current date: 2026-11-04\nBe brief.",
        "It is November 4, 2026. Be brief.",
    ],
)
def test_todays_date_in_the_prompt_is_an_error(rendered: str) -> None:
    facts = replace(GOOD, template="{{ strftime_now('%d %b %Y') }}", rendered=rendered)
    _only(facts, "template_changes")


def test_a_date_that_stays_is_none_of_the_templates_faults() -> None:
    rendered = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief."
    facts = replace(GOOD, template="{% if strftime_now %}{% endif %}", rendered=rendered)
    assert diagnose(facts) == []


def test_volatile_places_are_told_with_file_and_line() -> None:
    place = ("context.md", Volatile(12, 1, "date", "12 May 2026"))
    tier = TierFacts(name="full", tokens=900, volatile=(place,) * 7)
    found = _only(replace(GOOD, tiers=(tier,)), "volatile_tiers")
    assert "full/context.md:12 (date: 12 May 2026)" in found.what
    assert "and 2 more" in found.what


@pytest.mark.parametrize(
    ("free", "severity"), [(40 * MB, Severity.ERROR), (80 * MB, Severity.WARNING)]
)
def test_a_slot_directory_without_room_for_the_largest_tier(free: int, severity: Severity) -> None:
    facts = replace(GOOD, slot_dir=replace(SSD, free_bytes=free))
    assert _only(facts, "slot_dir_full").severity is severity


def test_without_known_sizes_a_nearly_full_disk_is_a_warning() -> None:
    facts = replace(GOOD, bytes_a_token=None, slot_dir=replace(SSD, free_bytes=100 * MB))
    assert _only(facts, "slot_dir_full").severity is Severity.WARNING


def test_a_slow_slot_directory_is_found_by_its_speed() -> None:
    facts = replace(GOOD, slot_dir=replace(SSD, write_bytes_s=20e6))
    assert "20 MB a second: the largest tier takes 2.5 s" in _only(facts, "slot_dir_slow").what


def test_a_fast_disk_is_slow_for_a_large_model() -> None:
    facts = replace(GOOD, bytes_a_token=400_000)
    assert [f.code for f in diagnose(facts)] == ["slot_dir_slow", "store_slow"]


def test_a_network_file_system_is_slow_unmeasured() -> None:
    disk = replace(SSD, kind="nfs4", write_bytes_s=None)
    assert "nfs4" in _only(replace(GOOD, slot_dir=disk), "slot_dir_slow").what


def test_snapshots_in_memory_are_no_warning_where_a_store_keeps_the_tiers() -> None:
    assert _only(replace(GOOD, slot_dir=SHM), "slot_dir_forgets").severity is Severity.NOTE
    alone = replace(GOOD, slot_dir=SHM, store=None)
    assert _only(alone, "slot_dir_forgets").severity is Severity.WARNING
    assert diagnose(replace(KEEPWARM, slot_dir=SHM)) == []


def test_a_quota_over_the_disks_room_is_a_warning() -> None:
    disk = replace(SSD, free_bytes=5 * GB)
    _only(replace(GOOD, store=replace(GOOD.store, disk=disk)), "store_disk")  # type: ignore[type-var]


def test_a_store_in_memory_forgets() -> None:
    store = StoreFacts(disk=SHM, used_bytes=0, quota_bytes=GB, pins=3)
    _only(replace(GOOD, store=store), "store_forgets")


def test_other_fingerprints_are_told_only_where_it_is_known_which_one_runs() -> None:
    store = StoreFacts(
        disk=SSD, used_bytes=GB, quota_bytes=2 * GB, idle_stores=2, idle_bytes=700 * MB
    )
    assert diagnose(replace(GOOD, store=store)) == []
    found = _only(replace(GOOD, store=replace(store, is_open=True)), "foreign_snapshots")
    assert "700 MB" in found.what
    assert "2 other fingerprints" in found.what


def test_an_engine_in_swap_is_a_warning() -> None:
    process = replace(GOOD.process, swapped_bytes=300 * MB)
    assert "300 MB" in _only(replace(GOOD, process=process), "swapped").what


def test_more_threads_than_usable_cores_is_a_warning() -> None:
    process = replace(GOOD.process, threads=8)
    assert "8 threads" in _only(replace(GOOD, process=process), "too_many_threads").what


def test_unset_threads_count_the_machines_cores_which_a_container_may_not_use() -> None:
    process = replace(GOOD.process, threads=None, cores=2, machine_cores=16)
    found = _only(replace(GOOD, process=process), "too_many_threads")
    assert "16 threads, as it does by default, but may use 2 cores" in found.what


def test_a_load_of_twice_the_cores_is_a_warning() -> None:
    process = replace(GOOD.process, load=8.0)
    _only(replace(GOOD, process=process), "busy_machine")


def test_agents_whose_prompts_change_in_front_are_named_with_what_they_would_gain() -> None:
    agents = ("claude-cli/2.1.332", "codex_exec/0.171.0", "pi/1.6.0")
    what = _only(replace(KEEPWARM, agents=agents), "agents_change").what
    assert "claude-cli/2.1.332 (another directory: 20,535 tokens" in what
    assert "pi/1.6.0" in what
    assert "codex" not in what


@pytest.mark.parametrize(
    "facts",
    [
        replace(KEEPWARM, agents=("claude-cli/2.1.332",), hygiene=("move-known",)),
        replace(KEEPWARM, agents=("codex_exec/0.171.0", "pip/1.0")),
    ],
    ids=["the rule is on", "nothing to gain"],
)
def test_agents_with_nothing_to_gain_are_no_finding(facts: ServerFacts) -> None:
    assert diagnose(facts) == []
