"""Counters and histograms, in Prometheus' terms. Tokens are counted; percentages never averaged.

Every label has few values, all known beforehand (`plan`, `tier`, `source`, `reason`, `cause`,
`state`): a client can't make new ones. docs/metrics.md lists them; a test keeps it in step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from keepwarm import __version__
from keepwarm.core.hygiene import RULES
from keepwarm.core.plan import Source
from keepwarm.core.reply import Counts
from keepwarm.core.slots import SlotState
from keepwarm.explain.difference import Cause
from keepwarm.explain.record import EndedRequest

# From a hot slot on a GPU (5 ms) to a cold full tier of a large model on a CPU (5 minutes).
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)

_FOR_EVERYONE = ("keepwarm_build_info", "keepwarm_warm", "keepwarm_engine_restarts_total")


class Metrics:
    """All of Keepwarm's own metrics in one registry. Safe to use from any thread."""

    def __init__(self) -> None:
        # Creation times double the text and say nothing that the process's start time does not.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str, steps: bool = False) -> Histogram:
            buckets = _STEP_SECONDS if steps else SECONDS
            return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

        self._prompt = counter(
            "keepwarm_prompt_tokens", "Prompt tokens by where their KV state came from", "source"
        )
        self._cold = counter(
            "keepwarm_cold_tokens", "Prefilled prompt tokens of answered requests by cause", "cause"
        )
        self._requests = counter(
            "keepwarm_requests", "Answered requests by plan and tier", "plan", "tier"
        )
        self._outcomes = counter("keepwarm_outcomes", "Requests by how they ended", "outcome")
        self._misses = counter("keepwarm_misses", "What was to be warm and wasn't", "reason")
        self._failures = counter("keepwarm_failures", "Requests that ended in an error", "kind")
        self._decoded = counter("keepwarm_decoded_tokens", "Tokens generated")
        self._ahead = counter(
            "keepwarm_ahead_tokens",
            "Prompt tokens computed before anybody asked; of them used, or wasted, since",
            "what",
        )
        self._spared_s = counter(
            "keepwarm_prefill_seconds_spared", "Estimated prefill time of reused tokens"
        )
        self._prefill_s = counter(
            "keepwarm_prefill_seconds", "Time the engine took to prefill, as it says"
        )
        self._estimated_s = counter(
            "keepwarm_estimated_ttft_seconds",
            "Sum of what plans estimated, to compare with keepwarm_ttft_seconds_sum",
        )
        self._restarts = counter("keepwarm_engine_restarts", "Engine restarts", "reason")
        self._rewrites = counter(
            "keepwarm_hygiene_rewrites", "Lines and tools that hygiene changed in requests", "rule"
        )
        self._escalated = counter(
            "keepwarm_escalations", "Requests replayed one tier up", "tier", "reason"
        )
        self._ttft = seconds(
            "keepwarm_ttft_seconds",
            "Request received to first byte of the reply, queueing included",
            "plan",
        )
        self._queue_s = seconds("keepwarm_queue_seconds", "Waiting for a slot")
        self._restore = seconds("keepwarm_restore_seconds", "Snapshot to slot", steps=True)
        self._route = seconds(
            "keepwarm_route_seconds", "Request received to its plan being asked for", steps=True
        )
        self.queue = gauge("keepwarm_queue", "Requests waiting for a slot")
        self.warm = gauge("keepwarm_warm", "1 when all pinned prefixes are warm")
        self.store_bytes = gauge("keepwarm_store_bytes", "Bytes the store takes on disk")
        self._quota_bytes = gauge("keepwarm_store_quota_bytes", "Bytes the store may take")
        self._store_evicted = gauge(
            "keepwarm_store_evicted_extents", "Extents evicted since the start"
        )
        self._damaged = gauge(
            "keepwarm_store_damaged_files", "Files found damaged since the start", "where"
        )
        self._slots = gauge("keepwarm_slots", "Slots by state", "state")
        self._slot_tokens = gauge("keepwarm_slot_tokens", "Tokens that slots hold")
        self._rate = gauge("keepwarm_prefill_seconds_per_token", "The learned prefill rate")
        info = Info("keepwarm_build", "What runs", registry=self.registry)
        info.info({"version": __version__})
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        # Known labels exist from the start, so that a rate over their first increase isn't lost.
        for source in ("slot", "snapshot", "cold"):
            self._prompt.labels(source)
        for cause in Cause:
            self._cold.labels(cause.value)
        for what in ("computed", "used", "wasted"):
            self._ahead.labels(what)
        for plan in Source:
            self._ttft.labels(plan.value)
        for rule in RULES:
            self._rewrites.labels(rule)

    def rewritten(self, rewrites: Mapping[str, int]) -> None:
        """Hygiene changed so many lines or tools of a request, by rule."""
        for rule, count in rewrites.items():
            self._rewrites.labels(rule).inc(count)

    def replied(self, *, plan: Source, tier: str, counts: Counts, ttft_s: float) -> None:
        """A request was answered."""
        self._decoded.inc(counts.decoded)
        self._requests.labels(plan.value, tier).inc()
        self._ttft.labels(plan.value).observe(ttft_s)
        self._prefill_s.inc(counts.prefill_s)

    def explained(self, ended: EndedRequest, record: dict[str, Any]) -> None:
        """A request has ended and its tokens are accounted for."""
        self._outcomes.labels(record["outcome"]).inc()
        self._queue_s.observe(ended.queued_s)
        self._route.observe(max(ended.arrived_s - ended.received_s, 0.0))
        if record["outcome"] != "answered" or ended.plan is None:
            return
        tokens = record["tokens"]
        # What waited for another's prefill was restored like any snapshot.
        self._prompt.labels("slot").inc(tokens["slot"])
        self._prompt.labels("snapshot").inc(tokens["snapshot"] + tokens["shared"])
        self._prompt.labels("cold").inc(tokens["cold"])
        self._cold.labels(record["cause"]).inc(tokens["cold"])
        self._spared_s.inc((tokens["prompt"] - tokens["cold"]) * ended.prefill_s_per_token)
        self._estimated_s.inc(ended.queued_s + ended.plan.estimate_s)

    def observe_deployment(
        self,
        *,
        queued: int,
        slot_states: list[SlotState],
        slot_tokens: int,
        store_bytes: int,
        quota_bytes: int,
        evicted_extents: int,
        damaged_rows: int,
        damaged_staged: int,
        prefill_s_per_token: float,
    ) -> None:
        """What holds at this moment; called for each scrape."""
        self.queue.set(queued)
        for state in SlotState:
            self._slots.labels(state.value).set(slot_states.count(state))
        self._slot_tokens.set(slot_tokens)
        self.store_bytes.set(store_bytes)
        self._quota_bytes.set(quota_bytes)
        self._store_evicted.set(evicted_extents)
        self._damaged.labels("store").set(damaged_rows)
        self._damaged.labels("staging").set(damaged_staged)
        self._rate.set(prefill_s_per_token)

    def filled(self, counts: Counts) -> None:
        """A static part was prefilled on its own, for the request that comes behind it."""
        self._prefill_s.inc(counts.prefill_s)

    def computed_ahead(self, tokens: int) -> None:
        """So many prompt tokens were prefilled before anybody asked."""
        self._ahead.labels("computed").inc(tokens)

    def used_ahead(self, tokens: int) -> None:
        """A request was spared so many of them."""
        self._ahead.labels("used").inc(tokens)

    def wasted_ahead(self, tokens: int) -> None:
        """So many of them were of no use to the turn that came, or it didn't come for long."""
        self._ahead.labels("wasted").inc(tokens)

    def restored(self, seconds: float) -> None:
        """A snapshot was brought into a slot."""
        self._restore.observe(seconds)

    def prompt_tokens(self) -> dict[str, int]:
        """Prompt tokens of answered requests, by source, since the start."""
        only = self.registry.restricted_registry(["keepwarm_prompt_tokens_total"])
        return {
            sample.labels["source"]: int(sample.value)
            for family in only.collect()
            for sample in family.samples
        }

    def miss(self, reason: str) -> None:
        """Something that was to be warm wasn't; `reason` is one of a bounded set of words."""
        self._misses.labels(reason).inc()

    def failed(self, kind: str) -> None:
        """A request ended in an error."""
        self._failures.labels(kind).inc()

    def restarted(self, reason: str) -> None:
        """The engine was started again."""
        self._restarts.labels(reason).inc()

    def escalated(self, *, tier: str, reason: str) -> None:
        """A request was replayed one tier up from `tier`."""
        self._escalated.labels(tier, reason).inc()

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def text_for_everyone(self) -> bytes:
        """Those of them to which no request adds: whether it is well, not what it does."""
        return generate_latest(self.registry.restricted_registry(_FOR_EVERYONE))


def merged(own: bytes, engine: bytes) -> bytes:
    """Keepwarm's metrics and the engine's in one text.

    A metric name may stand in one block only, and the engine's text isn't ours to trust: lines that
    aren't samples or comments are left out, and so is what has a name of ours.
    """
    ours = {_name(line) for line in own.splitlines()}
    kept = [
        line
        for line in engine.splitlines()
        if line.strip() and _name(line) and _name(line) not in ours
    ]
    return b"\n".join([own.rstrip(b"\n"), *kept]) + b"\n"


def _name(line: bytes) -> bytes:
    """The metric that a line of the text format is about; b'' if it is none."""
    if line.startswith((b"# HELP ", b"# TYPE ")):
        return line.split(b" ", 3)[2]
    if line.startswith(b"#"):
        return b""
    name = line.split(b"{", 1)[0].split(b" ", 1)[0]
    return name if name.replace(b":", b"_").replace(b"_", b"a").isalnum() else b""
