"""What is installed is what stands in deploy/systemd, with a person's own values in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepwarm.cli.main import app
from keepwarm.service.installation import difference
from keepwarm.service.presence import stop_timeout_s
from keepwarm.service.render import (
    Scope,
    UnitPaths,
    Wanted,
    is_hidden,
    keepwarm_unit,
    outermost,
    plain_unit,
)
from keepwarm.service.unitfile import values
from keepwarm.settings import Settings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SYSTEM = (DEPLOY / "keepwarm.service").read_text()
USER = (DEPLOY / "user" / "keepwarm.service").read_text()
PLAIN = (DEPLOY / "llama-server.service").read_text()
USER_PLAIN = (DEPLOY / "user" / "llama-server.service").read_text()
WARMUP = ["/opt/keepwarm/.venv/bin/python", "/opt/keepwarm/scripts/warmup_cache.py"]


def _wanted(scope: Scope = Scope.SYSTEM, **changed: object) -> Wanted:
    values: dict[str, object] = {
        "scope": scope,
        "keepwarm": "/usr/local/bin/keepwarm",
        "paths": UnitPaths(model="/srv/models/model.gguf"),
        "port": 8090,
    }
    return Wanted(**(values | changed))  # type: ignore[arg-type]


def _settings(text: str) -> dict[str, list[str]]:
    names = re.findall(r"^([A-Z]\w+)=", text, flags=re.MULTILINE)
    return {name: values(text, name) for name in names}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], SYSTEM),
        (["--user"], USER),
        (["--plain"], PLAIN),
        (["--plain", "--user"], USER_PLAIN),
    ],
)
def test_print_gives_the_units_of_deploy(arguments: list[str], text: str, tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = CliRunner().invoke(app, ["service", "print", *arguments], env=environment)
    assert done.exit_code == 0
    assert done.stdout == text


def test_rendering_the_examples_own_values_changes_no_setting() -> None:
    assert _settings(keepwarm_unit(SYSTEM, _wanted())) == _settings(SYSTEM)
    paths = UnitPaths(
        model="/srv/models/model.gguf",
        engine="/usr/local/bin/llama-server",
        tiers="/opt/keepwarm/configs/prompt-tiers",
    )
    plain = plain_unit(PLAIN, _wanted(paths=paths, port=8080), warmup=WARMUP)
    assert _settings(plain) == _settings(PLAIN)


def test_only_the_command_differs_in_a_users_unit() -> None:
    text = keepwarm_unit(USER, _wanted(Scope.USER, port=9000, slots=2))
    found, before = _settings(text), _settings(USER)
    assert found.pop("ExecStart") == [
        "/usr/local/bin/keepwarm serve --model /srv/models/model.gguf --port 9000 --slots 2"
    ]
    del before["ExecStart"]
    assert found == before


def test_what_follows_the_dashes_goes_last() -> None:
    paths = UnitPaths(model="/m.gguf", engine="/opt/llama server")
    text = keepwarm_unit(USER, _wanted(Scope.USER, paths=paths, extra=("-ngl", "99")))
    (line,) = values(text, "ExecStart")
    assert line.endswith('--engine "/opt/llama server" --port 8090 -- -ngl 99')


def test_a_model_in_a_home_is_mounted_and_the_rest_of_the_home_is_not() -> None:
    paths = UnitPaths(model="/home/ann/m/model.gguf", also=("/home/ann/keepwarm", "/usr"))
    text = keepwarm_unit(SYSTEM, _wanted(paths=paths))
    assert values(text, "ProtectHome") == ["tmpfs"]
    assert values(text, "BindReadOnlyPaths") == ["/home/ann/keepwarm /home/ann/m/model.gguf"]


def test_the_parts_of_a_split_model_are_mounted_together() -> None:
    paths = UnitPaths(model="/home/ann/m/big-00001-of-00003.gguf")
    text = keepwarm_unit(SYSTEM, _wanted(paths=paths))
    assert values(text, "BindReadOnlyPaths") == ["/home/ann/m"]


def test_nothing_is_mounted_for_a_model_outside_of_homes() -> None:
    text = keepwarm_unit(SYSTEM, _wanted())
    assert values(text, "BindReadOnlyPaths") == []
    assert values(text, "ProtectHome") == ["yes"]


def test_listening_beyond_loopback_opens_the_services_network() -> None:
    text = keepwarm_unit(SYSTEM, _wanted(host="0.0.0.0", is_loopback=False))
    assert values(text, "IPAddressDeny") == [""]
    assert values(text, "IPAddressAllow") == ["any"]
    assert "--host 0.0.0.0" in values(text, "ExecStart")[0]


def test_the_plain_unit_warms_the_address_it_listens_on() -> None:
    paths = UnitPaths(model="/m.gguf", engine="/usr/bin/llama-server", chat_template="/t x.jinja")
    wanted = _wanted(
        Scope.USER, paths=paths, host="::", port=81, slots=2, context=4096, extra=("-ngl", "9")
    )
    text = plain_unit(USER_PLAIN, wanted, warmup=["/v/keepwarm", "warmup"])
    (server,), (post,) = values(text, "ExecStart"), values(text, "ExecStartPost")
    assert server.startswith("/usr/bin/llama-server --model /m.gguf --host")
    assert "--port 81 --parallel 2 --no-kv-unified --ctx-size 4096" in server
    assert server.endswith('--jinja --metrics --chat-template-file "/t x.jinja" -ngl 9')
    assert post.startswith("/v/keepwarm warmup --upstream http://127.0.0.1:81 --slot-dir %t/")
    assert "--tiers" not in post


def test_systemd_waits_longer_than_a_graceful_stop_takes() -> None:
    for text in (SYSTEM, USER):
        assert float(values(text, "TimeoutStopSec")[0]) >= stop_timeout_s(Settings())


def test_system_and_user_units_share_how_they_live() -> None:
    for key in ("Type", "KillMode", "Restart", "WatchdogSec", "OOMPolicy", "TimeoutStartSec"):
        assert values(SYSTEM, key) == values(USER, key)


def test_the_plain_units_start_the_same_server() -> None:
    def flags(text: str) -> list[str]:
        return re.findall(r" --[a-z-]+", values(text, "ExecStart")[0])

    assert flags(PLAIN) == flags(USER_PLAIN)


def test_hidden_is_what_lies_below_homes_and_temporary_folders() -> None:
    assert [is_hidden(p) for p in ("/home/a", "/root", "/tmp/x", "/homework/a", "/srv")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_a_path_inside_another_is_left_out() -> None:
    assert outermost(["/a/b/c", "/a/b", "/a/bc", "/d"]) == ["/d", "/a/b", "/a/bc"]


def test_a_difference_names_the_file_and_is_empty_for_equal_texts() -> None:
    assert difference("a\n", "a\n", Path("/u")) == ""
    assert difference(None, "a\n", Path("/u")).splitlines()[:2] == ["--- /dev/null", "+++ /u"]
