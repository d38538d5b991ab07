"""`keepwarm service` writes only what was shown, and never over what somebody has changed."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keepwarm.cli.main import app
from keepwarm.errors import ConfigError, ModelError
from keepwarm.service.unitfile import seal_state, values

Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `keepwarm service ...` with units in a folder of its own."""

    def run(*words: str, answer: str | None = None, error: type[Exception] | None = None) -> Any:
        environment = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}
        command = ["service", words[0], "--user", "--directory", str(tmp_path / "units")]
        done = CliRunner().invoke(app, [*command, *words[1:]], input=answer, env=environment)
        if error is not None:
            assert isinstance(done.exception, error), done.output
        return done

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF file that names an architecture and holds nothing else."""
    key, value = b"general.architecture", b"llama"
    pair = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    return path


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return tmp_path / "units" / "keepwarm.service"


def test_installing_shows_the_whole_unit_and_writes_it_when_told_to(
    run: Run, model: Path, unit: Path
) -> None:
    done = run("install", "--model", str(model), answer="n\n")
    assert f"+++ {unit}" in done.stdout
    assert "Write it?" in done.output
    assert not unit.exists()
    done = run("install", "--model", str(model), "--port", "9000", answer="y\n")
    assert done.exit_code == 0
    assert seal_state(unit.read_text()) == "intact"
    assert values(unit.read_text(), "ExecStart")[0].endswith(f"--model {model} --port 9000")


def test_a_second_time_only_what_differs_is_shown(run: Run, model: Path, unit: Path) -> None:
    run("install", "--model", str(model), "--yes")
    before = unit.read_text()
    done = run("install", "--model", str(model), "--yes")
    assert done.stdout == ""
    assert unit.read_text() == before
    done = run("install", "--model", str(model), "--slots", "2", "--yes")
    changed = [line for line in done.stdout.splitlines() if line.startswith("+Exec")]
    assert len(changed) == 1
    assert changed[0].endswith("--slots 2")


def test_a_unit_changed_by_hand_is_not_replaced_unasked(run: Run, model: Path, unit: Path) -> None:
    run("install", "--model", str(model), "--yes")
    unit.write_text(unit.read_text().replace("WatchdogSec=30", "WatchdogSec=300"))
    changed = unit.read_text()
    refused = run("install", "--model", str(model), "--yes", error=ConfigError)
    assert "-WatchdogSec=300" in refused.stdout
    assert unit.read_text() == changed
    asked = run("install", "--model", str(model), answer="n\n")
    assert "changed by hand" in asked.output
    assert unit.read_text() == changed
    run("install", "--model", str(model), "--yes", "--overwrite")
    assert "WatchdogSec=30\n" in unit.read_text()


def test_a_unit_of_somebody_elses_is_not_replaced_unasked(
    run: Run, model: Path, unit: Path
) -> None:
    unit.parent.mkdir()
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    run("install", "--model", str(model), "--yes", error=ConfigError)
    assert "/bin/true" in unit.read_text()


def test_uninstalling_removes_what_was_installed_and_nothing_else(
    run: Run, model: Path, unit: Path
) -> None:
    run("uninstall", "--yes", error=ConfigError)
    run("install", "--model", str(model), "--yes")
    run("uninstall", answer="n\n")
    assert unit.exists()
    unit.write_text(unit.read_text() + "# mine\n")
    run("uninstall", "--yes", error=ConfigError)
    assert unit.exists()
    run("uninstall", answer="y\n")
    assert not unit.exists()
    assert model.exists()


def test_status_of_what_is_not_installed_is_three(run: Run) -> None:
    done = run("status", "--json")
    assert done.exit_code == 3
    report = json.loads(done.stdout)
    assert (report["file_state"], report["running"]) == ("missing", False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--model"),
        (["--model", "MODEL", "--plain"], "--engine"),
        (["--model", "MODEL", "--tiers", "/nowhere"], "/nowhere"),
        (["--model", "MODEL", "--engine", "/nowhere"], "/nowhere"),
    ],
)
def test_what_could_not_start_is_not_installed(
    run: Run, model: Path, unit: Path, words: list[str], said: str
) -> None:
    words = [str(model) if word == "MODEL" else word for word in words]
    done = run("install", "--yes", *words, error=ConfigError)
    assert said in str(done.exception)
    assert not unit.exists()


def test_a_file_that_is_no_model_is_not_installed(run: Run, tmp_path: Path, unit: Path) -> None:
    run("install", "--yes", "--model", str(tmp_path / "missing.gguf"), error=ModelError)
    assert not unit.exists()


def test_a_system_service_takes_no_store_of_its_own(model: Path, tmp_path: Path) -> None:
    command = ["service", "print", "--model", str(model), "--store", str(tmp_path / "s")]
    done = CliRunner().invoke(app, command, env={"HOME": str(tmp_path)})
    assert isinstance(done.exception, ConfigError)
    assert "state directory" in str(done.exception)


def test_settings_found_at_installing_are_named_in_the_unit(
    run: Run, model: Path, unit: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "config" / "keepwarm" / "keepwarm.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text(
        f'[engine]\nmodel = "{model}"\n[server]\nport = 8123\ndrain_timeout_s = 99\n'
    )
    run("install", "--yes")
    (line,) = values(unit.read_text(), "ExecStart")
    assert f"--config {settings}" in line
    assert "--port 8123" in line
    assert values(unit.read_text(), "TimeoutStopSec") == ["159"]
