"""The demo and the benchmark, in short, as commands on the real engine; what they leave running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tinymodels import small_model

pytestmark = pytest.mark.live

COMMAND = [sys.executable, "-m", "keepwarm"]
# Marks every process that comes of a test, however it was started.
MARK = "DEMO_TEST_RUN"
# Far more than a loaded machine needs; a wait that is over sooner ends sooner.
PATIENCE_S = 1500.0
# One thread: with more, each step of the engine waits for all of them, and on a machine that does
# something else that takes many times as long.
THREADS = ("--threads", "1")
WORDS = ("doors", "lamps", "files", "tools", "notes", "names", "dates", "rates", "boats", "goats")


@pytest.fixture
def tiers(tmp_path: Path) -> Path:
    """Three tiers of some 30, 170 and 320 tokens: a cold prefill takes a second."""
    root = tmp_path / "tiers"
    rules = " ".join(f"Rule {i}: mind the {w}." for i, w in enumerate(WORDS * 2))
    customs = " ".join(f"Custom {i}: leave the {w} alone." for i, w in enumerate(WORDS * 2))
    for name, manifest, file, text in (
        ("minimal", 'description = "a"', "system.md", "You are an agent. Answer in a few words."),
        ("standard", 'description = "b"\nextends = "minimal"\ndefault = true', "context.md", rules),
        ("full", 'description = "c"\nextends = "standard"', "context.md", customs),
    ):
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "tier.toml").write_text(manifest)
        (folder / file).write_text(text)
    return root


class Run:
    """One command under way, in a directory and with a temporary directory of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self.temporary = directory / "tmp"
        self.temporary.mkdir()
        self.log = directory / "log"
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary)}
        with self.log.open("w") as sink:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments],
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=sink,
                text=True,
                start_new_session=True,
            )

    def finish(self) -> str:
        """Wait for the end; what it printed."""
        said, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.log.read_text()[-3000:]
        return said

    def alive(self) -> list[int]:
        """Every process that comes of it and still runs, itself included."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                marked = wanted in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked and state != "Z":
                found.append(int(entry.name))
        return found

    def wait_until_alive(self, count: int, *, more: bool) -> None:
        """Wait until at least (`more`), or at most, so many processes run."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            number = len(self.alive())
            if (number >= count) if more else (number <= count):
                return
            assert not more or self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.05)
        pytest.fail(f"{len(self.alive())} processes run, {count} were waited for")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts commands and, whatever became of the test, ends what they left."""
    runs: list[Run] = []

    def start(*arguments: str) -> Run:
        if not Path("/proc/self/environ").exists():
            pytest.skip("processes are found by /proc")
        runs.append(Run(tmp_path, *arguments))
        return runs[-1]

    yield start
    for run in runs:
        for pid in run.alive():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()


def demo_arguments(tiers: Path) -> list[str]:
    model = str(small_model().absolute())
    return ["demo", "--quick", "--model", model, "--tiers", str(tiers), *THREADS]


def test_the_demo_shows_less_prefilled_draws_it_and_leaves_nothing(
    started: Any, tiers: Path, tmp_path: Path
) -> None:
    run = started(*demo_arguments(tiers))
    table = run.finish()
    for word in ("first request", "3 identical", "minimal", "standard", "full", "SIGKILL"):
        assert word in table

    results = tmp_path / "demo-results"
    report = json.loads((results / "demo.json").read_text())
    ET.fromstring((results / "demo.svg").read_text())
    tokens = {p["tier"]: p["tokens"] for p in report["prefixes"]}
    assert 0 < tokens["minimal"] < tokens["standard"] < tokens["full"]
    assert report["store_bytes"] > 0
    identical = [s for s in report["samples"] if s["scenario"] == "identical"]
    cold = [s for s in identical if s["arm"] == "no-cache"]
    warm = [s for s in identical if s["arm"] == "keepwarm"]
    assert len(cold) == len(warm) == 3
    whole = cold[0]["prefilled_tokens"]
    for c, w in zip(cold, warm, strict=True):
        # The same prompt: all of it prefilled here, and there only what the tier doesn't hold.
        assert (c["cached_tokens"], c["prefilled_tokens"]) == (0, whole)
        assert w["cached_tokens"] + w["prefilled_tokens"] == whole
        assert w["cached_tokens"] >= tokens["standard"]
        assert w["plan"] in ("slot", "snapshot")
    for tier, count in tokens.items():
        (killed,) = (s for s in report["samples"] if s["step"] == f"{tier}, after SIGKILL")
        # A tier is warm when the engine is back. (Its last tokens, of the turn that follows, are
        # the user's; the shortest may be taken from what the next one shares with it.)
        assert killed["cached_tokens"] > 0
        assert killed["prefilled_tokens"] < count or tier == "minimal"

    assert run.alive() == []
    assert list(run.temporary.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing_running(
    started: Any, tiers: Path, number: signal.Signals
) -> None:
    run = started(*demo_arguments(tiers))
    # The demo, Keepwarm's guard, Keepwarm and its engine.
    run.wait_until_alive(4, more=True)
    run.process.send_signal(number)
    run.wait_until_alive(0, more=False)
    if number != signal.SIGKILL:
        assert run.process.wait() == 130
        assert list(run.temporary.iterdir()) == []


def test_a_demo_without_a_model_says_how_to_get_one(started: Any, tmp_path: Path) -> None:
    run = started("demo", "--model", str(tmp_path / "none.gguf"))
    assert run.process.wait(PATIENCE_S) == 1
    said = " ".join(run.log.read_text().split())
    assert "none.gguf" in said
    assert "--model" in said
    assert run.alive() == []


def test_every_scenario_of_the_benchmark_measures_what_it_says(
    started: Any, tiers: Path, tmp_path: Path
) -> None:
    small = ("--runs", "1", "--requests", "2", "--pairs", "3", "--starts", "1", "--rounds", "1")
    model = ("--model", str(small_model().absolute()), "--tiers", str(tiers))
    # A slot's part holds the prompt of 9 kB in `overhead`.
    run = started("bench", "all", *small, *model, *THREADS, "--context", "16384", "--json")
    report = json.loads(run.finish())
    samples = report["samples"]
    tokens = {p["tier"]: p["tokens"] for p in report["prefixes"]}

    def of(scenario: str, arm: str) -> list[dict[str, Any]]:
        return [s for s in samples if (s["scenario"], s["arm"]) == (scenario, arm)]

    for scenario in ("first", "identical", "new"):
        assert all(s["cached_tokens"] == 0 for s in of(scenario, "no-cache"))
        assert len(of(scenario, "no-cache")) == len(of(scenario, "llama-server"))
        assert len(of(scenario, "no-cache")) == len(of(scenario, "keepwarm"))
    for sample in of("first", "keepwarm"):
        assert sample["cached_tokens"] >= tokens["minimal"] - 2
    again = of("identical", "keepwarm")[-1]
    assert again["prefilled_tokens"] < of("new", "keepwarm")[-1]["prefilled_tokens"]
    direct, through = of("overhead", "engine, hot slot"), of("overhead", "keepwarm")
    assert [s["prefilled_tokens"] for s in direct] == [s["prefilled_tokens"] for s in through]
    assert {s["step"] for s in direct} == {"standard", "own prompt, 9 kB"}
    for arm in ("engine, direct", "keepwarm"):
        answers = of("load", arm)
        assert len(answers) == 32
        assert all(s["decoded_tokens"] == 64 for s in answers)
    assert len(of("page", "keepwarm")) == 3 * 2 * 16
    memory = [a for a in report["amounts"] if a["scenario"] == "idle"]
    assert {a["step"] for a in memory} >= {
        "queued requests",
        "before queued requests",
        "open event streams",
    }
    assert all(a["value"] > 10 for a in memory)
    steps = {s["step"] for s in of("switch", "keepwarm")}
    assert {"minimal to standard", "standard to full", "full to standard"} <= steps
    talks = [s for s in of("conversations", "keepwarm") if s["step"] == "6 interleaved"]
    assert len(talks) == 18
    resumed = [s for s in of("conversations", "keepwarm") if "resumed" in s["step"]]
    assert len(resumed) == 6
    starts = {d["arm"] for d in report["durations"] if d["scenario"] == "ready"}
    assert starts == {"keepwarm", "engine alone"}
    whats = " ".join(f["what"] for f in report["figures"])
    for word in ("first request", "identical", "SIGKILL", "hot slot", "start to ready", "one slot"):
        assert word in whats
    assert len(list((tmp_path / "bench-results").iterdir())) == 3
    assert run.alive() == []
    assert list(run.temporary.iterdir()) == []
