"""The router's files and its command: weights, word lists, deployment rules, batches."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepwarm.cli.main import app
from keepwarm.errors import ConfigError
from keepwarm.router import Reason, RouteRequest, config_from_toml, weights_from_json
from keepwarm.router.config import RouterConfig
from keepwarm.router.model import weights_to_json
from keepwarm.tiers.router_files import load_router, shipped_weights

ROOT = Path(__file__).resolve().parents[2]
RULES = """
[costs]
tools_s = 40

[[rule]]
name = "home"
tier = "standard"
any = ["Thermostat", "living room light*"]

[[rule]]
name = "review"
tier = "full"
all = ["weekly", "review"]

[[rule]]
name = "yes or no"
tier = "minimal"
any = ["yes or no"]
none = ["file"]
max_words = 12
floor = false
"""


def test_weights_survive_being_written_and_read() -> None:
    shipped = shipped_weights()
    assert weights_from_json(json.loads(json.dumps(weights_to_json(shipped)))) == shipped


@pytest.mark.parametrize(
    "damaged", [None, {}, {"format": 99}, {"format": 1, "scores": {}, "words": {}}, {"format": 1}]
)
def test_weights_that_cant_be_used_are_refused(damaged: Any) -> None:
    with pytest.raises(ConfigError, match="learn_router"):
        weights_from_json(damaged)


def router(tmp_path: Path, rules: str = RULES) -> Any:
    (tmp_path / "routing.toml").write_text(rules, encoding="utf-8")
    return load_router(tiers_dir=tmp_path, own_tools=[])


@pytest.mark.parametrize(
    ("text", "tier", "name"),
    [
        ("Is the thermostat on?", "standard", "home"),
        ("Dim the living room lights", "standard", "home"),
        ("Prepare the weekly team review", "full", "review"),
        ("Is water wet, yes or no?", "minimal", "yes or no"),
    ],
)
def test_a_deployment_rule_decides_and_is_named(
    tmp_path: Path, text: str, tier: str, name: str
) -> None:
    decision = router(tmp_path).route(RouteRequest(text=text))
    assert (decision.tier, decision.reason) == (tier, Reason.DEPLOYMENT_RULE)
    assert decision.detail == name


def test_a_rule_matches_whole_words_and_needs_all_its_conditions(tmp_path: Path) -> None:
    for text in ("thermostatic valves", "the weekly plan", "file it: yes or no?"):
        assert router(tmp_path).route(RouteRequest(text=text)).reason is not Reason.DEPLOYMENT_RULE


def test_a_floor_may_be_exceeded_and_a_final_rule_may_not(tmp_path: Path) -> None:
    routed = router(tmp_path)
    assert routed.route(RouteRequest(text="Set the thermostat as we discussed")).tier == "full"
    assert routed.route(RouteRequest(text="As we discussed, yes or no?")).tier == "minimal"


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("nonsense = 1", "nonsense"),
        ("[costs]\ntools = 1", "tools_s"),
        ("[costs]\ntools_s = -1", "tools_s"),
        ("[costs]\nspoiled = 1.5", "spoiled is a share"),
        ("[costs]\nstep_s = 0.3", "step_s is no more"),
        ('[[rule]]\ntier = "huge"\nany = ["x"]', "rule 1: tier"),
        ('[[rule]]\ntier = "full"', "every request"),
        ('[[rule]]\ntier = "full"\nany = "x"', "any"),
        ('[[rule]]\ntier = "full"\nany = ["!?"]', "no word"),
        ('[[rule]]\ntier = "full"\nany = ["x"]\nmax_words = -1', "max_words"),
        ('[[rule]]\ntier = "full"\nany = ["x"]\nwhen = "now"', "when"),
        ("[[rule", "routing.toml"),
        ('unsure_tier = "auto"', "unsure_tier"),
    ],
)
def test_rules_that_arent_understood_are_refused_by_name(
    tmp_path: Path, rules: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        router(tmp_path, rules)


def test_the_packaged_rules_are_the_defaults() -> None:
    packaged = ROOT / "configs" / "prompt-tiers" / "routing.toml"
    assert config_from_toml(tomllib.loads(packaged.read_text(encoding="utf-8"))) == RouterConfig()


def test_the_examples_in_the_packaged_rules_are_valid() -> None:
    packaged = (ROOT / "configs" / "prompt-tiers" / "routing.toml").read_text(encoding="utf-8")
    head, _, examples = packaged.partition("#\n# [[rule]]")
    uncommented = "[[rule]]" + examples.replace("\n# ", "\n").replace("\n#\n", "\n\n")
    assert len(config_from_toml(tomllib.loads(head + uncommented)).rules) == 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a `keepwarm route` command with no server, no settings and an empty state directory."""
    for name, value in {
        "HOME": tmp_path,
        "XDG_STATE_HOME": tmp_path / "state",
        "XDG_CONFIG_HOME": tmp_path / "config",
        "KEEPWARM_SERVER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, stdin: str = "") -> Any:
        return CliRunner().invoke(app, ["route", *arguments], input=stdin)

    return invoke


def test_a_text_is_explained_without_a_server(run: Any) -> None:
    told = json.loads(run("Run the tests and tell me what fails", "--json").stdout)
    assert told["tier"] in ("standard", "full")
    assert set(told["costs"]) == {"minimal", "standard", "full"}
    for cost in told["costs"].values():
        parts = sum(cost[part] for part in ("first_s", "reply_s", "displaced_s", "risk_s"))
        assert parts == pytest.approx(cost["expected_s"], abs=0.01)
    assert told["contributions"]
    shown = run("hi").stdout
    assert "small-talk" in shown
    assert "minimal" in shown
    for head in ("first token", "30 tokens", "displaces", "risk", "sum, s"):
        assert head in shown


def test_a_batch_is_answered_in_order_with_or_without_tools(run: Any, tmp_path: Path) -> None:
    lines = [
        {"query": "hi"},
        {"query": "What's the weather in Rome?", "tools": []},
        {
            "query": "What's the weather in Rome?",
            "tools": [{"name": "get_weather", "description": "Get the weather of a city."}],
        },
        {"query": "as we discussed, go on", "tools": None},
        {"query": "a\u2028b"},
    ]
    file = tmp_path / "requests.jsonl"
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text + "\n\n", encoding="utf-8")
    done = run("--batch", str(file))
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["tier"] for each in answers[:4]] == ["minimal", "minimal", "standard", "full"]
    assert len(answers) == len(lines)
    for each in answers:
        assert set(each) == {"tier", "p_tools", "p_context", "reason"}


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"query": 1}',
        '{"query": "x", "tools": {}}',
        '{"query": "x", "tools": [1]}',
    ],
)
def test_a_bad_line_of_a_batch_is_named(run: Any, line: str) -> None:
    done = run("--batch", "-", stdin='{"query": "hi"}\n' + line + "\n")
    assert isinstance(done.exception, ConfigError)
    assert "line 2" in str(done.exception)
    assert len(done.stdout.splitlines()) == 1
