"""API keys, and which addresses are this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepwarm.errors import ConfigError, UnauthorizedError
from keepwarm.keys import Keyring, is_loopback, load_keys


def test_without_keys_everyone_is_one_and_the_same() -> None:
    keys = load_keys([], "")
    assert not keys
    assert keys.namespace({}) == keys.namespace({"Authorization": "Bearer whatever"})


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer k1"},
        {"Authorization": "bearer  k1 "},
        {"x-api-key": "k1"},
        {"x-api-key": "k1", "Authorization": "Bearer wrong"},
    ],
)
def test_a_key_is_found_however_it_is_sent(headers: dict[str, str]) -> None:
    assert load_keys(["alice:k1", "bob:k2"], "").namespace(headers) == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "k1"},
        {"Authorization": "Basic k1"},
        {"Authorization": "Bearer k"},
        {"Authorization": "Bearer k11"},
        {"Authorization": "Bearer alice:k1"},
        {"x-api-key": ""},
        # Bytes that aren't UTF-8 arrive as half surrogates.
        {"x-api-key": "\udcff\udcfe"},
        {"x-api-key": "schlüssel"},
    ],
)
def test_anything_else_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UnauthorizedError):
        load_keys(["alice:k1"], "").namespace(headers)


def test_a_key_without_a_name_has_a_namespace_that_outlives_its_place(tmp_path: Path) -> None:
    first = load_keys(["k1", "k2"], "").namespace({"x-api-key": "k2"})
    assert load_keys(["k2"], "").namespace({"x-api-key": "k2"}) == first
    assert first != load_keys(["k1"], "").namespace({"x-api-key": "k1"})
    assert "k2" not in first


def test_several_keys_of_one_name_are_one_tenants() -> None:
    keys = load_keys(["alice:old", "alice:new"], "")
    assert keys.namespace({"x-api-key": "old"}) == keys.namespace({"x-api-key": "new"}) == "alice"


def test_keys_come_from_a_file_too_and_comments_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# the house\n\nalice:k1\n  bob:k2  \nk3\n")
    keys = load_keys(["carol:k4"], str(file))
    names = [keys.namespace({"x-api-key": f"k{n}"}) for n in (1, 2, 4)]
    assert names == ["alice", "bob", "carol"]
    assert keys.namespace({"x-api-key": "k3"})


@pytest.mark.parametrize("line", ["alice:", ":k1", ":", "  "])
def test_half_a_key_is_refused_at_the_start(line: str) -> None:
    with pytest.raises(ConfigError):
        load_keys([line], "")


def test_a_file_that_cant_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing-here"):
        load_keys([], str(tmp_path / "nothing-here"))


def test_a_name_may_hold_colons() -> None:
    assert Keyring([("team:alice", "k")]).namespace({"x-api-key": "k"}) == "team:alice"
    assert load_keys(["team:alice:k"], "").namespace({"x-api-key": "k"}) == "team:alice"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machines_own_addresses_need_no_key(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "192.168.1.2", "127.0.0.1.example.org", "localhost.example.org", "::12"],
)
def test_all_others_do(host: str) -> None:
    assert not is_loopback(host)
