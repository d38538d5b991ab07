"""What /metrics says: sums that add up, few labels, and files that Prometheus and Grafana take."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from finished import asks, ended, plan
from keepwarm.core.plan import Source
from keepwarm.core.reply import Counts
from keepwarm.core.slots import SlotState
from keepwarm.explain.difference import Cause
from keepwarm.explain.metrics import SECONDS, Metrics, merged

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "keepwarm.json"
DOCS = ROOT / "docs" / "metrics.md"

TOKENS = {"prompt": 400, "slot": 0, "snapshot": 0, "shared": 0, "cold": 400, "decoded": 9}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "outcome": "answered",
        "cause": "timestamp",
        "tokens": TOKENS,
        "plan": "cold",
        **changes,
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def test_every_token_of_a_prompt_is_counted_once_by_where_it_came_from(metrics: Metrics) -> None:
    tokens = {"prompt": 400, "slot": 250, "snapshot": 0, "shared": 0, "cold": 150, "decoded": 9}
    metrics.explained(ended(1, asks("x"), plan=plan(Source.SLOT)), record(tokens=tokens))
    tokens = {"prompt": 400, "slot": 0, "snapshot": 0, "shared": 300, "cold": 100, "decoded": 9}
    metrics.explained(ended(2, asks("x"), plan=plan(Source.SHARED)), record(tokens=tokens))
    by_source = {
        source: value(metrics, "keepwarm_prompt_tokens_total", source=source)
        for source in ("slot", "snapshot", "cold")
    }
    assert by_source == {"slot": 250, "snapshot": 300, "cold": 250}
    assert sum(by_source.values()) == 800
    assert value(metrics, "keepwarm_cold_tokens_total", cause="timestamp") == 250


def test_requests_without_an_answer_count_no_tokens(metrics: Metrics) -> None:
    metrics.explained(ended(1, asks("x"), plan=None), record(outcome="hung_up"))
    assert value(metrics, "keepwarm_outcomes_total", outcome="hung_up") == 1
    assert value(metrics, "keepwarm_prompt_tokens_total", source="cold") == 0


def test_a_fill_ahead_of_a_request_is_not_counted_twice(metrics: Metrics) -> None:
    counts = Counts(cached=0, prefilled=380, decoded=0, prefill_s=1.9)
    metrics.filled(counts)
    metrics.explained(ended(1, asks("x"), filled_tokens=380), record())
    assert value(metrics, "keepwarm_prompt_tokens_total", source="cold") == 400


def test_what_hygiene_changed_is_counted_by_rule(metrics: Metrics) -> None:
    assert value(metrics, "keepwarm_hygiene_rewrites_total", rule="sort-tools") == 0
    assert b'keepwarm_hygiene_rewrites_total{rule="move-volatile"} 0.0' in metrics.text()
    metrics.rewritten({"sort-tools": 3, "drop-billing": 1})
    metrics.rewritten({"sort-tools": 2})
    assert value(metrics, "keepwarm_hygiene_rewrites_total", rule="sort-tools") == 5
    assert value(metrics, "keepwarm_hygiene_rewrites_total", rule="drop-billing") == 1


def test_labels_are_known_from_the_start_and_stay_few(metrics: Metrics) -> None:
    def series() -> set[str]:
        return {
            line.rsplit(b" ", 1)[0].decode()
            for line in metrics.text().splitlines()
            if line.startswith(b"keepwarm_") and b"_bucket" not in line
        }

    exercise(metrics)
    before = series()
    for i in range(50):
        changes = {"id": f"other{i}", "model": f"model {i}", "namespace": f"key {i}"}
        asked = ended(i, asks(f"text {i}"), **changes)
        metrics.explained(asked, record())
    assert series() == before
    assert len(before) < 150
    for cause in Cause:
        assert f'keepwarm_cold_tokens_total{{cause="{cause.value}"}}' in before


def test_histograms_reach_from_five_milliseconds_to_five_minutes() -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.005, 300)
    assert list(SECONDS) == sorted(set(SECONDS))


def test_names_that_others_rely_on_are_there(metrics: Metrics) -> None:
    exercise(metrics)
    names = {family.name for family in families(metrics.text())}
    assert {
        "keepwarm_prompt_tokens",
        "keepwarm_ttft_seconds",
        "keepwarm_restore_seconds",
        "keepwarm_misses",
        "keepwarm_queue",
        "keepwarm_warm",
    } <= names


def exercise(metrics: Metrics) -> None:
    """Make every metric have a value."""
    for source in Source:
        counts = Counts(10, 390, 9, 1.0, 1.0)
        metrics.replied(plan=source, tier="small", counts=counts, ttft_s=1.0)
    metrics.explained(ended(1, asks("x")), record())
    metrics.filled(Counts(0, 10, 0, 0.1))
    metrics.restored(0.01)
    metrics.miss("checksum")
    metrics.failed("upstream_error")
    metrics.restarted("died")
    metrics.escalated(tier="small", reason="word")
    metrics.observe_deployment(
        queued=1,
        slot_states=[SlotState.IDLE, SlotState.SERVING],
        slot_tokens=100,
        store_bytes=10,
        quota_bytes=100,
        evicted_extents=1,
        damaged_rows=1,
        damaged_staged=1,
        prefill_s_per_token=0.005,
    )


def families(text: bytes) -> Iterator[Any]:
    yield from text_string_to_metric_families(text.decode())


# --- merged with the engine's

ENGINE = b"""\
# HELP llamacpp:prompt_tokens_total Number of prompt tokens processed.
# TYPE llamacpp:prompt_tokens_total counter
llamacpp:prompt_tokens_total 61
# HELP llamacpp:kv_cache_usage_ratio KV-cache usage.
# TYPE llamacpp:kv_cache_usage_ratio gauge
llamacpp:kv_cache_usage_ratio 0.5
"""


def test_the_engines_metrics_stand_beside_ours(metrics: Metrics) -> None:
    exercise(metrics)
    text = merged(metrics.text(), ENGINE)
    names = {family.name for family in families(text)}
    assert {"keepwarm_prompt_tokens", "llamacpp:kv_cache_usage_ratio"} <= names


def test_an_engine_cannot_change_our_metrics_or_break_the_text(metrics: Metrics) -> None:
    exercise(metrics)
    hostile = (
        b"# TYPE keepwarm_warm counter\nkeepwarm_warm 7\n"
        b"<html>busy</html>\n\n}{ 1\n\xff\xfe\nllamacpp:fine 1\n"
    )
    text = merged(metrics.text(), hostile)
    found = {family.name: family for family in families(text)}
    assert found["keepwarm_warm"].type == "gauge"
    assert [sample.value for sample in found["keepwarm_warm"].samples] == [0.0]
    assert found["llamacpp:fine"].samples[0].value == 1
    assert b"html" not in text


# --- what Prometheus and Grafana are given


def promtool(*arguments: str, stdin: bytes = b"") -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool isn't installed (apt-get install prometheus)")
    done = subprocess.run([tool, *arguments], input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()


def test_promtool_finds_no_fault_in_our_metrics(metrics: Metrics) -> None:
    exercise(metrics)
    own = [line for line in metrics.text().splitlines() if b"process_" not in line]
    promtool("check", "metrics", stdin=b"\n".join(own) + b"\n")


def test_promtool_finds_no_fault_in_rules_and_configuration() -> None:
    promtool("check", "rules", str(PROMETHEUS / "keepwarm.rules.yml"))
    promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))


RULES_TEST = """\
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'up{{job="keepwarm", instance="a"}}', values: '0x10'}}
      - {{series: 'up{{job="keepwarm", instance="b"}}', values: '1x10'}}
    alert_rule_test:
      - {{alertname: KeepwarmDown, eval_time: 1m, exp_alerts: []}}
      - alertname: KeepwarmDown
        eval_time: 5m
        exp_alerts:
          - exp_labels: {{severity: critical, job: keepwarm, instance: a}}
            exp_annotations:
              summary: "Keepwarm on a doesn't answer"
              description: "Look at `systemctl --user status keepwarm` and its journal."
  - interval: 1m
    input_series:
      - series: 'keepwarm_cold_tokens_total{{instance="a", cause="timestamp"}}'
        values: '0+500x120'
      - series: 'keepwarm_cold_tokens_total{{instance="a", cause="new_text"}}'
        values: '0+500x120'
      - series: 'keepwarm_prompt_tokens_total{{instance="a", source="cold"}}'
        values: '0+1000x120'
      - series: 'keepwarm_prompt_tokens_total{{instance="a", source="slot"}}'
        values: '0+1000x120'
    promql_expr_test:
      - expr: round(keepwarm:cold_tokens:rate1h{{cause="timestamp"}} * 60)
        eval_time: 90m
        exp_samples:
          - labels: '{{instance="a", cause="timestamp"}}'
            value: 500
    alert_rule_test:
      - alertname: KeepwarmPromptsChange
        eval_time: 110m
        exp_alerts:
          - exp_labels: {{severity: info, instance: a, cause: timestamp}}
            exp_annotations:
              summary: "A fifth of all prompt tokens on a are prefilled because of one habit of a client: timestamp"
              description: "`keepwarm explain` on such a request, or the page, shows the very place and what to do."
  - interval: 1m
    input_series:
      - {{series: 'keepwarm_outcomes_total{{instance="a", outcome="answered"}}', values: '0+100x60'}}
      - {{series: 'keepwarm_outcomes_total{{instance="a", outcome="failed"}}', values: '0+1x60'}}
      - {{series: 'keepwarm_engine_restarts_total{{instance="a", reason="died"}}', values: '0+1x60'}}
      - {{series: 'keepwarm_misses_total{{instance="a", reason="checksum"}}', values: '0x60'}}
    alert_rule_test:
      - {{alertname: KeepwarmFailures, eval_time: 50m, exp_alerts: []}}
      - {{alertname: KeepwarmBrokenPromises, eval_time: 50m, exp_alerts: []}}
      - alertname: KeepwarmEngineRestarts
        eval_time: 60m
        exp_alerts:
          - exp_labels: {{severity: warning, instance: a, reason: died}}
            exp_annotations:
              summary: "The engine behind a was restarted 60 times within an hour (died)"
              description: "Each restart empties all slots. The log holds the engine's last lines."
