"""Settings: three sources, one list, and errors that name the source and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from keepwarm.errors import ConfigError
from keepwarm.settings import Settings, client_environment, fields, load_settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, and nothing in the environment."""
    import os  # noqa: PLC0415 - only to clean it

    for name in list(os.environ):
        if name.startswith("KEEPWARM_") or name in ("STATE_DIRECTORY", "XDG_RUNTIME_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_without_any_source_all_defaults_hold(home: Path) -> None:
    settings, places = load_settings()
    assert settings == Settings()
    assert places.store == home / "state" / "keepwarm" / "store"
    assert places.settings_file is None


def test_flags_win_over_the_environment_and_that_over_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home / "keepwarm.toml", "[engine]\nslots = 2\ncontext = 2048\nthreads = 3\n")
    monkeypatch.setenv("KEEPWARM_ENGINE_CONTEXT", "4096")
    monkeypatch.setenv("KEEPWARM_ENGINE_THREADS", "5")
    settings, _ = load_settings(flags={"engine.threads": 7, "engine.model": None})
    assert (settings.engine.slots, settings.engine.context) == (2, 4096)
    assert settings.engine.threads == 7
    assert settings.engine.model == ""


def test_the_file_here_is_read_and_not_the_users(home: Path) -> None:
    write(home / "config" / "keepwarm" / "keepwarm.toml", "[engine]\nslots = 9\n")
    assert load_settings()[0].engine.slots == 9
    here = write(home / "keepwarm.toml", "[engine]\nslots = 2\n")
    settings, places = load_settings()
    assert settings.engine.slots == 2
    assert places.settings_file is not None
    assert places.settings_file.resolve() == here


def test_a_named_file_is_the_only_one_read(home: Path) -> None:
    write(home / "keepwarm.toml", "[engine]\nslots = 2\n")
    named = write(home / "other.toml", "[engine]\ncontext = 512\n")
    settings, _ = load_settings(file=named)
    assert (settings.engine.slots, settings.engine.context) == (Settings().engine.slots, 512)


def test_every_setting_can_be_given_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = msgspec.to_builtins(Settings())
    for key, _, _ in fields():
        section, name = key.split(".")
        default = defaults[section][name]
        if default is None:
            continue
        if key == "hygiene.rules":
            text = "sort-tools,drop-billing"
        elif isinstance(default, list | tuple):
            text = "one,two"
        elif isinstance(default, bool):
            text = "false" if default else "true"
        else:
            text = str(default)
        monkeypatch.setenv("KEEPWARM_" + key.replace(".", "_").upper(), text)
    settings, _ = load_settings()
    assert settings.server.api_keys == ("one", "two")
    assert settings.engine.slots == defaults["engine"]["slots"]
    assert settings.tiers.escalate is not Settings().tiers.escalate
    assert settings.hygiene.rules == ("sort-tools", "drop-billing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[engine]\nslots = 0\n", "engine.slots"),
        ("[engine]\nslots = 65\n", "engine.slots"),
        ("[engine]\ncontext = 3.5\n", "engine.context"),
        ('[server]\nport = "http"\n', "server.port"),
        ("[engine]\nslosts = 3\n", "slosts"),
        ("[engines]\nslots = 3\n", "engines"),
        ("engine = 3\n", "engine"),
        ('[hygiene]\nrules = ["sort_tools"]\n', "hygiene.rules"),
        ('[hygiene]\nrules = ["drop-billing"]\ndrop_lines = ["a("]\n', "hygiene.drop_lines"),
        ("[hygiene]\nrules = [3]\n", "hygiene.rules"),
        ('[hygiene]\ndrop_lines = ["Request .+"]\n', "hygiene.drop_lines"),
        ("[engine\n", "TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(home: Path, text: str, told: str) -> None:
    file = write(home / "keepwarm.toml", text)
    for flags in ({}, {"engine.model": "m.gguf"}):
        with pytest.raises(ConfigError) as caught:
            load_settings(flags=flags)
        assert told in str(caught.value)
        assert file.name in str(caught.value)


def test_an_unknown_rule_of_hygiene_is_told_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEEPWARM_HYGIENE_RULES", "sort-tools,no-dates")
    with pytest.raises(ConfigError, match=r"environment.*'no-dates'.*move-volatile"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("KEEPWARM_ENGINE_SLOTS", "many"),
        ("KEEPWARM_ENGINE_SLOTS", "2.5"),
        ("KEEPWARM_SERVER_QUEUE_TIMEOUT_S", "soon"),
        ("KEEPWARM_TIERS_ESCALATE", "perhaps"),
    ],
)
def test_a_mistake_in_the_environment_is_told_by_its_name(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=name):
        load_settings()


def test_a_bound_that_the_environment_breaks_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEEPWARM_ENGINE_SLOTS", "1000")
    with pytest.raises(ConfigError, match=r"engine\.slots.*environment"):
        load_settings()


def test_a_file_that_isnt_there_is_an_error_only_when_it_is_named(home: Path) -> None:
    with pytest.raises(ConfigError, match="elsewhere"):
        load_settings(file=home / "elsewhere.toml")


def test_a_service_keeps_its_state_where_its_manager_says(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", f"{home}/service:{home}/second")
    assert load_settings()[1].store == home / "service" / "keepwarm" / "store"


def test_every_setting_says_what_it_is() -> None:
    def described(kind: Any) -> bool:
        return any(
            isinstance(note, msgspec.Meta) and note.description
            for note in getattr(kind, "__metadata__", ())
        )

    assert [key for key, kind, _ in fields() if not described(kind) and key != "server.port"] == []


def test_a_client_gets_the_users_environment_changed_and_no_proxy_to_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEPT", "1")
    monkeypatch.setenv("TAKEN", "1")
    monkeypatch.setenv("NO_PROXY", "intranet,localhost")
    monkeypatch.delenv("no_proxy", raising=False)
    made = client_environment({"TAKEN": None, "NEW": "2"})
    assert (made["KEPT"], made["NEW"]) == ("1", "2")
    assert "TAKEN" not in made
    assert made["NO_PROXY"] == "intranet,localhost,127.0.0.1"
    assert made["no_proxy"] == "127.0.0.1,localhost"


def test_a_user_of_no_home_is_at_home_at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert load_settings()[1].config_home == Path("/.config")


def test_defaults_of_a_command_count_where_no_source_says_otherwise(home: Path) -> None:
    (home / "keepwarm.toml").write_text("[engine]\nslots = 3\n")
    settings, _ = load_settings(defaults={"engine.slots": 2, "engine.context": 8192})
    assert (settings.engine.slots, settings.engine.context) == (3, 8192)
