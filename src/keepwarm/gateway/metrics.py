"""Counters and histograms, in Prometheus' terms. Tokens are counted; percentages never averaged."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from keepwarm.core.plan import Source
from keepwarm.core.reply import Counts

# From a hot slot on a GPU (5 ms) to a cold full tier of a large model on a CPU (5 minutes).
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RESTORE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """All of Keepwarm's own metrics in one registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self._prompt = counter(
            "keepwarm_prompt_tokens", "Prompt tokens by where their KV state came from", "source"
        )
        self._requests = counter(
            "keepwarm_requests", "Finished requests by plan and tier", "plan", "tier"
        )
        self._misses = counter("keepwarm_misses", "What was to be warm and wasn't", "reason")
        self._failures = counter("keepwarm_failures", "Requests that ended in an error", "kind")
        self._decoded = counter("keepwarm_decoded_tokens", "Tokens generated")
        self._saved_s = counter(
            "keepwarm_prefill_seconds_spared", "Estimated prefill time of reused tokens"
        )
        self._restarts = counter("keepwarm_engine_restarts", "Engine restarts", "reason")
        self._escalated = counter(
            "keepwarm_escalations", "Requests replayed one tier up", "tier", "reason"
        )
        self._ttft = Histogram(
            "keepwarm_ttft_seconds",
            "Request received to first byte of the reply, queueing included",
            ("plan",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._restore = Histogram(
            "keepwarm_restore_seconds",
            "Snapshot to slot",
            buckets=_RESTORE_SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("keepwarm_queue", "Requests waiting for a slot", registry=self.registry)
        self.warm = Gauge(
            "keepwarm_warm", "1 when all pinned prefixes are warm", registry=self.registry
        )
        self.store_bytes = Gauge(
            "keepwarm_store_bytes", "Bytes the store takes on disk", registry=self.registry
        )

    def replied(
        self, *, plan: Source, tier: str, counts: Counts, ttft_s: float, prefill_s_per_token: float
    ) -> None:
        """A request was answered."""
        warm = "slot" if plan is Source.SLOT else "snapshot"
        if counts.cached:
            self._prompt.labels(warm if plan is not Source.COLD else "slot").inc(counts.cached)
        self._prompt.labels("cold").inc(counts.prefilled)
        self._decoded.inc(counts.decoded)
        self._requests.labels(plan.value, tier).inc()
        self._ttft.labels(plan.value).observe(ttft_s)
        self._saved_s.inc(counts.cached * prefill_s_per_token)

    def filled(self, counts: Counts) -> None:
        """A static part was prefilled on its own; the request after it finds it in its slot."""
        self._prompt.labels("cold").inc(counts.prefilled)

    def restored(self, seconds: float) -> None:
        """A snapshot was brought into a slot."""
        self._restore.observe(seconds)

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
