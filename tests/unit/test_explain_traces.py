"""Traces of requests: by the GenAI conventions, with the times they really had, off by default."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from finished import asks, ended
from keepwarm.core.plan import Source
from keepwarm.explain.explanation import ExplainedFacts, explain
from keepwarm.explain.record import EndedRequest, record_of
from keepwarm.explain.tracing import Tracing, start_tracing
from keepwarm.settings import TraceExport, trace_export

NAMES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_SDK_DISABLED",
    "OTEL_SERVICE_NAME",
    "OTEL_TRACES_EXPORTER",
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def told(request: EndedRequest) -> dict[str, Any]:
    assert request.counts
    facts = ExplainedFacts(Source.COLD, 0, request.counts.prompt, 0, 0, 0, 0, None)
    return record_of(request, explain(facts), None)


def spans_of(request: EndedRequest, record: dict[str, Any] | None = None) -> dict[str, Any]:
    memory = pytest.importorskip(
        "opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="keepwarm[otel]"
    )
    exporter = memory.InMemorySpanExporter()
    tracing = Tracing(exporter, service="test")
    tracing.explained(request, record or told(request))
    tracing._provider.force_flush()
    found = {span.name: span for span in exporter.get_finished_spans()}
    tracing.close()
    return found


def test_a_request_is_one_span_with_a_child_for_each_phase() -> None:
    request = ended(1, asks("x"))
    spans = spans_of(request)
    assert set(spans) == {"chat small", "queue", "prepare slot", "prefill", "decode"}
    whole = spans["chat small"]
    assert whole.start_time == pytest.approx(request.at_s * 1e9, abs=1e3)
    assert whole.end_time - whole.start_time == pytest.approx(3e9, abs=1e3)
    assert spans["decode"].end_time - spans["decode"].start_time == pytest.approx(1e9, abs=1e3)
    children = [span for span in spans.values() if span is not whole]
    assert {span.parent.span_id for span in children} == {whole.context.span_id}
    assert all(whole.start_time <= s.start_time <= s.end_time <= whole.end_time for s in children)


def test_attributes_are_named_by_the_conventions() -> None:
    attributes = dict(spans_of(ended(1, asks("x")))["chat small"].attributes)
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.request.model"] == "small"
    assert attributes["gen_ai.usage.input_tokens"] == 400
    assert attributes["gen_ai.usage.output_tokens"] == 9
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 0
    assert attributes["gen_ai.response.time_to_first_chunk"] == pytest.approx(2.0)
    assert attributes["keepwarm.cause"] == "first_seen"
    assert attributes["keepwarm.plan"] == "cold"


def test_no_text_of_a_prompt_or_reply_is_in_a_span() -> None:
    request = ended(1, asks("the safe is behind the clock"))
    for span in spans_of(request).values():
        assert "the safe" not in repr(dict(span.attributes))
        assert "On the roof" not in repr(dict(span.attributes))


def test_the_callers_span_becomes_the_parent() -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    whole = spans_of(ended(1, asks("x"), traceparent=parent))["chat small"]
    assert f"{whole.context.trace_id:032x}" == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert f"{whole.parent.span_id:016x}" == "00f067aa0ba902b7"
    alone = spans_of(ended(1, asks("x"), traceparent="garbage"))["chat small"]
    assert alone.parent is None


def test_a_request_without_an_answer_is_an_error_span() -> None:
    request = ended(1, asks("x"), reply=None, status=0, plan=None, trouble="rate_limit_error")
    whole = spans_of(request, record_of(request, None, None))["chat small"]
    assert not whole.status.is_ok
    assert whole.attributes["error.type"] == "rate_limit_error"


def test_without_an_endpoint_nothing_is_traced() -> None:
    assert trace_export() is None
    assert start_tracing(None) is None


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")]
)
def test_it_can_be_turned_off_by_its_own_names(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert trace_export() is not None
    monkeypatch.setenv(name, value)
    assert trace_export() is None


def test_the_environment_says_where_traces_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318/")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=night%20shift, x-key=a=b")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "house")
    headers = {"x-team": "night shift", "x-key": "a=b"}
    assert trace_export() == TraceExport("http://collector:4318/v1/traces", headers, "house")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://other:1/x")
    export = trace_export()
    assert export is not None
    assert export.endpoint == "http://other:1/x"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that takes whatever is sent; its URL and what came."""
    came: list[tuple[str, bytes]] = []

    class Takes(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            came.append((f"{self.path} {self.headers['x-team']}", raw))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Takes)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()
    server.server_close()


def test_spans_reach_a_collector(collector: tuple[str, list[tuple[str, bytes]]]) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="keepwarm[otel]")
    url, came = collector
    tracing = start_tracing(TraceExport(f"{url}/v1/traces", {"x-team": "night"}, "house"))
    assert tracing is not None
    request = ended(1, asks("x"))
    tracing.explained(request, told(request))
    tracing.close()
    assert [path for path, _ in came] == ["/v1/traces night"]
    assert b"chat small" in came[0][1]
    assert b"house" in came[0][1]
