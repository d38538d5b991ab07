"""The table of routes, and which web sites may use it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keepwarm.api.origins import Origins, is_local_name, is_local_origin
from keepwarm.api.routes import ROUTES, Access, Way, access_of, find, methods_of, normal_path


@given(st.text(max_size=40))
def test_a_normal_path_is_plain_and_stays_as_it_is(raw: str) -> None:
    path = normal_path(raw)
    if path is not None:
        assert normal_path(path) == path
        assert not set(path) & set("%\\;?#\0 \n")
        assert not any(segment in (".", "..") for segment in path.split("/"))


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/v1%2Fmodels", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/%76%31/models", "/v1/models"),
        ("/", "/"),
        ("/v1%252Fmodels", None),
        ("//v1/models", None),
        ("/v1//models", None),
        ("/v1/models//", None),
        ("/v1/../slots/0", None),
        ("/v1/%2e%2e/slots/0", None),
        ("/v1/models%00", None),
        ("/v1/models;x", None),
        ("/v1\\models", None),
        ("/v1/%ff", None),
        ("", None),
        ("*", None),
        ("/" + "a" * 5000, None),
    ],
)
def test_a_path_is_decoded_once_and_oddities_are_nobodys(raw: str, path: str | None) -> None:
    assert normal_path(raw) == path


def test_every_line_of_the_table_is_found_by_its_own_path() -> None:
    for route in ROUTES:
        example = route.path.replace("{file*}", "a/b.js").replace("{id*}", "a/b")
        example = example.replace("{", "").replace("}", "")
        found = find(route.method, example)
        assert found, route
        assert found.route == route


def test_a_line_says_who_answers_and_a_refusal_why() -> None:
    for route in ROUTES:
        assert bool(route.handler) == (route.way is Way.OWN)
        assert bool(route.reason) == (route.way is Way.REFUSED)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)


def test_what_isnt_in_the_table_is_open_to_nobody_more_than_what_is() -> None:
    assert access_of("/keepwarm/whatever") is Access.OWN
    assert access_of("/whatever") is Access.API
    assert methods_of("/whatever") == ()
    assert methods_of("/slots/0") == ()
    assert methods_of("/v1/models") == ("GET", "HEAD")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8090", "localhost:8090", "[::1]:8090", "box:8090", "box.local", "192.168.1.7", ""],
)
def test_names_that_no_site_can_take(host: str) -> None:
    assert is_local_name(host)


@pytest.mark.parametrize(
    "host", ["evil.example:8090", "127.0.0.1.evil.example", "localhost.evil.example", "local.x"]
)
def test_names_that_a_site_may_have_given_our_address(host: str) -> None:
    assert not is_local_name(host)
    assert Origins().refusal(Access.API, "GET", {"Host": host})
    assert not Origins(has_keys=True).refusal(Access.API, "GET", {"Host": host})
    assert not Origins(hosts=(host.partition(":")[0],)).refusal(Access.API, "GET", {"Host": host})


@pytest.mark.parametrize(
    ("origin", "is_local"),
    [
        ("http://localhost:5173", True),
        ("http://127.0.0.1:3000", True),
        ("http://[::1]:3000", True),
        ("https://app.localhost", True),
        ("vscode-webview://abc", True),
        ("tauri://localhost", True),
        ("null", False),
        ("", False),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("http://192.168.1.7", False),
        ("chrome-extension://abc", False),
        ("ftp://localhost", False),
    ],
)
def test_pages_of_this_machine(origin: str, is_local: bool) -> None:
    assert is_local_origin(origin) == is_local


def test_our_own_pages_are_for_their_own_address_alone() -> None:
    host = "127.0.0.1:8090"
    for has_keys in (False, True):
        rules = Origins(("*",), has_keys=has_keys)
        assert rules.lets_in(Access.OWN, host, f"http://{host}")
        assert not rules.lets_in(Access.OWN, host, "http://127.0.0.1:9000")
        assert not rules.lets_in(Access.OWN, host, "null")
        assert not rules.lets_in(Access.OWN, "", "https://")
        assert rules.lets_in(Access.API, host, "https://any.example")


def test_a_link_may_be_followed_and_a_picture_of_another_site_not() -> None:
    headers = {"Host": "localhost", "Sec-Fetch-Site": "cross-site"}
    rules = Origins()
    assert rules.refusal(Access.API, "GET", headers | {"Sec-Fetch-Mode": "no-cors"})
    assert not rules.refusal(Access.API, "GET", headers | {"Sec-Fetch-Mode": "navigate"})
    assert rules.refusal(Access.API, "POST", headers | {"Sec-Fetch-Mode": "navigate"})