"""  # noqa: E501 - the alerts' own words


def test_alerts_fire_when_they_should_and_not_otherwise(tmp_path: Path) -> None:
    test = tmp_path / "rules.test.yml"
    test.write_text(RULES_TEST.format(rules=PROMETHEUS / "keepwarm.rules.yml"))
    promtool("test", "rules", str(test))


def used_names(text: str) -> set[str]:
    names = set(re.findall(r"\bkeepwarm_\w+", text))
    return {re.sub(r"_(bucket|count|sum)$", "", n) if "seconds" in n else n for n in names}


def known_names() -> set[str]:
    metrics = Metrics()
    exercise(metrics)
    out: set[str] = set()
    for family in families(metrics.text()):
        out.add(f"{family.name}_total" if family.type == "counter" else family.name)
    return out


def test_dashboard_and_alerts_use_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    rules = (PROMETHEUS / "keepwarm.rules.yml").read_text()
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    assert len(expressions) > 15
    assert used_names(" ".join(expressions)) <= known_names()
    assert used_names(re.sub(r'".*"', "", rules)) <= known_names()


def test_the_dashboards_queries_can_be_read_by_prometheus(tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    rules = []
    for panel in dashboard["panels"]:
        for number, target in enumerate(panel["targets"]):
            expr = target["expr"]
            for variable, plain in (
                ("$__rate_interval", "5m"),
                ("$__range", "6h"),
                ("$instance", ".+"),
            ):
                expr = expr.replace(variable, plain)
            rules.append({"record": f"panel:{panel['id']}:{number}", "expr": expr})
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_the_dashboards_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_the_documentation_lists_every_metric_and_no_other() -> None:
    told = set(re.findall(r"^\| `(keepwarm_\w+)", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert told == {name for name in known_names() if name.startswith("keepwarm_")}
