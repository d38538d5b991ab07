"""Who may ask a fleet's front for what it answers itself."""

from __future__ import annotations

import pytest

from keepwarm.errors import ForbiddenError, UnauthorizedError
from keepwarm.fleet.admission import admission_of, is_page
from keepwarm.keys import load_keys
from keepwarm.settings import ServerSettings

OWN = ("/keepwarm/fleet", "/metrics")
HERE = {"Host": "127.0.0.1:8090"}
KEY = {"Authorization": "Bearer alice-key"}


def check(method: str, path: str, *keys: str, **headers: str) -> None:
    told = {**HERE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    admission_of(ServerSettings(api_keys=keys), load_keys(keys, "")).check(method, path, told)


@pytest.mark.parametrize("path", [*OWN, "/keepwarm/", "/v1/chat/completions"])
def test_without_keys_a_name_that_any_site_could_take_is_refused(path: str) -> None:
    check("GET", path)
    with pytest.raises(ForbiddenError):
        check("GET", path, Host="evil.example")


@pytest.mark.parametrize("path", OWN)
def test_without_keys_another_site_reads_no_page_of_the_fleet(path: str) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec_Fetch_Site": "cross-site"}):
        with pytest.raises(ForbiddenError):
            check("GET", path, **headers)


def test_with_keys_the_fleets_own_page_is_for_its_own_address_alone() -> None:
    with pytest.raises(ForbiddenError):
        check("GET", "/keepwarm/fleet", "alice:alice-key", Origin="https://a.example", **KEY)
    check("GET", "/metrics", "alice:alice-key", Origin="https://a.example", **KEY)


@pytest.mark.parametrize("path", [*OWN, "/v1/models", "/nothing"])
def test_with_keys_nothing_is_told_without_one(path: str) -> None:
    with pytest.raises(UnauthorizedError):
        check("GET", path, "alice:alice-key")
    check("GET", path, "alice:alice-key", **KEY)
    for open_path in ("/health", "/keepwarm/"):
        check("GET", open_path, "alice:alice-key")


def test_a_preflight_sees_no_page() -> None:
    assert is_page("GET", "/metrics")
    assert is_page("HEAD", "/keepwarm/fleet")
    for method in ("OPTIONS", "POST", "DELETE"):
        assert not any(is_page(method, path) for path in OWN)
