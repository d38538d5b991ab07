"""OpenTelemetry traces of requests, by the GenAI conventions: the extra `keepwarm[otel]`.

Theory of operation. A request's spans are made after it has ended, from its record and with the
times it really had, on the explaining thread; so tracing costs a request nothing, and nothing at
all where it is off. A span of the whole request has one child for each phase: waiting for a slot,
preparing it, prefill, decode. What the caller sent as `traceparent` becomes the parent.

Attribute names are those of the GenAI semantic conventions (gen_ai.*); what they have no name for
is under keepwarm.*. Prompts and replies are in none of them.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from keepwarm import __version__
from keepwarm.explain.record import Ended
from keepwarm.settings import TraceExport

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger("keepwarm")

_PROVIDER = "llama.cpp"
# A collector that doesn't answer must not hold up the shutdown for longer.
_TIMEOUT_S = 5
_OPERATIONS = {"completion": "text_completion"}


def start_tracing(export: TraceExport | None) -> Tracing | None:
    """Traces to where the environment says; None where it says nothing, or the extra is missing."""
    if export is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
    except ImportError:
        log.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but tracing isn't installed: "
            "pip install 'keepwarm[otel]'"
        )
        return None
    exporter = OTLPSpanExporter(
        endpoint=export.endpoint, headers=export.headers, timeout=_TIMEOUT_S
    )
    return Tracing(exporter, service=export.service)


class Tracing:
    """Makes spans of ended requests and hands them to an exporter, in batches."""

    def __init__(self, exporter: SpanExporter, *, service: str) -> None:
        # The extra is imported only where tracing is on.
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("keepwarm", __version__)

    def explained(self, ended: Ended, record: dict[str, Any]) -> None:
        """Make the spans of a request."""
        from opentelemetry.trace import (  # noqa: PLC0415
            SpanKind,
            Status,
            StatusCode,
            set_span_in_context,
        )

        start_ns = int(ended.at_s * 1e9)
        operation = _OPERATIONS.get(ended.api, "chat")
        span = self._tracer.start_span(
            f"{operation} {ended.model}".strip(),
            context=_parent(ended.traceparent),
            kind=SpanKind.SERVER,
            attributes=_attributes(ended, record, operation),
            start_time=start_ns,
        )
        if record["outcome"] not in ("answered", "escalated"):
            span.set_attribute("error.type", record["error"] or record["outcome"])
            span.set_status(Status(StatusCode.ERROR, record["summary"]))
        inside = set_span_in_context(span)
        for name, from_s, to_s in _phases(ended):
            phase = self._tracer.start_span(
                name, context=inside, start_time=start_ns + int(from_s * 1e9)
            )
            phase.end(end_time=start_ns + int(to_s * 1e9))
        span.end(end_time=start_ns + int((ended.ended_s - ended.received_s) * 1e9))

    def close(self) -> None:
        """Send what is left."""
        began_s = time.monotonic()
        self._provider.shutdown()
        log.debug("traces were sent in %.2f s", time.monotonic() - began_s)


def _attributes(ended: Ended, record: dict[str, Any], operation: str) -> dict[str, Any]:
    tokens, timing = record["tokens"], record["timing"]
    out: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": ended.model,
        "gen_ai.request.stream": ended.streamed,
        "gen_ai.response.id": ended.id,
        "keepwarm.plan": record["plan"],
        "keepwarm.tier": ended.tier,
        "keepwarm.tier.reason": ended.tier_reason,
        "keepwarm.cause": record["cause"],
    }
    if record["slot"] is not None:
        out["keepwarm.slot"] = record["slot"]
    if ended.reply and ended.reply.finish_reason:
        out["gen_ai.response.finish_reasons"] = [ended.reply.finish_reason]
    if timing["ttft_s"] is not None:
        out["gen_ai.response.time_to_first_chunk"] = timing["ttft_s"]
    if tokens["prompt"]:
        out |= {
            "gen_ai.usage.input_tokens": tokens["prompt"],
            "gen_ai.usage.output_tokens": tokens["decoded"],
            "gen_ai.usage.cache_read.input_tokens": tokens["prompt"] - tokens["cold"],
            "keepwarm.cold_ttft_s": timing["cold_ttft_s"],
        }
    return out


def _phases(ended: Ended) -> list[tuple[str, float, float]]:
    """Names and times, in seconds from the request's arrival, of what it went through."""
    queued = ended.arrived_s - ended.received_s
    prepared = queued + ended.queued_s
    begun = prepared + ended.prepared_s
    end = ended.ended_s - ended.received_s
    phases = [("queue", queued, prepared), ("prepare slot", prepared, begun)]
    if ended.ttft_s is not None and ended.streamed:
        phases += [("prefill", begun, ended.ttft_s), ("decode", ended.ttft_s, end)]
    elif ended.plan is not None:
        phases.append(("generate", begun, end))
    return [(name, from_s, to_s) for name, from_s, to_s in phases if to_s > from_s]


def _parent(traceparent: str) -> Context | None:
    """The caller's span, if it sent one."""
    if not traceparent:
        return None
    from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
        TraceContextTextMapPropagator,
    )

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})
